"""Accuracy of a model on a file of problems, and gold written by a model.

    python evaluate.py --model DIR --data FILE --samples 8 --out completions.jsonl
    python evaluate.py --model DIR --data FILE --samples 8 --keep-correct gold.jsonl

The second writes the problems that were solved, each with its shortest right response as gold:
a larger model's gold for a smaller one. With --explain the model is told the answer, and its way
there becomes the gold, also for problems that it does not solve by itself. train.py evaluates
held-out problems with the same code.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import time

import numpy as np
import torch
from tqdm import tqdm

from data import (
    Limits, Notes, Problem, Tokenizer, grade_group, load_tokenizer, prepare, read_problems)
from grader import Reward, extract_answer, last_number, same
from logprobs import score_responses
from model import Transformer, load_model
from sampler import sample
from support import parallel
from support.common import (
    InputError, exit_cleanly, pick_device, pick_dtype, refuse_blank, refuse_out_of_range,
    refuse_unwritable, written_whole)
from support.cpu import keep_freed_memory
from support.options import load_reward


# Of ExPO (arXiv 2507.02834): what a model says once it knows the answer lies nearer to what it says
# anyway than another's solution, and a problem that it never solves has gold at last.
EXPLAIN = ("The answer is {}. Explain step by step how to find it, as if you did not know it, and "
           "end with it.")


# ---- Completions and their metrics ---------------------------------------------------------------

def complete(
    model: Transformer,
    problems: list[Problem],
    tokenizer: Tokenizer,
    samples: int,
    max_new_tokens: int,
    reward: Reward = Reward(),
    **sampling,
) -> list[list[dict]]:
    """`samples` graded responses to every prepared problem: per problem its completions as records.

    `sampling` are the fields of sampler.Sampling, such as temperature= and seed= (default 0)."""
    sampling = {"seed": 0, "stop_ids": tokenizer.stop_ids, **sampling}
    prompts = [p.prompt for p in problems]
    groups = sample(model, prompts, samples, max_new_tokens, **sampling)
    completions = []
    for problem, group in zip(problems, groups):
        if not group.logprobs.isfinite().all():
            raise InputError(f"the model's probabilities are not finite (on {problem.source}); its "
                             "weights or its config.json make no sense")
        group = grade_group(group, problem, tokenizer, reward)
        records = []
        for row, n in enumerate(group.lengths.tolist()):
            text = tokenizer.decode(group.responses[row, :n])
            answer = extract_answer(problem.opened + text, tokenizer.answer_format)
            correct = group.correct[row].item()
            last = last_number(text) if answer is None else None
            says_it_last = last is not None and same(last, problem.answer)
            records.append({
                "response": text,
                "answer": answer,
                "correct": correct,
                "reward": group.rewards[row].item(),
                "finished": group.finished[row].item(),
                "tokens": n,
                "correct_by_last_number": correct or says_it_last,
            })
        completions.append(records)
    return completions


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold one of the c correct ones
    (arXiv 2107.03374, eq. 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def summarize(completions: list[list[dict]]) -> dict[str, float]:
    """Metrics of what `complete` returned.

    mean: share of correct responses, averaged over problems, and its standard error over problems
    (mean_se). pass@k: unbiased, for k = 1, 2, 4, … up to the number of samples. maj: share of
    problems whose commonest answer is right (the earliest among equals; a response that names no
    answer has no vote). truncated: share of responses without an end. no_answer: share that name no
    answer. last_number: share correct if the last number counted where none is named."""
    samples = len(completions[0])
    right = [sum(r["correct"] for r in records) for records in completions]
    shares = [n / samples for n in right]
    rows = [r for records in completions for r in records]
    mean = lambda values: sum(values) / len(values)
    spread = float(np.std(shares, ddof=1)) if len(shares) > 1 else math.nan
    metrics = {"mean": mean(shares), "mean_se": spread / math.sqrt(len(shares))}
    for k in sorted({min(2**i, samples) for i in range(samples.bit_length() + 1)}):
        metrics[f"pass@{k}"] = mean([pass_at_k(samples, n, k) for n in right])
    metrics["maj"] = mean([majority_is_right(records) for records in completions])
    metrics["truncated"] = mean([not r["finished"] for r in rows])
    metrics["no_answer"] = mean([r["answer"] is None for r in rows])
    metrics["last_number"] = mean([r["correct_by_last_number"] for r in rows])
    metrics["tokens"] = mean([r["tokens"] for r in rows])
    return metrics


def majority_is_right(records: list[dict]) -> bool:
    """Answers that are the same to the grader vote together: 18 and 18 apples."""
    parties = []    # records whose answers are the same, the earliest first
    for record in records:
        answer = record["answer"]
        if answer is None:
            continue
        for party in parties:
            other = party[0]["answer"]
            if answer == other or same(answer, other) or same(other, answer):
                party.append(record)
                break
        else:
            parties.append([record])
    return bool(parties) and max(parties, key=len)[0]["correct"]


def evaluate(*args, **settings) -> tuple[dict[str, float], list[list[dict]]]:
    """`complete` and `summarize`: metrics, and per problem its completions."""
    completions = complete(*args, **settings)
    return summarize(completions), completions


@contextlib.contextmanager
def progress_of_rows(total: int, label: str, show: bool = True):
    """A bar of rows and tokens per second; yields the `progress` that sampling calls."""
    tokens_so_far = 0
    bar = tqdm(total=total, desc=label, unit="row", leave=False, dynamic_ncols=True,
               disable=None if show else True)

    def advance(tokens):
        nonlocal tokens_so_far
        tokens_so_far += tokens
        seconds = max(bar.format_dict["elapsed"], 1e-9)
        bar.update()
        bar.set_postfix_str(f"{tokens_so_far / seconds:.0f} tokens/s", refresh=False)

    with bar:
        yield advance


# ---- Held-out problems of a training run ---------------------------------------------------------

def evaluate_held_out(run, step: int) -> dict:
    """Metrics on the held-out problems of a train.Run (docs/metrics.md); empty without any. With
    several processes each takes its part."""
    config = run.config
    if not run.held_out:
        return {}
    began = time.perf_counter()
    first = parallel.rank() == 0
    mine = parallel.my_part(list(enumerate(run.held_out)))
    problems = [p for _, p in mine]
    total = len(problems) * config.eval_samples
    with progress_of_rows(total, "evaluating", show=first) as progress:
        completions = complete(
            run.policy, problems, run.tokenizer, config.eval_samples, config.max_new_tokens,
            run.reward, temperature=float(config.eval_samples > 1), seed=config.seed,
            prompt_ids=[i for i, _ in mine], max_rows=config.rows or None, progress=progress)
    metrics = summarize(parallel.interleave(parallel.all_gather(completions)))
    golds = [(i, p) for i, p in mine if p.gold_ids is not None]
    logprobs = gold_logprobs(run.policy, [p for _, p in golds], config.rows_per_pass)
    pairs = parallel.all_gather([(i, x) for (i, _), x in zip(golds, logprobs)])
    in_order = [x for _, x in sorted(pair for part in pairs for pair in part)]
    metrics["gold_logprob"] = sum(in_order) / len(in_order) if in_order else math.nan
    if first:
        tqdm.write(f"step {step}: held-out accuracy {metrics['mean']:.1%}")
    metrics = {f"eval/{name}": value for name, value in metrics.items()}
    return metrics | {"time/eval": time.perf_counter() - began}


@torch.no_grad()
def gold_logprobs(model: Transformer, problems: list[Problem], rows_per_pass: int) -> list[float]:
    """Each gold's mean log-probability per token, at temperature 1."""
    means = []
    for first in range(0, len(problems), rows_per_pass):
        part = problems[first:first + rows_per_pass]
        golds = [p.gold_ids for p in part]
        lengths = torch.tensor([len(g) for g in golds], device=model.device)
        responses = torch.nn.utils.rnn.pad_sequence(golds, batch_first=True).to(model.device)
        prompt_of = torch.arange(len(part), device=model.device)
        prompts = [p.prompt for p in part]
        logprobs, _ = score_responses(model, prompts, prompt_of, responses, lengths)    # (n, T)
        means += [float(x[:len(gold)].mean()) for x, gold in zip(logprobs.cpu(), golds)]
    return means


# ---- The command ---------------------------------------------------------------------------------

def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Sample and grade: evaluation of a model, and gold made by it.")
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face model folder")
    add("--data", required=True, help="problems: .jsonl, .jsonl.gz, .json or .parquet")
    add("--samples", type=int, default=1, help="responses per problem")
    add("--temperature", type=float, default=None,
        help="0: greedy (default: 0 with one sample, else 1)")
    add("--top-p", type=float, default=1.0,
        help="sample from the likeliest tokens that make up this mass")
    add("--top-k", type=int, default=0, help="sample from this many likeliest tokens; 0: all")
    add("--max-new-tokens", type=int, default=512, help="longest response")
    add("--limit", type=int, default=0, help="only the first so many problems; 0: all")
    add("--skip", type=int, default=0, help="leave out the first so many problems")
    add("--rows", type=int, default=None,
        help="rows in flight (default: what fits, at most 256 or --samples)")
    add("--seed", type=int, default=0, help="of the sampling")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="auto: bfloat16 where the device is fast at it")
    add("--answer-format", default="hash", choices=("hash", "boxed"),
        help="what the instruction asks for: #### or \\boxed{}")
    add("--instruction", default=None,
        help="text after each question, in place of the format's own")
    add("--strict", action="store_true",
        help="refuse a file with records that would be left out")
    add("--chat-template-args", default=None,
        help="variables for the chat template, as JSON")
    add("--stop-token", default=None,
        help="more tokens that end a response, with blanks between them")
    add("--reward", default=None,
        help="FILE.py:function, (response, answer) -> float, in place of the grader; or "
             "math_verify")
    add("--correct-at", type=float, default=1.0,
        help="reward from which on a response counts as correct")
    add("--out", default=None, help="write every completion here, a JSON line each")
    add("--keep-correct", default=None,
        help="write the problems that were solved here, each with a correct response as its gold")
    add("--explain", action="store_true",
        help="tell the model each answer and ask for the way to it: with --keep-correct, gold for "
             "data that has none")
    return parser


def check(args) -> None:
    """Fill in the temperature. Raises InputError for empty paths, numbers out of range, files that
    could not be written, and several processes."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError("evaluate.py: one process, not torchrun")
    refuse_blank(args, ("model", "data", "reward", "out", "keep_correct", "chat_template_args",
                        "stop_token", "device"))
    least = dict(samples=1, max_new_tokens=1, limit=0, skip=0, top_k=0, temperature=0, rows=1,
                 seed=0, correct_at=-math.inf)
    refuse_out_of_range(args, least)
    if args.temperature is None:
        args.temperature = float(args.samples > 1)
    if args.rows is not None and args.rows < args.samples:
        raise InputError(f"--rows {args.rows}: the samples of a problem are one group, so it must "
                         f"be --samples {args.samples} or more")
    if args.temperature == 0 and (args.top_p < 1 or args.top_k > 0):
        raise InputError("--top-p and --top-k: temperature 0, the default with one sample, takes "
                         "the likeliest token; add --temperature 1")
    if not 0 < args.top_p <= 1:
        raise InputError(f"--top-p {args.top_p}: must be above 0 and at most 1")
    if args.explain and not (args.keep_correct or args.out):
        raise InputError("--explain: the model is told the answers, so this measures nothing; "
                         "write what it says with --keep-correct or --out")
    taken = [os.path.realpath(args.data)]
    for path in (args.out, args.keep_correct):
        if not path:
            continue
        refuse_unwritable(path)
        if os.path.realpath(path) in taken:
            raise InputError(f"{path}: named twice; --data, --out and --keep-correct must be "
                             "different files")
        if os.path.exists(path):
            raise InputError(f"{path}: there is something already, perhaps hours of sampling; name "
                             "another file, or remove it")
        taken.append(os.path.realpath(path))


def main():
    args = flags().parse_args()
    keep_freed_memory()
    check(args)
    device = pick_device(args.device)
    reward = load_reward(args.reward, args.correct_at, args.answer_format)
    notes = Notes(args.strict)
    problems = read_problems(args.data, args.answer_format, notes=notes)
    problems = problems[args.skip:][:args.limit or None]
    if not problems:
        raise InputError(f"{args.data}: no problems left after --skip {args.skip}")
    for problem in problems:
        problem.gold = None    # evaluation needs no gold, so `prepare` need not check it
        if args.explain:
            problem.hint = EXPLAIN.format(problem.answer)
    tokenizer = load_tokenizer(
        args.model, args.answer_format, args.instruction, args.chat_template_args,
        args.stop_token)
    model = load_model(args.model, device, pick_dtype(args.dtype, device))
    shape = model.config
    limits = Limits(args.max_new_tokens, shape.max_position_embeddings, shape.vocab_size)
    problems = prepare(problems, tokenizer, limits, reward, notes)
    for line in notes.summary():
        print(f"note: {line}")

    with progress_of_rows(len(problems) * args.samples, "sampling") as progress:
        metrics, completions = evaluate(
            model, problems, tokenizer, args.samples, args.max_new_tokens, reward,
            temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, seed=args.seed,
            max_rows=args.rows, progress=progress)
    wrote = []
    try:    # first the files: a closed pipe must not lose them
        wrote = write_files(args, problems, completions)
    finally:
        print(f"{len(problems)} problems x {args.samples} samples, "
              f"temperature {args.temperature:g}")
        print_metrics(metrics, args.samples, len(problems))
        print(*wrote, sep="\n", end="\n" if wrote else "")


def write_files(args, problems: list[Problem], completions: list[list[dict]]) -> list[str]:
    """--out and --keep-correct. Returns a line about each."""
    wrote = []
    if args.out:
        rows = [{"question": p.question, "reference": p.answer, **r}
                for p, records in zip(problems, completions) for r in records]
        wrote.append(f"wrote {len(rows)} completions to {write_jsonl(args.out, rows)}")
    if args.keep_correct:
        solved = []
        for p, records in zip(problems, completions):
            good = [r["response"] for r in records if r["correct"] and r["finished"]]
            if good:
                gold = min(good, key=len)
                solved.append({"question": p.question, "answer": p.answer, "gold": gold})
        path = write_jsonl(args.keep_correct, solved)
        wrote.append(f"wrote {len(solved)} solved problems with their gold to {path}")
    return wrote


def write_jsonl(path: str, records: list[dict]) -> str:
    """Returns where they are: if another evaluation has written the file meanwhile, beside it."""
    if os.path.exists(path):
        path = f"{path}.{os.getpid()}"
    with written_whole(path) as f:
        for record in records:
            f.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path


def print_metrics(metrics: dict[str, float], samples: int, problems: int) -> None:
    error = ""
    if problems > 1:
        error = f" ± {metrics['mean_se']:.4f} (standard error over problems)"
    print(f"mean@{samples}      {metrics['mean']:.4f}{error}")
    for name, value in metrics.items():
        if name.startswith("pass@"):
            print(f"{name:<12}{value:.4f}")
    print(f"maj@{samples:<8}{metrics['maj']:.4f}")
    print(f"truncated   {metrics['truncated']:.4f}  no answer {metrics['no_answer']:.4f}  "
          f"tokens {metrics['tokens']:.1f}")
    print(f"with the last number counted where no answer is named: {metrics['last_number']:.4f}")


if __name__ == "__main__":
    exit_cleanly(main)
