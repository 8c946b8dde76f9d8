"""Weights of modules in safetensors files, validated when they are read."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from graphcaps.files import open_regular, write_whole

Shape = tuple[int, ...]


def save_weights(path: Path, module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Write all weights of a module.

    Args:
        path: the file.
        module: on any device.
        dtype: type to which they are rounded; unchanged by default.

    Raises:
        OSError: see `write_whole`.
    """
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in module.state_dict().items()
    }
    write_whole(path, safetensors.torch.save(tensors))


def check_weights(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Check that weights written by `save_weights` can be loaded again.

    Args:
        module: a module on any device.
        dtype: the type to which they would be rounded.

    Raises:
        ValueError: `dtype` is not a floating-point type, or weights are not finite, or not finite
            in that dtype.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"weights can only be saved in a floating-point dtype; got {dtype}")
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not tensor.to(dtype or tensor.dtype).isfinite().all():
            raise ValueError(
                f"{name} holds numbers that are not finite{f' in {dtype}' if dtype else ''}, and "
                "could not be loaded; save a net that was trained with a lower learning rate"
                + (", or in another dtype" if dtype else "")
            )


def read_shapes(path: Path) -> dict[str, Shape]:
    """Read the shape of every tensor in a file from its header.

    Args:
        path: a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged.
        OSError: the file cannot be read.
    """
    with open_regular(
        path
    ):  # for its messages: safetensors waits for pipes and does not name the file
        pass
    try:
        with safetensors.safe_open(path, "pt") as file:
            names = file.keys()
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}); "
            "take a copy of it, or train again"
        ) from error


def load_weights(path: Path, module: nn.Module) -> None:
    """Load the weights of a file into a module, in the module's dtypes.

    Args:
        path: a safetensors file.
        module: a module on any device; it is modified only if all weights match.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or has the weights of another model or weights that are not
            finite.
        OSError: the file cannot be read.
    """
    expected = module.state_dict()
    different = first_difference(
        {name: tuple(tensor.shape) for name, tensor in expected.items()}, read_shapes(path)
    )
    if different is not None:
        raise ValueError(f"{path} holds the weights of another model: {different}")
    weights = {}
    for name, tensor in safetensors.torch.load_file(path).items():
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(
                f"{path}: expected {name} in {expected[name].dtype}, got {tensor.dtype}"
            )
        weights[name] = tensor.to(expected[name].dtype)
        if not weights[name].isfinite().all():
            raise ValueError(
                f"{path}: {name} holds numbers that are not finite; "
                "take a copy of it, or train again with a lower learning rate"
            )
    module.load_state_dict(weights)


def first_difference(
    expected: Mapping[str, Shape], found: Mapping[str, Shape | None]
) -> str | None:
    """Return the first parameter, by name, with an unexpected shape, or None."""
    for name in sorted(expected.keys() | found.keys()):
        here, there = expected.get(name), found.get(name)
        if here != there:
            ours, theirs = ("nothing" if s is None else list(s) for s in (here, there))
            return f"for {name} expected {ours}, got {theirs}"
    return None
