"""One process of a training by several: started by torch.distributed.run from test_train.

Arguments: the file for what came out of it, and a folder for checkpoints where the training is to be stopped halfway
and begun again; or "short" where one process is to find too little memory for a pass once; or "tune", a model's folder
and a home, for what `FineTune` makes of it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from models import make_model
from test_train import tuned_by_both, uneven

from whet.train import loop
from whet.train.loop import Schedule, Settings
from whet.train.losses import NextToken
from whet.train.team import team

crew = team()
if sys.argv[2:3] == ["tune"]:
    tuned = {kind: {**notes, "weights": [crew.sum(notes["weight"] * (crew.rank == n)) for n in range(crew.size)]}
             for kind, (_, notes) in tuned_by_both(sys.argv[3], Path(sys.argv[4])).items()}  # fmt: skip
    if crew.first:
        Path(sys.argv[1]).write_text(json.dumps({"processes": crew.size, "sharded": crew.sharded, **tuned}))
    crew.wait()
    sys.exit()
source, settings = uneven, Settings(Schedule(1e-3, 6))


class Short(NextToken):
    """Finds too little memory in its second pass."""

    passes = 0

    def __call__(self, logits: Any, pack: Any) -> Any:
        Short.passes += 1
        if Short.passes == 2:
            raise MemoryError
        return super().__call__(logits, pack)


loss: Any = NextToken()
if sys.argv[2:] == ["short"]:
    keep, loss = None, Short() if crew.rank else loss
elif len(sys.argv) > 2:
    # By its own clock, the second process would never keep anything.
    loop.KEEP_EVERY, loop.WRITING_SHARE, keep = 1e9 * crew.rank, 1e9, Path(sys.argv[2]) / "checkpoint"

    def halt(beat: loop.Beat) -> None:
        if beat.step == 4:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        loop.train(make_model("llama"), source, NextToken(), settings, team=crew, keep=keep, beat=halt)
else:
    keep = None
model = make_model("llama")
seen: list[int] = []
curves = loop.train(model, source, loss, settings, team=crew, keep=keep, beat=lambda b: seen.append(b.step))
half = make_model("llama").bfloat16()  # has fp32 masters, in shards as well
halves = loop.train(half, source, NextToken(), settings, team=crew)
total = float(sum(p.detach().double().sum() for p in model.parameters()))
if crew.first:
    made = {"processes": crew.size, "sharded": crew.sharded, "first": seen[0], "sum": total,
            "train": [v for _, v in curves.train], "half": [v for _, v in halves.train]}  # fmt: skip
    Path(sys.argv[1]).write_text(json.dumps(made))
crew.wait()
