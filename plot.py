"""Draw the curves of one or several runs: python plot.py runs/toy-gcpo runs/toy-grpo --out curves.png

With --seeds, runs whose names differ only in `-seedN` become one curve: their mean, in a band of one standard deviation.
Needs matplotlib (pip install matplotlib); nothing else in the project does. Reads only metrics.jsonl.
"""
import argparse
import json
import os
import re
import statistics
import sys


PANELS = [  # title, metric, whether it is a share
    ("held-out accuracy", "eval/mean", True), ("share of rollouts correct", "reward/correct", True), ("share of groups given gold", "gold/share", True),
    ("gold's logprob per token", "gold/logprob", False), ("response length, tokens", "length/mean", False), ("entropy, nats per token", "policy/entropy", False),
    ("gradient norm", "update/grad_norm", False), ("clipped tokens", "policy/clip_fraction", True), ("clipped tokens of gold", "gold/clip_fraction", True)]
STYLES = ("-", "--", ":")
COLOURS = ("#0060b0", "#d55e00", "#009e73", "#cc79a7", "#7a5195", "#8c6d1f", "#404040")


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_run(folder):
    """The lines of a run's metrics."""
    path = os.path.join(folder, "metrics.jsonl")
    try:
        with open(path, encoding="utf-8") as f:
            return [json.loads(line) for line in f if line.endswith("\n")]  # the last line may still be in the writing
    except (OSError, ValueError) as e:
        fail(f"{folder}: not the folder of a run ({getattr(e, 'strerror', None) or e})")


def elapsed(rows):
    """Seconds of sampling and updates up to each step, evaluations left out."""
    total, seconds = 0.0, {}
    for r in rows:
        total += (r.get("time/sample") or 0) + (r.get("time/update") or 0)
        seconds[r["step"]] = r.get("time/elapsed", total)
    return seconds


def curve(rows, metric, width):
    """{step: (value, error)}: what is measured at every step as a moving mean, evaluations with their standard error."""
    points = [(r["step"], r[metric], r.get(metric + "_se") or 0) for r in rows if r.get(metric) is not None]
    if not points or metric.startswith("eval/"):
        return {x: (y, error) for x, y, error in points}
    x, y, _ = zip(*points)
    spacing = max(1, round((x[-1] - x[0]) / max(1, len(x) - 1)))    # steps from line to line, in thinned logs more than one
    return dict(zip(x, ((v, 0) for v in smooth(y, max(1, width // spacing)))))


def over_seeds(curves):
    """Mean and standard deviation at the steps that all have."""
    steps = sorted(set.intersection(*map(set, curves)))
    values = {step: [c[step][0] for c in curves] for step in steps}
    return {step: (statistics.mean(v), statistics.stdev(v)) for step, v in values.items()}


def smooth(values, width):
    """Centred moving mean over `width` steps, shorter at both ends."""
    half = width // 2
    return [sum(values[max(0, i - half):i + half + 1]) / len(values[max(0, i - half):i + half + 1]) for i in range(len(values))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--out", default="curves.png", help="picture to write: .png or .svg")
    parser.add_argument("--panels", type=int, default=len(PANELS), help="only the first so many panels")
    parser.add_argument("--x", choices=("step", "seconds"), default="step", help="seconds: of sampling and updates")
    parser.add_argument("--seeds", action="store_true", help="one curve for runs NAME-seed0, NAME-seed1, …")
    parser.add_argument("--smooth", type=int, default=9, help="steps in the moving mean of what is measured at every step")
    args = parser.parse_args()
    if not args.out.endswith((".png", ".svg")) or not os.path.isdir(os.path.dirname(args.out) or "."):
        fail(f"--out {args.out}: must end in .png or .svg, in a folder that exists")
    if args.smooth < 1 or args.panels < 1:
        fail("--smooth and --panels must be 1 or more")
    try:
        import matplotlib
    except ImportError:
        fail("plot.py needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs, panels = {}, PANELS[:args.panels]
    names = [os.path.basename(os.path.abspath(folder)) for folder in args.runs]
    for folder, name in zip(args.runs, names):
        label = re.sub(r"-seed\d+$", "", name) if args.seeds else name if names.count(name) == 1 else os.path.relpath(folder)
        runs.setdefault(label, []).append(read_run(folder))
    columns = min(3, len(panels))
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "gcpo"})
    figure, axes = plt.subplots(-(-len(panels) // columns), columns, squeeze=False, constrained_layout=True,
                                figsize=(4.2 * columns + 2 * (columns == 1), 2.9 * -(-len(panels) // columns)))
    for ax, (title, metric, is_share) in zip(axes.flat, panels):
        for i, (label, of_seeds) in enumerate(runs.items()):
            measured = [(c, elapsed(rows)) for rows in of_seeds if (c := curve(rows, metric, args.smooth))]
            if not measured:
                continue
            curves, times = zip(*measured)
            points = over_seeds(curves) if len(curves) > 1 else curves[0]
            if not points:
                continue
            if args.x == "seconds":
                x = [statistics.mean(t[step] for t in times) for step in points]
            else:
                x = list(points)
            y, error = zip(*points.values())
            colour, style = COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)]
            if any(error):
                ax.fill_between(x, [a - b for a, b in zip(y, error)], [a + b for a, b in zip(y, error)], color=colour, alpha=0.15, linewidth=0)
            ax.plot(x, y, style, color=colour, label=label, linewidth=1.8, marker="o" if metric.startswith("eval/") else None, markersize=3)
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_xlabel(args.x)
        if is_share:
            ax.set_ylim(-0.03, 1.03)
            ax.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
        if not ax.lines:
            ax.text(0.5, 0.5, "not measured in these runs", ha="center", va="center", transform=ax.transAxes, color="grey")
    for ax in axes.flat[len(panels):]:
        ax.set_visible(False)
    handles = {line.get_label(): line for ax in axes.flat for line in ax.lines}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(2 + 2 * columns, len(handles)), frameon=False)
    figure.savefig(args.out, dpi=130)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
