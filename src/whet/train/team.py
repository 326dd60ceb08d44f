"""Training alone or as one of several processes: the same loop either way."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from whet.engine.prefix import Row


class Alone:
    """One process; what a team of processes does differently is overridden in Team."""

    size = 1
    rank = 0
    first = True
    sharded = False  # whether each process holds a part of the weights only

    def wrap(self, module: Any) -> Any:
        """The module to call."""
        return module

    def whole(self, module: Any) -> None:
        """Give the module whole weights back, where it was sharded; all processes together."""

    def share(self, rows: Sequence[Row]) -> Sequence[Row]:
        """This process's part of a step's rows; it may be empty."""
        return rows

    def most(self, count: int) -> int:
        """The greatest of all processes' counts."""
        return count

    def sum(self, value: float) -> float:
        """The sum of all processes' values."""
        return value

    def wait(self) -> None:
        """Until all processes are here."""

    def exchange(self, weights: Sequence[Any]) -> None:
        """Give every process the mean of all processes' gradients."""

    def accumulating(self, wrapped: Any, last: bool) -> None:
        """Before each pass: shards exchange their gradients in the last one only."""


class Team(Alone):
    """Several processes through accelerate, which reads from the environment how it was launched: DDP, or FSDP."""

    def __init__(self) -> None:
        from accelerate import Accelerator

        # whet places its modules itself; without a GPU the processes talk through gloo.
        self.accelerator = Accelerator(cpu=not _gpu())
        self.size, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.first = self.accelerator.is_main_process
        self.sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"

    def wrap(self, module: Any) -> Any:
        if not self.sharded:
            return module
        # torch's own FSDP 2 by decoder layer: accelerate's is for accelerators only.
        from torch.distributed.fsdp import fully_shard

        kinds = {k for m in module.modules() for k in getattr(m, "_no_split_modules", None) or ()}
        for layer in [m for m in module.modules() if type(m).__name__ in kinds]:
            fully_shard(layer)
        return fully_shard(module)

    def whole(self, module: Any) -> None:
        if not self.sharded:
            return
        import torch
        from torch.distributed.fsdp import FSDPModule

        for layer in module.modules():
            if isinstance(layer, FSDPModule):
                # The root keeps what it gathered for a pass without gradients: not what has been put back since.
                layer.reshard()
        made: dict[int, Any] = {}  # weights that layers share stay shared
        for layer in module.modules():
            for name, value in list(layer._parameters.items()):
                if hasattr(value, "full_tensor"):
                    if id(value) not in made:
                        made[id(value)] = torch.nn.Parameter(value.detach().full_tensor(), value.requires_grad)
                    layer._parameters[name] = made[id(value)]

    def share(self, rows: Sequence[Row]) -> Sequence[Row]:
        return rows[self.rank :: self.size]

    def most(self, count: int) -> int:
        return int(max(self._all(count)))

    def sum(self, value: float) -> float:
        return float(sum(self._all(value)))

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def _all(self, value: float) -> list[float]:
        import torch

        mine = torch.tensor([float(value)], dtype=torch.float64, device=self.accelerator.device)
        return [float(v) for v in self.accelerator.gather(mine)]

    def exchange(self, weights: Sequence[Any]) -> None:
        import torch

        if self.sharded:  # in its last backward pass
            return
        # Behind the passes, not within them: a process that runs out of memory in one leaves no other waiting.
        for weight in weights:
            own = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.grad = self.accelerator.reduce(own, reduction="mean")

    def accumulating(self, wrapped: Any, last: bool) -> None:
        if self.sharded:
            wrapped.set_requires_gradient_sync(last)


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def team() -> Alone:
    """The team this process belongs to: several where `accelerate launch` or torchrun started it, else alone."""
    return Team() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Alone()
