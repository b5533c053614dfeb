"""The tables of what docs/run_real.sh has run.

    python docs/real_tables.py WORK [--against start]

One row per model, mean@k ± standard error on each set; then the same as differences from the arm
--against, paired by problem, all seeds of an arm together; then one row per training run.
docs/runs/ keeps, under WORK's name, what they are made of.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import statistics
import sys

from experiments import KEPT, ROOT, Log, interval, read, seconds, table, thin, write
from plot import read_run, without_seed


KEPT_OF_REAL = (
    "eval/gold_logprob", "eval/no_answer", "eval/truncated", "length/truncated",
    "update/bf16_changed")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", help="the folder in which run_real.sh left its runs")
    parser.add_argument("--against", default="start", help="what the others are compared with")
    args = parser.parse_args()
    name = os.path.basename(os.path.abspath(args.work))    # real, or contrast
    kept = os.path.join(ROOT, "docs", "runs", name)
    if not os.path.isdir(args.work) or os.path.realpath(args.work) == os.path.realpath(kept):
        sys.exit(f"error: {args.work} is no folder of runs (docs/runs holds what was kept of some)")
    os.makedirs(kept, exist_ok=True)
    table_of_evaluations(args.work, kept)
    print()
    table_of_pairs(args.work, kept, args.against)
    print()
    table_of_training(args.work, kept)


def table_of_evaluations(work: str, kept: str) -> None:
    """Of what evaluate.py printed, in files NAME--SET.txt."""
    found = {}
    for arm, name, path in results(work, ".txt"):
        shutil.copy(path, kept)
        with open(path) as f:
            found.setdefault(arm, {})[name] = evaluation_cell(f.read())
    columns = {"model": list(found)}
    for name in sorted({name for cells in found.values() for name in cells}):
        heading = f"{name}: mean ± s.e., pass@k, names an answer"
        columns[heading] = [cells.get(name, "") for cells in found.values()]
    table(columns)


def table_of_pairs(work: str, kept: str, against: str) -> None:
    """Of every completion, in files NAME--SET.jsonl: how much more often each arm is right than the
    arm `against`, in points, with the 95 % interval over the problems of the set. A problem counts
    once, with the mean of the arm's seeds."""
    against = without_seed(against)
    found, lines = {}, []
    for arm, name, path in results(work, ".jsonl"):
        right = right_of_each(read(path))
        lines.append({"model": arm, "set": name, "right": right})
        found.setdefault(name, {}).setdefault(without_seed(arm), []).append(right)
    if not lines:    # of runs before completions were kept
        return
    write(os.path.join(kept, "right.jsonl"), lines)
    arms = list(dict.fromkeys(without_seed(line["model"]) for line in lines))
    if against not in arms:
        sys.exit(f"error: --against {against}: none of {', '.join(arms)}")
    arms.remove(against)
    columns = {f"minus {against}, points": arms}
    for name, of_set in found.items():
        means = {arm: [statistics.mean(right) for right in zip(*seeds, strict=True)]
                 for arm, seeds in of_set.items()}
        columns[name] = [difference_cell(means.get(arm), means.get(against)) for arm in arms]
    table(columns)


def results(work: str, ending: str):
    """(model, set, path) of each evaluation's file, in files NAME--SET and this ending."""
    for file in sorted(os.listdir(work)):
        match = re.fullmatch(r"(.+)--(.+)" + re.escape(ending), file)
        if match:
            yield *match.groups(), os.path.join(work, file)


def right_of_each(completions: list[dict]) -> list[float]:
    """The share of right responses to each problem, in order."""
    responses = {}
    for r in completions:
        question = json.dumps(r["question"])    # it may be a list of messages
        responses.setdefault(question, []).append(r["correct"])
    return [statistics.mean(right) for right in responses.values()]


def difference_cell(ours: list[float] | None, theirs: list[float] | None) -> str:
    if ours is None or theirs is None:
        return ""
    mean, half = interval([100 * (x - y) for x, y in zip(ours, theirs, strict=True)])
    return f"{mean:+.1f} ± {half:.1f}"


def evaluation_cell(text: str) -> str:
    mean = number_after(r"mean@\d+ +", text)
    error = number_after("± ", text)    # there is none with a single problem
    pass_at_k = max(map(float, re.findall(r"pass@\d+ +([\d.]+)", text)))
    names_answer = 1 - number_after("no answer ", text)
    return f"{mean:.1%} ± {error:.1%}, {pass_at_k:.1%}, {names_answer:.0%}"


def number_after(pattern: str, text: str) -> float:
    match = re.search(pattern + r"([\d.]+)", text)
    return float(match[1]) if match else math.nan


def table_of_training(work: str, kept: str) -> None:
    logs = {}
    for arm in sorted(os.listdir(work)):
        folder = os.path.join(work, arm)
        if os.path.isfile(os.path.join(folder, "metrics.jsonl")):
            log = read_run(folder)
            if log:
                logs[arm] = log
                thin(log, os.path.join(kept, arm), KEPT + KEPT_OF_REAL)
    first = [first_third(log) for log in logs.values()]
    final = [last_third(log) for log in logs.values()]
    ends = [log[-1:] for log in logs.values()]
    table({
        "arm": list(logs),
        "steps": [str(log[-1]["step"]) for log in logs.values()],
        "minutes": [f"{seconds(log) / 60:.0f}" for log in logs.values()],
        "groups all wrong, first third": [mean_share(part, "groups/all_wrong") for part in first],
        "last third": [mean_share(part, "groups/all_wrong") for part in final],
        "given gold, last third": [mean_share(part, "gold/share") for part in final],
        "held-out gold, log p per token": [gold_logprobs(log) for log in logs.values()],
        "weights changed in bf16": [mean_share(end, "update/bf16_changed") for end in ends],
    })


def first_third(log: Log) -> Log:
    """Of the steps that sampled."""
    sampled = [r for r in log if "groups/all_wrong" in r]
    return sampled[:max(1, len(sampled) // 3)]


def last_third(log: Log) -> Log:
    sampled = [r for r in log if "groups/all_wrong" in r]
    return sampled[-max(1, len(sampled) // 3):]


def mean_share(log: Log, key: str) -> str:
    values = [r[key] for r in log if r.get(key) is not None]
    return f"{statistics.mean(values):.0%}" if values else ""


def gold_logprobs(log: Log) -> str:
    """At the first and the last evaluation."""
    values = [r["eval/gold_logprob"] for r in log if r.get("eval/gold_logprob") is not None]
    return f"{values[0]:.2f} → {values[-1]:.2f}" if values else ""


if __name__ == "__main__":
    main()
