"""What a run trains on and is evaluated on, checked before anything is built."""

import hashlib
from pathlib import Path

import numpy as np

from minilora.config import Config, DataConfig, UserError
from minilora.data import Documents
from minilora.evaluation import metrics
from minilora.running.cache import load_documents
from minilora.running.special_tokens import warn_of_unlearnt, with_added_tokens
from minilora.tokenizer import MISTRAL_TEMPLATE, Tokenizer
from minilora.weights import read_json, resolve

EvalSets = dict[str, tuple[Documents, np.ndarray]]  # name -> documents, which of them


def make_tokenizer(config: Config, base: Path) -> Tokenizer:
    """The base's tokenizer with the run's chat template and added tokens. Raises UserError, also where the adapter to start from
    has other tokens."""
    directory = with_added_tokens(base, config.data.add_tokens) if config.data.add_tokens else base
    tokenizer = Tokenizer(directory, chat_template(config.data.chat_template))
    start = config.lora.init_from
    if start and config.lora.train_embeddings and not trains_embeddings(config):
        raise UserError(
            f"lora.train_embeddings: the adapter at lora.init_from={start!r} has none, and its settings replace these"
        )
    if start and trains_embeddings(config):
        adapter = resolve(start)
        theirs = Tokenizer(adapter).specials if list(adapter.glob("tokenizer.[jm]*")) else {}
        if other := [token for token, i in theirs.items() if tokenizer.specials.get(token) != i]:
            raise UserError(
                f"lora.init_from: {start} has learnt {', '.join(other)}: name the same in data.add_tokens, in its order"
            )
    return tokenizer


def trains_embeddings(config: Config) -> bool:
    """Whether embedding and head are trained; an adapter to start from decides by itself."""
    if config.method == "full" or not config.lora.init_from:
        return config.method == "full" or config.lora.train_embeddings
    return bool(read_json(resolve(config.lora.init_from) / "adapter_config.json").get("modules_to_save"))


def chat_template(name: str | None) -> str | None:
    """The chat template that data.chat_template names: "mistral", a jinja file, or None for the model's own."""
    if name is None or name == "mistral":
        return MISTRAL_TEMPLATE if name else None
    if not Path(name).is_file():
        raise UserError(f"data.chat_template: {name!r} is neither 'mistral' nor a file")
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"data.chat_template: {name!r} cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise UserError(f"data.chat_template: {name!r} is empty")
    return text


def load_data(config: Config, tokenizer: Tokenizer, base: Path) -> tuple[Documents, np.ndarray, EvalSets]:
    """Training documents, which of them to use, and the evaluation sets. In-domain ones may be trained on (as in OLLM)."""
    data = config.data
    documents = load_documents(data.train_file, data, tokenizer, "train_file")
    first = data.eval_first
    eval_sets = {"in_domain": (documents, documents.sample(data.eval_size, None if first else config.seed + 1))}
    if data.eval_file:
        held_out = load_documents(data.eval_file, data, tokenizer, "eval_file")
        eval_sets["out_of_domain"] = (held_out, held_out.sample(data.eval_size, None if first else config.seed))
    targets = [tokenizer.decode(target) for _, target in questions(config, eval_sets)]
    figures = [f"{name}/{key}" for name in eval_sets for key in ("loss", "ppl")]
    if config.eval.metrics and targets:  # one that a metric cannot read shows now, not at the first evaluation
        figures += [f"{list(eval_sets)[-1]}/{key}" for key in metrics.score(config.eval.metrics, targets, targets)]
    if (best := config.train.metric_for_best_model) and not any(f"eval/{name}".endswith(f"/{best}") for name in figures):
        raise UserError(f"train.metric_for_best_model: {best!r} is none of {', '.join(figures)}")
    rows = read_json(base / "config.json").get("vocab_size") or 0
    rows = max(rows, tokenizer.vocab_size) if data.add_tokens else rows
    largest = max(int(d.tokens.max()) for d, _ in eval_sets.values())
    if largest >= rows:  # a model is never resized silently
        token = tokenizer.decode([largest], skip_special_tokens=False)
        raise UserError(f"the tokenizer gives {token!r} the id {largest}, but {base}/config.json has a vocab_size of {rows}")
    if not trains_embeddings(config):
        warn_of_unlearnt(documents, tokenizer, base)
    return documents, training_rows(documents, data, config.seed), eval_sets


def training_rows(documents: Documents, data: DataConfig, seed: int) -> np.ndarray:
    """Which documents an epoch goes through: `train_size` of them; of each file as many times over as its weight says."""
    if not data.train_weights:
        return documents.sample(data.train_size, seed)
    source = np.searchsorted(np.cumsum(list(documents.counts.files.values())), documents.index, side="right")
    rows, rng = [], np.random.default_rng(seed)
    for i, weight in enumerate(data.train_weights):
        mine = np.flatnonzero(source == i)
        rows += [mine] * int(weight) + [np.sort(rng.permutation(mine)[: round(weight % 1 * len(mine))])]
        if not round(weight * len(mine)):
            raise UserError(f"data.train_weights: {weight} of {len(mine)} rows of {list(documents.counts.files)[i]} is none")
    mixed = np.concatenate(rows)
    return mixed if data.train_size is None else np.sort(rng.permutation(mixed)[: data.train_size])


def questions(config: Config, sets: EvalSets) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, target ids) of the rows of the last evaluation set that are answered at each evaluation."""
    documents, which = list(sets.values())[-1]
    return [documents.prompt_and_target(i) for i in which[: config.eval.num_generate_samples]]


def digest(documents: Documents, chosen: np.ndarray) -> str:
    """What the training rows are, so that a run is never continued on others."""
    sha = hashlib.sha256()
    for array in (documents.tokens, documents.supervised, documents.node, documents.offsets, documents.keep, chosen):
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()[:16]
