"""A live module seen as a policy: what it samples, what its beginning thinks of that, and how far it has moved."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from whet.engine import Sampling, Spent
from whet.engine.prefix import Row
from whet.engine.torch import TorchSession, no_gradients, using_tree
from whet.errors import MethodError
from whet.task import Example
from whet.train.batches import PACK_TOKENS, Pack, batched, shares
from whet.train.loop import target_logits
from whet.train.losses import Loss, logprobs, per_sequence
from whet.train.team import team

if TYPE_CHECKING:
    from whet.system import System


def passes(
    session: TorchSession, rows: Sequence[Row], most: int | None = None
) -> Iterator[tuple[Tensor, Pack]]:
    """Logits [P, vocabulary] of rows' targets, without gradients, in packs of about `most` tokens.

    Without `most`, rows of a model whose attention cannot be shared run one by one, so that nothing is padded.
    """
    if not rows:
        return
    module = session.module
    shared = shares(module, rows)
    for pack in batched(module, rows, shared, most):
        with using_tree(module, shared=shared), no_gradients(module):
            logits = target_logits(module, pack)
        session.spent += Spent(prefilled_tokens=pack.tokens)
        yield logits, pack


def mean_of(session: TorchSession, rows: Sequence[Row], loss: Loss) -> float:
    """What a loss says of rows, without gradients: for validation."""
    return sum(float(loss(logits, pack)) for logits, pack in passes(session, rows, PACK_TOKENS)) / loss.count(rows)


def looked_at(
    session: TorchSession, rows: Sequence[Row], loss: Loss
) -> tuple[float, list[tuple[float, ...]], float]:
    """What a loss says of rows, without gradients; the log-probability (nats) of every continuation; and the mean
    entropy (nats a token) of what the model would write in their places.
    """
    total, entropy, found = 0.0, 0.0, [tuple[float, ...]()] * len(rows)
    for logits, pack in passes(session, rows, PACK_TOKENS):
        total += float(loss(logits, pack))
        wide = logits.float().log_softmax(-1)
        entropy -= float((wide.exp() * wide).sum())
        each = per_sequence(wide.gather(-1, pack.targets[:, None])[:, 0], pack).tolist()
        for owner, value in zip(pack.owners.tolist(), each, strict=True):
            found[owner] += (value,)
    count = sum(len(c) for row in rows for c in row.continuations)
    return total / loss.count(rows), found, entropy / count


class Policy:
    """Made before the first step, when a fresh adapter changes nothing: its weights then are the reference.

    It draws and tells probabilities at one `temperature`, which logits are divided by. Without `reference`, which takes
    as much memory as what is trained, only the policy as it is can be asked. Raises MethodError where
    processes are to hold shards: the reference is put in the place of whole weights.
    """

    def __init__(
        self, live: TorchSession, system: System, temperature: float = 1.0, *, reference: bool = True
    ) -> None:  # fmt: skip
        if team().sharded:
            raise MethodError("learning from judgements and rewards needs whole weights", expected="DDP", found="FSDP",
                              do="leave out --use_fsdp")  # fmt: skip
        self.live, self.system, self.temperature = live, system, temperature
        self.trained = [p for p in live.module.parameters() if p.requires_grad]
        self.start = [p.detach().clone() for p in self.trained if reference]

    def logprobs(self, rows: Sequence[Row]) -> list[tuple[float, ...]]:
        """Log-probability of every continuation, in nats, under the module as it is."""
        if self.temperature == 1:
            return [tuple(map(sum, row)) for row in self.live.score_rows(rows)]
        found: list[tuple[float, ...]] = [()] * len(rows)
        for logits, pack in passes(self.live, rows):
            each = per_sequence(logprobs(logits, pack.targets, self.temperature), pack).tolist()
            for owner, value in zip(pack.owners.tolist(), each, strict=True):
                found[owner] += (value,)
        return found

    def reference(self, rows: Sequence[Row]) -> list[tuple[float, ...]]:
        """The same under the module as it was at the beginning."""
        with self.beginning():
            return self.logprobs(rows)

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Within it, the module is as it was at the beginning; its weights are put back afterwards."""
        now = [p.detach().clone() for p in self.trained]
        try:
            self._put(self.start)
            yield
        finally:
            self._put(now)

    def _put(self, weights: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for live, value in zip(self.trained, weights, strict=True):
                live.copy_(value)

    def sample(self, examples: Sequence[Example], n: int, seed: int = 0) -> tuple[list[Row], list[list[str]]]:
        """`n` sampled answers to each example: as rows to score and train on, and as texts."""
        decoding, live = self.system.decoding, self.live
        prompts, _ = self.system.fitting(examples, live, [decoding.max_tokens] * len(examples), blind=True)
        encoded = live.encode(prompts)
        sampling = Sampling(decoding.max_tokens, self.temperature, stop=decoding.stop, seed=seed)
        made = live.generate_rows([Row(tokens) for tokens in encoded for _ in range(n)], sampling)
        parts = [made[i : i + n] for i in range(0, len(made), n)]
        rows = [Row(tokens, tuple(said for said, _ in part)) for tokens, part in zip(encoded, parts, strict=True)]
        return rows, [[decoding.read(g.text) for _, g in part] for part in parts]

    def drift(self, rows: Sequence[Row]) -> dict[str, float]:
        """How far the policy has moved, from its own samples: KL to its beginning, entropy, length, log-probability.

        KL (nats per answer) is the mean log-ratio, entropy (nats per token) the mean of -log p, both by Monte Carlo;
        `logprob` is the samples' mean log-probability (nats per answer).
        """
        now, before = self.logprobs(rows), self.reference(rows)
        sizes = [len(c) for row in rows for c in row.continuations]
        flat = [v for row in now for v in row]
        kl = statistics.fmean(a - b for x, y in zip(now, before, strict=True) for a, b in zip(x, y, strict=True))
        return {"kl": kl, "entropy": -sum(flat) / sum(sizes), "length": statistics.fmean(sizes),
                "logprob": statistics.fmean(flat)}  # fmt: skip
