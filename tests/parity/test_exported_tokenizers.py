"""What training saves, read by other programs: they ask with the ids of training.

The others are transformers, whose tokenizers vLLM uses too, and gguf, llama.cpp's own reader.
"""

import json
from pathlib import Path

import gguf
import pytest
import transformers

from helpers import tiny_tokenizers
from minilora.checkpoint.tokenizer_writer import plan_export, save_tokenizer
from minilora.config import DataConfig
from minilora.data.added_tokens import tokenizer_with_added_tokens
from minilora.data.cache import load_documents
from minilora.data.dataset import Documents
from minilora.data.formats import fill_template
from minilora.data.paths import ARTICLE_END, article_prompt, write_paths
from minilora.data.tokenizer import Tokenizer

END = "<|끝|>"
ROWS: dict[str, list[dict]] = {
    "messages": [
        {
            "messages": [
                {"role": "user", "content": "물리학이 뭐예요?"},
                {"role": "assistant", "content": "자연 과학의 한 분야입니다."},
                {"role": "user", "content": "In 中文, please."},
                {"role": "assistant", "content": "物理学 🤖"},
            ]
        },
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "Because of the museums."},
            ]
        },
    ],
    "prompt": [{"prompt": "Cities in France", "completion": "Music and art"}],
    "paths": [
        {"title": "Optics", "abstract": "Light, 物理学.", "paths": [["Science", "Physics"]]},
    ],
    "text": [{"text": "history of the art"}],
}

# the templates have an end of turn in common, and differ in how they begin
TURNS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}END\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEMPLATES = {
    "BOS": "{{ bos_token }}" + TURNS,
    "no BOS": TURNS,
    "no BOS, a special token": "{{ eos_token }}\n" + TURNS,
    "no BOS, indented": "  {% if true %}\n" + TURNS + "{% endif %}\n",
    "sometimes BOS": "{% if messages[0].role == 'system' %}{{ bos_token }}{% endif %}" + TURNS,
}
WITH_TOKENIZER_JSON = [name for name in tiny_tokenizers.BUILDERS if name != "mistral"]
CASES = [
    *[(name, template, {}) for name in WITH_TOKENIZER_JSON for template in TEMPLATES],
    # few of the tokenizer.model, which transformers takes a second to convert
    *[("mistral", template, {}) for template in ("BOS", "no BOS", "sometimes BOS")],
    ("mistral", "no BOS", {"legacy": False}),
    ("metaspace", "no BOS", {"add_bos_token": False}),
    ("llama3", "no BOS", {"add_bos_token": False}),
    ("llama3", "no BOS", {"add_eos_token": True}),
    ("qwen", "no BOS", {"add_bos_token": True, "bos_token": "<|endoftext|>"}),
]
IDS = [" ".join([name, template, *config]) for name, template, config in CASES]


def base_tokenizer(case: tuple[str, str, dict], directory: Path) -> Tokenizer:
    """Return a tokenizer with one of the TEMPLATES, and an older one in its config."""
    name, template, config = case
    source = tiny_tokenizers.BUILDERS[name]()
    tiny_tokenizers.copy(source, directory, chat_template="an older template", **config)
    eos = Tokenizer(directory).eos_token
    return Tokenizer(directory, TEMPLATES[template].replace("END", eos or ""))


def documents_of(data: DataConfig, tokenizer: Tokenizer, directory: Path) -> Documents:
    """Return what training makes of the ROWS of a format."""
    file = directory / f"{data.format}.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS[data.format]]
    file.write_text("".join(lines), encoding="utf-8")
    data.num_workers = 1
    return load_documents(str(file), data, tokenizer, "train_file")


def turns_of(row: dict, format: str) -> list[dict]:
    """Return a row as the conversation that a chat client would send."""
    if format == "messages":
        return row["messages"]
    if format == "prompt":
        question, answer = row["prompt"], row["completion"]
    else:
        question, answer = article_prompt(row), write_paths(row["paths"])
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_transformers_renders_the_chats_of_training(case: tuple[str, str, dict], tmp_path: Path):
    tokenizer = base_tokenizer(case, tmp_path / "base")
    saved = tmp_path / "saved"
    saved.mkdir()
    save_tokenizer(tokenizer, saved, plan_export(tokenizer, DataConfig()))
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    again = Tokenizer(saved)

    for format in ("messages", "prompt", "paths"):
        documents = documents_of(DataConfig(format=format), tokenizer, tmp_path)  # type: ignore[arg-type]
        assert len(documents) == len(ROWS[format])
        for i, row in enumerate(ROWS[format]):
            turns, ids = turns_of(row, format), documents.ids(i).tolist()
            found = theirs.apply_chat_template(turns, return_dict=False)
            assert found == ids
            assert again.encode(again.render(turns)).ids == ids
            prompt, _ = documents.prompt_and_target(i)
            asked = theirs.apply_chat_template(
                turns[:-1], add_generation_prompt=True, return_dict=False
            )
            assert asked == prompt
            assert asked.count(tokenizer.bos_id) == tokenizer.adds_bos

    vocabulary = gguf.SpecialVocab(saved)
    assert vocabulary.chat_template == again.chat_template
    if case[0] != "mistral":  # of a tokenizer.model, gguf takes these from the model's config.json
        assert vocabulary.special_token_ids.get("bos") == tokenizer.bos_id
        assert vocabulary.special_token_ids["eos"] == tokenizer.eos_id
        assert vocabulary.add_special_token.get("bos", False) == tokenizer.adds_bos
        assert not vocabulary.add_special_token.get("eos")


@pytest.mark.parametrize("format", ["prompt", "paths", "text"])
@pytest.mark.parametrize("case", [case for case in CASES if case[1] == "no BOS"])
def test_transformers_has_the_ids_of_texts_without_a_template(
    case: tuple[str, str, dict], format: str, tmp_path: Path
):
    """Also where the base's files contradict each other about BOS, or would add EOS."""
    tokenizer = base_tokenizer(case, tmp_path / "base")
    saved = tmp_path / "saved"
    saved.mkdir()
    data = DataConfig(format=format, chat=False)  # type: ignore[arg-type]
    save_tokenizer(tokenizer, saved, plan_export(tokenizer, data))
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    assert theirs.chat_template is None
    assert gguf.SpecialVocab(saved).chat_template is None

    documents = documents_of(data, tokenizer, tmp_path)
    for i, row in enumerate(ROWS[format]):
        if format == "text":
            text = row["text"]
        elif format == "prompt":
            text = fill_template("{prompt}{completion}", row)
        else:
            text = article_prompt(row) + ARTICLE_END + write_paths(row["paths"])
        assert theirs(text + (tokenizer.eos_token or ""))["input_ids"] == documents.ids(i).tolist()
        assert Tokenizer(saved).encode(text) == tokenizer.encode(text)


def test_transformers_reads_tokenizer_json_as_training_does(tmp_path: Path):
    """For the class that Llama's and Mistral's models name, it would build another tokenizer."""
    source = Path(__file__).parents[2] / "examples" / "tiny-mistral"
    tokenizer = Tokenizer(tokenizer_with_added_tokens(source, ("<|bot|>", END)))
    config = json.loads((source / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "LlamaTokenizer"
    save_tokenizer(tokenizer, tmp_path, plan_export(tokenizer, DataConfig(chat=False)))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("<|bot|> x", "  two  spaces", f"a {END} b</s> c", "서울 \n\n x"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text).ids


@pytest.mark.parametrize("name", tiny_tokenizers.BUILDERS)
def test_an_added_end_token_is_eos_to_transformers_and_gguf(name: str, tmp_path: Path):
    source = tiny_tokenizers.BUILDERS[name]()
    base = tiny_tokenizers.copy(source, tmp_path / "base", chat_template="an older template")
    with_end = tokenizer_with_added_tokens(base, (END,))
    tokenizer = Tokenizer(with_end, TURNS.replace("END", END))
    saved = tmp_path / "saved"
    saved.mkdir()
    data = DataConfig(format="messages", add_tokens=(END,))
    save_tokenizer(tokenizer, saved, plan_export(tokenizer, data))

    documents = documents_of(data, tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    assert theirs.eos_token == END
    for i, row in enumerate(ROWS["messages"]):
        found = theirs.apply_chat_template(row["messages"], return_dict=False)
        assert found == documents.ids(i).tolist()
        _, target = documents.prompt_and_target(i)
        assert target[-1] == theirs.eos_token_id == tokenizer.specials[END]
    if name != "mistral":
        assert gguf.SpecialVocab(saved).special_token_ids["eos"] == tokenizer.specials[END]
