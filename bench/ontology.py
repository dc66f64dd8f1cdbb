"""OLLM's experiment on a laptop: python bench/ontology.py MODEL EMBEDDER --work DIR

A small chat model learns to write the paths of WordNet's nouns, and is asked for those of other
domains: the splits are made at depth 1 of the graph (examples/ontology/prepare.py), so what is
asked at test was never trained on. The result is the table of the paper (Lo et al., NeurIPS 2024,
arXiv 2410.23584, table 1): five figures of

    memorisation   the training graph itself
    zero-shot      the model as it is, asked in words (examples/ontology/prompts.py)
    three-shot     the same, with three examples
    plain          LoRA on every label (data.edge_dropping False)
    masked         LoRA with OLLM's loss (data.edge_dropping True)

as mean and standard deviation over seeds, without pruning and pruned.

Everything is chosen on the evaluation split. Early stopping watches its loss. With seed 0 each arm
is trained with several ranks and learning rates; the setting whose answers' graph, pruned with the
best thresholds, has the best continuous F1 there is trained with the other seeds too. Each method
and seed is pruned with the thresholds that are best for its own answers to the evaluation split.
The test split is read once, for the table.

MODEL is meant to be SmolLM2-135M-Instruct and EMBEDDER all-MiniLM-L6-v2 (the one of the paper);
each is a directory or a hub id. Every command is printed. What is finished is not done again, so
after a stop the same command goes on; DIR/results.json has all figures.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ontology_jobs import Job, run_jobs  # noqa: E402 - these need the path set above
from ontology_scores import (  # noqa: E402
    Predictions,
    Scorer,
    difference_table,
    draw_chart,
    methods_of,
    results,
    table,
)

from minilora.errors import require  # noqa: E402
from minilora.evaluation.embedder import load_embedder  # noqa: E402
from minilora.exit_codes import run_script  # noqa: E402
from minilora.files import read_json, replace_file  # noqa: E402

Arm = Literal["plain", "masked"]
ARMS: tuple[Arm, ...] = ("plain", "masked")
SPLIT_ROWS = {"train": 1500, "eval": 300, "test": 500}
MAX_NEW_TOKENS = 128
SHOTS = {"zero-shot": 0, "three-shot": 3}


@dataclass
class Args:
    """Options of the benchmark."""

    model: Annotated[str, tyro.conf.Positional]
    """The chat model to train and to ask: a directory or a hub id."""
    embedder: Annotated[str, tyro.conf.Positional]
    """The sentence-transformers model of the metrics: a directory or a hub id."""
    work: Path
    """Directory for data, runs, answers and figures."""
    wordnet: Path = Path("/usr/share/wordnet/data.noun")
    """WordNet's file of nouns."""
    seeds: int = 3
    """Of training, of the examples in prompts, and of sampling."""
    settings: tuple[str, ...] = ("32:3e-4", "32:1e-3", "8:1e-3")
    """What to choose from for each arm: RANK:LEARNING_RATE of LoRA (alpha is the rank)."""
    jobs: int = os.cpu_count() or 1
    """Commands at a time, each with one thread."""
    until: Literal["data", "grid", "seeds", "answers", "table"] = "table"
    """The last part to do: the data; the runs of seed 0 and the choice; those of the other seeds;
    all answers; the table."""
    limit: int | None = None
    """A trial: this many rows of each split, and two steps of training."""
    chart: Path | None = None
    """PNG to draw (needs Chromium)."""

    @property
    def data(self) -> Path:
        """Directory of the splits."""
        return self.work / "data"


class Run(NamedTuple):
    """A training run."""

    arm: Arm
    rank: int
    rate: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its directory."""
        return f"{self.arm}_r{self.rank}_lr{self.rate}_s{self.seed}"


def main(args: Args) -> None:
    """Do what is missing, part by part, and print the tables."""
    args = replace(args, work=args.work.resolve())  # the commands run in another directory
    args.work.mkdir(parents=True, exist_ok=True)
    check_same_experiment(args)
    embedder = load_embedder(args.embedder)  # a mistake in it is found before the slow work
    do(args, "data", [data_job(args)])
    if args.until == "data":
        return

    grid = grid_runs(args.settings)
    do(args, "grid", [training_job(args, run) for run in grid])
    do(args, "answers of the grid, eval", [run_answers(args, run, "eval") for run in grid])
    scorer = Scorer(args.data, embedder)
    choice = choose(args, grid, scorer)
    if args.until == "grid":
        return

    chosen = {arm: Run(arm, choice[arm]["rank"], choice[arm]["rate"], 0) for arm in ARMS}
    runs = [chosen[arm]._replace(seed=seed) for arm in ARMS for seed in range(args.seeds)]
    do(args, "other seeds", [training_job(args, run) for run in runs])
    if args.until == "seeds":
        return

    prompted = list(product(SHOTS, range(args.seeds)))
    for split in ("eval", "test"):
        prompts = [prompts_job(args, method, seed, split) for method, seed in prompted]
        do(args, f"prompts, {split}", prompts)
        answers = [prompted_answers(args, method, seed, split) for method, seed in prompted]
        answers += [run_answers(args, run, split) for run in runs]
        do(args, f"answers, {split}", answers)
    if args.until == "answers":
        return

    report(args, all_predictions(args, runs), choice, scorer)


def check_same_experiment(args: Args) -> None:
    """Write what decides the figures to DIR/settings.json, or compare it with what is there.

    Raises:
        UserError: the directory has results of another model, another WordNet or a trial.
    """
    settings = {
        "model": args.model,
        "embedder": args.embedder,
        "wordnet": str(args.wordnet),
        "limit": args.limit,
    }
    path = args.work / "settings.json"
    if not path.exists():
        replace_file(path, json.dumps(settings, indent=1))
        return
    before = read_json(path)
    for name, value in settings.items():
        require(
            before.get(name) == value,
            f"--work: {args.work} has results with {name} {before.get(name)}, not {value}: "
            "choose another directory",
        )


def grid_runs(settings: Sequence[str]) -> list[Run]:
    """Return the runs to choose from. Raises UserError for a setting that is not RANK:RATE."""
    runs = []
    for setting, arm in product(settings, ARMS):
        rank, _, rate = setting.partition(":")
        require(rank.isdecimal() and rate, f"--settings: {setting!r} is not RANK:LEARNING_RATE")
        runs.append(Run(arm, int(rank), rate, 0))
    return runs


def do(args: Args, stage: str, jobs: Sequence[Job]) -> None:
    """Run the jobs that are not done yet."""
    run_jobs(stage, jobs, args.jobs, args.work / "logs")


# ---- commands


def data_job(args: Args) -> Job:
    """Return the command that makes the splits."""
    arguments = ["examples/ontology/prepare.py", "wordnet", str(args.data)]
    arguments += ["--wordnet", str(args.wordnet)]
    for split, rows in SPLIT_ROWS.items():
        arguments += [f"--{split}_rows", str(args.limit or rows)]
    return Job("data", arguments, args.data / "test_graph.json")  # what it writes last


def training_job(args: Args, run: Run) -> Job:
    """Return the command of a training run."""
    out = args.work / "runs" / run.name
    settings = {
        "output_dir": out,
        "seed": run.seed,
        "model.name": args.model,
        "lora.rank": run.rank,
        "lora.alpha": run.rank,
        "data.train_file": args.data / "train.jsonl",
        "data.eval_file": args.data / "eval.jsonl",
        "data.edge_dropping": run.arm == "masked",
        "train.learning_rate": run.rate,
    }
    if args.limit is not None:
        settings |= {"train.max_steps": 2, "eval.eval_steps": 1}
    arguments = ["train.py", "bench/ontology_config.py"]
    for name, value in settings.items():
        arguments += [f"--{name}", str(value)]
    return Job(run.name, arguments, out / "checkpoint-final")


def best_checkpoint(run: Path) -> Path:
    """Return the checkpoint of a finished run that was best on the evaluation split."""
    final = run / "checkpoint-final"
    state = read_json(final / "trainer_state.json")
    if state["best"]["step"] == state["step"]:
        return final
    return run / f"checkpoint-{state['best']['step']}"


def prompts_job(args: Args, method: str, seed: int, split: str) -> Job:
    """Return the command that writes the prompts of zero-shot or three-shot."""
    rows, prompts = args.data / f"{split}.jsonl", prompts_file(args, method, seed, split)
    arguments = ["examples/ontology/prompts.py", str(rows), str(prompts)]
    if SHOTS[method] > 0:
        arguments += ["--shots", str(SHOTS[method]), "--seed", str(seed)]
        arguments += ["--examples", str(args.data / "train.jsonl")]
    prompts.parent.mkdir(exist_ok=True)
    return Job(f"prompts_{prompts.stem}", arguments, prompts, rows)


def prompts_file(args: Args, method: str, seed: int, split: str) -> Path:
    """Return where the prompts of zero-shot or three-shot are."""
    return args.work / "prompts" / f"{method}_s{seed}_{split}.jsonl"


def prompted_answers(args: Args, method: str, seed: int, split: str) -> Job:
    """Return the command that asks the model as it is, sampling as `run_answers` does.

    It continues a text without a chat template: in that form a small model keeps to the form of the
    examples, in a chat it hardly does. An answer ends at an empty line, as those of runs do; the
    model would go on with articles of its own.
    """
    flags = ["--format", "prompt", "--prompt_template", "{prompt}"]
    flags += ["--response_template", "{completion}", "--chat", "False"]
    flags += ["--temperature", "0.1", "--top_p", "0.9", "--stop", "\n\n"]
    prompts = prompts_file(args, method, seed, split)
    output = answers_file(args, f"{method}_s{seed}", split)
    return answers_job(args.model, prompts, output, [*flags, "--seed", str(seed)])


def run_answers(args: Args, run: Run, split: str) -> Job:
    """Return the command that asks the best checkpoint of a run.

    How it samples is infer.py's default for models of paths, which is OLLM's.
    """
    checkpoint = best_checkpoint(args.work / "runs" / run.name)
    rows, output = args.data / f"{split}.jsonl", answers_file(args, run.name, split)
    return answers_job(str(checkpoint), rows, output, ["--seed", str(run.seed)])


def answers_file(args: Args, name: str, split: str) -> Path:
    """Return where the answers of a run, or of a method and seed, are."""
    return args.work / "answers" / f"{name}_{split}.jsonl"


def answers_job(model: str, rows: Path, output: Path, flags: list[str]) -> Job:
    """Return a command of infer.py."""
    arguments = ["infer.py", model, "--input", str(rows), "--output", str(output)]
    arguments += ["--max_new_tokens", str(MAX_NEW_TOKENS), *flags]
    output.parent.mkdir(exist_ok=True)
    return Job(f"answers_{output.stem}", arguments, output, rows)


# ---- choice and result


def choose(args: Args, grid: Sequence[Run], scorer: Scorer) -> dict[str, Any]:
    """Choose rank and learning rate of each arm by the answers to the evaluation split.

    Returns:
        For each arm "rank" and "rate"; and under "grid" the best continuous F1 of each run, and the
        thresholds that it has it with. All of it is also written to DIR/choice.json.
    """
    found = {}
    for run in grid:
        answers = scorer.graph(answers_file(args, run.name, "eval"))
        found[run] = scorer.best_thresholds(answers)
        thresholds, f1 = found[run]
        print(
            f"   {run.name}: continuous F1 {f1:.4f} on the evaluation split, pruned with "
            f"absolute {thresholds.absolute:.4g}, relative {thresholds.relative:.4g}",
            flush=True,
        )

    choice: dict[str, Any] = {}
    for arm in ARMS:
        best = max((run for run in grid if run.arm == arm), key=lambda run: found[run][1])
        choice[arm] = {"rank": best.rank, "rate": best.rate}
        print(f"{arm}: rank {best.rank}, learning rate {best.rate}", flush=True)
    choice["grid"] = {
        run.name: {"continuous_f1": f1, "thresholds": asdict(thresholds)}
        for run, (thresholds, f1) in found.items()
    }
    replace_file(args.work / "choice.json", json.dumps(choice, indent=1))
    return choice


def all_predictions(args: Args, runs: Sequence[Run]) -> list[Predictions]:
    """Return where the predictions of all methods are, in the order of the table."""
    training_graph = args.data / "train_graph.json"
    both = {"eval": training_graph, "test": training_graph}
    predictions = [Predictions("memorisation", 0, both)]
    names = [
        (method, seed, f"{method}_s{seed}") for method, seed in product(SHOTS, range(args.seeds))
    ]
    names += [(run.arm, run.seed, run.name) for run in runs]
    for method, seed, name in names:
        files = {split: answers_file(args, name, split) for split in ("eval", "test")}
        predictions.append(Predictions(method, seed, files))
    return predictions


def report(
    args: Args, predictions: Sequence[Predictions], choice: dict[str, Any], scorer: Scorer
) -> None:
    """Score all predictions, print the tables, and write results.json and the chart."""
    scores = []
    for of_method in predictions:
        score = scorer.score(of_method)
        counts = ", ".join(f"{name} {count}" for name, count in score.counts.items())
        print(f"   {score.method}, seed {score.seed}: {counts}", flush=True)
        scores.append(score)
    text = json.dumps(results(scores, choice), indent=1)
    replace_file(args.work / "results.json", text)

    methods = methods_of(scores)
    print(f"\nPruned:\n\n{table(scores, lambda score: score.pruned)}")
    print(f"\nNot pruned:\n\n{table(scores, lambda score: score.unpruned)}")
    print(f"\nmasked beside plain:\n\n{difference_table(methods['plain'], methods['masked'])}")
    print(f"\nall figures: {args.work / 'results.json'}")
    if args.chart is not None:
        draw_chart(scores, args.chart)
        print(f"chart: {args.chart}")


if __name__ == "__main__":
    run_script(lambda: main(tyro.cli(Args, description=__doc__, use_underscores=True)))
