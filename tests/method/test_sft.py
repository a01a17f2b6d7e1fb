"""Stage 1: what its losses are of, their gradients, and that a batch can be split in any way."""

import pytest
import torch

import train
from minatp import data, problems, sft
from minatp.decoder import thought_nll, thought_token_nll
from minatp.problems import Problem
from minatp.rollout import rollout
from minatp.run import options
from minatp.run.loop import Run
from minatp.sft import (
    previews,
    read_as_text,
    read_batch,
    sft_losses,
    state_distance,
    total_loss,
    walk_batch,
)
from minatp.tools import page
from minatp.tools.count import count

from small import SMALL, gradients_of, small_model


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


def flat_gradients_of(model):
    return torch.cat([grad.flatten() for grad in gradients_of(model).values()])


# ---- how a batch is computed ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 1])
@pytest.mark.parametrize(
    "method, more", [("atp", []), ("atp", ["--distill", "2"]), ("codi-sim-cot", [])]
)
def test_accumulation_changes_nothing(method, more, size):
    """4 × 3 problems, or 11 × 1, instead of 1 × 11. In float64, so that rounding hides nothing."""
    model, tokenizer = loaded = small_model(method=method)
    model.double()
    last_stage = 3

    def losses_and_gradient(micro_batch):
        model.zero_grad()
        argv = ["--method", method, *more, "--micro-batch", str(micro_batch)]
        run, rows = sft_run(loaded, *argv)
        rows += run.encode_problems(problems.generate("answers", 3, 1), answer_only=True)
        losses, counts = train.sft_gradients(run, rows, last_stage, step=5)
        return losses, counts, flat_gradients_of(model)

    losses, counts, gradient = losses_and_gradient(size)
    expected_losses, expected_counts, expected = losses_and_gradient(0)
    assert counts == expected_counts
    assert losses.keys() == expected_losses.keys()
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected_losses[name].item(), rel=1e-12), name
    assert (gradient - expected).norm() / expected.norm() < 1e-12


def test_a_teacher_comes_every_few_steps(loaded):
    run, rows = sft_run(loaded, "--distill", "2", "--distill-every", "3")
    taught = []
    for step in range(5):
        losses, _ = train.sft_gradients(run, rows, 3, step)
        taught.append("teacher" in losses and "distill" in losses)
    assert taught == [True, False, False, True, False]


def test_recomputing_activations_changes_nothing(loaded):
    model, last_stage = loaded[0], 3
    run, rows = sft_run(loaded)
    grads = []
    for recompute in (False, True):
        model.set_recompute(recompute).zero_grad()
        train.sft_gradients(run, rows, last_stage, step=5)
        grads.append(gradients_of(model))
    kept, recomputed = grads
    assert kept.keys() == recomputed.keys()
    for name, grad in kept.items():
        assert torch.equal(grad, recomputed[name]), name


@pytest.mark.parametrize("distills", [False, True])
def test_the_host_waits_for_nothing_in_a_micro_batch(loaded, distills):
    """Not even if some rows decide on the device when they stop."""
    model, tokenizer = loaded
    rows = data.encode(problems.generate("labelled", 5, 1), tokenizer, model)
    rows += data.encode(problems.generate("answers", 3, 1), tokenizer, model, answer_only=True)
    batch = data.collate(rows, model.K + 1, model, distills)
    eps = torch.zeros(len(rows), batch.thinking.n_candidate, model.policy.cfg.n_embd)
    of_distillation = {"teacher", "distill"} if distills else set()

    def learn():
        losses = sft_losses(model, batch, eps)
        assert losses.keys() == {"enc", "kl", "stop", "dec"} | of_distillation
        sum(losses.values()).backward()

    assert count(learn).waits == 0


# ---- previews ------------------------------------------------------------------------------------

PREVIEWS = ["--decoder-start", "previews"]


@pytest.fixture
def previewed():
    """(model, 5 rows, noise): previews are read, by π until φ starts. In float64."""
    model, tokenizer = small_model(more=[*PREVIEWS, "--decoder-layers", "2"])
    rows = data.encode(problems.generate("labelled", 5, 1), tokenizer, model)
    assert {len(row.lines) for row in rows} > {1, model.K}  # shorter and longer ones
    eps = torch.randn(len(rows), model.c * model.K, model.policy.cfg.n_embd).double()
    return model.double(), rows, eps


def test_a_preview_is_proposed_from_the_states_before_its_step(previewed):
    """One problem at a time and one step at a time, without padding or `collate`."""
    model, rows, eps = previewed
    policy, c = model.policy, model.c
    expected = torch.zeros(())
    for row, noise in zip(rows, eps):
        for s, text in enumerate(row.step_texts[: model.K]):
            # what π has read: the first thought follows the prompt, the others the steps before
            ids = list(row.prompt)
            if s:
                ids += [model.end, *(i for line in row.lines[:s] for i in line)]
            x = policy.embed(torch.tensor([ids]))
            h = policy(x, torch.ones(1, len(ids), dtype=torch.bool), policy.cache(1, 99))
            mu, logvar = model.latent_head(h[0, -c:])
            z = mu + (0.5 * logvar).exp() * noise[s * c : (s + 1) * c]

            # then it reads bos, the thought and the text but its last id, and writes the text
            bos, words = torch.tensor([policy.cfg.bos]), torch.tensor(text)
            x = torch.cat((policy.embed(bos), z, policy.embed(words[:-1])))[None]
            h = policy(x, torch.ones(x.shape[:2], dtype=torch.bool), policy.cache(1, 99))
            logp = policy.logits(h[0, c:]).log_softmax(-1)
            expected = expected - logp[torch.arange(len(words)), words].sum()

    losses = sft_losses(model, data.collate(rows, 0, model), eps)
    assert losses.keys() == {"enc", "dec"}
    assert losses["dec"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_before_the_decoder_starts_previews_teach_the_policy_to_read_alone(previewed):
    """Not what to think: neither the latent head nor, through the thoughts, the policy."""
    model, rows, eps = previewed
    batch = data.collate(rows, 0, model)
    sft_losses(model, batch, eps)["dec"].backward()
    gradient = gradients_of(model)
    assert all(name.startswith("policy.") for name in gradient)

    # as with thoughts that do not depend on the weights
    with torch.no_grad():
        z = previews(model, read_as_text(model.policy, batch), batch, eps).clone()
    model.zero_grad()
    thought_nll(model.policy, z, batch.steps.target, batch.steps.target_at).sum().backward()
    for name, expected in gradients_of(model).items():
        assert torch.allclose(gradient[name], expected, rtol=1e-9), name


def test_then_they_teach_the_decoder_to_read_and_the_policy_what_to_think(previewed):
    """φ, as a copy of π, reads what π read; its gradient reaches all but the stop head."""
    model, rows, eps = previewed
    batch = data.collate(rows, 0, model)
    by_policy = sft_losses(model, batch, eps)["dec"]
    model.start_decoder()
    by_decoder = sft_losses(model, batch, eps)["dec"]
    assert by_decoder.item() == pytest.approx(by_policy.item(), rel=1e-9)
    by_decoder.backward()
    parts = {name.split(".")[0] for name in gradients_of(model)}
    assert parts == {"policy", "decoder", "latent_head"}


def test_previews_change_nothing_of_the_other_losses(previewed):
    model, rows, eps = previewed
    batch = data.collate(rows, 0, model)
    with_previews = sft_losses(model, batch, eps)["enc"]
    model.previews = False
    batch = data.collate(rows, 0, model)
    losses = sft_losses(model, batch, eps)
    assert losses.keys() == {"enc"}
    assert losses["enc"].item() == pytest.approx(with_previews.item(), rel=1e-6)


def test_the_loss_of_previews_is_a_mean_over_ids_as_that_of_the_words(previewed):
    model, rows, _ = previewed
    n_id = sum(len(text) for row in rows for text in row.step_texts[: model.K])
    assert data.collate(rows, 0, model).counts["dec"] == n_id
    assert data.collate(rows, 1, model).counts["dec"] == len(rows)


def test_only_stage_0_has_previews(previewed):
    model, rows, eps = previewed
    for stage in range(1, model.K + 2):
        assert data.collate(rows, stage, model).steps.n_before is None


@pytest.mark.parametrize("size", [2, 1])
@pytest.mark.parametrize("decoder_started", [False, True])
def test_previews_in_micro_batches_are_the_same(previewed, size, decoder_started):
    model, rows, _ = previewed
    model.decoder_started = decoder_started

    def losses_and_gradient(micro_batch):
        model.zero_grad()
        cfg = options.parse([*SMALL, *PREVIEWS, "--micro-batch", str(micro_batch)], "")
        run = Run(cfg, None, torch.device("cpu"), model, None)
        losses, counts = train.sft_gradients(run, rows, 0, step=5)
        return losses, counts, flat_gradients_of(model)

    losses, counts, gradient = losses_and_gradient(size)
    expected_losses, expected_counts, expected = losses_and_gradient(0)
    assert counts == expected_counts
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected_losses[name].item(), rel=1e-12), name
    assert (gradient - expected).norm() / expected.norm() < 1e-12


def test_a_decoder_that_reads_bos_writes_what_its_loss_says(previewed):
    """The likeliest texts have the probabilities that the loss gives them."""
    model, _, eps = previewed
    eos, z = 1, eps[:, : model.c]
    with torch.no_grad():
        for latents, texts in zip(z, page.top_readings(model.decoder, z, eos, n=2, max_new=4)):
            assert len(texts) == 2
            for ids, p in texts:
                text = torch.tensor([[*ids, eos]])
                at = (text >= 0).nonzero(as_tuple=True)
                nll = thought_nll(model.decoder, latents[None], text, at)
                assert nll.exp().item() == pytest.approx(1 / p, rel=1e-5)


# ---- what is taught ------------------------------------------------------------------------------


def test_the_decoder_does_not_see_hidden_words(model):
    """A word changes how likely the words after it are, unless it is hidden."""
    z = torch.randn(1, model.c, model.policy.cfg.n_embd)
    texts = torch.tensor([[7, 8, 9, 1], [6, 8, 9, 1]])
    at = (texts >= 0).nonzero(as_tuple=True)
    hidden = torch.tensor([[True, False, False]]).expand(2, 3)

    def is_equal_after_the_first(unseen):
        one, other = thought_token_nll(model.decoder, z.expand(2, -1, -1), texts, at, unseen)
        return torch.equal(one[1:], other[1:])

    with torch.no_grad():
        assert is_equal_after_the_first(hidden)
        assert not is_equal_after_the_first(None)
        assert not is_equal_after_the_first(~hidden)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_words_are_hidden_from_the_decoder_alone(previewed, stage, monkeypatch):
    """With all hidden, L_dec is that of a φ that cannot read words; other losses stay."""
    model, rows, eps = previewed
    decoder, bos = model.decoder, model.policy.cfg.bos
    model.decoder_started = True
    batch = data.collate(rows, stage, model)
    seen = sft_losses(model, batch, eps)
    batch.steps.hide(torch.ones(len(rows), model.K, 99, dtype=torch.bool))
    hidden = sft_losses(model, batch, eps)
    assert [name for name in seen if not torch.equal(seen[name], hidden[name])] == ["dec"]

    batch.steps.unseen = None
    embed = decoder.embed
    monkeypatch.setattr(decoder, "embed", lambda ids: embed(ids) * (ids == bos)[..., None])
    assert torch.equal(sft_losses(model, batch, eps)["dec"], hidden["dec"])


def test_which_words_are_hidden(loaded):
    """A share of them, others in every step and for every problem."""

    def unseen_at(step, *more):
        run, rows = sft_run(loaded, *more)
        [(batch, _, _)] = run.micro_batches(rows, 3, step)
        return batch.steps.unseen, batch.steps.target

    unseen, text = unseen_at(0, "--word-dropout", "0.4")
    assert unseen.shape == (len(text), text.shape[1] - 1)
    assert unseen.float().mean() == pytest.approx(0.4, abs=0.1)
    assert len({tuple(row) for row in unseen.tolist()}) == len(text)
    assert torch.equal(unseen, unseen_at(0, "--word-dropout", "0.4")[0])
    assert not torch.equal(unseen, unseen_at(1, "--word-dropout", "0.4")[0])
    assert unseen_at(0, "--word-dropout", "1")[0].all()
    assert unseen_at(0, "--word-dropout", "0")[0] is None


def test_a_problem_without_steps_is_taught_to_stop_at_once(model, tokenizer):
    """Also beside a problem with steps: the losses of both are the sum of each one's."""
    without_steps = Problem("Ann has 5 pens. How many?", [], "5")
    [with_steps] = problems.generate("labelled", 1, 1)
    rows = data.encode([without_steps, with_steps], tokenizer, model)

    alone = data.collate(rows[:1], 2, model)
    assert alone.thinking.n_latent.tolist() == [0]
    assert alone.thinking.has_stop.tolist() == [True]
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
    assert batch.thinking.answer_only.all()
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


# ---- self-distillation ---------------------------------------------------------------------------


def distilled(method="atp", stage=3, n=4, dtype=torch.float64):
    """(model, tokenizer, Batch of n problems and an answer alone, ε): with a teacher."""
    model, tokenizer = small_model(method=method)
    model.to(dtype)
    rows = data.encode(problems.generate("labelled", n, 1), tokenizer, model)
    rows += data.encode(problems.generate("answers", 1, 1), tokenizer, model, answer_only=True)
    batch = data.collate(rows, stage, model, distills=True)
    generator = torch.Generator().manual_seed(4)
    shape = (n + 1, batch.thinking.n_candidate, model.policy.cfg.n_embd)
    return model, tokenizer, batch, torch.randn(shape, generator=generator, dtype=dtype)


def test_l_is_the_sum_of_the_weighted_means():
    names = ("enc", "dec", "stop", "kl", "teacher", "distill")
    losses = {name: torch.tensor(float(i)) for i, name in enumerate(names, 1)}
    counts = {name: 2 * i for i, name in enumerate(names, 1)}  # each mean is ½
    total = total_loss(losses, counts, {"kl": 0.1, "distill": 3.0})
    assert total.item() == pytest.approx(0.5 * (4 + 0.1 + 3))


def test_the_distance_of_states_by_hand():
    """Mean over D of |difference|, over the teacher's deviation, mean over the two layers."""
    teacher = torch.tensor([[[1.0, 3.0, 5.0]], [[0.0, 0.0, 3.0]]])  # deviations 2 and √3
    student = torch.tensor([[[1.0, 6.0, 2.0]], [[1.0, -1.0, 2.0]]])  # 2 and 1 away
    expected = (2 / 2 + 1 / 3**0.5) / 2
    assert state_distance(student, teacher).tolist() == [pytest.approx(expected)]


@pytest.mark.parametrize("method, stage", [("atp", 2), ("codi-sim-cot", 3)])
def test_gradients_of_distillation_are_finite_differences(method, stage, monkeypatch):
    """Of both losses and of L. The teacher's states are constants, those before a weight moves."""
    model, _, batch, eps = distilled(method, stage, n=2)
    teachers = []

    def distance_to_the_first(student, teacher):
        teachers.append(teacher.detach())
        return state_distance(student, teachers[0])

    monkeypatch.setattr(sft, "state_distance", distance_to_the_first)

    def values():
        losses = sft_losses(model, batch, eps)
        total = total_loss(losses, batch.counts, {"kl": 0.1, "distill": 3.0})
        return torch.stack((losses["teacher"], losses["distill"], total))

    parameters = list(model.parameters())
    gradients = []  # of each value, of each parameter
    for value in values():
        of_value = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        gradients.append(
            [torch.zeros_like(p) if g is None else g for g, p in zip(of_value, parameters)]
        )
    assert all(g.norm() > 0 for g in gradients[2])  # L reaches every parameter

    generator = torch.Generator().manual_seed(0)
    for p, *of_parameter in zip(parameters, *gradients):
        # where the gradient of the distance is largest, and anywhere
        _, of_distance, _ = of_parameter
        anywhere = torch.randint(p.numel(), (), generator=generator)
        for i in {of_distance.abs().argmax().item(), anywhere.item()}:
            actual = [g.view(-1)[i].item() for g in of_parameter]
            expected = finite_difference(values, p, i).tolist()
            assert actual == pytest.approx(expected, rel=1e-5, abs=1e-6)

    # the teacher did move, so it counts that it was held
    assert any(not torch.equal(teacher, teachers[0]) for teacher in teachers)


@torch.no_grad()
def finite_difference(f, p, i, h=1e-6):
    """The derivative of the tensor f() with respect to the i-th number of p."""
    values = p.view(-1)
    before = values[i].item()
    values[i] = before + h
    above = f()
    values[i] = before - h
    below = f()
    values[i] = before
    return (above - below) / (2 * h)


@pytest.mark.parametrize("method", ["atp", "codi"])
def test_the_teacher_learns_nothing_from_the_distance(method):
    """No gradient reaches words that the teacher alone reads, but those of the student's text."""
    model, _, batch, eps = distilled(method)

    def ids_of(ids, mask):
        return set(ids[mask].tolist())

    of_student = ids_of(batch.prompt, batch.prompt_mask) | ids_of(batch.text.ids, batch.text.mask)
    of_teacher_alone = sorted(ids_of(batch.words.ids, batch.words.mask) - of_student)
    assert len(of_teacher_alone) > 3

    losses = sft_losses(model, batch, eps)
    embedding = model.policy.model.embed_tokens.weight
    [gradient] = torch.autograd.grad(losses["distill"], embedding, retain_graph=True)
    assert not gradient[of_teacher_alone].any()
    assert gradient[model.end].any()
    head = model.latent_head if model.vae else model.projection
    gradients = torch.autograd.grad(losses["distill"], list(head.parameters()), allow_unused=True)
    assert gradients[0].any()


@pytest.mark.parametrize("method, stage", [("atp", 1), ("atp", 3), ("codi", 3)])
def test_the_prompt_is_read_once_for_student_and_teacher(method, stage, monkeypatch):
    """As if the teacher had read the whole problem by itself, to the last bits of a float64."""
    model, _, batch, eps = distilled(method, stage)
    parameters = list(model.parameters())

    def results():
        losses = sft_losses(model, batch, eps)
        loss = total_loss(losses, batch.counts, {"kl": 0.1, "distill": 3.0})
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return losses, [g for g in gradients if g is not None]

    losses, gradients = results()
    monkeypatch.setattr(sft, "distillation", distillation_in_two_passes)
    expected_losses, expected_gradients = results()

    assert {"teacher", "distill"} < losses.keys() == expected_losses.keys()
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected_losses[name].item(), rel=1e-12), name
    assert len(gradients) == len(expected_gradients)
    for gradient, expected in zip(gradients, expected_gradients):
        assert (gradient - expected).norm() <= 1e-12 * (1 + expected.norm())


def distillation_in_two_passes(policy, batch, cache, states):
    """`sft.distillation` with a second pass over the prompts, which `cache` has read."""
    ids = torch.cat((batch.prompt, batch.words.ids), 1)
    mask = torch.cat((batch.prompt_mask, batch.words.mask), 1)
    n_prompt = batch.prompt.shape[1]
    row, column = batch.words.answer_at
    h, teacher = policy(
        policy.embed(ids), mask, policy.cache(*ids.shape), states_at=(row, n_prompt + column)
    )
    written = batch.words.target_at
    nll = policy.nll(h[:, n_prompt:][written], batch.words.target[written]).sum()
    return {"teacher": nll, "distill": state_distance(states, teacher.detach()).sum()}


def test_states_are_what_each_layer_leaves(model):
    """The residual stream after each layer; of the top one the final norm's result."""
    policy = model.policy
    left = []
    for block in policy.model.layers:
        block.register_forward_hook(lambda block, inputs, output: left.append(sum(output)))
    ids = torch.randint(5, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    at = torch.tensor([0, 2, 2]), torch.tensor([6, 0, 3])
    h, states = policy(policy.embed(ids), mask, policy.cache(3, 7), states_at=at)
    assert states.shape == (2, 3, policy.cfg.n_embd)
    torch.testing.assert_close(states[0], left[0][at])
    assert torch.equal(states[1], h[at])


def test_what_one_fork_of_a_cache_reads_the_other_does_not_see(model):
    policy = model.policy
    ids = torch.randint(5, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    x, real = policy.embed(ids), torch.ones_like(ids, dtype=torch.bool)
    real[1, :2] = False
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            cache = policy.cache(2, 9)
            policy(x[:, :4], real[:, :4], cache)
            other = cache.fork()
            policy(x[:, 7:], real[:, 7:], other)
            h = policy(x[:, 4:], real[:, 4:], cache)
            expected = policy(x, real, policy.cache(2, 9))[:, 4:]
            torch.testing.assert_close(h, expected)


def test_a_problem_without_latents_has_no_teacher():
    """Student and teacher would read the same, and their distance be rounding, with a gradient.

    CODI's problems all have latents.
    """
    for method, n_taught in (("atp", 1), ("codi", 2)):
        model, tokenizer = small_model(method=method)
        without_steps = Problem("Ann has 5 pens. How many?", [], "5")
        [with_steps] = problems.generate("labelled", 1, 1)
        rows = data.encode([without_steps, with_steps], tokenizer, model)
        batch = data.collate(rows, model.K + 1, model, distills=True)
        assert batch.counts["distill"] == n_taught
        assert batch.counts["teacher"] == batch.words.mask.sum()
        assert batch.words.mask.any(1).tolist() == [n_taught == 2, True]
        assert batch.text.answer_at[0].tolist() == batch.words.answer_at[0].tolist()
        both = sft_losses(model, batch)
        alone = sft_losses(model, data.collate(rows[1:], model.K + 1, model, distills=True))
        if method == "atp":
            assert both["distill"].item() == pytest.approx(alone["distill"].item(), rel=1e-5)


def test_what_the_teacher_reads_counts_as_read(loaded):
    model, tokenizer = loaded
    rows = data.encode(problems.generate("labelled", 3, 1), tokenizer, model)
    without, with_teacher = (
        data.collate(rows, model.K + 1, model, distills) for distills in (False, True)
    )
    n_word = int(with_teacher.words.mask.sum())
    assert n_word > 0
    assert with_teacher.counts["position"] == without.counts["position"] + n_word


def test_answers_alone_have_no_teacher():
    """Beside other problems they are left out; alone there is none, and the rest is learned."""
    model, tokenizer, batch, eps = distilled("codi")
    assert batch.counts["distill"] == 4
    assert not batch.words.mask[4].any()

    answers = problems.generate("answers", 3, 1)
    rows = data.encode(answers, tokenizer, model, answer_only=True)
    alone = data.collate(rows, 3, model, distills=True)
    assert alone.words is None
    assert (alone.counts["teacher"], alone.counts["distill"]) == (0, 0)
    assert sft_losses(model, alone).keys() == {"enc"}


def test_distillation_in_bfloat16_is_that_in_float32(loaded):
    """Within 2 %, and the losses are float32."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        run, rows = sft_run(loaded, "--distill", "1", "--dtype", dtype)
        losses[dtype], _ = train.sft_gradients(run, rows, 2, step=0)
    for name in ("teacher", "distill"):
        low, high = losses["bfloat16"][name], losses["float32"][name]
        assert low.dtype == torch.float32
        assert float(low) == pytest.approx(float(high), rel=0.02), name
