"""Whether what was exported answers like the System: it is read back by another loader and asked the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError

from whet import model as models
from whet import scorecard
from whet.compress.folder import dense
from whet.engine import Progress, Prompt, Sampling, Session
from whet.engine.prefix import Row, Tokens
from whet.engine.torch import TorchSession
from whet.errors import ArtifactError, WhetError
from whet.metrics import Metric
from whet.prompt import SLOT, render
from whet.retention import ALLOWED, Lost, loss
from whet.system import System
from whet.task import Example, Task

PROMPTS = 50
LENGTH = 32  # tokens of each answer that are compared
ROWS = 200  # of a task, to score both on
TEXT = 512  # tokens at most of a text whose likelihood is compared
ENOUGH = 0.95  # share of its tokens that an export must have in common; bf16 arithmetic alone costs 3 %, mistakes most
ROUGH = {"q8_0": 0.9, "q4_0": 0.5}  # where rounding costs more: 3.5 % and 29 % of SmolLM2-135M's
CONTEXT = 4096  # tokens at most of a prompt that is compared
LONGEST = 32_768  # tokens at most of a row that llama.cpp is asked: what it holds grows by each
_FORMS = ("What is {}?", "Write one sentence about {}.", "Name three facts about {}.\nNumber them.",
          'Is this a question: "{}"? Answer yes or no.', "{}: 12 + 345 = ?")  # fmt: skip
_THINGS = ("the sea", "a violin", "photosynthesis", "Zürich", "the year 1969", "서울", "a for-loop",
           "naïve café culture", "  two  spaces", "the letter é")  # fmt: skip
NEUTRAL = tuple(Example(str(n), form.format(thing)) for n, (form, thing) in
                enumerate((f, t) for f in _FORMS for t in _THINGS))  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """What a System scores on rows of a task, and what its export does, answering as it will when it is served.

    Where the format does not bind an answer to the labels, it writes one; `choosing` is then what it would score if it
    chose. `lost` compares the two; `own` does with the System asked as the export is (None: it always is): what that
    loses is not for what is left out.
    """

    task: str
    metric: str
    n: int
    system: float
    exported: float
    choosing: float | None
    lost: Lost
    own: Lost | None

    @property
    def kept(self) -> bool:
        """Whether the export is not worse by more than `ALLOWED`, by `stats.not_worse`."""
        return self.lost.ok


@dataclass(frozen=True)
class Check:
    """How like the System the export answers.

    `agreement` is the share of the System's greedy tokens that are the export's likeliest, too, behind the same
    beginning; `same` counts answers without a difference, `encoded` prompts that became the same tokens. `gap` is how
    much likelier than the System's token its own was to the export, in nats, at most: rounding makes tenths, a mistake
    whole nats.
    """

    by: str
    prompts: int
    tokens: int
    agreement: float
    same: int
    encoded: int
    gap: float
    note: str = ""
    scores: Scores | None = None
    unscored: str = ""  # why there are none
    enough: float = ENOUGH  # of `agreement`, for the type of the weights

    @property
    def good(self) -> bool:
        """Whether nothing but rounding seems to differ."""
        return self.agreement >= self.enough and self.encoded == self.prompts


@dataclass(frozen=True)
class Reopened:
    """An export, read back: its session, and the logits in front of each token of an answer [tokens, vocabulary]."""

    by: str
    session: Session
    encode: Callable[[Sequence[Prompt]], list[Tokens]]
    follow: Callable[[Tokens, Tokens], Any]
    note: str = ""


def _transformers(model: str, home: Path, note: str = "") -> Reopened:
    module, tokenizer = models.load(models.resolve(model), home, dtype=torch.float32)
    session = TorchSession(module, tokenizer)

    def follow(prompt: Tokens, answer: Tokens) -> Any:
        ids = torch.tensor([[*prompt, *answer]], device=module.device)
        with torch.inference_mode():
            return module(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().cpu().numpy()

    return Reopened(f"transformers {version('transformers')}", session, session.encode, follow, note)


def needed(system: System, rows: Sequence[Example], session: Session) -> int:
    """Tokens that the longest of the rows that are scored takes with its answer, as far as llama.cpp is to hold them.

    Texts in place of prompts are cut for every engine alike.
    """
    asked = [e for e in rows[:ROWS] if e.text is None]
    said = [text for e in asked for text in (*system.decoding.spoken, *e.choices, e.completion)]
    room = max(system.decoding.max_tokens, *session.count(sorted(set(said))), 0) if asked else 0
    return max(CONTEXT, min(LONGEST, room + max(session.count(system.prompts(asked)), default=0)))


def reopen(folder: Path, file: str | None, tokenizer: Any, home: Path, context: int = CONTEXT) -> Reopened | None:
    """Read an export back: a GGUF `file` by llama.cpp where it is installed, all else by transformers, in fp32.

    llama.cpp holds `context` tokens, as far as the model can. None where only llama.cpp can read the file, and is not
    installed.
    """
    if file is None:
        return _transformers(str(folder), home)
    with suppress(PackageNotFoundError):
        by = f"llama.cpp (llama-cpp-python {version('llama-cpp-python')})"
        from whet.export.llama import LlamaSession

        session = LlamaSession(folder / file, tokenizer, context, torch.get_num_threads())
        return Reopened(by, session, session.encode, lambda p, a: next(session.follow(p, [a])))
    note = "llama.cpp itself was not asked: pip install 'whet[llamacpp]'"
    try:
        return _transformers(str(folder / file), home, note)
    except (WhetError, RuntimeError, ValueError, KeyError, NotImplementedError):  # a family that it does not read
        return None


@dataclass(frozen=True)
class Told:
    """What a System answers: prompts, their tokens, and the likeliest tokens behind each, computed in fp32."""

    prompts: tuple[Prompt, ...]
    tokens: tuple[Tokens, ...]
    answers: tuple[Tokens, ...]


def told(system: System, examples: Sequence[Example], rounded: Sequence[str] = ()) -> Told:
    """The System's greedy answers. Its weights are as it has them; fp32 keeps its own rounding out of the check.

    Only inputs of `rounded` layers are rounded to 8 bits, as the export has it.
    """
    module, tokenizer = models.load(system.model, system.home)
    module = dense(module, module.dtype).float()
    for name in rounded:
        module.get_submodule(name).register_forward_pre_hook(_rounds)
    session = TorchSession(module, tokenizer)
    length = min(LENGTH, max(8, system.decoding.max_tokens))
    session.context = min(session.context, CONTEXT)
    prompts, _ = system.fitting(examples, session, [length + 1] * len(examples))
    tokens = session.encode(prompts)
    made = session.generate_rows([Row(t) for t in tokens], Sampling(length))
    return Told(tuple(prompts), tuple(tokens), tuple(answer for answer, _ in made))


def _rounds(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What goes into a layer in 8 bits, row by row, by compressed-tensors' step: another step is noise of its own."""
    step = given[0].abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127.5
    return (given[0] / step).round().clamp(-128, 127) * step


def requested(system: System, sent: Mapping[str, Any], other: Reopened) -> None:
    """Raise ArtifactError where the export's template does not make the System's prompt of the request as it stands.

    It is written as a server does it, which breaks up no markers and knows no other day than today.
    """
    session: Any = other.session  # over a model: it has a tokenizer
    *before, last = sent["messages"]
    example = NEUTRAL[0]
    meant = render(session.tokenizer, system.prompts([example])[0], system=session.system)
    try:
        made = str(session.tokenizer.apply_chat_template(
            [*before, {**last, "content": last["content"].replace(SLOT, example.prompt)}], tokenize=False,
            add_generation_prompt=True, **sent.get("chat_template_kwargs", {}),
        ))  # fmt: skip
    except TemplateError as error:
        made = str(error)
    if made != meant:
        raise ArtifactError(
            "the request does not become the System's prompt", expected=repr(meant[-200:]), found=repr(made[-200:]),
            do="--no-check writes it all the same",
        )  # fmt: skip


def compare(told: Told, other: Reopened, progress: Progress | None = None) -> Check:
    """What the System answered against what the export would have said at each place."""
    theirs = other.encode(told.prompts)
    hits = tokens = same = 0
    gap = 0.0
    for n, (prompt, answer) in enumerate(zip(theirs, told.answers, strict=True)):
        logits = np.asarray(other.follow(prompt, answer), dtype=np.float64)
        lost = logits.max(-1) - logits[np.arange(len(answer)), answer]
        right = int((logits.argmax(-1) == np.array(answer)).sum())
        hits, tokens, gap = hits + right, tokens + len(answer), max(gap, float(lost.max()))
        same += right == len(answer)
        if progress:
            progress(n + 1, len(theirs))
    encoded = sum(a == b for a, b in zip(told.tokens, theirs, strict=True))
    return Check(other.by, len(theirs), tokens, hits / tokens, same, encoded, round(gap, 4), other.note)


def score(
    whole: System, asked: System, bound: bool, name: str, rows: Sequence[Example], metric: Metric, other: Reopened,
    progress: Progress | None = None,
) -> Scores:  # fmt: skip
    """What the `whole` System scores on the first `ROWS` of rows, and what the export does, `asked` as it can be.

    `bound`: a server that is asked so chooses among the labels; otherwise it writes its answer.
    """
    rows, likely = rows[:ROWS], metric.name == "perplexity"
    if likely:
        rows = [_cut(e, other.session) for e in rows]

    def card(system: System, session: Session) -> scorecard.Scorecard:
        return scorecard.evaluate(system, rows, metric, session=session, progress=progress)

    served, choosing = asked, None
    if asked.decoding.closed and not (bound or likely):
        served = replace(asked, decoding=replace(asked.decoding, closed=False, temperature=0.0))
        choosing = card(asked, other.session).score
    before, after = card(whole, whole.session), card(served, other.session)
    alike = None if served == whole else card(served, whole.session)
    own = loss(name, alike, after, metric, ALLOWED) if alike else None
    return Scores(name, metric.name, len(rows), before.score, after.score, choosing,
                  loss(name, before, after, metric, ALLOWED), own)  # fmt: skip


def unscored(task: Task | None) -> str:
    """Why a check cannot score the System and its export on a task; empty where it can."""
    if task is None:
        return "no task was named (--task)"
    if task.metric == "win_rate":
        return "win_rate is told by a judge, who is not asked here"
    return f"{task.metric} is of documents found: an export looks none up" if "@" in task.metric else ""


def _cut(example: Example, session: Session) -> Example:
    """A row with no more text than any engine takes in at once."""
    most, text = min(TEXT, session.context // 2), example.completion if example.text is None else example.text
    while (size := session.count([text])[0]) > most:
        text = text[: len(text) * most // size]
    return replace(example, completion=text) if example.text is None else replace(example, text=text)


def record(check: Check) -> dict[str, Any]:
    """The check as plain data."""
    scores = {**asdict(check.scores), "kept": check.scores.kept} if check.scores else None
    return {**asdict(check), "good": check.good, "scores": scores}
