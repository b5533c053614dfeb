"""Problems and prompts: everything between a file of questions and a group of token ids.

    read_problems     a file in any of the usual formats    -> Problem(question, answer, gold)
    load_tokenizer    a model folder                        -> Tokenizer
    prepare           fills in each problem's prompt and gold as token ids; checks every gold by
                      grading it
    grade_group       rewards of a group's responses

One bad record does not refuse a file: it is left out, and Notes says so.
"""
from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from gcpo import Group
from grader import (
    CALCULATOR, GRADERS, Reward, doubt, extract_answer, grade, is_empty, last_boxed, names_nothing,
    same)
from support.chat import find_template, read_template_args, render, turn_end
from support.common import InputError, one_line, read_records
from support.folders import end_tokens, read_backend, read_optional, special_tokens
from support.formats import Unusable, as_text, read_fields


@dataclass(slots=True)
class Problem:
    question: str | list            # text, or chat messages
    answer: str                     # what is right, without the way to it
    gold: str | None = None         # a worked solution that ends with the answer
    source: str = ""                # file and line, for messages
    prompt: Tensor | None = None    # (P,) int64, filled in by `prepare`
    opened: str = ""                # "<think>\n", if the prompt has opened the model's scratch pad
    gold_ids: Tensor | None = None  # (T*,) int64, ends with the end token; None: no usable gold
    gold_reward: float = 1.0
    hint: str = ""                  # what the prompt says below the question


# ---- What is wrong with a file -------------------------------------------------------------------

NOTES = {  # in run.json, and on the screen
    "left_out": "records left out",
    "too_long": "problems left out, because their prompts are too long",
    "gold_not_used": "golds not used; their problems train without",
    "doubtful": "answers that hardly any response can match",
    "repeated": "problems that stood there before",
}
LISTED = 1000  # lines of a kind that run.json lists


@dataclass
class Notes:
    """What is wrong with a file's records: how many of a kind, and which. strict: what would be
    left out raises InputError."""
    strict: bool = False
    counts: Counter = field(default_factory=Counter)
    lines: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, source: str, what: str) -> None:
        if self.strict and kind in ("left_out", "too_long"):
            raise InputError(f"{source}: {what} (without --strict it is left out)")
        self.counts[kind] += 1
        if self.counts[kind] <= LISTED:
            self.lines.setdefault(kind, []).append(f"{source}: {what}")

    def as_json(self) -> dict[str, dict]:
        """For run.json, by kind."""
        return {kind: {"count": count, "lines": self.lines[kind]}
                for kind, count in self.counts.items()}

    def summary(self) -> list[str]:
        """A line for the screen of each kind."""
        return [f"{NOTES[kind]}: {count}; first: {self.lines[kind][0]}"
                for kind, count in self.counts.items()]


# ---- Files of problems ---------------------------------------------------------------------------

ASK = "Reason step by step, and write the final answer on a last line of its own, "
INSTRUCTIONS = {"hash": ASK + "after ####.", "boxed": ASK + "inside \\boxed{}."}
FINAL_LINES = {"hash": "#### {}", "boxed": "\\boxed{{{}}}"}


def read_problems(
    path: str,
    answer_format: str = "hash",
    answer_only_gold: bool = False,
    notes: Notes | None = None,
) -> list[Problem]:
    """Problems from .jsonl, .jsonl.gz, .json or .parquet, in any of support/formats.py.

    A record that cannot be used is left out, and `notes` says so. Raises InputError with file and
    line for a file that cannot be read, and if no record can be used."""
    notes = notes or Notes()
    problems = []
    seen = {}    # each question, kept once: DAPO's file has each problem a hundred times
    for source, record in read_records(path):
        try:
            problem = parse_record(record, answer_format, answer_only_gold, source)
        except Unusable as e:
            notes.add("left_out", source, str(e))
            continue
        key = str(problem.question)
        if key in seen:
            notes.add("repeated", source, "its question stands there before")
        problem.question = seen.setdefault(key, problem.question)
        problems.append(problem)
    if not problems:
        why = "no problems in it"
        if notes.counts["left_out"]:
            why = f"none of its records can be used; first: {notes.lines['left_out'][0]}"
        raise InputError(f"{path}: {why}")
    return problems


def parse_record(record, answer_format: str, answer_only_gold: bool, source: str = "") -> Problem:
    """A Problem from one record. Gold is the record's own `gold`; or its solution with the answer
    on a last line, unless the solution names it in the wanted way already. Raises Unusable."""
    question, answer, solution, gold = read_fields(record)
    if is_empty(answer):
        raise Unusable("its answer is empty")
    final = FINAL_LINES[answer_format].format(answer)
    if gold is not None:
        gold = as_text(gold)
        if gold is None:
            raise Unusable("its gold is not text")
    elif solution:
        gold = CALCULATOR.sub("", solution).strip()
        last_line = re.search("####.*$", gold) if answer_format == "hash" else last_boxed(gold)
        ends_well = last_line and grade(gold, answer, answer_format)
        if not ends_well and not names_another(gold, answer):    # else `prepare` will say so
            gold = f"{gold}\n{final}"
    else:
        gold = final if answer_only_gold else None
    try:
        "".join([str(question), answer, gold or ""]).encode()
        "".join(m["content"] for m in question if isinstance(m, dict)).encode()
    except UnicodeEncodeError:
        raise Unusable("it holds half of a letter (a lone surrogate)") from None
    return Problem(question, answer, gold, source)


def names_another(solution: str, answer: str) -> bool:
    """Whether the solution's own last box, or the answer on its last line, is not the answer."""
    named = last_boxed(solution)
    if named is None:
        named = extract_answer(solution.rpartition("\n")[2])
        if named is None or "=" in named:    # a sum with units is beyond the grader
            return False
    if re.fullmatch("[A-Z]", answer) and not re.match(r"\W*(?:text\w*\W*)?[A-Z]\b", named):
        return False    # it names a choice's text, and the answer is its letter
    return not same(named, answer)


# ---- Prompts and responses as token ids ----------------------------------------------------------

class Tokenizer:
    """A model folder's tokenizer, chat template and stop tokens, with the instruction that goes
    with each question. Raises InputError for a folder without them.

    template_args: JSON of variables for the template. stop_token: more tokens that end a response,
    with blanks between them."""
    def __init__(
        self,
        folder: str,
        answer_format: str = "hash",
        instruction: str | None = None,
        template_args: str | None = None,
        stop_token: str | None = None,
    ):
        self.folder = folder
        self.answer_format = answer_format
        self.instruction = INSTRUCTIONS[answer_format] if instruction is None else instruction
        self.backend = read_backend(folder)
        config = read_optional(folder, "tokenizer_config.json")
        self.special = special_tokens(folder, config)
        self.template, self.template_from = find_template(folder, config)
        self.variables = {**read_template_args(template_args), **self.special}

        # A gold ends as the template ends a turn, or else with the tokenizer's own end token.
        own, ids = end_tokens(folder, self.backend, self.special)
        turn = self.token_after_turn()
        self.end_id = own if turn is None else turn
        more = [self.stop_id(token) for token in (stop_token or "").split()]
        self.stop_ids = sorted({self.end_id, own, *ids, *more})

    def token_after_turn(self) -> int | None:
        """The special token that the template writes after an assistant's message."""
        if self.template is None:
            return None
        after = turn_end(self.template, self.variables, self.template_from)
        after = re.sub(r"^(?:\s*</?think>)+", "", after)    # that ends no turn
        first = self.encode([after.lstrip()], False)[0][:1]
        return first[0] if first and first[0] in self.backend.get_added_tokens_decoder() else None

    @property
    def stop_tokens(self) -> list[str]:
        return [self.backend.id_to_token(i) for i in self.stop_ids]

    def pieces(self, ids) -> list[str]:
        """Token ids (T,) as the text of each, special tokens too."""
        return [self.backend.decode([i], skip_special_tokens=False) for i in ids.tolist()]

    def stop_id(self, token: str) -> int:
        found = self.backend.token_to_id(token)
        if found is None:
            raise InputError(f"--stop-token {token}: no token of {self.folder}/tokenizer.json")
        return found

    def prompt_texts(self, problems: list[Problem]) -> list[str]:
        """Each question with the instruction, in the model's chat form, if it has a template.
        Raises InputError if the template refuses one."""
        texts = self.rendered(problems)
        for text in texts:
            if isinstance(text, InputError):
                raise text
        return texts

    def rendered(self, problems: list[Problem]) -> list[str | InputError]:
        """`prompt_texts`, but with an InputError in place of a text that the template refuses."""
        conversations = [self.conversation(p.question, p.hint) for p in problems]
        if self.template is not None:
            return render(self.template, conversations, self.variables, self.template_from)
        texts = []
        for messages in conversations:
            end = "" if messages[-1]["role"] == "assistant" else "\n"
            texts.append("\n".join(m["content"] for m in messages) + end)
        return texts

    def conversation(self, question: str | list, hint: str = "") -> list[dict]:
        """The question as messages, with hint and instruction in the user's last one."""
        if isinstance(question, str):
            question = [{"role": "user", "content": question}]
        # Parquet gives every message the keys of all, null where it has none.
        messages = [{k: v for k, v in m.items() if v is not None} for m in question]
        below = "\n".join(text for text in (hint, self.instruction) if text)
        if below:
            last = [m for m in messages if m["role"] == "user"][-1]
            last["content"] += f"\n{below}"
        return messages

    def encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        try:
            encodings = self.backend.encode_batch(texts, add_special_tokens=add_special_tokens)
        except KeyboardInterrupt:
            raise
        except BaseException as e:
            # Half a surrogate pair; a vocabulary without its own unknown token. A panic of the
            # library is no Exception.
            raise InputError(
                f"{self.folder}: the tokenizer cannot encode a text ({one_line(e)})") from None
        return [e.ids for e in encodings]

    def encode_texts(self, texts: list[str]) -> list[Tensor]:
        """Prompt texts as token ids (P,). A template writes its own special tokens; plain text
        gets the tokenizer's, but for an end token: the response is to come."""
        plain = self.template is None
        prompts = []
        for ids in self.encode(texts, add_special_tokens=plain):
            while plain and ids and ids[-1] in self.stop_ids:
                ids.pop()
            prompts.append(torch.tensor(ids, dtype=torch.int64))
        return prompts

    def encode_prompt(self, problem: Problem) -> Tensor:
        """(P,), of one problem: for your own code; `prepare` makes those of a file."""
        return self.encode_texts(self.prompt_texts([problem]))[0]

    def encode_response(self, text: str) -> Tensor:
        """(T,), as the model would have written it: apart from the prompt, with the end token."""
        return torch.tensor([*self.encode([text], False)[0], self.end_id])

    def decode(self, ids) -> str:
        """The text of a response (T,), without the end token."""
        ids = torch.as_tensor(ids).tolist()
        while ids and ids[-1] in self.stop_ids:    # the end token may be an ordinary word
            ids.pop()
        return self.backend.decode(ids, skip_special_tokens=True)


def load_tokenizer(
    folder: str,
    answer_format: str = "hash",
    instruction: str | None = None,
    template_args: str | None = None,
    stop_token: str | None = None,
) -> Tokenizer:
    return Tokenizer(folder, answer_format, instruction, template_args, stop_token)


# ---- Ready to train on ---------------------------------------------------------------------------

class Limits(NamedTuple):
    """What a prompt and a response must fit into."""
    new_tokens: int                  # --max-new-tokens
    positions: int                   # the model's
    vocabulary: int | None = None    # the model's


PART = 10_000  # problems whose prompts are text at a time


def prepare(
    problems: list[Problem],
    tokenizer: Tokenizer,
    limits: Limits,
    reward: Reward = Reward(),
    notes: Notes | None = None,
) -> list[Problem]:
    """Fill in prompt, opened, gold_ids and gold_reward of every problem. Returns the problems whose
    prompts leave room for a response; `notes` says which were left out, and which golds are not
    used.

    A gold is used only if it grades as correct against its own answer, and fits into
    `new_tokens` whole: a gold cut off would reward a text that never reaches its answer. Raises
    InputError if nothing is left, and for a prompt with tokens beyond the model's vocabulary."""
    notes = notes or Notes()
    kept = []
    left_out = []    # why
    our_reward = reward.function in GRADERS.values()
    prompts, refused = make_prompts(problems, tokenizer)
    if refused and not prompts:
        raise next(iter(refused.values()))
    for problem in problems:
        unusable = str(refused.get(key_of(problem), ""))
        if our_reward and names_nothing(problem.answer):
            unusable = f"its answer is {problem.answer!r}, and that is none"
        if unusable:
            left_out.append(unusable)
            notes.add("left_out", problem.source, unusable)
            continue
        prompt, opened = prompts[key_of(problem)]
        if not 1 <= len(prompt) <= limits.positions - limits.new_tokens:
            left_out.append(
                f"the prompt has {len(prompt)} tokens, and with {limits.new_tokens} new ones it "
                f"does not fit the model's {limits.positions} positions; lower --max-new-tokens or "
                "leave the problem out")
            notes.add("too_long", problem.source, left_out[-1])
            continue
        check_vocabulary(prompt, tokenizer, limits)
        problem.prompt = prompt
        problem.opened = opened
        problem.gold_ids = None
        if problem.gold is not None:
            prepare_gold(problem, tokenizer, limits, reward, notes)
        doubtful = our_reward and doubt(problem.answer)
        if doubtful:
            notes.add("doubtful", problem.source, doubtful)
        kept.append(problem)
    if problems and not kept:
        raise InputError(f"{problems[0].source}: {left_out[0]}; no problem is left")
    return kept


def key_of(problem: Problem) -> tuple:
    """The same for problems with the same prompt: a question may stand in a file a hundred times,
    and read_problems keeps it once."""
    return id(problem.question), problem.hint


def make_prompts(problems: list[Problem], tokenizer: Tokenizer) -> tuple[dict, dict]:
    """Two dicts by key_of: each prompt (P,) with what it has opened, and for those that the chat
    template refuses its InputError."""
    prompts, refused = {}, {}
    for first in range(0, len(problems), PART):
        known = prompts.keys() | refused.keys()
        part = {key_of(p): p for p in problems[first:first + PART] if key_of(p) not in known}
        texts = dict(zip(part, tokenizer.rendered(list(part.values()))))
        refused |= {key: text for key, text in texts.items() if isinstance(text, InputError)}
        texts = {key: text for key, text in texts.items() if isinstance(text, str)}
        for (key, text), prompt in zip(texts.items(), tokenizer.encode_texts(list(texts.values()))):
            refuse_without_question(text, part[key], tokenizer)
            prompts[key] = prompt, opened_by(part[key].question, text)
    return prompts, refused


def refuse_without_question(prompt: str, problem: Problem, tokenizer: Tokenizer) -> None:
    """Raises InputError for a chat template that leaves out what is asked: all prompts were one.
    (Not for a single word, which a template may write in its own way.)"""
    question = problem.question
    if not isinstance(question, str):
        question = [m["content"] for m in question if m["role"] == "user"][-1]
    words = re.findall(r"\w+", question)
    missing = [word for word in words if word not in prompt]
    if 2 * len(missing) > len(words):
        raise InputError(f"{tokenizer.template_from}: the chat template leaves out {missing[0]!r} "
                         f"of the question of {problem.source or 'a problem'}")


def check_vocabulary(prompt: Tensor, tokenizer: Tokenizer, limits: Limits) -> None:
    highest = max(int(prompt.max()), tokenizer.end_id)
    if limits.vocabulary is not None and highest >= limits.vocabulary:
        raise InputError(f"{tokenizer.folder}: the tokenizer has token {highest}, and the model "
                         f"knows {limits.vocabulary}; they do not belong together")


def prepare_gold(
    problem: Problem, tokenizer: Tokenizer, limits: Limits, reward: Reward, notes: Notes,
) -> None:
    """Fill in gold_ids and gold_reward, or note why the gold cannot be used."""
    ids = tokenizer.encode_response(gold_response(problem.gold, problem.opened))
    # Graded as a response will be: through the tokenizer.
    value = reward(problem.opened + tokenizer.decode(ids), problem.answer)
    if limits.vocabulary is not None and int(ids.max()) >= limits.vocabulary:
        complaint = "its gold has tokens that the model does not know"
    elif torch.tensor(value, dtype=torch.float32) < reward.correct_at:    # as grade_group has it
        complaint = f"its gold does not grade as correct (answer {problem.answer!r})"
    elif len(ids) > limits.new_tokens:
        complaint = (f"its gold has {len(ids)} tokens, more than --max-new-tokens "
                     f"{limits.new_tokens}")
    else:
        problem.gold_ids = ids
        problem.gold_reward = value
        return
    notes.add("gold_not_used", problem.source, complaint)


def opened_by(question: str | list, prompt: str) -> str:
    """The tag of a scratch pad that the template, or the assistant's own turn, leaves open."""
    written = prompt.rstrip()[-len("<think>"):]
    if isinstance(question, list) and question[-1]["role"] == "assistant":
        written = question[-1]["content"]
    return "<think>\n" if written.rfind("<think>") > written.rfind("</think>") else ""


def gold_response(gold: str, opened: str) -> str:
    """Gold as a response to a prompt that may have opened the model's scratch pad."""
    if opened and "</think>" not in gold:
        thoughts, _, final = gold.rpartition("\n")
        return f"{thoughts}\n</think>\n{final}"
    return gold


def grade_group(
    group: Group, problem: Problem, tokenizer: Tokenizer, reward: Reward = Reward(),
) -> Group:
    """The group with `rewards` and `correct` filled in. A response without an end is graded as it
    stands. A scratch pad that the prompt opened is put before the response."""
    rewards = []
    for ids, n in zip(group.responses, group.lengths.tolist()):
        rewards.append(reward(problem.opened + tokenizer.decode(ids[:n]), problem.answer))
    rewards = torch.tensor(rewards, dtype=torch.float32)    # (G,)
    return replace(group, rewards=rewards, correct=rewards >= reward.correct_at)
