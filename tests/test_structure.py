"""Rules for the structure of the repository."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import graphcaps

ROOT = Path(__file__).parents[1]
PACKAGE = Path(graphcaps.__file__).parent

# A file imports only from those above it: the flow from image to training, read downwards.
ORDER = [
    "install_dgl",
    "_interrupt",
    "_graphbolt",
    "tracing",
    "_dgl",
    "streams",
    "files",
    "flags",
    "functional",
    "graph",
    "conversion",
    "structure",
    "reference",
    "votes",
    "passing",
    "kernels",
    "routing",
    "engines",
    "layers",
    "convolution",
    "nets.weights",
    "nets.decoder",
    "nets.control",
    "nets.model",
    "nets.losses",
    "nets.verdict",
    "nets",
    "_api",
    "data.splits",
    "data.images",
    "data.pictures",
    "data.made",
    "data.published",
    "data.datasets",
    "data",
    "training.settings",
    "training.evaluation",
    "training.checkpoints",
    "training.workers",
    "training.capture",
    "training.loop",
    "training",
    "explorer",
    "demo",
    "compare",
    "pictures.inspection",
    "pictures.figures",
    "pictures",
    "report",
    "commands",
    "cli",
    "__main__",
]


def modules():
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            yield path, place(".".join(parts).removesuffix(".__init__"))


def place(name):
    """The entry of ORDER that a dotted name below graphcaps belongs to."""
    parts = name.split(".")
    return next((n for n in (".".join(parts[:2]), parts[0]) if n in ORDER), name)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: import by full name"
            names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (place(n.split(".", 1)[1]) for n in names if n.startswith("graphcaps."))


def test_imports_run_downwards_only():
    for path, module in modules():
        assert module in ORDER, f"where does {path.name} stand in the order?"
        for imported in imports(path):
            if imported in ORDER and imported != module:
                assert ORDER.index(imported) < ORDER.index(module), f"{path} imports {imported}"


def test_the_reference_shares_nothing_with_the_library():
    files = list((PACKAGE / "reference").glob("*.py"))
    assert files
    for path in files:
        assert set(imports(path)) <= {"reference"}, path.name


def test_dgl_is_imported_in_one_place():
    for path, module in modules():
        if module == "_dgl":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] == "dgl" for n in names), path


def test_routing_needs_none_of_what_training_needs():
    program = """
import sys
for name in ("torchvision", "tyro", "PIL", "mlxtend", "matplotlib", "tensorboard"):
    sys.modules[name] = None
import torch
import graphcaps as gc
layer = gc.CapsuleLayer(gc.complete_graph(children=6, parents=3), child_dim=8, parent_dim=16)
assert layer(torch.rand(2, 6, 8)).shape == (2, 3, 16)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_public_names_are_there_when_asked_for():
    assert set(graphcaps.__all__) <= set(dir(graphcaps))
    for name in graphcaps.__all__:
        assert getattr(graphcaps, name) is not None
    star = {}
    exec("from graphcaps import *", star)
    assert set(graphcaps.__all__) <= set(star)
    with pytest.raises(AttributeError, match="'graphcaps' has no attribute 'CapsuleLayr'"):
        _ = graphcaps.CapsuleLayr


@pytest.mark.parametrize("first", ["graphcaps.layers", "graphcaps.training"])
def test_any_module_may_be_imported_first(first):
    program = f"import {first}; import graphcaps; graphcaps.CapsuleLayer, graphcaps.data.shift"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_public_name_is_documented():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    shown = set(re.findall(r"^::: graphcaps\.(\w+)", pages, re.MULTILINE))
    assert set(graphcaps.__all__) <= shown
    for name in graphcaps.__all__:
        assert getattr(graphcaps, name).__doc__, name


@pytest.mark.parametrize("file", ["README.md", "graphcaps/routing/README.md"])
def test_the_code_in_the_readme_runs(file):
    readme = (ROOT / file).read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, file, "exec"), {})
