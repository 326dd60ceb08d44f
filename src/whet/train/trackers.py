"""Training curves in TensorBoard, Weights & Biases or MLflow, through accelerate's trackers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet.errors import MethodError

if TYPE_CHECKING:
    from whet.train.loop import Beat

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


@contextmanager
def trackers(names: Sequence[str], folder: Path) -> Iterator[Callable[[Beat], None]]:
    """A function that tells each step to the named trackers; what they write lies in `folder`.

    Raises MethodError as `check` does.
    """
    check(names)
    opened: list[Any] = []
    try:
        opened += [_open(name, folder) for name in names]
    except Exception as error:  # each raises its own kinds
        raise MethodError(f"{names[len(opened)]} cannot be told", found=f"{error}".splitlines()[0][:160] or repr(error),
                          do="leave it out of --report-to, or see its settings") from error  # fmt: skip

    def track(at: Beat) -> None:
        values = {"loss": at.loss, "learning_rate": at.learning_rate, "tokens": at.tokens,
                  "tokens_per_second": at.tokens / max(at.seconds, 1e-9), "share_of_peak": at.share}  # fmt: skip
        for tracker in list(opened):
            if not _safely(partial(tracker.log, values, step=at.step), tracker.name):
                opened.remove(tracker)

    try:
        yield track
    finally:
        for tracker in opened:
            _safely(tracker.finish, tracker.name)


def _safely(tell: Callable[[], Any], name: str) -> bool:
    """Whether a tracker could be told: a server that went down is no reason to lose a training."""
    try:
        tell()
    except Exception as error:  # each raises its own kinds
        warnings.warn(f"{name} is told no more: {error}", stacklevel=3)
        return False
    return True


def check(names: Sequence[str]) -> None:
    """Raise MethodError for an unknown tracker, or one whose package is missing."""
    for name in names:
        if name not in PACKAGES:
            raise MethodError(f"no tracker {name!r}", expected=", ".join(PACKAGES), found=name, do="name one of them")
        from accelerate import tracking

        if not getattr(tracking, f"is_{name}_available")():
            raise MethodError(f"{name} is not installed", expected=f"the package {PACKAGES[name]}", found="none",
                              do=f"pip install {PACKAGES[name]}")  # fmt: skip
        if name == "wandb" and os.environ.get("WANDB_MODE") not in ("offline", "disabled") and not _logged_in():
            raise MethodError("wandb knows no account", expected="a key, or WANDB_MODE=offline", found="none",
                              do="run `wandb login`, or set WANDB_MODE=offline")  # fmt: skip


def _logged_in() -> bool:
    import wandb

    return bool(wandb.login(prompt=False, verify=False))


def _open(name: str, folder: Path) -> Any:
    from accelerate import PartialState, tracking

    folder.mkdir(parents=True, exist_ok=True)
    PartialState()  # without it, accelerate's trackers cannot say what they do
    if name == "tensorboard":
        tracker: Any = tracking.TensorBoardTracker(run_name=folder.name[:16], logging_dir=str(folder.parent))
    elif name == "wandb":
        tracker = tracking.WandBTracker("whet", dir=str(folder))
    else:
        import mlflow

        if not os.environ.get("MLFLOW_TRACKING_URI"):  # else it writes into the working folder
            mlflow.set_tracking_uri(f"sqlite:///{folder.parent.absolute()}/mlflow.db")
        tracker = tracking.MLflowTracker("whet", logging_dir=str(folder.parent), run_name=folder.name[:16])
    if hasattr(tracker, "start"):
        tracker.start()
    return tracker
