"""The budget: minutes into tokens once, by rates measured on this machine; decisions look at tokens only."""

from __future__ import annotations

import hashlib
import math
import platform
import random
import re
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from whet.engine import Sampling, Session, Spent
from whet.errors import WhetError
from whet.store import Store
from whet.system import System
from whet.task import Example

ENCODED = 0.04  # of the budget may go to fine-tuning an encoder, as a baseline
READ = 8_000  # characters of a task's texts by which the speed of reading them is told
WRITTEN = 16  # tokens of each answer by which the speed of writing is told
REPEATS = 3  # of what is timed: a machine's speed is not steady
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(text: str | float) -> float:
    """"90s", "10m" or "2h" as seconds, or seconds as a number. Raises WhetError for anything else."""
    if isinstance(text, (int, float)):
        if not 0 < text < math.inf:
            raise WhetError("cannot read the budget", expected="seconds above 0", found=repr(text))
        return float(text)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh])\s*", text)
    if not found or float(found[1]) <= 0:
        raise WhetError("cannot read the budget", expected="something like 90s, 10m or 1h", found=repr(text))
    return float(found[1]) * UNITS[found[2]]


@dataclass(frozen=True)
class Rates:
    """Tokens per second of one model on this machine."""

    prefill: float
    generate: float
    train: float

    def price(self, spent: Spent) -> float:
        """What work costs, in seconds at these rates."""
        return (
            spent.prefilled_tokens / self.prefill
            + spent.generated_tokens / self.generate
            + spent.trained_tokens / self.train
        )


def measure(
    system: System, session: Session, store: Store, say: Callable[[str], None] | None = None, texts: Sequence[str] = ()
) -> Rates:
    """Rates of a model on this machine: kept ones where there are, else measured by running it for a few seconds.

    Long texts are read more slowly than chats: with `texts`, reading is measured on some that are as long as the one
    in which the middle of all of them lies. `say` is told before anything is measured.
    """
    own = session.protocol.get("engine") == "torch"
    threads = sys.modules["torch"].get_num_threads() if own else 0
    machine = [platform.machine(), platform.processor(), platform.node(), threads, *sorted(session.protocol.items())]
    key = hashlib.sha256(repr([system.model.identity, machine, WRITTEN, "warm", "shared"]).encode()).hexdigest()
    kept = store.rates(key)
    if kept is None:
        if say:
            say("measuring this machine's speed")
        # Words of no meaning: nothing is shared, nothing is remembered.
        draw = random.Random(0)
        words = [["".join(draw.choices("abcdefghij", k=5)) for _ in range(24)] for _ in range(24)]
        chats = [(("user", " ".join(w)),) for w in words]
        remote = system.model.remote
        # Servers can only choose between two, and those that have to answer for it are to say no more than that.
        asked = [(("user", f"{c[0][1]}\nAnswer yes or no, nothing else."),) for c in chats] if remote else chats
        choices = [["yes", "no"]] * len(chats)
        few = 8 if remote else len(chats)  # of a server's every answer has a price
        session.score(asked[:few], choices[:few])  # the first calls warm up
        session.generate(chats[:4], Sampling(max_tokens=4))
        before, begun = session.spent, time.monotonic()
        for _ in range(1 if remote else REPEATS):
            session.score(asked, choices)
        read, took = session.spent - before, time.monotonic() - begun
        prefill = max(1.0, read.prefilled_tokens / max(took, 1e-6))
        before, begun = session.spent, time.monotonic()
        session.generate(chats, Sampling(max_tokens=WRITTEN))  # as many at a time as in use, or it looks slow
        wrote, took = session.spent - before, time.monotonic() - begun
        took = max(took - (0.0 if remote else wrote.prefilled_tokens / prefill), 1e-3)
        generate = max(1.0, wrote.generated_tokens / took)
        # Where the weights are out of reach nothing is trained; the rate only has to be one.
        trained = prefill if remote else _trained(session)
        kept = {"prefill": prefill, "generate": generate, "train": trained}
        store.keep_rates(key, kept)
    if not texts or session.protocol.get("scoring_raw", "echo") != "echo":
        return Rates(**kept)
    key = hashlib.sha256(repr([key, READ, *texts]).encode()).hexdigest()
    reading = store.rates(key)
    if reading is None:
        ordered = sorted(texts, key=len)
        ends = [*accumulate(map(len, ordered))]
        at = bisect_left(ends, ends[-1] / 2)
        some = ordered[: at + 1][-max(1, READ // max(1, len(ordered[at]))) :]
        some = [text[: max(READ, 4 * session.context)] for text in some]  # longer ones are read in windows
        if say:
            say("measuring how fast texts are read")
        session.score([""], [[some[0][: READ // 8]]])  # the first call warms up
        before, begun = session.spent, time.monotonic()
        session.score([""] * len(some), [[text] for text in some])
        tokens, took = (session.spent - before).prefilled_tokens, time.monotonic() - begun
        reading = {"prefill": max(1.0, tokens / max(took, 1e-6))}
        store.keep_rates(key, reading)
    return Rates(**{**kept, **reading})


def _trained(session: Session) -> float:
    """Tokens per second of training."""
    from whet.engine.torch import TorchSession
    from whet.train.peak import training_rate

    assert isinstance(session, TorchSession)
    return max(1.0, training_rate(session, REPEATS))


def affordable(rows: int, cost: float, most: float, least: int) -> int:
    """How many of `rows`, which all cost `cost` seconds, `most` seconds pay for: `least` of them at the least."""
    return rows if cost <= most else min(rows, max(least, int(rows * most / cost)))


def estimate(
    system: System, examples: Sequence[Example], session: Session, every: bool = False, sample: int = 48,
    metric: str = "", written: float = 0.0,
) -> Spent:  # fmt: skip
    """What answering examples would cost, from a sample of them; beginnings that all share count once.

    With `every`, what scoring each choice would cost. By a `metric` of rankings nothing is asked of the model, and by
    perplexity nothing is written. `written` are the tokens of an answer; 0: half of what it may have. The judge of a
    win rate reads each of the answers with its prompt.
    """
    if not examples or "@" in metric:
        return Spent()
    # Drawn, and in no order: files are often sorted, by length or by where rows came from.
    few = random.Random(0).sample(list(examples), min(sample, len(examples)))
    share = len(examples) / len(few)
    closed = system.decoding.closed
    sets = [(e.choices or system.decoding.spoken) if closed and e.text is None else ("",) for e in few]
    if few[0].text is not None:
        return Spent(prefilled_tokens=round(share * sum(session.count([e.text or "" for e in few]))))
    prompts, _ = system.fitting(few, session, [system.room(e, session) for e in few])  # as they are sent
    whole = session.cost(prompts, sets, every)
    half = session.cost(prompts[: len(few) // 2], sets[: len(few) // 2], every) if len(few) > 1 else 0
    # Two points tell what is shared (once) from what every example adds.
    each = (whole - half) / max(1, len(few) - len(few) // 2)
    tokens = whole + each * (len(examples) - len(few))
    decoding = system.decoding
    # A prompt that stands several times is answered once, unless answers are drawn.
    count = len(examples) if decoding.temperature else len({(e.prompt, e.history) for e in examples})
    written = min(written or 0.5 * decoding.max_tokens, decoding.max_tokens)
    made = 0 if closed or metric == "perplexity" else round(count * written)
    tokens += count * (each + written) if metric == "win_rate" else 0
    return Spent(prefilled_tokens=round(tokens), generated_tokens=made)
