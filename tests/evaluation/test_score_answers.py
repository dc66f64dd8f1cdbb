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
from helpers.embedding import LetterEmbedder
from helpers.graphs import edges_of
from helpers.judge_server import SECRET, running_judge
from minilora.config import DataConfig
from minilora.errors import UserError
from minilora.evaluation import (
    answer_graphs,
    category_graph,
    ontology,
    path_answers,
    pruning,
    text,
)
from minilora.generation.answering import wanted_samples
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
    "Main -> A -> B\nMain -> E -> F\nC -> G\n",
]
TUNING_ANSWERS = [  # right edges in two answers, wrong ones in one
    "Main -> A -> B\nMain -> C\nMain -> W\n",
    "Main -> A -> B\nMain -> A -> D\nMain -> X -> Y\n",
    "Main -> A -> D\nMain -> E -> F\nMain -> Q\n",
    "Main -> E -> F\nMain -> C -> G\nMain -> C -> P\n",
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
    assert figures["graph/lines"] == 10 and figures["graph/well_formed"] == 0.7
    assert figures["exact_match"] == 0.25

    weights = edges_of(category_graph.read_graph(tmp_path / "out.graph.json"))
    assert weights["Main", "A"] == 3 and weights["Main", "Z"] == 1  # answers with such an edge
    assert len(weights) == 6  # none of lines from another root
    assert "out.jsonl" in (tmp_path / "out.graph.html").read_text(encoding="utf-8")
    assert not (tmp_path / "out.pruned_graph.json").exists()


def test_an_edge_counts_once_for_several_answers_to_a_row(graph_args: infer.Args, tmp_path: Path):
    question = graph_args.question
    question.output, question.num_samples = str(tmp_path / "samples.jsonl"), 2
    graph_args.sampling.temperature = 0.5
    samples = wanted_samples(read_input_rows(question.input or ""), 2)
    settings = infer.settings_of_job(graph_args, infer.prepare(graph_args))
    job = Job(question.output, settings, [sample.key for sample in samples])
    for sample in samples:
        job.add(sample.output_row("Main -> A" if sample.number else "Main -> A -> B\nMain -> A"))
    job.finish()
    assert infer.main(graph_args) == 0
    weights = edges_of(category_graph.read_graph(tmp_path / "samples.graph.json"))
    assert weights == {("Main", "A"): 4, ("A", "B"): 4}  # rows, not answers
    figures = read_figures(tmp_path, "samples.metrics.json")
    assert (figures["answers"], figures["graph/lines"]) == (8, 12)


def test_thresholds_are_found_on_the_evaluation_answers(
    graph_args: infer.Args, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    graph_args.ontology.prune_on = str(tmp_path / "eval.jsonl")
    write_tuning(tmp_path)
    assert infer.main(graph_args) == 0

    reference = category_graph.build_graph(REFERENCES, "Main")

    def literal(graph):
        return path_answers.literal_figures(graph, reference)

    def best_on(answers: list[str]) -> tuple[pruning.Thresholds, float]:
        predicted = category_graph.build_graph(answers, "Main")
        return pruning.search_thresholds(
            predicted, lambda pruned: literal(pruned)["edge_f1"], root="Main"
        )

    found, f1 = best_on(TUNING_ANSWERS)
    assert best_on(MADE)[0] != found != pruning.Thresholds()
    assert f"edge_f1 {f1:.4f} on {tmp_path / 'eval.jsonl'}" in capsys.readouterr().err

    graph = category_graph.build_graph(MADE, "Main")
    pruned = pruning.prune(graph, found, "Main")
    figures = read_figures(tmp_path)
    for suffix, expected in (("", graph), ("_pruned", pruned)):
        for name, value in (literal(expected) | {"edges": len(expected.edges)}).items():
            assert figures[f"graph/{name}{suffix}"] == value
    assert edges_of(category_graph.read_graph(tmp_path / "out.graph.json")) == edges_of(graph)
    written = category_graph.read_graph(tmp_path / "out.pruned_graph.json")
    assert edges_of(written) == edges_of(pruned)
    assert 0 < len(pruned.edges) < len(graph.edges)


def test_no_pruned_graph_of_an_earlier_command_is_left(graph_args: infer.Args, tmp_path: Path):
    pruned_file = tmp_path / "out.pruned_graph.json"
    graph_args.ontology.prune = "wikipedia"
    assert infer.main(graph_args) == 0
    assert pruned_file.exists()
    graph_args.ontology.prune = None
    assert infer.main(graph_args) == 0
    assert not pruned_file.exists() and (tmp_path / "out.graph.json").exists()


@pytest.mark.parametrize("name", ["paths", "generated"])
def test_an_evaluation_answer_without_its_columns_is_named(
    name: str, graph_args: infer.Args, tmp_path: Path
):
    graph_args.ontology.prune_on = str(tmp_path / "eval.jsonl")
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


# --- the figures of OLLM, which need an embedder ---


@pytest.fixture
def ontology_args(graph_args: infer.Args, monkeypatch: pytest.MonkeyPatch) -> infer.Args:
    """Return arguments of a finished job for --metrics ontology, with the embedder of tests."""
    monkeypatch.setattr(answer_graphs, "load_embedder", lambda name: LetterEmbedder())
    monkeypatch.setattr(infer, "load_files", None)
    graph_args.scoring.metrics = ("ontology",)
    return graph_args


def test_figures_of_ontology(
    ontology_args: infer.Args, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Of the graph and of the pruned one, in the table and in the file."""
    write_tuning(tmp_path)
    ontology_args.ontology.prune_on = str(tmp_path / "eval.jsonl")
    assert infer.main(ontology_args) == 0

    reference = category_graph.build_graph(REFERENCES, "Main")
    graph = category_graph.build_graph(MADE, "Main")
    embedder = LetterEmbedder()
    found, f1 = pruning.search_thresholds(
        category_graph.build_graph(TUNING_ANSWERS, "Main"),
        lambda pruned: ontology.compare_graphs(pruned, reference, embedder)["continuous_f1"],
        root="Main",
    )
    pruned = pruning.prune(graph, found, "Main")
    assert 0 < len(pruned.edges) < len(graph.edges)
    expected: dict = {"answers": 4, "ontology/lines": 10, "ontology/well_formed": 0.7}
    for suffix, compared in (("", graph), ("_pruned", pruned)):
        expected[f"ontology/nodes{suffix}"] = len(compared)
        expected[f"ontology/edges{suffix}"] = len(compared.edges)
        for name, value in ontology.compare_graphs(compared, reference, embedder).items():
            expected[f"ontology/{name}{suffix}"] = value
    figures = read_figures(tmp_path)
    assert figures == pytest.approx(expected)
    printed = capsys.readouterr()
    assert printed.out == text.format_table(figures) + "\n"
    assert f"continuous_f1 {f1:.4f} on" in printed.err
    assert len(figures) == 1 + 4 + 13 + 2 + 13


def test_a_prompted_model_is_compared_with_a_reference_graph(
    ontology_args: infer.Args, checkpoint: Path, tmp_path: Path
):
    """In format prompt; the rows' own completions need not be paths, nor be there."""
    rows = [{"id": i, "prompt": f"p{i}"} for i in range(4)]
    reference = category_graph.build_graph([*REFERENCES, "Main -> H -> I"], "Main")
    file = tmp_path / "reference.json"
    category_graph.write_graph(reference, file)
    args = infer_args(
        checkpoint,
        input=str(write_rows(tmp_path / "prompts.jsonl", rows)),
        output=str(tmp_path / "prompted.jsonl"),
        metrics=("ontology",),
        format="prompt",
        reference_graph=str(file),
    )
    finish_job(args, MADE)
    assert infer.main(args) == 0
    graph = category_graph.build_graph(MADE, "Main")
    expected = ontology.compare_graphs(graph, reference, LetterEmbedder())
    figures = read_figures(tmp_path, "prompted.metrics.json")
    assert {name: figures[f"ontology/{name}"] for name in expected} == pytest.approx(expected)
    assert figures["ontology/edges"] == 6

    args.scoring.metrics = ("ontology", "exact_match")  # this one compares with the completions
    with pytest.raises(UserError, match=r"prompts\.jsonl:1: .*'completion'"):
        infer.main(args)


def test_answers_without_any_path_have_figures_of_0(
    ontology_args: infer.Args, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ontology_args.question.output = str(tmp_path / "prose.jsonl")
    ontology_args.ontology.prune = "wikipedia"
    finish_job(ontology_args, ["I do not know.", "", "Things -> A", "Main"])
    assert infer.main(ontology_args) == 0
    assert "no answer has a path that begins with 'Main'" in capsys.readouterr().err
    figures = read_figures(tmp_path, "prose.metrics.json")
    compared = {key: value for key, value in figures.items() if key.partition("_")[2]}
    assert len(compared) == 1 + 13 + 15 and figures["ontology/well_formed"] == 0
    assert {value for key, value in figures.items() if "_f1" in key} == {0}
    assert len(read_rows(tmp_path / "prose.jsonl")) == 4


def test_comparison_shows_the_figures_of_ontology(
    ontology_args: infer.Args, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_tuning(tmp_path)
    ontology_args.scoring.compare = str(tmp_path / "eval.jsonl")
    assert infer.main(ontology_args) == 0
    (line,) = re.findall(r"^ontology/edges +.*$", capsys.readouterr().out, re.MULTILINE)
    assert line.split()[1:] == ["12", "6", "-6"]


def test_a_missing_embedder_is_reported_before_anything_is_answered(
    graph_args: infer.Args, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(infer, "load_files", None)
    graph_args.scoring.metrics = ("ontology",)
    graph_args.ontology.embedder = str(tmp_path / "absent")
    graph_args.question.output = str(tmp_path / "new.jsonl")
    with pytest.raises(UserError, match="absent"):
        infer.main(graph_args)
    assert not (tmp_path / "new.jsonl").exists()


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
