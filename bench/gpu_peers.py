"""transformers and peft in bench/gpu.py: the same training step and the same answers."""

import time

import torch
from gpu_tools import (
    DTYPE,
    PROMPT_TOKENS,
    TrainingCase,
    decoding_rate,
    make_documents,
    seconds_of,
    synchronize,
    training_row,
)
from torch import Tensor

from minilora.config import LoraConfig


def transformers_model(shape: dict, device: torch.device) -> torch.nn.Module:
    """Make a model of transformers with random weights."""
    import transformers

    settings = transformers.AutoConfig.for_model(**shape)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with device:
            return transformers.AutoModelForCausalLM.from_config(settings)
    finally:
        torch.set_default_dtype(before)


def measure_peft(case: TrainingCase, peak: float, device: torch.device) -> list[dict]:
    """Measure a training step of transformers + peft on documents of one length, checkpointed."""
    import peft

    lora = LoraConfig()
    model = peft.get_peft_model(
        transformers_model(case.shape, device),
        peft.LoraConfig(
            r=lora.rank, lora_alpha=lora.rank, target_modules=list(lora.target_modules)
        ),
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    tokens, labels = make_documents(case.lengths, case.shape["vocab_size"])
    size = (len(case.lengths), case.lengths[0])
    batch = {"input_ids": tokens.view(size).to(device), "labels": labels.view(size).to(device)}

    def step() -> None:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds, warmup = seconds_of(step)
    adapter_parameters = sum(p.numel() for p in parameters)
    row = {
        "case": f"transformers + peft: {case.name}",
        "recomputed blocks": case.shape["num_hidden_layers"],
        **training_row(case, seconds, peak, adapter_parameters),
        "warmup s": round(warmup, 1),
    }
    return [row]


def measure_transformers_decoding(
    shape: dict, batches: tuple[int, ...], new_tokens: int, device: torch.device
) -> list[dict]:
    """Measure transformers' generate as bench/gpu.py measures our answers."""
    model = transformers_model(shape, device).eval()
    rows = []
    for batch in batches:
        prompts = torch.randint(shape["vocab_size"], (batch, PROMPT_TOKENS), device=device)

        def answer(num_tokens: int, prompts: Tensor = prompts) -> float:
            synchronize()
            start = time.perf_counter()
            model.generate(  # type: ignore[operator]
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                pad_token_id=0,
            )
            synchronize()
            return time.perf_counter() - start

        rate = decoding_rate(answer, batch, new_tokens)
        rows.append({"prompts": f"transformers: {batch}", **rate})
    return rows
