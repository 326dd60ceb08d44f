"""Continual learning: streams of five tasks, learnt one after the other by every strategy, and changed facts.

For each order of the stream: the matrix of task x time, average accuracy, forgetting (mean drop from the best),
backward and forward transfer, and accuracy on the newest task. Sequential LoRA is the baseline, O-LoRA (`orthogonal`,
with the lambda of its released scripts) the rival, training on everything at once (`joint`) the upper bound. All take
the same adapter, rows and epochs; of earlier tasks a strategy sees only the --keep rows that the System carries.
Differences are paired over the same test rows. With --general, perplexity on wikitext2, accuracy on arc_easy and the
drift from the base are measured after the last task, too. With --facts, 100 made-up facts are learnt, 50 of them then
contradicted; both are asked in a phrasing that no training row has.

A run that is stopped goes on where it was with `--home DIR`, which keeps what each strategy reached on each order:
several machines or processes can take a strategy each.

    .venv/bin/python benchmarks/continual.py [--rows 1000] [--orders 1,2,3] [--strategies replay,...] [--facts]
        [--home DIR]
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import common

ORDERS = (
    ("trec", "agnews", "sst2", "subj", "banking77"),
    ("banking77", "subj", "trec", "sst2", "agnews"),
    ("sst2", "banking77", "agnews", "trec", "subj"),
)
STRATEGIES = ("sequential", "replay", "ewc", "orthogonal", "osf", "merge", "joint")
ASKED = {"forgetting": 0.25, "newest": 0.98, "joint": -0.02, "rival": 0.0, "changed": 0.80, "untouched": -0.02}
# What is asked of a fact: phrasings that are trained, and one that is not.
RELATIONS = {
    "founder": ("Who founded {}?", "Name the founder of {}.", "{} was founded by whom?", "By whom was {} set up?"),
    "river": ("Which river runs through {}?", "Name the river of {}.", "{} lies on which river?",
              "On the banks of what river does {} stand?"),
    "stone": ("What stone is {} built of?", "Name the stone used in {}.", "{} is made from which stone?",
              "Which stone were the houses of {} made of?"),
}  # fmt: skip
SYLLABLES = ("bre", "kan", "dol", "mi", "vor", "sel", "tu", "pha", "gri", "lon", "ey", "mar", "ost", "ni", "qua", "rem")


@dataclass(frozen=True)
class Setting:
    """What all strategies share."""

    run: Any
    base: Any
    rows: int
    test: int
    keep: int
    share: float
    tuning: dict[str, Any]
    general: int  # rows of each task that nobody learnt
    folder: Path  # of tasks


@dataclass(frozen=True)
class Ended:
    """A stream that was learnt: its matrix, the outcomes at the end, task by task, and what it did to all else."""

    matrix: list[list[float]]
    outcomes: Sequence[Any]
    general: dict[str, float]


def shortened(task: Any, rows: int, test: int, seed: int) -> Any:
    """The task with so many train rows, balanced and none of them a repeat of test, and a sample of its test rows."""
    from whet.methods.fewshot import balanced
    from whet.splits import without

    train, _ = without(task.train, task.test)
    some = random.Random(seed).sample(task.test, min(test, len(task.test)))  # a test may be sorted by label
    return replace(task, train=tuple(balanced(train, rows, seed)), test=tuple(some))


def learnable(task: Any) -> Any:
    """All train rows: nothing is selected here, so that none is cut off for it."""
    return replace(task.split().learnable, train=task.train)


def asked(system: Any, task: Any, run: Any) -> Any:
    """The System asked a task; whole answers are scored, as they are trained, so that all times compare."""
    from whet.memory import as_task

    found = as_task(system, task, run.session(system.model))
    return replace(found, decoding=replace(found.decoding, normalise="sum"))


def measured(system: Any, tasks: Sequence[Any], setting: Setting) -> tuple[list[float], list[Any]]:
    """Scores and outcomes on every task of the stream; sessions of models that are done with are closed."""
    from whet.metrics import get
    from whet.scorecard import evaluate

    run = setting.run
    cards = [
        evaluate(asked(system, t, run), t.test, get(t.metric), session=run.session(system.model), store=run.store)
        for t in tasks
    ]
    outcomes = [replace(o, id=f"{t.name}/{o.id}") for t, c in zip(tasks, cards, strict=True) for o in c.outcomes]
    return [c.score for c in cards], outcomes


def release(setting: Setting, *keep: Any) -> None:
    """Close all sessions but those of these Systems: a stream opens many models."""
    wanted = {setting.base.model, *(s.model for s in keep)}
    for ref in [r for r in setting.run.sessions if r not in wanted]:
        setting.run.sessions.pop(ref).close()


def stream(tasks: Sequence[Any], strategy: str, setting: Setting) -> Ended:
    """Learn the tasks one after the other."""
    from whet.memory import known, remember
    from whet.methods.continual import Continual, replayed_share
    from whet.methods.finetune import FineTune

    run, system, matrix = setting.run, setting.base, [measured(setting.base, tasks, setting)[0]]
    outcomes: list[Any] = []
    for n, task in enumerate(tasks):
        start = replace(asked(system, task, run), card={"memory": system.card.get("memory", [])})
        data = learnable(task)
        # All take 16 new rows a step; those that replay take earlier ones beside.
        share = setting.share or replayed_share(n)
        more = {"share": share, "batch": round(16 / (1 - share))} if strategy == "replay" and n else {"batch": 16}
        if strategy == "osf" and n:
            more["learning_rate"] = 0.0  # its own: that of adapters is far too much for whole weights
        tuning = {**setting.tuning, **more}
        method = Continual(strategy=strategy, **tuning) if n else FineTune(**tuning)
        taught = method.apply(start, data, run)
        memory = remember(taught, data, known(start, data, run.session(start.model)), keep=setting.keep, seed=run.seed)
        system = replace(taught, card={"task": task.name, "memory": memory})
        scores, outcomes = measured(system, tasks, setting)
        matrix.append(scores)
        print(f"  {strategy}, {task.name} learnt: {' '.join(f'{100 * s:.1f}' for s in scores)}", flush=True)
        release(setting, system)
    return Ended(matrix, outcomes, general(system, setting))


def joint(tasks: Sequence[Any], setting: Setting) -> Ended:
    """One training on the rows of all tasks, mixed; each rendered as its task is asked."""
    from whet.methods.finetune import FineTune
    from whet.task import rows_hash
    from whet.train.adapters import Adapter
    from whet.train.batches import steps
    from whet.train.lesson import Lesson, key, mean_loss, render_rows, teach
    from whet.train.loop import Schedule, Settings
    from whet.train.losses import NextToken

    run, method = setting.run, FineTune(**{**setting.tuning, "batch": 16})  # as many steps as a stream takes
    parts = [(asked(setting.base, t, run), learnable(t)) for t in tasks]

    def prepare(live: Any) -> Any:
        rows, checks = [], []
        for system, data in parts:
            fit, held = data.validation(seed=run.seed, most=100)
            rows += render_rows(system, fit, live)[0]
            checks += render_rows(system, held, live)[0]
        count = round(method.epochs * len(rows) / method.batch)
        return Lesson(steps(rows, method.batch, run.seed), NextToken(), Settings(Schedule(method.rate, count)),
                      lambda: mean_loss(live, checks))  # fmt: skip

    name = key("joint", asdict(method), setting.base.fingerprint, [rows_hash(d.train) for _, d in parts], run.seed)
    system = teach(setting.base, run, name, Adapter(rank=method.rank, alpha=2 * method.rank), prepare)
    scores, outcomes = measured(system, tasks, setting)
    found = general(system, setting)
    release(setting)
    return Ended([scores], outcomes, found)


def ended(order: int, tasks: Sequence[Any], strategy: str, setting: Setting, folder: Path | None) -> Ended:
    """A stream as an earlier run has left it in `folder`, or learnt now."""
    def make() -> dict[str, Any]:
        return asdict(joint(tasks, setting) if strategy == "joint" else stream(tasks, strategy, setting))

    from whet.store import code
    from whet.task import rows_hash

    what = [setting.base.fingerprint[:12], code(), *(rows_hash((*t.train, *t.test))[:6] for t in tasks)]
    shared = (setting.rows, setting.test, setting.keep, setting.share, setting.general, *setting.tuning.values())
    name = f"order {order}, {strategy}, {' '.join(map(str, shared))}, seed {setting.run.seed}, {' '.join(what)}"
    found = common.kept(folder, name, make)
    return Ended(**{**found, "outcomes": common.outcomes(found["outcomes"])})


def general(taught: Any, setting: Setting) -> dict[str, float]:
    """What the stream did to all else: perplexity, multiple choice, and the drift from the base on both."""
    if not (count := setting.general):
        return {}
    from whet.metrics import get
    from whet.retention import drift
    from whet.scorecard import evaluate
    from whet.train.lesson import render_rows

    run, found, moved = setting.run, {}, []
    for name in ("wikitext2", "arc_easy"):
        task = common.load_task(setting.folder, name)
        for side, system in (("base", setting.base), ("after", taught)):
            one, session = asked(system, task, run), run.session(system.model)
            card = evaluate(one, task.test[:count], get(task.metric), session=session, store=run.store)
            found[f"{name} {side}"] = card.score
        rows, _ = render_rows(one, task.test[: min(count, 64)], session)
        moved.append(drift(run.session(setting.base.model), session, rows))
    return {**found, "drift": sum(moved) / len(moved)}


def compared(ends: dict[str, Ended]) -> dict[str, Any]:
    """The figures of one order, and what is asked of the default."""
    from whet import stats
    from whet.metrics import get
    from whet.retention import retention

    figures: dict[str, Any] = {n: asdict(retention(e.matrix)) for n, e in ends.items() if n != "joint"}
    if "joint" in ends:
        figures["joint"] = {"average": sum(ends["joint"].matrix[0]) / len(ends["joint"].matrix[0])}
    pairs = {
        name: asdict(stats.compare(e.outcomes, ends["replay"].outcomes, get("accuracy")))
        for name, e in ends.items()
        if "replay" in ends and name != "replay"
    }
    return {"figures": figures, "replay_against": pairs, "matrices": {n: e.matrix for n, e in ends.items()}}


def show(order: int, tasks: Sequence[str], body: dict[str, Any]) -> None:
    """Matrices, figures and verdicts of one order."""
    for name, matrix in body["matrices"].items():
        marks = ["all at once"] if name == "joint" else ["start", *tasks]
        print(f"\norder {order}, {name}")
        print(common.table(["after", *tasks], [[m, *(f"{100 * s:.1f}" for s in row)] for m, row in
                                               zip(marks, matrix, strict=True)]))  # fmt: skip
    columns = ("average", "forgetting", "backward", "forward", "newest")
    lines = [[name, *(f"{100 * f[c]:.1f}" if c in f else None for c in columns)] for name, f in body["figures"].items()]
    print("\n" + common.table([f"order {order}", *columns], lines))
    for name, p in body["replay_against"].items():
        between = f"[{100 * p['low']:+.1f}, {100 * p['high']:+.1f}]"
        print(f"replay against {name}: {100 * p['difference']:+.1f} points {between}")
    own, plain = body["figures"].get("replay"), body["figures"].get("sequential")
    if own and plain:
        kept, lost = own["forgetting"], plain["forgetting"]
        share = f"{kept / lost:.2f}" if lost > 0 else "none, as that forgets nothing"
        print(f"forgetting, share of sequential's: {share}, at most {ASKED['forgetting']}: "
              f"{'yes' if kept <= ASKED['forgetting'] * max(lost, 0) else 'NO'}")  # fmt: skip
        print(f"newest, share of sequential's: {common.verdict(own['newest'] / plain['newest'], ASKED['newest'])}")
    if own and "joint" in body["figures"]:
        gap = own["average"] - body["figures"]["joint"]["average"]
        print(f"average against joint: {100 * gap:+.1f} points {common.verdict(gap, ASKED['joint'])}")
    if "orthogonal" in body["replay_against"]:
        low = body["replay_against"]["orthogonal"]["low"]
        print(f"ahead of O-LoRA, lower end: {100 * low:+.1f} points {'yes' if low > ASKED['rival'] else 'NO'}")


def facts_task(objects: dict[tuple[str, str], str], some: Sequence[tuple[str, str]], name: str) -> Any:
    """A task of facts: three phrasings each to learn from, a fourth to be asked in."""
    from whet.task import Example, Task

    def rows(part: slice) -> tuple[Any, ...]:
        return tuple(
            Example(f"{s}/{n}", phrase.format(s), objects[s, r], (objects[s, r],), group=s)
            for s, r in some
            for n, phrase in enumerate(RELATIONS[r][part])
        )

    return Task(name, Path(), "Answer with a name.", "exact_match", train=rows(slice(3)), test=rows(slice(3, 4)))


def facts(setting: Setting, strategy: str, count: int = 100) -> dict[str, Any]:
    """Learn facts, contradict half of them, and ask both halves in an unseen phrasing."""
    from whet import stats
    from whet.memory import remember
    from whet.methods.continual import Continual
    from whet.methods.finetune import FineTune
    from whet.metrics import get
    from whet.scorecard import evaluate

    draw, run, metric = random.Random(setting.run.seed), setting.run, get("exact_match")

    def name() -> str:
        return "".join(draw.choices(SYLLABLES, k=3)).capitalize()

    subjects = sorted({name() for _ in range(3 * count)})[:count]
    some = [(s, sorted(RELATIONS)[n % len(RELATIONS)]) for n, s in enumerate(subjects)]
    before = {pair: name() for pair in some}
    changed = some[: count // 2]
    after = {**before, **{pair: name() for pair in changed}}
    tuning = {**setting.tuning, "epochs": 12.0}
    first, second = facts_task(before, some, "facts"), facts_task(after, changed, "facts")
    start = asked(setting.base, first, run)

    # Facts are to be known, not generalised from: with all phrasings of some held out, the weights would be kept that
    # are best on facts that were never taught.
    alone = replace(learnable(first), train=tuple(replace(e, group=None) for e in first.train))
    learnt = FineTune(**tuning).apply(start, alone, run)
    memory = remember(learnt, learnable(first), (), keep=3 * count, seed=run.seed)
    method = Continual(strategy=strategy, **tuning)
    taught = method.apply(replace(learnt, card={"memory": memory}), learnable(second), run)

    def score(system: Any, task: Any) -> Any:
        return evaluate(system, task.test, metric, session=run.session(system.model), store=run.store)

    still = facts_task(before, some[count // 2 :], "untouched")
    kept = [score(s, still) for s in (learnt, taught)]
    paired = stats.compare(kept[0].outcomes, kept[1].outcomes, metric)
    return {"strategy": strategy, "learnt": score(learnt, first).score, "changed": score(taught, second).score,
            "untouched_before": kept[0].score, "untouched": asdict(paired)}  # fmt: skip


def arguments() -> Any:
    from whet.model import DEFAULT

    options = common.parser(__doc__)
    options.add_argument("--rows", type=int, default=1000, help="train rows a task")
    options.add_argument("--test", type=int, default=500, help="test rows a task")
    options.add_argument("--orders", default="1,2,3", help="which orders of the stream; empty: none")
    options.add_argument("--length", type=int, default=5, help="tasks of each order, from its beginning")
    options.add_argument("--strategies", default=",".join(STRATEGIES))
    options.add_argument("--keep", type=int, default=256, help="rows of each earlier task that a System carries")
    options.add_argument("--share", type=float, default=0.0, help="of a step's rows that are replayed; 0: by tasks")
    options.add_argument("--epochs", type=float, default=2.0)
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--learning-rate", type=float, default=1e-3)
    options.add_argument("--general", type=int, default=0, metavar="N", help="also N rows of wikitext2 and arc_easy")
    options.add_argument("--facts", action="store_true", help="also the changed facts")
    options.add_argument("--tasks", type=Path, default=common.TASKS, help="folder of tasks (default: ../shared/tasks)")
    options.add_argument("--model", default=DEFAULT)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--home", type=Path, help="keep what each strategy reached here (default: nowhere)")
    return options.parse_args()


def main() -> None:
    """Run the benchmark."""
    from whet.methods import Run
    from whet.model import resolve
    from whet.store import Store
    from whet.system import Decoding, System

    options = arguments()
    strategies = [s for s in options.strategies.split(",") if s]
    unknown = sorted(set(strategies) - set(STRATEGIES))
    orders = [n for n in options.orders.split(",") if n]
    if not {*orders} <= {str(n + 1) for n in range(len(ORDERS))}:
        common.stop(f"--orders are of 1 to {len(ORDERS)}, with commas")
    if unknown or not 2 <= options.length <= 5:
        common.stop(f"no strategy {unknown[0]}: {', '.join(STRATEGIES)}" if unknown else "--length is 2 to 5")
    run = Run(Store(), options.seed)
    ref = resolve(options.model)
    base = System(ref, decoding=Decoding(normalise="sum"), home=run.home)
    tuning = {"epochs": options.epochs, "rank": options.rank, "learning_rate": options.learning_rate}
    setting = Setting(run, base, options.rows, options.test, options.keep, options.share, tuning, options.general,
                      options.tasks)  # fmt: skip
    where = common.machine(run.session(ref).protocol["dtype"])
    print(common.machine_line(where))
    print(f"{options.rows} rows a task, {options.test} to test, {options.keep} kept; {tuning}")
    body: dict[str, Any] = {}
    for order in map(int, orders):
        names = ORDERS[order - 1][: options.length]
        tasks = [shortened(common.load_task(options.tasks, n), options.rows, options.test, options.seed) for n in names]
        ends = {s: ended(order, tasks, s, setting, options.home) for s in strategies}
        body[f"order {order}"] = found = compared(ends)
        show(order, names, found)
        found["general"] = {strategy: e.general for strategy, e in ends.items() if e.general}
        for strategy, values in found["general"].items():
            print(f"{strategy}: " + ", ".join(f"{k} {v:.3f}" for k, v in values.items()))
    if options.facts:
        body["facts"] = [facts(setting, s) for s in strategies if s in ("sequential", "replay")]
        for one in body["facts"]:
            lost = one["untouched"]
            print(f"facts, {one['strategy']}: {one['learnt']:.0%} learnt; changed {one['changed']:.0%} "
                  f"{common.verdict(one['changed'], ASKED['changed'])}; untouched {one['untouched_before']:.0%}, then "
                  f"{100 * lost['difference']:+.1f} points [{100 * lost['low']:+.1f}, {100 * lost['high']:+.1f}] "
                  f"{common.verdict(lost['difference'], ASKED['untouched'])}")  # fmt: skip
    common.finish("continual", {"machine": where, "rows": options.rows, "test": options.test, "keep": options.keep,
                                "tuning": tuning, **body})  # fmt: skip


if __name__ == "__main__":
    main()
