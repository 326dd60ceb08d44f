"""Export: a System for other engines, as a model folder, a GGUF file, an Ollama model or a folder for vLLM.

The weights are merged and made dense (or packed in the engine's own way); what a format cannot carry is named, and
what was written is read back and asked the same as the System.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whet import __version__
from whet import model as models
from whet.compress.folder import compressed, dense, shared
from whet.errors import ArtifactError, nearest
from whet.progress import figure
from whet.prompt import SLOT, as_turns, asides_of, dated, ends_of, fold_system, messages, specials_of, takes_system
from whet.splits import shared_order
from whet.store import anew
from whet.system import Demonstrations, System

if TYPE_CHECKING:
    from whet.engine import Progress
    from whet.export.check import Check
    from whet.progress import Watch
    from whet.task import Example, Task

Left = tuple[str, str]  # (what is left out, what that means and what to do)

FORMATS = ("hf", "gguf", "ollama", "vllm")
MARK = "export.json"
REQUEST = "request.json"
FILE = "model.gguf"
MOST = 100.0  # that servers let be added to a logit
UNCUT = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}  # whet draws from all tokens; engines would leave some out
ROUNDED = ("q8_0", "q4_0")  # types of weights that are to differ
COSTLY = ("retrieval", "demonstrations", "choice", "calibration", "words", "answer", "votes")  # in points of a task


@dataclass(frozen=True)
class Exported:
    """What was written: `bytes` of weights, what the format could not carry, and the check (None: not asked for).

    `kept` says whether the export, as it will answer, is not worse than the System; None where no task told.
    """

    folder: Path
    format: str
    type: str
    files: tuple[str, ...]
    bytes: int
    left_out: tuple[Left, ...]
    check: Check | None

    @property
    def kept(self) -> bool | None:
        """Whether the export keeps what the System scores."""
        return self.check.scores.kept if self.check and self.check.scores else None

    @property
    def why(self) -> str:
        """What costs the points that the export loses: how it was written, or what is left out; empty where none are.
        """
        scores = self.check.scores if self.check else None
        if scores is None or scores.kept:
            return ""
        if scores.own is not None and scores.own.ok:
            parts = ", ".join(what for what, _ in self.left_out if what in COSTLY)
            return f"what is left out ({parts}) costs too much: {scores.lost}"
        how = f"rounding to {self.type}" if self.type in ROUNDED else "how it was written"
        return f"{how} costs too much: {scores.own or scores.lost}"

    def record(self) -> dict[str, Any]:
        """As `whet export --json` prints it."""
        from whet.export.check import record

        left = [{"what": what, "why": why} for what, why in self.left_out]
        check = record(self.check) if self.check else None
        return {**asdict(self), "folder": str(self.folder), "left_out": left, "check": check, "kept": self.kept,
                "why": self.why}  # fmt: skip


def biases(system: System, tokenizer: Any, target: str) -> dict[str, float]:
    """What a server is to add to the logits of tokens, by id, so that one token is the calibrated choice.

    Empty where a label is more than one token, where it is scored with its end (as behind a training), or where the
    format's server takes no such thing.
    """
    decoding = system.decoding
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in decoding.spoken]
    single = bool(ids) and all(len(i) == 1 for i in ids) and len({i[0] for i in ids}) == len(ids)
    if target == "ollama" or not (decoding.closed and decoding.normalise == "mean" and single):
        return {}
    prior = decoding.prior or (0.0,) * len(ids)
    return {str(i[0]): round(MOST - p + min(prior), 6) for i, p in zip(ids, prior, strict=True)}


def askable(system: System, calibrated: bool = False) -> System:
    """The System as far as another engine can be asked it: fixed demonstrations, no sources, prior or votes."""
    fixed = system.demonstrations if system.demonstrations.selection == "fixed" else Demonstrations()
    decoding = replace(system.decoding, votes=1, prior=system.decoding.prior if calibrated else ())
    return replace(system, demonstrations=fixed, sources=(), decoding=decoding)


def left_out(system: System, target: str, bound: bool = False) -> tuple[Left, ...]:
    """What of a System the format cannot carry, whatever its weights are; `bound` says that `biases` has its choice."""
    decoding, demos, left = system.decoding, system.demonstrations, list[Left]()
    if system.sources:
        left.append(("retrieval", f"{len(system.sources)} source(s) of passages: questions are asked without; "
                     "look them up with whet and put them in front"))  # fmt: skip
    if demos.pool and demos.selection != "fixed":
        left.append(("demonstrations", f"the {demos.k} nearest of {len(demos.pool)} for each question: none is shown"))
    if decoding.closed and not bound:
        left.append(("choice", "the answer is written, not chosen among the labels; bind it to them: vLLM's "
                     "structured_outputs, llama.cpp's grammar, Ollama's format"))  # fmt: skip
    if decoding.prior and not bound:
        left.append(("calibration", "the log-prior of each label is not subtracted from its score: answers lean to "
                     "some labels; export.json has it"))  # fmt: skip
    if decoding.words:
        words = ", ".join(f"{word!r} for {label}" for label, word in zip(decoding.labels, decoding.words, strict=True))
        left.append(("words", f"the model says {words}: map them back"))
    if decoding.after:
        left.append(("answer", f"the answer is what stands behind the last {decoding.after!r}: cut it out"))
    if decoding.votes > 1:
        left.append(("votes", f"the most frequent of {decoding.votes} samples: ask as often and count"))
    if target != "ollama":
        left.append(("prompt", f"all but the weights and the chat template stands in {REQUEST}: send that"))
    left.append(("safety", "whet breaks up chat markers in a question and shortens what does not fit; "
                 "a server may do neither"))  # fmt: skip
    return tuple(left)


def request(system: System, bias: dict[str, float], tokenizer: Any) -> dict[str, Any]:
    """What to send to a server that speaks OpenAI's HTTP API, `{question}` in the last message replaced.

    Control markers are broken up as in the System's prompts: servers read them as turns. Of a model that thinks aloud
    unless it is told not to, the server is told. Where the template takes no system turn, the instruction stands in
    the first question.
    """
    decoding = system.decoding
    demos = [(q, decoding.said(a)) for q, a in system.demonstrations.pool]
    chat = messages(system.instruction, demos, SLOT, frame=system.frame)
    chat = chat if takes_system(tokenizer) else fold_system(chat)
    thinks = "enable_thinking" in (tokenizer.chat_template or "")
    return {
        "messages": as_turns(chat, specials_of(tokenizer), asides_of(tokenizer)),
        "max_tokens": 1 if bias else decoding.max_tokens, "temperature": decoding.temperature,
        **(UNCUT if decoding.temperature > 0 else {}),
        **({"stop": list(decoding.stop)} if decoding.stop else {}), **({"logit_bias": bias} if bias else {}),
        **({"chat_template_kwargs": {"enable_thinking": False}} if thinks else {}),
    }  # fmt: skip


def _hf(system: System, module: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model folder as transformers has it, with the System's way of generating."""
    from transformers import GenerationConfig

    decoding, ends = system.decoding, sorted(ends_of(module, tokenizer))
    drawn = {"do_sample": True, "temperature": decoding.temperature, **UNCUT} if decoding.temperature > 0 else {}
    module.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0],
        max_new_tokens=decoding.max_tokens, **drawn,
    )  # fmt: skip
    module.config._name_or_path = ""
    models.quiet(module.save_pretrained, folder, max_shard_size="1TB")  # one file, which packed layers are put into
    tokenizer.save_pretrained(folder)


def _readme(system: System, target: str, context: int, left: Sequence[Left]) -> str:
    """README.md: how to run it, how to ask it, and what is left out."""
    from whet.export.vllm import serve

    run = {
        "hf": "`AutoModelForCausalLM.from_pretrained(folder)`, with its tokenizer's chat template",
        "vllm": f"```sh\n{serve(system, context)}\n```",
        "gguf": f"```sh\nllama-server -m {FILE} --jinja --temp {system.decoding.temperature:g} "
                f"-n {system.decoding.max_tokens} --top-k 0 --top-p 1 --min-p 0\n```",
        "ollama": "```sh\nollama create my-model -f Modelfile\nollama run my-model\n```",
    }  # fmt: skip
    lines = [f"# {system.card.get('task', 'A System')}, exported by whet {__version__}", "", "## Run", "",
             run[target], ""]  # fmt: skip
    if target != "ollama":
        to = "/v1/chat/completions"
        lines += ["## Ask", "", f"Send `{REQUEST}` to `{to}`, `{SLOT}` in the last message replaced.", ""]
    if system.decoding.labels:
        lines += ["Labels: " + ", ".join(f"`{label}`" for label in system.decoding.labels), ""]
    lines += ["## Left out", "", *(f"- **{what}**: {why}" for what, why in left), ""]
    return "\n".join(lines)


def _whole(module: Any, packs: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of packed layers by name; not of those within another, whose sum with terms of its own counts."""
    found = {n: module.get_submodule(n) for n in packs}
    alone = {n: m for n, m in found.items() if hasattr(m, "pack") and not any(n.startswith(f"{o}.") for o in found)}
    return {n: {**m.pack.parts(), "bits": m.pack.bits} for n, m in alone.items()}


def _write(system: System, target: str, kind: str, work: Path) -> tuple[tuple[Left, ...], Any, tuple[str, ...]]:
    """Write weights and all beside; returns what is left out, the tokenizer, and the layers that round their inputs."""
    import torch

    from whet.export import gguf, ollama, vllm

    wide = torch.bfloat16 if kind == "bf16" else torch.float32
    module, tokenizer = models.load(system.model, system.home, dtype=wide, device="cpu")
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = dated(tokenizer.chat_template)
    bias = biases(system, tokenizer, target)
    asked, left = askable(system), left_out(system, target, bool(bias))
    packs, again = compressed(module), shared(module)
    packed = vllm.packs(module) if target == "vllm" and kind == "bf16" else vllm.Packs()
    left += packed.left
    if again:
        left += (("sharing", f"{again} layers that have their weights from another are written out, each by itself"),)
    whole = _whole(module, packs) if kind in ROUNDED else {}
    outer = [name for name in packs if not any(name.startswith(f"{one}.") for one in packs)]
    rest = [name for name in outer if name not in packed.layers and name not in whole]
    if rest and not packed.left:
        left += (("packing", f"{len(rest)} layers that whet keeps smaller are written in full, as {kind}"),)
    for config, name in ((module.config.get_text_config(), "kept_layers"), (module.config, "made_of")):
        if hasattr(config, name):  # of interest to whoever heals it within whet only
            delattr(config, name)
    module = dense(module, torch.float16 if kind == "f16" and target in ("hf", "vllm") else wide)
    context = int(getattr(module.config, "max_position_embeddings", 0) or 2048)
    if target in ("hf", "vllm"):
        _hf(asked, module, tokenizer, work)
        packed.write(work)
    else:
        ends = sorted(ends_of(module, tokenizer))
        left += gguf.write(module, tokenizer, work / FILE, kind, ends, str(system.card.get("task", "whet")),
                           whole)  # fmt: skip
    if target == "ollama":
        stops = [str(tokenizer.convert_ids_to_tokens(i)) for i in ends]
        text, carried = ollama.modelfile(asked, tokenizer, FILE, stops, context)
        (work / "Modelfile").write_text(text, encoding="utf-8", newline="\n")
        if ollama.altered(asked):
            left += (("some characters", "a Modelfile holds no joiners and no spaces of other widths: prompts differ "
                      "by them"),)  # fmt: skip
        if not carried:
            left += (("template", "Ollama's templates cannot say what the model's does; where Ollama does not know "
                      "it either, prompts go in bare"),)  # fmt: skip
    else:
        body = json.dumps(request(asked, bias, tokenizer), indent=1, ensure_ascii=False)
        (work / REQUEST).write_text(body + "\n", encoding="utf-8")
    (work / "README.md").write_text(_readme(asked, target, context, left), encoding="utf-8")
    return left, tokenizer, packed.rounded


def lines(done: Exported, target: str) -> list[str]:
    """What was written and how it checked, as `whet export` prints it."""
    said = [f"{target:<8} {done.folder}  ({done.bytes / 1e6:.0f} MB, {done.type})"]
    if found := done.check:
        said.append(f"check    {found.by}: {found.agreement:.1%} of {found.tokens} tokens, {found.same} of "
                    f"{found.prompts} answers the same; elsewhere at most {found.gap:.2g} nats apart")  # fmt: skip
        said += [f"         {found.note}"] if found.note else []
        if scores := found.scores:
            own, there, bound = (figure(s, scores.metric) for s in (scores.system, scores.exported, scores.choosing))
            writes = f", which writes its answer; {bound} if it is bound to the labels"
            said.append(f"{scores.metric}: {own} as it is, {there} exported{'' if scores.choosing is None else writes}")
            said.append(f"DIFFERS  {done.why}" if done.why else f"         {scores.lost}")
        else:
            said.append(f"scores   not compared: {found.unscored}")
    else:
        said.append("check    none was made")
    return [*said, *(f"left out {what}: {why}" for what, why in done.left_out)]


def place(system: System, folder: Path) -> Path:
    """A folder that nobody has named, for a System. Raises ArtifactError where it holds the export of another one."""
    try:
        held = json.loads((folder / MARK).read_text(encoding="utf-8")).get("system")
    except (OSError, ValueError, AttributeError):
        return folder
    if held != system.fingerprint:
        raise ArtifactError(f"{folder} holds the export of another System", expected="the same one, or none",
                            found=str(held)[:16], do="name a folder: --out")  # fmt: skip
    return folder


def export(
    system: System, target: str, out: str | Path, *, kind: str = "bf16", task: Task | None = None, check: bool = True,
    watch: Watch | None = None,
) -> Exported:  # fmt: skip
    """Write a System for another engine, aside and then renamed; an older export in its place is replaced.

    `kind` is the type of the weights (GGUF: also q8_0 and q4_0). The check asks 50 prompts (of the task, where one is
    given, classes in turn; it is scored, too: `Exported.kept`). Raises ArtifactError where the export does not answer
    like the System, as far as its type rounds; MethodError or ModelError where the System has no
    weights or is of a kind that the format does not know.
    """
    from whet.export.gguf import TYPES

    types = TYPES if target in ("gguf", "ollama") else ("bf16", "f16", "f32")
    if target not in FORMATS:
        raise ArtifactError(f"no format {target!r}", expected=", ".join(FORMATS), do=nearest(target, FORMATS))
    if kind not in types:
        raise ArtifactError(f"{target} has no type {kind!r}", expected=", ".join(types), do="name one as --type")
    if system.model.remote:
        raise ArtifactError(
            "a model behind a server cannot be exported", expected="weights", found=system.model.base,
            do="export a System of a local model",
        )  # fmt: skip
    out = Path(out)
    with anew(out, MARK) as work:
        if watch:
            watch.tell("writing", 0, 1)
        left, tokenizer, rounded = _write(system, target, kind, work)
        found = _check(system, target, kind, work, tokenizer, rounded, task, watch) if check else None
        if check and found is None:
            left += (("check", "only llama.cpp reads this family's GGUF: pip install 'whet[llamacpp]'"),)
        files = tuple(sorted(p.name for p in work.iterdir()))
        size = sum(p.stat().st_size for p in work.iterdir() if p.suffix in (".safetensors", ".gguf"))
        made = Exported(out, target, kind, files, size, left, found)
        body = {"whet": __version__, "system": system.fingerprint, "prior": system.decoding.prior, **made.record()}
        del body["folder"]
        (work / MARK).write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return made


def _check(
    system: System, target: str, kind: str, work: Path, tokenizer: Any, rounded: Sequence[str], task: Task | None,
    watch: Watch | None,
) -> Check | None:  # fmt: skip
    """Read what was written back and ask it; None where nothing here can read it.

    Raises ArtifactError where it answers otherwise than the System.
    """
    from whet.export import check as checks
    from whet.metrics import get
    from whet.scorecard import split_seed

    rows: Sequence[Example] = ()
    if task:  # select by another seed is what the System learnt from
        rows = shared_order(task.test or task.split(split_seed(task, 0, system)).select, task.closed, 0)
    why = checks.unscored(task) or ("" if rows else f"{task.name if task else ''} has no held-out rows")
    examples = [*(e for e in rows if e.text is None), *checks.NEUTRAL][: checks.PROMPTS]
    bound = bool(biases(system, tokenizer, target))
    asked = askable(system, bound)
    with tempfile.TemporaryDirectory() as home, ExitStack() as after:
        told = checks.told(asked, examples, rounded)
        file = FILE if target in ("gguf", "ollama") else None
        scored = file is not None and not why
        context = checks.needed(asked, rows, system.session) if scored else checks.CONTEXT
        other = checks.reopen(work, file, tokenizer, Path(home), context)
        if other is None:
            return None
        after.callback(other.session.close)
        if target != "ollama":
            checks.requested(asked, json.loads((work / REQUEST).read_text(encoding="utf-8")), other)
        found = checks.compare(told, other, _progress(watch, "comparing answers"))
        found = replace(found, enough=checks.ROUGH.get(kind, checks.ENOUGH))
        if not found.good:
            raise ArtifactError(
                "the export does not answer like the System",
                expected=f"{found.enough:.0%} of its tokens and all prompts cut alike",
                found=f"{found.agreement:.0%} of {found.tokens} tokens, {found.encoded} of {found.prompts} prompts "
                      f"({found.by})",
                do="--no-check writes it all the same",
            )  # fmt: skip
        found = replace(found, unscored=why)
        if task and not why:
            metric = get(task.metric, task.folder, task.trusted)
            made = checks.score(system, asked, bound, task.name, rows, metric, other, _progress(watch, "scoring"))
            found = replace(found, scores=made)
    return found


def _progress(watch: Watch | None, what: str) -> Progress | None:
    return (lambda done, of: watch.tell(what, done, of)) if watch else None
