"""Keys and values of earlier tokens, and the attention over them.

Each unfinished answer has a *slot* of the cache. The tokens of a forward pass are one new token for
each slot in use, then all tokens of new prompts; each new prompt takes a further slot.

Shapes: S slots in use before the pass, B slots in all, C capacity of a slot in tokens, L tokens of
the longest slot in use after the pass, T tokens of the pass, H query heads, K key/value heads
(H is a multiple of K), G = H / K query heads that share a key/value head, E head size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.model.attention import PackedAttention
from minilora.model.hf_config import DecoderConfig


class KVCache:
    """The keys and values of all tokens so far, for each layer and each slot.

    Attributes:
        layers: for each layer its keys (index 0) and values (index 1) [2, B, K, C, E].
        lengths: tokens held by each slot in use. The slots in use come first.
    """

    def __init__(
        self, config: DecoderConfig, num_slots: int, dtype: torch.dtype, device: torch.device
    ):
        """Make an empty cache: C = 0 until the first pass reserves room."""
        shape = (2, num_slots, config.num_key_value_heads, 0, config.head_dim)
        self.layers = [
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)
        ]
        self.lengths: list[int] = []

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens in every slot, and half as many again.

        The extra room makes growing rare: each time, all keys and values are copied.
        """
        capacity = self.layers[0].shape[3]
        if length <= capacity:
            return
        more = length + length // 2 - capacity
        for i, layer in enumerate(self.layers):
            self.layers[i] = F.pad(layer, (0, 0, 0, more))  # C grows at its end

    def free(self, slot: int) -> None:
        """Free a slot: copy the last slot in use into it, so that the slots in use stay first."""
        last = len(self.lengths) - 1
        length = self.lengths[last]
        if slot < last:
            for layer in self.layers:
                layer[:, slot, :, :length] = layer[:, last, :, :length]
        self.lengths[slot] = length
        self.lengths.pop()


class CachedAttention:
    """The attention context of one forward pass over a cache.

    A new token of a slot in use attends to the tokens in its slot. The tokens of a new prompt
    attend to one another, as in training. The keys and values of all of them enter the cache.
    """

    def __init__(self, cache: KVCache, prompt_lengths: Sequence[int], device: torch.device):
        """Prepare a pass, and reserve the slots and the room that it needs.

        Args:
            cache: the cache; its first S slots are in use.
            prompt_lengths: tokens of each new prompt.
            device: where the model computes.
        """
        self.cache = cache
        self.num_running = len(cache.lengths)  # S
        self.longest = max(cache.lengths) + 1 if cache.lengths else 0  # L
        self.is_ragged = len(set(cache.lengths)) > 1
        self.prompts = PackedAttention(prompt_lengths, device) if prompt_lengths else None

        # made on the CPU and copied to the device without waiting for it
        next_positions = torch.tensor(cache.lengths, dtype=torch.int64)  # of each new token [S]
        counts = [1] * self.num_running + list(prompt_lengths)  # new tokens of each slot
        slots = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        prompt_positions = [torch.arange(length) for length in prompt_lengths]
        positions = torch.cat([next_positions, *prompt_positions])
        distances = next_positions[:, None] - torch.arange(self.longest)
        self.slots = slots.to(device, non_blocking=True)  # of each token [T]
        self.positions = positions.to(device, non_blocking=True)  # of each token in its slot [T]
        # of each new token to each place in its slot [S, L]; negative: beyond the slot's last token
        self.distances = distances.to(device, non_blocking=True)
        # the mask for each window size, made when first needed
        self.masks: dict[int | None, Tensor | None] = {}

        lengths = cache.lengths + [0] * len(prompt_lengths)
        cache.lengths = [old + new for old, new in zip(lengths, counts, strict=True)]
        cache.reserve(max(cache.lengths))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        """Store keys and values and attend; shapes as in `AttentionContext`.

        Returns:
            [T, H, E].
        """
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # else SDPA takes its slow path
        keys, values = self.cache.layers[layer]  # [B, K, C, E] each
        # token t goes to place positions[t] of slot slots[t]: k and v are [T, K, E]
        keys[self.slots, :, self.positions] = k
        values[self.slots, :, self.positions] = v

        n = self.num_running
        outputs = []
        if n > 0:
            outputs.append(self._attend_to_cache(q[:n], keys, values, window))
        if self.prompts is not None:
            outputs.append(self.prompts(layer, q[n:], k[n:], v[n:], window))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]  # [T, H, E]

    def _attend_to_cache(
        self, q: Tensor, keys: Tensor, values: Tensor, window: int | None
    ) -> Tensor:
        """Let the new token of each slot in use attend to the tokens of its slot.

        Args:
            q: [S, H, E].
            keys: of the whole layer [B, K, C, E].
            values: of the whole layer [B, K, C, E].
            window: see `AttentionContext`.

        Returns:
            [S, H, E].
        """
        keys = keys[: self.num_running, :, : self.longest]  # [S, K, L, E]
        values = values[: self.num_running, :, : self.longest]
        # the G heads that share a key/value head take SDPA's axis of query tokens:
        # [S, H, E] -> [S, K, G, E]
        query = q.unflatten(1, (keys.shape[1], -1))
        out = F.scaled_dot_product_attention(query, keys, values, self._mask(window))
        return out.flatten(1, 2)  # [S, K, G, E] -> [S, H, E]

    def _mask(self, window: int | None) -> Tensor | None:
        """Return which tokens of its slot a new token sees [S, 1, 1, L], or None if it sees all."""
        if window not in self.masks:
            self.masks[window] = self._make_mask(window)
        return self.masks[window]

    def _make_mask(self, window: int | None) -> Tensor | None:
        """Compute the mask of `_mask`."""
        sees_whole_slot = window is None or self.longest <= window
        if sees_whole_slot and not self.is_ragged:
            return None
        is_visible = self.distances >= 0
        if window is not None:
            is_visible = is_visible & (self.distances < window)
        return is_visible[:, None, None]
