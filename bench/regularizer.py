"""Does data.edge_dropping do what OLLM (arXiv 2410.23584) says? python bench/regularizer.py

The promise: rare edges are learnt better, frequent ones are overfitted less. For each seed a random
taxonomy is drawn: a root, 8 categories, 10 nodes below each, and below each of these 6 of their
category's 16 leaves. Its 480 leaf edges are used with Zipf frequencies (1 / rank). 72 of them are
never used in training, although nearly all of their nodes are: to predict these is to generalize.
An article has one to three paths. Its title and abstract hold cue words of the paths' nodes, which
are not the nodes' names; one cue in ten is replaced by that of another node. A tiny Mistral (2
blocks of width 128) is trained by train.main from random weights with and without edge_dropping,
all else equal, and answers the test articles greedily. Printed are means and standard deviations
over seeds of both arms and of their paired differences, and in how many seeds dropping was better;
then all of it as a line of JSON.

An edge's frequency n is how often it occurs in the training file. Rare is the lower third of the
distinct edges, frequent the upper third, unseen is n = 0. Scores of a stratum count edges article
by article: recall is over the reference edges in it, precision over the predicted edges in it (a
wrong edge counts where its own n puts it, an invented one as unseen). Losses are over all labels,
whatever the training dropped; those of rare and frequent edges are over the tokens of the lower
node of such edges.
"""

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import minilora  # noqa: E402 - found through the path set above
from minilora.config import (  # noqa: E402
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    TrainConfig,
)
from minilora.data.cache import load_documents  # noqa: E402
from minilora.data.dataset import Documents  # noqa: E402
from minilora.data.example import Edge  # noqa: E402
from minilora.data.paths import ARROW, path_edges  # noqa: E402
from minilora.generation.engine import generate_ids  # noqa: E402
from minilora.generation.sampling import SamplingParams  # noqa: E402
from minilora.model.transformer import CausalLM  # noqa: E402

BASE = ROOT / "examples/tiny-mistral"

# the taxonomy
TOP = "Main topic classifications"
CATEGORIES, NODES_OF_CATEGORY, LEAVES_OF_CATEGORY, LEAVES_OF_NODE = 8, 10, 16, 6
UNSEEN_EDGES = 72

# the articles
HELD_OUT_ARTICLES, TEST_ARTICLES = 300, 600
CUES_OF_NODE = 3
WRONG_CUES = 0.1  # share of the cues that are another node's

# the model
WIDTH, LAYERS, LEARNING_RATE = 128, 2, 3e-3

# the table
STRATA = ("rare", "frequent", "unseen")
LOWER_IS_BETTER = ("loss", "gap")  # words in the name of a figure
NEITHER_IS_BETTER = "unseen edges predicted"

Stratum = Callable[[Edge], str]


@dataclass
class Args:
    """Options of the benchmark."""

    seeds: int = 5
    """Pairs of runs; taxonomy, articles, initial weights and order are drawn from the seed, which
    is the same for both runs of a pair."""
    steps: int = 900
    """Optimizer steps of 32 articles."""
    articles: int = 10000
    """Size of the training file."""
    jobs: int = os.cpu_count() or 1
    """Runs at a time, each with one thread."""
    seed: int = 0
    """The first seed."""
    arm: Literal["both", "with", "without"] = "both"
    """One arm only: a single run that prints its own figures, as JSON."""


# ---- the synthetic world


class World:
    """A random taxonomy, and articles about it.

    Attributes:
        paths: all paths from the root to a leaf.
        weights: how often each path is used, relative to the others.
        training_weights: the same, with zero for the paths that training never sees.
        cues: the cue words of each node.
    """

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.names: set[str] = set()
        self.paths = self._draw_paths()
        self._draw_cues()

        self.rng.shuffle(self.paths)
        self.weights = [1 / rank for rank in range(1, len(self.paths) + 1)]
        unseen = set(self.rng.sample(range(len(self.paths)), UNSEEN_EDGES))
        self.training_weights = [
            0.0 if i in unseen else weight for i, weight in enumerate(self.weights)
        ]

    def _draw_paths(self) -> list[tuple[str, ...]]:
        """Draw the taxonomy."""
        categories = [self._draw_name() for _ in range(CATEGORIES)]
        paths: list[tuple[str, ...]] = []
        for category in categories:
            leaves = [self._draw_name() for _ in range(LEAVES_OF_CATEGORY)]
            for _ in range(NODES_OF_CATEGORY):
                node = self._draw_name()
                for leaf in self.rng.sample(leaves, LEAVES_OF_NODE):
                    paths.append((TOP, category, node, leaf))
        return paths

    def _draw_name(self) -> str:
        """Draw a new name of two or three syllables."""
        while True:
            syllables = [
                self.rng.choice("bdfgklmnprstvz") + self.rng.choice("aeiou")
                for _ in range(self.rng.randint(2, 3))
            ]
            name = "".join(syllables)
            if name not in self.names:
                self.names.add(name)
                return name.capitalize()

    def _draw_cues(self) -> None:
        """Give each node its cue words, from the English words of the tokenizer's vocabulary."""
        nodes = sorted({node for path in self.paths for node in path[1:]})
        tokenizer = json.loads((BASE / "tokenizer.json").read_text(encoding="utf-8"))
        words = []
        for piece in tokenizer["model"]["vocab"]:
            word = piece[1:]
            if piece[0] == "\u2581" and len(word) > 1 and word.isascii() and word.isalpha():
                words.append(word)
        self.all_cues = self.rng.sample(words, CUES_OF_NODE * len(nodes))
        self.cues = {
            node: self.all_cues[i * CUES_OF_NODE : (i + 1) * CUES_OF_NODE]
            for i, node in enumerate(nodes)
        }

    def _draw_sentence(self, path: tuple[str, ...]) -> str:
        """Write cues of a path: two of its leaf, two of the node above, one of the category."""
        words: list[str] = []
        for node, count in zip(path[1:], (1, 2, 2), strict=True):
            words += self.rng.sample(self.cues[node], count)
        words = [
            self.rng.choice(self.all_cues) if self.rng.random() < WRONG_CUES else word
            for word in words
        ]
        self.rng.shuffle(words)
        return " ".join(words) + "."

    def _draw_article(self, weights: list[float]) -> dict:
        """Write an article about one to three paths."""
        count = self.rng.choice((1, 2, 2, 3))
        paths = list(dict.fromkeys(self.rng.choices(self.paths, weights, k=count)))
        title = f"{self.rng.choice(self.cues[paths[0][-1]])} {self.rng.choice(self.all_cues)}"
        abstract = " ".join(self._draw_sentence(path) for path in paths)
        return {"title": title, "abstract": abstract, "paths": paths}

    def write(self, file: Path, count: int, weights: list[float]) -> list[dict]:
        """Write a file of articles, and return its rows."""
        rows = [self._draw_article(weights) for _ in range(count)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return rows


# ---- one run


def write_base(directory: Path) -> None:
    """Write config.json and the tokenizer of a tiny Mistral; its weights are drawn by the run."""
    raw = json.loads((BASE / "config.json").read_text(encoding="utf-8"))
    raw |= {"hidden_size": WIDTH, "intermediate_size": WIDTH * 8 // 3, "num_hidden_layers": LAYERS}
    raw |= {"num_attention_heads": WIDTH // 32, "num_key_value_heads": WIDTH // 32}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BASE / name, directory / name)


def make_config(home: Path, args: Args) -> Config:
    """Return the configuration of a run whose files lie in `home`."""
    return Config(
        output_dir=str(home / "out"),
        seed=args.seed,
        method="full",
        model=ModelConfig(name=str(home / "base"), init="random", dtype="float32"),
        data=DataConfig(
            train_file=str(home / "train.jsonl"),
            eval_file=str(home / "held_out.jsonl"),
            max_seq_length=512,
            eval_size=HELD_OUT_ARTICLES,
            edge_dropping=args.arm == "with",
            strict=True,
            num_workers=1,
        ),
        train=TrainConfig(
            max_steps=args.steps,
            batch_size=32,
            learning_rate=LEARNING_RATE,
            lr_scheduler="cosine",
            warmup_steps=50,
            weight_decay=0.05,
            gradient_checkpointing=False,
        ),
        eval=EvalConfig(eval_steps=args.steps, num_generate_samples=0),
        log=LogConfig(tensorboard=False),
    )


def measure(args: Args) -> dict[str, float]:
    """Train one arm with one seed and return its figures."""
    import train

    with tempfile.TemporaryDirectory() as directory:
        os.environ["XDG_CACHE_HOME"] = directory
        home = Path(directory)
        world = World(args.seed)
        training = world.write(home / "train.jsonl", args.articles, world.training_weights)
        held_out = world.write(home / "held_out.jsonl", HELD_OUT_ARTICLES, world.training_weights)
        test = world.write(home / "test.jsonl", TEST_ARTICLES, world.weights)

        write_base(home / "base")
        config = make_config(home, args)
        exit_code = train.main(config)
        if exit_code:
            sys.exit(exit_code)

        counts = Counter(edge for row in training for edge in path_edges(row["paths"]))
        cuts = statistics.quantiles(counts.values(), n=3)
        stratum = partial(stratum_of, counts=counts, cuts=cuts)

        checkpoint = str(home / "out/checkpoint-final")
        model, tokenizer = minilora.load(checkpoint, dtype="float32", device="cpu")
        losses = read_losses(home / "out/metrics.jsonl")
        file = str(home / "held_out.jsonl")
        documents = load_documents(file, config.data, tokenizer, "eval_file")
        losses |= node_losses(model.eval(), documents, held_out, stratum)

        questions = load_documents(str(home / "test.jsonl"), config.data, tokenizer, "eval_file")
        prompts = [questions.prompt_and_target(i)[0] for i in range(len(questions))]
        params = SamplingParams(max_new_tokens=96)
        answers = generate_ids(model, prompts, tokenizer, params, batch_size=100)
        texts = [answer.text for answer in answers]
        references = [set(path_edges(row["paths"])) for row in test]
        return scores(texts, references, set(path_edges(world.paths)), stratum) | losses


def stratum_of(edge: Edge, counts: Counter[Edge], cuts: list[float]) -> str:
    """Return whether an edge is unseen, rare, frequent, or in the middle."""
    n = counts[edge]
    if n == 0:
        return "unseen"
    if n <= cuts[0]:
        return "rare"
    return "frequent" if n >= cuts[1] else "middle"


def read_losses(file: Path) -> dict[str, float]:
    """Return the losses of the run's last evaluation, and their difference."""
    last: dict[str, float] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        last |= json.loads(line)
    held_out, training = last["eval/out_of_domain/loss"], last["eval/in_domain/loss"]
    return {
        "held-out loss": held_out,
        "loss, training articles": training,
        "gap between the two": held_out - training,
    }


@torch.no_grad()
def node_losses(
    model: CausalLM, documents: Documents, rows: list[dict], stratum: Stratum
) -> dict[str, float]:
    """Return the mean token loss over the lower nodes of rare and of frequent edges.

    Args:
        model: in evaluation mode.
        documents: the tokenized rows.
        rows: articles with their paths.
        stratum: tells which stratum an edge is in.
    """
    losses: dict[str, list[float]] = {name: [] for name in (*STRATA, "middle")}
    for i, row in enumerate(rows):
        strata = [stratum(edge) for edge in path_edges(row["paths"])]
        batch = documents.batch([i])
        logits = model(batch.tokens, batch.lengths)
        loss = F.cross_entropy(logits[:-1], batch.tokens[1:], reduction="none").tolist()
        targets = slice(documents.offsets[i] + 1, documents.offsets[i + 1])
        for value, edge_index in zip(loss, documents.edge_index[targets], strict=True):
            if edge_index >= 0:
                losses[strata[edge_index]].append(value)
    shown = ("rare", "frequent")
    return {f"held-out loss, {name} edges": statistics.mean(losses[name]) for name in shown}


# ---- figures of the answers


def scores(
    answers: list[str], references: list[set[Edge]], taxonomy: set[Edge], stratum: Stratum
) -> dict[str, float]:
    """Return everything that is counted from the answers.

    Args:
        answers: for each article the text that the model wrote.
        references: for each article its edges.
        taxonomy: all edges that exist.
        stratum: tells which stratum an edge is in.
    """
    lines = [[line.split(ARROW) for line in answer.splitlines()] for answer in answers]
    well_formed = [[path for path in paths if is_well_formed(path)] for paths in lines]
    predictions = [set(path_edges(paths)) for paths in well_formed]

    predicted: set[Edge] = set().union(*predictions)
    reference: set[Edge] = set().union(*references)
    hits = len(predicted & reference)
    row = {"edge F1, union graph": share(2 * hits, len(predicted) + len(reference))}
    for name in STRATA:
        row |= stratum_scores(name, predictions, references, taxonomy, stratum)
    row["well-formed lines"] = share(total(well_formed), total(lines))
    return row


def is_well_formed(path: list[str]) -> bool:
    """Return whether a line is a path from the root."""
    return len(path) > 1 and path[0] == TOP and all(path)


def stratum_scores(
    name: str,
    predictions: list[set[Edge]],
    references: list[set[Edge]],
    taxonomy: set[Edge],
    stratum: Stratum,
) -> dict[str, float]:
    """Return the scores over the edges of one stratum, counted article by article."""
    mine = [{edge for edge in edges if stratum(edge) == name} for edges in predictions]
    wanted = [{edge for edge in edges if stratum(edge) == name} for edges in references]
    num_hits = total(a & b for a, b in zip(mine, wanted, strict=True))
    num_wanted, num_mine = total(wanted), total(mine)
    row: dict[str, float] = {
        f"F1, {name} edges": share(2 * num_hits, num_mine + num_wanted),
        f"recall, {name} edges": share(num_hits, num_wanted),
        f"precision, {name} edges": share(num_hits, num_mine),
    }
    if name == "unseen":
        num_existing = total(edges & taxonomy for edges in mine)
        row["in the taxonomy, of unseen edges predicted"] = share(num_existing, num_mine)
        row[NEITHER_IS_BETTER] = num_mine
    return row


def total(collections: Iterable[list | set]) -> int:
    """Return the number of elements of all collections together."""
    return sum(len(collection) for collection in collections)


def share(part: float, whole: float) -> float:
    """Return part / whole, or 0 of nothing."""
    return part / whole if whole else 0.0


# ---- all runs


def run(args: Args, seed: int, arm: str) -> dict[str, float]:
    """Run one arm with one seed in a process of its own, and return its figures."""
    flags = ["--seed", str(seed), "--arm", arm]
    flags += ["--steps", str(args.steps), "--articles", str(args.articles)]
    command = [sys.executable, __file__, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"seed {seed}, {arm}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(args: Args) -> None:
    """Run both arms with every seed and print the table, or one arm and print JSON."""
    if args.arm != "both":
        print(json.dumps(measure(args)))
        return

    cases = [(args.seed + i, arm) for i in range(args.seeds) for arm in ("without", "with")]
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda case: run(args, *case), cases))
    without_dropping, with_dropping = rows[::2], rows[1::2]

    print("| | without | with edge_dropping | difference | better in |\n|---|---|---|---|---|")
    for name in without_dropping[0]:
        before = [row[name] for row in without_dropping]
        after = [row[name] for row in with_dropping]
        differences = [b - a for a, b in zip(before, after, strict=True)]
        cells = [name, describe(before), describe(after), describe(differences, "+")]
        print(f"| {' | '.join(cells)} | {verdict(name, differences)} |")
    result = {"args": vars(args), "without": without_dropping, "with": with_dropping}
    print(json.dumps(result))


def verdict(name: str, differences: list[float]) -> str:
    """Return in how many seeds the figure was better with dropping."""
    if name == NEITHER_IS_BETTER:
        return "-"
    if any(word in name for word in LOWER_IS_BETTER):
        better = [difference for difference in differences if difference < 0]
    else:
        better = [difference for difference in differences if difference > 0]
    return f"{len(better)} of {len(differences)}"


def describe(values: list[float], sign: str = "") -> str:
    """Return mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign},.3f} ± {deviation:.3f}"


if __name__ == "__main__":
    main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,)))
