"""Each recipe in configs/ as it is written: trained, interrupted, merged, asked, and loaded.

The runs are those of helpers/recipes.py; each is made once and looked at by many tests.
"""

import copy
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import huggingface_hub
import pytest
import sacrebleu
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import infer
import merge
import minilora
import train
from helpers.asking import infer_args
from helpers.hub_server import Hub
from helpers.qlora import logits_of, reference_model
from helpers.recipes import (
    RECIPES,
    ROOT,
    Place,
    Run,
    events,
    make_base,
    places_of,
    places_of_full_model,
    read_rows,
    run_recipe,
)
from minilora.checkpoint.model_record import read_model_record
from minilora.checkpoint.resume import read_state
from minilora.config import DataConfig
from minilora.data.prompts import prompt_for_row
from minilora.data.tokenizer import Tokenizer
from minilora.generation.jobs import Row
from minilora.generation.prompting import PromptWriter

pytestmark = pytest.mark.system

Runs = Callable[[str], Run]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the files of a config are relative to it
        yield tmp_path_factory.mktemp("recipes")


@pytest.fixture(scope="module")
def hub(home: Path) -> Iterator[Hub]:
    http = huggingface_hub.utils._http
    with pytest.MonkeyPatch.context() as patch, Hub() as hub:
        patch.setattr(http, "_GLOBAL_CLIENT_FACTORY", http._GLOBAL_CLIENT_FACTORY)
        hub.connect(patch, home / "hf")
        yield hub
    huggingface_hub.close_session()
    huggingface_hub.utils.enable_progress_bars()


@pytest.fixture(scope="module")
def runs(home: Path, hub: Hub) -> Runs:
    """The run of a recipe, made when it is first asked for."""

    @functools.cache
    def run_of(name: str) -> Run:
        if name == "arxiv":
            base = run_of("wiki").merged
        else:
            base = make_base(RECIPES[name], home / f"{name}-base")
        return run_recipe(name, base, home, hub)

    return run_of


@pytest.fixture(scope="module", params=RECIPES)
def run(request: pytest.FixtureRequest, runs: Runs) -> Run:
    return runs(request.param)


def preview(run: Run, out: Path, *flags: str) -> list[dict]:
    """Return the documents that a recipe trains on, with their masks."""
    assert train.main(run.config(out, "--preview", "1000", *flags)) == 0
    return read_rows(out / "preview.jsonl")


# ---- training, resuming and merging


def test_loss_falls(run: Run):
    losses = list(events(run.whole, "loss").values())
    quarter = max(1, len(losses) // 4)
    assert fmean(losses[-quarter:]) < 0.9 * fmean(losses[:quarter]), losses


def test_interrupted_run_ends_as_an_uninterrupted_one(run: Run):
    name = "checkpoint-final/adapter_model.safetensors"
    assert (run.resumed / name).read_bytes() == (run.whole / name).read_bytes()
    assert events(run.resumed, "loss") == events(run.whole, "loss")
    for key in ("eval/in_domain/loss", "eval/out_of_domain/loss"):
        assert events(run.resumed, key) == events(run.whole, key) != {}


def test_arxiv_keeps_its_best_evaluation(runs: Runs):
    """As the paper's run does; the others name checkpoint-final as their result."""
    run = runs("arxiv")
    losses = events(run.whole, "eval/out_of_domain/loss")
    best = min(losses, key=losses.__getitem__)
    state, _ = read_state(run.whole / "checkpoint-final")
    assert state.best["metric"] == "eval/out_of_domain/loss"
    assert (state.best["step"], state.best["value"]) == (best, losses[best])
    assert (run.whole / f"checkpoint-{best}").is_dir() or best == state.step


def form_of(run: Run) -> DataConfig:
    """Return the form of a merged model's prompts."""
    record = read_model_record(run.merged)
    assert record is not None
    return record.data


def tokens_of(run: Run) -> Tensor:
    """Return two rows of the evaluation file as they are asked, end to end."""
    data = form_of(run)
    tokenizer = Tokenizer(run.merged)
    tokens: list[int] = []
    for row in read_rows(run.eval_file)[:2]:
        tokens += tokenizer.encode(prompt_for_row(row, data, tokenizer)).ids
    return torch.tensor(tokens[:300])


def test_merged_model_is_the_live_one(run: Run):
    """As transformers and PEFT have both; over 4 bits, merged into the weights trained over."""
    bits, tokens = run.config(run.whole).model.bits, tokens_of(run)
    live = reference_model(run.base, bits, run.final)
    for module in live.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    expected = logits_of(live, tokens)
    scale = float(expected.abs().max())
    gap = float((logits_of(reference_model(run.exact), tokens) - expected).abs().max())
    assert gap < 2e-4 * scale

    pattern = r"(original base|dequantized base|and merged:) +(\d[\d.e+-]*)"
    printed = {name: float(number) for name, number in re.findall(pattern, run.verify_log)}
    if bits < 16:
        into_original = reference_model(run.merged)
        assert float((logits_of(into_original, tokens) - expected).abs().max()) > 10 * gap
        assert printed["original base"] > 10 * printed["dequantized base"]
        assert printed["dequantized base"] < 2e-4 * scale, run.verify_log
    else:
        assert printed["and merged:"] < 2e-4 * scale, run.verify_log


def test_transformers_loads_the_merged_model(run: Run):
    tokens = tokens_of(run)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        run.merged, dtype="float32", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    ours, _ = minilora.load(str(run.merged), dtype="float32")
    expected = logits_of(model, tokens)
    with torch.no_grad():
        found = ours(tokens)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


# ---- what is trained, and what is asked


def paths_text(row: dict) -> str:
    """Return the paths of a row as they are written."""
    return "".join(" -> ".join(path) + "\n" for path in row["paths"])


def trained_turns(row: dict) -> list[str]:
    """Return the texts of a conversation's turns that are learnt."""
    turns = [turn for turn in row["messages"] if turn["role"] == "assistant"]
    return [turn["content"] for turn in turns if turn.get("train", True)]


# the texts of a row that are supervised, and the token that ends each
SUPERVISED: dict[str, tuple[Callable[[dict], list[str]], str]] = {
    "wiki": (lambda row: [paths_text(row)], "</s>"),
    "price": (lambda row: [row["text"].split("Price is $")[1]], "<|end_of_text|>"),
    "kanana": (lambda row: [" " + row["answer"]], "<|end_of_text|>"),
    "instruct llama3": (trained_turns, "<|eot_id|>"),
    "instruct qwen2": (trained_turns, "<|im_end|>"),
}


@pytest.mark.parametrize("name", SUPERVISED)
def test_exactly_the_answers_are_supervised(
    name: str, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """In every row of the example file, by transformers' tokenizer.

    The labels are whole tokens of the text. They give the answer and its end, nothing more and
    nothing less.
    """
    run = runs(name)
    rows = read_rows(ROOT / "examples" / run.recipe.files / "train.jsonl")
    capsys.readouterr()
    documents = preview(run, tmp_path)
    log = capsys.readouterr().err
    assert f"{len(rows)} lines read, {len(rows)} kept, 0 dropped" in log
    assert "straddle" not in log
    assert [document["index"] for document in documents] == list(range(len(rows)))

    tokenizer = transformers.AutoTokenizer.from_pretrained(run.final)
    answers_of, end = SUPERVISED[name]
    for row, document in zip(rows, documents, strict=True):
        ids, labels = document["input_ids"], document["labels"]
        assert ids == tokenizer(document["text"], add_special_tokens=False).input_ids
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
        supervised = [label for label in labels if label != -100]
        found = tokenizer.decode(supervised, clean_up_tokenization_spaces=False)
        if name == "wiki":
            found = found.strip()  # sentencepiece puts a space before the first word
        assert found == "".join(answer + end for answer in answers_of(row))


def test_long_description_loses_its_end_and_keeps_the_price(runs: Runs, tmp_path: Path):
    documents = preview(runs("price"), tmp_path)
    rows = read_rows(ROOT / "examples/price/train.jsonl")
    assert max(len(document["input_ids"]) for document in documents) == 182

    shortened = []
    for document, row in zip(documents, rows, strict=True):
        if row["text"] not in document["text"]:
            shortened.append((document["text"], row["text"]))
    assert 5 < len(shortened) < len(rows)
    for text, whole in shortened:
        text = text.removeprefix("<|begin_of_text|>").removesuffix("<|end_of_text|>")
        description, price = text.split("Price is $")
        assert whole.startswith(description.rstrip()) and whole.endswith("Price is $" + price)
        assert description.endswith("\n\n"), "the blank line before the marker stays"


def tokens_before_last_answer(ids: list[int], labels: list[int]) -> list[int]:
    """Return the tokens before the last stretch of labels."""
    end = len(labels)
    while labels[end - 1] == -100:
        end -= 1
    begin = end
    while labels[begin - 1] != -100:
        begin -= 1
    return ids[:begin]


def test_row_is_asked_as_it_was_trained(run: Run, tmp_path: Path):
    """The prompt's tokens are those before the last answer in training, and transformers'."""
    documents = preview(run, tmp_path, "--data.train_file", str(run.eval_file))
    data = form_of(run)
    ours = Tokenizer(run.merged)
    theirs = transformers.AutoTokenizer.from_pretrained(run.merged)
    compared = 0
    for document, row in zip(documents, read_rows(run.eval_file), strict=True):
        if run.recipe.config == "price" and row["text"] not in document["text"]:
            continue  # it was shortened
        text = prompt_for_row(row, data, ours)
        asked = ours.encode(text).ids
        has_bos = theirs.bos_token is not None and text.startswith(theirs.bos_token)
        assert asked == theirs(text, add_special_tokens=not has_bos).input_ids
        assert asked == tokens_before_last_answer(document["input_ids"], document["labels"])
        compared += 1
    assert compared >= 2


ASKED = ("wiki", "price", "kanana", "instruct llama3", "full")


@pytest.mark.parametrize("name", ASKED)
def test_model_is_asked_alike_wherever_it_is(
    name: str, runs: Runs, home: Path, hub: Hub, tmp_path: Path
):
    """By infer.py and by `minilora.load`, without a word on bits or on the form of prompts.

    The arithmetic is float32: in 16 bits an adapter that is merged rounds otherwise than one that
    is not. The checkpoint is asked in the dtype of its training too.
    """
    if name == "full":
        places, files = places_of_full_model(home, hub), "wiki"
    else:
        places, files = places_of(runs(name)), RECIPES[name].files
    rows = read_rows(ROOT / "examples" / files / "eval.jsonl")[:3]

    expected = ask_with_load(places["checkpoint"], rows, "float32")
    assert len({ids for ids, _ in expected}) == len(rows)
    for where, place in places.items():
        assert ask_with_load(place, rows, "float32") == expected, where
        assert ask_with_infer(place, rows, "float32", tmp_path / where) == expected, where

    here, there = places["checkpoint"], places["on the hub"]
    assert ask_with_load(there, rows, "auto") == ask_with_load(here, rows, "auto")


Answers = list[tuple[tuple[int, ...], str]]
"""The ids of each prompt, and the answer to it."""
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.0, "stop": ()}


def ask_with_infer(place: Place, rows: list[dict], dtype: str, directory: Path) -> Answers:
    """Ask infer.py, which writes to a directory."""
    directory.mkdir()
    source, output = directory / "rows.jsonl", directory / "answers.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    seen: list[tuple[int, ...]] = []
    real = infer.encode_rows

    def encode_rows(writer: PromptWriter, rows: list[Row], source: str) -> dict:
        prompts = real(writer, rows, source)
        seen.extend(tuple(ids) for ids in prompts.values())
        return prompts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infer, "encode_rows", encode_rows)
        options = {"input": str(source), "output": str(output), "dtype": dtype, **GREEDY}
        assert infer.main(infer_args(place.model, adapter=place.adapter, **options)) == 0
    answers = [row["generated"] for row in read_rows(output)]
    return list(zip(seen, answers, strict=True))


def ask_with_load(place: Place, rows: list[dict], dtype: str) -> Answers:
    """Ask in Python."""
    model, tokenizer = minilora.load(place.model, place.adapter, dtype=dtype)
    prompts = [minilora.format_prompt(tokenizer, row) for row in rows]
    ids = [tuple(tokenizer.encode(prompt).ids) for prompt in prompts]
    answers = minilora.generate(model, tokenizer, prompts, **GREEDY)
    return list(zip(ids, answers, strict=True))


def test_price_by_its_id_is_measured_and_merged_as_it_was_trained(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture
):
    run = runs("price")
    output, out = tmp_path / "answers.jsonl", tmp_path / "merged"
    files = {"input": str(run.eval_file), "output": str(output)}
    options = {"metrics": ("numeric",), "max_new_tokens": 8}
    assert infer.main(infer_args(run.hub_id, **files, **options)) == 0
    figures = json.loads((tmp_path / "answers.metrics.json").read_text())
    assert figures["answers"] == len(read_rows(run.eval_file))
    assert figures["numeric/parsed"] > 0.5

    capsys.readouterr()
    assert merge.main(merge.Args(run.hub_id, out=str(out), verify=True)) == 0
    printed = capsys.readouterr().out
    assert "largest logit gap to the live 4-bit base + adapter" in printed
    local = (run.merged / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == local


# ---- the answers to the evaluation file


def own_scores(name: str, answers: list[str], wanted: list[str]) -> dict[str, float]:
    """Compute some figures of a metric here."""
    answers = [answer.strip() for answer in answers]
    wanted = [reference.strip() for reference in wanted]
    pairs = list(zip(answers, wanted, strict=True))
    if name == "graph":
        ours, true = edges_of(answers), edges_of(wanted)
        return {"graph/edge_f1": 2 * len(ours & true) / (len(ours) + len(true))}
    if name == "numeric":
        numbers = [(re.search(r"\d+(\.\d+)?", answer), float(value)) for answer, value in pairs]
        errors = [abs(float(found[0]) - value) for found, value in numbers if found]
        return {"numeric/parsed": len(errors) / len(pairs), "numeric/mae": fmean(errors)}
    if name == "exact_match":
        return {name: fmean(answer == reference for answer, reference in pairs)}
    if name == "chrf":
        return {name: sacrebleu.corpus_chrf(answers, [wanted]).score}
    if name == "bleu":
        return {name: sacrebleu.corpus_bleu(answers, [wanted]).score}
    if name == "edit_distance":
        return {name: fmean(levenshtein(a, w) / max(len(a), len(w)) for a, w in pairs)}
    return {}


def edges_of(texts: list[str]) -> set[tuple[str, str]]:
    """Return the edges of the paths that texts hold."""
    edges: set[tuple[str, str]] = set()
    for line in "\n".join(texts).split("\n"):
        path = [node.strip() for node in line.split(" -> ")]
        if all(path) and path[0] == "Main topic classifications":
            edges.update(itertools.pairwise(path))
    return edges


def levenshtein(a: str, b: str) -> int:
    """Return the edit distance of two strings."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            changed = diagonal if x == y else diagonal + 1
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, changed)
    return row[-1]


# the answer that a row of an example directory asks for
WANTED: dict[str, Callable[[dict], str]] = {
    "wiki": paths_text,
    "price": lambda row: row["text"].split("Price is $")[1],
    "kanana": lambda row: row["answer"],
    "instruct": lambda row: row["messages"][-1]["content"],
}


def test_evaluation_file_is_answered_and_scored(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture
):
    output, rows, names = tmp_path / "answers.jsonl", read_rows(run.eval_file), run.recipe.metrics
    args = infer_args(
        str(run.merged),
        input=str(run.eval_file),
        output=str(output),
        metrics=names,
        max_new_tokens=run.recipe.max_new_tokens,
    )
    assert infer.main(args) == 0
    printed = capsys.readouterr().out

    answers = read_rows(output)
    texts = [row.pop("generated") for row in answers]
    for row in (*answers, *rows):
        row.pop("id", None)
    assert answers == rows
    assert sum(bool(text.strip()) for text in texts) >= len(texts) / 2

    figures = json.loads((tmp_path / "answers.metrics.json").read_text())
    wanted = [WANTED[run.recipe.files](row) for row in rows]
    for name in names:
        expected = own_scores(name, texts, wanted)
        assert {key: figures[key] for key in expected} == pytest.approx(expected)
    assert figures["answers"] == len(rows)
    assert all(key in printed for key in figures)
    assert (tmp_path / "answers.graph.json").is_file() == ("graph" in names)
    if "ppl" in names:  # of the merged model in 16 bits what the run itself saw last
        last = list(events(run.whole, "eval/out_of_domain/ppl").values())[-1]
        assert figures["ppl"] == pytest.approx(last, rel=0.1)
    if run.recipe.config == "price":
        assert figures["numeric/parsed"] > 0.5, "it has learnt that a price is a number"


# ---- what only some recipes have


def test_price_uploads_its_checkpoints(runs: Runs):
    run = runs("price")
    repository = run.hub.repos["tester/price"]
    saves = sorted(events(run.whole, "checkpoint"))
    assert saves == [4, 8, 12, 16, 20, 24, 27]

    pattern = r"hub.push: pushed (\d+) of (\d+) checkpoints to \S+(?:, (\d+) superseded)?"
    found = re.search(pattern, run.train_log)
    assert found and "failed" not in run.train_log
    pushed, total, superseded = (int(number or 0) for number in found.groups())
    assert total == len(saves) == pushed + superseded
    assert repository.private and pushed < len(repository.commits)
    for name in ("adapter_model.safetensors", "tokenizer.json"):
        assert repository.files[name] == (run.final / name).read_bytes()


def test_price_trains_attention_only(runs: Runs):
    names = load_file(runs("price").final / "adapter_model.safetensors")
    modules = {name.split(".")[-3] for name in names}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_kanana_is_saved_each_epoch(runs: Runs):
    run = runs("kanana")
    rows = read_rows(run.whole / "metrics.jsonl")
    assert [row["epoch"] for row in rows if "checkpoint" in row] == [1, 2, 3, 4]
    states = load_file(run.final / "training_state.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in states.values()), "states in 8 bits"


EVERY_INSTRUCT = pytest.mark.parametrize("name", ["instruct llama3", "instruct qwen2"])


@EVERY_INSTRUCT
def test_instruct_stops_early_and_keeps_the_best(name: str, runs: Runs):
    run = runs(name)
    losses = run.eval_losses()
    best = min(losses, key=losses.__getitem__)
    five_after = list(range(best + 2, best + 11, 2))
    assert [step for step in losses if step > best] == five_after
    assert best > 0 and max(losses) < 80, "80 steps were asked for"
    assert f"best: checkpoint-{best}" in run.train_log
    assert (run.whole / f"checkpoint-{best}" / "adapter_model.safetensors").is_file()
    assert len(list(run.whole.glob("checkpoint-*"))) <= 4


@EVERY_INSTRUCT
def test_instruct_is_evaluated_before_it_learns(name: str, runs: Runs):
    """The first row is that of the base model, as transformers computes it."""
    run = runs(name)
    first = read_rows(run.whole / "metrics.jsonl")[0]
    assert first["step"] == 0 and first["epoch"] == 0
    for key in ("loss", "ppl", "bleu", "edit_distance", "rougeL", "meteor"):
        assert 0 in events(run.whole, f"eval/out_of_domain/{key}"), key
    expected = reference_loss(run, reference_model(run.base))
    assert run.eval_losses()[0] == pytest.approx(expected, rel=0.01)
    samples = read_rows(run.whole / "samples.jsonl")
    assert [row["step"] for row in samples[:8]] == [0] * 8


def reference_loss(run: Run, model: nn.Module) -> float:
    """Return the mean loss of the evaluation file's answers by transformers, a turn at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.final)
    _, end = SUPERVISED[f"instruct {run.recipe.family}"]
    total, count = 0.0, 0
    for row in read_rows(run.eval_file):
        turns = row["messages"]
        for i, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            prompt = tokenizer.apply_chat_template(
                turns[:i], add_generation_prompt=True, return_dict=False
            )
            answer = tokenizer(turn["content"] + end, add_special_tokens=False).input_ids
            logits = logits_of(model, torch.tensor(prompt + answer))[len(prompt) - 1 : -1]
            targets = torch.tensor(answer)
            total += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
            count += len(answer)
    return total / count


@EVERY_INSTRUCT
def test_instruct_evaluates_and_saves_the_average_of_its_weights(name: str, runs: Runs):
    run = runs(name)
    average, *weights = copy.deepcopy(run.weights)
    for step, after in enumerate(weights):
        decay = min(0.999, (1 + step) / (10 + step))
        for key, weight in after.items():
            average[key] = decay * average[key] + (1 - decay) * weight

    saved = load_file(run.final / "adapter_model.safetensors")
    assert len(saved) == len(average) and len(weights) == max(events(run.whole, "loss"))
    for key, tensor in average.items():
        found = saved[f"base_model.model.{key}.weight"]
        torch.testing.assert_close(found, tensor, rtol=1e-4, atol=1e-6)
        assert not torch.equal(found, weights[-1][key])
    last = list(run.eval_losses().values())[-1]
    expected = reference_loss(run, reference_model(run.base, adapter=run.final))
    assert last == pytest.approx(expected, rel=0.02)
