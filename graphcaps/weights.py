"""A module's weights enter, a safetensors file leaves, and back again."""

from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from graphcaps.files import write_whole


def save_weights(path: Path, module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Write all weights of a module.

    Args:
        path: the file.
        module: on any device.
        dtype: what they are rounded to; as they are, if not given.

    Raises:
        OSError: as `write_whole`.
    """
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in module.state_dict().items()
    }
    write_whole(path, safetensors.torch.save(tensors))


def load_weights(path: Path, module: nn.Module) -> None:
    """Put the weights of a file into a module, in the module's dtype.

    Args:
        path: a safetensors file.
        module: on any device; changed only if all of the weights fit.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a broken file, or the weights of another model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    try:
        found = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}); "
            "take a copy of it, or train again"
        ) from error
    expected = module.state_dict()
    for name in sorted(expected.keys() | found.keys()):
        here = list(expected[name].shape) if name in expected else "nothing"
        there = list(found[name].shape) if name in found else "nothing"
        if here != there:
            raise ValueError(
                f"{path} holds the weights of another model: "
                f"for {name} the model has {here}, the file {there}"
            )
    module.load_state_dict(found)
