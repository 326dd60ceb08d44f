"""Kahneman–Tversky optimisation (Ethayarajh et al. 2024): learning from single judged answers."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from whet.feedback import Judged, thumbs
from whet.methods.dpo import Preference, ahead
from whet.methods.reward import render_pairs
from whet.system import System

if TYPE_CHECKING:
    from whet.engine.prefix import Row
    from whet.train.loop import Source
    from whet.train.losses import Loss
    from whet.train.policy import Policy


@dataclass(frozen=True)
class KTO(Preference):
    """Kahneman–Tversky optimisation on thumbs up and down; pairs count as one of each.

    The KL estimate is the mean log-ratio of answers to other prompts, as in the paper: each prompt of a step with the
    answer of another of its rows. Where thumbs up and down are not equally many, the rarer weigh more (the paper's
    lambda, so that both weigh the same in all).
    """

    name: ClassVar[str] = "kto"
    reads: ClassVar[tuple[int, int]] = (2, 1)  # its prompt is read with another's answer, too

    def usable(self, rows: Sequence[Judged]) -> tuple[Judged, ...]:
        """Thumbs, weighted so that both kinds weigh the same."""
        found = thumbs(rows)
        total = {up: sum(r.weight for r in found if (r.chosen is not None) is up) for up in (True, False)}
        most = max(total.values())
        return tuple(replace(r, weight=r.weight * most / total[r.chosen is not None]) for r in found)

    def loss(self) -> Loss:
        """KTO's."""
        from whet.train import losses

        return losses.KTO(self.beta)

    def facts(self, rows: Sequence[Judged], made: Sequence[Row], policy: Policy) -> list[Row]:
        """(log-probability under the reference, wanted, weight, the KL estimate: 0 until a step fills it in)."""
        return [
            replace(row, facts=((value, float(one.chosen is not None), one.weight, 0.0),))
            for row, one, (value,) in zip(made, rows, policy.reference(made), strict=True)
        ]

    def source(
        self, system: System, rows: Sequence[Judged], made: Mapping[int, Row], order: Callable[[int], list[int]],
        count: int, policy: Policy,
    ) -> Source:  # fmt: skip
        """The rows of each step, with the step's KL estimate under the module as it then is."""

        def known(some: Sequence[int]) -> list[tuple[Row, Row, float]]:
            """Rows with their facts, each with its prompt before another's answer, and the reference's word on that."""
            others, _ = render_pairs(system, [_other(rows, i) for i in some], policy.live)
            facts = self.facts([rows[i] for i in some], [made[i] for i in some], policy)
            return [(row, other, value) for row, other, (value,) in
                    zip(facts, others, policy.reference(others), strict=True)]  # fmt: skip

        plain = ahead(order, count, known)

        def step(number: int) -> list[Row]:
            taken = plain(number)
            now = policy.logprobs([other for _, other, _ in taken])
            kl = max(0.0, statistics.fmean(a - b for (a,), (_, _, b) in zip(now, taken, strict=True)))
            return [replace(row, facts=((*row.facts[0][:3], kl),)) for row, _, _ in taken]

        return step


def _other(rows: Sequence[Judged], i: int) -> Judged:
    """A row's prompt with the answer of another: of the one half the rows away, or the next that has another prompt."""
    one, far = rows[i], len(rows) // 2
    turn = (rows[(i + far + k) % len(rows)] for k in range(len(rows)))
    other = next((r for r in turn if (r.prompt, r.history) != (one.prompt, one.history)), rows[(i + far) % len(rows)])
    return replace(one, chosen=other.rejected if other.chosen is None else other.chosen, rejected=None)
