"""Each metric beside its library called directly, or, where ours differs from the library, beside its definition."""

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

from minilora.config import UserError
from minilora.evaluation import metrics
from minilora.evaluation.metrics import METRICS, lower_is_better, number, score, table, tokenize

ENGLISH = (
    "The quick brown foxes jumped over a lazy dog, running runs; it's 2 o'clock: foo_bar A/B 3.14 THE cat sat on the mat".split()
)
WORDS = {
    "english": ENGLISH,
    "mixed": [
        *ENGLISH,
        "한국어",
        "문장입니다",
        "机器学习",
        "日本語の",
        "カタカナ",
        "😀",
        "👩‍🔬",
        "café",
        "naïve",
        "Dvořák",
        "straße",
        "हिन्दी",
    ],
    "chinese": ["我们", "喜欢", "机器", "学习", "。", "的", "是", "人工智能", "A"],
    "korean": ["나는", "학교에", "갑니다", "오늘", "날씨가", "좋다.", "정말", "ok"],
}


def draw(words: list[str], count: int = 60, seed: int = 0) -> tuple[list[str], list[str]]:
    """Random pairs: some equal, some near, some empty on either side."""
    r = random.Random(seed)
    answers, references = [], []
    for i in range(count):
        reference = [r.choice(words) for _ in range(r.randrange(0, 16))]
        answer = [r.choice(words) if r.random() < 0.3 else w for w in reference if r.random() < 0.9]
        answers.append(" ".join(reference if i % 7 == 0 else [] if i % 11 == 0 else answer))
        references.append(" ".join(reference if i % 13 else []))
    return answers, references


PAIRS = {name: draw(words) for name, words in WORDS.items()}
every_language = pytest.mark.parametrize("language", PAIRS)


@every_language
def test_the_pairs_hold_what_they_should(language):
    answers, references = PAIRS[language]
    assert "" in answers and "" in references
    assert 0 < sum(a == r for a, r in zip(answers, references, strict=True)) < 30


@every_language
def test_exact_match_and_edit_distance(language):
    answers, references = PAIRS[language]
    figures = score(["exact_match", "edit_distance"], answers, references)
    assert figures == {
        "exact_match": np.mean([a == r for a, r in zip(answers, references, strict=True)]),
        "edit_distance": pytest.approx(
            np.mean([Levenshtein.normalized_distance(*p) for p in zip(answers, references, strict=True)])
        ),
    }


def test_edit_distance_by_hand():
    assert score(["edit_distance"], ["kitten", "", "abc"], ["sitting", "", ""]) == {
        "edit_distance": pytest.approx((3 / 7 + 0 + 1) / 3)
    }


@every_language
def test_bleu_and_chrf_are_sacrebleus(language):
    answers, references = PAIRS[language]
    tokenizer = {"english": "13a", "mixed": "13a", "chinese": "zh", "korean": "zh"}[language]
    bleu = sacrebleu.corpus_bleu(answers, [references], tokenize=tokenizer).score
    chrf = sacrebleu.corpus_chrf(answers, [references]).score
    assert 1 < bleu < 99 and 1 < chrf < 99
    assert score(["bleu", "chrf"], answers, references) == {"bleu": bleu, "chrf": chrf}


@pytest.mark.parametrize("text", ["我们喜欢机器学习和人工智能", "私はカタカナが好きです。ありがとう", "나는 오늘 학교에 갑니다"])
def test_bleu_takes_the_chinese_tokenizer_from_the_references_letters(text, monkeypatch):
    taken = []
    real = sacrebleu.BLEU

    def spy(**options):
        taken.append(options["tokenize"])
        return real(**options)

    monkeypatch.setattr(sacrebleu, "BLEU", spy)
    letters = sum(map(str.isalpha, text))
    latin = "x" * letters
    for answers, references in (
        ([latin], [text]),
        ([text], [latin]),
        ([text], [text + latin]),
        ([text], [text + latin[1:] + "1!"]),
    ):
        score(["bleu"], answers, references)
    assert taken == ["zh", "13a", "13a", "zh"]


def test_chinese_bleu_sees_words_without_spaces():
    pair = ["今天的天气非常好我们去公园散步"], ["今天的天气非常好我们去学校上课"]
    assert score(["bleu"], *pair)["bleu"] > 40  # one long word to "13a"
    assert sacrebleu.corpus_bleu(pair[0], [pair[1]], tokenize="13a").score < 1


# ---- words


@pytest.mark.parametrize("seed", range(5))
def test_tokens_of_ascii_are_those_of_rouge_score(seed):
    r = random.Random(seed)
    for _ in range(200):
        text = "".join(chr(r.randrange(128)) for _ in range(r.randrange(60)))
        assert tokenize(text) == [t for t in re.split(r"[^a-z0-9]+", text.lower()) if t], ascii(text)


@pytest.mark.parametrize(
    ("text", "tokens"),
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
def test_tokens_of_other_scripts(text, tokens):
    assert tokenize(text) == tokens


# ---- ROUGE


def test_rouge_of_ascii_is_the_librarys_own():
    answers, references = PAIRS["english"]
    keys = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(keys, use_stemmer=False)  # with its own tokenizer
    scores = [scorer.score(r, a) for a, r in zip(answers, references, strict=True)]
    expected = {key: pytest.approx(np.mean([s[key].fmeasure for s in scores])) for key in keys}
    assert score(["rouge"], answers, references) == expected


@every_language
def test_rouge_is_the_librarys_of_words_spelled_in_ascii(language):
    """Every token, whatever its script, replaced by an ASCII word, as the library's own tokenizer reads them."""
    answers, references = PAIRS[language]
    names: dict[str, str] = {}

    def spell(text: str) -> str:
        return " ".join(names.setdefault(token, f"w{len(names)}") for token in tokenize(text))

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    scores = [scorer.score(spell(r), spell(a)) for a, r in zip(answers, references, strict=True)]
    figures = score(["rouge"], answers, references)
    for key in ("rouge1", "rouge2", "rougeL"):
        assert 0.1 < figures[key] < 0.99
        assert figures[key] == pytest.approx(np.mean([s[key].fmeasure for s in scores]))


def test_rouge_by_hand():
    figures = score(["rouge"], ["机器会学习"], ["机器学习好"])  # 4 of 5 characters, 2 of 4 pairs (机器, 学习), 4 in order
    assert figures == pytest.approx({"rouge1": 0.8, "rouge2": 0.5, "rougeL": 0.8})


# ---- METEOR


def meteor(reference: list[str], answer: list[str]) -> float:
    """From the definition, words taken from the last to the first, each to the last free one, as nltk breaks ties."""
    stem = PorterStemmer().stem
    partner: dict[int, int] = {}
    for form in (str, stem):
        for i in reversed(range(len(answer))):
            free = [j for j in range(len(reference)) if j not in partner.values() and form(reference[j]) == form(answer[i])]
            if i not in partner and free:
                partner[i] = free[-1]
    if not partner:
        return 0.0
    aligned = sorted(partner.items())
    chunks = 1 + sum(b != (a[0] + 1, a[1] + 1) for a, b in pairwise(aligned))
    precision, recall = len(aligned) / len(answer), len(aligned) / len(reference)
    fmean = 10 * precision * recall / (recall + 9 * precision)
    return fmean * (1 - 0.5 * (chunks / len(aligned)) ** 3)


@every_language
def test_meteor(language):
    answers, references = PAIRS[language]
    pairs = [(tokenize(r), tokenize(a)) for a, r in zip(answers, references, strict=True)]
    figure = score(["meteor"], answers, references)["meteor"]
    assert 0.1 < figure < 0.99
    assert figure == pytest.approx(np.mean([meteor(*pair) for pair in pairs]))
    stub = SimpleNamespace(synsets=lambda word: [])
    assert figure == pytest.approx(
        np.mean([nltk.translate.meteor_score.single_meteor_score(*pair, wordnet=stub) for pair in pairs])
    )


def test_meteor_by_hand():
    # 3 of 4 and of 3 words (runs ~ running by stem), chunks (the, dog) and (running): P 3/4, R 1
    fmean = 10 * 0.75 / (1 + 9 * 0.75)
    assert score(["meteor"], ["The dog quickly runs"], ["the dog running"]) == {
        "meteor": pytest.approx(fmean * (1 - 0.5 * (2 / 3) ** 3))
    }
    assert score(["meteor"], ["big"], ["large"]) == {"meteor": 0}  # synonyms are not looked up
    assert score(["meteor"], ["一二三"], ["一二三"]) == {"meteor": pytest.approx(1 - 0.5 / 27)}


# ---- numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Price is $1,299.00", 1299), ("$199.99", 199.99), ("-3.5", -3.5), ("1e3", 1000), ("2.5E-2x", 0.025), ("−7", -7),
        ("-$3.50", -3.5), ("12,345,678.5 won", 12345678.5), ("₩12,000", 12000), (".5 l", 0.5), ("3,50 €", 3), ("1,2345", 1),
        ("2020,100", 2020), ("10-20", 10), ("A-3", 3), ("3 eggs", 3), ("3eggs", 3), ("5.", 5), ("v1.2.3", 1.2), ("٤٢", 42),
        ("USD 20 or 30", 20), ("x = +8", 8), ("(-2)", -2), ("00012", 12), ("no", None), ("", None), ("e3", 3),
        ("- 5 apples", 5), ("1e999", None), ("9" * 400, None), ("nan inf", None), ("一", None), ("1 299", 1),
    ],
)  # fmt: skip
def test_the_first_number_of_a_text(text, value):
    assert number(text) == value


def test_numeric_by_hand():
    answers = ["about $120", "-10", "none", "1,000", "79.9", "0"]
    references = ["$100", "5", "7", "1000", "100", "0.0"]
    assert score(["numeric"], answers, references) == {
        "numeric/parsed": 5 / 6,
        "numeric/within_20": 3 / 6,  # 120 just so, 1000, 0
        "numeric/mae": pytest.approx((20 + 15 + 0 + 20.1 + 0) / 5),
        "numeric/rmsle": pytest.approx(math.sqrt((math.log(121 / 101) ** 2 + math.log(6) ** 2 + math.log(80.9 / 101) ** 2) / 5)),
    }


def test_numeric_beside_numpy():
    r = np.random.default_rng(0)
    truth = np.round(r.uniform(-50, 1000, 80), 2)
    guess = np.round(truth * r.uniform(0.6, 1.4, 80), 2)
    figures = score(["numeric"], [f"costs {g:,.2f} dollars" for g in guess], [f"{t}" for t in truth])
    logs = np.log1p(np.maximum(guess, 0)) - np.log1p(np.maximum(truth, 0))
    assert figures == {
        "numeric/parsed": 1,
        "numeric/within_20": np.mean(np.abs(guess - truth) <= 0.2 * np.abs(truth)),
        "numeric/mae": pytest.approx(np.abs(guess - truth).mean()),
        "numeric/rmsle": pytest.approx(np.sqrt((logs**2).mean())),
    }


def test_numeric_without_numbers():
    assert score(["numeric"], ["a", "b"], ["1", "2"]) == {"numeric/parsed": 0, "numeric/within_20": 0}
    with pytest.raises(UserError, match=r"numeric: reference 2 of 3 holds no number: 'cheap'"):
        score(["numeric"], ["1", "2", "3"], ["1", "cheap", "dear"])


# ---- all of them

ALL = [name for name in METRICS if name not in ("numeric", "graph")]
BEST = {"exact_match": 1, "bleu": 100, "chrf": 100, "rouge1": 1, "rouge2": 1, "rougeL": 1, "edit_distance": 0}


@every_language
def test_perfect_answers(language):
    texts = [text for text in PAIRS[language][1] if len(tokenize(text)) > 1]
    figures = score(ALL, [f"\n{text} " for text in texts], [f" {text}\n" for text in texts])
    perfect = np.mean([1 - 0.5 / len(tokenize(text)) ** 3 for text in texts])
    assert figures == pytest.approx({**BEST, "meteor": perfect})
    assert list(figures) == ["exact_match", "bleu", "chrf", "rouge1", "rouge2", "rougeL", "meteor", "edit_distance"]


def test_perfect_numbers_and_paths():
    texts = ["A 1 -> B\nA 1 -> C -> D", "A 1"]
    figures = score(["numeric", "graph"], texts, texts)
    assert figures == {
        "numeric/parsed": 1, "numeric/within_20": 1, "numeric/mae": 0, "numeric/rmsle": 0, "graph/lines": 3,
        "graph/well_formed": 1, "graph/nodes": 4, "graph/edges": 3,
        **{f"graph/{what}_{figure}": 1 for what in ("edge", "node") for figure in ("precision", "recall", "f1")},
    }  # fmt: skip


@every_language
def test_worst_answers(language):
    texts = [text for text in PAIRS[language][1] if text]
    figures = score(ALL, [""] * len(texts), texts)
    assert figures == {**dict.fromkeys([*BEST, "meteor"], 0), "edit_distance": 1}


@every_language
def test_the_order_of_pairs_changes_nothing(language):
    answers, references = PAIRS[language]
    order = random.Random(1).sample(range(len(answers)), len(answers))
    shuffled = [answers[i] for i in order], [references[i] for i in order]
    assert score(ALL, *shuffled) == pytest.approx(score(ALL, answers, references), rel=1e-12)


def test_only_what_is_asked_for():
    assert score([], ["a"], ["b"]) == {}
    assert score(["loss", "ppl"], ["a"], ["b"]) == {}
    assert score(("exact_match", "exact_match"), ["a"], ["b"]) == {"exact_match": 0}


def test_bad_requests():
    with pytest.raises(UserError, match=r"eval\.metrics: no metric 'rogue'; did you mean 'rouge'\?.*edit_distance"):
        metrics.check(["bleu", "rogue"], "eval.metrics")
    with pytest.raises(UserError, match="no metric 'blue'"):
        score(["blue"], ["a"], ["a"])
    for answers, references in ([], []), (["a"], []), (["a"], ["b", "c"]):
        with pytest.raises(UserError, match=f"metrics: {len(answers)} answers and {len(references)} references"):
            score(["exact_match"], answers, references)


def test_what_is_installed_passes():
    metrics.check(list(METRICS), "eval.metrics")


@pytest.mark.parametrize(
    ("name", "library"),
    [
        ("bleu", "sacrebleu"),
        ("chrf", "sacrebleu"),
        ("rouge", "rouge_score"),
        ("meteor", "nltk"),
        ("edit_distance", "rapidfuzz"),
        ("graph", "networkx"),
    ],
)
def test_a_missing_library_is_named(name, library, monkeypatch):
    real = importlib.metadata.distributions
    monkeypatch.setattr(
        importlib.metadata, "distributions", lambda **context: iter(()) if context.get("name") == library else real(**context)
    )
    others = [other for other in METRICS if METRICS[other] != library]
    metrics.check(others, "eval.metrics")
    with pytest.raises(UserError, match=rf"eval\.metrics: {name} needs {library}.*pip install 'minilora\[eval\]'"):
        metrics.check([*others, name], "eval.metrics")


def test_lower_is_better():
    lower = {"loss", "ppl", "edit_distance", "numeric/mae", "numeric/rmsle"}
    higher = {
        "exact_match",
        "bleu",
        "chrf",
        "rougeL",
        "meteor",
        "numeric/within_20",
        "numeric/parsed",
        "graph/edge_f1",
        "gloss",
        "mae",
    }
    for prefix in ("", "eval/", "eval/in_domain/"):
        assert {key for key in lower | higher if lower_is_better(prefix + key)} == lower


def test_table():
    assert table({"bleu": 12.345678, "graph/lines": 1234, "loss": 0.5}) == (
        "bleu         12.3457\n"
        "graph/lines    1,234\n"
        "loss          0.5000"
    )  # fmt: skip
    assert table({}) == ""
