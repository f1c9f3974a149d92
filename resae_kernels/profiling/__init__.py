"""Cost of the ops: against alternatives, against the roofs of the machine, by tile of a kernel.

`specs` describes each op (least work, inputs, providers, check), `clock` times calls, `measuring`
makes the rows, `tuning` finds the fastest tiles of the kernels on a GPU.
"""

from resae_kernels.profiling.clock import Clock, Roofs, measure_roofs
from resae_kernels.profiling.measuring import profile, table, trace
from resae_kernels.profiling.specs import Case, Inputs, Peer, Provider, make_inputs
from resae_kernels.profiling.tuning import active_tiles, tune

__all__ = [
    "Case",
    "Clock",
    "Inputs",
    "Peer",
    "Provider",
    "Roofs",
    "make_inputs",
    "measure_roofs",
    "profile",
    "table",
    "active_tiles",
    "trace",
    "tune",
]
