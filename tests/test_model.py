"""model.py against transformers: the same numbers from the same folders, in both directions."""
import glob
import os

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import (
    ROPE,
    SMALL,
    file_name,
    make_folder,
    oracle,
    randomise,
    read_json,
    read_tensors,
    relative,
    write_json,
    write_rope,
)
from model import load_model, save_model
from support.common import InputError
from support.folders import FAMILIES


# Before version 5 transformers passes over rope_parameters in silence.
READS_ROPE_PARAMETERS = int(transformers.__version__.split(".")[0]) >= 5


def assert_same_weights(model, other):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


# ---- What the network computes -------------------------------------------------------------------

LLAMA_CASES = {
    "llama-grouped-heads": dict(),
    "llama-all-heads-own-kv": dict(
        rope="theta",
        dialect="rope_parameters",
        num_key_value_heads=4,
    ),
    "llama-head-dim-tied": dict(
        rope="llama3",
        head_dim=8,
        tie_word_embeddings=True,
        shard="8KB",
    ),
    "llama-all-biases": dict(
        rope="linear",
        dialect="rope_parameters",
        attention_bias=True,
        mlp_bias=True,
    ),
    "llama-mlp-bias-llama3": dict(
        rope="llama3",
        dialect="rope_parameters",
        head_dim=16,
        mlp_bias=True,
    ),
}
MISTRAL_CASES = {
    "mistral": dict(sliding_window=None),
    "mistral-head-dim-tied": dict(
        sliding_window=None,
        rope="theta",
        dialect="rope_parameters",
        head_dim=10,
        tie_word_embeddings=True,
        shard="8KB",
    ),
    "mistral-linear": dict(
        sliding_window=None,
        rope="linear",
        num_key_value_heads=1,
    ),
}
QWEN2_CASES = {    # biases on q, k and v, none on o
    "qwen2": dict(shard="8KB"),
    "qwen2-tied": dict(
        rope="theta",
        dialect="rope_parameters",
        num_key_value_heads=1,
        tie_word_embeddings=True,
    ),
    "qwen2-llama3": dict(rope="llama3", hidden_size=32),
    "qwen2-yarn": dict(rope="yarn", hidden_size=64),
    "qwen2-yarn-swapped": dict(rope="yarn-swapped", hidden_size=64),
}
QWEN3_CASES = {    # norms on q and k
    "qwen3": dict(head_dim=8),
    "qwen3-bias-tied": dict(
        rope="linear",
        dialect="rope_parameters",
        head_dim=10,
        attention_bias=True,
        tie_word_embeddings=True,
        shard="8KB",
    ),
    "qwen3-yarn": dict(rope="yarn", head_dim=16),
    "qwen3-yarn-given": dict(rope="yarn-given", dialect="rope_parameters", head_dim=16),
    "qwen3-llama3": dict(
        rope="llama3",
        dialect="rope_parameters",
        head_dim=6,
        num_key_value_heads=4,
    ),
}
SMOLLM3_CASES = {    # layers without rope
    "smollm3-every-fourth": dict(num_hidden_layers=5),
    "smollm3-every-second-tied": dict(
        rope="theta",
        dialect="rope_parameters",
        num_hidden_layers=3,
        no_rope_layer_interval=2,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        shard="8KB",
    ),
    "smollm3-listed-yarn": dict(
        rope="yarn",
        head_dim=16,
        num_hidden_layers=3,
        no_rope_layers=[0, 1, 0],
    ),
    "smollm3-all-with-rope": dict(no_rope_layers=[1, 1]),
}
OLMO2_CASES = {    # norms on the whole query and key, and after attention and MLP
    "olmo2": dict(),
    "olmo2-all-heads-own-kv": dict(
        rope="theta",
        dialect="rope_parameters",
        num_key_value_heads=4,
        rms_norm_eps=1e-2,
        shard="8KB",
    ),
    "olmo2-bias-tied-linear": dict(
        rope="linear",
        num_key_value_heads=1,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
}
GRANITE_CASES = {    # factors
    "granite": dict(),    # attention_multiplier 1, where others have 1 / sqrt(d)
    "granite-factors": dict(
        rope="theta",
        dialect="rope_parameters",
        embedding_multiplier=12.0,
        attention_multiplier=0.0625,
        residual_multiplier=0.22,
        logits_scaling=8.0,
        tie_word_embeddings=True,
        shard="8KB",
    ),
    "granite-biases": dict(
        residual_multiplier=2,
        logits_scaling=0.5,
        attention_bias=True,
        mlp_bias=True,
    ),
}
CASES = {**LLAMA_CASES, **MISTRAL_CASES, **QWEN2_CASES, **QWEN3_CASES,
         **SMOLLM3_CASES, **OLMO2_CASES, **GRANITE_CASES}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name, tmp_path):
    """The network computes what transformers computes from the same folder, and transformers
    computes the same again from a folder that we have saved. (Bug: a forward pass that differs, or
    a saved folder that others read differently.)"""
    case = dict(CASES[name])
    dialect = case.pop("dialect", "rope_scaling")
    family = name.partition("-")[0]
    # In the older dialect, which every transformers reads:
    folder = make_folder(tmp_path / "theirs", family, **case)
    assert len(glob.glob(folder + "/*.safetensors")) > 1 or "shard" not in case
    reference = oracle(folder)
    write_rope(folder, ROPE[case.get("rope", "default")], dialect)

    model = load_model(folder)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(SMALL["vocab_size"], (2, 120), generator=generator)
    with torch.no_grad():
        theirs = reference(tokens).logits
        ours = model.logits(model(tokens))
    assert ours.dtype == torch.float32
    assert relative(ours, theirs) < 1e-5

    saved = str(tmp_path / "ours")
    save_model(model, saved)
    assert_same_weights(model, load_model(saved))
    if dialect == "rope_parameters" and not READS_ROPE_PARAMETERS:
        return
    with torch.no_grad():
        assert torch.equal(oracle(saved)(tokens).logits, theirs)


def test_rope_theta_beside_rope_parameters(tmp_path):
    """A config.json that mixes its dialects, rope_parameters with rope_theta beside it, is read as
    transformers reads it, or refused. (Bug: a base of 10000, the default, in silence.)"""
    if not READS_ROPE_PARAMETERS:
        pytest.skip("older transformers does not read rope_parameters")
    folder = make_folder(tmp_path)
    config = read_json(folder + "/config.json")
    del config["rope_scaling"]
    config["rope_theta"] = 500.0
    config["rope_parameters"] = {"rope_type": "linear", "factor": 4.0}
    write_json(folder + "/config.json", config)
    tokens = torch.arange(60)[None]
    try:
        model = load_model(folder)
    except InputError:
        return
    with torch.no_grad():
        theirs = oracle(folder)(tokens).logits
        ours = model.logits(model(tokens))
    assert relative(ours, theirs) < 1e-5


OPTIONAL = (    # what a config.json may leave out
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "rope_theta",
    "rope_scaling", "rope_parameters", "no_rope_layers", "no_rope_layer_interval", "layer_types",
    "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")


@pytest.mark.parametrize("family", FAMILIES)
def test_left_out_fields_mean_what_transformers_takes_them_for(family, tmp_path):
    """A config.json that names only sizes gives transformers' logits. (Bug: a default of another
    family, such as an output matrix of its own where SmolLM3 has none.)"""
    sizes = dict(vocab_size=67, hidden_size=64, intermediate_size=24, num_hidden_layers=5,
                 num_attention_heads=32, pad_token_id=None)
    if family == "mistral":
        sizes["sliding_window"] = None
    config = AutoConfig.for_model(family, **sizes)
    folder = str(tmp_path)
    randomise(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    settings = read_json(folder + "/config.json")
    left = {name: value for name, value in settings.items() if name not in OPTIONAL}
    write_json(folder + "/config.json", left)
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        theirs = oracle(folder)(tokens).logits
        model = load_model(folder)
        ours = model.logits(model(tokens))
    assert relative(ours, theirs) < 1e-5


PROMPTS = [
    "The capital of France is",
    "2, 4, 6, 8,",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "Natalia sold 48 clips in April and half as many in May. Altogether she sold",
    "Dear Sir or Madam,",
    "import torch\n",
]


def test_greedy_continuations_of_a_real_model():
    """A real model continues eight texts greedily as transformers' `generate` does. (Bug: a
    difference that only real sizes and real weights show.)"""
    folder = os.environ.get("GCPO_TEST_MODEL")
    if not folder:
        pytest.skip("set GCPO_TEST_MODEL to a model folder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # No end token: 20 tokens from each prompt.
    network.generation_config = transformers.GenerationConfig(pad_token_id=0)
    theirs = []
    for ids in prompts:
        found = network.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=20,
        )
        theirs.append(found[0].tolist())
    del network

    model = load_model(folder)
    ours = [list(ids) for ids in prompts]
    rows = torch.arange(len(ours))
    for _ in range(20):
        # Padded on the right: nothing to the right of a token can reach it.
        batch = pad_sequence([torch.tensor(ids) for ids in ours], batch_first=True)
        last = torch.tensor([len(ids) - 1 for ids in ours])
        with torch.no_grad():
            hidden = model(batch)[rows, last]                           # (N, D)
        tokens = model.logits(hidden).argmax(-1)                        # (N,)
        for ids, token in zip(ours, tokens.tolist()):
            ids.append(token)
    assert ours == theirs


# ---- Model folders -------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_files_load_exactly(dtype, tmp_path):
    """A 16-bit file becomes fp32 weights of exactly its values. (Bug: bf16 master weights.)"""
    folder = make_folder(tmp_path, "qwen2", dtype=dtype)
    stored = load_file(folder + "/model.safetensors")
    for name, p in load_model(folder).named_parameters():
        tensor = stored[file_name(name)]
        assert tensor.dtype == dtype
        assert p.dtype == torch.float32
        assert torch.equal(p, tensor.float()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_saved_config_names_the_dtype_of_the_weights(dtype, tmp_path):
    """A saved config.json names the dtype that the saved weights have. (Bug: fp32 weights said to
    be bfloat16, so that the next reader rounds them: bf16 master weights again.)"""
    theirs = make_folder(tmp_path / "theirs", dtype=torch.bfloat16)
    ours = tmp_path / "ours"
    save_model(load_model(theirs, dtype=dtype), str(ours))
    config = read_json(ours / "config.json")
    named = {config[name] for name in ("dtype", "torch_dtype") if name in config}
    assert named == {str(dtype).removeprefix("torch.")}
    assert all(t.dtype == dtype for t in load_file(ours / "model.safetensors").values())


def test_save_replaces_a_folder_and_copies_the_tokenizer(tmp_path):
    """A model saved onto its own folder leaves nothing of the old model there, and keeps the
    tokenizer's files. (Bug: a folder overwritten in place.)"""
    folder = make_folder(tmp_path / "model", shard="8KB")
    tokenizer = tmp_path / "model" / "tokenizer_config.json"
    tokenizer.write_text('{"eos_token": "</s>"}')
    model = load_model(folder)
    # Onto itself: what is copied must outlive what is replaced.
    save_model(model, folder, tokenizer_from=folder)
    assert os.listdir(tmp_path) == ["model"]
    assert not glob.glob(folder + "/*-of-*")
    assert not os.path.exists(folder + "/model.safetensors.index.json")
    assert tokenizer.read_text() == '{"eos_token": "</s>"}'
    assert_same_weights(model, load_model(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_leaves_nothing_random(family, tmp_path):
    """Every parameter is the file's tensor, and a file that lacks any one of them is refused by
    that one's name. (Bug: loaders that leave parameters at random values.)"""
    extra = {}
    if family == "mistral":
        extra = dict(sliding_window=None)
    if family == "llama":
        extra = dict(attention_bias=True, mlp_bias=True)
    folder = make_folder(tmp_path, family, num_hidden_layers=1, **extra)
    path = folder + "/model.safetensors"
    stored = read_tensors(path)

    torch.manual_seed(1)
    first = load_model(folder).state_dict()
    torch.manual_seed(2)
    second = load_model(folder).state_dict()
    assert {file_name(name) for name in first} == stored.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
        assert torch.equal(first[name], stored[file_name(name)]), name

    for name in stored:
        others = {other: t for other, t in stored.items() if other != name}
        save_file(others, path, metadata={"format": "pt"})
        with pytest.raises(InputError, match=name):
            load_model(folder)
