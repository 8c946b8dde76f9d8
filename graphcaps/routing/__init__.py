"""Votes on the edges of a batched graph enter, the parents' outputs leave, iteration by iteration.

Each algorithm is written once, over the four verbs of `graphcaps.passing`, and yields an
`Iteration` at a time: the last one is the result, all of them are what there is to see.
"""

from graphcaps.routing.dynamic import dynamic_routing
from graphcaps.routing.iteration import Iteration
from graphcaps.routing.trace import Trace
from graphcaps.routing.uniform import uniform_routing

__all__ = ["Iteration", "Trace", "dynamic_routing", "uniform_routing"]
