"""sample.py: what it prints of a small run."""

import io
import json

import pytest

import sample
from minatp.run.errors import guarded

from runs import go
from small import SMALL

QUESTION = "Ann has 5 pens. How many?"


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory):
    """The folder of a small run."""
    out = tmp_path_factory.mktemp("runs") / "sft"
    go(*SMALL, "--out", out)
    return out


@pytest.fixture
def show(sft_run, capsys):
    """show(*argv): what sample.py prints."""

    def run(*argv):
        assert guarded(sample.main, ["--run", str(sft_run), *argv]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def show_json(show):
    """show_json(*argv): the records that sample.py prints."""

    def run(*argv):
        return [json.loads(line) for line in show(*argv, "--json").splitlines()]

    return run


def test_problems_of_the_test_set_are_shown_with_their_answers(show):
    output = show("--problems", "2")
    assert output.count("→") == 2
    assert "tokens/s" in output
    assert "\x1b[" not in output  # no colours: this is no terminal


def test_several_chains_of_a_question_as_json(show_json):
    records = show_json(QUESTION, "--n", "3")
    assert len(records) == 3
    for record in records:
        n_step = record["latents"] // 2
        assert len(record["sigma"]) == n_step
        assert len(record["thoughts"]) == n_step


@pytest.mark.parametrize("by", ["majority", "coherence"])
def test_one_of_several_chains_is_elected(by, show_json):
    """Of a question whose answer nobody knows."""
    records = show_json(QUESTION, "--n", "3")
    [elected] = show_json(QUESTION, "--n", "3", "--vote", by)
    assert elected in records
    assert elected["right"] is None


def test_the_speed_of_an_election_counts_every_voter(show_json, show, monkeypatch):
    records = show_json(QUESTION, "--n", "3")
    shown = []

    def keep(columns, problems):
        shown.extend(columns)

    monkeypatch.setattr(sample.show, "print_json", keep)
    show(QUESTION, "--n", "3", "--vote", "majority", "--json")
    [column] = shown
    assert len(column.chains[0]) == 1
    n_position = sum(record["latents"] + record["tokens"] for record in records)
    assert column.n_position == n_position
    column.seconds = 0.5
    assert f"{2 * n_position:,} tokens/s" in sample.show.lengths_and_speed(column)


def test_questions_are_read_from_stdin(show_json, monkeypatch):
    # A byte order mark is no part of the first
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffOne?\n\nTwo?\n"))
    records = show_json("-")
    assert [record["question"] for record in records] == ["One?", "Two?"]


@pytest.mark.parametrize("option, n", [([], 6), (["--problems", "5"], 5)])
def test_all_questions_are_read_from_stdin_unless_some_are_asked_for(
    option, n, show_json, monkeypatch
):
    monkeypatch.setattr("sys.stdin", io.StringIO("One more?\n" * 6))
    assert len(show_json("-", *option)) == n


def test_a_published_test_set_is_shown_as_it_is(show_json, tmp_path):
    (tmp_path / "set.json").write_text('[{"sQuestion": "How many?", "lSolutions": [21.0]}]')
    [record] = show_json("--file", str(tmp_path / "set.json"))
    assert (record["question"], record["gold"]) == ("How many?", "21")
