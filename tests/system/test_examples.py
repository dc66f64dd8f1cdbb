"""What ships in examples/ and configs/: articles, the tiny base, and the run that uses both."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

import infer
import merge
import minilora
import train
from helpers.asking import infer_args
from minilora.cli import load_config
from minilora.data.paths import path_edges

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples/tiny-mistral"
ROOT_CATEGORY = "Main topic classifications"


def read_jsonl(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def articles(name: str) -> list[dict]:
    return read_jsonl(ROOT / f"examples/wiki/{name}.jsonl")


def test_articles_have_distinct_titles_and_long_paths():
    rows = [row for name in ("train", "eval", "test") for row in articles(name)]
    assert len(rows) >= 150
    assert len({row["title"] for row in rows}) == len(rows)
    for row in rows:
        assert 2 <= len(row["paths"]) <= 6 and len(row["abstract"].split()) >= 30
        assert len({tuple(path) for path in row["paths"]}) == len(row["paths"])
        for path in row["paths"]:
            assert path[0] == ROOT_CATEGORY and len(path) >= 3


def test_articles_have_frequent_and_rare_edges():
    counts = Counter(edge for row in articles("train") for edge in path_edges(row["paths"]))
    assert max(counts.values()) > 40
    assert sum(n == 1 for n in counts.values()) > 100
    fields = {child for parent, child in counts if parent == ROOT_CATEGORY}
    assert len(fields) >= 20


def test_the_tiny_base_is_small_and_transformers_reads_it():
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 5_000_000
    model, tokenizer = minilora.load(str(TINY), dtype="float32", device="cpu")
    reference = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    ids = torch.tensor(tokenizer.encode("Graphene\nGraphene is a single layer of carbon atoms").ids)
    with torch.no_grad():
        assert (model(ids) - reference(ids[None]).logits[0]).abs().max() <= 1e-4

    theirs = transformers.AutoTokenizer.from_pretrained(TINY)
    text = "Graphene is a layer."
    assert theirs(text).input_ids == tokenizer.encode(text).ids


CONFIGS = sorted((ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid(config):
    assert load_config([str(config)]).output_dir.startswith("out/")


def test_train_merge_and_infer_as_in_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    flags = f"--output_dir {tmp_path}/out --train.max_steps 3 --data.eval_size 4"
    assert train.main(load_config(["configs/tiny.py", *flags.split()])) == 0
    checkpoint = str(tmp_path / "out" / "checkpoint-final")
    assert merge.main(merge.Args(checkpoint, verify=True)) == 0
    assert "largest logit gap" in capsys.readouterr().out

    args = infer_args(
        f"{checkpoint}/merged",
        input="examples/wiki/test.jsonl",
        output=str(tmp_path / "answers.jsonl"),
        max_new_tokens=4,
    )
    assert infer.main(args) == 0
    answers = read_jsonl(tmp_path / "answers.jsonl")
    assert [row["title"] for row in answers] == [row["title"] for row in articles("test")]
