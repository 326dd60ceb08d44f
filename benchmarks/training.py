"""Training: LoRA (and full) steps of whet's loop against TRL's SFTTrainer, in one run.

Short rows are SST-2 sentences in the chat template, as `whet improve` renders them; long rows are xquad_en questions
behind their passage and others, 400 tokens and more. Speed is *real* tokens a second: the tokens of the rows trained
on, padding left out, each row counted whole on every side, also where whet computes a shared beginning once. The peers
are TRL's SFTTrainer as it comes (batch 8, gradient checkpointing), with as many rows a step as whet takes, with its
packing as it comes (8 sequences of 1,024 tokens a step), and with one of them a step, which suits a CPU better: its
attention is over all of a step at once where there is no kernel for sequences of their own. All sides use the same
weights, rows, dtype, threads and LoRA (rank 16 on all linear layers). The first step of every side is not timed. Steps
differ in size, which the table says: on a GPU that a small step leaves idle, that alone makes tokens faster. The sides
take --repeat turns, one after the other, and medians of the turns are printed, as machines differ from minute to
minute; TRL with 8 sequences of 1,024 tokens a step, which takes a CPU longer than all others, has one turn.

Also: the share of the operations limit (4·N a token for LoRA, 6·N for full training) against the matmul peak measured
just before, on long rows with nothing shared; and the peak memory of one step of 4,096 tokens, each side in a process
of its own.

    .venv/bin/python benchmarks/training.py [--steps 6] [--dtype float32] [--skip memory,full]
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import common

ASKED = {"short, TRL": 5.0, "short, TRL packed": 3.0, "short, TRL packed singly": 3.0, "long, TRL packed": 2.0,
         "long, TRL packed singly": 2.0}  # fmt: skip
LIMIT = {"long, whet, nothing shared": 4, "full, whet, nothing shared": 6}  # operations a weight and token, at least
LEAST_SHARE = 0.4
LONG = 400  # tokens that a long row has at least
PACKS, PACK = 8, 1024  # sequences of a step, and tokens of each, where TRL packs as it comes
MEMORY_TOKENS = 4096


@dataclass(frozen=True)
class Row:
    """One training row as text: the rendered prompt, the answer without its end, and its tokens in all."""

    prompt: str
    answer: str
    tokens: int


def short_rows(task: Any, tokenizer: Any, count: int) -> list[Row]:
    """SST-2 sentences behind the task's instruction."""
    return _rows(tokenizer, [(task.instruction, e.prompt, e.completion) for e in task.train[:count]])


def long_rows(task: Any, tokenizer: Any, count: int) -> list[Row]:
    """xquad_en questions behind their own passage and others, the last of which reaches 400 tokens most closely."""
    texts = [json.loads(line) for line in (task.folder / "documents.jsonl").read_text(encoding="utf-8").splitlines()]
    by_id = {t["id"]: t["text"] for t in texts}
    sizes = dict(zip(by_id, (len(t) for t in tokenizer(list(by_id.values()))["input_ids"]), strict=True))
    draw = random.Random(0)
    examples = draw.sample([e for e in task.train if e.evidence and sizes[e.evidence[0][0]] < LONG], count)
    made = []
    for example in examples:
        chosen = [example.evidence[0][0]]
        while (lacking := LONG - sum(sizes[c] for c in chosen)) > 0:
            others = [i for i in draw.sample(list(by_id), 20) if i not in chosen]
            chosen.append(min(others, key=lambda i: (sizes[i] < lacking, abs(sizes[i] - lacking))))
        draw.shuffle(chosen)
        made.append((task.instruction, "\n\n".join([*(by_id[i] for i in chosen), example.prompt]), example.completion))
    return _rows(tokenizer, made)


def _rows(tokenizer: Any, parts: Sequence[tuple[str, str, str]]) -> list[Row]:
    from whet.prompt import messages, render, takes_system

    system = takes_system(tokenizer)
    prompts = [render(tokenizer, messages(i, (), question), system=system) for i, question, _ in parts]
    sizes = [len(t) for t in tokenizer([p + a for p, (_, _, a) in zip(prompts, parts, strict=True)])["input_ids"]]
    return [Row(p, a, size + 1) for p, (_, _, a), size in zip(prompts, parts, sizes, strict=True)]


# --- the two sides --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """What a side did: real tokens and seconds of its timed steps, computed tokens, and the first step's loss.

    Where a share of the limit is asked for, `peak` are the operations a second of products, measured just before.
    """

    tokens: int
    seconds: float
    computed: int
    loss: float
    steps: int = 1
    peak: float = 0.0

    @property
    def rate(self) -> float:
        """Real tokens per second."""
        return self.tokens / self.seconds


def whet_side(
    options: Any, rows: Sequence[Row], batch: int, steps: int, kind: str = "lora", shared: bool = True
) -> Ran:
    """whet's loop; without `shared`, nothing is computed once for several rows."""
    from whet.engine import prefix
    from whet.train import batches, loop
    from whet.train.adapters import Adapter, adapted
    from whet.train.losses import NextToken

    module, tokenizer = common.open_model(options.model, options.dtype)
    encoded = [
        prefix.Row(tuple(tokenizer(r.prompt)["input_ids"]),
                   ((*tokenizer(r.answer)["input_ids"], tokenizer.eos_token_id),)) for r in rows
    ]  # fmt: skip
    of_step = batches.steps(encoded, batch, 0)
    beats: list[loop.Beat] = []
    whole = prefix.arrange
    batches.prefix.arrange = whole if shared else partial(whole, least=10**9)
    try:
        with adapted(module, Adapter(kind), 0) as tuned:
            settings = loop.Settings(loop.Schedule(1e-4, steps + 1))
            loop.train(tuned, of_step, NextToken(), settings, beat=beats.append)
    finally:
        batches.prefix.arrange = whole
    real = sum(len(r.prompt) + len(r.continuations[0]) for n in range(1, steps + 1) for r in of_step(n))
    first, last = beats[0], beats[-1]
    return Ran(real, last.seconds - first.seconds, last.tokens - first.tokens, first.loss, steps)


def trl_side(options: Any, rows: Sequence[Row], batch: int, steps: int, packing: bool = False) -> Ran:
    """TRL's SFTTrainer with completion-only loss, as it comes but for dtype, device and reporting."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    module, tokenizer = common.open_model(options.model, options.dtype)
    half = str(module.dtype) == "torch.bfloat16"
    data = Dataset.from_list([{"prompt": r.prompt, "completion": r.answer} for r in rows])
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

    sizes: list[int] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        settings = SFTConfig(
            folder, max_steps=steps + 1, per_device_train_batch_size=batch, packing=packing, learning_rate=1e-4,
            completion_only_loss=True, bf16=half, use_cpu=module.device.type == "cpu", report_to=[],
            disable_tqdm=True, save_strategy="no", logging_steps=1, dataloader_pin_memory=False,
        )  # fmt: skip
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0)
        trainer = SFTTrainer(
            module, settings, train_dataset=data, processing_class=tokenizer, peft_config=lora, callbacks=[Clock()]
        )
        collate = trainer.data_collator

        def counted(features: Any) -> Any:
            made = collate(features)
            mask = made.get("attention_mask")
            sizes.append(int(mask.sum()) if mask is not None else made["input_ids"].numel())
            return made

        trainer.data_collator = counted
        trainer.train()
        loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    real = sum(sizes[1 : steps + 1])
    return Ran(real, marks[-1] - marks[0], real, loss, steps)


def spread(values: Sequence[float], form: str) -> str:
    """The median, with the least and the most where there are several."""
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} [{format(min(values), form)}, {format(max(values), form)}]"


# --- memory, each side in a process of its own ----------------------------------------------------------------------


def memory_rows(options: Any, tokenizer: Any) -> list[Row]:
    """Long rows of 4,096 tokens in all, within one row."""
    rows = long_rows(common.load_task(options.tasks, "xquad_en"), tokenizer, 16)
    taken: list[Row] = []
    while sum(r.tokens for r in taken) < MEMORY_TOKENS:
        taken.append(rows[len(taken)])
    return taken


def peak_memory(options: Any, side: str) -> float:
    """Peak resident megabytes of a process that takes two steps of 4,096 tokens on one side."""
    command = [sys.executable, __file__, "--model", options.model, "--dtype", options.dtype, "--tasks",
               str(options.tasks), "--memory-of", side]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        common.stop(f"the memory run of {side} failed: {run.stderr.splitlines()[-1] if run.stderr else 'no message'}")
    return float(run.stdout.splitlines()[-1])


def memory_of(options: Any) -> None:
    """Take the steps and print this process's peak, in MB."""
    from whet import probe

    _, tokenizer = common.open_model(options.model, options.dtype)
    rows = memory_rows(options, tokenizer)
    run = {"whet": whet_side, "trl": trl_side}[options.memory_of]
    run(options, rows, len(rows), 1)
    print(probe.peak_memory() / 1e6)


# --- the run --------------------------------------------------------------------------------------------------------


def arguments() -> Any:
    options = common.parser(__doc__)
    common.add_model(options)
    common.add_timing(options)
    options.add_argument("--steps", type=int, default=6, help="timed steps of each side")
    options.add_argument("--skip", default="", help="parts to leave out: short, long, full, memory, TRL packed")
    options.add_argument("--memory-of", default="", help="only take two steps on this side and print the peak memory")
    return options.parse_args()


def agreement(options: Any, rows: Sequence[Row]) -> tuple[float, float]:
    """Loss of the first step on the same eight rows, on both sides."""
    return whet_side(options, rows[:8], 8, 1).loss, trl_side(options, rows[:8], 8, 1).loss


def main() -> None:
    """Run the benchmark. Exits 1 where the two sides disagree about the loss."""
    options = arguments()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.memory_of:
        memory_of(options)
        return
    import torch

    module, tokenizer = common.open_model(options.model, options.dtype)
    dtype = str(module.dtype).removeprefix("torch.")
    weights = sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))
    weights -= module.lm_head.weight.numel() if module.config.tie_word_embeddings else 0
    where = common.machine(dtype, torch.get_num_threads())
    kind, device = module.dtype, module.device
    del module
    few = max(2, options.steps // 2)
    fill = 2 * PACKS * PACK * (few + 1)  # what the packed steps take of short rows, as they have 40 tokens and more
    short = short_rows(common.load_task(options.tasks, "sst2"), tokenizer, max(32 * (options.steps + 1), fill // 40))
    lengthy = long_rows(common.load_task(options.tasks, "xquad_en"), tokenizer, 2 * PACKS * PACK * (few + 1) // LONG)
    packed = partial(trl_side, packing=True)
    sides: dict[str, Callable[[], Ran]] = {
        "short, whet": lambda: whet_side(options, short, 32, options.steps),
        "short, TRL": lambda: trl_side(options, short, 8, options.steps),
        "short, TRL, 32 rows": lambda: trl_side(options, short, 32, few),
        "short, TRL packed": lambda: packed(options, short, PACKS, few),
        "short, TRL packed singly": lambda: packed(options, short, 1, options.steps),
        "long, whet": lambda: whet_side(options, lengthy, 8, few),
        "long, TRL packed": lambda: packed(options, lengthy, PACKS, few),
        "long, TRL packed singly": lambda: packed(options, lengthy, 1, options.steps),
        "long, whet, nothing shared": lambda: whet_side(options, lengthy, 8, few, shared=False),
        "full, whet, nothing shared": lambda: whet_side(options, lengthy, 4, few, kind="full", shared=False),
    }
    skipped = set(options.skip.split(","))
    turns: list[dict[str, Ran]] = []
    for turn in range(options.repeat):
        turns.append({})
        for name, run in sides.items():
            if skipped & set(name.split(", ")) or (turn and name.endswith("TRL packed")):
                continue
            peak = common.matmul_peak(kind, device) if name in LIMIT else 0.0
            turns[-1][name] = replace(run(), peak=peak)
            print(f"  turn {turn + 1} of {options.repeat}, {name}: {turns[-1][name].rate:.0f} real tokens/s",
                  file=sys.stderr, flush=True)  # fmt: skip
    mine, theirs = agreement(options, short)
    memory = {} if "memory" in options.skip else {side: peak_memory(options, side) for side in ("whet", "trl")}
    report(options, where, turns, weights, (mine, theirs), memory)


def report(
    options: Any, where: Any, turns: Sequence[dict[str, Ran]], weights: int, losses: tuple[float, float],
    memory: dict[str, float],
) -> None:  # fmt: skip
    """Print the table, the shares and the check."""
    first, middle = turns[0], statistics.median
    rates = {name: [t[name].rate for t in turns if name in t] for name in first}
    ratios = {name: [t[f"{name.split(',')[0]}, whet"].rate / t[name].rate for t in turns if name in t]
              for name in first if "TRL" in name}  # fmt: skip
    print(f"training: LoRA of rank 16 on all linear layers; {options.steps} timed steps, half as many on long rows; "
          f"medians of {len(turns)} turns, [least, most]")  # fmt: skip
    print(common.machine_line(where) + "\n")
    print(common.table(["side", "tokens a step", "seconds", "real tokens/s", "whet is x faster", "asked"], [
        [name, round(r.tokens / r.steps), f"{middle(t[name].seconds for t in turns if name in t):.1f}",
         spread(rates[name], ".0f"),
         spread(ratios[name], ".1f") if name in ratios else None,
         common.verdict(middle(ratios[name]), ASKED[name]) if name in ASKED else None] for name, r in first.items()
    ]) + "\n")  # fmt: skip
    shares = {}
    for name, per in LIMIT.items():
        if name in first:
            shares[name] = [per * weights * t[name].computed / t[name].seconds / t[name].peak for t in turns]
            print(f"ceiling, {name}: {spread(shares[name], '.0%')} of {per}·N at the matmul peak of "
                  f"{spread([t[name].peak / 1e9 for t in turns], '.0f')} G/s "
                  f"({common.verdict(middle(shares[name]), LEAST_SHARE)})")  # fmt: skip
    if memory:
        print(f"peak memory, LoRA, a step of {MEMORY_TOKENS} tokens: whet {memory['whet']:.0f} MB, TRL "
              f"{memory['trl']:.0f} MB ({'yes' if memory['whet'] <= memory['trl'] else 'NO'})")  # fmt: skip
    agree = abs(losses[0] - losses[1]) < (2e-3 if where["dtype"] == "float32" else 3e-2)
    print(f"check: loss of the first step on the same 8 rows: whet {losses[0]:.4f}, TRL {losses[1]:.4f}")
    print("the sides computed the same thing" if agree else "THE SIDES DISAGREE: the times mean nothing")
    common.finish("training", {
        "machine": where, "model": options.model, "rates": rates, "ratios": ratios,
        "asked": ASKED, "shares": shares, "peaks": {name: [t[name].peak for t in turns] for name in shares},
        "memory_mb": memory, "losses": losses, "agree": agree,
    })  # fmt: skip
    raise SystemExit(0 if agree else 1)


if __name__ == "__main__":
    main()
