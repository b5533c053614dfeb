"""Training: sample → grade → substitute gold → advantages → updates → log → evaluate → save.

    python train.py                                        the toy: GCPO learns where GRPO cannot take a step
    python train.py --model DIR --data gsm8k.jsonl         the same program on a real model and real problems

`train` is the algorithm, to be read from top to bottom; `collect` before it makes its groups, `learn` its updates. Who reads for the
algorithm may stop at "What is written down": logs, --show, the toy and the command line follow. The weights live in fp32
under AdamW. Where bf16 products are faster, a bf16 copy of them does all the computing, sampling and scoring alike; its
gradients are added up in fp32 on the weights themselves, and it is refreshed after every step of the optimizer.
"""
from __future__ import annotations

import json
import math
import os
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from data import Problem, Tokenizer, grade_group, load_reward, load_tokenizer, prepare, read_problems
from evaluate import complete, summarize
from gcpo import ALGORITHMS, Algorithm, Group, gold_group, group_advantages, importance_ratio, overlong_penalty, policy_loss, substitute_gold
from logprobs import encode_prompts, score_responses
from model import Transformer, load_model, read_config, save_model
from sampler import prompt_generator, sample
from support import parallel
from support.checkpoint import checkpoints, lock_folder, load_checkpoint, newest_checkpoint, refuse_changes, save_checkpoint
from support.common import InputError, exit_cleanly, pick_device, pick_dtype
from support.cpu import give_back_freed_memory, keep_freed_memory
from support.options import Config, fresh_folder, latest_folder, parse_flags, record_of
from support.parallel import gather_shards
from support.runlog import announce, bf16_changed, heed_signals, last_words, local, logger, mean, peak_bytes, gather_step, sample_record, warn
from support.toy import build_toy, toy_files


# ---------------------------------------------------------------------------------------------------------------------
# The groups of a step

@dataclass
class Item:
    """A group with what an update needs to know of it."""
    place: int                                  # in the step's batch, over all processes
    problem: Problem
    group: Group
    advantages: torch.Tensor                    # (G,)
    old_logprobs: torch.Tensor | None = None    # (G, T); None: the weights have not moved since, and the ratio is exactly 1
    ref_logprobs: torch.Tensor | None = None    # (G, T), of the frozen start model, where the loss has a reference

    @property
    def has_contrast(self) -> bool:
        return bool((self.advantages != 0).any())


BEGINNING = {"epoch": 0, "taken": 0, "solved": [], "dropped": []}  # of the order of problems


def next_problems(count: int, size: int, state: dict, seed: int) -> list[int]:
    """The next `count` of `size` problems: a new order for each pass over the data, and nothing left out at its end.

    Moves `state` on: the pass ("epoch"), how many of its problems are "taken", and which are left out of it ("dropped"), those
    "solved" by its beginning (SRPO's history resampling; the list stays empty in other runs). If all are, none is."""
    chosen = []
    while len(chosen) < count:
        dropped = set(state["dropped"])
        order = [i for i in random.Random(f"{seed}/{state['epoch']}").sample(range(size), size) if i not in dropped]
        if state["taken"] >= len(order):    # only now, when it is known what the pass's last problems came to, but for those of this very step
            state |= {"epoch": state["epoch"] + 1, "taken": 0, "dropped": state["solved"] if len(state["solved"]) < size else []}
            continue
        part = order[state["taken"]:state["taken"] + count - len(chosen)]
        chosen += part
        state["taken"] += len(part)
    return chosen


def collect(step: int, compute: Transformer, tokenizer: Tokenizer, problems: list[Problem], state: dict, reward, algorithm: Algorithm,
            config: Config) -> tuple[list[Group], list[Item]]:
    """Groups for one step: this process's share of what was sampled, as sampled, and of what is trained on.

    They differ in gold, and with dynamic sampling (DAPO, arXiv 2503.14476, eq. 11): groups all right or all wrong are then
    left out, and further problems tried, `max_tries` rounds at most; places still empty are filled with the latest groups
    left out, without advantages. (SFT samples nothing; a problem without gold leaves its place empty.)"""
    if algorithm.train_on == "gold":
        chosen = parallel.my_part([(place, problems[i]) for place, i in enumerate(next_problems(config.prompts, len(problems), state, config.seed))])
        return [], [Item(place, p, gold_group(p.prompt, p.gold_ids), torch.ones(1)) for place, p in chosen if p.gold_ids is not None]

    rollouts, kept, spare, places, filled = [], [], [], 0, 0
    for _ in range(algorithm.max_tries if algorithm.resample == "dynamic" else 1):
        indices = next_problems(config.prompts - filled, len(problems), state, config.seed)
        chosen = parallel.my_part([(places + n, i, problems[i]) for n, i in enumerate(indices)])
        places += len(indices)
        # A stream for each place, not for each problem: with few problems one may come twice in a step.
        sampled = sample(compute, [p.prompt for *_, p in chosen], config.group_size, config.max_new_tokens, temperature=config.temperature,
                         stop_ids=tokenizer.stop_ids, seed=(config.seed, step), prompt_ids=[place for place, *_ in chosen], max_rows=config.rows or None)
        outcomes = []
        for group, (place, i, p) in zip(sampled, chosen):
            group = grade_group(group, p, tokenizer, reward, config.correct_at)
            group = replace(group, rewards=group.rewards + overlong_penalty(group.lengths, config.max_new_tokens, algorithm.overlong))
            rollouts.append(group)
            outcomes.append((i, bool(group.correct.all())))
            if p.gold_ids is not None:                                          # the generator draws which rollout gives way
                group = substitute_gold(group, p.gold_ids, algorithm, prompt_generator((config.seed, step, 1), place, 0), p.gold_reward)
            item = Item(place, p, group, group_advantages(group.rewards, algorithm.scale))
            if algorithm.resample != "dynamic" or 0 < group.correct.sum() < len(group.correct):
                kept.append(item)
            else:                                                               # whatever its lengths may have done to its rewards
                spare.append(replace(item, advantages=torch.zeros_like(item.advantages)))
        if algorithm.resample == "history":
            outcomes = sum(parallel.all_gather(outcomes), [])
            missed = {i for i, right in outcomes if not right}                  # a problem may come twice
            state["solved"] = sorted(({*state["solved"]} | {i for i, _ in outcomes}) - missed)
        filled = parallel.all_sum(len(kept))[0]
        if filled == config.prompts:
            break
    # Places are numbered anew, over all processes, as what is kept decides which update a group belongs to.
    order = sorted(place for part in parallel.all_gather([item.place for item in kept]) for place in part)
    order += sorted((place for part in parallel.all_gather([item.place for item in spare]) for place in part), reverse=True)[:config.prompts - len(order)]
    number = {place: n for n, place in enumerate(order)}
    return rollouts, [replace(item, place=number[item.place]) for item in [*kept, *spare] if item.place in number]


# ---------------------------------------------------------------------------------------------------------------------
# The compute copy

def make_policy(model: Transformer, dtype: torch.dtype) -> Transformer:
    """The model in the dtype of the compute: itself in fp32, else a copy whose gradients arrive at `model` in fp32.

    Gradients are moved as soon as a backward pass has completed them, so that those of many groups add up in fp32.
    (Shards have a whole copy in any dtype, which samples and scores; gradients are theirs alone.)"""
    if dtype == torch.float32 and not parallel.is_sharded(model):
        return model
    with torch.device("meta"):
        copy = Transformer(model.config)
    copy = copy.to(dtype).to_empty(device=model.norm.weight.device)
    for master, p in zip(model.parameters(), copy.parameters()):
        def move(p, master=master):
            master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
            p.grad = None
        p.register_post_accumulate_grad_hook(move)
    refresh_policy(copy, model)
    return copy


@torch.no_grad()
def refresh_policy(copy: Transformer, model: Transformer) -> None:
    if copy is not model:
        for p, master in zip(copy.parameters(), model.parameters()):
            p.copy_(gather_shards(master.to(p.dtype)))


# ---------------------------------------------------------------------------------------------------------------------
# The updates of a step

def passes(items: list[Item], config: Config) -> list[list[Item]]:
    """Whole groups that go through the network together: as many as `rows_per_pass` holds, and at least one."""
    size = max(1, config.rows_per_pass // max((len(i.group.lengths) for i in items), default=1))
    return [items[i:i + size] for i in range(0, len(items), size)]


def stack_rows(xs: list[torch.Tensor]) -> torch.Tensor:
    """Tensors (N_i, T_i) below each other, right-padded to the widest."""
    width = max(x.shape[1] for x in xs)
    return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in xs])


def row_passes(items: list[Item], config: Config, device: torch.device):
    """The rows of some groups, below each other, `rows_per_pass` at a time, on the device: tensors (N, T) and (N,) by name.
    `owner` is the group a row belongs to."""
    groups = [i.group for i in items]
    rows = {name: torch.cat([getattr(g, name) for g in groups]) for name in ("lengths", "is_gold")}
    rows |= {name: stack_rows([getattr(g, name) for g in groups]) for name in ("responses", "logprobs", "mask")}
    rows |= {name: stack_rows([getattr(i, name) for i in items]) for name in ("old_logprobs", "ref_logprobs") if getattr(items[0], name) is not None}
    rows["advantages"] = torch.cat([i.advantages for i in items])
    rows["owner"] = torch.arange(len(items)).repeat_interleave(torch.tensor([len(g.lengths) for g in groups]))
    for part in torch.arange(len(rows["lengths"])).split(config.rows_per_pass):
        width = int(rows["lengths"][part].max())
        yield {name: (x[part] if x.dim() == 1 else x[part, :width]).to(device) for name, x in rows.items()}


def backward(compute: Transformer, items: list[Item], algorithm: Algorithm, config: Config, total_rows: int, total_tokens: int) -> Counter:
    """Add the gradient of one pass, some whole groups, to the weights'. Returns sums for the metrics.

    If a group has more than `rows_per_pass` rows, they go through a few at a time. Its prompt's keys, values and last state
    are then cut from their graph and made leaves, which collect gradient from each of these parts; one backward through the
    prompt follows. The gradient is that of a single pass, the memory that of a few rows. (In shards, whose forward and
    backward passes must be everyone's, the prompt goes along with each part instead.)"""
    prompts, parts, sums = [i.group.prompt for i in items], list(row_passes(items, config, compute.norm.weight.device)), Counter()
    if algorithm.objective == "pairs" and (len(items) > 1 or len(parts) > 1):
        raise ValueError("backward: a pair's loss needs both its rows and no other group's, so rows_per_pass must be the group size")
    if prompt_apart := len(parts) > 1 and not parallel.is_sharded(compute):
        prefix = encode_prompts(compute, prompts)
        leaves = prompts = prefix.cut()
    for rows in parts:
        mask, is_gold = rows["mask"], rows["is_gold"]
        logprobs, entropy = score_responses(compute, prompts, rows["owner"], rows["responses"], rows["lengths"], config.temperature)
        old = rows.get("old_logprobs", logprobs.detach())
        loss, part = policy_loss(logprobs, old, rows["advantages"], mask, algorithm, total_rows=total_rows, total_tokens=total_tokens,
                                 max_new_tokens=config.max_new_tokens, is_gold=is_gold, ref_logprobs=rows.get("ref_logprobs"))
        loss.backward()
        policy = mask & ~is_gold[:, None]
        part |= {"loss": loss.detach(), "entropy": entropy[policy].sum(), "mismatch": (rows["logprobs"] - old)[policy].abs().sum()}
        sums.update(dict(zip(part, torch.stack([x.double() for x in part.values()]).tolist())))
    if prompt_apart:
        torch.autograd.backward(prefix.tensors, [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves.tensors])
    return sums


@torch.no_grad()
def score(policy: Transformer, items: list[Item], config: Config, temperature: float) -> list[torch.Tensor]:
    """The trainer's logprobs (G, T) of each group, on the CPU, without gradient."""
    scores = []
    for batch in passes(items, config):
        prompts, parts = [i.group.prompt for i in batch], list(row_passes(batch, config, policy.norm.weight.device))
        if len(parts) > 1:
            prompts = encode_prompts(policy, prompts)
        parts = [score_responses(policy, prompts, rows["owner"], rows["responses"], rows["lengths"], temperature)[0].cpu() for rows in parts]
        for item, logprobs in zip(batch, stack_rows(parts).split([len(i.group.lengths) for i in batch])):
            T = item.group.responses.shape[1]
            scores.append(torch.nn.functional.pad(logprobs, (0, max(0, T - logprobs.shape[1])))[:, :T])
    return scores


def idle_pass(model: Transformer) -> None:
    """Forward and backward of weight zero."""
    one, zero = torch.ones(1, dtype=torch.int64, device=model.norm.weight.device), torch.zeros(1, dtype=torch.int64, device=model.norm.weight.device)
    logprobs, _ = score_responses(model, [zero], zero, zero[None], one)
    (0 * logprobs.sum()).backward()


def culprit(model: Transformer, compute: Transformer, items: list[Item], algorithm: Algorithm, config: Config) -> Item | None:
    """The first of this process's groups whose gradient, taken alone, is not finite. None: only their sum is not, or the model is
    in shards, where groups cannot run alone."""
    for item in [] if parallel.is_sharded(model) else [i for i in items if i.has_contrast]:
        backward(compute, [item], algorithm, config, 1, 1)
        finite = all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        model.zero_grad(set_to_none=True)
        if not finite:
            return item
    return None


def update(model: Transformer, compute: Transformer, optimizer, items: list[Item], algorithm: Algorithm, config: Config) -> tuple[Counter, float | None]:
    """One step of the optimizer. Returns the metric sums and the gradient norm before clipping, or None where no group has contrast.

    `items` are this process's share. Denominators count every row and token of all processes' groups. A group without
    contrast has no gradient and costs nothing, but counts. Where no group has any, weights and moments stay as they are:
    momentum must not move them. Nor is there a step on a gradient that is not finite; its norm is returned."""
    live, sums = [i for i in items if i.has_contrast], Counter()
    total_rows, total_tokens, total_live = parallel.all_sum(sum(len(i.group.lengths) for i in items), sum(int(i.group.lengths.sum()) for i in items), len(live))
    if not total_live:
        return sums, None
    learner, batches, idle = compute, passes(live, config), 0
    if parallel.is_sharded(model):                                              # whose passes all processes make together
        count = sum(-(-sum(len(i.group.lengths) for i in batch) // config.rows_per_pass) for batch in batches)
        learner, idle = model, max(parallel.all_gather(count)) - count
    for batch in batches:
        sums.update(backward(learner, batch, algorithm, config, total_rows, total_tokens))
    for _ in range(idle):
        idle_pass(learner)
    parallel.sum_gradients(model)
    grad_norm = float(gather_shards(torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)))
    if math.isfinite(grad_norm):
        optimizer.step()
        refresh_policy(compute, model)
    optimizer.zero_grad(set_to_none=True)
    return sums, grad_norm


def adamw(model: Transformer, config: Config) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True)


def learning_rate(step: int, config: Config) -> float:
    """For step `step` (from 0): linear warm-up, then linear to lr · lr_end at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - 1 - config.warmup)
    return config.lr * (1 - (1 - config.lr_end) * done)


def learn(model: Transformer, compute: Transformer, reference: Transformer | None, optimizer, items: list[Item], algorithm: Algorithm,
          config: Config) -> tuple[Counter, list[float | None], Item | None]:
    """All updates of a step, each on its share of the groups. Returns the metric sums, each update's gradient norm (None: no contrast), and
    the group to which a gradient that was not finite could be traced."""
    minibatches = [[i for i in items if i.place * config.updates // config.prompts == number] for number in range(config.updates)]
    live = [i for i in items if i.has_contrast]
    # SFT has no π_old: its ratio is 1 by definition, so that its gradient is the likelihood's.
    later = [i for batch in minibatches[1:] for i in batch if i.has_contrast] if algorithm.train_on == "rollouts" else []
    for item, logprobs in zip(later, score(compute, later, config, config.temperature)):
        item.old_logprobs = logprobs                                            # π_old, before the first update moves the weights
    for item, logprobs in zip(live, score(reference, live, config, config.temperature) if algorithm.needs_reference else []):
        item.ref_logprobs = logprobs
    sums, norms, bad = Counter(), [], None
    for batch in minibatches:
        batch_sums, norm = update(model, compute, optimizer, batch, algorithm, config)
        sums.update(batch_sums)
        norms.append(norm)
        if norm is not None and not math.isfinite(norm):
            bad = bad or culprit(model, compute, batch, algorithm, config)
    return sums, norms, bad


# ---------------------------------------------------------------------------------------------------------------------
# The run

def train(config: Config, algorithm: Algorithm, model: Transformer, compute: Transformer, tokenizer: Tokenizer, problems: list[Problem],
          held_out: list[Problem], reward, log, checkpoint: str | None = None, stopping=lambda: False) -> tuple[float | None, float | None]:
    """The whole run, or the rest of it from `checkpoint` on. Returns the held-out accuracy before and after.

    Once stopping() is true, the step is finished and saved, and KeyboardInterrupt raised."""
    first, tokenizer_files = parallel.rank() == 0, os.path.join(config.out, "tokenizer")
    optimizer = adamw(model, config)
    reference = load_model(config.model, compute.norm.weight.device, compute.norm.weight.dtype) if algorithm.needs_reference else None
    start = [local(p).to(torch.bfloat16, copy=True) for p in model.parameters()]

    def measure(step):
        metrics = evaluation(compute, held_out, tokenizer, config, reward)
        if metrics and first:
            tqdm.write(f"step {step}: held-out accuracy {metrics['eval/mean']:.1%}")
        return metrics

    if checkpoint:
        state = load_checkpoint(checkpoint, model, optimizer)
        refresh_policy(compute, model)
        if state["step"] > config.steps:
            raise InputError(f"--steps {config.steps}: the run in {config.out} is at step {state['step']} already")
        if state["step"] == config.steps:
            save_model(model, os.path.join(config.out, "model"), tokenizer_files, write=first)
    else:
        metrics = measure(0)
        log("metrics", {"step": 0, **metrics})
        before = metrics.get("eval/mean")
        state = {"step": 0, "before": before, "after": before, "best": None, "best_step": None, "bad_steps": 0,
                 **BEGINNING}

    in_a_file = {} if sys.stderr.isatty() else {"mininterval": 30}  # a bar that is not watched but kept
    bar = tqdm(range(state["step"], config.steps), desc=algorithm.name, unit="step", initial=state["step"], total=config.steps, dynamic_ncols=True,
               disable=not first, **in_a_file)
    for step in bar:
        began = time.perf_counter()
        active = ALGORITHMS["sft"] if step < round(algorithm.sft_share * config.steps) else algorithm     # SFT, then RL
        rollouts, items = collect(step, compute, tokenizer, problems, state, reward, active, config)
        sampled = time.perf_counter()
        for param_group in optimizer.param_groups:
            param_group["lr"] = learning_rate(step, config)
        sums, norms, bad = learn(model, compute, reference, optimizer, items, active, config)
        updated = time.perf_counter()

        # What the processes did is put together; the first of them writes it down.
        metrics, tokens, not_finite, stop = gather_step(step + 1, rollouts, items, sums, norms, bad, tokenizer, stopping())
        metrics |= {"update/lr": learning_rate(step, config), "update/bf16_changed": bf16_changed(model, start), "time/sample": sampled - began,
                    "time/update": updated - sampled, "time/tokens_per_second": tokens / (updated - began),
                    "memory/peak_gib": peak_bytes(compute.norm.weight.device) / 2**30}
        finite, last = metrics["update/not_finite"] == 0, step + 1 == config.steps
        due = lambda every: last or (every and (step + 1) % every == 0)
        state |= {"step": step + 1, "bad_steps": 0 if finite else state["bad_steps"] + 1}
        if last:
            save_model(model, os.path.join(config.out, "model"), tokenizer_files, write=first)
        if due(config.eval_every):
            metrics |= measure(step + 1)
            state["after"] = metrics.get("eval/mean")
            if state["after"] is not None and (state["best"] is None or state["after"] > state["best"]):
                state |= {"best": state["after"], "best_step": step + 1}
        log("metrics", metrics)
        log("samples", not_finite or sample_record(step + 1, items, tokenizer))
        # The log first: what it says beyond the checkpoint is cut off on resuming, what it lacks would be lacking.
        give_up = state["bad_steps"] >= config.max_bad_steps
        if due(config.save_every) or state["best_step"] == step + 1 or stop or give_up:
            save_checkpoint(config.out, model, optimizer, state, tokenizer_files, config.keep, write=first)
        parallel.all_gather(None)                                                   # the others wait until it is written
        if give_up:
            raise InputError(f"step {step + 1}: gradients were not finite in {state['bad_steps']} steps in a row (samples.jsonl shows the groups); the weights "
                             f"as of the last finite update are in {config.out}/checkpoints; try a lower --lr or --dtype float32")
        if stop and not last:
            raise KeyboardInterrupt
        give_back_freed_memory()
        reward_now = f"reward {metrics['reward/mean']:.3f}, " if "reward/mean" in metrics else ""
        bar.set_postfix_str(f"{reward_now}gold {metrics['gold/share']:.2f}, {metrics['time/tokens_per_second']:.0f} tokens/s")
    return state["before"], state["after"]


# ---------------------------------------------------------------------------------------------------------------------
# What is written down


def evaluation(compute: Transformer, held_out: list[Problem], tokenizer: Tokenizer, config: Config, reward) -> dict:
    """Metrics on the held-out problems (the README's table explains each); empty without any."""
    if not held_out:
        return {}
    began = time.perf_counter()
    mine = parallel.my_part(list(enumerate(held_out)))
    completions = complete(compute, [p for _, p in mine], tokenizer, config.eval_samples, config.max_new_tokens, temperature=float(config.eval_samples > 1),
                           seed=config.seed, prompt_ids=[i for i, _ in mine], max_rows=config.rows or None, reward=reward, correct_at=config.correct_at,
                           progress="evaluating" if parallel.rank() == 0 else "")
    metrics = summarize(parallel.interleave(parallel.all_gather(completions)))
    golds = [Item(i, p, gold_group(p.prompt, p.gold_ids), torch.ones(1)) for i, p in mine if p.gold_ids is not None]
    scores = parallel.all_gather([[item.place, float(logprobs.mean())] for item, logprobs in zip(golds, score(compute, golds, config, 1.0))])
    metrics["gold_logprob"] = mean(value for _, value in sorted(pair for part in scores for pair in part))
    return {**{f"eval/{name}": value for name, value in metrics.items()}, "time/eval": time.perf_counter() - began}


# ---------------------------------------------------------------------------------------------------------------------
# One group, before one's eyes

def show(config: Config, algorithm: Algorithm, model: Transformer, compute: Transformer, tokenizer: Tokenizer, problems: list[Problem], reward) -> None:
    """Sample one group, print what the algorithm makes of it, take one step on it, and print what that did. Saves nothing."""
    config, problems = replace(config, prompts=1), [p for p in problems if p.gold_ids is not None] or problems
    item = collect(0, compute, tokenizer, problems, dict(BEGINNING), reward, algorithm, config)[1][0]
    group, mask = item.group, item.group.mask
    item.old_logprobs = before = score(compute, [item], config, config.temperature)[0]
    item.ref_logprobs = before if algorithm.needs_reference else None       # the model as it starts is its own reference
    optimizer = adamw(model, config)
    sums, norm = update(model, compute, optimizer, [item], algorithm, config)
    after = score(compute, [item], config, config.temperature)[0]
    row_mean = lambda x: (torch.where(mask, x, 0.0).sum(1) / group.lengths).tolist()
    ratio = lambda logprobs: row_mean(importance_ratio(logprobs, before, mask, group.is_gold, algorithm)[0])

    print(f"\nquestion   {item.problem.question}\nreference  {item.problem.answer}\nprompt     {len(group.prompt)} tokens, not part of the loss\n")
    print(f"{'':18}{'before the step':>44}{'after it':>20}\n{'row':>4}{'':6}{'tokens':>8}{'reward':>9}{'advantage':>11}"
          + f"{'log p/token':>13}{'ratio':>9}" * 2)
    columns = (group.is_gold.tolist(), group.lengths.tolist(), group.rewards.tolist(), item.advantages.tolist(),
               row_mean(before), ratio(before), row_mean(after), ratio(after))
    for row, (gold, length, r, a, p0, r0, p1, r1) in enumerate(zip(*columns)):
        print(f"{row:4}{'  gold' if gold else '':6}{length:8}{r:9.3g}{a:11.4f}{p0:13.4f}{r0:9.4f}{p1:13.4f}{r1:9.4f}")
    hint = ("−1 by construction, ratio times advantage" if algorithm.train_on == "gold" else "log 2 where a model is its own reference"
            if algorithm.objective == "pairs" else "about 0 for a mean over rows, as ratios are 1 and advantages add up to 0")
    print("\nno contrast: every advantage is 0, and there is no step" if norm is None else
          f"\nloss {sums['loss']:.4f} ({hint}), gradient norm {norm:.3g}, learning rate {config.lr:g} (in training it is warmed up to)")
    print("\nresponses, token by token; · is padding, which the mask leaves out (the end token counts)")
    for row, (ids, kept) in enumerate(zip(group.responses, mask)):
        words = [json.dumps(tokenizer.tokenizer.decode([int(t)], skip_special_tokens=False), ensure_ascii=False)[1:-1] for t in ids[kept]]
        print(f"{row:4}{' gold' if group.is_gold[row] else ''}  {'|'.join(words)}{'·' * int((~kept).sum())}")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def read_all(config: Config, algorithm: Algorithm, device: torch.device):
    """Everything the run needs, checked before anything is written: reward, problems, held-out problems, lines about golds
    that cannot be used, tokenizer, model."""
    reward = load_reward(config.reward)
    described = read_config(config.model)
    limits = dict(max_new_tokens=config.max_new_tokens, max_positions=described.max_position_embeddings, vocab_size=described.vocab_size,
                  reward=reward, correct_at=config.correct_at)
    problems = read_problems(config.data, config.answer_format, config.answer_only_gold)
    held_out = read_problems(config.eval_data, config.answer_format)[:config.eval_limit or None] if config.eval_data else []
    tokenizer = load_tokenizer(config.model, config.answer_format, config.instruction)
    complaints = prepare(problems, tokenizer, **limits)
    prepare(held_out, tokenizer, **limits)
    if (algorithm.train_on == "gold" or algorithm.sft_share) and not any(p.gold_ids is not None for p in problems):
        raise InputError(f"--algo {config.algo} trains on gold, and {config.data} has none that can be used" + (f" ({complaints[0]})" if complaints else ""))
    shard = (lambda model: parallel.shard(model, device, pick_dtype(config.dtype, device))) if config.shard else None
    return reward, problems, held_out, complaints, tokenizer, load_model(config.model, device, shard=shard)


def checkpoint_to_resume(out: str) -> str | None:
    """The newest whole one; None if the run had not come to its first."""
    checkpoint = parallel.all_gather(newest_checkpoint(out) if parallel.rank() == 0 else None)[0]
    if checkpoint is None and checkpoints(out):
        raise InputError(f"--resume: no checkpoint in {out}/checkpoints is whole; mend one, or begin a new run")
    return checkpoint


def main():
    keep_freed_memory()
    config, algorithm, given = parse_flags()
    own_device, first = parallel.join(), parallel.rank() == 0
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.shard and parallel.world() == 1:
        raise InputError("--shard: there is one process; torchrun --nproc-per-node N train.py … starts N")
    if config.show and (config.resume or config.out or parallel.world() > 1):
        raise InputError("--show: one process, and nothing is saved; leave out --out and --resume")
    device = pick_device(own_device if own_device and config.device == "auto" else config.device)

    # Where the run lies
    toy = config.model is None
    folder = os.path.abspath(config.model or "toy")
    name = os.path.basename(os.path.dirname(folder) if os.path.basename(folder) == "model" else folder)  # runs/NAME/model is NAME
    stem = os.path.join("runs", f"{name}-{algorithm.name}") if not config.show else os.path.join(tempfile.gettempdir(), f"gcpo-{os.getpid()}")
    out = config.out or (latest_folder(stem) if config.resume else fresh_folder(stem))
    config = replace(config, out=parallel.all_gather(out)[0])
    if config.resume and not os.path.isfile(os.path.join(config.out, "run.json")):
        raise InputError(f"--resume: {config.out} holds no run (no run.json there); name the run with --out, or begin anew without --resume")

    # What it needs
    if toy:
        folder = os.path.join(config.out, "toy")
        if first and not config.resume:
            build_toy(folder, config.seed)
        parallel.all_gather(None)                                       # until it is there
        config = replace(config, **toy_files(folder))
    try:
        reward, problems, held_out, complaints, tokenizer, model = read_all(config, algorithm, device)
    except InputError:
        if toy and first and not config.resume:
            shutil.rmtree(config.out)
        raise
    compute = make_policy(model, pick_dtype(config.dtype, device))
    compute.gradient_checkpointing = model.gradient_checkpointing = config.gradient_checkpointing
    if config.show:
        shutil.rmtree(config.out, ignore_errors=True)               # the toy's files
        return show(config, algorithm, model, compute, tokenizer, problems, reward)

    # How it begins, goes, and ends
    settings = parallel.all_gather(record_of(config, algorithm, device, compute) if first else None)[0]
    checkpoint = None
    if config.resume:
        refuse_changes(config.out, settings)
        checkpoint = checkpoint_to_resume(config.out)
    os.makedirs(config.out, exist_ok=True)
    if first:
        warn(config, algorithm, problems, held_out, complaints)
        lock_folder(config.out)
        announce(config, algorithm, given, settings, name, device, model, compute, problems, held_out, complaints, checkpoint)
    try:
        before, after = train(config, algorithm, model, compute, tokenizer, problems, held_out, reward, logger(config.out), checkpoint, heed_signals())
    except KeyboardInterrupt:
        if first:
            saved = newest_checkpoint(config.out)
            print("\nstopped; " + (f"the model so far is {saved}/model; " if saved else "")
                  + f"to go on: the same command with --resume --out {shlex.quote(config.out)}", file=sys.stderr)
        raise
    if first:
        last_words(config, algorithm, before, after, len(held_out), toy)


if __name__ == "__main__":
    exit_cleanly(lambda: parallel.run_distributed(main))
