"""bench/ontology.py: its runs, what it chooses and by what, its tables, what it does again."""

import json
import re
import statistics
from pathlib import Path

import networkx
import pytest

from helpers.embedding import LetterEmbedder
from minilora.cli import load_config
from minilora.errors import UserError
from minilora.evaluation.category_graph import build_graph, read_graph, write_graph
from minilora.evaluation.ontology import compare_graphs
from minilora.evaluation.pruning import Thresholds, prune

ROOT = Path(__file__).resolve().parents[2]
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "bench")
    import ontology
    from ontology_jobs import Job, run_jobs
    from ontology_scores import SHOWN, Score, Scorer, chart_page, describe, difference_table, table

EVAL = ["Things -> tool -> saw", "Things -> tool -> axe", "Things -> food -> soup"]
TEST = ["Things -> plant -> moss", "Things -> plant -> fern", "Things -> bird -> crow"]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Return a directory with reference graphs whose nodes are ids, as prepare.py writes them."""
    (tmp_path / "answers").mkdir()
    (tmp_path / "data").mkdir()
    for split, lines in {"train": EVAL[:2], "eval": EVAL, "test": TEST}.items():
        names = build_graph(lines, "Things")
        ids = {name: f"n{i}" for i, name in enumerate(names)}
        graph = networkx.relabel_nodes(names, ids)
        graph.graph["root"] = ids["Things"]
        write_graph(graph, tmp_path / "data" / f"{split}_graph.json")
    return tmp_path


def arguments(work: Path, **fields: object) -> ontology.Args:
    return ontology.Args("examples/tiny-mistral", "an embedder", work, **fields)


def write_answers(work: Path, name: str, split: str, texts: list[str]) -> None:
    lines = [json.dumps({"id": i, "generated": text}) + "\n" for i, text in enumerate(texts)]
    (work / "answers" / f"{name}_{split}.jsonl").write_text("".join(lines))


def test_a_run_has_the_settings_that_its_name_says_and_those_of_all_runs(tmp_path: Path):
    run = ontology.Run("plain", 8, "1e-3", 2)
    job = ontology.training_job(arguments(tmp_path), run)
    assert job.output == tmp_path / "runs/plain_r8_lr1e-3_s2/checkpoint-final"
    script, *flags = job.arguments
    config = load_config([str(ROOT / flags[0]), *flags[1:]])
    assert script == "train.py"
    assert (config.lora.rank, config.lora.alpha, config.seed) == (8, 8, 2)
    assert config.train.learning_rate == 1e-3 and not config.data.edge_dropping
    assert config.train.early_stopping_patience == 2 and config.eval.eval_steps == 32
    assert config.train.max_steps is None

    masked = ontology.training_job(arguments(tmp_path, limit=4), run._replace(arm="masked"))
    trial = load_config([str(ROOT / flags[0]), *masked.arguments[2:]])
    assert trial.data.edge_dropping and trial.train.max_steps == 2


def test_every_setting_is_tried_with_both_arms():
    names = [run.name for run in ontology.grid_runs(["32:3e-4", "8:1e-3"])]
    assert names == [
        "plain_r32_lr3e-4_s0",
        "masked_r32_lr3e-4_s0",
        "plain_r8_lr1e-3_s0",
        "masked_r8_lr1e-3_s0",
    ]
    for wrong in ("32", "32:", "x:1e-3"):
        with pytest.raises(UserError, match=rf"--settings: '{wrong}' is not RANK:LEARNING_RATE"):
            ontology.grid_runs([wrong])


def test_a_trial_is_not_taken_for_the_experiment(tmp_path: Path):
    ontology.check_same_experiment(arguments(tmp_path, limit=8))
    ontology.check_same_experiment(arguments(tmp_path, limit=8, seeds=1))
    with pytest.raises(UserError, match="has results with limit 8, not None"):
        ontology.check_same_experiment(arguments(tmp_path))


def test_the_checkpoint_that_answers_is_the_best_of_its_run(tmp_path: Path):
    final = tmp_path / "checkpoint-final"
    final.mkdir()
    for best, name in {32: "checkpoint-32", 128: "checkpoint-final"}.items():
        state = {"step": 128, "best": {"step": best, "value": 1.5}}
        (final / "trainer_state.json").write_text(json.dumps(state))
        assert ontology.best_checkpoint(tmp_path) == tmp_path / name


def test_each_arm_is_chosen_by_its_pruned_answers_to_the_evaluation_split(work: Path):
    """The test split has no answers yet. The best answers have noise, which pruning removes."""
    grid = [ontology.Run(arm, rank, "3e-4", 0) for arm, rank in [("plain", 32), ("plain", 8)]] + [
        ontology.Run("masked", rank, "3e-4", 0) for rank in (32, 8)
    ]
    noise = ["Things -> xylophone -> zzz"]
    write_answers(work, grid[0].name, "eval", EVAL[:1])
    write_answers(work, grid[1].name, "eval", EVAL * 2 + noise)
    write_answers(work, grid[2].name, "eval", EVAL)
    write_answers(work, grid[3].name, "eval", ["no path at all"])
    scorer = Scorer(work / "data", LetterEmbedder())
    choice = ontology.choose(arguments(work), grid, scorer)

    assert choice["plain"] == {"rank": 8, "rate": "3e-4"}
    assert choice["masked"] == {"rank": 32, "rate": "3e-4"}
    figures = {name: found["continuous_f1"] for name, found in choice["grid"].items()}
    assert figures[grid[1].name] == pytest.approx(1, abs=1e-6)
    assert figures[grid[3].name] == 0
    assert json.loads((work / "choice.json").read_text()) == choice


def test_a_method_is_scored_as_it_is_and_pruned_by_its_evaluation_answers(
    work: Path, capsys: pytest.CaptureFixture[str]
):
    args = arguments(work, seeds=2)
    runs = [ontology.Run(arm, 8, "3e-4", seed) for arm in ontology.ARMS for seed in (0, 1)]
    predictions = ontology.all_predictions(args, runs)
    noise = ["Things -> xylophone -> zzz"]
    for which in predictions[1:]:
        name = which.files["test"].stem.removesuffix("_test")
        write_answers(work, name, "eval", EVAL * 2 + noise)
        write_answers(work, name, "test", TEST * 2 + noise + ["moss -> Things", "chatter"])
    for split in ("eval", "test"):
        write_answers(work, "zero-shot_s1", split, ["I cannot say."])
    embedder = LetterEmbedder()
    ontology.report(args, predictions, {}, Scorer(work / "data", embedder))

    written = json.loads((work / "results.json").read_text())["scores"]
    methods = ["memorisation"] + ["zero-shot"] * 2 + ["three-shot"] * 2
    assert [row["method"] for row in written] == [*methods, "plain", "plain", "masked", "masked"]
    masked = written[-1]
    assert masked["counts"] == {
        "lines": 9, "valid lines": 7, "edges": 7, "edges after pruning": 5
    }  # fmt: skip
    assert masked["pruned"]["continuous_f1"] == pytest.approx(1, abs=1e-6)
    assert masked["pruned"]["motif_distance"] == 0
    assert masked["unpruned"]["literal_f1"] == pytest.approx(2 * 5 / (7 + 5))
    silent = written[2]
    assert silent["counts"]["valid lines"] == 0 and silent["pruned"]["fuzzy_f1"] == 0

    # memorisation is the training graph, whose nodes are ids
    training, reference = (read_graph(work / f"data/{s}_graph.json") for s in ("train", "test"))
    assert written[0]["unpruned"] == pytest.approx(compare_graphs(training, reference, embedder))
    thresholds = Thresholds(**written[0]["thresholds"])
    pruned = prune(training, thresholds, training.graph["root"])
    assert written[0]["pruned"] == pytest.approx(compare_graphs(pruned, reference, embedder))

    shown = capsys.readouterr().out
    zero_shot = [row["pruned"]["literal_f1"] for row in written[1:3]]
    cell = f"{statistics.mean(zero_shot):.3f} ± {statistics.stdev(zero_shot):.3f}"
    assert f"| zero-shot | {cell} |" in shown
    assert f"| memorisation | {written[0]['pruned']['literal_f1']:.3f} |" in shown
    assert "| motif distance | +0.000 ± 0.000 | 0 of 2 |" in shown


def made_up_score(method: str, seed: int, value: float, **others: float | None) -> Score:
    figures = dict.fromkeys(SHOWN, value) | others
    return Score(method, seed, {}, Thresholds(), figures, figures)


def test_tables_know_that_a_smaller_motif_distance_is_better_and_tell_what_is_missing():
    plain = [made_up_score("plain", seed, 0.5 + seed / 10) for seed in (0, 1)]
    masked = [made_up_score("masked", seed, 0.6) for seed in (0, 1)]
    rows = difference_table(plain, masked).splitlines()
    assert "| literal F1 | +0.050 ± 0.071 | 1 of 2 |" in rows
    assert "| motif distance | +0.050 ± 0.071 | 0 of 2 |" in rows

    refused = [*plain[:1], made_up_score("plain", 1, 0.5, graph_f1=None)]
    row = table(refused, lambda score: score.pruned).splitlines()[-1]
    known = "0.500 ± 0.000"
    assert row == f"| plain | {known} | {known} | {known} | not computed | {known} |"
    assert describe([0.25]) == "0.250"


def test_the_chart_has_every_method_and_marks_the_best():
    scores = [made_up_score("a < b", 0, 0.2), made_up_score("masked", 0, 0.4)]
    scores[1].pruned = {**scores[1].pruned, "graph_f1": None}
    page = chart_page(scores, 200)
    assert "a &lt; b" in page and "a < b" not in page
    for title in SHOWN.values():
        assert f">{title}</text>" in page
    best = re.findall(r'fill="#c05f00">(0\.\d+)</text>', page)
    assert best == ["0.400", "0.400", "0.400", "0.200", "0.200"]  # of graph F1 there is 0.2 alone


def test_a_finished_job_is_not_done_again_and_an_unfinished_one_is(tmp_path: Path):
    output, questions = tmp_path / "answers.jsonl", tmp_path / "rows.jsonl"
    questions.write_text("{}\n{}\n")
    append = f"open({str(output)!r}, 'a').write('{{}}\\n')"
    job = Job("asking", ["-c", append], output, questions)
    logs = tmp_path / "logs"
    with pytest.raises(SystemExit, match="asking: exit code 0; the same command goes on"):
        run_jobs("answers", [job], 1, logs)
    for _ in range(2):  # the first run adds the second row, the second one nothing
        run_jobs("answers", [job], 1, logs)
        assert output.read_text() == "{}\n{}\n"


def test_a_job_that_fails_shows_the_end_of_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    failing = Job("failing", ["-c", "raise ValueError('no such model')"], tmp_path / "never")
    with pytest.raises(SystemExit, match="ValueError: no such model"):
        run_jobs("grid", [failing], 1, tmp_path / "logs")
    assert "-c 'raise ValueError" in capsys.readouterr().out.replace('"', "'")
