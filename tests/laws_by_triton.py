"""A pytest plugin that makes engine "fused" use the Triton kernels, in Triton's interpreter.

GRAPHCAPS_LAWS_BY_TRITON=1 TRITON_INTERPRET=1 pytest -p laws_by_triton tests/test_laws.py
"""


def pytest_configure():
    """Patch here rather than at import, because pytest imports every module for doctests."""
    import interpreted  # noqa: F401, makes the interpreter faster

    from graphcaps import kernels
    from graphcaps.kernels import ops, triton
    from graphcaps.kernels.triton import couple, dynamic

    kernels.prepare = triton.TritonEdges.of
    kernels.why_not = lambda device, dtype=None: triton.why_not(device)
    ops.couple_cpu, ops.dynamic_cpu = couple, dynamic
