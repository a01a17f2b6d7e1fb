"""RL runs from the command line: options, data without labels, what is logged and what is saved."""

import json

import pytest
import torch
from safetensors.torch import load_file

import train
from minatp import problems
from minatp.run import evaluate

from runs import go
from small import SMALL, SMALL_RL


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory):
    """The folder of a small SFT run, to start from."""
    out = tmp_path_factory.mktemp("runs") / "sft"
    go(*SMALL, "--out", out, "--epochs", 1)
    return out


@pytest.fixture(scope="module")
def rl_run(sft_run):
    """The folder of a small RL run."""
    out = sft_run.with_name("rl")
    losses = ("--anchor", 0.5, "--kl", 0.01)
    go(*SMALL_RL, "--init", sft_run, "--out", out, *losses, "--temperature", 1)
    return out


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def records_of(folder):
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tensors_of(folder, name):
    """A file of tensors of the final model."""
    return load_file(folder / "final" / f"{name}.safetensors")


def are_equal(a, b):
    """Whether two dicts of the same keys hold the same tensors."""
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def judge_alike(run, texts, problems, step):
    """In place of train.judge: all rewards are 1, and there is nothing to learn."""
    return torch.ones(len(problems), run.cfg.G), {}


def judge_apart(run, texts, problems, step):
    """In place of train.judge: one chain of each group is rewarded, whatever it says."""
    return torch.eye(run.cfg.G)[: len(problems)], {"acc": torch.tensor(0.25)}


# ---- what a run leaves ---------------------------------------------------------------------------


def test_the_summary_of_an_rl_run(rl_run):
    summary = summary_of(rl_run)
    assert summary["stage"] == "rl"
    assert summary.keys() >= {
        *("start_accuracy", "start_coherence"),
        *("gain", "gain_se", "accuracy_ci95"),
    }


def test_config_json_has_the_sizes_of_the_model(rl_run):
    """RL was not given them: they are those of --init, not the defaults."""
    config = json.loads((rl_run / "config.json").read_text())
    assert (config["c"], config["K"], config["n_embd"], config["n_inner"]) == (2, 2, 32, 48)


def test_the_log_of_an_rl_run(rl_run):
    records = records_of(rl_run)
    assert set().union(*records) >= {
        *("reward", "acc", "coh", "fmt", "signal"),
        *("clamped", "kl", "grad_norm"),
        *("sigma", "latents"),
    }
    validations = [r["validation"] for r in records if "validation" in r]
    assert len(validations) == 2
    assert validations[0].keys() >= {"thought_share", "reading", "drift", "accuracy"}


def test_the_policy_moves_and_the_decoder_is_frozen(sft_run, rl_run):
    decoder = "minatp/decoder"
    assert are_equal(tensors_of(sft_run, decoder), tensors_of(rl_run, decoder))
    assert not are_equal(tensors_of(sft_run, "model"), tensors_of(rl_run, "model"))


@pytest.mark.parametrize(
    "options",
    [
        ("--estimator", "path"),
        ("--updates-per-batch", 3),
        ("--baseline", "rloo", "--normalise"),
        ("--no-answers",),
        ("--placebo",),
        ("--coherence", "strict", "--greedy", "--spread", 3),
    ],
)
def test_the_variants_run(options, sft_run, tmp_path):
    go(*SMALL_RL, "--updates", 3, "--init", sft_run, "--out", tmp_path, *options)
    assert summary_of(tmp_path)["n_problems"] == 24


# ---- what is logged ------------------------------------------------------------------------------


def log_lines(text):
    return [line for line in text.splitlines() if line.startswith("rl  step ")]


def test_the_diagnosis_takes_as_many_rows_as_eval_batch_allows(sft_run, tmp_path, monkeypatch):
    """In any batches it is the same."""
    sizes, validations = [], []

    def counted(function):
        def count(*args, **kwargs):
            result = function(*args, **kwargs)
            sizes.append(len(result.z))
            return result

        return count

    monkeypatch.setattr(evaluate, "rollout", counted(evaluate.rollout))
    for eval_batch in (500, 30):
        sizes.clear()
        out = tmp_path / str(eval_batch)
        few = ["--updates", 1, "--val-every", 1, "--eval-batch", eval_batch]
        go(*SMALL_RL, *few, "--init", sft_run, "--out", out)
        assert max(sizes) == {500: 192, 30: 24}[eval_batch]
        validations.append([r["validation"] for r in records_of(out) if "validation" in r])

    for one, other in zip(*validations, strict=True):
        for name in ("thought_share", "reward_variance", "reading", "drift"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


def test_every_line_has_every_diagnostic(sft_run, tmp_path, capsys, monkeypatch):
    """The last one too, if --log-every does not divide --updates, and the KL that no option asks
    for.
    """
    monkeypatch.setattr(train, "judge", judge_apart)
    go(*SMALL_RL, "--updates", 3, "--init", sft_run, "--out", tmp_path)
    lines = log_lines(capsys.readouterr().out)
    assert len(lines) == 2
    diagnostics = ("reward", "acc", "signal", "latents", "sigma", "clamped", "kl", "grad_norm")
    for line in lines:
        for name in diagnostics:
            assert f"  {name} " in line


def test_without_a_signal_nothing_changes_and_a_warning_says_so(
    sft_run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train, "judge", judge_alike)
    go(*SMALL_RL, "--updates", 51, "--init", sft_run, "--out", tmp_path)
    assert are_equal(tensors_of(sft_run, "model"), tensors_of(tmp_path, "model"))

    # the warning says to look at sigma, which every line has
    output = capsys.readouterr().out
    assert output.count("warning: for 50 batches") == 1
    assert len(log_lines(output)) == 26
    assert output.count("sigma 0.") == 26


def test_the_anchor_is_of_the_stage_that_was_taught(tmp_path, monkeypatch):
    """SFT has gone through stages 0 and 1 of four."""
    go(*SMALL, "--out", tmp_path / "sft", "--epochs", ".1,.1,0,0")
    stages = []
    sft_gradients = train.sft_gradients

    def watch(run, problems, stage, step, weight):
        stages.append(stage)
        return sft_gradients(run, problems, stage, step, weight)

    monkeypatch.setattr(train, "sft_gradients", watch)
    monkeypatch.setattr(train, "judge", judge_apart)
    folders = ("--init", tmp_path / "sft", "--out", tmp_path / "rl")
    go(*SMALL_RL, "--updates", 1, "--anchor", 1, *folders)
    assert stages == [1]


# ---- data without labels -------------------------------------------------------------------------


def records_without(problems, *names):
    """Problems as records of a JSON file, without some fields ("steps": with an empty list)."""
    records = []
    for p in problems:
        record = {"question": p.question, "steps": p.steps, "answer": p.answer}
        for name in names:
            del record[name]
        records.append({"steps": [], **record})
    return records


@pytest.fixture
def run_rl_on(sft_run, tmp_path):
    """run_rl_on(records, *options, out=…, **): an RL run on 30 records, measured on 6 problems."""
    measured = records_without(problems.generate("test", 6, 9))
    (tmp_path / "measured.json").write_text(json.dumps(measured))

    def run(records, *options, with_val=True, out="out", expect=0):
        (tmp_path / "training.json").write_text(json.dumps(records))
        val = ("--val", tmp_path / "measured.json") if with_val else ()
        go(
            *("--stage", "rl", "--init", sft_run, "--out", tmp_path / out, "--device", "cpu"),
            *("--data", tmp_path / "training.json", "--test", tmp_path / "measured.json", *val),
            *("--batch-size", 4, "--G", 2, "--updates", 2, "--log-every", 2),
            *options,
            expect=expect,
        )
        return tmp_path / out

    return run


@pytest.fixture
def unlabelled():
    return problems.generate("labelled", 30, 9)


def check_summary(folder):
    summary = summary_of(folder)
    assert summary["n_problems"] == 6
    assert summary["training_problems"] == 30


@pytest.mark.parametrize(
    "dropped, n_labelled, options",
    [
        (["answer"], 6, ["--no-answers"]),  # the labelled ones are the anchor's
        (["answer", "steps"], 0, ["--no-answers", "--anchor", 0]),
    ],
)
def test_coherence_only_needs_no_answer(
    dropped, n_labelled, options, unlabelled, run_rl_on, capsys
):
    """What is measured brings its own answers."""
    labelled = records_without(unlabelled[:n_labelled])
    records = labelled + records_without(unlabelled[n_labelled:], *dropped)
    check_summary(run_rl_on(records, *options))
    assert f"{30 - n_labelled} without answers or steps" in capsys.readouterr().out

    run_rl_on(records, *options, with_val=False, out="refused", expect=2)
    assert "with an answer, too few to hold out" in capsys.readouterr().err


def test_without_the_anchor_no_steps_are_needed(unlabelled, run_rl_on, capsys):
    records = records_without(unlabelled, "steps")
    check_summary(run_rl_on(records, "--anchor", 0))

    run_rl_on(records, out="refused", expect=2)
    assert "--anchor 0" in capsys.readouterr().err
