"""The layout that docs/design.md promises, held against the source itself."""
import ast
import glob
import os
import re
import sys

import pytest


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SPINE = ("gcpo", "train", "model", "logprobs", "sampler", "grader", "data")
COMMANDS = ("evaluate", "show", "plot", "bench")
PACKAGES = {"torch", "tokenizers", "safetensors", "numpy", "tqdm"}
OPTIONAL = {
    "fcntl", "resource", "torch", "matplotlib", "transformers", "trl", "datasets", "pyarrow"}


def sources():
    """{module name: its syntax tree}, of the spine, the commands and support/."""
    paths = [os.path.join(ROOT, f"{name}.py") for name in SPINE + COMMANDS]
    paths += glob.glob(os.path.join(ROOT, "support", "*.py"))
    trees = {}
    for path in paths:
        name = os.path.relpath(path, ROOT).removesuffix(".py").replace(os.sep, ".")
        with open(path, encoding="utf-8") as f:
            trees[name.removesuffix(".__init__")] = ast.parse(f.read())
    return trees


TREES = sources()


def imported(node):
    """The modules that an import statement names. (`from support import cpu` is support.cpu.)"""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if not isinstance(node, ast.ImportFrom):
        return set()
    if node.module == "support":
        return {f"support.{alias.name}" for alias in node.names}
    return {node.module}


def imports_of(tree):
    return set().union(*(imported(node) for node in ast.walk(tree)))


def functions():
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{module}.{node.name}", node


def test_imports_go_one_way():
    """No file imports, by way of others, itself."""
    graph = {name: imports_of(tree) & TREES.keys() for name, tree in TREES.items()}
    left = dict(graph)
    while left:
        free = [name for name, needs in left.items() if not needs & left.keys()]
        assert free, f"a circle of imports among {sorted(left)}"
        for name in free:
            del left[name]


def test_the_algorithm_and_the_grader_stand_alone():
    """gcpo.py can be copied into any project; so can grader.py with its small print."""
    assert not imports_of(TREES["gcpo"]) & TREES.keys()
    small_print = {"support.tokens", "support.words", "support.numbers"}
    assert imports_of(TREES["grader"]) & TREES.keys() == small_print
    for module in small_print:
        assert imports_of(TREES[module]) & TREES.keys() <= small_print


@pytest.mark.parametrize("name", SPINE)
def test_the_spine_needs_few_packages(name):
    """The files that everybody reads import Python, five packages and ours."""
    ours = {module.split(".")[0] for module in TREES}
    packages = {module.split(".")[0] for module in imports_of(TREES[name])}
    assert packages <= PACKAGES | ours | set(sys.stdlib_module_names)


def test_imports_stand_at_the_top():
    """An import inside a function is for what may be missing, and for nothing of ours."""
    for name, function in functions():
        for node in ast.walk(function):
            packages = {module.split(".")[0] for module in imported(node)}
            assert packages <= OPTIONAL, f"{name} imports {packages}"


def test_functions_are_short():
    """No function is longer than 60 lines, and none has more than six parameters."""
    for name, node in functions():
        assert node.end_lineno - node.lineno + 1 <= 60, f"{name} is too long"
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        parameters = [a.arg for a in arguments if a.arg != "self"]
        assert len(parameters) <= 6, f"{name} has {len(parameters)} parameters"


def test_docs_name_tests_that_exist():
    """docs/bugs.md names a test for each of its 27 bugs."""
    with open(os.path.join(ROOT, "docs", "bugs.md"), encoding="utf-8") as f:
        text = f.read()
    tests = ""
    files = glob.glob(os.path.join(ROOT, "tests", "*.py"))
    for path in [*files, os.path.join(ROOT, "test_gcpo.py")]:
        with open(path, encoding="utf-8") as f:
            tests += f.read()
    numbers = [int(n) for n in re.findall(r"^\| (\d+) \|", text, flags=re.M)]
    assert sorted(numbers) == list(range(1, 28))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
