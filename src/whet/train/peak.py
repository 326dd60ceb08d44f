"""What the machine can do: its matmul peak, which speed is told as a share of, and how fast a model trains."""

from __future__ import annotations

import random
import time
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from whet.engine.prefix import Row

if TYPE_CHECKING:
    from whet.engine.torch import TorchSession

ROWS, SHARED, OWN = 16, 24, 40  # of the step that is timed, and tokens of its rows: as short chats have them


@lru_cache(maxsize=4)
def matmul_peak(dtype: torch.dtype, device: torch.device, seconds: float = 0.15) -> float:
    """Operations per second of the fastest of several products in this dtype on this device.

    On a processor they are of 2048×576×1536, as in a small model; on a GPU large enough to fill it.
    """
    m, k, n = (8192, 8192, 8192) if device.type == "cuda" else (2048, 576, 1536)
    a, b = torch.ones(m, k, dtype=dtype, device=device), torch.ones(k, n, dtype=dtype, device=device)
    best, begun = float("inf"), time.monotonic()
    while time.monotonic() - begun < seconds or best == float("inf"):
        at = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - at)
    return 2.0 * m * k * n / best


def training_rate(session: TorchSession, steps: int = 3) -> float:
    """Tokens per second of LoRA steps on rows that share a beginning, as those of a task do, the first not counted; 0
    where none can be run.
    """
    from whet.train.adapters import Adapter, adapted
    from whet.train.loop import _step
    from whet.train.losses import NextToken

    draw = random.Random(0)

    def drawn(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(len(session.tokenizer)) for _ in range(count))

    shared = drawn(SHARED)
    rows = [Row((*shared, *drawn(OWN)), (drawn(3),)) for _ in range(ROWS)]
    try:
        with adapted(session.module, Adapter(), 0) as tuned:
            _step(tuned, tuned, rows, NextToken())
            tokens, begun = 0, time.perf_counter()
            for _ in range(steps):
                tokens += _step(tuned, tuned, rows, NextToken())[1]
            return tokens / (time.perf_counter() - begun)
    except Exception:  # a family that cannot be trained fails in ways of its own; what trains nothing still runs
        return 0.0
