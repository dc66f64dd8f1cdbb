"""The arguments of infer.py by group, and their checks.

Flags have no prefix: `args.sampling.temperature` is --temperature. Each class below is an argument
group of `--help`.
"""

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from minilora.config import DataConfig, RowFormat, config_fields
from minilora.errors import UserError, require
from minilora.generation.sampling import SamplingParams

# the sampling settings for a model that was trained on category paths: OLLM's (arXiv 2410.23584)
PATHS_DEFAULTS = SamplingParams(max_new_tokens=1024, temperature=0.1, top_p=0.9, stop=("\n\n",))

FORM_FIELDS = tuple(name for name, _ in config_fields(RowFormat()))
"""The fields of `DataConfig` that are the form of rows and prompts, and flags of `FormArgs`."""


@dataclass
class ModelArgs:
    """Which model, and how it computes."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Hub id, directory in HF layout, or a checkpoint of train.py."""
    adapter: str | None = None
    """PEFT adapter (directory or hub id) to put on the model."""
    revision: str | None = None
    """Branch, tag or commit of MODEL on the hub."""
    adapter_revision: str | None = None
    """Branch, tag or commit of --adapter on the hub."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute dtype."""
    bits: Literal[16, 8, 4] | None = None
    """Width of the linear layers' weights; default: that of the base in the adapter's training,
    or that of the model's files."""
    fold: bool = True
    """Merge the adapter into 16-bit weights first, as merge.py does: faster. --no-fold keeps it
    beside them, as in training."""


@dataclass
class QuestionArgs:
    """What to ask, and where the answers go."""

    prompt: str | None = None
    """Answer this one prompt; the answer goes to stdout. It is put into the form of training. Where
    that has several columns: a JSON object with them."""
    input: str | None = None
    """Rows with the columns of the training format, or {"prompt": ...}: JSONL, or any kind that
    data.train_file takes."""
    output: str | None = None
    """JSONL to write: each input row with "id" and "generated" added. Rows that it has already are
    not asked again."""
    limit: int | None = None
    """Ask only the first N rows of the input."""
    num_samples: int = 1
    """Answers per prompt."""
    batch_size: int = 16
    """Answers decoded together. It does not change them, except through rounding in 16 bits."""
    plan: bool = False
    """Show what answering needs, and stop: the memory by part, and what fits where. Neither weights
    nor a GPU are needed. --prompt or --input tells how long prompts are."""


@dataclass
class FormArgs:
    """The form of rows and prompts, in place of that of the model's training."""

    config: str | None = None
    """A config file of train.py: its data section is the form."""
    format: Literal["paths", "prompt", "messages", "text"] | None = None
    """As data.format."""
    prompt_template: str | None = None
    """As data.prompt_template."""
    response_template: str | None = None
    """As data.response_template; read by --metrics."""
    response_marker: str | None = None
    """As data.response_marker."""
    chat: bool | None = None
    """As data.chat."""
    chat_template: str | None = None
    """As data.chat_template: "mistral" or a jinja file."""
    raw: bool = False
    """Give the prompt to the model as it is, in no form at all."""


@dataclass
class SamplingArgs:
    """How tokens are chosen, and where answers end."""

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
    seed: int = 0
    """The random draws of each answer are a function of the seed and the answer's number."""
    max_time: float | None = None
    """Stop after this many seconds; the same command resumes the job later."""


@dataclass
class ScoringArgs:
    """Scores of the answers."""

    metrics: tuple[str, ...] = ()
    """Compare the answers with the rows' own: loss ppl exact_match bleu chrf rouge meteor
    edit_distance numeric graph ontology. Printed and written to OUTPUT.metrics.json; graph and
    ontology also write the answers' paths as a graph, to OUTPUT.graph.json and .html."""
    compare: str | None = None
    """With --metrics: an earlier --output over the same rows. The figures of both are shown beside
    each other, over the rows that both answered."""
    judge: str | None = None
    """URL of an OpenAI-compatible endpoint that scores each answer; its key is read from the
    environment, OPENAI_API_KEY."""
    judge_model: str = ""
    """Name of the judge's model."""
    rubric: str | None = None
    """JSON with the criteria: see examples/rubric.json."""
    judge_requests: int = 8
    """Requests to the judge at once."""


@dataclass
class OntologyArgs:
    """The graph of the answers' category paths: --metrics graph (names only) and ontology (OLLM's
    figures, which compare titles by an embedder)."""

    root: str | None = None
    """Only lines that begin with this name count (default: that of --reference_graph, or the one
    that all rows' paths begin with)."""
    reference_graph: str | None = None
    """What --metrics ontology compares with: node-link JSON with a root (default: the rows' own
    paths)."""
    embedder: str | None = None
    """Sentence-transformers model, directory or hub id (default
    sentence-transformers/all-MiniLM-L6-v2)."""
    prune_on: str | None = None
    """Prune the graph, too: answers to an evaluation set (an earlier --output), on which OLLM's
    thresholds are chosen."""
    prune_reference: str | None = None
    """The graph that --prune_on's answers are compared with, as --reference_graph (default: the
    paths of its rows)."""
    prune_for: Literal["literal_f1", "fuzzy_f1", "continuous_f1", "graph_f1"] | None = None
    """The figure that --prune_on makes as large as possible (default continuous_f1; with --metrics
    graph alone it is the F1 of edges)."""
    prune: Literal["wikipedia", "arxiv"] | None = None
    """Prune the graph, too, with the thresholds that OLLM published for this dataset."""
    prune_rule: Literal["paper", "code"] | None = None
    """How the thresholds are read: as in OLLM's paper (default), or as in its code."""


@tyro.conf.configure(tyro.conf.OmitArgPrefixes)
@dataclass
class Args:
    """Generate text with a model: for one prompt, for the rows of a file, or in a chat."""

    model: ModelArgs
    question: QuestionArgs = field(default_factory=QuestionArgs)
    form: FormArgs = field(default_factory=FormArgs)
    sampling: SamplingArgs = field(default_factory=SamplingArgs)
    scoring: ScoringArgs = field(default_factory=ScoringArgs)
    ontology: OntologyArgs = field(default_factory=OntologyArgs)


def given_form(form: FormArgs) -> dict[str, Any]:
    """Return the fields of `DataConfig` that flags replace, and their values."""
    values = {name: getattr(form, name) for name in (*FORM_FIELDS, "chat_template")}
    return {name: value for name, value in values.items() if value is not None}


def sampling_params(args: SamplingArgs, data_format: str) -> SamplingParams:
    """Return the sampling settings: defaults for the data format, replaced by the flags given."""
    defaults = PATHS_DEFAULTS if data_format == "paths" else SamplingParams()
    given = {name: value for name, value in vars(args).items() if value is not None}
    return dataclasses.replace(defaults, **given)


def job_settings(args: Args) -> dict:
    """Return the flags that decide an answer: a job can be resumed only with the same values.

    --batch_size is not among them, because it changes answers only through rounding in 16 bits;
    nor are the flags of the form, because it counts by its values (see prompting.py).
    """
    model, sampling = args.model, args.sampling
    settings: dict = {
        "model": model.name,
        "adapter": model.adapter,
        "revision": model.revision,
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "repetition_penalty": sampling.repetition_penalty,
        "stop": sampling.stop,
        "num_samples": args.question.num_samples,
        "seed": sampling.seed,
        "raw": args.form.raw,
        "dtype": model.dtype,
        "bits": model.bits,
        "fold": model.fold,
    }
    if model.adapter_revision is not None:  # outputs that older versions began do not have it
        settings["adapter_revision"] = model.adapter_revision
    return settings


# ---- checks


def check(args: Args) -> None:
    """Raise UserError for arguments that are out of range or contradict each other."""
    _check_files(args.question)
    _check_numbers(args)
    _check_form_flags(args.form)
    _check_scoring(args)
    _check_ontology(args.ontology, args.scoring.metrics)
    _check_other_outputs(args)


def _check_files(question: QuestionArgs) -> None:
    """Check that there is one source of prompts at most, and that the output can be written."""
    if question.input:
        require(
            question.prompt is None,
            "give either --prompt TEXT or --input FILE.jsonl --output FILE.jsonl",
        )
    both_or_none = (question.input is None) == (question.output is None)
    require(both_or_none or question.plan, "--input and --output go together")
    require(
        question.limit is None or question.input is not None,
        "--limit is how many rows of --input to ask: give --input and --output",
    )
    if question.output is None or question.plan:  # a plan writes nothing
        return
    target = Path(question.output)
    name = f"--output: {question.output!r}"
    require(target.absolute().parent.is_dir(), f"{name} is in a directory that does not exist")
    require(not target.is_dir(), f"{name} is a directory; name a file in it")
    if target.exists():
        require(target.is_file(), f"{name} is not a regular file")
    require(os.access(target.resolve().parent, os.W_OK), f"{name} cannot be written there")
    if question.input:
        is_input = Path(question.input).resolve() == target.resolve()
        require(not is_input, "--output: is the same file as --input")


def _check_numbers(args: Args) -> None:
    """Check the values of the flags for sampling and batches."""
    try:
        sampling_params(args.sampling, "prompt")
    except UserError as error:  # its message begins with the name of the flag
        raise UserError(f"--{error}") from error
    question = args.question
    require(args.sampling.temperature != math.inf, "--temperature must be finite")
    require(question.limit is None or question.limit >= 1, "--limit must be at least 1")
    require(question.num_samples >= 1, "--num_samples must be at least 1")
    require(question.batch_size >= 1, "--batch_size must be at least 1")
    require(args.scoring.judge_requests >= 1, "--judge_requests must be at least 1")


def _check_form_flags(form: FormArgs) -> None:
    """Check that there is one form of the prompts."""
    names = list(given_form(form))
    if form.config is not None:
        names.insert(0, "config")
    flags = ", ".join(f"--{name}" for name in names)
    require(not form.raw or not names, f"--raw leaves prompts as they are: leave out {flags}")
    if form.chat_template not in (None, "mistral"):
        require(
            Path(form.chat_template).is_file(),
            f"--chat_template: {form.chat_template!r} is neither 'mistral' nor a file",
        )


def _check_scoring(args: Args) -> None:
    """Check the arguments for metrics and for the judge."""
    scoring = args.scoring
    if scoring.metrics or scoring.judge:
        has_input = args.question.input is not None
        require(has_input, "--metrics and --judge need --input and --output")
    if scoring.judge_model or scoring.rubric:
        require(scoring.judge is not None, "--judge_model and --rubric need --judge URL")
    if scoring.judge:
        require(scoring.rubric, "--judge needs --rubric FILE: see examples/rubric.json")
    if scoring.compare:
        require(scoring.metrics, "--compare needs --metrics: what is to be compared")
        _require_file("--compare", scoring.compare)


def _check_ontology(ontology: OntologyArgs, metrics: tuple[str, ...]) -> None:
    """Check that the flags for the answers' graph have an effect, and name files."""
    default = OntologyArgs()
    given = [name for name, value in vars(ontology).items() if value != getattr(default, name)]
    of_both = ("prune_on", "prune", "prune_rule")
    for name in given:
        if name in of_both:
            has_graph = "graph" in metrics or "ontology" in metrics
            require(has_graph, f"--{name} needs --metrics graph or ontology")
        else:
            require("ontology" in metrics, f"--{name} needs --metrics ontology")

    require(
        ontology.prune is None or ontology.prune_on is None,
        "--prune is published thresholds, and --prune_on chooses some: give only one of them",
    )
    for name in ("prune_reference", "prune_for"):
        require(
            name not in given or ontology.prune_on is not None, f"--{name} needs --prune_on ANSWERS"
        )
    require(
        "prune_rule" not in given or ontology.prune or ontology.prune_on,
        "--prune_rule needs --prune or --prune_on: nothing is pruned",
    )
    for name in ("reference_graph", "prune_on", "prune_reference"):
        path = getattr(ontology, name)
        if path is not None:
            _require_file(f"--{name}", path)


def _check_other_outputs(args: Args) -> None:
    """Check that the earlier outputs which flags name are not the one that is written."""
    output = Path(args.question.output or "").resolve()
    for flag, path in (("compare", args.scoring.compare), ("prune_on", args.ontology.prune_on)):
        is_output = path is not None and Path(path).resolve() == output
        require(not is_output, f"--{flag}: is the same file as --output")


def check_samples_differ(num_samples: int, params: SamplingParams) -> None:
    """Raise UserError if several answers to a prompt would all be the same."""
    require(
        num_samples == 1 or params.temperature > 0,
        f"--num_samples {num_samples} with temperature 0: the answers would all be the same; "
        f"did you mean --limit {num_samples}? (To sample, give --temperature.)",
    )


def check_form_in_use(data: DataConfig, given: FormArgs) -> None:
    """Check the form that flags have changed.

    Args:
        data: the form in use.
        given: the flags.

    Raises:
        UserError: a flag would have no effect, or contradicts another setting.
    """
    form = f"the form is {data.format!r}"
    if given.prompt_template is not None or given.response_template is not None:
        require(
            data.format == "prompt",
            f"--prompt_template and --response_template need --format prompt, and {form}",
        )
    if given.response_marker is not None:
        require(data.format == "text", f"--response_marker needs --format text, and {form}")
        require(given.response_marker != "", "--response_marker is empty; leave it out")
    if given.chat is not None:
        require(data.format != "text", f"--chat has no effect: {form}")
    require(
        data.format != "messages" or data.chat,
        "--chat False contradicts the form 'messages': its turns need a chat template",
    )
    if given.chat_template is not None:
        require(data.is_chat, f"--chat_template has no effect: {form}, without chat")


def _require_file(flag: str, path: str) -> None:
    """Raise UserError unless a flag names a file."""
    require(Path(path).is_file(), f"{flag}: {path!r} does not exist")
