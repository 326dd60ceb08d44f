"""Losses: each is a frozen dataclass that a loop can take; all are tested for equality against TRL's.

A loss maps the logits at a pack's places to a sum; the loop divides the sums of a step by `count` of its rows. The
continuations of a Row are what is compared: (chosen, rejected) for preferences, the samples of one prompt for
reinforcement. What a loss must know about a continuation beforehand stands in `Row.facts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from whet.engine.prefix import Row

if TYPE_CHECKING:
    from whet.train.batches import Pack


class Loss(Protocol):
    """What a loop minimises: the sum of calls over a step's packs, divided by `count` of the step's rows."""

    def __call__(self, logits: Tensor, pack: Pack) -> Tensor:
        """A scalar, summed over the pack; `logits` [P, vocabulary] are those of `pack.targets` [P]."""
        ...

    def count(self, rows: Sequence[Row]) -> float:
        """What the sum over these rows is divided by."""
        ...


class PerTarget:
    """Losses averaged over target tokens."""

    def count(self, rows: Sequence[Row]) -> float:
        """Target tokens of the rows."""
        return sum(len(c) for row in rows for c in row.continuations)


class PerRow:
    """Losses averaged over rows."""

    def count(self, rows: Sequence[Row]) -> float:
        """The number of rows."""
        return len(rows)


def logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability [P], in nats, of each target under its logits [P, vocabulary]; computed in fp32."""
    return -cross_entropy(logits.float(), targets, reduction="none")


def per_sequence(values: Tensor, pack: Pack) -> Tensor:
    """Sums [S] of per-target values [P] over each continuation of the pack."""
    return torch.zeros(len(pack.facts), dtype=values.dtype, device=values.device).index_add(0, pack.sequences, values)


def lengths(pack: Pack) -> Tensor:
    """Target tokens [S] of each continuation of the pack."""
    return torch.bincount(pack.sequences, minlength=len(pack.facts))


@dataclass(frozen=True)
class NextToken(PerTarget):
    """Negative log-likelihood: what TRL's SFTTrainer minimises with a completion-only mask."""

    def __call__(self, logits: Tensor, pack: Pack) -> Tensor:
        """Summed over targets, in nats, computed in fp32."""
        return cross_entropy(logits.float(), pack.targets, reduction="sum")


@dataclass(frozen=True)
class DPO(PerRow):
    """Direct preference optimisation (Rafailov et al. 2023) over rows whose continuations are (chosen, rejected).

    facts: (log-probability under the reference, weight of the pair where there are weights). With `normalise`,
    log-ratios are per token (Lambert et al. 2024, Tülu 3). `sft` adds the chosen answer's mean negative log-likelihood,
    which keeps its probability from falling (Pang et al. 2024).
    """

    beta: float = 0.1
    normalise: bool = False
    sft: float = 0.0

    def __call__(self, logits: Tensor, pack: Pack) -> Tensor:
        """Summed over pairs."""
        found = per_sequence(logprobs(logits, pack.targets), pack)
        ratios = found - pack.facts[:, 0]
        if self.normalise:
            ratios = ratios / lengths(pack)
        each = -logsigmoid(self.beta * (ratios[0::2] - ratios[1::2]))
        if self.sft:
            each = each - self.sft * (found / lengths(pack))[0::2]
        return (_weights(pack, 1) * each).sum()


@dataclass(frozen=True)
class KTO(PerRow):
    """Kahneman–Tversky optimisation (Ethayarajh et al. 2024) over rows with one judged answer each.

    facts: (log-probability under the reference, 1 wanted or 0 unwanted, weight of the row, the step's KL estimate,
    not below 0). The estimate is held constant, as the paper does.
    """

    beta: float = 0.1

    def __call__(self, logits: Tensor, pack: Pack) -> Tensor:
        """Summed over judged answers."""
        ratios = per_sequence(logprobs(logits, pack.targets), pack) - pack.facts[:, 0]
        wanted, weight, kl = pack.facts[:, 1], pack.facts[:, 2], pack.facts[:, 3]
        sign = 2 * wanted - 1
        return (weight * (1 - torch.sigmoid(self.beta * sign * (ratios - kl)))).sum()


@dataclass(frozen=True)
class Reward(PerRow):
    """Bradley–Terry loss of a reward model over (chosen, rejected); the one logit of the last place is the reward.

    facts: (weight of the pair,) where there are weights.
    """

    def __call__(self, logits: Tensor, pack: Pack) -> Tensor:
        """Summed over pairs."""
        found = rewards(logits, pack)
        return -(_weights(pack, 0) * logsigmoid(found[0::2] - found[1::2])).sum()


def _weights(pack: Pack, column: int) -> Tensor | float:
    """Weights of a pack's pairs out of a column of facts; 1 where there is none."""
    return pack.facts[0::2, column] if pack.facts.shape[1] > column else 1.0


def rewards(logits: Tensor, pack: Pack) -> Tensor:
    """Reward [S] of each continuation: the single logit at its last place."""
    last = torch.zeros(len(pack.facts), dtype=torch.long, device=logits.device)
    here = torch.arange(len(pack.sequences), device=logits.device)
    return logits.float()[last.scatter_reduce(0, pack.sequences, here, "amax"), 0]


@dataclass(frozen=True)
class PolicyGradient(PerRow):
    """REINFORCE on samples of the module itself, with a KL leash (Ahmadian et al. 2024, RLOO; Shao et al. 2024, GRPO).

    facts: (advantage, log-probability of the sample under the reference). Samples are fresh, so that no ratio needs
    clipping. The leash is the squared half log-ratio per sample, whose gradient is that of the KL divergence
    (Schulman 2020, k2). `per_token` divides each sample by its length, as GRPO does.
    """

    beta: float = 0.05
    per_token: bool = False

    def __call__(self, logits: Tensor, pack: Pack) -> Tensor:
        """Summed over prompts, averaged over the samples of each."""
        found = per_sequence(logprobs(logits, pack.targets), pack)
        advantage, reference = pack.facts[:, 0], pack.facts[:, 1]
        scale = 1 / lengths(pack) if self.per_token else 1.0
        each = scale * (-advantage * found + self.beta * 0.5 * (found - reference) ** 2)
        samples = torch.bincount(pack.owners, minlength=int(pack.owners.max()) + 1)[pack.owners]
        return (each / samples).sum()
