"""Distillation (Hinton et al. 2015): a student learns to answer as a teacher does, from prompts alone."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from whet import metrics
from whet.engine import Session
from whet.errors import MethodError, ModelError
from whet.methods import Need, Run
from whet.prompt import SLOT
from whet.store import write_text
from whet.system import Demonstrations, System, load
from whet.task import Example, Learnable

if TYPE_CHECKING:
    from whet.engine.prefix import Row
    from whet.engine.torch import TorchSession
    from whet.model import ModelRef
    from whet.train.adapters import Adapter
    from whet.train.lesson import Lesson
    from whet.train.loop import Source
    from whet.train.losses import Loss
    from whet.train.teacher import Teacher

    Pair = tuple[Example, Row]

CLEARS = ("none", "demonstrations", "context", "prompt")
RATES = {"lora": 1e-3, "full": 5e-5}
GOLD = 1.0  # of what is learnt where a model was made smaller and a row has a completion: the teacher learnt it, too
FEW = 16  # choices up to which all are learnt from
LIKELIEST, LEAST_CHANCE = 8, 0.01  # of more, so many of the likeliest, and none that is less likely than this
CONFIDENT = 0.8  # how likely a teacher's choice is made to be, on average, where it was less
MOST_SCORED = 256  # choices: beyond, only which one the teacher takes is learnt
SAMPLED = 256  # rows looked at to tell how many tokens a row costs
CHECKED = 0.06  # rows to validate on as a share of the rows trained on
WATCHED = 64  # of them, rows whose answers are compared with the teacher's


@dataclass(frozen=True)
class Said:
    """What is to be learnt of a row: an answer and, of a closed set, how likely each choice is.

    An answer that is not `whole` was cut off at the teacher's limit: that it ends there is not learnt.
    """

    text: str
    chances: tuple[float, ...] = ()
    gold: bool = False  # it is the row's own completion
    whole: bool = True


@dataclass(frozen=True)
class Distill:
    """Learn what a teacher answers, so that its context or its size is no longer needed; prompts without answers do.

    `teacher`: the folder of a System, or a model (in this System's place); without, the model as it was before it was
    made smaller, else this System itself, whose demonstrations, passages and calibration the student learns to do
    without (context distillation, Snell et al. 2022). `unlabelled`: a file of prompts beside the train rows. What the
    student loses, `clear` says: none, demonstrations, context (passages, too) or prompt (instruction and frame, too);
    by default context where the models are the same, else none. `adapter`: lora or full; by default full where the
    model was made smaller, and lora over packed weights. `learning_rate` 0: 1e-3 for lora, 5e-5 for full. `temperature`
    softens the teacher. `hidden` weighs how far the states behind the student's layers lie from the teacher's, at every
    token, where the teacher is the model before it was made smaller and all weights are trained (Jiao et al. 2020,
    TinyBERT); below 0: as much as the answers, but nothing where layers were only narrowed. `gold` is how much a row's
    own completion counts beside the teacher: mixed into the choices of a closed set, of free text the share of such
    rows that are learnt from it instead; below 0: all for a closed set where the model was made smaller, else nothing.
    `on_policy` is the share of the steps, the last ones, in which free text is sampled from the student itself
    and judged by the teacher's distributions (GKD, Agarwal et al. 2024).
    """

    name: ClassVar[str] = "distill"
    family: ClassVar[str] = "compression"
    needs: ClassVar[tuple[Need, ...]] = ("weights",)
    writes: ClassVar[tuple[str, ...]] = ("model", "decoding", "demonstrations", "sources", "prompt")
    invalidates: ClassVar[tuple[str, ...]] = ()  # a calibration is the teacher's, and is learnt

    teacher: str = ""
    unlabelled: str = ""
    clear: str = ""
    adapter: str = ""
    rank: int = 16
    learning_rate: float = 0.0
    epochs: float = 3.0
    batch: int = 32
    temperature: float = 1.0
    hidden: float = -1.0
    gold: float = -1.0
    on_policy: float = 0.25

    def __post_init__(self) -> None:
        if self.clear not in ("", *CLEARS):
            raise ValueError(f"clear is {self.clear!r}; one of {', '.join(CLEARS)}")
        if self.adapter not in ("", *RATES):
            raise ValueError(f"adapter is {self.adapter!r}; one of {', '.join(RATES)}")
        if min(self.epochs, self.temperature) <= 0 or min(self.rank, self.batch) < 1:
            raise ValueError("epochs, temperature, rank and batch are positive")
        if self.learning_rate < 0:
            raise ValueError("learning_rate is not negative")
        if not (self.gold <= 1 and 0 <= self.on_policy <= 1):
            raise ValueError("gold and on_policy are at most 1, and on_policy is not negative")

    def space(self) -> Mapping[str, Sequence[Any]]:
        """The settings worth trying."""
        # Without a kind the model decides; rates that are all right for either.
        rates = {"full": (2e-5, 1e-4), "lora": (3e-4, 2e-3)}.get(self.adapter, (1e-4, 6e-4))
        return {"learning_rate": rates, "temperature": (1.0, 2.0), "epochs": (1.0, 3.0, 6.0)}

    def apply(self, system: System, data: Learnable, run: Run) -> System:
        """The System whose model has learnt from the teacher, without what was cleared.

        Raises MethodError where teacher and student are the same, or cannot be compared.
        """
        from whet.task import rows_hash
        from whet.train.lesson import key, teach
        from whet.train.team import team

        if team().sharded and self.on_policy and not data.closed:
            raise MethodError("sampling from the student needs whole weights", expected="on_policy=0, or DDP",
                              found=f"on_policy={self.on_policy:g} under FSDP", do="set on_policy=0")  # fmt: skip
        teacher = self._teacher(system, data)
        student = self._student(system, teacher)
        rows = _each_once([*data.train, *self._unlabelled(data)])
        if not rows:
            raise MethodError("nothing to distil on", expected="train rows, or prompts in a file", found="none",
                              do="set unlabelled=FILE")  # fmt: skip
        adapter, whole = self._adapter(system, run)
        named = {**asdict(self), "teacher": teacher.state, "unlabelled": ""}
        name = key("distill", named, RATES, GOLD, student.state, rows_hash(rows), run.seed, run.fidelity,
                   run.trained_tokens, run.previous)  # fmt: skip
        opened = set(run.sessions)
        made = teach(
            student, run, name, adapter,
            lambda live: self._lesson(student, teacher, rows, data.closed, run, live, adapter), whole=whole,
        )  # fmt: skip
        if teacher.model != system.model and teacher.model not in opened:
            run.sessions.pop(teacher.model, None)
        run.notes.update(teacher=self.teacher or ("itself" if teacher is system else "before it was made smaller"),
                         teacher_fingerprint=teacher.fingerprint[:16], cleared=_lost(system, student))  # fmt: skip
        return made

    # --- who learns from whom -----------------------------------------------------------------------------------------

    def _teacher(self, system: System, data: Learnable) -> System:
        """The teacher. Raises MethodError where its labels are not the student's; what `load` and `resolve` raise."""
        from whet.model import resolve

        place = Path(self.teacher)
        if not self.teacher:
            if system.model.whole is None:
                return system
            # A calibration that stands here is that of the smaller model.
            before = replace(system.uncalibrated, model=system.model.original)
            # A saved System has no history: what is left of it is the untuned base, or another model of its name.
            if not (_made_of(system, before) and _at_hand(before.model)):
                raise MethodError(
                    "the model that this one was made of is not at hand", expected="its System as the teacher",
                    found=f"{system.model.base} alone", do="set teacher=FOLDER",
                )  # fmt: skip
            return before
        if place.is_dir() and not (place / "config.json").exists():
            found = load(place, system.home, trust=data.trusted)
        else:
            found = replace(system.uncalibrated, model=resolve(self.teacher))
        ours, theirs = system.decoding.labels, found.decoding.labels
        if set(ours) != set(theirs):
            odd = sorted(set(ours) ^ set(theirs))
            raise MethodError(
                "the teacher answers with other labels", expected=f"{len(ours)} labels as in the task",
                found=f"{len(theirs)}; {odd[0]!r} in one only", do="take a teacher of this task",
            )  # fmt: skip
        return found

    def _unlabelled(self, data: Learnable) -> list[Example]:
        """The prompts in the file.

        Raises what reading it raises, and MethodError where each row needs choices, or where some are held out.
        """
        from whet.feedback import prompts_of

        if self.unlabelled and data.closed and not data.labels:
            raise MethodError("prompts in a file bring no choices", expected="labels, or free text",
                              found="choices in every train row", do="put them into train.jsonl")  # fmt: skip
        found = prompts_of(Path(self.unlabelled)) if self.unlabelled else []
        _, sealed = data.sealed.without(tuple(found))
        if sealed:
            raise MethodError(
                f"{self.unlabelled} holds rows that the System is measured on", do="take them out",
                expected="none that repeat those of select or confirm, or nearly",
                found=f"{len(sealed)}; the first, row {' '.join(sealed[0])}",
            )  # fmt: skip
        return found

    def _student(self, system: System, teacher: System) -> System:
        """The student before it has learnt. Raises MethodError where it is the teacher."""
        level = CLEARS.index(self.clear or ("context" if teacher.model.identity == system.model.identity else "none"))
        decoding = replace(system.decoding, prior=(), normalise="sum")
        if level:  # what takes long: reasons before the answer, and votes
            calm = 0.0 if decoding.votes > 1 else decoding.temperature
            decoding = replace(decoding, after="", votes=1, temperature=calm)
        made = replace(system, decoding=decoding)
        if level >= CLEARS.index("demonstrations"):
            made = replace(made, demonstrations=Demonstrations())
        if level >= CLEARS.index("context"):
            made = replace(made, sources=())
        if level >= CLEARS.index("prompt"):
            made = replace(made, instruction="", frame=SLOT)
        if made.fingerprint == replace(teacher, decoding=replace(teacher.decoding, normalise="sum")).fingerprint:
            raise MethodError(
                "teacher and student are the same", found="none of them",
                expected="a teacher, a model that was made smaller, or demonstrations, passages or calibration to lose",
                do="set teacher=FOLDER, or apply prune, share, fewshot, calibrate or rag first",
            )  # fmt: skip
        return made

    def _adapter(self, system: System, run: Run) -> tuple[Adapter, bool]:
        """What is trained, and whether the outcome is a model of its own."""
        from whet.compress.folder import compressed, plain
        from whet.train.adapters import Adapter

        small = system.model.whole is not None
        module: Any = getattr(run.session(system.model), "module", None) if small else None
        packed = small and any(s["kind"].startswith("packed") for s in compressed(module).values())
        kind = self.adapter or ("full" if small and not packed else "lora")
        if packed and kind == "full":
            raise MethodError("packed weights cannot be trained", expected="adapter=lora", found="adapter=full")
        return Adapter(kind, self.rank, 2 * self.rank), small and (kind == "full" or plain(module))

    # --- what is learnt -----------------------------------------------------------------------------------------------

    def _lesson(
        self, student: System, teacher: System, rows: Sequence[Example], closed: bool, run: Run, live: TorchSession,
        adapter: Adapter,
    ) -> Lesson:  # fmt: skip
        from whet.splits import cut
        from whet.train.batches import affordable, step_count, steps
        from whet.train.lesson import Lesson
        from whet.train.loop import Schedule, Settings, validations
        from whet.train.losses import Choose, Imitate
        from whet.train.policy import Policy, mean_of
        from whet.train.teacher import OnPolicy

        opened = teacher.model in run.sessions
        heard, pairs, guide, notes = self._heard(teacher, student, rows, run, live)
        wanted, batch = affordable([row for _, row in pairs], self.epochs * len(pairs), self.batch,
                                   run.trained_tokens, run.seed, live.module)  # fmt: skip
        most, examples = min(round(0.1 * len(heard)), max(24, min(128, round(CHECKED * wanted)))), list(heard)
        checks = {examples[i] for i in cut(examples, most, seed=run.seed, closed=closed)[1]}
        fit, held = ([pair for pair in pairs if (pair[0] in checks) == side] for side in (False, True))
        # What is validated is the plain divergence, so that settings can be compared by it.
        fit, held = _targets(fit, heard, guide, 0, self.temperature), _targets(held, heard, guide, len(fit), 1.0)
        full = step_count(min(wanted, self.epochs * len(fit)), len(fit), batch)
        turn = full - round(self.on_policy * full) if guide else full
        count = max(1, round(run.fidelity * full))
        source = steps(fit, batch, run.seed)
        loss = Choose if notes["targets"] == "choices" else partial(Imitate, guide.table if guide else {})
        own: Source = lambda n: [row for _, row in source(n)]  # noqa: E731
        if sampled := guide is not None and turn < count:
            same = adapter.kind == "lora" and teacher.model == student.model
            own = OnPolicy(source, turn, guide, Policy(live, student, reference=same), run.seed, len(pairs),
                           self.temperature, same)  # fmt: skip
        told = loss(self.temperature)
        matched = self._matched(told, student, teacher, run, live, adapter)
        if not (sampled or matched or opened):
            run.sessions.pop(teacher.model, None)
        watched = {e: heard[e].text for e in examples if e in checks and e.text is None and not heard[e].gold}
        first = _agreement(student, watched, live)
        return Lesson(
            own, matched or told,
            Settings(Schedule(self.learning_rate or RATES[adapter.kind], count), validations=validations(count)),
            (lambda: mean_of(live, [row for _, row in held], loss(1.0))) if held else None,
            {**notes, "rows": len(fit), "batch": batch, "hidden": bool(matched), "on_policy": max(0, count - turn)},
            lambda _: {"agreement": {"n": min(WATCHED, len(watched)), "before": first,
                                     "after": _agreement(student, watched, live)}} if watched else {},
        )  # fmt: skip

    def _matched(
        self, loss: Loss, student: System, teacher: System, run: Run, live: TorchSession, adapter: Adapter
    ) -> Loss | None:
        """The loss with the distance of hidden states added; None without, or where the two read other tokens, too."""
        from whet.engine.torch import TorchSession
        from whet.train.matching import Match, partners
        from whet.train.teacher import Teacher

        voice = run.session(teacher.model)
        alike = _made_of(student, teacher) and not set(_lost(teacher, student)) - {"calibration"}
        if not (self.hidden and alike and adapter.kind == "full" and isinstance(voice, TorchSession)):
            return None
        if self.hidden < 0 and _narrowed(live.module, voice.module):
            return None
        pairs, known = partners(live.module, voice.module), Teacher.of(teacher, voice, live)
        if pairs is None or known is None:
            return None
        return Match(loss, self.hidden if self.hidden > 0 else 1.0, live, voice, pairs, known.spelling())

    def _heard(
        self, teacher: System, student: System, rows: Sequence[Example], run: Run, live: TorchSession
    ) -> tuple[dict[Example, Said], list[Pair], Teacher | None, dict[str, Any]]:
        """What the teacher says to as many rows as the budget pays for, and the rows to train on that this makes.

        With them, the teacher itself where it can be asked for its distributions. What it costs is put down to the
        live session.
        """
        from whet.engine.torch import TorchSession
        from whet.train.teacher import Teacher

        voice = run.session(teacher.model)
        if isinstance(voice, TorchSession):  # a session of its own: nobody else counts what it spends
            voice = TorchSession(voice.module, voice.tokenizer)
        before, draw, guide = voice.spent, random.Random(run.seed), None
        asked = _afforded(rows, self.epochs, self.batch, student, live, run)
        closed = student.decoding.closed and all(e.choices or student.decoding.labels for e in asked)
        known = [e for e in asked if (e.completion in _set(student, e) if closed else e.completion)]
        small = _made_of(student, teacher)
        gold = self.gold if self.gold >= 0 else GOLD if small and closed else 0.0
        told = set(known) if closed and gold == 1 else set[Example]()  # what nobody needs to be asked
        wanted = [e for e in asked if e not in told]
        heard = self._ask(teacher, student, wanted, closed, voice, run) if wanted else {}
        for e in known:
            if not closed and draw.random() < gold:
                heard[e] = Said(e.completion, gold=True)
            elif closed and gold:
                theirs = heard[e].chances if e in heard else ()
                mixed = _mixed(theirs, _only(e.completion, _set(student, e)), gold if theirs else 1.0)
                heard[e] = replace(heard.get(e, Said(e.completion)), chances=mixed, gold=gold == 1)
        # Behind reasons that the student leaves out, the teacher would say other things.
        if isinstance(voice, TorchSession) and not closed and student.decoding.after == teacher.decoding.after:
            guide = Teacher.of(teacher, voice, live)
        heard = {e: s for e, s in heard.items() if e.text is None or guide is not None}
        if not heard:
            raise MethodError("the teacher says nothing to learn from", found=f"none for {len(asked)} rows",
                              expected="prompts, and answers out of the labels where there are some")  # fmt: skip
        pairs, short = (_choosing if closed else _saying)(student, heard, live)
        live.spent += voice.spent - before
        kind = "choices" if closed else "tokens" if guide is not None else "answers"
        notes = {"targets": kind, "shortened": short, "unheard": len(asked) - len(heard)}
        return heard, pairs, guide, notes | ({"not_asked": len(told)} if told else {})

    def _ask(
        self, teacher: System, student: System, rows: Sequence[Example], closed: bool, voice: Session, run: Run
    ) -> dict[Example, Said]:
        """What the teacher says to each row; to plain text, nothing.

        Answers outside a closed set are left out, and reasons that came to no answer (`Decoding.after`).
        Its answers are kept in the store: asking is what costs most, above all where it is a server. What that did not
        answer is asked again next time.
        """
        from whet.engine.torch import TorchSession
        from whet.task import rows_hash

        prompted = [e for e in rows if e.text is None]
        sets = {e: _set(student, e) for e in prompted} if closed else {}
        few = max(map(len, sets.values()), default=0) <= MOST_SCORED
        scored = bool(sets) and teacher.decoding.closed and few and isinstance(voice, TorchSession)
        decoding, told = teacher.decoding, run.progress("the teacher answers")
        if decoding.after == student.decoding.after:  # the student is to say the reasons, too
            decoding = replace(decoding, after="")
        if decoding.votes <= student.decoding.votes:
            decoding = replace(decoding, votes=1, temperature=0.0)
        asked = replace(teacher, decoding=decoding)
        # What was said depends on the teacher alone, whatever device the student is on.
        body = json.dumps(["answers", asked.state, scored, rows_hash(prompted), voice.protocol], sort_keys=True)
        place = run.store.artifact(hashlib.sha256(body.encode()).hexdigest())
        file = place / "answers.json"

        def silent(one: Any) -> bool:  # a server that did not answer has not said nothing
            return one is None or (teacher.model.remote and not one[0] and one[1] != "length")

        found: list[Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else [None] * len(prompted)
        if lacking := [i for i, one in enumerate(found) if silent(one)]:
            some = [prompted[i] for i in lacking]
            if scored:
                new: list[Any] = asked.label_scores(some, voice, told, blind=True)[0]
            else:
                new = [(a.text, a.finish) for a in asked.answers(some, voice, told, blind=True)]
            for i, one in zip(lacking, new, strict=True):
                found[i] = one
            place.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps([None if silent(one) else one for one in found]))
        if scored:
            scores = {e: _calibrated(teacher, e, sets[e], one) for e, one in zip(prompted, found, strict=True)}
            sharp = sharpness(list(scores.values()))
            return {e: Said(sets[e][one.index(max(one))], softmax(one, sharp)) for e, one in scores.items()}
        said = {e: Said("") for e in rows if e.text is not None and not closed}
        answered = [(e, *one) for e, one in zip(prompted, found, strict=True) if not silent(one)]
        for e, one, finish in answered:
            near = [c for c in sets.get(e, ()) if metrics.plain(c) == metrics.plain(one)]
            meant = [c for c in near if c == one] or near
            if meant:
                said[e] = Said(meant[0], _only(meant[0], sets[e]))
            elif not closed and finish != "unmarked" and student.decoding.after in one:
                said[e] = Said(one, whole=finish == "stop")
        return said


def softmax(scores: Sequence[float], sharp: float = 1.0) -> tuple[float, ...]:
    """Chances by scores in nats, multiplied by `sharp`."""
    top = max(scores)
    weights = [math.exp(sharp * (s - top)) for s in scores]
    return tuple(w / sum(weights) for w in weights)


def sharpness(rows: Sequence[Sequence[float]]) -> float:
    """What scores are multiplied by so that the likeliest choice has a chance of `CONFIDENT` on average; at least 1.

    A small model's scores of whole answers, taken per token, differ little; learnt as they are, a student's own errors
    and the rounding of bf16 logits (an eighth, from 16 up) would decide. What counts is how they differ from row to row
    (Sun et al. 2024, logit standardisation).
    """
    low, high = 0.0, 10.0  # of the exponent: e^10 is as good as the choice alone
    for _ in range(30):
        half = (low + high) / 2
        confident = fmean(max(softmax(row, math.exp(half))) for row in rows) >= CONFIDENT
        low, high = (low, half) if confident else (half, high)
    return math.exp(low)


def _each_once(rows: Sequence[Example]) -> list[Example]:
    """Rows without those that ask the same again; of these, one with a completion is kept where there is one."""
    order = sorted((e for e in rows if e.prompt or e.text), key=lambda e: bool(e.completion))
    return list({(e.prompt, e.text, e.history, e.choices): e for e in order}.values())


def _set(student: System, example: Example) -> tuple[str, ...]:
    """The choices of an example, or the labels."""
    return example.choices or student.decoding.labels


def _only(answer: str, choices: Sequence[str]) -> tuple[float, ...]:
    """All chance on one of the choices."""
    return tuple(float(c == answer) for c in choices)


def _mixed(theirs: Sequence[float], own: Sequence[float], gold: float) -> tuple[float, ...]:
    """A teacher's chances and the completion's, `gold` of it."""
    return tuple((1 - gold) * a + gold * b for a, b in zip(theirs or own, own, strict=True))


def _calibrated(teacher: System, example: Example, choices: Sequence[str], scores: Sequence[float]) -> list[float]:
    """A teacher's scores, its prior subtracted, in the order of the student's choices."""
    if example.choices:
        return list(scores)
    prior, labels = teacher.decoding.prior or (0.0,) * len(scores), teacher.decoding.labels
    return [scores[i] - prior[i] for i in map(labels.index, choices)]


def _lost(before: System, after: System) -> list[str]:
    """The parts that a System had and has no longer."""
    parts = {"demonstrations": (before.demonstrations.pool, after.demonstrations.pool),
             "sources": (before.sources, after.sources), "instruction": (before.instruction, after.instruction),
             "frame": (before.frame != SLOT, after.frame != SLOT),
             "calibration": (before.decoding.prior, after.decoding.prior)}  # fmt: skip
    return [name for name, (had, has) in parts.items() if had and not has]


def _narrowed(student: Any, teacher: Any) -> bool:
    """Whether a module has all of another's layers, each for itself, with fewer neurons: it begins near it."""
    from whet.compress.structure import layers

    one, other = student.config.get_text_config(), teacher.config.get_text_config()
    fewer = getattr(one, "intermediate_size", 0) < getattr(other, "intermediate_size", 0)
    held = [id(p) for layer in layers(student) for p in layer.parameters()]
    return fewer and len(layers(student)) == len(layers(teacher)) and len(set(held)) == len(held)


def _made_of(student: System, teacher: System) -> bool:
    """Whether the teacher's model is the student's as it was before anything made it smaller."""
    from whet.compress.folder import made_of

    theirs = [t.fingerprint for t in teacher.model.transforms]
    return teacher.model.content == student.model.content and made_of(student.model) == theirs


def _at_hand(model: ModelRef) -> bool:
    """Whether the base is still where it was, the same; one that was trained has been opened by this run."""
    from whet.model import resolve

    try:
        return bool(model.transforms) or model.carried or resolve(model.base).content == model.content
    except ModelError:
        return False


def _prompted(student: System, examples: Sequence[Example], live: TorchSession, room: Sequence[int]) -> tuple[Any, int]:
    """Prompts as the student is sent them, as tokens; and how many were shortened."""
    prompts, cut = student.fitting(examples, live, room, blind=True)
    return live.encode(prompts), sum(cut)


def _afforded(
    rows: Sequence[Example], epochs: float, batch: int, student: System, live: TorchSession, run: Run
) -> list[Example]:
    """No more rows than will be trained on and looked at, so that a teacher is not asked in vain.

    Answers are not known yet: their tokens are not counted, so that it is rather too many.
    """
    from whet.engine.prefix import Row
    from whet.train.batches import affordable

    draw = random.Random(run.seed)
    some = draw.sample(list(rows), min(SAMPLED, len(rows)))
    drafts = [Row(tokens, ((0,),)) for tokens in _prompted(student, some, live, [1] * len(some))[0]]
    wanted, _ = affordable(drafts, epochs * len(rows), batch, run.trained_tokens, run.seed, live.module)
    most = math.ceil(wanted / 0.9) + 24  # a tenth is for validation
    return list(rows) if len(rows) <= most else draw.sample(list(rows), most)


def _choosing(student: System, heard: Mapping[Example, Said], live: TorchSession) -> tuple[list[Pair], int]:
    """Rows whose continuations are choices, with the teacher's probabilities as their facts."""
    from whet.engine.prefix import Row

    parts = []
    for e, said in heard.items():
        spoken = e.choices or student.decoding.spoken
        order = sorted(range(len(spoken)), key=lambda i: (-said.chances[i], i))
        if len(order) > FEW:
            order = [i for i in order[:LIKELIEST] if said.chances[i] >= LEAST_CHANCE] or order[:1]
        order = [i for i in order if said.chances[i] > 0]
        total = sum(said.chances[i] for i in order)
        parts.append((tuple(live.encode_answer(spoken[i], end=True) for i in order),
                      tuple((said.chances[i] / total,) for i in order)))  # fmt: skip
    prompts, cut = _prompted(student, list(heard), live, [max(map(len, answers)) for answers, _ in parts])
    return [(e, Row(p, *part)) for e, p, part in zip(heard, prompts, parts, strict=True)], cut


def _saying(student: System, heard: Mapping[Example, Said], live: TorchSession) -> tuple[list[Pair], int]:
    """Rows with the teacher's answer, and plain text in windows; without the teacher's distributions so far."""
    from whet.engine.prefix import Row
    from whet.train.lesson import render_rows, within

    asked = [e for e in heard if e.text is None]
    answers = [live.encode_answer(heard[e].text, end=heard[e].whole) for e in asked]
    prompts, cut = _prompted(student, asked, live, [min(len(a), live.context // 2) for a in answers])
    none = ((-1.0, 0.0),)
    pairs = [(e, Row(p, (within(a, live.context - len(p)),), none))
             for e, p, a in zip(asked, prompts, answers, strict=True) if a]  # fmt: skip
    pairs += [(e, replace(row, facts=none)) for e in heard if e.text for row in render_rows(student, [e], live)[0]]
    return pairs, cut


def _targets(
    pairs: Sequence[Pair], heard: Mapping[Example, Said], guide: Teacher | None, at: int, temperature: float
) -> list[Pair]:
    """Rows with what the loss needs at a temperature: the teacher's distributions, from `at` on, or its chances."""
    soft = {n: row for n, (e, row) in enumerate(pairs) if guide is not None and not heard[e].gold}
    if guide is not None and soft:
        judged = guide.judge([pairs[n][0] for n in soft], list(soft.values()), at, temperature)
        soft = dict(zip(soft, judged, strict=True))
    elif guide is None:
        for n, (e, row) in enumerate(pairs):
            if heard[e].chances:
                chances = softmax([math.log(c) for (c,) in row.facts], 1 / temperature)
                soft[n] = replace(row, facts=tuple((c,) for c in chances))
    return [(e, soft.get(n, row)) for n, (e, row) in enumerate(pairs)]


def _agreement(student: System, watched: Mapping[Example, str], live: TorchSession) -> float | None:
    """How far the student answers as the teacher does: the share of same choices, or the mean F1 of their words."""
    closed, read = student.decoding.closed, student.decoding.read
    said = {e: text if closed else read(text) for e, text in list(watched.items())[:WATCHED]}
    rows = [replace(e, completion=text, answers=(text,)) for e, text in said.items()]
    metric = metrics.get("accuracy" if closed else "token_f1")
    found = metrics.score_all(metric, [a.text for a in student.answers(rows, live, blind=True)], rows)
    return fmean(o.score for o in found) if found else None
