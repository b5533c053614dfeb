"""The loss beside TRL's own, on random rows. Skipped without TRL 1.16:

    pip install "trl==1.16.*"
    python -m pytest tests/test_peers.py

TRL's loss is a method of its trainer. It is called here on a stand-in that has the settings and
hands it our logprobs. The golden numbers of test_gcpo.py come out of it in the same way.
"""
import importlib.metadata
import importlib.util
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch

from gcpo import ALGORITHMS, Algorithm, policy_loss


def trl_is_there():
    if importlib.util.find_spec("trl") is None:
        return False
    return importlib.metadata.version("trl").startswith("1.16.")


if not trl_is_there():
    pytest.skip("needs trl 1.16", allow_module_level=True)
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402


LOSS_TYPES = {"row_mean": "grpo", "token_mean": "dapo", "fixed_length": "dr_grpo"}


def trl_loss(algorithm, new, old, ref, advantages, mask, max_new_tokens):
    """What TRL makes of our logprobs, (N, T) each."""
    loss_type, epsilon_high = LOSS_TYPES[algorithm.aggregation], algorithm.clip_high
    if algorithm.objective == "cispo":    # there epsilon_high is the bound, not the way above 1
        loss_type, epsilon_high = "cispo", 1 + algorithm.clip_high
    trainer = MagicMock()
    settings = dict(
        importance_sampling_level=algorithm.level,
        epsilon_low=algorithm.clip_low,
        epsilon_high=epsilon_high,
        beta=algorithm.kl_coef,
        loss_type=loss_type,
        max_completion_length=max_new_tokens,
        current_gradient_accumulation_steps=1,
        # What we do not have is switched off.
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False)
    for name, value in settings.items():
        setattr(trainer, name, value)
    trainer.args.delta = None
    trainer.args.use_bias_correction_kl = False
    trainer.args.steps_per_generation = 1
    trainer.accelerator.num_processes = 1
    trainer.accelerator.gather = lambda x: x
    trainer.model.training = True

    def our_logprobs(*args, **more):
        return new, torch.zeros_like(new), None

    trainer._get_per_token_logps_and_entropies = our_logprobs
    ids = torch.zeros_like(mask, dtype=torch.int64)
    inputs = dict(
        prompt_ids=ids[:, :1],
        prompt_mask=ids[:, :1] + 1,
        completion_ids=ids,
        completion_mask=mask.int(),
        advantages=advantages,
        old_per_token_logps=old,
        ref_per_token_logps=ref,
        num_items_in_batch=mask.sum())
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("aggregation", LOSS_TYPES)
@pytest.mark.parametrize("level, low, high", [
    ("token", 0.2, 0.2),
    ("token", 0.2, 0.28),
    ("sequence", 3e-4, 4e-4),
    ("sequence", 0.2, 0.28)])
@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
def test_loss_and_gradient_equal_trls(aggregation, level, low, high, kl_coef):
    """Loss and gradient are TRL's, for every ratio, clip range and denominator, with and without
    KL. (Bug: any other loss.)"""
    assert_equal_to_trls(Algorithm(
        "test", level=level, clip_low=low, clip_high=high, aggregation=aggregation,
        kl_coef=kl_coef))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("high", [0.0, 0.2, 4.0])
@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
def test_cispo_equals_trls(level, high, kl_coef):
    """CISPO's loss and gradient are TRL's, whatever the bound, with and without KL."""
    assert_equal_to_trls(replace(
        ALGORITHMS["cispo"], level=level, clip_high=high, kl_coef=kl_coef))


def assert_equal_to_trls(algorithm):
    """On 20 batches of 8 random rows, in fp64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    for _ in range(20):
        lengths = torch.randint(1, 10, (8, 1), generator=generator)
        mask = torch.arange(9) < lengths
        old = -draw(8, 9).abs()
        ref = old + 0.3 * draw(8, 9)
        advantages = draw(8)
        new = (old + 0.3 * draw(8, 9)).requires_grad_()
        ours, _ = policy_loss(
            new, old, advantages, mask, algorithm,
            total_rows=8,
            total_tokens=int(mask.sum()),
            max_new_tokens=12,
            ref_logprobs=ref)
        theirs = trl_loss(algorithm, new, old, ref, advantages, mask, 12)
        assert torch.allclose(ours, theirs, rtol=1e-12)
        our_gradient, = torch.autograd.grad(ours, new)
        their_gradient, = torch.autograd.grad(theirs, new)
        assert torch.allclose(our_gradient, their_gradient, rtol=1e-10, atol=1e-14)
