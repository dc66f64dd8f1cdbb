"""Runs that add tokens and train embedding and head: resume, merge, infer, peft."""

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
import train
from helpers.added_token_runs import (
    ADDED,
    EMBEDDING,
    HEAD,
    copy_files,
    fit,
    load_reference,
    logits_of,
    make_bases,
    run_config,
    vocab_size,
    write_rows,
)
from helpers.asking import infer_args
from helpers.build import build
from helpers.tiny_models import tiny
from helpers.tiny_runs import base_model, losses, metrics
from minilora.checkpoint.tokenizer_writer import plan_export, save_tokenizer
from minilora.config import LoraConfig
from minilora.data.tokenizer import Tokenizer
from minilora.errors import RunError, UserError
from minilora.training.datasets import make_tokenizer

TEXT = "a<edge>music<|끝|>"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_bases(tmp_path_factory.mktemp("bases"))


def adapter_of(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of a saved adapter."""
    return load_file(checkpoint / "adapter_model.safetensors")


def saved_name(matrix: str) -> str:
    """PEFT's name of a matrix that is saved whole."""
    return f"base_model.model.{matrix}"


# ---- the new rows


@pytest.mark.parametrize("name", ["llama2", "qwen"])
def test_new_rows_are_the_mean_as_in_transformers(name: str, bases):
    """transformers draws them close to the mean: the covariance is 1e-9 of the rows'."""
    size = vocab_size(bases[name])
    reference = AutoModelForCausalLM.from_pretrained(bases[name])
    reference.resize_token_embeddings(size + 3, mean_resizing=True)
    expected = reference.state_dict()
    for options in ({"lora": LoraConfig(train_embeddings=True)}, {"full": True}):
        model = build(bases[name], vocab_size=size + 3, **options).model
        matrices = {k: p for k, p in model.named_parameters() if k in (EMBEDDING, HEAD)}
        assert set(matrices) == ({EMBEDDING, HEAD} if name == "llama2" else {EMBEDDING})
        for key, p in matrices.items():
            assert p.shape[0] == size + 3 == model.config.vocab_size
            assert torch.equal(p[:size], expected[key][:size])
            torch.testing.assert_close(p[size:], expected[key][size:], rtol=0, atol=1e-3)
            assert torch.equal(p[size], p[size + 2])


def test_spare_rows_are_used_before_new_ones(tmp_path, capsys):
    """Many bases have more rows than their tokenizer has tokens: nothing is resized."""
    base = base_model(tmp_path / "base", "llama3", "llama2")
    size = vocab_size(base)
    tiny("llama3", vocab_size=size + 8, max_position_embeddings=256).save_pretrained(base)
    checkpoint = fit(run_config(tmp_path / "run", base))
    trained, before = adapter_of(checkpoint), load_file(base / "model.safetensors")
    for matrix in (EMBEDDING, HEAD):
        assert trained[saved_name(matrix)].shape == before[matrix].shape == (size + 8, 32)
    assert "rows more" not in capsys.readouterr().err
    assert Tokenizer(checkpoint).specials["<edge>"] == size


# ---- a run's life


def train_with_and_without_a_break(tmp_path: Path, base: Path, **changes) -> tuple[Path, Path]:
    """Train twice with the same losses; the checkpoints of a resumed and of a whole run."""
    whole = run_config(tmp_path / "whole", base, **changes)
    resumed = run_config(tmp_path / "resumed", base, **changes)
    resumed.train.max_steps = 2
    fit(resumed)
    resumed.train.max_steps = 4
    checkpoints = fit(resumed), fit(whole)
    assert losses(resumed) == losses(whole)
    return checkpoints


@pytest.mark.parametrize("name", ["llama2", "mistral", "qwen"])
def test_train_resume_merge_reload(name: str, bases, tmp_path, capsys):
    checkpoint, whole = train_with_and_without_a_break(tmp_path, bases[name])
    adapter, expected = adapter_of(checkpoint), adapter_of(whole)
    assert adapter.keys() == expected.keys()
    assert all(torch.equal(adapter[key], expected[key]) for key in expected)
    size = vocab_size(bases[name])
    embedding = adapter[saved_name(EMBEDDING)]
    assert len(embedding) == size + 2
    assert not torch.equal(embedding[size], embedding[size + 1]), "the two tokens were learnt"

    assert merge.main(merge.Args(str(checkpoint), verify=True)) == 0
    merged = checkpoint / "merged"
    gap = float(capsys.readouterr().out.rpartition("merged: ")[2].split(",")[0])
    assert vocab_size(merged) == size + 2 and gap < 1e-4

    tokenizer, theirs = Tokenizer(checkpoint), AutoTokenizer.from_pretrained(merged)
    text = f"a{ADDED[0]}art music{ADDED[1]}"
    ids = tokenizer.backend.encode(text).ids
    assert ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert {size, size + 1} <= {*ids}
    reference = load_reference(merged)
    logits = logits_of(reference, torch.tensor(ids))
    for directory in (checkpoint, merged):
        ours = logits_of(minilora.load(str(directory), device="cpu")[0], torch.tensor(ids))
        torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)

    ids = tokenizer.encode("a<edge>music ").ids
    answer: list[int] = []
    while len(answer) < 8 and not {*answer} & tokenizer.stop_ids():
        answer.append(int(logits_of(reference, torch.tensor(ids + answer))[-1].argmax()))
    expected_answer = tokenizer.decode_after(ids, answer).strip()
    for directory in (checkpoint, merged):
        args = infer_args(directory, prompt="a<edge>music ", max_new_tokens=8)
        assert infer.main(args) == 0
        assert capsys.readouterr().out.strip() == expected_answer


@pytest.mark.parametrize("name", ["llama2", "qwen"])
def test_full_training_with_added_tokens(name: str, bases, tmp_path):
    full = {"method": "full", "lora__train_embeddings": False, "train__learning_rate": 1e-4}
    checkpoint, whole = train_with_and_without_a_break(tmp_path, bases[name], **full)
    assert vocab_size(checkpoint) == vocab_size(bases[name]) + 2
    weights, expected = (load_file(d / "model.safetensors") for d in (checkpoint, whole))
    assert all(torch.equal(weights[key], expected[key]) for key in expected)

    ids = torch.tensor(Tokenizer(checkpoint).encode(TEXT).ids)
    assert ids.tolist() == AutoTokenizer.from_pretrained(checkpoint)(TEXT)["input_ids"]
    ours = logits_of(minilora.load(str(checkpoint), device="cpu")[0], ids)
    theirs = logits_of(load_reference(checkpoint), ids)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_run_is_not_continued_with_other_tokens(bases, tmp_path):
    checkpoint = fit(run_config(tmp_path, bases["llama2"], train__max_steps=1))
    more = (*ADDED, "<c>")
    for tokens, resume in ((ADDED[:1], "auto"), (more, "auto"), (more, str(checkpoint))):
        run = run_config(tmp_path, bases["llama2"], data__add_tokens=tokens, train__resume=resume)
        with pytest.raises(UserError, match=r"add_tokens|embed_tokens|lm_head"):
            train.main(run)


def test_no_checkpoint_without_its_tokenizer(bases, tmp_path):
    """The tokenizer with the added tokens is in the cache, which may be cleared during a run."""
    run = run_config(tmp_path, bases["llama2"], data__add_tokens=("<cleared>",))
    tokenizer = make_tokenizer(run, bases["llama2"])
    shutil.rmtree(tokenizer.directory)
    (tmp_path / "saved").mkdir()
    try:
        save_tokenizer(tokenizer, tmp_path / "saved", plan_export(tokenizer, run.data))
    except (UserError, RunError, OSError):
        return
    specials = Tokenizer(tmp_path / "saved").specials
    assert specials["<cleared>"] == vocab_size(bases["llama2"])


@pytest.mark.parametrize("name", ["llama2", "qwen"])
def test_our_adapter_with_added_tokens_in_peft(name: str, bases, tmp_path):
    """As its users do: the base resized to the checkpoint's tokenizer, then the adapter."""
    checkpoint = fit(run_config(tmp_path, bases[name]))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(bases[name])
    model.resize_token_embeddings(len(tokenizer))
    theirs = peft.PeftModel.from_pretrained(model, str(checkpoint)).eval()
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    ours = minilora.load(str(checkpoint), device="cpu")[0]
    torch.testing.assert_close(logits_of(ours, ids), logits_of(theirs, ids), rtol=1e-4, atol=1e-4)


def test_metrics_compare_answers_with_references_as_they_are_shown(bases, tmp_path):
    """Answers and references lose their special tokens, also where the answers exist already."""
    checkpoint = fit(run_config(tmp_path, bases["llama2"]))
    source, target = write_rows(tmp_path / "asked.jsonl", 3), tmp_path / "answers.jsonl"
    for _ in range(2):
        args = infer_args(
            str(checkpoint),
            input=source,
            output=str(target),
            max_new_tokens=4,
            metrics=("edit_distance",),
        )
        assert infer.main(args) == 0
        figures = json.loads((tmp_path / "answers.metrics.json").read_text())
        distances = []
        for line in target.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            reference = row["completion"].replace("<edge>", "").replace("<|끝|>", "").strip()
            answer = row["generated"].strip()
            distances.append(Levenshtein.normalized_distance(answer, reference))
        assert figures["edit_distance"] == pytest.approx(sum(distances) / len(distances))


# ---- an adapter to start from


def test_training_goes_on_from_an_adapter_with_the_same_tokens(bases, tmp_path):
    """With lora.init_from the rows are the adapter's, and their ids too."""
    first = fit(run_config(tmp_path / "first", bases["llama2"]))
    almost_nothing = {"train__learning_rate": 1e-9, "train__max_steps": 1}
    run = run_config(
        tmp_path / "second", bases["llama2"], lora__init_from=str(first), **almost_nothing
    )
    before, after = adapter_of(first), adapter_of(fit(run))
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tokens", [(), ADDED[:1], ADDED[::-1]], ids=["none", "fewer", "reordered"])
def test_an_adapter_with_other_tokens_is_not_silently_mixed_up(tokens, bases, tmp_path, capsys):
    """The rows of the adapter belong to its own tokens: said or refused, not trained as others."""
    first = fit(run_config(tmp_path / "first", bases["llama2"], train__max_steps=1))
    capsys.readouterr()
    settings = {"lora__init_from": str(first), "train__max_steps": 1, "data__add_tokens": tokens}
    try:
        fit(run_config(tmp_path / "second", bases["llama2"], **settings))
    except UserError as error:
        assert "init_from" in str(error) or str(first) in str(error)
    else:
        said = capsys.readouterr().err
        assert "<edge>" in said or "add_tokens" in said


def test_new_tokens_over_an_adapter_that_cannot_learn_them(bases, tmp_path):
    """With an adapter that has no embeddings the tokens' rows would be lost."""
    without = {"data__add_tokens": (), "lora__train_embeddings": False}
    first = fit(run_config(tmp_path / "first", bases["llama2"], **without))
    run = run_config(tmp_path / "second", bases["llama2"], lora__init_from=str(first))
    try:
        checkpoint = fit(run)
    except UserError as error:
        assert "init_from" in str(error) or str(first) in str(error)
    else:
        model, tokenizer = minilora.load(str(checkpoint), device="cpu")
        ids = torch.tensor(tokenizer.encode("a<edge>b").ids)
        assert logits_of(model, ids).isfinite().all()
        assert saved_name(HEAD) in adapter_of(checkpoint)


# ---- 16 and 4 bits


def mean_loss(model, tokenizer: Tokenizer, file: str) -> float:
    """Mean loss of a completion's tokens, computed one row at a time."""
    total, count = 0.0, 0
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        text = row["prompt"] + row["completion"] + (tokenizer.eos_token or "")
        ids, spans = tokenizer.encode(text)
        begin = next(i for i, (start, _) in enumerate(spans) if start >= len(row["prompt"]))
        logits = logits_of(model, torch.tensor(ids)).float()
        token_losses = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        total += token_losses[begin - 1 :].sum().item()
        count += len(ids) - begin
    return total / count


EXTRAS = {
    "plain": {},
    "ema": {"train__ema_decay": 0.9},
    "checkpointing": {
        "train__gradient_checkpointing": True,
        "train__grad_acc_steps": 2,
        "train__batch_size": 2,
    },
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("name", ["bfloat16", "bfloat16 untied"])
def test_live_saved_and_merged_agree_in_bfloat16(name: str, extra: str, bases, tmp_path):
    settings = {"model__dtype": "auto", "eval__eval_steps": 2, **EXTRAS[extra]}
    run = run_config(tmp_path, bases[name], **settings)
    checkpoint = fit(run)
    assert merge.main(merge.Args(str(checkpoint))) == 0
    out = checkpoint / "merged"
    dtypes = {tensor.dtype for tensor in load_file(out / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}

    live = metrics(run, "eval/out_of_domain/loss")[-1]["eval/out_of_domain/loss"]
    tokenizer, file = Tokenizer(checkpoint), str(run.data.eval_file)
    loaded = mean_loss(minilora.load(str(checkpoint), device="cpu")[0], tokenizer, file)
    merged = mean_loss(load_reference(out), tokenizer, file)
    assert live == pytest.approx(loaded, rel=5e-3) and live == pytest.approx(merged, rel=2e-2)
    start = build(bases[name], vocab_size=vocab_size(out)).model.eval()
    assert live < 0.97 * mean_loss(start, tokenizer, file)
    samples = (Path(run.output_dir) / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(samples) == 4


def test_checkpointing_and_accumulation_change_nothing(bases, tmp_path):
    accumulated = {
        "train__gradient_checkpointing": True,
        "train__grad_acc_steps": 4,
        "train__batch_size": 1,
    }
    one = run_config(tmp_path / "one", bases["llama2"])
    other = run_config(tmp_path / "other", bases["llama2"], **accumulated)
    a, b = adapter_of(fit(one)), adapter_of(fit(other))
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)
    for matrix in (EMBEDDING, HEAD):
        key = saved_name(matrix)
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama2", "bfloat16"])
def test_over_four_bits(name: str, bases, tmp_path, capsys):
    """Both ways to merge load in transformers, and --verify knows their gaps."""
    settings = {"model__bits": 4, "model__dtype": "auto", "eval__eval_steps": 2}
    checkpoint = fit(run_config(tmp_path, bases[name], **settings))
    ids = torch.tensor(Tokenizer(checkpoint).encode(TEXT).ids)
    live = minilora.load(str(checkpoint), device="cpu", bits=None, dtype="float32")[0]
    size = vocab_size(bases[name]) + 2
    assert live.config.vocab_size == size
    trained = adapter_of(checkpoint)
    for from_quantized in (True, False):
        out = tmp_path / f"merged {from_quantized}"
        capsys.readouterr()
        args = merge.Args(str(checkpoint), out=str(out), from_quantized=from_quantized, verify=True)
        assert merge.main(args) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "merged into" in line]
        printed = [float(line.split("base")[-1].split()[0]) for line in lines]
        assert len(printed) == 2 and printed[1] < printed[0]

        merged = load_file(out / "model.safetensors")
        assert vocab_size(out) == size and not any("absmax" in key for key in merged)
        for matrix in {EMBEDDING, HEAD} & merged.keys():
            expected = trained[saved_name(matrix)].to(merged[matrix].dtype)
            assert torch.equal(merged[matrix], expected)
        tolerance = {torch.float32: 1e-3, torch.bfloat16: 0.2}[merged[EMBEDDING].dtype]
        theirs = logits_of(load_reference(out).float(), ids)
        gap = (theirs - logits_of(live, ids)).abs().max()
        if from_quantized:
            assert gap < tolerance
        else:
            assert gap > 2e-3


# ---- merging


@pytest.mark.parametrize("name", ["llama2", "qwen"])
def test_a_sharded_base_that_has_grown(name: str, bases, tmp_path):
    base = tmp_path / "base"
    load_reference(bases[name]).save_pretrained(base, max_shard_size="40KB")
    for file in bases[name].iterdir():
        if file.suffix != ".safetensors":
            (base / file.name).write_bytes(file.read_bytes())
    checkpoint = fit(run_config(tmp_path / "run", base))
    assert merge.main(merge.Args(str(checkpoint), dtype="bfloat16")) == 0
    out = checkpoint / "merged"

    index = "model.safetensors.index.json"
    before, after = (json.loads((d / index).read_text()) for d in (base, out))
    assert len({*after["weight_map"].values()}) > 2
    assert after["weight_map"] == before["weight_map"]
    merged: dict[str, Tensor] = {}
    for file in out.glob("*.safetensors"):
        merged |= load_file(file)
    assert after["metadata"]["total_size"] == sum(t.numel() * 2 for t in merged.values())
    assert vocab_size(out) == vocab_size(base) + 2 == len(merged[EMBEDDING])

    ids = torch.tensor(Tokenizer(checkpoint).encode(TEXT).ids)
    live = logits_of(minilora.load(str(checkpoint), device="cpu")[0], ids)
    theirs = logits_of(load_reference(out).float(), ids)
    torch.testing.assert_close(theirs, live, rtol=0, atol=0.5)
    trained = adapter_of(checkpoint)
    for matrix in {EMBEDDING, HEAD} & merged.keys():
        assert torch.equal(merged[matrix], trained[saved_name(matrix)].bfloat16())


def test_a_tied_base_with_a_second_copy_of_its_matrix(bases, tmp_path):
    """Some tied checkpoints hold lm_head.weight too: the merged one's must not be the old one."""
    base = copy_files(bases["qwen"], tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors[HEAD] = tensors[EMBEDDING].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    checkpoint = fit(run_config(tmp_path / "run", base))
    assert merge.main(merge.Args(str(checkpoint))) == 0
    merged = load_file(checkpoint / "merged" / "model.safetensors")
    assert torch.equal(merged[HEAD], merged[EMBEDDING])
    assert torch.equal(merged[EMBEDDING], adapter_of(checkpoint)[saved_name(EMBEDDING)])
