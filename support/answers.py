r"""How answers are written: tokens, numbers, units, names and lists. grader.py compares them.

This is the small print of its rules. It imports nothing of ours. Every step takes one pass over
the text, because a policy that has collapsed can write one bracket ten thousand times.
"""
from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple


# ---- Tokens: one spelling for what can be spelled in several ways --------------------------------

class Token(NamedTuple):
    kind: str      # number, word, command or sign
    text: str      # in one spelling: 1080 for 1,080, and \frac for \dfrac
    style: str     # prose; math, where letters are variables; or text, inside of \text{…}
    glued: bool    # nothing stands between it and the token before


SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-")
LETTERS = str.maketrans({
    "−": "-", "–": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
    "∗": "*", "÷": r"\div ", "±": r"\pm ", "∓": r"\mp ", "π": r"\pi ", "θ": r"\theta ",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "φ": r"\phi ",
    "ω": r"\omega ", "∞": r"\infty ", "√": r"\sqrt ", "°": r"^{\circ}", "≤": r"\leq ",
    "⩽": r"\leq ", "≥": r"\geq ", "⩾": r"\geq ", "≠": r"\neq ", "≈": r"\approx ", "∈": r"\in ",
    "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "→": r"\rightarrow ", "⇒": r"\Rightarrow ",
    "“": '"', "”": '"', "’": "'", "\u00a0": " ", "\u202f": " ",
    **{c: rf" \frac{{{top}}}{{{under}}}" for c, top, under in zip(
        "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "112131234115357", "233445555668888")},
})
# One spelling of commands, signs and words
SPELLINGS = {
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\dbinom": r"\binom",
    r"\le": r"\leq", r"\leqslant": r"\leq", "<=": r"\leq", r"\lt": "<",
    r"\ge": r"\geq", r"\geqslant": r"\geq", ">=": r"\geq", r"\gt": ">",
    r"\ne": r"\neq", "!=": r"\neq", "=/=": r"\neq", r"\not=": r"\neq",
    r"\implies": r"\Rightarrow", "=>": r"\Rightarrow", r"\to": r"\rightarrow",
    "==": "=", ":=": "=", r"\ast": "*", r"\colon": ":", r"\varnothing": r"\emptyset",
    r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lbrack": "[", r"\rbrack": "]", r"\lvert": "|",
    r"\rvert": "|", r"\vert": "|", r"\mid": "|", r"\lor": "or", r"\land": "and", "pi": r"\pi",
    "sqrt": r"\sqrt", "infinity": r"\infty", r"\begin{bmatrix}": r"\begin{pmatrix}",
    r"\end{bmatrix}": r"\end{pmatrix}", r"\degree": "degrees", r"\%": "percent", "%": "percent",
    r"\$": "dollars", "€": "euros", "£": "pounds", "¥": "yen", "₹": "rupees",
}
SKIPPED = set(r"""\left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \biggl \biggr \bf \rm
    \it \displaystyle \textstyle \limits \quad \qquad \, \! \; \: \( \) \[ \] ~ ` $ $$ **
    \left. \right.""".split()) | {"\\ ", "\\\n"}
WORD_FONTS = set(r"\text \textrm \textnormal \mathrm \mbox \hbox \operatorname".split())
FONTS = WORD_FONTS | set(r"""\textbf \textit \textsf \texttt \mathbf \mathbb \mathit \mathsf \mathtt
    \bm \boldsymbol \boxed \fbox""".split())
THOUSANDS = (r"[0-9]{1,3}(?P<comma>,|\{,\}|,?\\!|\\,|[ ])[0-9]{3}(?:(?P=comma)[0-9]{3})*"
             r"(?![0-9])")
PLAIN_DIGITS = r"(?:\.[0-9]+|\.(?=\s*/))?(?:[eE][+-]?[0-9]{1,3}(?![0-9A-Za-z]))?"
PLAIN_NUMBER = re.compile(rf"(?P<number>[0-9]+{PLAIN_DIGITS})")
PIECE = re.compile(rf"""
      (?P<number>(?:{THOUSANDS}|[0-9]+){PLAIN_DIGITS}|\.[0-9]+)
    | (?P<word>[^\W\d_]+(?:['-][^\W\d_]+)*)
    | (?P<command>\\(?:begin|end)\s*\{{[^{{}}]{{0,20}}\}}|\\(?:left|right)\s*\.|\\not\s*=
        |\\operatorname\*|\\[A-Za-z]+|\\.)
    | (?P<sign>\*\*|\$\$|[!<>:=]=|=>|=/=|\S)""", re.VERBOSE | re.DOTALL)
LONGEST_NUMBER = 1000    # characters


def read_tokens(text: str, in_math: bool = False) -> list[Token]:
    """An answer as tokens, without fonts, LaTeX's spaces, brackets around the whole and the
    punctuation at its ends. in_math: it stood in a box."""
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: f"^{{{m[0].translate(SUPERSCRIPTS)}}}", text)
    text = re.sub(r"[₀-₉₊₋]+", lambda m: f"_{{{m[0].translate(SUBSCRIPTS)}}}", text)
    return bare(with_braces(spell(text.translate(LETTERS), in_math)))


def spell(text: str, in_math: bool) -> list[Token]:
    tokens = []
    style = outside = "math" if in_math else "prose"
    closers = []      # for each open brace: the style to return to if a font opened it, else None
    depth = 0         # of brackets, where a comma is never part of a number: (1,200) is a pair
    one_dollar = text.replace("$$", "").count("$") - text.count(r"\$") == 1
    at = end = 0      # where to read on; where the last token ended
    while found := PIECE.search(text, at):
        if found["comma"] == "," and depth > 0:
            found = PLAIN_NUMBER.match(text, found.start())
        at = found.end()
        kind = found.lastgroup
        written = "".join(found[0].split()) if kind == "command" and len(found[0]) > 2 else found[0]
        if written in FONTS or written == r"\operatorname*":
            brace = re.compile(r"\s*\{").match(text, at)
            if brace:
                at = brace.end()
                closers.append(style)
                if written in WORD_FONTS or written == r"\operatorname*":
                    style = "text"
                elif written in (r"\boxed", r"\fbox"):
                    style = "math"
            continue
        if written == "}" and closers and closers[-1] is not None:
            style = closers.pop()
            continue
        if written == "{":
            closers.append(None)
        elif written == "}" and closers:
            closers.pop()
        is_power = written == "**" and re.compile(r"(?<=[\w)])\*\*(?=[\w(])").match(
            text, found.start())
        if is_power:
            written = "^"
        if written == "$" and one_dollar:
            written = r"\$"
        if written in (r"\(", r"\[", r"\)", r"\]", "$", "$$"):
            opens = written in (r"\(", r"\[") or "$" in written and style == outside
            style = "math" if opens else outside
        if written in SKIPPED:
            continue
        new = SPELLINGS.get(written, written)
        if new != written:
            kind = "word" if new.isalpha() else ("command" if new[0] == "\\" else "sign")
        if kind == "number":
            new = plain_digits(found[0])
        depth += (new in ("(", "[", r"\{")) - (new in (")", "]", r"\}") and depth > 0)
        tokens.append(Token(kind, new, style, found.start() == end))
        end = at
    return tokens


def plain_digits(written: str) -> str:
    """1080.5 for 1,080.50, and 7 for 007."""
    digits = re.sub(r"[^0-9.eE+-]", "", written)
    digits, e, exponent = digits.partition("e" if "e" in digits else "E")
    whole, _, decimals = digits.partition(".")
    decimals = decimals.rstrip("0")
    plain = (whole.lstrip("0") or "0") + ("." + decimals if decimals else "")
    return plain + ("e" + exponent if e else "")


ARGUMENTS = {r"\frac": 2, r"\binom": 2, r"\sqrt": 1, r"\overline": 1, r"\bar": 1, r"\vec": 1,
             r"\hat": 1, "^": 1, "_": 1}


def with_braces(tokens: list[Token]) -> list[Token]:
    r"""\frac43 as \frac{4}{3}, x^2 as x^{2}, sqrt(3) as \sqrt{3}, 90^\circ as 90 degrees. Braces
    that hold no argument go."""
    tokens = deque(tokens)
    result = []
    due = []         # the commands that wait for an argument
    opened = []      # for each open bracket: (its end, what to write for that, what is due then)

    def write(kind, text):
        result.append(Token(kind, text, "math", True))

    while tokens:
        token = tokens.popleft()
        text = token.text
        if text == "{":
            if due:
                write("sign", "{")
            opened.append(("}", "}" if due else "", due[1:]))
            due = []
        elif text == "(" and due and due[0] in (r"\sqrt", "^"):
            write("sign", "{")
            opened.append((")", "}", due[1:]))
            due = []
        elif text == "[" and due and due[0] == r"\sqrt":    # \sqrt[3]{x}
            result.append(token)
            while tokens and result[-1].text != "]":
                result.append(tokens.popleft())
        elif text == "(":
            result.append(token)
            opened.append((")", ")", []))
            due = []
        elif text in ("}", ")") and opened:
            while text == "}" and len(opened) > 1 and opened[-1][0] != "}":
                opened.pop()
            if opened[-1][0] != text:
                result.append(token)
                continue
            _, instead, due = opened.pop()
            if instead:
                result.append(token._replace(text=instead))
        elif due:
            command, *due = due
            sign = token if text in ("-", "+") and command in ("^", "_") and tokens else None
            if sign:
                token = tokens.popleft()
            takes_one = command in (r"\frac", r"\binom") or token.kind == "word"
            if takes_one and token.style != "text" and token.text.isalnum() and len(token.text) > 1:
                tokens.appendleft(token._replace(text=token.text[1:], glued=True))
                token = token._replace(text=token.text[0])
            write("sign", "{")
            result.extend([sign, token] if sign else [token])
            write("sign", "}")
        else:
            result.append(token)
            due = [text] * ARGUMENTS.get(text, 0)
        if [token.text for token in result[-4:]] == ["^", "{", r"\circ", "}"]:
            result[-4:] = [Token("word", "degrees", "text", False)]
    return result


def bare(tokens: list[Token]) -> list[Token]:
    """Without punctuation at the ends, and brackets around the whole that hold no list."""
    start, end = 0, len(tokens)
    for _ in range(10):
        while start < end and tokens[start].text in '*:"=#':
            start += 1
        while start < end and tokens[end - 1].text in '*:".,;':
            end -= 1
        inside = end - start > 2 and tokens[start].text == "(" and tokens[end - 1].text == ")"
        if not inside:
            return tokens[start:end]
        listed = read_list(tokens[start:end])
        if listed.opening != "(" or len(listed.items) > 1:
            return tokens[start:end]
        start, end = start + 1, end - 1
    return tokens[start:end]


def spelled(tokens: list[Token]) -> str:
    """Tokens as text to compare, without blanks but where they tell two tokens apart. 2 \\cdot x is
    2x. Capitals count, except in words: Yes = yes, x + Y is not x + y."""
    pieces = []
    before = None
    for i, token in enumerate(tokens):
        after = tokens[i + 1] if i + 1 < len(tokens) else None
        number_before = before is not None and before.kind == "number"
        if (token.text in ("*", r"\cdot") and number_before and after
                and (after.kind in ("word", "command") or after.text == "(")):
            continue
        if number_before and token.kind == "number" or (
                before and before.kind == "command" and token.kind == "word"):
            pieces.append(" ")
        pieces.append(token.text)
        before = token
    text = "".join(pieces)
    if all(folds(token) for token in tokens):
        text = text.casefold()
    return SIMPLE_FRACTION.sub(r"\1\2/\3", text).lstrip("+")


def folds(token: Token) -> bool:
    return (token.kind == "word" and (len(token.text) > 2 or token.text.casefold() == "no")
            or token.text in ",.;:!?'\"-")


# \frac{3\pi}{4} at the end of a term is 3\pi/4
SIMPLE_FRACTION = re.compile(
    r"(^|[-+=,(\[{])\\frac\{(-?(?:[^-+=,{}]|\\sqrt\{[^{}]*\})+)\}\{([^-+=,{}\s\\]|\d+|\\pi)\}"
    r"(?=$|[-+=,)\]}<>])")


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{…} or \fbox{…} whose braces close; \{ and \} are text. One
    pass over the text: a policy that has collapsed can open thousands of braces."""
    open_braces = []                       # where a box's content begins; None for other braces
    last_start = -1
    content = None
    for piece in re.finditer(r"\\f?box(?:ed)?\s*\{|\\.|[{}]", text, re.DOTALL):
        if piece[0] == "{" or len(piece[0]) > 2:
            open_braces.append(piece.end() if len(piece[0]) > 1 else None)
        elif piece[0] == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and start > last_start:
                last_start = start
                content = text[start:piece.start()]
    if content is None:
        bare = re.findall(r"\\boxed\s+([^\s{}$\\]+)", text)    # \boxed 18
        content = bare[-1] if bare else None
    return content


# ---- Brackets and lists --------------------------------------------------------------------------

OPENING = ("(", "[", "{", r"\{", r"\begin{pmatrix}")
CLOSING = (")", "]", "}", r"\}", r"\end{pmatrix}")
CONJUNCTIONS = ("or", "and")
SEPARATORS = (",", ";", r"\cup", *CONJUNCTIONS)


class List(NamedTuple):
    opening: str
    items: list[list[Token]]
    closing: str
    separators: set[str]


def outside_brackets(tokens: list[Token]) -> Iterator[tuple[int, str]]:
    """Place and text of the tokens that stand in no brackets, and of the brackets themselves."""
    depth = 0
    for i, token in enumerate(tokens):
        depth -= token.text in CLOSING
        if depth == 0:
            yield i, token.text
        depth += token.text in OPENING


def split(tokens: list[Token], separators: tuple[str, ...]) -> list[list[Token]]:
    """The parts between separators that stand in no brackets."""
    cuts = [i for i, text in outside_brackets(tokens) if text in separators]
    starts = [0] + [i + 1 for i in cuts]
    return [tokens[start:end] for start, end in zip(starts, cuts + [len(tokens)])]


def read_list(tokens: list[Token]) -> List:
    """The items between commas, semicolons, "and", "or" or ∪, and the brackets around them."""
    opening = closing = ""
    outer = [i for i, text in outside_brackets(tokens) if text in OPENING + CLOSING]
    if outer == [0, len(tokens) - 1] and len(tokens) > 1:
        opening, closing = tokens[0].text, tokens[-1].text
        tokens = tokens[1:-1]
    found = {text for _, text in outside_brackets(tokens) if text in SEPARATORS}
    items = [item for item in split(tokens, SEPARATORS) if item]
    return List(opening, items, closing, found)


# ---- Numbers -------------------------------------------------------------------------------------

class Number(NamedTuple):
    value: Fraction
    places: float          # decimal places; a fraction is as exact as one likes
    digits: int            # that count: of 0.0066, two
    currency: str          # what stands before it: dollars
    rest: list[Token]      # what follows it


# What a number looks like: # is a number, ± one that may have a sign, * a multiplication
SHAPES = [(shape.split(), value) for shape, value in (
    (r"# \frac { ± } { ± }", lambda whole, top, under: whole + top / under),
    (r"\frac { ± } { ± }", lambda top, under: top / under),
    ("# # / #", lambda whole, top, under: whole + top / under),
    ("# / ±", lambda top, under: top / under),
    ("# * 10 ^ { ± }", lambda number, power: number * ten_to(power)),
    ("10 ^ { ± }", lambda power: ten_to(power)),
    ("# !", lambda number: Fraction(factorial(number))),
    ("#", lambda number: number),
)]
TIMES = ("*", r"\cdot", r"\times", "x")
CURRENCIES = set("dollars euros pounds yen rupees USD US EUR GBP INR Rs".split())
MULTIPLES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
             "trillion": 10**12}
ORDINALS = ("st", "nd", "rd", "th")


def read_number(tokens: list[Token]) -> Number | None:
    """The number that an answer begins with: 18, 3/4, 5 1/2, 3e5, 2 million, 15th, 5!."""
    start = 0
    sign, currency = "", ""
    while start < len(tokens):
        text = tokens[start].text
        if text in ("+", "-") and not sign:
            sign = text
        elif text in CURRENCIES:
            currency = UNITS[text]
        elif not (text == r"\approx" and start == 0 or text == "." and currency == "rupee"):
            break
        start += 1
    for shape, value_of in SHAPES:
        values, end = match(tokens, start, shape)
        if values is None:
            continue
        try:
            value = value_of(*values)
        except (ZeroDivisionError, OverflowError):
            return None
        break
    else:
        return None
    places, digits = math.inf, 0
    if shape == ["#"]:
        whole, _, decimals = tokens[start].text.partition(".")
        places, digits = len(decimals), len((whole + decimals).lstrip("0"))
    if value.denominator == 1:
        end = after_ordinal(tokens, end)
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
            values.append(-Fraction(token.text) if minus else Fraction(token.text))
        elif not (token.text in TIMES if wanted == "*" else token.text == wanted):
            return None, at
        at += 1
    return values, at


def after_ordinal(tokens: list[Token], at: int) -> int:
    """Past the th of 15th and of 15^{th}."""
    texts = [token.text for token in tokens[at:at + 4]]
    if texts[:1] and texts[0] in ORDINALS and tokens[at].glued:
        return at + 1
    if texts[:2] == ["^", "{"] and texts[2:3] and texts[2] in ORDINALS and texts[3:] == ["}"]:
        return at + 4
    return at


def ten_to(power: Fraction) -> Fraction:
    if power.denominator != 1 or abs(power) > 999:
        raise OverflowError
    return Fraction(10) ** int(power)


def factorial(number: Fraction) -> int:
    if number.denominator != 1 or number > 999:
        raise OverflowError
    return math.factorial(int(number))


def equal_values(number: Number, reference: Number) -> bool:
    """Exactly; or, if the reference has six decimal places or more, to the last of them, or to the
    last of the response's if it has six or more itself."""
    if number.value == reference.value:
        return True
    if not 6 <= reference.places < math.inf or reference.digits < 4:
        return False
    compared = min(number.places, reference.places)
    difference = abs(number.value - reference.value)
    return compared >= 6 and 2 * difference * 10**compared <= 1


# ---- Units and talk ------------------------------------------------------------------------------

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
    second s sec secs seconds
    minute min mins minutes
    hour h hr hrs hours
    day days
    week wk wks weeks
    month months
    year yr yrs years
    degree deg degrees
    dollar dollars USD US
    cent cents
    euro euros EUR
    rupee rupees INR Rs
    erg ergs
    yen
    percent
    mph
    kmh kph
    unit units
    kWh
    GB
    MB""".strip().splitlines() for spelling in line.split()}
# Units only inside of \\text{…}: elsewhere they are variables.
PRODUCTS = ("mg", "mi", "ml", "mL", "in", "us", "US")
LETTER_UNITS = set("A C F J K N V W T Hz Pa kPa eV keV MeV GHz MHz kHz kJ kN kV kW mW MW mA".split())
# Words of two letters, or without a vowel. All others of these are products of variables (2 ab).
SHORT_WORDS = set("am an as at be by do go he if is it me my of oh on pm so th up us we cts hrs "
                  "pcs pts sq tbsp tsp TVs TV CDs CD DVDs".split())
CARDINALS = ("zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|"
             "fourteen|fifteen|sixteen|seventeen|eighteen|nineteen|hundred|thousand|dozen|gross|"
             "score|lakh|crore|mil")
# Words that make another number or another answer of it, wherever they follow it ...
CHANGES = re.compile(
    rf"(?:{CARDINALS})(?:e?s|ths?|fold)?"
    r"|(?:twent|thirt|fort|fift|sixt|sevent|eight|ninet)(?:y|ies|ieths?)"
    r"|(?:third|fif?th|eighth|nin(?:e)?th|twelfth|quarter)s?|hal(?:f|ves?|ved)|\w*illi(?:on|ard)(?:s|ths?)?"
    r"|twice|thrice|(?:doubl|tripl|quadrupl)(?:e[sd]?)|squared?|cubed?|times|plus|minus|negative"
    r"|divided|multiplied|below|under|above|over|than|least|most|mod|modulo|base|binary|octal"
    r"|hexadecimal|sin|cos|tan|cot|sec|csc|log|ln|exp|lim|gcd|lcm|alpha|beta|gamma|delta|epsilon"
    r"|theta|lambda|sigma|tau|phi|omega|or|nor|not|no|never|cannot|wrong|incorrect|false|wait"
    r"|actually|instead|rather|except|either|undefined", re.IGNORECASE)
# ... and words that do so if they follow at once.
CHANGES_AT_ONCE = set("and to root point power choose factorial".split())
TALK_SIGNS = ',.;:?()"—'


def unit_of(token: Token) -> str | None:
    """The unit that a word is a spelling of. mW is not MW, and ms is not m."""
    name = UNITS.get(token.text.casefold() if len(token.text) > 3 else token.text)
    if token.style == "text" and token.text in LETTER_UNITS:
        return token.text
    is_product = token.style == "math" and (len(token.text) == 1 or token.text in PRODUCTS)
    return None if is_product else name


def read_unit(tokens: list[Token]) -> tuple[str, int]:
    r"""The unit that a text begins with, in one spelling, and how many tokens it takes:
    meter^2 for m^2 and for square meters, meter/second for m/s."""
    unit = ""
    power = ""
    at = 0
    while at < len(tokens):
        text = tokens[at].text.lower()
        joins = {"/": "/", "per": "/", r"\cdot": ""}.get(text)
        if joins is not None and at + 1 < len(tokens) and unit and unit_of(tokens[at + 1]):
            unit += joins
        elif text in ("square", "sq", "cubic", "cu"):
            power = "^2" if text in ("square", "sq") else "^3"
        elif unit and text in ("squared", "cubed"):
            unit += "^2" if text == "squared" else "^3"
        elif unit and (shape := power_of(tokens, at)):
            unit += "^" + "".join(token.text for token in tokens[at + 2:at + shape - 1])
            at += shape - 1
        elif unit_of(tokens[at]):
            unit += unit_of(tokens[at]) + power
            power = ""
        else:
            break
        at += 1
    return unit, at if unit else 0


def power_of(tokens: list[Token], at: int) -> int:
    """How many tokens ^{2} or ^{-1} takes here; 0 if there is none."""
    for shape in (["^", "{", "#", "}"], ["^", "{", "-", "#", "}"]):
        if match(tokens, at, shape)[0] is not None:
            return len(shape)
    return 0


def is_talk(tokens: list[Token]) -> bool:
    """Whether it is words and units only, without digits, number words, operators or variables."""
    if tokens and tokens[0].text.lower() in CHANGES_AT_ONCE:
        return False
    at = 0
    while at < len(tokens):
        before = tokens[at - 1] if at else None
        after = tokens[at + 1] if at + 1 < len(tokens) else None
        _, length = read_unit(tokens[at:at + 12])
        if length > 1 or length == 1 and len(tokens[at].text) > 1:
            at += length
        elif tokens[at].kind == "word":
            if not is_word(tokens[at], before, after):
                return False
            at += 1
        elif tokens[at].text in TALK_SIGNS or tokens[at].text == "!" and tokens[at].style != "math":
            at += 1
        elif tokens[at].text in ("/", r"\cdot", r"\mu") and after and is_unit_word(after):
            at += 1
        elif before and before.style == "text" and power_of(tokens, at):
            at += power_of(tokens, at)
        else:
            return False
    return True


def is_unit_word(token: Token) -> bool:
    """Whether a word can stand after a stroke: day, person."""
    is_prose = token.style == "text" or token.style == "prose" and len(token.text) > 3
    return bool(unit_of(token)) or is_prose and token.text.isalpha() and len(token.text) > 1


def is_word(token: Token, before: Token | None, after: Token | None) -> bool:
    """A word of a language, and not a product of variables (ab, xyz) or a change of a number."""
    word = token.text
    parts = [part for part in re.split("['-]", word) if len(part) > 1]
    if len(word) == 1:
        if before and before.text == "degrees" and word in "CFK":
            return True
        if word in "aAI":
            return after is not None and after.kind == "word" and len(after.text) > 2
        ends = after is None or after.text in TALK_SIGNS or after.text == "/"
        return token.style != "math" and unit_of(token) is not None and ends
    if word == "times":    # 18 times
        return after is None or after.text in TALK_SIGNS
    if not parts or any(CHANGES.fullmatch(part) for part in parts) or word.lower().endswith("n't"):
        return False
    if word in SHORT_WORDS or word.lower() in SHORT_WORDS or unit_of(token):
        return True
    longest = max(parts, key=len).lower()
    if set(longest) <= set("abc") or set(longest) <= set("xyz") or not set(longest) & set("aeiouy"):
        return False
    return len(longest) > (3 if token.style == "math" else 2)


# ---- What may follow a number --------------------------------------------------------------------

def leaves_it(number: Number) -> bool:
    """Whether what follows a number leaves it as it is: a unit or talk (rule 6), a sum that comes
    to it (rule 8), and sentences without any other number."""
    rest = number.rest
    glued = rest and rest[0].kind == "word" and rest[0].glued
    if glued and not (len(rest[0].text) > 1 and unit_of(rest[0]) or rest[0].text in ("am", "pm")):
        return False
    first, *later = sentences(rest)
    return agrees(first, number, False) and all(agrees(each, number, True) for each in later)


def sentences(tokens: list[Token]) -> Iterator[list[Token]]:
    start = 0
    for i, token in enumerate(tokens[:-1]):
        after = tokens[i + 1]
        if token.text in ".!?" and token.style != "math" and not after.glued and (
                after.text[0].isupper() or after.kind != "word"):
            yield tokens[start:i]
            start = i + 1
    yield tokens[start:]


def agrees(sentence: list[Token], number: Number, may_repeat_it: bool) -> bool:
    """Whether a sentence is talk, with sums that come to the number, and perhaps the number."""
    talk = []
    arithmetic = []
    at = 0
    while at <= len(sentence):
        if at < len(sentence) and sentence[at].kind == "number" or (
                at < len(sentence) and sentence[at].text in ARITHMETIC):
            arithmetic.append(sentence[at])
            at += 1
            continue
        if any(token.kind == "number" for token in arithmetic):
            is_sum_of_it = any(token.text == "=" for token in arithmetic[1:])
            if not (is_sum_of_it or may_repeat_it) or not names_number(
                    bare(arithmetic), lambda side: side.value == number.value):
                return False
        else:
            talk += arithmetic
        arithmetic = []
        _, length = read_unit(sentence[at:at + 12])
        talk += sentence[at:at + max(length, 1)]
        at += max(length, 1)
    return is_talk(talk)


OPERATORS = ("+", "-", "*", "/", "^", r"\times", r"\cdot", r"\div", "x")
ARITHMETIC = {*OPERATORS, *"=()[]{},.:!", r"\frac", r"\sqrt", "dollars", "percent"}


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
    """Whether it is numbers with operators between them, and perhaps units: (9 + 9) * 2 apples.
    Nothing is computed."""
    depth = operators = at = 0
    wants_number = True
    while at < len(tokens):
        text = tokens[at].text
        end = at + 1
        if text in ("(", "{"):
            depth += 1
            wants_number = True
        elif text in (")", "}") and depth and not wants_number:
            depth -= 1
        elif text in OPERATORS and not wants_number:
            operators += 1
            wants_number = True
        elif wants_number and text in (r"\frac", r"\sqrt"):
            operators += 1
        elif wants_number and tokens[at].kind == "number":
            wants_number = False
        elif text not in ("dollars", "percent") and (wants_number or not is_talk(tokens[at:end])):
            return False
        at = end
    return operators > 0 and depth == 0 and not wants_number


# ---- Names and choices ---------------------------------------------------------------------------

# x, x_{1}, \theta, f', f(x), f(3,4), P(A), E[X], AB, \angle ABC, |AB|, (x,y); or words
LETTER = (r"(?:[A-Za-z]|\\(?:alpha|beta|gamma|delta|varepsilon|epsilon|theta|lambda|mu|rho|sigma"
          r"|tau|phi|varphi|omega|ell|Delta|Theta|Phi|Omega))(?:'|_\{[^{}]*\})*")
ARGUMENT = rf"(?:{LETTER}|\d+)"
NAME = re.compile(
    rf"{LETTER}(?:(?:\^\{{-1\}})?[(\[]{ARGUMENT}(?:(?:,|\\cap |\\cup |\|){ARGUMENT})*[)\]])?"
    rf"|\({LETTER}(?:,{LETTER})+\)"
    r"|(?:m)?(?:\\angle |\\triangle )?[A-Z]{1,4}|\|[A-Z]{2}\||\[[A-Z]{3,4}\]"
    r"|\\(?:overline|bar|vec|hat)\{(?:[A-Z]{2}|[A-Za-z])\}")


def split_name(tokens: list[Token]) -> tuple[str, list[Token]]:
    """(name, the rest) of x = 5, f(x) = 5, 5 = x, x \\in [0,1] and Total = 5; else ("", all)."""
    sides = split(tokens, ("=", r"\in"))
    if len(sides) == 2:
        left, right = sides
        if is_name(left):
            return spelled(left), right
        if is_name(right) and any(token.text == "=" for token in tokens):
            return spelled(right), left
    return "", tokens


def is_name(tokens: list[Token]) -> bool:
    in_words = tokens and all(token.kind == "word" for token in tokens) and is_talk(tokens)
    return bool(NAME.fullmatch(spelled(tokens)) or in_words and len(tokens[0].text) > 2)


def letter_of_choice(tokens: list[Token]) -> str | None:
    """B of B, (B), option B, B) 15 and B: a cat; None of (A) or (B)."""
    if tokens and tokens[0].text.lower() in ("option", "choice"):
        tokens = tokens[1:]
    if tokens and tokens[0].text == "(":
        tokens = tokens[1:]
    if [token.text for token in tokens] in (["a"], ["b"], ["c"], ["d"], ["e"]):
        return tokens[0].text.upper()
    if not tokens or not re.fullmatch("[A-Z]", tokens[0].text):
        return None
    rest = tokens[1:]
    if rest and rest[0].text not in (")", ".", ":"):
        return None
    for token, after in zip(rest, [*rest[1:], None]):
        another = re.fullmatch("[A-Z]", token.text) and (after is None or after.text in (")", ".", ":"))
        changes = token.kind == "word" and (token.text == "and" or CHANGES.fullmatch(token.text))
        if another or changes:
            return None
    return tokens[0].text
