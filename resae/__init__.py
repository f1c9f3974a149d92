"""Multi-layer sparse autoencoders on affine residuals (ReSAE, arXiv 2605.27819), on Hugging Face
models.

lm = HookedLM.from_pretrained("embedded")
stack = ReSAE.from_pretrained("path/to/run")
with replacement(lm, stack) as replaced:
    lm.model.generate(...)
replaced.counts
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from resae.lazy import on_demand

if TYPE_CHECKING:
    from resae.data.activations import ModelActivations
    from resae.data.batches import ActivationBatches, StoredActivations
    from resae.data.cache import ActivationCache
    from resae.data.rows import TokenRows
    from resae.data.texts import load_texts
    from resae.evaluation.attribution import LatentGradients, latent_gradients
    from resae.evaluation.comparison import evaluate
    from resae.evaluation.graphs import FeatureGraph, feature_graph
    from resae.evaluation.methods import Method
    from resae.interop.formats import export_sae, import_sae
    from resae.latents.cards import describe_latents
    from resae.latents.collect import collect_latents
    from resae.latents.index import LatentIndex
    from resae.models.families import FAMILIES, Family
    from resae.models.hooked import HookedLM
    from resae.models.points import HookPoint
    from resae.replacements.context import replacement
    from resae.replacements.decode_loop import DecodeLoop
    from resae.replacements.edits import (
        Change,
        Edit,
        Interventions,
        StrongestLatents,
        predicted_effects,
    )
    from resae.replacements.generation import generate
    from resae.report.graph_page import write_graph
    from resae.sae.base import SAEConfig
    from resae.sae.boosted import BoostedSAE
    from resae.sae.threshold import ThresholdSAE
    from resae.sae.topk import TopKSAE
    from resae.stack.affine import AffinePredictor
    from resae.stack.fit import Moments, fit_predictor
    from resae.stack.stack import AffineOnly, ReSAE
    from resae.training.calibration import Calibration
    from resae.training.config import TrainConfig
    from resae.training.loop import train
    from resae.training.step import train_step

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
    "FeatureGraph",
    "HookPoint",
    "HookedLM",
    "Interventions",
    "LatentGradients",
    "LatentIndex",
    "Method",
    "ModelActivations",
    "Moments",
    "ReSAE",
    "SAEConfig",
    "StoredActivations",
    "StrongestLatents",
    "ThresholdSAE",
    "TokenRows",
    "TopKSAE",
    "TrainConfig",
    "collect_latents",
    "describe_latents",
    "evaluate",
    "export_sae",
    "feature_graph",
    "fit_predictor",
    "generate",
    "import_sae",
    "latent_gradients",
    "load_texts",
    "predicted_effects",
    "replacement",
    "train",
    "train_step",
    "write_graph",
]

# Each name is imported when it is first used (PEP 562): most of them need torch, and `resae --help`
# is to answer without it. Type checkers read the imports above; a test compares the two lists.
_MODULES = {
    "data.activations": ("ModelActivations",),
    "data.batches": (
        "ActivationBatches",
        "StoredActivations",
    ),
    "data.cache": ("ActivationCache",),
    "data.rows": ("TokenRows",),
    "data.texts": ("load_texts",),
    "evaluation.attribution": (
        "LatentGradients",
        "latent_gradients",
    ),
    "evaluation.comparison": ("evaluate",),
    "evaluation.graphs": (
        "FeatureGraph",
        "feature_graph",
    ),
    "evaluation.methods": ("Method",),
    "interop.formats": (
        "export_sae",
        "import_sae",
    ),
    "latents.cards": ("describe_latents",),
    "latents.collect": ("collect_latents",),
    "latents.index": ("LatentIndex",),
    "models.families": (
        "FAMILIES",
        "Family",
    ),
    "models.hooked": ("HookedLM",),
    "models.points": ("HookPoint",),
    "replacements.context": ("replacement",),
    "replacements.decode_loop": ("DecodeLoop",),
    "replacements.edits": (
        "Change",
        "Edit",
        "Interventions",
        "StrongestLatents",
        "predicted_effects",
    ),
    "replacements.generation": ("generate",),
    "report.graph_page": ("write_graph",),
    "sae.base": ("SAEConfig",),
    "sae.boosted": ("BoostedSAE",),
    "sae.threshold": ("ThresholdSAE",),
    "sae.topk": ("TopKSAE",),
    "stack.affine": ("AffinePredictor",),
    "stack.fit": (
        "Moments",
        "fit_predictor",
    ),
    "stack.stack": (
        "AffineOnly",
        "ReSAE",
    ),
    "training.calibration": ("Calibration",),
    "training.config": ("TrainConfig",),
    "training.loop": ("train",),
    "training.step": ("train_step",),
}
_get, __dir__ = on_demand(__name__, _MODULES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("resae")
    return _get(name)
