"""What makes a CPU fast: packed weights, attention that fits its caches, freed memory kept and given back."""
from __future__ import annotations

import contextlib
import ctypes
import os

import torch
from torch import nn



@contextlib.contextmanager
def packed_weights(model: nn.Module):
    """Inference on a CPU, with every weight matrix laid out once as oneDNN's products want it.

    Left to itself, each product rearranges its matrix anew, which at a few dozen rows costs up to half of it. Costs one
    more copy of the weights while it lasts; they must not change meanwhile. Elsewhere this does nothing."""
    ops, dtype = torch.ops.mkldnn, model.norm.weight.dtype
    if model.norm.weight.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or not hasattr(ops, "_linear_pointwise") \
            or dtype == torch.bfloat16 and not ops._is_mkldnn_bf16_supported():
        yield
        return

    def product(weight, bias=None):
        packed = ops._reorder_linear_weight(weight.detach(), 64)     # 64: rows to expect
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

SCORES_AT_ONCE = 2**20  # on a CPU: 4 MiB in fp32, which its caches hold


class CachedAttention(torch.autograd.Function):
    """softmax(q kᵀ / √d + bias) v by bare products, the weights computed again in backward; q (m, K, M, d), k and v (m, K, L, d),
    bias (m or 1, 1, M, L). On a CPU, a few rows at a time, this takes half the time of scaled_dot_product_attention.

    With p the weights and δ = Σ dL/dout · out of one query, dL/dscores = p (dL/dp − δ) (arXiv 2205.14135, B.2)."""
    @staticmethod
    def weights(q, k, bias):
        return torch.add(bias, q @ k.transpose(2, 3), alpha=q.shape[3]**-0.5).softmax(-1)           # (m, K, M, L), at least fp32

    @staticmethod
    def forward(ctx, q, k, v, bias):
        out = CachedAttention.weights(q, k, bias).to(v.dtype) @ v
        ctx.save_for_backward(q, k, v, bias, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, bias, out = ctx.saved_tensors
        weights = CachedAttention.weights(q, k, bias)
        grad_v = weights.to(v.dtype).transpose(2, 3) @ grad
        delta = (grad * out).sum(-1, keepdim=True, dtype=weights.dtype)
        grad_scores = torch.sub(grad @ v.transpose(2, 3), delta).mul_(weights).mul_(q.shape[3]**-0.5).to(q.dtype)
        return grad_scores @ k, grad_scores.transpose(2, 3) @ q, grad_v, None


def keep_freed_memory() -> None:
    """What PyTorch does on a GPU: keep large blocks that were freed for the next tensor. glibc hands them back to the system
    and fetches each page anew, a tenth of an update's time. A no-op where the C library is another."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(-3, 2**30) or mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: blocks smaller than this come from the heap (old versions take 32 MiB at most) …
    mallopt(-1, 2**31 - 1)                    # M_TRIM_THRESHOLD: … and the heap keeps so much when it is free


def give_back_freed_memory() -> None:
    """To be called once a step: what `keep_freed_memory` keeps goes back to the system, if the process is above 1 GiB. Ragged tensors are of another
    size every time, so freed blocks fit less and less: without it SmolLM2-135M grew from 4.3 to 9.7 GiB in 18 steps. A no-op without glibc or /proc."""
    try:
        with open("/proc/self/statm") as f:
            resident = int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if resident > 2**30:    # a second per step at most; smaller models would feel it
            ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass
