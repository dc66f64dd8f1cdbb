"""Ask a model: python infer.py MODEL --prompt TEXT, or --input F.jsonl --output G.jsonl.

MODEL is a hub id, a directory in HF layout, or one of our checkpoints, whose base is found by itself. Rows of a file are
put to the model in the very form it was trained with, if it comes from a run of ours.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tqdm
import tyro

import minilora
from minilora.checkpoint import STATE
from minilora.config import DataConfig, UserError
from minilora.generate import generate_ids
from minilora.running.examples import RowError, article, fill_template, parse, string_of, turns_of
from minilora.running.settings import run_main
from minilora.tokenizer import Tokenizer
from minilora.weights import read_json


@dataclass
class Args:
    """Generate text with a model, for one prompt or for the rows of a file."""

    model: Annotated[str, tyro.conf.Positional]
    """Hub id, directory in HF layout, or a checkpoint of ours."""
    adapter: str | None = None
    """PEFT adapter (directory or hub id) to put on the model."""
    prompt: str | None = None
    """Ask this one thing; the answer goes to stdout."""
    input: str | None = None
    """JSONL with the columns of the training format, or {"prompt": ...}."""
    output: str | None = None
    """JSONL to write: each input row with "id" and "generated" added."""
    max_new_tokens: int = 256
    """Longest answer in tokens."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling."""
    stop: tuple[str, ...] = ()
    """Answers end before any of these strings."""
    num_samples: int = 1
    """Answers per prompt."""
    batch_size: int = 16
    """Prompts decoded together."""
    seed: int = 0
    """Each sample's randomness is a function of the seed and its number."""
    raw: bool = False
    """Give the prompt to the model as it is, without the chat template."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute dtype."""
    bits: Literal[16, 8, 4] | None = None
    """Width of the linear layers' weights; default: as the adapter was trained over, or as the model is stored."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""


def main(args: Args) -> int:
    check(args)
    rows = [(1, {"prompt": args.prompt})] if args.prompt is not None else read_rows(args.input or "")
    model, tokenizer = minilora.load(args.model, args.adapter, args.dtype, args.bits, revision=args.revision)
    data = DataConfig(format="prompt", chat=False) if args.raw else training_format(args, tokenizer)
    prompts = []
    for number, row in rows:
        try:
            prompts += [tokenizer.encode(ask(row, data, tokenizer)).ids] * args.num_samples
        except RowError as error:
            raise UserError(f"{args.input}:{number}: {error}") from error
    with tqdm.tqdm(desc="generating", unit=" tokens", disable=args.prompt is not None) as bar:
        answers = generate_ids(
            model, prompts, tokenizer, args.max_new_tokens, args.temperature, args.top_p, args.stop, tokenizer.stop_ids(),
            args.seed, batch_size=args.batch_size, progress=bar.update,
        )  # fmt: skip
    texts = [answer.text for answer in answers]
    if args.prompt is not None:
        print("\n---\n".join(texts))
        return 0
    with open(args.output or "", "w", encoding="utf-8") as file:
        for i, text in enumerate(texts):
            _, row = rows[i // args.num_samples]
            sample = {"sample": i % args.num_samples} if args.num_samples > 1 else {}
            file.write(json.dumps({"id": i // args.num_samples, **row, **sample, "generated": text}, ensure_ascii=False) + "\n")
    print(f"{len(texts)} answers: {args.output}", file=sys.stderr)
    return 0


def check(args: Args) -> None:
    """Refuse what contradicts itself, before the model is loaded."""
    if (args.prompt is None) == (args.input is None):
        raise UserError("give either --prompt TEXT or --input FILE.jsonl --output FILE.jsonl")
    if (args.input is None) != (args.output is None):
        raise UserError("--input and --output go together")
    if args.output is not None and not Path(args.output).absolute().parent.is_dir():
        raise UserError(f"--output: the directory of {args.output!r} does not exist")
    if args.output is not None and Path(args.output).is_dir():
        raise UserError(f"--output: {args.output!r} is a directory; name a file in it")
    if "" in args.stop:
        raise UserError("--stop: an empty string would end every answer at once")
    if args.input is not None and not Path(args.input).is_file():
        raise UserError(f"--input: {args.input!r} does not exist")
    if args.temperature < 0 or not 0 < args.top_p <= 1 or min(args.max_new_tokens, args.num_samples, args.batch_size) < 1:
        raise UserError("temperature must be >= 0, top_p in (0, 1], max_new_tokens, num_samples and batch_size at least 1")


def read_rows(path: str) -> list[tuple[int, dict]]:
    """(line number, row) of every line that is not blank."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file.read().splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = parse(line)
            except RowError as error:
                raise UserError(f"{path}:{number}: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
            rows.append((number, row))
    return rows


def training_format(args: Args, tokenizer: Tokenizer) -> DataConfig:
    """The data settings of the run that made the model or adapter; else prompts, in the model's chat form if it has one."""
    for directory in filter(None, (args.adapter, args.model)):
        for name, path in ((STATE, ("config", "data")), ("minilora.json", ("data",))):
            if (Path(directory) / name).is_file():
                values = read_json(Path(directory) / name)
                for key in path:
                    values = values[key]
                known = {f.name for f in dataclasses.fields(DataConfig)}
                return DataConfig(**{k: v for k, v in values.items() if k in known})
    return DataConfig(format="prompt", chat=tokenizer.has_template)


def ask(row: dict, data: DataConfig, tokenizer: Tokenizer) -> str:
    """The text that asks a model for a row's response, in the form `build` trains it in. A row with only a "prompt" is
    a user's turn whatever the format (format text: plain text). Raises RowError naming the field."""
    if data.format == "messages" and "prompt" not in row:
        turns = turns_of(row)
        return tokenizer.render(turns[:-1] if turns[-1]["role"] == "assistant" else turns, add_generation_prompt=True)
    if data.format == "text":
        text = string_of(row, "prompt" if "prompt" in row else "text")
        head, marker, _ = text.rpartition(data.response_marker or "\0")
        return head + marker if marker else text
    if data.format == "paths" and "title" in row:
        prompt = article(row) if data.chat else article(row) + "\n"
    else:
        try:
            prompt = fill_template(data.prompt_template, row) if data.format == "prompt" else string_of(row, "prompt")
        except RowError:
            if row.keys() != {"prompt"}:
                raise
            prompt = string_of(row, "prompt")
    return tokenizer.render([{"role": "user", "content": prompt}], add_generation_prompt=True) if data.chat else prompt


if __name__ == "__main__":
    run_main(lambda: main(tyro.cli(Args, description=__doc__, use_underscores=True)))
