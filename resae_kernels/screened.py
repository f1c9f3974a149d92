"""TopK encode that reads an 8-bit copy of the weight: screen, then score exactly. On a CPU; for few
tokens on a GPU, on request (`triton/screening.py`, where the residual is rounded otherwise).

    ŝ = approximate scores, one integer GEMM           |ŝ_j − s_j| ≤ λ_j for every latent j
    t = the k-th largest of ŝ − λ                      so that at least k latents have s ≥ t
    candidates = {j : ŝ_j + λ_j ≥ t}                   so that every one of the TopK is among them
    code = TopK of the exact float32 scores of the candidates

Residual r and weight row w are quantised with a dither that is subtracted again: with u uniform on
[0, 1), q = ⌊r/t + u⌋ and r̂ = t (q − u + ½) the errors of the D entries are independent and uniform
on ±t/2 whatever r is (Schuchman 1964). Two bounds λ follow:

certain      Cauchy–Schwarz: |s − ŝ| ≤ ‖w − ŵ‖ ‖r‖ + ‖ŵ‖ ‖r − r̂‖, from the errors actually made.
statistical  s − ŝ = (w − ŵ)·r + ŵ·(r − r̂): a sum of independent uniform errors, in the second term
             given the first. A uniform variable on ±a is sub-Gaussian with variance a²/3, hence
             P(|s − ŝ| ≥ λ) ≤ 2 exp(−6 λ² / (s² ‖r‖² + t² ‖ŵ‖²)), s and t the two steps; λ is
             where the sum over all M latents is `FAILURE`. (The bound of Hoeffding, which knows the
             range of the errors alone, would be √3 times as wide.)

With thresholds θ in place of the k best, the candidates are {j : ŝ_j + λ_j ≥ max(θ_j, 0)}, and all
of them are scored: those with s_j > θ_j are counted (`n_active`) and make the code. A latent whose
score is not above its threshold never enters, since exact scores are compared. An active latent is
missed only where s_j − ŝ_j > λ_j. With the certain λ that never happens: code and count are exact.
With the statistical λ it has a probability of at most exp(−6 λ_j² / (s² ‖r‖² + t² ‖ŵ‖²)), one side
of the bound above, which is `FAILURE` / 2 when summed over all M latents. So with probability at
least 1 − 5·10⁻¹³ per row, over the dither and whatever the thresholds are, no active latent is
missed, and code and count are both exact.

The screening pass reads a quarter of the bytes and takes a tenth of the time of the GEMM.
"""

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor

from resae_kernels import checks
from resae_kernels.cpu import native, private_torch, screening_torch
from resae_kernels.cpu.private_torch import int8_linear_unavailable
from resae_kernels.cpu.screening_native import NativeCopy
from resae_kernels.dispatch import implementation_for
from resae_kernels.encode import backward, check_arguments, fits, setup_context, topk_encode
from resae_kernels.screening_bounds import SAMPLES, ScreeningCopy, StaleCopyError
from resae_kernels.threshold import OP as THRESHOLD_OP
from resae_kernels.threshold import backward as no_gradient
from resae_kernels.threshold import per_latent, threshold_encode
from resae_kernels.threshold import setup_context as keep_nothing
from resae_kernels.triton import screening as triton_screening
from resae_kernels.triton.encode_few import FEW_TOKENS
from resae_kernels.types import Margin, ScreeningImplementation, SparseCode, ThresholdCode

log = logging.getLogger(__name__)

ROW_REASON = "not finite, all zero, or too many candidates"
MARGINS, IMPLEMENTATIONS = get_args(Margin), get_args(ScreeningImplementation)


LEAST_LATENTS = 16
"""M/k below which too many latents are candidates."""


class Rule(NamedTuple):
    """Sizes from which on screening is faster than the exact path, the whole GEMM."""

    entries: int
    """Smallest number of entries of the weight, M·D."""
    width: int
    """Smallest D."""
    training_rows: int
    """Smallest batch for which a single-use copy pays off: in training the weight changes every
    step."""
    certain_rows: int
    """Largest batch for which the certain margin is as fast as the exact path."""


ANY = NEVER = 1 << 62
RULES: dict[str, dict[torch.dtype, Rule]] = {
    # Measured on one core of an Intel Xeon with AMX, November 2026, against oneDNN's GEMM in the
    # same dtype and the compiled selection: at 1 to 1024 rows, D from 16 to 2048, M·D from 2¹² to
    # 2²⁵, k from M/512 to M/16. Up to 2¹⁶ entries both take the same time. The 16-bit GEMM is by
    # AMX in bfloat16 (by AVX-512 in float16, at the rate of float32): from 256 rows on, GEMM and
    # selection take 0.8 to 1.4 times the time of screening, and a single-use copy hardly pays.
    "native": {
        torch.float32: Rule(entries=1 << 16, width=64, training_rows=128, certain_rows=ANY),
        torch.bfloat16: Rule(entries=1 << 16, width=64, training_rows=1024, certain_rows=64),
        torch.float16: Rule(entries=1 << 16, width=64, training_rows=128, certain_rows=ANY),
    },
    # Measured on one core of an AMD EPYC with AVX-512 VNNI, November 2026: at 1, 16, 64 and 256
    # rows, M·D from 2¹⁹ to 2²⁵.
    "torch": {
        torch.float32: Rule(entries=1 << 22, width=256, training_rows=512, certain_rows=16),
    },
    # Not measured. An estimate: four launches more than the exact path take as long as the bytes
    # that are not read below this size.
    "triton": dict.fromkeys(
        (torch.float32, torch.bfloat16, torch.float16),
        Rule(entries=1 << 26, width=64, training_rows=NEVER, certain_rows=FEW_TOKENS),
    ),
}


Code = TypeVar("Code", SparseCode, ThresholdCode)


class EncodeInfo(NamedTuple, Generic[Code]):
    """A code, and the path by which its rows were encoded."""

    code: Code
    rows_screened: int
    rows_exact: int
    """Rows that took the exact path, the whole GEMM."""
    candidates: int
    """(Row, latent) pairs of the screened rows that were scored exactly."""
    reason: str | None
    """Why rows took the exact path; None if none did."""
    implementation: str | None
    """The implementation that screened: "native", the compiled library, "torch" or "triton"; None:
    no row was screened."""


def unavailable(implementation: str | None = None) -> str | None:
    """Reason why this machine cannot screen, by this implementation or (None) by any; None if it
    can."""
    if implementation == "native":
        return native.unavailable()
    if implementation == "torch":
        return int8_linear_unavailable()
    if implementation == "triton":
        return None  # checked with the device of the weight
    compiled = native.unavailable()
    return None if compiled is None else int8_linear_unavailable()


@cache
def _warn_once(reason: str) -> None:
    log.warning("encoding by the whole float32 GEMM, without screening: %s", reason)


class _State(NamedTuple):
    """A copy, and the versions of the weight and bias of which it was made."""

    copy: ScreeningCopy
    versions: tuple[Any, ...]
    """Address and version of each tensor."""
    samples: list[tuple[Any, Any]]
    """A view of entries of each tensor, and their values when the copy was made."""

    def is_current(self, versions: tuple[Any, ...]) -> bool:
        if versions != self.versions:
            return False
        return not any((now != then).any() for now, then in self.samples)


class ScreenedEncoder:
    """TopK encode of one weight and bias on a CPU, by screening with an 8-bit copy.

    The copy takes M·D bytes. It is rebuilt at the first call after the weight or bias has changed,
    in place or to other memory. If the weight requires its gradient, the copy is used for one call
    and dropped, because the weight is about to change. torch's version counter misses the steps of
    fused optimisers and writes through `.data`. A sample of entries is compared to notice them, but
    may miss a write to a few latents: call `invalidate` after such a write, and after the step of a
    fused optimiser between two calls without gradients.

    On a GPU ("triton") the copy takes M·D + 12·M bytes of its memory, and nothing is sampled, since
    the host would wait. A call needs no synchronisation once the copy is made, and can be captured
    in a CUDA graph. A graph replays with the copy of its capture: capture again after the weight
    has changed. A row whose exact scores lie outside their bounds takes the exact path.

    Several threads may encode at once. If the weight changes during a call, the call starts again
    with the changed weight.

    Args:
        weight: `[M, D]`, one latent per row; screened on a CPU, or by "triton"; kept, not copied.
        bias: `[M]` or None.
        margin: "statistical": a row misses a latent with probability below 1e-12 over the dither,
            by the proof in the module's docstring; "certain": never, but with many times the
            candidates.
        seed: seed of the dither. Equal seeds give equal codes, bit for bit.
        implementation: "native", the compiled library: float32, bfloat16 and float16; "torch":
            float32; None: native where it can run, else torch; "triton": a weight on a GPU, at most
            16 rows a call (not measured yet, never chosen by None).

    Raises:
        ValueError: unknown margin or implementation, an implementation that cannot run here, a
            weight that is not `[M, D]`, a bias that does not fit.

    Note:
        Codes agree with those of `topk_encode` and `threshold_encode` up to the rounding of float32
        sums, which are taken in another order.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        margin: Margin = "statistical",
        seed: int = 0,
        implementation: ScreeningImplementation | None = None,
    ):
        if margin not in MARGINS:
            raise ValueError(f"ScreenedEncoder: margin={margin!r}, expected {' or '.join(MARGINS)}")
        if weight.ndim != 2:
            raise ValueError(
                f"ScreenedEncoder: weight has shape {list(weight.shape)}, expected [M, D]"
            )
        if bias is not None:
            checks.check_shape("ScreenedEncoder", "bias", bias, (weight.shape[0],), "one a latent")
        if implementation not in (None, *IMPLEMENTATIONS):
            raise ValueError(
                f"ScreenedEncoder: implementation={implementation!r}, expected "
                f"{' or '.join(map(repr, IMPLEMENTATIONS))} or None"
            )
        if implementation == "triton":
            implementation_for("ScreenedEncoder", weight, implementation)
        elif implementation is not None and (reason := unavailable(implementation)) is not None:
            raise ValueError(f"ScreenedEncoder: implementation={implementation!r}, but {reason}")
        self.weight, self.bias, self._seed = weight, bias, seed
        self.margin: Margin = margin
        self.requested = implementation
        """The implementation that was passed."""
        self._outlier_dimensions: tuple[int, ...] = ()
        self._lock = threading.Lock()
        self._state: _State | None = None

    def __getstate__(self) -> dict[str, Any]:
        """State without the copy: a copied or unpickled encoder makes its own."""
        return {n: v for n, v in self.__dict__.items() if n != "_lock"} | {"_state": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def encode(
        self,
        x: Tensor,  # [..., D]
        k: int,
        *,
        pre_bias: Tensor | None = None,  # [D]
        prediction: Tensor | None = None,  # [..., D]
        sorted: bool = True,
    ) -> SparseCode:
        """The code of `topk_encode` with this weight and bias: same arguments, returns, errors and
        gradients."""
        code = self._encode_at_once(x, k, pre_bias, prediction, sorted)
        if code is not None:
            return code
        return self._encode_any(x, k, pre_bias, prediction, sorted)[0]

    def online_step(
        self,
        x: Tensor,
        k: int,
        b_dec: Tensor | None,
        prediction: Tensor | None,
        W_dec: Tensor,
        affine: tuple[Tensor, Tensor, Tensor] | None = None,
        *,
        sorted: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """x̂, acts and indices of `resae_kernels.online_step` by one call of the compiled library.
        None: that is not possible (gradients, arguments that do not fit, no current copy), use
        encode and decode.

        Args:
            affine: instead of prediction, the source `[..., D]`, A `[D, D]` and c `[D]` of the
                prediction `source A + c`: for few tokens, as A is read again for each.
            sorted: as for `encode`.
        """
        step = self.prepare_step(x, k, b_dec, W_dec, affine and affine[1:], sorted=sorted)
        return None if step is None else step(x, affine[0] if affine else prediction)

    def prepare_step(
        self,
        x: Tensor,
        k: int,
        b_dec: Tensor | None,
        W_dec: Tensor,
        affine: tuple[Tensor, Tensor] | None = None,
        *,
        sorted: bool = False,
    ) -> "PreparedStep | None":
        """`online_step` for activations of x's shape and dtype, checked once for many calls; None
        where `online_step` would return None."""
        state = self._state
        tensors = b_dec, W_dec, *(affine or ())
        if not self._is_ready(state, x, k, b_dec, None, W_dec) or not x.numel():
            return None
        if affine is not None:
            (A, c), D = affine, x.shape[-1:]
            if A.shape != D + D or c.shape != D or not native.direct(x, A, c):
                return None
        if not all(t is None or t.is_contiguous() for t in tensors):
            return None
        return PreparedStep(self, x, k, b_dec, W_dec, affine, sorted)

    def _encode_at_once(
        self, x: Tensor, k: int, pre_bias: Tensor | None, prediction: Tensor | None, sorted: bool
    ) -> SparseCode | None:
        """The code by one call of the compiled library, for valid arguments and a current copy;
        None: `encode_with_info` raises the error, takes another path, or makes a copy."""
        state = self._state
        if not self._is_ready(state, x, k, pre_bias, prediction) or not x.numel():
            return None
        leading, D = x.shape[:-1], x.shape[-1]
        flat = x if len(leading) == 1 else x.reshape(-1, D)
        flat_prediction = (
            prediction if prediction is None or len(leading) == 1 else prediction.reshape(-1, D)
        )
        try:
            acts, indices, left, *_ = state.copy.encode(  # type: ignore[union-attr]
                flat, k, pre_bias, flat_prediction, sorted
            )
        except StaleCopyError:
            return None
        if left is not None or self._versions() != state.versions:  # type: ignore[union-attr]
            return None
        if len(leading) == 1:
            return SparseCode(acts, indices)
        return SparseCode(acts.view(*leading, k), indices.view(*leading, k))

    def _is_ready(
        self,
        state: "_State | None",
        x: Tensor,
        k: int,
        pre_bias: Tensor | None,
        prediction: Tensor | None,
        W_dec: Tensor | None = None,
    ) -> bool:
        """True if the compiled copy of `state` can encode these arguments as they are. The library
        itself compares the samples of the weight."""
        weight, bias = self.weight, self.bias
        return (
            state is not None  # there is one only for a weight that is worth screening
            and type(state.copy) is NativeCopy
            and state.copy.is_live
            and self.margin == "statistical"  # pays for any number of rows
            and native.direct(x, weight, bias, pre_bias, prediction, W_dec)
            and fits(x, weight, bias, k, pre_bias, prediction)
            and (W_dec is None or W_dec.shape == weight.shape)
            and LEAST_LATENTS * k <= weight.shape[0]
            and self._versions() == state.versions
        )

    def encode_with_info(
        self,
        x: Tensor,
        k: int,
        *,
        pre_bias: Tensor | None = None,
        prediction: Tensor | None = None,
        sorted: bool = True,
    ) -> EncodeInfo[SparseCode]:
        """The code of `encode`, with the path that its rows took and the reason. With "triton" this
        waits for the device, which `encode` does not."""
        code, found = self._encode_any(x, k, pre_bias, prediction, sorted)
        N = x.shape[:-1].numel()
        if isinstance(found, str):
            return EncodeInfo(code, 0, N, 0, found, None)
        return EncodeInfo(code, *self._how(N, found))

    def _encode_any(
        self, x: Tensor, k: int, pre_bias: Tensor | None, prediction: Tensor | None, sorted: bool
    ) -> "tuple[SparseCode, _Counts | str]":
        """The code by any path; and what was counted, or the reason why no row was screened."""
        private_torch.refuse_forward_mode("ScreenedEncoder.encode")
        D = self.weight.shape[1]
        shape = x.shape[:-1]
        N = shape.numel()
        trained = _require_gradient(self.weight, self.bias)
        if trained:
            self.invalidate()
        reason = self._exact_reason(x, N, k, trained)
        if reason is not None:
            code = topk_encode(
                x,
                self.weight,
                self.bias,
                k,
                pre_bias=pre_bias,
                prediction=prediction,
                sorted=sorted,
            )
            return code, reason
        check_arguments(x, self.weight, self.bias, k, pre_bias, prediction, None)
        flat = x if x.ndim == 2 else x.reshape(N, D)
        flat_prediction = (
            prediction if prediction is None or prediction.ndim == 2 else prediction.reshape(N, D)
        )
        info = _Counts()
        if trained or _require_gradient(x, pre_bias, prediction):
            acts, indices = _WithGradient.apply(
                flat,
                self.weight,
                self.bias,
                k,
                pre_bias,
                flat_prediction,
                sorted,
                (self, info),
                "triton" if self.implementation == "triton" else "torch",
            )
        else:
            acts, indices = self._encode(flat, k, pre_bias, flat_prediction, sorted, info)
        if trained:
            self.invalidate()
        if x.ndim != 2:
            acts, indices = acts.view(*shape, k), indices.view(*shape, k)
        return SparseCode(acts, indices), info

    def threshold_encode(
        self,
        x: Tensor,  # [..., D]
        threshold: Tensor,  # [M] or []
        max_active: int,
        *,
        pre_bias: Tensor | None = None,  # [D]
        prediction: Tensor | None = None,  # [..., D]
        sorted: bool = True,
    ) -> ThresholdCode:
        """The code of `resae_kernels.threshold_encode` with this weight and bias: arguments,
        returns and errors are the same. It serves any thresholds and `encode` from one 8-bit copy.
        """
        return self.threshold_encode_with_info(
            x, threshold, max_active, pre_bias=pre_bias, prediction=prediction, sorted=sorted
        ).code

    def threshold_encode_with_info(
        self,
        x: Tensor,
        threshold: Tensor,
        max_active: int,
        *,
        pre_bias: Tensor | None = None,
        prediction: Tensor | None = None,
        sorted: bool = True,
    ) -> EncodeInfo[ThresholdCode]:
        """The code of `threshold_encode`, with the path that its rows took and the reason."""
        private_torch.refuse_forward_mode("ScreenedEncoder.threshold_encode")
        weight, bias, N = self.weight, self.bias, x.shape[:-1].numel()
        reason = self._exact_reason(x, N, None, False, max_active)
        if reason is not None:
            code = threshold_encode(
                x,
                weight,
                bias,
                threshold,
                max_active,
                pre_bias=pre_bias,
                prediction=prediction,
                sorted=sorted,
            )
            return EncodeInfo(code, 0, N, 0, reason, None)
        check_arguments(
            x, weight, bias, max_active, pre_bias, prediction, None, THRESHOLD_OP, "max_active"
        )
        threshold, D = per_latent(threshold, weight), weight.shape[1]
        flat = None if prediction is None else prediction.reshape(N, D)
        info = _Counts()
        with torch.no_grad():
            code = self._encode(
                x.reshape(N, D), max_active, pre_bias, flat, sorted, info, threshold
            )
        inputs = x, weight, bias, threshold, pre_bias, prediction
        if _require_gradient(*inputs):
            code = _WithoutGradient.apply(code, *inputs)
        acts, indices, n_active = code  # type: ignore[misc]
        leading = x.shape[:-1]
        code = ThresholdCode(
            acts.view(*leading, max_active),
            indices.view(*leading, max_active),
            n_active.view(leading),
        )
        return EncodeInfo(code, *self._how(N, info))

    def _how(self, N: int, info: "_Counts") -> tuple[int, int, int, str | None, str]:
        """The fields of `EncodeInfo` that follow the code of N rows."""
        rows_exact, candidates = info.rows_exact, info.candidates
        if isinstance(candidates, Tensor):
            each = candidates.tolist()
            rows_exact = sum(n < 0 for n in each)
            candidates = sum(n for n in each if n > 0)
        reason = ROW_REASON if rows_exact else None
        return N - rows_exact, rows_exact, candidates, reason, self.implementation

    @property
    def implementation(self) -> str:
        """Implementation of screening: as requested, or by this machine "native" or "torch"."""
        return self.requested or ("torch" if native.unavailable() else "native")

    def invalidate(self) -> None:
        """Drop the 8-bit copy: the next call makes a new one."""
        state = self._state
        if state is not None and isinstance(state.copy, NativeCopy):
            self._outlier_dimensions = state.copy.dimensions
        self._state = None

    def _encode(
        self,
        x: Tensor,
        k: int,
        pre_bias: Tensor | None,
        prediction: Tensor | None,
        sorted: bool,
        info: "_Counts",
        threshold: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        for state in self._states():
            try:
                acts, indices, left, info.candidates, n_active = state.copy.encode(
                    x, k, pre_bias, prediction, sorted, threshold
                )
            except StaleCopyError:
                self._drop(state)
                continue
            if self._versions() != state.versions:
                continue  # another thread has written to the weight meanwhile
            code = (acts, indices) if n_active is None else (acts, indices, n_active)
            if left is not None:
                info.rows_exact = len(left)
                rest = None if prediction is None else prediction[left]
                given = x[left], self.weight, self.bias
                offsets = {"pre_bias": pre_bias, "prediction": rest, "sorted": sorted}
                exact = (
                    topk_encode(*given, k, **offsets)
                    if threshold is None
                    else threshold_encode(*given, threshold, k, **offsets)
                )
                for all_rows, rows in zip(code, exact, strict=True):
                    all_rows[left] = rows
            return code
        raise RuntimeError(
            "ScreenedEncoder: the weight or bias changes as fast as it is copied; is another "
            "thread writing to it?"
        )

    def _states(self) -> "Iterator[_State]":
        """The current copy, repeatedly, because it may turn out or become stale."""
        for _ in range(5):
            state = self._current_state()
            assert state is not None
            yield state

    def _versions(self) -> tuple[Any, ...]:
        weight, bias = self.weight, self.bias
        if bias is None:
            return layout_of(weight), weight._version
        return layout_of(weight), weight._version, layout_of(bias), bias._version

    def _current_state(self) -> _State | None:
        """The copy, rebuilt if the weight or bias has changed; None if these are not finite."""
        state, versions = self._state, self._versions()
        if state is not None and state.is_current(versions):
            return state
        with self._lock:
            state, versions = self._state, self._versions()
            if state is not None and state.is_current(versions):
                return state
            self.invalidate()
            tensors = [t.detach() for t in (self.weight, self.bias) if t is not None]
            sampled = [t for t in tensors if t.is_cpu]  # for others the host would wait
            samples = [(now, now.copy()) for now in map(sample, sampled)]
            made = self._make_copy(*tensors)
            self._state = None if made is None else _State(made, versions, samples)
            return self._state

    def _make_copy(self, weight: Tensor, bias: Tensor | None = None) -> ScreeningCopy | None:
        if self.implementation == "triton":
            return triton_screening.quantise(weight, bias, self.margin, self._seed)
        if self.implementation == "torch":
            return screening_torch.quantise(weight, bias, self.margin, self._seed)
        copy = NativeCopy(weight, bias, self.margin, self._seed, self._outlier_dimensions)
        return copy if copy.finite else None

    def _drop(self, state: _State) -> None:
        with self._lock:
            if self._state is state:
                self.invalidate()

    def _exact_reason(
        self, x: Tensor, N: int, k: int | None, trained: bool, max_active: int = 0
    ) -> str | None:
        """Reason why a call is not screened at all; None if it is. k is None with thresholds, which
        leave room for max_active."""
        weight = self.weight
        M, D = weight.shape
        implementation = self.implementation
        rules = RULES[implementation]
        rule = rules.get(weight.dtype)
        place = weight.device.type if implementation == "triton" else "cpu"
        if weight.device.type != place or rule is None:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in rules)
            return f"the weight is {weight.dtype} on {weight.device}, not {names} on {place}"
        if x.dtype != weight.dtype or checks.autocasts(place):
            return f"the GEMM is not in {str(weight.dtype).removeprefix('torch.')}"
        if weight.is_inference():
            return "the weight was made in inference mode, where changes are not counted"
        many_active = k is not None and (
            LEAST_LATENTS * k > M
            or (implementation == "torch" and screening_torch.group_size(M, k) is None)
        )
        if implementation == "triton" and not many_active:
            many_active = not triton_screening.screens(M, max_active if k is None else k)
        if rule.entries > M * D or rule.width > D or many_active:
            room = f", max_active={max_active}" if implementation == "triton" else ""
            return f"screening does not pay at M={M}, D={D}{room if k is None else f', k={k}'}"
        if N == 0:
            return "there are no rows"
        if implementation == "triton":
            if N > FEW_TOKENS:
                return f"{N} rows, at most {FEW_TOKENS} are screened by Triton"
            if not private_torch.is_eager():
                return "the call is traced or transformed"
        if trained and rule.training_rows > N:
            return (
                f"the weight requires its gradient, and {N} rows do not pay for a copy that serves "
                f"one call; if none is wanted, call under torch.no_grad()"
            )
        if self.margin == "certain" and rule.certain_rows < N:
            return f"the certain margin does not pay at {N} rows"
        state = self._state
        cannot = unavailable(self.requested) if state is None else None
        if cannot is not None:
            _warn_once(cannot)
        elif self._current_state() is None:
            cannot = "the weight or bias is not finite"
        return cannot


class PreparedStep:
    """Online step of one encoder with all arguments but the activations fixed: a call only checks
    that the tensors have not changed. Made by `ScreenedEncoder.prepare_step`."""

    def __init__(
        self,
        encoder: ScreenedEncoder,
        x: Tensor,
        k: int,
        b_dec: Tensor | None,
        W_dec: Tensor,
        affine: tuple[Tensor, Tensor] | None,
        sorted: bool,
    ):
        self._encoder, self._weight, self._bias = encoder, encoder.weight, encoder.bias
        self._dtype, self._shape = x.dtype, x.shape
        self._code = native.new_code(x, (*x.shape[:-1], k))
        given = (encoder.weight, encoder.bias, b_dec, W_dec, *(affine or ()))
        self._fixed = [(t, t.dtype, *layout_of(t)) for t in given if t is not None]
        self._layer = native.layer(W_dec, b_dec, affine, k, sorted)

    def __call__(
        self, x: Tensor, prediction: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """x̂ like x, acts and indices; None: a tensor has changed.

        Args:
            prediction: the prediction of x; with an affine map, the source of the prediction.
        """
        if not private_torch.is_eager() or private_torch.is_profiled():
            return None
        if not self._is_like(x) or not (prediction is None or self._is_like(prediction)):
            return None
        for t, dtype, address, shape, stride in self._fixed:
            if (
                t.data_ptr() != address
                or t.dtype is not dtype
                or t.shape != shape
                or t.stride() != stride
            ):
                return None
        if torch.is_grad_enabled() and self._requires_gradient(x, prediction):
            return None
        state = self._encoder._state  # pyright: ignore[reportPrivateUsage]
        if state is None or not self._is_current(state):
            return None
        struct, *kept = state.copy.held  # type: ignore[union-attr]
        step = native.online_step(struct, self._layer, x, prediction, self._code)
        del kept
        return step if self._is_current(state) else None

    def _requires_gradient(self, x: Tensor, prediction: Tensor | None) -> bool:
        return _require_gradient(x, prediction, *(t for t, *_ in self._fixed))

    def _is_current(self, state: _State) -> bool:
        """True if the copy was made of the present weight and bias, whose shapes and strides were
        checked before."""
        layout, version, *of_bias = state.versions
        weight, bias = self._weight, self._bias
        if weight._version != version or weight.data_ptr() != layout[0]:
            return False
        return bias is None or (bias._version == of_bias[1] and bias.data_ptr() == of_bias[0][0])

    def _is_like(self, x: Tensor) -> bool:
        return (
            type(x) is Tensor
            and x.shape == self._shape
            and x.dtype is self._dtype
            and x.is_cpu
            and x.is_contiguous()
            and not x.is_neg()
        )


def require_own(op: str, encoder: ScreenedEncoder, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless the encoder is the one of this weight and bias."""
    if encoder.weight is not weight or encoder.bias is not bias:
        raise ValueError(
            f"{op}: encoder was made of another weight or bias; pass the ones it was made of"
        )


def layout_of(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """Address, shape and strides: assigning `.data` changes nothing else that torch reports."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _require_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def sample(tensor: Tensor) -> Any:
    """`SAMPLES` entries of the tensor, a view as a numpy array."""
    memory = tensor
    if tensor.is_neg():  # numpy takes no tensor whose memory is to be read negated
        where = tensor.storage_offset(), tensor.shape, tensor.stride()
        memory = tensor.new_empty(0).set_(tensor.untyped_storage(), *where)
    some = memory[:: max(1, len(memory) // SAMPLES)]
    some = some if some.ndim == 1 else some[:, some.shape[1] // 2]
    return (some if some.dtype != torch.bfloat16 else some.view(torch.int16)).numpy()


@dataclass
class _Counts:
    rows_exact: int = 0
    candidates: int | Tensor = 0


class _WithGradient(torch.autograd.Function):
    """Screened encode with the gradient of `topk_encode`, as it does not depend on how the code was
    found."""

    @staticmethod
    def forward(
        x: Tensor,
        _weight: object,
        _bias: object,
        k: int,
        pre_bias: Tensor | None,
        prediction: Tensor | None,
        sorted: bool,
        screened: tuple[ScreenedEncoder, _Counts],
        _implementation: str,
    ) -> tuple[Tensor, Tensor]:
        encoder, info = screened
        encode = encoder._encode  # pyright: ignore[reportPrivateUsage]
        acts, indices = encode(x, k, pre_bias, prediction, sorted, info)
        return acts, indices

    setup_context = staticmethod(setup_context)
    backward = staticmethod(backward)  # type: ignore[assignment]


class _WithoutGradient(torch.autograd.Function):
    """A threshold code as it is, whose backward raises as that of `threshold_encode`."""

    @staticmethod
    def forward(code: tuple[Tensor, ...], *_: object) -> tuple[Tensor, ...]:
        return code

    setup_context = staticmethod(keep_nothing)
    backward = staticmethod(no_gradient)  # type: ignore[assignment]
