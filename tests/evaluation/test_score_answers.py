"""Scores of infer.py's answers: metrics, the graph of category paths, and a judge."""

import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import infer
from helpers.asking import (
    ARTICLES,
    FORMATS,
    SHORT,
    TEXT,
    answer_file,
    article_of,
    assistant,
    infer_args,
    read_rows,
    train_adapter,
    transformers_model,
    write_base,
    write_rows,
)
from helpers.judge_server import SECRET, running_judge
from minilora.config import DataConfig
from minilora.errors import UserError
from minilora.evaluation import ontology, text
from minilora.generation.jobs import Job, read_input_rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base("llama3", tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def checkpoint(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train an adapter on articles."""
    return train_adapter(base, tmp_path_factory.mktemp("runs") / "run", DataConfig(), ARTICLES)


def read_figures(tmp_path: Path, name: str = "out.metrics.json") -> dict:
    return json.loads((tmp_path / name).read_text(encoding="utf-8"))


# --- metrics of texts, and the loss ---

REFERENCE_OF: dict[str, Callable[[dict], str]] = {
    "paths": lambda row: "".join(" -> ".join(path) + "\n" for path in row["paths"]),
    "prompt": lambda row: row["completion"],
    "messages": lambda row: row["messages"][-1]["content"],
    "text": lambda row: row["text"].split("### Answer:\n")[1],
}


def token_losses(directory: Path, name: str, row: dict) -> list[float]:
    """Return the losses of a row's supervised tokens, by transformers and PEFT."""
    model, tokens = transformers_model(directory)

    def render(turns: list[dict], **options) -> list[int]:
        return tokens.apply_chat_template(turns, return_dict=False, **options)

    spans = []
    if name == "text":
        asked, marker, _ = row["text"].rpartition("### Answer:\n")
        ids = tokens(row["text"] + tokens.eos_token).input_ids
        spans.append((len(tokens(asked + marker).input_ids), len(ids)))
    else:
        turns = row.get("messages")
        if turns is None:
            turns = [*FORMATS[name].asked(row), assistant(REFERENCE_OF[name](row))]
        ids = render(turns)
        for i, turn in enumerate(turns):
            if turn["role"] == "assistant":
                begin = len(render(turns[:i], add_generation_prompt=True))
                spans.append((begin, len(render(turns[: i + 1]))))

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    log_probabilities = logits.double().log_softmax(-1)
    return [
        -log_probabilities[i - 1, ids[i]].item() for begin, end in spans for i in range(begin, end)
    ]


@pytest.mark.parametrize("name", REFERENCE_OF)
def test_metrics(name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The figures are those of the output's rows; the loss is transformers'."""
    data, rows, _ = FORMATS[name]
    model = train_adapter(base, tmp_path / "run", data, rows)
    source, target = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "answers.jsonl"
    metrics = ["chrf", "exact_match", "edit_distance", "rouge"]
    if name == "paths":
        metrics.append("graph")
    capsys.readouterr()
    asked = ("ppl", *metrics, "loss")
    answer_file(model, source, target, metrics=asked, batch_size=3, **SHORT)

    figures = read_figures(tmp_path, "answers.metrics.json")
    assert capsys.readouterr().out == text.format_table(figures) + "\n"
    losses = [loss for row in rows for loss in token_losses(model, name, row)]
    assert figures.pop("loss") == pytest.approx(statistics.fmean(losses), rel=1e-4)
    assert figures.pop("ppl") == pytest.approx(math.exp(statistics.fmean(losses)), rel=1e-3)
    answers = [row["generated"] for row in read_rows(target)]
    references = [REFERENCE_OF[name](row) for row in rows]
    scores = text.score(metrics, answers, references)
    assert figures == {"answers": len(rows), "loss/rows": len(rows), **scores}
    assert (tmp_path / "answers.graph.json").exists() == (name == "paths")


def test_metrics_of_raw_prompts(checkpoint: Path, tmp_path: Path):
    """They are the same when the answers are there already."""
    rows = [{"prompt": TEXT, "completion": "x"}, {"prompt": "y", "completion": "z"}]
    source, target = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    options = {"raw": True, "metrics": ("edit_distance",), **SHORT}
    found = []
    for _ in range(2):
        answer_file(checkpoint, source, target, **options)
        found.append((tmp_path / "out.metrics.json").read_bytes())
        (tmp_path / "out.metrics.json").unlink()
    assert found[0] == found[1]


def test_a_loss_of_no_tokens_is_refused(base: Path, tmp_path: Path):
    """Every row is longer than the longest document of the run."""
    data = DataConfig(format="prompt", max_seq_length=40)
    model = train_adapter(base, tmp_path / "run", data, [{"prompt": "a", "completion": "b"}])
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "word " * 60, "completion": "b"}])
    with pytest.raises(UserError):
        answer_file(model, source, tmp_path / "out.jsonl", metrics=("loss",), **SHORT)


def test_a_reference_without_number_is_refused_before_the_model_is_loaded(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(infer, "load_files", None)
    rows = [{**row, "paths": [["Main", "no number"]]} for row in ARTICLES]
    source = write_rows(tmp_path / "in.jsonl", rows)
    with pytest.raises(UserError, match="numeric: reference 1"):
        answer_file(checkpoint, source, tmp_path / "out.jsonl", metrics=("numeric",), **SHORT)


# --- the graph of category paths ---

PATHS = [
    [["Main", "A", "B"], ["Main", "C"]],
    [["Main", "A", "D"]],
    [["Main", "E", "F"]],
    [["Main", "C", "G"]],
]
MADE = [
    "Main -> A -> B\nMain -> A\nx -> x\n",
    "Main -> A -> D\nMain -> Z\nno path\n",
    "Main -> E -> F\n",
    "G -> C\nC -> G\nC -> G\n",
]
TUNING_ANSWERS = [
    "Main -> A -> B\nMain -> A -> Z\n",
    "Main -> A -> D\nMain -> D\n",
    "Main -> A -> D\n",
    "Main -> C\nMain -> C -> A\n",
]
ROWS_OF_PATHS: list[dict] = [
    {"id": i, "title": f"t{i}", "abstract": "a", "paths": paths} for i, paths in enumerate(PATHS)
]
REFERENCES = [REFERENCE_OF["paths"](row) for row in ROWS_OF_PATHS]


def finish_job(args: infer.Args, answers: list[str]) -> None:
    """Leave the output that infer.py would leave, with these answers."""
    source, output = args.question.input, args.question.output
    assert source is not None and output is not None
    rows = [values for _, values in read_input_rows(source)]
    settings = infer.settings_of_job(args, infer.prepare(args))
    job = Job(output, settings, [(row["id"], 0) for row in rows])
    for row, answer in zip(rows, answers, strict=True):
        job.add(row | {"generated": answer})
    job.finish()


@pytest.fixture
def graph_args(checkpoint: Path, tmp_path: Path) -> infer.Args:
    """Return arguments of a finished job with answers that are paths."""
    source = write_rows(tmp_path / "in.jsonl", ROWS_OF_PATHS)
    args = infer_args(
        checkpoint,
        input=str(source),
        output=str(tmp_path / "out.jsonl"),
        metrics=("graph", "exact_match"),
    )
    finish_job(args, MADE)
    return args


def write_tuning(tmp_path: Path) -> list[dict]:
    """Write an output for an evaluation set, for --prune_on; returns its rows."""
    rows = [
        row | {"generated": answer}
        for row, answer in zip(ROWS_OF_PATHS, TUNING_ANSWERS, strict=True)
    ]
    write_rows(tmp_path / "eval.jsonl", rows)
    return rows


def test_graph_of_answers_that_are_there(
    graph_args: infer.Args, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without the model."""
    monkeypatch.setattr(infer, "load_files", None)
    assert infer.main(graph_args) == 0
    figures = read_figures(tmp_path)
    assert figures == {"answers": 4, **text.score(graph_args.scoring.metrics, MADE, REFERENCES)}
    assert figures["graph/lines"] == 10 and figures["graph/well_formed"] == 0.9
    assert figures["exact_match"] == 0.25

    graph = ontology.read_graph(tmp_path / "out.graph.json")
    weights = {(u, v): weight for u, v, weight in graph.edges(data="weight")}
    assert weights["Main", "A"] == 3 and weights["C", "G"] == 2 and weights["x", "x"] == 1
    assert len(weights) == 9


def test_thresholds_are_found_on_the_evaluation_answers(
    graph_args: infer.Args, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    graph_args.scoring.prune_on = str(tmp_path / "eval.jsonl")
    write_tuning(tmp_path)
    assert infer.main(graph_args) == 0

    reference = ontology.build_graph(REFERENCES)
    found, f1 = ontology.search_thresholds(ontology.build_graph(TUNING_ANSWERS), reference)
    own, _ = ontology.search_thresholds(ontology.build_graph(MADE), reference)
    assert own != found != ontology.Thresholds()
    assert f"edge F1 {f1:.4f}" in capsys.readouterr().err

    expected, pruned = ontology.score(MADE, REFERENCES, found)
    written = read_figures(tmp_path)
    graph_figures = {key: value for key, value in written.items() if "graph/" in key}
    assert graph_figures == {f"graph/{key}": value for key, value in expected.items()}
    graph = ontology.read_graph(tmp_path / "out.graph.json")
    assert sorted(graph.edges(data=True)) == sorted(pruned.edges(data=True))
    assert 0 < len(pruned.edges) < expected["edges"]


@pytest.mark.parametrize("name", ["paths", "generated"])
def test_an_evaluation_answer_without_its_columns_is_named(
    name: str, graph_args: infer.Args, tmp_path: Path
):
    graph_args.scoring.prune_on = str(tmp_path / "eval.jsonl")
    rows = write_tuning(tmp_path)
    del rows[1][name]
    write_rows(tmp_path / "eval.jsonl", rows)
    with pytest.raises(UserError, match=rf'eval\.jsonl:2: .*"{name}"'):
        infer.main(graph_args)


@pytest.mark.parametrize("paths", [None, "a", [1], ["ab"], [["a", 1]]])
def test_an_answer_without_reference_is_named(
    paths: object, graph_args: infer.Args, tmp_path: Path
):
    graph_args.question.output = str(tmp_path / "other.jsonl")
    rows = [dict(row) for row in ROWS_OF_PATHS]
    if paths is None:
        del rows[2]["paths"]
    else:
        rows[2]["paths"] = paths
    write_rows(tmp_path / "in.jsonl", rows)
    finish_job(graph_args, MADE)
    with pytest.raises(UserError, match=r'in\.jsonl:3: .*"paths"'):
        infer.main(graph_args)


# --- a judge ---


def test_a_judge_end_to_end(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """By the rubric in examples/; a second command asks for nothing; the key is in no file."""
    pytest.importorskip("openai")
    pytest.importorskip("jsonschema")
    rows = [{"id": f"질문 {i}", "title": f"t{i} 서울", "abstract": "x"} for i in range(6)]
    source, target = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    sampled = {"temperature": 0.7, "max_new_tokens": 8, "stop": ()}
    data = answer_file(checkpoint, source, target, **sampled)
    answers = [row["generated"] for row in read_rows(target)]
    scores = {
        answer: {"correctness": 1 + i % 5, "faithfulness": 5, "style": 1 + i % 3}
        for i, answer in enumerate(answers)
    }

    def reply(answer: str, n: int) -> str:
        return json.dumps({"scores": scores[answer], "reason": "이유"})

    with running_judge(reply, monkeypatch) as server:
        rubric = str(ROOT / "examples" / "rubric.json")
        judge = {"judge": server.url, "judge_model": "j", "rubric": rubric, "judge_requests": 3}
        capsys.readouterr()
        assert answer_file(checkpoint, source, target, **judge, **sampled) == data
        printed = capsys.readouterr().out
        assert len(server.bodies) == 6 and server.most_in_flight <= 3
        assert server.keys == {f"Bearer {SECRET}"}
        assert answer_file(checkpoint, source, target, **judge, **sampled) == data
        assert len(server.bodies) == 6

    verdicts = read_rows(tmp_path / "out.judge.jsonl")
    assert [row["id"] for row in verdicts] == [row["id"] for row in rows]
    assert [row["scores"] for row in verdicts] == [scores[answer] for answer in answers]
    asked = [body["messages"][1]["content"] for body in server.bodies]
    for row in rows:
        assert any(f"\n{article_of(row)}\n====" in prompt for prompt in asked)

    summary = read_figures(tmp_path, "out.judge.json")
    assert summary["failed"] == {} and summary["stats"]["correctness"]["n"] == 6
    assert summary["stats"]["correctness"]["mean"] == pytest.approx((1 + 2 + 3 + 4 + 5 + 1) / 6)
    assert summary["stats"]["style"]["sd"] == pytest.approx(statistics.stdev([1, 2, 3, 1, 2, 3]))
    assert re.search(r"^faithfulness +6 +5\.000 +0\.000", printed, re.MULTILINE)
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file


def test_a_judge_that_sees_the_references(
    graph_args: infer.Args, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By the other rubric in examples/. A row without reference is named before anything runs."""
    pytest.importorskip("openai")
    pytest.importorskip("jsonschema")
    monkeypatch.setattr(infer, "load_files", None)
    verdict = json.dumps({"scores": {"agreement": 2, "completeness": 4}, "reason": "so"})
    with running_judge(lambda answer, n: verdict, monkeypatch) as server:
        scoring = graph_args.scoring
        scoring.metrics, scoring.judge, scoring.judge_model = (), server.url, "j"
        scoring.rubric = str(ROOT / "examples" / "rubric_with_reference.json")
        assert infer.main(graph_args) == 0
        asked = [body["messages"][1]["content"] for body in server.bodies]
        for answer, reference in zip(MADE, REFERENCES, strict=True):
            (prompt,) = [prompt for prompt in asked if f"\n{answer}\n==== end" in prompt]
            assert re.search(rf"answer, for you alone:\n\n==== .*\n{reference}\n==== end", prompt)

        rows = [dict(row) for row in ROWS_OF_PATHS]
        del rows[2]["paths"]
        write_rows(tmp_path / "in.jsonl", rows)
        with pytest.raises(UserError, match=r'in\.jsonl:3: the rubric\'s {reference}.*"paths"'):
            infer.main(graph_args)
        assert len(server.bodies) == 4
