"""What makes a CPU fast, and nothing else does: packed weights, attention of the size of its
caches, freed memory that is kept during a step and given back after it.

The figures are docs/speed.md's, measured with bench.py on two cores with bf16 instructions.
"""
from __future__ import annotations

import contextlib
import ctypes
import os

import torch
from torch import Tensor, nn


# ---- Products ------------------------------------------------------------------------------------

@contextlib.contextmanager
def packed_weights(model: nn.Module):
    """Inference with every weight matrix laid out once as oneDNN's products want it.

    Left to itself, each product rearranges its matrix anew, which at a few dozen rows costs up to
    half of it: 1.3 x the sampled tokens/s in bf16, 1.7 x in fp32 (`bench.py sample`). Costs one
    more copy of the weights while it lasts; they must not change meanwhile. Elsewhere than on a
    CPU it does nothing."""
    if not can_pack(model):
        yield
        return
    ops = torch.ops.mkldnn

    def product(weight, bias=None):
        rows_to_expect = 64
        packed = ops._reorder_linear_weight(weight.detach(), rows_to_expect)
        return lambda x: ops._linear_pointwise(x, packed, bias, "none", [], "")

    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    for m in layers:
        m.forward = product(m.weight, m.bias)
    model.logits = product(model.output_weight)
    try:
        yield
    finally:
        for m in layers:
            del m.forward
        del model.logits


def can_pack(model: nn.Module) -> bool:
    ops = torch.ops.mkldnn
    if model.device.type != "cpu" or not hasattr(ops, "_linear_pointwise"):
        return False
    if model.dtype == torch.bfloat16:
        return ops._is_mkldnn_bf16_supported()
    return model.dtype == torch.float32


# ---- Attention -----------------------------------------------------------------------------------

SCORES_AT_ONCE = 2**20  # attention scores of one part: 4 MiB in fp32, which a CPU's caches hold


def rows_in_cache(lengths: list[int], heads: int, prompt_length: int) -> list[slice]:
    """Rows cut into parts of neighbours whose attention scores fit the caches; at least one row."""
    def scores(rows):
        return len(rows) * heads * max(rows) * (prompt_length + max(rows))

    parts = []
    first = 0
    while first < len(lengths):
        last = first + 1
        while last < len(lengths) and scores(lengths[first:last + 1]) <= SCORES_AT_ONCE:
            last += 1
        parts.append(slice(first, last))
        first = last
    return parts


class MaskedAttention(torch.autograd.Function):
    """softmax(q kᵀ / √d + mask) v by bare products; the weights are computed again in backward.

    q (N, K, m, d), k and v (N, K, L, d), mask (N or 1, 1, m, L). Half the time of PyTorch's
    scaled_dot_product_attention on a CPU, for parts of `rows_in_cache` (`bench.py update`).

    With p the weights and δ = Σ dL/dout · out of one query, dL/dscores = p (dL/dp − δ)
    (FlashAttention, arXiv 2205.14135, appendix B.2)."""
    @staticmethod
    def weights(q, k, mask):
        scores = torch.add(mask, q @ k.transpose(2, 3), alpha=q.shape[3]**-0.5)
        return scores.softmax(-1)                               # (N, K, m, L), at least fp32

    @staticmethod
    def forward(ctx, q, k, v, mask):
        out = MaskedAttention.weights(q, k, mask).to(v.dtype) @ v
        ctx.save_for_backward(q, k, v, mask, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, mask, out = ctx.saved_tensors
        p = MaskedAttention.weights(q, k, mask)
        grad_v = p.to(v.dtype).transpose(2, 3) @ grad
        delta = (grad * out).sum(-1, keepdim=True, dtype=p.dtype)
        grad_scores = torch.sub(grad @ v.transpose(2, 3), delta)
        grad_scores = grad_scores.mul_(p).mul_(q.shape[3]**-0.5).to(q.dtype)
        return grad_scores @ k, grad_scores.transpose(2, 3) @ q, grad_v, None


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return MaskedAttention.apply(q, k, v, mask)


# ---- Memory --------------------------------------------------------------------------------------

M_TRIM_THRESHOLD = -1   # glibc's numbers (malloc.h)
M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> None:
    """Keep large blocks that were freed for the next tensor, as PyTorch does on a GPU.

    glibc hands them back to the system and fetches each page anew, a tenth of an update's time.
    Does nothing if the C library is another."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    # Blocks below the first threshold come from the heap, which keeps up to the second when free.
    if not mallopt(M_MMAP_THRESHOLD, 2**30):
        mallopt(M_MMAP_THRESHOLD, 2**25)    # the most that old versions take
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Once a step: what `keep_freed_memory` kept goes back to the system, if it is worth it.

    Ragged tensors have another size every time, so freed blocks fit less and less: without this
    SmolLM2-135M grew from 4.3 to 9.7 GiB in 18 steps. Does nothing below 1 GiB (it takes up to a
    second, which a small model would feel), or without glibc or /proc."""
    try:
        with open("/proc/self/statm") as f:
            resident = int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if resident > 2**30:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass
