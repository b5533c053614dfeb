"""What a GPU runs, on a pretended one (tests/pretended_gpu.py): the CPU's numbers come out, nothing
is done that a GPU refuses, and the pretence itself refuses what it should.
"""
import itertools
import math
import os
import shutil

import mutations_gpu
import pytest
import torch
from helpers import LLAMA, relative, tiny_model
from pretended_gpu import aten, pretended_gpu
from test_gpu import make_group
from test_train import metrics_of, on_toy, weights_of

from gcpo import ALGORITHMS, gold_group
from model import load_model, rope_frequencies, save_model
from sampler import sample
from support.options import Config
from support.policy import make_policy
from train import Item, Run, learn


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(autouse=True)
def no_frequencies_left():
    """The model's cache of frequencies would hand tensors of one pretended GPU to the next."""
    rope_frequencies.cache_clear()
    yield
    rope_frequencies.cache_clear()


@pytest.fixture
def gpu():
    with pretended_gpu() as gpu:
        yield gpu


def write_model(folder, **changes):
    """A folder of small random weights, with a head size of 8."""
    model = tiny_model(folder, {**LLAMA, **changes})
    save_model(model, str(folder / "model"))
    return str(folder / "model")


# ---- Sampling ------------------------------------------------------------------------------------

PROMPTS = [torch.arange(1, n) % 53 for n in (5, 30, 12, 9, 3, 20, 7, 140, 4, 11, 2, 6)]


def equals_the_cpu(folder, flash, prompts, *args, **settings):
    """Samples on both devices. Returns the pretended GPU."""
    cpu = sample(load_model(folder), prompts, *args, **settings)
    with pretended_gpu(flash_in_fp32=flash) as gpu:
        groups = sample(load_model(folder, "cuda"), prompts, *args, **settings)
    for a, b in zip(groups, cpu, strict=True):
        assert torch.equal(a.lengths, b.lengths)
        assert torch.equal(a.responses, b.responses)
        assert torch.equal(a.finished, b.finished)
        assert (a.logprobs - b.logprobs).abs().max() < 1e-5
    assert gpu.recordings and gpu.replays
    assert not gpu.escaped
    return gpu


@pytest.mark.parametrize("flash, settings", [
    (False, dict(temperature=0.0)),
    (True, dict(temperature=0.8, top_p=0.9, top_k=20)),
    (False, dict(temperature=1.5)),
    (True, dict(temperature=1.5))], ids=["greedy", "flash-top", "all", "flash-all"])
def test_recorded_steps_say_what_the_cpu_says(tmp_path, flash, settings):
    """Recorded steps give the CPU's tokens, and its logprobs to 1e-5, while rows leave, prompts
    enter and a longer prompt comes; by products in fp32, and through FlashAttention. (Bugs: an
    index left on the CPU; a step that asks the host; a row that is not alive run past its cache; a
    cache that reads another row's keys.)"""
    folder = write_model(tmp_path)
    gpu = equals_the_cpu(
        folder, flash, PROMPTS, 12, 40, stop_ids=[0, 7], seed=0, max_rows=72, **settings)
    assert gpu.replays > 2 * gpu.recordings


def test_recorded_steps_outlive_no_tensor(tmp_path):
    """The same for responses and prompts so long that a CPU's caches would grow. (Bug: a graph that
    goes on reading the old cache.)"""
    folder = write_model(tmp_path, max_position_embeddings=512)
    prompts = [torch.arange(n) % 53 for n in (10, 20, 5, 150, 10)]
    equals_the_cpu(folder, False, prompts, 4, 150, stop_ids=[0], seed=1, max_rows=8)


# ---- Training ------------------------------------------------------------------------------------

def make_items(algorithm, G=4):
    """A group for each of two updates. If the preset uses gold, a row of each is gold."""
    generator = torch.Generator().manual_seed(2)
    items = []
    for position in range(2):
        group = make_group(LLAMA, G, P=5 + 9 * position, T=12 + 3 * position)
        group.logprobs = -4 * torch.rand(group.logprobs.shape, generator=generator)
        advantages = torch.randn(G, generator=generator)
        if algorithm.train_on == "gold":
            group = gold_group(group.prompt, group.responses[0, :group.lengths[0]])
            advantages = torch.ones(1)
        elif algorithm.gold_when != "never":
            group.is_gold[1] = True
            group.logprobs[1] = math.nan    # nobody sampled it
        items.append(Item(position, None, group, advantages))
    return items


def learned_on(
        device, folder, name, dtype=torch.float32, updates=2, checkpointing=False, rows_per_pass=4):
    """The updates of a step, with π_old scored for the second. Returns what `learn` does, and how
    far the weights moved."""
    master = load_model(folder, device)
    policy = make_policy(master, dtype)
    policy.gradient_checkpointing = checkpointing
    before = weights_of(master).clone()
    run = Run(
        config=Config(
            updates=updates, prompts=2, rows_per_pass=rows_per_pass, max_grad_norm=1e9),
        algorithm=ALGORITHMS[name],
        master=master,
        policy=policy,
        optimizer=torch.optim.SGD(master.parameters(), lr=0.01),
        reference=load_model(folder, device, dtype))
    learned = learn(run, make_items(ALGORITHMS[name]))
    return learned, (weights_of(master) - before).cpu()


def cases(tmp_path, name):
    """Folders with tied embeddings or not, and the settings of a GPU's updates: whether blocks run
    again, and how many rows go together, so that prompts run apart or not."""
    for tied, checkpointing, rows_per_pass in (
            (True, False, 3), (False, True, 4), (True, True, 3), (False, False, 4)):
        folder = tmp_path / f"tied-{tied}"
        folder.mkdir(exist_ok=True)
        if name == "dpo":    # a pair's rows go together
            rows_per_pass = 4
        settings = dict(checkpointing=checkpointing, rows_per_pass=rows_per_pass)
        yield write_model(folder, tie_word_embeddings=tied), settings


PRESETS = pytest.mark.parametrize("name", ["gcpo", "dapo", "dpo", "luffy", "sft"])


@pytest.mark.parametrize("name, flash", [
    ("gcpo", False), ("gcpo", True), ("dapo", False), ("dpo", True), ("luffy", False),
    ("sft", True)])
def test_updates_equal_the_cpus(tmp_path, name, flash):
    """Scores, losses, gradient norms and the weights' moves in two updates are the CPU's to 1e-5,
    with tied and untied embeddings, with blocks run again, with the prompt apart. (Bugs: a column
    of the batch left on the CPU; a mask or a product that differs. Sums go in another order, so
    some digits may differ.)"""
    for folder, settings in cases(tmp_path, name):
        want, want_move = learned_on("cpu", folder, name)
        with pretended_gpu(flash_in_fp32=flash):
            learned, move = learned_on("cuda", folder, name, **settings)
        assert learned.norms == pytest.approx(want.norms, rel=1e-5)
        assert learned.sums == pytest.approx(want.sums, rel=1e-5, abs=1e-5)
        assert (move - want_move).norm() < 1e-5 * want_move.norm()


@PRESETS
def test_updates_in_bf16_are_as_good_as_the_cpus(tmp_path, name):
    """A bf16 policy moves the weights to within 5 % of where fp32 moves them. (Bug: gradients that
    are summed in bf16, or come from elsewhere. Each device rounds to 8 bits at its own places, so
    neither equals the other; 1 to 4 % are measured on both.)"""
    for folder, settings in itertools.islice(cases(tmp_path, name), 2):
        want, want_move = learned_on("cpu", folder, name, updates=1)
        with pretended_gpu():
            learned, move = learned_on(
                "cuda", folder, name, torch.bfloat16, updates=1, **settings)
        assert learned.norms == pytest.approx(want.norms, rel=0.05)
        assert (move - want_move).norm() < 0.05 * want_move.norm()


# ---- A whole run ---------------------------------------------------------------------------------

def test_a_run_and_its_rest_equal_the_cpus(toy, tmp_path):
    """Twenty steps of the toy on --device cuda have the CPU's losses and gradient norms, and so has
    the rest of the run after its tenth step. (Bugs: moments on another device after a checkpoint; a
    metric that needs the CPU; weights that are not refreshed.)"""
    files = {"model": toy["model"]}
    for name in ("data", "eval_data"):
        with open(toy[name]) as f:
            lines = f.readlines()[:40]
        files[name] = tmp_path / name
        files[name].write_text("".join(lines))
    flags = ["--steps", "20", "--save-every", "10", "--prompts", "2", "--eval-limit", "2",
             "--threads", "1"]

    def columns(out):
        rows = metrics_of(out)[1:]
        assert [row["step"] for row in rows] == list(range(1, 21))
        return [[row[name] for row in rows] for name in ("update/loss", "update/grad_norm")]

    def run(device, out):
        return on_toy(files, out, *flags, "--device", device)

    cpu = columns(run("cpu", tmp_path / "cpu"))
    with pretended_gpu() as gpu:
        out = run("cuda", tmp_path / "gpu")
    assert gpu.recordings and gpu.replays and not gpu.escaped
    for mine, theirs in zip(columns(out), cpu, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    rest = tmp_path / "rest"    # a copy, as this process still holds the lock of the run's folder
    shutil.copytree(out, rest)
    shutil.rmtree(rest / "checkpoints" / "step-000020")
    with pretended_gpu():
        on_toy(files, rest, *flags, "--device", "cuda", "--resume")
    assert columns(rest) == columns(out)
    a, b = (load_model(os.path.join(folder, "model")) for folder in (out, rest))
    assert torch.equal(weights_of(a), weights_of(b))


# ---- What the pretence refuses -------------------------------------------------------------------

def refused(words):
    return pytest.raises(RuntimeError, match=words)


def test_operands_are_on_one_device(gpu):
    """Operands on two devices are refused, but for a number on the CPU where PyTorch takes one."""
    x = torch.arange(6.0, device="cuda").view(2, 3)
    assert x.device == torch.device("cuda:0") and x.is_cuda and x.device.type == "cuda"
    host = torch.ones(3)
    row = torch.tensor([1])
    for operation in (
            lambda: x + host,
            lambda: host + x,
            lambda: x @ host,
            lambda: torch.cat([x[0], host]),
            lambda: x.index_select(0, row),
            lambda: torch.where(x > 1, x, host),
            lambda: x.index_put_((row,), host),
            lambda: host[torch.tensor([0], device="cuda")],
            lambda: host.add_(x[0]),
            lambda: torch.nn.functional.embedding(row, x),
            lambda: torch.stack([x[0, 0], torch.tensor(1.0)])):
        with refused("same device"):
            operation()
    two = torch.tensor(2.0)
    assert (x * two).is_cuda and (two + x).is_cuda
    assert torch.where(x > 1, x, two).tolist() == [[2, 2, 2], [3, 4, 5]]
    x[row] = two
    x[:, 0].fill_(two)
    assert x.cpu().tolist() == [[2, 1, 2], [2, 2, 2]]


def test_host_reads_are_counted_by_place(gpu):
    """Whatever makes the host wait is counted; what does not is not."""
    x = torch.arange(3, device="cuda")
    sampler_like = x.clone()
    sampler_like[x > 1] = 0    # by masked_fill
    x.sum().sqrt().argmax()
    assert not gpu.host_reads
    for look in (
            lambda: x[0].item(),
            lambda: x.tolist(),
            lambda: bool(x[0] == 0),
            lambda: x.nonzero(),
            lambda: x[x > 1],
            lambda: x[[0, 1]],
            lambda: x.cpu(),
            lambda: x.to("cpu", torch.float32),
            lambda: torch.ones(2).to(x.device),
            lambda: torch.tensor([1], device="cuda"),
            lambda: x.copy_(torch.zeros(3)),
            lambda: torch.zeros(3, dtype=torch.int64).copy_(x),
            lambda: torch.cuda.synchronize()):
        gpu.host_reads.clear()
        look()
        [(place, count)] = gpu.host_reads.items()
        assert place.startswith("test_pretended_gpu.py:") and count == 1
        with torch.inference_mode():    # where operations come whole
            look()
        assert set(gpu.host_reads.values()) == {2}
        graph = torch.cuda.CUDAGraph()
        with refused("not permitted while a graph is being recorded"), torch.cuda.graph(graph):
            look()


def test_a_recording_runs_when_it_is_replayed(gpu):
    """A recording changes nothing; each replay reads and writes the tensors that were recorded,
    with numbers of the host as they were then."""
    x = torch.zeros(3, device="cuda")
    step = torch.ones(3, device="cuda")
    factor = torch.tensor(2.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.empty(3, device="cuda").fill_(1.0)
        y += torch.arange(3, device="cuda")
        x[:2] += (y * step * factor)[:2]
    assert x.tolist() == [0, 0, 0]
    step.fill_(10)
    factor.fill_(7)
    graph.replay()
    graph.replay()
    assert x.tolist() == [40, 80, 0]
    assert (gpu.recordings, gpu.replays) == (1, 2)
    with torch.cuda.graph(torch.cuda.CUDAGraph()), refused("a replay while"):
        graph.replay()


def test_a_replay_shows_what_has_moved(gpu):
    """A replay that needs a tensor which is no more is refused, and a tensor that was born in a
    recording and outlives it is on the list."""
    class State:
        x = torch.zeros(3, device="cuda")

    def step():
        State.x += 1

    def step_that_rebinds():
        State.x = State.x + 1

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    assert not gpu.escaped
    State.x = torch.zeros(4, device="cuda")
    with refused("memory that has moved, for aten.add_"):
        graph.replay()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        step_that_rebinds()
    [born] = gpu.escaped
    assert born.startswith("aten.add")


def test_autograd_and_modules_work_there(gpu):
    """A module moves there and back, and its gradients are there."""
    layer = torch.nn.Linear(3, 2)
    want = torch.autograd.grad(layer(torch.ones(4, 3)).square().sum(), layer.weight)[0]
    layer.to("cuda")
    assert layer.weight.is_cuda
    layer(torch.ones(4, 3, device="cuda")).square().sum().backward()
    assert layer.weight.grad.is_cuda
    assert torch.equal(layer.weight.grad.cpu(), want)
    a, b = layer.weight.split([1, 2], dim=1)    # no gradient of b
    a.sum().backward()
    assert layer.to("cpu").weight.device.type == "cpu"


# ---- Flash attention -----------------------------------------------------------------------------

FLASH_Q = [3, 1, 0, 5]
FLASH_K = [5, 4, 2, 5]


def flash_inputs(H=4, K=2, d=8):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(size, generator=generator)
    ends = lambda sizes: torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    q, k, v = draw(sum(FLASH_Q), H, d), draw(sum(FLASH_K), K, d), draw(sum(FLASH_K), K, d)
    return q, k, v, ends(FLASH_Q), ends(FLASH_K)


def flash(q, k, v, cum_q, cum_k, causal=True, **others):
    return aten._flash_attention_forward(q, k, v, cum_q, cum_k, 5, 5, 0.0, causal, False, **others)


@pytest.mark.parametrize("causal", [True, False])
def test_flash_attention_equals_plain_attention(gpu, causal):
    """Its output, log-sums and gradients are those of attention row by row."""
    q, k, v, *ends = flash_inputs()
    want_out, want_lse = [], []
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    for row_q, row_k, row_v in zip(
            leaves[0].split(FLASH_Q), leaves[1].split(FLASH_K), leaves[2].split(FLASH_K)):
        n, m = len(row_q), len(row_k)
        row_k, row_v = (x.repeat_interleave(2, dim=1) for x in (row_k, row_v))
        scores = torch.einsum("nhd,mhd->hnm", row_q, row_k) / 8**0.5
        if causal:
            scores = scores + torch.full((n, m), -torch.inf).triu(m - n + 1)
        want_out.append(torch.einsum("hnm,mhd->nhd", scores.softmax(-1), row_v))
        want_lse.append(scores.logsumexp(-1))
    want_out, want_lse = torch.cat(want_out), torch.cat(want_lse, dim=1)
    weight = torch.randn(want_out.shape)
    (want_out * weight).sum().backward()

    gpu.takes_fp32 = True
    q, k, v, *ends = (x.cuda() for x in (q, k, v, *ends))
    on_gpu = [x.requires_grad_() for x in (q, k, v)]
    out, lse, *_ = flash(*on_gpu, *ends, causal=causal)
    (out * weight.cuda()).sum().backward()
    assert relative(out.detach().cpu(), want_out) < 1e-6
    assert relative(lse.cpu(), want_lse) < 1e-6
    for x, want in zip(on_gpu, leaves):
        assert relative(x.grad.cpu(), want.grad) < 1e-6


def test_flash_attention_reads_the_keys_that_are_used(gpu):
    """With seqused_k, keys beyond are not read; a query that sees none gives 0 and a log-sum of
    +inf."""
    gpu.takes_fp32 = True
    q, k, v, cum_q, cum_k = (x.cuda() for x in flash_inputs())
    used = torch.tensor([2, 0, 1, 5], dtype=torch.int32, device="cuda")
    want = flash(q, k, v, cum_q, cum_k, causal=False, seqused_k=used)
    for beyond in (2, 5, 10):
        k[beyond] = v[beyond] = torch.nan
    out, lse, *_ = flash(q, k, v, cum_q, cum_k, causal=False, seqused_k=used)
    assert torch.equal(out.cpu(), want[0].cpu())
    assert torch.equal(lse.cpu(), want[1].cpu())
    assert out[3].abs().max() == 0
    assert lse[:, 3].tolist() == [torch.inf] * 4


def test_flash_attention_refuses_what_the_kernel_refuses(gpu):
    """fp32, int64 ends, an odd head size, heads in broken groups, other devices, a gradient with
    seqused_k."""
    host = flash_inputs()
    q, k, v, cum_q, cum_k = (x.cuda() for x in host)
    with refused("takes bf16 and fp16"):
        flash(q, k, v, cum_q, cum_k)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    out, lse, *_ = flash(q, k, v, cum_q, cum_k)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    with refused("int32"):
        flash(q, k, v, cum_q.long(), cum_k)
    with refused("multiple of 8"):
        flash(q[..., :6], k[..., :6], v[..., :6], cum_q, cum_k)
    with refused("groups of heads"):
        flash(q[:, :3], k, v, cum_q, cum_k)
    with refused("one dtype"):
        flash(q, k, v.half(), cum_q, cum_k)
    with refused("same device"):
        flash(q, k, v, host[3], cum_k)
    with refused("longer than max_q"):
        aten._flash_attention_forward(q, k, v, cum_q, cum_k, 4, 5, 0.0, True, False)
    with refused("no gradient with seqused_k"):
        flash(q.requires_grad_(), k, v, cum_q, cum_k, seqused_k=cum_k[1:])


@pytest.mark.slow
def test_bugs_of_a_gpu_are_caught():
    """Each bug of tests/mutations_gpu.py, put into a copy of the repository, fails a test above."""
    assert mutations_gpu.main() == []
