"""Scoring of the finished answers in a job's output: metrics of texts, loss, judge.

The output's rows have the columns of the input, which hold the reference, and the answer under
"generated". Figures are printed, and written beside the output.
"""

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from minilora import distributed
from minilora.config import DataConfig, EvalConfig
from minilora.data.example import RowError
from minilora.data.prompts import question_of_row, reference_of_row, references_of
from minilora.data.sources import data_files
from minilora.data.tokenize import format_counts, tokenize_files
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError
from minilora.evaluation import path_answers
from minilora.evaluation.answer_graphs import GRAPH_METRICS
from minilora.evaluation.category_graph import Figures
from minilora.evaluation.judge import JudgeEndpoint, judge
from minilora.evaluation.perplexity import batches_by_length, loss_and_ppl, loss_sums
from minilora.evaluation.rubric import Rubric, uses_reference
from minilora.evaluation.text import format_table, score
from minilora.generation.answering import TextGenerator
from minilora.generation.jobs import Row

MODEL_METRICS = ("loss", "ppl")
"""Metrics that need the model: they are computed from the references, not from the answers."""

REFERENCE_METRICS = ("numeric", "graph")
"""Metrics that cannot read every reference: it must hold a number, or category paths."""


def check_references(
    path: str, rows: Sequence[Row], data: DataConfig, metrics: Iterable[str]
) -> None:
    """Check that the metrics can read every row's reference, before anything is generated.

    Args:
        path: the input file's name, for messages.
        rows: its rows.
        data: the format of the rows.
        metrics: names of metrics that compare with the rows' references.

    Raises:
        UserError: a row has no reference, or one that a metric cannot read.
    """
    needs_answers = set(metrics) - set(MODEL_METRICS)
    if data.format == "text" and not data.response_marker and needs_answers:
        names = ", ".join(sorted(needs_answers))
        raise UserError(
            f"--metrics {names}: without --response_marker a whole row of format text is the "
            "prompt, so there is no answer to compare with; only loss and ppl can be computed"
        )
    references = references_of(path, rows, data)
    score([name for name in metrics if name in REFERENCE_METRICS], references, references)
    if "ontology" in metrics:
        path_answers.roots_of(references)


def check_judge_references(
    path: str, rows: Sequence[Row], data: DataConfig, rubric: Rubric
) -> None:
    """Check that every row has what the judge is to be shown, before anything is generated.

    Args:
        path: the input file's name, for messages.
        rows: its rows.
        data: the format of the rows.
        rubric: the judge's.

    Raises:
        UserError: the rubric's prompt has {reference}, and a row has no reference answer.
    """
    if not uses_reference(rubric):
        return
    for number, row in rows:
        try:
            reference_of_row(row, data)
        except RowError as error:
            message = f"the rubric's {{reference}} is what the answer should be: {error}"
            raise UserError(f"{path}:{number}: {message}") from error


def visible_references(
    answers: Sequence[dict], data: DataConfig, tokenizer: Tokenizer
) -> list[str]:
    """Return the reference of each answer without special tokens, which answers do not have.

    Args:
        answers: rows of the output.
        data: the format of the rows.
        tokenizer: decoded the answers.
    """
    # the tokens that decoding leaves out; longest first, because one may be part of another
    hidden = tokenizer.specials.keys() - tokenizer.backend.plain_added_tokens
    longest_first = sorted(hidden, key=len, reverse=True)
    references = []
    for row in answers:
        reference = reference_of_row(row, data)
        for token in longest_first:
            reference = reference.replace(token, "")
        references.append(reference)
    return references


def text_figures(answers: Sequence[dict], references: list[str], metrics: Iterable[str]) -> Figures:
    """Compute "answers", their number, and the figures of metrics that are of single texts.

    Args:
        answers: rows of the output.
        references: the reference of each; not read if all metrics are of the graph.
        metrics: names of metrics.
    """
    figures: Figures = {"answers": len(answers)}
    names = [name for name in metrics if name not in GRAPH_METRICS]
    if names:
        figures |= score(names, [row["generated"] for row in answers], references)
    return figures


def model_figures(
    generator: TextGenerator, source: str, metrics: Iterable[str], limit: int | None = None
) -> Figures:
    """Compute loss and perplexity of an input file's references under the model.

    Args:
        generator: the model.
        source: the input file.
        metrics: which of "loss" and "ppl" are wanted.
        limit: use only the first rows, this many; None: all.

    Returns:
        The figures, and "loss/rows", the number of rows that they are computed over.

    Raises:
        UserError: no row can be used.
    """
    files = {source: data_files(source, "input")}
    documents = tokenize_files(files, generator.data, generator.tokenizer, "input", limit)
    distributed.log(format_counts(documents.counts))
    if len(documents) == 0:
        raise UserError(f"--metrics loss: no row of {source} is left to compute it over")

    max_tokens = EvalConfig().max_batch_tokens
    batches = batches_by_length(
        documents, np.arange(len(documents)), generator.batch_size, max_tokens
    )
    model = generator.model
    found = loss_and_ppl(loss_sums(model, documents, batches, model.head_weight.device))

    figures: Figures = {name: value for name, value in found.items() if name in metrics}
    figures["loss/rows"] = len(documents)
    return figures


def report_figures(figures: Figures, output: Path) -> None:
    """Print figures, and write them beside the output."""
    print(format_table(figures))
    write_figures(figures, output)


def write_figures(figures: Figures, output: Path) -> None:
    """Write figures beside the output, to NAME.metrics.json."""
    _write_json(figures, output.with_name(output.stem + ".metrics.json"))


def judge_answers(output: Path, endpoint: JudgeEndpoint, rubric: Rubric, data: DataConfig) -> None:
    """Judge the answers of an output; print the summary and write it to NAME.judge.json.

    Args:
        output: the answers. The verdicts are written beside it, to NAME.judge.jsonl.
        endpoint: the judge.
        rubric: the criteria.
        data: the format of the rows.

    Raises:
        UserError, RunError: see `judge`.
    """
    verdicts = output.with_name(output.stem + ".judge.jsonl")
    reference = None
    if uses_reference(rubric):
        reference = partial(reference_of_row, data=data)
    question = partial(question_of_row, data=data)
    summary = judge(output, verdicts, endpoint, rubric, question, reference)
    print(summary.table())

    # a single answer has no standard deviation: NaN, which is not JSON, becomes null
    text = json.dumps(summary._asdict())
    plain = json.loads(text, parse_constant=lambda constant: None)
    _write_json(plain, output.with_name(output.stem + ".judge.json"))


def _write_json(value: object, path: Path) -> None:
    """Write a JSON file that is easy to read."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
