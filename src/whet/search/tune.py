"""Hyper-parameters of a method that trains, raced on its own validation: the learning rate first, then the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

from whet.engine import Spent
from whet.errors import MethodError
from whet.extras import package
from whet.methods import Method, Run
from whet.search import budget
from whet.search.recipe import Recipe
from whet.search.training import VALIDATED
from whet.system import System
from whet.task import Learnable

RUNGS = (0.15, 0.4, 1.0)  # shares of the full training after which the better half goes on
COST = 1.8  # trainings that a race of three costs: later rungs go on from the stable part of earlier ones
UNRACED = "no row to validate on: settings are not compared"
TRIAL_COST = 0.6  # of a whole training that one of many trials costs, those ended early included


@dataclass(frozen=True)
class Arm:
    """One setting and what its last rung came to: the best validation loss, and why it went no further."""

    method: Method
    fidelity: float
    loss: float
    why: str = ""


def able(method: Method) -> None:
    """Raise MethodError for a method that has no settings to race in a budget."""
    if "learning_rate" not in method.space():
        raise MethodError(f"{method.name} does not train", expected="a method with a learning rate, such as finetune",
                          found="--budget", do="leave --budget out")  # fmt: skip


def timed(
    method: Method, system: System, data: Learnable, run: Run, limit: float, trials: int, settled: Container[str],
    say: Callable[[str], None],
) -> tuple[System, Method]:  # fmt: skip
    """The best System of a race of a method's settings within `limit` seconds, validations included, and by what.

    By `trials` of a sampler if any. The run's notes name the arms, best first, where there were several.
    """
    from whet.train.team import team

    cost = 1.0 if "learning_rate" in settled else COST
    cost = max(1.0, TRIAL_COST * trials) if trials else cost
    own, crew = budget.measure(system, run.session(system.model), run.store), team()
    # Every process measures its own rates; what is trained, and its name, must be the same in all.
    rates = budget.Rates(*(crew.sum(rate if crew.first else 0.0) for rate in astuple(own)))
    run.trained_tokens = int(limit / cost * (1 - VALIDATED) * rates.train)
    best, arms = (
        sample(method, trials, system, data, run, say)
        if trials
        else search(method, system, data, run, limit, rates.price, settled, say)
    )
    if len(arms) > 1:
        run.notes["raced"] = named(arms)
    return best, arms[0].method


def candidates(method: Method, name: str = "learning_rate") -> list[Method]:
    """The method with each of the values of one setting that are worth trying; its own comes first.

    A learning rate of 0 is the one that the method takes by itself (`rate`), where it can say so without the model.
    """
    own = getattr(method, name)
    if name == "learning_rate":
        own = own or getattr(method, "rate", own)
    values = [own, *(v for v in method.space().get(name, ()) if v != own)]
    return [replace(method, **{name: value}) for value in values]  # type: ignore[type-var]


@dataclass(frozen=True)
class Rung:
    """A training as far as it came: its System, best validation loss (infinite without validation), notes and cost."""

    system: System
    loss: float
    notes: Mapping[str, Any]
    spent: Spent


Seen = dict[tuple[Method, float], Rung]  # by method and share of the full training


def search(
    method: Method, system: System, data: Learnable, run: Run, most: float, price: Callable[[Spent], float],
    settled: Container[str] = (), say: Callable[[str], None] | None = None,
) -> tuple[System, list[Arm]]:  # fmt: skip
    """Race the learning rate, then every other number of `space()`, one after the other, around the best so far.

    Those that are `settled` keep their values. The others are raced as long as what is spent, by its `price`, leaves
    room for another race within `most`. Returns the best System and all arms, best first.
    """
    seen: Seen = {}
    arms = [method] if "learning_rate" in settled else candidates(method)
    _, ended = race(arms, system, data, run, say, seen)
    compared = getattr(method, "validated", True) and math.isfinite(ended[0].loss)
    for name in _numbers(method) if compared else ():
        best = ended[0].method
        if name in settled or name == "learning_rate":
            continue
        arms = candidates(best, name)
        longer = max(getattr(arm, "epochs", 1.0) for arm in arms) / getattr(best, "epochs", 1.0)
        whole = sum((seen[best, share].spent for share in RUNGS if (best, share) in seen), Spent())
        if price(run.spent) + COST * longer * price(whole) > most:
            break
        more = race(arms, system, data, run, say, seen)[1]
        # The best so far may have been behind early on, and stand in both lists.
        both = {(a.method, a.fidelity): a for a in (*ended, *more)}.values()
        last = {a.method: a for a in sorted(both, key=lambda arm: arm.fidelity)}.values()
        ended = sorted(last, key=lambda arm: (-arm.fidelity, arm.loss))
    won = seen[ended[0].method, RUNGS[-1]]
    run.notes |= won.notes
    return won.system, ended


def _numbers(method: Method) -> list[str]:
    """The settings of a method's space that are numbers: words, like the kind of adapter, want rates of their own."""
    return [name for name, (value, *_) in method.space().items() if not isinstance(value, str)]


def race(
    arms: Sequence[Method], system: System, data: Learnable, run: Run, say: Callable[[str], None] | None = None,
    seen: Seen | None = None,
) -> tuple[System, list[Arm]]:  # fmt: skip
    """Train the arms rung by rung, the better half each time; returns the winner's System and all arms, best first.

    Successive halving (Jamieson & Talwalkar 2016) on the loss over the validation that each training cuts from train.
    A rung goes on from the arm's last one before its decay, so that nothing is trained twice; what was `seen` before
    costs nothing. `run.trained_tokens` bounds one whole training. An arm whose loss explodes is dropped, in the last
    rung for the next best one; MethodError where all do. Without rows to validate on only the first arm is trained.
    """
    if len(arms) > 1:
        _comparable(arms[0])
    seen = {} if seen is None else seen
    going: list[tuple[float, Method, str | None]] = [(math.inf, arm, None) for arm in arms]
    begun: set[str] = set()
    ended: list[Arm] = []
    for fidelity in RUNGS if len(arms) > 1 else RUNGS[-1:]:
        scored: list[tuple[float, Method, str]] = []
        for before, method, previous in going:
            behind = scored and f"behind {_name(scored[0][1], arms)}"
            if behind and math.isinf(scored[0][0]):
                ended.append(Arm(method, 0.0, math.inf, UNRACED))
                continue
            if behind and fidelity == RUNGS[-1] and (method, fidelity) not in seen:
                ended.append(Arm(method, RUNGS[-2], before, behind))
                continue
            try:
                if (method, fidelity) not in seen:
                    seen[method, fidelity] = _trained(method, fidelity, previous, system, data, run)
            except MethodError as error:
                ended.append(Arm(method, fidelity, math.inf, str(error)))
                continue
            made = seen[method, fidelity]
            scored.append((made.loss, method, made.notes["artifact"]))
            begun.add(made.notes["artifact"])
            if say and len(arms) > 1:
                said = UNRACED if math.isinf(made.loss) else f"validation loss {made.loss:.4f}"
                say(f"{_name(method, arms)} at {fidelity:.0%}: {said}")
        if not scored:
            _forget(begun, run)
            raise MethodError("every setting failed", expected="one whose loss falls", found=ended[-1].why)
        scored.sort(key=lambda item: item[0])
        # Those of the rung before the last stand by, should the training of the best one fail.
        half = max(1, math.ceil(len(scored) / 2))
        keep = {RUNGS[-1]: 1, RUNGS[-2]: len(scored)}.get(fidelity, half)
        for loss, method, _ in scored[keep:]:
            ended.append(Arm(method, fidelity, loss, f"behind {_name(scored[0][1], arms)}"))
        going = [*scored[:keep]]
    _forget(begun, run)
    loss, winner, _ = scored[0]
    order = sorted(ended, key=lambda arm: (-arm.fidelity, arm.loss))
    return seen[winner, RUNGS[-1]].system, [Arm(winner, 1.0, loss), *order]


def sample(
    method: Method, trials: int, system: System, data: Learnable, run: Run, say: Callable[[str], None] | None = None
) -> tuple[System, list[Arm]]:
    """Train with settings drawn from `space()` by Optuna's TPE sampler (Bergstra et al. 2011), best first.

    The first trial has the method's own settings. After each rung of `race` the median pruner may end a trial. Returns
    the best System and all arms. Raises MethodError where Optuna is absent or every trial fails.
    """
    _comparable(method)
    optuna = package("optuna", "tune")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made: list[tuple[Arm, Rung | None]] = []
    begun: set[str] = set()

    def trained(trial: Any) -> float:
        try:
            arm, previous, loss = method if trial.number == 0 else _drawn(method, trial), None, math.inf
        except MethodError as error:
            raise optuna.TrialPruned from error
        for fidelity in RUNGS:
            try:
                new = _trained(arm, fidelity, previous, system, data, run)
            except MethodError as error:
                made.append((Arm(arm, fidelity, math.inf, str(error)), None))
                raise optuna.TrialPruned from error
            loss, previous = new.loss, str(new.notes["artifact"])
            begun.add(previous)
            if math.isinf(loss):  # without validation nothing tells the next trial from this one
                trial.study.stop()
            trial.report(loss, round(100 * fidelity))
            if fidelity < 1 and trial.should_prune():
                made.append((Arm(arm, fidelity, loss, "behind the median"), None))
                raise optuna.TrialPruned
        made.append((Arm(arm, 1.0, loss), new))
        if say:
            say(f"trial {trial.number + 1} of {trials}: validation loss {loss:.4f}")
        return loss

    pruner = optuna.pruners.MedianPruner(n_startup_trials=2)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=run.seed), pruner=pruner)
    study.optimize(trained, n_trials=trials)
    _forget(begun, run)
    made.sort(key=lambda item: (-item[0].fidelity, item[0].loss))
    best = made[0][1]
    if best is None:
        raise MethodError("every setting failed", expected="one whose loss falls", found=made[0][0].why)
    run.notes |= best.notes
    return best.system, [arm for arm, _ in made]


def _comparable(method: Method) -> None:
    """Raises MethodError for a method whose trainings have no validation loss to be compared by."""
    if not getattr(method, "validated", True):
        raise MethodError(
            f"{method.name} has no validation that settings could be raced by", expected="finetune, dpo, kto …",
            found=Recipe((method,)).name, do="set learning_rate, or leave --budget and --trials out",
        )  # fmt: skip


def _drawn(method: Method, trial: Any) -> Method:
    """A method with every setting of its space drawn; words first, since numbers may depend on them.

    Raises MethodError for settings that do not go together.
    """
    names = sorted(method.space(), key=lambda n: not isinstance(method.space()[n][0], str))
    for name in names:
        values = method.space()[name]
        chosen = values[trial.suggest_int(name, 0, len(values) - 1)]
        try:
            method = replace(method, **{name: chosen})  # type: ignore[type-var]
        except ValueError as error:
            raise MethodError(str(error), expected="settings that go together", found=f"{name}={chosen}") from error
    return method


def _trained(method: Method, fidelity: float, previous: str | None, system: System, data: Learnable, run: Run) -> Rung:
    """One rung; what it spent and noted goes to the run, and what an earlier one paid for (suspects) once."""
    before = run.notes.get("trainings", {})
    part = replace(run, fidelity=fidelity, previous=previous, spent=Spent(), notes={})
    try:
        made = Recipe((method,)).run(system, data, part)  # which says what is lacking
    finally:
        trained = part.notes.get("trainings", {})
        part.spent -= sum((Spent(**cost) for name, cost in trained.items() if name in before), Spent())
        run.spent += part.spent
        run.notes |= part.notes | {"trainings": {**before, **trained}}
    # Without rows to validate on, a training can be run and not compared.
    losses = [value for _, value in part.notes.get("curves", {"validation": ()})["validation"][1:]]
    return Rung(made, min(losses, default=math.inf), part.notes, part.spent)


def _forget(artifacts: set[str], run: Run) -> None:
    """Delete what trainings kept so that a later rung could go on from them."""
    for name in artifacts:
        for file in (run.home / "checkpoints").glob(f"{name}.stable*"):
            file.unlink(missing_ok=True)


def _name(method: Method, arms: Sequence[Method]) -> str:
    """A method by the settings in which the arms differ."""
    differs = {k: v for k, v in _settings(method).items() if any(_settings(a)[k] != v for a in arms)}
    words = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in differs.items()]
    return f"{method.name}({', '.join(words)})"


def _settings(method: Method) -> dict[str, Any]:
    return {f.name: getattr(method, f.name) for f in fields(method)}  # type: ignore[arg-type]


def named(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """The arms as plain data, for notes and `--json`; the loss is None where there is none."""
    methods = [arm.method for arm in arms]
    return [{"arm": _name(a.method, methods), "share": a.fidelity, "loss": a.loss if math.isfinite(a.loss) else None,
             "why": a.why} for a in arms]  # fmt: skip
