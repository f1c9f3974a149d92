"""Cards in the format that SAEDashboard writes for Neuronpedia: one folder per layer with
`batch-0.json`, fields as of sae-dashboard's `NeuronpediaDashboardBatch`.

Fields that cards do not have are empty lists: correlated and aligned neurons, the histogram of all
logits, decoder weights by head. Bars of the histogram are given by their middles, as many as there
are heights: Neuronpedia reads both at the same place.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resae.latents.records import LatentCard, LatentReport, Passage
from resae.storage import save_json

EMPTY = (
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_l1",
    "correlated_neurons_pearson",
    "correlated_features_indices",
    "correlated_features_l1",
    "correlated_features_pearson",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
    "vector",
)
"""Fields of a feature that cards do not have."""
TOP = -1.0
"""Lower bound and share of the bin of the strongest passages."""


def neuronpedia_batches(report: LatentReport) -> dict[str, dict[str, Any]]:
    """Hook point → batch with the cards of that layer, for layers that have any."""
    batches: dict[str, dict[str, Any]] = {}
    for hook_point in report.layers:
        cards = [card for card in report.latents if card.hook_point == hook_point]
        if cards:
            batches[hook_point] = {
                "model_id": report.model,
                "layer": _block(hook_point),
                "sae_set": report.stack,
                "sae_id_suffix": None,
                "features": [_feature(report, card) for card in cards],
            }
    return batches


def write_neuronpedia(folder: Path, report: LatentReport) -> list[Path]:
    """Write `folder/HOOK_POINT/batch-0.json` for every layer; returns the paths."""
    paths = []
    for hook_point, batch in neuronpedia_batches(report).items():
        paths.append(folder / hook_point / "batch-0.json")
        save_json(paths[-1], batch)
    return paths


def _block(hook_point: str) -> int:
    return int(hook_point.split(".")[1])


def _feature(report: LatentReport, card: LatentCard) -> dict[str, Any]:
    largest = card.largest_act or 0.0
    middles = [round(card.bin_width * (i + 0.5), 3) for i in range(len(card.histogram))]
    return {
        "feature_index": card.latent,
        "neg_str": [effect.token for effect in card.lowered],
        "neg_values": [effect.logit for effect in card.lowered],
        "pos_str": [effect.token for effect in card.raised],
        "pos_values": [effect.logit for effect in card.raised],
        "frac_nonzero": card.density,
        "freq_hist_data_bar_values": middles,
        "freq_hist_data_bar_heights": card.histogram,
        "n_prompts_total": report.rows,
        "n_tokens_in_prompt": report.row_tokens,
        "dataset": report.settings.get("data", ""),
        "activations": [
            *_activations(card.passages, TOP, largest, TOP),
            *_activations(card.samples, 0.0, largest, 1.0),
        ],
    } | {name: [] for name in EMPTY}


def _activations(
    passages: Sequence[Passage], low: float, high: float, share: float
) -> list[dict[str, Any]]:
    """Passages of a bin from `low` to `high` that holds this share of all firings."""
    return [
        {
            "bin_min": low,
            "bin_max": high,
            "bin_contains": share,
            "tokens": passage.tokens,
            "values": [round(act, 3) for act in passage.acts],
            "qualifying_token_index": passage.peak,
        }
        for passage in passages
    ]
