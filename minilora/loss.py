"""Cross-entropy at the supervised positions only, a chunk of rows at a time.

Logits are the largest tensor of a fine-tuning step (T x V in fp32), and most of them, the prompt's, are not wanted. Here
only rows with a label meet the vocabulary matrix, and each chunk's logits are turned into their gradient at once.

Shapes: N supervised rows, D model, V vocabulary.
"""

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24  # logits held at a time: 64 MiB in fp32


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of token losses; the gradients are made in the forward pass, while a chunk's logits are at hand."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        want_hidden, want_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        matrix = weight.to(hidden.dtype)
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            h, y = hidden[start : start + rows], targets[start : start + rows, None]
            logits = (h @ matrix.t()).float()  # [n, V]
            logsumexp = logits.logsumexp(dim=-1, keepdim=True)
            total += (logsumexp - logits.gather(1, y)).sum()
            if not (want_hidden or want_weight):
                continue
            grad = logits.sub_(logsumexp).exp_()  # softmax [n, V], in the logits' memory
            grad.scatter_add_(1, y, grad.new_full((), -1.0).expand_as(y))
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, matrix, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                grad_weight += grad.t() @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_total,  # in fp32, rounded once
            None if grad_weight is None else (grad_weight * grad_total).to(ctx.weight_dtype),
            None,
        )


def cross_entropy_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum (fp32 scalar) of the cross-entropies of the labels that are not -100.

    hidden [T, D]; weight [V, D]; labels int64 [T], not shifted (labels[t] is token t or -100): position t predicts
    token t + 1. A document's first label must be -100, so that no document predicts the next one's beginning.
    Equals `F.cross_entropy(hidden[:-1] @ weight.T, labels[1:], reduction="sum")`.
    """
    targets = labels[1:]
    rows = (targets != -100).nonzero().squeeze(1)  # on the host, if the labels are there: counting rows on a GPU waits for it
    rows, targets = rows.to(hidden.device, non_blocking=True), targets[rows].to(hidden.device, non_blocking=True)
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()  # a custom function does not notice no_grad by itself
    with torch.autocast(hidden.device.type, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden[rows], weight, targets)
