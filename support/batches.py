"""Groups that go through the network together, and their rows stacked.

All functions take train.Items, or anything with their fields: group, advantages, old_logprobs and
ref_logprobs. Letters: N rows, T the longest response among them.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Rows of some groups, below each other, on the device."""
    prompt_of: Tensor            # (N,) the group that each row belongs to: 0, 1, 2, …
    responses: Tensor            # (N, T)
    lengths: Tensor              # (N,)
    mask: Tensor                 # (N, T)
    is_gold: Tensor              # (N,)
    advantages: Tensor           # (N,)
    logprobs: Tensor             # (N, T) the sampler's
    old_logprobs: Tensor | None  # (N, T)
    ref_logprobs: Tensor | None  # (N, T)


def micro_batches(items: list, rows_per_pass: int) -> list[list]:
    """Groups that go through the network together: as many as `rows_per_pass` rows hold, or one
    that needs several passes."""
    group_size = max((len(i.group.lengths) for i in items), default=1)
    size = max(1, rows_per_pass // group_size)
    return [items[i:i + size] for i in range(0, len(items), size)]


def count_passes(batches: list[list], rows_per_pass: int) -> int:
    """How many passes `split_into_passes` will make of these micro-batches."""
    rows = [sum(len(i.group.lengths) for i in batch) for batch in batches]
    return sum(-(-n // rows_per_pass) for n in rows)


def split_into_passes(items: list, rows_per_pass: int, device: torch.device) -> list[Rows]:
    """The rows of some groups, `rows_per_pass` at a time."""
    groups = [i.group for i in items]
    sizes = torch.tensor([len(g.lengths) for g in groups])
    old_logprobs = ref_logprobs = None
    if items[0].old_logprobs is not None:
        old_logprobs = stack_rows([i.old_logprobs for i in items])
    if items[0].ref_logprobs is not None:
        ref_logprobs = stack_rows([i.ref_logprobs for i in items])
    rows = Rows(
        prompt_of=torch.arange(len(items)).repeat_interleave(sizes),
        responses=stack_rows([g.responses for g in groups]),
        lengths=torch.cat([g.lengths for g in groups]),
        mask=stack_rows([g.mask for g in groups]),
        is_gold=torch.cat([g.is_gold for g in groups]),
        advantages=torch.cat([i.advantages for i in items]),
        logprobs=stack_rows([g.logprobs for g in groups]),
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs)

    passes = []
    for part in torch.arange(len(rows.lengths)).split(rows_per_pass):
        T = int(rows.lengths[part].max())
        columns = []
        for x in rows:
            if x is not None:
                x = x[part] if x.dim() == 1 else x[part, :T]
                x = x.to(device)
            columns.append(x)
        passes.append(Rows(*columns))
    return passes


def stack_rows(xs: list[Tensor]) -> Tensor:
    """Tensors (N_i, T_i) below each other, right-padded to the widest."""
    width = max(x.shape[1] for x in xs)
    return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in xs])
