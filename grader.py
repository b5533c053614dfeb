r"""The reward: what a response answers, and whether that is right.

A wrong answer that is graded right is the worse fault, because training will find it. So a
response is compared with the reference by these rules, and by nothing else. Each line below reads
"reference: a right response  not a wrong one", and is a test.

 1. Only a marker names an answer, and the last of its kind counts: ####, else \boxed{}, else
    "answer is" or "answer:". (With --answer-format boxed, a box goes before ####.)
        18: \boxed{17} #### 18                  not I got 18
 2. A #### line of words is a heading if a box or an "answer is" follows it.
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
11. Any other equation, inequality or expression is compared as a whole, as text.
        x+y=0: \boxed{x + y = 0}                not \boxed{0}
12. Lists are compared item by item: in order, except for sets and for solutions joined by "or".
        n=5 or n=7: \boxed{7, 5}                not \boxed{5}
13. Brackets are part of a list.
        [0,1): \boxed{x \in [0, 1)}             not \boxed{(0,1)}
14. The letter of a choice may be followed by its text.
        B: \boxed{\text{(B)}\ 15}               not \boxed{(A) or (B)}

    grade(response, reference) -> 1.0 or 0.0
"""
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from support.answers import (
    ARITHMETIC, DIGITS, List, Number, as_text, equal_values, is_name, is_talk, is_unit, last_boxed,
    leaves_it, letter_of_choice, read_list, read_number, split_name, undressed, unit)


LONGEST_ANSWER = 300  # characters of a response's answer; a longer reference allows for more


def grade(response: str, reference: str, answer_format: str = "hash") -> float:
    """1.0 if the response's answer is the reference, else 0.0."""
    answer = extract_answer(response, answer_format, max(LONGEST_ANSWER, 2 * len(reference)))
    return float(answer is not None and same(answer, reference))


def grade_boxed(response: str, reference: str) -> float:
    """`grade` where a box is asked for: it goes before ####."""
    return grade(response, reference, "boxed")


GRADERS = {"hash": grade, "boxed": grade_boxed}


@dataclass(frozen=True)
class Reward:
    """What a response earns, and from which reward on it counts as correct."""
    function: Callable[[str, str], float] = grade    # (response, reference) -> reward
    correct_at: float = 1.0

    def __call__(self, response: str, reference: str) -> float:
        return self.function(response, reference)


# ---- Finding the answer in a response ------------------------------------------------------------

SCRATCH_PAD = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
PHRASE = re.compile(r"answer(?:\s*\*\*)?\s*(?:is\b|:)", re.IGNORECASE)
ANSWER_HEADING = re.compile(r"[\s*:]*(?:the )?(?:final )?answer[\s*:]*", re.IGNORECASE)
WORDS_HEADING = re.compile(
    r"[\s*_]*(?:(?:step|part|case)\b.*|(?:\d+[.):]\s*)?[^\W\d_]{2}[^=]*)", re.IGNORECASE)


def extract_answer(
    response: str, answer_format: str = "hash", longest: int = LONGEST_ANSWER,
) -> str | None:
    """The answer that a response names, without its dress, or None. A number somewhere in the text
    is no answer."""
    text = final_part(response)
    boxed = last_boxed(text)
    if boxed is None or answer_format != "boxed":
        line = hash_line(text)
        if line is None and boxed is None:
            line = after_phrase(text)
        if line is not None:
            # "18!" in a line of prose is no factorial: the blank tells them apart.
            boxed = re.sub(r"!+(?=[\s.*]*$)", " !", line)
    if boxed is None:
        return None
    if len(boxed) > longest:    # cut between words: half a number is another number
        boxed = boxed[:longest].rpartition(" ")[0]
    return undressed(boxed) or None


def final_part(response: str) -> str:
    """What follows the scratch pad; inside <answer>…</answer>, if the response has that."""
    pads = list(SCRATCH_PAD.finditer(response))
    if pads and not pads[-1][1]:
        return ""
    text = response[pads[-1].end():] if pads else response
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start < 0:
        return text
    inside = text[start + len("<answer>"):end]
    return inside if extract_answer(inside) else f"\\boxed{{{inside}}}"


def hash_line(text: str) -> str | None:
    """What the last #### says, unless it is the heading of what follows."""
    rest = ""
    for part in reversed(re.split(r"#{4,}", text)[1:]):
        line, _, below = part.partition("\n")
        rest = below + rest
        if PHRASE.search(line):
            return first_line(PHRASE.split(line)[-1] + "\n" + below)
        if ANSWER_HEADING.fullmatch(line):
            return first_line(below)
        if not undressed(line):
            continue
        is_words = WORDS_HEADING.fullmatch(line)
        if is_words and (last_boxed(rest) is not None or PHRASE.search(rest)):
            return None
        return line
    return None


def after_phrase(text: str) -> str | None:
    """What follows the last "answer is", on its line or on the next that says something."""
    phrases = PHRASE.split(text)
    return first_line(phrases[-1]) if len(phrases) > 1 else None


def first_line(text: str) -> str | None:
    lines = (line.lstrip(" \t:*") for line in text.split("\n", 20)[:20])
    return next((line for line in lines if undressed(line)), None)


def last_number(text: str) -> str | None:
    """The last number anywhere. For evaluation only: a policy rewarded for it would learn to
    scatter numbers."""
    numbers = re.findall(rf"(?<![\d.])-?{DIGITS}", text)
    number = read_number(numbers[-1]) if numbers else None
    return str(number.value) if number else None


# ---- Whether two answers are the same ------------------------------------------------------------

def same(answer: str, reference: str) -> bool:
    """Whether an answer is the reference. Not symmetric: the reference decides what may be left
    out."""
    return equal(undressed(answer), undressed(reference))


def equal(answer: str, reference: str) -> bool:
    if as_text(answer) == as_text(reference):
        return as_text(reference) != ""
    answer_name, answer = split_name(answer)
    name, reference = split_name(reference)
    if answer_name and name and as_text(answer_name) != as_text(name):
        return False
    number = read_number(reference)
    if number and (not number.rest or is_unit(number)):
        return is_number(answer, number)
    if re.fullmatch(r"[A-Z]", reference):
        return letter_of_choice(answer) == reference
    listed = read_list(reference)
    if listed.opening or len(listed.items) > 1:
        return equal_lists(read_list(answer), listed)
    if as_text(answer) == as_text(reference):
        return True
    in_units = re.search(r"(?<=[\d}])\s+([A-Za-z].*)$", reference)    # 2\sqrt{3} cm
    if in_units and is_talk(in_units[1]):
        return equal(answer, reference[:in_units.start()])
    return False


def is_number(answer: str, reference: Number) -> bool:
    """Whether an answer is this number, perhaps with a unit."""
    number = read_number(answer)
    if number and equal_values(number, reference):
        if not reference.rest and leaves_it(number):
            return True
        if reference.rest and (not number.rest or unit(number) == unit(reference)):
            return True
    return "=" in answer and all_sides_are(answer, reference)


def all_sides_are(equation: str, reference: Number) -> bool:
    """Whether an equation in numbers names this one: 9 + 9 = 18, 18 = 9 + 9, x = 9 + 9 = 18. One
    side or more is the number, and the others are sums or a name."""
    named = False
    for side in equation.split("="):
        side = side.strip()
        number = read_number(side)
        if number and (not number.rest or is_unit(number)):
            named = True
            if not equal_values(number, reference):
                return False
        elif not is_name(side) and not ARITHMETIC.fullmatch(side):
            return False
    return named


def doubt(reference: str) -> str | None:
    """Why hardly any response can match a reference; None if nothing speaks against it."""
    if "\n" in reference.strip() and "\\begin" not in reference:
        return "its answer has several lines"
    plain = undressed(reference)
    if re.fullmatch(r"(?:see )?(?:proof|solution|none|null|nan|n/?a|not ?found|unknown)\b.*", plain,
                    re.IGNORECASE):
        return f"its answer is {plain[:20]!r}"
    prose = re.findall(r"(?<![\\\w])[^\W\d_]{2,}", plain)
    if len(prose) > 5:
        return f"its answer has {len(prose)} words"
    return None


def equal_lists(answer: List, reference: List) -> bool:
    """Item by item. A set may be written without its braces, and a list as a set."""
    sets = {answer.opening, reference.opening} <= {"", r"\{"}
    brackets = (answer.opening, answer.closing) == (reference.opening, reference.closing)
    if len(answer.items) != len(reference.items) or not (brackets or sets):
        return False
    named = all("=" in item for item in answer.items + reference.items)
    if reference.ordered and not named:
        return all(map(equal, answer.items, reference.items))
    left = list(answer.items)
    for item in reference.items:
        match = next((other for other in left if equal(other, item)), None)
        if match is None:
            return False
        left.remove(match)
    return True
