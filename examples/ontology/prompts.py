r"""Write prompts that ask for an article's paths: python examples/ontology/prompts.py ROWS OUT.

    python examples/ontology/prompts.py out/wordnet/test.jsonl out/wordnet/test_1shot.jsonl \
        --shots 1 --examples out/wordnet/train.jsonl

It is for models that were not trained on paths. ROWS is a JSONL file of the format paths. OUT has
the same rows with "prompt", the task, K solved examples and the article, and "completion", the
row's own paths; columns with these names are replaced. infer.py asks OUT as rows of the format
prompt (docs/ontology.md has the command).
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jinja2
import tyro

from minilora.data.example import RowError, string_of
from minilora.data.paths import paths_of, write_paths
from minilora.errors import UserError, require
from minilora.exit_codes import run_script
from minilora.files import replace_file
from minilora.generation.jobs import Row, read_rows

DEFAULT_TEMPLATE = Path(__file__).with_name("few_shot.jinja")

Render = Callable[..., str]
"""A template's function from its variables to text."""


@dataclass
class Args:
    """Options of the command."""

    rows: Annotated[Path, tyro.conf.Positional]
    """JSONL with the articles to ask about: title, abstract, and paths unless there is --root."""
    out: Annotated[Path, tyro.conf.Positional]
    """JSONL to write."""
    shots: int = 0
    """Solved examples in each prompt."""
    examples: Path | None = None
    """JSONL of the format paths to draw the examples from: training rows, for a fair comparison."""
    template: Path = DEFAULT_TEMPLATE
    """Jinja template of a prompt. It is given root, title, abstract, and examples, each with title,
    abstract and paths (lists of names)."""
    root: str | None = None
    """The name that every path begins with (default: that of all rows' paths)."""
    seed: int = 0
    """Of the examples, which are drawn for each prompt anew."""


def main(args: Args) -> int:
    """Write each row with its prompt."""
    check(args)
    render = load_template(args.template)
    rows = read_articles(args.rows)
    examples = read_articles(args.examples) if args.examples is not None else []
    root = find_root(args, rows, examples)

    lines = []
    for i, (_, row) in enumerate(rows):
        drawn = draw_examples(row, examples, args.shots, f"{args.seed} {i}")
        try:
            prompt = render(root=root, title=row["title"], abstract=row["abstract"], examples=drawn)
        except jinja2.TemplateError as error:
            raise UserError(f"--template {args.template}: {error}") from error
        asked = {**row, "prompt": prompt}
        if "paths" in row:
            asked["completion"] = write_paths(row["paths"])
        lines.append(json.dumps(asked, ensure_ascii=False) + "\n")
    replace_file(args.out, "".join(lines))
    print(f"{args.out}: {len(rows)} prompts with {args.shots} examples each, root {root!r}")
    return 0


def check(args: Args) -> None:
    """Raise UserError for files that are not there, or flags that contradict each other."""
    require(args.rows.is_file(), f"ROWS: {str(args.rows)!r} does not exist")
    require(args.out.absolute().parent.is_dir(), f"OUT: {str(args.out.parent)!r} does not exist")
    require(args.out.resolve() != args.rows.resolve(), "OUT is the same file as ROWS")
    require(args.shots >= 0, "--shots must be at least 0")
    require(
        (args.shots > 0) == (args.examples is not None),
        "--shots K and --examples TRAIN.jsonl go together: K examples are drawn from that file",
    )
    if args.examples is not None:
        require(args.examples.is_file(), f"--examples: {str(args.examples)!r} does not exist")
    require(args.template.is_file(), f"--template: {str(args.template)!r} does not exist")


def load_template(path: Path) -> Render:
    """Return the function that fills a template in. Raises UserError for a faulty one."""
    environment = jinja2.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    try:
        return environment.from_string(path.read_text(encoding="utf-8")).render
    except (jinja2.TemplateError, ValueError) as error:
        raise UserError(f"--template {path}: {error}") from error


def read_articles(path: Path) -> list[Row]:
    """Read rows that have a title, an abstract, and paths or none. Raises UserError."""
    rows = read_rows(path)
    require(rows, f"{path} has no rows")
    for number, row in rows:
        try:
            string_of(row, "title")
            string_of(row, "abstract")
            if "paths" in row:
                paths_of(row)
        except RowError as error:
            raise UserError(f"{path}:{number}: {error}") from error
    return rows


def find_root(args: Args, rows: Sequence[Row], examples: Sequence[Row]) -> str:
    """Return the name that all paths begin with.

    Raises:
        UserError: they begin with different names, or there are no paths and no --root; or an
            example has no paths.
    """
    root = args.root
    for path, articles in ((args.rows, rows), (args.examples, examples)):
        for number, row in articles:
            if "paths" not in row and articles is examples:
                raise UserError(f'{path}:{number}: an example without "paths"')
            for names in row.get("paths", []):
                root = root or names[0]
                require(
                    names[0] == root,
                    f"{path}:{number}: a path begins with {names[0]!r}, others or --root with "
                    f"{root!r}: all must begin with one root",
                )
    if root is None:
        raise UserError(f'{args.rows}: no row has "paths": name what they begin with, --root NAME')
    return root


def draw_examples(
    row: dict[str, Any], examples: Sequence[Row], num_shots: int, seed: str
) -> list[dict[str, Any]]:
    """Draw the examples of a prompt. The article itself is never one of them.

    Raises:
        UserError: there are too few.
    """
    num_drawn = min(num_shots + 1, len(examples))  # one more, in case the article is among them
    drawn = [example.values for example in random.Random(seed).sample(examples, num_drawn)]
    article = (row["title"], row["abstract"])
    others = [example for example in drawn if (example["title"], example["abstract"]) != article]
    require(
        len(others) >= num_shots,
        f"--examples has {len(others)} rows other than {row['title']!r}: too few for --shots "
        f"{num_shots}",
    )
    return others[:num_shots]


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Args, description=__doc__, use_underscores=True)))
