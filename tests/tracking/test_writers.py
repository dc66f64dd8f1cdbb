"""Trackers hold the numbers of metrics.jsonl and the answers of samples.jsonl, each step once."""

import json
import struct
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.plugin_util import markdown_to_safe_html
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

import train
from helpers.tiny_runs import base_model, config
from minilora import distributed
from minilora.config import Config
from minilora.generation.engine import Answer
from minilora.tracking.tracker import Tracker
from minilora.tracking.writers import (
    JsonLinesWriter,
    ProgressBar,
    append_json_lines,
    markdown_table,
)

UGLY_TEXTS = {
    "pipes": "a | b || c",
    "newlines": "one\ntwo\n\nfour\n",
    "html": "<b>bold</b> &amp; <script>x</script> <br> </td>",
    "scripts": "물리학 é 🎵",
    "arrows": "Main -> Arts\nMain -> Film\n",
    "numbers": "1. 2. # 3",
    "backslash": "a \\ b \\| c",
    "carriage returns": "a\r\nb\rc",
    "stars": "*a* **b** _c_ __d__",
    "code": "`a | b` ``",
    "link": "[a](http://b) ![c](d)",
    "rule": "---",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return base_model(tmp_path_factory.mktemp("base") / "model")


def read_json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_of(c: Config, file: str) -> list[dict]:
    return read_json_lines(Path(c.output_dir) / file)


def logged_numbers(c: Config) -> dict[str, list[tuple[int, float]]]:
    """Return the (step, value) pairs of every key of metrics.jsonl."""
    numbers: dict[str, list[tuple[int, float]]] = {}
    for row in rows_of(c, "metrics.jsonl"):
        for key, value in row.items():
            if key not in ("step", "checkpoint"):
                numbers.setdefault(key, []).append((row["step"], value))
    return numbers


# --- metrics.jsonl and samples.jsonl


def test_lines_after_the_checkpoint_are_written_anew(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    append_json_lines(path, [{"step": step, "loss": 1.0} for step in (1, 2, 3, 4)])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')  # torn by a kill
    writer = JsonLinesWriter(tmp_path, start_step=2)
    writer.log({"step": 3, "loss": 2.0, "tokens_per_second": 1.0})
    rows = read_json_lines(path)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_run_from_the_start_keeps_no_older_lines(tmp_path: Path):
    append_json_lines(tmp_path / "samples.jsonl", [{"step": 0}, {"step": 1}])
    JsonLinesWriter(tmp_path, start_step=0)
    assert (tmp_path / "samples.jsonl").read_bytes() == b""


# --- TensorBoard


def events_of(c: Config) -> event_accumulator.EventAccumulator:
    directory = str(Path(c.output_dir) / "runs")
    keep_all = {"scalars": 0, "tensors": 0}
    return event_accumulator.EventAccumulator(directory, size_guidance=keep_all).Reload()


def assert_in_tensorboard(c: Config) -> None:
    events, expected = events_of(c), logged_numbers(c)
    assert set(events.Tags()["scalars"]) == set(expected)
    assert {"loss", "grad_norm", "lr", "eval/in_domain/loss"} <= set(expected)
    for key, values in expected.items():
        found = [(event.step, event.value) for event in events.Scalars(key)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in values], key


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


def displayed_cells(text: str) -> list[list[str]]:
    """Return the table that TensorBoard makes of a text, without space around its cells."""
    rows = Cells(markdown_to_safe_html(text)).rows
    return [[cell.strip() for cell in row] for row in rows]


def expected_cells(rows: list[dict]) -> list[list[str]]:
    cells = [[str(value).strip() for value in row.values()] for row in rows]
    return [list(rows[0]), *cells]


@pytest.mark.parametrize("kind", UGLY_TEXTS)
def test_tensorboard_displays_a_sample_as_it_is(kind: str):
    rows = [
        {"step": 1, "prompt": UGLY_TEXTS[kind], "generated": "x"},
        {"step": 1, "prompt": "y", "generated": UGLY_TEXTS[kind]},
    ]
    expected = []
    for row in expected_cells(rows):
        expected.append([cell.replace("\r\n", "\n").replace("\r", "\n") for cell in row])
    assert displayed_cells(markdown_table(rows)) == expected


def test_tensorboard_holds_the_metrics_and_the_samples(tmp_path: Path, base: Path):
    often = {"eval__eval_steps": 2, "eval__eval_on_start": True, "eval__num_generate_samples": 3}
    for max_steps in (4, 7):  # a run, and its continuation
        c = config(tmp_path, base, train__max_steps=max_steps, log__tensorboard=True, **often)
        assert train.main(c) == 0
        assert_in_tensorboard(c)
        samples = rows_of(c, "samples.jsonl")
        written = []
        for event in events_of(c).Tensors("samples/text_summary"):
            written.append((event.step, event.tensor_proto.string_val[0].decode()))
        assert [step for step, _ in written] == sorted({row["step"] for row in samples})
        for step, text in written:
            expected = expected_cells([row for row in samples if row["step"] == step])
            assert displayed_cells(text) == expected


def test_tensorboard_hides_a_run_that_saved_nothing(tmp_path: Path, base: Path, monkeypatch):
    """A run killed before its first checkpoint begins anew, and so do its curves."""
    settings = {"train__max_steps": 5, "eval__eval_steps": 2, "train__save_steps": 50}
    c = config(tmp_path, base, log__tensorboard=True, **settings)
    real, steps = Tracker.step, []

    def killed_at_step_4(self) -> None:
        real(self)
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "step", killed_at_step_4)
        with pytest.raises(KeyboardInterrupt):
            train.main(c)
    assert train.main(c) == 0
    assert_in_tensorboard(c)


# --- Weights & Biases


def wandb_records(file: Path) -> Iterator[Record]:
    """Read a .wandb file: LevelDB's log format after a header of 7 bytes, in blocks of 32 KiB."""
    content, position, record = file.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while position + 7 <= len(content):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, size, kind = struct.unpack_from("<IHB", content, position)
        if position + 7 + size > len(content):
            return  # not yet written in full
        record += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # 1: a whole record, 2: its first part, 3: a middle part, 4: the last
            yield Record.FromString(record)
            record = b""


def wait_for_records(file: Path) -> list[Record]:
    """Read a .wandb file once its last record is there: it comes shortly after the run's end."""
    deadline = time.monotonic() + 30
    while True:
        records = list(wandb_records(file))
        if records_of_kind(records, "exit"):
            return records
        assert time.monotonic() < deadline
        time.sleep(0.05)


def records_of_kind(records: list[Record], kind: str) -> list[Record]:
    return [record for record in records if record.WhichOneof("record_type") == kind]


def history_row(record: Record) -> dict:
    row = {}
    for item in record.history.item:
        row[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return row


@pytest.mark.system
def test_wandb_holds_the_metrics_and_the_samples(tmp_path: Path, base: Path, monkeypatch):
    """Offline, written and read back: a run and its continuation, with ugly answers."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    texts = list(UGLY_TEXTS.values())

    def ugly_answers(model, prompts, *args, **kwargs) -> list[Answer]:
        return [Answer(text=text, finish_reason="stop") for text in texts[: len(prompts)]]

    monkeypatch.setattr("minilora.training.evaluate.generate_ids", ugly_answers)
    settings = {
        "eval__eval_steps": 2,
        "eval__eval_on_start": True,
        "eval__num_generate_samples": 6,
        "log__wandb": True,
        "log__wandb_notes": "two\nlines",
        "log__wandb_project": "p",
    }
    history: list[dict] = []
    directories: set[Path] = set()
    for max_steps, steps in ((3, [0, 1, 2, 3]), (5, [4, 5])):
        c = config(tmp_path, base, train__max_steps=max_steps, **settings)
        assert train.main(c) == 0
        files = (tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb")
        (file,) = [file for file in files if file.parent not in directories]
        directories.add(file.parent)

        records = wait_for_records(file)
        (start,) = [record.run for record in records_of_kind(records, "run")]
        run_id = (Path(c.output_dir) / "wandb_id").read_text()
        assert (start.notes, start.project, start.run_id) == ("two\nlines", "p", run_id)
        logged = {update.key: json.loads(update.value_json) for update in start.config.update}
        assert logged["train.max_steps"] == max_steps
        assert logged["data.train_file"] == c.data.train_file
        rows = [history_row(record) for record in records_of_kind(records, "history")]
        assert [row["_step"] for row in rows] == steps
        history += [row | {"directory": file.parent} for row in rows]
        time.sleep(1.1)  # wandb names its directories by the second

    assert len(directories) == 2
    for key, values in logged_numbers(c).items():
        found = [(row["_step"], row[key]) for row in history if key in row]
        assert found == list(dict(values).items()), key

    samples = rows_of(c, "samples.jsonl")
    tables = {}
    for row in history:
        if "samples/path" in row:
            tables[row["_step"]] = row["directory"] / "files" / row["samples/path"]
    assert list(tables) == [0, 2, 3, 4, 5]
    for step, file in tables.items():
        own = [row for row in samples if row["step"] == step]
        data = [list(row.values()) for row in own]
        table = json.loads(file.read_text(encoding="utf-8"))
        assert table == {"columns": list(own[0]), "data": data}
        assert [row["generated"] for row in own] == texts[:6]


def test_a_message_has_a_line_of_its_own_beside_the_bar(capsys: pytest.CaptureFixture):
    bar = ProgressBar(start_step=0, total_steps=5)
    capsys.readouterr()
    distributed.log("a message")
    bar.close()
    cleared, message, drawn_again = capsys.readouterr().err.partition("a message\n")
    assert message and cleared.strip() == "" and cleared.endswith("\r")
    assert "training:" in drawn_again


def test_the_bar_shows_loss_speed_and_memory(capsys: pytest.CaptureFixture):
    bar = ProgressBar(start_step=0, total_steps=5)
    row = {"step": 1, "loss": 1.5, "tokens_per_second": 12345.6}
    bar.log(row | {"share_of_peak": 0.4321, "peak_memory": 3 * 2**29})
    assert bar.bar.postfix == "loss=1.5000, tok_s=12,346, peak=43%, mem=1.5GiB"
    bar.log({"step": 1, "eval/in_domain/loss": 1.0})
    assert bar.bar.postfix.startswith("loss=1.5000")
    bar.log(row)
    assert bar.bar.postfix == "loss=1.5000, tok_s=12,346"
    bar.close()
    capsys.readouterr()
