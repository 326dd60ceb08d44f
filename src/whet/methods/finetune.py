"""Fine-tuning: LoRA on all linear layers (Hu et al. 2021), trained on prompts exactly as the System renders them."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from whet.engine import Spent
from whet.errors import DivergedError, MethodError, WhetError
from whet.methods import Need, Run
from whet.system import System
from whet.task import Example, Learnable

if TYPE_CHECKING:
    from whet.engine.prefix import Row
    from whet.engine.torch import TorchSession
    from whet.suspects import Suspect
    from whet.train.lesson import Lesson
    from whet.train.loop import Curves

CROSS_EPOCHS = 2.0  # of the trainings that suspects are told by: longer ones learn wrong labels by heart
SAMPLED = 256  # rows looked at to tell how many tokens a row costs
CHECKED = 0.06  # rows to validate on as a share of the rows trained on: looking must not cost more than learning
RATES = (1e-3, 1e-4)  # peaks of the schedule: of adapters, and of full training


class Disputed(tuple["Suspect", ...]):
    """Rows whose label is probably wrong, and the trained tokens that finding them took."""

    tokens: int = 0


@dataclass(frozen=True)
class FineTune:
    """Fine-tuning with completion-only loss, early stopping on a validation cut from train, best weights kept.

    Defaults: LoRA of rank 16 and alpha 2·rank (as in the LoRA literature), 32 rows a step; `learning_rate` 0 takes
    1e-3, and 1e-4 for full training (measured in LOG.md). `epochs` is what is wanted; the budget may allow less,
    and a short training takes smaller steps, so that there are enough of them. `clean` leaves out rows whose label is
    probably wrong. A System with documents is trained to read them (RAFT): from a share `absent` of the rows the
    passage that holds the answer is taken out. `bits` of the frozen base: 8 or 4 save memory in training (QLoRA); the
    System keeps the whole base.
    """

    name: ClassVar[str] = "finetune"
    family: ClassVar[str] = "fine-tuning"
    needs: ClassVar[tuple[Need, ...]] = ("rows", "weights")
    writes: ClassVar[tuple[str, ...]] = ("model", "decoding")
    invalidates: ClassVar[tuple[str, ...]] = ("calibration",)

    adapter: str = "lora"
    rank: int = 16
    learning_rate: float = 0.0
    epochs: float = 3.0
    batch: int = 32
    recompute: bool = False
    clean: bool = False
    absent: float = 0.1
    bits: int = 16

    def __post_init__(self) -> None:
        if self.rank < 1 or self.batch < 1 or self.learning_rate < 0 or self.epochs <= 0:
            raise ValueError("rank, batch and epochs are positive, and learning_rate is not negative")
        if self.adapter not in ("lora", "rslora", "dora", "full"):
            raise ValueError(f"adapter is {self.adapter!r}; one of lora, rslora, dora, full")
        if not 0 <= self.absent < 1:
            raise ValueError(f"absent is {self.absent}; from 0 to below 1")
        if self.bits not in (4, 8, 16) or (self.bits < 16 and self.adapter == "full"):
            raise ValueError(f"bits is {self.bits}; 4, 8 or 16, and 16 for full training")

    @property
    def rate(self) -> float:
        """The learning rate that it trains with."""
        return self.learning_rate or RATES[self.adapter == "full"]

    def space(self) -> Mapping[str, Sequence[Any]]:
        """The settings worth trying; every kind of adapter gets as many learning rates."""
        rates = (3e-5, 1e-4, 2e-4) if self.adapter == "full" else (3e-4, 1e-3, 2e-3)
        return {
            "learning_rate": rates,
            "rank": (8, 16, 32),
            "batch": (8, 16, 32),
            "epochs": (1.0, 3.0),
            "adapter": ("lora", "dora", "full") if self.bits == 16 else ("lora", "dora"),
        }

    def apply(self, system: System, data: Learnable, run: Run) -> System:
        """The System with one more adapter; a closed set is scored as whole answers from here on."""
        from whet.task import rows_hash
        from whet.train.adapters import Adapter
        from whet.train.lesson import key, teach

        name = key(asdict(self), system.state, rows_hash(data.train), run.seed, run.fidelity, run.trained_tokens,
                   run.previous)  # fmt: skip
        adapter = Adapter(self.adapter, self.rank, 2 * self.rank, bits=self.bits)
        wrong = self.suspects(system, data, run) if self.clean else Disputed()
        taught = teach(system, run, name, adapter, lambda live: self._lesson(system, data, run, live, wrong))
        return replace(taught, decoding=replace(system.decoding, prior=(), normalise="sum"))

    @property
    def alone(self) -> FineTune:
        """Fine-tuning with these settings, without what a kin of it does beside."""
        return FineTune(**{f.name: getattr(self, f.name) for f in fields(FineTune)})

    def suspects(self, system: System, data: Learnable, run: Run) -> Disputed:
        """Rows whose label is probably wrong, by the model itself, trained on the other half of the rows.

        Trained by the defaults at full length, whatever the settings: trainings that are compared, or that go on from
        one another, leave out the same rows. The same search again finds them in the store. No row is judged with rows
        of train in sight, which it may itself be one of.
        """
        from whet import suspects
        from whet.embed import Embedder
        from whet.model import aside
        from whet.task import rows_hash
        from whet.train.lesson import key

        if not data.labels:
            raise MethodError("clean needs a closed set", expected="labels in task.yaml", found="none")
        rows = suspects.labelled(each_once(data.train)[0], data.labels)
        method = FineTune(epochs=CROSS_EPOCHS, recompute=self.recompute, absent=self.absent, bits=self.bits)
        most = None if run.trained_tokens is None else run.trained_tokens // (2 * suspects.PARTS)

        taken: list[Spent] = []

        def judge(fit: Sequence[Example], held: Sequence[Example]) -> list[tuple[float, ...]]:
            """Log-probabilities of the labels of `held`, by the model trained on `fit`."""
            within = replace(run, trained_tokens=most, fidelity=1.0, spent=Spent(), notes={}, previous=None)
            try:
                taught = method.apply(system, replace(data, train=tuple(fit)), within)
            except DivergedError as error:  # at the default rate, which no setting changes here
                raise MethodError(f"suspects cannot be looked for: {error.problem}", found=error.found,
                                  do="leave clean out") from error  # fmt: skip
            finally:
                taken.append(within.spent)
            progress = run.progress("looking for suspects")
            session = run.session(taught.model)
            scores, _ = taught.label_scores(held, session, progress, blind=True)
            run.sessions.pop(taught.model)
            taken.append(session.spent)
            return scores

        # The System may answer in another order than the task lists its labels in.
        order = system.decoding.labels or data.labels
        name = key("disputed", asdict(method), system.state, rows_hash(rows), run.seed, most, "spent")
        made = run.store.artifact(name)
        if not made.exists():
            try:
                found = suspects.find(rows, Embedder(run.home), run.seed, judge, order)
            except WhetError:
                run.spent += sum(taken, Spent())  # for nothing
                raise
            with aside(made) as work:
                body = {"suspects": [asdict(s) for s in found], "spent": asdict(sum(taken, Spent()))}
                (work / "suspects.json").write_text(json.dumps(body), encoding="utf-8")
        body = json.loads((made / "suspects.json").read_text(encoding="utf-8"))
        disputed = Disputed(suspects.Suspect(**s) for s in body["suspects"])
        # As with a training, what is found in the store is charged, and a race leaves out what it has paid before: a
        # run that goes on where it was killed has as much left.
        run.spent += Spent(**body["spent"])
        run.notes["trainings"] = {**run.notes.get("trainings", {}), name: body["spent"]}
        disputed.tokens = body["spent"]["trained_tokens"]
        return disputed

    def _lesson(
        self, system: System, data: Learnable, run: Run, live: TorchSession, wrong: Sequence[Suspect] = (),
        bound: int | None = None,
    ) -> Lesson:  # fmt: skip
        """`bound` is the whole budget where only a part of it is the run's: by it so many rows are held out."""
        from whet.suspects import examined, labelled
        from whet.train.batches import affordable, per_epoch, step_count, steps
        from whet.train.fit import twice_the_data, verdict
        from whet.train.lesson import Lesson, Rendered, mean_loss, render_rows
        from whet.train.loop import Schedule, Settings, validations
        from whet.train.losses import NextToken

        usable, repeated = each_once([e for e in data.train if e.answered or e.text])
        found: dict[str, Any] = {"duplicates": repeated}
        if self.clean:
            left = len(usable) - len(examined(labelled(usable, data.labels)))
            found |= {"suspects": [asdict(s) for s in wrong], "unexamined": left}
        named = {s.id for s in wrong}
        usable = [e for e in usable if e.id not in named]
        data = replace(data, train=tuple(usable))
        if not usable:
            raise MethodError("nothing to train on", expected="train rows with completions or text", found="none")
        # Also where the search was paid for by another training: those that are raced train for as many tokens.
        spent = wrong.tokens if isinstance(wrong, Disputed) else 0
        allowed = None if run.trained_tokens is None else max(1, run.trained_tokens - spent)
        sampled = random.Random(run.seed).sample(usable, min(SAMPLED, len(usable)))
        some, _ = render_rows(system, sampled, live)
        each = len(some) / len(sampled)  # a long text is several rows
        # How much is wanted at full fidelity decides everything but the number of steps, so that it can be continued.
        total, module = each * len(usable), live.module
        wanted, batch = affordable(some, self.epochs * total, self.batch, allowed, run.seed, module)
        # What the defaults would want decides what is held out, so that all settings are compared on the same rows.
        most = allowed if bound is None else max(1, bound - spent)
        usual, _ = affordable(some, FineTune.epochs * total, FineTune.batch, most, run.seed, module)
        checked = max(24, min(128, round(CHECKED * usual)))
        fit, held = data.validation(seed=run.seed, most=max(1, round(checked / each)))
        rows = Rendered(system, fit, live, (self.absent, run.seed))
        checks, _ = render_rows(system, held, live)
        count = step_count(run.fidelity * min(wanted, self.epochs * rows.count), rows.count, batch)
        once, order = per_epoch(rows.count, batch), steps(range(rows.count), batch, run.seed)
        rows([i for n in range(count) for i in order(n)])  # a budget may leave most of train unseen
        size = round(rows.count / once)  # of a step, as it comes out

        def after(curves: Curves) -> dict[str, Any]:
            fit = verdict(curves)
            more = twice_the_data([loss for _, loss in curves.train[:once]], size, run.seed)
            return {"verdict": fit.verdict, "fit": asdict(fit), "epochs": round(curves.steps / once, 2),
                    "twice_the_data": asdict(more) if more else None}  # fmt: skip

        return Lesson(
            lambda number: rows(order(number)),
            NextToken(),
            Settings(Schedule(self.rate, count), validations=validations(count), recompute=self.recompute),
            (lambda: mean_loss(live, checks)) if checks else None,
            {"rows": rows.count, "batch": size, "shortened": rows.cut, **found,
             "row_tokens": _lengths(list(rows.known.values()))},
            after,
        )


def each_once(rows: Sequence[Example]) -> tuple[list[Example], int]:
    """Rows without their repetitions, and how many those were."""
    usable = list({(e.prompt, e.completion, e.text, e.history): e for e in rows}.values())
    return usable, len(rows) - len(usable)


def _lengths(rows: Sequence[Row]) -> dict[str, int]:
    """Median, 95th percentile and greatest number of tokens of a row."""
    sizes = sorted(len(r.prompt) + len(r.continuations[0]) for r in rows)
    return {"median": sizes[len(sizes) // 2], "p95": sizes[int(0.95 * (len(sizes) - 1))], "most": sizes[-1]}
