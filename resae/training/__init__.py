"""Training: one call of `run` does everything, from the model's name to the run directory.

from resae.training import RunConfig, run

config = RunConfig(model="embedded", data="embedded", layers=("1", "3", "5"), k=8, out="runs/first")
stack = run(config).stack

finetune(FinetuneConfig(run="runs/first", out="runs/online"))    # with all layers replaced
"""

from typing import TYPE_CHECKING

from resae.lazy import on_demand
from resae.training.config import FinetuneConfig, FitConfig, OnlineConfig, RunConfig, TrainConfig

if TYPE_CHECKING:
    from resae.training.finetuning import finetune
    from resae.training.online import train_online
    from resae.training.pipeline import Run, fit_maps, run

__all__ = [
    "FinetuneConfig",
    "FitConfig",
    "OnlineConfig",
    "Run",
    "RunConfig",
    "TrainConfig",
    "finetune",
    "fit_maps",
    "run",
    "train_online",
]

# What needs torch is imported when it is first used: the command line reads the configs without.
_MODULES = {
    "finetuning": ("finetune",),
    "online": ("train_online",),
    "pipeline": ("Run", "fit_maps", "run"),
}
__getattr__, __dir__ = on_demand(__name__, _MODULES)
