"""lora.train_embeddings against peft's modules_to_save: gradients, twenty steps of training, files in both directions."""

import json
from collections.abc import Iterable
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from test_training import reference_run
from torch import Tensor

import merge
import minilora
import train
from minilora.build import build_model
from minilora.config import Config, LoraConfig, UserError
from tiny_models import random_tokens
from tiny_runs import base_model, config, metrics

CPU = torch.device("cpu")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WHOLE = ("embed_tokens.weight", "lm_head.weight")
TIED = {"ensure_weight_tying": True}
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
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()


def peft_adapter(base: Path, directory: Path, modules: Iterable[str] = ("embed_tokens", "lm_head"), **settings) -> Path:
    """An adapter that peft has made and saved, with B and the whole matrices moved away from where they start."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings}
    model = peft.get_peft_model(reference(base), peft.LoraConfig(modules_to_save=[*modules], task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" not in name and p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    model.save_pretrained(str(directory), save_embedding_layers=False)
    return directory


@pytest.fixture(scope="module")
def adapters(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of peft: embedding and head trained; of the tied model one matrix for both."""
    home = tmp_path_factory.mktemp("adapters")
    return {kind: peft_adapter(bases[kind], home / kind, **(TIED if kind == "tied" else {})) for kind in KINDS}


def our_name(theirs: str) -> str:
    """The parameter of ours that one of a PeftModel is."""
    name = theirs.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
    return name.removesuffix(".default.weight") if ".lora_" in name else name


# --- arithmetic ---


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_pefts(kind: str, bases, adapters):
    model = build_model(bases[kind], CPU, "float32", LoraConfig(init_from=str(adapters[kind]))).model.train()
    loss = model(TOKENS, apply=train.loss_with(torch.cat([torch.tensor([-100]), TOKENS[1:]])))
    loss.backward()
    theirs = peft.PeftModel.from_pretrained(reference(bases[kind]), str(adapters[kind]), is_trainable=True)
    logits = theirs(input_ids=TOKENS[None]).logits[0]
    expected = F.cross_entropy(logits[:-1], TOKENS[1:], reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    gradients = {our_name(name): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    own = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert own.keys() == gradients.keys()
    assert len(own) == 2 * 2 * len(TARGETS) + (1 if kind == "tied" else 2)
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
        assert gradient.abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_training_follows_peft(kind: str, bases, adapters, tmp_path):
    """Also with micro-batches and recomputed blocks: the reference has neither."""
    c = config(
        tmp_path, bases[kind], rows=20, train__max_steps=20, train__grad_acc_steps=2, train__batch_size=2,
        train__lr_scheduler="cosine", train__learning_rate=5e-3, train__weight_decay=0.01, train__gradient_checkpointing=True,
        lora__init_from=str(adapters[kind]),
    )  # fmt: skip
    assert train.main(c) == 0
    ours, theirs = metrics(c), reference_run(c, adapters[kind])
    assert len(ours) == len(theirs) == 20
    assert max(abs(o["loss"] - loss) for o, (loss, _, _) in zip(ours, theirs, strict=True)) <= 1e-4
    assert [o["grad_norm"] for o in ours] == pytest.approx([norm for _, norm, _ in theirs], rel=1e-3)
    assert ours[-1]["loss"] < 0.8 * ours[0]["loss"], "the run learns, or following it would show little"
    start, end = (load_file(d / "adapter_model.safetensors") for d in (adapters[kind], final(c)))
    moved = (end["base_model.model.model.embed_tokens.weight"] - start["base_model.model.model.embed_tokens.weight"]).abs()
    assert moved.max() > 0.02


def final(c: Config) -> Path:
    return Path(c.output_dir) / "checkpoint-final"


# --- files: ours in peft ---


@torch.no_grad()
def logits_of(model, tokens: Tensor = TOKENS) -> Tensor:
    theirs = isinstance(model, peft.PeftModel | transformers.PreTrainedModel)
    return model(input_ids=tokens[None]).logits[0] if theirs else model(tokens)


def run(tmp_path: Path, base: Path, **changes) -> Config:
    """A short run that trains embedding and head from the base's own."""
    short = {"train__max_steps": 3, "train__warmup_steps": 0, "lora__train_embeddings": True, "eval__num_generate_samples": 0}
    c = config(tmp_path, base, rows=12, **{**short, **changes})
    assert train.main(c) == 0
    return c


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_trainable", [False, True])
def test_peft_reads_our_checkpoint(kind: str, is_trainable: bool, bases, tmp_path):
    checkpoint = final(run(tmp_path, bases[kind]))
    theirs = peft.PeftModel.from_pretrained(reference(bases[kind]), str(checkpoint), is_trainable=is_trainable).eval()
    found = peft.set_peft_model_state_dict(theirs, load_file(checkpoint / "adapter_model.safetensors"))
    wanted = [name for name in found.missing_keys if "lora_" in name or "modules_to_save" in name]
    assert (found.unexpected_keys, wanted) == ([], [])
    trained = [name for name, p in theirs.named_parameters() if p.requires_grad and "lora_" not in name]
    assert len(trained) == (0 if not is_trainable else 1 if kind == "tied" else 2)
    ours = minilora.load(str(checkpoint), device="cpu")[0]
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), rtol=1e-4, atol=1e-4)
    assert (logits_of(ours) - logits_of(reference(bases[kind]))).abs().max() > 0.1
    theirs.merge_and_unload().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(reference(tmp_path / "merged")), logits_of(ours), rtol=1e-4, atol=1e-4)


def test_what_is_trained_is_kept_in_float32(bases, tmp_path):
    """Adam's small steps would be lost in a bfloat16 matrix; the frozen weights keep the base's dtype."""
    base = base_model(tmp_path / "base", "llama3", torch_dtype="bfloat16")
    model = build_model(base, CPU, lora=LoraConfig(train_embeddings=True)).model
    kinds = {p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert kinds == {torch.float32}
    assert {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name} == {
        "model.embed_tokens.weight", "lm_head.weight",
    }  # fmt: skip
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    checkpoint = final(run(tmp_path, base, model__dtype="auto", train__learning_rate=1e-5))
    tensors, before = load_file(checkpoint / "adapter_model.safetensors"), load_file(base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        saved = tensors[f"base_model.model.{name}"]
        assert saved.dtype == torch.float32
        changed = saved != before[name].float()
        assert changed.float().mean() > 0.1 and torch.equal(saved.bfloat16()[~changed], before[name][~changed])


# --- files: peft's in ours ---


@pytest.mark.parametrize("kind", KINDS)
def test_we_read_pefts_adapter(kind: str, bases, adapters):
    names = load_file(adapters[kind] / "adapter_model.safetensors").keys()
    assert sum(name.endswith(WHOLE) for name in names) == 2, "peft saves a tied matrix under both names"
    theirs = peft.PeftModel.from_pretrained(reference(bases[kind]), str(adapters[kind])).eval()
    ours = minilora.load(str(bases[kind]), adapter=str(adapters[kind]), device="cpu")[0]
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), rtol=1e-4, atol=1e-4)
    assert (logits_of(ours) - logits_of(reference(bases[kind]))).abs().max() > 0.1


@pytest.mark.parametrize("modules", [("embed_tokens", "lm_head"), ("embed_tokens",), ("lm_head",)], ids="+".join)
def test_a_tie_that_peft_has_cut_is_no_tie(modules: tuple[str, ...], bases, tmp_path):
    """Without ensure_weight_tying peft trains copies of the one matrix, which then differ: equal logits or a refusal."""
    adapter = peft_adapter(bases["tied"], tmp_path / "adapter", modules)
    theirs = peft.PeftModel.from_pretrained(reference(bases["tied"]), str(adapter)).eval()
    try:
        ours = minilora.load(str(bases["tied"]), adapter=str(adapter), device="cpu")[0]
    except UserError as error:
        assert str(adapter) in str(error) and any(word in str(error) for word in ("embed_tokens", "lm_head"))
    else:
        torch.testing.assert_close(logits_of(ours), logits_of(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_one_of_two_matrices(module: str, bases, tmp_path):
    """Equal logits, or a refusal that names what is missing."""
    adapter = peft_adapter(bases["untied"], tmp_path / "adapter", [module])
    theirs = peft.PeftModel.from_pretrained(reference(bases["untied"]), str(adapter)).eval()
    try:
        ours = minilora.load(str(bases["untied"]), adapter=str(adapter), device="cpu")[0]
    except UserError as error:
        assert str(adapter) in str(error) and any(word in str(error) for word in ("embed_tokens", "lm_head"))
    else:
        torch.testing.assert_close(logits_of(ours), logits_of(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("resized", [0, 3])
def test_we_read_pefts_adapter_with_its_embedding_layers(kind: str, resized: int, bases, tmp_path):
    """Where the vocabulary was resized peft saves each matrix several times: as it was, and trained under two names."""
    hf = reference(bases[kind])
    size = hf.config.vocab_size + resized
    hf.resize_token_embeddings(size)
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        ensure_weight_tying=kind == "tied",
    )
    theirs = peft.get_peft_model(hf, settings).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))) if "modules_to_save" in name else None
    theirs.save_pretrained(str(tmp_path), save_embedding_layers="auto" if resized else True)
    assert any("original_module" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    ours = minilora.load(str(bases[kind]), adapter=str(tmp_path), device="cpu")[0]
    assert ours.config.vocab_size == size
    torch.testing.assert_close(logits_of(ours), logits_of(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("modules", [("embed_tokens", "lm_head"), ("embed_tokens",), ("lm_head",)], ids="+".join)
def test_a_tie_that_peft_has_cut_is_not_merged_as_one(modules: tuple[str, ...], bases, tmp_path):
    adapter = peft_adapter(bases["tied"], tmp_path / "adapter", modules)
    theirs = peft.PeftModel.from_pretrained(reference(bases["tied"]), str(adapter)).eval()
    try:
        merge.main(merge.Args(str(adapter), base=str(bases["tied"]), out=str(tmp_path / "merged")))
    except UserError as error:
        assert any(word in str(error) for word in ("embed_tokens", "lm_head"))
        return
    torch.testing.assert_close(logits_of(reference(tmp_path / "merged")), logits_of(theirs), rtol=1e-4, atol=1e-4)


def test_other_modules_to_save_are_refused_by_name(bases, tmp_path):
    adapter = peft_adapter(bases["untied"], tmp_path / "adapter", ["lm_head", "embed_tokens", "input_layernorm"])
    with pytest.raises(UserError, match=r"modules_to_save.*input_layernorm"):
        minilora.load(str(bases["untied"]), adapter=str(adapter), device="cpu")


@pytest.mark.parametrize("change", ["lost", "shorter"])
def test_a_matrix_that_does_not_fit_is_refused(change: str, bases, adapters, tmp_path):
    source = adapters["untied"]
    (tmp_path / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    tensors, name = load_file(source / "adapter_model.safetensors"), "base_model.model.lm_head.weight"
    whole = tensors.pop(name)
    save_file(tensors if change == "lost" else {**tensors, name: whole[:-1].clone()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        minilora.load(str(bases["untied"]), adapter=str(tmp_path), device="cpu")


def test_our_adapter_config_says_what_is_saved(bases, tmp_path):
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        checkpoint = final(run(tmp_path / kind, bases[kind]))
        raw = json.loads((checkpoint / "adapter_config.json").read_text())
        assert "embed_tokens" in raw["modules_to_save"] and raw["ensure_weight_tying"] == (kind == "tied")
        assert set(raw) <= set(peft.LoraConfig().to_dict()) | {"task_type"}
