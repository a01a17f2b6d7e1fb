"""Teach a LLaMA to think in latents, then to plan in them.

    python train.py --stage sft     the built-in task, from scratch: learn latents from steps
    python train.py --stage rl      continue from out/sft: better latents, from rewards
    python train.py --stage sft --preset llama-1b --init Llama-3.2-1B-Instruct \\
        --data gsm8k_aug/train.txt --test gsm8k/test.jsonl

These are the two loops of the method; read this file first. `run` (minatp/run/loop.py) is what
surrounds a step: it loads, logs, saves, resumes and validates, and can be skipped on a first
reading. `distributed` shares the work among GPUs; with one process each call returns its argument.
docs/method.md has the equations.
"""

from dataclasses import dataclass

import torch

from minatp.data import batches, left_pad
from minatp.decoder import as_text, read_chains
from minatp.reward import chain_reward, chains_to_read
from minatp.rl import LogProbs, advantages, kl_to_start, log_probs, surrogate
from minatp.rollout import Noise, Rollout, rollout
from minatp.run import distributed, options
from minatp.run.checks import check_init, refuse_rewards
from minatp.run.device import Doing, pick_device
from minatp.run.errors import run_command
from minatp.run.folder import claim_folder
from minatp.run.loop import Run
from minatp.run.splits import load_splits
from minatp.run.terminal import print0, stop_request
from minatp.sft import sft_losses, total_loss


def main(argv=None):
    cfg = options.parse(argv, __doc__)
    device = distributed.start(pick_device(cfg.device))
    distributed.check_batch_size(cfg.batch_size)
    torch.manual_seed(cfg.seed)
    with claim_folder(cfg):
        if cfg.init and not (cfg.resume and cfg.stage == "sft"):
            check_init(cfg)  # before the data is read
        run = Run(cfg, load_splits(cfg), device)
        print0(run.splits.describe())
        if cfg.dry_run:
            from minatp.tools.dry_run import dry_run

            with run.memory_guard():
                dry_run(run, sft_gradients, dry_run_rl)
        else:
            with stop_request, run.memory_guard():
                run.start()
                {"sft": sft, "rl": rl}[cfg.stage](run)
    distributed.stop()


# ---- stage 1: supervised -------------------------------------------------------------------------


def sft(run):
    """Learn latents from written steps, by a curriculum (docs/method.md, Stage 1).

    In stage k the first k steps of each problem are latent; its other steps and the answer are
    text. In the last stage, K + 1, no step is text: the K-th latent step stands for all that are
    left.
    """
    cfg, model = run.cfg, run.model
    plan = curriculum(cfg, len(run.labelled))
    n_total = sum(n_update for _, n_update in plan)
    run.announce(cfg.method, f"{n_total:,} steps of {cfg.batch_size} problems")

    # stage: of the curriculum, 0 … K + 1 (cfg.stage is "sft" or "rl")
    for stage, n_update in plan:
        model.stage = stage
        loader = curriculum_batches(run, stage)

        # run.steps sets the learning rate, skips what a resumed run has done, logs, saves, ...
        # `step` counts the optimizer's steps over all stages
        for step, problems in run.steps(loader, n_update, n_total, stage):
            # 1. The gradient of L_enc + L_dec + L_stop + β·L_KL. With --distill (in every second
            # step of the default) + L_teacher + W·L_distill
            losses, counts = sft_gradients(run, problems, stage, step)

            # 2. Sum the gradients over ranks, clip them, take a step, and clear them. If the sum of
            # the losses or a gradient is not finite, there is no step
            grad_norm = run.optimizer.step(sum(losses.values()), problems)
            run.meter.add({**losses, "grad_norm": grad_norm}, counts, counts["position"])

            # 3. A new φ starts as a copy of π: at the end of stage 0, before any latent, or with
            # previews halfway through it. (Stage 0 comes first, so `step` counts its steps)
            if stage == 0 and model.decode and not model.decoder_started:
                if step + 1 >= (n_update // 2 if model.previews else n_update):
                    model.start_decoder()
    run.finish()


def curriculum(cfg, n_problem):
    """[(stage, optimizer steps)] of the stages that --epochs asks for."""
    steps_per_epoch = n_problem / cfg.batch_size
    return [(stage, max(1, round(epochs * steps_per_epoch))) for stage, epochs in cfg.schedule()]


def curriculum_batches(run, stage):
    """Yield batches, lists of Encoded problems, for one stage.

    Once every step is latent, a share of each batch can be problems that have an answer and no
    steps: the loss of the answer then teaches the latents that lead to it.
    """
    cfg, labelled, answers_only = run.cfg, run.labelled, run.answers_only
    n_answers_only = 0
    if stage > cfg.K and answers_only:
        n_answers_only = cfg.n_answers_only

    seed = cfg.seed * 1000 + stage
    order = batches([row.length for row in labelled], cfg.batch_size - n_answers_only, seed)
    order_answers_only = batches([row.length for row in answers_only], n_answers_only, seed)
    for chosen, chosen_answers_only in zip(order, order_answers_only):
        yield [labelled[i] for i in chosen] + [answers_only[i] for i in chosen_answers_only]


def sft_gradients(run, problems, stage, step, weight=1.0):
    """Accumulate the gradient of the SFT loss of a batch, times `weight`, in the parameters' .grad.

    problems: a list of Encoded. Returns (losses, counts): the losses, each summed over the batch,
    and how many terms each sum has.
    """
    model, sums = run.model, {}
    # Each micro-batch is collated (data.collate): some steps become latents. eps_keys is the noise
    # of the latents, not drawn yet: a seed and an offset for each
    for batch, eps_keys, counts in run.micro_batches(problems, stage, step):
        with run.autocast:
            # "enc": the text after the latents; "dec": each step is read from its latents;
            # "stop": the stop head; "kl": the latents' Gaussians against N(0, I). With --distill
            # also "teacher": π writes the problem in words; "distill": just before the answer, the
            # hidden states of the pass with latents should match those of the pass in words
            losses = sft_losses(model, batch, eps_keys)
            # Their weighted sum, each divided by its count in the WHOLE batch: how that is split
            # over micro-batches and ranks changes nothing
            loss = weight * total_loss(losses, counts, run.cfg.loss_weights)
        loss.backward()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach()
    return distributed.all_reduce(sums, run.device), counts


# ---- stage 2: reinforcement ----------------------------------------------------------------------


def rl(run):
    """Search for better latents: REINFORCE with a group baseline (docs/method.md, Stage 2).

    With --estimator score (the score function, REINFORCE) the latents are actions, with the density
    that they were drawn from. With path (the pathwise, reparameterised gradient), the default of
    the tiny preset, the actions are stops and words alone, and the gradient of their
    log-probabilities runs back through every latent. A reward that depends on the latents directly,
    as coherence does through φ's reading, gives them no credit with path.
    """
    cfg, model = run.cfg, run.model
    work = f"{cfg.updates:,} batches of {cfg.batch_size} questions × {cfg.G} rollouts"
    run.announce(f"rl from {cfg.init}", work)

    for step, (problems, prompts, labelled) in run.steps(rl_batches(run), cfg.updates):
        # 1. Explore: sample G chains of each question
        explored = explore(run, prompts, step)

        # 2. Reward: the right answer, coherent steps, the format. φ puts the thoughts into words
        # where that counts. Every rank sees all rewards
        read_for_reward(run, explored, problems)
        reward, terms = judge(run, explored.chains, problems, step)  # (Q, G)

        # 3. Advantage: against the mean of the group. A group with equal rewards teaches nothing;
        # if every group is like that, there is no update, not even the anchor's
        advantage = advantages(reward, cfg.baseline, cfg.normalise)  # (Q, G)
        informative = (advantage != 0).any(1)  # (Q,)
        chosen = informative_chains(run, explored, advantage, informative)

        # 4. Learn. With one update a batch this is REINFORCE. With more it is GRPO: the ratio to
        # the probabilities at the first update is clipped
        metrics = {}
        for _ in range(cfg.updates_per_batch if informative.any() else 0):
            loss, metrics = policy_gradients(run, chosen)

            # Hold on to what SFT has taught (φ is frozen: L_dec reaches π alone)
            if cfg.anchor:
                sft_gradients(run, labelled, model.stage, step, weight=cfg.anchor)

            metrics["grad_norm"] = run.optimizer.step(loss, problems)

        of_rewards = {"reward": reward.mean(), "signal": informative.float().mean()}
        # (metrics are those of the last update)
        groups = (of_rewards, terms, explored.statistics, metrics)
        means = {name: value for group in groups for name, value in group.items()}
        assert len(means) == sum(map(len, groups)), "a reward term has the name of another value"
        run.meter.add(means, {}, explored.n_position)
    run.finish()


def rl_batches(run):
    """Yield (problems to explore, their prompts, Encoded labelled problems for the anchor)."""
    cfg = run.cfg
    order = batches([len(prompt) for prompt in run.prompts], cfg.batch_size, cfg.seed * 1000)
    lengths = [row.length for row in run.labelled]
    labelled_order = batches(lengths, cfg.batch_size, cfg.seed * 1000 + 1)
    for chosen, chosen_labelled in zip(order, labelled_order):
        problems = [run.questions[i] for i in chosen]
        prompts = [run.prompts[i] for i in chosen]
        yield problems, prompts, [run.labelled[i] for i in chosen_labelled]


@dataclass
class Explored:
    """G chains of each of this rank's questions, those of one question side by side."""

    # (Q, Tq)
    prompt: torch.Tensor
    # (Q, Tq)
    prompt_mask: torch.Tensor
    # of Q·G chains
    noise: Noise
    # of Q·G chains
    rollout: Rollout
    # the same Q·G, a Chain each
    chains: list
    # means for the log, over all ranks
    statistics: dict
    # latents and words of all ranks
    n_position: int


def explore(run, prompts, step):
    """Sample G chains of each prompt, this rank's share -> Explored."""
    cfg, model = run.cfg, run.model
    n_chain = len(prompts) * cfg.G
    prompt, prompt_mask = left_pad(distributed.shard(prompts), run.tokenizer.end, run.device)

    # Draw the noise of all ranks' chains and take ours, so that the number of ranks changes nothing
    seed = run.seed_at(step, stream=1)
    noise = Noise.draw(model, n_chain, run.max_new, seed, spread=cfg.spread, greedy=cfg.greedy)
    our_rows = distributed.shard(torch.arange(n_chain).view(-1, cfg.G)).flatten()
    noise = noise.at(our_rows).to(run.device)

    # Think, stop and answer. (`doing` says what, if memory runs out)
    length = prompt.shape[1] + model.c * model.K + 1 + run.max_new
    run.doing = Doing(f"rl, step {step + 1}", len(our_rows), length, "--batch-size or --G")
    with run.autocast:
        rolled = rollout(model, prompt, prompt_mask, run.max_new, noise, cfg.G)
        chains = as_text(model, run.tokenizer, rolled)

    # How long the chains are, and σ before --spread, a mean over all candidates (of a rank)
    statistics = {
        "latents": rolled.n_latent.float().mean(),
        "sigma": (0.5 * rolled.logvar[rolled.candidate]).exp().mean(),
    }
    statistics = distributed.all_reduce(statistics, run.device, weight=len(prompt))
    n_position = int(rolled.n_latent.sum() + rolled.n_token.sum())
    n_position = distributed.all_reduce({"n": n_position}, run.device)["n"]
    return Explored(prompt, prompt_mask, noise, rolled, chains, statistics, n_position)


def read_for_reward(run, explored, problems=None):
    """Let φ read the chains whose reward depends on their thoughts; all, if problems is None.

    problems: those of all ranks.
    """
    which = None
    if problems is not None:
        which = chains_to_read(run.cfg, explored.chains, our_answers(run, problems))
    with run.autocast:
        read_chains(run.model, run.tokenizer, explored.rollout, explored.chains, which)


def our_answers(run, problems):
    """The right answer of each of this rank's chains."""
    return [p.answer for p in distributed.shard(problems) for _ in range(run.cfg.G)]


def judge(run, chains, problems, step):
    """Reward the chains: (rewards (Q, G) of all ranks, the means of their terms).

    chains: this rank's Chains. problems: those of all ranks.
    """
    cfg = run.cfg
    answers = our_answers(run, problems)
    judged = [chain_reward(cfg, chain, gold) for chain, gold in zip(chains, answers)]

    # Every rank gets all rewards, and learns from its own chains
    reward = torch.tensor([R for R, _ in judged]).view(-1, cfg.G)
    reward = distributed.all_gather(reward)  # (Q, G)
    if not reward.isfinite().all():
        refuse_rewards(reward, step, problems)

    # A control: the same rewards, for the wrong chains
    if cfg.placebo:
        reward = permuted(reward, run, step)

    # The mean of each term, for the log
    means = {}
    for name in judged[0][1]:
        means[name] = torch.tensor([float(terms[name]) for _, terms in judged]).mean()
    return reward, distributed.all_reduce(means, run.device, weight=len(judged))


def permuted(values, run, step):
    """Values (Q, G) in another order, the same on every rank."""
    g = torch.Generator().manual_seed(run.seed_at(step, stream=2))
    return values.flatten()[torch.randperm(values.numel(), generator=g)].view_as(values)


@dataclass
class InformativeChains:
    """B = Q'·G of this rank's chains: those of its Q' informative groups. Only they teach."""

    # (Q', Tq)
    prompt: torch.Tensor
    # (Q', Tq)
    prompt_mask: torch.Tensor
    # of B chains
    rollout: Rollout
    # (B, cK, 2) the noise of their latents, for path; None for score
    eps_keys: torch.Tensor | None
    # (B, cK + K + Tt) the advantage that each decision gets: latents, stops, words
    advantage: torch.Tensor
    # of all ranks: chains that were sampled, and those of informative groups
    n_chain: int
    n_informative: int
    # From the first update on: the log-probability of each decision then, and, once it is needed
    # for the KL, what the SFT policy gives
    old_logp: torch.Tensor | None = None
    start: LogProbs | None = None


def informative_chains(run, explored, advantage, informative):
    """The chains of the informative groups. advantage (Q, G), informative (Q,): of all ranks."""
    cfg, device = run.cfg, run.device
    our_informative = distributed.shard(informative)
    group = our_informative.nonzero()[:, 0].to(device)
    rows = (group[:, None] * cfg.G + torch.arange(cfg.G, device=device)).flatten()
    rolled = explored.rollout.at(rows)

    # Every decision gets the advantage of its chain. (A control, --placebo-latents: latents get
    # that of another chain of the informative groups)
    latent_advantage = advantage
    if cfg.placebo_latents:
        latent_advantage = advantage.clone()
        latent_advantage[informative] = permuted(advantage[informative], run, run.step)

    def for_our_chains(values, n_column):
        """Values (Q, G) of all ranks -> those of `rows`, once for each decision (B, n_column)."""
        return distributed.shard(values)[our_informative].view(-1, 1).expand(-1, n_column)

    cK, K, Tt = rolled.z.shape[1], rolled.stop_prob.shape[1], rolled.token.shape[1]
    of_latents = for_our_chains(latent_advantage, cK)
    of_stops_and_words = for_our_chains(advantage, K + Tt)
    return InformativeChains(
        prompt=explored.prompt[group],
        prompt_mask=explored.prompt_mask[group],
        rollout=rolled,
        eps_keys=explored.noise.eps_keys[rows] if cfg.estimator == "path" else None,
        advantage=torch.cat((of_latents, of_stops_and_words), 1).to(device),
        n_chain=advantage.numel(),
        n_informative=int(informative.sum()) * cfg.G,
    )


def policy_gradients(run, chains):
    """Accumulate the policy gradient of InformativeChains in the parameters' .grad.

    It is that of −Σ advantage·log π over their decisions, divided by the number of all chains that
    were sampled. (The value of the loss means nothing: at the first update every ratio is 1.)
    `chains` also stores, for later updates, what the first one computes.
    Returns (the loss of all ranks, metrics).
    """
    cfg, model, device = run.cfg, run.model, run.device
    prompt, prompt_mask, rolled = chains.prompt, chains.prompt_mask, chains.rollout
    B = len(rolled.z)  # 0 if none of this rank's groups is informative

    loss, metrics = torch.zeros((), device=device), {}
    if B:
        length = prompt.shape[1] + rolled.z.shape[1] + 1 + rolled.token.shape[1]
        run.doing = Doing(f"rl, step {run.step + 1}", B, length, "--batch-size or --G")
        with run.autocast:
            # The log-probability of every decision; a constant 0 where nothing was decided
            new = log_probs(model, prompt, prompt_mask, rolled, cfg.G, chains.eps_keys)
            logp, is_decision = decisions(cfg, model, rolled, new)  # (B, cK + K + Tt)

            # REINFORCE at the first update, where old_logp is logp itself; later the ratio to it is
            # clipped. (Columns without a decision are constant: a mean over decisions divides by
            # is_decision.sum(), as `clamped` does)
            if chains.old_logp is None:
                chains.old_logp = logp.detach()
            losses, clamped = surrogate(logp, chains.old_logp, chains.advantage)
            loss = losses.sum() / chains.n_chain
            metrics["clamped"] = clamped.sum() / is_decision.sum().clamp(min=1)

            # KL to the SFT policy, a mean over the informative chains: measured for each log line,
            # part of the loss with --kl
            if cfg.kl or run.is_log_due:
                kl = kl_of_chains(run, chains, new)
                metrics["kl"] = kl / B
                if cfg.kl:
                    loss = loss + cfg.kl * kl / chains.n_informative
        loss.backward()
        run.doing = run.between_batches
    total = distributed.all_reduce({"loss": loss.detach()}, device)["loss"]
    return total, distributed.all_reduce(metrics, device, weight=B)


def kl_of_chains(run, chains, new):
    """KL(π ‖ π_start), summed over InformativeChains (`kl_to_start`): a scalar.

    new: their LogProbs under π. Both policies read the latents as they were drawn; with path `new`
    is of the chains as π walks them now, so here π reads the drawn latents in a pass of its own.
    """
    cfg, rolled = run.cfg, chains.rollout
    prompts = chains.prompt, chains.prompt_mask
    if cfg.estimator == "path":
        with torch.set_grad_enabled(cfg.kl > 0):
            new = log_probs(run.model, *prompts, rolled, cfg.G)
    if chains.start is None:
        with torch.no_grad():
            chains.start = log_probs(run.start_model, *prompts, rolled, cfg.G)
    return kl_to_start(new, chains.start, rolled.candidate)


def decisions(cfg, model, rolled, new):
    """What the policy decided, side by side: cK latents, K stops, Tt words.

    rolled: a Rollout of B chains; new: its LogProbs. Returns their log-probabilities
    (B, cK + K + Tt), and which of them are decisions, bool.
    """
    # Greedy words were not sampled; with path the latents were not decided, but computed
    logp_token = 0 * new.logp_token if cfg.greedy else new.logp_token
    logp = torch.cat((cfg.latent_weight * new.logp_z, new.logp_stop, logp_token), 1)
    is_latent = rolled.candidate & (cfg.estimator == "score")
    is_stop = rolled.candidate[:, :: model.c] & model.stop
    is_word = (rolled.token >= 0) & (not cfg.greedy)
    return logp, torch.cat((is_latent, is_stop, is_word), 1)


def dry_run_rl(run, problems):
    """For --dry-run: the policy gradients of one batch, every group counted as informative.

    It costs as much as an update that logs its KL, after rollouts of which φ reads every chain. The
    anchor is tried separately. Returns the mean reward, its terms and statistics.
    """
    prompts = run.tokenizer.prompts([p.question for p in problems])
    explored = explore(run, prompts, step=0)
    read_for_reward(run, explored)
    reward, terms = judge(run, explored.chains, problems, step=0)
    advantage = advantages(reward, run.cfg.baseline, run.cfg.normalise)
    all_groups = torch.ones(len(problems), dtype=torch.bool)
    policy_gradients(run, informative_chains(run, explored, advantage, all_groups))
    return {"reward": reward.mean(), **terms, **explored.statistics}


if __name__ == "__main__":
    run_command(main)
