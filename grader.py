"""The reward: what a response answers, and whether that is right.

The grader is strict on purpose, because training will find whatever it accepts wrongly:

    a marker decides, the last of its kind, and nothing else    #### 18, else \\boxed{18}, else
                                                                "answer is 18" or "answer: 18"
    numbers are compared exactly                                18 = $18.00, 3/4 = 0.75, 7 ≠ −7
    a unit or talk may follow a number                          18 apples; 18, which is correct
    the right side of an equation counts                        x = 18, 12 + 6 = 18
    anything else is compared as text without its formatting    $x+1$ = x + 1

    grade(response, answer) -> 1.0 or 0.0
"""
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction


# A comma groups thousands (1,080); 1,2 is a list.
NUMBER = r"-?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
FRACTION = rf"{NUMBER}\s*/\s*{NUMBER}"                                  # 3/4
LATEX_FRACTION = r"-?\\frac\s*\{\s*-?\d+\s*\}\s*\{\s*-?\d+\s*\}"        # \frac{3}{4}

# Words that change the number before them: 18 hundred, 3 or 4. Any other word is a unit or talk:
# two letters or more (18 apples), a word after a or I (18 a day), or m, g, s, h, l, L at the end.
# A lone letter is more likely a variable (18 x).
NOT_A_UNIT = (
    r"(?:or|and|to|hundred|thousand|million|billion|trillion|dozen|sqrt|pi|mod|choose)\b")
UNIT = rf"(?!{NOT_A_UNIT})(?:[^\W\d_]{{2}}|[aAI]\s+[^\W\d_]{{2}}|[mgshlL]$)"
LEADING_NUMBER = re.compile(
    rf"({LATEX_FRACTION}|{FRACTION}|{NUMBER})(?=[.,;:]?\s+\(?{UNIT}|\s*[.,;:!]?$)")

LONGEST_ANSWER = 300  # characters; an answer followed by talk is cut here


# ---- Two answers are equal if and only if their canonical texts are ------------------------------

def normalise(text: str) -> str:
    """An answer without LaTeX spacing and wrappers, $, %, markdown stars and a final period."""
    text = text.replace("−", "-").replace("{,}", ",")
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"\\[!,]", "", text)                                      # 10,\!000
    # \left, \right, LaTeX spaces, \( \) \[ \], $, %, **, ` and ~
    text = re.sub(r"\\left|\\right|\\[;: ()\[\]]|\\?\$|\\?%|\*\*|[`~]", " ", text)
    text = " ".join(text.split()).lstrip("* ").rstrip("*.:;, ")
    return re.sub(r"^-\s+(?=[\d.\\])", "-", text)                           # - 7


def parse_number(text: str) -> Fraction | None:
    """The exact value of a number, a/b or \\frac{a}{b}; None for anything else."""
    if re.fullmatch(NUMBER, text):
        parts = [text, "1"]
    elif re.fullmatch(FRACTION, text):
        parts = text.split("/")
    elif re.fullmatch(LATEX_FRACTION, text):
        text = text.replace(" ", "").replace("-\\frac{", "\\frac{-", 1).replace("--", "")
        parts = re.findall(r"-?\d+", text)
    else:
        return None
    over, under = (Fraction(p.strip().replace(",", "")) for p in parts)
    return over / under if under else None


def canonical(answer: str) -> str:
    """'18' for '$18.00', '3/4' for '0.75', 'x+1' for '$x + 1$'."""
    if len(answer) > LONGEST_ANSWER:    # cut between words: half a number is another number
        answer = answer[:LONGEST_ANSWER].rpartition(" ")[0]
    text = normalise(answer)
    value = parse_number(text)
    if value is not None:
        return str(value)
    left, equals, right = text.rpartition("=")
    if equals and re.fullmatch(r"(?:[^<>!;,≠≤≥]|,(?=\d{3}))*", left):
        return canonical(right)         # x = 18, or 12 + 6 = 18; not x >= 18, nor x = 1, y = 18
    leading = LEADING_NUMBER.match(text)
    if leading:
        value = parse_number(leading[1])
        if value is not None:
            return str(value)
    return re.sub(r"(?<!\d) | (?!\d)", "", text).casefold()    # a space stays between digits


# ---- Finding the answer in a response ------------------------------------------------------------

def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{…} whose braces close. One pass over the text: a policy that
    has collapsed can open thousands of braces."""
    open_braces = []                       # where a box's content begins; None for other braces
    last_start = -1
    content = None
    for brace in re.finditer(r"(\\boxed\s*)?\{|\}", text):
        if brace[0] != "}":
            open_braces.append(brace.end() if brace[1] else None)
        elif open_braces:
            start = open_braces.pop()
            if start is not None and start > last_start:
                last_start = start
                content = text[start:brace.start()]
    return content


def lines_after(marker: str, text: str) -> list[str]:
    """What follows each marker on its line."""
    parts = re.split(marker, text, flags=re.IGNORECASE)[1:]
    return [part.partition("\n")[0].lstrip(" \t:") for part in parts]


def extract_answer(text: str) -> str | None:
    """The response's answer in canonical form, or None if it names none. A number somewhere in the
    text is no answer."""
    hashes = [line for line in lines_after("####", text) if normalise(line)]
    if hashes:
        return canonical(hashes[-1]) or None
    boxed = last_boxed(text)
    if boxed is not None:
        return canonical(boxed) or None
    phrases = lines_after("answer(?: is|:)", text)
    if phrases:
        return canonical(phrases[-1]) or None
    return None


def last_number(text: str) -> str | None:
    """The last number anywhere, canonical. For evaluation only: a policy rewarded for it would
    learn to scatter numbers."""
    numbers = re.findall(rf"(?<![\d.]){NUMBER}", text)
    return canonical(numbers[-1]) or None if numbers else None


def grade(response: str, answer: str) -> float:
    """1.0 if the response's answer is the right one, else 0.0."""
    return float(extract_answer(response) == canonical(answer))


@dataclass(frozen=True)
class Reward:
    """What a response earns, and from which reward on it counts as correct."""
    function: Callable[[str, str], float] = grade    # (response, answer) -> reward
    correct_at: float = 1.0

    def __call__(self, response: str, answer: str) -> float:
        return self.function(response, answer)
