"""Generation: its results depend on nothing but the problem, and finished chains cost nothing."""

from dataclasses import fields

import pytest
import torch

from kernels.sampling import sample
from minatp import data, problems
from minatp.decoder import read_thoughts
from minatp.llama import KVCache, Llama
from minatp.rl import log_probs
from minatp.rollout import Forced, Noise, rollout
from minatp.run.evaluate import solve
from minatp.sft import read_as_text, sft_losses
from minatp.tools.count import count

from small import make_ragged, padded_prompts, small_model


@pytest.fixture
def loaded():
    """(model, tokenizer): random weights, so that chains stop and end at all lengths."""
    return make_ragged(*small_model())


@pytest.fixture
def model(loaded):
    return loaded[0]


@pytest.fixture
def tokenizer(loaded):
    return loaded[1]


def prompts_of(tokenizer, n, seed):
    """Prompts (lists of ids) of the test set's problems."""
    return tokenizer.prompts([p.question for p in problems.generate("test", n, seed)])


def draw(model, *args, **options):
    """Noise.draw, on the CPU."""
    return Noise.draw(model, *args, **options).to("cpu")


def test_no_word_of_probability_0_is_drawn(model, monkeypatch):
    """Even if the generator gives the least number that it can."""
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.zeros(shape))
    u = draw(model, 1, 1, seed=0).u_token[0]
    word, logp = sample(torch.tensor([[-torch.inf, 0.0, 0.0]]), u)
    assert word == 1
    assert logp.isfinite()


@pytest.mark.parametrize("sampled", [False, True])
def test_a_result_does_not_depend_on_its_neighbours(model, tokenizer, sampled):
    prompts = prompts_of(tokenizer, 17, seed=3)
    noise = Noise.draw(model, 17, 12, seed=5) if sampled else None
    together = solve(model, tokenizer, prompts, 12, 17, noise)

    # ragged, or nothing is tested
    assert len({chain.n_latent for chain in together}) > 1
    assert len({chain.n_token for chain in together}) > 1
    for batch_size in (1, 4):
        for a, b in zip(together, solve(model, tokenizer, prompts, 12, batch_size, noise)):
            assert (a.text, a.thoughts, a.ended) == (b.text, b.thoughts, b.ended)
            assert (a.n_latent, a.n_token) == (b.n_latent, b.n_token)
            assert a.sigma == pytest.approx(b.sigma, rel=1e-4)
            assert a.stop_prob == pytest.approx(b.stop_prob, rel=1e-3)


@pytest.mark.parametrize("group, spread", [(1, 1.0), (3, 2.5)])
def test_log_probs_are_what_the_rollout_recorded(model, tokenizer, group, spread):
    prompt, prompt_mask = padded_prompts(tokenizer, 9, seed=4)
    noise = draw(model, 9 * group, 6, seed=1, temperature=0.7, spread=spread)
    chains = rollout(model, prompt, prompt_mask, 6, noise, group)
    assert chains.stopped.any()
    assert not chains.stopped.all()

    logp = log_probs(model, prompt, prompt_mask, chains, group)
    recorded = (chains.logp_z, chains.logp_stop, chains.logp_token)
    for actual, expected in zip((logp.logp_z, logp.logp_stop, logp.logp_token), recorded):
        torch.testing.assert_close(actual.detach(), expected, rtol=1e-4, atol=1e-4)


def test_finished_rows_cost_nothing(model, tokenizer, monkeypatch):
    """Work is counted: of each row the policy reads its own latents and tokens, however long the
    longest row is.
    """
    calls = []  # of Llama.forward: (which LLaMA, positions read)
    forward = Llama.forward

    def watch(self, x, *args, **kwargs):
        calls.append((self, x.shape[0] * x.shape[1]))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(Llama, "forward", watch)
    chains = solve(model, tokenizer, prompts_of(tokenizer, 9, seed=4), 12)
    _, *after_prompt = [n for llama, n in calls if llama is model.policy]

    # <|end-latent|> is read and the last token is not
    assert sum(after_prompt) == sum(chain.n_latent + chain.n_token for chain in chains)


# ---- fixed shapes --------------------------------------------------------------------------------


def never_counts(delayed, every=None):
    """In place of DelayedCount: the host never learns that a row is done."""

    def count(mask):
        return 0

    return count


@pytest.fixture
def fixed_shapes(monkeypatch):
    """As on a GPU, where a step is a CUDA graph: every row is computed, and what it may keep is
    kept.
    """

    def turn_on():
        monkeypatch.setattr(KVCache, "fixed_shape", True)
        monkeypatch.setattr("minatp.rollout.DelayedCount", never_counts)

    return turn_on


def waits_of(work, *args):
    """(what work(*args) returns, how often the host of a GPU would wait for it)."""
    results = []

    def run():
        results.append(work(*args))

    n_wait = count(run).waits
    return results[0], n_wait


@pytest.mark.parametrize("is_forced", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_rollouts_of_fixed_shape_are_the_same_and_wait_once(
    model, tokenizer, fixed_shapes, sampled, is_forced
):
    """Chains of all lengths, some with forced latents."""
    prompt, prompt_mask = padded_prompts(tokenizer, 6, seed=4)
    noise = draw(model, 12, 5, seed=1) if sampled else None
    forced = forced_latents(model) if is_forced else None

    expected = rollout(model, prompt, prompt_mask, 5, noise, 2, forced)
    assert len(set(expected.n_latent.tolist())) > 1
    assert len(set(expected.n_token.tolist())) > 1

    fixed_shapes()
    chains, n_wait = waits_of(rollout, model, prompt, prompt_mask, 5, noise, 2, forced)
    assert n_wait == 1  # for the longest answer
    for field in fields(expected):
        actual, value = getattr(chains, field.name), getattr(expected, field.name)
        torch.testing.assert_close(actual, value, rtol=1e-4, atol=1e-4, equal_nan=True)


def random_latents(model):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(12, 4, model.policy.cfg.n_embd, generator=generator)


def forced_latents(model):
    """0, 2 or 4 forced latents for each of 12 chains, of which the last 5 end with them."""
    return Forced(random_latents(model), torch.tensor([0, 2, 4] * 4), torch.arange(12) > 6)


def test_readings_of_fixed_shape_are_the_same_and_wait_once(model, fixed_shapes):
    steps = random_latents(model)[:, :2]  # (12, c, D)
    never_ends = -1
    eos = int(read_thoughts(model.decoder, steps[:1], never_ends, 5)[0][2])  # a word that φ writes
    expected = read_thoughts(model.decoder, steps, eos, 5)
    assert len({len(text) for text in expected}) > 1

    fixed_shapes()
    texts, n_wait = waits_of(read_thoughts, model.decoder, steps, eos, 5)
    assert n_wait == 1  # for the text
    assert texts == expected


# ---- a given number of latent steps --------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_given_number_of_steps_is_thought_without_asking_the_stop_head(model, tokenizer, steps):
    prompt, prompt_mask = padded_prompts(tokenizer, 9, seed=4)
    chains = rollout(model, prompt, prompt_mask, 6, steps=steps)
    assert (chains.n_latent == model.c * steps).all()
    assert chains.stop_prob.isnan().all()
    assert not chains.stopped.any()
    assert not chains.logp_stop.any()


def test_the_given_number_of_steps_are_the_models_own(model, tokenizer):
    """Where the stop head chooses the same number, the chain is the free one; without thoughts it
    is that of a model which is made to answer at once.
    """
    prompts = prompts_of(tokenizer, 17, seed=3)
    free = solve(model, tokenizer, prompts, 6, keep_z=True)
    by_steps = [solve(model, tokenizer, prompts, 6, steps=n, keep_z=True) for n in (0, 1, 2)]
    assert {chain.n_latent // model.c for chain in free} == {0, 1, 2}
    for i, chain in enumerate(free):
        same = by_steps[chain.n_latent // model.c][i]
        assert same.text == chain.text
        assert torch.allclose(same.z, chain.z, atol=1e-4)
        # the first latents do not depend on how many follow
        assert torch.allclose(by_steps[1][i].z, by_steps[2][i].z[: model.c], atol=1e-5)

    no_latents = torch.zeros(17, model.c * model.K, model.policy.cfg.n_embd)
    at_once = Forced(no_latents, torch.zeros(17, dtype=torch.long), torch.ones(17).bool())
    answers = solve(model, tokenizer, prompts, 6, forced=at_once)
    assert [chain.text for chain in by_steps[0]] == [chain.text for chain in answers]


def test_more_steps_than_were_learned_are_refused(model, tokenizer):
    prompt, prompt_mask = padded_prompts(tokenizer, 2, seed=4)
    model.stage = 1
    with pytest.raises(ValueError, match="steps must be 0 … 1, not 2"):
        rollout(model, prompt, prompt_mask, 6, steps=2)


# ---- what takes the place of latents -------------------------------------------------------------


@pytest.mark.parametrize("method", ["icot", "pause"])
@pytest.mark.parametrize("stage", range(4))
def test_a_rollout_reads_what_training_did(method, stage):
    """Fed what a rollout has written, training's pass gives its words the same log-probabilities.

    So it reads as many fillers. Thoughts it has none.
    """
    model, tokenizer = small_model(method=method)
    model.stage = stage
    prompt, mask = padded_prompts(tokenizer, 5, seed=3)
    chains = rollout(model, prompt, mask, max_new=6)
    assert not chains.n_latent.any()
    assert not chains.z.any()

    # problems whose text is what was written (an id at the end is read by nobody)
    rows = []
    for b in range(5):
        words = chains.token[b, : chains.n_token[b]].tolist()
        row = data.Encoded(prompt[b][mask[b]].tolist(), [], [], [], words, 0, "")
        rows.append(row)
    batch = data.collate(rows, stage, model)
    n_filler = {"icot": 0, "pause": 2 * min(stage, 2)}[method]
    assert (batch.text.ids == tokenizer.latent).sum(1).tolist() == [n_filler] * 5

    h = read_as_text(model.policy, batch, last=batch.text.ids.shape[1])
    logp = -model.policy.nll(h, batch.text.target)[:, n_filler:]
    torch.testing.assert_close(logp, chains.logp_token, rtol=1e-4, atol=1e-5)
    greedy = model.policy.logits(h[:, n_filler:]).argmax(-1)
    written = chains.token >= 0
    assert torch.equal(greedy[written], chains.token[written])


def test_the_filler_is_learned():
    """What is written after the fillers has a gradient to the embedding of each."""
    model, tokenizer = small_model(method="pause")
    rows = data.encode(problems.generate("labelled", 3, 1), tokenizer, model)
    x = []
    embed = model.policy.embed
    model.policy.embed = lambda ids: x.append(embed(ids)) or x[-1]
    batch = data.collate(rows, 3, model)
    loss = sft_losses(model, batch)["enc"]
    [gradient] = torch.autograd.grad(loss, x[0])
    n_prompt = batch.prompt.shape[1]
    of_fillers = gradient[:, n_prompt : n_prompt + 4]
    assert (of_fillers.norm(dim=-1) > 0).all()


@pytest.mark.parametrize("method", ["icot", "pause"])
def test_without_latents_no_steps_can_be_asked_for(method):
    model, tokenizer = small_model(method=method)
    prompt, mask = padded_prompts(tokenizer, 2, seed=3)
    rollout(model, prompt, mask, max_new=2, steps=0)
    with pytest.raises(ValueError, match="steps must be 0 … 0, not 1"):
        rollout(model, prompt, mask, max_new=2, steps=1)


def test_codi_thinks_the_projection_of_what_it_has_read():
    """All K·c latents, in training as in a rollout."""
    model, tokenizer = small_model(method="codi")
    prompt, mask = padded_prompts(tokenizer, 3, seed=3)
    chains = rollout(model, prompt, mask, max_new=2)
    assert chains.n_latent.tolist() == [4] * 3
    assert chains.logvar is None

    # the first one follows from the prompt, and the next from it
    policy = model.policy
    cache = policy.cache(len(prompt), prompt.shape[1] + 4)
    h = policy(policy.embed(prompt), mask, cache)[:, -1]
    for t in range(4):
        z = model.projection(h)
        torch.testing.assert_close(chains.z[:, t], z, rtol=1e-4, atol=1e-5)
        h = policy.step(z, torch.ones(3, dtype=torch.bool), cache)
