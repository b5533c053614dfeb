"""What pulls at the weights while GCPO trains: gold rows, the wrong rollouts beside them, and
groups that have contrast of their own.

    python docs/gradients.py [--seeds 4]

Two runs of GCPO for each seed, in the regimes of docs/experiments.py: `square`, and `scarce` with
190 golds more (with fewer it hardly uses gold). Every 25 steps 96 problems are sampled anew, and
the gradient of GCPO's loss on them is taken apart:

    gold      the gold rows, nothing else in the groups they are in
    rivals    the wrong rollouts beside them
    mixed     groups without gold, in which some rollouts are right
    all       the sum of the three: GCPO's whole gradient at ratio 1, before any clipping

Each has a norm, and a cosine with the gradient of SFT on the gold of held-out hard problems, and of
easy ones: positive where to descend it makes that gold likelier (to first order, and before AdamW
scales it). One line a point is kept in docs/runs/gradients.jsonl; a run that is there is not made
again. docs/gradients.png shows them.
"""
from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
from dataclasses import replace

import torch

import experiments    # it puts the repository's root on sys.path
from experiments import ROOT
from data import Limits, prepare, read_problems
from gcpo import ALGORITHMS, gold_group
from support.checkpoint import State
from support.options import learning_rate, parse_flags
from train import Item, Run, backward, collect, learn, load_run, sample_and_grade


EVERY = 25         # steps
PROBLEMS = 96
PARTS = ("gold", "rivals", "mixed", "all")
SCARCE = 190       # golds added to `scarce`
RATES = {"square": "1e-3", "scarce": "6e-4"}
KEPT = os.path.join(ROOT, "docs", "runs", "gradients.jsonl")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--work", default=os.path.join(ROOT, "runs", "experiments"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = experiments.read(KEPT) if os.path.exists(KEPT) else []
    there = {(line["regime"], line["seed"]) for line in lines}
    for seed in range(args.seeds):
        for regime in RATES:
            if (regime, seed) not in there:
                lines += one_run(regime, seed, os.path.join(args.work, "seeds"))
                experiments.write(KEPT, lines)
    draw(lines, os.path.join(ROOT, "docs", "gradients.png"))


def one_run(regime: str, seed: int, folder: str) -> list[dict]:
    """GCPO from the regime's start model, taken apart every so many steps."""
    experiments.seed_files(folder, seed)
    flags_of = experiments.start_from(folder, "base", "near-300.jsonl")
    if regime == "scarce":
        experiments.scarce_files(folder, seed, SCARCE)
        flags_of = experiments.start_from(
            folder, os.path.join("start", "model"), f"problems-{SCARCE}.jsonl")
    config, algorithm, _ = parse_flags([
        *shlex.split(experiments.REGIME), "--algo", "gcpo", *flags_of(seed),
        "--lr", RATES[regime], "--seed", str(seed)])
    run = load_run(config, algorithm, torch.device("cpu"))
    limits = Limits(config.max_new_tokens, run.master.config.max_position_embeddings)
    held_out = {kind: prepare(read_problems(path), run.tokenizer, limits)
                for kind, path in experiments.held_out_of(folder, seed).items()}
    lines, state = [], State()
    for step in range(config.steps + 1):
        if step % EVERY == 0:
            parts = take_apart(run, step, held_out)
            lines.append({"regime": regime, "seed": seed, "step": step, **parts})
            print(lines[-1], file=sys.stderr, flush=True)
        if step < config.steps:
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            _, items = collect(run, step, state)
            learn(run, items)
    return lines


def take_apart(run: Run, step: int, held_out: dict) -> dict:
    """Norms and cosines of the parts; the shares of groups that got gold, and that are mixed."""
    # The first 96 problems in another order than the run's, and other random numbers
    order = torch.randperm(len(run.problems), generator=torch.Generator().manual_seed(step))
    numbers = order[:PROBLEMS].tolist()
    other = replace(run, config=replace(run.config, seed=run.config.seed + 10_000))
    _, items = sample_and_grade(other, step, numbers, 0, State())

    of_part = {
        "gold": lambda item: item.group.is_gold,
        "rivals": lambda item: ~item.group.is_gold & item.group.is_gold.any(),
        "mixed": lambda item: ~item.group.is_gold.any(),
        "all": lambda item: torch.tensor(True)}
    gradients = {}
    for part, rows_of in of_part.items():
        masked = [replace(i, advantages=torch.where(rows_of(i), i.advantages, 0.0)) for i in items]
        gradients[part] = gradient(run, masked)
    toward = {kind: gradient(replace(run, algorithm=ALGORITHMS["sft"]), gold_items(problems))
              for kind, problems in held_out.items()}

    found = {
        "gold_groups": sum(bool(i.group.is_gold.any()) for i in items) / len(items),
        "mixed_groups": sum(i.has_contrast and not i.group.is_gold.any() for i in items)
        / len(items)}
    for part, g in gradients.items():
        found[f"{part}_norm"] = float(g.norm())
        for kind, direction in toward.items():
            found[f"{part}_cos_{kind}"] = cosine(g, direction)
    found["gold_cos_rivals"] = cosine(gradients["gold"], gradients["rivals"])
    found["without_rivals_cos_hard"] = cosine(
        gradients["all"] - gradients["rivals"], toward["hard"])
    return found


def gold_items(problems) -> list[Item]:
    return [Item(i, p, gold_group(p.prompt, p.gold_ids), torch.ones(1))
            for i, p in enumerate(problems)]


def gradient(run: Run, items: list[Item]) -> torch.Tensor:
    """The gradient of the loss over all these items, as one vector."""
    rows = sum(len(i.group.lengths) for i in items)
    tokens = sum(int(i.group.lengths.sum()) for i in items)
    live = [i for i in items if i.has_contrast]
    for first in range(0, len(live), 16):
        backward(run, live[first:first + 16], rows, tokens)
    vector = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                        for p in run.master.parameters()])
    run.optimizer.zero_grad(set_to_none=True)
    return vector


def cosine(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """None where one of them is 0."""
    if not a.any() or not b.any():
        return None
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


# ---- The figure ----------------------------------------------------------------------------------

def draw(lines: list[dict], path: str) -> None:
    """A row for each regime: norms, cosines with held-out hard gold, and shares of groups."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(RATES), 3, figsize=(12, 3.2 * len(RATES)), squeeze=False)
    for row, regime in zip(axes, RATES):
        of_regime = [line for line in lines if line["regime"] == regime]
        for part in PARTS:
            curve(row[0], of_regime, f"{part}_norm", part)
            curve(row[1], of_regime, f"{part}_cos_hard", part)
        curve(row[1], of_regime, "without_rivals_cos_hard", "all but rivals", "--")
        row[1].legend(fontsize=8, ncol=3, loc="upper center")
        for key, label in (("gold_groups", "given gold"), ("mixed_groups", "mixed")):
            curve(row[2], of_regime, key, label)
        row[0].set_yscale("log")
        row[0].set_ylim(0.004, 4)
        row[0].set_title(f"{regime}: gradient norm")
        row[0].legend(fontsize=8, ncol=4, loc="upper center")
        row[1].set_title("cosine with SFT on held-out hard gold")
        row[1].axhline(0, color="0.7", lw=0.8)
        row[1].set_ylim(-0.5, 1.2)
        row[2].set_title("share of groups")
        row[2].set_ylim(0, 1)
        row[2].legend(fontsize=8)
        for axis in row:
            axis.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def curve(axis, lines: list[dict], key: str, label: str, style: str = "-") -> None:
    """The mean over seeds, and where they lie."""
    steps = sorted({line["step"] for line in lines})
    values = [[line[key] for line in lines if line["step"] == step and line[key] is not None]
              for step in steps]
    steps = [step for step, v in zip(steps, values) if v]
    values = [v for v in values if v]
    [drawn] = axis.plot(steps, [statistics.mean(v) for v in values], style, label=label)
    axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values],
                      color=drawn.get_color(), alpha=0.15, lw=0)


if __name__ == "__main__":
    main()
