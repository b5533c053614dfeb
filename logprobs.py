"""Log-probabilities of a group's responses under a model, token by token.

Three rules make it fast, and exact:

    a prompt runs once for all responses of its group, which read its keys and values;
    padding never runs: rows of different lengths are laid end to end, and only attention puts
    each token back in its row (support/ragged.py: Ragged says each token's row and column, and
    pads or flattens; its attention_… functions attend);
    logits never exist as a whole: the last layer goes chunk by chunk, in forward and in backward.

    token_logprobs      one prompt, its responses: for tests and for your own code
    score_responses     any rows of any prompts, in one forward pass
    encode_prompts      the prompts alone, for the sampler, and for groups too large for one pass

Letters: N rows (responses), T response length, M tokens laid end to end, B prompts, P prompt
length, D width, H query heads, K key/value heads, d head size, V vocabulary.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Transformer
from support.ragged import (
    Ragged, RowsAfterPrompts, attention_after_prompts, attention_of_prompts, attention_with_prompts)


# ---- Prompts -------------------------------------------------------------------------------------

@dataclass
class Prefix:
    """What B prompts leave behind for their responses.

    A group too large for one pass runs its prompt once, then its rows a few at a time:

        prompt ──► keys, values, last  ┊cut┊  leaves ──► rows 0 … 3 ──► loss ──► backward ┐
                                       ┊   ┊         ──► rows 4 … 7 ──► loss ──► backward ┤
        prompt ◄── backward            ◄───── gradients collected in the leaves ◄─────────┘

    The gradient is that of a single pass; the memory is that of a few rows."""
    lengths: Tensor         # (B,)
    keys: list[Tensor]      # (B, K, P, d) of each layer, right-padded
    values: list[Tensor]    # (B, K, P, d) of each layer
    last: Tensor            # (B, D) state of each prompt's last token, which predicts a first token

    @property
    def tensors(self) -> list[Tensor]:
        """All that gradients flow through."""
        return [*self.keys, *self.values, self.last]

    def cut(self) -> Prefix:
        """The same values as leaves of a new graph, to collect gradients in."""
        leaf = lambda x: x.detach().requires_grad_()
        keys = [leaf(x) for x in self.keys]
        values = [leaf(x) for x in self.values]
        return Prefix(self.lengths, keys, values, leaf(self.last))

    def backward(self, leaves: Prefix) -> None:
        """The second stage: through the prompts, from what `leaves` have collected."""
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves.tensors]
        torch.autograd.backward(self.tensors, gradients)


def lengths_of(prompts: list[Tensor], device: torch.device) -> Tensor:
    return torch.tensor([len(p) for p in prompts], device=device)    # (B,)


def encode_prompts(model: Transformer, prompts: list[Tensor]) -> Prefix:
    """Run each prompt (P,) once, all of them in one forward pass."""
    lengths = lengths_of(prompts, model.device)
    ragged = Ragged(lengths, max(len(p) for p in prompts))
    attention = attention_of_prompts(model, lengths)
    keys = {}      # by layer: gradient checkpointing calls `attend` again, and must not append
    values = {}

    def attend(layer, q, k, v):                               # (1, heads, M, d) each
        keys[layer] = ragged.pad(k)
        values[layer] = ragged.pad(v)
        return attention(q, k, v)

    tokens = torch.cat(prompts).to(model.device)                                      # (M,)
    hidden = model(tokens[None], attend=attend, positions=ragged.columns[None])[0]    # (M, D)
    last = hidden[lengths.cumsum(0) - 1]                                              # (B, D)
    return Prefix(lengths, list(keys.values()), list(values.values()), last)


# ---- Responses -----------------------------------------------------------------------------------

def score_responses(
    model: Transformer,
    prompts: list[Tensor] | Prefix,
    prompt_of: Tensor,
    responses: Tensor,
    lengths: Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every response token after its prompt.

    responses (N, T) right-padded; lengths (N,) of 1 or more; prompt_of (N,), the prompt 0 … B − 1
    that each row answers. `prompts` are token ids (P,), which then go through the network in the
    same pass as the responses, or what `encode_prompts` made of them. Logits are divided by
    `temperature`.

    Returns logprobs (N, T) fp32, with gradient to the weights and to a Prefix, and entropy (N, T)
    fp32 in nats, without gradient. Both are 0 in the padding.

    Which state predicts which token, for a prompt p q and the response a b c:

        input     p   q   a   b   (c)      c predicts nothing here, so it does not run
        predicts      a   b   c            `last`, the prompt's, predicts the first token
    """
    N, T = responses.shape
    apart = isinstance(prompts, Prefix)
    prompt_lengths = prompts.lengths if apart else lengths_of(prompts, responses.device)
    inputs = Ragged(lengths - 1, T - 1)    # all tokens but each row's last: M of them
    tokens = responses[inputs.rows, inputs.columns]                             # (M,)
    positions = prompt_lengths[prompt_of[inputs.rows]] + inputs.columns         # (M,)
    longer = lengths > 1                   # a row of one token has no input of its own
    after = RowsAfterPrompts(lengths[longer] - 1, prompt_lengths, prompt_of[longer])

    if apart:
        last = prompts.last
        hidden = run_after(model, prompts, after, tokens, positions)
    else:
        last, hidden = run_with_prompts(model, prompts, after, tokens, positions)

    states = torch.cat([last.index_select(0, prompt_of), hidden])               # (N + M, D)
    # Row and column of the token that each state predicts
    rows = torch.cat([torch.arange(N, device=responses.device), inputs.rows])
    columns = torch.cat([torch.zeros_like(prompt_of), inputs.columns + 1])
    logprobs, entropy = linear_logprobs(
        states, model.output_weight, responses[rows, columns], temperature)     # (N + M,)
    grid = logprobs.new_zeros(N, T)
    return grid.index_put((rows, columns), logprobs), grid.index_put((rows, columns), entropy)


def run_after(
    model, prefix: Prefix, rows: RowsAfterPrompts, tokens: Tensor, positions: Tensor,
) -> Tensor:
    """Response tokens (M,) after prompts that have run already -> hidden (M, D)."""
    if len(tokens) == 0:
        return prefix.last[:0]
    attention = attention_after_prompts(model, rows)

    def attend(layer, q, k, v):
        return attention(q, k, v, prefix.keys[layer], prefix.values[layer])

    return model(tokens[None], attend=attend, positions=positions[None])[0]


def run_with_prompts(
    model, prompts: list[Tensor], rows: RowsAfterPrompts, tokens: Tensor, positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """Prompts and response tokens (M,) in one pass -> prompts' last (B, D), hidden (M, D)."""
    attention = attention_with_prompts(model, rows)
    all_tokens = torch.cat([*(p.to(tokens.device) for p in prompts), tokens])
    in_prompts = Ragged(rows.prompt_lengths, max(len(p) for p in prompts))
    all_positions = torch.cat([in_prompts.columns, positions])
    hidden = model(
        all_tokens[None], attend=lambda layer, q, k, v: attention(q, k, v),
        positions=all_positions[None])[0]
    prompt_hidden, hidden = hidden.split([len(all_tokens) - len(tokens), len(tokens)])
    return prompt_hidden.index_select(0, rows.prompt_lengths.cumsum(0) - 1), hidden


def token_logprobs(
    model: Transformer, prompt: Tensor, responses: Tensor, temperature: float = 1.0,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log π(token | what stands before it) of G responses to one prompt, and the entropy there.

    prompt (P,), responses (G, T), lengths (G,) or None for T each; the logits are divided by
    `temperature`. Returns logprobs (G, T) fp32, with gradient, and entropy (G, T) fp32, without."""
    if lengths is None:
        lengths = torch.full((len(responses),), responses.shape[1], device=responses.device)
    prompt_of = torch.zeros_like(lengths)
    return score_responses(model, [prompt], prompt_of, responses, lengths, temperature)


# ---- The last layer ------------------------------------------------------------------------------

# Logits of one chunk: 64 MiB in fp32 on a CPU, 512 MiB on a GPU. More make its products no faster
# on the one, and by 5 % at most on the other (docs/speed.md).
LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**27}


class LinearLogprobs(torch.autograd.Function):
    """log softmax(hidden Wᵀ / temperature) at the targets, chunk by chunk.

    Backward computes the logits again. With g = dL/dlogprob of one token and p its softmax,

        dL/dlogits = −g (p − onehot(target)) / temperature
    """
    @staticmethod
    def chunks(hidden, weight):
        size = max(1, LOGITS_AT_ONCE[weight.device.type] // len(weight))
        return [slice(i, i + size) for i in range(0, len(hidden), size)]

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        logprobs, entropies, logsumexps = [], [], []
        for chunk in LinearLogprobs.chunks(hidden, weight):
            logits = F.linear(hidden[chunk], weight)                              # (chunk, V)
            # Logits may come in bf16; their softmax is never computed in it.
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if temperature != 1:
                logits.div_(temperature)
            p = logits.softmax(-1)
            # log p = logit − lse, and p is there: the likeliest token tells lse. (A fifth of
            # logsumexp's time.)
            lse = logits.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()  # (chunk, 1)
            target = logits.gather(1, targets[chunk, None])                       # (chunk, 1)
            logprobs.append((target - lse)[:, 0])
            # Σ p · logit, as a product: without a (chunk, V) tensor of its terms
            mean_logit = (p[:, None] @ logits[:, :, None])[:, 0, 0]
            entropies.append(lse[:, 0] - mean_logit)                              # −Σ p log p
            logsumexps.append(lse)
        entropy = torch.cat(entropies)
        ctx.save_for_backward(hidden, weight, targets, torch.cat(logsumexps))
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, logsumexp = ctx.saved_tensors
        chunks = LinearLogprobs.chunks(hidden, weight)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = None
        for chunk in chunks:
            logits = F.linear(hidden[chunk], weight)                              # (chunk, V)
            p = torch.add(-logsumexp[chunk], logits, alpha=1 / ctx.temperature).exp_()
            p.scatter_add_(1, targets[chunk, None], p.new_full((len(p), 1), -1.0))
            p.mul_(-grad[chunk, None] / ctx.temperature)
            grad_logits = logits.copy_(p)                                         # in their place
            torch.mm(grad_logits, weight, out=grad_hidden[chunk])
            if not ctx.needs_input_grad[1]:
                continue
            product = grad_logits.T @ hidden[chunk]                               # (V, D)
            if grad_weight is not None:
                grad_weight.add_(product)
            elif len(chunks) > 1:
                grad_weight = product.to(grad.dtype)                              # summed in fp32
            else:
                grad_weight = product
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def linear_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """hidden (n, D), weight (V, D), targets (n,) -> logprobs (n,) and entropy (n,), at least fp32;
    entropy has no gradient."""
    return LinearLogprobs.apply(hidden, weight, targets, temperature)
