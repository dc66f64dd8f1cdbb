"""What answers are worth beside their references. Space around an answer or reference counts for nothing."""

import importlib.metadata
import math
import re
import types
import unicodedata
from collections.abc import Sequence
from statistics import fmean

from minilora.config import UserError, nearest
from minilora.evaluation import graph

METRICS = {
    "loss": "", "ppl": "", "exact_match": "", "bleu": "sacrebleu", "chrf": "sacrebleu", "rouge": "rouge_score",
    "meteor": "nltk", "edit_distance": "rapidfuzz", "numeric": "", "graph": "networkx",
}  # fmt: skip
"""What a user may ask for, and the library that computes it. "loss" and "ppl" are the model's: here they are only names."""
LOWER_IS_BETTER = ("loss", "ppl", "edit_distance", "numeric/mae", "numeric/rmsle")

IDEOGRAPH = re.compile("[\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]")
HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3]")
# a sign that does not join two words, a currency, digits, perhaps in threes, a fraction, an exponent
NUMBER = re.compile(r"((?<!\w)[-−])?[$€£¥₩]?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:e[-+]?\d+)?|\.\d+)", re.IGNORECASE)


def check(names: Sequence[str], where: str) -> None:
    """Raises UserError, naming the setting `where`, for a metric that does not exist or whose library is not installed."""
    for name in names:
        if name not in METRICS:
            raise UserError(f"{where}: no metric {name!r}{nearest(name, METRICS)}; there are {', '.join(METRICS)}")
        if METRICS[name] and not any(importlib.metadata.distributions(name=METRICS[name])):
            raise UserError(f"{where}: {name} needs {METRICS[name]}, which is not installed (pip install 'minilora[eval]')")


def score(names: Sequence[str], answers: list[str], references: list[str]) -> dict[str, float | int]:
    """The figures of the named metrics over all pairs of answer and reference. Means over pairs are 0 .. 1.

    exact_match: the share of answers that are their reference.
    bleu, chrf: sacrebleu's corpus scores with its defaults, 0 .. 100 (Papineni et al. 2002; Popović 2015). BLEU's tokenizer
    is "13a", or "zh" where most letters of the references are Chinese, Japanese or Korean (kana and Hangul stay words).
    rouge: rouge1, rouge2, rougeL, the means of rouge-score's F1, unstemmed, over the words of `tokenize` (Lin 2004).
    meteor: the mean of nltk's METEOR with its defaults over the words of `tokenize` (Banerjee & Lavie 2005). Words match
    exactly or by Porter stem, not as synonyms: WordNet is data to download. A perfect answer of m words has 1 - 0.5 / m^3.
    edit_distance: the mean Levenshtein distance in characters over the longer text's length, 0 if equal.
    numeric: see `_numeric`. graph: `graph.score` without thresholds, keys with the prefix "graph/".
    Raises UserError for what `check` refuses, for no answers, and for a reference that numeric or graph cannot read.
    """
    check(names, "metrics")
    if not answers or len(answers) != len(references):
        raise UserError(f"metrics: {len(answers)} answers and {len(references)} references; expected one or more pairs")
    answers, references = [text.strip() for text in answers], [text.strip() for text in references]
    return {key: value for name in names for key, value in _figures(name, answers, references).items()}


def _figures(name: str, answers: list[str], references: list[str]) -> dict[str, float | int]:
    pairs = list(zip(answers, references, strict=True))
    match name:
        case "exact_match":
            return {name: fmean([a == r for a, r in pairs])}
        case "bleu" | "chrf":
            from sacrebleu import BLEU, CHRF

            letters = [c for c in "".join(references) if c.isalpha()]
            cjk = sum(bool(IDEOGRAPH.match(c) or HANGUL.match(c)) for c in letters)
            metric = CHRF() if name == "chrf" else BLEU(tokenize="zh" if 2 * cjk > len(letters) else "13a")
            return {name: metric.corpus_score(answers, [references]).score}
        case "rouge":
            from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

            keys = ["rouge1", "rouge2", "rougeL"]
            scorer = RougeScorer(keys, tokenizer=types.SimpleNamespace(tokenize=tokenize))
            scores = [scorer.score(r, a) for a, r in pairs]
            return {key: fmean([each[key].fmeasure for each in scores]) for key in keys}
        case "meteor":
            from nltk.translate.meteor_score import single_meteor_score  # type: ignore[import-untyped]

            wordnet = types.SimpleNamespace(synsets=lambda word: [])
            return {name: fmean([single_meteor_score(tokenize(r), tokenize(a), wordnet=wordnet) for a, r in pairs])}
        case "edit_distance":
            from rapidfuzz.distance import Levenshtein

            return {name: fmean([Levenshtein.normalized_distance(a, r) for a, r in pairs])}
        case "numeric":
            return _numeric(answers, references)
        case "graph":
            return {f"graph/{key}": value for key, value in graph.score(answers, references)[0].items()}
    return {}  # loss, ppl


def _numeric(answers: list[str], references: list[str]) -> dict[str, float | int]:
    """The first number of each answer beside that of its reference. Raises UserError for a reference without one.

    parsed: the share of answers with a number. within_20: the share whose error is at most 20 % of the reference; an answer
    without a number misses. mae and rmsle (of log1p, negatives as 0): over the answers with a number, left out if there is none.
    """
    truths = [number(text) for text in references]
    if None in truths:
        row = truths.index(None)
        raise UserError(f"numeric: reference {row + 1} of {len(truths)} holds no number: {references[row][:60]!r}")
    pairs = [(a, r) for a, r in zip(map(number, answers), truths, strict=True) if a is not None and r is not None]
    close = sum(abs(a - r) <= 0.2 * abs(r) for a, r in pairs)
    shares: dict[str, float | int] = {"numeric/parsed": len(pairs) / len(answers), "numeric/within_20": close / len(answers)}
    if not pairs:
        return shares
    logs = [math.log1p(max(a, 0)) - math.log1p(max(r, 0)) for a, r in pairs]
    mae, rmsle = fmean(abs(a - r) for a, r in pairs), math.sqrt(fmean(d * d for d in logs))
    return {**shares, "numeric/mae": mae, "numeric/rmsle": rmsle}


def number(text: str) -> float | None:
    """The first number of a text: "$1,299.00", "-3.5", "−$2", ".5", "1e3" (1000). The "-" of "10-20" or "A-3" is no sign;
    only commas before three digits separate thousands: "3,50" is 3. None if there is none, or one too large for a float."""
    found = NUMBER.search(text)
    value = float(found[2].replace(",", "")) * (-1 if found[1] else 1) if found else math.inf
    return value if math.isfinite(value) else None


def tokenize(text: str) -> list[str]:
    """Lower-case words for ROUGE and METEOR. Of ASCII text what rouge-score's own tokenizer gives: runs of a-z and 0-9.
    That one drops all other scripts. Here a CJK ideograph or kana is a token, and letters, digits and the marks on them
    make words in every script (NFC). Punctuation and emoji are no tokens; scripts without spaces, as Thai, make long words.
    """
    text = unicodedata.normalize("NFC", text.lower())
    text = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text)
    words = IDEOGRAPH.sub(r" \g<0> ", text).split()
    return [found[0] for word in words if (found := re.search(r"[^\W_].*", word))]  # not the mark that an emoji leaves behind


def lower_is_better(key: str) -> bool:
    """Whether less of a figure is better; its key may carry a prefix, as in "eval/in_domain/loss"."""
    return any(f"/{key}".endswith(f"/{name}") for name in LOWER_IS_BETTER)


def table(figures: dict[str, float | int]) -> str:
    """One figure a line: its key, and its value, aligned to the right, fractions with four digits."""
    values = {key: f"{value:,}" if isinstance(value, int) else f"{value:,.4f}" for key, value in figures.items()}
    left, right = max(map(len, values), default=0), max(map(len, values.values()), default=0)
    return "\n".join(f"{key:<{left}}  {value:>{right}}" for key, value in values.items())
