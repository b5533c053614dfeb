"""What gcpo.py promises, meant to be read.

Each promise is held against numbers of others, a published formula, or the plain way of computing
it. Most name a bug that they forbid; those of published code are in docs/bugs.md. The heavy tests
(transformers' logits, samplers, broken files, whole runs) are in tests/.

    python -m pytest                 all of them
    python -m pytest test_gcpo.py    these
"""
import doctest
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

import gcpo as gcpo_module
from gcpo import (
    ALGORITHMS, Algorithm, Group, advantages_of, gold_group, group_advantages, kl_estimate,
    log_ratio, overlong_penalty, policy_loss, substitute_gold)
from logprobs import token_logprobs
from model import Transformer, read_config
from support.dpo import pair_loss
from support.options import Config
from train import Item, Run, update


torch.set_num_threads(1)  # the tensors are tiny: a second thread would only wait
NAN = float("nan")

# The hand-made rows of the golden numbers: one of three tokens, one of two.
OLD = torch.tensor([[-0.5, -1.0, -2.0], [-0.3, -0.7, NAN]])
NEW = torch.tensor([[-0.4, -1.2, -1.5], [-0.2, -1.0, NAN]])
REF = torch.tensor([[-0.6, -0.9, -2.2], [-0.1, -0.8, NAN]])
MASK = torch.tensor([[True, True, True], [True, True, False]])
ADVANTAGES = torch.tensor([2.0, -1.0])
TOTALS = dict(total_rows=2, total_tokens=5, max_new_tokens=4)
GOLD_FIRST = torch.tensor([True, False])


def loss_and_sums(algorithm, new=NEW, old=OLD, advantages=ADVANTAGES, mask=MASK, **context):
    """The loss that train.py would choose for this algorithm."""
    function = pair_loss if algorithm.objective == "pairs" else policy_loss
    return function(new, old, advantages, mask, algorithm, **{**TOTALS, **context})


def loss_of(algorithm, *args, **more):
    return loss_and_sums(algorithm, *args, **more)[0]


def gradient_of(algorithm, new=NEW, old=OLD, **more):
    """dL/dlogprobs, (N, T). old=None: the ratio is 1."""
    new = new.clone().requires_grad_()
    loss = loss_of(algorithm, new, new.detach() if old is None else old, **more)
    return torch.autograd.grad(loss, new)[0]


def with_kl(name):
    """The preset with a KL penalty too (but for DPO, which has its reference elsewhere)."""
    algorithm = ALGORITHMS[name]
    if algorithm.objective == "pairs":
        return algorithm
    return replace(algorithm, kl_coef=0.1)


# ---- The loss against numbers of others ----------------------------------------------------------

@pytest.mark.parametrize("level, low, high, row_mean, token_mean, fixed_length", [
    ("token", 0.2, 0.2, -0.565008, -0.868526, -0.542829),
    ("token", 0.2, 0.28, -0.591674, -0.900526, -0.562829),
    ("sequence", 3e-4, 4e-4, -0.500550, -0.800600, -0.500375),
    ("sequence", 0.2, 0.28, -0.690212, -1.009222, -0.630764)])
def test_loss_equals_the_golden_numbers(level, low, high, row_mean, token_mean, fixed_length):
    """The loss is TRL 1.16's for every ratio, clip range and denominator.

    (Bugs: a padded token that counts, its logprobs here being NaN; a sequence ratio of exp(sum)
    in place of exp(mean).)"""
    expected = dict(row_mean=row_mean, token_mean=token_mean, fixed_length=fixed_length)
    for aggregation, number in expected.items():
        algorithm = Algorithm(
            "test", level=level, clip_low=low, clip_high=high, aggregation=aggregation)
        assert loss_of(algorithm).item() == pytest.approx(number, abs=1e-6)


@pytest.mark.parametrize("level, bound, number, gradient", [
    ("token", 5.0, 1.366680, [-0.442068, -0.327492, -0.659488, 0.221034, 0.148164]),
    ("token", 1.2, 1.097448, [-0.442068, -0.327492, -0.48, 0.221034, 0.148164]),
    ("token", 1.1, 1.036827, [-0.44, -0.327492, -0.44, 0.22, 0.148164]),
    ("sequence", 5.0, 1.199701, [-0.457052, -0.457052, -0.457052, 0.180967, 0.180967]),
    ("sequence", 1.1, 1.146839, [-0.44, -0.44, -0.44, 0.180967, 0.180967])])
def test_cispo_equals_the_golden_numbers(level, bound, number, gradient):
    """CISPO's loss and gradient on the hand-made rows are what TRL 1.16's loss_type="cispo" gives
    (trl_loss of tests/test_peers.py), whose epsilon_high is the bound itself, not ours above 1.

    (Bugs: a token without gradient at the bound; a bound that only good rows have.)"""
    algorithm = replace(ALGORITHMS["cispo"], level=level, clip_high=bound - 1)
    assert loss_of(algorithm).item() == pytest.approx(number, abs=1e-6)
    assert gradient_of(algorithm)[MASK].tolist() == pytest.approx(gradient, abs=1e-6)


def test_sequence_ratio_is_the_geometric_mean():
    """A sequence's ratio does not grow with its length. (Bug: exp(sum) instead of exp(mean).)"""
    ratio = log_ratio(NEW, OLD, MASK, "sequence").exp()
    assert ratio[0].tolist() == pytest.approx([1.14263081] * 3)
    assert ratio[1, :2].tolist() == pytest.approx([0.90483742] * 2)


def test_shaped_gold_equals_luffy():
    """Shaped gold weighs every token by p / (p + 0.1), p = π_θ, as LUFFY's numbers say.

    (Bugs: a shaped gold that is clipped, or taken at the sequence's ratio.)"""
    is_gold = torch.ones(2, dtype=torch.bool)
    unknown = torch.full_like(OLD, NAN)    # nobody knows π_old of gold
    for level in ("token", "sequence"):
        algorithm = replace(ALGORITHMS["luffy"], level=level)
        for old in (OLD, unknown):
            loss = loss_of(algorithm, old=old, is_gold=is_gold)
            assert loss.item() == pytest.approx(-0.589097, abs=1e-6)


def test_kl_penalty_equals_the_golden_numbers():
    """The KL penalty has the denominator of the loss it belongs to."""
    per_token = kl_estimate(NEW, REF)[MASK].tolist()
    assert per_token == pytest.approx([0.018731, 0.049859, 0.196585, 0.005171, 0.021403], abs=1e-6)
    with_penalty = loss_of(replace(ALGORITHMS["grpo"], kl_coef=0.5), ref_logprobs=REF)
    without = loss_of(ALGORITHMS["grpo"], ref_logprobs=REF)
    assert (with_penalty - without).item() == pytest.approx(0.5 * 0.050839, abs=1e-6)


def test_pair_loss_is_dpo_s():
    """DPO's loss is the formula written out pair by pair; at the start model itself it is log 2.

    (Bugs: means over tokens where DPO sums, pairs of two right responses, no reference.)"""
    generator = torch.Generator().manual_seed(0)
    new = -torch.rand(4, 5, dtype=torch.float64, generator=generator)
    ref = -torch.rand(4, 5, dtype=torch.float64, generator=generator)
    mask = torch.arange(5) < torch.tensor([[5], [2], [3], [1]])
    advantages = group_advantages(torch.tensor([1.0, 0.0, 1.0, 0.0]))
    margin = [float((new - ref)[i][mask[i]].sum()) for i in range(4)]
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    pairs = [-math.log(sigmoid(0.1 * (margin[i] - margin[j]))) for i in (0, 2) for j in (1, 3)]

    def loss(new, total_rows):
        return loss_of(ALGORITHMS["dpo"], new, new, advantages, mask, ref_logprobs=ref,
                       total_rows=total_rows).item()

    assert loss(new, total_rows=4) == pytest.approx(sum(pairs) / 4, rel=1e-12)
    assert loss(ref, total_rows=4) == pytest.approx(math.log(2), rel=1e-12)
    # Of two groups, the other has no pair and counts as 0.
    assert loss(new, total_rows=8) == pytest.approx(sum(pairs) / 4 / 2, rel=1e-12)


def test_policy_loss_refuses_pairs():
    """DPO's loss is another function. (Bug: policy_loss, called with it, was GRPO's.)"""
    with pytest.raises(ValueError, match="pair_loss"):
        policy_loss(NEW, OLD, torch.ones(2), MASK, ALGORITHMS["dpo"],
                    total_rows=2, total_tokens=5)


def test_overlong_penalty():
    """The penalty has DAPO's slope, and there is none where none is asked for."""
    lengths = torch.tensor([1, 80, 85, 90, 100])
    assert overlong_penalty(lengths, 100, 0.2).tolist() == pytest.approx([0, 0, -0.25, -0.5, -1])
    assert overlong_penalty(lengths, 100, 0.0).abs().max() == 0
    whole = overlong_penalty(lengths, 100, 1.0).tolist()
    assert whole == pytest.approx([-0.01, -0.8, -0.85, -0.9, -1])


def test_kl_estimate_is_the_kl_divergence():
    """k3's mean under π_θ is KL(π_θ ‖ π_ref), summed here over all of a 50-way softmax.

    (Bug: the estimator the wrong way round.)"""
    draw = lambda seed: torch.randn(
        50, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    policy, ref = draw(1).log_softmax(0), draw(2).log_softmax(0)
    exact = (policy.exp() * (policy - ref)).sum()
    estimate = (policy.exp() * kl_estimate(policy, ref)).sum()
    reversed_ = (policy.exp() * kl_estimate(ref, policy)).sum()
    assert torch.isclose(estimate, exact, rtol=1e-12)
    assert not torch.isclose(reversed_, exact, rtol=1e-3)


@pytest.mark.parametrize("d", [1e-2, 1e-3, -1e-3, 1e-4])
def test_kl_estimate_near_zero(d):
    """Two policies that hardly differ have a small KL, in fp32 too. (Bug: exp(d) − d − 1 cancels
    there: it is wrong by a twentieth at d = 1e-3, and 0 at d = 1e-4.)"""
    exact = math.expm1(d) - d
    estimate = kl_estimate(torch.tensor(0.0), torch.tensor(d)).item()
    assert estimate == pytest.approx(exact, rel=3.5e-4)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradient_equals_finite_differences(name):
    """The gradient is the loss's own. (Bugs: something detached, or a branch that only the gradient
    takes. That the loss is right, the golden numbers say.)

    CISPO's ratio has no gradient. There old logprobs are nudged too, which leaves it as it is."""
    algorithm = with_kl(name)
    generator = torch.Generator().manual_seed(3)
    old = -torch.rand(3, 4, dtype=torch.float64, generator=generator) * 3
    new = old + 0.5 * torch.randn(3, 4, dtype=torch.float64, generator=generator)
    more = dict(
        old=old,
        advantages=torch.tensor([1.3, -0.4, -0.9], dtype=torch.float64),
        mask=torch.arange(4) < torch.tensor([[4], [2], [3]]),
        is_gold=torch.tensor([True, False, False]),
        ref_logprobs=old - 0.1)
    analytic = gradient_of(algorithm, new, **more)
    step = 1e-6
    for i, t in itertools.product(range(3), range(4)):
        nudge = torch.zeros_like(new)
        nudge[i, t] = step
        old_nudge = nudge if algorithm.objective == "cispo" else 0.0
        above = loss_of(algorithm, new + nudge, **{**more, "old": old + old_nudge})
        below = loss_of(algorithm, new - nudge, **{**more, "old": old - old_nudge})
        numeric = (above - below) / (2 * step)
        assert analytic[i, t].item() == pytest.approx(numeric.item(), abs=1e-8)


# ---- Advantages ----------------------------------------------------------------------------------

def test_the_docstrings_examples():
    """What the docstrings of gcpo.py show is what the code gives."""
    failures, examples = doctest.testmod(gcpo_module)
    assert failures == 0 and examples >= 2



@pytest.mark.parametrize("size, right, without_eps, no_std", [
    (4, 1.49970, 1.5, 0.75), (8, 2.47417, 2.4749, 0.875), (16, 3.74850, 3.75, 0.9375)])
def test_advantage_of_a_lone_right_answer(size, right, without_eps, no_std):
    """A lone right answer weighs what TRL gives it. (Bugs: the other standard deviation, which
    gives 2.6458 for G = 8, and another epsilon.)"""
    rewards = torch.zeros(size)
    rewards[1] = 1
    advantages = group_advantages(rewards)
    assert advantages[1].item() == pytest.approx(right, abs=1e-5)
    assert advantages[0].item() == pytest.approx(-right / (size - 1), abs=1e-5)
    assert advantages[1].item() < without_eps
    plain = [-1 / size] + [no_std] + [-1 / size] * (size - 2)
    assert group_advantages(rewards, "none").tolist() == pytest.approx(plain)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.3, 1 / 3, -0.7])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 16])
def test_equal_rewards_give_no_advantage(reward, size):
    """Equal rewards give advantage 0. (Bug: the mean of eight times 0.1 is not 0.1 in fp32, and
    divided by a standard deviation of almost nothing the difference becomes a gradient.)"""
    for scale in Algorithm.__dataclass_fields__["scale"].metadata["choices"]:
        assert group_advantages(torch.full((size,), reward), scale).tolist() == [0.0] * size


@pytest.mark.parametrize("right", range(1, 8))
def test_scale_mean_is_maxrls(right):
    """MaxRL's advantages are its authors', (r − mean) / (mean + 1e-6): with k of 8 right, (8 − k)/k
    for these and −1 for the others. So they add up to 0, and none right gives 0, not 0/0. (Bugs:
    a division by 0; ±1 as rewards, whose negative mean turns good into bad.)"""
    rewards = (torch.arange(8) < right).float()
    advantages = group_advantages(rewards, "mean")
    theirs = (rewards - right / 8) / (right / 8 + 1e-6)
    assert advantages.tolist() == pytest.approx(theirs.tolist(), rel=1e-5)
    assert advantages.tolist() == pytest.approx([(8 - right) / right] * right + [-1] * (8 - right))
    assert group_advantages(torch.zeros(8), "mean").tolist() == [0] * 8
    with pytest.raises(ValueError, match="scale=mean: a reward is -1"):
        group_advantages(2 * rewards - 1, "mean")


# ---- Gold or none, wrong rows pushed down or not: the table in gcpo.advantages_of ----------------

def advantages_with(right, size=8, **switches):
    """The advantages of a group whose last `right` rollouts are right, after gold substitution.
    Gold takes the first wrong row."""
    correct = torch.arange(size) >= size - right
    group = Group(
        prompt=torch.tensor([1]), responses=torch.ones(size, 3, dtype=torch.long),
        lengths=torch.full((size,), 3), finished=torch.ones(size, dtype=torch.bool),
        logprobs=torch.zeros(size, 3), correct=correct, rewards=correct.float(),
        is_gold=torch.zeros(size, dtype=torch.bool))
    algorithm = replace(ALGORITHMS["gcpo"], **{"gold_slot": "first", **switches})
    group = substitute_gold(group, torch.tensor([5, 6]), algorithm, torch.Generator())
    return advantages_of(group, algorithm).tolist()


CORNERS = [  # what is set, gold's or the first row's advantage, and each other row's
    (dict(), 2.474, -0.354),                                                # GCPO
    (dict(gold_rivals="zero"), 2.474, 0),
    (dict(gold_rivals="zero", gold_advantage="one"), 1, 0),                 # DyME
    (dict(gold_when="never", virtual_right="all_wrong"), -0.333, -0.333),   # NGRPO
    (dict(gold_when="never"), 0, 0),                                        # GRPO, GSPO
    (dict(gold_weight=3.0), 3 * 2.474, -0.354),
    (dict(gold_weight=0.0), 0, -0.354)]


@pytest.mark.parametrize("switches, gold, rival", CORNERS)
def test_corners_of_gold_and_negatives(switches, gold, rival):
    """With G = 8, all wrong, each switch changes the row it names and no other: negatives go
    without gold's advantage changing, and gold is weighed without theirs changing. (Bug: a
    comparison of "no negatives" that also changes how much gold weighs.)"""
    advantages = advantages_with(0, **switches)
    assert advantages == pytest.approx([gold] + [rival] * 7, abs=2e-3)
    gcpo = advantages_with(0)
    if "gold_weight" in switches:
        assert advantages[1:] == gcpo[1:]
    if switches == dict(gold_rivals="zero"):
        assert advantages[0] == gcpo[0]


@pytest.mark.parametrize("name, right, expected", [
    # the README's and its authors' numbers: where gold stands or a rollout is right, then the rest
    ("gcpo", 0, [2.4742, -0.3535]), ("dyme", 0, [1, 0]),
    ("ngrpo", 0, [-0.3333]), ("ngrpo", 4, [0.843, -1.054]), ("ngrpo", 8, [0]),
    ("grpo", 0, [0]), ("grpo", 4, [0.935, -0.935]), ("dyme", 4, [0.935, -0.935]),
    ("dyme", 8, [0]), ("maxrl", 0, [0]), ("maxrl", 2, [3, -1]), ("cispo", 0, [0])])
def test_presets_advantages_are_their_authors(name, right, expected):
    """The presets give groups of 8 the advantages that their papers or programs give. (Bugs: a
    virtual reward that gets a row of its own, or is forgotten where some rollouts are right; gold
    of DyME's that is divided by a deviation.)"""
    algorithm = ALGORITHMS[name]
    switches = {n: getattr(algorithm, n) for n in (
        "gold_when", "gold_rivals", "gold_advantage", "gold_weight", "virtual_right", "scale")}
    advantages = advantages_with(right, **switches)
    assert len(advantages) == 8
    found = sorted({round(a, 3) for a in advantages}, reverse=True)
    assert found == pytest.approx(expected, abs=1e-3)


def test_the_squares_switches_leave_other_groups_alone():
    """gold_rivals, gold_advantage and gold_weight act in groups with gold alone, on wrong rows and
    on gold; virtual_right=all_wrong in those without a right response. (Bug: a switch that
    reaches mixed groups, or the right rollouts beside gold.)"""
    of_gold = dict(gold_rivals="zero", gold_advantage="one", gold_weight=3.0)
    assert advantages_with(2, **of_gold) == advantages_with(2)
    assert advantages_with(0, virtual_right="all_wrong") == advantages_with(0)    # gold is right
    assert advantages_with(2, virtual_right="all_wrong") == advantages_with(2)
    assert advantages_with(2, virtual_right="always") != advantages_with(2)
    plain = advantages_with(2, gold_when="always")
    changed = advantages_with(2, gold_when="always", **of_gold)
    assert changed == [3.0] + [0.0] * 5 + plain[6:]


def test_gold_weight_is_a_factor_of_gold_s_objective():
    """gold_weight multiplies gold's part of loss and gradient, clipped or not, and nothing else, so
    it may be put into the advantage. (Bug: a weight that also moves the clip, or the denominator.)
    And a zeroed rival has no gradient, though its row still counts."""
    for old, objective in itertools.product((OLD, OLD - 1.0), ("clipped", "cispo")):
        gcpo = replace(ALGORITHMS["gcpo"], objective=objective, clip_low=0.2)
        more = dict(old=old, is_gold=GOLD_FIRST)
        base = gradient_of(gcpo, **more)
        tripled = gradient_of(gcpo, advantages=ADVANTAGES * torch.tensor([3.0, 1.0]), **more)
        assert torch.allclose(tripled[0], 3 * base[0], rtol=1e-6)
        assert torch.equal(tripled[1], base[1])
        alone = gradient_of(gcpo, advantages=ADVANTAGES * torch.tensor([1.0, 0.0]), **more)
        assert torch.equal(alone[0], base[0]) and not alone[1][MASK[1]].any()


def test_cispo_keeps_every_tokens_gradient():
    """A token beyond the bound still has a gradient, of the bound's weight, where the clipped
    surrogate has none; at ratio 1 the two have the same. (Bug: a gradient through the ratio.)"""
    cispo = replace(ALGORITHMS["cispo"], clip_low=0.1, clip_high=0.1)
    clipped = replace(cispo, objective="clipped")
    at_one = [gradient_of(a, old=None) for a in (cispo, clipped)]
    assert torch.allclose(*at_one, rtol=1e-6)
    far = torch.where(MASK, NEW - math.log(2), NAN)    # every ratio is 2
    assert not gradient_of(clipped, old=far)[0].any()
    expected = torch.where(MASK, -1.1 * ADVANTAGES[:, None] / 5, 0.0)
    assert torch.allclose(gradient_of(cispo, old=far), expected, rtol=1e-6)
    _, sums = loss_and_sums(cispo, old=far)
    assert sums["policy_clipped"] == 5


# ---- Masks, padding, batching --------------------------------------------------------------------

def test_mask_counts_the_end_token_even_if_it_is_the_pad_token():
    """The mask comes from lengths. (Bug: comparing with the pad or end token, which loses the end
    token: token 0 is end, pad and an ordinary token here.)"""
    responses = torch.tensor([[5, 0, 7, 0], [0, 0, 0, 0]])
    lengths = torch.tensor([4, 1])
    group = Group(torch.tensor([0, 0]), responses, lengths, None, None, None, None, None)
    assert group.mask.tolist() == [[True] * 4, [True, False, False, False]]


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("poison", [NAN, float("inf"), -1e30])
def test_padding_never_reaches_loss_or_gradient(name, poison):
    """Whatever is in the padding, loss and gradient stay the same. (Bug: 0 · NaN is NaN.)"""
    algorithm = with_kl(name)
    mask = torch.cat([MASK, torch.zeros(2, 3, dtype=torch.bool)], dim=1)

    def clean(x):
        return torch.where(MASK, x, 0.0)

    def wide(x):
        return torch.cat([torch.where(MASK, x, poison), torch.full((2, 3), poison)], dim=1)

    narrow = dict(new=clean(NEW), old=clean(OLD), ref_logprobs=clean(REF), is_gold=GOLD_FIRST)
    padded = dict(new=wide(NEW), old=wide(OLD), ref_logprobs=wide(REF), is_gold=GOLD_FIRST,
                  mask=mask)
    expected = loss_of(algorithm, **narrow).item()
    assert loss_of(algorithm, **padded).item() == pytest.approx(expected, rel=1e-6)
    gradient = gradient_of(algorithm, **padded)
    assert torch.allclose(gradient[:, :3], gradient_of(algorithm, **narrow), rtol=1e-6)
    assert not gradient[~mask].any()


@pytest.mark.parametrize("name", [n for n, a in ALGORITHMS.items() if a.objective != "pairs"])
def test_parts_of_a_step_add_up(name):
    """Row by row, in any order, with the step's totals, losses and metric sums add up to those of
    all rows at once. (Bug: a loss normalised per micro-batch.)"""
    algorithm = ALGORITHMS[name]
    order = [1, 0]
    loss, sums = loss_and_sums(algorithm)
    parts = [loss_and_sums(algorithm, NEW[[i]], OLD[[i]], ADVANTAGES[[i]], MASK[[i]])
             for i in order]
    assert sum(part[0] for part in parts).item() == pytest.approx(loss.item(), rel=1e-6)
    for key, value in sums.items():
        total = sum(part[1][key] for part in parts).item()
        assert total == pytest.approx(value.item(), rel=1e-6, abs=1e-7)
    shuffled = loss_of(algorithm, NEW[order], OLD[order], ADVANTAGES[order], MASK[order])
    assert shuffled.item() == pytest.approx(loss.item(), rel=1e-6)


def test_row_mean_weighs_rows_not_tokens():
    """At ratio 1 a long row and a short row with opposite advantages cancel exactly. (Bug: an
    (N, 1) sequence loss broadcast by the mask, which weighs a row by its length.)"""
    mask = torch.arange(50) < torch.tensor([[50], [2]])
    logprobs = torch.full((2, 50), -1.0)
    opposite = dict(advantages=torch.tensor([1.0, -1.0]), mask=mask)
    gradient = gradient_of(ALGORITHMS["gspo"], logprobs, None, **opposite)
    assert gradient.sum(1).tolist() == pytest.approx([-0.5, 0.5])
    loss = loss_of(ALGORITHMS["gspo"], logprobs, logprobs, **opposite)
    assert loss.item() == pytest.approx(0, abs=1e-7)


def test_metric_sums_of_hand_made_rows():
    """Gold counts apart from the policy's own tokens, and only tokens without gradient count as
    clipped. (Bug: metrics averaged over the wrong thing.) Row 0 is gold, its ratio 1.1426 > 1.1;
    row 1 has A < 0 and ratio 0.9048 < 0.95."""
    algorithm = replace(ALGORITHMS["gcpo"], clip_low=0.05, clip_high=0.05, gold_clip=0.1)
    _, sums = loss_and_sums(algorithm, is_gold=GOLD_FIRST)
    values = {name: value.item() for name, value in sums.items()}
    k3 = lambda d: math.exp(d) - d - 1
    assert values == pytest.approx({
        "policy_tokens": 2,
        "policy_ratio": 2 * 0.90483742,
        "policy_clipped": 2,
        "approx_kl": k3(0.1) + k3(-0.3),
        "gold_tokens": 3,
        "gold_ratio": 3 * 1.14263081,
        "gold_clipped": 3,
        "gold_logprob": -3.1,
    }, rel=1e-6)


# ---- The switches: each changes what it names, and nothing else ----------------------------------

ONE_CHANGE = [  # switch, value, rows whose gradient changes (row 0: gold, A > 0; row 1: A < 0)
    ("gold_old", "one", [0]),
    ("gold_clip", 1e-3, [0]),
    ("clip_low", 3e-4, [1]),
    ("clip_high", 0.3, []),
    ("level", "token", [0, 1]),
    ("aggregation", "token_mean", [0, 1]),
    ("aggregation", "fixed_length", [0, 1]),
    ("kl_coef", 0.1, [1]),
    # These do not touch the loss, but the advantages before it (the square, above).
    ("gold_rivals", "zero", []),
    ("gold_advantage", "one", []),
    ("gold_weight", 3.0, []),
    ("virtual_right", "always", []),
    ("scale", "none", []),
    ("gold_when", "never", []),
    ("gold_slot", "first", [])]


@pytest.mark.parametrize("switch, value, changed", ONE_CHANGE)
def test_a_switch_changes_what_it_names_and_nothing_else(switch, value, changed):
    """(Bugs: a switch without effect, and one that leaks into rows it does not name, such as a clip
    range that reaches gold.)"""
    gcpo = replace(ALGORITHMS["gcpo"], clip_low=0.2)  # wide enough that both rows have a gradient
    more = dict(is_gold=GOLD_FIRST, ref_logprobs=REF)
    base = gradient_of(gcpo, **more)
    other = gradient_of(replace(gcpo, **{switch: value}), **more)
    assert [row for row in (0, 1) if not torch.equal(base[row], other[row])] == changed


def test_clip_high_acts_on_good_rollouts():
    """The upper clip holds for the policy's own good rows: here row 0 is no gold."""
    narrow = gradient_of(replace(ALGORITHMS["gcpo"], clip_high=4e-4))
    wide = gradient_of(replace(ALGORITHMS["gcpo"], clip_high=0.3))
    assert not narrow[0].any() and wide[0].all()
    assert torch.equal(narrow[1], wide[1])


def test_gold_has_no_lower_clip():
    """Gold keeps its gradient however far its ratio has fallen, whatever the sign of its advantage.
    A rollout with the same numbers is clipped."""
    fallen = NEW - 1.0    # the ratio is far below 1 − ε_low
    worst = torch.tensor([-1.0, 1.0])
    of_gold = gradient_of(ALGORITHMS["gcpo"], fallen, advantages=worst, is_gold=GOLD_FIRST)
    of_rollout = gradient_of(ALGORITHMS["gcpo"], fallen, advantages=worst)
    assert of_gold[0].all() and not of_rollout[0].any()


def test_gold_shape_acts_on_gold_alone():
    """(Bug: shaping that reaches the rollouts.)"""
    gcpo = replace(ALGORITHMS["gcpo"], gold_old="one")
    plain = gradient_of(gcpo, is_gold=GOLD_FIRST)
    shaped = gradient_of(replace(gcpo, gold_shape="ratio"), is_gold=GOLD_FIRST)
    assert not torch.equal(plain[0], shaped[0])
    assert torch.equal(plain[1], shaped[1])


@pytest.mark.parametrize("switch, value", [
    ("level", "token"), ("clip_low", 0.0), ("clip_high", 0.0), ("gold_clip", 0.0),
    ("gold_clip", None)])
def test_with_one_update_the_ratio_switches_change_nothing(switch, value):
    """With one update a batch the ratio is exactly 1, so these switches cannot act. (Bug: an
    ablation table of switches without effect.)"""
    gcpo = ALGORITHMS["gcpo"]
    base = gradient_of(gcpo, old=None, is_gold=GOLD_FIRST)
    other = gradient_of(replace(gcpo, **{switch: value}), old=None, is_gold=GOLD_FIRST)
    assert base[MASK].all() and torch.allclose(base, other, rtol=1e-6, atol=0)


def test_never_gold_is_gspo():
    """GCPO without gold is GSPO: loss and gradient, bit for bit."""
    never = replace(ALGORITHMS["gcpo"], gold_when="never")
    gspo = ALGORITHMS["gspo"]
    for old in (OLD, None):
        assert torch.equal(gradient_of(never, old=old), gradient_of(gspo, old=old))
    assert torch.equal(loss_of(never), loss_of(gspo))


def test_no_contrast_no_gradient():
    """A group of equals has a gradient of exactly zero, whatever the ratio."""
    equals = dict(advantages=torch.zeros(2), ref_logprobs=REF)
    for algorithm in ALGORITHMS.values():
        assert loss_of(algorithm, **equals).item() == 0
        assert not gradient_of(algorithm, **equals)[MASK].any()


@pytest.mark.parametrize("bad", [
    dict(level="word"), dict(clip_low=-0.1), dict(gold_clip=NAN), dict(gold_shape="ratio"),
    dict(kl_coef=float("inf")), dict(overlong=1.5), dict(sft_share=-0.1), dict(max_tries=0),
    dict(objective="pairs", kl_coef=0.1), dict(objective="pairs", train_on="gold"),
    dict(beta=NAN), dict(gold_weight=-1.0), dict(gold_rivals="half"), dict(scale="max"),
    dict(objective="pairs", gold_rivals="zero"), dict(objective="pairs", gold_weight=2.0),
    dict(objective="pairs", virtual_right="always"), dict(objective="pairs", train_on="right"),
    dict(scale="mean", overlong=0.2), dict(train_on="right", resample="dynamic"),
    dict(train_on="right", gold_old="one"),
    dict(gold_shape="ratio", gold_old="one", objective="cispo")], ids=str)
def test_impossible_settings_are_refused(bad):
    """Each is refused by name, "switch=value: why". (Bug: a setting that is silently ignored.)"""
    with pytest.raises(ValueError, match=r"^\w+=\S+: "):
        Algorithm("bad", **bad)


# ---- Gold substitution ---------------------------------------------------------------------------

def rollouts(correct, lengths=(3, 5, 2, 4)):
    """A group of four; row i is made of tokens i + 10."""
    lengths = torch.tensor(lengths)
    rows = torch.arange(10, 14)[:, None].expand(4, 5)
    correct = torch.tensor(correct)
    return Group(
        prompt=torch.tensor([1, 2]),
        responses=rows * (torch.arange(5) < lengths[:, None]),
        lengths=lengths,
        finished=torch.tensor([True, False, True, True]),
        logprobs=torch.full((4, 5), -1.0),
        correct=correct,
        rewards=correct.float(),
        is_gold=torch.zeros(4, dtype=torch.bool))


def substituted(group, gold=(7, 8, 9), seed=0, **switches):
    gcpo = replace(ALGORITHMS["gcpo"], **switches)
    return substitute_gold(group, torch.tensor(gold), gcpo, torch.Generator().manual_seed(seed))


def test_gold_only_where_the_switch_says():
    """all_wrong gives gold to groups without a right rollout, always to all, never to none."""
    none, one, all_ = [False] * 4, [False, True, False, False], [True] * 4
    for when, expected in (("all_wrong", [1, 0, 0]), ("always", [1, 1, 1]), ("never", [0, 0, 0])):
        groups = [substituted(rollouts(correct), gold_when=when) for correct in (none, one, all_)]
        assert [int(group.is_gold.sum()) for group in groups] == expected
    untouched = rollouts(one)
    assert substituted(untouched) is untouched


def test_gold_takes_the_slot_the_switch_says():
    """Only wrong rollouts give way, and by default any of them. (Bugs: a right one that gives way,
    a slot that is never random, a length bias by accident.)"""
    def row(group, **switches):
        return substituted(group, **switches).is_gold.nonzero().item()

    wrong = rollouts([False] * 4)
    assert row(wrong, gold_slot="first") == 0
    assert row(wrong, gold_slot="longest") == 1
    assert {row(wrong, seed=seed) for seed in range(40)} == {0, 1, 2, 3}
    mixed = rollouts([True, True, False, False])
    assert row(mixed, gold_when="always", gold_slot="first") == 2
    assert row(mixed, gold_when="always", gold_slot="longest") == 3
    assert {row(mixed, gold_when="always", seed=seed) for seed in range(40)} == {2, 3}


@pytest.mark.parametrize("gold", [(7, 8, 9), (7, 8, 9, 7, 8, 9, 7)])
def test_substitution_makes_a_whole_row_and_a_new_group(gold):
    """Gold comes whole, every column speaks of it, and the group given stays as it was. (Bugs: gold
    cut to the rollouts' width; in-place writes into a group that others hold.)"""
    group = rollouts([False] * 4)
    before = {name: value.clone() for name, value in vars(group).items()}
    new = substituted(group, gold, gold_slot="first")
    assert new.responses[0, :len(gold)].tolist() == list(gold)
    assert new.mask[0].sum() == new.lengths[0] == len(gold)
    assert new.rewards.tolist() == [1, 0, 0, 0]
    assert new.correct.tolist() == new.is_gold.tolist() == [True, False, False, False]
    assert new.finished[0]
    assert new.logprobs[0].isnan().all() and not new.logprobs[1:].isnan().any()
    assert torch.equal(new.responses[1:, :5], group.responses[1:])
    assert not new.responses[1:, 5:].any()
    assert all(torch.equal(value, before[name]) for name, value in vars(group).items())


@pytest.mark.parametrize("size", [4, 8, 16])
def test_lone_gold_weighs_as_much_as_all_failures(size):
    """At ratio 1 a long gold pulls as hard as the short wrong rows together. (Bug: a weight
    that depends on length. A mean over tokens has it, as the last line shows.)"""
    advantages = group_advantages(torch.tensor([1.0] + [0.0] * (size - 1)))
    logprobs = torch.full((size, 6), -1.0)
    mask = torch.arange(6) < torch.tensor([[6]] + [[2]] * (size - 1))

    def pull(algorithm):
        more = dict(advantages=advantages, mask=mask, is_gold=advantages > 0)
        return gradient_of(algorithm, logprobs, None, **more).sum(1)

    by_rows = pull(ALGORITHMS["gcpo"])
    by_tokens = pull(replace(ALGORITHMS["gcpo"], aggregation="token_mean"))
    assert by_rows[0].item() == pytest.approx(-by_rows[1:].sum().item(), rel=1e-5)
    assert by_tokens[0].item() == pytest.approx(-3 * by_tokens[1:].sum().item(), rel=1e-5)


# ---- With a real (tiny) transformer: one optimizer step ------------------------------------------

@pytest.fixture
def tiny(tmp_path):
    """A maker of equal models: two layers, grouped heads, 23 tokens."""
    (tmp_path / "config.json").write_text(json.dumps(dict(
        model_type="llama", vocab_size=23, hidden_size=16, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True)))

    def make():
        model = Transformer(read_config(str(tmp_path)))
        return model.init_weights(torch.Generator().manual_seed(0), std=0.3)

    return make


def some_items(count=3, seed=0, gold=True):
    """Groups of four ragged responses. The first has no contrast; the others are all wrong and get
    gold, or without gold have one right."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randint(2, 23, shape, generator=generator)
    items = []
    for i in range(count):
        lengths = torch.randint(1, 7, (4,), generator=generator)
        correct = torch.full((4,), i == 0)
        group = Group(
            prompt=draw(3 + i),
            responses=draw(4, 6),
            lengths=lengths,
            finished=torch.ones(4, dtype=torch.bool),
            logprobs=torch.full((4, 6), -3.0),
            correct=correct,
            rewards=correct.float(),
            is_gold=torch.zeros(4, dtype=torch.bool))
        if gold:
            group = substitute_gold(group, draw(8), ALGORITHMS["gcpo"], generator)
        else:
            group.correct[1] = True
            group.rewards[1] = 1.0
        items.append(Item(0, None, group, group_advantages(group.rewards)))
    return items


def run_of(model, algorithm, optimizer=None, **settings):
    """A run in fp32 (the policy is the master), with plain SGD of rate 1 unless told otherwise."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1.0)
    config = Config(**{"max_new_tokens": 8, **settings})
    return Run(config, algorithm, master=model, policy=model, optimizer=optimizer)


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


def sgd_step(model, items, algorithm, **settings):
    """The gradient of one update, as the weights' change under SGD."""
    before = flat(model.parameters()).clone()
    update(run_of(model, algorithm, max_grad_norm=1e9, temperature=0.7, **settings), items)
    return before - flat(model.parameters())


def assert_same(gradient, expected):
    assert (gradient - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("name", ["gcpo", "grpo", "dapo", "dr_grpo"])
def test_update_equals_the_plain_way(tiny, name):
    """The gradient of an update is that of full prompt + response sequences, one by one through the
    model, with the loss written out in two lines (ratio 1). This forbids everything at once."""
    algorithm, model, items = ALGORITHMS[name], tiny(), some_items()
    rows = sum(len(i.group.lengths) for i in items)
    tokens = sum(int(i.group.lengths.sum()) for i in items)
    loss = 0
    for item in items:
        group = item.group
        for ids, n, a in zip(group.responses, group.lengths.tolist(), item.advantages.tolist()):
            sequence = torch.cat([group.prompt, ids[:n]])[None]
            logits = model.logits(model(sequence))[0, len(group.prompt) - 1:-1] / 0.7
            logprobs = logits.log_softmax(-1).gather(1, ids[:n, None])
            divisor = {"row_mean": n * rows, "token_mean": tokens, "fixed_length": rows * 8}
            loss -= a * logprobs.sum() / divisor[algorithm.aggregation]
    expected = flat(torch.autograd.grad(loss, list(model.parameters())))
    assert_same(sgd_step(tiny(), items, algorithm), expected)


@pytest.mark.parametrize("rows_per_pass", [1, 3, 8, 64])
def test_gradient_does_not_depend_on_passes_or_order(tiny, rows_per_pass):
    """Rows one by one, in threes, groups together, in any order: the gradient is the same. (Bug:
    memory settings that change the objective.)"""
    items = some_items(count=5)
    expected = sgd_step(tiny(), items, ALGORITHMS["gcpo"])
    for order in (items, items[::-1]):
        step = sgd_step(tiny(), order, ALGORITHMS["gcpo"], rows_per_pass=rows_per_pass)
        assert_same(step, expected)


def test_a_step_on_gold_raises_its_probability(tiny):
    """(Bugs: a gold row without gradient, or pushed down.)"""
    model, items = tiny(), some_items(count=2)
    group = items[1].group
    gold = group.is_gold.nonzero().item()

    def logprob():
        return token_logprobs(model, group.prompt, group.responses, 0.7, group.lengths)[0][gold]

    before = logprob().sum().item()
    change = sgd_step(model, items[1:], ALGORITHMS["gcpo"])
    assert change.norm() > 1e-3 and logprob().sum().item() > before


def test_no_contrast_no_step(tiny):
    """A step without contrast leaves weights and moments as they are, to the bit. (Bug: momentum
    that moves the weights.)"""
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    run = run_of(model, ALGORITHMS["gcpo"], optimizer)

    def everything():
        moments = [x for p in model.parameters() for x in optimizer.state[p].values()]
        return flat([*model.parameters(), *moments]).clone()

    _, norm = update(run, some_items(count=2))
    assert norm > 0
    before = everything()
    _, norm = update(run, some_items(count=1))
    assert norm is None and torch.equal(everything(), before)


def test_groups_without_contrast_still_count(tiny):
    """With an idle group beside it, a group's gradient is halved. (Bug: a denominator of the groups
    that happen to have contrast.)"""
    idle, live = some_items(count=2)
    alone = sgd_step(tiny(), [live], ALGORITHMS["gcpo"])
    beside = sgd_step(tiny(), [idle, live], ALGORITHMS["gcpo"])
    assert_same(beside, alone / 2)


def test_never_gold_is_gspo_over_several_updates(tiny):
    """GCPO without gold is GSPO also once ratios leave 1: weights after three updates on old
    logprobs, to the bit."""
    def weights(algorithm):
        model, items = tiny(), some_items(gold=False)
        run = run_of(model, algorithm, torch.optim.AdamW(model.parameters(), lr=1e-2))
        for item in items:
            group = item.group
            with torch.no_grad():
                item.old_logprobs, _ = token_logprobs(
                    model, group.prompt, group.responses, 1.0, group.lengths)
        for _ in range(3):
            update(run, items)
        return flat(model.parameters())

    never = replace(ALGORITHMS["gcpo"], gold_when="never")
    assert torch.equal(weights(never), weights(ALGORITHMS["gspo"]))


def test_sft_is_the_likelihood_of_gold(tiny):
    """SFT's gradient is that of the golds' mean token log-likelihood, at temperature 1 whatever
    rollouts are sampled at. (Bug: an SFT arm that is handicapped.)"""
    model, generator = tiny(), torch.Generator().manual_seed(5)
    draw = lambda n: torch.randint(2, 23, (n,), generator=generator)
    items = [Item(0, None, gold_group(draw(4), draw(n)), torch.ones(1)) for n in (3, 7)]
    loss = 0
    for item in items:
        logprobs, _ = token_logprobs(model, item.group.prompt, item.group.responses, 1.0)
        loss -= logprobs.sum() / 10
    expected = flat(torch.autograd.grad(loss, list(model.parameters())))
    assert_same(sgd_step(tiny(), items, ALGORITHMS["sft"]), expected)
