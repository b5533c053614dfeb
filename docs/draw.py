"""Figures of docs/results.md, from docs/runs/square.jsonl, scarce.jsonl and shares.jsonl.

    python docs/draw.py    writes docs/square.png, docs/scarce.png and docs/shares.png

A bar is the mean over seeds and its 95 % interval (Student's t); a small point is a seed.
"""
from __future__ import annotations

import os
import statistics

import matplotlib

from experiments import GOLDS, HALF, ROOT, SHARES, START, interval, read


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def main():
    lines = {name: read(os.path.join(ROOT, "docs", "runs", f"{name}.jsonl"))
             for name in ("square", "scarce", "shares")}
    draw_arms(lines["square"], os.path.join(ROOT, "docs", "square.png"))
    draw_arms(lines["scarce"], os.path.join(ROOT, "docs", "scarce.png"), beside=START)
    draw_shares(lines["scarce"], lines["shares"], os.path.join(ROOT, "docs", "shares.png"))


def draw_arms(lines: list[dict], path: str, beside: str | None = None) -> None:
    """Held-out accuracy of each arm at each rate: a panel for easy locks, and one for hard ones.
    beside: an arm without a rate (–); what is shown is then what the others gained on it."""
    arms = [arm for arm in dict.fromkeys(line["arm"] for line in lines) if arm != beside]
    rates = sorted({line["lr"] for line in lines} - {"–"}, key=float)
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.36 * len(arms) + 1.4), sharey=True)
    for axis, kind in zip(axes, ("easy", "hard")):
        for k, rate in enumerate(rates):
            of_rate = [line for line in lines if line["lr"] in (rate, "–")]
            for row, arm in enumerate(arms):
                if beside:
                    values = paired(of_rate, arm, beside, kind)
                else:
                    values = list(of_arm(of_rate, arm, kind).values())
                if not values:
                    continue
                y = row + 0.22 * (k - (len(rates) - 1) / 2)
                colour = f"C{k}"
                mean, half = interval(values)
                axis.plot(values, [y] * len(values), ".", ms=3, color=colour, alpha=0.5)
                axis.errorbar(mean, y, xerr=half, fmt="o", ms=4, color=colour, capsize=2,
                              label=f"learning rate {rate}")
        axis.set_title(f"{kind} locks, held out: right, %")
        if beside:
            axis.set_title(f"{kind} locks: gained on {beside}, points")
            axis.axvline(0, color="0.4", lw=1)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].invert_yaxis()
    handles = dict(zip(*reversed(axes[1].get_legend_handles_labels())))
    axes[1].legend(handles.values(), handles.keys(), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def draw_shares(scarce: list[dict], shares: list[dict], path: str) -> None:
    """What more gold changes: `scarce`'s other 625 problems without gold, then more and more of
    them with it. Hard locks; and each arm beside GCPO on hard locks and on easy ones, paired by
    seed."""
    of_share = {0: [line for line in scarce if line["lr"] == "6e-4"]}
    gspo = [line for line in of_share[0] if line["arm"] == "GSPO"]    # it uses no gold anyway
    for more in SHARES:
        of_share[more] = gspo + [line for line in shares if line["golds"] == str(more)]
    arms = dict.fromkeys(["GCPO", *(line["arm"] for line in shares), "GSPO"])
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4))
    for k, arm in enumerate(arms):
        style = dict(color=f"C{k}", marker="o", ms=4, ls="--" if arm == "GSPO" else "-")
        levels = [of_arm(lines, arm, "hard").values() for lines in of_share.values()]
        axes[0].plot([statistics.mean(values) for values in levels], label=arm, **style)
        if arm == "GCPO":
            continue
        for axis, kind in zip(axes[1:], ("hard", "easy")):
            differences = [paired(lines, arm, "GCPO", kind) for lines in of_share.values()]
            means, halves = zip(*map(interval, differences))
            places = [place + 0.07 * (k - len(arms) / 2) for place in range(len(of_share))]
            axis.errorbar(places, means, yerr=halves, capsize=2, **style)
    unknown = 2 * HALF - GOLDS
    for axis, title in zip(axes, ("hard locks, held out: right, %", "hard: beside GCPO, points",
                                  "easy: beside GCPO, points")):
        axis.set_title(title)
        axis.set_xticks(range(len(of_share)), [f"{more / unknown:.0%}" for more in of_share])
        axis.set_xlabel("share of the other problems that have gold")
        axis.grid(axis="y", alpha=0.3)
    for axis in axes[1:]:
        axis.axhline(0, color="C0", lw=1)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def of_arm(lines: list[dict], arm: str, kind: str) -> dict[int, float]:
    """An arm's accuracy with each seed, in %."""
    return {line["seed"]: 100 * line[kind] for line in lines if line["arm"] == arm}


def paired(lines: list[dict], arm: str, other: str, kind: str) -> list[float]:
    """The difference with each seed that both have."""
    a, b = of_arm(lines, arm, kind), of_arm(lines, other, kind)
    return [a[seed] - b[seed] for seed in a if seed in b]


if __name__ == "__main__":
    main()
