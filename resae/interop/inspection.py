"""Facts about an autoencoder in a file: sizes, weights, and how it would be encoded here."""

from pathlib import Path
from typing import Any

import torch

from resae.interop import own
from resae.interop.formats import Found, find_format, read_sae
from resae.sae.base import Autoencoder
from resae.sae.record import SAERecord

TOKENS = 64
"""Tokens of the call whose path is reported."""


def describe_file(
    source: str | Path,
    format: str | None = None,
    hook_point: str | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """Format and content of an autoencoder in a file, as JSON; of one that is made of several, such
    as a boosted one, the content of each. Arguments and errors as of `import_sae`; NaN in a file of
    another library is described.
    """
    name, path = find_format(source, format, hook_point, revision)
    if name == "resae" and (sae := own.load(path)).parts():
        return _describe_composed(sae, path)
    return describe_sae(read_sae(path, name))


def _describe_composed(sae: Autoencoder, path: Path) -> dict[str, Any]:
    config = sae.config
    hook_point, model, _ = own.facts(path)
    return {
        "path": str(path),
        "format": "resae",
        "activation": sae.kind,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "k": config.k,
        "input_kind": config.input_kind,
        "hook_point": hook_point,
        "model": model,
        "parts": {name: _facts(part.record(), part) for name, part in sae.parts().items()},
    }


def describe_sae(found: Found) -> dict[str, Any]:
    """Format and content of the file, as JSON."""
    finite = found.record.non_finite()
    sae = None if finite else found.autoencoder()
    return {"path": str(found.path), "format": found.format} | _facts(found.record, sae)


def _facts(record: SAERecord, sae: Autoencoder | None) -> dict[str, Any]:
    """Facts about weights; `sae`, None where they are not finite, tells how it encodes here."""
    M, D = record.weight.shape
    return {
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
        "non_finite": record.non_finite(),
        "encode_here": None if sae is None else _path_here(record, sae),
    }


def _spread(values: torch.Tensor | None) -> dict[str, float] | None:
    if values is None:
        return None
    values = values.float()
    low, high = values.aminmax()
    return {"least": float(low), "median": float(values.median()), "most": float(high)}


def _path_here(record: SAERecord, sae: Autoencoder) -> dict[str, Any]:
    """The path by which codes of `TOKENS` random tokens are computed on this machine, and why."""
    sae = sae.requires_grad_(False)
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
