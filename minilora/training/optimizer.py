"""The update of the weights: AdamW, the learning-rate schedules, and what happens to gradients
between the last backward pass and the optimizer's step.
"""

import logging
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from minilora.build import LoadedModel
from minilora.config import TrainConfig


def trainable_parameters(loaded: LoadedModel) -> dict[str, nn.Parameter]:
    """Return the parameters to train, by name.

    Of a sharded model they are new parameters that share memory with this process's rows, so that
    optimizer and EMA work on plain tensors in every layout.
    """
    layout = loaded.layout
    trainable = {name: p for name, p in loaded.model.named_parameters() if p.requires_grad}
    if layout.shard_count == 1:
        return trainable
    return {name: nn.Parameter(layout.to_local(p.detach())) for name, p in trainable.items()}


def make_optimizer(
    parameters: dict[str, nn.Parameter], train: TrainConfig
) -> torch.optim.Optimizer:
    """Make the AdamW that `train.optimizer` names, with weight decay on matrices only."""
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": train.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]

    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.learning_rate, fused=True)
    return make_bitsandbytes_optimizer(train.optimizer, groups, train.learning_rate)


def make_bitsandbytes_optimizer(
    name: str, groups: Iterable[dict], lr: float
) -> torch.optim.Optimizer:
    """Make an AdamW of bitsandbytes: states in 8 bits (arXiv 2110.02861), paged, or both.

    Args:
        name: adamw8bit, paged_adamw (32-bit states) or paged_adamw8bit. The paged ones keep their
            states in memory that moves between GPU and host, so they need a GPU.
        groups: parameter groups, as for torch's optimizers.
        lr: learning rate.
    """
    # without a GPU, importing bitsandbytes logs a warning about an optional kernel package
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes  # takes two seconds

    classes = {
        "adamw8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw": bitsandbytes.optim.PagedAdamW32bit,
        "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit,
    }
    optimizer = classes[name](list(groups), lr=lr)
    if not name.startswith("paged"):
        return optimizer

    # Resuming restores states into ordinary device memory. Before the first step they are copied
    # into pages, which is memory that CUDA moves to the host when the device is full.
    def move_states_to_pages(*_: object) -> None:
        for p, state in optimizer.state.items():
            for key in ("state1", "state2"):
                pages = optimizer.get_state_buffer(p, dtype=state[key].dtype)
                state[key] = pages.copy_(state[key])
        hook.remove()

    hook = optimizer.register_step_pre_hook(move_states_to_pages)
    return optimizer


def learning_rate_factor(step: int, total_steps: int, train: TrainConfig) -> float:
    """Return the learning rate of one optimizer step as a share of the peak.

    The shapes are those of transformers' schedules with the same names; cosine and linear can
    also end above zero (`train.min_lr_ratio`).

    Args:
        step: the optimizer step, counted from 0.
        total_steps: steps of the whole run.
        train: names the schedule and its warmup.
    """
    if train.lr_scheduler == "constant":
        return 1.0

    warmup = train.warmup_steps
    if train.warmup_ratio is not None:
        warmup = math.ceil(total_steps * train.warmup_ratio)
    if step < warmup:
        return step / max(1, warmup)
    if train.lr_scheduler == "constant_with_warmup":
        return 1.0

    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if train.lr_scheduler == "linear":
        decay = 1 - progress
    else:
        decay = 0.5 * (1 + math.cos(math.pi * progress))
    return train.min_lr_ratio + (1 - train.min_lr_ratio) * decay


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def take_step(
    optimizer: torch.optim.Optimizer, grad_norm: Tensor, compute_dtype: torch.dtype
) -> Tensor | None:
    """Update the weights, except in float16 if a gradient has overflowed.

    The largest float16 is 65,504. A gradient beyond it is infinite and would make every weight NaN,
    so such a step is skipped. torch's AdamW skips it on the device, and the host does not wait to
    know. The optimizers of bitsandbytes cannot do that; for them the host reads the norm.

    Args:
        optimizer: its parameters have their gradients.
        grad_norm: what `finish_gradients` returned; it is the same on all processes.
        compute_dtype: of the arithmetic.

    Returns:
        In float16 whether the step was skipped, a bool on the device; otherwise None.
    """
    if compute_dtype != torch.float16:
        optimizer.step()
        return None

    overflowed = ~grad_norm.isfinite()
    if isinstance(optimizer, torch.optim.AdamW):
        # where this is 1, the fused kernel changes neither weights nor states (for GradScaler)
        optimizer.found_inf = overflowed.float()  # type: ignore[attr-defined]
        optimizer.step()
    elif not overflowed:
        optimizer.step()
    return overflowed


def finish_gradients(
    loaded: LoadedModel,
    parameters: dict[str, nn.Parameter],
    supervised_tokens: Tensor,
    max_norm: float,
) -> Tensor:
    """Turn the sums that the backward passes left into the gradients of the step's mean loss.

    They are summed over processes, divided by the step's supervised tokens, and clipped. Dividing
    only now has a second use: inside a 16-bit model the gradients of a summed loss are larger than
    those of a mean, so fewer of them are rounded to zero. What is divided here is float32.

    Args:
        loaded: the model whose backward passes have run.
        parameters: what `trainable_parameters` returned; their gradients are changed in place.
        supervised_tokens: their number in the whole step, on all processes. If it is 0, so are all
            gradients.
        max_norm: clip the global norm to this; 0 turns clipping off.

    Returns:
        The global norm before clipping, fp32, still on the device.
    """
    loaded.layout.sum_gradients(loaded.model, parameters)
    grads = [p.grad for p in parameters.values() if p.grad is not None]

    # with parallel.cpu_offload gradients are on the CPU, whatever the device of the count is
    factor = 1 / supervised_tokens.clamp(min=1)
    torch._foreach_mul_(grads, factor.to(grads[0].device, torch.float32))

    squared_norm = torch.stack(torch._foreach_norm(grads)).square().sum()
    norm = loaded.layout.sum_over_shards(squared_norm).sqrt()
    if max_norm:  # as torch.nn.utils.clip_grad_norm_ does, epsilon included
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
