"""Prompts and demonstrations without training: whet's against DSPy's and lm-evaluation-harness's, on the same model.

Parts: `prompting` (zero-shot, whet's prompting with and without calibration; peers: DSPy's
BootstrapFewShotWithRandomSearch and MIPROv2, given at least as many tokens as the dearest of whet's recipes took) and
`fewshot` (whet's selections, calibrated; peers: DSPy's KNNFewShot, lm-evaluation-harness's few-shot). `chosen` is
whichever of whet's scores best on select rows, as `whet improve` would hand it over; its tokens are all of theirs.
Every side may use all train rows and is scored on the same first rows of confirm; `chosen` has the select rows besides.
DSPy runs on the same model through a small adapter, which joins its threads' requests to batches; while it optimizes,
labels are decoded under constraint, so that it compares answers and no parsing errors. Its programs are scored twice:
by their own parsing of what they write, and by whet's scoring of the labels behind their prompts. Differences are
paired, with 95 % intervals.

A run that is stopped goes on where it was with `--home DIR`, which keeps what each side reached.

    .venv/bin/python benchmarks/context.py [--parts prompting,fewshot] [--task sst2 ...] [--rows 200] [--peers dspy]
        [--home DIR]
"""

from __future__ import annotations

import queue
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import common

TASKS = ("sst2", "subj", "trec", "agnews", "boolq", "sst5")
WAIT = 0.02  # seconds for which the adapter gathers requests of other threads
VALSET = 32  # rows that DSPy's optimizers compare on: more of them, fewer candidates for as many tokens
THREADS = 16
SELECT = 100  # rows that whet's best of a part is chosen by


@dataclass
class Side:
    """One contestant on one task: its outcomes on confirm, and tokens and seconds of choosing."""

    name: str
    outcomes: Any
    tokens: int
    seconds: float
    note: str = ""


@dataclass
class Bench:
    """One task as all sides see it."""

    task: Any
    data: Any
    rows: Sequence[Any]
    select: Sequence[Any]
    base: Any
    metric: Any
    run: Any
    seed: int
    folder: Path | None = None  # keeps what each side reached

    @property
    def session(self) -> Any:
        return self.run.session(self.base.model)

    def spent(self) -> int:
        """Tokens that the model has read and written so far, shared beginnings once."""
        spent = self.session.spent
        return int(spent.prefilled_tokens + spent.generated_tokens)

    def kept(self, name: str, make: Callable[[], list[Side]]) -> list[Side]:
        """What a contestant reached, from an earlier run with the same rows, or now."""
        from whet.store import code

        what = f"{self.base.fingerprint[:12]} {code()}"  # model and code
        name = f"{what}, {self.task.name}, {len(self.rows)} rows, seed {self.seed}, {name}"
        found = common.kept(self.folder, name, lambda: [asdict(side) for side in make()])
        return [self.done(Side(**{**side, "outcomes": common.outcomes(side["outcomes"])})) for side in found]

    def made(self, text: str) -> Any:
        """The System of a recipe of whet's."""
        from whet.search.recipe import Recipe, parse

        self.run.notes.clear()
        return (parse(text) if text else Recipe()).run(self.base, self.data, self.run)

    def scored(self, system: Any, rows: Sequence[Any]) -> Any:
        """Outcomes of a System on rows."""
        from whet.metrics import score_all

        return score_all(self.metric, [a.text for a in system.answers(rows, self.session)], rows)

    def whet(self, name: str, text: str) -> Side:
        """A recipe of whet's."""
        tokens, begun = self.spent(), time.perf_counter()
        made = self.made(text)
        tokens, seconds = self.spent() - tokens, time.perf_counter() - begun
        prompt = self.run.notes.get("prompting", {}).get("prompt", "")
        return Side(name, self.scored(made, self.rows), tokens, seconds, prompt)

    def chosen(self, part: str) -> Side:
        """The best of whet's recipes of a part, by rows to select by."""
        tokens, begun, best = self.spent(), time.perf_counter(), (-1.0, "", self.base)
        for text in WHET[part].values():
            made = self.made(text)
            score = self.metric.aggregate(self.scored(made, self.select))
            best = (score, text, made) if score > best[0] else best
        tokens, seconds = self.spent() - tokens, time.perf_counter() - begun
        return Side(f"{part}, chosen", self.scored(best[2], self.rows), tokens, seconds, best[1])

    def done(self, side: Side) -> Side:
        """Say at once what a side reached: a run may be stopped before its table."""
        score = self.metric.aggregate(side.outcomes)
        print(f"  {self.task.name} {side.name}: {score:.1%}, {side.tokens} tokens, {side.seconds:.0f} s",
              file=sys.stderr, flush=True)  # fmt: skip
        return side


# --- DSPy -------------------------------------------------------------------------------------------------------------


def adapter(session: Any, labels: Sequence[str], constrained: threading.Event, most: int = 40) -> Any:
    """The session as a DSPy language model; what its threads ask at the same time is one batch.

    While `constrained` is set, a program that wants a label gets the likeliest one in the format that it asks for, as a
    server with guided decoding would give it: a model as small as this one seldom keeps to the format by itself, and an
    optimizer that sees nothing but parsing errors has nothing to choose by.
    """
    import dspy

    from whet.engine import Sampling

    asked: queue.Queue[Any] = queue.Queue()

    def work() -> None:
        while True:
            batch, until = [asked.get()], time.monotonic() + WAIT
            while len(batch) < THREADS and (left := until - time.monotonic()) > 0:
                try:
                    batch.append(asked.get(timeout=left))
                except queue.Empty:
                    break
            for key in dict.fromkeys(b[1] for b in batch):
                same = [b for b in batch if b[1] == key]
                chats = [b[0] for b in same]
                try:
                    if key is None:
                        found: Any = [[says(labels)[i]] for i in chosen(session, chats, labels)]
                    else:
                        made = session.generate(chats, Sampling(key[0], key[1], n=key[2], seed=key[3]))
                        found = [[g.text for g in one] for one in made]
                except Exception as error:  # the thread that asked is to see it
                    found = [error] * len(same)
                for one, texts in zip(same, found, strict=True):
                    one[2].put(texts)

    threading.Thread(target=work, daemon=True).start()

    class Model(dspy.BaseLM):  # type: ignore[misc]
        def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
            from types import SimpleNamespace as Plain

            kwargs = {**self.kwargs, **kwargs}
            chat = tuple((m["role"], m["content"]) for m in messages or [{"role": "user", "content": prompt}])
            reply: queue.Queue[Any] = queue.Queue()
            rollout = kwargs.get("rollout_id") or 0
            key = (kwargs.get("max_tokens") or most, kwargs.get("temperature") or 0.0, kwargs.get("n") or 1, rollout)
            guided = constrained.is_set() and "output fields are:\n1. `label`" in chat[0][1]
            asked.put((chat, None if guided else key, reply))
            texts = reply.get() * (key[2] if guided else 1)
            if isinstance(texts, Exception):
                raise texts
            choices = [Plain(message=Plain(content=t, tool_calls=None), finish_reason="stop", logprobs=None)
                       for t in texts]  # fmt: skip
            return Plain(choices=choices, usage={}, model="whet")

    return Model("whet", temperature=0.0, max_tokens=most, cache=False)


def says(labels: Sequence[str]) -> list[str]:
    """Each label as DSPy's chat adapter wants it."""
    return [f"[[ ## label ## ]]\n{label}\n\n[[ ## completed ## ]]" for label in labels]


def chosen(session: Any, chats: Sequence[Any], labels: Sequence[str]) -> list[int]:
    """Number of the likeliest label behind each chat, in DSPy's format, by whet's scoring."""
    rows = session.choose(chats, [[f"[[ ## label ## ]]\n{label}" for label in labels]] * len(chats))
    return [max(range(len(labels)), key=lambda i: (row[i], -i)) for row in rows]


def dspy_sides(bench: Bench, part: str, tokens: int) -> list[Side]:
    """DSPy's optimizers on a classifying program, each with at least `tokens` to spend where it can be told so."""
    import logging
    from typing import Literal

    import dspy
    from dspy.teleprompt import BootstrapFewShotWithRandomSearch, KNNFewShot, MIPROv2

    logging.disable(logging.WARNING)
    labels = bench.task.labels
    constrained = threading.Event()
    constrained.set()
    model = adapter(bench.session, labels, constrained)
    dspy.configure(lm=model, adapter=chat_adapter())
    fields = {"text": (str, dspy.InputField()), "label": (Literal[labels], dspy.OutputField())}
    program = dspy.Predict(dspy.make_signature(fields, bench.task.instruction))
    usable = [e for e in bench.data.train if e.completion]
    train = [dspy.Example(text=e.prompt, label=e.completion).with_inputs("text")
             for e in random.Random(bench.seed).sample(usable, len(usable))]  # fmt: skip
    valset, rest = train[:VALSET], train[VALSET:]

    def right(example: Any, prediction: Any, trace: Any = None) -> bool:
        return bool(getattr(prediction, "label", None) == example.label)

    begun = bench.spent()
    dspy.Evaluate(devset=valset, metric=right, num_threads=THREADS, display_progress=False, max_errors=10**6)(program)
    one = max(1, bench.spent() - begun)  # tokens of one candidate without demonstrations
    shots = {"max_bootstrapped_demos": 4, "max_labeled_demos": 4}

    def random_search() -> Any:
        # Demonstrations make a candidate some three times as long.
        count = max(2, round(tokens / (3 * one)))
        made = BootstrapFewShotWithRandomSearch(
            right, num_candidate_programs=count, num_threads=THREADS, max_errors=10**6, **shots)
        return made.compile(program, trainset=rest, valset=valset)

    def mipro() -> Any:
        trials = max(3, round(tokens / (2 * one)))
        made = MIPROv2(
            right, prompt_model=adapter(bench.session, labels, constrained, 160), auto=None, num_candidates=6,
            num_threads=THREADS, max_errors=10**6, seed=bench.seed, **shots)  # fmt: skip
        return made.compile(program, trainset=rest, valset=valset, num_trials=trials, minibatch=False)

    def neighbours() -> Any:
        from whet.embed import Embedder

        embedder = Embedder(bench.run.home)
        rows = [dspy.Example(text=e.prompt, label=e.completion).with_inputs("text") for e in usable]
        return KNNFewShot(8, rows, dspy.Embedder(lambda texts: embedder(list(texts))), max_bootstrapped_demos=0,
                          max_labeled_demos=8).compile(program)  # fmt: skip

    made: dict[str, Callable[[], Any]] = (
        {"DSPy random search": random_search, "DSPy MIPROv2": mipro} if part == "prompting" else
        {"DSPy KNNFewShot": neighbours})  # fmt: skip
    sides = []
    for name, compile in made.items():
        constrained.set()
        scored = partial(_dspy_scored, bench, name, compile, labels, constrained)
        sides += bench.kept(f"{name}, {tokens} tokens", scored)
    return sides


def _dspy_scored(
    bench: Bench, name: str, compile: Callable[[], Any], labels: Sequence[str], constrained: threading.Event
) -> list[Side]:
    """A compiled program on confirm: by its own parsing, and by the labels' scores behind its prompts."""
    import dspy

    from whet.metrics import score_all

    before, begun = bench.spent(), time.perf_counter()
    try:
        compiled = compile()
    except Exception as error:  # a small model's answers can end an optimizer
        print(f"  {bench.task.name} {name} failed: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return []
    tokens, seconds = bench.spent() - before, time.perf_counter() - begun
    constrained.clear()
    sent: dict[str, Any] = {}
    own: dict[str, str] = {}

    def answer(example: Any) -> None:
        with dspy.context(adapter=chat_adapter(sent, example.id)):
            try:
                own[example.id] = str(compiled(text=example.prompt).label)
            except Exception:  # what cannot be parsed is a wrong answer
                own[example.id] = ""

    from concurrent.futures import ThreadPoolExecutor
    from contextvars import copy_context

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda job: job[0].run(answer, job[1]), [(copy_context(), e) for e in bench.rows]))
    chats = [sent[e.id] for e in bench.rows]
    best = [labels[i] for i in chosen(bench.session, chats, labels)]
    answers = {"own parsing": [own[e.id] for e in bench.rows], "labels scored": best}
    return [Side(f"{name}, {how}", score_all(bench.metric, said, bench.rows), tokens, seconds)
            for how, said in answers.items()]


def chat_adapter(sent: dict[str, Any] | None = None, name: str = "") -> Any:
    """DSPy's chat adapter, which remembers what it sent for a row last. Where a program wants one free text (MIPROv2's
    proposals) and the model forgets the format, all that it said is taken: the optimizer would end with an error.
    """
    import dspy

    class Heard(dspy.ChatAdapter):  # type: ignore[misc]
        def format(self, *args: Any, **kwargs: Any) -> Any:
            messages = super().format(*args, **kwargs)
            if sent is not None:
                sent[name] = tuple((m["role"], m["content"]) for m in messages)
            return messages

        def parse(self, signature: Any, completion: str) -> Any:
            try:
                return super().parse(signature, completion)
            except Exception:
                outputs = list(signature.output_fields.items())
                if len(outputs) != 1 or outputs[0][1].annotation is not str:
                    raise
                return {outputs[0][0]: completion.strip()}

    return Heard(use_json_adapter_fallback=False)


# --- lm-evaluation-harness --------------------------------------------------------------------------------------------


def lm_eval_side(bench: Bench, shots: int) -> Side:
    """What lm-evaluation-harness does with a multiple-choice task: `shots` random train rows in its default format,
    the label with the greatest log-likelihood; scored by its own HFLM.
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from whet.metrics import score_all

    model = HFLM(pretrained=bench.session.module, tokenizer=bench.session.tokenizer, batch_size=16)
    usable = [e for e in bench.data.train if e.completion]
    shown = random.Random(bench.seed).sample(usable, shots)
    head = f"{bench.task.instruction}\n\n" + "".join(f"{e.prompt}\n{e.completion}\n\n" for e in shown)
    asked = [Instance("loglikelihood", {}, (f"{head}{e.prompt}\n", label), n)
             for n, e in enumerate(bench.rows) for label in bench.task.labels]  # fmt: skip
    begun = time.perf_counter()
    found = [value for value, _ in model.loglikelihood(asked, disable_tqdm=True)]
    labels = bench.task.labels
    rows = [found[i : i + len(labels)] for i in range(0, len(found), len(labels))]
    answers = [labels[row.index(max(row))] for row in rows]
    outcomes = score_all(bench.metric, answers, bench.rows)
    return Side(f"lm-eval {shots}-shot", outcomes, 0, time.perf_counter() - begun)


# --- the whole --------------------------------------------------------------------------------------------------------

WHET = {
    "prompting": {"calibrate": "calibrate", "prompting": "prompting",
                  "prompting+calibrate": "prompting(calibrated=true)+calibrate"},
    "fewshot": {"fewshot": "fewshot", "fewshot+calibrate": "fewshot+calibrate",
                "diverse+calibrate": "fewshot(selection=diverse)+calibrate",
                "bootstrapped+calibrate": "fewshot(selection=bootstrapped)+calibrate",
                "nearest": "fewshot(k=8,selection=nearest)",
                "nearest+calibrate": "fewshot(k=8,selection=nearest)+calibrate"},
}  # fmt: skip


def sides(options: Any, bench: Bench) -> list[Side]:
    """All contestants on one task, zero-shot first."""
    def mine(name: str, text: str) -> list[Side]:
        return bench.kept(name, lambda: [bench.whet(name, text)])

    found = mine("zero-shot", "")
    parts = [p for p in options.parts.split(",") if p]
    for part in parts:
        ours = [side for name, text in WHET[part].items() for side in mine(name, text)]
        found += ours
        found += bench.kept(f"{part} chosen", partial(lambda p: [bench.chosen(p)], part))
        if "dspy" in options.peers.split(","):
            found += dspy_sides(bench, part, max(s.tokens for s in ours))
        if part == "fewshot" and "lm-eval" in options.peers.split(","):
            found += bench.kept(f"lm-eval {options.shots}", lambda: [lm_eval_side(bench, options.shots)])
    if "fewshot" in parts:
        found.append(neighbour(bench))
    return found


def neighbour(bench: Bench) -> Side:
    """The nearest train row's label: what copying reaches without a language model."""
    from whet import baselines, embed
    from whet.metrics import score_all

    made = baselines.run(bench.data.train, bench.rows, bench.task.labels, embed=embed.Embedder(bench.run.home))
    answers = next(b.answers for b in made if b.name == "embedding_neighbour")
    return Side("nearest neighbour, no model", score_all(bench.metric, answers, bench.rows), 0, 0.0)


def prepared(options: Any, name: str, folder: Path) -> Bench:
    """A task with its splits, base and shared order of confirm."""
    from whet.methods import Run
    from whet.metrics import get
    from whet.model import resolve
    from whet.search import base_system
    from whet.splits import shared_order
    from whet.store import Store

    task = common.load_task(options.tasks, name)
    splits = task.split(options.seed)
    store = Store()
    run = Run(store, options.seed)
    ref = resolve(options.model)
    base = base_system(ref, task, splits.learnable, run.session(ref), store.home)
    rows = shared_order(splits.confirm, task.closed, options.seed)[: options.rows]
    select = shared_order(splits.select, task.closed, options.seed)[:SELECT]
    return Bench(task, splits.learnable, rows, select, replace(base, home=store.home), get(task.metric), run,
                 options.seed, options.home)  # fmt: skip


def report(options: Any, bench: Bench, found: Sequence[Side]) -> list[dict[str, Any]]:
    """The table of one task; every side against zero-shot."""
    from whet import stats

    rows, lines = [], []
    for side in found:
        score = bench.metric.aggregate(side.outcomes)
        low, high = stats.bootstrap_interval(side.outcomes, bench.metric)
        pair = stats.compare(found[0].outcomes, side.outcomes, bench.metric)
        rows.append({"task": bench.task.name, "side": side.name, "score": score, "low": low, "high": high,
                     "difference": [pair.difference, pair.low, pair.high], "p_value": pair.p_value,
                     "tokens": side.tokens, "seconds": side.seconds, "prompt": side.note})  # fmt: skip
        lines.append([side.name, f"{score:.1%} [{low:.1%}, {high:.1%}]", f"{pair.difference:+.1%} [{pair.low:+.1%}, "
                      f"{pair.high:+.1%}]", f"{pair.p_value:.1g}", side.tokens, f"{side.seconds:.0f}"])  # fmt: skip
    rows_line = f"{len(bench.rows)} rows of confirm, {len(bench.data.train)} of train"
    print(f"\n{bench.task.name}: {bench.metric.name}, {rows_line}")
    print(common.table(["side", "score", "against zero-shot", "p", "tokens to choose", "s"], lines), flush=True)
    return rows


def arguments() -> Any:
    options = common.parser(__doc__)
    common.add_model(options)
    options.add_argument("--parts", default="prompting,fewshot")
    options.add_argument("--task", action="append", help=f"default: {' '.join(TASKS)}")
    options.add_argument("--rows", type=int, default=200, help="of confirm")
    options.add_argument("--shots", type=int, default=16, help="of lm-evaluation-harness")
    options.add_argument("--peers", default="dspy,lm-eval")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--home", type=Path, help="keep what each side reached here (default: nowhere)")
    return options.parse_args()


def main() -> None:
    """Run the benchmark."""
    options = arguments()
    where = common.machine(common.computing())
    print(f"context: {options.model}, seed {options.seed}; one run each")
    print(common.machine_line(where))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.task or TASKS:
            bench = prepared(options, name, Path(folder))
            rows += report(options, bench, sides(options, bench))
    means = {side: statistics.fmean(r["difference"][0] for r in rows if r["side"] == side)
             for side in dict.fromkeys(r["side"] for r in rows)}  # fmt: skip
    print("\nmean gain over zero-shot:")
    print(common.table(["side", "mean", "tasks"], [[s, f"{v:+.1%}", sum(r["side"] == s for r in rows)]
                                                   for s, v in means.items()]))  # fmt: skip
    body = {"machine": where, "model": options.model, "seed": options.seed, "means": means, "rows": rows}
    common.finish("context", body)


if __name__ == "__main__":
    main()
