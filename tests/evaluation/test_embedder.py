"""The embedder of titles: each title once, and what is wrong with a model is said."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.embedding import save_tiny_embedder
from helpers.hub_server import running_hub
from minilora import hub
from minilora.errors import UserError
from minilora.evaluation import embedder, ontology
from minilora.evaluation.embedder import DEFAULT_EMBEDDER, SentenceEmbedder, load_embedder

HERE = Path(__file__).parent

FILES = [
    "modules.json",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "1_Pooling/config.json",
]


class CountingModel:
    """Stands in for a SentenceTransformer: a title's vector tells its length."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def encode(self, titles, **options):
        assert not options["show_progress_bar"]  # this is no terminal
        self.batches.append(list(titles))
        return np.array([[len(title), 1.0] for title in titles])


def test_each_title_is_embedded_once():
    model = CountingModel()
    titles = SentenceEmbedder(model)
    rows = titles.embed(["Art", "Physics", "Art", "物理学"])
    assert rows.tolist() == [[3, 1], [7, 1], [3, 1], [3, 1]] and rows.dtype == np.float32
    assert titles.embed(["Physics", "", "Art"]).tolist() == [[7, 1], [0, 1], [3, 1]]
    assert len(titles.embed([])) == 0 and titles.embed(["Art"]).shape == (1, 2)
    assert model.batches == [["Art", "Physics", "物理学"], [""]]


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(embedder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'minilora\[ontology\]'"):
        load_embedder("a/name")


def test_a_model_that_is_not_to_be_had_is_named(monkeypatch):
    with pytest.raises(UserError, match=r"'./nowhere': no such directory.*--embedder"):
        load_embedder("./nowhere")

    def download(*arguments, **options):
        raise ConnectionError("the hub is down")

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=f"{DEFAULT_EMBEDDER}.*the hub is down.*--embedder"):
        load_embedder()


def test_a_directory_that_is_not_such_a_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=rf"{tmp_path} has no file modules\.json.*--embedder"):
        load_embedder(str(tmp_path))


def test_a_broken_installation_is_named_with_its_remedy(tmp_path, monkeypatch):
    package = tmp_path / "sentence_transformers"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('libcudart.so: cannot open')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sentence_transformers", raising=False)
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(UserError, match=r"libcudart\.so.*pip install 'minilora\[ontology\]'"):
        load_embedder(str(tmp_path))


@pytest.mark.system
def test_a_real_model_is_pooled_by_the_mean_and_not_scaled(tmp_path, monkeypatch):
    """From a directory, without the network; the same as its parts compute."""
    from sentence_transformers import SentenceTransformer

    directory = save_tiny_embedder(tmp_path / "tiny")
    model = SentenceTransformer(str(directory), device="cpu")
    titles = ["Physics", "Café society", "", "物理学", "Physics"]
    np.testing.assert_allclose(np.linalg.norm(model.encode(titles), axis=1), 1, atol=1e-5)

    def no_network(*arguments, **options):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", no_network)
    rows = load_embedder(str(directory)).embed(titles)
    assert rows.dtype == np.float32 and rows.shape == (5, 16)
    for title, row in zip(titles, rows, strict=True):
        tokens = model.encode(title, output_value="token_embeddings").cpu().numpy()
        np.testing.assert_allclose(row, tokens.mean(axis=0), atol=1e-5)
    assert np.abs(np.linalg.norm(rows, axis=1) - 1).max() > 0.1
    assert load_embedder(str(directory)) is load_embedder(str(directory))

    # the same from the hub, without what is not needed; then from its cache
    monkeypatch.undo()
    files = {file: (directory / file).read_bytes() for file in FILES}
    with running_hub(monkeypatch, tmp_path / "hf") as server:
        server.add("owner/tiny", {**files, "pytorch_model.bin": b"", "onnx/model.onnx": b""})
        from_hub = load_embedder("owner/tiny@main").embed(titles)
    np.testing.assert_array_equal(from_hub, rows)
    fetched = {path.name for path in (tmp_path / "hf").rglob("snapshots/*/**/*")}
    assert not fetched & {"pytorch_model.bin", "model.onnx"}
    load_embedder.cache_clear()
    np.testing.assert_array_equal(load_embedder("owner/tiny").embed(titles), rows)

    unscaled = save_tiny_embedder(tmp_path / "unscaled", normalize=False)
    np.testing.assert_allclose(load_embedder(str(unscaled)).embed(titles), rows, atol=1e-5)

    # a model that is loaded but cannot embed: its words are outside its table
    settings = json.loads((unscaled / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = settings["model"]["vocab"]
    settings["model"]["vocab"] = {word: 10_000 + i for i, word in enumerate(vocabulary)}
    broken = save_tiny_embedder(tmp_path / "broken")
    (broken / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"broken.*--embedder"):
        load_embedder(str(broken))

    (unscaled / "model.safetensors").unlink()
    load_embedder.cache_clear()
    with pytest.raises(UserError, match=r"unscaled.*cannot be loaded.*--embedder"):
        load_embedder(str(unscaled))


@pytest.mark.system
def test_the_command_embeds_with_a_real_model(tmp_path, capfd):
    directory = save_tiny_embedder(tmp_path / "tiny")
    graphs = [str(HERE / f"sciences_{name}.json") for name in ("wordnet", "arxiv")]
    ontology.main(ontology.Args(*graphs, embedder=str(directory), json=True))
    figures = json.loads(capfd.readouterr().out)  # nothing else, by whatever library
    assert figures["continuous_precision"] < figures["fuzzy_precision"]
    assert 0 < figures["graph_f1"] < 1
