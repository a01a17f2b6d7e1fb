"""`train.py --dry-run`: data, curriculum, model and one step, before hours are spent on them."""

import math
import os
import statistics
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from kernels.linear import Linear
from kernels.ops import use_triton

from ..data import collate
from ..latent import ATP
from ..llama import Llama
from ..reward import number, result
from ..run import distributed
from ..run.build import build, llama_config, n_parameters
from ..run.checks import check_problems
from ..run.errors import UserError
from ..run.folder import check_unused
from ..run.huggingface import load_model, read_json
from ..run.saved import newest_checkpoint
from ..run.terminal import print0
from ..sft import sft_losses
from ..tokenizer import train_tokenizer
from . import count


def dry_run(run, sft_gradients, dry_run_rl):
    """Print counts, lengths, a problem at each stage and memory; make the gradients of one batch.

    No weight changes. SFT: at the first and at the last stage. RL: from rollouts.
    run: a loop.Run that has not started. sft_gradients(run, rows, stage, step), dry_run_rl(run,
    problems): train.py's own, which add one batch's gradients to the parameters.
    """
    cfg, splits, device = run.cfg, run.splits, run.device
    check_folder(run)
    available = memory_of(device)

    # A tenth of the memory is left for what is not counted
    def fits(model):
        return held_bytes(cfg, model, device) < 0.9 * available

    # Build the model, unless it is too large to build only to be counted
    if not cfg.init:
        run.model, run.tokenizer = build_on_meta(cfg, splits.train)
    if cfg.init or fits(run.model):
        run.model, run.tokenizer = build(cfg, splits.train)
    model = run.model
    run.settle_dtype()
    # Of a stage 0 with previews the second half is tried: there φ has a gradient, too
    model.decoder_started = True
    if fits(model):
        model.to(device).set_recompute(cfg.recompute)

    # Report on the data and the model
    problems = splits.train or splits.answers  # RL can do without labels
    # The run has not started: set what its methods need
    run.encode_rows()
    run.check_held_out()
    if cfg.stage == "rl":
        run.encode_questions()
    if not splits.train:
        run.labelled = run.encode_problems(problems)
    report_data(problems, run.labelled, run.tokenizer)
    report_curriculum(run, problems)
    parts = ", ".join(f"{name} {n_parameters(part):,}" for name, part in model.named_children())
    print0(f"\nparameters  {n_parameters(model):,}  ({parts})")

    # Report on memory, at the longest problems
    longest = longest_batch([row.length for row in run.labelled], cfg.batch_size)
    if cfg.stage == "rl":
        model.decoder.requires_grad_(False)
    stages = stages_to_try(cfg, model)
    kept = activation_bytes(run, run.labelled[longest[0]], stages)
    report_memory(run, kept, available)
    if held_bytes(cfg, model, device) + kept > 0.9 * available or not fits(model):
        print0("one step    not run: it does not fit here")
        return

    # It fits, and so does the start that RL is compared with
    if cfg.stage == "rl":
        run.start_model = load_model(cfg.init)[0].to(device)

    # One step's gradients at each stage; no optimizer takes them
    for stage in stages:
        with timed_step(f"stage {stage}, {len(longest)} longest problems", device) as values:
            rows = [run.labelled[i] for i in longest]
            values |= mean_losses(*sft_gradients(run, rows, stage, 0))

    # In RL those were the anchor's, if there is one; rollouts and policy gradients follow
    if cfg.stage == "rl":
        longest = longest_batch([len(prompt) for prompt in run.prompts], cfg.batch_size)
        with timed_step(f"{len(longest)} longest questions × {cfg.G} rollouts", device) as values:
            values |= dry_run_rl(run, [run.questions[i] for i in longest])


def longest_batch(lengths, batch_size):
    """The indices of the longest, repeated if there are too few for a batch, as in training."""
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [by_length[i % len(by_length)] for i in range(batch_size)]


def check_folder(run):
    """A resumed run must have the problems that it started with; a new one needs a free folder."""
    cfg = run.cfg
    if cfg.resume:
        state = read_json(newest_checkpoint(cfg.out) / "state.json")
        check_problems(cfg, run.splits, state)
        return
    try:
        check_unused(cfg, Path(cfg.out))
    except UserError as e:
        print0(f"note        the run itself would end here: {e}")


def build_on_meta(cfg, problems):
    """(model, tokenizer) of an untrained model that takes no memory."""
    tokenizer = train_tokenizer(problems, cfg.vocab_size)

    # The vocabulary is --vocab-size, although the tokenizer may have fewer tokens
    with torch.device("meta"):
        model = ATP(llama_config(cfg, cfg.vocab_size), **cfg.switches)
    model.filler, model.end = tokenizer.latent, tokenizer.end
    return model, tokenizer


def stages_to_try(cfg, model):
    """The curriculum stages to try: the first and the last; in RL that of its anchor, if any."""
    if cfg.stage == "sft":
        schedule = cfg.schedule()
        return sorted({schedule[0][0], schedule[-1][0]})
    return [model.stage] if cfg.anchor else []


# ---- memory --------------------------------------------------------------------------------------


def memory_of(device):
    """Bytes of memory of a device; infinity if the system does not tell (Windows)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def held_bytes(cfg, model, device):
    """Bytes of float32 weights, gradients and two moments, and of what kernels keep.

    In RL φ has weights alone, and the start is kept for comparison.
    """
    # For each weight 4 bytes, 4 for its gradient and 8 for its moments; in RL, 4 for the start's.
    # φ is frozen in RL: no gradients, no moments
    n = n_parameters(model)
    n_byte = 16 * n if cfg.stage == "sft" else 20 * n - 12 * n_parameters(model.decoder)
    if not use_triton(device):
        return n_byte

    # Kernels read copies of the Linears' weights in the dtype of the product, and in 16 bits of the
    # output matrices; also of the start's
    n_copied = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    if cfg.dtype != "float32":
        n_copied += sum(m.head.numel() for m in model.modules() if isinstance(m, Llama))
    n_copied *= 1 if cfg.stage == "sft" else 2
    return n_byte + n_copied * (4 if cfg.dtype == "float32" else 2)


def n_at_once(cfg):
    """How many problems of a batch a process takes through the model at once."""
    share = cfg.batch_size // distributed.WORLD_SIZE
    return min(cfg.micro_batch or share, share)


def activation_bytes(run, row, stages):
    """Bytes that a micro-batch keeps for the backward pass of SFT, at the stage that keeps most.

    Every problem is taken to be as long as `row`.
    """
    cfg, model, device = run.cfg, run.model, run.device

    # What is kept at once is a micro-batch's. Without stages (RL without an anchor) nothing is
    size = n_at_once(cfg)
    if (
        stages and next(model.parameters()).device.type != device.type
    ):  # too large for the device, or to be built
        llama = model.policy.cfg
        parts = count.training_memory(
            llama,
            model.K,
            model.c,
            size,
            row,
            cfg.recompute,
            scale=llama.n_kv_head,
            # (with previews stage 0 may keep more than the last; with a teacher that keeps no less)
            distills=cfg.distill > 0 or (model.previews and 0 in stages),
        )
        return parts["activations"] + parts["logits"]

    def forward(n, stage):
        batch = collate([row] * n, stage, model, cfg.distill > 0).to(device)

        # The values of ε do not change what is kept: zeros will do
        eps = None
        if model.vae:
            eps = torch.zeros(n, model.c * model.K, model.policy.cfg.n_embd, device=device)
        with run.autocast:
            return sft_losses(model, batch, eps)

    # the difference of two rows and one: what does not grow with the batch is counted elsewhere
    most = 0
    for stage in stages:
        one = count.kept_bytes(model, partial(forward, 1, stage))
        two = count.kept_bytes(model, partial(forward, 2, stage))
        most = max(most, two - one)
    return size * most


# ---- reports -------------------------------------------------------------------------------------


def report_data(problems, rows, tokenizer):
    """Counts and lengths."""

    def spread(lengths):
        return f"median {statistics.median(lengths):.0f}, most {max(lengths)}"

    n_step = spread([len(row.lines) for row in rows])
    step_tokens = spread([sum(map(len, row.lines)) for row in rows])
    print0(f"\ntokens      {len(tokenizer):,} in the vocabulary")
    print0(f"question    {spread([len(row.prompt) for row in rows])} tokens")
    print0(f"steps       {n_step}; {step_tokens} tokens as text")
    print0(f"answer      {spread([len(row.answer) for row in rows])} tokens")

    # The last step should give the answer; where many do not, the data may have been misread
    with_steps = [p for p in problems if p.steps]
    n_odd = 0
    for p in with_steps:
        last = result(p.steps[-1])
        n_odd += last is None or last != number(p.answer)
    if n_odd:
        print0(
            f"note        {n_odd:,} of {len(with_steps):,} problems do not end on a step whose "
            "result is the answer"
        )


def report_curriculum(run, problems):
    """The problem with most steps, of the first 200, at every stage; in RL at the one reached."""
    rows, model, tokenizer = run.labelled, run.model, run.tokenizer

    def decode(ids):
        # (padding is IGNORE, which is negative)
        return tokenizer.decode([i for i in ids.tolist() if i >= 0])

    chosen = max(range(min(200, len(rows))), key=lambda i: len(rows[i].lines))
    print0(f"\nproblem     {problems[chosen].question}")

    # A line for each stage: the latents, with what φ must write from each (if there is a φ), or the
    # fillers; whether the stop head learns to stop after them, and what the policy must write
    schedule = run.cfg.schedule() if run.cfg.stage == "sft" else [(model.stage, None)]
    for stage, epochs in schedule:
        batch = collate([rows[chosen]], stage, model)
        thoughts = [""] * (batch.thinking.L // model.c)
        if batch.thinking.L and model.decode:
            thoughts = [f" = {decode(ids)!r}" for ids in batch.steps.target]
        chain = " ".join(f"[{'z' * model.c}{text}]" for text in thoughts)
        chain = chain or tokenizer.decode(model.fillers_at(stage))
        stop = " stop" if bool(batch.thinking.has_stop[0]) else ""
        written = decode(batch.text.target[0])
        duration = f" ({epochs:g} epochs)" if epochs else ""
        print0(f"  stage {stage}{duration}  {chain}{stop}  {written!r}")


def report_memory(run, kept, available):
    """What the weights, and the longest problems, take."""
    cfg = run.cfg
    start = ", those of the start" if cfg.stage == "rl" else ""
    held = gibibytes(held_bytes(cfg, run.model, run.device))
    text = f"memory      {held} for weights{start}, gradients and the optimizer"

    # (0 in RL without an anchor, where SFT trains nothing)
    if kept:
        text += (
            f", and about {gibibytes(kept)} that a forward pass of {n_at_once(cfg)} longest "
            "problems keeps"
        )
    has = gibibytes(available) if available < math.inf else "an unknown amount"
    print0(f"{text}; {run.device} has {has}")


def gibibytes(n):
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"


# ---- one step ------------------------------------------------------------------------------------


def mean_losses(losses, counts):
    """The mean losses of (sums, counts). Raises UserError if one is not finite."""
    if not all(map(torch.isfinite, losses.values())):
        raise UserError("dry run: the loss is not finite; look at the weights of --init")
    return {name: loss / max(1, counts[name]) for name, loss in losses.items()}


@contextmanager
def timed_step(what, device):
    """Print the time and peak memory of what runs inside, and the values put into the dict."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start, values = time.perf_counter(), {}
    yield values

    # float() waits for the GPU: without it the time would be that of launching the work
    values = {name: float(value) for name, value in values.items()}
    seconds = time.perf_counter() - start
    peak = ""
    if device.type == "cuda":
        peak = f", peak {gibibytes(torch.cuda.max_memory_allocated(device))}"
    shown = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
    print0(f"one step    {what}: {seconds:.2f} s{peak}; {shown}")
