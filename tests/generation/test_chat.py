"""The chat: over text in this process, over a pipe, and over a terminal."""

import fcntl
import io
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch

import infer
from helpers.asking import (
    FORMATS,
    NEW_TOKENS,
    SHORT,
    TEXT,
    assistant,
    infer_args,
    train_adapter,
    transformers_answer,
    transformers_model,
    user,
    write_base,
)
from minilora.config import DataConfig
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError
from minilora.generation.answering import TextGenerator

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 60  # seconds for whatever a process is waited for


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base("llama3", tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def talker(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train an adapter on questions; a chat with it has no sampling settings of its own."""
    data = DataConfig(format="prompt", prompt_template="Q: {question}?")
    rows = FORMATS["prompt"].rows
    return train_adapter(base, tmp_path_factory.mktemp("talker") / "run", data, rows)


def asks(line: str) -> list[dict]:
    """Return the turn in which the talker was trained to be asked what a line asks."""
    return user(f"Q: {line}?")


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Return a function that chats in this process: (model, typed text) -> what is shown."""

    def run(model: Path, typed: str, **options) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        assert infer.main(infer_args(model, **SHORT | options)) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(("name", "form"), [("prompt without chat", "Q: {}?\nA:"), ("text", "{}")])
def test_a_model_of_plain_text_is_given_each_line_alone(
    name: str, form: str, base: Path, tmp_path: Path, chat
):
    """In the form of training, as by --prompt; with --raw as it is."""
    data, rows, _ = FORMATS[name]
    model = train_adapter(base, tmp_path / "run", data, rows)
    expected = [transformers_answer(model, form.format(line)) + "\n" for line in ("a", "b")]
    assert chat(model, "a\nb\n") == "".join(expected)
    assert chat(model, "a\n", raw=True) == transformers_answer(model, "a") + "\n"


def test_lines_that_are_rows(talker: Path, base: Path, tmp_path: Path, chat):
    """A JSON object with the columns of the form is a row. What lacks columns is an error."""
    row = json.dumps({"question": TEXT, "completion": "x"})
    assert chat(talker, row) == transformers_answer(talker, asks(TEXT)) + "\n"
    with pytest.raises(UserError, match=r"columns question, year; missing: year\."):
        chat(base, '{"question": "x"}', prompt_template="Q: {question} ({year})?")

    turns = [{"role": "system", "content": "Be brief."}, *user("q1")]
    first = transformers_answer(base, turns)
    second = transformers_answer(base, [*turns, assistant(first), *user("q2")])
    typed = json.dumps({"messages": turns}) + "\nq2\n"
    assert chat(base, typed, format="messages") == f"{first}\n{second}\n"


def test_stop_strings(talker: Path, chat):
    """What may begin one is held back; nothing is shown twice."""
    answer = transformers_answer(talker, asks(TEXT))
    for stop in ("never there", answer[:4] + "no", "\n\n\n\n"):
        assert chat(talker, TEXT, stop=(stop, "~~~")) == answer + "\n"
    for begin in range(len(answer) - 2):
        stop = answer[begin : begin + 3]
        assert chat(talker, TEXT, stop=(stop,)) == answer[: answer.index(stop)] + "\n"


def test_an_answer_cut_off_stays_in_the_conversation(
    talker: Path, chat, monkeypatch: pytest.MonkeyPatch
):
    """As far as it was shown."""
    real, asked = TextGenerator.stream, []

    def interrupt_first(self, prompts, indices):
        asked.append(prompts[0])
        for n, grown in enumerate(real(self, prompts, indices)):
            if n == 5 and len(asked) == 1:
                raise KeyboardInterrupt
            yield grown

    monkeypatch.setattr(TextGenerator, "stream", interrupt_first)
    first, second = chat(talker, f"{TEXT}\nq2").rsplit("\n", 2)[:2]
    complete = transformers_answer(talker, asks(TEXT))
    assert 0 < len(first) < len(complete) and complete.startswith(first)

    turns = [*asks(TEXT), assistant(first), *asks("q2")]
    _, tokens = transformers_model(talker)
    expected = tokens.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert asked[1] == expected
    assert second == transformers_answer(talker, turns)


def test_without_stdin_nothing_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="nothing to read from"):
        infer.main(infer_args(tmp_path / "absent"))


# --- in a process of its own ---


@pytest.mark.system
def test_chat_over_a_pipe(talker: Path):
    """The conversation so far is part of the prompt, until a new one begins."""
    turns = asks("q1 서울?")
    first = transformers_answer(talker, turns)
    turns += [assistant(first), *asks("q2")]
    second = transformers_answer(talker, turns)
    turns += [assistant(second), *asks("q1 서울?")]
    third = transformers_answer(talker, turns)
    assert len({first, second, third, transformers_answer(talker, asks("q2"))}) == 4

    command = [sys.executable, str(ROOT / "infer.py"), str(talker)]
    command += ["--temperature", "0", "--max_new_tokens", str(NEW_TOKENS)]
    typed = "q1 서울?\n  \nq2\nq1 서울?\n /new \nq1 서울?"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, input=typed.encode(), capture_output=True, timeout=LIMIT, env=environment
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert done.stdout.decode() == "".join(text + "\n" for text in (first, second, third, first))


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, command: list[str]):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb", "INPUTRC": "/dev/null"},
        )
        os.close(slave)

    def read_until(self, condition: Callable[[bytes], object]) -> bytes:
        """Return what the process shows from now on, until a condition holds for that."""
        shown, deadline = b"", time.monotonic() + LIMIT
        while not condition(shown):
            assert time.monotonic() < deadline, shown[-500:]
            if select.select([self.master], [], [], 1)[0]:
                shown += os.read(self.master, 65536)
        return shown

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)


@pytest.mark.system
def test_chat_over_a_terminal(base: Path, tmp_path: Path):
    """Ctrl-C cuts off an answer without end, not the chat; nor does a mistake; Ctrl-D ends it."""
    model = shutil.copytree(base, tmp_path / "model")
    tensors, tokens = safetensors.torch.load_file(model / "model.safetensors"), Tokenizer(model)
    for token in {tokens.eos_id, *tokens.stop_ids()}:
        tensors["lm_head.weight"][token] = 0  # others are always likelier
    safetensors.torch.save_file(tensors, model / "model.safetensors", {"format": "pt"})

    command = [sys.executable, str(ROOT / "infer.py"), str(model), "--max_new_tokens", "100000"]
    command += ["--format", "messages"]
    terminal = Terminal(command)
    try:
        shown = terminal.read_until(lambda shown: shown.endswith(b"> "))
        assert b"Ctrl-C cuts an answer off" in shown
        terminal.type(b'{"messages": []}\n')
        shown = terminal.read_until(lambda shown: shown.endswith(b"\r\n> "))
        assert b'error: "messages": expected a non-empty list' in shown
        for _ in range(2):
            terminal.type(b"question\n")
            terminal.read_until(lambda shown: len(shown.partition(b"question\r\n")[2]) > 200)
            terminal.type(b"\x03")
            terminal.read_until(lambda shown: shown.endswith(b"\r\n> "))
        terminal.type(b"\x04")
        assert terminal.process.wait(LIMIT) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.master)


@pytest.mark.system
def test_bytes_that_are_not_text_and_a_reader_that_leaves(talker: Path):
    command = [sys.executable, "infer.py", str(talker), "--max_new_tokens", "4"]
    typed = b"bad \xff\xfe\nok\n"
    done = subprocess.run(command, cwd=ROOT, input=typed, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count(b"\n") >= 2, done.stderr.decode()
    shell = f"{' '.join(command)} --prompt hi | true; exit ${{PIPESTATUS[0]}}"
    left = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, timeout=120)
    assert left.returncode in (0, 141) and b"Traceback" not in left.stderr, left.stderr.decode()
