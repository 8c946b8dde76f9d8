"""A bare installation, DGL for Pythons without a package on PyPI, and the Python that make uses.

`make test-pythons` installs into empty environments of every Python on the machine.
"""

import ast
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from base64 import urlsafe_b64encode
from pathlib import Path
from zipfile import ZipFile

import pytest
from environments import link
from packaging.tags import Tag, sys_tags
from packaging.utils import parse_wheel_filename
from PIL import Image

from graphcaps import install_dgl

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_bare_package_routes_helps_and_predicts(tmp_path):
    """Only the declared dependencies, direct and indirect, are on Python's path."""
    link([*PROJECT["dependencies"], "dgl"], tmp_path / "packages")
    one = Image.new("L", (28, 28), 255)
    one.paste(0, (13, 4, 16, 24))
    one.save(tmp_path / "digit.png")
    program = """
import sys
import torch
import graphcaps as gc
from graphcaps.__main__ import main
for engine in ("builtin", "fused"):
    layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 8, 16, engine=engine)
    assert layer(torch.rand(2, 6, 8)).shape == (2, 3, 16)
for arguments in (["predict", "digit.png"], ["--help"]):
    sys.argv[1:] = arguments
    assert main() == 0
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / 'packages'}"},
    )
    assert done.returncode == 0, done.stderr  # --help ends the program with 0
    assert "digit.png: 1\n" in done.stdout
    assert "usage" in done.stdout


def test_whatever_is_imported_is_declared():
    of_module = {"PIL": "pillow", "pydantic_core": "pydantic"}
    with_torch = {"triton"}  # where there is one
    declared = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["train"]]
    known = {text.split(";")[0].split(">")[0].split("=")[0] for text in declared}
    for path in (ROOT / "graphcaps").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in {module.split(".")[0] for module in modules}:
                if module not in sys.stdlib_module_names | with_torch | {"graphcaps"}:
                    assert of_module.get(module, module) in known, f"{path} imports {module}"


def write_wheel(path):
    """A package laid out like DGL's wheel."""
    files = {
        "dgl/__init__.py": b"",
        "dgl-1.1.3.dist-info/WHEEL": b"Wheel-Version: 1.0\nTag: cp311-cp311-manylinux1_x86_64\n",
    }
    record = [f"{name},{digest(content)},{len(content)}" for name, content in files.items()]
    record.append("dgl-1.1.3.dist-info/RECORD,,")
    with ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
        wheel.writestr("dgl-1.1.3.dist-info/RECORD", "\n".join(record))
    return path


def digest(content):
    return f"sha256={urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip('=')}"


def test_the_wheel_of_python_3_11_becomes_one_for_any_python(tmp_path):
    old = write_wheel(tmp_path / "dgl-1.1.3-cp311-cp311-manylinux1_x86_64.whl")
    new = install_dgl.for_any_python(old)
    _, _, _, tags = parse_wheel_filename(new.name)
    assert tags == {Tag("py3", "none", "manylinux1_x86_64")}
    with ZipFile(new) as wheel:
        names = wheel.namelist()
        assert names == ZipFile(old).namelist()
        assert b"Tag: py3-none-manylinux1_x86_64\n" in wheel.read("dgl-1.1.3.dist-info/WHEEL")
        lines = wheel.read("dgl-1.1.3.dist-info/RECORD").decode().splitlines()
        assert lines[-1] == "dgl-1.1.3.dist-info/RECORD,,"
        for name, line in zip(names[:-1], lines[:-1], strict=True):
            content = wheel.read(name)
            assert line == f"{name},{digest(content)},{len(content)}"


@pytest.fixture
def without_dgl(tmp_path, monkeypatch):
    """Pretend an x86 Linux without DGL, where pip downloads a valid wheel; yields its commands."""
    wheel = write_wheel(tmp_path / "dgl-1.1.3-cp311-cp311-manylinux1_x86_64.whl")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    commands = []

    def pip(*command):
        commands.append(command)
        if command[0] == "download":
            shutil.copy(wheel, command[-1])

    def version(name):
        raise install_dgl.PackageNotFoundError(name)

    monkeypatch.setattr(install_dgl, "_pip", pip)
    monkeypatch.setattr(install_dgl, "version", version)
    monkeypatch.setitem(install_dgl.WHEELS, ("Linux", "x86_64"), ("manylinux1_x86_64", sha256))
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    return commands


def test_dgl_is_fetched_checked_and_installed(without_dgl):
    assert install_dgl.main() == 0
    download, install = without_dgl
    assert download[:3] == ("download", "dgl==1.1.3", "--no-deps")
    assert install[0] == "install"
    assert Path(install[1]).name == "dgl-1.1.3-py3-none-manylinux1_x86_64.whl"


def test_another_file_than_the_known_wheel_is_not_installed(without_dgl, monkeypatch, capsys):
    known = ("manylinux1_x86_64", "0" * 64)
    monkeypatch.setitem(install_dgl.WHEELS, ("Linux", "x86_64"), known)
    assert install_dgl.main() == 1
    assert [command[0] for command in without_dgl] == ["download"]
    assert f"with SHA-256 {'0' * 64}, got" in capsys.readouterr().err


def test_a_machine_that_dgl_has_no_wheel_for_is_told(without_dgl, monkeypatch, capsys):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert install_dgl.main() == 1
    assert not without_dgl
    assert "this is Linux riscv64: build DGL from its source" in capsys.readouterr().err


def test_dgl_that_is_installed_is_left_alone(without_dgl, monkeypatch, capsys):
    monkeypatch.setattr(install_dgl, "version", lambda name: "2.4.0+cu124")
    assert install_dgl.main() == 0
    assert not without_dgl
    assert capsys.readouterr().out == "DGL 2.4.0+cu124 is installed\n"


def test_pip_installs_the_wheel_that_is_known_for_this_machine():
    machine = platform.system(), platform.machine()
    if machine not in install_dgl.WHEELS:
        pytest.skip(f"DGL has no wheel for {machine}")
    platform_tag, _ = install_dgl.WHEELS[machine]
    assert Tag("py3", "none", platform_tag) in set(sys_tags())


def test_install_dgl_runs_where_neither_dgl_nor_torch_is(tmp_path):
    """It also reports that pip failed; the pip here always fails."""
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()
    (tmp_path / "pip" / "__main__.py").write_text("import sys; sys.exit('no network')")
    done = subprocess.run(
        [sys.executable, "-S", "-m", "graphcaps.install_dgl"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "no network",
        "graphcaps.install_dgl: pip download failed (above); DGL is not installed",
    ]


def make(*arguments, path):
    """Run make without an environment and with only this folder on PATH."""
    program = shutil.which("make")
    if program is None:
        pytest.skip("make is not on PATH")
    return subprocess.run(
        [program, "test", f"VENV={path / 'venv'}", *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": str(path)},
    )


def put_python(path, name, *, fits):
    """A fake Python that answers make's question whether its version fits."""
    (path / name).write_text(f"#!/bin/sh\nexit {0 if fits else 1}\n")
    (path / name).chmod(0o755)


def test_make_takes_the_first_python_on_path_that_fits(tmp_path):
    put_python(tmp_path, "python3", fits=False)
    put_python(tmp_path, "python3.12", fits=True)
    put_python(tmp_path, "python3.11", fits=True)
    assert f"python3.12 -m venv {tmp_path / 'venv'}" in make("--dry-run", path=tmp_path).stdout


def test_make_says_what_it_needs_where_no_python_fits(tmp_path):
    put_python(tmp_path, "python3", fits=False)
    done = make(path=tmp_path)
    assert done.returncode != 0
    needs = "graphcaps needs Python 3.11 or newer, with venv; "
    assert f"{needs}none is on PATH: make PYTHON=/path/to/one" in done.stderr
    assert f"{needs}python3 is not one" in make("PYTHON=python3", path=tmp_path).stderr
