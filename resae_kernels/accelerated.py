"""The common part of drop-in acceleration (`dropin.py`): weights as rows, codes, and dense acts."""

import weakref
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from resae_kernels import checks
from resae_kernels.cpu.private_torch import is_transformed
from resae_kernels.decode import sparse_decode
from resae_kernels.encode import topk_encode
from resae_kernels.screened import ScreenedEncoder, layout_of, sample
from resae_kernels.threshold import threshold_encode
from resae_kernels.types import Margin, SparseCode

DENSE_SHARE = 8
"""A dense tensor of acts is packed into a code if no row has more than M / DENSE_SHARE of them."""
FIRST_ROOM = 128
"""Room in the first code of an autoencoder with thresholds; it grows to what a call needs."""


class _Rows(NamedTuple):
    """Weights with one latent per contiguous row, and the tensors that they were made of."""

    sources: tuple[Tensor, ...]
    versions: tuple[Any, ...]
    weight: Tensor
    bias: Tensor | None
    W_dec: Tensor
    threshold: Tensor | None
    encoder: ScreenedEncoder | None
    samples: list[tuple[Any, Any]]
    """For sources on a CPU: a view of some entries, and these entries as they were. The
    libraries scale their parameters through `.data`, which torch does not count."""

    def is_current(self, versions: tuple[Any, ...]) -> bool:
        """True if the sources are what they were."""
        return versions == self.versions and not any(
            (now != then).any() for now, then in self.samples
        )


class Accelerated(nn.Module):
    """An autoencoder of another library with our encode and decode. Adapters say where a class
    keeps its parameters; their methods replace those of the class."""

    _margin: Margin
    _rows: _Rows | None = None
    _room: int = FIRST_ROOM
    _is_dense: bool = False
    _last: tuple[weakref.ref[Tensor], int, SparseCode] | None = None

    # -- defined by adapters -----------------------------------------------------------------------

    @staticmethod
    def require(sae: Any) -> None:
        """Raise ValueError for a configuration that cannot be accelerated."""

    def set_up(self) -> None:
        """Mend what the library keeps in closures over the object that was copied."""

    def sources(self) -> tuple[Tensor, ...]:
        """The tensors that `weights` reads."""
        raise NotImplementedError

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Encoder weight `[M, D]`, bias `[M]` or None, and dictionary `[M, D']`: views, where the
        library's own tensors allow it."""
        raise NotImplementedError

    def thresholds(self) -> Tensor | None:
        """Thresholds `[M]` or `[]`, of autoencoders that have them."""
        return None

    # -- ours --------------------------------------------------------------------------------------

    def __reduce__(self):
        """Copied and pickled as the library's own object, accelerated anew."""
        plain = copied(self, type(self).__bases__[1])
        return accelerated, (plain, type(self).__bases__[0], self._margin)

    def _current_rows(self) -> _Rows:
        sources = self.sources()
        counted = not any(t.is_inference() for t in sources)  # torch counts no writes to those
        versions = tuple((layout_of(t), _version(t), t.dtype, t.device) for t in sources)
        rows = self._rows
        if counted and rows is not None and rows.is_current(versions):
            return rows
        with torch.no_grad():
            weight, bias, W_dec = self.weights()
            weight, W_dec = weight.detach().contiguous(), W_dec.detach().contiguous()
            bias = None if bias is None else bias.detach()
            threshold = self.thresholds()
            threshold = None if threshold is None else threshold.detach().to(weight.dtype)
        on_cpu = weight.is_cpu
        screens = on_cpu and counted
        encoder = ScreenedEncoder(weight, bias, margin=self._margin) if screens else None
        detached = [t.detach() for t in sources if on_cpu and t.numel()]
        detached = [t if t.ndim else t.view(1) for t in detached]
        samples = [(now, now.copy()) for now in map(sample, detached)]
        rows = _Rows(sources, versions, weight, bias, W_dec, threshold, encoder, samples)
        vars(self)["_rows"] = rows
        return rows

    def _trains(self) -> bool:
        """True if parameters need gradients: then the copies cannot be used."""
        return torch.is_grad_enabled() and any(t.requires_grad for t in self.sources())

    def _topk(self, x: Tensor, k: int, pre_bias: Tensor | None = None) -> SparseCode:
        """The code of `x − pre_bias`, `[..., D]` → `[..., k]`."""
        x = _promoted(x, pre_bias)
        if self._trains() or torch.compiler.is_compiling():
            weight, bias, _ = self.weights()
            return topk_encode(x, weight, bias, k, pre_bias=pre_bias)
        rows = self._current_rows()
        if rows.encoder is not None:
            return rows.encoder.encode(x, k, pre_bias=pre_bias)
        return topk_encode(x, rows.weight, rows.bias, k, pre_bias=pre_bias)

    def _above(self, x: Tensor, pre_bias: Tensor | None = None) -> SparseCode:
        """The code of `x − pre_bias` `[..., D]` above the thresholds, with room for all of it. If
        that is more than a code is good for, the next calls are the library's own."""
        x = _promoted(x, pre_bias)
        rows = self._current_rows()
        assert rows.threshold is not None
        M = rows.weight.shape[0]
        while True:
            room = min(self._room, M)
            if rows.encoder is not None:
                code = rows.encoder.threshold_encode(x, rows.threshold, room, pre_bias=pre_bias)
            else:
                code = threshold_encode(
                    x, rows.weight, rows.bias, rows.threshold, room, pre_bias=pre_bias
                )
            most = int(code.n_active.max()) if code.n_active.numel() else 0
            if most <= room:
                return SparseCode(code.acts, code.indices)
            vars(self)["_room"] = 1 << (most - 1).bit_length()
            vars(self)["_is_dense"] = most * DENSE_SHARE > M

    def _wants_gradient(self, x: Tensor) -> bool:
        """True where thresholds are left to the library: no gradient of ours, or a compiler that
        cannot look at the number of active latents."""
        if torch.compiler.is_compiling():
            return True
        return torch.is_grad_enabled() and (x.requires_grad or self._trains())

    def _gather(self, code: SparseCode, bias: Tensor) -> Tensor:
        plain = self._trains() or torch.compiler.is_compiling()
        W_dec = self.weights()[2] if plain else self._current_rows().W_dec
        return sparse_decode(code.acts.to(W_dec.dtype), code.indices, W_dec, bias=bias)

    def _dense(self, code: SparseCode, M: int) -> Tensor:
        """`[..., M]`, remembered as this code's."""
        acts, indices = code
        dense = acts.new_zeros(*acts.shape[:-1], M)
        dense.scatter_add_(-1, indices, acts)  # padding adds 0 to latent 0
        if torch.compiler.is_compiling():
            return dense
        if dense.is_cpu or not dense.is_inference():
            vars(self)["_last"] = weakref.ref(dense), _version(dense), code
        return dense

    def _code_of(self, dense: Tensor) -> SparseCode | None:
        """The code of dense acts `[..., M]`, without a gradient; None where they are not sparse
        enough, and where a gradient of all M acts is wanted."""
        if torch.compiler.is_compiling() or belongs_to_library(dense):
            return None
        if torch.is_grad_enabled() and dense.requires_grad:
            return None
        if dense.shape[-1:] != self.weights()[2].shape[:1]:
            return None  # the library refuses it
        last = self._last
        known = last is not None and last[0]() is dense and last[1] == _version(dense)
        if known and last is not None and (not dense.is_cpu or _holds(dense, last[2])):
            return SparseCode(last[2].acts.detach(), last[2].indices)
        return _packed(dense.detach())


def belongs_to_library(x: Tensor) -> bool:
    """True where the library's own code has to run: in a transform of torch.func, whose derivatives
    our operations do not have, and under autocast, where each library rounds in places of its
    own."""
    return is_transformed() or checks.autocasts(x.device.type)


def accelerated(sae: nn.Module, adapter: type[Accelerated], margin: Margin) -> Any:
    """`sae` with the methods of the adapter in front of its own."""
    new = copied(sae, _subclass(adapter, type(sae)))
    vars(new)["_margin"] = margin
    new.set_up()
    return new


RESCALING = ("fold_W_dec_norm", "fold_activation_norm_scaling_factor", "fold_activation_whitening")
RESCALING += ("scale_biases", "normalize_decoder", "set_decoder_norm_to_unit_norm")
"""Methods of the libraries that write to parameters through `.data`, which torch does not count."""


@cache
def _subclass(adapter: type[Accelerated], cls: type[nn.Module]) -> type[Accelerated]:
    forgetful = {name: _forgetting(getattr(cls, name)) for name in RESCALING if hasattr(cls, name)}
    return type(cls.__name__, (adapter, cls), {"__module__": cls.__module__, **forgetful})


def _forgetting(method: Callable[..., Any]) -> Callable[..., Any]:
    """A library's method, after which copies of the weights are made anew."""

    @wraps(method)
    def forgets(self: Accelerated, *values: Any, **options: Any) -> Any:
        try:
            return method(self, *values, **options)
        finally:
            vars(self)["_rows"] = None

    return forgets


OURS = ("_margin", "_rows", "_room", "_is_dense", "_last", "_known_k", "_groups")
"""Attributes that an accelerated autoencoder has beside its own."""


def copied(sae: Any, cls: type[Any]) -> Any:
    """An object of `cls` with the same parameters, modules and attributes as `sae`."""
    new: Any = object.__new__(cls)
    for name, value in vars(sae).items():
        if name not in OURS:
            registry = name in ("_parameters", "_buffers", "_modules")
            vars(new)[name] = type(value)(value) if registry else value
    for name, module in new._modules.items():
        # a tensor that is assigned (load_state_dict(assign=True)) is that object's alone
        if module is not None and next(module.parameters(), None) is not None:
            new._modules[name] = copied(module, type(module))
    return new


def _promoted(x: Tensor, pre_bias: Tensor | None) -> Tensor:
    """`x` in the dtype of `x - pre_bias`: 16-bit activations for a float32 autoencoder."""
    return x if pre_bias is None else x.to(torch.promote_types(x.dtype, pre_bias.dtype))


def _version(tensor: Tensor) -> int:
    """Count of the writes to a tensor; -1 where torch does not count."""
    return -1 if tensor.is_inference() else tensor._version


@torch.no_grad()
def _holds(dense: Tensor, code: SparseCode) -> bool:
    """True if dense acts are still those of the code: a write through `.data` is not counted."""
    same = (dense.gather(-1, code.indices) == code.acts) | (code.acts == 0)
    return bool(same.all()) and bool(dense.count_nonzero() == code.acts.count_nonzero())


def _packed(dense: Tensor) -> SparseCode | None:
    if dense.layout != torch.strided or not dense.is_cpu or not dense.numel():
        return None  # on a GPU the host would wait for the number of acts
    M = dense.shape[-1]
    flat = dense.reshape(-1, M)
    active = flat != 0
    counts = active.sum(-1)
    most = int(counts.max())
    if most * DENSE_SHARE > M:
        return None
    token, latent = active.nonzero(as_tuple=True)
    slot = torch.arange(len(token)) - (counts.cumsum(0) - counts)[token]
    acts = flat.new_zeros(len(flat), max(1, most)).index_put((token, slot), flat[token, latent])
    indices = torch.zeros(acts.shape, dtype=torch.int64).index_put_((token, slot), latent)
    shape = (*dense.shape[:-1], acts.shape[1])
    return SparseCode(acts.view(shape), indices.view(shape))
