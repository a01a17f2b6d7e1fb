"""One step of train.py: the gradients of stage 1, and of stage 2 with and without its anchor.

The steps are made in memory: `OneStep` stands for what surrounds them.
"""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

import train
from minatp import problems, reward
from minatp.data import left_pad
from minatp.decoder import Chain
from minatp.llama import KVCache
from minatp.rollout import Rollout
from minatp.run import options
from minatp.run.loop import Run

from small import SMALL, SMALL_RL, gradients_of, small_model

CPU = torch.device("cpu")


class OneStep(Run):
    """A Run whose loop makes one step a stage and keeps the gradients instead of applying them."""

    def __init__(self, cfg, model, tokenizer):
        super().__init__(cfg, None, CPU, model, tokenizer)
        self.max_new = 6
        self.labelled = self.encode_problems(problems.generate("labelled", 8, 1))
        self.answers_only = []
        self.questions = problems.generate("answers", 8, 1)
        self.prompts = self.encode_prompts(self.questions)
        self.start_model = model
        self.optimizer = KeepGradients(model)
        self.meter = self
        self.recorded = []  # of each step: {name: value}

    def announce(self, what, work):
        pass

    def steps(self, batches, n_step, n_total=None, stage=None):
        yield 0, next(batches)

    def add(self, sums, counts, n_token):
        self.recorded.append(sums)

    def finish(self):
        pass


class KeepGradients:
    """In place of the optimizer."""

    def __init__(self, model):
        self.model = model
        self.gradients = []  # of each step: {name: gradient}

    def step(self, loss, problems):
        self.gradients.append(gradients_of(self.model))
        self.model.zero_grad()
        return torch.zeros(())


def assert_equal_gradients(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, grad in actual.items():
        torch.testing.assert_close(grad, expected[name], **tolerance)


def one_step(*argv):
    """A OneStep of a small run."""
    cfg = options.parse([str(arg) for arg in argv], "")
    return OneStep(cfg, *small_model())


# ---- stage 1 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", range(4))
def test_a_weighted_loss_has_weighted_gradients(stage):
    """And the losses, which are for the log, are without the weight."""
    run = one_step(*SMALL)
    losses, counts = train.sft_gradients(run, run.labelled, stage, step=0)
    gradients = gradients_of(run.model)

    run.model.zero_grad()
    same_losses, same_counts = train.sft_gradients(run, run.labelled, stage, step=0, weight=0.3)
    weighted = gradients_of(run.model)
    expected = {name: 0.3 * grad for name, grad in gradients.items()}
    assert_equal_gradients(weighted, expected, rtol=1e-4, atol=1e-6)
    assert same_losses == losses
    assert same_counts == counts


def test_gradients_are_added_to_those_that_are_there():
    run = one_step(*SMALL)
    train.sft_gradients(run, run.labelled, stage=3, step=0)
    once = gradients_of(run.model)
    train.sft_gradients(run, run.labelled, stage=3, step=0)
    expected = {name: 2 * grad for name, grad in once.items()}
    assert_equal_gradients(gradients_of(run.model), expected)


def test_the_curriculum_goes_through_its_stages():
    """One step of each stage: more and more of a problem's steps become latent."""
    run = one_step(*SMALL, "--distill", 0)
    train.sft(run)
    assert run.model.stage == 3
    stage_0, *latent_stages = [recorded.keys() for recorded in run.recorded]
    assert stage_0 == {"enc", "grad_norm"}
    assert len(latent_stages) == 3
    for names in latent_stages:
        assert names == {"enc", "kl", "stop", "dec", "grad_norm"}

    # the policy alone learns from text; then all parts do
    for name in run.optimizer.gradients[0]:
        assert name.startswith("policy.")
    assert run.optimizer.gradients[3].keys() == {name for name, _ in run.model.named_parameters()}


def test_only_the_last_stage_mixes_in_problems_without_steps():
    run = one_step(*SMALL, "--answers-share", 0.25)
    run.answers_only = run.encode_problems(problems.generate("answers", 8, 1), answer_only=True)
    for stage in range(4):
        batch = next(train.curriculum_batches(run, stage))
        assert len(batch) == 8
        assert sum(row.answer_only for row in batch) == (2 if stage == 3 else 0)


# ---- stage 2 -------------------------------------------------------------------------------------


@pytest.fixture
def first_chain_wins(monkeypatch):
    """The k-th question rewards its k-th chain, whatever it says."""

    def judge(run, texts, problems, step):
        return torch.eye(run.cfg.G)[: len(problems)], {"acc": torch.tensor(0.25)}

    monkeypatch.setattr(train, "judge", judge)


@pytest.fixture
def nobody_wins(monkeypatch):
    def judge(run, texts, problems, step):
        return torch.zeros(len(problems), run.cfg.G), {"acc": torch.tensor(0.0)}

    monkeypatch.setattr(train, "judge", judge)


def rl_gradients(*argv):
    """(run, {name: gradient} of one step of stage 2)."""
    run = one_step(*SMALL_RL, *argv)
    run.model.decoder.requires_grad_(False)
    run.model.stage = 2  # the last stage that SFT has taught
    train.rl(run)
    [gradients] = run.optimizer.gradients
    return run, gradients


def test_the_anchor_adds_the_sft_gradients_of_the_stage_that_was_taught(first_chain_wins):
    """RL and SFT share `sft_gradients`: no loss of theirs can drift apart."""
    _, without = rl_gradients("--anchor", 0)
    run, with_anchor = rl_gradients("--anchor", 0.5)

    _, _, labelled = next(train.rl_batches(run))
    train.sft_gradients(run, labelled, stage=2, step=0)
    expected = gradients_of(run.model)
    for name, grad in expected.items():
        grad *= 0.5
        grad += without.get(name, 0.0)
    assert_equal_gradients(with_anchor, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("anchor, n_expected", [(0, 0), (0.5, 3)])
def test_both_stages_call_one_function_for_the_sft_loss(
    anchor, n_expected, first_chain_wins, monkeypatch
):
    weights = []
    sft_gradients = train.sft_gradients

    def watch(run, problems, stage, step, weight=1.0):
        weights.append(weight)
        return sft_gradients(run, problems, stage, step, weight)

    monkeypatch.setattr(train, "sft_gradients", watch)
    train.sft(one_step(*SMALL))
    assert weights == [1.0] * 4  # a step of each stage

    weights.clear()
    run = one_step(*SMALL_RL, "--anchor", anchor, "--updates-per-batch", 3)
    train.rl(run)
    assert len(run.optimizer.gradients) == 3
    assert weights == [anchor] * n_expected


def test_a_batch_without_a_signal_makes_no_update(nobody_wins):
    run = one_step(*SMALL_RL, "--anchor", 0.5)
    train.rl(run)
    assert not run.optimizer.gradients
    [recorded] = run.recorded
    assert recorded["signal"] == 0


def update(run, explored, advantage, informative):
    """The metrics of a first update."""
    chains = train.informative_chains(run, explored, advantage, informative)
    return train.policy_gradients(run, chains)[1]


def test_an_informative_group_has_the_same_gradient_among_silent_ones():
    """Silent groups are left out of the computation, but not of the mean."""
    run = one_step(*SMALL_RL)
    explored = train.explore(run, run.prompts[:4], step=0)
    advantage = torch.zeros(4, 4)
    advantage[2] = torch.tensor([0.75, -0.25, -0.25, -0.25])

    gradients = []
    for informative in (torch.arange(4) == 2, torch.ones(4, dtype=torch.bool)):
        run.model.zero_grad()
        update(run, explored, advantage, informative)
        gradients.append(gradients_of(run.model))
    assert_equal_gradients(*gradients, rtol=1e-4, atol=1e-6)


def explored_by_hand(run, words):
    """Explored of one question, in float64, whose chains stop at once and write words[b]."""
    model, tokenizer = run.model.double(), run.tokenizer
    prompt, mask = left_pad(tokenizer.prompts(["Ann has 5 pens."]), tokenizer.end)
    B = len(words)
    chains = Rollout.empty(model, B, 2, noise=None, device="cpu")
    chains.z = torch.randn(chains.z.shape, dtype=torch.float64)
    chains.logp_z, chains.logp_stop = chains.logp_z.double(), chains.logp_stop.double()
    chains.stopped[:] = True
    for b, ids in enumerate(words):
        chains.token[b, : len(ids)] = torch.tensor(ids)
        chains.n_token[b] = len(ids)
    return train.Explored(prompt, mask, None, chains, [], {}, 0)


def test_clamped_is_a_share_of_decisions_and_the_kl_to_oneself_is_zero():
    """Of 2 × 8 columns 7 hold a decision: a latent, a stop and eos, and once a word before eos."""
    run = one_step(*SMALL_RL, "--G", 2, "--estimator", "score")
    [eos] = run.tokenizer.eos
    explored = explored_by_hand(run, [[eos], [7, eos]])
    advantage, informative = torch.tensor([[0.5, -0.5]]), torch.tensor([True])
    chains = train.informative_chains(run, explored, advantage, informative)

    _, metrics = train.policy_gradients(run, chains)
    assert metrics["clamped"] == 0
    assert metrics["kl"].item() == pytest.approx(0, abs=1e-9)

    # had every decision been less likely before, by a factor of e, every ratio would be clipped
    is_decision = chains.old_logp != 0
    assert is_decision.sum() == 7
    chains.old_logp -= 1.0 * is_decision
    _, metrics = train.policy_gradients(run, chains)
    assert metrics["clamped"] == 1


def test_the_kl_compares_both_policies_on_the_chains_as_they_were_drawn():
    """With path as with score, after a policy has moved: the same value, the same gradient."""
    kl, gradients = {}, {}
    for estimator in ("score", "path"):
        run = one_step(*SMALL_RL, "--estimator", estimator, "--kl", 1)
        explored = train.explore(run, run.prompts[:2], step=0)
        run.start_model = deepcopy(run.model)
        with torch.no_grad():
            g = torch.Generator().manual_seed(1)
            for weight in run.model.parameters():
                weight += 0.05 * torch.randn(weight.shape, generator=g)

        # No advantage, so that the loss is the KL alone
        metrics = update(run, explored, torch.zeros(2, 4), torch.ones(2).bool())
        kl[estimator], gradients[estimator] = metrics["kl"].item(), gradients_of(run.model)
    assert kl["score"] > 0.1
    assert kl["path"] == pytest.approx(kl["score"], rel=1e-4)
    assert_equal_gradients(gradients["path"], gradients["score"], rtol=1e-3, atol=1e-4)


def test_coherence_only_looks_at_no_answer_anywhere():
    run = one_step(*SMALL_RL, "--no-answers", "--coherence", "strict", "--G", 2)
    true, false = chain_of("<<1+1=2>>"), chain_of("<<1+2=2>>")
    [problem] = problems.generate("answers", 1, 0)
    problem.answer = "7"
    R, parts = train.judge(run, [true, false], [problem], step=0)
    assert R.tolist() == [[pytest.approx(0.6), 0.5]]
    assert parts.keys() == {"coh", "fmt"}
    assert reward.chain_reward(run.cfg, true, "7") == reward.chain_reward(run.cfg, true, "2")


@pytest.mark.parametrize("no_answers", [False, True])
def test_phi_reads_the_chains_whose_answer_is_right(no_answers):
    """Without answers it reads all. Whether it reads the others changes no reward."""
    run = one_step(*SMALL_RL, *(["--no-answers"] if no_answers else []))
    run.model.stage = 2
    G, questions = run.cfg.G, run.questions[:2]
    explored = train.explore(run, run.prompts[:2], step=0)
    chains = explored.chains
    for i, chain in enumerate(chains):  # every second one
        chain.text = f"### {questions[i // G].answer if i % 2 else 'none'}"
    in_full = [replace(chain) for chain in chains]

    train.read_for_reward(run, explored, questions)
    train.read_for_reward(run, replace(explored, chains=in_full))
    unread = [i for i, chain in enumerate(chains) if chain.thoughts is None]
    assert unread == ([] if no_answers else list(range(0, 2 * G, 2)))
    for chain, full in zip(chains, in_full):
        assert chain.thoughts in (None, full.thoughts)
        assert len(full.thoughts) == full.n_latent // run.model.c
    assert sum(len(full.thoughts) for full in in_full) > 0
    judged, judged_in_full = (train.judge(run, x, questions, step=0) for x in (chains, in_full))
    assert torch.equal(judged[0], judged_in_full[0])
    assert judged[1] == judged_in_full[1]


def chain_of(thought):
    """A Chain of one thought and the answer 2."""
    return Chain([thought], "### 2", ended=True, n_latent=1, n_token=3, stop_prob=[], sigma=[])


def test_the_placebo_permutes_the_rewards():
    """The rewards of a batch stay the same, but not where they are."""
    chains = [chain_of("<<1+1=2>>") for _ in range(8)] + [chain_of("<<1+1=3>>") for _ in range(8)]
    for chain in chains[8:]:
        chain.text = "### 3"
    questions = problems.generate("answers", 4, 0)
    for problem in questions:
        problem.answer = "2"

    rewards = {}
    for placebo in ([], ["--placebo"]):
        run = one_step(*SMALL_RL, *placebo)
        rewards[bool(placebo)], _ = train.judge(run, chains, questions, step=0)
    true, permuted = rewards[False], rewards[True]
    assert not torch.equal(permuted, true)
    assert torch.equal(permuted.flatten().sort().values, true.flatten().sort().values)


# ---- the credit of latents -----------------------------------------------------------------------


def score_gradients(latent_weight, spread=2.0):
    """{name: gradient} of one update by the score estimator, of groups with a signal.

    In float64, so that gradients of different size can be added.
    """
    argv = ("--estimator", "score", "--spread", spread, "--latent-weight", latent_weight)
    run = one_step(*SMALL_RL, *argv)
    explored = train.explore(run, run.prompts[:2], step=0)
    run.model.double()
    for name in ("z", "logp_z", "logp_stop"):
        setattr(explored.rollout, name, getattr(explored.rollout, name).double())
    advantage, informative = torch.eye(4, dtype=torch.float64)[:2] - 0.25, torch.ones(2).bool()
    update(run, explored, advantage, informative)
    return gradients_of(run.model)


def test_the_weight_of_latents_scales_their_gradient_and_no_others():
    of_words, of_both, weighted = (score_gradients(weight) for weight in (0.0, 1.0, 0.03))
    assert of_words["latent_head.gaussian.bias"].norm() == 0
    assert of_both["latent_head.gaussian.bias"].norm() > 0
    assert of_words["policy.model.embed_tokens.weight"].norm() > 0
    expected = {name: of_words[name] + 0.03 * (of_both[name] - of_words[name]) for name in of_both}
    assert_equal_gradients(weighted, expected, rtol=1e-9, atol=1e-12)


def test_the_placebo_of_latents_permutes_their_advantages_among_informative_chains():
    """Stops and words keep theirs; so do chains of silent groups, which is none."""
    credits = {}
    for placebo in ([], ["--placebo-latents"]):
        run = one_step(*SMALL_RL, "--estimator", "score", *placebo)
        explored = train.explore(run, run.prompts[:4], step=0)
        advantage = torch.arange(16.0).view(4, 4) - 7.5
        informative = torch.tensor([True, False, True, True])
        chains = train.informative_chains(run, explored, advantage, informative)
        credits[bool(placebo)] = chains.advantage

    true, permuted = credits[False], credits[True]
    n_latent = explored.rollout.z.shape[1]
    expected = advantage[informative].view(-1, 1).expand_as(true)
    assert torch.equal(true, expected)
    assert torch.equal(permuted[:, n_latent:], expected[:, n_latent:])
    of_latents = permuted[:, :n_latent]
    assert torch.equal(of_latents, of_latents[:, :1].expand_as(of_latents))
    assert not torch.equal(of_latents, expected[:, :n_latent])
    assert torch.equal(of_latents[:, 0].sort().values, expected[:, 0].sort().values)


# ---- bfloat16 ------------------------------------------------------------------------------------


def test_the_sft_losses_in_bfloat16_are_those_in_float32():
    """Within 1 %, and each loss, gradient and weight is a float32."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        run = one_step(*SMALL, "--distill", 0, "--dtype", dtype)
        losses[dtype], _ = train.sft_gradients(run, run.labelled, stage=2, step=0)
        for name, p in run.model.named_parameters():
            assert p.dtype == torch.float32, name
            assert p.grad is None or p.grad.dtype == torch.float32, name
    assert losses["bfloat16"].keys() == {"enc", "dec", "stop", "kl"}
    for name, loss in losses["bfloat16"].items():
        assert loss.dtype == torch.float32, name
        assert float(loss) == pytest.approx(float(losses["float32"][name]), rel=0.01), name
        assert loss != losses["float32"][name], name  # or nothing was computed in bfloat16


@pytest.mark.parametrize("estimator", ["score", "path"])
def test_an_rl_step_in_bfloat16_is_that_in_float32(estimator):
    """The same chains: log-probabilities within 1 %, and a gradient of the same direction."""
    argv = (*SMALL_RL, "--estimator", estimator, "--dtype")
    run = one_step(*argv, "float32")
    explored = train.explore(run, run.prompts[:1], step=0)
    advantage, informative = torch.tensor([[0.75, -0.25, -0.25, -0.25]]), torch.tensor([True])

    logp, gradient = {}, {}
    for dtype in ("float32", "bfloat16"):
        run = one_step(*argv, dtype)
        chains = train.informative_chains(run, explored, advantage, informative)
        _, metrics = train.policy_gradients(run, chains)
        logp[dtype] = chains.old_logp
        gradients = gradients_of(run.model)
        gradient[dtype] = torch.cat([g.flatten() for g in gradients.values()])
        assert metrics["kl"].dtype == torch.float32
    assert logp["bfloat16"].dtype == torch.float32
    assert not torch.equal(logp["bfloat16"], logp["float32"])
    torch.testing.assert_close(logp["bfloat16"], logp["float32"], rtol=0.01, atol=0.05)
    assert logp["bfloat16"].sum().item() == pytest.approx(logp["float32"].sum().item(), rel=0.01)
    assert torch.cosine_similarity(*gradient.values(), dim=0) > 0.99


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chains_are_explored_and_read_in_either_dtype(dtype):
    """The cache keeps keys and values as they were computed; latents and densities are float32."""
    run = one_step(*SMALL_RL, "--dtype", dtype)
    kept = set()
    append = KVCache.append

    def watch(cache, i, k, v):
        k, v = append(cache, i, k, v)
        kept.update((k.dtype, v.dtype))
        return k, v

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVCache, "append", watch)
        explored = train.explore(run, run.prompts[:2], step=0)
    assert kept == {getattr(torch, dtype)}
    assert len(explored.chains) == 8
    rolled = explored.rollout
    assert {rolled.z.dtype, rolled.logp_z.dtype, rolled.logp_token.dtype} == {torch.float32}
