"""Training: sample → grade → substitute gold → advantages → updates → evaluate → log → save.

    python train.py                                      the toy, by GCPO
    python train.py --model DIR --data gsm8k.jsonl       a real model and real problems

From top to bottom, in the order in which they run:

    main      settings, model and problems
    train     the loop over steps
    collect   a step's groups: sampled, graded, given gold, with advantages
    learn     a step's updates, on minibatches of its groups
    update    one optimizer step
    backward  the gradient of a few groups

Two models appear everywhere. The *master* is the fp32 weights that AdamW steps. The *policy* is
what samples and scores: a bf16 copy of the master where bf16 is faster, else the master itself. A
copy hands each gradient on to the master (support/policy.py; with --lora-rank the master is of low
rank, support/lora.py). What follows a step's updates, from
metrics to checkpoint, is support/record.py. With torchrun, every process runs this file on its part
of the step's problems (support/parallel.py).
"""
from __future__ import annotations

import math
import os
import random
import runpy
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from safetensors import SafetensorError

from data import (
    Limits, Notes, Problem, Tokenizer, grade_group, load_tokenizer, prepare, read_problems)
from gcpo import (
    ALGORITHMS, Algorithm, Group, advantages_of, gold_group, overlong_penalty, policy_loss,
    substitute_gold)
from grader import Reward
from logprobs import encode_prompts, score_responses
from model import Transformer, load_model, read_config
from sampler import prompt_generator, sample
from support import parallel, runlog
from support.batches import count_passes, micro_batches, split_into_passes, stack_rows
from support.checkpoint import State
from support.common import InputError, exit_cleanly, outlive_readers, pick_dtype
from support.cpu import keep_freed_memory
from support.dpo import pair_loss
from support.estimate import warn_if_too_large
from support.lora import LowRankMaster
from support.options import (
    Config, learning_rate, load_reward, parse_flags, place_run, set_up_process, sft_stage,
    sft_steps_of, with_toy)
from support.policy import load_master_and_policy, refresh_policy
from support.record import Record
from support.toy import removed_on_error


@dataclass
class Run:
    """The models, data and settings of one run: what collect, learn, update and evaluation need."""
    config: Config
    algorithm: Algorithm
    master: Transformer | LowRankMaster
    policy: Transformer
    optimizer: torch.optim.Optimizer
    sft: Algorithm = ALGORITHMS["sft"]      # for the first steps, with --sft-share
    reference: Transformer | None = None    # the frozen start model, if the loss looks at it
    tokenizer: Tokenizer | None = None
    problems: Sequence[Problem] = ()
    held_out: Sequence[Problem] = ()
    notes: Notes = field(default_factory=Notes)             # what is wrong with the problems
    held_out_notes: Notes = field(default_factory=Notes)
    reward: Reward = Reward()

    @property
    def scoring_temperature(self) -> float:
        """What divides the logits of what is trained on. Rollouts are scored as they were sampled,
        and so is gold beside them. SFT and RFT maximize a plain likelihood, at 1: gold learned at
        0.6 would make the model less sure, and sampling at 0.6 then gives what sampling at 1 gave
        before."""
        return self.config.temperature if self.algorithm.train_on == "rollouts" else 1.0


@dataclass
class Item:
    """A group, with what an update needs to know of it."""
    position: int                               # in the step's batch, over all processes
    problem: Problem
    group: Group
    advantages: torch.Tensor                    # (G,)
    old_logprobs: torch.Tensor | None = None    # (G, T); None: `backward` takes them
    ref_logprobs: torch.Tensor | None = None    # (G, T), the reference model's, if there is one

    @property
    def has_contrast(self) -> bool:
        return bool((self.advantages != 0).any())


@dataclass
class Learned:
    """What the updates of a step came to."""
    sums: Counter               # sums over this process's tokens, for the metrics
    norms: list[float | None]   # each update's gradient norm; None: no group had contrast
    suspect: Item | None        # a group of the first update whose gradient was not finite


def main():
    if "--show" in sys.argv[1:]:    # a program of its own, which imports this one
        return runpy.run_path(os.path.join(runlog.ROOT, "show.py"))["main"]()
    keep_freed_memory()
    config, algorithm, given = parse_flags()
    device = set_up_process(config)
    config = place_run(config, algorithm)
    with removed_on_error(config):
        config = with_toy(config)
        run = load_run(config, algorithm, device)
        track = runlog.open_tracker(config)
    run.sft = sft_stage(algorithm, given)
    checkpoint = runlog.begin(run, given)
    log = runlog.open_log(config, track)
    outlive_readers()
    try:
        before, after = train(run, log, checkpoint, runlog.heed_signals())
    except (KeyboardInterrupt, OSError, SafetensorError):    # the last two: a full disk
        runlog.say_how_to_resume(config.out)
        raise
    runlog.last_words(run, before, after)


def load_run(config: Config, algorithm: Algorithm, device: torch.device) -> Run:
    """Read and check everything the run needs."""
    reward = load_reward(config.reward, config.correct_at, config.answer_format)
    shape = read_config(config.model)
    tokenizer = load_tokenizer(
        config.model, config.answer_format, config.instruction, config.chat_template_args,
        config.stop_token)
    limits = Limits(config.max_new_tokens, shape.max_position_embeddings, shape.vocab_size)

    notes, held_out_notes = Notes(config.strict), Notes(config.strict)
    problems = read_problems(config.data, config.answer_format, config.answer_only_gold, notes)
    problems = prepare(problems, tokenizer, limits, reward, notes)
    held_out = []
    if config.eval_data:
        held_out = read_problems(config.eval_data, config.answer_format, notes=held_out_notes)
        held_out = held_out[:config.eval_limit or None]
        held_out = prepare(held_out, tokenizer, limits, reward, held_out_notes)
    needs_gold = algorithm.train_on == "gold" or algorithm.sft_share
    if needs_gold and all(p.gold_ids is None for p in problems):
        first = f" ({notes.lines['gold_not_used'][0]})" if notes.counts["gold_not_used"] else ""
        raise InputError(f"--algo {config.algo} trains on gold, and {config.data} has none that "
                         f"can be used{first}")

    dtype = pick_dtype(config.dtype, device)
    warn_if_too_large(config, algorithm, shape, problems, device, dtype)
    master, policy = load_master_and_policy(config, device, dtype)
    for model in (master, policy):
        model.gradient_checkpointing = config.gradient_checkpointing
    reference = None
    if algorithm.needs_reference:
        reference = load_model(config.model, device, policy.dtype)
    optimizer = torch.optim.AdamW(
        master.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay,
        fused=True)
    return Run(
        config, algorithm, master, policy, optimizer, reference=reference, tokenizer=tokenizer,
        problems=problems, held_out=held_out, notes=notes, held_out_notes=held_out_notes,
        reward=reward)


# ---- The loop ------------------------------------------------------------------------------------

def train(run: Run, log, checkpoint: str | None = None, stopping=lambda: False):
    """The whole run, or the rest of it after `checkpoint`. Returns held-out accuracy before and
    after (None without held-out problems).

    log(kind, record) writes a line. Once stopping() is true, the step is finished and saved, and
    KeyboardInterrupt raised."""
    record = Record(run, log, checkpoint, stopping)    # evaluates, or loads the checkpoint
    for step in record.steps():
        stage = stage_of(run, step)
        for param_group in run.optimizer.param_groups:
            param_group["lr"] = learning_rate(step, run.config)

        rollouts, items = collect(stage, step, record.state)
        record.tick("sample")
        learned = learn(stage, items)
        record.tick("update")

        record.measure(rollouts, items, learned)
        record.evaluate_if_due()
        record.write()
        record.save_if_due()
        record.end_if_need_be()
    return record.state.before, record.state.after


def stage_of(run: Run, step: int) -> Run:
    """The run; in its first steps (--sft-share) with SFT in place of its algorithm."""
    if step < sft_steps_of(run.algorithm, run.config):
        return replace(run, algorithm=run.sft)
    return run


# ---- The groups of a step ------------------------------------------------------------------------

def collect(run: Run, step: int, state: State) -> tuple[list[Group], list[Item]]:
    """This process's part of the step: groups as they were sampled, and items to train on.

    Items have gold put in. An item whose advantages are 0 is not learned from, but counts in the
    totals. SFT samples nothing, and a problem without gold makes no item. In RFT a problem without
    a right response makes none.

    Dynamic sampling (DAPO, arXiv 2503.14476, eq. 11) sets aside groups all right or all wrong, and
    samples further problems in their place, in `max_tries` rounds at most. If some are missing
    still, the latest of those set aside fill up, with advantages 0. (A virtual reward, as NGRPO's,
    gives contrast to groups all wrong: they stay.)"""
    config = run.config
    if run.algorithm.train_on == "gold":
        indices = next_problems(config.prompts, len(run.problems), state, config.seed)
        chosen = parallel.my_part([(i, run.problems[n]) for i, n in enumerate(indices)])
        return [], [Item(i, p, gold_group(p.prompt, p.gold_ids), torch.ones(1))
                    for i, p in chosen if p.gold_ids is not None]

    dynamic = run.algorithm.resample == "dynamic"
    no_contrast = {0, config.group_size}    # how many responses are right
    if run.algorithm.virtual_right != "never":
        no_contrast = {config.group_size}
    rollouts, kept, spare = [], [], []
    tried = filled = 0
    for _ in range(run.algorithm.max_tries if dynamic else 1):
        indices = next_problems(config.prompts - filled, len(run.problems), state, config.seed)
        groups, items = sample_and_grade(run, step, indices, tried, state)
        tried += len(indices)
        rollouts += groups
        for item in items:
            right = int(item.group.correct.sum())    # gold among them
            if dynamic and right in no_contrast:
                # No contrast in correctness: zero advantage, even if the overlong penalty made
                # rewards differ.
                spare.append(replace(item, advantages=torch.zeros_like(item.advantages)))
            else:
                kept.append(item)
        [filled] = parallel.all_sum(len(kept))
        if filled == config.prompts:
            break
    if dynamic:
        kept = renumber(kept, spare, config.prompts)
    return rollouts, kept


def next_problems(count: int, size: int, state: State, seed: int) -> list[int]:
    """Indices of the next `count` of `size` problems: each epoch in a new order, with nothing left
    out at its end. Moves the state on.

    With history resampling (SRPO) an epoch leaves out the problems that were solved before it
    began. If every problem is solved, none is left out."""
    chosen = []
    while len(chosen) < count:
        dropped = set(state.dropped)
        order = random.Random(f"{seed}/{state.epoch}").sample(range(size), size)
        order = [n for n in order if n not in dropped]
        if state.taken >= len(order):
            # Start the next epoch here, not at the end of the last step, so that `solved` already
            # has the last step's results.
            state.epoch += 1
            state.taken = 0
            state.dropped = state.solved if len(state.solved) < size else []
            continue
        part = order[state.taken:state.taken + count - len(chosen)]
        chosen += part
        state.taken += len(part)
    return chosen


def sample_and_grade(run: Run, step: int, indices: list[int], first: int, state: State):
    """Groups of some problems, as sampled and graded, and the item made of each. `indices` are the
    problems', for all processes; their positions in the step begin at `first`."""
    config, algorithm = run.config, run.algorithm
    mine = parallel.my_part([(first + i, n, run.problems[n]) for i, n in enumerate(indices)])
    # A random stream for each position, not each problem, which may come twice in a step.
    sampled = sample(
        run.policy, [p.prompt for *_, p in mine], config.group_size, config.max_new_tokens,
        temperature=config.temperature, stop_ids=run.tokenizer.stop_ids, seed=(config.seed, step),
        prompt_ids=[position for position, *_ in mine], max_rows=config.rows or None)

    groups, items, outcomes = [], [], []
    for group, (position, index, p) in zip(sampled, mine):
        group = grade_group(group, p, run.tokenizer, run.reward)
        penalty = overlong_penalty(group.lengths, config.max_new_tokens, algorithm.overlong)
        group = replace(group, rewards=group.rewards + penalty)
        groups.append(group)
        outcomes.append((index, bool(group.correct.all())))
        if p.gold_ids is not None:
            # A third number in the seed: another stream than the sampler's
            generator = prompt_generator((config.seed, step, 1), position, 0)
            group = substitute_gold(group, p.gold_ids, algorithm, generator, p.gold_reward)
        if algorithm.scale == "mean" and group.rewards.min() < 0:
            raise InputError(f"--scale mean: the reward gave {group.rewards.min():g}, and it "
                             "divides by the mean reward; rewards must be 0 or more")
        advantages = advantages_of(group, algorithm)
        if algorithm.train_on == "right":    # SFT on what is right: rollouts and gold
            group = only_right(group)
            advantages = torch.ones(len(group.lengths))
        if len(advantages) > 0:
            items.append(Item(position, p, group, advantages))
    if algorithm.resample == "history":
        outcomes = sum(parallel.all_gather(outcomes), [])
        missed = {n for n, right in outcomes if not right}    # a problem may come twice
        state.solved = sorted({*state.solved, *(n for n, _ in outcomes)} - missed)
    return groups, items


def only_right(group: Group) -> Group:
    """The right rows of a group, gold among them: (G,) -> (number right,), which may be 0."""
    columns = {name: x[group.correct] for name, x in vars(group).items() if name != "prompt"}
    return Group(group.prompt, **columns)


def renumber(kept: list[Item], spare: list[Item], count: int) -> list[Item]:
    """Positions 0 … count − 1 for those kept, filled up with the latest spare ones. Over all
    processes, because the position decides which update a group belongs to."""
    positions = lambda items: sum(parallel.all_gather([i.position for i in items]), [])
    order = sorted(positions(kept))
    order += sorted(positions(spare), reverse=True)[:count - len(order)]
    renumbered = {position: i for i, position in enumerate(order)}
    return [replace(item, position=renumbered[item.position])
            for item in [*kept, *spare] if item.position in renumbered]


# ---- The updates of a step -----------------------------------------------------------------------

def learn(run: Run, items: list[Item]) -> Learned:
    """All updates of a step, each on its minibatch: (nearly) equal parts of the step's groups, in
    order. Each group is used in exactly one update.

    π_old of later minibatches is scored here, before the first update moves the weights. The first
    needs none: there the policy is π_old, and `backward` detaches its logprobs. Nor do SFT and RFT,
    whose ratio is 1 by definition."""
    config = run.config
    minibatches = [[] for _ in range(config.updates)]
    for item in items:
        minibatches[item.position * config.updates // config.prompts].append(item)
    if run.algorithm.train_on == "rollouts":
        later = [i for part in minibatches[1:] for i in part if i.has_contrast]
        for item, logprobs in zip(later, score(run, run.policy, later)):
            item.old_logprobs = logprobs
    if run.algorithm.needs_reference:
        live = [i for i in items if i.has_contrast]
        for item, logprobs in zip(live, score(run, run.reference, live)):
            item.ref_logprobs = logprobs

    learned = Learned(Counter(), [], None)
    for minibatch in minibatches:
        sums, norm = update(run, minibatch)
        learned.sums.update(sums)    # a Counter's update adds
        learned.norms.append(norm)
        if runlog.is_bad(norm) and learned.suspect is None:
            learned.suspect = next((i for i in minibatch if i.has_contrast), None)
    return learned


@torch.no_grad()
def score(run: Run, model: Transformer, items: list[Item]) -> list[torch.Tensor]:
    """Logprobs (G, T) of each group's responses under a model, on the CPU, without gradient."""
    rows_per_pass = run.config.rows_per_pass
    scores = []
    for part in micro_batches(items, rows_per_pass):
        prompts = [i.group.prompt for i in part]
        passes = split_into_passes(part, rows_per_pass, model.device)
        if len(passes) > 1:
            prompts = encode_prompts(model, prompts)
        logprobs = stack_rows([
            score_responses(model, prompts, rows.prompt_of, rows.responses, rows.lengths,
                            run.scoring_temperature)[0].cpu()
            for rows in passes])
        # A pass may be wider or narrower than a group: back to the group's own T.
        for item, x in zip(part, logprobs.split([len(i.group.lengths) for i in part])):
            T = item.group.responses.shape[1]
            scores.append(torch.nn.functional.pad(x, (0, max(0, T - x.shape[1])))[:, :T])
    return scores


def update(run: Run, items: list[Item]) -> tuple[Counter, float | None]:
    """One optimizer step. Returns sums for the metrics, and the gradient norm before clipping, or
    None if no group has contrast.

    `items` are this process's. Totals count every row and token of all processes' groups. A group
    without contrast has no gradient and costs nothing, but counts. If no group has any, weights and
    moments stay as they are: momentum must not move them. Nor is there a step on a gradient that is
    not finite."""
    config = run.config
    live = [i for i in items if i.has_contrast]
    rows = sum(len(i.group.lengths) for i in items)
    tokens = sum(int(i.group.lengths.sum()) for i in items)
    total_rows, total_tokens, total_live = parallel.all_sum(rows, tokens, len(live))
    sums = Counter()
    if total_live == 0:
        return sums, None
    parts = micro_batches(live, config.rows_per_pass)
    idle = parallel.idle_passes(run.master, count_passes(parts, config.rows_per_pass))
    for part in parts:
        sums.update(backward(run, part, total_rows, total_tokens))
    values = torch.stack(list(sums.values())).tolist() if sums else []    # one look at the device
    sums = Counter(dict(zip(sums, values)))
    parallel.finish_backward(run.master, idle)
    norm = torch.nn.utils.clip_grad_norm_(run.master.parameters(), config.max_grad_norm)
    norm = float(parallel.gather_shards(norm))
    if math.isfinite(norm):
        run.optimizer.step()
        refresh_policy(run.policy, run.master)
    run.optimizer.zero_grad(set_to_none=True)
    return sums, norm


def backward(run: Run, items: list[Item], total_rows: int, total_tokens: int) -> Counter:
    """Add the gradient of some whole groups to the master's. Returns sums for the metrics, which
    stay on the device.

    If the groups have more than `rows_per_pass` rows, the prompt runs apart, and the rows a few at
    a time (see logprobs.Prefix; skip `apart` at first reading): the gradient of a single pass, with
    the memory of a few rows. With --shard, every process must make the same passes, so the prompt
    runs again in each."""
    config, algorithm = run.config, run.algorithm
    sharded = parallel.is_sharded(run.master)
    model = run.master if sharded else run.policy    # if sharded, FSDP needs the passes itself
    loss_of = pair_loss if algorithm.objective == "pairs" else policy_loss
    passes = split_into_passes(items, config.rows_per_pass, model.device)
    if algorithm.objective == "pairs" and (len(items), len(passes)) != (1, 1):
        raise ValueError("backward: a pair's loss needs both its rows, and no other group's: "
                         "rows_per_pass must be the group size")
    prompts = [i.group.prompt for i in items]
    apart = len(passes) > 1 and not sharded
    if apart:
        prefix = encode_prompts(model, prompts)
        prompts = prefix.cut()    # from here on a Prefix, no list

    sums = Counter()
    for rows in passes:
        logprobs, entropy = score_responses(                                         # (N, T)
            model, prompts, rows.prompt_of, rows.responses, rows.lengths, run.scoring_temperature)
        old_logprobs = rows.old_logprobs
        if old_logprobs is None:
            old_logprobs = logprobs.detach()
        loss, metrics = loss_of(
            logprobs, old_logprobs, rows.advantages, rows.mask, algorithm,
            total_rows=total_rows, total_tokens=total_tokens,
            max_new_tokens=config.max_new_tokens, is_gold=rows.is_gold,
            ref_logprobs=rows.ref_logprobs)
        loss.backward()    # into the master's gradients, through support/policy.py if it is a copy
        own = rows.mask & ~rows.is_gold[:, None]
        metrics["loss"] = loss.detach()
        metrics["entropy"] = torch.where(own, entropy, 0.0).sum()
        if run.scoring_temperature == config.temperature:    # else more than rounding differs
            metrics["mismatch"] = torch.where(own, rows.logprobs - old_logprobs, 0.0).abs().sum()
        sums.update({name: x.double() for name, x in metrics.items()})    # a Counter's update adds
    if apart:
        prefix.backward(prompts)
    return sums


if __name__ == "__main__":
    exit_cleanly(lambda: parallel.run_distributed(main))
