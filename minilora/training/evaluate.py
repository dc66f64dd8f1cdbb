"""Evaluation during training: losses of the evaluation sets, sample answers, their scores."""

from dataclasses import dataclass, field

import torch

from minilora import distributed
from minilora.build import LoadedModel, autocast_to
from minilora.config import Config
from minilora.data.dataset import EvalSet
from minilora.data.tokenizer import Tokenizer
from minilora.evaluation.perplexity import batches_by_length, loss_and_ppl, loss_sums
from minilora.evaluation.text import score
from minilora.generation.engine import Answer, generate_ids
from minilora.generation.sampling import SamplingParams
from minilora.training.batches import rank_share
from minilora.training.datasets import eval_prompts


@dataclass
class Evaluation:
    """What an evaluation found, in the rows in which it is logged. The same on all processes."""

    losses: list[dict[str, float]]
    """For each evaluation set {"eval/SET/loss": ..., "eval/SET/ppl": ...}."""
    samples: list[dict[str, str]] = field(default_factory=list)
    """Answers to rows of the last set: {"prompt": ..., "target": ..., "generated": ...}."""
    scores: dict[str, float] | None = None
    """Scores of these answers, as eval/SET/FIGURE; None where `eval.metrics` asks for none."""

    @property
    def figures(self) -> dict[str, float]:
        """All figures by name, in the order of the rows."""
        figures: dict[str, float] = {}
        for row in [*self.losses, self.scores or {}]:
            figures.update(row)
        return figures


def evaluate(
    config: Config, loaded: LoadedModel, tokenizer: Tokenizer, eval_sets: list[EvalSet]
) -> Evaluation:
    """Evaluate the model, all processes together, and leave it in training mode."""
    model = loaded.model.eval()
    evaluation = Evaluation([_losses(config, loaded, eval_set) for eval_set in eval_sets])

    pairs = eval_prompts(config, eval_sets)
    if pairs:
        prompts = [prompt for prompt, _ in pairs]
        targets = [tokenizer.decode(target) for _, target in pairs]
        answers = _answers(config, loaded, tokenizer, prompts)
        evaluation.samples = [
            {"prompt": tokenizer.decode(prompt), "target": target, "generated": answer}
            for prompt, target, answer in zip(prompts, targets, answers, strict=True)
        ]
        if config.eval.metrics:
            scores = score(config.eval.metrics, answers, targets)
            prefix = f"eval/{eval_sets[-1].name}"
            evaluation.scores = {f"{prefix}/{name}": value for name, value in scores.items()}

    loaded.layout.reshard(model)  # free what the last forward pass gathered
    distributed.barrier()  # all processes leave the evaluation together
    model.train()
    return evaluation


def _losses(config: Config, loaded: LoadedModel, eval_set: EvalSet) -> dict[str, float]:
    """Return the loss of an evaluation set and its perplexity, by the names they are logged under.

    The mean is over the supervised tokens of the set, so every token counts the same.
    """
    documents, limits = eval_set.documents, config.eval
    batches = batches_by_length(
        documents, eval_set.indices, limits.batch_size, limits.max_batch_tokens
    )
    my_batches = rank_share(batches, loaded.layout.shard_count)

    device = distributed.default_device()
    sums = loss_sums(loaded.model, documents, my_batches, device, loaded.autocast)
    figures = loss_and_ppl(distributed.all_reduce_sum(sums))
    return {f"eval/{eval_set.name}/{name}": value for name, value in figures.items()}


def _answers(
    config: Config, loaded: LoadedModel, tokenizer: Tokenizer, prompts: list[list[int]]
) -> list[str]:
    """Return the model's answers to prompts (token ids); each process generates its share."""
    params = SamplingParams(
        max_new_tokens=config.eval.max_new_tokens,
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        seed=config.seed,
        max_time=config.eval.max_time,
    )
    # Full training has fp32 weights, but generates in 16 bits. Unlike the losses, whose 16 bits
    # come from FSDP where a model is sharded, the key/value cache takes its dtype from autocast.
    in_16_bits = config.method == "full" and loaded.dtype != torch.float32
    autocast = loaded.dtype if in_16_bits else None

    world_size = distributed.world_size()
    mine = range(distributed.rank(), len(prompts), world_size)
    my_prompts = [prompts[i] for i in mine]
    is_sharded = loaded.layout.shard_count > 1
    with (
        autocast_to(autocast, distributed.default_device()),
        loaded.layout.keep_gathered(loaded.model),
    ):
        answers = generate_ids(
            loaded.model, my_prompts, tokenizer, params, indices=mine, collective=is_sharded
        )
    _log_cut_off(config, answers, len(prompts))
    texts = []
    for prompt, answer in zip(my_prompts, answers, strict=True):
        is_complete = answer.finish_reason is not None
        texts.append(answer.text if is_complete else tokenizer.decode_after(prompt, answer.ids))
    shares = distributed.gather_objects(texts)
    # the inverse of `mine`: prompt i was answered by process i % world_size
    return [shares[i % world_size][i // world_size] for i in range(len(prompts))]


def _log_cut_off(config: Config, answers: list[Answer], total: int) -> None:
    """Say how many answers eval.max_time has cut off; all processes call this together.

    Args:
        config: the run's settings.
        answers: those of this process.
        total: how many answers there are on all processes.
    """
    if config.eval.max_time is None:
        return
    mine = sum(answer.finish_reason is None for answer in answers)
    num_cut = sum(sum(counts) for counts in distributed.gather_objects([mine]))
    if num_cut:
        distributed.log(
            f"{num_cut} of {total} answers were cut off after {config.eval.max_time:g} seconds "
            "(eval.max_time)"
        )
