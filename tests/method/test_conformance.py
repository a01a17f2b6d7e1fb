"""Every number of the conformance fixture, through the code that trains and samples: batched, padded, cached, float32.

MINATP_CONFORMANCE names another folder of the same form.
"""
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minatp import checkpoint, data, rollout
from minatp.explain import read_thoughts
from minatp.loss import total_loss

ROOT = Path(os.environ.get("MINATP_CONFORMANCE", Path(__file__).parent / "fixtures" / "conformance"))
GOLD = json.loads((ROOT / "golden.json").read_text())
T = load_file(ROOT / "golden.safetensors")


@pytest.fixture(scope="module")
def world():
    """(model, tokens): the fixture's two directories and heads, loaded by the code that loads a user's."""
    c, K = GOLD["c_latent"], GOLD["max_steps"]
    model, tokenizer = load_model(ROOT / "policy", c=c, K=K)
    other, _ = load_model(ROOT / "decoder", c=c, K=K)
    model.decoder = other.policy
    heads = joined(load_file(ROOT / "heads.safetensors"))
    for name in ("latent_head", "stop_head"):
        checkpoint.fill(getattr(model, name), {k.removeprefix(name + "."): v for k, v in heads.items() if k.startswith(name)}, ROOT)
    return model, tokenizer


def joined(tensors):
    """Wμ and Wσ, which the fixture keeps apart, as the one matrix that they are here."""
    for name in [n for n in tensors if "latent_head.mean." in n]:
        tensors[name.replace("mean", "gaussian")] = torch.cat((tensors.pop(name), tensors.pop(name.replace("mean", "log_var"))))
    return tensors


def encoded(world):
    model, tokenizer = world
    return data.encode([data.Problem(**s) for s in GOLD["samples"]], tokenizer, model.K, model.policy.cfg.block_size)


def close(got, want, tol, what):
    want = torch.as_tensor(want, dtype=torch.float64)
    error = (got.detach().double() - want).norm() / want.norm().clamp(min=1e-12)
    assert error <= tol, f"{what}: relative error {error:.2e}"


def each_close(got, want, what):
    """Every number by itself, to 1e-4 relative: a norm would hide the small ones."""
    assert got.tolist() == pytest.approx(torch.as_tensor(want).tolist(), rel=1e-4, abs=1e-5), what


def test_both_rope_spellings_read_the_same():
    a, b = (json.loads((ROOT / d / "config.json").read_text()) for d in ("policy", "decoder"))
    assert ("rope_parameters" in a) != ("rope_parameters" in b)
    a, b = (read_config(ROOT / d / "config.json") for d in ("policy", "decoder"))
    assert (a.rope_theta, a.rope_scaling) == (b.rope_theta, b.rope_scaling)


def test_added_tokens(world):
    model, tokenizer = world
    assert (tokenizer.bos, tokenizer.eos[0]) == (GOLD["bos"], GOLD["eos"])
    assert (tokenizer.start, tokenizer.latent, tokenizer.end) == (GOLD["start"], GOLD["latent"], GOLD["end"])
    assert model.policy.cfg.vocab_size == model.decoder.cfg.vocab_size == GOLD["vocab_size"]


@pytest.mark.parametrize("pad", [0, 5])
def test_logits(world, pad):
    lm, ids = world[0].policy, T["lm.ids"][None]
    x = torch.cat((torch.randn(1, pad, lm.cfg.n_embd), lm.embed(ids)), 1)
    valid = torch.arange(x.shape[1])[None] >= pad
    close(lm.logits(lm(x, valid, lm.cache(*x.shape[:2]))[0, pad:]), T["lm.logits"], 1e-5, "whole")
    with torch.no_grad():  # the same, by the preallocated cache in three pieces
        cache, sizes = lm.cache(*x.shape[:2]), (9 + pad, 1, x.shape[1] - 10 - pad)
        h = torch.cat([lm(p, v, cache) for p, v in zip(x.split(sizes, 1), valid.split(sizes, 1))], 1)
    close(lm.logits(h[0, pad:]), T["lm.logits"], 1e-5, "in pieces")


@pytest.mark.parametrize("stage", range(GOLD["max_steps"] + 2))
def test_token_ids(world, stage):
    model, tokenizer = world
    gold, batch = GOLD["sft"][str(stage)], data.collate(encoded(world), stage, model)
    assert batch.n_latent.tolist() == gold["latents"]
    for b, want in enumerate(gold["sequences"]):
        prompt, target = batch.prompt[b][batch.prompt_mask[b]].tolist(), batch.target[b][batch.target[b] >= 0].tolist()
        assert prompt + [tokenizer.latent] * gold["latents"][b] + [tokenizer.end] + target == want
        assert len(target) == gold["labels_at_end"][b]


@pytest.mark.parametrize("stage", range(GOLD["max_steps"] + 2))
@pytest.mark.parametrize("micro", [4, 1])
def test_sft_losses_and_gradients(world, stage, micro):
    model, tokenizer = world
    rows, gold, eps = encoded(world), GOLD["sft"][str(stage)], T[f"sft{stage}.eps"].float()
    counts = data.collate(rows, stage, model).counts
    model.zero_grad()
    total = {"enc": 0.0, "dec": 0.0, "stop": 0.0, "kl": 0.0}
    for i in range(0, len(rows), micro):  # one batch of four, or four accumulated
        batch = data.collate(rows[i:i + micro], stage, model)
        sums = rollout.sft_losses(model, batch, eps[i:i + micro])
        total_loss(sums, counts, GOLD["beta"]).backward()
        for name, value in sums.items():
            total[name] += value.item() / max(1, counts[name])
    for name in total:
        assert total[name] == pytest.approx(gold[name], rel=1e-4), name
    assert sum(total[n] * (GOLD["beta"] if n == "kl" else 1) for n in total) == pytest.approx(gold["total"], rel=1e-4)
    want = {k.removeprefix(f"sft{stage}.grad."): v for k, v in T.items() if k.startswith(f"sft{stage}.grad.")}
    grads = {n: p.grad for n, p in model.named_parameters()}
    for part in ("weight", "bias"):
        g = grads.pop(f"latent_head.gaussian.{part}")
        grads |= zip((f"latent_head.mean.{part}", f"latent_head.log_var.{part}"), (None, None) if g is None else g.chunk(2))
    for name, g in want.items():
        close(grads[name], g, 1e-3, name)
    assert all(g is None or g.norm() < 1e-6 for n, g in grads.items() if stage == 0 and not n.startswith("policy."))


@pytest.mark.parametrize("stage", range(1, GOLD["max_steps"] + 2))
def test_proposals(world, stage):
    model, tokenizer = world
    batch = data.collate(encoded(world), stage, model)
    thought = rollout.think(model, batch, T[f"sft{stage}.eps"].float())[0]
    for i in range(len(GOLD["samples"])):
        n = len(T[f"sft{stage}.mu{i}"])
        assert n == batch.n_latent[i] + batch.asks[i]
        close(thought.mu[i, :n], T[f"sft{stage}.mu{i}"], 1e-4, f"mu{i}")
        close(thought.logvar[i, :n], T[f"sft{stage}.logvar{i}"], 1e-4, f"logvar{i}")


def test_rollout_log_probabilities(world):
    model, tokenizer = world
    c, K, n = model.c, model.K, len(GOLD["rl"])
    width = max(len(g["answer_ids"]) for g in GOLD["rl"])
    prompt, valid = data.left_pad([tokenizer.prompt(GOLD["samples"][g["sample"]]["question"]) for g in GOLD["rl"]], tokenizer.end)
    zeros = lambda *s: torch.zeros(n, *s)
    r = rollout.Rollout(zeros(c * K, model.policy.cfg.n_embd), None, zeros().long(), zeros().bool(), zeros(K),
                        zeros(width).long() - 1, zeros().long(), zeros(c * K), zeros(K), zeros(width))
    for i, g in enumerate(GOLD["rl"]):
        z = T[f"rl{i}.z"].float()
        assert len(z) == c * g["steps_used"] + (g["steps_used"] < K) and len(T[f"rl{i}.stop"]) == len(z[::c])
        r.z[i, : len(z)], r.n_latent[i], r.stopped[i] = z, c * g["steps_used"], len(z) > c * g["steps_used"]
        r.token[i, : len(g["answer_ids"])], r.n_token[i] = torch.tensor(g["answer_ids"]), len(g["answer_ids"])
    logp_z, logp_stop, logp_token = rollout.score(model, prompt, valid, r)[:3]
    for i in range(n):
        for got, name in ((logp_z, "gauss"), (logp_stop, "stop"), (logp_token, "answer")):
            want = T[f"rl{i}.{name}"]
            each_close(got[i, : len(want)], want, f"rl{i}.{name}")
            assert (got[i, len(want):] == 0).all()


def test_generation_and_decoded_steps(world, monkeypatch):
    model, tokenizer = world
    margins, choose = torch.full((len(GOLD["samples"]),), torch.inf), rollout.choose

    def watched(logits, noise, rows, at):  # by how much the likeliest word leads
        first, second = logits.topk(2).values.unbind(-1)
        margins[rows] = margins[rows].minimum(first - second)
        return choose(logits, noise, rows, at)

    monkeypatch.setattr(rollout, "choose", watched)
    prompt, valid = data.left_pad([tokenizer.prompt(s["question"]) for s in GOLD["samples"]], tokenizer.end)
    longest = lambda key: max((len(ids) for g in GOLD["generate"] for ids in key(g)), default=1)
    r = rollout.rollout(model, prompt, valid, max_new=longest(lambda g: [g["answer_ids"]]))
    each_close(margins, [g["smallest_logit_margin"] for g in GOLD["generate"]], "smallest_logit_margin")
    for i, g in enumerate(GOLD["generate"]):
        assert r.n_latent[i] == g["latents"]
        each_close(r.stop_prob[i, : len(g["stop_probs"])], g["stop_probs"], f"stop{i}")
        assert r.stop_prob[i, len(g["stop_probs"]):].isnan().all()
        assert r.token[i, : r.n_token[i]].tolist() == g["answer_ids"]
        steps = r.z[i, : g["latents"]].view(-1, model.c, model.policy.cfg.n_embd)
        texts = read_thoughts(model.decoder, steps, tokenizer.eos[0], max_new=longest(lambda g: g["decoded_step_ids"]))
        for text, want in zip(texts, g["decoded_step_ids"]):
            assert text == (want[: want.index(tokenizer.eos[0])] if tokenizer.eos[0] in want else want)
        assert len(texts) == len(g["decoded_step_ids"])
