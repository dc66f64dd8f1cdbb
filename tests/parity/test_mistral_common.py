"""Conversations against mistral_common: ids, and which tokens are supervised.

mistral_common encodes a conversation turn by turn, without any chat template.
"""

import functools
from pathlib import Path

import mistral_common
import pytest
from mistral_common.protocol.instruct.messages import (
    FinetuningAssistantMessage,
    SystemMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from helpers.conversations import (
    CONVERSATIONS,
    ids_and_masks,
    load_conversation,
    tokenizer,
    trained_answers,
)

DATA = Path(mistral_common.__path__[0]) / "data"
FILES = {
    "mistral": "tokenizer.model.v1",
    "mistral_v3": "mistral_instruct_tokenizer_240323.model.v3",
    "tekken": "tekken_240911.json",
}
# v1 as mistral_common writes it: a space before each answer, and the system prompt in the first
# question
MISTRAL_V1_TEMPLATE = """\
{%- set first = messages[0] %}
{%- set system = first.content + '\n\n' if first.role == 'system' and first.content else '' %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (system if loop.index0 < 2 else '') + message.content + ' [/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""
# mistral_common encodes markers inside a message as plain text, where transformers and minilora
# take them for tokens, and it refuses empty answers
REFUSED_OR_OTHER = {
    "special tokens",
    "empty answer",
    "blank answer",
    "open question",
    "two answers in a row",
    "a tool",
    "empty system",
}
# from v3's answers it takes spaces off the end and nothing else; the repositories' templates trim
OTHER_IN_V3 = {"plain markers", "spaces at the end", "spaces before", "doubled spaces"}
FOR_V1 = [name for name in CONVERSATIONS if name not in REFUSED_OR_OTHER]
FOR_V3 = [name for name in FOR_V1 if name not in OTHER_IN_V3]


@functools.cache
def official(name: str, mode: ValidationMode = ValidationMode.finetuning) -> MistralTokenizer:
    return MistralTokenizer.from_file(str(DATA / FILES[name]), mode=mode)


def official_ids(name: str, messages: list[dict]) -> list[int]:
    """Return mistral_common's ids of a conversation."""
    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": FinetuningAssistantMessage}
    turns = [kinds[message["role"]](content=message["content"]) for message in messages]
    is_question = messages[-1]["role"] != "assistant"
    mode = ValidationMode.serving if is_question else ValidationMode.finetuning
    request = ChatCompletionRequest(messages=turns, model="any")
    return official(name, mode).encode_chat_completion(request).tokens


def reference_documents(name: str, messages: list[dict]) -> list[tuple[list[int], list[bool]]]:
    """Return (ids, is supervised) of each document that a conversation should become.

    An answer is what mistral_common adds to the encoding of what comes before it.
    """
    answers = trained_answers(messages)
    before = {i: official_ids(name, messages[:i]) for i in answers}
    through = {i: official_ids(name, messages[: i + 1]) for i in answers}
    whole = official_ids(name, messages)
    is_stable = all(whole[: len(ids)] == ids for ids in through.values())
    parts = [(through[i], [i]) for i in answers]
    if is_stable:
        parts = [(whole, answers)]

    documents = []
    for ids, trained in parts:
        mask = [False] * len(ids)
        for i in trained:
            for at in range(len(before[i]), len(through[i])):
                mask[at] = True
        documents.append((ids, mask))
    return documents


@pytest.mark.parametrize(
    "name, conversation",
    [
        *(("mistral", conversation) for conversation in FOR_V1),
        *(("mistral_v3", conversation) for conversation in FOR_V3),
        *(("tekken", conversation) for conversation in FOR_V3),
    ],
)
def test_ids_and_supervised_tokens_are_those_of_mistral_common(name, conversation, tmp_path):
    is_v1 = name == "mistral"
    of = tokenizer(name, MISTRAL_V1_TEMPLATE if is_v1 else None)
    messages = CONVERSATIONS[conversation]
    expected = reference_documents(name, messages)

    num_questions = sum(message["role"] == "user" for message in messages)
    has_moving_system = messages[0]["role"] == "system" and num_questions > 1
    becomes_several = not is_v1 and has_moving_system and len(trained_answers(messages)) > 1
    message = "v3 moves the system prompt to the last question, v1 leaves it"
    assert (len(expected) > 1) == becomes_several, message

    documents = load_conversation(tmp_path, messages, of)
    assert documents is not None
    assert ids_and_masks(documents) == expected
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in answers:
        prompt = of.encode(of.render(messages[:i], add_generation_prompt=True)).ids
        assert prompt == official_ids(name, messages[:i]), "what a server would be asked"


@pytest.mark.parametrize(
    "conversation", [c for c in FOR_V1 if CONVERSATIONS[c][0]["role"] != "system"]
)
def test_built_in_form_differs_by_the_space_before_answers(conversation, tmp_path):
    """Questions, BOS and EOS have mistral_common's ids.

    OLLM's form has no space before an answer. The answer's ids are those that sentencepiece gives
    right after "[/INST]": its first piece is "Because" and not "▁Because".
    """
    processor = official("mistral").instruct_tokenizer.tokenizer._model  # type: ignore[attr-defined]
    messages = CONVERSATIONS[conversation]
    ids, mask, num_straddling = [processor.bos_id()], [False], 0
    for question, answer in zip(messages[::2], messages[1::2], strict=True):
        head = f"[INST] {question['content']} [/INST]"
        border = len(f" {head}".encode())  # in bytes, with the space that sentencepiece adds
        is_trained = answer.get("train", True)
        size = 0  # in bytes, of the tokens so far
        for token in processor.encode(head + answer["content"]):
            ids.append(token)
            mask.append(is_trained and size >= border)
            before = size
            if processor.is_byte(token):
                size += 1
            else:
                size += len(processor.id_to_piece(token).replace("▁", " ").encode())
            num_straddling += is_trained and before < border < size
        ids.append(processor.eos_id())
        mask.append(is_trained)

        alone = official_ids("mistral", [question])[1:-1]
        places = [at for at in range(len(ids)) if ids[at : at + len(alone)] == alone]
        assert places, "the question has mistral_common's ids"

    documents = load_conversation(tmp_path, messages, tokenizer("mistral"))
    assert documents is not None
    assert ids_and_masks(documents) == [(ids, mask)]
    assert documents.counts.straddling == num_straddling
    if conversation == "one thought":
        assert num_straddling == 1, "a real token across the border"
        assert "]<" in processor.encode("[/INST]<think>", out_type=str)
