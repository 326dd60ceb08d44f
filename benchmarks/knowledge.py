"""Knowledge: closed book, lookup, KAPING (an own version of Baek et al. 2023) and the right facts, side by side.

    .venv/bin/python benchmarks/knowledge.py [--task pathquestion,catalogue] [--parts lookup,tuned] [--count 100]

`lookup` asks the model as it is, `demonstrated` behind four examples with their facts, `tuned` after fine-tuning on the
task's rows as each arm shows them; `train` teaches facts themselves and asks for them in phrasings that were trained on
and in others. Exact match, and `contains`, since a model that saw no example answers in whole sentences.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import common

KAPING_HOPS, KAPING_K = 2, 10
ASKED = {"closed book": 0.2, "kaping": 0.0}  # that lookup is ahead of them by
FAMILIAR = ("house", "river", "green", "seven", "Paris", "music", "apple", "stone", "winter", "bridge", "paper",
            "monday", "silver", "garden", "window", "horse", "coffee", "island", "mirror", "candle")  # fmt: skip


@dataclass(frozen=True)
class Shown:
    """A source for comparison: what stands in front of each question, ready made."""

    fingerprint: str
    texts: dict[str, list[str]] = field(compare=False)
    brief: bool = True
    k: int = 1
    folder: Path | None = None
    kind: str = "shown"
    store: str = ""

    @property
    def version(self) -> str:
        """What it shows never changes."""
        return self.fingerprint

    @property
    def settings(self) -> dict[str, Any]:
        """What tells it from others."""
        return {"kind": "shown", "fingerprint": self.fingerprint}

    def find(self, questions: Sequence[Any], home: Path, k: int | None = None) -> list[Any]:
        """One passage for each question."""
        from whet.documents import Passage
        from whet.retrieval import Found

        return [[Found(Passage("", "", text, "", 0), 1.0) for text in self.texts.get(q.now, ())] for q in questions]


def kaping(rows: Sequence[Any], facts: Any, home: Path) -> dict[str, list[str]]:
    """All entities whose names or aliases a question says as whole words, the triples within two hops of them as
    "(s, r, o)", and of these the ten most like the question by embedding."""
    import numpy as np

    from whet.embed import Embedder
    from whet.linking import MOST_WORDS, words

    named: dict[str, set[str]] = {}
    for one in {part for s, _, o in facts.triples for part in (s, o)}:
        for name in facts.named(one):
            named.setdefault(" ".join(words(name)), set()).add(facts.named(one)[0])
    told = [tuple(facts.named(part)[0] for part in one) for one in facts.triples]
    near: dict[str, list[int]] = {}
    for n, (s, _, o) in enumerate(told):
        near.setdefault(s, []).append(n)
        near.setdefault(o, []).append(n)
    lines = [f"({s}, {r}, {o})" for s, r, o in told]
    embedder, made = Embedder(home), {}
    vectors, asked = embedder(lines), embedder([e.prompt for e in rows])
    for row, vector in zip(rows, asked, strict=True):
        said, linked, at = words(row.prompt), list[str](), 0
        while at < len(said):  # the longest name from here on
            size = next((n for n in range(MOST_WORDS, 0, -1) if " ".join(said[at : at + n]) in named), 0)
            linked += sorted(named[" ".join(said[at : at + size])]) if size else []
            at += max(1, min(size, len(said) - at))
        found: set[int] = set()
        for _ in range(KAPING_HOPS):
            found |= {n for name in linked for n in near[name][:1000]}
            linked = sorted({part for n in found for part in (told[n][0], told[n][2])})
        order = sorted(found)
        best = [order[i] for i in np.argsort(-(vectors[order] @ vector), kind="stable")[:KAPING_K]] if order else []
        head = "Below are facts in the form of the triple meaningful to answer the question."
        made[row.prompt] = ["\n".join([head, *(lines[n] for n in best)])] if best else []
    return made


def oracle(rows: Sequence[Any], linker: Any, hops: int) -> dict[str, list[str]]:
    """The shortest way to exactly the accepted answers, told as lookup tells it; else the description of the term."""
    from whet.linking import words

    made: dict[str, list[str]] = {}
    for row, ways in zip(rows, linker.candidates([e.query for e in rows], hops), strict=True):
        wanted = {" ".join(words(a)) for a in row.answers or (row.completion,)}
        right = [c for c in ways if {" ".join(words(linker.graph.nodes[n][0])) for n in c.ends} == wanted]
        best = min(right, key=lambda c: (len(c.way), sum(s < 0 for s in c.way)), default=None)
        told = [linker.graph.sentence(best.node, best.way, best.ends)] if best else []
        terms = {linker.graph.nodes[n][0]: text for n, text in linker.graph.described.items()}
        made[row.prompt] = told or [f"{row.group}: {terms[row.group]}"] if best or row.group in terms else []
    return made


def main() -> None:
    """Run the benchmark."""
    options = common.parser(__doc__)
    common.add_model(options)
    options.add_argument("--task", default="pathquestion,catalogue", help="tasks with knowledge (default: %(default)s)")
    options.add_argument("--parts", default="lookup,demonstrated",
                         help="lookup, demonstrated, tuned, train (default: %(default)s)")  # fmt: skip
    options.add_argument("--arms", default="closed book,kaping,lookup k=1,lookup k=10,right facts",
                         help="which to run (default: %(default)s)")  # fmt: skip
    options.add_argument("--count", type=int, default=100, help="questions, drawn by seed 0")
    options.add_argument("--tokens", type=int, default=60_000, help="that a training may take")
    options.add_argument("--facts", type=int, default=100, help="triples that `train` teaches, drawn by seed 0")
    options = options.parse_args()
    made: dict[str, Any] = {}
    lines: list[list[Any]] = []
    print(common.machine_line(where := common.machine(common.computing())))
    with tempfile.TemporaryDirectory() as folder:
        for name in options.task.split(","):
            place = common.ROOT / "examples" / "helpdesk" if name == "catalogue" else options.tasks
            task = common.load_task(place, name)
            for part in options.parts.split(","):
                (taught if part == "train" else shown)(task, part, Path(folder), options, made, lines)
    print(common.table(["task, part, arm", "questions", "exact", "95 %", "contains", "ms to find", "ms a question"],
                       lines))  # fmt: skip
    common.finish("knowledge", {"machine": where, "figures": made})


def begin(task: Any, home: Path, options: Any) -> tuple[Any, Any, Any, list[Any]]:
    """A run, the base, what can be learnt from, and the questions asked."""
    from whet.methods import Run
    from whet.model import resolve
    from whet.search import base_system
    from whet.store import Store

    run = Run(Store(home), trained_tokens=options.tokens,
              tell=lambda what, n, of: print(f"  {what} {n}/{of}    ", end="\r", file=sys.stderr))  # fmt: skip
    ref, data = resolve(options.model), task.split().learnable
    base = base_system(ref, task, data, run.session(ref), home)
    return run, base, data, random.Random(0).sample(list(task.test), min(options.count, len(task.test)))


def score(name: str, system: Any, rows: list[Any], run: Any, made: dict[str, Any], lines: list[list[Any]]) -> Any:
    """Answer questions; put the figures on the list. Returns the scorecard."""
    from whet.metrics import get
    from whet.scorecard import evaluate

    found = "-"  # what was made beforehand was not looked for
    if all(s.kind != "shown" for s in system.sources):
        system.found([rows[0].query])  # opened before the clock starts
        begun = time.monotonic()
        system.found([e.query for e in rows])
        found = f"{1000 * (time.monotonic() - begun) / len(rows):.1f}"
    card = evaluate(system, rows, get("exact_match"), session=run.session(system.model))
    spoken = sum(get("contains").score(o.answer, e) for o, e in zip(card.outcomes, rows, strict=True)) / len(rows)
    made[name] = {"exact": card.score, "low": card.low, "high": card.high, "contains": spoken}
    lines.append([name, len(rows), f"{100 * card.score:.1f}", f"[{100 * card.low:.1f}, {100 * card.high:.1f}]",
                  f"{100 * spoken:.1f}", found, f"{1000 * card.seconds / len(rows):.0f}"])  # fmt: skip
    print(*lines[-1], file=sys.stderr)
    return card


def shown(task: Any, part: str, home: Path, options: Any, made: dict[str, Any], lines: list[list[Any]]) -> None:
    """Facts in front of the question, for the model as it is or tuned on what each arm shows."""
    from whet import stats, triples
    from whet.linking import opened
    from whet.methods.fewshot import FewShot
    from whet.methods.finetune import FineTune
    from whet.methods.knowledge import Knowledge
    from whet.metrics import Contains, get
    from whet.task import rows_hash

    run, base, data, rows = begin(task, home, options)
    facts, _ = triples.load(data, home)
    every, cards = [*data.train, *rows], {}
    looked = Knowledge(k=1).apply(base, data, run).sources[0]
    for arm in options.arms.split(","):
        system = base
        if arm in ("kaping", "right facts"):
            linker = opened(looked.folder, home)
            texts = kaping(every, facts, home) if arm == "kaping" else oracle(every, linker, looked.hops)
            system = replace(base, sources=(Shown(f"{arm} {rows_hash(every)}", texts),))
        elif arm != "closed book":
            system = replace(base, sources=(replace(looked, k=int(arm.partition("=")[2])),))
        if part == "tuned":
            system = FineTune().apply(system, data, run)
        if part == "demonstrated":
            system = FewShot(k=4).apply(system, data, run)
        cards[arm] = score(f"{task.name}, {part}, {arm}", system, rows, run, made, lines)
    for metric in (get("exact_match"), Contains()):
        for other in ("closed book", "kaping"):
            if other in cards and "lookup k=1" in cards:
                first, second = ([*_scored(cards[arm], rows, metric)] for arm in (other, "lookup k=1"))
                paired = stats.compare(first, second, metric)
                name = f"{task.name}, {part}, {metric.name}, lookup k=1 over {other}"
                made[name] = [paired.difference, paired.low, paired.high]
                print(f"{name}: {100 * paired.difference:+.1f} points [{100 * paired.low:+.1f}, "
                      f"{100 * paired.high:+.1f}] {common.verdict(paired.difference, ASKED[other])}")  # fmt: skip


def _scored(card: Any, rows: Sequence[Any], metric: Any) -> Any:
    from whet.metrics import score_all

    return score_all(metric, [o.answer for o in card.outcomes], rows)


def taught(task: Any, part: str, home: Path, options: Any, made: dict[str, Any], lines: list[list[Any]]) -> None:
    """Facts taught, and asked for in phrasings that were trained on and in others; and what else was forgotten."""
    from whet import triples
    from whet.graph import Graph
    from whet.methods.knowledge import Knowledge, facts_of, put
    from whet.task import Example

    run, base, data, _ = begin(task, home, options)
    facts, _ = triples.load(replace(data, glossary=None), home)
    draw = random.Random(0)
    some = draw.sample(facts.triples, min(options.facts, len(facts.triples)))
    file = home / "taught.tsv"
    file.write_text("".join("\t".join(one) + "\n" for one in some), encoding="utf-8")
    data = replace(data, knowledge=file, glossary=None, train=())
    every = facts_of(Graph.of(triples.gather(some)))
    asked = draw.sample(every, min(options.count, len(every)))
    begun = time.monotonic()
    method = Knowledge(mode="train")
    system = method.apply(base, data, run)
    seconds = time.monotonic() - begun
    other = [Example(str(n), f"Repeat this word: {one}", one, (one,)) for n, one in enumerate(FAMILIAR)]
    for kind in ("seen", "held"):
        frames = [method.shown(one, run.seed) if kind == "seen" else run.notes["held"] for one in asked]
        rows = [Example(f"{n}", put(draw.choice(frames[n]), one.phrase), one.answers[0], one.answers, group=str(n))
                for n, one in enumerate(asked)]  # fmt: skip
        score(f"{task.name}, train, {kind} phrasings", system, rows, run, made, lines)
    for arm, one in (("before", base), ("after", system)):
        score(f"{task.name}, train, a familiar request, {arm}", one, other, run, made, lines)
    made[f"{task.name}, train"] = {"seconds": seconds, "trained_tokens": run.spent.trained_tokens,
                                   "facts": len(some), "questions": len(every)}  # fmt: skip


if __name__ == "__main__":
    main()
