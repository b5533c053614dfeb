"""On a GPU: the same code in bf16 against the CPU, and the toy to the same acceptance. Skipped where there is none."""
import json
import os

import pytest
import torch
from test_train import metrics_of, run

import sampler
from gcpo import ALGORITHMS, Group
from logprobs import token_logprobs
from model import Transformer, load_model, read_config, save_model
from sampler import sample
from support.options import Config
from train import Item, make_policy, update


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

TINY = dict(model_type="llama", vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True)
SMOLLM2_135M = dict(model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                    num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True)
SHAPES = pytest.mark.parametrize("shape", [TINY, SMOLLM2_135M], ids=["tiny", "SmolLM2-135M"])


def make(tmp_path, shape, device="cpu"):
    """The same random model on either device, through a real folder."""
    folder = tmp_path / "model"
    if not folder.exists():
        (tmp_path / "config.json").write_text(json.dumps(shape))
        save_model(Transformer(read_config(str(tmp_path))).init_weights(torch.Generator().manual_seed(0), std=0.05), str(folder))
    return load_model(str(folder), device)


def group_for(shape, G=8, P=40, T=60):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *size: torch.randint(0, shape["vocab_size"], size, generator=generator)
    lengths = torch.randint(1, T + 1, (G,), generator=generator)
    rewards = torch.tensor([1.0] + [0.0] * (G - 1))
    return Group(draw(P), draw(G, T), lengths, torch.ones(G, dtype=torch.bool), torch.zeros(G, T), rewards == 1, rewards, torch.zeros(G, dtype=torch.bool))


@SHAPES
def test_logprobs_equal_the_cpu(tmp_path, shape):
    """Forbids a kernel that computes something else on a GPU: fp32 to 1e-3, bf16 to its rounding."""
    group = group_for(shape)
    cpu, gpu = make(tmp_path, shape), make(tmp_path, shape, "cuda")
    move = lambda m: token_logprobs(m, group.prompt.to("cuda"), group.responses.to("cuda"), 0.7, group.lengths.to("cuda"))[0].cpu()[group.mask]
    with torch.no_grad():
        exact = token_logprobs(cpu, group.prompt, group.responses, 0.7, group.lengths)[0][group.mask]
        assert (move(gpu) - exact).abs().max() < 1e-3
        assert (move(make_policy(gpu, torch.bfloat16)) - exact).abs().mean() < 0.05


@SHAPES
def test_gradient_points_where_the_cpu_gradient_points(tmp_path, shape):
    """Forbids a backward pass that differs: the step of one update in bf16 on the GPU against fp32 on the CPU."""
    group, steps = group_for(shape), []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        model = make(tmp_path, shape, device)
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        item = Item(0, None, group, torch.tensor([2.0] + [-0.3] * 7))
        update(model, make_policy(model, dtype), torch.optim.SGD(model.parameters(), lr=1.0), [item], ALGORITHMS["gcpo"], Config(max_grad_norm=1.0))
        steps.append((torch.cat([p.detach().flatten() for p in model.parameters()]) - before).cpu())
    assert torch.nn.functional.cosine_similarity(*steps, dim=0) > 0.98


@SHAPES
def test_sampled_logprobs_are_the_trainers(tmp_path, shape):
    """Forbids a cache that reads wrong places: what the sampler says of its tokens in fp32, the trainer says too, though
    it asks the GPU only now and then whether rows have ended."""
    model = make(tmp_path, shape, "cuda")
    prompts = [torch.arange(1, n) for n in (5, 30, 12)]
    for group in sample(model, prompts, 8, 50, temperature=0.8, stop_ids=[3, 7, 11, 13], seed=0):
        logprobs, _ = token_logprobs(model, group.prompt.cuda(), group.responses.cuda(), 0.8, group.lengths.cuda())
        assert (logprobs.cpu() - group.logprobs)[group.mask].abs().max() < 1e-3
        stops = torch.isin(group.responses, torch.tensor([3, 7, 11, 13])) & group.mask
        assert torch.equal(stops.sum(1) == 1, group.finished) and (stops.sum(1) <= 1).all()


@SHAPES
def test_recorded_steps_equal_plain_ones(tmp_path, shape, monkeypatch):
    """Forbids a CUDA graph that reads tensors that have moved: tokens and logprobs with and without, while rows leave,
    prompts enter and caches grow. In fp32 a token in a hundred thousand may fall on the other side of its interval."""
    model, prompts = make(tmp_path, shape, "cuda"), [torch.arange(1, n) for n in (5, 30, 12, 200, 3)]
    run_it = lambda: sample(model, prompts, 8, 300, stop_ids=list(range(0, shape["vocab_size"], 150)), seed=0, max_rows=24)
    recorded = run_it()
    init = sampler.Batch.__init__

    def without(batch, *args):
        init(batch, *args)
        batch.pool = None
    monkeypatch.setattr(sampler.Batch, "__init__", without)
    rows = lambda groups: [ids[:n].tolist() for g in groups for ids, n in zip(g.responses, g.lengths.tolist())]
    same = [a == b for a, b in zip(rows(recorded), rows(run_it()), strict=True)]
    assert sum(same) >= len(same) - 1


def test_gradient_checkpointing_changes_nothing(tmp_path):
    """Forbids a block that is run again with something else."""
    group, results = group_for(TINY), []
    for again in (False, True):
        model = make(tmp_path, TINY, "cuda")
        model.gradient_checkpointing = again
        token_logprobs(model, group.prompt.cuda(), group.responses.cuda(), 1.0, group.lengths.cuda())[0][group.mask.cuda()].sum().backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.nn.functional.cosine_similarity(*results, dim=0) > 0.99999


def test_toy_learns(tmp_path):
    """Forbids a GPU run that trains less well than a CPU run: at least 90 % of the held-out problems."""
    out = run("--device", "cuda", "--out", str(tmp_path / "toy"))
    assert metrics_of(out)[-1]["eval/mean"] >= 0.9 and os.path.isdir(os.path.join(out, "model"))
