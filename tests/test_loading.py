"""From names to a model: what is found beside an adapter, what beside its base."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from transformers import AutoModelForCausalLM

import merge
import minilora
from helpers.asking import infer_args, train_adapter, user, write_base
from infer import prepare
from minilora.checkpoint.model_record import ModelRecord, write_model_record
from minilora.config import DataConfig, ModelConfig
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError
from minilora.loading import find_model, read_tokenizer
from minilora.model.lora import lora_layers

FORM = DataConfig(format="prompt", prompt_template="### {question}", chat=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained in the form FORM and ends answers at a second token, 100."""
    base = write_base("llama3", tmp_path_factory.mktemp("loading") / "base")
    write_model_record(base, ModelRecord(FORM, ModelConfig(dtype="float32")))
    ends = {"eos_token_id": [Tokenizer(base).eos_id, 100]}
    (base / "generation_config.json").write_text(json.dumps(ends))
    return base


@pytest.fixture(scope="module")
def of_peft(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of PEFT, which saves a tokenizer beside it but nothing of the training."""
    directory = tmp_path_factory.mktemp("loading") / "adapter"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = PeftLoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, settings).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, directory / name)
    return directory


def test_what_an_adapter_does_not_record_is_that_of_its_base(
    base: Path, of_peft: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """The form of prompts and the end tokens; merged, it is the same."""
    assert merge.main(merge.Args(str(of_peft), out=str(tmp_path / "merged"))) == 0
    for directory in (of_peft, tmp_path / "merged"):
        files = find_model(str(directory))
        assert files.record is not None
        assert files.record.data.prompt_template == "### {question}"
        assert files.record.model.dtype == "float32"
        assert 100 in read_tokenizer(files).stop_ids()
    assert "does not say how it was trained" in capfd.readouterr().err


def test_an_adapter_on_another_model_is_noted(
    base: Path, of_peft: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    find_model(str(base), str(of_peft))
    assert "was trained over" not in capfd.readouterr().err
    other = shutil.copytree(base, tmp_path / "other")
    find_model(str(other), str(of_peft))
    assert f"was trained over {base}, not {other}" in capfd.readouterr().err


def test_the_answer_is_the_same_from_python_and_from_the_command(base: Path, tmp_path: Path):
    """In 16 bits, where adapters beside the weights round in another way than merged ones."""
    rows = [{"question": f"What is {i}?", "answer": "A number."} for i in range(4)]
    data = DataConfig(format="prompt", prompt_template="{question}", response_template="{answer}")
    in_16_bits = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(in_16_bits)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, in_16_bits / name)
    checkpoint = train_adapter(in_16_bits, tmp_path / "out", data, rows)

    model, tokenizer = minilora.load(str(checkpoint), device="cpu")
    assert model.head_weight.dtype == torch.bfloat16
    assert not list(lora_layers(model))
    writer = prepare(infer_args(checkpoint, prompt="What is 7?")).writer
    prompt = minilora.format_prompt(tokenizer, "What is 7?")
    assert prompt == tokenizer.render(user("What is 7?"), add_generation_prompt=True)
    ids = tokenizer.encode(prompt).ids
    assert writer.encode_text("What is 7?") == ids

    assert merge.main(merge.Args(str(checkpoint))) == 0
    merged, _ = minilora.load(str(checkpoint / "merged"), device="cpu")
    live, _ = minilora.load(str(checkpoint), device="cpu", fold=False)
    logits, of_merged, of_live = (each(torch.tensor(ids)) for each in (model, merged, live))
    assert torch.equal(logits, of_merged)
    assert len(list(lora_layers(live))) > 0 and not torch.equal(logits, of_live)


def test_bits_that_contradict_the_record_are_refused(base: Path, tmp_path: Path):
    data = DataConfig(format="prompt", prompt_template="{q}", response_template="{a}")
    checkpoint = train_adapter(base, tmp_path / "out", data, [{"q": "x", "a": "y"}])
    args = merge.Args(str(checkpoint), out=str(tmp_path / "m"), bits=4, from_quantized=True)
    with pytest.raises(UserError, match=r"--bits 4: .* was trained over 16 bits"):
        merge.main(args)


def test_tokens_of_a_config_that_the_model_lacks_are_noted(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    config = tmp_path / "c.yaml"
    config.write_text("data: {format: prompt, prompt_template: '<|q|>{q}', add_tokens: ['<|q|>']}")
    prepare(infer_args(base, config=str(config), prompt="x"))
    assert "adds <|q|>, which this model does not have" in capfd.readouterr().err
