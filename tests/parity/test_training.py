"""Training follows transformers + peft step by step: losses, gradient norms, learning rates."""

import math
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

import train
from minilora.config import Config, TrainConfig
from minilora.data import step_order
from minilora.running.cache import load_documents
from minilora.tokenizer import MISTRAL_TEMPLATE, Tokenizer
from tiny_runs import base_model, config, metrics

STEPS = 50


def start_adapter(base: Path, directory: Path, **settings) -> Path:
    """A PEFT adapter whose B is not zero, saved by peft."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(hf, peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = 0.05 * torch.randn(p.shape, generator=generator)
    model.save_pretrained(str(directory))
    return directory


def reference_run(c: Config, adapter: Path) -> list[tuple[float, float, float]]:
    """(loss, gradient norm, learning rate) of each step by transformers and peft: padded batches, attention masks."""
    hf = transformers.AutoModelForCausalLM.from_pretrained(c.model.name, dtype=torch.float32, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(hf, str(adapter), is_trainable=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=c.train.learning_rate, weight_decay=c.train.weight_decay)
    documents = load_documents(c.data.train_file, c.data, Tokenizer(Path(c.model.name), MISTRAL_TEMPLATE), "train_file")
    size = c.train.batch_size * c.train.grad_acc_steps
    per_epoch = math.ceil(len(documents) / size)
    total = c.train.max_steps or math.ceil(c.train.epochs * per_epoch)
    scheduler = transformers.get_scheduler(c.train.lr_scheduler, optimizer, c.train.warmup_steps, total)
    rows = []
    for step in range(total):
        epoch, at = divmod(step, per_epoch)
        order = step_order(documents.lengths, size, c.seed, epoch, c.data.shuffle, c.train.group_by_length)
        docs = order[at * size : (at + 1) * size]
        count = sum(int((documents.labels(i, (c.seed, epoch)) != -100).sum()) for i in docs)
        loss_of_step = 0.0
        for start in range(0, len(docs), c.train.batch_size):
            loss = padded_loss_sum(model, documents, docs[start : start + c.train.batch_size], (c.seed, epoch)) / count
            loss.backward()
            loss_of_step += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, c.train.max_grad_norm).item()
        rows.append((loss_of_step, norm, scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return rows


def padded_loss_sum(model, documents, which, draw) -> torch.Tensor:
    """Sum of token losses of a right-padded batch."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([torch.from_numpy(documents.ids(i)).long() for i in which], batch_first=True)
    mask = pad([torch.ones(documents.lengths[i], dtype=torch.long) for i in which], batch_first=True)
    labels = pad([torch.from_numpy(documents.labels(i, draw)) for i in which], batch_first=True, padding_value=-100)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), labels[:, 1:].reshape(-1), reduction="sum")


@pytest.mark.parametrize("family", ["mistral_v1", "llama3", "qwen2", "qwen3"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_fifty_steps_follow_peft(tmp_path, family, accumulation):
    base = base_model(tmp_path / "base", family)
    adapter = start_adapter(base, tmp_path / "adapter", r=4, lora_alpha=8)
    c = config(
        tmp_path, base, rows=30, train__max_steps=STEPS, train__grad_acc_steps=accumulation, train__batch_size=4 // accumulation,
        train__lr_scheduler="cosine", train__learning_rate=5e-3, train__weight_decay=0.01, train__gradient_checkpointing=True,
        lora__init_from=str(adapter),
    )  # fmt: skip
    assert train.main(c) == 0
    ours, reference = metrics(c), reference_run(c, adapter)
    assert len(ours) == len(reference) == STEPS
    assert max(abs(o["loss"] - loss) for o, (loss, _, _) in zip(ours, reference, strict=True)) <= 1e-4
    assert [o["grad_norm"] for o in ours] == pytest.approx([norm for _, norm, _ in reference], rel=1e-2)
    assert [o["lr"] for o in ours] == pytest.approx([lr for _, _, lr in reference], rel=1e-6)
    assert ours[-1]["loss"] < 0.8 * ours[0]["loss"], "the run learns, or following it would show little"


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_schedules_are_transformers(name, warmup):
    total, peak = 57, 3e-4
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    settings = TrainConfig(lr_scheduler=name, warmup_steps=warmup, learning_rate=peak)
    for step in range(total):
        assert peak * train.lr_factor(step, total, settings) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_min_lr_ratio_and_warmup_ratio():
    total, warmup = 60, 6
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = transformers.get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, total, min_lr_rate=0.1)
    settings = TrainConfig(lr_scheduler="cosine", warmup_ratio=0.1, min_lr_ratio=0.1)
    for step in range(total):
        assert train.lr_factor(step, total, settings) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        scheduler.step()
    linear = TrainConfig(lr_scheduler="linear", warmup_steps=0, min_lr_ratio=0.25)
    assert train.lr_factor(total, total, linear) == pytest.approx(0.25)
