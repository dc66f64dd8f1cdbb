"""Make the data of an ontology-learning run: python examples/ontology/prepare.py SOURCE OUT_DIR.

SOURCE is a graph of categories with pages, whose root has the broadest categories below it:

    wordnet                the nouns of WordNet (Debian's package wordnet-base has the file)
    andylolu24/wiki-ol@v2  a dataset of the hub, or a directory, with the graphs of three splits
    OWNER/NAME:FILE.json   one graph of a dataset; graph_files.py describes the form
    FILE.json              the same on disk, maybe gzipped

Written are {train,eval,test}.jsonl, rows of the format paths, and {train,eval,test}_graph.json, the
graphs to compare with. One graph is split at the top, as in OLLM (Lo et al., arXiv 2410.23584,
appendix A.1): each split gets categories of depth 1 of its own, and what is below them. So what is
asked in an evaluation was never trained on. The same SOURCE and flags give the same files.
"""

import importlib.util
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from minilora.errors import require
from minilora.evaluation.category_graph import DiGraph, write_graph
from minilora.exit_codes import run_script
from minilora.files import make_directory


@dataclass
class Args:
    """Options of the command."""

    source: Annotated[str, tyro.conf.Positional]
    """wordnet, a dataset of the hub, a directory, or a file."""
    out: Annotated[Path, tyro.conf.Positional]
    """Directory to write to."""
    wordnet: Path = Path("/usr/share/wordnet/data.noun")
    """WordNet's file of nouns, for the source wordnet."""
    shares: tuple[int, int, int] = (7, 3, 10)
    """How the categories of depth 1 of one graph are divided into train, eval and test."""
    cutoff: int = 5
    """Edges of the longest paths, counted from the root to a page."""
    max_paths: int = 100
    """Paths of one page; a page with more keeps the first ones found."""
    max_steps: int = 100_000
    """Edges that are followed in search of the paths of one page; those found until then are kept.
    It is for dense graphs, which have more paths than can be counted."""
    shuffle_paths: bool = False
    """Put the paths of each row in random order, as OLLM does; otherwise category by category."""
    train_rows: int | None = None
    """Rows to draw for train (default: all)."""
    eval_rows: int | None = None
    """Rows to draw for eval (default: all)."""
    test_rows: int | None = None
    """Rows to draw for test (default: all)."""
    seed: int = 0
    """Of the split, the draws and the order of the rows."""


def main(args: Args) -> int:
    """Write the rows and the graph of each split."""
    check(args)
    limits = {"train": args.train_rows, "eval": args.eval_rows, "test": args.test_rows}
    for name, split in read_splits(args):
        make_directory(args.out)
        write_split(args, name, split, limits[name])
    return 0


def check(args: Args) -> None:
    """Raise UserError for a flag that is out of range, or if networkx is missing."""
    is_there = importlib.util.find_spec("networkx") is not None
    require(is_there, "preparing graphs needs networkx: pip install 'minilora[ontology]'")
    for name in ("max_paths", "max_steps", "train_rows", "eval_rows", "test_rows"):
        value = getattr(args, name)
        require(value is None or value >= 1, f"--{name} must be at least 1")
    require(args.cutoff >= 2, "--cutoff must be at least 2: one edge to a category, one to a page")
    require(min(args.shares) >= 1, "--shares: each must be at least 1")


def read_splits(args: Args) -> Iterator[tuple[str, DiGraph]]:
    """Yield the name and the graph of each split; of three files, one is in memory at a time."""
    from graph_files import SPLITS, find_graph_files, read_page_graph, split_at_depth_1
    from wordnet import wordnet_graph

    if args.source == "wordnet":
        yield from split_at_depth_1(wordnet_graph(args.wordnet), args.shares, args.seed)
        return
    files = find_graph_files(args.source)
    if len(files) == 1:
        yield from split_at_depth_1(read_page_graph(files[0]), args.shares, args.seed)
        return
    for name, file in zip(SPLITS, files, strict=True):
        yield name, read_page_graph(file)


def write_split(args: Args, name: str, split: DiGraph, num_wanted: int | None) -> None:
    """Write the rows and the graph of a split, and print what they are.

    Args:
        args: of the command.
        name: of the split.
        split: its graph.
        num_wanted: rows to draw; None: all.
    """
    from linearize import Limits, Linearizer, reference_graph

    linearizer = Linearizer(split, Limits(args.cutoff, args.max_paths, args.max_steps))
    num_all = len(linearizer.pages)
    require(num_all > 0, f"{name}: no page is within --cutoff {args.cutoff} edges of the root")
    rows = linearizer.rows(f"{args.seed} {name}", args.shuffle_paths)
    weights: Counter = Counter()
    cuts: Counter = Counter()
    num_rows = 0
    temporary = args.out / f".tmp-{name}.jsonl"
    with (
        open(temporary, "w", encoding="utf-8", newline="\n") as file,
        tqdm(desc=name, total=min(num_all, num_wanted or num_all), disable=None) as progress,
    ):
        for row in rows:
            if not row.values["paths"]:
                cuts["no path"] += 1
                continue
            file.write(json.dumps(row.values, ensure_ascii=False) + "\n")
            weights.update(row.edges)
            cuts[row.cut_by] += 1
            num_rows += 1
            progress.update()
            if num_rows == num_wanted:
                break
    os.replace(temporary, args.out / f"{name}.jsonl")

    is_whole = num_wanted is None or num_wanted >= num_all
    reference = reference_graph(split, weights, is_whole)
    write_graph(reference, args.out / f"{name}_graph.json")
    tops = [split.nodes[top]["title"] for top in split.successors(split.graph["root"])]
    print(
        f"{name}: {num_rows} of {num_all} rows, {len(reference)} nodes, "
        f"{reference.number_of_edges()} edges, below {', '.join(tops)}"
    )
    cuts["too deep"] = linearizer.num_too_deep
    cuts["root alone"] = linearizer.num_in_root_alone
    print_cuts(args, cuts)


def print_cuts(args: Args, cuts: Counter) -> None:
    """Print which pages and paths are left out.

    Args:
        args: of the command.
        cuts: the rows that lack paths by the limit that cut them, and the pages left out by
            "too deep", "root alone" and "no path".
    """
    if cuts["too deep"]:
        print(
            f"  {cuts['too deep']} pages were left out: further than --cutoff {args.cutoff} edges "
            "from the root"
        )
    if cuts["root alone"]:
        print(f"  {cuts['root alone']} pages of the root were left out: no category has them")
    for limit in ("max_paths", "max_steps"):
        if cuts[limit]:
            print(f"  {cuts[limit]} of these rows lack paths: cut at --{limit} {vars(args)[limit]}")
    if cuts["no path"]:
        print(
            f"  {cuts['no path']} pages were left out: no path was found in --max_steps "
            f"{args.max_steps}"
        )


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Args, description=__doc__, use_underscores=True)))
