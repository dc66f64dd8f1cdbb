"""Fine-tune a model: python train.py CONFIG.py [--section.field value ...], or under torchrun.

`main` sets a run up and walks through its steps; the loop in it is the training algorithm, whole. Everything it calls is
below, or a noun of the package.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from minilora import dist
from minilora.build import Built, autocast_to, build_model
from minilora.checkpoint import read_adapter
from minilora.config import Config, TrainConfig, UserError
from minilora.data import step_order
from minilora.evaluation import metrics
from minilora.evaluation.loss import loss_and_ppl, loss_sums
from minilora.generate import generate_ids
from minilora.lora import load_adapter_state
from minilora.loss import cross_entropy_sum
from minilora.model import Apply
from minilora.running.datasets import EvalSets, digest, load_data, make_tokenizer, questions
from minilora.running.directory import TrainerState, find_checkpoint, prune, save, set_aside, start_directory
from minilora.running.ema import EMA
from minilora.running.settings import check_device, load_config, run_main
from minilora.running.signals import StopSignal
from minilora.running.training_state import load_training_tensors, training_tensors
from minilora.tokenizer import Tokenizer
from minilora.tracking import Tracker, prepare
from minilora.tracking.preview import preview
from minilora.tracking.window import Window
from minilora.weights import resolve

UPLOAD, STOPPED_UPLOAD = 600, 15  # seconds to wait for an upload at the end of a run, and of one that was asked to stop


def main(config: Config) -> int:
    """Run the configured training; returns the exit code."""
    out, train = Path(config.output_dir), config.train
    check_device(config)
    base = resolve(config.model.name, config.model.revision)
    tokenizer = make_tokenizer(config, base)
    documents, chosen, eval_sets = load_data(config, tokenizer, base)
    if config.preview:
        preview(documents, tokenizer, config.preview, config.seed, out)
        return 0
    docs_per_step = train.batch_size * train.grad_acc_steps * dist.world_size()
    steps_per_epoch = math.ceil(len(chosen) / docs_per_step)  # a last, partial step is taken too
    total_steps = train.max_steps or math.ceil(train.epochs * steps_per_epoch)
    checkpoint, state = find_checkpoint(config, out, digest(documents, chosen), docs_per_step)
    if checkpoint and nothing_to_do(checkpoint, state, total_steps, train):
        return 0

    hub = prepare(config)
    device = dist.default_device()
    dist.init(device)
    torch.use_deterministic_algorithms(config.deterministic)
    built, parameters = build_trainable(config, checkpoint, base, tokenizer, device)
    ema = EMA(parameters, train.ema_decay)
    optimizer = adamw(built, parameters, train, checkpoint, ema)
    start_directory(out, config)  # the first thing that is written: whatever is wrong with the input has been found
    resumed = f", resumed from {checkpoint} at step {state.step}" * bool(checkpoint)
    dist.log(f"{len(chosen):,} documents, {total_steps:,} steps -> {out}{resumed}")
    set_aside(checkpoint, out, state.step)
    tracker = Tracker(config, out, state.step, total_steps, [documents for documents, _ in eval_sets.values()], tokenizer, hub)

    with StopSignal() as stop, tracker:
        if config.eval.eval_on_start and state.step == 0:
            evaluate(config, built, tokenizer, eval_sets, tracker, {"step": 0, "epoch": 0.0})
        window, order = Window(device), np.empty(0, dtype=np.int64)
        while state.step < total_steps and not state.out_of_patience(train) and not stop.agreed:
            epoch, at = divmod(state.step, steps_per_epoch)
            if at == 0 or not len(order):
                lengths, by_length = documents.lengths[chosen], train.group_by_length
                order = chosen[step_order(lengths, docs_per_step, config.seed, epoch, config.data.shuffle, by_length)]
            torch.manual_seed(step_seed(config.seed, state.step))  # dropout: a function of the step, like every draw here
            micro_batches = my_micro_batches(order[at * docs_per_step : (at + 1) * docs_per_step], train.batch_size, built)
            for i, which in enumerate(micro_batches):
                batch = documents.batch(which, draw=(config.seed, epoch))
                last = i + 1 == len(micro_batches)
                built.place.reduce(built.model, now=last or config.method == "full")  # full: there is no room to wait
                with autocast_to(built.autocast, device):
                    loss = built.model(batch.tokens.to(device, non_blocking=True), batch.lengths, loss_with(batch.labels))
                loss.backward()  # of the sum: finish_gradients divides by the count over all micro-steps and ranks
                window.add(loss.detach(), batch.supervised, len(batch.tokens) * bool(len(which)))
            window.grad_norm = finish_gradients(built, parameters, window, train.max_grad_norm)
            window.lr = train.learning_rate * lr_factor(state.step, total_steps, train)
            for group in optimizer.param_groups:
                group["lr"] = window.lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update(state.step)

            state.step += 1
            state.finished = state.step == total_steps
            tracker.step()
            stop.agree(state.step, device)
            due = [state.finished or state.step % every == 0 for every in intervals(config, steps_per_epoch)]
            logging, evaluating, saving = due[0], due[1] and (state.finished or not stop.agreed), due[2] or stop.agreed
            if logging or evaluating or saving:
                window.sync(state, out)  # the first look at the numbers: here the device is waited for
                position = {"step": state.step, "epoch": state.step / steps_per_epoch}
                if logging:
                    tracker.log(position | window.row(state))
                with ema.applied(evaluating or saving):
                    if evaluating:
                        figures = evaluate(config, built, tokenizer, eval_sets, tracker, position)
                        saving |= state.note_evaluation(figures, train)  # the best so far is saved whenever it comes
                        state.finished |= state.out_of_patience(train)
                    if saving or state.finished:
                        name = save_checkpoint(config, built, tokenizer, state, optimizer, parameters, ema, base)
                        tracker.saved(position, name)
                window.restart_clock()
    tracker.close(patience=UPLOAD if state.finished else STOPPED_UPLOAD)
    dist.finish()
    return conclude(out, state, stop.number)


def conclude(out: Path, state: TrainerState, signal: int) -> int:
    """Say how the run ended; returns the exit code."""
    if not state.finished:
        dist.log(f"stopped by signal {signal} after step {state.step}, saved; the same command continues")
        return 128 + signal
    dist.log(f"done: {out / 'checkpoint-final'}; a report in {out / 'report.html'}{state.best_text()}")
    return 0


def nothing_to_do(checkpoint: Path, state: TrainerState, total_steps: int, train: TrainConfig) -> bool:
    """Whether the checkpoint is where this run ends. Raises UserError if it lies beyond."""
    if state.step >= total_steps and not state.finished:
        raise UserError(f"{checkpoint} is already past the {total_steps} steps asked for: raise train.max_steps or train.epochs")
    why = "all of them" if state.step >= total_steps else "stopped early" if state.out_of_patience(train) else ""
    if why:
        dist.log(f"{checkpoint} is finished, {state.step} steps, {why}: nothing to do (another output_dir starts a new run)")
    return bool(why)


def build_trainable(
    config: Config, checkpoint: Path | None, base: Path, tokenizer: Tokenizer, device: torch.device
) -> tuple[Built, dict[str, nn.Parameter]]:
    """The model in training mode with the checkpoint's weights, and the parameters to train by name."""
    full = config.method == "full"
    built = build_model(
        checkpoint if checkpoint and full else base, device, config.model.dtype, lora=None if full else config.lora, full=full,
        random_weights=config.model.init == "random" and checkpoint is None, seed=config.seed,
        gradient_checkpointing=config.train.gradient_checkpointing, bits=config.model.bits,
        double_quant=config.model.double_quant, run=config, vocab_size=tokenizer.vocab_size if config.data.add_tokens else 0,
    )  # fmt: skip
    place = built.place
    if checkpoint and not full:
        load_adapter_state(built.model, read_adapter(checkpoint)[1], str(checkpoint), place)
    trainable = {name: p for name, p in built.model.train().named_parameters() if p.requires_grad}
    trained = sum(p.numel() for p in trainable.values())
    parameters = trainable if place.count == 1 else {name: nn.Parameter(place.local(p.detach())) for name, p in trainable.items()}
    processes = f" x {dist.world_size()} processes" * (dist.world_size() > 1) + ", sharded" * (place.count > 1)
    dist.log(
        f"{config.model.name}: {built.parameters:,} parameters and {trained:,} trained, {built.dtype} on {device}{processes}"
    )
    return built, parameters


def adamw(
    built: Built, parameters: dict[str, nn.Parameter], train: TrainConfig, checkpoint: Path | None, ema: EMA
) -> torch.optim.Optimizer:
    """AdamW over all parameters, torch's or bitsandbytes', with the checkpoint's state; decay on matrices only."""
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if train.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=train.learning_rate, fused=True)
    else:
        from minilora.quant import bitsandbytes_adamw  # brings bitsandbytes, two seconds

        optimizer = bitsandbytes_adamw(train.optimizer, groups, train.learning_rate)
    if checkpoint:
        load_training_tensors(checkpoint, optimizer, parameters, built.place, dict(built.model.named_parameters()), ema)
    return optimizer


def lr_factor(step: int, total_steps: int, train: TrainConfig) -> float:
    """The learning rate of optimizer step `step` (from 0) over the peak: transformers' schedules of the same names."""
    if train.lr_scheduler == "constant":
        return 1.0
    warmup = train.warmup_steps if train.warmup_ratio is None else math.ceil(total_steps * train.warmup_ratio)
    if step < warmup:
        return step / max(1, warmup)
    if train.lr_scheduler == "constant_with_warmup":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    shape = 1 - progress if train.lr_scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return train.min_lr_ratio + (1 - train.min_lr_ratio) * shape


def step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step, dist.rank()]).generate_state(1)[0])


def my_micro_batches(docs: np.ndarray, batch_size: int, built: Built) -> list[np.ndarray]:
    """This rank's part of an optimizer step's documents, in micro-batches: rank r takes every world-size-th of them.

    Processes that share a model go through it together: one that has no documents left gets an empty micro-batch.
    """
    micro = [docs[start : start + batch_size] for start in range(0, len(docs), batch_size)]
    if built.place.count > 1:
        micro += [docs[:0]] * (-len(micro) % dist.world_size())
    return micro[dist.rank() :: dist.world_size()]


def loss_with(labels: Tensor) -> Apply:
    """What the model applies to its hidden states and its head's weight: the sum of token losses."""
    return lambda hidden, weight: cross_entropy_sum(hidden, weight, labels)


def finish_gradients(built: Built, parameters: dict[str, nn.Parameter], window: Window, max_norm: float) -> Tensor:
    """Sum the gradients over ranks, divide by the step's supervised tokens, clip. Returns the norm before clipping.

    Until here they are sums of token losses' gradients: large numbers, which half precision does not flush to zero.
    """
    built.place.sum_gradients(built.model, parameters)
    grads = [p.grad for p in parameters.values() if p.grad is not None]
    supervised = window.end_step()
    torch._foreach_mul_(grads, (1 / supervised).to(grads[0].device, torch.float32))
    squares = torch.stack(torch._foreach_norm(grads)).square().sum()
    norm = built.place.sum(squares).sqrt()
    if max_norm:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def intervals(config: Config, steps_per_epoch: int) -> list[int]:
    """Optimizer steps between logs, evaluations and checkpoints."""
    every = config.train.logging_steps, config.eval.eval_steps, config.train.save_steps or config.eval.eval_steps
    return [steps_per_epoch if n == "epoch" else n for n in every]


def evaluate(
    config: Config, built: Built, tokenizer: Tokenizer, sets: EvalSets, tracker: Tracker, position: dict
) -> dict[str, float]:  # fmt: skip
    """Losses over the full labels of each set, token-weighted, answers to rows of the last set, and their metrics; all logged."""
    model, place, e = built.model.eval(), built.place, config.eval
    device = dist.default_device()
    figures: dict[str, float] = {}
    for name, (documents, which) in sets.items():
        which = which[np.argsort(documents.lengths[which], kind="stable")]
        sums = loss_sums(model, documents, my_micro_batches(which, e.batch_size, built), device, built.autocast)
        found = {f"eval/{name}/{key}": value for key, value in loss_and_ppl(dist.all_reduce_sum(sums)).items()}
        tracker.log(position | found)
        figures |= found
    if pairs := questions(config, sets):
        half = built.dtype if config.method == "full" and built.dtype != torch.float32 else None
        mine = range(dist.rank(), len(pairs), dist.world_size())  # each process answers its share
        answers = generate_ids(
            model, [pairs[i][0] for i in mine], tokenizer, e.max_new_tokens, e.temperature, e.top_p,
            stop_ids=tokenizer.stop_ids(), seed=config.seed, indices=mine, autocast=half, together=place.count > 1,
        )  # fmt: skip
        shares = dist.gather_objects([answer.text for answer in answers])
        texts = [shares[i % len(shares)][i // len(shares)] for i in range(len(pairs))]
        targets = [tokenizer.decode(target) for _, target in pairs]
        tracker.samples([
            position | {"prompt": tokenizer.decode(prompt), "target": target, "generated": text}
            for (prompt, _), target, text in zip(pairs, targets, texts, strict=True)
        ])  # fmt: skip
        if e.metrics:
            found = {f"eval/{list(sets)[-1]}/{key}": value for key, value in metrics.score(e.metrics, texts, targets).items()}
            tracker.log(position | found)
            figures |= found
    tracker.evaluated()
    place.rest(model)
    dist.barrier()
    model.train()
    return figures


def save_checkpoint(
    config: Config, built: Built, tokenizer: Tokenizer, state: TrainerState, optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter], ema: EMA, base: Path,
) -> str:  # fmt: skip
    """Write OUT/checkpoint-<step> or checkpoint-final, all processes together; returns its name."""
    out, name = Path(config.output_dir), "checkpoint-final" if state.finished else f"checkpoint-{state.step}"
    rounded = config.method == "full" and built.dtype != torch.float32  # what is saved of the fp32 masters
    tensors = training_tensors(optimizer, parameters, keep_masters=rounded, ema=ema)
    save(out / name, built.model, tokenizer, config, built.lora, state, tensors, base, built.dtype, built.place)
    if dist.rank() == 0:
        prune(out, config.train.save_total_limit, state.best.get("step"))
    dist.barrier()
    return name


if __name__ == "__main__":
    run_main(lambda: main(load_config(sys.argv[1:])))
