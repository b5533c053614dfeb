"""What gcpo.py promises, each promise against numbers of others, a published formula, or the plain way of computing it. Meant to be read.

Every test forbids one bug of the kinds found in published code; its docstring says which. The heavy tests
(transformers' logits, samplers, broken files, whole runs) live in tests/.

    python -m pytest            all of them
    python -m pytest test_gcpo.py
"""
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

from gcpo import ALGORITHMS, Algorithm, Group, gold_group, group_advantages, kl_estimate, log_ratio, overlong_penalty, pair_loss, policy_loss, substitute_gold
from logprobs import token_logprobs
from model import Transformer, read_config
from support.options import Config
from train import Item, make_policy, update


torch.set_num_threads(1)  # the tensors are tiny: a second thread would only wait
NAN = float("nan")

# The hand-made group of the golden numbers: two rows, three tokens and two.
OLD = torch.tensor([[-0.5, -1.0, -2.0], [-0.3, -0.7, NAN]])
NEW = torch.tensor([[-0.4, -1.2, -1.5], [-0.2, -1.0, NAN]])
REF = torch.tensor([[-0.6, -0.9, -2.2], [-0.1, -0.8, NAN]])
MASK = torch.tensor([[True, True, True], [True, True, False]])
ADVANTAGES = torch.tensor([2.0, -1.0])
TOTALS = dict(total_rows=2, total_tokens=5, max_new_tokens=4)


def loss_of(algorithm, new=NEW, old=OLD, advantages=ADVANTAGES, mask=MASK, **more):
    return policy_loss(new, old, advantages, mask, algorithm, **{**TOTALS, **more})[0]


def gradient_of(algorithm, new=NEW, old=OLD, **more):
    """dL/dlogprobs, (G, T)."""
    new = new.clone().requires_grad_()
    loss = loss_of(algorithm, new, new.detach() if old is None else old, **more)
    return torch.autograd.grad(loss, new)[0]


def with_kl(name):
    """The preset with everything the loss can hold: a KL penalty too, but for DPO, which has its reference elsewhere."""
    return replace(ALGORITHMS[name], kl_coef=0.1 * (ALGORITHMS[name].objective == "clipped"))


# ---------------------------------------------------------------------------------------------------------------------
# The loss against numbers of others

@pytest.mark.parametrize("level, low, high, row_mean, token_mean, fixed_length", [
    ("token", 0.2, 0.2, -0.565008, -0.868526, -0.542829),
    ("token", 0.2, 0.28, -0.591674, -0.900526, -0.562829),
    ("sequence", 3e-4, 4e-4, -0.500550, -0.800600, -0.500375),
    ("sequence", 0.2, 0.28, -0.690212, -1.009222, -0.630764)])
def test_loss_equals_the_golden_numbers(level, low, high, row_mean, token_mean, fixed_length):
    """Forbids any deviation from what TRL 1.16's loss returns for every ratio, clip range and denominator; a padded
    token that counts (its logprobs here are NaN); and, at the sequence level, exp(sum) in place of exp(mean)."""
    for aggregation, expected in (("row_mean", row_mean), ("token_mean", token_mean), ("fixed_length", fixed_length)):
        algorithm = Algorithm("test", level=level, clip_low=low, clip_high=high, aggregation=aggregation)
        assert loss_of(algorithm).item() == pytest.approx(expected, abs=1e-6)


def test_sequence_ratio_is_the_geometric_mean():
    """Forbids a ratio that grows with the length of the response."""
    ratio = log_ratio(NEW, OLD, MASK, "sequence").exp()
    assert ratio[0].tolist() == pytest.approx([1.14263081] * 3) and ratio[1, :2].tolist() == pytest.approx([0.90483742] * 2)


def test_shaped_gold_equals_luffy():
    """Forbids a shaped gold that is clipped, or taken at the sequence's ratio: every token is p / (p + 0.1), p = π_θ."""
    is_gold = torch.ones(2, dtype=torch.bool)
    for level in ("token", "sequence"):
        algorithm = replace(ALGORITHMS["luffy"], level=level)
        assert loss_of(algorithm, is_gold=is_gold).item() == pytest.approx(-0.589097, abs=1e-6)
        assert loss_of(algorithm, old=torch.full_like(OLD, NAN), is_gold=is_gold).item() == pytest.approx(-0.589097, abs=1e-6)


def test_kl_penalty_equals_the_golden_numbers():
    """Forbids a penalty with another denominator than the loss it belongs to."""
    per_token = kl_estimate(NEW, REF)[MASK]
    assert per_token.tolist() == pytest.approx([0.018731, 0.049859, 0.196585, 0.005171, 0.021403], abs=1e-6)
    with_kl, without = (loss_of(replace(ALGORITHMS["grpo"], kl_coef=c), ref_logprobs=REF) for c in (0.5, 0.0))
    assert (with_kl - without).item() == pytest.approx(0.5 * 0.050839, abs=1e-6)


def test_pair_loss_is_dpo_s():
    """Forbids means over tokens where DPO sums, pairs of two right responses, and the reference left out: against the formula
    written out pair by pair, and at the start model itself log 2, whatever the responses."""
    generator = torch.Generator().manual_seed(0)
    new, ref = -torch.rand(4, 5, dtype=torch.float64, generator=generator), -torch.rand(4, 5, dtype=torch.float64, generator=generator)
    mask, advantages = torch.arange(5) < torch.tensor([[5], [2], [3], [1]]), group_advantages(torch.tensor([1.0, 0.0, 1.0, 0.0]))
    margin = [sum(float(new[i, t] - ref[i, t]) for t in range(5) if mask[i, t]) for i in range(4)]
    pairs = [-math.log(1 / (1 + math.exp(-0.1 * (margin[i] - margin[j])))) for i in (0, 2) for j in (1, 3)]
    assert pair_loss(new, ref, advantages, mask, 0.1).item() == pytest.approx(sum(pairs) / 4, rel=1e-12)
    assert pair_loss(ref, ref, advantages, mask, 0.1).item() == pytest.approx(math.log(2), rel=1e-12)
    loss = policy_loss(new, new, advantages, mask, ALGORITHMS["dpo"], total_rows=8, total_tokens=99, ref_logprobs=ref)[0]
    assert loss.item() == pytest.approx(sum(pairs) / 4 / 2, rel=1e-12)      # the other of two groups has no pair and counts as 0


def test_overlong_penalty():
    """Forbids a slope that begins or ends elsewhere than DAPO's, and a penalty where none is asked for."""
    lengths = torch.tensor([1, 80, 85, 90, 100])
    assert overlong_penalty(lengths, 100, 0.2).tolist() == pytest.approx([0, 0, -0.25, -0.5, -1])
    assert overlong_penalty(lengths, 100, 0.0).abs().max() == 0
    assert overlong_penalty(lengths, 100, 1.0).tolist() == pytest.approx([-0.01, -0.8, -0.85, -0.9, -1])


def test_kl_estimate_is_the_kl_divergence():
    """Forbids k3 the wrong way round: its mean under π_θ is KL(π_θ ‖ π_ref), here summed over all of a 50-way softmax."""
    policy, ref = (torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(i)).log_softmax(0) for i in (1, 2))
    exact = (policy.exp() * (policy - ref)).sum()
    assert torch.isclose((policy.exp() * kl_estimate(policy, ref)).sum(), exact, rtol=1e-12)
    assert not torch.isclose((policy.exp() * kl_estimate(ref, policy)).sum(), exact, rtol=1e-3)


@pytest.mark.parametrize("name", [n for n in ALGORITHMS])
def test_gradient_equals_finite_differences(name):
    """Forbids a gradient that is not the loss's: something detached, or a branch that only the gradient takes. (That the loss is right,
    the golden numbers say.)"""
    algorithm = with_kl(name)
    generator = torch.Generator().manual_seed(3)
    old = -torch.rand(3, 4, dtype=torch.float64, generator=generator) * 3
    new = old + 0.5 * torch.randn(3, 4, dtype=torch.float64, generator=generator)
    more = dict(old=old, advantages=torch.tensor([1.3, -0.4, -0.9], dtype=torch.float64), mask=torch.arange(4) < torch.tensor([[4], [2], [3]]),
                is_gold=torch.tensor([True, False, False]), ref_logprobs=old - 0.1)
    analytic, step = gradient_of(algorithm, new, **more), 1e-6
    for i, t in itertools.product(range(3), range(4)):
        nudge = torch.zeros_like(new)
        nudge[i, t] = step
        numeric = (loss_of(algorithm, new + nudge, **more) - loss_of(algorithm, new - nudge, **more)) / (2 * step)
        assert analytic[i, t].item() == pytest.approx(numeric.item(), abs=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# Advantages

@pytest.mark.parametrize("size, right, without_eps, no_std", [(4, 1.49970, 1.5, 0.75), (8, 2.47417, 2.4749, 0.875), (16, 3.74850, 3.75, 0.9375)])
def test_advantage_of_a_lone_right_answer(size, right, without_eps, no_std):
    """Forbids the other standard deviation (ddof 0 gives 2.6458 for G = 8) and another epsilon."""
    rewards = torch.zeros(size)
    rewards[1] = 1
    advantages = group_advantages(rewards)
    assert advantages[1].item() == pytest.approx(right, abs=1e-5)
    assert advantages[0].item() == pytest.approx(-right / (size - 1), abs=1e-5)
    assert group_advantages(rewards, "none").tolist() == pytest.approx([-1 / size] + [no_std] + [-1 / size] * (size - 2))
    assert advantages[1].item() < without_eps


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.3, 1 / 3, -0.7])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 16])
def test_equal_rewards_give_no_advantage(reward, size):
    """Forbids noise advantages: the mean of eight times 0.1 is not 0.1 in fp32, and divided by a standard deviation of
    almost nothing the difference becomes a gradient."""
    for scale in ("std", "none"):
        assert group_advantages(torch.full((size,), reward), scale).tolist() == [0.0] * size


# ---------------------------------------------------------------------------------------------------------------------
# Masks, padding, batching

def test_mask_counts_the_end_token_even_if_it_is_the_pad_token():
    """Forbids a mask made by comparing with the pad or end token: token 0 is end, pad and an ordinary token here."""
    responses = torch.tensor([[5, 0, 7, 0], [0, 0, 0, 0]])
    group = Group(torch.tensor([0, 0]), responses, torch.tensor([4, 1]), None, None, None, None, None)
    assert group.mask.tolist() == [[True] * 4, [True, False, False, False]]


@pytest.mark.parametrize("name", list(ALGORITHMS))
@pytest.mark.parametrize("poison", [NAN, float("inf"), -1e30])
def test_padding_never_reaches_loss_or_gradient(name, poison):
    """Forbids 0 · NaN: whatever stands in the padding, values and gradients are those of the narrow group."""
    algorithm = with_kl(name)
    is_gold = torch.tensor([True, False])
    wide = lambda x: torch.cat([torch.where(MASK, x, poison), torch.full((2, 3), poison)], dim=1)
    mask = torch.cat([MASK, torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    clean = lambda x: torch.where(MASK, x, 0.0)
    narrow = dict(new=clean(NEW), old=clean(OLD), ref_logprobs=clean(REF), is_gold=is_gold)
    padded = dict(new=wide(NEW), old=wide(OLD), ref_logprobs=wide(REF), is_gold=is_gold, mask=mask)
    assert loss_of(algorithm, **padded).item() == pytest.approx(loss_of(algorithm, **narrow).item(), rel=1e-6)
    gradient = gradient_of(algorithm, **padded)
    assert torch.allclose(gradient[:, :3], gradient_of(algorithm, **narrow), rtol=1e-6) and not gradient[~mask].any()


@pytest.mark.parametrize("name", [name for name, a in ALGORITHMS.items() if a.objective == "clipped"])
def test_parts_of_a_step_add_up(name):
    """Forbids a loss normalised per micro-batch: row by row, in any order, with the step's totals, loss and metric sums
    add up to those of the whole; and the order of rows does not matter."""
    algorithm, order = ALGORITHMS[name], [1, 0]
    whole, sums = policy_loss(NEW, OLD, ADVANTAGES, MASK, algorithm, **TOTALS)
    parts = [policy_loss(NEW[[i]], OLD[[i]], ADVANTAGES[[i]], MASK[[i]], algorithm, **TOTALS) for i in order]
    assert sum(p[0] for p in parts).item() == pytest.approx(whole.item(), rel=1e-6)
    for key, value in sums.items():
        assert sum(p[1][key] for p in parts).item() == pytest.approx(value.item(), rel=1e-6, abs=1e-7)
    shuffled = loss_of(algorithm, NEW[order], OLD[order], ADVANTAGES[order], MASK[order])
    assert shuffled.item() == pytest.approx(whole.item(), rel=1e-6)


def test_row_mean_weighs_rows_not_tokens():
    """Forbids a (G, 1) sequence loss broadcast by the mask, which weighs a row by its length: at ratio 1, one long row
    and one short row with opposite advantages cancel exactly."""
    mask = torch.arange(50) < torch.tensor([[50], [2]])
    logprobs = torch.full((2, 50), -1.0)
    gradient = gradient_of(ALGORITHMS["gspo"], logprobs, None, advantages=torch.tensor([1.0, -1.0]), mask=mask)
    assert gradient.sum(1).tolist() == pytest.approx([-0.5, 0.5])
    assert loss_of(ALGORITHMS["gspo"], logprobs, logprobs, torch.tensor([1.0, -1.0]), mask).item() == pytest.approx(0, abs=1e-7)


def test_metric_sums_of_a_hand_made_group():
    """Forbids metrics averaged over the wrong thing: the gold apart from the policy's own tokens, clip fractions of
    tokens without gradient only. Row 0 is gold with ratio 1.1426 > 1.1; row 1 has A < 0 and ratio 0.9048 < 0.95."""
    algorithm = replace(ALGORITHMS["gcpo"], clip_low=0.05, clip_high=0.05, gold_clip=0.1)
    _, sums = policy_loss(NEW, OLD, ADVANTAGES, MASK, algorithm, is_gold=torch.tensor([True, False]), **TOTALS)
    values = {name: value.item() for name, value in sums.items()}
    k3 = lambda d: math.exp(d) - d - 1
    assert values == pytest.approx({
        "policy_tokens": 2, "policy_ratio": 2 * 0.90483742, "policy_clipped": 2, "approx_kl": k3(0.1) + k3(-0.3),
        "gold_tokens": 3, "gold_ratio": 3 * 1.14263081, "gold_clipped": 3, "gold_logprob": -3.1}, rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The switches: each changes what it names, and nothing else

GOLD_FIRST = torch.tensor([True, False])
ONE_CHANGE = [  # switch, value, rows whose gradient changes (row 0 is gold, A > 0; row 1 is not, A < 0)
    ("gold_old", "one", [0]), ("gold_clip", 1e-3, [0]), ("clip_low", 3e-4, [1]), ("clip_high", 0.3, []), ("level", "token", [0, 1]),
    ("aggregation", "token_mean", [0, 1]), ("aggregation", "fixed_length", [0, 1]), ("kl_coef", 0.1, [1]),
    ("scale", "none", []), ("gold_when", "never", []), ("gold_slot", "first", [])]


@pytest.mark.parametrize("switch, value, changed", ONE_CHANGE)
def test_a_switch_changes_what_it_names_and_nothing_else(switch, value, changed):
    """Forbids a switch without effect, and one that leaks into rows it does not name (a clip range that reaches the
    gold). The data-side switches (scale, gold_when, gold_slot) do not touch the loss at all."""
    gcpo = replace(ALGORITHMS["gcpo"], clip_low=0.2)  # wide enough that both rows have a gradient
    base, other = (gradient_of(a, is_gold=GOLD_FIRST, ref_logprobs=REF) for a in (gcpo, replace(gcpo, **{switch: value})))
    assert [row for row in (0, 1) if not torch.equal(base[row], other[row])] == changed


def test_clip_high_acts_on_good_rollouts():
    """Forbids an upper clip that spares the policy's own good rows: here row 0 is no gold."""
    clipped, open_ = (gradient_of(replace(ALGORITHMS["gcpo"], clip_high=c)) for c in (4e-4, 0.3))
    assert not clipped[0].any() and open_[0].all() and torch.equal(clipped[1], open_[1])


def test_gold_shape_acts_on_gold_alone():
    """Forbids shaping that reaches the rollouts."""
    plain, shaped = (gradient_of(replace(ALGORITHMS["gcpo"], gold_old="one", gold_shape=s), is_gold=GOLD_FIRST) for s in ("none", "ratio"))
    assert not torch.equal(plain[0], shaped[0]) and torch.equal(plain[1], shaped[1])


@pytest.mark.parametrize("switch, value", [("level", "token"), ("clip_low", 0.0), ("clip_high", 0.0), ("gold_clip", 0.0), ("gold_clip", None)])
def test_with_one_update_the_ratio_switches_change_nothing(switch, value):
    """Forbids an ablation table of switches that cannot act: with one update a batch the ratio is exactly 1."""
    base = gradient_of(ALGORITHMS["gcpo"], old=None, is_gold=GOLD_FIRST)
    other = gradient_of(replace(ALGORITHMS["gcpo"], **{switch: value}), old=None, is_gold=GOLD_FIRST)
    assert base[MASK].all() and torch.allclose(base, other, rtol=1e-6, atol=0)


def test_never_gold_is_gspo():
    """Forbids a GCPO that is something else where gold is switched off: loss and gradient are GSPO's, bit for bit."""
    never, gspo = replace(ALGORITHMS["gcpo"], gold_when="never"), ALGORITHMS["gspo"]
    for old in (OLD, None):
        assert torch.equal(gradient_of(never, old=old), gradient_of(gspo, old=old))
    assert torch.equal(loss_of(never), loss_of(gspo))


def test_no_contrast_no_gradient():
    """Forbids a gradient from a group of equals: with A = 0 it is exactly zero, whatever the ratio."""
    for algorithm in ALGORITHMS.values():
        assert loss_of(algorithm, advantages=torch.zeros(2), ref_logprobs=REF).item() == 0
        assert gradient_of(algorithm, advantages=torch.zeros(2), ref_logprobs=REF)[MASK].abs().sum().item() == 0


@pytest.mark.parametrize("bad", [dict(level="word"), dict(clip_low=-0.1), dict(gold_clip=NAN), dict(gold_shape="ratio"), dict(kl_coef=float("inf")),
                                 dict(overlong=1.5), dict(sft_share=-0.1), dict(max_tries=0), dict(objective="pairs", kl_coef=0.1), dict(objective="pairs", train_on="gold"), dict(beta=NAN)])
def test_impossible_settings_are_refused(bad):
    """Forbids a setting that is silently ignored."""
    with pytest.raises(ValueError):
        Algorithm("bad", **bad)


# ---------------------------------------------------------------------------------------------------------------------
# Gold substitution

def rollouts(correct, lengths=(3, 5, 2, 4)):
    """A group of four; row i is made of tokens i + 10."""
    lengths = torch.tensor(lengths)
    responses = torch.arange(10, 14)[:, None].expand(4, 5) * (torch.arange(5) < lengths[:, None])
    correct = torch.tensor(correct)
    return Group(torch.tensor([1, 2]), responses, lengths, torch.tensor([True, False, True, True]), torch.full((4, 5), -1.0), correct,
                 correct.float(), torch.zeros(4, dtype=torch.bool))


def substituted(group, gold=(7, 8, 9), seed=0, **switches):
    return substitute_gold(group, torch.tensor(gold), replace(ALGORITHMS["gcpo"], **switches), torch.Generator().manual_seed(seed))


def test_gold_only_where_the_switch_says():
    """Forbids gold in a group that has contrast of its own (all_wrong), and none where it is asked for."""
    none, one, all_ = rollouts([False] * 4), rollouts([False, True, False, False]), rollouts([True] * 4)
    gold = lambda group, when: int(substituted(group, gold_when=when).is_gold.sum())
    assert [gold(g, "all_wrong") for g in (none, one, all_)] == [1, 0, 0]
    assert [gold(g, "always") for g in (none, one, all_)] == [1, 1, 1]
    assert [gold(g, "never") for g in (none, one, all_)] == [0, 0, 0]
    assert substituted(one) is one


def test_gold_takes_the_slot_the_switch_says():
    """Forbids a right rollout that gives way to gold, a slot that is never random, and a length bias by accident."""
    row = lambda group, **s: substituted(group, **s).is_gold.nonzero().item()
    wrong = rollouts([False] * 4)
    assert row(wrong, gold_slot="first") == 0 and row(wrong, gold_slot="longest") == 1
    assert {row(wrong, seed=seed) for seed in range(40)} == {0, 1, 2, 3}
    mixed = rollouts([True, True, False, False])
    assert row(mixed, gold_when="always", gold_slot="first") == 2 and row(mixed, gold_when="always", gold_slot="longest") == 3
    assert {row(mixed, gold_when="always", seed=seed) for seed in range(40)} == {2, 3}


@pytest.mark.parametrize("gold", [(7, 8, 9), (7, 8, 9, 7, 8, 9, 7)])
def test_substitution_makes_a_whole_row_and_a_new_group(gold):
    """Forbids a gold cut to the rollouts' width, columns that still speak of the old row, and writes into a group that
    others hold."""
    group = rollouts([False] * 4)
    before = {name: value.clone() for name, value in vars(group).items()}
    new = substituted(group, gold, gold_slot="first")
    assert new.responses[0, :len(gold)].tolist() == list(gold) and new.mask[0].sum() == new.lengths[0] == len(gold)
    assert new.rewards.tolist() == [1, 0, 0, 0] and new.correct.tolist() == new.is_gold.tolist() == [True, False, False, False]
    assert new.finished[0] and new.logprobs[0].isnan().all() and not new.logprobs[1:].isnan().any()
    assert torch.equal(new.responses[1:, :5], group.responses[1:]) and not new.responses[1:, 5:].any()
    assert all(torch.equal(value, before[name]) for name, value in vars(group).items())


def test_lone_gold_weighs_as_much_as_all_failures():
    """Forbids a weight that length distorts: at ratio 1 a long gold's pull equals that of the short wrong rows together, and a mean over tokens
    in its place shows."""
    for size in (4, 8, 16):
        advantages = group_advantages(torch.tensor([1.0] + [0.0] * (size - 1)))
        logprobs, mask = torch.full((size, 6), -1.0), torch.arange(6) < torch.tensor([[6]] + [[2]] * (size - 1))
        pull = lambda algorithm: gradient_of(algorithm, logprobs, None, advantages=advantages, mask=mask, is_gold=advantages > 0).sum(1)
        weight, by_tokens = pull(ALGORITHMS["gcpo"]), pull(replace(ALGORITHMS["gcpo"], aggregation="token_mean"))
        assert weight[0].item() == pytest.approx(-weight[1:].sum().item(), rel=1e-5)
        assert by_tokens[0].item() == pytest.approx(-3 * by_tokens[1:].sum().item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# With a real (tiny) transformer: one optimizer step

@pytest.fixture
def tiny(tmp_path):
    """A maker of equal models: two layers, grouped heads, 23 tokens."""
    (tmp_path / "config.json").write_text(json.dumps(dict(
        model_type="llama", vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True)))
    return lambda: Transformer(read_config(str(tmp_path))).init_weights(torch.Generator().manual_seed(0), std=0.3)


def some_items(count=3, seed=0, gold=True, algorithm=ALGORITHMS["gcpo"]):
    """Groups of four ragged responses. The first has no contrast; the others have none right, and gold if it is wanted."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randint(2, 23, shape, generator=generator)
    items = []
    for i in range(count):
        lengths = torch.randint(1, 7, (4,), generator=generator)
        correct = torch.full((4,), i == 0)
        group = Group(draw(3 + i), draw(4, 6), lengths, torch.ones(4, dtype=torch.bool), torch.full((4, 6), -3.0), correct, correct.float(),
                      torch.zeros(4, dtype=torch.bool))
        if gold:
            group = substitute_gold(group, draw(8), algorithm, generator)
        else:
            group.rewards[1] = 1.0
        items.append(Item(0, None, group, group_advantages(group.rewards, algorithm.scale)))
    return items


def sgd_step(model, items, algorithm, **settings):
    """The gradient of one update, as the weights' change under plain SGD with rate 1."""
    before = [p.detach().clone() for p in model.parameters()]
    update(model, make_policy(model, torch.float32), torch.optim.SGD(model.parameters(), lr=1.0), items, algorithm,
           Config(max_new_tokens=8, max_grad_norm=1e9, temperature=0.7, **settings))
    return torch.cat([(b - p.detach()).flatten() for b, p in zip(before, model.parameters())])


@pytest.mark.parametrize("name", ["gcpo", "grpo", "dapo", "dr_grpo"])
def test_update_equals_the_plain_way(tiny, name):
    """Forbids everything at once: the gradient of an update is that of full prompt + response sequences, one by one
    through the model, with the loss written out in two lines (ratio 1)."""
    algorithm, model = ALGORITHMS[name], tiny()
    items = some_items(algorithm=ALGORITHMS["gcpo"])
    rows, tokens = sum(len(i.group.lengths) for i in items), sum(int(i.group.lengths.sum()) for i in items)
    loss = 0
    for item in items:
        for ids, n, a in zip(item.group.responses, item.group.lengths.tolist(), item.advantages.tolist()):
            full = torch.cat([item.group.prompt, ids[:n]])[None]
            logits = model.logits(model(full))[0, len(item.group.prompt) - 1:-1] / 0.7
            logprobs = logits.log_softmax(-1).gather(1, ids[:n, None])
            loss -= a * logprobs.sum() / {"row_mean": n * rows, "token_mean": tokens, "fixed_length": rows * 8}[algorithm.aggregation]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert (sgd_step(tiny(), items, algorithm) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("settings", [dict(rows_per_pass=1), dict(rows_per_pass=3), dict(rows_per_pass=8), dict(rows_per_pass=64)])
def test_gradient_does_not_depend_on_passes_or_order(tiny, settings):
    """Forbids memory settings that change the objective: rows one by one, in threes, groups together, any order."""
    items = some_items(count=5)
    expected = sgd_step(tiny(), items, ALGORITHMS["gcpo"])
    for order in (items, items[::-1]):
        assert (sgd_step(tiny(), order, ALGORITHMS["gcpo"], **settings) - expected).norm() < 1e-5 * expected.norm()


def test_a_step_on_gold_raises_its_probability(tiny):
    """Forbids a gold row without gradient, or pushed down."""
    model, items = tiny(), some_items(count=2)
    group = items[1].group
    gold = group.is_gold.nonzero().item()
    logprob = lambda: token_logprobs(model, group.prompt, group.responses, 0.7, group.lengths)[0][gold].sum().item()
    before = logprob()
    change = sgd_step(model, items[1:], ALGORITHMS["gcpo"])
    assert change.norm() > 1e-3 and logprob() > before


def test_no_contrast_no_step(tiny):
    """Forbids momentum that moves the weights in a step without contrast: weights and moments stay, to the bit."""
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    config, gcpo = Config(max_new_tokens=8), ALGORITHMS["gcpo"]
    _, norm = update(model, model, optimizer, some_items(count=2), gcpo, config)
    assert norm > 0
    state = [x.clone() for p in model.parameters() for x in (p.detach(), *optimizer.state[p].values())]
    _, norm = update(model, model, optimizer, some_items(count=1), gcpo, config)
    assert norm is None
    assert all(torch.equal(a, b) for a, b in zip(state, [x for p in model.parameters() for x in (p.detach(), *optimizer.state[p].values())]))


def test_groups_without_contrast_still_count(tiny):
    """Forbids a denominator of the groups that happen to have contrast: with an idle group beside it, the gradient of
    the other is halved."""
    idle, live = some_items(count=2)
    alone, beside = sgd_step(tiny(), [live], ALGORITHMS["gcpo"]), sgd_step(tiny(), [idle, live], ALGORITHMS["gcpo"])
    assert (beside - alone / 2).norm() < 1e-5 * alone.norm()


def test_never_gold_is_gspo_over_several_updates(tiny):
    """Forbids a difference that shows only once ratios leave 1: weights after three updates on old logprobs, to the bit."""
    def weights(algorithm):
        model, items = tiny(), some_items(gold=False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for item in items:
            with torch.no_grad():
                item.old_logprobs, _ = token_logprobs(model, item.group.prompt, item.group.responses, 1.0, item.group.lengths)
        for _ in range(3):
            update(model, model, optimizer, items, algorithm, Config(max_new_tokens=8))
        return torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(weights(replace(ALGORITHMS["gcpo"], gold_when="never")), weights(ALGORITHMS["gspo"]))


def test_sft_is_the_likelihood_of_gold(tiny):
    """Forbids an SFT arm that is handicapped: its gradient is that of the mean token log-likelihood of the golds."""
    model, generator = tiny(), torch.Generator().manual_seed(5)
    items = [Item(0, None, gold_group(torch.randint(2, 23, (4,), generator=generator), torch.randint(2, 23, (n,), generator=generator)), torch.ones(1))
             for n in (3, 7)]
    loss = -sum(token_logprobs(model, i.group.prompt, i.group.responses, 0.7)[0].sum() for i in items) / 10
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    assert (sgd_step(tiny(), items, ALGORITHMS["sft"]) - expected).norm() < 1e-5 * expected.norm()
