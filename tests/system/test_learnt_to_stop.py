"""Models that were trained until they know their rows by heart: their answers must end."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import minilora
import train
from helpers import tiny_tokenizers
from helpers.tiny_models import config_json
from minilora.config import Config, DataConfig, EvalConfig, LogConfig, ModelConfig, TrainConfig
from minilora.data.tokenizer import Tokenizer
from minilora.generation.engine import generate_ids
from minilora.generation.sampling import SamplingParams

pytestmark = pytest.mark.system  # for its time: two runs of 240 steps


def overfit(base: Path, tmp_path: Path) -> tuple[Path, list[dict]]:
    """Train a tiny Mistral until it knows 50 rows by heart.

    Args:
        base: a directory with a tokenizer; config.json is written into it.
        tmp_path: where the run's files go.

    Returns:
        The final checkpoint, and the rows.
    """
    sizes = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.05}
    tokens = Tokenizer(base)
    raw = config_json("mistral", vocab_size=tokens.vocab_size, eos_token_id=tokens.eos_id, **sizes)
    (base / "config.json").write_text(json.dumps(raw))

    rng = random.Random(0)
    words = " ".join(tiny_tokenizers.corpus()[::4]).split()
    rows = []
    for i in range(50):
        completion = " ".join(rng.choices(words, k=rng.randint(1, 5)))
        rows.append({"prompt": f"question {i}", "completion": completion})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    out = tmp_path / "out"
    config = Config(
        output_dir=str(out),
        method="full",
        model=ModelConfig(name=str(base), init="random"),
        data=DataConfig(train_file=str(tmp_path / "rows.jsonl"), format="prompt"),
        train=TrainConfig(
            max_steps=240,
            batch_size=25,
            learning_rate=3e-3,
            lr_scheduler="cosine",
            warmup_steps=10,
            gradient_checkpointing=False,
        ),
        eval=EvalConfig(eval_steps=1000, num_generate_samples=0),
        log=LogConfig(tensorboard=False),
    )
    assert train.main(config) == 0
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in metrics if "loss" in row]
    assert losses[-1] < 0.05
    return out / "checkpoint-final", rows


def assert_answers_end(directory: Path, rows: list[dict], end: str) -> None:
    """Check that each answer is the row's completion and then `end`, with which decoding stops.

    With minilora, and with transformers by what the checkpoint's files say.
    """
    model, tokens = minilora.load(str(directory), device="cpu")
    asked, completions = [], []
    for row in rows:
        turn = {"role": "user", "content": row["prompt"]}
        asked.append(tokens.render([turn], add_generation_prompt=True))
        completions.append(row["completion"])
    ids = [tokens.encode(text).ids for text in asked]

    answers = generate_ids(model, ids, tokens, SamplingParams(max_new_tokens=50))
    assert [answer.text for answer in answers] == completions
    for answer in answers:
        assert answer.finish_reason == "stop" and answer.ids[-1] == tokens.specials[end]
    assert minilora.generate(model, tokens, asked, max_new_tokens=50) == completions

    hf = AutoModelForCausalLM.from_pretrained(directory)
    for prompt, answer in list(zip(ids, answers, strict=True))[:10]:
        out = hf.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=50)
        assert out[0, len(prompt) :].tolist() == answer.ids


def test_an_overfit_model_stops_by_itself(tmp_path: Path):
    """Though pad_token == eos_token, which trainers that pad never teach."""
    base = tiny_tokenizers.copy(tiny_tokenizers.llama2(), tmp_path / "base", pad_token="</s>")
    assert_answers_end(*overfit(base, tmp_path), end="</s>")


def test_a_model_trained_to_end_turns_stops_after_its_turn(tmp_path: Path):
    """Qwen's base models end a turn with <|im_end|>, while their EOS, <|endoftext|>, is another."""
    base = tiny_tokenizers.copy(
        tiny_tokenizers.qwen(), tmp_path / "base", eos_token="<|endoftext|>"
    )
    assert_answers_end(*overfit(base, tmp_path), end="<|im_end|>")
