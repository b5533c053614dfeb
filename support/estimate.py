"""How much memory a run will need, before it starts, and which flags would make it fit."""
from __future__ import annotations

import functools
import math
import statistics
import sys
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from logprobs import LOGITS_AT_ONCE
from model import ModelConfig, Transformer
from support import parallel
from support.common import as_flags
from support.memory import MOST_ROWS


class Circumstances(NamedTuple):
    """Where and with what a run goes, as far as memory depends on it."""
    device: str            # "cpu" or "cuda"
    dtype: torch.dtype     # the policy's
    processes: int         # that share the masters (--shard), or 1
    prompt: float          # tokens of a prompt
    response: float        # tokens of a response
    group: int             # rows of a group as it is trained on
    has_reference: bool    # a frozen start model


class Need(NamedTuple):
    """What a run holds at most, in bytes."""
    masters: float    # fp32 weights, their start in bf16 (for `update/bf16_changed`), two moments
    gradients: float
    copies: float     # the policy, if it is a copy, and the reference model
    rollouts: float   # caches and logits of the rows in flight, while there are no gradients
    update: float     # activations and logits of one pass
    program: float

    @property
    def total(self) -> float:
        return (self.masters + self.copies + self.program
                + max(self.rollouts, self.gradients + self.update))


def needs(shape: ModelConfig, config, place: Circumstances) -> Need:
    """Memory that a run with options.Config `config` and a model of this shape needs, evaluation
    not counted. Within 15 % of what was used (python -m pytest -m slow tests/test_memory.py)."""
    masters, gradients, copies = of_weights(shape, config, place)
    return Need(
        masters=masters,
        gradients=gradients,
        copies=copies,
        rollouts=of_rollouts(shape, config, place),
        update=of_update(shape, config, place),
        program=0 if place.device == "cuda" else 0.4 * 2**30)


def of_weights(shape: ModelConfig, config, place: Circumstances) -> tuple[float, float, float]:
    """Masters, gradients and copies, as Need has them."""
    n, in_blocks, of_rank_1 = count_parameters(shape)
    size = place.dtype.itemsize
    if config.lora_rank:    # weights and moments of low rank, and the blocks' matrices as they were
        m = config.lora_rank * of_rank_1
        masters = (4 + 8) * m + size * in_blocks
        largest = shape.hidden_size * shape.intermediate_size    # its gradient is mapped in fp32
        gradients = 4 * m + (4 + size) * largest
    else:
        masters = (4 + 2 + 8) * n / place.processes
        gradients = 4 * n / place.processes
    is_copy = place.dtype != torch.float32 or config.shard or config.lora_rank > 0
    return masters, gradients, size * n * (is_copy + place.has_reference)


def of_rollouts(shape: ModelConfig, config, place: Circumstances) -> float:
    """Caches and logits; and on a CPU the weights once more, laid out for its products."""
    size = place.dtype.itemsize
    rows = min(config.rows or MOST_ROWS, config.prompts * config.group_size)
    columns = place.response + place.prompt
    per_column = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * size
    packed = 0 if place.device == "cuda" else size * count_parameters(shape)[0]
    return rows * (columns * per_column + 28 * shape.vocab_size) + packed


def of_update(shape: ModelConfig, config, place: Circumstances) -> float:
    """What backward needs of one pass."""
    size, on_gpu = place.dtype.itemsize, place.device == "cuda"
    V, D = shape.vocab_size, shape.hidden_size
    rows = min(config.rows_per_pass, config.prompts * place.group)
    prompts = max(1, rows // place.group)
    tokens = rows * place.response + prompts * place.prompt
    keys = tokens + rows * place.prompt
    # Of each token in each block: around the norms and the residual 4 D, in the MLP 4 I, and around
    # attention 3 H·d (5 where it goes by products) and 2 K·d of each key.
    width = shape.num_attention_heads * shape.head_dim
    of_token = 4 * D + 4 * shape.intermediate_size + (3 if on_gpu else 5) * width
    of_key = 2 * shape.num_key_value_heads * shape.head_dim
    block = size * (tokens * of_token + keys * of_key)
    blocks = shape.num_hidden_layers * block
    if config.gradient_checkpointing and on_gpu:
        blocks = block + shape.num_hidden_layers * tokens * D * size
    elif config.gradient_checkpointing:
        blocks *= 0.4    # measured: what one block frees seldom fits what the next wants
    logits = (4 + 4 + size) * min(LOGITS_AT_ONCE[place.device], tokens * V)
    # The last layer's gradient, and on a GPU, where it comes chunk by chunk, a part of it besides
    of_output = 0 if config.lora_rank else (4 + 2 * size * on_gpu) * V * D
    # What was freed does not always fit what comes next.
    kept = 1.1 if on_gpu else 1.8
    return kept * blocks + logits + of_output


def estimate(config, algorithm, shape: ModelConfig, problems, device, dtype) -> Need:
    """Memory that a run with these settings needs. All rollouts of a pass may answer the longest
    prompt and reach the limit. SFT's golds are as long as they are, long and short ones mixed."""
    if algorithm.train_on == "gold":
        group = 1
        with_gold = [p for p in problems if p.gold_ids is not None]
        prompt = statistics.mean(len(p.prompt) for p in with_gold)
        response = statistics.mean(len(p.gold_ids) for p in with_gold)
    else:
        group = config.group_size
        prompt = max(len(p.prompt) for p in problems)
        response = config.max_new_tokens
    return needs(shape, config, Circumstances(
        device=torch.device(device).type,
        dtype=dtype,
        processes=parallel.world() if config.shard else 1,
        prompt=prompt,
        response=response,
        group=group,
        has_reference=algorithm.needs_reference))


@functools.lru_cache(maxsize=8)
def count_parameters(shape: ModelConfig) -> tuple[int, int, int]:
    """All of a model, those of its blocks' matrices, and those of A and B of rank 1 beside them."""
    with torch.device("meta"):
        model = Transformer(shape)
    matrices = [m.weight for m in model.layers.modules() if isinstance(m, nn.Linear)]
    return (sum(p.numel() for p in model.parameters()), sum(w.numel() for w in matrices),
            sum(sum(w.shape) for w in matrices))


# ---- What would fit ------------------------------------------------------------------------------

SMALLER = (    # flags that need less, those that cost least first
    dict(gradient_checkpointing=True),
    dict(rows_per_pass=1, gradient_checkpointing=True),
    dict(lora_rank=16),
    dict(lora_rank=16, gradient_checkpointing=True),
    dict(lora_rank=16, gradient_checkpointing=True, rows_per_pass=1, rows=8))


def free_bytes(device: torch.device) -> float:
    """What this process may still take; infinity if nobody knows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as f:
            lines = dict(line.split(":") for line in f)
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return math.inf
    try:    # a container may have less
        limit, used = (read_number(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
        with open("/sys/fs/cgroup/memory.stat") as f:
            numbers = dict(line.split() for line in f)
        of_files = int(numbers["inactive_file"])    # which the kernel gives back when asked
        return min(free, limit - used + of_files)
    except (OSError, KeyError, ValueError):
        return free


def read_number(path: str) -> int:
    with open(path) as f:
        return int(f.read())


def warn_if_too_large(config, algorithm, shape: ModelConfig, problems, device, dtype) -> None:
    """Before a model is loaded: print one line if the run will hardly fit, with flags that would
    make it fit."""
    def gib(**changes):
        changed = replace(config, **changes)
        return estimate(changed, algorithm, shape, problems, device, dtype).total / 2**30

    free, needed = free_bytes(device) / 2**30, gib()
    if needed <= free or parallel.rank() > 0:
        return
    refused = {"lora_rank"} if config.shard else set()
    if algorithm.objective == "pairs":    # a pass is a group there
        refused.add("rows_per_pass")
    ways = [changes for changes in SMALLER if not refused & set(changes)]
    if parallel.world() > 1 and not config.shard and not config.lora_rank:
        ways = [dict(changes, shard=True) for changes in ({}, *SMALLER[:2])
                if not refused & set(changes)] + ways
    fitting = next((changes for changes in ways if gib(**changes) <= free), None)
    advice = "no flags of ours would make it fit"
    if fitting is not None:
        advice = f"with {' '.join(as_flags(fitting))} it would need about {gib(**fitting):.1f}"
    print(f"warning: this run may need about {needed:.1f} GiB, and {free:.1f} are free on "
          f"{device}; {advice}", file=sys.stderr)
