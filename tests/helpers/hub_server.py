"""A small hub on 127.0.0.1: the endpoints that huggingface_hub calls, with faults on request.

    with running_hub(monkeypatch, tmp_path) as hub:  # hub.environment() is for other processes
        hub.add("owner/name", {"config.json": b"{}"}, tags=["v1"])
        hub.fail("commit", 500, times=2)  # the next two commits are answered with 500

Kinds of request: whoami, create, info, tree, paths-info, resolve, store (a large file's bytes),
validate-yaml, preupload, lfs-batch, lfs-upload, commit, other; "*" is any of them.

Faults:
    an HTTP status  the request is answered with it
    "hang"          no answer for `hub.hang_seconds`, or until `heal`; then the connection breaks
    "reset"         the connection breaks
    "lost"          the request is carried out, but its answer never comes
    "cut"           only half of the answer comes
"""

import base64
import contextlib
import fnmatch
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import yaml  # type: ignore[import-untyped]

ATTRIBUTES = (
    b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
    b"*.model filter=lfs diff=lfs merge=lfs -text\n"
)
LARGEST_REGULAR = 10 * 1024 * 1024
"""A larger file is stored with LFS, whatever its name."""

REPOSITORY = r"/(?:api/)?(?:(?P<type>models|datasets)/)?(?P<id>[^/]+/[^/]+?)"
ROUTES = (
    ("whoami", r"/api/whoami-v2"),
    ("create", r"/api/repos/create"),
    ("validate-yaml", r"/api/validate-yaml"),
    ("preupload", REPOSITORY + r"/preupload/(?P<rev>[^/]+)"),
    ("commit", REPOSITORY + r"/commit/(?P<rev>[^/]+)"),
    ("tree", REPOSITORY + r"/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?"),
    ("paths-info", REPOSITORY + r"/paths-info/(?P<rev>[^/]+)"),
    ("lfs-batch", REPOSITORY + r"\.git/info/lfs/objects/batch"),
    ("resolve", REPOSITORY + r"/resolve/(?P<rev>[^/]+)/(?P<path>.+)"),
    ("lfs-upload", r"/upload/(?P<oid>[0-9a-f]{64})"),
    ("store", r"/store/(?P<oid>[0-9a-f]{64})"),
    ("info", r"/api/(?P<type>models|datasets)/(?P<id>[^/]+/[^/]+)(?:/revision/(?P<rev>[^/]+))?"),
)
"""The path of each kind of request; the first that matches counts."""

INVALID_TOKEN = "Invalid credentials in Authorization header"


@dataclass
class Commit:
    """A state of a repository."""

    id: str
    message: str
    files: dict[str, bytes]
    """All files, by path."""


@dataclass
class Repo:
    """A repository of a model or dataset."""

    id: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    """The commit id of each branch and tag."""

    def commit(
        self, message: str, files: Mapping[str, bytes], deleted: Sequence[str] = ()
    ) -> Commit:
        """Add or replace files, and delete others, on top of main."""
        before = self.commits[-1].files if self.commits else {}
        tree = {path: data for path, data in {**before, **files}.items() if path not in deleted}
        name = f"{self.id}/{len(self.commits)}/{message}".encode()
        self.commits.append(Commit(hashlib.sha1(name).hexdigest(), message, tree))
        self.refs["main"] = self.commits[-1].id
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        """Return the commit of a branch, tag or commit id."""
        commit_id = self.refs.get(revision, revision)
        return next((commit for commit in self.commits if commit.id == commit_id), None)

    @property
    def files(self) -> dict[str, bytes]:
        """The files on main, without the one that the hub adds itself."""
        files = dict(self.commits[-1].files)
        files.pop(".gitattributes", None)
        return files

    def is_large(self, path: str, size: int) -> bool:
        """Return whether a file is stored with LFS."""
        attributes = self.commits[-1].files.get(".gitattributes", b"").decode()
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        name = Path(path).name
        return size > LARGEST_REGULAR or any(fnmatch.fnmatch(name, p) for p in patterns)


def blob_id(data: bytes) -> str:
    """Return git's id of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    """Return the SHA-256 of data as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


class Hub:
    """The server and its state.

    Attributes:
        repos: the repositories by id; that of a dataset is "datasets/owner/name".
        store: contents of large files by their SHA-256.
        requests: (kind, "METHOD /path") of every request.
        headers: the headers of every request.
        faults: [kind, fault, times left].
    """

    def __init__(self) -> None:
        self.user, self.token = "tester", "hf_test_" + "s3cret" * 4
        self.roles = {self.token: "write", "hf_reader": "read"}
        self.repos: dict[str, Repo] = {}
        self.store: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.faults: list[list] = []
        self.hang_seconds = 60.0
        self.released = threading.Event()
        self.lock = threading.RLock()

        handler_class = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler_class)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.cdn = self.url.replace("127.0.0.1", "localhost")  # another host, which gets no token
        self.thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    def __enter__(self) -> "Hub":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def add(
        self,
        repo: str,
        files: Mapping[str, bytes],
        private: bool = False,
        tags: Sequence[str] = (),
    ) -> str:
        """Commit files to a repository, which is made if it does not exist. Returns the commit."""
        if repo not in self.repos:
            self.repos[repo] = Repo(repo, private)
            self.repos[repo].commit("initial commit", {".gitattributes": ATTRIBUTES})
        commit = self.repos[repo].commit("add files", files)
        self.repos[repo].refs.update(dict.fromkeys(tags, commit.id))
        for path, data in files.items():
            if self.repos[repo].is_large(path, len(data)):
                self.store[sha256(data)] = data
        return commit.id

    def add_directory(self, repo: str, directory: Path) -> str:
        """Commit a directory's files, without those in directories in it. Returns the commit."""
        files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
        return self.add(repo, files)

    def fail(self, kind: str, fault: int | str, times: int = 1) -> None:
        """Let the next requests of a kind go wrong."""
        with self.lock:
            self.faults.append([kind, fault, times])

    def heal(self) -> None:
        """End all faults, and break the connections of requests that hang."""
        with self.lock:
            self.faults.clear()
        self.released.set()
        self.released = threading.Event()

    def fault_for(self, kind: str) -> int | str | None:
        """Return the fault for a request that has just come, if there is one."""
        with self.lock:
            for fault in self.faults:
                if fault[0] in (kind, "*") and fault[2] > 0:
                    fault[2] -= 1
                    return fault[1]
        return None

    def count(self, kind: str) -> int:
        """Count the requests of a kind so far."""
        return len([request for request in self.requests if request[0] == kind])

    def environment(self, home: Path, token: str | None = "") -> dict[str, str]:
        """Return the environment variables of a client process.

        Args:
            home: where the client keeps its cache.
            token: "" for the owner's; None for none.
        """
        variables = {}
        for name, value in os.environ.items():
            if not name.startswith(("HF_", "HUGGING")):
                variables[name] = value
        variables["HF_ENDPOINT"] = self.url
        variables["HF_HOME"] = str(home)
        for name in ("XET", "TELEMETRY", "UPDATE_CHECK"):
            variables[f"HF_HUB_DISABLE_{name}"] = "1"
        token = self.token if token == "" else token
        if token:
            variables["HF_TOKEN"] = token
        return variables

    def connect(self, monkeypatch: pytest.MonkeyPatch, home: Path, token: str | None = "") -> None:
        """Send the clients of this process here, with a cache of their own.

        The library reads its environment when it is imported, so its constants are changed. A
        client's connection pool outlives a test, so it is closed.

        Args:
            monkeypatch: undoes it.
            home: where the client keeps its cache.
            token: "" for the owner's; None for none.
        """
        constants = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }
        for name, value in constants.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            monkeypatch.delenv(name, raising=False)
        token = self.token if token == "" else token
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        huggingface_hub.close_session()


@contextlib.contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[Hub]:
    """Run a hub with this process's clients connected to it and all waits made short.

    Args:
        monkeypatch: undoes the changes to the client library.
        home: where the client keeps its cache.
    """
    http = huggingface_hub.utils._http
    # set_hub_timeouts replaces the factory: afterwards it is as it was
    monkeypatch.setattr(http, "_GLOBAL_CLIENT_FACTORY", http._GLOBAL_CLIENT_FACTORY)
    quick_time = types.SimpleNamespace(**{**vars(time), "sleep": lambda _: time.sleep(0.001)})
    monkeypatch.setattr(http, "time", quick_time)
    monkeypatch.setattr(huggingface_hub.file_download, "time", quick_time)
    monkeypatch.setattr("minilora.tracking.hub_upload.RETRY_SECONDS", 0.01)
    monkeypatch.setattr("minilora.hub.TIMEOUT", 1.0)
    with Hub() as hub:
        hub.connect(monkeypatch, home)
        yield hub
    huggingface_hub.close_session()
    huggingface_hub.utils.enable_progress_bars()


class Handler(BaseHTTPRequestHandler):
    """Answers one request. A method on_<kind> carries out each kind."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement
    kind = "other"
    fault: int | str | None = None
    body = b""

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_any()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def handle_any(self) -> None:
        """Note the request, and carry it out unless it is to fail."""
        path = urlsplit(self.path).path
        match = self.find_route(path)
        with self.hub.lock:
            self.hub.requests.append((self.kind, f"{self.command} {unquote(self.path)}"))
            self.hub.headers.append(dict(self.headers))
        self.fault = self.hub.fault_for(self.kind)

        if self.fault == "reset":
            self.reset()
            return
        self.body = self.read_body()
        if self.fault == "hang":
            self.hub.released.wait(self.hub.hang_seconds)
            self.reset()
        elif isinstance(self.fault, int):
            token = self.headers.get("Authorization")
            self.error(self.fault, f"asked for by the test; you sent {token}")
        elif match is None:
            self.error(404, f"no such endpoint: {path}")
        else:
            groups = match.groupdict().items()
            arguments = {name: unquote(value) for name, value in groups if value is not None}
            with self.hub.lock:
                getattr(self, "on_" + self.kind.replace("-", "_"))(arguments)

    def find_route(self, path: str) -> re.Match | None:
        """Set the kind of the request."""
        for kind, route in ROUTES:
            match = re.fullmatch(route, path)
            if match:
                self.kind = kind
                return match
        self.kind = "other"
        return None

    def read_body(self) -> bytes:
        """Read the request's content."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    # --- answers

    def reset(self) -> None:
        """Break the connection: a zero linger time sends RST instead of FIN."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.connection.close()

    def answer(self, body: object, status: int = 200, **headers: Any) -> None:
        """Send bytes as they are, or anything else as JSON."""
        if self.fault == "lost":
            self.reset()
            return
        if isinstance(body, bytes):
            data, kind = body, "application/octet-stream"
        else:
            data, kind = json.dumps(body).encode(), "application/json"
        self.send_response(status)
        sent = {"Content-Length": str(len(data)), "Content-Type": kind, **headers}
        for name, value in sent.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.fault == "cut":
            data = data[: len(data) // 2]
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(data)

    def error(self, status: int, message: str, code: str = "", **headers: str) -> None:
        """Send an error as the hub does."""
        headers["X-Error-Message"] = message
        if code:
            headers["X-Error-Code"] = code
        self.answer({"error": message}, status, **headers)

    def send_file(self, data: bytes, **headers: str) -> None:
        """Send a file, or the range of it that the request names."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            self.answer(data, **headers, Accept_Ranges="bytes")
            return
        first = int(wanted[1])
        last = min(int(wanted[2] or len(data) - 1), len(data) - 1)
        if first >= len(data):
            self.answer(b"", 416, Content_Range=f"bytes */{len(data)}")
        else:
            content_range = f"bytes {first}-{last}/{len(data)}"
            self.answer(data[first : last + 1], 206, **headers, Content_Range=content_range)

    # --- who may do what

    def role(self) -> str | None:
        """Return the role of the request's token; "" for an unknown one, None without one."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.hub.roles.get(token, "") if token else None

    def may_write(self, owner: str) -> bool:
        """Return whether the request's token may write to an owner's repositories.

        If not, the error is sent.
        """
        role = self.role()
        if role == "write" and owner == self.hub.user:
            return True
        if role is None:
            self.error(401, "Invalid username or password.")
        elif role == "":
            self.error(401, INVALID_TOKEN)
        else:
            self.error(403, "You don't have the rights to write here")
        return False

    def repo(self, arguments: dict[str, str]) -> Repo | None:
        """Return the request's repository if its token may see it, or send why not."""
        prefix = "datasets/" if arguments.get("type") == "datasets" else ""
        repo, role = self.hub.repos.get(prefix + arguments["id"]), self.role()
        if role == "":
            self.error(401, INVALID_TOKEN)
            return None
        if repo is None or (repo.private and role is None):
            self.error(404 if role else 401, "Repository not found", "RepoNotFound")
            return None
        return repo

    def writable_repo(self, arguments: dict[str, str]) -> Repo | None:
        """Return the request's repository if its token may write to it, or send why not."""
        repo = self.repo(arguments)
        if repo is None or not self.may_write(arguments["id"].split("/")[0]):
            return None
        return repo

    def repo_and_commit(self, arguments: dict[str, str]) -> tuple[Repo, Commit] | None:
        """Return the request's repository and commit, or send why there is none."""
        repo = self.repo(arguments)
        if repo is None:
            return None
        commit = repo.at(arguments.get("rev", "main"))
        if commit is None:
            self.error(404, f"Invalid rev id: {arguments['rev']}", "RevisionNotFound")
            return None
        return repo, commit

    # --- requests for accounts and repositories

    def on_whoami(self, _: dict) -> None:
        role = self.role()
        if not role:
            self.error(401, INVALID_TOKEN)
            return
        token = {"displayName": "test", "role": role}
        auth = {"type": "access_token", "accessToken": token}
        self.answer({"type": "user", "name": self.hub.user, "orgs": [], "auth": auth})

    def on_create(self, _: dict) -> None:
        request = json.loads(self.body)
        owner = request.get("organization") or self.hub.user
        if not self.may_write(owner):
            return
        prefix = "datasets/" if request.get("type") == "dataset" else ""
        name = f"{prefix}{owner}/{request['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repos:
            self.answer({**answer, "error": "You already created this model repo"}, 409)
            return
        private = request.get("private") or request.get("visibility") == "private"
        self.hub.repos[name] = Repo(name, private)
        self.hub.repos[name].commit("initial commit", {".gitattributes": ATTRIBUTES})
        self.answer(answer)

    # --- downloads

    def on_info(self, arguments: dict) -> None:
        found = self.repo_and_commit(arguments)
        if found is None:
            return
        repo, commit = found
        self.answer(
            {
                "id": arguments["id"],
                "sha": commit.id,
                "private": repo.private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "gated": False,
                "disabled": False,
                "siblings": [{"rfilename": path} for path in commit.files],
            }
        )

    def entries(self, repo: Repo, commit: Commit) -> list[dict]:
        """Describe the files of a commit."""
        entries = []
        for path, data in sorted(commit.files.items()):
            entry = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
            if repo.is_large(path, len(data)):
                entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        return entries

    def on_tree(self, arguments: dict) -> None:
        found = self.repo_and_commit(arguments)
        if found is None:
            return
        entries, folder = self.entries(*found), arguments.get("path", "")
        if folder:
            entries = [entry for entry in entries if entry["path"].startswith(f"{folder}/")]
        self.answer(entries)

    def on_paths_info(self, arguments: dict) -> None:
        found = self.repo_and_commit(arguments)
        if found is None:
            return
        wanted = json.loads(self.body)["paths"] if self.body.startswith(b"{") else []
        self.answer([entry for entry in self.entries(*found) if entry["path"] in wanted])

    def on_resolve(self, arguments: dict) -> None:
        found = self.repo_and_commit(arguments)
        if found is None:
            return
        repo, commit = found
        origin = {"X-Repo-Commit": commit.id}
        data = commit.files.get(arguments["path"])
        if data is None:
            self.error(404, "Entry not found", "EntryNotFound", **origin)
        elif repo.is_large(arguments["path"], len(data)):
            oid = sha256(data)
            self.answer(
                b"",
                302,
                **origin,
                X_Linked_Etag=f'"{oid}"',
                X_Linked_Size=str(len(data)),
                Location=f"{self.hub.cdn}/store/{oid}",
            )
        else:
            self.send_file(data, ETag=f'"{blob_id(data)}"', **origin)

    def on_store(self, arguments: dict) -> None:
        data = self.hub.store.get(arguments["oid"])
        if data is None:
            self.error(404, "no such object")
        else:
            self.send_file(data, ETag=f'"{arguments["oid"]}"')

    # --- uploads

    def on_validate_yaml(self, _: dict) -> None:
        content = json.loads(self.body)["content"]
        header = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            is_valid = isinstance(yaml.safe_load(header[1]) if header else {}, dict)
        except yaml.YAMLError:
            is_valid = False
        if is_valid:
            self.answer({"errors": [], "warnings": []})
        else:
            errors = [{"message": "metadata is not a YAML mapping"}]
            self.answer({"errors": errors, "warnings": []}, 400)

    def on_preupload(self, arguments: dict) -> None:
        repo = self.writable_repo(arguments)
        if repo is None:
            return
        files = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            is_large = repo.is_large(path, file["size"])
            existing, oid = repo.commits[-1].files.get(path), None
            if existing is not None:
                oid = sha256(existing) if is_large else blob_id(existing)
            mode = "lfs" if is_large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": files})

    def on_lfs_batch(self, arguments: dict) -> None:
        if not self.may_write(arguments["id"].split("/")[0]):
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            if wanted["oid"] not in self.hub.store:
                upload = {"href": f"{self.hub.url}/upload/{wanted['oid']}"}
                wanted = {**wanted, "actions": {"upload": upload}}
            objects.append(wanted)
        self.answer({"transfer": "basic", "objects": objects})

    def on_lfs_upload(self, arguments: dict) -> None:
        if sha256(self.body) != arguments["oid"]:
            self.error(400, "content does not match its sha256")
        else:
            self.hub.store[arguments["oid"]] = self.body
            self.answer({})

    def on_commit(self, arguments: dict) -> None:
        repo = self.writable_repo(arguments)
        if repo is None:
            return
        message, files, deleted = "", {}, []
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            match item["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    data = base64.b64decode(value["content"])
                    if repo.is_large(value["path"], len(data)):
                        self.error(400, f"{value['path']} must be stored with LFS")
                        return
                    files[value["path"]] = data
                case "lfsFile":
                    if value["oid"] not in self.hub.store:
                        self.error(400, f"{value['path']}: its content was not uploaded")
                        return
                    files[value["path"]] = self.hub.store[value["oid"]]
                case "deletedFile":
                    deleted.append(value["path"])
        commit = repo.commit(message, files, deleted)
        url = f"{self.hub.url}/{repo.id}/commit/{commit.id}"
        self.answer({"success": True, "commitOid": commit.id, "commitUrl": url})
