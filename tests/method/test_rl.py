"""Stage 2: log-probabilities against enumeration and finite differences, advantages, clipping."""

import math
from dataclasses import dataclass

import pytest
import torch

from minatp.latent import ATP
from minatp.llama import LlamaConfig
from minatp.rl import LogProbs, advantages, kl_to_start, log_probs, surrogate
from minatp.rollout import Rollout

# A vocabulary of 4 words, of which 1 is eos; 2 latents a step, 2 steps and 2 words at most
V, C, K, MAX_NEW = 4, 2, 2, 2
EOS = 1
D = 8


@dataclass
class Outcome:
    """One way in which a rollout can end."""

    n_step: int  # latent steps used
    words: tuple

    @property
    def stopped(self):
        return self.n_step < K


def all_outcomes():
    words = [(EOS,)]
    for first in (0, 2, 3):
        words += [(first, second) for second in range(V)]
    return [Outcome(n_step, w) for n_step in range(K + 1) for w in words]


def as_rollout(model, z, outcomes):
    """The Rollout of outcomes whose latents are all z (1, cK, D)."""
    B = len(outcomes)
    chains = Rollout.empty(model, B, MAX_NEW, noise=None, device="cpu")
    chains.z = z.expand(B, -1, -1).clone()
    for b, outcome in enumerate(outcomes):
        n = len(outcome.words)
        chains.n_latent[b] = C * outcome.n_step
        chains.stopped[b] = outcome.stopped
        chains.token[b, :n] = torch.tensor(outcome.words)
        chains.n_token[b] = n
    chains.logp_z = chains.logp_z.double()
    chains.logp_stop = chains.logp_stop.double()
    return chains


@pytest.fixture
def model():
    """In float64, with large random weights."""
    torch.manual_seed(0)
    cfg = LlamaConfig(
        vocab_size=V,
        n_layer=2,
        n_head=2,
        n_kv_head=1,
        n_embd=D,
        n_inner=12,
        head_dim=4,
        rope_theta=50.0,
        rope_scaling=None,
        bos=0,
        eos=(EOS,),
    )
    model = ATP(cfg, c=C, K=K, decode=False).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    model.end = 3
    return model


@pytest.fixture
def prompt():
    return torch.tensor([[2, 0, 2]])


@pytest.fixture
def prompt_mask(prompt):
    return torch.ones_like(prompt, dtype=torch.bool)


def flat_gradient(model):
    """The gradient of all parameters, as one vector."""
    grads = []
    for p in model.parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads.append(grad.flatten())
    return torch.cat(grads)


# ---- log-probabilities ---------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_policy_gradient_is_the_gradient_of_the_enumerated_expectation(
    model, prompt, prompt_mask, baseline
):
    """With z = μ (ε = 0, the path estimator) only stops and words are sampled. They are enumerated,
    so E[R] and its gradient are known.
    """
    outcomes = all_outcomes()
    n = len(outcomes)
    R = torch.rand(n, generator=torch.Generator().manual_seed(1)).double()
    zeros = torch.zeros(n, C * K, D, dtype=torch.float64)
    chains = as_rollout(model, zeros[:1], outcomes)
    new = log_probs(model, prompt, prompt_mask, chains, group=n, eps=zeros)
    logp = new.logp_stop.sum(1) + new.logp_token.sum(1)  # (n,)

    # a distribution: nothing is left out or counted twice
    assert logp.exp().sum().item() == pytest.approx(1, abs=1e-9)

    (logp.exp() * R).sum().backward(retain_graph=True)
    gradient = flat_gradient(model)
    assert gradient.norm() > 1e-3

    # the surrogate, weighted with each outcome's probability
    model.zero_grad()
    advantage = (R - baseline)[:, None]
    loss, _ = surrogate(logp[:, None], logp[:, None].detach(), advantage)
    (logp.exp().detach() * loss[:, 0]).sum().backward()
    torch.testing.assert_close(-flat_gradient(model), gradient, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("estimator", ["score", "path"])
def test_log_probabilities_differentiate_as_finite_differences_say(
    model, prompt, prompt_mask, estimator
):
    outcomes = all_outcomes()[::3]
    n = len(outcomes)
    g = torch.Generator().manual_seed(2)
    z = torch.randn(1, C * K, D, generator=g).double()
    eps = torch.randn(1, C * K, D, generator=g).double()
    weight = torch.randn(n, C * K + K + MAX_NEW, generator=g).double()
    eps = eps.expand(n, -1, -1) if estimator == "path" else None

    def weighted_sum():
        chains = as_rollout(model, z, outcomes)
        logp = log_probs(model, prompt, prompt_mask, chains, group=n, eps=eps)
        return (weight * torch.cat((logp.logp_z, logp.logp_stop, logp.logp_token), 1)).sum()

    weighted_sum().backward()
    for name, p in model.named_parameters():
        for i in torch.randint(p.numel(), (3,), generator=g).tolist():
            derivative = 0.0 if p.grad is None else p.grad.view(-1)[i].item()
            expected = finite_difference(weighted_sum, p, i)
            assert derivative == pytest.approx(expected, rel=1e-4, abs=1e-6), name


@torch.no_grad()
def finite_difference(f, p, i, h=1e-6):
    """The derivative of f() with respect to the i-th number of p."""
    values = p.view(-1)
    values[i] += h
    above = f()
    values[i] -= 2 * h
    below = f()
    values[i] += h
    return ((above - below) / (2 * h)).item()


def test_the_kl_to_oneself_is_zero_and_to_another_is_not(model, prompt, prompt_mask):
    z = torch.randn(1, C * K, D).double()
    chains = as_rollout(model, z, all_outcomes())
    start = log_probs(model, prompt, prompt_mask, chains, group=len(chains.z))
    assert kl_to_start(start, start, chains.candidate).item() == pytest.approx(0, abs=1e-9)

    with torch.no_grad():
        model.latent_head.gaussian.bias += 0.1
    moved = log_probs(model, prompt, prompt_mask, chains, group=len(chains.z))
    assert kl_to_start(moved, start, chains.candidate) > 0.1


@pytest.mark.parametrize("r", [-20.0, -1.0, 0.0, 5.0, 9.9, 10.1, 30.0, 1000.0])
def test_the_kl_pulls_back_from_any_distance(r):
    """Of a word that has become less likely by e^r: exp(r) − 1 − r, past 10 its tangent."""
    nothing = torch.zeros(1, 1, dtype=torch.float64)
    latents = nothing[..., None]
    logp = nothing.clone().requires_grad_()
    new = LogProbs(nothing, nothing, logp, latents, latents)
    start = LogProbs(nothing, nothing, nothing + r, latents, latents)
    kl = kl_to_start(new, start, candidate=nothing.bool())
    kl.backward()

    at = min(r, 10.0)
    expected = math.exp(at) - 1 - at + (math.exp(at) - 1) * (r - at)
    assert kl.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert logp.grad.item() == pytest.approx(1 - math.exp(at), rel=1e-12, abs=1e-12)


def test_the_kl_of_small_differences_is_not_rounded_more_than_its_formula():
    """In float32, where r is the noise of training: exp(r) − 1 − r, to the bit."""
    nothing, r = torch.zeros(1, 500), 0.05 * torch.randn(1, 500)
    latents = torch.zeros(1, 500, 1)
    new = LogProbs(nothing, nothing, nothing, latents, latents)
    start = LogProbs(nothing, nothing, r, latents, latents)
    assert kl_to_start(new, start, nothing.bool()) == (r.exp() - 1 - r).sum()


# ---- advantages and the surrogate ----------------------------------------------------------------


def test_advantages():
    R = torch.tensor([[1.0, 0, 0, 1], [2, 2, 2, 2], [1.6, 1.6, 1.6, 0]])
    advantage = advantages(R)
    assert torch.equal(advantage[0], torch.tensor([0.5, -0.5, -0.5, 0.5]))
    assert not advantage[1].any()

    # rloo: less the mean of the three others
    others = torch.tensor([1 / 3, 2 / 3, 2 / 3, 1 / 3])
    torch.testing.assert_close(advantages(R, "rloo")[0], R[0] - others)

    normalised = advantages(R, normalise=True)
    torch.testing.assert_close(normalised[2].std(), torch.tensor(1.0), rtol=1e-4, atol=1e-4)


def test_rounding_in_the_mean_is_no_signal():
    thirds = torch.full((1, 8), 1 / 3)
    assert not advantages(thirds, normalise=True).any()


@pytest.mark.parametrize(
    "advantage, passes",
    [
        (1.0, [True, False, True, False]),  # a better chain is not made likelier without end
        (-1.0, [True, True, False, False]),  # nor a worse one less likely
    ],
)
def test_clipping_stops_the_gradient_where_it_should(advantage, passes):
    logp = torch.tensor([[0.0, 0.5, -0.5, 5.0]], requires_grad=True)
    loss, clamped = surrogate(logp, torch.zeros(1, 4), torch.tensor([[advantage]]))
    [grad] = torch.autograd.grad(loss.sum(), logp)
    assert (grad != 0).tolist() == [passes]
    assert clamped.tolist() == [[False, True, True, True]]
