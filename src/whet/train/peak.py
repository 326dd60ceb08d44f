"""The machine's matmul peak, measured once per process: what the speed of training is told as a share of."""

from __future__ import annotations

import time
from functools import lru_cache

import torch


@lru_cache(maxsize=4)
def matmul_peak(dtype: torch.dtype, device: torch.device, seconds: float = 0.15) -> float:
    """Operations per second of the fastest of several products of 2048×576×1536 in this dtype on this device."""
    a, b = torch.ones(2048, 576, dtype=dtype, device=device), torch.ones(576, 1536, dtype=dtype, device=device)
    best, begun = float("inf"), time.monotonic()
    while time.monotonic() - begun < seconds or best == float("inf"):
        at = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - at)
    return 2.0 * 2048 * 576 * 1536 / best
