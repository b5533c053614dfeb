"""What a run says: the screen, run.json, and a line of metrics and a group of samples each step.

`run` is a train.Run, an item a train.Item, `learned` a train.Learned.
"""
from __future__ import annotations

import atexit
import glob
import hashlib
import importlib
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from typing import NamedTuple

import tokenizers
import torch
from tqdm import tqdm

from gcpo import Algorithm, Group
from support import parallel
from support.checkpoint import (
    checkpoint_to_resume,
    cut_log,
    newest_checkpoint,
    refuse_changes,
    sha256,
)
from support.common import InputError, as_flags, one_line, read_json, remove, written_whole
from support.estimate import estimate
from support.folders import copy_tokenizer
from support.lora import LowRankMaster
from support.options import Config, as_command, record_of, run_name


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# ---- The beginning and the end -------------------------------------------------------------------

def begin(run, given: dict) -> str | None:
    """Say what the run is, on the screen and in run.json. Returns the checkpoint that it resumes.

    `given` are the flags that were given by hand. Raises InputError if a setting has changed."""
    out = run.config.out
    first = parallel.rank() == 0
    settings = record_of(run)
    parallel.refuse_difference({**settings, "code": code_digest()})
    checkpoint = None
    if run.config.resume:
        refuse_changes(out, settings, {**asdict(Algorithm("")), **asdict(Config())})
        checkpoint = checkpoint_to_resume(out)
    os.makedirs(out, exist_ok=True)
    if not first:
        return checkpoint
    warn(run)
    command = as_command(run.config, given)
    announce(run, command)
    if run.config.resume:
        step, since = -1, "from its beginning: it has no checkpoint yet"
        if checkpoint:
            step = read_json(os.path.join(checkpoint, "state.json"))["step"]
            since = f"after step {step}"
        print(f"resuming {out} {since}")
        for kind in ("metrics", "samples"):
            path = os.path.join(out, f"{kind}.jsonl")
            if os.path.exists(path):
                cut_log(path, step)
    # The model folder may go while we run. (What lies there may be of a run that could not begin.)
    remove(os.path.join(out, "tokenizer"))
    copy_tokenizer(run.config.model, os.path.join(out, "tokenizer"))
    if not run.config.resume:
        with written_whole(os.path.join(out, "run.json")) as f:
            json.dump(run_record(run, settings, command), f, indent=2)
    return checkpoint


def warn(run) -> None:
    """Say what may not be as one thinks: a slow precision, no gold, held-out questions in the data.
    """
    data, name = run.config.data, run.algorithm.name
    slow = run.master.device.type == "cuda" and run.policy.dtype == torch.float32
    if slow and run.config.updates > 1 and run.algorithm.level == "sequence":
        print("note: with several --updates a sequence ratio needs float32, and on a GPU that is "
              "several times slower than bfloat16; --updates 1, --level token or wider clip "
              "ranges with --dtype bfloat16 avoid it", file=sys.stderr)
    if run.algorithm.gold_when != "never" and all(p.gold_ids is None for p in run.problems):
        why = "--answer-only-gold makes gold of bare answers"
        if run.notes.counts["gold_not_used"]:
            first = run.notes.lines["gold_not_used"][0]
            why = f"none of its golds can be used; first: {first}"
        print(f"warning: no problem of {data} has gold, so this run is {name} without it; {why}",
              file=sys.stderr)
    shared = {str(p.question) for p in run.problems} & {str(p.question) for p in run.held_out}
    if shared:
        print(f"warning: {len(shared)} of the held-out questions are in {data} too, one is "
              f"{min(shared)[:60]!r}", file=sys.stderr)


def announce(run, command: str) -> None:
    """The run as one command, its size, and what is wrong with its files."""
    model, device = run.master.config.model_type, run.master.device
    parameters = sum(p.numel() for p in run.policy.parameters())
    trained = sum(p.numel() for p in run.master.parameters())
    part = f" ({trained / 1e6:.2f} M trained)" if trained < parameters else ""
    with_gold = sum(p.gold_ids is not None for p in run.problems)
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    dtype = str(run.policy.dtype).removeprefix("torch.")
    need = estimate(
        run.config, run.algorithm, run.policy.config, run.problems, device, run.policy.dtype)
    stops = run.tokenizer.stop_tokens
    ends = f"; responses end with {' or '.join(stops)}" if len(stops) > 1 else ""
    print(command)
    print(f"{run_name(run.config)}: {model}, {parameters / 1e6:.2f} M parameters{part}, "
          f"{device}{threads}, {dtype}, about {need.total / 2**30:.1f} GiB; "
          f"{len(run.problems)} problems, {with_gold} with gold; {len(run.held_out)} held out"
          f"{ends}")
    for line in run.notes.summary():
        print(f"note: {line}")
    for line in run.held_out_notes.summary():
        print(f"note, held out: {line}")


def run_record(run, settings: dict, command: str) -> dict:
    """run.json."""
    return {
        "command": command,
        "config": asdict(run.config),
        "settings": settings,
        "algorithm": asdict(run.algorithm),
        "parameters": sum(p.numel() for p in run.policy.parameters()),
        "trained_parameters": sum(p.numel() for p in run.master.parameters()),
        "device": str(run.master.device),
        "dtype": str(run.policy.dtype),
        "threads": torch.get_num_threads(),
        "problems": len(run.problems),
        "with_gold": sum(p.gold_ids is not None for p in run.problems),
        "notes": run.notes.as_json(),
        "held_out": len(run.held_out),
        "held_out_notes": run.held_out_notes.as_json(),
        "git": git_commit(),
        "processes": parallel.world(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenizers": tokenizers.__version__,
    }


def git_commit() -> str | None:
    """Of the code that runs, if it lies in a git repository."""
    command = ["git", "-C", ROOT, "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def code_digest() -> str:
    """Of the program's files: processes on several machines must run the same."""
    files = sorted(glob.glob(f"{glob.escape(ROOT)}/*.py") +
                   glob.glob(f"{glob.escape(ROOT)}/support/*.py"))
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def say_how_to_resume(out: str) -> None:
    """The last words of a run that was stopped."""
    if parallel.rank() > 0:
        return
    saved = newest_checkpoint(out)
    model = f"the model so far is {saved}/model; " if saved else ""
    print(f"\nstopped; {model}to go on: the same command with --resume --out {shlex.quote(out)}",
          file=sys.stderr)


def last_words(run, before: float | None, after: float | None) -> None:
    """What came out, where it is, and what one might do next."""
    if parallel.rank() > 0:
        return
    config = run.config
    python = sys.orig_argv[0]  # as it was called: .venv/bin/python
    model = os.path.join(config.out, "model")
    if before is not None:
        k = config.eval_samples
        how = "greedy" if k == 1 else f"{k} samples each"
        print(f"held-out accuracy ({len(run.held_out)} problems, {how}): before {before:.1%}, "
              f"after {after:.1%}")
    print(f"model    {model}")
    print(f"metrics  {os.path.join(config.out, 'metrics.jsonl')}")
    print(f"samples  {os.path.join(config.out, 'samples.jsonl')}")
    print(f"plot     {shlex.join([python, 'plot.py', config.out])}")
    if config.eval_data:
        settings = {"model": model, "data": config.eval_data,
                    "max_new_tokens": config.max_new_tokens}
        for name in ("answer_format", "instruction", "chat_template_args", "stop_token", "reward",
                     "correct_at"):
            if getattr(config, name) != getattr(Config(), name):
                settings[name] = getattr(config, name)
        print(f"evaluate {shlex.join([python, 'evaluate.py', *as_flags(settings)])}")
    if config.model == os.path.join(config.out, "toy", "model"):
        has_gold = run.algorithm.gold_when != "never" or run.algorithm.train_on == "gold"
        other, how = ("grpo", "without") if has_gold else ("gcpo", "with")
        print(f"next     {python} train.py --algo {other}   the same weights and budget, {how} "
              "gold")
        print(f"         {python} train.py --model DIR --data FILE   your own model and problems")


# ---- While it runs -------------------------------------------------------------------------------

def open_log(config: Config, track=None):
    """log(kind, record) adds a line to OUT/metrics.jsonl or samples.jsonl, and returns once it is
    on the disk. The first process writes. track(record), if there is one, gets the metrics too."""
    if parallel.rank() > 0:
        return lambda kind, record: None
    out = config.out
    files = {}
    for kind in ("metrics", "samples"):
        files[kind] = open(os.path.join(out, f"{kind}.jsonl"), "a", encoding="utf-8")

    def log(kind, record):
        finite = {}
        for name, value in record.items():    # JSON knows no NaN
            is_nan = isinstance(value, float) and not math.isfinite(value)
            finite[name] = None if is_nan else value
        files[kind].write(json.dumps(finite, ensure_ascii=False) + "\n")
        files[kind].flush()
        os.fsync(files[kind].fileno())
        if kind == "metrics" and track:
            track(record)

    return log


def open_tracker(config: Config):
    """track(record) sends a step's metrics to --track; None without it. If that fails, the run goes
    on without. Raises InputError if it does not start."""
    if not config.track or parallel.rank() > 0:
        return None
    try:
        send = to_tensorboard(config) if config.track == "tensorboard" else to_program(config)
    except Exception as e:
        raise InputError(f"--track {config.track}: it does not start ({one_line(e)})") from None
    broken = []

    def track(record):
        numbers = {name: value for name, value in record.items() if type(value) in (int, float)
                   and name != "step" and math.isfinite(value)}
        if not broken:
            try:
                send(numbers, record["step"])
            except Exception as e:    # of others' code, and no reason to lose a run
                broken.append(e)
                print(f"warning: --track {config.track}: {one_line(e)}; going on without it",
                      file=sys.stderr)

    return track


def to_tensorboard(config: Config):
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(os.path.join(config.out, "tensorboard"))

    def send(numbers, step):
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send


def to_program(config: Config):
    """wandb, or trackio, which is like it."""
    program = importlib.import_module(config.track)
    program.init(project="gcpo", name=os.path.basename(config.out), config=asdict(config))
    atexit.register(program.finish)
    return lambda numbers, step: program.log(numbers, step=step)


def heed_signals():
    """From now on the first SIGINT or SIGTERM asks to stop, and stopping(), which is returned,
    says so. A second one stops at once."""
    asked = []

    def ask(*_):
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        if parallel.rank() == 0:
            tqdm.write("stopping after this step (once more: at once, back to the last checkpoint)",
                       file=sys.stderr)

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return lambda: bool(asked)


def progress_bar(run, done: int):
    """The steps from `done` on, with a bar."""
    steps = run.config.steps
    # Redraw a bar that goes into a file every 30 seconds only.
    pace = {} if sys.stderr.isatty() else {"mininterval": 30}
    return tqdm(
        range(done, steps), desc=run.algorithm.name, unit="step", initial=done, total=steps,
        dynamic_ncols=True, disable=parallel.rank() > 0, **pace)


def show_on(bar, metrics: dict) -> None:
    speed = metrics["time/tokens_per_second"]
    words = [f"gold {metrics['gold/share']:.2f}", f"{speed:.0f} tokens/s"]
    if "reward/mean" in metrics:
        words.insert(0, f"reward {metrics['reward/mean']:.3f}")
    bar.set_postfix_str(", ".join(words))


def warn_of_cut_off(run, metrics: dict) -> bool:
    """Say it if most groups are wrong because no rollout came to an end. Returns whether it did."""
    share = metrics.get("groups/cut_off", 0)
    if share <= 0.5:
        return False
    if parallel.rank() == 0:
        tqdm.write(
            f"warning: in {share:.0%} of step {metrics['step']}'s groups all rollouts are wrong "
            f"and none came to its end within --max-new-tokens {run.config.max_new_tokens}; the "
            "limit may be the problem, and gold cannot teach what it cuts off", file=sys.stderr)
    return True


# ---- Metrics (docs/metrics.md explains each) -----------------------------------------------------

class StepReport(NamedTuple):
    """A step, over all processes."""
    metrics: dict
    sample: dict      # the line of samples.jsonl
    tokens: int       # sampled, or trained on where none were
    stop: bool        # whether a process was asked to stop


def gather_step(run, step: int, rollouts: list[Group], items: list, learned, stopping: bool):
    """A StepReport of what this and the other processes did."""
    sample = sample_record(step, items, run.tokenizer)
    bad = None
    if learned.suspect:
        bad = sample_record(step, [learned.suspect], run.tokenizer) | {"gradient": "not finite"}
    tokens = sum(int(g.lengths.sum()) for g in rollouts or [i.group for i in items])
    mine = [rollout_numbers(rollouts, items), learned.sums, tokens, bad, stopping]
    all_numbers, all_sums, all_tokens, all_bad, all_stopping = zip(*parallel.all_gather(mine))
    numbers = {name: [x for part in all_numbers for x in part[name]] for name in all_numbers[0]}
    sums = Counter()
    for part in all_sums:
        sums.update(part)
    return StepReport(
        metrics={"step": step, **rollout_metrics(numbers), **update_metrics(sums, learned.norms)},
        sample=next((record for record in all_bad if record), sample),
        tokens=sum(all_tokens),
        stop=any(all_stopping))


def is_bad(norm: float | None) -> bool:
    """Whether an update found a gradient that was not finite (None: it found no contrast)."""
    return norm is not None and not math.isfinite(norm)


def mean(values) -> float:
    values = [float(v) for v in values]
    return sum(values) / len(values) if values else math.nan


def rollout_numbers(rollouts: list[Group], items: list) -> dict[str, list[float]]:
    """A number per group: of the rollouts as sampled, before any gold; of the groups trained on,
    whether gold came, and whether they have contrast."""
    return {
        "gold": [float(i.group.is_gold.any()) for i in items],
        "contrast": [float(i.has_contrast) for i in items],
        "reward": [float(g.rewards.mean()) for g in rollouts],
        "right": [float(g.correct.float().mean()) for g in rollouts],
        "length": [float(g.lengths.float().mean()) for g in rollouts],
        "cut": [float(1 - g.finished.float().mean()) for g in rollouts],
    }


def rollout_metrics(numbers: dict[str, list[float]]) -> dict:
    right = numbers["right"]
    metrics = {"gold/share": mean(numbers["gold"])}
    if right:
        metrics |= {
            "groups/sampled": len(right),
            "reward/mean": mean(numbers["reward"]),
            "reward/correct": mean(right),
            "groups/all_wrong": mean(r == 0 for r in right),
            "groups/mixed": mean(0 < r < 1 for r in right),
            "groups/all_right": mean(r == 1 for r in right),
            "groups/contrast": mean(numbers["contrast"]),
            "groups/cut_off": mean(r == 0 and c == 1 for r, c in zip(right, numbers["cut"])),
            "length/mean": mean(numbers["length"]),
            "length/truncated": mean(numbers["cut"]),
        }
    return metrics


def update_metrics(sums: Counter, norms: list[float | None]) -> dict:
    """Sums over tokens become means: over the policy's own tokens, and over gold's. What was not
    summed (`ref_kl` without --kl-coef, for one) or had no tokens is NaN."""
    def per_token(name, tokens):
        return sums[name] / sums[tokens] if name in sums and sums[tokens] else math.nan

    return {
        "update/loss": sums["loss"] / len(norms),
        "update/grad_norm": mean(n for n in norms if n is not None),
        "update/skipped": mean(n is None for n in norms),
        "update/not_finite": mean(is_bad(n) for n in norms),
        "policy/ratio": per_token("policy_ratio", "policy_tokens"),
        "policy/clip_fraction": per_token("policy_clipped", "policy_tokens"),
        "policy/approx_kl": per_token("approx_kl", "policy_tokens"),
        "policy/entropy": per_token("entropy", "policy_tokens"),
        "policy/ref_kl": per_token("ref_kl", "policy_tokens"),
        "sampler/mismatch": per_token("mismatch", "policy_tokens"),
        "gold/logprob": per_token("gold_logprob", "gold_tokens"),
        "gold/ratio": per_token("gold_ratio", "gold_tokens"),
        "gold/clip_fraction": per_token("gold_clipped", "gold_tokens"),
    }


def sample_record(step: int, items: list, tokenizer) -> dict:
    """One whole group of the step as text: the first that got gold, else the first."""
    if not items:
        return {"step": step}
    item = next((i for i in items if i.group.is_gold.any()), items[0])
    group = item.group
    lengths = group.lengths.tolist()
    rows = []
    for row, n in enumerate(lengths):
        rows.append({
            "text": tokenizer.decode(group.responses[row, :n]),
            "tokens": tokenizer.pieces(group.responses[row, :n]),
            "logprobs": [round(x, 3) if math.isfinite(x) else None
                         for x in group.logprobs[row, :n].tolist()],
            "advantage": item.advantages[row].item(),
            "rewards": group.rewards[row].item(),
            "correct": group.correct[row].item(),
            "is_gold": group.is_gold[row].item(),
            "finished": group.finished[row].item(),
            "lengths": n,
        })
    problem = item.problem
    return {"step": step, "source": problem.source, "question": problem.question,
            "reference": problem.answer, "responses": rows}


class Bf16Change:
    """How much of the weights a bf16 forward pass can see: the share whose bf16 value is not the
    start's. Keeps 2 bytes a parameter; with low ranks nothing, and looks at the merged matrices."""
    def __init__(self, master: torch.nn.Module):
        self.master = master
        if isinstance(master, LowRankMaster):
            self.weights, self.start = master.merged_and_frozen()
        else:
            self.weights = list(master.parameters())
            self.start = [self.rounded(p) for p in self.weights]

    @staticmethod
    def rounded(p) -> torch.Tensor:
        return parallel.my_shard(p).to(torch.bfloat16, copy=True)

    def share(self) -> float:
        changed = 0
        for p, start in zip(self.weights, self.start):
            changed += int((self.rounded(p) != start.to(torch.bfloat16)).sum())
        size = sum(s.numel() for s in self.start)
        if parallel.is_sharded(self.master):
            changed, size = parallel.all_sum(changed, size)
        return changed / size
