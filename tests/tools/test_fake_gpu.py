"""The GPU that is only counted: what it counts, what it notices, and its model of time.

It replaces parts of torch for good, so it runs in processes of its own.
"""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from minatp.bench import __main__ as bench  # noqa: E402
from minatp.bench import fake, fake_gpu  # noqa: E402
from minatp.run.errors import guarded  # noqa: E402

from runs import run_python  # noqa: E402

ROOT = Path(__file__).parents[2]
aten = torch.ops.aten


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """What --fake writes to --out, with two layers."""
    out = tmp_path_factory.mktemp("fake") / "counts.json"
    command = ["-m", "minatp.bench", "--preset", "llama-1b", "--fake", "--layers", 2, "--out", out]
    shown = run_python(*command)
    assert "FAULT" not in shown
    return json.loads(out.read_text())


# ---- what is counted -----------------------------------------------------------------------------


def test_every_work_is_counted_without_a_fault(counted):
    assert counted["faults"] == []
    assert list(counted["works"]) == [*fake.FLOORS, "evaluation"]
    for counts in counted["works"].values():
        assert counts["launches"] > 0
        assert 0 < counts["device_ms"] <= counts["ms"]


def parts(counted, work, region):
    """{what: its sum over the parts of a recorded step}, and how often the step is replayed."""
    regions = counted["works"][work]["regions"]
    names = [name for name in regions if name.split(":")[0] == f"{region}, graph"]
    (replays,) = {regions[name]["replays"] for name in names}
    sums = {}
    for what in ("launches", "kernels", "bytes", "flops"):
        sums[what] = sum(regions[name][what] for name in names)
    return sums, replays


def test_a_latent_of_an_sft_step_reads_the_weights_once(counted):
    # all 20 latents, and one candidate to spare, are one graph, kept from an earlier step
    forward, replays = parts(counted, "SFT, last stage", "chain, forward")
    assert replays == 1
    assert counted["works"]["SFT, last stage"]["recordings"] == 0

    # of each layer two norms, one attention (prefix and own columns), one SwiGLU; and the last
    # norm, and the kernel that opens the column
    assert forward["kernels"] == 20 * (2 * (2 + 2 + 1) + 2) + 21

    # the four matrices of attention, the three of the MLP, and those of the latent head, in bf16
    D, inner, kv = 2048, 8192, 512
    weights = 2 * (2 * (2 * D * D + 2 * D * kv + 3 * D * inner) + 4 * D * D)
    assert forward["bytes"] == pytest.approx(20 * weights, rel=0.2)
    assert forward["flops"] == pytest.approx(20 * 32 * weights, rel=0.02)


def test_an_sft_step_never_waits_for_the_device(counted):
    for stage in ("first", "last"):
        assert counted["works"][f"SFT, {stage} stage"]["waits"] == 0


def test_rollouts_replay_one_graph_for_thinking_and_one_for_writing(counted):
    # of 10 steps of thought the first is run; of 16 words the first needs no step
    _, n_thinking = parts(counted, "rollouts", "thinking")
    writing, n_writing = parts(counted, "rollouts", "writing")
    assert (n_thinking, n_writing) == (9, 14)

    # a word reads the output matrix, and its rows of the embedding: not the whole table
    output_matrix = 2 * 128259 * 2048
    assert writing["bytes"] < 2 * output_matrix

    # the host waits for counts of an earlier step alone, one in four latents or words
    counts = counted["works"]["rollouts"]
    assert 0 < counts["late_waits"] <= (20 + 16) / 4
    assert counts["recordings"] == 2


def test_the_optimizer_moves_28_bytes_a_parameter_and_the_clip_8(counted):
    D, inner, kv, V = 2048, 8192, 512, 128259
    layer = 2 * D * D + 2 * D * kv + 3 * D * inner
    n_parameter = 2 * layer + V * D + 2 * D * D  # of π, and about those of the latent head
    counts = counted["works"]["update"]

    # AdamW reads weight, gradient and two moments, and writes all but the gradient. The clip reads
    # the gradient for its norm, and has AdamW write it scaled
    assert counts["bytes"] == pytest.approx((28 + 8) * n_parameter, rel=0.05)
    assert counts["waits"] == 0


# ---- what is noticed -----------------------------------------------------------------------------

FAULTY = """
import torch
import torch.nn.functional as F
from kernels import rows
from minatp.bench import fake_gpu

gpu = fake_gpu.FakeGPU(no_waits=("loop",))
gpu.begin_process()
fake_gpu.install(gpu, most_words=16)
x = torch.zeros(4, 3, device="meta")


def ask_for_a_shape():
    return x.nonzero()


def ask_for_a_shape_by_a_mask():
    return x[x > 0]


def ask_for_a_number():
    return int(x.sum())


def read_a_cpu_tensor():
    return x + torch.ones(())


def copy_to_the_device():
    return x.copy_(torch.ones(4, 3))


def launch_a_new_kernel():
    return rows.SwiGLU.apply(x, x)


with gpu:
    # outside a recording these are no faults, but in a region without waits
    ask_for_a_shape()
    assert not gpu.faults and gpu.waits.total() == 1
    with gpu.region("loop: part"):
        ask_for_a_number()
    for work in (
        ask_for_a_shape,
        ask_for_a_shape_by_a_mask,
        ask_for_a_number,
        read_a_cpu_tensor,
        copy_to_the_device,
        launch_a_new_kernel,
    ):
        with gpu.region(work.__name__):
            gpu.record(work, x.device)

    # a GPU has no fused kernel for it
    q, k = torch.zeros(1, 4, 2, 8, device="meta"), torch.zeros(1, 2, 3, 8, device="meta")
    F.scaled_dot_product_attention(q, k, k, attn_mask=torch.ones(2, 3, device="meta") > 0)

    # rows that are not side by side are multiplied one by one
    rows_apart = torch.zeros(5, 2, 6, device="meta")[:, 1:]
    torch.matmul(rows_apart, torch.zeros(6, 3, device="meta"))

    # once launched, a kernel can be recorded; in another process it is new again
    launch_a_new_kernel()
    gpu.record(launch_a_new_kernel, x.device)
    gpu.begin_process()
    with gpu.region("another process"):
        gpu.record(launch_a_new_kernel, x.device)
print("\\n".join(gpu.faults))
"""


def test_the_fake_gpu_notices_what_a_graph_cannot_hold():
    faults = run_python("-c", FAULTY).splitlines()

    def faults_in(region):
        suffix = f" in elsewhere > {region} > {region}, graph"
        return [fault.removesuffix(suffix) for fault in faults if fault.endswith(suffix)]

    waits = "waits for the device while recording"
    is_new = "swiglu_forward_kernel is first specialised while recording"
    assert faults_in("ask_for_a_shape") == [f"aten.nonzero.default {waits}"]
    assert faults_in("ask_for_a_shape_by_a_mask") == [f"aten.index.Tensor {waits}"]
    assert faults_in("ask_for_a_number") == [f"int() {waits}"]
    assert faults_in("read_a_cpu_tensor") == ["aten.add.Tensor reads CPU tensors of shape [()]"]
    assert faults_in("copy_to_the_device") == [
        "aten.copy_.default reads CPU tensors of shape [(4, 3)]",
        "aten.copy_.default copies between devices",
    ]
    assert faults_in("launch_a_new_kernel") == [is_new]
    assert faults_in("another process") == [is_new]
    assert "int() waits for the device in elsewhere > loop: part" in faults
    assert "SDPA with grouped heads and a mask falls back" in " ".join(faults)
    assert "a batched product reads a matrix (6, 3) 5 times" in " ".join(faults)
    assert len(faults) == 11


# ---- bytes and time ------------------------------------------------------------------------------


def test_what_uses_some_rows_or_the_shape_of_a_table_does_not_move_it():
    table = torch.empty(1000, 8, device="meta")
    ids = torch.empty(5, dtype=torch.long, device="meta")
    rows = torch.empty(5, 8, device="meta")
    n_byte = 5 * 8 * 4 + 5 * 8 * 4 + 5 * 8  # the rows, read and written; the ids
    assert fake_gpu.moved(aten.embedding, [table, ids], [rows]) == n_byte
    assert fake_gpu.moved(aten.index_copy_, [table, ids, rows], [table]) == n_byte
    assert fake_gpu.moved(aten.new_zeros, [table], [rows]) == 5 * 8 * 4
    assert fake_gpu.moved(aten.copy_, [rows, rows], [rows]) == 2 * 5 * 8 * 4
    assert fake_gpu.moved(aten.add, [rows, rows], [rows]) == 3 * 5 * 8 * 4


def test_the_model_of_time_is_what_it_was():
    """Figures of different commits can be compared only by the same model."""
    assert fake_gpu.duration(n_byte=4.3e6, flops=0) == pytest.approx(1 + 3.2)
    assert fake_gpu.duration(n_byte=0, flops=6.5e9) == pytest.approx(10 + 3.2)
    assert (fake_gpu.EAGER, fake_gpu.RECORD, fake_gpu.WAIT) == (8, 50, 20)


def test_the_host_runs_ahead_of_the_device_until_it_waits_or_records():
    clock = fake_gpu.Clock()
    for _ in range(3):
        clock.launch(100)
    assert (clock.host, clock.device) == (24, 8 + 300)

    # for an event that the device has passed the host does not wait
    clock.wait(until=8)
    assert clock.host == 24 + 20
    clock.wait(until=clock.device)
    assert clock.host == 308 + 20

    # the device stands still while the host records
    for _ in range(10):
        clock.record()
    clock.launch(100)
    assert clock.now == 328 + 500 + 8 + 100


def test_a_graph_of_one_latent_and_a_graph_of_all_are_counted_alike():
    def launches_of_a_latent(n_launch, n_replay):
        region = fake_gpu.Region(n_replay=n_replay)
        region.launches["aten.mm"] = n_launch
        regions = {"chain, forward, graph": region, "chain, forward": fake_gpu.Region()}
        return fake.latent_step(fake.Measured({}, {"SFT, last stage": regions}, 0))

    assert launches_of_a_latent(210, n_replay=19) == 210
    assert launches_of_a_latent(20 * 150, n_replay=1) == 150


# ---- gates and the command line ------------------------------------------------------------------


def test_only_a_gate_that_was_met_before_fails(monkeypatch, capsys):
    def figure(measured):
        return 7

    gates = [
        fake.Gate("open and missed", 5, figure, holds=False),
        fake.Gate("open and met", 7, figure, holds=False),
        fake.Gate("held and missed", 6, figure, holds=True),
        fake.Gate("held and met", 8, figure, holds=True),
    ]
    monkeypatch.setattr(fake, "GATES", gates)
    assert fake.print_gates(None) == ["held and missed"]
    verdicts = [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()[-4:]]
    assert verdicts == ["missed", "met", "MISSED, and was met before", "met"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--fake"], "add --preset llama-1b"),
        (["--preset", "llama-1b", "--fake", "--layers", "0"], "--layers must be positive"),
        (["--preset", "llama-1b", "--fake", "--sides", "tuned"], "drop --sides, --device"),
    ],
)
def test_mistakes_get_one_line(argv, message, capsys):
    assert guarded(bench.main, argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err


def test_interpreted_kernels_cannot_be_counted(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert guarded(bench.main, ["--preset", "llama-1b", "--fake"]) == 2
    assert "unset it" in capsys.readouterr().err
