"""The command line: `resae demo | fit | train | eval | generate | report | profile |
tune`.

Only this file prints. Bad input ends in one line, what was wrong and what to do, and exit code 2.
Arguments are read without torch: each function imports what it needs of it, so that `--help` and a
mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, fields, replace
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from resae import arguments as types
from resae.choices import DTYPES, FORMS, GPUS, KINDS, OPS, WAYS
from resae.environment import describe_device, environment, find_device, keep_freed_memory
from resae.recipes import EXTRA_METHODS, METHOD_GROUPS

if TYPE_CHECKING:
    import torch

    from resae.activation_cache import ActivationCache
    from resae.affine import Moments
    from resae.data import TokenRows
    from resae.distributed import Ranks
    from resae.evaluate import Method
    from resae.intervene import Interventions, StrongestLatents
    from resae.model import HookedLM, HookPoint
    from resae.replace import Generated
    from resae.stack import Loop, ReSAE
    from resae.text_record import Overlap, RunText, TrainedText
    from resae.train import Calibration, Progress, TrainConfig

HELD_OUT_DEFAULTS: dict[str, Any] = {
    "data": None,
    "text_column": "text",
    "streaming": False,
    "context_tokens": 128,
    "held_out_rows": 64,
}
"""What `eval` takes where neither the command nor the run says otherwise."""
ROW_SHAPE = ("context_tokens", "held_out_rows")
FITTED = ("predictor", "form", "rank", "calibration_tokens", "ridge")
"""Settings of the affine maps, which a folder of maps records and `--maps` takes from it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    options.command_line = shlex.join(
        ["resae", *(sys.argv[1:] if arguments is None else arguments)]
    )
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    keep_freed_memory()
    try:
        return options.run(options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if options.traceback:
            raise
        _complain(options, " ".join(str(error).split()))
        return 2
    except KeyboardInterrupt:
        _complain(options, "interrupted")
        return 130


def _complain(options: argparse.Namespace, line: str) -> None:
    print(f"resae {options.command}: {line}", file=sys.stderr, flush=True)


# -- what the commands share -----------------------------------------------------------------------


class Display:
    """Lines that stay, and one progress line: overwritten on a terminal, otherwise every 10 s."""

    def __init__(self, silent: bool = False) -> None:
        self._silent = silent
        self._terminal = sys.stdout.isatty()
        self._pending = False
        self._last = 0.0

    def say(self, line: str = "") -> None:
        if self._silent:
            return
        if self._pending:
            print()
        self._pending = False
        print(line, flush=True)

    def show(self, line: str) -> None:
        if self._silent:
            return
        if self._terminal:
            print(f"\r\033[K{line}", end="", flush=True)
            self._pending = True
        elif time.monotonic() - self._last >= 10:
            print(line, flush=True)
            self._last = time.monotonic()


def _choose_devices(options: argparse.Namespace, display: Display) -> None:
    """Settle where to run, and say so."""
    options.device = find_device(options.device)
    line = f"device: {describe_device(options.device)}"
    apart = getattr(options, "model_device", None)
    if apart is not None and apart != "auto":
        options.model_device = find_device(apart)
    display.say(line if apart is None else f"{line}; language model: {apart}")


def _described(name: str) -> HookedLM:
    """A model without its weights, by which layers, sizes and text are judged before they are
    read."""
    from resae.model import HookedLM

    _quiet_libraries()
    return HookedLM.described(name, tokenizer=True)


def _load_model(options: argparse.Namespace, name: str) -> HookedLM:
    import torch

    from resae.model import HookedLM

    device = getattr(options, "model_device", None) or options.device
    return HookedLM.from_pretrained(name, dtype=getattr(torch, options.dtype), device=device)


def _quiet_libraries() -> None:
    """Only our own progress is shown; downloads keep theirs."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _data(options: argparse.Namespace, lm: HookedLM) -> tuple[TokenRows, TokenRows]:
    from resae.data import train_and_held_out
    from resae.model import EMBEDDED

    if options.data != EMBEDDED:
        import datasets

        datasets.disable_progress_bars()
        # It logs what it then raises, as an error that takes one line.
        datasets.logging.set_verbosity(logging.CRITICAL)
    return train_and_held_out(
        options.data,
        lm,
        context_tokens=options.context_tokens,
        held_out_rows=options.held_out_rows,
        text_column=options.text_column,
        streaming=options.streaming,
        seed=options.seed,
    )


def _captured(
    lm: HookedLM, rows: TokenRows, points: Sequence[HookPoint]
) -> Iterator[list[torch.Tensor]]:
    from resae.data import MODEL_ROWS, capture_tokens

    return (capture_tokens(lm, ids, points) for ids in rows.batches(MODEL_ROWS))


def _moments(
    lm: HookedLM,
    points: Sequence[HookPoint],
    batches: Iterable[Sequence[torch.Tensor]],
    config: TrainConfig,
    display: Display,
    ranks: Ranks,
) -> Moments:
    from resae.train import sum_moments

    def shown() -> Iterator[Sequence[torch.Tensor]]:
        done = 0
        for xs in batches:
            done += len(xs[0])
            share = min(1.0, done * ranks.size / config.moment_tokens)
            display.show(f"affine maps: {share:4.0%} of {config.moment_tokens:,} tokens")
            yield xs

    # The identity needs no products of activations, so its moments are in everyone's.
    moments = sum_moments(
        config.predictor,
        shown(),
        tokens=-(-config.moment_tokens // ranks.size),
        d_in=lm.d_model,
        n_layers=len(points),
    )
    ranks.add_up_(moments)
    if moments.count < config.moment_tokens:
        display.say(
            f"affine maps: the data has {moments.count:,} tokens, fewer than the "
            f"{config.moment_tokens:,} asked for"
        )
    return moments


def _calibrate(
    lm: HookedLM,
    points: Sequence[HookPoint],
    batches: Iterable[Sequence[torch.Tensor]],
    unseen: Iterable[Sequence[torch.Tensor]],
    config: TrainConfig,
    display: Display,
    ranks: Ranks,
) -> tuple[Calibration, list[dict[str, Any]]]:
    """The calibration by `batches` of L activations, and R² per hop on those of held-out tokens,
    beside the identity's; of a hop that several layers are sources of, also their shares. There
    are none without a predictor (nothing held out is read then) or where `unseen` is empty."""
    from resae.affine import r2_per_layer, routing_shares
    from resae.evaluate import predictor_name
    from resae.report import LABELS
    from resae.train import calibrate

    moments = _moments(lm, points, batches, config, display, ranks)
    form: dict[str, Any] = {"form": config.form, "rank": config.rank}
    calibration = calibrate(config.predictor, moments, ridge=config.ridge, **form)
    table: list[dict[str, Any]] = []
    unseen = [] if config.predictor == "none" else [[x.cpu() for x in xs] for xs in unseen]
    if not unseen:
        return calibration, table
    compared = [calibrate("identity", moments, ridge=config.ridge).predictor]
    if config.predictor != "identity":
        compared.append(calibration.predictor)
    for maps in compared:
        shares = routing_shares(maps, moments)
        for i, r2 in enumerate(r2_per_layer(maps, unseen)):
            hop = f"{points[i].name} → {points[i + 1].name}"
            row = {"method": predictor_name(maps.kind, maps.form), "hop": hop, "r2": r2}
            if len(shares[i]) > 1:
                row["shares"] = {
                    point.name: share
                    for point, share in zip(points[: i + 1], shares[i], strict=True)
                }
            table.append(row)
    for row in table:
        display.say(f"R² {row['hop']}  {LABELS[row['method']]}: {row['r2']:.4f}")
        for source, share in row.get("shares", {}).items():
            display.say(f"   {share:6.1%} from {source}")
    return calibration, table


def _stored(
    options: argparse.Namespace,
    lm: HookedLM,
    points: Sequence[HookPoint],
    rows: TokenRows,
    part: str,
    display: Display,
    ranks: Ranks,
    tokens: int = 0,
) -> ActivationCache | None:
    """The activation cache of one part of the text, if --cache asks for one; of several ranks each
    has one of its own share, which no other number of ranks can read."""
    from resae.activation_cache import ActivationCache
    from resae.data import ModelActivations

    if options.cache is None:
        return None
    folder = Path(options.cache)
    shares = [part]
    if ranks.size > 1:
        shares = [f"{part}.{rank}of{ranks.size}" for rank in range(ranks.size)]
    others = sorted({path.name for path in folder.glob(f"{part}*")} - set(shares))
    if others:
        raise ValueError(
            f"--cache: {folder} holds the shares of another number of ranks "
            f"({', '.join(others)}), here are {ranks.size}; start as many, or choose another folder"
        )
    names = ("data", "text_column", "streaming", "seed")
    cache = ActivationCache(
        folder / shares[ranks.rank],
        ModelActivations(lm, rows.shard(ranks.rank, ranks.size), points),
        data={name: getattr(options, name) for name in names},
        dtype=options.cache_dtype,
    )
    if tokens:
        stored = sum(count for (count,) in ranks.every([cache.stored_tokens]))
        cache.require_disk(max(0, tokens - stored))
        display.say(
            f"activations: {cache.bytes_for(tokens) / 1e9:.2f} GB for {tokens:,} tokens in "
            f"{options.cache} (less where the text is shorter); {stored:,} tokens are there"
        )
    return cache


def _train_config(
    options: argparse.Namespace, lm: HookedLM, points: Sequence[HookPoint], base: ReSAE | None
) -> TrainConfig:
    from resae.train import TrainConfig

    chosen = {
        f.name: getattr(options, f.name)
        for f in fields(TrainConfig)
        if getattr(options, f.name, None) is not None
    }
    chosen["layers"] = tuple(point.name for point in points)
    chosen["k"] = options.k_per_layer or (options.k,) * len(points)
    M = options.d_sae or (options.expansion * lm.d_model,)
    chosen["d_sae"] = M[0] if len(M) == 1 else M
    if base is not None:
        maps = base.predictor
        chosen |= {"predictor": maps.kind, "form": maps.form, "rank": maps.rank}
    return TrainConfig(**chosen)


def _require_rank(config: TrainConfig, lm: HookedLM) -> None:
    if config.rank is not None and config.rank > lm.d_model:
        raise ValueError(
            f"--rank {config.rank} exceeds the width of {lm.name}, {lm.d_model}; lower it"
        )


RECORDED = (
    "model",
    "data",
    "text_column",
    "streaming",
    "context_tokens",
    "held_out_rows",
    "dtype",
)
"""Options that say what a run read."""


def _run_record(options: argparse.Namespace, rows: TokenRows, affine: Any) -> dict[str, Any]:
    from resae.data import fingerprint

    return {
        "command": options.command_line,
        **{name: getattr(options, name) for name in RECORDED},
        "data_fingerprint": fingerprint(rows.texts),
        "device": str(options.device),
        "affine": affine,
        "environment": environment(),
    }


# -- commands --------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> int:
    from resae.report import require_matplotlib
    from resae.storage import is_unused, locked

    require_matplotlib()
    out = Path(options.out)
    with locked(out):
        if not is_unused(out) and not (out / "report.json").exists():
            raise ValueError(f"{out} exists and is not an earlier demo; choose another --out")
        return _demo_into(out, options)


def _demo_into(out: Path, options: argparse.Namespace) -> int:
    import torch

    from resae.demo import DemoConfig, run_demo
    from resae.report import write_report

    _quiet_libraries()
    # The model is so small that a second thread gains a third, and loses far more than that where
    # another process is using its core.
    torch.set_num_threads(options.threads)
    display = Display()
    display.say(f"device: {describe_device('cpu')}, where the demo always runs")
    named = (METHOD_GROUPS.get(name, (name,)) for name in options.methods)
    methods = tuple(dict.fromkeys(chain.from_iterable(named)))
    config = DemoConfig(
        layers=options.layers,
        k=options.k,
        seed=options.seed,
        methods=methods,
        **_demo_sizes(options),
    )
    report = run_demo(out, config, say=display.say, show=display.show)
    page = write_report(out)
    display.say()
    for sentence in report["findings"]:
        display.say(f"• {sentence}")
    display.say()
    display.say(f"report: {page}   rows: {out / 'report.json'}   stacks: {out / 'stacks'}")
    return 0


def _demo_sizes(options: argparse.Namespace) -> dict[str, int]:
    sizes = {"train_tokens": options.train_tokens, "held_out_rows": options.held_out_rows}
    return {name: value for name, value in sizes.items() if value is not None}


def _fit(options: argparse.Namespace) -> int:
    from resae.storage import is_unused, locked

    out = Path(options.out)
    with locked(out):
        if not is_unused(out):
            raise ValueError(f"{out} exists and is not empty; choose another --out")
        return _fit_into(out, options)


def _fit_into(out: Path, options: argparse.Namespace) -> int:
    from resae.distributed import ALONE
    from resae.storage import save_json
    from resae.text_record import TrainedText
    from resae.train import TrainConfig

    display = Display()
    _choose_devices(options, display)
    shapes = _described(options.model)
    points = shapes.hook_points(options.layers)
    chosen = {name: getattr(options, name) for name in FITTED}
    config = TrainConfig(
        layers=tuple(p.name for p in points),
        k=(1,) * len(points),
        d_sae=1,
        seed=options.seed,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    _require_rank(config, shapes)
    rows, held_out = _data(options, shapes)
    lm = _load_model(options, options.model)
    text = TrainedText()
    batches = _captured(lm, rows.noted(text.add), points)
    unseen = _captured(lm, held_out, points)
    calibration, affine = _calibrate(lm, points, batches, unseen, config, display, ALONE)
    calibration.save(out / "calibration.safetensors")
    text.save(out)
    fitted = {name: getattr(config, name) for name in ("layers", *FITTED, "seed")}
    save_json(out / "fit.json", {**_run_record(options, rows, affine), **fitted})
    display.say(f"written to {out}; next: resae train … --maps {out}")
    return 0


def _train(options: argparse.Namespace) -> int:
    if options.plan:
        return _plan(options)
    from resae.distributed import Ranks
    from resae.storage import locked
    from resae.watch import Watch

    _require_followers(options)
    ranks, options.device = Ranks.launched(options.parallel, find_device(options.device))
    out = Path(options.out)
    complain = partial(_complain, options)
    with (
        Watch(ranks.rank, ranks.size, complain, with_traceback=options.traceback),
        locked(out) if ranks.rank == 0 else nullcontext(),
    ):
        _require_startable(out, options.resume)
        return _train_into(out, options, ranks)


def _require_startable(out: Path, resume: bool) -> None:
    """Refuse to start where there is something, and to resume where there is nothing."""
    from resae.storage import is_unused

    if not resume and not is_unused(out):
        raise ValueError(
            f"{out} exists and is not empty; go on with --resume, or choose another --out"
        )
    if resume and not (out / "run.json").exists():
        raise FileNotFoundError(
            f"--resume: no run in {out} to go on with (no run.json there); give the --out that the "
            f"run began with, or leave --resume out to begin one"
        )


def _train_into(out: Path, options: argparse.Namespace, ranks: Ranks) -> int:
    import torch

    from resae.data import (
        MODEL_ROWS,
        ActivationBatches,
        ModelActivations,
        WithRows,
        fingerprint,
        in_order,
    )
    from resae.distributed import ALONE
    from resae.evaluate import delta_ce
    from resae.stack import ModelIdentity
    from resae.storage import load_json, save_json
    from resae.text_record import save_held_out
    from resae.train import (
        Calibration,
        boost_calibration,
        require_divisible,
        resumed_config,
        train,
    )

    display = Display(silent=ranks.rank > 0)
    _choose_devices(options, display)
    if options.model_device == "auto" and (ranks.size > 1 or options.eval_steps):
        raise ValueError(
            "--model-device auto, where all devices hold one model, with several ranks or "
            "--eval-steps; leave these out, and use `resae eval` on the run"
        )
    if options.cache_dtype is not None and options.cache is None:
        raise ValueError("--cache-dtype without --cache; name the folder of the cache too")
    if options.eval_steps and not options.held_out_rows:
        raise ValueError("--eval-steps with --held-out-rows 0; hold rows out to measure on")
    shapes = _described(options.model)
    maps = None if options.maps is None else _Maps.open(options)
    base = None if options.boost is None else _open_run(Path(options.boost), "cpu")[1]
    if base is not None:
        base.require_model(shapes)
        options.layers = options.layers or base.hook_points
    if not options.layers:
        raise ValueError("--layers is missing; name blocks or hook points, for example 1,3,5")
    points = shapes.hook_points(options.layers)
    if base is not None and [point.name for point in points] != base.hook_points:
        raise ValueError(
            f"--boost: {options.boost} has layers {', '.join(base.hook_points)}; leave --layers out"
        )
    config = _train_config(options, shapes, points, base)
    if config.warning and ranks.rank == 0:
        logging.warning(config.warning)
    _require_rank(config, shapes)
    require_divisible(config, ranks)
    began: dict[str, Any] = {}
    if options.resume:
        began = load_json(out / "run.json", "run")
        _require_same_run(began, options, config, out)
        config = resumed_config(config, out)
    rows, held_out = _data(options, shapes)
    if began.get("data_fingerprint") not in (None, fingerprint(rows.texts)):
        raise ValueError(
            f"--resume: {options.data} holds other text than the run in {out} began with; bring it "
            f"back, or choose another --out"
        )
    if maps is not None:
        maps.require_fit(options, config, shapes, rows)
    lm = _load_model(options, options.model)
    text = _trained_text(out, options, display, ranks)
    noted = rows if text is None else rows.noted(text.add)
    stored = _stored(options, lm, points, rows, "train", display, ranks, config.train_tokens)
    source = ActivationBatches(
        lm,
        noted,
        points,
        batch_tokens=config.batch_tokens,
        buffer_tokens=config.buffer_tokens,
        buffer_dtype=getattr(torch, config.buffer_dtype),
        total_tokens=config.train_tokens,
        seed=config.seed,
        device=options.device,
        rank=ranks.rank,
        world=ranks.size,
        stored=stored and WithRows(stored, noted.shard(ranks.rank, ranks.size)),
    )
    calibrated = out / "calibration.safetensors"
    if options.resume and calibrated.exists():
        calibration = Calibration.load(calibrated, config.predictor)
        if ranks.rank == 0 and began["train"]["train_tokens"] != config.train_tokens:
            save_json(out / "run.json", began | {"train": asdict(config.resolved())})
    else:
        # Nothing here may hold on to `source.in_order()`: it would keep the first buffer in memory
        # for the whole training.
        if maps is not None:
            calibration, affine = maps.calibration, maps.record["affine"]
            display.say(f"affine maps: those of {options.maps}")
        elif base is None:
            hop_batches: Iterable[list[torch.Tensor]] = []
            if ranks.rank == 0:  # who writes down what comes of it
                kept = _stored(options, lm, points, held_out, "held_out", display, ALONE)
                hop_batches = in_order(kept or ModelActivations(lm, held_out, points))
            calibration, affine = _calibrate(
                lm, points, source.in_order(), hop_batches, config, display, ranks
            )
        else:
            moments = _moments(lm, points, source.in_order(), config, display, ranks)
            calibration, affine = boost_calibration(base, moments), []
        if ranks.rank == 0:
            split = {"held_out_split": "train" if rows.skip else "validation"}
            settings = {"maps": options.maps, "peak_lrs": config.peak_lrs} | split
            settings["train"] = asdict(config.resolved())
            save_json(out / "run.json", {**_run_record(options, rows, affine), **settings})
            save_held_out(out, held_out, options.context_tokens)
        ranks.meet()  # nobody else writes into a folder that is not begun
        if text is not None:
            text.save(out, ranks.rank, ranks.size)
        if ranks.rank == 0:
            calibration.save(calibrated)
    display.say(
        f"{len(points)} autoencoders of {config.d_sae} latents on {lm.name}: {config.steps:,} "
        f"steps of {config.batch_tokens:,} tokens; checkpoints every "
        f"{options.checkpoint_steps:,} steps"
    )

    unseen = list(held_out.batches(MODEL_ROWS)) if options.eval_steps else []

    def progress(p: Progress) -> None:
        display.say(p.line())
        for follow in followers:
            follow(p)

    with _Interruptible() as interrupt, ExitStack() as until_done:
        followers = _followers(options, config, out, until_done) if ranks.rank == 0 else []
        stack = train(
            config,
            source,
            calibration,
            out,
            identity=ModelIdentity.of(lm),
            device=options.device,
            resume=options.resume,
            checkpoint_steps=options.checkpoint_steps,
            keep_checkpoints=options.keep_checkpoints,
            log_steps=options.log_steps,
            eval_steps=options.eval_steps,
            delta_ce=lambda stack: delta_ce(lm, stack.to(lm.device), unseen),
            on_progress=progress,
            on_checkpoint=lambda: text and text.save(out, ranks.rank, ranks.size),
            should_stop=interrupt.asked,
            ranks=ranks,
        )
    if stack is None:
        display.say(f"stopped; a checkpoint is in {out / 'checkpoints'}, go on with --resume")
        return 130
    display.say(f"written to {out}; next: resae eval {out}")
    return 0


def _trained_text(
    out: Path, options: argparse.Namespace, display: Display, ranks: Ranks
) -> TrainedText | None:
    """What a run notes its text in; None where the text of an earlier part is not known."""
    from resae.text_record import TrainedText

    if options.resume and (out / "calibration.safetensors").exists():
        return TrainedText.load(out, ranks.rank, ranks.size)
    text = TrainedText()
    for option, folder in (("--boost", options.boost), ("--maps", options.maps)):
        if folder is None:
            continue
        earlier = TrainedText.load(Path(folder))
        if earlier is None:
            display.say(
                f"{option}: {folder} has no record of the text that it was fitted on, so that this "
                f"run gets none: `resae eval` will not know which text is new to it"
            )
            return None
        text.include(earlier)
    return text


class _Maps(NamedTuple):
    """Maps that were fitted before, by `resae fit` or in a run, and what is recorded of them."""

    record: dict[str, Any]
    calibration: Calibration

    @classmethod
    def open(cls, options: argparse.Namespace) -> _Maps:
        """Open `--maps`, and take from it the layers and settings that the command leaves open."""
        from resae.storage import load_json
        from resae.train import Calibration

        if options.boost is not None:
            raise ValueError("--maps with --boost, which keeps the maps of its run; leave one out")
        folder = Path(options.maps)
        files = [folder / name for name in ("fit.json", "run.json")]
        file = next((file for file in files if file.exists()), None)
        if file is None:
            raise FileNotFoundError(
                f"--maps: {folder} holds no maps (no fit.json); make them with `resae fit`"
            )
        record = load_json(file, "maps")
        record |= record.get("train", {})
        if not record.keys() >= {"layers", *FITTED}:
            raise ValueError(f"--maps: {file} was written by an earlier resae; fit the maps anew")
        for name in FITTED:
            asked = getattr(options, name)
            if asked is not None and asked != record[name]:
                raise ValueError(
                    f"--maps: those of {folder} have {name}={record[name]}, asked for {asked}; "
                    f"leave the option out, or fit other maps"
                )
            setattr(options, name, record[name])
        options.layers = options.layers or tuple(record["layers"])
        return cls(
            record, Calibration.load(folder / "calibration.safetensors", record["predictor"])
        )

    def require_fit(
        self,
        options: argparse.Namespace,
        config: TrainConfig,
        shapes: HookedLM,
        rows: TokenRows,
    ) -> None:
        """Raise ValueError for maps of another model, of other layers, or that were fitted on rows
        that are now held out."""
        began, now = self.record["model"], options.model
        same = began == now or (Path(began).is_dir() and Path(began).samefile(now))
        if not same or len(self.calibration.mean[0]) != shapes.d_model:
            raise ValueError(
                f"--maps: fitted on model {began}, here is {now}; fit them on this one"
            )
        if tuple(self.record["layers"]) != config.layers:
            raise ValueError(
                f"--maps: of layers {', '.join(self.record['layers'])}, here are "
                f"{', '.join(config.layers)}; leave --layers out"
            )
        # Without a split for validation the first rows are held out: which, these options say.
        names = ("text_column", "streaming", "context_tokens", "held_out_rows", "seed")
        other = [name for name in names if self.record[name] != getattr(options, name)]
        if rows.skip and self.record["data"] == options.data and other:
            raise ValueError(
                f"--maps: fitted with {', '.join(f'{n}={self.record[n]}' for n in other)} on this "
                f"text, of which other rows are held out here; use the same, or fit them anew"
            )


def _plan(options: argparse.Namespace) -> int:
    import torch

    from resae.data import MODEL_ROWS
    from resae.distributed import Ranks
    from resae.model import HookedLM
    from resae.plan import Device, ModelSizes, plan

    _quiet_libraries()
    lm = HookedLM.described(options.model)
    if options.boost is not None or not options.layers:
        raise ValueError("--plan: name the layers; a boost is planned like an SAE of its own")
    lm.require_context(options.context_tokens)
    config = _train_config(options, lm, lm.hook_points(options.layers), None)
    device = Device()
    if options.plan_device is not None:
        product, bandwidth = options.plan_device
        name = f"{product:.3g} FLOP/s, {bandwidth:.3g} B/s"
        device = Device(name, product, product, product, bandwidth)
    cached = getattr(torch, options.cache_dtype or options.dtype) if options.cache else None
    estimate = plan(
        config,
        ModelSizes.of(lm, config.layers, options.context_tokens),
        device=replace(device, utilisation=options.plan_utilisation),
        ranks=Ranks(0, options.plan_ranks, options.parallel),
        model_dtype=getattr(torch, options.dtype),
        context_tokens=options.context_tokens,
        model_rows=MODEL_ROWS,
        keep_checkpoints=options.keep_checkpoints,
        checkpoint_steps=options.checkpoint_steps,
        cache_dtype=cached,
    )
    print(estimate.table())
    return 0


def _require_followers(options: argparse.Namespace) -> None:
    """Raise ModuleNotFoundError before anything runs, not after."""
    wanted = {"tensorboard": options.tensorboard, "wandb": options.wandb is not None}
    for name, asked in wanted.items():
        if asked and name not in sys.modules and not find_spec(name):
            raise ModuleNotFoundError(
                f'--{name}: {name} is not installed; pip install "resae[{name}]"'
            )


def _followers(
    options: argparse.Namespace, config: TrainConfig, out: Path, until_done: ExitStack
) -> list[Callable[[Progress], None]]:
    """What else shall hear of the progress: TensorBoard, Weights & Biases."""
    from resae.storage import load_json, save_json

    followers: list[Callable[[Progress], None]] = []
    if options.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writers: list[Any] = []

        def to_tensorboard(p: Progress) -> None:
            if not writers:  # a resumed run drops what came after its checkpoint
                writer = SummaryWriter(str(out / "tensorboard"), purge_step=p.step)
                writers.append(until_done.enter_context(writer))
            for name, value in _scalars(p, config).items():
                writers[0].add_scalar(name, value, p.step)
            writers[0].flush()

        followers.append(to_tensorboard)
    if options.wandb is not None:
        import wandb  # pyright: ignore[reportMissingImports]

        known = out / "wandb.json"
        run_id = load_json(known, "wandb run")["id"] if known.exists() else None
        settings = {"project": options.wandb, "name": out.name, "dir": str(out)}
        run = wandb.init(**settings, config=asdict(config), id=run_id, resume="allow")
        until_done.callback(run.finish)
        save_json(known, {"id": run.id})
        followers.append(lambda p: run.log(_scalars(p, config), step=p.step))
    return followers


def _scalars(p: Progress, config: TrainConfig) -> dict[str, float]:
    """The numbers of a progress line by name."""
    scalars = {"loss": p.loss, "tokens": p.tokens, "tokens_per_second": p.tokens_per_second}
    for name, metrics in zip(config.layers, p.layers, strict=True):
        scalars |= {f"{name}/{key}": value for key, value in metrics._asdict().items()}
    return scalars | {f"delta_ce/{way}": nats for way, nats in (p.delta_ce or {}).items()}


def _require_same_run(
    record: dict[str, Any], options: argparse.Namespace, config: TrainConfig, out: Path
) -> None:
    """A run goes on with the model, text and maps that it began with, or not at all."""
    names = (*RECORDED, "maps")
    began = {name: record.get(name) for name in names}
    fitted = ("layers", "predictor", "form", "rank")
    began |= {name: record["train"].get(name) for name in fitted}
    now = {name: getattr(options, name) for name in names}
    now |= {name: getattr(config, name) for name in fitted} | {"layers": list(config.layers)}
    changed = [name for name in began if began[name] != now[name]]
    if changed:
        raise ValueError(
            f"--resume: the run in {out} began with "
            f"{', '.join(f'{name}={began[name]}' for name in changed)}; use the same, or another "
            f"--out"
        )


class _Interruptible:
    """Inside, the first Ctrl-C or SIGTERM only asks to stop after the step; a second one
    insists."""

    def __init__(self) -> None:
        self._asked = False

    def asked(self) -> bool:
        return self._asked

    def __enter__(self) -> _Interruptible:
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:  # noqa: ARG002
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True


def _open_run(folder: Path, device: str) -> tuple[dict[str, Any], ReSAE]:
    """The record and the stack of a finished run."""
    from resae.stack import ReSAE
    from resae.storage import load_json

    if not (folder / "run.json").exists() and not (folder / "resae.json").exists():
        raise FileNotFoundError(f"{folder} is not a run directory; make one with `resae train`")
    if not (folder / "resae.json").exists():
        raise ValueError(
            f"the run in {folder} is not finished; go on with `resae train … --resume`"
        )
    record = load_json(folder / "run.json", "run") if (folder / "run.json").exists() else {}
    return record, ReSAE.load(folder).to(device)


def _model_of(options: argparse.Namespace, record: dict[str, Any], stack: ReSAE) -> str:
    if options.model:
        return options.model
    if "model" in record:
        return record["model"]
    if stack.model_identity is not None:
        return stack.model_identity.name
    raise ValueError("the stack does not say on which model it was trained; name it with --model")


def _eval(options: argparse.Namespace) -> int:
    from resae.data import MODEL_ROWS
    from resae.evaluate import evaluate, forward_passes
    from resae.report import whole_selection
    from resae.storage import require_writable, save_json

    display = Display()
    _choose_devices(options, display)
    folders = [Path(folder) for folder in options.run_directories]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("a run is named twice; name each once")
    runs = [(folder, *_open_run(folder, options.device)) for folder in folders]
    out = Path(options.out or folders[0])
    require_writable(out)
    methods = _methods(runs, options.k)
    record = runs[0][1]
    shapes = _described(_model_of(options, record, runs[0][2]))
    for folder, _, stack in runs:
        stack.require_model(shapes)
        if stack.hook_points != runs[0][2].hook_points:
            raise ValueError(
                f"{folder} has layers {', '.join(stack.hook_points)}, {folders[0]} has "
                f"{', '.join(runs[0][2].hook_points)}; evaluate them apart"
            )
    ids, overlaps = _unseen(
        options, [(folder, record) for folder, record, _ in runs], shapes, display
    )
    lm = _load_model(options, shapes.name)
    batches = list(ids.split(MODEL_ROWS))
    display.say(
        f"{forward_passes(methods)} passes over {ids.numel():,} held-out tokens of {options.data}"
    )
    began = time.perf_counter()

    def progress(done: int) -> None:
        left = (time.perf_counter() - began) * (len(batches) - done) / done
        display.show(f"{done}/{len(batches)} batches, about {left:.0f} s left")

    report = evaluate(lm, methods, batches, on_batch=progress)
    config = {
        "model": lm.name,
        "data": options.data,
        "layers": runs[0][2].hook_points,
        "d_sae": runs[0][2].d_sae,
        "train_tokens": record.get("train", {}).get("train_tokens", 0),
        "runs": [str(folder) for folder, _, _ in runs],
        "held_out_rows": len(ids),
        "context_tokens": ids.shape[1],
        "trained_on": overlaps,
    }
    training = [
        {"method": m.name, "k": m.k, "log": _log(folder)}
        for m, (folder, _, _) in zip(methods[:: len(options.k or (0,))], runs, strict=False)
        if (folder / "log.jsonl").exists()
    ]
    save_json(
        out / "report.json",
        {
            "schema_version": 1,
            "title": f"Evaluation of {', '.join(folder.name for folder, _, _ in runs)}",
            "config": config,
            "environment": environment(),
            **report,
            "affine": _affine([record for _, record, _ in runs]),
            "training": training,
        },
    )
    _print_table(display, whole_selection(report["replacement"]))
    display.say(f"written to {out / 'report.json'}; next: resae report {out}")
    return 0


def _unseen(
    options: argparse.Namespace,
    runs: Sequence[tuple[Path, dict[str, Any]]],
    lm: HookedLM,
    display: Display,
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Rows `[R, T]` to evaluate on, and per run how much of them it was trained on.

    Raises:
        ValueError: text that a run was trained on, or may have been, unless that is allowed.
    """
    from resae.text_record import RunText

    texts = [RunText.load(folder) for folder, _ in runs]
    unknown = [str(folder) for (folder, _), text in zip(runs, texts, strict=True) if text is None]
    if unknown and not options.allow_trained_text:
        raise ValueError(
            f"{unknown[0]} has no record of the text that it was trained on (a run of an earlier "
            f"version, or a stack without its run), so that no text is known to be new to it; "
            f"evaluate all the same with --allow-trained-text"
        )
    ids = _rows_to_evaluate(options, runs, [text for text in texts if text is not None], lm)
    overlaps = []
    for (folder, _), text in zip(runs, texts, strict=True):
        known = None if text is None else text.overlap(ids)
        row = {"run": str(folder), "held_out": text is not None and known is None}
        overlaps.append(row if known is None else row | known._asdict())
        if text is None:
            display.say(f"{folder}: not known whether it was trained on this text")
        elif known is not None:
            _require_new(options, folder, known, display)
    return ids, overlaps


def _require_new(
    options: argparse.Namespace, folder: Path, known: Overlap, display: Display
) -> None:
    """Say how much of the text a run was trained on; refuse more than chance unless allowed."""
    share = f"{known.known:,} of {known.compared:,} compared pieces of 16 tokens"
    if known.new or options.allow_trained_text:
        display.say(f"{folder} was trained on {share} of this text")
        return
    if known.new is None:
        raise ValueError(
            f"too little of this text can be compared with what {folder} was trained on "
            f"({known.compared} pieces of 16 tokens) to tell whether it is new; give more rows, "
            f"longer ones, or --allow-trained-text"
        )
    raise ValueError(
        f"{folder} was trained on this text ({share} are in its training text); evaluate runs "
        f"apart, or on other text with --data, or take this with --allow-trained-text"
    )


def _rows_to_evaluate(
    options: argparse.Namespace,
    runs: Sequence[tuple[Path, dict[str, Any]]],
    texts: Sequence[RunText],
    lm: HookedLM,
) -> torch.Tensor:
    """`[R, T]`: those that were held out by the runs, as they recorded them; or of the text that is
    given, or of a validation split, which is never trained on, any that are asked for."""
    import torch

    from resae.text_record import held_out_by_all, in_rows_of

    folder, record = runs[0]
    given = options.data is not None
    for name, default in HELD_OUT_DEFAULTS.items():
        if getattr(options, name) is None and (given or name not in ROW_SHAPE):
            setattr(options, name, record.get(name, default))
    if options.data is None:
        raise ValueError(f"{folder} does not say which text to evaluate on; name it with --data")
    kept = None if given or len(texts) < len(runs) else held_out_by_all(texts)
    if kept is not None:
        headed = (lm.tokenizer.bos_token_id, lm.tokenizer.eos_token_id) != (None, None)
        context = options.context_tokens or kept.shape[1]
        lm.require_context(context)
        kept = in_rows_of(kept, context, headed)
        kept = kept[: options.held_out_rows]
        if len(kept) and len(kept) >= (options.held_out_rows or 0):
            return kept
        if record.get("held_out_split") != "validation":
            raise ValueError(
                f"{folder} held out {len(kept)} rows of {kept.shape[1]} tokens and trained on the "
                f"rest of {options.data}; ask for at most so many, or give other text with --data"
            )
    for name in ROW_SHAPE:
        if getattr(options, name) is None:
            setattr(options, name, record.get(name, HELD_OUT_DEFAULTS[name]))
    options.seed = record.get("train", {}).get("seed", 0)
    return torch.stack(list(_data(options, lm)[1]))


def _affine(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """R² per method and hop, of the first run that has it."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in chain.from_iterable(record.get("affine", []) for record in records):
        rows.setdefault((row["method"], row["hop"]), row)
    return list(rows.values())


def _methods(
    runs: Sequence[tuple[Path, dict[str, Any], ReSAE]], ks: Sequence[int] | None
) -> list[Method]:
    """Every run, at every k asked for; and the maps alone."""
    from resae.evaluate import Method, method_name
    from resae.stack import AffineOnly

    methods: list[Method] = []
    for folder, _, stack in runs:
        for k in ks or (stack.sae(0).config.k,):
            name = method_name(stack)
            if any((m.name, m.k) == (name, k) for m in methods):
                name = f"{name} ({folder.name})"
            methods.append(Method(name, stack.at_k(k) if ks else stack, k))
    chained = next((stack for _, _, stack in runs if stack.chained), None)
    if chained is not None:
        methods.append(Method("affine_only", AffineOnly(chained), None))
    return methods


def _log(folder: Path) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def _print_table(display: Display, rows: Sequence[dict[str, Any]]) -> None:
    display.say(
        f"{'method':<28}{'loop':<8}{'mode':<16}{'k':>5}{'Δ CE':>10}{'recovered':>11}{'KL':>10}"
    )
    for row in rows:
        display.say(
            f"{row['method']:<28}{row['loop'] or '–':<8}{row['mode']:<16}{row['k'] or '–':>5}"
            f"{row['delta_ce']:>10.4f}{row['ce_recovered_mean']:>11.4f}{row['kl']:>10.4f}"
        )
    display.say(f"CE of the unchanged model: {rows[0]['ce_clean']:.4f} nats per token")


def _generate(options: argparse.Namespace) -> int:
    from resae.intervene import ActiveEdits, Interventions, StrongestLatents
    from resae.replace import generate, prompt_ids

    display = Display()
    _choose_devices(options, display)
    folder = Path(options.run_directory)
    record, stack = _open_run(folder, options.device)
    asked = None if options.intervene is None else Interventions.parse(options.intervene)
    if asked is not None:
        ActiveEdits(asked, stack, stack.hook_points)  # raises for latents that there are not
    shapes = _described(_model_of(options, record, stack))
    stack.require_model(shapes)
    prompt_ids(shapes, options.prompt, options.max_new_tokens)  # raises where they do not fit
    lm = _load_model(options, shapes.name)
    settings = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
        "fast": options.fast,
    }
    plain = generate(lm, options.prompt, **settings)
    display.say("— nothing replaced —")
    display.say(options.prompt + plain.text)
    settings["loop"] = options.loop
    keep = StrongestLatents(options.show_latents) if options.show_latents else None
    replaced = generate(
        lm, options.prompt, stack, on_codes=keep if asked is None else None, **settings
    )
    display.say(f"— {stack.n_layers} layers replaced online, {options.loop} loop —")
    display.say(options.prompt + replaced.text)
    if asked is not None:
        replaced = generate(
            lm, options.prompt, stack, interventions=asked, on_codes=keep, **settings
        )
        error = "error kept" if asked.keep_error else "error left out"
        display.say(f"— and latents edited, {error}, effects {asked.effects} —")
        display.say(options.prompt + replaced.text)
    for count in replaced.counts:
        display.say(
            f"{count.hook_point}: {count.calls} forward passes, {count.replaced} tokens replaced, "
            f"{count.left} special tokens left alone"
        )
    for edit, name, changed in replaced.edits:
        display.say(f"{name}: {edit}: {sum(changed.values())} changes")
    if asked is not None:
        _print_effects(display, lm, stack, replaced, asked, options.loop)
    if keep is not None:
        _print_latents(display, lm, replaced, keep)
    return 0


def _print_effects(
    display: Display,
    lm: HookedLM,
    stack: ReSAE,
    written: Generated,
    asked: Interventions,
    loop: Loop,
) -> None:
    """What the edits did to later layers in the text just written, beside what was predicted."""
    import torch

    from resae.evaluate import edit_effects

    ids = torch.tensor([written.ids])
    prompt = len(written.ids) - written.tokens
    for row in edit_effects(lm, stack, ids, asked, prompt_tokens=prompt, loop=loop):
        display.say(
            f"{row['hook_point']}: what arrives there moved as the maps predict with cosine "
            f"{row['cosine']:.3f}; predicted / real size {row['norm_ratio']:.3f} "
            f"({row['tokens']} tokens)"
        )


def _print_latents(
    display: Display, lm: HookedLM, written: Generated, keep: StrongestLatents
) -> None:
    """A line per new token: its strongest latents, layer by layer."""
    first, codes = len(written.ids) - written.tokens, keep.codes
    display.say("latent:act of each new token (the last was written but not read)")
    for position, token in enumerate(written.ids[first:-1], start=first):
        layers = []
        for name, (acts, indices) in codes.items():
            pairs = zip(indices[0, position].tolist(), acts[0, position].tolist(), strict=True)
            block = name.removeprefix("blocks.").partition(".")[0]
            layers.append(f"{block}| " + " ".join(f"{j}:{act:.2f}" for j, act in pairs if act))
        display.say(f"{lm.tokenizer.decode([token])!r:<16}{'  '.join(layers)}")


def _report(options: argparse.Namespace) -> int:
    from resae.report import write_report

    print(write_report(Path(options.run_directory)))
    return 0


def _case(options: argparse.Namespace, op: str) -> Any:
    from resae_kernels.profiling import Case

    tokens = options.tokens or (1 if op == "step" else 1024)
    return Case(
        op, tokens, options.width, options.latents, options.k, options.dtype, options.layers
    )


def _model(options: argparse.Namespace) -> int:
    from resae_kernels.profiling.cost_model import model_table, read_rows

    few = options.tokens is None or options.tokens <= 16  # of what an online step takes
    ops = [options.op] if options.op else [op for op in OPS if op != "step" or few]
    rows = read_rows(options.measured) if options.measured else []
    print(model_table([_case(options, op) for op in ops], options.model, rows))
    return 0


def _profile(options: argparse.Namespace) -> int:
    import torch

    from resae.storage import write_atomically
    from resae_kernels.profiling import Clock, measure_roofs, profile, table, trace

    if options.model:
        return _model(options)
    if options.op is None or options.measured:
        missing = "OP" if options.op is None else "--model, which --measured is compared with"
        raise ValueError(f"profile needs {missing}")
    _choose_devices(options, Display())
    device = torch.device(options.device)
    case = _case(options, options.op)
    clock = Clock(device)
    roofs = measure_roofs(clock, case.dtype)
    print(
        f"roofs of this machine: copy {roofs.copy / 1e9:.1f} GB/s, {case.dtype} product "
        f"{roofs.product / 1e12:.3f} TFLOP/s; this case at best {1e3 * roofs.seconds(case):.3f} ms"
    )
    print(table(profile(case, device=device, roofs=roofs, clock=clock, rounds=options.rounds)))
    if options.trace:
        print(
            f"\n{'us':>12}{'calls':>8}{'registers':>11}{'shared':>9}{'occupancy':>11}  kernel or op"
        )
        ran: list[dict[str, Any]] = []
        write_atomically(
            Path(options.trace), lambda path: ran.extend(trace(case, device=device, path=path))
        )
        for row in ran[:20]:
            known = [row[key] for key in ("registers", "shared_bytes", "occupancy_percent")]
            facts = ["–" if value is None else str(value) for value in known]
            print(
                f"{row['us']:>12.1f}{row['calls']:>8}{facts[0]:>11}{facts[1]:>9}{facts[2]:>11}  "
                f"{row['name']}"
            )
        print(f"trace: {options.trace} (open in chrome://tracing or ui.perfetto.dev)")
    return 0


def _tune(options: argparse.Namespace) -> int:
    import torch

    from resae_kernels.profiling import tiles_in_force, tune
    from resae_kernels.triton.tiles import tiles_file

    device = torch.device("cuda" if options.device == "auto" else options.device)
    if options.show:
        print(tiles_in_force(device if torch.cuda.is_available() else torch.device("cpu")))
        return 0
    display = Display()
    chosen = tune(device, rounds=options.rounds, say=display.say)
    display.say(
        f"* chosen, by the geometric mean of the last column: the time relative to the tile that "
        f"comes with resae. {len(chosen)} tiles written to {tiles_file()}"
    )
    return 0


# -- arguments -------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = types.Parser(
        prog="resae",
        description="Sparse autoencoders for several layers of a language model at once: fit "
        "affine maps between the layers, train an autoencoder on what each map leaves, replace "
        "all layers while the model runs.",
        epilog="Start with `resae demo`; then `resae train embedded embedded --layers 1,3,5 --k 8 "
        "--out runs/first`, `resae eval runs/first`, `resae report runs/first`.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str, details: str = ""):
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=details,
            formatter_class=types.HelpFormatter,
        )
        command.set_defaults(run=run)
        command.add_argument(
            "--traceback", action="store_true", help="on an error, show where it happened"
        )
        return command

    demo = add(
        "demo", _demo, "everything on the embedded model and corpus, with a report to look at"
    )
    demo.add_argument("--out", type=types.writable, default="resae-demo", help="where to write")
    demo.add_argument(
        "--seed", type=types.seed, default=0, help="initial directions and order of the data"
    )
    demo.add_argument(
        "--k", type=types.compared, default=(4, 8, 32), help="active latents per layer, compared"
    )
    demo.add_argument(
        "--layers", type=types.names, default=("1", "3", "5"), help="blocks to replace"
    )
    demo.add_argument(
        "--methods",
        type=types.names,
        default=(),
        help="further methods, beside raw SAEs, identity residuals and ReSAE: all (11 to 15 "
        "minutes), fair (rows without an advantage for ReSAE, longer training among them), "
        "elsewhere (other hook points), learning_rates (a grid), or names of "
        f"{', '.join(EXTRA_METHODS)}",
    )
    demo.add_argument(
        "--train-tokens", type=types.whole(1), help="fewer for a quick look (default: 200000)"
    )
    demo.add_argument(
        "--held-out-rows", type=types.whole(1), help="rows to evaluate on (default: 64)"
    )

    demo.add_argument(
        "--threads", type=types.whole(1), default=1, help="of torch; more gain little here"
    )

    fit = add("fit", _fit, "fit the affine maps between layers and say how well they predict")
    _add_model_and_data(fit)
    fit.add_argument("--out", type=types.writable, required=True, help="where to write")
    _add_fit(fit)

    training = add("train", _train, "fit the affine maps and train one autoencoder per layer")
    _add_model_and_data(training, layers_required=False)
    of_k = training.add_mutually_exclusive_group(required=True)
    of_k.add_argument("--k", type=types.one_k, help="active latents in every layer")
    of_k.add_argument(
        "--k-per-layer",
        type=types.numbers,
        metavar="K,K,…",
        help="active latents of each layer, in the order of --layers",
    )
    training.add_argument("--out", type=types.writable, required=True, help="the run directory")
    training.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint; with more --train-tokens, from one before the "
        "learning rate fell, as a run of that length would have but for its warm-up",
    )
    training.add_argument(
        "--d-sae",
        type=types.numbers,
        help="latents: one number for every layer, or one per layer, for example 512,1024,1536 "
        "(default: expansion × width)",
    )
    training.add_argument(
        "--expansion", type=types.whole(1), default=4, help="latents per dimension"
    )
    training.add_argument(
        "--loop",
        choices=("open", "closed"),
        default="open",
        help="residuals against predictions from true activations, or from reconstructions",
    )
    training.add_argument(
        "--boost",
        type=types.filled,
        metavar="RUN",
        help="leave the stack of this run as it is and train, on this data, a second autoencoder "
        "beside each of its own (SAE Boost); layers and maps are the run's",
    )
    training.add_argument(
        "--boost-keep",
        type=types.real(above=0, most=1),
        default=0.1,
        help="share of the second ones' acts in training that their threshold lets through",
    )
    training.add_argument(
        "--maps",
        type=types.filled,
        metavar="DIR",
        help="take the affine maps that `resae fit` (or a run) left there, of the same model and "
        "layers, and fit none; their settings are taken too",
    )
    training.add_argument(
        "--shared", action="store_true", help="one dictionary for all layers (MLSAE)"
    )
    training.add_argument(
        "--prefixes",
        type=types.compared,
        help="good at each of these numbers of active latents, up to k (HierarchicalTopK), for "
        "example 1,2,4,8 (default: at k alone)",
    )
    training.add_argument(
        "--prefix-gain",
        type=types.real(least=0, most=1),
        default=1 / 8,
        help="with --prefixes, the acts of the j strongest latents alone are taken (k/j)^this "
        "times; 0: as they are",
    )
    training.add_argument(
        "--train-tokens", type=types.whole(1), default=1_000_000, help="tokens to train on"
    )
    training.add_argument(
        "--batch-tokens", type=types.whole(1), default=1_024, help="tokens per step"
    )
    training.add_argument(
        "--buffer-tokens", type=types.whole(1), default=65_536, help="activations shuffled together"
    )
    training.add_argument(
        "--buffer-dtype",
        choices=DTYPES,
        default="bfloat16",
        help="in which they wait there; bfloat16 rounds each entry to 8 bits, a relative error of "
        "at most 1/512, in half the memory of float32",
    )
    training.add_argument(
        "--lr",
        type=types.real(above=0),
        help="of Adam (default: 8e-3 · sqrt(512 / d_sae), by layer)",
    )
    training.add_argument(
        "--warmup-steps",
        type=types.real(least=0),
        help="steps over which the rate rises (default: a twentieth of all)",
    )
    training.add_argument(
        "--auxk-coefficient",
        type=types.real(least=0),
        default=1 / 32,
        help="weight of the dead-latent loss",
    )
    training.add_argument(
        "--dead-after-tokens",
        type=types.whole(1),
        help="dead: unfired so long (default: train-tokens / 8)",
    )
    training.add_argument(
        "--clip-norm",
        type=types.real(above=0),
        help="scale the gradient of all layers down to this norm",
    )
    training.add_argument(
        "--accumulation-steps",
        type=types.whole(1),
        default=1,
        help="pieces that a batch is cut into",
    )
    training.add_argument(
        "--autocast", action="store_true", help="products in bfloat16, weights in float32"
    )
    training.add_argument(
        "--cache",
        type=types.writable,
        metavar="DIR",
        help="keep the activations of the language model there, and read them where they are "
        "there already",
    )
    training.add_argument(
        "--cache-dtype",
        choices=DTYPES,
        help="of the activations kept (default: as the model computes them); bfloat16 halves the "
        "disk of a float32 model and rounds every number to 8 bits, a relative error of 1/512",
    )
    training.add_argument(
        "--model-device",
        type=types.device,
        help="where the language model runs, if not with the autoencoders: cpu, cuda:1, or auto: "
        "spread over all devices (accelerate)",
    )
    training.add_argument(
        "--parallel",
        choices=WAYS,
        default="data",
        help="of several processes started by torchrun: each has all autoencoders and a share of "
        "every batch, or the autoencoders of some layers (open loop only)",
    )
    training.add_argument(
        "--checkpoint-steps", type=types.whole(1), default=1_000, help="between checkpoints"
    )
    training.add_argument(
        "--keep-checkpoints",
        type=types.whole(1),
        default=2,
        help="number of checkpoints to keep: the newest, and of two or more one from before the "
        "learning rate falls, from which --resume can go on to more tokens",
    )
    training.add_argument(
        "--log-steps", type=types.whole(1), default=50, help="between lines of the log"
    )
    training.add_argument(
        "--eval-steps",
        type=types.whole(1),
        help="between measurements of what replacing all layers costs on the held-out rows, online "
        "and teacher-forced (default: never)",
    )
    training.add_argument(
        "--plan",
        action="store_true",
        help="only estimate time, memory and disk, from the model's config alone (no weights, no "
        "data), and end",
    )
    training.add_argument(
        "--plan-device",
        type=types.peaks,
        metavar="FLOPS,BYTES",
        help="peak FLOP/s of products and bytes/s of memory, such as 312e12,2e12 (default: the "
        "data sheet of an H200)",
    )
    training.add_argument(
        "--plan-utilisation",
        type=types.real(above=0, most=1),
        default=0.5,
        help="share of the peaks to assume",
    )
    training.add_argument(
        "--plan-ranks", type=types.whole(1), default=1, help="processes to assume"
    )
    training.add_argument("--tensorboard", action="store_true", help="log to OUT/tensorboard too")
    training.add_argument(
        "--wandb", type=types.filled, metavar="PROJECT", help="log to Weights & Biases too"
    )
    _add_fit(training)

    evaluation = add("eval", _eval, "replace layers on held-out text and measure what it costs")
    evaluation.add_argument(
        "run_directories", nargs="+", metavar="RUN", help="run directories of the same layers"
    )
    evaluation.add_argument(
        "--k",
        type=types.compared,
        help="compare the runs with so many active latents (default: all of the training)",
    )
    evaluation.add_argument(
        "--out", type=types.writable, help="where report.json goes (default: the first run)"
    )
    evaluation.add_argument("--model", type=types.filled, help="another path of the same model")
    evaluation.add_argument(
        "--data",
        type=types.filled,
        help="other text (default: the held-out part of the training's)",
    )
    evaluation.add_argument("--text-column", help="column of the data that holds the text")
    evaluation.add_argument(
        "--streaming", action="store_true", default=None, help="stream the data"
    )
    evaluation.add_argument("--context-tokens", type=types.whole(2), help="tokens per row")
    evaluation.add_argument("--held-out-rows", type=types.whole(1), help="rows to evaluate on")
    evaluation.add_argument(
        "--allow-trained-text",
        action="store_true",
        help="evaluate even where a run was trained on the text, or where that is not known "
        "(default: an error)",
    )
    _add_machine(evaluation)

    writing = add("generate", _generate, "continue a prompt with and without the layers replaced")
    writing.add_argument("run_directory", metavar="RUN", help="a run directory")
    writing.add_argument("--prompt", required=True, help="text to continue")
    writing.add_argument(
        "--max-new-tokens", type=types.whole(1), default=64, help="how much to write"
    )
    writing.add_argument(
        "--temperature", type=types.real(least=0), default=0.8, help="0: the most likely token"
    )
    writing.add_argument("--seed", type=types.seed, default=0, help="of the sampling")
    writing.add_argument("--loop", choices=("closed", "open"), default="closed", help="see train")
    writing.add_argument(
        "--intervene",
        type=types.filled,
        metavar="FILE|JSON",
        help='edit latents meanwhile: [{"layer": 3, "action": "ablate", "latents": [17, 40]}, …], '
        "actions ablate, clamp, scale, add; see resae.Interventions",
    )
    writing.add_argument(
        "--show-latents",
        type=types.whole(1),
        metavar="N",
        help="print the N strongest of each new token",
    )
    writing.add_argument(
        "--fast",
        action="store_true",
        help="write the same text with a static cache and, on a GPU, a compiled step",
    )
    writing.add_argument("--model", type=types.filled, help="another path of the same model")
    _add_machine(writing)

    page = add("report", _report, "draw report.json as a page with figures")
    page.add_argument("run_directory", metavar="RUN", help="a directory with report.json")

    measuring = add("profile", _profile, "time one op at one shape against roofs and alternatives")
    measuring.add_argument(
        "op",
        choices=OPS,
        nargs="?",
        help="encode, decode, forward (both), train (its gradients; train+adam: and the update), "
        "step (online) or chain; with --model all of them by default",
    )
    measuring.add_argument(
        "--model",
        choices=GPUS,
        help="measure nothing: print what a cost model expects of this GPU, stage by stage",
    )
    measuring.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="with --model: ops.csv or rows.jsonl of bench/, to be compared with the model",
    )
    measuring.add_argument(
        "--tokens", type=types.whole(1), help="N (default: 1024; step: 1, at most 16)"
    )
    measuring.add_argument("--width", type=types.whole(1), default=768, help="D")
    measuring.add_argument("--latents", type=types.whole(1), default=8192, help="M")
    measuring.add_argument("--k", type=types.whole(1), default=32, help="active latents per token")
    measuring.add_argument("--layers", type=types.whole(1), default=1, help="L, of a chain")
    measuring.add_argument(
        "--rounds", type=types.whole(1), default=10, help="calls per provider, at most"
    )
    measuring.add_argument(
        "--trace",
        type=types.writable_file,
        metavar="FILE",
        help="write a Chrome trace of our op here",
    )
    _add_machine(measuring)

    tuning = add(
        "tune",
        _tune,
        "measure which tile sizes of the GPU kernels are fastest on your GPU, and use them from "
        "then on",
        details="A tile is how much of its work one program of a kernel takes at a time. Nothing "
        "but speed (and rounding) depends on it. The result is kept in ~/.cache/resae/tiles.json, "
        "by GPU; remove that file to go back to the tiles that come with resae.",
    )
    tuning.add_argument(
        "--device", type=types.device, default="cuda", help="which GPU: cuda, cuda:1"
    )
    tuning.add_argument(
        "--rounds", type=types.whole(1), default=20, help="calls per tile and shape"
    )
    tuning.add_argument(
        "--show", action="store_true", help="only print the tiles in use and where they come from"
    )
    return parser


def _add_model_and_data(command: argparse.ArgumentParser, *, layers_required: bool = True) -> None:
    command.add_argument(
        "model", type=types.filled, metavar="MODEL", help="hub name, local folder, or `embedded`"
    )
    command.add_argument(
        "data",
        type=types.filled,
        metavar="DATA",
        help="hub dataset (name or name:configuration), local folder or file, or `embedded`",
    )
    command.add_argument(
        "--layers",
        type=types.names,
        required=layers_required,
        help="blocks (their hook_resid_post), or hook points, for example 1,3,5; at hook_mlp_out "
        "and hook_attn_out predicting a layer from others gained nothing in the demo, and lost a "
        "third more than raw SAEs (--predictor none) of equal total latents",
    )
    command.add_argument(
        "--text-column", type=types.filled, default="text", help="column that holds the text"
    )
    command.add_argument(
        "--streaming", action="store_true", help="read the data while it downloads"
    )
    command.add_argument(
        "--context-tokens", type=types.whole(2), default=128, help="tokens per row"
    )
    command.add_argument(
        "--held-out-rows", type=types.whole(0), default=64, help="rows kept for evaluation"
    )
    command.add_argument(
        "--seed", type=types.seed, default=0, help="directions and order of the data"
    )
    _add_machine(command)


def _add_fit(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--predictor",
        choices=KINDS,
        help="what predicts a layer from others (default: previous)",
    )
    command.add_argument(
        "--form",
        choices=tuple(FORMS),
        help="of the maps of (all_)previous (default: full)",
    )
    command.add_argument("--rank", type=types.whole(1), help="of the form low_rank")
    command.add_argument(
        "--calibration-tokens",
        type=types.whole(2),
        help="tokens to fit the maps on (default: 100000)",
    )
    command.add_argument(
        "--ridge",
        type=types.real(least=0),
        help="relative to the mean eigenvalue of the sources (default: 1e-4)",
    )


def _add_machine(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device",
        type=types.device,
        default="auto",
        help="where to run: cpu, cuda, cuda:1, or auto: the GPU where there is one",
    )
    command.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of weights and activations"
    )


if __name__ == "__main__":
    sys.exit(main())
