"""Rewards: what they must accept, what tries to cheat them, and the formula of docs/method.md."""

import time
from fractions import Fraction

import pytest

from minatp import reward
from minatp.decoder import Chain
from minatp.run.options import Config

# ---- numbers -------------------------------------------------------------------------------------


def test_numbers_are_exact():
    assert reward.number("1,234.50") == Fraction(2469, 2)
    assert reward.number("٣") in (None, 3)


@pytest.mark.parametrize(
    "text, value",
    [
        ("29.", 29),
        ("$ 403", 403),
        ("-$18", -18),
        ("$-18", -18),
        ("+5", 5),
        ("\N{MINUS SIGN}5", -5),
        ("1,000", 1000),
        ("40%", 40),
        ("2.0107e-06", Fraction(20107, 10**10)),
        ("1E5", 100_000),
        # a unit and words may follow
        ("72, altogether", 72),
        ("18 dollars.", 18),
        ("12 m²", 12),
        # a comma stands between groups of three digits
        ("1,5", None),
        ("1,2,3", None),
        ("1,000,00", None),
        # neither guesses nor calculations
        ("1 2 3 4", None),
        ("5 or 6", None),
        ("3/4", None),
        ("12=", None),
        ("12 *", None),
        ("10²", None),
        ("10%²", None),
        ("1½", None),
        ("12>>", None),
        ("--5", None),
        # a step, words
        ("<<1+2=3>>", None),
        ("seven", None),
        ("", None),
    ],
)
def test_an_answer_is_the_number_that_it_begins_with(text, value):
    assert reward.number(text) == value


def test_two_answers_are_the_same_if_they_are_one_number_or_one_text():
    assert reward.same("5", "5.0 pens")
    assert reward.same("Twice  as many", "twice as many")
    assert not reward.same("5", "five")


@pytest.mark.parametrize(
    "text",
    [
        "9" * 100_000,
        "1," * 50_000,
        "1e999999999",
        "1e999*" * 5000 + "1",
        "1/1e999" * 5000,
        "(" * 5000 + "1",
    ],
    ids=lambda text: text[:8],
)
def test_huge_numbers_take_no_time(text):
    start = time.perf_counter()
    assert reward.number(text) is None
    assert not reward.true(f"<<{text}=1>>")
    assert reward.links([f"<<1={text}>>", f"<<{text}=1>>"], text)
    assert time.perf_counter() - start < 2


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
        ("### 1,5", "15", 0),
        # an integer has to be met exactly, any other number to 1e-3 of it
        ("### 14.9999999", "15", 0),
        ("### 0.00000201", "2.0107e-06", 1),
        ("### 0.00000202", "2.0107e-06", 0),
        ("### 3244047.10000000", "3244047.0999999996", 1),
        ("### -0.5004", "-0.5", 1),
        ("### 0.5006", "0.5", 0),
        ("### 0", "2.0107e-06", 0),
        # words after the number
        ("### 72, altogether", "72", 1),
        ("### 1 2 3 4", "1", 0),
        ("### 1 2 3 4", "4", 0),
        # a gold with words is text
        ("### 5 PM", "5 pm", 1),
        ("### 5 am", "5 pm", 0),
        ("### Lena’s  jar", "Lena's jar", 1),
        # but a currency may stand on either side
        ("### 5", "5 €", 1),
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
        ("### 19 pens", True, 1),
        ("### 19 or 20", True, 0),
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
        (["<<5-8=−3>>", "<<−3+9=6>>"], "6", 1),
        (["<<4+3=7>>", "<<$+7*2=14>>"], "$14", 1),
        # fractions and percentages are one number, and have the numbers that they are written with
        (["<<3/4=3/4>>", "<<100*3/4=75>>"], "75", 1),
        (["<<3/4=0.75>>", "<<100*3/4=75>>"], "75", 1),
        (["<<1+2=3>>", "<<3/4=0.75>>"], "0.75", 1),
        (["<<30/100=0.3>>", "<<20*30%=6>>"], "6", 1),
        (["<<2/5=40%>>"], "40%", 1),
        # but a division is to be carried out: 6/2 is no use of 3
        (["<<1+2=3>>", "<<6/2=9>>"], "9", 0.5),
        (["<<3=3/0>>"], "3", 0),
        # 1,5 is not 15
        (["<<7+8=15>>", "<<1,5+1=16>>"], "16", 0.5),
        # nor is a list of numbers an answer
        (["<<1+2=3>>"], "1 2 3", 0),
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
        # not arithmetic, or not true
        (["<<1/0=5>>"], "5", 0),
        (["<<2**3=8>>"], "8", 0),
        (["<<x+1=5>>"], "5", 0),
        (["<<__import__('os')=5>>"], "5", 0),
    ],
)
def test_strict_coherence_pays_for_true_used_and_new_steps_alone(steps, final, coherence):
    assert reward.coherence(steps, final, strict=True) == pytest.approx(coherence)


@pytest.mark.parametrize(
    "step",
    [
        "<<0.1+0.2=0.3>>",
        "<<+7=7>>",
        "<<3*+6=18>>",
        "<<560//10=56>>",
        "<<3/4=3/4>>",
        "<<20*30%=6>>",
        "<<(2+3)*20%=1>>",
        "<<5-8=−3>>",
        "<<3×4÷2=6>>",
        "<<2*$5=$10>>",
        "<<1,000+1e3=2,000>>",
        # rounded as written
        "<<10/3=3.33>>",
        "<<20/3=6.7>>",
        "<<-10/3=-3.33>>",
        "<<1/3=33.3%>>",
    ],
)
def test_a_step_is_true(step):
    assert reward.true(step)


@pytest.mark.parametrize(
    "step",
    [
        "<<3/4=3>>",
        "<<20*30%=600>>",
        "<<1,5+2=17>>",
        # rounded wrongly, or though it need not be
        "<<10/3=3.34>>",
        "<<2/3=0.66>>",
        "<<10/3=3>>",
        "<<1/8=0.13>>",
        # Python's own numbers and operators
        "<<1e9999999=1>>",
        "<<1_0=10>>",
        "<<0x10=16>>",
        "<<10%3=1>>",
        "<<None=None>>",
    ],
)
def test_a_step_is_false(step):
    assert not reward.true(step)


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
    wrong, terms = reward.chain_reward(Config(), chain_of("### 6", ended=True), "5")
    assert wrong == 0.5
    assert terms == {"acc": 0.0, "coh": 0.0, "fmt": 1.0}
    no_answers = Config(no_answers=True)
    unknown, terms = reward.chain_reward(no_answers, chain_of("### 5", ended=False), "")
    assert unknown == pytest.approx(0.05)
    assert terms == {"coh": 0.5, "fmt": 0.0}


def test_a_chain_needs_to_be_read_only_where_coherence_counts():
    """An unread chain has no steps, and says so to a reward that asks for them."""
    unread = chain_of("### 6", ended=True)
    unread.thoughts = None
    assert reward.chain_reward(Config(), unread, "5")[0] == 0.5
    for cfg, gold in ((Config(), "6"), (Config(no_answers=True), "5")):
        with pytest.raises(AssertionError, match="has not read"):
            reward.chain_reward(cfg, unread, gold)
