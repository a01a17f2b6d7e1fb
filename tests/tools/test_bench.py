"""The benchmark: its peers compute what minatp computes, the gates of counts are met, and a GPU's
floors agree with a calculation by hand.
"""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from minatp.bench import __main__ as bench
from minatp.bench import cases, peer
from minatp.llama import LlamaConfig
from minatp.run.errors import OutOfMemory, guarded
from minatp.tools import count

LLAMA_1B = LlamaConfig(vocab_size=128259)


@pytest.fixture(scope="module")
def case():
    """The small model, with smaller batches than the command's, which take longer."""
    reason = "transformers, which the benchmark compares with, is missing: pip install transformers"
    pytest.importorskip("transformers", reason=reason)
    case = cases.Case("tiny", torch.device("cpu"))
    case.size = replace(case.size, batch=20, questions=4)
    return case


@pytest.fixture(scope="module")
def every(case):
    return cases.sides(case.model, case.device)


def set_to_last_stage(case):
    """Chains of all lengths, at the last stage of the curriculum."""
    case.set_ragged(True)
    case.model.stage = case.model.K + 1


# ---- the sides -----------------------------------------------------------------------------------


def test_all_that_is_timed_runs(case, every):
    for work in cases.works(case).values():
        work.run(every["minatp"])
        assert work.n_token > 0


def test_a_work_does_not_depend_on_those_before_it(case, every):
    works = cases.works(case)
    alone = count.count(partial(works["rollouts"].run, every["minatp"]))
    works["SFT, first stage"].run(every["minatp"])
    after_another = count.count(partial(works["rollouts"].run, every["minatp"]))
    assert after_another == alone


def test_the_peers_compute_the_same_losses_gradients_chains_and_log_probabilities(
    case, every, capsys
):
    assert list(cases.compare(case, every)) == ["minatp", "tuned", "reference"]
    assert capsys.readouterr().out.count("same losses") == 3

    # the chains are ragged, or little was compared
    prompt, prompt_mask = case.prompts(6)
    r = every["minatp"].rollout(prompt, prompt_mask, cases.MAX_NEW, None, 1)
    assert len(set(r.n_latent.tolist())) > 1
    assert len(set(r.n_token.tolist())) > 1


def test_a_static_cache_gives_the_same_chains(case):
    set_to_last_stage(case)
    prompt, prompt_mask = case.prompts(4)
    growing = peer.Tuned(case.model).rollout(prompt, prompt_mask, cases.MAX_NEW, None, 2)
    static = peer.Tuned(case.model, static=True)
    static = static.rollout(prompt, prompt_mask, cases.MAX_NEW, None, 2)
    assert torch.equal(static.token, growing.token)
    assert torch.equal(static.n_latent, growing.n_latent)


@pytest.mark.parametrize("static", [False, True])
def test_the_tuned_cache_keeps_keys_in_the_dtype_of_the_values(case, static):
    """Under autocast RoPE leaves the keys in float32, which a static cache could refuse."""
    cfg = case.model.policy.cfg
    tuned = peer.Tuned(case.model, static)
    cache = tuned.empty_cache(tuned.policy, 5)
    keys = torch.randn(2, cfg.n_kv_head, 3, cfg.head_dim)
    keys, values = cache.update(keys, keys.bfloat16(), 0)
    assert keys.dtype == values.dtype == torch.bfloat16


def test_a_static_cache_serves_under_autocast(case):
    set_to_last_stage(case)
    prompt, prompt_mask = case.prompts(4)
    tuned = peer.Tuned(case.model, static=True)
    with torch.autocast("cpu", torch.bfloat16):
        chains = tuned.rollout(prompt, prompt_mask, cases.MAX_NEW, None, 2)
        thoughts = torch.randn(3, case.model.c, case.model.policy.cfg.n_embd)
        texts = tuned.read_thoughts(thoughts, case.eos, cases.MAX_NEW)
    assert len(chains.n_latent) == 8
    assert len(texts) == 3


def test_a_peer_that_computes_something_else_is_not_timed(case, every, capsys):
    def wrong_losses(batch, eps):
        losses = every["tuned"].losses(batch, eps)
        return {name: 1.01 * loss for name, loss in losses.items()}

    broken = replace(every["tuned"], losses=wrong_losses)
    same = cases.compare(case, {"minatp": every["minatp"], "tuned": broken})
    assert list(same) == ["minatp"]
    assert "tuned              DIFFERS from minatp" in capsys.readouterr().out


def test_nan_is_the_largest_error():
    zero, one, nan = torch.zeros(2), torch.ones(2), torch.full((2,), torch.nan)
    assert cases.largest_error([one, one], [one, one]) == 0
    assert cases.largest_error([2 * one, one], [one, one]) == 1
    assert cases.largest_error([one], [one, one]) == float("inf")
    for tensors in ([nan, zero], [zero, nan]):
        error = cases.largest_error(tensors, [one, one])
        assert error != error
        assert not error <= cases.TOLERANCE


# ---- counts and times ----------------------------------------------------------------------------


def test_the_counts_meet_the_gates(case, every):
    gated = {work for work, _ in bench.GATES}
    records, tenfold_worse = [], []
    for name, work in cases.works(case).items():
        if name not in gated:
            continue
        counts = {}
        for side in ("minatp", "reference"):
            counts[side] = vars(count.count(partial(work.run, every[side])))
        records.append({"work": name, "sides": counts})
        fewer = {what: n / 10 for what, n in counts["reference"].items()}
        tenfold_worse.append({"work": name, "sides": {**counts, "reference": fewer}})
    assert bench.missed_gates(records) == []
    assert len(bench.missed_gates(tenfold_worse)) == len(bench.GATES)  # they can be missed


def multiply():
    return torch.ones(9, 9) @ torch.ones(9, 9)


def run_out_of_memory():
    raise torch.OutOfMemoryError


def run_into_a_bug():
    raise IndexError("index_copy_(): self and source\nexpected to have the same dtype")


class RunOutOfMemoryLater:
    """Runs out of memory at the fourth call, with the driver's message."""

    n_call = 0

    def __call__(self):
        self.n_call += 1
        if self.n_call > 3:
            raise RuntimeError("CUDA error: out of memory")


@pytest.fixture
def out_of_memory_case(monkeypatch):
    """(case, sides): of four sides one has too little memory, and one in a later round."""

    def works(case):
        return {"rollouts": cases.Work(run=lambda side: side.run(), n_token=10)}

    monkeypatch.setattr(bench, "works", works)
    runs = {
        "minatp": multiply,
        "tuned": run_out_of_memory,
        "reference": multiply,
        "late": RunOutOfMemoryLater(),
    }
    every = {name: SimpleNamespace(bf16=True, run=run) for name, run in runs.items()}
    device, model = torch.device("cpu"), torch.nn.Linear(1, 1)
    return SimpleNamespace(device=device, model=model, machine=None), every


def test_a_side_that_runs_out_of_memory_is_named_and_is_no_win(out_of_memory_case, capsys):
    case, every = out_of_memory_case
    saved = []
    records = bench.measure_all(case, every, ["rollouts"], rounds=3, save=saved.extend)
    assert len(records) == 1 and saved == records
    assert list(records[0]["sides"]) == ["minatp", "reference"]
    assert len(records[0]["sides"]["reference"]["seconds"]) == 3
    shown = capsys.readouterr().out
    assert "tuned              ran out of memory" in shown
    assert "late               ran out of memory" in shown


def test_a_peer_that_fails_is_named_and_the_others_are_timed(out_of_memory_case, capsys):
    case, every = out_of_memory_case
    every["reference"].run = run_into_a_bug
    records = bench.measure_all(case, every, ["rollouts"], rounds=2, save=print)
    assert list(records[0]["sides"]) == ["minatp"]
    assert len(records[0]["sides"]["minatp"]["seconds"]) == 2
    shown = capsys.readouterr().out
    assert "reference          failed (IndexError: index_copy_(): self and source expected" in shown


def test_what_fails_in_minatp_itself_is_raised(out_of_memory_case):
    case, every = out_of_memory_case
    every["minatp"].run = run_into_a_bug
    with pytest.raises(IndexError):
        bench.measure_all(case, every, ["rollouts"], rounds=1, save=print)


def test_a_lost_gpu_ends_the_benchmark(out_of_memory_case):
    case, every = out_of_memory_case

    def lose_the_gpu():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    every["reference"].run = lose_the_gpu
    with pytest.raises(RuntimeError, match="illegal memory access"):
        bench.measure_all(case, every, ["rollouts"], rounds=1, save=print)


def test_only_the_chosen_works_are_timed(out_of_memory_case):
    case, every = out_of_memory_case
    assert bench.measure_all(case, every, ["reading thoughts"], rounds=3, save=print) == []


def test_minatp_must_not_run_out_of_memory_itself(out_of_memory_case):
    case, every = out_of_memory_case
    every["minatp"].run = run_out_of_memory
    with pytest.raises(OutOfMemory, match="minatp itself"):
        bench.measure_all(case, every, ["rollouts"], rounds=1, save=print)


def test_counts_are_those_of_the_arithmetic():
    a, b = torch.randn(4, 8), torch.randn(8, 16)
    counts = count.count(lambda: (a @ b).t().add(1.0))
    assert (counts.ops, counts.flops, counts.waits) == (2, 2 * 4 * 8 * 16, 0)
    product_bytes = 4 * (4 * 8 + 8 * 16 + 4 * 16)
    sum_bytes = 4 * 2 * 4 * 16
    assert counts.bytes == product_bytes + sum_bytes
    assert count.count(lambda: a[a > 0].sum().item()).waits == 2
    assert count.stored(torch.zeros(1, 8).expand(100, 8)) == 4 * 8


def test_bytes_are_those_of_every_argument_and_every_result():
    a = torch.randn(4, 8)
    assert count.count(lambda: a.add_(1)).bytes == 2 * 4 * 32  # read and written
    assert count.count(lambda: a * a).bytes == 3 * 4 * 32  # read, read and written


# ---- predictions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, logits, floor_ms",
    [(32, False, 0.49), (128, False, 0.59), (32, True, 0.61), (128, True, 0.71)],
)
def test_the_floors_agree_with_a_calculation_by_hand(rows, logits, floor_ms):
    """Llama-3.2-1B on an H200: a latent step, or with logits the token of an answer; T = 140."""
    seconds = count.pass_bytes(LLAMA_1B, rows, 140, logits) / 4.3e12
    assert round(1e3 * seconds, 2) == floor_ms


def test_a_position_is_charged_the_keys_and_values_before_it_and_its_own(case):
    machine = count.Machine(bandwidth=1e9, flops=math.inf)
    floor = bench.Floor(SimpleNamespace(**{**vars(case), "machine": machine}))
    llama = case.model.policy.cfg

    def seconds(T, logits):
        return count.pass_bytes(llama, 5, T, logits) / 1e9

    three = [seconds(T, logits=False) for T in (10, 11, 12)]
    assert floor.one_by_one(3, 5, 10, logits=False) == pytest.approx(sum(three))

    # The K latents follow the prompts, then <|end-latent|> and all words but the last
    n_prompt, K = max(len(row.prompt) for row in case.rows), case.model.K
    thinking = [seconds(n_prompt + i, logits=False) for i in range(1, K + 1)]
    writing = [seconds(n_prompt + K + i, logits=True) for i in range(1, cases.MAX_NEW + 1)]
    assert floor.generation(5, 5) == pytest.approx(sum(thinking) + sum(writing))


def test_the_memory_agrees_with_a_calculation_by_hand():
    """Llama-3.2-1B: 19.8 GB for each of four float32 copies of half of it; 54 to 80 GB for SFT."""
    row = cases.paper_row(128256)
    memory = count.training_memory(LLAMA_1B, 10, 2, 32, row)
    held = memory["weights"] + memory["gradients"] + memory["moments"]
    assert held == pytest.approx(2 * 19.8e9, rel=0.02)
    assert 54e9 < sum(memory.values()) < 80e9
    lean = count.training_memory(LLAMA_1B, 10, 2, 32, row, recompute=True)
    assert lean["activations"] < 0.65 * memory["activations"]


@pytest.mark.parametrize("per_op, per_flop", [(2e-5, 1e-10), (0, 1e-10)])
def test_prices_are_found_from_times(per_op, per_flop):
    records = []
    for ops, flops in ((100, 1e9), (1000, 1e9), (500, 8e9)):
        own = {"ops": ops, "flops": flops, "seconds": [per_op * ops + per_flop * flops]}
        records.append({"sides": {"minatp": own}})
    assert bench.fit_prices(records) == pytest.approx([per_op, per_flop], abs=1e-12)


def test_no_price_is_negative():
    records = []
    for ops, flops in ((100, 1e9), (1000, 1e9), (500, 8e9)):  # the more operations, the faster
        own = {"ops": ops, "flops": flops, "seconds": [1e-10 * flops - 2e-5 * ops]}
        records.append({"sides": {"minatp": own}})
    per_op, per_flop = bench.fit_prices(records)
    assert per_op == 0 and per_flop > 0

    # No other price of a FLOP explains the times as well
    def error(price):
        relative_errors = []
        for record in records:
            own = record["sides"]["minatp"]
            relative_errors.append(price * own["flops"] / own["seconds"][0] - 1)
        return sum(e * e for e in relative_errors)

    assert error(per_flop) < min(error(0.99 * per_flop), error(1.01 * per_flop))


# ---- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--preset", "huge"], "--preset must be one of tiny, llama-1b"),
        (["--rounds", "0"], "--rounds must be positive"),
        (["--round", "2"], "did you mean --rounds?"),
        (["--device", "cuda:99"], "--device cuda:99"),
    ],
)
def test_mistakes_get_one_line(argv, message, capsys):
    assert guarded(bench.main, argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["--sides", "tuned;best"],
            "--sides: there is no 'best'; there are minatp; tuned; reference",
        ),
        (["--works", "all"], "--works: there is no 'all'"),
    ],
)
def test_what_is_not_among_those_compared_is_named(argv, message, case, capsys):
    assert guarded(bench.main, argv) == 2
    assert message in capsys.readouterr().err


def test_without_transformers_the_command_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(peer, "transformers", None)
    assert guarded(bench.main, []) == 2
    assert "pip install transformers" in capsys.readouterr().err
