"""What the benchmarks share: the machine's line, tables, alternating runs, task folders and the operations ceiling.

Not a benchmark. Scripts in this folder are run as `.venv/bin/python benchmarks/NAME.py` and import it as `common`.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from whet.engine import Chat
    from whet.task import Task

ROOT = Path(__file__).resolve().parents[1]
TASKS = ROOT.parent / "shared" / "tasks"
PACKAGES = ("whet", "torch", "transformers", "lm_eval")
PEAK_SHAPES = ((2048, 2048, 2048), (4096, 1024, 4096), (2048, 576, 1536))  # square, flat, and the small model's own
DEVICE_SHAPES = ((8192, 8192, 8192), (16384, 4096, 16384))  # what fills a GPU


@dataclass(frozen=True)
class Timed:
    """Seconds of each repeat of one contestant, and what its last repeat returned."""

    seconds: tuple[float, ...]
    result: Any

    @property
    def median(self) -> float:
        """Median seconds of a repeat."""
        return statistics.median(self.seconds)


logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # of kernels that nobody asked for


# --- command line ---------------------------------------------------------------------------------------------------


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the script's docstring as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_model(options: argparse.ArgumentParser) -> None:
    """Options of the benchmarks that open a model."""
    from whet.model import DEFAULT

    options.add_argument("--tasks", type=Path, default=TASKS, help="folder of tasks (default: ../shared/tasks)")
    options.add_argument("--model", default=DEFAULT, help="alias, folder or Hub id (default: %(default)s)")


def add_timing(options: argparse.ArgumentParser) -> None:
    """Options of those that time it against others on the same loaded weights."""
    options.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    options.add_argument("--repeat", type=int, default=3, help="timed runs of each side, in turn")


def stop(message: str) -> None:
    """End the script with one line on stderr and exit status 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


# --- tasks and models -----------------------------------------------------------------------------------------------


def load_task(folder: Path, name: str) -> Task:
    """Load a task of the folder of tasks; ends the script with one line where it is absent."""
    from whet import task

    if not (folder / name).is_dir():
        stop(f"no task {name} in {folder}: name the folder of tasks with --tasks DIR")
    return task.load(folder / name)


def demonstrations(task: Task, count: int) -> tuple[tuple[str, str], ...]:
    """The first `count` train rows when the labels take turns: the same ones at every run."""
    by_label = [[e for e in task.train if e.completion == label] for label in task.labels]
    turns = [e for e in chain.from_iterable(zip_longest(*by_label)) if e is not None]
    return tuple((e.prompt, e.completion) for e in turns[:count])


def chats(task: Task, shown: Sequence[tuple[str, str]], count: int) -> list[Chat]:
    """Chats of the first `count` test rows behind the same demonstrations."""
    from whet.prompt import messages

    return [messages(task.instruction, shown, example.prompt) for example in task.test[:count]]


def open_model(name: str, dtype: str) -> tuple[Any, Any]:
    """(module, tokenizer), converted weights kept under WHET_HOME; "auto" is the dtype that whet computes in."""
    import torch

    from whet import model
    from whet.errors import ModelError
    from whet.store import home_folder

    try:
        return model.load(model.resolve(name), home_folder(), dtype=None if dtype == "auto" else getattr(torch, dtype))
    except ModelError as error:
        stop(str(error))
        raise


class Bench:
    """A task, the base System on it, some of its train rows, and a Run over one store."""

    def __init__(self, options: Any, name: str, home: Path) -> None:
        from whet.methods import Run
        from whet.metrics import get
        from whet.model import resolve
        from whet.search import base_system
        from whet.splits import shared_order
        from whet.store import Store

        self.options, self.task = options, load_task(options.tasks, name)
        self.run, ref = Run(Store(home), options.seed), resolve(options.model)
        rows = self.task.split(options.seed).learnable
        self.base = base_system(ref, self.task, rows, self.run.session(ref), home)
        if len(rows.train) < options.rows:
            print(f"{name} has {len(rows.train)} train rows; {options.rows} were asked for")
        some = random.Random(options.seed).sample(rows.train, min(options.rows, len(rows.train)))
        self.data = replace(rows, train=tuple(some))
        self.test = shared_order(self.task.test, self.task.closed, options.seed)[: options.test]  # files may be sorted
        self.metric = get(self.task.metric, self.task.folder, False)

    def tested(self, system: Any) -> Any:
        """The scorecard of a System on the test rows."""
        from whet.scorecard import evaluate

        return evaluate(system, self.test, self.metric, session=self.run.session(system.model), store=self.run.store)


# --- what was reached before ---------------------------------------------------------------------------------------


def kept(folder: Path | None, name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives, as JSON gives it back: from the file of an earlier run in `folder`, or now and kept there."""
    from whet.store import write_text

    file = folder / f"{name}.json" if folder else None
    if file and file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    text = json.dumps(made := make())
    if file and made:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    return json.loads(text)


def outcomes(packed: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    """Outcomes as they were before JSON made dicts of them."""
    from whet.metrics import Outcome

    return tuple(Outcome(**{**o, "others": tuple(o["others"])}) for o in packed)


# --- timing ---------------------------------------------------------------------------------------------------------


def alternate(runs: Mapping[str, Callable[[], Any]], repeat: int) -> dict[str, Timed]:
    """Run all contestants in turn, `repeat` times over, so that drift of the machine meets all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    for turn in range(max(1, repeat)):
        for name, run in runs.items():
            gc.collect()
            begun = time.perf_counter()
            results[name] = run()
            seconds[name].append(time.perf_counter() - begun)
            print(f"  {turn + 1}/{max(1, repeat)} {name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return {name: Timed(tuple(taken), results[name]) for name, taken in seconds.items()}


def matmul_peak(dtype: torch.dtype, device: torch.device, seconds: float = 1.0) -> float:
    """Operations per second of the fastest matrix product seen within `seconds`: the ceiling of any forward pass."""
    import torch

    best, on_gpu = 0.0, device.type == "cuda"
    shapes = DEVICE_SHAPES if on_gpu else PEAK_SHAPES
    for m, k, n in shapes:
        a, b = torch.randn(m, k, dtype=dtype, device=device), torch.randn(k, n, dtype=dtype, device=device)
        out = torch.empty(m, n, dtype=dtype, device=device)
        torch.mm(a, b, out=out)  # kernels are built on the first call
        if on_gpu:
            torch.cuda.synchronize(device)
        until = time.perf_counter() + seconds / len(shapes)
        while (begun := time.perf_counter()) < until:
            torch.mm(a, b, out=out)
            if on_gpu:
                torch.cuda.synchronize(device)
            best = max(best, 2 * m * k * n / (time.perf_counter() - begun))
    return best


# --- what is printed ------------------------------------------------------------------------------------------------


def _processor() -> str:
    """The GPU's name where there is one, else the processor's."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine(dtype: str = "none", threads: int | None = None) -> dict[str, Any]:
    """What the figures depend on: processor, cores, threads, load before the run, dtype and versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"processor": _processor(), "cores": cores, "threads": threads, "load": load, "dtype": dtype,
            "versions": _versions()}  # fmt: skip


def computing() -> str:
    """The dtype that whet computes in here."""
    from whet.model import compute_dtype

    return str(compute_dtype()).removeprefix("torch.")


def machine_line(body: Mapping[str, Any]) -> str:
    """The machine as one line, with a warning where others were using it."""
    threads = f", {body['threads']} threads" if body["threads"] else ""
    dtype = f", {body['dtype']}" if body["dtype"] != "none" else ""
    versions = ", ".join(f"{name} {number}" for name, number in body["versions"].items())
    line = f"{body['processor']}, {body['cores']} cores{threads}{dtype}; load {body['load']}; {versions}"
    busy = body["load"] is not None and body["load"] > 0.5
    return f"{line}\nnote: the machine was not idle when this began" if busy else line


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lines with aligned columns, the first to the left and the others to the right; None is shown as a dash."""
    cells = [[str(h) for h in head], *([("-" if c is None else str(c)) for c in row] for row in rows)]
    widths = [max(len(row[n]) for row in cells) for n in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) if n == 0 else c.rjust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def verdict(figure: float, least: float) -> str:
    """How a figure that should be large compares with what is asked."""
    return f">= {least:g} {'yes' if figure >= least else 'NO'}"


def finish(name: str, body: Mapping[str, Any]) -> None:
    """Print the result as one line of JSON, the last line of every benchmark."""
    print(json.dumps({"benchmark": name, **body}, ensure_ascii=False))
