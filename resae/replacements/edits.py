"""Change latents while the model runs, and read them.

At a selected layer the stream is h, `prediction` what the chain of maps predicts, and

    z = TopK_k(relu((h − prediction − b_dec) W_enc + b_enc))      x̂ = prediction + b_dec + z W_dec
    ablate   z_j → 0            clamp   z_j → v, also where latent j is not active
    scale    z_j → v · z_j      add     z_j → z_j + v, or a vector u added to x̂

The edits of a layer, in their order, give z', and so `Δ = (z' − z) W_dec + Σ u`. Into the stream
goes x̂ + Δ, or h + Δ where the error h − x̂ is kept.

Effects "propagated": later layers predict from x̂ + Δ, so that their codes encode only the part of
the edit's effect that the maps do not predict. Effects "frozen": later layers predict from x̂, as if
there were no edit, and their codes must encode its whole effect. The reported code is always z'.
In open loop, predictions come from the stream before replacement, which lacks Δ of that layer:
 later codes must encode its whole effect in both cases, and "propagated" adds the predicted
effect to their x̂ a second time.

Only the edited latents are touched: Δ is a sum over E of them, never `[N, M]`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resae.choices import Action, Effects, Place
from resae.models.hooked import cache_of
from resae.stack.stack import ReSAE
from resae.storage import load_json
from resae.strict_json import brief, parse
from resae.threads import PerThread
from resae_kernels import SparseCode, transport

# -- descriptions of edits -------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """One change at one layer."""

    layer: int | str
    """Block number, or hook point as the stack names it."""
    action: Action | str
    """`ablate`, `clamp`, `scale` or `add` (formulas above)."""
    latents: tuple[int, ...] = ()
    """Indices of the latents; empty where a vector is added."""
    value: float | None = None
    """v: what to clamp to, scale by or add; none for `ablate`."""
    vector: tuple[float, ...] | None = None
    """u, `[D]`: for `add`, in place of latents and value."""
    at: Place | str | tuple[int, ...] = "all"
    """Tokens: `all`; `prompt`, those of a pass that starts without cache; `last_prompt`, the last
    of them; `generated`, those of passes that continue a cache; or positions in the row, counted
    from 0 without padding. Never padding, nor special tokens that are not replaced."""

    def __post_init__(self) -> None:
        Action.check(self.action, "action")
        if self.vector is not None and (self.action != "add" or self.latents):
            raise ValueError(
                f"{self.action} with a vector{' and latents' * bool(self.latents)}; a vector is "
                f"for 'add', in place of latents"
            )
        if self.vector is None and not self.latents:
            raise ValueError(f"{self.action} without latents; name at least one")
        if len(set(self.latents)) < len(self.latents) or min(self.latents, default=0) < 0:
            raise ValueError(f"latents={brief(self.latents)}; give each once, counting from 0")
        wanted = self.action != "ablate" and self.vector is None
        if wanted != (self.value is not None):
            raise ValueError(
                f"{self.action} {'needs' if wanted else 'takes no'} value, got {self.value}"
            )
        if not all(map(math.isfinite, (self.value or 0.0, *(self.vector or ())))):
            raise ValueError(f"{self.action}: value and vector must be finite")
        if isinstance(self.at, str):
            Place.check(self.at, "at", "positions")
        elif not self.at or min(self.at) < 0:
            raise ValueError(f"at={brief(self.at)}; expected positions, counting from 0")

    def __str__(self) -> str:
        what = "a vector" if self.vector is not None else f"latents {_join(self.latents)}"
        value = "" if self.value is None else f" value {self.value:g}"
        place = self.at if isinstance(self.at, str) else f"positions {_join(self.at)}"
        return f"{self.action} {what}{value} of layer {self.layer}, {place}"

    @classmethod
    def from_dict(cls, entry: Any) -> "Edit":
        """Read `{"layer": 3, "action": "clamp", "latents": 17, "value": 5.0, "at": "generated"}`.

        Raises:
            ValueError: not such a dict; the message names the entry and what is expected.
        """
        entry = _keys(entry, {"layer", "action"}, {"latents", "value", "vector", "at"})
        layer, at = entry["layer"], entry.get("at", "all")
        if not _is_integer(layer) and not isinstance(layer, str):
            raise ValueError(
                f"layer={brief(layer)}; expected a block number or the name of a hook point"
            )
        value, vector = entry.get("value"), entry.get("vector")
        return cls(
            layer,
            entry["action"],
            _integers("latents", entry.get("latents", ())),
            None if value is None else _number("value", value),
            None
            if vector is None
            else tuple(_number("vector", u) for u in _list("vector", vector)),
            at if isinstance(at, str) else _integers("at", at),
        )

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for `from_dict`, without the fields that are at their defaults."""
        entry: dict[str, Any] = {"layer": self.layer, "action": self.action}
        if self.latents:
            entry["latents"] = list(self.latents)
        if self.value is not None:
            entry["value"] = self.value
        if self.vector is not None:
            entry["vector"] = list(self.vector)
        return {**entry, "at": self.at if isinstance(self.at, str) else list(self.at)}


@dataclass(frozen=True)
class Interventions:
    """Edits at any number of layers, and what becomes of error and effects (formulas above)."""

    edits: tuple[Edit, ...] = ()
    keep_error: bool = False
    """Write h + Δ into the stream instead of x̂ + Δ."""
    effects: Effects | str = "propagated"
    """Input of later layers' predictions: x̂ + Δ (`propagated`) or x̂ (`frozen`)."""

    def __post_init__(self) -> None:
        Effects.check(self.effects, "effects")

    @classmethod
    def parse(cls, source: Any) -> "Interventions":
        """Read interventions from a dict `{"edits": [...], "keep_error": false, "effects":
        "propagated"}` or a list of edits (`Edit.from_dict`), from JSON text of either, or from a
        file of it.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a description; the message names the place and what is expected.
        """
        if isinstance(source, cls):
            return source
        if isinstance(source, str) and source.lstrip()[:1] in ("{", "["):
            source = parse(source, "interventions: the text")
        elif isinstance(source, (str, Path)):
            source = load_json(Path(source), "interventions")
        where = "interventions"
        try:
            if not isinstance(source, Mapping):
                source = {"edits": source}
            source = _keys(source, {"edits"}, {"keep_error", "effects"})
            if not isinstance(source.get("keep_error", False), bool):
                raise ValueError(
                    f"keep_error={brief(source['keep_error'])}, expected true or false"
                )
            edits = []
            for number, entry in enumerate(_list("edits", source["edits"]), start=1):
                where = f"interventions: edit {number}"
                edits.append(entry if isinstance(entry, Edit) else Edit.from_dict(entry))
            where = "interventions"
            settings: dict[str, Any] = {**source, "edits": tuple(edits)}
            return cls(**settings)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for `parse`, which JSON can hold."""
        edits = [edit.to_dict() for edit in self.edits]
        return {"edits": edits, "keep_error": self.keep_error, "effects": self.effects}


def _keys(entry: Any, required: set[str], optional: set[str]) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"got {brief(entry)}, expected keys and values")
    known = f"there are {', '.join(sorted(required | optional))}"
    for key in entry:
        if key not in required | optional:
            raise ValueError(f"unknown key {brief(key)}; {known}")
    for key in sorted(required):
        if key not in entry:
            raise ValueError(f"no {key!r}; {known}")
    return dict(entry)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(name: str, value: Any) -> float:
    if not _is_integer(value) and not isinstance(value, float):
        raise ValueError(f"{name}={brief(value)}, expected a number")
    return float(value)


def _list(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name}={brief(value)}, expected a list")
    return value


def _integers(name: str, value: Any) -> tuple[int, ...]:
    values = (value,) if _is_integer(value) else tuple(_list(name, value))
    if not all(map(_is_integer, values)):
        raise ValueError(f"{name}={brief(value)}, expected whole numbers")
    return values


def _join(numbers: Iterable[object]) -> str:
    return ", ".join(map(str, numbers))


# -- while the model runs --------------------------------------------------------------------------


@dataclass(frozen=True)
class PassTokens:
    """The tokens that one forward pass reads."""

    positions: Tensor
    """`[B, T]` int64, place in the row, padding not counted."""
    starts: bool | Tensor
    """True if no KV cache precedes them; with a static cache a bool `[]` on the device, which is
    not waited for."""
    attended: Tensor | None
    """`[B, T]` bool, not padding; None: all."""
    left_alone: Tensor | None = None
    """`[B, T]` bool, tokens whose stream is not replaced; None: none."""

    @classmethod
    def of_pass(cls, tokens: Tensor, kwargs: dict[str, Any]) -> "PassTokens":
        """Describe a pass over `tokens [B, T, ...]` with these keyword arguments of an HF model."""
        B, T = tokens.shape[:2]
        cache, mask = cache_of(kwargs), kwargs.get("attention_mask")
        past = 0 if cache is None else cache.get_seq_length()
        attended = None
        positions = past + torch.arange(T, device=tokens.device)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            attended = mask[:, -T:] != 0
            positions = mask.cumsum(-1)[:, -T:] - 1
        if kwargs.get("position_ids") is not None:
            positions = kwargs["position_ids"]
        return cls(positions.expand(B, T), past == 0, attended)

    def chosen(self, at: str | Tensor) -> Tensor:
        """`[B, T, 1]` bool: the tokens at a `Place`, or at positions `[P]`, but for
        padding and tokens left alone."""
        if isinstance(at, Tensor):
            here = torch.isin(self.positions, at.to(self.positions.device))
        elif at == "last_prompt":
            real = self.positions if self.attended is None else self.positions * self.attended
            here = (real == real.amax(-1, keepdim=True)) & self.starts
        else:
            here = torch.ones_like(self.positions, dtype=torch.bool)
            if at == "prompt":
                here = here & self.starts
            elif at == "generated":
                here = here & (self.starts ^ True)  # not, of a tensor too
        if self.attended is not None:
            here = here & self.attended
        if self.left_alone is not None:
            here = here & ~self.left_alone
        return here.unsqueeze(-1)


class Change(NamedTuple):
    """Change of the stream by edits at one layer: `Δ = amounts @ directions`."""

    amounts: Tensor
    """`[..., E]`: z' − z of each edited latent, then 1 where a vector is added."""
    directions: Tensor
    """`[E, D]`: rows of W_dec, then the vectors."""

    @property
    def delta(self) -> Tensor:
        """`[..., D]`"""
        return self.amounts @ self.directions


class EditCount(NamedTuple):
    """Number of changes that an edit made."""

    edit: Edit
    hook_point: str
    changed: dict[int | None, int]
    """Latent → tokens where its act became another; None → tokens where the vector was added."""


class ActiveEdits:
    """Interventions bound to the tensors of a stack, and counts of what they changed.

    Args:
        hook_points: the layers of the stack at which something is put in.

    Raises:
        ValueError: a layer that is not among `hook_points`; a latent or vector that its
            autoencoder has not room for.
    """

    def __init__(self, interventions: Interventions, stack: ReSAE, hook_points: Sequence[str]):
        self.edits = interventions.edits
        self.effects = interventions.effects
        self._stack = stack
        of_layer: dict[int, list[Edit]] = {}
        for edit in interventions.edits:
            name = str(edit.layer)
            name = f"blocks.{name}.hook_resid_post" if name.isdigit() else name
            if name not in hook_points:
                raise ValueError(
                    f"interventions: {edit}: not a replaced layer; these are "
                    f"{', '.join(hook_points)}"
                )
            of_layer.setdefault(stack.hook_points.index(name), []).append(edit)
        self._layers = {
            layer: _LayerEdits(edits, stack, layer) for layer, edits in of_layer.items()
        }
        self.changes: list[Change | None] = [None] * stack.n_layers
        """Changes added at each selected layer in the last completed forward pass."""

    def at(
        self, layer: int, code: SparseCode, tokens: PassTokens
    ) -> tuple[SparseCode, Change | None]:
        """The edited code `[B, T, k + E]` of selected layer `layer` and what is added to the
        stream; where the layer has no edits, the code itself and None."""
        if layer not in self._layers:
            return code, None
        return self._layers[layer].apply(code, tokens)

    @property
    def vectors(self) -> list[Tensor]:
        """Per selected layer `[V, D]`, the vectors whose effects later layers predict."""
        none = self._stack.sae(0).W_dec.new_zeros(0, self._stack.d_in)
        vectors = [none] * self._stack.n_layers
        if self.effects == "propagated":
            for layer, edits in self._layers.items():
                vectors[layer] = edits.directions[len(edits.latents) :]
        return vectors

    def code_for_prediction(
        self, layer: int, before: SparseCode, after: SparseCode, change: Change | None
    ) -> SparseCode:
        """The code that later layers predict from, where that of selected layer `layer` was
        `before` and became `after`, by the edits with `change`: with the vectors added as further
        latents, from M on."""
        if self.effects == "frozen":
            return before
        if change is None:
            return after
        edits, M = self._layers[layer], self._stack.sae(layer).config.d_sae
        added = change.amounts[..., len(edits.latents) :]
        rows = torch.arange(M, M + added.shape[-1], device=added.device)
        return SparseCode(
            torch.cat([after.acts, added], -1),
            torch.cat([after.indices, rows.expand(added.shape)], -1),
        )

    @property
    def counts(self) -> list[EditCount]:
        """One per edit, layer by layer."""
        return [count for layer in sorted(self._layers) for count in self._layers[layer].counts()]

    @property
    def changed(self) -> dict[str, int]:
        """Per edited hook point: acts changed, and tokens with a vector added."""
        sums: dict[str, int] = {}
        for _, name, changed in self.counts:
            sums[name] = sums.get(name, 0) + sum(changed.values())
        return sums

    def assert_fired(self) -> None:
        """Raise AssertionError, naming them, if edits or latents of them changed nothing yet."""
        idle = []
        for edit, _, changed in self.counts:
            quiet = [latent for latent, tokens in changed.items() if not tokens]
            which = f" (only {_join(quiet)})" if len(quiet) < len(changed) else ""
            if quiet:
                idle.append(f"{edit}{which}")
        if idle:
            raise AssertionError(f"interventions that changed nothing: {'; '.join(idle)}")


class _LayerEdits:
    """The edits of one layer as tensors on the stack's device.

    Every action is z_j → gain · z_j + offset at the chosen tokens.
    """

    def __init__(self, edits: Sequence[Edit], stack: ReSAE, layer: int):
        sae = stack.sae(layer)
        W_dec, M, D = sae.W_dec.detach(), sae.config.d_sae, sae.config.d_in
        device = W_dec.device
        for edit in edits:
            if max(edit.latents, default=0) >= M:
                raise ValueError(f"interventions: {edit}: the layer has latents 0..{M - 1}")
            if edit.vector is not None and len(edit.vector) != D:
                raise ValueError(
                    f"interventions: {edit}: it has {len(edit.vector)} entries, the stream {D}"
                )
        latents = sorted({latent for edit in edits for latent in edit.latents})
        slot = {latent: i for i, latent in enumerate(latents)}
        self.name = stack.hook_points[layer]
        self.sae = sae
        self.edits = edits
        self.latents = torch.tensor(latents, dtype=torch.int64, device=device)  # [E]
        self.slot_of = torch.full((M,), len(latents), device=device)  # [M], E: not edited
        self.slot_of[self.latents] = torch.arange(len(latents), device=device)
        vectors = [edit.vector for edit in edits if edit.vector is not None]
        self.directions = torch.cat(
            [W_dec[self.latents], W_dec.new_tensor(vectors).reshape(len(vectors), D)]
        )
        self.slots = [
            torch.tensor([slot[j] for j in edit.latents], dtype=torch.int64, device=device)
            for edit in edits
        ]
        self.at = [
            edit.at if isinstance(edit.at, str) else torch.tensor(edit.at, device=device)
            for edit in edits
        ]
        # Each thread has its own: an addition to a tensor is not atomic.
        self.changed = PerThread(partial(_zeros, [max(1, len(e.latents)) for e in edits], device))

    def apply(self, code: SparseCode, tokens: PassTokens) -> tuple[SparseCode, Change]:
        E = len(self.latents)
        slots = self.slot_of[code.indices]  # [B, T, k]
        edited = slots < E
        before = code.acts.new_zeros(*code.acts.shape[:-1], E + 1)
        before = before.scatter_add(-1, slots, code.acts)[..., :E]
        now, added = before, []
        for edit, which, at, changed in zip(
            self.edits, self.slots, self.at, self.changed.here, strict=True
        ):
            here = tokens.chosen(at).to(now.device)
            if edit.vector is not None:
                added.append(here.to(now.dtype))
                changed += here.sum()
                continue
            gain = {"ablate": 0.0, "clamp": 0.0, "scale": edit.value, "add": 1.0}[edit.action]
            offset = edit.value if edit.action in ("clamp", "add") else 0.0
            old = now[..., which]
            new = torch.where(here, gain * old + offset, old)  # type: ignore[operator]
            now = now.index_copy(-1, which, new)
            changed += (new != old).sum((0, 1))
        acts = torch.cat([code.acts.masked_fill(edited, 0), now], -1)
        indices = torch.cat([code.indices, self.latents.expand_as(now)], -1)
        new_code = SparseCode(acts, indices.masked_fill(acts == 0, 0))
        return new_code, Change(torch.cat([now - before, *added], -1), self._directions())

    def _directions(self) -> Tensor:
        """`directions`; where a gradient is wanted, with rows of the dictionary that have one."""
        if not torch.is_grad_enabled() or not self.sae.W_dec.requires_grad:
            return self.directions
        return torch.cat([self.sae.W_dec[self.latents], self.directions[len(self.latents) :]])

    def counts(self) -> list[EditCount]:
        sums = [torch.stack(parts).sum(0) for parts in zip(*self.changed, strict=True)]
        return [
            EditCount(
                edit, self.name, dict(zip(edit.latents or (None,), changed.tolist(), strict=True))
            )
            for edit, changed in zip(self.edits, sums, strict=True)
        ]


def _zeros(lengths: Sequence[int], device: torch.device) -> list[Tensor]:
    """int64, to be changed in place: outside `inference_mode`, which would forbid it later."""
    with torch.inference_mode(False):
        return [torch.zeros(n, dtype=torch.int64, device=device) for n in lengths]


# -- predicted effects of an edit ------------------------------------------------------------------


def predicted_effects(stack: ReSAE, changes: Sequence[Change | None]) -> list[Tensor | None]:
    """Predicted change of x̂ of every selected layer, the codes of later layers held fixed:
    `Σ_{l≤m} amounts_l @ (directions_l A_{l+1} … A_m)`, the transported directions.

    Exact for the chain (effects "propagated", codes of later layers held); for the model's own
    stream it is a prediction, whose quality `resae.evaluation.effects.edit_effects` measures.

    Args:
        changes: one per selected layer, None where nothing is edited.

    Returns:
        One `[..., D]` per selected layer; None where no change reaches it.
    """
    if len(changes) != stack.n_layers:
        raise ValueError(
            f"predicted_effects: {len(changes)} changes for {stack.n_layers} selected layers"
        )
    if not stack.chained:
        return [None if change is None else change.delta for change in changes]
    none = stack.sae(0).W_dec.new_zeros(0, stack.d_in)
    zeros = [none.new_zeros(stack.d_in) for _ in changes]
    transported = transport(
        [none if change is None else change.directions for change in changes],
        stack.predictor.A,
        zeros[1:],
        b_dec=zeros,
    ).dictionaries
    effects: list[Tensor | None] = []
    for m in range(len(changes)):
        terms = [
            change.amounts @ transported[m][layer]
            for layer, change in enumerate(changes[: m + 1])
            if change is not None
        ]
        effects.append(torch.stack(terms).sum(0) if terms else None)
    return effects


# -- reading ---------------------------------------------------------------------------------------


class StrongestLatents:
    """Keeps the n strongest latents of every token read, layer by layer, without waiting for the
    device: `replacement(…, on_codes=StrongestLatents(3))`."""

    def __init__(self, n: int):
        if n < 1:
            raise ValueError(f"StrongestLatents: n={n}, expected at least 1")
        self.n = n
        self._kept: PerThread[dict[str, list[SparseCode]]] = PerThread(dict)

    def __call__(self, hook_point: str, code: SparseCode) -> None:
        """Keep of a code `[B, T, k]` the n acts of largest magnitude."""
        slots = code.acts.abs().topk(min(self.n, code.acts.shape[-1]), dim=-1).indices
        kept = SparseCode(code.acts.gather(-1, slots), code.indices.gather(-1, slots))
        self._kept.here.setdefault(hook_point, []).append(kept)

    @property
    def codes(self) -> dict[str, SparseCode]:
        """Hook point → `[B, tokens read, n]`, strongest first, on the CPU: of all passes since the
        beginning or `clear`, one after the other; of several threads, thread by thread."""
        of_all: dict[str, list[SparseCode]] = {}
        for of_thread in self._kept:
            for name, kept in of_thread.items():
                of_all.setdefault(name, []).extend(kept)
        return {
            name: SparseCode(*(torch.cat(parts, dim=1).cpu() for parts in zip(*kept, strict=True)))
            for name, kept in of_all.items()
        }

    def clear(self) -> None:
        """Forget what was read, before another text."""
        for of_thread in self._kept:
            of_thread.clear()
