"""Human feedback: reading and weighing judgements, judges and win rates, and the four methods that learn from them."""

from __future__ import annotations

import io
import itertools
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import TEXT, reference
from test_cli import whet

from whet import feedback, metrics, scorecard, task
from whet.engine import Sampling
from whet.engine.prefix import Row
from whet.engine.torch import TorchSession
from whet.errors import MethodError, TaskError
from whet.feedback import Judged, Versus, agreement, collect, divide, pairs, thumbs, weighted
from whet.methods import Method, Run, make
from whet.methods.continual import Continual
from whet.methods.dpo import DPO, ahead, held_out
from whet.methods.kto import KTO, _other
from whet.methods.reward import Reward, feedback_of, fit, judged_by, metric_of, render_pairs
from whet.methods.rl import RL, ByMetric, _price, advantages, spread
from whet.metrics import Outcome
from whet.model import resolve
from whet.search import _preferred, tune
from whet.store import Store
from whet.system import Decoding, System
from whet.task import Example, Learnable
from whet.train.batches import steps
from whet.train.policy import Policy
from whet.update import _told, check, told, update

THINGS = ("lamp", "kettle", "chair", "radio", "table", "clock", "carpet", "mirror", "heater", "camera")


def write(folder: Path, rows: Sequence[dict[str, Any]], test: Sequence[dict[str, Any]] = (), **header: Any) -> Path:
    """A task of feedback, with test rows of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    body = {"metric": "win_rate", "instruction": "Answer.", "feedback": "feedback.jsonl", **header}
    (folder / "task.yaml").write_text(json.dumps(body))
    test = test or [{"prompt": "may I call you today?", "chosen": "call us at nine", "rejected": "all is well"}]
    for name, some in (("feedback", rows), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    return folder


def judgements(count: int = 24) -> tuple[Judged, ...]:
    """Pairs of which the chosen side begins with one word and the rejected one with another."""
    return tuple(
        Judged(f"j{n}", f"my {THINGS[n % 10]} number {n} broke", f"yes send the {THINGS[n % 10]}", "no it was bad",
               annotator=("ann", "bob", "cy")[n % 3], group=f"g{n // 2}")
        for n in range(count)
    )  # fmt: skip


@pytest.fixture
def system(model_folder: str, home: Path, fp32: None) -> System:
    return System(resolve(model_folder), "Answer.", decoding=Decoding(max_tokens=8), home=home)


def learnable(**more: Any) -> Learnable:
    return Learnable("toy", "Answer.", "win_rate", judged=judgements(), **more)


class Longest:
    """A judge that likes length."""

    name = "length"

    def __call__(self, asked: Sequence[tuple[Example, str]]) -> list[float]:
        return [float(len(answer)) for _, answer in asked]


# --- reading ----------------------------------------------------------------------------------------------------------


def test_every_form_of_judgement_is_read(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "annotator": "ann", "time": "2025-01-01", "group": "g"},
        {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "a"}],
         "rejected": [{"role": "assistant", "content": "b"}]},
        {"prompt": "p2", "completion": "c", "label": True}, {"prompt": "p3", "completion": "d", "label": 0},
    ]  # fmt: skip
    made = task.load(write(tmp_path / "t", rows)).judged
    assert [(j.prompt, j.chosen, j.rejected) for j in made] == [
        ("p", "a", "b"), ("q", "a", "b"), ("p2", "c", None), ("p3", None, "d")
    ]  # fmt: skip
    assert (made[0].annotator, made[0].time, made[0].group, made[0].id) == ("ann", "2025-01-01", "g", "feedback-1")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_holds_pairs_thumbs_and_ratings(kind: str, tmp_path: Path) -> None:
    columns = ("prompt", "chosen", "rejected", "completion", "label", "rating")
    cells = [("hello a", "x", "y", None, None, None), ("hello b", None, None, "z", True, None),
             ("hello c", None, None, "w", False, None), ("hello d", None, None, "v", None, 4.0),
             ("hello d", None, None, "u", None, 2.0)]  # fmt: skip
    file = tmp_path / f"feedback.{kind}"
    if kind == "csv":
        lines = [columns, *(["" if c is None else str(c).lower() for c in row] for row in cells)]
        file.write_text("\n".join(map(",".join, lines)))
    else:
        import pyarrow as arrow
        from pyarrow import parquet

        parquet.write_table(arrow.Table.from_pylist([dict(zip(columns, row, strict=True)) for row in cells]), file)
    made, _ = feedback.load(tmp_path, file.name)
    assert [(j.prompt, j.chosen, j.rejected) for j in made] == [
        ("hello a", "x", "y"), ("hello b", "z", None), ("hello c", None, "w"), ("hello d", "v", "u")
    ]  # fmt: skip
    half = tmp_path / "half.csv"
    half.write_text("prompt,chosen,rejected,completion,label\np,a,,,\n")
    with pytest.raises(TaskError, match="half.csv line 2: half a pair"):
        feedback.load(tmp_path, half.name)


@pytest.mark.parametrize("same", [0.1, 0.7, 5.0])
def test_equal_ratings_say_nothing(same: float, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "completion": "a", "rating": same} for n in range(3)]  # fmean([0.1] * 3) is not 0.1
    rows.append({"prompt": "q", "completion": "a", "rating": same})
    write(tmp_path / "t", rows)
    assert feedback.load(tmp_path / "t", "feedback.jsonl")[0] == ()


def test_ratings_become_pairs_and_thumbs(tmp_path: Path) -> None:
    def rated(prompt: str, completion: str, rating: float, annotator: str) -> dict[str, Any]:
        return {"prompt": prompt, "completion": completion, "rating": rating, "annotator": annotator}

    rows = [
        rated("p", "fine", 5, "ann"), rated("p", "poor", 2, "ann"), rated("p", "worst", 2, "ann"),
        rated("q", "alone", 4, "ann"), rated("q", "harsh", 2, "bob"), rated("r", "kind", 1, "bob"),
        rated("s", "even", 1.5, "bob"),
    ]  # fmt: skip
    loaded = task.load(write(tmp_path / "t", rows))
    found = {(j.chosen, j.rejected) for j in loaded.judged}
    # ann's mean is 3.25, bob's 1.5: his 2 is praise, and his 1.5 says nothing.
    assert found == {("fine", "poor"), ("fine", "worst"), ("alone", None), ("harsh", None), (None, "kind")}
    assert any("7 ratings made into 2 pairs and 3 thumbs" in note for note in loaded.notes)


@pytest.mark.parametrize("steps", [2, 4, 9])
def test_ratings_make_no_more_pairs_than_there_are_ratings(steps: int, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": f"answer {n}", "rating": n * 7 % 9 % steps} for n in range(9)]
    write(tmp_path / "t", rows)
    rating = {row["completion"]: row["rating"] for row in rows}
    found = [(j.chosen, j.rejected) for j in feedback.load(tmp_path / "t", "feedback.jsonl")[0]]
    assert len(found) == 5 and {side for pair in found for side in pair} == rating.keys()
    assert all(rating[chosen or ""] > rating[rejected or ""] for chosen, rejected in found)


@pytest.mark.parametrize(
    ("row", "says"),
    [({"prompt": "p", "chosen": "same", "rejected": " same "}, r"line 2: both sides .* equal"),
     ({"prompt": "p", "chosen": "a"}, r"line 2: half a pair"),
     ({"prompt": " ", "chosen": "a", "rejected": "b"}, r"line 2: a judgement without a prompt"),
     ({"prompt": "p", "completion": "a", "label": "perhaps"}, r"line 2: the label is no judgement"),
     ({"prompt": "p", "completion": "a", "rating": "high"}, r"line 2: an answer without a judgement"),
     ({"prompt": "p", "completion": "a"}, r"line 2: an answer without a judgement"),
     ({"prompt": "p"}, r"line 2: nothing is judged")],
)  # fmt: skip
def test_bad_judgements_are_refused_by_file_and_line(row: dict[str, Any], says: str, tmp_path: Path) -> None:
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    with pytest.raises(TaskError, match=f"feedback.jsonl {says}"):
        task.load(write(tmp_path / "t", [good, row]))


def test_a_few_bad_judgements_are_left_out_and_named(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{n}", "chosen": "a", "rejected": "a" if n == 7 else "b"} for n in range(40)]
    loaded = task.load(write(tmp_path / "t", rows))
    assert len(loaded.judged) == 39
    assert any(n.startswith("feedback.jsonl: 1 of 40 rows left out: line 8: both sides") for n in loaded.notes)


def test_feedback_about_confirm_prompts_is_dropped_and_named(tmp_path: Path) -> None:
    test = [{"prompt": "Where is my parcel now, please?", "chosen": "a", "rejected": "b", "group": "held"}]
    rows = [
        {"id": "same", "prompt": "where is my parcel now please", "chosen": "x", "rejected": "y"},
        {"id": "group", "prompt": "something else", "chosen": "x", "rejected": "y", "group": "held"},
        *({"id": f"ok{n}", "prompt": f"about the {t}", "chosen": "x", "rejected": "y"} for n, t in enumerate(THINGS)),
    ]
    loaded = task.load(write(tmp_path / "t", rows, test))
    parts = loaded.split()
    assert {name for name, _ in parts.dropped} == {"same", "group"}
    learnt = {j.prompt for j in (*parts.learnable.judged, *parts.judging)} | {e.prompt for e in parts.learnable.train}
    assert not learnt & {r["prompt"] for r in rows[:2]} and learnt <= {r["prompt"] for r in rows}
    with pytest.raises(TaskError, match="2 learnable rows leak"):
        loaded.split(strict=True)


def test_a_task_of_feedback_alone_learns_selects_and_is_judged_on_different_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": j.prompt, "chosen": j.chosen, "rejected": j.rejected, "group": j.group} for j in judgements(30)]
    parts = task.load(write(tmp_path / "t", rows)).split()
    learnt, judging = {j.group for j in parts.learnable.judged}, {j.group for j in parts.judging}
    select = {e.group for e in parts.select}
    assert learnt and judging and select and not (learnt & judging or learnt & select or judging & select)
    assert {e.completion for e in parts.learnable.train} <= {j.chosen for j in judgements(30)}
    assert all(e.rejected for e in parts.select) and parts.dropped == ()
    signed = [{**row, "annotator": ("ann", "bob")[n % 2]} for n, row in enumerate(rows)]
    again = task.load(write(tmp_path / "s", signed)).split(1)
    assert [j.id for j in again.judging] == [j.id for j in parts.judging]


def test_a_judge_learns_from_no_prompt_that_answers_are_compared_on(tmp_path: Path) -> None:
    train = [{"prompt": j.prompt, "completion": "x"} for j in judgements(60)]
    rows = [{"id": str(n), "prompt": r["prompt"], "chosen": "x", "rejected": "y"} for n, r in enumerate(train)]
    folder = write(tmp_path / "t", rows)
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, train)))
    parts = task.load(folder).split()
    select = {e.prompt for e in parts.select}
    assert select & {j.prompt for j in feedback.divide(task.load(folder).judged)[1]}  # or nothing is shown here
    assert parts.judging and not select & {j.prompt for j in (*parts.judging, *parts.learnable.judged)}
    assert {rows[int(name)]["prompt"] for name, _ in parts.dropped} == select


# --- choosing and weighing --------------------------------------------------------------------------------------------


def test_pairs_and_thumbs_from_each_other() -> None:
    up, down = Judged("1", "p", chosen="a"), Judged("2", "p", rejected="b", weight=0.5)
    whole, other = Judged("3", "q", "c", "d"), Judged("4", "r", rejected="e")
    found = [(j.chosen, j.rejected, j.weight) for j in pairs((up, down, whole, other))]
    assert found == [("c", "d", 1), ("a", "b", 0.5)]
    single = [(j.chosen, j.rejected) for j in thumbs((up, down, whole))]
    assert single == [("a", None), (None, "b"), ("c", None), (None, "d")]


def test_there_are_never_more_pairs_than_judgements() -> None:
    ups = [Judged(f"u{n}", "p", chosen=f"good {n}") for n in range(20)]
    downs = [Judged(f"d{n}", "p", rejected=f"bad {n}") for n in range(6)]
    found = pairs([*ups, *downs])
    assert [j.chosen for j in found] == [f"good {n}" for n in range(20)]
    assert {j.rejected for j in found} == {f"bad {n}" for n in range(6)}
    again = pairs([*downs[:1], *[replace(up, chosen="good", weight=0.5) for up in ups], Judged("w", "q", "c", "d")])
    assert [(j.chosen, j.rejected, j.weight) for j in again] == [("c", "d", 1), ("good", "bad 0", 10)]
    one, same, other = Judged("1", "p", "a"), Judged("2", "p", rejected=" a"), Judged("3", "p", rejected="b")
    assert pairs([one, same]) == () and [j.id for j in pairs([one, same, other])] == ["1>3"]


def test_annotators_are_weighted_or_left_out() -> None:
    rows = judgements(6)
    assert [j.weight for j in weighted(rows, ("bob=0.5",))] == [1, 0.5, 1, 1, 0.5, 1]
    assert {j.annotator for j in weighted(rows, ("cy=0", "ann=2"))} == {"ann", "bob"}
    with pytest.raises(MethodError, match="did you mean 'bob'"):
        weighted(rows, ("bib=1",))
    for entry in ("bob", "bob=x", "bob=-1", "bob=nan"):
        with pytest.raises(MethodError, match="cannot read the weight"):
            weighted(rows, (entry,))


def test_an_annotator_whose_judgements_are_all_set_aside_may_be_weighted(tmp_path: Path) -> None:
    rows = [{"prompt": j.prompt, "chosen": j.chosen, "rejected": j.rejected, "annotator": "ann"} for j in judgements()]
    splits = task.load(write(tmp_path / "t", rows)).split()
    held = {j.prompt for j in splits.judging}
    named = [{**row, "annotator": "jo" if row["prompt"] in held else "ann"} for row in rows]
    data = task.load(write(tmp_path / "t", named)).split().learnable
    assert {j.annotator for j in data.judged} == {"ann"} and data.annotators == ("ann", "jo")
    assert feedback_of(data, ("jo=0", "ann=2")) == tuple(replace(j, weight=2) for j in data.judged)
    with pytest.raises(MethodError, match="no judgement is by 'joe'.*'jo'"):
        feedback_of(data, ("joe=0",))


def test_the_judge_gets_prompts_of_its_own() -> None:
    rows = judgements(120)
    learn, judge = divide(rows)
    assert len(learn) + len(judge) == 120 and 30 <= len(judge) <= 50
    assert not {j.group for j in learn} & {j.group for j in judge}
    assert len(judge) < len(divide(rows, 0.6)[1]) < 90
    loose = [replace(j, group=None) for j in rows]
    assert 28 <= len(divide(loose)[1]) <= 52
    odd = replace(loose[0], id="odd", group=divide(rows)[1][0].group)  # one prompt, on both sides by its groups
    learn, judge = divide([*rows, odd])
    assert not {j.prompt for j in learn} & {j.prompt for j in judge}
    one, two = divide([loose[0]]), divide(loose[:2])
    assert one == ((loose[0],), ()) and [len(part) for part in two] == [1, 1]


def test_two_who_judge_the_same_answers_leave_enough_to_learn_from() -> None:
    rows = [replace(r, id=f"{r.id}-{who}", annotator=who) for r in judgements(40)[::2] for who in ("ann", "bob")]
    learn, judge = divide(rows)
    assert len(learn) >= 20 and len(judge) >= 4
    assert not {j.prompt for j in learn} & {j.prompt for j in judge}
    # As it comes in: one judges all, then the other does; what was the judge's stays the judge's.
    alone = divide([r for r in rows if r.annotator == "ann"])
    assert set(alone[1]) <= set(judge) and set(alone[0]) <= set(learn)


def test_what_the_judge_was_given_stays_its_own_whatever_the_seed(tmp_path: Path) -> None:
    rows = [{"prompt": j.prompt, "chosen": j.chosen, "rejected": j.rejected} for j in judgements(150)]
    loaded = task.load(write(tmp_path / "t", rows))
    parts = [loaded.split(seed) for seed in range(3)]
    taken = {j.id for j in parts[0].judging}
    assert 30 <= len(taken) <= 70 and all({j.id for j in one.judging} == taken for one in parts)
    assert not any(taken & {j.id for j in one.learnable.judged} for one in parts)
    told = loaded.judged
    for some in range(20, 150, 10):  # a file that grows
        learn, judge = divide(told[:some])
        assert {j.id for j in judge} <= taken and not {j.id for j in learn} & taken


# --- judges and win rates ---------------------------------------------------------------------------------------------


def test_agreement_by_hand() -> None:
    class Known:
        name = "known"

        def __call__(self, asked: Sequence[tuple[Example, str]]) -> list[float]:
            return [{"a": math.log(3), "b": 0.0, "c": math.log(9)}[answer] for _, answer in asked]

    sides = (("a", "b"), ("b", "a"), ("c", "b"), ("a", "a"))
    rows = [Judged(str(n), f"p{n}", *pair) for n, pair in enumerate(sides)]
    found = agreement(Known(), rows)  # probabilities of the chosen side: 3/4, 1/4, 9/10, 1/2
    assert found.accuracy[0] == pytest.approx(2.5 / 4) and found.n == 4
    assert found.brier[0] == pytest.approx((1 / 16 + 9 / 16 + 1 / 100 + 1 / 4) / 4)
    # bins of confidence: {0.5} is right by half, {0.75, 0.75} once of two, {0.9} always
    assert found.ece == pytest.approx((0 + abs(1 - 1.5) + abs(1 - 0.9)) / 4)
    assert found.accuracy[1] <= found.accuracy[0] <= found.accuracy[2]
    with pytest.raises(MethodError, match="no pairs"):
        agreement(Known(), [Judged("1", "p", "a")])


@pytest.mark.embedder
def test_the_embedding_rival_learns_what_sets_the_sides_apart(home: Path) -> None:
    from whet.embed import Embedder

    rows = judgements(30)
    judge = feedback.EmbeddingJudge(rows[:20], Embedder(home))
    assert agreement(judge, rows[20:]).accuracy[0] == 1
    turned = [replace(r, chosen=r.rejected, rejected=r.chosen) for r in rows[:20]]
    flipped = feedback.EmbeddingJudge(turned, Embedder(home))
    assert agreement(flipped, rows[20:]).accuracy[0] == 0 and flipped.name != judge.name


def test_wins_ties_and_the_length_controlled_rate(system: System) -> None:
    rows = [Example(str(n), f"p{n}", "x") for n in range(4)]
    metric = Versus(Longest(), system, system.session)
    metric.known.update(zip(rows, ["one two", "one two", "same", "one"], strict=True))
    found = metric.outcomes(["one two three", "one", " same ", "one two three four five"], rows)
    assert [o.score for o in found] == [1, 0, 0.5, 1] and [o.weight for o in found] == [1, -1, 0, 4]
    assert metric.aggregate(found) == pytest.approx(0.625)
    # A judge of length alone: at equal length nothing is won. The intercept of least squares, by numpy.
    import numpy as np

    spread = float(np.std([1, -1, 0, 4]))
    x = np.tanh(np.array([1, -1, 0, 4]) / spread)
    wanted = np.linalg.lstsq(np.stack([np.ones(4), x], 1), np.array([1, 0, 0.5, 1]), rcond=None)[0][0]
    even = feedback.Controlled(spread)
    assert even.aggregate(found) == pytest.approx(wanted) and wanted < 0.625
    assert even.aggregate([replace(o, weight=0.0) for o in found]) == pytest.approx(0.625)


def test_answers_without_spaces_have_a_length(system: System) -> None:
    assert [feedback.words(t) for t in ("two words", "とても良い", "猫 and dog", "")] == [2, 5, 3, 0]
    rows = [Example(str(n), f"p{n}", "x") for n in range(4)]
    metric = Versus(Longest(), system, system.session)
    metric.known.update(zip(rows, ["良い映画", "良い", "同じ", "はい"], strict=True))
    found = metric.outcomes(["とても良い映画です", "悪", "同じ", "はいそうですとても良い"], rows)
    assert [o.weight for o in found] == [5, -1, 0, 9] and metric.aggregate(found) == pytest.approx(0.625)
    assert feedback.controlled(found)[0] < 0.55  # a judge of length alone


def test_a_win_rate_is_scored_with_judge_and_base_in_its_protocol(system: System, tmp_path: Path) -> None:
    rows = [Example(str(n), f"what about the {t}?", "yes", rejected="no") for n, t in enumerate(THINGS[:4])]
    metric = Versus(Longest(), replace(system, instruction="Short."), system.session)
    card = scorecard.evaluate(system, rows, metric, store=Store(tmp_path))
    assert 0 <= card.score <= 1 and card.protocol["judge"] == "length"
    assert card.protocol["against"] == metric.base.fingerprint[:16]
    own = scorecard.evaluate(metric.base, rows, metric, session=system.session, store=Store(tmp_path))
    assert own.score == 0.5 and {o.score for o in own.outcomes} == {0.5}
    with pytest.raises(TaskError, match="cannot be scored"):
        scorecard.evaluate(system, rows, metrics.get("win_rate"))
    found = feedback.win_rate(system, metric.base, Longest(), rows)
    assert found.rate[0] == card.score and found.n == 4 and found.judge == "length"
    scored = system.session.score(system.prompts(rows), [("yes", "no")] * 4, end=True)
    assert found.prefers is not None and found.prefers[0] == sum(a.mean > b.mean for a, b in scored) / 4


def test_beside_a_win_rate_stands_how_often_its_judge_is_right(system: System) -> None:
    rows = [Example(str(n), f"what about the {t}?", "yes yes", rejected="no") for n, t in enumerate(THINGS[:4])]
    rows += [Example("none", "and that?", "yes")]
    card = scorecard.evaluate(system, rows, Versus(Longest(), system, system.session))
    job: Any = SimpleNamespace(notes=[], splits=SimpleNamespace(confirm=rows), run=run(system.home),
                               wish=SimpleNamespace(seed=0))  # fmt: skip
    right, low, high = _preferred(job, card, system, Longest())["agreement"]
    assert right == high == 1 and 0.5 < low < 0.52  # four of four, by Wilson
    assert job.notes[-1] == f"the judge is right on 100.0 % [{100 * low:.1f}, 100.0] of 4 pairs that people judged"
    job.splits.confirm = rows = [replace(e, completion="no", rejected="yes yes") for e in rows[:4]]
    assert _preferred(job, card, system, Longest())["agreement"][0] == 0 and "says little" in job.notes[-1]
    job.splits.confirm = [replace(e, rejected=None) for e in rows]
    assert _preferred(job, card, system, Longest())["agreement"] is None and "not known" in job.notes[-1]


def test_sealed_pairs_longer_than_the_window_are_compared(system: System) -> None:
    """By what is left of them, per token, as one plain forward of each side scores it."""
    session, texts = system.session, ("a film " * 400, "great", "was it " * 300, "no, it was not")
    assert isinstance(session, TorchSession)
    rows = [Example(f"{n}-{m}", "tell me " * 400 if n else "p", one, rejected=other)
            for n in range(2) for m, (one, other) in enumerate(itertools.permutations(texts, 2))]  # fmt: skip
    judged = [Judged(e.id, e.prompt, e.completion, e.rejected) for e in rows]
    made, _ = render_pairs(system, judged, session)
    sides = [[reference(session.module, row.prompt, side) for side in row.continuations] for row in made]
    wanted, by_sum = ([float(of(a) > of(b)) for a, b in sides] for of in (fmean, sum))
    found = feedback.prefers(system, rows, session)
    assert found == wanted != by_sum
    turned = [replace(e, completion=e.rejected, rejected=e.completion) for e in rows]
    assert feedback.prefers(system, turned, session) == [1 - value for value in found]


def test_a_pair_that_two_people_judged_is_not_learnt_by_both_sides() -> None:
    rows = [replace(r, annotator="ann") for r in judgements(12)]
    again = [replace(r, id=f"b{n}", annotator="bob") for n, r in enumerate(rows[:6])]
    turned = replace(again[0], chosen=again[0].rejected, rejected=again[0].chosen)  # bob may see it the other way
    learn, judge = divide([*rows, turned, *again[1:]])
    assert len(learn) + len(judge) == 18 and learn and judge
    assert not {r.prompt for r in learn} & {r.prompt for r in judge}


def test_settings_of_what_has_no_validation_are_not_raced(system: System, home: Path) -> None:
    for method, name in ((Reward(), "reward"), (RL(), "rl"), (Continual(strategy="merge"), ".*strategy=merge")):
        for race in (lambda m: tune.race(tune.candidates(m), system, learnable(), run(home)),
                     lambda m: tune.sample(m, 2, system, learnable(), run(home))):  # fmt: skip
            with pytest.raises(MethodError, match=f"no validation .* found {name}"):
                race(method)


def test_an_update_whose_answers_win_less_is_refused(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": j.prompt, "chosen": j.chosen, "rejected": j.rejected, "group": j.group} for j in judgements(30)]
    asked = [{"prompt": f"my {t} is gone", "chosen": "yes", "rejected": "no"} for t in THINGS]
    loaded = task.load(write(tmp_path / "t", rows, asked))
    file = tmp_path / "judged.jsonl"
    file.write_text("".join(json.dumps({**r, "prompt": f"{r['prompt']} again"}) + "\n" for r in rows))

    class Dislikes(Longest):
        """A judge to whom whatever is new is worse."""

        def __call__(self, pairs: Sequence[tuple[Example, str]]) -> list[float]:
            return [0.0 if text in self.known else -1.0 for _, text in pairs]

        known: set[str] = set()

    judge = Dislikes()
    judge.known = {a.text for a in system.answers(loaded.test)}
    monkeypatch.setattr("whet.update.metric_of", lambda t, base, r, s: Versus(judge, base, r.session(base.model)))
    changed = {"epochs": 6.0, "batch": 4, "rank": 4, "learning_rate": 2e-2}
    made = update(system, loaded, run(system.home), changed, file)
    assert made.after.score < 0.5 and "win rate fell from 50.0" in made.refused
    # It is of one mind about "yes" and "no", and that is told, with a warning.
    assert made.agreement is not None and made.record()["agreement"] == list(made.agreement.accuracy) == [0.5] * 3
    even = made.record()["controlled"]
    assert even == list(feedback.controlled(made.after.outcomes)) and even[1] <= even[0] <= even[2]
    assert f"win rate at equal length {100 * even[0]:.1f} % [{100 * even[1]:.1f}, {100 * even[2]:.1f}]" in told(made)
    [said] = [line for line in told(made) if "judge" in line]
    remedy = "korean: no rows to measure it on; name its folder in earlier: of task.yaml"
    assert remedy in told(replace(made, unmeasured=("korean",))) and remedy not in told(made)
    assert "right on 50.0 % [50.0, 50.0] of 10 pairs" in said and said.endswith("a win rate by it says little")


def test_the_judge_of_an_update_has_the_tasks_own_judgements(system: System, tmp_path: Path) -> None:
    rows = [{"prompt": j.prompt, "chosen": j.chosen, "rejected": j.rejected, "group": j.group} for j in judgements(60)]
    loaded = task.load(write(tmp_path / "t", rows))
    alone = loaded.split().judging
    again = [{**r, "prompt": f"{r['prompt']} again", "group": f"{r['group']} again"} for r in rows[:12]]
    few = [{**r, "annotator": "ann"} for r in again]
    file = tmp_path / "judged.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in [*few, rows[0]]))
    wider, splits = _told(loaded, file, settings := {"weights": ("ann=2",)}, 0, run(system.home))
    assert not settings and {j.prompt for j in alone} <= {j.prompt for j in splits.judging} and len(alone) > 10
    assert len(wider.judged) == len(rows) + len(few)  # what stands in both counts once
    learnt = {j.prompt for j in splits.learnable.judged}
    assert learnt and learnt <= {r["prompt"] for r in [*few, rows[0]]}
    assert not learnt & {j.prompt for j in splits.judging}


def test_an_annotator_of_the_task_alone_can_be_left_out(system: System, tmp_path: Path) -> None:
    rows = [{"prompt": j.prompt, "chosen": j.chosen, "rejected": j.rejected, "annotator": ("ann", "kit")[n % 2]}
            for n, j in enumerate(judgements(60))]  # fmt: skip
    loaded, file = task.load(write(tmp_path / "t", rows)), tmp_path / "mine.jsonl"
    again = [{**r, "prompt": f"{r['prompt']} again", "annotator": "ann"} for r in rows]
    file.write_text("".join(json.dumps(r) + "\n" for r in again))
    wider, splits = _told(loaded, file, {"weights": ("kit=0",)}, 0, run(system.home))
    assert {j.annotator for j in splits.judging} == {"ann"} == {j.annotator for j in wider.judged}
    with pytest.raises(MethodError, match="no judgement is by 'cy'"):
        _told(loaded, file, {"weights": ("cy=0",)}, 0, run(system.home))


def test_judgements_that_all_fall_to_the_judge_are_named(system: System, tmp_path: Path) -> None:
    rows = [{"prompt": j.prompt, "chosen": j.chosen, "rejected": j.rejected} for j in judgements(60)]
    loaded, file = task.load(write(tmp_path / "t", rows)), tmp_path / "mine.jsonl"
    theirs = next(j for j in loaded.split().judging)
    file.write_text(json.dumps({"prompt": theirs.prompt, "chosen": "yes, of course", "rejected": "no"}) + "\n")
    with pytest.raises(TaskError, match=r"all 1 judgements of mine.jsonl fall to the judge.*judge answers to other"):
        _told(loaded, file, {}, 0, run(system.home))


def test_judgements_of_held_out_prompts_alone_are_refused_and_named(system: System, tmp_path: Path) -> None:
    rows = [{"prompt": j.prompt, "chosen": j.chosen, "rejected": j.rejected} for j in judgements(20)]
    asked = [{"prompt": f"my {t} is gone", "chosen": "yes", "rejected": "no"} for t in THINGS]
    loaded = task.load(write(tmp_path / "t", rows, asked))
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in asked))
    said = f"all {len(asked)} judgements are about prompts .* found mine-1, which repeats .*; judge answers to others"
    with pytest.raises(TaskError, match=said):
        update(system, loaded, run(system.home), {}, file)
    held = replace(loaded, judged=feedback.load(tmp_path, "mine.jsonl")[0])
    with pytest.raises(TaskError, match=said):
        check(make("dpo"), system, held, held.split())
    with pytest.raises(TaskError, match=said):
        metric_of(held, system, run(system.home))


# --- methods ----------------------------------------------------------------------------------------------------------


def run(home: Path, **more: Any) -> Run:
    return Run(Store(home), **more)


def test_a_reward_model_learns_and_is_found_again(system: System, home: Path, tmp_path: Path) -> None:
    method, first = Reward(rank=4, learning_rate=1e-2, epochs=6, batch=4), run(home)
    before = system.fingerprint
    weights = {k: v.clone() for k, v in first.session(system.model).module.state_dict().items()}  # type: ignore[attr-defined]
    assert method.apply(system, learnable(), first) == system and system.fingerprint == before
    after = first.session(system.model).module.state_dict()  # type: ignore[attr-defined]
    assert weights.keys() == after.keys() and all(bool((weights[k] == after[k]).all()) for k in weights)
    noted = first.notes["reward"]
    assert noted["held_out"]["accuracy"][0] == 1 and noted["held_out"]["n"] + noted["pairs"] == 24
    again = run(home)
    model = method.model(system, learnable(), again)
    assert again.notes["reward"] == noted
    elsewhere = run(tmp_path / "other")
    other = method.model(replace(system, home=tmp_path / "other"), learnable(), elsewhere)
    assert other.name == model.name  # the same seed gives the same weights
    answers = ("yes send the lamp", "no it was bad", "yes send the lamp")
    scores = model([(judgements()[0].example, text) for text in answers])
    assert scores[0] == scores[2] > scores[1] + 1
    before, another = model.session.spent, replace(judgements()[0].example, id="another", group="another")
    assert model([(another, text) for text in answers[1:]]) == scores[1:] and model.session.spent == before
    model([(replace(another, history=(("user", "hello"), ("assistant", "hello"))), answers[0])])
    assert model.session.spent != before
    # Later training and demonstrations do not move it; the annotator left out does.
    assert method.model(replace(system, decoding=Decoding(max_tokens=3)), learnable(), run(home)).name == model.name
    assert replace(method, weights=("cy=0",)).model(system, learnable(), run(home)).name != model.name


def test_the_judge_of_a_win_rate_task_learns_from_what_no_method_sees(system: System, tmp_path: Path) -> None:
    rows = [{"prompt": j.prompt, "chosen": j.chosen, "rejected": j.rejected, "group": j.group} for j in judgements(30)]
    loaded = task.load(write(tmp_path / "t", rows))
    parts, quick = loaded.split(), Reward(rank=2, epochs=1)
    metric = judged_by(parts, system, run(system.home), quick)
    assert metric.judge == fit(parts.judging, system, run(system.home), quick)
    assert scorecard.evaluate(system, loaded.test, metric).score == 0.5
    with pytest.raises(TaskError, match="needs a judge"):
        judged_by(replace(parts, judging=()), system, run(system.home))


def test_the_base_that_is_scored_is_not_asked_a_second_time(system: System) -> None:
    rows = [Example(str(n), f"my {t} is gone", "yes") for n, t in enumerate(THINGS[:5])]
    metric = Versus(Longest(), system, system.session)
    before = system.session.spent
    assert scorecard.evaluate(system, rows, metric).score == 0.5
    asked = (system.session.spent - before).generated_tokens
    system.answers(rows, system.session)
    assert (system.session.spent - before).generated_tokens == 2 * asked > 0


def test_a_base_whose_answers_are_kept_is_not_asked_by_the_next_arm(system: System, home: Path) -> None:
    store, rows = Store(home), [Example(str(n), f"my {t} is gone", "yes") for n, t in enumerate(THINGS)]

    def wins() -> Versus:
        return Versus(Longest(), system, system.session)

    card = scorecard.evaluate(system, rows, wins(), store=store)
    again = wins()
    assert scorecard.evaluate(system, rows, again, store=store).outcomes == card.outcomes
    assert [again.known[e] for e in rows] == [o.answer for o in card.outcomes]


def test_thumbs_alone_leave_rl_the_metric(system: System, home: Path) -> None:
    rows = tuple(Example(str(n), f"my {t} is gone", "yes") for n, t in enumerate(THINGS))
    thumbs = tuple(Judged(str(n), f"what of {t}?", chosen="yes") for n, t in enumerate(THINGS))
    data = Learnable("toy", "Answer.", "token_f1", train=rows, judged=thumbs)
    judge, asked, own = RL()._judge(system, data, run(home))
    assert isinstance(judge, ByMetric) and asked == rows and not own


def test_systems_are_compared_by_their_win_rates(
    capsys: pytest.CaptureFixture[str], system: System, tmp_path: Path
) -> None:
    rows = [{"prompt": j.prompt, "chosen": j.chosen, "rejected": j.rejected, "group": j.group} for j in judgements(30)]
    asked = [{"prompt": f"my {t} is gone", "chosen": "yes", "rejected": "no"} for t in THINGS[:5]]
    folder = write(tmp_path / "t", rows, asked)
    replace(system, instruction="Say it at length.").save(tmp_path / "other")
    code, out, _ = whet(capsys, "compare", system.model.base, str(tmp_path / "other"), str(folder), "--json")
    found = json.loads(out)
    assert code == 0 and found["first"]["metric"] == found["second"]["metric"] == "win_rate"
    assert found["first"]["score"] == 0.5  # the base against itself
    assert found["first"]["protocol"]["judge"] == found["second"]["protocol"]["judge"]
    assert found["difference"] == pytest.approx(found["second"]["score"] - 0.5) and found["n"] == 5


@pytest.mark.parametrize("method", [
    DPO(rank=4, learning_rate=1e-2, epochs=4, batch=4),
    DPO(rank=4, learning_rate=1e-2, epochs=4, batch=4, normalise=True, beta=5),
    KTO(rank=4, learning_rate=1e-2, epochs=4, batch=4),
])  # fmt: skip
def test_learning_from_judgements_raises_the_margin(method: DPO | KTO, system: System, home: Path) -> None:
    first = run(home)
    made = method.apply(system, learnable(), first)
    assert isinstance(method, Method) and made.fingerprint != system.fingerprint
    probe = [Example("x", "my sofa number 99 broke", "yes send the sofa", rejected="no it was bad")]

    def margin(one: System) -> float:
        chosen, rejected = one.session.score(one.prompts(probe), [(probe[0].completion, probe[0].rejected or "")])[0]
        return chosen.logprob - rejected.logprob

    assert margin(made) > margin(system) + 1
    noted = first.notes
    checks = [value for _, value in noted["curves"]["validation"]]
    assert noted["held_out"]["accuracy"] == 1 and checks[-1] < checks[0]
    looks = noted["looks"]  # at each validation, the first before any step
    assert [one["loss"] for one in looks] == checks and all(one["entropy"] > 0 for one in looks)
    first, last = (one["logprob_per_token"] for one in (looks[0], looks[-1]))
    assert all(now == pytest.approx(before, abs=1e-4) for before, now in first.values()) and last != first
    assert noted["moved"]["kl"] > 0 and noted["moved"]["entropy"] > 0 and 0 < noted["moved"]["length"] <= 10
    assert len(noted["held_out"]["logprob_per_token"]["chosen"]) == 2
    again = method.apply(system, learnable(), run(home / "other"))
    assert again.fingerprint == made.fingerprint
    assert replace(method, weights=("ann=0.3",)).apply(system, learnable(), run(home)).fingerprint != made.fingerprint


def test_kto_balances_thumbs_and_estimates_its_kl_from_other_prompts(system: System) -> None:
    ups = [Judged(str(n), f"p{n}", chosen="a") for n in range(3)]
    rows = KTO().usable([*ups, Judged("9", "q", rejected="b")])
    assert [r.weight for r in rows] == [1, 1, 1, 3]
    assert [r.weight for r in KTO().usable(ups)] == [1, 1, 1]


def test_kto_reads_a_prompt_with_the_answer_of_a_row_half_the_rows_away() -> None:
    rows = [Judged("0", "p", chosen="a0"), Judged("1", "q", rejected="a1"), Judged("2", "r", chosen="a2"),
            Judged("3", "s", rejected="a3")]  # fmt: skip

    def others(*prompts: str) -> list[str | None]:
        some = [replace(row, prompt=prompt) for row, prompt in zip(rows, prompts, strict=True)]
        made = [_other(some, n) for n in range(4)]
        assert [(one.prompt, one.rejected) for one in made] == [(prompt, None) for prompt in prompts]
        return [one.chosen for one in made]

    assert others("p", "q", "r", "s") == ["a2", "a3", "a0", "a1"]
    assert others("p", "p", "p", "s") == ["a3", "a3", "a3", "a1"]  # the next that has another prompt
    assert others("p", "p", "p", "p") == ["a2", "a3", "a0", "a1"]  # none has
    turned = [replace(row, prompt="p", history=(("user", str(n % 2)),)) for n, row in enumerate(rows)]
    assert [_other(turned, n).chosen for n in range(4)] == ["a3", "a0", "a1", "a2"]  # after another beginning


@pytest.mark.parametrize(("gaps", "kl"), [((0.1, 0.5), 0.3), ((-0.5, -0.1), 0.0), ((-0.5, 0.7), 0.1)])
def test_the_kl_of_a_step_is_the_mean_log_ratio_of_other_answers_and_never_below_0(
    gaps: tuple[float, float], kl: float, system: System
) -> None:
    seen, rows = list[Row](), [replace(row, weight=n + 1.0) for n, row in enumerate(thumbs(judgements(4)))]
    made, others = (render_pairs(system, some, system.session)[0]  # type: ignore[arg-type]
                    for some in (rows, [_other(rows, n) for n in range(len(rows))]))  # fmt: skip

    class Moved:
        live = system.session

        def reference(self, some: Sequence[Row]) -> list[tuple[float]]:
            return [(-float(sum(row.continuations[0])),) for row in some]

        def logprobs(self, some: Sequence[Row]) -> list[tuple[float]]:
            seen.extend(some)
            return [(value + gap,) for (value,), gap in zip(self.reference(some), gaps, strict=True)]

    policy: Any = Moved()
    source = KTO().source(system, rows, dict(enumerate(made)), lambda n: ([0, 3], [6, 1])[n], 2, policy)
    found = source(1)
    assert seen == [others[6], others[1]] and [replace(row, facts=()) for row in found] == [made[6], made[1]]
    own = [value for (value,) in policy.reference([made[6], made[1]])]
    assert [row.facts for row in found] == [((own[0], 1.0, 7.0, pytest.approx(kl)),),
                                            ((own[1], 0.0, 2.0, pytest.approx(kl)),)]  # fmt: skip


@pytest.mark.parametrize("kind", [DPO, KTO])
@pytest.mark.parametrize("allowed", [3000, 8000])
def test_a_budget_bounds_what_is_read_under_the_reference(
    kind: type[DPO] | type[KTO], allowed: int, system: System, home: Path
) -> None:
    bound = run(home, trained_tokens=allowed)
    kind(batch=4, rank=2).apply(system, replace(learnable(), judged=judgements(300)), bound)
    assert 0.5 * allowed < _price(bound.spent) <= 1.15 * allowed
    assert bound.notes["seen"] < bound.notes["judgements"] and bound.notes["held_out"]["n"] >= 4
    short = run(home, trained_tokens=allowed, fidelity=0.15)  # as the first rung of a race
    kind(batch=4, rank=2).apply(system, replace(learnable(), judged=judgements(300)), short)
    assert _price(short.spent) < 0.6 * allowed


def test_the_reference_is_asked_once_and_only_for_what_is_trained_on() -> None:
    asked: list[int] = []

    def make(some: Sequence[int]) -> list[str]:
        asked.extend(some)
        return [f"row {i}" for i in some]

    order = steps(range(100), 4, 0)
    source = ahead(order, 30, make)
    wanted = [[f"row {i}" for i in order(n)] for n in range(30)]
    assert [source(n) for n in range(11, 16)] == wanted[11:16]  # gone on from the eleventh step
    assert asked == [i for n in range(8, 16) for i in order(n)]  # all of the block that it is in, and no other
    assert [source(n) for n in range(30)] == wanted and sorted(asked) == list(range(100))


@pytest.mark.parametrize("kind", [DPO, KTO])
def test_a_killed_training_on_judgements_ends_with_the_same_weights(
    kind: type[DPO] | type[KTO], system: System, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whet.train.loop.KEEP_EVERY", 0.0)
    monkeypatch.setattr("whet.train.loop.WRITING_SHARE", math.inf)
    method, made = kind(rank=4, learning_rate=1e-2, epochs=2, batch=4), {}
    draw = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choice(TEXT.split()) for _ in range(draw.randint(least, most)))

    # Of such lengths that the reference comes out rounded otherwise where rows are read in other blocks.
    rows = tuple(Judged(str(n), text(4, 20), f"yes {text(3, 9)}", f"no {text(3, 9)}") for n in range(40))
    data = replace(learnable(), judged=rows)

    def halt(what: str, done: int, of: int) -> None:
        if what.startswith("loss") and done == last:
            raise KeyboardInterrupt

    for last in (0, 6, 15):  # never, and in either epoch
        if last:
            with pytest.raises(KeyboardInterrupt):
                method.apply(system, data, run(home / str(last), tell=halt))
        made[last] = method.apply(system, data, run(home / str(last))).model.transforms[-1].fingerprint
    assert len(set(made.values())) == 1


@pytest.mark.parametrize("kind", [DPO, KTO])
def test_the_reference_is_the_beginning_whenever_it_is_asked(
    kind: type[DPO] | type[KTO], system: System, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for many in (1, 1000):
        monkeypatch.setattr("whet.methods.dpo.AHEAD", many)
        one = run(home / str(many))
        kind(rank=4, learning_rate=1e-2, epochs=1, batch=4).apply(system, learnable(), one)
        found.append([value for _, value in one.notes["curves"]["train"]])
    assert found[0] == pytest.approx(found[1], abs=1e-3) and len(found[0]) > 4


def test_what_feedback_lacks_is_said(system: System, home: Path) -> None:
    with pytest.raises(MethodError, match="no feedback to learn from"):
        DPO().apply(system, replace(learnable(), judged=()), run(home))
    single = replace(learnable(), judged=(Judged("1", "p", chosen="a"),))
    with pytest.raises(MethodError, match="use kto"):
        DPO().apply(system, single, run(home))
    with pytest.raises(MethodError, match="use kto"):
        Reward().apply(system, single, run(home))
    for kind, settings in ((DPO, {"beta": 0}), (KTO, {"rank": 0}), (Reward, {"batch": 0}), (RL, {"samples": 1}),
                           (RL, {"algorithm": "ppo"}), (RL, {"temperature": 0})):  # fmt: skip
        with pytest.raises(ValueError):
            kind(**settings)


@pytest.mark.parametrize("method", [DPO(rank=2, epochs=1, batch=4), KTO(rank=2, epochs=1, batch=4)])
@pytest.mark.parametrize("judged", [
    judgements(1), judgements(2), tuple(replace(j, prompt="one") for j in judgements())
])  # fmt: skip
def test_a_few_judgements_are_learnt_from(
    method: DPO | KTO, judged: tuple[Judged, ...], system: System, home: Path
) -> None:
    told = run(home)
    made = method.apply(system, replace(learnable(), judged=judged), told)
    assert made.fingerprint != system.fingerprint and "held_out" not in told.notes


def test_rewards_are_compared_by_the_token_where_they_are_learnt_so() -> None:
    row = Row((1,), ((2, 3), (4,)), ((-4.0, 1.0), (-3.0, 1.0)))  # answers of two tokens and of one
    found = [held_out([row], judgements(1), [(-2.0, -1.5)], by_token) for by_token in (False, True)]
    assert [one["accuracy"] for one in found] == [1, 0]  # better by 2 to 1.5; by 1 to 1.5 a token


def test_an_answer_that_the_metric_fails_on_earns_least() -> None:
    class Near(metrics.Accuracy):
        name = "near"

        def score(self, answer: str, example: Example) -> float:
            return -float(abs(len(answer) - 10)) / bool(answer)

    one = Example("1", "say ten letters", "x", ("x",))
    assert ByMetric(Near())([(one, ""), (one, "abc"), (one, "ten letter")]) == [-7.0, -7.0, 0.0]
    assert ByMetric(Near())([(one, "")]) == [0.0]


# --- reinforcement ----------------------------------------------------------------------------------------------------


def test_advantages_by_hand() -> None:
    assert advantages([1, 0, 0, 1], "rloo") == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    assert advantages([2, 0], "grpo") == pytest.approx([1 / math.sqrt(2), -1 / math.sqrt(2)], rel=1e-3)
    assert advantages([1, 1], "grpo") == [0, 0] and advantages([3, 3, 3], "rloo") == [0, 0, 0]


def test_the_spread_of_rewards_is_that_among_samples_of_one_prompt() -> None:
    assert spread([[0, 1, 0, 1]]) == pytest.approx(math.sqrt(1 / 3))
    assert spread([[far, far + 1, far, far + 1] for far in (0, 10, 20)]) == pytest.approx(math.sqrt(1 / 3))
    assert spread([[5, 5], [0, 2]]) == pytest.approx(1)


def few(folder: Path) -> Learnable:
    """Train rows and a metric of the task's own: the share of the answer's characters that are vowels."""
    (folder / "own.py").write_text(
        "def vowels(answer, example):\n    return sum(c in 'aeiou' for c in answer) / max(1, len(answer))\n"
    )
    rows = tuple(Example(str(n), f"say something of the {t}", "aei") for n, t in enumerate(THINGS))
    return Learnable("toy", "Answer.", "own.py:vowels", train=rows, folder=folder, trusted=True)


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_reinforcement_raises_the_reward(algorithm: str, system: System, home: Path, tmp_path: Path) -> None:
    data, first = few(tmp_path), run(home)
    beta = 0.01 if algorithm == "rloo" else 0.001
    method = RL(algorithm, learning_rate=2e-2, epochs=10, batch=5, samples=6, rank=4, beta=beta)
    made = method.apply(system, data, first)
    noted = first.notes
    assert noted["rewarded_by"] == "own.py:vowels" and noted["steps"] == 20 == len(noted["steps_log"])
    assert noted["after"]["reward"] > 1.5 * noted["before"]["reward"] and noted["after"]["kl"] > 0
    assert noted["before"]["best_of_n"] > noted["before"]["reward"] and noted["before"]["mixed"] > 0.5
    assert {"step", "reward", "kl", "entropy", "length", "logprob"} <= set(noted["steps_log"][0])
    assert noted["steps_log"][0]["kl"] == pytest.approx(0, abs=1e-4)  # the fresh adapter changes nothing
    assert made.fingerprint == method.apply(system, data, run(home / "other")).fingerprint != system.fingerprint


def test_a_killed_reinforcement_ends_with_the_same_weights_and_tells_all_its_steps(
    system: System, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whet.train.loop.KEEP_EVERY", 0.0)
    monkeypatch.setattr("whet.train.loop.WRITING_SHARE", math.inf)
    method, made = RL(epochs=3, batch=5, samples=4, rank=2), {}

    def halt(what: str, done: int, of: int) -> None:
        if what.startswith("loss") and done == last:
            raise KeyboardInterrupt

    for last in (0, 4):
        if last:
            with pytest.raises(KeyboardInterrupt):
                method.apply(system, few(tmp_path), run(home / str(last), tell=halt))
        after = run(home / str(last))
        made[last] = method.apply(system, few(tmp_path), after).fingerprint, after.notes["steps_log"]
    assert made[0] == made[4] and [one["step"] for one in made[4][1]] == list(range(6))


def test_probabilities_are_those_of_the_temperature_drawn_at(system: System) -> None:
    session = system.session
    assert isinstance(session, TorchSession)
    warm = Policy(session, system, 2.0)
    rows, _ = warm.sample([Example(t, f"tell me of the {t}") for t in THINGS[:3]], 3)
    for row, values in zip(rows, warm.logprobs(rows), strict=True):
        for said, value in zip(row.continuations, values, strict=True):
            with torch.no_grad():
                out = session.module(input_ids=torch.tensor([[*row.prompt, *said]])).logits[0, len(row.prompt) - 1 : -1]
            chances = (out / 2).log_softmax(-1)
            assert value == pytest.approx(sum(float(chances[n, token]) for n, token in enumerate(said)), abs=1e-3)


def test_entropy_is_that_of_the_samples(system: System, home: Path, tmp_path: Path) -> None:
    hot = run(home)
    RL(epochs=0.5, batch=5, samples=4, rank=2, temperature=5.0).apply(system, few(tmp_path), hot)
    first = hot.notes["steps_log"][0]
    assert 5 < first["entropy"] < math.log(300) + 0.1  # at most that of all 300 tokens alike
    assert first["logprob"] == pytest.approx(-first["entropy"] * first["length"])  # of whole answers
    assert first["kl"] == pytest.approx(0, abs=1e-4)


def test_the_leash_holds(system: System, home: Path, tmp_path: Path) -> None:
    moved = {0.0: 0.0, 5.0: 0.0}
    for beta in moved:
        for seed in range(4):  # what is drawn differs too much for one run to tell
            one = replace(run(home), seed=seed)
            RL(learning_rate=1e-2, epochs=3, batch=5, samples=4, rank=4, beta=beta).apply(system, few(tmp_path), one)
            moved[beta] += one.notes["after"]["kl"]
    assert moved[5.0] < 0.7 * moved[0.0]


def test_reinforcement_from_a_reward_model(system: System, home: Path) -> None:
    done = run(home)
    RL(epochs=0.4, batch=4, samples=3, rank=2).apply(system, learnable(), done)
    assert done.notes["rewarded_by"].startswith("reward model") and done.notes["prompts"] == 24
    assert done.notes["reward"]["pairs"] < 24


def test_a_budget_bounds_the_judge_and_what_is_sampled(system: System, home: Path, tmp_path: Path) -> None:
    free, bound, judged = (run(home / "judge", trained_tokens=most) for most in (None, 900, 4000))
    for one in (free, bound):
        Reward(batch=2, epochs=2, rank=2).apply(system, learnable(), one)
    assert bound.spent.trained_tokens <= 1000 < free.spent.trained_tokens
    RL(epochs=9, batch=2, samples=2, rank=2).apply(system, learnable(), judged)  # the judge has half, at most
    assert judged.spent.trained_tokens <= 4000
    steps = []
    for most in (None, 10000):  # trained tokens alone would pay for all steps; what is written counts, and thrice
        one = run(home / "rl", trained_tokens=most)
        RL(epochs=15, batch=5, samples=4, rank=2).apply(system, few(tmp_path), one)
        steps.append(one.notes["steps"])
    assert steps[0] == 30 and 1 < steps[1] < 15


def test_a_probe_stops_what_cannot_work(system: System, home: Path, tmp_path: Path) -> None:
    hopeless = replace(few(tmp_path), metric="exact_match")
    with pytest.raises(MethodError, match=r"learn nothing.*expected 10% .* found 0% of 10.*fine-tune first"):
        RL(samples=2).apply(system, hopeless, run(home))
    with pytest.raises(MethodError, match="nothing to score answers against"):
        RL().apply(system, replace(hopeless, train=()), run(home))
    assert ByMetric(metrics.get("contains"))([(hopeless.train[0], "aei it is")]) == [1.0]


# --- collecting -------------------------------------------------------------------------------------------------------


def test_judgements_are_kept_one_by_one(system: System, tmp_path: Path) -> None:
    file, asked = tmp_path / "new" / "feedback.jsonl", [Example(t, f"tell me of the {t}") for t in THINGS[:6]]
    seen: list[tuple[str, tuple[str, str]]] = []

    def ask(example: Example, shown: tuple[str, str]) -> str:
        seen.append((example.prompt, shown))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return ("1", "2", "s")[len(seen) - 1]

    with pytest.raises(KeyboardInterrupt):
        collect(system, asked, file, ask, annotator="ann")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in rows] == [
        (seen[0][0], *seen[0][1]), (seen[1][0], *seen[1][1][::-1])
    ]  # fmt: skip
    assert [r["shown_first"] for r in rows] == [True, False] and rows[0]["system"] == system.fingerprint[:16]
    assert rows[0]["annotator"] == "ann" and rows[0]["time"][:2] == "20"
    again: list[str] = []
    counts = collect(system, asked, file, lambda e, _: again.append(e.prompt) or "q", annotator="ann")
    assert counts["before"] == 2 and again == [seen[2][0]]  # skipped ones are asked again, judged ones are not
    once = [shown for _, shown in seen]
    repeat: list[tuple[str, str]] = []
    collect(system, asked[:4], tmp_path / "b.jsonl", lambda _, shown: repeat.append(shown) or "s")
    assert repeat == once  # answers and order are the seed's
    assert not (tmp_path / "b.jsonl").exists()  # without a judgement there is no file
    loaded, _ = feedback.load(file.parent, file.name)
    assert [j.chosen for j in loaded] == [r["chosen"] for r in rows]


def test_which_answer_is_shown_first_is_drawn_by_the_seed(tmp_path: Path) -> None:
    one = System(resolve("fake:hash"), decoding=Decoding(max_tokens=8), home=tmp_path)
    asked = [Example(str(n), f"tell me of number {n}") for n in range(40)]

    def turned(name: str, seed: int) -> dict[str, bool]:
        """By prompt, whether the answer that was drawn second was shown first."""
        shown: dict[str, tuple[str, str]] = {}

        def ask(example: Example, sides: tuple[str, str]) -> str:
            shown[example.prompt] = sides
            return "1" if sides[0] < sides[1] else "2"

        collect(one, asked, tmp_path / name, ask, seed=seed)
        drawn = one.session.generate(one.prompts(asked), Sampling(8, 0.8, n=2, seed=seed))
        made = {e.prompt: tuple(g.text for g in pair) for e, pair in zip(asked, drawn, strict=True)}
        for row in map(json.loads, (tmp_path / name).read_text().splitlines()):
            sides = shown[row["prompt"]]
            assert {*sides} == {*made[row["prompt"]]} and row["shown_first"] == (sides[0] < sides[1])
            assert (row["chosen"], row["rejected"]) == (min(sides), max(sides))
        return {prompt: sides == made[prompt][::-1] for prompt, sides in shown.items()}

    first, again, other = (turned(f"{n}.jsonl", seed) for n, seed in enumerate((0, 0, 1)))
    assert first == again and all(10 <= sum(found.values()) <= 30 <= len(found) for found in (first, other))
    assert any(first[prompt] != other[prompt] for prompt in first.keys() & other)


def test_a_file_of_judgements_is_never_spoilt(system: System, tmp_path: Path) -> None:
    row = '{"prompt": "p", "chosen": "ä", "rejected": "b"}'
    asked = [Example(t, f"tell me of the {t}") for t in THINGS[:2]]
    for end in ("", "\n", "\r\n"):
        file = tmp_path / f"{len(end)}.jsonl"
        file.write_bytes((row + end).encode())  # an editor may leave the last line open
        collect(system, asked, file, lambda *_: "1")
        assert len(feedback.load(tmp_path, file.name)[0]) == 3 and file.read_bytes().startswith(row.encode())
    for name in ("kept.csv", "kept.txt", "kept.json", "kept"):
        (tmp_path / name).write_text("prompt,chosen,rejected\np,a,b\n")
        with pytest.raises(TaskError, match=r"cannot be appended.*expected a \.jsonl file"):
            collect(system, asked, tmp_path / name, lambda *_: pytest.fail("it was asked"))  # type: ignore[arg-type]
        assert (tmp_path / name).read_text().endswith("p,a,b\n")


def test_the_command_asks_and_keeps(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from whet.cli import main

    system.save(tmp_path / "system")
    (tmp_path / "p.txt").write_text("tell me of the lamp\n\nof the [bold]chair\n\nof the radio\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("perhaps\n2\n1\n"))  # then the input ends
    place = str(tmp_path / "judged.jsonl")
    with pytest.raises(SystemExit) as ended:
        main(["feedback", str(tmp_path / "system"), str(tmp_path / "p.txt"), "--out", place, "--json"])
    out, err = capsys.readouterr()
    assert not ended.value.code and json.loads(out)["judged"] == 2 and "of the [bold]chair" in err
    asked = [line for line in err.splitlines() if "better: 1 or 2" in line]  # no table's title stands on that line
    assert len(asked) == 4 and {line.strip() for line in asked} == {"better: 1 or 2; s skips, q ends:"}
    assert [json.loads(line)["prompt"] for line in Path(place).read_text().splitlines()][1] == "of the [bold]chair"
    with pytest.raises(SystemExit) as ended:
        main(["feedback", str(tmp_path / "system"), str(tmp_path / "none.txt")])
    assert ended.value.code == 2 and "cannot be read" in capsys.readouterr().err


def test_answers_longer_than_the_window_lose_their_end(system: System, home: Path) -> None:
    session = system.session
    rows = [Judged(str(n), f"{n} tell me", "a film " * 400, f"{n} great", annotator="ann") for n in range(8)]
    for head, last in ((False, 0), (True, 2)):
        made, cut = render_pairs(system, rows, session, head=head)  # type: ignore[arg-type]
        whole = render_pairs(system, [replace(rows[0], chosen="a film")], session, head=head)[0][0]  # type: ignore[arg-type]
        assert cut == 8 and all(len(r.prompt) + len(r.continuations[0]) == session.context for r in made)
        assert made[0].prompt == whole.prompt and made[0].continuations[1] == whole.continuations[1]
        assert not last or made[0].continuations[0][-last:] == whole.continuations[0][-last:]
    for method in (KTO(batch=4, epochs=0.5, rank=4), DPO(batch=4, epochs=0.5, rank=4), Reward(batch=4, epochs=0.5)):
        one = Run(Store(home))
        method.apply(system, replace(learnable(), judged=tuple(rows)), one)
        if method.name != "reward":
            assert 0 < one.notes["shortened"] <= one.notes["seen"] <= one.notes["judgements"]
            assert method.name == "kto" or one.notes["shortened"] == one.notes["seen"]  # thumbs down are short here


def test_a_conversation_is_judged_as_one(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = [[("user", f"i have a {t}"), ("assistant", "what of it?"), ("user", "tell me more")] for t in THINGS[:3]]
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in chat]}) for chat in chats]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    asked, file = feedback.prompts_of(tmp_path / "p.jsonl"), tmp_path / "judged.jsonl"
    assert [[*e.history, ("user", e.prompt)] for e in asked] == chats
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n2\nq\n"))
    assert collect(system, asked, file, feedback.ask)["judged"] == 2
    assert f"user: i have a {THINGS[1]}" in capsys.readouterr().err
    loaded, _ = feedback.load(tmp_path, file.name)
    assert [(j.prompt, j.history) for j in loaded] == [(e.prompt, e.history) for e in asked[:2]]
    assert [why for _, why in feedback.without_held(loaded, asked[:1])[1]] == [f"repeats {asked[0].id}"]
    again: list[Example] = []
    assert collect(system, asked, file, lambda e, _: again.append(e) or "q")["before"] == 2 and again == [asked[2]]


def test_prompts_come_from_any_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("first one\n\nsecond one\n\nfirst one\n")
    assert [e.prompt for e in feedback.prompts_of(tmp_path / "p.txt")] == ["first one", "second one"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert [e.prompt for e in feedback.prompts_of(tmp_path / "p.jsonl")] == ["a"]


def test_outcome_of_a_single_answer(system: System) -> None:
    metric = Versus(Longest(), system, system.session, {Example("1", "p"): "ab"})
    assert metric.score("abc", Example("1", "p")) == 1
    assert isinstance(metric.outcomes(["abc"], [Example("1", "p")])[0], Outcome)


@pytest.mark.timeout(900)
def test_the_loop_goes_twice_round_on_the_help_desk(tmp_path: Path) -> None:
    """Answer, judge, update, gate; then again from the System that came out. The embedded model; brief answers win."""
    helpdesk = Path(__file__).resolve().parents[1] / "examples" / "helpdesk" / "replies"
    folder, file = tmp_path / "replies", tmp_path / "judged.jsonl"
    folder.mkdir()
    header = (helpdesk / "task.yaml").read_text().replace("feedback: feedback.jsonl\n", "max_tokens: 24\n")
    (folder / "task.yaml").write_text(header)
    for name, count in (("feedback", 32), ("test", 8)):
        lines = (helpdesk / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    ref, store = resolve("smollm2-135m"), Store(tmp_path / "home")
    current = System(ref, decoding=Decoding(max_tokens=24), home=store.home)
    told = task.load(folder)
    prompts = [json.loads(line)["prompt"] for line in (folder / "feedback.jsonl").read_text().splitlines()]
    seen, judged = [], 0
    for turn in range(2):
        asked = [Example(str(n), text) for n, text in enumerate(prompts[16 * turn : 16 * (turn + 1)])]
        counts = collect(current, asked, file, lambda _, shown: "1" if len(shown[0]) <= len(shown[1]) else "2",
                         annotator="ann", seed=turn)  # fmt: skip
        assert counts["before"] == 0 and counts["judged"] + counts["same"] == 16
        made = update(current, told, Run(store, turn), {"epochs": 1.0, "batch": 4, "rank": 4}, file)
        assert made.system.fingerprint != current.fingerprint and len(made.system.model.transforms) == turn + 1
        assert made.length[0] > 0 and made.drift >= 0
        # The gate: a person would stop where it refuses, which this round goes on from to see it twice.
        said = {"drifted by": made.drift > 0.5, "words": made.length[1] > max(1.5 * made.length[0], made.length[0] + 3)}
        assert {why: why in made.refused for why in said} == said
        assert made.after.score == pytest.approx(fmean(o.score for o in made.after.outcomes))
        assert [o.id for o in made.after.outcomes] == [e.id for e in told.test]
        assert made.paired.difference == pytest.approx(made.after.score - made.before.score)
        judged += counts["judged"]
        assert 0 < made.notes["seen"] <= made.notes["judgements"] < judged  # some are the judge's, or held out
        assert [one["recipe"].split("(")[0] for one in made.system.card["taught"]] == ["dpo"] * (turn + 1)
        seen.append((counts["judged"], current.fingerprint[:16]))
        current = made.system
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    # Each judgement names the System that answered: the first round's and the second's differ.
    assert [r["system"] for r in rows] == [name for count, name in seen for _ in range(count)]
    assert len({r["prompt"] for r in rows}) == len(rows) == judged
    assert {(r["seed"], r["system"]) for r in rows} == set(enumerate(name for _, name in seen))
