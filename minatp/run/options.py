"""Every option, declared once: the command line, --help and a run's config.json are made from it.

    Config          all options of a run; `check` refuses those that contradict each other
    parse           the command line -> Config
    of_run          a run's config.json -> Config

The defaults suit the built-in task on a laptop; the other presets and --stage rl change some.
"""

import argparse
import difflib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from .errors import UserError
from .saved import replace_file

# What the value of an option may have to be
POSITIVE = "positive"
NOT_NEGATIVE = "not negative"
SHARE = "between 0 and 1"

# More than anyone would ask for. What follows from larger numbers would not fit memory or a float
MOST_STEPS = 10_000
MOST_EPOCHS = 1_000_000
# Logits are divided by it, and must stay finite
LEAST_TEMPERATURE = 1e-6


@dataclass
class Method:
    """What a method makes of the written steps, and its parts (docs/methods.md)."""

    # words: they stay. curriculum: one more is replaced in each stage. all: from the start
    stages: str
    # what replaces a step: latents, fillers (learned words, as many) or nothing
    by: str = "latents"
    # the VAE, the stop head and the decoder LM of ATP-Latent
    vae: bool = False
    stop: bool = False
    decode: bool = False
    # CODI's projection of the hidden state
    project: bool = False


# fmt: off
METHODS = {
    # the answer at once (the steps are dropped in splits.py)
    "no-cot":       Method("words"),
    # steps in words, then the answer
    "cot":          Method("words"),
    # the steps go one after the other, and nothing takes their place
    "icot":         Method("curriculum", by="nothing"),
    # each step is replaced by filler words, which say nothing
    "pause":        Method("curriculum", by="fillers"),
    # each step is replaced by latents, which are hidden states
    "coconut":      Method("curriculum"),
    # Coconut, and a decoder LM must be able to read the steps from the latents
    "sim-cot":      Method("curriculum", decode=True),
    # latents from the start, taught by the same model when it reads the steps in words
    "codi":         Method("all", project=True),
    # CODI, with the decoder LM of SIM-CoT
    "codi-sim-cot": Method("all", project=True, decode=True),
    # latents that are sampled, as many as the stop head decides, and read by a decoder LM
    "atp":          Method("curriculum", vae=True, stop=True, decode=True),
}

# What --preset sets, and what it also sets with --stage rl; the command line wins
PRESETS = {
    # the rest of tiny are the defaults of the options below. The schedule and the decay come from
    # trials with atp (docs/results.md, "Why some seeds fail")
    "tiny": dict(c=1, lr_schedule="wsd", weight_decay=0.1),
    # A small published model, for a CPU (docs/latents.md has the trials). φ has all layers: the
    # lower fifth cannot write words at first, and its loss is five times as high in stage 1
    "smollm2-135m": dict(
        # SmolLM2-135M-Instruct's sizes
        n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_inner=1536,
        block_size=8192, rope_theta=100000.0, vocab_size=49152, decoder_layers=0,
        # thoughts are read before they are fed back: otherwise φ learns to ignore them
        decoder_start="previews", init_logvar=-6.0,
        # few latents, and AdamW at the rate at which previews were tried; at that rate the last
        # stage stood still on the built-in task, with batches of 8
        K=3, c=1, optimizer="adamw", lr=1e-4, last_lr=3e-5, batch_size=16,
        log_every=10, eval_batch=100,
    ),
    "llama-1b": dict(
        # Llama-3.2-1B's sizes, and φ with all layers
        n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, n_inner=8192,
        block_size=131072, rope_theta=500000.0, vocab_size=128256, decoder_layers=0,
        # the paper's SFT, with more frequent log lines
        K=10, optimizer="adamw", lr=1e-4, log_every=10,
    ),
}
RL_PRESETS = {
    "tiny": dict(
        init="out/sft", updates=1600, G=4, spread=4.0, estimator="path", anchor=1.0,
        lr_schedule="cosine", weight_decay=0.01,
    ),
    # what worked at the tiny size; at 2e-5 accuracy fell
    "smollm2-135m": dict(
        init="out/sft", updates=300, batch_size=8, G=4, lr=5e-6, spread=4.0, estimator="path",
        anchor=1.0, val_every=50,
    ),
    # the paper's lr and batch; its 8 rollouts are the default of --G
    "llama-1b": dict(init="out/sft", lr=1e-6, batch_size=16),
}

# The published model whose sizes a preset has; its directory is given to --init
PUBLISHED = {"smollm2-135m": "SmolLM2-135M-Instruct", "llama-1b": "Llama-3.2-1B"}

# A preset's epochs. With a curriculum: of stage 0; of each stage 1 … K − 1; of stage K; and of the
# last, in which every step is replaced. The other methods have one stage. φ: of methods with a
# decoder LM; teacher: of those with distillation as well. Their steps take longer
EPOCHS = {
    "tiny": {
        "curriculum": (5, 0.5, 0.8, 11),            "all": 18,        "cot": 16, "no-cot": 52,
        "curriculum, φ": (2.5, 0.5, 0.8, 16),       "all, φ": 14.3,
        "curriculum, φ, teacher": (2.5, 0.5, 0.8, 13.4),
    },
    "smollm2-135m": {"curriculum": (1, 1, 1, 3),      "all": 6,  "cot": 3,  "no-cot": 3},
    "llama-1b":     {"curriculum": (2, 2, 2, 2),      "all": 24, "cot": 2,  "no-cot": 2},
}

# What the SFT of a method sets on top of its preset. Word dropout makes thoughts hold results
# (docs/results.md, "Why some seeds fail"). CODI's own weight of distillation is 20
SFT_OF_METHOD = {
    "tiny": {
        "sim-cot":      dict(word_dropout=0.5),
        "codi":         dict(distill=5.0),
        "codi-sim-cot": dict(word_dropout=0.5, distill=5.0),
        "atp":          dict(word_dropout=0.5, distill=5.0, distill_every=2),
    },
    "smollm2-135m": {"codi": dict(distill=5.0),  "codi-sim-cot": dict(distill=5.0)},
    "llama-1b":     {"codi": dict(distill=20.0), "codi-sim-cot": dict(distill=20.0)},
}
# fmt: on


# ---- the options, by group -----------------------------------------------------------------------
#
# The docstring of each class below is the title of its section in --help.


def opt(default, help, sign=None, choices=()):
    """An option.

    help: the text of --help. The default is added to it, unless it ends in one in brackets.
    sign: POSITIVE, NOT_NEGATIVE or SHARE, if the number has to be.
    choices: the values that are allowed, if there are only a few.
    """
    return field(default=default, metadata={"help": help, "sign": sign, "choices": choices})


@dataclass
class General:
    """run"""

    stage: str = opt(
        "sft", "sft (supervised) | rl (from rewards, after sft)", choices=("sft", "rl")
    )
    method: str = opt("atp", " | ".join(METHODS), choices=tuple(METHODS))
    preset: str = opt(
        "tiny", "tiny (from scratch, for a laptop) | smollm2-135m | llama-1b (the paper's)"
    )
    init: str = opt("", "start from a Hugging Face directory or an earlier run's folder")
    out: str = opt("", "folder of the run [out/STAGE]")
    resume: bool = opt(
        False,
        "continue from the newest checkpoint in --out; --micro-batch, --recompute and --eval-batch "
        "may differ",
    )
    dry_run: bool = opt(False, "check data and sizes, run one step, write nothing")
    seed: int = opt(0, "of weights, data order and noise", NOT_NEGATIVE)
    device: str = opt("", "cpu | cuda | cuda:N [cuda if there is one]")
    dtype: str = opt(
        "",
        "float32 | bfloat16, of the products; weights, optimizer and losses stay float32 [bfloat16 "
        "on a GPU, and for 10 million parameters or more on a CPU that multiplies it in hardware]",
        choices=("float32", "bfloat16"),
    )


@dataclass
class Data:
    """data"""

    data: str = opt(
        "",
        "training problems: JSON, JSONL, iCoT or a published set; several files separated by "
        "commas [the built-in task]",
    )
    val: str = opt("", "validation problems, likewise [--val-size held out of --data]")
    test: str = opt("", "test problems, likewise [--val-size more held out of --data]")

    # Sizes of the built-in sets; --val-size also of what is held out of --data
    labelled: int = opt(
        6000,
        "built-in task: training problems with steps; the default --epochs keep the number of "
        "optimizer steps",
        POSITIVE,
    )
    val_size: int = opt(500, "validation problems, built-in or held out of --data", POSITIVE)
    test_size: int = opt(3000, "built-in task: test problems", POSITIVE)


@dataclass
class Size:
    """model (from scratch; --init brings its own, which an option may repeat)"""

    n_layer: int = opt(2, "layers", POSITIVE)
    n_head: int = opt(4, "query heads", POSITIVE)
    n_kv_head: int = opt(2, "key/value heads", POSITIVE)
    n_embd: int = opt(128, "D", POSITIVE)
    n_inner: int = opt(352, "inner size of the MLP", POSITIVE)
    block_size: int = opt(512, "longest context, tokens", POSITIVE)
    rope_theta: float = opt(10000.0, "base of RoPE", POSITIVE)
    vocab_size: int = opt(
        1024, "most tokens of the tokenizer, which is trained on the data", POSITIVE
    )
    decoder_layers: int = opt(
        1,
        "layers of the decoder LM, if there is one; also of a new one beside --init, which gets "
        "the policy's lower layers; 0: all",
        NOT_NEGATIVE,
    )


@dataclass
class Latents:
    """latents (of a method that has them)"""

    c: int = opt(2, "latents per reasoning step", POSITIVE)
    K: int = opt(4, "most reasoning steps kept latent", POSITIVE)
    beta: float = opt(1e-3, "weight of the KL term", NOT_NEGATIVE)
    init_logvar: float = opt(-4.0, "log σ² of a latent head that starts untrained")
    decoder_start: str = opt(
        "copy",
        "how a new decoder LM starts, if there is one: copy (of the policy, after stage 0 if there "
        "is one) | previews (halfway through stage 0, in which latents are proposed and read "
        "before each step in words; without a stage 0, copy)",
        choices=("copy", "previews"),
    )
    word_dropout: float = opt(
        0.0,
        "SFT, and RL's anchor: share of a step's words that the decoder LM, if there is one, does "
        "not see while it learns to write the step",
        SHARE,
    )
    distill: float = opt(
        0.0,
        "weight of CODI's self-distillation: the model that reads the steps in words teaches the "
        "one that reads latents",
        NOT_NEGATIVE,
    )
    distill_every: int = opt(1, "distil in every N-th step", POSITIVE)

    # Each switches off a part of ATP-Latent
    no_vae: bool = opt(False, "ablation: the latent is the hidden state itself")
    no_stop: bool = opt(False, "ablation: no stop head, always K steps")
    no_decoder: bool = opt(False, "ablation: no decoder LM")


@dataclass
class Optim:
    """training"""

    # How long, and how much at once
    epochs: str = opt(
        "",
        "SFT: epochs of each curriculum stage 0 … K+1, separated by commas, or one number for "
        "every stage [the preset's]",
    )
    batch_size: int = opt(32, "problems per step", POSITIVE)
    micro_batch: int = opt(
        0,
        "problems per forward pass of SFT and of RL's anchor, with gradient accumulation; 0: the "
        "whole batch at once",
        NOT_NEGATIVE,
    )

    # The optimizer and its learning rate
    optimizer: str = opt(
        "muon",
        "muon: for the matrices of the layers and of the latent head or projection, AdamW for the "
        "rest; adamw: for all",
        choices=("muon", "adamw"),
    )
    lr: float = opt(2e-3, "peak learning rate", POSITIVE)
    last_lr: float = opt(
        0.0,
        "SFT: the peak in the last stage of a curriculum; 0: that of the other stages. An --lr "
        "without it is for all stages",
        NOT_NEGATIVE,
    )
    lr_schedule: str = opt(
        "cosine",
        "how the learning rate falls in each stage, after its warm-up: cosine (to a tenth) | wsd "
        "(constant for half of the rest, then linearly to a twentieth)",
        choices=("cosine", "wsd"),
    )
    warmup: int = opt(
        50, "steps of linear warm-up in each stage, at most a tenth of it", NOT_NEGATIVE
    )
    weight_decay: float = opt(0.01, "of matrices", NOT_NEGATIVE)
    clip: float = opt(
        1.0, "largest gradient norm (not the clipped ratio of --updates-per-batch)", POSITIVE
    )

    # Extras: problems without steps, and less memory for more work
    answers_share: float = opt(
        0.0,
        "SFT: share of problems with an answer and no steps in each batch of the last stage",
        SHARE,
    )
    recompute: bool = opt(
        False, "recompute MLP activations in the backward pass: less memory, a fifth more work"
    )


# With --stage rl the presets set other values of some: RL_PRESETS above
@dataclass
class Explore:
    """rl (no effect in SFT, except --answers)"""

    # How much is explored
    updates: int = opt(500, "batches of questions (each makes --updates-per-batch)", POSITIVE)
    G: int = opt(8, "rollouts per question", POSITIVE)
    answers: int = opt(
        20000,
        "built-in task: problems with an answer and no steps, to explore on or for --answers-share",
        POSITIVE,
    )

    # How chains are drawn, and what of them gets credit
    spread: float = opt(1.0, "of the noise in rollouts: z ~ N(μ, (spread·σ)²)", POSITIVE)
    estimator: str = opt(
        "score",
        "score (REINFORCE on the latents' density) | path (z = μ + σε is differentiated, not "
        "scored)",
        choices=("score", "path"),
    )
    latent_weight: float = opt(
        1.0,
        "of the latents' log-densities beside the words' log-probabilities, with --estimator "
        "score; 1/D makes the sum over D dimensions a mean",
        NOT_NEGATIVE,
    )
    greedy: bool = opt(
        False,
        "greedy words in rollouts: all randomness is in the latents and stops, and with "
        "--estimator score all credit; with path the stops alone are credited",
    )

    # From rewards to updates
    baseline: str = opt(
        "mean", "mean (of the group) | rloo (of the others)", choices=("mean", "rloo")
    )
    normalise: bool = opt(False, "divide the advantage by the group's standard deviation")
    updates_per_batch: int = opt(1, "more than one clips the ratio, which is GRPO", POSITIVE)

    # The reward
    w_acc: float = opt(1.0, "weight of the right answer", NOT_NEGATIVE)
    w_coh: float = opt(0.1, "weight of coherence", NOT_NEGATIVE)
    w_fmt: float = opt(0.5, "weight of the format", NOT_NEGATIVE)
    coherence: str = opt(
        "paper",
        "paper | strict (a false, unused or repeated step earns nothing)",
        choices=("paper", "strict"),
    )
    no_answers: bool = opt(False, "the reward sees no answer: coherence and format alone")

    # What holds the policy near SFT, and a control
    kl: float = opt(0.0, "weight of the KL to the SFT policy", NOT_NEGATIVE)
    anchor: float = opt(
        0.0,
        "weight of the SFT loss on labelled problems, beside the reward; its --beta, "
        "--word-dropout and --distill are those of this command, not of --init",
        NOT_NEGATIVE,
    )
    placebo: bool = opt(False, "control: rewards permuted within the batch")
    placebo_latents: bool = opt(
        False,
        "control: advantages permuted among chains, for latents but not for stops and words; with "
        "--estimator score",
    )
    val_every: int = opt(100, "batches between validations", POSITIVE)


@dataclass
class Report:
    """evaluation and files"""

    # Solving validation and test problems
    max_new: int = opt(
        0,
        "most tokens of an answer [as the longest right one needs, at least 16]",
        NOT_NEGATIVE,
    )
    eval_batch: int = opt(500, "problems per batch in evaluation", POSITIVE)
    votes: int = opt(
        0, "also sample this many chains per test problem: pass@k and majority vote", NOT_NEGATIVE
    )
    temperature: float = opt(1.0, "of those samples (not of RL's rollouts)", POSITIVE)

    # Logs and checkpoints
    log_every: int = opt(50, "steps between log lines", POSITIVE)
    sink: str = opt(
        "",
        "send the records of metrics.jsonl to tensorboard | wandb as well",
        choices=("tensorboard", "wandb"),
    )
    save_every: int = opt(500, "steps between checkpoints", POSITIVE)


# ---- all of them ---------------------------------------------------------------------------------


@dataclass
class Config(Report, Explore, Optim, Latents, Size, Data, General):
    """All options of a run. config.json lists the groups from the last class to the first."""

    given = ()  # names of the options on the command line; without annotation, so not a field

    @property
    def replaces_steps(self):
        """Whether the method has anything in place of written steps, be it nothing."""
        return METHODS[self.method].stages != "words"

    @property
    def n_answers_only(self):
        """How many problems of a batch of the last stage have an answer and no steps."""
        return round(self.answers_share * self.batch_size)

    @property
    def loss_weights(self):
        """Of the losses of SFT whose weight is not 1 (sft.total_loss)."""
        return {"kl": self.beta, "distill": self.distill}

    @property
    def switches(self):
        """The keyword arguments of latent.ATP."""
        method = METHODS[self.method]
        return {
            "c": self.c,
            "K": self.K,
            "vae": method.vae and not self.no_vae,
            "stop": method.stop and not self.no_stop,
            "decode": method.decode and not self.no_decoder,
            "project": method.project,
            "fillers": {"latents": None, "fillers": self.c, "nothing": 0}[method.by],
            "previews": self.decoder_start == "previews" and self.has_stage_0,
            "decoder_layers": self.decoder_layers,
            "init_logvar": self.init_logvar,
        }

    @property
    def has_curriculum(self):
        """Whether the written steps are replaced stage by stage."""
        return METHODS[self.method].stages == "curriculum"

    @property
    def has_stage_0(self):
        """Whether a curriculum begins with text."""
        return self.stage == "sft" and self.has_curriculum and self.schedule()[0][0] == 0

    @property
    def stages(self):
        """The curriculum stages of the method: 0 … K + 1, or the first or the last of them alone.

        Raises UserError if there are too many to list.
        """
        require(self.K <= MOST_STEPS, f"--K must be at most {MOST_STEPS:,}, not {self.K}")
        stages = {"words": [0], "curriculum": range(self.K + 2), "all": [self.K + 1]}
        return stages[METHODS[self.method].stages]

    def schedule(self):
        """SFT: [(curriculum stage, epochs)], without the stages of 0 epochs. Raises UserError."""
        stages = self.stages
        try:
            epochs = [float(number) for number in self.epochs.split(",")]
        except ValueError:
            raise UserError(
                f"command line: --epochs must be numbers separated by commas, not {self.epochs!r}"
            ) from None
        if len(epochs) == 1:  # for every stage
            epochs *= len(stages)
        in_range = all(0 <= number < MOST_EPOCHS for number in epochs)
        require(
            len(epochs) == len(stages) and in_range and sum(epochs) > 0,
            f"--epochs needs 1 or {len(stages)} numbers ≥ 0, below {MOST_EPOCHS:,}, for --method "
            f"{self.method} with --K {self.K}, not {self.epochs!r}",
        )
        return [(stage, number) for stage, number in zip(stages, epochs) if number]

    def peak_lr(self, stage):
        """The peak learning rate of a curriculum stage; of RL, whose stage is None."""
        is_last = self.has_curriculum and stage is not None and stage > self.K
        return self.last_lr if is_last and self.last_lr else self.lr

    def check(self):
        """Raise UserError if a value is out of range or options contradict each other."""
        # Each value by itself, then what must fit together
        for f in fields(self):
            check_value(f, getattr(self, f.name))
        self.check_size()
        self.check_data()
        self.check_method()
        self.check_answers_share()
        self.check_last_lr()
        self.check_credit_of_latents()
        require(self.G > 1, "--G must be at least 2: a group is its own baseline")
        require(
            # (earlier versions took any, so a run may have less)
            self.temperature >= LEAST_TEMPERATURE or not self.given,
            f"--temperature must be at least {LEAST_TEMPERATURE}, not {self.temperature}",
        )
        if self.stage == "sft":
            self.schedule()

    def check_size(self):
        """Refuse a model that cannot be built."""
        # --init brings sizes of its own, with which checks.check_init compares these
        if self.init:
            return

        # RoPE turns pairs of dimensions, so the size of a head is even. All key/value heads
        # serve the same number of query heads
        require(
            self.n_embd % self.n_head == 0 and self.n_embd // self.n_head % 2 == 0,
            f"--n-embd {self.n_embd} must be an even multiple of --n-head {self.n_head}",
        )
        require(
            self.n_head % self.n_kv_head == 0,
            f"--n-head {self.n_head} must be a multiple of --n-kv-head {self.n_kv_head}",
        )

        # Latents and answer must leave room for a prompt, whose length is checked with the data
        length = f"--c {self.c} × --K {self.K} latents"
        if self.max_new:
            length += f" and --max-new {self.max_new}"
        require(
            self.c * self.K + self.max_new < self.block_size,
            f"{length} do not fit --block-size {self.block_size}",
        )
        require(
            not self.switches["decode"] or self.decoder_layers <= self.n_layer,
            f"--decoder-layers {self.decoder_layers} must be at most --n-layer {self.n_layer}: "
            "φ starts from π's lower layers",
        )

        # From scratch, so large a model is only for data of the user's own, or for a dry run
        published = PUBLISHED.get(self.preset)
        require(
            not published or self.dry_run or self.data,
            f"--preset {self.preset} needs --init DIR, a Hugging Face directory of {published}; to "
            "train it from scratch, give --data, or --dry-run to look at its size",
        )

    def check_data(self):
        """Refuse test and validation problems for the built-in task, which has its own."""
        require(
            not self.test or self.data,
            "--test needs --data: the built-in task has its own test set",
        )
        require(
            not self.val or self.data,
            "--val needs --data: the built-in task has its own validation set",
        )

    def check_method(self):
        """Refuse ablations of what the method does not have."""
        method = METHODS[self.method]
        ablations = (
            ("--no-vae", self.no_vae, method.vae),
            ("--no-stop", self.no_stop, method.stop),
            ("--no-decoder", self.no_decoder, method.decode),
        )
        for option, is_off, has_part in ablations:
            require(
                not is_off or has_part,
                f"{option} contradicts --method {self.method}, which has none",
            )

        # What is distilled into latents needs latents
        require(
            not self.distill or (method.stages != "words" and method.by == "latents"),
            f"--distill teaches latents, and --method {self.method} has none",
        )

        require(
            self.distill_every == 1 or self.distill,
            "--distill-every is about --distill; give that as well",
        )

        # Without all three parts the method has a name of its own
        require(
            not (self.no_vae and self.no_stop and self.no_decoder),
            "--no-vae --no-stop --no-decoder is --method coconut; give that instead",
        )

        # RL takes the model of --init as it is: to choose a method would change nothing
        is_full_atp = self.method == "atp" and not (self.no_vae or self.no_stop or self.no_decoder)
        require(
            self.stage != "rl" or is_full_atp,
            "--stage rl uses the method of --init; drop --method and its ablations",
        )

    def check_answers_share(self):
        """Refuse --answers-share without a last stage, in which every step is latent."""
        if not self.answers_share or self.stage == "rl":
            return

        # The schedule leaves out stages of 0 epochs, so its last entry may be an earlier stage
        require(
            self.replaces_steps and self.schedule()[-1][0] > self.K,
            "--answers-share applies to the last stage of a method that replaces written steps, "
            "and there is none here",
        )
        # (A run of an earlier version may have had such a share)
        n = self.n_answers_only
        require(
            0 < n < self.batch_size or self.answers_share == 1 or not self.given,
            f"--answers-share {self.answers_share} rounds to {n} of the {self.batch_size} problems "
            "of a batch; change it or --batch-size",
        )

    def check_last_lr(self):
        """Refuse --last-lr without a curriculum that reaches its last stage."""
        if "last_lr" not in self.given or not self.last_lr or self.stage == "rl":
            return
        require(
            self.has_curriculum and self.schedule()[-1][0] > self.K,
            "--last-lr is for the last stage of a curriculum, and there is none here; give --lr",
        )

    def check_credit_of_latents(self):
        """Refuse options about the credit that latents get where they get none."""
        chosen = (
            ("--latent-weight", self.latent_weight != 1),
            ("--placebo-latents", self.placebo_latents),
        )
        for option, is_chosen in chosen:
            require(
                not is_chosen or self.stage != "rl" or self.estimator == "score",
                f"{option} is about the density of latents, which --estimator path does not use; "
                "give --estimator score",
            )


def check_value(f, value):
    """Raise UserError if an option cannot have this value. f: its dataclass field."""
    option = flag(f.name)
    sign = f.metadata["sign"]
    choices = f.metadata["choices"]

    # NaN and infinity are valid floats to argparse and to JSON
    if f.type is float:
        require(math.isfinite(value), f"{option} must be a finite number")
    # torch's generators take 32 bits of a seed, and no size comes near that
    if f.type is int:
        require(value < 2**32, f"{option} must be below 2^32, not {value}")
    if sign == POSITIVE:
        require(value > 0, f"{option} must be positive, not {value}")
    if sign == NOT_NEGATIVE:
        require(value >= 0, f"{option} must not be negative, but is {value}")
    if sign == SHARE:
        require(0 <= value <= 1, f"{option} must be between 0 and 1, not {value}")
    if choices:
        listed = " or ".join(choices)
        if len(choices) > 2:
            listed = "one of " + ", ".join(choices)
        is_default = value == f.default  # which may be "", for none of them
        require(value in choices or is_default, f"{option} must be {listed}, not {value!r}")


def require(condition, message):
    """Raise UserError with the message if the condition does not hold."""
    if not condition:
        raise UserError(f"command line: {message}")


def flag(name):
    """The name of an option on the command line: "batch_size" -> "--batch-size"."""
    return "--" + name.replace("_", "-")


# ---- the command line ----------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, and suggests a name for a misspelt option.

    description: a module's docstring, shown unchanged.
    module: its name, if it is run with `python -m`.
    """

    def __init__(self, description, module=None, usage=None):
        super().__init__(
            prog=f"python -m {module}" if module else None,
            usage=usage,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message):
        # argparse would print its usage and exit; here every mistake is one line
        unknown = "unrecognized arguments: "
        if message.startswith(unknown):
            message = self.suggest(message.removeprefix(unknown).split()[0])
        raise UserError(f"command line: {message}")

    def suggest(self, word):
        """The message for a word that is not an option."""
        options = [option for action in self._actions for option in action.option_strings]
        similar = difflib.get_close_matches(word.split("=")[0], options, n=1)
        if similar:
            return f"there is no option {word}; did you mean {similar[0]}?"
        return f"there is no option {word}; --help lists them"


def add_device_options(parser):
    """Give the parser of a tool --device and --dtype, as train.py has them."""
    for f in fields(General):
        if f.name in ("device", "dtype"):
            help, choices = f.metadata["help"], f.metadata["choices"] or None
            parser.add_argument(
                flag(f.name), default=f.default, help=help, choices=choices, metavar="STR"
            )


def among(option, text, known):
    """The names in `text`, separated by semicolons. Raises UserError for one that is not known.

    Without any, all that are known. option: where the text comes from, for the message.
    """
    names = [name.strip() for name in text.split(";") if name.strip()]
    for name in names:
        if name not in known:
            raise UserError(
                f"command line: {option}: there is no {name!r}; there are {'; '.join(known)}"
            )
    return names or list(known)


def parse(argv, description):
    """The command line -> Config. Raises UserError.

    An option on the command line wins over the preset, and the preset over the default. With
    --resume, the options come from the run's config.json (`resumed` has the exceptions).
    """
    # What the command line gives
    values = vars(build_parser(description).parse_args(argv))
    given = {name: value for name, value in values.items() if value is not None}
    preset = given.get("preset", "tiny")
    if preset not in PRESETS:
        raise UserError(
            f"command line: --preset must be one of {', '.join(PRESETS)}, not {preset!r}"
        )

    # Over the preset and the defaults, of which some depend on the method and on other options
    cfg = Config(**{**preset_values(preset, given.get("stage")), **given})
    if cfg.method in METHODS:
        settle_method(cfg, given)
        cfg.epochs = cfg.epochs or default_epochs(cfg)
    if "lr" in given:  # the user's --lr replaces both rates of the preset
        cfg.last_lr = given.get("last_lr", 0.0)
    cfg.out = cfg.out or f"out/{cfg.stage}"

    # A resumed run has its options already
    if cfg.resume:
        return resumed(cfg, given)
    cfg.given = tuple(given)
    cfg.check()
    return cfg


def build_parser(description):
    """The parser of train.py's command line. An option that is not given is None."""
    parser = Parser(
        f"{description}\n"
        "Defaults stand in brackets: [a; PRESET b; rl c; PRESET rl d; PRESET METHOD e], where b\n"
        "is the default with --preset PRESET, c with --stage rl, d with both, and e in the SFT of\n"
        "PRESET with --method METHOD. (Without these options: tiny, and atp.)",
        usage="python train.py [--option value …]",
    )

    # Each group of options has a section of --help, with its docstring for a title
    for group_class in (General, Data, Latents, Optim, Explore, Size, Report):
        group = parser.add_argument_group(group_class.__doc__)
        for f in fields(group_class):
            if f.type is bool:
                kind = {"action": "store_true"}
            else:
                kind = {"type": f.type, "metavar": f.type.__name__.upper()}
            text = f.metadata["help"] + describe_default(f)
            text = text.replace("%", "%%")  # argparse formats it
            group.add_argument(flag(f.name), dest=f.name, default=None, help=text, **kind)
    return parser


def preset_values(preset, stage):
    """{name: value} of what a preset sets at a stage."""
    if stage == "rl":
        return {**PRESETS[preset], **RL_PRESETS[preset]}
    return PRESETS[preset]


def describe_default(f):
    """The default of an option, and where it differs, for --help: " [500; rl 1600]"."""
    # The default of each preset, without and with --stage rl
    sft = {preset: preset_values(preset, "sft").get(f.name, f.default) for preset in PRESETS}
    rl = {preset: preset_values(preset, "rl").get(f.name, f.default) for preset in PRESETS}
    tiny, tiny_rl = sft.pop("tiny"), rl.pop("tiny")

    # An empty string or a switch that is off says nothing; some help texts name their default
    shown = []
    if tiny != "" and tiny is not False and not f.metadata["help"].endswith("]"):
        shown.append(f"{tiny}")
    shown += [f"{preset} {value}" for preset, value in sft.items() if value != tiny]
    if tiny_rl != tiny:
        shown.append(f"rl {tiny_rl}")

    # A preset with rl is shown unless it is what the reader expects from the entries before
    for preset, value in rl.items():
        expected = tiny_rl if tiny_rl != tiny else sft[preset]
        if value != expected:
            shown.append(f"{preset} rl {value}")

    # What a method's SFT sets beside its preset
    for preset, methods in SFT_OF_METHOD.items():
        for method, values in methods.items():
            if f.name in values:
                shown.append(f"{preset} {method} {values[f.name]}")
    return f" [{'; '.join(shown)}]" if shown else ""


def settle_method(cfg, given):
    """Set what SFT_OF_METHOD has for the method, where it is not given. RL takes none of it."""
    if cfg.stage != "sft":
        return
    for name, value in SFT_OF_METHOD[cfg.preset].get(cfg.method, {}).items():
        if name not in given:
            setattr(cfg, name, value)
    if not cfg.distill and "distill_every" not in given:
        cfg.distill_every = 1  # without a teacher, how often it comes would be refused


def default_epochs(cfg):
    """The preset's --epochs."""
    method = METHODS[cfg.method]

    # The most particular kind that the preset has numbers for
    kind = cfg.method if method.stages == "words" else method.stages
    for part, has_part in ((", φ", method.decode), (", teacher", cfg.distill)):
        if has_part and kind + part in EPOCHS[cfg.preset]:
            kind += part
    epochs = EPOCHS[cfg.preset][kind]

    if method.stages == "curriculum":
        first, middle, full, last = epochs
        epochs = [first, *[middle] * (len(cfg.stages) - 3), full, last]
    else:
        epochs = [epochs]
    if len(set(epochs)) == 1:
        epochs = epochs[:1]  # one number for every stage

    # With the built-in task, the number of tiny's steps does not depend on --labelled
    scale = 1
    if cfg.preset == "tiny" and not cfg.data:
        scale = Config.labelled / max(1, cfg.labelled)
    return ",".join(f"{scale * number:g}" for number in epochs)


# ---- a run's config.json -------------------------------------------------------------------------


def resumed(cfg, given):
    """The Config of the run in cfg.out, to resume it. given: {name: value} of the command line.

    Raises UserError if there is no run, or if an option contradicts it.
    """
    path = Path(cfg.out) / "config.json"
    if not path.exists():
        raise UserError(
            f"{path}:0: is missing, so there is no run here to resume; start without --resume, or "
            "give another --out"
        )
    run_cfg = of_run(path)

    # Files may have moved; that their content is the same is checked once they are read
    may_move = ["data", "val", "test"]
    if run_cfg.stage == "rl":
        may_move.append("init")
    may_change = ("resume", "out", "device", "dry_run")
    # A run that was out of memory may continue with smaller batches: that changes rounding alone
    of_memory = ("micro_batch", "recompute", "eval_batch")

    # An option may repeat what the run was started with, but not change it
    for name, value in given.items():
        old = getattr(run_cfg, name)
        if name in of_memory or (name in may_move and old and value):
            setattr(run_cfg, name, value)
        elif name not in may_change and value != old:
            started = f"with {flag(name)} {old}" if old != "" else f"without {flag(name)}"
            raise UserError(
                f"{path}:1: the run was started {started}, not with {flag(name)} {value}; drop the "
                "option"
            )

    # Where and how it continues: this comes from the command line
    for name in may_change:
        setattr(run_cfg, name, getattr(cfg, name))
    run_cfg.check()
    return run_cfg


def of_run(path):
    """The Config in a run's config.json. Raises UserError if write_config did not write it."""
    try:
        cfg = Config(**json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise UserError(
            f"{path}:1: is not the config.json of a run ({e}); restore it, or give another folder"
        ) from None

    # The command line's types and ranges hold for the file as well
    for f in fields(Config):
        value = getattr(cfg, f.name)
        is_whole_float = f.type is float and type(value) is int  # JSON may write 1.0 as 1
        if type(value) is not f.type and not is_whole_float:
            raise UserError(f'{path}:1: "{f.name}" must be {f.type.__name__}, not {value!r}')
    try:
        cfg.check()
    except (UserError, OverflowError) as e:  # OverflowError: an integer too large for a float
        raise UserError(f"{path}:1: {e}") from None
    return cfg


def write_config(cfg, path):
    """Write a run's config.json. Raises NotWritten."""
    replace_file(path, json.dumps(asdict(cfg), indent=2) + "\n")
