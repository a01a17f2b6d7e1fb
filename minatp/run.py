"""What stands around a training loop: the model, the device, the schedule, what can go wrong, and the lines that are told."""
import hashlib
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields

import torch

from kernels import ops
from kernels.common import is_out_of_memory

from . import checkpoint, data, distributed
from .config import NotFinite, OutOfMemory, Size, Stopped, UserError, flag, silence
from .latent import ATP
from .llama import LLAMA3_ROPE, LlamaConfig


# ---- model --------------------------------------------------------------------------------------------------------------

def build(cfg, train):
    """(model, tokens): from cfg.init, or untrained with a tokenizer learned from `train`. Weights follow the global seed."""
    if cfg.init:
        switches = {k: v for k, v in cfg.switches.items() if k != "decoder_layers" and cfg.stage != "rl"}
        (need_thoughts if cfg.stage == "rl" else need_latents)(cfg)
        model, tokens = checkpoint.load(cfg.init, **switches)
        need_size(model, cfg)
        return model, tokens
    tokens = data.train_tokenizer(train, cfg.vocab_size)
    model = ATP(shape(cfg, len(tokens)), **cfg.switches)
    model.policy.init_weights()
    if model.decode:
        model.decoder.start_from(model.policy)
    model.end = tokens.end
    return model, tokens


def need_size(model, cfg):
    """Raises UserError where an option asks for another size than cfg.init has."""
    for name in (f.name for f in fields(Size) if f.name in cfg.given and f.name != "vocab_size"):
        has, asked = getattr(model.policy.cfg, name, None), getattr(cfg, name)
        if has not in (None, asked):
            raise UserError(f"command line: {flag(name)} {asked} contradicts --init {cfg.init}, which has {has}; leave one away")


def need_thoughts(cfg):
    """RL explores in sampled latents and judges what φ reads in them; how many they are, SFT has settled. Raises UserError for a model
    without them, or where an option asks for others."""
    saved = checkpoint.switches_of(cfg.init)
    if not (saved.get("vae") and saved.get("decode") and saved.get("stage")):
        raise UserError(f"{cfg.init}:0: has no sampled latents or no decoder LM; start --stage rl from an SFT run of --method atp")
    for name in ("c", "K"):
        if name in cfg.given and (asked := getattr(cfg, name)) != (has := saved[name]):
            raise UserError(f"command line: {flag(name)} {asked} contradicts --init {cfg.init}, which has {has}; leave it away")


def need_latents(cfg):
    """SFT from a run that thinks already: as many latents a step and no fewer steps, or it would have to learn them anew; what else is added
    or left away is told. Raises UserError."""
    saved, asked = checkpoint.switches_of(cfg.init), cfg.switches
    if not saved.get("stage") or not cfg.latent:
        return
    for name, fits in (("c", asked["c"] == saved["c"]), ("K", asked["K"] >= saved["K"])):
        if not fits:
            raise UserError(f"command line: --init {cfg.init} thinks with {flag(name)} {saved[name]}, not {asked[name]}; give {flag(name)} {saved[name]}")
    for name, what in (("vae", "VAE"), ("stop", "stop head"), ("decode", "decoder LM")):
        if asked[name] != saved[name]:
            say(f"note: --init {cfg.init} has {'a' if saved[name] else 'no'} {what}: it {'is left away' if saved[name] else 'starts untaught'}")


def fingerprint(model):
    """A short hash of a model's parameters, of the first few numbers of each."""
    h = hashlib.sha256()
    for p in model.parameters():
        h.update(p.detach().flatten()[:64].cpu().numpy().tobytes())
    return h.hexdigest()[:16]


def need_same(cfg, splits, state, start=None):
    """Raises UserError where a resumed run would go on with other problems than it began with, or is to be compared with another start."""
    found = splits.fingerprint  # seconds for a large file
    if state.setdefault("data", found) != found:
        raise UserError(f"{cfg.data or cfg.out}:0: the problems are not those that this run began with (a file was changed since?); bring them back, "
                        "or begin anew in another --out")
    if start and state["start"] != fingerprint(start):
        raise UserError(f"{cfg.init}:0: is not what this run began from (trained again since?); bring that back, or begin anew in another --out")


SMALL = 10**7  # parameters


def place(model, device):
    """Put a model on its device; returns it. On a CPU a small one gets one thread, unless OMP_NUM_THREADS says otherwise: for its
    products two threads wait for each other longer than they save, and on a busy machine several times longer."""
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ and sum(p.numel() for p in model.parameters()) < SMALL:
        torch.set_num_threads(1)
    return model.to(device)


def size(model):
    """"1,130,626 parameters"."""
    return f"{sum(p.numel() for p in model.parameters()):,} parameters"


def seed_at(cfg, step, stream=0):
    """Seed of one step's chance, the same whether or not the run was stopped before it. stream: 0 SFT, 1 rollouts, 2 the placebo, which
    are independent (of a seed torch's generator on a CPU takes the low 32 bits)."""
    return cfg.seed * 1_000_003 + stream * 333_331 + step


def generator(cfg, step, stream=0):
    return torch.Generator().manual_seed(seed_at(cfg, step, stream))


def shape(cfg, vocab_size):
    """LlamaConfig from the options, for a model from scratch."""
    return LlamaConfig(vocab_size=vocab_size, n_layer=cfg.n_layer, n_head=cfg.n_head, n_kv_head=cfg.n_kv_head, n_embd=cfg.n_embd,
                       n_inner=cfg.n_inner, head_dim=cfg.n_embd // cfg.n_head, block_size=cfg.block_size, rope_theta=cfg.rope_theta,
                       rope_scaling=dict(LLAMA3_ROPE) if cfg.preset == "llama-1b" else None, bos=0, eos=(1,))


def pick_device(name):
    """torch.device of --device. Raises UserError where this machine has none such."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"command line: --device {name!r} is not a device; give cpu, cuda or cuda:N")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"command line: --device {name!r} is not supported; give cpu, cuda or cuda:N")
    try:
        ops.use_triton(device)
    except ops.Unavailable as e:
        raise UserError(f"environment: {e}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"command line: --device {name}: this machine shows torch {torch.cuda.device_count()} CUDA devices")
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for every shape, and shapes change here with every batch
    if device.type == "cuda" and device.index is not None and "LOCAL_RANK" not in os.environ:  # under torchrun each process has another
        torch.cuda.set_device(device)  # Triton launches on the current device, wherever the tensors lie
    return device


def autocast(device):
    """bf16 compute over float32 weights on a GPU; nothing on a CPU, where it gains nothing."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def lr_at(cfg, step, n_steps):
    """Learning rate of a stage's step: linear warm-up, of a tenth of the stage at most, then a cosine to a tenth of the peak."""
    warmup = min(cfg.warmup, n_steps // 10)
    if step < warmup:
        return cfg.lr * (step + 1) / (warmup + 1)
    share = (step - warmup) / max(1, n_steps - warmup)
    return cfg.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


def max_answer(cfg, rows, model):
    """Most tokens of an answer after the curriculum stage that the model has reached."""
    if cfg.max_new:
        return cfg.max_new
    return max(16, max((sum(map(len, r.lines[model.stage:] if model.stage <= model.K else [])) + len(r.answer) for r in rows), default=0))


# ---- what can go wrong --------------------------------------------------------------------------------------------------

class Steps:
    """Steps of an optimizer (muon.py), of which none is taken on a loss or gradient that is not finite.

    To look at the gradient's norm would make the host wait for the device at every step. So the device decides: the optimizer leaves
    parameters and moments as they are where `found_inf` is 1 (torch.amp's way), and from the first bad step on it stays 1. `check`,
    before every line and checkpoint, where the host waits anyway, ends the run.
    """
    def __init__(self, optimizer, model, clip):
        self.optimizer, self.model, self.clip, self.seen = optimizer, model, clip, []
        optimizer.found_inf = torch.zeros((), device=model.policy.freq.device)

    def take(self, lr, loss, step, chosen):
        """One step on the gradients that lie in the parameters (of all processes), clipped. Returns their norm before.

        step: how many were before it; chosen: its problems (whatever has `at`).
        """
        distributed.sum_gradients(self.model)
        norm = torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.grad is not None], self.clip)
        told = torch.stack((loss.detach().float(), norm))
        self.optimizer.found_inf = torch.maximum(self.optimizer.found_inf, 1 - told.isfinite().all().float())
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seen.append((told, step, chosen))
        return norm

    def check(self):
        """Raises NotFinite, with step and problems, if a step since the last check was not taken."""
        seen, self.seen = self.seen, []
        for (loss, norm), (_, step, chosen) in zip(torch.stack([s[0] for s in seen]).tolist() if seen else (), seen):
            if not math.isfinite(loss + norm):
                raise NotFinite(f"step {step + 1}: loss {loss:g}, gradient norm {norm:g}: nothing was changed by it; look at its problems, "
                                f"--lr and --init; problems {places(chosen)}")


def need_finite(reward, step, chosen):
    """Raises NotFinite where one of the rewards (B, G), which are on the CPU, is not finite."""
    bad = [p for p, row in zip(chosen, reward.isfinite().all(1).tolist()) if not row]
    if bad:
        raise NotFinite(f"step {step + 1}: a reward is not finite: nothing was changed by it; problems {places(bad)}")


def places(chosen):
    """"a.json:3,17 b.txt:5": where problems stand."""
    lines = {}
    for p in chosen:
        path, _, line = p.at.rpartition(":")
        lines.setdefault(path, []).append(line)
    return " ".join(f"{path}:{','.join(found)}" for path, found in lines.items())


@contextmanager
def memory(what, batch, length, option):
    """Turn a failed allocation inside, of a GPU or of the CPU, into OutOfMemory: what ran, on how much, and the option to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        raise OutOfMemory(f"{what}: out of memory with a batch of {batch} × {length} tokens: lower {option}") from e


def tool_memory(what, prompts, model, max_new):
    """`memory` of a program that solves all prompts, in the batches of evaluate.solve."""
    length = max(map(len, prompts)) + model.c * model.K + 1 + max_new
    return memory(what, min(500, len(prompts)), length, "--problems or --max-new")


class Stop:
    """SIGTERM and Ctrl-C. The first asks the loop to end after its step. For a second one the system's own handler is back, which
    ends the process at once, even inside a kernel."""
    asked = training = False

    def __enter__(self):
        self.asked, self.training, self.before = False, True, {s: signal.signal(s, self.ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        self.training = False
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def ask(self, *_):
        self.asked = True
        for s in self.before:
            signal.signal(s, signal.SIG_DFL)
        with suppress(OSError):  # nobody may be reading
            os.write(1, b"stopping after this step; once more: at once\n")  # print is not safe here

    def check(self, cfg, asked):
        """To be called where everything is saved; asked: whether any process was. Raises Stopped."""
        if asked:
            raise Stopped(f"{cfg.out}:0: stopped when asked to, all is saved; go on with --resume --out {cfg.out}")


stop = Stop()  # signals belong to the process, and so does what they ask for


# ---- lines --------------------------------------------------------------------------------------------------------------

def say(text):
    """One line for the user. Where nobody can read it any more, training goes on: its files hold everything."""
    if distributed.rank() == 0:
        try:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
        except OSError:
            if not stop.training:
                raise
            silence()


def clock(seconds):
    """75.2 -> "1:15"; hours where there are some."""
    m, s = divmod(round(seconds), 60)
    return f"{m // 60}:{m % 60:02}:{s:02}" if m >= 60 else f"{m}:{s:02}"


def progress(what, n):
    """A function to be called after each of the n parts of long work; it tells on a terminal how much is left."""
    began, done = time.perf_counter(), iter(range(1, n + 1))

    def tell():
        k = next(done)
        if sys.stderr.isatty():
            left = f"{what}: {k} of {n} batches, {clock((time.perf_counter() - began) / k * (n - k))} left"
            sys.stderr.write(f"\r\x1b[K{left if k < n else ''}")
            sys.stderr.flush()
    return tell


class Meter:
    """Sums between two progress lines, and the speed."""
    def __init__(self, state=None):
        """state: as `state` gave it, so that the next line after a resume tells what it would have told."""
        self.reset()
        if state:
            self.total = {name: torch.tensor(value) for name, value in state["total"].items()}
            self.count, self.n_token, self.n_step = state["count"], state["n_token"], state["n_step"]
            self.start -= state["seconds"]

    def state(self):
        return {"total": {name: float(value) for name, value in self.total.items()}, "count": self.count, "n_token": self.n_token,
                "n_step": self.n_step, "seconds": time.perf_counter() - self.start}

    def reset(self):
        self.total, self.count, self.n_token, self.n_step, self.start = {}, {}, 0, 0, time.perf_counter()

    @contextmanager
    def paused(self):
        """What is done inside does not count as time of training."""
        began = time.perf_counter()
        yield
        self.start += time.perf_counter() - began

    def add(self, sums, counts, n_token):
        """sums: scalar tensors (kept on their device: no wait for it), counts: what each is a mean over."""
        for name, value in sums.items():
            self.total[name] = self.total.get(name, 0) + value.detach()
            self.count[name] = self.count.get(name, 0) + counts.get(name, 1)
        self.n_token += n_token
        self.n_step += 1

    def read(self, n_left):
        """(means, tokens/s, time left for n_left more steps) since the last read."""
        means = {name: float(value) / max(1, self.count[name]) for name, value in self.total.items()}
        seconds = time.perf_counter() - self.start
        speed, left = self.n_token / seconds, clock(seconds / self.n_step * n_left)
        self.reset()
        return means, speed, left
