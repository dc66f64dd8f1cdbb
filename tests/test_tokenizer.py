"""Tokenizer against transformers and sentencepiece themselves: ids, spans, BOS, decoding, chat templates, broken files."""

import functools
import json
import random
import shutil
import unicodedata
from datetime import datetime

import pytest
import sentencepiece
import transformers

import tiny_tokenizers
from minilora.config import UserError
from minilora.running.saving import save_tokenizer
from minilora.tokenizer import MISTRAL_TEMPLATE, Tokenizer

EVERY = pytest.mark.parametrize("name", tiny_tokenizers.BUILDERS)
FAST = [name for name in tiny_tokenizers.BUILDERS if name != "mistral"]

PARTS = [
    "The quick fox", "a", "Zoë's naïve café", "Dvořák", "x -> y", "1984", "3.14159", " ", "  ",
    "   ", "\n", "\n\n", "\t", "\r\n", ".", ", ", ")\n", "–—-'’\"", "日本語", "物理学", "科学史", "한국어",
    "물리학", "서울의 봄", "🤖", "👩‍🔬", "🇰🇷", "𐌰𐌱", "ꙮ", "ሀሁ", "\x00", "\x01", "\x7f", "\u200b", "\xa0",
    "\u3000", "\u2028", "ﬁ", "Å", "{}", "[INST]", "<0x41>", "</", "|>",
]  # fmt: skip
CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "Title: T\nAn abstract."}, {"role": "assistant", "content": "a -> b\nc -> d\n"}],
    "three turns": [
        {"role": "user", "content": "안녕하세요, 물리학이 뭐예요?"},
        {"role": "assistant", "content": "자연 과학의 한 분야입니다."},
        {"role": "user", "content": "In 中文, please."},
        {"role": "assistant", "content": "物理学是自然科学。 🤖"},
        {"role": "user", "content": "spaces after \n"},
    ],
    "question": [{"role": "user", "content": "Why?"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
}  # fmt: skip


@functools.cache
def ours(name: str) -> Tokenizer:
    return Tokenizer(tiny_tokenizers.BUILDERS[name]())


@functools.cache
def theirs(name: str):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_tokenizers.BUILDERS[name]())
    tokenizer.chat_template = tokenizer.chat_template or MISTRAL_TEMPLATE
    return tokenizer


@functools.cache
def texts(leading_space: bool = False) -> list[str]:
    """Random strings of everything that is hard; in NFC, so that a tokenizer that normalises to it changes nothing."""
    rng = random.Random(1)
    drawn = ["".join(rng.choices(PARTS, k=rng.randint(1, 8))) for _ in range(600)]
    drawn = [unicodedata.normalize("NFC", text) for text in drawn]
    return [text for text in drawn if text.startswith(" ") == leading_space]


def without_bos(tokenizer: Tokenizer, text: str) -> list[int]:
    ids = tokenizer.encode(text).ids
    return ids[1:] if tokenizer.adds_bos else ids


def covered(text: str, spans: list[tuple[int, int]]) -> str:
    """The text that the spans cover, once they are held to be monotone, without gaps and within the text.

    Neighbours may share one character: a dummy space's, or one whose bytes they divide among them.
    """
    at, before = 0, (0, 0)
    for start, end in spans:
        assert 0 <= start <= end <= len(text)
        assert start >= before[0] and end >= before[1], f"{text!r}: {before}, then {(start, end)}"
        assert at - 1 <= start <= at, f"{text!r}: {before}, then {(start, end)}"
        if start < at:
            assert len(text[start].encode()) > 1 or before[0] == start, f"{text!r}: {text[start]!r} belongs to two tokens"
        at, before = end, (start, end)
    return text[:at]


# ---- ids


@pytest.mark.parametrize("name", FAST)
def test_ids_are_those_of_transformers(name):
    special = ours(name).eos_token
    for text in [*texts(), *texts(leading_space=True), f"a{special}b {special} c", special]:
        assert without_bos(ours(name), text) == theirs(name)(text, add_special_tokens=False)["input_ids"], repr(text)


def test_mistral_ids_are_those_of_sentencepiece():
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizers.mistral() / "tokenizer.model"))
    for text in texts():
        assert ours("mistral").encode(text).ids == [processor.bos_id(), *processor.encode(text)], repr(text)


def test_mistral_ids_of_text_that_begins_with_a_space():
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizers.mistral() / "tokenizer.model"))
    assert len(texts(leading_space=True)) > 20
    for text in texts(leading_space=True):
        assert ours("mistral").encode(text).ids == [processor.bos_id(), *processor.encode(text)], repr(text)


@pytest.mark.parametrize("legacy", [True, False])
def test_mistral_ids_around_special_tokens_are_those_of_transformers(tmp_path, legacy):
    directory = tiny_tokenizers.copy(tiny_tokenizers.mistral(), tmp_path / "t", legacy=legacy)
    tokenizer, reference = Tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    written = ["<s>[INST] a [/INST]b -> c\n</s>", "<s>a</s>b</s>\n</s>日本", "</s>", "a</s></s>é", "<s>1\n2</s>\t3"]
    if not legacy:  # with legacy, transformers 5 and sentencepiece disagree about the space of " b"
        written.append("a</s> b")
    for text in written:
        ids = tokenizer.encode(text).ids
        assert ids[0] == tokenizer.bos_id
        assert ids[not text.startswith("<s>") :] == reference(text, add_special_tokens=False)["input_ids"], repr(text)


def test_the_end_of_an_instruction_has_mistrals_ids():
    assert ours("mistral").encode("[INST] x [/INST]").ids[-4:] == [733, 28748, 16289, 28793]
    assert ours("mistral").encode("<s>[INST] x [/INST]y").ids[-5:-1] == [733, 28748, 16289, 28793]


# ---- spans


@EVERY
def test_spans_are_where_the_tokens_are(name):
    """Monotone, within the text, without gaps; a character is shared only by tokens that hold some of its bytes each."""
    tokenizer = ours(name)
    for text in [*texts(), *texts(leading_space=True), f"a{tokenizer.eos_token}é {tokenizer.eos_token}"]:
        ids, spans = tokenizer.encode(text)
        assert len(ids) == len(spans)
        assert covered(text, spans) == text


def test_mistral_spans_hold_the_text_of_their_pieces():
    """Of distinct spans, each is the surface of its token: pitfall row 38, offsets in characters and not in bytes."""
    tokenizer = ours("mistral")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizers.mistral() / "tokenizer.model"))
    for text in texts():
        ids, spans = tokenizer.encode(text)
        distinct = [span for i, span in enumerate(spans) if span not in spans[:i]]
        assert "".join(text[start:end] for start, end in distinct) == text
        for i, (start, end) in zip(ids[1:], spans[1:], strict=True):
            if processor.is_byte(i):
                assert end - start == 1
            else:
                piece = processor.id_to_piece(i).replace("▁", " ")
                assert text[start:end] in (piece, piece[1:] if start == 0 else piece), repr(text)


@EVERY
def test_the_bytes_of_a_character_share_its_span(name):
    spans = ours(name).encode("é𐌰é").spans
    assert spans.count((1, 2)) == len("𐌰".encode()) == 4
    assert spans[-1][1] == 3


# ---- BOS


@pytest.mark.parametrize("name", ["mistral", "llama2", "metaspace", "llama3"])
def test_exactly_one_bos(name):
    tokenizer = ours(name)
    for text in ["", "a", "é -> b\n"]:
        for written in (text, tokenizer.bos_token + text):
            ids, spans = tokenizer.encode(written)
            assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
            assert spans[0] == (0, len(written) - len(text)), "the added BOS is not in the text"
        if name != "metaspace":  # whose dummy space comes before text that begins the string, not after a written <s>
            assert tokenizer.encode(text).ids == tokenizer.encode(tokenizer.bos_token + text).ids


def test_no_bos_where_the_model_has_none():
    assert ours("qwen").bos_id is None and not ours("qwen").adds_bos
    assert ours("qwen").encode("a").ids == theirs("qwen")("a")["input_ids"]
    assert ours("qwen").encode("").ids == []


def test_add_bos_token_false_is_obeyed(tmp_path):
    tokenizer = Tokenizer(tiny_tokenizers.copy(tiny_tokenizers.mistral(), tmp_path / "t", add_bos_token=False))
    assert tokenizer.encode("a").ids == ours("mistral").encode("a").ids[1:]


# ---- decoding


@EVERY
@pytest.mark.parametrize("leading_space", [False, True])
def test_decoding_gives_the_text_back(name, leading_space):
    lost = name == "metaspace" and leading_space  # such a file lets the text's own first space stand for the dummy one
    for text in texts(leading_space):
        assert ours(name).decode(ours(name).encode(text).ids) == text[lost:]


@EVERY
def test_special_tokens_are_shown_on_request(name):
    tokenizer = ours(name)
    ids = tokenizer.encode("a" + tokenizer.eos_token).ids
    assert tokenizer.decode(ids) == "a"
    shown = tokenizer.decode(ids, skip_special_tokens=False)  # Llama 2's decoder puts a space after <s>, as transformers' does
    assert shown.replace(" ", "") == (tokenizer.bos_token or "") + "a" + tokenizer.eos_token


@EVERY
@pytest.mark.parametrize("prompt", ["Physics", "x [/INST]", "science -> art", "🤖", "한", "ends with a space "])
@pytest.mark.parametrize("continuation", [" -> museums", "museums", "\nart\n", " 물리학 🤖"])
def test_decode_after_keeps_the_continuations_first_space(name, prompt, continuation):
    tokenizer = ours(name)
    both, alone = tokenizer.encode(prompt + continuation), tokenizer.encode(prompt)
    if both.ids[: len(alone.ids)] != alone.ids:  # then the first ids are not the prompt's: cut where the prompt ends in both
        cut = sum(end <= len(prompt) for _, end in both.spans)
        prompt, continuation = prompt[: both.spans[cut][0]], (prompt + continuation)[both.spans[cut][0] :]
        alone = type(both)(both.ids[:cut], both.spans[:cut])
    added = tokenizer.decode_after(alone.ids, both.ids[len(alone.ids) :])
    assert added == continuation


@pytest.mark.parametrize("name", ["mistral", "metaspace"])
def test_spaces_after_special_tokens_survive_without_legacy(name, tmp_path):
    """Where only the first stretch has a dummy space, a space after a special token is the text's own."""
    tokenizer = Tokenizer(tiny_tokenizers.copy(tiny_tokenizers.BUILDERS[name](), tmp_path / "t", legacy=False))
    for text in ["<s>a</s> b</s>c", "<s>x</s> 日本</s>\n</s>  y"]:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    prompt, both = tokenizer.encode("<s>a</s>").ids, tokenizer.encode("<s>a</s> b").ids
    assert tokenizer.decode_after(prompt, both[len(prompt) :]) == " b"


# ---- chat templates


@EVERY
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_rendering_and_its_ids_are_those_of_transformers(name, conversation, add_generation_prompt):
    messages = CONVERSATIONS[conversation]
    reference = functools.partial(theirs(name).apply_chat_template, messages, add_generation_prompt=add_generation_prompt)
    if conversation == "system" and ours(name).chat_template == MISTRAL_TEMPLATE:
        with pytest.raises(UserError, match="alternation"):
            ours(name).render(messages, add_generation_prompt)
        return
    rendered = ours(name).render(messages, add_generation_prompt)
    assert rendered == reference(tokenize=False)
    ids, spans = ours(name).encode(rendered)
    assert ids == reference(tokenize=True, return_dict=False)
    assert ids.count(ours(name).bos_id) == int(ours(name).adds_bos)
    assert covered(rendered, spans) == rendered


def test_the_built_in_form_is_mistrals():
    messages = [{"role": r, "content": c} for r, c in [("user", "q"), ("assistant", "a"), ("user", "r")]]
    assert ours("mistral").render(messages) == "<s>[INST] q [/INST]a</s>[INST] r [/INST]"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
        "{{ messages | tojson }}",
        "{{ messages | tojson(indent=2) }}",
        "{{ {'z': 'é', 'a': '<'} | tojson(sort_keys=true) }}",
        "{{ bos_token }}{{ eos_token }}{{ messages | length }}{{ add_generation_prompt }}{{ tools is none }}",
        "{% if true %}\n    {% set x = 1 %}\n  kept\n{% endif %}\nx{{ x }}",
        "{{ messages[0].missing }}{{ messages[0]['content'].split(' ')[0] | upper }}",
        "{% macro turn(m) %}<{{ m.role }}>{% endmacro %}{{ turn(messages[0]) }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    ],
)
def test_what_templates_use_renders_as_in_transformers(template):
    messages = CONVERSATIONS["three turns"]
    tokenizer = Tokenizer(tiny_tokenizers.llama3(), template)
    assert tokenizer.render(messages) == theirs("llama3").apply_chat_template(messages, chat_template=template, tokenize=False)


def test_strftime_now_is_the_date():
    tokenizer = Tokenizer(tiny_tokenizers.llama3(), "{{ strftime_now('%d %b %Y') }}")
    before, rendered, after = f"{datetime.now():%d %b %Y}", tokenizer.render([]), f"{datetime.now():%d %b %Y}"
    assert rendered in (before, after)


def test_a_templates_own_complaint_reaches_the_user():
    tokenizer = Tokenizer(tiny_tokenizers.llama3(), "{{ raise_exception('no system turn, please') }}")
    with pytest.raises(UserError, match="no system turn, please"):
        tokenizer.render(CONVERSATIONS["system"])


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
def test_the_sandbox_refuses_escapes_and_mutation(template):
    messages = [dict(m) for m in CONVERSATIONS["one turn"]]
    with pytest.raises(UserError, match="chat template"):
        Tokenizer(tiny_tokenizers.llama3(), template).render(messages)
    assert messages == CONVERSATIONS["one turn"]


# ---- files


def test_remote_code_is_refused(tmp_path):
    auto_map = {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]}
    with pytest.raises(UserError, match="auto_map"):
        Tokenizer(tiny_tokenizers.copy(tiny_tokenizers.llama3(), tmp_path / "t", auto_map=auto_map))


def test_a_directory_without_a_tokenizer_is_the_users_error(tmp_path):
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
def test_a_broken_file_is_named(tmp_path, source, file, content):
    directory = tiny_tokenizers.copy(tiny_tokenizers.BUILDERS[source](), tmp_path / "t")
    (directory / file).write_bytes(content)
    with pytest.raises(UserError, match="chat.template" if "jinja" in file else file):
        Tokenizer(directory)


def test_a_special_token_outside_the_vocabulary_is_named(tmp_path):
    directory = tiny_tokenizers.copy(tiny_tokenizers.llama3(), tmp_path / "t", eos_token="<|end|>")
    with pytest.raises(UserError, match=r"eos_token.*<\|end\|>"):
        Tokenizer(directory)


@EVERY
def test_saved_and_reloaded_it_is_the_same(name, tmp_path):
    save_tokenizer(ours(name), tmp_path)
    reloaded = Tokenizer(tmp_path)
    assert reloaded.chat_template == ours(name).chat_template
    rendered = ours(name).render(CONVERSATIONS["three turns"], add_generation_prompt=True)
    assert reloaded.render(CONVERSATIONS["three turns"], add_generation_prompt=True) == rendered
    assert reloaded.encode(rendered) == ours(name).encode(rendered)


def test_a_replaced_template_reaches_whoever_loads_the_saved_files(tmp_path):
    """Pitfall row 35: a server reads the saved directory and must render the prompts of training."""
    template = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    save_tokenizer(Tokenizer(tiny_tokenizers.llama3(), template), tmp_path)
    messages = CONVERSATIONS["three turns"]
    tokenizer, server = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == template
    assert tokenizer.encode(tokenizer.render(messages)).ids == server.apply_chat_template(messages, return_dict=False)


# ---- tokens added to the vocabulary (pitfall row 34)


@pytest.mark.parametrize("special", [True, False])
def test_tokens_added_to_mistral_round_trip(tmp_path, special):
    added = {"32000": {"content": "<edge>", "special": special}, "32001": {"content": "[NODE]", "special": special}}
    directory = tiny_tokenizers.copy(tiny_tokenizers.mistral(), tmp_path / "t", added_tokens_decoder=added)
    tokenizer = Tokenizer(directory)
    text = "a<edge>b [NODE]日本"
    ids, spans = tokenizer.encode(text)
    assert ids.count(32000) == ids.count(32001) == 1
    assert text[slice(*spans[ids.index(32000)])] == "<edge>" and text[slice(*spans[ids.index(32001)])] == "[NODE]"
    assert tokenizer.vocab_size > max(ids)
    save_tokenizer(tokenizer, tmp_path)
    assert Tokenizer(tmp_path).encode(text) == (ids, spans)
    shown = tokenizer.decode(ids, skip_special_tokens=special is False)
    assert "<edge>" in shown and "[NODE]" in shown, "only special tokens may be left out"
    assert ("<edge>" in tokenizer.decode(ids)) == (not special)


def test_the_longest_added_token_wins(tmp_path):
    """As in transformers, whatever their order."""
    added = {"32000": {"content": "<a>"}, "32001": {"content": "<a><b>"}, "32002": {"content": "<b>"}}
    directory = tiny_tokenizers.copy(tiny_tokenizers.mistral(), tmp_path / "t", added_tokens_decoder=added)
    assert Tokenizer(directory).encode("<a><b><b><a>").ids[1:] == [32001, 32002, 32000]


def test_tokens_added_by_transformers_round_trip(tmp_path):
    reference = transformers.AutoTokenizer.from_pretrained(tiny_tokenizers.llama3())
    reference.add_tokens(["<edge>"])
    reference.save_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode("a<edge>b").ids
    assert ids[1:] == reference("a<edge>b", add_special_tokens=False)["input_ids"]
    assert tokenizer.vocab_size == len(reference) == ours("llama3").vocab_size + 1
    assert tokenizer.decode(ids) == "a<edge>b"


def test_tokenizer_json_wins_over_tokenizer_model(tmp_path):
    """As in transformers; its ids are another model's here, so that the choice shows."""
    directory = tiny_tokenizers.copy(tiny_tokenizers.llama2(), tmp_path / "t")
    shutil.copyfile(tiny_tokenizers.mistral() / "tokenizer.model", directory / "tokenizer.model")
    assert (
        Tokenizer(directory).encode("Physics").ids
        == ours("llama2").encode("Physics").ids
        != ours("mistral").encode("Physics").ids
    )


def test_named_templates_give_the_default(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    directory = tiny_tokenizers.copy(tiny_tokenizers.llama3(), tmp_path / "t", chat_template=named)
    assert Tokenizer(directory).render([]) == "plain"
    assert json.loads((directory / "tokenizer_config.json").read_text())["chat_template"] == named
