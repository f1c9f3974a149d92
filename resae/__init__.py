"""Multi-layer sparse autoencoders on affine residuals (ReSAE, arXiv 2605.27819), on Hugging Face
models.

lm = HookedLM.from_pretrained("embedded")
stack = ReSAE.from_pretrained("path/to/run")
with replacement(lm, stack) as replaced:
    lm.model.generate(...)
replaced.counts
"""

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
