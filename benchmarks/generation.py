"""Generation: a few new tokens for many prompts that share their beginning.

Measures whet's greedy generation of 8 new tokens for 64 SST-2 prompts whose first 320 tokens (instruction and
demonstrations) are the same. Peer: transformers' `model.generate` at batch 16, prompts sorted by length and padded on
the left, with the same loaded weights, dtype and threads. Both sides are timed from chats to text and always generate
all the tokens: the end of the turn stops neither.

    .venv/bin/python benchmarks/generation.py [--rows 64] [--new 8] [--repeat 3]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from os.path import commonprefix
from typing import Any

import common

LEAST = 5.0
SAME = {"float32": 0.99, "bfloat16": 0.7}  # least share of equal tokens: after one near tie a row goes another way
Tokens = list[list[int]]


def whet_generator(module: Any, tokenizer: Any, new: int) -> Callable[[Sequence[Any]], Tokens]:
    """whet's generation of `new` tokens; gives token ids, which a session itself turns into text."""
    from whet.engine import Sampling
    from whet.engine.torch import TorchSession

    class Recording(TorchSession):
        """A session that never stops early and remembers the tokens of its answers."""

        def __init__(self) -> None:
            super().__init__(module, tokenizer)
            self.stop_ids, self.made = frozenset(), list[list[int]]()

        def _finish(self, tokens: list[int], sampling: Sampling) -> Any:
            self.made.append(list(tokens))
            return super()._finish(tokens, sampling)

    session = Recording()

    def generate(chats: Sequence[Any]) -> Tokens:
        session.made = []
        session.generate(chats, Sampling(max_tokens=new))
        return session.made

    return generate


def transformers_generator(module: Any, tokenizer: Any, new: int, batch: int) -> Callable[[Sequence[Any]], Tokens]:
    """`model.generate` over left-padded batches of prompts sorted by length."""
    import torch
    from transformers import GenerationConfig

    from whet.prompt import render, takes_system

    system = takes_system(tokenizer)
    pad = tokenizer.pad_token_id or 0
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=pad)
    # generate fills what its settings leave open from the model's own, and would end rows there.
    module.generation_config.eos_token_id = None

    def generate(chats: Sequence[Any]) -> Tokens:
        texts = [render(tokenizer, chat, system=system) for chat in chats]
        prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        results: Tokens = [[] for _ in prompts]
        for at in range(0, len(order), batch):
            part = order[at : at + batch]
            width = max(len(prompts[i]) for i in part)
            ids = torch.full((len(part), width), pad)
            mask = torch.zeros(len(part), width, dtype=torch.long)
            for n, i in enumerate(part):
                ids[n, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[n, width - len(prompts[i]) :] = 1
            with torch.inference_mode():
                out = module.generate(input_ids=ids.to(module.device), attention_mask=mask.to(module.device),
                                      generation_config=settings)  # fmt: skip
            for i, tokens in zip(part, out[:, width:].tolist(), strict=True):
                results[i] = tokens
            tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        return results

    return generate


def prompts_sharing(task: Any, tokenizer: Any, shared: int, count: int) -> tuple[list[Any], int]:
    """(chats, tokens they share): demonstrations until `shared` tokens are reached, the last one cut to size."""
    from whet.prompt import render, takes_system

    system = takes_system(tokenizer)

    def common_tokens(shown: Sequence[tuple[str, str]]) -> int:
        texts = [render(tokenizer, chat, system=system) for chat in common.chats(task, shown, 8)]
        return len(commonprefix(tokenizer(texts, add_special_tokens=False)["input_ids"]))

    wanted = 0
    while wanted < len(task.train) and common_tokens(common.demonstrations(task, wanted)) < shared:
        wanted += 1
    shown = list(common.demonstrations(task, wanted))
    while shown and " " in shown[-1][0] and common_tokens(shown) > shared:
        shown[-1] = (shown[-1][0].rsplit(" ", 1)[0], shown[-1][1])
    return common.chats(task, shown, count), common_tokens(shown)


def same(ours: Tokens, theirs: Tokens) -> tuple[float, float]:
    """(share of equal tokens, share of equal rows)."""
    pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs), sum(map(list.__eq__, ours, theirs)) / len(ours)


def exact(options: Any, chats: Sequence[Any]) -> float:
    """Share of equal tokens in float32, where near ties are rare."""
    module, tokenizer = common.open_model(options.model, "float32")
    ours = whet_generator(module, tokenizer, options.new)(chats)
    return same(ours, transformers_generator(module, tokenizer, options.new, options.batch)(chats))[0]


def arguments() -> Any:
    options = common.parser(__doc__)
    common.add_model(options)
    common.add_timing(options)
    options.add_argument("--rows", type=int, default=64, help="prompts")
    options.add_argument("--shared", type=int, default=320, help="tokens that all prompts begin with")
    options.add_argument("--new", type=int, default=8, help="new tokens for each prompt")
    options.add_argument("--batch", type=int, default=16, help="batch of the peer")
    options.add_argument("--check-rows", type=int, default=8, help="prompts also checked in float32 (0: none)")
    return options.parse_args()


def main() -> None:
    """Run the benchmark. Exits 1 where the two sides disagree."""
    options = arguments()
    task = common.load_task(options.tasks, "sst2")

    import torch

    module, tokenizer = common.open_model(options.model, options.dtype)
    dtype = str(module.dtype).removeprefix("torch.")
    where = common.machine(dtype, torch.get_num_threads())
    chats, shared = prompts_sharing(task, tokenizer, options.shared, options.rows)
    sides = {
        "whet": whet_generator(module, tokenizer, options.new),
        "transformers": transformers_generator(module, tokenizer, options.new, options.batch),
    }
    for side in sides.values():
        side(chats[: options.batch])
    timed = common.alternate({name: partial(side, chats) for name, side in sides.items()}, options.repeat)
    ours, theirs = timed["whet"], timed["transformers"]
    tokens, rows = same(ours.result, theirs.result)
    apart = options.check_rows and dtype != "float32"
    strict = exact(options, chats[: options.check_rows]) if apart else None
    ratio = theirs.median / ours.median
    agree = tokens >= SAME[dtype] and (strict is None or strict >= SAME["float32"])

    print(f"generation: {options.new} new tokens for {len(chats)} prompts that share their first {shared} tokens; "
          f"median of {options.repeat}, sides taking turns")  # fmt: skip
    print(common.machine_line(where) + "\n")
    made = len(chats) * options.new
    print(common.table(["side", "prompts", "seconds", "new tokens/s", "whet is x faster", "asked"], [
        ["whet", len(chats), f"{ours.median:.2f}", f"{made / ours.median:.1f}", None, None],
        [f"transformers generate, batch {options.batch}", len(chats), f"{theirs.median:.2f}",
         f"{made / theirs.median:.1f}", f"{ratio:.1f}", common.verdict(ratio, LEAST)],
    ]) + "\n")  # fmt: skip
    more = f"; in float32 {strict:.1%} of tokens on {options.check_rows} prompts" if strict is not None else ""
    print(f"check: {tokens:.1%} of greedy tokens and {rows:.1%} of rows are identical ({dtype}){more}")
    print("the sides computed the same thing" if agree else "THE SIDES DISAGREE: the times mean nothing")
    common.finish("generation", {
        "machine": where, "model": options.model, "rows": len(chats), "shared_tokens": shared, "new": options.new,
        "batch": options.batch, "seconds": {name: list(t.seconds) for name, t in timed.items()}, "ratio": ratio,
        "asked": LEAST, "same_tokens": tokens, "same_rows": rows, "same_tokens_float32": strict, "agree": agree,
    })  # fmt: skip
    raise SystemExit(0 if agree else 1)


if __name__ == "__main__":
    main()
