"""Draw the curves of one or several runs.

    python plot.py runs/toy-gcpo runs/toy-grpo --out curves.png

With --seeds, runs whose names differ only in `-seedN` become one curve: their mean, in a band of
one standard deviation. Reads only metrics.jsonl. Needs matplotlib (pip install matplotlib), which
nothing else in the project does.
"""
import argparse
import json
import os
import re
import statistics
import sys
from collections import Counter
from typing import NamedTuple


class Panel(NamedTuple):
    title: str
    metric: str
    is_share: bool


PANELS = [
    Panel("held-out accuracy", "eval/mean", True),
    Panel("share of rollouts correct", "reward/correct", True),
    Panel("share of groups given gold", "gold/share", True),
    Panel("gold's logprob per token", "gold/logprob", False),
    Panel("response length, tokens", "length/mean", False),
    Panel("entropy, nats per token", "policy/entropy", False),
    Panel("gradient norm", "update/grad_norm", False),
    Panel("clipped tokens", "policy/clip_fraction", True),
    Panel("clipped tokens of gold", "gold/clip_fraction", True),
]
STYLES = ("-", "--", ":")
COLOURS = ("#0060b0", "#d55e00", "#009e73", "#cc79a7", "#7a5195", "#8c6d1f", "#404040")


def main():
    args = parse_arguments()
    plt = load_pyplot()
    runs = read_runs(args.runs, args.seeds)
    panels = PANELS[:args.panels]
    figure, axes = lay_out(plt, len(panels))
    for ax, panel in zip(axes, panels):
        draw_panel(ax, panel, runs, args)
    for ax in axes[len(panels):]:
        ax.set_visible(False)
    add_legend(figure, axes, len(panels))
    try:
        figure.savefig(args.out, dpi=130)
    except OSError as e:
        fail(f"--out {args.out}: cannot be written ({e.strerror})")
    print(f"wrote {ascii(args.out)[1:-1]}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("runs", nargs="+", help="folders of runs")
    flag("--out", default="curves.png", help="picture to write: .png or .svg")
    flag("--panels", type=int, default=len(PANELS), help="only the first so many panels")
    flag("--x", choices=("step", "seconds"), default="step",
         help="seconds: of sampling and updates")
    flag("--seeds", action="store_true", help="one curve for runs NAME-seed0, NAME-seed1, …")
    flag("--smooth", type=int, default=9,
         help="steps in the moving mean of what is measured at every step")
    args = parser.parse_args()
    folder = os.path.dirname(args.out) or "."
    if not args.out.endswith((".png", ".svg")) or not os.path.isdir(folder):
        fail(f"--out {args.out}: must end in .png or .svg, in a folder that exists")
    if args.smooth < 1 or args.panels < 1:
        fail("--smooth and --panels must be 1 or more")
    return args


def fail(message: str):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def load_pyplot():
    """matplotlib.pyplot, drawing to files only."""
    try:
        import matplotlib
    except ImportError:
        fail("plot.py needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


# ---- Reading -------------------------------------------------------------------------------------

def read_runs(folders: list[str], merge_seeds: bool) -> dict[str, list[list[dict]]]:
    """The logs under each label: several with --seeds, else one."""
    label_of = without_seed if merge_seeds else str
    names = [os.path.basename(os.path.abspath(folder)) for folder in folders]
    twice = {label_of(name) for name, count in Counter(names).items() if count > 1}
    runs = {}
    for folder, name in zip(folders, names):
        label = label_of(name)
        if label in twice:    # runs of different folders
            label = label_of(os.path.relpath(folder))
        runs.setdefault(label, []).append(read_run(folder))
    return runs


def without_seed(name: str) -> str:
    return re.sub(r"-seed\d+$", "", name)


def read_run(folder: str) -> list[dict]:
    """The lines of a run's metrics."""
    path = os.path.join(folder, "metrics.jsonl")
    rows = []
    try:
        with open(path, encoding="utf-8") as f:
            for line in f:
                if not line.endswith("\n"):    # half written: the run still goes on
                    break
                row = json.loads(line)
                if not is_row(row):
                    raise ValueError("no metrics of a step")
                rows.append(row)
    except OSError as e:
        fail(f"{folder}: not the folder of a run ({e.strerror})")
    except (ValueError, RecursionError) as e:
        fail(f"{path}, line {len(rows) + 1}: {e}; it is of no run, or was altered")
    return rows


def is_row(row) -> bool:
    """Whether it is a line as runs write them: numbers by name, one of them the step."""
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return False
    return all(value is None or isinstance(value, (int, float)) and abs(value) < 1e300
               for value in row.values())


# ---- From logs to curves -------------------------------------------------------------------------

class Line(NamedTuple):
    """What is drawn: a curve and the height of its band, up and down."""
    x: list[float]
    y: list[float]
    error: list[float]


def line_of(logs: list[list[dict]], metric: str, args) -> Line | None:
    """The curve of the runs under one label. None: nothing to draw."""
    curves = []
    times = []
    for rows in logs:
        points = curve(rows, metric, args.smooth)
        if points:
            curves.append(points)
            times.append(elapsed(rows))
    if not curves:
        return None
    points = over_seeds(curves) if len(curves) > 1 else curves[0]
    if not points:
        return None
    x = list(points)
    if args.x == "seconds":
        x = [statistics.mean(seconds[step] for seconds in times) for step in points]
    y = [value for value, _ in points.values()]
    error = [error for _, error in points.values()]
    return Line(x, y, error)


def curve(rows: list[dict], metric: str, width: int) -> dict[int, tuple[float, float]]:
    """{step: (value, error)}. An evaluation comes with its standard error; what is measured at
    every step is a moving mean over `width` steps, without error."""
    rows = [r for r in rows if r.get(metric) is not None]
    if metric.startswith("eval/"):
        return {r["step"]: (r[metric], r.get(metric + "_se") or 0) for r in rows}
    if not rows:
        return {}
    steps = [r["step"] for r in rows]
    # In a thinned log the lines are several steps apart.
    spacing = max(1, round((steps[-1] - steps[0]) / max(1, len(steps) - 1)))
    values = smooth([r[metric] for r in rows], max(1, width // spacing))
    return {step: (value, 0) for step, value in zip(steps, values)}


def smooth(values: list[float], width: int) -> list[float]:
    """Centred moving mean over `width` values (one more if it is even), over fewer at both ends."""
    half = width // 2
    means = []
    for i in range(len(values)):
        window = values[max(0, i - half):i + half + 1]
        means.append(sum(window) / len(window))
    return means


def over_seeds(curves: list[dict]) -> dict[int, tuple[float, float]]:
    """Mean and standard deviation at the steps that all curves have."""
    merged = {}
    for step in sorted(set.intersection(*map(set, curves))):
        values = [points[step][0] for points in curves]
        merged[step] = (statistics.mean(values), statistics.stdev(values))
    return merged


def elapsed(rows: list[dict]) -> dict[int, float]:
    """Seconds of sampling and updates up to each step, without evaluations."""
    total = 0.0
    seconds = {}
    for r in rows:
        total += (r.get("time/sample") or 0) + (r.get("time/update") or 0)
        seconds[r["step"]] = r.get("time/elapsed", total)
    return seconds


# ---- Drawing -------------------------------------------------------------------------------------

def columns_for(panels: int) -> int:
    return min(3, panels)


def lay_out(plt, panels: int):
    """A figure, and its axes row by row: as many as there are panels, or a few more."""
    columns = columns_for(panels)
    rows = -(-panels // columns)
    width = 4.2 * columns
    if columns == 1:
        width += 2
    plt.rcParams.update({
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.hashsalt": "gcpo",    # the same picture is the same file
    })
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, 2.9 * rows), squeeze=False, constrained_layout=True)
    return figure, list(axes.flat)


def draw_panel(ax, panel: Panel, runs: dict, args) -> None:
    """One metric of all runs."""
    for i, (label, logs) in enumerate(runs.items()):
        line = line_of(logs, panel.metric, args)
        if line:
            draw_line(ax, line, i, label, with_dots=panel.metric.startswith("eval/"))
    ax.set_title(panel.title, fontsize=10, loc="left")
    ax.set_xlabel(args.x)
    if panel.is_share:
        show_as_percent(ax)
    if not ax.lines:
        ax.text(0.5, 0.5, "not measured in these runs", ha="center", va="center",
                transform=ax.transAxes, color="grey")


def draw_line(ax, line: Line, number: int, label: str, with_dots: bool) -> None:
    """The number-th label has the same colour and style in every panel."""
    colour = COLOURS[number % len(COLOURS)]
    style = STYLES[number // len(COLOURS) % len(STYLES)]
    if any(line.error):
        below = [y - error for y, error in zip(line.y, line.error)]
        above = [y + error for y, error in zip(line.y, line.error)]
        ax.fill_between(line.x, below, above, color=colour, alpha=0.15, linewidth=0)
    marker = "o" if with_dots else None
    label = label.replace("$", r"\$")    # no formula
    ax.plot(line.x, line.y, style, color=colour, label=label, linewidth=1.8, marker=marker,
            markersize=3)


def show_as_percent(ax) -> None:
    from matplotlib.ticker import PercentFormatter
    ax.set_ylim(-0.03, 1.03)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def add_legend(figure, axes: list, panels: int) -> None:
    """One legend above all panels; a label that is in several of them stands there once."""
    handles = {line.get_label(): line for ax in axes for line in ax.lines}
    columns = min(2 + 2 * columns_for(panels), len(handles))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns,
                  frameon=False)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
