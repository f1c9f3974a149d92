"""Checkpoints of a training: one safetensors file each, of weights, optimiser, counters and
positions in the data; schedule and shuffles follow from the step, the seed and these.

On a CPU a resumed run ends bitwise equal to an uninterrupted one. With more tokens than before, it
continues from before its learning rate fell (`resumed_config`).
"""

import json
import logging
import re
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import torch
from safetensors.torch import save_file
from torch import Tensor

from resae.data.batches import Position
from resae.settings import current_names
from resae.storage import load_header, load_tensors, write_atomically
from resae.strict_json import brief, parse, require_fields
from resae.training.config import TrainConfig
from resae.training.distributed import Ranks
from resae.training.step import TrainState, trained_tensors

log = logging.getLogger(__name__)
NONE = type(None)
Config = TypeVar("Config", bound=TrainConfig)


def save_checkpoint(
    folder: Path, state: TrainState, config: TrainConfig, keep: int, ranks: Ranks
) -> None:
    tensors = ranks.gather_to_rank0(named_in_whole(_tensors(state), ranks))
    positions = ranks.all_gather_ints(state.position)
    if ranks.rank > 0:
        return
    metadata = {
        "step": str(state.step),
        "positions": json.dumps(positions),
        # In numbers, so that a version with another default goes on as this one would.
        "config": json.dumps(asdict(config) | {"dead_after_tokens": config.dead_tokens}),
    }
    path = folder / f"step_{state.step:08d}.safetensors"
    try:
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
    except OSError as error:
        kept = [path.name for path in _checkpoints(folder)]
        intact = (
            f"{kept[-1]} is intact, continue from it with --resume" if kept else "there is none"
        )
        raise OSError(f"{error}; of the earlier checkpoints {intact}") from error
    there = _checkpoints(folder)
    kept, common = there[-keep:], [p for p in there if _step_in(p) <= config.common_steps]
    if keep > 1 and common:  # from there a run of more tokens can continue
        kept = [common[-1], *kept[1:]] if common[-1] not in kept else kept
    for old in set(there) - set(kept):
        old.unlink()


def _tensors(state: TrainState) -> dict[str, Tensor]:
    """Everything that a step changes, by name."""
    tensors = dict(trained_tensors(state.stack))
    for name, trained in trained_tensors(state.stack).items():
        for entry, t in state.optimizer.state.get(trained, {}).items():
            tensors[f"{name}/{entry}"] = t
    for i, idle_tokens in enumerate(state.tokens_since_fired):
        tensors[f"saes.{i}.tokens_since_fired"] = idle_tokens
    return tensors


def named_in_whole(tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The same by the names that they have in the whole stack: `saes.{layer}.…`."""
    if not ranks.by_layers:
        return tensors
    named = {}
    for name, tensor in tensors.items():
        saes, i, rest = name.split(".", 2)
        named[f"{saes}.{ranks.rank + int(i) * ranks.size}.{rest}"] = tensor
    return named


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    named = re.compile(r"step_\d{8}\.safetensors")
    return sorted(p for p in folder.glob("step_*") if named.fullmatch(p.name))


def _step_in(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("step_"))


def resumed_config(config: Config, out: Path) -> Config:
    """`config` as the resumed run in `out` uses it.

    With more `train_tokens` the run continues from the newest checkpoint that both runs share:
    from before the learning rate fell. It ends as a run of that length from the start would have,
    with the `warmup_steps` and `dead_after_tokens` of the shorter one.

    Returns:
        `config`, with these two as the run has them where `config` has None.

    Raises:
        ValueError: the run has other settings, or no checkpoint that the longer run shares.
    """
    paths = _checkpoints(out / "checkpoints")
    found = [(path, begun) for path in paths if (begun := _begun(path, type(config)))]
    if not found:
        return config
    path, begun = found[-1]
    longer = config.train_tokens > begun.train_tokens
    warmup = begun.rising_steps if longer else begun.warmup_steps
    if config.warmup_steps is None:
        config = replace(config, warmup_steps=warmup)
    if config.dead_after_tokens is None:
        config = replace(config, dead_after_tokens=begun.dead_tokens)
    of_run = replace(begun, warmup_steps=warmup, dead_after_tokens=begun.dead_tokens)
    if longer:
        of_run = replace(of_run, train_tokens=config.train_tokens)
    changed = [f.name for f in fields(config) if getattr(of_run, f.name) != getattr(config, f.name)]
    if changed:
        raise ValueError(
            f"--resume: {path} was trained with other settings "
            f"({', '.join(f'{name}={getattr(of_run, name)}' for name in sorted(changed))}); use "
            f"the same (train_tokens may rise), or another --out"
        )
    common = begun.common_steps
    if longer and common and not any(_step_in(p) <= begun.common_steps for p, begun in found):
        raise ValueError(
            f"--resume: no checkpoint of {out} is from before step {common}, after which a run of "
            f"more than {begun.train_tokens:,} tokens differs (its learning rate falls later); "
            f"train anew, with --keep-checkpoints 2 or more"
        )
    return config


class _Metadata(NamedTuple, Generic[Config]):
    """Description of a checkpoint, which it holds."""

    step: int
    positions: list[Position]
    """One per rank."""
    config: Config
    """The configuration that it was trained with."""


def _read_metadata(checkpoint: Path, cls: type[Config]) -> _Metadata[Config]:
    """Raise ValueError for a checkpoint that is damaged."""
    found = load_header(checkpoint, "checkpoint").metadata
    require_fields(found, {"step": str, "positions": str, "config": str}, "metadata")
    step, positions, saved = (parse(found[name], name) for name in ("step", "positions", "config"))
    saved = current_names(require_fields(saved, {}, "config"))
    hints = get_type_hints(cls)
    required = {f.name for f in fields(cls) if f.default is MISSING}
    expected = {n: _json_types(hints[n]) for n in hints if n in saved or n in required}
    require_fields(saved, expected, "config")
    if saved.get("dead_after_tokens") is None and "sink_factor" not in saved:
        # Versions before that setting wrote no number, and waited for an eighth of the training.
        saved["dead_after_tokens"] = max(1, saved["train_tokens"] // 8)
    held = {"step": step, "positions": positions}
    require_fields(held, {"step": int, "positions": [[int]]}, "metadata")
    if not positions or any(len(p) != len(Position._fields) or min(p) < 0 for p in positions):
        raise ValueError(f"positions = {brief(positions)}")
    if unknown := sorted(saved.keys() - hints.keys()):
        raise ValueError(f"settings of another version: {brief(unknown)}")
    settings: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in saved.items()}
    return _Metadata(step, [Position(*p) for p in positions], cls(**settings))


def _json_types(annotation: Any) -> Any:
    """The type of a setting as `require_fields` takes it."""
    parts = get_args(annotation)
    if get_origin(annotation) is tuple:
        return [parts[0]]
    return tuple(map(_json_types, parts)) if parts else None if annotation is NONE else annotation


def _begun(checkpoint: Path, cls: type[Config]) -> Config | None:
    """The configuration that a checkpoint was trained with; None if it is damaged."""
    try:
        return _read_metadata(checkpoint, cls).config
    except ValueError:
        return None


def load_newest(folder: Path, state: TrainState, config: TrainConfig, ranks: Ranks) -> list[Path]:
    """Bring `state` to the newest checkpoint that can be read and that `config` shares; a damaged
    one is named and passed over.

    Returns:
        Checkpoints of a shorter run that come after it.
    """
    left_behind = []
    for path in reversed(_checkpoints(folder)):
        try:
            step, positions, begun = _read_metadata(path, type(config))
            tensors = load_tensors(path, "checkpoint")
            _require_state(tensors, state, ranks)
        except ValueError as error:
            log.warning("checkpoint %s is damaged (%s); using the one before it", path, error)
            continue
        if begun.train_tokens < config.train_tokens and _step_in(path) > begun.common_steps:
            left_behind.append(path)
            continue
        if len(positions) != ranks.size:
            raise ValueError(
                f"--resume: {path} is of {len(positions)} ranks, here are {ranks.size}; start as "
                f"many"
            )
        _restore(state, tensors, ranks)
        state.step = step
        state.position = positions[ranks.rank]
        break
    else:
        which = "from before the learning rate fell " if left_behind else ""
        log.warning("no checkpoint %sin %s: training starts from step 0", which, folder)
    if len({step for (step,) in ranks.all_gather_ints([state.step])}) > 1:
        raise ValueError(f"--resume: ranks see different checkpoints in {folder}; share the folder")
    return left_behind


def _require_state(tensors: dict[str, Tensor], state: TrainState, ranks: Ranks) -> None:
    """Raise ValueError unless these are the tensors of a state like this one."""
    expected: dict[str, tuple[torch.Size, torch.dtype]] = {}
    named = trained_tensors(state.stack)
    for name, tensor in _tensors(state).items():
        (whole_name,) = named_in_whole({name: tensor}, ranks)
        expected[whole_name] = (tensor.shape, tensor.dtype)
        entries = ("exp_avg", "exp_avg_sq") if name in named else ()
        if f"{whole_name}/step" in tensors:
            expected[f"{whole_name}/step"] = (torch.Size(), torch.float32)
            expected |= {f"{whole_name}/{entry}": expected[whole_name] for entry in entries}
    for name, (shape, dtype) in expected.items():
        found = tensors.get(name)
        if found is None or found.shape != shape or found.dtype != dtype:
            got = "is missing" if found is None else f"is {list(found.shape)} of {found.dtype}"
            raise ValueError(f"{name} {got}, expected {list(shape)} of {dtype}")


@torch.no_grad()
def _restore(state: TrainState, tensors: dict[str, Tensor], ranks: Ranks) -> None:
    for name, trained in trained_tensors(state.stack).items():
        (whole_name,) = named_in_whole({name: trained}, ranks)
        entries = {
            key.removeprefix(f"{whole_name}/"): _laid_out_like(trained, tensor)
            for key, tensor in tensors.items()
            if key.startswith(f"{whole_name}/")
        }
        if entries:
            state.optimizer.state[trained] = entries
    for name, tensor in named_in_whole(_tensors(state), ranks).items():
        tensor.copy_(tensors[name])


def _laid_out_like(trained: Tensor, moment: Tensor) -> Tensor:
    """A moment with the strides of its tensor, as fused Adam takes for granted; its step count as
    it is."""
    if moment.shape != trained.shape:
        return moment.to(trained.device)
    return torch.empty_like(trained, requires_grad=False).copy_(moment)
