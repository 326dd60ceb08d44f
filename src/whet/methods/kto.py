"""Kahneman–Tversky optimisation (Ethayarajh et al. 2024): learning from single judged answers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from whet.feedback import Judged, thumbs
from whet.methods import Run
from whet.methods.dpo import Preference

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
            for row, one, (value,) in zip(made, rows, policy.logprobs(made), strict=True)
        ]

    def source(self, rows: Sequence[Row], policy: Policy, run: Run) -> Source:
        """The rows of each step, with the step's KL estimate under the module as it then is."""
        from whet.engine.prefix import Row
        from whet.train.batches import steps
        from whet.train.lesson import within

        # Half the rows away the prompt is another one; where it is not, the next that is.
        far, count, context = len(rows) // 2, len(rows), policy.live.context
        others = []
        for i, a in enumerate(rows):
            other = next((b for k in range(count) if (b := rows[(i + far + k) % count]).prompt != a.prompt),
                         rows[(i + far) % count])  # fmt: skip
            others.append(Row(a.prompt, (within(other.continuations[0], context - len(a.prompt)),)))
        plain = steps(list(zip(rows, others, policy.logprobs(others), strict=True)), self.batch, run.seed)

        def step(number: int) -> list[Row]:
            taken = plain(number)
            now = policy.logprobs([other for _, other, _ in taken])
            kl = max(0.0, statistics.fmean(a - b for (a,), (_, _, (b,)) in zip(now, taken, strict=True)))
            return [replace(row, facts=((*row.facts[0][:3], kl),)) for row, _, _ in taken]

        return step
