"""Training: one call of `run` does everything, from the model's name to the run directory.

from resae.training import RunConfig, run

config = RunConfig(model="embedded", data="embedded", layers=("1", "3", "5"), k=8, out="runs/first")
stack = run(config).stack
"""

from typing import TYPE_CHECKING

from resae.lazy import on_demand
from resae.training.config import FitConfig, RunConfig, TrainConfig

if TYPE_CHECKING:
    from resae.training.pipeline import Run, fit_maps, run

__all__ = ["FitConfig", "Run", "RunConfig", "TrainConfig", "fit_maps", "run"]

# What needs torch is imported when it is first used: the command line reads the configs without.
__getattr__, __dir__ = on_demand(__name__, {"pipeline": ("Run", "fit_maps", "run")})
