"""What compression is measured by as it goes: a few train rows, their loss, and what passes through the layers."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from whet.compress.folder import plain
from whet.compress.structure import hooked, layers
from whet.engine import prefix
from whet.engine.prefix import Row, Tokens
from whet.engine.torch import TorchSession
from whet.errors import MethodError
from whet.methods import Run
from whet.system import System
from whet.task import Learnable
from whet.train.lesson import render_rows
from whet.train.policy import passes

ROWS, TOKENS = 32, 4096  # at most so many rows, of so many tokens together, what they share counted once
BATCH = 512  # tokens per pass: each of them has logits


@dataclass(frozen=True)
class Calibration:
    """Train rows as the System renders them: the beginning that all share, and behind it question and answer.

    `sizes` are the tokens of each row's answer; what losses cost is put down to the `payer`.
    """

    rows: tuple[Row, ...]
    sizes: tuple[int, ...]
    payer: TorchSession | None = field(default=None, compare=False, repr=False)

    @property
    def tokens(self) -> set[int]:
        """All tokens that stand in the rows."""
        return {i for row in self.rows for part in (row.prompt, *row.continuations) for i in part}

    def numbered(self, place: Mapping[int, int]) -> Calibration:
        """The same rows for another numbering of tokens."""

        def moved(tokens: Tokens) -> Tokens:
            return tuple(place[i] for i in tokens)

        return replace(self, rows=tuple(Row(moved(r.prompt), (moved(r.continuations[0]),)) for r in self.rows))

    def losses(self, module: Any, tokenizer: Any) -> dict[str, float]:
        """Mean negative log-likelihood per token, in nats, of `answers` and of `questions`; 0 where there are none."""
        session = TorchSession(module, tokenizer, batch_tokens=BATCH)
        scored = session.score_rows(self.rows)
        if self.payer is not None:
            self.payer.spent += session.spent
        parts: dict[str, list[float]] = {"answers": [], "questions": []}
        for [values], size in zip(scored, self.sizes, strict=True):
            parts["answers"].extend(values[len(values) - size :])
            parts["questions"].extend(values[: len(values) - size])
        return {name: -sum(values) / max(1, len(values)) for name, values in parts.items()}

    def loss(self, module: Any, tokenizer: Any) -> float:
        """Both together: a model that is not tuned yet may give its answers in other words, whose loss says little."""
        return sum(self.losses(module, tokenizer).values())


def opened(system: System, run: Run, name: str) -> TorchSession:
    """The session of a model whose weights can be cut and tied. Raises MethodError for one whose cannot."""
    session = run.local(system.model, name)
    if not plain(session.module):
        raise MethodError(
            f"{name} needs weights as they are", expected="a model that is neither shared nor quantized",
            found="one that is", do=f"put {name} before that",
        )  # fmt: skip
    return session


def calibration(system: System, data: Learnable, run: Run, session: TorchSession) -> Calibration:
    """Up to 32 train rows; where a row has no completion, the System's own answer stands for it.

    Raises MethodError where there is no row that has or gets an answer.
    """
    some = random.Random(run.seed).sample(data.train, min(ROWS, len(data.train)))
    if lacking := [e for e in some if not e.answered and e.text is None]:
        told = system.answers(lacking, session, run.progress("answering rows to calibrate by"))
        own = {e.id: replace(e, completion=a.text) for e, a in zip(lacking, told, strict=True)}
        some = [own.get(e.id, e) for e in some]
    rows, _ = render_rows(system, some, session)
    while len(rows) > 1 and prefix.arrange(rows).unique_tokens > TOKENS:
        rows = rows[: len(rows) // 2]
    if not rows:
        raise MethodError("nothing to calibrate by", expected="train rows with an answer", found="none")
    prompts = [r.prompt for r in rows]
    same = max(1, min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1))
    whole = tuple(Row(r.prompt[:same], ((*r.prompt[same:], *r.continuations[0]),)) for r in rows)
    return Calibration(whole, tuple(len(r.continuations[0]) for r in rows), session)


def watch(
    session: TorchSession, rows: Sequence[Row], modules: Sequence[nn.Module], see: Callable[[int, Tensor, Tensor], None]
) -> None:
    """Run rows through a session's module; `see` gets (place in `modules`, what goes in, what comes out), [tokens, ..].
    """
    def hook(place: int) -> Callable[..., None]:
        def seen(_: nn.Module, given: tuple[Tensor, ...], out: Any) -> None:
            made = out[0] if isinstance(out, tuple) else out
            see(place, given[0].flatten(0, -2).float(), made.flatten(0, -2).float())

        return seen

    with hooked([m.register_forward_hook(hook(n)) for n, m in enumerate(modules)]):
        for _ in passes(session, rows):
            pass


def influence(session: TorchSession, rows: Sequence[Row]) -> list[float]:
    """How much each layer changes what passes through it: 1 - cosine, mean over tokens (Men et al. 2024, ShortGPT)."""
    found = layers(session.module)
    total, tokens = [0.0] * len(found), [0] * len(found)

    def see(place: int, given: Tensor, made: Tensor) -> None:
        total[place] += float((1 - torch.cosine_similarity(given, made, -1)).sum())
        tokens[place] += len(given)

    watch(session, rows, list(found), see)
    return [t / n for t, n in zip(total, tokens, strict=True)]


def norms(session: TorchSession, rows: Sequence[Row], modules: Sequence[nn.Module]) -> list[Tensor]:
    """L2 norm [in] of what goes into each module, over all tokens of rows, in fp32."""
    total: list[Any] = [0.0] * len(modules)

    def see(place: int, given: Tensor, _: Tensor) -> None:
        total[place] = total[place] + given.square().sum(0)

    watch(session, rows, modules, see)
    return [torch.sqrt(t) for t in total]
