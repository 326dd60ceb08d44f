"""Knowledge: closed book, lookup, KAPING (an own version of Baek et al. 2023) and the right facts, side by side.

    .venv/bin/python benchmarks/knowledge.py [--task pathquestion,catalogue] [--parts lookup,tuned,train] [--count 100]

`lookup` asks the model as it is, `tuned` after fine-tuning on the task's rows as each arm shows them, `train` teaches
the facts themselves and asks for them in phrasings that were trained on and in others. Exact match, and `contains`,
since a model that was not tuned answers in whole sentences.
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

HOPS = {"pathquestion": 3}
KAPING_HOPS, KAPING_K = 2, 10


@dataclass(frozen=True)
class Shown:
    """A source for comparison: what stands in front of each question, ready made."""

    fingerprint: str
    texts: dict[str, list[str]] = field(compare=False)
    k: int = 1
    folder: Path | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What tells it from others."""
        return {"kind": "shown", "fingerprint": self.fingerprint}

    def find(self, questions: Sequence[str], home: Path, k: int | None = None) -> list[Any]:
        """One passage for each question."""
        from whet.documents import Passage
        from whet.retrieval import Found

        return [[Found(Passage("", "", text, "", 0), 1.0) for text in self.texts.get(q, ())] for q in questions]


def kaping(rows: Sequence[Any], facts: Any, home: Path) -> dict[str, list[str]]:
    """Entities by string match, triples of two hops as "(s, r, o)", the ten most like the question by embedding."""
    import numpy as np

    from whet.embed import Embedder

    told = [tuple(facts.named(part)[0] for part in one) for one in facts.triples]
    near: dict[str, list[int]] = {}
    for n, (s, _, o) in enumerate(told):
        near.setdefault(s, []).append(n)
        near.setdefault(o, []).append(n)
    lines = [f"({s}, {r}, {o})" for s, r, o in told]
    embedder, made = Embedder(home), {}
    vectors, asked = embedder(lines), embedder([e.prompt for e in rows])
    for row, vector in zip(rows, asked, strict=True):
        linked = sorted((name for name in near if name.lower() in row.prompt.lower()), key=len, reverse=True)[:1]
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
    for row, ways in zip(rows, linker.candidates([e.prompt for e in rows], hops), strict=True):
        wanted = {" ".join(words(a)) for a in row.answers or (row.completion,)}
        right = [c for c in ways if {" ".join(words(linker.graph.nodes[n][0])) for n in c.ends} == wanted]
        best = min(right, key=lambda c: (len(c.way), sum(s < 0 for s in c.way)), default=None)
        told = [linker.graph.sentence(best.node, best.way, best.ends)] if best else []
        terms = {linker.graph.nodes[n][0]: text for n, text in linker.graph.described.items()}
        made[row.prompt] = told or [f"{row.group}: {terms[row.group]}"] if best or row.group in terms else []
    return made


def main() -> None:
    """Run the benchmark."""
    from whet import stats, triples
    from whet.linking import opened
    from whet.methods import Run
    from whet.methods.finetune import FineTune
    from whet.methods.knowledge import Knowledge
    from whet.metrics import get
    from whet.model import resolve
    from whet.scorecard import evaluate
    from whet.search import base_system
    from whet.store import Store
    from whet.task import rows_hash

    options = common.parser(__doc__)
    common.add_model(options)
    options.add_argument("--task", default="pathquestion,catalogue", help="tasks with knowledge (default: %(default)s)")
    options.add_argument("--parts", default="lookup,tuned", help="lookup, tuned and train (default: %(default)s)")
    options.add_argument("--arms", default="closed book,kaping,lookup k=1,lookup k=10,right facts",
                         help="which to run (default: %(default)s)")  # fmt: skip
    options.add_argument("--count", type=int, default=100, help="questions of test, drawn by seed 0")
    options.add_argument("--tokens", type=int, default=60_000, help="that a fine-tuning may train on")
    options.add_argument("--facts", type=int, default=100, help="facts that `train` asks for afterwards")
    options = options.parse_args()
    parts, made, lines = options.parts.split(","), {}, []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        run = Run(Store(home), trained_tokens=options.tokens,
                  tell=lambda what, n, of: print(f"  {what} {n}/{of}", end="\r", file=sys.stderr))  # fmt: skip
        ref = resolve(options.model)
        for name in options.task.split(","):
            place = common.ROOT / "examples" / "helpdesk" if name == "catalogue" else options.tasks
            task = common.load_task(place, name)
            data = task.split().learnable
            facts, _ = triples.load(data.knowledge, data.glossary, False, home)
            base = base_system(ref, task, data, run.session(ref), home)
            rows = random.Random(0).sample(list(task.test), min(options.count, len(task.test)))
            hops, every = HOPS.get(name, 2), [*data.train, *rows]
            ours = {f"lookup k={k}": Knowledge(hops=hops, k=k).apply(base, data, run) for k in (1, 10)}
            linker = opened(ours["lookup k=1"].sources[0].folder, home)
            arms = {"closed book": base, **ours}
            for arm, texts in (("kaping", lambda: kaping(every, facts, home)),
                               ("right facts", lambda: oracle(every, linker, hops))):  # fmt: skip
                if arm in options.arms:
                    source = Shown(f"{arm} {rows_hash(every)}", texts())
                    arms[arm] = replace(base, sources=(source,))
            if "train" in parts:
                lines += taught(task, data, base, linker.graph, run, options, made)
            for part in (p for p in parts if p != "train"):
                cards = {}
                for arm in options.arms.split(","):
                    system = arms[arm]
                    if part == "tuned":
                        system = FineTune().apply(system, data, run)
                    begun = time.monotonic()
                    system.passages([e.prompt for e in rows])
                    seconds = time.monotonic() - begun
                    card = evaluate(system, rows, get("exact_match"), session=run.session(system.model), store=None)
                    cards[arm] = card
                    spoken = get("contains")
                    answers = [o.answer for o in card.outcomes]
                    held = sum(spoken.score(a, e) for a, e in zip(answers, rows, strict=True)) / len(rows)
                    made[f"{name}, {part}, {arm}"] = {"exact": card.score, "low": card.low, "high": card.high,
                                                      "contains": held}  # fmt: skip
                    lines.append([f"{name}, {part}, {arm}", len(rows), f"{100 * card.score:.1f}",
                                  f"[{100 * card.low:.1f}, {100 * card.high:.1f}]", f"{100 * held:.1f}",
                                  f"{1000 * seconds / len(rows):.1f}", f"{1000 * card.seconds / len(rows):.0f}"])  # fmt: skip
                    print(*lines[-1], file=sys.stderr)
                for other in ("closed book", "kaping"):
                    if other in cards and "lookup k=1" in cards:
                        paired = stats.compare(cards[other].outcomes, cards["lookup k=1"].outcomes, get("exact_match"))
                        made[f"{name}, {part}, lookup k=1 over {other}"] = [paired.difference, paired.low, paired.high]
    print(common.table(["task, part, arm", "questions", "exact", "95 %", "contains", "ms to find", "ms a question"],
                       lines))  # fmt: skip
    common.finish("knowledge", {"figures": made})


def taught(task: Any, data: Any, base: Any, graph: Any, run: Any, options: Any, made: dict[str, Any]) -> list[list[Any]]:
    """The facts taught, and asked for in phrasings that were trained on, in others, and by the task's own questions."""
    from whet.methods.knowledge import Knowledge, facts_of, put
    from whet.metrics import get
    from whet.scorecard import evaluate
    from whet.task import Example

    method = Knowledge(mode="train")
    begun = time.monotonic()
    system = method.apply(base, data, run)
    seconds = time.monotonic() - begun
    some = random.Random(1).sample(facts_of(graph), options.facts)
    draw, lines = random.Random(2), []
    asked = {kind: [Example(f"{n}", put(draw.choice(run.notes[kind]), one.phrase), one.answers[0], one.answers, group=str(n))
                    for n, one in enumerate(some)] for kind in ("seen", "held")}  # fmt: skip
    for kind, rows in {**asked, "test": random.Random(0).sample(list(task.test), min(options.count, len(task.test)))}.items():
        for arm, one in (("before", base), ("after", system)):
            card = evaluate(one, rows, get("exact_match"), session=run.session(one.model), store=None)
            made[f"{task.name}, train, {kind}, {arm}"] = {"exact": card.score, "low": card.low, "high": card.high}
            lines.append([f"{task.name}, train, {kind}, {arm}", len(rows), f"{100 * card.score:.1f}",
                          f"[{100 * card.low:.1f}, {100 * card.high:.1f}]", "-", "-", f"{1000 * card.seconds / len(rows):.0f}"])  # fmt: skip
            print(*lines[-1], file=sys.stderr)
    made[f"{task.name}, train"] = {"seconds": seconds, "trained_tokens": run.spent.trained_tokens}
    return lines


if __name__ == "__main__":
    main()
