"""The comparisons of docs/results.md in one command: train what is not finished, print tables.

    python -m minatp.ablate --out out/ablate --seeds 0,1,2 --jobs 2
    python -m minatp.ablate --options "--labelled 4000" --arms "RL; control: more SFT" --out out/few

Stage 1: the methods. Stage 2: RL and its controls, from the same SFT run unless an arm says
otherwise, and the controls for the same seconds or steps where they say so. An arm with a
summary.json is not trained again.
"""

import json
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path

from ..run import options
from ..run.errors import UserError
from ..run.huggingface import read_json
from ..run.options import Parser
from ..run.saved import checkpoints
from ..run.terminal import print0

TRAIN = str(Path(__file__).parents[2] / "train.py")

# ---- the arms: name -> options of train.py -------------------------------------------------------

# The first stages of the curriculum, as by default: of methods with φ, and of those without. Where
# an arm gives the epochs of the last one, they fit the seconds of the default, or 1.3 or 1.65 × as
# many (docs/results.md has what a step costs)
EARLIER = "2.5,0.5,0.5,0.5,0.8,"
EARLIER_WITHOUT_PHI = "5,0.5,0.5,0.5,0.8,"

# Options of train.py that differ between the runs, or with which nothing would be trained
NOT_COMMON = ("--stage", "--method", "--out", "--seed", "--resume", "--dry-run")

# Stage 1, from scratch
METHODS = {
    "no-CoT": ["--method", "no-cot"],
    "CoT": ["--method", "cot"],
    "iCoT": ["--method", "icot", "--epochs", EARLIER_WITHOUT_PHI + "33"],
    "pause": ["--method", "pause", "--epochs", EARLIER_WITHOUT_PHI + "31"],
    "Coconut": ["--method", "coconut", "--epochs", EARLIER_WITHOUT_PHI + "21"],
    "SIM-CoT": ["--method", "sim-cot"],
    "SIM-CoT, distillation": ["--method", "sim-cot", "--distill", "5", "--distill-every", "2"],
    "CODI": ["--method", "codi"],
    "CODI + SIM-CoT": ["--method", "codi-sim-cot"],
    "ATP": ["--method", "atp"],
    "ATP, no distillation": ["--distill", "0"],
    "ATP, 1.3 × the seconds": ["--epochs", EARLIER + "18.6"],
    "ATP, no distillation, 1.3 × the seconds": ["--distill", "0", "--epochs", EARLIER + "22.3"],
    "ATP, 1.65 × the seconds": ["--epochs", EARLIER + "24.6"],
    "ATP, no distillation, 1.65 × the seconds": ["--distill", "0", "--epochs", EARLIER + "29.5"],
    # Without one of the things that the default adds to the paper; then without all that came with
    # a φ of one layer, in as many seconds
    "ATP, no word dropout": ["--word-dropout", "0"],
    "ATP, cosine": ["--lr-schedule", "cosine"],
    "ATP, weight decay 0.01": ["--weight-decay", "0.01"],
    "ATP, φ of two layers, cosine": [
        *("--decoder-layers", "2", "--word-dropout", "0"),
        *("--lr-schedule", "cosine", "--weight-decay", "0.01"),
        *("--epochs", EARLIER_WITHOUT_PHI + "9.4"),
    ],
    "ATP, no VAE": ["--no-vae"],
    "ATP, no stop head": ["--no-stop"],
    "ATP, no decoder": ["--no-decoder"],
    "ATP, β × 10": ["--beta", "1e-2"],
}

# With the preset's defaults (tiny: estimator path, σ × 4, anchor 1)
RL = ["--stage", "rl"]

# The paper's estimator, and a control for its thoughts
SCORE = ["--estimator", "score"]
PLACEBO = ["--placebo-latents"]

# CODI's distillation in the anchor, as in the tiny preset's SFT; fewer updates, to take as long
DISTILLED = ["--distill", "5", "--distill-every", "2", "--updates", "1485"]

# More SFT, of the last stage alone. {seconds}: as many epochs as take the time of the arm "RL";
# {steps}: as many as have its number of optimizer steps
MORE_SFT = ["--stage", "sft", "--epochs", "{seconds}"]
# The anchor is an SFT loss with RL's options: no distillation, no word dropout, RL's schedule
ANCHOR = [
    *("--stage", "sft", "--epochs", "{steps}", "--distill", "0", "--word-dropout", "0"),
    *("--lr-schedule", "cosine", "--weight-decay", "0.01"),
]
# Three quarters of each batch are problems with an answer and no steps
MORE_SFT_ON_ANSWERS = [*MORE_SFT, "--answers-share", "0.75"]

# Stage 2, from the run "ATP"
# fmt: off
AFTER_ATP = {
    "RL":                                   RL,
    # Is it the reward? Rewards of the wrong chains; as many steps of SFT, with no reward
    "RL, placebo (permuted rewards)":       [*RL, "--placebo"],
    "the anchor alone":                     ANCHOR,
    # The terms of the reward
    "RL, no coherence":                     [*RL, "--w-coh", "0"],
    "RL, coherence only (sees no answer)":  [*RL, "--no-answers", "--w-coh", "1"],
    # How widely to explore (the default is σ × 4)
    "RL, σ × 1":                            [*RL, "--spread", "1"],
    "RL, σ × 8":                            [*RL, "--spread", "8"],
    # The paper's estimator: latents are actions with a density
    "RL, thoughts scored":                  [*RL, "--estimator", "score"],
    "RL, thoughts scored, greedy words":    [*RL, "--estimator", "score", "--greedy"],
    # … whose density is a mean over the D = 128 dimensions; with the thoughts' credit permuted; and
    # with none for the thoughts
    "RL, thoughts scored by the mean":      [*RL, *SCORE, "--latent-weight", "0.0078125"],
    "RL, scored by the mean, placebo":      [*RL, *SCORE, "--latent-weight", "0.0078125", *PLACEBO],
    "RL, words scored, thoughts not":       [*RL, *SCORE, "--latent-weight", "0"],
    # Advantage, KL and update. GRPO: 400 batches of 4 updates make as many steps as RL's 1,600
    "RL, normalised":                       [*RL, "--normalise"],
    "RL, leave one out":                    [*RL, "--baseline", "rloo"],
    "RL, KL 0.01":                          [*RL, "--kl", "0.01"],
    "RL, 4 updates a batch (GRPO)":         [*RL, "--updates-per-batch", "4", "--updates", "400"],
    # Distillation in the anchor, for as many seconds
    "RL, distillation in its anchor":       [*RL, *DISTILLED],
    # A smaller learning rate (the default is 2e-3), no anchor, and both
    "RL, lr 3e-4":                          [*RL, "--lr", "3e-4"],
    "RL, no anchor":                        [*RL, "--anchor", "0"],
    "RL, no anchor, lr 3e-4":               [*RL, "--anchor", "0", "--lr", "3e-4"],
    "RL, no anchor, lr 3e-4, placebo":      [*RL, "--anchor", "0", "--lr", "3e-4", "--placebo"],
    "control: more SFT":                    MORE_SFT,
    "SFT on answers alone":                 MORE_SFT_ON_ANSWERS,
}

# Stage 2, from another run: name -> (that run, options)
AFTER_OTHERS = {
    "SFT on answers alone, then RL":        ("SFT on answers alone", RL),
    "SFT on answers alone, twice":          ("SFT on answers alone", MORE_SFT_ON_ANSWERS),
    "ATP, β × 10, then RL":                 ("ATP, β × 10", RL),
    "ATP, no distillation, then RL":        ("ATP, no distillation", RL),
}
# fmt: on


def start_of(arm):
    """The run that an arm of stage 2 starts from."""
    return AFTER_OTHERS[arm][0] if arm in AFTER_OTHERS else "ATP"


def template(arm):
    """The options of an arm of stage 2, with {seconds} or {steps} where they depend on RL's."""
    return AFTER_OTHERS[arm][1] if arm in AFTER_OTHERS else AFTER_ATP[arm]


def has_budget_of_rl(arm):
    """Whether an arm of stage 2 takes as many seconds or steps as the arm "RL"."""
    return any("{" in option for option in template(arm))


# ---- the command ---------------------------------------------------------------------------------


def main(argv=None):
    args = parse(argv)
    study = Study(Path(args.out).absolute(), args.options)
    stage_1, stage_2 = plan(args.arms)
    for group in [stage_1, *stage_2]:
        study.check(group)

    def train(job):
        study.train_arm(*job)

    # The runs of a group go side by side; a group waits for those before it, from which it starts.
    # Threads will do, as each only waits for its process. list() raises the error of a failed run
    with ThreadPoolExecutor(args.jobs) as pool:
        for group in [stage_1, *stage_2]:
            list(pool.map(train, [(arm, seed) for arm in group for seed in args.seeds]))

    # A table for each stage. That of stage 1 also has the runs that others start from
    methods = [arm for arm in METHODS if arm in stage_1]
    after = [arm for arm in arms_after() if arm in args.arms]
    tables = [table(study, arms, args.seeds) for arms in (methods, after) if arms]
    print0("\n\n".join(tables))


def parse(argv):
    """The command line, checked. Raises UserError."""
    parser = Parser(__doc__, "minatp.ablate")
    add = parser.add_argument
    add("--out", default="out/ablate", help="folder of the runs [%(default)s]")
    add("--seeds", default="0", help="separated by commas [%(default)s]")
    add("--jobs", type=int, default=1, help="runs side by side [%(default)s]")
    add(
        "--arms",
        default="",
        help="only these, by name, separated by semicolons, and the runs that they need [all]",
    )
    add("--options", default="", help="passed to every run of train.py, in one string")
    args = parser.parse_args(argv)

    # The name of an arm can hold commas, so arms are separated by semicolons
    args.arms = options.among("--arms", args.arms, [*METHODS, *arms_after()])
    try:
        args.seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        raise UserError(
            f"command line: --seeds must be whole numbers separated by commas, not {args.seeds!r}"
        ) from None
    if not all(0 <= seed < 2**32 for seed in args.seeds):
        raise UserError(f"command line: --seeds must be from 0 to {2**32 - 1}, not {args.seeds}")
    if len(set(args.seeds)) < len(args.seeds):
        raise UserError("command line: --seeds has the same number twice; give each once")
    if args.jobs < 1:
        raise UserError(f"command line: --jobs must be positive, not {args.jobs}")
    args.options = common_options(args.options)
    return args


def common_options(text):
    """--options as a list of arguments. Raises UserError if one is not common to all arms."""
    # Quotes hold spaces together; a backslash is one of a path
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", ""
    try:
        arguments = list(lexer)
    except ValueError as e:
        raise UserError(f"command line: --options: {e}") from None
    for argument in arguments:
        option = argument.split("=")[0]
        if option in NOT_COMMON:
            raise UserError(f"command line: --options: {option} cannot be given here; drop it")
    return arguments


def arms_after():
    """All arms of stage 2, in the order of the table."""
    return [*AFTER_ATP, *AFTER_OTHERS]


def plan(arms):
    """What to train for these arms -> (arms of stage 1, groups of arms of stage 2, in order)."""
    needed = set()
    for arm in arms:
        needed |= {arm, *needs(arm)}

    # ATP comes first, as most others wait for it
    stage_1 = [arm for arm in METHODS if arm in needed]
    if "ATP" in stage_1:
        stage_1 = ["ATP", *(arm for arm in stage_1 if arm != "ATP")]

    # RL comes first, as its controls take as many seconds or steps
    stage_2 = [
        [arm for arm in AFTER_ATP if arm in needed and arm == "RL"],
        [arm for arm in AFTER_ATP if arm in needed and arm != "RL"],
        [arm for arm in AFTER_OTHERS if arm in needed],
    ]
    return stage_1, [group for group in stage_2 if group]


def needs(arm):
    """The other arms that must be trained before this one: a set."""
    if arm in METHODS:
        return set()
    needed = {start_of(arm)}
    if has_budget_of_rl(arm):
        needed.add("RL")
    return needed.union(*map(needs, needed))


# ---- the runs ------------------------------------------------------------------------------------


class Study:
    """Runs of train.py in one folder."""

    def __init__(self, out, common):
        """common: options of every run."""
        self.out = out
        self.common = common

    def folder(self, arm, seed):
        name = "".join(c if c.isalnum() else "-" for c in arm).strip("-")
        return self.out / f"{name}.{seed}"

    def summary(self, arm, seed):
        return read_json(self.folder(arm, seed) / "summary.json")

    def config(self, arm, seed):
        return read_json(self.folder(arm, seed) / "config.json")

    def check(self, arms):
        """Raise UserError if --options contradicts an arm's own, before hours of other arms."""
        for arm in arms:
            if arm in METHODS:
                own = ["--stage", "sft", *METHODS[arm]]
            elif has_budget_of_rl(arm):
                continue  # its --epochs follow from the run of RL
            else:
                own = [*template(arm), "--init", "out"]
            try:
                options.parse([*self.common, *own], "")
            except UserError as e:
                raise UserError(
                    f"{e}; so --options does not suit the arm {arm!r}; choose others with --arms"
                ) from None

    def train_arm(self, arm, seed):
        """Train an arm, after the run that it starts from, unless they are finished; its folder."""
        if arm in METHODS:
            return self.train(arm, seed, ["--stage", "sft", *METHODS[arm]])

        # Stage 2. Some controls depend on how long RL took
        start = self.train_arm(start_of(arm), seed)
        epochs = self.epochs_like_rl(arm, seed) if has_budget_of_rl(arm) else {}
        chosen = [option.format(**epochs) for option in template(arm)]
        return self.train(arm, seed, [*chosen, "--init", str(start.resolve())])

    def train(self, arm, seed, chosen):
        """Run train.py, unless the run is finished; its folder.

        Raises UserError if training fails, or if the folder has a run with other options.
        """
        # Was it started, or even finished, by an earlier command?
        out = self.folder(arm, seed)
        # The arm's own options come last, and so win over the common ones
        arguments = [*self.common, *chosen, "--seed", str(seed), "--out", str(out)]
        started = bool(checkpoints(out))
        finished = (out / "summary.json").exists()
        if started or finished:
            check_same_options(out, arguments)
        if finished:
            return out

        # Start or resume it. (A resumed run has its options, but for --device, in its config.json)
        out.mkdir(parents=True, exist_ok=True)
        if started:
            device = options.parse(arguments, "").device
            arguments = ["--resume", "--out", str(out), *(["--device", device] if device else [])]
        command = [TRAIN, *arguments]
        print0(f"{arm}, seed {seed}: {' '.join(command)}")
        with (out / "log.txt").open("a") as log:
            code = subprocess.run([sys.executable, *command], stdout=log, stderr=log).returncode
        if code:
            raise UserError(
                f"{out}/log.txt:0: {arm}, seed {seed}, ended with code {code}; "
                "its last lines say why"
            )
        return out

    def epochs_like_rl(self, arm, seed):
        """What --epochs must be for an arm of the last SFT stage alone to cost as much as "RL".

        {"steps"}: as many optimizer steps. {"seconds"}: as much time, at the speed of the last
        stage.
        """
        start = start_of(arm) if start_of(arm) in METHODS else "ATP"
        cfg = self.config(start, seed)
        steps_per_epoch = self.summary(start, seed)["training_problems"] / cfg["batch_size"]

        # The budget in optimizer steps: those of RL, or the SFT steps that fit into RL's seconds
        n_step = {
            "steps": self.config("RL", seed)["updates"],
            "seconds": self.summary("RL", seed)["seconds"] / self.seconds_per_step(start, seed),
        }
        n_epoch = {name: n / steps_per_epoch for name, n in n_step.items()}

        # Stages 0 … K get no epochs
        earlier_stages = "0," * (cfg["K"] + 1)
        return {name: earlier_stages + str(round(n, 3)) for name, n in n_epoch.items()}

    def seconds_per_step(self, arm, seed):
        """Of the last stage of a run of stage 1."""
        text = (self.folder(arm, seed) / "metrics.jsonl").read_text()
        records = [json.loads(line) for line in text.splitlines()]

        # Only training records have seconds; validations have none
        last_stage = records[-1]["stage"]
        timed = [r for r in records if r["stage"] == last_stage and "seconds" in r]

        # With a single record, take the time from the start of the run
        first = timed[0] if len(timed) > 1 else {"step": 0, "seconds": 0.0}
        last = timed[-1]
        return (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])


def check_same_options(out, arguments):
    """Raise UserError if the run in `out` has other options than these arguments of train.py."""
    cfg = options.parse(arguments, "")
    wanted = asdict(cfg)
    had = asdict(options.of_run(out / "config.json"))
    wanted["dtype"] = wanted["dtype"] or had["dtype"]  # without --dtype the run has settled it
    free = {"device", "resume", "out", "init"}  # these may differ: where it runs, not what it is
    if cfg.init:  # the sizes that --init brings are in config.json (Run.settle_sizes)
        free |= {"c", "K", *(f.name for f in fields(options.Size))} - set(cfg.given)
    different = [
        options.flag(name) for name in wanted if wanted[name] != had[name] and name not in free
    ]
    if different:
        raise UserError(
            f"{out}/config.json:1: ran with another {', '.join(different)} than is asked for now; "
            "give another --out"
        )


# ---- the tables ----------------------------------------------------------------------------------


def table(study, arms, seeds):
    """Markdown: a row for each arm, with means over the seeds.

    One seed: accuracy with its 95 % interval. Several: with the accuracy of each. Arms of stage 2
    also have the points gained over the run that they start from.
    """
    # All arms of a table are of one stage; stage 2 has one more column
    after = arms[-1] not in METHODS
    header = "| | accuracy | on new numbers | coherence | latents + tokens | seconds |"
    rule = "|---|---|---|---|---|---|"
    if after:
        header += " gained |"
        rule += "---|"
    lines = [header, rule]
    for arm in arms:
        runs = [study.summary(arm, seed) for seed in seeds]
        line = table_row(arm, runs)
        if after:
            starts = [study.summary(start_of(arm), seed) for seed in seeds]
            line += f" {gained(runs, starts)} |"
        lines.append(line)
    return "\n".join(lines)


def table_row(arm, runs):
    """One arm's row. runs: the summaries of its seeds."""

    def mean(name):
        return statistics.fmean(run[name] for run in runs)

    # Beside the mean accuracy: that of each seed, or one seed's interval
    if len(runs) > 1:
        spread = ", ".join(f"{100 * run['accuracy']:.1f}" for run in runs)
    else:
        low, high = runs[0]["accuracy_ci95"]
        spread = f"{100 * low:.1f}–{100 * high:.1f}"

    # Thoughts without words have no coherence, and only the built-in task has new numbers
    new_numbers = coherence = "–"
    if "new_numbers" in runs[0]:
        accuracy = statistics.fmean(run["new_numbers"]["accuracy"] for run in runs)
        new_numbers = f"{100 * accuracy:.1f} %"
    if runs[0]["coherence"] is not None:
        coherence = f"{100 * mean('coherence'):.1f} %"
    return (
        f"| {arm} | {100 * mean('accuracy'):.1f} % ({spread}) | {new_numbers} | {coherence} | "
        f"{mean('latents'):.1f} + {mean('answer_tokens'):.1f} | {mean('seconds'):.0f} |"
    )


def gained(runs, starts):
    """Points of accuracy gained over the start, with the standard error.

    One seed: that of the differences on the same problems, if it is known. Several: that of the
    mean.
    """
    # A run and the one that it starts from have the same seed: the differences are paired
    gains = [100 * (run["accuracy"] - start["accuracy"]) for run, start in zip(runs, starts)]
    if len(gains) > 1:
        error = statistics.stdev(gains) / len(gains) ** 0.5
        return f"{statistics.fmean(gains):+.1f} ± {error:.1f}"

    # Only a summary of RL has gain_se: RL is tested beside its start, problem by problem
    text = f"{gains[0]:+.1f}"
    if runs[0].get("gain_se") is not None:
        text += f" ± {100 * runs[0]['gain_se']:.1f}"
    return text
