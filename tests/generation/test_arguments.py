"""The flags of infer.py for the graph of answers: those that contradict others, or do nothing."""

from pathlib import Path

import pytest

from minilora.errors import UserError
from minilora.generation.arguments import (
    Args,
    ModelArgs,
    OntologyArgs,
    QuestionArgs,
    ScoringArgs,
    check,
)


def check_flags(tmp_path: Path, metrics: tuple[str, ...], **flags) -> None:
    """Check the arguments of a job with these metrics and these flags of OntologyArgs."""
    question = QuestionArgs(input="rows.jsonl", output=str(tmp_path / "out.jsonl"))
    scoring = ScoringArgs(metrics=metrics)
    check(Args(ModelArgs("m"), question, scoring=scoring, ontology=OntologyArgs(**flags)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"root": "R"}, "--root needs --metrics ontology"),
        ({"reference_graph": "g.json"}, "--reference_graph needs --metrics ontology"),
        ({"embedder": "e"}, "--embedder needs --metrics ontology"),
        ({"prune_for": "graph_f1", "prune_on": "g.json"}, "--prune_for needs --metrics ontology"),
        (
            {"prune_reference": "g.json", "prune_on": "g.json"},
            "--prune_reference needs --metrics ontology",
        ),
    ],
)
def test_flags_of_ontology_need_it(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("g.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        check_flags(tmp_path, ("graph", "bleu"), **flags)
    check_flags(tmp_path, ("ontology",), **flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"prune_on": "g.json"}, "--prune_on needs --metrics graph or ontology"),
        ({"prune": "arxiv"}, "--prune needs --metrics graph or ontology"),
        ({"prune": "arxiv", "prune_rule": "paper"}, "needs --metrics graph or ontology"),
    ],
)
def test_flags_of_pruning_need_a_graph(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("g.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        check_flags(tmp_path, ("bleu",), **flags)
    for metric in ("graph", "ontology"):
        check_flags(tmp_path, (metric,), **flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"prune": "arxiv", "prune_on": "g.json"}, "only one of them"),
        ({"prune_rule": "code"}, "--prune_rule needs --prune or --prune_on"),
        ({"prune_rule": "paper"}, "--prune_rule needs --prune or --prune_on"),
        ({"prune_on": "out.jsonl"}, "--prune_on: is the same file as --output"),
        ({"prune_for": "graph_f1", "prune": "arxiv"}, "--prune_for needs --prune_on"),
        ({"prune_reference": "g.json"}, "--prune_reference needs --prune_on"),
        ({"reference_graph": "absent"}, "--reference_graph: 'absent' does not exist"),
        ({"prune_on": "absent"}, "--prune_on: 'absent' does not exist"),
    ],
)
def test_flags_that_contradict_each_other(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("g.json").write_text("{}")
    Path("out.jsonl").write_text("")
    with pytest.raises(UserError, match=message):
        check_flags(tmp_path, ("ontology", "graph"), **flags)
