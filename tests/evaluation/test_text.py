"""Every metric of texts against its library called directly, or against its definition."""

import importlib.metadata
import math
import random
import re
from itertools import pairwise
from types import SimpleNamespace

import nltk.translate.meteor_score  # type: ignore[import-untyped]
import numpy as np
import pytest
import sacrebleu
from nltk.stem.porter import PorterStemmer  # type: ignore[import-untyped]
from rapidfuzz.distance import Levenshtein
from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

from minilora.errors import UserError
from minilora.evaluation.text import (
    METRICS,
    check_metrics,
    format_table,
    lower_is_better,
    parse_number,
    score,
    split_words,
)

ENGLISH = (
    "The quick brown foxes jumped over a lazy dog, running runs; it's 2 o'clock: foo_bar A/B 3.14 "
    "THE cat sat on the mat"
).split()
OTHER_SCRIPTS = (
    "한국어 문장입니다 机器学习 日本語の カタカナ 😀 👩‍🔬 café naïve Dvořák straße हिन्दी".split()
)
WORDS = {
    "english": ENGLISH,
    "mixed": ENGLISH + OTHER_SCRIPTS,
    "chinese": "我们 喜欢 机器 学习 。 的 是 人工智能 A".split(),
    "korean": "나는 학교에 갑니다 오늘 날씨가 좋다. 정말 ok".split(),
}
ROUGE_KEYS = ["rouge1", "rouge2", "rougeL"]


def draw_pairs(words: list[str], count: int = 60, seed: int = 0) -> tuple[list[str], list[str]]:
    """Draw answers and references: some pairs are equal, some near, some empty on either side."""
    rng = random.Random(seed)
    answers, references = [], []
    for i in range(count):
        reference = [rng.choice(words) for _ in range(rng.randrange(0, 16))]
        answer = []
        for word in reference:
            if rng.random() < 0.9:
                answer.append(rng.choice(words) if rng.random() < 0.3 else word)
        if i % 7 == 0:
            answer = reference
        elif i % 11 == 0:
            answer = []
        answers.append(" ".join(answer))
        references.append(" ".join(reference) if i % 13 else "")
    return answers, references


PAIRS = {language: draw_pairs(words) for language, words in WORDS.items()}
every_language = pytest.mark.parametrize("language", PAIRS)


@every_language
def test_the_drawn_pairs_hold_what_the_tests_need(language):
    answers, references = PAIRS[language]
    num_equal = sum(a == r for a, r in zip(answers, references, strict=True))
    assert "" in answers and "" in references
    assert 0 < num_equal < 30


@every_language
def test_exact_match_and_edit_distance(language):
    answers, references = PAIRS[language]
    pairs = list(zip(answers, references, strict=True))
    distance = np.mean([Levenshtein.normalized_distance(a, r) for a, r in pairs])
    assert score(["exact_match", "edit_distance"], answers, references) == {
        "exact_match": np.mean([a == r for a, r in pairs]),
        "edit_distance": pytest.approx(distance),
    }


def test_edit_distance_by_hand():
    figures = score(["edit_distance"], ["kitten", "", "abc"], ["sitting", "", ""])
    assert figures == {"edit_distance": pytest.approx((3 / 7 + 0 + 1) / 3)}


@every_language
def test_bleu_and_chrf_are_sacrebleus(language):
    answers, references = PAIRS[language]
    tokenizers = {"english": "13a", "mixed": "13a", "chinese": "zh", "korean": "zh"}
    bleu = sacrebleu.corpus_bleu(answers, [references], tokenize=tokenizers[language]).score
    chrf = sacrebleu.corpus_chrf(answers, [references]).score
    assert 1 < bleu < 99 and 1 < chrf < 99
    assert score(["bleu", "chrf"], answers, references) == {"bleu": bleu, "chrf": chrf}


@pytest.mark.parametrize(
    "text",
    ["我们喜欢机器学习和人工智能", "私はカタカナが好きです。ありがとう", "나는 오늘 학교에 갑니다"],
)
def test_bleu_chooses_its_tokenizer_by_the_letters_of_the_references(text, monkeypatch):
    tokenizers = []
    real = sacrebleu.BLEU

    def spy(**options):
        tokenizers.append(options["tokenize"])
        return real(**options)

    monkeypatch.setattr(sacrebleu, "BLEU", spy)
    latin = "x" * sum(map(str.isalpha, text))
    half_and_one_more = text + latin[1:] + "1!"
    score(["bleu"], [latin], [text])
    score(["bleu"], [text], [latin])
    score(["bleu"], [text], [text + latin])
    score(["bleu"], [text], [half_and_one_more])
    assert tokenizers == ["zh", "13a", "13a", "zh"]


def test_bleu_of_chinese_splits_words_without_spaces():
    answers, references = ["今天的天气非常好我们去公园散步"], ["今天的天气非常好我们去学校上课"]
    assert score(["bleu"], answers, references)["bleu"] > 40
    # to the tokenizer "13a" each text is one long word
    assert sacrebleu.corpus_bleu(answers, [references], tokenize="13a").score < 1


# --- words


@pytest.mark.parametrize("seed", range(5))
def test_words_of_ascii_are_those_of_rouge_score(seed):
    rng = random.Random(seed)
    for _ in range(200):
        text = "".join(chr(rng.randrange(128)) for _ in range(rng.randrange(60)))
        expected = [word for word in re.split(r"[^a-z0-9]+", text.lower()) if word]
        assert split_words(text) == expected, ascii(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("  \n", []),
        ("机器学习ABC是", ["机", "器", "学", "习", "abc", "是"]),
        ("日本語のカタカナ・ー！", [*"日本語のカタカナー"]),
        ("ｶﾅ々〇", [*"ｶﾅ々〇"]),
        ("𠀀a𪜀", ["𠀀", "a", "𪜀"]),
        ("한국어 문장입니다.", ["한국어", "문장입니다"]),
        ("한국어K팝", ["한국어k팝"]),
        ("Café STRASSE straße foo_bar", ["café", "strasse", "straße", "foo", "bar"]),
        ("cafe\u0301", ["café"]),  # decomposed
        ("हिन्दी में", ["हिन्दी", "में"]),  # vowel signs belong to their word
        ("😀 ❤️ 👩‍🔬 —!", []),
        ("x❤️y", ["x", "y"]),
        ("Привет, МИР 42", ["привет", "мир", "42"]),
    ],
)
def test_words_of_other_scripts(text, words):
    assert split_words(text) == words


# --- ROUGE


def test_rouge_of_ascii_is_the_librarys():
    answers, references = PAIRS["english"]
    scorer = RougeScorer(ROUGE_KEYS, use_stemmer=False)  # with its own tokenizer
    scores = [scorer.score(r, a) for a, r in zip(answers, references, strict=True)]
    expected = {key: np.mean([each[key].fmeasure for each in scores]) for key in ROUGE_KEYS}
    assert score(["rouge"], answers, references) == pytest.approx(expected)


@every_language
def test_rouge_is_the_librarys_of_words_spelled_in_ascii(language):
    """Each word of any script is replaced by a word that the library's own tokenizer can read."""
    answers, references = PAIRS[language]
    spellings: dict[str, str] = {}

    def spell(text: str) -> str:
        words = split_words(text)
        return " ".join(spellings.setdefault(word, f"w{len(spellings)}") for word in words)

    scorer = RougeScorer(ROUGE_KEYS)
    pairs = zip(answers, references, strict=True)
    scores = [scorer.score(spell(r), spell(a)) for a, r in pairs]
    figures = score(["rouge"], answers, references)
    for key in ROUGE_KEYS:
        assert 0.1 < figures[key] < 0.99
        assert figures[key] == pytest.approx(np.mean([each[key].fmeasure for each in scores]))


def test_rouge_by_hand():
    # in common: 4 of 5 characters, 2 of 4 pairs of characters (机器, 学习), 4 characters in order
    figures = score(["rouge"], ["机器会学习"], ["机器学习好"])
    assert figures == pytest.approx({"rouge1": 0.8, "rouge2": 0.5, "rougeL": 0.8})


# --- METEOR


def meteor(reference: list[str], answer: list[str]) -> float:
    """Compute METEOR from its definition.

    Words are aligned from the last to the first, each to the last free one: nltk breaks ties so.
    """
    stem = PorterStemmer().stem
    partner: dict[int, int] = {}
    for form in (str, stem):
        for i in reversed(range(len(answer))):
            free = [j for j in range(len(reference)) if j not in partner.values()]
            equal = [j for j in free if form(reference[j]) == form(answer[i])]
            if i not in partner and equal:
                partner[i] = equal[-1]
    if not partner:
        return 0.0

    aligned = sorted(partner.items())
    chunks = 1 + sum(b != (a[0] + 1, a[1] + 1) for a, b in pairwise(aligned))
    precision, recall = len(aligned) / len(answer), len(aligned) / len(reference)
    harmonic_mean = 10 * precision * recall / (recall + 9 * precision)
    return harmonic_mean * (1 - 0.5 * (chunks / len(aligned)) ** 3)


@every_language
def test_meteor_is_nltks_and_follows_its_definition(language):
    answers, references = PAIRS[language]
    pairs = [(split_words(r), split_words(a)) for a, r in zip(answers, references, strict=True)]
    figure = score(["meteor"], answers, references)["meteor"]
    assert 0.1 < figure < 0.99
    assert figure == pytest.approx(np.mean([meteor(*pair) for pair in pairs]))
    no_synonyms = SimpleNamespace(synsets=lambda word: [])
    single_meteor_score = nltk.translate.meteor_score.single_meteor_score
    theirs = [single_meteor_score(*pair, wordnet=no_synonyms) for pair in pairs]
    assert figure == pytest.approx(np.mean(theirs))


def test_meteor_by_hand():
    # 3 of the 4 and of the 3 words are aligned (runs and running by their stem), in the chunks
    # (the, dog) and (running): precision 3/4, recall 1
    harmonic_mean = 10 * 0.75 / (1 + 9 * 0.75)
    figures = score(["meteor"], ["The dog quickly runs"], ["the dog running"])
    assert figures == {"meteor": pytest.approx(harmonic_mean * (1 - 0.5 * (2 / 3) ** 3))}
    assert score(["meteor"], ["big"], ["large"]) == {"meteor": 0}  # synonyms are not looked up
    assert score(["meteor"], ["一二三"], ["一二三"]) == {"meteor": pytest.approx(1 - 0.5 / 27)}


# --- numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Price is $1,299.00", 1299), ("$199.99", 199.99), ("-3.5", -3.5), ("1e3", 1000),
        ("2.5E-2x", 0.025), ("−7", -7), ("-$3.50", -3.5), ("12,345,678.5 won", 12345678.5),
        ("₩12,000", 12000), (".5 l", 0.5), ("3,50 €", 3), ("1,2345", 1), ("2020,100", 2020),
        ("10-20", 10), ("A-3", 3), ("3 eggs", 3), ("3eggs", 3), ("5.", 5), ("v1.2.3", 1.2),
        ("٤٢", 42), ("USD 20 or 30", 20), ("x = +8", 8), ("(-2)", -2), ("00012", 12),
        ("no", None), ("", None), ("e3", 3), ("- 5 apples", 5), ("1e999", None),
        ("9" * 400, None), ("nan inf", None), ("一", None), ("1 299", 1),
    ],
)  # fmt: skip
def test_the_first_number_of_a_text(text, value):
    assert parse_number(text) == value


def test_numeric_by_hand():
    answers = ["about $120", "-10", "none", "1,000", "79.9", "0"]
    references = ["$100", "5", "7", "1000", "100", "0.0"]
    squares = math.log(121 / 101) ** 2 + math.log(6) ** 2 + math.log(80.9 / 101) ** 2
    assert score(["numeric"], answers, references) == {
        "numeric/parsed": 5 / 6,
        "numeric/within_20": 3 / 6,  # 120 just so, 1000, 0
        "numeric/mae": pytest.approx((20 + 15 + 0 + 20.1 + 0) / 5),
        "numeric/rmsle": pytest.approx(math.sqrt(squares / 5)),
    }


def test_numeric_against_numpy():
    rng = np.random.default_rng(0)
    truth = np.round(rng.uniform(-50, 1000, 80), 2)
    guess = np.round(truth * rng.uniform(0.6, 1.4, 80), 2)
    answers = [f"costs {value:,.2f} dollars" for value in guess]
    references = [f"{value}" for value in truth]
    logs = np.log1p(np.maximum(guess, 0)) - np.log1p(np.maximum(truth, 0))
    assert score(["numeric"], answers, references) == {
        "numeric/parsed": 1,
        "numeric/within_20": np.mean(np.abs(guess - truth) <= 0.2 * np.abs(truth)),
        "numeric/mae": pytest.approx(np.abs(guess - truth).mean()),
        "numeric/rmsle": pytest.approx(np.sqrt((logs**2).mean())),
    }


def test_numeric_where_numbers_are_missing():
    figures = score(["numeric"], ["a", "b"], ["1", "2"])
    assert figures == {"numeric/parsed": 0, "numeric/within_20": 0}
    with pytest.raises(UserError, match=r"numeric: reference 2 of 3 holds no number: 'cheap'"):
        score(["numeric"], ["1", "2", "3"], ["1", "cheap", "dear"])


# --- all metrics together

OF_ANY_TEXT = [name for name in METRICS if name not in ("numeric", "graph", "ontology")]
PERFECT = {
    "exact_match": 1,
    "bleu": 100,
    "chrf": 100,
    "rouge1": 1,
    "rouge2": 1,
    "rougeL": 1,
    "edit_distance": 0,
}


@every_language
def test_perfect_answers_have_the_best_figures(language):
    texts = [text for text in PAIRS[language][1] if len(split_words(text)) > 1]
    answers, references = [f"\n{text} " for text in texts], [f" {text}\n" for text in texts]
    figures = score(OF_ANY_TEXT, answers, references)
    best_meteor = np.mean([1 - 0.5 / len(split_words(text)) ** 3 for text in texts])
    assert figures == pytest.approx({**PERFECT, "meteor": best_meteor})
    order = "exact_match bleu chrf rouge1 rouge2 rougeL meteor edit_distance"
    assert list(figures) == order.split()


def test_perfect_numbers_and_paths_have_the_best_figures():
    texts = ["A 1 -> B\nA 1 -> C -> D", "A 1 -> B"]
    assert score(["numeric", "graph"], texts, texts) == {
        "numeric/parsed": 1,
        "numeric/within_20": 1,
        "numeric/mae": 0,
        "numeric/rmsle": 0,
        "graph/lines": 3,
        "graph/well_formed": 1,
        "graph/nodes": 4,
        "graph/edges": 3,
        "graph/edge_precision": 1,
        "graph/edge_recall": 1,
        "graph/edge_f1": 1,
        "graph/node_precision": 1,
        "graph/node_recall": 1,
        "graph/node_f1": 1,
    }


@every_language
def test_empty_answers_have_the_worst_figures(language):
    texts = [text for text in PAIRS[language][1] if text]
    figures = score(OF_ANY_TEXT, [""] * len(texts), texts)
    assert figures == {**dict.fromkeys([*PERFECT, "meteor"], 0), "edit_distance": 1}


@every_language
def test_the_order_of_pairs_changes_nothing(language):
    answers, references = PAIRS[language]
    order = random.Random(1).sample(range(len(answers)), len(answers))
    shuffled = score(OF_ANY_TEXT, [answers[i] for i in order], [references[i] for i in order])
    assert shuffled == pytest.approx(score(OF_ANY_TEXT, answers, references), rel=1e-12)


def test_only_the_named_metrics_are_computed():
    assert score([], ["a"], ["b"]) == {}
    assert score(["loss", "ppl"], ["a"], ["b"]) == {}
    assert score(("exact_match", "exact_match"), ["a"], ["b"]) == {"exact_match": 0}


def test_unknown_metrics_and_unpaired_answers_are_refused():
    message = r"eval\.metrics: no metric 'rogue'; did you mean 'rouge'\?.*edit_distance"
    with pytest.raises(UserError, match=message):
        check_metrics(["bleu", "rogue"], "eval.metrics")
    with pytest.raises(UserError, match="no metric 'blue'"):
        score(["blue"], ["a"], ["a"])
    for answers, references in ([], []), (["a"], []), (["a"], ["b", "c"]):
        message = f"metrics: {len(answers)} answers and {len(references)} references"
        with pytest.raises(UserError, match=message):
            score(["exact_match"], answers, references)


def test_all_metrics_pass_the_check_where_everything_is_installed():
    check_metrics(list(METRICS), "eval.metrics")


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("bleu", "sacrebleu"),
        ("chrf", "sacrebleu"),
        ("rouge", "rouge_score"),
        ("meteor", "nltk"),
        ("edit_distance", "rapidfuzz"),
        ("graph", "networkx"),
        ("ontology", "sentence_transformers"),
    ],
)
def test_a_missing_library_is_named(name, library, monkeypatch):
    real = importlib.metadata.distributions

    def without_library(**context):
        return iter(()) if context.get("name") == library else real(**context)

    monkeypatch.setattr(importlib.metadata, "distributions", without_library)
    others = [other for other in METRICS if METRICS[other] != library]
    check_metrics(others, "eval.metrics")
    extra = "ontology" if name == "ontology" else "eval"
    message = rf"eval\.metrics: {name} needs {library}.*pip install 'minilora\[{extra}\]'"
    with pytest.raises(UserError, match=message):
        check_metrics([*others, name], "eval.metrics")


def test_lower_is_better():
    lower = {"loss", "ppl", "edit_distance", "numeric/mae", "numeric/rmsle"}
    higher = {"exact_match", "bleu", "chrf", "rougeL", "meteor", "numeric/within_20"}
    higher |= {"numeric/parsed", "graph/edge_f1", "gloss", "mae"}
    for prefix in ("", "eval/", "eval/in_domain/"):
        assert {key for key in lower | higher if lower_is_better(prefix + key)} == lower


def test_format_table():
    figures = {"bleu": 12.345678, "graph/lines": 1234, "loss": 0.5}
    lines = ["bleu         12.3457", "graph/lines    1,234", "loss          0.5000"]
    assert format_table(figures) == "\n".join(lines)
    assert format_table({}) == ""
