"""Code and reconstruction of an autoencoder, with one backward for both:

    z = TopK_k(relu((x − prediction − b_dec) weightᵀ + bias)),    x̂ = z W_dec + b_dec + prediction

N tokens, k active latents, D width, M latents. The forward pass is that of `topk_encode` (or of a
`ScreenedEncoder`) and of `sparse_decode`. Their backward passes each sort the code by latent, one
for the gradient of W_dec, one for those of the encoder. Here the two are one op, which sorts once
(`gradients.autoencoder_gradients`).

It takes the code as an input without gradient, and hands it on with one: how it was found does not
matter to the backward. So x̂ does not depend on the acts that are returned, as autograd sees it.
"""

from typing import Any

import torch
from torch import Tensor

from resae_kernels import checks
from resae_kernels.decode import (
    check_decode,
    error_gradient,
    reconstruct,
    reconstruction_error,
    sparse_decode,
)
from resae_kernels.dispatch import LIBRARY, implementation_for, register
from resae_kernels.encode import EncodeInputs, input_gradients, residual_of, topk_encode
from resae_kernels.gradients import autoencoder_gradients, encoder_gradients, scatter_outer
from resae_kernels.screened import ScreenedEncoder, require_own
from resae_kernels.types import (
    Autoencoding,
    Implementation,
    ReconstructionError,
    SparseCode,
    accumulation_dtype,
)


def autoencode(
    x: Tensor,  # [..., D] fp32|fp64|bf16|fp16
    weight: Tensor,  # [M, D]
    bias: Tensor | None,  # [M]
    k: int,
    W_dec: Tensor,  # [M, D]
    *,
    b_dec: Tensor | None = None,  # [D]
    prediction: Tensor | None = None,  # [..., D]
    sorted: bool = True,
    encoder: ScreenedEncoder | None = None,
    implementation: Implementation | None = None,
) -> Autoencoding:
    """Code and reconstruction of an autoencoder (formula: `reference.online_step`): the results of
    `topk_encode` and `sparse_decode`, and their gradients from one sort of the code.

    Args:
        x: `[..., D]`, the activations.
        weight, bias: `[M, D]` and `[M]` or None, the encoder.
        k: active latents per token, 1 ≤ k ≤ M.
        W_dec: `[M, D]`, the dictionary.
        b_dec: `[D]`, subtracted before encoding and added to x̂.
        prediction: `[..., D]`, subtracted before encoding and added to x̂.
        sorted: order of the code, as in `topk_encode`.
        encoder: encoder of this weight and bias in place of `topk_encode`; not used under autocast.
        implementation: "torch", "triton" or None, by device (CUDA: triton). Same contract.

    Returns:
        `Autoencoding(x_hat, code)`: `[..., D]` in W_dec's dtype, and acts and indices `[..., k]`.

    Raises:
        TypeError, ValueError: as `topk_encode` and `sparse_decode`; an encoder of another weight.

    Note:
        Gradients reach every floating input, through x̂ and through the acts. Each is bit for bit
        that of the two ops, but where an act has a gradient of exactly 0, or is NaN. For the
        gradient of x̂ with respect to the acts themselves, use the two ops.
    """
    out, _, code = _autoencode(
        "autoencode",
        *(x, weight, bias, k, W_dec, b_dec, prediction, None),
        *(sorted, encoder, implementation),
    )
    return Autoencoding(out, code)


def autoencoder_error(
    x: Tensor,  # [..., D] fp32|fp64|bf16|fp16
    weight: Tensor,  # [M, D]
    bias: Tensor | None,  # [M]
    k: int,
    W_dec: Tensor,  # [M, D]
    *,
    b_dec: Tensor | None = None,  # [D]
    prediction: Tensor | None = None,  # [..., D]
    target: Tensor | None = None,  # [..., D]
    sorted: bool = True,
    encoder: ScreenedEncoder | None = None,
    implementation: Implementation | None = None,
) -> tuple[ReconstructionError, SparseCode]:
    """Error of an autoencoder and its code, for training: `autoencode` with `reconstruction_error`
    in place of the decode; the reconstruction is never written.

    Args:
        target: `[..., D]`, the activations to reconstruct; None: x.
        x, weight, bias, k, W_dec, b_dec, prediction, sorted, encoder, implementation: as in
            `autoencode`.

    Returns:
        `ReconstructionError(error, squared)` and the code.

    Raises:
        TypeError, ValueError: as `autoencode`; target like prediction.
    """
    error, squared, code = _autoencode(
        "autoencoder_error",
        *(x, weight, bias, k, W_dec, b_dec, prediction, x if target is None else target),
        *(sorted, encoder, implementation),
    )
    assert squared is not None
    return ReconstructionError(error, squared), code


def _autoencode(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    W_dec: Tensor,
    b_dec: Tensor | None,
    prediction: Tensor | None,
    target: Tensor | None,
    sorted: bool,
    encoder: ScreenedEncoder | None,
    implementation: Implementation | None,
) -> tuple[Tensor, Tensor | None, SparseCode]:
    """x̂, or its error and squares with a target; and the code."""
    if encoder is not None:
        require_own(op, encoder, weight, bias)
    pre_bias, encode_prediction = b_dec, prediction
    if checks.autocasts(x.device.type):
        encoder = None
        x, weight, bias, pre_bias, encode_prediction = checks.under_autocast(
            x, weight, bias, pre_bias, encode_prediction
        )  # type: ignore[assignment]
    joint = torch.is_grad_enabled() and weight.requires_grad and W_dec.requires_grad
    if encoder is not None:  # it knows by the gradients that the weight is being trained
        code = encoder.encode(x, k, pre_bias=b_dec, prediction=prediction, sorted=sorted)
    else:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not joint):
            code = topk_encode(
                x,
                weight,
                bias,
                k,
                pre_bias=pre_bias,
                prediction=encode_prediction,
                sorted=sorted,
                implementation=implementation,
            )
    offsets = {"target": target, "bias": b_dec, "prediction": prediction}
    if not joint:
        if target is None:
            del offsets["target"]
            out = sparse_decode(*code, W_dec, **offsets, implementation=implementation)  # type: ignore[arg-type]
            return out, None, code
        error = reconstruction_error(*code, W_dec, **offsets, implementation=implementation)  # type: ignore[arg-type]
        return error.error, error.squared, code
    _, (indices,), _, leading = check_decode(op, *code, W_dec, offsets)
    acts, rows = code.acts.detach().reshape(indices.shape), (leading.numel(), W_dec.shape[1])
    acts, out, squared = torch.ops.resae.autoencoder(
        acts,
        indices,
        x.reshape(rows),
        weight,
        bias,
        pre_bias,
        None if encode_prediction is None else encode_prediction.reshape(rows),
        W_dec,
        *(offsets[name] for name in ("bias", "prediction", "target")),
        implementation=implementation_for(op, x, implementation),
    )
    code = SparseCode(acts.reshape(*leading, k), code.indices)
    squared = None if target is None else squared.reshape(leading)
    return out.reshape(*leading, rows[1]), squared, code


# -- op ------------------------------------------------------------------------------------------


def _autoencoder(
    acts: Tensor,
    indices: Tensor,
    _x: object,
    _weight: object,
    _bias: object,
    _pre_bias: object,
    _encode_prediction: object,
    W_dec: Tensor,
    b_dec: Tensor | None,
    prediction: Tensor | None,
    target: Tensor | None,
    *,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    code = [acts.to(W_dec.dtype)], [indices], [W_dec]
    out, squared = reconstruct(*code, b_dec, prediction, target, implementation)
    if squared is None:
        squared = out.new_empty(0, dtype=accumulation_dtype(out.dtype))
    return acts.clone(), out, squared


def _autoencoder_fake(
    acts: Tensor, _indices: object, x: Tensor, *inputs: Any, **_options: object
) -> tuple[Tensor, Tensor, Tensor]:
    W_dec, target = inputs[4], inputs[7]
    out = W_dec.new_empty(x.shape)
    rows = 0 if target is None else x.shape[0]
    return acts.new_empty(acts.shape), out, out.new_empty(rows, dtype=accumulation_dtype(out.dtype))


def _setup_context(
    ctx: Any,
    inputs: tuple[Any, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, Tensor, Tensor],
) -> None:
    _, indices, x, weight, bias, pre_bias, encode_prediction, W_dec, *_, target = inputs
    acts, out, _ = output  # the acts that have a gradient, for gradients of gradients
    ctx.implementation = keyword_only_inputs["implementation"]
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)
    error = None if target is None else out
    # The error gives the gradient of its squares; the rest as in the encode and the decode.
    ctx.save_for_backward(acts, indices, x, weight, pre_bias, encode_prediction, W_dec, error)


def _backward(
    ctx: Any, grad_acts: Tensor | None, grad_out: Tensor | None, grad_squared: Tensor | None
) -> tuple[Any, ...]:
    acts, indices, x, weight, pre_bias, prediction, W_dec, error = ctx.saved_tensors
    _, _, of_x, of_weight, of_bias, *of_offsets, of_W_dec, of_b_dec, of_added, of_target = (
        ctx.needs_input_grad
    )
    needed = EncodeInputs(of_x, of_weight, of_bias and ctx.has_bias, *of_offsets)
    named = {"implementation": ctx.implementation}
    grad = error_gradient(error, grad_out, grad_squared)
    if grad is not None:
        through = torch.ops.resae.sddmm(grad, indices, W_dec, **named).to(acts.dtype)
        grad_acts = through if grad_acts is None else grad_acts + through
    if grad_acts is None:
        return (None,) * 11
    gate, M = torch.where(acts > 0, grad_acts, 0.0), weight.shape[0]
    wide_acts = acts.to(W_dec.dtype)
    grad_W = grad_weight = total = None
    if of_weight:
        rest = residual_of(x, pre_bias, prediction, ctx.implementation)
        if of_W_dec and grad is not None:
            grad_W, grad_weight, total = autoencoder_gradients(
                wide_acts, indices, grad, gate, rest, M, ctx.implementation
            )
        else:
            grad_weight, total = encoder_gradients(gate, indices, rest, M, ctx.implementation)
    elif of_W_dec and grad is not None:
        grad_W = scatter_outer(wide_acts, indices, grad, M, ctx.implementation)
    grads = input_gradients(gate, indices, weight, grad_weight, total, needed, ctx.implementation)
    grad_b_dec = grad.sum(0) if of_b_dec and grad is not None else None
    grad_target = -grad if of_target and grad is not None else None
    return (
        *(None, None, *grads, grad_W, grad_b_dec),
        *(grad if of_added else None, grad_target),
    )


register(
    "autoencoder(Tensor acts, Tensor indices, Tensor x, Tensor weight, Tensor? bias, "
    "Tensor? pre_bias, Tensor? encode_prediction, Tensor W_dec, Tensor? b_dec, "
    "Tensor? prediction, Tensor? target, *, str implementation) "
    "-> (Tensor code_acts, Tensor out, Tensor squared)",
    _autoencoder,
    _autoencoder_fake,
)
torch.library.register_autograd(
    "resae::autoencoder", _backward, setup_context=_setup_context, lib=LIBRARY
)
