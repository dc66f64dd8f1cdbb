"""Ask a model: python infer.py MODEL --prompt TEXT, or --input F.jsonl --output G.jsonl, or with
neither, chat with it.

MODEL is a hub id, a directory in HF layout, or a checkpoint of train.py; a checkpoint names its
base model itself. If train.py trained the model, prompts have the form that they had in training;
--config and other flags give it another form. A job that was stopped is resumed by the same
command; under torchrun each process answers its share. --metrics and --judge score the answers,
and --compare shows them beside those of another model.
"""

import datetime
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import tyro

from minilora import distributed
from minilora.config import DataConfig
from minilora.config_files import load_config_file
from minilora.errors import RunError, UserError
from minilora.evaluation import answer_graphs, score_answers
from minilora.evaluation.answer_graphs import GraphScores, GraphScoring
from minilora.evaluation.category_graph import Figures, write_graph
from minilora.evaluation.compare import compare_table, other_model_figures, read_other
from minilora.evaluation.judge import JudgeEndpoint, check_judge
from minilora.evaluation.pruning import Thresholds
from minilora.evaluation.rubric import Rubric
from minilora.evaluation.text import check_metrics
from minilora.exit_codes import run_script
from minilora.generation.answering import (
    TextGenerator,
    answer_samples,
    check_rows_unchanged,
    note_long_prompts,
    wanted_samples,
)
from minilora.generation.arguments import (
    Args,
    check,
    check_samples_differ,
    job_settings,
    sampling_params,
)
from minilora.generation.chat import chat, check_stdin
from minilora.generation.jobs import Job, Row, read_input_rows, weight_file_times
from minilora.generation.prompting import PromptWriter, encode_rows, make_prompt_writer
from minilora.generation.sampling import SamplingParams
from minilora.hub import DESCRIPTION_FILES, HUB_FILES
from minilora.loading import ModelFiles, find_model, load_files
from minilora.planning.answering import describe_plan, plan_answers
from minilora.tracking.graph_page import write_graph_page


@dataclass(frozen=True)
class PreparedModel:
    """A model before its weights are loaded: its files, and how it is asked."""

    files: ModelFiles
    writer: PromptWriter
    """Writes its prompts."""
    params: SamplingParams


def main(args: Args) -> int:
    """Answer a prompt, the rows of a file, or the lines of a chat; return the exit code."""
    check(args)
    question, scoring = args.question, args.scoring
    if question.plan:
        return show_plan(args)
    check_metrics(scoring.metrics, "--metrics")
    rubric = None
    if scoring.judge:
        rubric = check_judge(scoring.judge, scoring.judge_model, scoring.rubric or "")

    if question.input is not None and question.output is not None:
        return answer_file(args, question.input, question.output, rubric)
    if question.prompt is not None:
        return answer_prompt(args, question.prompt)
    check_stdin()  # before the model is loaded
    chat(load(args, prepare(args)))
    return 0


def prepare(args: Args) -> PreparedModel:
    """Find the model's files, read its tokenizer, and choose the form of its prompts."""
    model = args.model
    patterns = DESCRIPTION_FILES if args.question.plan else HUB_FILES
    files = find_model(model.name, model.adapter, model.revision, model.adapter_revision, patterns)
    config = None
    if args.form.config is not None:
        config = form_of_config(args.form.config, args.question.input)
    writer = make_prompt_writer(files, args.form, config)
    if config is not None:
        note_missing_tokens(config, writer)
    params = sampling_params(args.sampling, writer.data.format)
    check_samples_differ(args.question.num_samples, params)
    return PreparedModel(files, writer, params)


def show_plan(args: Args) -> int:
    """Print what answering needs, for prompts as long as the longest of those that are given."""
    question = args.question
    prepared = prepare(args)
    prompts: list[list[int]] = []
    if question.prompt is not None:
        prompts = [prepared.writer.encode_text(question.prompt)]
    elif question.input is not None:
        rows = read_input_rows(question.input, question.limit)
        prompts = list(encode_rows(prepared.writer, rows, question.input).values())
    longest = max(map(len, prompts), default=0)
    plan = plan_answers(prepared.files, args.model, prepared.params.max_new_tokens, longest)
    batch_size = question.batch_size
    if prompts:
        batch_size = min(batch_size, len(prompts) * question.num_samples)
    print(describe_plan(plan, args.model.name, batch_size))
    return 0


def form_of_config(path: str, source: str | None) -> DataConfig:
    """Return the form of prompts in a config file: that of the input file, if it has its own."""
    data = load_config_file(path).data
    for name in data.file_formats:
        if source is not None and Path(name).resolve() == Path(source).resolve():
            return data.for_file(name)
    return data.asked_form


def note_missing_tokens(config: DataConfig, writer: PromptWriter) -> None:
    """Log a note if a config adds tokens that the model does not have."""
    missing = [token for token in config.add_tokens if token not in writer.tokenizer.specials]
    if missing:
        distributed.log(
            f"note: --config adds {', '.join(missing)}, which this model does not have: "
            "it reads them as ordinary text"
        )


def load(args: Args, prepared: PreparedModel) -> TextGenerator:
    """Load the weights of a prepared model."""
    model = load_files(prepared.files, args.model.dtype, args.model.bits, fold=args.model.fold)
    return TextGenerator(model, prepared.writer, prepared.params, args.question.batch_size)


def answer_prompt(args: Args, prompt: str) -> int:
    """Print the answers to one prompt."""
    prepared = prepare(args)
    ids = prepared.writer.encode_text(prompt)
    if not ids:
        raise UserError("--prompt: it is empty: there is nothing to continue")
    generator = load(args, prepared)
    num_samples = args.question.num_samples
    answers = dict(generator.stream([ids] * num_samples, range(num_samples)))
    texts = [generator.text_so_far(ids, answer) for _, answer in sorted(answers.items())]
    print("\n---\n".join(texts))
    return 0


def answer_file(args: Args, source: str, output: str, rubric: Rubric | None) -> int:
    """Answer the rows of `source` that have no answer in `output` yet, then score all answers."""
    rows = read_input_rows(source, args.question.limit)
    if not rows:
        raise UserError(f"--input: {source!r} has no rows")
    prepared = prepare(args)
    samples = wanted_samples(rows, args.question.num_samples)
    graph_scoring = check_scores(args, source, rows, prepared, rubric)

    # a process that has finished its share waits for the others, possibly for days
    timeout = datetime.timedelta(days=7)
    distributed.init_process_group(distributed.default_device(), timeout=timeout)
    job = Job(output, settings_of_job(args, prepared), [sample.key for sample in samples])
    check_rows_unchanged(samples, job, source, output)
    missing = [sample for sample in samples if sample.key not in job.done]
    if args.scoring.compare and missing:  # a mistake in it is reported before the model is loaded
        read_other(args.scoring.compare, [sample.output_row("") for sample in samples])

    rows_missing = {sample.row_id: sample.row for sample in missing}
    prompts = encode_rows(prepared.writer, list(rows_missing.values()), source)
    todo = [sample for sample in missing if sample.row_id in prompts]
    num_done = len(samples) - len(missing)
    num_wanted = num_done + len(todo)
    if num_wanted == 0:
        raise UserError(f"--input: the chat template refuses every row of {source!r}")

    generator = None
    if todo:
        if num_done > 0:
            distributed.log(f"{num_done} of {num_wanted} answers are there already")
        generator = load(args, prepared)
        note_long_prompts(prompts.values(), generator.model)
        try:
            answer_samples(generator, prompts, todo, job)
        except KeyboardInterrupt:
            message = f"stopped: {output} keeps what is answered; the same command goes on"
            print(message, file=sys.stderr)
            return 130
        except OSError as error:
            message = f"{output}: {error}; what is answered is kept, and the same command goes on"
            raise RunError(message) from error

    answers = job.finish()
    goes_on = "; the same command goes on" if len(answers) < num_wanted else ""
    distributed.log(f"{len(answers)} of {num_wanted} answers: {output}{goes_on}")
    distributed.destroy_process_group()
    if distributed.rank() == 0 and answers:  # the other processes are done
        score_metrics(args, prepared, generator, answers, graph_scoring)
        if rubric is not None:
            judge(args, prepared, rubric)
    return 0


def settings_of_job(args: Args, prepared: PreparedModel) -> dict:
    """Return what decides the answers besides the rows: flags, form, and the weights' times."""
    settings = job_settings(args)
    if prepared.writer.changes:
        settings["form"] = prepared.writer.changes
    files = prepared.files
    if args.model.adapter is not None:
        directories = [files.base, files.adapter]
    else:
        directories = [files.adapter or files.base]  # an adapter names its base
    settings["written"] = weight_file_times([path for path in directories if path is not None])
    settings["prompts"] = prepared.writer.digest()
    return settings


# ---- scores


def check_scores(
    args: Args, source: str, rows: Sequence[Row], prepared: PreparedModel, rubric: Rubric | None
) -> GraphScoring | None:
    """Check that rows have what metrics and judge need, and read what is compared with.

    Returns:
        How the answers' graph is scored; None if no metric is of the graph.

    Raises:
        UserError: something is missing or wrong; for a row, the message names file and line.
    """
    data, metrics = prepared.writer.data, args.scoring.metrics
    compared = answer_graphs.metrics_of_references(metrics, args.ontology)
    if compared:
        score_answers.check_references(source, rows, data, compared)
    if rubric is not None:
        score_answers.check_judge_references(source, rows, data, rubric)
    return answer_graphs.prepare_graph_scoring(metrics, args.ontology, source, rows, data)


def score_metrics(
    args: Args,
    prepared: PreparedModel,
    generator: TextGenerator | None,
    answers: list[dict],
    graph_scoring: GraphScoring | None,
) -> None:
    """Score answers with --metrics; print the figures and write them beside the output.

    Args:
        args: the command's arguments.
        prepared: the model.
        generator: the same with its weights if they are loaded already; None: they are loaded here
            if --metrics has loss or ppl.
        answers: the rows of the output.
        graph_scoring: how their graph is scored, if it is.
    """
    scoring, output = args.scoring, Path(args.question.output or "")
    if not scoring.metrics:
        return
    thresholds = None
    if graph_scoring is not None:
        thresholds = answer_graphs.find_thresholds(graph_scoring)
    figures, graphs = answer_figures(args, prepared, answers, graph_scoring, thresholds)
    if graphs is not None:
        write_graphs(graphs, output)
    if set(scoring.metrics) & set(score_answers.MODEL_METRICS):
        generator = generator or load(args, prepared)
        source, limit = args.question.input or "", args.question.limit
        figures |= score_answers.model_figures(generator, source, scoring.metrics, limit)

    if not scoring.compare:
        score_answers.report_figures(figures, output)
        return
    score_answers.write_figures(figures, output)
    other = scoring.compare
    there, here = read_other(other, answers)
    distributed.log(f"{len(here)} of {len(answers)} answers are compared: those in {other} too")
    before, _ = answer_figures(args, prepared, there, graph_scoring, thresholds)
    after, _ = answer_figures(args, prepared, here, graph_scoring, thresholds)
    before |= other_model_figures(other, figures)
    after |= {name: value for name, value in figures.items() if name not in after}
    print(compare_table(before, after, other, str(output)))


def answer_figures(
    args: Args,
    prepared: PreparedModel,
    answers: Sequence[dict],
    graph_scoring: GraphScoring | None,
    thresholds: Thresholds | None,
) -> tuple[Figures, GraphScores | None]:
    """Compute the figures of --metrics that are of the answers' texts.

    Args:
        args: the command's arguments.
        prepared: the model.
        answers: rows of an output.
        graph_scoring: how their graph is scored, if it is.
        thresholds: for pruning the graph.

    Returns:
        The figures, and the answers' graph if it is scored.
    """
    writer, metrics = prepared.writer, args.scoring.metrics
    references: list[str] = []
    if answer_graphs.metrics_of_references(metrics, args.ontology):
        references = score_answers.visible_references(answers, writer.data, writer.tokenizer)
    figures = score_answers.text_figures(answers, references, metrics)
    if graph_scoring is None:
        return figures, None
    documents = answer_graphs.documents_of(answers)
    scores = answer_graphs.score_graph(graph_scoring, documents, references, thresholds)
    return figures | scores.figures, scores


def write_graphs(scores: GraphScores, output: Path) -> None:
    """Write the answers' graph beside the output: as JSON, and as a page to look at.

    The page shows the pruned graph, if it was pruned, against the reference. The pruned graph that
    an earlier command has left is removed if nothing is pruned now.
    """
    write_graph(scores.graph, output.with_name(output.stem + ".graph.json"))
    pruned_file = output.with_name(output.stem + ".pruned_graph.json")
    if scores.pruned is None:
        pruned_file.unlink(missing_ok=True)
        shown = scores.graph
    else:
        write_graph(scores.pruned, pruned_file)
        shown = scores.pruned
    page = output.with_name(output.stem + ".graph.html")
    write_graph_page(shown, scores.reference, page, title=output.name)


def judge(args: Args, prepared: PreparedModel, rubric: Rubric) -> None:
    """Let --judge score the answers."""
    scoring, output = args.scoring, Path(args.question.output or "")
    endpoint = JudgeEndpoint(scoring.judge or "", scoring.judge_model, scoring.judge_requests)
    score_answers.judge_answers(output, endpoint, rubric, prepared.writer.data)


def run() -> NoReturn:
    """Run the command: `python infer.py`, and `minilora-infer` of an installed package."""
    run_script(lambda: main(tyro.cli(Args, description=__doc__, use_underscores=True)))


if __name__ == "__main__":
    run()
