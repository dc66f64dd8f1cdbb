"""From a config file and command-line flags to a checked `Config`; and a script's exit code.

A config file defines `config = Config(...)` with what differs from the defaults. Flags replace
single values of it. Every mistake is reported before the run writes anything.
"""

import dataclasses
import os
import re
import runpy
import sys
import traceback
import typing
from collections.abc import Callable
from pathlib import Path

import torch
import typeguard
import tyro

from minilora import distributed
from minilora.config import Config, DataConfig, config_fields, flatten_config
from minilora.errors import RunError, UserError, did_you_mean
from minilora.evaluation.text import check_metrics

USAGE = "usage: train.py CONFIG.py [--section.field value ...]"

# settings that must be at least 1; some may also be None or "epoch"
AT_LEAST_ONE = (
    "lora.rank",
    "train.max_steps",
    "train.batch_size",
    "train.grad_acc_steps",
    "train.logging_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.early_stopping_patience",
    "eval.batch_size",
    "eval.eval_steps",
    "eval.max_new_tokens",
    "data.train_size",
    "data.eval_size",
    "data.num_workers",
    "parallel.shard_size",
)

# words in the type or message of the errors that torch.distributed raises when another process has
# ended or does not answer
LOST_PROCESS = re.compile(
    "gloo|nccl|Connection|DistBackend|DistNetwork|DistStore|CheckpointException|timed out",
    re.IGNORECASE,
)


def load_config(argv: list[str]) -> Config:
    """Return the checked config that `CONFIG.py [--section.field value ...]` describes.

    `--help` alone shows every flag.

    Raises:
        UserError: the file is bad, or values contradict each other.
        SystemExit: an unknown flag or a value of the wrong type (code 2), or --help (code 0).
    """
    if argv and not argv[0].startswith("-"):
        base = load_config_file(argv[0])
        flags = argv[1:]
    elif "-h" in argv or "--help" in argv:
        base = Config()
        flags = argv
    else:
        raise UserError(f"no config file given; {USAGE}")

    config = tyro.cli(
        Config,
        prog="train.py CONFIG.py",
        description="Fine-tune the model that CONFIG.py describes. Flags replace its values.",
        default=base,
        args=_spell_out_booleans(flags),
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),
    )
    validate(config)
    return config


def _spell_out_booleans(flags: list[str]) -> list[str]:
    """Add the value True to every boolean flag that is given without one: `--data.strict`."""
    defaults = flatten_config(Config())
    booleans = {name for name, value in defaults.items() if isinstance(value, bool)}
    spelled = []
    for i, flag in enumerate(flags):
        spelled.append(flag)
        is_boolean = flag.lstrip("-").replace("-", "_") in booleans
        has_no_value = i + 1 == len(flags) or flags[i + 1].startswith("--")
        if is_boolean and has_no_value:
            spelled.append("True")
    return spelled


def load_config_file(path: str) -> Config:
    """Run a config file and return its `config`.

    Raises:
        UserError: the file does not exist, fails (the message has its line), or defines no config.
    """
    if not Path(path).is_file():
        raise UserError(f"config file {path!r} does not exist; {USAGE}")
    try:
        config = runpy.run_path(path).get("config")
    except Exception as error:
        line = _failing_line(path, error)
        message = f"{path}:{line}: {type(error).__name__}: {error}{_hint_for(error)}"
        raise UserError(message) from error
    if not isinstance(config, Config):
        raise UserError(
            f"{path}: must define `config = Config(...)` from minilora.config, "
            f"found {type(config).__name__}"
        )
    check_types(config, path)
    return config


def _failing_line(path: str, error: Exception) -> int | str:
    """Return the number of the config file's line that raised an error, or "?"."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename.endswith(Path(path).name)]
    if lines and lines[-1] is not None:
        return lines[-1]
    if isinstance(error, SyntaxError) and error.lineno is not None:  # the file has not begun to run
        return error.lineno
    return "?"


def _hint_for(error: Exception) -> str:
    """Return `; did you mean 'X'?` for an error about an unknown field, or an empty string."""
    if not isinstance(error, TypeError | AttributeError):
        return ""
    # "... unexpected keyword argument 'x'" or "... object has no attribute 'x'"
    quoted = re.findall("'([^']*)'", str(error))
    if not quoted:
        return ""
    sections = [field.name for field in dataclasses.fields(Config)]
    settings = [name.rpartition(".")[2] for name in flatten_config(Config())]
    return did_you_mean(quoted[-1], settings + sections)


def check_types(config: object, path: str, prefix: str = "") -> None:
    """Check that every field of a config has the type of its annotation.

    An int is accepted for a float. A list is replaced by a tuple.

    Args:
        config: a config dataclass; its sections are checked too.
        path: the file, for messages.
        prefix: the section's name and a dot, for messages.

    Raises:
        UserError: names the first field that has another type.
    """
    hints = typing.get_type_hints(type(config))
    for name, value in config_fields(config):
        hint = hints[name]
        if isinstance(value, list):
            value = tuple(value)
            setattr(config, name, value)
        try:
            typeguard.check_type(
                value,
                hint,
                collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS,
            )
        except typeguard.TypeCheckError as error:
            raise UserError(f"{path}: {prefix}{name} = {value!r}: {error}") from error

        # Python and typeguard accept a boolean for a number
        takes_booleans = bool in (hint, *typing.get_args(hint))
        if isinstance(value, bool) and not takes_booleans:
            message = f"{path}: {prefix}{name} = {value!r}: expected a number, not a boolean"
            raise UserError(message)
        if dataclasses.is_dataclass(value):
            check_types(value, path, f"{prefix}{name}.")


def validate(config: Config) -> None:
    """Check that values are in range and do not contradict each other.

    Raises:
        UserError: names the settings of the first problem.
    """
    _check_data(config)
    _check_counts(config)
    _check_method(config)
    _check_training(config)
    _check_parallel(config)
    _check_evaluation(config)
    _require(config.output_dir, "output_dir is empty")
    _require(config.preview >= 0 and config.seed >= 0, "preview and seed must not be negative")
    _require(
        not config.hub.push or config.hub.repo_id,
        "hub.push needs hub.repo_id: the repository to push to (owner/name)",
    )


def _require(condition: object, message: str) -> None:
    """Raise UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)


def _check_data(config: Config) -> None:
    """Check the files and their weights, the format, and the added tokens."""
    _check_files(config.data)
    _check_format(config.data)
    _check_added_tokens(config)


def _check_files(data: DataConfig) -> None:
    """Check the training files and their weights."""
    files = data.train_files
    _require(files and "" not in files, "data.train_file is not set: give a data file")
    _require(
        not _has_duplicates(files),
        "data.train_file names a file twice: use data.train_weights to use it more than once",
    )

    weights = data.train_weights
    _require(
        not weights or len(weights) == len(files),
        "data.train_weights needs one weight for each file",
    )
    _require(
        all(0 < weight < float("inf") for weight in weights),
        "data.train_weights must be positive and finite",
    )


def _check_format(data: DataConfig) -> None:
    """Check that the settings of one format are not given for another."""
    _require(
        data.format != "messages" or data.chat,
        "data.chat=False contradicts data.format='messages': its turns need a chat template",
    )
    has_templates = (data.prompt_template, data.response_template) != ("{prompt}", "{completion}")
    _require(
        data.format == "prompt" or not has_templates,
        "data.prompt_template and data.response_template need data.format='prompt'",
    )
    _require(
        data.format == "text" or data.response_marker is None,
        "data.response_marker needs data.format='text'",
    )
    _require(
        data.response_marker != "",
        "data.response_marker is empty; leave it out to supervise everything",
    )
    _require(data.max_seq_length >= 2, "data.max_seq_length must be at least 2")


def _check_added_tokens(config: Config) -> None:
    """Check the tokens to add, and that their embeddings are trained."""
    tokens = config.data.add_tokens
    trains_embeddings = config.method == "full" or config.lora.train_embeddings
    _require(
        not tokens or trains_embeddings,
        "data.add_tokens needs lora.train_embeddings=True or method='full': "
        "the rows of new tokens have to be learnt",
    )
    _require(all(token.strip() for token in tokens), "data.add_tokens holds an empty token")
    _require(not _has_duplicates(tokens), "data.add_tokens names a token twice")


def _has_duplicates(names: tuple[str, ...]) -> bool:
    """Return whether a name occurs more than once."""
    return len(set(names)) < len(names)


def _check_counts(config: Config) -> None:
    """Check the settings that count something."""
    settings = flatten_config(config)
    numbers = {name: settings[name] for name in AT_LEAST_ONE}
    low = [name for name, value in numbers.items() if isinstance(value, int) and value < 1]
    _require(not low, f"{', '.join(low)} must be at least 1")


def _check_method(config: Config) -> None:
    """Check that the model and adapter settings fit the training method."""
    lora, model = config.lora, config.model
    if config.method == "full":
        _require(
            not lora.train_embeddings,
            "lora.train_embeddings needs method='lora': method='full' trains every weight",
        )
        _require(
            model.bits == 16,
            "method='full' trains the weights themselves: model.bits must be 16",
        )
        _require(not lora.init_from, "method='full' has no adapter: lora.init_from must be None")
    else:
        _require(
            model.init == "pretrained",
            "model.init='random' needs method='full': adapters would leave the base random",
        )
    _require(0 <= lora.dropout < 1, "lora.dropout must be in [0, 1)")
    _require(lora.target_modules, "lora.target_modules is empty: nothing would be trained")


def _check_training(config: Config) -> None:
    """Check the length of training, the schedule and the optimizer."""
    train = config.train
    infinity = float("inf")
    _require(0 < train.epochs < infinity, "train.epochs must be positive and finite")
    _require(0 < train.learning_rate < infinity, "train.learning_rate must be positive and finite")
    _require(train.warmup_steps >= 0, "train.warmup_steps must not be negative")
    _require(
        train.warmup_ratio is None or 0 <= train.warmup_ratio <= 1,
        "train.warmup_ratio must be in [0, 1]",
    )
    _require(0 <= train.min_lr_ratio <= 1, "train.min_lr_ratio must be in [0, 1]")
    _require(
        train.min_lr_ratio == 0 or train.lr_scheduler in ("cosine", "linear"),
        "train.min_lr_ratio needs lr_scheduler cosine or linear",
    )
    _require(
        0 <= train.weight_decay < infinity,
        "train.weight_decay must not be negative or infinite",
    )
    _require(
        train.max_grad_norm >= 0,
        "train.max_grad_norm must not be negative (0 turns clipping off)",
    )
    _require(
        train.ema_decay is None or 0 <= train.ema_decay < 1, "train.ema_decay must be in [0, 1)"
    )


def _check_parallel(config: Config) -> None:
    """Check what only some ways of sharing the work can do."""
    parallel = config.parallel
    _require(
        not parallel.cpu_offload or parallel.strategy in ("fsdp", "hsdp"),
        "parallel.cpu_offload needs parallel.strategy fsdp or hsdp",
    )
    has_shard_size = parallel.shard_size is not None
    _require(
        has_shard_size == (parallel.strategy == "hsdp"),
        "parallel.shard_size and parallel.strategy='hsdp' need each other",
    )


def _check_evaluation(config: Config) -> None:
    """Check how answers are sampled, and that the named metrics exist."""
    evaluation = config.eval
    _require(evaluation.temperature >= 0, "eval.temperature must not be negative (0 means greedy)")
    _require(0 < evaluation.top_p <= 1, "eval.top_p must be in (0, 1]")
    _require(evaluation.num_generate_samples >= 0, "eval.num_generate_samples must not be negative")
    compares_answers = bool(set(evaluation.metrics) - {"loss", "ppl"})
    _require(
        not compares_answers or evaluation.num_generate_samples > 0,
        "eval.metrics needs eval.num_generate_samples: the answers that it compares",
    )
    check_metrics(evaluation.metrics, "eval.metrics")

    best = config.train.metric_for_best_model
    if best:
        figure = best.rpartition("domain/")[2]  # in_domain/loss -> loss
        _require(
            figure.startswith(("loss", "ppl", *evaluation.metrics)),
            f"train.metric_for_best_model: {best!r} is neither loss, ppl "
            f"nor a figure of eval.metrics {evaluation.metrics}",
        )


def check_device(config: Config) -> None:
    """Refuse settings that need a GPU where there is none; a preview needs none.

    Raises:
        UserError: names the setting, before any data is read.
    """
    if config.preview or torch.cuda.is_available():
        return
    optimizer = config.train.optimizer
    if optimizer.startswith("paged"):
        raise UserError(
            f"train.optimizer={optimizer!r} pages its states out of GPU memory, and there is no "
            f"GPU here: use {optimizer.removeprefix('paged_')!r}"
        )
    if config.parallel.cpu_offload:
        raise UserError(
            "parallel.cpu_offload moves parameters out of GPU memory, and there is no GPU here: "
            "leave it out"
        )


def run_script(main: Callable[[], int | None]) -> typing.NoReturn:
    """Run a script's main function and exit with its code.

    A UserError is printed as one message (code 2), as are a RunError and the loss of another
    process (code 1). Anything else ends with a traceback (code 1).

    Args:
        main: returns the exit code; None is 0.
    """
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output has ended, as `| head` does
        # without this the interpreter would write to the pipe once more when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # 128 + 13: as a shell reports a process that SIGPIPE has ended
    except RuntimeError as error:
        if distributed.world_size() == 1 or not _is_lost_process(error):
            raise
        reason = str(error).splitlines()[0][:200]
        print(
            f"error: process {distributed.rank()} of {distributed.world_size()} lost touch with "
            f"another one, which failed, was killed or hangs ({reason}). Checkpoints are intact: "
            "the same command continues from the newest",
            file=sys.stderr,
        )
        os._exit(1)  # a normal exit would wait for the lost process


def _is_lost_process(error: RuntimeError) -> bool:
    """Return whether an error of torch.distributed means that another process is gone."""
    return LOST_PROCESS.search(f"{type(error).__name__} {error}") is not None
