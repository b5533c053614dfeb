"""Chat templates: found in a model folder, and rendered outside this process.

A chat template is a stranger's program, and jinja2's sandbox stops neither a loop of 10^10 turns
nor 'a' * 10^9. So it never runs in this process: a child renders many prompts at once, under limits
on time and memory.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys

from support.common import InputError


RENDER_SECONDS = 10  # plus one per thousand prompts

RENDER = """
import datetime, json, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
except (ImportError, ValueError, OSError):
    pass  # not on this system; the limit on time still holds
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

class Generation(Extension):  # marks the assistant's part for training; here only what is inside
    tags = {"generation"}
    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)

def raise_exception(message):
    raise TemplateError(message)

def to_json(x, ensure_ascii=False, **options):
    return json.dumps(x, ensure_ascii=ensure_ascii, **options)

def strftime_now(form):  # a fixed day: a run must not depend on when it is made
    return datetime.datetime(2025, 1, 1).strftime(form)

MARK = chr(0xE000) * 3  # stands after the words of a turn that is to go on

def render(messages):
    if job["after"]:
        user, assistant, *later = messages
        messages = [user, {**assistant, "content": assistant["content"] + MARK}, *later]
        text = template.render(messages=messages, add_generation_prompt=False, **variables)
        return text.rpartition(MARK)[2]
    if messages[-1]["role"] != "assistant":
        return template.render(messages=messages, add_generation_prompt=True, **variables)
    *before, last = messages
    messages = [*before, {**last, "content": last["content"] + MARK}]
    text = template.render(messages=messages, add_generation_prompt=False, **variables)
    if MARK not in text:
        raise TemplateError("it does not write the assistant's words")
    return text.rpartition(MARK)[0]

job = json.load(sys.stdin)
environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
environment.globals["raise_exception"] = raise_exception
environment.globals["strftime_now"] = strftime_now
environment.filters["tojson"] = to_json
variables = {"tools": None, "documents": None, **job["variables"]}
try:
    template = environment.from_string(job["template"])
    texts, errors = [], {}
    for i, messages in enumerate(job["conversations"]):
        try:
            texts.append(render(messages))
        except MemoryError:
            raise
        except Exception as e:    # of this conversation: a role it does not know
            texts.append("")
            errors[i] = " ".join(f"{type(e).__name__}: {e}".split())[:300]
    if sum(map(len, texts)) > 10**5 * len(texts) + 4 * len(json.dumps(job["conversations"])):
        raise TemplateError("it writes over 100,000 characters a prompt")
    json.dump({"texts": texts, "errors": errors}, sys.stdout)
except MemoryError:
    json.dump({"error": "it needs too much memory"}, sys.stdout)
except Exception as e:
    json.dump({"error": " ".join(f"{type(e).__name__}: {e}".split())[:300]}, sys.stdout)
"""


def find_template(folder: str, tokenizer_config: dict) -> tuple[str | None, str]:
    """The folder's chat template, or None, and the file that it is from."""
    path = os.path.join(folder, "chat_template.jinja")
    if os.path.isfile(path):
        try:
            with open(path, encoding="utf-8") as f:
                return f.read(), path
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"{path}: cannot be read ({e})") from None
    path = os.path.join(folder, "tokenizer_config.json")
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):    # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
        if template is None:
            names = ", ".join(map(str, named)) or "none"
            raise InputError(f"{path}: chat_template is a list (of {names}) without a default; "
                             "write the one to use into chat_template.jinja")
    if template is not None and not isinstance(template, str):
        raise InputError(f"{path}: chat_template is not text")
    return template, path


def read_template_args(text: str | None) -> dict:
    """The variables that --chat-template-args gives to the template."""
    try:
        args = json.loads(text or "{}")
    except (ValueError, RecursionError):
        args = None
    ours = {"messages", "add_generation_prompt"}
    if not isinstance(args, dict) or ours & args.keys():
        raise InputError(f"--chat-template-args {text}: expected a JSON object of the template's "
                         """variables, such as '{"enable_thinking": false}'""")
    return args


def render(
    template: str, conversations: list[list[dict]], variables: dict, where: str,
) -> list[str | InputError]:
    """Each conversation through the chat template, with the assistant's turn opened; a turn of the
    assistant's that stands last is left open. In place of one that the template refuses stands an
    InputError, which names the file `where`. Raises it for a template that cannot be used."""
    job = {"template": template, "conversations": conversations, "variables": variables}
    return run_child({**job, "after": False}, where)


def turn_end(template: str, variables: dict, where: str) -> str:
    """What the template writes after an assistant's message; empty if it writes none. Qwen1.5's
    writes nothing after the last, and GLM-4's begins the next turn: so another may follow."""
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"},
             {"role": "user", "content": "Hu"}]
    for conversation in (turns[:2], turns):
        job = {"template": template, "conversations": [conversation], "variables": variables}
        try:
            [after] = run_child({**job, "after": True}, where)
        except InputError:    # if it is of no use at all, the first prompt will say so
            continue
        if isinstance(after, str) and after.strip():
            return after
    return ""


def run_child(job: dict, where: str) -> list[str | InputError]:
    try:
        # -P: or a json.py of the current folder would run, which may be a stranger's.
        done = subprocess.run(
            [sys.executable, "-P", "-c", RENDER], input=json.dumps(job), capture_output=True,
            text=True, encoding="utf-8",
            timeout=RENDER_SECONDS + len(job["conversations"]) / 1000)
        result = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise InputError(f"{where}: the chat template does not end") from None
    except ValueError:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(f"{where}: the chat template could not be rendered ({reason})") from None
    if "error" in result:
        raise InputError(f"{where}: the chat template cannot be used ({result['error']})")
    texts = result["texts"]
    for i, error in result["errors"].items():
        texts[int(i)] = InputError(f"{where}: the chat template cannot be used ({error})")
    return texts
