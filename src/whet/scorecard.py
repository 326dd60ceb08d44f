"""Scorecards and paired comparisons: what a System scores on rows, with its protocol."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from whet import __version__, stats
from whet.engine import Progress, Session, Spent
from whet.errors import TaskError
from whet.metrics import Metric, Outcome, floored, get, score_all, sound
from whet.model import hash_files, local_folder, shards
from whet.rows import short_line
from whet.splits import shared_order
from whet.store import Scores, Store, code
from whet.system import Answer, System
from whet.task import Example, Task, rows_hash


@dataclass(frozen=True)
class Scorecard:
    """What a System scored, with the protocol that made the figure; never compared with one of another protocol."""

    score: float
    low: float
    high: float
    metric: str
    outcomes: tuple[Outcome, ...] = field(repr=False)
    seconds: float  # of answering; loading apart
    truncated: int  # prompts that had to be shortened
    spent: Spent
    protocol: dict[str, str]
    latency_ms: float | None = None
    size_bytes: int | None = None
    memory_bytes: int | None = None
    unended: int = 0  # answers that were cut at `max_tokens`

    @property
    def n(self) -> int:
        """How many examples were scored."""
        return len(self.outcomes)

    @property
    def failed(self) -> int:
        """How many examples the metric could not score."""
        return sum(o.error is not None for o in self.outcomes)

    def record(self) -> dict[str, Any]:
        """The scorecard as `whet evaluate --json` prints it."""
        body = {k: v for k, v in asdict(self).items() if k not in ("outcomes",)}
        return {**body, "n": self.n, "failed": self.failed}


def protocol(
    system: System, examples: Sequence[Example], metric: Metric, session: Session, split: str
) -> dict[str, str]:
    """What a score depends on beside the System: data, metric, engine and versions."""
    how = system.decoding
    drawn = f"sampling, temperature {how.temperature:g}, votes {how.votes}" if how.temperature else "greedy generation"
    # A folder of one's own may be trained again where it lies; what the Hub holds is called by its name.
    rankers = [Path(r) for s in system.sources if (r := getattr(s, "reranker", "")) and Path(r).is_dir()]
    read = [p for folder in rankers for p in folder.iterdir() if p.is_file()]
    return {
        "data": rows_hash(examples)[:16],
        "split": split,
        "metric": metric.name,
        "decoding": "closed set" if how.closed else drawn,
        "whet": __version__,
        "python": platform.python_version(),
        **({"corpus": "/".join(s.version[:16] for s in system.sources)} if system.sources else {}),
        **({"reranker": hash_files(read)[:16]} if read else {}),
        **getattr(metric, "rules", {}),
        **session.protocol,
    }


def _key(system: System, examples: Sequence[Example], metric: Metric, session: Session) -> str:
    """Under which outcomes are kept; the split's name does not matter, its rows and the code do."""
    rules = {k: v for k, v in protocol(system, examples, metric, session, "").items() if k != "split"}
    body = json.dumps([system.state, rows_hash(examples), rules, code()], sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()


def evaluate(
    system: System,
    examples: Sequence[Example],
    metric: Metric,
    *,
    session: Session | None = None,
    split: str = "test",
    seed: int = 0,
    store: Store | None = None,
    within: str = "",
    progress: Progress | None = None,
) -> Scorecard:
    """Score a System on examples. With a store, what was scored before under the same protocol is not run again.

    Scores over the labels, which Systems share, and what a server says are shared only `within` one run: what a System
    costs there would else depend on what other runs have scored. Raises TaskError where the metric cannot be had from
    these rows.
    """
    if not examples:
        raise TaskError("nothing to score", expected=f"rows in {split}", found="none", do=f"add {split}.jsonl")
    if metric.name == "win_rate" and not hasattr(metric, "outcomes"):
        raise TaskError(
            f"{metric.name} cannot be scored by this version",
            expected="a metric of answers", found=metric.name, do="see `whet methods` for what is at hand",
        )  # fmt: skip
    from whet.feedback import Versus

    session = session or system.session
    # What a server answers is its model's of the day, too.
    within = within if system.servers or reads_scores(system, examples, session) else ""
    key = within + _key(system, examples, metric, session)
    kept = store.outcomes(key) if store else None
    if kept is None:
        begun, before, lost = time.monotonic(), session.spent, getattr(session, "failed", 0)
        outcomes, cut, scores = _outcomes(system, examples, metric, session, store, within, progress)
        extra: dict[str, Any] = {"seconds": time.monotonic() - begun, "spent": asdict(session.spent - before), **cut}
        if store and getattr(session, "failed", 0) == lost:  # what a server did not answer it may answer next time
            store.keep_outcomes(key, outcomes, extra, scores)
    else:
        outcomes, extra = kept
        if isinstance(metric, Versus):  # what the base answered, no arm is to pay for
            metric.hear(system, examples, [o.answer for o in outcomes])
    score = metric.aggregate(outcomes)
    low, high = stats.bootstrap_interval(outcomes, metric, seed)
    rules = protocol(system, examples, metric, session, split)
    spent = Spent(**extra["spent"])
    return Scorecard(score, low, high, metric.name, outcomes, extra["seconds"], extra["truncated"], spent, rules,
                     unended=extra["unended"])  # fmt: skip


def lasting(store: Store | None, system: System) -> Store | None:
    """The store, where what the System answers can be kept: what a server holds may change behind its name."""
    return None if system.servers else store


def join(first: Scorecard, second: Scorecard, metric: Metric, seed: int) -> Scorecard:
    """One scorecard of two on different rows; what it spent and took is the second's, the first being paid for."""
    outcomes = (*first.outcomes, *second.outcomes)
    low, high = stats.bootstrap_interval(outcomes, metric, seed)
    return replace(
        second, score=metric.aggregate(outcomes), low=low, high=high, outcomes=outcomes,
        truncated=first.truncated + second.truncated, unended=first.unended + second.unended,
    )  # fmt: skip


def alike(card: Scorecard, first: Scorecard, metric: Metric, seed: int = 0) -> Scorecard:
    """The card with perplexities per token of another card's tokenizer on the same texts: per token of their own, those
    of models with different vocabularies cannot be compared.
    """
    if metric.name != "perplexity":
        return card
    tokens = dict(zip(_apart(first.outcomes), (o.weight for o in first.outcomes), strict=True))
    own = [(o, tokens.get(at, o.weight)) for at, o in zip(_apart(card.outcomes), card.outcomes, strict=True)]
    if all(o.weight == weight for o, weight in own):
        return card
    outcomes = tuple(replace(o, score=o.score * o.weight / weight, weight=weight) for o, weight in own)
    low, high = stats.bootstrap_interval(outcomes, metric, seed)
    return replace(card, score=metric.aggregate(outcomes), low=low, high=high, outcomes=outcomes)


def _apart(outcomes: Sequence[Outcome]) -> list[tuple[str, int]]:
    """A name of its own for each: rows of two files may have the same ids."""
    seen, named = Counter[str](), []
    for one in outcomes:
        seen[one.id] += 1
        named.append((one.id, seen[one.id]))
    return named


def reads_scores(system: System, examples: Sequence[Example], session: Session) -> bool:
    """Whether every label is scored to answer these, so that the scores serve the System calibrated or not."""
    labels = system.decoding.spoken if system.decoding.closed else ()
    whole = system.decoding.normalise == "sum"
    return bool(labels) and not any(e.choices for e in examples) and session.scores_all(labels, whole)


def _answers(
    system: System, examples: Sequence[Example], metric: Metric, session: Session, store: Store, within: str,
    progress: Progress | None,
) -> tuple[list[Answer], Scores]:  # fmt: skip
    """Answers read off scores over the labels, and those scores that are new.

    The scores are kept: calibration changes how they are read, not what they are.
    """
    plain = system.uncalibrated
    other = ("data", "metric", *getattr(metric, "rules", {}))
    rules = {k: v for k, v in protocol(system, [], metric, session, "").items() if k not in other}
    body = json.dumps([within, plain.state, rules, code()], sort_keys=True)
    key = hashlib.sha256(body.encode()).hexdigest()
    names = [rows_hash([e]) for e in examples]
    kept = store.scores(key)
    fresh = [e for e, name in zip(examples, names, strict=True) if name not in kept]
    # Behind the scores stands whether the prompt had to be shortened.
    made = plain.answers(fresh, session, progress) if fresh else []
    scored = {rows_hash([e]): (*a.scores, float(a.truncated)) for e, a in zip(fresh, made, strict=True)}
    kept |= scored
    return [system.decide(kept[name][:-1], bool(kept[name][-1])) for name in names], (key, scored)


def _outcomes(
    system: System, examples: Sequence[Example], metric: Metric, session: Session, store: Store | None, within: str,
    progress: Progress | None,
) -> tuple[tuple[Outcome, ...], dict[str, int], Scores | None]:  # fmt: skip
    """Outcomes, how many prompts were `truncated` and answers left `unended`, and scores over the labels to be kept."""
    if ranks := re.fullmatch(r"(?:recall|ndcg|mrr)@(\d+)", metric.name):
        ranked = score_all(metric, system.ranked(examples, int(ranks[1])), examples)
        return ranked, {"truncated": 0, "unended": 0}, None
    if metric.name != "perplexity":
        from whet.feedback import Versus

        scores = None
        if store and reads_scores(system, examples, session):
            answers, scores = _answers(system, examples, metric, session, store, within, progress)
        else:
            answers = system.answers(examples, session, progress)
        if isinstance(metric, Versus):
            metric.hear(system, examples, [a.text for a in answers])
        reads = getattr(getattr(metric, "judge", None), "session", session)  # what a judge reads is paid for, too
        before = reads.spent
        outcomes = score_all(metric, [a.text for a in answers], examples)
        if reads is not session:
            session.spent += reads.spent - before
        # Chosen among, and none could be; or a server that refused the prompt or was too slow.
        silent = [(bool(a.scores) and not a.text) or a.finish == "failed" for a in answers]
        told = [replace(o, score=0.0, error="no answer") if s else o for o, s in zip(outcomes, silent, strict=True)]
        outcomes = floored(metric, told)[0] if any(silent) else outcomes
        cut = {"truncated": sum(a.truncated for a in answers), "unended": sum(a.finish == "length" for a in answers)}
        return outcomes, cut, scores
    outcomes, shortened = perplexed(system, examples, session, progress)
    return outcomes, {"truncated": shortened, "unended": 0}, None


def perplexed(
    system: System, examples: Sequence[Example], session: Session, progress: Progress | None = None
) -> tuple[tuple[Outcome, ...], int]:
    """How likely a System finds texts (or completions behind their prompts), and how many prompts were shortened."""
    texts = [e.text if e.text is not None else e.completion for e in examples]
    room = [n + 1 for n in session.count(texts)]
    prompts, cut = system.fitting(examples, session, room)
    scored = session.score(prompts, [[t] for t in texts], progress=progress)
    made = []
    for example, row in zip(examples, scored, strict=True):
        error = None if math.isfinite(row[0].logprob) else "the log-probability is not finite"
        made.append(
            Outcome(example.id, "", -row[0].mean, "", example.group, error, weight=float(max(1, row[0].tokens)))
        )
    return tuple(made), sum(cut)


def size_bytes(system: System) -> int | None:
    """Bytes of weights on disk: the model's safetensors and every transform upon it; None for a remote model."""
    if system.model.remote:
        return None
    standing = system.model.standing
    whole = max((n for n, t in enumerate(standing) if t.kind == "weights"), default=-1)  # takes the place of all before
    folders = [local_folder(system.model, system.home)] if whole < 0 else []
    folders += [t.folder for t in standing[max(0, whole) :] if t.folder is not None and t.kind != "model"]
    return sum(p.stat().st_size for folder in folders for p in shards(folder))


def measure(card: Scorecard, system: System, examples: Sequence[Example]) -> Scorecard:
    """Add size, and latency and memory as measured in a process of its own; a server's memory is not known."""
    from whet.probe import probe

    with tempfile.TemporaryDirectory() as folder:
        system.save(Path(folder) / "system")
        some = shared_order(examples, system.decoding.closed, 0)  # the first few are looked at
        latency, memory = probe(Path(folder) / "system", system.home, some, card.metric)
    held = None if system.model.remote else memory
    return replace(card, size_bytes=size_bytes(system), latency_ms=latency, memory_bytes=held)


def compare(
    first: System,
    second: System,
    task: Task,
    *,
    split: str = "test",
    seed: int = 0,
    metric: Metric | None = None,
    store: Store | None = None,
    progress: Progress | None = None,
) -> tuple[Scorecard, Scorecard, stats.Paired]:
    """Both scorecards on the same rows, and the paired comparison of the second against the first.

    The metric is the task's unless another is given: win_rate needs a judge (`methods.reward.metric_of`).
    """
    metric = metric or get(task.metric, task.folder, task.trusted)
    rows = rows_of(task, split, split_seed(task, seed, first, second, split=split))
    cards = [
        evaluate(s, rows, metric, split=split, seed=seed, store=lasting(store, s), progress=progress)
        for s in (first, second)
    ]
    sound(metric, [o for card in cards for o in card.outcomes], rows)
    cards[1] = alike(cards[1], cards[0], metric, seed)
    return cards[0], cards[1], stats.compare(cards[0].outcomes, cards[1].outcomes, metric, seed)


def split_seed(task: Task, seed: int, *systems: System, split: str = "select") -> int:
    """The seed that Systems say the task was split by when they learnt it; the one given where none does.

    Raises TaskError where two say different ones and select is asked for: what one never saw, the other learnt from.
    """
    told = {one.split_seeds[task.name] for one in systems if task.name in one.split_seeds}
    if len(told) > 1 and split == "select":
        raise TaskError(
            "the Systems learnt from rows of one another's select", expected="Systems made with one --seed",
            found=f"seeds {', '.join(map(str, sorted(told)))}", do="compare them on test",
        )  # fmt: skip
    return min(told, default=seed)


def rows_of(task: Task, split: str, seed: int = 0) -> tuple[Example, ...]:
    """The rows of a split by its name: train, dev, test, select or confirm; select may be a cut of train, by a seed.

    Raises TaskError where the task has none.
    """
    parts = {"train": task.train, "dev": task.dev, "test": task.test, "confirm": task.test}
    rows = task.split(seed).select if split == "select" else parts.get(split)
    if rows is None:
        raise TaskError(f"no split {split!r}", expected=", ".join([*parts, "select"]), do="name one of them")
    if not rows:
        raise TaskError(f"the split {split!r} is empty", expected="rows", found="none", do="name another --split")
    return rows


def versions() -> dict[str, str]:
    """Versions of what shapes the figures."""
    from importlib.metadata import version

    names = ("torch", "transformers", "peft", "scikit-learn", "numpy", "scipy", "sacrebleu", "rouge-score")
    return {"whet": __version__, "python": sys.version.split()[0], **{n: version(n) for n in names}}


def lines(card: Scorecard) -> list[str]:
    """A scorecard for people, in lines."""
    from whet.progress import figure

    score, low, high = (figure(one, card.metric) for one in (card.score, card.low, card.high))
    alone = f", {card.latency_ms:.0f} ms each, one at a time" if card.latency_ms else ""
    made = [f"{card.metric}  {score}  [{low}, {high}]  on {card.n} examples",
            f"{card.seconds:.1f} s of answering{alone}"]  # fmt: skip
    if card.memory_bytes and card.size_bytes:
        made.append(f"{card.size_bytes / 1e6:.0f} MB on disk, {card.memory_bytes / 1e6:.0f} MB of memory at most")
    why = next((o.error for o in card.outcomes if o.error), "")
    failed = f"examples could not be scored: {short_line(why, 200)}"
    wrong = {"prompts were shortened": card.truncated, failed: card.failed,
             "answers were cut (max_tokens)": card.unended}  # fmt: skip
    return [*made, *(f"{count} {what}" for what, count in wrong.items() if count)]
