"""Config files and command-line flags -> a checked Config; and how a script ends.

A config file defines `config = Config(...)` with only what differs from the defaults; flags are laid over it.
"""

import dataclasses
import os
import re
import runpy
import sys
import traceback
import typing
from pathlib import Path

import torch
import typeguard
import tyro

from minilora import dist
from minilora.config import Config, DataConfig, RunError, UserError, nearest
from minilora.evaluation import metrics

LOST = re.compile("gloo|nccl|Connection|DistBackend|DistNetwork|DistStore|CheckpointException|[Tt]imed out", re.IGNORECASE)

# what the contract names and this version cannot do yet, with the values it can: refused, never ignored
NOT_YET: dict[str, tuple] = {
    "train.compile": (False,), "plan": (False,),
}  # fmt: skip
COUNTS = (
    "lora.rank train.max_steps train.batch_size train.grad_acc_steps train.logging_steps train.save_steps train.save_total_limit "
    "train.early_stopping_patience eval.batch_size eval.eval_steps eval.max_new_tokens data.train_size data.eval_size "
    "data.num_workers parallel.shard_size"
).split()  # settings that must be at least 1, where they are numbers


def _fields(config: object) -> list[tuple[str, object]]:
    return [(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)]  # type: ignore[arg-type]


def leaves(config: object, prefix: str = "") -> dict[str, object]:
    """`{"section.field": value}` for every field of a config, or of one as a dict, in order."""
    flat: dict[str, object] = {}
    for name, value in config.items() if isinstance(config, dict) else _fields(config):
        nested = isinstance(value, dict) or dataclasses.is_dataclass(value)
        flat.update(leaves(value, f"{prefix}{name}.") if nested else {prefix + name: value})
    return flat


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
    for name, value in _fields(config):
        if isinstance(value, list):
            value = tuple(value)
            setattr(config, name, value)
        try:
            typeguard.check_type(value, hints[name], collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
        except typeguard.TypeCheckError as error:
            raise UserError(f"{where}: {prefix}{name} = {value!r}: {error}") from error
        if isinstance(value, bool) and bool not in (hints[name], *typing.get_args(hints[name])):
            raise UserError(f"{where}: {prefix}{name} = {value!r}: a number is wanted, not a boolean")
        if dataclasses.is_dataclass(value):
            check_types(value, where, f"{prefix}{name}.")


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


def train_files(data: DataConfig) -> tuple[str, ...]:
    return (data.train_file,) if isinstance(data.train_file, str) else data.train_file


def validate(config: Config) -> None:
    """Refuse values that are out of range or contradict each other, naming the fields. Raises UserError."""
    m, d, t, e = config.model, config.data, config.train, config.eval
    low = [name for name, value in leaves(config).items() if name in COUNTS and isinstance(value, int) and value < 1]
    problems = [
        (not train_files(d) or "" in train_files(d), "data.train_file is not set: give a data file"),
        (len({*train_files(d)}) < len(train_files(d)), "data.train_file names a file twice: data.train_weights says how often"),
        (d.train_weights and len(d.train_weights) != len(train_files(d)), "data.train_weights needs one weight a file"),
        (not all(0 < w < float("inf") for w in d.train_weights), "data.train_weights must be positive"),
        (d.add_tokens and config.method == "lora" and not config.lora.train_embeddings,
         "data.add_tokens needs lora.train_embeddings=True (or method='full'): the new tokens' rows are to be learnt"),
        (d.format == "messages" and not d.chat, "data.chat=False: format messages is a chat template's turns"),
        (d.format != "prompt" and (d.prompt_template, d.response_template) != ("{prompt}", "{completion}"),
         "data.prompt_template and data.response_template need data.format='prompt'"),
        (any(not token.strip() for token in d.add_tokens), "data.add_tokens holds an empty token"),
        (len({*d.add_tokens}) < len(d.add_tokens), "data.add_tokens names a token twice"),
        (t.ema_decay is not None and not 0 <= t.ema_decay < 1, "train.ema_decay must be in [0, 1)"),
        (low, f"{', '.join(low)} must be at least 1"),
        (not config.output_dir, "output_dir is empty"),
        (config.method == "full" and config.lora.train_embeddings, "lora.train_embeddings: method='full' trains all"),
        (not 0 <= config.lora.dropout < 1, "lora.dropout must be in [0, 1)"),
        (not config.lora.target_modules, "lora.target_modules is empty: nothing would be trained"),
        (config.method == "full" and m.bits != 16, "method='full' trains the weights themselves: model.bits must be 16"),
        (config.method == "full" and config.lora.init_from, "method='full' has no adapter: lora.init_from must be None"),
        (m.init == "random" and config.method == "lora", "model.init='random' needs method='full': a random base stays random"),
        (not 0 < t.epochs < float("inf"), "train.epochs must be positive and finite"),
        (not 0 < t.learning_rate < float('inf'), "train.learning_rate must be positive"),
        (t.warmup_steps < 0, "train.warmup_steps must not be negative"),
        (t.warmup_ratio is not None and not 0 <= t.warmup_ratio <= 1, "train.warmup_ratio must be in [0, 1]"),
        (not 0 <= t.min_lr_ratio <= 1, "train.min_lr_ratio must be in [0, 1]"),
        (t.min_lr_ratio > 0 and t.lr_scheduler.startswith("constant"), "train.min_lr_ratio needs lr_scheduler cosine or linear"),
        (not 0 <= t.weight_decay < float("inf"), "train.weight_decay must not be negative"),
        (config.parallel.cpu_offload and config.parallel.strategy not in ("fsdp", "hsdp"),
         "parallel.cpu_offload needs parallel.strategy fsdp or hsdp"),
        ((config.parallel.shard_size is not None) != (config.parallel.strategy == "hsdp"),
         "parallel.shard_size goes with parallel.strategy='hsdp', which needs it"),
        (not t.max_grad_norm >= 0, "train.max_grad_norm must not be negative (0 turns clipping off)"),
        (d.max_seq_length < 2, "data.max_seq_length must be at least 2"),
        (d.response_marker is not None and d.format != "text", "data.response_marker needs data.format='text'"),
        (d.response_marker == "", "data.response_marker is empty; leave it out to supervise everything"),
        (e.temperature < 0, "eval.temperature must not be negative (0 is greedy)"),
        (not 0 < e.top_p <= 1, "eval.top_p must be in (0, 1]"),
        (e.num_generate_samples < 0, "eval.num_generate_samples must not be negative"),
        (set(e.metrics) - {"loss", "ppl"} and not e.num_generate_samples, "eval.metrics needs eval.num_generate_samples"),
        (config.hub.push and not config.hub.repo_id, "hub.push needs hub.repo_id: the repository to push to (owner/name)"),
        (min(config.preview, config.seed) < 0, "preview and seed must not be negative"),
    ]  # fmt: skip
    for wrong, message in problems:
        if wrong:
            raise UserError(message)
    metrics.check(e.metrics, "eval.metrics")
    if (best := t.metric_for_best_model) and not best.rpartition("domain/")[2].startswith(("loss", "ppl", *e.metrics)):
        raise UserError(f"train.metric_for_best_model: {best!r} is neither loss, ppl nor a figure of eval.metrics {e.metrics}")
    for name, value in leaves(config).items():
        if value not in NOT_YET.get(name, (value,)):
            raise UserError(f"{name} = {value!r} is not supported yet: use {NOT_YET[name][0]!r}")


def check_device(config: Config) -> None:
    """Refuse what needs a GPU where there is none, before anything is read; a preview needs none. Raises UserError."""
    if config.preview or torch.cuda.is_available():
        return
    if (name := config.train.optimizer).startswith("paged"):
        raise UserError(
            f"train.optimizer={name!r} pages its states out of GPU memory, and there is no GPU here: "
            f"use {name.removeprefix('paged_')!r}"
        )
    if config.parallel.cpu_offload:
        raise UserError("parallel.cpu_offload moves parameters out of GPU memory, and there is no GPU here: leave it out")


def run_main(main: typing.Callable[[], int | None]) -> typing.NoReturn:
    """Run a script's main and exit: a UserError is one message and code 2, anything else a traceback and code 1."""
    try:
        sys.exit(main() or 0)
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except RuntimeError as error:
        if dist.world_size() == 1 or not LOST.search(f"{type(error).__name__} {error}"):
            raise
        first = str(error).splitlines()[0]
        print(
            f"error: process {dist.rank()} of {dist.world_size()} lost touch with another one, which failed, was killed or hangs "
            f"({first[:200]}). Checkpoints are as they were: the same command continues from the newest",
            file=sys.stderr,
        )
        os._exit(1)  # at once: taking the process group down would wait for the lost one
