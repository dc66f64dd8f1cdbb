"""trainer_state.json: how far a run has come, with the run's whole config."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from minilora.config import Config
from minilora.files import write_json

TRAINER_STATE_FILE = "trainer_state.json"


@dataclass
class TrainerState:
    """Counts and results up to an optimizer step. The fields are keys of trainer_state.json."""

    step: int = 0
    """Optimizer steps that are done."""
    tokens: int = 0
    """Tokens of the documents trained on so far."""
    supervised_tokens: int = 0
    """Those of them that the loss was computed on."""
    finished: bool = False
    """Whether this is the end of the run."""
    data: str = ""
    """Fingerprint of the tokenized training rows."""
    docs_per_step: int = 0
    """Documents in an optimizer step, over all processes."""
    best: dict = field(default_factory=dict)
    """The best evaluation so far: its step, the name of the metric, and its value."""
    worse: int = 0
    """Evaluations since the best one."""
    first_eval_step: int = 0
    """Evaluations before this step were made on other evaluation sets."""


def write_trainer_state(directory: Path, state: TrainerState, config: Config) -> None:
    """Write trainer_state.json: the state's fields, and the config under "config"."""
    content = {**dataclasses.asdict(state), "config": dataclasses.asdict(config)}
    write_json(directory / TRAINER_STATE_FILE, content)
