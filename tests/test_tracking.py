"""Trackers get the numbers of metrics.jsonl; what a resumed run writes again is not there twice."""

import json
import struct
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.plugin_util import markdown_to_safe_html
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

import train
from minilora.config import Config, UserError
from minilora.running.cache import load_documents
from minilora.tokenizer import Tokenizer
from minilora.tracking import Tracker, append, markdown
from tiny_runs import base_model, config, metrics


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return base_model(tmp_path_factory.mktemp("base") / "model")


UGLY = {
    "pipes": "a | b || c", "newlines": "one\ntwo\n\nfour\n", "html": "<b>bold</b> &amp; <script>x</script> <br> </td>",
    "scripts": "물리학 é 🎵", "arrows": "Main -> Arts\nMain -> Film\n", "numbers": "1. 2. # 3", "backslash": "a \\ b \\| c",
    "carriage returns": "a\r\nb\rc", "stars": "*a* **b** _c_ __d__", "code": "`a | b` ``", 
    "link": "[a](http://b) ![c](d)", "rule": "---",
}  # fmt: skip


def all_of(c: Config, file: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (Path(c.output_dir) / file).read_text(encoding="utf-8").splitlines()]


def scalars(c: Config) -> dict[str, list[tuple[int, float]]]:
    """Every number of metrics.jsonl: key -> (step, value)."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in all_of(c):
        for key, value in row.items():
            if key not in ("step", "checkpoint"):
                found.setdefault(key, []).append((row["step"], value))
    return found


def tensorboard_of(c: Config) -> event_accumulator.EventAccumulator:
    events = event_accumulator.EventAccumulator(str(Path(c.output_dir) / "runs"), size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()


def assert_in_tensorboard(c: Config) -> None:
    events, expected = tensorboard_of(c), scalars(c)
    assert {*events.Tags()["scalars"]} == {*expected} and {"loss", "grad_norm", "lr", "eval/in_domain/loss"} <= {*expected}
    for key, values in expected.items():
        assert [(e.step, e.value) for e in events.Scalars(key)] == [(step, pytest.approx(v, rel=1e-6)) for step, v in values], key


class Cells(HTMLParser):
    """The cells of an HTML table; a line break is a newline."""

    def __init__(self, page: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "br":
            self.rows[-1][-1] += "\n"

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def shown(text: str) -> list[list[str]]:
    """The table that TensorBoard's text dashboard makes of a summary; blanks at the edges of a cell mean nothing."""
    return [[cell.strip() for cell in row] for row in Cells(markdown_to_safe_html(text)).rows]


def as_cells(rows: list[dict]) -> list[list[str]]:
    return [[*rows[0]], *([str(value).strip() for value in row.values()] for row in rows)]


def test_tensorboard_holds_the_metrics_and_the_samples(tmp_path, base):
    often = {"eval__eval_steps": 2, "eval__eval_on_start": True, "eval__num_generate_samples": 3, "log__tensorboard": True}
    for until in (4, 7):  # a run, and its continuation
        c = config(tmp_path, base, train__max_steps=until, **often)
        assert train.main(c) == 0
        assert_in_tensorboard(c)
        samples = all_of(c, "samples.jsonl")
        written = [(e.step, e.tensor_proto.string_val[0].decode()) for e in tensorboard_of(c).Tensors("samples/text_summary")]
        assert [step for step, _ in written] == sorted({row["step"] for row in samples})
        for step, text in written:
            assert shown(text) == as_cells([row for row in samples if row["step"] == step])


def test_tensorboard_forgets_a_run_that_saved_nothing(tmp_path, base, monkeypatch):
    """A run killed before its first checkpoint begins anew, and so do its curves."""
    c = config(tmp_path, base, train__max_steps=5, eval__eval_steps=2, train__save_steps=50, log__tensorboard=True)
    real = Tracker.step

    def killed(self) -> None:
        real(self)
        if self.bar.n == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(Tracker, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            train.main(c)
    assert train.main(c) == 0
    assert_in_tensorboard(c)


@pytest.mark.parametrize("kind", UGLY)
def test_a_sample_is_shown_as_it_is(kind):
    rows = [{"step": 1, "prompt": UGLY[kind], "generated": "x"}, {"step": 1, "prompt": "y", "generated": UGLY[kind]}]
    expected = [[cell.replace("\r\n", "\n").replace("\r", "\n") for cell in row] for row in as_cells(rows)]
    assert shown(markdown(rows)) == expected


def records(file: Path) -> Iterator[Record]:
    """The records of a .wandb file: LevelDB's log format after a header of seven bytes, in blocks of 32 KiB."""
    content, at, whole = file.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)  # kind 1: whole, 2: first, 3: middle, 4: last part
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b""


def history_of(record: Record) -> dict:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def test_wandb_holds_the_metrics_and_the_samples(tmp_path, base, monkeypatch):
    """Offline, written and read back; a run and its continuation share the id. The answers are ugly."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    texts = list(UGLY.values())
    monkeypatch.setattr(
        train, "generate_ids", lambda model, prompts, *a, **k: [SimpleNamespace(text=t) for t in texts[: len(prompts)]]
    )
    often = {"eval__eval_steps": 2, "eval__eval_on_start": True, "eval__num_generate_samples": 6, "log__wandb": True}
    history: list[dict] = []
    ids = set()
    for until in (3, 5):
        c = config(tmp_path, base, train__max_steps=until, log__wandb_notes="two\nlines", log__wandb_project="p", **often)
        assert train.main(c) == 0
        (file,) = [f for f in (tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb") if f.parent not in ids]
        ids.add(file.parent)
        found = [*records(file)]
        (start,) = [r.run for r in found if r.WhichOneof("record_type") == "run"]
        identity = (Path(c.output_dir) / "wandb_id").read_text()
        assert (start.notes, start.project, start.run_id) == ("two\nlines", "p", identity)
        settings = {u.key: json.loads(u.value_json) for u in start.config.update}
        assert settings["train.max_steps"] == until and settings["data.train_file"] == c.data.train_file
        rows = [history_of(r) for r in found if r.WhichOneof("record_type") == "history"]
        assert [row["_step"] for row in rows] == ([0, 1, 2, 3] if until == 3 else [4, 5])
        history += [row | {"file": file} for row in rows]
        time.sleep(1.1)  # wandb's directories are named by the second
    assert len(ids) == 2 and len({f.name for f in ids}) <= 2
    for key, values in scalars(c).items():
        assert [(row["_step"], row[key]) for row in history if key in row] == [*dict(values).items()], key
    samples = all_of(c, "samples.jsonl")
    tables = {row["_step"]: row["file"].parent / "files" / row["samples/path"] for row in history if "samples/path" in row}
    assert [*tables] == [0, 2, 3, 4, 5]
    for step, file in tables.items():
        table, mine = json.loads(file.read_text(encoding="utf-8")), [row for row in samples if row["step"] == step]
        assert table == {"columns": [*mine[0]], "data": [[*row.values()] for row in mine]} and len(mine) == 6
        assert [row["generated"] for row in mine] == texts[:6]


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1.0])
def test_the_gradient_norm_is_always_logged(clip, tmp_path, base):
    """Before clipping, so that the setting changes the first of them by nothing."""
    c = config(tmp_path, base, train__max_steps=3, train__max_grad_norm=clip, train__warmup_steps=50, train__learning_rate=1e-9)
    assert train.main(c) == 0
    norms = [row["grad_norm"] for row in metrics(c)]
    assert len(norms) == 3 and all(norm > 0.5 for norm in norms)


def test_wandb_that_is_not_installed_is_named(tmp_path, base, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else real(name, *rest))
    with pytest.raises(UserError, match=r"wandb is not installed.*minilora\[track\]"):
        train.main(config(tmp_path, base, log__wandb=True))


def test_lines_after_the_checkpoint_are_written_anew(tmp_path, base):
    append(tmp_path / "metrics.jsonl", [{"step": step, "loss": 1.0} for step in (1, 2, 3, 4)])
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')  # torn by a kill
    c, tokenizer = config(tmp_path, base, output_dir=str(tmp_path)), Tokenizer(base)
    documents = load_documents(c.data.train_file, c.data, tokenizer, "train_file")
    tracker = Tracker(c, tmp_path, 2, 9, [documents], tokenizer, hub=None)
    tracker.log({"step": 3, "loss": 2.0, "tokens_per_second": 1.0})
    tracker.close(patience=0)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 2.0)]
