"""SAELens: `cfg.json` and `sae_weights.safetensors`, before and since version 6.

Read: topk, jumprelu, standard; batchtopk and matryoshka_batchtopk, which SAELens saves for use as
jumprelu with one threshold, also from a training checkpoint. Folded, as SAELens itself does it:
`rescale_acts_by_decoder_norm` (rows of W_dec to norm 1, the encoder scaled by the old norms), and
the factor of `activation_scaler.json` with `normalize_activations` "expected_average_only_in".
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resae.interop.files import (
    SCALE_OF_A_TOKEN,
    has,
    read_settings,
    read_tensors,
    refuse_others,
    require_sizes,
    required,
    setting,
    take,
    warn_if_unset,
)
from resae.sae.record import DTYPES, SAERecord
from resae.storage import save_json, save_tensors

WEIGHTS = "sae_weights.safetensors"
SCALER = "activation_scaler.json"
FILES = ("cfg.json", WEIGHTS, SCALER)
VERSION = "6.0.0"
"""Version of the format that is written: from 6 on SAELens takes cfg.json as it is."""
BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")
"""Kinds in training; for use they are saved as jumprelu."""
ARCHITECTURES = ("topk", "jumprelu", "standard", *BATCH_TOPK)
NAMED = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
UNIT = 1e-5
"""Rows of W_dec whose norms are closer to 1 than this count as normalised."""


def detect(path: Path) -> bool:
    return has(path, "cfg.json", WEIGHTS)


def read(path: Path) -> SAERecord:
    cfg = _settings(path)
    architecture = setting(cfg, "architecture", str, path, "standard")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"SAE {path}: architecture {architecture!r} has no form here; expected "
            f"{', '.join(ARCHITECTURES)}"
        )
    if (reshape := setting(cfg, "reshape_activations", str, path, "none")) != "none":
        raise ValueError(
            f"SAE {path}: reshape_activations {reshape!r} joins the heads of a layer; expected "
            f"'none'"
        )
    tensors = _tensors(path, cfg)
    threshold = _threshold(path, architecture, tensors)
    known = {"W_enc", "b_enc", "W_dec", "b_dec", "threshold", "log_threshold", "topk_threshold"}
    refuse_others(tensors, known, path)
    k = required(cfg, "k", int | float, path) if architecture == "topk" else None
    if isinstance(k, float) and not (k.is_integer() and abs(k) < 2**31):
        raise ValueError(f"SAE {path}: k = {k}, expected a whole number")
    metadata = setting(cfg, "metadata", dict, path, {})
    residual = metadata.get("residual_hook_point")
    record = SAERecord(
        weight=take(tensors, "W_enc", 2, path).T,
        bias=take(tensors, "b_enc", 1, path),
        W_dec=take(tensors, "W_dec", 2, path),
        b_dec=take(tensors, "b_dec", 1, path),
        k=None if k is None else int(k),
        threshold=threshold,
        apply_b_dec_to_input=setting(cfg, "apply_b_dec_to_input", bool, path, True),
        input_kind=setting(metadata, "input_kind", str, path, "activation"),
        hook_point=setting(metadata, "hook_name", str, path, residual),
        model=setting(metadata, "model_name", str, path),
        metadata=metadata,
    ).check(path)
    M, D = record.weight.shape
    require_sizes(cfg, {"d_in": D, "d_sae": M}, path)
    return _scaled(path, cfg, _normalised(path, cfg, record))


def write(record: SAERecord, folder: Path) -> None:
    """Write a folder that SAELens ≥ 6 loads. An autoencoder of residuals gets the metadata
    `input_kind: affine_residual` and no `hook_name`, so that `add_sae` does not put it where it
    would read activations."""
    tensors = {
        "W_enc": record.weight.T,
        "b_enc": record.bias,
        "W_dec": record.W_dec,
        "b_dec": record.b_dec,
    }
    kind: dict[str, Any] = {"architecture": "topk", "k": record.k}
    if record.threshold is not None:
        learned = bool(record.threshold.any())
        kind = {"architecture": "jumprelu" if learned else "standard"}
        if learned:
            tensors["threshold"] = record.threshold
    else:
        kind["rescale_acts_by_decoder_norm"] = False
    M, D = record.weight.shape
    metadata = {**record.metadata, "sae_lens_version": VERSION, "model_name": record.model}
    metadata["input_kind"] = record.input_kind
    metadata.pop("hook_name", None)
    if record.input_kind != "activation":
        metadata["residual_hook_point"] = record.hook_point
    elif record.hook_point is not None and record.hook_point.startswith("blocks."):
        metadata["hook_name"] = record.hook_point
    elif record.hook_point is not None:
        metadata["module"] = record.hook_point
    save_tensors(folder / WEIGHTS, tensors)
    save_json(
        folder / "cfg.json",
        {
            **kind,
            "d_in": D,
            "d_sae": M,
            "dtype": str(record.weight.dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": record.apply_b_dec_to_input,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": metadata,
        },
    )


def _settings(path: Path) -> dict[str, Any]:
    """`cfg.json` as SAELens ≥ 6 would have written it."""
    cfg = read_settings(path, "cfg.json")
    metadata = setting(cfg, "metadata", dict, path, {})
    version = setting(cfg, "sae_lens_version", str, path) or metadata.get("sae_lens_version")
    major = str(version or "0").partition(".")[0]
    if major.isdecimal() and int(major) >= 6:
        return cfg
    cfg = dict(cfg)
    activation = setting(cfg, "activation_fn_str", str, path) or setting(
        cfg, "activation_fn", str, path, "relu"
    )
    options = setting(cfg, "activation_fn_kwargs", dict, path, {})
    if activation == "topk":
        cfg |= {"architecture": "topk", "k": required(options, "k", int, path)}
    elif activation != "relu":
        raise ValueError(f"SAE {path}: activation_fn_str {activation!r}, expected 'relu' or 'topk'")
    hook = setting(cfg, "hook_point", str, path) or setting(cfg, "hook_name", str, path)
    if hook is not None and "hook_z" in hook:
        cfg.setdefault("reshape_activations", "hook_z")
    normalised = cfg.get("normalize_activations")
    if isinstance(normalised, bool):
        cfg["normalize_activations"] = "expected_average_only_in" if normalised else None
    facts = {"hook_name": hook, "model_name": cfg.get("model_name")}
    facts |= {name: cfg[name] for name in ("context_size", "prepend_bos") if name in cfg}
    return cfg | {"metadata": metadata | facts}


def _tensors(path: Path, cfg: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors in the dtype that cfg.json names, to which SAELens casts them."""
    tensors = read_tensors(path, WEIGHTS)
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in tensors:
            factor = tensors.pop(name)
            if not torch.allclose(factor.float(), torch.ones(())):
                raise ValueError(
                    f"SAE {path}: {name} differs from 1; acts scaled per latent have no form here"
                )
    named = setting(cfg, "dtype", str, path)
    if named is None:
        return tensors
    dtype = NAMED.get(named.removeprefix("torch."))
    if dtype is None:
        raise ValueError(f"SAE {path}: dtype {named!r}, expected one of {', '.join(NAMED)}")
    return {name: t.to(dtype) for name, t in tensors.items()}


def _threshold(path: Path, architecture: str, tensors: dict[str, Tensor]) -> Tensor | None:
    bias = take(tensors, "b_enc", 1, path)
    if architecture == "topk":
        return None
    if architecture == "standard":
        return torch.zeros_like(bias)
    if "topk_threshold" in tensors:
        one = float(take(tensors, "topk_threshold", 0, path))
        warn_if_unset(one, path)
        return torch.full_like(bias, one)
    if "log_threshold" in tensors:
        return take(tensors, "log_threshold", 1, path).exp()
    threshold = take(tensors, "threshold", 1, path)
    if not threshold.any():  # JumpReLU's own are positive: saved from a BatchTopK
        warn_if_unset(0.0, path)
    return threshold


def _normalised(path: Path, cfg: dict[str, Any], record: SAERecord) -> SAERecord:
    """Fold `rescale_acts_by_decoder_norm`: scores count times the norm of their row of W_dec, and
    acts are divided by it again. Kinds that ignore the setting in SAELens ignore it here."""
    rescales = setting(cfg, "rescale_acts_by_decoder_norm", bool, path, False)
    norms = record.W_dec.norm(dim=-1).clamp_min(1e-8)
    unit = bool(((norms - 1).abs() < UNIT).all())
    if not rescales or unit or cfg["architecture"] not in ("topk", *BATCH_TOPK):
        return record
    return replace(
        record,
        weight=record.weight * norms[:, None],
        bias=record.bias * norms,
        W_dec=record.W_dec / norms[:, None],
        folded=(*record.folded, "rescale_acts_by_decoder_norm into the encoder and W_dec"),
    )


def _scaled(path: Path, cfg: dict[str, Any], record: SAERecord) -> SAERecord:
    """Fold the factor of the inputs; refuse what depends on the token."""
    kind = setting(cfg, "normalize_activations", str, path, "none")
    if kind == "none":
        return record
    if kind in ("layer_norm", "constant_norm_rescale"):
        raise ValueError(
            f"SAE {path}: normalize_activations {kind!r}: {SCALE_OF_A_TOKEN}; run it in SAELens "
            f"with resae_kernels.accelerate"
        )
    if kind != "expected_average_only_in" or not (path / SCALER).is_file():
        need = f"; expected {SCALER} with its factor" if kind == "expected_average_only_in" else ""
        raise ValueError(
            f"SAE {path}: normalize_activations {kind!r} is not folded into the weights and has no "
            f"form here{need}"
        )
    factor = required(read_settings(path, SCALER), "scaling_factor", int | float, path)
    if not 0 < factor < float("inf"):
        raise ValueError(f"SAE {path}: scaling_factor = {factor} in {SCALER}, expected > 0")
    return replace(
        record,
        weight=record.weight * factor,
        W_dec=record.W_dec / factor,
        b_dec=record.b_dec / factor,
        folded=(*record.folded, f"activation scaling by {factor:g} into all weights"),
    )
