"""Model folders spoiled in one way each. load_model must refuse every one of them.

It must say so in one line that names the thing, raise no other exception, and spend no
time or memory on what an absurd number asks for.

The bug this file forbids: a folder that cannot be computed correctly and is read all the
same. It gives wrong results without a word.
"""
import os
import random
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import read_tensors, write_json
from model import Transformer, load_model, read_config
from support.common import InputError, read_json


CONFIG = dict(
    model_type="llama",
    vocab_size=19,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=False,
)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


# ---- A good folder -------------------------------------------------------------------------------

def save_weights(tensors, path):
    save_file(tensors, path, metadata={"format": "pt"})


def good_folder(folder, **changes):
    """A tiny random model's config.json and model.safetensors.

    `changes` go into config.json.
    """
    os.makedirs(folder, exist_ok=True)
    settings = {**CONFIG, **changes}
    write_json(os.path.join(folder, "config.json"), settings)
    network = Transformer(read_config(folder))
    network.init_weights(torch.Generator().manual_seed(0))
    tensors = {}
    for name, parameter in network.named_parameters():
        if not name.startswith("lm_head"):
            name = "model." + name
        tensors[name] = parameter.detach()
    save_weights(tensors, os.path.join(folder, WEIGHTS))
    return str(folder)


def shards(folder):
    """The same weights as two shards and an index. Returns the index's weight_map.

    This is no fault by itself.
    """
    path = os.path.join(folder, WEIGHTS)
    tensors = read_tensors(path)
    os.remove(path)
    names = sorted(tensors)
    parts = {
        "a.safetensors": names[:5],
        "b.safetensors": names[5:],
    }
    weight_map = {}
    for file, part in parts.items():
        shard = {name: tensors[name] for name in part}
        save_weights(shard, os.path.join(folder, file))
        weight_map.update({name: file for name in part})
    write_json(os.path.join(folder, INDEX), {"weight_map": weight_map})
    return weight_map


# ---- Ways to spoil it: each of these returns a function of the folder ----------------------------

def config(**changes):
    """Other values in config.json."""
    def spoil(folder):
        path = os.path.join(folder, "config.json")
        write_json(path, {**read_json(path), **changes})
    return spoil


def rope(**parameters):
    """Other values in config.json's rope_parameters."""
    return config(rope_parameters={"rope_theta": 10000.0, **parameters})


def without(name):
    """A key gone from config.json."""
    def spoil(folder):
        path = os.path.join(folder, "config.json")
        settings = read_json(path)
        settings.pop(name, None)
        write_json(path, settings)
    return spoil


def family(model_type, **changes):
    """A model of another family, whose weights fit; then other values in config.json."""
    def spoil(folder):
        good_folder(folder, model_type=model_type)
        config(**changes)(folder)
    return spoil


def write(name, content):
    """A file with other bytes."""
    if isinstance(content, str):
        content = content.encode()

    def spoil(folder):
        with open(os.path.join(folder, name), "wb") as f:
            f.write(content)
    return spoil


def remove(name):
    """A file gone."""
    return lambda folder: os.remove(os.path.join(folder, name))


def weights(change):
    """model.safetensors after change(tensors)."""
    def spoil(folder):
        path = os.path.join(folder, WEIGHTS)
        tensors = read_tensors(path)
        change(tensors)
        tensors = {name: t.contiguous() for name, t in tensors.items()}
        save_weights(tensors, path)
    return spoil


def set_number(name, value):
    """A change for `weights`: one number of one tensor."""
    def change(tensors):
        tensors[name].view(-1)[3] = value
    return change


def cut(keep):
    """model.safetensors cut short, as by a download that stopped."""
    def spoil(folder):
        path = os.path.join(folder, WEIGHTS)
        size = os.path.getsize(path)
        os.truncate(path, keep(size))
    return spoil


def sharded(spoil):
    """Two shards in place of the one file, and then `spoil`."""
    def both(folder):
        shards(folder)
        spoil(folder)
    return both


def index(make):
    """Two shards, and an index with the weight_map that make(weight_map) returns."""
    def spoil(folder):
        weight_map = make(shards(folder))
        write_json(os.path.join(folder, INDEX), {"weight_map": weight_map})
    return spoil


# ---- Ways to spoil it: each of these is a function of the folder ---------------------------------

def mistral_window_without_positions(folder):
    family("mistral", sliding_window=4096)(folder)
    without("max_position_embeddings")(folder)


def shard_outside(folder):
    """The index names a file that exists and is good, but lies beside the folder."""
    weight_map = shards(folder)
    inside = os.path.join(folder, "a.safetensors")
    outside = os.path.join(folder, "..", "a.safetensors")
    os.rename(inside, outside)
    for name, file in weight_map.items():
        if file == "a.safetensors":
            weight_map[name] = "../a.safetensors"
    write_json(os.path.join(folder, INDEX), {"weight_map": weight_map})


def same_tensor_in_both_shards(folder):
    shards(folder)
    path = os.path.join(folder, "b.safetensors")
    tensors = read_tensors(path)
    tensors["lm_head.weight"] = torch.zeros(19, 8)
    save_file(tensors, path)


def untied_without_output(folder):
    good_folder(folder, tie_word_embeddings=True)
    config(tie_word_embeddings=False)(folder)


def tied_with_another_output(folder):
    good_folder(folder, tie_word_embeddings=False)
    config(tie_word_embeddings=True)(folder)


# ---- Folders that are bad ------------------------------------------------------------------------

NORM = "model.norm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)

# name: (what spoils a good folder, words that the message must contain)
CASES = {
    # --- config.json as a file
    "no-config": (remove("config.json"), ["no config.json"]),
    "config-malformed": (
        write("config.json", '{\n "model_type": "llama",\n "vocab_size": oops\n}'),
        ["config.json", "line 3"],
    ),
    "config-empty": (write("config.json", ""), ["config.json", "line 1"]),
    "config-a-list": (write("config.json", "[1, 2]"), ["config.json", "not a JSON object"]),
    "config-null": (write("config.json", "null"), ["config.json", "not a JSON object"]),
    "config-binary": (write("config.json", b"\xff\xfe\x00\x80"), ["config.json"]),
    "config-too-deep": (write("config.json", "[" * 100_000), ["config.json"]),
    "config-number-too-long": (
        write("config.json", '{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}"),
        ["config.json"],
    ),
    # --- another architecture
    "unknown-model-type": (config(model_type="mixtral"), ["config.json", "mixtral"]),
    "no-model-type": (without("model_type"), ["config.json", "model_type"]),
    "model-type-a-list": (config(model_type=["llama"]), ["config.json", "model_type"]),
    "quantized": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        ["config.json", "quantized"],
    ),
    "gelu": (config(hidden_act="gelu"), ["config.json", "hidden_act", "gelu"]),
    "partial-rotary": (config(partial_rotary_factor=0.5), ["config.json", "partial_rotary_factor"]),
    "partial-rotary-inside": (
        config(partial_rotary_factor=1.0, rope_scaling={
            "rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}),
        ["config.json", "partial_rotary_factor"],
    ),
    "both-ways": (config(is_causal=False), ["config.json", "is_causal", "False"]),
    "both-ways-null": (config(is_causal=None), ["config.json", "is_causal"]),
    "other-weights": (
        config(transformers_weights="other.safetensors"),
        ["config.json", "transformers_weights", "other.safetensors"],
    ),
    "other-config": (
        config(configuration_files=["config.4.0.0.json"]), ["config.json", "configuration_files"]),
    "two-lengths": (
        config(original_max_position_embeddings=16, rope_scaling={
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}),
        ["config.json", "original_max_position_embeddings", "two values"],
    ),
    "granite-logits-by-next-to-nothing": (
        family("granite", logits_scaling=1e-39), ["config.json", "logits_scaling"]),
    # --- a sliding window that is on
    "mistral-window": (family("mistral", sliding_window=16), ["config.json", "sliding window"]),
    "mistral-window-text": (family("mistral", sliding_window="16"), ["config.json", "sliding"]),
    "qwen2-window": (
        family(
            "qwen2",
            use_sliding_window=True,
            sliding_window=16,
            max_window_layers=0,
        ),
        ["config.json", "sliding window"],
    ),
    # transformers fills in 4096 where a file does not name the window,
    # and 131072 where mistral does not name the positions
    "mistral-window-left-out": (
        family("mistral", max_position_embeddings=32768),
        ["config.json", "sliding"],
    ),
    "mistral-window-no-limit": (mistral_window_without_positions, ["config.json", "sliding"]),
    "qwen2-window-left-out": (
        family(
            "qwen2",
            use_sliding_window=True,
            max_window_layers=0,
            max_position_embeddings=32768,
        ),
        ["config.json", "sliding"],
    ),
    "smollm3-window-on": (
        family("smollm3", use_sliding_window=True, sliding_window=8),
        ["config.json", "sliding window"],
    ),
    "smollm3-no-rope-text": (
        family("smollm3", no_rope_layers="0, 1"), ["config.json", "no_rope_layers"]),
    "smollm3-no-rope-short": (
        family("smollm3", no_rope_layers=[1]), ["config.json", "no_rope_layers", "2"]),
    "smollm3-no-rope-names": (
        family("smollm3", no_rope_layers=[0, [1]]), ["config.json", "no_rope_layers"]),
    "smollm3-no-rope-interval": (
        family("smollm3", no_rope_layer_interval=0), ["config.json", "no_rope_layer_interval"]),
    "granite-logits-by-zero": (
        family("granite", logits_scaling=0), ["config.json", "logits_scaling"]),
    "granite-multiplier-text": (
        family("granite", attention_multiplier="1"), ["config.json", "attention_multiplier"]),
    "qwen3-layer-types": (
        family("qwen3", layer_types=["full_attention", "sliding_attention"]),
        ["config.json", "sliding"],
    ),
    "layer-types-a-number": (config(layer_types=2), ["config.json", "layer_types"]),
    # --- rotary position embedding
    "yarn": (config(rope_scaling={"type": "yarn", "factor": 4.0}), ["config.json", "yarn"]),
    "yarn-new-dialect": (rope(rope_type="yarn", factor=4.0), ["config.json", "yarn"]),
    "yarn-theta-1": (
        rope(rope_type="yarn", factor=4.0, rope_theta=1.0, original_max_position_embeddings=64),
        ["config.json", "rope_theta"]),
    "yarn-mscale": (
        rope(rope_type="yarn", factor=4.0, mscale=1.0, original_max_position_embeddings=64),
        ["config.json", "mscale"]),
    "dynamic": (
        config(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        ["config.json", "dynamic"],
    ),
    "rope-scaling-text": (config(rope_scaling="linear"), ["config.json", "rope_scaling"]),
    "rope-scaling-a-list": (
        config(rope_scaling=[["type", "linear"]]),
        ["config.json", "rope_scaling"],
    ),
    "rope-parameters-text": (config(rope_parameters="default"), ["config.json", "rope_parameters"]),
    "rope-per-layer-type": (
        config(rope_parameters={"full_attention": LLAMA3}),
        ["config.json", "rope"],
    ),
    "linear-without-factor": (rope(rope_type="linear"), ["config.json", "factor"]),
    "linear-factor-zero": (rope(rope_type="linear", factor=0), ["config.json", "factor"]),
    "linear-factor-infinite": (
        rope(rope_type="linear", factor=float("inf")),
        ["config.json", "factor"],
    ),
    "llama3-without-low": (
        rope(**{**LLAMA3, "low_freq_factor": None}),
        ["config.json", "low_freq_factor"],
    ),
    "llama3-low-above-high": (
        rope(**{**LLAMA3, "low_freq_factor": 5.0}),
        ["config.json", "low_freq_factor"],
    ),
    "rope-theta-negative": (config(rope_theta=-1.0), ["config.json", "rope_theta"]),
    "rope-theta-text": (config(rope_theta="10000"), ["config.json", "rope_theta"]),
    "rope-theta-nan": (config(rope_theta=float("nan")), ["config.json", "rope_theta"]),
    "rope-theta-too-long": (config(rope_theta=10**400), ["config.json", "rope_theta"]),
    # --- numbers
    "vocab-absurd": (config(vocab_size=10**12), ["config.json", "vocab_size"]),
    "vocab-negative": (config(vocab_size=-5), ["config.json", "vocab_size"]),
    "vocab-missing": (without("vocab_size"), ["config.json", "vocab_size"]),
    "width-zero": (config(hidden_size=0), ["config.json", "hidden_size"]),
    "width-text": (config(hidden_size="8"), ["config.json", "hidden_size"]),
    "width-fraction": (config(hidden_size=8.5), ["config.json", "hidden_size"]),
    "width-a-list": (config(hidden_size=[8]), ["config.json", "hidden_size"]),
    "layers-bool": (config(num_hidden_layers=True), ["config.json", "num_hidden_layers"]),
    "layers-absurd": (config(num_hidden_layers=10**9), ["config.json", "num_hidden_layers"]),
    "mlp-null": (config(intermediate_size=None), ["config.json", "intermediate_size"]),
    "eps-zero": (config(rms_norm_eps=0), ["config.json", "rms_norm_eps"]),
    "eps-text": (config(rms_norm_eps="1e-5"), ["config.json", "rms_norm_eps"]),
    "positions-negative": (
        config(max_position_embeddings=-1),
        ["config.json", "max_position_embeddings"],
    ),
    "heads-not-divisible": (
        config(num_key_value_heads=3),
        ["config.json", "4 query heads", "3 key/value heads"],
    ),
    "more-kv-heads-than-heads": (
        config(num_key_value_heads=8),
        ["config.json", "4 query heads", "8 key/value heads"],
    ),
    "odd-head-dim": (config(head_dim=3), ["config.json", "head_dim"]),
    "tied-text": (config(tie_word_embeddings="false"), ["config.json", "tie_word_embeddings"]),
    "bias-text": (config(attention_bias="false"), ["config.json", "attention_bias"]),
    # --- sizes that are allowed but are not the file's:
    # --- 2 TB of embedding must not be asked for
    "width-not-the-files": (
        config(hidden_size=2**17, vocab_size=2**22, head_dim=2),
        ["model.safetensors", "config.json"],
    ),
    "layers-not-the-files": (config(num_hidden_layers=200), ["model.layers."]),
    # --- the weight files
    "no-weights": (remove("model.safetensors"), ["neither model.safetensors nor"]),
    "pickle-only": (
        lambda folder: os.rename(f"{folder}/model.safetensors", f"{folder}/pytorch_model.bin"),
        ["safetensors"],
    ),
    "weights-truncated": (cut(lambda size: size - 100), ["model.safetensors", "cut short"]),
    "weights-header-only": (cut(lambda size: 20), ["model.safetensors", "cut short"]),
    "weights-empty": (write("model.safetensors", b""), ["model.safetensors"]),
    "weights-garbage": (
        write("model.safetensors", random.Random(0).randbytes(5000)),
        ["model.safetensors"],
    ),
    "weights-a-web-page": (
        write("model.safetensors", "<html>404 not found</html>" * 50),
        ["model.safetensors"],
    ),
    "weights-a-git-pointer": (
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ["model.safetensors"],
    ),
    "header-not-json": (
        write("model.safetensors", (16).to_bytes(8, "little") + b"{not json at all" + b"\0" * 64),
        ["model.safetensors"],
    ),
    # --- the index
    "index-malformed": (sharded(write(INDEX, '{"weight_map": {\n"a": }')), [INDEX, "line 2"]),
    "index-a-list": (sharded(write(INDEX, "[]")), [INDEX, "weight_map"]),
    "index-without-map": (sharded(write(INDEX, '{"metadata": {}}')), [INDEX, "weight_map"]),
    "index-empty-map": (index(lambda names: {}), [INDEX, "weight_map"]),
    "index-map-to-numbers": (
        index(lambda names: {name: 1 for name in names}),
        [INDEX, "weight_map"],
    ),
    "index-outside": (shard_outside, [INDEX, "../a.safetensors"]),
    "index-absolute": (
        index(lambda names: {name: "/etc/hostname" for name in names}),
        [INDEX, "/etc/hostname"],
    ),
    "index-the-folder-above": (index(lambda names: {name: ".." for name in names}), [INDEX, ".."]),
    "index-names-nothing": (index(lambda names: {name: "" for name in names}), [INDEX]),
    "index-null-byte": (index(lambda names: {name: "a\0b" for name in names}), [INDEX]),
    "index-two-lines": (index(lambda names: {name: "a\nb" for name in names}), [INDEX]),
    "shard-missing": (sharded(remove("b.safetensors")), [INDEX, "b.safetensors", "missing"]),
    "shard-truncated": (
        sharded(lambda folder: os.truncate(f"{folder}/b.safetensors", 500)),
        ["b.safetensors"],
    ),
    "duplicate-tensor": (
        same_tensor_in_both_shards,
        ["b.safetensors", "lm_head.weight", "a.safetensors"],
    ),
    # --- the tensors
    "tensor-missing": (weights(lambda t: t.pop(DOWN)), [DOWN]),
    "tensor-unexpected": (
        weights(lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(12, 8)})),
        ["model.safetensors", "model.layers.2.mlp.up_proj.weight"],
    ),
    "tensor-name-two-lines": (
        weights(lambda t: t.update({"a\nb": torch.zeros(2)})),
        ["model.safetensors", "unexpected"],
    ),
    "bias-unexpected": (
        weights(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(8)})),
        ["model.safetensors", "q_proj.bias"],
    ),
    "shape-wrong": (
        weights(lambda t: t.update({DOWN: torch.zeros(8, 11)})),
        ["model.safetensors", DOWN, "(8, 11)"],
    ),
    "shape-transposed": (
        weights(lambda t: t.update({DOWN: torch.zeros(12, 8)})),
        ["model.safetensors", DOWN, "(12, 8)"],
    ),
    "nan": (weights(set_number(DOWN, float("nan"))), ["model.safetensors", DOWN, "NaN"]),
    "infinite": (weights(set_number(NORM, float("-inf"))), ["model.safetensors", NORM, "infinite"]),
    "int8": (
        weights(lambda t: t.update({DOWN: t[DOWN].to(torch.int8)})),
        ["model.safetensors", DOWN, "int8"],
    ),
    "fp8": (
        weights(lambda t: t.update({DOWN: t[DOWN].to(torch.float8_e4m3fn)})),
        ["model.safetensors", DOWN, "float8"],
    ),
    "untied-without-output": (untied_without_output, ["lm_head.weight"]),
    "tied-with-another-output": (tied_with_another_output, ["lm_head.weight"]),
}


@pytest.mark.parametrize("name", CASES)
def test_spoiled_folder_is_refused(name, tmp_path):
    """A spoiled folder is refused in one line that says where and what.

    That takes less than five seconds of processor time. (Bugs: a folder read that
    cannot be computed correctly; any other exception than InputError with one line.)
    """
    spoil, words = CASES[name]
    folder = good_folder(tmp_path / "model")
    spoil(folder)
    # processor time, because other programs may keep the machine busy
    start = time.process_time()
    with pytest.raises(InputError) as error:
        load_model(folder)
    message = str(error.value)
    assert time.process_time() - start < 5
    assert "\n" not in message
    assert len(message) < 1000
    assert str(tmp_path) in message, "the message does not say where"
    for word in words:
        assert word in message


@pytest.mark.parametrize("path", ["nowhere", "model/config.json", ""])
def test_not_a_folder(path, tmp_path):
    """A mistyped --model is refused: no such folder, a file, or the wrong folder.

    (Bug: a traceback.)
    """
    good_folder(tmp_path / "model")
    with pytest.raises(InputError, match="no config.json|no such folder"):
        load_model(str(tmp_path / path))


# ---- Folders that look odd and are good ----------------------------------------------------------

def another(**changes):
    """Another good folder, with these values in config.json from the start."""
    return lambda folder: good_folder(folder, **changes)


def kv_heads_null(folder):
    """null means one key/value head per query head.

    Only a key that is left out means the family's default.
    """
    good_folder(folder, model_type="qwen2", num_key_value_heads=4)
    config(num_key_value_heads=None)(folder)


OLD_BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"
GOOD = {
    "as-it-is": lambda folder: None,
    "two-shards": shards,
    "mistral-window-null": another(model_type="mistral", sliding_window=None),
    # no text is as long as this window is wide
    "mistral-window-too-wide": another(model_type="mistral", sliding_window=4096),
    "qwen2-window-off": another(
        model_type="qwen2",
        use_sliding_window=False,
        sliding_window=16,
    ),
    "qwen3-window-off": another(
        model_type="qwen3",
        use_sliding_window=False,
        sliding_window=None,
        layer_types=["full_attention"] * 2,
    ),
    "kv-heads-null": kv_heads_null,
    "quantization-null": config(quantization_config=None),
    "rope-scaling-null": config(rope_scaling=None),
    "head-dim-null": config(head_dim=None),
    "unknown-key": config(pretraining_tp=1, favourite_colour="blue"),
    "old-rope-buffer": weights(lambda t: t.update({OLD_BUFFER: torch.ones(1)})),
}


@pytest.mark.parametrize("name", GOOD)
def test_odd_but_good_folder_loads(name, tmp_path):
    """A folder that is only odd loads, and the model's logits are finite.

    (Bug: what is harmless refused: a window that is written down but off, keys that
    nobody reads, buffers of old versions.)
    """
    folder = good_folder(tmp_path / "model")
    GOOD[name](folder)
    network = load_model(folder)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        logits = network.logits(network(ids))
    assert logits.isfinite().all()


def test_tied_copy_of_the_embedding_loads(tmp_path):
    """A tied model loads even if its file holds its one matrix twice.

    (Bug: such a model refused. Some writers do this.)
    """
    embedding = "model.embed_tokens.weight"

    def add_copy(tensors):
        tensors["lm_head.weight"] = tensors[embedding].clone()

    folder = good_folder(tmp_path / "model", tie_word_embeddings=True)
    weights(add_copy)(folder)
    network = load_model(folder)
    saved = load_file(f"{folder}/model.safetensors")
    assert torch.equal(network.output_weight, saved[embedding])
