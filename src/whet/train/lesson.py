"""Teaching a System's model: what every method that trains has in common, from opening to keeping the outcome."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from whet.engine import Spent
from whet.engine.prefix import Row, Tokens
from whet.engine.torch import TorchSession, give_back_memory
from whet.errors import DivergedError, MethodError
from whet.methods import Run
from whet.model import Transform, aside, hash_files, own_device, save_weights
from whet.reading import taught
from whet.system import System
from whet.task import Example
from whet.train.adapters import Adapter, adapted, merged
from whet.train.head import save_head
from whet.train.loop import Beat, Curves, Settings, Source, abandoned, out_of_memory, train
from whet.train.losses import Loss
from whet.train.peak import matmul_peak
from whet.train.team import team
from whet.train.trackers import trackers

STATE_BYTES = 20  # of a trained weight: itself, its best, its fp32 master and gradient, AdamW's two moments
NEXT = 7919  # between the seeds of adapters that stand upon one another
TEXT_TOKENS = 1024  # plain text is trained in windows of at most this many tokens
RULES = 7  # by which rows become steps; raised where the same settings come to other weights than before


@dataclass(frozen=True)
class Lesson:
    """What a live module is to learn: the rows of each step, the loss, the settings, and how it is validated.

    `log` is what the source writes down of its steps; a training that is gone on from a checkpoint has it again.
    """

    source: Source
    loss: Loss
    settings: Settings
    validate: Callable[[], float] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    after: Callable[[Curves], Mapping[str, Any]] = lambda _: {}  # notes that are known only afterwards
    log: list[dict[str, Any]] = field(default_factory=list)


def key(*parts: Any) -> str:
    """The identity of a training: the hash of all that it depends on, the kind of device included."""
    return hashlib.sha256(json.dumps([RULES, own_device(), *parts], sort_keys=True).encode()).hexdigest()


def teach(
    system: System, run: Run, name: str, adapter: Adapter, prepare: Callable[[TorchSession], Lesson], *,
    whole: bool = False,
) -> System:  # fmt: skip
    """The System with what the lesson taught as one more transform; a lesson that was finished before is not repeated.

    `prepare` is given a session over the live module, before its first step. A training that was killed goes on from
    its last checkpoint. With `whole`, and where all weights of a model that was made smaller are trained, the outcome
    is a model of its own: adapters are merged, and nothing before it counts or is kept with it. Raises MethodError for
    a model whose weights are out of reach.
    """
    made, crew = run.store.artifact(name), team()
    if not (made / "done.json").exists():
        if crew.sharded:
            _shardable(adapter, whole)
        session = run.local(system.model, "training")
        checkpoint = run.home / "checkpoints" / name
        before = checkpoint.with_name(f"{run.previous}.stable") if run.previous else None
        # Another start for each adapter upon others: from the same one it would lie along what was learnt before.
        seed = run.seed + NEXT * len(system.model.transforms)
        with _fitting(session.module, adapter), adapted(session.module, adapter, seed) as tuned:
            live = TorchSession(tuned, session.tokenizer)
            lesson = prepare(live)
            schedule = replace(lesson.settings.schedule, whole=round(lesson.settings.schedule.steps / run.fidelity))
            settings = replace(lesson.settings, schedule=schedule, peak=matmul_peak(tuned.dtype, tuned.device))
            beats: list[Beat] = []
            alone = whole or (adapter.apart and system.model.whole is not None)
            tokenizer = session.tokenizer if alone else None

            def rescue() -> Path:
                best = checkpoint.with_name(f"{name}.best")
                if crew.first:
                    keep(tuned, adapter, best, {}, tokenizer)
                crew.wait()
                return best / "weights"

            def beat(at: Beat) -> None:
                beats.append(at)
                told(at)

            with trackers(run.report_to, run.home / "logs" / name) as track, _paying(run, live, beats, checkpoint):
                told = _told(run, track)
                curves = train(
                    tuned, lesson.source, lesson.loss, settings, validate=lesson.validate, beat=beat, keep=checkpoint,
                    since=before, team=crew, continued=run.fidelity < 1, rescue=rescue if run.fidelity == 1 else None,
                    session=live, log=lesson.log,
                )  # fmt: skip
            drawn = {"train": curves.train, "validation": curves.validation, "best": curves.best}
            notes = {**lesson.notes, "curves": drawn, "steps": curves.steps, **lesson.after(curves)}
            spent = Spent(training_seconds=curves.seconds, trained_tokens=curves.tokens) + live.spent
            if crew.first:
                keep(tuned, adapter, made, {"notes": notes, "spent": asdict(spent)}, tokenizer)
                _forget(checkpoint)
            crew.wait()
        if crew.sharded:  # its layers still gather shards before they run
            run.sessions.pop(system.model)
        give_back_memory()
    return kept(system, run, name)


def _shardable(adapter: Adapter, whole: bool) -> None:
    """Raise MethodError for what cannot be trained in shards."""
    if adapter.kind == "osf":  # whose hooks on the weights shards do not have
        raise MethodError("osf trains whole weights", expected="DDP", found="FSDP", do="leave out --use_fsdp")
    if whole and adapter.kind != "full":  # it is merged into a copy, which shards do not make
        raise MethodError("an adapter that is merged needs whole weights", expected="DDP", found="FSDP",
                          do="leave out --use_fsdp, or set adapter=full")  # fmt: skip


@contextmanager
def _fitting(module: Any, adapter: Adapter) -> Iterator[None]:
    """Within it, memory that does not suffice raises MethodError: for copies, the optimizer's state or a validation."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        full = adapter.apart
        needs = f"about {STATE_BYTES * module.num_parameters() / 1e9:.2g} GB beside the activations"
        raise MethodError(
            "too little memory to train", expected=needs if full else "room for an adapter and what it is trained on",
            found=str(error).split("\n")[0][:120] or type(error).__name__,
            do="set strategy=replay" if adapter.kind == "osf" else "set adapter=lora" if full else
            "set recompute=true, bits=4 or a lower rank, where they are settings",
        ) from error  # fmt: skip


def _forget(checkpoint: Path) -> None:
    """Delete a checkpoint, each process's shards of it, and what was left of its writing."""
    for file in (checkpoint, *checkpoint.parent.glob(f"{checkpoint.name}.[0-9]*"), *abandoned(checkpoint)):
        file.unlink(missing_ok=True)


def kept(system: System, run: Run, name: str) -> System:
    """The System with a finished artifact as one more transform; its cost and notes go to the Run."""
    made = run.store.artifact(name)
    body = json.loads((made / "done.json").read_text(encoding="utf-8"))
    run.spent += Spent(**body["spent"])
    # Named, so that recipes that begin with the same training pay for it once.
    trainings = {**run.notes.get("trainings", {}), name: body["spent"]}
    run.notes.update(body["notes"], artifact=name, trainings=trainings)
    return replace(system, model=system.model.add(Transform(body["kind"], body["fingerprint"], made / "weights")))


@contextmanager
def _paying(run: Run, live: TorchSession, beats: Sequence[Beat], checkpoint: Path) -> Iterator[None]:
    """Within it, a training that fails is put down to the Run, as far as it came; one that diverged is not resumed."""
    try:
        yield
    except MethodError as error:
        if isinstance(error, DivergedError) and team().first:
            _forget(checkpoint)
            _forget(checkpoint.with_name(f"{checkpoint.name}.stable"))
        if beats:
            tokens, seconds = beats[-1].before
            run.spent += Spent(training_seconds=beats[-1].seconds - seconds, trained_tokens=beats[-1].tokens - tokens)
        run.spent += live.spent
        raise


def _told(run: Run, track: Callable[[Beat], None]) -> Callable[[Beat], None]:
    """What tells each step of the loop as progress, and to the trackers."""

    def told(at: Beat) -> None:
        track(at)
        if run.tell is not None:
            share = f", {100 * at.share:.0f} % of peak" if at.share else ""
            left = at.seconds / at.step * (at.steps - at.step)
            rate = at.tokens / max(at.seconds, 1e-9)
            run.tell(f"loss {at.loss:.3f}, {rate:.0f} tokens/s{share}, {left:.0f} s left", at.step, at.steps)

    return told


def keep(tuned: Any, adapter: Adapter, made: Path, body: dict[str, Any], tokenizer: Any = None) -> None:
    """Write weights and record (notes, and spent) aside and rename them into place together.

    With the tokenizer they are written as a model folder.
    """
    with aside(made) as work:
        folder = work / "weights"
        if tokenizer is not None:
            from whet.compress.folder import save

            save(merged(tuned, adapter), tokenizer, folder)
        elif adapter.apart:
            folder.mkdir()
            save_weights(merged(tuned, adapter), folder)
        else:
            tuned.save_pretrained(folder, safe_serialization=True)
            (folder / "README.md").unlink(missing_ok=True)  # peft's template; the System has its own card
            config = folder / "adapter_config.json"
            settings = json.loads(config.read_text(encoding="utf-8"))
            # A path of this machine is no part of an adapter's identity; the System names the base by content.
            settings["base_model_name_or_path"] = None
            for name in ("target_modules", "exclude_modules"):  # sets, in another order in each process
                settings[name] = settings[name] and sorted(settings[name])
            config.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            if adapter.head:
                save_head(tuned, folder)
        body["kind"] = "model" if tokenizer is not None else "weights" if adapter.apart else "adapter"
        body["fingerprint"] = hash_files([p for p in folder.iterdir() if p.is_file()])
        (work / "done.json").write_text(json.dumps(body), encoding="utf-8")


def render_rows(
    system: System, examples: Sequence[Example], session: TorchSession, raft: tuple[float, int] | None = None
) -> tuple[list[Row], int]:
    """Training rows as the System renders its prompts, the completion and the end of turn behind them.

    `raft`, as (absent, seed), says how the passages of a System with documents are arranged for learning
    (`reading.taught`); without, they are as found. Plain text becomes rows of its own, in windows; beside answers they
    are weighted, so that a row of either counts alike. Returns the rows and how many had to be shortened to fit the
    context window; an answer leaves the prompt half of it.
    """
    usable = [e for e in examples if e.answered and e.text is None]
    said = system.decoding.said
    answers = [session.encode_answer(e.completion if e.choices else said(e.completion), end=True) for e in usable]
    # Demonstrations may come from the same rows: whoever sees its own answer only learns to copy.
    found = system.found([e.query for e in usable])
    if raft and any(s.kind == "documents" for s in system.sources):
        found = taught(system, usable, found, *raft)
    room = [min(len(a), session.context // 2) for a in answers]
    prompts, shorter = system.fitting(usable, session, room, blind=True, found=found)
    encoded = session.encode(prompts)
    rows = [Row(p, (within(a, session.context - len(p)),)) for p, a in zip(encoded, answers, strict=True)]
    cut = sum(s or r.continuations != (a,) for s, r, a in zip(shorter, rows, answers, strict=True))
    texts = [session.encode_answer(e.text, end=False, raw=True) for e in examples if e.text]
    [start] = session.encode([""]) if texts else [()]
    windows = [piece for text in texts if text for piece in session.windows(start, text, TEXT_TOKENS)]
    if rows and windows:
        return [*even(rows, 1.0), *even(windows, 1.0)], cut
    return rows + windows, cut


class Rendered:
    """Training rows by their numbers, rendered when first asked for; `cut` of them had to be shortened.

    Each example is a row, but where there is plain text: only its windows tell how many, and all are rendered at once.
    """

    def __init__(
        self, system: System, examples: Sequence[Example], session: TorchSession, raft: tuple[float, int]
    ) -> None:
        def rendered(some: Sequence[Example]) -> tuple[list[Row], int]:
            return render_rows(system, some, session, raft)

        self._of, self._examples = rendered, examples
        self.known: dict[int, Row] = {}
        self.count, self.cut = len(examples), 0
        if any(e.text is not None for e in examples):
            rows, self.cut = self._of(examples)
            self.known, self.count = dict(enumerate(rows)), len(rows)

    def __call__(self, numbers: Sequence[int]) -> list[Row]:
        """The rows of these numbers."""
        new = sorted({i for i in numbers if i not in self.known})
        if new:
            rows, cut = self._of([self._examples[i] for i in new])
            self.known.update(zip(new, rows, strict=True))
            self.cut += cut
        return [self.known[i] for i in numbers]


def even(rows: Sequence[Row], length: float) -> list[Row]:
    """Rows weighted so that they count, on average, as if their targets were `length` tokens long.

    A loss over tokens would hardly see a label beside a page. Weights that rows have already stay in proportion.
    """
    each = length / fmean(weight(r) * len(r.continuations[0]) for r in rows)
    return [replace(r, facts=((each * weight(r),),)) for r in rows]


def weight(row: Row) -> float:
    """How much each target of a row of one answer counts."""
    return row.facts[0][0] if row.facts else 1.0


def within(answer: Tokens, room: int, last: int = 0) -> Tokens:
    """An answer in at most `room` tokens: its first ones, and its `last` ones where they must stand at the end."""
    return answer if len(answer) <= room else (*answer[: room - last], *answer[len(answer) - last :])


def mean_loss(live: TorchSession, rows: Sequence[Row]) -> float:
    """Mean negative log-likelihood per target token, in nats, by the weights of the rows."""
    values = [(weight(row), v) for row, [found] in zip(rows, live.score_rows(rows), strict=True) for v in found]
    return -sum(w * v for w, v in values) / sum(w for w, _ in values)
