"""Label scoring: log-probabilities of a task's labels behind many demonstrations that all prompts share.

Measures whet's scoring of SST-2 sentences behind 16 fixed demonstrations (chat template), in sentences per second.
Peers, with the same loaded weights, dtype and threads:
  transformers  plain forwards over right-padded batches of 16 sorted by length; both one-token labels are read off one
                forward, causal attention needs no mask for padding on the right, logits only where they are read.
  lm-eval       lm-evaluation-harness's HF backend at batch 16 on the same rendered prompts; its own sorting, padding
                and reuse of one forward for one-token labels. Rendering is left out of its time.
whet and transformers are timed from chats to log-probabilities. Peers take long on a CPU and cost the same for every
sentence, so they run on the first --peer-rows sentences and are compared by sentences per second; whet's figure for
just those sentences stands beside.

    .venv/bin/python benchmarks/scoring.py [--rows 400] [--peer-rows 48] [--repeat 3]
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import common

LEAST = {"transformers": 8.0, "lm-eval": 5.0}
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.5}  # greatest difference of log-probabilities that rounding explains
Scores = list[list[float]]  # [prompts][labels]


def whet_scores(session: Any, chats: Sequence[Any], labels: Sequence[str]) -> Scores:
    """Log-probability of each label behind each chat, by whet."""
    return [[s.logprob for s in row] for row in session.score(chats, [labels] * len(chats))]


def transformers_scores(
    module: Any, tokenizer: Any, chats: Sequence[Any], labels: Sequence[str], batch: int
) -> Scores:
    """The same by padded batches of whole prompts. A label's last token is predicted, never read."""
    import torch

    prompts = tokenizer(rendered(tokenizer, chats), add_special_tokens=False)["input_ids"]
    answers = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in labels]
    readings = {(r, tuple(a[:-1])) for r in range(len(prompts)) for a in answers}
    order = sorted(readings, key=lambda reading: (len(prompts[reading[0]]) + len(reading[1]), reading))
    results = [[0.0] * len(labels) for _ in prompts]
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        lines = [[*prompts[r], *read] for r, read in part]
        ids = torch.full((len(part), max(map(len, lines))), tokenizer.pad_token_id or 0)
        for i, line in enumerate(lines):
            ids[i, : len(line)] = torch.tensor(line)
        places = sorted({p for (r, _), line in zip(part, lines, strict=True)
                         for p in range(len(prompts[r]) - 1, len(line))})  # fmt: skip
        with torch.inference_mode():
            logits = module(input_ids=ids.to(module.device), use_cache=False,
                            logits_to_keep=torch.tensor(places, device=module.device)).logits  # fmt: skip
        for i, (r, read) in enumerate(part):
            first = places.index(len(prompts[r]) - 1)
            logprobs = logits[i, first : first + len(read) + 1].float().log_softmax(-1)
            for n, answer in enumerate(answers):
                if tuple(answer[:-1]) == read:
                    results[r][n] = sum(logprobs[range(len(answer)), answer].tolist())
    return results


def rendered(tokenizer: Any, chats: Sequence[Any]) -> list[str]:
    """Chats as whet sends them."""
    from whet.prompt import render, takes_system

    system = takes_system(tokenizer)
    return [render(tokenizer, chat, system=system) for chat in chats]


def harness_scorer(
    module: Any, tokenizer: Any, batch: int
) -> Callable[[Sequence[str], Sequence[str]], Scores] | None:
    """The harness's scoring of rendered prompts, or None where lm_eval is not installed."""
    if find_spec("lm_eval") is None:
        return None
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    backend = HFLM(pretrained=module, tokenizer=tokenizer, batch_size=batch)

    def score(prompts: Sequence[str], labels: Sequence[str]) -> Scores:
        requests = [Instance("loglikelihood", {}, (prompt, label), n) for prompt in prompts
                    for n, label in enumerate(labels)]  # fmt: skip
        values = iter(backend.loglikelihood(requests, disable_tqdm=True))
        return [[next(values)[0] for _ in labels] for _ in prompts]

    return score


def difference(ours: Scores, theirs: Scores, margins: bool) -> tuple[float, float]:
    """(greatest absolute difference of log-probabilities, share of prompts with the same best label).

    With `margins` the differences between labels are compared: the harness moves the line break that ends the prompt
    to the label's side, which adds the same term to every label.
    """
    worst = same = 0.0
    for a, b in zip(ours, theirs, strict=False):
        less_a, less_b = (a[0], b[0]) if margins else (0.0, 0.0)
        worst = max(worst, *(abs((x - less_a) - (y - less_b)) for x, y in zip(a, b, strict=True)))
        same += a.index(max(a)) == b.index(max(b))
    return worst, same / len(theirs)


def operations(session: Any, chats: Sequence[Any], labels: Sequence[str]) -> tuple[float, int]:
    """(operations of one scoring without attention, unique tokens): 2·N per token computed, and the output layer."""
    from whet.engine import prefix

    module = session.module
    answers = tuple(session.encode_answer(label, False) for label in labels)
    forest = prefix.arrange([prefix.Row(prompt, answers) for prompt in session.encode(chats)])
    head = module.get_output_embeddings().weight
    tables = {id(w): w.numel() for w in (head, module.get_input_embeddings().weight)}
    body = sum(p.numel() for p in module.parameters()) - sum(tables.values())
    read = sum(len({before for target in unit.targets for before, _ in target}) for unit in forest.units)
    return 2.0 * body * forest.unique_tokens + 2.0 * head.numel() * read, forest.unique_tokens


def exact(options: Any, chats: Sequence[Any], labels: Sequence[str]) -> dict[str, float]:
    """Greatest difference from each peer in float32, where rounding hides nothing."""
    from whet.engine.torch import TorchSession

    module, tokenizer = common.open_model(options.model, "float32")
    ours = whet_scores(TorchSession(module, tokenizer), chats, labels)
    found = {"transformers": difference(ours, transformers_scores(module, tokenizer, chats, labels, 16), False)[0]}
    harness = harness_scorer(module, tokenizer, 16)
    if harness:
        found["lm-eval"] = difference(ours, harness(rendered(tokenizer, chats), labels), True)[0]
    return found


def arguments() -> Any:
    options = common.parser(__doc__)
    common.add_model(options)
    common.add_timing(options)
    options.add_argument("--rows", type=int, default=400, help="sentences that whet scores")
    options.add_argument("--peer-rows", type=int, default=48, help="sentences that the peers score (0: all)")
    options.add_argument("--demonstrations", type=int, default=16)
    options.add_argument("--batch", type=int, default=16, help="batch of the peers")
    options.add_argument("--check-rows", type=int, default=8, help="sentences also checked in float32 (0: none)")
    return options.parse_args()


def main() -> None:
    """Run the benchmark."""
    options = arguments()
    task = common.load_task(options.tasks, "sst2")

    import torch

    from whet.engine.torch import TorchSession

    module, tokenizer = common.open_model(options.model, options.dtype)
    dtype = str(module.dtype).removeprefix("torch.")
    where = common.machine(dtype, torch.get_num_threads())
    chats = common.chats(task, common.demonstrations(task, options.demonstrations), options.rows)
    few = chats[: options.peer_rows or len(chats)]
    texts = rendered(tokenizer, few)
    session = TorchSession(module, tokenizer)
    harness = harness_scorer(module, tokenizer, options.batch)

    def runs(many: Sequence[Any], some: Sequence[Any]) -> dict[str, Callable[[], Scores]]:
        found: dict[str, Callable[[], Scores]] = {"whet": lambda: whet_scores(session, many, task.labels)}
        if len(some) < len(many):
            found["whet, the peers' sentences"] = lambda: whet_scores(session, some, task.labels)
        found["transformers"] = lambda: transformers_scores(module, tokenizer, some, task.labels, options.batch)
        if harness:
            found["lm-eval"] = lambda: harness(texts[: len(some)], task.labels)
        return found

    for warm in runs(few[: options.batch], few[: options.batch]).values():
        warm()
    timed = common.alternate(runs(chats, few), options.repeat)
    report(options, where, session, chats, few, timed, task.labels, common.matmul_peak(module.dtype, module.device))


def report(
    options: Any, where: dict[str, Any], session: Any, chats: Sequence[Any], few: Sequence[Any],
    timed: dict[str, common.Timed], labels: Sequence[str], peak: float,
) -> None:  # fmt: skip
    """Check that all sides computed the same thing, and print the figures. Exits 1 where they did not."""
    counts = {name: len(chats) if name == "whet" else len(few) for name in timed}
    rates = {name: counts[name] / t.median for name, t in timed.items()}
    peers = [name for name in LEAST if name in timed]
    checks = {p: difference(timed["whet"].result, timed[p].result, p == "lm-eval") for p in peers}
    work, tokens = operations(session, chats, labels)
    share = work / timed["whet"].median / peak
    apart = options.check_rows and where["dtype"] != "float32"
    strict = exact(options, chats[: options.check_rows], labels) if apart else {}
    lengths = session.count(few)

    print(f"scoring: {len(labels)} labels behind {options.demonstrations} fixed demonstrations, "
          f"{min(lengths)} to {max(lengths)} tokens a prompt; median of {options.repeat}, taking turns")  # fmt: skip
    print(common.machine_line(where))
    if len(few) < len(chats):
        print(f"peers ran on the first {len(few)} of {len(chats)} sentences: compared by sentences per second")
    print()
    rows = [
        [name, counts[name], f"{t.median:.2f}", f"{rates[name]:.2f}",
         f"{rates['whet'] / rates[name]:.1f}" if name in peers else None,
         common.verdict(rates["whet"] / rates[name], LEAST[name]) if name in peers else None]
        for name, t in timed.items()
    ]  # fmt: skip
    print(common.table(["side", "sentences", "seconds", "sentences/s", "whet is x faster", "asked"], rows) + "\n")
    if "lm-eval" not in timed:
        print('lm-eval: skipped, it is not installed: pip install -e ".[bench]"')
    print(f"ceiling: {tokens} unique tokens, {work / 1e12:.2f} T operations at {work / timed['whet'].median / 1e9:.0f} "
          f"G/s = {share:.0%} of the matmul peak ({peak / 1e9:.0f} G/s)")  # fmt: skip
    limit = TOLERANCE[where["dtype"]]
    for peer, (worst, same) in checks.items():
        what = "label margins" if peer == "lm-eval" else "log-probabilities"
        more = f"; in float32 {strict[peer]:.2g} on {options.check_rows}" if peer in strict else ""
        print(f"check, {peer}: {what} differ by at most {worst:.2g} ({where['dtype']}), "
              f"same label on {same:.1%} of {len(few)}{more}")  # fmt: skip
    agree = all(w <= limit for w, _ in checks.values()) and all(w <= TOLERANCE["float32"] for w in strict.values())
    print("the sides computed the same thing" if agree else "THE SIDES DISAGREE: the times mean nothing")
    common.finish("scoring", {
        "machine": where, "model": options.model, "rows": counts, "prompt_tokens": [min(lengths), max(lengths)],
        "demonstrations": options.demonstrations, "batch": options.batch,
        "seconds": {name: list(t.seconds) for name, t in timed.items()}, "sentences_per_second": rates,
        "ratio": {p: rates["whet"] / rates[p] for p in peers}, "asked": LEAST,
        "unique_tokens": tokens, "operations": work, "matmul_peak": peak, "share_of_peak": share,
        "difference": {p: w for p, (w, _) in checks.items()}, "same_label": {p: s for p, (_, s) in checks.items()},
        "difference_float32": strict, "agree": agree,
    })  # fmt: skip
    raise SystemExit(0 if agree else 1)


if __name__ == "__main__":
    main()
