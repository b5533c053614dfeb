"""Low-rank training (LoRA, arXiv 2106.09685). In place of each matrix W0 (out, in) of the blocks
stands W, of which A and B are trained:

    W = W0 + (α / r) · B A        A (r, in), B (out, r), fp32; B is 0 at the start

A and B of all matrices are the *master*, which AdamW steps. The policy holds W, merged anew after
each update, and is an ordinary model: sampling, scoring and saving know nothing of this. Its
gradient dW becomes that of A and B, matrix by matrix, as backward completes it, and is dropped:

    dB = (α / r) · dW Aᵀ          dA = (α / r) · Bᵀ dW

So a parameter of the blocks takes 4 bytes in bf16 (W0 and W) and any other 2, where full training
takes 20. Embeddings, the output matrix, norms and biases stay as they are. In bf16 W is rounded: a
change below its last bit is not seen until it has grown (`update/bf16_changed`). When a small rank
fails: docs/results.md, "Low rank".
"""
from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from model import ModelConfig, Transformer


class LowRankMatrix(nn.Module):
    """A and B of one matrix of the policy, and W0."""
    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        out, width = weight.shape
        bound = 1 / math.sqrt(width)    # of nn.Linear's own start
        start = torch.rand(rank, width, generator=generator) * 2 * bound - bound
        like = dict(device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
        self.A = nn.Parameter(start.to(**like))
        self.B = nn.Parameter(torch.zeros(out, rank, **like))
        self.scale = alpha / rank
        self.frozen = weight.detach().clone()    # W0, in the policy's dtype

    def merged(self) -> Tensor:
        """W (out, in), fp32"""
        return torch.addmm(self.frozen.to(self.B.dtype), self.B, self.A, alpha=self.scale)

    @torch.no_grad()
    def take_gradient(self, weight: nn.Parameter) -> None:
        """A hook of the policy's matrix: its gradient is added to those of A and B, and cleared."""
        gradient = weight.grad.to(self.A.dtype)                       # (out, in)
        of_b = (gradient @ self.A.T).mul_(self.scale)                 # (out, r)
        of_a = (self.B.T @ gradient).mul_(self.scale)                 # (r, in)
        for p, change in ((self.A, of_a), (self.B, of_b)):
            p.grad = change if p.grad is None else p.grad + change
        weight.grad = None


class LowRankMaster(nn.Module):
    """In place of fp32 weights: A and B of every matrix in the policy's blocks."""
    def __init__(self, policy: Transformer, rank: int, alpha: float, seed: int):
        super().__init__()
        self.policy = [policy]    # in a list, so that its weights are no parameters of this
        generator = torch.Generator().manual_seed(seed)
        for p in policy.parameters():
            p.requires_grad_(False)
        self.weights = []    # of the policy, in the order of `matrices`
        self.matrices = nn.ModuleDict()
        for name, module in policy.layers.named_modules():
            if isinstance(module, nn.Linear):
                matrix = LowRankMatrix(module.weight, rank, alpha, generator)
                self.matrices[name.replace(".", "/")] = matrix    # a ModuleDict allows no dots
                self.weights.append(module.weight.requires_grad_(True))
                module.weight.register_post_accumulate_grad_hook(matrix.take_gradient)

    @property
    def config(self) -> ModelConfig:
        return self.policy[0].config

    @property
    def device(self) -> torch.device:
        return self.policy[0].device

    @torch.no_grad()
    def refresh(self) -> None:
        """The policy's matrices, merged."""
        for weight, matrix in zip(self.weights, self.matrices.values()):
            weight.copy_(matrix.merged())

    def merged_and_frozen(self) -> tuple[list[Tensor], list[Tensor]]:
        """The policy's matrices, and what they were at the start."""
        return self.weights, [matrix.frozen for matrix in self.matrices.values()]


def whole_model(master: nn.Module) -> Transformer:
    """What is saved as a model: the master, or with low ranks the merged policy."""
    return master.policy[0] if isinstance(master, LowRankMaster) else master
