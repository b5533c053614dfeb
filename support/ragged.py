"""Rows of different lengths, laid end to end so that no padding goes through the network.

Letters: N rows, M tokens of all of them, B prompts, P prompt length, H query heads, K key/value
heads, S = H / K query heads that share a key head, d head size; a part has n rows of at most t.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from support import cpu, gpu


class Ragged:
    """Where the M real tokens of N rows stand in the padded grid (N, width).

    Lengths 3 and 1:   a b c      end to end:   a b c d        rows     0 0 0 1
                       d . .                                   columns  0 1 2 0
    """
    def __init__(self, lengths: Tensor, width: int):
        grid = torch.arange(width, device=lengths.device) < lengths[:, None]    # (N, width)
        self.rows, self.columns = grid.nonzero(as_tuple=True)                   # (M,) each
        self.index = self.rows * width + self.columns                           # (M,)
        self.shape = (len(lengths), width)

    def pad(self, x: Tensor) -> Tensor:
        """(1, heads, M, d) -> (N, heads, width, d), zeros in the padding."""
        N, width = self.shape
        grid = x.new_zeros(N * width, x.shape[1], x.shape[3])
        grid = grid.index_copy(0, self.index, x[0].transpose(0, 1))
        return grid.view(N, width, *grid.shape[1:]).transpose(1, 2)

    def flatten(self, x: Tensor) -> Tensor:
        """(N, heads, width, d) -> (1, heads, M, d)."""
        tokens = x.transpose(1, 2).flatten(0, 1).index_select(0, self.index)    # (M, heads, d)
        return tokens.transpose(0, 1)[None]


class Part(NamedTuple):
    """Some rows that attend in one product."""
    ragged: Ragged
    prompt_of: Tensor | None    # (n,) the prompt of each of these rows
    hidden: Tensor              # (n or 1, t, P + t) bool, True where a query must not look


class RaggedAttention:
    """Causal attention of N rows laid end to end, each after a prompt of its own, if there is one.

    lengths (N,) of 1 or more; prompt_lengths (B,); prompt_of (N,), the prompt of each row. On a CPU
    some rows at a time, so that neither padding nor memory costs much; on a GPU all at once."""
    def __init__(
        self,
        lengths: Tensor,
        query_heads: int,
        prompt_lengths: Tensor | None = None,
        prompt_of: Tensor | None = None,
    ):
        sizes = lengths.tolist()
        P = 0 if prompt_lengths is None else int(prompt_lengths.max())
        slices = [slice(0, len(sizes))]
        if lengths.device.type == "cpu":
            slices = cpu.rows_in_cache(sizes, query_heads, P)
        self.P = P
        self.parts = []
        self.masks = None    # of each part, the same for all layers; the first one tells its dtype
        for rows in slices:
            t = max(sizes[rows], default=0)
            later = torch.ones(t, t, dtype=torch.bool, device=lengths.device).triu(1)
            hidden = later[None]                                                # (1, t, t)
            if P:
                column = torch.arange(P, device=lengths.device)
                absent = column >= prompt_lengths[prompt_of[rows], None]        # (n, P)
                absent = absent[:, None].expand(-1, t, -1)                      # (n, t, P)
                hidden = torch.cat([absent, hidden.expand(len(absent), -1, -1)], dim=2)
            owners = prompt_of[rows] if P else None
            self.parts.append(Part(Ragged(lengths[rows], t), owners, hidden))

    def __call__(self, q, k, v, keys=None, values=None) -> Tensor:
        """q (1, H, M, d), k and v (1, K, M, d); keys and values (B, K, P, d) of the prompts.
        Returns (1, H, M, d)."""
        H, K, d = q.shape[1], k.shape[1], k.shape[3]
        attention = gpu.masked_attention if q.is_cuda else cpu.masked_attention
        if self.masks is None:
            dtype = q.dtype if q.is_cuda else torch.float32
            self.masks = [additive_mask(part.hidden, H // K, dtype) for part in self.parts]
        tokens = [len(part.ragged.index) for part in self.parts]
        q, k, v = q.split(tokens, 2), k.split(tokens, 2), v.split(tokens, 2)
        outs = []
        for i, part in enumerate(self.parts):
            part_q = part.ragged.pad(q[i])                                      # (n, H, t, d)
            part_k = part.ragged.pad(k[i])                                      # (n, K, t, d)
            part_v = part.ragged.pad(v[i])
            n, _, t, _ = part_q.shape
            if self.P:                                                          # (n, K, P + t, d)
                part_k = torch.cat([keys.index_select(0, part.prompt_of), part_k], dim=2)
                part_v = torch.cat([values.index_select(0, part.prompt_of), part_v], dim=2)
            # The S query heads that share a key head stand below each other, and read it once.
            folded = part_q.reshape(n, K, H // K * t, d)
            out = attention(folded, part_k, part_v, self.masks[i])              # (n, K, S·t, d)
            outs.append(part.ragged.flatten(out.reshape(n, H, t, d)))
        return torch.cat(outs, dim=2)


def additive_mask(hidden: Tensor, repeats: int, dtype: torch.dtype) -> Tensor:
    """hidden (n or 1, t, L) -> (n or 1, 1, repeats · t, L): −inf where it is True, else 0.

    Each row begins at a multiple of 8 numbers, as a GPU's kernels want it."""
    L = hidden.shape[2]
    mask = torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, float("-inf"))
    mask = F.pad(mask[:, None], (0, -L % 8)).to(dtype)
    return mask.repeat(1, 1, repeats, 1)[..., :L]
