"""Continual learning: a new task, newer data or changed facts, without losing what the System knew."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from whet.engine import Spent
from whet.errors import MethodError
from whet.methods import Need, Run
from whet.methods.finetune import RATES, Disputed, FineTune
from whet.system import System
from whet.task import Learnable

if TYPE_CHECKING:
    from whet.engine.prefix import Row
    from whet.engine.torch import TorchSession
    from whet.memory import Known
    from whet.suspects import Suspect
    from whet.train.lesson import Lesson
    from whet.train.loop import Curves

STRATEGIES = ("replay", "sequential", "ewc", "orthogonal", "osf", "merge")
BY_ROWS = ("replay", "ewc", "merge")  # what these keep, they know from rows of the earlier tasks
STRENGTH = {"ewc": 1000.0, "orthogonal": 0.5}  # orthogonal: as in the scripts released with O-LoRA
CHECKS = 24  # rows of each earlier task that every validation looks at
INFORMED = 64  # rows of each earlier task that the Fisher information is taken from
# What merging tries: weights of what was learnt earlier, and of what is new.
WEIGHTS = tuple((old, new) for old in (1.0, 0.75, 0.5) for new in (1.0, 0.75, 0.5))


def replayed_share(earlier: int) -> float:
    """Of a step's rows those that are replayed: of each of so many earlier tasks a third as many as there are new ones,
    of all together as many as those at most (the share of Chaudhry et al. 2019).
    """
    return min(0.5, earlier / (earlier + 3))


@dataclass(frozen=True)
class Continual(FineTune):
    """Fine-tuning on the new rows with one of six ways to keep what was known; settings as in finetune, and:

    `strategy`: replay (a `share` of each step's rows are earlier ones, Chaudhry et al. 2019; 0 takes what
    `replayed_share` says; where none are kept, the System makes some up), sequential (no protection: the baseline),
    ewc (elastic weight consolidation), orthogonal (O-LoRA), osf (orthogonal subspace fine-tuning: no adapter, but the
    lesser half of each layer's singular directions, as far as AdamW keeps to it), merge (trained from the base apart,
    then merged: `merging` is linear or ties). `strength` weighs the penalty of ewc (1000) and orthogonal (0.5); 0 takes
    these.
    """

    name: ClassVar[str] = "continual"
    family: ClassVar[str] = "continual learning"
    needs: ClassVar[tuple[Need, ...]] = ("rows", "weights", "earlier")

    strategy: str = "replay"
    share: float = 0.0
    strength: float = 0.0
    merging: str = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy is {self.strategy!r}; one of {', '.join(STRATEGIES)}")
        if self.merging not in ("linear", "ties"):
            raise ValueError(f"merging is {self.merging!r}; linear or ties")
        if not 0 <= self.share < 1 or self.strength < 0:
            raise ValueError("share is at least 0 and less than 1, and strength is not negative")
        if self.strategy in STRENGTH and self.adapter not in ("lora", "rslora"):
            raise ValueError(f"{self.strategy} goes with adapter=lora or rslora, not {self.adapter}")
        if self.strategy == "osf" and (self.adapter != "lora" or self.bits < 16):
            raise ValueError("osf trains the weights themselves: it takes no adapter and no bits")
        if self.strategy not in BY_ROWS:  # the others know earlier tasks by the System's adapters, or not at all
            object.__setattr__(self, "needs", FineTune.needs)

    @property
    def rate(self) -> float:
        """The learning rate that it trains with; that of full training, where the weights themselves are trained."""
        return (self.learning_rate or RATES[True]) if self.strategy == "osf" else super().rate

    @property
    def validated(self) -> bool:
        """Whether trainings can be compared by their validation loss: merge's is of what is not merged yet."""
        return self.strategy != "merge"

    def space(self) -> Mapping[str, Sequence[Any]]:
        """The settings worth trying; not the strategy: each is validated on other rows."""
        shares = {"share": (0.0, 0.125, 1 / 3)} if self.strategy == "replay" else {}  # 0 is a quarter or more
        like = replace(self.alone, adapter="full") if self.strategy == "osf" else self.alone
        return {**shares, "learning_rate": like.space()["learning_rate"][:2]}

    def apply(self, system: System, data: Learnable, run: Run) -> System:
        """The System taught the new task; raises MethodError where there is nothing that could be forgotten.

        Where the new rows contradict all there is of the earlier tasks, they are trained on without protection.
        """
        from whet.memory import known, replayed
        from whet.task import rows_hash
        from whet.train.adapters import Adapter
        from whet.train.lesson import key, teach

        every = known(system, data, run.session(system.model), seed=run.seed)
        tasks = replayed(every, system, data)
        if every and not tasks and self.strategy in BY_ROWS:
            run.notes["unprotected"] = [one.name for one in every]
            return replace(self, strategy="sequential").apply(system, data, run)
        # Groups have said what contradicts what. All phrasings of a fact held out would be a fact that is never taught,
        # and the weights that were kept those that know it least wrongly.
        data = replace(data, train=tuple(replace(e, group=None) for e in data.train))
        if not tasks and self.strategy in BY_ROWS:
            raise MethodError(
                "nothing to keep", expected="`earlier:` in task.yaml, or a System that was taught before",
                found="neither", do="use finetune",
            )  # fmt: skip
        share = self.share or replayed_share(len(tasks))
        name = key("continual", {**asdict(self), "share": share}, system.state, rows_hash(data.train),
                   [one.key for one in tasks], run.seed, run.fidelity, run.trained_tokens, run.previous)  # fmt: skip
        if self.strategy == "merge":
            taught = self._merge(system, data, run, tasks, name)
        else:
            kind = "osf" if self.strategy == "osf" else self.adapter
            adapter = Adapter(kind, self.rank, 2 * self.rank, bits=self.bits)
            wrong = self.suspects(system, data, run) if self.clean else ()
            taught = teach(
                system, run, name, adapter, lambda live: self._protected(system, data, run, live, tasks, wrong)
            )
        return replace(taught, decoding=replace(system.decoding, prior=(), normalise="sum"))

    def _protected(
        self, system: System, data: Learnable, run: Run, live: TorchSession, tasks: Sequence[Known],
        wrong: Sequence[Suspect] = (),
    ) -> Lesson:  # fmt: skip
        """The lesson of plain fine-tuning, with what protects the earlier tasks."""
        from whet.train import protect
        from whet.train.lesson import mean_loss, weight

        plain, allowed, bound = self, run.trained_tokens, run.trained_tokens
        share = self.share or replayed_share(len(tasks))
        if self.strategy == "replay":
            plain = replace(self, batch=max(1, round((1 - share) * self.batch)))
            if allowed is not None:
                # The lesson takes off what the search for suspects took: of what is left, a share goes to earlier rows.
                searched = wrong.tokens if isinstance(wrong, Disputed) else 0
                allowed = max(1, allowed - searched)
                run = replace(run, trained_tokens=round((1 - share) * allowed) + searched)
        # All of the budget says what is held out, so that every share is compared on the same rows.
        lesson = plain._lesson(system, data, run, live, wrong, bound)
        strength = self.strength or STRENGTH.get(self.strategy, 0.0)
        if self.strategy == "orthogonal":
            penalty = protect.orthogonal(live.module, system.model.standing, strength)
            return replace(lesson, settings=replace(lesson.settings, penalty=penalty))
        if self.strategy in ("sequential", "osf"):
            return lesson
        earlier, checks = self._earlier(system, data, run, live, tasks)
        own, count = lesson.validate, {one.name: len(rows) for one, rows in zip(tasks, earlier, strict=True)}
        if own is not None:
            # Of all validations, that one is kept where the new task and the earlier ones together stand best.
            new: Callable[[], float] = own
            lesson = replace(lesson, validate=lambda: 0.5 * new() + 0.5 * fmean(mean_loss(live, c) for c in checks))
        lesson = replace(lesson, notes={**lesson.notes, "earlier": count})
        if self.strategy == "ewc":
            # Drawn, as rows often stand in the order of their answers.
            looked = [random.Random(run.seed).sample(rows, min(INFORMED, len(rows))) for rows in earlier]
            parts = [protect.fisher(live.module, rows) for rows in looked]
            tokens = sum(len(row.prompt) + len(row.continuations[0]) for rows in looked for row in rows)
            live.spent += Spent(trained_tokens=tokens)
            total = {layer: sum((part[layer] for part in parts[1:]), parts[0][layer]) for layer in parts[0]}
            return replace(lesson, settings=replace(
                lesson.settings, penalty=protect.elastic(live.module, total, strength)))  # fmt: skip
        after: Callable[[Curves], Mapping[str, Any]] = lesson.after
        # Rows that are known already stand in every step: their losses say nothing of what more new rows would bring.
        lesson = replace(lesson, after=lambda curves: {**after(curves), "twice_the_data": None})
        many = max(1, round(lesson.notes["batch"] * share / (1 - share)))
        taught = [weight(row) * len(row.continuations[0]) for n in range(4) for row in lesson.source(n)]
        lesson = replace(lesson, source=protect.mixed(lesson.source, earlier, many, run.seed, fmean(taught)))
        return lesson if allowed is None else _within(lesson, run.fidelity * allowed, live.module)

    def _earlier(
        self, system: System, data: Learnable, run: Run, live: TorchSession, tasks: Sequence[Known]
    ) -> tuple[list[list[Row]], list[list[Row]]]:
        """Of each earlier task, rendered as it is asked: rows to learn from, and a few others to validate on."""
        from whet.memory import made_up
        from whet.splits import cut
        from whet.train.lesson import render_rows

        fit: list[list[Row]] = []
        checks: list[list[Row]] = []
        for one in tasks:
            rows = [replace(e, group=None) for e in one.usable]
            rows = rows or list(made_up(one, system, live, [e.prompt for e in data.train if e.prompt], run))
            kept, held = cut(rows, min(CHECKS, len(rows) // 4), seed=run.seed, closed=one.asked.decoding.closed)
            if not kept:
                raise MethodError(f"no rows of {one.name} to keep it by", expected="its train rows", found="none")
            asked = one.on(system)
            fit.append(render_rows(asked, [rows[i] for i in kept], live)[0])
            checks.append(render_rows(asked, [rows[i] for i in held or kept], live)[0])
        return fit, checks

    def _merge(self, system: System, data: Learnable, run: Run, tasks: Sequence[Known], name: str) -> System:
        """Train from the base, without what was learnt since; then merge both, by the weights that do best on both."""
        import torch

        from whet.compress.folder import plain
        from whet.engine.torch import TorchSession
        from whet.train.adapters import Adapter
        from whet.train.lesson import keep, kept, mean_loss, render_rows
        from whet.train.protect import merged

        whole = tuple(t for t in system.model.standing if t.kind == "model")  # a smaller model is what there is
        origin = replace(system, model=replace(system.model, transforms=whole))
        first = run.session(origin.model)
        if isinstance(first, TorchSession) and not plain(first.module):
            raise MethodError(
                "merging averages whole weights, which other layers share here or which are packed",
                expected="a model before quantize or share", found=system.model.base, do="set strategy=replay",
            )  # fmt: skip
        tuned = self.alone.apply(origin, data, run)
        if not (run.store.artifact(name) / "done.json").exists():
            sessions = [run.session(one.model) for one in (origin, system, tuned)]
            base, *others = [dict(s.module.named_parameters()) for s in sessions if isinstance(s, TorchSession)]
            live = TorchSession(copy.deepcopy(sessions[0].module), sessions[0].tokenizer)  # type: ignore[attr-defined]
            weights = dict(live.module.named_parameters())
            _, checks = self._earlier(system, data, run, TorchSession(sessions[1].module, live.tokenizer), tasks)  # type: ignore[attr-defined]
            said = tuple(e for e in data.train if e.answered or e.text)  # what `alone` has learnt from
            few, held = replace(data, train=said).validation(seed=run.seed, most=CHECKS)
            new, _ = render_rows(system, held or few[:CHECKS], live)

            def put(pair: tuple[float, float]) -> None:
                with torch.no_grad():
                    for layer, value in merged(base, others, pair, self.merging):
                        weights[layer].copy_(value)

            found = {}
            for pair in WEIGHTS:
                put(pair)
                found[pair] = 0.5 * mean_loss(live, new) + 0.5 * fmean(mean_loss(live, rows) for rows in checks)
            best = min(WEIGHTS, key=lambda pair: found[pair])
            put(best)
            notes = {"merged": {"earlier": best[0], "new": best[1], "loss": found[best]}}
            keep(live.module, Adapter("full"), run.store.artifact(name), {"notes": notes, "spent": asdict(live.spent)})
        return kept(origin, run, name)


def _within(lesson: Lesson, allowed: float, module: Any) -> Lesson:
    """The lesson with no more steps than so many tokens pay for: each earlier task has a beginning of its own."""
    from whet.train.batches import computed

    each = fmean(computed(lesson.source(n), module) for n in range(4))
    schedule = lesson.settings.schedule
    schedule = replace(schedule, steps=max(1, min(schedule.steps, int(allowed / each))))
    return replace(lesson, settings=replace(lesson.settings, schedule=schedule))
