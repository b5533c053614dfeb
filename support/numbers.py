"""Numbers in answers: their values, what may follow them, and sums that come to them."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

from support.tokens import Token, bare, spelled, split
from support.words import UNITS, is_name, is_talk, read_unit, unit_of


class Number(NamedTuple):
    value: Fraction
    places: float         # decimal places; a fraction is as exact as one likes
    digits: int           # the digits of a decimal, without zeros before them
    currency: str         # what stands before it: dollar
    rest: list[Token]     # what follows it


# What a number looks like: # is a number, ± one that may have a sign, * a multiplication.
SHAPES = [(shape.split(), value) for shape, value in (
    (r"# \frac { ± } { ± }", lambda whole, top, under: whole + top / under),
    (r"\frac { ± } { ± }", lambda top, under: top / under),
    ("# # / #", lambda whole, top, under: whole + top / under),
    ("# / ±", lambda top, under: top / under),
    ("# * 10 ^ { ± }", lambda number, power: number * ten_to(power)),
    ("10 ^ { ± }", lambda power: ten_to(power)),
    ("# !", lambda number: factorial(number)),
    ("#", lambda number: number),
)]
TIMES = ("*", r"\cdot", r"\times", "x")
CURRENCIES = "dollars euros pounds yen rupees USD US EUR GBP INR Rs".split()
MULTIPLES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
             "trillion": 10**12}
ORDINALS = ("st", "nd", "rd", "th")
LONGEST_NUMBER = 1000    # characters


def read_number(tokens: list[Token]) -> Number | None:
    """The number that an answer begins with: 18, 3/4, 5 1/2, 3e5, 2 million, 15th, 5!."""
    at = 0
    sign = currency = ""
    while at < len(tokens):
        text = tokens[at].text
        if text in ("+", "-") and not sign:
            sign = text
        elif text in CURRENCIES:
            currency = UNITS[text]
        elif not (text == r"\approx" and at == 0 or text == "." and currency == "rupee"):
            break
        at += 1
    for shape, value_of in SHAPES:
        values, end = match(tokens, at, shape)
        if values is not None:
            break
    else:
        return None
    try:
        value = value_of(*values)
    except (ZeroDivisionError, OverflowError):
        return None
    places, digits = math.inf, 0
    if shape == ["#"]:
        mantissa, _, exponent = tokens[at].text.partition("e")
        whole, _, decimals = mantissa.partition(".")
        places = len(decimals) - int(exponent or 0)
        digits = len((whole + decimals).lstrip("0"))
    if value.denominator == 1:
        end = end_of_ordinal(tokens, end)
    while end < len(tokens) and tokens[end].text.lower().removesuffix("s") in MULTIPLES:
        value *= MULTIPLES[tokens[end].text.lower().removesuffix("s")]
        end += 1
    return Number(-value if sign == "-" else value, places, digits, currency, tokens[end:])


def match(tokens: list[Token], at: int, shape: list[str]) -> tuple[list[Fraction] | None, int]:
    """The values of the numbers in a shape, and where it ends; None if the tokens have another."""
    values = []
    for wanted in shape:
        minus = False
        if wanted == "±" and at < len(tokens) and tokens[at].text in ("+", "-"):
            minus = tokens[at].text == "-"
            at += 1
        if at == len(tokens):
            return None, at
        token = tokens[at]
        if wanted in ("#", "±"):
            if token.kind != "number" or len(token.text) > LONGEST_NUMBER:
                return None, at
            value = Fraction(token.text)
            values.append(-value if minus else value)
        elif token.text != wanted and not (wanted == "*" and token.text in TIMES):
            return None, at
        at += 1
    return values, at


def end_of_ordinal(tokens: list[Token], at: int) -> int:
    """Where the th of 15th and of 15^{th} ends."""
    texts = [token.text for token in tokens[at:at + 4]]
    if texts and texts[0] in ORDINALS and tokens[at].glued:
        return at + 1
    is_power = len(texts) == 4 and texts[:2] == ["^", "{"] and texts[2] in ORDINALS
    return at + 4 if is_power else at


def ten_to(power: Fraction) -> Fraction:
    if power.denominator != 1 or abs(power) > 999:
        raise OverflowError
    return Fraction(10) ** int(power)


def factorial(number: Fraction) -> Fraction:
    if number.denominator != 1 or number > 999:
        raise OverflowError
    return Fraction(math.factorial(int(number)))


def equal_values(number: Number, reference: Number) -> bool:
    """Exactly; or, if the reference has six decimal places or more, to the last of them, or to the
    last of the response's if it has six or more itself. (And four digits, both: 0.000001 says
    nothing of 0.0000012345.)"""
    if number.value == reference.value:
        return True
    if not 6 <= reference.places < math.inf or reference.digits < 4:
        return False
    if number.places < math.inf and number.digits < 4:
        return False
    compared = min(number.places, reference.places)
    difference = abs(number.value - reference.value)
    return compared >= 6 and 2 * difference * 10**compared <= 1


# ---- What may follow a number --------------------------------------------------------------------

OPERATORS = ("+", "-", "*", "/", "^", r"\times", r"\cdot", r"\div", "x")
ARITHMETIC = {*OPERATORS, *"=()[]{},.:!", r"\frac", r"\sqrt", "dollars", "percent"}


def leaves_it(number: Number) -> bool:
    """Whether what follows a number leaves it as it is: a unit or talk (rule 6), a sum that comes
    to it (rule 8), and sentences without any other number."""
    rest = number.rest
    if rest and rest[0].kind == "word" and rest[0].glued:
        is_unit = len(rest[0].text) > 1 and unit_of(rest[0]) is not None
        if not is_unit and rest[0].text not in ("am", "pm"):
            return False
    first, *later = sentences(rest)
    return agrees(first, number, False) and all(agrees(each, number, True) for each in later)


def sentences(tokens: list[Token]) -> Iterator[list[Token]]:
    start = 0
    for i, (token, after) in enumerate(zip(tokens, tokens[1:])):
        begins = not after.glued and (after.text[0].isupper() or after.kind != "word")
        if token.text in (".", "!", "?") and token.style != "math" and begins:
            yield tokens[start:i]
            start = i + 1
    yield tokens[start:]


def agrees(sentence: list[Token], number: Number, may_repeat_it: bool) -> bool:
    """Whether a sentence is talk, with sums that come to the number, and perhaps the number."""
    talk = []
    for tokens in runs(sentence):
        has_number = any(token.kind == "number" for token in tokens)
        is_unit = has_number and tokens[0].kind == "word" and tokens[0].text not in ARITHMETIC
        if is_unit or not has_number:
            talk += tokens
        elif not comes_to(tokens, number, may_repeat_it):
            return False
    return is_talk(talk)


def runs(sentence: list[Token]) -> Iterator[list[Token]]:
    """Runs of digits and signs, and the words between them. A unit and its power stay together."""
    run = []
    at = 0
    while at < len(sentence):
        token = sentence[at]
        if token.kind == "number" or token.text in ARITHMETIC:
            run.append(token)
            at += 1
            continue
        yield run
        run = []
        end = max(read_unit(sentence, at)[1], at + 1)
        yield sentence[at:end]
        at = end
    yield run


def comes_to(arithmetic: list[Token], number: Number, may_be_alone: bool) -> bool:
    """Whether the number is what a sum comes to."""
    is_sum = any(token.text == "=" for token in arithmetic[1:])
    return (is_sum or may_be_alone) and names_number(
        bare(arithmetic), lambda side: side.value == number.value)


# ---- Sums ----------------------------------------------------------------------------------------

def names_number(
    equation: list[Token],
    is_it: Callable[[Number], bool],
    name: str = "",
) -> bool:
    """Whether an equation in numbers names one: 9 + 9 = 18, 18 = 9 + 9, x = 9 + 9 = 18. One side or
    more is the number, and the others are sums or the name."""
    named = False
    for side in split(equation, ("=",)):
        number = read_number(side)
        if number and is_talk(number.rest):
            named = True
            if not is_it(number):
                return False
        elif not is_sum(side) and not (is_name(side) and name in ("", spelled(side))):
            return False
    return named


def is_sum(tokens: list[Token]) -> bool:
    """Whether it is numbers with operators between them, and perhaps units: (9 + 9) * 2 apples,
    1/2 of 36. Nothing is computed."""
    depth = 0
    operators = 0
    wants_number = True
    for before, token in zip([None, *tokens], tokens):
        text = token.text
        if text in ("(", "{"):
            operators += text == "(" and not wants_number    # 2(9)
            depth += 1
            wants_number = True
        elif text in (")", "}") and depth > 0 and not wants_number:
            depth -= 1
        elif text in ("+", "-") and (before is None or before.text == "("):
            pass
        elif text in (*OPERATORS, "of") and not wants_number:
            operators += 1
            wants_number = True
        elif text in (r"\frac", r"\sqrt") and wants_number:
            operators += 1
        elif token.kind == "number" and wants_number:
            wants_number = False
        elif text not in ("dollars", "percent") and (wants_number or not is_talk([token])):
            return False
    return operators > 0 and depth == 0 and not wants_number
