"""A language model as judge: an OpenAI-compatible chat endpoint scores each answer by a rubric.

The method is that of "Judging LLM-as-a-Judge" (arXiv 2306.05685). `judge` reads a file of answers,
asks the endpoint about each one in parallel, checks every reply against the rubric, and appends
the verdicts to a file; like every job it is resumable (generation/jobs.py).

An answer may contain text that is meant to influence the judge. In the message to the judge it is
therefore enclosed by lines with a code that no answer can contain, and a JSON object that occurs in
question or answer is never taken for the judge's verdict.
"""

import hashlib
import importlib.util
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import tqdm

from minilora import distributed
from minilora.data.example import RowError, string_of
from minilora.errors import RunError, UserError
from minilora.evaluation.judge_summary import Summary, summarize
from minilora.evaluation.rubric import (
    Rubric,
    read_rubric,
    system_prompt,
    user_prompt,
    verdict_schema,
)
from minilora.generation.jobs import Job, Key, read_rows, row_key

KEY_VARIABLE = "OPENAI_API_KEY"
URL = re.compile(r"https?://(\[[\da-fA-F:.]+\]|[^\s/@?#:\[\]]+)(:\d{1,5})?(/[^\s?#]*)?")
"""A URL without user, password and query: it is written to a file, and they could be secret."""

MAX_REPLIES = 3
"""Tries for one answer: the judge is asked again while its reply is not a valid verdict."""

MAX_UNREACHABLE = 16
"""The job stops after this many answers in a row that got no reply from the endpoint."""

PERMANENT_REFUSALS = {
    401: f"the key in {KEY_VARIABLE} is missing or wrong",
    403: f"the key in {KEY_VARIABLE} may not use it",
    404: "no such URL or model",
}
"""HTTP status codes after which other requests would fail, too, and what they mean here."""

NOT_A_COMPLETION = "what the URL replies is not a chat completion"


@dataclass(frozen=True)
class JudgeEndpoint:
    """An OpenAI-compatible chat endpoint, and how requests are sent to it."""

    url: str
    """The base URL, such as http://localhost:8000/v1."""
    model: str
    """The name of the judging model."""
    concurrency: int = 8
    """Requests in flight at once."""
    timeout: float = 120.0
    """Seconds after which a request without reply counts as failed."""
    max_retries: int = 6
    """Further tries of a request after a transient error; the client library makes them."""

    def __str__(self) -> str:
        return f"the judge {self.model!r} at {self.url}"


class _Answer(NamedTuple):
    """One answer to be judged."""

    record: dict
    """The row of the output, without the verdict's fields."""
    prompt: str
    """The message to the judge."""


class _Outcome(NamedTuple):
    """The result of asking about one answer: a verdict, or the reason why there is none."""

    verdict: dict | None
    """{"scores": {criterion: number}, "reason": str}; None: there is no valid verdict."""
    failure: str = ""
    """The reason why there is no verdict."""
    status: int = 0
    """The HTTP status of a refused request, else 0."""
    unreachable: bool = False
    """The endpoint did not reply, or replied that it is overloaded or has an internal error."""


def check_judge(url: str, model: str, rubric: str | Path) -> Rubric:
    """Check that a judge can be asked, say where its key comes from, and read the rubric.

    Args:
        url: the endpoint's base URL.
        model: the judging model's name at the endpoint.
        rubric: the rubric's file.

    Raises:
        UserError: a library is missing, or the URL, the model's name, the key or the rubric is
            not valid.
    """
    has_openai = importlib.util.find_spec("openai") is not None
    has_jsonschema = importlib.util.find_spec("jsonschema") is not None
    if not has_openai or not has_jsonschema:
        message = "--judge needs the libraries openai and jsonschema"
        raise UserError(f"{message}: pip install 'minilora[judge]'")
    if not URL.fullmatch(url) or not model:
        example = "http://localhost:8000/v1 (no user, password or query in it)"
        raise UserError(f"--judge needs --judge_model, and a URL like {example}")

    no_key = "not set: a placeholder is sent, which local servers accept"
    state = "set" if _api_key() else no_key
    source = f"the key in the environment variable {KEY_VARIABLE} ({state})"
    distributed.log(f"judge: {model} at {url}, with {source}")
    return read_rubric(rubric)


def judge(
    answers: str | Path,
    output: str | Path,
    endpoint: JudgeEndpoint,
    rubric: Rubric,
    question: Callable[[dict], str],
    reference: Callable[[dict], str] | None = None,
) -> Summary:
    """Ask the judge about every answer that has no verdict in `output` yet.

    Each verdict is written as soon as it arrives, so a job that is stopped or fails keeps it. Its
    row holds the sha256 of what the judge was shown, which shows later if any of it has changed.
    With several processes only the first one may call this function.

    Args:
        answers: a JSONL file whose rows have an "id", a "generated" answer, and a "sample" number
            where an id has several answers.
        output: the JSONL file to fill.
        endpoint: the judge.
        rubric: see `read_rubric`.
        question: returns the question that a row of `answers` answers.
        reference: returns what the answer should have been; needed if the rubric uses it.

    Raises:
        UserError: a row lacks a field, or what the judge is shown has changed since it was judged;
            `output` was begun with other settings; the endpoint refuses the key, model or URL.
        RunError: the endpoint no longer replies.
    """
    readers = {"question": question, "answer": lambda row: string_of(row, "generated")}
    if reference is not None:
        readers["reference"] = reference
    pending = _read_answers(answers, readers, rubric, endpoint.model)
    client = _JudgeClient(endpoint, rubric)
    settings = {
        "judge": endpoint.url,
        "judge_model": endpoint.model,
        "rubric": _sha256(client.system_prompt + rubric.get("prompt", "")),
    }
    job = Job(output, settings, pending)
    try:
        _check_unchanged(job, pending, output)
        failed = _judge_all(client, job, pending, output)
    finally:
        verdicts = job.finish()
    return summarize(verdicts, rubric, failed)


def _read_answers(
    answers: str | Path, readers: dict[str, Callable[[dict], str]], rubric: Rubric, model: str
) -> dict[Key, _Answer]:
    """Read the answers to be judged, in order.

    Args:
        answers: the file.
        readers: for each part of the message to the judge, what returns it for a row.
        rubric: makes the message of the parts.
        model: the judging model's name.

    Raises:
        UserError: a row lacks something; the message names file and line.
    """
    found: dict[Key, _Answer] = {}
    for number, row in read_rows(answers):
        try:
            parts = {name: read(row) for name, read in readers.items()}
        except RowError as error:
            raise UserError(f"{answers}:{number}: {error}") from error
        if not isinstance(row.get("id"), str | int) or row_key(row) in found:
            message = '"id": expected a string or an integer that no other row has'
            raise UserError(f"{answers}:{number}: {message}")

        # a hash of the whole answer, so no answer can contain it
        code = _sha256(json.dumps(list(parts.values())))
        record = {name: row[name] for name in ("id", "sample") if name in row}
        record |= {"judge": model, "sha256": code}
        found[row_key(row)] = _Answer(record, user_prompt(rubric, parts, code))
    return found


def _check_unchanged(job: Job, answers: dict[Key, _Answer], output: str | Path) -> None:
    """Raise UserError if what the judge was shown for an earlier verdict has changed since."""
    for key, row in job.done.items():
        if row.get("sha256") != answers[key].record["sha256"]:
            message = f"question, answer or reference of id {key[0]!r} changed since"
            raise UserError(f"{output}: {message}: remove the file or name another")


def _judge_all(
    client: "_JudgeClient", job: Job, answers: dict[Key, _Answer], output: str | Path
) -> Counter[str]:
    """Ask about every answer without a verdict, several at once, and add the verdicts to the job.

    Returns:
        For each reason, how many answers have no valid verdict because of it.
    """

    def ask(key: Key) -> tuple[Key, _Outcome]:
        return key, client.ask(answers[key].prompt)

    todo = [key for key in answers if key not in job.done]
    failed: Counter[str] = Counter()
    unreachable_in_a_row = 0
    progress = tqdm.tqdm(total=len(answers), initial=len(job.done), desc="judging")
    # not a ThreadPoolExecutor: on Ctrl-C that would wait for the requests of its threads
    with ThreadPool(client.endpoint.concurrency) as pool, progress:
        for key, outcome in pool.imap_unordered(ask, todo):
            if outcome.verdict is not None:
                job.add(answers[key].record | outcome.verdict)
            elif outcome.status in PERMANENT_REFUSALS:
                reason = f"HTTP {outcome.status}, {PERMANENT_REFUSALS[outcome.status]}"
                raise UserError(f"{client.endpoint}: {reason}; what is judged is kept in {output}")
            else:
                failed[outcome.failure] += 1

            if outcome.unreachable:
                unreachable_in_a_row += 1
            else:
                unreachable_in_a_row = 0
            if unreachable_in_a_row == MAX_UNREACHABLE:
                message = f"{MAX_UNREACHABLE} answers in a row got no reply ({outcome.failure})"
                raise RunError(f"{client.endpoint}: {message}; what is judged is kept in {output}")
            progress.set_postfix(failed=failed.total(), refresh=False)
            progress.update()
    return failed


class _JudgeClient:
    """A client of the endpoint that asks about one answer at a time and checks the reply."""

    def __init__(self, endpoint: JudgeEndpoint, rubric: Rubric):
        """Read the key from the environment; no request is sent yet."""
        import jsonschema  # type: ignore[import-untyped]
        import openai

        self.endpoint = endpoint
        self.key = _api_key()
        self.client = openai.OpenAI(
            base_url=endpoint.url,
            api_key=self.key or "none",  # a placeholder, which local servers accept
            timeout=endpoint.timeout,
            max_retries=endpoint.max_retries,
        )
        self.system_prompt = system_prompt(rubric)
        self.validator = jsonschema.Draft202012Validator(verdict_schema(rubric))

    def ask(self, prompt: str) -> _Outcome:
        """Ask about one answer, up to MAX_REPLIES times until the reply is a valid verdict."""
        import openai

        messages = [
            {"role": "system", "content": self.system_prompt},
            {"role": "user", "content": prompt},
        ]
        quoted = _json_objects(prompt)  # objects of question and answer, not of the judge
        fault = ""
        for _ in range(MAX_REPLIES):
            try:
                reply = self._complete(messages)
            except openai.OpenAIError as error:
                return self._failed_request(error)
            except (ValueError, TypeError, LookupError, AttributeError):
                # the client library raises these for HTML, or JSON that is not a completion
                return _Outcome(None, NOT_A_COMPLETION)

            objects = [found for found in _json_objects(reply) if found not in quoted]
            verdict: Any = objects[-1] if objects else None
            fault = self._fault_of(verdict)
            if not fault:
                reason = _encodable(verdict["reason"])
                return _Outcome({"scores": verdict["scores"], "reason": reason})
            complaint = (
                f"That is no valid verdict: {fault}. Reply with nothing but the JSON object."
            )
            messages.append({"role": "assistant", "content": reply})
            messages.append({"role": "user", "content": complaint})
        failure = f"no valid verdict in {MAX_REPLIES} replies; the last one: {fault}"
        return _Outcome(None, self._one_line(failure))

    def _complete(self, messages: list[dict[str, str]]) -> str:
        """Return the model's reply to a conversation. Raises what the client library raises."""
        # Any: the library's type hints want a class of its own for each role
        create: Any = self.client.chat.completions.create
        completion = create(model=self.endpoint.model, messages=messages, temperature=0)
        return _encodable(str(completion.choices[0].message.content or "(nothing)"))

    def _fault_of(self, verdict: Any) -> str:
        """Return what is wrong with a verdict, or an empty string."""
        import jsonschema

        error = jsonschema.exceptions.best_match(self.validator.iter_errors(verdict))
        if error is None:
            return ""
        if not verdict:
            return "there is no JSON object of the judge's own in it"
        return f"{error.json_path}: {error.message}"

    def _failed_request(self, error: Exception) -> _Outcome:
        """Return the outcome of a request that failed."""
        import openai

        status = getattr(error, "status_code", 0)
        has_no_reply = isinstance(error, openai.APIConnectionError)
        unreachable = has_no_reply or status == 429 or status >= 500
        return _Outcome(None, self._one_line(str(error)), status, unreachable)

    def _one_line(self, text: str) -> str:
        """Shorten a message to one line, without the key that a server may repeat in it."""
        if self.key:
            text = text.replace(self.key, "***")
        return " ".join(text.split())[:200]


def _json_objects(text: str) -> list[Any]:
    """Find the JSON objects in a text, in order, without those inside of others."""
    # NaN and Infinity, which are not JSON, become strings: the schema refuses them as scores
    decoder = json.JSONDecoder(parse_constant=str)
    objects = []
    end = 0  # of the last object found
    for brace in re.finditer("{", text):
        if brace.start() < end:
            continue
        try:
            value, end = decoder.raw_decode(text, brace.start())
        except (ValueError, RecursionError):
            continue
        objects.append(value)
    return objects


def _encodable(text: str) -> str:
    """Replace lone surrogates, which JSON can express but UTF-8 cannot, by question marks."""
    return text.encode(errors="replace").decode()


def _api_key() -> str:
    """Return the endpoint's key from the environment, or an empty string.

    Raises:
        UserError: the key has characters that an HTTP header cannot have. The message does not show
            the key.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the environment variable {KEY_VARIABLE} holds characters that no key has")
    return key


def _sha256(text: str) -> str:
    """Return the SHA-256 of a text as hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()
