"""From names to a model that is ready to use: `minilora.load`, and the parts that it is made of.

A name stands for a base model, or for an adapter that names its base. `find_model` finds all the
directories that are needed, `load_files` reads them.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from minilora import distributed
from minilora.build import build_for_inference
from minilora.checkpoint.hf import checkpoint_bits
from minilora.checkpoint.model_record import ModelRecord, find_model_record, prompt_form
from minilora.checkpoint.peft import CONFIG_FILE, base_model_name
from minilora.data.tokenizer import Tokenizer, has_tokenizer
from minilora.errors import UserError
from minilora.files import read_json, read_json_if_present
from minilora.hub import HUB_FILES, resolve
from minilora.model.lora import merge_adapters
from minilora.model.precision import precision_note
from minilora.model.transformer import CausalLM

GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class ModelFiles:
    """The directories of a model's parts, and how it was trained."""

    base: Path
    """The base model, or a whole model."""
    adapter: Path | None
    """The PEFT adapter on it."""
    tokenizer: Path
    """The tokenizer: beside the adapter if there is one there, else beside the base."""
    record: ModelRecord | None
    """How adapter or model were trained; None if another program trained them."""

    def bits(self) -> int:
        """Return the bits per weight of the linear layers in training, or else in the files."""
        if self.record is not None:
            return self.record.model.bits
        config_file = self.base / "config.json"
        return checkpoint_bits(read_json(config_file), str(config_file))


def find_model(
    name: str,
    adapter: str | None = None,
    revision: str | None = None,
    adapter_revision: str | None = None,
    patterns: list[str] = HUB_FILES,
) -> ModelFiles:
    """Find the directories of a model's parts; those on the hub are downloaded.

    Args:
        name: hub id (`owner/name[@revision]`) or directory, of a model or of an adapter, such as a
            checkpoint of a LoRA run. The base of an adapter is found by the name that it records.
        adapter: hub id or directory of a PEFT adapter to put on the model.
        revision: branch, tag or commit of `name` on the hub.
        adapter_revision: the same of `adapter`.
        patterns: names of the files to download, with shell wildcards.

    Raises:
        UserError: something cannot be found, or a revision would be ignored.
    """
    if adapter_revision and not adapter:
        raise UserError("adapter_revision is given, but no adapter: `revision` is the model's")
    directory = resolve(name, revision, patterns=patterns)
    adapter_directory = None
    if adapter:
        adapter_directory = resolve(adapter, adapter_revision, "adapter_revision")
        _note_other_base(adapter_directory, adapter, name, revision)
    if (directory / CONFIG_FILE).is_file():
        if adapter:
            raise UserError(
                f"{name} is an adapter itself: give its base as the model, "
                f"or leave out adapter={adapter!r}"
            )
        adapter_directory = directory
        try:
            directory = find_base(adapter_directory, name, patterns)
        except UserError as error:
            raise UserError(
                f"{error} (this is the base of the adapter {name}; if it is elsewhere, give the "
                "base as the model, and the adapter with `adapter`)"
            ) from error

    # the adapter was trained last, so what is beside it comes first
    found = [directory] if adapter_directory is None else [adapter_directory, directory]
    with_tokenizer = [path for path in found if has_tokenizer(path)]
    return ModelFiles(
        base=directory,
        adapter=adapter_directory,
        tokenizer=with_tokenizer[0] if with_tokenizer else directory,
        record=find_model_record(adapter_directory, directory),
    )


def _note_other_base(directory: Path, adapter: str, name: str, revision: str | None) -> None:
    """Log a note if an adapter was trained over another model than the one it is put on.

    Args:
        directory: of the adapter.
        adapter: what the user calls it.
        name: the model that it is put on.
        revision: of that model.
    """
    adapter_config = read_json(directory / CONFIG_FILE)
    if not adapter_config.get("base_model_name_or_path"):
        return
    trained_over, trained_revision = base_model_name(adapter_config, str(directory))
    if Path(name).expanduser().is_dir():
        # an adapter from the hub has only the last part of a directory's name
        is_same = Path(trained_over).name == trained_over == Path(name).resolve().name
        is_same = is_same or Path(trained_over).expanduser().resolve() == Path(name).resolve()
    else:
        repository, _, at_revision = name.partition("@")
        given_revision = revision or at_revision or None
        is_same = (trained_over, trained_revision) == (repository, given_revision)
    if not is_same:
        if trained_revision:
            trained_over += f"@{trained_revision}"
        over = f"{name}@{revision}" if revision else name
        distributed.log(f"note: the adapter {adapter} was trained over {trained_over}, not {over}")


def find_base(adapter: Path, name: str, patterns: list[str] = HUB_FILES) -> Path:
    """Return the directory of the base that an adapter names.

    The base of an adapter from the hub may be a directory here. Then a note is logged: the name
    comes from another machine, and a directory of that name may hold anything.

    Args:
        adapter: the adapter's directory.
        name: what the user calls the adapter, for messages.
        patterns: names of the files to download, with shell wildcards.

    Raises:
        UserError: the base cannot be found.
    """
    base_name, revision = base_model_name(read_json(adapter / CONFIG_FILE), str(adapter))
    base = resolve(base_name, revision, patterns=patterns)
    is_local = Path(base_name).expanduser().is_dir()
    if is_local and not Path(name).expanduser().is_dir():
        distributed.log(f"note: the base of {name} is taken to be the directory {base.resolve()}")
    return base


def read_tokenizer(files: ModelFiles, chat_template: str | None = None) -> Tokenizer:
    """Read a model's tokenizer, with all tokens that end the model's answers.

    Args:
        files: the model's directories.
        chat_template: a jinja template to use in place of the model's own.

    Raises:
        UserError: the tokenizer cannot be read.
    """
    tokenizer = Tokenizer(files.tokenizer, chat_template)
    # PEFT saves a tokenizer with an adapter, but not the base's generation_config.json
    if not (files.tokenizer / GENERATION_FILE).is_file():
        tokenizer.generation_config = read_json_if_present(files.base / GENERATION_FILE)
    return tokenizer


def load_files(
    files: ModelFiles,
    dtype: str = "auto",
    bits: int | None = None,
    device: str | torch.device | None = None,
    fold: bool = True,
) -> CausalLM:
    """Load a model from its directories.

    Args:
        files: the directories; see `find_model`.
        dtype: of the arithmetic, see `load`.
        bits: of the linear layers' weights, see `load`.
        device: default: the GPU if there is one.
        fold: merge adapters into 16- or 32-bit weights, see `load`.

    Raises:
        UserError: a file cannot be read, or the parts do not fit.
    """
    double_quant = True
    if files.record is not None:
        double_quant = files.record.model.double_quant
        if dtype == "auto":
            dtype = files.record.model.dtype
    if bits is None:
        bits = files.bits()

    target = torch.device(device) if device else distributed.default_device()
    loaded = build_for_inference(files.base, target, dtype, bits, double_quant, files.adapter)
    note = precision_note(loaded.dtype, loaded.weight_dtype, target)
    if note:
        distributed.log(note)
    # embedding and head (one matrix if tied) are float32 where the adapter brings them
    for p in (loaded.model.model.embed_tokens.weight, loaded.model.head_weight):
        p.data = p.data.to(loaded.weight_dtype)
    if fold:
        merge_adapters(loaded.model)
    return loaded.model


def load(
    name_or_dir: str,
    adapter: str | None = None,
    dtype: str = "auto",
    bits: int | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    fold: bool = True,
) -> tuple[CausalLM, Tokenizer]:
    """Load a model that is ready to use, and its tokenizer. Logits are `model(tokens, lengths)`.

    Args:
        name_or_dir: a hub id, or a directory in Hugging Face layout. If it is an adapter, such as
            a checkpoint of a LoRA run, its base is found by the name that the adapter gives it.
        adapter: directory or hub id (`owner/name[@revision]`) of a PEFT adapter to put on the
            model.
        dtype: of the arithmetic: bfloat16, float16, float32, or auto: as the model was trained,
            or, if that is unknown, float32 for a model saved in float32 and bfloat16 for any other
            (float16 on a GPU without bfloat16, float32 over 16-bit weights on a CPU without it).
        bits: 16, 8 (LLM.int8), 4 (NF4), or None: as the adapter was trained, or as the model was
            saved.
        device: default: the GPU if there is one.
        revision: branch, tag or commit of `name_or_dir` on the hub.
        fold: merge adapters into the weights, as merge.py and infer.py do. False keeps them beside
            the weights, as in training: slower, and in 16 bits rounded in another way. Adapters
            over quantized weights always stay beside them.

    Returns:
        The model, and its tokenizer. The tokenizer's `prompt_form` says how prompts were written in
        training; `minilora.format_prompt` writes them so.

    Raises:
        UserError: something cannot be found, read, or put together, or a revision would be ignored.
    """
    files = find_model(name_or_dir, adapter, revision)
    model = load_files(files, dtype, bits, device, fold)
    tokenizer = read_tokenizer(files)
    tokenizer.prompt_form = prompt_form(files.record, tokenizer)
    return model, tokenizer
