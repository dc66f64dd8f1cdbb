"""Names of models: directories, hub ids, and what is neither."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from helpers.tiny_models import random_tokens
from minilora import hub as hub_module
from minilora.build import build_for_inference
from minilora.errors import UserError
from minilora.hub import resolve

ROOT = Path(__file__).resolve().parent.parent
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def directory(hf_llama: PreTrainedModel, tmp_path: Path) -> Path:
    """A tiny Llama in one file."""
    hf_llama.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_resolve_returns_an_existing_directory(directory: Path, monkeypatch: pytest.MonkeyPatch):
    assert resolve(str(directory)) == directory
    monkeypatch.chdir(directory.parent.parent)
    looks_like_a_hub_id = f"{directory.parent.name}/{directory.name}"
    assert resolve(looks_like_a_hub_id).samefile(directory)
    monkeypatch.setenv("HOME", str(directory.parent))
    assert resolve(f"~/{directory.name}").samefile(directory)


@pytest.mark.parametrize(
    "name", ["{}/absent", "./absent", "../owner/absent", "~/absent", "absent", "a/b/c", ""]
)
def test_resolve_refuses_what_is_neither_a_directory_nor_a_hub_id(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fetch(*args, **options):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub_module.huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(repr(name.format(tmp_path)))):
        resolve(name.format(tmp_path))


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("{}", "v2", "model.revision 'v2' belongs to a repository on the hub, and '{}' is a dir"),
        ("{}@v2", None, "'@v2' in '{}@v2' belongs to a repository on the hub, and '{}' is a dir"),
        ("{}@v2", "v2", "'@v2' in '{}@v2' belongs to a repository"),
        ("owner/name@v1", "v2", "model.revision 'v2' contradicts 'owner/name@v1'"),
    ],
)
def test_resolve_refuses_a_revision_that_would_be_ignored(
    name: str, revision: str | None, message: str, directory: Path
):
    with pytest.raises(UserError) as error:
        resolve(name.format(directory), revision, "model.revision")
    assert message.format(directory, directory) in str(error.value)


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that fetching `owner/name` at main and v2 needs."""

    address: str
    files: dict[str, bytes]
    requested: list[str]

    def do_GET(self):
        path = self.path.split("?")[0]
        self.requested.append(path)
        model = "/api/models/owner/name"
        name = path.split("/")[-1]
        if path in (model, f"{model}/revision/main", f"{model}/revision/v2"):
            siblings = [{"rfilename": file} for file in self.files]
            self.answer_json({"id": "owner/name", "sha": SHA, "siblings": siblings})
        elif path == f"{model}/tree/{SHA}":
            self.answer_json(
                [
                    {"type": "file", "path": file, "size": len(content), "oid": f"{i:040}"}
                    for i, (file, content) in enumerate(self.files.items())
                ]
            )
        elif path == f"/owner/name/resolve/{SHA}/{name}" and name in self.files:
            self.answer(self.files[name])
        else:
            code = "RevisionNotFound" if path.startswith(f"{model}/") else "RepoNotFound"
            self.answer(b"{}", 404, {"X-Error-Code": code, "X-Error-Message": "not there"})

    do_HEAD = do_GET

    def answer_json(self, value: object) -> None:
        self.answer(json.dumps(value).encode())

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        etag = f'"{hash(body):x}"'
        standard = {"Content-Length": str(len(body)), "ETag": etag, "X-Repo-Commit": SHA}
        for key, value in {**standard, **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(directory: Path) -> Iterator[type[Hub]]:
    """A hub on the loopback interface with the tiny Llama and unneeded files as `owner/name`."""
    Hub.requested = []
    Hub.files = {file.name: file.read_bytes() for file in directory.iterdir()}
    Hub.files |= {
        "tokenizer.model": b"t",
        "chat_template.jinja": b"{{ x }}",
        "README.md": b"#",
        "pytorch_model.bin": b"pickle",
        "modeling_custom.py": b"raise SystemExit",
        "model.onnx": b"x",
    }
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


RESOLVE = """
import sys
from minilora.errors import UserError
from minilora.hub import resolve
for name, revision in [arg.split("@") for arg in sys.argv[1:]]:
    try:
        print("found", resolve(name, revision or None))
    except UserError as error:
        print("error", error)
"""


def resolve_elsewhere(endpoint: str, home: Path, *names: str) -> list[str]:
    """Resolve each `name@revision` in a new process: the client reads HF_ENDPOINT on import."""
    env = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-c", RESOLVE, *names]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


@pytest.mark.system
def test_models_are_fetched_from_the_hub(
    hub: type[Hub], directory: Path, hf_llama: PreTrainedModel, tmp_path: Path
):
    home = tmp_path / "home"
    names = ["owner/name@", "owner/name@v2", "owner/name@v3", "owner/absent@"]
    found, found_v2, no_revision, no_model = resolve_elsewhere(hub.address, home, *names)
    snapshot = Path(found.removeprefix("found "))
    assert found == found_v2
    assert snapshot.is_relative_to(home) and snapshot.name == SHA

    # neither pickles, nor code, nor what other tools need
    wanted = {file.name for file in directory.iterdir()}
    wanted |= {"tokenizer.model", "chat_template.jinja"}
    assert {file.name for file in snapshot.iterdir()} == wanted
    assert not any(path.endswith((".bin", ".py", ".md", ".onnx")) for path in hub.requested)

    model = build_for_inference(snapshot, torch.device("cpu")).model
    tokens = random_tokens(24)
    with torch.no_grad():
        expected = hf_llama(tokens.unsqueeze(0)).logits.squeeze(0)
        torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-4)
    assert no_revision.startswith("error model 'owner/name'")
    assert no_model.startswith("error model 'owner/absent'")

    # No hub is listening at this address: a cached model is found, others are one-line errors.
    again = ["owner/name@", "owner/other@", "owner/name@v4"]
    cached, *unknown = resolve_elsewhere("http://127.0.0.1:9", home, *again)
    assert cached == found
    assert len(unknown) == 2
    assert all(line.startswith("error model 'owner/") for line in unknown)
