"""Runs that a command compares: opened together, and as methods of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resae.evaluation.methods import Method
    from resae.models.hooked import HookedLM
    from resae.stack.stack import ReSAE


@dataclass(frozen=True)
class OpenRun:
    """A run and its stack."""

    folder: Path
    record: dict[str, Any]
    stack: ReSAE


def open_runs(folders: Sequence[Path], device: str) -> list[OpenRun]:
    from resae.training.runs import open_run

    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("a run is named twice; name each once")
    return [OpenRun(folder, *open_run(folder, device)) for folder in folders]


def require_comparable(runs: Sequence[OpenRun], shapes: HookedLM) -> None:
    """Raise ValueError for runs of another model, or of different layers."""
    layers = runs[0].stack.hook_points
    for run in runs:
        run.stack.require_model(shapes)
        if run.stack.hook_points != layers:
            raise ValueError(
                f"{run.folder} has layers {', '.join(run.stack.hook_points)}, {runs[0].folder} has "
                f"{', '.join(layers)}; evaluate them apart"
            )


def methods_of(
    runs: Sequence[OpenRun], ks: Sequence[int] | None, subsets: tuple[tuple[str, ...], ...] = ()
) -> list[Method]:
    """Every run, at every k asked for; and the maps alone."""
    from resae.evaluation.methods import Method, method_name
    from resae.stack.stack import AffineOnly

    methods: list[Method] = []
    for run in runs:
        stack = run.stack
        for k in ks or (stack.sae(0).config.k,):
            name = method_name(stack)
            if any((m.name, m.k) == (name, k) for m in methods):
                name = f"{name} ({run.folder.name})"
            methods.append(Method(name, stack.at_k(k) if ks else stack, k, subsets))
    chained = next((run.stack for run in runs if run.stack.chained), None)
    if chained is not None:
        methods.append(Method("affine_only", AffineOnly(chained), None, subsets))
    return methods
