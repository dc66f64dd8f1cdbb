"""Check a config before anything is read: values in range, and none that contradict each other."""

from minilora.config import Config, DataConfig, flatten_config
from minilora.errors import require
from minilora.evaluation.text import check_metrics

# settings that must be at least 1; some may also be None
AT_LEAST_ONE = (
    "lora.rank",
    "train.max_steps",
    "train.batch_size",
    "train.grad_acc_steps",
    "train.logging_steps",
    "train.save_total_limit",
    "train.early_stopping_patience",
    "train.mlp_tile_tokens",
    "eval.batch_size",
    "eval.max_batch_tokens",
    "eval.max_new_tokens",
    "data.train_size",
    "data.eval_size",
    "data.num_workers",
    "parallel.shard_size",
)


def validate(config: Config) -> None:
    """Check that values are in range and do not contradict each other.

    Raises:
        UserError: names the settings of the first problem.
    """
    _check_data(config)
    _check_counts(config)
    _check_intervals(config)
    _check_method(config)
    _check_training(config)
    _check_parallel(config)
    _check_evaluation(config)
    require(config.output_dir, "output_dir is empty")
    require(config.preview >= 0 and config.seed >= 0, "preview and seed must not be negative")
    require(
        not config.hub.push or config.hub.repo_id,
        "hub.push needs hub.repo_id: the repository to push to (owner/name)",
    )


def _check_data(config: Config) -> None:
    """Check the files and their weights, the format, and the added tokens."""
    if config.data.train_file or not config.plan:  # a plan can do without
        _check_files(config.data)
    _check_format(config.data)
    _check_added_tokens(config)


def _check_files(data: DataConfig) -> None:
    """Check the training files and their weights."""
    files = data.train_files
    require(files and "" not in files, "data.train_file is not set: give a data file")
    require(
        not _has_duplicates(files),
        "data.train_file names a file twice: use data.train_weights to use it more than once",
    )

    weights = data.train_weights
    require(
        not weights or len(weights) == len(files),
        "data.train_weights needs one weight for each file",
    )
    require(
        all(0 < weight < float("inf") for weight in weights),
        "data.train_weights must be positive and finite",
    )


def _check_format(data: DataConfig) -> None:
    """Check that the settings of one format are not given for another."""
    formats = {data.format, *(data.for_file(name).format for name in data.file_formats)}
    has_templates = (data.prompt_template, data.response_template) != ("{prompt}", "{completion}")
    require(
        "prompt" in formats or not has_templates,
        "data.prompt_template and data.response_template need data.format='prompt'",
    )
    require(
        "text" in formats or data.response_marker is None,
        "data.response_marker needs data.format='text'",
    )
    draws_labels = "paths" in formats and data.edge_dropping
    require(
        draws_labels or data.edge_draw == "epoch",
        "data.edge_draw='once' needs data.format='paths' and data.edge_dropping: "
        "no other labels are drawn",
    )
    _check_chat_and_marker(data, "data.")
    require(data.max_seq_length >= 2, "data.max_seq_length must be at least 2")
    _check_file_formats(data)


def _check_file_formats(data: DataConfig) -> None:
    """Check data.file_formats: its names, and that each entry fits its format."""
    table = data.file_formats
    unknown = [name for name in table if name not in (*data.train_files, data.eval_file)]
    require(
        not unknown,
        f"data.file_formats: {unknown} are neither in data.train_file nor data.eval_file: "
        "write the names as they are there",
    )
    for name, given in table.items():
        prefix = f"data.file_formats[{name!r}]."
        file_format = data.for_file(name).format
        has_template = (given.prompt_template, given.response_template) != (None, None)
        require(
            file_format == "prompt" or not has_template,
            f"{prefix}prompt_template and response_template need format='prompt', "
            f"not {file_format!r}",
        )
        require(
            file_format == "text" or given.response_marker is None,
            f"{prefix}response_marker needs format='text', not {file_format!r}",
        )
        _check_chat_and_marker(data.for_file(name), prefix)


def _check_chat_and_marker(data: DataConfig, prefix: str) -> None:
    """Check two settings of a format. `prefix` stands before their names in messages."""
    require(
        data.format != "messages" or data.chat,
        f"{prefix}chat=False contradicts format='messages': its turns need a chat template",
    )
    require(
        data.response_marker != "",
        f"{prefix}response_marker is empty; leave it out to supervise everything",
    )


def _check_added_tokens(config: Config) -> None:
    """Check the tokens to add, and that their embeddings are trained."""
    tokens = config.data.add_tokens
    trains_embeddings = config.method == "full" or config.lora.train_embeddings
    require(
        not tokens or trains_embeddings,
        "data.add_tokens needs lora.train_embeddings=True or method='full': "
        "the rows of new tokens have to be learnt",
    )
    require(all(token.strip() for token in tokens), "data.add_tokens holds an empty token")
    require(not _has_duplicates(tokens), "data.add_tokens names a token twice")


def _has_duplicates(names: tuple[str, ...]) -> bool:
    """Return whether a name occurs more than once."""
    return len(set(names)) < len(names)


def _check_counts(config: Config) -> None:
    """Check the settings that count something."""
    settings = flatten_config(config)
    numbers = {name: settings[name] for name in AT_LEAST_ONE}
    low = [name for name, value in numbers.items() if isinstance(value, int) and value < 1]
    require(not low, f"{', '.join(low)} must be at least 1")


def _check_intervals(config: Config) -> None:
    """Check eval_steps and save_steps, which count steps, or are a part of an epoch."""
    intervals = {
        "eval.eval_steps": config.eval.eval_steps,
        "train.save_steps": config.train.save_steps,
    }
    for name, interval in intervals.items():
        if isinstance(interval, float):
            is_valid = 0 <= interval < 1
        else:
            is_valid = interval is None or interval == "epoch" or interval >= 0
        require(
            is_valid,
            f"{name} = {interval!r} must be a whole number of steps, 0 for never, 'epoch', or a "
            "part of an epoch between 0 and 1 (0.25: four times in each epoch)",
        )


def _check_method(config: Config) -> None:
    """Check that the model and adapter settings fit the training method."""
    lora, model = config.lora, config.model
    if config.method == "full":
        require(
            not lora.train_embeddings,
            "lora.train_embeddings needs method='lora': method='full' trains every weight",
        )
        require(
            model.bits == 16,
            "method='full' trains the weights themselves: model.bits must be 16",
        )
        require(not lora.init_from, "method='full' has no adapter: lora.init_from must be None")
    else:
        require(
            model.init == "pretrained",
            "model.init='random' needs method='full': adapters would leave the base random",
        )
    require(0 <= lora.dropout < 1, "lora.dropout must be in [0, 1)")
    require(lora.target_modules, "lora.target_modules is empty: nothing would be trained")


def _check_training(config: Config) -> None:
    """Check the length of training, the schedule and the optimizer."""
    train = config.train
    infinity = float("inf")
    require(0 < train.epochs < infinity, "train.epochs must be positive and finite")
    require(0 < train.learning_rate < infinity, "train.learning_rate must be positive and finite")
    require(train.warmup_steps >= 0, "train.warmup_steps must not be negative")
    require(
        train.warmup_ratio is None or 0 <= train.warmup_ratio <= 1,
        "train.warmup_ratio must be in [0, 1]",
    )
    require(0 <= train.min_lr_ratio <= 1, "train.min_lr_ratio must be in [0, 1]")
    require(
        train.min_lr_ratio == 0 or train.lr_scheduler in ("cosine", "linear"),
        "train.min_lr_ratio needs lr_scheduler cosine or linear",
    )
    require(
        0 <= train.weight_decay < infinity,
        "train.weight_decay must not be negative or infinite",
    )
    require(
        train.max_grad_norm >= 0,
        "train.max_grad_norm must not be negative (0 turns clipping off)",
    )
    blocks = train.gradient_checkpointing
    require(
        blocks == "auto" or blocks >= 0,
        "train.gradient_checkpointing must be True, False, 'auto' or a number of blocks",
    )
    recomputes = blocks is not False and blocks != 0
    require(
        recomputes or not train.activation_offload,
        "train.activation_offload keeps the inputs of recomputed blocks: it needs "
        "train.gradient_checkpointing",
    )
    require(
        train.ema_decay is None or 0 <= train.ema_decay < 1, "train.ema_decay must be in [0, 1)"
    )


def _check_parallel(config: Config) -> None:
    """Check what only some ways of sharing the work can do."""
    parallel = config.parallel
    require(
        not parallel.cpu_offload or parallel.strategy in ("fsdp", "hsdp"),
        "parallel.cpu_offload needs parallel.strategy fsdp or hsdp",
    )
    has_shard_size = parallel.shard_size is not None
    require(
        has_shard_size == (parallel.strategy == "hsdp"),
        "parallel.shard_size and parallel.strategy='hsdp' need each other",
    )
    require(
        parallel.shard_size != 1,
        "parallel.shard_size=1: every process would hold the whole model, which is "
        "parallel.strategy='ddp'",
    )


def _check_evaluation(config: Config) -> None:
    """Check how answers are sampled, and that the named metrics exist."""
    evaluation = config.eval
    if evaluation.is_off:
        _check_no_evaluation(config)
    require(
        evaluation.max_time is None or 0 < evaluation.max_time < float("inf"),
        "eval.max_time must be positive and finite, or None for no limit",
    )
    require(evaluation.temperature >= 0, "eval.temperature must not be negative (0 means greedy)")
    require(0 < evaluation.top_p <= 1, "eval.top_p must be in (0, 1]")
    require(evaluation.num_generate_samples >= 0, "eval.num_generate_samples must not be negative")
    compares_answers = bool(set(evaluation.metrics) - {"loss", "ppl"})
    require(
        not compares_answers or evaluation.num_generate_samples > 0,
        "eval.metrics needs eval.num_generate_samples: the answers that it compares",
    )
    require(
        "ontology" not in evaluation.metrics,
        "eval.metrics: ontology is a metric of infer.py alone; graph is the one without embedder",
    )
    check_metrics(evaluation.metrics, "eval.metrics")

    best = config.train.metric_for_best_model
    if best:
        figure = best.rpartition("domain/")[2]  # in_domain/loss -> loss
        require(
            figure.startswith(("loss", "ppl", *evaluation.metrics)),
            f"train.metric_for_best_model: {best!r} is neither loss, ppl "
            f"nor a figure of eval.metrics {evaluation.metrics}",
        )


def _check_no_evaluation(config: Config) -> None:
    """Check that nothing is set that needs evaluations, in a run that has none."""
    needs_evaluation = {
        "eval.eval_on_start": config.eval.eval_on_start,
        "train.early_stopping_patience": config.train.early_stopping_patience,
        "train.metric_for_best_model": config.train.metric_for_best_model,
    }
    given = [name for name, value in needs_evaluation.items() if value]
    require(
        not given,
        f"eval.eval_steps={config.eval.eval_steps} means no evaluation, which {', '.join(given)} "
        "needs",
    )
