"""Converts docstrings to the form that mkdocstrings parses."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"(?:^>>>.*\n(?:^.+\n?)*)", re.MULTILINE)
SEVERAL = re.compile(r"^ {4}((?:\w+, )+\w+): (.*\n(?: {8}.*\n)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Renders examples as code, and splits arguments that share a description."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of an object."""
        if obj.docstring is not None:
            text = SEVERAL.sub(_one_by_one, obj.docstring.value + "\n")
            obj.docstring.value = EXAMPLE.sub(_fenced, text)


def _one_by_one(found: re.Match[str]) -> str:
    return "".join(f"    {name}: {found[2]}" for name in found[1].split(", "))


def _fenced(found: re.Match[str]) -> str:
    return f"```pycon\n{found[0].rstrip()}\n```\n"
