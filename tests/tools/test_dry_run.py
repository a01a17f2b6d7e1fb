"""--dry-run: what it prints, and that it writes nothing."""

import json

import pytest
import torch

import train
from minatp import data, problems
from minatp.run import distributed, options
from minatp.run.loop import Run
from minatp.tools import dry_run

from runs import go
from small import SMALL, SMALL_RL, small_model


@pytest.fixture
def never(tmp_path):
    """A folder for --out that no dry run may make."""
    yield tmp_path / "never"
    assert not (tmp_path / "never").exists()


# ---- SFT -----------------------------------------------------------------------------------------


def test_a_dry_run_reports_the_data_the_model_and_two_steps(tmp_path, never, capsys):
    lines = []
    for p in problems.generate("labelled", 60, 9):
        lines.append(f"{p.question}||{' '.join(p.steps)} #### {p.answer}\n")
    (tmp_path / "p.txt").write_text("".join(lines))
    go(
        *("--data", tmp_path / "p.txt", "--val-size", 6, "--K", 2, "--c", 2),
        *("--batch-size", 8, "--epochs", 0.2, "--dry-run", "--out", never),
    )
    output = capsys.readouterr().out
    for part in ("tokens      ", "question    ", "parameters  ", "memory      "):
        assert part in output
    assert "forward pass of 8 longest" in output

    # a problem at each stage, and a step of the first and of the last
    for stage in range(4):
        assert f"stage {stage} (" in output
    assert output.count("one step") == 2
    assert "one step    stage 0" in output
    assert "one step    stage 3" in output


def test_memory_is_that_of_one_process(monkeypatch):
    cfg = options.parse(["--batch-size", "8"], "")
    assert dry_run.n_at_once(cfg) == 8
    monkeypatch.setattr(distributed, "WORLD_SIZE", 2)
    assert dry_run.n_at_once(cfg) == 4
    for micro_batch, expected in ((3, 3), (6, 4)):
        cfg.micro_batch = micro_batch
        assert dry_run.n_at_once(cfg) == expected


def test_a_dry_run_changes_no_weight(never, monkeypatch):
    models = []
    build = dry_run.build

    def build_and_keep(cfg, problems):
        model, tokenizer = build(cfg, problems)
        before = {name: p.clone() for name, p in model.state_dict().items()}
        models.append((model, before))
        return model, tokenizer

    monkeypatch.setattr(dry_run, "build", build_and_keep)
    go(*SMALL, "--dry-run", "--out", never)
    [(model, before)] = models
    assert any(p.grad is not None for p in model.parameters())
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name]), name


def test_a_dry_run_of_previews_tries_the_half_in_which_the_decoder_learns(never, monkeypatch):
    built = []
    build = dry_run.build

    def build_and_keep(*args):
        built[:] = build(*args)
        return built

    monkeypatch.setattr(dry_run, "build", build_and_keep)
    go(*SMALL, "--decoder-start", "previews", "--epochs", "1,0,0,0", "--dry-run", "--out", never)
    model, _ = built
    assert model.previews
    assert all(p.grad is not None for p in model.decoder.model.layers.parameters())


@pytest.mark.parametrize("method", options.METHODS)
def test_a_dry_run_of_each_method(method, never, capsys):
    """Steps of the first and of the last stage, which are one where there is no curriculum."""
    go(*SMALL, "--method", method, "--dry-run", "--out", never)
    output = capsys.readouterr().out
    has_curriculum = options.METHODS[method].stages == "curriculum"
    assert output.count("one step") == 1 + has_curriculum
    assert ("  teacher " in output) == ("  distill " in output)
    assert ("  teacher " in output) == (method in ("codi", "codi-sim-cot", "atp"))


# ---- RL ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory):
    """The folder of a small SFT run, to start from."""
    out = tmp_path_factory.mktemp("runs") / "sft"
    go(*SMALL, "--out", out)
    return out


@pytest.fixture
def all_alike(monkeypatch):
    """All rewards are 1: there is no signal, and the dry run must do without."""

    def judge(run, texts, problems, step):
        return torch.ones(len(problems), run.cfg.G), {"acc": torch.tensor(1.0)}

    monkeypatch.setattr(train, "judge", judge)


def test_a_dry_run_of_rl_explores(sft_run, never, all_alike, capsys, monkeypatch):
    """One batch of rollouts and its gradients, as if all groups had a signal, beside one of the
    anchor.
    """
    n_chains = []  # whose policy gradient was computed
    surrogate = train.surrogate

    def watch(logp, old, advantage):
        n_chains.append(len(logp))
        return surrogate(logp, old, advantage)

    monkeypatch.setattr(train, "surrogate", watch)
    go(*SMALL_RL, "--anchor", 1, "--init", sft_run, "--out", never, "--dry-run")
    assert n_chains == [16]
    output = capsys.readouterr().out
    [shown] = [line for line in output.splitlines() if line.startswith("  stage ")]
    assert "epochs" not in shown
    assert "those of the start" in output
    assert "4 longest questions × 4 rollouts" in output
    assert output.count("one step") == 2


def test_a_dry_run_of_rl_without_the_anchor_makes_one_step(sft_run, never, all_alike, capsys):
    go(*SMALL_RL, "--anchor", 0, "--init", sft_run, "--out", never, "--dry-run")
    assert capsys.readouterr().out.count("one step") == 1


def test_a_dry_run_of_fewer_problems_than_a_batch_repeats_them(sft_run, never, tmp_path, capsys):
    """As training does."""
    lines = [f"{p.question}||<<1+1=2>> #### 2\n" for p in problems.generate("labelled", 11, 9)]
    (tmp_path / "few.txt").write_text("".join(lines))
    data = ("--data", tmp_path / "few.txt", "--val-size", 4)
    go(*SMALL_RL, "--batch-size", 8, *data, "--init", sft_run, "--out", never, "--dry-run")
    assert "8 longest questions × 4 rollouts" in capsys.readouterr().out


def test_a_dry_run_refuses_a_held_out_question_that_is_too_long(never, tmp_path, capsys):
    (tmp_path / "test.txt").write_text(f"{'word ' * 200}||<<1+1=2>> #### 2\n")
    argv = (*SMALL, "--data", tmp_path / "p.txt", "--val-size", 4, "--test", tmp_path / "test.txt")
    lines = [f"{p.question}||<<1+1=2>> #### 2\n" for p in problems.generate("labelled", 20, 9)]
    (tmp_path / "p.txt").write_text("".join(lines))
    go(*argv, "--block-size", 128, "--out", never, "--dry-run", expect=2)
    assert "test.txt:1: " in capsys.readouterr().err


# ---- too large -----------------------------------------------------------------------------------


def test_the_start_of_rl_is_loaded_only_if_it_fits(sft_run, never, capsys, monkeypatch):
    """A second copy of a model that just fits would end in an error instead of this report."""

    def too_little(device):
        return 2**16

    def refuse(folder):
        raise AssertionError(f"{folder} was loaded")

    monkeypatch.setattr(dry_run, "memory_of", too_little)
    monkeypatch.setattr(dry_run, "load_model", refuse)
    go(*SMALL_RL, "--init", sft_run, "--out", never, "--dry-run")
    assert "one step    not run: it does not fit here" in capsys.readouterr().out


def test_memory_is_that_of_a_whole_batch(never, capsys):
    """A training batch is filled up by repeating problems, however few there are."""
    go(*SMALL, "--labelled", 5, "--dry-run", "--out", never)
    assert "forward pass of 8 longest" in capsys.readouterr().out


def test_a_model_too_large_to_build_is_counted(tmp_path, never, capsys, monkeypatch):
    huge = "9" * 400  # which no float holds, and is not the answer
    records = []
    for i in range(9):
        records.append({"question": f"q{i}", "steps": [f"<<1={huge}>>"], "answer": str(i)})
    (tmp_path / "p.json").write_text(json.dumps(records))

    def one_gibibyte(device):
        return 2**30

    monkeypatch.setattr(dry_run, "memory_of", one_gibibyte)
    go(
        *("--preset", "llama-1b", "--data", tmp_path / "p.json", "--val-size", 2),
        *("--dry-run", "--out", never),
    )
    output = capsys.readouterr().out
    assert "policy 1,235,814,400" in output
    assert "one step    not run: it does not fit here" in output
    assert "do not end on a step" in output


def test_the_preset_of_smollm2_has_its_shape(never, capsys, monkeypatch):
    """The published file has as many parameters; φ has all thirty layers."""

    def one_mebibyte(device):
        return 2**20

    monkeypatch.setattr(dry_run, "memory_of", one_mebibyte)
    argv = ("--labelled", 20, "--answers", 20, "--val-size", 5, "--test-size", 5)
    go("--preset", "smollm2-135m", *argv, "--dry-run", "--out", never)
    assert "policy 134,515,008, decoder 134,515,008" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_teacher_counts_in_the_memory(device):
    """A saved model can be too large for the GPU: then its activations are computed."""
    model, tokenizer = small_model()
    [row] = data.encode(problems.generate("labelled", 1, 0), tokenizer, model)
    kept = []
    for distill in ("0", "1"):
        cfg = options.parse([*SMALL, "--distill", distill], "")
        run = Run(cfg, None, torch.device("cpu"), model, tokenizer)
        run.device = torch.device(device)
        kept.append(dry_run.activation_bytes(run, row, [model.K + 1]))
    without, with_teacher = kept
    assert 0 < 1.2 * without < with_teacher < 4 * without


@pytest.mark.parametrize("method", ["pause", "codi"])
def test_a_model_of_any_method_can_be_too_large_to_build(method, never, capsys, monkeypatch):
    def too_little(device):
        return 2**16

    monkeypatch.setattr(dry_run, "memory_of", too_little)
    go(*SMALL, "--method", method, "--dry-run", "--out", never)
    assert "one step    not run: it does not fit here" in capsys.readouterr().out


def test_a_system_that_does_not_tell_its_memory(monkeypatch, never, capsys):
    """As Windows, which has no os.sysconf."""
    monkeypatch.delattr(dry_run.os, "sysconf")
    go(*SMALL, "--dry-run", "--out", never)
    output = capsys.readouterr().out
    assert "cpu has an unknown amount" in output
    assert "one step    stage" in output


def test_on_a_gpu_the_copies_that_kernels_read_count_as_memory():
    pytest.importorskip("triton", reason="triton is not installed")
    model, _ = small_model()
    n_linear = sum(
        p.numel()
        for name, p in model.named_parameters()
        if name.endswith("weight") and "norm" not in name and "embed" not in name and p.dim() == 2
    )
    n_head = model.policy.head.numel() + model.decoder.head.numel()
    for stage, n_model in (("sft", 1), ("rl", 2)):
        for dtype, n_byte in (("", 2 * (n_linear + n_head)), ("float32", 4 * n_linear)):
            cfg = options.Config(stage=stage, dtype=dtype)
            on_cpu, on_gpu = (
                dry_run.held_bytes(cfg, model, torch.device(name)) for name in ("cpu", "cuda")
            )
            assert on_gpu - on_cpu == n_model * n_byte
