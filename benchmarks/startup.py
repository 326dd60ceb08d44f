"""Start-up: how long a command takes before it does anything, and how long the default model takes to load.

Measures the wall time of whole processes, median of --repeat, taking turns:
  whet --help, python -c "import whet"
      beside `python -c pass`, below which no Python program can start.
  load the model
      from the second time on (converted weights are kept under WHET_HOME), in a fresh process, imports of torch and
      transformers included; then the same without them. Peer: transformers alone loading the same folder in the same
      dtype. Checked: as many parameters with the same sum.

    .venv/bin/python benchmarks/startup.py [--repeat 10] [--load-repeat 3]
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common

MOST = {"whet --help": 0.3, "import whet": 0.3, "load the model": 3.0}
BARE = ", imports apart"
SUM = "sum(p.double().sum().item() for p in m.parameters())"
BEGIN = """
import json, sys, time; begun = time.perf_counter()
import torch; from transformers import AutoModelForCausalLM, AutoTokenizer; ready = time.perf_counter()
"""
TOLD = f"""
took = time.perf_counter()
print(json.dumps([sum(p.numel() for p in m.parameters()), {SUM}, took - begun, took - ready]))
"""
WHET = f"""
{BEGIN}
from whet import model; from whet.store import home_folder
m, _ = model.load(model.resolve(sys.argv[1]), home_folder())
{TOLD}
"""
PLAIN = f"""
{BEGIN}
t = AutoTokenizer.from_pretrained(sys.argv[1])
m = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2])).eval()
{TOLD}
"""


def process(command: Sequence[str | Path]) -> str:
    """Run a command and give its output; ends the script with the command's last line where it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=common.ROOT, check=False)
    if done.returncode:
        told = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        common.stop(f"{' '.join(map(str, command))[:80]}: {told[-1]}")
    return done.stdout


def whet_command() -> list[str]:
    """The installed command, beside this Python or on the path."""
    beside = Path(sys.executable).with_name("whet")
    found = str(beside) if beside.exists() else shutil.which("whet")
    return [found] if found else [sys.executable, "-m", "whet"]


def commands(repeat: int) -> dict[str, common.Timed]:
    """The light processes, one unmeasured turn first so that files are cached."""
    runs = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import whet": [sys.executable, "-c", "import whet"],
        "whet --help": [*whet_command(), "--help"],
    }
    for command in runs.values():
        process(command)
    return common.alternate({name: partial(process, command) for name, command in runs.items()}, repeat)


def loading(name: str, repeat: int) -> tuple[dict[str, list[float]], dict[str, Any], str]:
    """(seconds of each load, what was loaded, dtype) for whet and for transformers, each in processes of its own."""
    from whet import model
    from whet.errors import ModelError
    from whet.store import home_folder

    os.environ["WHET_HOME"] = str(home_folder())  # processes start elsewhere: one home for all of them
    try:
        ref = model.resolve(name)
        folder = model.local_folder(ref, home_folder())  # converted here: what is timed is the second time
    except ModelError as error:
        common.stop(str(error))
        raise
    dtype = str(model.compute_dtype()).removeprefix("torch.")
    place = str(Path(name).absolute()) if Path(name).exists() else name
    runs: dict[str, list[str | Path]] = {
        "load the model": [sys.executable, "-c", WHET, place],
        "transformers alone": [sys.executable, "-c", PLAIN, folder.absolute(), dtype],
    }
    taken: dict[str, list[float]] = {side + part: [] for side in runs for part in ("", BARE)}
    loaded: dict[str, Any] = {}
    for turn in range(repeat + 1):
        for side, command in runs.items():
            *loaded[side], whole, bare = json.loads(process(command).splitlines()[-1])
            if turn:  # the first turn only warms the file cache
                taken[side].append(whole)
                taken[side + BARE].append(bare)
    return taken, loaded, dtype


def arguments() -> Any:
    from whet.model import DEFAULT

    options = common.parser(__doc__)
    options.add_argument("--model", default=DEFAULT, help="alias or folder (default: %(default)s)")
    options.add_argument("--repeat", type=int, default=10, help="runs of each command")
    options.add_argument("--load-repeat", type=int, default=3, help="loads of each side (0: none)")
    return options.parse_args()


def main() -> None:
    """Run the benchmark. Exits 1 where the two sides loaded different weights."""
    options = arguments()
    where = common.machine()
    timed = commands(options.repeat)
    taken, loaded, dtype = loading(options.model, options.load_repeat) if options.load_repeat else ({}, {}, "none")
    where |= {"dtype": dtype}
    everything = {name: list(t.seconds) for name, t in timed.items()} | taken
    medians = {name: common.Timed(tuple(seconds), None).median for name, seconds in everything.items()}
    peers = {"import whet": "python -c pass", "whet --help": "python -c pass", "load the model": "transformers alone",
             "load the model" + BARE: "transformers alone" + BARE}  # fmt: skip
    rows = []
    for name, median in medians.items():
        beside = medians[peers[name]] if name in peers else None
        asked = f"<= {MOST[name]:g} s {'yes' if median <= MOST[name] else 'NO'}" if name in MOST else None
        rows.append([name, len(everything[name]), f"{median:.3f}", peers.get(name),
                     f"{median / beside:.2f}" if beside else None, asked])  # fmt: skip
    print("start-up: whole processes (loading: within a fresh process, imports included); sides taking turns")
    print(common.machine_line(where) + "\n")
    print(common.table(["what", "runs", "median s", "beside", "times as long", "asked"], rows) + "\n")
    agree = len({json.dumps(found) for found in loaded.values()}) < 2
    if loaded:
        count = loaded["load the model"][0]
        print(f"check: both sides hold {count:,} parameters with the same sum" if agree else
              f"THE SIDES LOADED DIFFERENT WEIGHTS: {loaded}")  # fmt: skip
    common.finish("startup", {
        "machine": where, "model": options.model, "seconds": everything, "median": medians,
        "ratio": {name: medians[name] / medians[peer] for name, peer in peers.items() if name in medians},
        "asked": MOST, "loaded": loaded, "agree": agree,
    })  # fmt: skip
    raise SystemExit(0 if agree else 1)


if __name__ == "__main__":
    main()
