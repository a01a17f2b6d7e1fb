"""Measures of solved problems, on chains that are known."""

import pytest

from minatp.decoder import Chain
from minatp.problems import Problem
from minatp.run.evaluate import by_latent_steps, elect, measure, vote, wilson

PROBLEMS = [
    Problem("a", ["<<1+1=2>>"], "2"),
    Problem("b", ["<<1+1=2>>", "<<2+1=3>>"], "3"),
]


def chain_of(text, thoughts=(), n_latent=0):
    """A Chain of 3 tokens."""
    return Chain(list(thoughts), text, True, n_latent, 3, [], [])


def test_wilson_holds_its_known_values():
    low, high = wilson(81, 263)  # Newcombe 1998, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 10)[0] == 0
    assert wilson(10, 10)[1] == pytest.approx(1)


def test_measures_of_known_chains():
    right = chain_of("### 2", ["<<1+1=2>>"], n_latent=2)
    wrong = chain_of("### 9", ["<<1+1=2>>", "<<3+1=4>>"], n_latent=4)
    result = measure([right, wrong], PROBLEMS)
    assert result["accuracy"] == 0.5
    assert result["accuracy_by_steps"] == {1: 1.0, 2: 0.0}
    assert result["latents"] == 3
    assert result["answer_tokens"] == 3
    assert result["tokens"] == 6
    assert result["coherence"] == 0.5


def test_chains_without_words_have_no_coherence():
    result = measure([chain_of("### 2"), chain_of("### 3")], PROBLEMS)
    assert result["coherence"] is None


def test_votes_of_known_chains():
    """The first problem: 2, 2.0 and 5, which is a majority for 2. The second: 1, 1 and 3."""
    samples = [
        [chain_of("### 2"), chain_of("### 1")],
        [chain_of("### 2.0"), chain_of("### 1")],
        [chain_of("### 5"), chain_of("### 3")],
    ]
    result = vote(samples, PROBLEMS)
    assert result["pass"] == 1.0
    assert result["majority"] == 0.5
    assert result["mean"] == 0.5


def test_who_is_elected():
    coherent = chain_of("### 3", ["<<1+1=2>>", "<<2+1=3>>"])
    incoherent = chain_of("### 4", ["<<1+1=2>>", "<<9+1=4>>"])
    assert elect([incoherent, coherent, incoherent], "coherence") is coherent
    assert elect([coherent, incoherent, incoherent], "majority") is incoherent

    # all spellings of 0 vote together
    zeros = [chain_of("### 0"), chain_of("### 0.0"), chain_of("### -0")]
    threes = [chain_of("### 3"), chain_of("### 3")]
    assert elect([zeros[0], *threes, *zeros[1:]], "majority") is zeros[0]

    # a chain without an answer is elected if there is no other
    no_answer = chain_of("words")
    assert elect([no_answer], "majority") is no_answer
    assert elect([no_answer, coherent], "majority") is coherent


def test_each_number_of_latent_steps_is_compared_with_the_free_run():
    free = [chain_of("### 2", n_latent=1), chain_of("### 9", n_latent=2)]
    forced = {
        0: [chain_of("### 9"), chain_of("### 9")],
        2: [chain_of("### 2", n_latent=2), chain_of("### 3", n_latent=2)],
    }

    def solve(steps):
        return forced[steps]

    none, two = by_latent_steps(solve, [0, 2], free, PROBLEMS)
    assert (none["steps"], two["steps"]) == (0, 2)
    assert (none["accuracy"], two["accuracy"]) == (0, 1)
    assert none["accuracy_ci95"] == wilson(0, 2)
    assert (none["tokens"], two["tokens"]) == (3, 5)
    assert (none["gain"], two["gain"]) == (-0.5, 0.5)
    assert none["gain_se"] == pytest.approx(0.5)  # of the differences −1 and 0


def test_votes_count_answers_as_the_reward_reads_them():
    seven, also_seven, eight = (chain_of(text, []) for text in ("### 7", "### $7.00.", "### 8"))
    assert elect([eight, seven, also_seven], "majority") is seven
    far, also_far, near = (chain_of(text, []) for text in ("### Far", "### far", "### near"))
    assert elect([near, far, also_far], "majority") is far
