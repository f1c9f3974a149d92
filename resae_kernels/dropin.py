"""Drop-in acceleration: an autoencoder of another library, with our encode and decode inside.

    sae = accelerate(SAE.load_from_disk(folder))                      SAELens
    sae = accelerate(SparseCoder.load_from_disk(folder))              sparsify
    sae = accelerate(AutoEncoderTopK.from_pretrained(file))           dictionary_learning

The result is of a subclass of the class it was given, so everything that is not encode, decode or
forward stays the library's own: hooks, configuration, saving. No library is imported here; a class
is known by its module and name.

Where a library's interface demands a dense `[N, M]` of acts it is filled from the sparse code. A
decode knows the dense tensors that the last encode returned, as long as nobody wrote to them, and
gathers; others are packed into a code where they are sparse enough, and multiplied where not.
"""

import sys
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from resae_kernels.decode import sparse_decode
from resae_kernels.encode import topk_encode
from resae_kernels.screened import MARGINS, ScreenedEncoder, layout_of
from resae_kernels.types import Margin, SparseCode

SAE = TypeVar("SAE", bound=nn.Module)

DENSE_SHARE = 8
"""A dense tensor of acts is packed into a code if no row has more than M / DENSE_SHARE of them."""


def accelerate(sae: SAE, *, margin: Margin = "statistical") -> SAE:
    """An autoencoder of the same interface that encodes and decodes by `topk_encode` and
    `sparse_decode`.

    It shares the parameters, buffers, hooks and configuration of `sae`, which stays as it is:
    `state_dict`, `isinstance`, saving, moving and hooks work as before. Codes agree with those of
    `sae` up to the rounding of the scores.

    Args:
        sae: SAELens `TopKSAE`, sparsify `SparseCoder` with activation "topk" (transcoders too), or
            dictionary_learning `AutoEncoderTopK`. One that is accelerated already is returned.
        margin: of the screening on a CPU (`ScreenedEncoder`).

    Returns:
        What `sae` would return, from every method. It differs in two places: the third value of
        sparsify's `encode`, all M scores, is computed when it is read; and where a hook reads all
        scores, or all scores are returned (`return_topk`, multi-TopK, AuxK), the library's own
        encode runs.

    Raises:
        TypeError: any other class, training classes of SAELens among them.
        ValueError: an activation that is not TopK; unknown margin.

    Note:
        Memory: weights whose latents are not contiguous rows (SAELens' `W_enc`, the decoder of
        dictionary_learning) are held a second time, as rows, and on a CPU the 8-bit copy of the
        encoder. Both are made anew at the first call after the weight has changed. With gradients
        of parameters wanted no copy is used.
    """
    if margin not in MARGINS:
        raise ValueError(f"accelerate: margin={margin!r}, expected {' or '.join(MARGINS)}")
    if isinstance(sae, Accelerated):
        return sae
    cls = type(sae)
    adapter = _ADAPTERS.get((cls.__module__.split(".")[0], cls.__name__))
    if adapter is None:
        known = ", ".join(f"{library} {name}" for library, name in _ADAPTERS)
        raise TypeError(
            f"accelerate: got {cls.__module__}.{cls.__qualname__}, expected one of: {known}"
        )
    adapter.require(sae)
    new = _copied(sae, _accelerated(adapter, cls))
    vars(new)["_margin"] = margin
    new.set_up()
    return new


class _Rows(NamedTuple):
    """Weights with one latent per contiguous row, and the tensors that they were made of."""

    sources: tuple[Tensor, ...]
    versions: tuple[Any, ...]
    weight: Tensor
    bias: Tensor | None
    W_dec: Tensor
    encoder: ScreenedEncoder | None


class Accelerated(nn.Module):
    """An autoencoder of another library with our encode and decode. Adapters say where a class
    keeps its parameters; their methods replace those of the class."""

    _margin: Margin
    _rows: _Rows | None = None
    _last: tuple[weakref.ref[Tensor], int, SparseCode] | None = None

    # -- said by adapters --------------------------------------------------------------------------

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

    # -- ours --------------------------------------------------------------------------------------

    def __reduce__(self):
        """Copied and pickled as the library's own object, accelerated anew."""
        return _accelerate_with, (_copied(self, type(self).__bases__[1]), self._margin)

    def _current_rows(self) -> _Rows:
        sources = self.sources()
        versions = tuple((layout_of(t), t._version, t.dtype, t.device) for t in sources)
        rows = self._rows
        if rows is None or rows.versions != versions:
            with torch.no_grad():
                weight, bias, W_dec = (
                    None if t is None else t.detach().contiguous() for t in self.weights()
                )
            assert weight is not None
            assert W_dec is not None
            screened = weight.device.type == "cpu"
            encoder = ScreenedEncoder(weight, bias, margin=self._margin) if screened else None
            rows = _Rows(sources, versions, weight, bias, W_dec, encoder)
            vars(self)["_rows"] = rows
        return rows

    def _trains(self) -> bool:
        """True if parameters need gradients: then the copies cannot be used."""
        return torch.is_grad_enabled() and any(t.requires_grad for t in self.sources())

    def _topk(self, x: Tensor, k: int, pre_bias: Tensor | None = None) -> SparseCode:
        """The code of `x − pre_bias`, `[..., D]` → `[..., k]`."""
        if self._trains():
            weight, bias, _ = self.weights()
            return topk_encode(x, weight, bias, k, pre_bias=pre_bias)
        rows = self._current_rows()
        if rows.encoder is not None:
            return rows.encoder.encode(x, k, pre_bias=pre_bias)
        return topk_encode(x, rows.weight, rows.bias, k, pre_bias=pre_bias)

    def _gather(self, code: SparseCode, bias: Tensor) -> Tensor:
        W_dec = self.weights()[2] if self._trains() else self._current_rows().W_dec
        return sparse_decode(code.acts.to(W_dec.dtype), code.indices, W_dec, bias=bias)

    def _dense(self, code: SparseCode, M: int) -> Tensor:
        """`[..., M]`, remembered as this code's."""
        acts, indices = code
        dense = acts.new_zeros(*acts.shape[:-1], M)
        dense.scatter_add_(-1, indices, acts)  # padding adds 0 to latent 0
        vars(self)["_last"] = weakref.ref(dense), dense._version, code
        return dense

    def _code_of(self, dense: Tensor) -> SparseCode | None:
        """The code of dense acts `[..., M]`; None where they are not sparse enough."""
        last = self._last
        if last is not None and last[0]() is dense and last[1] == dense._version:
            return last[2]
        return _packed(dense)


def _accelerate_with(sae: nn.Module, margin: Margin) -> nn.Module:
    return accelerate(sae, margin=margin)


@cache
def _accelerated(adapter: type[Accelerated], cls: type[nn.Module]) -> type[Accelerated]:
    return type(cls.__name__, (adapter, cls), {"__module__": cls.__module__})


def _copied(sae: Any, cls: type[Any]) -> Any:
    """An object of `cls` with the same parameters, modules and attributes as `sae`."""
    new: Any = object.__new__(cls)
    for name, value in vars(sae).items():
        if name not in ("_margin", "_rows", "_last", "_known_k"):
            registry = name in ("_parameters", "_buffers", "_modules")
            vars(new)[name] = type(value)(value) if registry else value
    return new


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


# -- SAELens ---------------------------------------------------------------------------------------


class _SAELensTopK(Accelerated):
    def set_up(self) -> None:
        me: Any = self
        me._setup_activation_normalization()
        if me.hook_z_reshaping_mode:
            me.turn_on_forward_pass_hook_z_reshaping()

    def sources(self) -> tuple[Tensor, ...]:
        me: Any = self
        return me.W_enc, me.b_enc, me.W_dec

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor]:
        me: Any = self
        weight, bias, W_dec = me.W_enc.T, me.b_enc, me.W_dec
        if me.cfg.rescale_acts_by_decoder_norm:  # scores count times the norm, rows of norm 1
            norm = W_dec.norm(dim=-1)
            weight, bias, W_dec = weight * norm[:, None], bias * norm, W_dec / norm[:, None]
        return weight, bias, W_dec

    def _hidden(self, x: Tensor) -> SparseCode:
        me: Any = self
        return self._topk(me.process_sae_in(x), me.cfg.k)

    def encode(self, x: Tensor) -> Tensor:
        me: Any = self
        if _is_hooked(me.hook_sae_acts_pre) or getattr(
            me.activation_fn, "use_sparse_activations", False
        ):
            return super().encode(x)  # type: ignore[misc]
        return me.hook_sae_acts_post(self._dense(self._hidden(x), me.W_dec.shape[0]))

    def decode(self, feature_acts: Tensor) -> Tensor:
        code = self._code_of(feature_acts)
        return super().decode(feature_acts) if code is None else self._recons(code)  # type: ignore[misc]

    def _recons(self, code: SparseCode) -> Tensor:
        me: Any = self
        recons = me.hook_sae_recons(self._gather(code, me.b_dec))
        return me.reshape_fn_out(me.run_time_activation_norm_fn_out(recons), me.d_head)

    def forward(self, x: Tensor) -> Tensor:
        me: Any = self
        if (
            me.use_error_term
            or _is_hooked(me.hook_sae_acts_pre)
            or _is_hooked(me.hook_sae_acts_post)
        ):
            return super().forward(x)  # type: ignore[misc]
        return me.hook_sae_output(self._recons(self._hidden(x)))


def _is_hooked(point: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(point, kind) for kind in kinds)


# -- sparsify --------------------------------------------------------------------------------------


class _SparsifyTopK(Accelerated):
    @staticmethod
    def require(sae: Any) -> None:
        if sae.cfg.activation != "topk":
            raise ValueError(
                f"accelerate: sparsify's activation {sae.cfg.activation!r}, expected 'topk'"
            )
        if sae.W_dec is None:
            raise ValueError("accelerate: a SparseCoder without decoder; load it with decoder=True")

    def sources(self) -> tuple[Tensor, ...]:
        me: Any = self
        return me.encoder.weight, me.encoder.bias, me.W_dec

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor]:
        me: Any = self
        return me.encoder.weight, me.encoder.bias, me.W_dec

    def encode(self, x: Tensor) -> Any:
        me: Any = self
        pre_bias = None if me.cfg.transcode else me.b_dec
        acts, indices = self._topk(x, me.cfg.k, pre_bias)

        def scores() -> Tensor:
            return super(_SparsifyTopK, self).encode(x).pre_acts  # type: ignore[misc]

        return _encoder_output(_library_of(self).EncoderOutput)(acts, indices, scores)

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        me: Any = self
        return self._gather(SparseCode(top_acts, top_indices), me.b_dec)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        dead_mask: Tensor | None = None,
        total_variance: Tensor | None = None,
    ) -> Any:
        me: Any = self
        if dead_mask is not None or me.cfg.multi_topk:  # both read all scores
            return super().forward(x, y, dead_mask=dead_mask, total_variance=total_variance)  # type: ignore[misc]
        on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            acts, indices = tuple(self.encode(x)[:2])
            x_hat = self.decode(acts, indices)
            if me.W_skip is not None:
                x_hat = x_hat + x.to(x_hat.dtype) @ me.W_skip.mT
            target = x if y is None else y
            if total_variance is None:
                total_variance = (target - target.mean(0)).pow(2).sum()
            fvu = (target - x_hat).pow(2).sum() / total_variance
        zero = x_hat.new_tensor(0.0)
        return _library_of(self).ForwardOutput(x_hat, acts, indices, fvu, zero, zero)


def _library_of(sae: nn.Module) -> Any:
    return sys.modules[type(sae).__module__]


@cache
def _encoder_output(cls: Any) -> Callable[[Tensor, Tensor, Callable[[], Tensor]], Any]:
    """sparsify's `EncoderOutput` whose third value is computed when it is read."""

    class EncoderOutput(cls):
        scores: Callable[[], Tensor]

        @property
        def pre_acts(self) -> Tensor:
            return self.scores()

        def __iter__(self) -> Iterator[Tensor]:
            yield self[0]
            yield self[1]
            yield self.pre_acts

        def __getitem__(self, key: Any) -> Any:
            whole = key in (2, -1) if isinstance(key, int) else 2 in range(3)[key]
            return tuple(self)[key] if whole else tuple.__getitem__(self, key)

    def made(acts: Tensor, indices: Tensor, scores: Callable[[], Tensor]) -> Any:
        output = tuple.__new__(EncoderOutput, (acts, indices, None))
        output.scores = scores
        return output

    return made


# -- dictionary_learning ---------------------------------------------------------------------------


class _DictionaryTopK(Accelerated):
    _known_k: tuple[tuple[int, int], int] | None = None

    def sources(self) -> tuple[Tensor, ...]:
        me: Any = self
        return me.encoder.weight, me.encoder.bias, me.decoder.weight

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor]:
        me: Any = self
        return me.encoder.weight, me.encoder.bias, me.decoder.weight.T

    def _hidden(self, x: Tensor) -> SparseCode:
        me: Any = self
        return self._topk(x, self._k(), me.b_dec)

    def _k(self) -> int:
        """k, which the library keeps in a buffer: read anew when it has changed, since reading
        waits for a GPU."""
        k: Tensor = getattr(self, "k")  # noqa: B009
        version = k.data_ptr(), k._version
        if self._known_k is None or self._known_k[0] != version:
            vars(self)["_known_k"] = version, int(k)
        assert self._known_k is not None
        return self._known_k[1]

    def encode(self, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        me: Any = self
        if return_topk or use_threshold:
            return super().encode(x, return_topk=return_topk, use_threshold=use_threshold)  # type: ignore[misc]
        return self._dense(self._hidden(x), me.dict_size)

    def decode(self, x: Tensor) -> Tensor:
        me: Any = self
        code = self._code_of(x)
        return super().decode(x) if code is None else self._gather(code, me.b_dec)  # type: ignore[misc]

    def forward(self, x: Tensor, output_features: bool = False) -> Any:
        me: Any = self
        if output_features:
            return super().forward(x, output_features=True)  # type: ignore[misc]
        return self._gather(self._hidden(x), me.b_dec)


_ADAPTERS: dict[tuple[str, str], type[Accelerated]] = {
    ("sae_lens", "TopKSAE"): _SAELensTopK,
    ("sparsify", "SparseCoder"): _SparsifyTopK,
    ("dictionary_learning", "AutoEncoderTopK"): _DictionaryTopK,
}
