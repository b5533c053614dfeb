"""Low-rank training: gradients, merging, saving and going on, against autograd, transformers and
full runs.
"""
import json
import os
import shutil

import pytest
import torch
from helpers import LLAMA, relative, tiny_model
from test_train import metrics_of, train_with
from transformers import AutoModelForCausalLM

from logprobs import token_logprobs
from model import load_model, save_model
from support.common import InputError
from support.lora import LowRankMaster
from support.options import parse_flags
from support.policy import refresh_policy


RANK, ALPHA = 3, 5.0


@pytest.fixture
def pair(tmp_path):
    """A policy in fp64 and its low-rank master, some way from the start."""
    policy = tiny_model(tmp_path, {**LLAMA, "attention_bias": True}).double()
    master = LowRankMaster(policy, RANK, ALPHA, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in master.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    refresh_policy(policy, master)
    return policy, master


def some_loss(model):
    generator = torch.Generator().manual_seed(2)
    prompt = torch.randint(LLAMA["vocab_size"], (5,), generator=generator)
    responses = torch.randint(LLAMA["vocab_size"], (4, 7), generator=generator)
    return token_logprobs(model, prompt, responses)[0].square().sum()


def test_it_starts_as_the_model_it_was_given(tmp_path):
    """B is 0, so that the first policy is the model itself. (Bug: noise added to a good model.)"""
    policy = tiny_model(tmp_path, LLAMA)
    before = [p.clone() for p in policy.parameters()]
    refresh_policy(policy, LowRankMaster(policy, RANK, ALPHA, seed=0))
    assert all(torch.equal(p, old) for p, old in zip(policy.parameters(), before))


def test_mapped_gradient_is_autograds(pair):
    """The gradients of A and B are those of autograd through W0 + (α / r) · B A, and two passes add
    up. Nothing else gets a gradient. (Bug: a scale that is left out, or put in twice.)"""
    policy, master = pair
    some_loss(policy).backward()
    some_loss(policy).backward()
    mapped = {name: p.grad / 2 for name, p in master.named_parameters()}
    assert all(p.grad is None for p in policy.parameters())

    wanted = {}
    weights = dict(policy.named_parameters())
    for name, matrix in master.matrices.items():
        a, b = (x.detach().clone().requires_grad_() for x in (matrix.A, matrix.B))
        wanted[f"matrices.{name}.A"], wanted[f"matrices.{name}.B"] = a, b
        weights[f"layers.{name.replace('/', '.')}.weight"] = (
            matrix.frozen + ALPHA / RANK * (b @ a))

    class WithWeights(torch.nn.Module):
        """The policy with other tensors in its parameters' places."""
        config = policy.config
        device = policy.device
        dtype = policy.dtype
        compute_dtype = None
        output_weight = policy.output_weight

        def forward(self, *args, **kwargs):
            return torch.func.functional_call(policy, weights, args, kwargs)

    some_loss(WithWeights()).backward()
    assert wanted.keys() == mapped.keys()
    for name, leaf in wanted.items():
        assert (mapped[name] - leaf.grad).norm() < 1e-12 * leaf.grad.norm(), name


def test_saved_folder_is_an_ordinary_model(pair, tmp_path):
    """transformers reads what is saved, and gives the policy's logits. (Bug: W0 saved, or A and B
    that nobody else knows of.)"""
    policy = pair[0].float()
    save_model(policy, str(tmp_path / "saved"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert relative(policy.logits(policy(tokens)), theirs(tokens).logits) < 1e-5


FLAGS = ["--steps", "4", "--save-every", "2", "--lora-rank", "4", "--lr", "5e-3", "--threads", "1",
         "--eval-limit", "4", "--lr-end", "1"]


def test_a_run_and_its_rest(tmp_path):
    """A run of low rank moves the model; resumed from its middle it ends with the same weights, to
    the bit; and what is saved is what the checkpoint holds. (Bug: A and B begun anew.)"""
    out = train_with(*FLAGS, "--out", str(tmp_path / "run"))
    rows = metrics_of(out)[1:]
    assert all(row["update/grad_norm"] > 0 for row in rows)
    assert rows[-1]["update/bf16_changed"] > 0
    with open(os.path.join(out, "run.json")) as f:
        record = json.load(f)
    assert record["trained_parameters"] < record["parameters"] / 4
    model = load_model(os.path.join(out, "model"))

    half = train_with(*FLAGS, "--out", str(tmp_path / "half"), "--steps", "2")
    rest = str(tmp_path / "rest")    # a copy, as this process still holds the lock of the first
    shutil.copytree(half, rest)
    train_with(*FLAGS, "--out", rest, "--resume")
    again = load_model(os.path.join(rest, "model"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    last = load_model(os.path.join(out, "checkpoints", "step-000004", "model"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), last.parameters()))


def test_rate_and_refusals():
    """The default rate is low rank's own; --shard, and a rank below 0, are refused in one line."""
    assert parse_flags(["--lora-rank", "4"])[0].lr == 1e-4
    assert parse_flags(["--lora-rank", "4", "--lr", "3e-4"])[0].lr == 3e-4
    for flags in (["--lora-rank", "4", "--shard"], ["--lora-rank", "-1"], ["--lora-alpha", "nan"]):
        with pytest.raises(InputError):
            parse_flags(flags)
