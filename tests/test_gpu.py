"""On a GPU: the same code in bf16 against the CPU, and the toy to the same acceptance. Skipped
where there is none.
"""
import json
import os

import pytest
import torch
from test_train import metrics_of, train_with, weights_of

from gcpo import ALGORITHMS, Group
from helpers import flash_by_loop
from logprobs import token_logprobs
from model import Transformer, load_model, read_config, save_model
from sampler import sample
from support.gpu import Spans, StepRecorder, flash, has_flash, laid_end_to_end
from support.options import Config
from support.policy import make_policy
from train import Item, Run, update


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

TINY = dict(
    model_type="llama",
    vocab_size=300,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=True)
SMOLLM2_135M = dict(
    model_type="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True)
SHAPES = pytest.mark.parametrize("shape", [TINY, SMOLLM2_135M], ids=["tiny", "SmolLM2-135M"])


def make_model(tmp_path, shape, device="cpu"):
    """The same random model on either device, through a real folder."""
    folder = tmp_path / "model"
    if not folder.exists():
        (tmp_path / "config.json").write_text(json.dumps(shape))
        model = Transformer(read_config(str(tmp_path)))
        model.init_weights(torch.Generator().manual_seed(0), std=0.05)
        save_model(model, str(folder))
    return load_model(str(folder), device)


def make_group(shape, G=8, P=40, T=60):
    """A group of random tokens, whose first row is right."""
    generator = torch.Generator().manual_seed(1)

    def draw(*size):
        return torch.randint(0, shape["vocab_size"], size, generator=generator)

    lengths = torch.randint(1, T + 1, (G,), generator=generator)
    rewards = torch.tensor([1.0] + [0.0] * (G - 1))
    return Group(
        prompt=draw(P),
        responses=draw(G, T),
        lengths=lengths,
        finished=torch.ones(G, dtype=torch.bool),
        logprobs=torch.zeros(G, T),
        correct=rewards == 1,
        rewards=rewards,
        is_gold=torch.zeros(G, dtype=torch.bool))


def logprobs_of(model, group, temperature):
    """(G, T), computed where the model is."""
    to = model.device
    prompt, responses, lengths = group.prompt.to(to), group.responses.to(to), group.lengths.to(to)
    return token_logprobs(model, prompt, responses, temperature, lengths)[0]


@pytest.mark.parametrize("heads, d", [((9, 3), 64), ((12, 2), 128), ((4, 2), 16)])
def test_flash_computes_what_the_loop_computes(heads, d):
    """The kernel's outputs and gradients are those of a plain loop over rows in fp32, up to the
    rounding of bf16: rows of any lengths, more keys than queries, and keys that are not used. (Bug:
    an operator whose arguments mean something else in this version of PyTorch.)"""
    H, K = heads
    generator = torch.Generator().manual_seed(0)
    queries = laid_end_to_end(torch.tensor([3, 1, 130, 17]))
    keys = laid_end_to_end(torch.tensor([3, 40, 200, 18]))

    def both_ways(*arguments, used=None):
        """Outputs and gradients, (loop, kernel)."""
        drawn = [torch.randn(n, h, d, generator=generator)
                 for n, h in zip(arguments, (H, K, K))]
        results = []
        for device in ("cpu", "cuda"):
            f, dtype = flash, torch.bfloat16
            if device == "cpu":
                f, dtype = flash_by_loop, torch.float32
            q, k, v = (x.to(device, dtype).requires_grad_() for x in drawn)
            rows = [Spans(r.starts.to(device), r.longest) for r in (queries, keys)]
            out = f(q, k, v, *rows, used if used is None else used.to(device))
            grads = torch.autograd.grad(out.square().sum(), (q, k, v)) if used is None else ()
            results.append([x.detach().float().cpu() for x in (out, *grads)])
        return results

    for exact, ours in zip(*both_ways(151, 261, 261)):
        assert (ours - exact).norm() < 0.02 * exact.norm()
    # One token of each row, as the sampler asks
    queries = Spans(torch.arange(5).int(), 1)
    keys = Spans((torch.arange(5) * 60).int(), 60)
    [exact], [ours] = both_ways(4, 240, 240, used=torch.tensor([1, 60, 33, 7]).int())
    assert (ours - exact).norm() < 0.02 * exact.norm()


@SHAPES
def test_logprobs_equal_the_cpu(tmp_path, shape):
    """Log-probabilities are those of the CPU: in fp32 to 1e-3, in bf16 to its rounding. (Bug: a
    kernel that computes something else on a GPU.)"""
    group = make_group(shape)
    gpu = make_model(tmp_path, shape, "cuda")
    with torch.no_grad():
        exact = logprobs_of(make_model(tmp_path, shape), group, 0.7)[group.mask]
        fp32 = logprobs_of(gpu, group, 0.7).cpu()[group.mask]
        bf16 = logprobs_of(make_policy(gpu, torch.bfloat16), group, 0.7).cpu()[group.mask]
    assert (fp32 - exact).abs().max() < 1e-3
    # SmolLM2's shape, at random weights of this size, is off by 0.1 in bf16 on a CPU too.
    assert (bf16 - exact).abs().mean() < (0.2 if shape is SMOLLM2_135M else 0.05)


@SHAPES
def test_gradient_points_where_the_cpu_gradient_points(tmp_path, shape):
    """One update in bf16 on the GPU moves the weights where fp32 on the CPU moves them. (Bug: a
    backward pass that differs.)"""
    item = Item(0, None, make_group(shape), torch.tensor([2.0] + [-0.3] * 7))
    moves = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        master = make_model(tmp_path, shape, device)
        before = weights_of(master)
        run = Run(
            config=Config(max_grad_norm=1.0),
            algorithm=ALGORITHMS["gcpo"],
            master=master,
            policy=make_policy(master, dtype),
            optimizer=torch.optim.SGD(master.parameters(), lr=1.0))
        update(run, [item])
        moves.append((weights_of(master) - before).cpu())
    a, b = (move.double() for move in moves)    # in fp32 135 M products add up to over 1
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.98


@SHAPES
def test_sampled_logprobs_are_the_trainers(tmp_path, shape):
    """What the sampler says of its tokens in fp32, the trainer says too, and a row ends with its
    first stop token. (Bug: a cache that reads wrong places. The sampler asks the GPU only now and
    then whether rows have ended.)"""
    model = make_model(tmp_path, shape, "cuda")
    prompts = [torch.arange(1, n) for n in (5, 30, 12)]
    stop_ids = [3, 7, 11, 13]
    for group in sample(model, prompts, 8, 50, temperature=0.8, stop_ids=stop_ids, seed=0):
        difference = logprobs_of(model, group, 0.8).cpu() - group.logprobs
        assert difference[group.mask].abs().max() < 1e-3
        stops = torch.isin(group.responses, torch.tensor(stop_ids)) & group.mask
        assert torch.equal(stops.sum(1) == 1, group.finished)
        assert (stops.sum(1) <= 1).all()


@SHAPES
def test_sampled_logprobs_are_the_trainers_in_bf16(tmp_path, shape):
    """In bf16, too, sampler and trainer agree, up to rounding: the mean difference is no more than
    twice that between the trainer's bf16 and its fp32. (Bug: a cache of rows that reads another
    row, or columns beyond its end.)"""
    model = make_model(tmp_path, shape, "cuda")
    policy = make_policy(model, torch.bfloat16)
    assert has_flash(policy)
    prompts = [torch.arange(1, n) for n in (5, 30, 12, 100)]
    groups = sample(policy, prompts, 8, 50, temperature=0.8, stop_ids=[3, 7, 11], seed=0,
                    max_rows=16)
    for group in groups:
        ours = logprobs_of(policy, group, 0.8).cpu()[group.mask]
        rounding = (ours - logprobs_of(model, group, 0.8).cpu()[group.mask]).abs().mean()
        assert (ours - group.logprobs[group.mask]).abs().mean() < 2 * rounding


@SHAPES
def test_recorded_steps_equal_plain_ones(tmp_path, shape, monkeypatch):
    """Sampling says the same with and without recorded steps, while rows leave, prompts enter and
    prompts of other lengths come. (Bug: a CUDA graph that reads tensors that have moved.)"""
    model = make_model(tmp_path, shape, "cuda")
    prompts = [torch.arange(1, n) for n in (5, 30, 12, 200, 3)]
    stop_ids = list(range(0, shape["vocab_size"], 150))

    def rows(policy):
        groups = sample(policy, prompts, 8, 150, stop_ids=stop_ids, seed=0, max_rows=24)
        return [(group.responses.tolist(), group.logprobs.tolist()) for group in groups]

    policies = [model, make_policy(model, torch.bfloat16)]
    recorded = [rows(policy) for policy in policies]
    plainly = []

    def run_plainly(recorder, step, size):
        plainly.append(size)
        step(size)

    monkeypatch.setattr(StepRecorder, "run", run_plainly)
    assert [rows(policy) for policy in policies] == recorded
    assert len(plainly) > 100


def test_gradient_checkpointing_changes_nothing(tmp_path):
    """The gradient is the same with gradient checkpointing. (Bug: a block that is run again with
    something else.)"""
    group = make_group(TINY)
    gradients = []
    for again in (False, True):
        model = make_model(tmp_path, TINY, "cuda")
        model.gradient_checkpointing = again
        logprobs_of(model, group, 1.0)[group.mask.cuda()].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99999


def test_toy_learns(tmp_path):
    """On a GPU, too, the toy solves at least 90 % of the held-out problems. (Bug: a GPU run that
    trains less well than a CPU run.)"""
    out = train_with("--device", "cuda", "--out", str(tmp_path / "toy"))
    assert metrics_of(out)[-1]["eval/mean"] >= 0.9
    assert os.path.isdir(os.path.join(out, "model"))
