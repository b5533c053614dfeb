"""show.py --html: what is in the page, that a model's text cannot run in it, and, where Chromium is
installed, what it draws.
"""
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from test_train import call, metrics_of, train_with

import show
from gcpo import group_advantages
from support.common import InputError, exit_cleanly
from support.page import arithmetic, page_of_run, page_row, write_page


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = [
    "<script>document.title='owned'</script>",
    "</script><img src=x onerror=document.title='owned'>",
    "<!--", "]]>", "\u2028 \\u003c/script>", "SCRIPT", "DATA", '"}]}', "\0"]


def data_of(path):
    """The JSON in a page."""
    with open(path, encoding="utf-8") as f:
        text = f.read()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    return json.loads(found[1]), text


def hostile_page(path):
    row = page_row(HOSTILE, [-1.0] * len(HOSTILE), 1.5, 1.0, True, True)
    write_page(str(path), HOSTILE[0], [{
        "step": 1, "facts": [("question", text) for text in HOSTILE], "arithmetic": HOSTILE[1],
        "rows": [row]}])


def shown(path):
    """The page as Chromium leaves it: its markup once the script has run."""
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{path}"],
        capture_output=True, text=True, timeout=60)
    return done.stdout


@pytest.fixture(scope="module")
def group_page(tmp_path_factory):
    """Of one group of the toy, through the command."""
    page = tmp_path_factory.mktemp("page") / "group.html"
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, "show.py"), "--html", str(page)],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return page, done.stdout


def test_the_page_has_the_numbers_of_the_table(group_page):
    """Every row's advantage, tokens and mean log-probabilities before and after are those that the
    terminal shows. (Bug: a page that explains another group.)"""
    page, printed = group_page
    data, text = data_of(page)
    [group] = data["groups"]
    table = re.findall(
        r"^ +(\d+)(  gold)? +(\d+) +(\S+) +(-?[\d.]+) +(-?[\d.]+) +[\d.]+ +(-?[\d.]+) +[\d.]+$",
        printed, re.M)
    assert len(table) == len(group["rows"]) == 4
    for (_, gold, tokens, reward, advantage, before, after), row in zip(table, group["rows"]):
        assert row["is_gold"] == bool(gold)
        assert len(row["tokens"]) == len(row["before"]) == len(row["after"]) == int(tokens)
        assert row["advantage"] == pytest.approx(float(advantage), abs=1e-4)
        assert row["reward"] == float(reward)
        for name, mean in (("before", before), ("after", after)):
            assert sum(row[name]) / len(row[name]) == pytest.approx(float(mean), abs=1e-3)
    assert "//" not in text.replace("http://www.w3.org/2000/svg", "").split("<script>")[0]


def test_a_runs_page_has_its_groups_and_curves(tmp_path):
    """Each logged group with its tokens, which together are its text, and the curves of the log.
    (Bug: a step's group under another step.)"""
    out = train_with("--steps", "3", "--eval-limit", "4", "--out", str(tmp_path / "run"))
    assert page_of_run(out, str(tmp_path / "run.html")) == 3
    data, _ = data_of(tmp_path / "run.html")
    assert [g["step"] for g in data["groups"]] == [1, 2, 3]
    with open(os.path.join(out, "samples.jsonl")) as f:
        records = [json.loads(line) for line in f]
    for group, record in zip(data["groups"], records):
        assert dict(group["facts"])["question"] == record["question"]
        for row, response in zip(group["rows"], record["responses"]):
            assert len(row["tokens"]) == response["lengths"]
            assert "".join(row["tokens"]).startswith(response["text"].strip()[:8])
            assert (None in row["before"]) == response["is_gold"]
    curves = {c["name"]: c["points"] for c in data["curves"]}
    for name in ("reward/correct", "gold/share", "eval/mean"):
        wanted = [[m["step"], m[name]] for m in metrics_of(out) if m.get(name) is not None]
        assert curves[name] == [[step, pytest.approx(value, rel=1e-4)] for step, value in wanted]


def test_text_of_a_model_stays_text(tmp_path):
    """Whatever a model says arrives in the page's data as it was, and no tag begins or ends there.
    (Bug: a response that closes the script it lies in.)"""
    hostile_page(tmp_path / "page.html")
    data, text = data_of(tmp_path / "page.html")
    assert data["groups"][0]["rows"][0]["tokens"] == HOSTILE
    assert text.count("<script") == text.count("</script>") == 2
    assert "<img" not in text
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/]+='", text)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_chromium_draws_it_and_runs_nothing_else(tmp_path, group_page):
    """Every token is drawn in a colour, gold is marked; and a hostile text neither runs nor becomes
    markup. (Bug: a page that its own rules keep from running.)"""
    drawn = shown(group_page[0])
    data, _ = data_of(group_page[0])
    tokens = sum(len(row["tokens"]) for row in data["groups"][0]["rows"])
    assert drawn.count("background: rgb") == tokens
    assert drawn.count('class="row gold"') == 1
    hostile_page(tmp_path / "page.html")
    drawn = shown(tmp_path / "page.html")
    assert "<title>&lt;script&gt;" in drawn
    assert "<img" not in drawn
    assert drawn.count("background: rgb") == len(HOSTILE)


def test_what_cannot_be_is_one_line(tmp_path, capsys):
    """A folder without a run, a broken log, a page that cannot be written. (Bug: a traceback.)"""
    with pytest.raises(InputError, match="samples.jsonl: cannot be read"):
        page_of_run(str(tmp_path), str(tmp_path / "x.html"))
    (tmp_path / "metrics.jsonl").write_text("")
    a_row = '{"text": "a", "rewards": 1, "is_gold": false, "finished": true}'
    no_advantage = '{"step": 1, "question": "q", "reference": "1", "responses": [%s]}\n' % a_row
    cut_in_a_letter = '{"step": 1, "question": "2 ×'.encode()[:-1].decode(errors="surrogateescape")
    for text, why in (
            ("", "no group"), ("{}\n[1]\n{}\n", "line 1"), ('{"step": 1}\n', "no group"),
            ("[1]\n", "line 1"),
            ('{"step": 1}\n' + no_advantage, "line 2"), ('{"responses": [1]}\n', "line 1"),
            ('{"step": 1, "resp', "no group"), (cut_in_a_letter, "no group")):
        (tmp_path / "samples.jsonl").write_text(text, errors="surrogateescape")
        with pytest.raises(InputError, match=why):
            page_of_run(str(tmp_path), str(tmp_path / "x.html"))
    for words in (["--html"], ["--html="], ["--html", str(tmp_path)], [f"--html={tmp_path}"],
                  [str(tmp_path)],
                  [str(tmp_path), "--html", str(tmp_path / "x.html"), "--seed", "1"]):
        with pytest.raises(SystemExit) as end:
            exit_cleanly(lambda: call(show.main, "show.py", *words))
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.count("\n") == 1, (words, said)
    assert not (tmp_path / "x.html").exists()


def test_both_spellings_of_the_flag():
    """--html FILE and --html=FILE, before or after train.py's flags. (Bug: one of them refused.)"""
    for words in (["--html", "x.html", "--seed", "1"], ["--seed", "1", "--html=x.html"]):
        assert show.take_page(words) == ("x.html", ["--seed", "1"])
    assert show.take_page(["runs/a"]) == (None, ["runs/a"])


def test_the_arithmetic_is_shown_where_it_holds():
    """Advantages that follow from the rewards have their formula, negative rewards too. Others say
    that a switch changed them. (Bug: a page that denies GRPO's own arithmetic.)"""
    for rewards in ([0.0, 1.0, 0.0], [-1.0, 0.0, 1.0], [-0.5, -0.2, -0.5]):
        for scale in ("std", "none"):
            advantages = group_advantages(torch.tensor(rewards), scale).tolist()
            assert "an advantage is" in arithmetic(rewards, advantages, scale)
            assert "a switch" in arithmetic(rewards, [a + 1 for a in advantages], scale)
