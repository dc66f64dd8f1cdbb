"""report.html shows all of a run, loads nothing, and runs nothing but its own script."""

import base64
import hashlib
import json
import math
import random
import re
import threading
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from helpers import tiny_tokenizers
from helpers.html_page import Page
from minilora.config import (
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    RowFormat,
    TrainConfig,
)
from minilora.data.cache import load_documents
from minilora.data.dataset import IGNORE_INDEX, Documents, LabelDraw
from minilora.data.tokenize import format_counts
from minilora.data.tokenizer import Tokenizer
from minilora.tracking.report import Report, best_evaluation
from minilora.tracking.tracker import Tracker
from minilora.training.evaluate import Evaluation

NASTY = "</script><img src=x onerror=alert(1)> & \"quotes\" '</pre>' {{ 7 * 7 }} 한국어"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizers.BUILDERS["mistral"]())


@pytest.fixture(scope="session")
def documents(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, private_cache: None
) -> Documents:
    """Six articles in which the edge Root -> Music is over-frequent, and a row that is none."""
    paths = [["Root", "Music", f"Leaf {j}"] for j in range(4)]
    rows: list[dict] = []
    for i in range(6):
        rows.append({"title": f"T{i}", "abstract": f"<b>Abstract</b> {i}", "paths": paths})
    rows.append({"title": "no paths"})
    file = tmp_path_factory.mktemp("data") / "<i>rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_documents(str(file), DataConfig(num_workers=1), tokenizer, "train_file")


def text_of(element: ET.Element) -> str:
    return "".join(element.itertext())


def write_config(out: Path, config: Config) -> None:
    (out / "config.json").write_text(json.dumps(asdict(config)), encoding="utf-8")


MakeReport = Callable[..., Page]


@pytest.fixture
def report(tmp_path: Path, documents: Documents, tokenizer: Tokenizer) -> MakeReport:
    """Return a function that writes a run's files and its report, and reads the page.

    Rows that are strings are written as lines as they are.
    """

    def make(metrics: Sequence, samples: Sequence = (), config: Config | None = None) -> Page:
        write_config(tmp_path, config or Config(output_dir=str(tmp_path)))
        for name, rows in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
            lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
            (tmp_path / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        (tmp_path / "report.html").unlink(missing_ok=True)
        Report(tmp_path, [documents, documents], tokenizer, 0).write()
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return make


def log_row(step: int, loss: object, **others) -> dict:
    return {
        "step": step,
        "epoch": step / 50,
        "loss": loss,
        "grad_norm": 1.5 + step % 3,
        "lr": 1e-5 * step,
        "tokens": 1000 * step,
        "supervised_tokens": 100 * step,
        "tokens_per_second": 23456.7 + step,
        "share_of_peak": 0.4321,
        "peak_memory": 3 * 2**29,
        **others,
    }


def evaluation(step: int, figures: dict[str, float]) -> dict:
    row = {"step": step, "epoch": step / 50}
    return row | {f"eval/{name}": value for name, value in figures.items()}


# --- charts, read as with a ruler


def percent(text: str | None) -> float:
    assert text and text.endswith("%")
    return float(text[:-1])


def axis(figure: ET.Element, name: str) -> list[tuple[float, float]]:
    """Return (place in percent, value) of the labels of axis "x" or "y", in order."""
    labels = figure.findall(f".//g[@class='tick-{name}']/text")
    labels += figure.findall(f".//g[@class='tick-{name} odd']/text")
    ticks = []
    for label in labels:
        value = float(str(label.text).replace(",", ""))
        ticks.append((percent(label.get(name)), value))
    return sorted(ticks)


def ruler(ticks: list[tuple[float, float]], log: bool) -> Callable[[float], float]:
    """Return what turns a place into a value, by the outermost labels of an axis."""
    (p0, v0), (p1, v1) = ticks[0], ticks[-1]
    if log:
        v0, v1 = math.log10(v0), math.log10(v1)

    def linear(place: float) -> float:
        return v0 + (place - p0) / (p1 - p0) * (v1 - v0)

    straight = [linear(place) for place, _ in ticks]
    shown = [math.log10(value) if log else value for _, value in ticks]
    tolerance = 2e-4 * abs(v1 - v0)
    assert straight == pytest.approx(shown, abs=tolerance), "a label stands in the wrong place"
    return (lambda place: 10 ** linear(place)) if log else linear


def drawn_lines(figure: ET.Element, log: bool = False) -> dict[str, list[tuple[float, float]]]:
    """Return the (step, value) points of each line, measured in the drawing."""
    x, y = ruler(axis(figure, "x"), False), ruler(axis(figure, "y"), log)
    lines = {}
    for line in figure.iter("polyline"):
        points = [point.split(",") for point in str(line.get("points")).split()]
        lines[str(line.get("data-name"))] = [(x(float(a)), y(float(b))) for a, b in points]
    return lines


def told_values(figure: ET.Element) -> dict[str, dict[int, float]]:
    """Return {line: {step: value}} as the attributes for the script hold them."""
    lines = {}
    for line in figure.iter("polyline"):
        pairs = [pair.split(":") for pair in str(line.get("data-values")).split()]
        values = {int(step): float(value.replace(",", "")) for step, value in pairs}
        assert len(values) == len(pairs)
        lines[str(line.get("data-name"))] = values
    return lines


@pytest.mark.parametrize(("first_loss", "log"), [(4.0, False), (9000.0, True)])
def test_lines_stand_where_the_axes_say(report: MakeReport, first_loss: float, log: bool):
    rng = random.Random(0)
    losses = {}
    for step in range(2, 82, 2):
        losses[step] = first_loss if step <= 6 else 3 - step / 40 + rng.gauss(0, 0.1)
    in_domain = {step: 2.5 - step / 100 for step in (20, 40, 60, 80)}
    out_of_domain = {step: 2.9 - step / 200 for step in in_domain}
    rouge = {step: step / 100 for step in in_domain}
    rows = [log_row(step, loss) for step, loss in losses.items()]
    for step in in_domain:
        figures = {"out_of_domain/rougeL": rouge[step], "out_of_domain/graph/edge_f1": 0.25}
        rows.append(evaluation(step, {"in_domain/loss": in_domain[step]}))
        rows.append(evaluation(step, {"out_of_domain/loss": out_of_domain[step]}))
        rows.append(evaluation(step, figures))

    page = report(rows)
    expected: dict[str, dict[str, dict[int, float]]] = {
        "Loss": {"training": losses, "in_domain": in_domain, "out_of_domain": out_of_domain},
        "Learning rate": {"training": {step: 1e-5 * step for step in losses}},
        "Gradient norm, before clipping": {"training": {step: 1.5 + step % 3 for step in losses}},
        "Tokens per second": {"training": {step: 23456.7 + step for step in losses}},
        "rougeL": {"out_of_domain": rouge},
        "graph/edge_f1": {"out_of_domain": dict.fromkeys(in_domain, 0.25)},
    }
    assert list(page.figures) == list(expected)
    for title, lines in expected.items():
        figure = page.figures[title]
        drawn, told = drawn_lines(figure, log and title == "Loss"), told_values(figure)
        assert drawn.keys() == told.keys() == lines.keys()
        labels = axis(figure, "y")
        assert len(labels) >= 3 and labels[0][0] <= 0.01 and labels[-1][0] >= 99.99
        for name, points in lines.items():
            values = list(points.values())
            assert [x for x, _ in drawn[name]] == pytest.approx(list(points), abs=0.01)
            assert [y for _, y in drawn[name]] == pytest.approx(values, rel=1e-3)
            assert list(told[name]) == list(points)
            assert list(told[name].values()) == pytest.approx(values, rel=5e-5)

    loss = page.figures["Loss"]
    assert ("logarithmic axis" in text_of(loss)) is log
    legend = [item.text or item[0].tail for item in loss.iter("li")]
    assert legend == ["training", "in_domain", "out_of_domain"]
    circles = [circle.findtext("title") for circle in loss.iter("circle")]  # need no script
    assert "in_domain, step 40: 2.1" in circles and len(circles) == 48
    chart = loss.find("svg")
    assert chart is not None and chart.get("role") == "img"
    assert "out_of_domain: 2.8 at step 20, 2.5 at step 80" in str(chart.get("aria-label"))


def test_a_long_run_keeps_its_extremes_and_stays_small(report: MakeReport):
    rng = random.Random(1)
    losses = [2 + rng.gauss(0, 0.2) for _ in range(20_000)]
    rows = [log_row(step, loss) for step, loss in enumerate(losses, 1)]
    samples = []
    for i in range(200):
        texts = {"prompt": f"question {i} " * 60, "target": "t " * 300, "generated": "한국 " * 900}
        samples.append({"step": 100 * (i // 5 + 1), **texts})
    page = report(rows, samples)

    figure = page.figures["Loss"]
    (line,) = figure.iter("polyline")
    shown = told_values(figure)["training"]
    assert len(shown) == len(str(line.get("points")).split()) <= 802
    assert list(shown) == sorted(shown) and {1, 20_000} <= shown.keys()
    for start in range(0, 20_000, 500):
        stretch = range(start, start + 500)
        lowest = min(stretch, key=losses.__getitem__) + 1
        highest = max(stretch, key=losses.__getitem__) + 1
        assert {lowest, highest} <= shown.keys()
    expected = [losses[step - 1] for step in shown]
    assert list(shown.values()) == pytest.approx(expected, rel=1e-4)
    assert "20,000 points" in text_of(figure)
    assert not figure.findall(".//circle")

    assert len(page.source.encode()) < 1_000_000
    assert "140 older samples are left out" in page.source
    assert len(page.all("div", "sample")) == 60
    texts_shown = "".join(element["text"] for element in page.all("div", "text"))
    for i in range(200):
        assert (f"question {i} " in texts_shown) is (i >= 140)
    # an answer has 2,700 characters, of which 1,500 are shown
    assert "1,200 characters left out" in texts_shown


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_values_that_are_not_finite_are_left_out_and_counted(report: MakeReport, bad: object):
    rows = [log_row(1, 2.0), log_row(2, bad), log_row(3, bad), log_row(4, 1.5)]
    page = report([*rows, evaluation(4, {"in_domain/loss": 1.0})])
    loss = page.figures["Loss"]
    assert "training: 2 not finite, left out" in text_of(loss)
    values = [line.get("data-values") for line in loss.iter("polyline")]
    assert values == ["1:2 4:1.5 ", "4:1 "]
    assert "left out" not in text_of(page.figures["Learning rate"])


@pytest.mark.parametrize(
    "values",
    [
        [0.0, 0.0],
        [1000.0, 0.0, 1.0, 1.0],
        [-1.0, -1.0],
        [1e-12, 1e12],
        [0.999999, 1.0],
        [-5.0, 7.0],
    ],
)
def test_any_values_stand_within_the_chart_in_their_order(report: MakeReport, values: list[float]):
    rows = [log_row(step, value) for step, value in enumerate(values, 1)]
    figure = report(rows).figures["Loss"]
    heights = []
    for line in figure.iter("polyline"):
        points = str(line.get("points")).split()
        heights += [float(point.split(",")[1]) for point in points]
    assert len(heights) == len(values) and all(0 <= height <= 100 for height in heights)
    by_value = [height for _, height in sorted(zip(values, heights, strict=True))]
    assert sorted(heights, reverse=True) == by_value
    assert ("1 × 0 at the foot" in text_of(figure)) is (values[0] == 1000)


def test_a_run_with_one_point_or_none(report: MakeReport):
    page = report([])
    assert list(page.figures) == ["Loss"]
    assert "Nothing logged yet" in text_of(page.figures["Loss"])
    assert set(state(page).values()) == {"0", "0.00of 2.0", "00 supervised", "none yet"}

    page = report([log_row(1, 2.5)])
    for title, value in (("Loss", 2.5), ("Learning rate", 1e-5)):
        (point,) = drawn_lines(page.figures[title])["training"]
        assert point == pytest.approx((1, value), rel=1e-4)
    assert len(list(page.figures["Loss"].iter("circle"))) == 1


# --- the ends of epochs


def epoch_lines(figure: ET.Element, last_step: int) -> dict[str, float]:
    """Return {title: step} of the lines at the ends of epochs."""
    lines = {}
    for line in figure.findall(".//line[@class='epoch']"):
        title = line.findtext("title")
        if title:  # the one in the legend has none
            assert line.get("x1") == line.get("x2")
            assert (line.get("y1"), line.get("y2")) == ("0", "100%")
            lines[title] = percent(line.get("x1")) * last_step / 100
    return lines


def test_every_chart_marks_the_ends_of_epochs(report: MakeReport):
    rows = [log_row(step, 2 - step / 1000) for step in range(10, 180, 10)]
    rows.append(evaluation(170, {"out_of_domain/loss": 1.5, "out_of_domain/rougeL": 0.5}))
    page = report(rows)
    assert len(page.figures) == 5
    for figure in page.figures.values():
        lines = epoch_lines(figure, last_step=170)
        assert list(lines) == ["end of epoch 1", "end of epoch 2", "end of epoch 3"]
        assert list(lines.values()) == pytest.approx([50, 100, 150], abs=0.01)
    assert [e["text"] for e in page.all("li") if "epoch" in e["text"]] == ["end of an epoch"]
    style = page.all("style")[0]["text"]
    assert style.count("--epoch: #") == 2, "one color for light, one for dark"


def test_a_run_without_a_second_epoch_has_no_such_lines(report: MakeReport):
    """The end of the log has the chart's edge."""
    without_epoch = {"step": 60, "loss": 1.0}
    for rows in ([], [log_row(20, 2.0)], [log_row(20, 2.0), log_row(50, 1.0)], [without_epoch]):
        page = report(rows)
        assert "end of an epoch" not in page.source and "end of epoch" not in page.source
        assert not page.all("line", "epoch")


@pytest.mark.parametrize(("num_epochs", "every"), [(26, 1), (27, 2), (60, 5), (400, 20)])
def test_many_ends_of_epochs_are_thinned_out(report: MakeReport, num_epochs: int, every: int):
    last_step = 50 * num_epochs
    page = report([log_row(step, 1.0) for step in (1, last_step)])
    lines = epoch_lines(page.figures["Loss"], last_step)
    shown = range(every, num_epochs, every)
    assert 10 <= len(lines) <= 25
    assert list(lines) == [f"end of epoch {epoch}" for epoch in shown]
    assert list(lines.values()) == pytest.approx([50 * epoch for epoch in shown], abs=0.5)
    if every > 1:
        legend = f"ends of the epochs {every}, {2 * every}, {3 * every}, … of {num_epochs - 1}"
        assert legend in page.all("ul", "legend")[0]["text"]


def test_overfitting_is_said_in_a_sentence(report: MakeReport, tmp_path: Path):
    """Training falls from epoch to epoch; the held-out loss is lowest at the end of the first."""
    rows: list[dict] = []
    for step in range(10, 210, 10):
        rows.append(log_row(step, 2 - 0.5 * ((step - 1) // 50) + step % 20 / 1000))
        if step % 50 == 0:
            rows.append(evaluation(step, {"out_of_domain/loss": 1.5 + (step - 50) / 1000}))
    (sentence,) = report(rows).all("p", "warning")
    assert sentence["text"] == (
        "Overfitting: since step 50 (epoch 1) the training loss has fallen where the rows begin to "
        "repeat, from 2.005 to 0.505 over 3 epoch ends, but the loss on held-out rows has not (1.5 "
        "then, 1.65 now): the model learns these rows by heart. Fewer epochs or more rows help; "
        "train.metric_for_best_model=loss keeps the best checkpoint."
    )

    train = TrainConfig(metric_for_best_model="rougeL")
    (sentence,) = report(rows, config=Config(str(tmp_path), train=train)).all("p", "warning")
    assert sentence["text"].endswith("by heart. Fewer epochs or more rows help.")

    last = evaluation(200, {"out_of_domain/loss": 1.4})
    assert not report([*rows[:-1], last]).all("p", "warning")


# --- samples and other texts


def test_every_sample_is_shown_and_does_no_harm(report: MakeReport):
    keys = ("prompt", "target", "generated")

    def texts_of(step: int, i: int) -> dict[str, str]:
        return {key: f"\n{key} {i} of step {step}: {NASTY}\n two  spaces " for key in keys}

    samples, expected = [], []
    for step in (10, 20, 30):
        samples += [{"step": step, "epoch": 1.0, **texts_of(step, i)} for i in range(3)]
    for step in (30, 20, 10):
        for i in range(3):
            expected += texts_of(step, i).values()
    page = report([log_row(30, 1.0, checkpoint=NASTY)], samples)
    elements = [e for e in page.all("div", "text") if "card" not in e["cls"]]
    assert [e["text"] for e in elements] == expected
    assert [("details" in e["within"]) for e in elements] == [False] * 9 + [True] * 18
    assert not page.all("img") and not page.all("i") and len(page.all("script")) == 1
    assert "49" not in elements[0]["text"]
    assert not [e for e in page.elements if any(name.startswith("on") for name in e)]
    assert any(NASTY in e["text"] for e in page.all("dd"))
    assert not page.all("b", "equal"), "none is its target"


def test_an_answer_that_equals_its_target_is_marked(report: MakeReport):
    page = report([], [{"step": 1, "prompt": "p", "target": "a\n", "generated": "a"}])
    assert len(page.all("b", "equal")) == 1


def test_texts_that_html_or_utf8_cannot_hold(report: MakeReport):
    prompt = r'"lone \ud800 half"'
    target = r'"nul \u0000 bell \u0007"'
    generated = r'"a\u2028b \u0085 \uffff"'
    sample = f'{{"step": 1, "prompt": {prompt}, "target": {target}, "generated": {generated}}}'
    page = report(['{"step": 1, "loss": 1.0}', '{"step": 2, "lo', "[]"], [sample, "{"])
    expected = ["lone \ufffd half", "nul \u2400 bell \u2407", "a\u2028b \ufffd \ufffd"]
    assert page.sample_texts() == expected
    message = "3 lines of metrics.jsonl and samples.jsonl could not be read"
    assert message in page.all("p")[1]["text"]


def test_nothing_is_loaded_and_only_its_own_script_runs(report: MakeReport):
    sample = {"step": 1, "prompt": "http://example.com/x.png", "target": "t", "generated": "g"}
    page = report([log_row(1, 2.0)], [sample])
    loading = {"src", "href", "srcset", "action", "data", "poster"}
    assert not [e for e in page.elements if loading & e.keys()]

    style, script = page.all("style")[0]["text"], page.all("script")[0]["text"]
    texts = [style, script.replace("// Read", "")]
    for element in page.elements:
        for name, value in element.items():
            if name not in ("tag", "text", "within", "content"):
                texts.append(str(value))
    assert not [text for text in texts if re.search(r"https?:|//\w|url\(|@import", text)]

    policies = [e for e in page.all("meta") if e.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policies[0]["content"].split("; ") == [
        "default-src 'none'",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{digest}'",
    ]
    assert len(script.splitlines()) <= 60
    assert "prefers-color-scheme: dark" in style and "@media print" in style


# --- category paths


def test_the_graph_of_the_last_answers_is_shown(report: MakeReport):
    """Compared with their targets; an earlier step's answers are not part of it."""
    target = "Root -> Music -> Jazz\nRoot -> Art\n"
    steps = {
        10: ["Root -> Old\n"],
        20: ["Root -> Music -> Rock\nMusic -> Jazz\n", f"Root -> Music\nRoot -> {NASTY}\n"],
    }
    samples = []
    for step, answers in steps.items():
        for answer in answers:
            texts = {"prompt": "p", "target": target, "generated": answer}
            samples.append({"step": step, **texts})
    page = report([log_row(20, 1.0)], samples)

    start = page.elements.index(page.all("div", "tree")[0])
    (tree,) = page.all("div", "tree")
    names: dict[str, list[str]] = {}
    for element in page.elements[start:]:
        if element["tag"] == "span" and "li" in element["within"]:
            names.setdefault(element["cls"], []).append(element["text"])
    assert names == {
        "start": ["Root"],
        "right": ["✓Music"],
        "wrong": ["✗Rock", f"✗{NASTY}"],
        "missing": ["○Jazz", "○Art"],
    }
    assert [e["text"] for e in page.all("small") if "li" in e["within"]] == ["2", "1", "1"]
    assert "Old" not in tree["text"] and not page.all("img") and len(page.all("script")) == 1
    said = " ".join(page.source.split())
    assert "last step's 2 answers. <b>1 of their 4 lines is left out</b>" in said


def test_the_dropped_labels_are_shown(report: MakeReport, tmp_path: Path):
    """Of six articles with four paths each, Root -> Music occurs 24 times, and a leaf 6 times."""
    page = report([])
    (chart, most_dropped) = page.all("div", "keep")
    mean = (24 + 4 * 6) / 5
    start, end = page.elements.index(chart), page.elements.index(most_dropped)
    circles = [e for e in page.elements[start:end] if e["tag"] == "circle"]
    assert [circle["text"] for circle in circles] == [
        "n = 6: 4 edges, kept with probability 1",
        f"n = 24: 1 edge, kept with probability {mean / 24:.5g}",
    ]
    assert percent(circles[0]["cy"]) == 0
    assert percent(circles[1]["cy"]) == pytest.approx(100 * (1 - mean / 24))
    cells = [e["text"] for e in page.elements[end:] if e["tag"] in ("th", "td")][:8]
    assert cells[:4] == ["u → v", "n", "kept", "dropped in an epoch"]
    assert cells[4:] == ["Root → Music", "24", "40 %", "14.4"]
    share = 100 * (24 - mean) / 48
    said = " ".join(page.source.split())
    assert f"In expectation {share:.3g} % of the 48 names below a parent lose their labels" in said
    assert "drawn anew each epoch" in page.source

    once = Config(output_dir=str(tmp_path), data=DataConfig(edge_draw="once"))
    page = report([], config=once)
    assert "drawn once)" in page.source and "each epoch)" not in page.source


def test_a_run_without_paths_has_neither_graph_nor_dropped_labels(
    tmp_path: Path, tokenizer: Tokenizer, private_cache: None
):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "p", "completion": "Root -> A"}) + "\n")
    data = DataConfig(format="prompt", num_workers=1)
    rows = load_documents(str(file), data, tokenizer, "train_file")
    write_config(tmp_path, Config(output_dir=str(tmp_path), data=data))
    sample = {"step": 1, "prompt": "p", "target": "Root -> A", "generated": "Root -> B"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n", encoding="utf-8")
    Report(tmp_path, [rows], tokenizer, 0).write()
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Root -> B" in page.sample_texts()
    assert not page.all("div", "tree") and not page.all("div", "keep")
    titles = [element["text"] for element in page.all("h2")]
    assert titles == [
        "Charts", "Generated samples", "Training examples and their masks", "Data", "Settings",
    ]  # fmt: skip


# --- settings, masks, the state of the run


def settings_of(config: Config) -> dict[tuple[str, str], str]:
    """Return {(section, field): JSON} as the page should show the settings."""
    settings = {}
    for name, value in asdict(config).items():
        fields = value.items() if isinstance(value, dict) else [(name, value)]
        section = name if isinstance(value, dict) else "run"
        for field, setting in fields:
            settings[section, field] = json.dumps(setting, ensure_ascii=False)
    return settings


def test_all_settings_are_shown_with_what_was_changed(report: MakeReport, tmp_path: Path):
    config = Config(
        output_dir=str(tmp_path),
        model=ModelConfig(name=NASTY),
        train=TrainConfig(learning_rate=3e-4, max_steps=7),
        eval=EvalConfig(metrics=("bleu", "rouge")),
        data=DataConfig(train_file="<u>", file_formats={"<u>": RowFormat(format="text")}),
    )
    page = report([], config=config)

    shown, shown_defaults, section, field, is_marked = {}, {}, "", "", False
    (headline,) = [element for element in page.all("h2") if element["text"] == "Settings"]
    for element in page.elements[page.elements.index(headline) :]:
        match element["tag"]:
            case "caption":
                section = element["text"]
            case "tr":
                is_marked = "changed" in (element.get("cls") or "")
            case "th":
                field = element["text"].removeprefix("● ")
                assert element["text"].startswith("● ") is is_marked
            case "td":
                shown[section, field] = element["text"]
            case "small" if element["within"][-1] == "td":
                shown_defaults[section, field] = element["text"]

    expected, defaults = settings_of(config), settings_of(Config())
    changed = [name for name in expected if expected[name] != defaults[name]]
    assert len(changed) == 7
    assert shown_defaults == {name: defaults[name] for name in changed}
    for name, value in expected.items():
        assert shown.pop(name) == value + shown_defaults.get(name, "")
    assert not shown
    assert NASTY in page.all("title")[0]["text"] and page.all("h1")[0]["text"] == tmp_path.name


def test_masks_are_those_of_training(
    report: MakeReport, documents: Documents, tokenizer: Tokenizer
):
    page = report([])
    examples = page.all("div", "masks")
    assert len(examples) == 4
    for i, example in enumerate(examples):
        ids = documents.ids(i)
        assert example["text"] == tokenizer.decode(ids.tolist(), skip_special_tokens=False)

        supervised = documents.labels(i) != IGNORE_INDEX
        trained = documents.labels(i, LabelDraw(0, epoch=0)) != IGNORE_INDEX
        masks = {"prompt": ~supervised, "mark": trained, "del": supervised & ~trained}
        assert sum(mask.sum() for mask in masks.values()) == len(ids)
        start = page.elements.index(example) + 1
        end = page.elements.index(examples[i + 1]) if i < 3 else len(page.elements)
        for kind, mask in masks.items():
            pieces = []
            for element in page.elements[start:end]:
                if kind in (element["tag"], element.get("cls")):
                    pieces.append(element["text"])
            tokens = [tokenizer.decode([int(t)], skip_special_tokens=False) for t in ids[mask]]
            # without spaces: the tokenizer decides which piece they belong to
            assert re.sub(r"\s", "", "".join(pieces)) == re.sub(r"\s", "", "".join(tokens)), kind

    assert any("Music" in element["text"] for element in page.all("del"))
    tables = [element["text"] for element in page.all("pre")]
    assert tables == [format_counts(documents.counts)] * 2
    assert "7 lines read, 6 kept, 1 dropped" in tables[0] and "<i>rows" in tables[0]


NEW_KEYS = ("share_of_peak", "peak_memory")


def state(page: Page) -> dict[str, str]:
    """Return the tiles at the top of the page."""
    names = [element["text"] for element in page.all("dt")]
    values = [element["text"] for element in page.all("dd")]
    return dict(zip(names, values, strict=True))


def test_the_state_of_the_run(report: MakeReport, tmp_path: Path):
    rng = random.Random(2)
    steps = range(5, 55, 5)
    in_domain, out_of_domain, rouge = ({step: rng.random() for step in steps} for _ in range(3))
    rows: list[dict] = []
    for step in steps:
        rows.append(log_row(step, 2.0 - step / 100))
        rows.append(evaluation(step, {"in_domain/loss": in_domain[step]}))
        rows.append(evaluation(step, {"out_of_domain/loss": out_of_domain[step]}))
        rows.append(evaluation(step, {"out_of_domain/rougeL": rouge[step]}))
        rows.append({"step": step, "checkpoint": f"checkpoint-{step}"})

    best = min(out_of_domain, key=out_of_domain.__getitem__)
    assert state(report(rows)) == {
        "Step": "50",
        "Epoch": "1.00of 2.0",
        "Tokens": "50,0005,000 supervised",
        "Last loss": "1.5",
        "Best evaluation": f"{out_of_domain[best]:.5g}out_of_domain/loss, step {best}",
        "Last checkpoint": "checkpoint-50",
        "Speed": "23,507 tokens/s43.2 % of the matrix peak",
        "Peak memory": "1.5 GiB",
    }
    before = [{key: value for key, value in row.items() if key not in NEW_KEYS} for row in rows]
    shown = state(report(before))  # a run that was begun by an earlier version
    assert (shown["Speed"], shown["Peak memory"]) == ("23,507 tokens/s", "none yet")
    train = TrainConfig(metric_for_best_model="rougeL", max_steps=1000)
    shown = state(report(rows, config=Config(output_dir=str(tmp_path), train=train)))
    best = max(rouge, key=rouge.__getitem__)
    assert shown["Best evaluation"] == f"{rouge[best]:.5g}out_of_domain/rougeL, step {best}"
    assert shown["Step"] == "50of 1,000"


def test_the_best_evaluation_is_one_of_the_last_evaluation_sets():
    rows = [evaluation(step, {"out_of_domain/loss": step / 10}) for step in (5, 10, 15)]
    assert best_evaluation(rows, "loss")["step"] == 5
    assert best_evaluation(rows, "loss", first_eval_step=6)["step"] == 10


def test_the_report_of_a_resumed_run_has_each_step_once(
    tmp_path: Path, documents: Documents, tokenizer: Tokenizer
):
    """What an earlier process wrote after the checkpoint is written again."""
    config = Config(output_dir=str(tmp_path), log=LogConfig(tensorboard=False))
    write_config(tmp_path, config)
    for start, end in ((0, 8), (5, 12)):
        tracker = Tracker(config, start, 12, [documents], tokenizer)
        for step in range(start + 1, end + 1):
            tracker.log(log_row(step, step + start / 10))
            sample = {"prompt": f"<{step}, {start}>", "target": "t", "generated": "g"}
            tracker.log_evaluation({"step": step}, Evaluation([], [sample]))
        tracker.close(0)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    resumed = {step: step if step <= 5 else step + 0.5 for step in range(1, 13)}
    shown = told_values(page.figures["Loss"])["training"]
    assert list(shown.items()) == list(resumed.items())
    prompts = [text for text in page.sample_texts() if text.startswith("<")]
    assert prompts == [f"<{step}, {5 if step > 5 else 0}>" for step in range(12, 0, -1)]


def test_a_run_that_is_never_evaluated_has_a_report(
    tmp_path: Path, documents: Documents, tokenizer: Tokenizer
):
    """Its tracker gets the training documents alone."""
    config = Config(
        output_dir=str(tmp_path), eval=EvalConfig(eval_steps=0), log=LogConfig(tensorboard=False)
    )
    write_config(tmp_path, config)
    with Tracker(config, 0, 4, [documents], tokenizer) as tracker:
        for step in range(1, 5):
            tracker.log(log_row(step, 2.0))
        tracker.saved({"step": 4, "epoch": 4 / 50}, "checkpoint-final")
        tracker.close(0)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert list(told_values(page.figures["Loss"])) == ["training"]
    assert [element["text"] for element in page.all("pre")] == [format_counts(documents.counts)]
    assert len(page.all("div", "masks")) == 4
    shown = state(page)
    assert shown["Best evaluation"] == "off (eval.eval_steps)"
    assert shown["Last checkpoint"] == "checkpoint-final"
    assert "None: evaluation is off (eval.eval_steps)." in page.source


# --- the file


def test_a_reader_never_sees_half_a_report(
    tmp_path: Path, documents: Documents, tokenizer: Tokenizer
):
    write_config(tmp_path, Config())
    lines = [json.dumps(log_row(step, 1.0)) + "\n" for step in range(1, 500)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    report, path = Report(tmp_path, [documents], tokenizer, 0), tmp_path / "report.html"
    report.write()
    is_whole, done = [], threading.Event()

    def read() -> None:
        while not done.is_set():
            is_whole.append(path.read_text(encoding="utf-8").endswith("</html>"))

    reader = threading.Thread(target=read)
    reader.start()
    inodes = set()
    for _ in range(15):
        report.write()
        inodes.add(path.stat().st_ino)
    done.set()
    reader.join()
    assert len(is_whole) > 15 and all(is_whole) and len(inodes) > 1
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "report.html"}


def test_a_report_that_cannot_be_written_is_logged_once_and_ends_nothing(
    tmp_path: Path, documents: Documents, tokenizer: Tokenizer, capsys: pytest.CaptureFixture
):
    report = Report(tmp_path, [documents], tokenizer, 0)
    write_config(tmp_path, Config())
    (tmp_path / "report.html" / "in_the_way").mkdir(parents=True)
    for _ in range(3):
        report.write()
    said = capsys.readouterr()
    assert (said.out + said.err).count("report.html could not be written") == 1
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "report.html"}

    Report(tmp_path / "missing", [documents], tokenizer, 0).write()
    said = capsys.readouterr()
    message = "missing/report.html could not be written (FileNotFoundError"
    assert message in said.out + said.err
