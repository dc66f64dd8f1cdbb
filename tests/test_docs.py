"""What the documents say, held to the code: settings, files, links, functions, tests, other projects' names; and their commands,
data rows and Python run, with the tiny model."""

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import transformers
import tyro

import infer
import merge
import tiny_models
import train
from minilora.config import Config, UserError
from minilora.data import Documents
from minilora.running.cache import load_documents
from minilora.running.datasets import chat_template
from minilora.running.reading import table
from minilora.running.settings import leaves, load_config
from minilora.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = "model lora data train eval parallel log hub".split()
SETTINGS = leaves(Config())
TINY = "examples/tiny-mistral"
FILES = {  # where a document's bare file name may lie
    path.name for top in ("minilora", "tests", "bench", "configs", "examples", "launch") for path in (ROOT / top).rglob("*.*")
} | {path.name for path in ROOT.iterdir()}  # fmt: skip


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path) -> list[tuple[str, str, int]]:
    """(language, content, where it begins) of every fenced block."""
    return [(m[1], m[2], m.start()) for m in re.finditer(r"^```(\w*)\n(.*?)^```$", text_of(path), re.MULTILINE | re.DOTALL)]


def commands(path: Path) -> Iterator[list[str]]:
    """The words of every command for our scripts: in blocks, and in backticks."""
    for language, content, _ in blocks(path):
        waiting = ""
        for line in content.splitlines() if language in ("", "sh") else ():
            if not waiting and not re.match(r"(\w+=\S+ )*(python|torchrun|sbatch|launch/\w+\.sh) ", line):
                continue
            waiting += line + "\n"
            try:
                words = shlex.split(waiting, comments=True)
            except ValueError:  # a quotation goes on in the next line
                continue
            waiting = ""
            yield words
        assert not waiting, f"{path}: {waiting!r}"
    prose = re.sub(r"^```.*?^```$", "", text_of(path), flags=re.MULTILINE | re.DOTALL)
    for words in re.findall(r"`((?:python|torchrun) [^`\n]*)`", prose):
        yield shlex.split(words)


def script_and_flags(words: list[str]) -> tuple[str, list[str]]:
    """("train", its arguments) of a command."""
    at = next(i for i, word in enumerate(words) if word.endswith((".py", "torchrun.sh", ".sbatch")))
    return words[at], words[at + 1 :]


def rows(path: Path, heading: str) -> list[tuple[str, str]]:
    """(left, right) cells of the tables under a heading, to the next one of any level."""
    part = re.split(r"^#+ ", text_of(path), flags=re.MULTILINE)
    section = next(p for p in part if p.startswith(heading + "\n"))
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [(c[0].strip(), c[1].strip()) for c in cells if c[0].strip() != "there" and not set(c[0]) <= set("-")]


# --- settings, flags, files, links, names


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_settings_and_flags_exist(path: Path):
    text = text_of(path)
    named = re.findall(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.(\w+)(?![\w/]|\.\w)", text)
    named = [(s, f) for s, f in named if f not in ("py", "jsonl", "json", "md", "safetensors")]
    assert not (wrong := {f"{s}.{f}" for s, f in named} - SETTINGS.keys()), wrong
    ours = {name.split("=")[0] for name in SETTINGS}
    ours |= {f.name for args in (infer.Args, merge.Args) for f in dataclasses.fields(args)}
    bench = " ".join(text_of(p) for p in (ROOT / "bench").glob("*.py"))
    others = {"help", "nproc_per_node", "max_restarts", "section.field"}
    for flag in re.findall(r"(?<![\w-])--([a-z][\w.-]*\w)", text):
        flag = flag.replace("-", "_")
        assert flag in ours | others or re.search(rf"^    {flag}: ", bench, re.MULTILINE), f"--{flag}"


def test_configs_name_settings_that_exist():
    for path in (ROOT / "configs").glob("*.py"):
        for section, field in re.findall(rf"--({'|'.join(SECTIONS)})\.(\w+)", text_of(path)):
            assert f"{section}.{field}" in SETTINGS, f"{path.name}: {section}.{field}"


def test_every_setting_is_in_some_document():
    text = "\n".join(map(text_of, DOCS))
    missing = [name for name in SETTINGS if not re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", text)]
    assert not missing


def slugs(path: Path) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    body = re.sub(r"^```.*?^```$", "", text_of(path), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", body, re.MULTILINE)
    heads = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", h) for h in heads]
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


@pytest.mark.parametrize("path", [*DOCS, ROOT / "bench/README.md"], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_links_and_files_exist(path: Path):
    text = text_of(path)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            file = (path.parent / name).resolve() if name else path
            assert file.exists(), target
            assert not anchor or anchor in slugs(file), target
    mentioned = re.findall(r"(?<![\w./*<{-])((?:[\w-]+/)*[\w-]+\.(?:py|md|sbatch|yaml|sh))(?![\w/])", text)
    for name in mentioned:
        known = any((place / name).exists() for place in (ROOT, path.parent))
        assert known or name in FILES | {"CONFIG.py"}, name
    for place in re.findall(r"(?<![\w./-])((?:configs|examples|launch|bench|tests|minilora|docs)/[\w./-]*\w)", text):
        assert (ROOT / place).exists(), place


def defined(*places: str) -> set[str]:
    """Names of functions and classes, methods included."""
    files = itertools.chain.from_iterable(ROOT.glob(place) for place in places)
    nodes = (node for file in files for node in ast.walk(ast.parse(text_of(file))))
    return {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}


def test_the_tour_names_what_is_there():
    text = text_of(ROOT / "docs/tour.md")
    assert not (wrong := set(re.findall(r"`(\w+)\(\)`", text)) - defined("minilora/**/*.py", "*.py")), wrong
    assert not (wrong := set(re.findall(r"`(test_\w+)`", text)) - defined("tests/**/*.py")), wrong
    for chunk in re.split(r"^## ", text, flags=re.MULTILINE):  # a proof stands in a file that the same chapter names
        tests = re.findall(r"`(test_\w+)`", chunk)
        files = [ROOT / f for f in re.findall(r"tests/[\w/]+\.py", chunk)]
        assert all(any(f"def {t}(" in text_of(f) for f in files) for t in tests), chunk[:40]
    core = {p.name for p in (ROOT / "minilora").glob("*.py")} - {"__init__.py"}
    assert core <= set(re.findall(r"\w+\.py", text))


def test_the_readme_lists_every_file():
    (tree,) = [content for _, content, _ in blocks(ROOT / "README.md") if content.startswith("train.py  merge.py")]
    listed = re.findall(r"^  (\w+\.py) ", tree, re.MULTILINE)
    assert sorted(listed) == sorted(p.name for p in (ROOT / "minilora").glob("*.py") if p.name != "__init__.py")
    for folder, following in (("running", "evaluation"), ("evaluation", "tracking"), ("tracking", "configs")):
        part = tree[tree.index(f"  {folder}/") : tree.index(f"{following}/ ", tree.index(f"  {folder}/"))]
        there = {p.name for p in (ROOT / "minilora" / folder).glob("*.py")} - {"__init__.py"}
        assert set(re.findall(r"\w+\.py(?!\w)", part)) == there, folder
    assert len(text_of(ROOT / "README.md").splitlines()) <= 230


# --- names of other projects


def names(path: Path, heading: str) -> list[str]:
    """The backticked names in the left column."""
    return [name for left, _ in rows(path, heading) for name in re.findall(r"`(\w+)`", left)]


COMING = ROOT / "docs/coming-from.md"
ARGUMENTS = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}


@pytest.mark.parametrize(
    ("heading", "known"),
    [
        ("transformers: TrainingArguments", ARGUMENTS),
        ("peft: LoraConfig", {f.name for f in dataclasses.fields(peft.LoraConfig)}),
        ("transformers: BitsAndBytesConfig", set(inspect.signature(transformers.BitsAndBytesConfig).parameters)),
        ("transformers: generate() and GenerationConfig", set(vars(transformers.GenerationConfig()))),
    ],
)
def test_names_of_transformers_and_peft(heading: str, known: set[str]):
    found = names(COMING, heading)
    assert found and not (wrong := set(found) - known), wrong
    assert len(found) == len(set(found))


def test_names_that_are_gone_and_trls():
    assert not set(names(COMING, "Names of transformers 4 that 5 has not")) & ARGUMENTS
    trl = names(COMING, "trl: SFTConfig and SFTTrainer")
    assert len(trl) > 15 and not set(trl) & ARGUMENTS, "what trl inherits stands with transformers"
    total = sum(len(rows(COMING, h)) for h in re.findall(r"^##+ (\w+: .*)$", text_of(COMING), re.MULTILINE))
    assert total >= 90, total
    assert all(right for h in re.findall(r"^##+ (\w+: .*)$", text_of(COMING), re.MULTILINE) for _, right in rows(COMING, h))


def test_defaults_of_others_that_are_told():
    fields = {f.name: f.default for f in dataclasses.fields(transformers.TrainingArguments)}
    assert (fields["adam_beta1"], fields["adam_beta2"], fields["adam_epsilon"]) == (0.9, 0.999, 1e-8)
    assert fields["average_tokens_across_devices"] is True and fields["logging_nan_inf_filter"] is True
    assert inspect.signature(transformers.BitsAndBytesConfig).parameters["bnb_4bit_quant_type"].default == "fp4"
    optimizer = torch.optim.AdamW([torch.zeros(1)])
    assert (*optimizer.defaults["betas"], optimizer.defaults["eps"]) == (0.9, 0.999, 1e-8)
    ours = Config()
    assert (ours.lora.rank, ours.lora.alpha, ours.train.learning_rate, ours.train.warmup_steps) == (32, 16, 1e-5, 100)
    assert (ours.train.epochs, ours.train.group_by_length, ours.train.gradient_checkpointing) == (2.0, True, True)
    assert ours.train.lr_scheduler == "constant_with_warmup" and ours.hub.private and ours.model.double_quant


# --- commands


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_commands_are_understood(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    for words in commands(path):
        script, flags = script_and_flags(words)
        assert (ROOT / script).is_file(), words
        if "--help" in flags or "CONFIG.py" in flags:
            continue
        if script in ("train.py", "launch/torchrun.sh", "launch/slurm.sbatch"):
            load_config(flags)
        elif script in ("infer.py", "merge.py"):
            tyro.cli({"infer.py": infer.Args, "merge.py": merge.Args}[script], args=flags, use_underscores=True)
        else:
            source = text_of(ROOT / script)
            assert all(re.search(rf"^    {f[2:]}: ", source, re.MULTILINE) for f in flags if f.startswith("--")), words


SMALL = (
    f"--model.name {TINY} --model.dtype float32 --train.optimizer adamw --train.max_steps 1 --data.eval_size 2 --hub.push False "
    "--eval.max_new_tokens 1 --eval.num_generate_samples 2 --log.tensorboard False --parallel.strategy auto --data.num_workers 1"
).split()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to run the documents' commands in, with what they name in place."""
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows_of_a_recipe(config: str) -> dict[str, str]:
    """What T.jsonl and E.jsonl stand for: the rows that the config names itself."""
    data = load_config([config]).data
    assert isinstance(data.train_file, str) and data.eval_file
    return {"T.jsonl": data.train_file, "E.jsonl": data.eval_file}


def run(words: list[str], files: dict[str, str], *more: str) -> None:
    """A command as it stands, in this process, with the tiny model, one step and short answers; more: flags of training."""
    script, flags = script_and_flags(words)
    flags = [files.get(flag, flag) for flag in flags]
    if script == "train.py":
        bits = "4" if "qlora" in flags[0] else "16"  # bitsandbytes takes its time to be imported: once is enough
        assert train.main(load_config([*flags, *SMALL, "--model.bits", bits, *more])) == 0
        return
    flags = [flag for i, flag in enumerate(flags) if "--max_new_tokens" not in flags[max(0, i - 1) : i + 1]]
    if script == "merge.py":
        assert merge.main(tyro.cli(merge.Args, args=flags, use_underscores=True)) == 0
    else:
        assert infer.main(tyro.cli(infer.Args, args=[*flags, "--max_new_tokens", "2"], use_underscores=True)) == 0


RECIPES = re.findall(r"^## (\w+): .*?(?=^## |\Z)", text_of(ROOT / "docs/recipes.md"), re.MULTILINE | re.DOTALL)


def test_every_config_is_a_recipe():
    assert sorted([*RECIPES, "tiny", "tiny_base"]) == sorted(p.stem for p in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_run_from_data_to_answers(recipe: str, workplace: Path, capsys: pytest.CaptureFixture):
    page = text_of(ROOT / "docs/recipes.md")
    section = re.search(rf"^## {recipe}: .*?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)[0]  # type: ignore[index]
    (workplace / "section.md").write_text(section, encoding="utf-8")
    found = list(commands(workplace / "section.md"))
    assert {script_and_flags(words)[0] for words in found} >= {"train.py", "infer.py"}
    assert f"configs/{recipe}.py" in script_and_flags(found[0])[1]
    files = rows_of_a_recipe(f"configs/{recipe}.py")
    prompts = [json.dumps({"prompt": f"Question {i}"}) for i in range(1000)]
    (workplace / "prompts.jsonl").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    if recipe == "qlora":  # the page says: rows of prompt and completion
        files = {"T.jsonl": "rows.jsonl", "E.jsonl": "rows.jsonl"}
        (row,) = [content for language, content, _ in blocks(workplace / "section.md") if language == "json"]
        (workplace / "rows.jsonl").write_text(row * 6, encoding="utf-8")
    more = []
    if recipe == "instruct":  # of a system turn the tiny model's template knows nothing
        (workplace / "chat.jinja").write_text(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}", encoding="utf-8",
        )  # fmt: skip
        more = ["--data.chat_template", "chat.jinja"]
    for words in found:
        run(words, files, *more)
    outputs = [words[words.index("--output") + 1] for words in found if "--output" in words]
    for output in outputs:
        answers = [json.loads(line) for line in text_of(workplace / output).splitlines()]
        assert answers and all("generated" in answer for answer in answers)
        assert recipe == "full" or (workplace / output).with_suffix(".metrics.json").is_file()
    if recipe == "full":
        assert len(answers) == 1000
    printed = capsys.readouterr().out
    assert ("largest logit gap" in printed) == (recipe != "full")
    for language, content, _ in blocks(workplace / "section.md"):  # the row shown has the columns that are read
        if language == "json":
            first = json.loads(text_of(ROOT / files["T.jsonl"]).splitlines()[0]) if recipe != "qlora" else json.loads(content)
            assert json.loads(content).keys() <= first.keys()


def test_commands_of_the_other_pages_run(workplace: Path):
    for page in ("data", "run", "tour"):
        for words in commands(ROOT / f"docs/{page}.md"):
            script, flags = script_and_flags(words)
            if (flags[0] == "configs/tiny.py" and "--log.wandb" not in flags) or script == "merge.py":
                run(words, {})
    assert {p.name for p in (workplace / "out").iterdir()} == {"tiny", "added", "epochs", "best"}
    kept = sorted(p.name for p in (workplace / "out/best").iterdir())
    wanted = re.findall(r"^\| (`[^|]*) \|", text_of(ROOT / "docs/run.md").split("## When things happen")[0], re.MULTILINE)
    listed = {name.rstrip("/") for cell in wanted for name in re.findall(r"`([^`]*)`", cell)}
    assert set(kept) <= listed, "what a run writes is in its table"
    keys = {key for line in text_of(workplace / "out/best/metrics.jsonl").splitlines() for key in json.loads(line)}
    unknown = {key for key in keys if key not in listed and not key.startswith("eval/")}
    assert not unknown and {"eval/in_domain/loss", "eval/out_of_domain/loss", "eval/out_of_domain/rougeL"} <= keys & listed


# --- data


def documents_of(flags: list[str], file: str) -> tuple[Documents, Tokenizer]:
    config = load_config(["configs/tiny.py", *flags, "--data.train_file", file, "--data.num_workers", "1"])
    tokenizer = Tokenizer(TINY, chat_template(config.data.chat_template))
    return load_documents(file, config.data, tokenizer, "train_file"), tokenizer


def marked(documents: Documents, tokenizer: Tokenizer, i: int) -> str:
    """Document i with its supervised stretches in brackets, from its ids and labels alone."""
    ids, labels = documents.ids(i).tolist(), documents.labels(i, (0, 0)).tolist()
    text = ""
    for end in range(len(ids)):
        shown = tokenizer.decode(ids[: end + 1], skip_special_tokens=False)
        before, now = end > 0 and labels[end - 1] != -100, labels[end] != -100
        text += "⟦" * (now and not before) + shown[len(tokenizer.decode(ids[:end], skip_special_tokens=False)) :]
        text += "⟧" * (now and (end + 1 == len(ids) or labels[end + 1] == -100))
    return text


EXAMPLES = re.findall(
    r"With `(--data[^`\n]*)` the row\n\n```json\n([^\n]*)\n```\n\nis shown as\n\n```text\n(.*?)\n```",
    text_of(ROOT / "docs/data.md"), re.DOTALL,
)  # fmt: skip


@pytest.mark.parametrize(("flags", "row", "shown"), EXAMPLES)
def test_rows_are_supervised_as_shown(flags: str, row: str, shown: str, workplace: Path):
    (workplace / "row.jsonl").write_text(row + "\n", encoding="utf-8")
    documents, tokenizer = documents_of(shlex.split(flags), "row.jsonl")
    assert marked(documents, tokenizer, 0) == shown
    text = text_of(ROOT / "docs/data.md")
    straddling = f"{documents.counts.straddling} tokens straddle" in text[text.index(flags) : text.index(flags) + 600]
    assert straddling == (documents.counts.straddling > 0)


def test_every_format_has_its_example():
    formats = {shlex.split(flags)[shlex.split(flags).index("--data.format") + 1] for flags, _, _ in EXAMPLES}
    assert formats == {"paths", "prompt", "messages", "text"}
    assert len(EXAMPLES) == len([1 for language, _, _ in blocks(ROOT / "docs/data.md") if language == "json"])


def test_the_counts_table_is_the_one_shown(workplace: Path):
    found = blocks(ROOT / "docs/data.md")
    (at,) = [i for i, (language, _, _) in enumerate(found) if language == "jsonl"]
    (workplace / "rows.jsonl").write_text(found[at][1], encoding="utf-8")
    documents, _ = documents_of(["--data.format", "prompt"], "rows.jsonl")
    assert table(documents.counts) == found[at + 1][1].rstrip("\n")


# --- Python


def python_blocks() -> list[tuple[str, str]]:
    return [(path.stem, content) for path in DOCS for language, content, _ in blocks(path) if language == "python"]


@functools.cache
def untied() -> dict:
    return tiny_models.config_json("mistral", vocab_size=2048, max_position_embeddings=512)


def test_python_compiles_and_runs(workplace: Path, capsys: pytest.CaptureFixture):
    assert sorted(page for page, _ in python_blocks()) == ["README", "data"]
    code = dict(python_blocks())
    for content in code.values():
        compile(content, "docs", "exec")
    assert train.main(load_config(["configs/tiny.py", *SMALL])) == 0
    scope: dict = {}
    exec(code["README"].replace("max_new_tokens=64", "max_new_tokens=4"), scope)
    assert scope["logits"].shape == (len(scope["tokens"]), 2048) and len(scope["texts"]) == 1
    assert "# exactly one BOS" in code["README"] and scope["tokens"].count(scope["tokenizer"].bos_id) == 1

    base = workplace / "BASE"  # with a head of its own
    tiny_models.from_config_json(untied()).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        (base / name).write_bytes((ROOT / TINY / name).read_bytes())
    (words,) = [w for w in commands(ROOT / "docs/data.md") if "--data.add_tokens" in w]
    assert train.main(load_config([*script_and_flags(words)[1], *SMALL, "--model.name", "BASE"])) == 0
    exec(code["data"], scope)
    ours, tokenizer = train_free_load("out/added/checkpoint-final")
    ids = tokenizer.encode("Title: Lute <|answer|> of").ids
    assert ids.count(2048) == 1 and scope["tokenizer"].convert_tokens_to_ids("<|answer|>") == 2048
    with torch.no_grad():
        theirs = scope["model"].eval().float()(torch.tensor([ids])).logits[0]
    assert torch.allclose(ours(torch.tensor(ids)), theirs, atol=1e-4)
    without = code["data"].replace("base.resize_token_embeddings(len(tokenizer))\n", "")
    assert without != code["data"]
    with pytest.raises(RuntimeError, match="size mismatch"):  # why the page says to resize first
        exec(without, {})


def train_free_load(name: str):
    import minilora

    return minilora.load(name, dtype="float32")


def test_what_the_pages_say_is_refused(workplace: Path):
    """Statements of the pages that a command is an error, with what they say of it."""
    with pytest.raises(UserError, match="train_embeddings"):
        load_config(["configs/tiny.py", "--data.add_tokens", "<|x|>"])
    with pytest.raises(UserError, match="in the vocabulary already"):
        flags = ["--data.add_tokens", "</s>", "--lora.train_embeddings", "True"]
        train.main(load_config(["configs/tiny.py", *flags, *SMALL]))
    with pytest.raises(UserError, match="is not supported yet"):
        load_config(["configs/tiny.py", "--plan"])
    with pytest.raises(UserError, match="is not supported yet"):
        load_config(["configs/tiny.py", "--train.compile", "True"])
    (workplace / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"rows\.jsonl:1"):
        documents_of(["--data.format", "prompt", "--data.strict", "True"], "rows.jsonl")
