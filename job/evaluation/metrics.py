"""One generated answer beside the wanted one: counts that add up over rows to exact match, chrF, ROUGE-L and more."""

import re
import unicodedata
from decimal import Context, Decimal
from functools import cache
from typing import Any

COLUMNS = 4 + 3 * 6
"""Answers, exact, extracted, ROUGE-L, and three counts for each order of character n-grams."""

_LETTERS = "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0370-\u052f\u1e00-\u1fff"
"""Latin, Greek and Cyrillic, in which units and names are written; other scripts set no space before a number."""
_NUMBER = re.compile(
    rf"[{_LETTERS}]\d+(?:[.,]\d+)*"  # part of a word (m2), and no number
    rf"|((?:(?<![\w.])-)?"
    rf"(?:(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|(?<![{_LETTERS}\d.])\.\d+))"
    r"([\u00b2\u00b3\u00b9\u2070\u2074-\u2079]| ?[\u00bc-\u00be\u2150-\u215e])?"  # a power or a fraction with it
)
_PLAIN = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | str.maketrans("−‐‑–", "----")
"""Full-width forms as ASCII, and every minus as one. NFKC would make digits of powers, too."""

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # kana and Han
)
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def statistics(answer: str, wanted: str, extract: str | None) -> list[float]:
    """``COLUMNS`` numbers whose sums over rows ``job.evaluation.figures.OF_ANSWERS`` reads.

    Args:
        extract: as ``evaluation.extract``; None: nothing is extracted.
    """
    answer, wanted = answer.strip(), wanted.strip()
    found = extracted(answer, extract)
    same = found is not None and found == extracted(wanted, extract)
    counts: list[float] = _chrf()._extract_corpus_statistics([answer], [[wanted]])[0]
    return [1.0, float(answer == wanted), float(same), rouge_l(answer, wanted), *map(float, counts)]


def extracted(text: str, extract: str | None) -> str | None:
    """The part of an answer that is compared: its last number in plain digits, or the last match's group.

    Numbers lose the commas between thousands, full-width digits become plain, and ``72.0`` is ``72``. Digits right
    after a letter (``m2``) are no number. None where there is nothing, or where the last number is one that plain
    digits do not hold (``10⁵``, ``3½``).
    """
    if extract is None:
        return None
    if extract != "number":
        matches = list(re.finditer(extract, text))
        return matches[-1].group(1) if matches else None
    numbers = [match for match in _NUMBER.finditer(text.translate(_PLAIN)) if match.group(1)]
    return None if not numbers or numbers[-1].group(2) else _written(numbers[-1].group(1).replace(",", ""))


def _written(number: str) -> str:
    """All its digits, without zeros that say nothing."""
    exact = Decimal(number).normalize(Context(prec=len(number)))
    return format(exact or Decimal(0), "f")


def rouge_l(answer: str, wanted: str) -> float:
    """ROUGE-L (Lin 2004, W04-1013), 0 to 1: the F1 of the longest common subsequence of tokens.

    Tokens are lower-case words without punctuation, as Google's rouge-score has them; in writing without spaces
    between words every character is one.
    """
    from rapidfuzz.distance import LCSseq

    one, other = tokens(answer), tokens(wanted)
    common = LCSseq.similarity(one, other)
    return 2.0 * common / (len(one) + len(other)) if common else 0.0


def tokens(text: str) -> list[str]:
    """What ROUGE-L counts."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).lower())


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()
