"""Stage 1: what the four losses are of, and that the split of a batch changes nothing."""

import pytest
import torch

import train
from minatp import data, problems
from minatp.problems import Problem
from minatp.rollout import rollout
from minatp.run import options
from minatp.run.loop import Run
from minatp.sft import read_batch, sft_losses, walk_batch
from minatp.tools.count import count

from small import SMALL, small_model


@pytest.fixture
def loaded():
    return small_model()


@pytest.fixture
def model(loaded):
    return loaded[0]


@pytest.fixture
def tokenizer(loaded):
    return loaded[1]


def sft_run(loaded, *more):
    """A Run of a small SFT run that has not started, and 8 Encoded problems."""
    cfg = options.parse([*SMALL, *more], "")
    run = Run(cfg, None, torch.device("cpu"), *loaded)
    return run, run.encode_problems(problems.generate("labelled", 8, 1))


def gradients_of(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def flat_gradients_of(model):
    return torch.cat([grad.flatten() for grad in gradients_of(model)])


# ---- how a batch is computed ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 1])
def test_accumulation_changes_nothing(loaded, size):
    """3 × 3 problems, or 8 × 1, instead of 1 × 8. In float64, so that rounding hides nothing."""
    model, last_stage = loaded[0].double(), 3
    run, rows = sft_run(loaded, "--micro-batch", "0")
    train.sft_gradients(run, rows, last_stage, step=5)
    expected = flat_gradients_of(model)

    model.zero_grad()
    run, rows = sft_run(loaded, "--micro-batch", str(size))
    train.sft_gradients(run, rows, last_stage, step=5)
    difference = flat_gradients_of(model) - expected
    assert difference.norm() / expected.norm() < 1e-12


def test_recomputing_activations_changes_nothing(loaded):
    model, last_stage = loaded[0], 3
    run, rows = sft_run(loaded)
    grads = []
    for recompute in (False, True):
        model.set_recompute(recompute).zero_grad()
        train.sft_gradients(run, rows, last_stage, step=5)
        grads.append(gradients_of(model))
    for kept, recomputed in zip(*grads):
        assert torch.equal(kept, recomputed)


def test_the_host_waits_for_nothing_in_a_micro_batch(loaded):
    """Not even if some rows decide on the device when they stop."""
    model, tokenizer = loaded
    rows = data.encode(problems.generate("labelled", 5, 1), tokenizer, model)
    rows += data.encode(problems.generate("answers", 3, 1), tokenizer, model, answer_only=True)
    batch = data.collate(rows, model.K + 1, model)
    eps = torch.zeros(len(rows), batch.n_candidate, model.policy.cfg.n_embd)

    def learn():
        losses = sft_losses(model, batch, eps)
        assert losses.keys() == {"enc", "kl", "stop", "dec"}
        sum(losses.values()).backward()

    assert count(learn).waits == 0


# ---- what is taught ------------------------------------------------------------------------------


def test_a_problem_without_steps_is_taught_to_stop_at_once(model, tokenizer):
    """Also beside a problem with steps: the losses of both are the sum of each one's."""
    without_steps = Problem("Ann has 5 pens. How many?", [], "5")
    [with_steps] = problems.generate("labelled", 1, 1)
    rows = data.encode([without_steps, with_steps], tokenizer, model)

    alone = data.collate(rows[:1], 2, model)
    assert alone.n_latent.tolist() == [0]
    assert alone.has_stop.tolist() == [True]
    assert alone.counts["stop"] == 1
    assert alone.counts["answer_only"] == 0

    losses = sft_losses(model, alone)
    losses_other = sft_losses(model, data.collate(rows[1:], 2, model))
    losses_both = sft_losses(model, data.collate(rows, 2, model))
    for name in ("enc", "stop"):
        assert losses[name].item() > 0
        total = (losses[name] + losses_other[name]).item()
        assert total == pytest.approx(losses_both[name].item(), rel=1e-5), name


def test_answers_alone_stop_where_generation_does_and_teach_their_answer(model, tokenizer):
    # a stop head that decides now for the one, now for the other
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(model.stop_head[2].weight, std=3.0, generator=generator)
    rows = data.encode(problems.generate("answers", 12, 1), tokenizer, model, answer_only=True)
    batch = data.collate(rows, model.K + 1, model)
    n_answer_token = sum(len(row.answer) for row in rows)
    n_prompt_token = sum(len(row.prompt) for row in rows)
    assert batch.answer_only.all()
    assert batch.counts == {
        "enc": n_answer_token,
        "dec": 0,
        "kl": 0,
        "stop": 0,
        "answer_only": 12,
        "teacher": 0,
        "distill": 0,
        "position": n_prompt_token + 12 * model.c * model.K + n_answer_token,
    }

    # the thinking ends where it would in a rollout
    _, n_latent = walk_batch(model, batch, *read_batch(model.policy, batch))
    chains = rollout(model, batch.prompt, batch.prompt_mask, max_new=3)
    assert torch.equal(n_latent, chains.n_latent)
    assert n_latent.any()

    # the answer alone is learned, and its gradient reaches the latents
    losses = sft_losses(model, batch)
    assert losses["enc"] > 0
    assert not losses["kl"]
    assert not losses["stop"]
    assert "dec" not in losses
    losses["enc"].backward()
    D = model.policy.cfg.n_embd
    assert model.latent_head.gaussian.weight.grad[:D].norm() > 0
