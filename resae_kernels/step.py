"""Online step of one layer: z = TopK_k(relu((x − p) weightᵀ + bias)), x̂ = p + z W_dec.

p is what the layer reconstructs when none of its latents is active: what the codes of the layers
before it predict, and b_dec. N ≤ 16 tokens (generation), D width, M latents, k active; bound by
reading `weight`, M·D elements.

In Triton at most three launches: p by a gather over the earlier codes (where there are any); scores
and group maxima; then, per token and slice of D, select and decode at once. There every program
makes the whole selection for itself: it costs less than a launch between the two.

On a CPU a `ScreenedEncoder` encodes; where it screens by the compiled library, code and x̂ are one
call.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from resae_kernels.cpu import native
from resae_kernels.decode import _launch_decode, _sum_entries, sparse_decode
from resae_kernels.encode import (
    FEW_TOKENS,
    GROUP_SIZES,
    KEYS,
    _Plan,
    _plan,
    _product_of_few,
    _select_row,
    _select_warps,
)
from resae_kernels.reference import OnlineStep, TopK, Transported
from resae_kernels.screened import ScreenedEncoder, layout_of
from resae_kernels.triton import runtime as _launch
from resae_kernels.triton.runtime import AotCase, tl, triton

# As narrow as the decode of few tokens: chosen from ahead-of-time compilation, NOT yet measured.
SLICE_BYTES = 128
"""Part of a row of `W_dec` that one program decodes."""
ROWS = 64
"""Rows of `W_dec` that a program loads at a time, up to k."""


class StepWorkspace(NamedTuple):
    """Memory of an online step: its results, and what passes between its launches."""

    x_hat: Tensor
    """`[N, D]`, a result."""
    acts: Tensor
    """`[N, k]`, a result."""
    indices: Tensor
    """`[N, k]` int64, a result."""
    prediction: Tensor
    """`[N, D]`: what the earlier codes predict. Written where they are given with `transported`."""
    scores: Tensor
    """`[N, M]`, each row padded; in use by "triton" alone, as all that follow."""
    best: Tensor
    """`[N, groups at most]`: the largest score of each group of latents."""
    program_acts: Tensor
    """`[N, slices of D, k]`: the code as each program selects it."""
    program_indices: Tensor
    """`[N, slices of D, k]` int64."""

    @classmethod
    def allocate(
        cls,
        N: int,
        M: int,
        k: int,
        D: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "StepWorkspace":
        """For `online_step` of N tokens through one layer, call after call.

        Layers of one size can share it where each result is used up before the next step; in
        closed loop, where later layers read the codes of earlier ones, each has its own.
        """
        return cls(
            *(
                torch.empty(shape, dtype=dtype, device=device)
                for shape, dtype in _layout(N, M, k, D, dtype)
            )
        )


def online_step(
    x: Tensor,  # [..., D] fp32|fp64|bf16|fp16, at most 16 tokens
    weight: Tensor,  # [M, D]
    bias: Tensor | None,  # [M]
    k: int,
    W_dec: Tensor,  # [M, D]
    *,
    b_dec: Tensor | None = None,  # [D]
    base: Tensor | None = None,  # [..., D]
    codes: Sequence[TopK | tuple[Tensor, Tensor]] = (),  # m × ([..., k_j], [..., k_j])
    transported: Transported | None = None,
    encoder: ScreenedEncoder | None = None,
    out: StepWorkspace | None = None,
    implementation: str | None = None,
) -> OnlineStep:
    """Code and reconstruction of one layer while the model runs (formula:
    `reference.online_step`).

    What the layers before this one predict is given either as `base`, or by their codes: with
    `transported` the step is that of layer m = len(codes), closed loop.

    Args:
        x: `[..., D]`, the activations of at most 16 tokens.
        weight, bias: `[M, D]` and `[M]` or None, the encoder.
        k: active latents per token, 1 ≤ k ≤ M.
        W_dec: `[M, D]`, the decoder.
        b_dec: `[D]`, subtracted before encoding and added to x̂. Not with `transported`.
        base: `[..., D]`, the prediction, without b_dec. Not with `transported`.
        codes: of the m layers before, in order; with `transported` alone.
        transported: from `transport()`. Its `constants[m]` hold the prediction's constant and this
            layer's b_dec together, so neither is given again.
        encoder: of this weight and bias, by which a CPU encodes. None: one is made at the first
            step (a quarter more memory than the weight) and kept as long as the weight.
        out: from `StepWorkspace.allocate`: all that the step writes, so that nothing is allocated
            (contiguous inputs). The result is views of it, valid until the next step that is given
            it.
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
        For inference: no gradients. The prediction is rounded to x's dtype; code and x̂ are taken
        against the same rounded prediction, each as in `topk_encode` and `sparse_decode`. Nothing
        is cast under autocast. "triton" waits for nothing on the host: it can be captured in a CUDA
        graph, after one call that compiles its kernels.
    """
    if implementation not in (None, "torch", "triton"):
        _launch.implementation_for("online_step", x, implementation)
    if x.is_cpu and implementation != "triton" and not torch.compiler.is_compiling():
        step = _step_on_cpu(
            x, weight, bias, k, W_dec, b_dec, base, codes, transported, encoder, out
        )
        if step is not None:
            return step
    codes = [TopK(*code) for code in codes]
    _check(x, weight, bias, k, W_dec, b_dec, base, codes, transported)
    N, (M, D) = x.shape[:-1].numel(), weight.shape
    dictionaries: list[Tensor] = []
    constant = None
    if transported is not None:
        dictionaries = transported.dictionaries[len(codes)][:-1]
        constant = transported.constants[len(codes)]
        if not codes:
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
        None if base is None else base.reshape(N, D),
        [code.acts.reshape(N, code.acts.shape[-1]) for code in codes],
        [code.indices.reshape(N, code.indices.shape[-1]) for code in codes],
        dictionaries,
        constant,
        list(out),
        implementation=implementation or "",
    )
    code_shape = (*x.shape[:-1], k)
    code = TopK(out.acts.view(code_shape), out.indices.view(code_shape))
    return OnlineStep(out.x_hat.view(x.shape), code)


_ENCODERS = WeakIdKeyDictionary()
"""A `ScreenedEncoder` by weight: what encodes on a CPU where the caller has none."""


def _encoder_of(weight: Tensor, bias: Tensor | None) -> ScreenedEncoder:
    held = _ENCODERS.get(weight)
    if held is None or _layouts(held.weight, held.bias) != _layouts(weight, bias):
        # Of other tensors of the same memory: it must not keep the weight alive that keeps it.
        detached = weight.detach(), None if bias is None else bias.detach()
        held = _ENCODERS[weight] = ScreenedEncoder(*detached)
    return held


def _layouts(weight: Tensor, bias: Tensor | None) -> tuple:
    return layout_of(weight), None if bias is None else layout_of(bias)


def _step_on_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    W_dec: Tensor,
    b_dec: Tensor | None,
    base: Tensor | None,
    codes: Sequence[TopK | tuple[Tensor, Tensor]],
    transported: Transported | None,
    encoder: ScreenedEncoder | None,
    out: StepWorkspace | None,
) -> OnlineStep | None:
    """The step by a `ScreenedEncoder`, where that can in one call of the compiled library; None:
    what is called is traced, transformed or cast."""
    if encoder is None:
        if not native.is_eager():
            return None
        encoder = _encoder_of(weight, bias)
    elif encoder.weight is not weight or encoder.bias is not bias:
        raise ValueError("online_step: encoder was made of another weight or bias; give it those")
    plain = not codes and transported is None and out is None
    if plain and not torch.is_grad_enabled() and x.shape[:-1].numel() <= FEW_TOKENS:
        step = encoder.online_step(x, k, b_dec, base, W_dec)
        if step is not None:
            return OnlineStep(step[0], TopK(*step[1:]))
    if not native.is_eager():
        return None
    codes = [TopK(*code) for code in codes]
    _check(x, weight, bias, k, W_dec, b_dec, base, codes, transported)
    if transported is not None:
        b_dec = transported.constants[len(codes)]
        if codes:
            acts, indices = zip(*codes, strict=True)
            dictionaries = transported.dictionaries[len(codes)][:-1]
            base, b_dec = sparse_decode(acts, indices, dictionaries, bias=b_dec), None
    step = encoder.online_step(x, k, b_dec, base, W_dec)
    if step is None:
        code = encoder.encode(x, k, pre_bias=b_dec, base=base, sorted=False)
        step = sparse_decode(*code, W_dec, bias=b_dec, base=base), *code
    if out is not None:
        _check_workspace(out, x.shape[:-1].numel(), weight.shape[0], k, weight.shape[1], x)
        written = (out.x_hat, out.acts, out.indices)
        step = tuple(to.view(t.shape).copy_(t) for to, t in zip(written, step, strict=True))
    return OnlineStep(step[0], TopK(*step[1:]))


def _check(x, weight, bias, k, W_dec, b_dec, base, codes, transported) -> None:
    op = "online_step"
    _launch.check_floating(op, "x", x)
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
        ("base", base, tuple(x.shape), "the shape of x"),
    ]
    if transported is None:
        if codes:
            raise ValueError(
                f"{op}: {len(codes)} codes without transported; build it with transport(), or give "
                f"the prediction as base"
            )
    else:
        m, L = len(codes), len(transported.dictionaries)
        if m >= L:
            raise ValueError(
                f"{op}: {m} codes, but transported covers {L} layers; give the codes of the layers "
                f"before this one"
            )
        if b_dec is not None or base is not None:
            name = "base" if b_dec is None else "b_dec"
            raise ValueError(
                f"{op}: {name} together with transported, which holds prediction and b_dec; give "
                f"one of the two"
            )
        inputs.append(("transported.constants", transported.constants[m], (D,), "width of x"))
        for j, code in enumerate(codes):
            _launch.check_codes(op, code.acts, code.indices, f" of codes[{j}]")
            inputs += [
                (f"codes[{j}]", code.acts, (*tokens, code.acts.shape[-1]), "the tokens of x"),
                (
                    f"transported.dictionaries[{m}][{j}]",
                    transported.dictionaries[m][j],
                    (transported.dictionaries[m][j].shape[0], D),
                    "width of x",
                ),
            ]
    for name, tensor, shape, why in inputs:
        if tensor is not None:
            _launch.check_shape(op, name, tensor, shape, why)
            _launch.check_like(op, name, tensor, "x", x)
    if torch.is_grad_enabled():
        for name, tensor in [("x", x), *((name, tensor) for name, tensor, _, _ in inputs)]:
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"{op}: {name} requires its gradient, and this op has none; call it under "
                    f"torch.no_grad(), or use topk_encode and sparse_decode"
                )


def _check_workspace(out: StepWorkspace, N: int, M: int, k: int, D: int, x: Tensor) -> None:
    for name, tensor, (shape, dtype) in zip(
        StepWorkspace._fields, out, _layout(N, M, k, D, x.dtype), strict=True
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
    base: Tensor | None,
    acts: list[Tensor],
    indices: list[Tensor],
    dictionaries: list[Tensor],
    constant: Tensor | None,
    out: list[Tensor],
    *,
    implementation: str = "",
) -> None:
    to = StepWorkspace(*out)
    if _launch.implementation_for("online_step", x, implementation or None) == "triton":
        _step_triton(x, weight, bias, W_dec, b_dec, base, acts, indices, dictionaries, constant, to)
        return
    encode, decode = torch.ops.resae.topk_encode, torch.ops.resae.sparse_decode
    if dictionaries:
        base = to.prediction.copy_(
            decode(acts, indices, dictionaries, constant, None, implementation="torch")
        )
    k = to.acts.shape[1]
    code = encode(x, weight, bias, k, b_dec, base, False, _launch.workspace_bytes(x), "torch")
    x_hat = decode([code[0]], [code[1]], [W_dec], b_dec, base, implementation="torch")
    for result, value in zip((to.acts, to.indices, to.x_hat), (*code, x_hat), strict=True):
        result.copy_(value)


def _step_fake(*_inputs, **_options) -> None:
    return None


_launch.register(
    "online_step(Tensor x, Tensor weight, Tensor? bias, Tensor W_dec, Tensor? b_dec, Tensor? base, "
    "Tensor[] acts, Tensor[] indices, Tensor[] dictionaries, Tensor? constant, Tensor(a!)[] out, "
    "*, str implementation='') -> ()",
    _step,
    _step_fake,
)


# -- launchers -------------------------------------------------------------------------------------


def _layout(
    N: int, M: int, k: int, D: int, dtype: torch.dtype
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each field of the workspace."""

    def cdiv(a: int, b: int) -> int:
        return -(-a // b)

    slices = cdiv(D, SLICE_BYTES // dtype.itemsize)
    return [
        ((N, D), dtype),
        ((N, k), dtype),
        ((N, k), torch.int64),
        ((N, D), dtype),
        ((N, cdiv(M, 64) * 64), dtype),  # every row starts at a multiple of 16 bytes
        ((N, cdiv(M, min(GROUP_SIZES))), dtype),
        ((N, slices, k), dtype),
        ((N, slices, k), torch.int64),
    ]


def _step_triton(
    x, weight, bias, W_dec, b_dec, base, acts, indices, dictionaries, constant, to: StepWorkspace
) -> None:
    N, (M, D), k = x.shape[0], weight.shape, to.acts.shape[1]
    plan = _plan(M, k) if x.dtype in KEYS else None
    if plan is None:
        raise ValueError(
            f"online_step: 'triton' does not select k={k} of M={M} in {x.dtype} (fp32, bf16 or "
            f"fp16, k ≤ 1024, M ≤ 2¹⁹, next_power_of_2(k) · M ≤ 2²⁶); pass implementation='torch'"
        )
    if N == 0:
        return
    keys = KEYS[x.dtype]
    x, weight, W_dec = x.contiguous(), weight.contiguous(), W_dec.contiguous()
    bias, b_dec, base = (None if t is None else t.contiguous() for t in (bias, b_dec, base))
    with torch.cuda.device_of(x):
        if dictionaries:
            base, _ = _launch_decode(acts, indices, dictionaries, constant, None, to.prediction)
        scores, best = to.scores[:, :M], to.best.view(keys.dtype)
        _product_of_few(x, weight, bias, b_dec, base, scores, plan, best)
        _select_decode_kernel[(N, to.program_acts.shape[1])](
            to.x_hat,
            to.acts.view(keys.dtype),
            to.indices,
            to.program_acts,
            to.program_acts.view(keys.dtype),
            to.program_indices,
            scores.view(keys.dtype),
            best,
            W_dec,
            b_dec,
            base,
            M,
            plan.groups,
            scores.stride(0),
            k,
            **_select_decode_constants(plan, D, x.dtype),
            **_launch.launch_options(_select_warps(plan), num_stages=1),
        )


def _select_decode_constants(plan: _Plan, D: int, dtype: torch.dtype) -> dict[str, int]:
    return {
        "GROUP": plan.group,
        "GROUPS": triton.next_power_of_2(plan.groups),
        "SLOTS": plan.slots,
        "INF": KEYS[dtype].inf,
        "TOP": KEYS[dtype].top,
        "D": D,
        "BE": min(ROWS, plan.slots),
        "BD": min(SLICE_BYTES // dtype.itemsize, triton.next_power_of_2(D)),
    }


# -- kernels ---------------------------------------------------------------------------------------


@triton.jit
def _select_decode_kernel(
    x_hat,  # [N, D]
    acts,  # [N, k], as integers
    indices,  # [N, k]
    program_acts,  # [N, slices, k]
    program_keys,  # the same memory, as integers
    program_indices,  # [N, slices, k]
    scores,  # [N, M], rows s_scores apart, as integers
    best,  # [N, groups]
    W_dec,  # [M, D]
    b_dec,  # [D] or None
    base,  # [N, D] or None
    M,
    groups,
    s_scores,
    k,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    INF: tl.constexpr,
    TOP: tl.constexpr,
    D: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
):
    i_n, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    # A row of its own: the programs of a token pass through the selection at different times.
    o_row = (i_n * tl.num_programs(1) + i_s) * k
    p_keys, p_indices = program_keys + o_row, program_indices + o_row
    p_scores, p_best = scores + i_n * s_scores, best + i_n * groups
    _select_row(p_scores, p_best, p_keys, p_indices, M, groups, k, GROUP, GROUPS, SLOTS, INF, TOP)
    tl.debug_barrier()  # the row is read by other threads than those that wrote it
    if i_s == 0:
        o_s = tl.arange(0, SLOTS)
        m_s = o_s < k
        tl.store(acts + i_n * k + o_s, tl.load(p_keys + o_s, mask=m_s, other=0), mask=m_s)
        tl.store(indices + i_n * k + o_s, tl.load(p_indices + o_s, mask=m_s, other=0), mask=m_s)
    o_d = i_s * BD + tl.arange(0, BD)
    m_d = o_d < D
    # [BD]
    b_sum = _sum_entries(program_acts + o_row, p_indices, W_dec, 0, k, o_d, D, tl.float32, BE, BD)
    if b_dec is not None:
        b_sum += tl.load(b_dec + o_d, mask=m_d, other=0.0).to(tl.float32)
    if base is not None:
        b_sum += tl.load(base + i_n * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(x_hat + i_n * D + o_d, b_sum.to(x_hat.dtype.element_ty), mask=m_d)


# -- compilation ahead of time ---------------------------------------------------------------------


def aot_cases() -> Iterator[AotCase]:
    """The kernel as it runs at the shapes that matter, for a compiler without a device."""
    k = 64
    for name, dtype, M, D in (
        ("bf16", torch.bfloat16, 65536, 2048),
        ("bf16", torch.bfloat16, 131072, 3584),
        ("fp32", torch.float32, 65536, 2048),
    ):
        plan = _plan(M, k)
        assert plan is not None
        warps = _select_warps(plan)
        floats, integers = f"*{name}:16", f"*i{dtype.itemsize * 8}:16"

        def each(kind: str, names: str) -> dict[str, str]:
            return dict.fromkeys(names.split(), kind)

        yield AotCase(
            f"select_decode {name}, M={M} k={k} D={D}",
            _select_decode_kernel,
            each(floats, "x_hat program_acts W_dec b_dec base")
            | each(integers, "acts program_keys scores best")
            | each("*i64:16", "indices program_indices")
            | each("i32:16", "M groups s_scores k"),
            _select_decode_constants(plan, D, dtype),
            *(warps, 1),
            {
                "matrix": False,
                "loads_128": ROWS * SLICE_BYTES // (warps * 512),
                "instructions": 4000,
            },
        )
