"""The README of a stack on the hub: what it is, of which model, what it costs, how to open it."""

from collections.abc import Mapping
from typing import Any, Protocol

from huggingface_hub import ModelCard, ModelCardData

from resae.models.identity import ModelIdentity
from resae.models.sinks import SinkRule
from resae.sae.base import Autoencoder
from resae.sae.registry import has_thresholds
from resae.stack.affine import AffinePredictor
from resae.strict_json import brief, require_fields

MEASURED = {"method": str, "mode": str, "loop": (str, None), "k": (int, None)} | {
    name: float for name in ("ce_clean", "delta_ce", "kl")
}
"""Entries of a row of report.json that are shown."""


class Described(Protocol):
    """The part of a `ReSAE` that a card describes."""

    hook_points: list[str]
    predictor: AffinePredictor
    model_identity: ModelIdentity | None
    sinks: SinkRule | None

    @property
    def n_layers(self) -> int: ...
    @property
    def shared(self) -> bool: ...
    @property
    def boosted(self) -> bool: ...
    def sae(self, layer: int) -> Autoencoder: ...


def model_card(
    stack: Described,
    *,
    report: Mapping[str, Any] | None = None,
    license: str | None = None,
    repo_id: str | None = None,
) -> ModelCard:
    """The card of a stack.

    Args:
        report: the content of `report.json`, as `resae eval` writes it, for a table of what
            replacing all layers costs.
        license: of the weights, as the hub names licences; None: the card names none.
        repo_id: the repository that the card is for.

    Raises:
        ValueError: a report of other layers or of another model.
    """
    identity = stack.model_identity
    of_hub = identity is not None and identity.revision is not None
    header = ModelCardData(
        library_name="resae",
        tags=["sparse-autoencoder"],
        license=license,
        base_model=identity.name if identity is not None and of_hub else None,
    )
    model = "an unnamed model" if identity is None else f"`{identity.name}`"
    parts = [
        f"---\n{header.to_yaml()}\n---",
        f"# {_kinds(stack)} of {stack.n_layers} layers of {model}",
        _description(stack, model),
        _layers(stack),
        _screening(stack),
    ]
    if report is not None:
        parts.append(_measured(stack, report))
    parts.append(
        "## How to load\n\n```python\nfrom resae import ReSAE\n\n"
        f'stack = ReSAE.from_pretrained("{repo_id or "<this repository>"}")\n```\n\n'
        "`revision=` pins a commit of this repository. Only safetensors and JSON are read."
    )
    return ModelCard("\n\n".join(parts) + "\n")


def _description(stack: Described, model: str) -> str:
    predictor = stack.predictor
    kind = {
        "none": "Each autoencoder encodes the activation of its layer",
        "identity": "Each layer but the first encodes its difference from the layer before",
    }.get(
        predictor.kind,
        f"Each layer but the first encodes the residual of an affine prediction from earlier "
        f"layers (ReSAE, arXiv 2605.27819; predictor `{predictor.kind}`, "
        f"{predictor.map_type} maps)",
    )
    extras = [
        text
        for text, holds in (
            ("one dictionary is shared by all layers", stack.shared),
            ("each has a second one beside it (SAE Boost, arXiv 2507.12990)", stack.boosted),
        )
        if holds
    ]
    text = "; ".join([kind, *extras]) + "."
    identity = stack.model_identity
    if identity is None:
        return text
    revision = "" if identity.revision is None else f", revision `{identity.revision}`"
    return (
        f"{text}\n\nLanguage model: {model}{revision} ({identity.model_type}, {identity.n_layers} "
        f"blocks, width {identity.d_model}, {identity.vocab_size} tokens)."
    )


def _kinds(stack: Described) -> str:
    with_thresholds = {has_thresholds(stack.sae(layer)) for layer in range(stack.n_layers)}
    if with_thresholds == {False}:
        return "TopK autoencoders"
    return "Autoencoders with thresholds" + (" and TopK ones" if False in with_thresholds else "")


def _layers(stack: Described) -> str:
    rows = ["| hook point | width | latents | k | median norm |", "|---|---|---|---|---|"]
    sinks = stack.sinks
    for layer, name in enumerate(stack.hook_points):
        config = stack.sae(layer).config
        norm = "–" if sinks is None else f"{sinks.median_norms[layer]:.4g}"
        k = f"at most {config.k}" if has_thresholds(stack.sae(layer)) else config.k
        rows.append(f"| {name} | {config.d_in} | {config.d_sae} | {k} | {norm} |")
    table = "\n".join(rows)
    if sinks is None:
        return table
    return (
        f"{table}\n\nTokens whose stream is longer than {sinks.factor:g} times the median norm "
        f"(attention sinks) are left alone like special tokens, in training and replacement."
    )


def _screening(stack: Described) -> str:
    settings = {stack.sae(layer).config.screening for layer in range(stack.n_layers)}
    if len(settings) > 1:
        return "How latents are scored on a CPU differs by layer (`screening` in cfg.json)."
    (screening,) = settings
    if screening is None:
        return "On a CPU all latents are scored in float32."
    bound = {
        "statistical": "an active latent is missed with probability below 1e-12 per row",
        "certain": "no active latent can be missed",
    }[screening]
    return (
        f"On a CPU an 8-bit product rules out most latents before the rest are scored exactly; "
        f"{bound} (`screening={screening}` in cfg.json)."
    )


def _measured(stack: Described, report: Mapping[str, Any]) -> str:
    """Table of the cost of replacing all layers, from a report."""
    require_fields(report, {"config": dict, "replacement": [dict]}, "report")
    config = require_fields(report["config"], {"model": str, "layers": [str]}, "report: config")
    identity = stack.model_identity
    other = identity is not None and identity.name != config["model"]
    if config["layers"] != stack.hook_points or other:
        raise ValueError(
            f"report: of layers {brief(config['layers'])} of {brief(config['model'])}, the stack "
            f"is of {brief(stack.hook_points)} of "
            f"{brief(None if identity is None else identity.name)}; give the report of this stack"
        )
    lines = ["| method | mode | loop | k | Δ CE | KL |", "|---|---|---|---|---|---|"]
    rows = [row for row in report["replacement"] if row.get("layers") == stack.hook_points]
    for row in rows:
        require_fields(row, MEASURED, "report: replacement")
        loop, k = (row[name] or "–" for name in ("loop", "k"))
        numbers = f"{row['delta_ce']:.4f} | {row['kl']:.4f}"
        lines.append(f"| {row['method']} | {row['mode']} | {loop} | {k} | {numbers} |")
    if not rows:
        raise ValueError("report: it has no row in which all layers are replaced; run `resae eval`")
    clean = f"{rows[0]['ce_clean']:.4f}"
    return (
        f"## Cost of replacing all layers\n\nCross-entropy of the replaced model minus that of the "
        f"unchanged one ({clean}), in nats per token, on text that was held out "
        f"({config.get('data')}).\n\n" + "\n".join(lines)
    )
