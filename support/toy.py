"""The toy: a model with random weights, and problems that luck does not solve."""
from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil

import tokenizers
import torch

from model import Transformer, read_config, save_model


# A model with random weights that never solves a problem, and problems that luck does not solve: a code has three digits.
TOY = dict(steps=240, prompts=32, group_size=4, max_new_tokens=24, updates=4, lr=2.5e-3, lr_end=0.05, warmup=10, eval_every=25, eval_limit=0,
           instruction="", dtype="float32", threads=1, rows_per_pass=64)

TOY_NAMES = ("Ann", "Ben", "Eva", "Ian", "Kim", "Leo", "Mia", "Sam")

TOY_HELD_OUT = 229  # of 729 locks


def toy_problem(name: str, digits: tuple[int, ...]) -> dict:
    first, *addends = digits
    code, lines = [first], []
    for a in addends:
        lines.append(f"{code[-1]}+{a}={code[-1] + a}")
        code.append((code[-1] + a) % 10)
    question = f"{name} has a lock. It starts with {first}. Each next digit adds {', '.join(map(str, addends))}. What is the code?"
    return {"question": question, "answer": f"{'; '.join(lines)}\n#### {''.join(map(str, code))}"}


def build_toy(folder: str, seed: int) -> dict:
    """Write the toy's model folder, train.jsonl and held_out.jsonl, all following from `seed`. Returns their paths as settings."""
    rng = random.Random(seed)
    locks = list(itertools.product(range(1, 10), repeat=3))
    rng.shuffle(locks)  # the held-out locks never stand in the train file, under any name
    held_out = [toy_problem(rng.choice(TOY_NAMES), lock) for lock in locks[:TOY_HELD_OUT]]
    problems = [toy_problem(name, lock) for lock in locks[TOY_HELD_OUT:] for name in TOY_NAMES]
    rng.shuffle(problems)
    os.makedirs(folder)
    for name, records in (("train.jsonl", problems), ("held_out.jsonl", held_out)):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            f.writelines(json.dumps(r) + "\n" for r in records)

    # A word keeps the space after it, so joining tokens gives the text back, and digits are always bare.
    pieces = r"[A-Za-z]+ ?|\d|[+=]|[.,;?] ?|#### |\n"
    words = {piece for r in problems[:1000] for piece in re.findall(pieces, r["question"] + "\n" + r["answer"])}
    vocabulary = ["<end>", "<unknown>", *sorted(words | set("0123456789"))]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pieces), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<end>", "<unknown>"])

    blank = os.path.join(folder, "blank")  # an architecture and a tokenizer, from which save_model makes the model folder
    os.makedirs(blank)
    tokenizer.save(os.path.join(blank, "tokenizer.json"))
    for name, value in (
            ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "<end>", "unk_token": "<unknown>"}),
            ("generation_config.json", {"eos_token_id": 0, "pad_token_id": 0}),
            ("config.json", {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": len(vocabulary), "hidden_size": 96,
                             "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 3, "hidden_act": "silu",
                             "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
                             "eos_token_id": 0, "pad_token_id": 0})):
        with open(os.path.join(blank, name), "w", encoding="utf-8") as f:
            json.dump(value, f, indent=2)
    model = Transformer(read_config(blank)).init_weights(torch.Generator().manual_seed(seed))
    save_model(model, os.path.join(folder, "model"), tokenizer_from=blank)
    shutil.rmtree(blank)
    return toy_files(folder)


def toy_files(folder: str) -> dict:
    return {"model": os.path.join(folder, "model"), "data": os.path.join(folder, "train.jsonl"), "eval_data": os.path.join(folder, "held_out.jsonl")}
