"""Rows of different lengths, laid end to end so that no padding goes through the network.

Letters: N rows, M tokens of all of them, B prompts, P prompt length, H query heads, K key/value
heads, S = H / K query heads that share a key head, d head size; a part has n rows of at most t.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from support import cpu
from support.gpu import FlashAttention, has_flash


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


class RowsAfterPrompts(NamedTuple):
    """Rows that each go on where a prompt ends."""
    lengths: Tensor           # (N,) of 1 or more
    prompt_lengths: Tensor    # (B,)
    prompt_of: Tensor         # (N,) the prompt of each row


# ---- Causal attention within each row, in three situations ---------------------------------------
#
# Each returns a function of q (1, H, M, d), k and v (1, K, M, d) -> (1, H, M, d); M counts the
# tokens of prompts, of rows, or of both, the prompts' first.

def attention_of_prompts(model, lengths: Tensor):
    """Prompts alone; lengths (B,)."""
    if has_flash(model):
        return FlashAttention(lengths)
    return AttentionInParts(model.config, lengths)


def attention_after_prompts(model, rows: RowsAfterPrompts):
    """Rows whose prompts have run before: f(q, k, v, keys, values), with the prompts' (B, K, P, d)
    of this layer."""
    if has_flash(model):
        return FlashAttention.after_prompts(*rows)
    return AttentionInParts(model.config, *rows)


def attention_with_prompts(model, rows: RowsAfterPrompts):
    """Prompts and rows in one pass, the prompts first."""
    if has_flash(model):
        return FlashAttention.with_prompts(*rows)
    ragged = Ragged(rows.prompt_lengths, int(rows.prompt_lengths.max()))
    of_prompts = AttentionInParts(model.config, rows.prompt_lengths)
    of_rows = AttentionInParts(model.config, *rows)
    sizes = [len(ragged.index), int(rows.lengths.sum())]

    def attend(q, k, v):
        prompt_q, q = q.split(sizes, dim=2)
        prompt_k, k = k.split(sizes, dim=2)
        prompt_v, v = v.split(sizes, dim=2)
        out = [of_prompts(prompt_q, prompt_k, prompt_v)]
        if sizes[1]:
            out.append(of_rows(q, k, v, ragged.pad(prompt_k), ragged.pad(prompt_v)))
        return torch.cat(out, dim=2)

    return attend


# ---- By products and masks -----------------------------------------------------------------------

class Part(NamedTuple):
    """Some rows that attend in one product."""
    ragged: Ragged
    prompt_of: Tensor | None    # (n,) the prompt of each of these rows
    mask: Tensor                # (n or 1, 1, S·t, P + t) fp32, −inf where a query must not look


class AttentionInParts:
    """Attention that pads a few neighbouring rows at a time into a grid, so that neither padding
    nor memory costs much. With prompts, each row first sees its own prompt's keys."""
    def __init__(
        self,
        config,
        lengths: Tensor,
        prompt_lengths: Tensor | None = None,
        prompt_of: Tensor | None = None,
    ):
        H, K = config.num_attention_heads, config.num_key_value_heads
        sizes = lengths.tolist()
        P = 0 if prompt_lengths is None else int(prompt_lengths.max())
        self.P = P
        self.parts = []
        for rows in cpu.rows_in_cache(sizes, H, P):
            t = max(sizes[rows], default=0)
            future = torch.ones(t, t, dtype=torch.bool, device=lengths.device).triu(1)
            blocked = future[None]                                                # (1, t, t)
            if P:
                column = torch.arange(P, device=lengths.device)
                beyond = column >= prompt_lengths[prompt_of[rows], None]        # (n, P)
                beyond = beyond[:, None].expand(-1, t, -1)                      # (n, t, P)
                blocked = torch.cat([beyond, blocked.expand(len(beyond), -1, -1)], dim=2)
            owners = prompt_of[rows] if P else None
            mask = torch.zeros(blocked.shape, device=blocked.device)            # (n or 1, t, P + t)
            mask = mask.masked_fill(blocked, float("-inf")).repeat(1, H // K, 1)
            self.parts.append(Part(Ragged(lengths[rows], t), owners, mask[:, None]))

    def __call__(self, q, k, v, keys=None, values=None) -> Tensor:
        H, K, d = q.shape[1], k.shape[1], k.shape[3]
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
            out = cpu.masked_attention(folded, part_k, part_v, part.mask)       # (n, K, S·t, d)
            outs.append(part.ragged.flatten(out.reshape(n, H, t, d)))
        return torch.cat(outs, dim=2)
