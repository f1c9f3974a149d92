"""The command line: `resae demo | fit | train | eval | generate | report | profile |
tune`.

Only this file prints. Bad input ends in one line, what was wrong and what to do, and exit code 2.
"""

import argparse
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from resae.activation_cache import ActivationCache
from resae.affine import FORMS, KINDS, Moments, r2_per_layer, routing_shares
from resae.data import (
    MODEL_ROWS,
    ActivationBatches,
    ModelActivations,
    TokenRows,
    capture_tokens,
    in_order,
    train_and_held_out,
)
from resae.demo import EXTRA_METHODS, METHOD_GROUPS, DemoConfig, run_demo
from resae.distributed import ALONE, WAYS, Ranks
from resae.environment import environment, keep_freed_memory
from resae.evaluate import (
    Method,
    delta_ce,
    edit_effects,
    evaluate,
    forward_passes,
    method_name,
    predictor_name,
)
from resae.intervene import Interventions, StrongestLatents
from resae.model import HookedLM, HookPoint
from resae.plan import Device, ModelSizes, plan
from resae.profile import OPS, Case, Clock, measure_roofs, profile, table, trace
from resae.replace import Generated, generate
from resae.report import LABELS, whole_selection, write_report
from resae.stack import AffineOnly, Loop, ModelIdentity, ReSAE
from resae.storage import load_json, save_json
from resae.train import (
    Calibration,
    Progress,
    TrainConfig,
    boost_calibration,
    calibrate,
    sum_moments,
    train,
)
from resae.tune import tiles_in_force, tune
from resae_kernels import _launch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HELD_OUT_DEFAULTS: dict[str, Any] = {
    "data": None,
    "text_column": "text",
    "streaming": False,
    "context_tokens": 128,
    "held_out_rows": 64,
}
"""What `eval` takes where neither the command nor the run says otherwise."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    keep_freed_memory()
    try:
        return options.run(options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if options.traceback:
            raise
        print(f"resae {options.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"resae {options.command}: interrupted", file=sys.stderr)
        return 130


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


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected numbers, for example 4,8,32"
        ) from None


def _peaks(text: str) -> tuple[float, float]:
    try:
        product, bandwidth = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected FLOP/s and bytes/s, for example 312e12,2e12"
        ) from None
    return product, bandwidth


def _load_model(options: argparse.Namespace, name: str) -> HookedLM:
    _quiet_libraries()
    device = getattr(options, "model_device", None) or options.device
    return HookedLM.from_pretrained(name, dtype=DTYPES[options.dtype], device=device)


def _quiet_libraries() -> None:
    """Only our own progress is shown; downloads keep theirs."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if find_spec("datasets"):
        import datasets

        datasets.disable_progress_bars()


def _data(options: argparse.Namespace, lm: HookedLM) -> tuple[TokenRows, TokenRows]:
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
    return (capture_tokens(lm, ids, points) for ids in rows.batches(MODEL_ROWS))


def _moments(
    lm: HookedLM,
    points: Sequence[HookPoint],
    batches: Iterable[Sequence[torch.Tensor]],
    config: TrainConfig,
    display: Display,
    ranks: Ranks,
) -> Moments:
    def shown() -> Iterator[Sequence[torch.Tensor]]:
        done = 0
        for xs in batches:
            done += len(xs[0])
            share = min(1.0, done * ranks.size / config.calibration_tokens)
            display.show(f"affine maps: {share:4.0%} of {config.calibration_tokens:,} tokens")
            yield xs

    # The identity needs no products of activations, so its moments are in everyone's.
    moments = sum_moments(
        config.predictor,
        shown(),
        tokens=-(-config.calibration_tokens // ranks.size),
        d_in=lm.d_model,
        n_layers=len(points),
    )
    ranks.add_up_(moments)
    if moments.count < config.calibration_tokens:
        display.say(
            f"affine maps: the data has {moments.count:,} tokens, fewer than the "
            f"{config.calibration_tokens:,} asked for"
        )
    return moments


def _calibrate(
    lm: HookedLM,
    points: Sequence[HookPoint],
    batches: Iterable[Sequence[torch.Tensor]],
    unseen: Iterable[Sequence[torch.Tensor]],
    config: TrainConfig,
    display: Display,
    ranks: Ranks = ALONE,
) -> tuple[Calibration, list[dict[str, Any]]]:
    """The calibration by `batches` of L activations, and R² per hop on those of held-out tokens,
    beside the identity's; of a hop that several layers are sources of, also their shares. There
    are none without a predictor (nothing held out is read then) or where `unseen` is empty."""
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
    tokens: int = 0,
    ranks: Ranks = ALONE,
) -> ActivationCache | None:
    """The activation cache of one part of the text, if --cache asks for one; of several ranks each
    has one of its own share, which no other number of ranks can read."""
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
    k = options.k
    chosen = {
        f.name: getattr(options, f.name)
        for f in fields(TrainConfig)
        if getattr(options, f.name, None) is not None
    }
    chosen["layers"] = tuple(point.name for point in points)
    chosen["k"] = k * len(points) if len(k) == 1 else k
    M = options.d_sae or (options.expansion * lm.d_model,)
    chosen["d_sae"] = M[0] if len(M) == 1 else M
    if base is not None:
        maps = base.predictor
        chosen |= {"predictor": maps.kind, "form": maps.form, "rank": maps.rank}
    return TrainConfig(**chosen)


def _run_record(options: argparse.Namespace, config: TrainConfig, affine: Any) -> dict[str, Any]:
    return {
        "model": options.model,
        "data": options.data,
        "text_column": options.text_column,
        "streaming": options.streaming,
        "context_tokens": options.context_tokens,
        "held_out_rows": options.held_out_rows,
        "dtype": options.dtype,
        "train": asdict(config),
        "affine": affine,
        "environment": environment(),
    }


# -- commands --------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> int:
    if not find_spec("matplotlib"):
        raise ModuleNotFoundError('the demo draws figures; pip install "resae[plots]"')
    out = Path(options.out)
    if out.exists() and any(out.iterdir()) and not (out / "report.json").exists():
        raise ValueError(f"{out} exists and is not an earlier demo; choose another --out")
    _quiet_libraries()
    # The model is so small that a second thread gains a third, and loses far more than that where
    # another process is using its core.
    torch.set_num_threads(options.threads)
    display = Display()
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
    display = Display()
    lm = _load_model(options, options.model)
    points = lm.hook_points(options.layers)
    out = Path(options.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty; choose another --out")
    config = TrainConfig(
        layers=tuple(p.name for p in points),
        k=(1,) * len(points),
        d_sae=1,
        predictor=options.predictor,
        form=options.form,
        rank=options.rank,
        calibration_tokens=options.calibration_tokens,
        ridge=options.ridge,
        seed=options.seed,
    )
    rows, held_out = _data(options, lm)
    batches, unseen = _captured(lm, rows, points), _captured(lm, held_out, points)
    calibration, affine = _calibrate(lm, points, batches, unseen, config, display)
    calibration.save(out / "calibration.safetensors")
    record = _run_record(options, config, affine)
    del record["train"]
    save_json(out / "fit.json", {**record, "layers": config.layers, "predictor": config.predictor})
    display.say(f"written to {out}")
    return 0


def _train(options: argparse.Namespace) -> int:
    if options.plan:
        return _plan(options)
    _require_followers(options)
    ranks, options.device = Ranks.launched(options.parallel, options.device)
    display = Display(silent=ranks.rank > 0)
    out = Path(options.out)
    if not options.resume and out.exists() and any(out.iterdir()):
        raise ValueError(
            f"{out} exists and is not empty; go on with --resume, or choose another --out"
        )
    if options.model_device == "auto" and (ranks.size > 1 or options.eval_steps):
        raise ValueError(
            "--model-device auto, where all devices hold one model, with several ranks or "
            "--eval-steps; leave these out, and use `resae eval` on the run"
        )
    lm = _load_model(options, options.model)
    base = None if options.boost is None else _open_run(Path(options.boost), "cpu")[1]
    if base is not None:
        base.require_model(lm)
        options.layers = options.layers or base.hook_points
    if not options.layers:
        raise ValueError("--layers is missing; name blocks or hook points, for example 1,3,5")
    points = lm.hook_points(options.layers)
    if base is not None and [point.name for point in points] != base.hook_points:
        raise ValueError(
            f"--boost: {options.boost} has layers {', '.join(base.hook_points)}; leave --layers out"
        )
    config = _train_config(options, lm, points, base)
    if config.warning and ranks.rank == 0:
        logging.warning(config.warning)
    rows, held_out = _data(options, lm)
    stored = _stored(options, lm, points, rows, "train", display, config.train_tokens, ranks=ranks)
    source = ActivationBatches(
        lm,
        rows,
        points,
        batch_tokens=config.batch_tokens,
        buffer_tokens=config.buffer_tokens,
        total_tokens=config.train_tokens,
        seed=config.seed,
        device=options.device,
        rank=ranks.rank,
        world=ranks.size,
        stored=stored,
    )
    calibrated = out / "calibration.safetensors"
    if options.resume and calibrated.exists():
        _require_same_run(load_json(out / "run.json", "run"), options, config, out)
        calibration = Calibration.load(calibrated, config.predictor)
    else:
        batches = source.in_order()
        if base is None:
            hop_batches: Iterable[list[torch.Tensor]] = []
            if ranks.rank == 0:  # who writes down what comes of it
                kept = _stored(options, lm, points, held_out, "held_out", display)
                hop_batches = in_order(kept or ModelActivations(lm, held_out, points))
            calibration, affine = _calibrate(
                lm, points, batches, hop_batches, config, display, ranks
            )
        else:
            moments = _moments(lm, points, batches, config, display, ranks)
            calibration, affine = boost_calibration(base, moments), []
        if ranks.rank == 0:
            save_json(out / "run.json", _run_record(options, config, affine))
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
            should_stop=interrupt.asked,
            ranks=ranks,
        )
    if stack is None:
        display.say(f"stopped; a checkpoint is in {out / 'checkpoints'}, go on with --resume")
        return 130
    display.say(f"written to {out}; next: resae eval {out}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    _quiet_libraries()
    lm = HookedLM.described(options.model)
    if options.boost is not None or not options.layers:
        raise ValueError("--plan: name the layers; a boost is planned like an SAE of its own")
    config = _train_config(options, lm, lm.hook_points(options.layers), None)
    device = Device()
    if options.plan_device is not None:
        product, bandwidth = options.plan_device
        name = f"{product:.3g} FLOP/s, {bandwidth:.3g} B/s"
        device = Device(name, product, product, product, bandwidth)
    cached = DTYPES[options.cache_dtype or options.dtype] if options.cache else None
    estimate = plan(
        config,
        ModelSizes.of(lm, config.layers, options.context_tokens),
        device=replace(device, utilisation=options.plan_utilisation),
        ranks=Ranks(0, options.plan_ranks, options.parallel),
        model_dtype=DTYPES[options.dtype],
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
    here = _run_record(options, config, None)
    names = (
        "model",
        "data",
        "text_column",
        "streaming",
        "context_tokens",
        "held_out_rows",
        "dtype",
    )
    began = {name: record[name] for name in names}
    fitted = ("layers", "predictor", "form", "rank")
    began |= {name: record["train"].get(name) for name in fitted}
    now = {name: here[name] for name in names}
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

    def __enter__(self) -> "_Interruptible":
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
    display = Display()
    runs = [
        (Path(folder), *_open_run(Path(folder), options.device))
        for folder in options.run_directories
    ]
    record = runs[0][1]
    lm = _load_model(options, _model_of(options, record, runs[0][2]))
    for _, _, stack in runs:
        stack.require_model(lm)
    for name, default in HELD_OUT_DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, record.get(name, default))
    if options.data is None:
        raise ValueError(
            f"{runs[0][0]} does not say which text to evaluate on; name it with --data"
        )
    options.seed = record.get("train", {}).get("seed", 0)
    _, held_out = _data(options, lm)
    methods: list[Method] = []
    for folder, _, stack in runs:
        for k in options.k or (stack.sae(0).config.k,):
            name = method_name(stack)
            if any((m.name, m.k) == (name, k) for m in methods):
                name = f"{name} ({folder.name})"
            methods.append(Method(name, stack.at_k(k) if options.k else stack, k))
    chained = next((stack for _, _, stack in runs if stack.chained), None)
    if chained is not None:
        methods.append(Method("affine_only", AffineOnly(chained), None))
    batches = list(held_out.batches(MODEL_ROWS))
    tokens = sum(b.numel() for b in batches)
    display.say(
        f"{forward_passes(methods)} passes over {tokens:,} held-out tokens of {options.data}"
    )
    began = time.perf_counter()

    def progress(done: int) -> None:
        left = (time.perf_counter() - began) * (len(batches) - done) / done
        display.show(f"{done}/{len(batches)} batches, about {left:.0f} s left")

    report = evaluate(lm, methods, batches, on_batch=progress)
    out = Path(options.out or runs[0][0])
    config = {
        "model": lm.name,
        "data": options.data,
        "layers": runs[0][2].hook_points,
        "d_sae": runs[0][2].d_sae,
        "train_tokens": record.get("train", {}).get("train_tokens", 0),
        "runs": [str(folder) for folder, _, _ in runs],
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
            "affine": list(chain.from_iterable(r.get("affine", []) for _, r, _ in runs[:1])),
            "training": training,
        },
    )
    _print_table(display, whole_selection(report["replacement"]))
    display.say(f"written to {out / 'report.json'}; next: resae report {out}")
    return 0


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
    display = Display()
    folder = Path(options.run_directory)
    record, stack = _open_run(folder, options.device)
    lm = _load_model(options, _model_of(options, record, stack))
    stack.require_model(lm)
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
    asked = None if options.intervene is None else Interventions.parse(options.intervene)
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
    print(write_report(Path(options.run_directory)))
    return 0


def _profile(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    tokens = options.tokens
    if tokens is None:
        tokens = 1 if options.op == "step" else 1024
    case = Case(
        options.op, tokens, options.width, options.latents, options.k, options.dtype,
        options.layers,
    )  # fmt: skip
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
        for row in trace(case, device=device, path=Path(options.trace))[:20]:
            known = [row[key] for key in ("registers", "shared_bytes", "occupancy_percent")]
            facts = ["–" if value is None else str(value) for value in known]
            print(
                f"{row['us']:>12.1f}{row['calls']:>8}{facts[0]:>11}{facts[1]:>9}{facts[2]:>11}  "
                f"{row['name']}"
            )
        print(f"trace: {options.trace} (open in chrome://tracing or ui.perfetto.dev)")
    return 0


def _tune(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    if options.show:
        print(tiles_in_force(device if torch.cuda.is_available() else torch.device("cpu")))
        return 0
    display = Display()
    chosen = tune(device, rounds=options.rounds, say=display.say)
    display.say(
        f"* chosen, by the geometric mean of the last column: the time relative to the tile that "
        f"comes with resae. {len(chosen)} tiles written to {_launch.tiles_file()}"
    )
    return 0


# -- arguments -------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.set_defaults(run=run)
        command.add_argument(
            "--traceback", action="store_true", help="on an error, show where it happened"
        )
        return command

    demo = add(
        "demo", _demo, "everything on the embedded model and corpus, with a report to look at"
    )
    demo.add_argument("--out", default="resae-demo", help="where to write")
    demo.add_argument(
        "--seed", type=int, default=0, help="initial directions and order of the data"
    )
    demo.add_argument("--k", type=_numbers, default=(4, 8, 32), help="active latents, compared")
    demo.add_argument(
        "--layers", type=_names, default=("1", "3", "5"), help="blocks or hook points"
    )
    demo.add_argument(
        "--methods",
        type=_names,
        default=(),
        help="further methods, beside raw SAEs, identity residuals and ReSAE: all (11 to 15 "
        "minutes), fair (rows without an advantage for ReSAE, longer training among them), "
        "elsewhere (other hook points), learning_rates (a grid), or names of "
        f"{', '.join(EXTRA_METHODS)}",
    )
    demo.add_argument("--train-tokens", type=int, help="fewer for a quick look (default: 200000)")
    demo.add_argument("--held-out-rows", type=int, help="rows to evaluate on (default: 64)")

    demo.add_argument("--threads", type=int, default=1, help="of torch; more gain little here")

    fit = add("fit", _fit, "fit the affine maps between layers and say how well they predict")
    _add_model_and_data(fit)
    fit.add_argument("--out", required=True, help="where to write")
    _add_fit(fit)

    training = add("train", _train, "fit the affine maps and train one autoencoder per layer")
    _add_model_and_data(training, layers_required=False)
    training.add_argument(
        "--k", type=_numbers, required=True, help="active latents: one, or per layer"
    )
    training.add_argument("--out", required=True, help="the run directory")
    training.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    training.add_argument(
        "--d-sae",
        type=_numbers,
        help="latents: one number for every layer, or one per layer, for example 512,1024,1536 "
        "(default: expansion × width)",
    )
    training.add_argument("--expansion", type=int, default=4, help="latents per dimension")
    training.add_argument(
        "--loop",
        choices=("open", "closed"),
        default="open",
        help="residuals against predictions from true activations, or from reconstructions",
    )
    training.add_argument(
        "--boost",
        metavar="RUN",
        help="leave the stack of this run as it is and train, on this data, a second autoencoder "
        "beside each of its own (SAE Boost); layers and maps are the run's",
    )
    training.add_argument(
        "--boost-keep",
        type=float,
        default=0.1,
        help="share of the second ones' acts in training that their threshold lets through",
    )
    training.add_argument(
        "--shared", action="store_true", help="one dictionary for all layers (MLSAE)"
    )
    training.add_argument(
        "--prefixes",
        type=_numbers,
        help="good at each of these numbers of active latents, up to k (HierarchicalTopK), for "
        "example 1,2,4,8 (default: at k alone)",
    )
    training.add_argument(
        "--prefix-gain",
        type=float,
        default=1 / 8,
        help="with --prefixes, the acts of the j strongest latents alone are taken (k/j)^this "
        "times; 0: as they are",
    )
    training.add_argument("--train-tokens", type=int, default=1_000_000, help="tokens to train on")
    training.add_argument("--batch-tokens", type=int, default=1_024, help="tokens per step")
    training.add_argument(
        "--buffer-tokens", type=int, default=65_536, help="activations shuffled together"
    )
    training.add_argument(
        "--lr", type=float, help="of Adam (default: 8e-3 · sqrt(512 / d_sae), by layer)"
    )
    training.add_argument(
        "--auxk-coefficient", type=float, default=1 / 32, help="weight of the dead-latent loss"
    )
    training.add_argument(
        "--dead-after-tokens", type=int, help="dead: unfired so long (default: train-tokens / 8)"
    )
    training.add_argument(
        "--clip-norm", type=float, help="scale the gradient of all layers down to this norm"
    )
    training.add_argument(
        "--accumulation-steps", type=int, default=1, help="pieces that a batch is cut into"
    )
    training.add_argument(
        "--autocast", action="store_true", help="products in bfloat16, weights in float32"
    )
    training.add_argument(
        "--cache",
        metavar="DIR",
        help="keep the activations of the language model there, and read them where they are "
        "there already",
    )
    training.add_argument(
        "--cache-dtype",
        choices=tuple(DTYPES),
        help="of the activations kept (default: as the model computes them); bfloat16 halves the "
        "disk of a float32 model and rounds every number to 8 bits, a relative error of 1/512",
    )
    training.add_argument(
        "--model-device",
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
    training.add_argument("--checkpoint-steps", type=int, default=1_000, help="between checkpoints")
    training.add_argument("--keep-checkpoints", type=int, default=2, help="so many, the newest")
    training.add_argument("--log-steps", type=int, default=50, help="between lines of the log")
    training.add_argument(
        "--eval-steps",
        type=int,
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
        type=_peaks,
        metavar="FLOPS,BYTES",
        help="peak FLOP/s of products and bytes/s of memory, such as 312e12,2e12 (default: the "
        "data sheet of an H200)",
    )
    training.add_argument(
        "--plan-utilisation", type=float, default=0.5, help="share of the peaks to assume"
    )
    training.add_argument("--plan-ranks", type=int, default=1, help="processes to assume")
    training.add_argument("--tensorboard", action="store_true", help="log to OUT/tensorboard too")
    training.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases too")
    _add_fit(training)

    evaluation = add("eval", _eval, "replace layers on held-out text and measure what it costs")
    evaluation.add_argument(
        "run_directories", nargs="+", metavar="RUN", help="run directories of the same layers"
    )
    evaluation.add_argument(
        "--k", type=_numbers, help="run with so many active latents (default: all of the training)"
    )
    evaluation.add_argument("--out", help="where report.json goes (default: the first run)")
    evaluation.add_argument("--model", help="another path of the same model")
    evaluation.add_argument(
        "--data", help="other text (default: the held-out part of the training's)"
    )
    evaluation.add_argument("--text-column", help="column of the data that holds the text")
    evaluation.add_argument(
        "--streaming", action="store_true", default=None, help="stream the data"
    )
    evaluation.add_argument("--context-tokens", type=int, help="tokens per row")
    evaluation.add_argument("--held-out-rows", type=int, help="rows to evaluate on")
    _add_machine(evaluation)

    writing = add("generate", _generate, "continue a prompt with and without the layers replaced")
    writing.add_argument("run_directory", metavar="RUN", help="a run directory")
    writing.add_argument("--prompt", required=True, help="text to continue")
    writing.add_argument("--max-new-tokens", type=int, default=64, help="how much to write")
    writing.add_argument("--temperature", type=float, default=0.8, help="0: the most likely token")
    writing.add_argument("--seed", type=int, default=0, help="of the sampling")
    writing.add_argument("--loop", choices=("closed", "open"), default="closed", help="see train")
    writing.add_argument(
        "--intervene",
        metavar="FILE|JSON",
        help='edit latents meanwhile: [{"layer": 3, "action": "ablate", "latents": [17, 40]}, …], '
        "actions ablate, clamp, scale, add; see resae.Interventions",
    )
    writing.add_argument(
        "--show-latents", type=int, metavar="N", help="print the N strongest of each new token"
    )
    writing.add_argument(
        "--fast",
        action="store_true",
        help="write the same text with a static cache and, on a GPU, a compiled step",
    )
    writing.add_argument("--model", help="another path of the same model")
    _add_machine(writing)

    page = add("report", _report, "draw report.json as a page with figures")
    page.add_argument("run_directory", metavar="RUN", help="a directory with report.json")

    measuring = add("profile", _profile, "time one op at one shape against roofs and alternatives")
    measuring.add_argument(
        "op",
        choices=OPS,
        help="encode, decode, forward (both), train (its gradients; train+adam: and the update), "
        "step (online) or chain",
    )
    measuring.add_argument("--tokens", type=int, help="N (default: 1024; step: 1, at most 16)")
    measuring.add_argument("--width", type=int, default=768, help="D")
    measuring.add_argument("--latents", type=int, default=8192, help="M")
    measuring.add_argument("--k", type=int, default=32, help="active latents per token")
    measuring.add_argument("--layers", type=int, default=1, help="L, of a chain")
    measuring.add_argument("--rounds", type=int, default=10, help="calls per provider, at most")
    measuring.add_argument("--trace", metavar="FILE", help="write a Chrome trace of our op here")
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
    tuning.add_argument("--device", default="cuda", help="which GPU: cuda, cuda:1")
    tuning.add_argument("--rounds", type=int, default=20, help="calls per tile and shape")
    tuning.add_argument(
        "--show", action="store_true", help="only print the tiles in use and where they come from"
    )
    return parser


def _add_model_and_data(command: argparse.ArgumentParser, *, layers_required: bool = True) -> None:
    command.add_argument("model", metavar="MODEL", help="hub name, local folder, or `embedded`")
    command.add_argument(
        "data",
        metavar="DATA",
        help="hub dataset (name or name:configuration), local folder or file, or `embedded`",
    )
    command.add_argument(
        "--layers",
        type=_names,
        required=layers_required,
        help="blocks (their hook_resid_post), or hook points, for example 1,3,5; at hook_mlp_out "
        "and hook_attn_out predicting a layer from others gained nothing in the demo, and lost a "
        "third more than raw SAEs (--predictor none) of equal total latents",
    )
    command.add_argument("--text-column", default="text", help="column that holds the text")
    command.add_argument(
        "--streaming", action="store_true", help="read the data while it downloads"
    )
    command.add_argument("--context-tokens", type=int, default=128, help="tokens per row")
    command.add_argument("--held-out-rows", type=int, default=64, help="rows kept for evaluation")
    command.add_argument("--seed", type=int, default=0, help="directions and order of the data")
    _add_machine(command)


def _add_fit(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--predictor", choices=KINDS, default="previous", help="what predicts a layer from others"
    )
    command.add_argument(
        "--form", choices=tuple(FORMS), default="full", help="of the maps of (all_)previous"
    )
    command.add_argument("--rank", type=int, help="of the form low_rank")
    command.add_argument(
        "--calibration-tokens", type=int, default=100_000, help="tokens to fit the maps on"
    )
    command.add_argument(
        "--ridge", type=float, default=1e-4, help="relative to the mean eigenvalue of the sources"
    )


def _add_machine(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="cpu", help="where to run: cpu, cuda, cuda:1")
    command.add_argument(
        "--dtype", choices=tuple(DTYPES), default="float32", help="of weights and activations"
    )


if __name__ == "__main__":
    sys.exit(main())
