"""Teach a LLaMA to think in latents, then to plan in them.

    python train.py --stage sft      the built-in task, from scratch, on a laptop: thoughts learned from written steps
    python train.py --stage rl       goes on from out/sft: better thoughts, from the reward of their answers
    python train.py --stage sft --preset llama-1b --init Llama-3.2-1B-Instruct --data gsm8k_aug_train.txt --test gsm8k_test.json
"""
import sys
import time
from typing import NamedTuple

import torch

from kernels import ops
from minatp import checkpoint, config, data, distributed, evaluate, folder, muon, problems, reward, run, sets
from minatp.loss import advantages, sft_loss, surrogate
from minatp.rollout import Noise, Rollout, rollout, score, supervise


def main(argv=None):
    cfg = config.parse(argv, __doc__)
    device = distributed.start(run.pick_device(cfg.device))
    distributed.check(cfg.batch_size)
    torch.manual_seed(cfg.seed)
    with folder.own(cfg):
        if cfg.init and not (cfg.resume and cfg.stage == "sft"):  # which has all in its checkpoint
            checkpoint.locate(cfg.init)  # before the data is read
        splits = sets.load(cfg)
        run.say(splits.tell())
        if cfg.dry_run:
            from minatp.dry import dry_run
            dry_run(cfg, splits, device, lambda *a: sft_gradients(cfg, *a, 0, device), lambda *a: rl_gradients(cfg, *a, device))
        else:
            with run.stop, run.memory(f"--stage {cfg.stage}", cfg.batch_size, cfg.block_size, "--batch-size or the size of the model"):
                {"sft": sft, "rl": rl}[cfg.stage](cfg, splits, device)
    distributed.stop()


# ---- stage 1: method.md, Stage 1 ----------------------------------------------------------------------------------------

def sft(cfg, splits, device):
    """The curriculum: in stage k the first k steps of each problem are latent, in the last stage all of them."""
    found = checkpoint.newest_checkpoint(cfg.out) if cfg.resume else None
    model, tokens = checkpoint.load(found) if found else run.build(cfg, splits.train)
    run.place(model, device).set_recompute(cfg.recompute)
    optimizer = muon.build(cfg, model)
    state = checkpoint.restore(found, model, optimizer) if found else {"step": 0, "seconds": 0.0}
    run.need_same(cfg, splits, state)
    log, meter, steps = folder.Log(cfg, state), run.Meter(state.get("meter")), run.Steps(optimizer, model, cfg.clip)
    rows, answers = sets.encoded(cfg, splits.train, tokens, model), sets.encoded(cfg, splits.answers, tokens, model, free=True)
    sets.need_room(cfg, splits, tokens, model, run.max_answer(cfg, rows, model))
    model.longest = max([model.longest, *(len(text) for r in rows for text in (*r.texts, r.rest))])
    plan = [(stage, max(1, round(epochs * len(rows) / cfg.batch_size))) for stage, epochs in cfg.schedule()]
    n_total, first = sum(n for _, n in plan), 0
    # from scratch, φ starts as what π has become when thoughts begin
    decoder_start = plan[0][1] - 1 if plan[0][0] == 0 and model.decode and not cfg.init else -1
    run.say(f"{cfg.method}: {run.size(model)}, {len(tokens):,} tokens, {n_total:,} steps of {cfg.batch_size} problems on {device}; "
            f"files in {cfg.out}")

    for stage, n_steps in plan:
        model.stage = stage
        # problems with answers alone can be learned from once every step is latent
        n_free = round(cfg.answers_share * cfg.batch_size) if stage > cfg.K and answers else 0
        order = data.batches([r.length for r in rows], cfg.batch_size - n_free, cfg.seed * 1000 + stage)
        order_free = data.batches([r.length for r in answers], n_free, cfg.seed * 1000 + stage)
        for i in range(n_steps):
            chosen = [rows[j] for j in next(order)] + [answers[j] for j in next(order_free)]
            step = first + i
            if step < state["step"]:
                continue  # done before the resume; the order had to be drawn

            lr = run.lr_at(cfg, i, n_steps)
            sums, counts = sft_gradients(cfg, model, tokens, chosen, stage, step, device)
            norm = steps.take(lr, sum(sums.values()), step, chosen)
            if step == decoder_start:
                model.decoder.start_from(model.policy)

            meter.add({**sums, "grad_norm": norm}, counts, counts["read"])
            if (step + 1) % cfg.log_every == 0 or i == n_steps - 1:
                steps.check()
                means, speed, left = meter.read(n_total - step - 1)
                norm = means.pop("grad_norm")
                loss = sft_loss(means, dict.fromkeys(means, 1), cfg.beta)
                log.write({"step": step + 1, "stage": stage, "loss": loss, **means, "grad_norm": norm, "lr": lr,
                           "tokens_per_second": speed, "seconds": log.seconds()})
                run.say(f"stage {stage}  step {step + 1:5}/{n_total}  loss {loss:.4f}  " + "  ".join(f"{k} {v:.3f}" for k, v in means.items())
                        + f"  |g| {norm:.2f}  {speed:,.0f} tok/s  {left} left")
            stopping = distributed.anyone(run.stop.asked, device)
            if (step + 1) % cfg.save_every == 0 or i == n_steps - 1 or stopping:
                steps.check()
                state |= {"step": step + 1, "seconds": log.seconds(), "meter": meter.state()}
                checkpoint.save_checkpoint(cfg.out, state, model, tokens, optimizer)
                run.stop.check(cfg, stopping)
        first += n_steps
        if first >= state["step"] and first > log.validated:  # a run can have been stopped between saving and this
            with meter.paused():
                m = evaluate.measure(solve(cfg, model, tokens, splits.val, run.max_answer(cfg, rows, model)), splits.val)
            log.write({"step": first, "stage": stage, "validation": m})
            run.say(f"stage {stage}  validation: {evaluate.tell(m)}")

    seconds = log.seconds()
    checkpoint.save_final(cfg.out, model, tokens)
    tests = test(cfg, model, tokens, splits, run.max_answer(cfg, rows, model))
    log.summary(cfg, tests, seconds, device, training_problems=len(rows))


def sft_gradients(cfg, model, tokens, rows, stage, step, device, weight=1.0):
    """Add one batch's SFT gradients, times `weight`, to the parameters, micro-batch by micro-batch.

    Every loss is divided by its count in the whole batch and every row has its own noise, so that the split, over micro-batches and
    over processes, changes nothing. Returns (sums, counts, "read" among them: positions).
    """
    rows = sorted(rows, key=lambda r: len(r.prompt))  # micro-batches of like length
    noise = distributed.mine(ops.noise(run.seed_at(cfg, step), len(rows), model.c * model.K)) if model.vae else None
    rows = distributed.mine(rows)
    size = cfg.micro_batch or len(rows)
    parts = [data.collate(rows[i:i + size], stage, model) for i in range(0, len(rows), size)]
    counts = {name: sum(p.counts[name] for p in parts) for name in parts[0].counts}
    counts["read"] = sum(int(p.prompt_valid.sum() + p.n_latent.sum() + (p.target >= 0).sum()) for p in parts)
    counts, total = distributed.total(counts, device), {}
    for i, part in enumerate(parts):
        eps = None if noise is None else noise[i * size:(i + 1) * size].to(device)
        length = part.prompt.shape[1] + part.L + part.tail.shape[1]
        with run.memory(f"sft, stage {stage}, step {step + 1}", len(part.prompt), length, "--micro-batch or --batch-size"):
            with run.autocast(device):
                sums = supervise(model, part.to(device), eps)
                loss = weight * sft_loss(sums, counts, cfg.beta)
            loss.backward()
        for name, value in sums.items():
            total[name] = total.get(name, 0) + value.detach()
    return distributed.total(total, device), counts


# ---- stage 2: method.md, Stage 2 ----------------------------------------------------------------------------------------

def rl(cfg, splits, device):
    """REINFORCE with a group baseline: G sampled chains of each question, rewarded for the answer and for coherence."""
    found = checkpoint.newest_checkpoint(cfg.out) if cfg.resume else None
    run.need_thoughts(cfg)
    model, tokens = checkpoint.load(found or cfg.init)
    start = checkpoint.load(cfg.init)[0].to(device)
    run.need_size(model, cfg)
    run.place(model, device).set_recompute(cfg.recompute)
    model.decoder.requires_grad_(False)
    optimizer = muon.build(cfg, model)
    state = checkpoint.restore(found, model, optimizer) if found else {"step": 0, "seconds": 0.0, "start": run.fingerprint(start)}
    run.need_same(cfg, splits, state, start)
    log, meter, steps = folder.Log(cfg, state), run.Meter(state.get("meter")), run.Steps(optimizer, model, cfg.clip)
    pool = [*splits.train, *splits.answers] if cfg.data else splits.answers  # the built-in task keeps a set for RL
    rows = sets.encoded(cfg, splits.train, tokens, model)
    val_rows = sets.encoded(cfg, [p for p in splits.val if p.steps][:200], tokens, model)
    max_new = run.max_answer(cfg, rows, model)
    prompts = sets.prompts(pool, tokens, model, max_new)
    sets.need_room(cfg, splits, tokens, model, max_new)
    run.say(f"rl from {cfg.init}: {run.size(model)}, {cfg.updates:,} batches of {cfg.batch_size} questions × {cfg.G} rollouts on {device}; "
            f"files in {cfg.out}")

    order, anchors = (data.batches(lengths, cfg.batch_size, cfg.seed * 1000 + k)
                      for k, lengths in enumerate(([len(p) for p in prompts], [r.length for r in rows])))
    silent, taught = state.get("silent", 0), read_back(start, tokens, val_rows, device)

    def validate(step):
        """Where it is due and not done: a run can have been stopped between saving and this."""
        if step > log.validated and (step % cfg.val_every == 0 or step == cfg.updates):
            with meter.paused():
                m = {**evaluate.measure(solve(cfg, model, tokens, splits.val, max_new), splits.val),
                     **diagnose(cfg, model, tokens, splits.val, val_rows, taught, max_new, device)}
            log.write({"step": step, "validation": m})
            run.say(f"rl  validation: {evaluate.tell(m)}; {m['thought_share']:.0%} of the reward's variance from thoughts"
                    + (f"; reading {m['reading']:.2f} nats ({m['drift']:+.2f})" if val_rows else ""))

    validate(state["step"])
    for step in range(cfg.updates):
        chosen, anchor = next(order), next(anchors)
        if step < state["step"]:
            continue

        asked, lr = [pool[i] for i in chosen], run.lr_at(cfg, step, cfg.updates)
        x = explore(cfg, model, tokens, asked, [prompts[i] for i in chosen], step, max_new, device)
        due, old, metrics = (step + 1) % cfg.log_every == 0 or step == cfg.updates - 1, None, {}
        for _ in range(cfg.updates_per_batch if x.informative.any() else 0):
            loss, old, metrics = policy_gradients(cfg, model, start if cfg.kl or due else None, x, old, f"rl, step {step + 1}")
            if cfg.anchor:
                sft_gradients(cfg, model, tokens, [rows[i] for i in anchor], model.stage, step, device, cfg.anchor)
            metrics["grad_norm"] = steps.take(lr, loss, step, asked)
        silent = count_silent(silent, x.informative)
        meter.add({**x.metrics, **metrics}, {}, x.n_token)
        if due:
            steps.check()
            means, speed, left = meter.read(cfg.updates - step - 1)
            log.write({"step": step + 1, **means, "lr": lr, "tokens_per_second": speed, "seconds": log.seconds()})
            run.say(f"rl  step {step + 1:5}/{cfg.updates}  " + "  ".join(f"{k} {v:.3f}" for k, v in means.items())
                    + f"  {speed:,.0f} tok/s  {left} left")
        stopping = distributed.anyone(run.stop.asked, device)
        if any((step + 1) % n == 0 for n in (cfg.save_every, cfg.val_every)) or step == cfg.updates - 1 or stopping:
            steps.check()
            state |= {"step": step + 1, "seconds": log.seconds(), "meter": meter.state(), "silent": silent}
            checkpoint.save_checkpoint(cfg.out, state, model, tokens, optimizer)
            run.stop.check(cfg, stopping)
        validate(step + 1)

    seconds = log.seconds()
    checkpoint.save_final(cfg.out, model, tokens)
    tests = test(cfg, model, tokens, splits, max_new, start)
    log.summary(cfg, tests, seconds, device, training_problems=len(pool))


def count_silent(silent, informative):
    """How many batches in a row had next to no signal, this one included; at 50 of them there is a warning. informative (B,) bool."""
    silent = silent + 1 if informative.float().mean() < 0.05 else 0
    if silent == 50:
        run.say("warning: for 50 batches fewer than 5 % of the groups had rewards that differ, so there is little to learn from: look at "
                "acc (all right or all wrong?), fmt (0: answers do not end), sigma and --spread (do the thoughts differ at all?)")
    return silent


class Explored(NamedTuple):
    """One batch of questions, explored: this process's chains, G of a question side by side, and what all of them earned."""
    prompt: torch.Tensor     # (B, Tq)
    valid: torch.Tensor
    noise: Noise             # of B·G chains
    rollout: Rollout
    advantage: torch.Tensor  # (questions of all processes, G)
    informative: torch.Tensor  # (questions of all processes,) bool: where the advantages are not all 0
    metrics: dict
    n_token: int


def explore(cfg, model, tokens, asked, prompts, step, max_new, device):
    """G chains of each problem asked (this process's share of them), judged against their group -> Explored."""
    noise = Noise.draw(model, len(asked) * cfg.G, max_new, run.seed_at(cfg, step, 1), spread=cfg.spread, greedy=cfg.greedy)
    noise = noise.at(distributed.mine(torch.arange(len(asked) * cfg.G).view(-1, cfg.G)).flatten(), device)
    prompt, valid = data.left_pad(distributed.mine(prompts), tokens.end, device)
    with run.memory(f"rl, step {step + 1}", len(noise.eps), prompt.shape[1] + model.c * model.K + 1 + max_new, "--batch-size or --G"):
        with run.autocast(device):
            r = rollout(model, prompt, valid, max_new, noise, cfg.G)
            chains = evaluate.as_text(model, tokens, r)
    R, parts = judge(cfg, chains, [p.answer for p in distributed.mine(asked)])
    R = distributed.whole(R)  # every process knows all rewards and learns from its own chains
    run.need_finite(R, step, asked)
    if cfg.placebo:
        R = R.flatten()[torch.randperm(R.numel(), generator=run.generator(cfg, step, 2))].view_as(R)
    advantage = advantages(R, cfg.baseline, cfg.normalise)
    informative = (advantage != 0).any(1)
    parts |= {"latents": r.n_latent.float().mean(), "sigma": (0.5 * r.logvar[r.logvar.any(-1)]).exp().mean()}
    parts = distributed.mean(parts, len(prompt), device)
    n_token = distributed.total({"n": int(r.n_latent.sum() + r.n_token.sum())}, device)["n"]
    return Explored(prompt, valid, noise, r, advantage, informative, {"reward": R.mean(), "signal": informative.float().mean(), **parts},
                    n_token)


def policy_gradients(cfg, model, start, x, old, what):
    """Add the policy gradient of x (Explored), of its informative groups, to the parameters. start, old: see policy_loss. what: names this
    batch where memory runs out. Returns (loss of all processes, old for the next update on this batch, metrics)."""
    device, informative = x.prompt.device, distributed.mine(x.informative)
    group = informative.nonzero()[:, 0].to(device)
    chain = (group[:, None] * cfg.G + torch.arange(cfg.G, device=device)).flatten()
    advantage = distributed.mine(x.advantage)[informative].view(-1, 1).to(device)
    loss, metrics = torch.zeros((), device=device), {}
    length = x.prompt.shape[1] + x.rollout.z.shape[1] + 1 + x.rollout.token.shape[1]
    if len(chain):
        with run.memory(what, len(chain), length, "--batch-size or --G"):
            with run.autocast(device):
                loss, old, metrics = policy_loss(cfg, model, start, x.prompt[group], x.valid[group], x.rollout.take(chain), advantage,
                                                 x.noise.eps[chain], old, x.advantage.numel(), int(x.informative.sum()) * cfg.G)
            loss.backward()
    return distributed.total({"loss": loss.detach()}, device)["loss"], old, distributed.mean(metrics, len(chain), device)


def rl_gradients(cfg, model, tokens, asked, max_new, device):
    """Explore the problems asked and add their policy gradients, as if every group had a signal: the most that an update can cost, for
    --dry-run. Returns Explored."""
    start = checkpoint.load(cfg.init)[0].to(device)
    x = explore(cfg, model, tokens, asked, [tokens.prompt(p.question) for p in asked], 0, max_new, device)
    every = x._replace(informative=torch.ones_like(x.informative))
    policy_gradients(cfg, model, start, every, None, "rl, dry run")
    return x


def reward_of(cfg, chain, gold):
    """The reward of a Chain and its parts."""
    return reward.total(chain.text, chain.steps, chain.ended, None if cfg.no_answers else gold, cfg.w_acc, cfg.w_coh, cfg.w_fmt,
                        cfg.coherence == "strict")


def judge(cfg, chains, golds):
    """Rewards (B, G) of the chains of B questions, and the means of their parts: accuracy only where answers are looked at."""
    found = [reward_of(cfg, c, golds[i // cfg.G]) for i, c in enumerate(chains)]
    parts = {k: torch.tensor([p[k] for _, p in found]).mean() for k in ("acc", "coh", "fmt")[cfg.no_answers:]}
    return torch.tensor([R for R, _ in found]).view(len(golds), cfg.G), parts


def policy_loss(cfg, model, start, prompt, valid, r, advantage, eps, old, n, n_informative):
    """−Σ advantage·log-probability over the chains r of the informative groups, over all n chains of the batch, of which n_informative are
    in such groups; both counted over all processes.

    start: the SFT policy where the KL to it is asked for, which is a pass more. Returns (loss, what later updates on this batch are
    compared with: the log-probabilities, and start's Score or None; metrics).
    """
    s = score(model, prompt, valid, r, cfg.G, eps if cfg.estimator == "path" else None)
    new = torch.cat((s.logp_z, s.logp_stop, s.logp_token if not cfg.greedy else 0 * s.logp_token), 1)
    old, ref = (new.detach(), None) if old is None else old
    each, clamped = surrogate(new, old, advantage)
    loss = each.sum() / n
    decided = torch.cat((s.candidate & (cfg.estimator == "score"), s.candidate[:, ::model.c] & model.stop,
                         (r.token >= 0) & (not cfg.greedy)), 1)  # what is no decision has ratio 1, and would hide those that are clamped
    metrics = {"clamped": clamped.sum() / decided.sum().clamp(min=1)}
    if start is not None:
        with torch.no_grad():
            ref = ref or score(start, prompt, valid, r, cfg.G)
        kl = kl_to(s, ref)
        metrics["kl"] = kl / len(advantage)
    return loss + cfg.kl * kl / n_informative if cfg.kl else loss, (old, ref), metrics


def kl_to(s, ref):
    """KL(π ‖ π_start), summed over the chains: of the heads' Gaussians for the thoughts, by samples (k3) for stops and words."""
    gauss = 0.5 * (ref.logvar - s.logvar + ((s.logvar.exp() + (s.mu - ref.mu).pow(2)) * torch.exp(-ref.logvar)) - 1).sum(-1)
    k3 = lambda new, old: ((old - new).clamp(-10, 10).exp() - 1 - (old - new)).sum()
    return gauss[s.candidate].sum() + k3(s.logp_stop, ref.logp_stop) + k3(s.logp_token, ref.logp_token)


@torch.no_grad()
def diagnose(cfg, model, tokens, val, val_rows, taught, max_new, device):
    """Whether thoughts matter to the reward, and whether the frozen φ still reads them as it read the SFT policy's (`taught`)."""
    some = val[:24]
    with run.autocast(device):
        share, total = evaluate.reward_variance(model, tokens, [tokens.prompt(p.question) for p in some], [p.answer for p in some],
                                                lambda chain, gold: reward_of(cfg, chain, gold)[0], max_new, cfg.seed, spread=cfg.spread, greedy=cfg.greedy)
    reading = read_back(model, tokens, val_rows, device)
    return {"thought_share": share, "reward_variance": total, **({"reading": reading, "drift": reading - taught} if val_rows else {})}


@torch.no_grad()
def read_back(model, tokens, rows, device):
    """−log p that φ gives the true steps of problems that have some, a thought; None without such problems."""
    if not rows:
        return None
    batch = data.collate(rows, model.stage, model)
    with run.autocast(device):
        return float(supervise(model, batch.to(device))["dec"]) / batch.counts["dec"]


# ---- measuring ----------------------------------------------------------------------------------------------------------

def solve(cfg, model, tokens, problems, max_new, seed=None):
    """One Chain per problem: the mean policy, or sampled from a seed. Raises Stopped between batches: all is saved before."""
    prompts = [tokens.prompt(p.question) for p in problems]
    length = max(map(len, prompts)) + model.c * model.K + 1 + max_new
    with run.memory("evaluation", min(cfg.eval_batch, len(prompts)), length, "--eval-batch"), run.autocast(model.policy.freq.device):
        return evaluate.solve(model, tokens, prompts, max_new, cfg.eval_batch, seed, cfg.temperature,
                              lambda: run.stop.check(cfg, run.stop.asked and distributed.world() == 1))  # several would not agree


def test(cfg, model, tokens, splits, max_new, start=None):
    """The test sets, once: {name: measurement}; beside `start`, where one is given, on the same problems."""
    tests = {}
    for name, asked in splits.tests.items():
        began = time.perf_counter()
        chains = solve(cfg, model, tokens, asked, max_new)
        m = tests[name] = {**evaluate.measure(chains, asked), "test_seconds": time.perf_counter() - began}
        if cfg.votes:
            m["sampled"] = evaluate.vote([solve(cfg, model, tokens, asked, max_new, cfg.seed * 1000 + k) for k in range(cfg.votes)], asked)
        run.say(f"test ({name}): {evaluate.tell(m)}")
        if not cfg.data:
            taught = {problems.numbers(p) for p in splits.train + (splits.answers or problems.generate("answers", cfg.answers, 0))}
            new = [i for i, p in enumerate(asked) if problems.numbers(p) not in taught]
            if new:
                m["new_numbers"] = evaluate.measure([chains[i] for i in new], [asked[i] for i in new])
                run.say(f"  with numbers that no problem to learn from has, of either set: {evaluate.tell(m['new_numbers'])}")
        if start:
            before = solve(cfg, start, tokens, asked, max_new)
            b = evaluate.measure(before, asked)
            m |= {"start_accuracy": b["accuracy"], "start_coherence": b["coherence"], "start_tokens": b["tokens"],
                  **evaluate.paired(chains, before, asked)}
            run.say(f"start ({name}): {evaluate.tell(b)}; {evaluate.tell_gain(m)}")
    return tests


if __name__ == "__main__":
    sys.exit(config.guarded(main))
