"""Sparse decode, y[n] = Σ_j acts[n,j] · W_dec[indices[n,j]] + bias + prediction[n], and its error.

N tokens, k active latents, D width, M latents. 2·N·k·D FLOPs against 2·N·M·D dense; bound by
gathering N·k·D weight elements. Codes of several dictionaries are summed in one call.

Backward: d acts is an SDDMM, ⟨g[n], W_dec[indices[n,j]]⟩; dW_dec is a scatter-add of outer
products, summed over the codes sorted by latent (both in `gradients.py`).

Where k is a large share of M, each of the three is faster as a GEMM over the code scattered into
`[n, M]`, one chunk of rows at a time: the algorithm "dense" (`dense.py`), also deterministic.

Both implementations do this: `torch` with the compiled CPU library or `embedding_bag`
(`cpu/sums.py`), `triton` with the kernels of `triton/decode.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resae_kernels import checks, dense
from resae_kernels.cpu import native, sums
from resae_kernels.cpu.private_torch import refuse_forward_mode
from resae_kernels.dispatch import (
    LIBRARY,
    PLAIN,
    check_once,
    implementation_for,
    register,
    triton_signature,
)
from resae_kernels.gradients import code_gradients
from resae_kernels.triton import decode as triton_decode
from resae_kernels.types import (
    DecodeAlgorithm,
    Implementation,
    ReconstructionError,
    accumulation_dtype,
)


def sparse_decode(
    acts: Tensor | Sequence[Tensor],  # [..., k] fp32|fp64|bf16|fp16
    indices: Tensor | Sequence[Tensor],  # [..., k] int64
    W_dec: Tensor | Sequence[Tensor],  # [M, D]
    *,
    bias: Tensor | None = None,  # [D]
    prediction: Tensor | None = None,  # [..., D]
    algorithm: DecodeAlgorithm | None = None,
    implementation: Implementation | None = None,
) -> Tensor:
    """`Σ_j acts_j · W_dec[indices_j] (+ bias) (+ prediction)` (formula: `reference.sparse_decode`).

    Args:
        acts: `[..., k]`; or a list, one per dictionary, with the same leading shape.
        indices: `[..., k]` int64, 0 ≤ index < M; or a list.
        W_dec: `[M, D]`, one direction per contiguous row; or a list with the same D.
        bias: `[D]`, added to every token.
        prediction: `[..., D]`, added token by token.
        algorithm: "gather", "dense", or None: dense for a dictionary with M ≤ DENSE_RATIO · k and
            at least DENSE_TOKENS tokens, otherwise gather. Holds for the gradients too.
        implementation: "torch" or "triton", for the gradients too; None: triton on CUDA, otherwise
            torch.

    Returns:
        `[..., D]` in W_dec's dtype.

    Raises:
        TypeError: dtypes that differ or are not floating (int64 for indices).
        ValueError: shapes, devices or list lengths that do not fit.
        RuntimeError: an index outside its dictionary (checked by torch on CPU, nowhere else).

    Note:
        Padding slots (act 0) add nothing to the sum. Gradients reach acts, W_dec, bias and
        prediction. Under autocast the acts are cast to W_dec's dtype.

        The algorithms agree up to rounding where W_dec and the incoming gradient are finite. The
        dense one multiplies inactive latents by 0: an inf or NaN in a row of W_dec makes its
        columns NaN for every token (and one in a token's gradient, those of every row of W_dec's
        gradient), while the gather passes it only to tokens whose code names the row. On CUDA the
        dense one uses torch's GEMM in the dtype of the inputs: fp32 follows the TF32 setting of
        `torch.backends.cuda.matmul`, and in 16 bit, acts of one token that name the same latent
        (`topk_encode` gives no such code) are summed and rounded once more.
    """
    op = "sparse_decode"
    if algorithm in (None, "gather", "dense"):
        out = _decode_past_dispatcher(
            acts, indices, W_dec, bias, prediction, algorithm, implementation
        )
        if out is not None:
            return out
    if algorithm is None and implementation is None:
        out = _decode_at_once(acts, indices, W_dec, bias, prediction)
        if out is not None:
            return out
    if algorithm not in (None, "gather", "dense"):
        raise ValueError(
            f"{op}: algorithm={algorithm!r}, expected 'gather', 'dense' or None (by the number of "
            f"tokens and M/k)"
        )
    offsets = {"bias": bias, "prediction": prediction}
    *codes, leading = check_decode(op, acts, indices, W_dec, offsets)
    out = torch.ops.resae.sparse_decode(
        *codes, **offsets, implementation=implementation or "", algorithm=algorithm or ""
    )
    return out.reshape(*leading, out.shape[-1])


_PASSED: set[Any] = set()


def _decode_past_dispatcher(
    acts: Any,
    indices: Any,
    W_dec: Any,
    bias: Tensor | None,
    prediction: Tensor | None,
    algorithm: str | None,
    implementation: str | None,
) -> Tensor | None:
    """The decode of an eager call by Triton, its arguments checked once per signature; None: this
    call has to go through the dispatcher."""
    if type(acts) in PLAIN:
        acts, indices, W_dec = (acts,), (indices,), (W_dec,)
    elif not all(type(t) in (list, tuple) and t for t in (acts, indices, W_dec)):
        return None
    signature = triton_signature(implementation, *acts, *indices, *W_dec, bias, prediction)
    if signature is None:
        return None
    op, offsets = "sparse_decode", {"bias": bias, "prediction": prediction}
    lengths = len(acts), len(indices), len(W_dec)
    check_once(
        _PASSED, (lengths, signature), lambda: check_decode(op, acts, indices, W_dec, offsets)
    )
    implementation_for(op, W_dec[0], "triton")
    leading, D = acts[0].shape[:-1], W_dec[0].shape[1]
    if len(leading) != 1:
        N = leading.numel()
        acts, indices = ([t.reshape(N, t.shape[-1]) for t in ts] for ts in (acts, indices))
        prediction = None if prediction is None else prediction.reshape(N, D)
    out, _ = reconstruct(acts, indices, W_dec, bias, prediction, None, "triton", algorithm or "")
    return out if len(leading) == 1 else out.view(*leading, D)


def _decode_at_once(
    acts: Any, indices: Any, W_dec: Any, bias: Tensor | None, prediction: Tensor | None
) -> Tensor | None:
    """The decode by one call of the compiled library; None: it does not support these arguments, or
    one of them is wrong (`check_decode` tells which)."""
    if type(acts) is Tensor:
        acts, indices, W_dec = (acts,), (indices,), (W_dec,)
    elif not all(type(t) in (list, tuple) for t in (acts, indices, W_dec)):
        return None
    if len(indices) != len(acts) or len(W_dec) != len(acts):
        return None
    if not native.direct(*acts, *W_dec, bias, prediction):
        return None
    leading, D = acts[0].shape[:-1], W_dec[0].shape[-1:]
    for a, i, W in zip(acts, indices, W_dec, strict=True):
        shape = a.shape
        if (
            type(i) is not Tensor
            or i.dtype is not torch.int64
            or not i.is_cpu
            or i.shape != shape
            or not shape
            or shape[:-1] != leading
            or W.ndim != 2
            or W.shape[1:] != D
        ):
            return None
    N = leading.numel()
    if N >= dense.DENSE_TOKENS and any(
        dense.is_dense("", i.reshape(N, -1), W.shape[0], W.dtype)
        for i, W in zip(indices, W_dec, strict=True)
    ):
        return None
    if (
        bias is not None
        and bias.shape != D
        or prediction is not None
        and prediction.shape != leading + D
    ):
        return None
    return native.decode(acts, indices, W_dec, bias, prediction)


def reconstruction_error(
    acts: Tensor | Sequence[Tensor],  # [..., k] fp32|fp64|bf16|fp16
    indices: Tensor | Sequence[Tensor],  # [..., k] int64
    W_dec: Tensor | Sequence[Tensor],  # [M, D]
    target: Tensor,  # [..., D]
    *,
    bias: Tensor | None = None,  # [D]
    prediction: Tensor | None = None,  # [..., D]
    implementation: Implementation | None = None,
) -> ReconstructionError:
    """Error `sparse_decode(…) − target` and its squares summed over D; the reconstruction itself is
    never written (formula: `reference.reconstruction_error`).

    Args:
        acts, indices, W_dec, bias, prediction, implementation: as in `sparse_decode`, with
            algorithm=None.
        target: `[..., D]`, the activations to reconstruct.

    Returns:
        `ReconstructionError(error, squared)`: `[..., D]` in W_dec's dtype, rounded once, and
        `[...]` in the accumulation dtype (fp32 for 16 bit), of the error before it is rounded.
        `squared.sum()` is the numerator of the FVU.

    Raises:
        TypeError, ValueError, RuntimeError: as `sparse_decode`; target like prediction.

    Note:
        Gradients reach every floating input but no index, through both outputs; that of `squared`
        is taken from the rounded error. Under autocast everything is cast to W_dec's dtype.
    """
    offsets = {"target": target, "bias": bias, "prediction": prediction}
    *codes, leading = check_decode("reconstruction_error", acts, indices, W_dec, offsets)
    error, squared = torch.ops.resae.reconstruction_error(
        *codes, **offsets, implementation=implementation or ""
    )
    return ReconstructionError(error.reshape(target.shape), squared.reshape(leading))


def check_decode(
    op: str,
    acts: Tensor | Sequence[Tensor],
    indices: Tensor | Sequence[Tensor],
    W_dec: Tensor | Sequence[Tensor],
    offsets: dict[str, Tensor | None],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], torch.Size]:
    """Lists of acts and indices `[N, k]` and of W_dec, and the leading shape. Tensors per token
    among the offsets become `[N, D]` in place."""
    refuse_forward_mode(op)
    if isinstance(acts, Tensor) and isinstance(indices, Tensor) and isinstance(W_dec, Tensor):
        acts, indices, W_dec = [acts], [indices], [W_dec]
    elif isinstance(acts, Tensor) or isinstance(indices, Tensor) or isinstance(W_dec, Tensor):
        raise TypeError(
            f"{op}: acts, indices and W_dec must be three tensors, or three lists of tensors"
        )
    if not (len(acts) == len(indices) == len(W_dec) > 0):
        raise ValueError(
            f"{op}: got {len(acts)} acts, {len(indices)} indices, {len(W_dec)} W_dec; expected the "
            f"same number of each, at least one"
        )
    leading, W = acts[0].shape[:-1], W_dec[0]
    if checks.autocasts(W.device.type):
        acts = [a.to(W.dtype) for a in acts]
        offsets.update({n: None if t is None else t.to(W.dtype) for n, t in offsets.items()})
    for i in range(len(acts)):
        at = f"[{i}]" if len(acts) > 1 else ""
        checks.check_codes(op, acts[i], indices[i], at)
        checks.check_shape(
            op, f"acts{at}", acts[i], (*leading, acts[i].shape[-1]), "the tokens of the first acts"
        )
        if W_dec[i].ndim != 2 or W_dec[i].shape[1] != W.shape[-1]:
            raise ValueError(
                f"{op}: W_dec{at} has shape {list(W_dec[i].shape)}, expected [M, {W.shape[-1]}]"
            )
        checks.check_like(op, f"W_dec{at}", W_dec[i], f"acts{at}", acts[i])
    N, D = leading.numel(), W.shape[1]
    for name, tensor in offsets.items():
        if tensor is not None:
            shape = (D,) if name == "bias" else (*leading, D)
            checks.check_shape(op, name, tensor, shape, "tokens of acts, width of W_dec")
            checks.check_like(op, name, tensor, "W_dec", W)
            if name != "bias":
                offsets[name] = tensor.reshape(N, D)
    return (
        [a.reshape(N, a.shape[-1]) for a in acts],
        [i.reshape(N, i.shape[-1]) for i in indices],
        list(W_dec),
        leading,
    )


# -- op ------------------------------------------------------------------------------------------


def decode_rows(
    acts: Sequence[Tensor],
    indices: Sequence[Tensor],
    W_dec: Sequence[Tensor],
    bias: Tensor | None,
    prediction: Tensor | None,
    *,
    implementation: str = "",
    algorithm: str = "",
) -> Tensor:
    """Decode `[N, D]` of codes `[N, k]`: the op itself, without the dispatcher."""
    chosen = implementation_for("sparse_decode", W_dec[0], implementation or None)
    return reconstruct(acts, indices, W_dec, bias, prediction, None, chosen, algorithm)[0]


def _error(
    acts: list[Tensor],
    indices: list[Tensor],
    W_dec: list[Tensor],
    target: Tensor,
    bias: Tensor | None,
    prediction: Tensor | None,
    *,
    implementation: str = "",
) -> tuple[Tensor, Tensor]:
    codes = acts, indices, W_dec
    chosen = implementation_for("reconstruction_error", W_dec[0], implementation or None)
    error, squared = reconstruct(*codes, bias, prediction, target, chosen, "")
    assert squared is not None
    return error, squared


def reconstruct(
    acts: Sequence[Tensor],
    indices: Sequence[Tensor],
    W_dec: Sequence[Tensor],
    bias: Tensor | None,
    prediction: Tensor | None,
    target: Tensor | None,
    chosen: str,
    algorithm: str = "",
) -> tuple[Tensor, Tensor | None]:
    """The decode; or, given a target, its error and the squares of that summed over D. `chosen` is
    what `implementation_for` returned."""
    dtype = W_dec[0].dtype
    few = not algorithm and acts[0].shape[0] < dense.DENSE_TOKENS  # by the rule never dense
    if chosen == "triton" and (
        few
        or not any(
            dense.is_dense(algorithm, i, W.shape[0], dtype)
            for i, W in zip(indices, W_dec, strict=True)
        )
    ):
        return triton_decode.launch_decode(acts, indices, W_dec, bias, prediction, None, target)
    acc_dtype = accumulation_dtype(dtype)
    codes = list(zip(acts, indices, W_dec, strict=True))
    is_dense = [dense.is_dense(algorithm, i, W.shape[0], dtype) for _, i, W in codes]
    compiled = chosen == "torch" and target is None and not any(is_dense)
    if compiled and native.takes(*acts, *W_dec, bias, prediction):
        return native.decode(acts, indices, W_dec, bias, prediction), None
    gathered: list[tuple[Tensor, Tensor, Tensor]] = []
    total = prediction
    for code, scattered in zip(codes, is_dense, strict=True):
        if scattered:
            total = dense.dense_sum(*code, total, chosen)
        else:
            gathered.append(code)
    if gathered and chosen == "triton":
        a, i, W = (list(tensors) for tensors in zip(*gathered, strict=True))
        return triton_decode.launch_decode(a, i, W, bias, total, None, target)
    if len(gathered) == 1 and bias is None and total is None and target is None:
        return sums.gather_sum(*gathered[0], dtype), None  # a single sum is rounded once by itself
    # Several terms are added up in the accumulation dtype.
    if gathered:
        rest, total = total, sums.gather_sum(*gathered[0], acc_dtype)
        for code in gathered[1:]:
            total += sums.gather_sum(*code, acc_dtype)
        total = total if rest is None else total.add_(rest)
    assert total is not None
    if bias is not None:
        total += bias
    if target is None:
        return total.to(dtype), None
    total -= target
    return total.to(dtype), total.square().sum(-1)


def _decode_fake(
    acts: list[Tensor], _indices: object, W_dec: list[Tensor], *_: object, **_options: object
) -> Tensor:
    return acts[0].new_empty(acts[0].shape[0], W_dec[0].shape[1])


def _error_fake(
    _acts: object,
    _indices: object,
    _W_dec: object,
    target: Tensor,
    *_: object,
    **_options: object,
) -> tuple[Tensor, Tensor]:
    acc_dtype = accumulation_dtype(target.dtype)
    return target.new_empty(target.shape), target.new_empty(target.shape[0], dtype=acc_dtype)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    del output
    acts, indices, W_dec, _, _ = inputs
    ctx.options = dict(keyword_only_inputs)
    ctx.set_materialize_grads(False)
    # dW_dec needs acts, d acts need W_dec, both the indices: no activation is kept.
    ctx.save_for_backward(*acts, *indices, *W_dec)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    n = len(ctx.saved_tensors) // 3
    acts, indices, W_dec = (ctx.saved_tensors[i * n : (i + 1) * n] for i in range(3))
    if grad is None:
        return [None] * n, [None] * n, [None] * n, None, None
    grad = grad.contiguous()
    grad_acts, grad_W = code_gradients(
        acts, indices, W_dec, [grad] * n, _needed(ctx, n), **ctx.options
    )
    _, _, _, need_bias, need_prediction = ctx.needs_input_grad
    return (
        grad_acts,
        [None] * n,
        grad_W,
        grad.sum(0) if need_bias else None,
        grad if need_prediction else None,
    )


def _error_setup(
    ctx: Any,
    inputs: tuple[Any, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, Tensor],
) -> None:
    acts, indices, W_dec, *_ = inputs
    ctx.options = dict(keyword_only_inputs)
    ctx.set_materialize_grads(False)
    # The error gives the gradient of its squares; the rest as in the decode.
    ctx.save_for_backward(*acts, *indices, *W_dec, output[0])


def _error_backward(
    ctx: Any, grad_error: Tensor | None, grad_squared: Tensor | None
) -> tuple[Any, ...]:
    *codes, error = ctx.saved_tensors
    n = len(codes) // 3
    acts, indices, W_dec = (codes[i * n : (i + 1) * n] for i in range(3))
    grad = error_gradient(error, grad_error, grad_squared)
    if grad is None:
        return [None] * n, [None] * n, [None] * n, None, None, None
    grad_acts, grad_W = code_gradients(
        acts, indices, W_dec, [grad] * n, _needed(ctx, n), **ctx.options
    )
    need_target, need_bias, need_prediction = ctx.needs_input_grad[3:]
    return (
        grad_acts,
        [None] * n,
        grad_W,
        -grad if need_target else None,
        grad.sum(0) if need_bias else None,
        grad if need_prediction else None,
    )


def error_gradient(
    error: Tensor | None, grad_out: Tensor | None, grad_squared: Tensor | None
) -> Tensor | None:
    """Gradient of a decode, contiguous, from those of it and of the squares of its error."""
    grad = grad_out
    if error is not None and grad_squared is not None:
        grad = (2 * grad_squared).unsqueeze(1) * error
        grad = (grad if grad_out is None else grad + grad_out).to(error.dtype)
    return None if grad is None else grad.contiguous()


def _needed(ctx: Any, n: int) -> list[tuple[bool, bool]]:
    """Per dictionary, whether acts and whether W_dec need a gradient."""
    need_acts, _, need_W = ctx.needs_input_grad[:3]

    def flag(need: Any, i: int) -> bool:
        return bool(need[i]) if isinstance(need, (list, tuple)) else bool(need)

    return [(flag(need_acts, i), flag(need_W, i)) for i in range(n)]


register(
    "sparse_decode(Tensor[] acts, Tensor[] indices, Tensor[] W_dec, Tensor? bias, "
    "Tensor? prediction, *, str implementation='', str algorithm='') -> Tensor",
    decode_rows,
    _decode_fake,
)
register(
    "reconstruction_error(Tensor[] acts, Tensor[] indices, Tensor[] W_dec, Tensor target, "
    "Tensor? bias, Tensor? prediction, *, str implementation='') -> (Tensor error, Tensor squared)",
    _error,
    _error_fake,
)
for _op, _its_backward, _its_setup in (
    ("sparse_decode", _backward, _setup_context),
    ("reconstruction_error", _error_backward, _error_setup),
):
    torch.library.register_autograd(
        f"resae::{_op}", _its_backward, setup_context=_its_setup, lib=LIBRARY
    )
