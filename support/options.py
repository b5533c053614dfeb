"""Settings: one field, one flag; what may change on resuming; the run as one command."""
from __future__ import annotations

import argparse
import glob
import math
import os
import re
import shlex
import sys
from dataclasses import asdict, dataclass, fields, replace

import torch

from gcpo import ALGORITHMS, Algorithm, switch
from model import Transformer
from sampler import cache_bytes_per_token, rows_that_fit
from support import parallel
from support.checkpoint import sha256
from support.common import InputError
from support.folders import TOKENIZER_FILES, weight_files
from support.toy import TOY


@dataclass(frozen=True)
class Config:
    """One field, one flag, one line of --help. The switches of gcpo.Algorithm are flags as well."""
    model: str = switch(None, "Hugging Face model folder (without --model and --data: the toy)")
    data: str = switch(None, "training problems: .jsonl, .jsonl.gz or .json")
    eval_data: str = switch(None, "held-out problems, evaluated before and after training and every --eval-every steps")
    out: str = switch(None, "folder for model, logs and samples (default: a new one under runs/)")
    algo: str = switch("gcpo", "preset of the switches below", tuple(ALGORITHMS))
    steps: int = switch(200, "training steps: batches of rollouts")
    prompts: int = switch(8, "problems per step")
    group_size: int = switch(8, "G, rollouts per problem")
    max_new_tokens: int = switch(200, "longest response; gold that is longer is not used")
    updates: int = switch(1, "optimizer steps per batch of rollouts, each on its share of the groups")
    temperature: float = switch(1.0, "of sampling; it divides the logits in scoring too")
    lr: float = switch(1e-5, "learning rate of AdamW, reached after the warm-up")
    lr_end: float = switch(1.0, "share of the learning rate left at the last step (linear)")
    warmup: int = switch(5, "steps of linear warm-up")
    weight_decay: float = switch(0.0, "decoupled weight decay")
    max_grad_norm: float = switch(1.0, "gradients are scaled down to this norm")
    eval_every: int = switch(0, "evaluate every so many steps; 0: before and after only")
    eval_samples: int = switch(1, "responses per held-out problem; 1 is greedy, more are sampled at temperature 1")
    eval_limit: int = switch(200, "only the first so many held-out problems; 0: all")
    save_every: int = switch(50, "write a checkpoint every so many steps, and at the end; 0: at the end only")
    keep: int = switch(2, "checkpoints to keep, and the best by evaluation besides")
    show: bool = switch(False, "sample one group, print what the algorithm does with it, and stop")
    resume: bool = switch(False, "go on with the run in --out (default: the newest of its name), to the bit")
    max_bad_steps: int = switch(10, "stop after so many steps in a row whose gradient is not finite")
    answer_format: str = switch("hash", "what instruction and gold use: #### or \\boxed{}", ("hash", "boxed"))
    instruction: str = switch(None, "text after each question, in place of the format's own")
    answer_only_gold: bool = switch(False, "make gold from the bare answer where the data has no solution")
    reward: str = switch(None, "FILE.py:function, (response, answer) -> float, in place of the grader")
    correct_at: float = switch(1.0, "reward from which on a response counts as correct")
    seed: int = switch(0, "of everything random")
    device: str = switch("auto", "auto, cpu, cuda, cuda:1 …")
    dtype: str = switch("auto", "of the compute; auto: bfloat16 where it is faster and precise enough", ("auto", "float32", "bfloat16"))
    threads: int = switch(0, "CPU threads; 0: PyTorch's choice")
    rows: int = switch(0, "rows sampled at a time; 0: what fits in memory, at most 256")
    shard: bool = switch(False, "each of torchrun's processes keeps its part of weights, gradients and moments only, for models larger than one device")
    gradient_checkpointing: bool = switch(False, "compute activations again in backward: less memory, about a third more time")
    rows_per_pass: int = switch(8, "rows that go through an update together: a group, part of a large one, or several small ones")

BF16_RATIO_NOISE = 0.005  # of a sequence ratio over ~100 tokens, measured on SmolLM2-135M


def parse_flags(argv: list[str] | None = None) -> tuple[Config, Algorithm, dict]:
    """Config and Algorithm from the command line, and the flags that were given by hand."""
    parser = argparse.ArgumentParser(description="Training: sample → grade → substitute gold → advantages → updates → log → evaluate → save.", argument_default=argparse.SUPPRESS, allow_abbrev=False,
                                     epilog="Without --model and --data the defaults are the toy's: " + ", ".join(f"--{k.replace('_', '-')} {v}" for k, v in TOY.items() if v != ""))

    def fail(message):
        raise InputError(f"{message} (train.py --help lists the flags)")
    parser.error = fail

    settings, switches = parser.add_argument_group("settings"), parser.add_argument_group("switches of the algorithm (default: the preset's)")

    def optional(kind):
        return lambda text: None if text.lower() == "none" else kind(text)

    def add(group, spec):
        name, default, choices = "--" + spec.name.replace("_", "-"), spec.default, spec.metadata["choices"]
        text = spec.metadata["help"].replace("%", "%%")
        if default is False:
            return group.add_argument(name, action="store_true", help=text)
        # Annotations are text here (from __future__ import annotations).
        kind = {"int": int, "float": float, "str": str}.get(spec.type, optional(float))
        group.add_argument(name, type=kind, choices=choices, metavar=None if choices else spec.type.split(" ")[0].upper(),
                           help=text if group is switches or default is None else f"{text} (default {default})")

    for spec in fields(Config):
        add(settings, spec)
    for spec in fields(Algorithm):
        if spec.metadata:
            add(switches, spec)
    given = vars(parser.parse_args(argv))

    toy = "model" not in given and "data" not in given
    if not toy and not ("model" in given and "data" in given):
        raise InputError(f"--{'data' if 'model' in given else 'model'} is missing: give --model and --data, or neither for the toy")
    if toy and "eval_data" in given:
        raise InputError("--eval-data needs --model and --data: the toy brings its own held-out problems")
    names = {f.name for f in fields(Config)}
    config = Config(**{**(TOY if toy else {}), **{k: v for k, v in given.items() if k in names}})
    check(config)
    try:
        algorithm = replace(ALGORITHMS[config.algo], **{k: v for k, v in given.items() if k not in names})
    except ValueError as e:
        name, _, rest = str(e).partition("=")
        raise InputError(f"--{name.replace('_', '-')} {rest.replace('gold_old=one', '--gold-old one')}") from None
    if algorithm.objective == "pairs":
        if config.rows_per_pass != config.group_size and "rows_per_pass" in given:
            print(f"note: with objective pairs a whole group is a pass: --rows-per-pass {config.group_size}", file=sys.stderr)
        config = replace(config, rows_per_pass=config.group_size)   # a pair's loss needs both its rows, and no other group's
    idle = [name for name in given if name not in names and name not in ("train_on", "sft_share", "aggregation")] if algorithm.train_on == "gold" else []
    if idle:
        print(f"note: trained on gold alone, a run does not look at {', '.join('--' + name.replace('_', '-') for name in idle)}", file=sys.stderr)
    if config.group_size == 1 and algorithm.train_on == "rollouts":
        raise InputError("--group-size 1: a group of one has no contrast; use 2 or more")
    if config.updates > 1 and algorithm.level == "sequence" and max(algorithm.clip_low, algorithm.clip_high) < BF16_RATIO_NOISE:
        if config.dtype == "auto":
            config = replace(config, dtype="float32")  # rounding alone would clip nearly every sequence
        elif config.dtype == "bfloat16":
            print(f"warning: in bfloat16 a sequence ratio carries about {BF16_RATIO_NOISE} of rounding noise, more than the clip range; "
                  "use --dtype float32 or wider --clip-low and --clip-high", file=sys.stderr)
    return config, algorithm, given


def check(config: Config) -> None:
    least = dict(steps=1, prompts=1, group_size=1, max_new_tokens=1, updates=1, lr=0, lr_end=0, warmup=0, weight_decay=0, eval_every=0,
                 eval_samples=1, eval_limit=0, save_every=0, keep=1, max_bad_steps=1, threads=0, rows=0, rows_per_pass=1, seed=0)
    for name, low in least.items():
        value = getattr(config, name)
        if not low <= value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be {low} or more, and finite")
    for name in ("temperature", "max_grad_norm"):
        if not 0 < getattr(config, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be above 0, and finite")
    if not math.isfinite(config.correct_at):
        raise InputError(f"--correct-at {config.correct_at}: must be finite")
    if config.seed >= 2**63 or config.threads > 1024:
        raise InputError(f"--seed {config.seed} or --threads {config.threads}: too large")
    if config.updates > config.prompts:
        raise InputError(f"--updates {config.updates}: each update needs a group, and there are --prompts {config.prompts}")
    if config.out and not config.resume and os.path.exists(config.out) and (not os.path.isdir(config.out) or os.listdir(config.out)):
        raise InputError(f"--out {config.out}: there is something already; name another folder, remove it, or add --resume to go on with it")


def fresh_folder(stem: str) -> str:
    """runs/NAME, or runs/NAME-2, -3 … if it is taken."""
    name, n = stem, 1
    while os.path.exists(name):
        n += 1
        name = f"{stem}-{n}"
    return name


def latest_folder(stem: str) -> str:
    """The newest run of this name, by its run.json."""
    runs = [path for path in glob.glob(f"{glob.escape(stem)}*/run.json") if re.fullmatch(r"(-\d+)?", os.path.dirname(path)[len(stem):])]
    return os.path.dirname(max(runs, key=os.path.getmtime)) if runs else stem

# These may change on resuming. (Of model and data the content must stay, not the path; the kind of device must, not its number.)
# Those that only say how things are computed may too, or a run without memory could not go on, but then not to the bit.
HARMLESS = {"out", "resume", "show", "steps", "eval_every", "save_every", "keep", "max_bad_steps", "model", "data", "eval_data",
            "device", "threads", "shard", "rows", "rows_per_pass", "gradient_checkpointing"}


def record_of(config: Config, algorithm: Algorithm, device: torch.device, compute: Transformer) -> dict:
    """What a resumed run must have in common with its beginning."""
    settings = {"algorithm": asdict(algorithm), **{name: value for name, value in asdict(config).items() if name not in HARMLESS}}
    settings |= {"steps": config.steps} if config.lr_end != 1 or algorithm.sft_share else {}  # the learning rate or the turn to RL depends on them
    settings |= {"device": device.type, "dtype": str(compute.norm.weight.dtype)}
    files = {"data": config.data, "eval_data": config.eval_data, "reward_file": config.reward and config.reward.rpartition(":")[0]}
    files |= {f"model/{os.path.basename(path)}": path for path in weight_files(config.model)}
    files |= {f"model/{name}": path for name in ("config.json", *TOKENIZER_FILES) if os.path.isfile(path := os.path.join(config.model, name))}
    return settings | {name: path and sha256(path) for name, path in files.items()}


def as_command(config: Config, given: dict) -> str:
    """The run as one command, whatever chose its settings."""
    settings = {f.name: getattr(config, f.name) for f in fields(Config)
                if f.name not in ("out", "resume", "show") and (getattr(config, f.name) != f.default or f.name == "algo")}  # run again, it finds a folder of its own
    settings |= {k: v for k, v in given.items() if k not in asdict(config)}
    words = ["python", "train.py"]
    for name, value in settings.items():
        words += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
    return shlex.join(words)


def estimated_bytes(model: Transformer, compute: Transformer, algorithm: Algorithm, config: Config, longest_prompt: int) -> float:
    """Weights, gradients, Adam's moments, the compute copy and the reference model, the start's values (for `bf16_changed`), the cache of the rows in
    flight, one pass's activations, and the program itself. Activations count twice: allocators keep what was freed."""
    c, size = model.config, compute.norm.weight.element_size()
    n = sum(p.numel() for p in model.parameters())
    rows = min(config.rows or rows_that_fit(compute, config.group_size, longest_prompt, config.max_new_tokens), config.prompts * config.group_size)
    tokens = config.rows_per_pass * config.max_new_tokens + longest_prompt
    per_layer = 8 * c.hidden_size + 4 * c.intermediate_size + 6 * c.num_attention_heads * c.head_dim
    activations = 2 * tokens * c.num_hidden_layers * per_layer * size
    copies = size * n * ((compute is not model) + algorithm.needs_reference)
    cache = rows * config.max_new_tokens * cache_bytes_per_token(compute)
    return 18 * n / (parallel.world() if config.shard else 1) + copies + cache + activations + 2**29
