"""Turn the name of a model or dataset into a directory: a local one, or a snapshot of the hub."""

from pathlib import Path

import huggingface_hub

from minilora.errors import UserError

TIMEOUT = 60.0  # seconds without a byte from or to the hub after which a request has failed
HUB_FILES = [
    "*.json",
    "model*.safetensors",
    "adapter_model.safetensors",
    "tokenizer.model",
    "*.jinja",
]
DESCRIPTION_FILES = [pattern for pattern in HUB_FILES if pattern != "model*.safetensors"]
"""The same without the weights of a base, which are many gigabytes."""


def resolve(
    name: str,
    revision: str | None = None,
    setting: str = "revision",
    patterns: list[str] = HUB_FILES,
) -> Path:
    """Return the directory of a model or adapter.

    Args:
        name: a directory, or a hub id `owner/name`, optionally with `@revision`.
        revision: branch, tag or commit on the hub.
        setting: the name of the setting or flag that `revision` is from, for messages.
        patterns: names of the files that are wanted, with shell wildcards.

    Raises:
        UserError: there is no such directory and the hub does not provide it, or a revision would
            be ignored.
    """
    path = Path(name).expanduser()
    if name and path.is_dir():
        if revision:
            raise _no_revisions_error(f"{setting} {revision!r}", name)
        return path

    repository, _, at_revision = name.partition("@")
    if repository and at_revision and Path(repository).expanduser().is_dir():
        raise _no_revisions_error(f"'@{at_revision}' in {name!r}", repository)
    is_path = path.is_absolute() or name.startswith((".", "~"))
    if is_path or repository.count("/") != 1:
        raise UserError(f"model {name!r}: no such directory, and not a hub id (owner/name)")
    if revision and at_revision and revision != at_revision:
        raise UserError(f"{setting} {revision!r} contradicts {name!r}: leave out one of them")
    what = f"model {name!r} is not a directory"
    return fetch(repository, revision or at_revision or None, patterns, what)


def _no_revisions_error(what: str, directory: str) -> UserError:
    """Return the error for a revision of a directory; `what` is how the user gave it."""
    return UserError(
        f"{what} belongs to a repository on the hub, and {directory!r} is a directory: leave it out"
    )


def fetch(
    repository: str, revision: str | None, patterns: list[str], what: str, kind: str = "model"
) -> Path:
    """Download the matching files of a hub repository through the hub's cache.

    Args:
        repository: `owner/name`.
        revision: branch, tag or commit; None is the main branch.
        patterns: names of files, with shell wildcards.
        what: how the error message begins, e.g. "model 'x' is not a directory".
        kind: "model" or "dataset".

    Returns:
        The local snapshot's directory.

    Raises:
        UserError: the files cannot be fetched.
    """
    set_hub_timeouts()
    try:
        found = huggingface_hub.snapshot_download(
            repository, repo_type=kind, revision=revision, allow_patterns=patterns
        )
    except Exception as error:  # the client's many exceptions all mean: cannot be fetched
        cause: BaseException = error  # the outermost may only say that a connection is missing
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).splitlines() or [type(cause).__name__])[0]
        message = f"{what}, and {repository} could not be fetched from the hub: {reason}"
        raise UserError(message) from error
    return Path(found)


def set_hub_timeouts() -> None:
    """Give every request of the hub's client a time limit; some have none of their own."""
    client = huggingface_hub.get_session()
    hooks = client.event_hooks
    if _limit_request in hooks["request"]:
        return
    limited = {**hooks, "request": [*hooks["request"], _limit_request]}

    def make_client():
        return type(client)(event_hooks=limited, follow_redirects=True, timeout=None)

    huggingface_hub.set_client_factory(make_client)


def _limit_request(request) -> None:
    """Fill in the time limits that a request of httpx does not set itself."""
    given = request.extensions.get("timeout") or {}
    phases = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {phase: given.get(phase) or TIMEOUT for phase in phases}
