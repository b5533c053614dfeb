"""One process or many: torchrun --nproc-per-node N train.py …

Every process samples its share of the step's problems, and adds up the gradient of its own groups. Denominators are those
of the whole step, so gradients need only be summed: N processes take the step that one would. Without torchrun there is
one process, and every function here does as if it were the only one.

Each process has all the weights, or, with --shard, an Nth of weights, gradients and moments (FSDP2: `fully_shard`, after
ZeRO, arXiv 1910.02054). A block's weights are then put together for as long as it computes, in collectives that all
processes must enter in the same order: one with fewer groups makes passes of weight zero.
"""
from __future__ import annotations

import datetime
import gc
import json
import os

import torch
import torch.distributed as dist
from torch import Tensor

from support.common import InputError


BUCKET = 2**25  # gradient elements that travel together


def join() -> str | None:
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


def run_distributed(main) -> None:
    """Run main(). Raises InputError where a collective fails: with NCCL and gloo alike, somebody is not there any more."""
    try:
        main()
    except RuntimeError as e:
        if world() == 1 or not (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise
        raise InputError(f"process {rank()} lost touch with another, which has ended or was killed ({str(e).splitlines()[0][:100]}); "
                         "what that one said stands nearby; --resume goes on from the last checkpoint") from None
    finally:
        leave()


def leave() -> None:
    if dist.is_initialized():
        gc.collect()    # FSDP's cycles hold the group, whose threads must not outlive the interpreter
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def my_part(xs: list) -> list:
    """This process's part. Parts may differ by one in length, or be empty."""
    return xs[rank()::world()]


def interleave(parts: list[list]) -> list:
    """The list whose `share`s these are."""
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def all_gather(value) -> list:
    """What each process holds, in the order of ranks; plain data, sent as JSON: nothing that could be executed."""
    if world() == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(data)]))
    longest = int(max(sizes))
    parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(world())]
    dist.all_gather(parts, torch.nn.functional.pad(data, (0, longest - len(data))))
    return [json.loads(bytes(part[:int(size)].tolist())) for part, size in zip(parts, sizes)]


def all_sum(*numbers: int) -> list[int]:
    """Each number summed over the processes."""
    return [sum(column) for column in zip(*all_gather(numbers))]


def sum_gradients(model: torch.nn.Module) -> None:
    """Gradients summed over the processes; one that had nothing to do counts as zeros. (Of shards they are already.)"""
    if world() == 1 or is_sharded(model):
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
            dist.all_reduce(flat)
            for g, summed in zip(bucket, flat.split([g.numel() for g in bucket])):
                g.copy_(summed.view_as(g))
            bucket = []


# ---------------------------------------------------------------------------------------------------------------------
# Shards

def shard(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Leave this process an Nth of each parameter: `model`, on the meta device or not, computes in `dtype` from now on, and
    its gradients arrive summed over the processes, in fp32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    how = dict(mesh=init_device_mesh(device.type, (world(),)), mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    for block in model.layers:
        fully_shard(block, **how)
    # The output matrix is used after forward has returned (`score_responses`), so what is not a block's stays until backward.
    fully_shard(model, reshard_after_forward=False, **how)
    for module in (*model.layers, model):                                   # a sum, where FSDP would take the mean
        if hasattr(module, "set_force_sum_reduction_for_comms"):            # gloo knows plain sums only
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
        elif device.type == "cpu":
            raise InputError(f"--shard: on CPUs it needs PyTorch 2.8 or newer, and this is {torch.__version__}")
        else:
            module.set_reduce_scatter_divide_factor(1.0)


def is_sharded(model: torch.nn.Module) -> bool:
    return hasattr(model, "unshard")


def gather_shards(x: Tensor) -> Tensor:
    """All of a tensor, also where this process has a shard of it (parallel.py); all processes must ask."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


@torch.no_grad()
def copy_into(parameter: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor into a parameter, or this process's shard of it into its own."""
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor
        tensor = distribute_tensor(tensor.to(parameter.device, parameter.dtype), parameter.device_mesh, parameter.placements)
    parameter.copy_(tensor)
