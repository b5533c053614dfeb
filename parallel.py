"""One process or many: torchrun --nproc-per-node N train.py …

Every process has all the weights, samples its share of the step's problems, and adds up the gradient of its own groups.
Denominators are those of the whole step, so gradients need only be summed: N processes take the step that one would.
Without torchrun there is one process, and every function here gives back what it was given.
"""
from __future__ import annotations

import datetime
import json
import os

import torch
import torch.distributed as dist

from model import InputError

BUCKET = 2**25  # gradient elements that travel together


def start() -> str | None:
    """Join the others, if torchrun started us. Returns this process's device, or None to choose as usual."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    on_gpu = torch.cuda.is_available()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(device)
    # Numbers and texts travel between CPUs, gradients between devices. Others may be sampling for long before they answer.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=datetime.timedelta(hours=2))
    return device


def talk(collective, *args) -> None:
    """Raises InputError where a collective fails: with NCCL and gloo alike, somebody is not there any more."""
    try:
        collective(*args)
    except RuntimeError as e:
        raise InputError(f"process {rank()} lost touch with another, which has ended or was killed ({str(e).splitlines()[0][:100]}); "
                         "what that one said stands nearby; --resume goes on from the last checkpoint") from None


def end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(xs: list) -> list:
    """This process's part. Parts may differ by one in length, or be empty."""
    return xs[rank()::world()]


def merge(parts: list[list]) -> list:
    """The list whose `share`s these are."""
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def gather(value) -> list:
    """What each process holds, in the order of ranks; plain data, sent as JSON: nothing that could be executed."""
    if world() == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
    talk(dist.all_gather, sizes, torch.tensor([len(data)]))
    longest = int(max(sizes))
    parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(world())]
    talk(dist.all_gather, parts, torch.nn.functional.pad(data, (0, longest - len(data))))
    return [json.loads(bytes(part[:int(size)].tolist())) for part, size in zip(parts, sizes)]


def totals(*numbers: int) -> list[int]:
    """Each number summed over the processes."""
    return [sum(column) for column in zip(*gather(numbers))]


def sum_gradients(model: torch.nn.Module) -> None:
    """Gradients summed over the processes; one that had nothing to do counts as zeros."""
    if world() == 1:
        return
    parameters = list(model.parameters())
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    bucket = []
    for i, p in enumerate(parameters):
        bucket.append(p.grad)
        if i + 1 == len(parameters) or sum(g.numel() for g in bucket) + parameters[i + 1].numel() > BUCKET:
            flat = torch.cat([g.flatten() for g in bucket])
            talk(dist.all_reduce, flat)
            for g, summed in zip(bucket, flat.split([g.numel() for g in bucket])):
                g.copy_(summed.view_as(g))
            bucket = []
