"""The documents' commands, data rows and Python run as they are shown, with the tiny model."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

import infer
import merge
import minilora
import train
from helpers import tiny_models
from helpers.documents import DOCS, ROOT, blocks, commands, script_and_flags, text_of
from minilora.cli import load_config
from minilora.data.cache import load_documents
from minilora.data.chat_template import load_chat_template
from minilora.data.dataset import Documents, LabelDraw
from minilora.data.tokenize import format_counts
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError

pytestmark = pytest.mark.system

TINY = "examples/tiny-mistral"
TRAINING = ("train.py", "launch/torchrun.sh", "launch/slurm.sbatch")
# one step of the tiny model with short answers, in place of what a document's command would train
SMALL = (
    f"--model.name {TINY} --model.dtype float32 --train.optimizer adamw --train.max_steps 1 "
    "--data.eval_size 2 --hub.push False --eval.max_new_tokens 1 --eval.num_generate_samples 2 "
    "--log.tensorboard False --parallel.strategy auto --data.num_workers 1"
).split()
RECIPES_PAGE = text_of(ROOT / "docs/recipes.md")
RECIPES = re.findall(r"^## (\w+): ", RECIPES_PAGE, re.MULTILINE)
# the tiny model's own template refuses a system turn
ANY_ROLE_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to run the documents' commands in, with what they name in place."""
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- commands


def parse_scripts_flags(script: str, flags: list[str]):
    args = {"infer.py": infer.Args, "merge.py": merge.Args}[script]
    return tyro.cli(args, args=flags, use_underscores=True)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_commands_are_understood(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    for words in commands(path):
        script, flags = script_and_flags(words)
        assert (ROOT / script).is_file(), words
        if "--help" in flags or "CONFIG.py" in flags:
            continue
        if script in TRAINING:
            load_config(flags)
        elif script in ("infer.py", "merge.py"):
            parse_scripts_flags(script, flags)
        else:
            source = text_of(ROOT / script)
            for flag in flags:
                if flag.startswith("--"):
                    assert re.search(rf"^    {flag[2:]}: ", source, re.MULTILINE), words


def run(words: list[str], files: dict[str, str], *more: str) -> None:
    """Run a document's command in this process.

    Args:
        words: the command as it is shown.
        files: what to read in place of the files that it names.
        more: further flags for train.py.
    """
    script, flags = script_and_flags(words)
    flags = [files.get(flag, flag) for flag in flags]
    if script == "train.py":
        # bitsandbytes takes seconds to be imported: one recipe that uses it is enough
        bits = "4" if "qlora" in flags[0] else "16"
        config = load_config([*flags, *SMALL, "--model.bits", bits, *more])
        assert train.main(config) == 0
    elif script == "merge.py":
        assert merge.main(parse_scripts_flags(script, flags)) == 0
    else:
        args = parse_scripts_flags(script, flags)
        args.sampling.max_new_tokens = 2
        assert infer.main(args) == 0


def test_every_config_has_a_recipe():
    configs = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    assert sorted([*RECIPES, "tiny", "tiny_base"]) == configs


def section_of(recipe: str) -> str:
    """Return the part of docs/recipes.md about one recipe."""
    pattern = rf"^## {recipe}: .*?(?=^## |\Z)"
    found = re.search(pattern, RECIPES_PAGE, re.MULTILINE | re.DOTALL)
    assert found
    return found[0]


def rows_of_recipe(recipe: str, shown_row: str) -> dict[str, str]:
    """Return what stands for the files of a recipe's commands; the rows are those of its config."""
    if recipe == "qlora":  # the page shows a row of its own kind, prompt and completion
        Path("rows.jsonl").write_text(shown_row * 6, encoding="utf-8")
        return {"T.jsonl": "rows.jsonl", "E.jsonl": "rows.jsonl"}
    data = load_config([f"configs/{recipe}.py"]).data
    assert isinstance(data.train_file, str)
    assert data.eval_file
    files = {"T.jsonl": data.train_file, "E.jsonl": data.eval_file}
    if recipe == "arxiv":  # after its one step here, the best checkpoint is the last one
        best, last = "out/arxiv/checkpoint-288", "out/arxiv/checkpoint-final"
        files |= {best: last, f"{best}/merged": f"{last}/merged"}
    return files


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_run_from_data_to_answers(
    recipe: str, workplace: Path, capsys: pytest.CaptureFixture
):
    section = workplace / "section.md"
    section.write_text(section_of(recipe), encoding="utf-8")
    shown_rows = [content for language, content in blocks(section) if language == "json"]
    files = rows_of_recipe(recipe, "".join(shown_rows))
    prompts = [json.dumps({"prompt": f"Question {i}"}) + "\n" for i in range(1000)]
    (workplace / "prompts.jsonl").write_text("".join(prompts), encoding="utf-8")
    more = []
    if recipe == "instruct":
        (workplace / "chat.jinja").write_text(ANY_ROLE_TEMPLATE, encoding="utf-8")
        more = ["--data.chat_template", "chat.jinja"]

    found = list(commands(section))
    assert {script_and_flags(words)[0] for words in found} >= {"train.py", "infer.py"}
    assert f"configs/{recipe}.py" in script_and_flags(found[0])[1]
    for words in found:
        run(words, files, *more)

    for words in found:
        if "--output" not in words:
            continue
        output = workplace / words[words.index("--output") + 1]
        answers = [json.loads(line) for line in text_of(output).splitlines()]
        assert answers
        assert all("generated" in answer for answer in answers)
        if recipe == "full":
            assert len(answers) == 1000
        else:
            assert output.with_suffix(".metrics.json").is_file()
    assert ("largest logit gap" in capsys.readouterr().out) == (recipe != "full")

    columns = json.loads(text_of(Path(files["T.jsonl"])).splitlines()[0]).keys()
    for row in shown_rows:  # the row that the page shows has the columns that are read
        assert json.loads(row).keys() <= columns


def test_commands_of_the_other_pages_run(workplace: Path):
    for page in ("data", "run", "tour"):
        for words in commands(ROOT / f"docs/{page}.md"):
            script, flags = script_and_flags(words)
            is_tiny_run = flags[0] == "configs/tiny.py" and "--log.wandb" not in flags
            if is_tiny_run or script == "merge.py":
                run(words, {})
    outputs = {path.name for path in (workplace / "out").iterdir()}
    assert outputs == {"tiny", "added", "epochs", "best"}

    # what a run writes is in the table of docs/run.md, and so are the keys of its metrics
    page = text_of(ROOT / "docs/run.md").split("## When things happen")[0]
    cells = re.findall(r"^\| (`[^|]*) \|", page, re.MULTILINE)
    listed = {name.rstrip("/") for name in re.findall(r"`([^`]*)`", " ".join(cells))}
    assert {path.name for path in (workplace / "out/best").iterdir()} <= listed
    lines = text_of(workplace / "out/best/metrics.jsonl").splitlines()
    keys = {key for line in lines for key in json.loads(line)}
    assert {key for key in keys if not key.startswith("eval/")} <= listed
    for key in ("in_domain/loss", "out_of_domain/loss", "out_of_domain/rougeL"):
        assert f"eval/{key}" in keys & listed


# --- data


def documents_of(flags: list[str], file: str) -> tuple[Documents, Tokenizer]:
    more = ["--data.train_file", file, "--data.num_workers", "1"]
    config = load_config(["configs/tiny.py", *flags, *more])
    tokenizer = Tokenizer(TINY, load_chat_template(config.data.chat_template))
    documents = load_documents(file, config.data, tokenizer, "train_file")
    documents.count_edges(np.arange(len(documents)), config.data.edge_dropping)
    return documents, tokenizer


def marked(documents: Documents, tokenizer: Tokenizer, i: int) -> str:
    """Return document i with its supervised stretches in brackets, from ids and labels alone."""
    ids, labels = documents.ids(i).tolist(), documents.labels(i, LabelDraw(0, epoch=0)).tolist()
    text = ""
    previous = ""
    was_supervised = False
    for position, label in enumerate(labels):
        shown = tokenizer.decode(ids[: position + 1], skip_special_tokens=False)
        is_supervised = label != -100
        if is_supervised and not was_supervised:
            text += "⟦"
        if was_supervised and not is_supervised:
            text += "⟧"
        text += shown[len(previous) :]
        previous, was_supervised = shown, is_supervised
    if was_supervised:
        text += "⟧"
    return text


DATA_PAGE = text_of(ROOT / "docs/data.md")
EXAMPLE = (
    r"With `(--data[^`\n]*)` the row\n\n```json\n([^\n]*)\n```\n\nis shown as\n\n"
    r"```text\n(.*?)\n```"
)
EXAMPLES = re.findall(EXAMPLE, DATA_PAGE, re.DOTALL)


@pytest.mark.parametrize(("flags", "row", "shown"), EXAMPLES)
def test_rows_are_supervised_as_shown(flags: str, row: str, shown: str, workplace: Path):
    (workplace / "row.jsonl").write_text(row + "\n", encoding="utf-8")
    documents, tokenizer = documents_of(shlex.split(flags), "row.jsonl")
    assert marked(documents, tokenizer, 0) == shown
    straddling = documents.counts.straddling
    after = DATA_PAGE[DATA_PAGE.index(flags) :][:600]
    assert (f"{straddling} tokens straddle" in after) == (straddling > 0)


def test_every_format_has_its_example():
    formats = set()
    for flags, _, _ in EXAMPLES:
        words = shlex.split(flags)
        formats.add(words[words.index("--data.format") + 1])
    assert formats == {"paths", "prompt", "messages", "text"}
    languages = [language for language, _ in blocks(ROOT / "docs/data.md")]
    assert len(EXAMPLES) == languages.count("json")


def test_the_counts_table_is_the_one_shown(workplace: Path):
    found = blocks(ROOT / "docs/data.md")
    (at,) = [i for i, (language, _) in enumerate(found) if language == "jsonl"]
    (workplace / "rows.jsonl").write_text(found[at][1], encoding="utf-8")
    documents, _ = documents_of(["--data.format", "prompt"], "rows.jsonl")
    assert format_counts(documents.counts) == found[at + 1][1].rstrip("\n")


# --- Python


def python_of_pages() -> dict[str, str]:
    found = {}
    for path in DOCS:
        for language, content in blocks(path):
            if language == "python":
                assert path.stem not in found
                found[path.stem] = content
    return found


def test_python_of_the_readme_runs(workplace: Path):
    code = python_of_pages()
    assert sorted(code) == ["README", "data"]
    assert train.main(load_config(["configs/tiny.py", *SMALL])) == 0
    scope: dict = {}
    exec(code["README"].replace("max_new_tokens=64", "max_new_tokens=4"), scope)
    assert scope["logits"].shape == (len(scope["ids"]), 2048)
    assert len(scope["texts"]) == 1
    assert "# exactly one BOS" in code["README"]
    assert scope["ids"].count(scope["tokenizer"].bos_id) == 1


def test_python_of_the_data_page_runs(workplace: Path):
    """An adapter with an added token loads in PEFT as the page says."""
    code = python_of_pages()["data"]
    base = workplace / "BASE"  # with a head of its own
    untied = tiny_models.config_json("mistral", vocab_size=2048, max_position_embeddings=512)
    tiny_models.from_config_json(untied).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        (base / name).write_bytes((ROOT / TINY / name).read_bytes())
    page = ROOT / "docs/data.md"
    (words,) = [found for found in commands(page) if "--data.add_tokens" in found]
    flags = [*script_and_flags(words)[1], *SMALL, "--model.name", "BASE"]
    assert train.main(load_config(flags)) == 0

    scope: dict = {}
    exec(code, scope)
    ours, tokenizer = minilora.load("out/added/checkpoint-final", dtype="float32")
    ids = tokenizer.encode("Title: Lute <|answer|> of").ids
    assert ids.count(2048) == 1
    assert scope["tokenizer"].convert_tokens_to_ids("<|answer|>") == 2048
    with torch.no_grad():
        theirs = scope["model"].eval().float()(torch.tensor([ids])).logits[0]
    assert torch.allclose(ours(torch.tensor(ids)), theirs, atol=1e-4)

    without = code.replace("base.resize_token_embeddings(len(tokenizer))\n", "")
    assert without != code
    with pytest.raises(RuntimeError, match="size mismatch"):  # why the page says to resize first
        exec(without, {})


def test_what_the_pages_say_is_refused(workplace: Path):
    with pytest.raises(UserError, match="train_embeddings"):
        load_config(["configs/tiny.py", "--data.add_tokens", "<|x|>"])
    flags = ["--data.add_tokens", "</s>", "--lora.train_embeddings", "True"]
    with pytest.raises(UserError, match="vocabulary"):
        train.main(load_config(["configs/tiny.py", *flags, *SMALL]))
    rows = '{"prompt": "a"}\n{"prompt": "a", "completion": "b"}\n'
    (workplace / "rows.jsonl").write_text(rows, encoding="utf-8")
    with pytest.raises(UserError, match=r"rows\.jsonl:1"):
        documents_of(["--data.format", "prompt", "--data.strict", "True"], "rows.jsonl")
