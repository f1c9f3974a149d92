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
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from resae_kernels.accelerated import Accelerated, accelerated, belongs_to_library
from resae_kernels.screened import MARGINS
from resae_kernels.types import Margin, SparseCode

SAE = TypeVar("SAE", bound=nn.Module)


def accelerate(sae: SAE, *, margin: Margin = "statistical") -> SAE:
    """An autoencoder of the same interface that encodes and decodes by `topk_encode` or
    `threshold_encode`, and `sparse_decode`.

    It shares the parameters, buffers, hooks and configuration of `sae`, which stays as it is:
    `state_dict`, `isinstance`, saving, moving and hooks work as before. Codes agree with those of
    `sae` up to the rounding of the scores.

    Args:
        sae: SAELens `TopKSAE`, `JumpReLUSAE` and `StandardSAE`; sparsify `SparseCoder` with
            activation "topk" (transcoders too); dictionary_learning `AutoEncoderTopK`,
            `BatchTopKSAE`, `MatryoshkaBatchTopKSAE`, `JumpReluAutoEncoder` and `AutoEncoder`. One
            that is accelerated already is returned.
        margin: of the screening on a CPU (`ScreenedEncoder`).

    Returns:
        What `sae` would return, from every method. It differs in two places: the third value of
        sparsify's `encode`, all M scores, is computed when it is read; and where a hook reads all
        scores, or all scores are returned (`return_topk`, multi-TopK, AuxK), the library's own
        encode runs.

    Raises:
        TypeError: any other class, training classes of SAELens among them.
        ValueError: an activation function that is none of these; unknown margin.

    Note:
        Memory: weights whose latents are not contiguous rows (SAELens' `W_enc`, the decoder of
        dictionary_learning) are held a second time, as rows, and on a CPU the 8-bit copy of the
        encoder. Both are made anew at the first call after the weight has changed; a change through
        `.data` is seen by a sample of entries, on a CPU. With gradients of parameters wanted no
        copy is used, and kinds with thresholds (all but TopK) run the library's own code: call them
        under `torch.no_grad()`. So do they from the first call on in which a token had more than
        M / 8 active latents.
        All kinds run the library's own code under autocast (each library rounds in places of its
        own; to keep the speed, convert the autoencoder instead), inside `torch.func` and
        forward-mode differentiation, where acts that are decoded need a gradient, and where a
        linear layer of dictionary_learning has a hook or an adapter.

        Moving or converting one object moves the parameters of both, as they are shared, but not
        the other's buffers and attributes (SAELens' `dtype`): convert first, then accelerate.
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
    return accelerated(sae, adapter, margin)


# -- SAELens ---------------------------------------------------------------------------------------


class _SAELens(Accelerated):
    """Hook points around each stage, `W_enc [D, M]`, dense acts."""

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
        return me.W_enc.T, me.b_enc, me.W_dec

    def code(self, sae_in: Tensor) -> SparseCode:
        """The code of an input as `process_sae_in` returns it."""
        raise NotImplementedError

    def needs_library(self, x: Tensor) -> bool:
        """True if the library's own code has to encode x: something reads all scores, or
        `belongs_to_library`."""
        me: Any = self
        return _is_hooked(me.hook_sae_acts_pre) or belongs_to_library(x)

    def encode(self, x: Tensor) -> Tensor:
        me: Any = self
        if self.needs_library(x):
            return super().encode(x)  # type: ignore[misc]
        return me.hook_sae_acts_post(self._dense(self._hidden(x), me.W_dec.shape[0]))

    def _hidden(self, x: Tensor) -> SparseCode:
        me: Any = self
        return self.code(me.process_sae_in(x))

    def decode(self, feature_acts: Tensor) -> Tensor:
        code = self._code_of(feature_acts)
        return super().decode(feature_acts) if code is None else self._recons(code)  # type: ignore[misc]

    def _recons(self, code: SparseCode) -> Tensor:
        me: Any = self
        recons = me.hook_sae_recons(self._gather(code, me.b_dec))
        return me.reshape_fn_out(me.run_time_activation_norm_fn_out(recons), me.d_head)

    def forward(self, x: Tensor) -> Tensor:
        me: Any = self
        if me.use_error_term or self.needs_library(x) or _is_hooked(me.hook_sae_acts_post):
            return super().forward(x)  # type: ignore[misc]
        return me.hook_sae_output(self._recons(self._hidden(x)))


class _SAELensTopK(_SAELens):
    @staticmethod
    def require(sae: Any) -> None:
        if not isinstance(getattr(sae.activation_fn, "k", None), int):
            name = type(sae.activation_fn).__name__
            raise ValueError(f"accelerate: SAELens' activation_fn is {name}, expected TopK")

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor]:
        me: Any = self
        if not me.cfg.rescale_acts_by_decoder_norm:
            return super().weights()
        norm = me.W_dec.norm(dim=-1)  # scores count times the norm, rows of norm 1
        return me.W_enc.T * norm[:, None], me.b_enc * norm, me.W_dec / norm[:, None]

    def needs_library(self, x: Tensor) -> bool:
        me: Any = self
        sparse = getattr(me.activation_fn, "use_sparse_activations", False)
        return sparse or super().needs_library(x)

    def code(self, sae_in: Tensor) -> SparseCode:
        me: Any = self
        return self._topk(sae_in, me.activation_fn.k)


class _SAELensThreshold(_SAELens):
    """JumpReLU, and ReLU as the threshold 0."""

    @staticmethod
    def require(sae: Any) -> None:
        if not isinstance(sae.activation_fn, nn.ReLU):
            name = type(sae.activation_fn).__name__
            raise ValueError(f"accelerate: SAELens' activation_fn is {name}, expected ReLU")

    def sources(self) -> tuple[Tensor, ...]:
        me: Any = self
        thresholds = (me.threshold,) if hasattr(me, "threshold") else ()
        return (*super().sources(), *thresholds)

    def thresholds(self) -> Tensor | None:
        me: Any = self
        return me.threshold if hasattr(me, "threshold") else me.b_enc.new_zeros(())

    def needs_library(self, x: Tensor) -> bool:
        return self._wants_gradient(x) or self._is_dense or super().needs_library(x)

    def code(self, sae_in: Tensor) -> SparseCode:
        return self._above(sae_in)


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

    def _code(self, x: Tensor) -> SparseCode:
        me: Any = self
        return self._topk(x, me.cfg.k, None if me.cfg.transcode else me.b_dec)

    def encode(self, x: Tensor) -> Any:
        if belongs_to_library(x):
            return super().encode(x)  # type: ignore[misc]
        acts, indices = self._code(x)
        written = None if x.is_inference() else x._version

        def scores() -> Tensor:
            if written is not None and x._version != written:
                raise RuntimeError(
                    "accelerate: pre_acts of an input that was written to after encode; read "
                    "pre_acts first, or encode a copy"
                )
            return super(_SparsifyTopK, self).encode(x).pre_acts  # type: ignore[misc]

        return _encoder_output(_library_of(self).EncoderOutput)(acts, indices, scores)

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        me: Any = self
        if belongs_to_library(top_acts):
            return super().decode(top_acts, top_indices)  # type: ignore[misc]
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
        reads_all_scores = dead_mask is not None or me.cfg.multi_topk
        if reads_all_scores or belongs_to_library(x):
            return super().forward(x, y, dead_mask=dead_mask, total_variance=total_variance)  # type: ignore[misc]
        on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            acts, indices = code = self._code(x)
            x_hat = self._gather(code, me.b_dec)
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

        def _replace(self, **values: Any) -> Any:
            return cls(*self)._replace(**values)

        def __getitem__(self, key: Any) -> Any:
            whole = key in (2, -1) if isinstance(key, int) else 2 in range(3)[key]
            return tuple(self)[key] if whole else tuple.__getitem__(self, key)

    def made(acts: Tensor, indices: Tensor, scores: Callable[[], Tensor]) -> Any:
        output = tuple.__new__(EncoderOutput, (acts, indices, None))
        output.scores = scores
        return output

    return made


# -- dictionary_learning ---------------------------------------------------------------------------


class _Dictionary(Accelerated):
    """Dense acts, and `decoder.weight [D, M]`."""

    def sources(self) -> tuple[Tensor, ...]:
        me: Any = self
        return me.encoder.weight, me.encoder.bias, me.decoder.weight

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor]:
        me: Any = self
        return me.encoder.weight, me.encoder.bias, me.decoder.weight.T

    def biases(self) -> tuple[Tensor | None, Tensor]:
        """The bias subtracted before the encoder, and the one added after the decoder."""
        me: Any = self
        return me.b_dec, me.b_dec

    def code(self, x: Tensor) -> SparseCode:
        return self._above(x, self.biases()[0])

    def needs_library(self, x: Tensor) -> bool:
        return self._wants_gradient(x) or self._is_dense or not self._is_plain("encoder", x)

    def _is_plain(self, name: str, x: Tensor) -> bool:
        """True if the module `name` computes what its weight and bias say: no hook, adapter or
        parametrization, and x does not belong to the library. Classes that keep parameters instead
        have no such module."""
        module = getattr(self, name, None)
        plain = module is None or (type(module) is nn.Linear and not _is_hooked(module))
        return plain and not belongs_to_library(x)

    def encode(self, x: Tensor, *values: Any, **options: Any) -> Any:
        me: Any = self
        if values or _differ(options) or self.needs_library(x):
            return super().encode(x, *values, **options)  # type: ignore[misc]
        return self._dense(self.code(x), me.dict_size)

    def decode(self, f: Tensor) -> Tensor:
        code = self._code_of(f) if self._is_plain("decoder", f) else None
        return super().decode(f) if code is None else self._gather(code, self.biases()[1])  # type: ignore[misc]

    def forward(self, x: Tensor, *values: Any, **options: Any) -> Any:
        plain = self._is_plain("decoder", x) and not self.needs_library(x)
        if values or _differ(options) or not plain:
            return super().forward(x, *values, **options)  # type: ignore[misc]
        return self._gather(self.code(x), self.biases()[1])


def _differ(options: dict[str, Any]) -> bool:
    """True if options ask for more than acts or a reconstruction. `use_threshold` is the default of
    the kinds that have thresholds, and not of TopK."""
    return any(
        value is not None and value is not False
        for name, value in options.items()
        if name != "use_threshold"
    )


class _DictionaryTopK(_Dictionary):
    _known_k: tuple[tuple[int, int], int] | None = None

    def needs_library(self, x: Tensor) -> bool:
        return not self._is_plain("encoder", x)

    def encode(self, x: Tensor, *values: Any, **options: Any) -> Any:
        if options.get("use_threshold"):
            return super(_Dictionary, self).encode(x, *values, **options)  # type: ignore[misc]
        return super().encode(x, *values, **options)

    def code(self, x: Tensor) -> SparseCode:
        return self._topk(x, self._k(), self.biases()[0])

    def _k(self) -> int:
        """k, which the library keeps in a buffer: read anew when it has changed, since reading
        waits for a GPU."""
        k: Tensor = getattr(self, "k")  # noqa: B009
        if k.is_cpu or k.is_inference():
            return int(k)
        version = k.data_ptr(), k._version
        if self._known_k is None or self._known_k[0] != version:
            vars(self)["_known_k"] = version, int(k)
        assert self._known_k is not None
        return self._known_k[1]


class _DictionaryReLU(_Dictionary):
    def thresholds(self) -> Tensor | None:
        me: Any = self
        return me.encoder.bias.new_zeros(())

    def biases(self) -> tuple[Tensor | None, Tensor]:
        me: Any = self
        return me.bias, me.bias


class _DictionaryBatchTopK(_Dictionary):
    """One threshold, which the batches of training left."""

    def sources(self) -> tuple[Tensor, ...]:
        me: Any = self
        return (*super().sources(), me.threshold)

    def thresholds(self) -> Tensor | None:
        me: Any = self
        return me.threshold

    def encode(self, x: Tensor, *values: Any, **options: Any) -> Any:
        if not options.get("use_threshold", True):
            return super(_Dictionary, self).encode(x, *values, **options)  # type: ignore[misc]
        return super().encode(x, *values, **options)


class _DictionaryParameters(_Dictionary):
    """Parameters of its own in place of linear layers: `W_enc [D, M]`, `W_dec [M, D]`."""

    def sources(self) -> tuple[Tensor, ...]:
        me: Any = self
        return me.W_enc, me.b_enc, me.W_dec, me.threshold

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor]:
        me: Any = self
        return me.W_enc.T, me.b_enc, me.W_dec

    def thresholds(self) -> Tensor | None:
        me: Any = self
        return me.threshold


class _DictionaryMatryoshka(_DictionaryParameters, _DictionaryBatchTopK):
    def thresholds(self) -> Tensor | None:
        """Latents of groups that are switched off are never active."""
        me: Any = self
        all_of_them = me.threshold.expand(len(me.b_enc)).clone()
        all_of_them[int(me.group_indices[me.active_groups]) :] = float("inf")
        return all_of_them

    def _current_rows(self) -> Any:
        me: Any = self
        if vars(self).get("_groups") != me.active_groups:
            vars(self).update(_groups=me.active_groups, _rows=None)
        return super()._current_rows()


class _DictionaryJumpReLU(_DictionaryParameters):
    def biases(self) -> tuple[Tensor | None, Tensor]:
        me: Any = self
        return me.b_dec if me.apply_b_dec_to_input else None, me.b_dec


_ADAPTERS: dict[tuple[str, str], type[Accelerated]] = {
    ("sae_lens", "TopKSAE"): _SAELensTopK,
    ("sae_lens", "JumpReLUSAE"): _SAELensThreshold,
    ("sae_lens", "StandardSAE"): _SAELensThreshold,
    ("sparsify", "SparseCoder"): _SparsifyTopK,
    ("dictionary_learning", "AutoEncoderTopK"): _DictionaryTopK,
    ("dictionary_learning", "BatchTopKSAE"): _DictionaryBatchTopK,
    ("dictionary_learning", "MatryoshkaBatchTopKSAE"): _DictionaryMatryoshka,
    ("dictionary_learning", "JumpReluAutoEncoder"): _DictionaryJumpReLU,
    ("dictionary_learning", "AutoEncoder"): _DictionaryReLU,
}
