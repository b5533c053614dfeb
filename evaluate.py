"""Accuracy of a model on a file of problems, and gold written by a model.

    python evaluate.py --model DIR --data FILE --samples 8 --temperature 1.0 --out completions.jsonl
"""
from __future__ import annotations

import argparse
import json
import math
import os
from collections import Counter

import numpy as np
from tqdm import tqdm

from data import Problem, Tokenizer, grade_group, load_reward, load_tokenizer, prepare, read_problems
from grader import canonical, extract_answer, grade, last_number
from model import Transformer, load_model
from sampler import sample
from support.common import InputError, exit_cleanly, pick_device, pick_dtype, written_whole
from support.cpu import keep_freed_memory


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, hold one of the c correct ones (arXiv 2107.03374, eq. 1)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def complete(model: Transformer, problems: list[Problem], tokenizer: Tokenizer, samples: int, max_new_tokens: int, *, temperature: float,
             top_p: float = 1.0, top_k: int = 0, seed=0, prompt_ids=None, max_rows: int | None = None, reward=grade, correct_at: float = 1.0,
             progress: str = "") -> list[list[dict]]:
    """`samples` responses to every (prepared) problem, graded: per problem its completions as records."""
    with tqdm(total=len(problems) * samples, desc=progress or None, disable=None if progress else True, unit="row", leave=False, dynamic_ncols=True) as bar:
        done = [0]

        def advance(tokens):
            done[0] += tokens
            bar.update()
            bar.set_postfix_str(f"{done[0] / max(bar.format_dict['elapsed'], 1e-9):.0f} tokens/s", refresh=False)
        groups = sample(model, [p.prompt for p in problems], samples, max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
                        stop_ids=tokenizer.stop_ids, seed=seed, prompt_ids=prompt_ids, max_rows=max_rows, progress=advance)
    completions = []
    for problem, group in zip(problems, groups):
        group, records = grade_group(group, problem, tokenizer, reward, correct_at), []
        for ids, n, finished, r, ok in zip(group.responses, group.lengths.tolist(), group.finished.tolist(), group.rewards.tolist(), group.correct.tolist()):
            text = tokenizer.decode(ids[:n])
            answer = extract_answer(text)
            records.append({"response": text, "answer": answer, "correct": ok, "reward": r, "finished": finished, "tokens": n,
                            "correct_by_last_number": ok or (answer is None and last_number(text) == canonical(problem.answer))})
        completions.append(records)
    return completions


def summarize(completions: list[list[dict]]) -> dict[str, float]:
    """Metrics of what `complete` returned.

    mean: share of correct responses, averaged over problems, and its standard error over problems (`mean_se`).
    pass@k: unbiased, for k = 1, 2, 4, … up to the number of samples. maj: share of problems whose commonest answer is right
    (the earliest among equals; a response that names no answer has no vote). truncated: share of responses without an end.
    no_answer: share that name no answer; last_number: share correct if the last number counted where none is named."""
    samples = len(completions[0])
    ks = sorted({min(2**i, samples) for i in range(samples.bit_length() + 1)})
    right, majority = [sum(r["correct"] for r in records) for records in completions], []
    for records in completions:
        votes = Counter(r["answer"] for r in records if r["answer"] is not None).most_common(1)
        majority.append(bool(votes) and next(r["correct"] for r in records if r["answer"] == votes[0][0]))
    rows = [r for records in completions for r in records]
    share = lambda values: sum(values) / len(values)
    shares = [n / samples for n in right]
    spread = float(np.std(shares, ddof=1)) if len(shares) > 1 else float("nan")
    return {"mean": share(shares), "mean_se": spread / math.sqrt(len(shares)), **{f"pass@{k}": share([pass_at_k(samples, n, k) for n in right]) for k in ks},
            "maj": share(majority), "truncated": share([not r["finished"] for r in rows]), "no_answer": share([r["answer"] is None for r in rows]),
            "last_number": share([r["correct_by_last_number"] for r in rows]), "tokens": share([r["tokens"] for r in rows])}


def evaluate(*args, **settings) -> tuple[dict[str, float], list[list[dict]]]:
    """`complete` and `summarize`: metrics, and per problem its completions."""
    completions = complete(*args, **settings)
    return summarize(completions), completions


def main():
    parser = argparse.ArgumentParser(description="Sample and grade: evaluation of a model, and gold made by it.")
    flag = parser.add_argument
    flag("--model", required=True, help="Hugging Face model folder")
    flag("--data", required=True, help="problems: .jsonl, .jsonl.gz or .json")
    flag("--samples", type=int, default=1, help="responses per problem")
    flag("--temperature", type=float, default=None, help="0: greedy (default: 0 with one sample, else 1)")
    flag("--top-p", type=float, default=1.0, help="sample from the likeliest tokens that make up this mass")
    flag("--top-k", type=int, default=0, help="sample from this many likeliest tokens; 0: all")
    flag("--max-new-tokens", type=int, default=512, help="longest response")
    flag("--limit", type=int, default=0, help="only the first so many problems; 0: all")
    flag("--skip", type=int, default=0, help="leave out the first so many problems")
    flag("--rows", type=int, default=None, help="rows in flight (default: what fits, at most 256)")
    flag("--seed", type=int, default=0, help="of the sampling")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    flag("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 where the device is fast at it")
    flag("--answer-format", default="hash", choices=("hash", "boxed"), help="what the instruction asks for: #### or \\boxed{}")
    flag("--instruction", default=None, help="text after each question, in place of the format's own")
    flag("--reward", default=None, help="FILE.py:function, (response, answer) -> float, in place of the grader")
    flag("--correct-at", type=float, default=1.0, help="reward from which on a response counts as correct")
    flag("--out", default=None, help="write every completion here, a JSON line each")
    flag("--keep-correct", default=None, help="write the problems that were solved here, each with a correct response as its gold")
    args = parser.parse_args()
    keep_freed_memory()
    for name, least in (("samples", 1), ("max_new_tokens", 1), ("limit", 0), ("skip", 0), ("top_k", 0), ("temperature", 0), ("rows", 1), ("seed", 0), ("correct_at", -math.inf)):
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be {'a number' if least < 0 else f'{least} or more'}, and finite")
    if not 0 < args.top_p <= 1:
        raise InputError(f"--top-p {args.top_p}: must be above 0 and at most 1")
    taken = [os.path.realpath(args.data)]
    for path in [path for path in (args.out, args.keep_correct) if path]:
        if os.path.isdir(path) or not os.access(os.path.dirname(path) or ".", os.W_OK):
            raise InputError(f"{path}: cannot be written; it must be a file, in a folder that exists and can be written to")
        if os.path.realpath(path) in taken:
            raise InputError(f"{path}: named twice; --data, --out and --keep-correct must be different files")
        if os.path.exists(path):
            raise InputError(f"{path}: there is something already, perhaps hours of sampling; name another file, or remove it")
        taken.append(os.path.realpath(path))
    temperature = args.temperature if args.temperature is not None else float(args.samples > 1)
    device = pick_device(args.device)
    reward = load_reward(args.reward)
    problems = read_problems(args.data, args.answer_format)[args.skip:][:args.limit or None]
    if not problems:
        raise InputError(f"{args.data}: no problems left after --skip {args.skip}")
    tokenizer = load_tokenizer(args.model, args.answer_format, args.instruction)
    model = load_model(args.model, device, pick_dtype(args.dtype, device))
    for problem in problems:
        problem.gold = None  # not wanted here, so not checked
    prepare(problems, tokenizer, args.max_new_tokens, model.config.max_position_embeddings, reward=reward, correct_at=args.correct_at, vocab_size=model.config.vocab_size)
    metrics, completions = evaluate(model, problems, tokenizer, args.samples, args.max_new_tokens, temperature=temperature, top_p=args.top_p,
                                    top_k=args.top_k, seed=args.seed, max_rows=args.rows, reward=reward, correct_at=args.correct_at, progress="sampling")
    wrote = []  # files first: whoever reads our output may have gone
    if args.out:
        rows = ({"question": p.question, "reference": p.answer, **r} for p, records in zip(problems, completions) for r in records)
        wrote.append(f"wrote {write_jsonl(args.out, rows)} completions to {args.out}")
    if args.keep_correct:
        solved = ({"question": p.question, "answer": p.answer, "gold": min(good, key=len)} for p, records in zip(problems, completions)
                  if (good := [r["response"] for r in records if r["correct"] and r["finished"]]))
        wrote.append(f"wrote {write_jsonl(args.keep_correct, solved)} solved problems with their gold to {args.keep_correct}")
    k = args.samples
    print(f"{len(problems)} problems x {k} samples, temperature {temperature:g}")
    print(f"mean@{k}      {metrics['mean']:.4f}" + (f" ± {metrics['mean_se']:.4f} (standard error over problems)" if len(problems) > 1 else ""))
    for name in [n for n in metrics if n.startswith("pass@")]:
        print(f"{name:<12}{metrics[name]:.4f}")
    print(f"maj@{k:<8}{metrics['maj']:.4f}")
    print(f"truncated   {metrics['truncated']:.4f}  no answer {metrics['no_answer']:.4f}  tokens {metrics['tokens']:.1f}")
    print(f"with the last number counted where no answer is named: {metrics['last_number']:.4f}")
    print(*wrote, sep="\n", end="\n" if wrote else "")


def write_jsonl(path: str, records) -> int:
    """Returns the number of records."""
    count = 0
    with written_whole(path) as f:
        for count, record in enumerate(records, 1):
            f.write(json.dumps(record, ensure_ascii=False) + "\n")
    return count


if __name__ == "__main__":
    exit_cleanly(main)
