"""A teacher whose next-token distributions are to be had: taken at a student's tokens, the likeliest of each kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from whet.engine.prefix import Row, Tokens
from whet.engine.torch import TorchSession
from whet.task import Example
from whet.train.losses import Kept
from whet.train.policy import Policy, passes

if TYPE_CHECKING:
    from whet.system import System

KEPT = 32  # tokens of each distribution: with their ids, 256 bytes a place
PASS_TOKENS = 4096  # tokens a pass: long contexts are what a teacher has, and what rows share is computed once in each


@dataclass(frozen=True)
class Teacher:
    """A System with its session, and `table`, where the loss `Imitate` finds what it thought of a student's tokens.

    What it costs is put down to the student's session. The teacher may know more tokens than the student, whose
    vocabulary was trimmed: its distributions are then those among the tokens that both know. `own` are the student's
    ids [V] of these, `ids` the teacher's.
    """

    system: System
    session: TorchSession
    student: TorchSession
    own: Tensor | None = None
    ids: Tensor | None = None
    table: dict[int, Kept] = field(default_factory=dict)

    @staticmethod
    def of(system: System, session: TorchSession, student: TorchSession) -> Teacher | None:
        """None where the student has a token that the teacher lacks: what one writes, the other cannot spell."""
        theirs, ours = (s.tokenizer.get_vocab() for s in (session, student))
        sizes = [s.module.config.get_text_config().vocab_size for s in (session, student)]
        if theirs == ours and sizes[0] == sizes[1]:
            return Teacher(system, session, student)
        if not ours.keys() <= theirs.keys():
            return None
        pairs, device = sorted((own, theirs[token]) for token, own in ours.items()), session.module.device
        own, ids = (torch.tensor(side, device=device) for side in zip(*pairs, strict=True))
        return Teacher(system, session, student, own, ids)

    def spelling(self) -> Tensor | None:
        """The teacher's id of each of the student's tokens [V]; None where they are the same."""
        if self.own is None or self.ids is None:
            return None
        found = torch.zeros(int(self.own.max()) + 1, dtype=torch.long, device=self.ids.device)
        return found.index_copy_(0, self.own, self.ids)

    def judge(
        self, examples: Sequence[Example], rows: Sequence[Row], at: int, temperature: float, *, reverse: bool = False
    ) -> list[Row]:
        """A student's rows, of one continuation each, with the teacher's distributions in the table from `at` on.

        The teacher reads each example in its own prompt; a row of plain text it reads as it stands.
        """
        known = None
        if self.own is not None and self.ids is not None:
            known = dict(zip(self.own.tolist(), self.ids.tolist(), strict=True))

        def spelt(tokens: Tokens) -> Tokens:
            return tokens if known is None else tuple(known[t] for t in tokens)

        before = self.session.spent
        room = [min(len(row.continuations[0]), self.session.context // 2) for row in rows]
        prompts = self.session.encode(self.system.fitting(examples, self.session, room, blind=True)[0])
        read = [
            Row(spelt(row.prompt) if e.text is not None else prompt, (spelt(row.continuations[0]),))
            for e, prompt, row in zip(examples, prompts, rows, strict=True)
        ]
        for logits, pack in passes(self.session, read, PASS_TOKENS):
            values = (logits if self.ids is None else logits[:, self.ids]).float() / temperature
            top = values.log_softmax(-1).topk(min(KEPT, values.shape[1]))
            ids = top.indices if self.own is None else self.own[top.indices]
            sizes = torch.bincount(pack.sequences).tolist()
            parts = zip(ids.int().cpu().split(sizes), top.values.cpu().split(sizes), strict=True)
            self.table.update((at + n, part) for n, part in zip(pack.owners.tolist(), parts, strict=True))
        self.student.spent += self.session.spent - before
        return [replace(row, facts=((float(at + n), float(reverse)),)) for n, row in enumerate(rows)]


@dataclass(frozen=True)
class OnPolicy:
    """The rows of each step: given ones and, from step `turn` on, the student's own answers, judged by the teacher.

    `at`: where the table is free. `same`: the teacher is the module that is trained, as it was at the beginning.
    """

    given: Callable[[int], Sequence[tuple[Example, Row]]]
    turn: int
    teacher: Teacher
    policy: Policy
    seed: int
    at: int
    temperature: float
    same: bool

    def __call__(self, number: int) -> list[Row]:
        """Plain text has no answer to sample, and stays as given."""
        pairs = self.given(number)
        asked = [e for e, _ in pairs if e.text is None] if number >= self.turn else []
        if not asked:
            return [row for _, row in pairs]
        sampled, _ = self.policy.sample(asked, 1, seed=self.seed + 1 + number)
        with self.policy.beginning() if self.same else nullcontext():
            judged = self.teacher.judge(asked, sampled, self.at, self.temperature, reverse=True)
        return [*judged, *(row for e, row in pairs if e.text is not None)]
