"""Metrics of answers that are numbers: whether one is right, and how a whole run's go with the references."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from whet.metrics import Additive, Outcome, Share, plain, references

if TYPE_CHECKING:
    from whet.task import Example

# A number, and behind a slash what it is a share of; a hyphen is a sign only where no word stands before it, and a full
# stop no point: Rs.500.
_NUMBER = re.compile(
    r"((?:(?<![\w.])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE][+-]?\d+)?)"
    r"(?:/(\d+(?:\.\d+)?))?"
)
_CONTINENTAL = re.compile(r"(?<![\w.,])\d{1,3}(?:\.\d{3})+,\d+(?![\d.,]\d|\d)")  # 1.234,56
_DECIMAL_COMMA = re.compile(r"(?<![\d,.])(\d+,\d{1,2}|\d{1,3},\d{4,}|0,\d+)(?![\d,.]\d|\d)")
_POINTED = re.compile(r"(?<![\w.,])\d{1,3}(?:\.\d{3}){2,}(?![\d.,]\d|\d)")  # 1.234.567
# 12 500, with any of the spaces that are written there, but not 85 100 92.
_SPACED = re.compile(r"(?<![\w.,/])(?<!\d[ \u00a0\u202f])[1-9]\d{0,2}(?:[ \u00a0\u202f]\d{3})+(?![ \u00a0\u202f/]?\d)")
_MIXED = re.compile(r"(?<![\w.,/])(\d{1,3}) (\d{1,4})/([1-9]\d{0,3})(?![\d/])")  # 7 1/2
_SIGNS = {0x2212: "-", **dict.fromkeys(map(ord, "$€£¥₩"))}


def number(text: str) -> float | None:
    """The number that a text ends in: the last one, or the first behind GSM8K's `####`; None where there is none.

    Read are signs, decimal points (a comma, too, but where it may part thousands: 1,250 is one), commas or spaces
    between thousands, exponents and fractions: -1,234.5, 12 500, 2e-3, 3/4, 7 1/2; and points between thousands where
    a comma or more of them follow: 1.234,56, 1.234.567.
    """
    text = _CONTINENTAL.sub(lambda found: found[0].replace(".", "").replace(",", "."), text.translate(_SIGNS))
    text = _SPACED.sub(lambda found: re.sub(r"\D", "", found[0]), _POINTED.sub(lambda f: f[0].replace(".", ""), text))
    text = _MIXED.sub(lambda found: repr(int(found[1]) + int(found[2]) / int(found[3])), text)
    text = _DECIMAL_COMMA.sub(lambda found: found[1].replace(",", "."), text)
    before, marked, behind = text.rpartition("####")
    last = [*_NUMBER.finditer(behind)][: 1 if marked else None] or [*_NUMBER.finditer(before)]
    if not last:
        return None
    over, under = last[-1].groups()
    below = float(under or 1)
    value = float(over.replace(",", "")) / below if below else math.inf
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Number(Share):
    """Share of answers that end in an accepted number (see `number`), as GSM8K is scored (Cobbe et al., 2021).

    Numbers are equal within a millionth of the wanted one; a reference without a number is compared after `plain`.
    """

    name: ClassVar[str] = "number"

    def score(self, answer: str, example: Example) -> float:
        """1 if right, else 0."""
        given = number(answer)
        return float(any(self._same(answer, given, r) for r in references(example)))

    @staticmethod
    def _same(answer: str, given: float | None, reference: str) -> bool:
        wanted = number(reference)
        if wanted is None or given is None:
            return wanted is None and plain(answer) == plain(reference)
        return math.isclose(given, wanted, rel_tol=0.0, abs_tol=1e-6 * max(abs(wanted), 1e-6))


FLAT = 1e-12  # of the squares: a spread that is rounding alone


@dataclass(frozen=True)
class Pearson(Additive):
    """Pearson's correlation of the numbers that answers and references end in, as STS-B is scored (Cer et al., 2017).

    Answers without a number lower it in proportion: r of the others times their share. 0 where either side is constant.
    """

    name: ClassVar[str] = "pearson"

    def score(self, answer: str, example: Example) -> float:
        """1 / (1 + distance to the nearest accepted number), 0 without one; ValueError where no reference is one."""
        wanted = [_wanted(r) for r in references(example)]
        given = number(answer)
        return 0.0 if given is None else 1 / (1 + min(abs(given - w) for w in wanted))

    def statistics(self, outcomes: Sequence[Outcome]) -> Any:
        """Rows of (1, 1 where a number was given, and of these x, y, x², y², xy)."""
        given = np.array([math.nan if o.error or (n := number(o.answer)) is None else n for o in outcomes], dtype=float)
        wanted = np.array([math.nan if (n := number(o.reference)) is None else n for o in outcomes], dtype=float)
        read = np.isfinite(given) & np.isfinite(wanted)
        scaled = (self._scale(side, read, outcomes) for side in (given, wanted))
        x, y = (np.where(read, side, 0.0) for side in scaled)
        return np.stack([np.ones(len(outcomes)), read, x, y, x * x, y * y, x * y], axis=1)

    def _scale(self, values: Any, read: Any, outcomes: Sequence[Outcome]) -> Any:
        """Values centred and scaled, which no correlation sees and sums of squares need.

        Those of several runs alike: tests swap values between them. Around the median, which no stray number moves.
        """
        if not read.any():
            return values
        centred = values - np.median(values[read])
        return centred / (np.abs(centred[read]).max() or 1.0)

    def finish(self, totals: Any) -> Any:
        """The correlation from summed rows."""
        every, n, x, y, xx, yy, xy = np.moveaxis(np.asarray(totals, dtype=float), -1, 0)
        a, b = np.maximum(n * xx - x * x, 0), np.maximum(n * yy - y * y, 0)
        flat = (a <= FLAT * n * xx) | (b <= FLAT * n * yy)
        r = np.where(flat, 0.0, (n * xy - x * y) / np.where(flat, 1.0, np.sqrt(a) * np.sqrt(b)))
        return np.clip(r, -1, 1) * n / np.maximum(every, 1)


@dataclass(frozen=True)
class Spearman(Pearson):
    """Spearman's rank correlation of the numbers of answers and references: Pearson's of their ranks in the whole run.

    Resampling keeps those ranks.
    """

    name: ClassVar[str] = "spearman"

    def _scale(self, values: Any, read: Any, outcomes: Sequence[Outcome]) -> Any:
        from scipy.stats import rankdata

        ranks = values.copy()
        for run in _runs(outcomes):
            some = run[read[run]]
            ranks[some] = rankdata(values[some])
        return super()._scale(ranks, read, outcomes)


def _runs(outcomes: Sequence[Outcome]) -> list[Any]:
    """The places of each run's outcomes where several runs stand one behind the other: their ids repeat as they are."""
    ids = [outcome.id for outcome in outcomes]
    size = next((n for n in range(1, len(ids)) if ids[n] == ids[0]), len(ids))
    if size and ids != ids[:size] * (len(ids) // size):
        size = len(ids)
    return np.split(np.arange(len(ids)), range(size, len(ids), size)) if size else []


def _wanted(reference: str) -> float:
    found = number(reference)
    if found is None:
        raise ValueError(f"the reference {reference[:40]!r} holds no number")
    return found
