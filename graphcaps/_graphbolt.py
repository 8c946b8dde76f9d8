"""Lets `import dgl` succeed under releases of torch that DGL was not built for."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType


def stand_in() -> None:
    """Prepare the import of DGL, wherever it is imported from now on, without importing it."""
    # Unset, DGL prints a notice and writes a file into the home directory.
    os.environ.setdefault("DGLBACKEND", "pytorch")
    if "dgl" in sys.modules:
        return
    spec = importlib.util.find_spec("dgl")
    if spec and spec.origin and _would_fail(Path(spec.origin).parent):
        sys.modules["dgl.graphbolt"] = _Graphbolt("dgl.graphbolt")


class _Graphbolt(ModuleType):
    """Stands in for `dgl.graphbolt`, DGL's data loading, which graphcaps does not use."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # what the import system and inspection ask of any module
            raise AttributeError(name)
        raise RuntimeError(
            f"dgl.graphbolt.{name} is not available: this DGL has no graphbolt library for "
            f"torch {_torch_release()}, so graphcaps imported DGL without it. "
            "For graphbolt, install a DGL that was built for this torch."
        )


def _would_fail(dgl_folder: Path) -> bool:
    """DGL 2 imports graphbolt at once: a library per torch release, on top of torchdata's pipes."""
    folder = dgl_folder / "graphbolt"
    if not folder.is_dir():
        return False
    has_library = any(folder.glob(f"*graphbolt_pytorch_{_torch_release()}.*"))
    has_pipes = (
        importlib.util.find_spec("torchdata") is not None
        and importlib.util.find_spec("torchdata.datapipes") is not None
    )
    return not (has_library and has_pipes)


def _torch_release() -> str:
    """The installed release of torch, without importing it."""
    from importlib.metadata import PackageNotFoundError, version  # only DGL 2 needs it

    try:
        return version("torch").split("+")[0]
    except PackageNotFoundError:
        return "none"
