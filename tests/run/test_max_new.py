"""How long an answer may be: every right answer fits, or the user is told how many do not."""

import json

import torch

from minatp.problems import Problem
from minatp.run import evaluate, options
from minatp.run.loop import Run
from minatp.run.splits import Splits

from runs import GOOD, TINY, TINY_RL, go
from small import small_model


def problem(answer, steps=()):
    return Problem("How many?", list(steps), answer)


TRAIN = [problem("3", ["<<1+2=3>>", "<<3+0=3>>", "<<3-0=3>>"])]
LONG, LONGER = problem("1 2 " * 10), problem("1 2 " * 20)


def limits(*argv, stage, answers=(), val=(), tests=()):
    """(max_new, max_new_held_out) of a run on these problems, at a stage of the curriculum."""
    model, tokenizer = small_model()  # K = 2
    model.stage = stage
    splits = Splits(TRAIN, list(answers), list(val), {"t": list(tests)})
    run = Run(options.parse(list(argv), ""), splits, torch.device("cpu"), model, tokenizer)
    run.encode_rows()
    return run.max_new, run.max_new_held_out


def tokens(*texts):
    """Tokens of some texts, and eos."""
    _, tokenizer = small_model()
    return sum(len(tokenizer.encode(text)) for text in texts) + 1


def test_right_answers_of_every_set_fit():
    answer, longer_answer = tokens("### " + LONG.answer), tokens("### " + LONGER.answer)
    assert 16 < answer < longer_answer
    assert limits(stage=3) == (16, 16)
    for uses_answers in (["--answers-share", "1"], ["--stage", "rl"]):
        sets = dict(stage=3, answers=[LONG])
        assert limits(*uses_answers, **sets) == (answer, answer)
        assert limits(*uses_answers, **sets, val=[LONGER]) == (answer, longer_answer)
        assert limits(*uses_answers, **sets, tests=[LONGER]) == (answer, longer_answer)


def test_steps_that_are_still_words_count():
    steps = [step + "\n" for step in TRAIN[0].steps]
    cot, _ = limits(stage=0)
    assert cot == tokens(*steps, "### 3")
    assert limits(stage=0, val=[problem("3", TRAIN[0].steps * 2)])[1] == tokens(
        *steps, *steps, "### 3"
    )


def test_held_out_answers_change_nothing_of_what_is_learned():
    """The words that RL draws depend on the limit of its rollouts."""
    rl = ["--stage", "rl"]
    assert limits(*rl, stage=3, val=[LONGER], tests=[LONGER])[0] == limits(*rl, stage=3)[0]


def test_answers_that_are_not_learned_from_do_not_count():
    """Those that RL may not see, and in SFT those of problems that are left out of training."""
    assert limits("--stage", "rl", "--no-answers", stage=3, answers=[LONG]) == (16, 16)
    assert limits(stage=3, answers=[LONG]) == (16, 16)
    share = ("--answers-share", "1")
    assert limits(*share, "--no-answers", stage=3, answers=[LONG])[0] > 16  # no effect in SFT


def test_a_limit_of_the_user_stays():
    sets = dict(answers=[LONG], val=[LONG], tests=[LONGER])
    assert limits("--max-new", "9", stage=3, **sets) == (9, 9)


def test_answers_that_a_limit_cuts_off_are_counted(capsys):
    short, needed = problem("3"), tokens("### " + LONGER.answer)
    sets = dict(answers=[LONG], val=[LONG, short], tests=[LONGER, LONG, short])
    limits("--max-new", "9", stage=0, **sets)
    expected = (
        "note: --max-new 9 cuts off the right answers of 1 of 2 validation problems, 2 of 3 test "
        "(t) problems{}; the longest needs {}\n"
    )
    assert capsys.readouterr().out == expected.format("", needed)

    # RL has to find right answers for what it learns from, too
    limits("--max-new", "9", "--stage", "rl", stage=3, **sets)
    assert capsys.readouterr().out == expected.format(", 1 of 2 training problems", needed)

    limits("--max-new", str(needed), stage=3, **sets)
    assert capsys.readouterr().out == ""


def test_a_run_and_its_dry_run_say_it(finished, tmp_path, capsys):
    for command in (TINY, [*TINY_RL, "--init", finished]):
        go(*command, "--max-new", 2, "--dry-run")
        assert "note: --max-new 2 cuts off the right answers of 4 of 4" in capsys.readouterr().out


def test_evaluate_says_it_on_stderr(finished, tmp_path, capsys):
    (tmp_path / "p").write_text(f"{GOOD}\n{GOOD}\n")
    evaluate.main([str(finished), "--file", str(tmp_path / "p"), "--max-new", "1", "--json"])
    out, err = capsys.readouterr()
    assert out.startswith("{")
    assert err == f"note: {finished}: --max-new 1 cut off 2 of 2 answers\n"


def test_a_run_writes_an_answer_that_only_the_test_set_has(tmp_path, monkeypatch):
    """The limit that is settled is the one that test problems are solved with."""
    limits_seen = set()
    rollout = evaluate.rollout

    def watch(model, prompt, prompt_mask, max_new, **more):
        limits_seen.add(max_new)
        return rollout(model, prompt, prompt_mask, max_new, **more)

    monkeypatch.setattr(evaluate, "rollout", watch)
    learned = [{"question": f"q {i}", "steps": ["<<1+1=2>>"], "answer": "2"} for i in range(12)]
    (tmp_path / "d").write_text(json.dumps(learned))
    (tmp_path / "t").write_text(json.dumps([{"question": "r", "steps": [], "answer": "2 " * 40}]))
    go(*TINY, "--data", tmp_path / "d", "--test", tmp_path / "t", "--out", tmp_path / "out")
    assert min(limits_seen) > 40
