"""logprobs.py, and what support/ makes fast for it, against the slow way of computing the same.

The oracles are a full forward pass for each sequence, through transformers or through our own
network, and finite differences for the gradients written by hand.
"""
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical

import logprobs as logprobs_module
from helpers import SMALL, file_name, make_folder, oracle, pretend_flash, relative
from logprobs import encode_prompts, linear_logprobs, score_responses, token_logprobs
from model import load_model, rope_frequencies
from support import cpu


@pytest.fixture(params=["masks", "FlashAttention"])
def attention(request, monkeypatch):
    """The two ways in which rows attend, so that both are tested on every machine."""
    if request.param == "FlashAttention":
        pretend_flash(monkeypatch)


BOTH_WAYS = pytest.mark.usefixtures("attention")


# ---- Helpers -------------------------------------------------------------------------------------

def some_group(lengths, prompt_length=9, seed=1):
    """prompt (P,), responses (G, T) with arbitrary ids in the padding, lengths (G,)."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = SMALL["vocab_size"]
    prompt = torch.randint(vocabulary, (prompt_length,), generator=generator)
    shape = (len(lengths), max(lengths))
    responses = torch.randint(vocabulary, shape, generator=generator)
    return prompt, responses, torch.tensor(lengths)


def real_tokens(responses, lengths):
    return torch.arange(responses.shape[1]) < lengths[:, None]                      # (G, T)


def plain_logprobs(logits_of, prompt, responses, lengths, temperature):
    """What token_logprobs must give, the slow way: every sequence alone and whole, with all its
    logits in memory.

    logits_of: tokens (1, P + n) -> logits (1, P + n, V).
    Returns logprobs (G, T) and entropy (G, T), both 0 in the padding."""
    rows = []
    entropies = []
    for response, n in zip(responses, lengths.tolist()):
        sequence = torch.cat([prompt, response[:n]])
        logits = logits_of(sequence[None])[0]                                       # (P + n, V)
        logp = (logits[len(prompt) - 1:-1] / temperature).log_softmax(-1)           # (n, V)
        chosen = logp.gather(1, response[:n, None])[:, 0]                           # (n,)
        entropy = Categorical(logits=logp.detach()).entropy()                       # (n,)
        padding = (0, responses.shape[1] - n)
        rows.append(F.pad(chosen, padding))
        entropies.append(F.pad(entropy, padding))
    return torch.stack(rows), torch.stack(entropies)


def collected(network, rename=lambda name: name):
    return {rename(name): p.grad.clone() for name, p in network.named_parameters()}


def gradients(network, loss, rename=lambda name: name):
    network.zero_grad()
    loss.backward()
    return collected(network, rename)


def assert_same_gradients(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        nothing = f"{name} has no gradient, so comparing it shows nothing"
        assert theirs[name].abs().max() > 0, nothing
        difference = relative(ours[name], theirs[name])
        assert difference < tolerance, f"{name}: {difference}"


def weights_like(tensor, seed=3):
    """One number per token: in a loss made with them, tokens that changed places show."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)


# ---- One group: the prompt once, the padding never -----------------------------------------------

@pytest.mark.parametrize("family, lengths, extra", [
    ("llama", [5, 1, 8, 3], dict(rope="llama3", attention_bias=True)),
    ("mistral", [2, 7], dict(sliding_window=None, head_dim=8, tie_word_embeddings=True)),
    ("qwen2", [4, 1, 6], dict(num_key_value_heads=1)),
    ("qwen3", [3, 9, 9, 1], dict(head_dim=10)),
    ("smollm3", [3, 9], dict(no_rope_layers=[0, 1])),
    ("olmo2", [6, 2, 2], dict()),
    ("granite", [1, 7], dict(
        embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.7,
        logits_scaling=0.5)),
], ids=["llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "granite"])
@BOTH_WAYS
def test_group_equals_full_sequences_through_transformers(family, lengths, extra, tmp_path):
    """A group that shares its prompt has the log-probabilities, entropies and gradients that
    transformers gives its sequences one by one. (Bugs: a causal flag with a cache; positions that
    start again at 0; a mask or a target off by one; a temperature on one side only; a gradient that
    stops at the prompt.)"""
    folder = make_folder(tmp_path, family, **extra)
    prompt, responses, lengths = some_group(lengths)
    model = load_model(folder)
    reference = oracle(folder)

    logits_of = lambda tokens: reference(tokens).logits
    theirs, exact_entropy = plain_logprobs(logits_of, prompt, responses, lengths, 0.7)
    ours, entropy = token_logprobs(model, prompt, responses, 0.7, lengths)
    assert ours.shape == entropy.shape == responses.shape
    assert ours.dtype == entropy.dtype == torch.float32
    assert not entropy.requires_grad
    assert relative(ours, theirs) < 1e-5
    assert relative(entropy, exact_entropy) < 1e-5

    w = weights_like(ours)
    our_gradients = gradients(model, (w * ours).sum(), file_name)
    their_gradients = gradients(reference, (w * theirs).sum())
    assert_same_gradients(our_gradients, their_gradients, 1e-5)


@pytest.mark.parametrize("prompt_length, lengths, temperature", [
    (6, [4, 1, 7, 2], 1.3),
    (6, [5, 5, 5], 0.5),      # no padding
    (6, [1, 1, 1], 0.7),      # T = 1: no response token ever goes through the network
    (6, [1], 1.0),
    (6, [8], 1.0),            # G = 1, as in SFT
    (1, [3, 1, 4], 0.9),      # the shortest prompt
])
@BOTH_WAYS
def test_group_equals_full_sequences_in_float64(prompt_length, lengths, temperature, tmp_path):
    """In float64 the same holds against our own network, also for the smallest shapes. (Bug: errors
    small enough to pass for fp32 noise, or only where T, G or P is 1.)"""
    model = load_model(make_folder(tmp_path, "qwen2"), dtype=torch.float64)
    prompt, responses, lengths = some_group(lengths, prompt_length)
    logits_of = lambda tokens: model.logits(model(tokens))
    theirs, exact_entropy = plain_logprobs(logits_of, prompt, responses, lengths, temperature)
    w = weights_like(theirs)
    expected = gradients(model, (w * theirs).sum())

    ours, entropy = token_logprobs(model, prompt, responses, temperature, lengths)
    assert relative(ours, theirs) < 1e-12
    assert relative(entropy, exact_entropy) < 1e-12
    assert_same_gradients(gradients(model, (w * ours).sum()), expected, 1e-10)


def test_lengths_default_to_the_full_width(tmp_path):
    """Without lengths every column counts, even where end tokens stand at the end of a row. (Bug:
    lengths guessed from the ids, which leaves the end token out of the loss.)"""
    model = load_model(make_folder(tmp_path))
    prompt, responses, _ = some_group([6, 6, 6])
    responses[0, -1] = SMALL["eos_token_id"]
    responses[1, -3:] = SMALL["eos_token_id"]
    without = token_logprobs(model, prompt, responses)
    given = token_logprobs(model, prompt, responses, 1.0, torch.full((3,), 6))
    assert all(torch.equal(a, b) for a, b in zip(without, given))


@BOTH_WAYS
def test_padding_does_not_matter(tmp_path):
    """What stands in the padding changes no bit of a value or a gradient, even if it is no token of
    the vocabulary, and more padding changes them by rounding alone. (Bug: padding that leaks.)"""
    model = load_model(make_folder(tmp_path))
    prompt, responses, lengths = some_group([5, 1, 8, 3])
    real = real_tokens(responses, lengths)
    w = weights_like(responses.float())

    def score(responses):
        """Of the first 8 columns; the others must hold nothing."""
        logprobs, entropy = token_logprobs(model, prompt, responses, 0.8, lengths)
        assert (logprobs[:, 8:] == 0).all()
        logprobs = logprobs[:, :8]
        entropy = entropy[:, :8]
        assert (logprobs[~real] == 0).all()
        assert (entropy[~real] == 0).all()
        return logprobs, entropy, gradients(model, (w * logprobs).sum())

    expected_logprobs, expected_entropy, expected_grads = score(responses)
    for filler in (0, SMALL["eos_token_id"], -1, 10**6):
        logprobs, entropy, grads = score(responses.where(real, filler))
        assert torch.equal(logprobs, expected_logprobs)
        assert torch.equal(entropy, expected_entropy)
        assert all(torch.equal(grads[name], expected_grads[name]) for name in grads)

    logprobs, entropy, grads = score(F.pad(responses, (0, 5), value=7))
    assert relative(logprobs, expected_logprobs) < 1e-6
    assert relative(entropy, expected_entropy) < 1e-6
    assert_same_gradients(grads, expected_grads, 1e-5)


@BOTH_WAYS
def test_prompt_runs_once_and_padding_never(tmp_path):
    """A prompt goes through the network once, its responses follow without their padding. (Bug: a
    prompt that runs G times, or padding that costs as much as text.)"""
    model = load_model(make_folder(tmp_path))
    prompt, responses, lengths = some_group([5, 1, 8, 3])
    seen = []

    def count(module, inputs, output):
        seen.append(inputs[0].numel())

    model.embed_tokens.register_forward_hook(count)
    token_logprobs(model, prompt, responses, 1.0, lengths)
    # A response's last token predicts nothing, so it need not run.
    assert sum(seen) == len(prompt) + (lengths - 1).sum()


@BOTH_WAYS
def test_rows_do_not_see_each_other(tmp_path):
    """A row scores in its group as it does alone. (Bug: attention from one response to another.)"""
    model = load_model(make_folder(tmp_path, "qwen3"))
    prompt, responses, lengths = some_group([5, 2, 8, 3])
    together, _ = token_logprobs(model, prompt, responses, 1.0, lengths)
    for row, n in enumerate(lengths.tolist()):
        alone, _ = token_logprobs(model, prompt, responses[row:row + 1, :n])
        assert relative(together[row, :n], alone[0]) < 1e-5


@BOTH_WAYS
def test_scoring_after_inference_mode(tmp_path):
    """Scoring and its gradient are the same, to the bit, if the model has sampled before. (Bug: a
    cache that survives, here the rope frequencies made in inference mode, which no backward may
    use.)"""
    folder = make_folder(tmp_path)
    prompt, responses, lengths = some_group([5, 1, 3])
    results = []
    for sample_first in (False, True):
        rope_frequencies.cache_clear()
        model = load_model(folder)
        if sample_first:
            with torch.inference_mode():
                model(prompt[None])
        logprobs, _ = token_logprobs(model, prompt, responses, 1.0, lengths)
        results.append((logprobs, gradients(model, logprobs.sum())))
    (logprobs, grads), (logprobs_after, grads_after) = results
    assert torch.equal(logprobs, logprobs_after)
    assert all(torch.equal(grads[name], grads_after[name]) for name in grads)


# ---- Several passes for one group, several groups in one pass ------------------------------------

PASSES = {
    "one": [[0, 1, 2, 3, 4]],
    "three": [[0, 1], [2, 3], [4]],
    "shuffled": [[4], [2, 0], [3, 1]],
}


@BOTH_WAYS
@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES.keys())
def test_two_stage_backward_equals_one(passes, tmp_path):
    """Rows that take several passes behind a cut prompt give the gradient of a single pass. (Bug: a
    gradient that depends on how many passes a group takes, as with a loss normalised per
    micro-batch.)"""
    model = load_model(make_folder(tmp_path, "qwen2"))
    prompt, responses, lengths = some_group([5, 1, 8, 3, 6])
    w = weights_like(responses.float())
    whole, _ = token_logprobs(model, prompt, responses, 0.7, lengths)
    expected = gradients(model, (w * whole).sum())

    model.zero_grad()
    prefix = encode_prompts(model, [prompt])
    leaves = prefix.cut()
    for rows in passes:
        T = int(lengths[rows].max())
        prompt_of = torch.zeros(len(rows), dtype=torch.long)
        logprobs, _ = score_responses(
            model, leaves, prompt_of, responses[rows, :T], lengths[rows], 0.7)
        assert relative(logprobs, whole[rows, :T]) < 1e-5
        (w[rows, :T] * logprobs).sum().backward()
    prefix.backward(leaves)
    assert_same_gradients(collected(model), expected, 1e-5)


@BOTH_WAYS
def test_groups_scored_together_equal_groups_scored_alone(tmp_path):
    """Groups that share a pass have the values and gradients of groups scored one by one. (Bugs:
    rows that read another group's prompt; a result that depends on which groups share a pass.)"""
    model = load_model(make_folder(tmp_path, "qwen3"))
    generator = torch.Generator().manual_seed(4)
    some_ids = lambda *shape: torch.randint(SMALL["vocab_size"], shape, generator=generator)
    prompts = [some_ids(n) for n in (3, 9, 1)]
    prompt_of = torch.tensor([0, 1, 1, 2, 0])
    lengths = torch.tensor([4, 1, 7, 2, 5])
    responses = some_ids(5, 7)
    w = weights_like(responses.float())
    alone = torch.zeros(5, 7)
    for i, prompt in enumerate(prompts):
        rows = (prompt_of == i).nonzero().flatten()
        logprobs, _ = token_logprobs(model, prompt, responses[rows], 0.7, lengths[rows])
        alone = alone.index_put((rows,), logprobs)
    expected = gradients(model, (w * alone).sum())
    for given in (prompts, encode_prompts(model, prompts)):
        together, _ = score_responses(model, given, prompt_of, responses, lengths, 0.7)
        assert relative(together, alone) < 1e-5
        assert_same_gradients(gradients(model, (w * together).sum()), expected, 1e-5)


@BOTH_WAYS
@pytest.mark.parametrize("at_once", [1, 500, 10**9], ids=["row by row", "a few rows", "all rows"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "gradient checkpointing"])
def test_memory_settings_change_no_gradient(again, at_once, tmp_path, monkeypatch):
    """However many rows attend at a time, and whether or not blocks run again in backward, the
    gradient is that of plain causal attention over full sequences, one by one. (Bugs: attention
    that depends on its part's size; checkpointing that runs a block again with other keys.)"""
    model = load_model(make_folder(tmp_path, "qwen3"))
    generator = torch.Generator().manual_seed(4)
    some_ids = lambda *shape: torch.randint(SMALL["vocab_size"], shape, generator=generator)
    prompts = [some_ids(n) for n in (3, 9)]
    prompt_of = torch.tensor([0, 1, 1, 0])
    lengths = torch.tensor([4, 1, 7, 5])
    responses = some_ids(4, 7)
    plain = 0
    for i, ids, n in zip(prompt_of.tolist(), responses, lengths.tolist()):
        sequence = torch.cat([prompts[i], ids[:n]])
        logits = model.logits(model(sequence[None]))[0]
        logp = (logits[len(prompts[i]) - 1:-1] / 0.7).log_softmax(-1)               # (n, V)
        plain = plain + logp.gather(1, ids[:n, None]).sum()
    expected = gradients(model, plain)

    monkeypatch.setattr(cpu, "SCORES_AT_ONCE", at_once)
    model.gradient_checkpointing = again
    together, _ = score_responses(model, prompts, prompt_of, responses, lengths, 0.7)
    assert_same_gradients(gradients(model, together.sum()), expected, 1e-5)

    model.zero_grad()
    prefix = encode_prompts(model, prompts)
    leaves = prefix.cut()
    logprobs, _ = score_responses(model, leaves, prompt_of, responses, lengths, 0.7)
    logprobs.sum().backward()
    prefix.backward(leaves)
    assert_same_gradients(collected(model), expected, 1e-5)


# ---- The last layer: linear_logprobs, whose gradient is written by hand --------------------------

def some_linear(n=7, width=5, vocab=11, dtype=torch.float64, scale=1.0):
    """hidden (n, D), weight (V, D), targets (n,); one target stands twice, as tokens do."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, width, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (n,), generator=generator)
    targets[-1] = targets[0]
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


@pytest.mark.parametrize("rows_at_once", [1, 3, 7], ids=["7-chunks", "3-chunks", "1-chunk"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_hand_written_gradient(temperature, rows_at_once, monkeypatch):
    """The gradient written by hand is that of finite differences, over whole and broken chunks.
    (Bug: an error in the backward.)"""
    hidden, weight, targets = some_linear()
    monkeypatch.setitem(logprobs_module.LOGITS_AT_ONCE, "cpu", rows_at_once * len(weight))
    function = lambda h, w: linear_logprobs(h, w, targets, temperature)
    assert torch.autograd.gradcheck(function, (hidden, weight))


def test_chunks_do_not_matter(monkeypatch):
    """Values and gradients are those of one plain log-softmax for every memory setting, and no
    chunk is larger than the setting allows. (Bug: a result that depends on the chunks.)"""
    hidden, weight, targets = some_linear(n=10)
    V = len(weight)
    linear = F.linear
    rows = []

    def counted(hidden, weight):
        rows.append(len(hidden))
        return linear(hidden, weight)

    plain = (F.linear(hidden, weight) / 0.7).log_softmax(-1)                        # (n, V)
    expected = plain.gather(1, targets[:, None])[:, 0]                              # (n,)
    expected_entropy = Categorical(logits=plain).entropy()                          # (n,)
    w = weights_like(expected)
    expected_grads = torch.autograd.grad((w * expected).sum(), (hidden, weight))
    for at_once, most in [(1, 1), (V, 1), (4 * V, 4), (9 * V + 3, 9), (10**6, 10)]:
        rows.clear()
        monkeypatch.setitem(logprobs_module.LOGITS_AT_ONCE, "cpu", at_once)
        monkeypatch.setattr(logprobs_module.F, "linear", counted)
        logprobs, entropy = linear_logprobs(hidden, weight, targets, 0.7)
        grads = torch.autograd.grad((w * logprobs).sum(), (hidden, weight))
        assert max(rows) == most
        assert sum(rows) == 20    # every row once forward and once backward
        assert relative(logprobs, expected) < 1e-12
        assert relative(entropy, expected_entropy) < 1e-12
        assert all(relative(a, b) < 1e-12 for a, b in zip(grads, expected_grads))


def test_log_softmax_is_fp32_for_bf16_inputs():
    """From bf16 inputs come the fp32 log-probabilities of the bf16 logits, within 1e-5. (Bug:
    log-softmax in bf16.)"""
    hidden, weight, targets = some_linear(n=50, width=32, vocab=300, dtype=torch.bfloat16)
    logprobs, entropy = linear_logprobs(hidden, weight, targets, 0.7)
    every = (F.linear(hidden, weight).float() / 0.7).log_softmax(-1)                # (n, V) fp32
    exact = every.gather(1, targets[:, None])[:, 0]
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert (logprobs - exact).abs().max() < 1e-5
    assert relative(entropy, Categorical(logits=every).entropy()) < 1e-5

    ours = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    theirs = torch.autograd.grad(exact.sum(), (hidden, weight))
    for grad, expected in zip(ours, theirs):
        assert grad.dtype == torch.bfloat16
        assert relative(grad, expected) < 0.02


def test_extreme_logits_stay_finite():
    """With logits of ±10^4 every value and gradient is finite, and the entropy almost 0. (Bug:
    exp(logit) overflows, and 0 · log 0 is NaN.)"""
    hidden, weight, targets = some_linear(dtype=torch.float32, scale=1e4)
    logprobs, entropy = linear_logprobs(hidden, weight, targets)
    grads = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    assert logprobs.isfinite().all()
    assert entropy.isfinite().all()
    assert all(g.isfinite().all() for g in grads)
    assert (entropy >= 0).all()
    assert entropy.max() < 1e-3


def test_entropy_has_no_gradient():
    """The log-probabilities have a gradient and the entropy has none. (Bug: a metric that pulls on
    the policy.)"""
    hidden, weight, targets = some_linear()
    logprobs, entropy = linear_logprobs(hidden, weight, targets)
    assert logprobs.requires_grad
    assert not entropy.requires_grad


# ---- What makes a CPU fast: support/cpu.py -------------------------------------------------------

def test_attention_by_hand():
    """The attention written by hand has the values of PyTorch's own, and the gradient of finite
    differences. (Bug: an error in its forward or its backward.)"""
    generator = torch.Generator().manual_seed(0)

    def some(length):
        x = torch.randn(2, 3, length, 4, dtype=torch.float64, generator=generator)
        return x.requires_grad_()

    q, k, v = some(5), some(6), some(6)
    later = torch.ones(5, 6, dtype=torch.bool).triu(2)
    mask = torch.zeros(2, 1, 5, 6).masked_fill(later, float("-inf"))
    attention = lambda q, k, v: cpu.MaskedAttention.apply(q, k, v, mask)
    assert torch.autograd.gradcheck(attention, (q, k, v))
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.double())
    assert relative(attention(q, k, v), exact) < 1e-12


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_packed_weights_compute_the_same(dtype, most, tmp_path):
    """Packed weights give the logits of the weights as they are now, and leave the model as it was.
    (Bugs: a wrong layout; a cache that survives a weight update.)"""
    model = load_model(make_folder(tmp_path, "qwen2")).to(dtype)
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        for _ in range(2):
            plain = model.logits(model(tokens))
            with cpu.packed_weights(model):
                packed = model.logits(model(tokens))
            assert relative(packed, plain) < most
            assert torch.equal(model.logits(model(tokens)), plain)
            for p in model.parameters():
                p.mul_(1.1)


FREE_AND_GIVE_BACK = """
import torch
from support.cpu import give_back_freed_memory, keep_freed_memory

def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * 4096 / 2**20

keep_freed_memory()
blocks = [torch.ones(2**18) for _ in range(1200)]    # 1 MiB each
last = torch.ones(2**18)                             # lives above them
before = resident()
del blocks
kept = resident()
give_back_freed_memory()
print(before - kept, kept - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_memory_goes_back_when_it_has_grown():
    """Freed blocks stay with the process until it is asked to give them back, and then go, even
    from below one that lives. (Bug: a long run that fills the machine with gaps.)"""
    done = subprocess.run(
        [sys.executable, "-c", FREE_AND_GIVE_BACK],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(logprobs_module.__file__),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    kept, returned = map(float, done.stdout.split())
    assert kept < 100
    assert returned > 800
