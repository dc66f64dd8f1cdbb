"""What ships in examples/ and configs/: the articles, the tiny base, and the run that needs nothing else."""

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
from minilora.labels import path_edges
from minilora.running.settings import load_config

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "examples/tiny-mistral"


def articles(name: str) -> list[dict]:
    lines = (ROOT / f"examples/wiki/{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_articles():
    rows = [row for name in ("train", "eval", "test") for row in articles(name)]
    assert len(rows) >= 150 and len({row["title"] for row in rows}) == len(rows)
    for row in rows:
        assert 2 <= len(row["paths"]) <= 6 and len(row["abstract"].split()) >= 30
        assert len(set(map(tuple, row["paths"]))) == len(row["paths"])
        assert all(path[0] == "Main topic classifications" and len(path) >= 3 for path in row["paths"])
    counts = Counter(edge for row in articles("train") for edge in path_edges(row["paths"]))
    assert max(counts.values()) > 40 and sum(n == 1 for n in counts.values()) > 100, "frequent and rare edges"
    assert len({v for u, v in counts if u == "Main topic classifications"}) >= 20, "over many fields"


def test_the_tiny_base_is_small_and_transformers_reads_it():
    assert sum(p.stat().st_size for p in TINY.iterdir()) <= 5_000_000
    model, tokenizer = minilora.load(str(TINY), dtype="float32", device="cpu")
    reference = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    ids = torch.tensor(tokenizer.encode("Graphene\nGraphene is a single layer of carbon atoms").ids)
    with torch.no_grad():
        assert (model(ids) - reference(ids[None]).logits[0]).abs().max() <= 1e-4
    assert (
        transformers.AutoTokenizer.from_pretrained(TINY)("Graphene is a layer.").input_ids
        == tokenizer.encode("Graphene is a layer.").ids
    )


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_is_valid(config):
    assert load_config([str(config)]).output_dir.startswith("out/")


def test_train_merge_and_infer_as_in_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    run = load_config(
        ["configs/tiny.py", "--output_dir", str(tmp_path / "out"), "--train.max_steps", "3", "--data.eval_size", "4"]
    )
    assert train.main(run) == 0
    checkpoint = str(tmp_path / "out" / "checkpoint-final")
    assert merge.main(merge.Args(checkpoint, verify=True)) == 0
    assert (
        infer.main(
            infer.Args(
                f"{checkpoint}/merged", input="examples/wiki/test.jsonl", output=str(tmp_path / "g.jsonl"), max_new_tokens=4
            )
        )
        == 0
    )
    answers = [json.loads(line) for line in (tmp_path / "g.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [a["title"] for a in answers] == [row["title"] for row in articles("test")]
    assert "largest logit gap" in capsys.readouterr().out
