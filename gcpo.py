"""GCPO in one file: gold substitution, group advantages and the clipped policy loss.

GCPO: When Contrast Fails, Go Gold (Group Contrastive Policy Optimization, arXiv 2510.07790).

A *group* is one prompt x and G responses y_1 … y_G ~ π_old(·|x) with rewards r_1 … r_G. GRPO and its relatives learn
from the contrast inside a group: each response is pushed up or down by how much better it did than its siblings. When
no response is correct there is no contrast, and the hardest problems, the ones with most to teach, teach nothing.
GCPO then replaces one of the wrong responses by the reference ("gold") answer y*, with reward 1, and goes on as usual:

    A_i = (r_i − mean r) / (std r + 1e-4)                                            group_advantages
    s_i = exp( mean_t [ log π_θ(y_i,t) − log π_old(y_i,t) ] )                        log_ratio, level="sequence"
    J   = mean_i  min( s_i A_i , clip(s_i, 1 − ε_low, 1 + ε_high) A_i )              policy_loss returns −J
                  (gold: clip to at most 1 + gold_clip)

One importance ratio per sequence (GSPO's), no KL penalty, no value network, no reward model.

What the paper leaves open, as far as its abstract and its authors' summaries go, which is what we had. (Where its method
section says otherwise, it is right and this list is not.) They settle: gold only when all rollouts fail, one rollout
replaced, a sequence-level ratio, no KL. Each of the following is our choice, and a switch of `Algorithm`:

    gold_slot    which wrong rollout gives way                       a random one: `longest` would spare long failures
                                                                     their negative gradient, a length bias
    gold_old     π_old of a text that π_old never sampled            scored by the policy before the update, so that
                                                                     its ratio starts at 1 like every other row's
    gold_shape   a transform of the gold's ratio                     none (LUFFY's is there to compare)
    gold_clip    the gold's own upper clip range                     0.2: the first update of a batch often moves gold
                                                                     further than GSPO's 4e-4, and the later ones
                                                                     would then give it no gradient
    scale        division by the group's standard deviation          as in GRPO
    clip ranges  the sequence level's                                GSPO's 3e-4 and 4e-4
    aggregation  how token losses become one number                  mean over rows of token means, as in GSPO

Letters: G rows of one group, P prompt length, T response length. `mask` (G, T) is True on a response's own tokens, its
end token included. Every function is pure, tensors in, tensors out, but for the generator that draws gold's slot.
"""
from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


ADVANTAGE_EPS = 1e-4   # keeps A finite when rewards differ by very little (GRPO as TRL computes it)
LOG_RATIO_LIMIT = 20.0  # e^20: a ratio far outside any clip range, and still finite in every dtype
SHAPE_GAMMA = 0.1      # LUFFY's γ (arXiv 2504.14945)


# ---------------------------------------------------------------------------------------------------------------------
# What is trained on

@dataclass
class Group:
    """One prompt and its G responses: what is sampled, graded, stored and differentiated."""
    prompt: Tensor     # (P,) int64 token ids; never padded, never repeated
    responses: Tensor  # (G, T) int64, right-padded; what stands in the padding does not matter
    lengths: Tensor    # (G,) int64, tokens of each response, its end token included
    finished: Tensor   # (G,) bool, True where the response ended by itself, not by the length limit
    logprobs: Tensor   # (G, T) fp32, of each token when it was sampled (the sampler's own arithmetic: a metric, no more)
    correct: Tensor    # (G,) bool, what substitution and pass@k look at
    rewards: Tensor    # (G,) fp32, what advantages look at
    is_gold: Tensor    # (G,) bool, True on a row that is the reference answer

    @property
    def mask(self) -> Tensor:
        """(G, T) bool, from the lengths alone: an end token that equals the pad token still counts."""
        return torch.arange(self.responses.shape[1], device=self.lengths.device) < self.lengths[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# The switches

def switch(default, reason, choices=None):
    return field(default=default, metadata={"help": reason, "choices": choices})


@dataclass(frozen=True)
class Algorithm:
    """Every choice of the family. An algorithm of the literature is one setting of these switches."""
    name: str
    paper: str = ""
    train_on: str = switch("rollouts", "rollouts: groups sampled from the policy; gold: the reference answers alone (SFT)", ("rollouts", "gold"))
    gold_when: str = switch("never", "which groups get a gold answer: those with every rollout wrong, all, none", ("all_wrong", "always", "never"))
    gold_slot: str = switch("random", "which wrong rollout the gold replaces (where none is wrong, any)", ("random", "longest", "first"))
    gold_old: str = switch("policy", "π_old of gold: scored by the policy before the update, or taken to be one", ("policy", "one"))
    gold_shape: str = switch("none", "ratio: gold's token ratios p become p / (p + 0.1), unclipped (LUFFY)", ("none", "ratio"))
    gold_clip: float | None = switch(None, "the gold's own upper clip range; none: unclipped")
    level: str = switch("token", "importance ratio per token, or one per sequence (the geometric mean of its tokens')", ("sequence", "token"))
    aggregation: str = switch("row_mean", "mean over rows of token means | mean over the step's tokens | sum over (rows · max_new_tokens)", ("row_mean", "token_mean", "fixed_length"))
    scale: str = switch("std", "divide a group's advantages by its standard deviation, or do not (Dr. GRPO)", ("std", "none"))
    clip_low: float = switch(0.2, "ε_low: no gradient once a bad row's ratio is below 1 − ε_low")
    clip_high: float = switch(0.2, "ε_high: no gradient once a good row's ratio is above 1 + ε_high")
    kl_coef: float = switch(0.0, "weight of a KL penalty of the rollouts against the frozen start model, in groups with contrast (loaded only when it is needed)")
    objective: str = switch("clipped", "the clipped surrogate, or DPO's loss of pairs: each response above its group's mean reward with each below", ("clipped", "pairs"))
    beta: float = switch(0.1, "DPO's β, with pairs")
    resample: str = switch("none", "dynamic: sample further problems until every group has right and wrong responses; history: drop problems whose "
                           "rollouts were all right, at the end of each pass over the data", ("none", "dynamic", "history"))
    max_tries: int = switch(3, "rounds of sampling per step at most, with dynamic")
    overlong: float = switch(0.0, "over this last share of max_new_tokens a rollout's reward falls linearly, by 1 at the limit")
    sft_share: float = switch(0.0, "share of the steps, the first ones, that train on gold alone: SFT, then RL")

    def __post_init__(self):
        for name, spec in self.__dataclass_fields__.items():
            value, choices = getattr(self, name), spec.metadata.get("choices")
            if choices and value not in choices:
                raise ValueError(f"{name}={value}: choose one of {', '.join(choices)}")
        for name in ("clip_low", "clip_high", "gold_clip", "kl_coef", "beta"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value}: must be 0 or more, and finite")
        for name in ("overlong", "sft_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be from 0 to 1")
        if self.max_tries < 1:
            raise ValueError(f"max_tries={self.max_tries}: must be 1 or more")
        if self.objective == "pairs" and self.train_on == "gold":
            raise ValueError("objective=pairs: gold alone (train_on=gold) makes no pairs")
        if self.objective == "pairs" and self.kl_coef > 0:
            raise ValueError("kl_coef: with objective=pairs the reference model is in the loss already; leave it at 0")
        if self.gold_shape == "ratio" and self.gold_old != "one":
            raise ValueError("gold_shape=ratio: it shapes a probability, so it needs gold_old=one")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss looks at the frozen start model."""
        return self.kl_coef > 0 or self.objective == "pairs"


_grpo = Algorithm("grpo", "arXiv 2402.03300")
_gspo = replace(_grpo, name="gspo", paper="arXiv 2507.18071", level="sequence", clip_low=3e-4, clip_high=4e-4)
_gcpo = replace(_gspo, name="gcpo", paper="arXiv 2510.07790", gold_when="all_wrong", gold_clip=0.2)
ALGORITHMS = {a.name: a for a in (
    _gcpo,
    _grpo,
    replace(_grpo, name="dr_grpo", paper="arXiv 2503.20783", aggregation="fixed_length", scale="none"),
    replace(_grpo, name="dapo", paper="arXiv 2503.14476", aggregation="token_mean", clip_high=0.28, resample="dynamic", overlong=0.2),
    _gspo,
    replace(_grpo, name="srpo", paper="arXiv 2504.14286", aggregation="token_mean", resample="history"),
    replace(_grpo, name="luffy", paper="arXiv 2504.14945", gold_when="always", gold_old="one", gold_shape="ratio",
            aggregation="token_mean", scale="none"),
    replace(_grpo, name="dpo", paper="arXiv 2305.18290", objective="pairs", gold_when="all_wrong"),
    replace(_grpo, name="sft", paper="", train_on="gold", aggregation="token_mean"),
    replace(_gcpo, name="sft_gcpo", sft_share=0.5),
)}


# ---------------------------------------------------------------------------------------------------------------------
# When contrast fails, go gold

def substitute_gold(group: Group, gold_ids: Tensor, algorithm: Algorithm, generator: torch.Generator, gold_reward: float = 1.0) -> Group:
    """Put the gold answer in place of one rollout, where `algorithm.gold_when` says so (arXiv 2510.07790).

    `gold_ids` (T*,) is tokenized as a response is and ends with the end token. `gold_reward` is its grade. Returns the
    group itself if nothing is replaced, else a new Group, wider if the gold is longer than every rollout. The row's
    sampled logprobs become NaN: nobody sampled it, and an update that used them would show at once.
    """
    never, any_right = algorithm.gold_when == "never", bool(group.correct.any())
    if never or (algorithm.gold_when == "all_wrong" and any_right):
        return group
    wrong = (~group.correct).nonzero().flatten()
    candidates = wrong if len(wrong) else torch.arange(len(group.correct))  # `always`, and none wrong: any row
    if algorithm.gold_slot == "random":
        row = candidates[torch.randint(len(candidates), (), generator=generator)]
    elif algorithm.gold_slot == "longest":
        row = candidates[group.lengths[candidates].argmax()]
    else:
        row = candidates[0]

    G, T = group.responses.shape
    length = len(gold_ids)
    responses = group.responses.new_zeros(G, max(T, length))
    logprobs = group.logprobs.new_zeros(G, max(T, length))
    responses[:, :T], logprobs[:, :T] = group.responses, group.logprobs
    responses[row, :length], logprobs[row] = gold_ids, float("nan")

    def with_row(column, value):
        column = column.clone()
        column[row] = value
        return column
    return Group(group.prompt, responses, with_row(group.lengths, length), with_row(group.finished, True), logprobs,
                 with_row(group.correct, True), with_row(group.rewards, gold_reward), with_row(group.is_gold, True))


def gold_group(prompt: Tensor, gold_ids: Tensor) -> Group:
    """A group of the gold alone, G = 1: SFT is this group with advantage 1 under token_mean."""
    yes = torch.ones(1, dtype=torch.bool)
    return Group(prompt, gold_ids[None], torch.tensor([len(gold_ids)]), yes, torch.full((1, len(gold_ids)), float("nan")),
                 yes, torch.ones(1), yes)


def group_advantages(rewards: Tensor, scale: str = "std") -> Tensor:
    """How much better each response did than its group: rewards (G,) -> advantages (G,), fp32.

    Equal rewards give exactly 0, also where their mean rounds away from them: 0.1 eight times must not become noise.

    >>> group_advantages(torch.tensor([1., 0, 0, 0, 0, 0, 0, 0]))       # one gold among seven failures
    tensor([ 2.4742, -0.3535, -0.3535, -0.3535, -0.3535, -0.3535, -0.3535, -0.3535])
    """
    rewards = rewards.float()
    if rewards.max() == rewards.min():
        return torch.zeros_like(rewards)
    advantages = rewards - rewards.mean()
    return advantages / (rewards.std(correction=1) + ADVANTAGE_EPS) if scale == "std" else advantages


def overlong_penalty(lengths: Tensor, max_new_tokens: int, share: float) -> Tensor:
    """DAPO's soft punishment (arXiv 2503.14476, eq. 13): lengths (G,) -> (G,), 0 outside the last `share` of
    max_new_tokens and falling there to −1. It shapes rewards; what counts as correct does not change.

    >>> overlong_penalty(torch.tensor([80, 90, 100]), max_new_tokens=100, share=0.2)
    tensor([-0.0000, -0.5000, -1.0000])
    """
    return -((lengths - (1 - share) * max_new_tokens) / max(share * max_new_tokens, 1e-9)).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The loss

def masked_sum(x: Tensor, mask: Tensor, dim=None) -> Tensor:
    """Sum where mask is True. `where`, never x · mask: 0 · NaN is NaN."""
    return torch.where(mask, x, 0.0).sum(dim)


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, level: str) -> Tensor:
    """log of the importance ratio π_θ / π_old for every token, (G, T).

    level="token": each token's own (GRPO, eq. 3). level="sequence": the mean over the row's tokens, the same at every
    token of the row (GSPO, eq. 7): a ratio of whole responses, with length taken out of it.
    """
    difference = torch.where(mask, logprobs - old_logprobs, 0.0)
    if level == "sequence":
        mean = difference.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        difference = mean.expand_as(difference)
    return difference.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's k3 for KL(π_θ ‖ π_ref), (G, T): unbiased over tokens drawn from π_θ, and never negative."""
    d = (ref_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return d.exp() - d - 1


def importance_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, is_gold: Tensor, algorithm: Algorithm) -> tuple[Tensor, Tensor, Tensor]:
    """The ratio (G, T) that weighs each token, and its clip range, low and high (G, 1). Gold has a range of its own, and
    perhaps a shape."""
    gold = is_gold[:, None]
    if algorithm.gold_old == "one":
        old_logprobs = torch.where(gold, 0.0, old_logprobs)                                             # log 1
    ratio = log_ratio(logprobs, old_logprobs, mask, algorithm.level).exp()
    gold_high = float("inf") if algorithm.gold_clip is None else 1 + algorithm.gold_clip
    if algorithm.gold_shape == "ratio":
        p = log_ratio(logprobs, old_logprobs, mask, "token").exp()
        ratio, gold_high = torch.where(gold, p / (p + SHAPE_GAMMA), ratio), float("inf")
    like = torch.ones_like(logprobs[:, :1])
    return ratio, torch.where(gold, 0.0, like - algorithm.clip_low), torch.where(gold, gold_high, like + algorithm.clip_high)    # gold: upper clip only


def pair_loss(logprobs: Tensor, ref_logprobs: Tensor, advantages: Tensor, mask: Tensor, beta: float) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7) inside a group: −log σ(β [(T − ref) of the chosen − (T − ref) of the rejected]), sums over
    tokens, the mean over all pairs of a response above the group's mean reward with one below it: of right or gold with wrong."""
    margin = beta * masked_sum(logprobs - ref_logprobs, mask, dim=1)                                    # (G,)
    pairs = margin[advantages > 0][:, None] - margin[advantages < 0]
    return -torch.nn.functional.logsigmoid(pairs).sum() / max(1, pairs.numel())


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, algorithm: Algorithm, *,
                total_rows: float, total_tokens: float, max_new_tokens: int | None = None,
                is_gold: Tensor | None = None, ref_logprobs: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate loss of some rows, below each other, of any groups (with objective="pairs": of one whole group),
    and sums for the metrics. G is the number of rows in this call.

    logprobs (G, T) carry the gradient; old_logprobs (G, T), advantages (G,), mask (G, T) and is_gold (G,) do not.
    Pass `logprobs.detach()` as old_logprobs when a batch gets one update: the ratio is then exactly 1, and its gradient
    is not 0.

    `total_rows` and `total_tokens` are those of the whole optimizer step, over all groups, those without contrast
    included. They are numbers passed in, so losses of parts of a step add up to the loss of the step, however
    it was cut. Returns (loss, sums): the loss a scalar to minimise, the sums scalars that add up over parts likewise.
    """
    mask_row = mask.sum(1)
    is_gold = torch.zeros_like(advantages, dtype=torch.bool) if is_gold is None else is_gold
    gold, advantage = is_gold[:, None], advantages[:, None]                                             # (G, 1)
    logprobs = torch.where(mask, logprobs, 0.0)          # so that nothing in the padding can reach a gradient
    old_logprobs = torch.where(mask, old_logprobs, 0.0)
    ref_logprobs = None if ref_logprobs is None else torch.where(mask, ref_logprobs, 0.0)
    ratio, low, high = importance_ratio(logprobs, old_logprobs, mask, is_gold, algorithm)
    objective = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)                    # (G, T)

    token_loss = -objective
    if algorithm.kl_coef > 0:
        kl = torch.where(gold, 0.0, kl_estimate(logprobs, ref_logprobs))  # gold was not drawn from π_θ
        token_loss = token_loss + algorithm.kl_coef * kl

    if algorithm.objective == "pairs":                   # the mean over groups, in which one without contrast counts as 0
        loss = pair_loss(logprobs, ref_logprobs, advantages, mask, algorithm.beta) * len(advantages) / total_rows
    elif algorithm.aggregation == "row_mean":
        loss = (masked_sum(token_loss, mask, dim=1) / mask_row.clamp(min=1)).sum() / total_rows
    elif algorithm.aggregation == "token_mean":
        loss = masked_sum(token_loss, mask) / total_tokens
    else:
        loss = masked_sum(token_loss, mask) / (total_rows * max_new_tokens)

    with torch.no_grad():
        clipped = ((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0))  # tokens left without gradient
        clipped &= algorithm.objective == "clipped"
        policy, golden = mask & ~gold, mask & gold
        sums = {
            "policy_tokens": policy.sum(), "policy_ratio": masked_sum(ratio, policy), "policy_clipped": (policy & clipped).sum(),
            "gold_tokens": golden.sum(), "gold_ratio": masked_sum(ratio, golden), "gold_clipped": (golden & clipped).sum(),
            "gold_logprob": masked_sum(logprobs, golden),
            "approx_kl": masked_sum(kl_estimate(old_logprobs, logprobs), policy),  # KL(π_old ‖ π_θ)
        }
        if algorithm.kl_coef > 0:
            sums["ref_kl"] = masked_sum(kl, policy)
    return loss, sums
