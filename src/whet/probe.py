"""Latency and memory of a System, measured in a process of its own: one prompt at a time, nothing else running."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from whet.errors import ArtifactError
from whet.task import Example

PROMPTS = 8  # enough for a steady median at batch 1
FEWEST, SECONDS = 3, 20.0  # of them, where answers are long: after so many seconds no further one is begun
ASKED = ("id", "prompt", "completion", "choices", "history", "text")  # of an example, what answering looks at


def probe(folder: Path, home: Path, examples: Sequence[Example], metric: str = "") -> tuple[float, int]:
    """Median latency in ms and peak memory in bytes of the System in `folder`, answering a few examples singly.

    By perplexity, where nothing is answered, scoring their texts; by a ranking metric, finding documents.
    """
    rows = [{key: getattr(e, key) for key in ASKED} for e in examples[:PROMPTS]]
    done = subprocess.run(
        # Safe path: modules are not looked for in the working folder, which may hold a stranger's task.
        [sys.executable, "-P", "-m", "whet.probe", str(folder), metric],
        input=json.dumps(rows), capture_output=True, text=True, env={**os.environ, "WHET_HOME": str(home)},
        check=False,
    )  # fmt: skip
    try:
        body = json.loads(done.stdout.splitlines()[-1])
        return float(body["latency_ms"]), int(body["memory_bytes"])
    except (IndexError, ValueError, KeyError) as error:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ArtifactError(f"cannot measure {folder}", expected="an answer", found=last[:400]) from error


def main() -> None:
    """Answer the examples on stdin (or score their texts), one at a time; print latency and peak memory as JSON."""
    from whet.scorecard import perplexed
    from whet.system import load

    system = load(sys.argv[1], trust=True)  # written by the process that called
    examples = [
        Example(**{**r, "choices": tuple(r["choices"]), "history": tuple((a, b) for a, b in r["history"])})
        for r in json.load(sys.stdin)
    ]
    times: list[float] = []
    for example in [examples[0], *examples]:  # the first warms up
        if len(times) > FEWEST and sum(times) > SECONDS:
            break
        begun = time.perf_counter()
        if "@" in sys.argv[2]:
            system.ranked([example], int(sys.argv[2].partition("@")[2]))
        elif sys.argv[2] == "perplexity":
            perplexed(system, [example], system.session)
        else:
            system.answers([example])
        times.append(time.perf_counter() - begun)
    print(json.dumps({"latency_ms": 1000 * statistics.median(times[1:]), "memory_bytes": peak_memory()}))


def peak_memory() -> int:
    """Peak bytes that this process held on its GPU; where it uses none, peak resident bytes."""
    torch = sys.modules.get("torch")  # loaded where there is a model in this process
    held = int(torch.cuda.max_memory_reserved()) if torch and torch.cuda.is_initialized() else 0
    return held or _resident()


def _resident() -> int:
    """Peak resident bytes of this process."""
    with contextlib.suppress(OSError, StopIteration):
        # getrusage counts the pages that were shared with the parent before exec, which may be many times as many.
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
