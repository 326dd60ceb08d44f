"""Losses: each is a frozen dataclass that a loop can take; all are tested for equality against TRL's.

A loss maps the logits at a pack's places to a sum; the loop divides the sums of a step by `count` of its rows. The
continuations of a Row are what is compared: (chosen, rejected) for preferences, the samples of one prompt for
reinforcement. What a loss must know about a continuation beforehand stands in `Row.facts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

    def count(self, rows: Sequence[Row]) -> float:
        """What the sum over these rows is divided by."""


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


def logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability [P], in nats, of each target under its logits [P, vocabulary]; computed in fp32."""
    wide = logits.float()
    return -cross_entropy(wide if temperature == 1 else wide / temperature, targets, reduction="none")


def per_sequence(values: Tensor, pack: Pack) -> Tensor:
    """Sums [S] of per-target values [P] over each continuation of the pack."""
    return torch.zeros(len(pack.facts), dtype=values.dtype, device=values.device).index_add(0, pack.sequences, values)


def lengths(pack: Pack) -> Tensor:
    """Target tokens [S] of each continuation of the pack."""
    return torch.bincount(pack.sequences, minlength=len(pack.facts))


@dataclass(frozen=True)
class NextToken(PerTarget):
    """Negative log-likelihood: what TRL's SFTTrainer minimises with a completion-only mask.

    facts: (weight of the row,) where there are weights; a row's targets then count so many times.
    """

    def __call__(self, logits: Tensor, pack: Pack) -> Tensor:
        """Summed over targets, in nats, computed in fp32."""
        if not pack.facts.shape[1]:
            return cross_entropy(logits.float(), pack.targets, reduction="sum")
        each = cross_entropy(logits.float(), pack.targets, reduction="none")
        return (pack.facts[pack.sequences, 0] * each).sum()

    def count(self, rows: Sequence[Row]) -> float:
        """Target tokens of the rows, each as often as its row's weight says."""
        return sum(
            (row.facts[n][0] if row.facts else 1.0) * len(c) for row in rows for n, c in enumerate(row.continuations)
        )


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
    (Schulman 2020, k2). `per_token` divides each sample by its length, as GRPO does. Logits are divided by the
    `temperature` that the samples were drawn at, those of the reference, too.
    """

    beta: float = 0.05
    per_token: bool = False
    temperature: float = 1.0

    def __call__(self, logits: Tensor, pack: Pack) -> Tensor:
        """Summed over prompts, averaged over the samples of each."""
        found = per_sequence(logprobs(logits, pack.targets, self.temperature), pack)
        advantage, reference = pack.facts[:, 0], pack.facts[:, 1]
        scale = 1 / lengths(pack) if self.per_token else 1.0
        each = scale * (-advantage * found + self.beta * 0.5 * (found - reference) ** 2)
        samples = torch.bincount(pack.owners, minlength=int(pack.owners.max()) + 1)[pack.owners]
        return (each / samples).sum()


LEAST_REST = 1e-6  # of a distribution's mass outside the tokens that are kept: rounding alone leaves less

Kept = tuple[Tensor, Tensor]  # token ids [L, k], and their log-probabilities, at each of L places


@dataclass(frozen=True)
class Imitate(PerTarget):
    """KL divergence between the module's next-token distributions and a teacher's, of which the likeliest are kept.

    facts: (place in `table`, 1 for KL(module || teacher) and 0 for KL(teacher || module)); below 0 there is no
    distribution, and the loss is the negative log-likelihood. The mass outside the k tokens counts as one more. Logits
    are divided by `temperature` and the divergence multiplied by its square (Hinton et al. 2015); what is in the table
    was taken at the same temperature. Forward on a teacher's answers, reverse on the module's own samples: Gu et al.
    2024 (MiniLLM), Agarwal et al. 2024 (GKD).
    """

    table: Mapping[int, Kept]
    temperature: float = 1.0

    def __call__(self, logits: Tensor, pack: Pack) -> Tensor:
        """Summed over targets, in nats."""
        places = pack.facts[:, 0].long()
        soft = (places >= 0)[pack.sequences]
        total = cross_entropy(logits[~soft].float(), pack.targets[~soft], reduction="sum")
        kept = [self.table[n] for n in places.tolist() if n >= 0]
        if not kept:
            return total
        ids = torch.cat([i for i, _ in kept]).to(logits.device, torch.long)
        theirs = _with_rest(torch.cat([p for _, p in kept]).to(logits.device))
        here = logits if soft.all() else logits[soft]
        ours = _with_rest((here.float() / self.temperature).log_softmax(-1).gather(-1, ids))
        reverse = (pack.facts[:, 1] > 0)[pack.sequences][soft][:, None]
        one, other = torch.where(reverse, ours, theirs), torch.where(reverse, theirs, ours)
        return total + self.temperature**2 * (one.exp() * (one - other)).sum()


def _with_rest(logprobs: Tensor) -> Tensor:
    """Log-probabilities [P, k] with one more column for all other tokens together."""
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=LEAST_REST).log()
    return torch.cat([logprobs, rest], -1)


@dataclass(frozen=True)
class Choose(PerRow):
    """KL divergence from a teacher's distribution over a row's continuations to the module's over all texts.

    facts: (the teacher's probability,), adding up to 1 over the row. It is the sum of what the module's choice among
    the continuations lacks, at a `temperature` as in `Imitate`, and of -log of the mass that it gives to all of them
    together; with one continuation only the latter is left, its negative log-likelihood.
    """

    temperature: float = 1.0

    def __call__(self, logits: Tensor, pack: Pack) -> Tensor:
        """Summed over rows, in nats."""
        wanted, found = pack.facts[:, 0], per_sequence(logprobs(logits, pack.targets), pack)
        rows, owner = torch.unique(pack.owners, return_inverse=True)
        softened = found / self.temperature
        chosen = softened - _logsumexp(softened, owner, len(rows))[owner]
        apart = torch.xlogy(wanted, wanted) - wanted * chosen
        return self.temperature**2 * apart.sum() - _logsumexp(found, owner, len(rows)).sum()


def _logsumexp(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """log of the sum of exp of values [S] in each of `count` groups."""
    most = torch.full((count,), -torch.inf, device=values.device).scatter_reduce(0, groups, values.detach(), "amax")
    sums = torch.zeros(count, device=values.device).index_add(0, groups, (values - most[groups]).exp())
    return most + sums.log()
