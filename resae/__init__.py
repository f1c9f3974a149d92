"""Multi-layer sparse autoencoders on affine residuals (ReSAE, arXiv 2605.27819), on Hugging Face
models.

lm = HookedLM.from_pretrained("embedded")
stack = ReSAE.from_pretrained("path/to/run")
with replacement(lm, stack) as replaced:
    lm.model.generate(...)
replaced.counts
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resae.activation_cache import ActivationCache
    from resae.affine import AffinePredictor, Moments, fit_predictor
    from resae.data import (
        ActivationBatches,
        ModelActivations,
        StoredActivations,
        TokenRows,
        load_texts,
    )
    from resae.decode_loop import DecodeLoop
    from resae.evaluate import Method, evaluate
    from resae.intervene import (
        Change,
        Edit,
        Interventions,
        StrongestLatents,
        predicted_effects,
    )
    from resae.model import FAMILIES, Family, HookedLM, HookPoint
    from resae.replace import generate, replacement
    from resae.sae import BoostedSAE, SAEConfig, TopKSAE
    from resae.stack import AffineOnly, ReSAE
    from resae.train import Calibration, TrainConfig, train, train_step

__all__ = [
    "FAMILIES",
    "ActivationBatches",
    "ActivationCache",
    "AffineOnly",
    "AffinePredictor",
    "BoostedSAE",
    "Calibration",
    "Change",
    "DecodeLoop",
    "Edit",
    "Family",
    "HookPoint",
    "HookedLM",
    "Interventions",
    "Method",
    "ModelActivations",
    "Moments",
    "ReSAE",
    "SAEConfig",
    "StoredActivations",
    "StrongestLatents",
    "TokenRows",
    "TopKSAE",
    "TrainConfig",
    "evaluate",
    "fit_predictor",
    "generate",
    "load_texts",
    "predicted_effects",
    "replacement",
    "train",
    "train_step",
]

# Each name is imported when it is first used (PEP 562): most of them need torch, and `resae --help`
# is to answer without it. Type checkers read the imports above; a test compares the two lists.
_MODULES = {
    "activation_cache": ("ActivationCache",),
    "affine": ("AffinePredictor", "Moments", "fit_predictor"),
    "data": (
        "ActivationBatches",
        "ModelActivations",
        "StoredActivations",
        "TokenRows",
        "load_texts",
    ),
    "decode_loop": ("DecodeLoop",),
    "evaluate": ("Method", "evaluate"),
    "intervene": ("Change", "Edit", "Interventions", "StrongestLatents", "predicted_effects"),
    "model": ("FAMILIES", "Family", "HookPoint", "HookedLM"),
    "replace": ("generate", "replacement"),
    "sae": ("BoostedSAE", "SAEConfig", "TopKSAE"),
    "stack": ("AffineOnly", "ReSAE"),
    "train": ("Calibration", "TrainConfig", "train", "train_step"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("resae")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Python sets each imported submodule as an attribute of its package: `resae.train` and
    `resae.evaluate` stay the functions of these names all the same."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
