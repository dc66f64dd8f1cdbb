"""What a run trains on and is evaluated on, checked before any model is built."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minilora import distributed
from minilora.config import Config, DataConfig
from minilora.data.added_tokens import tokenizer_with_added_tokens
from minilora.data.cache import load_documents
from minilora.data.chat_template import load_chat_template
from minilora.data.dataset import Documents, EvalSet
from minilora.data.tokenizer import Tokenizer, has_tokenizer
from minilora.errors import UserError
from minilora.evaluation.text import score
from minilora.files import read_json
from minilora.hub import resolve
from minilora.training.special_tokens import warn_about_unlearnt_tokens


@dataclass
class TrainingData:
    """The documents of a run.

    Attributes:
        documents: the tokenized training files, their edges counted over `train_indices`.
        train_indices: which of the documents an epoch goes through, int64; a document may be
            there several times (data.train_weights).
        eval_sets: in_domain, drawn from the training files, then out_of_domain if there is
            data.eval_file; none if the run has no evaluations. In-domain documents may be trained
            on too, as in OLLM.
    """

    documents: Documents
    train_indices: np.ndarray
    eval_sets: list[EvalSet]


def make_tokenizer(config: Config, base: Path) -> Tokenizer:
    """Return the base's tokenizer with the run's chat template and added tokens.

    Args:
        config: the run.
        base: directory of the base model.

    Raises:
        UserError: the tokenizer or template cannot be used, or the adapter to start from was
            trained with other special tokens.
    """
    added = config.data.add_tokens
    directory = tokenizer_with_added_tokens(base, added) if added else base
    tokenizer = Tokenizer(directory, load_chat_template(config.data.chat_template))
    if config.lora.init_from:
        _check_initial_adapter(config, config.lora.init_from, tokenizer)
    return tokenizer


def trains_embeddings(config: Config) -> bool:
    """Return whether the run trains embedding and head.

    With lora.init_from the adapter to start from decides, since its settings replace the run's.
    """
    if config.method == "full":
        return True
    if config.lora.init_from:
        adapter_config = read_json(resolve(config.lora.init_from) / "adapter_config.json")
        return bool(adapter_config.get("modules_to_save"))
    return config.lora.train_embeddings


def load_data(config: Config, tokenizer: Tokenizer, base: Path) -> TrainingData:
    """Load and check the training documents and the evaluation sets.

    Args:
        config: the run.
        tokenizer: the run's tokenizer, from `make_tokenizer`.
        base: directory of the base model.

    Raises:
        UserError: the files cannot be used, a metric cannot be computed of their rows, or the
            tokenizer does not fit the base.
    """
    data = config.data
    documents = load_documents(data.train_file, data, tokenizer, "train_file")
    eval_sets = [] if config.eval.is_off else _load_eval_sets(config, tokenizer, documents)
    if config.eval.is_off:
        _log_without_evaluations(config)

    _check_metrics(config, eval_sets, tokenizer)
    every_document = [documents, *(eval_set.documents for eval_set in eval_sets)]
    _check_vocabulary(config, every_document, tokenizer, base)
    if not trains_embeddings(config):
        warn_about_unlearnt_tokens(documents, tokenizer, base)
    train_indices = training_indices(documents, data, config.seed)
    documents.count_edges(train_indices, data.edge_dropping)
    return TrainingData(documents, train_indices, eval_sets)


def _log_without_evaluations(config: Config) -> None:
    """Print what else a run without evaluations does not do, if there is anything."""
    consequences = []
    if config.data.eval_file:
        consequences.append(f"data.eval_file {config.data.eval_file} is not read")
    if config.train.save_steps is None:
        consequences.append("and no checkpoint before the end (train.save_steps)")
    if consequences:
        missing = ", ".join(["no evaluations", *consequences])
        distributed.log(f"eval.eval_steps={config.eval.eval_steps}: {missing}")


def _load_eval_sets(
    config: Config, tokenizer: Tokenizer, train_documents: Documents
) -> list[EvalSet]:
    """Return the evaluation sets: in_domain, and out_of_domain if there is data.eval_file."""
    data = config.data
    # another seed than that of train_size, so that the two samples are independent
    in_domain = _eval_indices(train_documents, data, config.seed + 1)
    eval_sets = [EvalSet("in_domain", train_documents, in_domain)]
    if data.eval_file:
        held_out = load_documents(data.eval_file, data, tokenizer, "eval_file")
        out_of_domain = _eval_indices(held_out, data, config.seed)
        eval_sets.append(EvalSet("out_of_domain", held_out, out_of_domain))
    return eval_sets


def training_indices(documents: Documents, data: DataConfig, seed: int) -> np.ndarray:
    """Return which documents an epoch goes through, int64.

    Args:
        documents: the tokenized training files.
        data: train_weights says how often each file is used, train_size how many documents are
            drawn of the result.
        seed: of the draws.

    Raises:
        UserError: a weight is so small that it leaves nothing of its file.
    """
    if not data.train_weights:
        return documents.sample(data.train_size, seed)

    rng = np.random.default_rng(seed)
    names = list(documents.counts.files)
    # file i has the rows file_ends[i - 1] to file_ends[i] - 1
    file_ends = np.cumsum(list(documents.counts.files.values()))
    file_of_document = np.searchsorted(file_ends, documents.row_index, side="right")

    parts: list[np.ndarray] = []
    for i, weight in enumerate(data.train_weights):
        of_file = np.flatnonzero(file_of_document == i)
        if round(weight * len(of_file)) == 0:
            message = f"{weight} of the {len(of_file)} rows of {names[i]} is less than one row"
            raise UserError(f"data.train_weights: {message}")

        repeats, fraction = divmod(weight, 1)
        parts += [of_file] * int(repeats)
        part_size = round(fraction * len(of_file))
        parts.append(np.sort(rng.permutation(of_file)[:part_size]))

    indices = np.concatenate(parts)
    if data.train_size is None:
        return indices
    return np.sort(rng.permutation(indices)[: data.train_size])


def eval_prompts(config: Config, eval_sets: list[EvalSet]) -> list[tuple[list[int], list[int]]]:
    """Return (prompt ids, target ids) of the documents that each evaluation generates answers for.

    They are the first eval.num_generate_samples of the last evaluation set, or none without sets.
    """
    if not eval_sets:
        return []
    last = eval_sets[-1]
    indices = last.indices[: config.eval.num_generate_samples]
    return [last.documents.prompt_and_target(i) for i in indices]


def _eval_indices(documents: Documents, data: DataConfig, seed: int) -> np.ndarray:
    """Return which documents an evaluation set has: the first ones, or drawn with the seed."""
    if data.eval_first:
        return documents.first(data.eval_size)
    return documents.sample(data.eval_size, seed)


def _check_initial_adapter(config: Config, name: str, tokenizer: Tokenizer) -> None:
    """Raise UserError if the special tokens of the adapter to start from are not the run's."""
    if not trains_embeddings(config):
        if config.lora.train_embeddings:
            raise UserError(
                f"lora.train_embeddings: the adapter at lora.init_from={name!r} has no embeddings, "
                "and its settings replace these"
            )
        return

    adapter = resolve(name)
    if not has_tokenizer(adapter):
        return
    learnt = Tokenizer(adapter).specials
    missing = [token for token, i in learnt.items() if tokenizer.specials.get(token) != i]
    if missing:
        raise UserError(
            f"lora.init_from: {name} has learnt {', '.join(missing)}: name the same tokens in "
            "data.add_tokens, in the same order"
        )


def _check_metrics(config: Config, eval_sets: list[EvalSet], tokenizer: Tokenizer) -> None:
    """Raise UserError for targets that a metric cannot read, or an unknown metric_for_best_model.

    Without this check either would only show at the first evaluation, steps into the run.
    """
    figures = [f"{eval_set.name}/{key}" for eval_set in eval_sets for key in ("loss", "ppl")]
    targets = [tokenizer.decode(target) for _, target in eval_prompts(config, eval_sets)]
    if config.eval.metrics and targets:
        # perfect answers: only to see that the metrics can read the targets, and which figures they
        # have
        scores = score(config.eval.metrics, targets, targets)
        figures += [f"{eval_sets[-1].name}/{key}" for key in scores]

    best = config.train.metric_for_best_model
    # a figure may be named by its last parts alone, see early_stopping.update_best
    if best and not any(f"eval/{figure}".endswith(f"/{best}") for figure in figures):
        known = ", ".join(figures)
        raise UserError(f"train.metric_for_best_model: {best!r} is none of {known}")


def _check_vocabulary(
    config: Config, documents: list[Documents], tokenizer: Tokenizer, base: Path
) -> None:
    """Raise UserError if a token has no row in the model, which is never resized unasked."""
    rows = read_json(base / "config.json").get("vocab_size") or 0  # null counts as 0
    if config.data.add_tokens:
        rows = max(rows, tokenizer.vocab_size)

    largest = max(int(of_files.tokens.max()) for of_files in documents)
    if largest >= rows:
        token = tokenizer.decode([largest], skip_special_tokens=False)
        raise UserError(
            f"the tokenizer gives {token!r} the id {largest}, but {base}/config.json has a "
            f"vocab_size of {rows}"
        )
