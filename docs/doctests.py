"""Shows the examples of docstrings as code."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"(?:^>>>.*\n(?:^.+\n?)*)", re.MULTILINE)


class Doctests(griffe.Extension):
    """Puts each block that starts with `>>>` into a fence."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of an object."""
        if obj.docstring is not None:
            text = obj.docstring.value + "\n"
            obj.docstring.value = EXAMPLE.sub(
                lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text
            )
