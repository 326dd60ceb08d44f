"""Fine-tuning: LoRA on all linear layers (Hu et al. 2021), trained on prompts exactly as the System renders them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from whet.engine import Spent
from whet.errors import MethodError
from whet.methods import Need, Run
from whet.model import Transform, aside, hash_files
from whet.system import System
from whet.task import Example, Learnable

if TYPE_CHECKING:
    from whet.engine.prefix import Row
    from whet.engine.torch import TorchSession
    from whet.train.loop import Beat, Curves


ROW_TOKENS = 32  # of a short row, to size the validation before the rows are looked at


def verdict(curves: Curves) -> str:
    """overfitting, underfitting or well fitted, drawn from the two curves.

    Overfitting: validation rose at least 5 % above its best while training still fell. Underfitting: over the last
    quarter of the tokens both curves still fell, validation by at least 5 %, and the last validation is the best.
    """
    checks, train = curves.validation, curves.train
    if len(checks) < 3 or len(train) < 4:
        return "too short to tell"
    best = min(loss for _, loss in checks)
    quarter = max(1, len(train) // 4)
    before = sum(loss for _, loss in train[-2 * quarter : -quarter]) / quarter
    after = sum(loss for _, loss in train[-quarter:]) / quarter
    if checks[-1][1] > 1.05 * best and after < before:
        return "overfitting"
    if checks[-1][1] == best and checks[-1][1] < 0.95 * checks[-2][1] and after < 0.95 * before:
        return "underfitting"
    return "well fitted"


@dataclass(frozen=True)
class FineTune:
    """LoRA fine-tuning with completion-only loss, early stopping on a validation cut from train, best weights kept.

    Defaults: rank 16 and alpha 2·rank (as in the LoRA literature), learning rate 1e-3 and 32 rows a step (measured in
    LOG.md). `epochs` is what is wanted; the budget may allow less.
    """

    name: ClassVar[str] = "finetune"
    family: ClassVar[str] = "fine-tuning"
    needs: ClassVar[tuple[Need, ...]] = ("examples", "weights")
    writes: ClassVar[tuple[str, ...]] = ("model", "decoding")
    invalidates: ClassVar[tuple[str, ...]] = ("calibration",)

    rank: int = 16
    learning_rate: float = 1e-3
    epochs: float = 3.0
    batch: int = 32

    def __post_init__(self) -> None:
        if self.rank < 1 or self.batch < 1 or self.learning_rate <= 0 or self.epochs <= 0:
            raise ValueError("rank, batch, learning_rate and epochs are positive")

    def space(self) -> Mapping[str, Sequence[Any]]:
        """The settings worth trying."""
        return {"learning_rate": (3e-4, 1e-3, 2e-3), "rank": (8, 16, 32)}

    def apply(self, system: System, data: Learnable, run: Run) -> System:
        """The System with one more adapter; a closed set is scored as whole answers from here on."""
        decoding = replace(system.decoding, prior=(), normalise="sum")
        key = self._key(system, data, run)
        made = run.store.artifact(key)
        if not (made / "done.json").exists():
            self._train(system, data, run, made)
        body = json.loads((made / "done.json").read_text(encoding="utf-8"))
        run.spent += Spent(**body["spent"])
        # Named, so that recipes that begin with the same training pay for it once.
        run.notes.update(body["notes"], artifact=key, trained=body["spent"])
        transform = Transform("adapter", body["fingerprint"], made / "adapter")
        return replace(system, model=system.model.add(transform), decoding=decoding)

    def _key(self, system: System, data: Learnable, run: Run) -> str:
        """What the adapter depends on: settings, System, data, seed and bounds."""
        from whet.task import rows_hash

        parts = [asdict(self), system.fingerprint, rows_hash(data.train), run.seed, run.fidelity, run.trained_tokens]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _held(self, run: Run) -> int:
        """Rows to validate on: fewer where the budget is short, so that looking does not cost more than learning."""
        rows = 128 if run.trained_tokens is None else run.trained_tokens // ROW_TOKENS // 20
        return max(32, min(128, rows))

    def _train(self, system: System, data: Learnable, run: Run, made: Path) -> None:
        """Train on the session's own module, so that no second copy of the weights is held, and keep the adapter."""
        from whet.engine.torch import TorchSession
        from whet.train.adapters import adapted, merged_products
        from whet.train.batches import steps, tokens_per_row
        from whet.train.loop import Schedule, Settings, train
        from whet.train.losses import next_token

        session = run.session(system.model)
        if not isinstance(session, TorchSession):
            raise MethodError("finetune needs the weights", expected="a local model", found=system.model.base)
        fit, held = data.validation(seed=run.seed, most=self._held(run))
        rows, cut = render_rows(system, fit, session)
        checks, _ = render_rows(system, held, session)
        if not rows:
            raise MethodError("nothing to train on", expected="train rows with completions", found="none")
        wanted = self.epochs * run.fidelity * len(rows)
        if run.trained_tokens is not None:
            wanted = min(wanted, run.trained_tokens / tokens_per_row(rows, self.batch, run.seed))
        settings = Settings(Schedule(self.learning_rate, max(1, round(wanted / self.batch))))
        source = steps(rows, self.batch, run.seed)
        with adapted(session.module, self.rank, 2 * self.rank, run.seed) as tuned, merged_products(tuned):
            live = TorchSession(tuned, session.tokenizer)
            validate = (lambda: _mean_loss(live, checks)) if checks else None
            curves = train(tuned, source, next_token, settings, validate, _told(run))
            notes = {
                "verdict": verdict(curves),
                "curves": {"train": curves.train, "validation": curves.validation, "best": curves.best},
                "steps": curves.steps,
                "epochs": round(curves.steps * self.batch / len(rows), 2),
                "rows": len(rows),
                "shortened": cut,
            }
            spent = Spent(training_seconds=curves.seconds, trained_tokens=curves.tokens) + live.spent
            _keep(tuned, made, {"notes": notes, "spent": asdict(spent), "settings": asdict(self)})


def _mean_loss(live: TorchSession, rows: Sequence[Row]) -> float:
    """Mean negative log-likelihood per target token, in nats."""
    values = [v for row in live.score_rows(rows) for continuation in row for v in continuation]
    return -sum(values) / len(values)


def _told(run: Run) -> Callable[[Beat], None] | None:
    """What tells each step of the loop as progress."""
    tell = run.tell
    if tell is None:
        return None
    return lambda at: tell(f"loss {at.loss:.3f}, {at.tokens / max(at.seconds, 1e-9):.0f} tokens/s", at.step, at.steps)


def _keep(tuned: Any, made: Path, body: dict[str, Any]) -> None:
    """Write adapter and record aside and rename them into place together."""
    with aside(made) as work:
        tuned.save_pretrained(work / "adapter", safe_serialization=True)
        (work / "adapter" / "README.md").unlink(missing_ok=True)  # peft's template; the System has its own card
        config = work / "adapter" / "adapter_config.json"
        settings = json.loads(config.read_text(encoding="utf-8"))
        # A path of this machine is no part of an adapter's identity; the System names the base by content.
        settings["base_model_name_or_path"] = None
        config.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        body["fingerprint"] = hash_files([p for p in (work / "adapter").iterdir() if p.is_file()])
        (work / "done.json").write_text(json.dumps(body), encoding="utf-8")


def render_rows(system: System, examples: Sequence[Example], session: TorchSession) -> tuple[list[Row], int]:
    """Training rows as the System renders its prompts, the completion and the end of turn behind them.

    Returns the rows and how many prompts had to be shortened to fit the context window.
    """
    from whet.engine.prefix import Row

    usable = [e for e in examples if e.completion and e.text is None]
    answers = [session.encode_answer(e.completion, end=True) for e in usable]
    # Demonstrations may come from the same rows: whoever sees its own answer only learns to copy.
    prompts, cut = system.fitting(usable, session, [len(a) for a in answers], blind=True)
    encoded = session.encode(prompts)
    return [Row(p, (a,)) for p, a in zip(encoded, answers, strict=True)], sum(cut)
