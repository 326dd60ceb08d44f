"""The head of a reward model: one number where the vocabulary stood, read off behind the end of the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from whet.engine.prefix import Row, Tokens
from whet.engine.torch import TorchSession
from whet.train.losses import rewards
from whet.train.policy import passes

FILE = "head.safetensors"


@contextmanager
def headed(module: Any, seed: int) -> Iterator[None]:
    """Within it, a module gives one number per place: its output embedding makes way for a linear head, then returns.

    The head starts near nothing, at a standard deviation of 1/(hidden + 1): that of Stiennon et al. 2020 is the root of
    it.
    """
    kept = module.get_output_embeddings()
    head = _head(kept)
    with torch.no_grad():
        random = torch.Generator().manual_seed(seed)
        head.weight.copy_(torch.randn(head.weight.shape, generator=random) / (head.in_features + 1))
    module.set_output_embeddings(head)
    try:
        yield
    finally:
        module.set_output_embeddings(kept)


def _head(kept: Any) -> torch.nn.Linear:
    return torch.nn.Linear(kept.weight.shape[1], 1, bias=False, device=kept.weight.device, dtype=kept.weight.dtype)


def save_head(module: Any, folder: Path) -> None:
    """Write a module's head into a folder, beside its adapter."""
    from safetensors.torch import save_file

    save_file({"weight": module.get_output_embeddings().weight.detach().contiguous()}, folder / FILE)


def load_head(module: Any, folder: Path) -> None:
    """Put the head of a folder in the place of a module's output embedding, for good."""
    from safetensors.torch import load_file

    head = _head(module.get_output_embeddings())
    head.load_state_dict(load_file(folder / FILE))
    module.set_output_embeddings(head.requires_grad_(False))


def for_head(session: TorchSession, answer: str) -> Tokens:
    """An answer as a reward model reads it: the head stands on its end of turn, which one more token has to follow."""
    tokens = session.encode_answer(answer, end=True)
    return (*tokens, tokens[-1])


def score_rows(session: TorchSession, rows: Sequence[Row]) -> list[tuple[float, ...]]:
    """The reward of every continuation of every row, by a session over a module with a head."""
    found: list[list[float]] = [[] for _ in rows]
    for values, pack in passes(session, rows):
        for owner, value in zip(pack.owners.tolist(), rewards(values, pack).tolist(), strict=True):
            found[owner].append(value)
    return [tuple(values) for values in found]
