"""Capsule networks whose routing is message passing on batched bipartite DGL graphs."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from graphcaps import _graphbolt, _interrupt

__version__ = "0.1.0"

_interrupt.end_in_one_line()  # before imports that take long
_graphbolt.stand_in()

if TYPE_CHECKING:
    from graphcaps._api import *  # noqa: F403
else:  # a type checker would take any name from a __getattr__

    def __getattr__(name: str) -> Any:
        """Import a module, or with the public names torch and DGL, when it is first used."""
        if name.startswith("_") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        # modules first: those that _api imports may import each other from here
        if importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f"{__name__}.{name}")
        from graphcaps import _api

        if name != "__all__" and name not in _api.__all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = getattr(_api, name)
        return globals()[name]

    def __dir__() -> list[str]:
        """The public names."""
        from graphcaps import _api

        return sorted([*_api.__all__, "__version__"])
