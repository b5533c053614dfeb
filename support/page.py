"""A page that shows groups token by token, in one file without a network (show.py --html).

What a model says is untrusted. It travels as JSON in which no tag can begin, the page's script
makes text nodes of it and nothing else, and the page allows no other script than its own.
"""
from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import math
import os

import torch

from gcpo import ADVANTAGE_EPS, group_advantages
from plot import read_run
from support.common import InputError, written_whole


HERE = os.path.dirname(os.path.abspath(__file__))
CURVES = ("eval/mean", "reward/correct", "gold/share", "groups/mixed", "policy/entropy",
          "length/mean", "update/grad_norm")
MOST_GROUPS = 200    # of a run, at even distances: a page of some megabytes


def write_page(path: str, title: str, groups: list[dict], curves: list[dict] = ()) -> None:
    """groups: step, facts [(name, text)], arithmetic, rows (see page_row). curves: name, points."""
    parts = {}
    for name in ("page.html", "page.js"):
        with open(os.path.join(HERE, name), encoding="utf-8") as f:
            parts[name] = f.read()
    script = parts["page.js"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = {"title": title, "groups": groups, "curves": list(curves)}
    content = json.dumps(for_json(data)).replace("<", "\\u003c")
    page = parts["page.html"].replace("SCRIPT_HASH", digest)
    # Cut at both marks before anything is put in: a text that says DATA is no mark.
    before, between, after = page.replace(">SCRIPT<", ">\0<").replace(">DATA<", ">\0<").split("\0")
    with written_whole(path) as f:
        f.write(before + content + between + script + after)


def for_json(x):
    """The same without NaN and infinity, which JSON does not know, and with few digits."""
    if isinstance(x, float):
        return float(f"{x:.5g}") if math.isfinite(x) else None
    if isinstance(x, dict):
        return {key: for_json(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [for_json(value) for value in x]
    return x


def page_row(
    tokens: list[str], before: list, advantage: float, reward: float, is_gold: bool,
    finished: bool, **more,
) -> dict:
    """before: log-probability of each token. more: `after`, the same after a step; `clipped`, a
    bool of each; `ratio`, the row's at one time or several."""
    return {"tokens": tokens, "before": before, "advantage": advantage, "reward": reward,
            "is_gold": is_gold, "finished": finished, **more}


def arithmetic(rewards: list[float], advantages: list[float], scale: str) -> str:
    """How rewards became advantages, in numbers, if they follow from the rewards alone; `scale` is
    the algorithm's."""
    if max(rewards) == min(rewards) and not any(advantages):
        return "All rewards are equal, so every advantage is 0."
    mean = sum(rewards) / len(rewards)
    plain = []
    if scale != "mean" or min(rewards) >= 0:
        plain = group_advantages(torch.tensor(rewards), scale).tolist()
    if len(plain) != len(advantages) or any(
            abs(a - b) > 1e-3 for a, b in zip(plain, advantages)):
        return ("These advantages do not follow from the rewards alone: a switch of the algorithm "
                "changes them.")
    spread = torch.tensor(rewards).std().item()
    formula = {"std": f"(reward − {mean:.4g}) / ({spread:.4g} + {ADVANTAGE_EPS:g})",
               "none": f"reward − {mean:.4g}",
               "mean": f"(reward − {mean:.4g}) / {mean:.4g}"}[scale]
    return (f"The rewards have a mean of {mean:.4g} and a standard deviation of {spread:.4g}: an "
            f"advantage is {formula}.")


def as_text(question: str | list[dict]) -> str:
    """A chat's messages below each other."""
    if isinstance(question, str):
        return question
    return "\n".join(f"{m['role']}: {m['content']}" for m in question)


def page_of_run(folder: str, path: str) -> int:
    """The groups that a run logged, and its curves. Returns how many groups the page has."""
    scale = "std"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        with open(os.path.join(folder, "run.json"), encoding="utf-8") as f:
            scale = json.load(f)["settings"]["algorithm"]["scale"]
    groups = logged_groups(os.path.join(folder, "samples.jsonl"), scale)
    if not groups:
        raise InputError(f"{folder}: samples.jsonl has no group yet")
    chosen = {round(i * (len(groups) - 1) / (MOST_GROUPS - 1)) for i in range(MOST_GROUPS)}
    groups = [groups[i] for i in sorted(chosen)]
    metrics = read_run(folder)
    curves = []
    for name in CURVES:
        points = [(m["step"], m[name]) for m in metrics if m.get(name) is not None]
        if len(points) > 1:
            curves.append({"name": name, "points": points})
    write_page(path, os.path.basename(os.path.abspath(folder)), groups, curves)
    return len(groups)


def logged_groups(path: str, scale: str) -> list[dict]:
    """What the page shows of each line of a run's samples; a last one that is cut off is passed
    over."""
    try:
        with open(path, "rb") as f:    # a cut may go through a letter
            lines = f.readlines()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    groups = []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):    # a run that is being written
            break
        try:
            record = json.loads(line)
            record["step"] + 0    # a number
            if record.get("responses"):
                groups.append(logged_group(record, scale))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise InputError(
                f"{path}, line {number}: not a group that a run has logged") from None
    return groups


def logged_group(record: dict, scale: str) -> dict:
    """Raises KeyError and the like if it is none."""
    rows = []
    for r in record["responses"]:
        rows.append(page_row(
            r["tokens"], r["logprobs"], float(r["advantage"]), float(r["rewards"]), r["is_gold"],
            r["finished"]))
    return {
        "step": record["step"],
        "facts": [("question", as_text(record["question"])), ("answer", record["reference"])],
        "arithmetic": arithmetic(
            [r["reward"] for r in rows], [r["advantage"] for r in rows], scale),
        "rows": rows}
