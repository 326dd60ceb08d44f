"""The one visible training loop: it takes the rows of each step and the loss as arguments, and any causal LM."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import torch
from torch import Tensor

from whet.engine import Session, Spent, attention
from whet.engine.prefix import Row
from whet.engine.torch import in_mode, using_tree
from whet.errors import DivergedError, MethodError
from whet.train.batches import Pack, batched, pack_tokens, row_tokens, shares
from whet.train.losses import Loss
from whet.train.team import Alone

Source = Callable[[int], Sequence[Row]]
LEAST_TOKENS = 64  # a pack smaller than this is not worth another try where memory is short
MANY_STEPS = 24  # from here on there are four validations, else two
KEEP_EVERY = 60.0  # seconds between checkpoints, at least
WRITING_SHARE = 0.05  # of the time may go to writing them


@dataclass(frozen=True)
class Schedule:
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM): it can be continued, because only the end decays."""

    learning_rate: float
    steps: int
    warmup: int = 8  # steps, so that a longer schedule begins like a shorter one
    decay: float = 0.3
    whole: int = 0  # steps of the training that this is the beginning of, whose warm-up it has; 0: of this one

    @property
    def decays(self) -> int:
        """The first step of the decay, from 0."""
        return self.steps - max(1, round(self.decay * self.steps))

    def at(self, step: int) -> float:
        """Learning rate of a step (from 0)."""
        rise = max(1, min(self.warmup, (self.whole or self.steps) // 4))
        share = min(1.0, (step + 1) / rise, (self.steps - step) / (self.steps - self.decays))
        return self.learning_rate * max(0.0, share)


@dataclass(frozen=True)
class Settings:
    """How a module is trained. `patience` validations without a new best end the training early.

    `recompute` keeps one activation per layer and computes the rest again (gradient checkpointing, Chen et al. 2016).
    `peak` is one process's matmul peak in operations per second, to tell what share of it is reached; 0: unknown.
    `penalty` is a scalar of the weights, minimised together with the loss; once per step, and not told as part of it.
    It reads whole weights, so that it goes with DDP; with FSDP it raises MethodError.
    """

    schedule: Schedule
    clip: float = 1.0
    weight_decay: float = 0.0
    validations: int = 4
    patience: int = 3
    recompute: bool = False
    peak: float = 0.0
    penalty: Callable[[], Tensor] | None = None


def validations(steps: int) -> int:
    """How often a training of so many steps is validated, beside once before the first."""
    return 4 if steps >= MANY_STEPS else 2


@dataclass(frozen=True)
class Curves:
    """Both curves as (tokens trained, loss), and which validation was kept.

    `tokens` and `seconds` are what this training took, a killed one that it resumed included, a shorter one that it
    went on from (`since`) not: the curves have that, too.
    """

    train: tuple[tuple[int, float], ...]
    validation: tuple[tuple[int, float], ...]
    best: int
    steps: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Beat:
    """One step, as progress is told; `share` of the machine's peak is 0 where the peak is unknown.

    Of `tokens` and `seconds` so many were `before`: taken by a shorter training that this one went on from.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    tokens: int
    seconds: float
    share: float = 0.0
    before: tuple[int, float] = (0, 0.0)


class Masters:
    """fp32 master copies of what is trained: bf16 weights would lose small updates (for fp32 weights no copy)."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.live = [p for p in module.parameters() if p.requires_grad]
        self.copies = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.live]

    def take_gradients(self) -> None:
        """Hand the live gradients to the copies."""
        for live, copy in zip(self.live, self.copies, strict=True):
            if copy is not live and live.grad is not None:
                copy.grad, live.grad = live.grad.float(), None

    def give_weights(self) -> None:
        """Round the copies into the live weights."""
        with torch.no_grad():
            pairs = [(live, copy) for live, copy in zip(self.live, self.copies, strict=True) if copy is not live]
            if pairs:
                torch._foreach_copy_([_local(live) for live, _ in pairs], [_local(copy) for _, copy in pairs])

    def finite(self) -> bool:
        """Whether every weight that is trained, as far as this process holds it, is a finite number."""
        return all(bool(_local(copy).isfinite().all()) for copy in self.copies)

    def snapshot(self) -> list[Tensor]:
        """The weights as they are now."""
        return [p.detach().clone() for p in self.live]

    def restore(self, weights: Sequence[Tensor]) -> None:
        """Put a snapshot back."""
        with torch.no_grad():
            for live, saved in zip(self.live, weights, strict=True):
                live.copy_(saved)


@dataclass
class _State:
    """Where a training stands: all that a checkpoint must hold beside weights and optimizer."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    tokens_before: int = 0  # of those, what a shorter training that this one goes on from took, and was charged for
    seconds_before: float = 0.0
    best_at: int = 0
    kept: int = 0  # the step that the best weights are of
    train: list[tuple[int, float]] = field(default_factory=list)
    checks: list[tuple[int, float]] = field(default_factory=list)
    spent: dict[str, Any] = field(default_factory=dict)  # by the session: on validations, samples and what came before
    pack_tokens: int = 0  # of a pass: halved where they do not fit
    log: list[dict[str, Any]] = field(default_factory=list)  # what the source wrote down of its steps


def train(
    module: Any,
    source: Source,
    loss: Loss,
    settings: Settings,
    *,
    validate: Callable[[], float] | None = None,
    beat: Callable[[Beat], None] | None = None,
    keep: Path | None = None,
    since: Path | None = None,
    team: Alone | None = None,
    continued: bool = False,
    rescue: Callable[[], Path] | None = None,
    session: Session | None = None,
    log: list[dict[str, Any]] | None = None,
) -> Curves:
    """Train a module's trainable weights in place; the weights of the best validation are kept.

    `source(n)` gives the rows of step n. `keep` is where checkpoints go: a training that was killed goes on from
    there and ends with the same weights, if all processes hold the same step, and what its `session` had spent counts.
    What `source` appends to the `log` (of plain values) is kept with it, and stands in it again.
    Where it is to be `continued`, a second file, with `.stable` behind its name, holds the state before the decay;
    `since` is such a file of a shorter training, from which this one goes on.
    Raises MethodError when the loss is not finite or explodes (the module then holds the best validated weights, or,
    without validation, the last of those that are kept as often as one would validate; `rescue` writes them where they
    are not the first and says where), or when memory does not suffice.
    """
    team = team or Alone()
    if settings.penalty and team.sharded:
        raise MethodError("a penalty reads whole weights", expected="DDP", found="FSDP", do="leave out --use_fsdp")
    attention.window(module)  # looked into once, and while its weights are whole
    per_token, wrapped = operations(module), team.wrap(module)
    stable = keep and keep.with_name(f"{keep.name}.stable")
    if team.sharded:  # every process keeps its own shards
        keep, stable, since = (p and p.with_name(f"{p.name}.{team.rank}") for p in (keep, stable, since))
    masters, schedule = Masters(module), settings.schedule
    optimizer = torch.optim.AdamW(
        masters.copies, lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    state, best = _State(pack_tokens=pack_tokens(module.device)), masters.snapshot()
    due = {math.ceil(schedule.steps * (i + 1) / settings.validations) for i in range(settings.validations)}
    for left in abandoned(keep) if keep else ():
        left.unlink(missing_ok=True)
    begin = next((p for p in (keep, since) if p and _held(p, team)), None)
    if begin:
        best = _resume(begin, state, masters, optimizer, continuing=begin is since)
        if session and state.spent and begin is keep:
            session.spent = Spent(**state.spent)
    if log is not None:
        log[:], state.log = state.log, log
    if validate and not state.checks:
        state.checks.append((state.tokens, _agreed(validate, team)))
    failed: float | None = None
    with in_mode(module, train=True), _repeatable(module.device):
        before, begun, clock = state.seconds, time.monotonic(), _Clock()
        while state.step < schedule.steps and not _tired(state, settings):
            if stable and continued and state.step == schedule.decays:
                _keep(stable, state, masters, optimizer, best, team)
            value, used = _fitting_step(module, wrapped, source(state.step), loss, state, settings, team)
            state.step += 1
            if not math.isfinite(value) or _explodes(state.train, value):
                failed = value
                break
            if not validate and state.step in due:  # weights that have just given a loss that is one
                best, state.kept = masters.snapshot(), state.step
            rate = schedule.at(state.step - 1)
            _update(masters, optimizer, rate, settings.clip, team)
            state.tokens += used
            state.train.append((state.tokens, value))
            state.seconds = before + time.monotonic() - begun
            if beat:
                share = state.tokens * per_token / state.seconds / (settings.peak * team.size) if settings.peak else 0.0
                past = state.tokens_before, state.seconds_before
                beat(Beat(state.step, schedule.steps, value, rate, state.tokens, state.seconds, share, past))
            if validate and state.step in due:
                state.checks.append((state.tokens, _agreed(validate, team)))
                if state.checks[-1][1] <= min(c for _, c in state.checks):
                    best, state.best_at, state.kept = masters.snapshot(), len(state.checks) - 1, state.step
            late = keep is not None and clock.late()
            # Shards of one step belong together: no process's own clock decides.
            if keep and (team.most(late) if team.sharded else late):
                state.spent = asdict(session.spent) if session else {}
                with clock:
                    _keep(keep, state, masters, optimizer, best, team)
    if not validate and failed is None and team.most(not masters.finite()):  # no further loss would show it
        failed = math.nan
    if validate or failed is not None:
        masters.restore(best)
    team.whole(module)
    if failed is not None:
        saved = rescue() if rescue and state.kept else None
        raise _diverged(state.step, failed, schedule.learning_rate, saved)
    return Curves(
        tuple(state.train), tuple(state.checks), state.best_at, state.step, state.tokens - state.tokens_before,
        state.seconds - state.seconds_before,
    )  # fmt: skip


def _update(masters: Masters, optimizer: torch.optim.Optimizer, rate: float, clip: float, team: Alone) -> None:
    """One step of the optimizer on the gradients that the live weights hold, which it takes away."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    masters.take_gradients()
    team.exchange(masters.copies)
    torch.nn.utils.clip_grad_norm_(masters.copies, clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    masters.give_weights()


class _Clock:
    """When to write a checkpoint: each minute, or so seldom that writing (what it encloses) takes its share of time."""

    def __init__(self) -> None:
        self.since, self.interval = time.monotonic(), KEEP_EVERY

    def late(self) -> bool:
        return time.monotonic() - self.since > self.interval

    def __enter__(self) -> None:
        self.since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        took = time.monotonic() - self.since
        self.since, self.interval = time.monotonic(), max(KEEP_EVERY, took / WRITING_SHARE)


@contextmanager
def _repeatable(device: torch.device) -> Iterator[None]:
    """Within it, a GPU adds in one order only: a training that goes on ends as the uninterrupted one."""
    if device.type != "cuda":
        yield
        return
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")  # of what has no such order
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        memory.fill_uninitialized_memory = fills


def _agreed(validate: Callable[[], float], team: Alone) -> float:
    """The first process's validation loss, in all of them: rounded otherwise elsewhere, it would end one alone."""
    value = validate()
    return team.sum(value if team.first else 0.0)


def _tired(state: _State, settings: Settings) -> bool:
    """Whether `patience` validations have passed without a new best."""
    return len(state.checks) - 1 - state.best_at >= settings.patience


def _explodes(curve: Sequence[tuple[int, float]], value: float) -> bool:
    """Whether this loss and the two before it lie above the first five, and far above the best five in a row."""
    losses = [v for _, v in curve]
    first = max(map(abs, losses[:5]), default=math.inf)
    if len(losses) < 7 or (lowest := min(value, *losses[-2:])) <= first:
        return False
    # A loss that may be negative has no floor: its best says nothing, and what came first stands for it.
    best = first if min(losses) < 0 else min(fmean(losses[n : n + 5]) for n in range(len(losses) - 4))
    return lowest > 3 * best + 3


def _diverged(step: int, value: float, learning_rate: float, saved: Path | None) -> DivergedError:
    finite, kept = math.isfinite(value), f"; the best weights so far are in {saved}" if saved else ""
    made = DivergedError(
        f"the loss {'explodes' if finite else 'is not finite'} at step {step}",
        expected="a loss that falls" if finite else "a finite loss",
        found=f"{value:.4g}",
        do=f"set learning_rate={learning_rate / 4:.2g}{kept}",
    )
    made.slower = float(f"{learning_rate / 4:.2g}")
    return made


def operations(module: torch.nn.Module) -> float:
    """Operations per trained token: 4 per weight outside the embedding, 2 more for each that is itself trained.

    A weight that several layers share is multiplied by each of them.
    """
    layers = [m for m in module.modules() if not isinstance(m, torch.nn.Embedding)]
    tied = {id(p) for m in module.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters(recurse=False)}
    weights = [p for m in layers for p in m.parameters(recurse=False) if p.ndim == 2 and id(p) not in tied]
    return sum(p.numel() * (6 if p.requires_grad else 4) for p in weights)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice."""
    words = ("not enough memory", "can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
    named = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return named or (isinstance(error, RuntimeError) and any(w in str(error) for w in words))


def _fitting_step(
    module: Any, wrapped: Any, rows: Sequence[Row], loss: Loss, state: _State, settings: Settings, team: Alone
) -> tuple[float, int]:
    """One step of the whole team: its mean loss and the tokens computed.

    Where memory does not suffice in any process, all run the step again in smaller packs, which changes nothing else.
    """
    while True:
        short: BaseException | None = None
        try:
            value, used = _step(
                module, wrapped, rows, loss, state.pack_tokens, settings.recompute, team, settings.penalty, True
            )
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            short = error
            value, used = 0.0, 0
        # Shards wait for one another within a pass: there a process that fails ends the training.
        if not (short is not None if team.sharded else team.most(short is not None)):
            return team.sum(value), round(team.sum(used))
        state.pack_tokens //= 2
        if state.pack_tokens < LEAST_TOKENS or team.sharded:
            raise _unfitting(rows, shares(module, rows), 2 * state.pack_tokens, team.size) from short
        module.zero_grad(set_to_none=True)


def _unfitting(rows: Sequence[Row], shared: bool, most: int, processes: int) -> MethodError:
    """What to do where passes of `most` tokens do not fit: the batch whose passes have half as many rows, if any."""
    largest = max(row_tokens(row, shared) for row in rows)
    each = min(math.ceil(len(rows) / processes), most // largest) // 2
    batch = f"--set batch={each * processes} may fit; else " if each else "no batch fits, not even --set batch=1: "
    return MethodError(
        "too little memory to train", expected=f"room for one row's pass of {largest} tokens",
        found=f"none in packs of {most}",
        do=f"{batch}shorten the rows, lower the number of answers to each or set recompute=true",
    )  # fmt: skip


def _step(
    module: Any,
    wrapped: Any,
    rows: Sequence[Row],
    loss: Loss,
    most: int = 0,
    recompute: bool = False,
    team: Alone | None = None,
    penalty: Callable[[], Tensor] | None = None,
    ready: bool = False,
) -> tuple[float, int]:
    """Forward and backward over one step's rows: this process's part of the mean loss, and the tokens it computed.

    `ready`: the module is in the mode to train already, which takes a while to bring it into.
    """
    team, most = team or Alone(), most or pack_tokens(module.device)
    mine = team.share(rows)
    shared = shares(module, rows)
    # Shards wait for one another in every pass: a process without rows makes as many as the others.
    some = mine or (rows[:1] if team.sharded else [])
    made = batched(module, some, shared and bool(some), most)
    count, own = loss.count(rows), len(made) if mine else 0
    total, tokens = torch.zeros((), dtype=torch.float64, device=module.device), 0
    passes = team.most(len(made)) if team.sharded else own
    with using_tree(module, train=None if ready else True, shared=shared), _recomputing(module, recompute):
        for n in range(passes):
            pack, real = (made[n], 1.0) if n < own else (made[0], 0.0)
            team.accumulating(wrapped, last=n == passes - 1)
            part = loss(target_logits(wrapped, pack), pack) * real / count
            (part * team.size).backward()  # gradients are averaged over the team
            total += part.detach().double()
            tokens += pack.tokens if real else 0
        if penalty:  # the same in every process
            penalty().backward()
    return float(total), tokens  # read once: a GPU goes on without the host until then


def target_logits(module: Any, pack: Pack) -> Tensor:
    """Logits [P, vocabulary] of a pack's targets."""
    plan = {} if pack.plan is None else {"whet_plan": pack.plan}
    out = module(
        input_ids=pack.ids, position_ids=pack.positions, use_cache=False, logits_to_keep=pack.places, **plan
    ).logits.flatten(0, 1)
    kept: Tensor = out if pack.pick is None else out[pack.pick]
    return kept


@contextmanager
def _recomputing(module: Any, on: bool) -> Iterator[None]:
    """Within it, a module computes activations again in the backward pass rather than keeping them."""
    if not on:
        yield
        return
    # transformers 5.2x renamed what peft still forwards by its old name.
    new = hasattr(module, "activation_checkpointing_enable")
    name = "activation_checkpointing" if new else "gradient_checkpointing"
    getattr(module, f"{name}_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(module, f"{name}_disable")()


def abandoned(file: Path) -> list[Path]:
    """What processes that are gone have left of a checkpoint that they were writing, or of its parts."""
    found = [(p, p.name.rpartition("-")[2]) for p in file.parent.glob(f".{file.name}*-*") if p.is_file()]
    return [p for p, pid in found if pid.isdigit() and not psutil.pid_exists(int(pid))]


def _held(file: Path, team: Alone) -> bool:
    """Whether all processes can go on from what they have kept: it is of one step. Where it is not, a warning says so.

    They are killed one after the other, maybe between two renamings, and may lie on machines that share no disk.
    """
    from safetensors import safe_open

    step = -1
    if file.exists():
        with safe_open(file, "pt") as opened:
            step = json.loads((opened.metadata() or {})["state"])["step"]
    least, most = -team.most(-step), team.most(step)
    if least != most and team.first:
        warnings.warn(f"the processes hold other steps of {file.name} ({least} to {most}): not gone on from there",
                      stacklevel=3)  # fmt: skip
    return least == most >= 0


def _keep(
    file: Path, state: _State, masters: Masters, optimizer: torch.optim.Optimizer, best: Sequence[Tensor], team: Alone
) -> None:
    """Write everything that goes on from here into one file, aside and then renamed: shards when all are written."""
    from safetensors.torch import save_file

    if not (team.first or team.sharded):
        return
    tensors = {f"best.{i}": t for i, t in enumerate(best)}
    for i, weight in enumerate(masters.copies):
        tensors[f"weight.{i}"] = weight.detach()
        tensors |= {f"{name}.{i}": value for name, value in optimizer.state[weight].items()}
    tensors["random"] = torch.get_rng_state()
    body = vars(state)
    file.parent.mkdir(parents=True, exist_ok=True)
    work = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        whole: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in tensors.items():
            here = _local(tensor.detach()).cpu().contiguous()
            place = here.untyped_storage().data_ptr()
            whole[name] = here.clone() if place in seen else here  # safetensors refuses tensors that share memory
            seen.add(place)
        save_file(whole, work, {"state": json.dumps(body)})
        if team.sharded:
            team.wait()
        os.replace(work, file)
    finally:
        work.unlink(missing_ok=True)


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor; all of it where it is not sharded."""
    shard: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard


def _like(weight: Tensor, shard: Tensor) -> Tensor:
    """A shard that was kept, as a tensor of the weight's kind and on its device."""
    shard = shard.to(weight.device)
    if not hasattr(weight, "device_mesh"):
        return shard
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()  # type: ignore[attr-defined]
    )


def _resume(
    file: Path, state: _State, masters: Masters, optimizer: torch.optim.Optimizer, *, continuing: bool
) -> list[Tensor]:
    """Put a checkpoint back; returns the best weights so far. A continued training forgets the old validations."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118 - not a mapping
        body = json.loads((opened.metadata() or {})["state"])
    body["pack_tokens"] = min(body.get("pack_tokens", state.pack_tokens), state.pack_tokens)
    for name, value in body.items():
        curve = isinstance(value, list) and name != "log"
        setattr(state, name, [tuple(v) for v in value] if curve else value)
    torch.set_rng_state(tensors["random"])
    with torch.no_grad():
        for i, weight in enumerate(masters.copies):
            weight.copy_(_like(weight, tensors[f"weight.{i}"]))
            names = [k.rpartition(".")[0] for k in tensors if k.rpartition(".")[2] == str(i)]
            optimizer.state[weight] = {n: _like(weight, tensors[f"{n}.{i}"]) if n != "step" else tensors[f"{n}.{i}"]
                                       for n in names if n not in ("best", "weight")}  # fmt: skip
    masters.give_weights()
    if continuing:
        state.checks, state.best_at, state.kept = [], 0, 0
        state.tokens_before, state.seconds_before = state.tokens, state.seconds
        return masters.snapshot()
    return [_like(p, tensors[f"best.{i}"]) for i, p in enumerate(masters.live)]
