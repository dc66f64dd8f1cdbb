"""Save a tokenizer so that every program that loads it asks the model as it was trained.

The base's own files may say something else than training did: they may have another chat template,
`Tokenizer.encode` puts BOS before a text, and data.add_tokens may have brought the token that ends
an answer. `plan_export` decides how the saved files differ from the base's.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from minilora.config import DataConfig
from minilora.data.chat_template import (
    has_generation_marks,
    other_templates,
    write_bos_first,
    write_bos_if_missing,
)
from minilora.data.tokenizer import TOKENIZER_FILES, Tokenizer, has_tokenizer
from minilora.data.tokenizer_backends import TokenizersBackend
from minilora.errors import RunError, UserError
from minilora.files import read_json, read_json_if_present, write_json

_USER = {"role": "user", "content": "question"}
_ASSISTANT = {"role": "assistant", "content": "answer"}
_SYSTEM = {"role": "system", "content": "instruction"}
PROBES = (
    [_USER],
    [_SYSTEM, _USER],
    [_USER, _ASSISTANT],
    [_SYSTEM, _USER, _ASSISTANT],
    [_USER, _ASSISTANT, _USER],
)
"""Conversations that show how a chat template begins."""


@dataclass(frozen=True)
class TokenizerExport:
    """How the saved files of a tokenizer differ from those in its directory."""

    chat_template: str | None
    """The content of chat_template.jinja; None: training used no template, and none is saved."""
    new_eos: str | None
    """The added token that becomes eos_token; None: EOS stays as it is."""
    notes: tuple[str, ...]
    """What a user should know of it, one sentence each."""


def plan_export(tokenizer: Tokenizer, data: DataConfig) -> TokenizerExport:
    """Decide how a tokenizer is saved, so that the saved files say what training does.

    Args:
        tokenizer: the run's.
        data: the run's data settings: do rows become text by the chat template, and which tokens
            were added.
    """
    notes: list[str] = []
    if not data.uses_chat_template:
        if tokenizer.has_template:
            notes.append(
                "the model's chat template is not saved with checkpoints: training does not use it"
            )
        return TokenizerExport(None, None, tuple(notes))

    others = other_templates(tokenizer.directory)
    if others:
        notes.append(
            "of the model's chat templates, checkpoints have the one that training uses, without "
            f"{', '.join(others)}"
        )
    template = _template_with_bos(tokenizer, notes)
    return TokenizerExport(template, _new_eos(tokenizer, data, notes), tuple(notes))


def _template_with_bos(tokenizer: Tokenizer, notes: list[str]) -> str:
    """Return the chat template, changed to write the BOS that `Tokenizer.encode` adds.

    Programs that render a template add no BOS to what it writes. A change adds to `notes`.
    """
    template, bos = tokenizer.chat_template, tokenizer.bos_token
    if not tokenizer.adds_bos or bos is None:
        return template

    texts = _probe_texts(tokenizer)
    without_bos = [text for text in texts if not _begins_with_bos(text, tokenizer)]
    names_bos = "bos_token" in template or bos in template
    if names_bos and not without_bos:
        return template

    note = f"the saved chat template writes {bos}, which training puts before it"
    # after BOS, some tokenizers leave out the dummy space that begins a text: then it is written
    space_after = False
    if not _gives_ids_of_training(bos, without_bos, tokenizer):
        space_after = _gives_ids_of_training(bos + " ", without_bos, tokenizer)
        if not space_after:
            note += "; other programs may split the first word after it in another way"
    notes.append(note)
    if not names_bos:
        return write_bos_first(template, space_after)
    if has_generation_marks(template):
        notes.append("the saved chat template has no {% generation %} marks")
    return write_bos_if_missing(template, space_after)


def _probe_texts(tokenizer: Tokenizer) -> list[str]:
    """Return what the chat template makes of those of the PROBES that it accepts."""
    texts = []
    for messages in PROBES:
        for add_generation_prompt in (False, True):
            try:
                texts.append(tokenizer.render(messages, add_generation_prompt))
            except UserError:
                continue  # such as a system turn in a template that has no place for it
    return texts


def _begins_with_bos(text: str, tokenizer: Tokenizer) -> bool:
    """Return whether `Tokenizer.encode` adds no BOS, because a text has one."""
    return tokenizer.backend.encode(text).ids == tokenizer.encode(text).ids


def _gives_ids_of_training(start: str, texts: list[str], tokenizer: Tokenizer) -> bool:
    """Return whether texts have the ids of training if `start` is written before each."""
    return all(
        tokenizer.backend.encode(start + text).ids == tokenizer.encode(text).ids for text in texts
    )


def _new_eos(tokenizer: Tokenizer, data: DataConfig, notes: list[str]) -> str | None:
    """Return the added token that ends the turns of the chat template, to become eos_token.

    Programs such as llama.cpp stop an answer at EOS alone. EOS stays as it is where that would
    change what the model reads; `notes` then says so.
    """
    end_id = tokenizer.end_of_turn()
    ends = [token for token in data.add_tokens if tokenizer.specials.get(token) == end_id]
    if end_id is None or not ends:
        return None
    end, old = ends[0], tokenizer.eos_token
    if "eos_token" in tokenizer.chat_template:
        reason = "the chat template writes eos_token elsewhere"
    elif old is not None and not all(data.for_file(name).is_chat for name in data.train_files):
        reason = f"rows without the chat template end with {old}"
    else:
        notes.append(f"the saved tokenizer's eos_token is {end}, which ends the turns")
        return end
    notes.append(
        f"{end} ends the turns, but the saved tokenizer's eos_token stays {old}, because {reason}: "
        f"a program that stops at eos_token alone has to be told to stop at {end}"
    )
    return None


def save_tokenizer(tokenizer: Tokenizer, directory: Path, export: TokenizerExport) -> None:
    """Write a tokenizer's files, with what training uses of it.

    Args:
        tokenizer: the run's.
        directory: where the files go.
        export: how the files differ from the tokenizer's own; see `plan_export`.

    Raises:
        RunError: the tokenizer's own directory has been removed.
    """
    source = tokenizer.directory
    if not has_tokenizer(source):
        raise RunError(
            f"the tokenizer's directory {source} has been removed during the run: run the same "
            "command again, it creates the directory and continues"
        )
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and name != "chat_template.jinja":
            shutil.copyfile(source / name, directory / name)

    _write_post_processor(directory / "tokenizer.json", tokenizer)
    write_json(directory / "tokenizer_config.json", _saved_config(tokenizer, export))
    special_tokens_map = directory / "special_tokens_map.json"
    if export.new_eos is not None and special_tokens_map.is_file():
        tokens = read_json_if_present(special_tokens_map)
        write_json(special_tokens_map, {**tokens, "eos_token": export.new_eos})
    if export.chat_template is not None:
        (directory / "chat_template.jinja").write_text(export.chat_template, encoding="utf-8")

    generation = read_json_if_present(source / "generation_config.json")
    stop_ids = tokenizer.stop_ids()
    if stop_ids:
        generation["eos_token_id"] = sorted(stop_ids)
    write_json(directory / "generation_config.json", generation)


def _write_post_processor(path: Path, tokenizer: Tokenizer) -> None:
    """Let a saved tokenizer.json add to a text what `Tokenizer.encode` adds: BOS, or nothing.

    The base's may do something else: it may add EOS, or contradict add_bos_token in
    tokenizer_config.json, which training and llama.cpp go by, and transformers (5) does not.
    """
    if not isinstance(tokenizer.backend, TokenizersBackend):
        return
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_id
    ids_of_training = []  # those that training adds to a text
    if tokenizer.adds_bos:
        ids_of_training.append(bos_id)
    if tokenizer.backend.ids_of_empty_text == ids_of_training:
        return

    content = read_json(path)
    old = content.get("post_processor") or {"type": "Sequence", "processors": []}
    old_steps = old["processors"] if old["type"] == "Sequence" else [old]
    steps = [step for step in old_steps if step["type"] == "ByteLevel"]  # the others add tokens
    if tokenizer.adds_bos:
        first = {"SpecialToken": {"id": bos, "type_id": 0}}
        text, second_text = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        add_bos = {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, second_text],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        }
        steps.append(add_bos)
    content["post_processor"] = None
    if steps:
        content["post_processor"] = {"type": "Sequence", "processors": steps}
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _saved_config(tokenizer: Tokenizer, export: TokenizerExport) -> dict:
    """Return the content of the saved tokenizer_config.json.

    It has no chat template: some programs prefer that one to chat_template.jinja.
    """
    config = read_json_if_present(tokenizer.directory / "tokenizer_config.json")
    config.pop("chat_template", None)
    if isinstance(tokenizer.backend, TokenizersBackend):
        # training reads tokenizer.json as it is. For the classes of some models (LlamaTokenizer)
        # transformers 5 builds another tokenizer of its parts
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if config.get("add_eos_token"):
        config["add_eos_token"] = False  # `Tokenizer.encode` never adds it
    # where the base does not name them, programs have different defaults
    for key, token in (("bos_token", tokenizer.bos_token), ("eos_token", tokenizer.eos_token)):
        if token is not None:
            config.setdefault(key, token)
    if export.new_eos is not None:
        config["eos_token"] = export.new_eos
    return config
