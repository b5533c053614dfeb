"""The reward: what a response answers, and whether that is right.

The grader is deliberately strict: it reads what follows a marker (`####`, else `\\boxed{}`, else "answer is" or "answer:"), the last
one if there are several, and compares numbers exactly. Whatever it accepts, training will find.
"""
from __future__ import annotations

import re
from fractions import Fraction


NUMBER = r"-?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"   # a comma groups thousands; 1,2 is a list

FRACTION = rf"{NUMBER}\s*/\s*{NUMBER}"

LATEX_FRACTION = r"-?\\frac\s*\{\s*-?\d+\s*\}\s*\{\s*-?\d+\s*\}"

NO_UNIT = r"(?:or|and|to|hundred|thousand|million|billion|trillion|dozen|sqrt|pi|mod|choose)\b"

WORD = rf"(?!{NO_UNIT})(?:[^\W\d_]{{2}}|[aAI]\s+[^\W\d_]{{2}}|[mgshlL]$)"     # a unit or talk; a lone letter is more likely a variable

LEADING_NUMBER = re.compile(rf"({LATEX_FRACTION}|{FRACTION}|{NUMBER})(?=[.,;:]?\s+\(?{WORD}|\s*[.,;:!]?$)")

LONGEST_ANSWER = 300  # characters; an answer followed by talk is cut here


def normalise(text: str) -> str:
    """An answer without its formatting: LaTeX spacing and wrappers, $, %, markdown stars, a final period."""
    text = text.replace("−", "-").replace("{,}", ",").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"\\[!,]", "", text)                                         # 10,\!000
    text = re.sub(r"\\left|\\right|\\[;: ()\[\]]|\\?\$|\\?%|\*\*|[`~]", " ", text)
    text = " ".join(text.split()).lstrip("* ").rstrip("*.:;, ")
    return re.sub(r"^-\s+(?=[\d.\\])", "-", text)


def parse_number(text: str) -> Fraction | None:
    """The exact value of a number, a/b or \\frac{a}{b}; None for anything else."""
    if re.fullmatch(NUMBER, text):
        parts = [text, "1"]
    elif re.fullmatch(FRACTION, text):
        parts = text.split("/")
    elif re.fullmatch(LATEX_FRACTION, text):
        parts = re.findall(r"-?\d+", text.replace(" ", "").replace("-\\frac{", "\\frac{-", 1).replace("--", ""))
    else:
        return None
    over, under = (Fraction(p.strip().replace(",", "")) for p in parts)
    return over / under if under else None


def canonical(answer: str) -> str:
    """Two answers are equal if and only if their canonical texts are: '18' for '$18.00', '3/4' for '0.75'."""
    if len(answer) > LONGEST_ANSWER:
        answer = answer[:LONGEST_ANSWER].rpartition(" ")[0]    # between words: half a number is another number
    text = normalise(answer)
    value = parse_number(text)
    left, equals, right = text.rpartition("=")
    if value is None and equals and re.fullmatch(r"(?:[^<>!;,≠≤≥]|,(?=\d{3}))*", left):
        return canonical(right)                        # x = 18, or 12 + 6 = 18; but neither x >= 18 nor x = 1, y = 18
    if value is None and (leading := LEADING_NUMBER.match(text)):
        value = parse_number(leading[1])               # 18 apples, or 18, which is correct
    return str(value) if value is not None else re.sub(r"(?<!\d) | (?!\d)", "", text).casefold()


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{…} whose braces close."""
    stack, last = [], (-1, None)
    for brace in re.finditer(r"(\\boxed\s*)?\{|\}", text):     # one pass: a collapsed policy can open thousands
        if brace[0] != "}":
            stack.append(brace.end() if brace[1] else None)
        elif stack and (start := stack.pop()) is not None:
            last = max(last, (start, text[start:brace.start()]))
    return last[1]


def extract_answer(text: str) -> str | None:
    """The response's answer in canonical form, or None if it names none.

    A marker decides, the last of its kind, and nothing else: a number somewhere in the text is no answer."""
    after = lambda marker: [part.partition("\n")[0].lstrip(" \t:") for part in re.split(marker, text, flags=re.IGNORECASE)[1:]]
    hashes = [line for line in after("####") if normalise(line)]
    boxed = None if hashes else last_boxed(text)
    phrases = after("answer(?: is|:)")
    found = hashes[-1] if hashes else boxed if boxed is not None else phrases[-1] if phrases else ""
    return canonical(found) or None


def last_number(text: str) -> str | None:
    """The last number anywhere, canonical: for evaluation only, as training would learn to scatter numbers."""
    numbers = re.findall(rf"(?<![\d.]){NUMBER}", text)
    return canonical(numbers[-1]) or None if numbers else None


def grade(response: str, answer: str) -> float:
    """1.0 if the response's answer is the right one, else 0.0."""
    return float(extract_answer(response) == canonical(answer))
