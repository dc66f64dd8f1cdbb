"""Cross-entropy at the supervised positions only, a chunk of rows at a time.

Logits [T, V] in fp32 would be the largest tensor of a training step, and most of their rows, those
of the prompts, are not needed. Here only the rows that have a label are multiplied by the head's
weight, and the logits of each chunk are turned into their gradient at once, in the same memory.

Shapes: T tokens, N supervised rows, n rows of a chunk, D model, V vocabulary.
"""

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24
"""Logits computed at a time: 64 MiB in fp32."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of token losses; gradients are computed in the forward pass, from the same logits."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Return the loss as an fp32 scalar: hidden [N, D], weight [V, D], targets int64 [N]."""
        wants_grad_hidden, wants_grad_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_grad_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_grad_weight else None

        total = hidden.new_zeros((), dtype=torch.float32)
        matrix = weight.to(hidden.dtype)
        chunk_rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], chunk_rows):
            chunk = slice(start, start + chunk_rows)
            h = hidden[chunk]  # [n, D]
            y = targets[chunk].unsqueeze(1)  # [n, 1]
            logits = (h @ matrix.t()).float()  # [n, V]
            logsumexp = logits.logsumexp(dim=-1, keepdim=True)  # [n, 1]
            total += (logsumexp - logits.gather(1, y)).sum()
            if grad_hidden is None and grad_weight is None:
                continue

            # the gradient of the logits [n, V] is softmax - onehot, computed in their memory
            grad = logits.sub_(logsumexp).exp_()
            minus_one = grad.new_full((), -1.0).expand_as(y)
            grad.scatter_add_(1, y, minus_one)  # adds -1 in the column of each row's target
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, matrix, out=grad_hidden[chunk])
            if grad_weight is not None:
                grad_weight += grad.t() @ h

        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Multiply the gradients that `forward` kept by that of the loss."""
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            # grad_total is an fp32 scalar, so the product is rounded once, to grad_hidden's dtype
            grad_hidden = grad_hidden * grad_total
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum the cross-entropies of all labels that are not -100.

    Position t predicts token t + 1, so this equals
    `F.cross_entropy(hidden[:-1] @ weight.T, labels[1:], reduction="sum")`. Each document's first
    label must be -100: the last token of one document does not predict the first of the next.

    Args:
        hidden: final hidden states [T, D].
        weight: the head's weight [V, D].
        labels: int64 [T], not shifted: labels[t] is token t, or -100. They should be on the CPU:
            to count the supervised rows of labels on a GPU, the host has to wait for it.

    Returns:
        An fp32 scalar.
    """
    targets = labels[1:]
    rows = (targets != -100).nonzero().squeeze(1)  # int64 [N]
    targets = targets[rows].to(hidden.device, non_blocking=True)
    rows = rows.to(hidden.device, non_blocking=True)

    if not torch.is_grad_enabled():
        # ctx.needs_input_grad is true even then, and gradients would be computed for nothing
        hidden, weight = hidden.detach(), weight.detach()
    # autocast would change the dtypes inside _ChunkedCrossEntropy
    with torch.autocast(hidden.device.type, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden[rows], weight, targets)
