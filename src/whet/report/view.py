"""What the report shows, as plain data: results read tolerantly, numbers as words, arms, examples, confusions."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whet.metrics import in_points, plain
from whet.rows import short_line

Record = Mapping[str, Any]

LONGEST = 2000  # characters of one text of an example that the page carries
BRIEF = 24  # characters of answers that fit side by side on a phone
LEVEL = 0.05  # of tests
UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


# -- reading what may be missing ---------------------------------------------------------------------------------


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def record(value: Any) -> Record:
    """A mapping, empty for anything else."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: Any) -> Sequence[Any]:
    """A list or tuple, empty for anything else."""
    return value if isinstance(value, (list, tuple)) else ()


def records(value: Any) -> list[Record]:
    """The mappings among a list's items."""
    return [item for item in sequence(value) if isinstance(item, Mapping)]


def line(value: Any) -> str:
    """A value as one printable line; empty for None. Control characters (terminal escapes too) become spaces."""
    text = _written(value)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _written(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, default=str, ensure_ascii=False)


TITLES = {"macro_f1": "macro-F1", "token_f1": "token F1", "rouge_l": "ROUGE-L", "bleu": "BLEU", "chrf": "chrF"}


# -- numbers as words --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """How the metric's figures are written: in points (0.712 → 71.2), or as they are."""

    metric: str
    points: bool
    higher_is_better: bool

    @staticmethod
    def of(result: Record) -> Scale:
        """Of a result's metric; points where that is read in them."""
        metric = record(result.get("metric"))
        name, higher = line(metric.get("name")) or "score", metric.get("higher_is_better") is not False
        return Scale(name, in_points(name), higher)

    @property
    def title(self) -> str:
        """The metric's name in words."""
        return TITLES.get(self.metric) or self.metric.replace("_", " ")

    @property
    def heading(self) -> str:
        """The same with a capital."""
        return self.title[:1].upper() + self.title[1:]

    @property
    def unit(self) -> str:
        """What follows a difference: " points", or nothing."""
        return " points" if self.points else ""

    def value(self, x: float) -> float:
        """A score or a difference in the units that are shown."""
        return 100 * x if self.points else x

    def score(self, x: float | None) -> str:
        """A score, such as "71.2"; a dash for None."""
        if x is None:
            return "–"
        places = 1 if self.points or abs(x) >= 100 else 2
        return f"{self.value(x):z,.{places}f}".replace("-", "−")

    def gain(self, x: float | None) -> str:
        """A difference with its sign; a dash for None."""
        if x is None:
            return "–"
        text = self.score(abs(x))
        return text if not text.strip("0.") else f"{'+' if x > 0 else '−'}{text}"

    def span(self, low: float | None, high: float | None, signed: bool = False) -> str:
        """An interval in words; empty if an end is missing."""
        if low is None or high is None:
            return ""
        write = self.gain if signed else self.score
        return f"{write(low)} to {write(high)}"


def p_value(p: float | None) -> str:
    """A p-value, such as "p = 0.012"; empty for None."""
    return "" if p is None else "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def lost(points: float | None) -> str:
    """Points that an earlier task lost, such as "1.9"; empty for None."""
    return "" if points is None else f"{points:z.1f}".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Seconds as s, min or h."""
    if seconds is None:
        return "–"
    return (f"{seconds:.0f} s" if seconds < 99.5 else f"{seconds / 60:.1f} min" if seconds < 5400
            else f"{seconds / 3600:.1f} h")


def count(value: float | None) -> str:
    """A whole number with its thousands apart."""
    return "–" if value is None else f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes as kB, MB or GB (powers of ten)."""
    if value is None:
        return "–"
    # What three digits would round to 1000 of a unit is 1 of the next.
    unit, divisor = next(((u, d) for u, d in UNITS if value >= 0.9995 * d), ("B", 1.0))
    return f"{value / divisor:.3g} {unit}" if value < 1000 * divisor else f"{value / divisor:,.0f} {unit}"


# -- arms --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One recipe at its furthest rung, or a baseline. `gain` is against base on select, positive is better; `seconds`
    are what all of the recipe takes, whichever trial has paid for its beginning.
    """

    name: str
    kind: str  # base | arm | chosen | baseline
    score: float | None = None
    gain: float | None = None
    low: float | None = None
    high: float | None = None
    seconds: float | None = None
    status: str = ""
    why: str = ""
    trial: Record | None = None


def name_of(trial: Record) -> str:
    """A trial's short label, made from its recipe where it has none."""
    methods = [line(step.get("method")) for step in records(trial.get("recipe"))]
    return line(trial.get("name")) or "+".join(methods) or "base"


def is_base(trial: Record, result: Record) -> bool:
    """Whether the trial is the model as it stands, no method applied; of several models, the first."""
    first = [line(f"base [{model}]") for model in sequence(result.get("model"))[:1]]
    return not sequence(trial.get("recipe")) and name_of(trial) in ("base", *first)


def is_chosen(trial: Record, result: Record) -> bool:
    """Whether the trial is what is handed over; of several models, one as it stands may be."""
    chosen = record(result.get("chosen"))
    same = line(sequence(trial.get("recipe"))) == line(sequence(chosen.get("recipe")))
    return handed(result) and same and name_of(trial) == (line(chosen.get("name")) or name_of(trial))


def furthest(result: Record) -> list[Record]:
    """One trial per recipe: the last that has a score at its highest rung; trials without a score only if alone."""
    best: dict[tuple[str, str], Record] = {}
    for trial in records(result.get("trials")):
        key = (name_of(trial), line(trial.get("recipe")))
        if key not in best or _rank(trial) >= _rank(best[key]):
            best[key] = trial
    return list(best.values())


def _rank(trial: Record) -> tuple[bool, float]:
    return score_of(trial) is not None, number(trial.get("rung")) or 0.0


def score_of(trial: Record) -> float | None:
    """A trial's score on the select split."""
    return number(record(trial.get("select")).get("score"))


def arms(result: Record) -> list[Arm]:
    """Base, every recipe and every baseline; the best gain first, those without a score last."""
    trials, scale = furthest(result), Scale.of(result)
    base = next((score_of(t) for t in trials if is_base(t, result)), None)
    found = [_arm(t, base, result, scale) for t in trials] + [
        Arm(line(b.get("name")) or "baseline", "baseline", number(b.get("select")),
            _gain(number(b.get("select")), base, scale))
        for b in records(result.get("baselines"))]
    return sorted(found, key=lambda a: (a.gain is None, a.score is None, -(a.gain or 0.0)))


def _arm(trial: Record, base: float | None, result: Record, scale: Scale) -> Arm:
    difference = record(trial.get("difference"))
    score, gain = score_of(trial), number(difference.get("difference"))
    seconds = next((s for key in ("recipe_seconds", "cost_seconds") if (s := number(trial.get(key))) is not None), None)
    kind = "base" if is_base(trial, result) else "chosen" if is_chosen(trial, result) else "arm"
    return Arm(
        name_of(trial), kind, score, 0.0 if kind == "base" and score is not None else
        gain if gain is not None else _gain(score, base, scale),
        *((None, None) if kind == "base" else (number(difference.get("low")), number(difference.get("high")))),
        seconds if seconds is not None else number(record(trial.get("spent")).get("seconds")),
        line(trial.get("status")), line(trial.get("why")), trial)


def _gain(score: float | None, base: float | None, scale: Scale) -> float | None:
    return None if score is None or base is None else (score - base) * (1 if scale.higher_is_better else -1)


def handed(result: Record) -> bool:
    """Whether another System than the base is handed over; it may be another model as it stands."""
    chosen = record(result.get("chosen"))
    said = chosen.get("handed")
    return said if isinstance(said, bool) else bool(sequence(chosen.get("recipe")))


def opened(confirm: Record) -> bool:
    """Whether a candidate was tried on the sealed data beside the base."""
    return "candidate" not in confirm or confirm["candidate"] is not None


def second(result: Record) -> str:
    """What stands beside the base: what was chosen, or the best candidate where the base is handed over."""
    confirm = record(result.get("confirm"))
    return "Best candidate" if confirm.get("base") and opened(confirm) and not handed(result) else "Chosen"


def winning_baseline(result: Record) -> tuple[str, float, bool] | None:
    """The best baseline that does as well as the handed-over system on the confirm split, or better: its name, its
    score there, and whether the paired interval and test show it to be ahead.

    Without such a split on select, where nothing is shown. A score of 0 is nothing to do well by.
    """
    confirm, scale = record(result.get("confirm")), Scale.of(result)
    who, split = "chosen" if handed(result) else "base", "confirm" if record(confirm.get("base")) else "select"
    ours = (number(record(confirm.get(who)).get("score")) if split == "confirm" else
            next((a.score for a in arms(result) if a.kind == who), None))  # fmt: skip
    sign = 1 if scale.higher_is_better else -1
    scored = [(line(b.get("name")) or "baseline", s, split == "confirm" and _ahead(b))
              for b in records(result.get("baselines")) if (s := number(b.get(split))) is not None]
    best = max(scored, key=lambda pair: sign * pair[1], default=None)
    if best is None or ours is None or sign * (best[1] - ours) < 0:
        return None
    return None if scale.higher_is_better and best[1] <= 0 else best


def _ahead(baseline: Record) -> bool:
    """Whether a baseline is shown to be ahead: of two alike examples an interval alone would say so."""
    p = number(baseline.get("p_value"))
    return (number(baseline.get("low")) or 0) > 0 and (p is None or p < LEVEL)


# -- examples ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examples:
    """The examples of the confirm split as rows, and the filters over them: (key, label, count).

    `binary`: each is right or wrong. `changed`: there are answers of the chosen system. `brief`: answers are labels.
    """

    rows: tuple[tuple[Any, ...], ...]
    filters: tuple[tuple[str, str, int], ...]
    binary: bool
    changed: bool
    brief: bool


LABELS = {"gained": "wrong → right", "lost": "right → wrong", "wrong": "still wrong",
          "better": "better", "worse": "worse", "same": "unchanged", "hit": "right", "miss": "wrong"}


def examples(details: Record, scale: Scale) -> Examples:
    """Rows (kind, id, prompt, reference, base answer, chosen answer, base score, chosen score) with their filters."""
    found = records(details.get("examples"))
    scores = [(number(e.get("base_score")), number(e.get("chosen_score"))) for e in found]
    binary = all(s in (0.0, 1.0, None) for pair in scores for s in pair) and scale.higher_is_better
    changed = any(b is not None for _, b in scores) or any(e.get("chosen") is not None for e in found)
    kinds = [_kind(a, b, binary, changed, scale.higher_is_better) for a, b in scores]
    rows = tuple(
        (kind, *(_cell(e.get(key)) for key in ("id", "prompt", "reference", "base", "chosen")), *pair)
        for kind, e, pair in zip(kinds, found, scores, strict=True))
    shown = (("gained", "lost", "wrong") if changed else ("hit", "miss")) if binary else (
        ("better", "worse", "same") if changed else ())
    tally = Counter(kinds)
    filters = (("all", "all", len(rows)), *((k, LABELS[k], tally[k]) for k in shown))
    brief = all(len(_cell(e.get(key))) <= BRIEF for e in found for key in ("reference", "base", "chosen"))
    return Examples(rows, filters, binary, changed, brief)


def _cell(value: Any) -> str:
    return short_line(_written(value), LONGEST)


def _kind(base: float | None, chosen: float | None, binary: bool, changed: bool, higher: bool) -> str:
    if not changed:
        return "" if base is None else "hit" if base == 1 else "miss"
    if base is None or chosen is None:
        return ""
    if binary:
        return {(0, 1): "gained", (1, 0): "lost", (0, 0): "wrong"}.get((int(base), int(chosen)), "right")
    return "same" if base == chosen else "better" if (chosen > base) == higher else "worse"


# -- confusions --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Confusion:
    """Counts[reference][answer] over the labels; the last column, where there is one, is any other answer."""

    labels: tuple[str, ...]
    columns: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    def mistakes(self) -> Iterator[tuple[str, str, int]]:
        """(reference, answer, how often), for wrong answers that occur."""
        for i, row in enumerate(self.counts):
            for j, times in enumerate(row):
                if times and i != j:
                    yield self.labels[i], self.columns[j], times


def confusion(details: Record, who: str) -> Confusion | None:
    """The confusion matrix of "base" or "chosen"; None without labels or without answers to known references."""
    raw = {plain(label): line(label) for x in sequence(details.get("labels")) if (label := _cell(x))}
    labels, place = tuple(raw.values()), {label: i for i, label in enumerate(raw)}
    tally: Counter[tuple[int, int]] = Counter()
    for e in records(details.get("examples")):
        row = place.get(plain(_cell(e.get("reference"))))
        if row is not None and e.get(who) is not None:
            tally[row, place.get(plain(_cell(e[who])), len(labels))] += 1
    if not labels or not tally:
        return None
    other = any(column == len(labels) for _, column in tally)
    width = len(labels) + other
    return Confusion(labels, (*labels, *(("(other)",) if other else ())),
                     tuple(tuple(tally[i, j] for j in range(width)) for i in range(len(labels))))


def most_confused(details: Record, longest: int = 20) -> list[tuple[str, str, int | None, int | None]]:
    """The commonest mistakes: (reference, answer, times by base, times by chosen); None where one was not run."""
    base, chosen = confusion(details, "base"), confusion(details, "chosen")
    before, after = (None if c is None else {(r, a): n for r, a, n in c.mistakes()} for c in (base, chosen))
    pairs = dict.fromkeys([*(after or ()), *(before or ())])
    rows = [(r, a, None if before is None else before.get((r, a), 0), None if after is None else after.get((r, a), 0))
            for r, a in pairs]
    return sorted(rows, key=lambda row: (-(row[3] or 0), -(row[2] or 0)))[:longest]
