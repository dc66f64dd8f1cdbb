"""What a saved tokenizer says of training: template, BOS, EOS, and what the user is told.

tests/parity/test_exported_tokenizers.py has the proof that other programs then do the same.
"""

import json
from pathlib import Path

import pytest

from helpers import tiny_tokenizers
from minilora.checkpoint.tokenizer_writer import plan_export, save_tokenizer
from minilora.config import DataConfig, RowFormat
from minilora.data.added_tokens import tokenizer_with_added_tokens
from minilora.data.tokenizer import Tokenizer

CHAT = DataConfig(format="messages")
END = "<|end of turn|>"
QUESTION = [{"role": "user", "content": "Why?"}]
ANSWERED = [*QUESTION, {"role": "assistant", "content": "Because."}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *QUESTION]
ROLES = "{% for m in messages %}<{{ m.role }}>{{ m.content }}END\n{% endfor %}"
ENDED = ROLES.replace("END", END)


def saved(tokenizer: Tokenizer, directory: Path, data: DataConfig = CHAT) -> Tokenizer:
    """Save a tokenizer into a new directory and read it again."""
    directory.mkdir()
    save_tokenizer(tokenizer, directory, plan_export(tokenizer, data))
    return Tokenizer(directory)


def config_of(directory: Path) -> dict:
    return json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))


def with_template(template: str, directory: Path, name: str = "llama3", **config) -> Tokenizer:
    """Return one of the tiny tokenizers with another chat template."""
    source = tiny_tokenizers.BUILDERS[name]()
    return Tokenizer(tiny_tokenizers.copy(source, directory, chat_template=template, **config))


def with_end_token(
    template: str, directory: Path, name: str = "llama2", special_tokens_map: bool = False
) -> Tokenizer:
    """Return a tokenizer with that template and the added token END."""
    base = with_template(template, directory, name).directory
    if special_tokens_map:
        tokens = {"eos_token": "</s>", "unk_token": "<unk>"}
        (base / "special_tokens_map.json").write_text(json.dumps(tokens))
    return Tokenizer(tokenizer_with_added_tokens(base, (END,)))


# --- which template ---


@pytest.mark.parametrize(
    "data",
    [DataConfig(format="text"), DataConfig(format="prompt", chat=False), DataConfig(chat=False)],
    ids=["text", "prompt", "paths"],
)
@pytest.mark.parametrize("name", ["llama3", "llama2", "mistral"])
def test_no_template_is_saved_where_training_used_none(name: str, data: DataConfig, tmp_path: Path):
    """Neither the base's own nor the built-in form, which a server would put around prompts."""
    tokenizer = Tokenizer(tiny_tokenizers.BUILDERS[name]())
    again = saved(tokenizer, tmp_path / "saved", data)
    assert not (tmp_path / "saved" / "chat_template.jinja").exists()
    assert not again.has_template
    assert again.stop_ids() == tokenizer.stop_ids()
    notes = plan_export(tokenizer, data).notes
    assert len(notes) == (name == "llama3")
    assert all("not saved" in note and "does not use it" in note for note in notes)


def test_one_chat_file_among_others_is_enough_for_the_template(tmp_path: Path):
    data = DataConfig(
        format="text",
        train_file=("a.jsonl", "b.jsonl"),
        file_formats={"b.jsonl": RowFormat(format="messages")},
    )
    again = saved(Tokenizer(tiny_tokenizers.llama3()), tmp_path / "saved", data)
    assert again.has_template and again.chat_template == tiny_tokenizers.LLAMA3_TEMPLATE


def test_the_stale_template_of_the_base_is_gone(tmp_path: Path):
    """GGUF prefers the key in tokenizer_config.json to the file."""
    base = with_template("{{ bos_token }}stale", tmp_path / "base").directory
    again = saved(Tokenizer(base, "{{ bos_token }}used"), tmp_path / "saved")
    assert again.chat_template == "{{ bos_token }}used"
    kept = config_of(base)
    assert kept.pop("chat_template") == "{{ bos_token }}stale", "the base is as it was"
    assert config_of(tmp_path / "saved") == kept


def test_of_named_templates_the_one_in_use_is_saved(tmp_path: Path):
    named = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "{{ bos_token }}plain"},
        {"name": "rag", "template": "documents"},
    ]
    base = tiny_tokenizers.copy(tiny_tokenizers.llama3(), tmp_path / "base", chat_template=named)
    tokenizer = Tokenizer(base)
    again = saved(tokenizer, tmp_path / "saved")
    assert again.chat_template == "{{ bos_token }}plain"
    (note,) = plan_export(tokenizer, CHAT).notes
    assert "without tool_use, rag" in note

    more = tmp_path / "base" / "additional_chat_templates"  # as transformers 5 saves them
    more.mkdir()
    (more / "think.jinja").write_text("hm")
    assert "think" in plan_export(tokenizer, CHAT).notes[0]
    saved(tokenizer, tmp_path / "saved again")
    assert not (tmp_path / "saved again" / "additional_chat_templates").exists()


# --- BOS ---

TEMPLATES_WITHOUT_BOS = {
    "statement": ROLES,
    "stripping statement": "{%- for m in messages %}{{ m.role }}{% endfor %}",
    "indented statement": "  {% for m in messages %}\n  {% if true %}\n {{ m.role }}\n  {% endif %}"
    "\n{% endfor %}",
    "text": "A chat.\n{{ messages[0].content }}\n\n",
    "spaces": "  {{ messages[0].content }}\n",
    "blank lines": "\n\n   {%- if true %} x {% endif %}\n  ",
    "newline": "\n{{ messages | length }}",
    "comment": "  {# says nothing #}\n{{ messages[0].role }}",
}


@pytest.mark.parametrize("template", TEMPLATES_WITHOUT_BOS.values(), ids=TEMPLATES_WITHOUT_BOS)
def test_bos_comes_first_and_the_rest_is_unchanged(template: str, tmp_path: Path):
    tokenizer = with_template(template, tmp_path / "base")
    again = saved(tokenizer, tmp_path / "saved")
    for messages in (QUESTION, ANSWERED, SYSTEM):
        for prompt in (False, True):
            rendered = tokenizer.render(messages, prompt)
            assert not rendered.startswith("<|begin")
            assert again.render(messages, prompt) == "<|begin_of_text|>" + rendered
    (note,) = plan_export(tokenizer, CHAT).notes
    assert "writes <|begin_of_text|>" in note

    # over a base that was saved so, nothing is added again
    third = saved(again, tmp_path / "third")
    assert third.chat_template == again.chat_template
    assert plan_export(again, CHAT).notes == ()


@pytest.mark.parametrize("template", TEMPLATES_WITHOUT_BOS.values(), ids=TEMPLATES_WITHOUT_BOS)
def test_bos_that_a_template_writes_only_sometimes(template: str, tmp_path: Path):
    """Here only with a system turn; training has it once in every conversation."""
    template = "{% if messages[0].role == 'system' %}{{ bos_token }}{% endif %}\n" + template
    tokenizer = with_template(template, tmp_path / "base")
    again = saved(tokenizer, tmp_path / "saved")
    for messages in (QUESTION, ANSWERED, SYSTEM):
        rendered = tokenizer.render(messages).removeprefix("<|begin_of_text|>")
        assert again.render(messages) == "<|begin_of_text|>" + rendered
    assert saved(again, tmp_path / "third").chat_template == again.chat_template


def test_generation_marks_that_would_be_wrong_are_not_saved(tmp_path: Path):
    marked = "{%- generation -%} {{ m.content }} {%- endgeneration %}"
    template = "{% for m in messages %}" + marked + "{% endfor %}"
    without_bos = with_template(template, tmp_path / "base")
    assert saved(without_bos, tmp_path / "saved").chat_template.endswith(template)

    sometimes = "{% if messages[0].role == 'system' %}{{ bos_token }}{% endif %}" + template
    tokenizer = with_template(sometimes, tmp_path / "base 2")
    again = saved(tokenizer, tmp_path / "saved 2")
    assert again.render(ANSWERED) == "<|begin_of_text|>Why?Because."
    assert "generation" not in again.chat_template
    assert any("{% generation %}" in note for note in plan_export(tokenizer, CHAT).notes)


@pytest.mark.parametrize(
    ("name", "template", "config"),
    [
        ("llama3", tiny_tokenizers.LLAMA3_TEMPLATE, {}),  # writes BOS
        ("llama3", ROLES, {"add_bos_token": False}),
        ("qwen", ROLES, {}),  # has no BOS
        ("llama3", "<|begin_of_text|>" + ROLES, {}),
    ],
)
def test_a_template_that_needs_no_change_has_none(
    name: str, template: str, config: dict, tmp_path: Path
):
    tokenizer = with_template(template, tmp_path / "base", name, **config)
    assert saved(tokenizer, tmp_path / "saved").chat_template == template
    assert plan_export(tokenizer, CHAT).notes == ()


def test_special_tokens_that_the_base_leaves_to_defaults_are_named(tmp_path: Path):
    base = tiny_tokenizers.copy(tiny_tokenizers.llama2(), tmp_path / "base")
    config = config_of(base)
    del config["bos_token"], config["eos_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    saved(Tokenizer(base), tmp_path / "saved")
    assert config_of(tmp_path / "saved") == {**config, "bos_token": "<s>", "eos_token": "</s>"}


# --- EOS ---


@pytest.mark.parametrize("special_tokens_map", [False, True])
@pytest.mark.parametrize("name", ["llama2", "mistral", "qwen"])
def test_an_added_token_that_ends_the_turns_becomes_eos(
    name: str, special_tokens_map: bool, tmp_path: Path
):
    tokenizer = with_end_token(
        ENDED, tmp_path / "base", name, special_tokens_map and name != "qwen"
    )
    data = DataConfig(format="prompt", add_tokens=(END,))
    again = saved(tokenizer, tmp_path / "saved", data)
    assert again.eos_token == END and again.eos_id == tokenizer.specials[END]
    assert tokenizer.eos_token != END
    assert again.stop_ids() == tokenizer.stop_ids()
    assert (
        again.encode(again.render(ANSWERED)).ids == tokenizer.encode(tokenizer.render(ANSWERED)).ids
    )
    file = tmp_path / "saved" / "special_tokens_map.json"
    assert file.exists() == (special_tokens_map and name != "qwen")
    if file.exists():
        assert json.loads(file.read_text()) == {"eos_token": END, "unk_token": "<unk>"}
    assert any(f"eos_token is {END}" in note for note in plan_export(tokenizer, data).notes)

    # the model that is trained on from there has it in its vocabulary
    third = saved(again, tmp_path / "third", CHAT)
    assert config_of(tmp_path / "third") == config_of(tmp_path / "saved")
    assert third.chat_template == again.chat_template
    assert third.stop_ids() == tokenizer.stop_ids()


EOS_ELSEWHERE = ENDED + "{{ eos_token }}"


@pytest.mark.parametrize(
    ("template", "data", "reason"),
    [
        (EOS_ELSEWHERE, DataConfig(format="messages"), "writes eos_token elsewhere"),
        (
            ENDED,
            DataConfig(
                train_file=("a", "b"),
                format="messages",
                file_formats={"b": RowFormat(format="prompt", chat=False)},
            ),
            "rows without the chat template end with </s>",
        ),
    ],
    ids=["in the template", "in rows without it"],
)
def test_eos_stays_where_training_wrote_it(
    template: str, data: DataConfig, reason: str, tmp_path: Path
):
    data.add_tokens = (END,)
    tokenizer = with_end_token(template, tmp_path / "base")
    again = saved(tokenizer, tmp_path / "saved", data)
    assert again.eos_token == "</s>"
    assert again.render(ANSWERED).removeprefix("<s>") == tokenizer.render(ANSWERED)
    assert again.stop_ids() == tokenizer.stop_ids() == {tokenizer.eos_id, again.specials[END]}
    notes = plan_export(tokenizer, data).notes
    assert any(reason in note and f"stop at {END}" in note for note in notes)


@pytest.mark.parametrize(
    ("template", "data"),
    [
        (ROLES.replace("END", "</s>"), DataConfig(format="messages", add_tokens=(END,))),
        (ROLES, DataConfig(format="messages", add_tokens=(END,))),
        (ENDED, DataConfig(format="prompt", chat=False, add_tokens=(END,))),
    ],
    ids=["EOS ends turns", "nothing ends turns", "no chat"],
)
def test_an_added_token_that_ends_no_turn_is_not_eos(
    template: str, data: DataConfig, tmp_path: Path
):
    tokenizer = with_end_token(template, tmp_path / "base")
    again = saved(tokenizer, tmp_path / "saved", data)
    assert again.eos_token == "</s>" and again.stop_ids() == tokenizer.stop_ids()
