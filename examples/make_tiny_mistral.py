"""Make examples/tiny-mistral: python examples/make_tiny_mistral.py (about four minutes on two cores).

Out of examples/wiki/train.jsonl come a byte-fallback BPE tokenizer by sentencepiece and a plain-text corpus (the articles,
and the category tree in words); then this project's own train.py runs configs/tiny_base.py. The base has read the articles
of the training file and the tree above them, but not which article belongs where, no line in the form of the task, and no
article of the evaluation and test files.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SOURCE = Path("out/tiny-base-source")  # as in configs/tiny_base.py
TARGET = ROOT / "examples/tiny-mistral"
VOCABULARY = 2048
ROOT_CATEGORY = "Main topic classifications"
WALKS = 800
ARCHITECTURE = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": VOCABULARY, "hidden_size": 192,
    "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": None, "hidden_act": "silu",
    "tie_word_embeddings": True, "attention_dropout": 0.0, "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2,
    "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": True,
    "add_bos_token": True, "add_eos_token": False, "model_max_length": 1024,
}  # fmt: skip


def corpus() -> list[str]:
    """Each article as a text, each category with its neighbours in the tree, and random walks down the tree in words."""
    rows = [json.loads(line) for line in (ROOT / "examples/wiki/train.jsonl").open(encoding="utf-8")]
    broader, narrower = defaultdict(set), defaultdict(set)
    for path in (path for row in rows for path in row["paths"]):
        for parent, child in itertools.pairwise(path):
            broader[child].add(parent)
            narrower[parent].add(child)
    texts = [f"{row['title']}\n{row['abstract']}" for row in rows]
    for name in sorted(broader.keys() | narrower.keys()):
        lines = [f"Category: {name}"]
        lines += [f"Broader: {', '.join(sorted(broader[name]))}"] if broader[name] else []
        lines += [f"Narrower: {', '.join(sorted(narrower[name])[:12])}"] if narrower[name] else []
        texts.append("\n".join(lines))
    rng = random.Random(0)
    for _ in range(WALKS):
        walk = [rng.choice(sorted(narrower[ROOT_CATEGORY]))]
        while narrower[walk[-1]] and len(walk) < 6:
            walk.append(rng.choice(sorted(narrower[walk[-1]])))
        texts.append(" contains ".join(walk[:2]) + "".join(f", which contains {name}" for name in walk[2:]) + ".")
    return texts


def as_tokenizer_json(directory: Path) -> None:
    """Write tokenizer.json, the same BPE in the other library's form: transformers 5 does not read a Mistral directory's
    tokenizer.model by Mistral's rules (it leaves out the dummy space), but takes a tokenizer.json as it is."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    merges = [
        (-model.get_score(i), vocab[piece[:k]], vocab[piece[k:]], (piece[:k], piece[k:]))
        for piece, i in vocab.items()
        for k in range(1, len(piece))
        if piece[:k] in vocab and piece[k:] in vocab and not (model.is_byte(i) or model.is_control(i) or model.is_unknown(i))
    ]
    bpe = tokenizers.models.BPE(
        vocab, [pair for *_, pair in sorted(merges)], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    fast = tokenizers.Tokenizer(bpe)
    n, d = tokenizers.normalizers, tokenizers.decoders
    fast.normalizer = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
    fast.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    fast.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    fast.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast.save(str(directory / "tokenizer.json"))


def main() -> None:
    import train
    from minilora.running.directory import save_config
    from minilora.running.saving import write_safetensors
    from minilora.running.settings import load_config
    from minilora.weights import open_safetensors

    SOURCE.mkdir(parents=True, exist_ok=True)
    texts = corpus()
    (SOURCE / "corpus.jsonl").write_text(
        "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8"
    )
    (SOURCE / "config.json").write_text(json.dumps(ARCHITECTURE, indent=2), encoding="utf-8")
    (SOURCE / "tokenizer_config.json").write_text(json.dumps(TOKENIZER, indent=2), encoding="utf-8")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False}
    (SOURCE / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for t in texts for line in t.split("\n")] + ["[INST] Title: [/INST] a -> b -> c"] * 20),
        model_prefix=str(SOURCE / "tokenizer"), vocab_size=VOCABULARY, model_type="bpe", byte_fallback=True,
        character_coverage=0.9995, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, split_digits=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    as_tokenizer_json(SOURCE)
    if code := train.main(load_config([str(ROOT / "configs/tiny_base.py"), *sys.argv[1:]])):
        sys.exit(code)
    trained = Path("out/tiny-base/checkpoint-final")
    TARGET.mkdir(parents=True, exist_ok=True)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(trained / name, TARGET / name)
    # trained in fp32, kept in bfloat16: half the size
    save_config(TARGET, ARCHITECTURE, torch.bfloat16)
    with open_safetensors(trained / "model.safetensors") as file:
        layout = {name: (torch.bfloat16, tuple(file.get_slice(name).get_shape())) for name in file.keys()}
        write_safetensors(TARGET / "model.safetensors", layout, file.get_tensor)
    print(f"{TARGET}: {sum(p.stat().st_size for p in TARGET.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
