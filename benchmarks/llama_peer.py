"""What llama.cpp makes of a GGUF: quantized by its own tool, scored and timed. Not a benchmark by itself.

`benchmarks/compression.py --parts peers` runs it with an interpreter that has llama-cpp-python, gives it JSON on stdin
and reads JSON from the last line of stdout. It imports nothing of whet.
"""

from __future__ import annotations

import ctypes
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

FILE_TYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}  # llama.cpp's numbers of file types


def quantized(source: Path, kind: str) -> Path:
    """The GGUF quantized by llama.cpp, embedding included."""
    made = source.with_name(f"{source.stem}-{kind}.gguf")
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = FILE_TYPES[kind], 2
    if llama_cpp.llama_model_quantize(str(source).encode(), str(made).encode(), ctypes.byref(settings)):
        raise SystemExit(f"llama.cpp could not quantize to {kind}")
    return made


def label_of(model: Any, prompt: list[int], labels: list[list[int]]) -> int:
    """The label whose whole answer, its end included, is likeliest; the prompt is read once."""
    scores = []
    model.reset()
    model.eval(prompt)
    first = model.scores[model.n_tokens - 1].astype(np.float64)
    for tokens in labels:
        model.n_tokens = len(prompt)
        logits, total = first, 0.0
        for n, token in enumerate(tokens):
            total += float(logits[token] - np.logaddexp.reduce(logits))
            if n + 1 < len(tokens):
                model.eval([token])
                logits = model.scores[model.n_tokens - 1].astype(np.float64)
        scores.append(total)
    return max(range(len(labels)), key=scores.__getitem__)


def speed(model: Any, prompt: str, new: int, repeats: int) -> tuple[float, float]:
    """Median (decoded, read) tokens a second."""
    tokens = model.tokenize(prompt.encode(), add_bos=False, special=True)
    read, decoded = [], []
    for _ in range(repeats + 1):
        model.reset()
        begun = time.perf_counter()
        model.eval(tokens)
        then = time.perf_counter()
        last = int(model.scores[model.n_tokens - 1].argmax())
        for _ in range(new):
            model.eval([last])
            last = int(model.scores[model.n_tokens - 1].argmax())
        read.append(len(tokens) / (then - begun))
        decoded.append(new / (time.perf_counter() - then))
    return statistics.median(decoded[1:]), statistics.median(read[1:])


def main() -> None:
    """Quantize, answer and time, kind by kind."""
    asked = json.load(sys.stdin)
    found: dict[str, Any] = {}
    for kind in ["as exported", *asked["kinds"]]:
        file = Path(asked["gguf"]) if kind == "as exported" else quantized(Path(asked["gguf"]), kind)
        model = llama_cpp.Llama(str(file), n_ctx=2048, n_batch=512, n_threads=asked["threads"],
                                n_threads_batch=asked["threads"], logits_all=False, verbose=False)  # fmt: skip
        end = model.token_eos()
        labels = [[*model.tokenize(x.encode(), add_bos=False, special=False), end] for x in asked["labels"]]
        answers = []
        for prompt in asked["prompts"]:
            tokens = model.tokenize(prompt.encode(), add_bos=False, special=True)
            if labels:
                answers.append(asked["labels"][label_of(model, tokens, labels)])
                continue
            made: list[int] = []
            for token in model.generate(tokens, temp=0.0, top_k=1, reset=True):
                if token == end or len(made) >= asked["most"]:
                    break
                made.append(token)
            answers.append(model.detokenize(made).decode(errors="replace").strip())
        decoded, _ = speed(model, asked["short"], asked["new"], asked["repeats"])
        _, read = speed(model, asked["long"], 1, asked["repeats"])
        found[kind] = {"bytes": file.stat().st_size, "answers": answers, "decoded": decoded, "read": read}
        assert math.isfinite(decoded)
        del model
    print(json.dumps(found))


if __name__ == "__main__":
    main()
