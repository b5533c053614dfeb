"""Figures of docs/results.md, from docs/runs/square.jsonl, scarce.jsonl and shares.jsonl.

    python docs/draw.py    writes docs/square.png, docs/scarce.png and docs/shares.png

A point is a seed; a bar the mean and its 95 % interval (Student's t).
"""
from __future__ import annotations

import os
import statistics

import matplotlib

from experiments import GOLDS, HALF, ROOT, SHARES, interval, read


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def main():
    for name in ("square", "scarce"):
        path = os.path.join(ROOT, "docs", "runs", f"{name}.jsonl")
        if os.path.exists(path):
            draw_arms(read(path), os.path.join(ROOT, "docs", f"{name}.png"))
    scarce, shares = (os.path.join(ROOT, "docs", "runs", f"{name}.jsonl")
                      for name in ("scarce", "shares"))
    if os.path.exists(scarce) and os.path.exists(shares):
        draw_shares(read(scarce), read(shares), os.path.join(ROOT, "docs", "shares.png"))


def draw_arms(lines: list[dict], path: str) -> None:
    """Held-out accuracy of each arm at each rate: a panel for easy locks, and one for hard ones."""
    arms = list(dict.fromkeys(line["arm"] for line in lines))
    of_start = [line["lr"] for line in lines if line["lr"] == "–"][:1]
    rates = sorted({line["lr"] for line in lines} - {"–"}, key=float) + of_start
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.36 * len(arms) + 1.4), sharey=True)
    for axis, kind in zip(axes, ("easy", "hard")):
        for k, rate in enumerate(rates):
            for row, arm in enumerate(arms):
                values = [100 * line[kind] for line in lines
                          if (line["arm"], line["lr"]) == (arm, rate)]
                if not values:
                    continue
                y = row + 0.22 * (k - (len(rates) - 1) / 2)
                colour = f"C{k}"
                mean, half = interval(values)
                axis.plot(values, [y] * len(values), ".", ms=3, color=colour, alpha=0.5)
                axis.errorbar(mean, y, xerr=half, fmt="o", ms=4, color=colour, capsize=2,
                              label=f"learning rate {rate}")
        axis.set_title(f"{kind} locks, held out: right, %")
        axis.set_xlim(-3, 103)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].invert_yaxis()
    handles = dict(zip(*reversed(axes[1].get_legend_handles_labels())))
    axes[1].legend(handles.values(), handles.keys(), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_shares(scarce: list[dict], shares: list[dict], path: str) -> None:
    """Held-out accuracy against the share of `scarce`'s other 625 problems that have gold."""
    of_share = {0: [line for line in scarce if line["lr"] == "6e-4"]}
    for more in SHARES:
        of_share[more] = [line for line in shares if line["golds"] == str(more)]
    arms = list(dict.fromkeys(line["arm"] for line in shares))
    unknown = 2 * HALF - GOLDS
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, kind in zip(axes, ("easy", "hard")):
        for k, arm in enumerate(arms):
            points = {}
            for place, lines in enumerate(of_share.values()):
                values = [100 * line[kind] for line in lines if line["arm"] == arm]
                if values:
                    points[place + 0.06 * (k - len(arms) / 2)] = interval(values)
            means, halves = zip(*points.values())
            axis.errorbar(list(points), means, yerr=halves, marker="o", ms=4, capsize=2, label=arm)
        gspo = [100 * line[kind] for line in of_share[0] if line["arm"] == "GSPO"]
        if gspo:
            axis.axhline(statistics.mean(gspo), color="0.4", ls="--", lw=1, label="GSPO, no gold")
        axis.set_xticks(range(len(of_share)), [f"{more / unknown:.0%}" for more in of_share])
        axis.set_xlabel("share of the other problems that have gold")
        axis.set_title(f"{kind} locks, held out: right, %")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
