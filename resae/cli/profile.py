"""Time one op at one shape against roofs and alternatives; or print what a cost model expects."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from resae.arguments import filled, whole, writable_file
from resae.choices import GPUS, OPS
from resae.cli.terminal import TerminalConsole
from resae.data.config import Machine
from resae.environment import describe_device, find_device
from resae.settings import Shown


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Op and shape."""

    op: Annotated[str | None, OPS, Shown("OP", positional=True)] = None
    """encode, decode, forward (both), train (its gradients; train+adam: and the update), step
    (online) or chain; None, with `model`: all of them."""
    tokens: Annotated[int | None, whole(1)] = None
    """N; None: 1024, of step 1 (at most 16)."""
    width: Annotated[int, whole(1)] = 768
    """D."""
    latents: Annotated[int, whole(1)] = 8192
    """M."""
    k: Annotated[int, whole(1)] = 32
    """Active latents per token."""
    layers: Annotated[int, whole(1)] = 1
    """L, of a chain."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """Cost model."""

    model: Annotated[str | None, GPUS] = None
    """Measure nothing: print what the cost model expects of this GPU, stage by stage."""
    measured: Annotated[str | None, filled, Shown("FILE")] = None
    """With `model`: ops.csv or rows.jsonl of bench/, to be compared with it."""


@dataclass(frozen=True, kw_only=True)
class Options(Shape, Model, Machine):
    """Measurement."""

    rounds: Annotated[int, whole(1)] = 10
    """Calls per provider, at most."""
    trace: Annotated[str | None, writable_file, Shown("FILE")] = None
    """Write a Chrome trace of our op here."""
    json: bool = False
    """Print the roofs and the rows as JSON."""


def _case(options: Options, op: str) -> Any:
    from resae_kernels.profiling import Case

    tokens = options.tokens or (1 if op == "step" else 1024)
    return Case(
        op, tokens, options.width, options.latents, options.k, options.dtype, options.layers
    )


def _expected(options: Options, model: str, console: TerminalConsole) -> int:
    from resae_kernels.profiling.cost_model import model_table, read_rows

    few = options.tokens is None or options.tokens <= 16  # of what an online step takes
    ops = [options.op] if options.op else [op for op in OPS if op != "step" or few]
    rows = read_rows(Path(options.measured)) if options.measured else []
    console.result(model_table([_case(options, op) for op in ops], model, rows))
    return 0


def run(options: Options, console: TerminalConsole) -> int:
    import torch

    from resae.storage import write_atomically
    from resae_kernels.profiling import Clock, measure_roofs, profile, table, trace

    if options.model:
        return _expected(options, options.model, console)
    if options.op is None or options.measured:
        missing = "OP" if options.op is None else "--model, which --measured is compared with"
        raise ValueError(f"profile needs {missing}")
    if options.json:
        console.report_to_stderr()
    name = find_device(options.device)
    console.log(f"device: {describe_device(name)}")
    device = torch.device(name)
    case = _case(options, options.op)
    clock = Clock(device)
    roofs = measure_roofs(clock, case.dtype)
    console.log(
        f"roofs of this machine: copy {roofs.copy / 1e9:.1f} GB/s, {case.dtype} product "
        f"{roofs.gemm / 1e12:.3f} TFLOP/s; this case at best {1e3 * roofs.seconds(case):.3f} ms"
    )
    rows = profile(case, device=device, roofs=roofs, clock=clock, rounds=options.rounds)
    if options.json:
        console.json({"roofs": roofs._asdict(), "rows": rows})
    else:
        console.result(table(rows))
    if options.trace:
        console.log(
            f"\n{'us':>12}{'calls':>8}{'registers':>11}{'shared':>9}{'occupancy':>11}  kernel or op"
        )
        ran: list[dict[str, Any]] = []
        write_atomically(
            Path(options.trace), lambda path: ran.extend(trace(case, device=device, path=path))
        )
        for row in ran[:20]:
            known = [row[key] for key in ("registers", "shared_bytes", "occupancy_percent")]
            facts = ["–" if value is None else str(value) for value in known]
            console.log(
                f"{row['us']:>12.1f}{row['calls']:>8}{facts[0]:>11}{facts[1]:>9}{facts[2]:>11}  "
                f"{row['name']}"
            )
        console.log(f"trace: {options.trace} (open in chrome://tracing or ui.perfetto.dev)")
    return 0
