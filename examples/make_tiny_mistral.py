"""Make the model in examples/tiny-mistral, in about four minutes on 2 cores.

    python examples/make_tiny_mistral.py

From examples/wiki/train.jsonl the script makes a corpus of plain texts: the articles, and the
category tree in words. sentencepiece trains a byte-fallback BPE tokenizer on the corpus, and
train.py trains the model on it (configs/tiny_base.py).

The model is a base for fine-tuning. It has read the articles of the training file and the category
tree above them. It has not read which article belongs to which category, nor any line in the form
of the task, nor the articles of the evaluation and test files.
"""

import itertools
import json
import random
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import sentencepiece
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, processors

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for train.py, which is not a module of an environment
SOURCE = Path("out/tiny-base-source")  # as in configs/tiny_base.py
TARGET = ROOT / "examples/tiny-mistral"
VOCABULARY = 2048
ROOT_CATEGORY = "Main topic classifications"
NUM_WALKS = 800
MAX_WALK = 6  # categories
MAX_NARROWER = 12  # categories listed below another
ARCHITECTURE = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": VOCABULARY,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "legacy": True,
    "add_bos_token": True,
    "add_eos_token": False,
    "model_max_length": 1024,
}
GENERATION = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False}


def main() -> None:
    """Make the corpus and the tokenizer, train, and copy the trained model to its place."""
    import train
    from minilora.cli import load_config

    make_source()
    config = load_config([str(ROOT / "configs/tiny_base.py"), *sys.argv[1:]])
    exit_code = train.main(config)
    if exit_code:
        sys.exit(exit_code)
    copy_trained(Path("out/tiny-base/checkpoint-final"))
    size = sum(file.stat().st_size for file in TARGET.iterdir())
    print(f"{TARGET}: {size / 1e6:.2f} MB")


def make_source() -> None:
    """Write corpus, config and tokenizer, which is all that a model with random weights needs."""
    SOURCE.mkdir(parents=True, exist_ok=True)
    texts = make_corpus()
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    (SOURCE / "corpus.jsonl").write_text("".join(lines), encoding="utf-8")
    for name, content in (
        ("config.json", ARCHITECTURE),
        ("tokenizer_config.json", TOKENIZER),
        ("generation_config.json", GENERATION),
    ):
        (SOURCE / name).write_text(json.dumps(content, indent=2), encoding="utf-8")

    sentences = [line for text in texts for line in text.split("\n")]
    sentences += ["[INST] Title: [/INST] a -> b -> c"] * 20  # the form of the task, for its pieces
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(SOURCE / "tokenizer"),
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    write_tokenizer_json(SOURCE)


def make_corpus() -> list[str]:
    """Return each article, each category with its neighbours in the tree, and walks down the tree.

    All are texts in words, none in the form of the task.
    """
    with (ROOT / "examples/wiki/train.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    broader: dict[str, set[str]] = defaultdict(set)
    narrower: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        for path in row["paths"]:
            for parent, child in itertools.pairwise(path):
                broader[child].add(parent)
                narrower[parent].add(child)

    texts = [f"{row['title']}\n{row['abstract']}" for row in rows]
    for name in sorted(broader.keys() | narrower.keys()):
        lines = [f"Category: {name}"]
        if broader[name]:
            lines.append(f"Broader: {', '.join(sorted(broader[name]))}")
        if narrower[name]:
            lines.append(f"Narrower: {', '.join(sorted(narrower[name])[:MAX_NARROWER])}")
        texts.append("\n".join(lines))

    rng = random.Random(0)
    for _ in range(NUM_WALKS):
        walk = [rng.choice(sorted(narrower[ROOT_CATEGORY]))]
        while narrower[walk[-1]] and len(walk) < MAX_WALK:
            walk.append(rng.choice(sorted(narrower[walk[-1]])))
        text = " contains ".join(walk[:2])
        text += "".join(f", which contains {name}" for name in walk[2:])
        texts.append(text + ".")
    return texts


def write_tokenizer_json(directory: Path) -> None:
    """Write tokenizer.json: the BPE of tokenizer.model in the form of the tokenizers library.

    transformers 5 does not read a Mistral directory's tokenizer.model by Mistral's rules (it
    leaves out the dummy space), but takes a tokenizer.json as it is.
    """
    model = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}

    # sentencepiece keeps no merges: two pieces merge if both together are one, best score first
    merges = []
    for piece, i in vocab.items():
        if model.is_byte(i) or model.is_control(i) or model.is_unknown(i):
            continue
        for k in range(1, len(piece)):
            left, right = piece[:k], piece[k:]
            if left in vocab and right in vocab:
                merges.append((-model.get_score(i), vocab[left], vocab[right], (left, right)))
    pairs = [pair for _, _, _, pair in sorted(merges)]

    bpe = models.BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = [
        tokenizers.AddedToken(token, special=True, normalized=False)
        for token in ("<unk>", "<s>", "</s>")
    ]
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))


def copy_trained(trained: Path) -> None:
    """Copy a checkpoint to TARGET, its fp32 weights in bfloat16: half the size."""
    from minilora.checkpoint.hf_writer import save_config
    from minilora.checkpoint.tensor_files import TensorEntry, open_safetensors, write_safetensors

    TARGET.mkdir(parents=True, exist_ok=True)
    for name in (
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ):
        shutil.copyfile(trained / name, TARGET / name)

    save_config(TARGET, ARCHITECTURE, torch.bfloat16)
    with open_safetensors(trained / "model.safetensors") as file:
        entries = {}
        for name in file.keys():
            shape = tuple(file.get_slice(name).get_shape())
            entries[name] = TensorEntry(torch.bfloat16, shape)
        target = TARGET / "model.safetensors"
        write_safetensors(target, entries, lambda name: [file.get_tensor(name)])


if __name__ == "__main__":
    main()
