"""A small hub on 127.0.0.1: the endpoints that the real huggingface_hub client calls, with faults on request.

    with Hub() as hub:
        hub.add("owner/name", {"config.json": b"{}"}, tags=["v1"])
        hub.connect(monkeypatch, tmp_path)      # clients in this process; hub.environment(tmp_path) for others
        hub.fail("commit", 500, times=2)        # the next two commits are answered with 500

Kinds of request: whoami, create, info, tree, resolve, store (bytes of large files, GET), validate-yaml, preupload, lfs-batch,
lfs-upload, commit, other; "*" is any. Faults: a status, "hang" (no answer until `hub.hang_seconds` or the end of the
test), "reset" (the connection breaks), "lost" (the request is carried out, its answer never comes), "cut" (half of the body).
"""

import base64
import fnmatch
import hashlib
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import yaml  # type: ignore[import-untyped]

ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.model filter=lfs diff=lfs merge=lfs -text\n"
LARGEST_REGULAR = 10 * 1024 * 1024
REPO = r"/(?:api/)?(?:(?P<type>models|datasets)/)?(?P<id>[^/]+/[^/]+?)"


@dataclass
class Commit:
    id: str
    message: str
    files: dict[str, bytes]  # all of the tree
    changed: list[str] = field(default_factory=list)


@dataclass
class Repo:
    id: str
    private: bool
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> commit id

    def commit(self, message: str, files: Mapping[str, bytes], deleted: tuple[str, ...] = ()) -> Commit:
        """On top of main."""
        tree = {**(self.commits[-1].files if self.commits else {}), **files}
        tree = {path: data for path, data in tree.items() if path not in deleted}
        number = f"{self.id}/{len(self.commits)}/{message}".encode()
        self.commits.append(Commit(hashlib.sha1(number).hexdigest(), message, tree, sorted(files)))
        self.refs["main"] = self.commits[-1].id
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        sha = self.refs.get(revision, revision)
        return next((c for c in self.commits if c.id == sha), None)

    @property
    def files(self) -> dict[str, bytes]:
        """On main, without what the hub put there itself."""
        return {path: data for path, data in self.commits[-1].files.items() if path != ".gitattributes"}

    def is_large(self, path: str, size: int) -> bool:
        attributes = self.commits[-1].files.get(".gitattributes", b"").decode()
        patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line]
        return size > LARGEST_REGULAR or any(fnmatch.fnmatch(Path(path).name, p) for p in patterns)


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Hub:
    """The server, and all it knows: `repos` by id (data sets as "datasets/owner/name"), `requests` as (kind, "METHOD /path")."""

    def __init__(self) -> None:
        self.user, self.token = "tester", "hf_test_" + "s3cret" * 4
        self.roles = {self.token: "write", "hf_reader": "read"}
        self.repos: dict[str, Repo] = {}
        self.store: dict[str, bytes] = {}  # of large files, by sha256
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.faults: list[list] = []  # [kind, fault, times left]
        self.hang_seconds = 60.0
        self.released = threading.Event()
        self.lock = threading.RLock()
        hub = self

        class BoundHandler(Handler):
            pass

        BoundHandler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.cdn = self.url.replace("127.0.0.1", "localhost")  # another host, which gets no token
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> "Hub":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo: str, files: Mapping[str, bytes], private: bool = False, tags: tuple[str, ...] | list[str] = ()) -> str:
        """A commit on main of a repository, which is made if it is not there; returns the commit's id."""
        if repo not in self.repos:
            self.repos[repo] = Repo(repo, private)
            self.repos[repo].commit("initial commit", {".gitattributes": ATTRIBUTES})
        commit = self.repos[repo].commit("add files", files)
        self.repos[repo].refs.update(dict.fromkeys(tags, commit.id))
        for path, data in files.items():
            if self.repos[repo].is_large(path, len(data)):
                self.store[sha256(data)] = data
        return commit.id

    def fail(self, kind: str, fault: int | str, times: int = 1) -> None:
        with self.lock:
            self.faults.append([kind, fault, times])

    def heal(self) -> None:
        """No more faults; requests that hang are let go."""
        with self.lock:
            self.faults.clear()
        self.released.set()
        self.released = threading.Event()

    def fault_for(self, kind: str) -> int | str | None:
        with self.lock:
            for fault in self.faults:
                if fault[0] in (kind, "*") and fault[2] > 0:
                    fault[2] -= 1
                    return fault[1]
        return None

    def count(self, kind: str) -> int:
        return sum(k == kind for k, _ in self.requests)

    def environment(self, home: Path, token: str | None = "") -> dict[str, str]:
        """Environment variables of a client process; token: "" the owner's, None nobody's."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        token = self.token if token == "" else token
        return {
            **kept, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            **({"HF_TOKEN": token} if token else {}), "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }  # fmt: skip

    def connect(self, monkeypatch: pytest.MonkeyPatch, home: Path, token: str | None = "") -> None:
        """Send this process's clients here, to a cache of their own. The library reads its environment when imported, so
        its constants are changed; a client's connection pool outlives a test and is closed."""
        constants = huggingface_hub.constants
        for name, value in {
            "ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"), "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
            monkeypatch.delenv(name, raising=False)
        token = self.token if token == "" else token
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        huggingface_hub.close_session()


class Handler(BaseHTTPRequestHandler):
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

    ROUTES = (
        ("whoami", r"/api/whoami-v2"),
        ("create", r"/api/repos/create"),
        ("validate-yaml", r"/api/validate-yaml"),
        ("preupload", REPO + r"/preupload/(?P<rev>[^/]+)"),
        ("commit", REPO + r"/commit/(?P<rev>[^/]+)"),
        ("tree", REPO + r"/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?"),
        ("paths-info", REPO + r"/paths-info/(?P<rev>[^/]+)"),
        ("lfs-batch", REPO + r"\.git/info/lfs/objects/batch"),
        ("resolve", REPO + r"/resolve/(?P<rev>[^/]+)/(?P<path>.+)"),
        ("lfs-upload", r"/upload/(?P<oid>[0-9a-f]{64})"),
        ("store", r"/store/(?P<oid>[0-9a-f]{64})"),
        ("info", r"/api/(?P<type>models|datasets)/(?P<id>[^/]+/[^/]+)(?:/revision/(?P<rev>[^/]+))?"),
    )

    def handle_any(self) -> None:
        path = urlsplit(self.path).path
        found = [(kind, m) for kind, route in self.ROUTES if (m := re.fullmatch(route, path))]
        self.kind, match = found[0] if found else ("other", None)
        with self.hub.lock:
            self.hub.requests.append((self.kind, f"{self.command} {unquote(self.path)}"))
            self.hub.headers.append(dict(self.headers))
        self.fault = self.hub.fault_for(self.kind)
        if self.fault == "reset":
            return self.reset()
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        if self.fault == "hang":
            self.hub.released.wait(self.hub.hang_seconds)
            return self.reset()
        if isinstance(self.fault, int):
            return self.error(self.fault, f"asked for by the test; you sent {self.headers.get('Authorization')}")
        if match is None:
            return self.error(404, f"no such endpoint: {path}")
        arguments = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
        with self.hub.lock:
            getattr(self, "on_" + self.kind.replace("-", "_"))(arguments)
        return None

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST instead of FIN
        self.close_connection = True
        self.connection.close()

    def answer(self, body: object, status: int = 200, **headers: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if self.fault == "lost":
            return self.reset()
        self.send_response(status)
        headers = {"Content-Type": "application/octet-stream" if body is data else "application/json", **headers}
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.fault == "cut" else data)
        if self.fault == "cut":
            self.close_connection = True
        return None

    def error(self, status: int, message: str, code: str = "") -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.answer({"error": message}, status, **headers)

    def role(self) -> str | None:
        """Of the token that came along; "" if it is unknown, None if there is none."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.hub.roles.get(token, "") if token else None

    def may_write(self, owner: str) -> bool:
        role = self.role()
        if not role:
            self.error(401, "Invalid credentials in Authorization header" if role == "" else "Invalid username or password.")
        elif role != "write" or owner != self.hub.user:
            self.error(403, "You don't have the rights to write here")
        return role == "write" and owner == self.hub.user

    def repo(self, arguments: dict[str, str]) -> Repo | None:
        """The repository a request names, if its token may see it; else the error is sent."""
        prefix = "datasets/" if arguments.get("type") == "datasets" else ""
        repo, role = self.hub.repos.get(prefix + arguments["id"]), self.role()
        if role == "":
            self.error(401, "Invalid credentials in Authorization header")
        elif repo is None or (repo.private and role is None):
            self.error(404 if role else 401, "Repository not found", "RepoNotFound")
        else:
            return repo
        return None

    def commit_of(self, arguments: dict[str, str]) -> tuple[Repo, Commit] | None:
        repo = self.repo(arguments)
        if repo is None:
            return None
        commit = repo.at(arguments.get("rev", "main"))
        if commit is None:
            self.error(404, f"Invalid rev id: {arguments['rev']}", "RevisionNotFound")
            return None
        return repo, commit

    def on_whoami(self, _: dict) -> None:
        role = self.role()
        if not role:
            return self.error(401, "Invalid credentials in Authorization header")
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        return self.answer({"type": "user", "name": self.hub.user, "orgs": [], "auth": auth})

    def on_create(self, _: dict) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.hub.user
        if not self.may_write(owner):
            return None
        prefix = "datasets/" if asked.get("type") == "dataset" else ""
        name = f"{prefix}{owner}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repos:
            return self.answer({**answer, "error": "You already created this model repo"}, 409)
        self.hub.repos[name] = Repo(name, asked.get("private") or asked.get("visibility") == "private")
        self.hub.repos[name].commit("initial commit", {".gitattributes": ATTRIBUTES})
        return self.answer(answer)

    def on_info(self, arguments: dict) -> None:
        if found := self.commit_of(arguments):
            repo, commit = found
            self.answer({
                "id": arguments["id"], "sha": commit.id, "private": repo.private, "tags": [], "downloads": 0, "likes": 0,
                "gated": False, "disabled": False, "siblings": [{"rfilename": path} for path in commit.files],
            })  # fmt: skip

    def entries(self, repo: Repo, commit: Commit) -> list[dict]:
        result = []
        for path, data in sorted(commit.files.items()):
            entry = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
            if repo.is_large(path, len(data)):
                entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
            result.append(entry)
        return result

    def on_tree(self, arguments: dict) -> None:
        if found := self.commit_of(arguments):
            under = arguments.get("path", "")
            self.answer([e for e in self.entries(*found) if not under or e["path"].startswith(f"{under}/")])

    def on_paths_info(self, arguments: dict) -> None:
        if found := self.commit_of(arguments):
            wanted = json.loads(self.body)["paths"] if self.body.startswith(b"{") else []
            self.answer([e for e in self.entries(*found) if e["path"] in wanted])

    def on_resolve(self, arguments: dict) -> None:
        found = self.commit_of(arguments)
        if not found:
            return None
        repo, commit = found
        origin = {"X-Repo-Commit": commit.id}
        data = commit.files.get(arguments["path"])
        if data is None:
            error = {"error": "Entry not found"}
            return self.answer(error, 404, **origin, **{"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        if repo.is_large(arguments["path"], len(data)):
            oid = sha256(data)
            large = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data)), "Location": f"{self.hub.cdn}/store/{oid}"}
            return self.answer(b"", 302, **origin, **large)
        return self.send_file(data, ETag=f'"{blob_id(data)}"', **origin)

    def on_store(self, arguments: dict) -> None:
        data = self.hub.store.get(arguments["oid"])
        if data is None:
            return self.error(404, "no such object")
        return self.send_file(data, ETag=f'"{arguments["oid"]}"')

    def send_file(self, data: bytes, **headers: Any) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self.answer(data, **headers, Accept_Ranges="bytes")
        first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        if first >= len(data):
            return self.answer(b"", 416, Content_Range=f"bytes */{len(data)}")
        return self.answer(data[first : last + 1], 206, **headers, Content_Range=f"bytes {first}-{last}/{len(data)}")

    def on_validate_yaml(self, _: dict) -> None:
        content = json.loads(self.body)["content"]
        header = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            valid = isinstance(yaml.safe_load(header[1]) if header else {}, dict)
        except yaml.YAMLError:
            valid = False
        errors = [] if valid else [{"message": "metadata is no YAML mapping"}]
        self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    def on_preupload(self, arguments: dict) -> None:
        repo = self.repo(arguments)
        if repo is None or not self.may_write(arguments["id"].split("/")[0]):
            return
        files = []
        for file in json.loads(self.body)["files"]:
            large, there = repo.is_large(file["path"], file["size"]), repo.commits[-1].files.get(file["path"])
            oid = None if there is None else sha256(there) if large else blob_id(there)
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": files})

    def on_lfs_batch(self, arguments: dict) -> None:
        if not self.may_write(arguments["id"].split("/")[0]):
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/upload/{wanted['oid']}"}}
            objects.append({**wanted, **({} if wanted["oid"] in self.hub.store else {"actions": upload})})
        self.answer({"transfer": "basic", "objects": objects})

    def on_lfs_upload(self, arguments: dict) -> None:
        if sha256(self.body) != arguments["oid"]:
            return self.error(400, "content does not match its sha256")
        self.hub.store[arguments["oid"]] = self.body
        return self.answer({})

    def on_commit(self, arguments: dict) -> None:
        repo = self.repo(arguments)
        if repo is None or not self.may_write(arguments["id"].split("/")[0]):
            return None
        message, files, deleted = "", {}, []
        for item in map(json.loads, self.body.splitlines()):
            value = item["value"]
            match item["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                    if repo.is_large(value["path"], len(files[value["path"]])):
                        return self.error(400, f"{value['path']} must be stored with LFS")
                case "lfsFile":
                    if value["oid"] not in self.hub.store:
                        return self.error(400, f"{value['path']}: its content was not uploaded")
                    files[value["path"]] = self.hub.store[value["oid"]]
                case "deletedFile":
                    deleted.append(value["path"])
        commit = repo.commit(message, files, tuple(deleted))
        return self.answer({"success": True, "commitOid": commit.id, "commitUrl": f"{self.hub.url}/{repo.id}/commit/{commit.id}"})
