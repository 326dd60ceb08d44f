"""Compression: what smaller and faster cost on the task, against the tuned System in 16 bits, all in one run.

A System is fine-tuned on `--rows` rows of each task (once; kept in `--home`). Then, on `--test` rows of its test, in
pairs with the tuned System:

quantize   int8 (weights and activations, and weights only) and 4 bits by nearest, HQQ and GPTQ: bytes, the observed
           loss and its one-sided bound, and the speed of decoding at batch 1 and of reading a long prompt, taken in
           turns with the tuned System's.
peers      the same System as a GGUF that llama.cpp has quantized to Q8_0, Q4_0 and Q4_K_M: bytes, score and speed
           (needs the extra llamacpp), beside whet's own in as many bits.
teach      context distillation: the teacher is the base with 16 demonstrations, calibrated; the student has none, and
           may be made smaller in further stages. Scores, and latency with cold caches.
students   at most 62 % of the parameters: MLPs narrowed or layers dropped, and the vocabulary trimmed; healed by
           distillation and by fine-tuning, with the same tokens, each at the better of `--rates` by 300 select rows.
composed   the first of these students, distilled, in 4 bits, but for what 18 % of the bytes leave room for.

Students and composed are also taught by the prompts, without their answers, of `--unlabelled` more train rows: what no
fine-tuning can use.

    .venv/bin/python benchmarks/compression.py [--parts quantize,peers,teach,students,composed] [--rows 1500]
        [--test 500] [--task sst2,banking77,e2e_nlg] [--unlabelled 2500]
"""

from __future__ import annotations

import ctypes
import itertools
import json
import random
import statistics
import tempfile
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import common

PARTS = ("quantize", "peers", "teach", "students", "composed")
KINDS = (
    "quantize", "quantize(activations=False)", "quantize(bits=4,rounding=nearest)", "quantize(bits=4,rounding=hqq)",
    "quantize(bits=4)", "quantize(bits=4,embedding=4)",
)  # fmt: skip
SHAPES = ("prune(width=0.5,spare=500)", "prune(layers=22,spare=500)", "prune(layers=0.5,spare=500)",
          "prune(spare=500)+share(groups=0.5)")  # fmt: skip
ASKED = {8: (0.52, 0.01, 1.6, 1.0), 4: (0.36, 0.02, 1.0, 0.0)}  # at most of the bytes, points lost; at least
# decoded, and read, of the tuned System's tokens a second
RATES = (3e-5, 1e-4)  # of students' trainings: 3e-4 undoes what is left of a model that lost a quarter of its layers
MORE = 1.05  # of llama.cpp's bytes that whet's may take
COMPOSED = 0.18  # of the bytes that everything at once may take
CHOSEN_ON = 300  # select rows by which the rate is chosen
WORDS = ("the", "story", "of", "people", "in", "a", "city", "was", "not", "bad", "at", "all", "and", "funny")
NEW, LONG = 64, 500  # tokens decoded, words read


class Bench(common.Bench):
    """A task and, for the parts that ask for it, the System tuned on it with its scorecard."""

    def __init__(self, options: Any, name: str, home: Path) -> None:
        super().__init__(options, name, home)
        print(f"\n## {name}", flush=True)
        kept = {e.prompt for e in self.data.train}
        more = [e.prompt for e in self.task.split(options.seed).learnable.train if e.prompt not in kept]
        prompts = home / f"{name}-prompts.jsonl"
        prompts.parent.mkdir(parents=True, exist_ok=True)
        more = more[: options.unlabelled]
        prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in more))
        print(f"{len(self.data.train)} train rows, and {len(more)} prompts of others", flush=True)
        file = f",unlabelled={prompts}" if more else ""
        self.heal = {rate: f"distill(adapter=full,learning_rate={rate}{file})" for rate in options.rates}
        self.tune = {rate: f"finetune(adapter=full,learning_rate={rate})" for rate in options.rates}

    @cached_property
    def tuned(self) -> Any:
        """The System that is fine-tuned on the task."""
        system, _, seconds = self.made(f"finetune(epochs={self.options.epochs})", self.base)
        print(f"\ntuned on {len(self.data.train)} rows in {seconds:.0f} s (0: kept)", flush=True)
        return system

    @cached_property
    def card(self) -> Any:
        """What the tuned System scores on the test rows."""
        return self.tested(self.tuned)

    def made(
        self, recipe: str, start: Any, tokens: int | None = None, size: int | None = None
    ) -> tuple[Any, dict[str, Any], float]:
        """What a recipe makes of a System in at most `size` bytes, its notes, and the seconds that took."""
        from whet.search.recipe import parse

        run, data = replace(self.run, notes={}, trained_tokens=tokens), self.data
        if size:
            data = replace(data, limits=replace(data.limits, size=size))
        begun = time.perf_counter()
        system = parse(recipe).run(start, data, run)
        return system, run.notes, time.perf_counter() - begun

    def healed(self, shape: str, ways: dict[float, str]) -> tuple[float, Any, float]:
        """The better student of a shape by select rows: its learning rate, System, and the seconds of its making."""
        from whet.scorecard import evaluate

        rows, found = self.task.split(self.options.seed).select[:CHOSEN_ON], []
        for rate, way in ways.items():
            system, _, seconds = self.made(f"{shape}+{way}", self.tuned, self.options.tokens)
            session = self.run.session(system.model)
            score = evaluate(system, rows, self.metric, session=session, store=self.run.store).score
            print(f"{shape}+{way.partition('(')[0]} at {rate:g}: {100 * score:.1f} on {len(rows)} select rows")
            found.append((score, rate, system, seconds))
        return max(found, key=lambda f: f[0])[1:]

    def divergence(self, system: Any, session: Any = None) -> str:
        """Mean KL divergence in nats of what a System gives the labels from what the tuned one, computed in fp32, does.

        Accuracy sees only what crosses the border between labels; this sees how far all rows were moved.
        """
        if not self.tuned.decoding.labels:
            return "-"
        given = self.given(system, session or self.run.session(system.model))
        return f"{float((self.exact.exp() * (self.exact - given)).sum(-1).mean()):.4f}"

    def given(self, system: Any, session: Any) -> Any:
        """Log-probabilities of the labels on the test rows [rows, labels]."""
        import torch

        scores = system.label_scores(self.test, session, None, blind=True)[0]
        return torch.tensor(scores).log_softmax(-1)

    @cached_property
    def exact(self) -> Any:
        """What the tuned System gives the labels, computed in fp32: 16 bits are themselves off by something."""
        import torch

        from whet import model as models
        from whet.engine.torch import TorchSession

        module, tokenizer = models.load(self.tuned.model, self.tuned.home, dtype=torch.float32)
        return self.given(self.tuned, TorchSession(module, tokenizer))

    def lost(self, card: Any, than: Any = None) -> tuple[str, str]:
        """The observed loss in points with its interval, and the one-sided bound."""
        from whet import stats

        old = (than or self.card).outcomes
        paired = stats.compare(old, card.outcomes, self.metric, self.options.seed)
        kept = stats.not_worse(old, card.outcomes, self.metric, 0.01, self.options.seed)
        return (f"{0.0 - 100 * paired.difference:+.1f} [{0.0 - 100 * paired.high:.1f}, {0.0 - 100 * paired.low:.1f}]",
                f"{0.0 + 100 * kept.bound:.1f}")  # fmt: skip


    def asked(self, bits: int, share: float, card: Any, faster: float, read: float) -> str:
        """What was asked of so many bits, and whether it was met."""
        most, margin, least, reading = ASKED[bits]
        loss = self.card.score - card.score if self.metric.higher_is_better else card.score - self.card.score
        parts = (("of the bytes", share, most, share <= most), ("lost", loss, margin, loss <= margin),
                 ("× decoding", faster, least, faster >= least),
                 ("× reading", read, reading, read >= reading))  # fmt: skip
        return ", ".join(f"{value:.3f} {what} (asked: {limit:g}; {'met' if ok else 'MISSED'})"
                         for what, value, limit, ok in parts)  # fmt: skip


def words(seed: int, count: int) -> str:
    """A prompt of random words."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(count))


def endless(session: Any) -> Any:
    """A session whose answers go on to the last token asked for: a tuned model ends its own after a word or two."""
    if hasattr(session, "stop_ids"):
        session.stop_ids = frozenset()
    else:
        session._ends = lambda token: False  # llama.cpp's
    return session


def decode(session: Any, seed: int) -> float:
    """Seconds per token of decoding at batch 1, the prompt apart; of an endless session."""
    from whet.engine import Sampling

    first, second = ((("user", words(n, 20)),) for n in (seed, -seed - 1))  # two, as some engines remember one
    begun = time.perf_counter()
    session.generate([first], Sampling(1))
    read = time.perf_counter()
    made = session.generate([second], Sampling(NEW))[0][0].tokens
    if made != NEW:
        raise SystemExit(f"decoding ended after {made} of {NEW} tokens: its speed cannot be told")
    return ((time.perf_counter() - read) - (read - begun)) / (made - 1)


def prefill(session: Any, seed: int) -> float:
    """Seconds per token of reading a long prompt."""
    prompt = (("user", words(seed, LONG)),)
    count = session.count([prompt])[0]
    begun = time.perf_counter()
    session.score([prompt], [["yes"]])
    return (time.perf_counter() - begun) / count


def speeds(
    bench: Bench, systems: dict[str, Any], others: dict[str, Any] | None = None
) -> dict[str, tuple[float, float]]:
    """(decoded, read) tokens a second of each System, and of `others`' sessions; the contestants take turns."""
    from whet.engine import open_session

    repeats = bench.options.repeats
    sessions = {name: endless(open_session(s.model, bench.run.home)) for name, s in systems.items()}
    sessions |= {name: endless(session) for name, session in (others or {}).items()}
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in sessions}
    for session in sessions.values():  # the first of each warms up
        decode(session, 0), prefill(session, 0)
    for seed, (name, session) in itertools.product(range(1, repeats + 1), sessions.items()):
        found[name][0].append(decode(session, seed))
        found[name][1].append(prefill(session, seed))
    return {name: (1 / statistics.median(a), 1 / statistics.median(b)) for name, (a, b) in found.items()}


def quantize(bench: Bench) -> dict[str, Any]:
    """Every kind of quantization of the tuned System."""
    from whet.probe import probe
    from whet.scorecard import size_bytes

    systems, rows = {"tuned, 16 bits": bench.tuned}, []
    for kind in bench.options.kinds:
        system, notes, seconds = bench.made(kind, bench.tuned)
        systems[kind] = system
        worst = ", ".join(f"{r['layer']} {100 * r['error']:.1f} %" for r in notes["quantized"]["layers"][:3])
        print(f"{kind}: {seconds:.0f} s (0: kept); worst layers {worst}")
    whole, metric = notes["quantized"]["was"], bench.metric.name
    peak = {}
    for n, (name, system) in enumerate(systems.items()):  # each in a process of its own
        peak[name] = probe(system.save(bench.run.home / f"probed-{bench.task.name}-{n}"), bench.run.home, bench.test,
                           metric)[1]  # fmt: skip
    fast = speeds(bench, systems)
    old = fast["tuned, 16 bits"]
    for name, system in systems.items():
        card = bench.tested(system)
        size = whole if system is bench.tuned else size_bytes(system)
        lost, bound = bench.lost(card)
        new = fast[name]
        rows.append([name, f"{size / 1e6:.1f}", f"{100 * size / whole:.1f} %", f"{100 * card.score:.1f}", lost, bound,
                     bench.divergence(system), f"{new[0]:.1f} ({new[0] / old[0]:.2f}×)",
                     f"{new[1]:.0f} ({new[1] / old[1]:.2f}×)", f"{peak[name] / 1e6:.0f}"])  # fmt: skip
        if system is not bench.tuned:
            asked = bench.asked(4 if "bits=4" in name else 8, size / whole, card, new[0] / old[0], new[1] / old[1])
            print(f"{name}: {asked}")
    print(f"\n{len(bench.test)} test rows, metric {bench.metric.name}")
    head = ["", "MB", "of 16 bits", "score", "points lost", "bound", "divergence", "decoded/s", "read/s",
            "MB of memory"]  # fmt: skip
    print(common.table(head, rows))
    return {row[0]: row[1:] for row in rows}


def teach(bench: Bench) -> dict[str, Any]:
    """A teacher with 16 demonstrations and the student that has to do without them, in one stage or several."""
    from whet.probe import probe

    shown = bench.options.teacher or ("fewshot(k=16)+calibrate" if bench.task.labels else "fewshot(k=16)")
    systems = {"base": bench.base, "teacher": bench.made(shown, bench.base)[0]}
    student, seconds = systems["teacher"], 0.0
    for stage in bench.options.student:
        student, _, more = bench.made(stage, student)
        systems[stage], seconds = student, seconds + more
        print(f"{stage}: {more:.0f} s", flush=True)
    cards = {name: bench.tested(system) for name, system in systems.items()}
    folders = [s.save(bench.run.home / f"{bench.task.name}-{n}") for n, s in enumerate(systems.values())]
    asked = [[probe(folder, bench.run.home, bench.test)[0] for folder in folders] for _ in range(bench.options.repeats)]
    times = dict(zip(systems, map(statistics.median, zip(*asked, strict=True)), strict=True))
    print(f"\n### teach: {shown}, {len(bench.data.train)} prompts, {seconds:.0f} s; {len(bench.test)} test rows\n")
    rows = []
    for name, card in cards.items():
        share, faster = card.score / cards["teacher"].score, times[name] / times["teacher"]
        rows.append([name, f"{100 * card.score:.1f}", f"{100 * share:.1f} %", bench.lost(card, cards["teacher"])[0],
                     f"{times[name]:.0f}", f"{faster:.2f}"])  # fmt: skip
    print(common.table(["", "score", "of the teacher", "points lost", "ms an answer", "of its latency"], rows))
    share, faster = cards[stage].score / cards["teacher"].score, times[stage] / times["teacher"]
    print(f"student: {100 * share:.1f} % of the teacher's score ({common.verdict(share, 0.97)}), "
          f"{faster:.2f} of its latency (asked: at most 0.25)")  # fmt: skip
    return {"scores": {n: c.score for n, c in cards.items()}, "ms": times, "seconds": seconds}


def students(bench: Bench) -> dict[str, Any]:
    """Small students, healed by distillation and, with the same tokens, by fine-tuning."""
    from whet import stats
    from whet.scorecard import size_bytes

    rows, found, most = [], {}, bench.options.tokens
    whole = 2 * sum(p.numel() for p in bench.run.session(bench.tuned.model).module.parameters())
    for shape in bench.options.shapes:
        cut, _, _ = bench.made(shape, bench.tuned)
        _, healed, seconds = bench.healed(shape, bench.heal)
        _, plain, _ = bench.healed(shape, bench.tune)
        cards = [bench.tested(s) for s in (cut, healed, plain)]
        size = size_bytes(healed) / whole
        share = cards[1].score / bench.card.score
        print(f"{shape}: of the teacher {common.verdict(share, 0.95)}, of the bytes "
              f"{'yes' if size <= 0.62 else 'NO'} (asked: at most 0.62)")  # fmt: skip
        better = stats.compare(cards[2].outcomes, cards[1].outcomes, bench.metric, bench.options.seed)
        found[shape] = {"bytes": size, "cut": cards[0].score, "distilled": cards[1].score, "tuned": cards[2].score}
        rows.append([shape, f"{100 * size:.1f} %", *(f"{100 * c.score:.1f}" for c in cards), f"{100 * share:.1f} %",
                     f"{100 * better.difference:+.1f} [{100 * better.low:.1f}, {100 * better.high:.1f}]",
                     f"{seconds:.0f}"])  # fmt: skip
    print(f"\n### students of the tuned System ({100 * bench.card.score:.1f}), {most} tokens\n")
    head = ["", "of the bytes", "cut", "distilled", "fine-tuned", "of the teacher", "distilled − tuned", "s"]
    print(common.table(head, rows))
    return found


def composed(bench: Bench) -> dict[str, Any]:
    """Everything at once; what the limit of bytes leaves room for stays in 8 bits."""
    from whet.scorecard import size_bytes

    shape = bench.options.shapes[0]
    whole = 2 * sum(p.numel() for p in bench.run.session(bench.tuned.model).module.parameters())
    recipe = f"{shape}+{bench.heal[bench.healed(shape, bench.heal)[0]]}+quantize(bits=4)"
    system, _, seconds = bench.made(recipe, bench.tuned, bench.options.tokens, round(COMPOSED * whole))
    card, size = bench.tested(system), size_bytes(system)
    lost, bound = bench.lost(card)
    print(f"\n### composed: {recipe}: {size / 1e6:.1f} MB, {100 * size / whole:.1f} % of the bytes "
          f"(asked: at most {100 * COMPOSED:.0f}), {100 * card.score:.1f}, points lost {lost} (bound {bound}; "
          f"asked: 3), {seconds:.0f} s")  # fmt: skip
    return {"bytes": size / whole, "score": card.score, "lost": lost}


# llama.cpp's numbers of file types, and whet's kind in as many bits.
LLAMA = {"Q8_0": (7, "quantize(activations=false)"), "Q4_0": (2, "quantize(bits=4)"),
         "Q4_K_M": (15, "quantize(bits=4)")}  # fmt: skip


def weights(file: Path) -> int:
    """Bytes of a GGUF's weights: its vocabulary, which whet's files of weights do not hold either, left out."""
    from gguf import GGUFReader

    return sum(int(tensor.n_bytes) for tensor in GGUFReader(file).tensors)


def peers(bench: Bench) -> dict[str, Any]:
    """llama.cpp's own quantizations of the tuned model, embedding included, asked as the System is; whet's as large."""
    import torch

    from whet.export import export
    from whet.scorecard import evaluate, size_bytes

    try:
        import llama_cpp

        from whet.export.llama import LlamaSession, _silent
    except ImportError:
        print("\npeers: not run; pip install -e '.[llamacpp]'")
        return {}
    llama_cpp.llama_log_set(_silent(), ctypes.c_void_p(0))
    folder = bench.run.home / f"gguf-{bench.task.name}"
    if not folder.exists():
        export(bench.tuned, "gguf", folder, check=False)
    source, sessions, files = next(folder.glob("*.gguf")), {}, {}
    tokenizer = bench.run.session(bench.tuned.model).tokenizer
    for kind, (number, _) in LLAMA.items():
        files[kind] = file = bench.run.home / f"{bench.task.name}-{kind}.gguf"
        if not file.exists():
            settings = llama_cpp.llama_model_quantize_default_params()
            settings.ftype = number
            if llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), ctypes.byref(settings)):
                raise SystemExit(f"llama.cpp could not quantize to {kind}")
        sessions[kind] = LlamaSession(file, tokenizer, threads=torch.get_num_threads())
    files["llama.cpp, 16 bits"] = source
    sessions["llama.cpp, 16 bits"] = LlamaSession(source, tokenizer, threads=torch.get_num_threads())
    own, rival = {}, {}  # where 4 bits may take more, whet keeps the layers that suffer most in 8
    for kind, (_, recipe) in LLAMA.items():
        most = int(MORE * weights(files[kind])) if "bits=4" in recipe else None
        rival[kind] = name = f"{recipe}, {most / 1e6:.0f} MB" if most else recipe
        own[name] = bench.made(recipe, bench.tuned, size=most)[0]
    own["quantize"] = bench.made("quantize", bench.tuned)[0]
    systems = {"tuned, 16 bits": bench.tuned, **own}
    cards = {name: bench.tested(system) for name, system in systems.items()}
    cards |= {k: evaluate(bench.tuned, bench.test, bench.metric, session=s) for k, s in sessions.items()}
    apart = {name: bench.divergence(system) for name, system in systems.items()}
    apart |= {kind: bench.divergence(bench.tuned, session) for kind, session in sessions.items()}
    size = {name: size_bytes(system) for name, system in own.items()} | {k: weights(f) for k, f in files.items()}
    size["tuned, 16 bits"] = weights(source)
    fast, rows = speeds(bench, systems, sessions), []  # from here on sessions do not end an answer
    old = fast["tuned, 16 bits"]
    for name, card in cards.items():
        new = fast[name]
        rows.append([name, f"{size[name] / 1e6:.1f}", f"{100 * card.score:.1f}", *bench.lost(card), apart[name],
                     f"{new[0]:.1f} ({new[0] / old[0]:.2f}×)", f"{new[1]:.0f} ({new[1] / old[1]:.2f}×)"])  # fmt: skip
    print(f"\n### llama.cpp on the same System, {len(bench.test)} rows\n")
    print(common.table(["", "MB", "score", "points lost", "bound", "divergence", "decoded/s", "read/s"], rows))
    for kind, name in rival.items():
        worse = bench.lost(cards[name], cards[kind])[0]
        share, faster = size[name] / size[kind], fast[name][0] / fast[kind][0]
        print(f"{name} against {kind}: points lost {worse} (asked: none), {share:.3f} of the bytes (asked: at most "
              f"{MORE}; {'met' if share <= MORE else 'MISSED'}), {faster:.2f} × decoding")  # fmt: skip
    for session in sessions.values():
        session.close()
    return {row[0]: row[1:] for row in rows}


def main() -> None:
    """Run the benchmark."""
    options = common.parser(__doc__)
    common.add_model(options)
    options.add_argument("--parts", default=",".join(PARTS))
    options.add_argument("--task", default="sst2,banking77,e2e_nlg", help="shared tasks (default: %(default)s)")
    options.add_argument("--rows", type=int, default=1500, help="train rows")
    options.add_argument("--test", type=int, default=500, help="test rows")
    options.add_argument("--epochs", type=float, default=3.0)
    options.add_argument("--tokens", type=int, default=150_000, help="that a student's training takes, either way")
    options.add_argument("--kinds", nargs="*", default=KINDS, help="quantizations")
    options.add_argument("--teacher", default="", help="of `teach`, say rag(k=2); by default 16 demonstrations")
    options.add_argument("--student", nargs="+", default=["distill"], help="of `teach`: how it is made, in stages")
    options.add_argument("--shapes", nargs="*", default=SHAPES, help="students; of the first, `composed` is made")
    options.add_argument("--rates", nargs="*", type=float, default=RATES, help="learning rates of students' trainings")
    options.add_argument("--unlabelled", type=int, default=2500, help="prompts of further train rows")
    options.add_argument("--repeats", type=int, default=5, help="of each timing")
    options.add_argument("--home", type=Path, default=None, help="keep what is trained here")
    options.add_argument("--seed", type=int, default=0)
    options = options.parse_args()
    made: dict[str, Any] = {}
    print(common.machine_line(where := common.machine(common.computing())))
    with tempfile.TemporaryDirectory() as fresh:
        for name in options.task.split(","):
            bench = Bench(options, name, options.home or Path(fresh))
            made[name] = {part: globals()[part](bench) for part in PARTS if part in options.parts.split(",")}
    common.finish("compression", {"machine": where, "model": options.model, "rows": options.rows,
                                  "seed": options.seed, "tasks": made})  # fmt: skip


if __name__ == "__main__":
    main()
