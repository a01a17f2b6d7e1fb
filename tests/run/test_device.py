"""The device of a run, and the precision in which it computes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import sample
import train
from minatp.run import evaluate, options
from minatp.run.device import SMALL, autocast, pick_device, pick_dtype
from minatp.run.errors import guarded
from minatp.run.loop import Run
from minatp.tools import probe

from runs import MODEL, TINY, TINY_RL, exact, go

# ---- which device --------------------------------------------------------------------------------


@pytest.fixture
def current_device(monkeypatch):
    """A list of the devices that were made the current one, on a machine with two GPUs."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_the_device_of_a_single_process_is_the_current_one(current_device, monkeypatch):
    """Triton launches on it, wherever the tensors are."""
    pick_device("cuda:1")
    assert current_device == [torch.device("cuda:1")]

    # torchrun with one process takes --device as well
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    pick_device("cuda:1")
    assert current_device == 2 * [torch.device("cuda:1")]


def test_several_processes_choose_theirs_later(current_device, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    pick_device("cuda:1")
    assert current_device == []


# ---- which dtype ---------------------------------------------------------------------------------


@pytest.fixture
def cpu_with(monkeypatch):
    """A function that gives this CPU some of the instructions for bfloat16, and no others."""

    def give(*names):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda has=name in names: has, raising=False)

    return give


def model_of(n):
    """A module of n parameters, which take no memory."""
    return torch.nn.Linear(n, 1, bias=False, device="meta")


# fmt: off
@pytest.mark.parametrize("name, device, n, instructions, dtype", [
    # what is given, wherever it is
    ("float32",  "cuda", SMALL, (), "float32"),
    ("bfloat16", "cpu",  1,     (), "bfloat16"),
    # a GPU
    ("", "cuda", 1, (), "bfloat16"),
    # a CPU: both the size and the instructions count
    ("", "cpu", SMALL,     (),                             "float32"),
    ("", "cpu", SMALL,     ("_is_avx512_bf16_supported",), "bfloat16"),
    ("", "cpu", SMALL,     ("_is_amx_tile_supported",),    "bfloat16"),
    ("", "cpu", SMALL - 1, ("_is_avx512_bf16_supported",), "float32"),
])
# fmt: on
def test_the_dtype_follows_from_the_device_and_the_size(
    name, device, n, instructions, dtype, cpu_with
):
    cpu_with(*instructions)
    assert pick_dtype(name, torch.device(device), model_of(n)) == dtype


def test_a_torch_that_cannot_say_what_the_cpu_has_means_float32(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert pick_dtype("", torch.device("cpu"), model_of(SMALL)) == "float32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_have_the_dtype(dtype):
    x = torch.ones(2, 2)
    with autocast(torch.device("cpu"), dtype):
        assert (x @ x).dtype == getattr(torch, dtype)


def test_another_dtype_is_refused(refused):
    reason = "--dtype must be float32 or bfloat16, not 'float16'"
    refused(sample.main, ["--dtype", "float16"], "command line: ", "invalid choice: 'float16'")
    refused(train.main, ["--dtype", "float16"], "command line: ", reason)


# ---- a run in bfloat16 ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_bfloat16(tmp_path_factory):
    """The folder of an SFT run in bfloat16."""
    out = tmp_path_factory.mktemp("dtype") / "sft"
    go(*TINY, "--dtype", "bfloat16", "--out", out)
    return out


def test_a_run_says_and_records_its_dtype(finished, tmp_path, capsys, in_bfloat16):
    assert json.loads((finished / "summary.json").read_text())["dtype"] == "float32"
    assert json.loads((finished / "config.json").read_text())["dtype"] == "float32"
    assert json.loads((in_bfloat16 / "summary.json").read_text())["dtype"] == "bfloat16"

    capsys.readouterr()
    argv = [*TINY_RL, "--updates", 1, "--init", in_bfloat16, "--out", tmp_path / "rl"]
    go(*argv, "--dtype", "bfloat16")
    assert "on cpu in bfloat16; files in" in capsys.readouterr().out


def test_weights_and_moments_are_saved_in_float32(in_bfloat16):
    for name in ("model", "optimizer"):
        [file] = (in_bfloat16 / "checkpoints" / "00000016").glob(f"{name}.safetensors")
        for key, tensor in load_file(file).items():
            assert tensor.dtype == torch.float32, key


def test_a_resumed_run_keeps_its_dtype(in_bfloat16, tmp_path, capsys, refused):
    """Without --dtype, and to the bit; another one is refused."""
    cut = tmp_path / "cut"
    shutil.copytree(in_bfloat16, cut)
    shutil.rmtree(cut / "checkpoints" / "00000016")
    (cut / "summary.json").unlink()
    go("--resume", "--out", cut)
    assert "on cpu in bfloat16; files in" in capsys.readouterr().out
    weights = "final/model.safetensors"
    assert (cut / weights).read_bytes() == (in_bfloat16 / weights).read_bytes()
    assert records(cut) == records(in_bfloat16)

    argv = ["--resume", "--dtype", "float32", "--out", "cut"]
    reason = "the run was started with --dtype bfloat16, not with --dtype float32"
    refused(train.main, argv, "cut/config.json:1: ", reason)


def records(out):
    """metrics.jsonl without times."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [exact(json.loads(line)) for line in lines]


def test_a_run_that_began_before_there_was_a_dtype_goes_on_as_it_began(cpu_with):
    """On a CPU in float32, also where a new run would be in bfloat16."""
    cpu_with("_is_amx_tile_supported")
    cfg = options.parse(["--device", "cpu"], "")
    cfg.resume, cfg.dtype = True, ""
    assert Run(cfg, None, torch.device("cpu"), model_of(SMALL)).cfg.dtype == "float32"
    cfg.resume, cfg.dtype = False, ""
    assert Run(cfg, None, torch.device("cpu"), model_of(SMALL)).cfg.dtype == "bfloat16"


# ---- tools ---------------------------------------------------------------------------------------


# fmt: off
@pytest.mark.parametrize("main, argv", [
    (sample.main, ["--run", MODEL, "--problems", 2]),
    (evaluate.main, [MODEL, "--problems", 2]),
    (probe.main, [MODEL, "--problems", 10]),
], ids=["sample", "evaluate", "probe"])
# fmt: on
def test_a_tool_computes_in_its_dtype(main, argv, monkeypatch):
    seen = set()
    solve = evaluate.solve

    def watch(*args, **kwargs):
        x = torch.ones(2, 2)
        seen.add((x @ x).dtype)
        return solve(*args, **kwargs)

    monkeypatch.setattr(evaluate, "solve", watch)
    argv = [*argv, "--max-new", 4, "--device", "cpu", "--dtype", "bfloat16"]
    assert guarded(main, [str(a) for a in argv]) == 0
    assert seen == {torch.bfloat16}
