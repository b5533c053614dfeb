"""One process or many: torchrun --nproc-per-node N train.py …

Every process samples its part of a step's problems and adds up the gradient of its own groups.
Denominators are those of the whole step, so gradients need only be summed: N processes take the
step that one would. Without torchrun there is one process, and every function here does as if it
were the only one.

Each process has all the weights, or, with --shard, an Nth of weights, gradients and moments (FSDP2,
after ZeRO, arXiv 1910.02054). A block's weights are then gathered for as long as it computes, in
collectives that all processes must enter in the same order. So a process with fewer groups makes
up for them with passes of weight zero.
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


BUCKET = 2**25  # gradient elements that travel in one message


# ---- Who is there --------------------------------------------------------------------------------

def join(wanted: str = "auto") -> str | None:
    """Meet the other processes, if torchrun started us. wanted: --device. Returns this process's
    device, or None."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        return None
    others = [os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "MASTER_PORT")]
    if not all(number.isdecimal() for number in (count, *others)):
        raise InputError(f"WORLD_SIZE is {count!r} in the environment, and RANK, LOCAL_RANK or "
                         "MASTER_PORT is no number: start several processes with torchrun, or "
                         "unset WORLD_SIZE")
    on_gpu = torch.cuda.is_available() and wanted != "cpu"
    if on_gpu and int(others[1]) >= torch.cuda.device_count():
        raise InputError(f"--nproc-per-node: there is a process number {others[1]} on this "
                         f"machine, and {torch.cuda.device_count()} GPUs; start one process a GPU")
    device = f"cuda:{os.environ['LOCAL_RANK']}" if on_gpu else "cpu"
    if on_gpu:
        torch.cuda.set_device(device)
    # Numbers and texts travel between CPUs, gradients between devices.
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    patience = datetime.timedelta(hours=2)    # others may be sampling for long
    dist.init_process_group(backend, timeout=patience)
    return device


def run_distributed(main) -> None:
    """Run main(). Raises InputError if a collective fails: then another process has ended."""
    try:
        main()
    except RuntimeError as e:
        if world() == 1 or not (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise
        reason = str(e).splitlines()[0][:100]
        raise InputError(
            f"process {rank()} lost touch with another, which has ended or was killed ({reason}); "
            "see its own error message above; --resume goes on from the last checkpoint") from None
    finally:
        leave()


def leave() -> None:
    if dist.is_initialized():
        gc.collect()    # FSDP's cycles hold the group, whose threads must not outlive Python
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


# ---- Lists and numbers ---------------------------------------------------------------------------

def my_part(xs: list) -> list:
    """This process's part of a list. Parts may differ by one in length, or be empty."""
    return xs[rank()::world()]


def interleave(parts: list[list]) -> list:
    """The list whose `my_part`s these are."""
    total = sum(map(len, parts))
    return [parts[i % len(parts)][i // len(parts)] for i in range(total)]


def all_gather(value) -> list:
    """The values of all processes, in the order of ranks. Sent as JSON: nothing can be executed."""
    if world() == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(data)]))
    longest = int(max(sizes))
    parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(world())]
    dist.all_gather(parts, torch.nn.functional.pad(data, (0, longest - len(data))))
    texts = [bytes(part[:int(size)].tolist()) for part, size in zip(parts, sizes)]
    return [json.loads(text) for text in texts]


def all_sum(*numbers: int) -> list[int]:
    """Each number summed over the processes."""
    return [sum(column) for column in zip(*all_gather(numbers))]


def refuse_difference(settings: dict) -> None:
    """Raises InputError in every process if one of them has other settings than the first."""
    everyone = all_gather(settings)
    for number, others in enumerate(everyone):
        for name in {**everyone[0], **others}:
            ours, theirs = everyone[0].get(name), others.get(name)
            if ours != theirs:
                raise InputError(f"process {number} has {name.replace('_', '-')} {theirs!r}, and "
                                 f"process 0 has {ours!r}; start all with the same flags and files")


def from_first(value):
    """The first process's value, in every process; also a place where they wait for each other."""
    return all_gather(value)[0]


# ---- Gradients -----------------------------------------------------------------------------------

def idle_passes(model: torch.nn.Module, passes: int) -> int:
    """How many passes of weight zero this process must add to its own. To be asked before the first
    of them: a sharded model's passes are collectives, which all processes enter together."""
    return max(all_gather(passes)) - passes if is_sharded(model) else 0


def finish_backward(model: torch.nn.Module, idle: int) -> None:
    """After this process's backward passes: gradients become sums over all processes."""
    if world() == 1:
        return
    if is_sharded(model):    # FSDP has summed already
        for _ in range(idle):
            idle_pass(model)
        return
    parameters = list(model.parameters())
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    bucket = []
    for i, p in enumerate(parameters):
        bucket.append(p.grad)
        last = i + 1 == len(parameters)
        if last or sum(g.numel() for g in bucket) + parameters[i + 1].numel() > BUCKET:
            sum_together(bucket)
            bucket = []


def sum_together(gradients: list[Tensor]) -> None:
    """Each tensor summed over the processes, in one message."""
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for g, summed in zip(gradients, flat.split([g.numel() for g in gradients])):
        g.copy_(summed.view_as(g))


def idle_pass(model: torch.nn.Module) -> None:
    """Forward and backward of weight zero."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    (0 * model.logits(model(token)).sum()).backward()


# ---- Shards --------------------------------------------------------------------------------------

def shard(model: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Leave this process an Nth of each parameter. The model, on the meta device or not, computes
    in `dtype` from now on; its gradients arrive summed over the processes, in fp32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    settings = dict(
        mesh=init_device_mesh(device.type, (world(),)),
        mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    model.compute_dtype = dtype
    for block in model.layers:
        fully_shard(block, **settings)
    # The output matrix is used after forward has returned, so the rest stays until backward.
    fully_shard(model, reshard_after_forward=False, **settings)
    for module in (*model.layers, model):    # a sum, where FSDP would take the mean
        if hasattr(module, "set_force_sum_reduction_for_comms"):    # gloo knows plain sums only
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
        elif device.type == "cpu":
            raise InputError("--shard: on CPUs it needs PyTorch 2.8 or newer, and this is "
                             f"{torch.__version__}")
        else:
            module.set_reduce_scatter_divide_factor(1.0)


def is_sharded(model: torch.nn.Module) -> bool:
    return hasattr(model, "unshard")


def gather_shards(x: Tensor) -> Tensor:
    """All of a tensor, also if this process has a shard of it; then all processes must ask."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def gather_to_cpu(tensors: dict[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Whole tensors for a file. Of shards, all processes must ask, though only one keeps any."""
    kept = {}
    for name, x in tensors.items():
        x = gather_shards(x.detach())
        if keep:
            kept[name] = x.cpu().contiguous()
    return kept


def my_shard(p: Tensor) -> Tensor:
    """A parameter without its gradient, or this process's shard of it."""
    p = p.detach()
    return p.to_local() if hasattr(p, "to_local") else p


@torch.no_grad()
def copy_into(parameter: Tensor, tensor: Tensor) -> None:
    """Copy a whole tensor into a parameter, or this process's shard of it into its own."""
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor
        tensor = tensor.to(parameter.device, parameter.dtype)
        tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    parameter.copy_(tensor)
