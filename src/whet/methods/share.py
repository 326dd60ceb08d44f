"""Parameter sharing: adjacent layers with the same weights, and weights that share a few values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from whet.methods import Need, Run
from whet.system import System
from whet.task import Learnable

START = ("svd", "mean")


@dataclass(frozen=True)
class Share:
    """A model whose layers share weights, stored once; `distill` or `finetune` behind it heals what that costs.

    `groups`: how many distinct layers remain, below 1 as a share, 0: all; adjacent ones are tied to their mean. Beside
    each stands a term of `rank` of its own that starts (`start`) at what is nearest to its own weights (svd; Bae et al.
    2024, Relaxed Recursive Transformers) or at nothing (mean). `values`: how many numbers each row of the weights
    keeps (k-means; Han et al. 2016, Deep Compression), 0: no such limit.
    """

    name: ClassVar[str] = "share"
    family: ClassVar[str] = "compression"
    needs: ClassVar[tuple[Need, ...]] = ("rows", "weights")
    writes: ClassVar[tuple[str, ...]] = ("model",)
    invalidates: ClassVar[tuple[str, ...]] = ("calibration", "healing", "packing")

    groups: float = 0.5
    rank: int = 16
    start: str = "svd"
    values: int = 0

    def __post_init__(self) -> None:
        if self.groups < 0 or (self.groups >= 1 and self.groups % 1):
            raise ValueError(f"groups is {self.groups:g}; a number of layers, a share below 1, or 0 for all")
        if self.start not in START:
            raise ValueError(f"start is {self.start!r}; one of {', '.join(START)}")
        if self.rank < 0 or self.values not in (0, *range(2, 257)):
            raise ValueError("rank is not negative, and values lies between 2 and 256, or is 0")
        if not (self.groups or self.values):
            raise ValueError("nothing to share; set groups or values")

    def space(self) -> Mapping[str, Sequence[Any]]:
        """The settings worth trying."""
        return {"groups": (0.75, 0.5, 0.35), "rank": (8, 16, 64), "values": (0, 16)}

    def apply(self, system: System, data: Learnable, run: Run) -> System:
        """The System with shared weights; calibrated scores no longer hold."""
        from whet.compress.folder import finished, settle, settled
        from whet.task import rows_hash
        from whet.train.lesson import key

        system = system.uncalibrated
        name = key("share", asdict(self), system.state, rows_hash(data.train), run.seed)
        if finished(run, name):
            return settled(system, run, name)
        module, tokenizer, notes = self._shared(system, data, run)
        return settle(system, run, module, tokenizer, name, {"share": notes})

    def _shared(self, system: System, data: Learnable, run: Run) -> tuple[Any, Any, dict[str, Any]]:
        """(module, tokenizer, notes)."""
        from whet.compress.calibration import calibration, norms, opened
        from whet.compress.structure import counted, size
        from whet.compress.tying import projections, tie

        session = opened(system, run, self.name)
        module, tokenizer = session.module, session.tokenizer
        found = projections(module)
        groups = counted(self.groups, len(found), "groups")
        look = calibration(system, data, run, session)
        notes: dict[str, Any] = {"before": {**size(module), **look.losses(module, tokenizer)}}
        names = {name: layer for layers in found for name, layer in layers.items()}
        sizes = dict(zip(names, norms(session, look.rows, list(names.values())), strict=True))
        module, runs = tie(module, groups, sizes, self.rank, self.start, self.values, run.seed,
                           run.progress("sharing weights"))  # fmt: skip
        notes["tied"] = [[r.start, r.stop - 1] for r in runs if len(r) > 1]
        notes["after"] = {**size(module), **look.losses(module, tokenizer)}
        return module, tokenizer, notes
