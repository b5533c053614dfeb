"""The toy: a model with random weights, and problems that luck does not solve.

A lock has a code of three digits: "Sam has a lock. It starts with 2. Each next digit adds 9, 8.
What is the code?" Its gold is "2+9=11; 1+8=9" and "#### 219". No random model says that.
"""
from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import shutil

import tokenizers
import torch

from model import Transformer, read_config, save_model
from support import parallel
from support.common import InputError, remove


TOY = dict(
    steps=240, prompts=32, group_size=4, max_new_tokens=24, updates=4, lr=2.5e-3, lr_end=0.05,
    warmup=10, eval_every=25, eval_limit=0, instruction="", dtype="float32", threads=1,
    rows_per_pass=64)
TOY_NAMES = ("Ann", "Ben", "Eva", "Ian", "Kim", "Leo", "Mia", "Sam")
TOY_HELD_OUT = 229  # of 729 locks

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 96,
    "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 3, "hidden_act": "silu", "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "eos_token_id": 0,
    "pad_token_id": 0}

# A word keeps the space after it, so joining tokens gives the text back, and digits stay bare.
PIECES = r"[A-Za-z]+ ?|\d|[+=]|[.,;?] ?|#### |\n"


def toy_problem(name: str, digits: tuple[int, ...]) -> dict:
    """A lock as a GSM8K record: the first digit, then what each next one adds (modulo 10)."""
    first, *addends = digits
    code = [first]
    lines = []
    for a in addends:
        lines.append(f"{code[-1]}+{a}={code[-1] + a}")
        code.append((code[-1] + a) % 10)
    question = (f"{name} has a lock. It starts with {first}. Each next digit adds "
                f"{', '.join(map(str, addends))}. What is the code?")
    return {"question": question,
            "answer": f"{'; '.join(lines)}\n#### {''.join(map(str, code))}"}


def build_toy(folder: str, seed: int) -> dict:
    """Write the toy's model folder, train.jsonl and held_out.jsonl, all of which follow from
    `seed`. Returns their paths as settings."""
    rng = random.Random(seed)
    locks = list(itertools.product(range(1, 10), repeat=3))
    rng.shuffle(locks)
    # The held-out locks are not in the train file, under any name.
    held_out = [toy_problem(rng.choice(TOY_NAMES), lock) for lock in locks[:TOY_HELD_OUT]]
    problems = [toy_problem(name, lock) for lock in locks[TOY_HELD_OUT:] for name in TOY_NAMES]
    rng.shuffle(problems)
    os.makedirs(folder)
    for name, records in (("train.jsonl", problems), ("held_out.jsonl", held_out)):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            f.writelines(json.dumps(r) + "\n" for r in records)

    blank = os.path.join(folder, "blank")    # an architecture and a tokenizer, without weights
    os.makedirs(blank)
    tokenizer = toy_tokenizer(problems[:1000])
    tokenizer.save(os.path.join(blank, "tokenizer.json"))
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>",
            "pad_token": "<end>", "unk_token": "<unknown>"},
        "generation_config.json": {"eos_token_id": 0, "pad_token_id": 0},
        "config.json": {**SHAPE, "vocab_size": tokenizer.get_vocab_size()},
    }
    for name, value in files.items():
        with open(os.path.join(blank, name), "w", encoding="utf-8") as f:
            json.dump(value, f, indent=2)
    model = Transformer(read_config(blank)).init_weights(torch.Generator().manual_seed(seed))
    save_model(model, os.path.join(folder, "model"), tokenizer_from=blank)
    shutil.rmtree(blank)
    return toy_files(folder)


def toy_tokenizer(problems: list[dict]) -> tokenizers.Tokenizer:
    """One token a word, a digit or a sign, for the words of these problems."""
    words = set("0123456789")
    for r in problems:
        words |= set(re.findall(PIECES, r["question"] + "\n" + r["answer"]))
    vocabulary = ["<end>", "<unknown>", *sorted(words)]
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unknown>"))
    pieces = tokenizers.Regex(PIECES)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(pieces, "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<end>", "<unknown>"])
    return tokenizer


def toy_files(folder: str) -> dict:
    """The toy's paths, as settings."""
    return {"model": os.path.join(folder, "model"),
            "data": os.path.join(folder, "train.jsonl"),
            "eval_data": os.path.join(folder, "held_out.jsonl")}


def only_begun(out: str) -> bool:
    """Whether a folder holds nothing but what a run leaves that is stopped in its first seconds."""
    if not set(os.listdir(out)) <= {"toy", "tokenizer", "run.json.writing"}:
        return False
    toy = os.path.join(out, "toy")
    files = {"train.jsonl", "held_out.jsonl", "blank", "model", "model.writing"}
    return not os.path.exists(toy) or set(os.listdir(toy)) <= files


@contextlib.contextmanager
def removed_on_error(config):
    """A run that cannot begin leaves nothing: the toy that was built for it goes again, and the
    folder if it is empty then."""
    try:
        yield
    except (InputError, OSError):
        if parallel.rank() == 0 and not config.resume:
            if config.model is None:
                remove(os.path.join(config.out, "toy"))
            with contextlib.suppress(OSError):
                os.rmdir(config.out)
                os.rmdir("runs")    # if this was its first
        raise
