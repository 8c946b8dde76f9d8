"""Runs Triton kernels in Triton's interpreter, without a GPU, and compares their results."""

import torch
import triton.language as tl
from triton.runtime import interpreter

if not torch.cuda.is_available():
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function):
        """Patch `tl` once; the interpreter would patch it at each call, for 3/4 of the time."""
        modules = frozenset(id(x) for x in function.__globals__.values() if x in (tl, tl.core))
        if modules not in patched:
            patched.add(modules)
            patch(function)
        return interpreter._LangPatchScope()  # with nothing to take back

    interpreter._patch_lang = patch_once

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def assert_near(got, truth, rival=None, units=16):
    """Check results within some ulp of the largest value, plus twice the error of a rival."""
    assert got.keys() == truth.keys()
    for name, right in truth.items():
        actual, other = got[name].cpu().double(), (rival or truth)[name].double()
        assert actual.shape == right.shape, name
        if right.numel():
            unit = torch.finfo(got[name].dtype).eps * right.abs().max()
            error, allowed = (actual - right).abs().max(), 2 * (other - right).abs().max()
            allowed += units * unit
            assert error <= allowed, f"{name}: {error / unit:.1f}, allowed {allowed / unit:.1f}"
