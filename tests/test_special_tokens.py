"""Added and unlearnt special tokens, and trained embeddings through a run's life: resume, merge, infer, several processes."""

import functools
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from rapidfuzz.distance import Levenshtein
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import infer
import merge
import minilora
import ranks
import tiny_tokenizers
import train
from minilora.build import build_model
from minilora.config import Config, LoraConfig, RunError, UserError
from minilora.model import CausalLM
from minilora.running.datasets import make_tokenizer
from minilora.running.saving import save_tokenizer
from minilora.running.settings import validate
from minilora.running.special_tokens import with_added_tokens
from minilora.tokenizer import Tokenizer
from tiny_models import tiny
from tiny_runs import base_model, config, losses, metrics

CPU = torch.device("cpu")
ADDED = ("<edge>", "<|끝|>")
SHORT_RUN = {
    "data__format": "prompt", "data__chat": False, "train__batch_size": 4, "train__warmup_steps": 0, "train__learning_rate": 3e-3,
    "train__max_steps": 4, "eval__num_generate_samples": 2,
}  # fmt: skip
WHOLE = ("model.embed_tokens.weight", "lm_head.weight")


def write_rows(file: Path, count: int = 12) -> str:
    words = ["music", "art", "history", "physics"]
    edge, end = ADDED
    rows = [{"prompt": f"a{edge}{words[i % 4]} ", "completion": f"{words[i % 3]} {edge}b{i}{end}"} for i in range(count)]
    return write_jsonl(file, rows)


def write_jsonl(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def setting(tmp_path: Path, base: Path, **changes) -> Config:
    """A run over rows with the two tokens, which it adds, that trains embedding and head."""
    tmp_path.mkdir(exist_ok=True)
    rows = write_rows(tmp_path / "rows.jsonl")
    defaults = {**SHORT_RUN, "data__train_file": rows, "data__eval_file": rows, "data__add_tokens": ADDED}
    return config(tmp_path, base, **{**defaults, "lora__train_embeddings": True, **changes})


def fitted(c: Config) -> Path:
    """Train; the checkpoint."""
    validate(c)
    assert train.main(c) == 0
    return Path(c.output_dir) / "checkpoint-final"


def size_of(base: Path) -> int:
    return json.loads((base / "config.json").read_text())["vocab_size"]


@torch.no_grad()
def logits_of(model, tokens: Tensor) -> Tensor:
    return model(tokens) if isinstance(model, CausalLM) else model(input_ids=tokens[None]).logits[0]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("bases")
    return {
        "llama2": base_model(home / "llama2", "llama3", "llama2"),
        "mistral": base_model(home / "mistral", "llama2", "mistral"),  # sentencepiece
        "llama3": base_model(home / "llama3", "llama3", "llama3"),
        "qwen": base_model(home / "qwen", "qwen3", "qwen", tie_word_embeddings=True),
        "bfloat16": base_model(home / "bfloat16", "qwen3", "qwen", tie_word_embeddings=True, torch_dtype="bfloat16"),
        "bfloat16 untied": base_model(home / "bfloat16 untied", "mistral", "llama2", torch_dtype="bfloat16"),
    }


# --- the tokenizer ---


@pytest.mark.parametrize("name", tiny_tokenizers.BUILDERS)
def test_an_added_token_is_one_id_as_in_transformers(name: str, tmp_path: Path):
    base = tiny_tokenizers.copy(tiny_tokenizers.BUILDERS[name](), tmp_path / "base")
    before = Tokenizer(base)
    directory = with_added_tokens(base, ADDED)
    tokenizer, theirs = Tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    reference = AutoTokenizer.from_pretrained(base)  # the same, done by transformers
    assert reference.add_special_tokens({"additional_special_tokens": [*ADDED]}) == 2
    ids = [before.vocab_size, before.vocab_size + 1]
    assert [tokenizer.specials[token] for token in ADDED] == ids == theirs.convert_tokens_to_ids([*ADDED])
    assert ids == reference.convert_tokens_to_ids([*ADDED])
    assert tokenizer.vocab_size == before.vocab_size + 2 == len(theirs)
    # no space after a token: there transformers 5 disagrees with sentencepiece (see test_tokenizer.py)
    for text in ("a<edge>b", "music <edge>art<|끝|>", "<edge><edge>", "<edg e>", "물리학<edge>과학\n"):
        ours = tokenizer.backend.encode(text).ids
        for other in (theirs, reference):
            assert ours == other(text, add_special_tokens=False)["input_ids"]
        assert [sum(i == token for i in ours) for token in ids] == [text.count(token) for token in ADDED]
        assert tokenizer.decode(ours).replace(" ", "") == theirs.decode(ours, skip_special_tokens=True).replace(" ", "")
    plain = "music of the art, 과학 <unrelated>"
    assert tokenizer.encode(plain) == before.encode(plain)
    assert with_added_tokens(base, ADDED) == directory, "kept, not made again"
    assert with_added_tokens(base, ADDED[:1]) != directory


@pytest.mark.parametrize(("change", "what"), [
    ({"data__add_tokens": ("</s>",)}, "</s>.*already"), ({"data__add_tokens": ("music",)}, "music.*already"),
    ({"data__add_tokens": ("<a>", "<b>", "<a>")}, "twice"), ({"data__add_tokens": ("<a>", "")}, "empty"),
    ({"data__add_tokens": (" ",)}, "empty"), ({"lora__train_embeddings": False}, "add_tokens.*train_embeddings"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["mistral", "llama2"])
def test_tokens_that_cannot_be_added(name: str, change: dict, what: str, bases, tmp_path):
    c = setting(tmp_path, bases[name], **change)
    if "music" in what:
        piece = next(p for p in ("▁music", "music", "ic") if Tokenizer(bases[name]).backend.token_to_id(p) is not None)
        c.data.add_tokens, what = (piece,), f"{piece}.*already"
    with pytest.raises(UserError, match=what):
        validate(c)
        make_tokenizer(c, bases[name])
    assert not Path(c.output_dir).exists()


def test_a_token_nobody_added_is_not_resized_for(bases, tmp_path):
    """A vocabulary larger than the model's is refused by the token's name, as before."""
    base = tmp_path / "base"
    tiny("llama3", vocab_size=size_of(bases["llama2"])).save_pretrained(base)
    for file in with_added_tokens(bases["llama2"], ADDED).iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"<edge>|끝"):
        train.main(setting(tmp_path / "run", base, data__add_tokens=()))


# --- the rows ---


@pytest.mark.parametrize("name", ["llama2", "qwen"])
def test_new_rows_are_the_mean_as_in_transformers(name: str, bases):
    """transformers draws them from a normal around the mean, with a covariance of 1e-9 of the rows'."""
    size = size_of(bases[name])
    reference = AutoModelForCausalLM.from_pretrained(bases[name])
    reference.resize_token_embeddings(size + 3, mean_resizing=True)
    state = reference.state_dict()
    for options in ({"lora": LoraConfig(train_embeddings=True)}, {"full": True}):
        model = build_model(bases[name], CPU, vocab_size=size + 3, **options).model
        own = {k: p for k, p in model.named_parameters() if k in WHOLE}
        assert own.keys() == ({*WHOLE} if name == "llama2" else {WHOLE[0]})
        for key, p in own.items():
            assert p.shape[0] == size + 3 == model.config.vocab_size
            assert torch.equal(p[:size], state[key][:size])
            torch.testing.assert_close(p[size:], state[key][size:], rtol=0, atol=1e-3)
            assert torch.equal(p[size], p[size + 2])


def test_spare_rows_are_used_before_new_ones(tmp_path, capsys):
    """Many bases have more rows than their tokenizer has tokens: nothing is resized."""
    base = base_model(tmp_path / "base", "llama3", "llama2")
    size = size_of(base)
    tiny("llama3", vocab_size=size + 8, max_position_embeddings=256).save_pretrained(base)
    checkpoint = fitted(setting(tmp_path / "run", base))
    tensors, before = load_file(checkpoint / "adapter_model.safetensors"), load_file(base / "model.safetensors")
    for name in WHOLE:
        assert tensors[f"base_model.model.{name}"].shape == before[name].shape == (size + 8, 32)
    assert "rows more" not in capsys.readouterr().err
    assert Tokenizer(checkpoint).specials["<edge>"] == size


# --- a run's life ---


def reload(directory: Path):
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("name", ["llama2", "mistral", "qwen"])
def test_train_resume_merge_reload(name: str, bases, tmp_path, capsys):
    whole, broken = (setting(tmp_path / part, bases[name]) for part in ("whole", "broken"))
    broken.train.max_steps = 2
    fitted(broken)
    broken.train.max_steps = 4
    checkpoint = fitted(broken)
    straight = fitted(whole)
    assert losses(broken) == losses(whole)
    adapter, expected = (load_file(c / "adapter_model.safetensors") for c in (checkpoint, straight))
    assert adapter.keys() == expected.keys() and all(torch.equal(adapter[k], expected[k]) for k in expected)
    size, embedding = size_of(bases[name]), adapter["base_model.model.model.embed_tokens.weight"]
    assert len(embedding) == size + 2
    assert not torch.equal(embedding[size], embedding[size + 1]), "the two tokens have been learnt"

    assert merge.main(merge.Args(str(checkpoint), verify=True)) == 0
    out = checkpoint / "merged"
    gap = float(capsys.readouterr().out.rpartition("merged: ")[2].split(",")[0])
    assert size_of(out) == size + 2 and gap < 1e-4
    theirs, tokenizer = AutoTokenizer.from_pretrained(out), Tokenizer(checkpoint)
    text = f"a{ADDED[0]}art music{ADDED[1]}"
    ids = tokenizer.backend.encode(text).ids
    assert ids == theirs(text, add_special_tokens=False)["input_ids"] and {size, size + 1} <= {*ids}
    model, live = reload(out), minilora.load(str(checkpoint), device="cpu")[0]
    torch.testing.assert_close(logits_of(live, torch.tensor(ids)), logits_of(model, torch.tensor(ids)), rtol=1e-4, atol=1e-4)
    again = minilora.load(str(out), device="cpu")[0]
    torch.testing.assert_close(logits_of(again, torch.tensor(ids)), logits_of(model, torch.tensor(ids)), rtol=1e-4, atol=1e-4)

    said = []
    for directory in (checkpoint, out):
        assert infer.main(infer.Args(str(directory), prompt="a<edge>music ", max_new_tokens=8)) == 0
        said.append(capsys.readouterr().out.strip())
    ids = tokenizer.encode("a<edge>music ").ids
    answer: list[int] = []
    while len(answer) < 8 and not {*answer} & tokenizer.stop_ids():
        answer.append(int(logits_of(model, torch.tensor(ids + answer))[-1].argmax()))
    assert said == [tokenizer.decode_after(ids, answer).strip()] * 2


@pytest.mark.parametrize("name", ["llama2", "qwen"])
def test_full_training_with_added_tokens(name: str, bases, tmp_path):
    full = {"method": "full", "lora__train_embeddings": False, "train__learning_rate": 1e-4}
    whole, broken = (setting(tmp_path / part, bases[name], **full) for part in ("whole", "broken"))
    broken.train.max_steps = 2
    fitted(broken)
    broken.train.max_steps = 4
    checkpoint, straight = fitted(broken), fitted(whole)
    assert losses(broken) == losses(whole)
    assert size_of(checkpoint) == size_of(bases[name]) + 2
    weights, expected = (load_file(c / "model.safetensors") for c in (checkpoint, straight))
    assert all(torch.equal(weights[k], expected[k]) for k in expected)
    ids = torch.tensor(Tokenizer(checkpoint).encode("a<edge>music<|끝|>").ids)
    assert ids.tolist() == AutoTokenizer.from_pretrained(checkpoint)("a<edge>music<|끝|>")["input_ids"]
    ours = minilora.load(str(checkpoint), device="cpu")[0]
    torch.testing.assert_close(logits_of(ours, ids), logits_of(reload(checkpoint), ids), rtol=1e-4, atol=1e-4)


def test_a_run_is_not_continued_with_other_tokens(bases, tmp_path):
    checkpoint = fitted(setting(tmp_path, bases["llama2"], train__max_steps=1))
    for tokens, resume in ((ADDED[:1], "auto"), ((*ADDED, "<c>"), "auto"), ((*ADDED, "<c>"), str(checkpoint))):
        with pytest.raises(UserError, match=r"add_tokens|embed_tokens|lm_head"):
            train.main(setting(tmp_path, bases["llama2"], data__add_tokens=tokens, train__resume=resume))


def test_an_adapter_with_added_tokens_is_gone_on_with(bases, tmp_path):
    """lora.init_from with the same tokens: the rows are the adapter's, and their ids too."""
    first = fitted(setting(tmp_path / "first", bases["llama2"]))
    c = setting(tmp_path / "second", bases["llama2"], lora__init_from=str(first), train__learning_rate=1e-9, train__max_steps=1)
    second = fitted(c)
    a, b = (load_file(d / "adapter_model.safetensors") for d in (first, second))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tokens", [(), ADDED[:1], ADDED[::-1]], ids=["none", "fewer", "reordered"])
def test_an_adapter_with_other_tokens_is_not_silently_mixed_up(tokens, bases, tmp_path, capsys):
    """The rows of the adapter at lora.init_from belong to its own tokens: said or refused, not trained as others'."""
    first = fitted(setting(tmp_path / "first", bases["llama2"], train__max_steps=1))
    capsys.readouterr()
    c = setting(tmp_path / "second", bases["llama2"], lora__init_from=str(first), train__max_steps=1, data__add_tokens=tokens)
    try:
        fitted(c)
    except UserError as error:
        assert "init_from" in str(error) or str(first) in str(error)
    else:
        said = capsys.readouterr().err
        assert "<edge>" in said or "add_tokens" in said


def test_new_tokens_over_an_adapter_that_cannot_learn_them(bases, tmp_path):
    """lora.init_from replaces lora.train_embeddings: with an adapter that has no matrices the tokens' rows would be lost."""
    first = fitted(setting(tmp_path / "first", bases["llama2"], data__add_tokens=(), lora__train_embeddings=False))
    c = setting(tmp_path / "second", bases["llama2"], lora__init_from=str(first))
    try:
        checkpoint = fitted(c)
    except UserError as error:
        assert "init_from" in str(error) or str(first) in str(error)
    else:
        model, tokenizer = minilora.load(str(checkpoint), device="cpu")
        assert logits_of(model, torch.tensor(tokenizer.encode("a<edge>b").ids)).isfinite().all()
        assert "base_model.model.lm_head.weight" in load_file(checkpoint / "adapter_model.safetensors")


def test_no_checkpoint_without_its_tokenizer(bases, tmp_path):
    """The tokenizer with the added tokens lies in the cache, which may be cleared while a run goes on."""
    tokenizer = make_tokenizer(setting(tmp_path, bases["llama2"], data__add_tokens=("<cleared>",)), bases["llama2"])
    shutil.rmtree(tokenizer.directory)
    (tmp_path / "saved").mkdir()
    try:
        save_tokenizer(tokenizer, tmp_path / "saved")
    except (UserError, RunError, OSError):
        return
    assert Tokenizer(tmp_path / "saved").specials["<cleared>"] == size_of(bases["llama2"])


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_our_adapter_with_added_tokens_in_peft(kind: str, bases, tmp_path):
    """As its users do: the base resized to the checkpoint's tokenizer, then the adapter."""
    base = bases["llama2" if kind == "untied" else "qwen"]
    checkpoint = fitted(setting(tmp_path, base))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(checkpoint)
    model.resize_token_embeddings(len(tokenizer))
    theirs = peft.PeftModel.from_pretrained(model, str(checkpoint)).eval()
    ids = torch.tensor(tokenizer("a<edge>music<|끝|>")["input_ids"])
    live = minilora.load(str(checkpoint), device="cpu")[0]
    torch.testing.assert_close(logits_of(live, ids), logits_of(theirs, ids), rtol=1e-4, atol=1e-4)


# --- 16 and 4 bits ---


def mean_loss(model, tokenizer: Tokenizer, file: str) -> float:
    """Mean loss of the completions, one row at a time."""
    total, count = 0.0, 0
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        ids, spans = tokenizer.encode(row["prompt"] + row["completion"] + (tokenizer.eos_token or ""))
        begin = next(i for i, (start, _) in enumerate(spans) if start >= len(row["prompt"]))
        losses = F.cross_entropy(logits_of(model, torch.tensor(ids)).float()[:-1], torch.tensor(ids[1:]), reduction="none")
        total, count = total + losses[begin - 1 :].sum().item(), count + len(ids) - begin
    return total / count


EXTRAS = {
    "plain": {},
    "ema": {"train__ema_decay": 0.9},
    "checkpointing": {"train__gradient_checkpointing": True, "train__grad_acc_steps": 2, "train__batch_size": 2},
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("name", ["bfloat16", "bfloat16 untied"])
def test_live_saved_and_merged_agree_in_bfloat16(name: str, extra: str, bases, tmp_path):
    """With answers generated on the way."""
    c = setting(tmp_path, bases[name], model__dtype="auto", eval__eval_steps=2, **EXTRAS[extra])
    checkpoint = fitted(c)
    assert merge.main(merge.Args(str(checkpoint))) == 0
    out = checkpoint / "merged"
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    live = metrics(c, "eval/out_of_domain/loss")[-1]["eval/out_of_domain/loss"]
    tokenizer = Tokenizer(checkpoint)
    loaded = mean_loss(minilora.load(str(checkpoint), device="cpu")[0], tokenizer, str(c.data.eval_file))
    merged = mean_loss(reload(out), tokenizer, str(c.data.eval_file))
    assert live == pytest.approx(loaded, rel=5e-3) and live == pytest.approx(merged, rel=2e-2)
    start = build_model(bases[name], CPU, vocab_size=size_of(out)).model.eval()
    assert live < 0.97 * mean_loss(start, tokenizer, str(c.data.eval_file))
    samples = (Path(c.output_dir) / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(samples) == 4


def test_checkpointing_and_accumulation_change_nothing(bases, tmp_path):
    one = setting(tmp_path / "one", bases["llama2"])
    other = setting(
        tmp_path / "other", bases["llama2"], train__gradient_checkpointing=True, train__grad_acc_steps=4, train__batch_size=1
    )
    a, b = (load_file(fitted(c) / "adapter_model.safetensors") for c in (one, other))
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)
    for name in WHOLE:
        torch.testing.assert_close(*(x[f"base_model.model.{name}"] for x in (a, b)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama2", "bfloat16"])
def test_over_four_bits(name: str, bases, tmp_path, capsys):
    """QLoRA with trained embeddings: both ways to merge load in transformers, and --verify knows their gaps."""
    c = setting(tmp_path, bases[name], model__bits=4, model__dtype="auto", eval__eval_steps=2)
    checkpoint = fitted(c)
    ids = torch.tensor(Tokenizer(checkpoint).encode("a<edge>music<|끝|>").ids)
    live = minilora.load(str(checkpoint), device="cpu", bits=None, dtype="float32")[0]
    size = size_of(bases[name]) + 2
    assert live.config.vocab_size == size
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    for from_quantised in (True, False):
        out = tmp_path / f"merged {from_quantised}"
        capsys.readouterr()
        assert merge.main(merge.Args(str(checkpoint), out=str(out), from_quantised=from_quantised, verify=True)) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "merged into" in line]
        printed = [float(line.split("base")[-1].split()[0]) for line in lines]
        assert len(printed) == 2 and printed[1] < printed[0]
        merged = load_file(out / "model.safetensors")
        assert size_of(out) == size and not any("absmax" in key for key in merged)
        for key in {*WHOLE} & merged.keys():
            assert torch.equal(merged[key], tensors[f"base_model.model.{key}"].to(merged[key].dtype))
        tolerance = {torch.float32: 1e-3, torch.bfloat16: 0.2}[merged[WHOLE[0]].dtype]
        gap = (logits_of(reload(out).float(), ids) - logits_of(live, ids)).abs().max()
        assert gap < tolerance if from_quantised else gap > 2e-3


# --- merging ---


@pytest.mark.parametrize("name", ["llama2", "qwen"])
def test_a_sharded_base_that_has_grown(name: str, bases, tmp_path):
    base = tmp_path / "base"
    reload(bases[name]).save_pretrained(base, max_shard_size="40KB")
    for file in bases[name].iterdir():
        if file.suffix != ".safetensors":
            (base / file.name).write_bytes(file.read_bytes())
    checkpoint = fitted(setting(tmp_path / "run", base))
    assert merge.main(merge.Args(str(checkpoint), dtype="bfloat16")) == 0
    out = checkpoint / "merged"
    index = "model.safetensors.index.json"
    before, after = (json.loads((d / index).read_text()) for d in (base, out))
    assert len({*after["weight_map"].values()}) > 2 and after["weight_map"] == before["weight_map"]
    held = {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}
    assert after["metadata"]["total_size"] == sum(t.numel() * 2 for t in held.values())
    assert size_of(out) == size_of(base) + 2 == len(held[WHOLE[0]])
    ids = torch.tensor(Tokenizer(checkpoint).encode("a<edge>music<|끝|>").ids)
    live = logits_of(minilora.load(str(checkpoint), device="cpu")[0], ids)
    torch.testing.assert_close(logits_of(reload(out).float(), ids), live, rtol=0, atol=0.5)
    trained = load_file(checkpoint / "adapter_model.safetensors")
    for key in {*WHOLE} & held.keys():
        assert torch.equal(held[key], trained[f"base_model.model.{key}"].bfloat16())


def test_a_tied_base_with_a_second_copy_of_its_matrix(bases, tmp_path):
    """Some tied checkpoints hold lm_head.weight too: the merged one's must not be the old one."""
    base = tmp_path / "base"
    base.mkdir()
    for file in bases["qwen"].iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors[WHOLE[0]].clone()}, base / "model.safetensors", metadata={"format": "pt"})
    checkpoint = fitted(setting(tmp_path / "run", base))
    assert merge.main(merge.Args(str(checkpoint))) == 0
    held = load_file(checkpoint / "merged" / "model.safetensors")
    assert torch.equal(held["lm_head.weight"], held[WHOLE[0]])
    assert torch.equal(held[WHOLE[0]], load_file(checkpoint / "adapter_model.safetensors")[f"base_model.model.{WHOLE[0]}"])


# --- several processes ---

STEPS = 4
ON_TWO = {
    "ddp": {"train__batch_size": 2, "parallel__strategy": "ddp"},
    "fsdp": {"train__batch_size": 2, "parallel__strategy": "fsdp"},
    "fsdp 1 x 2": {"train__batch_size": 1, "train__grad_acc_steps": 2, "parallel__strategy": "fsdp"},
}
VARIANTS = {  # added tokens make an odd number of rows: 2 processes have unequal shares
    "untied": {"base": "llama2"},
    "tied": {"base": "qwen"},
    "untied ema": {"base": "llama2", "train__ema_decay": 0.8},
    "tied bfloat16": {"base": "bfloat16"},
    "untied bfloat16": {"base": "bfloat16 untied"},
    "tied 4 bits": {"base": "qwen", "model__bits": 4},
    "full": {"base": "qwen", "method": "full", "lora__train_embeddings": False, "train__learning_rate": 1e-5},
}
PLACES = [("untied", "ddp"), ("tied bfloat16", "ddp"), *((name, "fsdp") for name in VARIANTS), ("tied", "fsdp 1 x 2")]
RESUMED = ("untied ema", "tied bfloat16", "tied 4 bits", "full")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


def placed(home: Path, bases: dict[str, Path], name: str, variant: str, **changes) -> Config:
    """A run of rows with as many added tokens (one or two) as make the vocabulary odd."""
    options = {**VARIANTS[variant], **changes}
    base = bases[str(options.pop("base"))]
    more = ADDED if size_of(base) % 2 else (*ADDED, "<third>")
    assert (size_of(base) + len(more)) % 2
    dtype = "auto" if "bfloat16" in variant else "float32"
    defaults = {"data__add_tokens": more, "train__max_steps": STEPS, "eval__eval_steps": 2, "model__dtype": dtype}
    return setting(home / name, base, **{**defaults, **options})


@pytest.fixture(scope="module")
def alone(home: Path, bases: dict[str, Path]):
    @functools.cache
    def run(variant: str) -> Config:
        c = placed(home, bases, f"{variant} alone", variant)
        fitted(c)
        return c

    return run


@pytest.fixture(scope="module")
def on_two(home: Path, bases: dict[str, Path]) -> dict[str, list]:
    jobs: dict[str, ranks.Job] = {}
    for variant, layout in PLACES:
        jobs[f"{variant}, {layout}"] = ranks.fit, (placed(home, bases, f"{variant}, {layout}", variant, **ON_TWO[layout]),)
    for variant in RESUMED:
        for until in (2, STEPS):
            c = placed(home, bases, f"{variant} resumed", variant, **ON_TWO["fsdp"])
            c.train.max_steps = until
            jobs[f"{variant} resumed {until}"] = ranks.fit, (c,)
    return ranks.launch(home / "jobs", 2, jobs)


def saved(home: Path, name: str) -> dict[str, Tensor]:
    final = home / name / "out" / "checkpoint-final"
    files = [f for f in (final / "adapter_model.safetensors", final / "model.safetensors") if f.is_file()]
    return load_file(files[0])


@pytest.mark.parametrize(("variant", "layout"), PLACES, ids=" ".join)
def test_two_processes_are_one(variant: str, layout: str, home, bases, alone, on_two):
    ranks.outcome(on_two, f"{variant}, {layout}")
    one, name = alone(variant), f"{variant}, {layout}"
    two = placed(home, bases, name, variant, **ON_TWO[layout])
    half = "bfloat16" in variant
    for key in ("loss", "grad_norm", "eval/in_domain/loss", "eval/out_of_domain/loss"):
        expected = [row[key] for row in metrics(one, key)]
        assert len(expected) == (STEPS if "/" not in key else 2)
        assert [row[key] for row in metrics(two, key)] == pytest.approx(
            expected, rel=1e-4 if not half else 0.1 if key == "grad_norm" else 2e-2
        ), key
    tensors, expected_tensors = saved(home, name), saved(home, f"{variant} alone")
    assert {k: (t.shape, t.dtype) for k, t in tensors.items()} == {k: (t.shape, t.dtype) for k, t in expected_tensors.items()}
    for key, tensor in expected_tensors.items():
        # Adam makes whole steps of the rounding of tiny gradients: in 16 bits a few elements differ by some steps
        gap = (tensors[key] - tensor).float().abs()
        assert (gap.mean() < 2e-3 and gap.max() < 0.05) if half else gap.max() < 1e-4, key


@pytest.mark.parametrize("variant", RESUMED)
def test_resumed_on_two_is_uninterrupted(variant: str, home, bases, on_two):
    for job in (f"{variant} resumed 2", f"{variant} resumed {STEPS}", f"{variant}, fsdp"):
        ranks.outcome(on_two, job)
    resumed, whole = saved(home, f"{variant} resumed"), saved(home, f"{variant}, fsdp")
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[k], whole[k]) for k in whole)


# --- tokens that the base never learnt ---

EOT = "<|eot_id|>"


def edited(bases: dict[str, Path], target: Path, name: str, change) -> Path:
    """A copy of a base with other rows."""
    target.mkdir(parents=True)
    for file in bases[name].iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / "model.safetensors")
    change(tensors, Tokenizer(target).specials)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def warning_of(tmp_path: Path, base: Path, capsys, rows: list[dict] | None = None, **changes) -> str:
    """What is said of unlearnt tokens when a run over chats begins."""
    rows = rows or [{"prompt": f"music {i}", "completion": "art"} for i in range(3)]
    file = write_jsonl(tmp_path / "chats.jsonl", rows)
    settings = {"data__train_file": file, "data__eval_file": None, "data__format": "prompt", "data__chat_template": None}
    capsys.readouterr()
    assert train.main(config(tmp_path, base, **{**settings, "preview": 1, **changes})) == 0
    return "".join(line for line in capsys.readouterr().err.splitlines() if "never learnt" in line)


def zero(where: str, factor: float = 0.0):
    return lambda tensors, specials: tensors[where][specials[EOT]].mul_(factor)


def duplicate(where: str):
    return lambda tensors, specials: tensors[where][specials[EOT]].copy_(tensors[where][specials["<|end_of_text|>"]])


@pytest.mark.parametrize("where", WHOLE)
@pytest.mark.parametrize("change", [zero, functools.partial(zero, factor=1e-3), duplicate], ids=["zero", "tiny", "duplicate"])
def test_an_unlearnt_end_of_turn_is_named(where: str, change, bases, tmp_path, capsys):
    base = edited(bases, tmp_path / "base", "llama3", change(where))
    said = warning_of(tmp_path, base, capsys)
    assert EOT in said and "train_embeddings" in said
    assert "<|begin_of_text|>" not in said and "<|start_header_id|>" not in said and "<|end_of_text|>" not in said
    assert not warning_of(tmp_path, base, capsys, lora__train_embeddings=True)


@pytest.mark.parametrize("name", ["llama2", "mistral", "llama3", "qwen", "bfloat16"])
def test_no_warning_of_a_healthy_base(name: str, bases, tmp_path, capsys):
    template = "mistral" if name in ("llama2", "mistral") else None
    assert not warning_of(tmp_path, bases[name], capsys, data__chat_template=template)


def test_no_warning_where_an_adapter_brings_the_matrices(bases, tmp_path, capsys):
    """lora.init_from brings lora.train_embeddings too."""
    base = edited(bases, tmp_path / "base", "llama3", zero("lm_head.weight"))
    first = fitted(setting(tmp_path / "first", base, data__add_tokens=(), train__max_steps=1))
    c = setting(tmp_path / "run", base, data__add_tokens=(), lora__train_embeddings=False, lora__init_from=str(first))
    assert not warning_of(tmp_path / "run", base, capsys, lora__init_from=c.lora.init_from)


def test_no_warning_of_tokens_that_no_row_uses(bases, tmp_path, capsys):
    def unused(tensors, specials):
        for name in WHOLE:
            tensors[name][specials["<|end_of_text|>"]] = 0

    assert not warning_of(tmp_path, edited(bases, tmp_path / "base", "llama3", unused), capsys)


def test_no_warning_of_a_head_row_that_is_never_asked_for(bases, tmp_path, capsys):
    """BOS and headers stand in prompts alone: their rows of the head are never learnt, nor needed."""

    def change(tensors, specials):
        tensors["lm_head.weight"][[specials["<|begin_of_text|>"], specials["<|start_header_id|>"]]] = 0

    assert not warning_of(tmp_path, edited(bases, tmp_path / "base", "llama3", change), capsys)


def test_an_unlearnt_row_of_a_tied_model(bases, tmp_path, capsys):
    base = edited(bases, tmp_path / "base", "qwen", lambda t, specials: t[WHOLE[0]][specials["<|im_end|>"]].zero_())
    assert "<|im_end|>" in warning_of(tmp_path, base, capsys)


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_an_unlearnt_end_is_learnt_with_the_embeddings_only(name: str, bases, tmp_path):
    """Rows 3 and 40: a base whose end of turn has a zero row repeats itself after training of adapters, and else stops."""
    end = EOT if name == "untied" else "<|im_end|>"

    def change(tensors, specials):
        for key in {*WHOLE} & tensors.keys():
            tensors[key][specials[end]] = 0

    base = edited(bases, tmp_path / "base", "llama3" if name == "untied" else "qwen", change)
    rows = [{"prompt": f"music {word}", "completion": f"art {word}"} for word in ("one", "two", "three", "four")]
    file = write_jsonl(tmp_path / "chats.jsonl", rows)
    endings = {}
    for whole in (False, True):
        (tmp_path / str(whole)).mkdir()
        c = config(
            tmp_path / str(whole), base, data__train_file=file,
            data__eval_file=None, data__format="prompt", data__chat_template=None, train__max_steps=60, train__learning_rate=1e-2,
            lora__train_embeddings=whole, eval__num_generate_samples=0, train__warmup_steps=0,
        )  # fmt: skip
        model, tokenizer = minilora.load(str(fitted(c)), device="cpu")
        prompts = [tokenizer.render([{"role": "user", "content": row["prompt"]}], add_generation_prompt=True) for row in rows]
        stop = tokenizer.specials[end]
        endings[whole] = 0
        for prompt in prompts:
            ids = tokenizer.encode(prompt).ids
            answer: list[int] = []
            while len(answer) < 30 and answer[-1:] != [stop]:
                answer.append(int(logits_of(model, torch.tensor(ids + answer))[-1].argmax()))
            endings[whole] += answer[-1] == stop
    assert endings == {False: 0, True: 4}


def test_metrics_compare_answers_with_references_as_they_are_shown(bases, tmp_path, capsys):
    """Answers are shown without special tokens, so references are too: also where the job was done already."""
    checkpoint = fitted(setting(tmp_path, bases["llama2"]))
    source, target = write_rows(tmp_path / "asked.jsonl", 3), tmp_path / "answers.jsonl"
    for _ in range(2):
        args = infer.Args(str(checkpoint), input=source, output=str(target), max_new_tokens=4, metrics=("edit_distance",))
        assert infer.main(args) == 0
        figures = json.loads((tmp_path / "answers.metrics.json").read_text())
        rows = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
        wanted = [row["completion"].replace("<edge>", "").replace("<|끝|>", "").strip() for row in rows]
        made = [row["generated"].strip() for row in rows]
        by_hand = sum(Levenshtein.normalized_distance(a, b) for a, b in zip(made, wanted, strict=True)) / len(rows)
        assert figures["edit_distance"] == pytest.approx(by_hand)
