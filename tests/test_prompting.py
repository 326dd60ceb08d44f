"""Prompt engineering: frames and prompt files, the pool, the race, proposals from a stronger model."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_remote import Play, serving

from whet import embed
from whet.engine import Chat, Prompt
from whet.engine.fake import FakeSession
from whet.errors import ArtifactError, MethodError
from whet.methods import Run, lacking, make
from whet.methods.calibrate import Calibrate, free_inputs
from whet.methods.fewshot import FewShot, spread
from whet.methods.prompting import FRAMES, Prompting, edited, meanings, variants
from whet.model import resolve
from whet.prompt import SLOT, framed, from_text, messages, to_text
from whet.store import Store
from whet.system import Decoding, Demonstrations, System, load
from whet.task import Example, Learnable
from whet.variants import Contest, learnable, unseen

LABELS = ("negative", "positive")
GOOD, BAD = ("great", "funny", "warm", "fine"), ("bad", "poor", "dull", "slow")
ROWS = tuple(
    Example(f"r{n}", f"film number {n} was {(GOOD if n % 2 else BAD)[n // 2 % 4]}", LABELS[n % 2]) for n in range(400)
)
DATA = Learnable("films", "Judge the film.", "accuracy", LABELS, ROWS)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
nasty = st.lists(st.sampled_from(["---", "\\---", "\n", "\r", "{question}", " = ", '"', "a", " ", "<|im_end|>"]),
                 max_size=12).map("".join)  # fmt: skip
any_text = st.one_of(texts, nasty)
frames = st.tuples(any_text, any_text).map(SLOT.join).filter(lambda f: f.count(SLOT) == 1)


@pytest.fixture
def base(home: Path) -> System:
    decoding = Decoding(LABELS, closed=True, max_tokens=6)
    return System(resolve("fake:hash"), "Judge the film.", decoding=decoding, home=home)


class Reader(FakeSession):
    """A played model that is right only where the prompt lists the labels (and its frame names the answer)."""

    def __init__(self, needs: str = "Answer with one of") -> None:
        super().__init__("hash")
        self.needs, self.asked = needs, list[Prompt]()

    def score(self, prompts: Any, continuations: Any, **more: Any) -> Any:
        self.asked += prompts
        found = super().score(prompts, continuations, **more)
        return [
            tuple(replace(s, logprob=0.0 if self._right(chat, w) else -9.0) for s, w in zip(row, says, strict=True))
            if self.needs in str(chat) else row
            for chat, says, row in zip(prompts, continuations, found, strict=True)
        ]  # fmt: skip

    def _right(self, chat: Chat, said: str) -> bool:
        return (said.casefold() == "positive") == any(word in chat[-1][1] for word in GOOD)


def run_with(session: Any, base: System, seed: int = 0) -> Run:
    run = Run(Store(base.home), seed)
    run.sessions[base.model] = session
    return run


# --- frames and files -------------------------------------------------------------------------------------------------


@given(any_text, frames, st.lists(st.tuples(any_text, any_text), max_size=4, unique_by=lambda w: w[0]))
def test_a_prompt_goes_to_a_file_and_back(instruction: str, frame: str, words: list[tuple[str, str]]) -> None:
    assert from_text(to_text(instruction, frame, words)) == (instruction, frame, dict(words))


def test_a_prompt_file_is_plain() -> None:
    written = to_text("Judge.", f"Film: {SLOT}\nVerdict:", [("negative", "bad"), ("positive", "good")])
    assert written == "Judge.\n---\nFilm: {question}\nVerdict:\n---\nnegative = bad\npositive = good\n"
    assert from_text("Only an instruction.\n") == ("Only an instruction.", SLOT, {})
    assert from_text(written.replace("\n", "\r\n")) == from_text(written)  # as an editor elsewhere saves it


@given(frames, any_text)
def test_a_question_is_only_data(frame: str, question: str) -> None:
    before, after = frame.split(SLOT)
    assert framed(frame, question) == before + question + after
    [_, asked] = messages("Say.", (), question, frame=frame)
    assert asked == ("user", before + question + after)


def test_frames_and_words_reach_the_model_and_the_disk(base: System, tmp_path: Path) -> None:
    assert "frame" not in base.settings and not {"words", "votes", "after"} & set(base.settings["decoding"])
    decoding = replace(base.decoding, words=("no", "yes"), prior=(0.0, 0.0))
    made = replace(base, frame=f"Film: {SLOT}\nVerdict:", decoding=decoding,
                   demonstrations=Demonstrations((("old", "positive"),)))  # fmt: skip
    assert made.prompts([Example("1", "new {question}")]) == [(
        ("system", "Judge the film."), ("user", "Film: old\nVerdict:"), ("assistant", "yes"),
        ("user", "Film: new {question}\nVerdict:"),
    )]  # fmt: skip
    session = Reader("Judge")
    [answer] = made.answers(["it was great"], session)
    assert answer.text == "negative"  # neither word is the label that the played model wants
    made.save(tmp_path / "system")
    assert load(tmp_path / "system", base.home) == made
    assert (tmp_path / "system" / "prompt.txt").read_text() == made.prompt_text
    assert made.prompt_text.endswith("---\nnegative = no\npositive = yes\n")
    for broken in (lambda: replace(base, frame="none"), lambda: Decoding(LABELS, words=("a", "a")),
                   lambda: Decoding(votes=3)):  # fmt: skip
        with pytest.raises(ValueError):
            broken()
    body = json.loads((tmp_path / "system" / "system.json").read_text())
    (tmp_path / "system" / "system.json").write_text(json.dumps({**body, "frame": "no slot"}))
    with pytest.raises(ArtifactError):
        load(tmp_path / "system", base.home)


def test_older_systems_keep_their_names() -> None:
    """The fingerprint of a System as version 0.1.0 wrote it, before there were frames and words."""
    from whet.model import ModelRef

    old = System(ModelRef("m", "c"), "Say.", decoding=Decoding(("a", "b"), True))
    assert list(old.settings["decoding"]) == [
        "labels", "closed", "normalise", "prior", "max_tokens", "temperature", "stop",
    ]  # fmt: skip
    assert list(old.settings) == ["model", "instruction", "demonstrations", "decoding"]


@pytest.mark.parametrize("settings", [{"reason": True}, {"temperature": 0.5}, {"temperature": 0.5, "votes": 3}])
def test_what_only_generated_answers_have_is_refused_where_they_are_chosen(base: System, settings: Any) -> None:
    run = run_with(FakeSession("hash"), base)
    with pytest.raises(MethodError, match="change nothing; expected answers that are generated"):
        Prompting(**settings).apply(base, DATA, run)


def test_words_are_what_is_learnt(tmp_path: Path, model_folder: str, fp32: None) -> None:
    from whet.train.lesson import render_rows

    words = Decoding(LABELS, True, words=("no", "yes"))
    system = System(resolve(model_folder), "Judge.", decoding=words, frame=f"Film: {SLOT}", home=tmp_path)
    session: Any = Run(Store(tmp_path)).session(system.model)
    [row], _ = render_rows(system, [Example("1", "great", "positive")], session)
    assert session.tokenizer.decode(row.continuations[0]).startswith("yes")
    assert "Film: great" in session.tokenizer.decode(row.prompt)


def test_votes_and_what_stands_behind_the_reasons(base: System) -> None:
    class Says(FakeSession):
        def __init__(self) -> None:
            super().__init__("hash")
            self.say = lambda prompt, sampling, copy: ["so. Answer: Two", "Answer: one", "well, Answer: two."][copy]

    thinks = Decoding(max_tokens=20, temperature=0.7, votes=3, after="Answer:")
    [answer] = replace(base, decoding=thinks).answers(["how many?"], Says())
    assert answer.text == "Two"
    read = Decoding(LABELS, words=("A", "B")).read
    assert (read(" b. "), read("other")) == ("positive", "other")


# --- the pool ---------------------------------------------------------------------------------------------------------


def test_the_pool_is_the_tasks_own_and_a_matter_of_the_seed(base: System) -> None:
    pool = variants(base, DATA, ROWS[200:], 24, 0)
    assert pool[0] == base and len({s.fingerprint for s in pool}) == len(pool) == 24
    assert pool == variants(base, DATA, ROWS[200:], 24, 0) != variants(base, DATA, ROWS[200:], 24, 1)
    assert any("Answer with one of: negative, positive." in s.instruction for s in pool)
    told = next(s.instruction for s in pool if "words that often go" in s.instruction)
    assert all(word in told.split("- positive:")[1] for word in GOOD) and "bad" not in told.split("- positive:")[1]
    assert {s.frame for s in pool} > set(FRAMES)
    lettered = [s for s in pool if s.decoding.words == ("A", "B")]
    assert lettered and all("A (negative)" in s.instruction + s.frame for s in lettered)


def test_the_glossary_tells_labels_and_the_instructions_terms(base: System, tmp_path: Path) -> None:
    glossary = tmp_path / "glossary.tsv"
    glossary.write_text("Positive\tthe writer would see it again\tthumbs up\nfilm\tany moving picture\nset\ta place\n")
    run = Run(Store(tmp_path / "home"))
    known = meanings(base, replace(DATA, glossary=glossary), run)  # "Judge the film."
    assert known == {"positive": "the writer would see it again", "film": "any moving picture"}
    pool = variants(base, DATA, ROWS[200:], 24, 0, known=known)
    said = ("Judge the film.\n\nLabels, with what they mean:\n- negative\n- positive: the writer would see it again\n\n"
            "Terms:\n- film: any moving picture")  # fmt: skip
    assert said in {s.instruction for s in pool[:8]} and meanings(base, DATA, run) == {}
    assert any("- A (negative)\n- B (positive): the" in s.instruction + s.frame
               for s in variants(base, DATA, ROWS[200:], 400, 0, known=known))  # fmt: skip
    free = replace(base, decoding=Decoding(max_tokens=16))
    known = meanings(free, replace(DATA, labels=(), glossary=glossary), run)
    pool = variants(free, replace(DATA, labels=()), ROWS[200:], 24, 0, known=known)
    assert "Judge the film.\n\nTerms:\n- film: any moving picture" in {s.instruction for s in pool}
    assert not any("Terms" in s.instruction for s in variants(base, DATA, ROWS[200:], 24, 0))
    gone = replace(DATA, glossary=tmp_path / "gone.tsv")
    assert meanings(base, gone, run) == {} and "no definitions" in run.notes["glossary"]


def test_columns_of_the_data_frame_the_question(base: System) -> None:
    named = replace(DATA, columns=("review_text", "sentiment"))
    pool = variants(base, named, ROWS[200:], 24, 0)
    assert f"Review text: {SLOT}\nSentiment:" in {s.frame for s in pool[:5]}
    assert not any("Sentiment:" in s.frame for s in variants(base, DATA, ROWS[200:], 24, 0))
    common = replace(DATA, columns=("question", "answer"))  # such a frame is in the pool anyway
    assert variants(base, common, ROWS[200:], 24, 0)[3].frame == f"Question: {SLOT}\nAnswer:"


@pytest.mark.parametrize("instruction", ["", "Say {question} or {x}", "<|im_end|>\nuser", "a\n---\nb"])
def test_any_instruction_makes_a_pool(base: System, instruction: str) -> None:
    labels = ("{question}", "a = b", "<|im_start|>", "two\nlines")
    odd = replace(base, instruction=instruction, decoding=Decoding(labels, True))
    rows = [Example(str(n), f"{{question}} {n}", labels[n % 4]) for n in range(80)]
    for system in variants(odd, replace(DATA, labels=labels), rows, 30, 0):
        assert system.frame.count(SLOT) == 1
        text = to_text(*from_text(system.prompt_text)[:2], tuple(from_text(system.prompt_text)[2].items()))
        assert text == system.prompt_text


def test_free_text_is_told_what_answers_look_like(base: System) -> None:
    rows = [Example(str(n), f"the tower is {n} m high. How high?", f"{n} m") for n in range(60)]
    free = replace(base, decoding=Decoding(max_tokens=16))
    data = Learnable("towers", "Judge the film.", "token_f1", (), tuple(rows))
    said = [s.instruction + s.frame for s in variants(free, data, rows, 40, 0, reason=True)]
    assert any("copied from the text" in s for s in said) and any("look like these: 0 m; 1 m; 2 m" in s for s in said)
    thinking = [s for s in variants(free, data, rows, 40, 0, reason=True) if s.decoding.after]
    assert thinking and all("step by step" in s.instruction + s.frame for s in thinking)
    assert any(s.decoding.stop == ("\n",) for s in variants(free, data, rows, 40, 0))


# --- the race ---------------------------------------------------------------------------------------------------------


def test_without_headroom_it_stops_and_says_so(base: System) -> None:
    run = run_with(FakeSession("hash"), base)
    assert Prompting().apply(base, DATA, run) == base
    assert "no headroom" in run.notes["prompting"]["why"] and not run.notes["prompting"]["changed"]
    assert run.sessions[base.model].spent.prefilled_tokens < 8 * 60 * 64


def test_the_prompt_that_helps_is_found_and_bad_ones_die_early(base: System) -> None:
    session = Reader()
    run = run_with(session, base)
    made = Prompting().apply(replace(base, decoding=replace(base.decoding, prior=(0.0, 1.0))), DATA, run)
    notes = run.notes["prompting"]
    assert notes["changed"] and "Answer with one of" in notes["prompt"] and notes["raw"][1] == 1.0
    assert made.decoding.prior == () and made.prompt_text == notes["prompt"]
    assert [r["rows"] for r in notes["rungs"]] == sorted(r["rows"] for r in notes["rungs"])
    assert len(session.asked) < 24 * 128
    other = run_with(Reader(), base)
    assert Prompting().apply(base, DATA, other) == made  # repeatable


def test_what_is_not_better_on_unseen_rows_is_not_taken(base: System) -> None:
    """A prompt that only its race's rows favour: the fresh half says otherwise."""
    rows = learnable(base, DATA, 0)[:64]
    good = {e.prompt for e in rows[:32]}

    class Luck(Reader):
        def _right(self, chat: Chat, said: str) -> bool:
            return super()._right(chat, said) == (chat[-1][1] in good)

    contest = Contest.of(DATA, rows, Luck())
    lucky = replace(base, instruction="Answer with one of")
    assert contest.merit(lucky, range(32)) == 1.0
    assert not contest.better(base, lucky, 32, 0)[0]


@pytest.mark.parametrize("count", [10, 250, 256, 260, 300, 400])
def test_the_pool_comes_of_a_fifth_of_the_rows_that_are_not_scored(
    base: System, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    told: list[Example] = []

    def watched(system: System, data: Learnable, rest: Any, *more: Any) -> list[System]:
        told.extend(rest)
        return [system]

    monkeypatch.setattr("whet.methods.prompting.variants", watched)
    run = run_with(FakeSession("hash"), base)
    data = replace(DATA, train=ROWS[:count])
    Prompting().apply(base, data, run)
    raced = run.notes["prompting"]["rows"]
    assert raced == min(256, count * 4 // 5) and told == learnable(base, data, 0)[raced:]


def test_calibrated_scores_are_noted_only_where_they_are_had(base: System) -> None:
    class Searches(Reader):
        """As the engine does with many labels: it looks for the greatest and scores no others."""

        def scores_all(self, choices: Any, whole: bool = False) -> bool:
            return False

    def notes(session: FakeSession, **settings: Any) -> set[str]:
        run = run_with(session, base)
        Prompting(pool=4, examples=16, **settings).apply(base, DATA, run)
        return {"raw", "calibrated"} & set(run.notes["prompting"])

    assert notes(Searches()) == {"raw"}
    assert notes(Searches(), calibrated=True) == notes(Reader()) == {"raw", "calibrated"}


def test_too_few_rows_and_wrong_settings(base: System) -> None:
    with pytest.raises(MethodError, match="too few rows"):
        Prompting().apply(base, replace(DATA, train=ROWS[:5]), run_with(FakeSession("hash"), base))
    for settings in ({"pool": 0}, {"examples": 4}, {"votes": 3}, {"temperature": -1}, {"proposer": "gpt"}):
        with pytest.raises(MethodError):
            make("prompting", settings)


def test_demonstrations_are_not_asked_about(base: System) -> None:
    shown = replace(base, demonstrations=Demonstrations(tuple((e.prompt, e.completion) for e in ROWS[:100])))
    assert len(learnable(shown, DATA, 0)) == 300
    near = replace(base, demonstrations=Demonstrations(tuple((e.prompt, e.completion) for e in ROWS), 2, "nearest"))
    rows, hidden = unseen(near, ROWS[:50])
    assert rows == list(ROWS[:50]) and len(hidden.demonstrations.pool) == 350


def test_one_question_of_many_texts_shows_none_of_them(base: System) -> None:
    """The texts stand in the system turn, an earlier turn or the choices, as `splits` tells such rows apart."""
    turns = [{"history": ((role, e.prompt),)} for role in ("system", "user") for e in ROWS[:40]]
    told = [*turns, *({"choices": (e.prompt, "none")} for e in ROWS[:40])]
    asked = Demonstrations((("Is it good?", "positive"), ("Is it good?", "negative")))
    for start in (0, 40, 80):
        rows = [Example(str(n), "Is it good?", LABELS[n % 2], **more)  # type: ignore[arg-type]
                for n, more in enumerate(told[start : start + 40])]  # fmt: skip
        data = replace(DATA, train=tuple(rows))
        shown = replace(base, demonstrations=asked)
        assert len(learnable(shown, data, 0)) == 40 and unseen(shown, rows[:1])[0] == []
        near = replace(base, demonstrations=replace(asked, k=1, selection="nearest"))
        assert unseen(near, rows)[1] == near
        if start < 80:  # rows with their own choices have no prior
            assert Calibrate().apply(shown, data, run_with(FakeSession("hash"), base)).decoding.prior
    same = [Example(str(n), "Is it good?", LABELS[n % 2]) for n in range(40)]
    assert unseen(shown, same)[0] == []
    assert not any("For example" in s.instruction + s.frame for s in variants(base, DATA, same, 40, 0))
    assert any("For example" in s.instruction + s.frame for s in variants(base, DATA, ROWS, 40, 0))


def test_improve_tries_it_as_large_as_the_budget_allows(base: System, monkeypatch: pytest.MonkeyPatch) -> None:
    from whet.search import Wish
    from whet.search import arms as arms_module
    from whet.search.arms import cheap_arms, prompting_recipes
    from whet.search.budget import Rates

    assert {"prompting", "prompting(calibrated=true)+calibrate"} <= {r.name for r in prompting_recipes(DATA)}
    many = replace(DATA, labels=tuple(f"intent {n}" for n in range(30)))
    if embed.available():  # a sample of 8 shows few of many labels; the neighbours' are the likely ones
        assert prompting_recipes(many)[0].name == "fewshot(k=8,selection=nearest)"
        assert prompting_recipes(DATA)[0].name == "calibrate"
    free = replace(DATA, labels=(), metric="token_f1")
    assert "prompting" in [r.name for r in prompting_recipes(free)]
    assert "prompting" not in [r.name for r in prompting_recipes(replace(free, metric="recall@5"))]
    assert prompting_recipes(free)[-1].name == "prompting(reason=true)"  # the dearest comes last
    run, wish = run_with(FakeSession("hash"), base), Wish(methods=("prompting",))
    found, rates = {}, {base.model.content: Rates(1e3, 1e3, 1e3)}
    for most in (1e9, 9.0, 0.5):
        arms, dear, skipped = cheap_arms(wish, [base], [""], DATA, ROWS[:100], rates, run, most)
        found[most] = [a.recipe.name for a in arms] or [d.why for d in dear]
    assert found[1e9] == ["prompting"] and found[9.0] == ["prompting(pool=12,examples=64)"]
    assert "would take" in found[0.5][0]
    assert run.session(base.model).spent.prefilled_tokens == 0  # the plan runs no model

    def fails() -> None:
        raise MethodError("it cannot be had")

    other, cost = replace(base, instruction="Judge it."), arms_module._cost
    monkeypatch.setattr(arms_module, "_cost", lambda one, on, *more: cost(one, on, *more) if on == base else fails())
    arms, dear, skipped = cheap_arms(wish, [base, other], ["", " [b]"], DATA, ROWS[:100], rates, run, 9.0)
    assert [a.recipe.name for a in arms] == found[9.0] and len(skipped) == 1  # what fails at every size is told once


# --- a file of one's own, a stronger model ----------------------------------------------------------------------------


def test_an_edited_prompt_is_put_back(base: System, tmp_path: Path) -> None:
    file = tmp_path / "P.txt"
    file.write_text("Is it good?\n---\nFilm: {question}\n---\npositive = yes\nnegative = no\n")
    made = make("prompting", {"file": str(file)}).apply(base, DATA, run_with(FakeSession("hash"), base))
    assert (made.instruction, made.frame, made.decoding.words) == ("Is it good?", "Film: {question}", ("no", "yes"))
    assert lacking(make("prompting", {"file": str(file)}), base, replace(DATA, train=())) == ""
    assert lacking(make("prompting", {}), base, replace(DATA, train=()))
    again = tmp_path / "again.txt"
    again.write_text(made.prompt_text)
    assert edited(base, again) == made
    again.write_text(made.prompt_text, encoding="utf-8-sig")  # with a byte order mark, as some editors save it
    assert edited(base, again) == made
    three = "a\n---\n{question}\n---\n"
    for wrong, says in (("a\n---\nb\n", "0 times"), (three + "maybe = x\n", "maybe"),
                        (three + "no sign\n", "label = word"), (three * 2, "sections")):  # fmt: skip
        file.write_text(wrong)
        with pytest.raises(MethodError, match=says):
            edited(base, file)
    with pytest.raises(MethodError, match="no prompt"):
        edited(base, tmp_path / "none.txt")


@pytest.fixture
def stronger() -> Iterator[tuple[Play, str]]:
    class Writes(Play):
        def answer(self, path: str, payload: Any, nth: int) -> Any:
            if path != "/v1/chat/completions" or payload.get("logprobs"):
                return super().answer(path, payload, nth)
            frame = "frame of a question" in payload["messages"][-1]["content"]
            text = f"Film: {SLOT}\nVerdict:" if frame else "Name the mood. Secret word."
            return 200, self.chat(payload, f"```\n{text}\n```"), {}

    play = Writes()
    with serving(play) as url:
        yield play, f"openai:big@{url}"


def test_a_stronger_model_proposes_from_failures(base: System, stronger: tuple[Play, str]) -> None:
    play, url = stronger
    run = run_with(Reader("Secret word"), base)
    made = Prompting(pool=6, examples=32, proposer=url, proposals=4).apply(base, DATA, run)
    assert "Secret word" in made.prompt_text and run.notes["prompting"]["changed"]
    # What the proposer wrote is counted, and once: not among the sessions of the run, too.
    assert run.spent.generated_tokens > 0 and all(ref.base != url for ref in run.sessions)
    sent = "".join(str(seen[2]) for seen in play.seen)
    assert "the answer is: " in sent and "Judge the film." in sent
    raced = {e.prompt for e in learnable(base, DATA, 0)[:32]}
    shown = [e.prompt for e in ROWS if f"{e.prompt}\\n" in sent]
    assert shown and set(shown) <= raced  # never a row that the verdict rests on


# --- few-shot and calibration beyond the spine ------------------------------------------------------------------------


def test_spread_is_far_apart_and_coverage_is_central() -> None:
    angles = np.radians([0, 2, 4, 90, 92, 180])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    far = spread(vectors, [""] * 6, 3, cover=False)
    assert {i // 3 for i in far} == {0, 1} and len({*far} & {0, 1, 2}) == 1
    assert len({*spread(vectors, [""] * 6, 2, cover=True)} & {0, 1, 2}) == 1
    by_turns = spread(vectors, ["a", "a", "a", "b", "b", "b"], 4, cover=False)
    assert sorted(i // 3 for i in by_turns) == [0, 0, 1, 1]
    assert len(spread(vectors, [""] * 6, 9, cover=False)) == 6


def test_bootstrapped_demonstrations_are_those_it_answers_right(base: System) -> None:
    run = run_with(Reader("Judge"), base)
    made = FewShot(k=4, selection="bootstrapped").apply(base, DATA, run)
    assert run.notes["bootstrapped"] == "128 of 128 answered right"
    assert sorted(a for _, a in made.demonstrations.pool) == ["negative"] * 2 + ["positive"] * 2

    class Thinks(FakeSession):
        def __init__(self) -> None:
            super().__init__("hash")
            self.say = lambda prompt, sampling, copy: "since so. Answer: " + ("8" if "4" in prompt[-1][1] else "9")

    rows = tuple(Example(str(n), f"{n} + {n}", str(2 * n)) for n in range(10))
    free = replace(base, decoding=Decoding(max_tokens=9, after="Answer:"))
    data = Learnable("sums", "Add.", "exact_match", (), rows)
    made = FewShot(k=3, selection="bootstrapped").apply(free, data, run_with(Thinks(), base))
    assert made.demonstrations.pool == (("4 + 4", "since so. Answer: 8"),)
    with pytest.raises(MethodError, match="answers no train row right"):
        FewShot(selection="bootstrapped").apply(free, replace(data, train=rows[:4]), run_with(Thinks(), base))


def test_where_faults_are_counted_an_answer_without_any_is_right(base: System, monkeypatch: pytest.MonkeyPatch) -> None:
    class Faults:
        name, higher_is_better = "faults", False

        def score(self, answer: str, example: Example) -> float:
            if answer == "7":
                raise ValueError("seven")  # which is no answer without a fault
            return float(answer != example.completion)

        def aggregate(self, outcomes: Any) -> float:
            return sum(o.score for o in outcomes)

    told = FakeSession("hash")
    told.say = lambda prompt, sampling, copy: "8" if "4" in prompt[-1][1] else "7" if "5" in prompt[-1][1] else "9"
    rows = tuple(Example(str(n), f"{n} + {n}", str(2 * n)) for n in range(10))
    monkeypatch.setattr("whet.variants.get", lambda *_: Faults())
    free, run = replace(base, decoding=Decoding(max_tokens=9)), run_with(told, base)
    made = FewShot(k=3, selection="bootstrapped").apply(free, Learnable("sums", "Add.", "faults", (), rows), run)
    assert made.demonstrations.pool == (("4 + 4", "8"),)


@pytest.mark.parametrize("selection", ["diverse", "coverage"])
def test_what_is_shown_covers_what_is_there(base: System, selection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sides:
        """Two kinds of text, nine of one and one of the other."""

        def __init__(self, *_: Any) -> None: ...

        def __call__(self, texts: Sequence[str], **_: Any) -> Any:
            return np.array([[1.0, 0.0] if "9" not in t else [0.0, 1.0] for t in texts], np.float32)

    monkeypatch.setattr("whet.embed.Embedder", Sides)
    given: list[tuple[int, bool]] = []
    monkeypatch.setattr("whet.methods.fewshot.spread",
                        lambda v, a, k, cover: given.append((k, cover)) or spread(v, a, k, cover))  # fmt: skip
    rows = tuple(Example(str(n), f"{n} + {n}", str(2 * n)) for n in range(10))
    data = Learnable("sums", "Add.", "exact_match", (), rows)
    free, run = replace(base, decoding=Decoding(max_tokens=9)), run_with(FakeSession("hash"), base)
    made = FewShot(k=2, selection=selection).apply(free, data, run)
    assert ("9 + 9", "18") in made.demonstrations.pool and len(made.demonstrations.pool) == 2
    assert given == [(2, selection == "coverage")]


def test_drawing_votes_and_reasons_are_part_of_the_search(base: System, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: list[bool] = []

    def noted(start: System, given: Any, rest: Any, pool: int, seed: int, reason: bool, known: Any) -> Any:
        reasons.append(reason)
        return variants(start, given, rest, pool, seed, reason, known)

    monkeypatch.setattr("whet.methods.prompting.variants", noted)
    rows = tuple(Example(str(n), f"{n} + {n}", str(2 * n)) for n in range(40))
    data, free = Learnable("sums", "Add.", "exact_match", (), rows), replace(base, decoding=Decoding(max_tokens=9))
    for reason in (False, True):
        method = Prompting(temperature=0.7, votes=3, reason=reason)
        made = method.apply(free, data, run_with(FakeSession("hash"), base))
        assert (made.decoding.temperature, made.decoding.votes) == (0.7, 3)
    assert reasons == [False, True]


def test_letters_that_are_the_labels_explain_nothing() -> None:
    from whet.methods.prompting import _explained, _labelled

    heads = [head(("A", "B")) for head in _labelled("Choose.", ("A", "B"), ())]
    assert "Is it A or B?" in heads and not any("(" in head for head in heads)
    assert any("A (cat) or B (dog)" in head(("A", "B")) for head in _labelled("Choose.", ("cat", "dog"), ()))
    assert _explained("Choose.", {"A": "A", "B": "B"}, {"A": "a cat"}) == (
        "Choose.\n\nLabels, with what they mean:\n- A: a cat\n- B")


def test_an_order_is_raced_on_rows_that_are_not_shown(base: System) -> None:
    class Last(FakeSession):
        """Right where the last demonstration is a positive one."""

        def score(self, prompts: Any, continuations: Any, **more: Any) -> Any:
            found = super().score(prompts, continuations, **more)
            return [
                tuple(replace(s, logprob=-1.0 - (w != ("positive" if any(g in c[-1][1] for g in GOOD) else "negative"))
                              * (1.0 if c[-2][1] == "positive" else -1.0)) for s, w in zip(row, says, strict=True))
                for c, says, row in zip(prompts, continuations, found, strict=True)
            ]  # fmt: skip

    for seed in range(3):
        made = FewShot(k=4, order="raced").apply(base, DATA, run_with(Last("hash"), base, seed))
        assert made.demonstrations.pool[-1][1] == "positive"


def test_fewer_are_shown_where_the_window_is_short(base: System) -> None:
    rows = tuple(Example(str(n), f"{n} " + "long " * 150, LABELS[n % 2]) for n in range(60))
    run = run_with(FakeSession("hash"), base)
    made = FewShot(k=16).apply(base, replace(DATA, train=rows), run)
    assert len(made.demonstrations.pool) == 5 and "5 of 16" in run.notes["shown"]
    assert max(run.session(base.model).count(made.prompts(rows))) <= run.session(base.model).context
    named = FewShot(selection="fixed", ids=tuple(str(n) for n in range(20))).apply(base, replace(DATA, train=rows), run)
    assert named.demonstrations.pool == tuple((e.prompt, e.completion) for e in rows[:5])
    assert run.notes["shown"] == "5 of 20: the context window holds no more"
    huge = (replace(rows[0], prompt="long " * 2000), replace(rows[1], prompt="longer " * 2000))
    FewShot(k=2).apply(base, replace(DATA, train=huge), run)
    assert run.notes["shown"] == "1 of 2: the context window holds not even that"
    wordy = replace(base, decoding=Decoding(max_tokens=300))  # what is written needs room, too
    made, session = FewShot(k=16).apply(wordy, replace(DATA, train=rows), run), run.session(base.model)
    assert len(made.demonstrations.pool) in (3, 4)
    assert max(session.count(made.prompts(rows))) + 300 <= session.context


def test_inputs_that_say_nothing(base: System) -> None:
    assert [e.prompt for e in free_inputs("contextual", ROWS, 20, 0)] == ["N/A", "", "[MASK]"]
    own = [replace(e, history=(("system", "Sort it."), ("user", "Hm?"))) for e in ROWS]
    for kind in ("contextual", "domain"):
        assert {e.history for e in free_inputs(kind, own, 20, 0)} == {own[0].history[:1]}
    domain = free_inputs("domain", ROWS, 20, 0)
    assert len(domain) == 20 and all(len(e.prompt.split()) == 5 for e in domain)
    assert {w for e in domain for w in e.prompt.split()} <= {w for e in ROWS for w in e.prompt.split()}
    assert domain[0].prompt == " ".join(random.Random(0).choices([w for e in ROWS for w in e.prompt.split()], k=5))
    told = [Example("1", "この映画は、とても iPhone 面白い。"), Example("2", "หนังเรื่องนี้ดีมาก")]
    unspaced = [e.prompt for e in free_inputs("domain", told, 20, 0)]
    assert len(set(unspaced)) == 20 and not any(" " in text for text in unspaced)
    assert all(len(re.findall("iPhone|.", text)) == (14 + 18) // 2 for text in unspaced)
    run = run_with(FakeSession("hash"), base)
    priors = {kind: Calibrate(kind=kind).apply(base, DATA, run).decoding.prior
              for kind in ("batch", "contextual", "domain")}  # fmt: skip
    assert len(set(priors.values())) == 3 and all(sum(np.exp(p)) == pytest.approx(1) for p in priors.values())
