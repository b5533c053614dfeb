"""The experiments of docs/results.md, on the toy: python docs/experiments.py toy|ablations|regimes|golds|real [--jobs 2] [--seeds 3]

Each arm is one train.py command in a process of its own, with one thread, `--jobs` of them at a time. What has finished is
not run again and what was cut off goes on from its last checkpoint, if it has one (these runs write one at a new best evaluation),
so the same command may be given as often as one likes. Prints a table in Markdown when all is there, and leaves thinned logs in
docs/runs/EXPERIMENT, from which `plot.py` draws. `real` only makes the table of what docs/run_real.sh has run.
"""
import argparse
import concurrent.futures
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from data import load_tokenizer, prepare, read_problems  # noqa: E402
from evaluate import evaluate  # noqa: E402
from gcpo import ALGORITHMS  # noqa: E402
from model import load_model  # noqa: E402
from plot import elapsed, read_run  # noqa: E402
from support.toy import TOY, TOY_NAMES, build_toy, toy_problem  # noqa: E402


KEPT = ("eval/mean", "eval/mean_se", "reward/correct", "gold/share", "gold/logprob", "length/mean", "policy/entropy", "update/grad_norm",
        "policy/clip_fraction", "gold/clip_fraction", "update/skipped", "groups/all_wrong", "groups/mixed", "groups/all_right", "groups/sampled")
BLOCK = 5  # steps that a thinned log averages


# ---------------------------------------------------------------------------------------------------------------------
# Running

def finish(out, flags):
    """One run, from wherever it is. Returns its log's rows."""
    steps = int(dict(zip(flags, flags[1:])).get("--steps", TOY["steps"]))     # of several the last, as argparse does
    rows = read_run(out) if os.path.isfile(os.path.join(out, "metrics.jsonl")) else []
    if not rows or rows[-1]["step"] < steps:
        if not os.path.isfile(os.path.join(out, "run.json")):
            shutil.rmtree(out, ignore_errors=True)  # cut off before there was anything to go on with
        command = [sys.executable, os.path.join(ROOT, "train.py"), "--threads", "1", "--save-every", "0", "--out", out, *flags]
        done = subprocess.run(command + ["--resume"] * os.path.isdir(out), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-2000:]}")
        print(f"  {os.path.basename(out)}", file=sys.stderr, flush=True)
        shutil.rmtree(os.path.join(out, "checkpoints"), ignore_errors=True)
        rows = read_run(out)
    return rows


def run_all(name, arms, args):
    """{arm: [rows of each seed]}, and the folders of the runs."""
    folder = lambda arm, seed: os.path.join(args.work, name, f"{arm}-seed{seed}")
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        runs = {arm: [pool.submit(finish, folder(arm, seed), [*flags, "--seed", str(seed)]) for seed in range(args.seeds)] for arm, flags in arms.items()}
        try:
            runs = {arm: [run.result() for run in of_seeds] for arm, of_seeds in runs.items()}
        except (RuntimeError, SystemExit) as e:     # not after all the others
            pool.shutdown(cancel_futures=True)
            sys.exit(str(e))
    for arm, of_seeds in runs.items():
        for seed, rows in enumerate(of_seeds):
            thin(rows, os.path.join(ROOT, "docs", "runs", name, f"{arm}-seed{seed}"))
    return runs, {arm: [folder(arm, seed) for seed in range(args.seeds)] for arm in arms}


def thin(rows, folder, more=()):
    """Leave a log of block means, small enough for the repository; evaluations stay as they are."""
    os.makedirs(folder, exist_ok=True)
    times, blocks = elapsed(rows), []
    for row in rows:
        if row["step"] <= 0 or (row["step"] - 1) % BLOCK == 0:
            blocks.append([])
        blocks[-1].append({**row, "time/elapsed": times[row["step"]]})
    with open(os.path.join(folder, "metrics.jsonl"), "w") as f:
        for block in blocks:
            record = {"step": block[-1]["step"], "time/elapsed": round(block[-1]["time/elapsed"], 2)}
            for key in (*KEPT, *more):
                if values := [r[key] for r in block if r.get(key) is not None]:
                    record[key] = float(f"{values[-1] if key.startswith('eval/') else statistics.mean(values):.4g}")
            f.write(json.dumps(record) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Numbers of a run

def accuracy(rows):
    return next(r["eval/mean"] for r in reversed(rows) if r.get("eval/mean") is not None)


def seconds(rows):
    return max(elapsed(rows).values())


def first_at(rows, level):
    """First step at which held-out accuracy was `level` or more; None: never."""
    return next((r["step"] for r in rows if (r.get("eval/mean") or 0) >= level), None)


def spread(values, form="{:.0%}"):
    """mean ± standard deviation over seeds."""
    text = form.format(statistics.mean(values))
    return text + (" ± " + form.format(statistics.stdev(values)) if len(values) > 1 else "")


def steps_to(runs, level):
    found = [first_at(rows, level) for rows in runs]
    return ", ".join("–" if step is None else str(step) for step in found)


def table(head, rows):
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")


# ---------------------------------------------------------------------------------------------------------------------
# The experiments

def toy(args):
    """Every preset from the same random weights."""
    arms = {name: ["--algo", name] for name in ALGORITHMS}
    runs, _ = run_all("toy", arms, args)
    table(["preset", "held-out accuracy", "at step 100", "90 % at step (each seed)", "seconds", "rollouts sampled"],
          [[f"`{name}`", spread([accuracy(r) for r in of]), spread([next(x["eval/mean"] for x in r if x["step"] == 100) for r in of]), steps_to(of, 0.9),
            spread([seconds(r) for r in of], "{:.0f}"), spread([TOY["group_size"] * sum(x.get("groups/sampled", 0) for x in r) for r in of], "{:,.0f}")] for name, of in runs.items()])


ABLATIONS = {  # one switch changed in the toy's gcpo, which takes four updates per batch
    "gcpo": [], "gold_when=always": ["--gold-when", "always"], "gold_when=never": ["--gold-when", "never"],
    "gold_slot=longest": ["--gold-slot", "longest"], "gold_slot=first": ["--gold-slot", "first"], "gold_old=one": ["--gold-old", "one"],
    "gold_old=one, gold_shape=ratio": ["--gold-old", "one", "--gold-shape", "ratio"], "gold_clip=4e-4": ["--gold-clip", "4e-4"], "gold_clip=none": ["--gold-clip", "none"],
    "level=token, clips 0.2": ["--level", "token", "--clip-low", "0.2", "--clip-high", "0.2"], "level=token, clips of gcpo": ["--level", "token"],
    "clips 0.2": ["--clip-low", "0.2", "--clip-high", "0.2"], "aggregation=token_mean": ["--aggregation", "token_mean"],
    "aggregation=fixed_length": ["--aggregation", "fixed_length"], "scale=none": ["--scale", "none"],
    "G = 8, 16 problems": ["--group-size", "8", "--prompts", "16"], "G = 16, 8 problems": ["--group-size", "16", "--prompts", "8"],
    "one update": ["--updates", "1"], "one update, lr × 2": ["--updates", "1", "--lr", "5e-3"],
    "one update, level=token, clips 0.2": ["--updates", "1", "--level", "token", "--clip-low", "0.2", "--clip-high", "0.2"],
}


def ablations(args):
    names = {re.sub(r"[^A-Za-z0-9.]+", "-", label.replace("×", "x")).strip("-"): (label, flags) for label, flags in ABLATIONS.items()}
    runs, _ = run_all("ablations", {name: flags for name, (_, flags) in names.items()}, args)
    table(["changed", "flags", "held-out accuracy", "at step 100", "50 % at step", "90 % at step", "tokens clipped", "seconds"],
          [[names[name][0], f"`{shlex.join(names[name][1])}`" if names[name][1] else "", spread([accuracy(r) for r in of]), spread([next(x["eval/mean"] for x in r if x["step"] == 100) for r in of]),
            steps_to(of, 0.5), steps_to(of, 0.9), spread([statistics.mean([x["policy/clip_fraction"] for x in r if x.get("policy/clip_fraction") is not None] or [0]) for r in of]),
            spread([seconds(r) for r in of], "{:.0f}")] for name, of in runs.items()])


def wordy(record):
    """The same problem with a gold in another style: each step says again what it does."""
    first, rest = re.search(r"starts with (\d)", record["question"])[1], record["answer"].split("\n####")[0].split("; ")
    gold = f"It starts with {first}. " + "".join(f"Each next digit adds {step[2]}, {step}. " for step in rest)
    return {**record, "answer": f"{gold.strip()}\n####{record['answer'].split('####')[1]}"}


def write(path, records):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as f:
        f.writelines(json.dumps(r) + "\n" for r in records)
    return path


def locks(rng, carry):
    """The locks of three digits where no sum reaches 10 (84 of them), or those where one does (645), in random order."""
    found = [lock for lock in itertools.product(range(1, 10), repeat=3) if carry == (lock[0] + lock[1] > 9 or (lock[0] + lock[1]) % 10 + lock[2] > 9)]
    rng.shuffle(found)
    return found


HELD_OUT = {"easy": 24, "hard": 200}  # locks of each kind
REGIME = ["--instruction", "", "--dtype", "float32", "--group-size", "8", "--prompts", "16", "--max-new-tokens", "48", "--updates", "4", "--lr-end", "0.1", "--steps", "150",
          "--rows-per-pass", "128"]


def regime_files(folder):
    """A toy model that was trained a little on easy problems only, and files of few problems, half of them hard. Written once."""
    if not os.path.isdir(os.path.join(folder, "base")):
        shutil.rmtree(folder, ignore_errors=True)
        files, rng = build_toy(os.path.join(folder, "toy"), 0), random.Random(1)
        problems = {}
        for kind, carry in (("easy", False), ("hard", True)):
            found = locks(rng, carry)
            names = TOY_NAMES if kind == "easy" else TOY_NAMES[:1]
            write(os.path.join(folder, f"{kind}.jsonl"), [toy_problem(name, lock) for lock in found[:HELD_OUT[kind]] for name in names])
            problems[kind] = [toy_problem(name, lock) for lock in found[HELD_OUT[kind]:] for name in TOY_NAMES]
            rng.shuffle(problems[kind])
        write(os.path.join(folder, "warm.jsonl"), problems["easy"])
        for n in (100, 300, 900):
            records = [r for pair in zip(problems["easy"], problems["hard"]) for r in pair][:n]
            write(os.path.join(folder, f"near-{n}.jsonl"), records)
            write(os.path.join(folder, f"far-{n}.jsonl"), map(wordy, records))
        finish(os.path.join(folder, "warm"), ["--algo", "sft", "--model", files["model"], "--data", os.path.join(folder, "warm.jsonl"), *REGIME,
               "--steps", "60", "--prompts", "32", "--lr", "2.5e-3"])
        os.rename(os.path.join(folder, "warm", "model"), os.path.join(folder, "base"))
    return folder


def measured(model, files, cache=None):
    """mean@4 at temperature 1 on each file, and the mean response length."""
    if cache and os.path.exists(cache):
        with open(cache) as f:
            return json.load(f)
    tokenizer, network, found = load_tokenizer(model, instruction=""), load_model(model), {}
    for name, path in files.items():
        problems = read_problems(path)
        prepare(problems, tokenizer, 48, network.config.max_position_embeddings)
        metrics = evaluate(network, problems, tokenizer, 4, 48, temperature=1.0)[0]
        found |= {name: metrics["mean"], f"{name} tokens": metrics["tokens"]}
    if cache:
        with open(cache, "w") as f:
            json.dump(found, f)
    return found


def regimes(args):
    """Where gold pays: a model that solves easy problems often and hard ones never; few problems; gold near its own style and far.
    At two learning rates, as what RL bears and what SFT wants differ."""
    at = regime_files(os.path.join(args.work, "regime"))
    held_out = {kind: os.path.join(at, f"{kind}.jsonl") for kind in ("easy", "hard")}
    base = measured(os.path.join(at, "base"), held_out)
    arms = {"GRPO": ["--algo", "grpo"], "SFT": ["--algo", "sft"], "SFT-GRPO": ["--algo", "grpo", "--sft-share", "0.5"], "GCPO": ["--algo", "gcpo"]}
    flags = {f"{style}-{n}-{lr}-{arm}": [*more, "--model", os.path.join(at, "base"), "--data", os.path.join(at, f"{style}-{n}.jsonl"), *REGIME, "--lr", lr]
             for style, n in (("near", 100), ("near", 300), ("near", 900), ("far", 300)) for arm, more in arms.items() for lr in ("3e-4", "1e-3")}
    runs, folders = run_all("regimes", flags, args)
    print(f"start model: easy {base['easy']:.0%}, hard {base['hard']:.0%}\n")
    rows = []
    for name, of in runs.items():
        style, n, lr, arm = re.fullmatch(r"(\w+)-(\d+)-(\de-\d)-(.+)", name).groups()
        found = [measured(os.path.join(f, "model"), held_out, os.path.join(f, "measured.json")) for f in folders[name]]
        rows.append([style, n, arm, lr, spread([x["easy"] for x in found]), spread([x["hard"] for x in found]), spread([x["easy tokens"] for x in found], "{:.0f}"),
                     spread([seconds(r) for r in of], "{:.0f}")])
    table(["gold's style", "problems", "arm", "learning rate", "easy", "hard", "tokens (easy)", "seconds"], rows)


GOLDS = [word for name, value in {**TOY, "max_new_tokens": 48}.items() if name != "threads" for word in ("--" + name.replace("_", "-"), str(value))]  # room for longer gold


def golds(args):
    """Whose gold: the data set's in two styles and in a mixture of both, or that of a model which learned from such gold; from the same random weights."""
    at = os.path.join(args.work, "golds-data")
    files = {f"{style} gold": os.path.join(at, f"{style}.jsonl") for style in ("near", "far", "mixed")}
    common = ["--model", os.path.join(at, "toy", "model"), "--eval-data", os.path.join(at, "toy", "held_out.jsonl"), *GOLDS]
    if not os.path.exists(files["mixed gold"]):
        shutil.rmtree(at, ignore_errors=True)
        build_toy(os.path.join(at, "toy"), 0)
        with open(os.path.join(at, "toy", "train.jsonl")) as f:
            records = [json.loads(line) for line in f]
        styles = {"near": lambda r: r, "far": wordy, "mixed": lambda r, rng=random.Random(2): rng.choice((wordy, dict))(r)}
        for style, write_as in styles.items():
            write(files[f"{style} gold"], map(write_as, records))
    for style in ("far", "mixed"):
        teacher, written = os.path.join(at, f"teacher-{style}"), os.path.join(at, f"by-model-{style}.jsonl")
        if not os.path.exists(written):     # the teacher learned from half the problems, and writes for all
            with open(files[f"{style} gold"]) as f:
                half = write(os.path.join(at, f"half-{style}.jsonl"), list(map(json.loads, f))[:2000])
            finish(teacher, ["--algo", "sft", "--data", half, *common])
            subprocess.run([sys.executable, os.path.join(ROOT, "evaluate.py"), "--model", os.path.join(teacher, "model"), "--data", files[f"{style} gold"], "--samples", "4",
                            "--max-new-tokens", "48", "--instruction", "", "--dtype", "float32", "--keep-correct", written], check=True, capture_output=True)
        files[f"gold by a model of {style} gold"] = written
    arms = {f"{algo}-{name.replace(' ', '-')}": (algo, name) for algo in ("gcpo", "sft") for name in files}
    runs, _ = run_all("golds", {arm: ["--algo", algo, "--data", files[name], *common] for arm, (algo, name) in arms.items()}, args)
    rows = []
    for arm, of in runs.items():
        algo, name = arms[arm]
        with open(files[name]) as f:
            lengths = [len(r.get("gold", r["answer"])) for r in map(json.loads, f)]
        rows.append([f"`{algo}`", name, f"{len(lengths):,}", f"{statistics.mean(lengths):.0f}", spread([accuracy(r) for r in of]), steps_to(of, 0.5), steps_to(of, 0.9),
                     spread([next(x["eval/tokens"] for x in reversed(r) if "eval/tokens" in x) for r in of], "{:.0f}"), spread([seconds(r) for r in of], "{:.0f}")])
    table(["", "gold", "problems with it", "its characters", "held-out accuracy", "50 % at step", "90 % at step", "tokens at the end", "seconds"], rows)


def real(args):
    """The table of what docs/run_real.sh has left in --work: one row per model, mean@k ± standard error on each set."""
    found, kept = {}, os.path.join(ROOT, "docs", "runs", "real")
    os.makedirs(kept, exist_ok=True)
    if os.path.samefile(kept, args.work):
        sys.exit(f"error: --work {args.work} holds what was kept of runs; name the folder of the runs themselves")
    for file in sorted(os.listdir(args.work)):
        if match := re.fullmatch(r"(.+)--(.+)\.txt", file):
            with open(os.path.join(args.work, file)) as f:
                text = f.read()
            with open(os.path.join(kept, file), "w") as f:
                f.write(text)
            number = lambda pattern: float(hit[1]) if (hit := re.search(pattern, text)) else math.nan   # a single problem has no error
            found.setdefault(match[1], {})[match[2]] = [number(r"mean@\d+ +([\d.]+)"), number(r"± ([\d.]+)"), max(map(float, re.findall(r"pass@\d+ +([\d.]+)", text))), 1 - number(r"no answer ([\d.]+)")]
    sets = sorted({name for of in found.values() for name in of})
    table(["model", *(f"{name}: mean ± s.e., pass@k, names an answer" for name in sets)],
          [[arm, *("{:.1%} ± {:.1%}, {:.1%}, {:.0%}".format(*of[s]) if s in of else "" for s in sets)] for arm, of in found.items()])
    print()
    rows = []
    for arm in sorted(os.listdir(args.work)):
        if os.path.isfile(os.path.join(args.work, arm, "metrics.jsonl")) and (log := read_run(os.path.join(args.work, arm))):
            thin(log, os.path.join(kept, arm), ("eval/gold_logprob", "eval/no_answer", "eval/truncated", "length/truncated", "update/bf16_changed"))
            part = [r for r in log if "groups/all_wrong" in r] or [{}]
            at = lambda rows, key: f"{statistics.mean(r[key] for r in rows):.0%}" if key in rows[0] else ""
            third = max(1, len(part) // 3)
            evaluated = [r for r in log if r.get("eval/gold_logprob") is not None]
            rows.append([arm, str(log[-1]["step"]), f"{seconds(log) / 60:.0f}", at(part[:third], "groups/all_wrong"), at(part[-third:], "groups/all_wrong"), at(part[-third:], "gold/share"),
                         f"{evaluated[0]['eval/gold_logprob']:.2f} → {evaluated[-1]['eval/gold_logprob']:.2f}" if evaluated else "", at(log[-1:], "update/bf16_changed")])
    table(["arm", "steps", "minutes", "groups all wrong, first third", "last third", "given gold, last third", "held-out gold, log p per token", "weights changed in bf16"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("toy", "ablations", "regimes", "golds", "real"))
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, each with one thread")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", default=os.path.join(ROOT, "runs", "experiments"), help="where the runs lie")
    arguments = parser.parse_args()
    globals()[arguments.what](arguments)
