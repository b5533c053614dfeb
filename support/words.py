r"""Which words around a number leave it as it is: units, talk, names; and letters of choices.

What is not known to be harmless changes the number: digits, number words, operators, negations, and
letters that may be variables.
"""
from __future__ import annotations

import re

from support.tokens import Token, spelled, split


# ---- Units ---------------------------------------------------------------------------------------

UNITS = {spelling: line.split()[0] for line in """
    meter m meters metre metres
    centimeter cm cms centimeters centimetre centimetres
    millimeter mm millimeters millimetre millimetres
    kilometer km kms kilometers kilometre kilometres
    inch in inches
    foot ft feet
    yard yd yds yards
    mile mi miles
    gram g grams
    kilogram kg kgs kilograms kilo kilos
    milligram mg milligrams
    pound lb lbs pounds GBP
    ounce oz ounces
    ton tons tonne tonnes
    liter l L liters litre litres
    milliliter ml mL milliliters millilitre millilitres
    gallon gal gallons
    quart qt qts quarts
    pint pt pints
    second s sec secs seconds
    minute min mins minutes
    hour h hr hrs hours
    day days
    week wk wks weeks
    month months
    year yr yrs years
    degree deg degrees
    radian rad radians
    dollar dollars USD US
    cent cents
    euro euros EUR
    rupee rupees INR Rs
    yen
    percent percents
    erg ergs
    mile/hour mph
    kilometer/hour kmh kph
    mpg
    rpm
    unit units
    kWh
    GB
    MB""".strip().splitlines() for spelling in line.split()}
# Elsewhere than in \text{…} these are variables.
TEXT_UNITS = set("A C F J K N V W T Hz Pa kPa eV keV MeV GHz MHz kHz kJ kN kV kW mW MW mA".split())
# In a formula these are products: m g.
PRODUCTS = ("mg", "mi", "ml", "mL", "in", "us", "US")
JOINTS = {"/": "/", "per": "/", r"\cdot": ""}
POWERS_BEFORE = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
POWERS_AFTER = {"squared": "^2", "cubed": "^3"}


def unit_of(token: Token) -> str | None:
    """The unit that a word is a spelling of. mW is not MW, and ms is not m."""
    if token.style == "text" and token.text in TEXT_UNITS:
        return token.text
    if token.style == "math" and (len(token.text) == 1 or token.text in PRODUCTS):
        return None
    return UNITS.get(token.text.casefold() if len(token.text) > 3 else token.text)


def read_unit(tokens: list[Token], at: int = 0) -> tuple[str, int]:
    """The unit that stands at a place, in one spelling, and where it ends: meter^2 for m^2 and for
    square meters, meter/second for m/s."""
    unit = ""
    power = ""
    start = at
    while at < len(tokens):
        word = tokens[at].text.lower()
        power_end = end_of_power(tokens, at)
        if word in JOINTS and unit and at + 1 < len(tokens) and unit_of(tokens[at + 1]):
            unit += JOINTS[word]
        elif word in POWERS_BEFORE:
            power = POWERS_BEFORE[word]
        elif unit and word in POWERS_AFTER:
            unit += POWERS_AFTER[word]
        elif unit and power_end > at:
            unit += "^" + "".join(token.text for token in tokens[at + 2:power_end - 1])
            at = power_end - 1
        elif unit_of(tokens[at]):
            unit += unit_of(tokens[at]) + power
            power = ""
        else:
            break
        at += 1
    return unit, at if unit else start


def end_of_power(tokens: list[Token], at: int) -> int:
    """Where ^{2} or ^{-1} ends; `at` if none stands there."""
    if tokens[at].text != "^":
        return at
    end = at + 3 + (at + 2 < len(tokens) and tokens[at + 2].text == "-")
    is_number = end < len(tokens) and tokens[end - 1].kind == "number"
    return end + 1 if is_number and tokens[end].text == "}" else at


# ---- Talk ----------------------------------------------------------------------------------------

# Words of two letters, or without a vowel. All others of these are products of variables (2 ab).
SHORT_WORDS = set("""
    am an as at be by do go he if is it me my of oh on pm so th up us we cts hrs pcs pts sq tbsp tsp
    TV TVs CD CDs DVDs""".split())
# Words that make another number or another answer of it, wherever they follow it ...
CHANGES = re.compile(r"""
    (?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen
    |sixteen|seventeen|eighteen|nineteen|hundred|thousand|dozen|gross|score|lakh|crore|mill?|grand)
        (?:e?s|ths?|fold)?
    |(?:twent|thirt|fort|fift|sixt|sevent|eight|ninet)(?:y|ies|ieths?)
    |(?:third|fif?th|eighth|nine?th|twelfth|quarter)s?|half|halves?|halved
    |[a-z]*illi(?:on|ard)(?:s|en|ths?)?|twice|thrice|(?:doubl|tripl|quadrupl)e[sd]?|squared?|cubed?
    |plus|minus|negative|divided|multiplied|below|under|above|least|most|mod|modulo|base
    |binary|octal|hex(?:adecimal)?|sin|cos|tan|cot|csc|log|ln|exp|lim|gcd|lcm
    |alpha|beta|gamma|delta|epsilon|theta|lambda|sigma|tau|phi|omega
    |or|nor|not|no|never|cannot|wrong|incorrect|false|wait|actually|instead|rather|except|either
    |undefined""", re.IGNORECASE | re.VERBOSE)
# ... and words that do so if they follow at once.
CHANGES_AT_ONCE = ("and", "to", "root", "point", "power", "choose", "factorial")
# What takes back a choice: one of these words anywhere in its text, or TAKEN_BACK at the beginning.
# (Others of CHANGES may be its text: B) three or more.)
CORRECTIONS = set("wait actually instead rather".split())
TAKEN_BACK = re.compile(
    r"(?:and|or|is not|isn't) |not (?:correct|right|true|$|(?-i:[A-Z]) )"
    r"|(?:wrong|incorrect|false) (?:$|[.;])|(?:(?:which|that) )?is (?:wrong|incorrect|false)\b",
    re.IGNORECASE)
ENDS_OF_LETTER = (")", "]", ".", ":")
TALK_SIGNS = (",", ".", ";", ":", "?", "(", ")", '"', "—")


def is_talk(tokens: list[Token]) -> bool:
    """Whether it is words and units only."""
    if tokens and tokens[0].text.lower() in CHANGES_AT_ONCE:
        return False
    at = 0
    while at < len(tokens):
        token = tokens[at]
        before = tokens[at - 1] if at else None
        after = tokens[at + 1] if at + 1 < len(tokens) else None
        unit_end = read_unit(tokens, at)[1]
        power_end = end_of_power(tokens, at)
        if unit_end > at + 1:
            at = unit_end
        elif power_end > at and before and before.style == "text":
            at = power_end
        elif token.kind == "word" and is_word(token, before, after):
            at += 1
        elif token.text in TALK_SIGNS or token.text == "!" and token.style != "math":
            at += 1
        elif token.text == "'" and token.glued and before and len(before.text) > 1:    # farmers'
            at += 1
        elif token.text in ("/", r"\cdot", r"\mu") and after and joins(after):
            at += 1
        else:
            return False
    return True


def joins(token: Token) -> bool:
    """Whether a word can stand after a stroke: dollars/hour, km/person."""
    is_long = len(token.text) > (1 if token.style == "text" else 3)
    return bool(unit_of(token)) or token.style != "math" and token.text.isalpha() and is_long


def is_word(token: Token, before: Token | None, after: Token | None) -> bool:
    """A word of a language, and not a product of variables (ab, xyz) or a change of a number."""
    word = token.text
    ends = after is None or after.text in TALK_SIGNS
    if len(word) == 1:
        return is_word_of_one_letter(token, before, after)
    if word == "times":    # 18 times
        return ends
    parts = [part for part in re.split("['-]", word) if len(part) > 1]
    changes = any(CHANGES.fullmatch(part) for part in parts) or word.lower().endswith("n't")
    if changes or not parts:
        return False
    if word in SHORT_WORDS or word.lower() in SHORT_WORDS or unit_of(token):
        return True
    letters = max(parts, key=len).lower()
    has_vowel = set(letters) & set("aeiouy")
    is_product = set(letters) <= set("abc") or set(letters) <= set("xyz") or not has_vowel
    return not is_product and len(letters) > (3 if token.style == "math" else 2)


def is_word_of_one_letter(token: Token, before: Token | None, after: Token | None) -> bool:
    """18 a week, 15 degrees C, 18 m; elsewhere it is a variable."""
    if token.text in "CFK" and before and before.text == "degrees":
        return True
    if token.text in "aAI":
        return after is not None and after.kind == "word" and len(after.text) > 2
    ends = after is None or after.text in TALK_SIGNS or after.text == "/"
    return unit_of(token) is not None and ends


# ---- Names and choices ---------------------------------------------------------------------------

# x, x_{1}, \theta, f', f(x), f(-3,1/2), P(X=2), E[X], AB, \angle ABC, |AB|, (x,y); or words
LETTER = (r"(?:[A-Za-z]|\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma"
          r"|tau|phi|omega|ell|Delta|Theta|Phi|Omega))(?:'|_\{[^{}]*\})*")
ARGUMENT = rf"(?:(?:[A-Z]=)?-?(?:\d+(?:[./]\d+)?|\\frac\{{\d+\}}\{{\d+\}})|{LETTER})"
NAME = re.compile(
    rf"{LETTER}(?:(?:\^\{{-1\}})?[(\[]{ARGUMENT}(?:(?:,|\\cap |\\cup |\|){ARGUMENT})*[)\]])?"
    rf"|\({LETTER}(?:,{LETTER})+\)"
    r"|m?(?:\\angle |\\triangle )?[A-Z]{1,4}|\|(?:[A-Z]{2}|z)\||\[[A-Z]{3,4}\]"
    r"|\\(?:overline|bar|vec|hat)\{(?:[A-Z]{2}|[A-Za-z])\}")


def is_name(tokens: list[Token]) -> bool:
    in_words = tokens and all(token.kind == "word" for token in tokens) and is_talk(tokens)
    return bool(NAME.fullmatch(spelled(tokens)) or in_words and len(tokens[0].text) > 2)


def split_name(tokens: list[Token]) -> tuple[str, list[Token]]:
    r"""(name, the rest) of x = 5, f(x) = 5, 5 = x, x \in [0,1] and Total = 5; else ("", all)."""
    sides = split(tokens, ("=", r"\in"))
    if len(sides) == 2:
        left, right = sides
        if is_name(left):
            return spelled(left), right
        if is_name(right) and any(token.text == "=" for token in tokens):
            return spelled(right), left
    return "", tokens


def letter_of_choice(
    tokens: list[Token], ends: tuple[str, ...] = (*ENDS_OF_LETTER, ",", "because", "since"),
) -> str | None:
    """B of B, (b), option B, B) 15, B: a cat or two, and B because …; None of (A) or (B), of B, C,
    and of B: wrong. `ends` are what may follow the letter."""
    texts = [token.text for token in tokens]
    if texts[:1] and texts[0].lower() in ("option", "choice"):
        texts = texts[1:]
    if texts[:1] in (["("], ["["]):
        texts = texts[1:]
    letter, *rest = texts or [""]
    may_be_small = not rest or rest[0] == ")"
    if not re.fullmatch("[A-Za-e]" if may_be_small else "[A-Z]", letter):
        return None
    if rest and rest[0] not in ends:
        return None
    if TAKEN_BACK.match(" ".join([*rest[1:], ""])) or CORRECTIONS & {t.lower() for t in rest}:
        return None
    gives_reason = rest and rest[0] in ("because", "since")    # it may speak of the others
    others = [] if gives_reason else zip(rest, [*rest[1:], ""])
    if any(is_another_choice(letter, rest[0], text, after) for text, after in others):
        return None
    return letter.upper()


def is_another_choice(letter: str, first: str, text: str, after: str) -> bool:
    """Whether a word behind a choice is the letter of one. first: what follows the choice. Behind
    a bracket stands its text, in which a letter may be a name: (B) vitamin C."""
    if letter.islower():
        return text in set("abcde") and after == ")"
    is_letter = re.fullmatch("[A-Z]", text) is not None
    in_list = first in (",", ".") and text not in ("A", "I") or after in (*ENDS_OF_LETTER, ",")
    return is_letter and in_list
