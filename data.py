"""Problems, prompts, answers: everything between a file of questions and a group of token ids.

    read_problems     a file in any of the usual formats              -> Problem(question, answer, gold)
    load_tokenizer    a model folder                                  -> Tokenizer: encode_prompt, encode_response, decode, stop_ids
    prepare           fills in each problem's prompt and gold as token ids, and checks every gold by grading it
    grade             a response's text and the answer                -> 1.0 or 0.0

The grader is deliberately strict: it reads what follows a marker (`####`, else `\\boxed{}`, else "answer is" or "answer:"), the last
one if there are several, and compares numbers exactly. Whatever it accepts, training will find.
"""
from __future__ import annotations

import gzip
import importlib.util
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal

import tokenizers
import torch
from torch import Tensor

from gcpo import Group
from grader import canonical, grade, last_boxed
from support.chat import render
from support.common import InputError, one_line, read_json


@dataclass
class Problem:
    question: str | list            # text, or chat messages
    answer: str                     # what is right, without the way to it
    gold: str | None = None         # a whole reference response that ends with the answer
    source: str = ""                # file and line, for messages
    prompt: Tensor | None = None    # (P,) int64, filled in by `prepare`
    gold_ids: Tensor | None = None  # (T*,) int64, ends with the end token; None where there is no usable gold
    gold_reward: float = 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def load_reward(spec: str | None) -> Callable[[str, str], float]:
    """The grader: `grade`, or the user's own function (response, answer) -> float from FILE.py:function."""
    if spec is None:
        return grade
    path, _, name = spec.rpartition(":")
    if not path or not os.path.isfile(path):
        raise InputError(f"--reward {spec}: expected FILE.py:function, and the file must exist")
    try:
        module_spec = importlib.util.spec_from_file_location("user_reward", path)
        module = sys.modules["user_reward"] = importlib.util.module_from_spec(module_spec)   # dataclasses look themselves up there
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        raise InputError(f"--reward {path}: cannot be imported ({one_line(e)})") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise InputError(f"--reward {spec}: {path} has no function {name}")

    def reward(response, answer):
        try:
            value = float(function(response, answer))
        except Exception as e:
            raise InputError(f"--reward {spec}: failed on response {response[:60]!r} ({one_line(e)})") from None
        if not abs(value) <= torch.finfo(torch.float32).max:
            raise InputError(f"--reward {spec}: returned {value} for response {response[:60]!r}; a reward must be finite")
        return value
    return reward


# ---------------------------------------------------------------------------------------------------------------------
# Files of problems

INSTRUCTIONS = {"hash": "Reason step by step, and write the final answer on a last line of its own, after ####.",
                "boxed": "Reason step by step, and write the final answer on a last line of its own, inside \\boxed{}."}
FINAL_LINES = {"hash": "#### {}", "boxed": "\\boxed{{{}}}"}
LONGEST_LINE = 16 * 2**20  # bytes


def as_text(value) -> str | None:
    """A field's text: 43.0 is written 43."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, float):
        value = format(Decimal(repr(value)), "f")      # 1e-05 is written 0.00001
    return str(value).strip() or None


def parse_record(record: dict, answer_format: str, answer_only_gold: bool) -> Problem | str:
    """A Problem from one record, recognised by its fields, or what is wrong with it."""
    has = lambda *names: all(record.get(n) is not None for n in names)
    solution, gold = None, record.get("gold")
    if has("prompt"):                                               # verl, DAPO
        model = record.get("reward_model")
        question, answer = record["prompt"], model.get("ground_truth", record.get("answer")) if isinstance(model, dict) else record.get("answer")
    elif has("Body", "Question", "Answer"):                         # SVAMP
        question, answer = f"{record['Body']} {record['Question']}", record["Answer"]
    elif has("body", "question", "answer"):                         # ASDiv: "9 (apples)"
        question, answer = f"{record['body']} {record['question']}", record["answer"]
        answer = re.sub(r"\s*\([^()]*\)$", "", answer) if isinstance(answer, str) else answer
    elif has("input", "target"):                                    # MAWPS
        question, answer = record["input"], record["target"]
    elif has("question", "answer") and isinstance(record["answer"], str) and "####" in record["answer"]:    # GSM8K
        question, (solution, _, answer) = record["question"], record["answer"].rpartition("####")
    elif has("problem", "answer") or has("problem", "solution"):   # MATH, AIME, AMC, Minerva
        question, solution = record["problem"], record.get("solution")
        answer = record["answer"] if has("answer") else last_boxed(solution) if isinstance(solution, str) else None
    elif has("question", "answer"):                                 # plain
        question, answer = record["question"], record["answer"]
    else:
        return f"fields {', '.join(map(str, record)) or 'none'} are of no known format; the simplest is \"question\" and \"answer\""
    if isinstance(question, list):
        well_formed = question and all(isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str) for m in question)
        question = question if well_formed else None
    else:
        question = as_text(question)
    answer = as_text(answer)
    if question is None or answer is None or not canonical(answer):
        return f"the {'question' if question is None else 'answer'} is empty or not text"

    final = FINAL_LINES[answer_format].format(answer)
    if gold is not None:
        gold = as_text(gold)
        if gold is None:
            return "the gold is empty or not text"
    elif isinstance(solution, str) and solution.strip():
        gold = re.sub(r"<<[^<>\n]*>>", "", solution).strip()        # GSM8K's notes for a calculator
        if not (answer_format == "boxed" and last_boxed(gold) and grade(gold, answer)):
            gold = f"{gold}\n{final}"
    elif answer_only_gold:
        gold = final
    return Problem(question, answer, gold)


def no_twice(pairs):
    if len(record := dict(pairs)) != len(pairs):
        raise ValueError("a field appears twice")
    return record


def read_problems(path: str, answer_format: str = "hash", answer_only_gold: bool = False) -> list[Problem]:
    """Problems from .jsonl, .jsonl.gz or .json (a list); see `parse_record` for the formats.

    The gold is the data set's solution with the answer on a last line in `answer_format`, or the record's own `gold`.
    Raises InputError with file and line."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: {'is a folder, not a file' if os.path.isdir(path) else 'no such file'}")
    try:
        opened = gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")
        with opened as f:
            if path.endswith((".json", ".json.gz")):
                text = f.read().decode("utf-8-sig")
                records = json.loads(text, object_pairs_hook=no_twice)
                if not isinstance(records, list):
                    raise InputError(f"{path}: a .json file must hold a list of problems (one object a line is .jsonl)")
                records = [(f"{path}, item {i}", r) for i, r in enumerate(records, 1)]
            else:
                records, number = [], 0
                while line := f.readline(LONGEST_LINE + 1):
                    number += 1
                    if len(line) > LONGEST_LINE:
                        raise InputError(f"{path}, line {number}: longer than {LONGEST_LINE >> 20} MiB; is this a JSONL file?")
                    if line.strip():
                        records.append((f"{path}, line {number}", parse_line(line, f"{path}, line {number}")))
    except json.JSONDecodeError as e:
        raise InputError(f"{path}, line {e.lineno}: not valid JSON ({e.msg})") from None
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as e:
        raise InputError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e})") from None
    problems = []
    for source, record in records:
        problem = parse_record(record, answer_format, answer_only_gold) if isinstance(record, dict) else "not a JSON object"
        if isinstance(problem, str):
            raise InputError(f"{source}: {problem}")
        problems.append(replace(problem, source=source))
    if not problems:
        raise InputError(f"{path}: no problems in it")
    return problems


def parse_line(line: bytes, source: str):
    try:
        return json.loads(line.decode("utf-8-sig"), object_pairs_hook=no_twice)
    except UnicodeDecodeError:
        raise InputError(f"{source}: not UTF-8 text") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{source}: not valid JSON ({getattr(e, 'msg', e)})") from None


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


class Tokenizer:
    """A model folder's tokenizer, chat template and stop tokens, with the instruction that goes with each question."""

    def __init__(self, folder: str, answer_format: str = "hash", instruction: str | None = None):
        self.folder = folder
        self.instruction = INSTRUCTIONS[answer_format] if instruction is None else instruction
        path = os.path.join(folder, "tokenizer.json")
        if not os.path.isfile(path):
            raise InputError(f"{folder}: no tokenizer.json there")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(path)
        except Exception as e:  # tokenizers raises bare Exception
            raise InputError(f"{path}: not a readable tokenizer ({' '.join(str(e).split())[:200]})") from None
        self.tokenizer.no_truncation()  # some folders carry settings of a batch long gone
        self.tokenizer.no_padding()

        def optional(name):
            path = os.path.join(folder, name)
            value = read_json(path) if os.path.isfile(path) else {}
            if not isinstance(value, dict):
                raise InputError(f"{path}: not a JSON object")
            return value
        config, generation = optional("tokenizer_config.json"), optional("generation_config.json")
        token = lambda value: value.get("content") if isinstance(value, dict) else value
        self.special = {n: token(config[n]) for n in ("bos_token", "eos_token", "unk_token", "pad_token") if isinstance(token(config.get(n)), str)}

        ids = generation.get("eos_token_id")
        ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
        if not all(type(i) is int and 0 <= i < self.tokenizer.get_vocab_size() for i in ids):
            raise InputError(f"{folder}/generation_config.json: eos_token_id {ids} is not in the vocabulary")
        eos = self.special.get("eos_token")
        self.end_id = self.tokenizer.token_to_id(eos) if eos else (ids[0] if ids else None)
        if self.end_id is None:
            raise InputError(f"{folder}: no end token; tokenizer_config.json must name an eos_token of its vocabulary (it says {eos!r})")
        self.stop_ids = sorted({self.end_id, *ids})

        template = config.get("chat_template")
        self.template_from = os.path.join(folder, "tokenizer_config.json")
        if isinstance(template, list):
            template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}.get("default")
        if os.path.isfile(path := os.path.join(folder, "chat_template.jinja")):
            self.template_from = path
            try:
                with open(path, encoding="utf-8") as f:
                    template = f.read()
            except (OSError, UnicodeDecodeError) as e:
                raise InputError(f"{path}: cannot be read ({e})") from None
        if template is not None and not isinstance(template, str):
            raise InputError(f"{self.template_from}: chat_template is not text")
        self.template = template

    def prompt_texts(self, problems: list[Problem]) -> list[str]:
        """Each question with the instruction, in the model's chat form; without a template, question and instruction."""
        conversations = []
        for p in problems:
            messages = [dict(m) for m in p.question] if isinstance(p.question, list) else [{"role": "user", "content": p.question}]
            messages[-1]["content"] += f"\n{self.instruction}" if self.instruction else ""
            conversations.append(messages)
        if self.template is None:
            return ["\n".join(m["content"] for m in messages) + "\n" for messages in conversations]
        return render(self.template, conversations, self.special, self.template_from)

    def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        try:
            return [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)]
        except Exception as e:  # half a surrogate pair; a vocabulary without its own unknown token
            raise InputError(f"{self.folder}: the tokenizer cannot encode a text ({one_line(e)})") from None

    def encode_texts(self, texts: list[str]) -> list[Tensor]:
        """Prompt texts as token ids (P,) each. A template writes its own special tokens; plain text gets the tokenizer's."""
        return [torch.tensor(ids, dtype=torch.int64) for ids in self.encode(texts, self.template is None)]

    def encode_prompt(self, problem: Problem) -> Tensor:
        return self.encode_texts(self.prompt_texts([problem]))[0]

    def encode_response(self, text: str) -> Tensor:
        """(T,): a response as the model would have written it, tokenized apart from the prompt, with the end token."""
        return torch.tensor([*self.encode([text], False)[0], self.end_id], dtype=torch.int64)

    def decode(self, ids) -> str:
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        while ids and ids[-1] in self.stop_ids:    # also where the end token is an ordinary word of the vocabulary
            ids.pop()
        return self.tokenizer.decode(ids, skip_special_tokens=True)


load_tokenizer = Tokenizer  # a verb, beside load_model


# ---------------------------------------------------------------------------------------------------------------------
# Ready to train on

def prepare(problems: list[Problem], tokenizer: Tokenizer, max_new_tokens: int, max_positions: int, *,
            vocab_size: int | None = None, reward: Callable = grade, correct_at: float = 1.0) -> list[str]:
    """Fill in prompt, gold_ids and gold_reward of every problem. Returns one line for each gold that cannot be used.

    A gold is used only if it grades as correct against its own answer and fits into `max_new_tokens` whole: a gold cut
    off would reward a text that never reaches its answer. Its problem still trains, without it. Raises InputError for a
    prompt that leaves no room in the model's `max_positions`, or has tokens beyond its `vocab_size`."""
    complaints = []
    texts = tokenizer.prompt_texts(problems)
    for problem, text, prompt in zip(problems, texts, tokenizer.encode_texts(texts)):
        if not 1 <= len(prompt) <= max_positions - max_new_tokens:
            raise InputError(f"{problem.source}: the prompt has {len(prompt)} tokens, and with {max_new_tokens} new ones it does not fit "
                             f"the model's {max_positions} positions; lower --max-new-tokens or leave the problem out")
        if vocab_size is not None and max(*prompt.tolist(), tokenizer.end_id) >= vocab_size:
            raise InputError(f"{tokenizer.folder}: the tokenizer has token {max(*prompt.tolist(), tokenizer.end_id)}, and the model knows {vocab_size}; "
                             "they do not belong together")
        problem.prompt, problem.gold_ids = prompt, None
        if problem.gold is None:
            continue
        gold = problem.gold
        if text.rstrip().endswith("<think>") and "</think>" not in gold:   # the prompt has opened the model's scratch pad
            thoughts, _, final = gold.rpartition("\n")
            gold = f"{thoughts}\n</think>\n{final}"
        ids = tokenizer.encode_response(gold)
        value = reward(tokenizer.decode(ids), problem.answer)              # as the grader will see it: through the tokenizer
        if vocab_size is not None and int(ids.max()) >= vocab_size:
            complaints.append(f"{problem.source}: its gold has tokens that the model does not know")
        elif value < correct_at:
            complaints.append(f"{problem.source}: its gold does not grade as correct (answer {problem.answer!r})")
        elif len(ids) > max_new_tokens:
            complaints.append(f"{problem.source}: its gold has {len(ids)} tokens, more than --max-new-tokens {max_new_tokens}")
        else:
            problem.gold_ids, problem.gold_reward = ids, value
    return complaints


def grade_group(group: Group, problem: Problem, tokenizer: Tokenizer, reward: Callable = grade, correct_at: float = 1.0) -> Group:
    """The group with `rewards` and `correct` filled in; a response without an end is graded as it stands."""
    texts = [tokenizer.decode(ids[:n]) for ids, n in zip(group.responses, group.lengths.tolist())]
    rewards = torch.tensor([reward(text, problem.answer) for text in texts], dtype=torch.float32)
    return replace(group, rewards=rewards, correct=rewards >= correct_at)
