"""Rewards, on what they must accept and on what tries to cheat them."""
from fractions import Fraction

import pytest

from minatp import reward
from minatp.evaluate import Chain, elect, measure, vote, wilson
from minatp.data import Problem


@pytest.mark.parametrize("text, gold, right", [
    ("### 19", "19", 1), ("### 1,000", "1000.0", 1), ("### 15", "5", 0), ("### 5", "15", 0), ("19", "19", 0), ("### $7", "7", 1),
    ("### -3", "3", 0), ("### 2.50", "2.5", 1), ("<<1+1=2>>\n### 2", "2", 1), ("### yes", "yes", 1), ("### yes", "no", 0),
    ("### ", "0", 0), ("", "0", 0), ("### 40%", "40", 1), ("### 0.30000000000000001", "0.3", 0),
])
def test_accuracy(text, gold, right):
    assert reward.accuracy(text, gold) == right


@pytest.mark.parametrize("text, ended, good", [("### 19", True, 1), ("### 19", False, 0), ("### x", True, 0), ("19", True, 0),
                                               ("### 19 pens", True, 0), ("### -1,000.5", True, 1), ("### 5 ### 7", True, 0)])
def test_form(text, ended, good):
    assert reward.form(text, ended) == good


@pytest.mark.parametrize("steps, final, want", [
    ([], "5", 0), (["", ""], "5", 0), (["<<1+2=3>>", "<<3+2=5>>"], "5", 1), (["<<1+2=3>>", "<<4+1=5>>"], "5", 0.5),
    (["<<1+4=5>>", "<<15+1=16>>"], "16", 0.5),        # "5" inside "15" is no use of 5
    (["<<5+3=8"], "8", 1), (["<<5+3>>"], "8", 0), (["8"], "8", 0), (["<<9-4=5>>", "<<16-5=11>>"], "11", 1),
    (["<<3+4=9>>", "<<9+1=10>>"], "10", 1), (["<<5+0=5>>"] * 3, "5", 1), (["<<1+1=2>>"] * 3, "5", 0),  # the paper's asks for use, not truth
    (["<<2*3=6.0>>", "<<6/2=3>>"], "3", 1), (["<<3+2=5>>"], None, 0), (["<<1-4=-3>>", "<<5+-3=2>>"], "2", 1),
    (["<<3+4=7>>", "<<12 -7=5>>"], "5", 1), (["<<3+4=7>>", "<<2* -7=-14>>"], "-14", 0.5),
])
def test_coherence(steps, final, want):
    assert reward.coherence(steps, final) == want


def test_numbers_are_exact():
    assert reward.true("<<0.1+0.2=0.3>>") and not any(map(reward.true, ("<<1e9999999=1>>", "<<1_0=10>>", "<<0x10=16>>")))
    assert reward.size("<<1+1=2>>") == 2.0 and reward.size("<<1=" + "9" * 400 + ">>") is None
    assert reward.number("1,234.50") == Fraction(2469, 2) and reward.number("1e5") is None and reward.number("٣") in (None, 3)


def test_wilson_holds_its_known_values():
    low, high = wilson(81, 263)  # Newcombe 1998, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == pytest.approx(1)


def chain(text, thoughts=(), n_latent=0):
    return Chain(list(thoughts), text, True, n_latent, 3, [], [])


def test_measures_of_known_chains():
    ps = [Problem("a", ["<<1+1=2>>"], "2"), Problem("b", ["<<1+1=2>>", "<<2+1=3>>"], "3")]
    m = measure([chain("### 2", ["<<1+1=2>>"], 2), chain("### 9", ["<<1+1=2>>", "<<3+1=4>>"], 4)], ps)
    assert (m["accuracy"], m["latents"], m["answer_tokens"], m["tokens"], m["coherence"]) == (0.5, 3, 3, 6, 0.5)
    assert m["accuracy_by_steps"] == {1: 1.0, 2: 0.0}
    assert measure([chain("### 2"), chain("### 3")], ps)["coherence"] is None
    v = vote([[chain("### 2"), chain("### 1")], [chain("### 2.0"), chain("### 1")], [chain("### 5"), chain("### 3")]], ps)
    assert (v["pass"], v["majority"], v["mean"]) == (1.0, 0.5, 0.5)
    coherent, not_so = chain("### 3", ["<<1+1=2>>", "<<2+1=3>>"]), chain("### 4", ["<<1+1=2>>", "<<9+1=4>>"])
    assert elect([not_so, coherent, not_so], "coherence") is coherent and elect([coherent, not_so, not_so], "majority") is not_so
    zero = [chain("### 0"), chain("### 3"), chain("### 3"), chain("### 0.0"), chain("### -0")]
    assert elect(zero, "majority") is zero[0]
    nothing = chain("words")
    assert elect([nothing], "majority") is nothing and elect([nothing, coherent], "majority") is coherent
