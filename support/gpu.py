"""Code that only a GPU needs: FlashAttention on rows laid end to end, and decoding steps recorded
as CUDA graphs.

The figures are docs/speed.md's, measured on an H100 (`docs/run_gpu.sh`). Letters: N rows, M tokens
of all of them, B prompts, P prompt length, T response length, H query heads, K key/value heads, d
head size.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


# ---- Attention -----------------------------------------------------------------------------------

def has_flash(model) -> bool:
    """Whether this model's attention can go through FlashAttention: bf16 on an NVIDIA GPU of 2020
    (Ampere) or later, and heads of at most 128 that are a multiple of 8. Elsewhere, and in fp32, it
    goes the same way as on a CPU."""
    dtype = model.compute_dtype or model.dtype
    if model.device.type != "cuda" or dtype != torch.bfloat16 or torch.version.hip:
        return False
    d = model.config.head_dim
    return torch.cuda.get_device_capability(model.device)[0] >= 8 and d % 8 == 0 and d <= 128


class Spans(NamedTuple):
    """Where rows laid end to end begin and end."""
    starts: Tensor    # (N + 1,) int32: row i is starts[i] … starts[i + 1] − 1
    longest: int      # tokens of the longest row, or more


def flash(
    q: Tensor, k: Tensor, v: Tensor, queries: Spans, keys: Spans, used: Tensor | None = None,
) -> Tensor:
    """softmax(q kᵀ / √d) v, causal within each row: q (M, H, d), k and v (L, K, d) -> (M, H, d).

    A row's last query sees all the row's keys, the query before it all but one, and so on. `used`
    (N,) int32: only so many of a row's keys, if it has room for more. (FlashAttention-2,
    arXiv 2307.08691; this operator has had the same leading arguments since PyTorch 2.5.)"""
    return torch.ops.aten._flash_attention_forward(
        q, k, v, queries.starts, keys.starts, queries.longest, keys.longest,
        0.0, True, False, seqused_k=used)[0]    # no dropout, causal, no debug mask


def laid_end_to_end(lengths: Tensor) -> Spans:
    """lengths (N,) int64"""
    return Spans(F.pad(lengths.cumsum(0), (1, 0)).int(), max(lengths.tolist(), default=0))


class FlashAttention:
    """Causal attention of N rows laid end to end in one call: no mask, no padding, keys read once
    for all the heads that share them. An update of Qwen2.5-1.5B takes 0.77 of the time with masks.

    lengths (N,). If rows come after prompts: `before` (N,), how many keys of its prompt a row reads
    before its own; `prompt_at` and `own_at` (N,), where the prompt's and its own begin among the
    keys at hand. `source` (L,) is the place there of each key that a row reads. Prompts pq and r,
    rows ab after pq, and c after r:

        keys at hand    p q r a b c        before     2, 1
        read by rows    p q a b, r c       prompt_at  0, 2
        source          0 1 3 4  2 5       own_at     3, 5
    """
    def __init__(
        self,
        lengths: Tensor,
        before: Tensor | None = None,
        prompt_at: Tensor | None = None,
        own_at: Tensor | None = None,
    ):
        self.queries = self.keys = laid_end_to_end(lengths)
        self.source = None
        if before is not None:
            total = before + lengths
            self.keys = laid_end_to_end(total)
            row = torch.arange(len(total), device=total.device).repeat_interleave(total)  # (L,)
            column = torch.arange(len(row), device=row.device) - self.keys.starts[row]
            own = own_at[row] + column - before[row]
            self.source = torch.where(column < before[row], prompt_at[row] + column, own)

    @classmethod
    def after_prompts(cls, lengths: Tensor, prompt_lengths: Tensor, prompt_of: Tensor):
        """The prompts' keys (B, K, P, d) stand first, with their padding, and the rows' below."""
        B, P = len(prompt_lengths), int(prompt_lengths.max())
        own_at = B * P + lengths.cumsum(0) - lengths
        return cls(lengths, prompt_lengths[prompt_of], prompt_of * P, own_at)

    @classmethod
    def with_prompts(cls, lengths: Tensor, prompt_lengths: Tensor, prompt_of: Tensor):
        """The prompts are rows, too, the first ones; nothing stands before them."""
        all_lengths = torch.cat([prompt_lengths, lengths])
        own_at = all_lengths.cumsum(0) - all_lengths
        nothing = torch.zeros_like(prompt_lengths)
        return cls(
            all_lengths, torch.cat([nothing, prompt_lengths[prompt_of]]),
            torch.cat([nothing, own_at[prompt_of]]), own_at)

    def __call__(self, q, k, v, keys=None, values=None) -> Tensor:
        """q (1, H, M, d), k and v (1, K, M, d); keys and values (B, K, P, d) of prompts that ran
        before -> (1, H, M, d)."""
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))                     # (M, heads, d)
        if keys is not None:
            k = torch.cat([keys.transpose(1, 2).flatten(0, 1), k])
            v = torch.cat([values.transpose(1, 2).flatten(0, 1), v])
        if self.source is not None:
            k = k.index_select(0, self.source)                                  # (L, K, d)
            v = v.index_select(0, self.source)
        return flash(q, k, v, self.queries, self.keys).transpose(0, 1)[None]


class RowCaches:
    """The sampler's keys and values where there is FlashAttention: (rows, P + T, K, d) of each
    layer, a row's prompt and then its own.

    So a prompt's keys are copied to each row of its group, and one call reads both: as fast as two
    calls, of which one reads the prompt once for all its rows, and half the code."""
    def __init__(self, model, rows: int, group_size: int, longest_prompt: int, max_new_tokens: int):
        c = model.config
        self.G = group_size
        self.width = longest_prompt + max_new_tokens
        shape = (rows, self.width, c.num_key_value_heads, c.head_dim)
        like = dict(dtype=model.dtype, device=model.device)
        self.k = [torch.zeros(shape, **like) for _ in range(c.num_hidden_layers)]
        self.v = [torch.zeros(shape, **like) for _ in range(c.num_hidden_layers)]

    def enter(self, prefix, seats: slice, rows: slice) -> None:
        """Prompts that have run (a logprobs.Prefix), for the rows of their groups."""
        P = prefix.keys[0].shape[2]
        for cache, x in zip((*self.k, *self.v), (*prefix.keys, *prefix.values)):
            cache[rows, :P] = x.transpose(1, 2).repeat_interleave(self.G, dim=0)

    def attention(self, step):
        """attend(layer, q, k, v) for one token of each row; `step` is a caches.Step."""
        N = len(step.row)
        column = step.prompt_length + step.at                                   # (N,)
        used = (column + 1).int()
        each = torch.arange(N + 1, device=used.device, dtype=torch.int32)
        queries, keys = Spans(each, 1), Spans(each * self.width, self.width)

        def attend(layer, q, k, v):                                  # (N, heads, 1, d) each
            self.k[layer][step.row, column] = k[:, :, 0]
            self.v[layer][step.row, column] = v[:, :, 0]
            all_k, all_v = self.k[layer].flatten(0, 1), self.v[layer].flatten(0, 1)
            return flash(q[:, :, 0], all_k, all_v, queries, keys, used)[:, :, None]

        return attend

    def make_room(self, prompt: int, response: int) -> None:
        """There is room for all from the beginning: recorded steps need tensors that stay."""

    def move_rows(self, to: Tensor, source: Tensor) -> None:
        for cache in (*self.k, *self.v):
            cache[to] = cache[source]

    def move_seat(self, to: int, source: int) -> None:
        """Nothing lies by seat."""


# ---- Recorded steps ------------------------------------------------------------------------------

RECORDED_ROWS = 64  # a recording's rows are a multiple of it; those not alive cost little


class StepRecorder:
    """Runs a decoding step once as it stands; records it as a CUDA graph the second time, and
    replays it from then on.

    On a GPU the launches of a step cost more than its work: a step of Qwen2.5-1.5B takes 8 ms
    replayed, and 17 as it stands; recording one takes 20. A replay launches everything at once,
    with the same tensors at the same places. So a step must read and write tensors that stay where
    they are, and a step of another size is another recording."""
    def __init__(self):
        self.graphs = {}
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, step, size: int) -> None:
        """step(size): as it stands the first time (its warm-up), then recorded, then replayed."""
        if size not in self.graphs:
            step(size)
            self.graphs[size] = None
            return
        if self.graphs[size] is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):    # records, and does not run
                step(size)
            self.graphs[size] = graph
        self.graphs[size].replay()
