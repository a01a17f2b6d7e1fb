"""Stories: steps are true, the last one has the answer, and the published ones do not change."""

import hashlib
import json
import re

import pytest

from minatp import reward
from minatp.tools import stories

from commands import run


@pytest.fixture(scope="module")
def problems():
    return stories.generate(2000, 1)


def test_every_step_is_true_and_the_last_one_has_the_answer(problems):
    for p in problems:
        assert all(reward.true(step) for step in p.steps), p
        assert reward.result(p.steps[-1]) == reward.number(p.answer, alone=True), p
        assert reward.accuracy(f"### {p.answer}", p.answer) == 1, p


def test_every_sentence_is_one(problems):
    for p in problems:
        assert "{" not in p.question
        assert p.question.endswith("?")
        for sentence in re.split(r"(?<=[.?]) ", p.question):
            assert re.fullmatch(r"[A-Z0-9].*[^.?][.?]", sentence), p


def test_problems_have_1_to_7_steps_and_depend_on_the_seed_alone(problems):
    questions = [p.question for p in problems]
    assert {1, 2, 3, 4} <= {len(p.steps) for p in problems} <= set(range(1, 8))
    assert stories.generate(2000, 1) == problems
    assert [p.question for p in stories.generate(2000, 2)] != questions


def test_the_stories_of_docs_results_are_still_the_same(capsys):
    run(stories.main, 12000)
    lines = capsys.readouterr().out
    digest = hashlib.sha256(lines.encode()).hexdigest()
    assert digest == "a5baf1f21b9970de3d9e7bc009dd983889611b619fcfbed83dba898c1794f24a"
    assert json.loads(lines.partition("\n")[0])["answer"] == "49.5"


# fmt: off
@pytest.mark.parametrize("argv, reason", [
    ([], "required: n"),
    (["many"], "invalid int value: 'many'"),
    (["0"], "ask for 1 to"),
    (["-1"], "ask for 1 to"),
    ([10**9], "ask for 1 to"),
    (["5", "0", "0"], "there is no option 0"),
])
# fmt: on
def test_a_wrong_command_line_is_one_line(argv, reason, refused):
    refused(stories.main, argv, "command line: ", reason)
