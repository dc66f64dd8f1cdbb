"""Fine-tune a model: python train.py CONFIG.py [--section.field value ...], or under torchrun.

`main` is the course of a run: it is set up, takes its steps, logs, evaluates and saves, and ends.
`train_step` is the training algorithm. The functions below these two are the setup and the end of a
run; everything else is imported from the package.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from minilora import distributed
from minilora.build import LoadedModel, autocast_to, build_for_training
from minilora.checkpoint.checkpointer import Checkpointer, demote_final, start_directory
from minilora.checkpoint.resume import find_checkpoint, rename_superseded
from minilora.checkpoint.trainer_state import TrainerState
from minilora.cli import check_compiler, check_device, load_config
from minilora.config import Config, TrainConfig
from minilora.data.dataset import EvalSet, dataset_fingerprint
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError
from minilora.exit_codes import run_script
from minilora.hub import resolve
from minilora.model.precision import precision_note
from minilora.planning.report import show_plan
from minilora.tracking.hub_upload import HubUploader
from minilora.tracking.preview import preview
from minilora.tracking.tracker import Tracker, check_trackers
from minilora.training.batches import Interval, TrainingBatches, step_seed
from minilora.training.datasets import TrainingData, load_data, make_tokenizer
from minilora.training.early_stopping import describe_best, out_of_patience, update_best
from minilora.training.ema import EMA
from minilora.training.evaluate import evaluate
from minilora.training.learning_check import LearningCheck
from minilora.training.metrics import StepMetrics
from minilora.training.optimizer import (
    finish_gradients,
    learning_rate_factor,
    make_optimizer,
    set_learning_rate,
    take_step,
    trainable_parameters,
)
from minilora.training.recomputation import AutoRecomputation
from minilora.training.signals import StopSignal
from minilora.training.throughput import Throughput

UPLOAD_SECONDS = 600
"""How long the end of a run waits for an upload that is under way."""
UPLOAD_SECONDS_WHEN_STOPPED = 15
"""The same, after a signal stopped the run."""


def main(config: Config) -> int:
    """Train as configured. Returns the exit code.

    Raises:
        UserError: the configuration or the data is wrong; the output directory is as it was.
        RunError: training cannot go on; what was saved before is intact.
    """
    inputs = read_inputs(config)
    if inputs is None:  # a plan or a preview was shown, or the run is finished already
        return 0
    run = set_up(config, inputs)
    state, batches = run.state, run.batches

    with StopSignal() as stop, run.tracker:
        if config.eval.eval_on_start and state.step == 0:
            evaluate_and_log(config, run, {"step": 0, "epoch": 0.0})

        metrics = StepMetrics(run.device)
        for step in range(state.step, batches.total_steps):
            train_step(config, run, metrics, step)
            run.recomputation.decide()  # after the first step
            state.step = step + 1
            state.finished = state.step == batches.total_steps
            run.tracker.step()
            stop.agree(state.step, run.device)

            # A run that has to stop early saves at once, because there may be little time left.
            is_stopped = stop.agreed and not state.finished
            should_log = batches.is_due(config.train.logging_steps, state.step)
            should_evaluate = batches.is_due(config.eval.eval_steps, state.step)
            should_evaluate = should_evaluate and not (is_stopped or config.eval.is_off)
            should_save = batches.is_due(save_steps(config), state.step) or is_stopped

            if should_log or should_evaluate or should_save:
                # Reading a number waits for the device. Until here the CPU only queued work, except
                # where `stop.agree` asks the other processes, so it waits in few steps. If the loss
                # or the gradient is not finite the run ends now, before any of it is saved.
                metrics.sync(state, run.out)
                position = {"step": state.step, "epoch": state.step / batches.steps_per_epoch}
                if should_log and not metrics.is_empty:
                    speed = run.throughput.figures(metrics.seconds)
                    row = metrics.row(state) | speed
                    run.tracker.log(position | row)
                    run.learning_check.check(row, metrics.step_supervised, state)

                # The average of the weights, if one is kept, is what is evaluated and saved.
                with run.ema.applied(should_evaluate or should_save):
                    if should_evaluate:
                        figures = evaluate_and_log(config, run, position)
                        is_best = update_best(state, figures, config.train)
                        state.finished = state.finished or out_of_patience(state, config.train)
                        should_save = should_save or is_best or state.finished
                    if should_save:
                        checkpoint_name = run.checkpointer.save(state, run.optimizer)
                        run.tracker.saved(position, checkpoint_name)
                metrics.restart_clock()

            if state.finished or is_stopped:
                break

    return conclude(config, run, stop.number)


def train_step(config: Config, run: "TrainingRun", metrics: StepMetrics, step: int) -> None:
    """Take one optimizer step: the losses of its micro-batches, their gradients, the update.

    Args:
        config: the configuration.
        run: the model, its optimizer and its data.
        metrics: counts the step's tokens, and keeps its loss, gradient norm and learning rate.
        step: the optimizer step, counted from 0.
    """
    train, model, layout = config.train, run.loaded.model, run.loaded.layout

    # Dropout draws from this seed. It is a function of seed, step and rank alone, so a resumed run
    # draws what an uninterrupted one does.
    torch.manual_seed(step_seed(config.seed, step))

    for micro_batch in run.batches.of_step(step, layout.shard_count, run.device):
        # A sharded model sums its gradients over processes in the step's last micro-batch. Full
        # training does so in each one: until then every process would have to keep gradients of
        # the whole model, for which there is no memory.
        sync_gradients = micro_batch.is_last or config.method == "full"
        layout.set_gradient_sync(model, sync_gradients)

        # The loss is a sum over tokens, not a mean. Micro-batches and processes differ in how many
        # tokens they supervise: a mean of their means would weigh tokens differently.
        # `finish_gradients` divides once by the count over all of them.
        with autocast_to(run.loaded.autocast, run.device):
            loss = model(micro_batch.tokens, micro_batch.lengths, labels=micro_batch.labels)
        loss.backward()
        metrics.add(loss.detach(), micro_batch.num_supervised, micro_batch.num_tokens)
        run.throughput.add(micro_batch)

    supervised_tokens = metrics.end_step()
    metrics.grad_norm = finish_gradients(
        run.loaded, run.parameters, supervised_tokens, train.max_grad_norm
    )

    factor = learning_rate_factor(step, run.batches.total_steps, train)
    metrics.lr = train.learning_rate * factor
    set_learning_rate(run.optimizer, metrics.lr)
    overflowed = take_step(run.optimizer, metrics.grad_norm, run.loaded.dtype)
    if overflowed is not None:
        metrics.leave_out_if(overflowed)
    run.optimizer.zero_grad(set_to_none=True)
    run.ema.update(step)


def save_steps(config: Config) -> Interval:
    """Return how often checkpoints are saved: as often as evaluations, unless that is set."""
    if config.train.save_steps is None:
        return config.eval.eval_steps
    return config.train.save_steps


@dataclass
class Inputs:
    """What a run starts from, read and checked."""

    base: Path
    """The directory of the base model."""
    tokenizer: Tokenizer
    data: TrainingData
    batches: TrainingBatches
    checkpoint: Path | None
    """The checkpoint to continue from, if there is one."""
    state: TrainerState
    """Where training stands: at the checkpoint, or at the beginning."""
    uploader: HubUploader | None
    """What uploads checkpoints to the hub, on the first process and if that is configured."""


@dataclass
class TrainingRun:
    """The objects that the training loop uses."""

    out: Path
    """The output directory."""
    device: torch.device
    batches: TrainingBatches
    eval_sets: list[EvalSet]
    """Empty if the run is never evaluated."""
    tokenizer: Tokenizer
    loaded: LoadedModel
    parameters: dict[str, nn.Parameter]
    """The trained parameters by name; of a sharded model, this process's rows."""
    optimizer: torch.optim.Optimizer
    ema: EMA
    recomputation: AutoRecomputation
    """Chooses which blocks are recomputed, if that is left to it."""
    state: TrainerState
    """Where training stands; the loop changes it."""
    checkpointer: Checkpointer
    tracker: Tracker
    learning_check: LearningCheck
    """Warns if nothing is learnt."""
    throughput: Throughput
    """Counts operations, for the share of the machine's peak."""


def read_inputs(config: Config) -> Inputs | None:
    """Read and check everything that a run starts from, before a model is built.

    Nothing is written to the output directory, except preview.jsonl if a preview is asked for.

    Returns:
        None if there is nothing to train: a plan or a preview was asked for, and shown, or the
        checkpoint in the output directory is the end of this run.

    Raises:
        UserError: something is wrong with the configuration or with what it names.
    """
    if config.plan:
        show_plan(config)
        return None
    out = Path(config.output_dir)
    check_device(config)
    check_compiler(config)
    base = resolve(config.model.name, config.model.revision, "model.revision")
    tokenizer = make_tokenizer(config, base)
    data = load_data(config, tokenizer, base)
    if config.preview:
        preview(data.documents, tokenizer, config.preview, config.seed, out)
        return None

    batches = TrainingBatches(data, config)
    fingerprint = dataset_fingerprint(data.documents, data.train_indices)
    checkpoint, state = find_checkpoint(config, out, fingerprint, batches.docs_per_step)
    if checkpoint and is_already_finished(checkpoint, state, batches.total_steps, config.train):
        return None

    uploader = check_trackers(config)
    return Inputs(base, tokenizer, data, batches, checkpoint, state, uploader)


def is_already_finished(
    checkpoint: Path, state: TrainerState, total_steps: int, train: TrainConfig
) -> bool:
    """Return whether the run ends where its checkpoint is, and say so.

    Raises:
        UserError: the run would end at or before its checkpoint, which was not its end then.
    """
    if state.step >= total_steps and not state.finished:
        raise UserError(
            f"{checkpoint} is already past the {total_steps} steps asked for: "
            "raise train.max_steps or train.epochs"
        )
    if state.step >= total_steps:
        reason = "all of them"
    elif state.finished and out_of_patience(state, train):
        reason = "stopped early"
    else:
        return False
    distributed.log(
        f"{checkpoint} is finished, {state.step} steps, {reason}: nothing to do "
        "(another output_dir starts a new run)"
    )
    return True


def set_up(config: Config, inputs: Inputs) -> TrainingRun:
    """Build the model and all that trains it, as of the checkpoint if there is one."""
    device = distributed.default_device()
    distributed.init_process_group(device)
    torch.use_deterministic_algorithms(config.deterministic)

    checkpoint, tokenizer = inputs.checkpoint, inputs.tokenizer
    vocab_size = tokenizer.vocab_size if config.data.add_tokens else 0
    loaded = build_for_training(config, inputs.base, device, checkpoint, vocab_size)
    loaded.model.train()
    parameters = trainable_parameters(loaded)
    log_model(config, loaded, device)

    ema = EMA(parameters, config.train.ema_decay)
    optimizer = make_optimizer(parameters, config.train)
    checkpointer = Checkpointer(config, loaded, parameters, tokenizer, inputs.base, ema.shadow)
    if checkpoint:
        checkpointer.resume(checkpoint, optimizer)

    # Only now is the output directory written to: whatever is wrong with the input has been found.
    out = Path(config.output_dir)
    state = inputs.state
    start_directory(out, config)
    log_start(inputs, out)
    demote_final(checkpoint, out, state.step)
    rename_superseded(out, state.step)
    return TrainingRun(
        out=out,
        device=device,
        batches=inputs.batches,
        eval_sets=inputs.data.eval_sets,
        tokenizer=tokenizer,
        loaded=loaded,
        parameters=parameters,
        optimizer=optimizer,
        ema=ema,
        recomputation=AutoRecomputation(loaded.model, config.train, inputs.batches, device),
        state=state,
        checkpointer=checkpointer,
        tracker=open_tracker(config, inputs),
        learning_check=LearningCheck(config, loaded, parameters),
        throughput=Throughput(loaded, device),
    )


def open_tracker(config: Config, inputs: Inputs) -> Tracker:
    """Open what records the run; the report shows the counts of all documents of the run."""
    data = inputs.data
    documents = [data.documents]
    for eval_set in data.eval_sets:
        if eval_set.documents is not data.documents:  # in_domain is drawn from the training files
            documents.append(eval_set.documents)
    return Tracker(
        config,
        inputs.state.step,
        inputs.batches.total_steps,
        documents,
        inputs.tokenizer,
        inputs.uploader,
        inputs.state.first_eval_step,
    )


def log_model(config: Config, loaded: LoadedModel, device: torch.device) -> None:
    """Print the model's size and where it is trained."""
    trained = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    message = (
        f"{config.model.name}: {loaded.num_parameters:,} parameters and {trained:,} trained, "
        f"{loaded.dtype} on {device}"
    )
    if distributed.world_size() > 1:
        message += f" x {distributed.world_size()} processes"
    if loaded.layout.shard_count > 1:
        message += ", sharded"
    distributed.log(message)
    trains_all = config.method == "full"
    note = precision_note(loaded.dtype, loaded.weight_dtype, device, trains_all)
    if note:
        distributed.log(note)


def log_start(inputs: Inputs, out: Path) -> None:
    """Print how long the run is and where it begins."""
    documents, steps = len(inputs.data.train_indices), inputs.batches.total_steps
    message = f"{documents:,} documents, {steps:,} steps -> {out}"
    if inputs.checkpoint:
        message += f", resumed from {inputs.checkpoint} at step {inputs.state.step}"
    distributed.log(message)


def evaluate_and_log(config: Config, run: TrainingRun, position: dict) -> dict[str, float]:
    """Evaluate the model as it is now and log what comes out. Returns all figures by name.

    Args:
        config: the configuration.
        run: has the model, the evaluation sets and the tracker.
        position: {"step": ..., "epoch": ...} of the log entries.
    """
    evaluation = evaluate(config, run.loaded, run.tokenizer, run.eval_sets)
    run.tracker.log_evaluation(position, evaluation)
    return evaluation.figures


def conclude(config: Config, run: TrainingRun, signal: int) -> int:
    """End a run and say how it ended. Returns the exit code.

    Args:
        config: the configuration.
        run: its tracker is closed here; leaving its `with` block does so only after an error.
        signal: the number of the signal that stopped the run, 0 if none did.
    """
    state, out = run.state, run.out
    upload_seconds = UPLOAD_SECONDS if state.finished else UPLOAD_SECONDS_WHEN_STOPPED
    run.tracker.close(upload_seconds)
    distributed.destroy_process_group()
    if not state.finished:
        how = "the same command continues"
        if config.train.resume == "never":
            how = "continue it with --train.resume auto"
        distributed.log(f"stopped by signal {signal} after step {state.step}, saved; {how}")
        return 128 + signal  # what a shell reports for a process that a signal has ended
    distributed.log(
        f"done: {out / 'checkpoint-final'}; a report in {out / 'report.html'}{describe_best(state)}"
    )
    return 0


def run() -> NoReturn:
    """Run the command: `python train.py`, and `minilora-train` of an installed package."""
    run_script(lambda: main(load_config(sys.argv[1:])))


if __name__ == "__main__":
    run()
