"""sampler.py against oracles: transformers' greedy search, the trainer's own scorer, a flat cumulative sum, counting.

The models are tiny and random, with weights large enough that some tokens are likely and others are not. In fp32 they
give the same tokens however the rows are batched, so most tests here compare lists of token ids for equality.
"""
import copy
import itertools
import json
import math
import os
import runpy
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import hypothesis
import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import strategies as st

import evaluate as evaluate_module
import sampler
from data import Problem, load_tokenizer, prepare, read_problems
from evaluate import evaluate, pass_at_k
from gcpo import Group
from grader import grade
from logprobs import token_logprobs
from model import Transformer, load_model, read_config, save_model
from sampler import choose_token, inverse_cdf, prompt_generator, sample


LLAMA = dict(model_type="llama", vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False)
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True}
FAMILIES = {"llama": LLAMA, "qwen3": QWEN3}
STOPS = [0, 7, 21]  # 0 is also what the responses are padded with


# ---------------------------------------------------------------------------------------------------------------------
# Helpers

def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def tiny_model(folder, config, seed=0):
    """Random weights of a standard deviation of 0.2: the logits then have one of about 1, and fp32 is good to 1e-5."""
    write_json(folder / "config.json", config)
    return Transformer(read_config(str(folder))).init_weights(torch.Generator().manual_seed(seed), std=0.2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Shared by the tests: none of them may change it."""
    return tiny_model(tmp_path_factory.mktemp("llama"), LLAMA)


@pytest.fixture(scope="module")
def precise_model(model):
    """The same in fp64. In fp32 about one token in 100,000 falls so near the edge of its interval that rounding decides:
    seldom enough for a test of batch sizes, too often for a file full of comparisons that is to pass on every machine."""
    return copy.deepcopy(model).double()


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """One layer, eleven tokens, fp64: for tests that need thousands of rows or hundreds of calls."""
    return tiny_model(tmp_path_factory.mktemp("small"), {**LLAMA, "vocab_size": 11, "num_hidden_layers": 1, "hidden_size": 16}).double()


@pytest.fixture(params=["asked after every token", "asked after 16 tokens"])
def check(request, monkeypatch):
    """Whether rows have ended is asked after each token on a CPU, and less often on a GPU, where rows and seats are
    rounded up besides. The second device here is a GPU only by the name of its type, so that both ways are tested everywhere."""
    if request.param == "asked after 16 tokens":
        device, start = type("Device", (str,), {"type": "gpu"})("cpu"), sampler.Batch.__init__

        def start_on_device(batch, *args):
            start(batch, *args)
            batch.device, batch.columns, batch.row_unit, batch.seat_unit = device, 7, 5, 3
        monkeypatch.setattr(sampler.Batch, "__init__", start_on_device)


def some_prompts(lengths=(3, 9, 1, 14, 6), vocab_size=LLAMA["vocab_size"], seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator) for n in lengths]


def texts(groups):
    """Every response as a list of token ids: [prompt][row][position]."""
    return [[row[:n].tolist() for row, n in zip(g.responses, g.lengths.tolist())] for g in groups]


def rows_of(groups):
    return [row for rows in texts(groups) for row in rows]


def same_bits(a, b):
    return all(torch.equal(getattr(x, name), getattr(y, name)) for x, y in zip(a, b, strict=True) for name in Group.__dataclass_fields__)


def through_first_stop(row, stop_ids):
    return next((row[:i + 1] for i, token in enumerate(row) if token in stop_ids), row)


# ---------------------------------------------------------------------------------------------------------------------
# Greedy search, against transformers

def transformers_greedy(folder, prompts, max_new_tokens, stop_ids):
    """The same as texts(sample(…)) with one row. Here prompts are padded on the left and ended rows run on, as is usual."""
    from transformers import AutoModelForCausalLM
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    pad = lambda xs: torch.nn.utils.rnn.pad_sequence(xs, batch_first=True, padding_side="left")
    found = network.generate(pad(prompts), attention_mask=pad([torch.ones_like(p) for p in prompts]), do_sample=False,
                             max_new_tokens=max_new_tokens, eos_token_id=stop_ids, pad_token_id=stop_ids[0])
    return [[through_first_stop(row, stop_ids)] for row in found[:, max(map(len, prompts)):].tolist()]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(tmp_path, family):
    """Forbids bug 21, only one of several end tokens honoured, and a cache that reads the wrong keys or positions."""
    network, prompts = tiny_model(tmp_path, FAMILIES[family]), some_prompts((5, 2, 11, 1, 17, 8))
    save_model(network, str(tmp_path / "model"))
    free = texts(sample(network, prompts, 1, 20, temperature=0, stop_ids=[], seed=0))
    stops = sorted({free[0][0][3], free[2][0][7], free[4][0][1]})           # tokens that these texts do come to
    ours = texts(sample(network, prompts, 1, 20, temperature=0, stop_ids=stops, seed=0, max_rows=3))
    assert ours == transformers_greedy(tmp_path / "model", prompts, 20, stops)
    assert {row[-1] for [row] in ours} >= set(stops) and len({len(row) for [row] in ours}) > 2, "stop tokens that stop nothing show nothing"


def test_greedy_equals_transformers_on_a_real_model():
    """Forbids an error too small to change what a tiny model says, such as a rotation that is wrong far from the start."""
    folder = os.environ.get("GCPO_TEST_MODEL")
    if not folder:
        pytest.skip("set GCPO_TEST_MODEL to a model folder")
    tokenizer = load_tokenizer(folder)
    questions = ["What is 2 + 2?", "Name three colours.", "Write a haiku about rain in the mountains.", "Hi!",
                 "What is the capital of France?", "Say only: yes.",
                 "A farmer has 17 sheep and buys 5 more every month. How many sheep does the farmer have after a year?",
                 "Translate to German: good morning, my friend."]
    prompts = [tokenizer.encode_prompt(Problem(question, "0")) for question in questions]
    ours = sample(load_model(folder), prompts, 1, 20, temperature=0, stop_ids=tokenizer.stop_ids, seed=0)
    assert texts(ours) == transformers_greedy(folder, prompts, 20, tokenizer.stop_ids)


# ---------------------------------------------------------------------------------------------------------------------
# What a response is: its logprobs, its end, its mask

@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_the_scorer(tmp_path, family, check):
    """Forbids bug 8: sampling from one distribution and scoring another, here with ragged prompts and a temperature."""
    network = tiny_model(tmp_path, FAMILIES[family])
    groups = sample(network, some_prompts(), 6, 24, temperature=0.7, stop_ids=STOPS, seed=3, max_rows=12)
    assert len({len(row) for row in rows_of(groups)}) > 6, "rows that end together show nothing"
    for group in groups:
        expected, _ = token_logprobs(network, group.prompt, group.responses, 0.7, group.lengths)
        assert group.logprobs.dtype == torch.float32
        torch.testing.assert_close(group.logprobs[group.mask], expected[group.mask], atol=1e-5, rtol=0)
        expected.sum().backward()                   # tensors of inference mode must not reach the trainer


def test_a_response_ends_with_its_first_stop_token(precise_model, check):
    """Forbids bugs 1 and 21: the end token outside the mask (0 is both end and padding), or text that goes on behind it.

    The oracle is the same text sampled without stop tokens, since those change nothing that is drawn before them."""
    prompts, T = some_prompts((4, 1, 7, 12, 2, 9)), 18
    free = texts(sample(precise_model, prompts, 48, T, stop_ids=[], seed=5))
    groups = sample(precise_model, prompts, 48, T, stop_ids=STOPS, seed=5, max_rows=96)
    assert texts(groups) == [[through_first_stop(row, STOPS) for row in rows] for rows in free]
    for group, rows in zip(groups, texts(groups)):
        assert group.finished.tolist() == [row[-1] in STOPS for row in rows]
        assert group.mask.tolist() == [[t < len(row) for t in range(group.responses.shape[1])] for row in rows]
        assert all(len(row) == T for row, finished in zip(rows, group.finished) if not finished)
    ends = [(row[-1] in STOPS, len(row)) for row in rows_of(groups)]
    assert {(True, 1), (True, T), (False, T)} <= set(ends), "no row ends at once, or none with the last token, or none is cut off"
    assert {row[-1] for row in rows_of(groups)} >= set(STOPS)


def test_a_group_belongs_to_its_prompt_and_is_not_graded_yet(model):
    """Forbids bug 12, rows graded against another prompt's answer, which begins with groups in another order."""
    prompts = some_prompts()
    groups = sample(model, prompts, 3, 5, stop_ids=STOPS, seed=0, max_rows=3)
    for prompt, group in zip(prompts, groups, strict=True):
        assert torch.equal(group.prompt, prompt) and group.responses.shape == group.logprobs.shape == (3, group.lengths.max())
        assert not group.correct.any() and not group.rewards.any() and not group.is_gold.any()
    assert sample(model, [], 3, 5, stop_ids=STOPS, seed=0) == []


@pytest.mark.parametrize("wrong", [dict(prompts=[torch.arange(0)]), dict(group_size=0), dict(max_new_tokens=0), dict(temperature=-1.0)],
                         ids=str)
def test_impossible_requests_are_errors(model, wrong):
    """Forbids an endless loop or an empty group where nothing sensible was asked for."""
    with pytest.raises(ValueError, match="sample: needs"):
        sample(model, **{**dict(prompts=some_prompts(), group_size=2, max_new_tokens=3, stop_ids=STOPS, seed=0), **wrong})


# ---------------------------------------------------------------------------------------------------------------------
# What a row says depends on nothing but its seed, its prompt and its place

def test_equal_tokens_for_every_batch_size(model, check):
    """Forbids rows that read a neighbour's cache, or keep an old one's, when rows leave and prompts take their places."""
    prompts, G = some_prompts((3, 9, 1, 14, 6, 2, 20, 5, 5)), 4
    sizes = (9 * G, 1, G, 2 * G + 3, 3 * G, 5 * G, 8 * G, None)
    whole, *others = [sample(model, prompts, G, 24, stop_ids=STOPS, seed=1, max_rows=max_rows) for max_rows in sizes]
    for groups in others:
        assert texts(groups) == texts(whole)
        for a, b in zip(groups, whole):
            torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-5, rtol=0)


def test_equal_tokens_however_prompts_enter(precise_model, monkeypatch):
    """Forbids prompts lost or run in each other's place when a limit on tokens lets fewer enter than there is room for."""
    draw = lambda: texts(sample(precise_model, some_prompts((3, 9, 1, 14, 6, 2, 20)), 3, 12, stop_ids=STOPS, seed=1, max_rows=15))
    expected = draw()
    for limit in (1, 10, 21):
        monkeypatch.setattr(sampler, "PREFILL_TOKENS", limit)
        assert draw() == expected


def test_a_row_does_not_depend_on_the_group_size(precise_model):
    """Forbids random numbers dealt out by batch position: a larger group must begin with the rows of a smaller one."""
    two, five = (texts(sample(precise_model, some_prompts(), G, 12, stop_ids=[], seed=2)) for G in (2, 5))
    assert two == [rows[:2] for rows in five]
    assert all(len(set(map(tuple, rows))) == 5 for rows in five), "rows of a group repeat each other"


def test_a_prompt_does_not_depend_on_the_others(precise_model):
    """Forbids random numbers that depend on order or company: processes that share a step each sample a part of it."""
    prompts, names = some_prompts(), [40, 7, 0, 123456789012, 3]
    draw = lambda part: texts(sample(precise_model, [prompts[i] for i in part], 3, 12, stop_ids=STOPS, seed=(4, 1),
                                     prompt_ids=[names[i] for i in part], max_rows=6))
    whole = draw(range(5))
    for part in ([4, 2, 0, 3, 1], [1, 3], [2]):
        assert draw(part) == [whole[i] for i in part]


def test_a_prompt_that_comes_twice_gets_two_groups(precise_model):
    """Forbids a repeat that says the same again: half of such a batch would be wasted."""
    [prompt] = some_prompts((6,))
    draw = lambda times, **ids: texts(sample(precise_model, [prompt] * times, 3, 12, stop_ids=STOPS, seed=0, max_rows=3, **ids))
    first, second, third = draw(3, prompt_ids=[9, 9, 9])
    assert first != second != third != first
    assert [first] == draw(1, prompt_ids=[9])
    assert len(set(map(str, draw(3)))) == 3


def test_groups_can_be_trained_on(model):
    """Forbids tensors of inference mode in a Group: a loss written by hand over its logprobs and mask must have a backward."""
    group, = sample(model, some_prompts([4]), 3, 5, stop_ids=[1], seed=0)
    weights = torch.ones_like(group.logprobs, requires_grad=True)
    torch.where(group.mask, weights * group.logprobs, 0.0).sum().div(group.lengths.sum()).backward()
    assert torch.equal(weights.grad != 0, group.mask)


def test_seeds_name_streams(model):
    """Forbids a seed, or a step, that is ignored, and a call that gives something else when it is repeated."""
    draw = lambda seed: sample(model, some_prompts(), 3, 12, stop_ids=STOPS, seed=seed)
    assert same_bits(draw(0), draw(0)) and same_bits(draw((0, 5)), draw((0, 5)))
    assert len({str(texts(draw(seed))) for seed in (0, 1, 2**40, (0, 5), (0, 6), (1, 5))}) == 6


def test_streams_do_not_coincide():
    """Forbids (seed, prompt) and (seed, step, prompt) that name the same stream: a held-out problem's random numbers
    would be those of a training step."""
    names = [(seed, i, repeat) for seed in (0, 1, (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 1)) for i in range(3) for repeat in range(3)]
    first = {name: torch.rand(1, generator=prompt_generator(*name), dtype=torch.float64).item() for name in names}
    same = [(a, b) for a, b in itertools.combinations(names, 2) if first[a] == first[b]]
    assert not same, f"{len(same)} pairs of (seed, prompt id, repeat) share a stream, such as {same[0][0]} and {same[0][1]}"


def test_batch_size_does_not_change_the_statistics_in_bf16(model):
    """Forbids an error that rounding would excuse: in bf16 tokens may differ with the batch, but not what they are like."""
    rounded, prompts = copy.deepcopy(model).to(torch.bfloat16), some_prompts((3, 9, 1, 14, 6, 8))
    draw = lambda network, m: sample(network, prompts, 96, 12, stop_ids=[*STOPS, 1, 2, 3], seed=6, max_rows=m)
    runs = {"fp32": draw(model, None), "bf16, alone": draw(rounded, 96), "bf16, together": draw(rounded, 6 * 96)}
    lengths = {name: torch.cat([g.lengths for g in groups]).double() for name, groups in runs.items()}
    logprobs = {name: torch.cat([g.logprobs[g.mask] for g in groups]).double() for name, groups in runs.items()}
    for values in (lengths, logprobs):                      # n = 576 rows, about 4,000 tokens
        error = values["fp32"].std() / math.sqrt(len(values["fp32"]))
        for a, b in itertools.combinations(runs, 2):
            assert (values[a].mean() - values[b].mean()).abs() < 3 * error
    assert texts(runs["fp32"]) != texts(runs["bf16, together"]), "this model does not round, so it shows nothing"


@pytest.fixture(scope="module")
def alone(small_model):
    """What each of five prompts says when it is sampled alone, six tokens without stop tokens, four rows."""
    prompts = some_prompts((3, 6, 1, 4, 2), vocab_size=11)
    return prompts, [texts(sample(small_model, [p], 4, 6, stop_ids=[], seed=8, prompt_ids=[i]))[0] for i, p in enumerate(prompts)]


@hypothesis.settings(deadline=None, max_examples=80, derandomize=True, database=None)
@hypothesis.given(order=st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True), G=st.integers(1, 4), max_rows=st.integers(1, 24),
                  stops=st.sets(st.integers(0, 10)), prefill_tokens=st.integers(1, 20))
def test_bookkeeping(small_model, alone, order, G, max_rows, stops, prefill_tokens):
    """Forbids bug 22, groups or rows dropped or swapped, whatever leaves and enters when: every row must be what its
    prompt says alone, up to the first stop token."""
    prompts, expected = alone
    reports = []
    with mock.patch.object(sampler, "PREFILL_TOKENS", prefill_tokens):
        groups = sample(small_model, [prompts[i] for i in order], G, 6, stop_ids=stops, seed=8, prompt_ids=order, max_rows=max_rows,
                        progress=reports.append)
    assert texts(groups) == [[through_first_stop(row, stops) for row in expected[i][:G]] for i in order]
    assert [len(reports), sum(reports)] == [G * len(order), sum(map(len, rows_of(groups)))]


@hypothesis.settings(deadline=None, max_examples=25, derandomize=True, database=None)
@hypothesis.given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6), G=st.integers(1, 4), max_rows=st.integers(1, 24),
                  T=st.integers(1, 7), stops=st.sets(st.integers(0, 10), max_size=4), seed=st.integers(0, 2**64))
def test_bookkeeping_of_other_lengths(small_model, lengths, G, max_rows, T, stops, seed):
    """Forbids the same bug at every prompt length, length limit and seed, with each prompt sampled alone beside it."""
    prompts = some_prompts(lengths, vocab_size=11)
    together = texts(sample(small_model, prompts, G, T, stop_ids=stops, seed=seed, max_rows=max_rows))
    assert together == [texts(sample(small_model, [p], G, T, stop_ids=stops, seed=seed, prompt_ids=[i]))[0] for i, p in enumerate(prompts)]


# ---------------------------------------------------------------------------------------------------------------------
# From a uniform number to a token

ALMOST_ONE = np.nextafter(1.0, 0.0)  # the largest number that torch.rand could give


def softmax(logits):
    """(V,) in numpy float64."""
    p = np.exp(logits - logits.max())
    return p / p.sum()


def assert_drawn_from(tokens, probs):
    """A chi-square test: whether `tokens` may have been drawn from `probs` (V,). Fails by chance once in 30,000 seeds."""
    n, counts = len(tokens), np.bincount(tokens, minlength=len(probs))
    assert counts[probs == 0].sum() == 0, "a token of probability 0 was drawn"
    order = np.argsort(-probs)
    bins = np.minimum(probs[order].cumsum() * n / 10, n / 10 - 1).astype(int)   # unlikely tokens share bins of about 10 draws
    _, bins = np.unique(bins, return_inverse=True)
    observed, expected = np.bincount(bins, counts[order]), np.bincount(bins, probs[order] * n)
    statistic, df = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
    bound = df * (1 - 2 / (9 * df) + 4 * math.sqrt(2 / (9 * df))) ** 3          # Wilson and Hilferty's quantile at 4 sigma
    assert statistic < bound, f"chi-square {statistic:.1f} with {df} degrees of freedom"


def draw_many(logits, n, seed=0, **settings):
    """n tokens of the same logits (V,)."""
    u = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([choose_token(logits.expand(len(part), -1), part, **settings)[0] for part in u.split(500)]).numpy()


def some_logits(V, seed=0):
    return 2 * torch.randn(V, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("V, n, temperature", [(V, 4000, t) for V in (5, 100, 128, 130, 300) for t in (1.0, 0.6)] + [(49152, 2500, 0.8)])
def test_frequencies_match_the_softmax(V, n, temperature):
    """Forbids bug 8 in the draw: a vocabulary cut into blocks of 128 must lose and favour no token, at any temperature."""
    logits = some_logits(V)
    assert_drawn_from(draw_many(logits, n, temperature=temperature), softmax(logits.double().numpy() / temperature))


NUCLEI = [dict(top_k=1), dict(top_k=3), dict(top_k=60), dict(top_p=0.3), dict(top_p=0.9)]


@pytest.mark.parametrize("V, n, settings", [(V, 4000, settings) for V in (5, 130, 300) for settings in NUCLEI]
                         + [(49152, 500, dict(top_k=60)), (49152, 150, dict(top_p=0.9))], ids=str)
def test_nothing_is_drawn_outside_the_nucleus(V, n, settings):
    """Forbids a nucleus with a token too many or too few, and one inside which tokens are not drawn in proportion."""
    logits = some_logits(V)
    probs = softmax(logits.double().numpy() / 0.8)
    order = np.argsort(-probs)
    likelier = probs[order].cumsum() - probs[order]                                 # mass of the likelier tokens
    kept = order[(np.arange(V) < settings.get("top_k", V)) & (likelier < settings.get("top_p", 1))]
    nucleus = np.zeros(V)
    nucleus[kept] = probs[kept] / probs[kept].sum()
    tokens = draw_many(logits, n, temperature=0.8, **settings)
    assert set(tokens) == set(kept) if len(kept) == 1 else len(set(tokens)) > 1
    if len(kept) > 1:
        assert_drawn_from(tokens, nucleus)


def test_the_nucleus_by_hand():
    """Forbids an off-by-one at the edge: top-p keeps the token that crosses the mass, and its logprob stays the softmax's."""
    probs = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
    u = torch.linspace(0, ALMOST_ONE, 1001, dtype=torch.float64)
    for settings, kept in [(dict(top_p=0.39), {1}), (dict(top_p=0.5), {1, 3}), (dict(top_p=0.8), {1, 3, 4}),
                           (dict(top_p=0.9), {1, 3, 4, 2}), (dict(top_k=2), {1, 3}), (dict(top_k=9), {0, 1, 2, 3, 4}),
                           (dict(top_k=3, top_p=0.3), {1}), (dict(top_k=1, top_p=0.9), {1}), (dict(), {0, 1, 2, 3, 4})]:
        tokens, logprobs = choose_token(probs.log().expand(1001, -1), u, 1.0, **settings)
        assert set(tokens.tolist()) == kept, settings
        torch.testing.assert_close(logprobs, probs.log()[tokens], atol=1e-6, rtol=0)


@pytest.mark.parametrize("V", [3, 128, 130, 300, 49152])
def test_a_token_of_probability_zero_is_never_drawn(V):
    """Forbids bug 26: u = 0 draws the first entry although its probability is 0, or u just below 1 the last."""
    logits = some_logits(V) + torch.linspace(-1, 1, 200)[:, None] * some_logits(V, seed=1)              # 200 rows, to round in all ways
    first, last = V // 3, V - V // 3 - 1
    logits[:, :first] = logits[:, last + 1:] = float("-inf")
    for u, expected in ((0.0, first), (ALMOST_ONE, last)):
        token, logprob = choose_token(logits, torch.full((200,), u, dtype=torch.float64), 1.0)
        assert token.tolist() == [expected] * 200 and logprob.isfinite().all()


def test_pick_at_both_ends():
    """Forbids bug 26 in the search itself, with weights whose total is any number."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.rand(shape, generator=generator, dtype=torch.float64)
    weights = random(2000, 9) * 10 ** (6 * random(2000, 1) - 3)
    weights[:, :2] = weights[:, 4] = weights[:, -3:] = 0
    for u, expected in ((0.0, 2), (ALMOST_ONE, 5), (1.0, 5)):             # 1: `rest` of the first search may be, and goes into the second
        index, rest = inverse_cdf(weights, torch.full((2000,), u, dtype=torch.float64))
        assert index.tolist() == [expected] * 2000 and ((0 <= rest) & (rest <= 1)).all()


def test_pick_equals_a_search_in_the_cumulative_sum():
    """Forbids an interval given to its neighbour; and `rest` must be where in the interval u fell."""
    rng = np.random.default_rng(0)
    weights, u = rng.random((500, 37)) * (rng.random((500, 37)) < 0.6), rng.random(500)
    weights[:, 5] += 0.1
    index, rest = (x.numpy() for x in inverse_cdf(torch.tensor(weights), torch.tensor(u)))
    cdf = weights.cumsum(1)
    assert index.tolist() == [np.searchsorted(row, x * row[-1], side="right") for row, x in zip(cdf, u)]
    row = np.arange(500)
    np.testing.assert_allclose(cdf[row, index] - (1 - rest) * weights[row, index], u * cdf[:, -1], atol=1e-12)


@pytest.mark.parametrize("V", [5, 128, 300, 49152])
def test_choose_equals_a_flat_search(V):
    """Forbids a two-level search that is more than rounding away from the flat one: the wrong block, or a stale rest."""
    logits = some_logits(V)
    u = torch.rand(2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens = np.concatenate([choose_token(logits.expand(len(part), -1), part, 1.0)[0] for part in u.split(500)])
    cdf = logits.softmax(-1).double().numpy().cumsum()
    u = u.numpy() * cdf[-1]
    edges = np.concatenate([[0], cdf])
    assert (edges[tokens] - 1e-6 <= u).all() and (u <= edges[tokens + 1] + 1e-6).all()
    assert (tokens == np.searchsorted(cdf, u, side="right")).mean() > 0.99


def test_two_tokens_are_drawn_from_the_models_joint_distribution(small_model):
    """Forbids one random number used twice, by two rows or two positions: each token alone would still look right."""
    [prompt], n = some_prompts((4,), vocab_size=11), 4000
    with torch.no_grad():
        logits = lambda tokens: small_model.logits(small_model(tokens)[:, -1]).double() / 0.8
        first = logits(prompt[None]).softmax(-1)                                                         # (1, V)
        second = logits(torch.cat([prompt.expand(11, -1), torch.arange(11)[:, None]], dim=1)).softmax(-1)  # (V, V)
    [group] = sample(small_model, [prompt], n, 2, temperature=0.8, stop_ids=[], seed=0)
    assert_drawn_from((11 * group.responses[:, 0] + group.responses[:, 1]).numpy(), (first.T * second).flatten().numpy())
    assert_drawn_from((11 * group.responses[:-1, 1] + group.responses[1:, 0]).numpy(), ((first @ second).T @ first).flatten().numpy())


# ---------------------------------------------------------------------------------------------------------------------
# What it costs, and what it keeps

@pytest.fixture
def tokens_run(monkeypatch):
    """A list that grows by the number of tokens of every forward pass."""
    counts, forward = [], Transformer.forward

    def counted(network, tokens, *args, **kwargs):
        counts.append(tokens.numel())
        return forward(network, tokens, *args, **kwargs)
    monkeypatch.setattr(Transformer, "forward", counted)
    return counts


@pytest.mark.parametrize("max_rows", [1, 20, None])
def test_a_prompt_is_run_once_not_once_a_row(model, tokens_run, max_rows):
    """Forbids bug 11: a prompt prefilled G times, or prompts padded to the longest."""
    sample(model, some_prompts((3, 9, 1, 14, 6)), 8, 1, stop_ids=STOPS, seed=0, max_rows=max_rows)
    assert sum(tokens_run) == 3 + 9 + 1 + 14 + 6


@pytest.mark.parametrize("max_rows", [1, 20, None])
def test_finished_rows_cost_nothing(model, tokens_run, max_rows):
    """Forbids bug 10: rows that ended early run on to the slowest. A response's last token need not be run either."""
    prompts = some_prompts()
    lengths = [len(row) for row in rows_of(sample(model, prompts, 8, 24, stop_ids=STOPS, seed=0, max_rows=max_rows))]
    assert len(set(lengths)) > 10
    assert sum(tokens_run) == sum(map(len, prompts)) + sum(n - 1 for n in lengths)


def test_rows_that_end_at_once_cost_nothing(model, tokens_run):
    """Forbids bug 10 at its edge: a row whose first token, drawn from the prompt's own run, is already the end."""
    groups = sample(model, some_prompts(), 8, 24, stop_ids=range(LLAMA["vocab_size"]), seed=0)
    assert {len(row) for row in rows_of(groups)} == {1}
    assert sum(tokens_run) == sum(map(len, some_prompts()))


def test_no_cache_outlives_a_call(model):
    """Forbids bug 14: a cache that survives a weight update, here one in place as the optimizer's are."""
    trained, draw = copy.deepcopy(model), lambda network: sample(network, some_prompts(), 4, 12, stop_ids=STOPS, seed=0)
    before = draw(trained)
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    fresh = Transformer(model.config)
    fresh.load_state_dict(trained.state_dict())
    after = draw(trained)
    assert same_bits(after, draw(fresh)) and texts(after) != texts(before)


def test_results_of_one_call_are_not_changed_by_the_next(model):
    """Forbids bug 4's relative: a response that is a view of a buffer the next rows are written over."""
    groups = sample(model, some_prompts(), 4, 12, stop_ids=STOPS, seed=0, max_rows=4)
    kept = copy.deepcopy(groups)
    sample(model, some_prompts(), 4, 12, stop_ids=STOPS, seed=1, max_rows=4)
    assert same_bits(groups, kept)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation

def test_pass_at_k_equals_enumeration():
    """Forbids a biased pass@k, such as 1 − (1 − c/n)^k: the oracle looks at every set of k samples."""
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            sets = [any(i < c for i in chosen) for chosen in itertools.combinations(range(n), k)]       # samples 0 … c − 1 are right
            assert math.isclose(pass_at_k(n, c, k), sum(sets) / len(sets), abs_tol=1e-12), (n, c, k)


# Five problems, four responses each.                                                right    majority     no answer   last number
HAND_MADE = [
    ("5", ["#### 7", "#### 5", "#### 5", "it is 5"]),                                   # 2 of 4   5, right     1           3
    ("1/2", ["#### 1/2", "#### 3", "#### 3", "the answer is 0.50"]),                    # 2        1/2, right   0           2
    ("8", ["#### 9", "no idea", "#### 8", "so 12"]),                                    # 1        9, wrong     2           1
    ("2", ["", "2 or 3", "3 or 2", "two"]),                                             # 0        no vote      4           1
    ("6", ["#### 6", "#### 6", "#### 6", "#### 6"]),                                    # 4        6, right     0           4
]
UNFINISHED = {(0, 0), (0, 3), (2, 1), (3, 2), (4, 3)}                                   # (problem, sample): 5 of 20


def evaluate_by_hand(monkeypatch, **settings):
    """evaluate() on HAND_MADE. A token id names a text, and sample s of each problem is s + 1 tokens long."""
    texts = [text for _, responses in HAND_MADE for text in responses]
    tokenizer = SimpleNamespace(stop_ids=[0], decode=lambda ids: texts[ids[0]] if len(ids) else "")
    no = torch.zeros(4, dtype=torch.bool)

    def group(i):
        finished = torch.tensor([(i, s) not in UNFINISHED for s in range(4)])
        responses = torch.arange(4 * i, 4 * i + 4)[:, None].expand(-1, 4)
        return Group(torch.tensor([1]), responses, torch.arange(1, 5), finished, torch.zeros(4, 4), no, torch.zeros(4), no)
    monkeypatch.setattr(evaluate_module, "sample", lambda *args, **kwargs: [group(i) for i in range(len(HAND_MADE))])
    problems = [Problem(f"question {i}", answer, prompt=torch.tensor([1])) for i, (answer, _) in enumerate(HAND_MADE)]
    return evaluate(None, problems, tokenizer, 4, 16, temperature=1.0, **settings)


def test_metrics_worked_out_by_hand(monkeypatch):
    """Forbids bugs 12 and 17: rows graded against another problem's answer, and metrics averaged over the wrong thing."""
    metrics, completions = evaluate_by_hand(monkeypatch)
    assert metrics == pytest.approx({
        "mean": (2 / 4 + 2 / 4 + 1 / 4 + 0 + 1) / 5,                    # 0.45
        "mean_se": math.sqrt(0.55 / 4 / 5),                             # 0.55 = 0.05² + 0.05² + 0.2² + 0.45² + 0.55²
        "pass@1": 0.45,
        "pass@2": (5 / 6 + 5 / 6 + 1 / 2 + 0 + 1) / 5,                  # of 6 pairs, 1 (of 2 wrong) or 3 (of 3 wrong) hold no right one
        "pass@4": 4 / 5,
        "maj": 3 / 5,
        "truncated": 5 / 20,
        "no_answer": 7 / 20,
        "last_number": 11 / 20,
        "tokens": 2.5,
    }, abs=1e-12)
    assert [[r["response"] for r in records] for records in completions] == [responses for _, responses in HAND_MADE]
    assert completions[1][3] == {"response": "the answer is 0.50", "answer": "1/2", "correct": True, "reward": 1.0,
                                 "finished": True, "tokens": 4, "correct_by_last_number": True}
    assert completions[0][3] == {"response": "it is 5", "answer": None, "correct": False, "reward": 0.0,
                                 "finished": False, "tokens": 4, "correct_by_last_number": True}


def test_correct_is_what_reaches_the_threshold(monkeypatch):
    """Forbids metrics that grade by themselves where the user gave a reward and a threshold."""
    reward = lambda response, answer: len(response) / 6                 # "#### 5" and longer
    for threshold, right in ((0.5, [4, 4, 4, 3, 4]), (1.0, [4, 4, 3, 2, 4]), (1.1, [1, 2, 1, 0, 0])):
        metrics, completions = evaluate_by_hand(monkeypatch, reward=reward, correct_at=threshold)
        assert [sum(r["correct"] for r in records) for records in completions] == right
        assert metrics["mean"] == pytest.approx(sum(right) / 20)


def test_evaluation_of_one_problem_and_of_one_sample(model, monkeypatch):
    """Forbids a crash, or a standard error of 0, where a spread cannot be known; and pass@k for k that are not there."""
    tokenizer = SimpleNamespace(stop_ids=STOPS, decode=lambda ids: "#### 4")
    problem = Problem("?", "4", prompt=torch.tensor([1, 2]))
    metrics, [[record]] = evaluate(model, [problem], tokenizer, 1, 4, temperature=0.0)
    assert metrics["mean"] == metrics["pass@1"] == 1 and math.isnan(metrics["mean_se"]) and record["correct"]
    for samples, ks in ((1, {"1"}), (3, {"1", "2", "3"}), (8, {"1", "2", "4", "8"})):
        metrics, _ = evaluate(model, [problem], tokenizer, samples, 2, temperature=1.0)
        assert {name.removeprefix("pass@") for name in metrics if name.startswith("pass@")} == ks


# ---------------------------------------------------------------------------------------------------------------------
# The program

WORDS = ["<end>", "<stop>", "<unk>", "####1", "####2", "####3", "1", "so", "is"]    # so that random weights often name an answer
QUESTIONS = ["1 is 1 is", "so", "is is is 1 so 1", "1", "so so 1", "is so is", "1 is", "is 1 so so"]


@pytest.fixture
def folder(tmp_path):
    """A model folder with two stop tokens, a file of problems, and some files of other kinds."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<end>", "<stop>"])
    parts = tmp_path / "parts"
    parts.mkdir()
    words.save(str(parts / "tokenizer.json"))
    write_json(parts / "tokenizer_config.json", {"eos_token": "<end>"})
    write_json(parts / "generation_config.json", {"eos_token_id": [0, 1]})
    for name, V in (("model", 9), ("fewer-words", 5)):
        save_model(tiny_model(parts, {**LLAMA, "vocab_size": V}, seed=1), str(tmp_path / name), tokenizer_from=str(parts))
    write_problems(tmp_path / "data.jsonl", ["7"] * len(QUESTIONS))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"question": "so", "answer": \n')
    (tmp_path / "reward.py").write_text("something = lambda response, answer: float(len(response) > 0)\n"
                                        "fails = lambda response, answer: 1 / 0\n"
                                        "nan = lambda response, answer: float('nan')\n"
                                        "number = 3\n")
    (tmp_path / "directory").mkdir()
    return tmp_path


def write_problems(path, answers):
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in zip(QUESTIONS, answers)), encoding="utf-8")


def command(folder, **changes):
    """The command line; `changes` are flags, None takes one away."""
    flags = {"model": folder / "model", "data": folder / "data.jsonl", "samples": 4, "max_new_tokens": 12, "seed": 5,
             "device": "cpu", "dtype": "float32", "out": folder / "out.jsonl", "keep_correct": folder / "gold.jsonl", **changes}
    return [str(x) for name, value in flags.items() if value is not None for x in (f"--{name.replace('_', '-')}", value)]


def run_here(arguments, monkeypatch, capsys):
    """`python sampler.py …` in this process, which saves the seconds that importing torch takes. A traceback would come out of it."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    code = 0
    try:
        runpy.run_path(evaluate_module.__file__, run_name="__main__")
    except SystemExit as e:
        code = e.code
    return code, capsys.readouterr()


def run_apart(arguments):
    return subprocess.run([sys.executable, evaluate_module.__file__, *arguments], capture_output=True, text=True, encoding="utf-8", timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def evaluate_here(folder):
    problems, tokenizer = read_problems(str(folder / "data.jsonl")), load_tokenizer(str(folder / "model"))
    prepare(problems, tokenizer, 12, 256)
    return evaluate(load_model(str(folder / "model")), problems, tokenizer, 4, 12, temperature=1.0, seed=5)


def answers_it_gives(folder):
    """For each question an answer that the model happens to give, or 7, which it cannot say."""
    _, completions = evaluate_here(folder)
    return [next((r["answer"] for r in records if r["finished"] and (r["answer"] or "").isdigit()), "7") for records in completions]


def test_the_program_samples_grades_and_keeps_gold(folder):
    """Forbids completions that are lost, cut or out of order, and gold that the trainer could not use."""
    answers = answers_it_gives(folder)
    assert 2 <= len(answers) - answers.count("7") < len(answers), "solves too little or everything, so it shows nothing"
    write_problems(folder / "data.jsonl", answers)
    metrics, completions = evaluate_here(folder)
    done = run_apart(command(folder))
    assert done.returncode == 0, done.stderr
    assert "8 problems x 4 samples, temperature 1" in done.stdout and f"mean@4      {metrics['mean']:.4f}" in done.stdout
    assert "Traceback" not in done.stderr and not list(folder.rglob("*.writing"))

    expected = [{"question": q, "reference": a, **r} for q, a, records in zip(QUESTIONS, answers, completions) for r in records]
    assert read_lines(folder / "out.jsonl") == expected
    solved = [(q, a) for q, a, records in zip(QUESTIONS, answers, completions) if any(r["correct"] and r["finished"] for r in records)]
    kept = read_problems(str(folder / "gold.jsonl"))
    assert [(p.question, p.answer) for p in kept] == solved and len(solved) >= 2
    assert all(grade(p.gold, p.answer) == 1 for p in kept)
    assert prepare(kept, load_tokenizer(str(folder / "model")), 12, 256) == [] and all(p.gold_ids is not None for p in kept)


def test_the_program_uses_the_users_reward(folder, monkeypatch, capsys):
    """Forbids --reward and --correct-at that are read and then ignored."""
    code, printed = run_here(command(folder, reward=f"{folder / 'reward.py'}:something", samples=2, limit=3, skip=1), monkeypatch, capsys)
    assert code == 0, printed.err
    rows = read_lines(folder / "out.jsonl")
    assert [r["question"] for r in rows] == [q for q in QUESTIONS[1:4] for _ in range(2)]
    assert all(r["correct"] == (len(r["response"]) > 0) for r in rows) and any(r["correct"] for r in rows)
    assert all(p.gold for p in read_problems(str(folder / "gold.jsonl")))
    code, printed = run_here(command(folder, reward=f"{folder / 'reward.py'}:something", correct_at=1.5, samples=None,
                                           out=None, keep_correct=folder / "none.jsonl"), monkeypatch, capsys)
    assert code == 0 and "8 problems x 1 samples, temperature 0" in printed.out and "mean@1      0.0000" in printed.out
    assert read_lines(folder / "none.jsonl") == []


BAD = {
    "no samples":               (dict(samples=0), "--samples 0"),
    "no tokens":                (dict(max_new_tokens=0), "--max-new-tokens 0"),
    "limit below 0":            (dict(limit=-1), "--limit -1"),
    "skip below 0":             (dict(skip=-1), "--skip -1"),
    "skips all":                (dict(skip=8), "--skip 8"),
    "top-k below 0":            (dict(top_k=-1), "--top-k -1"),
    "top-p 0":                  (dict(top_p=0), "--top-p 0"),
    "top-p above 1":            (dict(top_p=1.01), "--top-p 1.01"),
    "top-p not a number":       (dict(top_p="nan"), "--top-p nan"),
    "temperature below 0":      (dict(temperature=-0.5), "--temperature -0.5"),
    "temperature no number":    (dict(temperature="nan"), "--temperature nan"),
    "threshold no number":      (dict(correct_at="nan"), "--correct-at nan"),
    "no rows":                  (dict(rows=0), "--rows 0"),
    "seed below 0":             (dict(seed=-1), "--seed -1"),
    "no such device":           (dict(device="abacus"), "--device abacus"),
    "no such model":            (dict(model="{}/nowhere"), "{}/nowhere"),
    "model without files":      (dict(model="{}/directory"), "{}/directory"),
    "model is a file":          (dict(model="{}/data.jsonl"), "{}/data.jsonl"),
    "model knows fewer words":  (dict(model="{}/fewer-words"), "{}/fewer-words"),
    "no such data":             (dict(data="{}/nothing.jsonl"), "{}/nothing.jsonl"),
    "data is a directory":      (dict(data="{}/directory"), "{}/directory"),
    "no problems":              (dict(data="{}/empty.jsonl"), "{}/empty.jsonl"),
    "broken line":              (dict(data="{}/broken.jsonl"), "{}/broken.jsonl, line 1"),
    "too long":                 (dict(max_new_tokens=256), "{}/data.jsonl, line 1"),
    "out in no directory":      (dict(out="{}/nowhere/out.jsonl"), "{}/nowhere/out.jsonl"),
    "gold in no directory":     (dict(keep_correct="{}/nowhere/gold.jsonl"), "{}/nowhere/gold.jsonl"),
    "out is a directory":       (dict(out="{}/directory"), "{}/directory"),
    "gold is a directory":      (dict(keep_correct="{}/directory"), "{}/directory"),
    "out over gold":            (dict(keep_correct="{}/out.jsonl"), "{}/out.jsonl"),
    "out over the data":        (dict(out="{}/data.jsonl"), "{}/data.jsonl"),
    "out over another file":    (dict(out="{}/reward.py"), "{}/reward.py: there is something already"),
    "gold over another file":   (dict(keep_correct="{}/broken.jsonl"), "{}/broken.jsonl: there is something already"),
    "no such reward file":      (dict(reward="{}/nothing.py:f"), "{}/nothing.py:f"),
    "no function named":        (dict(reward="{}/reward.py"), "{}/reward.py"),
    "no such function":         (dict(reward="{}/reward.py:nothing"), "{}/reward.py has no function nothing"),
    "not a function":           (dict(reward="{}/reward.py:number"), "{}/reward.py has no function number"),
    "reward fails":             (dict(reward="{}/reward.py:fails"), "ZeroDivisionError"),
    "reward is no number":      (dict(reward="{}/reward.py:nan"), "returned nan"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_done_is_one_line(folder, monkeypatch, capsys, name):
    """Forbids a traceback, a silent nonsense result, or a file half written, where the user's input cannot be used."""
    changes, message = BAD[name]
    before = files(folder)
    changes = {flag: value.replace("{}", str(folder)) if isinstance(value, str) else value for flag, value in changes.items()}
    code, printed = run_here(command(folder, **changes), monkeypatch, capsys)
    lines = printed.err.split("\r")[-1].splitlines()                    # what stands before \r is the progress bar, wiped out
    assert files(folder) == before, "something was written"
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and message.replace("{}", str(folder)) in lines[0]


@pytest.mark.parametrize("changes", [dict(model=None), dict(data=None), dict(samples="x"), dict(dtype="int8"), dict(answer_format="oral"),
                                     dict(colour="red")], ids=str)
def test_what_is_no_command_line_is_refused(folder, monkeypatch, capsys, changes):
    """Forbids a misspelt flag that is ignored. (These are argparse's own messages, with the usage above them.)"""
    before = files(folder)
    code, printed = run_here(command(folder, **changes), monkeypatch, capsys)
    assert code == 2 and files(folder) == before and printed.err.splitlines()[-1].startswith("evaluate.py: error: ")


def test_an_error_in_a_process_of_its_own(folder):
    """Forbids an exit status or a traceback that only `python sampler.py` would show."""
    done = run_apart(command(folder, top_p=2))
    assert (done.returncode, done.stdout) == (2, "") and done.stderr == "error: --top-p 2.0: must be above 0 and at most 1\n"
