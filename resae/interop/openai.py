"""openai/sparse_autoencoder: one state dict `.pt` per layer, its activation named inside.

TopK ones normalise each token (LayerNorm) and have no form here (`SCALE_OF_A_TOKEN`); ReLU ones do.
"""

from pathlib import Path

import torch

from resae.interop.files import (
    SCALE_OF_A_TOKEN,
    read_pickled_tensors,
    refuse_others,
    setting,
    take,
)
from resae.sae.record import SAERecord

FILES = ()
"""None on the hub."""
STATISTICS = {"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"}
KNOWN = {"encoder.weight", "latent_bias", "pre_bias", "activation", "activation_state_dict"}
KNOWN |= {"decoder.weight", "decoder.linear.weight"} | STATISTICS


def detect(path: Path) -> bool:  # noqa: ARG001
    """Never: a `.pt` tells what it is only when it is read."""
    return False


def read(path: Path) -> SAERecord:
    if path.is_dir():
        raise ValueError(f"SAE {path}: a folder; name the .pt file of one layer in it")
    state = read_pickled_tensors(path)
    activation = setting(state, "activation", str, path, "ReLU")
    if activation == "TopK":  # its library then applies LayerNorm
        raise ValueError(
            f"SAE {path}: activation 'TopK' with LayerNorm of each token: {SCALE_OF_A_TOKEN}; "
            f"run it in its library, or in SAELens (gpt2-small-resid-post-v5-32k and others) with "
            f"resae_kernels.accelerate"
        )
    if activation != "ReLU":
        raise ValueError(f"SAE {path}: activation {activation!r} has no form here, expected 'ReLU'")
    refuse_others(state, KNOWN, path)
    weight = take(state, "encoder.weight", 2, path)
    tied = "decoder.linear.weight" in state  # the encoder's, held twice
    bias = take(state, "latent_bias", 1, path)
    return SAERecord(
        weight=weight,
        bias=bias,
        W_dec=weight if tied else take(state, "decoder.weight", 2, path).T,
        b_dec=take(state, "pre_bias", 1, path),
        threshold=torch.zeros_like(bias),
    ).check(path)
