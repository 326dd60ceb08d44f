"""The main job: what `whet improve` reaches on real tasks within a budget, on their sealed test rows.

Runs `whet improve TASK --budget B --json` in a process of its own, with a WHET_HOME of its own (nothing is known from
earlier runs; converting the model is part of the time), and prints the confirmed score and its 95 % interval, the base
(the same model with the instruction alone), the paired difference, its interval and p value, wall time, the greatest
resident memory of the process and the chosen recipe. Peer: the best of the non-LLM baselines (majority class,
logistic regression on TF-IDF and on sentence embeddings, nearest neighbour) that whet fits on the same train rows and
scores on the same test rows. One run each: nothing is repeated or alternated. Needs an idle machine, since budgets are
minutes.

    .venv/bin/python benchmarks/improve.py [TASK=BUDGET ...] [--out DIR]     (sst2=10m trec=10m banking77=20m)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from startup import whet_command

DEFAULT = ("sst2=10m", "trec=10m", "banking77=20m")
LEAST = {"sst2": 0.91, "trec": 0.93, "banking77": 0.85}
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


def run(task: Path, budget: str, folder: Path, model: str, seed: int) -> dict[str, Any]:
    """One run of `whet improve`: its result, wall seconds and peak memory, or {"failed": why}."""
    folder.mkdir(parents=True)
    command = [*whet_command(), "improve", str(task), "--budget", budget, "--model", model, "--seed", str(seed),
               "--out", str(folder / "run"), "--json"]  # fmt: skip
    print(f"  {' '.join(command)}", file=sys.stderr, flush=True)
    home = {"WHET_HOME": str(folder / "home")}
    begun = time.perf_counter()
    with (folder / "stdout.json").open("wb") as out, (folder / "stderr.txt").open("wb") as told:
        child = subprocess.Popen(command, stdout=out, stderr=told, env={**os.environ, **home})
        # wait4 gives this child's own usage (and its children's), not the greatest of all tasks so far.
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begun
    if child.returncode:
        lines = (folder / "stderr.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return {"failed": lines[-1] if lines else f"exit status {child.returncode}"}
    body = json.loads((folder / "stdout.json").read_text(encoding="utf-8"))
    if body["confirm"] is None:
        return {"failed": "the task has no test rows to confirm on"}
    return {"result": body, "wall_seconds": seconds, "peak_rss_bytes": usage.ru_maxrss * RSS_UNIT}


def figures(name: str, budget: str, ran: dict[str, Any]) -> dict[str, Any]:
    """What is printed of one run. A result that was handed over is the chosen one where it was better, else the base.

    `checked` says that the result speaks of the task and rows that were asked for and hangs together.
    """
    result, confirm = ran["result"], ran["result"]["confirm"]
    handed = confirm["chosen"] if confirm["improved"] else confirm["base"]
    baselines = [b for b in result["baselines"] if b["confirm"] is not None]
    best = max(baselines, key=lambda b: b["confirm"], default=None)
    gap = confirm["chosen"]["score"] - confirm["base"]["score"] - confirm["difference"]
    return {
        "task": name, "budget": budget, "n": confirm["n"], "score": handed["score"], "low": handed["low"],
        "high": handed["high"], "base": confirm["base"]["score"], "improved": confirm["improved"],
        "difference": [confirm["difference"], confirm["low"], confirm["high"]], "p_value": confirm["p_value"],
        "recipe": result["chosen"]["name"], "settings": result["chosen"]["recipe"],
        "peer": best["name"] if best else None, "peer_score": best["confirm"] if best else None,
        "wall_seconds": ran["wall_seconds"], "peak_rss_bytes": ran["peak_rss_bytes"],
        "asked": LEAST.get(name), "versions": result["versions"], "protocol": result["protocol"],
        "checked": result["task"] == name and abs(gap) < 1e-9 and handed["low"] <= handed["score"] <= handed["high"],
    }  # fmt: skip


def line(row: dict[str, Any]) -> list[Any]:
    """One line of the table."""
    if "failed" in row:
        return [f"{row['task']} {row['budget']}", "failed", *[None] * 8]
    d, low, high = row["difference"]
    return [
        f"{row['task']} {row['budget']}", f"{row['score']:.1%} [{row['low']:.1%}, {row['high']:.1%}]",
        f"{row['base']:.1%}", f"{d:+.1%} [{low:+.1%}, {high:+.1%}]", f"{row['p_value']:.1g}",
        None if row["peer"] is None else f"{row['peer_score']:.1%} {row['peer']}", f"{row['wall_seconds']:.0f}",
        f"{row['peak_rss_bytes'] / 1e9:.2f}", row["recipe"],
        None if row["asked"] is None else common.verdict(row["score"], row["asked"]),
    ]  # fmt: skip


def arguments() -> Any:
    from whet.model import DEFAULT as MODEL

    options = common.parser(__doc__)
    options.add_argument("runs", nargs="*", metavar="TASK=BUDGET", help=f"default: {' '.join(DEFAULT)}")
    options.add_argument("--tasks", type=Path, default=common.TASKS, help="folder of tasks (default: ../shared/tasks)")
    options.add_argument("--out", type=Path, help="new folder to keep runs and reports in (default: a temporary one)")
    options.add_argument("--model", default=MODEL, help="alias, folder or Hub id (default: %(default)s)")
    options.add_argument("--seed", type=int, default=0)
    return options.parse_args()


def main() -> None:
    """Run the benchmark. Exits 1 where a run failed."""
    options = arguments()
    wanted = [run.partition("=")[::2] for run in options.runs or DEFAULT]
    for name, budget in wanted:
        common.load_task(options.tasks, name)
        if not budget:
            common.stop(f"{name}: no budget; write it as {name}=10m")
    out = options.out or Path(tempfile.mkdtemp(prefix="whet-improve-"))
    if out.exists() and any(out.iterdir()):
        common.stop(f"{out} is not empty: its runs would be continued, not measured; name a new folder with --out")
    where = common.machine()
    rows = []
    for name, budget in wanted:
        folder = out.absolute() / f"{name}-{budget}"
        ran = run(options.tasks.absolute() / name, budget, folder, options.model, options.seed)
        why = ran.get("failed")
        rows.append({"task": name, "budget": budget, "failed": why} if why else figures(name, budget, ran))
    protocol: dict[str, str] = next((r["protocol"] for r in rows if "protocol" in r), {})
    where |= {"dtype": protocol.get("dtype", "none")}

    print(f"improve: {options.model}, seed {options.seed}; sealed test rows, 95 % intervals; one run each")
    print(common.machine_line(where))
    print(f"runs and reports: {out}\n")
    head = ["task and budget", "confirmed score", "base", "difference", "p", "best non-LLM baseline", "wall s",
            "peak GB", "recipe", "asked"]  # fmt: skip
    print(common.table(head, [line(row) for row in rows]) + "\n")
    for row in rows:
        if "failed" in row:
            print(f"{row['task']} failed: {row['failed']}")
        elif not row["improved"]:
            print(f"{row['task']}: nothing was better than the base, which is handed over")
    agree = all(row.get("checked", False) for row in rows)
    print("check: every result speaks of its task and its figures hang together" if agree else "A RESULT IS WRONG")
    common.finish("improve", {"machine": where, "model": options.model, "seed": options.seed, "rows": rows})
    raise SystemExit(0 if agree else 1)


if __name__ == "__main__":
    main()
