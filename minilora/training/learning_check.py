"""A warning when a run trains, but learns nothing."""

import torch
from torch import Tensor, nn

from minilora import distributed
from minilora.build import LoadedModel
from minilora.checkpoint.trainer_state import TrainerState
from minilora.config import Config

WEIGHTS_COMPARED = 256
"""Of each parameter this many weights are remembered: a copy of all could be too large."""


class LearningCheck:
    """Warns once, with the likely cause, if gradients are 0 or the weights do not move.

    It looks at the numbers only when they are logged, so no step waits for it.
    """

    def __init__(
        self, config: Config, loaded: LoadedModel, parameters: dict[str, nn.Parameter]
    ) -> None:
        """Remember some weights of every parameter.

        Args:
            config: the run's settings.
            loaded: the model in training.
            parameters: the trained parameters by name; of a sharded model, this process's rows.
        """
        self.config = config
        self.loaded = loaded
        self.parameters = parameters
        self.start = self._some_weights()
        self.has_compared = False
        self.has_warned = False

    def check(self, row: dict, step_supervised: Tensor, state: TrainerState) -> None:
        """Look at a log entry, and warn if it shows that nothing is learnt.

        All processes call this together.

        Args:
            row: has "loss", "grad_norm" and "lr".
            step_supervised: the supervised tokens of the last step; read only if needed.
            state: where training stands.
        """
        if row["grad_norm"] == 0:
            cause = self._cause_of_no_gradient(row["loss"], float(step_supervised))
            self._warn(f"the gradient norm of step {state.step} is 0: {cause}")
        if self.has_compared or (row["lr"] == 0 and not state.finished):
            return
        # Once, as soon as the learning rate is above 0; at the end of the run in any case.
        self.has_compared = True
        is_unchanged = torch.equal(self._some_weights(), self.start)
        if distributed.all_agree(is_unchanged, distributed.default_device()):
            cause = self._cause_of_no_movement(row["lr"])
            self._warn(f"no trained weight has changed by step {state.step}: {cause}")

    def _some_weights(self) -> Tensor:
        """Return a copy of the first weights of every parameter, end to end, on the CPU."""
        heads = [p.detach().flatten()[:WEIGHTS_COMPARED] for p in self.parameters.values()]
        return torch.cat(heads).to("cpu", copy=True)

    def _cause_of_no_gradient(self, loss: float, step_supervised: float) -> str:
        """Return the likely cause of a gradient norm of 0."""
        lora = self.loaded.lora
        if lora is not None and lora.alpha == 0:
            return "lora.alpha is 0, so the adapters have no influence on the loss"
        if step_supervised == 0:
            return (
                "none of its tokens is supervised (--preview 3 shows which tokens are, and which "
                "labels are dropped)"
            )
        if loss == 0:
            return "the loss is 0, so there is nothing left to learn from these rows"
        return (
            "no trained weight has any influence on the loss. They may be frozen, or the gradients "
            f"too small for {self.loaded.dtype} (--model.dtype float32 shows whether they are)"
        )

    def _cause_of_no_movement(self, lr: float) -> str:
        """Return the likely cause of weights that stay as they are."""
        train = self.config.train
        if lr == 0:
            return (
                "the learning rate has been 0 so far, because the run ends in the first step of "
                "its warmup (train.warmup_steps, train.warmup_ratio)"
            )
        return (
            f"the gradients are 0, or train.learning_rate={train.learning_rate:g} is too small to "
            "change a weight in float32"
        )

    def _warn(self, message: str) -> None:
        """Print a warning, the first time."""
        if not self.has_warned:
            distributed.log(f"warning: {message}. The run goes on")
        self.has_warned = True
