"""`train.py --dry-run`: what the data, the curriculum and the model will be, and one step, before hours are spent on them."""
import os
import statistics
import time

import torch

from . import checkpoint, count, data, run, sets
from .config import UserError
from .latent import ATP
from .reward import number, result
from .rollout import supervise


def dry_run(cfg, splits, device, sft, rl):
    """Print counts, lengths, one problem at each stage, parameters and memory, then make the gradients of one batch: of SFT at the first and
    at the last stage, or of RL; no weight changes.

    sft(model, tokens, rows, stage), rl(model, tokens, problems, max_new): add one batch's gradients; train.py's own.
    """
    if cfg.resume:
        run.need_same(cfg, splits, checkpoint.read_json(checkpoint.newest_checkpoint(cfg.out) / "state.json"))
    elif checkpoint.checkpoints(cfg.out):
        run.say(f"note        {cfg.out} holds a run already; the run itself will need another --out")
    there = memory(device)
    fits = lambda model: held(cfg, model) < 0.9 * there
    model, tokens = (None, None) if cfg.init else on_meta(cfg, splits.train)
    if not model or fits(model):  # otherwise it is too large to build only to be counted
        model, tokens = run.build(cfg, splits.train)
    splits.train = splits.train or splits.answers  # RL can do without labels
    rows = sets.encoded(cfg, splits.train, tokens, model)
    data_report(splits, rows, tokens)
    curriculum_report(cfg, splits, rows, tokens, model)
    n = n_parameters(model)
    run.say(f"\nparameters  {n:,}  ({', '.join(f'{name} {n_parameters(part):,}' for name, part in model.named_children())})")
    longest = sorted(range(len(rows)), key=lambda i: -rows[i].length)[:cfg.batch_size]
    if fits(model):
        model.to(device).set_recompute(cfg.recompute)
    if cfg.stage == "rl":
        model.decoder.requires_grad_(False)
    taught = sorted({cfg.schedule()[0][0], cfg.schedule()[-1][0]}) if cfg.stage == "sft" else [model.stage] * bool(cfg.anchor)
    kept = activations(cfg, model, tokens, rows[longest[0]], device, taught)
    run.say(f"memory      {amount(held(cfg, model))} for weights{', those of the start' * (cfg.stage == 'rl')}, gradients and the optimizer"
            + f", and about {amount(kept)} that a forward pass of {min(cfg.micro_batch or cfg.batch_size, len(rows))} longest problems keeps" * bool(kept)
            + f"; {device} has {amount(there)}")
    if held(cfg, model) + kept > 0.9 * there or not fits(model):
        run.say("one step    not run: it does not fit here")
        return
    for stage in taught:
        one_step(f"stage {stage}, {len(longest)} longest problems", device, lambda: losses(sft(model, tokens, [rows[i] for i in longest], stage)))
    if cfg.stage == "rl":
        asked, max_new = [splits.train[i] for i in longest], run.max_answer(cfg, rows, model)
        one_step(f"{len(asked)} longest questions × {cfg.G} rollouts", device, lambda: rl(model, tokens, asked, max_new).metrics)


def n_parameters(module):
    return sum(p.numel() for p in module.parameters())


def held(cfg, model):
    """Bytes of float32 weights, gradients and two moments; in RL φ has weights alone, and the start is kept for comparison."""
    n = n_parameters(model)
    return 16 * n if cfg.stage == "sft" else 20 * n - 12 * n_parameters(model.decoder)


def activations(cfg, model, tokens, row, device, stages):
    """Bytes that a micro-batch of problems as long as `row` keeps for SFT's backward pass, at that of the stages which keeps most."""
    size = cfg.micro_batch or cfg.batch_size
    if stages and next(model.parameters()).device.type != device.type:  # too large for the device, or to be built
        llama = model.policy.cfg
        parts = count.training_memory(llama, model.K, model.c, size, row, cfg.recompute, scale=llama.n_kv_head)
        return parts["activations"] + parts["logits"]

    def forward(n, stage):
        batch = data.collate([row] * n, stage, model).to(device)
        eps = torch.zeros(n, batch.n_candidate, model.policy.cfg.n_embd, device=device) if model.vae else None
        with run.autocast(device):
            return supervise(model, batch, eps)

    # the difference of two rows and one: what does not grow with the batch is counted elsewhere
    one, two = ([count.kept(model, lambda: forward(n, stage)) for stage in stages] for n in (1, 2))
    return size * max((b - a for a, b in zip(one, two)), default=0)


def on_meta(cfg, train):
    tokens = data.train_tokenizer(train, cfg.vocab_size)
    with torch.device("meta"):
        model = ATP(run.shape(cfg, cfg.vocab_size), **cfg.switches)
    model.end = tokens.end
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
    wrong = sum((r := result(p.steps[-1])) is None or r != number(p.answer) for p in last)
    if wrong:
        run.say(f"note        {wrong:,} of {len(last):,} problems do not end on a step whose result is the answer")


def curriculum_report(cfg, splits, rows, tokens, model):
    """The longest-reasoned of the first problems, at every stage."""
    i = max(range(min(200, len(rows))), key=lambda i: len(rows[i].lines))
    run.say(f"\nproblem     {splits.train[i].question}")
    for stage, epochs in cfg.schedule():
        b = data.collate([rows[i]], stage, model)
        thoughts = [tokens.decode([t for t in text.tolist() if t >= 0]) for text in b.thought] or [""] * (b.L // model.c)
        chain = " ".join(f"[{'z' * model.c}{' = ' + repr(t) if t else ''}]" for t in thoughts)
        text = repr(tokens.decode([t for t in b.target[0].tolist() if t >= 0]))
        run.say(f"  stage {stage} ({epochs:g} epochs)  {chain}{' stop' if bool(b.asks[0]) else ''}  {text}")


def losses(found):
    """Mean losses of (sums, counts). Raises UserError where one is not finite."""
    sums, counts = found
    if not all(map(torch.isfinite, sums.values())):
        raise UserError("dry run: the loss is not finite; look at the weights of --init")
    return {k: v / max(1, counts[k]) for k, v in sums.items()}


def one_step(what, device, work):
    """work() -> {name: number}: told with its time and peak memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    found = {k: float(v) for k, v in work().items()}
    peak = f", peak {amount(torch.cuda.max_memory_allocated(device))}" if device.type == "cuda" else ""
    run.say(f"one step    {what}: {time.perf_counter() - began:.2f} s{peak}; " + "  ".join(f"{k} {v:.3f}" for k, v in found.items()))


def memory(device):
    """Bytes of memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def amount(n):
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"
