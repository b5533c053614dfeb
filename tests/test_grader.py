r"""grader.py: the answer it finds in a response, and which answers are the same.

Most of the file is one table. Each row says whether a response answers a question
correctly. Training works against the grader, and against no other part of the program.
So a row that expects 0.0 matters as much as one that expects 1.0.
"""
import re
import time
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import grader
from answer_pairs import by_math_verify, pairs
from grader import GRADERS, extract_answer, grade, last_boxed, last_number, same


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


# Public reports of graders that went wrong, with inputs of our own, and members of each kind.
KINDS = [
    # response, answer, grade
    # --- an equation is not its right side
    (r"\boxed{0}", "5x - 7y + 11z + 4 = 0", 0.0),
    (r"\boxed{2x+3y=0}", "x+y+z=0", 0.0),
    (r"\boxed{x \not= 3}", "3", 0.0),
    (r"\boxed{\frac{x^2}{16}+\frac{y^2}{12}=1}", r"\frac{x^2}{4}+\frac{y^2}{3}=1", 0.0),
    (r"\boxed{(x-9)^2+(y+4)^2=20}", "(x-3)^2+(y-6)^2=20", 0.0),
    (r"\boxed{x=7}", "y=7", 0.0),
    (r"\boxed{y=7}", "x=7", 0.0),
    (r"\boxed{5 = x}", "5", 1.0),
    (r"\boxed{x=5}", "5", 1.0),
    (r"\boxed{5}", "x=5", 1.0),
    (r"\boxed{5}", "5=x", 1.0),
    (r"\boxed{f(x)=5}", "5", 1.0),
    (r"\boxed{2x=10}", "10", 0.0),
    (r"\boxed{x^2=4}", "4", 0.0),
    (r"\boxed{x+1=5}", "5", 0.0),
    (r"\boxed{\theta = 5}", "5", 1.0),
    (r"\boxed{x_1=5}", "5", 1.0),
    (r"\boxed{xy=5}", "5", 0.0),
    (r"\boxed{-x=5}", "5", 0.0),
    (r"\boxed{x \neq 3}", "3", 0.0),
    (r"\boxed{x \ge 3}", "3", 0.0),
    (r"\boxed{x>3}", "3", 0.0),
    (r"\boxed{x \approx 3}", "3", 0.0),
    (r"\boxed{y = 2x+1}", "2x+1", 1.0),
    (r"\boxed{2x+1}", "y=2x+1", 1.0),
    (r"\boxed{y=2x+1}", "y = 2x + 1", 1.0),
    (r"\boxed{z=2x+1}", "y=2x+1", 0.0),
    (r"\boxed{x \le 3}", r"x \leq 3", 1.0),
    (r"\boxed{5x - 7y + 11z + 4 = 0}", "5x-7y+11z+4=0", 1.0),
    (r"\boxed{\sin x = 0}", "0", 0.0),
    (r"\boxed{3x=18}", "18", 0.0),
    # --- several solutions are not one of them
    ("#### 7", "n=5 or n=7", 0.0),
    ("#### 5", "n=5 or n=7", 0.0),
    (r"\boxed{3}", r"x = 2 \text{ and } y = 3", 0.0),
    (r"\boxed{x = 4 \text{ or } x = -4}", "-4", 0.0),
    ("#### n=5 or n=7", "n=5 or n=7", 1.0),
    ("#### 5, 7", "n=5 or n=7", 1.0),
    ("#### 7 or 5", "n=5 or n=7", 1.0),
    (r"\boxed{x=5 \quad y=7}", "7", 0.0),
    (r"\boxed{x=5\text{ or }7}", "7", 0.0),
    (r"\boxed{x=2, y=3}", r"x = 2 \text{ and } y = 3", 1.0),
    (r"\boxed{3}", r"x=2, \quad y=3", 0.0),
    (r"\boxed{3}", r"x = 2 \quad y = 3", 0.0),
    (r"\boxed{-4}", r"x = \pm 4", 0.0),
    (r"\boxed{4}", r"x = \pm 4", 0.0),
    (r"\boxed{4}", r"\pm 4", 0.0),
    # --- what follows an answer does not replace it
    ("#### 17 because 1+17=18", "18", 0.0),
    ("#### 18 (9+9=18)", "18", 1.0),
    ("#### 18 apples (9 + 9 = 18)", "18", 1.0),
    ("#### 18 = 9 + 9", "18", 1.0),
    ("#### 9 + 9 = 18", "18", 1.0),
    ("#### 18 because 9+9=18", "18", 1.0),
    ("#### 17 because 9+9=18", "17", 0.0),
    ("#### 18 since 20 - 2 = 18", "18", 1.0),
    ("#### 17 (18 - 1 = 17)", "18", 0.0),
    ("#### 20 - 2 = 18", "18", 1.0),
    ("#### 20 - 2 = 18", "20", 0.0),
    ("#### x = 9 + 9 = 18", "18", 1.0),
    ("#### 17 = 18", "18", 0.0),
    ("#### 17 = 18", "17", 0.0),
    ("#### 3 x 6 = 18", "18", 1.0),
    (r"\boxed{3\times6=18}", "18", 1.0),
    # --- words that change a number
    ("#### 5 hours 45 minutes", "5 hours 30 minutes", 0.0),
    ("#### 6 feet 2 inches", "6 feet 11 inches", 0.0),
    ("#### 3 dollars and 20 cents", "3 dollars and 75 cents", 0.0),
    ("#### 2 thirds", "2", 0.0),
    ("#### 7 halves", "7", 0.0),
    ("#### 1 in 6", "1", 0.0),
    ("#### 3 out of 10", "3", 0.0),
    ("#### 3 squared", "3", 0.0),
    ("#### 3 times 7", "3", 0.0),
    ("#### 4 plus 5", "4", 0.0),
    ("#### 4 minus 5", "4", 0.0),
    ("#### 2 over 3", "2", 0.0),
    ("#### 5 through 9", "5", 0.0),
    ("#### 4 factorial", "4", 0.0),
    ("#### 2 thousands", "2", 0.0),
    ("#### 3 millions", "3", 0.0),
    ("#### 3 dozens", "3", 0.0),
    ("#### 5 degrees below zero", "5", 0.0),
    ("#### 18 apples or 19 apples", "18", 0.0),
    ("#### 10 apples to 15 apples", "10", 0.0),
    ("#### 10 ft by 99 ft", "10 ft by 18 ft", 0.0),
    ("#### 17", "17 (red); 8 (green)", 0.0),
    ("#### 17 (red); 8 (green)", "17 (red); 8 (green)", 1.0),
    ("#### 30", "$30 mph, 40 mph", 0.0),
    ("#### 236", "236 adult, 342 child", 0.0),
    ("#### 3630", "3630 ft^2, 522,720 in^2", 0.0),
    ("#### 20", "$20 ft x 35 ft", 0.0),
    ("#### 3 cubed", "3", 0.0),
    ("#### 3 of ten", "3", 0.0),
    ("#### one half", "1", 0.0),
    ("#### 3 and a half", "3", 0.0),
    ("#### 3 quarters", "3", 0.0),
    ("#### 2 hundredths", "2", 0.0),
    ("#### 5 less than 9", "5", 0.0),
    ("#### 2 dozen", "2", 0.0),
    ("#### 2 dozen", "24", 1.0),
    ("#### 3 choose 2", "3", 0.0),
    ("#### 5 percent of 20", "5", 0.0),
    ("#### 5 hours 30 minutes", "5 hours 30 minutes", 1.0),
    ("#### 5 hours", "5 hours 30 minutes", 0.0),
    ("#### 5", "5 hours 30 minutes", 0.0),
    ("#### 2 pi", "2", 0.0),
    ("#### 2 ab", "2", 0.0),
    ("#### 2 xy", "2", 0.0),
    ("#### 3 to 5", "3", 0.0),
    ("#### 3-5 apples", "3", 0.0),
    ("#### 18 or more", "18", 0.0),
    ("#### 5 3", "5", 0.0),
    ("#### 18 apples and 3 pears", "18", 0.0),
    ("#### 4 divided by 5", "4", 0.0),
    ("#### 4 multiplied by 5", "4", 0.0),
    ("#### 3 per 10", "3", 0.0),
    ("#### 3 modulo 5", "3", 0.0),
    ("#### 2 to the power of 3", "2", 0.0),
    ("#### 2 raised to 3", "2", 0.0),
    ("#### 3 x", "3", 0.0),
    ("#### 3 tens", "3", 0.0),
    # --- factorials
    (r"\boxed{5!}", "5", 0.0),
    (r"\boxed{5}", "5!", 0.0),
    (r"\boxed{120}", "5!", 1.0),
    ("#### 18!", "18", 1.0),
    ("The answer is 18!", "18", 1.0),
    (r"\boxed{5!}", "5!", 1.0),
    ("#### 5!", "5!", 1.0),
    (r"\boxed{n!}", "n", 0.0),
    # --- scratch pads
    ('<think>\n#### 18\n</think>\n\\boxed{17}', "18", 0.0),
    ('<think>try\n#### 17\nno</think>\n\\boxed{18}', "18", 1.0),
    (r"<think>maybe \boxed{18} but", "18", 0.0),
    ('#### 18\n<think>check', "18", 0.0),
    ("stuff #### 17 </think> #### 18", "18", 1.0),
    # --- long references are compared whole
    # --- other ways to mark an answer
    ('#### Step 1: add\n9+9=18\n\n#### Step 2: conclude\nSo \\boxed{18}.', "18", 1.0),
    ('#### Final Answer\n\\boxed{18}', "18", 1.0),
    ('#### Step 1: add\nThe answer is 18.', "18", 1.0),
    (r"#### \boxed{18}", "18", 1.0),
    (r"#### $\boxed{18}$", "18", 1.0),
    ("#### Answer: 18", "18", 1.0),
    ("#### **Answer: 18**", "18", 1.0),
    ("#### The answer is 18", "18", 1.0),
    ("<answer>#### 18</answer>", "18", 1.0),
    ("<answer>18</answer>", "18", 1.0),
    ('#### 1. Understand\nShe has 9+9.\n#### 2. Solve\n\\boxed{18}', "18", 1.0),
    ('#### 1. Understand\nShe has 9+9.\n#### 2. Solve\n\\boxed{18}', "2", 0.0),
    (r"\boxed{42}", r"\boxed{42}", 1.0),
    ("#### 42", r"$\boxed{42}$", 1.0),
    (r"\boxed{43}", r"\boxed{42}", 0.0),
    (
        r"\boxed{\left\{\begin{array}{l} 1 \\ 2 \end{array}\right.}",
        r"\left\{\begin{array}{l} 1 \\ 2 \end{array}\right.",
        1.0,
    ),
    (r"\fbox{18}", "18", 1.0),
    (r"\boxed 18", "18", 1.0),
    (r"\boxed{{18}}", "18", 1.0),
    ("**Final Answer**: 18", "18", 1.0),
    ("**Final Answer:** 18", "18", 1.0),
    ('The answer is:\n18', "18", 1.0),
    ('The answer is:\n\n$$18$$', "18", 1.0),
    ('The answer is:\n\\[\n18\n\\]', "18", 1.0),
    ("#### x=1, y=2", 'x=1\ny=2', 0.0),
    ("#### x=1 y=2", 'x=1\ny=2', 1.0),
    (r"\boxed{\{1,2\}}", r"\{1,2\}", 1.0),
    (r"\boxed{\{1,2\}}", r"\{2,1\}", 1.0),
    # --- MATH's own spellings
    (r"\boxed{\frac43}", r"\frac{4}{3}", 1.0),
    (r"\boxed{\frac{4}{3}}", r"\frac43", 1.0),
    ("#### 4/3", r"\frac43", 1.0),
    (r"\boxed{\frac 59}", "5/9", 1.0),
    (r"\boxed{\frac{270}7}", r"\frac{270}{7}", 1.0),
    (r"\boxed{\cfrac{1}{2}}", "0.5", 1.0),
    (r"\boxed{11\sqrt2}", r"11\sqrt{2}", 1.0),
    (r"\boxed{\sqrt 2}", r"\sqrt{2}", 1.0),
    (r"\boxed{90}", r"90^\circ", 1.0),
    (r"\boxed{90^{\circ}}", r"90^\circ", 1.0),
    (r"\boxed{90^\circ}", "90", 1.0),
    ("#### 90°", "90", 1.0),
    ("#### 90 degrees", r"90^\circ", 1.0),
    ("#### 90 degrees", "90", 1.0),
    (r"\boxed{15}", r"15\mbox{ cm}^2", 1.0),
    (r"\boxed{15\text{ cm}^2}", r"15\mbox{ cm}^2", 1.0),
    (r"\boxed{15\mbox{ cm}^2}", "15", 1.0),
    (r"\boxed{15\text{ m}^2}", r"15\mbox{ cm}^2", 0.0),
    (r"\boxed{x^{2}}", "x^2", 1.0),
    (r"\boxed{52_{8}}", "52_8", 1.0),
    (r"\boxed{52}", "52_8", 0.0),
    (r"\boxed{52_8}", "52", 0.0),
    (r"\boxed{x^{12}}", "x^12", 1.0),
    (r"\boxed{x^{2y}}", "x^2y", 0.0),
    (
        r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}",
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        1.0,
    ),
    (
        r"\boxed{\begin{pmatrix}1&2\\3&5\end{pmatrix}}",
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        0.0,
    ),
    (
        r"\boxed{\begin{pmatrix}-7\\16\\5\end{pmatrix}}",
        r"\begin{pmatrix} -7 \\ 16 \\ 5 \end{pmatrix}",
        1.0,
    ),
    # --- numbers in a little dress
    ("#### +15", "15", 1.0),
    ("#### –15", "-15", 1.0),
    ("#### (15)", "15", 1.0),
    ("#### {15}", "15", 1.0),
    ("#### 15cm", "15", 1.0),
    ("#### 15kg", "15", 1.0),
    ("#### 15 m/s", "15", 1.0),
    ("#### 15 m^2", "15", 1.0),
    ("#### 15 °C", "15", 1.0),
    ("#### $15/hour", "15", 1.0),
    ("#### €15", "15", 1.0),
    ("#### £15.50", "15.5", 1.0),
    ("#### 15€", "15", 1.0),
    ("#### USD 15", "15", 1.0),
    ("#### US$15", "15", 1.0),
    ("#### Rs. 15", "15", 1.0),
    ("#### 15 USD", "15", 1.0),
    ("#### 15th", "15", 1.0),
    ("#### 15", "15th", 1.0),
    ("#### 10 000", "10000", 1.0),
    (r"\boxed{\frac{1{,}000}{3}}", "1000/3", 1.0),
    (r"\boxed{\frac{1.5}{3}}", "0.5", 1.0),
    (r"\boxed{\displaystyle 15}", "15", 1.0),
    (r"\boxed{\bm{15}}", "15", 1.0),
    (r"\boxed{\approx 3.14}", "3.14", 1.0),
    ("#### 2 million", "2000000", 1.0),
    (r"\boxed{3 \times 10^5}", "300000", 1.0),
    (r"\boxed{3\times10^{5}}", "300000", 1.0),
    ("#### 3e5", "300000", 1.0),
    (r"\boxed{5\frac{1}{2}}", "5.5", 1.0),
    ("#### 5 1/2", "5.5", 1.0),
    ("#### 1 1/2", "11/2", 0.0),
    (r"\boxed{10^5}", "100000", 1.0),
    (r"\boxed{3\cdot 10^{-2}}", "0.03", 1.0),
    (r"\boxed{15^{\text{th}}}", "15", 1.0),
    ("#### 2.5 million dollars", "2500000", 1.0),
    ("#### 15x", "15", 0.0),
    ("#### 15n", "15", 0.0),
    ("#### 15k", "15", 0.0),
    ("#### 15 x", "15", 0.0),
    ("#### -15", "15", 0.0),
    ("#### 2^{10}", "2", 0.0),
    ("#### 15!x", "15", 0.0),
    # --- lists, intervals, letters
    ("#### 1 and 2", "1, 2", 1.0),
    (r"\boxed{(0.5, 3)}", r"(\frac{1}{2},3)", 1.0),
    (r"\boxed{(x,y)=(3,4)}", "(3,4)", 1.0),
    (r"\boxed{x \in [0,1]}", "[0,1]", 1.0),
    (r"\boxed{f(3,4) = 15}", "15", 1.0),
    (r"\boxed{A}", "(A)", 1.0),
    (r"\boxed{\text{(A)}}", "A", 1.0),
    (r"\boxed{A}", r"\text{(A)}", 1.0),
    (r"\boxed{B: a cat}", "B", 1.0),
    (r"\boxed{A) 15}", "A", 1.0),
    ("#### √3", r"\sqrt{3}", 1.0),
    ("#### π", r"\pi", 1.0),
    ("#### ∞", r"\infty", 1.0),
    (r"\boxed{(-\infty,+\infty)}", r"(-\infty,\infty)", 1.0),
    (r"\boxed{[0,1)}", "(0,1)", 0.0),
    (r"\boxed{(1,2)}", r"\{1,2\}", 0.0),
    (r"\boxed{(1,200)}", "(1, 200)", 1.0),
    (r"\boxed{1200}", "(1,200)", 0.0),
    (r"\boxed{(2,1)}", "(1,2)", 0.0),
    (r"\boxed{1,2}", "2,1", 0.0),
    (r"\boxed{B}", "A", 0.0),
    (r"\boxed{(A) or (B)}", "A", 0.0),
    (r"\boxed{A and B}", "A", 0.0),
    (r"\boxed{\{1,2,3\}}", r"\{1,2\}", 0.0),
    (r"\boxed{(-\infty,0)\cup(1,\infty)}", r"(-\infty,0) \cup (1,\infty)", 1.0),
    (r"\boxed{x\in(0,1)}", "(0,1)", 1.0),
    (r"\boxed{x\in(0,1)}", r"y\in(0,1)", 0.0),
    ("#### (C) twice as large", "C", 1.0),
    ("The answer is (B) two hours", "B", 1.0),
    ("The answer is (A) 5 and 7", "A", 1.0),
    ("The answer is B) 3 or 4", "B", 1.0),
    ("The answer is C: less than half", "C", 1.0),
    ("Answer: D) None of the above", "D", 1.0),
    ("Answer: B) not enough information", "B", 1.0),
    ("Answer: (B) No", "B", 1.0),
    ("Answer: B) not C", "B", 0.0),
    ("Answer: (B) not correct", "B", 0.0),
    ("Answer: (B) is not correct", "B", 0.0),
    ("Answer: (B) is wrong", "B", 0.0),
    ("Answer: (B) or both", "B", 0.0),
    ("Answer: B) and C", "B", 0.0),
    ("Answer: A) 5 B) 7", "A", 0.0),
    (r"\boxed{(2 \text{ or } 1)}", "(1,2)", 0.0),
    (r"\boxed{2 \text{ or } 1}", r"1 \text{ or } 2", 1.0),
    (r"\boxed{y=1, x=2}", "1,2", 0.0),
    (r"\boxed{x=1, y=2}", "1,2", 1.0),
    # --- words that follow a number
    ("#### 18 eggs left over", "18", 1.0),
    ("#### 18 more apples than Bob", "18", 1.0),
    ("#### 18 years older than his brother", "18", 1.0),
    ("#### 18 dollars per day at the farmers' market", "18", 1.0),
    ("#### 6 p.m.", "6", 1.0),
    ("#### 6 A.M. today", "6", 1.0),
    ("#### 18 over 2", "18", 0.0),
    ("#### 18 over two", "18", 0.0),
    ("#### 18 over x", "18", 0.0),
    ("#### 18 less than 30", "18", 0.0),
    ("#### 18 more than x", "18", 0.0),
    # --- rounded decimals
    (r"\boxed{6.63 \times 10^{-34}}", "6.63e-34", 1.0),
    (r"\boxed{1.05e-34}", "6.63e-34", 0.0),
    (r"\boxed{10^{-20}}", "1.23e-10", 0.0),
    (r"\boxed{6.62607e-34}", "6.6261e-34", 1.0),
    (r"\boxed{6.6251e-34}", "6.6261e-34", 0.0),
    ("#### 0.000001", "0.0000012345", 0.0),
    ("#### 0.0000000001", "0.0000000001234", 0.0),
    ("#### 2/3", "0.6666666667", 1.0),
    ("#### 0.666667", "0.6666666667", 1.0),
    ("#### 0.67", "0.6666666667", 0.0),
    ("#### 0.6666666666666", "0.6666666667", 1.0),
    ("#### 0.666666", "0.6666666667", 0.0),
    ("#### 5.6666666667", "5.6666666667", 1.0),
    ("#### 17/3", "5.6666666667", 1.0),
    ("#### 0.33", "1/3", 0.0),
    ("#### 3333/10000", "0.3333333333", 0.0),
    ("#### 1/12", "0.083333", 1.0),
    ("#### 5 2/3", "5.6666666667", 1.0),
    ("#### 0.666667", "2/3", 0.0),
    # --- physics
    ("#### 4.5e33", "4.5e33", 1.0),
    (r"\boxed{4.5 \times 10^{33}}", "4.5e33", 1.0),
    (r"\boxed{4.5e33 \mathrm{ergs} \mathrm{s}^{-1}}", "4.5e33", 1.0),
    (r"\boxed{-1/3}", "-1./3", 1.0),
    (r"\boxed{1.6 \mathrm{~cm}}", "1.6", 1.0),
    (r"\boxed{7e37\mathrm{erg} \cdot \mathrm{s}^{-1}}", "7e37", 1.0),
    (r"\boxed{300 \mathrm{~km} / \mathrm{s}}", "300", 1.0),
    (r"\boxed{50 \mu \mathrm{m}}", "50", 1.0),
    (r"\boxed{np.arcsin(10/13)}", "np.arcsin(10/13)", 1.0),
    (r"\boxed{6 m g h}", "6", 0.0),
    # --- what may follow a number
    ("#### 18. That was hard", "18", 1.0),
    ("The answer is 18. This took 3 steps.", "18", 0.0),
    ("The answer is 18. So she has 18 apples.", "18", 1.0),
    ("#### 18. No, 19.", "18", 0.0),
    ("#### 18 square units", "18", 1.0),
    ("#### 18 units squared", "18", 1.0),
    ("#### 18 more apples", "18", 1.0),
    ("#### 18 times", "18", 1.0),
]

KIND_ROWS = [grade_row(*row) for row in KINDS]


@pytest.mark.parametrize("response, answer, expected", KIND_ROWS)
def test_kinds(response, answer, expected):
    """A wrong answer is never right, and a right one is right in its usual dresses.

    (Bugs: an equation, a list or an expression read as one of its numbers; a spelling of
    the right answer that earns nothing.)
    """
    assert grade(response, answer) == expected


# Inputs of sceptics who tried to be paid for a wrong answer, and right answers they missed.
ATTACKS = [
    # response, answer, grade
    # --- wrong
    (r"\boxed{100!}", "100", 0.0),
    (r"\boxed{2023!}", "2023", 0.0),
    (r"\boxed{5!!}", "5", 0.0),
    (r"\boxed{-5!}", "-5", 0.0),
    (r"\boxed{\frac52!}", "5/2", 0.0),
    ("#### $100!$", "100", 0.0),
    (r"\boxed{5, 3+4 = 7}", "7", 0.0),
    ("#### (17,18,19) = 18", "18", 0.0),
    (r"\boxed{(17) = 18}", "18", 0.0),
    ("#### x =/= 18", "18", 0.0),
    ("#### x = - = 18", "18", 0.0),
    ("#### 18 (not 20 - 1 = 18)", "18", 0.0),
    (r"\boxed{y = 3 + 4 = 7}", "x=7", 0.0),
    (r"\boxed{a=b=1, a=b=2}", "a=1, b=2", 0.0),
    (r"\boxed{18 \cdot h}", "18", 0.0),
    (r"\boxed{2}", r"2 \cdot h", 0.0),
    (r"\boxed{\frac12 h}", "1/2", 0.0),
    (r"\boxed{1/2}", r"\frac12 h", 0.0),
    (r"\boxed{4 s^2}", "4", 0.0),
    (r"\boxed{4}", "4 s^2", 0.0),
    (r"\boxed{\sqrt2 h}", r"\sqrt2", 0.0),
    (r"\boxed{2mg}", "2", 0.0),
    (r"\boxed{2 \mu g}", "2", 0.0),
    ("#### 18/axy", "18", 0.0),
    (r"\boxed{2 dozen\,e}", "24", 0.0),
    ("#### 15 ms", "15 m", 0.0),
    ("#### 15 MW", "15 mW", 0.0),
    ("#### $50", "50 cents", 0.0),
    ("#### 50 cents", "$50", 0.0),
    ("#### 9+9=18 inches", "18 cm", 0.0),
    (r"\boxed{3 + 12 = 15 \text{ inches}}", r"15\text{ cm}", 0.0),
    ("#### 5 sixteenths", "5", 0.0),
    ("#### 3 twentieths", "3", 0.0),
    ("#### 3 millionths", "3", 0.0),
    ("#### 2 quadrillion", "2", 0.0),
    ("#### 2 mil", "2", 0.0),
    ("#### 2 gross", "2", 0.0),
    ("#### 2 score", "2", 0.0),
    ("#### 3 fives", "3", 0.0),
    ("#### 3 twenties", "3", 0.0),
    ("#### 5 doubled", "5", 0.0),
    ("#### 5 tripled", "5", 0.0),
    ("#### 6 halved", "6", 0.0),
    ("#### 5 all squared", "5", 0.0),
    ("#### 101 in binary", "101", 0.0),
    ("#### 18 ÷ 2", "18", 0.0),
    ("#### 18 ± 2", "18", 0.0),
    ("#### 18 ∓ a", "18", 0.0),
    ("#### 18 ∗ a", "18", 0.0),
    ("#### 18 ⋅ a", "18", 0.0),
    ("#### 18 ⩽ x", "18", 0.0),
    ("#### 18 is not it", "18", 0.0),
    ("#### 18 is wrong", "18", 0.0),
    ("#### 18 at least", "18", 0.0),
    ("#### 18. No, -18.", "18", 0.0),
    ("#### 18. Actually nineteen.", "18", 0.0),
    ("#### 18. Or half of it.", "18", 0.0),
    ("#### 18. Wait, negative.", "18", 0.0),
    ("#### A=30", "a=30", 0.0),
    (r"\boxed{2 X}", "2x", 0.0),
    (r"\boxed{F(x)=3x}", "f(x)=3x", 0.0),
    (r"\boxed{\sqrt2 doubled}", r"\sqrt2", 0.0),
    (r"\boxed{x^2 is even}", "x^2", 0.0),
    ("#### Type 2 error", "Type", 0.0),
    (r"\boxed{5,\,125}", "5125", 0.0),
    ("#### 1,200", "1, 200", 0.0),
    (r"\boxed{2\,3}", "23", 0.0),
    ("#### 3EUR5", "35", 0.0),
    ("#### 3EUR5", "3", 0.0),
    ("#### 5**000", "5000", 0.0),
    ("#### 5$000", "5000", 0.0),
    ("#### 5%000", "5000", 0.0),
    ("<think >#### 18", "18", 0.0),
    ("<thoughts>#### 18", "18", 0.0),
    ("<|begin_of_thought|>#### 18", "18", 0.0),
    ("<answer>18} or 19</answer>", "18", 0.0),
    ("<ANSWER>17</ANSWER> #### 18", "18", 0.0),
    (r"\boxed{A, B}", r"A \cup B", 0.0),
    (r"\boxed{x<1 \text{ and } x>3}", r"x<1 \text{ or } x>3", 0.0),
    ("#### +-18", "18", 0.0),
    ("#### Not x = 18", "18", 0.0),
    ("#### x Squared = 18", "18", 0.0),
    ("#### 18 minutes or so, or 19", "18", 0.0),
    ("#### $18 to $19", "18", 0.0),
    ("#### 18 apples but maybe 19", "18", 0.0),
    ("#### 18th of 20", "18", 0.0),
    ("#### 18^2", "18", 0.0),
    ("#### 18 (mod 5)", "18", 0.0),
    ("#### 18!", "17", 0.0),
    (r"\boxed{18 \%\ of\ x}", "18", 0.0),
    (r"\boxed{18i}", "18", 0.0),
    (r"\boxed{18e}", "18", 0.0),
    (r"\boxed{18\mathrm{i}}", "18", 0.0),
    (r"\boxed{18\mathrm{e}}", "18", 0.0),
    (r"\boxed{18\text{ or more}}", "18", 0.0),
    (r"\boxed{18_{10}}", "18", 0.0),
    (r"\boxed{18'}", "18", 0.0),
    (r"\boxed{18:5}", "18", 0.0),
    (r"\boxed{18|5}", "18", 0.0),
    (r"\boxed{[18]}", "18", 0.0),
    (r"\boxed{|18|}", "18", 0.0),
    (r"\boxed{\lfloor 18 \rfloor}", "18", 0.0),
    (r"\boxed{18 \pm 1}", "18", 0.0),
    (r"\boxed{\pm 18}", "18", 0.0),
    (r"\boxed{18\ldots}", "18", 0.0),
    (r"\boxed{\dots 18}", "18", 0.0),
    (r"\boxed{18.\overline{3}}", "18", 0.0),
    (r"\boxed{0.\overline{3}}", "0", 0.0),
    (r"\boxed{1.8\overline{3}}", "1.8", 0.0),
    (r"\boxed{18 \sin}", "18", 0.0),
    (r"\boxed{18 max}", "18", 0.0),
    ("#### 18 hours 30", "18", 0.0),
    ("#### one hundred 18", "18", 0.0),
    ("#### minus 18", "18", 0.0),
    ("#### negative 18", "18", 0.0),
    ("#### not 18", "18", 0.0),
    ("#### about 18 or 19", "18", 0.0),
    (r"\boxed{(1,200)}", "1200", 0.0),
    (r"\boxed{1.200}", "1200", 0.0),
    ("#### 1.080", "1080", 0.0),
    ("#### 1,08", "108", 0.0),
    ("#### 10^3", "10", 0.0),
    ("#### 2^3", "8", 0.0),
    ("#### 18e", "18", 0.0),
    (r"\boxed{x\in\{3\}}", "x=4", 0.0),
    (r"\boxed{\{3\}}", "4", 0.0),
    (r"\boxed{y}", "x", 0.0),
    (r"\boxed{x}", "X", 0.0),
    ("#### B", "b c", 0.0),
    (r"\boxed{A}", "B", 0.0),
    (r"\boxed{(A) is wrong, (B)}", "A", 0.0),
    ("#### A, since B: no", "A", 0.0),
    # --- right, in a dress that was missed
    ("#### 5!", "5", 1.0),
    ("#### 5!", "120", 1.0),
    ("The answer is 18!", "18", 1.0),
    (r"\boxed{-5!}", "-120", 1.0),
    (r"\boxed{100!}", "100!", 1.0),
    ("#### -18. So -18.", "-18", 1.0),
    ("#### 3/4. Check: 3/4.", "3/4", 1.0),
    ("#### 18. Since 9+9=18.", "18", 1.0),
    ("**Answer:**\n- 18", "18", 1.0),
    ("#### x=5, x=7", "5, 7", 1.0),
    (r"\boxed{\text{(B) } 15}", "(B) 15", 1.0),
    ("#### B", "(B) 15", 1.0),
    ("#### (B)", "(B) 15", 1.0),
    ("The answer is option B", "B", 1.0),
    ("#### 18 of the children's apples", "18", 1.0),
    ("#### 3 o'clock", "3", 1.0),
    ("#### 18 T-shirts", "18", 1.0),
    ("#### 18 TVs", "18", 1.0),
    ("#### 18 yrs", "18", 1.0),
    ("#### 18 wks", "18", 1.0),
    ("#### $18 / day", "18", 1.0),
    (r"\boxed{18\mathrm{J}}", "18", 1.0),
    (r"\boxed{18\,\mathrm{N}}", "18", 1.0),
    (r"\boxed{18\text{ Hz}}", "18", 1.0),
    (r"\boxed{18\text{ K}}", "18", 1.0),
    ("The answer is approximately 18", "18", 1.0),
    ("The answer is about 18.", "18", 1.0),
    ("The answer is therefore 18", "18", 1.0),
    ("The answer is indeed 18", "18", 1.0),
    ("#### Total: 18", "18", 1.0),
    ("#### = 18", "18", 1.0),
    ("#### 9*2 = <<9*2=18>>18", "18", 1.0),
    ("#### 18\n#### Explanation\nbecause", "18", 1.0),
    (r"\boxed{P(A\cap B) = 0.5}", "0.5", 1.0),
    (r"\boxed{E[X]=3}", "3", 1.0),
    (r"\boxed{[ABC]=18}", "18", 1.0),
    (r"\boxed{|AB|=5}", "5", 1.0),
    (r"\boxed{\bar{x}=5}", "5", 1.0),
    ("#### θ = 30", "30", 1.0),
    (r"\boxed{6\pi}", r"6\pi\text{ cm}", 1.0),
    (r"\boxed{6\pi\text{ cm}}", r"6\pi", 1.0),
    ("#### 15 centimeters", "15 cm", 1.0),
    ("#### x**2", "x^2", 1.0),
    ("#### ±3", r"\pm 3", 1.0),
    ("#### x⁴", "x^4", 1.0),
    ("#### ⅓", "1/3", 1.0),
    ("#### 2⋅3", r"2 \cdot 3", 1.0),
    (r"\boxed{30\degree}", "30", 1.0),
    (r"\boxed{\frac{\sqrt3}2}", r"\frac{\sqrt{3}}{2}", 1.0),
    (r"\boxed{\begin{bmatrix}1\\2\end{bmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", 1.0),
    ("#### 2*sqrt(3)", r"2\sqrt{3}", 1.0),
    (r"\boxed{\pi/2}", r"\frac{\pi}{2}", 1.0),
    ("#### {1,2}", r"\{2,1\}", 1.0),
    (r"\boxed{\lbrace 1,2\rbrace}", r"\{1,2\}", 1.0),
    ("#### 5", "#### 5", 1.0),
    ("#### 5", "answer: 5", 1.0),
    ("#### 18 = 2 * 9", "18", 1.0),
    ("#### (9+9) = 18", "18", 1.0),
    ("#### $9 + $9 = $18", "18", 1.0),
    ("#### 9 apples + 9 apples = 18 apples", "18", 1.0),
    ("#### 2^3 = 8", "8", 1.0),
    (r"\boxed{\sqrt{324}=18}", "18", 1.0),
    (r"\boxed{\frac{3+6}{2} = 4.5}", "4.5", 1.0),
    ("#### 50%", r"50\%", 1.0),
    ("#### 50", "50%", 1.0),
    ("#### $18.00", "18 dollars", 1.0),
    ("#### 18 square meters", r"18\text{ m}^2", 1.0),
    ("#### 18 m²", "18 m^2", 1.0),
    ("#### 60 mph", "60 mph", 1.0),
    ("#### 60 km/h", r"60\text{ km/h}", 1.0),
    ("<answer>18</answer>", "18", 1.0),
    ("<Answer>\n18\n</Answer>", "18", 1.0),
    (r"<think>x</think><answer>\boxed{18}</answer>", "18", 1.0),
    ("#### 18", "18", 1.0),
    ("#### $18 more", "18", 1.0),
    ("#### 18 each", "18", 1.0),
    ("#### Yes", "yes", 1.0),
    ("#### New York", "new york", 1.0),
    (r"\boxed{3\pi/4}", r"\frac{3\pi}{4}", 1.0),
    (r"\boxed{-\frac{\pi}{2}}", r"\frac{-\pi}{2}", 1.0),
    (r"\boxed{x^{n+1}}", "x^(n+1)", 1.0),
    # --- headings; choices; units beside variables; currencies; percent; one spelling; dress
    ("#### 1. **Find the total**\n\\boxed{18}", "18", 1.0),
    ("#### ✅ Final Answer\n\\boxed{18}", "18", 1.0),
    ("#### I. Setup\n\\boxed{18}", "18", 1.0),
    ("#### For n = 3\n\\boxed{18}", "18", 1.0),
    ("#### Solving 2x = 36\n\\boxed{18}", "18", 1.0),
    ("#### (a) Find x\n\\boxed{18}", "18", 1.0),
    ("#### Total = 17\n\\boxed{18}", "18", 0.0),
    ("#### 17 apples\n\\boxed{18}", "18", 0.0),
    ("#### 17\n\\boxed{18}", "18", 0.0),
    ("#### Total = 18\n\\boxed{18}", "18", 1.0),
    ("Answer: (B) vitamin C", "B", 1.0),
    ("The answer is (D) Not wrong, Not wrong", "D", 1.0),
    ("The answer is (A) Wrong, Not wrong", "A", 1.0),
    ("Answer: (C) either a dog or a cat", "C", 1.0),
    ("Answer: (C) Group A", "C", 1.0),
    ("Answer: (A) I", "A", 1.0),
    ("Answer: (B) is wrong", "B", 0.0),
    (r"\boxed{(A) is wrong, (B)}", "A", 0.0),
    ("Answer: B: wait, C", "B", 0.0),
    ("Answer: (B), (C)", "B", 0.0),
    ("Answer: B, C", "B", 0.0),
    ("Answer: B and C", "B", 0.0),
    ("Answer: B: wrong", "B", 0.0),
    ("Answer: (B) or (C)", "B", 0.0),
    ("Answer: B. No, C", "B", 0.0),
    ("Answer: (B) C) 15", "B", 0.0),
    ("The answer is B because it is larger.", "B", 1.0),
    ("The answer is B, because it is larger.", "B", 1.0),
    ("The answer is B, a cat", "B", 1.0),
    ("The answer is [B]", "B", 1.0),
    ("The answer is b) 15", "B", 1.0),
    ("The answer is (b) 15", "B", 1.0),
    ("The answer is B, C, D", "B", 0.0),
    (r"\boxed{n+2}", "n+2m", 0.0),
    (r"\boxed{2a+3}", "2a + 3h", 0.0),
    ("#### 2x+3m", "2x+3", 0.0),
    ("#### 2πr h", "2πr", 0.0),
    ("#### x^2 h", "x^2", 0.0),
    ("#### m g h", "m", 0.0),
    ("#### 6π m", r"6\pi", 1.0),
    ("#### 6π cm", r"6\pi", 1.0),
    (r"\boxed{6\pi}", r"6\pi \text{ m}", 1.0),
    ("#### 15", r"\$15 per day", 1.0),
    ("#### $15", "$15 per day", 1.0),
    ("#### 15", "$15 in all", 1.0),
    ("#### 15", r"\$15 in all", 1.0),
    ("#### £15 each", "$15 each", 0.0),
    ("#### £15 total", "$15 total", 0.0),
    ("#### $15 each", "$15 each", 1.0),
    ("#### 15 inches long", "15 m long", 0.0),
    ("#### 15 each", "$15 each", 1.0),
    ("#### 18 sec", "18", 1.0),
    (r"\boxed{18\text{ sec}}", "18", 1.0),
    (r"\boxed{18 \text{ sec}}", r"18\text{ s}", 1.0),
    ("#### 60 miles per hour", "60 mph", 1.0),
    ("#### 60 kph", "60 km/h", 1.0),
    (r"\boxed{\frac{\pi}{4}\text{ radians}}", r"\frac{\pi}{4}", 1.0),
    ("#### 18 mpg", "18", 1.0),
    ("#### 18 rpm", "18", 1.0),
    ("#### 60 mph", "60 km/h", 0.0),
    ("#### 5 p.m.", "5 PM", 1.0),
    ("#### 5 pm", "5 PM", 1.0),
    (r"\boxed{10:30\text{ PM}}", r"10:30\text{ p.m.}", 1.0),
    ("#### 5PM", "5", 1.0),
    ("#### 5 am", "5 PM", 0.0),
    (r"\boxed{AM=5}", "5", 1.0),
    ("#### 0.75%", "3/4", 0.0),
    (r"\boxed{0.75\%}", "0.75", 0.0),
    (r"\boxed{\frac34\%}", r"\frac34", 0.0),
    ("#### 75%", "3/4", 1.0),
    (r"\boxed{75\%}", "0.75", 1.0),
    ("#### 18%", "18", 1.0),
    ("#### 18", "18%", 1.0),
    ("#### 1%", "1", 1.0),
    ("#### 0.75", "0.75%", 1.0),
    ("#### 75", "75%", 1.0),
    ("#### 75%", "0.75%", 0.0),
    ("#### 0.5%", "0.5%", 1.0),
    ("#### 1/2 = 50%", "1/2", 1.0),
    ("#### 0.5 percent", "0.5", 0.0),
    (r"\boxed{(1+√5)/2}", r"\frac{1+\sqrt5}{2}", 1.0),
    ("#### (x+2)/7", r"\frac{x+2}{7}", 1.0),
    ("#### x²/4 + y²/3 = 1", r"\frac{x^2}{4}+\frac{y^2}{3}=1", 1.0),
    ("#### 2/√3", r"\frac{2}{\sqrt3}", 1.0),
    ("#### x+2/7", r"\frac{x+2}{7}", 0.0),
    ("#### x*y", "xy", 1.0),
    ("#### (x+1)*(x-2)", "(x+1)(x-2)", 1.0),
    ("#### π*r^2", r"\pi r^2", 1.0),
    (r"\boxed{2^3 \times 3^2}", r"2^3 \cdot 3^2", 1.0),
    ("#### 3*x^2*y", "3x^2y", 1.0),
    (r"\boxed{2^3 3^2}", "2^{33}", 0.0),
    ("#### cos(2x)", r"\cos(2x)", 1.0),
    ("#### ln 2", r"\ln 2", 1.0),
    ("#### log_2(3)", r"\log_2(3)", 1.0),
    ("#### σ²", r"\sigma^2", 1.0),
    ("#### μ", r"\mu", 1.0),
    ("#### δ", r"\delta", 1.0),
    ("#### Δ", r"\Delta", 1.0),
    ("#### 18 ✅", "18", 1.0),
    ("#### 18 ✓", "18", 1.0),
    ("#### ✅ 18", "18", 1.0),
    ("#### 18 🎉", "18", 1.0),
    ("#### 18¢", "18", 1.0),
    ("#### __18__", "18", 1.0),
    ("The answer is _18_.", "18", 1.0),
    ("**Answer:**\n\n> 18", "18", 1.0),
    ("#### 18 ❌", "18", 0.0),
    ("#### 20% of 90 = 18", "18", 1.0),
    ("#### 1/2 of 36 = 18", "18", 1.0),
    ("#### 20 + (-2) = 18", "18", 1.0),
    ("#### 2(9) = 18", "18", 1.0),
    ("#### 18 of 90 = 17", "18", 0.0),
    ("#### -3 + 5 = 2", "2", 1.0),
    ("#### 2 (-3 + 5 = 2)", "2", 1.0),
    ("#### -3 = 2", "2", 0.0),
    ("#### - 3 5 = 2", "2", 0.0),
    (r"\boxed{f(-2) = 5}", "5", 1.0),
    (r"\boxed{f(0.5)=5}", "5", 1.0),
    (r"\boxed{f(1/2)=5}", "5", 1.0),
    (r"\boxed{P(X=2)=5}", "5", 1.0),
    (r"\boxed{|z|=5}", "5", 1.0),
    (r"\boxed{f(\frac12)=5}", "5", 1.0),
    (r"\boxed{f(-2) = 5}", "f(2)=5", 0.0),
    ("#### 18 Millionen", "18", 0.0),
    ("#### 18 mill", "18", 0.0),
    ("#### 18 grand", "18", 0.0),
    ("#### 18 in hex", "18", 0.0),
    ("#### 1 ± √5/2", r"\frac{1\pm\sqrt{5}}{2}", 0.0),
    ("#### (1 ± √5)/2", r"\frac{1\pm\sqrt{5}}{2}", 1.0),
    ("#### n(n+1)/2", r"\frac{n(n+1)}{2}", 1.0),
    ("#### (x+1)(x-1)/2", r"\frac{(x+1)(x-1)}{2}", 1.0),
    ("#### a+b/2", r"\frac{(a+b)}{2}", 0.0),
    ("#### x ≤ 1/2", r"x \leq \frac12", 1.0),
    ("#### -1/2 < x < 1/2", r"-\frac12 < x < \frac12", 1.0),
    ("#### (C, 1)", "(C, 0)", 0.0),
    ("#### C", "(C, 0)", 0.0),
    ("#### I, III", "I, II", 0.0),
    ("#### [B, 3)", "[B, 2)", 0.0),
    ("#### I", "I, II, and III", 0.0),
    ("#### \\frac{17}{3}\n\\boxed{18}", "18", 0.0),
    ("#### $17. That is it.\n\\boxed{18}", "18", 0.0),
    ("#### (17) apples\n\\boxed{18}", "18", 0.0),
    ("#### 17.5 Liters\n\\boxed{18}", "18", 0.0),
    ("#### xy = 17\n\\boxed{18}", "18", 0.0),
    ("#### \\text{(C)}\n\\boxed{B}", "B", 0.0),
    ("#### \\frac{3}{4}\nThe answer is correct.", "3/4", 1.0),
    ("#### (B) Paris\nThe answer is correct.", "B", 1.0),
    ("#### ✅ Final Answer\n18", "18", 1.0),
    (r"\boxed{5\cdot\frac12}", r"5\frac12", 0.0),
    ("#### 6 × ⅔", r"6\frac{2}{3}", 0.0),
    (r"\boxed{\ln 2\cdot x}", r"\ln 2x", 0.0),
    (r"\boxed{\sin x\cdot y}", r"\sin xy", 0.0),
    (r"\boxed{A\times B}", r"A\cdot B", 0.0),
    (r"\boxed{A\times B}", "AB", 0.0),
    ("#### a/b*c", "a/bc", 0.0),
    ("#### x/2*y", "x/2y", 0.0),
    (r"\boxed{x\cdot(2)=10}", "10", 0.0),
    ("#### 2xy h", "2xy", 0.0),
    ("#### μ g", r"\mu", 0.0),
    ("#### θ m", r"\theta", 0.0),
    ("#### 2xy", "2xy h", 0.0),
    ("#### 75 per cent", "3/4", 1.0),
    ("#### 0.75 per cent", "3/4", 0.0),
    ("#### 0.75 (%)", "3/4", 0.0),
    ("#### 3/4 of a percent", "3/4", 0.0),
    ("#### 0.75 percents", "3/4", 0.0),
    ("#### π/4 %", r"\frac{\pi}{4}", 0.0),
    ("The answer is (a) 5, (b) 7", "A", 0.0),
    ("The answer is (a) (b) (c) (d)", "A", 0.0),
    ("Answer: b) 5 c) 7", "B", 0.0),
    ("#### B, but C", "B", 0.0),
    ("#### B. C", "B", 0.0),
    ("#### B: incorrect. It is C", "B", 0.0),
    ("#### B, which is wrong", "B", 0.0),
    ("#### B because it is not C", "B", 1.0),
    (r"\boxed{|x|=5}", "5", 0.0),
    ("#### $15 each", "15 each", 1.0),
    ("#### 18 ✔️", "18", 1.0),
    ("#### 18 👍", "18", 1.0),
    ("#### φ", r"\varphi", 1.0),
    ("#### Θ", r"\Theta", 1.0),
    ("Answer: (B) is incorrect, as said", "B", 0.0),
    ("Answer: (B) False", "B", 0.0),
]

ATTACK_ROWS = [grade_row(*row) for row in ATTACKS]


@pytest.mark.parametrize("response, answer, expected", ATTACK_ROWS)
def test_attacks(response, answer, expected):
    """Nothing but the answer earns a reward.

    (Bugs: letters of a formula read as a unit; digits joined over what stands between
    them; a sign, a factorial or a later sentence that nobody read.)
    """
    assert grade(response, answer) == expected


def test_long_references_are_compared_whole():
    """Two answers that differ after 300 characters are different.

    (Bug: answers cut off before they are compared.)
    """
    terms = [f"x^{i}" for i in range(10, 70)]
    reference = " + ".join(terms)
    assert grade(f"\\boxed{{{reference}}}", reference) == 1.0
    assert grade(f"#### {reference}", reference) == 1.0
    assert grade(f"\\boxed{{{reference}}}", reference.replace("x^69", "y")) == 0.0
    assert grade(f"\\boxed{{{reference} + 1}}", reference) == 0.0
    # without a blank, where nothing could be cut
    assert grade("#### " + "x" * 321, "x" * 321) == 1.0
    assert grade("#### " + "x" * 320 + "y", "x" * 321) == 0.0


RULE = re.compile(r"^        (\S.*?): (.+?)\s+not (.+)$", re.MULTILINE)
RULES = RULE.findall(grader.__doc__)


@pytest.mark.parametrize("reference, right, wrong", RULES)
def test_rules(reference, right, wrong):
    """The examples of the rules at the top of grader.py are true. (`\\n` is a new line.)"""
    assert grade(right.replace(" \\n ", "\n"), reference) == 1.0
    assert grade(wrong.replace(" \\n ", "\n"), reference) == 0.0


def test_every_rule_has_its_examples():
    numbers = re.findall(r"^ ?(\d+)\. ", grader.__doc__, re.MULTILINE)
    assert numbers == [str(i) for i in range(1, len(RULES) + 1)]
    assert len(RULES) >= 14


BOTH_MARKERS = "\\boxed{18}\n#### 17"


def test_the_format_decides_which_marker_goes_first():
    """With --answer-format boxed a box goes before ####. (Bug: a heading read as the answer.)"""
    assert grade(BOTH_MARKERS, "18") == 0.0
    assert grade(BOTH_MARKERS, "18", "boxed") == 1.0
    assert grade("#### 18", "18", "boxed") == 1.0
    assert GRADERS["boxed"](BOTH_MARKERS, "18") == 1.0
    assert extract_answer(BOTH_MARKERS, "boxed") == "18"


def test_of_several_boxes_the_last_counts():
    """`x is \\boxed{3} and y is \\boxed{5}` answers 5, as in MATH's own checker; not 3, 5."""
    text = r"x is \boxed{3} and y is \boxed{5}"
    assert grade(text, "5") == 1.0
    assert grade(text, "3, 5") == 0.0


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


REPEATED = [
    "####", "####\n", "#### check\n", "1", "1,", "1/", "1 000 ", "1,000,", "- ", " :", ".", "!",
    "18!. ", "=", "1=", "1+1=", "x=", "{", "(", "[", "\\{", "\\boxed{", "\\boxed{1}", "\\text{",
    "\\frac{1}{", "\\frac", "\\sqrt(", "\\sqrt[", "\\begin{pmatrix}", "x^", "^(", "_", "$",
    "$1", "**", "\\", "1 or ", "cm ", "m^2 ", "m/", "square ", "½", "°", "<think>", "<answer>",
    "answer is ", "therefore ", "<<", "\n- ", "(A) ", " ",
]


@pytest.mark.parametrize("piece", REPEATED, ids=repr)
def test_grading_is_fast(piece):
    """A long text that repeats itself takes less than a second of processor time.

    (Bugs: scans of quadratic time, and calls as deep as brackets. A collapsed policy
    repeats one token up to the length limit, and every such row is graded.)
    """
    long = piece * (20_000 // len(piece))
    short = piece * (2_000 // len(piece))
    # processor time, because other programs may keep the machine busy
    start = time.process_time()
    for text in (long, f"#### {long}", f"#### 18{long}", f"\\boxed{{{long}}}"):
        assert grade(text, "18") in (0.0, 1.0)
        last_number(text)
    for text in (f"#### 18{short}", f"\\boxed{{({short})}}"):
        grade(text, "18")
        grade(text, f"18{short}")
        grade(text, f"\\{{1, {short}\\}}")
    seconds = time.process_time() - start
    assert seconds < 4, f"10 grades took {seconds:.1f} s"


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
    if outside == "{}%":    # for a reference below 1 it is hundredths (rule 15)
        assume(abs(value) >= 1)
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
    "x", "inf", "nan", "\ud83d", "1e5", "1.5", "\\sqrt", "^", "_2", "or", "cm", "th",
    "\\", "\\frac{1}{0}", "-\\frac{", "\\frac", "\\text{", "[", "\\{", "\\}", "%", "\\%",
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
    assert same(text, answer) in (True, False)
    assert grade(text, answer) in (0.0, 1.0)
    assert grade(answer, text) in (0.0, 1.0)
    assert grade(f"#### {text}", text) in (0.0, 1.0)
    last_number(text)


@property_test
@given(ANY_TEXT)
def test_an_answer_is_itself(text):
    """Every answer that is not empty is the same as itself, in a box and after ####.

    (Bug: a reference that no response can match, not even the reference.)
    """
    line = " ".join(text.replace("#", " ").split())
    found = extract_answer(f"#### {line}")
    assume(found and "answer" not in line)
    assert same(found, found)
    assert grade(f"#### {line}", line) == 1.0


# ---- Beside math-verify --------------------------------------------------------------------------

PAIRS = pairs(140)


@pytest.mark.parametrize("family, reference, answer, right", PAIRS)
def test_pairs_of_answers(family, reference, answer, right):
    """Pairs of MATH-like answers whose truth is known from how they are made."""
    grades = [
        grade(f"\\boxed{{{answer}}}", reference),
        grade(f"#### ${answer}$", reference),
    ]
    assert grades == [right, right]


# Where math-verify errs: {1, 2} and [1, 2] for the point (1, 2), and the degree sign.
THEY_MISS = ("points", "sets", "degrees")


def test_math_verify_agrees():
    """math-verify grades the same pairs alike, but for the kinds named above."""
    pytest.importorskip("math_verify")
    for family, reference, answer, right in PAIRS:
        if family not in THEY_MISS:
            assert by_math_verify(reference, answer) == right, (reference, answer)
