r"""The reward: what a response answers, and whether that is right.

A wrong answer that is graded right is the worse fault, because training will find it. So a
response is compared with the reference by these rules, and by nothing else. Each line below reads
"reference: a right response  not a wrong one", and is a test.

 1. Only a marker names an answer, and the last of its kind counts: ####, else \boxed{}, else
    "answer is" or "answer:". (With --answer-format boxed, a box goes before ####.) If there is an
    <answer>…</answer>, only what is in it counts, and is an answer without a marker too.
        18: \boxed{17} #### 18                  not I got 18
 2. A #### line of words is a heading if a box or an "answer is" follows it. "#### Answer" names
    what stands below it, "#### Check" and the like nothing.
        18: #### Step 2: add \n \boxed{18}      not #### 17 \n \boxed{18}
 3. What a scratch pad says does not count, and one that never closes leaves no answer.
        18: <think>#### 17</think> #### 18      not <think>Hm. #### 18
 4. Numbers are compared exactly, however they are written.
        3/4: \boxed{\frac34}                    not #### 0.7499
 5. A reference of six decimal places or more is a rounded one.
        0.6666666667: #### 2/3                  not #### 0.67
 6. If the reference is a number, a unit or talk may follow it in the response, without digits,
    number words or operators.
        18: #### 18 apples a day                not #### 18 thirds
 7. A unit of the reference may be left out, and not replaced by another.
        15 cm: #### 15                          not #### 15 inches
 8. A sum may follow a number if it comes to that number.
        18: #### 18 (9 + 9 = 18)                not #### 18 because 1 + 17 = 19
 9. If the reference is a number, an equation in numbers names the side that is a number.
        18: #### 9 + 9 = 18                     not #### 18 = 19
10. A lone name or f(x) before an equals sign may be left out, and not replaced by another.
        x=7: \boxed{7}                          not \boxed{y=7}
11. Any other equation, inequality or expression is compared as a whole, as text in one spelling.
        x+y=0: \boxed{x + y = 0}                not \boxed{0}
12. Lists are compared item by item: in order, except for sets and for solutions joined by "or".
        n=5 or n=7: \boxed{7, 5}                not \boxed{5}
13. Brackets are part of a list.
        [0,1): \boxed{x \in [0, 1)}             not \boxed{(0,1)}
14. The letter of a choice may be followed by its text.
        B: \boxed{\text{(B)}\ 15}               not \boxed{(A) or (B)}
15. A percent sign may follow the number; but if the reference is below 1, it means hundredths.
        3/4: #### 75%                           not #### 0.75%

    grade(response, reference) -> 1.0 or 0.0
"""
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from support.numbers import (
    Number, equal_values, leaves_it, names_number, read_number)
from support.tokens import List, Token, last_boxed, read_list, read_tokens, spelled
from support.words import (
    ENDS_OF_LETTER, is_talk, letter_of_choice, read_unit, split_name, unit_of)


def grade(response: str, reference: str, answer_format: str = "hash") -> float:
    """1.0 if the response's answer is the reference, else 0.0."""
    found = find_answer(response, answer_format)
    return float(found is not None and same(found.text, reference, found.in_box))


def grade_boxed(response: str, reference: str) -> float:
    """`grade` where a box is asked for: it goes before ####."""
    return grade(response, reference, "boxed")


GRADERS = {"hash": grade, "boxed": grade_boxed}
LONGEST_ANSWER = 10_000    # characters; what is longer names nothing


@dataclass(frozen=True)
class Reward:
    """What a response earns, and from which reward on it counts as correct."""
    function: Callable[[str, str], float] = grade    # (response, a Problem's answer) -> reward
    correct_at: float = 1.0

    def __call__(self, response: str, reference: str) -> float:
        return self.function(response, reference)


# ---- Finding the answer in a response ------------------------------------------------------------

SCRATCH_PAD = re.compile(
    r"<(/?)\s*(?:think(?:ing)?|thoughts?|reason(?:ing)?|scratch_?pad)\b[^<>]{0,40}>"
    r"|<\|(?:begin|(end))_of_thought\|>|\[(/?)THINK\]|◁(/?)think▷", re.IGNORECASE)
TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
PHRASE = re.compile(r"answer(?:\s*\*\*)?\s*(?:is\b|:)", re.IGNORECASE)
DRESS = r"(?:[^\w\\$(]|_)*"
ANSWER_HEADING = re.compile(rf"{DRESS}(?:the )?(?:final )?answer[\s*:]*", re.IGNORECASE)
WORDS_HEADING = re.compile(    # 1. **Find x**, (a) Find x, I. Setup, For n = 3
    rf"{DRESS}(?:(?:\d+|\(?(?:[a-z]|[ivxIVX]+))[.):]{DRESS})?"
    r"(?:(?i:step|part|case)\b.*|[^\W\d_]{2}[^=]*|[^\W\d_]{3}.*)")
AFTERWORD = re.compile(
    r"[\s*]*(?:explanation|verification|check|notes?|reasoning|summary|solution)[\s*:]*",
    re.IGNORECASE)
FILLER = re.compile(r"(?:\s*(?:approximately|about|roughly|exactly|simply|just|therefore|thus|hence"
                    r"|indeed|equal to|given by|total|option|choice)\b:?)+", re.IGNORECASE)
CALCULATOR = re.compile(r"<<[^<>\n]*>>")    # GSM8K's notes: 9*2=<<9*2=18>>18


class Answer(NamedTuple):
    text: str
    in_box: bool    # where a letter is a variable, and no unit


def extract_answer(response: str, answer_format: str = "hash") -> str | None:
    """The answer that a response names, as it is written there, or None. A number somewhere in the
    text is no answer."""
    found = find_answer(response, answer_format)
    return found and found.text


def find_answer(response: str, answer_format: str = "hash") -> Answer | None:
    text = after_scratch_pad(response)
    inside = in_tags(text)
    if inside is not None:
        return find_in(inside, answer_format) or answer_of(inside, False)
    return find_in(text, answer_format)


def find_in(text: str, answer_format: str) -> Answer | None:
    boxed = last_boxed(text)
    if boxed is None or answer_format != "boxed":
        line = hash_line(text)
        if line is None and boxed is None:
            line = after_phrase(text)
        if line is not None:
            inner = last_boxed(line)
            return answer_of(line, False) if inner is None else answer_of(inner, True)
    return answer_of(boxed, True)


def answer_of(text: str | None, in_box: bool) -> Answer | None:
    """None for a text that says nothing."""
    if text is None or is_empty(text) or len(text) > LONGEST_ANSWER:
        return None
    text = CALCULATOR.sub("", text)
    if not read_tokens(text):
        return None
    plain = " ".join(text.split()).strip("*` ").rstrip(". ")
    plain = re.sub(r"^(_+)([^_].*)\1$", r"\2", plain)    # __18__
    return Answer(plain or text, in_box)


def is_empty(text: str) -> bool:
    """Whether nothing but punctuation and dress stands in it."""
    return not re.search(r"""[^\s\\$%*:".,;=#`~(){}[\]]""", text)


def after_scratch_pad(response: str) -> str:
    pads = list(SCRATCH_PAD.finditer(response))
    if not pads:
        return response
    closes = any(pads[-1].groups())
    return response[pads[-1].end():] if closes else ""


def in_tags(text: str) -> str | None:
    """What stands in the last <answer>…</answer>."""
    tags = list(TAG.finditer(text))
    for tag, after in zip(reversed(tags[:-1]), reversed(tags[1:])):
        if not tag[1] and after[1]:
            return text[tag.end():after.start()]
    return None


def hash_line(text: str) -> str | None:
    """What the last #### says, unless it is the heading of what follows."""
    end = len(text)
    named_below = False
    for marker in reversed(list(re.finditer("#{4,}", text))):
        line, _, below = text[marker.end():end].partition("\n")
        end = marker.start()
        named_below = named_below or last_boxed(below) is not None or bool(PHRASE.search(below))
        if PHRASE.search(line):
            return first_line(PHRASE.split(line)[-1] + "\n" + below)
        if ANSWER_HEADING.fullmatch(line):
            return first_line(below)
        if is_empty(line):
            continue
        if named_below and WORDS_HEADING.fullmatch(line) and not split_name(read_tokens(line))[0]:
            return None
        if not AFTERWORD.fullmatch(line):
            return first_line(line)
    return None


def after_phrase(text: str) -> str | None:
    """What follows the last "answer is", on its line or on the next that says something."""
    phrases = PHRASE.split(text)
    return first_line(phrases[-1]) if len(phrases) > 1 else None


def first_line(text: str) -> str | None:
    """The first line that says something. A bullet before it, or a quotation's >, goes."""
    first, *others = text.split("\n", 20)[:20]
    lines = [FILLER.sub("", first, count=1) if FILLER.match(first) else first]
    lines += [re.sub(r"^\s*[-*•>]\s+", "", line) for line in others]
    lines = (line.lstrip(" \t:*") for line in lines)
    return next((line for line in lines if not is_empty(line)), None)


def last_number(text: str) -> str | None:
    """The last number anywhere. For evaluation only: a policy rewarded for it would learn to
    scatter numbers."""
    numbers = re.findall(r"(?<![\d.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?", text, re.ASCII)
    number = read_number(read_tokens(numbers[-1])) if numbers else None
    return str(number.value) if number else None


# ---- Whether two answers are the same ------------------------------------------------------------

DEEPEST = 5    # lists in lists
# A reference that holds one of these is a formula, and its single letters are variables. ($ alone
# and \$ are currencies.)
MATHEMATICS = re.compile(r"\\(?![$%])|(?<!\\)\$[^$]*[^$\\]\$|[\^_=]")


def same(answer: str, reference: str, in_box: bool = False) -> bool:
    """Whether an answer is the reference. Not symmetric: the reference decides what may be left
    out."""
    named = PHRASE.split(reference)[-1]    # "answer: 5"
    reference = reference if is_empty(named) else named
    in_math = MATHEMATICS.search(reference) is not None
    return equal(read_tokens(answer, in_box), read_tokens(reference, in_math))


def equal(answer: list[Token], reference: list[Token], depth: int = 0) -> bool:
    if spelled(answer) == spelled(reference):
        return bool(reference)
    whole = answer
    answer_name, answer = split_name(answer)
    name, reference = split_name(reference)
    if answer_name and name and answer_name != name:
        return False
    number = read_number(reference)
    if number and is_talk(number.rest):
        is_it = partial(is_same_number, reference=number)
        return is_number(answer, number) or "=" in texts(whole) and names_number(whole, is_it, name)
    letter = letter_of_choice(reference, ENDS_OF_LETTER)
    if letter:
        return letter_of_choice(answer) == letter
    listed = read_list(reference)
    if listed.opening or len(listed.items) > 1:
        return depth < DEEPEST and equal_lists(read_list(answer), listed, depth + 1)
    if spelled(answer) == spelled(reference):
        return True
    return equal_but_for_units(answer, reference, depth)


def texts(tokens: list[Token]) -> set[str]:
    return {token.text for token in tokens}


# ---- Numbers -------------------------------------------------------------------------------------

def is_number(answer: list[Token], reference: Number) -> bool:
    """Whether an answer is this number, perhaps with a unit, talk or a sum."""
    readings = [read_number(answer)]
    if any(token.text == "!" and token.style != "math" for token in answer):
        # "18!" in prose may be a factorial, and it may be joy.
        readings.append(read_number([t._replace(text=".") if t.text == "!" else t for t in answer]))
    return any(
        number is not None and leaves_it(number) and is_same_number(number, reference)
        for number in readings)


def is_same_number(number: Number, reference: Number) -> bool:
    """Whether value and unit are the reference's. Its unit may be left out."""
    unit, own_end = read_unit(number.rest)
    has_percent = any(unit_of(token) == "percent" for token in number.rest)
    if not reference.rest and abs(reference.value) < 1 and has_percent:
        if unit != "percent":    # 3/4 of a percent
            return False
        number = number._replace(value=number.value / 100, places=number.places + 2)
    if not equal_values(number, reference):
        return False
    unit = number.currency or unit
    if reference.currency and not reference.rest:
        return unit in ("", reference.currency)
    if not reference.rest:
        return True
    reference_unit, end = read_unit(reference.rest)
    if not number.rest:
        return number.currency in ("", reference.currency or reference_unit)
    if end == len(reference.rest):
        return unit == reference_unit
    if spelled(number.rest[own_end:]) != spelled(reference.rest[end:]):
        return False
    wanted = reference.currency or reference_unit
    return not wanted or unit in ("", wanted)


def equal_but_for_units(answer: list[Token], reference: list[Token], depth: int) -> bool:
    r"""6\pi and 6\pi\text{ cm} are the same."""
    answer, unit = without_unit(answer)
    reference, reference_unit = without_unit(reference)
    if not (unit or reference_unit) or unit and reference_unit and unit != reference_unit:
        return False
    return depth < DEEPEST and equal(answer, reference, depth + 1)


def without_unit(tokens: list[Token]) -> tuple[list[Token], str]:
    r"""A formula and its unit. Beside variables a single letter is one too: 2a + 3h, but 6\pi m."""
    for at in range(max(1, len(tokens) - 8), len(tokens)):
        unit, end = read_unit(tokens, at)
        is_letter = len(tokens[at].text) == 1 and tokens[at].style != "text"
        is_variable = is_letter and has_variables(tokens[:at])
        is_unit = unit not in ("", "percent") and tokens[at].style != "math" and not is_variable
        if is_unit and end == len(tokens):
            return tokens[:at], unit
    return tokens, ""


def has_variables(tokens: list[Token]) -> bool:
    no_variables = (r"\pi", r"\sqrt", r"\frac", r"\cdot")
    return any(token.kind == "word" and (len(token.text) == 1 or not unit_of(token))
               or token.kind == "command" and token.text not in no_variables for token in tokens)


# ---- Lists ---------------------------------------------------------------------------------------

def equal_lists(answer: List, reference: List, depth: int) -> bool:
    """Item by item. A set may be written without its braces, and a list as a set."""
    sets = {answer.opening, reference.opening} <= {"", "{", r"\{"}
    brackets = (answer.opening, answer.closing) == (reference.opening, reference.closing)
    if len(answer.items) != len(reference.items) or not (brackets or sets):
        return False
    separators = answer.separators | reference.separators
    if r"\cup" in separators and answer.separators != reference.separators:
        return False
    items = answer.items + reference.items
    signs = {token.text for item in items for token in item}
    if signs & {"<", ">", r"\leq", r"\geq", r"\neq"} and answer.separators != reference.separators:
        return False
    named = all(split_name(item)[0] for item in items)
    joined = separators & {"or", r"\cup"} and sets
    unordered = named or joined or reference.opening in ("{", r"\{")
    if not unordered:
        names = [split_name(item)[0] for item in answer.items]
        if all(names) and names != sorted(names):    # y=1, x=2 is no (1, 2)
            return False
        return all(equal(*pair, depth) for pair in zip(answer.items, reference.items))
    return equal_sets(answer.items, reference.items, depth)


def equal_sets(answer: list[list[Token]], reference: list[list[Token]], depth: int) -> bool:
    """Whether the items are the same in any order."""
    left = {}    # the items of the answer by their spelling
    for item in answer:
        left.setdefault(spelled(item), []).append(item)
    others = []
    for item in reference:
        if left.get(spelled(item)):
            left[spelled(item)].pop()
        else:
            others.append(item)
    remaining = [item for items in left.values() for item in items]
    if len(others) > 20:    # this takes their square
        return False
    for item in others:
        match = next((i for i, other in enumerate(remaining) if equal(other, item, depth)), None)
        if match is None:
            return False
        del remaining[match]
    return True


# ---- References ----------------------------------------------------------------------------------

def names_nothing(reference: str) -> bool:
    """Whether a reference says that there is no answer, as NuminaMath's "proof" and "notfound". A
    response that repeats the word would be paid."""
    plain = spelled(read_tokens(PHRASE.split(reference)[-1])).strip("[]")
    none = r"(?:see)?proof|seesolution|not_?found|null|nan|n/a|n\.a|\?+|-+"
    return re.fullmatch(none, plain, re.IGNORECASE) is not None


def doubt(reference: str) -> str | None:
    """Why hardly any response can match a reference; None if nothing speaks against it."""
    if "\n" in reference.strip() and "\\begin" not in reference:
        return "its answer has several lines"
    plain = spelled(read_tokens(reference))
    if re.fullmatch(r"(?:see)?(?:proof|solution|none|unknown)\b.*", plain,
                    re.IGNORECASE):
        return f"its answer is {reference.strip()[:20]!r}"
    words = sum(token.kind == "word" and len(token.text) > 1 for token in read_tokens(reference))
    if words > 5:
        return f"its answer has {words} words"
    return None
