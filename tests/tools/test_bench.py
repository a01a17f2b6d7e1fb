"""The benchmark: its peers compute what minatp computes, the gated counts are met, and a GPU's floors are as reckoned by hand."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from minatp import bench, cases, count
from minatp.llama import LlamaConfig

LLAMA_1B = LlamaConfig(vocab_size=128259)


@pytest.fixture(scope="module")
def case():
    pytest.importorskip(
        "transformers",
        reason="transformers, which the benchmark compares with, is missing: pip install transformers",
    )
    case = cases.Case("tiny", torch.device("cpu"))
    case.size = {
        **case.size,
        "batch": 20,
        "questions": 4,
    }  # the command's 32 and 16 widen the gap and take longer
    return case


@pytest.fixture(scope="module")
def every(case):
    return cases.sides(case.model, case.device)


def test_all_that_is_timed_runs(case, every):
    for work, tokenizer in cases.works(case).values():
        work(every["minatp"])
        assert tokenizer > 0


def test_the_peers_compute_the_same_losses_gradients_chains_and_log_probabilities(
    case, every, capsys
):
    cases.compare(case, every)
    assert capsys.readouterr().out.count("same losses") == 3
    prompt, valid = case.prompts(6)
    r = every["minatp"].rollout(prompt, valid, cases.MAX_NEW, None, 1)
    assert (
        len(set(r.n_latent.tolist())) > 1 and len(set(r.n_token.tolist())) > 1
    )  # ragged, or little was compared


def test_a_static_cache_gives_the_same_chains(case):
    from minatp.peer import Tuned

    case.ragged(True)
    case.model.stage = case.model.K + 1
    chains = [
        Tuned(case.model, static).rollout(*case.prompts(4), cases.MAX_NEW, None, 2)
        for static in (False, True)
    ]
    assert torch.equal(chains[0].token, chains[1].token) and torch.equal(
        chains[0].n_latent, chains[1].n_latent
    )


def test_a_peer_that_computes_something_else_is_not_timed(case, every, capsys):
    broken = {
        **every,
        "tuned": cases.Side(
            **{
                **vars(every["tuned"]),
                "losses": lambda batch, eps: {
                    k: 1.01 * v for k, v in every["tuned"].losses(batch, eps).items()
                },
            }
        ),
    }
    assert list(cases.compare(case, {k: broken[k] for k in ("minatp", "tuned")})) == ["minatp"]
    assert "tuned              DIFFERS from minatp" in capsys.readouterr().out


def test_the_counts_meet_the_gates(case, every):
    found = [
        {
            "work": name,
            "sides": {
                s: vars(count.count(partial(work, every[s]))) for s in ("minatp", "reference")
            },
        }
        for name, (work, _) in cases.works(case).items()
        if name in {work for work, _ in bench.GATES}
    ]
    assert bench.missed(found) == []
    halved = [
        {
            **r,
            "sides": {
                **r["sides"],
                "reference": {k: v / 10 for k, v in r["sides"]["reference"].items()},
            },
        }
        for r in found
    ]
    assert len(bench.missed(halved)) == len(bench.GATES)  # and they can be missed


def test_a_side_that_runs_out_of_memory_is_told_and_is_no_win(monkeypatch, capsys):
    """At once, or in a later round with what the driver says; what was found before is saved."""

    def full():
        raise torch.OutOfMemoryError

    def later():
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("CUDA error: out of memory")

    small = lambda: torch.ones(9, 9) @ torch.ones(9, 9)
    calls, saved = [], []
    every = {
        name: SimpleNamespace(bf16=True, run=work)
        for name, work in (
            ("minatp", small),
            ("tuned", full),
            ("reference", small),
            ("late", later),
        )
    }
    case = SimpleNamespace(device=torch.device("cpu"), model=torch.nn.Linear(1, 1), machine=None)
    monkeypatch.setattr(bench, "works", lambda case: {"rollouts": (lambda side: side.run(), 10)})
    (found,) = bench.measure(case, every, 3, saved.extend)
    assert not bench.measure(case, every, 3, only=["reading"])
    assert (
        list(found["sides"]) == ["minatp", "reference"]
        and len(found["sides"]["reference"]["seconds"]) == 3
        and saved == [found]
    )
    shown = capsys.readouterr().out
    assert (
        "tuned              ran out of memory" in shown
        and "late               ran out of memory" in shown
    )
    every["minatp"].run = full
    with pytest.raises(OutOfMemory, match="minatp itself"):
        bench.measure(case, every, 1)


def test_counts_are_those_of_the_arithmetic():
    a, b = torch.randn(4, 8), torch.randn(8, 16)
    c = count.count(lambda: (a @ b).t().add(1.0))
    assert (c.ops, c.flops, c.waits) == (2, 2 * 4 * 8 * 16, 0)
    assert c.bytes == 4 * (4 * 8 + 8 * 16 + 4 * 16) + 4 * 2 * 4 * 16
    assert count.count(lambda: a[a > 0].sum().item()).waits == 2
    assert count.stored(torch.zeros(1, 8).expand(100, 8)) == 4 * 8


def test_the_floors_and_the_memory_are_as_reckoned_by_hand():
    """Llama-3.2-1B: a latent step at B = 32 and 128, an answer token, T = 140; 54 GB and less than 80 for SFT."""
    ms = lambda rows, words: 1e3 * count.pass_bytes(LLAMA_1B, rows, 140, words) / 4.3e12
    assert [round(ms(*at), 2) for at in ((32, False), (128, False), (32, True), (128, True))] == [
        0.49,
        0.59,
        0.61,
        0.71,
    ]
    memory = count.training_memory(LLAMA_1B, 10, 2, 32, cases.paper_row(128256))
    assert memory["weights"] + memory["gradients"] + memory["moments"] == pytest.approx(
        2 * 19.8e9, rel=0.02
    )
    assert 54e9 < sum(memory.values()) < 80e9
    lean = count.training_memory(LLAMA_1B, 10, 2, 32, cases.paper_row(128256), recompute=True)
    assert lean["activations"] < 0.65 * memory["activations"]


def test_prices_are_found_from_times():
    counts = [(100, 1e9), (1000, 1e9), (500, 8e9)]
    found = [
        {"sides": {"minatp": {"ops": o, "flops": f, "seconds": [2e-5 * o + 1e-10 * f]}}}
        for o, f in counts
    ]
    assert bench.fit(found) == pytest.approx([2e-5, 1e-10])
    alone = [
        {"sides": {"minatp": {"ops": o, "flops": f, "seconds": [1e-10 * f]}}} for o, f in counts
    ]
    assert bench.fit(alone) == pytest.approx([0, 1e-10], abs=1e-12)


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
    from minatp import peer

    monkeypatch.setattr(peer, "transformers", None)
    assert guarded(bench.main, []) == 2
    assert "pip install transformers" in capsys.readouterr().err
