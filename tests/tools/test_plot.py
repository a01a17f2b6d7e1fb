"""Learning curves and sinks: every record of a run gets there, and a broken one is named."""

import json
import sys
from types import ModuleType

import pytest

import train
from minatp.run import options
from minatp.run.folder import Log
from minatp.tools import plot

from commands import run
from small import SMALL

# ---- curves --------------------------------------------------------------------------------------


def test_curves_have_every_quantity_of_sft(folder):
    curves = plot.read(folder / "metrics.jsonl")[folder]
    assert {"enc", "dec", "stop", "kl.sft", "accuracy.stage", "latents"} <= curves.keys()
    assert [stage for stage, *_ in curves["accuracy.stage"]] == [0, 1, 2, 3]


def test_curves_have_the_losses_of_distillation():
    curves = plot.curves([{"step": 5, "stage": 1, "teacher": 0.4, "distill": 0.3}])
    assert curves == {"teacher": [(5, 0.4, None, None)], "distill": [(5, 0.3, None, None)]}


def test_curves_have_every_quantity_of_rl():
    record = {"step": 5, "reward": 0.4, "acc": 0.3, "coh": 0.1, "fmt": 0.9, "kl": 0.01}
    curves = plot.curves([{**record, "latents": 3.0}])
    assert curves.keys() == {"reward", "acc", "coh", "fmt", "kl.rl"}  # latents: validation's alone
    assert curves["acc"] == [(5, 0.3, None, None)]


def save_latent_steps(path, run_folder, accuracies):
    """A line as minatp.evaluate --latent-steps --json prints it."""
    rows = [
        {"steps": n, "accuracy": accuracy, "accuracy_ci95": [accuracy - 0.1, accuracy + 0.1]}
        for n, accuracy in enumerate(accuracies)
    ]
    record = {"run": str(run_folder), "accuracy": 0.5, "latent_steps": rows}
    path.write_text(json.dumps(record) + "\n")


def test_accuracy_by_latent_steps_is_a_curve_of_the_run(folder, tmp_path):
    save_latent_steps(tmp_path / "steps.jsonl", folder / "final", [0.25, 0.75])
    curves = plot.read(tmp_path / "steps.jsonl")
    points = [pytest.approx((0, 0.25, 0.15, 0.35)), pytest.approx((1, 0.75, 0.65, 0.85))]
    free = [(0, 0.5, None, None)]
    assert curves == {folder: {"free": free, "accuracy.latent_steps": points}}


def test_each_test_file_has_a_curve_of_its_own(folder, tmp_path):
    lines = []
    for file in ("a/test.jsonl", "b/test.jsonl"):
        save_latent_steps(tmp_path / "one", folder, [0.25, 0.75])
        record = json.loads((tmp_path / "one").read_text())
        lines.append(json.dumps({**record, "file": file}) + "\n")
    (tmp_path / "steps.jsonl").write_text("".join(lines))
    curves = plot.read(tmp_path / "steps.jsonl")
    assert [f.name for f in curves] == [
        f"{folder.name} on a:test.jsonl",
        f"{folder.name} on b:test.jsonl",
    ]
    assert all(len(panels["accuracy.latent_steps"]) == 2 for panels in curves.values())


def test_learning_curves_and_latent_steps_share_a_picture(folder, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    save_latent_steps(tmp_path / "steps.jsonl", folder, [0.25, 0.75])
    drawn, figure = [], plot.figure

    def keep(runs):
        drawn.append(runs)
        return figure(runs)

    monkeypatch.setattr(plot, "figure", keep)
    run(plot.main, folder, tmp_path / "steps.jsonl", "-o", tmp_path / "c.svg")
    [[curves]] = [runs.values() for runs in drawn]
    assert {"enc", "accuracy.stage", "accuracy.latent_steps"} <= curves.keys()
    picture = (tmp_path / "c.svg").read_text()
    assert "accuracy by latent steps" in picture
    assert "stroke-dasharray" in picture  # the accuracy of the free run


def test_the_picture_has_a_panel_for_each_quantity(folder, tmp_path):
    pytest.importorskip("matplotlib")
    run(plot.main, folder / "metrics.jsonl", folder, "-o", tmp_path / "c.svg")
    picture = (tmp_path / "c.svg").read_text()
    n_panel = len(plot.read(folder / "metrics.jsonl")[folder])
    n_row = -(-n_panel // 4)
    assert picture.count('<g id="axes_') == 4 * n_row
    assert 'id="legend_1"' in picture


def test_the_same_curves_make_the_same_svg(folder, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        run(plot.main, folder, "-o", tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_picture_without_a_suffix_is_a_png(folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(folder)
    run(plot.main, "metrics.jsonl", "-o", tmp_path / "c")
    assert (tmp_path / "c.png").exists()
    assert capsys.readouterr().out.endswith("c.png\n")
    run(plot.main, folder, "-o", tmp_path / "c.xyz", expect=2)
    assert "c.xyz:0: cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        ("", ":1: is empty"),
        ('{"step": 1}\n{"st\n', ":2: is not valid JSON"),
        ('{"step": 1}\n{"st', ":1: has no losses"),
        ('{"step": 1, "validation": {}}\n', ":0: has a record that no run"),
        ('{"step": 1, "stage": 0, "validation": null}\n', ":0: has a record that no run"),
        ("[1]\n", ':1: has no "step"'),
        ('{"run": "r", "accuracy": 0.5}\n', ':1: has no "step" and no "latent_steps"'),
        ('{"run": "r", "latent_steps": 3}\n', ":0: has a record that no run"),
        ('{"run": 3, "latent_steps": []}\n', ":0: has a record that no run"),
        ("[" * 100_000, ":1: is not valid JSON"),
        ("7" * 5000, ":1: is not valid JSON"),
        (None, ":0: cannot be read"),
    ],
)
def test_broken_metrics_are_named(text, message, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text)
    run(plot.main, path, "-o", tmp_path / "c.png", expect=2)
    err = capsys.readouterr().err
    assert "metrics.jsonl" + message in err
    assert err.count("\n") == 1


# ---- sinks, and packages that are missing --------------------------------------------------------


def uninstall(monkeypatch, package):
    """Make `import package` fail."""
    for name in list(sys.modules):
        if name.split(".")[0] == package or name == "torch.utils.tensorboard":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_sink_without_its_package_is_one_line(package, tmp_path, monkeypatch, capsys):
    uninstall(monkeypatch, package)
    sink = ["--answers", 4, "--out", tmp_path / "out", "--sink", package]
    run(train.main, *SMALL, *sink, expect=2)
    err = capsys.readouterr().err
    assert f"--sink {package} needs the package {package}" in err
    assert err.count("\n") == 1


def test_plot_without_matplotlib_is_one_line(folder, monkeypatch, capsys):
    uninstall(monkeypatch, "matplotlib")
    run(plot.main, folder, expect=2)
    reason = "minatp.plot needs matplotlib, which is not installed; pip install matplotlib"
    assert capsys.readouterr().err == f"command line: {reason}\n"


def test_an_unknown_sink_is_named(capsys):
    run(train.main, "--sink", "paper", expect=2)
    assert "--sink must be tensorboard or wandb, not 'paper'" in capsys.readouterr().err


def test_sinks_get_the_records_of_the_file(tmp_path, monkeypatch):
    wandb = stand_in_for_wandb(monkeypatch)
    out = tmp_path / "out"
    out.mkdir()
    cfg = options.parse(["--out", str(out), "--sink", "wandb"], "")
    validation = {"accuracy": 0.25, "accuracy_ci95": [0.1, 0.4], "coherence": None}
    file = Log(cfg, {"step": 0, "seconds": 0.0})
    file.write({"step": 3, "loss": 0.5, "validation": validation})

    assert wandb.settings["project"] == "minatp"
    assert wandb.settings["config"]["sink"] == "wandb"
    values = {
        "step": 3,
        "loss": 0.5,
        "validation/accuracy": 0.25,
        "validation/accuracy_ci95/0": 0.1,
        "validation/accuracy_ci95/1": 0.4,
    }
    assert wandb.logged == [values]


def test_wandb_keeps_a_validation_of_the_step_at_which_a_run_was_stopped(tmp_path, monkeypatch):
    wandb = stand_in_for_wandb(monkeypatch)
    cfg = options.parse(["--out", str(tmp_path), "--sink", "wandb"], "")
    log = Log(cfg, {"step": 0, "seconds": 0.0})
    log.write({"step": 10, "loss": 0.5})
    resumed = Log(cfg, {"step": 10, "seconds": 1.0})
    resumed.write({"step": 10, "validation": {"accuracy": 0.25}})

    assert wandb.logged == [{"step": 10, "loss": 0.5}, {"step": 10, "validation/accuracy": 0.25}]
    assert wandb.axis_of == {"step": None, "*": "step"}


def stand_in_for_wandb(monkeypatch):
    """A module of wandb's name. As the real one, it drops what is logged at a step gone by."""
    wandb = ModuleType("wandb")
    wandb.logged, wandb.axis_of, wandb.settings = [], {}, None
    last_step = -1

    def init(**settings):
        nonlocal last_step
        wandb.settings = settings
        last_step += 1  # a resumed run goes on after what it has logged

    def define_metric(name, step_metric=None):
        wandb.axis_of[name] = step_metric

    def log(values, step=None):
        nonlocal last_step
        step = last_step + 1 if step is None else step
        if step >= last_step:
            wandb.logged.append(values)
            last_step = step

    wandb.init, wandb.define_metric, wandb.log = init, define_metric, log
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb
