"""Tokenizer against transformers and sentencepiece: ids, spans, BOS, decoding, broken files."""

import functools
import random
import shutil
import unicodedata

import pytest
import sentencepiece
import transformers

from helpers import tiny_tokenizers
from minilora.checkpoint.tokenizer_writer import plan_export, save_tokenizer
from minilora.config import DataConfig
from minilora.data.chat_template import MISTRAL_TEMPLATE
from minilora.data.tokenizer import Tokenizer
from minilora.errors import UserError

EVERY = pytest.mark.parametrize("name", tiny_tokenizers.BUILDERS)
WITH_TOKENIZER_JSON = [name for name in tiny_tokenizers.BUILDERS if name != "mistral"]

PARTS = [
    "The quick fox", "a", "Zoë's naïve café", "Dvořák", "x -> y", "1984", "3.14159", " ", "  ",
    "   ", "\n", "\n\n", "\t", "\r\n", ".", ", ", ")\n", "–—-'’\"", "日本語", "物理学", "科学史",
    "한국어", "물리학", "서울의 봄", "🤖", "👩‍🔬", "🇰🇷", "𐌰𐌱", "ꙮ", "ሀሁ", "\x00", "\x01", "\x7f",
    "\u200b", "\xa0", "\u3000", "\u2028", "ﬁ", "Å", "{}", "[INST]", "<0x41>", "</", "|>",
]  # fmt: skip
CONVERSATIONS = {
    "one turn": [
        {"role": "user", "content": "Title: T\nAn abstract."},
        {"role": "assistant", "content": "a -> b\nc -> d\n"},
    ],
    "three turns": [
        {"role": "user", "content": "안녕하세요, 물리학이 뭐예요?"},
        {"role": "assistant", "content": "자연 과학의 한 분야입니다."},
        {"role": "user", "content": "In 中文, please."},
        {"role": "assistant", "content": "物理学是自然科学。 🤖"},
        {"role": "user", "content": "spaces after \n"},
    ],
    "question": [{"role": "user", "content": "Why?"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
}


@functools.cache
def ours(name: str) -> Tokenizer:
    return Tokenizer(tiny_tokenizers.BUILDERS[name]())


@functools.cache
def theirs(name: str):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_tokenizers.BUILDERS[name]())
    tokenizer.chat_template = tokenizer.chat_template or MISTRAL_TEMPLATE
    return tokenizer


@functools.cache
def mistral_processor() -> sentencepiece.SentencePieceProcessor:
    """Return sentencepiece's own reader of the file that `tiny_tokenizers.mistral` holds."""
    file = tiny_tokenizers.mistral() / "tokenizer.model"
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


@functools.cache
def texts(leading_space: bool = False) -> list[str]:
    """Return random strings of everything that is hard.

    They are in NFC, so that a tokenizer that normalizes to it changes nothing.
    """
    rng = random.Random(1)
    drawn = ["".join(rng.choices(PARTS, k=rng.randint(1, 8))) for _ in range(600)]
    drawn = [unicodedata.normalize("NFC", text) for text in drawn]
    return [text for text in drawn if text.startswith(" ") == leading_space]


def ids_without_bos(tokenizer: Tokenizer, text: str) -> list[int]:
    ids = tokenizer.encode(text).ids
    return ids[1:] if tokenizer.adds_bos else ids


def covered(text: str, spans: list[tuple[int, int]]) -> str:
    """Return the text that the spans cover, asserting that they are in order and without gaps.

    Neighbours may share one character: a dummy space's, or one whose bytes they divide.
    """
    at, before = 0, (0, 0)
    for start, end in spans:
        where = f"{text!r}: {before}, then {(start, end)}"
        assert 0 <= start <= end <= len(text)
        assert start >= before[0], where
        assert end >= before[1], where
        assert at - 1 <= start <= at, where
        if start < at:
            is_divided = len(text[start].encode()) > 1 or before[0] == start
            assert is_divided, f"{text!r}: {text[start]!r} belongs to two tokens"
        at, before = end, (start, end)
    return text[:at]


# ---- ids


@pytest.mark.parametrize("name", WITH_TOKENIZER_JSON)
def test_ids_are_those_of_transformers(name):
    eos = ours(name).eos_token
    for text in [*texts(), *texts(leading_space=True), f"a{eos}b {eos} c", eos]:
        expected = theirs(name)(text, add_special_tokens=False)["input_ids"]
        assert ids_without_bos(ours(name), text) == expected, repr(text)


@pytest.mark.parametrize("leading_space", [False, True])
def test_ids_of_mistral_are_those_of_sentencepiece(leading_space):
    processor = mistral_processor()
    assert len(texts(leading_space)) > 20
    for text in texts(leading_space):
        expected = [processor.bos_id(), *processor.encode(text)]
        assert ours("mistral").encode(text).ids == expected, repr(text)


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_around_special_tokens_of_mistral_are_those_of_transformers(tmp_path, legacy):
    directory = tiny_tokenizers.copy(tiny_tokenizers.mistral(), tmp_path / "t", legacy=legacy)
    tokenizer = Tokenizer(directory)
    reference = transformers.AutoTokenizer.from_pretrained(directory)
    written = [
        "<s>[INST] a [/INST]b -> c\n</s>",
        "<s>a</s>b</s>\n</s>日本",
        "</s>",
        "a</s></s>é",
        "<s>1\n2</s>\t3",
    ]
    if not legacy:  # with legacy, transformers 5 and sentencepiece disagree on the space of " b"
        written.append("a</s> b")
    for text in written:
        ids = tokenizer.encode(text).ids
        assert ids[0] == tokenizer.bos_id
        if not text.startswith("<s>"):
            ids = ids[1:]
        assert ids == reference(text, add_special_tokens=False)["input_ids"], repr(text)


def test_ids_of_the_end_of_an_instruction_are_mistrals():
    end = [733, 28748, 16289, 28793]
    assert ours("mistral").encode("[INST] x [/INST]").ids[-4:] == end
    assert ours("mistral").encode("<s>[INST] x [/INST]y").ids[-5:-1] == end


# ---- spans


@EVERY
def test_spans_cover_the_text_without_gaps(name):
    """A character is shared only by tokens that hold some of its bytes each."""
    tokenizer = ours(name)
    with_specials = f"a{tokenizer.eos_token}é {tokenizer.eos_token}"
    for text in [*texts(), *texts(leading_space=True), with_specials]:
        ids, spans = tokenizer.encode(text)
        assert len(ids) == len(spans)
        assert covered(text, spans) == text


def test_spans_of_mistral_hold_the_text_of_their_pieces():
    """Pitfall row 38: spans count characters and not bytes."""
    tokenizer, processor = ours("mistral"), mistral_processor()
    for text in texts():
        ids, spans = tokenizer.encode(text)
        distinct = [span for i, span in enumerate(spans) if span not in spans[:i]]
        assert "".join(text[start:end] for start, end in distinct) == text
        for i, (start, end) in zip(ids[1:], spans[1:], strict=True):
            if processor.is_byte(i):
                assert end - start == 1
                continue
            piece = processor.id_to_piece(i).replace("▁", " ")
            without_dummy_space = piece[1:] if start == 0 else piece
            assert text[start:end] in (piece, without_dummy_space), repr(text)


@EVERY
def test_span_of_a_character_is_that_of_all_its_bytes(name):
    spans = ours(name).encode("é𐌰é").spans
    assert spans.count((1, 2)) == len("𐌰".encode()) == 4
    assert spans[-1][1] == 3


# ---- BOS


@pytest.mark.parametrize("name", ["mistral", "llama2", "metaspace", "llama3"])
def test_bos_is_there_once(name):
    tokenizer = ours(name)
    bos = tokenizer.bos_token
    for text in ["", "a", "é -> b\n"]:
        for written in (text, bos + text):
            ids, spans = tokenizer.encode(written)
            assert ids[0] == tokenizer.bos_id
            assert ids.count(tokenizer.bos_id) == 1
            assert spans[0] == (0, len(written) - len(text)), "the added BOS is not in the text"
        if name != "metaspace":  # which has a dummy space only where the string begins
            assert tokenizer.encode(text).ids == tokenizer.encode(bos + text).ids


def test_bos_is_not_added_where_the_model_has_none():
    assert ours("qwen").bos_id is None
    assert not ours("qwen").adds_bos
    assert ours("qwen").encode("a").ids == theirs("qwen")("a")["input_ids"]
    assert ours("qwen").encode("").ids == []


def test_bos_is_not_added_with_add_bos_token_false(tmp_path):
    source = tiny_tokenizers.mistral()
    tokenizer = Tokenizer(tiny_tokenizers.copy(source, tmp_path / "t", add_bos_token=False))
    assert tokenizer.encode("a").ids == ours("mistral").encode("a").ids[1:]


# ---- decoding


@EVERY
@pytest.mark.parametrize("leading_space", [False, True])
def test_decode_gives_the_text_back(name, leading_space):
    for text in texts(leading_space):
        expected = text
        if name == "metaspace" and leading_space:  # takes the text's own space for the dummy one
            expected = text[1:]
        assert ours(name).decode(ours(name).encode(text).ids) == expected


@EVERY
def test_decode_shows_special_tokens_on_request(name):
    tokenizer = ours(name)
    ids = tokenizer.encode("a" + tokenizer.eos_token).ids
    assert tokenizer.decode(ids) == "a"
    shown = tokenizer.decode(ids, skip_special_tokens=False)
    # Llama 2's decoder puts a space after <s>, as transformers' does
    expected = (tokenizer.bos_token or "") + "a" + tokenizer.eos_token
    assert shown.replace(" ", "") == expected


@EVERY
@pytest.mark.parametrize(
    "prompt", ["Physics", "x [/INST]", "science -> art", "🤖", "한", "ends with a space "]
)
@pytest.mark.parametrize("continuation", [" -> museums", "museums", "\nart\n", " 물리학 🤖"])
def test_decode_after_keeps_the_first_space(name, prompt, continuation):
    tokenizer = ours(name)
    text = prompt + continuation
    ids, spans = tokenizer.encode(text)
    prompt_ids = tokenizer.encode(prompt).ids
    if ids[: len(prompt_ids)] != prompt_ids:  # a token straddles the border: cut before it
        cut = sum(end <= len(prompt) for _, end in spans)
        prompt_ids = ids[:cut]
        continuation = text[spans[cut][0] :]
    assert tokenizer.decode_after(prompt_ids, ids[len(prompt_ids) :]) == continuation


@pytest.mark.parametrize("name", ["mistral", "metaspace"])
def test_decode_keeps_spaces_after_special_tokens_without_legacy(name, tmp_path):
    """There only the first stretch has a dummy space: one after a special token is the text's."""
    source = tiny_tokenizers.BUILDERS[name]()
    tokenizer = Tokenizer(tiny_tokenizers.copy(source, tmp_path / "t", legacy=False))
    for text in ["<s>a</s> b</s>c", "<s>x</s> 日本</s>\n</s>  y"]:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    prompt, both = tokenizer.encode("<s>a</s>").ids, tokenizer.encode("<s>a</s> b").ids
    assert tokenizer.decode_after(prompt, both[len(prompt) :]) == " b"


# ---- conversations


@EVERY
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_conversation_and_its_ids_are_those_of_transformers(
    name, conversation, add_generation_prompt
):
    messages = CONVERSATIONS[conversation]
    if conversation == "system" and ours(name).chat_template == MISTRAL_TEMPLATE:
        with pytest.raises(UserError, match="alternation"):
            ours(name).render(messages, add_generation_prompt)
        return
    reference = functools.partial(
        theirs(name).apply_chat_template, messages, add_generation_prompt=add_generation_prompt
    )
    rendered = ours(name).render(messages, add_generation_prompt)
    assert rendered == reference(tokenize=False)
    ids, spans = ours(name).encode(rendered)
    assert ids == reference(tokenize=True, return_dict=False)
    assert ids.count(ours(name).bos_id) == int(ours(name).adds_bos)
    assert covered(rendered, spans) == rendered


def test_built_in_form_is_mistrals():
    turns = [("user", "q"), ("assistant", "a"), ("user", "r")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert ours("mistral").render(messages) == "<s>[INST] q [/INST]a</s>[INST] r [/INST]"


# ---- files


def test_remote_code_is_refused(tmp_path):
    auto_map = {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]}
    directory = tiny_tokenizers.copy(tiny_tokenizers.llama3(), tmp_path / "t", auto_map=auto_map)
    with pytest.raises(UserError, match="auto_map"):
        Tokenizer(directory)


def test_directory_without_a_tokenizer_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match="neither tokenizer"):
        Tokenizer(tmp_path)
    with pytest.raises(UserError, match="absent"):
        Tokenizer(tmp_path / "absent")


@pytest.mark.parametrize(
    "source, file, content",
    [
        ("llama3", "tokenizer.json", b'{"version": "1.0", '),
        ("llama3", "tokenizer.json", b"{}"),
        ("llama3", "tokenizer.json", b""),
        ("llama3", "tokenizer_config.json", b"not JSON"),
        ("llama3", "tokenizer_config.json", b"\xff\xfe"),
        ("llama3", "tokenizer_config.json", b"[]"),
        ("llama3", "special_tokens_map.json", b"{"),
        ("llama3", "chat_template.jinja", b"{% for m in messages %}"),
        ("llama3", "chat_template.jinja", b"\xff\xfe{{ 1 }}"),
        ("mistral", "tokenizer.model", b"not a protobuf"),
        ("mistral", "tokenizer.model", b""),
    ],
)
def test_broken_file_is_named(tmp_path, source, file, content):
    directory = tiny_tokenizers.copy(tiny_tokenizers.BUILDERS[source](), tmp_path / "t")
    (directory / file).write_bytes(content)
    with pytest.raises(UserError, match="chat.template" if "jinja" in file else file):
        Tokenizer(directory)


def test_special_token_outside_the_vocabulary_is_named(tmp_path):
    directory = tiny_tokenizers.copy(tiny_tokenizers.llama3(), tmp_path / "t", eos_token="<|end|>")
    with pytest.raises(UserError, match=r"eos_token.*<\|end\|>"):
        Tokenizer(directory)


@EVERY
def test_saved_files_give_the_same_tokenizer(name, tmp_path):
    save_tokenizer(ours(name), tmp_path, plan_export(ours(name), DataConfig()))
    reloaded = Tokenizer(tmp_path)
    assert reloaded.chat_template == ours(name).chat_template
    rendered = ours(name).render(CONVERSATIONS["three turns"], add_generation_prompt=True)
    assert reloaded.render(CONVERSATIONS["three turns"], add_generation_prompt=True) == rendered
    assert reloaded.encode(rendered) == ours(name).encode(rendered)


def test_saved_files_hold_a_replaced_template(tmp_path):
    """Pitfall row 35: a server reads the directory, and must render the prompts of training."""
    template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    replaced = Tokenizer(tiny_tokenizers.llama3(), template)
    save_tokenizer(replaced, tmp_path, plan_export(replaced, DataConfig()))
    messages = CONVERSATIONS["three turns"]
    tokenizer, server = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == template
    ids = tokenizer.encode(tokenizer.render(messages)).ids
    assert ids == server.apply_chat_template(messages, return_dict=False)


def test_tokenizer_json_is_used_where_both_files_are_there(tmp_path):
    """As in transformers. Its ids are another model's here, so that the choice shows."""
    directory = tiny_tokenizers.copy(tiny_tokenizers.llama2(), tmp_path / "t")
    shutil.copyfile(tiny_tokenizers.mistral() / "tokenizer.model", directory / "tokenizer.model")
    ids = Tokenizer(directory).encode("Physics").ids
    assert ids == ours("llama2").encode("Physics").ids
    assert ids != ours("mistral").encode("Physics").ids


# ---- tokens added to the vocabulary (pitfall row 34)


@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_of_mistral_survive_saving(tmp_path, special):
    added = {
        "32000": {"content": "<edge>", "special": special},
        "32001": {"content": "[NODE]", "special": special},
    }
    source = tiny_tokenizers.mistral()
    tokenizer = Tokenizer(tiny_tokenizers.copy(source, tmp_path / "t", added_tokens_decoder=added))
    text = "a<edge>b [NODE]日本"
    ids, spans = tokenizer.encode(text)
    assert ids.count(32000) == ids.count(32001) == 1
    assert text[slice(*spans[ids.index(32000)])] == "<edge>"
    assert text[slice(*spans[ids.index(32001)])] == "[NODE]"
    assert tokenizer.vocab_size > max(ids)

    save_tokenizer(tokenizer, tmp_path, plan_export(tokenizer, DataConfig()))
    assert Tokenizer(tmp_path).encode(text) == (ids, spans)
    shown = tokenizer.decode(ids, skip_special_tokens=not special)
    assert "<edge>" in shown and "[NODE]" in shown, "only special tokens may be left out"
    assert ("<edge>" in tokenizer.decode(ids)) == (not special)


def test_longest_added_token_is_found(tmp_path):
    """As in transformers, whatever their order."""
    added = {
        "32000": {"content": "<a>"},
        "32001": {"content": "<a><b>"},
        "32002": {"content": "<b>"},
    }
    source = tiny_tokenizers.mistral()
    directory = tiny_tokenizers.copy(source, tmp_path / "t", added_tokens_decoder=added)
    assert Tokenizer(directory).encode("<a><b><b><a>").ids[1:] == [32001, 32002, 32000]


def test_added_tokens_of_transformers_are_read(tmp_path):
    reference = transformers.AutoTokenizer.from_pretrained(tiny_tokenizers.llama3())
    reference.add_tokens(["<edge>"])
    reference.save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode("a<edge>b").ids
    assert ids[1:] == reference("a<edge>b", add_special_tokens=False)["input_ids"]
    assert tokenizer.vocab_size == len(reference) == ours("llama3").vocab_size + 1
    assert tokenizer.decode(ids) == "a<edge>b"
