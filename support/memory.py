"""Sizes of the sampler's caches, rows in flight, and memory that was used."""
from __future__ import annotations

import math
import sys

import torch

from support.caches import CACHE_COLUMNS, round_up
from support.gpu import has_flash


CPU_CACHE_BYTES = 4 * 2**30  # a fixed budget: the same command always makes the same batches
MOST_ROWS = 256  # in flight; more make a step no faster


def cache_bytes_per_token(model) -> int:
    """Keys and values of one token in all layers."""
    c = model.config
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * model.dtype.itemsize


def rows_that_fit(model, group_size: int, longest_prompt: int, max_new_tokens: int) -> int:
    """How many rows to sample at a time so that their caches fit into memory: at most 256, or one
    group."""
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
