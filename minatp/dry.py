"""`train.py --dry-run`: what the data, the curriculum and the model will be, and one step, before hours are spent on them."""
import os
import statistics
import time

import torch

from . import data, run
from .config import UserError
from .latent import ATP
from .reward import same, result


def dry_run(cfg, splits, device, step):
    """Print counts, lengths, one problem at each stage, parameters and memory, then run one update of the largest stage.

    step(model, tokens, rows, stage): adds one batch's gradients; train.py's own.
    """
    if not cfg.init and cfg.n_embd * cfg.n_layer * cfg.n_inner > 10**9:  # too large to build only to be counted
        model, tokens = on_meta(cfg, splits.train)
    else:
        model, tokens = run.build(cfg, splits.train)
    rows = run.encoded(cfg, splits.train, tokens, model)
    data_report(splits, rows, tokens)
    curriculum_report(cfg, splits, rows, tokens, model)
    n = sum(p.numel() for p in model.parameters())
    by_part = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    needed, there = 16 * n, memory(device)  # float32 weights, gradients and AdamW's two moments
    run.say(f"\nparameters  {n:,}  ({', '.join(f'{name} {k:,}' for name, k in by_part.items())})")
    run.say(f"memory      {gib(needed)} for weights, gradients and AdamW, and activations; {device} has {gib(there)}")
    if needed > 0.9 * there or next(model.parameters()).is_meta:
        run.say("one step    not run: it does not fit here")
        return
    one_step(cfg, model.to(device).set_recompute(cfg.recompute), tokens, rows, device, step)


def on_meta(cfg, train):
    tokens = data.train_tokenizer(train, cfg.vocab_size)
    with torch.device("meta"):
        model = ATP(run.shape(cfg, cfg.vocab_size), **cfg.switches)
    return model, tokens


def data_report(splits, rows, tokens):
    """Counts and lengths."""
    spread = lambda xs: f"median {statistics.median(xs):.0f}, most {max(xs)}"
    run.say(f"\ntokens      {len(tokens):,} in the vocabulary")
    run.say(f"question    {spread([len(r.prompt) for r in rows])} tokens")
    run.say(f"steps       {spread([len(r.lines) for r in rows])}; "
            f"{spread([sum(map(len, r.lines)) for r in rows])} tokens as text")
    run.say(f"answer      {spread([len(r.answer) for r in rows])} tokens")
    last = [p for p in splits.train if p.steps]
    wrong = sum(not same(str(float(v)) if (v := result(p.steps[-1])) is not None else None, p.answer) for p in last)
    if wrong:
        run.say(f"note        {wrong:,} of {len(last):,} problems do not end on a step whose result is the answer")


def curriculum_report(cfg, splits, rows, tokens, model):
    """The longest-reasoned of the first problems, at every stage."""
    i = max(range(min(200, len(rows))), key=lambda i: len(rows[i].lines))
    run.say(f"\nproblem     {splits.train[i].question}")
    for stage, epochs in cfg.schedule():
        b = data.collate([rows[i]], stage, tokens, model)
        thoughts = [tokens.decode([t for t in text.tolist() if t >= 0]) for text in b.thought] or [""] * (b.L // model.c)
        chain = " ".join(f"[{'z' * model.c}{' = ' + repr(t) if t else ''}]" for t in thoughts)
        text = repr(tokens.decode([t for t in b.target[0].tolist() if t >= 0]))
        run.say(f"  stage {stage} ({epochs:g} epochs)  {chain}{' stop' if bool(b.asks[0]) else ''}  {text}")


def one_step(cfg, model, tokens, rows, device, step):
    """One batch of the longest problems, at the last stage and at the first: time and peak memory."""
    longest = sorted(rows, key=lambda r: -len(r.prompt) - sum(map(len, r.lines)))[:cfg.batch_size]
    for stage in sorted({cfg.schedule()[0][0], cfg.schedule()[-1][0]}):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        sums, counts, _ = step(model, tokens, longest, stage)
        loss = {k: float(v) / max(1, counts[k]) for k, v in sums.items()}
        peak = f", peak {gib(torch.cuda.max_memory_allocated(device))}" if device.type == "cuda" else ""
        run.say(f"one step    stage {stage}, {len(longest)} longest problems: {time.perf_counter() - began:.2f} s{peak}; "
                + "  ".join(f"{k} {v:.3f}" for k, v in loss.items()))
        if not all(map(torch.isfinite, sums.values())):
            raise UserError("dry run: the loss is not finite; look at the weights of --init")


def memory(device):
    """Bytes of memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gib(n):
    return f"{n / 2**30:.1f} GiB"
