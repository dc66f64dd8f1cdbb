"""Metrics that compare generated answers with reference texts.

`score` computes the figures of the metrics that a user names. Leading and trailing whitespace of
answers and references is ignored. Each metric's library is imported only when it is asked for.
"""

import importlib.metadata
import math
import re
import types
import unicodedata
from collections.abc import Callable, Sequence
from statistics import fmean

from minilora.errors import UserError, did_you_mean
from minilora.evaluation import path_answers
from minilora.evaluation.category_graph import Figures

METRICS = {
    "loss": "",
    "ppl": "",
    "exact_match": "",
    "bleu": "sacrebleu",
    "chrf": "sacrebleu",
    "rouge": "rouge_score",
    "meteor": "nltk",
    "edit_distance": "rapidfuzz",
    "numeric": "",
    "graph": "networkx",
    "ontology": "sentence_transformers",
}
"""The metrics a user may name, each with the library it needs, or an empty string.

Some have no function here: "loss" and "ppl" need the model (evaluation/perplexity.py), "ontology"
needs an embedder and is computed by infer.py alone (evaluation/answer_graphs.py).
"""

LOWER_IS_BETTER = ("loss", "ppl", "edit_distance", "numeric/mae", "numeric/rmsle")
"""The figures whose smaller values are better."""

IDEOGRAPH = re.compile(
    "[\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff]"
)
"""A Chinese character, or a Japanese kana."""

HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3]")
"""A Korean letter or syllable."""

NUMBER = re.compile(
    r"""
    ((?<!\w)[-−])?                       # a sign, unless it joins two words
    [$€£¥₩]?
    (
        (?: \d{1,3}(?:,\d{3})+(?!\d)     # digits in groups of three: 12,345,678
          | \d+ )
        (?:\.\d+)?
        (?:e[-+]?\d+)?                   # an exponent
      | \.\d+
    )
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""A number; its groups are the sign, and the digits without sign and currency."""


def check_metrics(names: Sequence[str], where: str) -> None:
    """Check that every metric exists and that its library is installed.

    Args:
        names: metrics as the user wrote them.
        where: the setting they come from, for the error message.

    Raises:
        UserError: a metric does not exist, or its library is not installed.
    """
    for name in names:
        if name not in METRICS:
            hint = did_you_mean(name, METRICS)
            known = ", ".join(METRICS)
            raise UserError(f"{where}: no metric {name!r}{hint}; the metrics are {known}")
        library = METRICS[name]
        if library and not _is_installed(library):
            extra = "ontology" if name == "ontology" else "eval"
            message = f"{where}: {name} needs {library}, which is not installed"
            raise UserError(f"{message} (pip install 'minilora[{extra}]')")


def _is_installed(distribution: str) -> bool:
    """Return whether a Python distribution is installed, without importing it."""
    return any(importlib.metadata.distributions(name=distribution))


def score(names: Sequence[str], answers: list[str], references: list[str]) -> Figures:
    """Compute the figures of the named metrics over all pairs of answer and reference.

    The functions below describe the metrics. Those without a function are ignored.

    Args:
        names: keys of METRICS.
        answers: generated texts.
        references: the reference of each answer.

    Returns:
        Each figure by its key: the metric's name, or "numeric/mae" where a metric has several.

    Raises:
        UserError: `check_metrics` refuses a name, there are no answers, the numbers of answers and
            references differ, or "numeric" or "graph" cannot read a reference.
    """
    check_metrics(names, "metrics")
    if not answers or len(answers) != len(references):
        found = f"{len(answers)} answers and {len(references)} references"
        raise UserError(f"metrics: {found}; expected one or more pairs")

    answers = [text.strip() for text in answers]
    references = [text.strip() for text in references]
    figures: Figures = {}
    for name in names:
        if name in SCORERS:
            figures.update(SCORERS[name](answers, references))
    return figures


def _exact_match(answers: list[str], references: list[str]) -> Figures:
    """Compute the share of answers that equal their reference, 0 .. 1."""
    pairs = zip(answers, references, strict=True)
    return {"exact_match": fmean([float(answer == reference) for answer, reference in pairs])}


def _bleu(answers: list[str], references: list[str]) -> Figures:
    """Compute sacrebleu's corpus BLEU with its defaults, 0 .. 100 (Papineni et al. 2002).

    Its tokenizer is "13a", or "zh" where at least half of the references' letters are Chinese,
    Japanese or Korean: "zh" splits Chinese characters, and leaves kana and Hangul in words.
    """
    from sacrebleu import BLEU

    letters = [char for char in "".join(references) if char.isalpha()]
    cjk_letters = [char for char in letters if IDEOGRAPH.match(char) or HANGUL.match(char)]
    tokenizer = "zh" if 2 * len(cjk_letters) > len(letters) else "13a"
    return {"bleu": BLEU(tokenize=tokenizer).corpus_score(answers, [references]).score}


def _chrf(answers: list[str], references: list[str]) -> Figures:
    """Compute sacrebleu's corpus chrF with its defaults, 0 .. 100 (Popović 2015)."""
    from sacrebleu import CHRF

    return {"chrf": CHRF().corpus_score(answers, [references]).score}


def _rouge(answers: list[str], references: list[str]) -> Figures:
    """Compute the mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, 0 .. 1 (Lin 2004).

    These are rouge-score's figures over the words of `split_words`, without stemming.
    """
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    keys = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(keys, tokenizer=types.SimpleNamespace(tokenize=split_words))
    pairs = zip(answers, references, strict=True)
    scores = [scorer.score(reference, answer) for answer, reference in pairs]
    return {key: fmean([each[key].fmeasure for each in scores]) for key in keys}


def _meteor(answers: list[str], references: list[str]) -> Figures:
    """Compute nltk's mean METEOR with its defaults, 0 .. 1 (Banerjee and Lavie 2005).

    The words are those of `split_words`. They match exactly or by Porter stem, not as synonyms,
    because WordNet would have to be downloaded. A perfect answer of m words has 1 - 0.5 / m^3.
    """
    from nltk.translate.meteor_score import single_meteor_score  # type: ignore[import-untyped]

    no_synonyms = types.SimpleNamespace(synsets=lambda word: [])
    scores = []
    for answer, reference in zip(answers, references, strict=True):
        words, reference_words = split_words(answer), split_words(reference)
        scores.append(single_meteor_score(reference_words, words, wordnet=no_synonyms))
    return {"meteor": fmean(scores)}


def _edit_distance(answers: list[str], references: list[str]) -> Figures:
    """Compute the mean Levenshtein distance over the longer text's length, 0 (equal) .. 1."""
    from rapidfuzz.distance import Levenshtein

    pairs = zip(answers, references, strict=True)
    distances = [Levenshtein.normalized_distance(answer, reference) for answer, reference in pairs]
    return {"edit_distance": fmean(distances)}


def _numeric(answers: list[str], references: list[str]) -> Figures:
    """Compare the first number of each answer with the first number of its reference.

    Returns:
        numeric/parsed: the share of answers that hold a number.
        numeric/within_20: the share whose error is at most 20 % of the reference. An answer
            without a number counts as a miss.
        numeric/mae: mean absolute error of the answers with a number.
        numeric/rmsle: root mean square of their errors in log(1 + x), negative numbers taken as 0.
        The last two are left out if no answer holds a number.

    Raises:
        UserError: a reference holds no number.
    """
    pairs = []  # (number of the answer, number of the reference), where the answer has one
    for row, (answer, reference) in enumerate(zip(answers, references, strict=True), start=1):
        guess, truth = parse_number(answer), parse_number(reference)
        if truth is None:
            place = f"reference {row} of {len(references)}"
            raise UserError(f"numeric: {place} holds no number: {reference[:60]!r}")
        if guess is not None:
            pairs.append((guess, truth))

    close = [guess for guess, truth in pairs if abs(guess - truth) <= 0.2 * abs(truth)]
    figures: Figures = {
        "numeric/parsed": len(pairs) / len(answers),
        "numeric/within_20": len(close) / len(answers),
    }
    if pairs:
        logs = [math.log1p(max(guess, 0)) - math.log1p(max(truth, 0)) for guess, truth in pairs]
        figures["numeric/mae"] = fmean(abs(guess - truth) for guess, truth in pairs)
        figures["numeric/rmsle"] = math.sqrt(fmean(log * log for log in logs))
    return figures


def _graph(answers: list[str], references: list[str]) -> Figures:
    """Compare the graphs of category paths; see `path_answers.score`."""
    figures = path_answers.score(answers, references)
    return {f"graph/{key}": value for key, value in figures.items()}


SCORERS: dict[str, Callable[[list[str], list[str]], Figures]] = {
    "exact_match": _exact_match,
    "bleu": _bleu,
    "chrf": _chrf,
    "rouge": _rouge,
    "meteor": _meteor,
    "edit_distance": _edit_distance,
    "numeric": _numeric,
    "graph": _graph,
}
"""The function that computes each metric of texts; its arguments are stripped texts."""


def parse_number(text: str) -> float | None:
    """Return the first number in a text, or None if there is none or it is too large for a float.

    "$1,299.00", "-3.5", "−$2", ".5" and "1e3" (1000) are numbers. The "-" of "10-20" or "A-3" is
    not a sign. Commas separate thousands only before groups of three digits: "3,50" is 3.
    """
    found = NUMBER.search(text)
    if found is None:
        return None
    sign, digits = found.groups()
    value = float(digits.replace(",", ""))
    if not math.isfinite(value):
        return None
    return -value if sign else value


def split_words(text: str) -> list[str]:
    """Split a text into lower-case words, for ROUGE and METEOR.

    The words of ASCII text are those of rouge-score's own tokenizer: runs of a-z and 0-9. That
    tokenizer drops all other scripts. Here each Chinese character or kana is a word; in every other
    script a word is a run of letters, digits and combining marks (in Unicode's form NFC).
    Punctuation and emoji are not part of words. Scripts without spaces, such as Thai, yield long
    words.
    """
    text = unicodedata.normalize("NFC", text.lower())
    text = "".join(char if _is_part_of_word(char) else " " for char in text)
    text = IDEOGRAPH.sub(r" \g<0> ", text)

    words = []
    for word in text.split():
        # leave out marks before the first letter or digit: those of an emoji that was removed
        from_first_letter = re.search(r"[^\W_].*", word)
        if from_first_letter:
            words.append(from_first_letter[0])
    return words


def _is_part_of_word(char: str) -> bool:
    """Return whether a character is a letter, a digit, or a combining mark."""
    return char.isalnum() or unicodedata.category(char).startswith("M")


def lower_is_better(key: str) -> bool:
    """Return whether smaller values of a figure are better.

    Args:
        key: the figure's key, with or without a prefix as in "eval/in_domain/loss".
    """
    return any(key == name or key.endswith(f"/{name}") for name in LOWER_IS_BETTER)


def format_table(figures: Figures) -> str:
    """Format figures as a table: a line for each; floats have four digits after the point."""
    values = {key: format_figure(value) for key, value in figures.items()}
    key_width = max((len(key) for key in values), default=0)
    value_width = max((len(value) for value in values.values()), default=0)
    lines = [f"{key:<{key_width}}  {value:>{value_width}}" for key, value in values.items()]
    return "\n".join(lines)


def format_figure(value: float, sign: str = "") -> str:
    """Format a figure: 1,024 for an integer, 0.1250 for a float.

    Args:
        value: the figure.
        sign: "+" to show the sign of positive values and of 0, too.
    """
    digits = "" if isinstance(value, int) else ".4f"
    return f"{value:{sign},{digits}}"
