"""Two precisions: fp32 masters, which AdamW steps, and the policy, which samples and scores.

Where bf16 products are faster, the policy is a bf16 copy of the master. Its gradients are added up
in fp32 on the master, and it is refreshed after every step of the optimizer.
"""
from __future__ import annotations

import torch

from model import Transformer, load_model
from support import parallel
from support.lora import LowRankMaster


def load_master_and_policy(
    config, device: torch.device, dtype: torch.dtype,
) -> tuple[Transformer | LowRankMaster, Transformer]:
    """Master and policy of an options.Config's --model. Full training: the fp32 weights, and
    `make_policy` of them. With --lora-rank: A and B, and a policy that is filled anew with
    W0 + (α / r) · B A after each update."""
    if config.lora_rank:
        policy = load_model(config.model, device, dtype)
        return LowRankMaster(policy, config.lora_rank, config.lora_alpha, config.seed), policy
    shard = (lambda model: parallel.shard(model, device, dtype)) if config.shard else None
    master = load_model(config.model, device, shard=shard)
    return master, make_policy(master, dtype)


def make_policy(master: Transformer, dtype: torch.dtype) -> Transformer:
    """The master itself in fp32, else a copy in `dtype` whose gradients arrive at the master.

    A gradient is moved as soon as backward has completed it, so that those of many groups add up in
    fp32. (With --shard there is a copy in fp32 too, which only samples and scores: gradients are
    then computed by the master's own shards, and no hook fires.)"""
    if dtype == torch.float32 and not parallel.is_sharded(master):
        return master
    with torch.device("meta"):
        policy = Transformer(master.config)
    policy = policy.to(dtype).to_empty(device=master.device)
    for p, master_p in zip(policy.parameters(), master.parameters()):
        p.register_post_accumulate_grad_hook(move_gradient_to(master_p))
    refresh_policy(policy, master)
    return policy


def move_gradient_to(master_p: torch.nn.Parameter):
    """A hook for the policy's parameter: its gradient is added to the master's, and cleared."""
    def move(p):
        if master_p.grad is None:
            master_p.grad = p.grad.float()
        else:
            master_p.grad.add_(p.grad)
        p.grad = None
    return move


@torch.no_grad()
def refresh_policy(policy: Transformer, master: Transformer | LowRankMaster) -> None:
    """Copy the master's weights into the policy, rounded to its dtype."""
    if isinstance(master, LowRankMaster):
        return master.refresh()
    if policy is master:
        return
    for p, master_p in zip(policy.parameters(), master.parameters()):
        p.copy_(parallel.gather_shards(master_p.to(p.dtype)))
