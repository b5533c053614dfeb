"""Sizes of the sampler's caches, rows in flight, and memory that was used."""
from __future__ import annotations

import math
import sys

import torch

from support.gpu import has_flash


CPU_CACHE_BYTES = 4 * 2**30  # a fixed budget: the same command always makes the same batches
CACHE_COLUMNS = 32  # the sampler's caches are as wide as a multiple of it
MOST_ROWS = 256  # in flight; more make a step no faster


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
