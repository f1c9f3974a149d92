"""Time one op at one shape against roofs and alternatives."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from resae.arguments import whole, writable_file
from resae.choices import OPS
from resae.cli.display import Display
from resae.data.config import Machine
from resae.environment import describe_device, find_device
from resae.settings import Shown


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Op and shape."""

    op: Annotated[str, OPS, Shown("OP", positional=True)]
    """encode, decode, forward (both), train (its gradients; train+adam: and the update), step
    (online) or chain."""
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
class Options(Shape, Machine):
    """Measurement."""

    rounds: Annotated[int, whole(1)] = 10
    """Calls per provider, at most."""
    trace: Annotated[str | None, writable_file, Shown("FILE")] = None
    """Write a Chrome trace of our op here."""
    json: bool = False
    """Print the roofs and the rows as JSON."""


def run(options: Options, display: Display) -> int:
    import torch

    from resae.storage import write_atomically
    from resae_kernels.profiling import Case, Clock, measure_roofs, profile, table, trace

    if options.json:
        display.report_to_stderr()
    name = find_device(options.device)
    display.say(f"device: {describe_device(name)}")
    device = torch.device(name)
    tokens = options.tokens
    if tokens is None:
        tokens = 1 if options.op == "step" else 1024
    case = Case(
        options.op, tokens, options.width, options.latents, options.k, options.dtype,
        options.layers,
    )  # fmt: skip
    clock = Clock(device)
    roofs = measure_roofs(clock, case.dtype)
    display.say(
        f"roofs of this machine: copy {roofs.copy / 1e9:.1f} GB/s, {case.dtype} product "
        f"{roofs.product / 1e12:.3f} TFLOP/s; this case at best {1e3 * roofs.seconds(case):.3f} ms"
    )
    rows = profile(case, device=device, roofs=roofs, clock=clock, rounds=options.rounds)
    if options.json:
        display.result(json.dumps({"roofs": roofs._asdict(), "rows": rows}, indent=1))
    else:
        display.result(table(rows))
    if options.trace:
        display.say(
            f"\n{'us':>12}{'calls':>8}{'registers':>11}{'shared':>9}{'occupancy':>11}  kernel or op"
        )
        ran: list[dict[str, Any]] = []
        write_atomically(
            Path(options.trace), lambda path: ran.extend(trace(case, device=device, path=path))
        )
        for row in ran[:20]:
            known = [row[key] for key in ("registers", "shared_bytes", "occupancy_percent")]
            facts = ["–" if value is None else str(value) for value in known]
            display.say(
                f"{row['us']:>12.1f}{row['calls']:>8}{facts[0]:>11}{facts[1]:>9}{facts[2]:>11}  "
                f"{row['name']}"
            )
        display.say(f"trace: {options.trace} (open in chrome://tracing or ui.perfetto.dev)")
    return 0
