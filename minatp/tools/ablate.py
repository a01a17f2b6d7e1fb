"""Every comparison of the README by one command: trains each arm that has no summary.json yet, then prints the tables.

    python -m minatp.ablate --out out/ablate --seeds 0,1,2 --jobs 2
    python -m minatp.ablate --out out/fewer --options "--labelled 4000" --arms "RL; control: more SFT"

Stage 1: the methods. Stage 2: RL and its controls, all from the same SFT run and, where they say so, for the same seconds or steps.
"""

import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from ..run import options
from ..run.errors import UserError
from ..run.options import Parser
from ..run.saved import checkpoints
from ..run.terminal import print0

TRAIN = str(Path(__file__).parents[2] / "train.py")

METHODS = {  # name -> options of train.py --stage sft
    "no-CoT": ["--method", "no-cot"],
    "CoT": ["--method", "cot"],
    "Coconut": ["--method", "coconut"],
    "SIM-CoT": ["--method", "sim-cot"],
    "ATP": ["--method", "atp"],
    "ATP, no VAE": ["--no-vae"],
    "ATP, no stop head": ["--no-stop"],
    "ATP, no decoder": ["--no-decoder"],
    "ATP, β × 10": ["--beta", "1e-2"],
}
MORE = ["--stage", "sft", "--epochs", "{seconds}"]  # of the last stage
AFTER = {  # name -> options of the run that goes on from ATP; {seconds}, {steps}: epochs of the last stage that take as many as "RL"
    "RL": ["--stage", "rl"],
    "RL, placebo (permuted rewards)": ["--stage", "rl", "--placebo"],
    "the anchor alone": ["--stage", "sft", "--epochs", "{steps}"],
    "RL, no coherence": ["--stage", "rl", "--w-coh", "0"],
    "RL, coherence only (sees no answer)": ["--stage", "rl", "--no-answers", "--w-coh", "1"],
    "RL, σ × 1": ["--stage", "rl", "--spread", "1"],
    "RL, σ × 8": ["--stage", "rl", "--spread", "8"],
    "RL, thoughts scored": ["--stage", "rl", "--estimator", "score"],
    "RL, thoughts scored, greedy words": ["--stage", "rl", "--estimator", "score", "--greedy"],
    "RL, normalised": ["--stage", "rl", "--normalise"],
    "RL, leave one out": ["--stage", "rl", "--baseline", "rloo"],
    "RL, KL 0.01": ["--stage", "rl", "--kl", "0.01"],
    "RL, 4 updates a batch (GRPO)": [
        "--stage",
        "rl",
        "--updates-per-batch",
        "4",
        "--updates",
        "400",
    ],
    "RL, lr 3e-4": ["--stage", "rl", "--lr", "3e-4"],
    "RL, no anchor": ["--stage", "rl", "--anchor", "0"],
    "RL, no anchor, lr 3e-4": ["--stage", "rl", "--anchor", "0", "--lr", "3e-4"],
    "RL, no anchor, lr 3e-4, placebo": [
        "--stage",
        "rl",
        "--anchor",
        "0",
        "--lr",
        "3e-4",
        "--placebo",
    ],
    "control: more SFT": MORE,
    "SFT on answers alone": [*MORE, "--answers-share", "0.75"],
}
THEN = {
    "SFT on answers alone, then RL": ("SFT on answers alone", ["--stage", "rl"]),
    "SFT on answers alone, twice": ("SFT on answers alone", AFTER["SFT on answers alone"]),
    "ATP, β × 10, then RL": ("ATP, β × 10", AFTER["RL"]),
}


def main(argv=None):
    parser = Parser(__doc__, "minatp.ablate")
    parser.add_argument("--out", default="out/ablate", help="folder of the runs [%(default)s]")
    parser.add_argument("--seeds", default="0", help="separated by commas [%(default)s]")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side [%(default)s]")
    parser.add_argument(
        "--arms",
        default="",
        help="only these, by name, separated by semicolons; ATP and RL come with what needs them [all]",
    )
    parser.add_argument(
        "--options", default="", help="given to every run of train.py, in one string"
    )
    args = parser.parse_args(argv)
    arms = options.among("--arms", args.arms, [*METHODS, *AFTER, *THEN])
    try:
        seeds = [int(s) for s in args.seeds.split(",")]
    except ValueError:
        raise UserError(
            f"command line: --seeds must be whole numbers separated by commas, not {args.seeds!r}"
        )
    if args.jobs < 1:
        raise UserError(f"command line: --jobs must be positive, not {args.jobs}")
    study = Study(Path(args.out).absolute(), args.options.split())
    with ThreadPoolExecutor(
        args.jobs
    ) as pool:  # a seed's later arms wait for its earlier ones; seeds and methods run side by side
        late = [a for a in (*AFTER, *THEN) if a in arms]
        bases = {THEN[a][0] for a in late if a in THEN}
        first = [a for a in METHODS if a in arms or a in bases or late and a == "ATP"]
        list(
            pool.map(
                lambda job: study.method(*job),
                [(a, s) for a in sorted(first, key=lambda a: a != "ATP") for s in seeds],
            )
        )
        if late:
            for arms in (
                ["RL"],
                [a for a in AFTER if a in late or a in bases],
                [a for a in THEN if a in late],
            ):
                list(pool.map(lambda job: study.after(*job), [(a, s) for a in arms for s in seeds]))
    print0("\n\n".join(table(study, some, seeds) for some in (first, late) if some))


class Study:
    """Runs of train.py in one folder."""

    def __init__(self, out, options):
        self.out, self.options = out, options

    def folder(self, arm, seed):
        return self.out / f"{''.join(c if c.isalnum() else '-' for c in arm).strip('-')}.{seed}"

    def train(self, arm, seed, options):
        """Run train.py unless it has run; returns its folder. Raises UserError where it fails, or has run with other options."""
        out = self.folder(arm, seed)
        options = [*self.options, *options, "--seed", str(seed), "--out", str(out)]
        begun = checkpoints(out)
        if begun or (out / "summary.json").exists():
            asked, had = (
                asdict(c) for c in (options.parse(options, ""), options.of_run(out / "config.json"))
            )
            if other := [
                options.flag(name)
                for name in asked
                if asked[name] != had[name] and name not in ("device", "resume", "out", "init")
            ]:
                raise UserError(
                    f"{out}/config.json:1: ran with another {', '.join(other)} than is asked for now; give another --out"
                )
        if not (out / "summary.json").exists():
            out.mkdir(parents=True, exist_ok=True)
            command = [TRAIN, *(["--resume", "--out", str(out)] if begun else options)]
            print0(f"{arm}, seed {seed}: {' '.join(command)}")
            with (out / "log.txt").open("a") as log:
                code = subprocess.run([sys.executable, *command], stdout=log, stderr=log).returncode
            if code:
                raise UserError(
                    f"{out}/log.txt:0: {arm}, seed {seed}, ended with code {code}; its last lines say why"
                )
        return out

    def method(self, arm, seed):
        return self.train(arm, seed, ["--stage", "sft", *METHODS[arm]])

    def after(self, arm, seed):
        base, options = THEN[arm] if arm in THEN else ("ATP", AFTER[arm])
        start = self.after(base, seed) if base in AFTER else self.method(base, seed)
        epochs = self.epochs(seed) if any("{" in o for o in options) else {}
        return self.train(
            arm, seed, [o.format(**epochs) for o in options] + ["--init", str(start.resolve())]
        )

    def epochs(self, seed):
        """--epochs with the last SFT stage alone: as many as take RL's "steps", and as take its "seconds" by the speeds of the two runs."""
        sft = [
            json.loads(line)
            for line in (self.folder("ATP", seed) / "metrics.jsonl").read_text().splitlines()
        ]
        last = [r for r in sft if r["stage"] == sft[-1]["stage"] and "seconds" in r]
        last = last if len(last) > 1 else [{"step": 0, "seconds": 0.0}, *last]
        per_step = (last[-1]["seconds"] - last[0]["seconds"]) / (last[-1]["step"] - last[0]["step"])
        cfg = json.loads((self.folder("ATP", seed) / "config.json").read_text())
        updates = json.loads((self.folder("RL", seed) / "config.json").read_text())["updates"]
        one = (
            self.summary("ATP", seed)["training_problems"] / cfg["batch_size"]
        )  # steps of an epoch
        found = {
            "steps": updates / one,
            "seconds": self.summary("RL", seed)["seconds"] / per_step / one,
        }
        return {name: "0," * (cfg["K"] + 1) + str(round(n, 3)) for name, n in found.items()}

    def summary(self, arm, seed):
        return json.loads((self.folder(arm, seed) / "summary.json").read_text())


def table(study, arms, seeds):
    """Markdown: means over the seeds, with the 95 % interval of one seed or the accuracies of several, and what was gained over the
    run that an arm goes on from (± its standard error: of paired problems for one seed, over the seeds of several)."""
    follows = arms[-1] not in METHODS
    lines = [
        "| | accuracy | on new numbers | coherence | latents + tokens | seconds |"
        + (" gained |" if follows else ""),
        "|---|---|---|---|---|---|" + ("---|" if follows else ""),
    ]
    for arm in arms:
        runs = [study.summary(arm, s) for s in seeds]
        mean = lambda get: statistics.fmean(map(get, runs))
        low, high = runs[0]["accuracy_ci95"]
        each = (
            ", ".join(f"{100 * r['accuracy']:.1f}" for r in runs)
            if len(runs) > 1
            else f"{100 * low:.1f}–{100 * high:.1f}"
        )
        new = (
            f"{100 * mean(lambda r: r['new_numbers']['accuracy']):.1f} %"
            if "new_numbers" in runs[0]
            else "–"
        )
        coherence = (
            "–" if runs[0]["coherence"] is None else f"{100 * mean(lambda r: r['coherence']):.1f} %"
        )
        lines.append(
            f"| {arm} | {100 * mean(lambda r: r['accuracy']):.1f} % ({each}) | {new} | {coherence} | {mean(lambda r: r['latents']):.1f} + "
            f"{mean(lambda r: r['answer_tokens']):.1f} | {mean(lambda r: r['seconds']):.0f} |"
            + (gained(study, arm, runs, seeds) if follows else "")
        )
    return "\n".join(lines)


def gained(study, arm, runs, seeds):
    """Points over the start, as a cell of the table."""
    start = [study.summary(THEN[arm][0] if arm in THEN else "ATP", s) for s in seeds]
    gains = [100 * (r["accuracy"] - b["accuracy"]) for r, b in zip(runs, start)]
    if len(gains) > 1:
        return (
            f" {statistics.fmean(gains):+.1f} ± {statistics.stdev(gains) / len(gains) ** 0.5:.1f} |"
        )
    return f" {gains[0]:+.1f}" + (
        f" ± {100 * runs[0]['gain_se']:.1f} |" if runs[0].get("gain_se") is not None else " |"
    )
