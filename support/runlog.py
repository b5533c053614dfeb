"""What a run says: metrics, samples, run.json, the screen."""
from __future__ import annotations

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

import tokenizers
import torch
from tqdm import tqdm

from data import Problem, Tokenizer
from gcpo import Algorithm, Group
from model import Transformer
from support import parallel
from support.checkpoint import cut_log
from support.common import read_json, written_whole
from support.folders import copy_tokenizer
from support.options import Config, as_command, estimated_bytes


def mean(values) -> float:
    values = [float(v) for v in values]
    return sum(values) / len(values) if values else math.nan


def gather_step(step: int, rollouts: list[Group], items: list, sums: Counter, norms: list[float | None], bad,
                 tokenizer: Tokenizer, stopping: bool) -> tuple[dict, int, dict | None, bool]:
    """Of a step, over all processes: its metrics; how many tokens were sampled, or trained on where none were; the record of a group without
    finite gradient, one it was traced to if there is any; whether a process was asked to stop."""
    suspect = bad or next((i for i in items if i.has_contrast), None) if any(n is not None and not math.isfinite(n) for n in norms) else None
    record = suspect and sample_record(step, [suspect], tokenizer) | {"gradient": "not finite", "traced_to_this_group": bad is not None}
    tokens = sum(int(g.lengths.sum()) for g in rollouts or [i.group for i in items])
    numbers, all_sums, all_tokens, records, stops = zip(*parallel.all_gather([rollout_numbers(rollouts, items), sums, tokens, record, stopping]))
    sums = Counter()
    for part in all_sums:
        sums.update(part)
    metrics = {"step": step, **rollout_metrics({name: [x for part in numbers for x in part[name]] for name in numbers[0]}), **update_metrics(sums, norms)}
    return metrics, sum(all_tokens), max((r for r in records if r), key=lambda r: r["traced_to_this_group"], default=None), any(stops)


def rollout_numbers(rollouts: list[Group], items: list) -> dict[str, list[float]]:
    """One number per group, of the rollouts as sampled, before any gold took a place; and whether it did."""
    of = lambda f, groups: [float(f(g)) for g in groups]
    return {"gold": of(lambda i: i.group.is_gold.any(), items), "reward": of(lambda g: g.rewards.mean(), rollouts),
            "right": of(lambda g: g.correct.float().mean(), rollouts), "length": of(lambda g: g.lengths.float().mean(), rollouts), "cut": of(lambda g: 1 - g.finished.float().mean(), rollouts)}


def rollout_metrics(numbers: dict[str, list[float]]) -> dict:
    metrics, right = {"gold/share": mean(numbers["gold"])}, numbers["right"]
    if right:
        metrics |= {"groups/sampled": len(right), "reward/mean": mean(numbers["reward"]), "reward/correct": mean(right), "groups/all_wrong": mean(r == 0 for r in right),
                    "groups/mixed": mean(0 < r < 1 for r in right), "groups/all_right": mean(r == 1 for r in right),
                    "length/mean": mean(numbers["length"]), "length/truncated": mean(numbers["cut"])}
    return metrics


def update_metrics(sums: Counter, norms: list[float | None]) -> dict:
    """Sums over the step's tokens become means: of the policy's own tokens, and of the gold's apart from them."""
    over = lambda name, count: sums[name] / sums[count] if sums[count] else math.nan
    return {
        "update/loss": sums["loss"] / len(norms), "update/grad_norm": mean(n for n in norms if n is not None),
        "update/skipped": mean(n is None for n in norms), "update/not_finite": mean(n is not None and not math.isfinite(n) for n in norms),
        "policy/ratio": over("policy_ratio", "policy_tokens"), "policy/clip_fraction": over("policy_clipped", "policy_tokens"),
        "policy/approx_kl": over("approx_kl", "policy_tokens"), "policy/entropy": over("entropy", "policy_tokens"),
        "policy/ref_kl": over("ref_kl", "policy_tokens") if "ref_kl" in sums else math.nan, "sampler/mismatch": over("mismatch", "policy_tokens"),
        "gold/logprob": over("gold_logprob", "gold_tokens"), "gold/ratio": over("gold_ratio", "gold_tokens"),
        "gold/clip_fraction": over("gold_clipped", "gold_tokens")}


def git_commit() -> str | None:
    """Of the code that runs, if it lies in a git repository."""
    try:
        done = subprocess.run(["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def peak_bytes(device: torch.device) -> float:
    """Most memory in use so far: what PyTorch has allocated on a GPU, else this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def bf16_changed(model: Transformer, start: list[torch.Tensor]) -> float:
    """Share of weights whose value in bf16 differs from the start's: only these can change a bf16 forward pass."""
    changed, size = sum(int((local(p).to(torch.bfloat16) != s).sum()) for p, s in zip(model.parameters(), start)), sum(s.numel() for s in start)
    if parallel.is_sharded(model):
        changed, size = parallel.all_sum(changed, size)
    return changed / size


def local(p: torch.Tensor) -> torch.Tensor:
    """A parameter without its gradient, or this process's shard of it."""
    return p.detach().to_local() if hasattr(p, "to_local") else p.detach()


def sample_record(step: int, items: list, tokenizer: Tokenizer) -> dict:
    """One whole group of the step as text: the first that got gold, else the first."""
    if not items:
        return {"step": step}
    item = next((i for i in items if i.group.is_gold.any()), items[0])
    g, columns = item.group, ("rewards", "correct", "is_gold", "finished", "lengths")
    rows = [{"text": tokenizer.decode(ids[:n]), "advantage": a} | {c: v for c, v in zip(columns, values)} for ids, n, a, *values in
            zip(g.responses, g.lengths.tolist(), item.advantages.tolist(), *(getattr(g, c).tolist() for c in columns))]
    return {"step": step, "source": item.problem.source, "question": item.problem.question, "reference": item.problem.answer, "responses": rows}


def announce(config: Config, algorithm: Algorithm, given: dict, settings: dict, name: str, device, model, compute, problems, held_out, complaints, checkpoint):
    """What the run is, on the screen and in run.json; and logs cut back to where it goes on."""
    with_gold = sum(p.gold_ids is not None for p in problems)
    print(as_command(config, given))
    n = sum(p.numel() for p in model.parameters())
    memory = estimated_bytes(model, compute, algorithm, config, max(len(p.prompt) for p in problems))
    print(f"{name}: {model.config.model_type}, {n / 1e6:.2f} M parameters, {device}" + (f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else "")
          + f", {str(compute.norm.weight.dtype).removeprefix('torch.')}, about {memory / 2**30:.1f} GiB; "
          + f"{len(problems)} problems, {with_gold} with gold; {len(held_out)} held out")
    for line in complaints[:3]:
        print(f"note: {line}; it trains without gold")
    if len(complaints) > 3:
        print(f"note: … and {len(complaints) - 3} more, {len(complaints)} in all")

    if config.resume:
        step = read_json(os.path.join(checkpoint, "state.json"))["step"] if checkpoint else -1
        print(f"resuming {config.out} " + (f"after step {step}" if checkpoint else "from its beginning: it has no checkpoint yet"))
        for kind in ("metrics", "samples"):
            if os.path.exists(os.path.join(config.out, f"{kind}.jsonl")):
                cut_log(os.path.join(config.out, f"{kind}.jsonl"), step)
    else:
        copy_tokenizer(config.model, os.path.join(config.out, "tokenizer"))  # the model folder may go while we run
        with written_whole(os.path.join(config.out, "run.json")) as f:
            json.dump({"command": as_command(config, given), "config": asdict(config), "settings": settings, "algorithm": asdict(algorithm), "parameters": n,
                       "device": str(device), "dtype": str(compute.norm.weight.dtype), "threads": torch.get_num_threads(), "problems": len(problems),
                       "with_gold": with_gold, "gold_not_used": complaints, "held_out": len(held_out), "git": git_commit(), "processes": parallel.world(),
                       "python": platform.python_version(), "torch": torch.__version__, "tokenizers": tokenizers.__version__}, f, indent=2)


def warn(config: Config, algorithm: Algorithm, problems: list[Problem], held_out: list[Problem], complaints: list[str]) -> None:
    """Of what would make a run's curve mean something else than its name says."""
    if algorithm.gold_when != "never" and all(p.gold_ids is None for p in problems):
        why = f"none of its golds can be used, see the notes; first: {complaints[0]}" if complaints else "--answer-only-gold makes gold of bare answers"
        print(f"warning: no problem of {config.data} has gold, so this run is {algorithm.name} without it; {why}", file=sys.stderr)
    if shared := {str(p.question) for p in problems} & {str(p.question) for p in held_out}:
        print(f"warning: {len(shared)} of the held-out questions stand in {config.data} too, one is {min(shared)[:60]!r}", file=sys.stderr)


def logger(out: str):
    """log(kind, record) adds a line to OUT/metrics.jsonl or samples.jsonl, and returns once it is on the disk. One process writes."""
    if parallel.rank() > 0:
        return lambda kind, record: None
    files = {kind: open(os.path.join(out, f"{kind}.jsonl"), "a", encoding="utf-8") for kind in ("metrics", "samples")}

    def log(kind, record):
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}  # JSON knows no NaN
        files[kind].write(json.dumps(record, ensure_ascii=False) + "\n")
        files[kind].flush()
        os.fsync(files[kind].fileno())
    return log


def heed_signals():
    """From now on the first SIGINT or SIGTERM asks to stop, which the returned function tells; a second one stops at once."""
    asked = []

    def stop(*_):
        if asked:
            raise KeyboardInterrupt
        asked.append(True)
        if parallel.rank() == 0:
            tqdm.write("stopping after this step (once more: at once, back to the last checkpoint)", file=sys.stderr)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    return lambda: bool(asked)


def last_words(config: Config, algorithm: Algorithm, before: float | None, after: float | None, held_out: int, toy: bool) -> None:
    """What came out, where it is, and what one might do next."""
    model_folder = os.path.join(config.out, "model")
    if before is not None:
        k = config.eval_samples
        print(f"held-out accuracy ({held_out} problems, {'greedy' if k == 1 else f'{k} samples each'}): "
              f"before {before:.1%}, after {after:.1%}")
    python = sys.orig_argv[0]  # as it was called: .venv/bin/python
    print(f"model    {model_folder}\nmetrics  {os.path.join(config.out, 'metrics.jsonl')}\nsamples  {os.path.join(config.out, 'samples.jsonl')}")
    print(f"plot     {shlex.join([python, 'plot.py', config.out])}")
    if config.eval_data:
        evaluate_it = [python, "evaluate.py", "--model", model_folder, "--data", config.eval_data, "--max-new-tokens", str(config.max_new_tokens)]
        evaluate_it += ["--instruction", config.instruction] if config.instruction is not None else []
        evaluate_it += ["--answer-format", "boxed"] if config.answer_format == "boxed" else []
        evaluate_it += ["--reward", config.reward, "--correct-at", str(config.correct_at)] if config.reward else []
        print(f"evaluate {shlex.join(evaluate_it)}")
    if toy:
        other = "grpo" if algorithm.name != "grpo" else "gcpo"
        print(f"next     {python} train.py --algo {other}   the same weights and budget, {'without' if other == 'grpo' else 'with'} gold\n"
              f"         {python} train.py --model DIR --data FILE   your own model and problems")
