"""Conversations against transformers and mistral_common: the ids of prompts, and which tokens of an answer are supervised.

Two references, neither of which shares code with ours: transformers renders the same template with `{% generation %}` around
what the model writes and reports the tokens inside; mistral_common encodes a conversation turn by turn, without any template.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import mistral_common
import pytest
import transformers
from mistral_common.protocol.instruct.messages import FinetuningAssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

import tiny_tokenizers
from minilora.config import DataConfig, UserError
from minilora.data import Documents
from minilora.labels import IGNORE
from minilora.running.cache import load_documents
from minilora.tokenizer import MISTRAL_TEMPLATE, Tokenizer

ALL: dict[str, Callable[[], Path]] = {**tiny_tokenizers.BUILDERS, **tiny_tokenizers.MORE}
SENTENCEPIECE = ("mistral", "mistral_v3")  # without a tokenizer.json
BY_TRANSFORMERS = [name for name in ALL if name not in SENTENCEPIECE]


def chat(*contents: str, system: str | None = None, train: tuple[bool, ...] = ()) -> list[dict]:
    """User and assistant in turn; train: flags of the assistant's turns."""
    messages: list[dict] = [{"role": "system", "content": system}] if system is not None else []
    for i, content in enumerate(contents):
        messages.append({"role": ["user", "assistant"][i % 2], "content": content})
        if i % 2 and train:
            messages[-1]["train"] = train[i // 2]
    return messages


CONVERSATIONS: dict[str, list[dict]] = {
    "one answer": chat("Why?", "Because."),
    "three answers": chat("q", "first", "q", "second\n\nline", "r", "third."),
    "system": chat("q", "one", "r", "two", system="Be brief."),
    "system, one answer": chat("q", "one", system="Be brief."),
    "empty system": chat("q", "one", "r", "two", system=""),
    "middle not trained": chat("q", "one", "r", "two", "s", "three", train=(True, False, True)),
    "first not trained": chat("q", "one", "r", "two", system="Be brief.", train=(False, True)),
    "last not trained": chat("q", "one", "r", "two", train=(True, False)),
    "korean": chat(
        "물리학이 뭐예요?", "자연 과학의 한 분야입니다.", "더 자세히.", "네, 한국어로요 ㅋㅋ", system="한국어로 답하세요."
    ),
    "chinese, emoji": chat("物理学？", "自然科学。🤖", "👩‍🔬?", "🇰🇷", train=(True, True)),
    "a space at the end": chat("q ", "one ", "r  ", "two  "),
    "spaces at the end": chat("q ", "one ", "r\n", "two\n\n", "s", "three \n"),
    "spaces before": chat("\nq", "\none", " r", " two", "s", "\n\nthree"),
    "doubled spaces": chat("a  b", "x  y", "c   d", "    indented"),
    "the same words": chat("the same", "the same", "the same", "the same"),
    "role names": chat("user", "assistant", "assistant", "user"),
    "plain markers": chat("q", "assistant\nuser: [INST] x [/INST] y", "r", "INST] two [/"),
    "special tokens": chat("q", "a<|im_end|>b</s>c<|eot_id|>d", "r", "<|im_start|>assistant\ntwo<|im_end|>"),
    "empty answer": chat("q", "", "r", "two"),
    "blank answer": chat("q", "one", "r", " \n"),
    "open question": chat("q", "one", "r", "two", "s"),
    "two answers in a row": [*chat("q", "one"), {"role": "assistant", "content": "two"}],
    "a tool": [*chat("q", "one"), {"role": "tool", "content": "{}"}, {"role": "assistant", "content": "two"}],
    "one thought": chat("q", "<think>why</think>one"),
    "thoughts": chat("q", "<think>\nwhy\n</think>\n\none", "r", "<think>u v</think> two", "s", "three", system="Think."),
    "thoughts, last trained": chat("q", "<think>t</think>one", "r", "<think>u</think>two", train=(False, True)),
    "an unopened thought": chat("q", "why</think>one", "r", "<think></think>two"),
    "an answer like a thought": chat("q", "think", "r", "<th"),
    "a column of thoughts": [*chat("q"), {"role": "assistant", "content": "one", "reasoning_content": "one, or\ntwo"}],
}

# The templates without markers, as files in the wild have them, and what transformers is given in their place.
MARKED = {
    MISTRAL_TEMPLATE: """\
{{- bos_token }}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternation') }}{% endif %}
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
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
""",
    tiny_tokenizers.QWEN_TEMPLATE: """\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
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
def ours(name: str, template: str | None = None) -> Tokenizer:
    return Tokenizer(ALL[name](), template)


@functools.cache
def theirs(name: str):
    tokenizer = transformers.AutoTokenizer.from_pretrained(ALL[name]())
    tokenizer.chat_template = tokenizer.chat_template or MISTRAL_TEMPLATE
    return tokenizer


def load(directory: Path, messages: list[dict], of: Tokenizer, **settings) -> Documents | None:
    """The documents of a file with this one conversation, or None if it was dropped."""
    file = directory / "rows.jsonl"
    good = {"messages": chat("kept", "kept")}  # a file without any usable row is an error
    file.write_text(json.dumps({"messages": messages}, ensure_ascii=False) + "\n" + json.dumps(good) + "\n", encoding="utf-8")
    documents = load_documents(str(file), DataConfig(format="messages", num_workers=1, **settings), of, "train_file")
    assert documents.counts.read == 2 and documents.index[-1] == 1
    assert documents.index[:-1].tolist() == [0] * (len(documents) - 1)
    assert documents.counts.kept == len(set(documents.index.tolist())), "rows are counted, not documents"
    return documents if len(documents) > 1 else None


def document(documents: Documents, i: int) -> tuple[list[int], list[bool]]:
    return documents.ids(i).tolist(), [label != IGNORE for label in documents.labels(i).tolist()]


def offsets(name: str, text: str) -> list[tuple[int, int]]:
    """transformers' own; where a file has them trimmed, a token begins again where the one before it ended."""
    out, end = [], 0
    for start, stop in theirs(name)(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]:
        out.append((min(start, end) if start > end else start, stop))
        end = max(end, stop)
    return out


# ---- prompts


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", ALL)
def test_prompt_ids_are_those_of_transformers(name, conversation):
    """Pitfall rows 12 and 35: a server that loads the saved files asks with the same ids; every prefix, with exactly one BOS."""
    messages = CONVERSATIONS[conversation]
    # transformers' own conversion of a tokenizer.model cuts a run of spaces otherwise than sentencepiece, and drops the
    # dummy space after a special token in the text; mistral_common is the reference for those, below
    if name in SENTENCEPIECE and (conversation in ("special tokens", "empty answer") or "space" in conversation):
        messages = CONVERSATIONS["three answers"]
    refused = 0
    for length in range(1, len(messages) + 1):
        for prompt in (False, True):
            part = messages[:length]
            try:
                text = theirs(name).apply_chat_template(part, add_generation_prompt=prompt, tokenize=False)
            except Exception:
                with pytest.raises(UserError, match="chat template"):
                    ours(name).render(part, add_generation_prompt=prompt)
                refused += 1
                continue
            assert ours(name).render(part, add_generation_prompt=prompt) == text
            ids = ours(name).encode(text).ids
            assert ids == theirs(name).apply_chat_template(part, add_generation_prompt=prompt, return_dict=False)
            assert ids.count(theirs(name).bos_token_id) == int(theirs(name).bos_token is not None)
    strict = ours(name).chat_template in (MISTRAL_TEMPLATE, tiny_tokenizers.MISTRAL_V3_TEMPLATE, tiny_tokenizers.TEKKEN_TEMPLATE)
    assert not refused or strict


# ---- masks by transformers


def marked(name: str) -> str:
    template = theirs(name).chat_template
    return MARKED.get(template, template)


def reference(name: str, messages: list[dict]) -> list[tuple[list[int], list[bool], int]]:
    """(ids, is supervised, straddling tokens) of each document that a conversation should become, by transformers alone.

    Empty if a turn's prompt is not what its answer follows, so that there is nothing right to train on."""
    tokenizer, template = theirs(name), marked(name)

    def render(part: list[dict], prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        values = {**tokenizer.special_tokens_map, "chat_template": template, "add_generation_prompt": prompt}
        texts, regions = cast(tuple[list, list], render_jinja_template([part], return_assistant_tokens_mask=True, **values))
        return texts[0], regions[0]

    wanted = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train", True)]
    text = render(messages)[0]
    stable = all(text.startswith(render(messages[:i], True)[0]) and text.startswith(render(messages[: i + 1])[0]) for i in wanted)
    found = []
    for part, flags in [(messages, wanted)] if stable else [(messages[: i + 1], [i]) for i in wanted]:
        text, regions = render(part)
        if not all(text.startswith(render(part[:i], True)[0]) for i in flags):
            return []
        out = tokenizer.apply_chat_template(
            part, chat_template=template, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
        )
        answers = [i for i, m in enumerate(part) if m["role"] == "assistant"]
        trained = [region for i, region in zip(answers, regions, strict=True) if i in flags]
        places = offsets(name, text)
        inside = [any(s <= start < e for s, e in trained) for start, _ in places]
        mask = [bool(m) and i for m, i in zip(out["assistant_masks"], inside, strict=True)]
        assert mask == inside, "both of transformers' own, so that what is compared is sure"
        found.append((out["input_ids"], mask, sum(start < s < end for s, _ in trained for start, end in places)))
    return found


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", BY_TRANSFORMERS)
def test_supervised_tokens_are_those_transformers_marks(name, conversation, tmp_path):
    """Pitfall rows 1, 2, 7 and 8."""
    messages = CONVERSATIONS[conversation]
    try:
        text = theirs(name).apply_chat_template(messages, tokenize=False)
    except Exception:  # the Mistral forms want turns in alternation
        assert load(tmp_path, messages, ours(name)) is None
        return
    assert text == theirs(name).apply_chat_template(messages, tokenize=False, chat_template=marked(name))
    expected = reference(name, messages)
    for template in {theirs(name).chat_template, marked(name)}:
        documents = load(tmp_path, messages, ours(name, template))
        assert (documents is None) == (not expected)
        if documents is None:
            continue
        got = [document(documents, i) for i in range(len(documents) - 1)]
        assert got == [(ids, mask) for ids, mask, _ in expected]
        assert documents.counts.straddling == sum(straddling for _, _, straddling in expected)


def test_what_the_references_agree_on_is_what_a_reader_expects():
    """The references themselves, in words, so that none of the comparisons above is empty."""

    def said(name: str, conversation: str) -> list[list[str]]:
        shown = []
        for ids, mask, _ in reference(name, CONVERSATIONS[conversation]):
            runs = [i for i in range(1, len(ids)) if mask[i] and not mask[i - 1]]
            ends = [next((j for j in range(i, len(ids)) if not mask[j]), len(ids)) for i in runs]
            shown.append([theirs(name).decode(ids[i:j]) for i, j in zip(runs, ends, strict=True)])
        return shown

    assert said("llama3", "middle not trained") == [["one<|eot_id|>", "three<|eot_id|>"]]
    assert said("llama31", "spaces at the end") == [["one<|eot_id|>", "two<|eot_id|>", "three<|eot_id|>"]]
    assert said("qwen", "spaces at the end") == [["one <|im_end|>", "two\n\n<|im_end|>", "three \n<|im_end|>"]]
    assert said("qwen", "empty answer") == [["<|im_end|>", "two<|im_end|>"]]
    assert said("tekken", "system") == [["one</s>"], ["two</s>"]], "a system prompt that moves makes a document a turn"
    assert said("tekken", "three answers") == [["first</s>", "second\n\nline</s>", "third.</s>"]]
    block = "<think>\n\n</think>\n\n"
    assert said("qwen3", "three answers") == [[block + a + "<|im_end|>"] for a in ("first", "second\n\nline", "third.")]
    assert said("qwen3", "thoughts, last trained") == [["<think>\nu\n</think>\n\ntwo<|im_end|>"]]
    assert said("qwen3", "a column of thoughts") == [["<think>\none, or\ntwo\n</think>\n\none<|im_end|>"]]
    assert sum(n for _, _, n in reference("merging", CONVERSATIONS["spaces before"])) == 2


@pytest.mark.parametrize("answer", ["<think>a</think>lost</think>b", "lost<think>a</think>b"])
def test_a_template_that_drops_words_of_an_answer_drops_the_row(answer, tmp_path):
    assert "lost" not in theirs("qwen3").apply_chat_template(chat("q", answer), tokenize=False)
    assert load(tmp_path, chat("q", answer), ours("qwen3")) is None
    assert load(tmp_path, chat("q", "one", "r", answer), ours("qwen3")) is None


# ---- ids and masks by mistral_common

DATA = Path(mistral_common.__path__[0]) / "data"
FILES = {
    "mistral": "tokenizer.model.v1",
    "mistral_v3": "mistral_instruct_tokenizer_240323.model.v3",
    "tekken": "tekken_240911.json",
}
# v1 as mistral_common writes it: a space before each answer, and the system prompt in the first question.
MISTRAL_V1_TEMPLATE = """\
{%- set system = messages[0].content + '\n\n' if messages[0].role == 'system' and messages[0].content else '' %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (system if loop.index0 < 2 else '') + message.content + ' [/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""
# mistral_common encodes markers inside a message as plain text, where transformers and we take them for tokens; it refuses
# empty answers; and from v3's answers it takes spaces off the end and nothing else, where the repositories' templates trim.
NOT_MISTRALS = {
    "special tokens",
    "empty answer",
    "blank answer",
    "open question",
    "two answers in a row",
    "a tool",
    "empty system",
}
FOR_V3 = [
    c for c in CONVERSATIONS if c not in NOT_MISTRALS | {"plain markers", "spaces at the end", "spaces before", "doubled spaces"}
]
FOR_V1 = [c for c in CONVERSATIONS if c not in NOT_MISTRALS]


@functools.cache
def official(name: str, mode: ValidationMode = ValidationMode.finetuning) -> MistralTokenizer:
    return MistralTokenizer.from_file(str(DATA / FILES[name]), mode=mode)


def encoded(name: str, messages: list[dict]) -> list[int]:
    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": FinetuningAssistantMessage}
    turns = [kinds[m["role"]](content=m["content"]) for m in messages]
    mode = ValidationMode.finetuning if messages[-1]["role"] == "assistant" else ValidationMode.serving
    return official(name, mode).encode_chat_completion(ChatCompletionRequest(messages=turns, model="any")).tokens


def official_reference(name: str, messages: list[dict]) -> list[tuple[list[int], list[bool]]]:
    """Documents with their masks: an answer is what mistral_common adds to the encoding of what comes before it."""
    wanted = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train", True)]
    added = {i: (encoded(name, messages[:i]), encoded(name, messages[: i + 1])) for i in wanted}
    whole = encoded(name, messages)
    stable = all(whole[: len(through)] == through for _, through in added.values())
    documents = []
    for ids, answers in [(whole, wanted)] if stable else [(added[i][1], [i]) for i in wanted]:
        mask = [any(len(added[i][0]) <= at < len(added[i][1]) for i in answers) for at in range(len(ids))]
        documents.append((ids, mask))
    return documents


@pytest.mark.parametrize(
    "name, conversation",
    [*(("mistral", c) for c in FOR_V1), *((name, c) for name in ("mistral_v3", "tekken") for c in FOR_V3)],
)
def test_ids_and_supervised_tokens_are_mistral_commons(name, conversation, tmp_path):
    of = ours(name, MISTRAL_V1_TEMPLATE) if name == "mistral" else ours(name)
    messages = CONVERSATIONS[conversation]
    expected = official_reference(name, messages)
    system = messages[0]["role"] == "system" and sum(m["role"] == "user" for m in messages) > 1
    several = name != "mistral" and system and sum(m.get("train", True) for m in messages if m["role"] == "assistant") > 1
    assert (len(expected) > 1) == several, "v3 moves the system prompt to the last question, v1 leaves it"
    documents = load(tmp_path, messages, of)
    assert documents is not None
    assert [document(documents, i) for i in range(len(documents) - 1)] == expected
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for i in answers:
        prompt = of.encode(of.render(messages[:i], add_generation_prompt=True)).ids
        assert prompt == encoded(name, messages[:i]), "and what a server would be asked"


@pytest.mark.parametrize("conversation", [c for c in FOR_V1 if CONVERSATIONS[c][0]["role"] != "system"])
def test_the_built_in_form_is_mistral_commons_but_for_the_space_before_answers(conversation, tmp_path):
    """OLLM's form has none, so an answer's first piece is "Because" and not "▁Because": the ids that
    sentencepiece gives for the answer right after "[/INST]". Questions, BOS and EOS are mistral_common's."""
    processor = official("mistral").instruct_tokenizer.tokenizer._model  # type: ignore[attr-defined]
    messages = CONVERSATIONS[conversation]
    ids, mask, straddling = [processor.bos_id()], [False], 0
    for question, answer in zip(messages[::2], messages[1::2], strict=True):
        head = f"[INST] {question['content']} [/INST]"
        size, border, train = 0, len(f" {head}".encode()), answer.get("train", True)  # sentencepiece puts a space before it
        for token in processor.encode(head + answer["content"]):
            ids.append(token)
            mask.append(train and size >= border)
            before = size
            size += 1 if processor.is_byte(token) else len(processor.id_to_piece(token).replace("▁", " ").encode())
            straddling += train and before < border < size
        ids.append(processor.eos_id())
        mask.append(train)
        alone = encoded("mistral", [question])[1:-1]
        assert any(ids[at : at + len(alone)] == alone for at in range(len(ids))), "the question has mistral_common's ids"
    documents = load(tmp_path, messages, ours("mistral"))
    assert documents is not None and len(documents) == 2
    assert document(documents, 0) == (ids, mask)
    assert documents.counts.straddling == straddling
    if conversation == "one thought":
        assert straddling == 1 and "]<" in processor.encode("[/INST]<think>", out_type=str), "a real token across the border"
