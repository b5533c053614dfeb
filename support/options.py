"""Settings: one field, one flag, one line of --help. Where a run lies, and what it may change when
it is resumed.
"""
from __future__ import annotations

import argparse
import glob
import math
import os
import re
import shlex
import sys
from dataclasses import asdict, dataclass, fields, replace
from importlib import util

import torch

from gcpo import ALGORITHMS, Algorithm, switch
from grader import GRADERS, Reward
from support import parallel
from support.checkpoint import lock_folder, sha256
from support.common import (
    InputError, as_flags, flag, one_line, pick_device, refuse_blank, refuse_out_of_range,
    remove)
from support.folders import TOKENIZER_FILES, weight_files
from support.math_verify import MathVerify
from support.toy import TOY, build_toy, only_begun, toy_files


@dataclass(frozen=True)
class Config:
    """The settings of a run. The switches of gcpo.Algorithm are flags as well."""
    # What to train on
    model: str = switch(None, "Hugging Face model folder (without --model and --data: the toy)")
    data: str = switch(None, "training problems: .jsonl, .jsonl.gz, .json or .parquet")
    eval_data: str = switch(None, "held-out problems, evaluated before and after training and "
                                  "every --eval-every steps")
    answer_format: str = switch("hash", "what instruction and gold use: #### or \\boxed{}",
                                ("hash", "boxed"))
    instruction: str = switch(None, "text after each question, in place of the format's own")
    answer_only_gold: bool = switch(False, "make gold of the bare answer if the data has no "
                                           "solution")
    strict: bool = switch(False, "refuse a file with records that would be left out")
    chat_template_args: str = switch(None, "variables for the chat template, as JSON: "
                                           """'{"enable_thinking": false}'""")
    stop_token: str = switch(None, "more tokens that end a response, with blanks between them")
    reward: str = switch(None, "FILE.py:function, (response, answer) -> float, in place of the "
                               "grader; or math_verify, where that package is installed")
    correct_at: float = switch(1.0, "reward from which on a response counts as correct")

    # How
    algo: str = switch("gcpo", "preset of the switches below", tuple(ALGORITHMS))
    steps: int = switch(200, "training steps: batches of rollouts")
    prompts: int = switch(8, "problems per step")
    group_size: int = switch(8, "G, rollouts per problem")
    max_new_tokens: int = switch(200, "longest response; gold that is longer is not used")
    temperature: float = switch(1.0, "of sampling, and of scoring what is trained on (sft, rft: 1)")
    updates: int = switch(1, "optimizer steps per batch of rollouts, each on its minibatch of "
                             "the groups")
    lr: float = switch(1e-5, "learning rate of AdamW, reached after the warm-up")
    lr_end: float = switch(1.0, "share of the learning rate left at the last step (linear)")
    warmup: int = switch(5, "steps of linear warm-up")
    weight_decay: float = switch(0.0, "decoupled weight decay")
    lora_rank: int = switch(0, "r: train matrices A (r, in) and B (out, r) beside each matrix of "
                               "the blocks, which stays (LoRA): far less memory; 0: train all")
    lora_alpha: float = switch(32.0, "α: W = W0 + (α / r) · B A; with --lora-rank --lr is 1e-4 "
                                     "unless it is given")
    max_grad_norm: float = switch(1.0, "gradients are scaled down to this norm")
    seed: int = switch(0, "of everything random")

    # What is evaluated, saved and shown
    out: str = switch(None, "folder for model, logs and samples (default: a new one under runs/)")
    eval_every: int = switch(0, "evaluate every so many steps; 0: before and after only")
    eval_samples: int = switch(1, "responses per held-out problem; 1 is greedy, more are sampled "
                                  "at temperature 1")
    eval_limit: int = switch(200, "only the first so many held-out problems; 0: all")
    save_every: int = switch(50, "write a checkpoint every so many steps, and at the end; 0: at "
                                 "the end only")
    keep: int = switch(2, "checkpoints to keep, and the best by evaluation besides")
    resume: bool = switch(False, "go on with the run in --out (default: the newest of its name), "
                                 "to the bit")
    max_bad_steps: int = switch(10, "stop after so many steps in a row whose gradient is not "
                                    "finite")
    track: str = switch(None, "send metrics to this program, too, under the same names",
                        ("wandb", "trackio", "tensorboard"))
    show: bool = switch(False, "the same as show.py: one group before your eyes, nothing saved")

    # The machine
    device: str = switch("auto", "auto, cpu, cuda, cuda:1 …")
    dtype: str = switch("auto", "of the policy, which samples and scores; auto: bfloat16 where it "
                                "is faster and precise enough", ("auto", "float32", "bfloat16"))
    threads: int = switch(0, "CPU threads; 0: PyTorch's choice")
    rows: int = switch(0, "rows sampled at a time; 0: what fits in memory, at most 256, or one "
                          "group")
    rows_per_pass: int = switch(8, "rows that go through an update together: a group, part of a "
                                   "large one, or several small ones; on a GPU by default as many "
                                   "as hold 8,192 tokens")
    gradient_checkpointing: bool = switch(False, "compute activations again in backward: less "
                                                 "memory, 1.3 to 1.9 x the time of an update")
    shard: bool = switch(False, "each of torchrun's processes keeps only its part of fp32 weights, "
                                "gradients and moments, beside a whole copy that samples")


HEADINGS = {  # of --help, each by the first of its flags
    "model": "what to train on",
    "algo": "how",
    "out": "what is evaluated, saved and shown",
    "device": "the machine",
}
SWITCHES = {f.name for f in fields(Algorithm)}

# Where "auto" may not be bf16: a sequence ratio over ~100 tokens carries so much rounding noise
# (measured on SmolLM2-135M), and GSPO's clip range is 4e-4.
BF16_RATIO_NOISE = 0.005


def learning_rate(step: int, config: Config) -> float:
    """For step `step` (from 0): linear warm-up, then linear to lr · lr_end at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - 1 - config.warmup)
    return config.lr * (1 - (1 - config.lr_end) * done)


# ---- From the command line to settings -----------------------------------------------------------

def parse_flags(argv: list[str] | None = None) -> tuple[Config, Algorithm, dict]:
    """Config and Algorithm from the command line, and the flags that were given by hand. Raises
    InputError for settings that cannot be."""
    given = vars(flag_parser().parse_args(argv))
    toy = "model" not in given and "data" not in given
    if not toy and not ("model" in given and "data" in given):
        missing = "data" if "model" in given else "model"
        raise InputError(
            f"--{missing} is missing: give --model and --data, or neither for the toy")
    if toy and "eval_data" in given:
        raise InputError(
            "--eval-data needs --model and --data: the toy brings its own held-out problems")
    settings = {name: value for name, value in given.items() if name not in SWITCHES}
    switches = {name: value for name, value in given.items() if name in SWITCHES}
    config = Config(**{**(TOY if toy else {}), **settings})
    check(config)
    try:
        algorithm = replace(ALGORITHMS[config.algo], **switches)
        if algorithm.train_on == "gold":
            algorithm = only_gold(algorithm, algorithm.aggregation)
    except ValueError as e:
        name, _, rest = str(e).partition("=")
        rest = re.sub(r"\b(\w+)=(\w+)", lambda m: f"{flag(m[1])} {m[2]}", rest)
        raise InputError(f"{flag(name)} {rest}") from None
    if config.lora_rank and "lr" not in given:
        config = replace(config, lr=1e-4)
    if config.group_size == 1 and algorithm.train_on == "rollouts":
        raise InputError("--group-size 1: a group of one has no contrast; use 2 or more")
    return fit_together(config, algorithm, given), algorithm, given


def only_gold(algorithm: Algorithm, aggregation: str) -> Algorithm:
    """SFT under the algorithm's name. Nothing is sampled, its ratio is 1 by definition and its
    advantage 1: so of all switches only `aggregation` acts on it. (What SFT must heed as well is a
    field of Config.)"""
    return replace(ALGORITHMS["sft"], name=algorithm.name, paper=algorithm.paper,
                   aggregation=aggregation)


def sft_stage(algorithm: Algorithm, given: dict) -> Algorithm:
    """What --sft-share trains with: SFT, with --aggregation if it was given by hand."""
    return only_gold(algorithm, given.get("aggregation", ALGORITHMS["sft"].aggregation))


def flag_parser() -> argparse.ArgumentParser:
    """One flag for each field of Config and each switch of Algorithm, under headings."""
    toy = " ".join(f"{flag(name)} {value}" for name, value in TOY.items() if value != "")
    parser = argparse.ArgumentParser(
        description="Train a model by GCPO and its relatives.",
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
        epilog=f"Without --model and --data the defaults are the toy's: {toy}")

    def fail(message):
        raise InputError(f"{message} (train.py --help lists the flags)")

    parser.error = fail
    for spec in fields(Config):
        if spec.name in HEADINGS:
            group = parser.add_argument_group(HEADINGS[spec.name])
        text = spec.metadata["help"]
        if spec.default is not None and spec.default is not False:
            text += f" (default {spec.default})"
        add_flag(group, spec, text)
    group = parser.add_argument_group("switches of the algorithm (default: the preset's)")
    for spec in fields(Algorithm):
        if spec.metadata:
            add_flag(group, spec, spec.metadata["help"])
    return parser


def add_flag(group, spec, text: str) -> None:
    text = text.replace("%", "%%")
    if spec.default is False:
        group.add_argument(flag(spec.name), action="store_true", help=text)
        return

    def number_or_none(text):
        return None if text.lower() == "none" else float(text)

    # Annotations are text here (from __future__ import annotations).
    kind = {"int": int, "float": float, "str": str}.get(spec.type, number_or_none)
    choices = spec.metadata["choices"] or None
    metavar = None if choices else spec.type.split(" ")[0].upper()
    group.add_argument(
        flag(spec.name), type=kind, choices=choices, metavar=metavar, help=text)


LEAST = dict(
    steps=1, prompts=1, group_size=1, max_new_tokens=1, updates=1, lr=0, lr_end=0, warmup=0,
    weight_decay=0, eval_every=0, eval_samples=1, eval_limit=0, save_every=0, keep=1,
    max_bad_steps=1, threads=0, rows=0, rows_per_pass=1, seed=0,
    lora_rank=0, lora_alpha=0, correct_at=-math.inf)


def check(config: Config) -> None:
    """Raises InputError for settings that cannot be, alone or together, and for an --out that is
    taken."""
    refuse_blank(config, ("model", "data", "eval_data", "out", "reward", "chat_template_args",
                          "stop_token", "device"))
    refuse_out_of_range(config, LEAST)
    for name in ("temperature", "max_grad_norm"):
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise InputError(f"{flag(name)} {value}: must be above 0, and finite")
    if config.threads > 1024:
        raise InputError(f"--threads {config.threads}: too large")
    if 0 < config.rows < config.group_size:
        raise InputError(f"--rows {config.rows}: a group is sampled whole, so it must be "
                         f"--group-size {config.group_size} or more")
    if config.updates > config.prompts:
        raise InputError(f"--updates {config.updates}: each update needs a group, and there are "
                         f"--prompts {config.prompts}")
    if config.out and not config.resume:
        refuse_taken(config.out)
    if config.lora_rank and config.shard:
        raise InputError("--lora-rank: low-rank weights are small, and --shard does not divide "
                         "them; leave it out")
    if config.track and not util.find_spec(config.track):
        raise InputError(f"--track {config.track}: pip install {config.track}")


def fit_together(config: Config, algorithm: Algorithm, given: dict) -> Config:
    """Settings that follow from others, and a note where one given by hand does not act."""
    if algorithm.objective == "pairs":    # a pair's loss needs both its rows, and no other group's
        if config.rows_per_pass != config.group_size and "rows_per_pass" in given:
            print("note: with objective pairs a whole group is a pass: "
                  f"--rows-per-pass {config.group_size}", file=sys.stderr)
        config = replace(config, rows_per_pass=config.group_size)
    elif "rows_per_pass" not in given:
        least = rows_that_fill(config.device, config.max_new_tokens)
        config = replace(config, rows_per_pass=max(config.rows_per_pass, least))
    idle = idle_switches(algorithm, config) | idle_settings(algorithm, config)
    idle = [name for name in given if name in idle]
    if idle:
        flags = ", ".join(flag(name) for name in idle)
        print(f"note: with these settings the run does not look at {flags}", file=sys.stderr)
    widest = max(algorithm.clip_low, algorithm.clip_high)
    drowned = algorithm.level == "sequence" and widest < BF16_RATIO_NOISE
    if config.updates > 1 and drowned:    # rounding alone would clip nearly every sequence
        if config.dtype == "auto":
            config = replace(config, dtype="float32")
        elif config.dtype == "bfloat16":
            print(f"warning: in bfloat16 a sequence ratio carries about {BF16_RATIO_NOISE} of "
                  "rounding noise, more than the clip range; use --dtype float32 or wider "
                  "--clip-low and --clip-high", file=sys.stderr)
    return config


def rows_that_fill(device: str, max_new_tokens: int) -> int:
    """Rows of a pass that keep a GPU busy: fewer than 8,192 tokens, and it waits for Python to
    launch its work (Qwen2.5-1.5B, 64 rows of 256 tokens: 1.2 s by eights, 0.5 s by 32)."""
    on_gpu = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    return max(1, 8192 // max_new_tokens) if on_gpu else 1


def idle_switches(algorithm: Algorithm, config: Config) -> set[str]:
    """Switches that change nothing, beside those that are set."""
    if algorithm.train_on == "gold":
        return SWITCHES - {"train_on", "aggregation"}
    idle = set()
    sft_steps = sft_steps_of(algorithm, config)
    if sft_steps == config.steps:
        return SWITCHES - {"sft_share", "aggregation"}
    if sft_steps == 0:
        idle |= {"sft_share"}
    if algorithm.objective != "pairs":
        idle |= {"beta"}
    if algorithm.resample != "dynamic":
        idle |= {"max_tries"}
    if algorithm.train_on == "right":    # ratio 1 and advantage 1
        idle |= {"level", "clip_low", "clip_high", "scale", "virtual_right", "overlong"}
        idle |= {"objective", "gold_clip", "gold_rivals", "gold_advantage", "gold_weight"}
    if algorithm.objective == "pairs":
        idle |= {"level", "clip_low", "clip_high", "aggregation", "scale"}
        idle |= {"gold_old", "gold_shape", "gold_clip", "gold_advantage"}
    if algorithm.gold_shape == "ratio":
        idle |= {"gold_clip"}
    if algorithm.gold_when == "never":
        idle |= {name for name in SWITCHES if name.startswith("gold_")} - {"gold_when"}
    return idle


def idle_settings(algorithm: Algorithm, config: Config) -> set[str]:
    """Settings that change nothing, beside the others."""
    idle = set()
    has_held_out = config.eval_data or not config.model    # the toy brings its own
    if algorithm.train_on == "gold" or sft_steps_of(algorithm, config) == config.steps:
        idle |= {"group_size", "temperature"}
        if not has_held_out:    # whose evaluation heeds it
            idle |= {"rows"}
    if config.lora_rank == 0:
        idle |= {"lora_alpha"}
    if not has_held_out:
        idle |= {"eval_every", "eval_samples", "eval_limit"}
    return idle


def sft_steps_of(algorithm: Algorithm, config: Config) -> int:
    """How many of the steps are SFT, the first ones (--sft-share)."""
    return round(algorithm.sft_share * config.steps)


def as_command(config: Config, given: dict) -> str:
    """The run as one command, whatever chose its settings. Run again, it finds a new folder."""
    own = {f.name: getattr(config, f.name) for f in fields(Config)
           if f.name not in ("out", "resume", "show")}
    defaults = asdict(Config())
    settings = {name: value for name, value in own.items()
                if value != defaults[name] or name == "algo" or name in given}
    settings |= {name: value for name, value in given.items() if name in SWITCHES}
    return shlex.join(["python", "train.py", *as_flags(settings)])


def load_reward(
    spec: str | None, correct_at: float = 1.0, answer_format: str = "hash",
) -> Reward:
    """The grader; the package math-verify; or the user's own function (response, answer) -> float
    from FILE.py:function."""
    if spec is None:
        return Reward(GRADERS[answer_format], correct_at)
    if spec == "math_verify":
        return Reward(MathVerify(), correct_at)
    path, _, name = spec.rpartition(":")
    if not path or not os.path.isfile(path):
        raise InputError(f"--reward {spec}: expected FILE.py:function, and the file must exist")
    function = getattr(import_file(path), name, None)
    if not callable(function):
        raise InputError(f"--reward {spec}: {path} has no function {name}")

    def checked(response, answer):
        try:
            value = float(function(response, answer))
        except (Exception, SystemExit) as e:
            raise InputError(f"--reward {spec}: failed on response {response[:60]!r} "
                             f"({one_line(e)})") from None
        if not abs(value) <= torch.finfo(torch.float32).max:
            raise InputError(f"--reward {spec}: returned {value} for response {response[:60]!r}; "
                             "a reward must be finite")
        return value

    return Reward(checked, correct_at)


def import_file(path: str):
    """The module in the user's file."""
    try:
        spec = util.spec_from_file_location("user_reward", path)
        module = util.module_from_spec(spec)
        sys.modules["user_reward"] = module    # dataclasses look themselves up there
        spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as e:
        raise InputError(f"--reward {path}: cannot be imported ({one_line(e)})") from None


# ---- Where a run lies ----------------------------------------------------------------------------

def set_up_process(config: Config) -> torch.device:
    """Meet the other processes, and choose this one's device and threads."""
    own_device = parallel.join(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.shard and parallel.world() == 1:
        raise InputError("--shard: there is one process; torchrun --nproc-per-node N train.py … "
                         "starts N")
    if own_device and config.device == "auto":
        return pick_device(own_device)
    if own_device and config.device.startswith("cuda"):
        raise InputError(f"--device {config.device}: under torchrun each process takes a GPU of "
                         "its own; leave out --device")
    return pick_device(config.device)


def run_name(config: Config) -> str:
    """The model's name: runs/NAME/model is NAME; without a model, toy."""
    folder = os.path.abspath(config.model or "toy")
    if os.path.basename(folder) == "model":
        folder = os.path.dirname(folder)
    return os.path.basename(folder)


def place_run(config: Config, algorithm: Algorithm) -> Config:
    """The config with `out` filled in: a folder that no other run can take from now on."""
    parallel.refuse_difference(
        {name: value for name, value in {**asdict(config), **asdict(algorithm)}.items()
         if name not in MAY_DIFFER})
    stem = os.path.join("runs", f"{run_name(config)}-{algorithm.name}")
    out = config.out
    if out is None and parallel.rank() == 0:
        out = latest_folder(stem) if config.resume else fresh_folder(stem)
    out = parallel.from_first(out)
    run_file = os.path.join(out, "run.json")
    if config.resume and not parallel.from_first(os.path.isfile(run_file)):
        raise InputError(f"--resume: {out} holds no run (no run.json there); name the run with "
                         "--out, or begin anew without --resume")
    if config.resume:
        refuse_unshared(run_file)
    if parallel.rank() == 0:
        os.makedirs(out, exist_ok=True)
        lock_folder(out)
        if not config.resume:
            refuse_taken(out)    # once more: another run may just have ended in it
    return replace(config, out=out)


def refuse_taken(out: str) -> None:
    """Raises InputError for a path where there is more than a run leaves that cannot begin."""
    if os.path.exists(out) and not (os.path.isdir(out) and only_begun(out)):
        raise InputError(f"--out {out}: there is something already; name another folder, remove "
                         "it, or add --resume to go on with it")


def with_toy(config: Config) -> Config:
    """The config; if there is no model, with the toy's, which is built in the run's folder."""
    if config.model is not None:
        return config
    folder = os.path.join(config.out, "toy")
    if parallel.rank() == 0 and not config.resume:
        remove(folder)    # a run that was stopped as it began may have left one
        build_toy(folder, config.seed)
    parallel.from_first(None)    # the others wait until it is there
    refuse_unshared(folder)
    return replace(config, **toy_files(folder))


def refuse_unshared(path: str) -> None:
    """Raises InputError where the first process has written a file that this one cannot see."""
    if not os.path.exists(path):
        raise InputError(f"{path}: the first process has it and this one does not see it; the "
                         "run's folder must be on a disk that all nodes share")


def fresh_folder(stem: str) -> str:
    """runs/NAME, or runs/NAME-2, -3 … if it is taken. Made at once: another run may begin now."""
    name, n = stem, 1
    while True:
        try:
            os.makedirs(name)
            return name
        except FileExistsError:
            n += 1
            name = f"{stem}-{n}"


def latest_folder(stem: str) -> str:
    """The newest run of this name, by its run.json."""
    newest = stem
    written = 0.0
    for path in glob.glob(f"{glob.escape(stem)}*/run.json"):
        folder = os.path.dirname(path)
        if re.fullmatch(r"(-\d+)?", folder[len(stem):]) and os.path.getmtime(path) > written:
            newest, written = folder, os.path.getmtime(path)
    return newest


# ---- What a resumed run must have in common with its beginning -----------------------------------

# These may change. Of model and data the content must stay, not the path; of the device its kind,
# not its number. Those that only say how things are computed may change too, or a run that lacks
# memory could not go on; then it does not go on to the bit.
MAY_CHANGE = {
    "out", "resume", "show", "track", "steps", "eval_every", "save_every", "keep", "max_bad_steps",
    "model", "data", "eval_data",
    "device", "threads", "shard", "rows", "rows_per_pass", "gradient_checkpointing"}


# Of several processes these need not be the same.
MAY_DIFFER = {
    "out", "track", "model", "data", "eval_data", "device", "threads", "rows", "rows_per_pass"}


def record_of(run) -> dict:
    """The settings and file digests that a run must keep when it is resumed. run: a train.Run."""
    config = run.config
    settings = {"algorithm": asdict(run.algorithm)}
    settings |= {k: v for k, v in asdict(config).items() if k not in MAY_CHANGE}
    if config.lr_end != 1 or run.algorithm.sft_share:    # these depend on how long the run is
        settings["steps"] = config.steps
    given = run.sft.aggregation != ALGORITHMS["sft"].aggregation
    settings["sft_aggregation"] = run.sft.aggregation if given else None
    settings |= {"device": run.master.device.type, "dtype": str(run.policy.dtype)}
    reward_file = config.reward and config.reward.rpartition(":")[0]
    files = {"data": config.data, "eval_data": config.eval_data, "reward_file": reward_file}
    for path in weight_files(config.model):
        files[f"model/{os.path.basename(path)}"] = path
    for name in ("config.json", *TOKENIZER_FILES):
        path = os.path.join(config.model, name)
        if os.path.isfile(path):
            files[f"model/{name}"] = path
    return settings | {name: path and sha256(path) for name, path in files.items()}
