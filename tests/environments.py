"""Creates environments that contain only the packages that some requirements need.

python tests/environments.py FOLDER REQUIREMENT ...     # links the packages into the folder
"""

import sys
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement


def needed(requirements: list[str]) -> dict[str, Distribution]:
    """The installed distributions that requirements need, including indirect dependencies."""
    found = {}
    todo = [(Requirement(text), "") for text in requirements]
    seen = set()
    while todo:
        requirement, of_extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": of_extra}):
            continue
        for extra in ("", *requirement.extras):
            if (requirement.name, extra) not in seen:
                seen.add((requirement.name, extra))
                found[requirement.name] = distribution(requirement.name)
                further = found[requirement.name].requires or []
                todo += [(Requirement(text), extra) for text in further]
    return found


def link(requirements: list[str], folder: Path) -> None:
    """Link packages and their metadata into a folder for PYTHONPATH."""
    folder.mkdir(parents=True, exist_ok=True)
    for installed in needed(requirements).values():
        for top in {file.parts[0] for file in installed.files or []}:
            place = folder / top
            if top not in ("..", "__pycache__") and not place.exists():
                place.symlink_to(installed.locate_file(top))


if __name__ == "__main__":
    link(sys.argv[2:], Path(sys.argv[1]))
