"""Every setting of a run, its default, and its explanation, which is its `--help`.

A config file holds `config = Config(...)` with what differs from the defaults here, or the same in
YAML or JSON; command-line flags such as `--train.learning_rate 1e-4` replace single values.
`config_files.py` reads the file, `cli.py` the flags, and `config_checks.py` checks the result.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(slots=True)
class ModelConfig:
    """The base model: which one, and how its weights are held."""

    name: str = "mistralai/Mistral-7B-Instruct-v0.2"
    """Hub id, or a directory in Hugging Face layout (config.json, *.safetensors, tokenizer
    files)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute dtype. auto: the checkpoint's own (bfloat16 in place of float16 where the device has
    it; float32 over 16-bit weights on a CPU without fast bfloat16)."""
    bits: Literal[16, 8, 4] = 16
    """Width of the frozen base weights: 16 (as saved), 8 (LLM.int8) or 4 (NF4)."""
    double_quant: bool = True
    """With bits=4: quantize the quantization constants too."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: only config.json and a tokenizer are needed; weights are drawn from the seed."""


@dataclass(slots=True)
class LoraConfig:
    """The adapters (LoRA, arXiv 2106.09685)."""

    rank: int = 32
    """Rank R of the update B @ A."""
    alpha: float = 16
    """The update is scaled by alpha / rank (alpha / sqrt(rank) with rslora)."""
    dropout: float = 0.0
    """Dropout on the adapter's input, in training only."""
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Linear layers that get an adapter, by name or dotted suffix. Each must match something."""
    rslora: bool = False
    """Rank-stabilized scaling, alpha / sqrt(rank) (arXiv 2312.03732)."""
    train_embeddings: bool = False
    """Train the whole embedding and head beside the adapters (PEFT's modules_to_save): for tokens
    that the base has never learnt."""
    init_from: str | None = None
    """Start from this PEFT adapter (directory or hub id); its rank, alpha and targets replace the
    ones here."""


@dataclass(slots=True)
class RowFormat:
    """How the rows of one file become text (data.file_formats); None: as for all other files."""

    format: Literal["paths", "prompt", "messages", "text"] | None = None
    """As data.format."""
    prompt_template: str | None = None
    """As data.prompt_template."""
    response_template: str | None = None
    """As data.response_template."""
    response_marker: str | None = None
    """As data.response_marker."""
    chat: bool | None = None
    """As data.chat."""


@dataclass(slots=True)
class DataConfig:
    """The rows to train on and how a row becomes text."""

    train_file: str | tuple[str, ...] = ""
    """What to train on: .jsonl, .json, .csv, .tsv (each also .gz) or .parquet; a directory with a
    file for each split, a glob of files; or a dataset of the hub, owner/name[@revision][:split or
    glob]. One or several."""
    train_weights: tuple[float, ...] = ()
    """How often an epoch uses each file of train_file: 2 is twice, 0.5 a half drawn with the seed
    (default: once)."""
    eval_file: str | None = None
    """One of the same kinds, for the out-of-domain evaluation (in-domain is drawn from
    train_file)."""
    train_size: int | None = None
    """Train on this many rows, drawn with the seed (default: all)."""
    eval_size: int = 1024
    """Rows of each evaluation set, drawn with the seed."""
    eval_first: bool = False
    """Evaluate on the first eval_size rows of a file instead."""
    format: Literal["paths", "prompt", "messages", "text"] = "paths"
    """What a row holds. paths: title, abstract, paths. prompt: columns for the two templates below.
    messages: chat turns (role, content, optional train). text: text, supervised after
    response_marker, or everywhere without one."""
    prompt_template: str = "{prompt}"
    """format=prompt: the prompt, a str.format template over the row's columns."""
    response_template: str = "{completion}"
    """format=prompt: the response, a str.format template over the row's columns."""
    response_marker: str | None = None
    """format=text: only what follows the last occurrence of this string is supervised."""
    chat: bool = True
    """Wrap prompt and response in a chat template (formats paths and prompt)."""
    chat_template: str | None = None
    """"mistral" (the built-in [INST] form) or a jinja file; default: the model's own, else the
    built-in form."""
    edge_dropping: bool = True
    """format=paths: drop labels of over-frequent edges while training (OLLM, arXiv 2410.23584)."""
    edge_draw: Literal["epoch", "once"] = "epoch"
    """Which labels edge_dropping drops is drawn anew in each epoch, or once for all epochs, as in
    OLLM's code."""
    max_seq_length: int = 2048
    """Longest document in tokens; see too_long."""
    too_long: Literal["drop", "truncate", "error"] = "drop"
    """A longer document is dropped, has its prompt shortened (never its response), or stops the
    run."""
    shuffle: bool = True
    """Use a new order in each epoch, which depends on (seed, epoch) alone."""
    file_formats: dict[str, RowFormat] = field(default_factory=dict)
    """For files whose rows differ from the others: the name as in train_file or eval_file, and its
    format and templates. Only in a config file."""
    add_tokens: tuple[str, ...] = ()
    """Special tokens to add to the tokenizer. Their rows in the model are spare ones, or new ones
    (the mean of the others), so lora.train_embeddings or method='full' is needed. Leave out tokens
    that the tokenizer has: use them in the text."""
    strict: bool = False
    """Stop on the first row that would be dropped instead of counting it."""
    num_workers: int = 4
    """Processes that tokenize; the result does not depend on their number."""

    @property
    def train_files(self) -> tuple[str, ...]:
        """The names in `train_file`, as a tuple also where it is one string."""
        return (self.train_file,) if isinstance(self.train_file, str) else self.train_file

    @property
    def is_chat(self) -> bool:
        """Whether rows of this form are rendered by the chat template."""
        return self.format == "messages" or (self.format in ("paths", "prompt") and self.chat)

    @property
    def uses_chat_template(self) -> bool:
        """Whether the rows of any training file are rendered by the chat template."""
        return any(self.for_file(name).is_chat for name in self.train_files or ("",))

    @property
    def asked_form(self) -> "DataConfig":
        """The form in which the trained model is asked: that of these settings, or, if file_formats
        has every training file, that of the first one."""
        files = self.train_files
        has_form_of_all = bool(files) and all(name in self.file_formats for name in files)
        return self.for_file(files[0]) if has_form_of_all else self

    def for_file(self, name: str) -> "DataConfig":
        """Return the settings that hold for the rows of a file: these, or those of file_formats."""
        if name not in self.file_formats:
            return self
        changes: dict[str, Any] = {"file_formats": {}}
        for setting, value in config_fields(self.file_formats[name]):
            if value is not None:
                changes[setting] = value
        return dataclasses.replace(self, **changes)


@dataclass(slots=True)
class TrainConfig:
    """The optimizer, its schedule, and when to log, save and stop."""

    epochs: float = 2.0
    """Passes over the training rows."""
    max_steps: int | None = None
    """Stop after this many optimizer steps instead."""
    batch_size: int = 16
    """Documents per device and micro-batch."""
    grad_acc_steps: int = 1
    """Micro-batches per optimizer step."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    lr_scheduler: Literal["constant_with_warmup", "constant", "cosine", "linear"] = (
        "constant_with_warmup"
    )
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
    """Put documents of similar length into one step: memory and step time vary less."""
    gradient_checkpointing: bool | int | Literal["auto"] = True
    """Recompute blocks in the backward pass instead of keeping their activations: all of them
    (True), none, the first N, or auto: as few as memory allows, which is decided after the first
    step."""
    compile: bool = False
    """Compile each block with torch.compile: faster steps, after a minute or so of compiling.
    lora.dropout draws other numbers then."""
    activation_offload: bool = False
    """Keep the inputs of recomputed blocks in host memory: for documents so long that a GPU cannot
    hold them."""
    mlp_tile_tokens: int | None = None
    """Compute the feed-forward layers for this many tokens at a time, and recompute each part in
    the backward pass: for long documents (default: all tokens at once). Dropout draws other
    numbers."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the trained weights, e.g. 0.999; the average is
    evaluated and saved. In the first steps the decay is (1 + step) / (10 + step) where that is
    less."""
    logging_steps: int = 50
    """Log a line of metrics every N optimizer steps."""
    save_steps: int | float | Literal["epoch"] | None = None
    """Save a checkpoint every N optimizer steps, at each epoch's end, or several times in each
    epoch (0.25: four times). 0: only at the end of the run. Default: eval.eval_steps."""
    save_total_limit: int | None = None
    """Keep only the newest N step checkpoints (default: all)."""
    resume: str = "auto"
    """auto: continue from the newest complete checkpoint in output_dir, if there is one. never.
    last: the same as auto, but there must be one, and settings may have changed. best: go back to
    the best checkpoint in output_dir; newer ones are renamed to superseded-... Or a checkpoint
    directory."""
    early_stopping_patience: int | None = None
    """Stop after N evaluations in a row without a better metric_for_best_model."""
    metric_for_best_model: str | None = None
    """Also keep the checkpoint that is best by this figure of the evaluations: loss, ppl, a metric
    of eval.metrics as it is logged (rougeL), or in_domain/loss (default: none; loss with
    early_stopping_patience)."""


@dataclass(slots=True)
class EvalConfig:
    """When to evaluate, and how to generate sample answers."""

    eval_steps: int | float | Literal["epoch"] | None = 500
    """Evaluate every N optimizer steps, at each epoch's end, or several times in each epoch (0.25:
    four times); and once at the end of the run. 0 or None: never."""
    eval_on_start: bool = False
    """Evaluate before the first step too."""
    batch_size: int = 32
    """Documents per device in an evaluation batch."""
    max_batch_tokens: int = 16384
    """Tokens of an evaluation batch, if that is fewer documents; a longer document is a batch of
    its own."""
    num_generate_samples: int = 5
    """Answers generated at each evaluation, written to samples.jsonl with prompt and target."""
    temperature: float = 0.1
    """Sampling temperature of those answers; 0 is greedy."""
    top_p: float = 0.9
    """Nucleus sampling: keep the smallest set of tokens with this much probability."""
    max_new_tokens: int = 1024
    """Longest answer in tokens."""
    max_time: float | None = None
    """Seconds for the answers of one evaluation; what is not complete by then is cut off."""
    metrics: tuple[str, ...] = ()
    """Of the num_generate_samples answers: exact_match, bleu, chrf, rouge, meteor, edit_distance,
    numeric, graph."""

    @property
    def is_off(self) -> bool:
        """Whether the run has no evaluations."""
        return self.eval_steps in (0, None)


@dataclass(slots=True)
class ParallelConfig:
    """How several processes share the work."""

    strategy: Literal["auto", "ddp", "fsdp", "hsdp"] = "auto"
    """ddp: every process holds the model. fsdp: each holds a part of every matrix. hsdp: fsdp
    inside groups. auto: ddp if the model fits. With one process it changes nothing."""
    shard_size: int | None = None
    """hsdp: ranks per sharding group."""
    cpu_offload: bool = False
    """fsdp: keep parameters and optimizer states in host memory."""


@dataclass(slots=True)
class LogConfig:
    """Trackers beside metrics.jsonl, which is always written."""

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
    """Uploading checkpoints to the Hugging Face hub."""

    push: bool = False
    """Upload each checkpoint to the hub."""
    repo_id: str | None = None
    """Repository to push to."""
    private: bool = True
    """Create it private."""


@dataclass(slots=True)
class Config:
    """All settings of a run."""

    output_dir: str = "out"
    """Everything a run writes goes here."""
    seed: int = 0
    """Order, label draws, dropout and initialization are functions of it."""
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
    """Show the first N tokenized examples with their masks, write preview.jsonl, and stop."""
    plan: bool = False
    """Show what the run needs, and stop: memory by part, time on some GPUs, and what fits where.
    Neither weights nor a GPU are needed."""


def config_fields(config: object) -> list[tuple[str, object]]:
    """List the (name, value) pairs of a config dataclass, in the order of its definition."""
    names = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    return [(name, getattr(config, name)) for name in names]


def flatten_config(config: Config | dict) -> dict[str, object]:
    """Return {"section.field": value} for every field of a config, in order.

    data.file_formats is one value, in the form that config.json has: a dict of dicts.

    Args:
        config: a `Config`, or the same as a nested dict (as config.json holds it).
    """
    settings = config if isinstance(config, dict) else dataclasses.asdict(config)
    flat: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, dict):  # a section
            flat.update({f"{name}.{field_name}": item for field_name, item in value.items()})
        else:
            flat[name] = value
    return flat
