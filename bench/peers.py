"""The other libraries that bench/step.py measures: each returns a function that takes one step.

A step is the forward and backward pass over all documents, the clipping of the gradient norm to 1,
and AdamW. It returns the loss, a mean over supervised tokens. Each library lays the documents out
as it recommends: padded (transformers + peft, litgpt), or packed without padding (TRL).
"""

import json
import math
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

RANK, ALPHA = 16, 32
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LEARNING_RATE = 1e-4
MAX_GRAD_NORM = 1.0
Step = Callable[[], float]


@dataclass
class Work:
    """What every side trains, and on what."""

    base: Path
    """A Llama in Hugging Face layout."""
    dtype: torch.dtype
    bits: int
    checkpointing: bool
    documents: list[Tensor]
    """Token ids."""
    labels: list[Tensor]
    """For each document: its ids, or -100 where nothing is supervised."""


def draw_A(tensor: Tensor, layer: str) -> None:
    """Fill an adapter's matrix A [R, in] with what its layer's name determines.

    So every library starts from the same adapters, and the losses of later steps can be compared.

    Args:
        tensor: filled in place.
        layer: any name that contains "layers.N.self_attn.q_proj" or the like.
    """
    found = re.search(r"layers\.\d+\.\w+\.\w+", layer)
    assert found is not None, layer
    generator = torch.Generator().manual_seed(zlib.crc32(found[0].encode()))
    bound = 1 / math.sqrt(tensor.shape[1])
    values = torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator)
    tensor.data.copy_(values)


def make_optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return AdamW as all sides use it."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


def clip_and_update(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Finish a step whose gradients are those of the mean loss."""
    torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()


def padded(work: Work) -> dict[str, Tensor]:
    """Return the documents as one batch, padded to the longest."""
    pad = torch.nn.utils.rnn.pad_sequence
    mask = [torch.ones_like(document) for document in work.documents]
    return {
        "input_ids": pad(work.documents, batch_first=True),
        "attention_mask": pad(mask, batch_first=True),
        "labels": pad(work.labels, batch_first=True, padding_value=-100),
    }


def transformers_model(work: Work) -> torch.nn.Module:
    """Load the base with transformers."""
    import transformers

    settings = {}
    if work.bits == 8:
        settings["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
    if work.bits == 4:
        settings["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=work.dtype,
        )
    return transformers.AutoModelForCausalLM.from_pretrained(
        work.base, dtype=work.dtype, **settings
    )


def _fill_peft_adapters(named_parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Give peft's adapters the values that all sides start from."""
    for name, p in named_parameters:
        if ".lora_A." in name:
            draw_A(p, name)


def peft_step(work: Work) -> Step:
    """Train with transformers and peft, in the loop that their documentation shows."""
    import peft

    settings = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(transformers_model(work), settings)
    _fill_peft_adapters(model.named_parameters())
    if work.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters)
    batch = padded(work)

    def step() -> float:
        loss = model(**batch).loss
        loss.backward()
        clip_and_update(parameters, optimizer)
        return float(loss.detach())

    return step


def trl_step(work: Work) -> Step:
    """Train with TRL's SFTTrainer: its packing, its loss in chunks."""
    import datasets
    import peft
    import tokenizers
    import transformers
    import trl

    # SFTTrainer asks for a tokenizer, although the rows are token ids already
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1}))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>"
    )
    rows = {
        "input_ids": [document.tolist() for document in work.documents],
        "labels": [labels.tolist() for labels in work.labels],
    }
    settings = trl.SFTConfig(
        output_dir=str(work.base / "trl"),
        packing=True,
        max_length=sum(len(document) for document in work.documents),  # all in one row
        per_device_train_batch_size=1,
        gradient_checkpointing=work.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=False,
        use_cpu=True,
        report_to=[],
        dataloader_pin_memory=False,
        shuffle_dataset=False,
    )
    adapters = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    trainer = trl.SFTTrainer(
        transformers_model(work),
        args=settings,
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer,
        peft_config=adapters,
    )
    model = trainer.model
    _fill_peft_adapters(model.named_parameters())
    (batch,) = trainer.get_train_dataloader()
    trainer.current_gradient_accumulation_steps = 1  # as `trainer.train` sets it

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters)

    def step() -> float:
        loss = trainer.training_step(model, batch)  # forward and backward
        clip_and_update(parameters, optimizer)
        return float(loss.detach())

    return step


def litgpt_step(work: Work) -> Step:
    """Train with litgpt's LoRA model, as its finetune script does: the head's output in chunks."""
    import safetensors.torch
    from litgpt.lora import GPT, Block, Config, mark_only_lora_as_trainable
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
    )

    raw = json.loads((work.base / "config.json").read_text())
    kinds = ("query", "key", "value", "projection", "mlp")
    config = Config(
        name="bench",
        block_size=raw["max_position_embeddings"],
        padded_vocab_size=raw["vocab_size"],
        n_layer=raw["num_hidden_layers"],
        n_head=raw["num_attention_heads"],
        n_query_groups=raw["num_key_value_heads"],
        n_embd=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        norm_eps=raw["rms_norm_eps"],
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        lora_r=RANK,
        lora_alpha=ALPHA,
        **{f"lora_{kind}": True for kind in kinds},
    )
    state: dict[str, Tensor] = {}
    hf_weights = safetensors.torch.load_file(work.base / "model.safetensors")
    copy_weights_hf_llama(config, {}, state, hf_weights, dtype=work.dtype)
    model = GPT(config).to(work.dtype)
    model.load_state_dict(state, strict=False)  # everything but the adapters
    mark_only_lora_as_trainable(model)
    _fill_litgpt_adapters(model)
    if work.checkpointing:
        apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, Block))
    model.train()

    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.data = p.data.float()  # as peft trains them; `forward` casts them below
    optimizer = make_optimizer(parameters)
    batch = padded(work)
    targets = batch["labels"][:, 1:].contiguous()

    def step() -> float:
        with torch.autocast("cpu", work.dtype, enabled=work.dtype != torch.float32):
            logits = model(batch["input_ids"], lm_head_chunk_size=128)
            logits[-1] = logits[-1][:, :-1]  # the last token predicts nothing
            loss = chunked_cross_entropy(logits, targets)
        loss.backward()
        clip_and_update(parameters, optimizer)
        return float(loss.detach())

    return step


def _fill_litgpt_adapters(model: torch.nn.Module) -> None:
    """Give litgpt's adapters the values that all sides start from; q, k and v share a matrix A."""
    names = {
        "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.proj": ("self_attn.o_proj",),
        "mlp.fc_1": ("mlp.gate_proj",),
        "mlp.fc_2": ("mlp.up_proj",),
        "mlp.proj": ("mlp.down_proj",),
    }
    for name, p in model.named_parameters():
        if not name.endswith(".lora_A"):
            continue
        _, _, layer, *path, _ = name.split(".")  # transformer.h.3.attn.qkv.lora_A
        parts = names[".".join(path)]
        for part, rows in zip(parts, p.data.chunk(len(parts)), strict=True):
            draw_A(rows, f"layers.{layer}.{part}")


PEERS = {"peft": peft_step, "trl": trl_step, "litgpt": litgpt_step}
