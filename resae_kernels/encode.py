"""TopK encode: z[n] = the k largest of relu((x[n] − prediction[n] − pre_bias) weightᵀ + bias).

N tokens, D width, M latents, k active. 2·N·D·M FLOPs; the scores `[N, M]` exist for one chunk of
rows at a time, so that they stay in cache between the GEMM and the selection. Selection is
exact: ties go to the lower index, whatever the chunking (`cpu/encode.py`, `triton/encode.py`).

Backward is sparse. With g the gradient of the acts where they are positive, dx is a sparse decode
of g through `weight`, and dweight sums g · residual per latent (`scatter_outer`, over codes sorted
by latent: deterministic, no `[N, M]`). Gao et al. 2024 (arXiv 2406.04093), section 2.2.
"""

from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from resae_kernels import checks, memory
from resae_kernels.cpu import native
from resae_kernels.cpu.encode import encode_in_chunks
from resae_kernels.cpu.private_torch import refuse_forward_mode
from resae_kernels.cpu.selection import select
from resae_kernels.dispatch import (
    LIBRARY,
    check_once,
    implementation_for,
    register,
    triton_signature,
)
from resae_kernels.gradients import encoder_gradients, scatter_outer, scatter_sum
from resae_kernels.precision import residual
from resae_kernels.triton import encode as triton_encode
from resae_kernels.types import Implementation, SparseCode, accumulation_dtype

T = TypeVar("T")


def topk_encode(
    x: Tensor,  # [..., D] fp32|fp64|bf16|fp16
    weight: Tensor,  # [M, D]
    bias: Tensor | None,  # [M]
    k: int,
    *,
    pre_bias: Tensor | None = None,  # [D]
    prediction: Tensor | None = None,  # [..., D]
    sorted: bool = True,
    workspace_bytes: int | None = None,
    check_nan: bool = False,
    implementation: Implementation | None = None,
) -> SparseCode:
    """The k largest positive pre-activations of each token (formula: `reference.topk_encode`).

    Args:
        x: `[..., D]`, the activations to encode.
        weight: `[M, D]`, one latent per contiguous row; x's dtype and device, as every other input.
        bias: `[M]` or None.
        k: active latents per token, 1 ≤ k ≤ M.
        pre_bias: `[D]`, subtracted from every token (an autoencoder's `b_dec`).
        prediction: `[..., D]`, subtracted token by token: the code is that of the residual
            x − prediction − pre_bias.
        sorted: True orders a code by value, descending, then index; False by index, ascending.
        workspace_bytes: bound on the scores held at once (one row at least); default 32 MiB on
            CPU, 512 MiB on CUDA. Selection on a CPU may hold them a second time.
        check_nan: raise if a score is NaN instead of sorting it first.
        implementation: "torch", "triton" or None, by device (CUDA: triton). Same contract.

    Returns:
        `SparseCode(acts, indices)`: `[..., k]` in x's dtype, and int64. Slots beyond the positive
        pre-activations hold act 0, index 0 and come last.

    Raises:
        TypeError: dtypes that differ or are not floating.
        ValueError: shapes or devices that do not fit, k out of range, NaN in checked mode.

    Note:
        16-bit inputs: residual rounded to x's dtype, GEMM in fp32, scores rounded to x's dtype
        and selected in it; ties go to the lower index. Gradients reach x, weight, bias, pre_bias
        and prediction through the acts, where they are positive; indices have none. Under autocast
        the inputs are cast as for `F.linear`.

        "triton" beyond 16 tokens uses torch's GEMM, unless `resae tune` found the package's own
        faster. Torch's works in x's dtype: fp32 accumulation with the bias added before the one
        rounding, unless the library splits the sum over D and adds the parts in 16 bit, or takes
        TF32 for fp32; both are settings of `torch.backends.cuda.matmul`. The selection kernel
        supports fp32, bf16 and fp16 with k ≤ 1024, M ≤ 2¹⁹ and next_power_of_2(k) · M ≤ 2²⁶; other
        scores are selected as in "torch".
    """
    if workspace_bytes is None and implementation is None and not check_nan:
        code = _encode_at_once(x, weight, bias, k, pre_bias, prediction, sorted)
        if code is not None:
            return code
    if workspace_bytes is None and not check_nan:
        signature = triton_signature(implementation, x, weight, bias, pre_bias, prediction)
        if signature is not None:
            return _encode_past_dispatcher(
                x, weight, bias, k, pre_bias, prediction, sorted, signature
            )
    x, weight, bias, pre_bias, prediction = checks.under_autocast(
        x, weight, bias, pre_bias, prediction
    )  # type: ignore[assignment]
    check_arguments(x, weight, bias, k, pre_bias, prediction, workspace_bytes)
    D = weight.shape[1]
    if workspace_bytes is None:
        workspace_bytes = memory.workspace_bytes(x)
    acts, indices = torch.ops.resae.topk_encode(
        x.reshape(-1, D),
        weight,
        bias,
        k,
        pre_bias,
        None if prediction is None else prediction.reshape(-1, D),
        sorted,
        workspace_bytes,
        implementation_for("topk_encode", x, implementation),
    )
    if check_nan and bool(acts.isnan().any()):
        token = int(acts.isnan().any(-1).nonzero()[0])
        raise ValueError(
            f"topk_encode: NaN in the pre-activations of token {token} (of {acts.shape[0]}); "
            f"look for NaN or inf in x, weight, bias, pre_bias and prediction"
        )
    code_shape = (*x.shape[:-1], k)
    return SparseCode(acts.reshape(code_shape), indices.reshape(code_shape))


_PASSED: set[Any] = set()


def _encode_past_dispatcher(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    pre_bias: Tensor | None,
    prediction: Tensor | None,
    sorted: bool,
    signature: tuple[Any, ...],
) -> SparseCode:
    """The code of an eager call by Triton, its arguments checked once per signature."""
    arguments = x, weight, bias, k, pre_bias, prediction
    check_once(_PASSED, (signature, k), lambda: check_arguments(*arguments, None))
    implementation_for("topk_encode", x, "triton")
    leading, D = x.shape[:-1], weight.shape[1]
    if len(leading) != 1:
        x = x.reshape(-1, D)
        prediction = None if prediction is None else prediction.reshape(-1, D)
    held = memory.workspace_bytes(x)
    acts, indices = encode_rows(x, weight, bias, k, pre_bias, prediction, sorted, held, "triton")
    if len(leading) != 1:
        acts, indices = acts.view(*leading, k), indices.view(*leading, k)
    return SparseCode(acts, indices)


def fits(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    pre_bias: Tensor | None,
    prediction: Tensor | None,
) -> bool:
    """True if `check_arguments` would accept these shapes and this k."""
    if weight.ndim != 2 or x.ndim == 0:
        return False
    (M, D), shape = weight.shape, x.shape
    return (
        shape[-1] == D
        and 1 <= k <= M
        and (bias is None or bias.shape == (M,))
        and (pre_bias is None or pre_bias.shape == (D,))
        and (prediction is None or prediction.shape == shape)
    )


def _encode_at_once(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    pre_bias: Tensor | None,
    prediction: Tensor | None,
    sorted: bool,
) -> SparseCode | None:
    """The code of few tokens by one call of the compiled library; None: it does not support these
    arguments, or one of them is wrong (`check_arguments` tells which)."""
    if not native.direct(x, weight, bias, pre_bias, prediction) or not fits(
        x, weight, bias, k, pre_bias, prediction
    ):
        return None
    leading, D = x.shape[:-1], x.shape[-1]
    N = leading.numel()
    if native.EXACT_ROWS[x.dtype] < N:
        return None
    if len(leading) == 1:
        return SparseCode(*native.exact_encode(x, weight, bias, k, pre_bias, prediction, sorted))
    prediction = None if prediction is None else prediction.reshape(N, D)
    acts, indices = native.exact_encode(
        x.reshape(N, D), weight, bias, k, pre_bias, prediction, sorted
    )
    return SparseCode(acts.view(*leading, k), indices.view(*leading, k))


def check_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    pre_bias: Tensor | None,
    prediction: Tensor | None,
    workspace_bytes: int | None,
    op: str = "topk_encode",
    limit: str = "k",
) -> None:
    """Raise TypeError or ValueError, in the name of `op`; `limit` is what it calls k."""
    refuse_forward_mode(op)
    checks.check_floating(op, "x", x)
    if weight.ndim != 2:
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}, expected [M, D]")
    M, D = weight.shape
    if x.ndim == 0 or x.shape[-1] != D:
        raise ValueError(
            f"{op}: x has shape {list(x.shape)}, expected [..., {D}] (weight is [{M}, {D}], one "
            f"latent per row; pass weight.T if yours is [D, M])"
        )
    checks.check_like(op, "weight", weight, "x", x)
    for name, tensor, shape, why in (
        ("bias", bias, (M,), "one entry per latent"),
        ("pre_bias", pre_bias, (D,), "one entry per dimension"),
        ("prediction", prediction, tuple(x.shape), "the shape of x"),
    ):
        if tensor is not None:
            checks.check_shape(op, name, tensor, shape, why)
            checks.check_like(op, name, tensor, "x", x)
    if k < 1:
        raise ValueError(f"{op}: {limit}={k}, expected at least 1")
    if k > M:
        raise ValueError(
            f"{op}: {limit}={k} exceeds the number of latents M={M} (weight is [{M}, {D}]); lower "
            f"{limit}"
        )
    if workspace_bytes is not None and workspace_bytes < 1:
        raise ValueError(f"{op}: workspace_bytes={workspace_bytes}, expected at least 1")


# -- op ------------------------------------------------------------------------------------------


def encode_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    pre_bias: Tensor | None,
    prediction: Tensor | None,
    sorted: bool,
    workspace_bytes: int,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Acts and indices `[N, k]` of `x [N, D]`: the op itself, without the dispatcher."""
    if implementation == "triton":
        acts, indices = triton_encode.launch_encode(
            x, weight, bias, k, pre_bias, prediction, sorted, workspace_bytes, select
        )
        return acts, indices
    return encode_in_chunks(x, weight, bias, k, pre_bias, prediction, sorted, workspace_bytes)


def _encode_fake(
    x: Tensor, _weight: object, _bias: object, k: int, *_: object
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int64)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the tensors that `backward` needs; they do not depend on how the code was found."""
    x, weight, bias, _, pre_bias, prediction, _, _, ctx.implementation = inputs
    acts, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)
    # acts gate the gradient; x, pre_bias and prediction rebuild the residual that dweight needs.
    ctx.save_for_backward(x, weight, pre_bias, prediction, acts, indices)
    ctx.has_bias = bias is not None


BLOCK = 128
"""Latents of one partial sum of the gradient of `pre_bias`."""


def _combined(total: Tensor, weight: Tensor) -> Tensor:
    """`total @ weight`, `[D]`: total `[M]` in the accumulation dtype, weight not copied to it."""
    if total.dtype == weight.dtype:
        # Sums of BLOCK terms, then the sum of those: one running sum over M terms loses digits.
        M = weight.shape[0] // BLOCK * BLOCK
        blocks = total[:M].view(-1, 1, BLOCK), weight[:M].unflatten(0, (-1, BLOCK))
        return torch.bmm(*blocks).sum((0, 1)) + total[M:] @ weight[M:]
    # The rounding error of the 16-bit total is a second row of the GEMM.
    coarse = total.to(weight.dtype)
    fine = (total - coarse).to(weight.dtype)
    return (torch.stack([coarse, fine]) @ weight).to(total.dtype).sum(0).to(weight.dtype)


def backward(ctx: Any, grad_acts: Tensor | None, grad_indices: object) -> tuple[Any, ...]:
    """Gradients of the inputs of `encode_rows`, in their order."""
    del grad_indices  # integers carry no gradient
    if grad_acts is None:
        return (None,) * 9
    x, weight, pre_bias, prediction, acts, indices = ctx.saved_tensors
    of_x, of_weight, of_bias, _, of_pre_bias, of_prediction, *_ = ctx.needs_input_grad
    needed = EncodeInputs(of_x, of_weight, of_bias and ctx.has_bias, of_pre_bias, of_prediction)
    gate, M = torch.where(acts > 0, grad_acts, 0.0), weight.shape[0]
    grad_weight = total = None
    if needed.weight:
        rest = residual_of(x, pre_bias, prediction, ctx.implementation)
        if needed.bias or needed.pre_bias:
            grad_weight, total = encoder_gradients(gate, indices, rest, M, ctx.implementation)
        else:
            grad_weight = scatter_outer(gate, indices, rest, M, ctx.implementation)
    grads = input_gradients(gate, indices, weight, grad_weight, total, needed, ctx.implementation)
    return *grads[:3], None, *grads[3:], None, None, None


class EncodeInputs(NamedTuple, Generic[T]):
    """A value for each input of an encode that may have a gradient."""

    x: T
    weight: T
    bias: T
    pre_bias: T
    prediction: T


def input_gradients(
    gate: Tensor,
    indices: Tensor,
    weight: Tensor,
    grad_weight: Tensor | None,
    total: Tensor | None,
    needed: EncodeInputs[bool],
    implementation: str,
) -> EncodeInputs[Tensor | None]:
    """Gradients of the inputs of an encode.

    Args:
        gate: `[N, k]`, gradient of the acts, 0 where they are not positive.
        grad_weight, total: `encoder_gradients` of the gate; None: not needed, or (total) to be
            summed here.
    """
    grad_x = grad_bias = grad_pre_bias = None
    if needed.x or needed.prediction:
        grad_x = torch.ops.resae.sparse_decode(
            [gate], [indices], [weight], None, None, implementation=implementation
        )
    if needed.bias or needed.pre_bias:
        if total is None:
            acc_dtype = accumulation_dtype(weight.dtype)
            total = scatter_sum(gate.to(acc_dtype), indices, weight.shape[0], implementation)
        grad_bias = total.to(weight.dtype) if needed.bias else None
        # One GEMV with the sum over all tokens, where a decode would gather rows for each.
        grad_pre_bias = -_combined(total, weight) if needed.pre_bias else None
    return EncodeInputs(
        grad_x if needed.x else None,
        grad_weight,
        grad_bias,
        grad_pre_bias,
        -grad_x if needed.prediction and grad_x is not None else None,
    )


def residual_of(
    x: Tensor, pre_bias: Tensor | None, prediction: Tensor | None, implementation: str
) -> Tensor:
    """`x − prediction − pre_bias`, rounded once, for a backward."""
    if implementation == "triton":
        return torch.ops.resae.residual(x, pre_bias, prediction)
    return residual(x, pre_bias, prediction)


def _residual_rows(x: Tensor, pre_bias: Tensor | None, prediction: Tensor | None) -> Tensor:
    """`precision.residual` of `[N, D]` in one launch, for the dtypes that its kernel takes."""
    if x.dtype not in triton_encode.KEYS or x.numel() == 0:
        return residual(x, pre_bias, prediction)
    x = x if x.stride(1) == 1 else x.contiguous()
    prediction = (
        prediction if prediction is None or prediction.stride(1) == 1 else prediction.contiguous()
    )
    pre_bias = None if pre_bias is None else pre_bias.contiguous()
    with torch.cuda.device_of(x):
        return triton_encode.launch_residual(x, pre_bias, prediction)


def _residual_fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _residual_setup(ctx: Any, inputs: object, output: object) -> None:
    del inputs, output
    ctx.set_materialize_grads(False)


def _residual_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """For gradients of gradients."""
    if grad is None:
        return None, None, None
    _, need_pre_bias, need_prediction = ctx.needs_input_grad
    return grad, -grad.sum(0) if need_pre_bias else None, -grad if need_prediction else None


register(
    "residual(Tensor x, Tensor? pre_bias, Tensor? prediction) -> Tensor",
    _residual_rows,
    _residual_fake,
)
torch.library.register_autograd(
    "resae::residual", _residual_backward, setup_context=_residual_setup, lib=LIBRARY
)
register(
    "topk_encode(Tensor x, Tensor weight, Tensor? bias, SymInt k, Tensor? pre_bias, "
    "Tensor? prediction, bool sorted, int workspace_bytes, str implementation) "
    "-> (Tensor acts, Tensor indices)",
    encode_rows,
    _encode_fake,
)
torch.library.register_autograd(
    "resae::topk_encode", backward, setup_context=setup_context, lib=LIBRARY
)
