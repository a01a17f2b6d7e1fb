"""Teach a LLaMA to think in latents.

    python train.py --stage sft                 the built-in task, from scratch, on a laptop
    python train.py --stage sft --preset llama-1b --init Llama-3.2-1B-Instruct --data gsm8k_aug_train.txt --test gsm8k_test.json

method.md's stage 1: a curriculum that turns the first k reasoning steps into latents, k = 0 … K, then all of them.
"""
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make a busy CPU several times slower; read at import of torch

import time

import torch

from minatp import checkpoint, config, data, evaluate, run
from minatp.loss import sft_loss
from minatp.rollout import supervise


def main(argv=None):
    cfg = config.parse(argv, __doc__.split("\n\n")[0])
    device = run.pick_device(cfg.device)
    torch.manual_seed(cfg.seed)
    splits = run.load_splits(cfg)
    run.say("  ".join(f"{len(p):,} {name}" for name, p in (("training", splits.train), ("validation", splits.val), *(
        (f"test ({name})", p) for name, p in splits.tests.items()))) + (f"   {splits.note}" if splits.note else ""))
    if cfg.dry_run:
        from minatp.dry import dry_run
        return dry_run(cfg, splits, device, lambda *a: gradients(cfg, *a, 0, device))
    sft(cfg, splits, device)


def sft(cfg, splits, device):
    # the model, or where the run stood
    found = checkpoint.newest_checkpoint(cfg.out) if cfg.resume else None
    model, tokens = checkpoint.load(found) if found else run.build(cfg, splits.train)
    model.to(device).set_recompute(cfg.recompute)
    optimizer = run.adamw(cfg, model)
    state = checkpoint.restore(found, model, optimizer) if found else {"step": 0, "seconds": 0.0}
    log, meter, began = run.Log(cfg, state["step"]), run.Meter(), time.perf_counter()
    rows = run.encoded(cfg, splits.train, tokens, model)
    plan = [(stage, max(1, round(epochs * len(rows) / cfg.batch_size))) for stage, epochs in cfg.schedule()]
    n_total, first = sum(n for _, n in plan), 0
    run.say(f"{cfg.method}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(tokens):,} tokens, {n_total:,} steps of "
            f"{cfg.batch_size} problems on {device}; files in {cfg.out}")

    for stage, n_steps in plan:
        model.stage = stage
        order = data.batches(len(rows), cfg.batch_size, cfg.seed * 1000 + stage)
        for i in range(n_steps):
            chosen = next(order)
            step = first + i
            if step < state["step"]:
                continue  # done before the resume; the order had to be drawn

            # one update
            lr = run.lr_at(i, n_steps, min(cfg.warmup, n_steps // 10), cfg.lr)
            sums, counts, n_token = gradients(cfg, model, tokens, [rows[j] for j in chosen], stage, step, device)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # what there is to tell
            meter.add({**sums, "grad_norm": norm}, counts, n_token)
            if (step + 1) % cfg.log_every == 0 or i == n_steps - 1:
                means, speed, per_step = meter.read()
                meter.reset()
                loss = sft_loss({k: v for k, v in means.items() if k != "grad_norm"}, {k: 1 for k in means}, cfg.beta)
                log.write({"step": step + 1, "stage": stage, "loss": loss, **means, "lr": lr, "tokens_per_second": speed,
                           "seconds": state["seconds"] + time.perf_counter() - began})
                run.say(f"stage {stage}  step {step + 1:5}/{n_total}  loss {loss:.4f}  "
                        + "  ".join(f"{k} {v:.3f}" for k, v in means.items() if k != "grad_norm")
                        + f"  |g| {means['grad_norm']:.2f}  {speed:,.0f} tok/s  {run.clock(per_step * (n_total - step - 1))} left")
            if (step + 1) % cfg.save_every == 0 or i == n_steps - 1:
                checkpoint.save_checkpoint(cfg.out, {"step": step + 1, "seconds": state["seconds"] + time.perf_counter() - began},
                                           model, tokens, optimizer, source=found or cfg.init)
        first += n_steps
        if first > state["step"]:
            m = validate(cfg, model, tokens, rows, splits.val, stage)
            log.write({"step": first, "stage": stage, "validation": m})
            run.say(f"stage {stage}  validation: {tell(m)}")
            meter.reset()

    seconds = state["seconds"] + time.perf_counter() - began
    checkpoint.write_folder(log.out / "final", lambda tmp: checkpoint.save(tmp, model, tokens, found or cfg.init))
    log.summary(summarise(cfg, model, tokens, rows, splits, seconds, device))


def gradients(cfg, model, tokens, rows, stage, step, device):
    """Add one batch's gradients to the parameters, micro-batch by micro-batch.

    Every loss is divided by its count in the whole batch and every row has its own noise, so that the split changes nothing.
    Returns (sums, counts, positions read).
    """
    rows = sorted(rows, key=lambda r: len(r.prompt))  # micro-batches of like length
    size = cfg.micro_batch or len(rows)
    parts = [data.collate(rows[i:i + size], stage, tokens, model) for i in range(0, len(rows), size)]
    counts = {name: sum(p.counts[name] for p in parts) for name in parts[0].counts}
    noise = torch.randn(len(rows), max(p.n_candidate for p in parts), model.policy.cfg.n_embd,
                        generator=torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)) if model.vae else None
    total, n_token = {}, 0
    for i, part in enumerate(parts):
        eps = None if noise is None else noise[i * size:(i + 1) * size].to(device)
        n_token += int(part.prompt_valid.sum() + part.n_latent.sum() + (part.target >= 0).sum())
        with run.autocast(device):
            sums = supervise(model, part.to(device), eps)
            loss = sft_loss(sums, counts, cfg.beta)
        loss.backward()
        for name, value in sums.items():
            total[name] = total.get(name, 0) + value.detach()
    return total, counts, n_token


# ---- measuring ----------------------------------------------------------------------------------------------------------

def room(cfg, rows, stage):
    """Most tokens of an answer at a curriculum stage."""
    if cfg.max_new:
        return cfg.max_new
    text = max(sum(map(len, r.lines[stage:])) + len(r.answer) for r in rows) if stage <= cfg.K else max(len(r.answer) for r in rows)
    return max(16, text)


def validate(cfg, model, tokens, rows, problems, stage):
    """Accuracy of the mean policy on the validation set, thinking as far as the stage has taught it."""
    prompts = [tokens.prompt(p.question) for p in problems]
    with run.autocast(model.policy.freq.device):
        chains = evaluate.solve(model, tokens, prompts, room(cfg, rows, stage), cfg.eval_batch)
    return evaluate.measure(chains, problems)


def summarise(cfg, model, tokens, rows, splits, seconds, device):
    """summary.json: the test set, once."""
    stage = cfg.schedule()[-1][0]
    measured, max_new = {}, room(cfg, rows, stage)
    for name, problems in splits.tests.items():
        prompts = [tokens.prompt(p.question) for p in problems]
        started = time.perf_counter()
        with run.autocast(device):
            solve = lambda seed: evaluate.solve(model, tokens, prompts, max_new, cfg.eval_batch, seed, cfg.temperature)
            measured[name] = evaluate.measure(solve(None), problems)
            measured[name]["test_seconds"] = time.perf_counter() - started
            if cfg.votes:
                measured[name]["sampled"] = evaluate.vote([solve(cfg.seed * 1000 + k) for k in range(cfg.votes)], problems)
        run.say(f"test ({name}): {tell(measured[name])}")
    return {"stage": cfg.stage, "method": cfg.method, "seed": cfg.seed, **next(iter(measured.values())), "tests": measured,
            "seconds": seconds, "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "training_problems": len(rows), "parameters": sum(p.numel() for p in model.parameters())}


def tell(m):
    low, high = m["accuracy_ci95"]
    coherence = "" if m["coherence"] is None else f", coherence {m['coherence']:.1%}"
    sampled = "" if "sampled" not in m else f"; of {m['sampled']['k']} samples: any {m['sampled']['pass']:.1%}, majority {m['sampled']['majority']:.1%}"
    return (f"{m['accuracy']:.1%} of {m['n_problems']} solved [{low:.1%}, {high:.1%}], {m['latents']:.1f} latents + "
            f"{m['answer_tokens']:.1f} tokens{coherence}{sampled}")


if __name__ == "__main__":
    sys.exit(config.guarded(main))
