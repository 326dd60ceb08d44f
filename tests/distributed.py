"""One process of a training by several: started by torch.distributed.run from test_train."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from models import make_model
from test_train import learnable

from whet.train.batches import steps
from whet.train.loop import Schedule, Settings, train
from whet.train.losses import NextToken
from whet.train.team import team

crew = team()
model = make_model("llama")
# 24 rows in steps of 23: every second step has one row, and one process none.
curves = train(model, steps(learnable(0), 23, 0), NextToken(), Settings(Schedule(1e-3, 6)), team=crew)
total = float(sum(p.detach().double().sum() for p in model.parameters()))
if crew.first:
    Path(sys.argv[1]).write_text(
        json.dumps({"processes": crew.size, "train": [v for _, v in curves.train], "sum": total})
    )
crew.wait()
