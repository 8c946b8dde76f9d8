"""Tests laws, layers and a bare installation on every Python 3.11 or newer on this machine.

    python tests/pythons.py             # make test-pythons
    python tests/pythons.py 3.13 3.14   # these only

Each Python gets two environments in a temporary folder: one with all packages, in which the tests
run, and an empty one, into which pip installs graphcaps as a user would. The packages that torch
requires, most of 6 GB, are linked from the first into the second instead of installed twice.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[1]
RELEASED = ("3.11", "3.12", "3.13", "3.14")
TESTS = ("test_laws.py", "test_layers.py", "test_threads.py", "test_dgl.py", "test_installation.py")
FORWARD = """
import torch
import graphcaps as gc
for engine in ("udf", "builtin", "scatter", "fused"):
    layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 8, 16, engine=engine)
    u = torch.rand(2, 6, 8, requires_grad=True)
    layer(u).sum().backward()
    assert u.grad.isfinite().all()
"""


def find_pythons() -> dict[str, Path]:
    """The first Python of each version on PATH or in pyenv that can create venvs."""
    names = [f"python3.{minor}" for minor in range(11, 30)] + ["python3"]
    folders = [Path(folder) for folder in os.get_exec_path()]
    folders += sorted(_pyenv().glob("versions/*/bin"))
    found: dict[str, Path] = {}
    for python in (folder / name for folder in folders for name in names):
        if not python.is_file():
            continue
        program = "import ensurepip, sys; print(*sys.version_info[:2], sep='.')"
        asked = subprocess.run([python, "-c", program], check=False, capture_output=True, text=True)
        if asked.returncode == 0:
            found.setdefault(asked.stdout.strip(), python)
    return {version: found[version] for version in sorted(found) if _number(version) >= (3, 11)}


def _pyenv() -> Path:
    if shutil.which("pyenv"):
        return Path(subprocess.check_output(["pyenv", "root"], text=True).strip())
    return Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


class Environment:
    """A venv whose commands write into a log.

    Args:
        python: what it is made with.
        folder: where; it does not exist.
        log: a file.
        variables: of the commands' environment, beside those of this process.
    """

    def __init__(self, python: Path, folder: Path, log: Path, **variables: str) -> None:
        self.folder, self.log, self.variables = folder, log, variables
        self._run([python, "-m", "venv", folder])

    def run(self, program: str, *arguments: str | Path) -> str:
        """Run one of its programs outside the repository; what it prints, if it succeeds.

        Raises:
            subprocess.CalledProcessError: it fails.
        """
        return self._run([self.folder / "bin" / program, *arguments])

    def _run(self, command: list[str | Path]) -> str:
        done = subprocess.run(
            command,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder.parent,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | self.variables,
        )
        with self.log.open("a") as log:
            print("$", *command, f"\n{done.stdout}", file=log)
        done.check_returncode()
        return done.stdout


def run_tests(whole: Environment) -> None:
    """Install all packages, as make does, and run the tests."""
    whole.run("pip", "install", "--editable", f"{ROOT}[train,dev]")
    whole.run("python", "-m", "graphcaps.install_dgl")
    parallel = ("--numprocesses", "logical", "--maxprocesses", "4", "--dist", "loadfile")
    whole.run("pytest", "--rootdir", ROOT, *parallel, *(ROOT / "tests" / name for name in TESTS))


def try_bare(bare: Environment, whole: Environment) -> None:
    """Install only the package, as a user would, and use it."""
    folder = bare.folder.parent
    whole.run("python", ROOT / "tests" / "environments.py", folder / "linked", "torch")
    (packages,) = bare.folder.glob("lib/python*/site-packages")
    (packages / "linked.pth").write_text(f"{folder / 'linked'}\n")
    bare.run("pip", "install", ROOT)
    try:
        bare.run("python", "-c", "from graphcaps import CapsuleLayer")
    except subprocess.CalledProcessError as error:
        last = error.output.splitlines()[-1]
        if not last.endswith("DGL is not installed: python -m graphcaps.install_dgl"):
            raise
        bare.run("python", "-m", "graphcaps.install_dgl")
    bare.run("pip", "check")
    bare.run("graphcaps", "--help")
    one = Image.new("L", (28, 28), 255)
    one.paste(0, (13, 4, 16, 24))
    one.save(folder / "digit.png")
    said = bare.run("graphcaps", "predict", "digit.png")
    assert said.startswith("digit.png: 1\n"), said
    bare.run("python", "-c", FORWARD)


def main() -> int:
    """Try each Python; the exit status is the number of those that failed."""
    found, failed = find_pythons(), 0
    for version in sys.argv[1:] or sorted({*RELEASED, *found}, key=_number):
        if version not in found:
            print(f"Python {version}: not on this machine, not tried", flush=True)
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"graphcaps-{version}-") as name:
            folder = Path(name)
            log = folder / "log"
            try:
                pinned = str(ROOT / "constraints.txt")
                whole = Environment(
                    found[version],
                    folder / "whole",
                    log,
                    PIP_CONSTRAINT=pinned,
                    OMP_NUM_THREADS="1",
                )
                run_tests(whole)
                try_bare(Environment(found[version], folder / "bare", log), whole)
                said = "passed"
            except (subprocess.CalledProcessError, AssertionError) as error:
                failed += 1
                said = f"FAILED: {error}"
                print(*log.read_text().splitlines()[-60:], sep="\n")
        minutes = (time.monotonic() - started) / 60
        print(f"Python {version} ({found[version]}): {said} in {minutes:.1f} min", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
