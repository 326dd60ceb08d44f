"""What repeats what: signs that matter, and what the search for near repeats keeps in memory."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from whet.splits import few, near_repeats, without
from whet.task import Example

CLOSING = {"(": ")", "[": "]", "{": "}"}


def dropped(train: list[Example], test: list[Example]) -> list[str]:
    return [name for name, _ in without(tuple(train), tuple(test))[1]]


@pytest.mark.parametrize("asked", ["{}", "Complete: {}", "Close what is open in this line of brackets: {}"])
def test_rows_of_brackets_are_told_apart(asked):
    chance = random.Random(0)
    lines = sorted({"".join(chance.choices("([{", k=6)) for _ in range(80)})[:60]
    rows = [Example(line, asked.format(" ".join(line)), "".join(CLOSING[c] for c in reversed(line))) for line in lines]
    chance.shuffle(rows)
    again = Example("again", asked.format(rows[50].id).upper(), rows[50].completion)  # without spaces
    assert dropped([*rows[:40], again], rows[40:]) == ["again"]


def test_rows_of_punctuation_are_told_apart():
    lines = [" ".join(f"{n:06b}").replace("0", "!").replace("1", "?") for n in range(60)]
    rows = [Example(line, f"Go on: {line}", "x") for line in lines]
    assert dropped([*rows[:40], Example("again", rows[50].prompt.upper(), "x")], rows[40:]) == ["again"]


@pytest.mark.parametrize("first, second", [("great :)", "great :("), ("x != 1", "x = 1"), ("a.b", "a,b"), (".5", "5")])
def test_signs_that_mean_something_count(first, second):
    assert not dropped([Example("a", first, "yes")], [Example("b", second, "no")])
    assert dropped([Example("c", f"“{second.upper()}”.", "no")], [Example("b", second, "yes")]) == ["c"]


def test_punctuation_of_prose_does_not_count():
    rows = [Example("a", "Well... it's “5,5”, she said: is it so? Yes; so it is!", "x")]
    assert dropped([Example("b", "well it’s 5,5 she said is it so yes so it is", "y")], rows) == ["b"]
    assert dropped([Example("c", "你好，世界。", "x")], [Example("d", "你好世界", "x")]) == []
    assert dropped([Example("c", "你好，世界。", "x")], [Example("d", "你好 世界", "x")]) == ["c"]


def test_brackets_of_prose_are_no_difference():
    text = "the old town hall (rebuilt after the fire) stands between the river and the market square"
    assert near_repeats([text.replace("(", "").replace(")", "")], [text]) == [(0, 0)]
    assert near_repeats([f"{text} :)"], [text]) == [(0, 0)] and not near_repeats([f"{text} :)"], [f"{text} :("])


def test_near_repeats_of_long_rows_need_little_memory():
    chance = random.Random(0)
    words = [f"w{n}x" for n in range(5000)]
    rows = [" ".join(chance.choices(words, k=200)) for _ in range(1000)]
    tracemalloc.start()
    assert near_repeats(rows[:800], [*rows[800:], rows[0] + "s"]) == [(0, 200)]
    assert near_repeats([*rows, rows[0] + "s"]) == [(1000, 0)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 25e6


PASSAGE = (
    "The old town hall was rebuilt after the great fire of the north bank by masons from the coast , who used pale "
    "stone from the quarry above the river and oak from the king's own forest . Its tower holds four bells , the "
    "largest of which was cast by a founder from the valley and is rung only when a new mayor takes the oath ."
)


@pytest.mark.parametrize("form", ["{p}\nQuestion: {q}", "Question: {q}\n{p}\nAnswer:"])
def test_another_question_on_the_same_passage_is_no_near_repeat(form):
    asked = ["who rebuilt the hall after the fire?", "which stone did the masons use?",
             "when is the largest bell rung?", "where did the oak come from?"]  # fmt: skip
    rows = [Example(f"r{n}", form.format(p=PASSAGE, q=q), "yes") for n, q in enumerate(asked)]
    assert dropped(rows[:3], rows[3:]) == [] and not near_repeats([row.prompt for row in rows])
    again = Example("again", form.format(p=PASSAGE, q="where did the oaks come from?"), "yes")
    edited = Example("edited", form.format(p=PASSAGE.replace("pale", "white").replace("bells", "bell"), q=asked[3]), "")
    assert dropped([*rows[:3], again, edited], rows[3:]) == ["again", "edited"]


def test_a_near_repeat_with_another_answer_gives_nothing_away():
    held = [Example("t", f"{PASSAGE} Hypothesis: the mayor rings the bell.", "entailment")]
    told = f"{PASSAGE} Hypothesis: no mayor rings the bell."
    assert dropped([Example("a", told, "contradiction")], held) == []
    assert dropped([Example("a", told, "Entailment")], held) == ["a"]
    assert dropped([Example("a", told, "")], held) == ["a"]
    assert dropped([Example("a", held[0].prompt.upper(), "contradiction")], held) == ["a"]


@pytest.mark.parametrize("text, other", [
    ("यह पुराना नगर भवन उत्तरी तट की भीषण आग के बाद तट से आए राजमिस्त्रियों ने फिर से बनाया था और इसकी मीनार में चार "
     "घंटियाँ हैं", "किसी"),
    ("இந்தப் பழைய நகர மண்டபம் வடக்குக் கரையின் பெரும் தீக்குப் பிறகு கடற்கரையிலிருந்து வந்த கொத்தனார்களால் மீண்டும் "
     "கட்டப்பட்டது அதன் கோபுரத்தில் நான்கு மணிகள் உள்ளன", "எந்தப்"),
])  # fmt: skip
def test_vowel_signs_belong_to_their_words(text, other):
    words = text.split()
    assert near_repeats([text.replace(words[-3], other)], [text]) == [(0, 0)]
    few = " ".join(sorted(words, key=len)[-4:])  # 4 words are too few to nearly repeat others, whatever their script
    assert not near_repeats([few[:-1]], [few])
    rows = [Example(str(n), f"{few}?", "x") for n in range(9)]
    assert dropped([Example("a", few, "x")], rows) == ["a"]


def test_few_sealed_rows_are_told_by_what_they_can_show():
    def rows(count: int, groups: int = 0) -> list[Example]:
        return [Example(str(n), f"p{n}", "x", group=f"g{n % groups}" if groups else None) for n in range(count)]

    said = "{} sealed: a gain of less than about {} points cannot be shown on so few; more in test.jsonl show less"
    assert few(rows(23)) == said.format("23 rows are", 25)  # 2.8²/(2.8² + 23)
    assert few(rows(4)) == few(rows(4, 4)) == said.format("4 rows are", 75)  # 3/4
    assert few(rows(100, 8)) == few([*rows(20, 4), *rows(4)]) == said.format("rows of 8 groups are", 49)
    assert few(rows(24)) == few(rows(100, 24)) == few([]) == ""
    assert few([Example("t", "", text="a text")]) == ""  # scored otherwise
