"""Human feedback: reward models, preference learning and reinforcement, against their rivals on the same judgements.

reward  accuracy on test pairs of a reward model (an adapter and a head on the model) and of its rival, logistic
        regression on the difference of MiniLM embeddings, fitted to the same pairs; the help desk and pandalm_human.
prefer  on the help desk: the SFT start learnt the chosen answers; `dpo`, more SFT for as many trained tokens, and the
        best of n samples by the reward model answer the same prompts of test. The judge is a reward model of an
        annotator that none of them learnt from; beside it stands a judge of words (TF-IDF, logistic regression) that
        learnt from the pairs of test. Prompts of tickets/test, of the same kinds, make 150.
rl      on a shared task: a short SFT start, then `rl` with the task's metric on rows the start has not seen.

What is trained is kept in --home and found there again: the same command goes on where it was stopped.

    .venv/bin/python benchmarks/feedback.py [--parts reward,prefer,rl] [--rows 0] [--epochs 2] [--home DIR]
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common

PARTS = ("reward", "prefer", "rl")
HELPDESK = common.ROOT / "examples" / "helpdesk"
PROMPTS = 150
LEAST_WON = 0.65


@dataclass(frozen=True)
class Bench:
    """What all parts share."""

    options: Any
    home: Path
    sessions: dict[Any, Any]

    def run(self, **more: Any) -> Any:
        """A Run over the common store and sessions."""
        from whet.methods import Run
        from whet.store import Store

        return Run(Store(self.home), self.options.seed, sessions=self.sessions, tell=_tell, **more)

    def base(self, task: Any, data: Any) -> Any:
        """The System that a task starts from."""
        from whet.model import resolve
        from whet.search import base_system

        ref = resolve(self.options.model)
        return base_system(ref, task, data, self.run().session(ref), self.home)


    def kept(self, make: Any, *key: Any) -> Any:
        """What `make` says, as JSON; read from the home where it was made before under the same key."""
        file = self.home / "answers" / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            aside = file.with_suffix(f".{os.getpid()}")
            aside.write_text(json.dumps(make()))
            os.replace(aside, file)
        return json.loads(file.read_text())


def _tell(what: str, done: int, of: int) -> None:
    if done == of or done % 20 == 0:
        print(f"  {done}/{of} {what}", file=sys.stderr, flush=True)


def few(rows: Sequence[Any], most: int) -> tuple[Any, ...]:
    """The first `most` rows; all where it is 0."""
    return tuple(rows[: most or None])


def figure(found: Sequence[float]) -> str:
    """A share with its interval."""
    return f"{found[0]:.1%} [{found[1]:.1%}, {found[2]:.1%}]"


def pairs_of(task: Any) -> tuple[Any, ...]:
    """The pairs of a task's test rows."""
    from whet.feedback import Judged

    return tuple(Judged(e.id, e.prompt, e.completion, e.rejected, group=e.group, history=e.history)
                 for e in task.test if e.rejected is not None)  # fmt: skip


# --- reward models --------------------------------------------------------------------------------------------------


def reward(bench: Bench, name: str, folder: Path) -> dict[str, Any]:
    """A reward model and its rival on the pairs of one task."""
    from whet import feedback, stats, task
    from whet.embed import Embedder
    from whet.methods.reward import Reward, fit
    from whet.metrics import Outcome, WinRate

    loaded, options = task.load(folder), bench.options
    test = few(pairs_of(loaded), options.test)
    known, _ = feedback.without_held(loaded.judged, loaded.test)
    rows = few(feedback.pairs(known), options.rows)
    settings = Reward(epochs=options.epochs)
    judges = {"reward model": fit(rows, bench.base(loaded, loaded.split().learnable), bench.run(), settings),
              "embeddings": feedback.EmbeddingJudge(rows, Embedder(bench.home))}  # fmt: skip
    found = {who: feedback.agreement(judge, test) for who, judge in judges.items()}
    right = []
    for judge in judges.values():
        scores = iter(judge([(r.example, side) for r in test for side in (r.chosen, r.rejected)]))
        right.append([Outcome(r.id, "", float(next(scores) > next(scores)), "", r.group or r.prompt) for r in test])
    paired = stats.compare(right[1], right[0], WinRate())
    return {"task": name, "pairs": len(rows), "test": len(test), "found": found, "paired": paired}


# --- preferences ----------------------------------------------------------------------------------------------------


class Words:
    """A judge of words: logistic regression on TF-IDF of single answers; it tells the help desk's pairs apart."""

    name = "TF-IDF regression of the test pairs"

    def __init__(self, rows: Sequence[Any]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        self.model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=10, max_iter=2000))
        self.model.fit([side for r in rows for side in (r.chosen, r.rejected)], [1, 0] * len(rows))

    def __call__(self, asked: Sequence[tuple[Any, str]]) -> list[float]:
        return [float(v) for v in self.model.decision_function([answer for _, answer in asked])]


def taught(bench: Bench, base: Any, data: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The SFT start, DPO from it, and more SFT for as many tokens; and what DPO noted."""
    from whet.methods.dpo import DPO
    from whet.methods.finetune import FineTune

    options, tuned = bench.options, bench.run()
    start = FineTune(epochs=options.sft).apply(base, data, bench.run())
    dpo = DPO(learning_rate=options.rate, beta=options.beta, epochs=options.epochs).apply(start, data, tuned)
    spent = _tokens(tuned)
    more = bench.run(trained_tokens=spent)
    longer = FineTune(epochs=10 * options.epochs, learning_rate=3e-4).apply(start, data, more)
    tokens = {"dpo": spent, "more SFT": _tokens(more)}
    noted = {key: tuned.notes.get(key) for key in ("held_out", "moved")}
    return {"start": start, "dpo": dpo, "more SFT": longer}, {"tokens": tokens, **noted}


def _tokens(run: Any) -> int:
    """Trained tokens of a Run's last training."""
    return int(run.notes["trainings"][run.notes["artifact"]]["trained_tokens"])


def answered(bench: Bench, made: dict[str, Any], test: Sequence[Any], scorer: Any) -> dict[str, tuple[Any, Any]]:
    """Answers of each System and of the best of n, and which sides of the pairs each System prefers."""
    from whet import feedback
    from whet.task import rows_hash

    found, prompts = dict[str, tuple[Any, Any]](), rows_hash(test)
    for name, system in made.items():
        print(f"  answering: {name}", file=sys.stderr, flush=True)
        session = bench.run().session(system.model)
        of = (system.fingerprint, prompts)
        said = bench.kept(lambda s=system, o=session: [a.text for a in s.answers(test, o)], *of)
        sides = bench.kept(lambda s=system, o=session: feedback.prefers(s, test, o), "sides", *of)
        found[name] = (said, sides)
    start, options = made["start"], bench.options
    session = bench.run().session(start.model)
    best = bench.kept(lambda: best_of(start, session, test, scorer, options), start.fingerprint, prompts, scorer.name,
                      options.samples, options.seed)  # fmt: skip
    return {**found, "best of n": (best, ())}


def prefer(bench: Bench) -> dict[str, Any]:
    """DPO, more SFT and the best of n against the SFT start."""
    from whet import feedback, task
    from whet.methods.reward import Reward, fit

    options, loaded, tickets = bench.options, task.load(HELPDESK / "replies"), task.load(HELPDESK / "tickets")
    known, _ = feedback.without_held(loaded.judged, (*loaded.test, *tickets.test))
    learn, judging = (few(rows, options.rows) for rows in feedback.divide(known))
    data = replace(loaded.split().learnable, judged=learn, train=tuple(r.example for r in learn))
    base, settings = bench.base(loaded, data), Reward(epochs=options.epochs)
    test = few((*loaded.test, *tickets.test), options.test or PROMPTS)
    made, noted = taught(bench, base, data)
    judge, scorer = fit(judging, base, bench.run(), settings), fit(learn, base, bench.run(), settings)
    words, session = Words(pairs_of(loaded)), bench.run().session(made["start"].model)
    answers, rows = answered(bench, made, test, scorer), []
    start = dict(zip(test, answers["start"][0], strict=True))
    for name, (said, sides) in answers.items():
        found = [feedback.wins(said, feedback.Versus(j, made["start"], session, start), test, sides)
                 for j in (judge, words)]  # fmt: skip
        rows.append({"name": name, "wins": found[0], "by_words": found[1].rate, "answer": said[0]})
    checked = {j.name: feedback.agreement(j, pairs_of(loaded)).accuracy for j in (judge, scorer)}
    return {"rows": rows, "judges": checked, "n": len(test), "prompts": len({r.prompt for r in learn}),
            "pairs": len(learn), "judged_by": len(judging), **noted}  # fmt: skip


def best_of(system: Any, session: Any, test: Sequence[Any], scorer: Any, options: Any) -> list[str]:
    """The best of n samples of each prompt by the reward model that the methods might have had."""
    from whet.engine import Sampling

    sampling = Sampling(system.decoding.max_tokens, 1.0, n=options.samples, seed=options.seed)
    drawn = [[g.text.strip() for g in made] for made in session.generate(system.prompts(test), sampling)]
    scores = iter(scorer([(e, text) for e, made in zip(test, drawn, strict=True) for text in made]))
    return [max(((next(scores), text) for text in made), key=lambda pair: pair[0])[1] for made in drawn]


# --- reinforcement --------------------------------------------------------------------------------------------------


def reinforce(bench: Bench) -> dict[str, Any]:
    """`rl` with the task's metric, against the SFT start that it began from."""
    from whet import stats
    from whet.methods.finetune import FineTune
    from whet.methods.rl import RL
    from whet.metrics import get
    from whet.scorecard import evaluate

    options = bench.options
    loaded = common.load_task(options.tasks, options.task)
    data = loaded.split().learnable
    taught = replace(data, train=data.train[: options.sft_rows])
    unseen = replace(data, train=data.train[options.sft_rows :][: options.rl_rows])
    start = FineTune(epochs=options.sft).apply(bench.base(loaded, data), taught, bench.run())
    run = bench.run()
    method = RL(options.algorithm, "metric", learning_rate=options.rl_rate, samples=options.samples, batch=16)
    made = method.apply(start, unseen, run)
    test, metric = few(loaded.test, options.test), get(loaded.metric)
    cards = [evaluate(s, test, metric, session=bench.run().session(s.model), store=run.store) for s in (start, made)]
    paired = stats.compare(cards[0].outcomes, cards[1].outcomes, metric)
    log = run.notes["steps_log"]
    return {"task": loaded.name, "n": len(test), "start": cards[0].score, "rl": cards[1].score, "paired": paired,
            "before": run.notes["before"], "after": run.notes["after"], "steps": run.notes["steps"],
            "log": [log[0], log[-1]]}  # fmt: skip


# --- what is printed ------------------------------------------------------------------------------------------------


def show_reward(rows: Sequence[dict[str, Any]]) -> None:
    """The reward models' table."""
    lines = []
    for row in rows:
        for who, found in row["found"].items():
            lines.append([row["task"], who, row["pairs"], row["test"], figure(found.accuracy), figure(found.brier),
                          f"{found.ece:.3f}"])  # fmt: skip
    print(common.table(["task", "judge", "pairs", "tested on", "accuracy", "Brier (a coin: 25 %)", "ECE"], lines))
    for row in rows:
        p = row["paired"]
        print(f"{row['task']}: reward model against embeddings {p.difference:+.1%} [{p.low:+.1%}, {p.high:+.1%}], "
              f"{common.verdict(p.difference, 0)}")  # fmt: skip
    print()


def show_prefer(body: dict[str, Any]) -> None:
    """The table of win rates over the SFT start."""
    lines = []
    for row in body["rows"]:
        w = row["wins"]
        share = "" if row["name"] == "start" else common.verdict(w.rate[0], LEAST_WON)
        lines.append([row["name"], figure(w.rate), figure(w.controlled), figure(row["by_words"]),
                      figure(w.prefers) if w.prefers else None, f"{w.length:.1f}", body["tokens"].get(row["name"]),
                      share])  # fmt: skip
    print(f"win rate over the SFT start on {body['n']} prompts; learnt from {body['pairs']} pairs on {body['prompts']} "
          f"prompts, the judge from {body['judged_by']} others")  # fmt: skip
    head = ["", "judge", "at equal length", "by words", "prefers chosen", "words", "tokens", "asked"]
    print(common.table(head, lines))
    for name, accuracy in body["judges"].items():
        print(f"{name} is right on test pairs: {figure(accuracy)}")
    print(f"dpo on held-out pairs: {body['held_out']}\nmoved: {body['moved']}\n")


def show_rl(body: dict[str, Any]) -> None:
    """The gain of reinforcement."""
    p = body["paired"]
    print(f"rl on {body['task']}, {body['steps']} steps: {body['start']:.1%} to {body['rl']:.1%} on {body['n']} rows, "
          f"{p.difference:+.1%} [{p.low:+.1%}, {p.high:+.1%}]; above 0: {'yes' if p.low > 0 else 'NO'}")  # fmt: skip
    print(f"probe before {body['before']}\nafter {body['after']}\n")


def arguments() -> Any:
    options = common.parser(__doc__)
    common.add_model(options)
    options.add_argument("--parts", default=",".join(PARTS))
    options.add_argument("--rows", type=int, default=0, help="judgements to learn from at most (default: all)")
    options.add_argument("--test", type=int, default=0, help="test rows at most (default: all; 150 prompts for prefer)")
    options.add_argument("--epochs", type=float, default=2.0, help="of reward model, judge and DPO")
    options.add_argument("--sft", type=float, default=2.0, help="epochs of the SFT starts")
    options.add_argument("--rate", type=float, default=2e-4, help="learning rate of DPO")
    options.add_argument("--beta", type=float, default=0.05, help="of DPO")
    options.add_argument("--task", default="trec", help="shared task of rl (default: %(default)s)")
    options.add_argument("--sft-rows", type=int, default=200, help="train rows of the start of rl")
    options.add_argument("--rl-rows", type=int, default=1000, help="train rows that rl may ask")
    options.add_argument("--rl-rate", type=float, default=2e-4, help="learning rate of rl")
    options.add_argument("--algorithm", default="rloo", choices=("rloo", "grpo"))
    options.add_argument("--samples", type=int, default=4, help="per prompt, for rl and for the best of n")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--home", type=Path, help="where what is trained is kept (default: a temporary folder)")
    return options.parse_args()


def main() -> None:
    """Run the benchmark."""
    options = arguments()
    home = (options.home or Path(tempfile.mkdtemp(prefix="whet-feedback-"))).absolute()
    os.environ["WHET_HOME"] = str(home)
    bench, where = Bench(options, home, {}), common.machine(common.computing())
    print(f"feedback: {options.model}, seed {options.seed}, epochs {options.epochs:g}")
    print(common.machine_line(where) + "\n")
    body: dict[str, Any] = {"machine": where, "model": options.model, "seed": options.seed}
    wanted = options.parts.split(",")
    if "reward" in wanted:
        places = [("replies", HELPDESK / "replies"), ("pandalm_human", options.tasks / "pandalm_human")]
        body["reward"] = [reward(bench, name, folder) for name, folder in places if folder.is_dir()]
        show_reward(body["reward"])
    if "prefer" in wanted:
        body["prefer"] = prefer(bench)
        show_prefer(body["prefer"])
    if "rl" in wanted:
        body["rl"] = reinforce(bench)
        show_rl(body["rl"])
    common.finish("feedback", plain(body))


def plain(value: Any) -> Any:
    """Results as JSON takes them, without per-row outcomes."""
    from dataclasses import asdict, is_dataclass

    if is_dataclass(value) and not isinstance(value, type):
        value = {k: v for k, v in asdict(value).items() if k != "outcomes"}
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


if __name__ == "__main__":
    main()
