"""GCPO in one file: gold substitution, group advantages and the clipped policy loss.

GCPO: When Contrast Fails, Go Gold (Group Contrastive Policy Optimization, arXiv 2510.07790).

A *group* is one prompt x and G responses y_1 … y_G, sampled from the policy π_old, with rewards
r_1 … r_G. GRPO and its relatives learn from the contrast inside a group: each response is pushed
up or down by how much better it did than its siblings. If no response is correct there is no
contrast, and the hardest problems, which have most to teach, teach nothing.

GCPO then replaces one of the wrong responses by the reference ("gold") answer y*, with reward 1,
and goes on as usual:

    A_i = (r_i − mean r) / (std r + 1e-4), std with G − 1                group_advantages
    s_i = exp( mean_t [ log π_θ(y_i,t) − log π_old(y_i,t) ] )            log_ratio
    J   = mean_i min( s_i A_i, clip(s_i, 1 − ε_low, 1 + ε_high) A_i )    policy_loss, which is −J

mean_t is over a response's tokens, mean_i over all rows of an update. One importance ratio per
sequence (as in GSPO), no KL penalty, no value network, no reward model.

We had the paper's abstract and its authors' summaries, not its method section. They are clear on
four points: gold only if all rollouts fail, one rollout replaced, a sequence-level ratio, no KL.
Advantages and aggregation follow another paper's table (README, "What the paper leaves open"). The
rest is our choice.

Nearly every choice is a switch of `Algorithm`, and each algorithm of the literature is one setting
of the switches. Both stand at the end of this file: look there first. GCPO's setting:

    gold_slot     a random wrong rollout gives way; `longest` would spare long failures their
                  negative gradient, which is a length bias
    gold_old      π_old of gold, which π_old never sampled, is the policy's own probability before
                  the batch's first update: gold's ratio starts at 1, like every other row's
    gold_shape    gold's ratio is not transformed (LUFFY's transform is there to compare)
    gold_clip     gold's ratio may rise by 0.2, and fall without limit: earlier updates of a batch,
                  on other groups, often move it by more than GSPO's 4e-4, and gold would then have
                  no gradient
    clip_low      3e-4, and clip_high 4e-4: GSPO's, for a sequence ratio
    aggregation   the loss is a mean over rows of token means, as in GSPO
    scale         advantages are divided by the standard deviation, as in GRPO

Letters: G rows of one group, N rows of any groups stacked, P prompt length, T response length.
No function writes into a tensor that it was given.
"""
from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor


ADVANTAGE_EPS = 1e-4    # damps A if rewards hardly differ (GRPO as TRL computes it)
LOG_RATIO_LIMIT = 20.0  # e^20 is far outside any clip range, and still finite in fp32 and bf16
SHAPE_GAMMA = 0.1       # LUFFY's γ (arXiv 2504.14945)


# ---- What is trained on --------------------------------------------------------------------------

@dataclass
class Group:
    """One prompt and its G responses: what is sampled, graded, stored and differentiated."""
    prompt: Tensor     # (P,) int64 token ids; never padded, never repeated
    responses: Tensor  # (G, T) int64, right-padded; what stands in the padding does not matter
    lengths: Tensor    # (G,) int64, tokens of each response, its end token included
    finished: Tensor   # (G,) bool, True if the response ended by itself, not by the length limit
    logprobs: Tensor   # (G, T) fp32, the sampler's, with its rounding: a metric, never π_old
    correct: Tensor    # (G,) bool: decides whether gold comes in; gold itself is correct too
    rewards: Tensor    # (G,) fp32: what advantages are made of
    is_gold: Tensor    # (G,) bool, True on the row that is gold

    @property
    def mask(self) -> Tensor:
        """(G, T) bool, from lengths alone: an end token that equals the pad token still counts."""
        T = self.responses.shape[1]
        return torch.arange(T, device=self.lengths.device) < self.lengths[:, None]


# ---- When contrast fails, go gold ----------------------------------------------------------------

def slot_for_gold(group: Group, gold_slot: str, generator: torch.Generator) -> int:
    """The row that gives way to gold: a wrong one, or any if none is wrong."""
    candidates = (~group.correct).nonzero().flatten()
    if len(candidates) == 0:    # only with gold_when="always"
        candidates = torch.arange(len(group.correct))
    if gold_slot == "random":
        return int(candidates[torch.randint(len(candidates), (), generator=generator)])
    if gold_slot == "longest":
        return int(candidates[group.lengths[candidates].argmax()])
    return int(candidates[0])


def substitute_gold(
    group: Group,
    gold_ids: Tensor,
    algorithm: Algorithm,
    generator: torch.Generator,
    gold_reward: float = 1.0,
) -> Group:
    """Put gold in place of one rollout, if `algorithm.gold_when` says so (arXiv 2510.07790).

    gold_ids (T*,) are tokenized as a response is, and end with the end token. `gold_reward` is
    gold's grade. Returns the group itself if nothing is replaced, else a new Group, which is wider
    if gold is longer than every rollout. Gold's sampled logprobs are NaN: nobody sampled it, and a
    loss that used them would show at once."""
    any_right = bool(group.correct.any())
    if algorithm.gold_when == "never" or (algorithm.gold_when == "all_wrong" and any_right):
        return group
    row = slot_for_gold(group, algorithm.gold_slot, generator)

    G, T = group.responses.shape
    width = max(T, len(gold_ids))
    responses = group.responses.new_zeros(G, width)    # (G, width)
    responses[:, :T] = group.responses
    responses[row, :len(gold_ids)] = gold_ids          # what is left of the old row is padding
    logprobs = group.logprobs.new_zeros(G, width)      # (G, width)
    logprobs[:, :T] = group.logprobs
    logprobs[row] = float("nan")

    of_gold = dict(
        lengths=len(gold_ids), finished=True, correct=True, rewards=gold_reward, is_gold=True)
    columns = {name: getattr(group, name).clone() for name in of_gold}    # (G,) each
    for name, value in of_gold.items():
        columns[name][row] = value
    return replace(group, responses=responses, logprobs=logprobs, **columns)


def gold_group(prompt: Tensor, gold_ids: Tensor) -> Group:
    """A group of gold alone, G = 1. SFT is this group with advantage 1 and ratio 1."""
    yes = torch.ones(1, dtype=torch.bool)
    length = len(gold_ids)
    return Group(
        prompt=prompt, responses=gold_ids[None], lengths=torch.tensor([length]), finished=yes,
        logprobs=torch.full((1, length), float("nan")), correct=yes, rewards=torch.ones(1),
        is_gold=yes)


# ---- Advantages ----------------------------------------------------------------------------------

def group_advantages(rewards: Tensor, scale: str = "std") -> Tensor:
    """How much better each response did than its group: rewards (G,) -> advantages (G,), fp32.

    Equal rewards give exactly 0, even if their mean is rounded: 0.1 eight times must not be noise.
    scale="mean" raises ValueError for a negative reward, unless all are equal: a negative mean
    would turn every sign. Without one the mean is at least 1/G of the best, so A is at most G − 1.

    >>> group_advantages(torch.tensor([1., 0, 0, 0, 0, 0, 0, 0]))       # gold among seven failures
    tensor([ 2.4742, -0.3535, -0.3535, -0.3535, -0.3535, -0.3535, -0.3535, -0.3535])
    """
    rewards = rewards.float()
    if rewards.max() == rewards.min():
        return torch.zeros_like(rewards)
    advantages = rewards - rewards.mean()
    if scale == "std":
        advantages = advantages / (rewards.std(correction=1) + ADVANTAGE_EPS)
    if scale == "mean":
        if rewards.min() < 0:
            raise ValueError(f"scale=mean: a reward is {rewards.min():g}; it must be 0 or more")
        advantages = advantages / rewards.mean()
    return advantages


def advantages_of(group: Group, algorithm: Algorithm) -> Tensor:
    """Advantages (G,) of a group that is trained on, with gold in it if it gets any.

    If all of 8 rollouts are wrong:

                 gold's    each wrong one's
        gcpo      2.474        −0.354
        dyme      1             0
        ngrpo    no gold       −0.333
        grpo     no gold        0
    """
    rewards, when = group.rewards, algorithm.virtual_right
    if when == "always" or (when == "all_wrong" and not group.correct.any()):
        rewards = torch.cat([rewards, rewards.new_ones(1)])                         # (G + 1,)
    advantages = group_advantages(rewards, algorithm.scale)[:len(group.rewards)]    # (G,)
    if not group.is_gold.any():
        return advantages
    if algorithm.gold_rivals == "zero":
        advantages = torch.where(group.correct, advantages, 0.0)
    if algorithm.gold_advantage == "one":
        advantages = torch.where(group.is_gold, 1.0, advantages)
    return torch.where(group.is_gold, algorithm.gold_weight * advantages, advantages)


def overlong_penalty(lengths: Tensor, max_new_tokens: int, share: float) -> Tensor:
    """DAPO's soft punishment (arXiv 2503.14476, eq. 13): lengths (G,) -> (G,).

    0 up to the last `share` of max_new_tokens, and falling there to −1. It is added to rewards;
    what counts as correct does not change.

    >>> overlong_penalty(torch.tensor([80, 90, 100]), max_new_tokens=100, share=0.2)
    tensor([-0.0000, -0.5000, -1.0000])
    """
    allowed = (1 - share) * max_new_tokens
    span = max(share * max_new_tokens, 1e-9)
    return -((lengths - allowed) / span).clamp(0, 1)


# ---- The ratio -----------------------------------------------------------------------------------

def masked_sum(x: Tensor, mask: Tensor, dim=None) -> Tensor:
    """Sum where mask is True. `where`, never x · mask: 0 · NaN is NaN."""
    return torch.where(mask, x, 0.0).sum(dim)


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, level: str) -> Tensor:
    """log of the importance ratio π_θ / π_old of every token, (N, T).

    level="token": each token's own (GRPO, eq. 3). level="sequence": the mean over the row's tokens,
    the same at every token of the row (GSPO, eq. 7): a ratio of whole responses, normalised for
    length."""
    difference = torch.where(mask, logprobs - old_logprobs, 0.0)    # (N, T)
    if level == "sequence":
        lengths = mask.sum(1, keepdim=True).clamp(min=1)            # (N, 1)
        difference = (difference.sum(1, keepdim=True) / lengths).expand_as(difference)
    return difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def importance_ratio(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, is_gold: Tensor, algorithm: Algorithm,
) -> Tensor:
    """The ratio that weighs each token, (N, T); gold's as gold_old and gold_shape say."""
    gold = is_gold[:, None]                                         # (N, 1)
    if algorithm.gold_old == "one":
        old_logprobs = torch.where(gold, 0.0, old_logprobs)         # log 1
    ratio = log_ratio(logprobs, old_logprobs, mask, algorithm.level).exp()
    if algorithm.gold_shape == "ratio":    # LUFFY; gold_old is one (NEEDS), so this is p
        p = log_ratio(logprobs, old_logprobs, mask, "token").exp()
        ratio = torch.where(gold, p / (p + SHAPE_GAMMA), ratio)
    return ratio


def is_clipped(ratio: Tensor, low: Tensor, high: Tensor, advantage: Tensor) -> Tensor:
    """Where a ratio has left its range in the direction in which it is pushed."""
    return ((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0))


def clip_range(
    is_gold: Tensor, algorithm: Algorithm, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The lowest and the highest ratio of each row, (N, 1) each.

    Gold has an upper clip of its own, `gold_clip`, and **no lower clip**: that would act only on a
    negative advantage, and gold's is positive whenever it is the best of its group. (In CISPO a
    lower clip would act on every advantage.)"""
    gold = is_gold[:, None]
    one = torch.ones_like(gold, dtype=dtype)
    gold_high = float("inf")
    if algorithm.gold_clip is not None and algorithm.gold_shape == "none":
        gold_high = 1 + algorithm.gold_clip
    low = torch.where(gold, 0.0, one - algorithm.clip_low)
    high = torch.where(gold, gold_high, one + algorithm.clip_high)
    return low, high


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's k3 for KL(π_θ ‖ π_ref), (N, T): its mean over tokens drawn from π_θ is the KL
    divergence, and it is never negative. (expm1, because exp(d) − 1 cancels for a small d.)"""
    d = (ref_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(d) - d


# ---- The loss ------------------------------------------------------------------------------------

class LossContext(NamedTuple):
    """What a loss must know beside its rows: the keyword arguments of policy_loss.

    The totals are those of the whole update (one optimizer step), over all processes and all
    groups, those without contrast too. So losses of its parts add up to the loss of the update,
    however it was cut, and a group weighs the same whether or not its neighbours have contrast."""
    total_rows: float
    total_tokens: float
    max_new_tokens: int | None = None       # for aggregation="fixed_length"
    is_gold: Tensor | None = None           # (N,) bool; None: no row is gold
    ref_logprobs: Tensor | None = None      # (N, T), of the frozen reference model


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    algorithm: Algorithm,
    **context,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate loss of N rows, stacked; they may come from several groups.

    logprobs (N, T) carry the gradient; old_logprobs (N, T), advantages (N,) and mask (N, T) do not.
    train.py scores old_logprobs with the policy before the batch's first update, gold's too.
    `context` are the fields of LossContext: total_rows=, total_tokens=, and others if needed.
    If a batch gets one update, pass `logprobs.detach()` as old_logprobs: the ratio is then exactly
    1, and with row_mean dL/dlogprobs is −A_i / (tokens of row i · total_rows), which is not 0.

    Returns (loss, sums), a scalar and scalars for metrics; both add up over an update's parts.
    Raises ValueError for DPO's pairs, whose loss is support/dpo.py."""
    if algorithm.objective == "pairs":
        raise ValueError("objective=pairs: its loss is support.dpo.pair_loss")
    context = LossContext(**context)
    is_gold = context.is_gold
    if is_gold is None:
        is_gold = torch.zeros_like(advantages, dtype=torch.bool)
    advantage = advantages[:, None]                                      # (N, 1)
    logprobs = torch.where(mask, logprobs, 0.0)    # nothing in the padding can reach a gradient
    old_logprobs = torch.where(mask, old_logprobs, 0.0)

    ratio = importance_ratio(logprobs, old_logprobs, mask, is_gold, algorithm)       # (N, T)
    low, high = clip_range(is_gold, algorithm, logprobs.dtype)                       # (N, 1)
    bound = ratio.detach().clamp(low, high)
    if algorithm.objective == "cispo":    # every token keeps its gradient, with a bounded weight
        clipped = (ratio < low) | (ratio > high)                                     # (N, T)
        surrogate = bound * advantage * logprobs
    else:
        # The smaller of ratio · A and clip(ratio) · A. If it is the second, there is no gradient.
        clipped = is_clipped(ratio, low, high, advantage)                            # (N, T)
        surrogate = torch.where(clipped, bound, ratio) * advantage
    token_loss = -surrogate                                                          # (N, T)
    if algorithm.kl_coef > 0:
        ref_logprobs = torch.where(mask, context.ref_logprobs, 0.0)
        kl = kl_estimate(logprobs, ref_logprobs)
        kl = torch.where(is_gold[:, None], 0.0, kl)    # gold was not drawn from π_θ
        token_loss = token_loss + algorithm.kl_coef * kl

    if algorithm.aggregation == "row_mean":
        row_loss = masked_sum(token_loss, mask, dim=1) / mask.sum(1).clamp(min=1)    # (N,)
        loss = row_loss.sum() / context.total_rows
    elif algorithm.aggregation == "token_mean":
        loss = masked_sum(token_loss, mask) / context.total_tokens
    else:
        loss = masked_sum(token_loss, mask) / (context.total_rows * context.max_new_tokens)

    with torch.no_grad():
        sums = metric_sums(logprobs, old_logprobs, ratio, clipped, mask, is_gold)
        if algorithm.kl_coef > 0:
            sums["ref_kl"] = masked_sum(kl, mask & ~is_gold[:, None])
    return loss, sums


def metric_sums(
    logprobs: Tensor, old_logprobs: Tensor, ratio: Tensor, clipped: Tensor, mask: Tensor,
    is_gold: Tensor,
) -> dict[str, Tensor]:
    """Sums over tokens for the metrics: over the policy's own rows, and over gold's."""
    own = mask & ~is_gold[:, None]     # (N, T)
    gold = mask & is_gold[:, None]
    return {
        "policy_tokens": own.sum(),
        "policy_ratio": masked_sum(ratio, own),
        "policy_clipped": (own & clipped).sum(),
        "gold_tokens": gold.sum(),
        "gold_ratio": masked_sum(ratio, gold),
        "gold_clipped": (gold & clipped).sum(),
        "gold_logprob": masked_sum(logprobs, gold),
        "approx_kl": masked_sum(kl_estimate(old_logprobs, logprobs), own),    # KL(π_old ‖ π_θ)
    }


# ---- The switches, and algorithms as settings of them --------------------------------------------

def switch(default, text: str, choices: tuple = ()):
    """A dataclass field that becomes a flag of train.py, with `text` as its line of --help."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Algorithm:
    """Every choice of the family. An algorithm of the literature is one setting of the switches.

    Raises ValueError, "switch=value: why", for values that cannot be or contradict each other."""
    name: str
    paper: str = ""

    # Gold: which groups get it, in whose place, and how it enters the ratio
    gold_when: str = switch("never", "which groups get gold: those with every rollout wrong, all, "
                                     "or none", ("all_wrong", "always", "never"))
    gold_slot: str = switch("random", "which wrong rollout gold replaces (any, if none is wrong)",
                            ("random", "longest", "first"))
    gold_old: str = switch("policy", "π_old of gold: the policy's own probability before the "
                                     "batch's first update, or 1", ("policy", "one"))
    gold_shape: str = switch("none", "ratio: gold's token ratios p become p / (p + 0.1), "
                                     "unclipped (LUFFY)", ("none", "ratio"))
    gold_clip: float | None = switch(None, "gold's own upper clip; none: gold is never clipped")
    gold_rivals: str = switch("keep", "wrong rollouts beside gold keep their advantages, or get 0",
                              ("keep", "zero"))
    gold_advantage: str = switch("group", "gold's advantage: as its group gives it, or 1 as in SFT",
                                 ("group", "one"))
    gold_weight: float = switch(1.0, "factor of gold's advantage, and so of its row's objective")

    # Advantages, the ratio and its clip range, and the loss
    virtual_right: str = switch("never", "which groups count one more reward, a 1, in their mean "
                                         "and deviation (NGRPO): those without a right response, "
                                         "all, or none", ("all_wrong", "always", "never"))
    scale: str = switch("std", "divide a group's advantages by its standard deviation, by nothing "
                               "(Dr. GRPO), or by its mean reward (MaxRL)",
                        ("std", "none", "mean"))
    level: str = switch("token", "one importance ratio per token, or per sequence (the geometric "
                                 "mean of its tokens')", ("sequence", "token"))
    clip_low: float = switch(0.2, "ε_low: what is pushed down has no gradient once its ratio "
                                  "is below 1 − ε_low; cispo: that is the least weight")
    clip_high: float = switch(0.2, "ε_high: what is pushed up has none above 1 + ε_high; "
                                   "cispo: that is the greatest weight")
    aggregation: str = switch("row_mean", "mean over rows of token means | mean over the update's "
                                          "tokens | sum over (rows · max_new_tokens)",
                              ("row_mean", "token_mean", "fixed_length"))
    kl_coef: float = switch(0.0, "weight of a KL penalty of the rollouts against the frozen "
                                 "reference model, the start model, in groups with contrast")
    objective: str = switch("clipped", "the clipped surrogate; cispo: the clipped ratio, without "
                                       "gradient, times A · log π; or DPO's loss of pairs: each "
                                       "response above its group's mean reward with each below",
                            ("clipped", "cispo", "pairs"))
    beta: float = switch(0.1, "DPO's β, with objective pairs")

    # What is sampled and kept: these act in train.py
    train_on: str = switch("rollouts", "rollouts: groups sampled from the policy; right: of these "
                                       "the right responses alone, as in SFT (RFT); gold: gold "
                                       "answers alone (SFT)", ("rollouts", "right", "gold"))
    sft_share: float = switch(0.0, "share of the steps, the first ones, that are SFT on gold (of "
                                   "all switches it heeds --aggregation, if given)")
    resample: str = switch("none", "dynamic: sample further problems until every group has "
                                   "contrast; history: at the end of each epoch drop problems "
                                   "whose rollouts were all right", ("none", "dynamic", "history"))
    max_tries: int = switch(3, "rounds of sampling per step at most, with resample dynamic")
    overlong: float = switch(0.0, "over this last share of max_new_tokens a rollout's reward "
                                  "falls linearly, by 1 in all")

    def __post_init__(self):
        for name, spec in self.__dataclass_fields__.items():
            value = getattr(self, name)
            choices = spec.metadata.get("choices")
            if choices and value not in choices:
                raise ValueError(f"{name}={value}: choose one of {', '.join(choices)}")
        for name in ("clip_low", "clip_high", "gold_clip", "gold_weight", "kl_coef", "beta"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= torch.finfo(torch.float32).max:
                raise ValueError(f"{name}={value}: must be 0 or more, and finite")
        for name in ("overlong", "sft_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be from 0 to 1")
        if self.max_tries < 1:
            raise ValueError(f"max_tries={self.max_tries}: must be 1 or more")
        for name, value, other, allowed, why in NEEDS:
            if getattr(self, name) == value and getattr(self, other) not in allowed:
                raise ValueError(f"{name}={value}: {why}, so it needs {other}="
                                 f"{' or '.join(map(str, allowed))}")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss looks at the frozen reference model, the start model."""
        return self.kl_coef > 0 or self.objective == "pairs"


NEEDS = (    # with a switch at this value, another must be one of these, because …
    ("objective", "pairs", "train_on", ("rollouts",), "pairs are right and wrong rollouts"),
    ("objective", "pairs", "kl_coef", (0,), "the reference model is in the loss already"),
    ("objective", "pairs", "gold_rivals", ("keep",), "a pair is gold and one of its rivals"),
    ("objective", "pairs", "gold_weight", (1,), "of an advantage only the sign counts"),
    ("objective", "pairs", "virtual_right", ("never",), "a virtual reward has no response"),
    ("gold_shape", "ratio", "gold_old", ("one",), "it shapes a probability"),
    ("gold_shape", "ratio", "objective", ("clipped", "pairs"), "cispo would drop its gradient"),
    ("scale", "mean", "overlong", (0,), "rewards must not be negative"),
    ("train_on", "right", "gold_old", ("policy",), "all it trains on has ratio 1"),
    ("train_on", "right", "resample", ("none", "history"), "wrong responses are dropped anyway"))


GRPO = Algorithm("grpo", "arXiv 2402.03300")
GSPO = replace(
    GRPO, name="gspo", paper="arXiv 2507.18071", level="sequence", clip_low=3e-4, clip_high=4e-4)
GCPO = replace(
    GSPO, name="gcpo", paper="arXiv 2510.07790", gold_when="all_wrong", gold_clip=0.2)
DR_GRPO = replace(
    GRPO, name="dr_grpo", paper="arXiv 2503.20783", aggregation="fixed_length", scale="none")
DAPO = replace(
    GRPO, name="dapo", paper="arXiv 2503.14476", aggregation="token_mean", clip_high=0.28,
    resample="dynamic", overlong=0.2)
SRPO = replace(
    GRPO, name="srpo", paper="arXiv 2504.14286", aggregation="token_mean", resample="history")
LUFFY = replace(
    GRPO, name="luffy", paper="arXiv 2504.14945", gold_when="always", gold_old="one",
    gold_shape="ratio", aggregation="token_mean", scale="none")
DYME = replace(
    GRPO, name="dyme", paper="arXiv 2506.23061", gold_when="all_wrong", gold_slot="first",
    gold_clip=0.2, gold_rivals="zero", gold_advantage="one")
NGRPO = replace(
    GRPO, name="ngrpo", paper="arXiv 2509.18851", virtual_right="always", clip_low=0.16,
    clip_high=0.24, aggregation="token_mean", resample="dynamic")
CISPO = replace(    # weights from 0 to 5: ScaleRL's bound (arXiv 2510.13786), as in TRL
    GRPO, name="cispo", paper="arXiv 2506.13585", objective="cispo", clip_low=1.0, clip_high=4.0,
    aggregation="token_mean")
MAXRL = replace(
    GRPO, name="maxrl", paper="arXiv 2602.02710", scale="mean", aggregation="token_mean")
DPO = replace(
    GRPO, name="dpo", paper="arXiv 2305.18290", objective="pairs", gold_when="all_wrong")
SFT = replace(GRPO, name="sft", paper="", train_on="gold", aggregation="token_mean")
SFT_GCPO = replace(GCPO, name="sft_gcpo", sft_share=0.5)
RFT = replace(SFT, name="rft", paper="arXiv 2308.01825", train_on="right", gold_when="always")

ALGORITHMS = {a.name: a for a in (
    GCPO, GRPO, DR_GRPO, DAPO, GSPO, SRPO, CISPO, MAXRL, NGRPO, LUFFY, DYME, DPO, SFT, RFT,
    SFT_GCPO)}
