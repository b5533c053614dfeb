"""The sampler's keys and values, on a CPU and wherever there is no FlashAttention (support/gpu.py).

Letters: N rows in flight, B prompts in flight, G rows of a group, P prompt length, T response
length, K key/value heads, S query heads that share a key head, d head size.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from logprobs import Prefix


CACHE_COLUMNS = 32  # a cache is as wide as a multiple of it


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


class Step(NamedTuple):
    """The rows of one decoding step, whose tokens have not run yet."""
    row: Tensor              # (N,) 0 … N − 1
    at: Tensor               # (N,) column of the token in its response
    prompt_length: Tensor    # (N,)
    cell: Tensor             # (N,) seat · G + place, see sampler.Batch
    seats: int               # B


class GroupCaches:
    """Keys and values of the prompts, by seat, and of the rows' own tokens, by row.

    A prompt's keys are read once for all the rows of its group (on a CPU 0.4 ms a layer at 64 rows,
    against 2.0 if each row reads its own copy). Keys lie transposed, (…, d, columns), as the score
    product wants them. Where there is FlashAttention, gpu.RowCaches stands in its place."""
    def __init__(self, model, rows: int, seats: int, group_size: int):
        self.model = model
        self.G = group_size
        self.max_seats = seats
        self.of_prompts = Cache(model, seats)    # .k (seats, K, d, P), .v (seats, K, P, d)
        self.own = Cache(model, rows)            # .k (rows, K, d, T), .v (rows, K, T, d)

    def make_room(self, prompt: int, response: int) -> None:
        """For so many columns of prompts and of responses."""
        self.of_prompts.resize(prompt)
        self.own.resize(response)

    def enter(self, prefix: Prefix, seats: slice, rows: slice) -> None:
        """Prompts that have run take their seats."""
        P = prefix.keys[0].shape[2]
        for layer, (k, v) in enumerate(zip(prefix.keys, prefix.values)):     # (B, K, P, d) each
            self.of_prompts.k[layer][seats, :, :, :P] = k.transpose(2, 3)
            self.of_prompts.v[layer][seats, :, :P] = v

    def attention(self, step: Step):
        """attend(layer, q, k, v) for one token: each row reads its prompt and its own past.

        To read a prompt's keys once for all its rows, queries move from rows (N) to the grid of
        seats × places (B, G) and back. For the picture in sampler.Batch (N = 5, B = 3, G = 2), with
        one head:

            to_grid   = [0, 3, 1, 0, 4, 2]    the row at each cell; 0 where there is none,
                                              and what is computed there is never read
            from_grid = [0, 2, 5, 1, 4]       the cell of each row

        With K heads, row r's head h is at r·K + h, and cell s's at (seat·K + h)·G + place.
        """
        row, at, prompt_length, cell, B = step
        N, G, device = len(row), self.G, row.device
        K = self.model.config.num_key_value_heads
        P, T = self.of_prompts.width, self.own.width
        column = torch.arange(max(P, T), device=device)
        beyond_prompt = column[:P] >= prompt_length[:, None]                         # (N, P)
        absent = torch.cat([beyond_prompt, column[:T] > at[:, None]], dim=1)         # (N, P + T)
        mask = torch.zeros(absent.shape, device=device)
        mask = mask.masked_fill(absent, float("-inf"))[:, None, None]

        heads = torch.arange(K, device=device)
        row_at = row.new_zeros(self.max_seats * G + 1).index_copy(0, cell, row)[:B * G]
        to_grid = (row_at.view(B, 1, G) * K + heads[:, None]).flatten()              # (B·K·G,)
        seat = (cell // G).clamp(max=B - 1)
        from_grid = ((seat[:, None] * K + heads) * G + cell[:, None] % G).flatten()  # (N·K,)

        def into_grid(x):
            """(N, K, S, m) -> (B, K, G·S, m)"""
            S, m = x.shape[2:]
            return x.reshape(N * K, S * m).index_select(0, to_grid).view(B, K, G * S, m)

        def out_of_grid(x):
            """(B, K, G·S, m) -> (N, K, S, m)"""
            S, m = x.shape[2] // G, x.shape[3]
            return x.view(B * K * G, S * m).index_select(0, from_grid).view(N, K, S, m)

        def attend(layer, q, k, v):
            """q (N, H, 1, d), k and v (N, K, 1, d) -> (N, H, 1, d)"""
            d = q.shape[3]
            own_k = self.own.k[layer][:N]                                            # (N, K, d, T)
            own_v = self.own.v[layer][:N]                                            # (N, K, T, d)
            own_k[row, :, :, at] = k[:, :, 0]    # two index tensors: their axis comes first
            own_v[row, :, at] = v[:, :, 0]
            q = q.reshape(N, K, -1, d)                                               # (N, K, S, d)
            on_prompt = out_of_grid(into_grid(q) @ self.of_prompts.k[layer][:B])     # (N, K, S, P)
            scores = torch.cat([on_prompt, q @ own_k], dim=-1)                   # (N, K, S, P + T)
            weights = torch.add(mask, scores, alpha=d**-0.5).softmax(-1).to(q.dtype)
            on_own = weights[..., P:].contiguous()                                   # (N, K, S, T)
            out = out_of_grid(into_grid(weights[..., :P]) @ self.of_prompts.v[layer][:B])
            return (out + on_own @ own_v).view(N, -1, 1, d)

        return attend

    def move_rows(self, to: Tensor, source: Tensor) -> None:
        for cache in (*self.own.k, *self.own.v):
            cache[to] = cache[source]

    def move_seat(self, to: int, source: int) -> None:
        for cache in (*self.of_prompts.k, *self.of_prompts.v):
            cache[to] = cache[source]
