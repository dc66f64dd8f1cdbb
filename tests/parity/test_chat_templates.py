"""Conversations against transformers: the ids of prompts, and which tokens are supervised.

transformers renders the same template with `{% generation %}` around what the model writes, and
reports the tokens inside. It shares no code with minilora.
"""

import functools
from typing import cast

import pytest
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

from helpers import tiny_tokenizers
from helpers.conversations import (
    ALL_TOKENIZERS,
    CONVERSATIONS,
    chat,
    ids_and_masks,
    load_conversation,
    tokenizer,
    trained_answers,
)
from minilora.data.chat_template import MISTRAL_TEMPLATE
from minilora.errors import UserError

SENTENCEPIECE = ("mistral", "mistral_v3")  # without a tokenizer.json
WITH_TOKENIZER_JSON = [name for name in ALL_TOKENIZERS if name not in SENTENCEPIECE]
# these refuse turns that do not alternate
STRICT_TEMPLATES = (
    MISTRAL_TEMPLATE,
    tiny_tokenizers.MISTRAL_V3_TEMPLATE,
    tiny_tokenizers.TEKKEN_TEMPLATE,
)

# templates without generation tags, as they are published, and the same ones with the tags
WITH_TAGS = {
    MISTRAL_TEMPLATE: """\
{{- bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('alternation') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + message.content + ' [/INST]' }}
    {%- else %}
        {%- generation %}{{ message.content + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
""",
    tiny_tokenizers.LLAMA3_TEMPLATE: """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content | trim + '<|eot_id|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
""",
    tiny_tokenizers.QWEN_TEMPLATE: """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. ' }}
    {{- 'You are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
""",
}


@functools.cache
def theirs(name: str):
    reference = transformers.AutoTokenizer.from_pretrained(ALL_TOKENIZERS[name]())
    reference.chat_template = reference.chat_template or MISTRAL_TEMPLATE
    return reference


def template_with_tags(name: str) -> str:
    """Return the template of a tokenizer with generation tags, which some have of their own."""
    template = theirs(name).chat_template
    return WITH_TAGS.get(template, template)


def offsets_of(name: str, text: str) -> list[tuple[int, int]]:
    """Return the characters of each token of a text, by transformers.

    Where a file's offsets leave spaces out, a token begins where the one before it ends.
    """
    encoded = theirs(name)(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = []
    end = 0
    for start, stop in encoded["offset_mapping"]:
        spans.append((min(start, end), stop))
        end = max(end, stop)
    return spans


# ---- prompts


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", ALL_TOKENIZERS)
def test_prompt_ids_are_those_of_transformers(name, conversation):
    """Pitfall rows 12 and 35: a server that loads the saved files asks with the same ids.

    Every prefix of the conversation, with exactly one BOS.
    """
    messages = CONVERSATIONS[conversation]
    # transformers' own conversion of a tokenizer.model cuts runs of spaces otherwise than
    # sentencepiece, and drops the dummy space after a special token in the text; for these,
    # mistral_common is the reference (test_mistral_common.py)
    is_converted_otherwise = (
        conversation in ("special tokens", "empty answer") or "space" in conversation
    )
    if name in SENTENCEPIECE and is_converted_otherwise:
        messages = CONVERSATIONS["three answers"]

    reference = theirs(name)
    num_refused = 0
    for length in range(1, len(messages) + 1):
        for add_prompt in (False, True):
            part = messages[:length]
            try:
                text = reference.apply_chat_template(
                    part, add_generation_prompt=add_prompt, tokenize=False
                )
            except Exception:
                with pytest.raises(UserError, match="chat template"):
                    tokenizer(name).render(part, add_generation_prompt=add_prompt)
                num_refused += 1
                continue
            assert tokenizer(name).render(part, add_generation_prompt=add_prompt) == text
            ids = tokenizer(name).encode(text).ids
            assert ids == reference.apply_chat_template(
                part, add_generation_prompt=add_prompt, return_dict=False
            )
            has_bos = reference.bos_token is not None
            assert ids.count(reference.bos_token_id) == int(has_bos)
    if num_refused:
        assert tokenizer(name).chat_template in STRICT_TEMPLATES


# ---- masks


def render(
    name: str, messages: list[dict], add_prompt: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """Return transformers' text of a conversation, and the characters inside generation tags."""
    texts, regions = render_jinja_template(
        [messages],
        return_assistant_tokens_mask=True,
        chat_template=template_with_tags(name),
        add_generation_prompt=add_prompt,
        **theirs(name).special_tokens_map,
    )
    return cast(list, texts)[0], cast(list, regions)[0]


def reference_documents(name: str, messages: list[dict]) -> list[tuple[list[int], list[bool], int]]:
    """Return what a conversation should become, by transformers alone.

    Returns:
        (ids, is supervised, number of straddling tokens) of each document. Empty if the text
        before an answer is not its prompt, so that there is nothing right to train on.
    """
    answers = trained_answers(messages)
    text, _ = render(name, messages)
    is_stable = all(
        text.startswith(render(name, messages[:i], True)[0])
        and text.startswith(render(name, messages[: i + 1])[0])
        for i in answers
    )
    parts = [(messages[: i + 1], [i]) for i in answers]
    if is_stable:
        parts = [(messages, answers)]

    documents = []
    for part, trained in parts:
        text, regions = render(name, part)
        if not all(text.startswith(render(name, part[:i], True)[0]) for i in trained):
            return []
        encoded = theirs(name).apply_chat_template(
            part,
            chat_template=template_with_tags(name),
            return_assistant_tokens_mask=True,
            return_dict=True,
            tokenize=True,
        )
        of_assistant = [i for i, message in enumerate(part) if message["role"] == "assistant"]
        trained_regions = [
            region for i, region in zip(of_assistant, regions, strict=True) if i in trained
        ]
        spans = offsets_of(name, text)
        inside = [any(s <= start < e for s, e in trained_regions) for start, _ in spans]
        both = zip(encoded["assistant_masks"], inside, strict=True)
        mask = [bool(in_mask) and is_inside for in_mask, is_inside in both]
        assert mask == inside, "transformers' masks and its offsets agree"
        num_straddling = sum(
            start < begin < end for begin, _ in trained_regions for start, end in spans
        )
        documents.append((encoded["input_ids"], mask, num_straddling))
    return documents


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", WITH_TOKENIZER_JSON)
def test_supervised_tokens_are_those_in_generation_tags(name, conversation, tmp_path):
    """Pitfall rows 1, 2, 7 and 8."""
    messages = CONVERSATIONS[conversation]
    try:
        text = theirs(name).apply_chat_template(messages, tokenize=False)
    except Exception:  # a strict template
        assert load_conversation(tmp_path, messages, tokenizer(name)) is None
        return
    assert text == theirs(name).apply_chat_template(
        messages, tokenize=False, chat_template=template_with_tags(name)
    )
    expected = reference_documents(name, messages)
    for template in {theirs(name).chat_template, template_with_tags(name)}:
        documents = load_conversation(tmp_path, messages, tokenizer(name, template))
        assert (documents is None) == (not expected)
        if documents is None:
            continue
        assert ids_and_masks(documents) == [(ids, mask) for ids, mask, _ in expected]
        num_straddling = sum(straddling for _, _, straddling in expected)
        assert documents.counts.straddling == num_straddling


def supervised_texts(name: str, conversation: str) -> list[list[str]]:
    """Return the supervised stretches of each document of the reference."""
    shown = []
    for ids, mask, _ in reference_documents(name, CONVERSATIONS[conversation]):
        starts = [i for i in range(1, len(ids)) if mask[i] and not mask[i - 1]]
        stretches = []
        for start in starts:
            end = start
            while end < len(ids) and mask[end]:
                end += 1
            stretches.append(theirs(name).decode(ids[start:end]))
        shown.append(stretches)
    return shown


@pytest.mark.parametrize(
    "name, conversation, documents",
    [
        ("llama3", "middle not trained", [["one<|eot_id|>", "three<|eot_id|>"]]),
        ("llama31", "spaces at the end", [["one<|eot_id|>", "two<|eot_id|>", "three<|eot_id|>"]]),
        (
            "qwen",
            "spaces at the end",
            [["one <|im_end|>", "two\n\n<|im_end|>", "three \n<|im_end|>"]],
        ),
        ("qwen", "empty answer", [["<|im_end|>", "two<|im_end|>"]]),
        # the system prompt moves to the last question, so that each answer has its own document
        ("tekken", "system", [["one</s>"], ["two</s>"]]),
        ("tekken", "three answers", [["first</s>", "second\n\nline</s>", "third.</s>"]]),
        (
            "qwen3",
            "three answers",
            [
                ["<think>\n\n</think>\n\nfirst<|im_end|>"],
                ["<think>\n\n</think>\n\nsecond\n\nline<|im_end|>"],
                ["<think>\n\n</think>\n\nthird.<|im_end|>"],
            ],
        ),
        ("qwen3", "thoughts, last trained", [["<think>\nu\n</think>\n\ntwo<|im_end|>"]]),
        ("qwen3", "a column of thoughts", [["<think>\none, or\ntwo\n</think>\n\none<|im_end|>"]]),
    ],
)
def test_reference_supervises_what_a_reader_expects(name, conversation, documents):
    """The reference itself, in words, so that none of the comparisons above is empty."""
    assert supervised_texts(name, conversation) == documents


def test_reference_counts_straddling_tokens():
    documents = reference_documents("merging", CONVERSATIONS["spaces before"])
    assert sum(straddling for _, _, straddling in documents) == 2


@pytest.mark.parametrize("answer", ["<think>a</think>lost</think>b", "lost<think>a</think>b"])
def test_template_that_drops_words_of_an_answer_drops_the_row(answer, tmp_path):
    assert "lost" not in theirs("qwen3").apply_chat_template(chat("q", answer), tokenize=False)
    for messages in (chat("q", answer), chat("q", "one", "r", answer)):
        assert load_conversation(tmp_path, messages, tokenizer("qwen3")) is None
