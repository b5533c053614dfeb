r"""grader.py: the answer it finds in a response, and which answers are the same.

Most of the file is one table. Each row says whether a response answers a question
correctly. Training works against the grader, and against no other part of the program.
So a row that expects 0.0 matters as much as one that expects 1.0.
"""
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grader import canonical, extract_answer, grade, last_boxed, last_number


property_test = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
)


# ---- Single answers ------------------------------------------------------------------------------

# about 500 characters, and no digit among them
TALK = " which is correct, because every step was checked" * 10

GRADES = [
    # response                                          answer         grade
    # --- markers: ####, then \boxed, then "answer is"
    # --- of several markers of one kind the last; nothing else counts
    ("It is 9 + 9.\n#### 18",                           "18",          1.0),
    ("It is 9 + 9.\n####18",                            "18",          1.0),
    ("####\t18\nThat was fun. 19 candles.",             "18",          1.0),
    ("#### 17\nNo, wait.\n#### 18",                     "18",          1.0),
    ("#### 18\nNo, wait.\n#### 17",                     "18",          0.0),
    ("#### 17 #### 18",                                 "18",          1.0),
    ("#### 18 #### 17",                                 "18",          0.0),
    ("#### 18\n####",                                   "18",          1.0),
    ("#### 18\n#### \\$",                               "18",          1.0),
    ("\\boxed{17}\n#### 18",                            "18",          1.0),
    ("#### 18\n\\boxed{17}",                            "18",          1.0),
    ("#### 17\n\\boxed{18}",                            "18",          0.0),
    ("The answer is 18. \\boxed{17}",                   "18",          0.0),
    ("\\boxed{18} so the answer is 17",                 "18",          1.0),
    ("First \\boxed{17}, then \\boxed{18}",             "18",          1.0),
    ("First \\boxed{18}, then \\boxed{17}",             "18",          0.0),
    ("\\boxed{18}, and then \\boxed{17",                "18",          1.0),
    ("$\\boxed {18}$.",                                 "18",          1.0),
    ("The answer is 18.",                               "18",          1.0),
    ("The answer is: 18",                               "18",          1.0),
    ("Final Answer: $18",                               "18",          1.0),
    ("The answer is 17. No: the answer is 18.",         "17",          0.0),
    ("The answer is 17.\nNo, the answer is 18.",        "18",          1.0),
    ("The answer isn't 18",                             "18",          0.0),
    ("I got 18. This took 3 steps",                     "18",          0.0),
    ("I got 18. This took 3 steps",                     "3",           0.0),
    ("18",                                              "18",          0.0),
    ("= 18",                                            "18",          0.0),
    ("### 18",                                          "18",          0.0),
    ("# # # # 18",                                      "18",          0.0),
    ("####\n18",                                        "18",          0.0),
    ("####",                                            "18",          0.0),
    ("\\boxed{}",                                       "18",          0.0),
    ("The answer is",                                   "18",          0.0),
    ("",                                                "18",          0.0),
    # --- dress: currency, percent, commas, stars, a final period, LaTeX
    ("#### $18",                                        "18",          1.0),
    ("#### \\$18",                                      "18",          1.0),
    ("#### $18$",                                       "18",          1.0),
    ("#### $ 18",                                       "$18.00",      1.0),
    ("#### 18.",                                        "18",          1.0),
    ("#### 18 .",                                       "18",          1.0),
    ("#### 18.00",                                      "18",          1.0),
    ("#### 18",                                         "18.0",        1.0),
    ("#### **18**",                                     "18",          1.0),
    ("#### *18*.",                                      "18",          1.0),
    ("**#### 18**",                                     "18",          1.0),
    ("#### `18`",                                       "18",          1.0),
    ("#### 18%",                                        "18",          1.0),
    ("#### 18\\%",                                      "18 %",        1.0),
    ("#### 18\r\n",                                     "18",          1.0),
    ("#### 1,080",                                      "1080",        1.0),
    ("#### 1080",                                       "1,080",       1.0),
    ("#### 1,234,567.50",                               "1234567.5",   1.0),
    ("\\boxed{1{,}080}",                                "1080",        1.0),
    # this is how MATH writes thousands
    ("\\boxed{10,\\!800}",                              "10800",       1.0),
    ("\\boxed{10\\,800}",                               "10800",       1.0),
    ("\\boxed{\\text{18}}",                             "18",          1.0),
    ("\\boxed{\\mathbf{18}}",                           "18",          1.0),
    ("\\boxed{\\left( 3, 4 \\right)}",                  "(3,4)",       1.0),
    ("The answer is \\(18\\).",                         "18",          1.0),
    ("The answer is $x = 18$.",                         "18",          1.0),
    ("#### 12 + 6 = 18",                                "18",          1.0),
    ("#### 12 + 6 = 18",                                "12",          0.0),
    # --- units, and talk after the answer
    ("#### 18 apples",                                  "18",          1.0),
    ("#### $18 per week",                               "18",          1.0),
    ("#### 18 m",                                       "18",          1.0),
    ("#### $18 a week",                                 "18",          1.0),
    ("#### 18 (apples)",                                "18",          1.0),
    ("\\boxed{18\\text{ cm}}",                          "18",          1.0),
    ("\\boxed{18\\,\\mathrm{cm}^2}",                    "18",          1.0),
    ("#### 18, which is correct...",                    "18",          1.0),
    ("#### 18. That was hard",                          "18",          1.0),
    ("#### 18" + TALK,                                  "18",          1.0),
    ("#### 18\n" + TALK,                                "18",          1.0),
    ("#### 17" + TALK,                                  "18",          0.0),
    ("#### Paris" + TALK,                               "Paris",       0.0),
    ("####" + TALK + " 18",                             "18",          0.0),
    # --- values: exact, never rounded, never a substring
    ("#### 007",                                        "7",           1.0),
    ("#### 7",                                          "007",         1.0),
    ("#### .5",                                         "1/2",         1.0),
    ("#### 0.75",                                       "3/4",         1.0),
    ("#### 3 / 4",                                      "0.750",       1.0),
    ("#### 6/8",                                        "3/4",         1.0),
    ("#### 36/2",                                       "18",          1.0),
    ("\\boxed{\\frac{3}{4}}",                           "0.75",        1.0),
    ("\\boxed{\\dfrac{3}{4}}",                          "\\tfrac{6}{8}", 1.0),
    ("\\boxed{-\\frac{3}{4}}",                          "\\frac{-3}{4}", 1.0),
    ("\\boxed{\\frac{3}{-4}}",                          "-0.75",       1.0),
    ("\\boxed{-\\frac{-3}{4}}",                         "3/4",         1.0),
    ("\\boxed{\\frac{ 3 }{ 4 }}",                       "3/4",         1.0),
    ("\\boxed{\\frac{4}{3}}",                           "3/4",         0.0),
    ("#### 0.33",                                       "1/3",         0.0),
    ("#### 0.3333333333333333",                         "1/3",         0.0),
    ("#### 18.0000000000000001",                        "18",          0.0),
    ("#### 9007199254740993",                           "9007199254740992", 0.0),
    ("#### 118",                                        "18",          0.0),
    ("#### 180",                                        "18",          0.0),
    ("#### 18.5",                                       "18",          0.0),
    ("#### 1.8",                                        "18",          0.0),
    ("#### 18.5.3",                                     "18.5",        0.0),
    ("#### 0",                                          "-0",          1.0),
    # --- signs
    ("#### -7",                                         "-7",          1.0),
    ("####-7",                                          "-7",          1.0),
    ("#### - 7",                                        "-7",          1.0),
    # \u2212 is the minus sign of typesetting
    ("#### \u22127",                                    "-7",          1.0),
    ("#### \u2212$7",                                   "-7",          1.0),
    ("#### $-7",                                        "-7",          1.0),
    ("#### -$7.00",                                     "-7",          1.0),
    ("#### -7",                                         "7",           0.0),
    ("#### 7",                                          "-7",          0.0),
    ("#### 3-7",                                        "-7",          0.0),
    # --- two numbers are no number: ranges, lists, ratios, mixed fractions
    ("range 10-15",                                     "15",          0.0),
    ("#### 10-15",                                      "10",          0.0),
    ("#### 10-15",                                      "15",          0.0),
    ("#### 10-15",                                      "-5",          0.0),
    ("#### 10 \u2212 15",                               "10",          0.0),
    ("#### 10 to 15",                                   "10",          0.0),
    ("#### 18 or 19",                                   "18",          0.0),
    ("#### 18 and 19",                                  "18",          0.0),
    ("#### 18, 19",                                     "18",          0.0),
    ("#### 18, 19",                                     "19",          0.0),
    ("#### 18; 19",                                     "18",          0.0),
    ("#### 1,2",                                        "12",          0.0),
    ("#### 1,2",                                        "1, 2",        1.0),
    ("#### -21",                                        "-2,1",        0.0),
    ("\\boxed{(3,4)}",                                  "(3, 4)",      1.0),
    ("\\boxed{(3,4)}",                                  "(4,3)",       0.0),
    ("#### 1 8",                                        "18",          0.0),
    ("#### 1 1/2",                                      "11/2",        0.0),
    ("#### 3:4",                                        "3",           0.0),
    ("#### 10:30 am",                                   "10",          0.0),
    ("#### 2 million",                                  "2",           0.0),
    # --- expressions are compared as text, whole
    ("\\boxed{x+1}",                                    "x + 1",       1.0),
    ("\\boxed{2x+1}",                                   "2",           0.0),
    ("\\boxed{2^{10}}",                                 "2",           0.0),
    ("\\boxed{2\\sqrt{3}}",                             "2\\sqrt{3}",  1.0),
    ("\\boxed{2\\sqrt{3}}",                             "2",           0.0),
    ("\\boxed{\\frac{1}{\\sqrt{2}}}",                   "\\frac{1}{\\sqrt{2}}", 1.0),
    ("\\boxed{2}",                                      "2(x+1)",      0.0),
    ("\\boxed{2(x-5)}",                                 "2(x+1)",      0.0),
    ("\\boxed{2}",                                      "2 x + 1",     0.0),
    ("\\boxed{2 i}",                                    "2",           0.0),
    ("#### 2 sqrt(3)",                                  "2",           0.0),
    ("\\boxed{5}",                                      "x >= 5",      0.0),
    ("\\boxed{2}",                                      "x=5, y=2",    0.0),
    ("#### x != 3",                                     "3",           0.0),
    ("#### yes.",                                       "Yes",         1.0),
    ("#### (B)",                                        "(b)",         1.0),
    ("#### (B)",                                        "(C)",         0.0),
    # --- nothing is evaluated, nothing divides by zero
    ("#### 1/0",                                        "0",           0.0),
    ("#### 0/0",                                        "0",           0.0),
    ("\\boxed{\\frac{1}{0}}",                           "1",           0.0),
    ("#### 9+9",                                        "18",          0.0),
    ("#### 2*9",                                        "18",          0.0),
    ("#### 18**1",                                      "18",          0.0),
    ("#### __import__('os').getpid()",                  "18",          0.0),
    # --- numbers too long to be meant
    ("#### " + "1" * 10_000,                            "1",           0.0),
    ("#### " + "1" * 299 + "2",                         "1" * 299 + "3", 0.0),
    ("#### 18." + "0" * 400 + "5",                      "18",          0.0),
]


def grade_row(response, answer, expected):
    """A failing row is called by its response and its answer, both cut short."""
    name = f"{response[:40]!r} for {answer[:20]}"
    return pytest.param(response, answer, expected, id=name)


GRADE_ROWS = [grade_row(*row) for row in GRADES]


@pytest.mark.parametrize("response, answer, expected", GRADE_ROWS)
def test_grade(response, answer, expected):
    """A response is right only if the answer it names is the same as the reference.

    (Bug: a grader that evaluates, or that accepts a substring, any last number,
    or a number that is not the same.)
    """
    assert grade(response, answer) == expected


def test_zero_padded_answers_grade():
    """33 and AIME's 033 are the same answer.

    (Bug: 033 graded as text, though a model that writes 33 is right.)
    """
    assert grade("#### 33", "033") == 1.0
    assert grade("\\boxed{033}", "33") == 1.0


WITHOUT_MARKER = [
    "",
    "18",
    "I got 18. This took 3 steps",
    "x = 18",
    "### 18",
    "####",
    "#### \n18",
    "#### $ .",
    "\\boxed{}",
    "\\boxed{18",
    "boxed{18}",
    "the answer is",
    "answer",
    "range 10-15",
]


@pytest.mark.parametrize("text", WITHOUT_MARKER)
def test_no_marker_is_no_answer(text):
    """A text that names no answer has none, and is never right.

    (Bugs: an answer guessed from such a text; an empty answer that equals an empty
    reference.)
    """
    assert extract_answer(text) is None
    assert grade(text, text) == 0.0


LAST_NUMBERS = [
    ("I got 18. This took 3 steps", "3"),
    ("range 10-15", "15"),
    ("at 3:45", "45"),
    ("", None),
    ("it fell by -7.", "-7"),
    ("$1,080.50!", "2161/2"),
    ("none", None),
]


@pytest.mark.parametrize("text, expected", LAST_NUMBERS)
def test_last_number_stands_apart(text, expected):
    """`last_number` finds a number where `extract_answer` finds no answer.

    (Bug: this lenient rule, which is for evaluation only, leaks into the grade.)
    """
    assert last_number(text) == expected
    assert extract_answer(text) is None


def test_boxed_braces():
    r"""`last_boxed` reads the last closed box, up to the brace that closes it.

    (Bugs: a \boxed pattern that stops at the first closing brace; one that takes a
    box that never closes.)
    """
    nested = r"\boxed{\frac{1}{\sqrt{2}}} and {more}"
    assert last_boxed(nested) == r"\frac{1}{\sqrt{2}}"
    last_one_open = r"\boxed{a} \boxed{\{1,2\}} } \boxed{b"
    assert last_boxed(last_one_open) == r"\{1,2\}"
    assert last_boxed(r"\boxed{\boxed{18}}") == "18"
    assert last_boxed("no box { } here") is None


def test_grading_is_fast():
    """A long text that repeats itself takes less than a second of processor time.

    (Bug: scans of quadratic time. A collapsed policy repeats one token up to the
    length limit, and every such row is graded.)
    """
    rows = [
        "####" * 5000,
        "####\n" * 5000,
        "#### " + "1" * 20_000,
        "#### " + "1," * 10_000,
        "#### " + "1/" * 10_000,
        "#### -" + "- " * 10_000,
        "#### \\text{" * 2000,
        "#### " + "\\frac{1}{" * 2000,
        "#### " + "=" * 20_000,
        "answer is " * 3000,
        "the answer is" + " :" * 10_000,
        "{" * 20_000,
        "\\boxed" + " " * 20_000,
        "\\boxed{1}" * 3000,
        "\\boxed{" * 2500,
    ]
    for row in rows:
        # processor time, because other programs may keep the machine busy
        start = time.process_time()
        assert grade(row, "18") == 0.0
        last_number(row)
        seconds = time.process_time() - start
        assert seconds < 1, f"{row[:20]!r}… took {seconds:.1f} s"


# ---- Random answers ------------------------------------------------------------------------------

@st.composite
def dressed_numbers(draw):
    """(text, value): a number in the clothes people put on it, and its exact value."""
    kind = draw(st.sampled_from(["integer", "decimal", "fraction"]))
    digits_at_most = draw(st.integers(1, 15))
    whole = draw(st.integers(0, 10**digits_at_most))
    body = draw(st.sampled_from([f"{whole}", f"{whole:,}"]))
    value = Fraction(whole)
    if kind == "decimal":
        digits = draw(st.text("0123456789", min_size=1, max_size=6))
        zeros = draw(st.integers(0, 3))
        body = f"{body}.{digits}" + "0" * zeros
        value += Fraction(int(digits), 10 ** len(digits))
    if kind == "fraction":
        under = draw(st.integers(1, 999))
        body = draw(st.sampled_from([
            f"{whole}/{under}",
            f"{whole:,} / {under}",
            f"\\frac{{{whole}}}{{{under}}}",
        ]))
        value /= under
    sign = draw(st.sampled_from(["", "-", "\u2212", "- "]))
    if sign:
        value = -value
    currency = draw(st.sampled_from(["", "$", "\\$", "$ "]))
    body = draw(st.sampled_from([
        sign + currency + body,
        currency + sign + body,
    ]))
    outside = draw(st.sampled_from([
        "{}",
        "{}.",
        " {}  ",
        "**{}**",
        "${}$",
        "`{}`",
        "{} apples",
        "{}%",
        "\\text{{}}",
        "\\left{}\\right",
        "{}, as said",
    ]))
    return outside.replace("{}", body, 1), value


NONZERO_FRACTIONS = st.fractions(max_denominator=1000).filter(bool)


@property_test
@given(dressed_numbers(), NONZERO_FRACTIONS)
def test_dress_changes_nothing(number, difference):
    """A number's clothes change nothing about its grade.

    (Bugs: clothes that change a number's value; two different numbers that grade
    as equal.)
    """
    text, value = number
    response = f"Two steps, 3 numbers.\n#### {text}"
    assert grade(response, str(value)) == 1.0
    assert grade(f"#### {value}", text) == 1.0
    another = str(value + difference)
    assert grade(f"#### {text}", another) == 0.0


PIECES = [
    "####", "\\boxed{", "{", "}", "answer is",
    "\n", "\r", "\u2028", "\0", " ",
    "0", "1", "23", "4,5", "e9", "\u00b2", "\u0663", "\uff15",
    ",", ".", "/", "-", "--", "\u2212", "$", "%", "**", "_", "=", "(", ")", "!",
    "x", "inf", "nan", "\ud83d",
    "\\", "\\frac{1}{0}", "-\\frac{", "\\text{",
]
JOINED_PIECES = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)
ANY_TEXT = st.one_of(JOINED_PIECES, st.text())
ANY_ANSWER = st.text("0123456789,./- $", max_size=10)


@property_test
@given(ANY_TEXT, ANY_ANSWER)
def test_grading_never_raises(text, answer):
    """Any text can be graded: the grade is 0.0 or 1.0, and an answer is never empty.

    (Bugs: a text that crashes the grader hours into a run; an answer that is found
    and is empty.)
    """
    found = extract_answer(text)
    assert found is None or found
    assert isinstance(canonical(text), str)
    assert grade(text, answer) in (0.0, 1.0)
    assert grade(answer, text) in (0.0, 1.0)
    assert grade(f"#### {text}", text) in (0.0, 1.0)
    last_number(text)
