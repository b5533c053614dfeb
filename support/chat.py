"""Chat templates, rendered outside this process."""
from __future__ import annotations

import json
import subprocess
import sys

from support.common import InputError


# A chat template is a stranger's program, and jinja2's sandbox stops neither a loop of 10^10 turns nor 'a' * 10^9. So it
# never runs in this process: this little program renders all prompts at once under limits on time and memory.
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

class Generation(Extension):  # marks the assistant's part for training; here only what stands inside
    tags = {"generation"}
    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)

def raise_exception(message):
    raise TemplateError(message)

job = json.load(sys.stdin)
environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
environment.globals["raise_exception"] = raise_exception
environment.filters["tojson"] = lambda x, ensure_ascii=False, **options: json.dumps(x, ensure_ascii=ensure_ascii, **options)
try:
    template = environment.from_string(job["template"])
    texts = [template.render(messages=m, tools=None, documents=None, add_generation_prompt=True, **job["special"]) for m in job["conversations"]]
    if sum(map(len, texts)) > 10**5 * len(texts):
        raise TemplateError("it writes over 100,000 characters a prompt")
    json.dump({"texts": texts}, sys.stdout)
except MemoryError:
    json.dump({"error": "it needs too much memory"}, sys.stdout)
except Exception as e:
    json.dump({"error": " ".join(f"{type(e).__name__}: {e}".split())[:300]}, sys.stdout)
"""

RENDER_SECONDS = 10  # plus one per thousand prompts


def render(template: str, conversations: list[list[dict]], special: dict[str, str], where: str) -> list[str]:
    """Each conversation through the chat template, the assistant's turn opened."""
    job = json.dumps({"template": template, "conversations": conversations, "special": special})
    try:
        done = subprocess.run([sys.executable, "-c", RENDER], input=job, capture_output=True, text=True, encoding="utf-8",
                              timeout=RENDER_SECONDS + len(conversations) / 1000)
        result = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise InputError(f"{where}: the chat template does not end") from None
    except ValueError:
        raise InputError(f"{where}: the chat template could not be rendered ({done.stderr.strip().splitlines()[-1:] or 'no output'})") from None
    if "error" in result:
        raise InputError(f"{where}: the chat template cannot be used ({result['error']})")
    return result["texts"]
