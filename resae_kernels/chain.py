"""Chained affine back-projection: x̂_l = Σ_{sources j} x̂_j A_lj + c_l + z_l W_dec_l + b_dec_l.

Codes of L layers → reconstructions of L layers, by one of two algorithms:

sequential   a sparse decode per layer and a GEMM of 2·N·D² FLOPs per source
transported  dictionaries transported through the maps beforehand, `D_{m←l} = W_dec_l A_{l+1} … A_m`
             (L(L−1)/2 further `[M, D]` tables), so that x̂_m is one gather over all codes up to m,
             without a GEMM: for few tokens

ReSAE, arXiv 2605.27819.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resae_kernels import checks
from resae_kernels.cpu.private_torch import refuse_forward_mode
from resae_kernels.decode import check_decode, reconstruct, sparse_decode
from resae_kernels.dispatch import (
    LIBRARY,
    check_once,
    implementation_for,
    register,
    triton_signature,
)
from resae_kernels.gradients import code_gradients
from resae_kernels.precision import cast, gemm
from resae_kernels.types import (
    ChainAlgorithm,
    Implementation,
    SparseCode,
    Transported,
    accumulation_dtype,
)

TRANSPORTED_TOKENS = 32
"""Tokens × (layers − 1) up to which gathering transported rows beats the GEMMs, which read A once
for all tokens (from a cost model, not measured)."""


def affine_chain(
    codes: Sequence[SparseCode | tuple[Tensor, Tensor]],  # L × ([..., k_l], [..., k_l])
    W_dec: Sequence[Tensor],  # L × [M_l, D]
    A: Sequence[Tensor],  # (L-1) × [s_l·D, D]
    c: Sequence[Tensor],  # (L-1) × [D]
    *,
    b_dec: Sequence[Tensor],  # L × [D]
    transported: Transported | None = None,
    algorithm: ChainAlgorithm | None = None,
    implementation: Implementation | None = None,
) -> list[Tensor]:
    """Reconstructions of all layers from their codes (formula: `reference.affine_chain`).

    Args:
        codes: one `(acts, indices)` per layer, `[..., k_l]`, the same tokens in each.
        W_dec: one `[M_l, D]` per layer.
        A: one `[s·D, D]` per layer but the first: `A[l-1]` maps the `s` layers before l, stacked
            in order, to layer l. s = 1: from the previous layer; s = l: from all previous ones.
        c: one `[D]` per layer but the first.
        b_dec: one `[D]` per layer.
        transported: result of `transport(W_dec, A, c, b_dec=b_dec)`; the transported algorithm
            needs it.
        algorithm: "sequential", "transported", or None: transported where `transported` is given
            and the tokens are few (N · (L − 1) ≤ TRANSPORTED_TOKENS), otherwise sequential.
        implementation: "torch" or "triton", of the gradients too; None: triton on CUDA, otherwise
            torch.

    Returns:
        L tensors `[..., D]` in W_dec's dtype.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or lengths that do not fit.

    Note:
        Sequential: gradients reach every floating input through each output. Transported: they
        reach the acts and the transported dictionaries and constants, not W_dec, A, c and b_dec.
        Pass algorithm="sequential" if you need more gradients than those of the acts. Under
        autocast the acts are cast to W_dec's dtype and GEMMs stay in it. Each decode chooses
        between gather and dense by the rule of `sparse_decode`.
    """
    flat = [t for code in codes for t in code]
    given = *W_dec, *flat, *A, *c, *b_dec
    signature = triton_signature(implementation, *given) if W_dec else None
    if signature:
        lengths = len(W_dec), len(codes), len(A), len(c), len(b_dec)
        check_once(_PASSED, (lengths, signature), lambda: _check(_named(codes), W_dec, A, c, b_dec))
    else:
        codes = _named(codes)
        _check(codes, W_dec, A, c, b_dec)
    leading = codes[0][0].shape[:-1]
    if _by_transport(algorithm, transported, len(codes), leading.numel()):
        assert transported is not None
        if signature and len(leading) == 1:
            x_hats = _transported_past_dispatcher(codes, transported, signature, implementation)
            if x_hats is not None:
                return x_hats
        return _transported_chain(_named(codes), transported, implementation)
    if signature and len(leading) == 1:  # eager calls skip the dispatcher
        acts, indices = zip(*codes, strict=True)
        return _chain(acts, indices, W_dec, A, c, b_dec, implementation="triton")
    codes, N = _named(codes), leading.numel()
    op = _chain if signature else torch.ops.resae.affine_chain
    x_hats = op(
        [code.acts.to(W_dec[0].dtype).reshape(N, code.acts.shape[-1]) for code in codes],
        [code.indices.reshape(N, code.indices.shape[-1]) for code in codes],
        list(W_dec),
        list(A),
        list(c),
        list(b_dec),
        implementation=implementation or "",
    )
    return [x_hat.reshape(*leading, x_hat.shape[-1]) for x_hat in x_hats]


def _by_transport(
    algorithm: str | None, transported: Transported | None, L: int, tokens: int
) -> bool:
    """Should `affine_chain` decode by transported dictionaries? Raises ValueError for arguments
    that do not go together."""
    if algorithm not in (None, "sequential", "transported"):
        raise ValueError(
            f"affine_chain: algorithm={algorithm!r}, expected 'sequential', 'transported' or None "
            f"(by the number of tokens)"
        )
    if transported is None:
        if algorithm == "transported":
            raise ValueError(
                "affine_chain: algorithm='transported' needs transported; build it with transport()"
            )
        return False
    if len(transported.dictionaries) != L:
        raise ValueError(
            f"affine_chain: transported covers {len(transported.dictionaries)} layers, codes "
            f"{L}; build it with transport() from the same W_dec, A and c"
        )
    if algorithm is None:
        return tokens * (L - 1) <= TRANSPORTED_TOKENS
    return algorithm == "transported"


def _transported_chain(
    codes: Sequence[SparseCode], transported: Transported, implementation: Implementation | None
) -> list[Tensor]:
    """Reconstructions by one sparse decode per layer, of its code and all before it."""
    return [
        sparse_decode(
            [code.acts for code in codes[: m + 1]],
            [code.indices for code in codes[: m + 1]],
            transported.dictionaries[m],
            bias=transported.constants[m],
            implementation=implementation,
        )
        for m in range(len(codes))
    ]


_PASSED: set[Any] = set()


def _named(codes: Sequence[SparseCode | tuple[Tensor, Tensor]]) -> list[SparseCode]:
    return [SparseCode(*code) for code in codes]


def _transported_past_dispatcher(
    codes: Sequence[SparseCode | tuple[Tensor, Tensor]],
    transported: Transported,
    signature: tuple[Any, ...],
    implementation: str | None,
) -> list[Tensor] | None:
    """The transported algorithm by Triton for codes `[N, k]`, its arguments checked once per
    signature; None: `sparse_decode` finds its own way."""
    dictionaries, constants = transported
    tables = [table for row in dictionaries for table in row]
    whole = triton_signature(implementation, *tables, *constants)
    if whole is None:
        return None
    acts, indices = zip(*codes, strict=True)

    def check() -> None:
        for m, (row, constant) in enumerate(zip(dictionaries, constants, strict=True)):
            check_decode("sparse_decode", acts[: m + 1], indices[: m + 1], row, {"bias": constant})

    check_once(_PASSED, (tuple(map(len, dictionaries)), signature, whole), check)
    return [
        reconstruct(acts[: m + 1], indices[: m + 1], row, constants[m], None, None, "triton")[0]
        for m, row in enumerate(dictionaries)
    ]


def transport(
    W_dec: Sequence[Tensor],  # L × [M_l, D]
    A: Sequence[Tensor],  # (L-1) × [s_l·D, D]
    c: Sequence[Tensor],  # (L-1) × [D]
    *,
    b_dec: Sequence[Tensor],  # L × [D]
) -> Transported:
    """Transport every dictionary to every later layer (formula: `reference.transport`).

    L(L−1)/2 new tables `[M, D]`, 2·M·D² FLOPs each, summed in fp32 and rounded once; the table of
    a layer itself is W_dec's own memory. For inference: detached, and the transported tables do not
    follow later changes of W_dec, A or c.
    """
    _check([], W_dec, A, c, b_dec)
    # Detached inputs, not no_grad: a table that is W_dec itself would still require its gradient.
    W_dec, A, c, b_dec = ([t.detach() for t in tensors] for tensors in (W_dec, A, c, b_dec))
    (D, dtype), L = (W_dec[0].shape[1], W_dec[0].dtype), len(W_dec)
    acc_dtype = accumulation_dtype(dtype)
    tables: list[list[Tensor]] = []
    constants: list[Tensor] = []
    for m in range(L):
        maps = A[m - 1].to(acc_dtype).split(D) if m else ()
        sources = list(zip(range(m - len(maps), m), maps, strict=True))
        constant = b_dec[m].to(acc_dtype)
        if m:
            constant = constant + c[m - 1].to(acc_dtype)
        for j, A_mj in sources:
            constant = constant + constants[j] @ A_mj
        constants.append(constant)
        earlier = []
        for layer in range(m):
            total = None
            for j, A_mj in sources:
                if layer <= j:
                    total = gemm(tables[j][layer], A_mj, total)
            earlier.append(
                W_dec[layer].new_zeros(W_dec[layer].shape, dtype=acc_dtype)
                if total is None
                else total
            )
        tables.append([*earlier, W_dec[m].to(acc_dtype)])
    return Transported(
        [[table.to(dtype) for table in row] for row in tables], [v.to(dtype) for v in constants]
    )


def _check(
    codes: Sequence[SparseCode],
    W_dec: Sequence[Tensor],
    A: Sequence[Tensor],
    c: Sequence[Tensor],
    b_dec: Sequence[Tensor],
) -> None:
    op = "affine_chain"
    refuse_forward_mode(op)
    L = len(W_dec)
    if L == 0:
        raise ValueError(f"{op}: W_dec is empty, expected one dictionary per layer")
    lengths = {"A": (len(A), L - 1), "c": (len(c), L - 1), "b_dec": (len(b_dec), L)}
    if codes:
        lengths["codes"] = (len(codes), L)
    for name, (got, expected) in lengths.items():
        if got != expected:
            raise ValueError(f"{op}: {name} has {got} entries, expected {expected} for {L} layers")
    D = W_dec[0].shape[-1]
    for layer in range(L):
        at = f"[{layer}]"
        if W_dec[layer].ndim != 2 or W_dec[layer].shape[1] != D:
            raise ValueError(
                f"{op}: W_dec{at} has shape {list(W_dec[layer].shape)}, expected [M, {D}]"
            )
        checks.check_like(op, f"W_dec{at}", W_dec[layer], "W_dec[0]", W_dec[0])
        checks.check_shape(op, f"b_dec{at}", b_dec[layer], (D,), "width of W_dec")
        checks.check_like(op, f"b_dec{at}", b_dec[layer], "W_dec[0]", W_dec[0])
        if codes:
            acts, indices = codes[layer]
            checks.check_codes(op, acts, indices, at)
            expected = (*codes[0].acts.shape[:-1], acts.shape[-1])
            checks.check_shape(op, f"acts{at}", acts, expected, "the tokens of the first code")
            if not checks.autocasts(acts.device.type):
                checks.check_like(op, f"acts{at}", acts, "W_dec[0]", W_dec[0])
        if layer == 0:
            continue
        at = f"[{layer - 1}]"
        maps = A[layer - 1]
        if maps.ndim != 2 or maps.shape[1] != D or maps.shape[0] not in range(D, layer * D + 1, D):
            raise ValueError(
                f"{op}: A{at} has shape {list(maps.shape)}, expected [s·{D}, {D}] with "
                f"1 ≤ s ≤ {layer} sources"
            )
        checks.check_like(op, f"A{at}", maps, "W_dec[0]", W_dec[0])
        checks.check_shape(op, f"c{at}", c[layer - 1], (D,), "width of W_dec")
        checks.check_like(op, f"c{at}", c[layer - 1], "W_dec[0]", W_dec[0])


# -- op ------------------------------------------------------------------------------------------


def _chain(
    acts: Sequence[Tensor],
    indices: Sequence[Tensor],
    W_dec: Sequence[Tensor],
    A: Sequence[Tensor],
    c: Sequence[Tensor],
    b_dec: Sequence[Tensor],
    *,
    implementation: str = "",
) -> list[Tensor]:
    chosen = implementation_for("affine_chain", acts[0], implementation or None)
    acc_dtype = accumulation_dtype(acts[0].dtype)
    x_hats: list[Tensor] = []
    for layer in range(len(acts)):
        bias, prediction = b_dec[layer], None
        if layer > 0:
            # Prediction and constants stay in the accumulation dtype: one rounding per layer, here.
            prediction = _map_sources(x_hats, A[layer - 1])
            bias = cast(bias, acc_dtype) + c[layer - 1]
        code = [acts[layer]], [indices[layer]], [W_dec[layer]]
        x_hats.append(reconstruct(*code, bias, prediction, None, chosen)[0])
    return x_hats


def _map_sources(sources: list[Tensor], A: Tensor) -> Tensor:
    """`affine_predict` without its constant: the most recent sources times A, not yet rounded."""
    count = A.shape[0] // A.shape[1]
    return gemm(sources[-1] if count == 1 else torch.cat(sources[-count:], dim=-1), A)


def _chain_fake(
    acts: list[Tensor], _indices: object, W_dec: list[Tensor], *_: object, **_options: object
) -> list[Tensor]:
    return [a.new_empty(a.shape[0], W_dec[0].shape[1]) for a in acts]


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: list[Tensor]
) -> None:
    acts, indices, W_dec, A, _, _ = inputs
    ctx.implementation = keyword_only_inputs["implementation"]
    ctx.set_materialize_grads(False)
    ctx.layers = len(acts)
    # x̂ of every layer but the last gives dA; the rest as in sparse_decode.
    ctx.save_for_backward(*acts, *indices, *W_dec, *A, *output)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    L = ctx.layers
    saved = list(ctx.saved_tensors)
    acts, indices, W_dec = saved[:L], saved[L : 2 * L], saved[2 * L : 3 * L]
    A, x_hats = saved[3 * L : 4 * L - 1], saved[4 * L - 1 :]
    D = W_dec[0].shape[1]
    total = [torch.zeros_like(x) if g is None else g for x, g in zip(x_hats, grads, strict=True)]
    grad_A: list[Tensor] = []
    for layer in range(L - 1, 0, -1):
        sources = A[layer - 1].shape[0] // D
        back = (total[layer] @ A[layer - 1].T).split(D, dim=-1)
        for source, piece in zip(range(layer - sources, layer), back, strict=True):
            total[source] = total[source] + piece
        recent = torch.cat(x_hats[layer - sources : layer], dim=-1)
        grad_A.insert(0, recent.T @ total[layer])
    grad_acts, grad_W = code_gradients(
        acts, indices, W_dec, total, [(True, True)] * L, implementation=ctx.implementation
    )
    sums = [g.sum(0) for g in total]
    return grad_acts, [None] * L, grad_W, grad_A, sums[1:], sums


register(
    "affine_chain(Tensor[] acts, Tensor[] indices, Tensor[] W_dec, Tensor[] A, Tensor[] c, "
    "Tensor[] b_dec, *, str implementation='') -> Tensor[]",
    _chain,
    _chain_fake,
)
torch.library.register_autograd(
    "resae::affine_chain", _backward, setup_context=_setup_context, lib=LIBRARY
)
