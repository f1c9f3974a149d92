"""Affine maps for a run: fitted on its text, with R² on held-out text, or taken from a folder."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from resae.console import Console
from resae.data.rows import TokenRows
from resae.evaluation.labels import LABELS
from resae.evaluation.methods import predictor_name
from resae.evaluation.predictors import r2_per_layer, routing_shares
from resae.evaluation.rows import LayerPairRow
from resae.models.hooked import HookedLM
from resae.models.points import HookPoint
from resae.models.sinks import SinkRule
from resae.settings import current_names
from resae.stack.fit import Moments
from resae.training.calibration import Calibration, Reconstruct, calibrate, sum_moments
from resae.training.config import FITTED, RunConfig, TrainConfig
from resae.training.distributed import Ranks
from resae.training.runs import load_record


def measure_moments(
    lm: HookedLM,
    points: Sequence[HookPoint],
    batches: Iterable[Sequence[Tensor]],
    config: TrainConfig,
    console: Console,
    ranks: Ranks,
    reconstruct: Reconstruct | None = None,
) -> Moments:
    """Moments of the calibration tokens of all ranks."""

    def shown() -> Iterator[Sequence[Tensor]]:
        done = 0
        for xs in batches:
            done += len(xs[0])
            share = min(1.0, done * ranks.size / config.moment_tokens)
            console.progress(f"affine maps: {share:4.0%} of {config.moment_tokens:,} tokens")
            yield xs

    # The identity needs no products of activations, so its moments are in everyone's.
    moments = sum_moments(
        config.predictor,
        shown(),
        tokens=-(-config.moment_tokens // ranks.size),
        d_in=lm.d_model,
        n_layers=len(points),
        reconstruct=reconstruct,
    )
    ranks.all_reduce_moments_(moments)
    if moments.count < config.moment_tokens:
        console.log(
            f"affine maps: the data has {moments.count:,} tokens, fewer than the "
            f"{config.moment_tokens:,} asked for"
        )
    return moments


def fit_calibration(
    lm: HookedLM,
    points: Sequence[HookPoint],
    batches: Iterable[Sequence[Tensor]],
    unseen: Iterable[Sequence[Tensor]],
    config: TrainConfig,
    console: Console,
    ranks: Ranks,
    reconstruct: Reconstruct | None = None,
    *,
    sinks: SinkRule | None,
) -> tuple[Calibration, list[LayerPairRow]]:
    """The calibration by `batches` of L activations, and R² per pair of layers on those of held-out
    tokens, with the identity's for comparison; with several source layers also their shares. No R²
    without a predictor (no held-out rows are read then) or if `unseen` is empty.

    Args:
        reconstruct: gives the reconstructions that the maps take; None: they take activations.
        sinks: the rule by which tokens were left out of `batches` and `unseen`.
    """
    moments = measure_moments(lm, points, batches, config, console, ranks, reconstruct)
    calibration = calibrate(
        config.predictor,
        moments,
        ridge=config.ridge,
        map_type=config.map_type,
        rank=config.rank,
        sinks=sinks,
    )
    table: list[LayerPairRow] = []
    unseen = [] if config.predictor == "none" else [[x.cpu() for x in xs] for xs in unseen]
    if not unseen:
        return calibration, table
    compared = [calibrate("identity", moments, ridge=config.ridge).predictor]
    if config.predictor != "identity":
        compared.append(calibration.predictor)
    for maps in compared:
        shares = routing_shares(maps, moments)
        for i, r2 in enumerate(r2_per_layer(maps, unseen, reconstruct)):
            layer_pair = f"{points[i].name} → {points[i + 1].name}"
            method = predictor_name(maps.kind, maps.map_type)
            of_sources = None
            if len(shares[i]) > 1:
                names = (point.name for point in points[: i + 1])
                of_sources = dict(zip(names, shares[i], strict=True))
            table.append(LayerPairRow(method, layer_pair, r2, of_sources))
    for row in table:
        console.log(f"R² {row.hop}  {LABELS[row.method]}: {row.r2:.4f}")
        for source, share in (row.shares or {}).items():
            console.log(f"   {share:6.1%} from {source}")
    return calibration, table


def require_rank(config: TrainConfig, lm: HookedLM) -> None:
    """Raise ValueError for low-rank maps of a rank above the model's width."""
    if config.rank is not None and config.rank > lm.d_model:
        raise ValueError(
            f"--rank {config.rank} exceeds the width of {lm.name}, {lm.d_model}; lower it"
        )


FIXED = {"model", "data", "text_column", "streaming", "context_tokens", "held_out_rows", "seed"}
"""Further entries of a record of maps."""


class FittedMaps(NamedTuple):
    """Maps that were fitted before, by `resae fit` or in a run, and their record."""

    record: dict[str, Any]
    calibration: Calibration

    @classmethod
    def open(cls, folder: Path) -> "FittedMaps":
        """Read the maps of a folder.

        Raises:
            FileNotFoundError: there are none.
            ValueError: they were written by an earlier version.
        """
        files = [folder / name for name in ("fit.json", "run.json")]
        file = next((file for file in files if file.exists()), None)
        if file is None:
            raise FileNotFoundError(
                f"--maps: {folder} holds no maps (no fit.json); make them with `resae fit`"
            )
        record = load_record(file, "maps")
        record = current_names(record | record.get("train", {}))
        record.setdefault("rank", None)
        record.setdefault("sink_factor", 0.0)
        if not record.keys() >= {"layers", *FITTED} or not record.keys() >= FIXED:
            raise ValueError(f"--maps: {file} was written by an earlier resae; fit the maps anew")
        calibration = Calibration.load(folder / "calibration.safetensors", record["predictor"])
        if len(calibration.scale) != len(record["layers"]):
            raise ValueError(
                f"--maps: {file} names {len(record['layers'])} layers, the maps are of "
                f"{len(calibration.scale)}; fit the maps anew"
            )
        return cls(record, calibration)

    def complete(self, config: RunConfig) -> RunConfig:
        """`config` with the layers and settings of the maps where it leaves them open.

        Raises:
            ValueError: it asks for others.
        """
        for name, asked in config.chosen_maps.items():
            if asked != self.record[name]:
                raise ValueError(
                    f"--maps: those of {config.maps} have {name}={self.record[name]}, asked for "
                    f"{asked}; leave the option out, or fit other maps"
                )
        settings = {name: self.record[name] for name in FITTED}
        return replace(config, layers=config.layers or tuple(self.record["layers"]), **settings)

    def require_fit(
        self, config: RunConfig, train: TrainConfig, shapes: HookedLM, rows: TokenRows
    ) -> None:
        """Raise ValueError for maps of another model, of other layers, or that were fitted on rows
        that are now held out."""
        began, now = self.record["model"], config.model
        same = began == now or (Path(began).is_dir() and Path(began).samefile(now))
        if not same or len(self.calibration.mean[0]) != shapes.d_model:
            raise ValueError(
                f"--maps: fitted on model {began}, here is {now}; fit them on this one"
            )
        if tuple(self.record["layers"]) != train.layers:
            raise ValueError(
                f"--maps: of layers {', '.join(self.record['layers'])}, here are "
                f"{', '.join(train.layers)}; leave --layers out"
            )
        # Without a split for validation the first rows are held out; these settings decide which.
        names = ("text_column", "streaming", "context_tokens", "held_out_rows", "seed")
        self.record.setdefault("split", "train")  # of earlier versions
        other = [name for name in (*names, "split") if self.record[name] != getattr(config, name)]
        if rows.skip and self.record["data"] == config.data and other:
            raise ValueError(
                f"--maps: fitted with {', '.join(f'{n}={self.record[n]}' for n in other)} on this "
                f"text, of which other rows are held out here; use the same, or fit them anew"
            )
