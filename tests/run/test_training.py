"""SFT runs from the command line: methods, data, --init, and the files that they leave."""

import json
from dataclasses import fields

import pytest
import torch

import train
from minatp import decoder, problems
from minatp.latent import ATP
from minatp.run import evaluate, options
from minatp.run.huggingface import load_model
from minatp.run.loop import rate_at
from minatp.run.splits import encode_problems

from runs import go
from small import SMALL

HEADS = ("decoder", "latent_head", "stop_head")


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory):
    """The folder of a small run."""
    out = tmp_path_factory.mktemp("runs") / "sft"
    go(*SMALL, "--out", out, "--votes", 2)
    return out


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def records_of(folder):
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- what a run leaves ---------------------------------------------------------------------------


def test_the_summary_of_a_run(sft_run):
    summary = summary_of(sft_run)
    assert summary.keys() >= {
        *("stage", "method", "seed", "device", "seconds"),
        *("n_problems", "accuracy", "accuracy_ci95", "coherence"),
        *("latents", "answer_tokens", "tokens"),
    }
    assert summary["stage"] == "sft"
    assert summary["method"] == "atp"
    assert summary["n_problems"] == 24
    assert summary["sampled"]["k"] == 2


def test_the_log_of_a_run(sft_run):
    records = records_of(sft_run)
    assert [r["stage"] for r in records if "validation" in r] == [0, 1, 2, 3]
    last_line = records[-2]
    assert last_line.keys() >= {
        *("enc", "dec", "kl", "stop", "loss"),
        *("lr", "grad_norm", "tokens_per_second"),
    }

    # stages follow one another, and all steps are made
    stages = [r["stage"] for r in records]
    assert stages == sorted(stages)
    assert max(r["step"] for r in records) == 16


def test_the_last_stage_can_have_a_learning_rate_of_its_own(tmp_path):
    rates = ("--lr", 0.02, "--last-lr", 0.001, "--warmup", 0, "--log-every", 1)
    go(*SMALL, *rates, "--out", tmp_path)
    records = [r for r in records_of(tmp_path) if "lr" in r]
    peaks = [max(r["lr"] for r in records if r["stage"] == stage) for stage in range(4)]
    assert peaks == [0.02, 0.02, 0.02, 0.001]


def test_how_the_learning_rate_falls():
    """Of a stage of 21 steps, one is warm-up. The last rate is that of the step after the stage."""
    rates = [rate_at(i, 21, 1, "wsd") for i in range(22)]
    assert rates[:12] == [0.5] + [1.0] * 11
    assert rates[12:] == pytest.approx([1 - 0.95 * k / 10 for k in range(1, 11)])

    rates = [rate_at(i, 21, 1, "cosine") for i in range(22)]
    assert rates[:2] == [0.5, 1.0]
    assert [rates[6], rates[11], rates[21]] == pytest.approx(
        [0.1 + 0.45 * (1 + 0.5**0.5), 0.55, 0.1]
    )
    assert all(a > b for a, b in zip(rates[1:], rates[2:]))


def test_the_files_of_a_run(sft_run):
    assert config_of(sft_run).keys() == {f.name for f in fields(options.Config)}
    names = {str(file.relative_to(sft_run)) for file in sft_run.rglob("*") if file.is_file()}
    assert names >= {
        "final/config.json",
        "final/model.safetensors",
        "final/tokenizer.json",
        "final/minatp/heads.safetensors",
    }
    for name in names:  # nothing that only Python can read
        assert name.endswith((".json", ".jsonl", ".safetensors"))


# ---- methods -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, latents, has_decoder",
    [
        *[("no-cot", 0, False), ("cot", 0, False), ("icot", 0, False), ("pause", 0, False)],
        *[("coconut", 4, False), ("sim-cot", 4, True), ("codi", 4, False)],
        ("codi-sim-cot", 4, True),
    ],
)
def test_the_baselines_run_by_the_same_code(method, latents, has_decoder, tmp_path):
    go(*SMALL, "--out", tmp_path, "--method", method, "--epochs", "0.1")
    summary = summary_of(tmp_path)
    assert summary["method"] == method
    assert summary["latents"] == latents
    model, _ = load_model(tmp_path)
    assert [hasattr(model, head) for head in HEADS] == [has_decoder, False, False]

    # the teacher's losses are logged where there is one
    distills = method in ("codi", "codi-sim-cot")
    last_line = records_of(tmp_path)[-2]
    assert ("teacher" in last_line) == ("distill" in last_line) == distills
    assert hasattr(model, "projection") == distills
    assert config_of(tmp_path)["distill"] == (5.0 if distills else 0.0)


@pytest.mark.parametrize("ablation", ["--no-vae", "--no-stop", "--no-decoder"])
def test_the_ablations_run(ablation, tmp_path):
    go(*SMALL, "--out", tmp_path, ablation, "--epochs", "0.05")
    name = ablation.removeprefix("--").replace("-", "_")
    assert config_of(tmp_path)[name] is True


def test_sft_learns_from_answers_alone(tmp_path):
    go(*SMALL, "--out", tmp_path, "--answers", 40, "--answers-share", 0.5)
    assert summary_of(tmp_path)["method"] == "atp"


@pytest.mark.parametrize("method", ["icot", "pause", "codi", "atp"])
def test_a_teacher_has_nothing_to_say_of_answers_alone(method, tmp_path):
    """One problem a micro-batch: some have no steps, in the last stage."""
    more = ["--answers-share", 0.75, "--micro-batch", 1, "--epochs", "0.1"]
    if method == "atp":
        more += ["--distill", 2]
    go(*SMALL, "--answers", 40, "--method", method, *more, "--out", tmp_path)
    records = [r for r in records_of(tmp_path) if r.get("stage") == 3 and "loss" in r]
    assert records
    for record in records:
        assert ("distill" in record) == (method in ("codi", "atp"))


def test_a_decoder_starts_as_what_the_policy_is_after_stage_0(tmp_path):
    """From scratch, and beside --init if that has no φ. One that has started goes on."""

    def is_copy(run, *more):
        go(*SMALL, *more, "--epochs", "1,0,0,0", "--out", tmp_path / run)
        model, _ = load_model(tmp_path / run)
        assert model.decoder_started
        policy = model.policy.state_dict()
        return all(torch.equal(p, policy[name]) for name, p in model.decoder.state_dict().items())

    assert is_copy("scratch")
    go(*SMALL, "--method", "cot", "--epochs", "1", "--out", tmp_path / "cot")
    assert is_copy("after-cot", "--init", tmp_path / "cot")
    assert not is_copy("again", "--init", tmp_path / "scratch")


def test_with_previews_a_decoder_starts_halfway_through_stage_0(tmp_path, monkeypatch):
    calls, gradients, start = [], train.sft_gradients, ATP.start_decoder
    monkeypatch.setattr(train, "sft_gradients", lambda *a: calls.append("step") or gradients(*a))
    monkeypatch.setattr(ATP, "start_decoder", lambda model: calls.append("φ") or start(model))
    go(*SMALL, "--decoder-start", "previews", "--epochs", "1,1,0,0", "--out", tmp_path)
    assert calls == 10 * ["step"] + ["φ"] + 30 * ["step"]
    of_stage_0 = [r for r in records_of(tmp_path) if "loss" in r and r["stage"] == 0]
    assert of_stage_0 and all(r["dec"] > 0 and "kl" not in r for r in of_stage_0)


def test_a_thought_is_read_to_the_end_of_the_longest_that_was_taught(tmp_path, monkeypatch):
    """The K-th thought stands for all steps that are left."""
    go(*SMALL, "--K", 1, "--epochs", "0,0,1", "--out", tmp_path)
    model, tokenizer = load_model(tmp_path)
    cfg = options.of_run(tmp_path / "config.json")
    rows = encode_problems(cfg, problems.generate("labelled", 60, 0), tokenizer, model)
    assert model.longest == max(len(row.rest_text) for row in rows)
    assert model.longest > 24

    lengths = []

    def read_thoughts(decoder, z, eos, max_new):
        lengths.append(max_new)
        return [[eos]] * len(z)

    monkeypatch.setattr(decoder, "read_thoughts", read_thoughts)
    evaluate.solve(model, tokenizer, [tokenizer.prompt("Ann has 5 pens.")], 4)
    assert lengths == [model.longest]


# ---- data of one's own ---------------------------------------------------------------------------


def write_icot(path, problems):
    lines = [f"{p.question}||{' '.join(p.steps)} #### {p.answer}\n" for p in problems]
    path.write_text("".join(lines))


def test_an_earlier_run_is_fine_tuned_on_a_file(sft_run, tmp_path, capsys):
    """Held-out questions are not trained on, even if the file repeats them."""
    generated = problems.generate("labelled", 60, 9)
    write_icot(tmp_path / "p.txt", generated + generated[:5])
    test_lines = [json.dumps(vars(p)) + "\n" for p in generated[:7]]
    (tmp_path / "t.jsonl").write_text("".join(test_lines))
    go(
        *("--data", tmp_path / "p.txt", "--test", tmp_path / "t.jsonl", "--val-size", 6),
        *("--K", 2, "--c", 2, "--batch-size", 8, "--epochs", 0.2),
        *("--init", sft_run, "--out", tmp_path / "out"),
    )
    summary = summary_of(tmp_path / "out")
    assert list(summary["tests"]) == ["t.jsonl"]
    assert summary["n_problems"] == 7
    assert summary["training_problems"] <= 60 - 7
    assert "left out of training:" in capsys.readouterr().out


def test_a_problem_longer_than_the_context_is_one_line_and_exit_code_2(tmp_path, capsys):
    long = problems.Problem("Ann has 5 pens. " * 20 + "How many?", ["<<5+1=6>>"], "6")
    write_icot(tmp_path / "p.txt", [*problems.generate("labelled", 60, 9), long])
    go(
        *SMALL,
        *("--data", tmp_path / "p.txt", "--block-size", 64),
        *("--out", tmp_path / "out"),
        expect=2,
    )
    error = capsys.readouterr().err
    assert error.startswith(f"{tmp_path / 'p.txt'}:61: the problem is ")
    assert "tokens long but the model's context is 64; shorten it" in error
    assert error.count("\n") == 1
