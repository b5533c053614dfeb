"""Records of the usual data sets, each with names of its own, as question, answer and solution.

    read_fields(record) -> Fields        raises Unusable, which says what is wrong with the record
"""
from __future__ import annotations

import contextlib
import json
import math
import re
import string
from decimal import Decimal
from typing import NamedTuple

from grader import extract_answer, last_boxed


# In any case (question, Question); the first that is not empty counts. Beside each: who has it.
# DAPO, MATH, GSM8K, OpenBookQA, MetaMath, MAWPS
QUESTION = ("prompt", "problem", "question", "question_stem", "query", "input")
ANSWER = ("answer", "final_answer", "ground_truth", "expected_answer", "target")     # … and MAWPS
SOLUTION = ("solution", "rationale", "generated_solution")
CHOICES = ("choices", "options")                                    # MMLU, AQuA
LETTER = ("answer", "answerkey", "correct", "target")               # of the right choice


# Texts that a question speaks of, and that go before it.
BEFORE_QUESTION = ("context", "passage", "article", "story", "premise", "table")
# Choices in forms that we do not read: they are never dropped.
OTHER_CHOICES = re.compile(
    r"[a-d]|option[_ ]?[a-e1-5]|endings|candidates|answer_choices|choice|multiple_choices?"
    r"|distractors?\d*|incorrect[_ ]answers?(?: \d)?|mc[12]_targets|multiple_choice_targets")


class Unusable(Exception):
    """Why a record cannot be used."""


class Fields(NamedTuple):
    """What a record says, in whatever form."""
    question: str | list       # text, or chat messages
    answer: str
    solution: str | None       # the way to the answer; it becomes gold, if there is no other
    gold: object               # as it stands there, or None


def read_fields(record) -> Fields:
    if not isinstance(record, dict):
        raise Unusable(f"the record is {what_it_is(record)}, not a JSON object")
    fields = {}
    for name, value in record.items():
        name = str(name).lower()
        if value is not None and name in fields and fields[name] != value:
            raise Unusable(f"it has {name} in small letters and in capitals, and they differ")
        if value is not None:
            fields[name] = value
    refuse_what_would_be_dropped(fields)
    question = read_question(fields, record)
    solution = read_solution(fields)
    gold = fields.get("gold")
    if isinstance(gold, str) and not gold.strip():
        gold = None
    if any(fields.get(name) for name in CHOICES):
        lines, answer = read_choices(fields)
        if not isinstance(question, str):
            raise Unusable("it has choices beside chat messages; write them into the message")
        return Fields(question + "\n" + "\n".join(lines), answer, solution, gold)
    answer, solution = read_answer(fields, record, solution)
    if fields.get("is_correct") is False:    # OpenMathInstruct
        solution = None
    if solution is not None and solution.strip("$ \n") in (answer, f"\\boxed{{{answer}}}"):
        solution = None    # it is the bare answer, and no way to it
    if "body" in fields:
        answer = re.sub(r"^([^();]+?)\s*\([^()]*\)$", r"\1", answer)    # ASDiv: 9 (apples)
    return Fields(question, answer, solution, gold)


# ---- Question ------------------------------------------------------------------------------------

def refuse_what_would_be_dropped(fields: dict) -> None:
    """Raises Unusable for choices, pictures and texts that belong to the question and that we
    cannot put into it."""
    unknown = [name for name in fields if OTHER_CHOICES.fullmatch(name)]
    if unknown and not any(fields.get(name) for name in CHOICES):
        raise Unusable(f"it has {unknown[0]}, which is no known form of choices; name them "
                       "choices, a list of texts")
    for name in fields:
        is_text = isinstance(fields[name], str)
        if re.fullmatch(r"(?:decoded_)?images?(?:_\d+)?", name) and fields[name]:
            raise Unusable(f"it has {name}, and we read text only")
        if name in BEFORE_QUESTION and fields[name] and not is_text:
            raise Unusable(f"its {name} is {what_it_is(fields[name])}, not text")


def first_filled(fields: dict, names: tuple[str, ...]) -> str | None:
    """The first of these fields that is not empty; or else the first that is there."""
    there = [name for name in names if name in fields]
    is_list = lambda value: isinstance(value, list) and len(value) > 0
    filled = [name for name in there if as_text(fields[name]) or is_list(fields[name])]
    return next(iter(filled + there), None)


def read_question(fields: dict, record: dict) -> str | list:
    name = first_filled(fields, QUESTION)
    if name is None:
        raise Unusable(f"fields {', '.join(map(str, record)) or 'none'} are of no known format: no "
                       f"question (looked for: {', '.join(QUESTION)})")
    question = fields[name]
    if isinstance(question, list):
        return read_chat(question, name)
    text = as_text(question)
    if text is None:
        raise Unusable(f"its {name} is {what_it_is(question)}")
    body = as_text(fields.get("body"))
    before = [as_text(fields.get(key)) for key in BEFORE_QUESTION if key != name]
    if name == "input":    # Alpaca's; MAWPS has no instruction
        before.append(as_text(fields.get("instruction")))
    text = "\n".join([part for part in before if part] + [text])
    text = f"{body} {text}" if body else text
    return with_numbers(text, str(fields.get("numbers", "")).split())


def with_numbers(text: str, numbers: list[str]) -> str:
    """MWPToolkit's MAWPS has N_00, N_01 … in place of numbers, and these in another field."""
    try:
        return re.sub(r"\bN_(\d\d)\b", lambda m: numbers[int(m[1])], text)
    except IndexError:
        raise Unusable("its question has N_00 in place of a number, and none is told") from None


def read_chat(messages: list, name: str) -> list:
    """A list of messages, each with a role and a content; one of them must be the user's."""
    for message in messages:
        good = isinstance(message, dict) and all(
            isinstance(message.get(key), str) for key in ("role", "content"))
        if not good:
            raise Unusable(f"its {name} is a list, and not of messages with role and content as "
                           "text")
    if not any(m["role"] == "user" and m["content"].strip() for m in messages):
        raise Unusable(f"its {name} has no message of the user's")
    return messages


# ---- Answer and solution -------------------------------------------------------------------------

def read_solution(fields: dict) -> str | None:
    """The way to the answer, if the record has one."""
    for name in SOLUTION:
        solution = only(fields.get(name))
        if isinstance(solution, str) and solution.strip():
            return solution
    if "query" in fields and isinstance(fields.get("response"), str):    # MetaMath
        return fields["response"]
    extra = fields.get("extra_info")    # verl's GSM8K
    if isinstance(extra, dict) and "####" in str(extra.get("answer")):
        return split_gsm8k(extra["answer"])[0]
    return None


def read_answer(fields: dict, record: dict, solution: str | None) -> tuple[str, str | None]:
    """The answer, and the solution where the answer stands in it."""
    model = fields.get("reward_model")    # verl, DAPO
    if isinstance(model, dict) and model.get("ground_truth") is not None:
        return text_of(model["ground_truth"], "reward_model.ground_truth"), solution
    name = first_filled(fields, ANSWER)
    extra = fields.get("extra_info")
    if name is None and isinstance(extra, dict) and "####" in str(extra.get("answer")):
        way, answer = split_gsm8k(extra["answer"])
        return text_of(answer, "answer after #### in extra_info"), way
    if name is not None:
        return answer_field(fields[name], name, solution)
    if solution is None:
        null = [key for key, value in record.items()
                if value is None and str(key).lower() in ANSWER + SOLUTION]
        if null:
            raise Unusable(f"its {null[0]} is null")
        raise Unusable(f"fields {', '.join(map(str, record))} are of no known format: no answer "
                       f"(looked for: {', '.join(ANSWER)}; and in {', '.join(SOLUTION)})")
    return answer_in(solution, "prompt" in fields)


def answer_field(value, name: str, solution: str | None) -> tuple[str, str | None]:
    """The answer that an answer's own field names, and the solution if it holds that too: before
    its last ####, or around its last box."""
    text = as_text(only(value)) or ""
    if "####" in text:
        way, answer = split_gsm8k(text)
        return text_of(answer, f"answer after #### in {name}"), way or solution
    answer = text_of(value, name)
    if "\\boxed" in text and not is_short(text.replace(answer, "")):
        return answer, solution or text
    return answer, solution


def is_short(text: str) -> bool:
    """Whether a text is too short to be a way to an answer."""
    return "\n" not in text.strip() and len(text.split()) < 6


def answer_in(solution: str, may_be_bare: bool) -> tuple[str, str | None]:
    """The answer that a solution ends with. TRL's sets have prompt and solution, and there the
    solution may be the answer itself."""
    if "####" in solution:
        way, answer = split_gsm8k(solution)
        return text_of(answer, "answer after #### in its solution"), way
    boxed = last_boxed(solution)
    if boxed is not None:
        return text_of(boxed, "box in its solution"), solution
    named = extract_answer(solution)
    if named is not None:
        return named, solution
    if may_be_bare and is_short(solution):
        return solution.strip(), None
    raise Unusable("no answer in its solution (looked for: ####, \\boxed{}, \"answer is\")")


def split_gsm8k(text: str) -> tuple[str, str]:
    """The way, and the answer after its last ####: one line, though MetaMath writes more. Where
    #### is a heading, the answer is what the grader finds, and the way is all of it."""
    way, _, below = text.rpartition("####")
    line = below.strip().partition("\n")[0].strip()
    named = extract_answer(text)
    if named is None or named == extract_answer(f"#### {line}"):
        return way.strip(), line
    return text.strip(), named


def text_of(value, name: str) -> str:
    """An answer as text, outside a box."""
    value = only(value)
    text = as_text(value)
    if text is None:
        raise Unusable(f"its {name} is {what_it_is(value)}")
    if text.startswith('["'):    # Skywork-OR1: a list, as text
        with contextlib.suppress(ValueError):
            return text_of(json.loads(text), name)
    boxed = last_boxed(text) if "\\boxed" in text else None
    return text if boxed is None else boxed.strip()


def only(value):
    """A list of one is that one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def as_text(value) -> str | None:
    """A field's text, or None: 43.0 is written 43, and 1e-05 is written 0.00001."""
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        return None
    if not isinstance(value, int) and not math.isfinite(value):
        return None
    if isinstance(value, Decimal):    # of Parquet
        return format(value.normalize(), "f")
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:    # exact
        return str(int(value))
    if isinstance(value, float):    # 15 digits: 0.3 for 0.30000000000000004
        text = format(Decimal(f"{value:.15g}"), "f")
        return "0" if text == "-0" else text
    return str(value)


def what_it_is(value) -> str:
    """A value that is no text, in words."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, str):
        return "text" if value.strip() else "empty"
    words = {type(None): "null", bool: "true or false", dict: "an object", int: "a number"}
    if isinstance(value, (float, Decimal)):
        return "not a finite number"
    return words.get(type(value), f"of type {type(value).__name__}, neither text nor a number")


# ---- Choices -------------------------------------------------------------------------------------

def read_choices(fields: dict) -> tuple[list[str], str]:
    """The choices as lines "(A) …", and the letter of the right one."""
    name = next(name for name in CHOICES if fields.get(name))
    choices = texts_of_choices(fields[name])
    if choices is None or not 2 <= len(choices) <= 26:
        raise Unusable(f"its {name} are of no known form (a list of texts, or letters with texts)")
    letters = string.ascii_uppercase[:len(choices)]
    labels = labels_of_choices(fields[name], letters)
    lines = [f"({letter}) {text}" for letter, text in zip(letters, choices)]
    given = next((fields[key] for key in LETTER if str(fields.get(key, "")).strip()), None)
    if isinstance(given, bool) or not isinstance(given, (int, str)):
        raise Unusable(f"it has {name}, and no right one among {', '.join(LETTER)}")
    right = set()
    has_labels = labels != list(letters)
    if isinstance(given, int) and has_labels and str(given) in labels:
        right.add(letters[labels.index(str(given))])
    elif isinstance(given, int) and 0 <= given < len(choices):
        right.add(letters[given])    # counted from 0
    letter = re.fullmatch(r"\(?([A-Za-z0-9])\)?[.:]?", str(given).strip())
    if isinstance(given, str) and letter and letter[1].upper() in labels:
        right.add(letters[labels.index(letter[1].upper())])
    if str(given).strip() in choices:
        right.add(letters[choices.index(str(given).strip())])
    if len(right) != 1:
        found = "none" if not right else "more than one"
        raise Unusable(f"its answer {given!r} names {found} of its {name}")
    return lines, right.pop()


def labels_of_choices(choices, letters: str) -> list[str]:
    """The labels that the record itself gives to its choices (ARC has 1 to 4), or else letters."""
    given = choices.get("label") if isinstance(choices, dict) else None
    if isinstance(given, list) and len(given) == len(letters) == len(set(map(str, given))):
        return [str(label).upper() for label in given]
    return list(letters)


def texts_of_choices(choices) -> list[str] | None:
    """The texts, without letters of their own: from a list, {"A": text}, or {"text": […]}."""
    if isinstance(choices, dict) and isinstance(choices.get("text"), list):
        choices = choices["text"]
    elif isinstance(choices, dict):
        # Parquet gives every record the keys of all.
        choices = {key: text for key, text in choices.items() if text is not None}
        if list(choices) != list(string.ascii_uppercase[:len(choices)]):
            return None
        choices = list(choices.values())
    if not isinstance(choices, list):
        return None
    texts = [as_text(choice) for choice in choices]
    if None in texts:
        return None
    if all(re.match(rf"\(?{letter}[).:]", text) for letter, text in
           zip(string.ascii_uppercase, texts)):
        texts = [re.sub(r"^\(?[A-Z][).:]\s*", "", text) for text in texts]
    labels = [re.match(r"\(?([A-Z])[).]\s", text) for text in texts]
    if all(labels) and sorted(m[1] for m in labels) == list(string.ascii_uppercase[:len(texts)]):
        return None    # in another order
    return texts
