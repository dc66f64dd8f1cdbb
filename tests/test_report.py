"""report.html: every figure, answer, mask and setting of a run, in one whole file that loads nothing and runs nothing foreign."""

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
            "training": losses,
            "in_domain": {step: pair[0] for step, pair in evals.items()},
            "out_of_domain": {step: pair[1] for step, pair in evals.items()},
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
    assert (
        chart is not None
        and chart.get("role") == "img"
        and "out_of_domain: 2.8 at step 20, 2.5 at step 80" in str(chart.get("aria-label"))
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
    assert "1,200 characters left out" in shown_texts  # 900 times 한국 and a space are 2,700, of which 1,500 are shown


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_what_is_not_finite_is_left_out_and_counted(report, bad):
    page = report([log_row(1, 2.0), log_row(2, bad), log_row(3, bad), log_row(4, 1.5), evaluation(4, in_domain__loss=1.0)])
    loss = page.figures["Loss"]
    assert "training: 2 not finite, left out" in "".join(loss.itertext())
    assert [line.get("data-values") for line in loss.iter("polyline")] == ["1:2 4:1.5 ", "4:1 "]
    assert "left out" not in "".join(page.figures["Learning rate"].itertext())


def test_every_sample_is_there_and_does_no_harm(report):
    def told(step: int, i: int) -> dict[str, str]:
        return {key: f"\n{key} {i} of step {step}: {NASTY}\n two  spaces " for key in ("prompt", "target", "generated")}

    samples = [{"step": step, "epoch": 1.0, **told(step, i)} for step in (10, 20, 30) for i in range(3)]
    page = report([log_row(30, 1.0, checkpoint=NASTY)], samples)
    texts = [e for e in page.all("div", "text") if "card" not in e["cls"]]
    assert [e["text"] for e in texts] == [told(step, i)[k] for step in (30, 20, 10) for i in range(3) for k in told(0, 0)]
    assert [("details" in e["within"]) for e in texts] == [False] * 9 + [True] * 18
    assert not page.all("img") and len(page.all("script")) == 1 and not page.all("i") and "49" not in texts[0]["text"]
    assert not [e for e in page.elements if any(name.startswith("on") for name in e)]
    assert any(NASTY in e["text"] for e in page.all("dd"))
    assert not page.all("b", "equal"), "none is its target"
    same = report([], [{"step": 1, "prompt": "p", "target": "a\n", "generated": "a"}])
    assert len(same.all("b", "equal")) == 1


def test_text_that_no_file_can_hold(report):
    sample = (
        r'{"step": 1, "prompt": "lone \ud800 half", "target": "nul \u0000 bell \u0007", "generated": "a\u2028b \u0085 \uffff"}'
    )
    page = report(['{"step": 1, "loss": 1.0}', '{"step": 2, "lo', "[]"], [sample, "{"])
    texts = [e["text"] for e in page.all("div", "text")][:3]
    assert texts == ["lone \ufffd half", "nul \u2400 bell \u2407", "a\u2028b \ufffd \ufffd"]
    assert "3 lines of metrics.jsonl and samples.jsonl could not be read" in page.all("p")[1]["text"]


def test_nothing_is_loaded_and_only_its_own_script_runs(report):
    page = report([log_row(1, 2.0)], [{"step": 1, "prompt": "http://example.com/x.png", "target": "t", "generated": "g"}])
    assert not [e for e in page.elements if {"src", "href", "srcset", "action", "data", "poster"} & e.keys()]
    values = [str(v) for e in page.elements for k, v in e.items() if k not in ("tag", "text", "within", "content")]
    style, script = page.all("style")[0]["text"], page.all("script")[0]["text"]
    assert not [
        text for text in [*values, style, script] if re.search(r"https?:|//\w|url\(|@import", text.replace("// Read", ""))
    ]
    policy = next(e["content"] for e in page.all("meta") if e.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.split("; ") == ["default-src 'none'", "style-src 'unsafe-inline'", f"script-src 'sha256-{digest}'"]
    assert len(script.splitlines()) <= 60
    assert "prefers-color-scheme: dark" in style and "@media print" in style


def test_the_whole_config_with_what_was_changed(report, tmp_path):
    config = Config(
        output_dir=str(tmp_path), model=ModelConfig(name=NASTY), train=TrainConfig(learning_rate=3e-4, max_steps=7),
        eval=EvalConfig(metrics=("bleu", "rouge")), data=DataConfig(train_file="<u>"),
    )  # fmt: skip
    page = report([], config=config)

    def rows(values: dict) -> dict[tuple[str, str], str]:
        nested = {(s, f): v for s, fields in values.items() if isinstance(fields, dict) for f, v in fields.items()}
        found = nested | {("run", f): v for f, v in values.items() if not isinstance(v, dict)}
        return {where: json.dumps(value, ensure_ascii=False) for where, value in found.items()}

    told, section, changed = {}, "", {}
    for e in page.elements:
        match e["tag"]:
            case "caption":
                section = e["text"]
            case "tr":
                mark = "changed" in (e.get("cls") or "")
            case "th":
                field = e["text"].removeprefix("● ")
                assert e["text"].startswith("● ") is mark
            case "td":
                told[section, field] = e["text"]
            case "small" if e["within"][-1] == "td":
                changed[section, field] = e["text"]
    expected, defaults = rows(asdict(config)), rows(asdict(Config()))
    assert changed == {where: defaults[where] for where in expected if expected[where] != defaults[where]}
    assert len(changed) == 6
    assert told == {where: value + changed.get(where, "") for where, value in expected.items()}
    assert NASTY in page.all("title")[0]["text"] and page.all("h1")[0]["text"] == tmp_path.name


def test_masks_are_those_of_training(report, documents, tokenizer):
    page = report([])
    shown = page.all("div", "masks")
    assert len(shown) == 4
    for i, example in enumerate(shown):
        text = "".join(tokenizer.decode(documents.ids(i).tolist(), skip_special_tokens=False))
        assert example["text"] == text
        wanted, trained = documents.labels(i), documents.labels(i, (0, 0))
        tokens = {"prompt": wanted == IGNORE, "mark": trained != IGNORE, "del": (wanted != IGNORE) & (trained == IGNORE)}
        assert sum(mask.sum() for mask in tokens.values()) == len(wanted)
        start = page.elements.index(example) + 1
        end = page.elements.index(shown[i + 1]) if i < 3 else len(page.elements)
        for kind, mask in tokens.items():  # letters only: which stretch a space belongs to is the tokenizer's business
            stretch = [e["text"] for e in page.elements[start:end] if e["tag"] == kind or (e.get("cls") == kind)]
            alone = "".join(tokenizer.decode([int(t)], skip_special_tokens=False) for t in documents.ids(i)[mask])
            assert re.sub(r"\s", "", "".join(stretch)) == re.sub(r"\s", "", alone), kind
    assert any(e["tag"] == "del" and "Music" in e["text"] for e in page.elements)
    assert [e["text"] for e in page.all("pre")] == [table(documents.counts)] * 2
    assert "7 lines read, 6 kept, 1 dropped" in page.all("pre")[0]["text"] and "<i>rows" in page.all("pre")[0]["text"]


def state(page: Page) -> dict[str, str]:
    return dict(zip((e["text"] for e in page.all("dt")), (e["text"] for e in page.all("dd")), strict=True))


def test_where_the_run_stands(report, tmp_path):
    rng = random.Random(2)
    inside, outside, rouge = ({step: rng.random() for step in range(5, 55, 5)} for _ in range(3))
    rows: list[dict] = []
    for step in range(5, 55, 5):
        rows += [log_row(step, 2.0 - step / 100), evaluation(step, in_domain__loss=inside[step])]
        rows += [evaluation(step, out_of_domain__loss=outside[step]), evaluation(step, out_of_domain__rougeL=rouge[step])]
        rows += [{"step": step, "checkpoint": f"checkpoint-{step}"}]
    told = state(report(rows))
    at = min(outside, key=outside.__getitem__)
    assert told["Best evaluation"] == f"{outside[at]:.5g}out_of_domain/loss, step {at}"
    assert told["Step"] == "50" and told["Epoch"] == "1.00of 2.0" and told["Tokens"] == "50,0005,000 supervised"
    assert told["Last loss"] == "1.5" and told["Last checkpoint"] == "checkpoint-50"
    config = Config(output_dir=str(tmp_path), train=TrainConfig(metric_for_best_model="rougeL", max_steps=1000))
    told = state(report(rows, config=config))
    at = max(rouge, key=rouge.__getitem__)
    assert told["Best evaluation"] == f"{rouge[at]:.5g}out_of_domain/rougeL, step {at}" and told["Step"] == "50of 1,000"


def test_little_or_nothing_to_show(report):
    page = report([])
    assert list(page.figures) == ["Loss"] and "Nothing logged yet" in "".join(page.figures["Loss"].itertext())
    assert set(state(page).values()) == {"0", "0.00of 2.0", "00 supervised", "none yet"}
    page = report([log_row(1, 2.5)])
    assert lines_read_off(page.figures["Loss"], False)["training"] == [pytest.approx((1, 2.5), rel=1e-4)]
    assert lines_read_off(page.figures["Learning rate"], False)["training"] == [pytest.approx((1, 1e-5), rel=1e-4)]
    assert len(list(page.figures["Loss"].iter("circle"))) == 1
    for values in ([0.0, 0.0], [1000.0, 0.0, 1.0, 1.0], [-1.0, -1.0], [1e-12, 1e12], [0.999999, 1.0], [-5.0, 7.0]):
        figure = report([log_row(step, value) for step, value in enumerate(values, 1)]).figures["Loss"]
        places = [float(p.split(",")[1]) for line in figure.iter("polyline") for p in str(line.get("points")).split()]
        assert len(places) == len(values) and all(0 <= place <= 100 for place in places)
        assert sorted(places, reverse=True) == [p for _, p in sorted(zip(values, places, strict=True))]
        text = "".join(figure.itertext())
        assert ("1 × 0 at the foot" in text) is (values[0] == 1000)


def test_a_resumed_run_is_whole(tmp_path, documents, tokenizer):
    """Through the real tracker: what came after the checkpoint is written again, and the report has each step once."""
    config = Config(output_dir=str(tmp_path), log=LogConfig(tensorboard=False))
    (tmp_path / "config.json").write_text(json.dumps(asdict(config)), encoding="utf-8")
    for start, end in ((0, 8), (5, 12)):
        tracker = Tracker(config, tmp_path, start, 12, [documents], tokenizer, None)
        for step in range(start + 1, end + 1):
            tracker.log(log_row(step, step + start / 10))
            tracker.samples([{"step": step, "prompt": f"<{step}, {start}>", "target": "t", "generated": "g"}])
            tracker.evaluated()
        tracker.close(0)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    values = next(page.figures["Loss"].iter("polyline")).get("data-values")
    assert values == "".join(f"{s}:{s + (0.5 if s > 5 else 0):g} " for s in range(1, 13))
    prompts = [e["text"] for e in page.all("div", "text") if e["text"].startswith("<") and "card" not in e["cls"]]
    assert prompts == [f"<{s}, {5 if s > 5 else 0}>" for s in range(12, 0, -1)]


def test_a_reader_never_sees_half_a_report(tmp_path, documents, tokenizer):
    (tmp_path / "config.json").write_text(json.dumps(asdict(Config())), encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(log_row(s, 1.0)) + "\n" for s in range(1, 500)), encoding="utf-8")
    written = Report(tmp_path, [documents], tokenizer, 0)
    written.write()
    seen, done = [], threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append((tmp_path / "report.html").read_text(encoding="utf-8").endswith("</html>"))

    reader = threading.Thread(target=read)
    reader.start()
    inodes = set()
    for _ in range(15):
        written.write()
        inodes.add((tmp_path / "report.html").stat().st_ino)
    done.set()
    reader.join()
    assert len(seen) > 15 and all(seen) and len(inodes) > 1
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "metrics.jsonl", "report.html"}


def test_what_cannot_be_written_is_said_once_and_ends_nothing(tmp_path, documents, tokenizer, capsys):
    written = Report(tmp_path, [documents], tokenizer, 0)
    (tmp_path / "config.json").write_text(json.dumps(asdict(Config())), encoding="utf-8")
    (tmp_path / "report.html" / "in_the_way").mkdir(parents=True)
    for _ in range(3):
        written.write()
    said = capsys.readouterr()
    assert (said.out + said.err).count("report.html could not be written") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "report.html"}
    Report(tmp_path / "missing", [documents], tokenizer, 0).write()
    said = capsys.readouterr()
    assert "missing/report.html could not be written (FileNotFoundError" in said.out + said.err
