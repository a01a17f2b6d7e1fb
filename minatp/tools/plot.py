"""The learning curves of any runs in one picture: a panel for each quantity, a colour for each run.

    python -m minatp.plot out/*/metrics.jsonl -o curves.png
    python -m minatp.plot out/sft out/rl -o curves.svg

Losses and rewards of training; accuracy by curriculum stage (SFT) or by update (RL) with its 95 %
interval; latents used. Needs matplotlib, which minatp itself does not.
"""

import json
from pathlib import Path

from ..run.errors import UserError
from ..run.options import Parser

# Quantity -> the title of its panel, in the order of the panels. Names are those of metrics.jsonl;
# where one means two things, what follows the dot tells them apart
TITLES = {
    "enc": "loss: words of the policy",
    "dec": "loss: φ reads the thoughts",
    "stop": "loss: stop head",
    "kl.sft": "loss: KL to N(0, I)",
    "accuracy.stage": "validation accuracy by stage",
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
# Losses that fall by orders of magnitude
LOGARITHMIC = {"enc", "dec", "stop"}

# In an SVG, text stays text: the file is small. A fixed salt makes the ids in it reproducible
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "minatp", "font.sans-serif": ["DejaVu Sans"]}


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

    # minatp itself does not require matplotlib. Agg draws without a display
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "command line: minatp.plot needs matplotlib, which is not installed; "
            "pip install matplotlib"
        ) from None
    matplotlib.use("Agg")

    # Read the runs
    paths = [Path(f) for f in args.files]
    paths = [path / "metrics.jsonl" if path.is_dir() else path for path in paths]
    runs = {name: read(path) for name, path in zip(names(paths), paths)}
    if not any(runs.values()):
        raise UserError(
            f"{paths[0]}:1: has no losses and no validation yet; wait for the run's first lines"
        )

    # Write the picture. An SVG has no date in it, so that the same curves make the same file
    out = args.out if Path(args.out).suffix else args.out + ".png"
    metadata = {"Date": None} if out.endswith(".svg") else None
    try:
        with matplotlib.rc_context(STYLE):
            figure(runs).savefig(out, dpi=130, metadata=metadata)
    except (OSError, ValueError) as e:  # ValueError: an unknown format
        raise UserError(f"{out}:0: cannot be written ({e}); choose another --out") from None
    print(out)


def names(paths):
    """The name of the folder of each file; its path if two folders have the same name."""
    folders = [path.absolute().parent for path in paths]
    short = [folder.name for folder in folders]
    return [str(folder) if short.count(name) > 1 else name for folder, name in zip(folders, short)]


# ---- curves --------------------------------------------------------------------------------------


def read(path):
    """The curves of a metrics.jsonl (see `curves`). Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"{path}:0: cannot be read ({e}); give the metrics.jsonl of a run"
        ) from None
    records = read_records(path, text)
    if not records:
        raise UserError(f"{path}:1: is empty; the run has written nothing yet")

    # The lines are JSON with a step; their other values have not been checked
    try:
        return curves(records)
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise UserError(
            f"{path}:0: has a record that no run wrote ({type(e).__name__}: {e}); is it the "
            "metrics.jsonl of a run?"
        ) from None


def read_records(path, text):
    """The records of a metrics.jsonl's text. Raises UserError."""
    records = []
    lines = text.splitlines()
    for i, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            if records and i == len(lines) and not text.endswith("\n"):
                break  # a run that is writing, or was killed, can leave half a line at the end
            raise UserError(
                f"{path}:{i}: is not valid JSON ({getattr(e, 'msg', e)}); is it the metrics.jsonl "
                "of a run?"
            ) from None
        if not isinstance(record, dict) or "step" not in record:
            raise UserError(f'{path}:{i}: has no "step"; is it the metrics.jsonl of a run?')
        records.append(record)
    return records


def curves(records):
    """Records -> {panel: [(x, value, low, high)]}; low and high are None without an interval."""
    points = {}

    def add(panel, x, value, low=None, high=None):
        points.setdefault(panel, []).append((x, value, low, high))

    for record in records:
        step = record["step"]
        is_sft = "stage" in record
        if "validation" not in record:
            # Training: losses or rewards. "kl" is SFT's to the prior, or RL's to the start. The
            # latents used are those of the mean policy, which a validation has
            for key, value in record.items():
                panel = key
                if key == "kl":
                    panel = "kl.sft" if is_sft else "kl.rl"
                if panel in TITLES and panel != "latents":
                    add(panel, step, value)
            continue

        # Validation: SFT has one at the end of each curriculum stage
        measured = record["validation"]
        low, high = measured["accuracy_ci95"]
        if is_sft:
            add("accuracy.stage", record["stage"], measured["accuracy"], low, high)
        else:
            add("accuracy.step", step, measured["accuracy"], low, high)
        for key in ("latents", "coherence"):
            # Coherence is None if thoughts are not in words
            if measured.get(key) is not None:
                add(key, step, measured[key])
    return points


# ---- the picture ---------------------------------------------------------------------------------


def figure(runs):
    """{name: curves} -> a matplotlib Figure."""
    # Imported here, as matplotlib is optional. Figure, unlike pyplot, keeps no global state
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    # A grid of panels, four in a row; a run's curve has the run's colour in each. (C0 … C9 are
    # matplotlib's ten colours; C10 is C0 again)
    panels = [key for key in TITLES if any(key in points for points in runs.values())]
    n_column = min(4, len(panels))
    n_row = -(-len(panels) // n_column)
    picture = Figure(figsize=(2.7 * n_column, 1.8 * n_row + 0.4), layout="constrained")
    axes = picture.subplots(n_row, n_column, squeeze=False).flatten()
    for key, axis in zip(panels, axes):
        for i, points in enumerate(runs.values()):
            if key in points:
                draw_curve(axis, points[key], f"C{i}")
        style_panel(axis, key)
    for axis in axes[len(panels) :]:  # the rest of the last row
        axis.set_axis_off()

    # One legend for all panels
    lines = [Line2D([], [], color=f"C{i}") for i in range(len(runs))]
    picture.legend(lines, list(runs), loc="outside upper left", ncols=6, frameon=False, fontsize=9)
    return picture


def draw_curve(axis, points, color):
    """One run's curve in one panel, with its interval if it has one."""
    x, value, low, high = zip(*points)

    # With few points, show where they are
    dots = {"marker": "o", "markersize": 3} if len(x) < 16 else {}
    axis.plot(x, value, color=color, linewidth=1.2, **dots)

    # Of all quantities accuracy alone has an interval
    if low[0] is not None:
        axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def style_panel(axis, key):
    """The title, the scales and the frame of one panel."""
    from matplotlib.ticker import MaxNLocator

    axis.set_title(TITLES[key], fontsize=8.5, loc="left")
    if key in LOGARITHMIC:
        axis.set_yscale("log")
        axis.minorticks_off()

    # The axis counts curriculum stages or optimizer steps, in whole numbers
    x_label = "stage" if key == "accuracy.stage" else "step"
    axis.set_xlabel(x_label, fontsize=7.5, loc="right", labelpad=1)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.tick_params(labelsize=7.5)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
