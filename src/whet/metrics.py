"""Metrics: how one answer scores, and how many scores become one figure.

Every figure here is a function of sums over examples (right answers and rows, n-gram matches, tokens and their
likelihoods). A metric says what is summed (`statistics`) and what is made of the sums (`finish`), so that bootstrap
and permutation resample exactly the published figure, as matrix products.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import math
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from whet.errors import TaskError, nearest
from whet.splits import UNSPACED

if TYPE_CHECKING:
    from whet.task import Example

GROUP = "whet.metrics"
# What a failed row costs in perplexity, in nats per token: a blind guess among 2^18 tokens, the largest vocabularies.
FAILED_NLL = 18 * math.log(2)
ARTICLES = frozenset(("a", "an", "the"))
# ASCII punctuation, and behind group 1 what is part of a number: 1.5, 1,5 (not 1,500), 10:30, 1/2, 2010-12, -5, -$5, .5
_PUNCTUATION = re.compile(
    rf"((?<=\d)[-./:](?=\d)|(?<=\d),(?=\d)(?!\d{{3}}(?!\d))|(?<![\w.-])-(?=\$?\.?\d)|(?<![\w.])\.(?=\d))|[{re.escape(string.punctuation)}]"
)
_HANGUL = re.compile("[\u1100-\u11ff\u3130-\u318f\ua960-\ua97f\uac00-\ud7ff]")
_UNSPACED = re.compile(f"[{UNSPACED}]")
TOKEN = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")


@dataclass(frozen=True)
class Outcome:
    """One answered example, as data.

    `score` is the example's own score (0..1; for perplexity the negative log-likelihood per token, in nats), `weight`
    its number of tokens (perplexity only), `others` the accepted answers besides `reference`. A failed example has
    score 0 and the error's text.
    """

    id: str
    answer: str
    score: float
    reference: str
    group: str | None = None
    error: str | None = None
    weight: float = 1.0
    others: tuple[str, ...] = ()

    @property
    def references(self) -> tuple[str, ...]:
        """All accepted answers."""
        return (self.reference, *self.others)


class Metric(Protocol):
    """The contract of a metric; subclass `Mean` to write `score` alone.

    `score` sees one answer and its example, mutates neither, and returns a finite number. `statistics` returns one row
    per outcome (numpy or scipy.sparse, shape (n, s)); `finish` takes sums of such rows, shape (..., s), and returns
    the figure, shape (...). `aggregate(outcomes)` is `finish` of the sum of all rows. `higher_is_better` is the
    direction of the figure. Rows of two runs may be compared only if they come from one call of `statistics`.
    """

    @property
    def name(self) -> str: ...
    @property
    def higher_is_better(self) -> bool: ...
    def score(self, answer: str, example: Example) -> float: ...
    def statistics(self, outcomes: Sequence[Outcome]) -> Any: ...
    def finish(self, totals: Any) -> Any: ...
    def aggregate(self, outcomes: Sequence[Outcome]) -> float: ...


class Additive:
    """What the built-in metrics have in common: the figure is `finish` of the summed `statistics`."""

    higher_is_better: ClassVar[bool] = True
    points: ClassVar[bool] = False  # whether people read it in hundredths, as a share: see `in_points`

    @property
    def rules(self) -> dict[str, str]:
        """What its scores depend on beside its name, for their protocol: of a plugin, the package and its version."""
        package = _package(f"{type(self).__module__}:{type(self).__qualname__}")
        return {"metric_of": package} if package else {}

    def statistics(self, outcomes: Sequence[Outcome]) -> Any:
        """Rows to be summed: (score, 1)."""
        return np.array([(o.score, 1.0) for o in outcomes], dtype=float).reshape(-1, 2)

    def finish(self, totals: Any) -> Any:
        """The figure from summed rows, shape (..., s) → (...): the mean."""
        return totals[..., 0] / np.maximum(totals[..., 1], 1)

    def aggregate(self, outcomes: Sequence[Outcome]) -> float:
        """The corpus figure; raises ValueError for no outcomes."""
        if not outcomes:
            raise ValueError("no outcomes to aggregate")
        return float(self.finish(np.ones(len(outcomes)) @ self.statistics(outcomes)))


@functools.cache
def _package(place: str) -> str:
    """The package, other than this one, that brings the metric of a place (module:name), with its version."""
    found = (door.dist for door in importlib.metadata.entry_points(group=GROUP, value=place))
    return next((f"{dist.name} {dist.version}" for dist in found if dist and dist.name != "whet"), "")


class Mean(Additive):
    """A metric whose figure is the mean of its per-example scores: a plugin needs `name` and `score` only."""


class Share(Mean):
    """A mean of scores from 0 to 1, which people read in points: 71.2 for 0.712."""

    points: ClassVar[bool] = True


# -- normalisation -----------------------------------------------------------------------------------------------


def references(example: Example) -> tuple[str, ...]:
    """All accepted answers of an example: its `answers`, else its completion."""
    return tuple(example.answers) or (example.completion,)


def _nothing(answer: str, example: Example) -> bool:
    """Whether to say nothing is right, and nothing is said: there is no word to compare."""
    return not answer.strip() and any(not r.strip() for r in references(example))


def plain(text: str) -> str:
    """Text for comparing labels: NFC, stripped, casefolded, single spaces, no sentence punctuation at the end.

    Only sentence punctuation goes, and never all of a text: 'C#', ':)' and '?' stay what they are.
    """
    text = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return text.rstrip(".,;:!?。！？、，").rstrip() or text


def squad(text: str, articles: bool = False) -> str:
    """SQuAD's normalisation (Rajpurkar et al., 2016): lower case, no ASCII punctuation, no articles, single spaces.

    Other scripts stay intact (NFC), and so do signs inside numbers: 1.5 is not 15, nor is 1,5. Articles stay on
    request and where nothing else would (the choice 'A'), punctuation where a text has no more than that.
    """
    lowered = unicodedata.normalize("NFC", text).lower().replace("\N{MINUS SIGN}", "-")
    bare = _PUNCTUATION.sub(r"\1", lowered)
    short = "" if articles else re.sub(r"\b(a|an|the)\b", " ", bare)
    return next((" ".join(form.split()) for form in (short, bare, lowered) if form.strip()), "")


def _both(answer: str, reference: str) -> tuple[str, str]:
    """Both after `squad`; where the reference is an article, as the choice 'A' is, the answer keeps its own."""
    wanted = squad(reference)
    return squad(answer, articles=ARTICLES.issuperset(wanted.split())), wanted


def stands(text: str, wanted: str, particles: re.Pattern[str] | None = None) -> bool:
    """Whether a text holds words or numbers whole, both after `squad`; nothing stands only in nothing.

    In scripts without spaces any place will do. Behind a Korean word anything may follow, or what `particles` matches.
    """
    if not wanted:
        return not text
    first, last = _script(wanted[0]), _script(wanted[-1])
    for found in re.finditer(f"(?={re.escape(wanted)})", text):
        begin, end = found.start(), found.start() + len(wanted)
        whole = last != "spaced" or _script(text[end : end + 1]) != last
        if last == "hangul" and particles:
            whole = particles.match(text, end) is not None
        if whole and not (first and begin and _script(text[begin - 1]) == first):
            return True
    return False


def _script(sign: str) -> str:
    """How words of a character's script stand: "spaced" (digits, too), "hangul", or "" where one may end anywhere."""
    if _HANGUL.match(sign):
        return "hangul"
    inside = sign.isalnum() or (bool(sign) and (sign in "-./" or unicodedata.category(sign)[0] == "M"))
    return "spaced" if inside and not _UNSPACED.match(sign) else ""


# -- built-in metrics --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accuracy(Share):
    """Share of answers equal to an accepted one after `plain`; rows with choices compare the choices exactly."""

    name: ClassVar[str] = "accuracy"

    def score(self, answer: str, example: Example) -> float:
        """1 if right, else 0."""
        if answer in example.choices:
            return float(answer in references(example))
        return float(plain(answer) in map(plain, references(example)))


@dataclass(frozen=True)
class MacroF1(Additive):
    """F1 averaged over classes, each class weighing the same: scikit-learn's f1_score(average="macro").

    Classes are those among references and answers (compared after `plain`), so an answer outside the label set counts
    as a class of F1 0, as in scikit-learn; a failed example is a miss of its class and founds none.
    """

    name: ClassVar[str] = "macro_f1"
    points: ClassVar[bool] = True

    def score(self, answer: str, example: Example) -> float:
        """1 if right, else 0."""
        return Accuracy().score(answer, example)

    def statistics(self, outcomes: Sequence[Outcome]) -> Any:
        """Sparse rows of 2C columns: per class, hits, and how often it is the reference plus how often the answer."""
        from scipy.sparse import csr_array

        truth = [plain(o.reference) for o in outcomes]
        given = [None if o.error else t if o.score == 1 else plain(o.answer)
                 for o, t in zip(outcomes, truth, strict=True)]
        classes = {c: i for i, c in enumerate(dict.fromkeys([*truth, *(g for g in given if g is not None)]))}
        cells = [(row, column) for row, (t, g) in enumerate(zip(truth, given, strict=True))
                 for column in self._columns(classes, t, g)]
        rows, columns = np.array(cells).reshape(-1, 2).T
        return csr_array((np.ones(len(cells)), (rows, columns)), shape=(len(outcomes), 2 * len(classes)))

    @staticmethod
    def _columns(classes: Mapping[str, int], truth: str, given: str | None) -> tuple[int, ...]:
        counted = len(classes) + classes[truth]
        if given is None:
            return (counted,)
        return (counted, len(classes) + classes[given], *((classes[truth],) if given == truth else ()))

    def finish(self, totals: Any) -> Any:
        """Mean over classes that occur of 2·hits / (references + answers)."""
        hits, counted = np.split(np.asarray(totals, dtype=float), 2, axis=-1)
        f1 = 2 * hits / np.maximum(counted, 1)
        return f1.sum(-1) / np.maximum((counted > 0).sum(-1), 1)


@dataclass(frozen=True)
class ExactMatch(Share):
    """Share of answers that equal an accepted one after SQuAD's normalisation (Rajpurkar et al., 2016)."""

    name: ClassVar[str] = "exact_match"

    def score(self, answer: str, example: Example) -> float:
        """1 if equal to any accepted answer, else 0."""
        return float(any(given == wanted for given, wanted in (_both(answer, r) for r in references(example))))


@dataclass(frozen=True)
class TokenF1(Share):
    """SQuAD's F1 over tokens (Rajpurkar et al., 2016), the best over the accepted answers.

    Tokens are parted by spaces; in scripts without spaces each character is one.
    """

    name: ClassVar[str] = "token_f1"

    def score(self, answer: str, example: Example) -> float:
        """Harmonic mean of token precision and recall, 0..1."""
        return max(self._f1(*map(TOKEN.findall, _both(answer, r))) for r in references(example))

    @staticmethod
    def _f1(given: list[str], wanted: list[str]) -> float:
        if not given or not wanted:
            return float(given == wanted)
        return 2 * (Counter(given) & Counter(wanted)).total() / (len(given) + len(wanted))


@dataclass(frozen=True)
class Contains(Share):
    """Share of answers that contain an accepted one, after SQuAD's normalisation.

    A word or a number must be contained whole ('no' is not in 'know', nor 5 in -5). Behind a Korean word particles may
    follow; in scripts without spaces any place will do.
    """

    name: ClassVar[str] = "contains"

    def score(self, answer: str, example: Example) -> float:
        """1 if any accepted answer is contained, else 0."""
        return float(any(stands(*_both(answer, r)) for r in references(example)))


@dataclass(frozen=True)
class SetF1(Share):
    """F1 over sets of items, for several labels a row: scikit-learn's f1_score(average="samples").

    Items are parted by commas, semicolons, bars or lines and compared after `plain`; their order and repeats do not
    count. The best over the accepted answers; nothing is right where nothing is wanted.
    """

    name: ClassVar[str] = "set_f1"

    def score(self, answer: str, example: Example) -> float:
        """Harmonic mean of precision and recall over items, 0..1."""
        given = _items(answer)
        return max(self._f1(given, _items(r)) for r in references(example))

    @staticmethod
    def _f1(given: frozenset[str], wanted: frozenset[str]) -> float:
        return 2 * len(given & wanted) / (len(given) + len(wanted)) if given or wanted else 1.0


def _items(text: str) -> frozenset[str]:
    """The items of a text: those of a JSON list, whose objects are one each, or what its marks part."""
    try:
        found = json.loads(text) if text.strip()[:1] == "[" else None
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, list):
        return frozenset(plain(one) if isinstance(one, str) else
                         json.dumps(one, sort_keys=True, ensure_ascii=False).casefold() for one in found)  # fmt: skip
    return frozenset(plain(item) for item in re.split(r"[,;|\n、，；]", text) if item.strip())


class _Words:
    """rouge-score's tokenizer without its loss of everything outside a-z and 0-9; of unspaced scripts each character.

    Vowel signs belong to their words.
    """

    def __init__(self) -> None:
        marks = "".join(c for c in map(chr, range(0x300, 0x1F000)) if unicodedata.category(c)[0] == "M")
        self._word = re.compile(rf"[{UNSPACED}]|(?:[^\W_{UNSPACED}]|[{marks}])+")

    def tokenize(self, text: str) -> list[str]:
        return self._word.findall(unicodedata.normalize("NFC", text).lower())


@functools.cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False, tokenizer=_Words())


@dataclass(frozen=True)
class RougeL(Share):
    """ROUGE-L F-measure (Lin, 2004; rouge-score, no stemmer, any script), the best over the accepted answers."""

    name: ClassVar[str] = "rouge_l"

    def score(self, answer: str, example: Example) -> float:
        """F-measure of the longest common subsequence of words, 0..1."""
        if _nothing(answer, example):
            return 1.0
        return max(float(_rouge().score(r, answer)["rougeL"].fmeasure) for r in references(example))


@functools.cache
def _sacrebleu(kind: str) -> Any:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return CHRF() if kind == "chrf" else BLEU(effective_order=True, tokenize=kind)


def _bleu(answer: str, accepted: Sequence[str]) -> Any:
    """sacrebleu's score of one answer: by characters where most of the references' are of a script without spaces."""
    text = "".join("".join(accepted).split())
    kind = "char" if 2 * len(_UNSPACED.findall(text)) > len(text) else "13a"
    return _sacrebleu(kind).sentence_score(answer, accepted)


@dataclass(frozen=True)
class Bleu(Additive):
    """Corpus BLEU (Papineni et al., 2002) as sacrebleu computes it (exp smoothing), divided by 100.

    Tokens are sacrebleu's 13a, or its `char` for rows in scripts without spaces.
    """

    name: ClassVar[str] = "bleu"
    points: ClassVar[bool] = True

    def score(self, answer: str, example: Example) -> float:
        """Sentence BLEU / 100 with effective order."""
        if _nothing(answer, example):
            return 1.0
        return float(_bleu(answer, references(example)).score) / 100

    def statistics(self, outcomes: Sequence[Outcome]) -> Any:
        """Rows of (answer length, reference length, 4 matches, 4 totals)."""
        bleus = [_bleu(_said(o), o.references) for o in outcomes]
        return np.array([(b.sys_len, b.ref_len, *b.counts, *b.totals) for b in bleus], dtype=float).reshape(-1, 10)

    def finish(self, totals: Any) -> Any:
        """Corpus BLEU / 100 from summed rows."""
        compute = _sacrebleu("13a").compute_bleu

        def one(row: Any) -> float:
            r = [int(x) for x in row]
            return float(compute(r[2:6], r[6:], r[0], r[1], smooth_method="exp").score) / 100

        return np.apply_along_axis(one, -1, np.rint(totals))


@dataclass(frozen=True)
class Chrf(Additive):
    """Corpus chrF (Popović, 2015) as sacrebleu computes it (character 6-grams, beta 2), divided by 100."""

    name: ClassVar[str] = "chrf"
    points: ClassVar[bool] = True

    def score(self, answer: str, example: Example) -> float:
        """Sentence chrF / 100."""
        if _nothing(answer, example):
            return 1.0
        return float(_sacrebleu("chrf").sentence_score(answer, list(references(example))).score) / 100

    def statistics(self, outcomes: Sequence[Outcome]) -> Any:
        """Rows of (n-grams in the answer, in the reference, in both) for six orders."""
        # sacrebleu's own significance tests resample these same (private) rows; it has no public door to them.
        rows = [_sacrebleu("chrf")._extract_corpus_statistics([_said(o)], [[r] for r in o.references])[0]
                for o in outcomes]
        return np.array(rows, dtype=float).reshape(-1, 18)

    def finish(self, totals: Any) -> Any:
        """Corpus chrF / 100 from summed rows."""
        def one(row: Any) -> float:
            return float(_sacrebleu("chrf")._compute_f_score(row)) / 100

        return np.apply_along_axis(one, -1, np.rint(totals))


def _said(outcome: Outcome) -> str:
    """What a failed example answered is nothing, so that corpus figures charge it for its missing words."""
    return "" if outcome.error else outcome.answer


@dataclass(frozen=True)
class Perplexity(Additive):
    """exp of the mean negative log-likelihood per token; lower is better. A failed row costs `FAILED_NLL` a token."""

    name: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False

    def score(self, answer: str, example: Example) -> float:
        """Not made from answers: raises TaskError."""
        raise TaskError("perplexity is made from likelihoods, not from answers", do="score the rows' text instead")

    def statistics(self, outcomes: Sequence[Outcome]) -> Any:
        """Rows of (nats, tokens)."""
        rows = [((FAILED_NLL if o.error else o.score) * o.weight, o.weight) for o in outcomes]
        return np.array(rows, dtype=float).reshape(-1, 2)

    def finish(self, totals: Any) -> Any:
        """exp(nats / tokens)."""
        # Rows without tokens weigh nothing, but a draw of nothing else must not divide by zero.
        return np.exp(totals[..., 0] / np.where(totals[..., 1] > 0, totals[..., 1], 1.0))


@dataclass(frozen=True)
class WinRate(Share):
    """Share of answers preferred over the base's, a tie counting half; the scores come from a judge."""

    name: ClassVar[str] = "win_rate"

    def score(self, answer: str, example: Example) -> float:
        """Not made from one answer: raises TaskError."""
        raise TaskError("win_rate compares two answers", found="one", do="score them by a judge")


def grades(example: Example) -> dict[str, float]:
    """Relevant documents and their grades (1 where none is given); raises ValueError if there are none."""
    found = {document: grade for document, grade in example.evidence if grade > 0}
    if not found:
        raise ValueError(f"example {example.id!r} names no evidence, so a ranking cannot be scored")
    return found


@dataclass(frozen=True)
class Recall(Share):
    """Share of an example's relevant documents among the first k; the answer is ranked ids, one a line."""

    k: int = 5

    @property
    def name(self) -> str:
        """The name with its k."""
        return f"recall@{self.k}"

    def score(self, answer: str, example: Example) -> float:
        """Recall at k, 0..1; raises ValueError where the example names no evidence."""
        wanted = grades(example)
        return len(set(_ranked(answer)[: self.k]) & set(wanted)) / len(wanted)


@dataclass(frozen=True)
class Ndcg(Share):
    """nDCG at k with linear gain, as trec_eval (Järvelin & Kekäläinen, 2002); the answer is ranked ids, one a line."""

    k: int = 10

    @property
    def name(self) -> str:
        """The name with its k."""
        return f"ndcg@{self.k}"

    def score(self, answer: str, example: Example) -> float:
        """nDCG at k, 0..1; raises ValueError where the example names no evidence."""
        wanted = grades(example)
        gain = self._dcg([wanted.get(d, 0.0) for d in _ranked(answer)])
        return gain / self._dcg(sorted(wanted.values(), reverse=True))

    def _dcg(self, gains: Sequence[float]) -> float:
        return math.fsum(g / math.log2(rank + 2) for rank, g in enumerate(gains[: self.k]))


@dataclass(frozen=True)
class Mrr(Share):
    """Mean reciprocal rank of the first relevant document among the first k (Voorhees, 1999)."""

    k: int = 10

    @property
    def name(self) -> str:
        """The name with its k."""
        return f"mrr@{self.k}"

    def score(self, answer: str, example: Example) -> float:
        """1 over the rank, 0 where none is found; raises ValueError where the example names no evidence."""
        wanted = grades(example)
        return next((1 / rank for rank, d in enumerate(_ranked(answer)[: self.k], 1) if d in wanted), 0.0)


def _ranked(answer: str) -> list[str]:
    """The ids of a ranking, each once: naming a document twice must not count twice."""
    return list(dict.fromkeys(line for line in answer.split("\n") if line.strip()))


@dataclass(frozen=True)
class Custom(Mean):
    """A user's function (answer, example) → number, higher is better; the figure is the mean."""

    function: Callable[[str, Example], float]
    label: str
    code: str  # hash of the file, so that no score of an earlier version is taken for its own

    @property
    def name(self) -> str:
        """As the task names it: file.py:function."""
        return self.label

    @property
    def rules(self) -> dict[str, str]:
        """The hash of its file."""
        return {"metric_code": self.code}

    def score(self, answer: str, example: Example) -> float:
        """What the function says."""
        return float(self.function(answer, example))


# -- finding and applying a metric -------------------------------------------------------------------------------


def get(name: str, folder: Path | None = None, trusted: bool = False) -> Metric:
    """The metric of a name: an entry point of group "whet.metrics", `NAME@K`, or `file.py:function` of the task.

    Raises TaskError for an unknown name, and for user code that is not trusted, lies outside `folder` or breaks.
    """
    if ".py:" in name:
        return _load(name, folder, trusted)
    doors = {e.name: e for e in importlib.metadata.entry_points(group=GROUP)}
    base, at, k = name.partition("@")
    if base not in doors or (at and not re.fullmatch("[1-9][0-9]*", k)):
        raise TaskError(f"unknown metric {name!r}", do=nearest(name, [*doors, "recall@5", "ndcg@10", "FILE.py:NAME"]))
    try:
        metric: Metric = doors[base].load()(**({"k": int(k)} if at else {}))
    except TypeError as error:
        raise TaskError(f"metric {name!r} cannot be made: {error}") from error
    return metric


@functools.cache
def in_points(name: str) -> bool:
    """Whether people read figures of the metric of a name in points (71.2 for 0.712), by its `points`.

    False for a task's own function, whose scores may be anything, and for a metric that is not to be had here.
    """
    doors = importlib.metadata.entry_points(group=GROUP, name=name.partition("@")[0])
    try:
        return ".py:" not in name and any(bool(getattr(door.load(), "points", False)) for door in doors)
    except Exception:  # a plugin that no longer loads: what it once scored can be shown all the same
        return False


def _load(name: str, folder: Path | None, trusted: bool) -> Custom:
    file, _, function = name.rpartition(":")
    if not trusted:
        raise TaskError(f"metric {name!r} is code of the task", do="read it, and allow it with --trust")
    root = (folder or Path()).resolve()
    path = (root / file).resolve()
    if not path.is_relative_to(root):
        raise TaskError(f"metric {name!r} lies outside the task", expected=f"a file in {root}", found=str(path))
    if not path.is_file():
        raise TaskError(f"metric {name!r} is missing", expected=f"a file {path}")
    # Registered under a name of its own, since dataclasses in user code look their module up.
    unique = f"whet_task_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    module = sys.modules[unique] = ModuleType(unique)
    module.__file__ = str(path)
    try:
        source = path.read_bytes()  # never cached bytecode, which an edit within a second may leave standing
        exec(compile(source, path, "exec"), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[unique]
        raise TaskError(f"{file} cannot be loaded: {type(error).__name__}: {error}", do="mend the file") from error
    found = getattr(module, function, None)
    if not callable(found):
        defined = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == unique]
        raise TaskError(f"{file} has no function {function!r}", do=nearest(function, defined))
    return Custom(found, name, hashlib.sha256(source).hexdigest()[:16])


def score_all(metric: Metric, answers: Sequence[str], examples: Sequence[Example]) -> tuple[Outcome, ...]:
    """Score answers one by one; an example on which the metric raises or is not finite is a failed outcome, score 0.

    A TaskError (the metric cannot score answers at all) passes through. Raises ValueError if lengths differ. A metric
    that scores answers together (a judge's) has `outcomes(answers, examples)`.
    """
    together: Callable[..., tuple[Outcome, ...]] | None = getattr(metric, "outcomes", None)
    if together is not None:
        return together(answers, examples)
    return tuple(_score_one(metric, a, e) for a, e in zip(answers, examples, strict=True))


def sound(metric: Metric, scored: Sequence[Outcome], examples: Sequence[Example]) -> None:
    """Raise TaskError for a metric that failed on all examples, and fails on all their right answers, too; and as
    `comparable` does.
    """
    comparable(metric, scored)
    if scored and all(o.error for o in scored) and not hasattr(metric, "outcomes"):
        known = [e for e in examples if references(e)[0]]  # where nothing is known to be right, nothing is shown
        if known and all(_score_one(metric, references(e)[0], e).error for e in known):
            found = str(_score_one(metric, references(known[0])[0], known[0]).error)
            raise TaskError(f"the metric {metric.name} fails on every example, right answers included",
                            expected="a number", found=found, do="mend it, or the rows")  # fmt: skip


def floored(metric: Metric, *runs: Sequence[Outcome]) -> list[tuple[Outcome, ...]]:
    """The runs, where no answer that could not be scored, which counts 0, is better than the worst of all that were."""
    scores = [o.score for run in runs for o in run if not o.error]
    worst = min((0.0, *scores)) if metric.higher_is_better else max((0.0, *scores))
    return [tuple(replace(o, score=worst) if o.error and o.score == 0 else o for o in run) for run in runs]


def comparable(metric: Metric, *runs: Sequence[Outcome]) -> None:
    """Raise TaskError where an answer that could not be scored, which counts 0, is better than one that was."""
    sign = 1 if metric.higher_is_better else -1
    failed = next((o for run in runs for o in run if o.error and o.score == 0), None)
    if failed is not None and any(sign * o.score < 0 for run in runs for o in run if not o.error):
        said = " ".join(failed.answer.split())[:60]
        raise TaskError(f"where {metric.name} gives no number, an answer counts 0: better than others that it scores",
                        expected="the worst number there is, for what cannot be scored",
                        found=f"{failed.error} for {said!r}", do="let it return one")  # fmt: skip


def _score_one(metric: Metric, answer: str, example: Example) -> Outcome:
    error = None
    try:
        score = float(metric.score(answer, example))
        if not math.isfinite(score):
            error = f"the metric says {score}"
    except TaskError:
        raise
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"
    first, *rest = references(example)
    return Outcome(id=example.id, answer=answer, score=0.0 if error else score, reference=first, group=example.group,
                   error=error, others=tuple(rest))
