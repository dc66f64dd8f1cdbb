"""Reading the documents: fenced blocks, commands, tables, headings."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(\w+=\S+ )*((\.venv/bin/)?python|torchrun|sbatch|launch/\w+\.sh) ")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def prose_of(path: Path) -> str:
    """Return a document without its fenced blocks."""
    return FENCE.sub("", text_of(path))


def blocks(path: Path) -> list[tuple[str, str]]:
    """Return (language, content) of every fenced block."""
    return [(match[1], match[2]) for match in FENCE.finditer(text_of(path))]


def commands(path: Path) -> Iterator[list[str]]:
    """Yield the words of every command for the scripts, in blocks and in backticks."""
    for language, content in blocks(path):
        if language in ("", "sh"):
            yield from commands_of_block(content)
    for words in re.findall(r"`((?:python|torchrun) [^`\n]*)`", prose_of(path)):
        yield shlex.split(words)


def commands_of_block(content: str) -> Iterator[list[str]]:
    """Yield the words of every command of a block; a quotation may go on in the next line."""
    waiting = ""
    for line in content.splitlines():
        if not waiting and not COMMAND.match(line):
            continue
        waiting += line + "\n"
        try:
            words = shlex.split(waiting, comments=True)
        except ValueError:  # an open quotation
            continue
        waiting = ""
        yield words
    assert not waiting, waiting


def script_and_flags(words: list[str]) -> tuple[str, list[str]]:
    """Split a command into its script ("train.py") and the arguments after it."""
    if words[1] == "-m":  # python -m minilora.evaluation.ontology
        return words[2].replace(".", "/") + ".py", words[3:]
    endings = (".py", "torchrun.sh", ".sbatch")
    at = next(i for i, word in enumerate(words) if word.endswith(endings))
    return words[at], words[at + 1 :]


def table_rows(path: Path, heading: str) -> list[tuple[str, str]]:
    """Return the first two cells of the tables below a heading, up to the next heading."""
    sections = re.split(r"^#+ ", text_of(path), flags=re.MULTILINE)
    section = next(part for part in sections if part.startswith(heading + "\n"))
    found = []
    for line in section.splitlines():
        if not line.startswith("|"):
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        is_header = cells[0] == "there" or set(cells[0]) <= set("-")
        if not is_header:
            found.append((cells[0], cells[1]))
    return found


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", prose_of(path), re.MULTILINE)
    headings = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
