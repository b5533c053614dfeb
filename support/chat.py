"""Chat templates: found in a model folder, and rendered outside this process.

A chat template is a stranger's program, and jinja2's sandbox stops neither a loop of 10^10 turns
nor 'a' * 10^9. So it never runs in this process: a child renders all prompts at once, under limits
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
import json, sys
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

job = json.load(sys.stdin)
environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
environment.globals["raise_exception"] = raise_exception
environment.filters["tojson"] = to_json
always = dict(tools=None, documents=None, add_generation_prompt=True, **job["special"])
try:
    template = environment.from_string(job["template"])
    texts = [template.render(messages=m, **always) for m in job["conversations"]]
    if sum(map(len, texts)) > 10**5 * len(texts):
        raise TemplateError("it writes over 100,000 characters a prompt")
    json.dump({"texts": texts}, sys.stdout)
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
    if template is not None and not isinstance(template, str):
        raise InputError(f"{path}: chat_template is not text")
    return template, path


def render(
    template: str, conversations: list[list[dict]], special: dict[str, str], where: str,
) -> list[str]:
    """Each conversation through the chat template, with the assistant's turn opened. Raises
    InputError, which names the file `where`."""
    job = {"template": template, "conversations": conversations, "special": special}
    try:
        done = subprocess.run(
            [sys.executable, "-c", RENDER], input=json.dumps(job), capture_output=True, text=True,
            encoding="utf-8", timeout=RENDER_SECONDS + len(conversations) / 1000)
        result = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise InputError(f"{where}: the chat template does not end") from None
    except ValueError:
        reason = done.stderr.strip().splitlines()[-1:] or "no output"
        raise InputError(f"{where}: the chat template could not be rendered ({reason})") from None
    if "error" in result:
        raise InputError(f"{where}: the chat template cannot be used ({result['error']})")
    return result["texts"]
