"""Tokenizers in Hugging Face layout: Mistral's own, and small ones in the forms of other families.

Each is written once per test run, and returned as a directory that must not be changed.
"""

import functools
import json
import random
import shutil
import tempfile
from pathlib import Path

import mistral_common
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

_HOME = tempfile.TemporaryDirectory(prefix="minilora-tokenizers-")

LLAMA3_TEMPLATE = (
    "{% for message in messages %}"
    "{% set turn = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' %}"
    "{% set turn = turn + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.first %}{% set turn = bos_token + turn %}{% endif %}{{ turn }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
QWEN_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. ' }}
    {{- 'You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# The templates below have {% generation %} around what the model writes, which transformers needs
# for its own masks.

# Mistral v3 and tekken, as their repositories render: the system prompt goes into the last
# question, and answers are trimmed. SPACE is written by the sentencepiece family alone.
_MISTRAL_LATER = """\
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- set turns = messages[1:] if system else messages %}
{{- bos_token }}
{%- for turn in turns %}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('turns must alternate') }}
    {%- endif %}
    {%- if turn.role == 'user' %}
        {%- set last = turns[loop.index0 + 2:] | length == 0 %}
        {{- '[INST]SPACE' + (system if last else '') + turn.content + '[/INST]' }}
    {%- else %}
        {%- generation %}{{ 'SPACE' + turn.content | trim + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""
MISTRAL_V3_TEMPLATE = _MISTRAL_LATER.replace("SPACE", " ")
TEKKEN_TEMPLATE = _MISTRAL_LATER.replace("SPACE", "")

# Qwen 3: reasoning of answers before the last question is left out, and the last answer always has
# a block for it.
QWEN3_TEMPLATE = """\
{%- set seen = namespace(question=messages | length) %}
{%- for turn in messages[::-1] %}
    {%- if seen.question == messages | length and turn.role == 'user' %}
        {%- set seen.question = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for turn in messages %}
    {{- '<|im_start|>' + turn.role + '\\n' }}
    {%- if turn.role == 'assistant' %}
        {%- set thought, said = '', turn.content %}
        {%- if turn.reasoning_content is string %}
            {%- set thought = turn.reasoning_content %}
        {%- elif '</think>' in said %}
            {%- set thought = said.split('</think>')[0].split('<think>')[-1] %}
            {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- generation %}
            {%- if loop.index0 > seen.question and (loop.last or thought) %}
                {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
                {{- said.lstrip('\\n') }}
            {%- else %}
                {{- said }}
            {%- endif %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- turn.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# Llama 3.1: there always is a system turn, with today's date before the conversation's own.
LLAMA31_TEMPLATE = """\
{%- if date_string is not defined %}
    {%- set date_string = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}
{%- endif %}
{%- set own = messages[0].content | trim if messages and messages[0].role == 'system' else '' %}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Cutting Knowledge Date: December 2023\\n' }}
{{- 'Today Date: ' + date_string + '\\n\\n' + own + '<|eot_id|>' }}
{%- for turn in messages %}
    {%- if not loop.first or turn.role != 'system' %}
        {{- '<|start_header_id|>' + turn.role + '<|end_header_id|>\\n\\n' }}
        {%- if turn.role == 'assistant' %}
            {%- generation %}{{ turn.content | trim + '<|eot_id|>' }}{% endgeneration %}
        {%- else %}
            {{- turn.content | trim + '<|eot_id|>' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# How GPT-4, Llama 3 and Qwen cut text before BPE; they differ in how many digits stay together.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def corpus() -> list[str]:
    """Return a few hundred lines of English, Korean and Chinese, some of them category paths."""
    rng = random.Random(0)
    english = (
        "science physics history of the art museums in France people born cities mathematics "
        "theory and quantum music"
    ).split()
    korean = "과학 물리학 역사 예술 박물관 도시 수학 이론 음악 한국어 사람 서울 대학교 문화".split()
    chinese = "科学 物理学 历史 艺术 博物馆 城市 数学 理论 音乐 中文 人物 北京 大学 文化".split()
    lines = []
    for i in range(400):
        words = rng.choices([english, english, korean, chinese][i % 4], k=rng.randint(3, 9))
        if i % 3 == 0:
            lines.append(" -> ".join(word.capitalize() for word in words) + "\n")
        else:
            lines.append(" ".join(words) + rng.choice([".", ")\n", "!", " 1984."]))
    return lines


# what every tokenizer_config.json below holds
_FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _directory(name: str, config: dict, tokenizer: Tokenizer | None = None) -> Path:
    """Write a new directory with tokenizer_config.json and, if given, tokenizer.json."""
    directory = Path(_HOME.name) / name
    directory.mkdir()
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if tokenizer:
        tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def _config_of(directory: Path) -> dict:
    """Return the content of a directory's tokenizer_config.json."""
    return json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))


def _mistral_file(name: str) -> Path:
    """Return a file that comes with mistral_common."""
    return Path(mistral_common.__path__[0]) / "data" / name


def _train_bytes(tokenizer: Tokenizer, lines: list[str], vocab_size: int) -> None:
    """Train byte-level BPE, in whose vocabulary every byte is a token."""
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(lines, trainer)


def _byte_level(digits: str, trim_offsets: bool, ignore_merges: bool) -> Tokenizer:
    """Return byte-level BPE over words, without its special tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    words = pre_tokenizers.Split(Regex(WORDS.format(digits=digits)), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(
        add_prefix_space=False, trim_offsets=trim_offsets, use_regex=False
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    _train_bytes(tokenizer, corpus(), vocab_size=700)
    return tokenizer


def _add_bos(tokenizer: Tokenizer, bos: str) -> processors.PostProcessor:
    """Return a post-processor that puts a token before every text."""
    return processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def _keep_offsets() -> processors.PostProcessor:
    """Return the post-processor of byte-level BPE that leaves the offsets as they are."""
    return processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)


@functools.cache
def mistral() -> Path:
    """Mistral-7B-Instruct-v0.2's tokenizer.model, without a chat template."""
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True}
    directory = _directory("mistral", {**config, **_LLAMA_TOKENS})
    shutil.copyfile(_mistral_file("tokenizer.model.v1"), directory / "tokenizer.model")
    return directory


@functools.cache
def llama3() -> Path:
    """Byte-level BPE whose post-processor adds BOS; Llama 3's template, which trims contents."""
    tokenizer = _byte_level("{1,3}", trim_offsets=True, ignore_merges=True)
    bos = "<|begin_of_text|>"
    headers = ["<|start_header_id|>", "<|end_header_id|>"]
    tokenizer.add_special_tokens([bos, "<|end_of_text|>", *headers, "<|eot_id|>"])
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), _add_bos(tokenizer, bos)]
    )
    tokens = {"bos_token": bos, "eos_token": "<|eot_id|>"}
    return _directory("llama3", {**_FAST, **tokens, "chat_template": LLAMA3_TEMPLATE}, tokenizer)


@functools.cache
def qwen() -> Path:
    """Byte-level BPE over NFC text without BOS, and Qwen 2.5's template with its system turn."""
    tokenizer = _byte_level("", trim_offsets=False, ignore_merges=False)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = _keep_offsets()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    config = {
        **_FAST,
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": QWEN_TEMPLATE,
    }
    return _directory("qwen", config, tokenizer)


def _byte_fallback(name: str, dummy_everywhere: bool) -> Path:
    """Write BPE over characters, with single bytes for those that are not in the vocabulary.

    A dummy `▁` comes before every stretch between special tokens, or before the first alone.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=500, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["<unk>", "<s>", "</s>", *byte_pieces, "\n", *model["vocab"]]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge) for merge in model["merges"]]

    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if dummy_everywhere:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    to_spaces, drop_dummy = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(
        [to_spaces, decoders.ByteFallback(), decoders.Fuse(), drop_dummy]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = _add_bos(tokenizer, "<s>")
    return _directory(name, {**_FAST, **_LLAMA_TOKENS}, tokenizer)


@functools.cache
def llama2() -> Path:
    """A tokenizer.json in the form of Llama 2 and of Mistral 0.1 and 0.2."""
    return _byte_fallback("llama2", dummy_everywhere=True)


@functools.cache
def metaspace() -> Path:
    """A tokenizer.json in the form of Mistral 0.3."""
    return _byte_fallback("metaspace", dummy_everywhere=False)


BUILDERS = {
    "mistral": mistral,
    "llama2": llama2,
    "metaspace": metaspace,
    "llama3": llama3,
    "qwen": qwen,
}


@functools.cache
def mistral_v3() -> Path:
    """Mistral-7B-Instruct-v0.3's tokenizer.model, with [INST] and [/INST] as control pieces."""
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    template = {"chat_template": MISTRAL_V3_TEMPLATE}
    directory = _directory("mistral_v3", {**config, **_LLAMA_TOKENS, **template})
    source = _mistral_file("mistral_instruct_tokenizer_240323.model.v3")
    shutil.copyfile(source, directory / "tokenizer.model")
    return directory


@functools.cache
def tekken() -> Path:
    """Mistral-Nemo's tekken vocabulary as tokenizer.json; it takes a few seconds."""
    from transformers.integrations.mistral.tokenizer import MistralConverter

    tokenizer = MistralConverter(str(_mistral_file("tekken_240911.json"))).converted()
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _add_bos(tokenizer, "<s>")]
    )
    rest = {"pad_token": "<pad>", "chat_template": TEKKEN_TEMPLATE}
    return _directory("tekken", {**_FAST, **_LLAMA_TOKENS, **rest}, tokenizer)


@functools.cache
def qwen3() -> Path:
    """The tokenizer of `qwen` with Qwen 3's template and its reasoning tokens, not special ones."""
    tokenizer = Tokenizer.from_file(str(qwen() / "tokenizer.json"))
    reasoning = [AddedToken(token, normalized=False) for token in ("<think>", "</think>")]
    tokenizer.add_tokens(reasoning)
    config = {**_config_of(qwen()), "chat_template": QWEN3_TEMPLATE}
    return _directory("qwen3", config, tokenizer)


@functools.cache
def llama31() -> Path:
    """The tokenizer of `llama3` with the template of Llama 3.1."""
    tokenizer = Tokenizer.from_file(str(llama3() / "tokenizer.json"))
    config = {**_config_of(llama3()), "chat_template": LLAMA31_TEMPLATE}
    return _directory("llama31", config, tokenizer)


@functools.cache
def merging() -> Path:
    """Byte-level BPE that does not cut text into words, so that ": a" and "\\n\\n" are tokens.

    Its padding is EOS.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    lines = ["A: a", "Q: q", ": a", "\n\n", ".\n\n", ": 과학"] * 20
    _train_bytes(tokenizer, lines, vocab_size=300)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.post_processor = _keep_offsets()
    config = {
        **_FAST,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "chat_template": QWEN_TEMPLATE,
    }
    return _directory("merging", config, tokenizer)


# for the tests of conversations and masks
MORE = {
    "mistral_v3": mistral_v3,
    "tekken": tekken,
    "qwen3": qwen3,
    "llama31": llama31,
    "merging": merging,
}


def copy(source: Path, target: Path, **config: object) -> Path:
    """Copy a tokenizer, and replace values in its tokenizer_config.json (None becomes null)."""
    shutil.copytree(source, target)
    changed = {**_config_of(target), **config}
    (target / "tokenizer_config.json").write_text(json.dumps(changed), encoding="utf-8")
    return target
