"""Pruning: whole layers, neurons of the MLPs, and tokens that the task has no use for; nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from whet.methods import Need, Run
from whet.system import System
from whet.task import Learnable

BY = ("loss", "influence")
NARROW_BY, NARROW_TOKENS = 1024, 32_768  # train rows and their tokens, at most, by which neurons are chosen


@dataclass(frozen=True)
class Prune:
    """A smaller model made of parts of the given one; `distill` or `finetune` behind it heals what that costs.

    `layers`: how many are kept, below 1 as a share, 0: all. `by`: which are dropped, by influence (Men et al. 2024,
    ShortGPT), or by loss among those of least influence. `vocabulary`: only tokens that the task's text is made of are
    kept, and the `spare` most frequent others. `width`: the share of the MLPs' neurons that is kept.
    """

    name: ClassVar[str] = "prune"
    family: ClassVar[str] = "compression"
    needs: ClassVar[tuple[Need, ...]] = ("rows", "weights")
    writes: ClassVar[tuple[str, ...]] = ("model",)
    invalidates: ClassVar[tuple[str, ...]] = ("calibration", "healing", "packing", "sharing")

    layers: float = 0.0
    by: str = "loss"
    vocabulary: bool = True
    spare: int = 2000
    width: float = 1.0

    def __post_init__(self) -> None:
        if self.layers < 0 or (self.layers >= 1 and self.layers % 1):
            raise ValueError(f"layers is {self.layers:g}; a number of layers, a share below 1, or 0 for all")
        if self.by not in BY:
            raise ValueError(f"by is {self.by!r}; one of {', '.join(BY)}")
        if not 0 < self.width <= 1 or self.spare < 0:
            raise ValueError("width is a share up to 1, and spare not negative")
        if not (self.layers or self.vocabulary or self.width < 1):
            raise ValueError("nothing to prune; set layers, vocabulary or width")

    def space(self) -> Mapping[str, Sequence[Any]]:
        """The settings worth trying."""
        return {"layers": (0.9, 0.75, 0.5), "width": (0.75, 0.5), "spare": (500, 2000, 8000)}

    def apply(self, system: System, data: Learnable, run: Run) -> System:
        """The System with a smaller model; calibrated scores no longer hold."""
        from whet.compress import vocabulary
        from whet.compress.folder import finished, settle, settled
        from whet.task import rows_hash
        from whet.train.lesson import key

        system = system.uncalibrated
        said = vocabulary.said(system, data, run.seed) if self.vocabulary else []
        how = [NARROW_BY, NARROW_TOKENS, "drawn"] if self.width < 1 else []  # neurons were chosen otherwise before
        name = key("prune", asdict(self), system.state, rows_hash(data.train), said, run.seed, *how)
        if finished(run, name):
            return settled(system, run, name)
        module, tokenizer, notes = self._pruned(system, data, run, said)
        return settle(system, run, module, tokenizer, name, {"prune": notes})

    def _pruned(
        self, system: System, data: Learnable, run: Run, said: Sequence[str]
    ) -> tuple[Any, Any, dict[str, Any]]:
        """(module, tokenizer, notes)."""
        from whet.compress import depth, vocabulary, width
        from whet.compress.calibration import calibration, opened
        from whet.compress.moments import rows_of
        from whet.compress.structure import counted, layers, size
        from whet.engine.torch import TorchSession

        session = opened(system, run, self.name)
        module, tokenizer = session.module, session.tokenizer
        look = calibration(system, data, run, session)
        notes: dict[str, Any] = {"before": {**size(module), **look.losses(module, tokenizer)}}
        whole = len(layers(module))
        if (many := counted(self.layers, whole, "layers")) < whole:
            module, gone = depth.drop(session, look, many, self.by, run.progress("dropping layers"))
            notes["dropped"] = [asdict(d) for d in gone]
        if self.width < 1:
            seen = rows_of(system, data.train, session, NARROW_BY, run.seed, NARROW_TOKENS)
            told = run.progress("narrowing layers")
            looking = TorchSession(module, tokenizer)
            module = width.narrow(looking, seen, self.width, told)
            session.spent += looking.spent
            notes["width"] = module.config.get_text_config().intermediate_size
        if self.vocabulary:
            shown = vocabulary.texts(system, data, session, said)
            used = {*look.tokens, *(i for *_, ids in vocabulary.numbers(module) for i in ids)}
            tokenizer = vocabulary.trimmed(tokenizer, shown, self.spare, used)
            index = vocabulary.ids_in(tokenizer, session.tokenizer)
            module, look = vocabulary.cut(module, index), look.numbered({old: new for new, old in enumerate(index)})
            notes["vocabulary"] = len(index)
        notes["after"] = {**size(module), **look.losses(module, tokenizer)}
        return module, tokenizer, notes
