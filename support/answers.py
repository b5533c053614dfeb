r"""How answers are written: their dress, numbers, units, names and lists. grader.py compares them.

This is the small print of its rules. It imports nothing of ours.
"""
from __future__ import annotations

import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple


# ---- Dress: what changes how an answer looks, and not what it says -------------------------------

LETTERS = {
    "−": "-", "–": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "π": r"\pi ",
    "∞": r"\infty ", "√": r"\sqrt ", "°": r"^{\circ}", "²": "^{2}", "³": "^{3}", "≤": r"\leq ",
    "≥": r"\geq ", "≠": r"\neq ", "≈": r"\approx ", "∈": r"\in ", "∪": r"\cup ", "½": " 1/2",
    "¼": " 1/4", "¾": " 3/4", "€": " ", "£": " ", "¥": " ", "₹": " ", "“": '"', "”": '"',
}
BRACES = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
FONTS = (r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|bb|it|sf|tt)|[mh]box|bm|boldsymbol|"
         r"operatorname\*?)\s*" + BRACES)
DRESS = [(re.compile(pattern), instead) for pattern, instead in (
    (FONTS, r" \1 "),
    (FONTS, r" \1 "),                                               # a font inside a font
    (r"\{,\}", ","),                                                # 1{,}080
    (r"\\\\\s*", r"\\\\"),                                          # rows of a matrix
    (r"\\(?:left|right)\s*\.", " "),
    (r"\\(?:left|right|[bB]igg?[lrm]?|(?:display|text)style|bf|rm|it)(?![A-Za-z])", " "),
    (r"(?<!\\)\\[!,]", ""),                                         # 10,\!000 and 10\,000
    (r"(?<!\\)\\[;: ()\[\]]|~|\\q?quad(?![A-Za-z])", " "),
    (r"\\?\$|\\?%|\*\*|`", " "),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\frac\s*(\d)\s*(?=[\d{])", r"\\frac{\1}"),                  # \frac43, \frac4{31}
    (r"\\frac\s*(\{[^{}]*\})\s*(\d)(?!\d)", r"\\frac\1{\2}"),       # \frac{43}1
    (r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\sqrt\s*(\d+|(?<=\s)[A-Za-z](?![A-Za-z]))", r"\\sqrt{\1}"),
    (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
    (r"\\not\s*=|\\neq?(?![A-Za-z])|(?<!\d)!=", r"\\neq "),
    (r"\\l(?:eq?|eqslant)(?![A-Za-z])|<=", r"\\leq "),
    (r"\\g(?:eq?|eqslant)(?![A-Za-z])|>=", r"\\geq "),
    (r"=>|\\implies", r"\\Rightarrow "),
    (r":=|==", "="),
    (r"\s*([\^_])\s*", r"\1"),
    (r"([\^_])(-?\d+|[A-Za-z]|\\circ)", r"\1{\2}"),                 # x^2 is x^{2}
    (r"(?<![A-Za-z])(?:USD?|EUR|GBP|INR|Rs\.?)\s*(?=-?\.?\d)", ""),
)]


def undressed(text: str) -> str:
    """The answer without its box, fonts, LaTeX spaces, $, %, stars and final period, and with one
    spelling for what LaTeX can spell in several ways."""
    boxed = last_boxed(text) if "box" in text else None
    if boxed is not None:
        text = boxed
    text = "".join(LETTERS.get(letter, letter) for letter in text)
    for pattern, instead in DRESS:
        text = pattern.sub(instead, text)
    text = " ".join(text.split()).strip('" ').lstrip("*: ").rstrip("*.:;, ")
    text = re.sub(r"^-\s+(?=[\d.\\])", "-", text)    # - 7
    inside = in_brackets(text)
    if inside and inside.opening in "{(" and len(read_list(text).items) == 1:
        return undressed(inside.text)                # {18}, (18), (A)
    return text


def as_text(text: str) -> str:
    """Undressed text to compare with another: without blanks, except between digits. Capitals count
    only beside digits and signs: Yes = yes, x + Y is not x + y."""
    if not re.search(r"[\\^_+=/*{}<>|-]|\d[^\W\d]|[^\W\d]\d", text):
        text = text.casefold()
    return re.sub(r"(?<!\d) | (?!\d)", "", text.lstrip("+"))


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


# ---- Numbers -------------------------------------------------------------------------------------

# Commas and blanks group thousands (1,080 and 10 000); 1,2 is a list.
DIGITS = (r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?!\d)|\d+)"
          r"(?:\.\d+|\.(?=/))?|\.\d+)")
TIMES = r"(?:\\times|\\cdot|\*|x)"
EXPONENT = r"\s*" + TIMES + r"\s*10\^\{[+-]?\d{1,3}\}|[eE][+-]?\d{1,3}(?!\d)"
SIGNED = rf"[+-]?\s*(?:10\^\{{[+-]?\d{{1,3}}\}}|{DIGITS}(?:{EXPONENT})?)"
NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*(?:\\approx\s*)?"
    r"(?:(?P<whole>\d+)(?:\s+(?=\d{1,2}\s*/\s*\d)|\s*(?=\\frac)))?"              # 5 1/2
    rf"(?:\\frac\{{\s*(?P<over>{SIGNED})\s*\}}\{{\s*(?P<under>{SIGNED})\s*\}}"
    rf"|(?P<top>{SIGNED})(?:\s*/\s*(?P<bottom>{SIGNED}))?)")
MULTIPLES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
             "trillion": 10**12}
MULTIPLE = re.compile(rf"(?:\s+(?:{'|'.join(MULTIPLES)})s?\b)*", re.IGNORECASE)
ORDINAL = re.compile(r"(?:st|nd|rd|th)\b|\^\{\s*(?:st|nd|rd|th)\s*\}")
LONGEST_NUMBER = 1000  # characters


class Number(NamedTuple):
    value: Fraction
    written: str
    rest: str         # what follows it in the text


def read_number(text: str) -> Number | None:
    """The number that a text begins with: 18, 3/4, 5 1/2, 3e5, 2 million, 15th, 5!."""
    factorial = re.match(r"(\d{1,2})!", text)
    found = factorial or NUMBER.match(text)
    if not found or len(found[0]) > LONGEST_NUMBER:
        return None
    rest = text[found.end():]
    if factorial:
        return Number(Fraction(math.factorial(int(found[1]))), found[0], rest)
    over = exact(found["over"] or found["top"])
    under = exact(found["under"] or found["bottom"] or "1")
    if not under:
        return None
    value = exact(found["whole"] or "0") + over / under
    if found["sign"] == "-":
        value = -value
    ordinal = ORDINAL.match(rest)
    if ordinal and value.denominator == 1:
        rest = rest[ordinal.end():]
    multiples = MULTIPLE.match(rest)[0]
    for word in multiples.lower().split():
        value *= MULTIPLES[word.rstrip("s")]
    return Number(value, found[0], rest[len(multiples):])


def exact(text: str) -> Fraction:
    """The value of digits with a sign, or with a power of ten."""
    text = re.sub(r"[,\s]", "", text)
    text = re.sub(rf"{TIMES}10\^\{{(.*)\}}", r"e\1", text)
    return Fraction(re.sub(r"10\^\{(.*)\}", r"1e\1", text))


def equal_values(number: Number, reference: Number) -> bool:
    """Exactly; or, if the reference has six decimal places or more, to the last of them, or to the
    last of the response's if it has six or more itself."""
    if number.value == reference.value:
        return True
    digits = re.sub(r"\D", "", reference.written).lstrip("0")
    if not 6 <= places(reference) < math.inf or len(digits) < 4:
        return False
    compared = min(places(number), places(reference))
    difference = abs(number.value - reference.value)
    return compared >= 6 and 2 * difference * 10**compared <= 1


def places(number: Number) -> float:
    """Decimal places, as written; a fraction is as exact as one likes."""
    decimal = re.fullmatch(r"[+-]?\s*[\d,]*(?:\.(\d+))?", number.written)
    return len((decimal[1] or "").rstrip("0")) if decimal else math.inf


# ---- What may follow a number --------------------------------------------------------------------

def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that change a number wherever they follow it ...
CHANGES = words("""
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety dozen
    dozens tens hundred hundreds thousand thousands million millions billion billions trillion
    trillions lakh lakhs crore crores half halves third thirds quarter quarters fourth fourths
    fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths twelfth twelfths
    hundredth hundredths thousandth thousandths twice thrice double triple plus minus negative
    divided multiplied below under than or sin cos tan cot csc log exp lim mod gcd lcm sqrt alpha
    beta gamma delta epsilon theta lambda sigma tau phi omega""")
# ... and words that change it if they follow at once.
CHANGES_AT_ONCE = words("and to over squared cubed factorial choose times root point power")
# Two letters, or letters without a vowel, are a product (2 ab), unless they are one of these.
SHORT_WORDS = words("""
    am an as at be by cm do ea ft go gb he hr if in is it kb kg km lb mb me mg mi ml mm mv my no nm
    of oh oz pm sq so th up us we yd cts hrs kmh kph kwh lbs mph pcs pts tbsp tsp yds""")
GLUED_UNITS = ("cm|mm|km|dm|nm|kg|mg|mL|ml|lbs?|oz|ft|yd|mi|mph|kph|hrs?|mins?|secs?|kWh|GB|MB"
               "|am|pm|AM|PM")
AFTER_NUMBER = re.compile(
    rf"$|[.,;:!)]+(?:\s|$)|\s|—|/[A-Za-z]{{2}}|\^\{{\\circ\}}|(?:{GLUED_UNITS})(?![A-Za-z])")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z(\"])")
ARITHMETIC = re.compile(
    r"(?:[\d\s.,+*/()^{}!-]|(?<=\d) ?x ?(?=\d)|\\times|\\cdot|\\div|÷|\\frac)+")


def leaves_it(number: Number) -> bool:
    """Whether what follows a number leaves it as it is: a unit or talk (rule 6), a sum that comes
    to it (rule 8), or sentences without any other number."""
    if not AFTER_NUMBER.match(number.rest):
        return False
    first, *later = SENTENCE_END.split(number.rest)
    for digits in re.findall(DIGITS, " ".join(later)):
        if exact(digits) != number.value:
            return False
    if is_talk(first):
        return True
    before, equals, last = first.rpartition("=")
    total = read_number(last.strip())
    if not equals or total is None or total.value != number.value:
        return False
    before = ARITHMETIC.sub(without_sum, before)
    return is_talk(before) and is_talk(total.rest)


def without_sum(found: re.Match) -> str:
    return " " if re.search(r"\d.*(?:[-+*/x÷]|\\times|\\cdot|\\div).*\d", found[0]) else found[0]


def is_talk(text: str) -> bool:
    """Whether it has no digits, number words, operators or variables. A unit may have a power
    (cm^{2}) or a stroke (m/s)."""
    text = re.sub(r"\^\{\\circ\}\s*[CFK]?(?![A-Za-z])|\\mu(?=\s*[mgsl]\b)", " degrees ", text)
    text = text.removeprefix("/").replace(r"\cdot", " ")
    text = re.sub(r"(?<=[A-Za-z}]) ?/ ?(?=[A-Za-z])", "/", text)
    text = re.sub(r"\btimes(?=[\s.]*$)", "", text)    # 18 times
    text = re.sub(r"(?<=[^\W\d_])\^\{-?\d\}", "^", text)
    # One letter is a unit at the end, beside a stroke or under a power; elsewhere a variable.
    text = re.sub(r"(?<!\w)[mgshlL](?=\^|/|[\s.,;:!)]*$)|(?<=/)[mgshlL](?!\w)", "unit", text)
    text = re.sub(r"(?<!\w)(?:a|A|I)(?=\s+[^\W\d_]{2})", "", text.replace("^", ""))
    if re.search(r"[\d+*=<>_|\\{}[\]]|(?<!\w)[-/]|[-/](?!\w)", text):
        return False
    found = re.findall(r"[^\W\d_]+", text.casefold())
    if found and found[0] in CHANGES_AT_ONCE:
        return False
    return all(is_word(word) for word in found)


def is_word(word: str) -> bool:
    """A word of a language, and not a product of variables (ab, xyz) or a change of a number."""
    if len(word) < 3 or not set(word) & set("aeiouy") or set(word) <= set("abc"):
        return word in SHORT_WORDS
    return word not in CHANGES and not set(word) <= set("xyz")


def is_unit(number: Number) -> bool:
    return bool(AFTER_NUMBER.match(number.rest)) and is_talk(number.rest)


def unit(number: Number) -> str:
    return re.sub(r"[\s().]", "", number.rest.replace(r"^{\circ}", "degree")).casefold().rstrip("s")


# ---- Names and choices ---------------------------------------------------------------------------

# x, x_{1}, \theta, f', f(x), f(3,4), AB, \angle ABC, (x,y); or words, which split_name looks at
LETTER = (r"(?:[A-Za-z]|\\(?:alpha|beta|gamma|delta|varepsilon|epsilon|theta|lambda|mu|rho|sigma"
          r"|tau|phi|varphi|omega|ell|Delta|Theta|Phi|Omega))(?:'|_\{[^{}]*\})*")
NAME = re.compile(
    rf"{LETTER}(?:(?:\^\{{-1\}})?\s*\(\s*(?:{LETTER}|\d+)(?:\s*,\s*(?:{LETTER}|\d+))*\s*\))?"
    rf"|\(\s*{LETTER}(?:\s*,\s*{LETTER})+\s*\)"
    r"|(?:m\s*)?(?:\\angle\s*)?[A-Z]{1,4}|\\overline\{[A-Z]{2}\}")


def split_name(text: str) -> tuple[str, str]:
    """(name, the rest) of x = 5, f(x) = 5, 5 = x, x \\in [0,1] and Total = 5; else ("", text)."""
    sides = re.split(r"=|\\in(?![A-Za-z])", text)
    if len(sides) != 2:
        return "", text
    left, right = (side.strip() for side in sides)
    if is_name(left):
        return left, right
    if is_name(right) and "=" in text:
        return right, left
    return "", text


def is_name(text: str) -> bool:
    in_words = re.match(r"[^\W\d_]{3}", text) and is_talk(text)
    return bool(NAME.fullmatch(text) or in_words)


def letter_of_choice(answer: str) -> str | None:
    """B of (B), B) 15 and B: a cat; None of (A) or (B)."""
    choice = re.match(r"\(?([A-Z])(?:\)|[.:](?=\s)|$)", answer)
    if not choice or re.search(r"\b[A-Z][).:]|\b[A-Z]$|\b(?:or|and)\b", answer[choice.end():]):
        return None
    return choice[1]


# ---- Lists ---------------------------------------------------------------------------------------

class Bracketed(NamedTuple):
    opening: str
    text: str
    closing: str


class List(NamedTuple):
    opening: str
    items: list[str]
    closing: str
    ordered: bool


PIECE = re.compile(r"\\[{}]|[()\[\]{}]|[,;]|\\cup(?![A-Za-z])|\b(?:or|and)\b|\\lor(?![A-Za-z])")


def depths(text: str) -> Iterator[tuple[re.Match, int]]:
    """Each bracket and separator, with the depth of brackets it stands at."""
    depth = 0
    for piece in PIECE.finditer(text):
        closes = piece[0][-1] in ")]}"
        depth -= closes
        yield piece, depth
        depth += piece[0][-1] in "([{"


def in_brackets(text: str) -> Bracketed | None:
    """What stands between the brackets around the whole text, if it is in brackets."""
    pieces = [piece for piece, depth in depths(text) if depth == 0 and piece[0][-1] in "([{)]}"]
    if len(pieces) != 2 or pieces[0].start() or pieces[1].end() != len(text):
        return None
    return Bracketed(pieces[0][0], text[pieces[0].end():pieces[1].start()], pieces[1][0])


def read_list(text: str) -> List:
    """The items between commas, semicolons, "and", "or" or ∪."""
    around = in_brackets(text)
    opening, inside, closing = around or Bracketed("", text, "")
    items = []
    start = 0
    ordered = opening != r"\{"
    for piece, depth in depths(inside):
        if depth or piece[0][-1] in "([{)]}" or groups_thousands(piece, inside, opening):
            continue
        ordered = ordered and piece[0] in (",", ";", "and")
        items.append(inside[start:piece.start()].strip())
        start = piece.end()
    items.append(inside[start:].strip())
    return List(opening, [item for item in items if item], closing, ordered)


def groups_thousands(piece: re.Match, text: str, opening: str) -> bool:
    """Whether a comma is part of a number. In brackets it never is: (1,200) is a pair."""
    if piece[0] != "," or opening:
        return False
    before, after = text[:piece.start()], text[piece.end():]
    return before[-1:].isdigit() and bool(re.match(r"\d{3}(?!\d)", after))
