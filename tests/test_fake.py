"""The fake engine keeps the Session contract and is deterministic."""

import math
from pathlib import Path

import pytest

from whet.engine import Sampling, open_session
from whet.engine.fake import KINDS, overlap
from whet.errors import EngineError, ModelError
from whet.model import Transform, resolve

HOME = Path("unused")
CHAT = (("system", "Name the topic."), ("user", "first line\nthe last line here\n"))
SHOWN = (
    ("user", "The goalkeeper saved a penalty in the football match"), ("assistant", "sport"),
    ("user", "Shares of the bank fell after the interest decision"), ("assistant", "business"),
)  # fmt: skip


def session(kind):
    return open_session(resolve(f"fake:{kind}"), HOME)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_lengths_order_and_repeatability(kind):
    prompts = [CHAT, "raw text", (("user", "other"),)]
    sets = [["a", "b c"], ["d"], []]
    one, two = session(kind), session(kind)
    scores = one.score(prompts, sets)
    assert [len(row) for row in scores] == [2, 1, 0]
    assert scores == two.score(prompts, sets)
    assert scores[::-1] == two.score(prompts[::-1], sets[::-1])
    assert [s.tokens for s in scores[0]] == [1, 2] and all(s.logprob < 0 for row in scores for s in row)
    sampling = Sampling(temperature=1.0, n=3)
    made = one.generate(prompts, sampling)
    assert [len(row) for row in made] == [3, 3, 3] and made == two.generate(prompts, sampling)
    assert one.generate(prompts[1:], sampling) == made[1:]


def test_echo_says_the_last_line_and_stops():
    engine = session("echo")
    assert engine.generate([CHAT], Sampling())[0][0].text == "the last line here"
    cut = engine.generate([CHAT], Sampling(max_tokens=2))[0][0]
    assert (cut.text, cut.tokens, cut.finish) == ("the last", 2, "length")
    stopped = engine.generate([CHAT], Sampling(stop=("zzz", " line")))[0][0]
    assert (stopped.text, stopped.tokens, stopped.finish) == ("the last", 2, "stop")
    likely, unlikely = engine.score([CHAT], [["last line", "cat dog"]])[0]
    assert likely.logprob == pytest.approx(2 * math.log(0.9)) and unlikely.logprob == pytest.approx(2 * math.log(0.01))


def test_hash_depends_on_content_seed_and_copy_but_not_on_seed_when_greedy():
    engine = session("hash")
    prompts = [f"prompt {n}" for n in range(40)]
    greedy = engine.generate(prompts, Sampling(n=2))
    assert all(a == b for a, b in greedy) and len({a.text for a, _ in greedy}) > 20
    assert greedy == engine.generate(prompts, Sampling(n=2, seed=5))
    drawn = engine.generate(prompts, Sampling(n=2, temperature=1.0, seed=5))
    assert sum(a != b for a, b in drawn) > 20 and drawn != engine.generate(prompts, Sampling(n=2, temperature=1.0))
    firsts = [row[0].logprob > row[1].logprob for row in engine.score(prompts, [["yes", "no"]] * 40)]
    assert 8 < sum(firsts) < 32


def test_demonstrations_help_keyword():
    engine, labels = session("keyword"), ["business", "sport"]
    asked = [("a penalty decided the football final", "sport"), ("the bank raised its interest rate", "business")]
    for question, label in asked:
        chat = (*SHOWN, ("user", question))
        scores = dict(zip(labels, engine.score([chat], [labels])[0], strict=True))
        assert max(labels, key=lambda c: scores[c].logprob) == label
        assert engine.generate([chat], Sampling())[0][0].text == label
        bare = dict(zip(labels, engine.score([(("user", question),)], [labels])[0], strict=True))
        assert scores[label].logprob > bare[label].logprob + 0.3
    drawn = engine.generate([(*SHOWN, ("user", asked[0][0]))], Sampling(temperature=5.0, n=40))[0]
    assert {g.text for g in drawn} == {"sport", "business"}


def test_overlap_is_jaccard_over_words_that_carry_meaning():
    assert overlap("the green house", "a green house, the roof") == pytest.approx(2 / 3)
    assert overlap("a b", "b c") == pytest.approx(1 / 3)
    assert overlap("", "") == 0


def test_spent_counts_words_and_shares_the_prompt():
    engine = session("echo")
    assert engine.count([CHAT, "one two"]) == [9, 2]
    engine.score(["one two three"], [["a", "b c"]])
    assert engine.spent.prefilled_tokens == 6 and engine.spent.generated_tokens == 0
    engine.generate(["one two three"], Sampling(n=4))
    assert engine.spent.prefilled_tokens == 9 and engine.spent.generated_tokens == 3
    plain, ended = engine.score(["a"], [["a"]])[0][0], engine.score(["a"], [["a"]], end=True)[0][0]
    assert ended.tokens == plain.tokens + 1 and ended.logprob < plain.logprob


def test_progress_is_told():
    seen = []
    session("hash").score(["a", "b", "c"], [["x"]] * 3, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_too_long_a_prompt_is_refused():
    engine = session("hash")
    fits, long = "word " * engine.context, "word " * (engine.context + 1)
    assert len(engine.generate([fits], Sampling())) == 1
    with pytest.raises(EngineError, match="1024 words, found 1025"):
        engine.generate(["short", long], Sampling())
    with pytest.raises(EngineError, match="context window"):
        engine.score([long], [["x"]])


def test_what_cannot_be_opened():
    with pytest.raises(ModelError, match="did you mean 'keyword'"):
        session("keywrd")
    with pytest.raises(ModelError, match="no weights"):
        open_session(resolve("fake:hash").add(Transform("adapter", "0" * 64)), HOME)


def test_any_text_is_taken():
    odd = "\ud800 \0 \u200b 🎈 <|im_end|>"
    for kind in KINDS:
        engine = session(kind)
        assert len(engine.score([odd, ""], [[odd, ""], [""]])) == 2
        assert len(engine.generate([odd, "", ()], Sampling(temperature=1.0))) == 3
