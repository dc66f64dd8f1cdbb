"""Sentence embedders for tests: one without a model, and a directory with a tiny random one."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np


class LetterEmbedder:
    """Embed a title by its letters: titles that share letters are similar.

    It implements minilora's TitleEmbedder, and needs neither a model nor torch. Vectors of longer
    titles are longer, as those of a model may be.
    """

    def __init__(self, size: int = 16) -> None:
        self.size = size
        self.asked: list[str] = []
        """All titles that were embedded, in order, with repeats."""

    def embed(self, titles: Sequence[str]) -> np.ndarray:
        """Return a vector for each title: float32 [N, size]."""
        self.asked += titles
        rows = np.zeros((len(titles), self.size))
        for row, title in zip(rows, titles, strict=True):
            row[0] = 0.5  # what all titles share, also the empty one
            for place, letter in enumerate(title.lower()):
                row += np.cos(np.arange(1, self.size + 1) * (ord(letter) + 0.01 * place))
        return rows.astype(np.float32)


def save_tiny_embedder(directory: Path, normalize: bool = True) -> Path:
    """Write a random sentence-transformers model of width 16 that reads single characters.

    sentence-transformers itself, which takes seconds to import, is not needed for it.

    Args:
        directory: does not exist yet.
        normalize: let the model scale its vectors to unit length, as all-MiniLM-L6-v2 does.
    """
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    directory.mkdir(parents=True)
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters]
    vocabulary += [f"##{character}" for character in characters]
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizer(str(directory / "vocab.txt")).save_pretrained(directory)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        initializer_range=0.5,  # the default makes all titles alike
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(directory)

    parts = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if normalize:
        parts.append(("2_Normalize", "Normalize"))
    modules = []
    for number, (path, kind) in enumerate(parts):
        type_name = f"sentence_transformers.models.{kind}"
        modules.append({"idx": number, "name": str(number), "path": path, "type": type_name})
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return directory
