"""TopK encode: z[n] = the k largest of relu((x[n] − base[n] − pre_bias) weightᵀ + bias).

N tokens, D width, M latents, k active. 2·N·D·M FLOPs; the scores `[N, M]` exist for one chunk of
rows at a time, so that they stay in cache between the product and the selection. Selection is
exact: ties go to the lower index, whatever the chunking.

Backward is sparse. With g the gradient of the acts where they are positive, dx is a sparse decode
of g through `weight`, and dweight sums g · residual per latent (`latent_outer`, over codes sorted
by latent: deterministic, no `[N, M]`). Gao et al. 2024 (arXiv 2406.04093), section 2.2.
"""

import torch
from torch import Tensor

from resae_kernels import _launch
from resae_kernels.reference import TopK, accumulation_dtype
from resae_kernels.sparse_decode import latent_outer, latent_sum

WORKSPACE_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
"""Default bound on the scores held at once, by device type: a CPU's last-level cache; on a GPU
small beside the weights of the layer shapes in use."""


def topk_encode(
    x: Tensor,  # [..., D] fp32|fp64|bf16|fp16
    weight: Tensor,  # [M, D]
    bias: Tensor | None,  # [M]
    k: int,
    *,
    pre_bias: Tensor | None = None,  # [D]
    base: Tensor | None = None,  # [..., D]
    sorted: bool = True,
    workspace_bytes: int | None = None,
    check_nan: bool = False,
) -> TopK:
    """The k largest positive pre-activations of each token (formula: `reference.topk_encode`).

    Args:
        x: `[..., D]`, the activations to encode.
        weight: `[M, D]`, one latent per contiguous row; x's dtype and device, as every other input.
        bias: `[M]` or None.
        k: active latents per token, 1 ≤ k ≤ M.
        pre_bias: `[D]`, subtracted from every token (an autoencoder's `b_dec`).
        base: `[..., D]`, subtracted token by token (a prediction of x; the code is of the rest).
        sorted: True orders a code by value, descending, then index; False by index, ascending.
        workspace_bytes: bound on the scores held at once (one row at least); default 32 MiB on
            CPU, 512 MiB on CUDA.
        check_nan: raise if a score is NaN instead of sorting it first.

    Returns:
        `TopK(acts, indices)`: `[..., k]` in x's dtype, and int64. Slots beyond the positive
        pre-activations hold act 0, index 0 and come last.

    Raises:
        TypeError: dtypes that differ or are not floating.
        ValueError: shapes or devices that do not fit, k out of range, NaN in checked mode.

    Note:
        16-bit inputs: residual rounded to x's dtype, product in fp32, scores rounded to x's dtype
        and selected in it; ties go to the lower index. Gradients reach x, weight, bias, pre_bias
        and base through the acts, where they are positive; indices have none. Under autocast the
        inputs are cast as for `F.linear`.
    """
    x, weight, bias, pre_bias, base = _launch.under_autocast(x, weight, bias, pre_bias, base)  # type: ignore[assignment]
    _check(x, weight, bias, k, pre_bias, base, workspace_bytes)
    D = weight.shape[1]
    if workspace_bytes is None:
        workspace_bytes = WORKSPACE_BYTES.get(x.device.type, WORKSPACE_BYTES["cuda"])
    acts, indices = torch.ops.resae.topk_encode(
        x.reshape(-1, D),
        weight,
        bias,
        k,
        pre_bias,
        None if base is None else base.reshape(-1, D),
        sorted,
        workspace_bytes,
    )
    if check_nan and bool(acts.isnan().any()):
        token = int(acts.isnan().any(-1).nonzero()[0])
        raise ValueError(
            f"topk_encode: NaN in the pre-activations of token {token} (of {acts.shape[0]}); "
            f"look for NaN or inf in x, weight, bias, pre_bias and base"
        )
    code_shape = (*x.shape[:-1], k)
    return TopK(acts.reshape(code_shape), indices.reshape(code_shape))


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    pre_bias: Tensor | None,
    base: Tensor | None,
    workspace_bytes: int | None,
) -> None:
    op = "topk_encode"
    _launch.check_floating(op, "x", x)
    if weight.ndim != 2:
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}, expected [M, D]")
    M, D = weight.shape
    if x.ndim == 0 or x.shape[-1] != D:
        raise ValueError(
            f"{op}: x has shape {list(x.shape)}, expected [..., {D}] (weight is [{M}, {D}], one "
            f"latent per row; pass weight.T if yours is [D, M])"
        )
    _launch.check_like(op, "weight", weight, "x", x)
    for name, tensor, shape, why in (
        ("bias", bias, (M,), "one entry per latent"),
        ("pre_bias", pre_bias, (D,), "one entry per dimension"),
        ("base", base, tuple(x.shape), "the shape of x"),
    ):
        if tensor is not None:
            _launch.check_shape(op, name, tensor, shape, why)
            _launch.check_like(op, name, tensor, "x", x)
    if k < 1:
        raise ValueError(f"{op}: k={k}, expected at least 1")
    if k > M:
        raise ValueError(
            f"{op}: k={k} exceeds the number of latents M={M} (weight is [{M}, {D}]); lower k"
        )
    if workspace_bytes is not None and workspace_bytes < 1:
        raise ValueError(f"{op}: workspace_bytes={workspace_bytes}, expected at least 1")


# -- op ------------------------------------------------------------------------------------------


def _residual(x: Tensor, pre_bias: Tensor | None, base: Tensor | None) -> Tensor:
    """`x − base − pre_bias`, formed in the accumulation dtype and rounded once to x's."""
    residual = x.to(accumulation_dtype(x.dtype))
    for offset in (base, pre_bias):
        if offset is not None:
            residual = residual - offset
    return residual.to(x.dtype)


def _encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    pre_bias: Tensor | None,
    base: Tensor | None,
    sorted: bool,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    N, M = x.shape[0], weight.shape[0]
    wide = accumulation_dtype(x.dtype)
    weight_t = weight.to(wide).T
    bias = None if bias is None else bias.to(wide)
    rows = max(1, min(N, workspace_bytes // (M * wide.itemsize)))
    acts = x.new_empty(N, k)
    indices = torch.empty(N, k, dtype=torch.int64, device=x.device)
    scores = torch.empty(rows, M, dtype=wide, device=x.device)
    for start in range(0, N, rows):
        chunk = slice(start, min(start + rows, N))
        residual = _residual(x[chunk], pre_bias, None if base is None else base[chunk]).to(wide)
        chunk_scores = scores[: residual.shape[0]]
        if bias is None:
            torch.mm(residual, weight_t, out=chunk_scores)
        else:
            torch.addmm(bias, residual, weight_t, out=chunk_scores)
        acts[chunk], indices[chunk] = _select(chunk_scores.to(x.dtype), k, sorted)
    return acts, indices


def _select(scores: Tensor, k: int, sorted: bool) -> tuple[Tensor, Tensor]:
    """Exact TopK of `relu(scores)`, `[n, M]`: ties to the lower index, NaN first, padding last.

    `torch.topk` leaves the choice among equal values open, so one more value than needed is asked
    for: where it equals the last one taken, the lowest indices are picked by counting.
    """
    M = scores.shape[1]
    values, indices = _largest(scores, min(k + 1, M))
    if k < M:
        last, next_ = values[:, k - 1], values[:, k]
        ambiguous = ((last == next_) & (last > 0)) | next_.isnan()
        values, indices = values[:, :k].contiguous(), indices[:, :k].contiguous()
        tied = ambiguous.nonzero().flatten()
        if tied.numel():
            picked = _lowest_among_ties(scores[tied], last[tied], k)
            indices[tied] = picked
            values[tied] = scores[tied.unsqueeze(1), picked]
    positive = (values > 0) | values.isnan()
    acts = torch.where(positive, values, 0.0)
    if not sorted:
        order = indices.masked_fill(~positive, M).argsort(dim=-1)
    elif bool(((acts[:, 1:] >= acts[:, :-1]) & positive[:, 1:]).any() | acts.isnan().any()):
        # Equal acts may stand in any order: by index first, then stably by value.
        by_index = indices.argsort(dim=-1)
        by_value = acts.gather(1, by_index).argsort(dim=-1, descending=True, stable=True)
        order = by_index.gather(1, by_value)
    else:
        return acts, indices.masked_fill_(~positive, 0)
    acts, indices, positive = (t.gather(1, order) for t in (acts, indices, positive))
    return acts, indices.masked_fill_(~positive, 0)


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Like `scores.topk(count)`: the groups with the largest maxima, then among their members.

    No value outside the `count` best groups can be among the `count` largest. Groups are strided,
    so that their maxima are taken along contiguous lanes; groups of 8 or 4 pay where enough of them
    remain to choose from (`torch.topk` takes 2 to 5 times as long at the sizes of autoencoders).
    """
    n, M = scores.shape
    size = next((g for g in (8, 4) if M % g == 0 and 2 * (M // g) >= 3 * count), None)
    if size is None:
        return scores.topk(count, dim=-1)
    groups = scores.view(n, size, M // size).amax(dim=1).topk(count, dim=-1, sorted=False).indices
    strides = torch.arange(0, M, M // size, device=scores.device)
    members = (groups.unsqueeze(1) + strides.view(1, size, 1)).flatten(1)
    values, order = scores.gather(1, members).topk(count, dim=-1)
    return values, members.gather(1, order)


def _lowest_among_ties(scores: Tensor, kth: Tensor, k: int) -> Tensor:
    """`[n, k]` indices, ascending, of the k largest scores; those equal to `kth` from the left."""
    kth = kth.unsqueeze(1)
    nan = scores.isnan()
    above = torch.where(kth.isnan(), False, (scores > kth) | nan)
    level = torch.where(kth.isnan(), nan, scores == kth)
    missing = k - above.sum(dim=-1, keepdim=True)
    keep = above | (level & (level.cumsum(dim=-1, dtype=torch.int32) <= missing))
    return keep.nonzero()[:, 1].view(-1, k)


def _encode_fake(x, weight, bias, k, pre_bias, base, sorted, workspace_bytes):  # noqa: ARG001
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int64)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, _, pre_bias, base, _, _ = inputs
    acts, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)
    # acts gate the gradient; x, pre_bias and base rebuild the residual that dweight needs.
    ctx.save_for_backward(x, weight, pre_bias, base, acts, indices)
    ctx.has_bias = bias is not None


def _backward(ctx, grad_acts, grad_indices):
    del grad_indices  # integers carry no gradient
    if grad_acts is None:
        return (None,) * 8
    x, weight, pre_bias, base, acts, indices = ctx.saved_tensors
    need_x, need_weight, need_bias, _, need_pre_bias, need_base, _, _ = ctx.needs_input_grad
    grad = torch.where(acts > 0, grad_acts, 0.0)
    grad_x = grad_weight = grad_bias = grad_pre_bias = grad_base = None
    if need_x or need_pre_bias or need_base:
        grad_x = torch.ops.resae.sparse_decode([grad], [indices], [weight], None, None)
        grad_pre_bias = -grad_x.sum(0) if need_pre_bias else None
        grad_base = -grad_x if need_base else None
    if need_weight:
        grad_weight = latent_outer(grad, indices, _residual(x, pre_bias, base), weight.shape[0])
    if need_bias and ctx.has_bias:
        grad_bias = latent_sum(grad, indices, weight.shape[0])
    return (
        grad_x if need_x else None,
        grad_weight,
        grad_bias,
        None,
        grad_pre_bias,
        grad_base,
        None,
        None,
    )


_launch.register(
    "topk_encode(Tensor x, Tensor weight, Tensor? bias, SymInt k, Tensor? pre_bias, Tensor? base, "
    "bool sorted, int workspace_bytes) -> (Tensor acts, Tensor indices)",
    _encode,
    _encode_fake,
)
torch.library.register_autograd(
    "resae::topk_encode", _backward, setup_context=_setup_context, lib=_launch.LIBRARY
)
