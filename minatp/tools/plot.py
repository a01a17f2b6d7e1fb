"""The learning curves of any runs in one picture: a panel for each quantity, a colour for each run.

    python -m minatp.plot out/*/metrics.jsonl -o curves.png

Losses and rewards of training, accuracy by curriculum stage (SFT) or by update (RL) with its 95 % interval, and latents used.
Needs matplotlib, which minatp itself does not.
"""

import json
from pathlib import Path

from ..run.errors import UserError
from ..run.options import Parser

TITLES = {  # record key -> title of its panel, in the order of the panels
    "enc": "loss: words of the policy",
    "dec": "loss: φ reads the thoughts",
    "stop": "loss: stop head",
    "kl.sft": "loss: KL to N(0, I)",
    "accuracy.stage": "validation accuracy by curriculum stage",
    "accuracy.step": "validation accuracy by update",
    "reward": "reward",
    "acc": "reward: right answers",
    "coh": "reward: coherence",
    "fmt": "reward: format",
    "latents": "latents used",
    "coherence": "validation coherence",
    "sigma": "σ of the thoughts",
    "signal": "groups with a signal",
    "kl.rl": "KL to the start",
}
LOGARITHMIC = {"enc", "dec", "stop"}


def main(argv=None):
    parser = Parser(__doc__, "minatp.plot")
    parser.add_argument("files", nargs="+", help="metrics.jsonl of runs, or their folders")
    parser.add_argument(
        "-o",
        "--out",
        default="curves.png",
        help="picture to write: .png, .svg or .pdf [%(default)s]",
    )
    args = parser.parse_args(argv)
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "command line: minatp.plot needs matplotlib, which is not installed; pip install matplotlib"
        )
    matplotlib.use("Agg")
    paths = [p / "metrics.jsonl" if (p := Path(f)).is_dir() else p for f in args.files]
    runs = {name: read(path) for name, path in zip(names(paths), paths)}
    if not any(runs.values()):
        raise UserError(
            f"{paths[0]}:1: has no losses and no validation yet; wait for the run's first lines"
        )
    args.out = args.out if Path(args.out).suffix else args.out + ".png"
    try:
        figure(runs).savefig(args.out, dpi=130)
    except (OSError, ValueError) as e:  # ValueError: a format that it does not know
        raise UserError(f"{args.out}:0: cannot be written ({e}); choose another --out")
    print(args.out)


def read(path):
    """The curves of a metrics.jsonl. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}:0: cannot be read ({e}); give the metrics.jsonl of a run")
    records = []
    lines = text.splitlines()
    for i, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as e:
            if records and i == len(lines) and not text.endswith("\n"):
                break  # a run that is writing, or was cut, can end in half a line
            raise UserError(
                f"{path}:{i}: is not valid JSON ({getattr(e, 'msg', e)}); is it the metrics.jsonl of a run?"
            )
        if not isinstance(records[-1], dict) or "step" not in records[-1]:
            raise UserError(f'{path}:{i}: has no "step"; is it the metrics.jsonl of a run?')
    if not records:
        raise UserError(f"{path}:1: is empty; the run has written nothing yet")
    try:
        return curves(records)
    except (LookupError, TypeError, AttributeError) as e:
        raise UserError(
            f"{path}:0: has a record that no run wrote ({type(e).__name__}: {e}); is it the metrics.jsonl of a run?"
        )


def names(paths):
    """The folder of each file, with its parents where two are alike."""
    paths = [p.absolute() for p in paths]
    short = [p.parent.name for p in paths]
    return [str(p.parent) if short.count(s) > 1 else s for p, s in zip(paths, short)]


def curves(records):
    """Records -> {panel: [(x, value, low, high)]}; low and high None where there is no interval."""
    out = {}
    for r in records:
        kind = "sft" if "stage" in r else "rl"
        if "validation" in r:
            m = r["validation"]
            by = "accuracy.stage" if kind == "sft" else "accuracy.step"
            out.setdefault(by, []).append(
                (r["stage"] if kind == "sft" else r["step"], m["accuracy"], *m["accuracy_ci95"])
            )
            for key in ("latents", "coherence"):
                if m.get(key) is not None:
                    out.setdefault(key, []).append((r["step"], m[key], None, None))
        else:
            for key, value in r.items():
                panel = f"{key}.{kind}" if key == "kl" else key
                if (
                    panel in TITLES and panel != "latents"
                ):  # as the validations have it: the mean policy's
                    out.setdefault(panel, []).append((r["step"], value, None, None))
    return out


def figure(runs):
    """{name: curves} -> a matplotlib Figure."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    panels = [key for key in TITLES if any(key in c for c in runs.values())]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    picture = Figure(figsize=(3.6 * columns, 2.6 * rows + 0.5), layout="constrained")
    axes = iter(picture.subplots(rows, columns, squeeze=False).flat)
    for key, axis in zip(panels, axes):
        for i, found in enumerate(runs.values()):
            if key in found:
                x, value, low, high = zip(*found[key])
                dots = dict(marker="o", markersize=3.5) if len(x) < 16 else {}
                axis.plot(x, value, color=f"C{i}", linewidth=1.3, **dots)
                if low[0] is not None:
                    axis.fill_between(x, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
        axis.set_title(TITLES[key], fontsize=9.5, loc="left")
        axis.set_yscale("log" if key in LOGARITHMIC else "linear")
        axis.set_xlabel(
            "stage" if key == "accuracy.stage" else "step", fontsize=8, loc="right", labelpad=1
        )
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes:  # those left over
        axis.set_axis_off()
    colours = [Line2D([], [], color=f"C{i}") for i in range(len(runs))]
    picture.legend(
        colours, list(runs), loc="outside upper left", ncols=6, frameon=False, fontsize=9
    )
    return picture
