"""Every number of the conformance fixture, through the code that trains and samples.

The fixture was computed in float64, one sequence at a time, without padding or a cache
(fixtures/conformance/README.md). Here everything is float32, batched, padded and cached.
MINATP_CONFORMANCE names another folder of the same form.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minatp import chain, data, rl, rollout, sft
from minatp.decoder import read_thoughts
from minatp.problems import Problem
from minatp.run.huggingface import fill, load_model, read_config

from runs import MODEL

ROOT = Path(os.environ.get("MINATP_CONFORMANCE", MODEL.parent))
GOLD = json.loads((ROOT / "golden.json").read_text())
TENSORS = load_file(ROOT / "golden.safetensors")

QUESTIONS = [sample["question"] for sample in GOLD["samples"]]
STAGES = range(GOLD["max_steps"] + 2)
LATENT_STAGES = STAGES[1:]


# ---- the fixture's model, and comparisons --------------------------------------------------------


@pytest.fixture(scope="module")
def loaded():
    """(model, tokenizer): the fixture's two directories and heads, loaded as a user's are."""
    c, K = GOLD["c_latent"], GOLD["max_steps"]
    model, tokenizer = load_model(ROOT / "policy", c=c, K=K)
    as_policy, _ = load_model(ROOT / "decoder", c=c, K=K)
    model.decoder = as_policy.policy

    heads = stack_gaussian(load_file(ROOT / "heads.safetensors"))
    for name in ("latent_head", "stop_head"):
        fill(dict(getattr(model, name).named_parameters()), with_prefix(heads, name + "."), ROOT)
    return model, tokenizer


@pytest.fixture
def model(loaded):
    return loaded[0]


@pytest.fixture
def tokenizer(loaded):
    return loaded[1]


@pytest.fixture
def rows(model, tokenizer):
    """The fixture's problems, as data.Encoded."""
    return data.encode([Problem(**sample) for sample in GOLD["samples"]], tokenizer, model)


def with_prefix(tensors, prefix):
    """Those whose name begins with a prefix, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def stack_gaussian(heads):
    """Stack Wμ on Wσ, which the fixture keeps apart, as `latent_head.gaussian` does."""
    heads = dict(heads)
    for part in ("weight", "bias"):
        mean = heads.pop(f"latent_head.mean.{part}")
        log_var = heads.pop(f"latent_head.log_var.{part}")
        heads[f"latent_head.gaussian.{part}"] = torch.cat((mean, log_var))
    return heads


def split_gaussian(grads):
    """Undo `stack_gaussian`, for gradients, which may be None."""
    grads = dict(grads)
    for part in ("weight", "bias"):
        both = grads.pop(f"latent_head.gaussian.{part}")
        mean, log_var = (None, None) if both is None else both.chunk(2)
        grads[f"latent_head.mean.{part}"] = mean
        grads[f"latent_head.log_var.{part}"] = log_var
    return grads


def assert_close(actual, expected, tolerance, what):
    """Compare two tensors by the norm of their difference."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    difference = (actual.detach().double() - expected).norm()
    error = difference / expected.norm().clamp(min=1e-12)
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


def assert_each_close(actual, expected, what):
    """Compare every number by itself, to 1e-4 relative: a norm would hide the small ones."""
    expected = torch.as_tensor(expected).tolist()
    assert actual.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5), what


# ---- files, tokens and logits --------------------------------------------------------------------


def test_both_rope_spellings_read_the_same():
    paths = [ROOT / name / "config.json" for name in ("policy", "decoder")]
    policy, decoder = (json.loads(path.read_text()) for path in paths)
    assert ("rope_parameters" in policy) != ("rope_parameters" in decoder)

    policy, decoder = (read_config(path) for path in paths)
    assert policy.rope_theta == decoder.rope_theta
    assert policy.rope_scaling == decoder.rope_scaling


def test_added_tokens(model, tokenizer):
    assert tokenizer.bos == GOLD["bos"]
    assert tokenizer.eos[0] == GOLD["eos"]
    assert tokenizer.start == GOLD["start"]
    assert tokenizer.latent == GOLD["latent"]
    assert tokenizer.end == GOLD["end"]
    assert model.policy.cfg.vocab_size == GOLD["vocab_size"]
    assert model.decoder.cfg.vocab_size == GOLD["vocab_size"]


@pytest.mark.parametrize("pad", [0, 5])
def test_logits(model, pad):
    llama = model.policy
    ids = TENSORS["lm.ids"][None]
    x = torch.cat((torch.randn(1, pad, llama.cfg.n_embd), llama.embed(ids)), 1)
    mask = torch.arange(x.shape[1])[None] >= pad

    # under autograd, in one pass
    h = llama(x, mask, llama.cache(*x.shape[:2]))
    assert_close(llama.logits(h[0, pad:]), TENSORS["lm.logits"], 1e-5, "in one pass")

    # without autograd, through the preallocated cache in three pieces
    sizes = (9 + pad, 1, x.shape[1] - 10 - pad)
    pieces = []
    with torch.no_grad():
        cache = llama.cache(*x.shape[:2])
        for x_piece, mask_piece in zip(x.split(sizes, 1), mask.split(sizes, 1)):
            pieces.append(llama(x_piece, mask_piece, cache))
    h = torch.cat(pieces, 1)
    assert_close(llama.logits(h[0, pad:]), TENSORS["lm.logits"], 1e-5, "in pieces")


# ---- stage 1 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_token_ids(model, tokenizer, rows, stage):
    gold = GOLD["sft"][str(stage)]
    batch = data.collate(rows, stage, model)
    assert batch.thinking.n_latent.tolist() == gold["latents"]
    for b, expected in enumerate(gold["sequences"]):
        prompt = batch.prompt[b][batch.prompt_mask[b]].tolist()
        latents = [tokenizer.latent] * gold["latents"][b]
        target = batch.text.target[b][batch.text.target[b] >= 0].tolist()
        assert [*prompt, *latents, tokenizer.end, *target] == expected
        assert len(target) == gold["labels_at_end"][b]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", [4, 1])
def test_sft_losses_and_gradients(model, rows, stage, size):
    """One batch of four problems, or four of one, accumulated."""
    eps = TENSORS[f"sft{stage}.eps"].float()
    counts = data.collate(rows, stage, model).counts
    means = {"enc": 0.0, "dec": 0.0, "stop": 0.0, "kl": 0.0}
    model.zero_grad()
    for i in range(0, len(rows), size):
        batch = data.collate(rows[i : i + size], stage, model)
        losses = sft.sft_losses(model, batch, eps[i : i + size])
        losses = {name: loss for name, loss in losses.items() if name in means}  # of the paper
        sft.total_loss(losses, counts, {"kl": GOLD["beta"]}).backward()
        for name, value in losses.items():
            means[name] += value.item() / max(1, counts[name])

    gold = GOLD["sft"][str(stage)]
    for name, mean in means.items():
        assert mean == pytest.approx(gold[name], rel=1e-4), name
    total = means["enc"] + means["dec"] + means["stop"] + GOLD["beta"] * means["kl"]
    assert total == pytest.approx(gold["total"], rel=1e-4)
    check_gradients(model, stage)


def check_gradients(model, stage):
    grads = split_gaussian({name: p.grad for name, p in model.named_parameters()})
    for name, expected in with_prefix(TENSORS, f"sft{stage}.grad.").items():
        assert_close(grads[name], expected, 1e-3, name)

    # in stage 0 everything is text, and only the policy learns
    if stage == 0:
        for name, grad in grads.items():
            if not name.startswith("policy."):
                assert grad is None or grad.norm() < 1e-6, name


@pytest.mark.parametrize("stage", LATENT_STAGES)
def test_proposals(model, rows, stage):
    batch = data.collate(rows, stage, model)
    h, cache = sft.read_batch(model.policy, batch)
    thought, _ = sft.walk_batch(model, batch, h, cache, TENSORS[f"sft{stage}.eps"].float())
    for b in range(len(rows)):
        mu, logvar = TENSORS[f"sft{stage}.mu{b}"], TENSORS[f"sft{stage}.logvar{b}"]
        n = len(mu)
        assert n == batch.thinking.n_latent[b] + batch.thinking.has_stop[b]
        assert_close(thought.mu[b, :n], mu, 1e-4, f"mu{b}")
        assert_close(thought.logvar[b, :n], logvar, 1e-4, f"logvar{b}")


# ---- stage 2, and generation ---------------------------------------------------------------------


def gold_rollout(model):
    """The fixture's chains as a Rollout, without what is to be computed."""
    gold_chains = GOLD["rl"]
    longest = max(len(gold["answer_ids"]) for gold in gold_chains)
    chains = rollout.Rollout.empty(model, len(gold_chains), longest, noise=None, device="cpu")
    for b, gold in enumerate(gold_chains):
        n_step, ids = gold["steps_used"], gold["answer_ids"]
        z = TENSORS[f"rl{b}.z"].float()
        stopped = n_step < model.K

        # the used latents, then the candidate dropped at a stop
        assert len(z) == model.c * n_step + stopped
        assert len(TENSORS[f"rl{b}.stop"]) == len(z[:: model.c])
        chains.z[b, : len(z)] = z
        chains.n_latent[b] = model.c * n_step
        chains.stopped[b] = stopped
        chains.token[b, : len(ids)] = torch.tensor(ids)
        chains.n_token[b] = len(ids)
    return chains


def test_log_probabilities_of_rollouts(model, tokenizer):
    questions = [QUESTIONS[gold["sample"]] for gold in GOLD["rl"]]
    prompt, prompt_mask = data.left_pad(tokenizer.prompts(questions), tokenizer.end)
    logp = rl.log_probs(model, prompt, prompt_mask, gold_rollout(model))
    for b in range(len(questions)):
        for row, name in (
            (logp.logp_z[b], "gauss"),
            (logp.logp_stop[b], "stop"),
            (logp.logp_token[b], "answer"),
        ):
            expected = TENSORS[f"rl{b}.{name}"]
            n = len(expected)
            assert_each_close(row[:n], expected, f"rl{b}.{name}")
            assert (row[n:] == 0).all()


def smallest_margin(policy, prompt, prompt_mask, z, end, ids):
    """By how much the likeliest word led the second, at the closest of the words `ids` of a chain.

    prompt, prompt_mask (1, Tq); z (1, T, D): its latents; end: the id of <|end-latent|>.
    """
    text = policy.embed(torch.tensor([[end, *ids[:-1]]]))
    x = torch.cat((z, text), 1)
    _, cache = chain.read_prompt(policy, prompt, prompt_mask, x.shape[1])
    h = policy(x, torch.ones(x.shape[:2], dtype=torch.bool), cache, last=len(ids))
    first, second = policy.logits(h).topk(2).values.unbind(-1)
    return (first - second).detach().amin(1)


def up_to_eos(ids, eos):
    return ids[: ids.index(eos)] if eos in ids else ids


def test_generation_and_decoded_steps(model, tokenizer):
    answers = [gold["answer_ids"] for gold in GOLD["generate"]]
    readings = [ids for gold in GOLD["generate"] for ids in gold["decoded_step_ids"]]
    longest_answer = max(map(len, answers))
    longest_reading = max(map(len, readings), default=1)
    prompt, prompt_mask = data.left_pad(tokenizer.prompts(QUESTIONS), tokenizer.end)

    chains = rollout.rollout(model, prompt, prompt_mask, longest_answer)
    for b, gold in enumerate(GOLD["generate"]):
        assert chains.n_latent[b] == gold["latents"]
        assert chains.token[b, : chains.n_token[b]].tolist() == gold["answer_ids"]

        n_decision = len(gold["stop_probs"])
        assert_each_close(chains.stop_prob[b, :n_decision], gold["stop_probs"], f"stop{b}")
        assert chains.stop_prob[b, n_decision:].isnan().all()

        z = chains.z[b, : gold["latents"]]
        margin = smallest_margin(
            model.policy, prompt[b : b + 1], prompt_mask[b : b + 1], z[None], model.end,
            gold["answer_ids"],
        )  # fmt: skip
        assert_each_close(margin, [gold["smallest_logit_margin"]], f"margin{b}")

        z = z.unflatten(0, (-1, model.c))  # (steps, c, D)
        eos = tokenizer.eos[0]
        texts = read_thoughts(model.decoder, z, eos, longest_reading)
        assert texts == [up_to_eos(ids, eos) for ids in gold["decoded_step_ids"]]
