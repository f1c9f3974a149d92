"""Fit the affine maps and train one autoencoder per layer."""

import signal
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any

from resae.arguments import peaks, real, whole
from resae.cli.terminal import TerminalConsole
from resae.settings import Shown
from resae.training.config import RunConfig

if TYPE_CHECKING:
    from resae.training.estimate import Device, RunEstimate


@dataclass(frozen=True, kw_only=True)
class Planning:
    """Estimate instead of training."""

    plan: bool = False
    """Only estimate time, memory and disk, from the model's config alone (no weights, no data), and
    end."""
    json: bool = False
    """With --plan, print the estimate as JSON."""
    plan_device: Annotated[tuple[float, float] | None, peaks, Shown("FLOPS,BYTES")] = None
    """Peak FLOP/s of products and bytes/s of memory, such as 312e12,2e12; None: the data sheet of
    an H200."""
    plan_utilisation: Annotated[float, real(above=0, most=1)] = 0.5
    """Share of the peaks to assume."""

    def planned_device(self) -> "Device":
        """The device of the estimate."""
        from resae.training.estimate import Device

        device = Device()
        if self.plan_device is not None:
            product, bandwidth = self.plan_device
            name = f"{product:.3g} FLOP/s, {bandwidth:.3g} B/s"
            device = Device(name, product, product, product, bandwidth)
        return replace(device, utilisation=self.plan_utilisation)

    def print_plan(self, estimate: "RunEstimate", console: TerminalConsole) -> None:
        if self.json:
            phases = [phase._asdict() for phase in estimate.phases]
            console.json(estimate._asdict() | {"phases": phases})
        else:
            console.result(estimate.table())


@dataclass(frozen=True, kw_only=True)
class Options(RunConfig, Planning):
    """Train."""

    plan_ranks: Annotated[int, whole(1)] = 1
    """With --plan, processes to assume."""


def run(options: Options, console: TerminalConsole) -> int:
    if options.plan:
        return _plan(options, console)
    from resae.cli.libraries import quiet_libraries
    from resae.training import run as train

    quiet_libraries(options.data)
    config = RunConfig(**{f.name: getattr(options, f.name) for f in fields(RunConfig)})
    done = train(config, console=console, command=console.command_line, stopping=Interruptible())
    if done.stack is None:
        console.log(
            f"stopped; a checkpoint is in {done.folder / 'checkpoints'}, continue with --resume"
        )
        return 130
    console.log(f"written to {done.folder}; next: resae eval {done.folder}")
    return 0


def _plan(options: Options, console: TerminalConsole) -> int:
    import torch

    from resae.cli.libraries import quiet_libraries
    from resae.data.activations import MODEL_ROWS
    from resae.models.hooked import HookedLM
    from resae.training.distributed import Ranks
    from resae.training.estimate import ModelSizes, estimate_run

    quiet_libraries()
    lm = HookedLM.described(options.model, revision=options.revision)
    if options.boost is not None or not options.layers:
        raise ValueError("--plan: name the layers; a boost is planned like an SAE of its own")
    lm.require_context(options.context_tokens)
    names = tuple(point.name for point in lm.hook_points(options.layers))
    config = options.for_model(names, lm.d_model)
    cached = getattr(torch, options.cache_dtype or options.dtype) if options.cache else None
    estimate = estimate_run(
        config,
        ModelSizes.of(lm, config.layers, options.context_tokens),
        device=options.planned_device(),
        ranks=Ranks(0, options.plan_ranks, options.parallel),
        model_dtype=getattr(torch, options.dtype),
        context_tokens=options.context_tokens,
        model_rows=MODEL_ROWS,
        keep_checkpoints=options.keep_checkpoints,
        checkpoint_steps=options.checkpoint_steps,
        cache_dtype=cached,
    )
    options.print_plan(estimate, console)
    return 0


class Interruptible:
    """Inside, the first Ctrl-C or SIGTERM only asks to stop after the step; a second one raises
    KeyboardInterrupt."""

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> Callable[[], bool]:
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return lambda: self._asked

    def __exit__(self, *_exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:  # noqa: ARG002
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
