"""The experiments of docs/results.md, on the toy.

    python docs/experiments.py toy|ablations|regimes|golds|ranks [--jobs 2] [--seeds 3]
    python docs/experiments.py square|far|scarce|shares [--seeds 8]    as docs/plan.md says

Each arm is one train.py command, in a process of its own with one thread, `--jobs` of them at a
time. What has finished is not run again, and what was cut off goes on from its last checkpoint, if
it has one (these runs write one at each new best evaluation). So the same command may be given as
often as one likes. When all is there it prints a table in Markdown, and leaves thinned logs in
docs/runs/EXPERIMENT, from which plot.py draws.
"""
import argparse
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
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from data import Limits, load_tokenizer, prepare, read_problems  # noqa: E402
from evaluate import evaluate  # noqa: E402
from gcpo import ALGORITHMS  # noqa: E402
from model import load_model  # noqa: E402
from plot import elapsed, read_run  # noqa: E402
from support.common import as_flags  # noqa: E402
from support.toy import TOY, TOY_NAMES, build_toy, toy_problem  # noqa: E402


Log = list[dict]    # the lines of a run's metrics

KEPT = (    # in a thinned log
    "eval/mean", "eval/mean_se",
    "reward/correct", "gold/share", "gold/logprob", "length/mean",
    "policy/entropy", "update/grad_norm", "policy/clip_fraction", "gold/clip_fraction",
    "update/skipped",
    "groups/all_wrong", "groups/mixed", "groups/all_right", "groups/sampled")
BLOCK = 5  # steps that a thinned log averages


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("what", choices=tuple(EXPERIMENTS))
    flag("--jobs", type=int, default=2, help="runs side by side, each with one thread")
    flag("--seeds", type=int, default=3)
    flag("--work", default=os.path.join(ROOT, "runs", "experiments"), help="where the runs lie")
    args = parser.parse_args()
    EXPERIMENTS[args.what](args)


# ---- Running -------------------------------------------------------------------------------------

def run_all(name: str, arms: dict, args) -> dict[str, list[Log]]:
    """Run every arm, given by its flags or a function of the seed that gives them, with every
    seed. Returns each arm's logs."""
    seeds = range(args.seeds)
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {}
        for arm, flags in arms.items():
            futures[arm] = []
            for seed in seeds:
                folder = run_folder(name, arm, seed, args)
                of_seed = flags(seed) if callable(flags) else flags
                run = pool.submit(finish, folder, [*of_seed, "--seed", str(seed)])
                futures[arm].append(run)
        try:
            runs = {arm: [run.result() for run in of_seeds]
                    for arm, of_seeds in futures.items()}
        except (RuntimeError, SystemExit) as e:
            pool.shutdown(cancel_futures=True)    # fail now, not after all the others
            sys.exit(str(e))
    for arm, logs in runs.items():
        for seed, log in zip(seeds, logs):
            thin(log, os.path.join(ROOT, "docs", "runs", name, f"{arm}-seed{seed}"), KEPT)
    return runs


def run_folder(name: str, arm: str, seed: int, args) -> str:
    return os.path.join(args.work, name, f"{arm}-seed{seed}")


def finish(out: str, flags: list[str]) -> Log:
    """One run, from wherever it stands. Returns its log."""
    if os.path.isfile(os.path.join(out, "metrics.jsonl")):
        log = read_run(out)
        if log and log[-1]["step"] >= steps_of(flags):
            return log
    if not os.path.isfile(os.path.join(out, "run.json")):
        shutil.rmtree(out, ignore_errors=True)    # cut off before there was anything to go on with
    command = [sys.executable, os.path.join(ROOT, "train.py"), "--threads", "1",
               "--save-every", "0", "--out", out, *flags]
    if os.path.isdir(out):
        command.append("--resume")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-2000:]}")
    print(f"  {os.path.basename(out)}", file=sys.stderr, flush=True)
    shutil.rmtree(os.path.join(out, "checkpoints"), ignore_errors=True)
    return read_run(out)


def steps_of(flags: list[str]) -> int:
    """--steps among the flags: of several the last, as argparse has it."""
    following = dict(zip(flags, flags[1:]))
    return int(following.get("--steps", TOY["steps"]))


def thin(log: Log, folder: str, keys: tuple[str, ...]) -> None:
    """Leave a log of block means, small enough for the repository. Evaluations stay as they are."""
    os.makedirs(folder, exist_ok=True)
    times = elapsed(log)
    with open(os.path.join(folder, "metrics.jsonl"), "w") as f:
        for block in blocks_of(log):
            step = block[-1]["step"]
            record = {"step": step, "time/elapsed": round(times[step], 2)}
            for key in keys:
                values = [r[key] for r in block if r.get(key) is not None]
                if values:
                    value = values[-1] if key.startswith("eval/") else statistics.mean(values)
                    record[key] = float(f"{value:.4g}")
            f.write(json.dumps(record) + "\n")


def blocks_of(log: Log) -> list[Log]:
    """Lines of BLOCK steps each: 1 … 5, 6 … 10, …; what comes before training is a block alone."""
    blocks = []
    for row in log:
        if row["step"] <= 0 or (row["step"] - 1) % BLOCK == 0:
            blocks.append([])
        blocks[-1].append(row)
    return blocks


# ---- Numbers of a run ----------------------------------------------------------------------------

def last(log: Log, key: str) -> float:
    return next(r[key] for r in reversed(log) if r.get(key) is not None)


def accuracy(log: Log) -> float:
    """Held-out, at the end."""
    return last(log, "eval/mean")


def accuracy_at_100(log: Log) -> float:
    return next(r["eval/mean"] for r in log if r["step"] == 100)


def seconds(log: Log) -> float:
    return max(elapsed(log).values())


def rollouts_sampled(log: Log) -> int:
    return TOY["group_size"] * sum(r.get("groups/sampled", 0) for r in log)


def clipped(log: Log) -> float:
    """Share of the policy's tokens, the mean over steps."""
    shares = [r["policy/clip_fraction"] for r in log if r.get("policy/clip_fraction") is not None]
    return statistics.mean(shares or [0])


def first_at(log: Log, level: float) -> int | None:
    """First step at which held-out accuracy was `level` or more; None: never."""
    return next((r["step"] for r in log if (r.get("eval/mean") or 0) >= level), None)


# ---- Tables --------------------------------------------------------------------------------------

def table(columns: dict[str, list[str]]) -> None:
    """Print columns, each under its heading, as Markdown."""
    print_row(columns)
    print("|" + "---|" * len(columns))
    for row in zip(*columns.values()):
        print_row(row)


def print_row(cells) -> None:
    print("| " + " | ".join(cells) + " |")


def column(runs: dict[str, list], number, form: str = "{:.0%}") -> list[str]:
    """number(log) of each arm, over its seeds."""
    return [spread([number(log) for log in logs], form) for logs in runs.values()]


def spread(values: list[float], form: str) -> str:
    """Mean ± standard deviation."""
    text = form.format(statistics.mean(values))
    if len(values) > 1:
        text += " ± " + form.format(statistics.stdev(values))
    return text


def steps_to(runs: dict[str, list[Log]], level: float) -> list[str]:
    """The column of first_at, each seed by itself."""
    cells = []
    for logs in runs.values():
        steps = [first_at(log, level) for log in logs]
        cells.append(", ".join("–" if step is None else str(step) for step in steps))
    return cells


# ---- toy -----------------------------------------------------------------------------------------

def toy(args):
    """Every preset from the same random weights."""
    runs = run_all("toy", {name: ["--algo", name] for name in ALGORITHMS}, args)
    table({
        "preset": [f"`{name}`" for name in runs],
        "held-out accuracy": column(runs, accuracy),
        "at step 100": column(runs, accuracy_at_100),
        "90 % at step (each seed)": steps_to(runs, 0.9),
        "seconds": column(runs, seconds, "{:.0f}"),
        "rollouts sampled": column(runs, rollouts_sampled, "{:,.0f}"),
    })


# ---- ablations -----------------------------------------------------------------------------------

ABLATIONS = {  # one switch changed in the toy's gcpo, which takes four updates per batch
    "gcpo": "",
    "gold_when=always": "--gold-when always",
    "gold_when=never": "--gold-when never",
    "gold_slot=longest": "--gold-slot longest",
    "gold_slot=first": "--gold-slot first",
    "gold_old=one": "--gold-old one",
    "gold_old=one, gold_shape=ratio": "--gold-old one --gold-shape ratio",
    "gold_clip=4e-4": "--gold-clip 4e-4",
    "gold_clip=none": "--gold-clip none",
    "level=token, clips 0.2": "--level token --clip-low 0.2 --clip-high 0.2",
    "level=token, clips of gcpo": "--level token",
    "clips 0.2": "--clip-low 0.2 --clip-high 0.2",
    "aggregation=token_mean": "--aggregation token_mean",
    "aggregation=fixed_length": "--aggregation fixed_length",
    "scale=none": "--scale none",
    "G = 8, 16 problems": "--group-size 8 --prompts 16",
    "G = 16, 8 problems": "--group-size 16 --prompts 8",
    "one update": "--updates 1",
    "one update, lr × 2": "--updates 1 --lr 5e-3",
    "one update, level=token, clips 0.2":
        "--updates 1 --level token --clip-low 0.2 --clip-high 0.2",
}


def ablations(args):
    arms = {file_name(label): flags.split() for label, flags in ABLATIONS.items()}
    runs = run_all("ablations", arms, args)
    table({
        "changed": list(ABLATIONS),
        "flags": [f"`{flags}`" if flags else "" for flags in ABLATIONS.values()],
        "held-out accuracy": column(runs, accuracy),
        "at step 100": column(runs, accuracy_at_100),
        "50 % at step": steps_to(runs, 0.5),
        "90 % at step": steps_to(runs, 0.9),
        "tokens clipped": column(runs, clipped),
        "seconds": column(runs, seconds, "{:.0f}"),
    })


def file_name(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", label.replace("×", "x")).strip("-")


# ---- Problems in other styles of gold, for regimes and golds -------------------------------------

def wordy(record: dict) -> dict:
    """The same problem with a gold in another style: each step says again what it does."""
    solution, answer = record["answer"].split("\n####")
    first = re.search(r"starts with (\d)", record["question"])[1]
    gold = f"It starts with {first}. "
    for step in solution.split("; "):    # 2+9=11
        gold += f"Each next digit adds {step[2]}, {step}. "
    return {**record, "answer": f"{gold.strip()}\n####{answer}"}


def write(path: str, records) -> str:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as f:
        f.writelines(json.dumps(r) + "\n" for r in records)
    return path


def read(path: str) -> list[dict]:
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


# ---- regimes -------------------------------------------------------------------------------------

HELD_OUT = {"easy": 24, "hard": 200}  # locks of each kind
REGIME = """
    --instruction '' --dtype float32 --group-size 8 --prompts 16 --max-new-tokens 48 --updates 4
    --lr-end 0.1 --steps 150 --rows-per-pass 128"""
REGIME_ARMS = {
    "GRPO": "--algo grpo",
    "SFT": "--algo sft",
    "SFT-GRPO": "--algo grpo --sft-share 0.5",
    "GCPO": "--algo gcpo",
}
REGIME_DATA = (("near", 100), ("near", 300), ("near", 900), ("far", 300))    # style, problems
REGIME_RATES = ("3e-4", "1e-3")


def regimes(args):
    """Where gold pays: a model that solves easy problems often and hard ones never; few problems;
    gold near its own style and far from it. At two learning rates, because what RL bears and what
    SFT wants differ."""
    at = regime_files(os.path.join(args.work, "regime"))
    held_out = {kind: os.path.join(at, f"{kind}.jsonl") for kind in HELD_OUT}
    base = os.path.join(at, "base")
    start = measured(base, held_out)
    settings = {}    # of each run's name
    arms = {}        # its flags
    for (style, n), arm, lr in itertools.product(REGIME_DATA, REGIME_ARMS, REGIME_RATES):
        name = f"{style}-{n}-{lr}-{arm}"
        settings[name] = (style, str(n), arm, lr)
        arms[name] = [
            *REGIME_ARMS[arm].split(), "--model", base,
            "--data", os.path.join(at, f"{style}-{n}.jsonl"), *shlex.split(REGIME), "--lr", lr]
    runs = run_all("regimes", arms, args)
    print(f"start model: easy {start['easy']:.0%}, hard {start['hard']:.0%}\n")
    found = {}
    for name in runs:
        folders = [run_folder("regimes", name, seed, args) for seed in range(args.seeds)]
        found[name] = [measured_once(folder, held_out) for folder in folders]
    styles, sizes, names, rates = zip(*settings.values())
    table({
        "gold's style": styles,
        "problems": sizes,
        "arm": names,
        "learning rate": rates,
        "easy": column(found, itemgetter("easy")),
        "hard": column(found, itemgetter("hard")),
        "tokens (easy)": column(found, itemgetter("easy tokens"), "{:.0f}"),
        "seconds": column(runs, seconds, "{:.0f}"),
    })


def regime_files(folder: str) -> str:
    """A toy model that was trained a little on easy problems only, and files of few problems, half
    of them hard. Written once."""
    if os.path.isdir(os.path.join(folder, "base")):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    build_toy(os.path.join(folder, "toy"), 0)
    problems = split_locks(folder, random.Random(1), HELD_OUT, TOY_NAMES)
    alternating = [r for pair in zip(problems["easy"], problems["hard"]) for r in pair]
    for n in (100, 300, 900):
        write(os.path.join(folder, f"near-{n}.jsonl"), alternating[:n])
        write(os.path.join(folder, f"far-{n}.jsonl"), map(wordy, alternating[:n]))
    warm_up(folder, problems["easy"], seed=0)
    return folder


def split_locks(folder: str, rng: random.Random, held_out: dict[str, int], names) -> dict:
    """Write easy.jsonl (its locks under each of `names`) and hard.jsonl, of so many locks each.
    Returns the problems of the other locks, shuffled: {"easy": …, "hard": …}."""
    problems = {}
    for kind, count in held_out.items():
        found = locks(rng, has_carry=kind == "hard")
        of_kind = names if kind == "easy" else TOY_NAMES[:1]
        records = [toy_problem(name, lock) for lock in found[:count] for name in of_kind]
        write(os.path.join(folder, f"{kind}.jsonl"), records)
        problems[kind] = [toy_problem(name, lock) for lock in found[count:] for name in TOY_NAMES]
        rng.shuffle(problems[kind])
    return problems


def warm_up(folder: str, easy: list[dict], seed: int) -> None:
    """FOLDER/base: the toy there, after a little SFT on easy problems. The last to be written."""
    data = write(os.path.join(folder, "warm.jsonl"), easy)
    warm = os.path.join(folder, "warm")
    toy_model = os.path.join(folder, "toy", "model")
    finish(warm, ["--algo", "sft", "--model", toy_model, "--data", data, *shlex.split(REGIME),
                  "--steps", "60", "--prompts", "32", "--lr", "2.5e-3", "--seed", str(seed)])
    os.rename(os.path.join(warm, "model"), os.path.join(folder, "base"))


def locks(rng: random.Random, has_carry: bool) -> list[tuple[int, int, int]]:
    """The locks of three digits where a sum reaches 10 (645 of them), or those where none does
    (84), in random order."""
    found = []
    for lock in itertools.product(range(1, 10), repeat=3):
        first, second, third = lock
        carries = first + second > 9 or (first + second) % 10 + third > 9
        if carries == has_carry:
            found.append(lock)
    rng.shuffle(found)
    return found


def measured(model: str, files: dict[str, str]) -> dict[str, float]:
    """mean@4 at temperature 1 on each file, and the mean response length."""
    tokenizer = load_tokenizer(model, instruction="")
    network = load_model(model)
    found = {}
    for name, path in files.items():
        problems = read_problems(path)
        limits = Limits(48, network.config.max_position_embeddings)
        problems = prepare(problems, tokenizer, limits)
        metrics, _ = evaluate(network, problems, tokenizer, 4, 48, temperature=1.0)
        found[name] = metrics["mean"]
        found[f"{name} tokens"] = metrics["tokens"]
    return found


def measured_once(run: str, files: dict[str, str]) -> dict[str, float]:
    """`measured` of a run's model; kept beside it, so that the next time it only reads."""
    kept = os.path.join(run, "measured.json")
    if not os.path.exists(kept):
        found = measured(os.path.join(run, "model"), files)
        with open(kept, "w") as f:
            json.dump(found, f)
    with open(kept) as f:
        return json.load(f)


# ---- square, far, scarce, shares (docs/plan.md, written before the runs, says what is compared) --

EACH_SEED = {"easy": 40, "hard": 200}    # held-out locks; each seed has its own split and model
HALF = 350                               # easy problems, and hard ones, of `scarce`
GOLDS = 75                               # so many of its hard problems have gold
OWN = 150                                # of the base model's right answers help to make its start
SHARES = (20, 50, 190, 625)              # so many of the other 625 have gold too
START = "the start model"
SFT_EQUAL = "SFT, GCPO's seconds"
EQUAL_STEPS = 750           # of SFT take as long as 150 of GCPO (10.4 and 52.0 s for 150, alone)
EQUAL_STEPS_SCARCE = 540    # after SFT, whose rollouts are shorter (17.4 and 63.4 s)
WITH_GOLD = {
    "GCPO": "--algo gcpo",
    "gold, no negatives": "--algo gcpo --gold-rivals zero",
    "GCPO, gold x 3": "--algo gcpo --gold-weight 3",
    "gold x 3, no negatives": "--algo gcpo --gold-rivals zero --gold-weight 3",
    "gold at 1, no negatives": "--algo gcpo --gold-rivals zero --gold-advantage one",
    "RFT": "--algo rft",
    "SFT": "--algo sft",
    SFT_EQUAL: f"--algo sft --steps {EQUAL_STEPS}"}
WITHOUT_GOLD = {
    "negatives, no gold": "--algo gspo --virtual-right all_wrong",
    "NGRPO": "--algo ngrpo",
    "GSPO": "--algo gspo",
    "SFT, then GSPO": "--algo gspo --sft-share 0.5"}
COMPARED = {    # on hard locks, paired by seed (docs/plan.md says which of them are primary)
    "square": (
        ("GCPO", "gold, no negatives"), ("GCPO", "negatives, no gold"),
        ("GCPO, gold x 3", "GCPO"), ("gold x 3, no negatives", "gold, no negatives"),
        ("gold, no negatives", "gold at 1, no negatives"), ("RFT", "GCPO"), ("SFT", "GCPO"),
        (SFT_EQUAL, "GCPO")),
    "far": (("GCPO", "gold, no negatives"), ("GCPO", SFT_EQUAL)),
    "scarce": (("GCPO", "gold, no negatives"), ("GCPO", "GSPO"), ("GCPO", "RFT, one round")),
    "shares": (("GCPO", SFT_EQUAL), ("GCPO", "gold, no negatives"), ("GCPO", "RFT, one round"))}
T_975 = (    # Student's t with 1, 2, … degrees of freedom
    12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093)


def square(args):
    """Gold and negatives, each with and without the other, from a model that solves easy problems
    often and hard ones never."""
    folder = os.path.join(args.work, "seeds")
    flags_of = start_from(folder, "base", "near-300.jsonl")
    arms = arms_at_rates(WITH_GOLD, ("1e-3", "2e-3"), flags_of)
    arms |= arms_at_rates(WITHOUT_GOLD, ("3e-4", "1e-3"), flags_of)
    compare("square", arms, lambda seed: seed_files(folder, seed), args)


def far(args):
    """`square` with gold in another style: each step said again in words, twice as long."""
    folder = os.path.join(args.work, "seeds")
    flags_of = start_from(folder, "base", "far-300.jsonl")

    def files_of(seed):
        at = seed_files(folder, seed)
        near = read(os.path.join(at, "near-300.jsonl"))
        write(os.path.join(at, "far-300.jsonl"), map(wordy, near))

    with_gold = {name: WITH_GOLD[name]
                 for name in ("GCPO", "gold, no negatives", "RFT", "SFT", SFT_EQUAL)}
    compare("far", arms_at_rates(with_gold, ("1e-3", "2e-3"), flags_of), files_of, args)


def scarce(args):
    """A model after SFT on few golds and its own right answers, then all problems, most of them
    with an answer alone."""
    folder = os.path.join(args.work, "seeds")
    sampling = {name: flags for name, flags in {**WITH_GOLD, **WITHOUT_GOLD}.items()
                if name not in ("SFT", SFT_EQUAL)}
    arms = scarce_arms(sampling, 0, ("3e-4", "6e-4"), folder)
    compare("scarce", arms, lambda seed: scarce_files(folder, seed, 0), args)


def shares(args):
    """From the same start model, with gold for more of the problems, at 6e-4."""
    folder = os.path.join(args.work, "seeds")
    sampling = {name: WITH_GOLD[name] for name in ("GCPO", "gold, no negatives")}
    arms = {}
    for more in SHARES:
        of_share = scarce_arms(sampling, more, ("6e-4",), folder)
        arms |= {(arm, str(more)): flags for (arm, _), flags in of_share.items() if arm != START}

    def files_of(seed):
        for more in SHARES:
            scarce_files(folder, seed, more)

    compare("shares", arms, files_of, args, setting="golds")


def scarce_arms(sampling: dict[str, str], more: int, rates, folder: str) -> dict:
    """From scarce_files' start model: that model itself, the arms of `sampling`, and SFT's."""
    def flags_of(data):
        return start_from(folder, os.path.join("start", "model"), f"{data}-{more}.jsonl")

    sft = {"SFT": "--algo sft", SFT_EQUAL: f"--algo sft --steps {EQUAL_STEPS_SCARCE}"}
    return {
        **arms_at_rates({START: "--steps 0"}, ("–",), flags_of("problems")),
        **arms_at_rates(sampling, rates, flags_of("problems")),
        **arms_at_rates(sft, rates, flags_of("golds")),
        **arms_at_rates({"RFT, one round": "--algo sft"}, rates, flags_of("own"))}


def start_from(folder: str, model: str, data: str):
    """The flags that name a seed's model and problems, as a function of the seed."""
    def of_seed(seed):
        at = os.path.join(folder, str(seed))
        return ["--model", os.path.join(at, model), "--data", os.path.join(at, data)]

    return of_seed


def held_out_of(folder: str, seed: int) -> dict[str, str]:
    """A seed's files of held-out locks: {"easy": path, "hard": path}."""
    return {kind: os.path.join(folder, str(seed), f"{kind}.jsonl") for kind in EACH_SEED}


def arms_at_rates(flags: dict[str, str], rates: tuple[str, ...], flags_of) -> dict:
    """{(arm, learning rate): its flags as a function of the seed}."""
    def of_seed(text, lr):
        return lambda seed: [*shlex.split(REGIME), *text.split(), *flags_of(seed), "--lr", lr]

    return {(arm, lr): of_seed(text, lr) for arm, text in flags.items() for lr in rates}


def compare(name: str, arms: dict, files_of, args, setting: str = "lr") -> None:
    """Run the arms, {(arm, its learning rate or other setting): flags of the seed}, a seed at a
    time; then print two tables, all arms and the differences of COMPARED.

    Each run leaves a line in docs/runs/NAME.jsonl, and is not run again."""
    kept = os.path.join(ROOT, "docs", "runs", f"{name}.jsonl")
    if args.seeds > len(T_975) + 1:
        sys.exit(f"error: --seeds {args.seeds}: at most {len(T_975) + 1}")
    found = {}
    if os.path.exists(kept):
        found = {(r["arm"], r[setting], r["seed"]): r for r in read(kept)}

    def run(arm, value, seed, flags):
        if (arm, value, seed) in found:
            return
        held_out = held_out_of(os.path.join(args.work, "seeds"), seed)
        result = {"arm": arm, setting: value, "seed": seed}
        out = run_folder(name, file_name(f"{arm}-{value}"), seed, args)
        if steps_of(flags) == 0:    # the start model
            result |= measured(flags[flags.index("--model") + 1], held_out) | {"seconds": 0.0}
        else:
            log = finish(out, [*flags, "--seed", str(seed)])
            result |= measured_once(out, held_out)
            result |= {"seconds": seconds(log), "curves": curves(log)}
        with open(kept, "a") as f:
            f.write(json.dumps(result) + "\n")
        found[arm, value, seed] = result
        shutil.rmtree(out, ignore_errors=True)

    for seed in range(args.seeds):
        if all((*key, seed) in found for key in arms):
            continue
        files_of(seed)
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda key: run(*key, seed, arms[key](seed)), arms))

    results = {key: [found[*key, seed] for seed in range(args.seeds)] for key in arms}
    names, values = zip(*results)
    heading = {"lr": "learning rate", "golds": "golds added"}[setting]
    table({
        "arm": names, heading: values,
        "easy": column(results, itemgetter("easy")),
        "hard": column(results, itemgetter("hard")),
        "tokens (hard)": column(results, itemgetter("hard tokens"), "{:.0f}"),
        "seconds": column(results, itemgetter("seconds"), "{:.0f}")})
    print()
    table_of_differences(results, COMPARED[name], dict.fromkeys(values), heading)


def curves(log: Log, steps: int = 25) -> dict[str, list[float]]:
    """What explains a run, as means over so many steps."""
    blocks = {}
    for record in log[1:]:
        for key in KEPT:
            if record.get(key) is not None and not key.startswith("eval/"):
                block = blocks.setdefault(key, {}).setdefault((record["step"] - 1) // steps, [])
                block.append(record[key])
    return {key: [float(f"{statistics.mean(values):.3g}") for values in of_key.values()]
            for key, of_key in blocks.items()}


def interval(values: list[float]) -> tuple[float, float]:
    """The mean, and half its 95 % interval (Student's t; of more values than the table has, the
    normal distribution's); nan for one value."""
    n = len(values)
    if n < 2:
        return statistics.mean(values), math.nan
    t = T_975[n - 2] if n <= len(T_975) + 1 else 1.96
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n)


def table_of_differences(found: dict, pairs, values, heading: str) -> None:
    """Of each pair of arms at each setting that both have: the difference on hard locks, in points,
    with its 95 % interval (Student's t) and each seed's."""
    rows = []
    for (a, b), value in itertools.product(pairs, values):
        if (a, value) in found and (b, value) in found:
            each = [100 * (x["hard"] - y["hard"])
                    for x, y in zip(found[a, value], found[b, value])]
            mean, half = interval(each)
            rows.append((f"{a} − {b}", value, f"{mean:+.1f} ± {half:.1f}",
                         ", ".join(f"{d:+.1f}" for d in each)))
    headings = ("hard, points", heading, "difference ± 95 %", "each seed")
    table(dict(zip(headings, zip(*rows))))


def seed_files(folder: str, seed: int) -> str:
    """A seed's own split, start model and problems. Written once."""
    folder = os.path.join(folder, str(seed))
    if os.path.isdir(os.path.join(folder, "base")):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    build_toy(os.path.join(folder, "toy"), seed)
    problems = split_locks(folder, random.Random(f"square {seed}"), EACH_SEED, TOY_NAMES[:2])
    alternating = [r for pair in zip(problems["easy"], problems["hard"]) for r in pair]
    write(os.path.join(folder, "near-300.jsonl"), alternating[:300])
    others = problems["hard"][GOLDS:HALF] + problems["easy"][:HALF]
    random.Random(f"scarce {seed}").shuffle(others)
    write(os.path.join(folder, "all-700.jsonl"), problems["hard"][:GOLDS] + others)
    warm_up(folder, problems["easy"], seed)
    return folder


def answer_alone(record: dict) -> dict:
    """The same problem without its gold."""
    return {"question": record["question"], "answer": record["answer"].split("#### ")[1]}


def scarce_files(folder: str, seed: int, more: int) -> None:
    """seed_files, and made of its 700 problems (models and their answers once):

    start                  the start model: the base after SFT on golds-0.jsonl
    golds-MORE.jsonl       the first 75 + `more` with gold, and OWN right answers of the base to
                           problems that are not among these 75
    problems-MORE.jsonl    all 700, the first 75 + `more` with gold, the rest with an answer alone
    own-MORE.jsonl         the first 75 + `more` with gold, and right answers of the start model to
                           the rest"""
    at = seed_files(folder, seed)
    base, start, first, of_base, of_start = (os.path.join(at, name) for name in (
        "base", "start", "golds-0.jsonl", "of-base.jsonl", "of-start.jsonl"))
    problems = read(os.path.join(at, "all-700.jsonl"))
    if not os.path.exists(of_base):
        own_answers(base, problems[GOLDS:], of_base)
    some = read(of_base)
    some = random.Random(seed).sample(some, min(OWN, len(some)))
    write(first, problems[:GOLDS] + some)
    finish(start, ["--algo", "sft", "--model", base, "--data", first, *shlex.split(REGIME),
                   "--steps", "600", "--lr", "1e-3", "--seed", str(seed)])
    if not os.path.exists(of_start):
        own_answers(os.path.join(start, "model"), problems[GOLDS:], of_start)
    with_gold, rest = problems[:GOLDS + more], problems[GOLDS + more:]
    without_gold = {r["question"] for r in rest}
    write(os.path.join(at, f"golds-{more}.jsonl"), with_gold + some)
    write(os.path.join(at, f"problems-{more}.jsonl"), with_gold + list(map(answer_alone, rest)))
    write(os.path.join(at, f"own-{more}.jsonl"),
          with_gold + [r for r in read(of_start) if r["question"] in without_gold])


def own_answers(model: str, problems: list[dict], path: str) -> None:
    """Write the problems that a model solves in 8 tries, with a right answer as gold."""
    write_gold(model, write(path + ".asked", problems), 8, path)


def write_gold(model: str, data: str, samples: int, path: str) -> None:
    """The problems of a file that a model solves, each with a right answer as gold."""
    command = [sys.executable, os.path.join(ROOT, "evaluate.py"),
               "--model", model, "--data", data, "--samples", str(samples),
               "--max-new-tokens", "48", "--instruction", "", "--dtype", "float32",
               "--keep-correct", path]
    subprocess.run(command, check=True, capture_output=True)


# ---- ranks ---------------------------------------------------------------------------------------

RANKS = {    # low rank, and the learning rates that were tried with it
    "": ("1e-3", "2.5e-3"),
    "4": ("2.5e-3", "1e-2"),
    "16": ("2.5e-3", "1e-2"),
    "64": ("2.5e-3", "1e-2")}


def ranks(args):
    """SFT in low rank and in full, twice: the toy from random weights, which has everything to
    learn; and 300 problems with gold for a model that solves easy ones, as in `square`."""
    folder = os.path.join(args.work, "seeds")
    for seed in range(args.seeds):
        seed_files(folder, seed)

    warm_start = start_from(folder, "base", "near-300.jsonl")

    def from_warm(flags):
        return lambda seed: [*shlex.split(REGIME), *flags, *warm_start(seed)]

    settings, random_arms, warm_arms = {}, {}, {}
    for rank, rates in RANKS.items():
        for lr in rates:
            name = f"{rank or 'full'}-{lr}"
            settings[name] = (rank or "full", lr)
            flags = ["--algo", "sft", "--lr", lr, *(["--lora-rank", rank] if rank else [])]
            random_arms[name] = flags
            warm_arms[name] = from_warm(flags)
    cold = run_all("ranks-random", random_arms, args)
    run_all("ranks-warm", warm_arms, args)
    warm = {}
    for name in settings:
        warm[name] = [
            measured_once(run_folder("ranks-warm", name, seed, args), held_out_of(folder, seed))
            for seed in range(args.seeds)]
    shown, rates = zip(*settings.values())
    table({
        "rank": shown, "learning rate": rates,
        "from random weights: held out": column(cold, accuracy),
        "from a warm model: easy": column(warm, itemgetter("easy")),
        "hard": column(warm, itemgetter("hard"))})


# ---- golds ---------------------------------------------------------------------------------------

def golds(args):
    """Whose gold: the data set's in two styles and in a mixture of both, or that of a model which
    learned from such gold. From the same random weights."""
    at = os.path.join(args.work, "golds-data")
    files = gold_files(at)
    settings = {}    # of each run's name
    arms = {}        # its flags
    for algo, gold in itertools.product(("gcpo", "sft"), files):
        name = f"{algo}-{gold.replace(' ', '-')}"
        settings[name] = (algo, gold)
        arms[name] = ["--algo", algo, "--data", files[gold], *gold_flags(at)]
    runs = run_all("golds", arms, args)
    lengths = {gold: gold_lengths(path) for gold, path in files.items()}
    of_runs = [lengths[gold] for _, gold in settings.values()]
    table({
        "": [f"`{algo}`" for algo, _ in settings.values()],
        "gold": [gold for _, gold in settings.values()],
        "problems with it": [f"{len(x):,}" for x in of_runs],
        "its characters": [f"{statistics.mean(x):.0f}" for x in of_runs],
        "held-out accuracy": column(runs, accuracy),
        "50 % at step": steps_to(runs, 0.5),
        "90 % at step": steps_to(runs, 0.9),
        "tokens at the end": column(runs, lambda log: last(log, "eval/tokens"), "{:.0f}"),
        "seconds": column(runs, seconds, "{:.0f}"),
    })


def gold_flags(at: str) -> list[str]:
    """The toy's settings, with room for longer gold."""
    flags = ["--model", os.path.join(at, "toy", "model")]
    flags += ["--eval-data", os.path.join(at, "toy", "held_out.jsonl")]
    settings = {**TOY, "max_new_tokens": 48}
    del settings["threads"]    # `finish` sets it
    return flags + as_flags(settings)


def gold_files(at: str) -> dict[str, str]:
    """The problems with each gold: {whose gold: path}. Written once."""
    files = {f"{style} gold": os.path.join(at, f"{style}.jsonl")
             for style in ("near", "far", "mixed")}
    if not os.path.exists(files["mixed gold"]):    # the last to be written
        shutil.rmtree(at, ignore_errors=True)
        build_toy(os.path.join(at, "toy"), 0)
        near = read(os.path.join(at, "toy", "train.jsonl"))
        far = [wordy(r) for r in near]
        rng = random.Random(2)
        mixed = [rng.choice(pair) for pair in zip(far, near)]
        for style, records in (("near", near), ("far", far), ("mixed", mixed)):
            write(files[f"{style} gold"], records)
    for style in ("far", "mixed"):
        files[f"gold by a model of {style} gold"] = gold_by_a_model(at, style)
    return files


def gold_by_a_model(at: str, style: str) -> str:
    """The teacher learned from half the problems, with gold of this style, and writes for all."""
    written = os.path.join(at, f"by-model-{style}.jsonl")
    if os.path.exists(written):
        return written
    everything = os.path.join(at, f"{style}.jsonl")
    half = write(os.path.join(at, f"half-{style}.jsonl"), read(everything)[:2000])
    teacher = os.path.join(at, f"teacher-{style}")
    finish(teacher, ["--algo", "sft", "--data", half, *gold_flags(at)])
    write_gold(os.path.join(teacher, "model"), everything, 4, written)
    return written


def gold_lengths(path: str) -> list[int]:
    """In characters."""
    return [len(r.get("gold", r["answer"])) for r in read(path)]


EXPERIMENTS = {
    "toy": toy,
    "ablations": ablations,
    "regimes": regimes,
    "square": square,
    "far": far,
    "scarce": scarce,
    "shares": shares,
    "ranks": ranks,
    "golds": golds,
}


if __name__ == "__main__":
    main()
