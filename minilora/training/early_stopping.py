"""Which evaluation was the best so far, and whether to stop because none has been better since."""

import math

from minilora.checkpoint.trainer_state import TrainerState
from minilora.config import TrainConfig
from minilora.evaluation.text import lower_is_better


def update_best(state: TrainerState, figures: dict[str, float], train: TrainConfig) -> bool:
    """Compare an evaluation with the best one so far and note the result in the state.

    The figure compared is `train.metric_for_best_model`, of the last evaluation set that has it.
    A figure that is missing or not a number counts as worse.

    Args:
        state: its `best` and `worse` are updated.
        figures: all figures of the evaluation, by their names in the log (eval/SET/FIGURE).
        train: names the figure; with early stopping alone it is the loss.

    Returns:
        Whether this evaluation is the best so far.
    """
    wanted = train.metric_for_best_model
    if not wanted and train.early_stopping_patience is not None:
        wanted = "loss"
    if not wanted:
        return False

    matching = [name for name in figures if name.endswith(f"/{wanted}")]
    metric = matching[-1] if matching else wanted
    value = figures.get(metric, math.nan)
    if metric in figures and state.best.get("metric") != metric:
        state.best = {}  # forget a best evaluation that was chosen by another figure

    if math.isnan(value):
        is_better = False
    elif not state.best:
        is_better = True
    elif lower_is_better(metric):
        is_better = value < state.best["value"]
    else:
        is_better = value > state.best["value"]

    if is_better:
        state.best = {"step": state.step, "metric": metric, "value": value}
        state.worse = 0
    else:
        state.worse += 1
    return is_better


def out_of_patience(state: TrainerState, train: TrainConfig) -> bool:
    """Return whether `train.early_stopping_patience` evaluations in a row were no better."""
    patience = train.early_stopping_patience
    return patience is not None and state.worse >= patience


def describe_best(state: TrainerState) -> str:
    """Return the best checkpoint and its figure, to end a message with; empty if there is none."""
    if not state.best:
        return ""
    name = "final" if state.best["step"] == state.step else state.best["step"]
    return f"; best: checkpoint-{name}, {state.best['metric']} {state.best['value']:.4g}"
