"""Distillation: its losses against closed formulas and TRL's, what a teacher is asked, and the method as a whole."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import make_model, make_tokenizer, reference, save_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from whet import model as models
from whet.compress import depth
from whet.compress import folder as folders
from whet.compress.structure import twin
from whet.engine.fake import FakeSession
from whet.engine.prefix import Row
from whet.engine.torch import TorchSession, using_tree
from whet.errors import ArtifactError, MethodError, ModelError
from whet.methods import Run, distill
from whet.methods.distill import Distill, Said, _made_of, sharpness, softmax
from whet.methods.prune import Prune
from whet.methods.quantize import Quantize
from whet.retrieval import Source
from whet.search import tune
from whet.search.recipe import Recipe, parse
from whet.store import Store
from whet.system import Decoding, Demonstrations, System, load
from whet.task import Example, Learnable, Task
from whet.train import losses
from whet.train.batches import packs, padded
from whet.train.loop import _step, target_logits
from whet.train.matching import Match, partners
from whet.train.teacher import Teacher

LABELS = ("positive", "negative")
QUICK: dict[str, Any] = {"rank": 4, "batch": 8, "learning_rate": 5e-3}


# --- losses -----------------------------------------------------------------------------------------------------------


def whole(logits: torch.Tensor, temperature: float) -> losses.Kept:
    """All of a distribution, in the order of likelihood, as a teacher keeps it."""
    top = (logits / temperature).log_softmax(-1).topk(logits.shape[1])
    return top.indices.int(), top.values


def pack_of(rows: list[Row]) -> Any:
    """The rows as one padded pack of the same prompt."""
    [pack] = padded([Row(rows[0].prompt, tuple(c for r in rows for c in r.continuations),
                         tuple(f for r in rows for f in r.facts))], torch.device("cpu"))  # fmt: skip
    return pack


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("reverse", [False, True])
def test_imitate_is_the_divergence_and_trls(temperature: float, reverse: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = 2 * torch.randn(5, 30), 2 * torch.randn(5, 30)
    ours.requires_grad_(True)
    rows = [Row((1,), ((4, 5, 6),), ((0.0, float(reverse)),)), Row((1,), ((7, 8),), ((1.0, float(reverse)),))]
    loss = losses.Imitate({n: whole(part, temperature) for n, part in enumerate(theirs.split([3, 2]))}, temperature)
    found = loss(ours, pack_of(rows))
    [mine] = torch.autograd.grad(found, ours)
    p, q = (theirs / temperature).log_softmax(-1), (ours / temperature).log_softmax(-1)
    plain = kl_div(*((p, q) if reverse else (q, p)), reduction="sum", log_target=True) * temperature**2
    [other] = torch.autograd.grad(plain, ours, retain_graph=True)
    assert float(found.detach()) == pytest.approx(float(plain.detach()), rel=1e-4)
    assert torch.allclose(mine, other, atol=1e-5)
    assert loss.count(rows) == 5
    from trl.experimental.gkd import GKDTrainer as Rival

    rival = Rival.generalized_jsd_loss(ours[None], theirs[None], torch.zeros(1, 5), float(reverse), temperature, "sum")
    assert float(found.detach()) == pytest.approx(float(rival.detach()) * temperature**2, rel=1e-4)


def test_imitate_counts_all_other_tokens_as_one() -> None:
    ours = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()
    kept = (torch.tensor([[2, 0]]).int(), torch.tensor([[0.6, 0.3]]).log())
    [row] = [Row((1,), ((3,),), ((7.0, 0.0),))]
    forward = 0.6 * math.log(0.6 / 0.2) + 0.3 * math.log(0.3 / 0.5) + 0.1 * math.log(0.1 / 0.3)
    assert float(losses.Imitate({7: kept})(ours, pack_of([row]))) == pytest.approx(forward, abs=1e-5)
    back = 0.2 * math.log(0.2 / 0.6) + 0.5 * math.log(0.5 / 0.3) + 0.3 * math.log(0.3 / 0.1)
    row = replace(row, facts=((7.0, 1.0),))
    assert float(losses.Imitate({7: kept})(ours, pack_of([row]))) == pytest.approx(back, abs=1e-5)


def test_rows_without_a_distribution_are_learnt_word_by_word() -> None:
    model, table = make_model("llama"), dict[int, losses.Kept]()
    rows = [Row((1, 2, 3), ((4, 5),), ((-1.0, 0.0),)), Row((1, 2, 3, 9), ((6,),), ((-1.0, 0.0),))]
    plain, _ = _step(model, model, rows, losses.NextToken())
    assert _step(model, model, rows, losses.Imitate(table, 3.0))[0] == pytest.approx(plain)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[1, 2, 3, 9]])).logits[0, -1:]
    table[4] = whole(logits + torch.linspace(0, 1, 300), 1.0)
    wanted = float(kl_div(logits.log_softmax(-1), (logits + torch.linspace(0, 1, 300)).log_softmax(-1),
                          reduction="sum", log_target=True))  # fmt: skip
    first = -sum(reference(model, (1, 2, 3), (4, 5)))
    for most in (2048, 1):  # in one pass, and row by row
        mixed = [rows[0], replace(rows[1], facts=((4.0, 0.0),))]
        found, _ = _step(model, model, mixed, losses.Imitate(table), most)
        assert found == pytest.approx((first + wanted) / 3, rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_choose_is_the_divergence_over_answers(temperature: float) -> None:
    model = make_model("llama")
    chances = ((0.7, 0.2, 0.1), (1.0,))
    rows = [Row((1, 2, 3), ((4, 5, 2), (4, 2), (9, 2)), tuple((c,) for c in chances[0])),
            Row((1, 2, 8), ((6, 7, 2),), ((1.0,),))]  # fmt: skip
    wanted = 0.0
    for row, chance in zip(rows, chances, strict=True):
        scores = [sum(reference(model, row.prompt, c)) for c in row.continuations]
        soft = [math.exp(s / temperature) for s in scores]
        apart = sum(c * math.log(c / (s / sum(soft))) for c, s in zip(chance, soft, strict=True))
        wanted += temperature**2 * apart - math.log(sum(map(math.exp, scores)))
        if temperature == 1:  # the two parts are one divergence: that of the teacher's answers from all texts
            both = sum(c * (math.log(c) - s) for c, s in zip(chance, scores, strict=True))
            assert temperature**2 * apart - math.log(sum(map(math.exp, scores))) == pytest.approx(both)
    for most in (2048, 1):
        found, _ = _step(model, model, rows, losses.Choose(temperature), most)
        assert found == pytest.approx(wanted / 2, rel=1e-4)


def test_choose_has_the_gradient_of_its_formula() -> None:
    torch.manual_seed(1)
    logits = torch.randn(4, 6, dtype=torch.float32, requires_grad=True)
    row = Row((1,), ((2, 3), (4, 5)), ((0.75,), (0.25,)))
    found = losses.Choose(2.0)(logits, pack_of([row]))
    scores = logits.log_softmax(-1)[range(4), [2, 3, 4, 5]].view(2, 2).sum(-1)
    chance = torch.tensor([0.75, 0.25])
    plain = 4 * kl_div((scores / 2).log_softmax(0), chance, reduction="sum") - scores.logsumexp(0)
    assert float(found.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    mine, other = (torch.autograd.grad(value, logits)[0] for value in (found, plain))
    assert torch.allclose(mine, other, atol=1e-6)


# --- the teacher's distributions --------------------------------------------------------------------------------------


def trimmed(dropped: int = 20) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """The tokenizer without its last merges and with its tokens renumbered, and the old number of each new one."""
    body = json.loads(make_tokenizer().backend_tokenizer.to_str())
    gone = [a + b for a, b in body["model"]["merges"][-dropped:]]
    body["model"]["merges"] = body["model"]["merges"][:-dropped]
    old = {t: i for t, i in body["model"]["vocab"].items() if t not in gone}
    special = [t["content"] for t in body["added_tokens"]]
    order = sorted(old, key=lambda t: (t not in special, -old[t]))
    body["model"]["vocab"] = {t: n for n, t in enumerate(order)}
    for token in body["added_tokens"]:
        token["id"] = order.index(token["content"])
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(body)), bos_token="<|endoftext|>", eos_token="<|im_end|>",
        pad_token="<|endoftext|>", additional_special_tokens=["<|im_start|>", "__mask__"],
        chat_template=make_tokenizer().chat_template,
    )  # fmt: skip
    return made, [old[t] for t in order]


def smaller_vocabulary() -> tuple[Any, PreTrainedTokenizerFast, list[int]]:
    """The tiny model without the embeddings of some tokens."""
    tokenizer, old = trimmed()
    module = make_model("llama")
    module.resize_token_embeddings(len(old))
    full = make_model("llama")
    with torch.no_grad():
        module.get_input_embeddings().weight.copy_(full.get_input_embeddings().weight[old])
        module.get_output_embeddings().weight.copy_(full.get_output_embeddings().weight[old])
    module.config.eos_token_id = module.generation_config.eos_token_id = tokenizer.eos_token_id
    return module, tokenizer, old


def test_a_teacher_with_more_tokens_speaks_in_those_of_the_student(tmp_path: Path) -> None:
    module, tokenizer, old = smaller_vocabulary()
    student, session = TorchSession(module, tokenizer), TorchSession(make_model("llama"), make_tokenizer())
    system = System(models.ModelRef("x", "x"), "say it")
    teacher = Teacher.of(system, session, student)
    assert teacher is not None and teacher.ids is not None and Teacher.of(system, student, session) is None
    same = Teacher.of(system, session, session)
    assert same is not None and same.ids is None
    example, answer = Example("1", "was the movie great?"), student.encode_answer("a funny story", end=True)
    [row] = teacher.judge([example], [Row((1, 2), (answer,))], 3, 2.0)
    ids, values = teacher.table[3]
    assert row.facts == ((3.0, 0.0),) and ids.shape == values.shape == (len(answer), 32)
    spelt = tuple(old[t] for t in answer)
    assert session.tokenizer.decode(spelt) == tokenizer.decode(answer)
    [prompt] = session.encode(system.prompts([example]))
    with torch.no_grad():
        logits = session.module(input_ids=torch.tensor([[*prompt, *spelt[:-1]]])).logits[0, len(prompt) - 1 :]
    wanted = (logits[:, old] / 2).log_softmax(-1)
    assert torch.allclose(wanted.gather(-1, ids.long()), values, atol=1e-4)
    assert torch.equal(ids[:, 0].long(), wanted.argmax(-1))
    # Plain text is read as it stands: where the student is the teacher in other numbers, nothing is left but rounding.
    rows = teacher.judge([Example("2", "", text="x")], [Row(answer, (answer,))], 0, 1.0)
    assert student.spent.prefilled_tokens == session.spent.prefilled_tokens > 0
    assert _step(module, module, rows, losses.Imitate(teacher.table))[0] == pytest.approx(0, abs=1e-4)


def test_a_faint_teacher_is_sharpened_and_a_sure_one_is_not() -> None:
    faint, sure = [[0.1, 0.0], [0.0, 0.3], [0.2, 0.1]], [[5.0, 0.0], [0.0, 4.0]]
    sharp = sharpness(faint)
    chances = [softmax(row, sharp) for row in faint]
    assert sum(map(max, chances)) / 3 == pytest.approx(0.8, abs=1e-3) and sharp > 5
    assert math.log(chances[1][1] / chances[1][0]) == pytest.approx(3 * math.log(chances[0][0] / chances[0][1]))
    assert sharpness(sure) == pytest.approx(1, abs=1e-6) and softmax([0.0, math.log(3)]) == pytest.approx((0.25, 0.75))
    assert softmax([1.0, 1.0], sharpness([[1.0, 1.0]])) == (0.5, 0.5)


# --- hidden states ----------------------------------------------------------------------------------------------------


def deep(count: int = 5) -> Any:
    """The tiny Llama with more layers."""
    config = make_model("llama").config
    config.num_hidden_layers = count
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_layers_know_whose_output_they_are_to_have() -> None:
    whole_one = deep()
    kept = depth.keep(whole_one, [0, 1, 4])
    assert partners(kept, whole_one) == [0, 3, 4]
    assert partners(depth.keep(kept, [0, 2]), whole_one) == [3, 4]
    assert partners(twin(whole_one), whole_one) == [0, 1, 2, 3, 4]
    assert partners(deep(3), whole_one) is None and not hasattr(whole_one.config, "kept_layers")


@pytest.mark.parametrize("renumbered", [False, True])
def test_the_distance_of_hidden_states_is_that_of_transformers_own(renumbered: bool) -> None:
    tokenizer, teacher = make_tokenizer(), deep()
    student, ids = copy.deepcopy(depth.keep(teacher, [0, 1, 4])), None
    rows = [Row((5, 6, 7, 8, 12), ((9, 10), (11,)), ((0.5,), (0.5,)))]
    if renumbered:  # the student's token n is the teacher's n - 1
        ids = torch.arange(300).roll(1)
        student.get_input_embeddings().weight.data = teacher.get_input_embeddings().weight.data[ids]
    live, pairs = TorchSession(student, tokenizer), [0, 3, 4]
    match = Match(losses.Choose(), 0.5, live, TorchSession(teacher, tokenizer), pairs, ids)
    found, _ = _step(student, student, rows, match)
    assert live.spent.prefilled_tokens > 0
    plain, _ = _step(student, student, rows, losses.Choose())

    def states(module: Any, tokens: tuple[int, ...]) -> list[torch.Tensor]:
        kept: list[torch.Tensor] = []
        hooks = [m.register_forward_hook(lambda _, __, out: kept.append(out)) for m in module.model.layers]
        module(input_ids=torch.tensor([tokens]))
        for hook in hooks:
            hook.remove()
        return kept

    # Each token behind the beginning it is read with, once; the last of an answer is never read.
    paths = {row.prompt[: n + 1] for row in rows for n in range(len(row.prompt))}
    paths |= {(*row.prompt, *c[:n]) for row in rows for c in row.continuations for n in range(1, len(c))}
    parts = []
    with torch.no_grad():
        for path in paths:
            theirs = states(teacher, path if ids is None else tuple(ids[list(path)].tolist()))
            for mine, other in zip(states(student, path), pairs, strict=True):
                a, b = mine.reshape(len(path), -1)[-1], theirs[other].reshape(len(path), -1)[-1]
                parts.append(float((a - b).square().sum() / b.square().sum()))
    assert found == pytest.approx(1.5 * plain, rel=1e-4)  # as large as half the loss, whatever it is
    with torch.no_grad():
        [pack] = packs(rows, torch.float32, torch.device("cpu"))
        with using_tree(student):
            target_logits(student, pack)
        assert float(match.distance(pack)) == pytest.approx(sum(parts) / len(parts), rel=1e-3)
    match.weight = 2.0
    student.zero_grad()
    _step(student, student, rows, match)
    grad = student.model.layers[1].mlp.up_proj.weight.grad
    assert grad is not None and float(grad.norm()) > 0 and teacher.model.layers[1].mlp.up_proj.weight.grad is None


def test_what_rows_are_padded_with_counts_for_nothing() -> None:
    tokenizer, teacher = make_tokenizer(), deep()
    student = copy.deepcopy(depth.keep(teacher, [0, 1, 4]))
    rows = [Row(tuple(range(5, 16)), ((9, 10),)), Row(tuple(range(20, 30)), ((9,), (11, 12, 13)))]
    match = Match(losses.Choose(), 1.0, TorchSession(student, tokenizer), TorchSession(teacher, tokenizer), [0, 3, 4])

    def distance(some: list[Row]) -> float:
        [pack] = padded(some, torch.device("cpu"), 1000)
        assert len(pack.ids) == sum(len(r.continuations) for r in some)
        target_logits(student, pack)
        return float(match.distance(pack))

    with torch.no_grad():
        # One sequence at a time, as many tokens of it as are read: all but the last.
        alone = [(len(r.prompt) + len(c) - 1, distance([Row(r.prompt, (c,))])) for r in rows for c in r.continuations]
        together = distance(rows)
    assert together == pytest.approx(sum(n * d for n, d in alone) / sum(n for n, _ in alone), rel=1e-4)


def test_a_pruned_model_is_healed_by_its_teachers_states(tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    deep().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    decoding = Decoding(LABELS, closed=True)
    plain = System(models.resolve(str(folder)), "what is the review?", decoding=decoding, home=tmp_path / "a")
    data = task(rows(64))
    small = Recipe((Prune(layers=3, vocabulary=False),)).run(plain, data, Run(Store(tmp_path / "a")))
    agreed = {}
    for hidden in (0.0, 3.0):
        method = Distill(batch=8, epochs=8, learning_rate=3e-3, hidden=hidden)
        made, run = distil(method, small, data, tmp_path / "a")
        assert run.notes["hidden"] is bool(hidden) and run.notes["targets"] == "choices"
        found = [models.load(one.model, plain.home) for one in (plain, made)]
        teacher, student = (TorchSession(*each) for each in found)
        guide = Teacher.of(plain, teacher, student)
        assert guide is not None
        pairs = partners(student.module, teacher.module)
        assert pairs is not None
        match = Match(losses.Choose(), 1.0, student, teacher, pairs, guide.spelling())
        asked = student.encode(made.prompts(rows(8), blind=True))
        with torch.no_grad():
            [pack] = packs([Row(p, ((0,),), ((1.0,),)) for p in asked], torch.float32, torch.device("cpu"))
            with using_tree(student.module):
                target_logits(student.module, pack)
            agreed[hidden] = float(match.distance(pack))
    assert agreed[3.0] < 0.7 * agreed[0.0]


@pytest.mark.parametrize(("cut", "matched"), [
    ("prune(layers=3,vocabulary=false)", True), ("prune(width=0.5,vocabulary=false)", False),
    ("prune(width=0.5,vocabulary=false)+share(groups=3)", True),
])
def test_hidden_states_are_matched_unless_layers_were_only_narrowed(cut: str, matched: bool, tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    deep().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    plain = System(models.resolve(str(folder)), "what is the review?", decoding=Decoding(LABELS, closed=True),
                   home=tmp_path / "a")  # fmt: skip
    data = task(rows(16))
    small = parse(cut).run(plain, data, Run(Store(tmp_path / "a")))
    _, run = distil(Distill(batch=8, epochs=1, learning_rate=1e-3), small, data, tmp_path / "a")
    assert run.notes["hidden"] is matched


def test_where_a_row_of_a_smaller_model_has_its_answer_the_teacher_is_not_asked(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    asked: list[str] = []
    plain = Distill._ask

    def listening(self: Distill, teacher: System, student: System, some: Any, *rest: Any) -> Any:
        asked.extend(e.prompt for e in some)
        return plain(self, teacher, student, some, *rest)

    monkeypatch.setattr(Distill, "_ask", listening)
    some = rows(24, lambda n: LABELS[n % 2])
    bare = [replace(e, completion="", answers=()) if n % 3 == 0 else e for n, e in enumerate(some)]
    small = Recipe((Prune(layers=1, vocabulary=False),)).run(system, task(some), Run(Store(tmp_path)))
    for gold, wanted in ((-1.0, bare[::3]), (0.5, bare)):
        asked.clear()
        distil(Distill(**QUICK, gold=gold), small, task(bare), tmp_path)
        assert sorted(asked) == sorted(e.prompt for e in wanted)


# --- the method -------------------------------------------------------------------------------------------------------


def rows(count: int, label: Callable[[int], str] = lambda _: "") -> tuple[Example, ...]:
    words = ("great", "bad", "funny", "poor", "fine", "dull")
    return tuple(Example(f"r{n}", f"movie {n} was {words[n % 6]}", label(n)) for n in range(count))


def task(train: tuple[Example, ...], labels: tuple[str, ...] = LABELS, **more: Any) -> Learnable:
    return Learnable("tiny", "what is the review?", "accuracy", labels, train, **more)


@pytest.fixture
def system(model_folder: str, tmp_path: Path, fp32: None) -> System:
    """A System with demonstrations and calibration."""
    shown = Demonstrations((("the movie was great", "positive"), ("a bad story", "negative")))
    return System(models.resolve(model_folder), "what is the review?", shown,
                  Decoding(LABELS, True, prior=(-3.0, -2.0), max_tokens=6), home=tmp_path / "home")  # fmt: skip


@pytest.fixture
def free(system: System) -> System:
    """One that answers freely, with demonstrations."""
    return replace(system, decoding=Decoding(max_tokens=8))


@pytest.fixture
def other(system: System, tmp_path: Path) -> System:
    """A System of other weights, as a teacher in a folder."""
    return replace(system, model=models.resolve(save_model(tmp_path / "other", seed=1)))


def distil(method: Distill, system: System, data: Learnable, home: Path, **settings: Any) -> tuple[System, Run]:
    run = Run(Store(home), **settings)
    return Recipe((method,)).run(replace(system, home=home), data, run), run


def validation(run: Run) -> list[float]:
    return [loss for _, loss in run.notes["curves"]["validation"]]


def test_a_student_learns_to_do_without_context(system: System, tmp_path: Path) -> None:
    data = task(rows(96))
    made, run = distil(Distill(**QUICK, epochs=6.0), system, data, tmp_path / "a")
    assert made.demonstrations == Demonstrations() and made.instruction == system.instruction
    assert (made.decoding.prior, made.decoding.normalise) == ((), "sum")
    assert [t.kind for t in made.model.transforms] == ["adapter"]
    curve, agreement = validation(run), run.notes["agreement"]
    assert curve[-1] < 0.2 * curve[0]
    assert agreement["after"] > agreement["before"] and agreement["n"] == 10
    assert run.notes["cleared"] == ["demonstrations", "calibration"] and run.notes["targets"] == "choices"
    # On prompts that it has not seen, it chooses as the teacher does more often than it did.
    asked = [Example(f"t{n}", f"the film {n} was {'good' if n % 2 else 'slow'} and {'new' if n % 3 else 'old'}")
             for n in range(60)]  # fmt: skip
    teacher = system.answer(asked)
    plain = replace(made, model=system.model)
    same = [sum(a == b for a, b in zip(teacher, one.answer(asked), strict=True)) for one in (plain, made)]
    assert same[1] > same[0]
    again, _ = distil(Distill(**QUICK, epochs=6.0), system, data, tmp_path / "b")
    assert again.fingerprint == made.fingerprint


def test_what_is_cleared(system: System) -> None:
    method = Distill()
    framed = replace(system, frame="Review: {question}", sources=(Source(),))
    levels = ("none", "demonstrations", "prompt")
    lost = {level: replace(method, clear=level)._student(framed, framed) for level in levels}
    assert [bool(s.demonstrations.pool) for s in lost.values()] == [True, False, False]
    assert [bool(s.sources) for s in lost.values()] == [True, True, False]
    assert [bool(s.instruction) for s in lost.values()] == [True, True, False]
    assert [s.frame for s in lost.values()] == ["Review: {question}", "Review: {question}", "{question}"]
    same = method._student(framed, framed)
    assert not same.sources and not same.demonstrations.pool and same.instruction and same.frame == framed.frame
    elsewhere = replace(framed, model=models.ModelRef("x", "x"))
    assert method._student(framed, elsewhere).sources and method._student(framed, elsewhere).demonstrations.pool


def test_free_text_by_tokens_and_then_by_what_the_student_says(
    free: System, other: System, tmp_path: Path
) -> None:
    other = replace(other, decoding=free.decoding)
    other.save(tmp_path / "teacher")
    data = task(rows(48), ())
    method = Distill(teacher=str(tmp_path / "teacher"), **QUICK, epochs=4.0)
    made, run = distil(method, free, data, tmp_path / "a")
    assert made.demonstrations == free.demonstrations and run.notes["cleared"] == []
    assert run.notes["targets"] == "tokens" and run.notes["teacher_fingerprint"] == other.fingerprint[:16]
    assert run.notes["on_policy"] == round(0.25 * run.notes["steps"])
    assert validation(run)[-1] < 0.8 * validation(run)[0]
    assert list(run.sessions) == [free.model]  # the teacher's is closed
    again, _ = distil(method, free, data, tmp_path / "b")
    assert again.fingerprint == made.fingerprint
    off, plain = distil(replace(method, on_policy=0.0), free, data, tmp_path / "c")
    assert plain.notes["on_policy"] == 0 and off.fingerprint != made.fingerprint
    assert run.spent.generated_tokens > plain.spent.generated_tokens


def test_rungs_go_on_from_one_another(free: System, other: System, tmp_path: Path) -> None:
    """A race of learning rates: what a shorter training came to is where a longer one begins, also on policy."""
    replace(other, decoding=free.decoding).save(tmp_path / "teacher")
    method = Distill(teacher=str(tmp_path / "teacher"), **QUICK, epochs=4.0)
    run = Run(Store(tmp_path / "a"))
    arms = [method, replace(method, learning_rate=1e-3)]
    _, ended = tune.race(arms, replace(free, home=tmp_path / "a"), task(rows(48), ()), run)
    assert [arm.fidelity for arm in ended] == [1.0, 0.15]
    _, whole = distil(ended[0].method, free, task(rows(48), ()), tmp_path / "b")  # type: ignore[arg-type]
    assert run.notes["steps"] == whole.notes["steps"] and run.notes["on_policy"] == whole.notes["on_policy"] > 0
    assert ended[0].loss < validation(whole)[0]


def test_its_own_beginning_judges_what_a_student_samples(free: System, tmp_path: Path) -> None:
    """Where teacher and student are one module, the teacher is asked with the weights of the beginning."""
    data = task(rows(32), ())
    made, run = distil(Distill(**QUICK, epochs=4.0, on_policy=1.0), free, data, tmp_path / "a")
    assert run.notes["on_policy"] == run.notes["steps"] and made.demonstrations == Demonstrations()
    assert validation(run)[-1] < validation(run)[0]


def test_plain_text_is_learnt_by_the_teachers_distributions(free: System, other: System, tmp_path: Path) -> None:
    replace(other, decoding=free.decoding).save(tmp_path / "teacher")
    texts = tuple(Example(f"t{n}", "", text=f"the story number {n} of the city was not bad at all") for n in range(30))
    method = Distill(teacher=str(tmp_path / "teacher"), **QUICK)
    _, run = distil(method, free, task(texts, ()), tmp_path / "a")
    assert run.notes["targets"] == "tokens" and validation(run)[-1] < validation(run)[0]
    assert "agreement" not in run.notes  # nothing was asked


def test_labels_of_many_choices_are_cut_to_the_likeliest(system: System, tmp_path: Path) -> None:
    labels = tuple(f"kind {a}{b}" for a in "abcde" for b in "vwxyz")
    many = replace(system, decoding=replace(system.decoding, labels=labels, prior=(), max_tokens=12))
    data = task(rows(40), labels)
    _, run = distil(Distill(**QUICK), many, data, tmp_path / "a")
    assert run.notes["targets"] == "choices" and validation(run)[-1] < validation(run)[0]


def test_gold_answers_take_the_teachers_place(system: System, tmp_path: Path) -> None:
    teacher = {e.prompt: a for e, a in zip(rows(64), system.answer(rows(64)), strict=True)}
    contrary = rows(64, lambda n: LABELS[1 - LABELS.index(teacher[rows(64)[n].prompt])])
    asked = [e.prompt for e in contrary]
    right = []
    for gold in (0.0, 1.0):
        made, _ = distil(Distill(**QUICK, epochs=6.0, gold=gold), system, task(contrary), tmp_path / str(gold))
        said = made.answer(asked)
        right.append(sum(a == e.completion for a, e in zip(said, contrary, strict=True)))
    assert right[0] < 32 < right[1]


def test_a_teacher_that_gives_text_only(system: System, tmp_path: Path) -> None:
    remote = replace(system, model=models.resolve("fake:keyword"), decoding=Decoding(LABELS, True, max_tokens=6))
    remote.save(tmp_path / "teacher")
    method = Distill(teacher=str(tmp_path / "teacher"), **QUICK)
    _, run = distil(method, system, task(rows(48)), tmp_path / "a")
    assert run.notes["targets"] == "choices" and validation(run)[-1] < validation(run)[0]
    free = replace(remote, decoding=Decoding(max_tokens=6))
    free.save(tmp_path / "free")
    student = replace(system, decoding=Decoding(max_tokens=6))
    method = replace(method, teacher=str(tmp_path / "free"), epochs=6.0)
    made, run = distil(method, student, task(rows(48), ()), tmp_path / "b")
    assert (run.notes["targets"], run.notes["on_policy"]) == ("answers", 0)
    assert validation(run)[-1] < validation(run)[0]
    # One that is not told the labels may say others: those rows are left out.
    loose = replace(remote, model=models.resolve("fake:hash"), decoding=Decoding(LABELS, False, max_tokens=6))
    loose.save(tmp_path / "loose")
    with pytest.raises(MethodError, match="nothing to learn from"):
        distil(replace(method, teacher=str(tmp_path / "loose")), system, task(rows(48)), tmp_path / "c")


def test_reasons_are_left_out_or_kept(free: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thinking = replace(free, decoding=replace(free.decoding, after=":", votes=3, temperature=0.7))
    plain = TorchSession.generate

    def marked(*args: Any, **settings: Any) -> Any:  # a random model says no mark of its own
        return [tuple(replace(g, text=f"so: {g.text}") for g in one) for one in plain(*args, **settings)]

    monkeypatch.setattr(TorchSession, "generate", marked)
    made, run = distil(Distill(**QUICK), thinking, task(rows(24), ()), tmp_path / "a")
    assert (made.decoding.after, made.decoding.votes, made.decoding.temperature) == ("", 1, 0.0)
    assert run.notes["targets"] == "answers"
    thinking.save(tmp_path / "teacher")
    student, method = replace(thinking, demonstrations=Demonstrations()), Distill(clear="none", **QUICK)
    made, run = distil(replace(method, teacher=str(tmp_path / "teacher")), student, task(rows(24), ()), tmp_path / "b")
    assert (made.decoding.after, made.decoding.votes) == (":", 3) and run.notes["targets"] == "tokens"


def test_what_was_cut_off_is_not_learnt_as_finished(system: System, tmp_path: Path) -> None:
    """A teacher's answer that ended at its limit gets no end; one that never came to its mark is left out."""
    asked = [Example(f"{n}", text) for n, text in enumerate(("so: good", "never came to it", "it was: slow"))]
    echo = replace(system, model=models.resolve("fake:echo"), demonstrations=Demonstrations(),
                   decoding=Decoding(max_tokens=2, after=":"))  # fmt: skip
    told = [(a.text, a.finish) for a in echo.answers(asked, FakeSession("echo"))]
    assert told == [("good", "stop"), ("never came", "unmarked"), ("", "length")]
    run, live = Run(Store(tmp_path)), system.session
    assert isinstance(live, TorchSession)
    student = replace(system, decoding=Decoding(max_tokens=12))
    heard = Distill()._ask(echo, student, asked, False, FakeSession("echo"), run)
    assert heard == {asked[0]: Said("good"), asked[2]: Said("", whole=False)}
    bare = replace(echo, decoding=Decoding(max_tokens=2))  # nothing is behind a mark
    heard = Distill()._ask(bare, student, asked, False, FakeSession("echo"), run)
    assert [(s.text, s.whole) for s in heard.values()] == [
        ("so: good", True), ("never came", False), ("it was:", False)]  # fmt: skip
    assert Distill()._ask(bare, echo, asked, False, FakeSession("echo"), run).keys() == {asked[0], asked[2]}
    pairs, _ = distill._saying(student, heard, live)
    ends = set(live.encode_answer("", end=True))
    assert [bool(ends & set(row.continuations[0])) for _, row in pairs] == [True, False, False]


def test_a_teacher_is_asked_once(system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = task(rows(32))
    distil(Distill(**QUICK), system, data, tmp_path / "a")
    plain, asked = System.label_scores, list[int]()
    monkeypatch.setattr(System, "label_scores", lambda *a, **k: (asked.append(len(a[1])), plain(*a, **k))[1])
    distil(Distill(**{**QUICK, "learning_rate": 1e-3}), system, data, tmp_path / "a")
    assert not asked
    distil(Distill(**QUICK), system, data, tmp_path / "b")
    assert asked == [32]  # elsewhere nothing is known of it


def test_what_a_served_teacher_did_not_answer_is_asked_again(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a server is down for a while: its silence is no answer, and is not kept as one."""
    asked, some, plain, down = list[int](), list(rows(8)), FakeSession.generate, [3]

    def generate(self: Any, prompts: Any, *args: Any, **settings: Any) -> Any:
        asked.append(len(prompts))
        told = plain(self, prompts, *args, **settings)
        lost = [tuple(replace(g, text="", finish="stop") for g in one) for one in told[: down[0]]]
        return [*lost, *told[len(lost) :]]

    monkeypatch.setattr(FakeSession, "generate", generate)
    teacher = replace(system, model=models.resolve("fake:echo"), decoding=Decoding(max_tokens=6))
    student, run = replace(system, decoding=Decoding(max_tokens=6)), Run(Store(tmp_path))
    for down[0], heard in ((3, 5), (3, 5), (0, 8), (0, 8)):
        found = Distill()._ask(teacher, student, some, False, FakeSession("echo"), run)
        assert len(found) == heard and all(said.text for said in found.values())
    assert asked == [8, 3, 3]


def test_prompts_in_a_file_suffice(system: System, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n\n".join(e.prompt for e in rows(40)))
    method = Distill(unlabelled=str(tmp_path / "prompts.txt"), **QUICK)
    made, run = distil(method, system, task(()), tmp_path / "a")
    assert run.notes["rows"] == 36 and validation(run)[-1] < validation(run)[0]
    (tmp_path / "prompts.txt").rename(tmp_path / "moved.txt")
    again, run = distil(replace(method, unlabelled=str(tmp_path / "moved.txt")), system, task(rows(9)), tmp_path / "a")
    assert again.fingerprint == made.fingerprint  # the same prompts, whatever the file is called


def test_held_out_rows_among_the_prompts_are_refused(system: System, tmp_path: Path) -> None:
    held = Task("t", tmp_path, "Say which.", "accuracy", ("negative", "positive"), train=rows(40), test=rows(2))
    data = held.split().learnable
    assert all(e in data.sealed for e in held.test) and held.test[0].prompt not in repr(data)
    long = "the plot of this film is thin but its music stays with whoever has seen it once"
    held = replace(held, test=(*held.test, replace(held.test[0], id="long", prompt=long)))
    data = held.split().learnable
    for said in (held.test[1].prompt.upper() + " !", long.replace("seen it once", "seen it twice")):  # nearly the same
        (tmp_path / "prompts.txt").write_text(f"a new one\n\n{said}")
        with pytest.raises(MethodError, match="rows that the System is measured on; .*found 1; .*take them out"):
            distil(Distill(unlabelled=str(tmp_path / "prompts.txt"), **QUICK), system, data, tmp_path / "a")


def test_no_row_shows_the_teacher_its_own_answer(system: System, tmp_path: Path) -> None:
    """A row that is a demonstration is answered without it: else its answer would only be copied."""
    data = task(rows(8))
    shown = replace(system, demonstrations=Demonstrations(tuple((e.prompt, "positive") for e in data.train)))
    _, run = distil(Distill(**QUICK), shown, data, tmp_path / "a")
    [kept] = (tmp_path / "a").glob("artifacts/*/answers.json")
    session = run.session(system.model)
    wanted = [
        replace(shown, demonstrations=Demonstrations(tuple(p for p in shown.demonstrations.pool if p[0] != e.prompt)))
        .label_scores([e], session)[0][0] for e in data.train
    ]  # fmt: skip
    found = json.loads(kept.read_text())
    assert [[round(v, 4) for v in row] for row in found] == [[round(v, 4) for v in row] for row in map(list, wanted)]


# --- smaller models ---------------------------------------------------------------------------------------------------


def shrunk(system: System, home: Path, *, tie: bool = False, vocabulary: bool = False) -> System:
    """The System with a model of its own in place of the base: tied layers, a trimmed vocabulary, or other weights."""
    module, tokenizer = make_model("llama"), make_tokenizer()
    if vocabulary:
        module, tokenizer, _ = smaller_vocabulary()
    first, second = (layer.mlp for layer in module.model.layers)
    with torch.no_grad():
        second.up_proj.weight.mul_(0.5)
    if tie:
        second.up_proj.weight = first.up_proj.weight
    run = Run(Store(home))
    return folders.settle(replace(system, home=home), run, module, tokenizer, "0" * 64, {})


def test_packed_weights_learn_through_an_adapter(free: System, tmp_path: Path) -> None:
    small = Quantize(bits=4, rounding="nearest", group=32, rows=4).apply(
        replace(free, home=tmp_path / "a"), task(rows(8, lambda _: "so it is"), ()), Run(Store(tmp_path / "a"))
    )
    made, run = distil(Distill(**QUICK, epochs=6.0), small, task(rows(48), ()), tmp_path / "a")
    assert [t.kind for t in made.model.standing] == ["model", "adapter"]
    assert validation(run)[-1] < 0.8 * validation(run)[0]
    assert made.answer(rows(2), run.session(made.model))
    with pytest.raises(MethodError, match="packed weights cannot be trained"):
        distil(Distill(adapter="full"), small, task(rows(8), ()), tmp_path / "a")


@pytest.mark.parametrize("tie", [False, True])
def test_a_smaller_model_is_healed_whole(system: System, tie: bool, tmp_path: Path) -> None:
    home = tmp_path / "a"
    plain = replace(system, decoding=replace(system.decoding, prior=()))
    small = shrunk(plain, home, tie=tie)
    made, run = distil(Distill(batch=8, learning_rate=3e-3), small, task(rows(64)), home)
    assert run.notes["teacher"] == "before it was made smaller" and made.demonstrations == system.demonstrations
    assert validation(run)[-1] < 0.6 * validation(run)[0]
    assert [t.kind for t in made.model.standing] == ["model"] and made.model.original == system.model
    before, _ = models.load(small.model, home)
    after, _ = models.load(made.model, home)
    ups = [layer.mlp.up_proj.weight for layer in after.model.layers]
    assert (ups[0] is ups[1]) == tie
    assert not torch.equal(ups[1], before.model.layers[1].mlp.up_proj.weight)
    folder = made.model.standing[0].folder
    assert folder and sum(f.stat().st_size for f in folder.glob("*.safetensors")) < 1.01 * sum(
        f.stat().st_size for f in small.model.standing[0].folder.glob("*.safetensors")  # type: ignore[union-attr]
    )
    again, _ = distil(Distill(batch=8, learning_rate=3e-3), shrunk(plain, tmp_path / "b", tie=tie), task(rows(64)),
                      tmp_path / "b")  # fmt: skip
    assert again.fingerprint == made.fingerprint


def test_an_adapter_is_merged_into_a_smaller_model(free: System, tmp_path: Path) -> None:
    small = shrunk(free, tmp_path / "a")
    made, run = distil(Distill(**QUICK, adapter="lora"), small, task(rows(32), ()), tmp_path / "a")
    assert [t.kind for t in made.model.standing] == ["model"]
    assert validation(run)[-1] < validation(run)[0]
    # What was kept is what was learnt: it lies nearer to the teacher than before.
    modules = [models.load(one.model, made.home)[0].requires_grad_(True) for one in (small, made)]
    session, asked = TorchSession(*models.load(free.model, made.home)), rows(32)
    teacher = Teacher(free, session, session)
    prompts = session.encode(made.prompts(asked, blind=True))
    answers = [session.encode_answer(a.text, end=False) for a in free.answers(asked, session)]
    judged = teacher.judge(asked, [Row(p, (a,)) for p, a in zip(prompts, answers, strict=True)], 0, 1.0)
    before, after = (_step(module, module, judged, losses.Imitate(teacher.table))[0] for module in modules)
    assert after < 0.8 * before


def test_a_trimmed_vocabulary_is_taught_by_tokens(free: System, tmp_path: Path) -> None:
    small = shrunk(free, tmp_path / "a", vocabulary=True)
    made, run = distil(Distill(batch=8, learning_rate=3e-3), small, task(rows(32), ()), tmp_path / "a")
    assert run.notes["targets"] == "tokens" and run.notes["on_policy"] > 0
    assert validation(run)[-1] < 0.6 * validation(run)[0]
    assert made.answer(rows(2), run.session(made.model))


def test_an_adapter_stays_beside_tied_layers(free: System, tmp_path: Path) -> None:
    small = shrunk(free, tmp_path / "a", tie=True)
    made, run = distil(Distill(**QUICK, adapter="lora"), small, task(rows(32), ()), tmp_path / "a")
    assert [t.kind for t in made.model.standing] == ["model", "adapter"]
    assert validation(run)[-1] < validation(run)[0] and made.answer(rows(2), run.session(made.model))


def test_a_saved_smaller_model_is_taught_by_what_it_was_made_of(free: System, tmp_path: Path) -> None:
    tuned = replace(free, model=free.model.add(models.Transform("adapter", "0" * 64)))
    for whole, home in ((free, tmp_path / "a"), (tuned, tmp_path / "b")):
        again = load(shrunk(whole, home).save(home / "small"), home)
        assert _made_of(again, whole) and not _made_of(again, tuned if whole is free else free)
        if whole is free:
            assert Distill()._teacher(again, task(())).model.identity == free.model.identity
            continue
        with pytest.raises(MethodError, match="not at hand; .*set teacher=FOLDER"):
            Distill()._teacher(again, task(()))
        assert Distill()._teacher(shrunk(whole, home), task(())).model == tuned.model
    for home, change in ((tmp_path / "c", "changed"), (tmp_path / "d", "gone")):
        base = Path(shutil.copytree(free.model.base, home / "base"))
        whole = replace(free, model=models.resolve(str(base)))
        again = load(shrunk(whole, home).save(home / "small"), home)
        assert Distill()._teacher(again, task(())).model == whole.model
        weights = load_file(base / "model.safetensors")
        save_file({k: v + 1 for k, v in weights.items()}, base / "model.safetensors", metadata={"format": "pt"})
        if change == "gone":
            shutil.rmtree(base)
        with pytest.raises(MethodError, match="not at hand; .*set teacher=FOLDER"):
            Distill()._teacher(again, task(()))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_refusals(system: System, other: System, tmp_path: Path) -> None:
    data, home = task(rows(16)), tmp_path / "h"
    bare = replace(system, demonstrations=Demonstrations(), decoding=replace(system.decoding, prior=()))
    with pytest.raises(MethodError, match="teacher and student are the same; expected a teacher, .*set teacher=FOLDER"):
        distil(Distill(), bare, data, home)
    with pytest.raises(MethodError, match="same"):
        distil(Distill(clear="none"), replace(bare, demonstrations=system.demonstrations), data, home)
    for none in ((), (Example("x", ""),)):
        with pytest.raises(MethodError, match="nothing to distil on"):
            distil(Distill(), system, task(none), home)
    chosen = task((Example("x", "which?", choices=("a", "b")),), ())
    with pytest.raises(MethodError, match="bring no choices"):
        distil(Distill(unlabelled="prompts.txt"), system, chosen, home)
    replace(other, decoding=Decoding(("positive", "mixed"), True)).save(tmp_path / "labels")
    with pytest.raises(MethodError, match="other labels; .*found 2; 'mixed' in one only"):
        distil(Distill(teacher=str(tmp_path / "labels")), system, data, home)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="no System"):
        distil(Distill(teacher=str(tmp_path / "empty")), system, data, home)
    with pytest.raises(ModelError, match="no file nowhere.gguf"):
        distil(Distill(teacher="nowhere.gguf"), system, data, home)
    server = "openai:model@http://127.0.0.1:9/v1"
    replace(system, model=models.resolve(server)).save(tmp_path / "server")
    with pytest.raises(ArtifactError, match="--trust"):
        distil(Distill(teacher=str(tmp_path / "server")), system, data, home)
    assert Distill(teacher=str(tmp_path / "server"))._teacher(system, replace(data, trusted=True)).model.remote
    for wrong in ({"clear": "all"}, {"adapter": "dora"}, {"temperature": 0.0}, {"gold": 1.5}, {"on_policy": -0.1}):
        with pytest.raises(ValueError):
            Distill(**wrong)  # type: ignore[arg-type]


def test_labels_in_another_order_are_the_same(system: System, other: System, tmp_path: Path) -> None:
    turned = replace(other, decoding=Decoding(LABELS[::-1], True, prior=(-1.0, -5.0), max_tokens=6))
    turned.save(tmp_path / "teacher")
    method = Distill(teacher=str(tmp_path / "teacher"), **QUICK, epochs=6.0)
    made, run = distil(method, system, task(rows(64)), tmp_path / "a")
    asked = rows(64)
    same = [a == b for a, b in zip(turned.answer(asked), made.answer(asked, run.session(made.model)), strict=True)]
    assert sum(same) > 48


def test_its_place_in_a_recipe() -> None:
    Recipe((*parse("fewshot+calibrate").methods, Distill())).check()
    with pytest.raises(MethodError, match="stands twice"):
        Recipe((Distill(), Distill())).check()
