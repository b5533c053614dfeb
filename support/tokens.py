r"""An answer as tokens, each in one spelling: \dfrac43, \frac{4}3 and \frac{4}{3} become the same.

    read_tokens(text) -> list of Token      without fonts, dress and punctuation at the ends
    spelled(tokens) -> text                 to compare with another
    read_list(tokens) -> List               its items

The tokens are what grader.py compares. Every step here takes one pass over the text: a policy that
has collapsed can write one bracket ten thousand times.
"""
from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple


class Token(NamedTuple):
    kind: str      # number, word, command or sign
    text: str      # in one spelling: 1080 for 1,080, and \frac for \dfrac
    style: str     # prose; math, where letters are variables; or text, inside of \text{…}
    glued: bool    # nothing stands between it and the token before


# ---- Spellings -----------------------------------------------------------------------------------

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-")
GREEK = """alpha beta gamma delta epsilon eta theta lambda mu nu xi pi rho sigma tau phi psi omega
    Gamma Delta Theta Sigma Phi Omega""".split()
FUNCTIONS = "sin cos tan cot csc log ln exp".split()
LETTERS = str.maketrans({
    "−": "-", "–": "-", "‐": "-", "‑": "-", "“": '"', "”": '"', "’": "'", "\u00a0": " ",
    "\u202f": " ", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*", "÷": r"\div ",
    "±": r"\pm ", "∓": r"\mp ", "√": r"\sqrt ", "°": r"^{\circ}", "∞": r"\infty ", "≤": r"\leq ",
    "⩽": r"\leq ", "≥": r"\geq ", "⩾": r"\geq ", "≠": r"\neq ", "≈": r"\approx ", "∈": r"\in ",
    "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "→": r"\rightarrow ",
    "⇒": r"\Rightarrow ", "¢": " cents",
    **{letter: rf"\{name} " for letter, name in zip("αβγδεηθλμνξπρστφψωΓΔΘΣΦΩ", GREEK)},
    **{letter: rf" \frac{{{top}}}{{{under}}}" for letter, top, under in zip(
        "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "112131234115357", "233445555668888")},
})
SPELLINGS = {
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\dbinom": r"\binom",
    r"\le": r"\leq", r"\leqslant": r"\leq", "<=": r"\leq", r"\lt": "<",
    r"\ge": r"\geq", r"\geqslant": r"\geq", ">=": r"\geq", r"\gt": ">",
    r"\ne": r"\neq", "!=": r"\neq", "=/=": r"\neq", r"\not=": r"\neq",
    r"\implies": r"\Rightarrow", "=>": r"\Rightarrow", r"\to": r"\rightarrow",
    r"\varepsilon": r"\epsilon", r"\varphi": r"\phi",
    "==": "=", ":=": "=", r"\ast": "*", r"\colon": ":", r"\varnothing": r"\emptyset",
    r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lbrack": "[", r"\rbrack": "]",
    r"\lvert": "|", r"\rvert": "|", r"\vert": "|", r"\mid": "|",
    r"\lor": "or", r"\land": "and", "pi": r"\pi", "sqrt": r"\sqrt", "infinity": r"\infty",
    **{name: rf"\{name}" for name in FUNCTIONS},
    r"\begin{bmatrix}": r"\begin{pmatrix}", r"\end{bmatrix}": r"\end{pmatrix}",
    r"\degree": "degrees", r"\%": "percent", "%": "percent",
    r"\$": "dollars", "€": "euros", "£": "pounds", "¥": "yen", "₹": "rupees",
}
SKIPPED = {"\\ ", "\\\n", "\ufe0f"} | set(r"""
    \left \right \left. \right. \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \biggl \biggr \bf \rm
    \it \displaystyle \textstyle \limits \quad \qquad \, \! \; \: ~ ` **""".split())
OPEN_MATH, CLOSE_MATH = (r"\(", r"\["), (r"\)", r"\]")
WORD_FONTS = set(r"""
    \text \textrm \textnormal \mathrm \mbox \hbox \operatorname \operatorname*""".split())
BOXES = {r"\boxed", r"\fbox"}
FONTS = WORD_FONTS | BOXES | set(r"""
    \textbf \textit \textsf \texttt \mathbf \mathbb \mathit \mathsf \mathtt \bm
    \boldsymbol""".split())

# Commas, blanks and LaTeX's thin spaces group thousands; 1,2 and 1, 200 are lists.
THOUSANDS = (r"[0-9]{1,3}(?P<comma>,|\{,\}|,?\\!|\\,|[ ])[0-9]{3}(?:(?P=comma)[0-9]{3})*"
             r"(?![0-9])")
DECIMALS = r"(?:\.[0-9]+|\.(?=\s*/))?(?:[eE][+-]?[0-9]{1,3}(?![0-9A-Za-z]))?"
PIECE = re.compile(rf"""
      (?P<number>(?:{THOUSANDS}|[0-9]+){DECIMALS}|\.[0-9]+)
    | (?P<word>[^\W\d_]+(?:['-][^\W\d_]+)*)
    | (?P<command>\\(?:begin|end)\s*\{{[^{{}}]{{0,20}}\}}|\\(?:left|right)\s*\.|\\not\s*=
        |\\operatorname\*|\\[A-Za-z]+|\\.)
    | (?P<sign>\*\*|\$\$|[!<>:=]=|=>|=/=|\S)""", re.VERBOSE | re.DOTALL)
PLAIN_NUMBER = re.compile(rf"(?P<number>[0-9]+{DECIMALS})")
BRACE = re.compile(r"\s*\{")


def read_tokens(text: str, in_math: bool = False) -> list[Token]:
    """An answer's tokens. in_math: it stood in a box, where letters are variables."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: f"^{{{m[0].translate(SUPERSCRIPTS)}}}", text)
    text = re.sub("[₀-₉₊₋]+", lambda m: f"_{{{m[0].translate(SUBSCRIPTS)}}}", text)
    text = re.sub(r"(?<=[\w)])\*\*(?=[\w(])", "^", text.translate(LETTERS))    # x**2
    text = re.sub(    # 6 p.m., 6 PM
        r"(?<=\d)(\s*(?:\\text\{\s*)?)([ap])(?:\.m\b\.?|m\b)", lambda m: f"{m[1]}{m[2].lower()}m",
        text, flags=re.IGNORECASE)
    text = re.sub(r"\bper cent\b", "percent", text)
    if text.replace("$$", "").replace(r"\$", "").count("$") == 1:
        text = text.replace("$", r"\$")    # alone it is no bracket of formulas, but a currency
    return bare(with_braces(pieces(text, in_math)))


def pieces(text: str, in_math: bool) -> list[Token]:
    """The tokens as they stand there, but for fonts and dress."""
    tokens = []
    outside = "math" if in_math else "prose"
    style = outside
    styles = []     # for each open brace: the style to return to if a font opened it, else None
    depth = 0       # of brackets, where no comma groups thousands: (1,200) is a pair
    end = 0         # of the last token
    piece = PIECE.search(text)
    while piece:
        if piece["comma"] == "," and depth > 0:
            piece = PLAIN_NUMBER.match(text, piece.start())
        at = piece.end()
        written = piece[0] if len(piece[0]) < 3 else "".join(piece[0].split())
        brace = BRACE.match(text, at) if written in FONTS else None
        closes_font = written == "}" and styles and styles[-1] is not None
        if brace:
            at = brace.end()
            styles.append(style)
            if written in WORD_FONTS:
                style = "text"
            elif written in BOXES:
                style = "math"
        elif closes_font:
            style = styles.pop()
        elif written in OPEN_MATH:
            style = "math"
        elif written in CLOSE_MATH:
            style = outside
        elif written in ("$", "$$"):
            style = "math" if style == outside else outside
        elif written not in SKIPPED and written not in FONTS and not is_emoji(written):
            if written == "{":
                styles.append(None)
            elif written == "}" and styles:
                styles.pop()
            token = Token(*one_spelling(piece.lastgroup, written), style, piece.start() == end)
            tokens.append(token)
            depth += token.text in ("(", "[", r"\{")
            depth -= token.text in (")", "]", r"\}") and depth > 0
            end = at
        piece = PIECE.search(text, at)
    return tokens


def is_emoji(sign: str) -> bool:
    """18 ✅, but not what takes it back."""
    is_symbol = len(sign) == 1 and sign >= "\u2700" and unicodedata.category(sign) == "So"
    return is_symbol and sign not in "✗✘❌❎"


def one_spelling(kind: str, written: str) -> tuple[str, str]:
    """Kind and text of a token: 1080.5 for 1,080.50, and 7 for 007."""
    text = SPELLINGS.get(written, written)
    if text != written:
        kind = "word" if text.isalpha() else ("command" if text[0] == "\\" else "sign")
    if kind != "number":
        return kind, text
    digits, e, exponent = re.sub(r"[^0-9.eE+-]", "", text).lower().partition("e")
    whole, _, decimals = digits.partition(".")
    decimals = decimals.rstrip("0")
    plain = whole.lstrip("0") or "0"
    return kind, plain + ("." + decimals if decimals else "") + e + exponent


# How many arguments follow. Without braces an argument is one digit, letter or command; but a power
# or an index takes the whole number (x^12), as people mean it outside of LaTeX.
ARGUMENTS = {r"\frac": 2, r"\binom": 2, r"\sqrt": 1, r"\overline": 1, r"\bar": 1, r"\vec": 1,
             r"\hat": 1, "^": 1, "_": 1}


class Open(NamedTuple):
    """A bracket that is open."""
    closing: str     # what closes it
    written: str     # what to write for that
    due: list[str]   # the commands that wait for an argument afterwards


def with_braces(tokens: list[Token]) -> list[Token]:
    r"""Braces around every argument, and nowhere else: x^2 becomes x^{2}, sqrt(3) \sqrt{3}, and
    {18} 18. And 90^\circ becomes 90 degrees."""
    tokens = deque(tokens)
    result = []
    opened = []
    due = []
    while tokens:
        token = tokens.popleft()
        text = token.text
        if text in ("{", "("):
            is_argument = due and (text == "{" or due[0] in (r"\sqrt", "^"))
            closing = "}" if text == "{" else ")"
            if is_argument:
                result.append(token._replace(text="{"))
                opened.append(Open(closing, "}", due[1:]))
            else:
                result += [token] if text == "(" else []
                opened.append(Open(closing, ")" if text == "(" else "", []))
            due = []
        elif text in ("}", ")"):
            while text == "}" and len(opened) > 1 and opened[-1].closing != "}":
                opened.pop()    # [0,1) may stand in braces
            if not opened or opened[-1].closing != text:
                result.append(token)
                continue
            closed = opened.pop()
            result += [token._replace(text=closed.written)] if closed.written else []
            due = closed.due
        elif text == "[" and due and due[0] == r"\sqrt":    # \sqrt[3]{x}
            while tokens and token.text != "]":
                result.append(token)
                token = tokens.popleft()
            result.append(token)
        elif due:
            result += argument(token, tokens, due[0])
            due = due[1:]
        else:
            result.append(token)
            due = [text] * ARGUMENTS.get(text, 0)
        if [token.text for token in result[-4:]] == ["^", "{", r"\circ", "}"]:
            result[-4:] = [Token("word", "degrees", "text", False)]
    return result


def argument(token: Token, rest: deque[Token], command: str) -> list[Token]:
    """One argument in braces; what it leaves of its first token goes back to the rest."""
    taken = []
    if token.text in ("-", "+") and command in ("^", "_") and rest:    # x^-2
        taken.append(token)
        token = rest.popleft()
    is_digits = command in (r"\frac", r"\binom") and token.text.isdecimal()
    if (is_digits or token.kind == "word") and token.style != "text" and len(token.text) > 1:
        rest.appendleft(token._replace(text=token.text[1:], glued=True))
        token = token._replace(text=token.text[0])
    brace = Token("sign", "{", "math", True)
    return [brace, *taken, token, brace._replace(text="}")]


def bare(tokens: list[Token]) -> list[Token]:
    """Without punctuation at the ends, and brackets around the whole that hold no list."""
    start, end = 0, len(tokens)
    for _ in range(10):
        while start < end and tokens[start].text in '*:"=#':
            start += 1
        while start < end and tokens[end - 1].text in '*:".,;':
            end -= 1
        if end - start < 3 or tokens[start].text != "(":
            break
        listed = read_list(tokens[start:end])
        if listed.opening + listed.closing != "()" or len(listed.items) > 1:
            break
        start, end = start + 1, end - 1
    return tokens[start:end]


# ---- As text -------------------------------------------------------------------------------------

# \frac{3\pi}{4}, as the whole of a term, is 3\pi/4, and \frac{x+2}{7} is (x+2)/7.
SIMPLE_FRACTION = re.compile(
    r"(?P<before>^|[-+=,(\[{<>]|\\[lgn]eq)\\frac\{(?P<top>(?:[^=,{}]|(?:\\sqrt|\^)\{[^{}]*\})+)\}"
    r"\{(?P<under>[^-+=,{}\s\\]|\d+|\\pi|\\sqrt\{[^{}]*\})\}(?=$|[-+=,)\]}<>]|\\[lgn]eq)")
# What keeps a top in brackets, if it stands in none of its own
SUM = re.compile(rf"[-+<>:]|\\(?:pm|mp|div|cup|cap|[lgn]eq|sum|int|{'|'.join(FUNCTIONS)})(?![a-z])")


def spelled(tokens: list[Token]) -> str:
    r"""Tokens as text to compare, with blanks only where two tokens would become one. 2 \cdot x is
    2x. Capitals count, except in words: Yes = yes, and x + Y is not x + y."""
    text = []
    before = Token("", "", "", False)
    keeps_sign = False    # in a term after a function or a stroke: \ln 2 \cdot x, a / b \cdot c
    for token, after in zip(tokens, [*tokens[1:], before]):
        follows_number = before.kind == "number"
        if token.text == "*" or token.text == r"\times" and "number" in (before.kind, after.kind):
            token = token._replace(text=r"\cdot")    # a cross product is another
        if token.text in ("+", "-", ",", "="):
            keeps_sign = False
        elif token.text == "/" or token.text[1:] in FUNCTIONS:
            keeps_sign = True
        if token.text == r"\cdot" and not keeps_sign and goes_without_sign(before, after):
            continue
        if follows_number and token.kind == "number" or (
                before.kind == "command" and token.kind == "word"):
            text.append(" ")
        text.append(token.text)
        before = token
    text = "".join(text)
    if all(has_no_case(token) for token in tokens):
        text = text.casefold()
    return SIMPLE_FRACTION.sub(in_one_line, text).lstrip("+")


def goes_without_sign(before: Token, after: Token) -> bool:
    r"""Whether a product is the same without its sign: 2 x, x y, (x + 1)(x + 2); but 5 \frac12 is
    5.5, and f(x) a function's value."""
    if after.text == "(":
        return before.kind == "number" or before.text in (")", "}")
    is_factor = before.kind in ("number", "word") or before.text in (")", "}", r"\pi")
    is_mixed = before.kind == "number" and after.text == r"\frac"
    return is_factor and not is_mixed and after.kind in ("word", "command")


def in_one_line(fraction: re.Match) -> str:
    r"""\frac{top}{under} as top/under, with the brackets that a sum needs."""
    top = fraction["top"]
    outside = re.sub(r"\([^()]*\)|\{[^{}]*\}", "", top)
    if SUM.search(outside.removeprefix("-")):
        top = f"({top})"
    return f"{fraction['before']}{top}/{fraction['under']}"


def has_no_case(token: Token) -> bool:
    is_long = len(token.text) > 2 or token.text.casefold() == "no"
    return token.kind == "word" and is_long or token.text in ",.;:!?'\"-"


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{…} or \fbox{…} whose braces close; \{ and \} are text."""
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
        without_brace = re.findall(r"\\boxed\s+([^\s{}$\\]+)", text)    # \boxed 18
        content = without_brace[-1] if without_brace else None
    return content


# ---- Brackets and lists --------------------------------------------------------------------------

OPENING = ("(", "[", "{", r"\{", r"\begin{pmatrix}")
CLOSING = (")", "]", "}", r"\}", r"\end{pmatrix}")
SEPARATORS = (",", ";", r"\cup", "or", "and")


class List(NamedTuple):
    opening: str
    items: list[list[Token]]
    closing: str
    separators: set[str]


def outside_brackets(tokens: list[Token]) -> Iterator[tuple[int, str]]:
    """Place and text of the tokens that stand in no brackets, and of the outermost brackets."""
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
    brackets = [i for i, text in outside_brackets(tokens) if text in OPENING + CLOSING]
    if brackets == [0, len(tokens) - 1] and len(tokens) > 1:
        opening, closing = tokens[0].text, tokens[-1].text
        tokens = tokens[1:-1]
    separators = {text for _, text in outside_brackets(tokens) if text in SEPARATORS}
    items = [item for item in split(tokens, SEPARATORS) if item]
    return List(opening, items, closing, separators)
