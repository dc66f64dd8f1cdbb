"""Checkpoints to the Hugging Face hub, uploaded in the background: what goes wrong there never stops a training."""

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
import jinja2
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from minilora import dist
from minilora.config import Config, UserError
from minilora.running.saving import TOKENIZER_FILES
from minilora.running.settings import leaves, train_files
from minilora.running.sources import on_hub
from minilora.weights import limit_waiting

TRIES = 4  # of each upload; the client repeats some single requests by itself, too
WAIT = 1.0  # seconds before the second try, doubled for each further one
TRANSIENT = (408, 409, 412, 425, 429)  # of the 4xx, those that another try may be spared
FILES = ("adapter_*", "config.json", "model*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES)
PATHS = {
    "adapter_config.json": "base_model_name_or_path",
    "config.json": "_name_or_path",
    "tokenizer_config.json": "name_or_path",
}
NOT_FILES = ("training_state*", "trainer_state.json", "manifest.json")  # of a checkpoint: what resuming needs
SHOWN = "method model.bits data.format data.max_seq_length train.epochs train.max_steps train.batch_size train.grad_acc_steps \
train.optimizer train.learning_rate train.lr_scheduler train.weight_decay seed".split()  # settings in the model card


class Job(NamedTuple):
    directory: Path  # the checkpoint
    staging: Path  # links to its files, with README.md
    message: str


class HubPush:
    """Uploads a run's checkpoints to config.hub.repo_id, one commit each. For the first process alone."""

    def __init__(self, config: Config):
        """Makes the repository and sees that the token may write to it. Raises UserError where that is refused; a server
        that does not answer is asked again at each checkpoint."""
        self.config, self.out, self.repo_id = config, Path(config.output_dir), config.hub.repo_id or ""
        self.ready, self.asked, self.pushed, self.superseded, self.error = False, 0, 0, 0, ""
        self.job: Job | None = None  # under way
        self.waiting: Job | None = None
        self.missing: Path | None = None  # the newest checkpoint, if it is not on the hub
        self.changed, self.closed = threading.Condition(), threading.Event()
        try:
            validate_repo_id(self.repo_id)
            self.token = huggingface_hub.get_token() or ""
        except Exception as error:  # no valid name; or a login that cannot be renewed
            raise UserError(f"hub.push with hub.repo_id={config.hub.repo_id!r} (owner/name, or name alone): {error}") from error
        if not self.token or huggingface_hub.constants.HF_HUB_OFFLINE:
            raise UserError("hub.push needs a token that may write (HF_TOKEN, or `hf auth login`), and HF_HUB_OFFLINE unset")
        limit_waiting()
        disable_progress_bars()  # the training has its own
        self.api = huggingface_hub.HfApi(token=self.token, library_name="minilora")
        try:
            self._open()
        except Exception as error:
            if not _may_pass(error):
                raise UserError(
                    f"hub.push: {self._url()} is refused ({self._why(error)}): the token must be allowed to create and write it "
                    "(role `write`, or a fine-grained token with write access to the repositories of its owner)"
                ) from error
            dist.log(f"hub.push: {self._url()} cannot be had now ({self._why(error)}); tried again at each checkpoint")
        threading.Thread(target=self._work, name="hub push", daemon=True).start()

    def push(self, directory: Path, step: int, message: str) -> None:
        """Upload a checkpoint soon; returns at once. One that still waits when the next one comes is left out."""
        self.asked += 1
        job = Job(directory, self.out / f".tmp-hub-{step}", message)  # a new start removes .tmp-*
        try:  # links, because prune() may remove the checkpoint meanwhile
            shutil.copytree(directory, job.staging, ignore=_unwanted, copy_function=_link)
            for file, key in PATHS.items():
                _hide_path(job.staging / file, key)
            metrics = self.out / "metrics.jsonl"
            lines = metrics.read_text(encoding="utf-8").split("\n")[:-1] if metrics.is_file() else []
            card = model_card(self.config, directory, [json.loads(line) for line in lines], step, self.repo_id)
            (job.staging / "README.md").write_text(card, encoding="utf-8")
        except Exception as error:  # a full disk, for one
            self._failed(job, error)
            return
        with self.changed:
            if self.waiting:
                self.superseded += 1
                shutil.rmtree(self.waiting.staging, ignore_errors=True)
            self.waiting = job
            self.changed.notify_all()

    def close(self, seconds: float = 600) -> None:
        """Wait for the uploads, at most so many seconds, and say what became of them."""
        with self.changed:
            self.changed.wait_for(lambda: not (self.job or self.waiting), seconds)
            left = [job for job in (self.job, self.waiting) if job]
            self.waiting = None
            self.closed.set()
            self.changed.notify_all()
        for job in left:
            self.missing, self.error = job.directory, f"not done after {seconds:g} s"
            shutil.rmtree(job.staging, ignore_errors=True)
        text = f"hub.push: pushed {self.pushed} of {self.asked} checkpoints to {self._url()}"
        text += f", {self.superseded} superseded by newer ones" * bool(self.superseded)
        lost = self.asked - self.pushed - self.superseded
        text += f", {lost} failed: {self.error}" * bool(lost)
        if self.missing:
            words = ["hf", "upload", self.repo_id, str(self.missing), "."] + ["--private"] * self.config.hub.private
            text += f". By hand: {shlex.join(words + [word for name in NOT_FILES for word in ('--exclude', name)])}"
        dist.log(text)

    def _open(self) -> None:
        """Make the repository if it is not there, and be refused now rather than after hours if it must not be written."""
        if "/" not in self.repo_id:
            self.repo_id = f"{self.api.whoami()['name']}/{self.repo_id}"
        self.api.create_repo(self.repo_id, private=self.config.hub.private, exist_ok=True)
        probe = huggingface_hub.CommitOperationAdd("README.md", b"#")
        self.api.preupload_lfs_files(self.repo_id, [probe])  # asks how it would be stored, for which one must be a writer
        if self.config.hub.private and not self.api.repo_info(self.repo_id).private:
            dist.log(f"hub.push: {self._url()} was there before and is public: everybody can read the checkpoints")
        self.ready = True

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closed.is_set())
                if not self.waiting:
                    return
                job, self.job, self.waiting = self.waiting, self.waiting, None
            try:
                self._upload(job)
                self.pushed, self.missing = self.pushed + 1, None
            except Exception as error:
                self._failed(job, error)
            shutil.rmtree(job.staging, ignore_errors=True)
            with self.changed:
                self.job = None
                self.changed.notify_all()

    def _upload(self, job: Job) -> None:
        """One commit, in several tries. What the server has already is not sent again."""
        for tried in range(1, TRIES + 1):
            try:
                if not self.ready:
                    self._open()
                files = [huggingface_hub.CommitOperationAdd(p.name, p) for p in sorted(job.staging.iterdir())]
                for file in files:  # singly: for several the client starts a pool, which the end of the process would wait for
                    self.api.preupload_lfs_files(self.repo_id, [file], free_memory=False)
                self.api.create_commit(self.repo_id, files, commit_message=job.message)
                return
            except Exception as error:
                if tried == TRIES or not _may_pass(error) or self.closed.wait(WAIT * 2 ** (tried - 1)):
                    raise

    def _failed(self, job: Job, error: Exception) -> None:
        shutil.rmtree(job.staging, ignore_errors=True)
        if not self.closed.is_set():
            self.missing, self.error = job.directory, self._why(error)
            dist.log(f"hub.push: {job.directory.name} is not uploaded ({self.error}); the training goes on")

    def _url(self) -> str:
        return f"{huggingface_hub.constants.ENDPOINT}/{self.repo_id}"

    def _why(self, error: BaseException) -> str:
        """An exception in a line, without the token or the signatures in upload addresses."""
        inner = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error  # the outer one names a file
        line = next(iter(str(inner).strip().splitlines()), "")
        return re.sub(r"\?[^\s'\"]*", "", f"{type(inner).__name__}: {line}".replace(self.token, "***"))


def _may_pass(error: BaseException | None) -> bool:
    """Whether another try may help: not if the server has refused."""
    while error is not None:
        if (status := getattr(getattr(error, "response", None), "status_code", None)) is not None:
            return status >= 500 or status in TRANSIENT
        error = error.__cause__
    return True


def _unwanted(_: str, names: list[str]) -> list[str]:
    return [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in FILES)]


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _hide_path(file: Path, key: str) -> None:
    """Of a base that is a local directory, others need not know more than the name."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:  # no JSON: none of ours
        return
    if raw.get(key) and not _is_hub_id(raw[key]):
        file.unlink()  # a link to the checkpoint's own
        raw[key] = Path(raw[key]).name
        file.write_text(json.dumps(raw, indent=2), encoding="utf-8")


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) is not None and not Path(name).exists()


def _plain(value: object) -> str:
    """Data in markdown with nothing of it taken for markup."""
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return re.sub(r"([\\`*_<>\[\]|~&#$])", r"\\\1", " ".join(text.split()))


def model_card(config: Config, directory: Path, metrics: list[dict], step: int, repo: str = "") -> str:
    """README.md of a checkpoint: its origin, settings, figures and use. Of local files only the base names.

    directory: the checkpoint (its adapter_config.json counts); metrics: rows of metrics.jsonl; step: optimizer steps done.
    """
    full, model, repo = config.method == "full", config.model, repo or config.hub.repo_id or "owner/name"
    name, _, tail = model.name.partition("@") if _is_hub_id(model.name.partition("@")[0]) else (model.name, "", "")
    revision, known, scratch = model.revision or tail, _is_hub_id(name), full and model.init == "random"
    files = {file: on_hub(file) for file in train_files(config.data)}
    table: dict[str, object] = {"training data": ", ".join(name if hub else Path(name).name for name, hub in files.items())}
    table |= {name: leaves(config)[name] for name in SHOWN} | {"processes": dist.world_size()}
    if not full:
        lora = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        table |= {key: lora.get(key) for key in ("r", "lora_alpha", "lora_dropout", "use_rslora")}
        table["target_modules"] = ", ".join(sorted(lora.get("target_modules") or ()))
    for row in metrics:
        if row["step"] <= step:
            table |= {key: value for key, value in row.items() if key == "loss" or key.startswith("eval/")}
    data = huggingface_hub.ModelCardData(
        base_model=name if known and not scratch else None, library_name="transformers" if full else "peft",
        pipeline_tag="text-generation", datasets=[found[1] for found in files.values() if found] or None,
        tags=["minilora", "full-fine-tuning" if full else "lora"],
    )  # fmt: skip
    shown = _plain(name if known else Path(name).name) + (f" (revision {_plain(revision)})" if revision else "")
    template = Path(__file__).with_name("model_card.md.jinja").read_text(encoding="utf-8")
    return jinja2.Template(template, keep_trailing_newline=True).render(
        header=data.to_yaml(), title=repo.split("/")[-1], step=f"{step:,}", what="All weights" if full else "A LoRA adapter",
        base=shown + ", from random weights" * scratch, library="transformers" if full else "peft",
        table="\n".join(f"| {_plain(key)} | {_plain(value)} |" for key, value in table.items() if value is not None),
        auto="AutoModelForCausalLM" if full else "AutoPeftModelForCausalLM", theirs=json.dumps(repo),
        ours=json.dumps(repo) if full or known else f'"PATH/TO/THE/BASE", adapter={json.dumps(repo)}',
    )  # fmt: skip
