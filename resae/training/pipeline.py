"""A whole run: model and text → calibration → training → a run directory.

    run        what `resae train` does
    fit_maps   what `resae fit` does: the calibration alone

Everything that can be wrong with the settings is found before the weights of the model are read.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resae.console import Console, SilentConsole
from resae.data.activations import (
    MODEL_ROWS,
    ModelActivations,
    RowActivations,
    WithoutSinks,
    measure_sinks,
)
from resae.data.batches import ActivationBatches, WithRows, sequential
from resae.data.cache import ActivationCache
from resae.data.rows import TokenRows, read_rows
from resae.data.text_record import TrainedText, save_held_out
from resae.environment import describe_device, find_device
from resae.evaluation.comparison import delta_ce
from resae.models.hooked import HookedLM
from resae.models.identity import ModelIdentity
from resae.models.points import HookPoint
from resae.models.sinks import SinkRule
from resae.stack.stack import ReSAE
from resae.storage import is_unused, locked, save_json
from resae.training.calibration import Calibration, Reconstruct, boost_calibration
from resae.training.checkpoints import resumed_config
from resae.training.config import FITTED, FitConfig, RunConfig, TrainConfig
from resae.training.distributed import SINGLE_PROCESS, Ranks
from resae.training.loggers import loop_options, metric_loggers, require_loggers
from resae.training.loop import train
from resae.training.maps import FittedMaps, fit_calibration, measure_moments, require_rank
from resae.training.runs import (
    load_record,
    open_run,
    record_of,
    require_same_run,
    require_same_text,
    require_startable,
)
from resae.training.start import kept_first, require_divisible
from resae.training.watch import Watch

Stopping = AbstractContextManager[Callable[[], bool]]
"""Entered around the training loop; gives the function that is asked after each step whether to
stop."""


def never() -> bool:
    """Let the training run to its end."""
    return False


@dataclass(frozen=True)
class Run:
    """A run directory and what came of it."""

    folder: Path
    config: TrainConfig
    """With the settings that follow from the model, and of a resumed run those it began with."""
    stack: ReSAE | None
    """The trained stack, for raw activations; None: stopped before the end, a checkpoint is in the
    folder."""


def run(
    config: RunConfig,
    *,
    console: Console | None = None,
    command: str = "resae.training.run",
    stopping: Stopping | None = None,
) -> Run:
    """Train the autoencoders of several layers of a model on a text, into a run directory.

    With `config.resume` the run in `config.out` continues from its newest checkpoint. Started by
    torchrun, all processes train together.

    Args:
        console: where progress is reported; by default the logger `resae`.
        command: recorded in `run.json` as the command.
        stopping: see `Stopping`; by default the training runs to its end.

    Raises:
        ValueError: settings that do not fit together or do not fit the model, the text or the run
            to resume; or the training diverged.
        FileNotFoundError: no such model, text, maps or run.
        ModuleNotFoundError: a metric logger is not installed.
        OSError: another process writes into the folder, or the disk is full.
    """
    console = console or Console()
    require_loggers(config)
    ranks, device = Ranks.launched(config.parallel, find_device(config.device))
    out = Path(config.out)
    with (
        Watch(ranks.rank, ranks.size, console.error, with_traceback=console.traceback),
        locked(out) if ranks.rank == 0 else nullcontext(),
    ):
        require_startable(out, config.resume)
        if ranks.rank > 0:
            console = SilentConsole()
        return _Pipeline(config, ranks, device, console).run(
            command, stopping or nullcontext(never)
        )


def fit_maps(
    config: FitConfig, *, console: Console | None = None, command: str = "resae.training.fit_maps"
) -> Path:
    """Fit the affine maps between layers, measure their R² on held-out text and write both.

    Args:
        console, command: as of `run`.

    Returns:
        The folder, which `RunConfig.maps` takes.

    Raises:
        ValueError: settings that do not fit together or do not fit the model or the text.
        FileNotFoundError: no such model or text.
        OSError: another process writes into the folder, or the disk is full.
    """
    console = console or Console()
    out = Path(config.out)
    with locked(out):
        if not is_unused(out):
            raise ValueError(f"{out} exists and is not empty; choose another --out")
        device = find_device(config.device)
        console.log(f"device: {describe_device(device)}")
        shapes = HookedLM.described(config.model, tokenizer=None, revision=config.revision)
        stack = _reconstructing(config, shapes)
        layers = config.layers if stack is None else stack.hook_points
        if not layers:
            raise ValueError("--layers is missing; name blocks or hook points, for example 1,3,5")
        points = shapes.hook_points(layers)
        fit = config.for_layers(tuple(point.name for point in points))
        require_rank(fit, shapes)
        rows, held_out = read_rows(config, shapes)
        lm = load_model(config.model, config.dtype, device, config.revision)
        text = _text_of((("--on-reconstructions", config.on_reconstructions),), console)
        noted = rows if text is None else rows.noted(text.add)
        reconstruct = None if stack is None else _reconstruct_by(stack.to(device))
        if stack is not None:
            console.log(f"affine maps: from the reconstructions by {config.on_reconstructions}")
        sinks = None if stack is None else stack.sinks
        if stack is None and fit.sink_factor:
            sinks = measure_sinks(ModelActivations(lm, rows, points), fit.sink_factor)
        calibrating = _without(sinks, ModelActivations(lm, noted, points))
        unseen = _without(sinks, ModelActivations(lm, held_out, points))
        calibration, affine = fit_calibration(
            lm,
            points,
            sequential(calibrating),
            sequential(unseen),
            fit,
            console,
            SINGLE_PROCESS,
            reconstruct,
            sinks=sinks,
        )
        _say_left_out(calibrating, console)
        calibration.save(out / "calibration.safetensors")
        table = [row.to_dict() for row in affine]
        if text is not None:
            text.save(out)
        fitted = {name: getattr(fit, name) for name in ("layers", *FITTED, "seed")}
        fitted["on_reconstructions"] = config.on_reconstructions
        save_json(out / "fit.json", record_of(config, rows, table, device, command) | fitted)
    return out


def _reconstructing(config: FitConfig, shapes: HookedLM) -> ReSAE | None:
    """The stack whose reconstructions the maps take; None: they take activations."""
    if config.on_reconstructions is None:
        return None
    stack = ReSAE.load(config.on_reconstructions)
    stack.require_model(shapes)
    asked = [point.name for point in shapes.hook_points(config.layers)] if config.layers else None
    if asked not in (None, stack.hook_points):
        raise ValueError(
            f"--on-reconstructions: {config.on_reconstructions} has layers "
            f"{', '.join(stack.hook_points)}; leave --layers out"
        )
    return stack


def _reconstruct_by(stack: ReSAE) -> Reconstruct:
    """Reconstructions in closed loop, as replacement puts them in."""

    @torch.no_grad()
    def reconstruct(xs: Sequence[Tensor]) -> list[Tensor]:
        return stack([x.to(stack.sae(0).b_dec) for x in xs], loop="closed").x_hats

    return reconstruct


def _text_of(earlier: Iterable[tuple[str, str | None]], console: Console) -> TrainedText | None:
    """A record of text to begin with: that of earlier folders, by the option that names each; None
    where one has no record."""
    text = TrainedText()
    for option, folder in earlier:
        if folder is None:
            continue
        known = TrainedText.load(Path(folder))
        if known is None:
            console.log(
                f"{option}: {folder} has no record of the text that it was fitted on, so that "
                f"this run gets none: `resae eval` will not know which text is new to it"
            )
            return None
        text.include(known)
    return text


def load_model(name: str, dtype: str, device: str, revision: str | None = None) -> HookedLM:
    """A model with its weights in `dtype`, by its name in torch, on a device; with its tokenizer,
    where it has one."""
    return HookedLM.from_pretrained(
        name, dtype=getattr(torch, dtype), device=device, revision=revision, tokenizer=False
    )


def _without(sinks: SinkRule | None, activations: RowActivations) -> RowActivations:
    return activations if sinks is None else WithoutSinks(activations, sinks)


def _say_left_out(activations: RowActivations, console: Console) -> None:
    """Report the sink tokens of the tokens read so far."""
    if isinstance(activations, WithoutSinks):
        rule = activations.rule
        norms = ", ".join(f"{norm:.4g}" for norm in rule.median_norms)
        console.log(
            f"sink tokens: {activations.left_out:,} left out so far, of norms above "
            f"{rule.factor:g} × the median ({norms})"
        )


class _Pipeline:
    """One process of a run, step by step."""

    def __init__(self, config: RunConfig, ranks: Ranks, device: str, console: Console):
        self.config = self.asked = config
        self.ranks = ranks
        self.device = device
        self.console = console
        self.out = Path(config.out)
        self.calibrated = self.out / "calibration.safetensors"
        self.record: dict[str, Any] = {}
        """`run.json` of the run to resume; empty for a new run."""

    def run(self, command: str, stopping: Stopping) -> Run:
        self._say_devices()
        model, revision = self.config.model, self.config.revision
        shapes = HookedLM.described(model, tokenizer=None, revision=revision)
        maps, base_stack = self._earlier(shapes)
        train_config = self._settle(shapes, base_stack)
        rows, held_out = read_rows(self.config, shapes)
        require_same_text(self.record, self.config, rows)
        if maps is not None:
            maps.require_fit(self.config, train_config, shapes, rows)
        lm = load_model(model, self.config.dtype, self.config.model_device or self.device, revision)
        text = self._trained_text()
        noted = rows if text is None else rows.noted(text.add)
        begun = None
        if self.config.resume and self.calibrated.exists():
            begun = self._go_on(train_config)
        cache = self._open_cache(lm, rows, "train", self.ranks, train_config.train_tokens)
        fixed = begun or (maps and maps.calibration) or base_stack
        sinks = fixed.sinks if fixed else self._measure_sinks(lm, rows, cache, train_config)
        source = self._source(lm, noted, cache, sinks, train_config)
        if begun is not None:
            calibration = begun
        else:
            calibration, affine = self._calibrate(
                lm, source, held_out, train_config, maps, base_stack, sinks
            )
            if train_config.first_sae is not None:
                calibration = calibration.keeping_first()
            self._begin(calibration, affine, train_config, rows, held_out, text, command)
        stack = self._train(lm, source, held_out, calibration, train_config, text, stopping)
        return Run(self.out, train_config, stack)

    # -- settings ----------------------------------------------------------------------------------

    def _say_devices(self) -> None:
        apart = self.config.model_device
        if apart == "auto" and self.ranks.size > 1:
            raise ValueError(
                "--model-device auto, where all devices hold one model, with several ranks; leave "
                "it out"
            )
        if apart is not None and apart != "auto":
            self.config = replace(self.config, model_device=find_device(apart))
        line = f"device: {describe_device(self.device)}"
        self.console.log(line if apart is None else f"{line}; language model: {apart}")

    def _earlier(self, shapes: HookedLM) -> tuple[FittedMaps | None, ReSAE | None]:
        """The maps or the stack that the run starts from; its layers and maps become settings."""
        maps = base_stack = None
        if self.config.maps is not None:
            maps = FittedMaps.open(Path(self.config.maps))
            self.config = maps.complete(self.config)
        if self.config.boost is not None:
            base_stack = open_run(Path(self.config.boost), "cpu")[1]
            base_stack.require_model(shapes)
            of_maps = {
                "predictor": base_stack.predictor.kind,
                "map_type": base_stack.predictor.map_type,
                "rank": base_stack.predictor.rank,
            }
            layers = self.config.layers or tuple(base_stack.hook_points)
            self.config = replace(self.config, layers=layers, **of_maps)
        return maps, base_stack

    def _settle(self, shapes: HookedLM, base_stack: ReSAE | None) -> TrainConfig:
        """Settings of the training loop; for a resumed run those that it continues with."""
        points = self._points(shapes)
        names = tuple(point.name for point in points)
        if base_stack is not None and list(names) != base_stack.hook_points:
            raise ValueError(
                f"--boost: {self.config.boost} has layers "
                f"{', '.join(base_stack.hook_points)}; leave "
                f"--layers out"
            )
        config = self.config.for_model(names, shapes.d_model)
        if config.warning and self.ranks.rank == 0:
            logging.warning(config.warning)
        require_rank(config, shapes)
        require_divisible(config, self.ranks)
        if config.first_sae is not None:
            kept_first(config, shapes.d_model)
        if self.config.resume:
            self.record = load_record(self.out / "run.json", "run")
            require_same_run(self.record, self.config, config, self.out)
            config = resumed_config(config, self.out)
        return config

    def _points(self, lm: HookedLM) -> list[HookPoint]:
        if not self.config.layers:
            raise ValueError("--layers is missing; name blocks or hook points, for example 1,3,5")
        return lm.hook_points(self.config.layers)

    # -- text and activations ----------------------------------------------------------------------

    def _trained_text(self) -> TrainedText | None:
        """The record of the text of this run; None where that of an earlier part is not known."""
        if self.config.resume and self.calibrated.exists():
            return TrainedText.load(self.out, self.ranks.rank, self.ranks.size)
        first = self.config.first_sae and str(Path(self.config.first_sae).parent)
        earlier = {"--boost": self.config.boost, "--maps": self.config.maps, "--first-sae": first}
        return _text_of(earlier.items(), self.console)

    def _measure_sinks(
        self, lm: HookedLM, rows: TokenRows, cache: ActivationCache | None, config: TrainConfig
    ) -> SinkRule | None:
        """The rule of sink tokens of a new run; of several ranks that of the first."""
        if not config.sink_factor:
            return None
        share = rows.shard(self.ranks.rank, self.ranks.size)
        rule = measure_sinks(
            cache or ModelActivations(lm, share, self._points(lm)), config.sink_factor
        )
        norms = torch.tensor(rule.median_norms, dtype=torch.float64, device=self.device)
        self.ranks.broadcast_([norms])
        return replace(rule, median_norms=tuple(norms.tolist()))

    def _source(
        self,
        lm: HookedLM,
        noted: TokenRows,
        cache: ActivationCache | None,
        sinks: SinkRule | None,
        config: TrainConfig,
    ) -> ActivationBatches:
        rank, world = self.ranks.rank, self.ranks.size
        points, share = self._points(lm), noted.shard(rank, world)
        activations = WithRows(cache, share) if cache else ModelActivations(lm, share, points)
        return ActivationBatches(
            lm,
            noted,
            points,
            batch_tokens=config.batch_tokens,
            buffer_tokens=config.buffer_tokens,
            buffer_dtype=getattr(torch, config.buffer_dtype),
            total_tokens=config.train_tokens,
            seed=config.seed,
            device=self.device,
            rank=rank,
            world=world,
            cache=_without(sinks, activations),
        )

    def _open_cache(
        self, lm: HookedLM, rows: TokenRows, part: str, ranks: Ranks, tokens: int = 0
    ) -> ActivationCache | None:
        """The activation cache of one part of the text, if the run has one; of several ranks each
        has one of its own share, which no other number of ranks can read."""
        if self.config.cache is None:
            return None
        folder = Path(self.config.cache)
        shares = [part]
        if ranks.size > 1:
            shares = [f"{part}.{rank}of{ranks.size}" for rank in range(ranks.size)]
        others = sorted({path.name for path in folder.glob(f"{part}*")} - set(shares))
        if others:
            raise ValueError(
                f"--cache: {folder} holds the shares of another number of ranks "
                f"({', '.join(others)}), here are {ranks.size}; start as many, or choose another "
                f"folder"
            )
        names = ("data", "text_column", "streaming", "seed")
        cache = ActivationCache(
            folder / shares[ranks.rank],
            ModelActivations(lm, rows.shard(ranks.rank, ranks.size), self._points(lm)),
            data={name: getattr(self.config, name) for name in names},
            dtype=self.config.cache_dtype,
        )
        if tokens:
            stored = sum(count for (count,) in ranks.all_gather_ints([cache.stored_tokens]))
            cache.require_disk(max(0, tokens - stored))
            self.console.log(
                f"activations: {cache.bytes_for(tokens) / 1e9:.2f} GB for {tokens:,} tokens in "
                f"{self.config.cache} (less where the text is shorter); {stored:,} tokens are there"
            )
        return cache

    # -- before the first step ---------------------------------------------------------------------

    def _go_on(self, config: TrainConfig) -> Calibration:
        """Calibration of the resumed run; its record is updated if it gets more tokens."""
        calibration = Calibration.load(self.calibrated, config.predictor)
        if self.ranks.rank == 0 and self.record["train"]["train_tokens"] != config.train_tokens:
            changed = self.record | {"train": asdict(config.resolved())}
            if "config" in changed:
                changed["config"] |= {"train_tokens": config.train_tokens}
            save_json(self.out / "run.json", changed)
        return calibration

    def _calibrate(
        self,
        lm: HookedLM,
        source: ActivationBatches,
        held_out: TokenRows,
        config: TrainConfig,
        maps: FittedMaps | None,
        base_stack: ReSAE | None,
        sinks: SinkRule | None,
    ) -> tuple[Calibration, list[dict[str, Any]]]:
        """The calibration, and the rows of R² that are recorded of it."""
        # Nothing here may hold on to `source.sequential()`: it would keep the first buffer in
        # memory for the whole training.
        if maps is not None:
            self.console.log(f"affine maps: those of {self.config.maps}")
            if maps.record.get("on_reconstructions") and config.loop == "open":
                self.console.log(
                    "warning: these maps were fitted on reconstructions, and in the open loop they "
                    "take activations; train with --loop closed"
                )
            return maps.calibration, maps.record["affine"]
        points = self._points(lm)
        if base_stack is not None:
            moments = measure_moments(
                lm, points, source.sequential(), config, self.console, self.ranks
            )
            return boost_calibration(base_stack, moments), []
        unseen: Iterable[list[Tensor]] = []
        if self.ranks.rank == 0:  # only rank 0 reports R²
            kept = self._open_cache(lm, held_out, "held_out", SINGLE_PROCESS)
            unseen = sequential(_without(sinks, kept or ModelActivations(lm, held_out, points)))
        calibration, table = fit_calibration(
            lm,
            points,
            source.sequential(),
            unseen,
            config,
            self.console,
            self.ranks,
            sinks=sinks,
        )
        _say_left_out(source.activations, self.console)
        return calibration, [row.to_dict() for row in table]

    def _begin(
        self,
        calibration: Calibration,
        affine: list[dict[str, Any]],
        config: TrainConfig,
        rows: TokenRows,
        held_out: TokenRows,
        text: TrainedText | None,
        command: str,
    ) -> None:
        """Write the run directory as it is before the first step; the calibration comes last."""
        ranks = self.ranks
        if ranks.rank == 0:
            record = record_of(self.asked, rows, affine, self.device, command)
            save_json(
                self.out / "run.json",
                record
                | {
                    "maps": self.config.maps,
                    "peak_lrs": config.peak_lrs,
                    "held_out_split": "train" if rows.skip else "validation",
                    "train": asdict(config.resolved()),
                },
            )
            save_held_out(self.out, held_out, self.config.context_tokens)
        ranks.barrier()  # nobody else writes into a folder that is not begun
        if text is not None:
            text.save(self.out, ranks.rank, ranks.size)
        if ranks.rank == 0:
            calibration.save(self.calibrated)

    # -- training ----------------------------------------------------------------------------------

    def _train(
        self,
        lm: HookedLM,
        source: ActivationBatches,
        held_out: TokenRows,
        calibration: Calibration,
        config: TrainConfig,
        text: TrainedText | None,
        stopping: Stopping,
    ) -> ReSAE | None:
        asked, ranks = self.config, self.ranks
        self.console.log(
            f"{len(config.layers)} autoencoders of {config.d_sae} latents on {lm.name}: "
            f"{config.steps:,} steps of {config.batch_tokens:,} tokens; checkpoints every "
            f"{asked.checkpoint_steps:,} steps"
        )
        unseen = list(held_out.batches(MODEL_ROWS)) if asked.eval_steps else []

        with stopping as should_stop, ExitStack() as until_done:
            loggers = metric_loggers(asked, config, until_done) if ranks.rank == 0 else []
            return train(
                config,
                source,
                calibration,
                self.out,
                identity=ModelIdentity.of(lm),
                device=self.device,
                ranks=ranks,
                **loop_options(
                    asked,
                    loggers,
                    self.console,
                    delta_ce=lambda stack: delta_ce(lm, stack.to(lm.device), unseen),
                    on_checkpoint=lambda: text and text.save(self.out, ranks.rank, ranks.size),
                    should_stop=should_stop,
                ),
            )
