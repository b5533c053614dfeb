"""One group before your eyes: what the algorithm makes of it, and what one step on it does.

    python show.py                               on the toy
    python show.py --model DIR --data FILE       on your model, with any of train.py's flags
    python show.py … --html group.html           as a page besides, every token coloured
    python show.py RUN --html run.html           the groups that a run has logged, step by step

Samples one group, prints each row with its reward, advantage, ratio and log-probability, takes one
step on it, and prints what that changed. Saves nothing but --html's page.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace

import torch

from gcpo import Group, clip_range, importance_ratio, is_clipped
from support import parallel
from support.checkpoint import State
from support.common import InputError, exit_cleanly, refuse_unwritable
from support.cpu import keep_freed_memory
from support.options import parse_flags, place_run, set_up_process, sft_stage, with_toy
from support.page import arithmetic, as_text, page_of_run, page_row, write_page
from train import Item, Run, collect, learn, load_run, score, stage_of


def main():
    keep_freed_memory()
    page, argv = take_page(sys.argv[1:])
    if {"-h", "--help"} & set(argv):
        print(__doc__)    # train.py's flags follow
    if argv and not argv[0].startswith("-"):
        if page is None or len(argv) > 1:
            raise InputError("show.py RUN --html FILE: of a run it makes a page, and takes no "
                             "other flags")
        print(f"{page_of_run(argv[0], page)} groups of {argv[0]} in {page}")
        return
    config, algorithm, given = parse_flags(argv)
    if config.out or config.resume:
        raise InputError("show.py saves nothing; leave out --out and --resume")
    device = set_up_process(config)
    if parallel.world() > 1:
        raise InputError("show.py: one process, not torchrun")
    with tempfile.TemporaryDirectory() as folder:    # for the toy's files
        config = replace(config, out=os.path.join(folder, "run"), prompts=1, updates=1)
        run = load_run(with_toy(place_run(config, algorithm)), algorithm, device)
    run.sft = sft_stage(algorithm, given)
    show(run, page)


def take_page(argv: list[str]) -> tuple[str | None, list[str]]:
    """--html's FILE, if it is there, and the other words of the command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--html", nargs="?", const="")
    found, others = parser.parse_known_args(argv)
    page = found.html
    if page == "":
        raise InputError("--html: name the file, as in --html group.html")
    if page:
        refuse_unwritable(page)
        refuse_other_file(page)
    return page, others


def refuse_other_file(page: str) -> None:
    """Raises InputError where --html would write over something that is no page."""
    if os.path.exists(page):
        with open(page, "rb") as f:
            if not f.read(9).lower().startswith(b"<!doctype"):
                raise InputError(f"--html {page}: there is something already, and it is no page")


def show(run: Run, page: str | None = None) -> None:
    """Print one group, take one step on it, and print what that did. page: a file to show it in."""
    run = stage_of(run, 0)    # SFT, with --sft-share
    run.problems = [p for p in run.problems if p.gold_ids is not None] or run.problems
    items = collect(run, 0, State())[1]
    if not items:
        raise InputError("nothing to show: no response was right and there is no gold; another "
                         "--seed may have more luck")
    item = items[0]
    before = score(run, run.policy, [item])[0]    # (G, T)
    learned = learn(run, [item])
    sums, [norm] = learned.sums, learned.norms    # of the one update
    after = score(run, run.policy, [item])[0]     # (G, T)

    print()
    print(f"question   {as_text(item.problem.question)}")
    print(f"answer     {item.problem.answer}")
    print(f"prompt     {len(item.group.prompt)} tokens, not part of the loss")
    print_table(run, item, before, after)
    step = "no contrast: every advantage is 0, so there is no step"
    if norm is not None:
        step = (f"loss {sums['loss']:.4f} ({why(run, item)}), gradient norm {norm:.3g}, "
                f"learning rate {run.config.lr:g}")
    print(f"\n{step}")
    print_responses(run, item.group)
    if page:
        write_page(page, f"One group, one step of {run.algorithm.name}",
                   [page_group(run, item, before, after, step)])
        print(f"\npage       {page}")


def page_group(
    run: Run, item: Item, before: torch.Tensor, after: torch.Tensor, step: str,
) -> dict:
    """What the page shows of a group."""
    group, mask = item.group, item.group.mask
    ratio = importance_ratio(after, before, mask, group.is_gold, run.algorithm)       # (G, T)
    low, high = clip_range(group.is_gold, run.algorithm, after.dtype)                 # (G, 1)
    clipped = is_clipped(ratio, low, high, item.advantages[:, None])                  # (G, T)
    at_start = importance_ratio(before, before, mask, group.is_gold, run.algorithm)   # (G, T)
    has_clip = run.algorithm.objective == "clipped" and run.algorithm.train_on == "rollouts"
    rows = []
    for i, n in enumerate(group.lengths.tolist()):
        rows.append(page_row(
            run.tokenizer.pieces(group.responses[i, :n]), before[i, :n].tolist(),
            item.advantages[i].item(), group.rewards[i].item(), group.is_gold[i].item(),
            group.finished[i].item(), after=after[i, :n].tolist(),
            clipped=clipped[i, :n].tolist() if has_clip else None,
            ratio=[at_start[i, :n].mean().item(), ratio[i, :n].mean().item()]))
    words = ""
    if has_clip:
        words = (" Underlined tokens are clipped after the step: another update on this batch "
                 "would not push them on.")
    return {
        "step": 1,
        "facts": [("question", as_text(item.problem.question)), ("answer", item.problem.answer),
                  ("the step", step)],
        "arithmetic": arithmetic(
            group.rewards.tolist(), item.advantages.tolist(), run.algorithm.scale) + words,
        "rows": rows}


def print_table(run: Run, item: Item, before: torch.Tensor, after: torch.Tensor) -> None:
    """A line for each row: its reward and advantage, and its numbers before and after the step."""
    group, mask = item.group, item.group.mask

    def row_mean(x):    # (G, T) -> G numbers
        return (torch.where(mask, x, 0.0).sum(1) / group.lengths).tolist()

    def ratio(logprobs):
        return row_mean(importance_ratio(logprobs, before, mask, group.is_gold, run.algorithm))

    print(f"\n{'':18}{'before the step':>44}{'after it':>20}")
    print(f"{'row':>4}{'':6}{'tokens':>8}{'reward':>9}{'advantage':>11}"
          + f"{'log p/token':>13}{'ratio':>9}" * 2)
    numbers = (row_mean(before), ratio(before), row_mean(after), ratio(after))
    for row, (p0, r0, p1, r1) in enumerate(zip(*numbers)):
        gold = "  gold" if group.is_gold[row] else ""
        print(f"{row:4}{gold:6}{group.lengths[row].item():8}{group.rewards[row].item():9.3g}"
              f"{item.advantages[row].item():11.4f}{p0:13.4f}{r0:9.4f}{p1:13.4f}{r1:9.4f}")


def why(run: Run, item: Item) -> str:
    """Why the loss is what it is at ratio 1."""
    if run.algorithm.objective == "cispo":
        return "a weight times advantage times log p, whose gradient alone means something"
    if run.algorithm.train_on != "rollouts":
        if run.algorithm.aggregation == "fixed_length":
            return "ratio and advantage are 1: minus tokens / (rows · max_new_tokens)"
        return "−1 by construction, ratio times advantage"
    if run.algorithm.objective == "pairs":
        return "log 2 where a model is its own reference"
    if run.algorithm.gold_old == "one" and item.group.is_gold.any():
        return "gold's ratio is not 1"
    if abs(item.advantages.sum()) > 1e-3:
        return "ratios are 1, but here advantages do not add up to 0"
    if run.algorithm.aggregation != "row_mean":
        return "ratios are 1 and advantages add up to 0, but long rows weigh more"
    return "about 0 for a mean over rows, as ratios are 1 and advantages add up to 0"


def print_responses(run: Run, group: Group) -> None:
    print("\nresponses, token by token; · is padding, which the mask leaves out (the end token "
          "counts)")
    for row, (ids, kept) in enumerate(zip(group.responses, group.mask)):
        words = [json.dumps(text, ensure_ascii=False)[1:-1]
                 for text in run.tokenizer.pieces(ids[kept])]
        gold = " gold" if group.is_gold[row] else ""
        print(f"{row:4}{gold}  {'|'.join(words)}{'·' * int((~kept).sum())}")


if __name__ == "__main__":
    exit_cleanly(main)
