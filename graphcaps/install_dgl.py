"""Installs DGL where PyPI has no build for this Python: `python -m graphcaps.install_dgl`.

DGL 1.1.3, the last on PyPI that works with any release of torch, is built for Python up to 3.11.
The only part of it that depends on the version of Python is an extension module that speeds up
calls into C; without it DGL uses ctypes. So the wheel for 3.11 works on every later Python.
"""

import base64
import hashlib
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from zipfile import ZipFile

VERSION = "1.1.3"
OWN_TAG, ANY_TAG = "cp311-cp311", "py3-none"
WHEELS = {  # pip's platform tag and the SHA-256 of the wheel
    ("Linux", "x86_64"): (
        "manylinux1_x86_64",
        "3fa4dde6e07768a2ca73f04fb8d3e585513f74987be911c4c1e97b94fedfcbe0",
    ),
    ("Linux", "aarch64"): (
        "manylinux2014_aarch64",
        "a8930e9de0d9cc38dc2b9c6d96023c2ce59fc5ee08e9bca028bb04f0e622244e",
    ),
    ("Darwin", "arm64"): (
        "macosx_11_0_arm64",
        "dfc13441376b47de7c7bba243bc3edfbcbe78e72c4d4d9cdb502b86d4db41ee4",
    ),
}


def main() -> int:
    """Install DGL into the environment of this Python, unless it has one."""
    try:
        print(f"DGL {version('dgl')} is installed")
        return 0
    except PackageNotFoundError:
        pass
    try:
        with tempfile.TemporaryDirectory() as folder:
            wheel = for_any_python(download(Path(folder)))
            _pip("install", str(wheel))
    except RuntimeError as error:
        print(f"graphcaps.install_dgl: {error}", file=sys.stderr)
        return 1
    return 0


def download(folder: Path) -> Path:
    """Download the wheel for Python 3.11 and this machine with pip.

    Args:
        folder: an empty folder for the wheel.

    Raises:
        RuntimeError: there is no wheel for this machine, pip cannot download it, or its checksum
            is wrong.
    """
    machine = platform.system(), platform.machine()
    if machine not in WHEELS:
        known = ", ".join(" ".join(each) for each in WHEELS)
        raise RuntimeError(
            f"DGL {VERSION} has wheels for {known}; this is {' '.join(machine)}: "
            "build DGL from its source"
        )
    tag, sha256 = WHEELS[machine]
    _pip(
        *("download", f"dgl=={VERSION}", "--no-deps", "--only-binary", ":all:"),
        *("--python-version", "3.11", "--platform", tag, "--dest", str(folder)),
    )
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        raise RuntimeError(
            f"expected {wheel.name} with SHA-256 {sha256}, got {found}: "
            "check which package index pip uses (pip config list)"
        )
    return wheel


def for_any_python(wheel: Path) -> Path:
    """Write a copy of the wheel, tagged for any Python 3, beside it."""
    tagged = wheel.with_name(wheel.name.replace(OWN_TAG, ANY_TAG))
    with ZipFile(wheel) as old, ZipFile(tagged, "w") as new:
        tags, record = (
            next(name for name in old.namelist() if name.endswith(f".dist-info/{file}"))
            for file in ("WHEEL", "RECORD")
        )
        changed = old.read(tags).replace(OWN_TAG.encode(), ANY_TAG.encode())
        lines = [
            _recorded(tags, changed) if line.startswith(f"{tags},") else line
            for line in old.read(record).decode().splitlines()
        ]
        replaced = {tags: changed, record: "\n".join([*lines, ""]).encode()}
        for entry in old.infolist():
            new.writestr(entry, replaced.get(entry.filename) or old.read(entry))
    return tagged


def _recorded(name: str, content: bytes) -> str:
    """A file's line in a wheel's RECORD."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    return f"{name},sha256={digest},{len(content)}"


def _pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], check=False)
    if done.returncode:
        raise RuntimeError(f"pip {arguments[0]} failed (above); DGL is not installed")


if __name__ == "__main__":
    sys.exit(main())
