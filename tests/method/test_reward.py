"""Rewards: what they must accept, what tries to cheat them, and the formula of docs/method.md."""

from fractions import Fraction

import pytest

from minatp import reward
from minatp.decoder import Chain
from minatp.run.options import Config

# ---- numbers -------------------------------------------------------------------------------------


def test_numbers_are_exact():
    assert reward.number("1,234.50") == Fraction(2469, 2)
    assert reward.number("1e5") is None
    assert reward.number("٣") in (None, 3)

    assert reward.true("<<0.1+0.2=0.3>>")
    for step in ("<<1e9999999=1>>", "<<1_0=10>>", "<<0x10=16>>"):
        assert not reward.true(step)


def test_a_result_as_a_float_is_none_beyond_what_a_float_holds():
    assert reward.result_as_float("<<1+1=2>>") == 2.0
    assert reward.result_as_float("<<1=" + "9" * 400 + ">>") is None


# ---- the answer ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, gold, accuracy",
    [
        ("### 19", "19", 1),
        ("### 1,000", "1000.0", 1),
        ("### $7", "7", 1),
        ("### 40%", "40", 1),
        ("### 2.50", "2.5", 1),
        ("<<1+1=2>>\n### 2", "2", 1),
        ("### yes", "yes", 1),
        ("### yes", "no", 0),
        # a part of a number is not the number
        ("### 15", "5", 0),
        ("### 5", "15", 0),
        ("### -3", "3", 0),
        ("### 0.30000000000000001", "0.3", 0),
        # no answer
        ("19", "19", 0),
        ("### ", "0", 0),
        ("", "0", 0),
    ],
)
def test_accuracy(text, gold, accuracy):
    assert reward.accuracy(text, gold) == accuracy


@pytest.mark.parametrize(
    "text, ended, form",
    [
        ("### 19", True, 1),
        ("### -1,000.5", True, 1),
        ("### 19", False, 0),
        ("### x", True, 0),
        ("19", True, 0),
        ("### 19 pens", True, 0),
        ("### 5 ### 7", True, 0),
    ],
)
def test_form(text, ended, form):
    assert reward.form(text, ended) == form


# ---- the steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, final, coherence",
    [
        (["<<1+2=3>>", "<<3+2=5>>"], "5", 1),
        (["<<1+2=3>>", "<<4+1=5>>"], "5", 0.5),
        # nothing to judge
        ([], "5", 0),
        (["", ""], "5", 0),
        (["<<3+2=5>>"], None, 0),
        # "5" inside "15" is no use of 5
        (["<<1+4=5>>", "<<15+1=16>>"], "16", 0.5),
        # a step needs a result, but not its brackets
        (["<<5+3=8"], "8", 1),
        (["<<5+3>>"], "8", 0),
        (["8"], "8", 0),
        # the paper's coherence asks whether a result is used, not whether it is true or new
        (["<<3+4=9>>", "<<9+1=10>>"], "10", 1),
        (["<<5+0=5>>"] * 3, "5", 1),
        (["<<1+1=2>>"] * 3, "5", 0),
        # spellings and signs: a minus after a number is an operator
        (["<<2*3=6.0>>", "<<6/2=3>>"], "3", 1),
        (["<<9-4=5>>", "<<16-5=11>>"], "11", 1),
        (["<<1-4=-3>>", "<<5+-3=2>>"], "2", 1),
        (["<<3+4=7>>", "<<12 -7=5>>"], "5", 1),
        (["<<3+4=7>>", "<<2* -7=-14>>"], "-14", 0.5),
    ],
)
def test_coherence(steps, final, coherence):
    assert reward.coherence(steps, final) == coherence


@pytest.mark.parametrize(
    "steps, final, coherence",
    [
        (["<<1+2=3>>", "<<3+2=5>>"], "5", 1),
        (["<<2*(3+1)=8>>"], "8", 1),
        (["<<1,000*.5=500>>"], "500", 1),
        ([], "5", 0),
        # false, unused, repeated
        (["<<1+2=4>>", "<<4+1=5>>"], "5", 0.5),
        (["<<1+2=3>>", "<<4+1=5>>"], "5", 0.5),
        (["<<5=5>>"] * 3, "5", 1 / 3),
        # not arithmetic, or not exact
        (["<<1/0=5>>"], "5", 0),
        (["<<2**3=8>>"], "8", 0),
        (["<<x+1=5>>"], "5", 0),
        (["<<1/3=0.33>>"], "0.33", 0),
        (["<<__import__('os')=5>>"], "5", 0),
    ],
)
def test_strict_coherence_pays_for_true_used_and_new_steps_alone(steps, final, coherence):
    assert reward.coherence(steps, final, strict=True) == pytest.approx(coherence)


# ---- one chain -----------------------------------------------------------------------------------


def chain_of(text, ended):
    """A Chain of two thoughts, of which the second alone is coherent with the answer 5."""
    thoughts = ["<<1+2=3>>", "<<4+1=5>>"]
    return Chain(thoughts, text, ended, n_latent=2, n_token=3, stop_prob=[], sigma=[])


def test_the_reward_is_method_mds():
    R, terms = reward.chain_reward(Config(), chain_of("### 5", ended=True), "5")
    assert R == pytest.approx(1 + 0.1 * 0.5 + 0.5)
    assert terms == {"acc": 1.0, "coh": 0.5, "fmt": 1.0}


def test_coherence_earns_nothing_without_the_answer_unless_no_answer_is_known():
    wrong, _ = reward.chain_reward(Config(), chain_of("### 6", ended=True), "5")
    assert wrong == 0.5
    no_answers = Config(no_answers=True)
    unknown, terms = reward.chain_reward(no_answers, chain_of("### 5", ended=False), "")
    assert unknown == pytest.approx(0.05)
    assert terms == {"coh": 0.5, "fmt": 0.0}
