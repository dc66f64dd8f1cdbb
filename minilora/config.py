"""The run's configuration: dataclasses, config files, command-line flags and their validation.

A config file defines `config = Config(...)` with only what differs from the defaults; flags are laid over it.
"""

import dataclasses
import difflib
import runpy
import sys
import traceback
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import typeguard
import tyro


class UserError(Exception):
    """The user's input is wrong. The scripts print its text without a traceback and exit with code 2."""


class RunError(Exception):
    """A run cannot go on, through no error of its input. Printed without a traceback, exit code 1."""


@dataclass(slots=True)
class ModelConfig:
    name: str = "mistralai/Mistral-7B-Instruct-v0.2"
    """Hub id, or a directory in Hugging Face layout (config.json, *.safetensors, tokenizer files)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute dtype. auto: what the checkpoint was saved in (bfloat16 in place of float16 where the device has it)."""
    bits: Literal[16, 8, 4] = 16
    """Width of the frozen base weights: 16 (as saved), 8 (LLM.int8) or 4 (NF4)."""
    double_quant: bool = True
    """With bits=4: quantise the quantisation constants too."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: only config.json and a tokenizer are needed, weights are drawn from the seed."""


@dataclass(slots=True)
class LoraConfig:
    rank: int = 32
    """Rank R of the update B @ A (LoRA, arXiv 2106.09685)."""
    alpha: float = 16
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with rslora)."""
    dropout: float = 0.0
    """Dropout on the adapter's input, in training only."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers that get an adapter, by name or dotted suffix. Each must match something."""
    rslora: bool = False
    """Rank-stabilised scaling, alpha / sqrt(rank) (arXiv 2312.03732)."""
    init_from: str | None = None
    """Start from this PEFT adapter (directory or hub id); its rank, alpha and targets replace the ones here."""


@dataclass(slots=True)
class DataConfig:
    train_file: str = ""
    """JSONL to train on, one object a line."""
    eval_file: str | None = None
    """JSONL for the out-of-domain evaluation (in-domain is drawn from train_file)."""
    train_size: int | None = None
    """Train on this many rows, drawn with the seed (default: all)."""
    eval_size: int = 1024
    """Rows of each evaluation set, drawn with the seed."""
    format: Literal["paths", "prompt", "messages", "text"] = "paths"
    """What a row holds. paths: title, abstract, paths. prompt: columns for the two templates below. messages: chat turns
    (role, content, optional train). text: text, supervised after response_marker, or everywhere without one."""
    prompt_template: str = "{prompt}"
    """format=prompt: the prompt, a str.format template over the row's columns."""
    response_template: str = "{completion}"
    """format=prompt: the response, a str.format template over the row's columns."""
    response_marker: str | None = None
    """format=text: only what follows the last occurrence of this string is supervised."""
    chat: bool = True
    """Wrap prompt and response in a chat template (formats paths and prompt)."""
    chat_template: str | None = None
    """"mistral" (the built-in [INST] form) or a jinja file; default: the model's own, else the built-in form."""
    edge_dropping: bool = True
    """format=paths: drop labels of over-frequent edges while training (OLLM, arXiv 2410.23584)."""
    max_seq_length: int = 2048
    """Longest document in tokens; see too_long."""
    too_long: Literal["drop", "truncate", "error"] = "drop"
    """A longer document is dropped, has its prompt shortened (its response never), or stops the run."""
    shuffle: bool = True
    """A new order each epoch, a function of (seed, epoch) alone."""
    strict: bool = False
    """Stop on the first row that would be dropped instead of counting it."""
    num_workers: int = 4
    """Processes that tokenise; the result does not depend on it."""


@dataclass(slots=True)
class TrainConfig:
    epochs: float = 2.0
    """Passes over the training rows."""
    max_steps: int | None = None
    """Stop after this many optimizer steps instead."""
    batch_size: int = 16
    """Documents per device and micro-step."""
    grad_acc_steps: int = 1
    """Micro-steps per optimizer step."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    lr_scheduler: Literal["constant_with_warmup", "constant", "cosine", "linear"] = "constant_with_warmup"
    """Shape after warmup, as transformers defines it ("constant" has no warmup)."""
    warmup_steps: int = 100
    """Optimizer steps of linear warmup from 0."""
    warmup_ratio: float | None = None
    """Warmup as a share of all steps; replaces warmup_steps."""
    min_lr_ratio: float = 0.0
    """cosine and linear end at this share of learning_rate."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay, on matrices only (not on norms and biases)."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this; 0 turns clipping off."""
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = "adamw"
    """The 8-bit and paged forms come from bitsandbytes."""
    group_by_length: bool = True
    """Put documents of similar length into one step: steadier memory and step time."""
    gradient_checkpointing: bool = True
    """Recompute each block in the backward pass instead of keeping its activations."""
    compile: bool = False
    """torch.compile each block."""
    logging_steps: int = 50
    """Log a line of metrics every so many optimizer steps."""
    save_steps: int | None = None
    """Save a checkpoint every so many optimizer steps (default: eval.eval_steps)."""
    save_total_limit: int | None = None
    """Keep only the newest so many step checkpoints (default: all)."""
    resume: str = "auto"
    """auto: continue from the newest complete checkpoint in output_dir; never; or a checkpoint directory."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations without improvement."""


@dataclass(slots=True)
class EvalConfig:
    eval_steps: int = 500
    """Evaluate every so many optimizer steps, and once at the end."""
    batch_size: int = 32
    """Documents per device in an evaluation batch."""
    num_generate_samples: int = 5
    """Answers generated at each evaluation, written to samples.jsonl with prompt and target."""
    temperature: float = 0.1
    """Sampling temperature of those answers; 0 is greedy."""
    top_p: float = 0.9
    """Nucleus sampling: keep the smallest set of tokens with this much probability."""
    max_new_tokens: int = 1024
    """Longest answer in tokens."""
    metrics: tuple[str, ...] = ()
    """Metrics of the generated answers."""


@dataclass(slots=True)
class ParallelConfig:
    strategy: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """How several processes share the work; with one process it changes nothing."""
    shard_size: int | None = None
    """hsdp: ranks per sharding group."""
    cpu_offload: bool = False
    """fsdp: keep parameters and optimizer states in host memory."""


@dataclass(slots=True)
class LogConfig:
    tensorboard: bool = True
    """Write TensorBoard events to OUT/runs (when tensorboard is installed)."""
    wandb: bool = False
    """Log to Weights & Biases."""
    wandb_project: str = "minilora"
    """W&B project."""
    wandb_notes: str | None = None
    """W&B notes."""


@dataclass(slots=True)
class HubConfig:
    push: bool = False
    """Upload each checkpoint to the hub."""
    repo_id: str | None = None
    """Repository to push to."""
    private: bool = True
    """Create it private."""


@dataclass(slots=True)
class Config:
    output_dir: str = "out"
    """Everything a run writes goes here."""
    seed: int = 0
    """Order, label draws, dropout and initialisation are functions of it."""
    deterministic: bool = False
    """Use only deterministic kernels (slower on CUDA)."""
    method: Literal["lora", "full"] = "lora"
    """lora: train adapters over a frozen base. full: train every weight."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    log: LogConfig = field(default_factory=LogConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    preview: int = 0
    """Show the first N tokenised examples with their masks, write preview.jsonl, and stop."""
    plan: bool = False
    """Estimate memory and time, and stop."""


# what the contract names and this version cannot do yet, with the values it can: refused, never ignored
NOT_YET: dict[str, tuple] = {
    "model.bits": (16,), "train.optimizer": ("adamw",), "train.early_stopping_patience": (None,), "eval.metrics": ((),),
    "parallel.strategy": ("auto", "ddp"), "parallel.cpu_offload": (False,), "parallel.shard_size": (None,),
    "train.compile": (False,), "hub.push": (False,), "plan": (False,),
}  # fmt: skip


def leaves(config: object, prefix: str = "") -> dict[str, object]:
    """`{"section.field": value}` for every field, in order."""
    flat: dict[str, object] = {}
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        flat.update(leaves(value, f"{prefix}{f.name}.") if dataclasses.is_dataclass(value) else {prefix + f.name: value})
    return flat


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """`; did you mean X?` for the closest known name, or an empty string."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def load_config_file(path: str) -> Config:
    """Import CONFIG.py and return its `config`. Raises UserError with file:line for whatever goes wrong in it."""
    if not Path(path).is_file():
        raise UserError(f"config file {path!r} does not exist; usage: train.py CONFIG.py [--section.field value ...]")
    try:
        config = runpy.run_path(path).get("config")
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith(Path(path).name)]
        line = frames[-1].lineno if frames else getattr(error, "lineno", "?")
        known = [name.split(".")[-1] for name in leaves(Config())] + [f.name for f in dataclasses.fields(Config)]
        words = str(error).split("'")  # "... unexpected keyword argument 'x'" / "... object has no attribute 'x'"
        hint = nearest(words[-2], known) if isinstance(error, TypeError | AttributeError) and len(words) > 2 else ""
        raise UserError(f"{path}:{line}: {type(error).__name__}: {error}{hint}") from error
    if not isinstance(config, Config):
        raise UserError(f"{path}: must define `config = Config(...)` from minilora.config, found {type(config).__name__}")
    check_types(config, path)
    return config


def check_types(config: object, where: str, prefix: str = "") -> None:
    """Hold every field of a config to its annotation (an int is accepted for a float, a list for a tuple)."""
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        if isinstance(value, list):
            value = tuple(value)
            setattr(config, f.name, value)
        try:
            typeguard.check_type(value, hints[f.name], collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
        except typeguard.TypeCheckError as error:
            raise UserError(f"{where}: {prefix}{f.name} = {value!r}: {error}") from error
        if isinstance(value, bool) and bool not in (hints[f.name], *typing.get_args(hints[f.name])):
            raise UserError(f"{where}: {prefix}{f.name} = {value!r}: a number is wanted, not a boolean")
        if dataclasses.is_dataclass(value):
            check_types(value, where, f"{prefix}{f.name}.")


def load_config(argv: list[str]) -> Config:
    """`CONFIG.py [--section.field value ...]` -> a validated Config. `--help` alone shows every flag.

    Raises UserError (bad file, contradictory values); tyro itself exits with code 2 on an unknown or ill-typed flag.
    """
    base = Config()
    if argv and not argv[0].startswith("-"):
        base, argv = load_config_file(argv[0]), argv[1:]
    elif not any(arg in ("-h", "--help") for arg in argv):
        raise UserError("no config file given; usage: train.py CONFIG.py [--section.field value ...]")
    booleans = {name for name, value in leaves(base).items() if isinstance(value, bool)}
    spelled: list[str] = []
    for i, arg in enumerate(argv):  # `--plan` alone means `--plan True`
        spelled.append(arg)
        if arg.lstrip("-").replace("-", "_") in booleans and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
            spelled.append("True")
    about = "Fine-tune the model that CONFIG.py describes. Flags replace single values of it."
    off = (tyro.conf.FlagConversionOff,)
    config = tyro.cli(
        Config, prog="train.py CONFIG.py", description=about, default=base, args=spelled, use_underscores=True, config=off
    )
    validate(config)
    return config


def validate(config: Config) -> None:
    """Refuse values that are out of range or contradict each other, naming the fields. Raises UserError."""
    m, d, t, e = config.model, config.data, config.train, config.eval
    problems = [
        (not d.train_file, "data.train_file is not set: give a JSONL file"),
        (config.lora.rank < 1, "lora.rank must be at least 1"),
        (not 0 <= config.lora.dropout < 1, "lora.dropout must be in [0, 1)"),
        (not config.lora.target_modules, "lora.target_modules is empty: nothing would be trained"),
        (config.method == "full" and m.bits != 16, "method='full' trains the weights themselves: model.bits must be 16"),
        (config.method == "full" and config.lora.init_from, "method='full' has no adapter: lora.init_from must be None"),
        (m.init == "random" and config.method == "lora", "model.init='random' needs method='full': a random base stays random"),
        (not 0 < t.epochs < float("inf"), "train.epochs must be positive and finite"),
        (t.max_steps is not None and t.max_steps < 1, "train.max_steps must be at least 1"),
        (min(t.batch_size, t.grad_acc_steps, e.batch_size) < 1, "batch sizes and grad_acc_steps must be at least 1"),
        (not 0 < t.learning_rate < float('inf'), "train.learning_rate must be positive"),
        (t.warmup_steps < 0, "train.warmup_steps must not be negative"),
        (t.warmup_ratio is not None and not 0 <= t.warmup_ratio <= 1, "train.warmup_ratio must be in [0, 1]"),
        (not 0 <= t.min_lr_ratio <= 1, "train.min_lr_ratio must be in [0, 1]"),
        (t.min_lr_ratio > 0 and t.lr_scheduler.startswith("constant"), "train.min_lr_ratio needs lr_scheduler cosine or linear"),
        (not 0 <= t.weight_decay < float("inf"), "train.weight_decay must not be negative"),
        (not t.max_grad_norm >= 0, "train.max_grad_norm must not be negative (0 turns clipping off)"),
        (min(t.logging_steps, e.eval_steps) < 1, "train.logging_steps and eval.eval_steps must be at least 1"),
        (t.save_steps is not None and t.save_steps < 1, "train.save_steps must be at least 1"),
        (t.save_total_limit is not None and t.save_total_limit < 1, "train.save_total_limit must be at least 1"),
        (d.max_seq_length < 2, "data.max_seq_length must be at least 2"),
        (d.train_size is not None and d.train_size < 1, "data.train_size must be at least 1"),
        (min(d.eval_size, d.num_workers) < 1, "data.eval_size and data.num_workers must be at least 1"),
        (d.response_marker is not None and d.format != "text", "data.response_marker needs data.format='text'"),
        (d.response_marker == "", "data.response_marker is empty; leave it out to supervise everything"),
        (e.temperature < 0, "eval.temperature must not be negative (0 is greedy)"),
        (not 0 < e.top_p <= 1, "eval.top_p must be in (0, 1]"),
        (e.num_generate_samples < 0 or e.max_new_tokens < 1, "eval.num_generate_samples / max_new_tokens are out of range"),
        (min(config.preview, config.seed) < 0, "preview and seed must not be negative"),
    ]  # fmt: skip
    for wrong, message in problems:
        if wrong:
            raise UserError(message)
    for name, value in leaves(config).items():
        if value not in NOT_YET.get(name, (value,)):
            raise UserError(f"{name} = {value!r} is not supported yet: use {NOT_YET[name][0]!r}")


def run_main(main: typing.Callable[[], int | None]) -> typing.NoReturn:
    """Run a script's main and exit: a UserError is one message and code 2, anything else a traceback and code 1."""
    try:
        sys.exit(main() or 0)
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
