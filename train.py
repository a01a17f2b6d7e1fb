"""Teach a LLaMA to think in latents, then to plan in them.

    python train.py --stage sft     the built-in task, from scratch: learn latents from steps
    python train.py --stage rl      continue from out/sft: better latents, from rewards
    python train.py --stage sft --preset llama-1b --init Llama-3.2-1B-Instruct \\
        --data gsm8k_aug_train.txt --test gsm8k_test.json

This file is the method; read it first. `run` (minatp/run/loop.py) is what surrounds it: it loads,
logs, saves, resumes, validates and shares the work among GPUs, and can be skipped on a first
reading. docs/method.md has the equations.
"""

from dataclasses import dataclass

import torch

from minatp.data import batches, left_pad
from minatp.decoder import as_text
from minatp.reward import of_chain
from minatp.rl import advantages, kl_to_start, log_probs, surrogate
from minatp.rollout import Noise, Rollout, rollout
from minatp.run import distributed, options
from minatp.run.checks import refuse_rewards
from minatp.run.device import Doing, pick_device
from minatp.run.errors import run_command
from minatp.run.folder import claim_folder
from minatp.run.huggingface import locate
from minatp.run.loop import Run
from minatp.run.splits import load_splits
from minatp.run.terminal import print0, stop
from minatp.sft import sft_losses, total_loss


def main(argv=None):
    cfg = options.parse(argv, __doc__)
    device = distributed.start(pick_device(cfg.device))
    distributed.check_batch_size(cfg.batch_size)
    torch.manual_seed(cfg.seed)
    with claim_folder(cfg):
        if cfg.init and not (cfg.resume and cfg.stage == "sft"):
            locate(cfg.init)  # fail before the data is read
        run = Run(cfg, load_splits(cfg), device)
        print0(run.splits.describe())
        if cfg.dry_run:
            from minatp.tools.dry_run import dry_run

            dry_run(run, sft_gradients, explore_and_learn)
        else:
            with stop, run.memory_guard():
                run.start()
                {"sft": sft, "rl": rl}[cfg.stage](run)
    distributed.stop()


# ---- stage 1: supervised -------------------------------------------------------------------------


def sft(run):
    """The curriculum.

    In stage k the first k steps of each problem are latent and the rest is text; in the last, K+1,
    all are.
    """
    cfg, model = run.cfg, run.model
    plan = curriculum(cfg, len(run.labelled))
    n_total = sum(n_step for _, n_step in plan)
    run.announce(cfg.method, f"{n_total:,} steps of {cfg.batch_size} problems")

    # From scratch, φ starts as what π has become when the first latents come: after stage 0
    starts_decoder = model.decode and not cfg.init and plan[0][0] == 0

    for stage, n_step in plan:
        model.stage = stage
        loader = curriculum_batches(run, stage)
        for step, problems in run.steps(loader, n_step, n_total, stage):
            losses, counts = sft_gradients(run, problems, stage, step)
            grad_norm = run.optimizer.step(sum(losses.values()), problems)
            if starts_decoder and stage == 0 and step == n_step - 1:
                model.decoder.start_from(model.policy)
            run.record({**losses, "grad_norm": grad_norm}, counts, counts["read"])
    run.finish()


def curriculum(cfg, n_problem):
    """[(stage, optimizer steps)]"""
    steps_per_epoch = n_problem / cfg.batch_size
    return [(stage, max(1, round(epochs * steps_per_epoch))) for stage, epochs in cfg.schedule()]


def curriculum_batches(run, stage):
    """Batches of Encoded problems for one stage.

    Once every step is latent, a share of each batch can be problems that have an answer and no
    steps: the answer's loss teaches the latents that lead to it.
    """
    cfg, labelled, answers_only = run.cfg, run.labelled, run.answers_only
    n_free = round(cfg.answers_share * cfg.batch_size) if stage > cfg.K and answers_only else 0
    seed = cfg.seed * 1000 + stage
    order = batches([row.length for row in labelled], cfg.batch_size - n_free, seed)
    order_free = batches([row.length for row in answers_only], n_free, seed)
    for chosen, chosen_free in zip(order, order_free):
        yield [labelled[i] for i in chosen] + [answers_only[i] for i in chosen_free]


def sft_gradients(run, problems, stage, step, weight=1.0):
    """Add the gradient of a batch's SFT loss, times `weight`, to the parameters.

    problems: a list of Encoded. Returns (losses, counts): the four losses summed over the batch,
    and what each is a mean over.
    """
    model, sums = run.model, {}
    for batch, eps, counts in run.micro_batches(problems, stage, step):
        with run.autocast:
            losses = sft_losses(
                model, batch, eps
            )  # enc: text, dec: φ's reading, stop: stop head, kl
            loss = weight * total_loss(
                losses, counts, run.cfg.beta
            )  # L_enc + L_dec + L_stop + β·L_KL
        loss.backward()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0) + value.detach()
    return distributed.all_reduce(sums, run.device), counts


# ---- stage 2: reinforcement ----------------------------------------------------------------------


def rl(run):
    """REINFORCE with a group baseline: G sampled chains of each question, judged against the mean
    of their group.
    """
    cfg, model = run.cfg, run.model
    run.announce(
        f"rl from {cfg.init}",
        f"{cfg.updates:,} batches of {cfg.batch_size} questions × {cfg.G} rollouts",
    )

    for step, (problems, prompts, labelled) in run.steps(rl_batches(run), cfg.updates):
        # 1. Explore: sample latents, stops and words; φ puts the latents into words
        explored, texts = explore(run, prompts, step)

        # 2. Reward: the right answer, coherent steps, the format. Every rank sees all rewards
        reward, parts = judge(run, texts, problems, step)  # (Q, G)

        # 3. Advantage: against the mean of the group. A group with equal rewards teaches nothing
        advantage = advantages(reward, cfg.baseline, cfg.normalise)  # (Q, G)
        informative = (advantage != 0).any(1)  # (Q,)

        # 4. Learn. One update a batch is REINFORCE; more are GRPO, where the ratio to `old` is
        # clipped
        old, metrics = None, {}
        for _ in range(cfg.updates_per_batch if informative.any() else 0):
            loss, old, metrics = policy_gradients(run, explored, advantage, informative, old)
            if cfg.anchor:  # hold on to what SFT has taught
                sft_gradients(run, labelled, model.stage, step, cfg.anchor)
            metrics["grad_norm"] = run.optimizer.step(loss, problems)

        signal = {"reward": reward.mean(), "signal": informative.float().mean()}
        run.record({**signal, **parts, **explored.statistics, **metrics}, {}, explored.n_token)
    run.finish()


def rl_batches(run):
    """Yield some problems to explore, their prompts, and Encoded labelled problems to anchor on."""
    cfg = run.cfg
    order = batches([len(prompt) for prompt in run.prompts], cfg.batch_size, cfg.seed * 1000)
    lengths = [row.length for row in run.labelled]
    labelled_order = batches(lengths, cfg.batch_size, cfg.seed * 1000 + 1)
    for chosen, chosen_labelled in zip(order, labelled_order):
        problems, prompts = [run.questions[i] for i in chosen], [run.prompts[i] for i in chosen]
        yield problems, prompts, [run.labelled[i] for i in chosen_labelled]


@dataclass
class Explored:
    """G chains of each of this rank's questions, those of one question side by side."""

    prompt: torch.Tensor  # (Q, Tq)
    prompt_mask: torch.Tensor  # (Q, Tq)
    noise: Noise  # of Q·G chains
    rollout: Rollout  # of Q·G chains
    statistics: dict  # means over the chains of all ranks
    n_token: int  # latents and words of all ranks


def explore(run, prompts, step):
    """Sample G chains of each problem.

    Returns (Explored, a list of Chain: the same in words) of this rank's share.
    """
    cfg, model, n_chain = run.cfg, run.model, len(prompts) * run.cfg.G
    prompt, prompt_mask = left_pad(distributed.shard(prompts), run.tokenizer.end, run.device)

    # Chance is drawn for all ranks, so that their number changes nothing
    seed = run.seed_at(step, stream=1)
    noise = Noise.draw(model, n_chain, run.max_new, seed, spread=cfg.spread, greedy=cfg.greedy)
    ours = distributed.shard(torch.arange(n_chain).view(-1, cfg.G)).flatten()
    noise = noise.at(ours, run.device)

    length = prompt.shape[1] + model.c * model.K + 1 + run.max_new
    run.doing = Doing(f"rl, step {step + 1}", len(ours), length, "--batch-size or --G")
    with run.autocast:
        chains = rollout(model, prompt, prompt_mask, run.max_new, noise, cfg.G)
        texts = as_text(model, run.tokenizer, chains)

    real = chains.logvar.any(-1)  # columns with a candidate
    statistics = {
        "latents": chains.n_latent.float().mean(),
        "sigma": (0.5 * chains.logvar[real]).exp().mean(),
    }
    n_token = {"n": int(chains.n_latent.sum() + chains.n_token.sum())}
    explored = Explored(
        prompt,
        prompt_mask,
        noise,
        chains,
        distributed.weighted_mean(statistics, len(prompt), run.device),
        distributed.all_reduce(n_token, run.device)["n"],
    )
    return explored, texts


def judge(run, texts, problems, step):
    """The rewards (Q, G) of all ranks' chains, and the means of their parts: acc, coh, fmt. texts:
    this rank's Chains.
    """
    cfg = run.cfg
    answers = [p.answer for p in distributed.shard(problems) for _ in range(cfg.G)]
    judged = [of_chain(cfg, chain, answer) for chain, answer in zip(texts, answers)]
    names = ("coh", "fmt") if cfg.no_answers else ("acc", "coh", "fmt")
    parts = {k: torch.tensor([parts[k] for _, parts in judged]).mean() for k in names}

    reward = distributed.all_gather(torch.tensor([R for R, _ in judged]).view(-1, cfg.G))  # (Q, G)
    if not reward.isfinite().all():
        refuse_rewards(reward, step, problems)
    if cfg.placebo:  # a control: the right rewards, for the wrong chains
        g = torch.Generator().manual_seed(run.seed_at(step, stream=2))
        reward = reward.flatten()[torch.randperm(reward.numel(), generator=g)].view_as(reward)
    return reward, distributed.weighted_mean(parts, len(answers) // cfg.G, run.device)


def policy_gradients(run, explored, advantage, informative, old):
    """Add the policy gradient of the informative groups to the parameters.

    The loss is −Σ advantage·log π over their chains, divided by the number of all chains. advantage
    (Q, G) and informative (Q,) are those of all ranks; this rank's chains are in `explored`. old:
    what a former update on this batch returned, or None. Returns (loss of all ranks, old, metrics).
    """
    cfg, model, device = run.cfg, run.model, run.device

    # This rank's chains of informative groups
    ours = distributed.shard(informative)
    group = ours.nonzero()[:, 0].to(device)
    chain = (group[:, None] * cfg.G + torch.arange(cfg.G, device=device)).flatten()
    prompt, prompt_mask = explored.prompt[group], explored.prompt_mask[group]
    chains = explored.rollout.select(chain)
    eps = explored.noise.eps[chain] if cfg.estimator == "path" else None
    our_advantage = distributed.shard(advantage)[ours].view(-1, 1).to(device)

    loss, metrics = torch.zeros((), device=device), {}
    if len(chain):
        length = prompt.shape[1] + chains.z.shape[1] + 1 + chains.token.shape[1]
        run.doing = Doing(f"rl, step {run.step + 1}", len(chain), length, "--batch-size or --G")
        with run.autocast:
            # REINFORCE, or the clipped ratio to the first update's log-probabilities
            new = log_probs(model, prompt, prompt_mask, chains, cfg.G, eps)
            logp, is_decision = decisions(cfg, model, chains, new)
            old_logp, at_start = old or (logp.detach(), None)
            each, clamped = surrogate(logp, old_logp, our_advantage)
            loss = each.sum() / advantage.numel()
            metrics["clamped"] = clamped.sum() / is_decision.sum().clamp(min=1)

            # KL to the SFT policy: always measured for the log, part of the loss with --kl
            if cfg.kl or run.is_log_due:
                if at_start is None:
                    with torch.no_grad():
                        at_start = log_probs(run.start_model, prompt, prompt_mask, chains, cfg.G)
                kl = kl_to_start(new, at_start)
                metrics["kl"] = kl / len(chain)
                if cfg.kl:
                    loss = loss + cfg.kl * kl / (int(informative.sum()) * cfg.G)
            old = old_logp, at_start
        loss.backward()
    total = distributed.all_reduce({"loss": loss.detach()}, device)["loss"]
    return total, old, distributed.weighted_mean(metrics, len(chain), device)


def decisions(cfg, model, chains, new):
    """What the policy decided: (log-probabilities (B, T), which of them are decisions (B, T) bool)
    of latents, stops and words.
    """
    words = 0 * new.token if cfg.greedy else new.token  # greedy words were not sampled
    logp = torch.cat((new.z, new.stop, words), 1)
    is_decision = (
        new.candidate & (cfg.estimator == "score"),
        new.candidate[:, :: model.c] & model.stop,
        (chains.token >= 0) & (not cfg.greedy),
    )
    return logp, torch.cat(is_decision, 1)


def explore_and_learn(run, problems):
    """One batch's policy gradients as if every group were informative: the most that an update can
    cost, for --dry-run.
    """
    prompts = run.tokenizer.prompts([p.question for p in problems])
    explored, texts = explore(run, prompts, step=0)
    reward, parts = judge(run, texts, problems, step=0)
    advantage = advantages(reward, run.cfg.baseline, run.cfg.normalise)
    every = torch.ones(len(problems), dtype=torch.bool)
    run.step, run.is_log_due = 0, True  # also measure the KL
    policy_gradients(run, explored, advantage, every, old=None)
    return {"reward": reward.mean(), **parts, **explored.statistics}


if __name__ == "__main__":
    run_command(main)
