"""DPO's loss inside a group: the second loss that train.py can choose (`objective="pairs"`)."""
from __future__ import annotations

import torch
from torch import Tensor

from gcpo import Algorithm, LossContext, importance_ratio, masked_sum, metric_sums


def pair_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor,
    algorithm: Algorithm, **context,
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO's loss (arXiv 2305.18290, eq. 7) inside one whole group. Arguments as for policy_loss;
    old_logprobs are for the metrics alone.

    Each response above the group's mean reward (a right rollout, or gold) is chosen, each below it
    rejected; the loss is the mean over all such pairs of

        −log σ( β [ log π_θ/π_ref (chosen) − log π_θ/π_ref (rejected) ] )        sums over tokens

    and over an update's groups the mean again, in which a group without pairs counts as 0."""
    context = LossContext(**context)
    logprobs = torch.where(mask, logprobs, 0.0)
    old_logprobs = torch.where(mask, old_logprobs, 0.0)
    ref_logprobs = torch.where(mask, context.ref_logprobs, 0.0)
    margin = algorithm.beta * masked_sum(logprobs - ref_logprobs, mask, dim=1)      # (G,)
    pairs = margin[advantages > 0][:, None] - margin[advantages < 0]    # (chosen, rejected)
    mean = -torch.nn.functional.logsigmoid(pairs).sum() / max(1, pairs.numel())
    loss = mean * len(advantages) / context.total_rows    # all groups have equal sizes

    with torch.no_grad():
        is_gold = context.is_gold
        if is_gold is None:
            is_gold = torch.zeros_like(advantages, dtype=torch.bool)
        ratio = importance_ratio(logprobs, old_logprobs, mask, is_gold, algorithm)
        sums = metric_sums(logprobs, old_logprobs, ratio, torch.zeros_like(mask), mask, is_gold)
    return loss, sums
