"""Facts about an autoencoder in a file: sizes, weights, and how it would be encoded here."""

from typing import Any

import torch

from resae.interop.formats import Found

TOKENS = 64
"""Tokens of the call whose path is reported."""


def describe_sae(found: Found) -> dict[str, Any]:
    """Format and content of the file, as JSON."""
    record = found.record
    M, D = record.weight.shape
    finite = record.non_finite()
    return {
        "path": str(found.path),
        "format": found.format,
        "activation": "topk" if record.threshold is None else "threshold",
        "d_in": D,
        "d_sae": M,
        "k": record.k,
        "threshold": _spread(record.threshold),
        "dtype": str(record.weight.dtype).removeprefix("torch."),
        "input_kind": record.input_kind,
        "apply_b_dec_to_input": record.apply_b_dec_to_input,
        "hook_point": record.hook_point,
        "model": record.model,
        "folded": list(record.folded),
        "norms": {
            "encoder": _spread(record.weight.float().norm(dim=1)),
            "decoder": _spread(record.W_dec.float().norm(dim=1)),
            "b_dec": float(record.b_dec.float().norm()),
        },
        "zero_rows": {
            "encoder": int((~record.weight.bool().any(dim=1)).sum()),
            "decoder": int((~record.W_dec.bool().any(dim=1)).sum()),
        },
        "non_finite": finite,
        "encode_here": None if finite else _path_here(found),
    }


def _spread(values: torch.Tensor | None) -> dict[str, float] | None:
    if values is None:
        return None
    values = values.float()
    low, high = values.aminmax()
    return {"least": float(low), "median": float(values.median()), "most": float(high)}


def _path_here(found: Found) -> dict[str, Any]:
    """The path by which codes of `TOKENS` random tokens are computed on this machine, and why."""
    record, sae = found.record, found.autoencoder().requires_grad_(False)
    if torch.cuda.is_available():
        return {"path": "Triton", "why": "this machine has a GPU"}
    if sae.screened is None:
        return {"path": "exact", "why": "its settings say no screening"}
    x = torch.randn(TOKENS, record.weight.shape[1], dtype=record.weight.dtype)
    if record.threshold is None:
        info = sae.screened.encode_with_info(x, sae.config.k)
    else:
        info = sae.screened.threshold_encode_with_info(x, record.threshold, sae.config.k)
    if info.rows_screened == 0:
        return {"path": "exact", "why": info.reason}
    return {
        "path": "screened",
        "why": f"8-bit screening by {info.implementation} pays at these sizes",
        "rows_screened": info.rows_screened,
        "rows_exact": info.rows_exact,
    }
