"""Keys and values of earlier tokens, and the attention over them.

Each unfinished answer has a *slot* of the cache. The tokens of a forward pass are one new token for
each slot in use, then all tokens of new prompts; each new prompt takes a further slot.

Shapes: S slots that a pass gives one new token each, B slots in all, C capacity of a slot in
tokens, L places of each slot that a pass looks at (L <= C), T tokens of the pass, H query heads,
K key/value heads (H is a multiple of K), G = H / K query heads that share a key/value head, E head
size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.distributed import to_device
from minilora.model.attention import PackedAttention
from minilora.model.hf_config import DecoderConfig


class KVCache:
    """The keys and values of all tokens so far, for each layer and each slot.

    Attributes:
        layers: for each layer its keys (index 0) and values (index 1) [2, B, K, C, E].
        lengths: tokens held by each slot in use, known to the host. The slots in use come first.
        positions: the same on the device, int64 [B]: where the next token of each slot goes. It is
            behind `lengths` between `extend` and the end of the pass.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        places_unit: int = 1,
    ):
        """Make an empty cache: C = 0 until the first pass reserves room.

        Args:
            config: of the model.
            num_slots: B.
            dtype: of keys and values.
            device: where the model computes.
            places_unit: C and L are multiples of it.
        """
        shape = (2, num_slots, config.num_key_value_heads, 0, config.head_dim)
        self.layers = [
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)
        ]
        self.lengths: list[int] = []
        self.positions = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.slots = torch.arange(num_slots, device=device)  # 0 to B - 1
        self.places_unit = places_unit

    @property
    def capacity(self) -> int:
        """C, the number of tokens for which each slot has room."""
        return self.layers[0].shape[3]

    def round_up(self, length: int) -> int:
        """Return how many places a pass looks at if its longest slot holds `length` tokens."""
        return -(-length // self.places_unit) * self.places_unit

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens in every slot, and half as many again.

        The extra room makes growing rare: each time, all keys and values are copied.
        """
        if length <= self.capacity:
            return
        more = self.round_up(length + length // 2) - self.capacity
        for i, layer in enumerate(self.layers):
            self.layers[i] = F.pad(layer, (0, 0, 0, more))  # C grows at its end

    def extend(self, prompt_lengths: Sequence[int] = ()) -> None:
        """Count the tokens of the next pass, and reserve the slots and the room that they need.

        Args:
            prompt_lengths: tokens of each new prompt; every slot in use gets one token.
        """
        self.lengths = [length + 1 for length in self.lengths] + list(prompt_lengths)
        self.reserve(max(self.lengths))

    def upload_positions(self) -> None:
        """Set `positions` from `lengths`; free slots get 0, which is within any capacity."""
        num_free = len(self.positions) - len(self.lengths)
        lengths = torch.tensor(self.lengths + [0] * num_free, dtype=torch.int64)
        self.positions.copy_(to_device(lengths, self.positions.device))

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

    Without prompts, nothing here comes from the host but the sizes S and L. So a CUDA graph can
    hold the pass.
    """

    def __init__(
        self,
        cache: KVCache,
        num_running: int,
        num_places: int,
        prompt_lengths: Sequence[int] = (),
        is_full: bool = False,
    ):
        """Prepare a pass.

        Args:
            cache: after `extend`; its `positions` are those before the pass.
            num_running: S; the first S slots get one token each. Free slots may be among them.
            num_places: L, at least the tokens of the longest of them after the pass.
            prompt_lengths: tokens of each new prompt; they take the slots after the first S.
            is_full: whether each of the S slots holds exactly L tokens after the pass. No mask is
                then needed.
        """
        self.cache = cache
        self.num_running = num_running
        self.num_places = num_places
        self.is_full = is_full
        device = cache.positions.device

        next_positions = cache.positions[:num_running]
        self.slots = cache.slots[:num_running]  # of each token [T]
        self.positions = next_positions  # of each token in its slot [T]
        self.prompts: PackedAttention | None = None
        if prompt_lengths:
            self.prompts = PackedAttention(prompt_lengths, device)
            last_slot = num_running + len(prompt_lengths)
            new_slots = torch.arange(num_running, last_slot)
            slot_of_token = new_slots.repeat_interleave(torch.tensor(prompt_lengths))
            self.slots = torch.cat((self.slots, to_device(slot_of_token, device)))
            self.positions = torch.cat((next_positions, self.prompts.positions))

        # of each new token to each place in its slot [S, L]; negative: beyond the slot's last token
        self.distances = next_positions[:, None] - torch.arange(num_places, device=device)
        # the mask for each window size, made when first needed
        self.masks: dict[int | None, Tensor | None] = {}

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
        keys = keys[: self.num_running, :, : self.num_places]  # [S, K, L, E]
        values = values[: self.num_running, :, : self.num_places]
        # the G heads that share a key/value head take SDPA's axis of query tokens:
        # [S, H, E] -> [S, K, G, E]
        query = q.unflatten(1, (keys.shape[1], -1))
        out = F.scaled_dot_product_attention(query, keys, values, self._mask(window))
        return out.flatten(1, 2)  # [S, K, G, E] -> [S, H, E]

    def _mask(self, window: int | None) -> Tensor | None:
        """Return what is added to the scores of a slot's places, or None if nothing is.

        The mask is 0 where the new token sees, else -inf: [S, 1, 1, L], made once for all layers.
        """
        if window not in self.masks:
            self.masks[window] = self._make_mask(window)
        return self.masks[window]

    def _make_mask(self, window: int | None) -> Tensor | None:
        """Compute the mask of `_mask`."""
        sees_whole_slot = window is None or self.num_places <= window
        if sees_whole_slot and self.is_full:
            return None
        is_hidden = self.distances < 0
        if window is not None:
            is_hidden = is_hidden | (self.distances >= window)
        mask = torch.zeros(
            is_hidden.shape, dtype=self.cache.layers[0].dtype, device=is_hidden.device
        )
        return mask.masked_fill_(is_hidden, -torch.inf)[:, None, None]
