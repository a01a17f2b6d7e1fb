"""Stage 2: the policy gradient against enumeration and finite differences, the advantages, and whole runs."""
import json

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import train
from minatp import checkpoint, config, data, evaluate, problems, reward
from minatp.explain import read_thoughts
from minatp.latent import ATP
from minatp.llama import Llama, LlamaConfig
from minatp.loss import advantages, surrogate
from minatp.rollout import Rollout, score
from runs import go
from test_sft import SMALL

V, C, K, N = 4, 2, 2, 2  # words 0 … 3, of which 1 is eos; at most two are written


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    cfg = LlamaConfig(vocab_size=V, n_layer=2, n_head=2, n_kv_head=1, n_embd=8, n_inner=12, head_dim=4, rope_theta=50.0,
                      rope_scaling=None, bos=0, eos=(1,))
    model = ATP(cfg, c=C, K=K, decode=False).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    model.end = 3
    return model, torch.tensor([[2, 0, 2]]), torch.tensor([[True, True, True]])


def outcomes():
    """Every (steps used, stopped, words) that a rollout can end in."""
    words = [(1,)] + [(a, b) for a in (0, 2, 3) for b in range(V)]
    return [(s, s < K, w) for s in range(K + 1) for w in words]


def as_rollout(z, cases):
    B = len(cases)
    n_latent = torch.tensor([C * s for s, _, _ in cases])
    token = torch.tensor([[*w, -1][:N] for _, _, w in cases])
    return Rollout(z.expand(B, -1, -1).clone(), torch.zeros(B, C * K, 8), n_latent, torch.tensor([stop for _, stop, _ in cases]),
                   torch.zeros(B, K), token, torch.tensor([len(w) for _, _, w in cases]), torch.zeros(B, C * K).double(),
                   torch.zeros(B, K).double(), torch.zeros(B, N).double())


def flat(model):
    return torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in model.parameters()])


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_policy_gradient_is_the_gradient_of_the_enumerated_expectation(tiny, baseline):
    """z = μ (ε = 0, the path estimator): stops and words are enumerated, so E[R] and its gradient are known."""
    model, prompt, valid = tiny
    cases = outcomes()
    R = torch.rand(len(cases), generator=torch.Generator().manual_seed(1)).double()
    eps = torch.zeros(len(cases), C * K, 8, dtype=torch.float64)
    s = score(model, prompt, valid, as_rollout(torch.zeros(1, C * K, 8).double(), cases), len(cases), eps)
    logp = s.logp_stop.sum(1) + s.logp_token.sum(1)
    assert logp.exp().sum().item() == pytest.approx(1, abs=1e-9)  # a distribution: nothing is left out or counted twice
    (logp.exp() * R).sum().backward(retain_graph=True)
    want = flat(model)
    model.zero_grad()
    each, _ = surrogate(logp[:, None], logp[:, None].detach(), (R - baseline)[:, None])
    (logp.exp().detach() * each[:, 0]).sum().backward()
    torch.testing.assert_close(-flat(model), want, rtol=1e-7, atol=1e-10)
    assert want.norm() > 1e-3


@pytest.mark.parametrize("estimator", ["score", "path"])
def test_log_probabilities_differentiate_as_finite_differences_say(tiny, estimator):
    model, prompt, valid = tiny
    cases = outcomes()[::3]
    g = torch.Generator().manual_seed(2)
    z, eps = (torch.randn(1, C * K, 8, generator=g).double() for _ in range(2))
    weight = torch.randn(len(cases), C * K + K + N, generator=g).double()

    def f():
        s = score(model, prompt, valid, as_rollout(z, cases), len(cases), eps.expand(len(cases), -1, -1) if estimator == "path" else None)
        return (weight * torch.cat((s.logp_z, s.logp_stop, s.logp_token), 1)).sum()

    f().backward()
    for name, p in model.named_parameters():
        for i in torch.randint(p.numel(), (3,), generator=g).tolist():
            with torch.no_grad():
                w, h = p.view(-1), 1e-6
                w[i] += h
                up = f()
                w[i] -= 2 * h
                down = f()
                w[i] += h
            got = 0.0 if p.grad is None else p.grad.view(-1)[i].item()
            assert got == pytest.approx(((up - down) / (2 * h)).item(), rel=1e-4, abs=1e-6), name


def test_advantages():
    R = torch.tensor([[1.0, 0, 0, 1], [2, 2, 2, 2], [1.6, 1.6, 1.6, 0]])
    a = advantages(R)
    assert torch.equal(a[0], torch.tensor([0.5, -0.5, -0.5, 0.5])) and not a[1].any()
    torch.testing.assert_close(advantages(R, "rloo")[0], R[0] - torch.tensor([1 / 3, 2 / 3, 2 / 3, 1 / 3]))
    n = advantages(R, normalise=True)
    torch.testing.assert_close(n[2].std(), torch.tensor(1.0), rtol=1e-4, atol=1e-4)
    third = torch.full((1, 8), 1 / 3)
    assert not advantages(third, normalise=True).any()  # rounding in the mean is no signal


def test_clipping_stops_the_gradient_where_it_should():
    logp = torch.tensor([[0.0, 0.5, -0.5, 5.0]], requires_grad=True)
    for sign, passes in ((1.0, [1, 0, 1, 0]), (-1.0, [1, 1, 0, 0])):
        each, clamped = surrogate(logp, torch.zeros(1, 4), torch.tensor([[sign]]))
        grad, = torch.autograd.grad(each.sum(), logp)
        assert (grad != 0).long().tolist()[0] == passes and clamped.tolist()[0] == [False, True, True, True]


@pytest.mark.parametrize("steps, final, want", [
    (["<<1+2=3>>", "<<3+2=5>>"], "5", 1), (["<<1+2=4>>", "<<4+1=5>>"], "5", 0.5), (["<<5=5>>"] * 3, "5", 1 / 3),
    (["<<1+2=3>>", "<<4+1=5>>"], "5", 0.5), (["<<2*(3+1)=8>>"], "8", 1), (["<<1/0=5>>"], "5", 0), (["<<2**3=8>>"], "8", 0),
    (["<<1,000*.5=500>>"], "500", 1), (["<<x+1=5>>"], "5", 0), (["<<1/3=0.33>>"], "0.33", 0), (["<<__import__('os')=5>>"], "5", 0), ([], "5", 0),
])
def test_strict_coherence_pays_for_true_used_and_new_steps_alone(steps, final, want):
    assert reward.coherence(steps, final, strict=True) == pytest.approx(want)


def test_the_reward_is_method_mds():
    steps = ["<<1+2=3>>", "<<4+1=5>>"]
    assert reward.total("### 5", steps, True, "5") == (pytest.approx(1 + 0.1 * 0.5 + 0.5), {"acc": 1.0, "coh": 0.5, "fmt": 1.0})
    assert reward.total("### 6", steps, True, "5")[0] == 0.5        # coherence without the answer earns nothing …
    assert reward.total("### 5", steps, False, None)[0] == pytest.approx(0.05)  # … unless no answer is known


RL = "--stage rl --labelled 160 --answers 40 --val-size 8 --test-size 24 --batch-size 4 --G 4 --updates 12 --log-every 2 --save-every 5 --val-every 6 --device cpu".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(SFT run, RL run from it)."""
    root = tmp_path_factory.mktemp("runs")
    go(*SMALL, "--out", root / "sft", "--epochs", 1)
    go(*RL, "--init", root / "sft", "--out", root / "rl", "--anchor", 0.5, "--kl", 0.01, "--temperature", 1)
    return root / "sft", root / "rl"


def test_an_rl_run_leaves_what_others_rely_on(runs):
    sft, rl = runs
    summary = json.loads((rl / "summary.json").read_text())
    assert {"start_accuracy", "start_coherence", "gain", "gain_se", "accuracy_ci95"} <= summary.keys() and summary["stage"] == "rl"
    records = [json.loads(line) for line in (rl / "metrics.jsonl").read_text().splitlines()]
    assert {"reward", "acc", "coh", "fmt", "signal", "clamped", "sigma", "latents", "grad_norm", "kl"} <= set().union(*records)
    seen = [r["validation"] for r in records if "validation" in r]
    assert len(seen) == 2 and {"thought_share", "reading", "drift", "accuracy"} <= seen[0].keys()
    before, after = (load_file(d / "final" / "minatp" / "decoder.safetensors") for d in (sft, rl))
    assert all(torch.equal(before[k], after[k]) for k in before)  # φ is frozen
    before, after = (load_file(d / "final" / "model.safetensors") for d in (sft, rl))
    assert any(not torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("options", [
    ("--estimator", "path"), ("--updates-per-batch", 3), ("--baseline", "rloo", "--normalise"), ("--no-answers",), ("--placebo",),
    ("--coherence", "strict", "--greedy", "--spread", 3)])
def test_the_variants_run(options, runs, tmp_path):
    go(*RL, "--updates", 3, "--init", runs[0], "--out", tmp_path, *options)
    assert json.loads((tmp_path / "summary.json").read_text())["n_problems"] == 24


def test_clamped_is_a_share_of_decisions_and_kl_to_oneself_is_none(tiny):
    """Two chains of 4 + 1 decisions (a stop at once: 1 thought, 1 stop, 1 word and eos) in 2 × 8 columns."""
    model, prompt, valid = tiny
    cfg = options.parse(["--stage", "rl", "--estimator", "score", "--G", "2"], "")
    r = as_rollout(torch.randn(1, C * K, 8).double(), [(0, True, (0, 1)), (0, True, (2, 1))])
    chains = (prompt, valid, r, torch.tensor([[0.5], [-0.5]]).double(), None)
    _, (old, _), told = train.policy_loss(cfg, model, model, *chains, None, 2, 2)
    assert told["clamped"] == 0 and told["kl"].item() == pytest.approx(0, abs=1e-9)
    assert train.policy_loss(cfg, model, None, *chains, (old - 1.0 * (old != 0), None), 2, 2)[2]["clamped"] == 1


def test_coherence_only_looks_at_no_answer_anywhere():
    cfg = options.parse(["--stage", "rl", "--no-answers", "--coherence", "strict", "--G", "2"], "")
    chains = [evaluate.Chain(["<<1+1=2>>"], "### 2", True, 1, 3, [], []), evaluate.Chain(["<<1+2=2>>"], "### 2", True, 1, 3, [], [])]
    R, parts = train.judge(cfg, chains, ["7"])
    assert R.tolist() == [[pytest.approx(0.6), 0.5]] and parts.keys() == {"coh", "fmt"}
    assert train.reward_of(cfg, chains[0], "7") == train.reward_of(cfg, chains[0], "2")


def test_every_line_tells_every_diagnostic(runs, tmp_path, capsys, monkeypatch):
    """The last one too, where --log-every does not divide --updates, and the KL that no option asked for."""
    monkeypatch.setattr(train, "judge", lambda cfg, chains, golds: (torch.eye(cfg.G)[: len(golds)], {"acc": torch.tensor(0.25)}))
    go(*RL, "--updates", 3, "--init", runs[0], "--out", tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rl  step ")]
    assert len(lines) == 2
    for name in ("reward", "acc", "signal", "latents", "sigma", "clamped", "kl", "grad_norm"):
        assert all(f"  {name} " in line for line in lines), name


@pytest.mark.parametrize("lacks, options", [(("answer",), ("--no-answers",)), (("answer", "steps"), ("--no-answers", "--anchor", 0)), (("steps",), ("--anchor", 0))])
def test_data_without_labels(lacks, options, runs, tmp_path, capsys):
    """Coherence-only needs no answer, and without the anchor no steps are needed; what is measured brings its own answers."""
    ps = [vars(p) for p in problems.generate("labelled", 30, 9)]
    for p in ps[:6] if "--anchor" not in options else []:  # some are labelled: the anchor
        p["at"] = "labelled"
    bare = [p if p["at"] == "labelled" else {"steps": [], **{k: v for k, v in p.items() if k not in lacks}} for p in ps]
    (tmp_path / "p.json").write_text(json.dumps(bare))
    (tmp_path / "t.json").write_text(json.dumps([vars(p) for p in problems.generate("test", 6, 9)]))
    data = ["--data", tmp_path / "p.json", "--test", tmp_path / "t.json", "--val", tmp_path / "t.json"]
    rl = "--stage rl --batch-size 4 --G 2 --updates 2 --log-every 2 --device cpu --init".split() + [runs[0]]
    go(*rl, *data, *options, "--out", tmp_path / "o")
    summary = json.loads((tmp_path / "o" / "summary.json").read_text())
    assert (summary["n_problems"], summary["training_problems"]) == (6, 30)
    if "--no-answers" in options:
        assert f"{len(ps) - 6 * ('--anchor' not in options)} without answers or steps" in capsys.readouterr().out
        go(*rl, *data[:4], *options, "--out", tmp_path / "p", expect=2)
        assert "with an answer; give --val" in capsys.readouterr().err
    else:
        go(*rl, *data, "--out", tmp_path / "p", expect=2)
        assert "--anchor 0" in capsys.readouterr().err


def test_a_dry_run_explores(runs, tmp_path, capsys, monkeypatch):
    """One batch of rollouts and its gradients, as if all groups had a signal, beside one of the anchor; nothing is written."""
    seen, loss = [], train.policy_loss
    monkeypatch.setattr(train, "policy_loss", lambda *a: seen.append(len(a[5].z)) or loss(*a))
    monkeypatch.setattr(train, "judge", lambda cfg, chains, golds: (torch.ones(len(golds), cfg.G), {"acc": torch.tensor(1.0)}))
    go(*RL, "--anchor", 1, "--init", runs[0], "--out", tmp_path / "never", "--dry-run")
    shown = capsys.readouterr().out
    assert seen == [16] and "those of the start" in shown and shown.count("one step") == 2 and "4 longest questions × 4 rollouts" in shown
    go(*RL, "--anchor", 0, "--init", runs[0], "--out", tmp_path / "never", "--dry-run")
    assert capsys.readouterr().out.count("one step") == 1 and not (tmp_path / "never").exists()


def test_the_anchor_is_of_the_stage_that_was_taught(tmp_path, monkeypatch):
    go(*SMALL, "--out", tmp_path / "sft", "--epochs", ".1,.1,0,0")
    seen, gradients = [], train.sft_gradients
    monkeypatch.setattr(train, "sft_gradients", lambda *a: seen.append(a[4]) or gradients(*a))
    monkeypatch.setattr(train, "judge", lambda cfg, chains, golds: (torch.eye(cfg.G)[: len(golds)], {}))
    go(*RL, "--updates", 1, "--anchor", 1, "--init", tmp_path / "sft", "--out", tmp_path / "rl")
    assert seen == [1]


def test_no_signal_changes_nothing_and_says_so(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "judge", lambda cfg, chains, golds: (torch.ones(len(golds), cfg.G), {}))
    go(*RL, "--updates", 51, "--init", runs[0], "--out", tmp_path)
    shown = capsys.readouterr().out
    assert shown.count("warning: for 50 batches") == 1 and shown.count("sigma 0.") == shown.count("rl  step ") == 26  # what it says to look at
    a, b = (load_file(d / "final" / "model.safetensors") for d in (runs[0], tmp_path))
    assert all(torch.equal(a[k], b[k]) for k in a)


# ---- SFT from answers alone ---------------------------------------------------------------------------------------------

def test_free_rows_stop_where_generation_does_and_teach_their_answer(runs):
    from minatp.rollout import rollout, sft_losses
    model, tokenizer = load_model(runs[0])
    torch.nn.init.normal_(model.stop_head[2].weight, std=3.0, generator=torch.Generator().manual_seed(0))
    ps = problems.generate("answers", 12, 1)
    rows = data.encode(ps, tokenizer, model.K, 512, free=True)
    batch = data.collate(rows, model.K + 1, model)
    assert batch.free.all() and batch.counts == {"enc": sum(len(r.answer) for r in rows), "dec": 0, "kl": 0, "stop": 0, "free": 12}
    from minatp.rollout import think
    n_latent = think(model, batch)[1]
    r = rollout(model, batch.prompt, batch.prompt_mask, 3)
    assert torch.equal(n_latent, r.n_latent)
    sums = sft_losses(model, batch)
    assert sums["enc"] > 0 and not sums["kl"] and not sums["stop"] and "dec" not in sums
    sums["enc"].backward()
    assert model.latent_head.gaussian.weight.grad[: model.policy.cfg.n_embd].norm() > 0 or not n_latent.any()


def test_sft_takes_answers_alone(tmp_path):
    go(*SMALL, "--out", tmp_path, "--answers", 40, "--answers-share", 0.5)
    assert json.loads((tmp_path / "summary.json").read_text())["method"] == "atp"


def test_a_frozen_decoder_is_cast_once():
    """autocast keeps its copies of weights that ask for a gradient alone: without cast_once a frozen φ is cast anew for every word."""
    cfg = LlamaConfig(vocab_size=11, n_layer=2, n_head=2, n_kv_head=1, n_embd=8, n_inner=12, head_dim=4, rope_scaling=None, bos=0, eos=(1,))
    decoder = Llama(cfg).init_weights(torch.Generator().manual_seed(0)).requires_grad_(False)
    casts = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].shape in [p.shape for p in decoder.parameters() if p.dim() == 2]:
                casts.append(args[0].data_ptr())
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Watch():
        texts = read_thoughts(decoder, torch.randn(3, 2, 8), eos=-1, max_new=5)
    assert [len(t) for t in texts] == [5, 5, 5]
    weights = [p.data_ptr() for p in decoder.parameters() if p.dim() == 2]
    assert sorted(p for p in casts if p in weights) == sorted(weights)
    assert not any(p.requires_grad for p in decoder.parameters())
