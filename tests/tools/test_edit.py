"""Forced thoughts and edits of a chain: what was asked for happens, and nothing else changes."""

import json
import re
from dataclasses import replace

import pytest
import torch

import sample
from minatp import problems
from minatp.data import left_pad
from minatp.rollout import Forced, rollout
from minatp.run import evaluate, splits
from minatp.run.errors import UserError
from minatp.tools import edit

from commands import run

# ---- forced thoughts -----------------------------------------------------------------------------


def test_a_chain_forced_to_its_own_thoughts_does_not_change(solved):
    z = torch.zeros(24, 4, 32)
    n = torch.tensor([chain.n_latent for chain in solved.mean])
    for i, chain in enumerate(solved.mean):
        z[i, : n[i]] = chain.z

    def facts(chains):
        return [(chain.text, chain.thoughts, chain.n_latent) for chain in chains]

    first_thought = n.clamp(max=2)
    for n_forced in (n, first_thought):
        thinks_on = torch.zeros_like(n).bool()
        for ends in (n_forced == n, thinks_on):
            forced = Forced(z, n_forced, ends)
            again = evaluate.solve(
                solved.model, solved.tokenizer, solved.prompts, 6, 5, forced=forced, keep_z=True
            )
            assert facts(again) == facts(solved.mean)


@pytest.mark.parametrize("ends", [True, False])
def test_forced_thoughts_are_used_and_no_stop_comes_before_their_end(solved, ends):
    z = torch.randn(24, 4, 32, generator=torch.Generator().manual_seed(1))
    n = torch.tensor([0, 2, 4] * 8)
    prompt, mask = left_pad(solved.prompts, solved.tokenizer.end)
    forced = Forced(z, n, torch.full((24,), ends))
    result = rollout(solved.model, prompt, mask, 6, forced=forced)

    for i in range(24):
        assert torch.equal(result.z[i, : n[i]], z[i, : n[i]])
    if ends:
        assert torch.equal(result.n_latent, n)
    else:
        assert (result.n_latent >= n).all()
        assert (result.n_latent > n).any()  # some think on …
        assert (result.n_latent < 4).any()  # … and some stop early


# ---- edits ---------------------------------------------------------------------------------------


def of_length(chains, n_latent):
    return [i for i, chain in enumerate(chains) if chain.n_latent == n_latent]


def thoughts_of(chain):
    return list(chain.z.split(2))


def drop_first(own, donor):
    return [own[1]]


def drop_second(own, donor):
    return [own[0]]


def swap(own, donor):
    return [own[1], own[0]]


def second_is_zero(own, donor):
    return [own[0], torch.zeros_like(own[1])]


def first_is_read_so(own, donor):
    return [donor[1]]


@pytest.mark.parametrize(
    "text, expected, ends",
    [
        ("drop 1", drop_first, True),
        ("drop 2", drop_second, True),
        ("swap 1 2", swap, False),
        ("replace 2 zero", second_is_zero, False),
        ("replace 1 WORDS", first_is_read_so, False),
    ],
)
def test_edits_change_the_chain_as_they_say(text, expected, ends, solved):
    long, short = of_length(solved.mean, 4), of_length(solved.mean, 0)
    donor = replace(solved.mean[long[0]])  # of another problem, with the same thoughts
    text = text.replace("WORDS", donor.thoughts[1])
    forced, applies = edit.force(edit.parse(text), solved.model, solved.mean, [donor])

    for i in long:
        new = torch.cat(expected(thoughts_of(solved.mean[i]), thoughts_of(donor)))
        assert applies[i]
        assert forced.n[i] == len(new)
        assert torch.equal(forced.z[i, : len(new)], new)
        assert forced.ends[i] == ends

    # chains without thoughts stay the same: none are forced, and the answer follows
    assert not any(applies[i] for i in short)
    assert forced.ends[short].all()
    assert (forced.n[short] == 0).all()


def test_a_thought_is_not_replaced_by_itself(solved):
    """Where a chain is alone in having a thought that reads so, there is nothing to put in."""
    mean = solved.mean
    i, *others = of_length(mean, 4)
    words = edit.parse(f"replace 1 {mean[i].thoughts[0]}")
    _, applies = edit.force(words, solved.model, mean, [mean[i]])
    assert not applies[i]
    assert all(applies[other] for other in others)


def test_a_thought_of_the_next_problem_takes_its_place(solved):
    mean = solved.mean
    forced, applies = edit.force(edit.parse("replace 1 next"), solved.model, mean, mean)
    for i in range(24):
        assert applies[i] == bool(mean[i].n_latent and mean[(i + 1) % 24].n_latent)
    i = applies.index(True)
    assert torch.equal(forced.z[i, :2], mean[i + 1].z[:2])


def test_no_next_problem_with_such_a_thought_is_named_as_the_cause(solved):
    [long, *_], [short, *_] = of_length(solved.mean, 4), of_length(solved.mean, 0)
    chains = [solved.mean[long], solved.mean[short]]
    with pytest.raises(UserError, match="has a thought 2, the next problem's has none"):
        edit.force(edit.parse("replace 2 next"), solved.model, chains, chains)


def test_a_draw_from_the_prior_is_standard_normal_and_the_same_for_a_seed(solved):
    long = of_length(solved.mean, 4)
    prior = edit.parse("replace 1 prior")

    def draw(seed):
        forced, _ = edit.force(prior, solved.model, solved.mean, solved.mean, seed)
        return forced.z[long, :2]

    assert torch.equal(draw(0), draw(0))
    assert 0.7 < draw(0).std() < 1.3


def test_the_page_marks_the_thoughts_that_an_edit_has_put_there():
    assert edit.parse("swap 3 1").places == [2, 0]
    assert edit.parse("replace 2 zero").places == [1]
    assert edit.parse("drop 2").places == []


@pytest.mark.parametrize(
    "text",
    [
        "drop",
        "drop 0",
        "drop 1 2",
        "swap 1",
        "swap 2 2",
        "replace 1",
        "shuffle 1 2",
        "drop x",
        "",
    ],
)
def test_what_is_not_an_edit(text):
    with pytest.raises(UserError, match="is not an edit; write"):
        edit.parse(text)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--edit", "drop 3"], "no chain has a thought 3"),
        (["--edit", "replace 1 <<0+0=7>>"], "another problem is read as '<<0+0=7>>'"),
        (
            ["--edit", "replace 1 next", "--problems", "1", "--seed", "2"],
            "there is no next problem",
        ),
        (["--edit", "drop 1", "--n", "3"], "cannot be combined with --n"),
        (["--html", "x.html", "--json"], "cannot be combined with --json"),
        (["--html", "/nowhere/x.html"], "/nowhere/x.html:0: cannot be written"),
    ],
)
def test_mistakes_get_one_line(argv, message, folder, capsys):
    run(sample.main, "--run", folder, "--problems", 8, "--max-new", 4, *argv, expect=2)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


# ---- sample.py --edit ----------------------------------------------------------------------------


def json_lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_words_for_an_edit_can_come_from_the_problems_shown(folder, tmp_path, capsys, monkeypatch):
    """A run on data of one's own may have no test set to take thoughts from."""

    def no_test_set(*_):
        raise UserError("none")

    monkeypatch.setattr(edit, "test_set", no_test_set)
    questions = tmp_path / "questions.txt"
    questions.write_text("".join(p.question + "\n" for p in problems.generate("test", 8, 0)))
    options = ["--run", folder, "--file", questions, "--problems", 8, "--max-new", 4]

    run(sample.main, *options, "--json")
    thoughts = [text for record in json_lines(capsys) for text in record["thoughts"]]
    words = next(text for text in thoughts if text.strip() and "\n" not in text)
    run(sample.main, *options, "--edit", f"replace 1 {words}")


def test_no_problem_is_its_own_donor(folder):
    shown = splits.test_set(folder, 8)
    questions = {p.question for p in edit.donors(folder, shown)}
    assert questions
    assert not questions & {p.question for p in shown}


def test_edits_in_the_terminal(folder, capsys):
    options = ["--run", folder, "--problems", 8, "--max-new", 4, "--edit", "drop 1"]
    run(sample.main, *options, "--edit", "swap 1 2", "--json")
    records = json_lines(capsys)
    own = {r["question"]: r for r in records if not r["edit"]}
    dropped = [r for r in records if r["edit"] == "drop 1"]
    assert len(own) == 8
    assert len(dropped) == sum(r["latents"] > 0 for r in own.values())
    for record in dropped:
        assert record["thoughts"] == own[record["question"]]["thoughts"][1:]

    # the closing line counts the answers that the edit has changed
    run(sample.main, *options)
    out = capsys.readouterr().out
    closing = re.search(r"run · drop 1: another answer in (\d+) of (\d+)", out)
    n_changed = sum(r["text"] != own[r["question"]]["text"] for r in dropped)
    assert (int(closing[1]), int(closing[2])) == (n_changed, len(dropped))
    assert out.count("does not apply") == 8 - len(dropped)
