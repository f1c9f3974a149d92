"""A whole online training: a finished run and its text → a run directory.

    finetune   what `resae finetune` does

Everything that can be wrong with the settings is found before the weights of the model are read.
"""

from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from resae.console import Console
from resae.data.activations import MODEL_ROWS
from resae.data.batches import RowBatches
from resae.data.config import Source
from resae.data.rows import TokenRows, read_rows
from resae.data.text_record import TrainedText, save_held_out
from resae.data.texts import fingerprint
from resae.environment import describe_device, environment, find_device
from resae.evaluation.comparison import delta_ce
from resae.evaluation.kept import kept_latents
from resae.models.hooked import HookedLM
from resae.stack.stack import ReSAE
from resae.storage import load_json, locked, save_json
from resae.training.calibration import Calibration
from resae.training.checkpoints import resumed_config
from resae.training.config import FinetuneConfig, OnlineConfig
from resae.training.loggers import loop_options, metric_loggers, require_loggers
from resae.training.online import layer_scales, require_topk, train_online
from resae.training.pipeline import Run, Stopping, load_model, never
from resae.training.runs import (
    RECORDED,
    load_record,
    model_of,
    open_run,
    require_same_text,
    require_startable,
)


def finetune(
    config: FinetuneConfig,
    *,
    console: Console | None = None,
    command: str = "resae.training.finetune",
    stopping: Stopping | None = None,
) -> Run:
    """Train the stack of a finished run online (`resae.training.online`), into a run directory.

    With `config.resume` the training in `config.out` continues from its newest checkpoint.

    Args:
        console, command, stopping: as of `resae.training.run`.

    Raises:
        ValueError: settings that do not fit together, or not the run, its model or the text; or the
            training diverged.
        FileNotFoundError: no such run, model or text.
        ModuleNotFoundError: a metric logger is not installed.
        OSError: another process writes into the folder, or the disk is full.
    """
    require_loggers(config)
    if dist.is_available() and dist.is_torchelastic_launched():
        raise ValueError("finetune: it trains in one process; start it without torchrun")
    out = Path(config.out)
    with locked(out):
        require_startable(out, config.resume)
        return _Finetuning(config, console or Console()).run(
            command, stopping or nullcontext(never)
        )


def source_of(config: FinetuneConfig, earlier: dict[str, Any], model: str) -> Source:
    """Model and text of an online training: those of the run's record, where none are given.

    Raises:
        ValueError: neither has text.
    """
    recorded = {name: earlier[name] for name in RECORDED if earlier.get(name) is not None}
    recorded.pop("dtype", None)
    if config.data is not None:
        for name in ("data_revision", "split", "encoding", "streaming"):
            recorded.pop(name, None)
        recorded |= {"data": config.data, "text_column": config.text_column}
    if "data" not in recorded:
        raise ValueError(f"finetune: {config.run} does not record its text; name some with --data")
    seed = earlier.get("train", {}).get("seed", 0)
    return Source(**recorded | {"model": model, "seed": seed})


class _Finetuning:
    """One online training, step by step."""

    def __init__(self, config: FinetuneConfig, console: Console):
        self.config = config
        self.console = console
        self.device = find_device(config.device)
        self.out = Path(config.out)
        self.calibrated = self.out / "calibration.safetensors"
        self.record: dict[str, Any] = {}
        """`run.json` of the training to resume; empty for a new one."""

    def run(self, command: str, stopping: Stopping) -> Run:
        self.console.log(f"device: {describe_device(self.device)}")
        earlier, stack = open_run(Path(self.config.run), self.device)
        require_topk(stack)
        name, revision = model_of(earlier, stack)
        shapes = HookedLM.described(name, tokenizer=None, revision=revision)
        stack.require_model(shapes)
        source = source_of(self.config, earlier, name)
        train_config = self.config.for_stack(stack, source.context_tokens)
        if self.config.resume:
            train_config = self._resumed(train_config)
        rows, held_out = read_rows(source, shapes)
        require_same_text(self.record, self.config, rows)
        batch_rows = train_config.batch_tokens // source.context_tokens
        rows.require_rows(batch_rows, "finetune: training rows of a step")
        text = self._text()
        lm = load_model(name, self.config.dtype, self.device, revision)
        batches = RowBatches(rows if text is None else rows.noted(text.add), batch_rows)
        if self.config.resume and self.calibrated.exists():
            calibration = self._calibration(stack)
        else:
            ids = next(RowBatches(rows, batch_rows).batches())[0][0]
            scale = layer_scales(lm, stack, ids)
            zeros = [torch.zeros(stack.d_in)] * stack.n_layers
            calibration = Calibration(stack.predictor, scale, zeros, stack.sinks)
            self._begin(earlier, source, train_config, rows, held_out, text, calibration, command)
        trained = self._train(
            lm, stack, batches, held_out, calibration, train_config, text, stopping
        )
        if trained is not None:
            self._report_kept(lm, stack, trained, held_out)
        return Run(self.out, train_config, trained)

    def _report_kept(self, lm: HookedLM, before: ReSAE, after: ReSAE, held_out: TokenRows) -> None:
        """Print how far latents stayed what they were, and add it to the record."""
        kept = kept_latents(lm, before, after, held_out.batches(MODEL_ROWS), self.config.loop)
        for line in kept.lines():
            self.console.log(line)
        record = load_json(self.out / "run.json", "run")
        save_json(self.out / "run.json", record | {"latents": asdict(kept)})

    def _resumed(self, config: OnlineConfig) -> OnlineConfig:
        """The settings that the training in `out` goes on with."""
        self.record = load_record(self.out / "run.json", "run")
        begun = self.record.get("finetuned")
        if begun != str(Path(self.config.run).resolve()):
            what = "is no online training" if begun is None else f"began with {begun}"
            raise ValueError(
                f"--resume: the run in {self.out} {what}, not with {self.config.run}; name the run "
                f"that it began with, or choose another --out"
            )
        return resumed_config(config, self.out)

    def _calibration(self, stack: ReSAE) -> Calibration:
        """The calibration of the resumed training, whose maps must still be the run's."""
        calibration = Calibration.load(self.calibrated, stack.predictor.kind)
        now, began = stack.predictor.tensors(), calibration.predictor.tensors()
        if now.keys() != began.keys() or any(
            not torch.equal(now[name].cpu(), began[name]) for name in now
        ):
            raise ValueError(
                f"--resume: the maps of {self.config.run} are not those that the training in "
                f"{self.out} began with; bring the run back, or choose another --out"
            )
        return calibration

    def _text(self) -> TrainedText | None:
        """The record of the text, that of the run included; None where that is not known."""
        if self.config.resume and self.calibrated.exists():
            return TrainedText.load(self.out)
        known = TrainedText.load(Path(self.config.run))
        if known is None:
            self.console.log(
                f"{self.config.run} has no record of the text that it was trained on, so that this "
                f"run gets none: `resae eval` will not know which text is new to it"
            )
            return None
        text = TrainedText()
        text.include(known)
        return text

    def _begin(
        self,
        earlier: dict[str, Any],
        source: Source,
        config: OnlineConfig,
        rows: TokenRows,
        held_out: TokenRows,
        text: TrainedText | None,
        calibration: Calibration,
        command: str,
    ) -> None:
        """Write the run directory as it is before the first step; the calibration comes last."""
        settings = asdict(self.config)
        settings.pop("resume")
        record = {
            **{name: getattr(source, name) for name in RECORDED if name != "dtype"},
            "dtype": self.config.dtype,
            "command": command,
            "config": settings,
            "finetuned": str(Path(self.config.run).resolve()),
            "data_fingerprint": fingerprint(rows.texts),
            "device": self.device,
            "affine": [] if config.train_maps else earlier.get("affine") or [],
            "environment": environment(),
            "held_out_split": "train" if rows.skip else "validation",
            "train": asdict(config.resolved()),
        }
        save_json(self.out / "run.json", record)
        save_held_out(self.out, held_out, source.context_tokens)
        if text is not None:
            text.save(self.out)
        calibration.save(self.calibrated)

    def _train(
        self,
        lm: HookedLM,
        stack: ReSAE,
        batches: RowBatches,
        held_out: TokenRows,
        calibration: Calibration,
        config: OnlineConfig,
        text: TrainedText | None,
        stopping: Stopping,
    ) -> ReSAE | None:
        asked = self.config
        self.console.log(
            f"{len(config.layers)} autoencoders, online in {lm.name}: {config.steps:,} steps of "
            f"{config.batch_tokens:,} tokens; checkpoints every {asked.checkpoint_steps:,} steps"
        )
        unseen = list(held_out.batches(MODEL_ROWS)) if asked.eval_steps else []

        with stopping as should_stop, ExitStack() as until_done:
            loggers = metric_loggers(asked, config, until_done)
            return train_online(
                config,
                batches,
                lm,
                stack,
                calibration.scale,
                self.out,
                **loop_options(
                    asked,
                    loggers,
                    self.console,
                    delta_ce=lambda whole: delta_ce(lm, whole, unseen),
                    on_checkpoint=lambda: text and text.save(self.out),
                    should_stop=should_stop,
                ),
            )
