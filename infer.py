"""Ask a model: python infer.py MODEL --prompt TEXT, or --input F.jsonl --output G.jsonl, or with neither, chat with it.

MODEL is a hub id, a directory in HF layout, or one of our checkpoints, whose base is found by itself. Rows of a file are
put to the model in the very form it was trained with, if it comes from a run of ours. A stopped job goes on with the same
command; under torchrun each process answers its share. --metrics and --judge then say what the answers are worth.
"""

import dataclasses
import datetime
import functools
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tqdm
import tyro

import minilora
from minilora import dist
from minilora.config import DataConfig, RunError, UserError
from minilora.evaluation import graph, judge, metrics
from minilora.evaluation.loss import loss_and_ppl, loss_sums
from minilora.generate import stream
from minilora.lora import fold
from minilora.model import CausalLM
from minilora.running.examples import RowError, ask, question, reference, references_of, string_of, trained_format
from minilora.running.jobs import Job, Key, numbered, read_rows
from minilora.running.reading import table, tokenise
from minilora.running.settings import run_main
from minilora.running.sources import data_files
from minilora.tokenizer import Tokenizer
from minilora.weights import read_json, resolve

DEFAULTS = {"max_new_tokens": 256, "temperature": 0.0, "top_p": 1.0, "stop": ()}
PATHS_DEFAULTS = {"max_new_tokens": 1024, "temperature": 0.1, "top_p": 0.9, "stop": ("\n\n",)}  # OLLM's (arXiv 2410.23584)
# what decides an answer; another batch size does not, but for rounding
DECIDES = (
    "model", "adapter", "revision", "max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "stop",
    "num_samples", "seed", "raw", "dtype", "bits", "fold",
)  # fmt: skip


@dataclass
class Args:
    """Generate text with a model: for one prompt, for the rows of a file, or in a chat."""

    model: Annotated[str, tyro.conf.Positional]
    """Hub id, directory in HF layout, or a checkpoint of ours."""
    adapter: str | None = None
    """PEFT adapter (directory or hub id) to put on the model."""
    prompt: str | None = None
    """Ask this one thing; the answer goes to stdout."""
    input: str | None = None
    """Rows with the columns of the training format, or {"prompt": ...}: JSONL, or any kind that data.train_file takes."""
    output: str | None = None
    """JSONL to write: each input row with "id" and "generated" added. Rows that it has already are not asked again."""
    max_new_tokens: int | None = None
    """Longest answer in tokens (default 256; 1024 for a model trained on category paths)."""
    temperature: float | None = None
    """0 is greedy (default 0; 0.1 for paths)."""
    top_p: float | None = None
    """Nucleus sampling: the smallest set of tokens with this much probability (default 1, all; 0.9 for paths)."""
    top_k: int = 0
    """Sample from the k most probable tokens only; 0: all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens seen in the prompt or answer become less likely (CTRL, arXiv 1909.05858)."""
    stop: tuple[str, ...] | None = None
    """Answers end before any of these strings (default none; an empty line for paths). A newline: --stop $'\\n'."""
    max_time: float | None = None
    """Stop after so many seconds; the same command goes on later."""
    num_samples: int = 1
    """Answers per prompt."""
    batch_size: int = 16
    """Answers decoded together; in float32 no answer depends on it, in 16 bits rounding does."""
    seed: int = 0
    """Each sample's randomness is a function of the seed and its number."""
    raw: bool = False
    """Give the prompt to the model as it is, without the chat template."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute dtype."""
    bits: Literal[16, 8, 4] | None = None
    """Width of the linear layers' weights; default: as the adapter was trained over, or as the model is stored."""
    fold: bool = True
    """Fold the adapter into 16-bit weights first, as merge.py does: faster. --no-fold keeps it beside them, as in training."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    metrics: tuple[str, ...] = ()
    """Compare the answers with the rows' own: loss ppl exact_match bleu chrf rouge meteor edit_distance numeric graph. Printed
    and written to OUTPUT.metrics.json; graph also writes the answers' paths as a graph, to OUTPUT.graph.json."""
    prune_on: str | None = None
    """With --metrics graph: answers to an evaluation set (an earlier --output). The pruning thresholds (OLLM's) with the best
    edge F1 there are applied here."""
    judge: str | None = None
    """URL of an OpenAI-compatible endpoint that scores each answer; its key is read from the environment, OPENAI_API_KEY."""
    judge_model: str = ""
    """Name of the judge's model."""
    rubric: str | None = None
    """JSON with the criteria: see examples/rubric.json."""
    judge_requests: int = 8
    """Requests to the judge at once."""


def main(args: Args) -> int:
    check(args := dataclasses.replace(args))  # load fills its defaults in
    rubric = judge.check(args.judge, args.judge_model, args.rubric or "") if args.judge else None
    if args.input is None:
        return ask_once(args, args.prompt) if args.prompt is not None else chat(args)
    rows = numbered(args.input)
    if not rows:
        raise UserError(f"--input: {args.input!r} has no rows")
    if args.metrics:  # a row without a reference, or one that a metric cannot read, shows now
        references = references_of(args.input, rows, trained_format(args.model, args.adapter, args.revision, args.raw))
        metrics.score([m for m in args.metrics if m in ("numeric", "graph")], references, references)
    keys: list[Key] = [(row["id"], sample) for _, row in rows for sample in range(args.num_samples)]
    dist.init(dist.default_device(), timeout=datetime.timedelta(days=7))  # shares take their own time
    job = Job(args.output or "", settings_of(args), keys)
    for (number, row), sample in itertools.product(rows, range(args.num_samples)):
        both = answered(args, row, sample, ""), job.done.get((row["id"], sample), {})
        now, then = ({k: json.dumps(v) for k, v in columns.items() if k != "generated"} for columns in both)
        if then and (changed := [k for k in now | then if now.get(k) != then.get(k)]):
            raise UserError(f"{args.input}:{number}: {changed[0]} changed since {args.output} was begun: name another --output")
    loaded = None
    todo = [i for i, key in enumerate(keys) if key not in job.done]
    if todo:
        if len(todo) < len(keys):
            dist.log(f"{len(keys) - len(todo)} of {len(keys)} answers are there already")
        loaded = load(args)
        try:
            stopped = answer_rows(args, rows, todo, job, *loaded)
        except OSError as error:
            raise RunError(f"{args.output}: {error}; what is answered is kept, and the same command goes on") from error
        if stopped:
            print(f"stopped: {args.output} keeps what is answered; the same command goes on", file=sys.stderr)
            return 130
    answers = job.finish()
    dist.log(f"{len(answers)} of {len(keys)} answers: {args.output}" + "; the same command goes on" * (len(answers) < len(keys)))
    dist.finish()
    if dist.rank() == 0 and answers and (args.metrics or rubric):
        evaluate(args, answers, loaded, rubric)
    return 0


def check(args: Args) -> None:
    """Refuse what contradicts itself, before the model is loaded."""
    source, target, top_p = args.input, Path(args.output or ""), 1 if args.top_p is None else args.top_p
    longest = 1 if args.max_new_tokens is None else args.max_new_tokens
    least = min(longest, args.num_samples, args.batch_size, args.judge_requests)
    problems = [
        (args.prompt is not None and source, "give either --prompt TEXT or --input FILE.jsonl --output FILE.jsonl"),
        ((source is None) != (args.output is None), "--input and --output go together"),
        (not target.absolute().parent.is_dir(), f"--output: the directory of {args.output!r} does not exist"),
        (args.output and target.is_dir(), f"--output: {args.output!r} is a directory; name a file in it"),
        (args.output and target.exists() and not target.is_file(), f"--output: {args.output!r} is no regular file"),
        (args.output and not os.access(target.resolve().parent, os.W_OK), f"--output: {args.output!r} cannot be written there"),
        (source and Path(source).resolve() == target.resolve(), "--output: is the same file as --input"),
        ("" in (args.stop or ()), "--stop: an empty string would end every answer at once"),
        (not 0 <= (args.temperature or 0) < float("inf"), "--temperature must be >= 0"),
        (min(args.seed, args.top_k) < 0 or not 0 < top_p <= 1, "--seed and --top_k must be >= 0, --top_p in (0, 1]"),
        (least < 1, "--max_new_tokens, --num_samples, --batch_size and --judge_requests must be at least 1"),
        (not 0 < args.repetition_penalty < float("inf"), "--repetition_penalty must be above 0"),
        (args.max_time is not None and not args.max_time > 0, "--max_time must be above 0"),
        (source is None and (args.metrics or args.judge), "--metrics and --judge need --input and --output"),
        (args.judge is None and (args.judge_model or args.rubric), "--judge_model and --rubric need --judge URL"),
        (args.judge and not args.rubric, "--judge needs --rubric FILE: see examples/rubric.json"),
        (args.prune_on and "graph" not in args.metrics, "--prune_on needs --metrics graph"),
        (args.prune_on and not Path(args.prune_on).is_file(), f"--prune_on: {args.prune_on!r} does not exist"),
    ]  # fmt: skip
    for wrong, message in problems:
        if wrong:
            raise UserError(message)
    metrics.check(args.metrics, "--metrics")


def answered(args: Args, row: dict, sample: int, text: str) -> dict:
    """A row of the output."""
    row = {k: v for k, v in row.items() if k not in ("sample", "generated")}  # of an earlier output
    return {**row, **({"sample": sample} if args.num_samples > 1 else {}), "generated": text}


def settings_of(args: Args) -> dict:
    """What the answers are a function of, beside the rows: the settings, and when the model's files were last written."""
    places = [resolve(args.model, args.revision), *([resolve(args.adapter)] if args.adapter else [])]
    for config in [place / "adapter_config.json" for place in places]:
        if config.is_file() and Path(base := read_json(config).get("base_model_name_or_path") or "").is_dir():
            places.append(Path(base))
    weights = [f for place in places for f in sorted(place.glob("*model*.safetensors"))]
    return {name: getattr(args, name) for name in DECIDES} | {"written": [f.stat().st_mtime_ns for f in weights]}


def load(args: Args) -> tuple[CausalLM, Tokenizer, DataConfig]:
    """The model, its tokenizer, and the form of its training; sampling defaults are filled in."""
    named = read_json(resolve(args.adapter) / "adapter_config.json").get("base_model_name_or_path") if args.adapter else None
    if named and Path(named).resolve() != Path(args.model).resolve():
        dist.log(f"note: the adapter {args.adapter} was trained over {named}, not over {args.model}")
    model, tokenizer = minilora.load(args.model, args.adapter, args.dtype, args.bits, revision=args.revision)
    if args.fold:
        fold(model)
    data = trained_format(args.model, args.adapter, args.revision, args.raw, tokenizer)
    for name, value in (PATHS_DEFAULTS if data.format == "paths" else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return model, tokenizer, data


def answers_to(args: Args, model: CausalLM, tokenizer: Tokenizer, prompts: list[list[int]], indices: Sequence[int]):
    """`stream` with the settings of args."""
    return stream(
        model, prompts, tokenizer, args.max_new_tokens or 0, args.temperature or 0.0, args.top_p or 1.0, args.stop or (),
        tokenizer.stop_ids(), args.seed, indices, args.batch_size, args.top_k, args.repetition_penalty, args.max_time,
    )  # fmt: skip


def answer_rows(
    args: Args, rows: list[tuple[int, dict]], todo: list[int], job: Job, model: CausalLM, tokenizer: Tokenizer, data: DataConfig
) -> bool:  # fmt: skip
    """Answer this process's share of `todo` (numbers of samples), each written as it ends. Returns whether Ctrl-C stopped it."""
    prompts = []
    for number, row in rows:
        try:
            prompts.append(tokenizer.encode(ask(row, data, tokenizer)).ids)
            if not prompts[-1]:
                raise RowError("malformed", "the prompt is empty: there is nothing to continue")
        except (RowError, UserError) as error:  # the latter: the chat template refuses it
            raise UserError(f"{args.input}:{number}: {error}") from error
    longest, context = max(map(len, prompts)), model.config.rope.get("max_position_embeddings") or float("inf")
    if longest > context:
        dist.log(f"note: the longest prompt has {longest} tokens, more than the {context} positions the model was made for")
    longest_first = sorted(todo, key=lambda i: -len(prompts[i // args.num_samples]))
    mine = longest_first[dist.rank() :: dist.world_size()]
    tokens, cut, began = 0, 0, time.monotonic()
    with tqdm.tqdm(total=len(mine), desc="answering", unit=" rows", disable=dist.rank() > 0) as bar:
        try:
            for at, answer in answers_to(args, model, tokenizer, [prompts[i // args.num_samples] for i in mine], mine):
                tokens += 1
                if answer.finish_reason is None:
                    continue
                cut += answer.finish_reason == "length"
                place, sample = divmod(mine[at], args.num_samples)
                job.add(answered(args, rows[place][1], sample, answer.text))
                bar.set_postfix_str(f"{tokens / (time.monotonic() - began):,.0f} tokens/s", refresh=False)
                bar.update()
        except KeyboardInterrupt:
            return True
    if cut := sum(map(sum, dist.gather_objects([cut]))):
        dist.log(f"{cut} answers were cut off at {args.max_new_tokens} tokens (--max_new_tokens)")
    return False


def ask_once(args: Args, prompt: str) -> int:
    model, tokenizer, data = load(args)
    ids = tokenizer.encode(ask({"prompt": prompt}, data, tokenizer)).ids
    answers = dict(answers_to(args, model, tokenizer, [ids] * args.num_samples, range(args.num_samples)))
    print("\n---\n".join(a.text if a.finish_reason else tokenizer.decode_after(ids, a.ids) for _, a in sorted(answers.items())))
    return 0


def chat(args: Args) -> int:
    """Read a line, stream the answer, and so on; the conversation so far is part of each question."""
    if sys.stdin is None:
        raise UserError("nothing to read from: give --prompt, or --input and --output")
    model, tokenizer, data = load(args)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        import readline  # noqa: F401 - line editing and history for input()

        print("Ctrl-C cuts an answer off; /new begins a new conversation; Ctrl-D ends", file=sys.stderr)
    turns: list[dict] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return 0
        if not line.strip() or line.strip() == "/new":
            turns = [] if line.strip() else turns
            continue
        turns.append({"role": "user", "content": line})
        chat = data.chat and data.format != "text"
        prompt = tokenizer.render(turns, add_generation_prompt=True) if chat else line
        ids, shown = tokenizer.encode(prompt).ids, ""
        held = max(map(len, args.stop or ()), default=1) - 1  # these last characters may begin a stop string
        try:
            for _, answer in answers_to(args, model, tokenizer, [ids], [len(turns)]):
                text = answer.text if answer.finish_reason else tokenizer.decode_after(ids, answer.ids)
                safe = len(text) if answer.finish_reason else max(0, len(text.rstrip("\ufffd")) - held)
                print(text[len(shown) : safe], end="", flush=True)
                shown = text[: max(safe, len(shown))]
        except KeyboardInterrupt:
            pass
        print()
        turns.append({"role": "assistant", "content": shown})


def without(tokens: Iterable[str], text: str) -> str:
    return functools.reduce(lambda text, token: text.replace(token, ""), tokens, text)


def evaluate(args: Args, answers: list[dict], loaded: tuple | None, rubric: dict | None) -> None:
    """Metrics and verdicts of the answers: printed, and written beside them."""
    out = Path(args.output or "")
    data = loaded[2] if loaded else trained_format(args.model, args.adapter, args.revision, args.raw)
    if args.metrics:
        places = [*([resolve(args.adapter)] if args.adapter else []), resolve(args.model, args.revision)]
        places = [p for p in places if list(p.glob("tokenizer.[jm]*"))]
        shown = loaded[1] if loaded else Tokenizer(places[0]) if places else None
        specials = shown.specials.keys() - shown.backend.shown if shown else ()  # answers are shown without them
        texts, references = [row["generated"] for row in answers], [without(specials, reference(row, data)) for row in answers]
        figures: dict = {"answers": len(answers)} | metrics.score([m for m in args.metrics if m != "graph"], texts, references)
        if {"loss", "ppl"} & set(args.metrics):
            model, tokenizer, data = loaded or load(args)
            documents = tokenise({args.input or "": data_files(args.input or "", "input")}, data, tokenizer, "input")
            dist.log(table(documents.counts))
            if not len(documents):
                raise UserError(f"--metrics loss: no row of {args.input} is left to compute it over")
            starts, order = range(0, len(documents), args.batch_size), np.argsort(documents.lengths, kind="stable")
            sums = loss_sums(model, documents, [order[s : s + args.batch_size] for s in starts], model.head_weight.device)
            figures |= {k: v for k, v in loss_and_ppl(sums).items() if k in args.metrics} | {"loss/rows": len(documents)}
        if "graph" in args.metrics:
            thresholds = None
            if args.prune_on:
                tuning = read_rows(args.prune_on)
                wanted = references_of(args.prune_on, tuning, data)
                made = references_of(args.prune_on, tuning, data, lambda row, _: string_of(row, "generated"))
                thresholds, best = graph.search(graph.build(made), graph.build(wanted))
                dist.log(f"pruning: {thresholds}, edge F1 {best:.4f} on {args.prune_on}")
            found, paths = graph.score(texts, references, thresholds)
            figures |= {f"graph/{k}": v for k, v in found.items()}
            graph.write(paths, out.with_name(out.stem + ".graph.json"))
        print(metrics.table(figures))
        out.with_name(out.stem + ".metrics.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if rubric is not None:
        verdicts = out.with_name(out.stem + ".judge.jsonl")
        summary = judge.judge(
            out, verdicts, args.judge or "", args.judge_model, rubric, lambda row: question(row, data), args.judge_requests
        )
        print(summary.table())
        plain = json.loads(json.dumps(summary._asdict()), parse_constant=lambda nan: None)  # the spread of one answer
        out.with_name(out.stem + ".judge.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(lambda: main(tyro.cli(Args, description=__doc__, use_underscores=True)))
