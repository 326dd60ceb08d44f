"""Retrieval: BM25 alone, sentence embeddings alone, and both fused, on the same questions of shared tasks.

    .venv/bin/python benchmarks/retrieval.py [--task cranfield,xquad_en]
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import common

METRICS = ("ndcg@10", "recall@1", "recall@5")


def main() -> None:
    """Run the benchmark."""
    from whet.documents import load, passages
    from whet.embed import Embedder
    from whet.metrics import get, score_all
    from whet.model import resolve
    from whet.retrieval import MIXES, Source, build, identity
    from whet.system import System

    options = common.parser(__doc__)
    common.add_model(options)
    options.add_argument("--task", default="cranfield,xquad_en", help="tasks with documents (default: %(default)s)")
    options = options.parse_args()
    made, lines = {}, []
    with tempfile.TemporaryDirectory() as folder:
        home, model = Path(folder), resolve(options.model)
        for name in options.task.split(","):
            task = common.load_task(options.tasks, name)
            data = task.split().learnable
            assert data.documents is not None
            pieces = [p for d in load(data.documents)[0] for p in passages(d)]
            index, begun = home / identity(pieces), time.monotonic()
            build(pieces, index, Embedder(home))
            took, rows = time.monotonic() - begun, [e for e in task.test if e.evidence]
            for mix in MIXES:
                system = System(model, sources=(Source(identity(pieces), 3, mix, 0.0, index),), home=home)
                ranked = system.ranked(rows, 10)
                found = {m: get(m).aggregate(score_all(get(m), ranked, rows)) for m in METRICS}
                made[f"{name}, {mix}"] = found
                figures = [f"{100 * v:.1f}" for v in found.values()]
                lines.append([name, mix, len(rows), len(pieces), f"{took:.0f}", *figures])
    print(common.table(["task", "mix", "questions", "passages", "seconds to build", *METRICS], lines))
    common.finish("retrieval", {"tasks": made})


if __name__ == "__main__":
    main()
