"""Fine-tuning: does leaving out suspects help, and which kind of adapter, each with the same budget of learning rates?

suspects  a fifth of a task's train labels is flipped to another label by a seeded draw. `whet.suspects.find` names
          rows; its precision and recall are counted against what was flipped. Then the model is trained with all rows,
          without the named ones (`clean`), and on the labels as they were, and tested on the same clean rows, in pairs.
adapters  LoRA, DoRA and full training race the learning rates of their own space() on validation, each within the same
          trained tokens; the winners are tested on the same rows.

    .venv/bin/python benchmarks/finetuning.py [--parts suspects,adapters] [--task sst2,trec] [--rows 600] [--test 400]
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common

PARTS = ("suspects", "adapters")
FLIPPED = 0.2
LEAST_PRECISION = 0.8


def flipped(rows: Sequence[Any], labels: Sequence[str], seed: int) -> tuple[tuple[Any, ...], set[str]]:
    """The rows with a fifth of their labels changed to another one, and the ids of those."""
    draw = random.Random(f"{seed}/flipped")
    wrong = {e.id for e in draw.sample(list(rows), round(FLIPPED * len(rows)))}

    def other(row: Any) -> Any:
        label = draw.choice([x for x in labels if x != row.completion])
        return replace(row, completion=label, answers=(label,))

    return tuple(other(e) if e.id in wrong else e for e in rows), wrong


class Bench(common.Bench):
    """A task whose tuned models are closed once they are tested."""

    def tested(self, system: Any) -> Any:
        """The scorecard of a System on the test rows."""
        card = super().tested(system)
        if system.model != self.base.model:
            del self.run.sessions[system.model]
        return card


def suspects(bench: Bench) -> dict[str, Any]:
    """Precision and recall of the named rows, and the accuracy after each of three trainings."""
    from whet import stats
    from whet import suspects as finder
    from whet.embed import Embedder
    from whet.methods.finetune import FineTune
    from whet.metrics import get

    rows, wrong = flipped(bench.data.train, bench.task.labels, bench.options.seed)
    noisy, method = replace(bench.data, train=rows), FineTune(epochs=bench.options.epochs)
    plain = {s.id for s in finder.find(rows, Embedder(bench.run.home), bench.options.seed)}
    run = replace(bench.run, notes={})
    named = {s.id for s in replace(method, clean=True).suspects(bench.base, noisy, run)}
    print(f"  {bench.task.name}: by the classifiers alone {len(plain)} rows named, precision "
          f"{len(plain & wrong) / max(1, len(plain)):.2f}", flush=True)  # fmt: skip
    cards = {
        "all rows": bench.tested(method.apply(bench.base, noisy, bench.run)),
        "without suspects": bench.tested(replace(method, clean=True).apply(bench.base, noisy, bench.run)),
        "labels as they were": bench.tested(method.apply(bench.base, bench.data, bench.run)),
    }
    paired = stats.compare(cards["all rows"].outcomes, cards["without suspects"].outcomes, get(bench.task.metric))
    return {"named": len(named), "flipped": len(wrong), "precision": len(named & wrong) / max(1, len(named)),
            "recall": len(named & wrong) / len(wrong), "scores": {n: c.score for n, c in cards.items()},
            "difference": paired.difference, "low": paired.low, "high": paired.high}  # fmt: skip


def adapters(bench: Bench) -> dict[str, Any]:
    """The winner of each kind's race of learning rates, and its score on test."""
    from whet.methods.finetune import FineTune
    from whet.search import tune

    found = {}
    for kind, rate in (("lora", 1e-3), ("dora", 1e-3), ("full", 1e-4)):
        method = FineTune(adapter=kind, learning_rate=rate, epochs=bench.options.epochs)
        run = replace(bench.run, notes={})
        system, ended = tune.race(tune.candidates(method), bench.base, bench.data, run)
        best: Any = ended[0].method
        card = bench.tested(system)
        found[kind] = {"rate": best.learning_rate, "loss": ended[0].loss, "score": card.score,
                       "low": card.low, "high": card.high}  # fmt: skip
        print(f"  {bench.task.name}, {kind}: {100 * card.score:.1f} at {best.learning_rate:g}", flush=True)
    return found


def show(name: str, body: dict[str, Any]) -> None:
    """Tables and verdicts of one task."""
    if s := body.get("suspects"):
        print(f"\n{name}: {s['flipped']} labels flipped, {s['named']} rows named, precision {s['precision']:.2f} "
              f"({common.verdict(s['precision'], LEAST_PRECISION)}), recall {s['recall']:.2f}")  # fmt: skip
        print(common.table(["trained on", "score"], [[n, f"{100 * v:.1f}"] for n, v in s["scores"].items()]))
        print(f"without suspects against all rows: {100 * s['difference']:+.1f} points "
              f"[{100 * s['low']:+.1f}, {100 * s['high']:+.1f}] {common.verdict(s['difference'], 0)}")  # fmt: skip
    if a := body.get("adapters"):
        print(f"\n{name}, equal budgets of learning rates")
        print(common.table(["adapter", "learning rate", "validation loss", "score", "interval"], [
            [k, f"{r['rate']:g}", f"{r['loss']:.4f}", f"{100 * r['score']:.1f}",
             f"[{100 * r['low']:.1f}, {100 * r['high']:.1f}]"] for k, r in a.items()
        ]))  # fmt: skip


def main() -> None:
    """Run the benchmark."""
    options = common.parser(__doc__)
    common.add_model(options)
    options.add_argument("--parts", default=",".join(PARTS))
    options.add_argument("--task", default="sst2", help="shared tasks with a closed set (default: %(default)s)")
    options.add_argument("--rows", type=int, default=600, help="train rows")
    options.add_argument("--test", type=int, default=400, help="test rows")
    options.add_argument("--epochs", type=float, default=3.0)
    options.add_argument("--seed", type=int, default=0)
    options = options.parse_args()
    made: dict[str, Any] = {}
    print(common.machine_line(where := common.machine(common.computing())))
    with tempfile.TemporaryDirectory() as home:
        for name in options.task.split(","):
            bench = Bench(options, name, Path(home))
            made[name] = {part: globals()[part](bench) for part in PARTS if part in options.parts.split(",")}
            show(name, made[name])
    common.finish("finetuning", {"machine": where, "model": options.model, "rows": options.rows,
                                 "seed": options.seed, "tasks": made})  # fmt: skip


if __name__ == "__main__":
    main()
