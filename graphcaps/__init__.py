"""Capsule networks whose routing is message passing on batched bipartite DGL graphs."""

from typing import TYPE_CHECKING, Any

from graphcaps import _graphbolt, _interrupt

__version__ = "0.1.0"

_interrupt.end_in_one_line()  # before imports that take long
_graphbolt.stand_in()

if TYPE_CHECKING:
    from graphcaps._api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    """Import the public names when the first is asked for, so that help need not wait for torch."""
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from graphcaps import _api

    if name in _api.__all__ or name == "__all__":
        globals()[name] = getattr(_api, name)
    if name not in globals():  # modules, such as graphcaps.layers, are there by now
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]


def __dir__() -> list[str]:
    """The public names."""
    from graphcaps import _api

    return sorted([*_api.__all__, "__version__"])
