"""Mutation testing, `make mutants`: breaks the code and lists the changes that no test notices.

The mutants in `MUTANTS` are written by hand: faults of published implementations, and faults that
the tests once missed. In addition, a random sample of small changes to the files in `AUTOMATIC` is
tried. Each change is made in a copy of the package, where the tests that should notice it are run.
"""

import argparse
import ast
import compileall
import contextlib
import multiprocessing
import os
import py_compile
import random
import shlex
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import mutants_by_hand

ROOT = Path(__file__).resolve().parents[1]
TIME_LIMIT = 600  # seconds; one that runs longer counts as noticed

# the fastest that look at every number of every routing
LAWS = (
    "test_results_and_gradients_equal_the_reference and (complete or sparse)"
    " or functions_of_votes or every_option or coupling_sums or coupling_starts or trace_ends"
    " or of_different_sizes"
)
AUTOMATIC = {
    "routing/base.py": "test_routing_of_ones_own.py test_layers.py",
    "routing/trace.py": "test_trace.py",
    "routing/registry.py": "test_routing_of_ones_own.py test_layers.py",
    "routing/*.py": f'test_laws.py test_routing_of_ones_own.py -k "ones_own or {LAWS}"',
    "passing/*.py": f'test_laws.py -k "features_of_nodes or added_to_all or {LAWS}"',
    "structure.py": "test_layers.py test_conversion.py test_onnx.py test_laws.py"
    f' -k "test_layers or test_conversion or test_onnx or 100000 or {LAWS}"',
    "functional.py": "test_functional.py test_losses.py",
    "nets/losses.py": "test_losses.py",
}

# Changes that are no faults: a part of their name, and why.
NO_FAULTS = {
    "→ torch.arange(dim, dtype=nu.dtype)": "only another device than the CPU notices",
    "→ lengths.topk(labels_per_image)": "dimension 1 is the last",
    "functional.py:27: 1 → 2": "any number will do whose root has a derivative",
}


class Mutant(NamedTuple):
    """One change to a file of the package, and the tests that should fail then."""

    name: str
    file: str
    old: bytes
    new: bytes
    tests: str
    start: int | None = None  # where `old` stands; where it stands once, if not given

    def of(self, text: bytes) -> bytes:
        """The text of the file with the change."""
        if self.start is None and text.count(self.old) != 1:
            raise SystemExit(f"{self.name}: {self.old.decode()!r} has to stand once in {self.file}")
        start = text.index(self.old) if self.start is None else self.start
        return text[:start] + self.new + text[start + len(self.old) :]


def by_hand() -> list[Mutant]:
    """The mutants of the list."""
    return [
        Mutant(name, file, old.encode(), new.encode(), tests)
        for name, file, old, new, tests in mutants_by_hand.MUTANTS
    ]


def automatic() -> list[Mutant]:
    """All small changes to the files of `AUTOMATIC`."""
    tests_of = {}
    for pattern, tests in AUTOMATIC.items():
        for path in sorted((ROOT / "graphcaps").glob(pattern)):
            tests_of.setdefault(path.relative_to(ROOT / "graphcaps").as_posix(), tests)
    found = []
    for file, tests in tests_of.items():
        text = (ROOT / "graphcaps" / file).read_bytes()
        lines = text.splitlines(keepends=True)
        starts = [sum(map(len, lines[:n])) for n in range(len(lines) + 1)]
        for node, new in changes(ast.parse(text)):
            start = starts[node.lineno - 1] + node.col_offset
            old = text[start : starts[node.end_lineno - 1] + node.end_col_offset]
            shown = " ".join(f"{old.decode()} → {new}".split())
            name = f"{file}:{node.lineno}: {shown}"
            found.append(Mutant(name, file, old, new.encode(), tests, start))
    return found


SWAPPED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
LEFT_OUT = {"detach", "clamp_min", "clamp", "contiguous", "square", "exp", "log"}  # x.f() is x


def changes(tree: ast.AST):
    """Nodes of a file and their replacements, except in annotations and messages."""
    for field, child in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list") or isinstance(tree, ast.Raise):
            continue
        if isinstance(tree, ast.keyword) and tree.arg == "strict":  # of zip
            continue
        for node in child if isinstance(child, list) else [child]:
            if isinstance(node, ast.AST) and not isinstance(node, ast.JoinedStr):
                yield from changes_of(node)
                yield from changes(node)


def changes_of(node: ast.AST):
    """The replacements of one node."""
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
        yield node, f"({ast.unparse(ast.BinOp(node.left, SWAPPED[type(node.op)](), node.right))})"
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPPED:
        swapped = ast.Compare(node.left, [SWAPPED[type(node.ops[0])]()], node.comparators)
        yield node, f"({ast.unparse(swapped)})"
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield node, f"({ast.unparse(node.operand)})"
    if isinstance(node, ast.If | ast.IfExp):
        yield node.test, f"(not ({ast.unparse(node.test)}))"
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield node, str(node.value + 1)
    if isinstance(node, ast.Call):
        for left_out in [x for x in node.keywords if x.arg != "strict"]:
            rest = [x for x in node.keywords if x is not left_out]
            yield node, ast.unparse(ast.Call(node.func, node.args, rest))
        if isinstance(node.func, ast.Attribute) and node.func.attr in LEFT_OUT:
            yield node, ast.unparse(node.func.value)


def run_tests(folder: Path, tests: str) -> None:
    """Run tests in this process, write the output to a file, and exit with pytest's code."""
    import pytest

    os.setsid()
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(folder / "tests")
    os.environ["PYTHONPATH"] = str(folder)
    os.environ["NUMBA_CACHE_DIR"] = str(folder / "compiled")
    if tests.startswith("triton_"):
        os.environ["TRITON_INTERPRET"] = "1"
    sys.path[:0] = [str(folder), str(folder / "tests")]
    sys.exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]))


def code_of(folder: Path, tests: str) -> int | None:
    """pytest's exit code, or None after a timeout."""
    process = FORKS.Process(target=run_tests, args=(folder, tests))
    process.start()
    process.join(TIME_LIMIT)
    over = process.is_alive()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what the tests have started, too
    process.join()
    return None if over else process.exitcode


def noticed(folder: Path, mutant: Mutant) -> bool:
    """Whether a test fails with this change in the copy of the package."""
    path = folder / "graphcaps" / mutant.file
    text = path.read_bytes()
    path.write_bytes(mutant.of(text))
    try:
        code = code_of(folder, mutant.tests)
    finally:
        path.write_bytes(text)
    if code not in (None, 0, 1, 2):  # 2: what the tests import fails
        raise SystemExit(f"{mutant.name}: pytest ended with {code}\n{(folder / 'log').read_text()}")
    return code != 0


def main() -> int:
    """Run the selected mutants; returns 1 if some survive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="TEXT", help="those whose names have this in them")
    parser.add_argument("--list", action="store_true", help="print their names, and run none")
    parser.add_argument("--sample", type=int, default=40, help="how many small changes; 40")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    args = parser.parse_args()
    small = automatic()
    if args.only is None:
        small = random.Random(args.seed).sample(small, min(args.sample, len(small)))
    mutants = [
        mutant
        for mutant in (*by_hand(), *small)
        if (args.only or "") in mutant.name and not any(x in mutant.name for x in NO_FAULTS)
    ]
    for mutant in mutants:
        mutant.of((ROOT / "graphcaps" / mutant.file).read_bytes())  # the list is still right
    if args.list:
        print(*(mutant.name for mutant in mutants), sep="\n")
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("graphcaps", "tests", "scripts"):
            shutil.copytree(
                ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__")
            )
        shutil.copy(ROOT / "pyproject.toml", folder)
        # the time in a .pyc is in seconds: of two faults in one second the second would not be seen
        by_hash = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(folder / "graphcaps", quiet=1, invalidation_mode=by_hash)
        survivors, passing = [], {}  # the tests, and whether they pass without a fault
        for number, mutant in enumerate(mutants, start=1):
            if mutant.tests not in passing:
                passing[mutant.tests] = code_of(folder, mutant.tests) == 0
            trouble = ""
            if not passing[mutant.tests]:
                trouble = f": without it, this fails as well: pytest {mutant.tests}"
            elif not noticed(folder, mutant):
                trouble = ": SURVIVES"
            survivors += [mutant.name + trouble] if trouble else []
            print(f"{number}/{len(mutants)} {mutant.name}{trouble}", flush=True)
    print(f"{len(mutants)} mutants, {len(survivors)} survive", *survivors, sep="\n")
    return int(bool(survivors))


FORKS = multiprocessing.get_context("forkserver")

if __name__ == "__main__":
    FORKS.set_forkserver_preload(["torch", "numba", "hypothesis", "pytest"])
    sys.exit(main())
