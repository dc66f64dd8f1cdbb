"""Cross-entropy at the supervised positions only, a chunk of rows at a time.

Logits [T, V] in fp32 would be the largest tensor of a training step, and most of their rows, those
of the prompts, are not needed. Here only the rows that have a label are multiplied by the head's
weight, and the logits of each chunk are turned into their gradient at once, in the same memory.

A chunk is large, so that its matrix products are quick. What is done with its logits between the
products is limited by memory: it goes by smaller blocks of rows, which stay in a processor's cache
meanwhile.

Shapes: T tokens, N supervised rows, n rows of a chunk, b rows of a block, D model, V vocabulary,
v rows of a tile of the head's weight.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from minilora.distributed import to_device

CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
"""Logits multiplied at a time, by device: in bfloat16 32 and 256 MiB."""
BLOCK_ELEMENTS = {"cpu": 2**19, "cuda": 2**25}
"""Logits handled at a time between the products, by device: in fp32 2 and 128 MiB."""
TILE_ELEMENTS = 2**22
"""Elements of the head's weight that are cast at a time: 16 MiB in fp32."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The sum of token losses; gradients are computed in the forward pass, from the same logits."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Return the loss as an fp32 scalar: hidden [N, D], weight [V, D], targets int64 [N]."""
        wants_grad_hidden, wants_grad_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_grad_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_grad_weight else None

        num_rows, vocab_size = len(hidden), len(weight)
        matrix = weight
        if weight.itemsize > hidden.itemsize:  # a trained head, fp32, beside 16-bit activations
            matrix = weight.to(hidden.dtype)
        chunk_rows = _max_rows(CHUNK_ELEMENTS, vocab_size, hidden.device)
        # memory for the logits of one chunk after the other
        buffer = hidden.new_empty(min(chunk_rows, num_rows), vocab_size)

        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, num_rows, chunk_rows):
            chunk = slice(start, start + chunk_rows)
            h = hidden[chunk]  # [n, D]
            logits = buffer[: len(h)]  # [n, V]
            for columns, tile in _tiles(matrix, hidden.dtype):
                torch.mm(h, tile.t(), out=logits[:, columns])  # [n, D] @ [D, v] -> [n, v]

            wants_gradient = wants_grad_hidden or wants_grad_weight
            total += _row_losses(logits, targets[chunk], wants_gradient).sum()
            grad = logits  # its values have been replaced
            if grad_hidden is not None:
                _multiply_by_tiles(grad, matrix, out=grad_hidden[chunk])
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


def _max_rows(elements: dict[str, int], vocab_size: int, device: torch.device) -> int:
    """Return how many rows of V logits are in `elements` of this device, at least one."""
    allowed = elements.get(device.type, elements["cuda"])
    return max(1, allowed // vocab_size)


def _row_losses(logits: Tensor, targets: Tensor, wants_gradient: bool) -> Tensor:
    """Compute the loss of each row of logits, and put the logits' gradient in their place.

    Args:
        logits: [n, V]; overwritten by softmax(logits) - onehot(targets) if `wants_gradient`.
        targets: int64 [n].
        wants_gradient: whether to compute the gradient.

    Returns:
        The losses, fp32 [n].
    """
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    block_rows = _max_rows(BLOCK_ELEMENTS, logits.shape[1], logits.device)
    for start in range(0, len(logits), block_rows):
        block = slice(start, start + block_rows)
        scores = logits[block].float()  # [b, V], a copy unless the logits are fp32 already
        y = targets[block].unsqueeze(1)  # [b, 1]
        logsumexp = scores.logsumexp(dim=-1, keepdim=True)  # [b, 1]
        losses[block] = (logsumexp - scores.gather(1, y)).squeeze(1)
        if wants_gradient:
            grad = scores.sub_(logsumexp).exp_()  # softmax, in the memory of the scores
            minus_one = grad.new_full((), -1.0).expand_as(y)
            grad.scatter_add_(1, y, minus_one)  # adds -1 in the column of each row's target
            logits[block] = grad  # rounded to the dtype of the products
    return losses


def _tiles(matrix: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Iterate over the rows of the head's weight in the dtype of the hidden states.

    Only a weight that is held in fewer bits than that is cast, some rows at a time, so that no
    whole copy of it in fp32 exists.

    Args:
        matrix: the head's weight [V, D].
        dtype: of the hidden states.

    Yields:
        Which rows, and their weight [v, D].
    """
    if matrix.dtype == dtype:
        yield slice(0, len(matrix)), matrix
        return
    tile_rows = max(1, TILE_ELEMENTS // matrix.shape[1])
    for start in range(0, len(matrix), tile_rows):
        rows = slice(start, start + tile_rows)
        yield rows, matrix[rows].to(dtype)


def _multiply_by_tiles(grad: Tensor, matrix: Tensor, out: Tensor) -> None:
    """Write grad [n, V] @ matrix [V, D] to `out` [n, D], which has the dtype of `grad`."""
    for columns, tile in _tiles(matrix, grad.dtype):
        if columns.start == 0:
            torch.mm(grad[:, columns], tile, out=out)
        else:
            out.addmm_(grad[:, columns], tile)


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
    targets = to_device(targets[rows], hidden.device)
    rows = to_device(rows, hidden.device)

    if not torch.is_grad_enabled():
        # ctx.needs_input_grad is true even then, and gradients would be computed for nothing
        hidden, weight = hidden.detach(), weight.detach()
    # autocast would change the dtypes inside _ChunkedCrossEntropy
    with torch.autocast(hidden.device.type, enabled=False):
        return _ChunkedCrossEntropy.apply(hidden[rows], weight, targets)
