"""Many processes: what N take together is the step that one would take."""
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from test_faults import ROOT, Run, start

from gcpo import ALGORITHMS, Group, group_advantages
from model import load_model
from support import parallel
from support.options import Config
from support.parallel import gather_shards
from support.toy import build_toy
from train import Item, make_policy, update


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def fixed_items(contrast):
    """Groups of several sizes and lengths; those not in `contrast` have equal rewards."""
    generator, items = torch.Generator().manual_seed(0), []
    for place in range(5):
        G, T = 4, 5 + 3 * place
        rewards = torch.arange(G).float() if place in contrast else torch.ones(G)
        group = Group(torch.randint(2, 20, (3 + place,), generator=generator), torch.randint(2, 20, (G, T), generator=generator),
                      torch.randint(1, T + 1, (G,), generator=generator), torch.ones(G, dtype=torch.bool), torch.zeros(G, T), rewards > 2, rewards,
                      torch.zeros(G, dtype=torch.bool))
        items.append(Item(place, None, group, group_advantages(rewards)))
    return items


def worker(rank, world, port, folder, contrast, optimizer_name, shard):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    parallel.join()
    split = lambda model: parallel.shard(model, torch.device("cpu"), torch.float32)
    model = load_model(os.path.join(folder, "toy", "model"), shard=split if shard and world > 1 else None)
    compute = make_policy(model, torch.float32)
    compute.gradient_checkpointing = model.gradient_checkpointing = shard and optimizer_name == "adamw"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer_name == "sgd" else torch.optim.AdamW(model.parameters(), lr=1e-3)
    items, norms = parallel.my_part(fixed_items(contrast)), []
    for _ in range(3):
        norms.append(update(model, compute, optimizer, items, ALGORITHMS["gcpo"], Config(max_new_tokens=24, rows_per_pass=3 if shard else 8))[1])
    weights = torch.cat([gather_shards(p.detach()).flatten() for p in model.parameters()])
    assert torch.equal(weights, torch.cat([p.detach().flatten() for p in compute.parameters()]))    # what samples next is what was trained
    if rank == 0:
        torch.save([weights, norms], os.path.join(folder, f"{world}.pt"))
    parallel.leave()


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("processes"))
    build_toy(os.path.join(folder, "toy"), 0)
    return folder


@pytest.mark.parametrize("contrast, optimizer, shard", [((0, 1, 2, 3, 4), "sgd", False), ((2,), "sgd", False), ((), "sgd", False),
                         ((0, 1, 2, 3, 4), "adamw", False), ((0, 1, 2, 3, 4), "sgd", True), ((2,), "adamw", True)],
                         ids=["all groups", "one group", "no group", "all groups, AdamW", "all groups, shards", "one group, AdamW, shards"])
def test_n_processes_take_the_step_of_one(toy_folder, contrast, optimizer, shard):
    """Forbids denominators of a process's own, gradients averaged where they should be summed, and processes that wait
    for each other for ever: five groups over one, two and three processes, also where some or all have nothing to do, with
    whole weights in each process or a shard of them."""
    results, worlds = {}, (1, 2, 3) if len(contrast) == 5 and optimizer == "sgd" else (1, 3) if shard else (1, 2)
    for world in worlds:
        port = free_port()
        workers = [start.Process(target=worker, args=(rank, world, port, toy_folder, contrast, optimizer, shard)) for rank in range(world)]
        [w.start() for w in workers]
        [w.join(60) for w in workers]
        assert [w.exitcode for w in workers] == [0] * world
        results[world] = torch.load(os.path.join(toy_folder, f"{world}.pt"), weights_only=True)
    weights, norms = results[1]
    assert (norms == [None] * 3) == (contrast == ())
    for world in worlds[1:]:
        assert norms == pytest.approx(results[world][1], rel=1e-5) if contrast else results[world][1] == norms
        if optimizer == "sgd":
            assert (results[world][0] - weights).norm() <= 1e-6 * weights.norm()
        else:
            assert (results[world][0] - weights).abs().max() <= 2 * 1e-3 * 3


def test_what_is_shared_is_merged_in_order():
    """Forbids problems that lose their place: shares of every length over up to five processes."""
    for n in range(12):
        for world in range(1, 6):
            assert parallel.interleave([list(range(n))[rank::world] for rank in range(world)]) == list(range(n))


def torchrun(run, n, *flags):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--master-port", str(free_port()),
                             os.path.join(ROOT, "train.py"), *run.flags, *flags], stdout=open(run.log, "a"), stderr=subprocess.STDOUT)


def test_two_processes_train_and_one_goes_on(tmp_path):
    """Forbids logs written twice, rollouts that depend on who samples them, and checkpoints that only N processes can read:
    the same run by two processes with half the weights each, one of which is killed, goes on with one that has them all."""
    os.makedirs(tmp_path / "one"), os.makedirs(tmp_path / "two")
    one = Run(str(tmp_path / "one"))
    two = Run(str(tmp_path / "two"), toy=one.toy)
    assert one.finish() == 0, one.said()
    process = torchrun(two, 2, "--shard")
    until = time.time() + 90
    while time.time() < until and not (os.path.exists(f"{two.out}/metrics.jsonl") and len(two.metrics(whole=False)) > 5):
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert process.wait(60) != 0                                       # the others do not wait for ever
    assert "lost touch" in two.said() or "SIGKILL" in two.said()
    assert two.finish("--resume") == 0, two.said()
    a, b = one.metrics(), two.metrics()
    assert [r["step"] for r in b] == list(range(13))
    for x, y in zip(a[:3], b[:3]):                                     # later, rounding may move a token
        assert x.keys() == y.keys()
        assert all(x[k] == pytest.approx(y[k], rel=1e-3, abs=1e-5) for k in x if x[k] is not None)
    assert [json.loads(line)["step"] for line in open(f"{two.out}/samples.jsonl")] == list(range(1, 13))
