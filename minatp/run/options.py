"""Every option, once. The command line, --help and a run's config.json are made from these dataclasses."""
import argparse
import difflib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from .errors import UserError
from .saved import replace_file


def opt(default, help):
    return field(default=default, metadata={"help": help})


METHODS = {  # latent steps, VAE, stop head, decoder LM
    "no-cot": dict(latent=False, vae=False, stop=False, decode=False),
    "cot": dict(latent=False, vae=False, stop=False, decode=False),
    "coconut": dict(latent=True, vae=False, stop=False, decode=False),
    "sim-cot": dict(latent=True, vae=False, stop=False, decode=True),
    "atp": dict(latent=True, vae=True, stop=True, decode=True),
}


@dataclass
class Run:
    """run"""
    stage: str = opt("sft", "sft (supervised) | rl (from rewards, after sft)")
    method: str = opt("atp", " | ".join(METHODS))
    preset: str = opt("tiny", "tiny (from scratch, for a laptop) | llama-1b (the paper's)")
    init: str = opt("", "start from a Hugging Face directory or an earlier run's folder, not from scratch")
    out: str = opt("", "folder of the run [out/STAGE]")
    resume: bool = opt(False, "go on from the newest checkpoint in --out")
    dry_run: bool = opt(False, "check data and sizes, run one step, write nothing")
    seed: int = opt(0, "of weights, data order and noise")
    device: str = opt("", "cpu | cuda | cuda:N [cuda where there is one]")


@dataclass
class Data:
    """data"""
    data: str = opt("", "training problems: JSON, JSONL or iCoT text [the built-in task]")
    val: str = opt("", "validation problems, likewise [--val-size held out of --data]")
    test: str = opt("", "test problems, several files separated by commas [as many again]")
    labelled: int = opt(6000, "built-in task: labelled training problems; the default --epochs keep the number of steps")
    val_size: int = opt(500, "validation problems, built-in or held out of --data")
    test_size: int = opt(3000, "built-in task: test problems")


@dataclass
class Size:
    """model (from scratch; --init brings its own)"""
    n_layer: int = opt(2, "layers")
    n_head: int = opt(4, "query heads")
    n_kv_head: int = opt(2, "key/value heads")
    n_embd: int = opt(128, "D")
    n_inner: int = opt(352, "inner size of the MLP")
    block_size: int = opt(512, "longest context, tokens")
    rope_theta: float = opt(10000.0, "base of RoPE")
    vocab_size: int = opt(1024, "most tokens of the tokenizer that is trained on the data")
    decoder_layers: int = opt(2, "layers of the decoder LM; 0: as many as the policy")


@dataclass
class Latents:
    """latents"""
    c: int = opt(2, "latents per reasoning step")
    K: int = opt(4, "most reasoning steps kept latent")
    beta: float = opt(1e-3, "weight of the KL term")
    init_logvar: float = opt(-4.0, "log σ² of an untrained latent head")
    no_vae: bool = opt(False, "ablation: the thought is the hidden state itself")
    no_stop: bool = opt(False, "ablation: no stop head, always K steps")
    no_decoder: bool = opt(False, "ablation: no decoder LM")


@dataclass
class Optim:
    """training"""
    epochs: str = opt("", "epochs of each curriculum stage 0 … K+1, separated by commas; one number: of every stage [the preset's]")
    batch_size: int = opt(32, "problems per step")
    micro_batch: int = opt(0, "problems per forward pass, gradients accumulated; 0: all of the batch at once")
    optimizer: str = opt("muon", "muon: for the matrices of the layers and of the latent head, AdamW for the rest; adamw: for all")
    lr: float = opt(2e-3, "peak learning rate; a cosine in each stage")
    warmup: int = opt(50, "steps of linear warm-up in each stage, at most a tenth of it")
    weight_decay: float = opt(0.01, "of matrices")
    clip: float = opt(1.0, "largest gradient norm")
    answers_share: float = opt(0.0, "of each batch of the last stage from problems that have an answer and no steps")
    recompute: bool = opt(False, "compute MLP activations again in the backward pass: less memory, a fifth more work")


@dataclass
class Explore:
    """rl"""
    updates: int = opt(500, "batches of questions")
    G: int = opt(8, "rollouts per question")
    answers: int = opt(20000, "built-in task: problems with an answer and no steps, to explore on")
    spread: float = opt(1.0, "of the noise in rollouts: z ~ N(μ, (spread·σ)²)")
    estimator: str = opt("score", "score (REINFORCE on the thoughts' density) | path (z = μ + σε is differentiated, not scored)")
    greedy: bool = opt(False, "greedy words in rollouts: all chance, and all credit, is in the thoughts")
    baseline: str = opt("mean", "mean (of the group) | rloo (of the others)")
    normalise: bool = opt(False, "divide the advantage by the group's deviation")
    updates_per_batch: int = opt(1, "more than one clips the ratio, which is GRPO")
    w_acc: float = opt(1.0, "weight of the right answer")
    w_coh: float = opt(0.1, "weight of coherence")
    w_fmt: float = opt(0.5, "weight of the format")
    coherence: str = opt("paper", "paper | strict (a false, unused or repeated step earns nothing)")
    no_answers: bool = opt(False, "coherence-only: the reward sees no answer")
    kl: float = opt(0.0, "weight of the KL to the SFT policy")
    anchor: float = opt(0.0, "weight of the SFT loss on labelled problems, beside the reward")
    placebo: bool = opt(False, "control: rewards permuted within the batch")
    val_every: int = opt(100, "updates between validations")


@dataclass
class Report:
    """evaluation and files"""
    max_new: int = opt(0, "most tokens of an answer [as many as the longest training text takes, 16 at least]")
    eval_batch: int = opt(500, "problems per batch in evaluation")
    votes: int = opt(0, "also sample this many chains per test problem: pass@k and majority vote")
    temperature: float = opt(1.0, "of those samples")
    log_every: int = opt(50, "steps between lines")
    sink: str = opt("", "send the records of metrics.jsonl to tensorboard | wandb as well")
    save_every: int = opt(500, "steps between checkpoints")


@dataclass
class Config(Report, Explore, Optim, Latents, Size, Data, Run):
    given = ()  # names of the options that the command line gave; not written to config.json

    @property
    def switches(self):
        """ATP's keyword arguments."""
        m = METHODS[self.method]
        return dict(c=self.c, K=self.K, vae=m["vae"] and not self.no_vae, stop=m["stop"] and not self.no_stop,
                    decode=m["decode"] and not self.no_decoder, decoder_layers=self.decoder_layers, init_logvar=self.init_logvar)

    @property
    def latent(self):
        return METHODS[self.method]["latent"]

    def schedule(self):
        """[(curriculum stage, epochs)], the stages that the method has."""
        stages = range(self.K + 2) if self.latent else range(1)
        try:
            epochs = [float(e) for e in self.epochs.split(",")]
        except ValueError:
            raise UserError(f"command line: --epochs must be numbers separated by commas, not {self.epochs!r}")
        if len(epochs) == 1:
            epochs *= len(stages)
        if len(epochs) != len(stages) or not all(0 <= e < math.inf for e in epochs) or not sum(epochs):
            raise UserError(f"command line: --epochs needs 1 or {len(stages)} numbers ≥ 0 for --method {self.method} with --K {self.K}, "
                            f"not {self.epochs!r}")
        return [(k, e) for k, e in zip(stages, epochs) if e]

    def check(self):
        """Refuse what contradicts itself. Raises UserError."""
        def need(ok, message):
            if not ok:
                raise UserError(f"command line: {message}")

        for f in fields(self):
            need(f.type is not float or math.isfinite(getattr(self, f.name)), f"{flag(f.name)} must be a finite number")
            need(f.type is not int or getattr(self, f.name) < 2**32, f"{flag(f.name)} must be below 2^32, not {getattr(self, f.name)}")
        need(self.stage in ("sft", "rl"), f"--stage must be sft or rl, not {self.stage!r}")
        need(self.method in METHODS, f"--method must be one of {', '.join(METHODS)}, not {self.method!r}")
        for name in ("K", "c", "batch_size", "lr", "n_layer", "n_head", "n_kv_head", "n_embd", "n_inner", "block_size", "rope_theta", "vocab_size", "eval_batch",
                     "log_every", "save_every", "labelled", "val_size", "test_size", "temperature", "clip", "updates", "G", "answers", "spread", "updates_per_batch", "val_every"):
            need(getattr(self, name) > 0, f"{flag(name)} must be positive, not {getattr(self, name)}")
        for name in ("seed", "micro_batch", "decoder_layers", "beta", "warmup", "weight_decay", "max_new", "votes", "w_acc", "w_coh", "w_fmt", "kl", "anchor"):
            need(getattr(self, name) >= 0, f"{flag(name)} must not be negative, but is {getattr(self, name)}")
        need(self.init or self.c * self.K + self.max_new < self.block_size,
             f"--c {self.c} × --K {self.K} latents{f' and --max-new {self.max_new}' * bool(self.max_new)} do not fit --block-size {self.block_size}")
        need(self.n_embd % self.n_head == 0 and self.n_embd // self.n_head % 2 == 0,
             f"--n-embd {self.n_embd} must be an even multiple of --n-head {self.n_head}")
        need(self.n_head % self.n_kv_head == 0, f"--n-head {self.n_head} must be a multiple of --n-kv-head {self.n_kv_head}")
        need(self.init or not self.switches["decode"] or self.decoder_layers <= self.n_layer,
             f"--decoder-layers {self.decoder_layers} must be at most --n-layer {self.n_layer}: φ starts from π's lower layers")
        need(self.preset != "llama-1b" or self.init or self.dry_run or self.data,
             "--preset llama-1b needs --init DIR, a Hugging Face directory of Llama-3.2-1B")
        need(not self.test or self.data, "--test needs --data: the built-in task brings its own test set")
        need(not self.val or self.data, "--val needs --data: the built-in task brings its own validation set")
        for name in ("vae", "stop", "decoder"):
            need(not getattr(self, "no_" + name) or METHODS[self.method]["decode" if name == "decoder" else name],
                 f"--no-{name} contradicts --method {self.method}, which has none")
        need(not (self.no_vae and self.no_stop and self.no_decoder), "--no-vae --no-stop --no-decoder is --method coconut; say so")
        need(self.stage != "rl" or self.method == "atp" and not (self.no_vae or self.no_stop or self.no_decoder),
             "--stage rl takes the model of --init as it is; leave --method and its ablations away")
        need(self.optimizer in ("muon", "adamw"), f"--optimizer must be muon or adamw, not {self.optimizer!r}")
        need(self.baseline in ("mean", "rloo"), f"--baseline must be mean or rloo, not {self.baseline!r}")
        need(self.estimator in ("score", "path"), f"--estimator must be score or path, not {self.estimator!r}")
        need(self.coherence in ("paper", "strict"), f"--coherence must be paper or strict, not {self.coherence!r}")
        need(0 <= self.answers_share <= 1, f"--answers-share must be between 0 and 1, not {self.answers_share}")
        need(not self.answers_share or self.stage == "rl" or self.latent and self.schedule()[-1][0] > self.K,
             "--answers-share is of the last stage of a method that thinks in latents, and there is none here")
        need(self.sink in ("", "tensorboard", "wandb"), f"--sink must be tensorboard or wandb, not {self.sink!r}")
        need(self.G > 1, "--G must be at least 2: a group is its own baseline")
        self.schedule()


PRESETS = {
    "tiny": {"c": 1},
    "llama-1b": {"n_layer": 16, "n_head": 32, "n_kv_head": 8, "n_embd": 2048, "n_inner": 8192, "block_size": 131072, "rope_theta": 500000.0,
                 "vocab_size": 128256, "decoder_layers": 0, "K": 10, "optimizer": "adamw", "lr": 1e-4, "log_every": 10},
}

def tiny_epochs(cfg):
    """The tiny preset's --epochs: of the built-in task as many steps, whatever --labelled is."""
    epochs = (5, *[0.5] * (cfg.K - 1), 0.8, 11) if cfg.latent else ({"cot": 16, "no-cot": 52}[cfg.method],)
    scale = 1 if cfg.data else Config.labelled / max(1, cfg.labelled)
    return ",".join(f"{scale * e:g}" for e in epochs)


EPOCHS = {"tiny": tiny_epochs, "llama-1b": lambda cfg: "2"}  # preset -> the default of --epochs
RL = {"tiny": {"init": "out/sft", "updates": 1600, "G": 4, "spread": 4.0, "estimator": "path", "anchor": 1.0},
      "llama-1b": {"init": "out/sft", "lr": 1e-6, "batch_size": 16}}


def default_of(f):
    """What an option is where it is not given, and what another preset or stage makes of it: " [500; rl 1600; llama-1b rl 500]"."""
    value = lambda preset, rl: {**PRESETS[preset], **(RL[preset] if rl else {})}.get(f.name, f.default)
    base, large, rl, both = value("tiny", False), value("llama-1b", False), value("tiny", True), value("llama-1b", True)
    told = [] if base == "" or base is False or f.metadata["help"].endswith("]") else [str(base)]
    told += [f"llama-1b {large}"] * (large != base) + [f"rl {rl}"] * (rl != base)
    told += [f"llama-1b rl {both}"] * (both != (rl if rl != base else large))
    return f" [{'; '.join(told)}]" if told else ""


def flag(name):
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """Options in full, the module's docstring as it is, and a mistake as a UserError that guesses what was meant."""
    def __init__(self, description, module=None, usage=None):
        super().__init__(f"python -m {module}" if module else None, usage, description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        if message.startswith("unrecognized arguments:"):
            word = message.split(": ")[1].split()[0]
            known = [option for action in self._actions for option in action.option_strings]
            close = difflib.get_close_matches(word.split("=")[0], known, 1)
            message = f"there is no option {word}; " + (f"did you mean {close[0]}?" if close else "--help lists them")
        raise UserError(f"command line: {message}")


def among(option, given, known):
    """Names separated by semicolons; all that are known where none is given. Raises UserError for any other."""
    names = [name.strip() for name in given.split(";") if name.strip()] or list(known)
    for name in names:
        if name not in known:
            raise UserError(f"command line: {option}: there is no {name!r}; there are {'; '.join(known)}")
    return names


def parse(argv, description):
    """Command line -> Config. Precedence: what is given, then the preset, then the defaults; --resume takes the run's config.json."""
    parser = Parser(f"{description}\nDefaults stand in brackets: [a; llama-1b b; rl c; llama-1b rl d], where b, c and d are those of --preset "
                    "llama-1b, of --stage rl and of both.", usage="python train.py [--option value …]")
    for group_class in (Run, Data, Latents, Optim, Explore, Size, Report):
        group = parser.add_argument_group(group_class.__doc__)
        for f in fields(group_class):
            shown = f.metadata["help"] + default_of(f)
            kind = {"action": "store_true"} if f.type is bool else {"type": f.type, "metavar": f.type.__name__.upper()}
            group.add_argument(flag(f.name), dest=f.name, default=None, help=shown.replace("%", "%%"), **kind)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    preset = given.get("preset", "tiny")
    if preset not in PRESETS:
        raise UserError(f"command line: --preset must be one of {', '.join(PRESETS)}, not {preset!r}")
    chosen = {**PRESETS[preset], **(RL[preset] if given.get("stage") == "rl" else {}), **given}
    cfg = Config(**chosen)
    if cfg.method in METHODS:
        cfg.epochs = cfg.epochs or EPOCHS[preset](cfg)
    cfg.out = cfg.out or f"out/{cfg.stage}"
    if cfg.resume:
        return resumed(cfg, given)
    cfg.given = tuple(given)
    cfg.check()
    return cfg


def resumed(cfg, given):
    """The Config that the run in cfg.out was started with. Raises UserError where a given option contradicts it."""
    path = Path(cfg.out) / "config.json"
    if not path.exists():
        raise UserError(f"{path}:0: is missing, so no run is here to go on with; start without --resume, or give another --out")
    before = of_run(path)
    for name, value in given.items():
        if name in ("data", "val", "test", *["init"] * (before.stage == "rl")) and getattr(before, name) and value:
            setattr(before, name, value)  # where it lies now; that it is the same is looked at when it is read
        elif name not in ("resume", "out", "device", "dry_run") and getattr(before, name) != value:
            raise UserError(f"{path}:1: the run has {flag(name)} {getattr(before, name)}, not {value}; resume without that option")
    before.resume, before.out, before.device, before.dry_run = True, cfg.out, cfg.device, cfg.dry_run
    return before


def of_run(path):
    """The Config in a run's config.json. Raises UserError where it is not what write_config wrote."""
    try:
        old = json.loads(Path(path).read_text(encoding="utf-8"))
        cfg = Config(**old)
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{path}:1: is not the config.json of a run ({e}); start without --resume, or give another folder")
    for f in fields(Config):
        value = getattr(cfg, f.name)
        if type(value) is not f.type and not (f.type is float and type(value) is int):
            raise UserError(f'{path}:1: "{f.name}" must be {f.type.__name__}, not {value!r}')
    try:
        cfg.check()
    except (UserError, OverflowError) as e:  # the latter: an integer that is no float
        raise UserError(f"{path}:1: {e}")
    return cfg


def write_config(cfg, path):
    """A run's config.json. Raises NotWritten."""
    replace_file(path, json.dumps(asdict(cfg), indent=2) + "\n")
