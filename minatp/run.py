"""What stands around a training loop: the problems, the model, the device, the schedule, and the files and lines of a run."""
import json
import math
import random
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kernels import ops

from . import checkpoint, data, problems
from .config import UserError, write_config
from .latent import ATP
from .llama import LLAMA3_ROPE, LlamaConfig


# ---- problems -----------------------------------------------------------------------------------------------------------

@dataclass
class Splits:
    train: list
    answers: list  # problems with an answer and no steps
    val: list
    tests: dict   # name -> problems
    note: str     # what was left out, or ""

    def tell(self):
        """Counts in one line."""
        parts = [("training", self.train), ("with answers alone", self.answers), ("validation", self.val)]
        parts += [(f"test ({name})", p) for name, p in self.tests.items()]
        return "  ".join(f"{len(p):,} {name}" for name, p in parts if p) + (f"   {self.note}" if self.note else "")


def load_splits(cfg):
    """Training, validation and test problems, which never share a question."""
    if not cfg.data:
        return Splits(problems.generate("labelled", cfg.labelled, 0), problems.generate("answers", cfg.answers, 0),
                      problems.generate("validation", cfg.val_size, 0),
                      {"built-in": problems.generate("test", cfg.test_size, 0)}, "")
    train = data.read_problems(cfg.data)
    random.Random(0).shuffle(train)  # the same split for every seed of a run
    held = []
    for given in (cfg.val, cfg.test):
        if given:
            held.append({Path(f).name: data.read_problems(f) for f in given.split(",")})
        else:
            if len(train) <= cfg.val_size:
                raise UserError(f"{cfg.data}:1: has {len(train)} problems, too few to hold out --val-size {cfg.val_size}")
            held.append({"held out": train[:cfg.val_size]})
            train = train[cfg.val_size:]
    val = [p for part in held[0].values() for p in part]
    unseen = {p.question for p in val} | {p.question for part in held[1].values() for p in part}
    kept = [p for p in train if p.question not in unseen]
    taught = kept if cfg.method == "no-cot" else [p for p in kept if p.steps]
    if not taught:
        raise UserError(f"{cfg.data}:1: no problem with steps is left to learn from")
    left_out = [f"{len(train) - len(kept)} in the validation or test set"] * (len(kept) < len(train)) + \
               [f"{len(kept) - len(taught)} without steps (see --answers-share)"] * (len(taught) < len(kept) and not cfg.answers_share)
    return Splits(taught, [p for p in kept if not p.steps], val, held[1], "left out of training: " + ", ".join(left_out) if left_out else "")


def encoded(cfg, chosen, tokens, model):
    """Problems as the method reads them -> list of data.Encoded."""
    if cfg.method == "no-cot":
        chosen = [replace(p, steps=[]) for p in chosen]
    return data.encode(chosen, tokens, model.K, model.policy.cfg.block_size)


# ---- model --------------------------------------------------------------------------------------------------------------

def build(cfg, train):
    """(model, tokens): from cfg.init, or untrained with a tokenizer learned from `train`. Weights follow the global seed."""
    if cfg.init:
        return checkpoint.load(cfg.init, **{k: v for k, v in cfg.switches.items() if k != "decoder_layers"})
    tokens = data.train_tokenizer(train, cfg.vocab_size)
    model = ATP(shape(cfg, len(tokens)), **cfg.switches)
    model.policy.init_weights()
    if model.decode:
        model.decoder.init_weights()
    checkpoint.add_tokens(model, tokens)
    return model, tokens


def need_thoughts(model, cfg):
    """RL explores in sampled latents and judges what φ reads in them. Raises UserError for a model without them."""
    if not (model.vae and model.decode and model.stage):
        raise UserError(f"{cfg.init}:0: has no sampled latents or no decoder LM; start --stage rl from an SFT run of --method atp")


def size(model):
    """"1,130,626 parameters"."""
    return f"{sum(p.numel() for p in model.parameters()):,} parameters"


def generator(cfg, step):
    """The chance of one step, the same whether or not the run was stopped before it."""
    return torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)


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
    return device


def autocast(device):
    """bf16 compute over float32 weights on a GPU; nothing on a CPU, where it gains nothing."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def adamw(cfg, model):
    """AdamW with weight decay on matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}],
                             lr=cfg.lr, betas=(0.9, 0.95), fused=True)


def lr_at(step, n_steps, warmup, peak):
    """Learning rate of a stage's step: linear warm-up, then a cosine to a tenth of the peak."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    share = (step - warmup) / max(1, n_steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * share)))


def room(cfg, rows, stage):
    """Most tokens of an answer after a curriculum stage."""
    if cfg.max_new:
        return cfg.max_new
    return max(16, max(sum(map(len, r.lines[stage:] if stage <= cfg.K else [])) + len(r.answer) for r in rows))


def advance(optimizer, model, lr, clip):
    """One AdamW step on the gradients that lie in the parameters, clipped to norm `clip`. Returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


# ---- files and lines ----------------------------------------------------------------------------------------------------

class Log:
    """A run's folder: config.json, metrics.jsonl (one record a line, flushed) and summary.json; and the progress lines."""
    def __init__(self, cfg, state):
        """state: the step and the seconds that a resumed run has behind it; records of later steps, lost with the crash, are
        removed."""
        self.out, self.before, self.began = Path(cfg.out), state["seconds"], time.perf_counter()
        path = self.out / "metrics.jsonl"
        if not cfg.resume and (self.out / "summary.json").exists() | (self.out / "checkpoints").exists():
            raise UserError(f"{self.out}:0: holds a run already; add --resume to go on with it, or choose another --out")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            write_config(cfg, self.out / "config.json")
            old = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= state["step"]] if path.exists() else []
            path.write_text("".join(line + "\n" for line in old))
            self.file = path.open("a")
        except OSError as e:
            raise UserError(f"{self.out}:0: cannot be written ({e.strerror}); choose another --out")

    def write(self, record):
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def seconds(self):
        """Of the run so far, the time before a resume included."""
        return self.before + time.perf_counter() - self.began

    def summary(self, cfg, tests, seconds, device, **more):
        """summary.json: the first test set's measurement at the top, all of them under "tests"."""
        record = {"stage": cfg.stage, "method": cfg.method, "seed": cfg.seed, **next(iter(tests.values())), "tests": tests,
                  "seconds": seconds, "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", **more}
        tmp = self.out / "summary.json.tmp"
        tmp.write_text(json.dumps(record, indent=2) + "\n")
        tmp.rename(self.out / "summary.json")


def say(text):
    """One line for the user."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def clock(seconds):
    """75.2 -> "1:15"; hours where there are some."""
    m, s = divmod(round(seconds), 60)
    return f"{m // 60}:{m % 60:02}:{s:02}" if m >= 60 else f"{m}:{s:02}"


class Meter:
    """Sums between two progress lines, and the speed."""
    def __init__(self):
        self.reset()

    def reset(self):
        self.total, self.count, self.n_token, self.n_step, self.start = {}, {}, 0, 0, time.perf_counter()

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
