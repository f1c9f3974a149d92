"""The specification: every op in plain PyTorch, any floating dtype, any device, autograd by
PyTorch.

    code            z = TopK_k(relu((x − prediction − pre_bias) weightᵀ + bias))
    threshold code  z = relu(s) · [s > threshold] of the same pre-activations s
    decode          y = Σ_j acts_j · W_dec[indices_j] + bias + prediction
    its error       e = y − target, and Σ_d e_d² of each token
    chain           x̂_l = Σ_{sources j} x̂_j A_lj + c_l + z_l W_dec_l + b_dec_l
    online step     encode and decode of the residual x − prediction − b_dec

Letters, everywhere: `N` tokens, `D` width of the residual stream, `M` latents, `k` active latents,
`L` selected layers. Row-major, tokens first. "Latent" is a unit of the autoencoder (elsewhere:
feature); `weight [M, D]` is the stored `encoder.weight`, the transpose of `W_enc [D, M]`.

bf16 and fp16 inputs are accumulated in fp32 and rounded once, to the input's dtype; fp32 and fp64
are computed as they are. Written for reading: nothing here is fast, and the dense `[N, M]` scores
are held whole. ReSAE: arXiv 2605.27819; TopK autoencoders: Gao et al., arXiv 2406.04093, section 2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from resae_kernels.types import (
    OnlineStep,
    ReconstructionError,
    SparseCode,
    ThresholdCode,
    Transported,
    accumulation_dtype,
)


def topk_encode(
    x: Tensor,  # [..., D]
    weight: Tensor,  # [M, D]
    bias: Tensor | None,  # [M]
    k: int,
    *,
    pre_bias: Tensor | None = None,  # [D]
    prediction: Tensor | None = None,  # [..., D]
    sorted: bool = True,
) -> SparseCode:
    """The k largest of `relu((x − prediction − pre_bias) @ weight.T + bias)`, ties to the lower
    index.

    The residual is rounded to x's dtype before the GEMM, the scores once after bias and relu.
    NaN scores sort first. Slots beyond the positive scores hold act 0, index 0, and come last.
    """
    return _largest(_scores(x, weight, bias, pre_bias, prediction).relu(), k, sorted)


def threshold_encode(
    x: Tensor,  # [..., D]
    weight: Tensor,  # [M, D]
    bias: Tensor | None,  # [M]
    threshold: Tensor,  # [M] or []
    max_active: int,
    *,
    pre_bias: Tensor | None = None,  # [D]
    prediction: Tensor | None = None,  # [..., D]
    sorted: bool = True,
) -> ThresholdCode:
    """The scores of `topk_encode` that are positive and above `threshold`: their number, and the
    max_active largest, ties to the lower index.

    Scores are rounded before they are compared. A NaN score is above every threshold, as
    relu(NaN) · 0 is NaN; only NaN is above a NaN threshold.
    """
    scores = _scores(x, weight, bias, pre_bias, prediction)
    active = ((scores > threshold) & (scores > 0)) | scores.isnan()
    code = _largest(torch.where(active, scores, 0.0), max_active, sorted)
    return ThresholdCode(*code, active.sum(-1, dtype=torch.int32))


def _scores(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre_bias: Tensor | None,
    prediction: Tensor | None,
) -> Tensor:
    """`(x − prediction − pre_bias) @ weight.T + bias`, `[..., M]`: the residual and the sum are
    each rounded once to x's dtype."""
    acc_dtype = accumulation_dtype(x.dtype)
    residual = x.to(acc_dtype)
    for offset in (prediction, pre_bias):
        if offset is not None:
            residual = residual - offset.to(acc_dtype)
    scores = residual.to(x.dtype).to(acc_dtype) @ weight.to(acc_dtype).T
    if bias is not None:
        scores = scores + bias.to(acc_dtype)
    return scores.to(x.dtype)


def _largest(acts: Tensor, k: int, sorted: bool) -> SparseCode:
    """The k largest of acts ≥ 0 `[..., M]`, NaN first, zeros as padding."""
    M = acts.shape[-1]
    ranked, order = acts.sort(dim=-1, descending=True, stable=True)
    acts, indices = ranked[..., :k], order[..., :k]
    empty = acts == 0
    if not sorted:
        by_index = indices.masked_fill(empty, M).argsort(dim=-1, stable=True)
        acts, indices, empty = (t.gather(-1, by_index) for t in (acts, indices, empty))
    return SparseCode(acts, indices.masked_fill(empty, 0))


def sparse_decode(
    acts: Tensor | Sequence[Tensor],  # [..., k]
    indices: Tensor | Sequence[Tensor],  # [..., k]
    W_dec: Tensor | Sequence[Tensor],  # [M, D]
    *,
    bias: Tensor | None = None,  # [D]
    prediction: Tensor | None = None,  # [..., D]
) -> Tensor:
    """`Σ_j acts_j · W_dec[indices_j] (+ bias) (+ prediction)`, summed over dictionaries given as
    lists."""
    if isinstance(acts, Tensor):
        acts, indices, W_dec = [acts], [indices], [W_dec]  # type: ignore[list-item]
    acc_dtype = accumulation_dtype(acts[0].dtype)
    total: Tensor | float = 0.0
    for a, i, W in zip(acts, indices, W_dec, strict=True):
        total = total + (a.to(acc_dtype).unsqueeze(-1) * W.to(acc_dtype)[i]).sum(-2)
    for offset in (bias, prediction):
        if offset is not None:
            total = total + offset.to(acc_dtype)
    return total.to(acts[0].dtype)  # type: ignore[union-attr]


def reconstruction_error(
    acts: Tensor | Sequence[Tensor],  # [..., k]
    indices: Tensor | Sequence[Tensor],  # [..., k]
    W_dec: Tensor | Sequence[Tensor],  # [M, D]
    target: Tensor,  # [..., D]
    *,
    bias: Tensor | None = None,  # [D]
    prediction: Tensor | None = None,  # [..., D]
) -> ReconstructionError:
    """`sparse_decode(…) − target`, rounded once, and its squares, summed before it is rounded."""
    lists = [[t] if isinstance(t, Tensor) else list(t) for t in (acts, indices, W_dec)]
    acc_dtype = accumulation_dtype(target.dtype)
    acts, indices, W_dec = [a.to(acc_dtype) for a in lists[0]], lists[1], lists[2]
    error = sparse_decode(acts, indices, W_dec, bias=bias, prediction=prediction) - target.to(
        acc_dtype
    )
    return ReconstructionError(error.to(target.dtype), error.square().sum(-1))


def affine_predict(sources: Sequence[Tensor], A: Tensor, c: Tensor) -> Tensor:
    """`x_{l-s} A_1 + … + x_{l-1} A_s + c` from the `s` most recent sources.

    `A` is `[s·D, D]`, the maps of the sources stacked in layer order; s = 1 is the ordinary chain,
    s = l the predictor from all previous layers.
    """
    D = A.shape[1]
    acc_dtype = accumulation_dtype(A.dtype)
    recent = torch.cat(list(sources[len(sources) - A.shape[0] // D :]), dim=-1)
    return recent.to(acc_dtype) @ A.to(acc_dtype) + c.to(acc_dtype)


def affine_chain(
    codes: Sequence[SparseCode],  # L × [..., k_l]
    W_dec: Sequence[Tensor],  # L × [M_l, D]
    A: Sequence[Tensor],  # (L-1) × [s_l·D, D], A[l-1] predicts layer l
    c: Sequence[Tensor],  # (L-1) × [D]
    *,
    b_dec: Sequence[Tensor],  # L × [D]
    transported: Transported | None = None,
) -> list[Tensor]:
    """Reconstructions of all layers: `x̂_0 = z_0 W_dec_0 + b_dec_0`, then the affine prediction from
    the reconstructions so far plus `z_l W_dec_l + b_dec_l`. Each x̂_l is rounded once.

    With `transported` the same sums are taken as one gather over all dictionaries of a layer.
    """
    if transported is not None:
        return [
            sparse_decode(
                [acts for acts, _ in codes[: m + 1]],
                [indices for _, indices in codes[: m + 1]],
                transported.dictionaries[m],
                bias=transported.constants[m],
            )
            for m in range(len(codes))
        ]
    x_hats: list[Tensor] = []
    for layer, (acts, indices) in enumerate(codes):
        acc_dtype = accumulation_dtype(acts.dtype)
        x_hat = sparse_decode(
            acts.to(acc_dtype), indices, W_dec[layer].to(acc_dtype), bias=b_dec[layer]
        )
        if layer > 0:
            x_hat = x_hat + affine_predict(x_hats, A[layer - 1], c[layer - 1])
        x_hats.append(x_hat.to(acts.dtype))
    return x_hats


def transport(
    W_dec: Sequence[Tensor], A: Sequence[Tensor], c: Sequence[Tensor], *, b_dec: Sequence[Tensor]
) -> Transported:
    """Transport every dictionary to every later layer: `D_{m←l} = Σ_{sources j ≥ l} D_{j←l} A_mj`.

    Summed in fp32 (fp64 for fp64 input) and rounded once to W_dec's dtype.
    """
    D, dtype = W_dec[0].shape[1], W_dec[0].dtype
    acc_dtype = accumulation_dtype(dtype)
    tables: list[list[Tensor]] = []
    constants: list[Tensor] = []
    for m in range(len(W_dec)):
        constant = b_dec[m].to(acc_dtype)
        earlier = [torch.zeros_like(W_dec[j], dtype=acc_dtype) for j in range(m)]
        if m > 0:
            maps = A[m - 1].to(acc_dtype).split(D)
            constant = constant + c[m - 1].to(acc_dtype)
            for j, A_mj in zip(range(m - len(maps), m), maps, strict=True):
                constant = constant + constants[j] @ A_mj
                for source in range(j + 1):
                    earlier[source] = earlier[source] + tables[j][source] @ A_mj
        tables.append([*earlier, W_dec[m].to(acc_dtype)])
        constants.append(constant)
    return Transported(
        [[table.to(dtype) for table in row] for row in tables], [v.to(dtype) for v in constants]
    )


def encode_chain(
    x: Sequence[Tensor],  # L × [..., D]
    weight: Sequence[Tensor],  # L × [M_l, D]
    bias: Sequence[Tensor | None],  # L × [M_l]
    k: Sequence[int],
    W_dec: Sequence[Tensor],
    A: Sequence[Tensor],
    c: Sequence[Tensor],
    *,
    b_dec: Sequence[Tensor],
    loop: str = "open",
) -> tuple[list[SparseCode], list[Tensor]]:
    """Codes and reconstructions of all layers.

    Open loop: the residual of layer l is taken against the prediction from the true activations,
    so that reconstruction errors pass on through the maps. Closed loop: against the prediction from
    the reconstructions so far, so that the error made so far is encoded again (as in DPCM).
    """
    codes: list[SparseCode] = []
    x_hats: list[Tensor] = []
    for layer, x_l in enumerate(x):
        seen = x[:layer] if loop == "open" else x_hats
        prediction = affine_predict(seen, A[layer - 1], c[layer - 1]) if layer > 0 else None
        codes.append(
            topk_encode(
                x_l,
                weight[layer],
                bias[layer],
                k[layer],
                pre_bias=b_dec[layer],
                prediction=prediction,
            )
        )
        x_hats = affine_chain(codes, W_dec, A, c, b_dec=b_dec)
    return codes, x_hats


def online_step(
    x: Tensor,  # [..., D]
    weight: Tensor,  # [M, D]
    bias: Tensor | None,  # [M]
    k: int,
    W_dec: Tensor,  # [M, D]
    *,
    b_dec: Tensor | None = None,  # [D]
    prediction: Tensor | None = None,  # [..., D]
    codes: Sequence[SparseCode] = (),  # m × [..., k_j]
    transported: Transported | None = None,
) -> OnlineStep:
    """Code `z = TopK_k(relu((x − prediction − b_dec) weightᵀ + bias))` and reconstruction
    `x̂ = prediction + b_dec + z W_dec`.

    With `transported` the step is that of layer m = len(codes), closed loop: `prediction + b_dec`
    is the decode of the earlier codes by their transported dictionaries plus `constants[m]`.
    """
    if transported is not None:
        m = len(codes)
        prediction = transported.constants[m].expand_as(x)
        if m > 0:
            acts, indices = [code.acts for code in codes], [code.indices for code in codes]
            prediction = sparse_decode(
                acts, indices, transported.dictionaries[m][:m], bias=prediction
            )
    code = topk_encode(x, weight, bias, k, pre_bias=b_dec, prediction=prediction, sorted=False)
    return OnlineStep(sparse_decode(*code, W_dec, bias=b_dec, prediction=prediction), code)
