"""The learning curves of any runs in one picture: a panel for each quantity, a colour for each run.

    python -m minatp.plot out/*/metrics.jsonl -o curves.png
    python -m minatp.plot out/sft out/rl -o curves.svg

Losses and rewards of training; accuracy by curriculum stage (SFT) or by update (RL) with its 95 %
interval; latents used. Needs matplotlib, which minatp itself does not.

Accuracy by the number of latent steps, from what minatp.evaluate has measured. Dashed: the free
run, in which the stop head decides.

    python -m minatp.evaluate out/sft out/rl --latent-steps 0,1,2,3,4 --json > steps.jsonl
    python -m minatp.plot steps.jsonl -o steps.png
"""

import json
from collections import Counter
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
    "teacher": "loss: words of the teacher",
    "distill": "loss: distance to the teacher",
    "accuracy.stage": "validation accuracy by stage",
    "accuracy.step": "validation accuracy by update",
    "accuracy.latent_steps": "accuracy by latent steps (dashed: free)",
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
# What the panels count along x, if it is not the optimizer's steps
X_LABELS = {"accuracy.stage": "stage", "accuracy.latent_steps": "latent steps"}

# Losses that fall by orders of magnitude
LOGARITHMIC = {"enc", "dec", "stop", "teacher"}

# In an SVG, text stays text: the file is small. A fixed salt makes the ids in it reproducible
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "minatp", "font.sans-serif": ["DejaVu Sans"]}


def main(argv=None):
    parser = Parser(__doc__, "minatp.plot")
    parser.add_argument(
        "files",
        nargs="+",
        help="metrics.jsonl of runs, or their folders; results of minatp.evaluate --json",
    )
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

    # Read the runs. The curves of one run can be in several files
    paths = [Path(f) for f in args.files]
    paths = [path / "metrics.jsonl" if path.is_dir() else path for path in paths]
    by_folder = {}
    for path in paths:
        for folder, points in read(path).items():
            by_folder.setdefault(folder, {}).update(points)
    runs = dict(zip(names(by_folder), by_folder.values()))
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


def names(folders):
    """The name of each folder; its path if two folders have the same name."""
    short = [folder.name for folder in folders]
    return [str(folder) if short.count(name) > 1 else name for folder, name in zip(folders, short)]


# ---- curves --------------------------------------------------------------------------------------


def read(path):
    """The curves (see `curves`) in a file, by the folder of the run. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"{path}:0: cannot be read ({e}); give the metrics.jsonl of a run"
        ) from None
    records = read_records(path, text)
    if not records:
        raise UserError(f"{path}:1: is empty; the run has written nothing yet")

    # What else is in the records has not been checked
    try:
        groups = {}
        for record in records:
            key = (folder_of(record, path), record.get("file", ""))
            groups.setdefault(key, []).append(record)

        # Of several test files each has a curve of its own
        n_file = Counter(folder for folder, _ in groups)
        by_folder = {}
        for (folder, file), group in groups.items():
            if n_file[folder] > 1:
                folder = folder.with_name(f"{folder.name} on {file.replace('/', ':')}")
            by_folder[folder] = curves(group)
        return by_folder
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise UserError(
            f"{path}:0: has a record that no run wrote ({type(e).__name__}: {e}); is it the "
            "metrics.jsonl of a run?"
        ) from None


def folder_of(record, path):
    """The folder of the run that a record in the file `path` is of."""
    # A line of minatp.evaluate names the run, or its final/, which holds the model
    if "latent_steps" in record:
        folder = Path(record["run"]).absolute()
        return folder.parent if folder.name == "final" else folder
    return path.absolute().parent


def read_records(path, text):
    """The records in a file's text: lines of a metrics.jsonl or of minatp.evaluate.

    Raises UserError.
    """
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
        if not isinstance(record, dict) or not record.keys() & {"step", "latent_steps"}:
            raise UserError(
                f'{path}:{i}: has no "step" and no "latent_steps"; give the metrics.jsonl of a '
                "run, or what minatp.evaluate --latent-steps --json prints"
            )
        records.append(record)
    return records


def curves(records):
    """Records -> {panel: [(x, value, low, high)]}; low and high are None without an interval."""
    points = {}

    def add(panel, x, value, low=None, high=None):
        points.setdefault(panel, []).append((x, value, low, high))

    for record in records:
        # A result of minatp.evaluate. "free" is a level in that panel, and has none of its own
        if "latent_steps" in record:
            add("free", 0, record["accuracy"])
            for row in record["latent_steps"]:
                low, high = row["accuracy_ci95"]
                add("accuracy.latent_steps", row["steps"], row["accuracy"], low, high)
            continue

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
            if key == "accuracy.latent_steps" and "free" in points:
                _, level, *_ = points["free"][-1]
                axis.axhline(level, color=f"C{i}", linewidth=1, linestyle="--")
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

    # The axis counts in whole numbers
    axis.set_xlabel(X_LABELS.get(key, "step"), fontsize=7.5, loc="right", labelpad=1)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.tick_params(labelsize=7.5)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
