"""What a System knows already: the tasks it must not lose, how each of them is asked, and rows of it.

A System holds one instruction and one set of labels. The model beneath serves several tasks, each asked in its own way:
the instruction is part of the prompt. The tasks come from `earlier:` folders and from the System's own card, where an
update leaves a few rows of what it taught.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.engine import Sampling, Session
from whet.errors import ArtifactError, TaskError
from whet.sources import Source
from whet.splits import without
from whet.store import write_text
from whet.system import System, revive, shelf
from whet.task import Example, Learnable, Task, load, rows_hash

if TYPE_CHECKING:
    from whet.engine.torch import TorchSession
    from whet.methods import Run

KEPT, HELD = 256, 128  # rows of a task that a System carries: to learn from again, and to measure by
MADE = 128  # rows that a System makes up for a task that none are kept of
MADE_TOKENS = 96  # of a made-up prompt, at most
MARK = "whet-here"


def telling(rows: Sequence[Example]) -> tuple[Example, ...]:
    """Rows that say an answer: others score the same before and after, and a gate that cannot fail is none."""
    return tuple(e for e in rows if e.answered or e.text)


@dataclass(frozen=True)
class Known:
    """A task that a System knows: how it is asked, rows to learn from again, and rows that were never learnt from.

    `asked` is a System whose model does not matter: `on` puts another beneath.
    """

    name: str
    metric: str
    asked: System
    rows: tuple[Example, ...] = ()
    held: tuple[Example, ...] = ()
    folder: Path = Path()

    def on(self, system: System) -> System:
        """The model of a System, asked this task."""
        return replace(self.asked, model=system.model)

    @property
    def usable(self) -> tuple[Example, ...]:
        """Rows that there is something to learn from."""
        return telling(self.rows)

    @property
    def key(self) -> str:
        """sha256 of what learning it again depends on."""
        body = [self.entry()["asked"], rows_hash(self.rows)]
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    def entry(self) -> dict[str, Any]:
        """As plain data, for a card."""
        asked = {k: v for k, v in self.asked.settings.items() if k != "model"}
        return {"name": self.name, "metric": self.metric, "asked": asked,
                "rows": [_plain(e) for e in self.rows], "held": [_plain(e) for e in self.held]}  # fmt: skip


def as_task(system: System, task: Task, session: Session | None = None) -> System:
    """The same model asked another task: that task's instruction, labels and length of answers, no demonstrations.

    Labels are read off as the System reads its own (as whole answers once it was trained).
    """
    from whet.search import base_system

    data = Learnable(task.name, task.instruction, task.metric, task.labels, task.train)
    base = base_system(system.model, task, data, session or system.session, system.home)
    return replace(base, decoding=replace(base.decoding, normalise=system.decoding.normalise))


def carried(system: System) -> tuple[Known, ...]:
    """The tasks in a System's card, oldest first. Raises ArtifactError where it does not hold what whet wrote there."""
    try:
        return tuple(_known(entry, system) for entry in system.card.get("memory", ()))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            "the System's memory cannot be read", expected="tasks and rows that whet wrote", found=str(error)[:160],
            do="restore system.json",
        ) from error  # fmt: skip


def _known(entry: dict[str, Any], system: System) -> Known:
    plain = {"model": {"content": system.model.content, "transforms": []}}
    own = [shelf(s) for s in entry["asked"].get("sources", ())]
    indexes = {s.fingerprint: s.folder for s in at_hand(system) if s.folder is not None and shelf(s.settings) in own}
    asked = revive({**entry["asked"], **plain}, system.model.base, indexes, {"task": entry["name"]}, system.home)
    rows, held = (tuple(_example(row) for row in entry[part]) for part in ("rows", "held"))
    metric = _codeless(str(entry["metric"]), asked.decoding.closed)
    return Known(str(entry["name"]), metric, replace(asked, model=system.model), rows, held)


def at_hand(system: System) -> tuple[Source, ...]:
    """The sources of every task that a System knows, its own among them."""
    return tuple({shelf(s.settings): s for s in (*system.beside, *system.sources)}.values())


def _example(row: dict[str, Any]) -> Example:
    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, (list, tuple)) else value

    return Example(**{key: frozen(value) for key, value in row.items()})


def for_task(system: System, task: Task) -> System:
    """The System as it is, or asked a task that it was taught before and carries in its card."""
    found = [one.on(system) for one in carried(system) if one.name == task.name != system.card.get("task")]
    return replace(found[0], card=system.card, beside=at_hand(system)) if found else system


def known(
    system: System, data: Learnable, session: Session, *, split: str = "select", seed: int = 0
) -> tuple[Known, ...]:
    """The tasks to be kept: those in the System's card, and the task's `earlier:` folders, which have more rows.

    Rows to learn from come from a folder's train alone; `split` (select or test) says which ones are held to measure
    by, select where there is no test; rows that say no answer measure nothing. Rows that the new ones contradict or
    repeat (the same question, or one of the same group) are left out of both, and nothing is learnt from rows that the
    new task is measured on.
    """
    found, read = {one.name: one for one in carried(system)}, dict[str, Path]()
    for folder in data.earlier:
        task = load(folder, trust=data.trusted)
        if read.setdefault(task.name, folder) != folder:
            raise TaskError(f"two earlier tasks are called {task.name}", expected="a name for each, in its task.yaml",
                            found=f"{read[task.name]} and {folder}", do="rename one")  # fmt: skip
        splits = task.split(system.split_seeds.get(task.name, seed))  # select by another seed is what it learnt from
        held = (splits.confirm if split == "test" else ()) or splits.select
        asked = found[task.name].asked if task.name in found else as_task(system, task, session)
        metric = _scorable(task.metric, task.closed)
        found[task.name] = Known(task.name, metric, asked, splits.learnable.train, held, folder)
    return tuple(_kept(replace(one, held=telling(one.held)), data) for one in found.values())


def alike(one: Known, data: Learnable, *asked: str) -> bool:
    """Whether an earlier task is asked as the new rows are, by one of their instructions: they may contradict it.

    Asked in another way the same question is another; but a task of the same name is the same, whatever its prompt.
    """
    return one.name == data.name or one.asked.instruction in (data.instruction, *asked)


def replayed(tasks: Sequence[Known], system: System, data: Learnable) -> tuple[Known, ...]:
    """The earlier tasks that are learnt again with what the System is taught: those with rows, real or to be made up.

    Of a task that is asked as the new one, made-up rows would be old answers to the new questions; where none of its
    rows are left, the new ones contradict them all.
    """
    return tuple(one for one in tasks if one.usable or not alike(one, data, system.instruction))


def _kept(one: Known, data: Learnable) -> Known:
    """An earlier task without what the new rows contradict, where it is asked alike, and nothing to learn from in what
    repeats (or nearly so) rows that the new task is measured on, or shares a group with them.
    """
    same = alike(one, data)
    rows = without(one.rows, data.train)[0] if same else one.rows
    # By their places, as ids of older and newer rows may be the same; groups of another task are others.
    placed = tuple(replace(e, id=str(n), group=e.group if same else None) for n, e in enumerate(rows))
    rows = tuple(rows[int(e.id)] for e in data.sealed.without(placed)[0])
    return replace(one, rows=rows, held=without(one.held, data.train)[0] if same else one.held)


def _scorable(metric: str, closed: bool) -> str:
    """The metric, or one of answers where it is a judge's or a retriever's."""
    other = metric == "win_rate" or "@" in metric
    return metric if not other else "accuracy" if closed else "token_f1"


def _codeless(metric: str, closed: bool) -> str:
    """The metric, or a plain one where it is code: a System carries none."""
    return _scorable("@" if ".py:" in metric else metric, closed)


def remember(
    system: System, data: Learnable, tasks: Sequence[Known], held: Sequence[Example] = (), *, keep: int = KEPT,
    seed: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """What a System that was just taught a task is to carry in its card, as plain data: that task and all before it.

    At most `keep` rows a task, as many of each answer as can be. Where the task was known already, half of them are
    its older rows. `held` are rows of the task that nothing learnt from; those that say no answer are not carried.
    """
    from whet.methods.fewshot import balanced

    def some(rows: Sequence[Example], most: int) -> tuple[Example, ...]:
        return tuple(rows) if len(rows) <= most else tuple(balanced(rows, most, seed))

    metric = _codeless(data.metric, data.closed)
    before = {one.name: replace(one, metric=_codeless(one.metric, one.asked.decoding.closed)) for one in tasks}
    old = before.get(data.name, Known(data.name, metric, system))
    older = some(old.rows, keep // 2)
    rows = (*older, *some(data.train, keep - len(older)))
    new = telling(held)
    held = (*without(old.held, new)[0], *new)
    everything = {**before, data.name: replace(old, metric=metric, asked=system, rows=rows, held=held)}
    return [replace(k, rows=some(k.rows, keep), held=some(k.held, HELD)).entry() for k in everything.values()]


def _plain(example: Example) -> dict[str, Any]:
    body = asdict(example)
    del body["extra"]  # for a metric that is code, and a System carries none
    return {key: value for key, value in body.items() if key in ("id", "prompt") or value not in (None, "", ())}


def made_up(one: Known, system: System, session: TorchSession, spare: Sequence[str], run: Run) -> tuple[Example, ...]:
    """Rows for a task that none are kept of: prompts that the model writes, with the System's own answers.

    They are kept in the store: trainings that are raced ask for the same ones.

    The model goes on from where a user's turn opens behind the task's instruction (as in Magpie, Xu et al. 2024). What
    it fails to write is filled up from `spare` prompts, of the new task: asked the old way, their answers keep the old
    manner (as in learning without forgetting, Li & Hoiem 2016).
    """
    from whet.prompt import messages, render

    body = json.dumps(["made up", one.on(system).state, list(spare), run.seed, session.protocol], sort_keys=True)
    file = run.store.artifact(hashlib.sha256(body.encode()).hexdigest()) / "rows.json"
    if file.exists():
        return tuple(Example(*row) for row in json.loads(file.read_text(encoding="utf-8")))
    chat = messages(one.asked.instruction, (), MARK)
    opening = render(session.tokenizer, chat, system=session.system).split(MARK)[0]
    sampling = Sampling(MADE_TOKENS, temperature=1.0, top_p=0.95, n=MADE, seed=run.seed)
    [written] = session.generate([opening], sampling)
    whole = [g.text.strip() for g in written if g.finish == "stop" and g.text.strip()]
    prompts = list(dict.fromkeys([*whole, *spare]))[:MADE]
    asked = [Example(f"made-{n}", prompt) for n, prompt in enumerate(prompts)]
    answers = one.on(system).answers(asked, session)
    made = tuple(replace(e, completion=a.text) for e, a in zip(asked, answers, strict=True) if a.text)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps([[e.id, e.prompt, e.completion] for e in made]))
    return made
