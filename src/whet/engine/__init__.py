"""What runs prompts: the protocol, the data that crosses it, and the choice of engine for a model.

An engine opens a ModelRef as a Session; a Session runs prompts. Callers never see tokens or tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from whet.model import ModelRef

Message = tuple[str, str]  # (role, content); roles are system, user and assistant
Chat = tuple[Message, ...]
Prompt = Chat | str  # a str is raw text, outside any chat template
Progress = Callable[[int, int], None]  # (done, of)


@dataclass(frozen=True)
class Sampling:
    """How answers are generated: temperature 0 is greedy; `n` answers per prompt; generation ends before a `stop`."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    n: int = 1
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Generation:
    """One generated answer; `finish` is "stop" (end of turn or stop string), "length", or "failed": there is none."""

    text: str
    tokens: int
    finish: Literal["stop", "length", "failed"]


@dataclass(frozen=True)
class Score:
    """Log-probability (natural logarithm) of a continuation of `tokens` tokens."""

    logprob: float
    tokens: int

    @property
    def mean(self) -> float:
        """Log-probability per token."""
        return self.logprob / max(1, self.tokens)


@dataclass(frozen=True)
class Spent:
    """What work has cost; tokens that were computed once for several rows count once."""

    seconds: float = 0.0
    training_seconds: float = 0.0
    trained_tokens: int = 0
    prefilled_tokens: int = 0
    generated_tokens: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Spent) -> Spent:
        return Spent(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


class Session(Protocol):
    """An opened model. Prompts are never mutated; results have the length and order of the prompts.

    `spent` grows with every call. A prompt longer than `context` raises EngineError: shortening is the caller's
    choice. `protocol` names engine, dtype and versions, for the Scorecard.
    """

    context: int
    spent: Spent
    protocol: dict[str, str]

    def count(self, prompts: Sequence[Prompt]) -> list[int]:
        """Tokens of each prompt, the opening of the answer's turn included."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, progress: Progress | None = None
    ) -> list[tuple[Generation, ...]]:
        """`sampling.n` answers for each prompt."""

    def score(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[Sequence[str]],
        *,
        end: bool = False,
        progress: Progress | None = None,
    ) -> list[tuple[Score, ...]]:
        """Log-probability of each continuation behind its prompt; with `end`, of the turn ending there too."""

    def choose(
        self,
        prompts: Sequence[Prompt],
        choices: Sequence[Sequence[str]],
        *,
        whole: bool = False,
        offsets: Sequence[float] = (),
        progress: Progress | None = None,
    ) -> list[tuple[float, ...]]:
        """Scores of each prompt's choices whose greatest is exact: mean log-probability per token minus `offsets`.

        With `whole` the score is the log-probability of the whole answer, its end included. A choice that cannot be
        the greatest may get an upper bound of its score in place of the score.
        """

    def cost(self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]], every: bool = False) -> int:
        """About how many tokens choosing would compute; with `every`, scoring each choice."""

    def scores_all(self, choices: Sequence[str], whole: bool = False) -> bool:
        """Whether choosing among these gives the score of each of them, not only that of the greatest."""

    def close(self) -> None:
        """Release what the session holds."""


def until_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Generated text up to its first stop string, and whether it has one."""
    found = [at for at in (text.find(s) for s in stops) if at >= 0]
    return text[: min(found, default=None)], bool(found)


class ByScores:
    """`choose` and `cost` by scoring every choice: for sessions that know no shorter way."""

    def choose(
        self: Session,
        prompts: Sequence[Prompt],
        choices: Sequence[Sequence[str]],
        *,
        whole: bool = False,
        offsets: Sequence[float] = (),
        progress: Progress | None = None,
    ) -> list[tuple[float, ...]]:
        """Scores of every choice, less the offsets."""
        scored = self.score(prompts, choices, end=whole, progress=progress)
        plain = [tuple(s.logprob if whole else s.mean for s in row) for row in scored]
        return [tuple(s - o for s, o in zip(row, offsets, strict=True)) for row in plain] if offsets else plain

    def cost(self: Session, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]], every: bool = False) -> int:
        """The prompts' tokens; what they share is not known here."""
        return sum(self.count(prompts))

    def scores_all(self: Session, choices: Sequence[str], whole: bool = False) -> bool:
        """Every choice is scored."""
        return True


def open_session(ref: ModelRef, home: Path) -> Session:
    """Open a model with the engine that its name asks for: `openai:`, `fake:`, else torch in this process.

    `home` is where converted weights are cached. Raises ModelError when the model cannot be used.
    """
    if ref.base.startswith("openai:"):
        from whet.engine.remote import RemoteEngine

        return RemoteEngine().open(ref, home)
    if ref.base.startswith("fake:"):
        from whet.engine.fake import open_fake

        return open_fake(ref)
    from whet.engine.torch import open_torch

    return open_torch(ref, home)
