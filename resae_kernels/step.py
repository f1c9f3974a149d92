"""Online step of one layer: z = TopK_k(relu((x − p) weightᵀ + bias)), x̂ = p + z W_dec.

p is the prediction from the codes of the layers before, plus b_dec: the reconstruction if none of
this layer's latents is active. N ≤ 16 tokens (generation), D width, M latents, k active; bound by
reading `weight`, M·D elements.

In Triton at most four launches (`triton/step.py`). On a CPU a `ScreenedEncoder` encodes; where it
screens by the compiled library, code and x̂ are one call.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from resae_kernels import checks, memory
from resae_kernels.cpu.private_torch import is_eager, refuse_forward_mode
from resae_kernels.decode import sparse_decode
from resae_kernels.dispatch import check_once, implementation_for, register, triton_signature
from resae_kernels.screened import ScreenedEncoder, layout_of, require_own
from resae_kernels.triton import step as triton_step
from resae_kernels.triton.encode_few import FEW_TOKENS
from resae_kernels.triton.step import StepWorkspace, workspace_layout
from resae_kernels.types import Implementation, OnlineStep, SparseCode, Transported


def online_step(
    x: Tensor,  # [..., D] fp32|fp64|bf16|fp16, at most 16 tokens
    weight: Tensor,  # [M, D]
    bias: Tensor | None,  # [M]
    k: int,
    W_dec: Tensor,  # [M, D]
    *,
    b_dec: Tensor | None = None,  # [D]
    prediction: Tensor | None = None,  # [..., D]
    codes: Sequence[SparseCode | tuple[Tensor, Tensor]] = (),  # m × ([..., k_j], [..., k_j])
    transported: Transported | None = None,
    encoder: ScreenedEncoder | None = None,
    out: StepWorkspace | None = None,
    implementation: Implementation | None = None,
) -> OnlineStep:
    """Code and reconstruction of one layer while the model runs (formula:
    `reference.online_step`).

    The prediction from the layers before is passed as `prediction`, or computed from their codes:
    with `transported` the step is that of layer m = len(codes), closed loop.

    Args:
        x: `[..., D]`, the activations of at most 16 tokens.
        weight, bias: `[M, D]` and `[M]` or None, the encoder.
        k: active latents per token, 1 ≤ k ≤ M.
        W_dec: `[M, D]`, the decoder.
        b_dec: `[D]`, subtracted before encoding and added to x̂. Not with `transported`.
        prediction: `[..., D]`, the prediction of x from earlier layers, without b_dec. Not with
            `transported`.
        codes: codes of the m layers before, in order; only with `transported`.
        transported: result of `transport()`. Its `constants[m]` contain the prediction's constant
            and this layer's b_dec, so neither is passed again.
        encoder: the encoder of this weight and bias that a CPU uses. None: one is made at the first
            step (a quarter more memory than the weight) and kept as long as the weight. On a GPU
            only one that was made with implementation="triton" is used, in eager calls: it encodes
            in place of the fused step, in six launches or seven, and two decodes follow at most.
        out: result of `StepWorkspace.allocate`: memory for everything that the step writes, so that
            nothing is allocated (contiguous inputs). The result is views of it, valid until the
            next step with the same `out`.
        implementation: "torch", "triton" or None, by device (CUDA: triton). Same contract.

    Returns:
        `OnlineStep(x_hat, code)`: `[..., D]`, and acts and indices `[..., k]` in order of index,
        padding last, as `topk_encode(..., sorted=False)`.

    Raises:
        TypeError: dtypes that differ or are not floating.
        ValueError: shapes or devices that do not fit, more than 16 tokens, k out of range; in
            "triton" fp64, or more of k and M than its selection takes (see `topk_encode`).
        RuntimeError: an input requires its gradient, and gradients are enabled.

    Note:
        For inference: no gradients. The prediction is rounded to x's dtype; code and x̂ use the same
        rounded prediction, each as in `topk_encode` and `sparse_decode`. Nothing is cast under
        autocast. "triton" never waits on the host: it can be captured in a CUDA graph, after one
        call that compiles its kernels.
    """
    if implementation not in (None, "torch", "triton"):
        implementation_for("online_step", x, implementation)
    if not torch.compiler.is_compiling():
        given = x, weight, bias, k, W_dec, b_dec, prediction, codes, transported
        if encoder is not None and encoder.implementation == "triton":
            require_own("online_step", encoder, weight, bias)
            if is_eager():
                return _step_by_encoder(*given, encoder, out, implementation)
        elif x.is_cpu and implementation != "triton":
            step = _step_on_cpu(*given, encoder, out)
            if step is not None:
                return step
    step = _step_past_dispatcher(
        x, weight, bias, k, W_dec, b_dec, prediction, codes, transported, out, implementation
    )
    if step is not None:
        return step
    codes = [SparseCode(*code) for code in codes]
    _check(x, weight, bias, k, W_dec, b_dec, prediction, codes, transported)
    N, (M, D) = x.shape[:-1].numel(), weight.shape
    dictionaries, constant = _predicting(transported, len(codes))
    if transported is not None and not codes:
        b_dec, constant = constant, None
    if out is None:
        out = StepWorkspace.allocate(N, M, k, D, dtype=x.dtype, device=x.device)
    else:
        _check_workspace(out, N, M, k, D, x)
    torch.ops.resae.online_step(
        x.reshape(N, D),
        weight,
        bias,
        W_dec,
        b_dec,
        None if prediction is None else prediction.reshape(N, D),
        [code.acts.reshape(N, code.acts.shape[-1]) for code in codes],
        [code.indices.reshape(N, code.indices.shape[-1]) for code in codes],
        dictionaries,
        constant,
        list(out),
        implementation=implementation or "",
    )
    code_shape = (*x.shape[:-1], k)
    code = SparseCode(*(t.view(code_shape) for t in out.code))
    return OnlineStep(out.x_hat.view(x.shape), code)


_PASSED: set[Any] = set()


def _step_past_dispatcher(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    W_dec: Tensor,
    b_dec: Tensor | None,
    prediction: Tensor | None,
    codes: Sequence[SparseCode | tuple[Tensor, Tensor]],
    transported: Transported | None,
    out: StepWorkspace | None,
    implementation: str | None,
) -> OnlineStep | None:
    """The step of an eager call by Triton, its arguments checked once per signature; None: this
    call has to go through the dispatcher."""
    m = len(codes)
    if transported is not None and m >= len(transported.dictionaries):
        return None
    dictionaries, constant = _predicting(transported, m)
    acts, indices = zip(*codes, strict=True) if codes else ((), ())
    given = (weight, bias, W_dec, b_dec, prediction, *acts, *indices, *dictionaries, constant)
    signature = triton_signature(implementation, x, *given)
    if signature is None:
        return None
    N, (M, D), shape = x.shape[:-1].numel(), weight.shape, x.shape

    def check() -> None:
        named = [SparseCode(*code) for code in codes]
        _check(x, weight, bias, k, W_dec, b_dec, prediction, named, transported)
        if out is not None:
            _check_workspace(out, N, M, k, D, x)

    space = out and tuple([(t.shape, t.dtype, t.device, t.is_contiguous()) for t in out])
    check_once(_PASSED, (signature, m, transported is None, k, space), check)
    implementation_for("online_step", x, "triton")
    if transported is not None and not codes:
        b_dec, constant = constant, None
    if out is None:
        out = _new_workspace(x, N, M, k, D, predicts=bool(dictionaries))
    flat = len(shape) == 2
    if flat:
        rows = x
    else:
        rows, acts, indices = (
            x.reshape(N, D),
            *([t.reshape(N, t.shape[-1]) for t in ts] for ts in (acts, indices)),
        )
        prediction = None if prediction is None else prediction.reshape(N, D)
    triton_step.launch_step(
        rows, weight, bias, W_dec, b_dec, prediction, acts, indices, dictionaries, constant, out
    )
    if flat:
        return OnlineStep(out.x_hat, SparseCode(*out.code))
    code = SparseCode(*(t.view(*shape[:-1], k) for t in out.code))
    return OnlineStep(out.x_hat.view(shape), code)


def _predicting(transported: Transported | None, m: int) -> tuple[list[Tensor], Tensor | None]:
    """Dictionaries and constant of the prediction of layer m from the codes before."""
    if transported is None:
        return [], None
    return transported.dictionaries[m][:-1], transported.constants[m]


_kept_layout = cache(workspace_layout)  # here, since torch.compile warns of a cache that it traces


def _new_workspace(x: Tensor, N: int, M: int, k: int, D: int, *, predicts: bool) -> StepWorkspace:
    """A workspace for one step. Where nothing is predicted from codes it has no memory for that."""
    layout = _kept_layout(N, M, k, D, x.dtype)
    made = [
        # Sizes one by one: torch reads a tuple of them more slowly.
        x.new_empty(*sizes, dtype=dtype) if predicts or field != "prediction" else x
        for field, (sizes, dtype) in zip(StepWorkspace._fields, layout, strict=True)
    ]
    return StepWorkspace(*made)


_ENCODERS = WeakIdKeyDictionary()
"""The `ScreenedEncoder` of each weight for which the caller passed none (CPU)."""


def _encoder_of(weight: Tensor, bias: Tensor | None) -> ScreenedEncoder:
    held = _ENCODERS.get(weight)
    if held is None or _layouts(held.weight, held.bias) != _layouts(weight, bias):
        # Made of detached tensors on the same memory: the value must not keep its weak key alive.
        detached = weight.detach(), None if bias is None else bias.detach()
        held = _ENCODERS[weight] = ScreenedEncoder(*detached)
    return held


def _layouts(weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    return layout_of(weight), None if bias is None else layout_of(bias)


def _step_on_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    W_dec: Tensor,
    b_dec: Tensor | None,
    prediction: Tensor | None,
    codes: Sequence[SparseCode | tuple[Tensor, Tensor]],
    transported: Transported | None,
    encoder: ScreenedEncoder | None,
    out: StepWorkspace | None,
) -> OnlineStep | None:
    """The step by a `ScreenedEncoder`, in one call of the compiled library where possible; None:
    the call is traced, transformed or cast."""
    if encoder is None:
        if not is_eager():
            return None
        encoder = _encoder_of(weight, bias)
    else:
        require_own("online_step", encoder, weight, bias)
    plain = not codes and transported is None and out is None
    if plain and not torch.is_grad_enabled() and x.shape[:-1].numel() <= FEW_TOKENS:
        step = encoder.online_step(x, k, b_dec, prediction, W_dec)
        if step is not None:
            return OnlineStep(step[0], SparseCode(*step[1:]))
    if not is_eager():
        return None
    given = x, weight, bias, k, W_dec, b_dec, prediction, codes, transported
    return _step_by_encoder(*given, encoder, out, None)


def _step_by_encoder(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    W_dec: Tensor,
    b_dec: Tensor | None,
    prediction: Tensor | None,
    codes: Sequence[SparseCode | tuple[Tensor, Tensor]],
    transported: Transported | None,
    encoder: ScreenedEncoder,
    out: StepWorkspace | None,
    implementation: Implementation | None,
) -> OnlineStep:
    """The step with a code by a `ScreenedEncoder`; `implementation` decodes."""
    codes = [SparseCode(*code) for code in codes]
    _check(x, weight, bias, k, W_dec, b_dec, prediction, codes, transported)
    if transported is not None:
        b_dec = transported.constants[len(codes)]
        if codes:
            acts, indices = zip(*codes, strict=True)
            dictionaries = transported.dictionaries[len(codes)][:-1]
            decoded = sparse_decode(
                acts, indices, dictionaries, bias=b_dec, implementation=implementation
            )
            prediction, b_dec = decoded, None
    step = encoder.online_step(x, k, b_dec, prediction, W_dec)
    if step is None:
        code = encoder.encode(x, k, pre_bias=b_dec, prediction=prediction, sorted=False)
        x_hat = sparse_decode(
            *code, W_dec, bias=b_dec, prediction=prediction, implementation=implementation
        )
        step = x_hat, *code
    if out is not None:
        _check_workspace(out, x.shape[:-1].numel(), weight.shape[0], k, weight.shape[1], x)
        written = (out.x_hat, *out.code)
        step = tuple(to.view(t.shape).copy_(t) for to, t in zip(written, step, strict=True))
    return OnlineStep(step[0], SparseCode(*step[1:]))


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    W_dec: Tensor,
    b_dec: Tensor | None,
    prediction: Tensor | None,
    codes: Sequence[SparseCode],
    transported: Transported | None,
) -> None:
    op = "online_step"
    refuse_forward_mode(op)
    checks.check_floating(op, "x", x)
    if weight.ndim != 2:
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}, expected [M, D]")
    M, D = weight.shape
    if x.ndim == 0 or x.shape[-1] != D:
        raise ValueError(
            f"{op}: x has shape {list(x.shape)}, expected [..., {D}] (weight is [{M}, {D}])"
        )
    tokens = x.shape[:-1]
    if tokens.numel() > FEW_TOKENS:
        raise ValueError(
            f"{op}: {tokens.numel()} tokens, expected at most {FEW_TOKENS}; use topk_encode and "
            f"sparse_decode"
        )
    if not 1 <= k <= M:
        raise ValueError(f"{op}: k={k}, expected 1 ≤ k ≤ M={M}")
    inputs = [
        ("weight", weight, (M, D), ""),
        ("bias", bias, (M,), "one entry per latent"),
        ("W_dec", W_dec, (M, D), "the shape of weight"),
        ("b_dec", b_dec, (D,), "one entry per dimension"),
        ("prediction", prediction, tuple(x.shape), "the shape of x"),
    ]
    if transported is not None:
        inputs += _transported_inputs(x, D, b_dec, prediction, codes, transported)
    elif codes:
        raise ValueError(
            f"{op}: {len(codes)} codes without transported; build it with transport(), or pass "
            f"prediction instead of codes"
        )
    for name, tensor, shape, why in inputs:
        if tensor is not None:
            checks.check_shape(op, name, tensor, shape, why)
            checks.check_like(op, name, tensor, "x", x)
    if torch.is_grad_enabled():
        for name, tensor in [("x", x), *((name, tensor) for name, tensor, _, _ in inputs)]:
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"{op}: {name} requires its gradient, and this op has none; call it under "
                    f"torch.no_grad(), or use topk_encode and sparse_decode"
                )


def _transported_inputs(
    x: Tensor,
    D: int,
    b_dec: Tensor | None,
    prediction: Tensor | None,
    codes: Sequence[SparseCode],
    transported: Transported,
) -> list[tuple[str, Tensor, tuple[int, ...], str]]:
    """Name, tensor, expected shape and its reason of each input from which x is predicted."""
    op, m, L = "online_step", len(codes), len(transported.dictionaries)
    if m >= L:
        raise ValueError(
            f"{op}: {m} codes, but transported covers {L} layers; give the codes of the layers "
            f"before this one"
        )
    if b_dec is not None or prediction is not None:
        name = "prediction" if b_dec is None else "b_dec"
        raise ValueError(
            f"{op}: {name} together with transported, which holds prediction and b_dec; give "
            f"one of the two"
        )
    inputs: list[tuple[str, Tensor, tuple[int, ...], str]] = [
        ("transported.constants", transported.constants[m], (D,), "width of x")
    ]
    for j, code in enumerate(codes):
        checks.check_codes(op, code.acts, code.indices, f" of codes[{j}]")
        shape = (*x.shape[:-1], code.acts.shape[-1])
        name, dictionary = f"transported.dictionaries[{m}][{j}]", transported.dictionaries[m][j]
        inputs += [
            (f"codes[{j}]", code.acts, shape, "the tokens of x"),
            (name, dictionary, (dictionary.shape[0], D), "width of x"),
        ]
    return inputs


def _check_workspace(out: StepWorkspace, N: int, M: int, k: int, D: int, x: Tensor) -> None:
    for name, tensor, (shape, dtype) in zip(
        StepWorkspace._fields, out, workspace_layout(N, M, k, D, x.dtype), strict=True
    ):
        found = (tuple(tensor.shape), tensor.dtype, tensor.device, tensor.is_contiguous())
        if found != (shape, dtype, x.device, True):
            raise ValueError(
                f"online_step: out.{name} is {list(tensor.shape)} {tensor.dtype} on "
                f"{tensor.device}, expected {list(shape)} {dtype} on {x.device}, contiguous; use "
                f"StepWorkspace.allocate({N}, {M}, {k}, {D}, dtype={x.dtype}, "
                f"device={str(x.device)!r})"
            )


# -- op ------------------------------------------------------------------------------------------


def _step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    prediction: Tensor | None,
    acts: list[Tensor],
    indices: list[Tensor],
    dictionaries: list[Tensor],
    constant: Tensor | None,
    out: list[Tensor],
    *,
    implementation: str = "",
) -> None:
    to = StepWorkspace(*out)
    if implementation_for("online_step", x, implementation or None) == "triton":
        codes = acts, indices, dictionaries
        triton_step.launch_step(x, weight, bias, W_dec, b_dec, prediction, *codes, constant, to)
        return
    encode, decode = torch.ops.resae.topk_encode, torch.ops.resae.sparse_decode
    if dictionaries:
        prediction = to.prediction.copy_(
            decode(acts, indices, dictionaries, constant, None, implementation="torch")
        )
    k = to.acts.shape[-1]
    code = encode(x, weight, bias, k, b_dec, prediction, False, memory.workspace_bytes(x), "torch")
    x_hat = decode([code[0]], [code[1]], [W_dec], b_dec, prediction, implementation="torch")
    for result, value in zip((*to.code, to.x_hat), (*code, x_hat), strict=True):
        result.copy_(value)


def _step_fake(*_inputs: object, **_options: object) -> None:
    return None


register(
    "online_step(Tensor x, Tensor weight, Tensor? bias, Tensor W_dec, Tensor? b_dec, "
    "Tensor? prediction, Tensor[] acts, Tensor[] indices, Tensor[] dictionaries, "
    "Tensor? constant, Tensor(a!)[] out, *, str implementation='') -> ()",
    _step,
    _step_fake,
)
