"""Training with transformers + peft, in the order of documents of a run of minilora."""

import math
from pathlib import Path

import numpy as np
import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from helpers import tiny_runs
from minilora.config import Config
from minilora.data.cache import load_documents
from minilora.data.chat_template import MISTRAL_TEMPLATE
from minilora.data.dataset import Documents, LabelDraw, step_order
from minilora.data.tokenizer import Tokenizer


def save_initial_adapter(base: Path, directory: Path, **settings) -> Path:
    """Save a PEFT adapter whose matrices B are not zero."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = 0.05 * torch.randn(p.shape, generator=generator)
    model.save_pretrained(str(directory))
    return directory


def config_to_follow(directory: Path, base: Path, accumulation: int, **changes) -> Config:
    """Return a run of four documents a step from an initial adapter that is saved here."""
    adapter = save_initial_adapter(base, directory / "adapter", r=4, lora_alpha=8)
    settings = {
        "train__grad_acc_steps": accumulation,
        "train__batch_size": 4 // accumulation,
        "train__lr_scheduler": "cosine",
        "train__learning_rate": 5e-3,
        "train__weight_decay": 0.01,
        "train__gradient_checkpointing": True,
        "lora__init_from": str(adapter),
    }
    return tiny_runs.config(directory, base, rows=30, **settings, **changes)


def reference_run(c: Config, adapter: Path) -> list[tuple[float, float, float]]:
    """Train with transformers and peft on padded batches with attention masks.

    Returns:
        (loss, gradient norm, learning rate) of each step.
    """
    base = transformers.AutoModelForCausalLM.from_pretrained(
        c.model.name, dtype=torch.float32, attn_implementation="eager"
    )
    model = peft.PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=c.train.learning_rate, weight_decay=c.train.weight_decay
    )
    tokenizer = Tokenizer(Path(c.model.name), MISTRAL_TEMPLATE)
    documents = load_documents(c.data.train_file, c.data, tokenizer, "train_file")

    docs_per_step = c.train.batch_size * c.train.grad_acc_steps
    steps_per_epoch = math.ceil(len(documents) / docs_per_step)
    total_steps = c.train.max_steps or math.ceil(c.train.epochs * steps_per_epoch)
    scheduler = transformers.get_scheduler(
        c.train.lr_scheduler, optimizer, c.train.warmup_steps, total_steps
    )

    rows = []
    for step in range(total_steps):
        epoch, step_of_epoch = divmod(step, steps_per_epoch)
        order = step_order(
            documents.lengths,
            docs_per_step,
            c.seed,
            epoch,
            c.data.shuffle,
            c.train.group_by_length,
        )
        docs = order[step_of_epoch * docs_per_step : (step_of_epoch + 1) * docs_per_step]
        draw = LabelDraw(c.seed, epoch)
        supervised = sum(int((documents.labels(i, draw) != -100).sum()) for i in docs)
        step_loss = 0.0
        for start in range(0, len(docs), c.train.batch_size):
            micro_batch = docs[start : start + c.train.batch_size]
            loss = padded_loss_sum(model, documents, micro_batch, draw) / supervised
            loss.backward()
            step_loss += loss.item()

        norm = torch.nn.utils.clip_grad_norm_(parameters, c.train.max_grad_norm).item()
        rows.append((step_loss, norm, scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return rows


def padded_loss_sum(
    model: peft.PeftModel, documents: Documents, indices: np.ndarray, draw: LabelDraw
) -> Tensor:
    """Return the sum of token losses of a right-padded batch."""
    ids = [torch.from_numpy(documents.ids(i)).long() for i in indices]
    mask = [torch.ones_like(tokens) for tokens in ids]
    labels = [torch.from_numpy(documents.labels(i, draw)) for i in indices]

    pad = torch.nn.utils.rnn.pad_sequence
    logits = model(
        input_ids=pad(ids, batch_first=True), attention_mask=pad(mask, batch_first=True)
    ).logits
    targets = pad(labels, batch_first=True, padding_value=-100)
    return F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten(), reduction="sum"
    )
