"""The probe, and evaluation side by side: the numbers are those of the data they were made from."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minatp.decoder import thought_nll
from minatp.run import evaluate
from minatp.run.huggingface import load_model, save_model
from minatp.tools import probe

from commands import run


def test_the_probe_finds_what_is_there_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    group = torch.arange(900) // 3
    y = torch.randint(1, 6, (900,), generator=g).double()
    noise = torch.randn(900, 10, generator=g).double()
    one_hot = torch.eye(6)[y.long()].double()
    signal = one_hot @ torch.randn(6, 10, generator=g).double() + 0.05 * noise

    there = probe.probe(torch.cat((signal, noise), 1), y, group)
    assert there["accuracy"] > 0.99
    assert there["r2"] > 0.97
    assert (there["n_steps"], there["n_problems"], there["n_values"]) == (300, 100, 5)

    absent = probe.probe(noise, y, group)
    low, high = absent["accuracy_ci95"]
    assert absent["accuracy"] < 0.3
    assert absent["r2"] < 0.05
    assert low < 0.2 < high  # one value in five


def test_r2_is_1_of_the_truth_and_0_of_the_mean():
    y = torch.tensor([1.0, 2, 4, 7], dtype=torch.float64)
    assert probe.r2(y, y) == 1
    assert probe.r2(torch.full_like(y, y.mean()), y) == pytest.approx(0)


def test_a_problem_is_never_in_both_halves():
    """x names its problem and holds nothing else: a fit that had seen it would know the answer."""
    group = torch.arange(600) // 4
    y = (group * 7 % 5).double()
    x = torch.eye(150).double()[group]
    assert probe.probe(x, y, group)["accuracy"] < 0.45


def test_the_probe_of_a_run(folder, capsys):
    run(probe.main, folder, "--problems", 24, "--max-new", 6, "--json")
    report = json.loads(capsys.readouterr().out)
    rows = {row["thoughts"]: row for row in report["using"]}
    assert list(rows)[:5] == [
        "as they are",
        "thoughts of another problem",
        "thoughts all zero",
        "thoughts drawn from the prior",
        "no thoughts",
    ]
    own, other, zero, prior, none = list(rows.values())[:5]
    for row in rows.values():
        low, high = row["accuracy_ci95"]
        assert row["n_problems"] == 24
        assert low <= row["accuracy"] <= high
    for row in (other, zero, prior):
        assert row["latents"] == own["latents"]
    assert own["latents"] > 0 == none["latents"]
    assert own["same_answer"] == 1
    assert max(zero["same_answer"], rows["σ × 8"]["same_answer"]) < 1

    assert [row["words"] for row in report["decoding"]] == ["up to =", "after ="]

    table = probe.table(report)
    assert table.count("\n") >= 16
    assert "words that φ writes" in table
    assert "no thoughts" in table
    assert "the other problem's answer:" in table


def test_what_phi_takes_from_a_thought_is_its_loss_in_two_parts(solved):
    """K = 2 and c = 2: chains of two thoughts, one, one, two and none."""
    model, tokenizer = solved.model, solved.tokenizer
    steps_of = [
        ["<<1+2=3>>", "<<3+4=7>>"],
        ["x=5+2=7"],
        ["a step without a result"],
        ["<<2*2=4>>", "<<4*2=8>>", "<<8*2=16>>"],  # the second thought stands for two steps
        ["<<9-1=8>>"],
    ]
    g = torch.Generator().manual_seed(0)
    D = model.policy.cfg.n_embd
    chains = [
        replace(solved.mean[0], n_latent=n, z=torch.randn(n, D, generator=g))
        for n in (4, 2, 2, 4, 0)
    ]
    problems = [replace(solved.problems[0], steps=steps) for steps in steps_of]

    # The steps that count, their first parts, and their thoughts
    steps = ["<<1+2=3>>", "<<3+4=7>>", "x=5+2=7", "<<2*2=4>>"]
    firsts = ["<<1+2=", "<<3+4=", "x=5+2=", "<<2*2="]
    own = [chains[0].z[:2], chains[0].z[2:], chains[1].z, chains[3].z[:2]]
    mean = [sum(own) / 4] * 4
    other = own[2:] + own[:2]  # of another problem each

    def nll(thoughts, texts, eos=()):
        values = []
        for z, text in zip(thoughts, texts):
            ids = torch.tensor([[*tokenizer.encode(text), *eos]])
            all_of_it = (ids >= 0).nonzero(as_tuple=True)
            with torch.no_grad():
                values.append(float(thought_nll(model.decoder, z[None], ids, all_of_it)))
        return torch.tensor(values, dtype=torch.float64)

    up_to, after = probe.decoding(model, tokenizer, chains, problems)
    for name, thoughts in (("own", own), ("mean", mean), ("other", other)):
        first = nll(thoughts, firsts)
        rest = nll(thoughts, steps, tokenizer.eos[:1]) - first
        assert up_to[name] == pytest.approx(float(first.mean()), rel=1e-5)
        assert after[name] == pytest.approx(float(rest.mean()), rel=1e-4)
    for row in (up_to, after):
        assert row["more"] == pytest.approx(row["other"] - row["own"])
        assert (row["n_steps"], row["n_problems"]) == (4, 3)

    # The standard error of the difference, with the steps of a problem taken together
    apart = nll(other, firsts) - nll(own, firsts)
    apart -= apart.mean()
    of_problem = torch.stack((apart[0] + apart[1], apart[2], apart[3]))
    assert up_to["more_se"] == pytest.approx(float(of_problem.norm()) / 4, rel=1e-4)


def test_without_steps_of_several_problems_nothing_can_be_taken(solved, folder, capsys):
    model, tokenizer = solved.model, solved.tokenizer
    chain, problem = replace(solved.mean[0], n_latent=2, z=torch.ones(2, 64)), solved.problems[0]
    assert probe.decoding(model, tokenizer, [], []) == []
    assert probe.decoding(model, tokenizer, [chain], [problem]) == []
    silent = SimpleNamespace(decode=False)
    assert probe.decoding(silent, tokenizer, solved.mean, solved.problems) == []

    # The table then leaves these lines out
    run(probe.main, folder, "--problems", 24, "--max-new", 6, "--json")
    report = json.loads(capsys.readouterr().out)
    assert "words that φ writes" not in probe.table({**report, "decoding": []})


def test_a_probe_needs_ten_problems(folder, capsys):
    run(probe.main, folder, "--problems", 3, expect=2)
    assert "--problems must be at least 10" in capsys.readouterr().err


# ---- python -m minatp.evaluate -------------------------------------------------------------------


def test_saved_runs_are_measured_side_by_side(folder, solved, tmp_path, capsys):
    # What the run answers is called right in every other problem alone
    records = []
    for i, (problem, chain) in enumerate(zip(solved.problems, solved.mean)):
        answer = chain.answer if chain.answer and i % 2 else "no"
        record = {"question": problem.question, "steps": problem.steps, "answer": answer}
        records.append(record)
    n_right = sum(record["answer"] != "no" for record in records)
    (tmp_path / "p.json").write_text(json.dumps(records))

    options = ["--file", tmp_path / "p.json", "--max-new", 6, "--votes", 3, "--json"]
    run(evaluate.main, folder, folder / "final", *options)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["accuracy"] == second["accuracy"] == n_right / 24
    assert (second["gain"], second["gain_se"]) == (0, 0)
    assert "gain" not in first
    sampled = first["sampled"]
    assert sampled["k"] == 3
    assert sampled["pass"] >= sampled["majority"]


def test_longer_problems_are_measured(folder, capsys):
    run(evaluate.main, folder, "--longer", "--problems", 9, "--max-new", 6)
    assert "of 9 solved" in capsys.readouterr().out
    run(evaluate.main, folder, "--longer", "--file", "x", expect=2)
    assert "not both" in capsys.readouterr().err


def test_a_run_is_measured_by_the_number_of_latent_steps(folder, capsys):
    options = ["--problems", 24, "--max-new", 6]
    run(evaluate.main, folder, *options, "--latent-steps", "2,0,1,1", "--json")
    result = json.loads(capsys.readouterr().out)
    rows = result["latent_steps"]
    assert [row["steps"] for row in rows] == [0, 1, 2]
    assert [row["latents"] for row in rows] == [0, 2, 4]  # c = 2
    assert {row["n_problems"] for row in rows} == {24}

    # What is measured of the free run does not change
    run(evaluate.main, folder, *options, "--json")
    free = json.loads(capsys.readouterr().out)
    assert result == {**free, "latent_steps": rows}


def test_the_table_has_a_line_for_each_number_of_latent_steps(folder, capsys):
    run(evaluate.main, folder, "--problems", 24, "--max-new", 6, "--latent-steps", "0,2")
    result, header, none, two = capsys.readouterr().out.splitlines()
    assert "of 24 solved" in result
    assert "latent steps" in header
    assert none.split()[0] == "0" and " 0.0 + " in none
    assert two.split()[0] == "2" and " 4.0 + " in two
    for line in (none, two):
        assert line.endswith("24  +0.0 ± 0.0")


def test_latent_steps_that_cannot_be_are_one_line(folder, tmp_path, capsys):
    # As --method cot and no-cot save a model
    model, tokenizer = load_model(folder)
    model.stage = 0
    save_model(tmp_path / "cot", model, tokenizer)

    # As pause and icot do
    model.stage = 3
    for name, fillers in (("pause", 2), ("icot", 0)):
        model.fillers = fillers
        save_model(tmp_path / name, model, tokenizer)

    def refusal(run_folder, latent_steps):
        options = ["--problems", 2, "--latent-steps", latent_steps]
        run(evaluate.main, folder, run_folder, *options, expect=2)
        captured = capsys.readouterr()
        assert captured.out == ""  # the other run is not measured first
        assert captured.err.count("\n") == 1
        return captured.err

    assert "has learned at most 2 latent steps; give 0 … 2" in refusal(folder, "1,3")
    for name in ("cot", "pause", "icot"):
        assert "does not think in latents" in refusal(tmp_path / name, "0,1")
    for wrong in ("1;2", "-1", "two", "1,", "²", "9" * 5000):
        assert "must be whole numbers ≥ 0 separated by commas" in refusal(folder, wrong)
