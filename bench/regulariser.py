"""Does data.edge_dropping do what OLLM (arXiv 2410.23584) says? python bench/regulariser.py [--seeds 5] [--steps 900]

The promise: rare edges are learnt better, frequent ones overfitted less. For each seed a random taxonomy is drawn, root ->
8 categories -> 10 each -> 6 of their category's 16 leaves each, whose 480 leaf edges are used with Zipf frequencies (1 / rank);
72 of them never while training, though both their names are (but for a leaf or two): predicting these is generalisation. An
article is one to three paths; its title and abstract hold cue words of a path's nodes, other than their names, one in ten
exchanged for another node's. A tiny Mistral (2 blocks of width 128) is trained by train.main from random weights with and
without edge_dropping, all else equal, and answers the test articles greedily. Printed are means and standard deviations over
seeds of both arms and of their paired differences, and in how many seeds dropping was better; then all as a line of JSON.

An edge's frequency n is its occurrences in the training file: rare is the lower third of the distinct edges, frequent the
upper, unseen n = 0. Scores of a stratum count edges article by article: recall is over the reference edges in it, precision
over the predicted edges in it (a wrong edge counts where its own n puts it, an invented one under unseen). Losses are over
all labels, whatever the training dropped; rare and frequent ones over the tokens of the lower node of such edges.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import minilora  # noqa: E402 - found through the path set above
from minilora.config import Config, DataConfig, EvalConfig, LogConfig, ModelConfig, TrainConfig  # noqa: E402
from minilora.generate import generate_ids  # noqa: E402
from minilora.labels import Edge, path_edges  # noqa: E402
from minilora.running.cache import load_documents  # noqa: E402
from minilora.running.examples import ARROW  # noqa: E402

BASE = ROOT / "examples/tiny-mistral"
TOP = "Main topic classifications"
CATEGORIES, MIDDLES, POOL, LEAVES, UNSEEN = 8, 10, 16, 6, 72
HELD_OUT, TEST, CUES, EXCHANGED = 300, 600, 3, 0.1
WIDTH, LAYERS, LEARNING_RATE = 128, 2, 3e-3
STRATA = ("rare", "frequent", "unseen")
LOWER_IS_BETTER = ("loss", "gap")
NEITHER = "unseen edges predicted"


@dataclass
class Args:
    seeds: int = 5
    """Pairs of runs; taxonomy, articles, initial weights and order are drawn from the seed, which a pair shares."""
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


class World:
    """A random taxonomy: its paths with weights, what each node's cue words are, and how articles come from it."""

    def __init__(self, seed: int):
        self.rng = rng = random.Random(seed)
        self.names: set[str] = set()
        categories = [self.name() for _ in range(CATEGORIES)]
        self.paths: list[tuple[str, ...]] = []
        for category in categories:
            pool = [self.name() for _ in range(POOL)]
            for _ in range(MIDDLES):
                middle = self.name()
                self.paths += [(TOP, category, middle, leaf) for leaf in rng.sample(pool, LEAVES)]
        nodes = sorted({node for path in self.paths for node in path[1:]})
        pieces = json.loads((BASE / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        words = [p[1:] for p in pieces if p[0] == "\u2581" and len(p) > 2 and p[1:].isascii() and p[1:].isalpha()]
        self.all_cues = rng.sample(words, CUES * len(nodes))
        self.cues = {node: self.all_cues[i * CUES : (i + 1) * CUES] for i, node in enumerate(nodes)}
        rng.shuffle(self.paths)
        self.weights = [1 / rank for rank in range(1, len(self.paths) + 1)]
        unseen = set(rng.sample(range(len(self.paths)), UNSEEN))
        self.training_weights = [0.0 if i in unseen else weight for i, weight in enumerate(self.weights)]

    def name(self) -> str:
        """A new name of two or three syllables."""
        while True:
            name = "".join(self.rng.choice("bdfgklmnprstvz") + self.rng.choice("aeiou") for _ in range(self.rng.randint(2, 3)))
            if name not in self.names:
                self.names.add(name)
                return name.capitalize()

    def sentence(self, path: tuple[str, ...]) -> str:
        """Cues of a path: two of its leaf and of the node above, one of the category; a few are another node's."""
        words = [w for node, k in zip(path[1:], (1, 2, 2), strict=True) for w in self.rng.sample(self.cues[node], k)]
        words = [self.rng.choice(self.all_cues) if self.rng.random() < EXCHANGED else word for word in words]
        self.rng.shuffle(words)
        return " ".join(words) + "."

    def article(self, weights: list[float]) -> dict:
        paths = list(dict.fromkeys(self.rng.choices(self.paths, weights, k=self.rng.choice((1, 2, 2, 3)))))
        title = f"{self.rng.choice(self.cues[paths[0][-1]])} {self.rng.choice(self.all_cues)}"
        return {"title": title, "abstract": " ".join(map(self.sentence, paths)), "paths": paths}

    def write(self, file: Path, count: int, weights: list[float]) -> list[dict]:
        rows = [self.article(weights) for _ in range(count)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return rows


def configuration(home: Path, args: Args) -> Config:
    """The run's configuration; writes the directory that holds the model's shape and tokenizer."""
    shape = json.loads((BASE / "config.json").read_text(encoding="utf-8"))
    shape |= {"hidden_size": WIDTH, "intermediate_size": WIDTH * 8 // 3, "num_hidden_layers": LAYERS}
    shape |= {"num_attention_heads": WIDTH // 32, "num_key_value_heads": WIDTH // 32}
    (home / "base").mkdir()
    (home / "base/config.json").write_text(json.dumps(shape), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(BASE / name, home / "base" / name)
    return Config(
        output_dir=str(home / "out"), seed=args.seed, method="full",
        model=ModelConfig(name=str(home / "base"), init="random", dtype="float32"),
        data=DataConfig(
            train_file=str(home / "train.jsonl"), eval_file=str(home / "held_out.jsonl"), max_seq_length=512,
            eval_size=HELD_OUT, edge_dropping=args.arm == "with", strict=True, num_workers=1,
        ),
        train=TrainConfig(
            max_steps=args.steps, batch_size=32, learning_rate=LEARNING_RATE, lr_scheduler="cosine", warmup_steps=50,
            weight_decay=0.05, gradient_checkpointing=False,
        ),
        eval=EvalConfig(eval_steps=args.steps, num_generate_samples=0), log=LogConfig(tensorboard=False),
    )  # fmt: skip


def measure(args: Args) -> dict[str, float]:
    """Train one arm with one seed and score it."""
    import train

    with tempfile.TemporaryDirectory() as directory:
        os.environ["XDG_CACHE_HOME"], home = directory, Path(directory)
        world = World(args.seed)
        training = world.write(home / "train.jsonl", args.articles, world.training_weights)
        held_out = world.write(home / "held_out.jsonl", HELD_OUT, world.training_weights)
        test = world.write(home / "test.jsonl", TEST, world.weights)
        if code := train.main(config := configuration(home, args)):
            sys.exit(code)
        model, tokenizer = minilora.load(str(home / "out/checkpoint-final"), dtype="float32", device="cpu")
        counts = Counter(edge for row in training for edge in path_edges(row["paths"]))
        stratum = partial(stratum_of, counts=counts, cuts=statistics.quantiles(counts.values(), n=3))
        losses: dict[str, float] = {}
        for line in (home / "out/metrics.jsonl").read_text(encoding="utf-8").splitlines():
            losses |= json.loads(line)
        seen = {"held-out loss": losses["eval/out_of_domain/loss"], "loss, training articles": losses["eval/in_domain/loss"]}
        seen["gap between the two"] = seen["held-out loss"] - seen["loss, training articles"]
        documents = load_documents(str(home / "held_out.jsonl"), config.data, tokenizer, "eval_file")
        seen |= node_losses(model.eval(), documents, [[stratum(e) for e in path_edges(row["paths"])] for row in held_out])
        questions = load_documents(str(home / "test.jsonl"), config.data, tokenizer, "eval_file")
        prompts = [questions.prompt_and_target(i)[0] for i in range(len(questions))]
        answers = generate_ids(model, prompts, tokenizer, max_new_tokens=96, stop_ids=tokenizer.stop_ids(), batch_size=100)
        reference = [set(path_edges(row["paths"])) for row in test]
        return scores([answer.text for answer in answers], reference, set(path_edges(world.paths)), stratum) | seen


def stratum_of(edge: Edge, counts: Counter[Edge], cuts: list[float]) -> str:
    n = counts[edge]
    return "unseen" if n == 0 else "rare" if n <= cuts[0] else "frequent" if n >= cuts[1] else "middle"


@torch.no_grad()
def node_losses(model, documents, strata: list[list[str]]) -> dict[str, float]:
    """Mean token loss over the lower nodes of rare and of frequent edges; strata: of each occurrence of each document."""
    losses: dict[str, list[float]] = {name: [] for name in (*STRATA, "middle")}
    for i, names in enumerate(strata):
        batch = documents.batch([i])
        logits = model(batch.tokens, batch.lengths)
        loss = torch.nn.functional.cross_entropy(logits[:-1], batch.tokens[1:], reduction="none").tolist()
        for value, occurrence in zip(loss, documents.node[documents.offsets[i] + 1 : documents.offsets[i + 1]], strict=True):
            if occurrence >= 0:
                losses[names[occurrence]].append(value)
    return {f"held-out loss, {name} edges": statistics.mean(losses[name]) for name in STRATA[:2]}


def scores(answers: list[str], references: list[set[Edge]], taxonomy: set[Edge], stratum) -> dict[str, float]:
    """All that is counted from the answers (see the top)."""
    lines = [[line.split(ARROW) for line in answer.splitlines()] for answer in answers]
    good = [[path for path in paths if len(path) > 1 and path[0] == TOP and all(path)] for paths in lines]
    predicted = [set(path_edges(paths)) for paths in good]
    union, reference = set().union(*predicted), set().union(*references)
    row = {"edge F1, union graph": share(2 * len(union & reference), len(union) + len(reference))}
    for name in STRATA:
        mine = [{e for e in edges if stratum(e) == name} for edges in predicted]
        wanted = [{e for e in edges if stratum(e) == name} for edges in references]
        hits, asked, given = (sum(map(len, sets)) for sets in ([a & b for a, b in zip(mine, wanted, strict=True)], wanted, mine))
        row[f"F1, {name} edges"] = share(2 * hits, given + asked)
        row[f"recall, {name} edges"] = share(hits, asked)
        row[f"precision, {name} edges"] = share(hits, given)
        if name == "unseen":
            row["in the taxonomy, of unseen edges predicted"] = share(sum(len(edges & taxonomy) for edges in mine), given)
            row[NEITHER] = given
    row["well-formed lines"] = share(sum(map(len, good)), sum(map(len, lines)))
    return row


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def run(args: Args, seed: int, arm: str) -> dict[str, float]:
    """One arm with one seed, in a process of its own."""
    command = [sys.executable, __file__, *f"--seed {seed} --arm {arm} --steps {args.steps} --articles {args.articles}".split()]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"seed {seed}, {arm}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(args: Args) -> None:
    if args.arm != "both":
        print(json.dumps(measure(args)))
        return
    cases = [(args.seed + i, arm) for i in range(args.seeds) for arm in ("without", "with")]
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda case: run(args, *case), cases))
    print("| | without | with edge_dropping | difference | better in |\n|---|---|---|---|---|")
    without, with_ = rows[::2], rows[1::2]
    for name in without[0]:
        a, b = [row[name] for row in without], [row[name] for row in with_]
        difference = [y - x for x, y in zip(a, b, strict=True)]
        better = sum(d < 0 if any(word in name for word in LOWER_IS_BETTER) else d > 0 for d in difference)
        verdict = "-" if name == NEITHER else f"{better} of {args.seeds}"
        print(f"| {name} | {spread(a)} | {spread(b)} | {spread(difference, '+')} | {verdict} |")
    print(json.dumps({"args": vars(args), "without": without, "with": with_}))


def spread(values: list[float], sign: str = "") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign},.3f} ± {deviation:.3f}"


if __name__ == "__main__":
    main(tyro.cli(Args, config=(tyro.conf.FlagConversionOff,)))
