"""Draw the curves of one or several runs: python plot.py runs/toy-gcpo runs/toy-grpo --out curves.png

Needs matplotlib (pip install matplotlib); nothing else in the project does. Reads only metrics.jsonl.
"""
import argparse
import json
import os
import sys

PANELS = [  # title, metric, whether it is a share
    ("held-out accuracy", "eval/mean", True), ("share of rollouts correct", "reward/correct", True), ("share of groups given gold", "gold/share", True),
    ("gold's logprob per token", "gold/logprob", False), ("response length, tokens", "length/mean", False), ("entropy, nats per token", "policy/entropy", False),
    ("gradient norm", "update/grad_norm", False), ("clipped tokens", "policy/clip_fraction", True), ("updates skipped: no contrast", "update/skipped", True)]
COLOURS = ("#0060b0", "#d55e00", "#009e73", "#cc79a7", "#7a5195", "#8c6d1f", "#404040")


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_run(folder):
    """(label, metrics by step) of a run's folder."""
    path = os.path.join(folder, "metrics.jsonl")
    try:
        with open(path, encoding="utf-8") as f:
            rows = [json.loads(line) for line in f if line.endswith("\n")]  # the last line may still be in the writing
    except (OSError, ValueError) as e:
        fail(f"{folder}: not the folder of a run ({getattr(e, 'strerror', None) or e})")
    return os.path.basename(os.path.abspath(folder)), rows


def smooth(values, width):
    """Centred moving mean over `width` steps, shorter at both ends."""
    half = width // 2
    return [sum(values[max(0, i - half):i + half + 1]) / len(values[max(0, i - half):i + half + 1]) for i in range(len(values))]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--out", default="curves.png", help="picture to write: .png or .svg")
    parser.add_argument("--panels", type=int, default=len(PANELS), help="only the first so many panels")
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

    runs, panels = [read_run(folder) for folder in args.runs], PANELS[:args.panels]
    columns = min(3, len(panels))
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "gcpo"})
    figure, axes = plt.subplots(-(-len(panels) // columns), columns, squeeze=False, constrained_layout=True,
                                figsize=(4.2 * columns, 2.9 * -(-len(panels) // columns)))
    for ax, (title, metric, is_share) in zip(axes.flat, panels):
        for i, (label, rows) in enumerate(runs):
            points = [(r["step"], r[metric], r.get(metric + "_se") or 0) for r in rows if r.get(metric) is not None]
            if not points:
                continue
            x, y, error = map(list, zip(*points))
            colour, evaluated = COLOURS[i % len(COLOURS)], metric.startswith("eval/")
            if not evaluated:
                y = smooth(y, args.smooth)
            else:
                ax.fill_between(x, [a - b for a, b in zip(y, error)], [a + b for a, b in zip(y, error)], color=colour, alpha=0.2, linewidth=0)
            ax.plot(x, y, color=colour, label=label, linewidth=1.8, marker="o" if evaluated else None, markersize=3)
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_xlabel("step")
        if is_share:
            ax.set_ylim(-0.03, 1.03)
            ax.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
        if not ax.lines:
            ax.text(0.5, 0.5, "not measured in these runs", ha="center", va="center", transform=ax.transAxes, color="grey")
    for ax in axes.flat[len(panels):]:
        ax.set_visible(False)
    handles = {line.get_label(): line for ax in axes.flat for line in ax.lines}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(6, len(handles)), frameon=False)
    figure.savefig(args.out, dpi=130)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
