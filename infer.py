"""Ask a model: python infer.py MODEL --prompt TEXT, or --input F.jsonl --output G.jsonl, or with
neither, chat with it.

MODEL is a hub id, a directory in HF layout, or a checkpoint of train.py; a checkpoint names its
base model itself. If train.py trained the model, prompts have the form that they had in training.
A job that was stopped is resumed by the same command; under torchrun each process answers its
share. --metrics and --judge score the answers.
"""

import dataclasses
import datetime
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import minilora
from minilora import distributed
from minilora.checkpoint.run_record import read_data_config
from minilora.cli import run_script
from minilora.config import DataConfig
from minilora.data.tokenizer import Tokenizer
from minilora.errors import RunError, UserError
from minilora.evaluation import score_answers
from minilora.evaluation.judge import JudgeEndpoint, check_judge
from minilora.evaluation.rubric import Rubric
from minilora.evaluation.text import check_metrics
from minilora.files import read_json
from minilora.generation.answering import (
    TextGenerator,
    answer_samples,
    check_rows_unchanged,
    encode_prompts,
    wanted_samples,
)
from minilora.generation.chat import chat, check_stdin
from minilora.generation.jobs import Job, read_input_rows, weight_file_times
from minilora.generation.sampling import SamplingParams
from minilora.hub import resolve
from minilora.model.lora import merge_adapters

# the sampling settings for a model that was trained on category paths: OLLM's (arXiv 2410.23584)
PATHS_DEFAULTS = SamplingParams(max_new_tokens=1024, temperature=0.1, top_p=0.9, stop=("\n\n",))
SAMPLING_FLAGS = (
    "max_new_tokens temperature top_p top_k repetition_penalty stop seed max_time"
).split()
# the flags that decide an answer: a job can be resumed only with the same values. --batch_size is
# not among them: it changes answers only through rounding in 16 bits
DECISIVE_FLAGS = (
    "model adapter revision max_new_tokens temperature top_p top_k repetition_penalty stop "
    "num_samples seed raw dtype bits fold"
).split()


@dataclass
class Args:
    """Generate text with a model: for one prompt, for the rows of a file, or in a chat."""

    model: Annotated[str, tyro.conf.Positional]
    """Hub id, directory in HF layout, or a checkpoint of train.py."""
    adapter: str | None = None
    """PEFT adapter (directory or hub id) to put on the model."""
    prompt: str | None = None
    """Answer this one prompt; the answer goes to stdout."""
    input: str | None = None
    """Rows with the columns of the training format, or {"prompt": ...}: JSONL, or any kind that
    data.train_file takes."""
    output: str | None = None
    """JSONL to write: each input row with "id" and "generated" added. Rows that it has already are
    not asked again."""
    max_new_tokens: int | None = None
    """Longest answer in tokens (default 256; 1024 for a model trained on category paths)."""
    temperature: float | None = None
    """0 is greedy (default 0; 0.1 for paths)."""
    top_p: float | None = None
    """Nucleus sampling: the smallest set of tokens with this much probability (default 1, all; 0.9
    for paths)."""
    top_k: int = 0
    """Sample from the k most probable tokens only; 0: all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens seen in the prompt or answer become less likely (CTRL, arXiv 1909.05858)."""
    stop: tuple[str, ...] | None = None
    """Answers end before any of these strings (default none; an empty line for paths). A newline:
    --stop $'\\n'."""
    max_time: float | None = None
    """Stop after this many seconds; the same command resumes the job later."""
    num_samples: int = 1
    """Answers per prompt."""
    batch_size: int = 16
    """Answers decoded together. It does not change them, except through rounding in 16 bits."""
    seed: int = 0
    """The random draws of each answer are a function of the seed and the answer's number."""
    raw: bool = False
    """Give the prompt to the model as it is, without the chat template."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute dtype."""
    bits: Literal[16, 8, 4] | None = None
    """Width of the linear layers' weights; default: that of the base in the adapter's training,
    or that of the model's files."""
    fold: bool = True
    """Merge the adapter into 16-bit weights first, as merge.py does: faster. --no-fold keeps it
    beside them, as in training."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    metrics: tuple[str, ...] = ()
    """Compare the answers with the rows' own: loss ppl exact_match bleu chrf rouge meteor
    edit_distance numeric graph. Printed and written to OUTPUT.metrics.json; graph also writes the
    answers' paths as a graph, to OUTPUT.graph.json."""
    prune_on: str | None = None
    """With --metrics graph: answers to an evaluation set (an earlier --output). The pruning
    thresholds (OLLM's) with the best edge F1 there are applied here."""
    judge: str | None = None
    """URL of an OpenAI-compatible endpoint that scores each answer; its key is read from the
    environment, OPENAI_API_KEY."""
    judge_model: str = ""
    """Name of the judge's model."""
    rubric: str | None = None
    """JSON with the criteria: see examples/rubric.json."""
    judge_requests: int = 8
    """Requests to the judge at once."""


def main(args: Args) -> int:
    """Answer a prompt, the rows of a file, or the lines of a chat; return the exit code."""
    check(args)
    rubric = None
    if args.judge:
        rubric = check_judge(args.judge, args.judge_model, args.rubric or "")

    if args.input is not None and args.output is not None:
        return answer_file(args, args.input, args.output, rubric)
    if args.prompt is not None:
        return answer_prompt(args, args.prompt)
    check_stdin()  # before the model is loaded
    chat(load(args))
    return 0


def answer_file(args: Args, source: str, output: str, rubric: Rubric | None) -> int:
    """Answer the rows of `source` that have no answer in `output` yet, then score all answers."""
    rows = read_input_rows(source)
    if not rows:
        raise UserError(f"--input: {source!r} has no rows")
    if args.metrics:
        data = read_data_config(args.model, args.adapter, args.revision, args.raw)
        score_answers.check_references(source, rows, data, args.metrics)

    # a process that has finished its share waits for the others, possibly for days
    timeout = datetime.timedelta(days=7)
    distributed.init_process_group(distributed.default_device(), timeout=timeout)
    samples = wanted_samples(rows, args.num_samples)
    job = Job(output, job_settings(args), [sample.key for sample in samples])
    check_rows_unchanged(samples, job, source, output)

    generator = None
    todo = [sample for sample in samples if sample.key not in job.done]
    if todo:
        if len(todo) < len(samples):
            num_done = len(samples) - len(todo)
            distributed.log(f"{num_done} of {len(samples)} answers are there already")
        generator = load(args)
        prompts = encode_prompts(generator, rows, source)
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
    message = f"{len(answers)} of {len(samples)} answers: {output}"
    if len(answers) < len(samples):
        message += "; the same command goes on"
    distributed.log(message)
    distributed.destroy_process_group()
    if distributed.rank() == 0 and answers:  # the other processes are done
        score(args, source, Path(output), answers, generator, rubric)
    return 0


def score(
    args: Args,
    source: str,
    output: Path,
    answers: list[dict],
    generator: TextGenerator | None,
    rubric: Rubric | None,
) -> None:
    """Score answers with --metrics and --judge.

    Args:
        args: the command's arguments.
        source: the input file.
        output: the output file; figures and verdicts are written beside it.
        answers: its rows.
        generator: the model if it is loaded already; None: it is loaded here if --metrics has loss
            or ppl.
        rubric: the judge's criteria, with --judge.
    """
    if generator is not None:
        data = generator.data
    else:
        data = read_data_config(args.model, args.adapter, args.revision, args.raw)

    if args.metrics:
        tokenizer: Tokenizer | None
        if generator is not None:
            tokenizer = generator.tokenizer
        else:
            tokenizer = score_answers.find_tokenizer(args.model, args.adapter, args.revision)
        references = score_answers.visible_references(answers, data, tokenizer)
        figures = score_answers.text_figures(answers, references, args.metrics)
        if set(args.metrics) & set(score_answers.MODEL_METRICS):
            if generator is None:
                generator = load(args)
            figures |= score_answers.model_figures(generator, source, args.metrics)
        if "graph" in args.metrics:
            thresholds = None
            if args.prune_on:
                thresholds = score_answers.find_thresholds(args.prune_on, data)
            graph_file = output.with_name(output.stem + ".graph.json")
            figures |= score_answers.graph_figures(answers, references, thresholds, graph_file)
        score_answers.report_figures(figures, output)

    if args.judge and rubric is not None:
        endpoint = JudgeEndpoint(args.judge, args.judge_model, args.judge_requests)
        score_answers.judge_answers(output, endpoint, rubric, data)


def answer_prompt(args: Args, prompt: str) -> int:
    """Print the answers to one prompt."""
    generator = load(args)
    ids = generator.encode_prompt({"prompt": prompt})
    prompts = [ids] * args.num_samples
    answers = dict(generator.stream(prompts, range(args.num_samples)))
    texts = [generator.text_so_far(ids, answer) for _, answer in sorted(answers.items())]
    print("\n---\n".join(texts))
    return 0


def load(args: Args) -> TextGenerator:
    """Load the model, its tokenizer, the form of its prompts and the sampling settings."""
    if args.adapter is not None:
        adapter_config = read_json(resolve(args.adapter) / "adapter_config.json")
        base = adapter_config.get("base_model_name_or_path")
        if base and Path(base).resolve() != Path(args.model).resolve():
            distributed.log(
                f"note: the adapter {args.adapter} was trained over {base}, not over {args.model}"
            )

    model, tokenizer = minilora.load(
        args.model, args.adapter, args.dtype, args.bits, revision=args.revision
    )
    if args.fold:
        merge_adapters(model)
    data = read_data_config(args.model, args.adapter, args.revision, args.raw, tokenizer)
    params = sampling_params(args, data)
    return TextGenerator(model, tokenizer, data, params, args.batch_size)


def sampling_params(args: Args, data: DataConfig) -> SamplingParams:
    """Return the sampling settings: defaults for the data format, replaced by the flags given."""
    defaults = PATHS_DEFAULTS if data.format == "paths" else SamplingParams()
    values = {name: getattr(args, name) for name in SAMPLING_FLAGS}
    given = {name: value for name, value in values.items() if value is not None}
    return dataclasses.replace(defaults, **given)


def job_settings(args: Args) -> dict:
    """Return what decides the answers, besides the rows: flags, and when the weights changed."""
    settings = {name: getattr(args, name) for name in DECISIVE_FLAGS}
    settings["written"] = weight_file_times(args.model, args.adapter, args.revision)
    return settings


def check(args: Args) -> None:
    """Raise UserError for arguments that are out of range or contradict each other."""
    _check_files(args)
    _check_numbers(args)
    _check_scoring(args)


def _check_files(args: Args) -> None:
    """Check that there is one source of prompts at most, and that the output can be written."""
    if args.input:
        _require(
            args.prompt is None,
            "give either --prompt TEXT or --input FILE.jsonl --output FILE.jsonl",
        )
    _require((args.input is None) == (args.output is None), "--input and --output go together")
    if not args.output:
        return
    target = Path(args.output)
    name = f"--output: {args.output!r}"
    _require(target.absolute().parent.is_dir(), f"{name} is in a directory that does not exist")
    _require(not target.is_dir(), f"{name} is a directory; name a file in it")
    if target.exists():
        _require(target.is_file(), f"{name} is not a regular file")
    _require(os.access(target.resolve().parent, os.W_OK), f"{name} cannot be written there")
    if args.input:
        is_input = Path(args.input).resolve() == target.resolve()
        _require(not is_input, "--output: is the same file as --input")


def _check_numbers(args: Args) -> None:
    """Check the values of the flags for sampling and batches."""
    try:
        sampling_params(args, DataConfig())
    except UserError as error:  # its message begins with the name of the flag
        raise UserError(f"--{error}") from error
    _require(args.temperature != math.inf, "--temperature must be finite")
    _require(args.num_samples >= 1, "--num_samples must be at least 1")
    _require(args.batch_size >= 1, "--batch_size must be at least 1")
    _require(args.judge_requests >= 1, "--judge_requests must be at least 1")


def _check_scoring(args: Args) -> None:
    """Check the arguments for metrics and for the judge."""
    if args.metrics or args.judge:
        _require(args.input is not None, "--metrics and --judge need --input and --output")
    if args.judge_model or args.rubric:
        _require(args.judge is not None, "--judge_model and --rubric need --judge URL")
    if args.judge:
        _require(bool(args.rubric), "--judge needs --rubric FILE: see examples/rubric.json")
    if args.prune_on:
        _require("graph" in args.metrics, "--prune_on needs --metrics graph")
        _require(Path(args.prune_on).is_file(), f"--prune_on: {args.prune_on!r} does not exist")
    check_metrics(args.metrics, "--metrics")


def _require(holds: bool, message: str) -> None:
    """Raise UserError with the message unless a condition holds."""
    if not holds:
        raise UserError(message)


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Args, description=__doc__, use_underscores=True)))
