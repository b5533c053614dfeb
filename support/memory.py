"""What fits into memory: sizes of caches, rows in flight, and what a run will need."""
from __future__ import annotations

import math
import sys
from typing import NamedTuple

import torch

from logprobs import LOGITS_AT_ONCE
from support import parallel
from support.gpu import has_flash


CPU_CACHE_BYTES = 4 * 2**30  # a fixed budget: the same command always makes the same batches
CACHE_COLUMNS = 32  # the sampler's caches are as wide as a multiple of it
MOST_ROWS = 256  # in flight; more make a step no faster


class Place(NamedTuple):
    """Where and with what a run goes, as far as memory depends on it."""
    device: str            # "cpu" or "cuda"
    dtype: torch.dtype     # the policy's
    processes: int         # that share the masters (--shard), or 1
    trained: int           # parameters of the masters
    prompt: int            # tokens of the longest
    group: int             # rows of a group as it is trained on
    has_reference: bool    # a frozen start model


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


class Cache:
    """Keys and values of every layer, for some rows; as wide as what is in flight, rounded up.

    k: (rows, K, d, width) of each layer; v: (rows, K, width, d) of each layer."""
    def __init__(self, model, rows: int):
        c = model.config
        heads, d = c.num_key_value_heads, c.head_dim
        self.width = 0
        like = dict(dtype=model.dtype, device=model.device)
        self.k = [torch.empty(rows, heads, d, 0, **like) for _ in range(c.num_hidden_layers)]
        self.v = [torch.empty(rows, heads, 0, d, **like) for _ in range(c.num_hidden_layers)]

    def resize(self, length: int) -> None:
        """Make room for `length` columns; give room back once half of it would do."""
        width = round_up(length, CACHE_COLUMNS)
        if self.width // 2 < width <= self.width:
            return
        kept = min(width, self.width)
        self.width = width
        for tensors, dim in ((self.k, 3), (self.v, 2)):
            for layer, old in enumerate(tensors):
                shape = list(old.shape)
                shape[dim] = width
                # Zeros, because what lies beyond a row's length is read, with weight 0: 0 · NaN.
                tensors[layer] = old.new_zeros(shape)
                tensors[layer].narrow(dim, 0, kept).copy_(old.narrow(dim, 0, kept))


def cache_bytes_per_token(model) -> int:
    """Keys and values of one token in all layers."""
    c = model.config
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.dtype.itemsize


def rows_that_fit(model, group_size: int, longest_prompt: int, max_new_tokens: int) -> int:
    """How many rows to sample at a time so that their caches fit into memory: at most 256."""
    device = model.device
    own = round_up(max_new_tokens, CACHE_COLUMNS)
    prompt = round_up(longest_prompt, CACHE_COLUMNS)
    if not has_flash(model):
        prompt *= 2 / group_size               # a row's part of two seats
    numbers = 20 * max_new_tokens              # id 8, logprob 4, uniform 8
    logits = 28 * model.config.vocab_size      # logits, probabilities and blocks, fp32 and fp64
    row = cache_bytes_per_token(model) * (own + prompt) + numbers + logits
    budget = CPU_CACHE_BYTES
    if device.type == "cuda":    # what the device has free, and what PyTorch holds unused
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = 0.6 * (torch.cuda.mem_get_info(device)[0] + unused)
    return max(group_size, min(MOST_ROWS, int(budget / row)))


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


def needs(shape, parameters: int, config, place: Place) -> Need:
    """Of a run of options.Config `config`, with a model of this model.ModelConfig and as many
    parameters. Within 15 % of what was used (python -m pytest -m slow tests/test_memory.py)."""
    n, m, size = parameters, place.trained, place.dtype.itemsize
    on_gpu = place.device == "cuda"
    if config.lora_rank:    # weights and moments of low rank, and the matrices that stay
        masters = (4 + 8) * m + size * n
        largest = shape.hidden_size * shape.intermediate_size    # its gradient is mapped in fp32
        gradients = 4 * m + (4 + size) * largest
    else:
        masters = (4 + 2 + 8) * n / place.processes
        gradients = 4 * n / place.processes
    is_copy = place.dtype != torch.float32 or config.shard or config.lora_rank > 0
    # While a CPU samples, it holds the weights once more, laid out for its products; the room
    # stays its own.
    packed = 0 if on_gpu else size * n
    V, D = shape.vocab_size, shape.hidden_size

    rows = min(config.rows or MOST_ROWS, config.prompts * config.group_size)
    columns = config.max_new_tokens + place.prompt
    per_column = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * size
    rollouts = rows * (columns * per_column + 28 * V)

    in_pass = min(config.rows_per_pass, config.prompts * place.group)
    prompts = max(1, in_pass // place.group)
    tokens = in_pass * config.max_new_tokens + prompts * place.prompt
    keys = tokens + in_pass * place.prompt
    # What backward needs of each token in each block: around the norms and the residual 4 D, in the
    # MLP 4 I, and around attention 3 H·d (5 where it goes by products) and 2 K·d of each key.
    width = shape.num_attention_heads * shape.head_dim
    block = size * (tokens * (4 * D + 4 * shape.intermediate_size + (3 if on_gpu else 5) * width)
                    + keys * 2 * shape.num_key_value_heads * shape.head_dim)
    blocks = shape.num_hidden_layers * block
    if config.gradient_checkpointing:
        blocks = block + shape.num_hidden_layers * tokens * D * size
    logits = (4 + 4 + size) * min(LOGITS_AT_ONCE[place.device], tokens * V)
    of_output = (4 + 2 * size) * V * D    # the last layer's gradient, and parts of it
    if config.lora_rank:
        of_output = 0
    # What was freed does not always fit what comes next.
    kept = 1.1 if on_gpu else 1.5
    return Need(
        masters=masters,
        gradients=gradients,
        copies=size * n * (is_copy + place.has_reference),
        rollouts=rollouts + packed,
        update=kept * blocks + logits + of_output + packed,
        program=0 if on_gpu else 0.4 * 2**30)


def estimated_bytes(run) -> float:
    """What a train.Run will need at most."""
    place = Place(
        device=run.master.device.type,
        dtype=run.policy.dtype,
        processes=parallel.world() if run.config.shard else 1,
        trained=sum(p.numel() for p in run.master.parameters()),
        prompt=max(len(p.prompt) for p in run.problems),
        group=1 if run.algorithm.train_on == "gold" else run.config.group_size,
        has_reference=run.algorithm.needs_reference)
    n = sum(p.numel() for p in run.policy.parameters())
    return needs(run.master.config, n, run.config, place).total


def peak_bytes(device: torch.device) -> float:
    """Most memory in use so far: PyTorch's on a GPU, else this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)    # what recorded steps hold, too
    try:
        import resource
    except ImportError:  # not on Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
