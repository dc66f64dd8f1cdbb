"""Forward passes that give each unfinished answer its next token.

What a pass reads and writes lies on the device: the last token of each slot, its position, and the
random draws. A pass needs nothing from the host and the next one can follow at once, so on CUDA the
host reads the tokens of several passes together, and a pass without new prompts is recorded once as
a *CUDA graph* and then replayed. Replaying starts all kernels of the pass at once. Started one by
one from Python, they would leave a GPU idle most of the time, as each of them is short.

A graph holds fixed shapes. The slots are therefore rounded up to 1, 4, 16, 64, ..., and the places
of the cache to a multiple of GRAPH_PLACES; a graph is recorded for each pair that occurs.

Shapes: S slots in use, V vocabulary, N passes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minilora.distributed import to_device
from minilora.generation.cache import CachedAttention, KVCache
from minilora.generation.sampling import SamplingParams, apply_repetition_penalty, sample_tokens
from minilora.model.frozen_linear import FrozenLinear
from minilora.model.transformer import CausalLM

GRAPH_PLACES = 256
"""A pass in a CUDA graph looks at a multiple of this many places of each slot."""

# All but cuDNN's: that one may plan anew for every length of the cache.
ATTENTION_KERNELS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class DecodingPasses:
    """Runs passes over the slots of a key/value cache.

    Attributes:
        cache: the keys and values of all slots.
        tokens: the last token of each slot, int64 [all slots].
        draws: a random number in [0, 1) for the next token of each slot, fp32 [all slots].
        seen: with a repetition penalty, whether a token occurs in a slot's prompt or answer, bool
            [all slots, V]; else None.
    """

    def __init__(
        self,
        model: CausalLM,
        params: SamplingParams,
        num_slots: int,
        device: torch.device,
        use_graphs: bool,
    ):
        """Allocate what the passes share.

        Args:
            model: in evaluation mode.
            params: how tokens are chosen.
            num_slots: answers that grow together.
            device: where the model computes.
            use_graphs: replay passes as CUDA graphs (see `can_use_graphs`).
        """
        self.model = model
        self.params = params
        self.device = device
        places_unit = 1
        if use_graphs:
            num_slots, places_unit = round_up_slots(num_slots), GRAPH_PLACES
        dtype = cache_dtype(model, device)
        self.cache = KVCache(model.config, num_slots, dtype, device, places_unit)
        self.tokens = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.draws = torch.zeros(num_slots, device=device)
        self.seen: Tensor | None = None
        if params.repetition_penalty != 1.0:
            shape = (num_slots, model.config.vocab_size)
            self.seen = torch.zeros(shape, dtype=torch.bool, device=device)
        self.graphs: PassGraphs | None = None
        if use_graphs:
            self.graphs = PassGraphs()

    def run(
        self,
        last_tokens: Sequence[int],
        new_prompts: Sequence[Sequence[int]],
        draws: Sequence[Sequence[float]],
    ) -> list[list[int]]:
        """Run passes one after the other, and read the tokens that they choose.

        Args:
            last_tokens: the last token of each slot in use.
            new_prompts: ids of the prompts that take the next slots, in the first pass.
            draws: for each pass a random number for each slot, the new ones included: [N][S].

        Returns:
            For each pass the token of each slot, [N][S].
        """
        num_slots = len(last_tokens) + len(new_prompts)
        self.tokens[: len(last_tokens)] = to_device(torch.tensor(last_tokens), self.device)
        self.cache.upload_positions()
        draws_of_passes = to_device(torch.tensor(draws, dtype=torch.float32), self.device)  # [N, S]

        chosen = []
        with sdpa_kernel(ATTENTION_KERNELS):
            for draws_of_pass in draws_of_passes:
                self.draws[:num_slots] = draws_of_pass
                if new_prompts:
                    self._run_with_prompts(new_prompts)
                    new_prompts = []
                else:
                    self._run_slots(num_slots)
                chosen.append(self.tokens[:num_slots].clone())
        return torch.stack(chosen).tolist()  # here the host waits for the device

    def free(self, slot: int) -> None:
        """Free a slot, into which the last slot in use moves."""
        last = len(self.cache.lengths) - 1
        if self.seen is not None:
            self.seen[slot] = self.seen[last]
        self.cache.free(slot)

    def _extend(self, prompt_lengths: Sequence[int] = ()) -> None:
        """Make room in the cache for the next pass; see `KVCache.extend`."""
        capacity = self.cache.capacity
        self.cache.extend(prompt_lengths)
        if self.graphs is not None and self.cache.capacity != capacity:
            self.graphs.clear()  # they write into the cache as it was before it grew

    def _run_with_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        """Run a pass over one token of each slot in use and all tokens of new prompts."""
        num_running = len(self.cache.lengths)
        prompt_lengths = [len(prompt) for prompt in prompts]
        self._extend(prompt_lengths)
        self._mark_seen(num_running, prompts)

        ids = [token for prompt in prompts for token in prompt]
        tokens = torch.cat(
            (self.tokens[:num_running], to_device(torch.tensor(ids), self.device))
        )  # [T]
        counts = torch.tensor([1] * num_running + prompt_lengths)
        last_rows = to_device(counts.cumsum(0) - 1, self.device)  # the last token of each slot [S]
        attention = self._attention(num_running, prompt_lengths)
        self._choose(self.model(tokens, logits_at=last_rows, attention=attention))
        self.cache.upload_positions()

    def _run_slots(self, num_slots: int) -> None:
        """Run a pass over one token of each slot in use."""
        self._extend()
        if self.graphs is None:
            self._compute(num_slots)
            return
        num_slots = round_up_slots(num_slots)
        shape = (num_slots, self.cache.round_up(max(self.cache.lengths)))
        self.graphs.run(shape, lambda: self._compute(num_slots))

    def _compute(self, num_slots: int) -> None:
        """Compute the pass of `_run_slots`; all tensors that it reads are on the device."""
        attention = self._attention(num_slots)
        rows = self.cache.slots[:num_slots]  # every token's logits are wanted
        logits = self.model(self.tokens[:num_slots], logits_at=rows, attention=attention)
        self._choose(logits)
        self.cache.positions[:num_slots] += 1

    def _attention(self, num_slots: int, prompt_lengths: Sequence[int] = ()) -> CachedAttention:
        """Return the attention of a pass in which `num_slots` slots get one token each."""
        running = self.cache.lengths[:num_slots]
        num_places = self.cache.round_up(max(running, default=0))
        is_full = all(length == num_places for length in running)
        if self.graphs is not None:
            is_full = False  # a graph is replayed when it no longer holds
        return CachedAttention(self.cache, num_slots, num_places, prompt_lengths, is_full)

    def _choose(self, logits: Tensor) -> None:
        """Choose the next token of the first S slots by their logits [S, V]."""
        num_slots = len(logits)
        if self.seen is not None:
            logits = logits.float()
            apply_repetition_penalty(logits, self.seen[:num_slots], self.params.repetition_penalty)
        tokens = sample_tokens(logits, self.params, self.draws[:num_slots])
        self.tokens[:num_slots] = tokens
        if self.seen is not None:
            self.seen[:num_slots].scatter_(1, tokens[:, None], True)

    def _mark_seen(self, first_slot: int, prompts: Sequence[Sequence[int]]) -> None:
        """Note which tokens occur in the prompts that take the slots from `first_slot` on."""
        if self.seen is None:
            return
        for slot, prompt in enumerate(prompts, start=first_slot):
            self.seen[slot] = False
            self.seen[slot, to_device(torch.tensor(prompt), self.device)] = True


class PassGraphs:
    """CUDA graphs of passes, by their shape."""

    def __init__(self) -> None:
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self.memory_pool = torch.cuda.graph_pool_handle()  # graphs run in turn and may share memory

    def run(self, shape: tuple[int, int], compute: Callable[[], None]) -> None:
        """Run a pass: compute and record it where the shape is new, else replay it.

        Args:
            shape: slots and places.
            compute: computes the pass. It reads and writes the same tensors each time.
        """
        if shape in self.graphs:
            self.graphs[shape].replay()
            return
        # The first pass is computed as always, on another stream, as recording asks for: kernels
        # are loaded and libraries allocate what they keep.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute()
        torch.cuda.current_stream().wait_stream(stream)

        # recording computes nothing; other threads, which pin memory, may go on meanwhile
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.memory_pool, capture_error_mode="thread_local"):
            compute()
        self.graphs[shape] = graph

    def clear(self) -> None:
        """Forget all graphs."""
        self.graphs.clear()


def can_use_graphs(model: CausalLM, device: torch.device) -> bool:
    """Return whether passes of a model can be recorded as CUDA graphs.

    Not under autocast, which keeps the 16-bit weights for the length of its context only; and not
    with layers in 8 bits, whose outliers are counted by the host.
    """
    if device.type != "cuda" or torch.is_autocast_enabled(device.type):
        return False
    frozen = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    return not any(layer.waits_for_device for layer in frozen)


def cache_dtype(model: CausalLM, device: torch.device) -> torch.dtype:
    """Return the dtype of keys and values: autocast's, or that of the model's activations."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return model.model.norm.weight.dtype


def round_up_slots(num_slots: int) -> int:
    """Round up to 1, 4, 16, 64, ..."""
    rounded = 1
    while rounded < num_slots:
        rounded *= 4
    return rounded
