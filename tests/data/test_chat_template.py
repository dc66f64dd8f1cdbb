"""Chat templates render as in transformers, in a sandbox, and mistakes in them are named."""

import json
from datetime import datetime

import pytest
import transformers

from helpers import tiny_tokenizers
from minilora.data.chat_template import load_chat_template
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError

QUESTION = [{"role": "user", "content": "Title: T\nAn abstract."}]
THREE_TURNS = [
    {"role": "user", "content": "안녕하세요, 물리학이 뭐예요?"},
    {"role": "assistant", "content": "자연 과학의 한 분야입니다."},
    {"role": "user", "content": "In 中文, please."},
    {"role": "assistant", "content": "物理学是自然科学。 🤖"},
    {"role": "user", "content": "spaces after \n"},
]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
        "{{ m.content }}{% break %}{% endfor %}",
        "{{ messages | tojson }}",
        "{{ messages | tojson(indent=2) }}",
        "{{ {'z': 'é', 'a': '<'} | tojson(sort_keys=true) }}",
        "{{ bos_token }}{{ eos_token }}{{ messages | length }}"
        "{{ add_generation_prompt }}{{ tools is none }}",
        "{% if true %}\n    {% set x = 1 %}\n  kept\n{% endif %}\nx{{ x }}",
        "{{ messages[0].missing }}{{ messages[0]['content'].split(' ')[0] | upper }}",
        "{% macro turn(m) %}<{{ m.role }}>{% endmacro %}{{ turn(messages[0]) }}",
        "{% set ns = namespace(n=0) %}"
        "{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    ],
)
def test_template_renders_as_in_transformers(template):
    reference = transformers.AutoTokenizer.from_pretrained(tiny_tokenizers.llama3())
    expected = reference.apply_chat_template(THREE_TURNS, chat_template=template, tokenize=False)
    assert Tokenizer(tiny_tokenizers.llama3(), template).render(THREE_TURNS) == expected


def test_strftime_now_is_the_date():
    tokenizer = Tokenizer(tiny_tokenizers.llama3(), "{{ strftime_now('%d %b %Y') }}")
    before = f"{datetime.now():%d %b %Y}"
    rendered = tokenizer.render([])
    after = f"{datetime.now():%d %b %Y}"
    assert rendered in (before, after)


def test_complaint_of_a_template_reaches_the_user():
    template = "{{ raise_exception('no system turn, please') }}"
    with pytest.raises(UserError, match="no system turn, please"):
        Tokenizer(tiny_tokenizers.llama3(), template).render(QUESTION)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__']['__base__'] }}",
        "{{ (messages | attr('__class__')).__subclasses__() }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append('x') }}",
        "{{ messages.clear() }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages[0].pop('role') }}",
    ],
)
def test_sandbox_refuses_escapes_and_mutation(template):
    messages = [dict(message) for message in QUESTION]
    with pytest.raises(UserError, match="chat template"):
        Tokenizer(tiny_tokenizers.llama3(), template).render(messages)
    assert messages == QUESTION


def test_named_templates_give_the_default(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    directory = tiny_tokenizers.copy(tiny_tokenizers.llama3(), tmp_path / "t", chat_template=named)
    assert Tokenizer(directory).render([]) == "plain"
    config = json.loads((directory / "tokenizer_config.json").read_text())
    assert config["chat_template"] == named, "the file is as it was"


@pytest.mark.parametrize(
    "content, message",
    [(b"", "is empty"), (b" \n", "is empty"), ("{{ x }}".encode("utf-16"), "UTF-8")],
)
def test_unusable_template_file_is_named(content, message, tmp_path):
    (tmp_path / "t.jinja").write_bytes(content)
    with pytest.raises(UserError, match=f"data.chat_template: .*{message}"):
        load_chat_template(str(tmp_path / "t.jinja"))
