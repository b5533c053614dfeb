"""model.py against oracles that others wrote: transformers for the network, a full forward pass per sequence for
log-probabilities, finite differences for the hand-written gradient.

The models are tiny and random, but no weight is left at the value it is born with: a bias of 0 or a norm weight of 1
could be forgotten by the loader and nobody would see it.
"""
import glob
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import logprobs as logprobs_module
import model as model_module
from logprobs import encode_prompts, linear_logprobs, score_responses, token_logprobs
from model import load_model, save_model
from support import cpu
from support.common import InputError


SMALL = dict(vocab_size=67, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)

# With head_dim 6 to 16 and the llama3 numbers below, some waves are kept, some are slowed, and some lie between.
ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "theta": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 100},
}


# ---------------------------------------------------------------------------------------------------------------------
# Helpers

def randomise(network, seed=0):
    """Fill every parameter with numbers that matter to the result."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            if p.dim() == 2:      # about 1 / sqrt(fan-in), so that attention is neither flat nor a single peak
                p.normal_(std=1.5 / p.shape[1] ** 0.5, generator=generator)
            else:                 # norm weights and biases: anything but 1 and 0
                p.uniform_(0.3, 1.7, generator=generator)
    return network


def read_json(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f)


def write_rope(folder, rope, dialect):
    """Rewrite config.json in one of the two dialects, whichever of them the installed transformers has written."""
    path = os.path.join(folder, "config.json")
    config = read_json(path)
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        config.pop(name, None)
    if dialect == "rope_parameters":
        config["rope_parameters"] = dict(rope)
    else:
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        if rope["rope_type"] == "linear":     # as files from before llama3 spell it
            scaling["type"] = scaling.pop("rope_type")
        config["rope_theta"], config["rope_scaling"] = rope["rope_theta"], None if rope["rope_type"] == "default" else scaling
    write_json(path, config)


def make_folder(folder, family="llama", rope="default", dialect="rope_scaling", shard="5GB", dtype=torch.float32, **changes):
    """A model folder written by transformers: the family's own config class, random weights, save_pretrained."""
    network = randomise(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **changes})))
    network.to(dtype).save_pretrained(folder, max_shard_size=shard)
    write_rope(folder, ROPE[rope], dialect)
    return str(folder)


def oracle(folder):
    """The folder as transformers reads it; "eager" is its plainest attention. Nothing may be missing or left over."""
    network, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return network.eval()


def file_name(name):
    """A parameter's name in the files and in transformers."""
    return name if name.startswith("lm_head") else "model." + name


def relative(a, b):
    """Largest difference, as a share of the largest number in b."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def some_group(lengths, prompt_length=9, seed=1):
    """prompt (P,), responses (G, T) with arbitrary ids in the padding, lengths (G,)."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(SMALL["vocab_size"], (prompt_length,), generator=generator)
    responses = torch.randint(SMALL["vocab_size"], (len(lengths), max(lengths)), generator=generator)
    return prompt, responses, torch.tensor(lengths)


def real_tokens(responses, lengths):
    return torch.arange(responses.shape[1]) < lengths[:, None]      # (G, T)


def plain_logprobs(logits_of, prompt, responses, lengths, temperature):
    """What token_logprobs must give, the slow way: every sequence alone and whole, every logit in memory.

    logits_of: tokens (1, P + n) -> logits (1, P + n, V). Returns logprobs (G, T) and entropy (G, T), 0 in the padding."""
    rows, entropies = [], []
    for response, n in zip(responses, lengths.tolist()):
        logits = logits_of(torch.cat([prompt, response[:n]])[None])[0]                       # (P + n, V)
        logp = (logits[len(prompt) - 1:-1] / temperature).log_softmax(-1)                    # (n, V)
        pad = (0, responses.shape[1] - n)
        rows.append(F.pad(logp.gather(1, response[:n, None])[:, 0], pad))
        entropies.append(F.pad(torch.distributions.Categorical(logits=logp.detach()).entropy(), pad))
    return torch.stack(rows), torch.stack(entropies)


def gradients(network, loss, rename=lambda name: name):
    network.zero_grad()
    loss.backward()
    return {rename(name): p.grad.clone() for name, p in network.named_parameters()}


def assert_same_gradients(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert theirs[name].abs().max() > 0, f"{name} has no gradient, so comparing it shows nothing"
        assert relative(ours[name], theirs[name]) < tolerance, f"{name}: {relative(ours[name], theirs[name])}"


def weights_like(tensor, seed=3):
    """One number per token, so that a loss made with them shows a token that changed places with another."""
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(tensor.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The network and the folders, against transformers

CASES = {
    # llama
    "llama-grouped-heads":      dict(family="llama"),
    "llama-all-heads-own-kv":   dict(family="llama", rope="theta", dialect="rope_parameters", num_key_value_heads=4),
    "llama-head-dim-tied":      dict(family="llama", rope="llama3", head_dim=8, tie_word_embeddings=True, shard="8KB"),
    "llama-all-biases":         dict(family="llama", rope="linear", dialect="rope_parameters", attention_bias=True, mlp_bias=True),
    "llama-mlp-bias-llama3":    dict(family="llama", rope="llama3", dialect="rope_parameters", head_dim=16, mlp_bias=True),
    # mistral
    "mistral":                  dict(family="mistral", sliding_window=None),
    "mistral-head-dim-tied":    dict(family="mistral", sliding_window=None, rope="theta", dialect="rope_parameters", head_dim=10,
                                     tie_word_embeddings=True, shard="8KB"),
    "mistral-linear":           dict(family="mistral", sliding_window=None, rope="linear", num_key_value_heads=1),
    # qwen2: biases on q, k and v, none on o
    "qwen2":                    dict(family="qwen2", shard="8KB"),
    "qwen2-tied":               dict(family="qwen2", rope="theta", dialect="rope_parameters", num_key_value_heads=1,
                                     tie_word_embeddings=True),
    "qwen2-llama3":             dict(family="qwen2", rope="llama3", hidden_size=32),
    # qwen3: norms on q and k
    "qwen3":                    dict(family="qwen3", head_dim=8),
    "qwen3-bias-tied":          dict(family="qwen3", rope="linear", dialect="rope_parameters", head_dim=10, attention_bias=True,
                                     tie_word_embeddings=True, shard="8KB"),
    "qwen3-llama3":             dict(family="qwen3", rope="llama3", dialect="rope_parameters", head_dim=6, num_key_value_heads=4),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name, tmp_path):
    """Forbids a forward pass that differs from the reference, and a saved folder that others read differently."""
    case = dict(CASES[name])
    dialect = case.pop("dialect", "rope_scaling")
    folder = make_folder(tmp_path / "theirs", **case)            # in the older dialect, which every transformers reads
    assert len(glob.glob(folder + "/*.safetensors")) > 1 or "shard" not in case
    reference = oracle(folder)
    write_rope(folder, ROPE[case.get("rope", "default")], dialect)

    model = load_model(folder)
    tokens = torch.randint(SMALL["vocab_size"], (2, 120), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs, ours = reference(tokens).logits, model.logits(model(tokens))
    assert ours.dtype == torch.float32
    assert relative(ours, theirs) < 1e-5

    save_model(model, str(tmp_path / "ours"))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), load_model(str(tmp_path / "ours")).parameters(), strict=True))
    if dialect == "rope_parameters" and int(transformers.__version__.split(".")[0]) < 5:
        return      # older transformers would pass over rope_parameters in silence
    with torch.no_grad():
        assert torch.equal(oracle(str(tmp_path / "ours"))(tokens).logits, theirs)


def test_rope_theta_beside_rope_parameters(tmp_path):
    """Forbids a default base of 10000 where config.json mixes its dialects: rope_parameters, with rope_theta beside it."""
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("older transformers does not read rope_parameters")
    folder = make_folder(tmp_path)
    config = read_json(folder + "/config.json")
    del config["rope_scaling"]
    config.update(rope_theta=500.0, rope_parameters={"rope_type": "linear", "factor": 4.0})
    write_json(folder + "/config.json", config)
    tokens = torch.arange(60)[None]
    try:
        model = load_model(folder)
    except InputError:
        return      # refusing the mixture is as good as reading it
    with torch.no_grad():
        difference = relative(model.logits(model(tokens)), oracle(folder)(tokens).logits)
    assert difference < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_files_load_exactly(dtype, tmp_path):
    """Forbids rounding on the way in (bug 9): a 16-bit file becomes fp32 master weights with exactly its values."""
    folder = make_folder(tmp_path, "qwen2", dtype=dtype)
    stored, model = load_file(folder + "/model.safetensors"), load_model(folder)
    for name, p in model.named_parameters():
        assert stored[file_name(name)].dtype == dtype and p.dtype == torch.float32
        assert torch.equal(p, stored[file_name(name)].float()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_saved_config_names_the_dtype_of_the_weights(dtype, tmp_path):
    """Forbids fp32 weights under a config.json that says bfloat16, which a reader would round at once (bug 9)."""
    theirs = make_folder(tmp_path / "theirs", dtype=torch.bfloat16)
    save_model(load_model(theirs, dtype=dtype), str(tmp_path / "ours"))
    config = read_json(tmp_path / "ours" / "config.json")
    assert {config[name] for name in ("dtype", "torch_dtype") if name in config} == {str(dtype).removeprefix("torch.")}
    assert all(t.dtype == dtype for t in load_file(tmp_path / "ours" / "model.safetensors").values())


def test_save_replaces_a_folder_and_copies_the_tokenizer(tmp_path):
    """Forbids overwriting in place (bug 18), leaving parts of the old model behind, and losing the tokenizer's files."""
    folder = make_folder(tmp_path / "model", shard="8KB")
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    model = load_model(folder)
    save_model(model, folder, tokenizer_from=folder)      # onto itself: what is copied must outlive what is replaced
    assert os.listdir(tmp_path) == ["model"]
    assert not glob.glob(folder + "/*-of-*") and not os.path.exists(folder + "/model.safetensors.index.json")
    assert (tmp_path / "model" / "tokenizer_config.json").read_text() == '{"eos_token": "</s>"}'
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), load_model(folder).parameters(), strict=True))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_loading_leaves_nothing_random(family, tmp_path):
    """Forbids parameters left at random values (bug 20): each is the file's tensor, and any one missing is refused."""
    extra = {"mistral": dict(sliding_window=None), "llama": dict(attention_bias=True, mlp_bias=True)}.get(family, {})
    folder = make_folder(tmp_path, family, num_hidden_layers=1, **extra)
    path = folder + "/model.safetensors"
    stored = load_file(path)

    torch.manual_seed(1)
    first = load_model(folder).state_dict()
    torch.manual_seed(2)
    second = load_model(folder).state_dict()
    assert {file_name(name) for name in first} == stored.keys()
    for name in first:
        assert torch.equal(first[name], second[name]) and torch.equal(first[name], stored[file_name(name)]), name

    for name in stored:
        save_file({other: t for other, t in stored.items() if other != name}, path, metadata={"format": "pt"})
        with pytest.raises(InputError, match=name):
            load_model(folder)


def test_greedy_continuations_of_a_real_model():
    """Forbids a difference that only real sizes and real weights show: same greedy continuations as `generate`."""
    folder = os.environ.get("GCPO_TEST_MODEL")
    if not folder:
        pytest.skip("set GCPO_TEST_MODEL to a model folder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = ["The capital of France is", "2, 4, 6, 8,", "Once upon a time", "def fibonacci(n):", "Water boils at a temperature of",
               "Natalia sold 48 clips in April and half as many in May. Altogether she sold", "Dear Sir or Madam,", "import torch\n"]
    rows = [tokenizer(text)["input_ids"] for text in prompts]

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    network.generation_config = transformers.GenerationConfig(pad_token_id=0)     # no end token: 20 tokens from each prompt
    theirs = [network.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
                               max_new_tokens=20)[0].tolist() for ids in rows]
    del network

    model, ours, ends = load_model(folder), [list(ids) for ids in rows], torch.arange(len(rows))
    for _ in range(20):     # right-padded: nothing to the right of a token can reach it
        batch = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in ours], batch_first=True)
        with torch.no_grad():
            hidden = model(batch)[ends, torch.tensor([len(ids) - 1 for ids in ours])]      # (N, D)
        for ids, token in zip(ours, model.logits(hidden).argmax(-1).tolist()):
            ids.append(token)
    assert ours == theirs


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities of a group: the prompt once, the padding never

@pytest.mark.parametrize("family, lengths, extra", [
    ("llama", [5, 1, 8, 3], dict(rope="llama3", attention_bias=True)),
    ("mistral", [2, 7], dict(sliding_window=None, head_dim=8, tie_word_embeddings=True)),
    ("qwen2", [4, 1, 6], dict(num_key_value_heads=1)),
    ("qwen3", [3, 9, 9, 1], dict(head_dim=10)),
], ids=["llama", "mistral", "qwen2", "qwen3"])
def test_group_equals_full_sequences_through_transformers(family, lengths, extra, tmp_path):
    """Forbids every slip in sharing the prompt: a causal flag with a cache (bug 13), positions that start again at 0,
    a mask or a target off by one, a temperature on one side only (bug 8), a gradient that stops at the prompt."""
    folder = make_folder(tmp_path, family, **extra)
    prompt, responses, lengths = some_group(lengths)
    model, reference = load_model(folder), oracle(folder)

    theirs, exact_entropy = plain_logprobs(lambda tokens: reference(tokens).logits, prompt, responses, lengths, 0.7)
    ours, entropy = token_logprobs(model, prompt, responses, 0.7, lengths)
    assert ours.shape == entropy.shape == responses.shape and ours.dtype == entropy.dtype == torch.float32
    assert not entropy.requires_grad
    assert relative(ours, theirs) < 1e-5
    assert relative(entropy, exact_entropy) < 1e-5

    w = weights_like(ours)
    assert_same_gradients(gradients(model, (w * ours).sum(), file_name), gradients(reference, (w * theirs).sum()), 1e-5)


@pytest.mark.parametrize("prompt_length, lengths, temperature", [
    (6, [4, 1, 7, 2], 1.3),
    (6, [5, 5, 5], 0.5),      # no padding
    (6, [1, 1, 1], 0.7),      # T = 1: no response token ever goes through the network
    (6, [1], 1.0),
    (6, [8], 1.0),            # G = 1, as in SFT
    (1, [3, 1, 4], 0.9),      # the shortest prompt
])
def test_group_equals_full_sequences_in_float64(prompt_length, lengths, temperature, tmp_path):
    """Forbids errors small enough to pass for fp32 noise, and shapes at the edge: T = 1, G = 1, P = 1."""
    model = load_model(make_folder(tmp_path, "qwen2"), dtype=torch.float64)
    prompt, responses, lengths = some_group(lengths, prompt_length)
    theirs, exact_entropy = plain_logprobs(lambda tokens: model.logits(model(tokens)), prompt, responses, lengths, temperature)
    w = weights_like(theirs)
    expected = gradients(model, (w * theirs).sum())

    ours, entropy = token_logprobs(model, prompt, responses, temperature, lengths)
    assert relative(ours, theirs) < 1e-12 and relative(entropy, exact_entropy) < 1e-12
    assert_same_gradients(gradients(model, (w * ours).sum()), expected, 1e-10)


def test_lengths_default_to_the_full_width(tmp_path):
    """Forbids guessing lengths from the ids (bug 1): without lengths every column counts, whatever stands in it."""
    model = load_model(make_folder(tmp_path))
    prompt, responses, _ = some_group([6, 6, 6])
    responses[0, -1] = responses[1, -3:] = SMALL["eos_token_id"]
    without = token_logprobs(model, prompt, responses)
    given = token_logprobs(model, prompt, responses, 1.0, torch.full((3,), 6))
    assert all(torch.equal(a, b) for a, b in zip(without, given))


def test_padding_does_not_matter(tmp_path):
    """Forbids padding that leaks: not its ids (bit for bit, even ids outside the vocabulary), nor its width, in value or gradient."""
    model = load_model(make_folder(tmp_path))
    prompt, responses, lengths = some_group([5, 1, 8, 3])
    real = real_tokens(responses, lengths)
    w = weights_like(responses.float())

    def score(responses):
        logprobs, entropy = token_logprobs(model, prompt, responses, 0.8, lengths)
        assert (logprobs[:, :8][~real] == 0).all() and (entropy[:, :8][~real] == 0).all() and (logprobs[:, 8:] == 0).all()
        return logprobs[:, :8], entropy[:, :8], gradients(model, (w * logprobs[:, :8]).sum())

    expected = score(responses)
    for filler in (0, SMALL["eos_token_id"], -1, 10**6):
        logprobs, entropy, grads = score(responses.where(real, filler))
        assert torch.equal(logprobs, expected[0]) and torch.equal(entropy, expected[1])
        assert all(torch.equal(grads[name], expected[2][name]) for name in grads)

    logprobs, entropy, grads = score(F.pad(responses, (0, 5), value=7))
    assert relative(logprobs, expected[0]) < 1e-6 and relative(entropy, expected[1]) < 1e-6
    assert_same_gradients(grads, expected[2], 1e-5)


def test_prompt_runs_once_and_padding_never(tmp_path):
    """Forbids a prompt that runs G times (bug 11), and padding that costs as much as text."""
    model = load_model(make_folder(tmp_path))
    prompt, responses, lengths = some_group([5, 1, 8, 3])
    seen = []
    model.embed_tokens.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
    token_logprobs(model, prompt, responses, 1.0, lengths)
    assert sum(seen) == len(prompt) + (lengths - 1).sum()      # a response's last token predicts nothing


def test_rows_do_not_see_each_other(tmp_path):
    """Forbids attention from one response to another: a row scores alone as it does in its group."""
    model = load_model(make_folder(tmp_path, "qwen3"))
    prompt, responses, lengths = some_group([5, 2, 8, 3])
    together, _ = token_logprobs(model, prompt, responses, 1.0, lengths)
    for row, n in enumerate(lengths.tolist()):
        alone, _ = token_logprobs(model, prompt, responses[row:row + 1, :n])
        assert relative(together[row, :n], alone[0]) < 1e-5


@pytest.mark.parametrize("passes", [[[0, 1, 2, 3, 4]], [[0, 1], [2, 3], [4]], [[4], [2, 0], [3, 1]]], ids=["one", "three", "shuffled"])
def test_two_stage_backward_equals_one(passes, tmp_path):
    """Forbids a gradient that depends on how many passes a group's rows take (bug 3): the prompt's outputs as leaves
    that collect gradient over the passes, then one backward through the prompt, give the gradient of a single pass."""
    model = load_model(make_folder(tmp_path, "qwen2"))
    prompt, responses, lengths = some_group([5, 1, 8, 3, 6])
    w = weights_like(responses.float())
    whole, _ = token_logprobs(model, prompt, responses, 0.7, lengths)
    expected = gradients(model, (w * whole).sum())

    model.zero_grad()
    prefix = encode_prompts(model, [prompt])
    leaves = prefix.cut()
    for rows in passes:
        longest = int(lengths[rows].max())
        logprobs, _ = score_responses(model, leaves, torch.zeros(len(rows), dtype=torch.long), responses[rows, :longest], lengths[rows], 0.7)
        assert relative(logprobs, whole[rows, :longest]) < 1e-5
        (w[rows, :longest] * logprobs).sum().backward()
    torch.autograd.backward(prefix.tensors, [x.grad for x in leaves.tensors])
    assert_same_gradients({name: p.grad for name, p in model.named_parameters()}, expected, 1e-5)


def test_groups_scored_together_equal_groups_scored_alone(tmp_path):
    """Forbids a result that depends on which groups share a pass (bug 3), and rows that read another group's prompt
    (bug 12): prompts and responses of three ragged groups at once, values and gradients against one by one."""
    model = load_model(make_folder(tmp_path, "qwen3"))
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(SMALL["vocab_size"], (n,), generator=generator) for n in (3, 9, 1)]
    owner, lengths = torch.tensor([0, 1, 1, 2, 0]), torch.tensor([4, 1, 7, 2, 5])
    responses = torch.randint(SMALL["vocab_size"], (5, 7), generator=generator)
    w = weights_like(responses.float())
    alone = torch.zeros(5, 7)
    for i, prompt in enumerate(prompts):
        rows = (owner == i).nonzero().flatten()
        alone = alone.index_put((rows,), token_logprobs(model, prompt, responses[rows], 0.7, lengths[rows])[0])
    expected = gradients(model, (w * alone).sum())
    for given in (prompts, encode_prompts(model, prompts)):
        together, _ = score_responses(model, given, owner, responses, lengths, 0.7)
        assert relative(together, alone) < 1e-5
        assert_same_gradients(gradients(model, (w * together).sum()), expected, 1e-5)


@pytest.mark.parametrize("at_once", [1, 500, 10**9], ids=["row by row", "a few rows", "all rows"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "gradient checkpointing"])
def test_memory_settings_change_no_gradient(again, at_once, tmp_path, monkeypatch):
    """Forbids an attention that depends on how many rows it takes at a time, and checkpointing that runs a block twice
    with different keys: the gradient against that of plain causal attention over full sequences, one after the other."""
    model = load_model(make_folder(tmp_path, "qwen3"))
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(SMALL["vocab_size"], (n,), generator=generator) for n in (3, 9)]
    owner, lengths = torch.tensor([0, 1, 1, 0]), torch.tensor([4, 1, 7, 5])
    responses = torch.randint(SMALL["vocab_size"], (4, 7), generator=generator)
    plain = 0
    for i, ids, n in zip(owner.tolist(), responses, lengths.tolist()):
        logits = model.logits(model(torch.cat([prompts[i], ids[:n]])[None]))[0, len(prompts[i]) - 1:-1]
        plain = plain + (logits / 0.7).log_softmax(-1).gather(1, ids[:n, None]).sum()
    expected = gradients(model, plain)
    monkeypatch.setattr(logprobs_module, "SCORES_AT_ONCE", at_once)
    model.gradient_checkpointing = again
    together, _ = score_responses(model, prompts, owner, responses, lengths, 0.7)
    assert_same_gradients(gradients(model, together.sum()), expected, 1e-5)
    model.zero_grad()
    prefix = encode_prompts(model, prompts)
    leaves = prefix.cut()
    score_responses(model, leaves, owner, responses, lengths, 0.7)[0].sum().backward()
    torch.autograd.backward(prefix.tensors, [x.grad for x in leaves.tensors])
    assert_same_gradients({name: p.grad for name, p in model.named_parameters()}, expected, 1e-5)


def test_attention_by_hand():
    """Forbids an error in the hand-written attention: finite differences in float64, and PyTorch's own attention."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64, generator=generator).requires_grad_() for n in (5, 6, 6))
    bias = torch.zeros(2, 1, 5, 6).masked_fill(torch.ones(5, 6, dtype=torch.bool).triu(2), float("-inf"))
    attention = lambda q, k, v: cpu.CachedAttention.apply(q, k, v, bias)
    assert torch.autograd.gradcheck(attention, (q, k, v))
    assert relative(attention(q, k, v), F.scaled_dot_product_attention(q, k, v, attn_mask=bias.double())) < 1e-12


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_packed_weights_compute_the_same(dtype, most, tmp_path):
    """Forbids products with weights laid out wrongly, and weights of yesterday: the layout is made anew each time (bug 14)
    and gone afterwards."""
    model, tokens = load_model(make_folder(tmp_path, "qwen2")).to(dtype), torch.arange(12).view(2, 6)
    with torch.no_grad():
        for _ in range(2):
            plain = model.logits(model(tokens))
            with cpu.packed_weights(model):
                packed = model.logits(model(tokens))
            assert relative(packed, plain) < most
            assert torch.equal(model.logits(model(tokens)), plain)
            for p in model.parameters():
                p.mul_(1.1)


def test_scoring_after_inference_mode(tmp_path):
    """Forbids a cache that survives where it must not (bug 14): what sampling keeps under inference_mode (the rope
    frequencies) neither breaks nor changes a later training pass."""
    folder = make_folder(tmp_path)
    prompt, responses, lengths = some_group([5, 1, 3])
    results = []
    for sample_first in (False, True):
        model_module.rope_frequencies.cache_clear()
        model = load_model(folder)
        if sample_first:
            with torch.inference_mode():
                model(prompt[None])
        logprobs, _ = token_logprobs(model, prompt, responses, 1.0, lengths)
        results.append((logprobs, gradients(model, logprobs.sum())))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in results[0][1])


# ---------------------------------------------------------------------------------------------------------------------
# linear_logprobs: the one gradient written by hand

def some_linear(n=7, width=5, vocab=11, dtype=torch.float64, scale=1.0):
    """hidden (n, D), weight (V, D), targets (n,); a target stands twice, as tokens do."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, width, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab, (n,), generator=generator)
    targets[-1] = targets[0]
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


@pytest.mark.parametrize("rows_at_once", [1, 3, 7], ids=["7-chunks", "3-chunks", "1-chunk"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_hand_written_gradient(temperature, rows_at_once, monkeypatch):
    """Forbids an error in the hand-written backward: finite differences, in float64, over whole and broken chunks."""
    hidden, weight, targets = some_linear()
    monkeypatch.setattr(logprobs_module, "LOGITS_AT_ONCE", rows_at_once * len(weight))
    assert torch.autograd.gradcheck(lambda h, w: linear_logprobs(h, w, targets, temperature), (hidden, weight))


def test_chunks_do_not_matter(monkeypatch):
    """Forbids a result that depends on the memory setting (bug 3), and chunks that are larger than they should be."""
    hidden, weight, targets = some_linear(n=10)
    rows, linear = [], F.linear

    def counted(hidden, weight):
        rows.append(len(hidden))
        return linear(hidden, weight)

    plain = (F.linear(hidden, weight) / 0.7).log_softmax(-1)                                  # (n, V)
    expected = plain.gather(1, targets[:, None])[:, 0]
    w = weights_like(expected)
    expected_grads = torch.autograd.grad((w * expected).sum(), (hidden, weight))
    for at_once, most in [(1, 1), (len(weight), 1), (4 * len(weight), 4), (9 * len(weight) + 3, 9), (10**6, 10)]:
        rows.clear()
        monkeypatch.setattr(logprobs_module, "LOGITS_AT_ONCE", at_once)
        monkeypatch.setattr(logprobs_module.F, "linear", counted)
        logprobs, entropy = linear_logprobs(hidden, weight, targets, 0.7)
        grads = torch.autograd.grad((w * logprobs).sum(), (hidden, weight))
        assert max(rows) == most and sum(rows) == 20      # every row once forward and once backward
        assert relative(logprobs, expected) < 1e-12
        assert relative(entropy, torch.distributions.Categorical(logits=plain).entropy()) < 1e-12
        assert all(relative(a, b) < 1e-12 for a, b in zip(grads, expected_grads))


def test_log_softmax_is_fp32_for_bf16_inputs():
    """Forbids log-softmax in bf16 (bug 7): from bf16 inputs come the fp32 values of the bf16 logits, bit for bit."""
    hidden, weight, targets = some_linear(n=50, width=32, vocab=300, dtype=torch.bfloat16)
    logprobs, entropy = linear_logprobs(hidden, weight, targets, 0.7)
    every = (F.linear(hidden, weight).float() / 0.7).log_softmax(-1)                          # (n, V) fp32
    exact = every.gather(1, targets[:, None])[:, 0]
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert (logprobs - exact).abs().max() < 1e-5
    assert relative(entropy, torch.distributions.Categorical(logits=every).entropy()) < 1e-5

    ours, theirs = (torch.autograd.grad(x.sum(), (hidden, weight)) for x in (logprobs, exact))
    for grad, expected in zip(ours, theirs):
        assert grad.dtype == torch.bfloat16
        assert relative(grad, expected) < 0.02


def test_extreme_logits_stay_finite():
    """Forbids exp(logit) and log(0): with logits of ±10^4 every number stays finite, and entropy falls to 0, not NaN."""
    hidden, weight, targets = some_linear(dtype=torch.float32, scale=1e4)
    logprobs, entropy = linear_logprobs(hidden, weight, targets)
    grads = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    assert logprobs.isfinite().all() and entropy.isfinite().all() and all(g.isfinite().all() for g in grads)
    assert (entropy >= 0).all() and entropy.max() < 1e-3


def test_entropy_has_no_gradient():
    """Forbids an entropy that pulls on the policy: it is a metric, and a loss made of it alone cannot run backward."""
    hidden, weight, targets = some_linear()
    logprobs, entropy = linear_logprobs(hidden, weight, targets)
    assert logprobs.requires_grad and not entropy.requires_grad


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_memory_goes_back_when_it_has_grown():
    """Forbids a long run that fills the machine with gaps: freed blocks below one that lives are given back once a step, and not before."""
    code = """
import torch
from support.cpu import give_back_freed_memory, keep_freed_memory
keep_freed_memory()
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
blocks = [torch.ones(2**18) for _ in range(1200)]                       # 1 MiB each
last = torch.ones(2**18)
before = resident()
del blocks
kept = resident()
give_back_freed_memory()
print(before - kept, kept - resident())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=os.path.dirname(model_module.__file__), timeout=120)
    assert done.returncode == 0, done.stderr
    kept, returned = map(float, done.stdout.split())
    assert kept < 100 and returned > 800
