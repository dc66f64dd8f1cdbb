"""report.html: every figure, answer, mask and setting of a run in one file that loads nothing, runs nothing foreign and is whole."""

import base64
import hashlib
import json
import math
import random
import re
import threading
import xml.etree.ElementTree as ET
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest

import tiny_tokenizers
from minilora.config import Config, DataConfig, EvalConfig, LogConfig, ModelConfig, TrainConfig
from minilora.data import Documents
from minilora.labels import IGNORE
from minilora.running.cache import load_documents
from minilora.running.reading import table
from minilora.tokenizer import Tokenizer
from minilora.tracking import Tracker
from minilora.tracking.report import Report

NASTY = "</script><img src=x onerror=alert(1)> & \"quotes\" '</pre>' {{ 7 * 7 }} 한국어"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizers.BUILDERS["mistral"]())


@pytest.fixture(scope="session")
def documents(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, private_cache: None) -> Documents:
    """Six articles, whose edge Root -> Music is far more frequent than the others; one row is no article."""
    rows = [
        {"title": f"T{i}", "abstract": f"<b>Abstract</b> {i}", "paths": [["Root", "Music", f"Leaf {j}"] for j in range(4)]}
        for i in range(6)
    ]
    file = tmp_path_factory.mktemp("data") / "<i>rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"title": "no paths"}]), encoding="utf-8")
    return load_documents(str(file), DataConfig(num_workers=1), tokenizer, "train_file")


class Page(HTMLParser):
    """What a browser would make of a page: elements with their attributes, text and open ancestors."""

    VOID = ("meta", "link", "img", "br", "input", "base")

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[dict] = []
        self.open: list[dict] = []
        self.source = source
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {[e['tag'] for e in self.open]}"

    def handle_starttag(self, tag: str, attrs: list) -> None:
        within = [element["tag"] for element in self.open]
        element = {"tag": tag, "text": "", "within": within, **{k if k != "class" else "cls": v for k, v in attrs}}
        self.elements.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["text"] += data

    def all(self, tag: str, cls: str | None = None) -> list[dict]:
        return [e for e in self.elements if e["tag"] == tag and (cls is None or cls in (e.get("cls") or "").split())]

    @property
    def figures(self) -> dict[str, ET.Element]:
        found = [ET.fromstring(figure) for figure in re.findall(r"<figure.*?</figure>", self.source, re.DOTALL)]
        return {str(figure.findtext(".//h3")): figure for figure in found}


@pytest.fixture
def report(tmp_path: Path, documents: Documents, tokenizer: Tokenizer):
    """report(metrics, samples, config) -> the page of a run that has written those; lines that are strings stay as they are."""

    def make(metrics: list, samples: list = (), config: Config | None = None) -> Page:  # type: ignore[assignment]
        config = config or Config(output_dir=str(tmp_path))
        (tmp_path / "config.json").write_text(json.dumps(asdict(config)), encoding="utf-8")
        for name, rows in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
            lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
            (tmp_path / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        (tmp_path / "report.html").unlink(missing_ok=True)
        Report(tmp_path, [documents, documents], tokenizer, 0).write()
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return make


def log_row(step: int, loss: object, **others) -> dict:
    row = {"step": step, "epoch": step / 50, "loss": loss, "grad_norm": 1.5 + step % 3, "lr": 1e-5 * step}
    return {**row, "tokens": 1000 * step, "supervised_tokens": 100 * step, "tokens_per_second": 23456.7 + step, **others}


def evaluation(step: int, **figures: float) -> dict:
    return {"step": step, "epoch": step / 50} | {"eval/" + k.replace("__", "/"): v for k, v in figures.items()}


def percent(text: str | None) -> float:
    assert text and text.endswith("%")
    return float(text[:-1])


def axis(figure: ET.Element, which: str) -> list[tuple[float, float]]:
    """(place in percent, value) of an axis' labels, as a reader sees them."""
    ticks = figure.findall(f".//g[@class='tick-{which}']/text") + figure.findall(f".//g[@class='tick-{which} odd']/text")
    return sorted((percent(t.get(which)), float(str(t.text).replace(",", ""))) for t in ticks)


def lines_read_off(figure: ET.Element, log: bool) -> dict[str, list[tuple[float, float]]]:
    """The points of each line as a ruler on the page would give them, from the outermost labels of both axes."""

    def ruler(ticks: list[tuple[float, float]], log: bool):
        (p0, v0), (p1, v1) = ticks[0], ticks[-1]
        if log:
            v0, v1 = math.log10(v0), math.log10(v1)
        straight = [v0 + (p - p0) / (p1 - p0) * (v1 - v0) for p, _ in ticks]
        shown = [math.log10(v) if log else v for _, v in ticks]
        assert straight == pytest.approx(shown, abs=2e-4 * abs(v1 - v0)), "labels stand where their values belong"
        return lambda p: 10 ** (v0 + (p - p0) / (p1 - p0) * (v1 - v0)) if log else v0 + (p - p0) / (p1 - p0) * (v1 - v0)

    x, y = ruler(axis(figure, "x"), False), ruler(axis(figure, "y"), log)
    return {
        str(line.get("data-name")): [
            (x(float(a)), y(float(b))) for a, b in (p.split(",") for p in str(line.get("points")).split())
        ]
        for line in figure.iter("polyline")
    }


@pytest.mark.parametrize("first, log", [(4.0, False), (9000.0, True)])
def test_lines_stand_where_the_axes_say(report, first, log):
    rng = random.Random(0)
    losses = {step: first if step <= 6 else 3 - step / 40 + rng.gauss(0, 0.1) for step in range(2, 82, 2)}
    evals = {step: (2.5 - step / 100, 2.9 - step / 200) for step in (20, 40, 60, 80)}
    rows = [log_row(step, loss) for step, loss in losses.items()]
    for step, (inside, outside) in evals.items():
        rows += [evaluation(step, in_domain__loss=inside), evaluation(step, out_of_domain__loss=outside)]
        rows += [evaluation(step, out_of_domain__rougeL=step / 100, out_of_domain__graph__edge_f1=0.25)]
    page = report(rows)
    assert list(page.figures) == [
        "Loss", "Learning rate", "Gradient norm, before clipping", "Tokens per second", "rougeL", "graph/edge_f1",
    ]  # fmt: skip
    loss = page.figures["Loss"]
    assert ("logarithmic axis" in "".join(loss.itertext())) is log
    expected = {
        "Loss": {
            "training": losses, "in_domain": {s: v[0] for s, v in evals.items()}, "out_of_domain": {s: v[1] for s, v in evals.items()}
        },
        "Learning rate": {"training": {step: 1e-5 * step for step in losses}},
        "Gradient norm, before clipping": {"training": {step: 1.5 + step % 3 for step in losses}},
        "Tokens per second": {"training": {step: 23456.7 + step for step in losses}},
        "rougeL": {"out_of_domain": {step: step / 100 for step in evals}},
        "graph/edge_f1": {"out_of_domain": dict.fromkeys(evals, 0.25)},
    }  # fmt: skip
    for title, lines in expected.items():
        figure = page.figures[title]
        read = lines_read_off(figure, log and title == "Loss")
        assert read.keys() == lines.keys()
        places = axis(figure, "y")
        assert len(places) >= 3 and places[0][0] <= 0.01 and places[-1][0] >= 99.99
        for name, points in lines.items():
            assert [x for x, _ in read[name]] == pytest.approx(list(points), abs=0.01)
            assert [y for _, y in read[name]] == pytest.approx(list(points.values()), rel=1e-3)
            told = [line.get("data-values") for line in figure.iter("polyline") if line.get("data-name") == name]
            pairs = [pair.split(":") for pair in str(told[0]).split()]
            assert [int(step) for step, _ in pairs] == list(points)
            assert [float(v.replace(",", "")) for _, v in pairs] == pytest.approx(list(points.values()), rel=5e-5)
    legend = [item.text or item[0].tail for item in loss.iter("li")]
    assert legend == ["training", "in_domain", "out_of_domain"]
    marks = [circle.findtext("title") for circle in loss.iter("circle")]  # readable without the script
    assert "in_domain, step 40: 2.1" in marks and len(marks) == 48
    chart = loss.find("svg")
    assert chart is not None and chart.get("role") == "img" and "out_of_domain: 2.8 at step 20, 2.5 at step 80" in str(
        chart.get("aria-label")
    )


def test_a_long_run_keeps_its_extremes_and_stays_small(report):
    rng = random.Random(1)
    losses = [2 + rng.gauss(0, 0.2) for _ in range(20_000)]
    rows = [log_row(step, loss) for step, loss in enumerate(losses, 1)]
    samples = [
        {"step": 100 * (i // 5 + 1), "prompt": f"question {i} " * 60, "target": "t " * 300, "generated": "한국 " * 900}
        for i in range(200)
    ]
    page = report(rows, samples)
    line = next(page.figures["Loss"].iter("polyline"))
    pairs = [pair.split(":") for pair in str(line.get("data-values")).split()]
    shown = {int(step): float(value) for step, value in pairs}
    assert len(pairs) == len(shown) == len(str(line.get("points")).split()) <= 802
    assert list(shown) == sorted(shown) and {1, 20_000} <= shown.keys()
    for start in range(0, 20_000, 500):
        stretch = range(start, start + 500)
        assert {min(stretch, key=losses.__getitem__) + 1, max(stretch, key=losses.__getitem__) + 1} <= shown.keys()
    assert all(value == pytest.approx(losses[step - 1], rel=1e-4) for step, value in shown.items())
    assert "20,000 points" in "".join(page.figures["Loss"].itertext())
    assert not page.figures["Loss"].findall(".//circle")
    assert len(page.source.encode()) < 1_000_000
    assert "140 older samples are left out" in page.source and len(page.all("div", "sample")) == 60
    shown_texts = "".join(e["text"] for e in page.all("div", "text"))
    assert all((f"question {i} " in shown_texts) is (i >= 140) for i in range(200))
    assert "300 characters left out" in shown_texts  # 900 times 한국 and a space are 2,700, of which 1,500 are shown
