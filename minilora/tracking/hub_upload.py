"""Upload checkpoints to the Hugging Face hub in the background; no error stops the training.

`HfApi.upload_folder(run_as_future=True)` would be shorter, but the client runs it in thread pools,
and Python waits for a pool's threads at the end of the process: if the hub hangs, a finished run
could not end. This module uses a daemon thread. It does not keep the process alive, and it skips a
checkpoint when a newer one is waiting.
"""

import contextlib
import fnmatch
import json
import os
import re
import shlex
import shutil
import threading
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from minilora import distributed
from minilora.checkpoint.model_record import RECORD_FILE
from minilora.checkpoint.peft import CONFIG_FILE as ADAPTER_CONFIG
from minilora.config import Config
from minilora.data.tokenizer import TOKENIZER_FILES
from minilora.errors import UserError
from minilora.hub import set_hub_timeouts
from minilora.tracking.model_card import is_hub_id, model_card

MAX_TRIES = 4
"""Tries of each upload, besides the client library's own repetitions of single requests."""

RETRY_SECONDS = 1.0
"""Seconds before the second try, doubled for each further one."""

TRANSIENT_STATUSES = (408, 409, 412, 425, 429)
"""The HTTP status codes below 500 after which another try may succeed."""

ADAPTER_FILES = ("adapter_*",)
"""Patterns of the files of an adapter."""

MODEL_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json")
"""Patterns of the files of a whole model."""

COMMON_FILES = (RECORD_FILE, *TOKENIZER_FILES)
"""The files that both have."""

UPLOADED_FILES = (*ADAPTER_FILES, *MODEL_FILES, *COMMON_FILES)
"""Patterns of the files of a checkpoint that are uploaded."""

LOCAL_FILES = ("training_state*", "trainer_state.json", "manifest.json")
"""Patterns of the files of a checkpoint that only resuming the training needs."""

PATH_FIELDS = {
    "adapter_config.json": "base_model_name_or_path",
    "config.json": "_name_or_path",
    "tokenizer_config.json": "name_or_path",
}
"""For each file, its field that may hold a local path."""


class Upload(NamedTuple):
    """A checkpoint to be uploaded as one commit."""

    checkpoint: Path
    staging: Path
    """A directory with links to the files to be uploaded, and the model card as README.md."""
    message: str
    """The commit's message."""


class HubUploader:
    """Uploads a run's checkpoints to config.hub.repo_id, one commit each; on rank 0 alone.

    One thread uploads, the caller's thread adds checkpoints. At most one checkpoint waits: a newer
    one replaces an older one that still waits. `lock` guards the fields that both threads use.
    """

    def __init__(self, config: Config):
        """Make the repository, check that the token may write to it, and start the thread.

        A server that does not answer is not an error here: each checkpoint asks again.

        Raises:
            UserError: the repository's name is not valid, there is no token, or the hub refuses.
        """
        self.config = config
        self.out = Path(config.output_dir)
        self.repo_id = config.hub.repo_id or ""
        self.repository_is_ready = False

        self.lock = threading.Condition()  # notified whenever `current` or `waiting` changes
        self.current: Upload | None = None
        self.waiting: Upload | None = None
        self.num_requested = 0  # checkpoints
        self.num_uploaded = 0
        self.num_superseded = 0  # replaced by a newer one before they were uploaded
        self.last_error = ""
        self.missing: Path | None = None  # the newest checkpoint, if it is not on the hub
        self.closed = threading.Event()

        self.token = _token_for(config)
        set_hub_timeouts()
        disable_progress_bars()  # the training has a bar of its own
        self.api = huggingface_hub.HfApi(token=self.token, library_name="minilora")
        try:
            self._prepare_repository()
        except Exception as error:
            reason = self._describe(error)
            if not is_transient(error):
                raise UserError(
                    f"hub.push: {self._url()} is refused ({reason}): the token must be allowed to "
                    "create and write it (role `write`, or a fine-grained token with write access "
                    "to the repositories of its owner)"
                ) from error
            distributed.log(
                f"hub.push: {self._url()} cannot be reached now ({reason}); "
                "tried again at each checkpoint"
            )
        threading.Thread(target=self._work, name="hub upload", daemon=True).start()

    def push(self, checkpoint: Path, step: int, message: str) -> None:
        """Upload a checkpoint soon; return at once.

        The checkpoint's directory may be removed afterwards.

        Args:
            checkpoint: its directory.
            step: optimizer steps done.
            message: the commit's message.
        """
        # named .tmp-*, so that the next start removes what a killed run has left behind
        upload = Upload(checkpoint, self.out / f".tmp-hub-{step}", message)
        self.num_requested += 1
        try:
            self._stage(upload, step)
        except Exception as error:  # for instance a full disk
            self._note_failure(upload, error)
            return

        with self.lock:
            if self.waiting is not None:
                self.num_superseded += 1
                shutil.rmtree(self.waiting.staging, ignore_errors=True)
            self.waiting = upload
            self.lock.notify_all()

    def close(self, patience: float = 600) -> None:
        """Wait for the uploads, give up those that take too long, and log what was uploaded.

        Args:
            patience: seconds to wait at most.
        """
        with self.lock:
            self.lock.wait_for(lambda: self.current is None and self.waiting is None, patience)
            unfinished = [upload for upload in (self.current, self.waiting) if upload is not None]
            self.waiting = None
            self.closed.set()
            self.lock.notify_all()
            for upload in unfinished:
                self.missing = upload.checkpoint
                self.last_error = f"not done after {patience:g} s"
                shutil.rmtree(upload.staging, ignore_errors=True)
        distributed.log(self._summary())

    def _summary(self) -> str:
        """Return how many checkpoints were uploaded, and the command that uploads a missing one."""
        done = f"{self.num_uploaded} of {self.num_requested}"
        text = f"hub.push: pushed {done} checkpoints to {self._url()}"
        if self.num_superseded > 0:
            text += f", {self.num_superseded} superseded by newer ones"
        num_failed = self.num_requested - self.num_uploaded - self.num_superseded
        if num_failed > 0:
            text += f", {num_failed} failed: {self.last_error}"
        if self.missing is not None:
            command = ["hf", "upload", self.repo_id, str(self.missing), "."]
            if self.config.hub.private:
                command.append("--private")
            for pattern in LOCAL_FILES:
                command += ["--exclude", pattern]
            text += f". By hand: {shlex.join(command)}"
        return text

    def _prepare_repository(self) -> None:
        """Make the repository if it does not exist, and check that it may be written to.

        The first call is before the training, so that a refusal is known at once and not hours
        later.
        """
        if "/" not in self.repo_id:
            self.repo_id = f"{self.api.whoami()['name']}/{self.repo_id}"
        self.api.create_repo(self.repo_id, private=self.config.hub.private, exist_ok=True)
        # the hub answers this request, which uploads nothing, only if the token may write
        probe = huggingface_hub.CommitOperationAdd("README.md", b"#")
        self.api.preupload_lfs_files(self.repo_id, [probe])
        if self.config.hub.private and not self.api.repo_info(self.repo_id).private:
            warning = "existed before and is public: everybody can read the checkpoints"
            distributed.log(f"hub.push: {self._url()} {warning}")
        if self.config.method == "full" and self.api.file_exists(self.repo_id, ADAPTER_CONFIG):
            warning = f"has an {ADAPTER_CONFIG}: programs will read that adapter, not the model"
            distributed.log(f"hub.push: {self._url()} {warning}; choose another hub.repo_id")
        self.repository_is_ready = True

    def _stage(self, upload: Upload, step: int) -> None:
        """Fill an upload's staging directory with links to the files, and with the model card.

        The links keep the files when the checkpoint is deleted in the meantime.
        """
        upload.staging.mkdir()
        for file in upload.checkpoint.iterdir():
            if _matches(file.name, UPLOADED_FILES) and file.is_file():
                _link(file, upload.staging / file.name)
        for name, field in PATH_FIELDS.items():
            _hide_local_path(upload.staging / name, field)

        metrics = self.out / "metrics.jsonl"
        text = metrics.read_text(encoding="utf-8") if metrics.is_file() else ""
        *lines, _ = text.split("\n")  # the last line ends in a newline: nothing follows it
        events = [json.loads(line) for line in lines]
        card = model_card(self.config, upload.checkpoint, events, step, self.repo_id)
        (upload.staging / "README.md").write_text(card, encoding="utf-8")

    def _work(self) -> None:
        """Upload each waiting checkpoint until the uploader is closed; the thread runs this."""
        while True:
            with self.lock:
                self.lock.wait_for(lambda: self.waiting is not None or self.closed.is_set())
                if self.waiting is None:
                    return
                upload = self.waiting
                self.current = upload
                self.waiting = None

            try:
                self._upload(upload)
            except Exception as error:
                self._note_failure(upload, error)
            else:
                with self.lock:
                    self.num_uploaded += 1
                    self.missing = None
            shutil.rmtree(upload.staging, ignore_errors=True)

            with self.lock:
                self.current = None
                self.lock.notify_all()

    def _upload(self, upload: Upload) -> None:
        """Upload one checkpoint, with up to MAX_TRIES tries. No file is sent twice."""
        for num_tries in range(1, MAX_TRIES + 1):
            try:
                if not self.repository_is_ready:
                    self._prepare_repository()
                self._commit(upload)
                return
            except Exception as error:
                if num_tries == MAX_TRIES or not is_transient(error):
                    raise
                seconds = RETRY_SECONDS * 2 ** (num_tries - 1)
                if self.closed.wait(seconds):  # given up meanwhile
                    raise

    def _commit(self, upload: Upload) -> None:
        """Send the files and make the commit; files of an earlier checkpoint are removed by it.

        A file that this checkpoint does not have, such as a chat template, would change what the
        files of this one mean. A whole model's weights stay beside an adapter, and the reverse.
        """
        files = []
        for path in sorted(upload.staging.iterdir()):
            files.append(huggingface_hub.CommitOperationAdd(path.name, path))
        for file in files:
            # one by one: for several the client starts a thread pool (see the top of this file)
            self.api.preupload_lfs_files(self.repo_id, [file], free_memory=False)

        names = {file.path_in_repo for file in files}
        replaced = ADAPTER_FILES if ADAPTER_CONFIG in names else MODEL_FILES
        present = self.api.list_repo_files(self.repo_id)
        stale = [
            name
            for name in present
            if name not in names and _matches(name, (*replaced, *COMMON_FILES))
        ]
        removals = [huggingface_hub.CommitOperationDelete(name) for name in stale]
        self.api.create_commit(self.repo_id, [*files, *removals], commit_message=upload.message)
        if stale:
            listed = ", ".join(stale)
            distributed.log(
                f"hub.push: {listed} of an earlier checkpoint removed from {self._url()}"
            )

    def _note_failure(self, upload: Upload, error: Exception) -> None:
        """Remove an upload's staging directory and log why it failed, unless it was given up."""
        shutil.rmtree(upload.staging, ignore_errors=True)
        with self.lock:
            if self.closed.is_set():
                return
            self.missing = upload.checkpoint
            self.last_error = self._describe(error)
            reason = f"is not uploaded ({self.last_error})"
            distributed.log(f"hub.push: {upload.checkpoint.name} {reason}; the training goes on")

    def _url(self) -> str:
        """Return the repository's address."""
        return f"{huggingface_hub.constants.ENDPOINT}/{self.repo_id}"

    def _describe(self, error: Exception) -> str:
        """Describe an error in one line, without the token and without signed addresses."""
        cause: BaseException = error
        if isinstance(error, RuntimeError) and error.__cause__ is not None:
            cause = error.__cause__  # the client's RuntimeError only names the file
        lines = str(cause).strip().splitlines() or [""]
        text = f"{type(cause).__name__}: {lines[0]}".replace(self.token, "***")
        return re.sub(r"\?[^\s'\"]*", "", text)  # the query of an address holds its signature


def _token_for(config: Config) -> str:
    """Return the token for uploads.

    Raises:
        UserError: the repository's name is not valid, there is no token, or the client is offline.
    """
    try:
        validate_repo_id(config.hub.repo_id or "")
        token = huggingface_hub.get_token()
    except Exception as error:  # also a login that cannot be renewed
        setting = f"hub.repo_id={config.hub.repo_id!r} (owner/name, or name alone)"
        raise UserError(f"hub.push with {setting}: {error}") from error
    if not token or huggingface_hub.constants.HF_HUB_OFFLINE:
        raise UserError(
            "hub.push needs a token that may write (HF_TOKEN, or `hf auth login`), "
            "and HF_HUB_OFFLINE unset"
        )
    return token


def is_transient(error: BaseException | None) -> bool:
    """Return whether another try may succeed: False only if the server has refused the request.

    The server's reply may belong to the error, or to one that caused it.
    """
    while error is not None:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if status is not None:
            return status >= 500 or status in TRANSIENT_STATUSES
        error = error.__cause__
    return True


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a file of this name matches one of the patterns and is in no directory."""
    return "/" not in name and any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _link(source: Path, target: Path) -> None:
    """Make a hard link, or a copy on a file system that has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _hide_local_path(file: Path, field: str) -> None:
    """Replace a local path in a field of a JSON file by its last name: the rest is private."""
    if not file.is_file():
        return
    raw = None
    with contextlib.suppress(ValueError):  # a file that is not JSON was not written by minilora
        raw = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(raw, dict) or not raw.get(field) or is_hub_id(raw[field]):
        return
    raw[field] = Path(raw[field]).name
    file.unlink()  # it may be a hard link: writing to it would change the checkpoint's own file
    file.write_text(json.dumps(raw, indent=2), encoding="utf-8")
