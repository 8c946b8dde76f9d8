"""Prepare a release, except for the upload.

    python scripts/release.py 0.2.0     # make release VERSION=0.2.0
    python scripts/release.py           # build and test without a new version

The script writes the version into the package, CITATION.cff and CHANGELOG.md, builds and checks
sdist and wheel, installs the wheel into a new environment, and runs the tests of the sdist there.
Finally it prints the commands for commit, tag and upload.
"""

import datetime
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
UNRELEASED = "## [Unreleased]\n"


def with_version(texts: dict[str, str], version: str, date: str) -> dict[str, str]:
    """Put a new version into the text of the files that contain the version.

    Args:
        texts: `graphcaps/__init__.py`, `CITATION.cff` and `CHANGELOG.md`.
        version: the new version, such as 0.2.0.
        date: the day of the release, such as 2026-11-22.

    Returns:
        Their new content.

    Raises:
        ValueError: the version is not of the form 1.2.3 or not above the present one, or
            CHANGELOG.md has nothing under Unreleased.
    """
    init, citation, changelog = texts.values()
    found = re.search(r'^__version__ = "(.*)"$', init, re.MULTILINE)
    assert found
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ValueError(f"expected a version such as 0.2.0; got {version!r}")
    if _numbers(version) <= _numbers(found[1]):
        raise ValueError(f"expected a version above {found[1]}; got {version}")
    before, _, after = changelog.partition(UNRELEASED)
    if not after.strip() or after.strip().startswith("## "):
        raise ValueError("CHANGELOG.md has nothing under Unreleased: describe the changes first")
    citation = re.sub(r"(?m)^version: .*$", f"version: {version}", citation)
    citation = re.sub(r"(?m)^date-released: .*$", f"date-released: {date}", citation)
    heading = f"{UNRELEASED}\n## [{version}] - {date}\n"
    new = (init.replace(found[0], f'__version__ = "{version}"'), citation, before + heading + after)
    return dict(zip(texts, new, strict=True))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def set_version(version: str) -> None:
    """Write the version into the files that contain it; the checkout must be clean.

    Raises:
        ValueError: as `with_version`, or the checkout has changes.
    """
    if subprocess.check_output(["git", "status", "--porcelain"], cwd=ROOT):
        raise ValueError("the checkout has changes: commit or stash them first")
    names = ("graphcaps/__init__.py", "CITATION.cff", "CHANGELOG.md")
    texts = {name: (ROOT / name).read_text() for name in names}
    today = datetime.date.today().isoformat()
    for name, text in with_version(texts, version, today).items():
        (ROOT / name).write_text(text)


def build() -> tuple[Path, Path]:
    """Build sdist and wheel into `dist/`, and check their metadata as a package index would."""
    for old in DIST.glob("graphcaps-*"):
        old.unlink()
    _run(sys.executable, "-m", "build", "--outdir", DIST, ROOT)
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    _run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    return sdist, wheel


def run_tests(sdist: Path, wheel: Path) -> None:
    """Install the wheel into a new environment and run the tests of the sdist on it."""
    with tempfile.TemporaryDirectory(prefix="graphcaps-release-") as name:
        folder = Path(name)
        _run(sys.executable, "-m", "venv", folder / "venv")
        python = folder / "venv" / "bin" / "python"
        pinned = ("--constraint", ROOT / "constraints.txt")
        _run(python, "-m", "pip", "install", *pinned, f"{wheel}[train,dev]")
        _run(python, "-m", "graphcaps.install_dgl")
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        (source,) = folder.glob("graphcaps-*")
        # from another folder, so that the installed package is imported
        parallel = ("--numprocesses", "logical", "--maxprocesses", "4", "--dist", "loadfile")
        _run(python, "-m", "pytest", *parallel, source / "tests", cwd=folder)


def _run(*command: str | Path, cwd: Path | None = None) -> None:
    print("$", *command, flush=True)
    subprocess.run(command, check=True, cwd=cwd)


def main() -> int:
    """Prepare a release; the version is an argument."""
    version = sys.argv[1] if len(sys.argv) > 1 else None
    try:
        if version:
            set_version(version)
        sdist, wheel = build()
        run_tests(sdist, wheel)
    except (ValueError, subprocess.CalledProcessError) as error:
        print(f"release.py: {error}", file=sys.stderr)
        return 1
    if version:
        print(
            f"\nTo release it:\n  git commit --all --message 'graphcaps {version}'\n"
            f"  git tag v{version}\n  git push --follow-tags\n  twine upload {sdist} {wheel}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
