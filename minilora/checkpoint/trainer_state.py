"""How far a run has come: the part of trainer_state.json beside the config."""

from dataclasses import dataclass, field


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
