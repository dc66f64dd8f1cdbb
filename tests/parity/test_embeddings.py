"""lora.train_embeddings against peft's modules_to_save.

Compared are gradients, twenty steps of training, and files in both directions.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import merge
import minilora
import train
from helpers.build import build
from helpers.peft_training import reference_run
from helpers.tiny_models import random_tokens
from helpers.tiny_runs import base_model, config, metrics
from minilora.checkpoint.peft import EMBEDDING, HEAD
from minilora.config import Config, LoraConfig
from minilora.errors import UserError

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MATRICES = ("embed_tokens.weight", "lm_head.weight")
TOKENS = random_tokens(40)
KINDS = ["untied", "tied"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("bases")
    return {
        "untied": base_model(home / "untied", "llama3"),
        "tied": base_model(home / "tied", "qwen3", tie_word_embeddings=True),
    }


def reference(base: Path) -> transformers.PreTrainedModel:
    """transformers' model in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def peft_adapter(
    base: Path, directory: Path, modules: Iterable[str] = ("embed_tokens", "lm_head"), **settings
) -> Path:
    """Save a peft adapter whose B and whole matrices have been moved away from where they start."""
    lora = peft.LoraConfig(
        modules_to_save=[*modules],
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=8,
        target_modules=TARGETS,
        **settings,
    )
    model = peft.get_peft_model(reference(base), lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" not in name and p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    model.save_pretrained(str(directory), save_embedding_layers=False)
    return directory


@pytest.fixture(scope="module")
def adapters(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of peft with embedding and head; of the tied model with one matrix for both."""
    home = tmp_path_factory.mktemp("adapters")
    return {
        "untied": peft_adapter(bases["untied"], home / "untied"),
        "tied": peft_adapter(bases["tied"], home / "tied", ensure_weight_tying=True),
    }


def our_name(theirs: str) -> str:
    """The name here of a parameter of a PeftModel."""
    name = theirs.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
    return name.removesuffix(".default.weight") if ".lora_" in name else name


# --- arithmetic ---


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_peft(kind: str, bases, adapters):
    lora = LoraConfig(init_from=str(adapters[kind]))
    model = build(bases[kind], "float32", lora).model.train()
    labels = torch.cat([torch.tensor([-100]), TOKENS[1:]])
    loss = model(TOKENS, labels=labels)
    loss.backward()

    theirs = peft.PeftModel.from_pretrained(
        reference(bases[kind]), str(adapters[kind]), is_trainable=True
    )
    logits = theirs(input_ids=TOKENS[None]).logits[0]
    expected = F.cross_entropy(logits[:-1], TOKENS[1:], reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)

    gradients = {our_name(name): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    own = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert own.keys() == gradients.keys()
    num_matrices = 1 if kind == "tied" else 2
    assert len(own) == 2 * 2 * len(TARGETS) + num_matrices
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            own[name], gradient, rtol=1e-4, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert gradient.abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_training_follows_peft(kind: str, bases, adapters, tmp_path: Path):
    """Also with micro-batches and recomputed blocks: the reference has neither."""
    c = config(
        tmp_path,
        bases[kind],
        rows=20,
        train__max_steps=20,
        train__grad_acc_steps=2,
        train__batch_size=2,
        train__lr_scheduler="cosine",
        train__learning_rate=5e-3,
        train__weight_decay=0.01,
        train__gradient_checkpointing=True,
        lora__init_from=str(adapters[kind]),
    )
    assert train.main(c) == 0

    ours, theirs = metrics(c), reference_run(c, adapters[kind])
    losses, norms, _ = zip(*theirs, strict=True)
    assert len(ours) == len(theirs) == 20
    assert [row["loss"] for row in ours] == pytest.approx(losses, abs=1e-4, rel=0)
    assert [row["grad_norm"] for row in ours] == pytest.approx(norms, rel=1e-3)
    falls = ours[-1]["loss"] < 0.8 * ours[0]["loss"]
    assert falls, "the run learns, or following it would show little"
    start = load_file(adapters[kind] / "adapter_model.safetensors")
    end = load_file(final(c) / "adapter_model.safetensors")
    assert (end[EMBEDDING] - start[EMBEDDING]).abs().max() > 0.02


def final(c: Config) -> Path:
    return Path(c.output_dir) / "checkpoint-final"


# --- files: ours in peft ---


@torch.no_grad()
def logits_of(model, tokens: Tensor = TOKENS) -> Tensor:
    """Logits [T, V] of a model of ours, of peft or of transformers."""
    if isinstance(model, peft.PeftModel | transformers.PreTrainedModel):
        return model(input_ids=tokens[None]).logits[0]
    return model(tokens)


def assert_same_logits(first, second) -> None:
    torch.testing.assert_close(logits_of(first), logits_of(second), rtol=1e-4, atol=1e-4)


def assert_changes_its_base(model, base: Path) -> None:
    assert (logits_of(model) - logits_of(reference(base))).abs().max() > 0.1


def run(tmp_path: Path, base: Path, **changes) -> Config:
    """Take a few steps that train embedding and head from the base's own."""
    short = {
        "train__max_steps": 3,
        "train__warmup_steps": 0,
        "lora__train_embeddings": True,
        "eval__num_generate_samples": 0,
    }
    c = config(tmp_path, base, rows=12, **{**short, **changes})
    assert train.main(c) == 0
    return c


@pytest.fixture(scope="module")
def checkpoints(bases, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of such runs."""
    return {kind: final(run(tmp_path_factory.mktemp(kind), bases[kind])) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_trainable", [False, True])
def test_peft_reads_our_checkpoint(
    kind: str, is_trainable: bool, bases, checkpoints, tmp_path: Path
):
    checkpoint = checkpoints[kind]
    theirs = peft.PeftModel.from_pretrained(
        reference(bases[kind]), str(checkpoint), is_trainable=is_trainable
    ).eval()
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    found = peft.set_peft_model_state_dict(theirs, tensors)
    assert found.unexpected_keys == []
    missing = [n for n in found.missing_keys if "lora_" in n or "modules_to_save" in n]
    assert missing == []

    trained = [n for n, p in theirs.named_parameters() if p.requires_grad and "lora_" not in n]
    num_matrices = 1 if kind == "tied" else 2
    assert len(trained) == (num_matrices if is_trainable else 0)
    ours = minilora.load(str(checkpoint), device="cpu")[0]
    assert_same_logits(ours, theirs)
    assert_changes_its_base(ours, bases[kind])
    theirs.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert_same_logits(reference(tmp_path / "merged"), ours)


def test_what_is_trained_is_kept_in_float32(tmp_path: Path):
    """Adam's small steps would be lost in bfloat16; frozen weights keep the base's dtype."""
    base = base_model(tmp_path / "base", "llama3", torch_dtype="bfloat16")
    model = build(base, lora=LoraConfig(train_embeddings=True)).model
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    matrices = {name for name in trained if "lora_" not in name}
    assert matrices == {"model.embed_tokens.weight", "lm_head.weight"}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}

    checkpoint = final(run(tmp_path, base, model__dtype="auto", train__learning_rate=1e-5))
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    base_tensors = load_file(base / "model.safetensors")
    for name in matrices:
        saved, before = tensors[f"base_model.model.{name}"], base_tensors[name]
        assert saved.dtype == torch.float32
        changed = saved != before.float()
        assert changed.float().mean() > 0.1
        assert torch.equal(saved.bfloat16()[~changed], before[~changed])


# --- files: peft's in ours ---


@pytest.mark.parametrize("kind", KINDS)
def test_we_read_an_adapter_of_peft(kind: str, bases, adapters):
    names = load_file(adapters[kind] / "adapter_model.safetensors").keys()
    num_matrices = sum(name.endswith(MATRICES) for name in names)
    assert num_matrices == 2, "peft saves a tied matrix under both names"
    theirs = peft.PeftModel.from_pretrained(reference(bases[kind]), str(adapters[kind])).eval()
    ours = minilora.load(str(bases[kind]), adapter=str(adapters[kind]), device="cpu")[0]
    assert_same_logits(ours, theirs)
    assert_changes_its_base(ours, bases[kind])


def assert_equal_or_refused(base: Path, adapter: Path) -> None:
    """Either the logits equal peft's, or an error names the adapter and the matrix."""
    theirs = peft.PeftModel.from_pretrained(reference(base), str(adapter)).eval()
    try:
        ours = minilora.load(str(base), adapter=str(adapter), device="cpu")[0]
    except UserError as error:
        assert str(adapter) in str(error)
        assert "embed_tokens" in str(error) or "lm_head" in str(error)
    else:
        assert_same_logits(ours, theirs)


MODULES = [("embed_tokens", "lm_head"), ("embed_tokens",), ("lm_head",)]


@pytest.mark.parametrize("modules", MODULES, ids="+".join)
def test_tie_that_peft_has_cut_is_not_loaded_as_one(
    modules: tuple[str, ...], bases, tmp_path: Path
):
    """Without ensure_weight_tying peft trains copies of the one matrix, which then differ."""
    adapter = peft_adapter(bases["tied"], tmp_path / "adapter", modules)
    assert_equal_or_refused(bases["tied"], adapter)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_one_of_two_matrices_is_loaded_or_refused(module: str, bases, tmp_path: Path):
    adapter = peft_adapter(bases["untied"], tmp_path / "adapter", [module])
    assert_equal_or_refused(bases["untied"], adapter)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new_rows", [0, 3])
def test_we_read_an_adapter_of_peft_with_its_embedding_layers(
    kind: str, new_rows: int, bases, tmp_path: Path
):
    """Of a resized vocabulary peft saves each matrix as it was, and trained under two names."""
    hf = reference(bases[kind])
    vocab_size = hf.config.vocab_size + new_rows
    hf.resize_token_embeddings(vocab_size)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        ensure_weight_tying=kind == "tied",
    )
    theirs = peft.get_peft_model(hf, settings).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "modules_to_save" in name:
                generator = torch.Generator().manual_seed(1)
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    theirs.save_pretrained(str(tmp_path), save_embedding_layers="auto" if new_rows else True)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert any("original_module" in name for name in names)

    ours = minilora.load(str(bases[kind]), adapter=str(tmp_path), device="cpu")[0]
    assert ours.config.vocab_size == vocab_size
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("modules", MODULES, ids="+".join)
def test_tie_that_peft_has_cut_is_not_merged_as_one(
    modules: tuple[str, ...], bases, tmp_path: Path
):
    adapter = peft_adapter(bases["tied"], tmp_path / "adapter", modules)
    theirs = peft.PeftModel.from_pretrained(reference(bases["tied"]), str(adapter)).eval()
    out = tmp_path / "merged"
    try:
        merge.main(merge.Args(str(adapter), base=str(bases["tied"]), out=str(out)))
    except UserError as error:
        assert "embed_tokens" in str(error) or "lm_head" in str(error)
    else:
        assert_same_logits(reference(out), theirs)


def test_other_modules_to_save_are_refused_by_name(bases, tmp_path: Path):
    modules = ["lm_head", "embed_tokens", "input_layernorm"]
    adapter = peft_adapter(bases["untied"], tmp_path / "adapter", modules)
    with pytest.raises(UserError, match=r"modules_to_save.*input_layernorm"):
        minilora.load(str(bases["untied"]), adapter=str(adapter), device="cpu")


@pytest.mark.parametrize("change", ["lost", "shorter"])
def test_matrix_that_does_not_fit_is_refused(change: str, bases, adapters, tmp_path: Path):
    source = adapters["untied"]
    (tmp_path / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    tensors = load_file(source / "adapter_model.safetensors")
    matrix = tensors.pop(HEAD)
    if change == "shorter":
        tensors[HEAD] = matrix[:-1].clone()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        minilora.load(str(bases["untied"]), adapter=str(tmp_path), device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_our_adapter_config_says_what_is_saved(kind: str, checkpoints):
    raw = json.loads((checkpoints[kind] / "adapter_config.json").read_text())
    assert "embed_tokens" in raw["modules_to_save"]
    assert raw["ensure_weight_tying"] == (kind == "tied")
    assert set(raw) <= set(peft.LoraConfig().to_dict()) | {"task_type"}
