"""What a run leaves behind: result.json, report.html and system/, written aside and renamed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet import report
from whet.engine import Spent
from whet.errors import StoreError, WhetError
from whet.metrics import Outcome
from whet.scorecard import Scorecard
from whet.store import place_for, write_text
from whet.system import System
from whet.task import Task, load

if TYPE_CHECKING:
    from whet.search import _Job
    from whet.search.race import Trial


def claim(folder: Path, key: str, task: str, place: Path, asked: Mapping[str, Any]) -> None:
    """Take an out folder for a run of a task, which lies at `place`: new, empty, or that of a run `asked` the same.

    Raises StoreError where it holds another run or something else, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        listed = {p.name for p in folder.iterdir()}
    except OSError as error:
        raise StoreError(
            f"cannot write {folder}", expected="a folder that can be written", found=error.strerror or str(error),
            do="choose another --out",
        ) from error  # fmt: skip
    mark = folder / "run.json"
    if mark.exists():
        try:
            held = json.loads(mark.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            held = {}
        if held.get("key") != key:
            others = [name for name, one in held.get("asked", {}).items() if one != asked.get(name)]
            found = f"a run of {held.get('task', 'something else')}"
            found += f" by another {', '.join(others)}" if others else ""
            raise StoreError(f"{folder} holds another run", expected="the same task and settings", found=found,
                             do="choose another --out, or remove the folder")  # fmt: skip
    elif listed:
        raise StoreError(f"{folder} is not empty", expected="a new folder", do="choose another --out")
    body = {"key": key, "task": task, "folder": str(place.resolve()), "system": str((folder / "system").resolve()),
            "asked": asked}  # fmt: skip
    write_text(mark, json.dumps(body) + "\n")


def unclaimed(folder: Path) -> None:
    """Raise StoreError for a folder that `leave` cannot take: it holds something else, or what `improve` made."""
    place_for(folder, "system.json")
    if folder.exists() and (folder.absolute().parent / "result.json").exists():
        raise StoreError(f"{folder} is what improve handed over", expected="another folder", do="name another --out")


def changed(start: System, made: System, name: str) -> System:
    """A System with a card of its own: what it was made by, and no score of what it was made of."""
    if made.fingerprint == start.fingerprint:
        return made
    before = made.card.get("recipe", "base")
    card = {key: value for key, value in made.card.items() if key != "scorecard"}
    return replace(made, card=card | {"recipe": name if before == "base" else f"{before}+{name}"})


def cleared(start: System, made: System) -> dict[str, str]:
    """A note where a System was calibrated, and what was made of it is no longer."""
    gone = start.decoding.prior and not made.decoding.prior
    return {"cleared": "its calibration, which held for the System before: apply calibrate to it anew"} if gone else {}


def leave(system: System, folder: Path, task: Task) -> None:
    """Save a System that was made by hand and, where it answers the task, within its folder what `made_for` reads.

    Raises StoreError where the folder holds something else or cannot be written.
    """
    system.save(folder)
    if system.card.get("task") == task.name:
        body = {"task": task.name, "folder": str(task.folder.resolve()), "system": str(folder.resolve())}
        write_text(folder / "run.json", json.dumps(body) + "\n")


def made_for(system: Path, trust: bool = False) -> Task | None:
    """The task that a System was made for; None where nothing here says so, or that task cannot be read.

    `improve` says it beside the System, `apply` and `update` within it.
    """
    here = system.resolve()
    own = here / "run.json"
    try:
        body = json.loads((own if own.exists() else here.parent / "run.json").read_text(encoding="utf-8"))
        ours = body.get("system") == str(here)
        if own.exists() and not ours:  # it comes from elsewhere: a stranger's task is not run
            return None
        return load(body["folder"], trust=trust and ours)
    except (OSError, ValueError, KeyError, TypeError, WhetError):
        return None


def _same(a: Trial | None, b: Trial | None) -> bool:
    return a is not None and b is not None and a.name == b.name


def result(
    job: _Job,
    *,
    finalist: Trial | None,
    handed: Trial | None,
    confirmed: dict[str, Any] | None,
    cards: dict[str, Scorecard],
    measured: dict[str, Scorecard],
    baselines: list[dict[str, Any]],
    spent: Spent,
    wall: float,
    versions: dict[str, str],
    read: dict[str, Any] | None,
) -> dict[str, Any]:
    """The run as result.json holds it."""
    from whet.search import limits, record_of

    trials = []
    for trial in job.race.trials:
        body = record_of(trial, job.wish.seed)
        card = measured.get("chosen") if _same(trial, handed) else None
        card = card or (measured.get("base") if trial is job.race.base else None)
        if card:
            body |= {"latency_ms": card.latency_ms, "size_bytes": card.size_bytes, "memory_bytes": card.memory_bytes}
        trials.append(body)
    card = cards.get("base") or (job.race.base.card if job.race.base else None)
    return {
        "task": job.task.name,
        "model": job.bases[0].model.base if len(job.bases) == 1 else [b.model.base for b in job.bases],
        "seed": job.wish.seed,
        "budget_s": job.wish.budget,
        "metric": {"name": job.metric.name, "higher_is_better": job.metric.higher_is_better},
        "spent": {**vars(spent), "wall_seconds": wall},
        "diagnosis": [],
        "baselines": baselines,
        "trials": trials,
        "chosen": {"recipe": handed.recipe.record if handed else [], "name": handed.name if handed else "base",
                   "handed": handed is not None, "model": (handed.system if handed else job.bases[0]).model.base,
                   "gain_by_step": _gains(job, handed)},
        "limits": limits.kept(job.task.limits, measured["chosen"], measured["base"]) if measured else None,
        "confirm": confirmed,
        "reading": read,
        "selection": _selection(job, finalist, confirmed, cards),
        "protocol": card.protocol if card else {},
        "versions": versions,
        "rates": vars(job.race.speed(job.bases[0])),
        "plan": job.plan,
        "left_out": job.skipped,
        "dropped": {"count": len(job.splits.dropped), "examples": [list(d) for d in job.splits.dropped[:50]]},
        "notes": [*job.notes, *_shortcomings(job, finalist, cards)],
    }  # fmt: skip


def _selection(
    job: _Job, finalist: Trial | None, confirmed: dict[str, Any] | None, cards: dict[str, Scorecard]
) -> dict[str, Any] | None:
    """What select said of the finalist beside what the sealed data says; None where nothing was confirmed."""
    if not (finalist and finalist.card and confirmed and "chosen" in cards):
        return None
    on_select, on_confirm = finalist.card.score, cards["chosen"].score
    sign = 1 if job.metric.higher_is_better else -1
    return {
        "select": on_select, "confirm": on_confirm, "shrinkage": sign * (on_select - on_confirm),
        "select_gain": finalist.against_base.difference if finalist.against_base else None,
        "confirm_gain": confirmed["difference"],
    }  # fmt: skip


def _shortcomings(job: _Job, finalist: Trial | None, cards: dict[str, Scorecard]) -> list[str]:
    """What went wrong while sealed rows were answered: prompts and answers that were cut, failures of the metric."""
    found = []
    for name, card in cards.items():
        if card.truncated:
            found.append(f"{card.truncated} prompts of {name} were longer than the context window: shortened")
        if card.unended:
            asked = {"base": job.bases[0], "chosen": finalist.system if finalist else None}.get(name)
            room = f" at {asked.decoding.max_tokens} tokens" if asked else ""
            found.append(f"{card.unended} of {card.n} answers of {name} were cut{room}: more room is `max_tokens` in "
                         "task.yaml")  # fmt: skip
        if card.failed:
            found.append(f"the metric failed on {card.failed} examples of {name}")
    return found


def _gains(job: _Job, handed: Trial | None) -> list[dict[str, Any]]:
    """What each step of the chosen recipe added on select, better being positive.

    A beginning that was not tried on all of select by itself counts together with the step after it.
    """
    if handed is None or job.race.base is None or job.race.base.card is None:
        return []
    whole = [t for t in job.race.trials if t.card and t.examples == handed.examples and t.label == handed.label]
    by_recipe = {t.recipe: t for t in whole}
    sign = 1 if job.metric.higher_is_better else -1
    steps, names, before = [], list[str](), job.race.base.card.score
    for n, method in enumerate(handed.recipe.methods, 1):
        names.append(method.name)
        trial = by_recipe.get(type(handed.recipe)(handed.recipe.methods[:n]))
        if trial and trial.card:
            steps.append({"method": "+".join(names), "gain": sign * (trial.card.score - before)})
            names, before = [], trial.card.score
    return steps


def details(
    job: _Job, cards: dict[str, Scorecard], handed: Trial | None
) -> dict[str, Any]:
    """What the report shows beside the result: examples, curves, labels."""
    rows = job.splits.confirm if cards else job.race.select
    base = cards.get("base") or (job.race.base.card if job.race.base else None)
    chosen = cards.get("chosen") or (handed.card if handed else None)
    examples = []
    if base:
        by_id: dict[str, Outcome] = {o.id: o for o in chosen.outcomes} if chosen else {}
        first = {o.id: o for o in base.outcomes}
        for row in (r for r in rows if r.id in first):
            a, b = first[row.id], by_id.get(row.id)
            if chosen and b is None:  # the clock stopped the race before
                continue
            examples.append({
                "id": row.id, "prompt": row.prompt or (row.text or "")[:2000], "reference": row.completion,
                "base": a.answer, "chosen": b and b.answer, "base_score": a.score, "chosen_score": b and b.score,
            })  # fmt: skip
    curves = [
        {"name": t.name, "train": t.notes["curves"]["train"], "validation": t.notes["curves"]["validation"]}
        for t in _trained(job.race.trials, handed)
    ]
    return {"examples": examples, "curves": curves, "labels": list(job.task.labels), "curve_unit": "trained tokens"}


def _trained(trials: Sequence[Trial], handed: Trial | None) -> list[Trial]:
    """One trial of each training, first that of what is handed over: the shortest recipe, whose last step it is.

    What only goes on from a training, as calibration does, notes the same curves.
    """
    curved = [t for t in trials if t.notes.get("curves")]
    alike = [[t for t in curved if t.notes["curves"] == one.notes["curves"]] for one in curved]
    shortest = [min(same, key=lambda t: len(t.recipe.methods)) for same in alike]
    found = {t.name: t for t in shortest}
    first = next((s.name for t, s in zip(curved, shortest, strict=True) if _same(t, handed)), "")
    return sorted(found.values(), key=lambda t: t.name != first)


def write(folder: Path, system: System, body: dict[str, Any], more: dict[str, Any], *, self_contained: bool) -> None:
    """Write system/, report.html and, last, result.json. Raises StoreError where the disk is full."""
    try:
        system.save(folder / "system", self_contained=self_contained)
        report.write(folder / "report.html", body, more)
    except OSError as error:
        raise StoreError(
            f"cannot write into {folder}", found=error.strerror or str(error),
            do="free space and give the same command again: finished trials are kept",
        ) from error  # fmt: skip
    write_text(folder / "result.json", json.dumps(body, indent=1, ensure_ascii=False) + "\n")
