"""Problems and prompts: everything between a file of questions and a group of token ids.

    read_problems     a file in any of the usual formats    -> Problem(question, answer, gold)
    load_tokenizer    a model folder                        -> Tokenizer
    prepare           fills in each problem's prompt and gold as token ids; checks every gold by
                      grading it
    grade_group       rewards of a group's responses
"""
from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import NamedTuple

import torch
from torch import Tensor

from gcpo import Group
from grader import Reward, canonical, grade, last_boxed
from support.chat import find_template, render
from support.common import InputError, one_line, read_records
from support.folders import read_backend, read_optional, special_tokens


@dataclass
class Problem:
    question: str | list            # text, or chat messages
    answer: str                     # what is right, without the way to it
    gold: str | None = None         # a whole reference response that ends with the answer
    source: str = ""                # file and line, for messages
    prompt: Tensor | None = None    # (P,) int64, filled in by `prepare`
    gold_ids: Tensor | None = None  # (T*,) int64, ends with the end token; None: no usable gold
    gold_reward: float = 1.0


# ---- Files of problems ---------------------------------------------------------------------------

ASK = "Reason step by step, and write the final answer on a last line of its own, "
INSTRUCTIONS = {"hash": ASK + "after ####.", "boxed": ASK + "inside \\boxed{}."}
FINAL_LINES = {"hash": "#### {}", "boxed": "\\boxed{{{}}}"}


class Fields(NamedTuple):
    """What a record says, in whatever form."""
    question: object
    answer: object
    solution: object = None    # the way to the answer; it becomes gold


def read_verl(r: dict) -> Fields:
    model = r.get("reward_model")
    answer = r.get("answer")
    if isinstance(model, dict):
        answer = model.get("ground_truth", answer)
    return Fields(r["prompt"], answer)


def read_asdiv(r: dict) -> Fields:
    answer = r["answer"]
    if isinstance(answer, str):
        answer = re.sub(r"\s*\([^()]*\)$", "", answer)    # 9 (apples)
    return Fields(f"{r['body']} {r['question']}", answer)


def read_gsm8k(r: dict) -> Fields | None:
    if not isinstance(r["answer"], str) or "####" not in r["answer"]:
        return None
    solution, _, answer = r["answer"].rpartition("####")
    return Fields(r["question"], answer, solution)


def read_math(r: dict) -> Fields:
    solution = r.get("solution")
    answer = r.get("answer")
    if answer is None and isinstance(solution, str):
        answer = last_boxed(solution)
    return Fields(r["problem"], answer, solution)


# A record is read by the first of these whose fields it has (and that does not return None).
FORMATS: tuple[tuple[tuple[str, ...], Callable], ...] = (
    (("prompt",), read_verl),                                                           # and DAPO
    (("Body", "Question", "Answer"), lambda r: Fields(f"{r['Body']} {r['Question']}", r["Answer"])),
    (("body", "question", "answer"), read_asdiv),
    (("input", "target"), lambda r: Fields(r["input"], r["target"])),                   # MAWPS
    (("question", "answer"), read_gsm8k),
    (("problem", "answer"), read_math),                                                 # AIME, AMC
    (("problem", "solution"), read_math),                                               # MATH
    (("question", "answer"), lambda r: Fields(r["question"], r["answer"])),             # plain
)


def parse_record(record, answer_format: str, answer_only_gold: bool, source: str = "") -> Problem:
    """A Problem from one record. Raises InputError, which names `source`."""
    def refuse(what):
        raise InputError(f"{source}: {what}")

    if not isinstance(record, dict):
        refuse("not a JSON object")
    found = None
    for names, read in FORMATS:
        if found is None and all(record.get(name) is not None for name in names):
            found = read(record)
    if found is None:
        names = ", ".join(map(str, record)) or "none"
        refuse(f'fields {names} are of no known format; the simplest is "question" and "answer"')
    question = found.question if is_chat(found.question) else as_text(found.question)
    answer = as_text(found.answer)
    if question is None:
        refuse("the question is empty or not text")
    if answer is None or not canonical(answer):
        refuse("the answer is empty or not text")

    final = FINAL_LINES[answer_format].format(answer)
    if record.get("gold") is not None:
        gold = as_text(record["gold"])
        if gold is None:
            refuse("the gold is empty or not text")
    elif isinstance(found.solution, str) and found.solution.strip():
        gold = re.sub(r"<<[^<>\n]*>>", "", found.solution).strip()    # GSM8K's calculator notes
        ends_well = answer_format == "boxed" and last_boxed(gold) and grade(gold, answer)
        if not ends_well:
            gold = f"{gold}\n{final}"
    else:
        gold = final if answer_only_gold else None
    return Problem(question, answer, gold, source)


def is_chat(question) -> bool:
    """Whether it is a list of messages, each with a role and a content."""
    if not isinstance(question, list) or not question:
        return False
    is_text = lambda m, name: isinstance(m, dict) and isinstance(m.get(name), str)
    return all(is_text(m, "role") and is_text(m, "content") for m in question)


def as_text(value) -> str | None:
    """A field's text, or None: 43.0 is written 43, and 1e-05 is written 0.00001."""
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, float) and not value.is_integer():
        return format(Decimal(repr(value)), "f")
    return str(int(value))


def read_problems(
    path: str, answer_format: str = "hash", answer_only_gold: bool = False,
) -> list[Problem]:
    """Problems from .jsonl, .jsonl.gz or .json (a list), in any of FORMATS.

    Gold is the record's own `gold`, or its solution with the answer on a last line in
    `answer_format` (unless that is boxed, and is in the solution already). Raises InputError with
    file and line."""
    problems = [parse_record(record, answer_format, answer_only_gold, source)
                for source, record in read_records(path)]
    if not problems:
        raise InputError(f"{path}: no problems in it")
    return problems


# ---- Prompts and responses as token ids ----------------------------------------------------------

class Tokenizer:
    """A model folder's tokenizer, chat template and stop tokens, with the instruction that goes
    with each question. Raises InputError for a folder without them."""
    def __init__(self, folder: str, answer_format: str = "hash", instruction: str | None = None):
        self.folder = folder
        self.instruction = INSTRUCTIONS[answer_format] if instruction is None else instruction
        self.backend = read_backend(folder)
        config = read_optional(folder, "tokenizer_config.json")
        self.special = special_tokens(config)

        ids = read_optional(folder, "generation_config.json").get("eos_token_id", [])
        if not isinstance(ids, list):
            ids = [] if ids is None else [ids]
        size = self.backend.get_vocab_size()
        if not all(type(i) is int and 0 <= i < size for i in ids):
            raise InputError(f"{folder}/generation_config.json: eos_token_id {ids} is not in the "
                             "vocabulary")
        eos = self.special.get("eos_token")
        self.end_id = self.backend.token_to_id(eos) if eos else next(iter(ids), None)
        if self.end_id is None:
            raise InputError(f"{folder}: no end token; tokenizer_config.json must name an "
                             f"eos_token of its vocabulary (it says {eos!r})")
        self.stop_ids = sorted({self.end_id, *ids})
        self.template, self.template_from = find_template(folder, config)

    def prompt_texts(self, problems: list[Problem]) -> list[str]:
        """Each question with the instruction, in the model's chat form, if it has a template."""
        conversations = []
        for p in problems:
            messages = [{"role": "user", "content": p.question}]
            if isinstance(p.question, list):
                messages = [dict(m) for m in p.question]
            if self.instruction:
                messages[-1]["content"] += f"\n{self.instruction}"
            conversations.append(messages)
        if self.template is None:
            return ["\n".join(m["content"] for m in c) + "\n" for c in conversations]
        return render(self.template, conversations, self.special, self.template_from)

    def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        try:
            encodings = self.backend.encode_batch(texts, add_special_tokens=add_special_tokens)
        except Exception as e:  # half a surrogate pair; a vocabulary without its own unknown token
            raise InputError(
                f"{self.folder}: the tokenizer cannot encode a text ({one_line(e)})") from None
        return [e.ids for e in encodings]

    def encode_texts(self, texts: list[str]) -> list[Tensor]:
        """Prompt texts as token ids (P,). A template writes its own special tokens; plain text
        gets the tokenizer's."""
        add_special_tokens = self.template is None
        encoded = self.encode(texts, add_special_tokens)
        return [torch.tensor(ids, dtype=torch.int64) for ids in encoded]

    def encode_prompt(self, problem: Problem) -> Tensor:
        """(P,)"""
        return self.encode_texts(self.prompt_texts([problem]))[0]

    def encode_response(self, text: str) -> Tensor:
        """(T,), as the model would have written it: apart from the prompt, with the end token."""
        return torch.tensor([*self.encode([text], False)[0], self.end_id])

    def decode(self, ids) -> str:
        """The text of a response (T,), without the end token."""
        ids = torch.as_tensor(ids).tolist()
        while ids and ids[-1] in self.stop_ids:    # the end token may be an ordinary word
            ids.pop()
        return self.backend.decode(ids, skip_special_tokens=True)


def load_tokenizer(
    folder: str, answer_format: str = "hash", instruction: str | None = None,
) -> Tokenizer:
    return Tokenizer(folder, answer_format, instruction)


# ---- Ready to train on ---------------------------------------------------------------------------

def prepare(
    problems: list[Problem],
    tokenizer: Tokenizer,
    max_new_tokens: int,
    max_positions: int,
    vocab_size: int | None = None,
    reward: Reward = Reward(),
) -> list[str]:
    """Fill in prompt, gold_ids and gold_reward of every problem. Returns one line for each gold
    that cannot be used; its problem still trains, without it.

    A gold is used only if it grades as correct against its own answer, and fits into
    `max_new_tokens` whole: a gold cut off would reward a text that never reaches its answer. Raises
    InputError for a prompt that leaves no room in the model's `max_positions`, or has tokens beyond
    its `vocab_size`."""
    complaints = []
    texts = tokenizer.prompt_texts(problems)
    for problem, text, prompt in zip(problems, texts, tokenizer.encode_texts(texts)):
        if not 1 <= len(prompt) <= max_positions - max_new_tokens:
            raise InputError(
                f"{problem.source}: the prompt has {len(prompt)} tokens, and with {max_new_tokens} "
                f"new ones it does not fit the model's {max_positions} positions; lower "
                "--max-new-tokens or leave the problem out")
        highest = max(int(prompt.max()), tokenizer.end_id)
        if vocab_size is not None and highest >= vocab_size:
            raise InputError(f"{tokenizer.folder}: the tokenizer has token {highest}, and the "
                             f"model knows {vocab_size}; they do not belong together")
        problem.prompt = prompt
        problem.gold_ids = None
        if problem.gold is None:
            continue
        ids = tokenizer.encode_response(gold_response(problem.gold, text))
        # Graded as a response will be: through the tokenizer.
        value = reward(tokenizer.decode(ids), problem.answer)
        if vocab_size is not None and int(ids.max()) >= vocab_size:
            complaint = "its gold has tokens that the model does not know"
        elif value < reward.correct_at:
            complaint = f"its gold does not grade as correct (answer {problem.answer!r})"
        elif len(ids) > max_new_tokens:
            complaint = (f"its gold has {len(ids)} tokens, more than --max-new-tokens "
                         f"{max_new_tokens}")
        else:
            problem.gold_ids = ids
            problem.gold_reward = value
            continue
        complaints.append(f"{problem.source}: {complaint}")
    return complaints


def gold_response(gold: str, prompt: str) -> str:
    """Gold as a response to this prompt, which may have opened the model's scratch pad."""
    if prompt.rstrip().endswith("<think>") and "</think>" not in gold:
        thoughts, _, final = gold.rpartition("\n")
        return f"{thoughts}\n</think>\n{final}"
    return gold


def grade_group(
    group: Group, problem: Problem, tokenizer: Tokenizer, reward: Reward = Reward(),
) -> Group:
    """The group with `rewards` and `correct` filled in. A response without an end is graded as it
    stands."""
    rewards = []
    for ids, n in zip(group.responses, group.lengths.tolist()):
        rewards.append(reward(tokenizer.decode(ids[:n]), problem.answer))
    rewards = torch.tensor(rewards, dtype=torch.float32)    # (G,)
    return replace(group, rewards=rewards, correct=rewards >= reward.correct_at)
