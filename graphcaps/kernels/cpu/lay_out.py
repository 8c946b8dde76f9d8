"""Chooses the memory layout for a call: samples in lanes, or the numbers of a pose in lanes."""

from collections.abc import Sequence

from torch import Tensor

from graphcaps.kernels.cpu.by_pose import PosesInLanes
from graphcaps.kernels.cpu.by_sample import SamplesInLanes
from graphcaps.kernels.cpu.parts import Facts, Parts

COST_OF_A_POSE = 2.6  # of a lane, relative to samples in lanes: dot products sum across lanes
COST_OF_SPREADING = 10  # a matrix over the rows of a pose, relative to the votes of one sample


def make_parts(
    u: Tensor, weight: Tensor, edges: Sequence[Tensor], parents: int, rows: int
) -> Parts:
    """Return the layout with less work, empty lanes included; for the arguments, see `Parts`."""
    facts = Facts(*edges[-1].tolist())
    samples, pose, count = len(u), rows * weight.shape[2], max(1, len(edges[1]))
    by_sample = SamplesInLanes.lanes_of(samples) * pose
    by_pose = samples * (1 + u.shape[1] / count)  # expanding a child's pose costs a vote
    by_pose += COST_OF_SPREADING * (rows > 1) * len(weight) / count
    by_pose *= COST_OF_A_POSE * PosesInLanes.lanes_of(pose)
    if facts.by_child and by_sample <= by_pose:
        return SamplesInLanes(u, weight, edges, parents, rows)
    return PosesInLanes(u, weight, edges, parents, rows)
