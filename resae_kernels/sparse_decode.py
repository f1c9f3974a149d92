"""Sparse decode: y[n] = Σ_j acts[n,j] · W_dec[indices[n,j]] + bias + base[n].

N tokens, k active latents, D width, M latents. 2·N·k·D FLOPs against 2·N·M·D dense; bound by
gathering N·k·D weight elements. Codes of several dictionaries are summed in one call.

Backward: d acts is a sampled product ⟨g[n], W_dec[indices[n,j]]⟩; dW_dec is summed latent by latent
over the codes sorted by latent (`latent_outer`), so that each row is one ordered sum:
deterministic, no atomics, no `[N, M]`. Gao et al. 2024 (arXiv 2406.04093), appendix on sparse
kernels.

Both implementations do this: `torch` with `embedding_bag`, `triton` with the kernels at the end.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resae_kernels import _launch
from resae_kernels._launch import AotCase, tl, triton
from resae_kernels.reference import accumulation_dtype

GATHER_BYTES = 64 << 20
"""Bound on the gathered rows `[n, k, D]` that the torch gradient of the acts holds at once."""


def sparse_decode(
    acts: Tensor | Sequence[Tensor],  # [..., k] fp32|fp64|bf16|fp16
    indices: Tensor | Sequence[Tensor],  # [..., k] int64
    W_dec: Tensor | Sequence[Tensor],  # [M, D]
    *,
    bias: Tensor | None = None,  # [D]
    base: Tensor | None = None,  # [..., D]
    implementation: str | None = None,
) -> Tensor:
    """`Σ_j acts_j · W_dec[indices_j] (+ bias) (+ base)` (formula: `reference.sparse_decode`).

    Args:
        acts: `[..., k]`; or a list, one per dictionary, with the same leading shape.
        indices: `[..., k]` int64, 0 ≤ index < M; or a list.
        W_dec: `[M, D]`, one direction per contiguous row; or a list with the same D.
        bias: `[D]`, added to every token.
        base: `[..., D]`, added token by token.
        implementation: "torch" or "triton", of the gradients too; None: triton on CUDA, otherwise
            torch.

    Returns:
        `[..., D]` in W_dec's dtype.

    Raises:
        TypeError: dtypes that differ or are not floating (int64 for indices).
        ValueError: shapes, devices or list lengths that do not fit.
        RuntimeError: an index outside its dictionary (checked by torch on CPU, nowhere else).

    Note:
        Padding slots (act 0) add nothing to the sum. Gradients reach acts, W_dec, bias and base.
        Under autocast the acts are cast to W_dec's dtype.
    """
    op = "sparse_decode"
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
    if _launch.autocasts(W.device.type):
        acts = [a.to(W.dtype) for a in acts]
        bias, base = (None if t is None else t.to(W.dtype) for t in (bias, base))
    for i in range(len(acts)):
        at = f"[{i}]" if len(acts) > 1 else ""
        _launch.check_codes(op, acts[i], indices[i], at)
        _launch.check_shape(
            op, f"acts{at}", acts[i], (*leading, acts[i].shape[-1]), "the tokens of the first acts"
        )
        if W_dec[i].ndim != 2 or W_dec[i].shape[1] != W.shape[-1]:
            raise ValueError(
                f"{op}: W_dec{at} has shape {list(W_dec[i].shape)}, expected [M, {W.shape[-1]}]"
            )
        _launch.check_like(op, f"W_dec{at}", W_dec[i], f"acts{at}", acts[i])
    N, D = leading.numel(), W.shape[1]
    for name, tensor, shape in (("bias", bias, (D,)), ("base", base, (*leading, D))):
        if tensor is not None:
            _launch.check_shape(op, name, tensor, shape, "tokens of acts, width of W_dec")
            _launch.check_like(op, name, tensor, "W_dec", W)
    out = torch.ops.resae.sparse_decode(
        [a.reshape(N, a.shape[-1]) for a in acts],
        [i.reshape(N, i.shape[-1]) for i in indices],
        list(W_dec),
        bias,
        None if base is None else base.reshape(N, D),
        implementation=implementation or "",
    )
    return out.reshape(*leading, D)


# -- op ------------------------------------------------------------------------------------------


def _decode(
    acts: list[Tensor],
    indices: list[Tensor],
    W_dec: list[Tensor],
    bias: Tensor | None,
    base: Tensor | None,
    *,
    implementation: str = "",
) -> Tensor:
    if _launch.implementation_for("sparse_decode", W_dec[0], implementation or None) == "triton":
        return _launch_decode(acts, indices, W_dec, bias, base)
    # A single sum is rounded once by itself; several terms are added up in the accumulation dtype.
    alone = len(acts) == 1 and bias is None and base is None
    dtype = acts[0].dtype if alone else accumulation_dtype(acts[0].dtype)
    total = _gather_sum(acts[0], indices[0], W_dec[0], dtype)
    for a, i, W in zip(acts[1:], indices[1:], W_dec[1:], strict=True):
        total += _gather_sum(a, i, W, dtype)
    for offset in (bias, base):
        if offset is not None:
            total += offset
    return total.to(acts[0].dtype)


def _gather_sum(acts: Tensor, indices: Tensor, W: Tensor, dtype: torch.dtype) -> Tensor:
    if indices.numel() == 0:
        return W.new_zeros(acts.shape[0], W.shape[1], dtype=dtype)
    indices, W = indices.contiguous(), W.contiguous()
    if dtype != W.dtype and indices.numel() < W.shape[0]:
        # Fewer codes than latents: widen the rows they name, not the whole dictionary.
        W = F.embedding_bag(indices.view(-1, 1), W, mode="sum")
        indices = torch.arange(indices.numel(), device=W.device).view_as(indices)
    weights = acts.to(dtype).contiguous()
    return F.embedding_bag(indices, W.to(dtype), per_sample_weights=weights, mode="sum")


def _decode_fake(acts, indices, W_dec, bias, base, *, implementation=""):  # noqa: ARG001
    return acts[0].new_empty(acts[0].shape[0], W_dec[0].shape[1])


def _setup_context(ctx, inputs, keyword_only_inputs, output) -> None:
    del output
    acts, indices, W_dec, _, _ = inputs
    ctx.implementation = keyword_only_inputs["implementation"]
    ctx.set_materialize_grads(False)
    # acts weigh dW_dec, W_dec gives d acts, indices say where: no activation is kept.
    ctx.save_for_backward(*acts, *indices, *W_dec)


def _backward(ctx, grad):
    n = len(ctx.saved_tensors) // 3
    acts, indices, W_dec = (ctx.saved_tensors[i * n : (i + 1) * n] for i in range(3))
    if grad is None:
        return [None] * n, [None] * n, [None] * n, None, None
    grad = grad.contiguous()
    grad_acts, grad_W = code_gradients(
        acts, indices, W_dec, [grad] * n, _needed(ctx, n), ctx.implementation
    )
    _, _, _, need_bias, need_base = ctx.needs_input_grad
    return (
        grad_acts,
        [None] * n,
        grad_W,
        grad.sum(0) if need_bias else None,
        grad if need_base else None,
    )


def _needed(ctx, n: int) -> list[tuple[bool, bool]]:
    """Per dictionary: does acts, does W_dec need its gradient?"""
    need_acts, _, need_W = ctx.needs_input_grad[:3]

    def flag(need, i: int) -> bool:
        return bool(need[i]) if isinstance(need, (list, tuple)) else bool(need)

    return [(flag(need_acts, i), flag(need_W, i)) for i in range(n)]


def code_gradients(acts, indices, W_dec, grads, needed, implementation):
    """Gradients of each code's acts and of its dictionary, given the gradient of its decode."""
    grad_acts: list[Tensor | None] = []
    grad_W: list[Tensor | None] = []
    for a, i, W, grad, (need_acts, need_W) in zip(acts, indices, W_dec, grads, needed, strict=True):
        grad_acts.append(
            torch.ops.resae.sampled_product(grad, i, W, implementation=implementation)
            if need_acts
            else None
        )
        grad_W.append(latent_outer(a, i, grad, W.shape[0], implementation) if need_W else None)
    return grad_acts, grad_W


# -- the sums of the backward ----------------------------------------------------------------------


def latent_outer(
    acts: Tensor, indices: Tensor, rows: Tensor, M: int, implementation: str = ""
) -> Tensor:
    """`out[m] = Σ_{(n,j): indices[n,j] = m} acts[n,j] · rows[n]`, `[M, D]`: the gradient of a
    dictionary (rows = gradient of the decode) or of an encoder (rows = residual)."""
    return torch.ops.resae.latent_outer(acts, indices, rows, M, implementation=implementation)


def _latent_outer(
    acts: Tensor, indices: Tensor, rows: Tensor, M: int, *, implementation: str = ""
) -> Tensor:
    k = acts.shape[1]
    acts, latents = acts.reshape(-1), indices.reshape(-1)
    # Padding slots would pile up on latent 0: they sort behind the last latent and are cut off.
    latents, order = torch.where(acts != 0, latents, M).int().sort(stable=True)
    bounds = torch.searchsorted(
        latents, torch.arange(M + 1, dtype=torch.int32, device=latents.device)
    )
    tokens, weights = order.div(max(k, 1), rounding_mode="floor"), acts[order]
    if _launch.implementation_for("latent_outer", rows, implementation or None) == "triton":
        return _launch_latent_outer(weights, tokens, bounds, rows)
    used = int(bounds[M])
    return F.embedding_bag(
        tokens[:used],
        rows.contiguous(),
        bounds,
        per_sample_weights=weights[:used],
        mode="sum",
        include_last_offset=True,
    )


def _latent_outer_fake(acts, indices, rows, M, *, implementation=""):  # noqa: ARG001
    return rows.new_empty(M, rows.shape[1])


def latent_sum(acts: Tensor, indices: Tensor, M: int, implementation: str = "") -> Tensor:
    """`out[m] = Σ_{(n,j): indices[n,j] = m} acts[n,j]`, `[M]`: the gradient of an encoder bias."""
    ones = acts.new_ones(acts.shape[0], 1)
    return latent_outer(acts, indices, ones, M, implementation).squeeze(1)


def _sampled_product(
    grad: Tensor, indices: Tensor, W: Tensor, *, implementation: str = ""
) -> Tensor:
    if _launch.implementation_for("sampled_product", W, implementation or None) == "triton":
        return _launch_sampled_product(grad, indices, W)
    N, k, D = *indices.shape, W.shape[1]
    if W.device.type == "cpu" and W.dtype in (torch.float32, torch.float64) and indices.numel():
        # The gradient of `embedding_bag` in its weights is this product, with no row copied.
        return torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad.contiguous(),
            W.contiguous(),
            indices.reshape(-1).contiguous(),
            torch.arange(0, N * k, k),
            torch.arange(N).repeat_interleave(k),
            0,  # mode "sum"
        ).view(N, k)
    wide = accumulation_dtype(W.dtype)
    out = grad.new_empty(N, k)
    rows = max(1, GATHER_BYTES // max(1, k * D * wide.itemsize))
    for start in range(0, N, rows):
        chunk = slice(start, start + rows)
        gathered = W[indices[chunk]].to(wide)
        out[chunk] = (gathered @ grad[chunk].to(wide).unsqueeze(-1)).squeeze(-1).to(out.dtype)
    return out


def _sampled_product_fake(grad, indices, W, *, implementation=""):  # noqa: ARG001
    return grad.new_empty(indices.shape)


_launch.register(
    "sparse_decode(Tensor[] acts, Tensor[] indices, Tensor[] W_dec, Tensor? bias, Tensor? base, "
    "*, str implementation='') -> Tensor",
    _decode,
    _decode_fake,
)
_launch.register(
    "latent_outer(Tensor acts, Tensor indices, Tensor rows, SymInt M, *, str implementation='') "
    "-> Tensor",
    _latent_outer,
    _latent_outer_fake,
)
_launch.register(
    "sampled_product(Tensor grad, Tensor indices, Tensor W, *, str implementation='') -> Tensor",
    _sampled_product,
    _sampled_product_fake,
)
torch.library.register_autograd(
    "resae::sparse_decode", _backward, setup_context=_setup_context, lib=_launch.LIBRARY
)


# -- launchers -------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """How many gathered rows a program loads at a time, and which part of each."""

    rows: int
    row_bytes: int
    num_warps: int

    def constants(self, D: int, dtype: torch.dtype) -> dict[str, Any]:
        """What every kernel here is compiled for."""
        return {
            "D": D,
            "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
            "BD": min(self.row_bytes // dtype.itemsize, triton.next_power_of_2(D)),
        }

    @property
    def loads(self) -> int:
        """128-bit loads of a thread for one pass over the tile."""
        return self.rows * self.row_bytes // (self.num_warps * 512)

    def options(self) -> dict[str, Any]:
        # One stage: pipelined loads would pass through shared memory.
        return _launch.launch_options(self.num_warps, num_stages=1)


# A warp loads 512 bytes at once. Where a row's part is 512 bytes a warp, each thread holds its
# columns of all rows: as many loads in flight as rows, and a sum that crosses no thread.
_launch.TILES |= {
    "decode": _launch.TileTable(
        default=_launch.Chosen(Tile(rows=8, row_bytes=512, num_warps=1), measured=None),
        alternatives=(
            Tile(rows=4, row_bytes=512, num_warps=1),
            Tile(rows=8, row_bytes=1024, num_warps=2),
        ),
    ),
    "decode_few": _launch.TileTable(
        default=_launch.Chosen(Tile(rows=64, row_bytes=128, num_warps=4), measured=None),
        alternatives=(
            Tile(rows=64, row_bytes=64, num_warps=4),
            Tile(rows=32, row_bytes=128, num_warps=4),
        ),
    ),
    "sampled_product": _launch.TileTable(
        default=_launch.Chosen(Tile(rows=16, row_bytes=512, num_warps=4), measured=None),
        alternatives=(
            Tile(rows=8, row_bytes=512, num_warps=2),
            Tile(rows=16, row_bytes=256, num_warps=2),
        ),
    ),
    "latent_outer": _launch.TileTable(
        default=_launch.Chosen(Tile(rows=8, row_bytes=1024, num_warps=2), measured=None),
        alternatives=(
            Tile(rows=8, row_bytes=512, num_warps=1),
            Tile(rows=4, row_bytes=1024, num_warps=2),
        ),
    ),
}
FEW_TOKENS = 16
"""Up to here a decode spreads each token over many narrow programs (cost model, not measured)."""
PIECE = 256
"""Longest run of one latent's entries that one program sums: a latent that fires on every second
token would otherwise keep one program busy long after the rest."""


def _decode_name(N: int) -> str:
    return "decode_few" if N <= FEW_TOKENS else "decode"


def _decode_constants(
    tile: Tile, N: int, widths: tuple[int, ...], D: int, dtype: torch.dtype
) -> dict[str, Any]:
    rows = min(tile.rows, triton.next_power_of_2(max(1, *widths)))
    return {"K": widths, "BK": rows, "SPREAD": N <= FEW_TOKENS} | tile.constants(D, dtype)


def _launch_decode(acts, indices, W_dec, bias, base, out=None) -> Tensor:
    """One launch for all dictionaries. bias and base may be wider than the acts."""
    N, D = acts[0].shape[0], W_dec[0].shape[1]
    if out is None:
        out = acts[0].new_empty(N, D)
    if out.numel() == 0:
        return out
    tile = _launch.tile(_decode_name(N), out.device)
    constants = _decode_constants(tile, N, tuple(a.shape[1] for a in acts), D, out.dtype)
    with torch.cuda.device_of(out):
        # Tokens are the fast axis: all of them pass over one slice of W_dec while it is in cache.
        _decode_kernel[(N, triton.cdiv(D, constants["BD"]))](
            out,
            tuple(a.contiguous() for a in acts),
            tuple(i.contiguous() for i in indices),
            tuple(W.contiguous() for W in W_dec),
            None if bias is None else bias.contiguous(),
            None if base is None else base.contiguous(),
            **constants,
            **tile.options(),
        )
    return out


def _launch_sampled_product(grad: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    N, k = indices.shape
    out = grad.new_empty(N, k)
    if out.numel() == 0:
        return out
    tile = _launch.tile("sampled_product", out.device)
    with torch.cuda.device_of(out):
        _sampled_product_kernel[(N, triton.cdiv(k, tile.rows))](
            out,
            grad.contiguous(),
            indices.contiguous(),
            W.contiguous(),
            K=k,
            BK=tile.rows,
            **tile.constants(W.shape[1], W.dtype),
            **tile.options(),
        )
    return out


def _launch_latent_outer(weights: Tensor, tokens: Tensor, bounds: Tensor, rows: Tensor) -> Tensor:
    """`out[m] = Σ weights[e] · rows[tokens[e]]` over the entries `bounds[m] ≤ e < bounds[m + 1]`.

    The first PIECE entries of a latent are summed by the program that writes its row; what lies
    beyond, before that, in pieces by programs of their own. How many of these there can be follows
    from the shapes: nothing waits for the device.
    """
    M, D = bounds.shape[0] - 1, rows.shape[1]
    out = rows.new_empty(M, D)
    if out.numel() == 0:
        return out
    pieces = weights.shape[0] // PIECE
    # Where PIECE divides the entries of a latent the last of its pieces is empty: zeros.
    beyond = bounds.diff().div(PIECE, rounding_mode="floor")
    piece_bounds = F.pad(beyond.cumsum(0), (1, 0))
    piece_latent = torch.searchsorted(
        piece_bounds[1:], torch.arange(pieces, device=rows.device), right=True
    )
    partial = rows.new_empty(pieces, D, dtype=accumulation_dtype(rows.dtype))
    entries = (weights, tokens, rows.contiguous(), bounds, piece_bounds)
    tile = _launch.tile("latent_outer", out.device)
    constants = {"PIECE": PIECE, "BE": tile.rows} | tile.constants(D, rows.dtype)
    slices = triton.cdiv(D, constants["BD"])
    settings = constants | tile.options()
    with torch.cuda.device_of(out):
        if pieces > 0:
            _latent_piece_kernel[(pieces, slices)](partial, *entries, piece_latent, M, **settings)
        _latent_outer_kernel[(M, slices)](out, *entries, partial, **settings)
    return out


def aot_cases() -> Iterator[AotCase]:
    """Every kernel as it runs at the shapes that matter, for a compiler without a device."""
    D, k = 2048, 64
    i64 = "*i64:16"
    for name, dtype, architectures in (
        ("bf16", torch.bfloat16, ("sm_80", "sm_90", "sm_100")),
        ("fp32", torch.float32, ("sm_90",)),
    ):
        floats = f"*{name}:16"
        for (N, T), tile in (
            (case, tile)
            for case in ((8192, 1), (1, 1), (1, 4))
            for tile in _launch.TILES[_decode_name(case[0])].candidates("other")
        ):
            constants = _decode_constants(tile, N, (k,) * T, D, dtype)
            # Few tokens make few programs: their registers are not what limits them.
            few = {"shared": 1024, "barriers": 5, "registers": 128}
            many = {"shared": 0, "barriers": 0, "registers": 80}
            yield AotCase(
                f"decode {name} N={N} dictionaries={T} {_launch.sizes(tile)}",
                _decode_kernel,
                dict.fromkeys(("acts", "W_dec"), (floats,) * T)
                | {"out": floats, "indices": (i64,) * T, "bias": floats, "base": "*fp32:16"},
                constants,
                *(tile.num_warps, 1),
                (few if constants["SPREAD"] else many)
                | {"matrix": False, "loads_128": T * tile.loads, "instructions": 1000},
                architectures,
            )

        for tile in _launch.TILES["sampled_product"].candidates("other"):
            yield AotCase(
                f"sampled_product {name} {_launch.sizes(tile)}",
                _sampled_product_kernel,
                dict.fromkeys(("out", "grad", "W"), floats) | {"indices": i64},
                {"K": k, "BK": tile.rows} | tile.constants(D, dtype),
                *(tile.num_warps, 1),
                {"matrix": False, "loads_128": tile.loads, "registers": 80, "instructions": 500},
                architectures,
            )

        entries = dict.fromkeys(("weights", "rows"), floats) | dict.fromkeys(
            ("tokens", "bounds", "piece_bounds"), i64
        )
        kernels = (
            # The sum in fp32 changes hands on its way to 16-byte stores.
            (_latent_piece_kernel, {"partial": "*fp32:16", "piece_latent": i64, "M": "i32"}, 2048),
            (_latent_outer_kernel, {"partial": "*fp32:16", "out": floats}, 0),
        )
        for (kernel, others, shared), tile in itertools.product(
            kernels, _launch.TILES["latent_outer"].candidates("other")
        ):
            kernel_name = kernel.__name__.strip("_").removesuffix("_kernel")
            yield AotCase(
                f"{kernel_name} {name} {_launch.sizes(tile)}",
                kernel,
                entries | others,
                {"PIECE": PIECE, "BE": tile.rows} | tile.constants(D, dtype),
                *(tile.num_warps, 1),
                {
                    "matrix": False,
                    "shared": shared,
                    "loads_128": tile.loads,
                    "registers": 80,
                    "instructions": 1000,
                },
                architectures,
            )


# -- kernels ---------------------------------------------------------------------------------------


@triton.jit
def _decode_kernel(
    out,  # [N, D]
    acts,  # T × [N, K[t]]
    indices,  # T × [N, K[t]]
    W_dec,  # T × [M_t, D]
    bias,  # [D] or None
    base,  # [N, D] or None
    K: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    SPREAD: tl.constexpr,  # sum each of the BK rows apart until the end: one sum across threads
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    # [1 or BK, BD]
    b_sum = tl.zeros([BK if SPREAD else 1, BD], ACC)
    for t in tl.static_range(len(K)):  # type: ignore
        for i_k in range(0, K[t], BK):
            o_k = i_k + tl.arange(0, BK)
            m_k = o_k < K[t]
            # [BK]
            b_index = tl.load(indices[t] + i_n * K[t] + o_k, mask=m_k, other=0)
            b_act = tl.load(acts[t] + i_n * K[t] + o_k, mask=m_k, other=0.0).to(ACC)
            # [BK, BD]
            p_row = W_dec[t] + b_index[:, None] * D + o_d[None, :]
            b_row = tl.load(p_row, mask=m_k[:, None] & m_d[None, :], other=0.0).to(ACC)
            b_product = b_act[:, None] * b_row
            b_sum += b_product if SPREAD else tl.sum(b_product, 0, keep_dims=True)
    b_sum = tl.sum(b_sum, 0)
    if bias is not None:
        b_sum += tl.load(bias + o_d, mask=m_d, other=0.0).to(ACC)
    if base is not None:
        b_sum += tl.load(base + i_n * D + o_d, mask=m_d, other=0.0).to(ACC)
    tl.store(out + i_n * D + o_d, b_sum.to(out.dtype.element_ty), mask=m_d)


@triton.jit
def _sampled_product_kernel(
    out,  # [N, K]
    grad,  # [N, D]
    indices,  # [N, K]
    W,  # [M, D]
    K: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    m_k = o_k < K
    # [BK]
    b_index = tl.load(indices + i_n * K + o_k, mask=m_k, other=0)
    # [BK, BD], summed over columns once at the end: that sum crosses threads.
    b_products = tl.zeros([BK, BD], ACC)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_d = o_d < D
        b_grad = tl.load(grad + i_n * D + o_d, mask=m_d, other=0.0).to(ACC)
        p_row = W + b_index[:, None] * D + o_d[None, :]
        b_row = tl.load(p_row, mask=m_k[:, None] & m_d[None, :], other=0.0).to(ACC)
        b_products += b_grad[None, :] * b_row
    tl.store(out + i_n * K + o_k, tl.sum(b_products, 1).to(out.dtype.element_ty), mask=m_k)


@triton.jit
def _sum_entries(
    weights,
    tokens,
    rows,
    i_first,
    i_last,
    o_d,
    D: tl.constexpr,
    ACC: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
):
    """Columns `o_d` of `Σ weights[e] · rows[tokens[e]]` over the entries `i_first ≤ e < i_last`."""
    m_d = o_d < D
    # [BD]
    b_sum = tl.zeros([BD], ACC)
    for i_e in range(i_first, i_last, BE):
        o_e = i_e + tl.arange(0, BE)
        m_e = o_e < i_last
        # [BE]
        b_token = tl.load(tokens + o_e, mask=m_e, other=0)
        b_weight = tl.load(weights + o_e, mask=m_e, other=0.0).to(ACC)
        # [BE, BD]
        p_row = rows + b_token[:, None] * D + o_d[None, :]
        b_row = tl.load(p_row, mask=m_e[:, None] & m_d[None, :], other=0.0).to(ACC)
        b_sum += tl.sum(b_weight[:, None] * b_row, 0)
    return b_sum


@triton.jit
def _latent_piece_kernel(
    partial,  # [pieces, D]
    weights,  # [N·k], sorted by latent
    tokens,  # [N·k]
    rows,  # [N, D]
    bounds,  # [M + 1], of the latents in weights and tokens
    piece_bounds,  # [M + 1], of the latents in partial
    piece_latent,  # [pieces]; M where there is no such piece
    M,
    D: tl.constexpr,
    ACC: tl.constexpr,
    PIECE: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
):
    i_p = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    i_m = tl.load(piece_latent + i_p)
    if i_m < M:
        i_first = tl.load(bounds + i_m) + (i_p - tl.load(piece_bounds + i_m) + 1) * PIECE
        i_last = tl.minimum(i_first + PIECE, tl.load(bounds + i_m + 1))
        b_sum = _sum_entries(weights, tokens, rows, i_first, i_last, o_d, D, ACC, BE, BD)
        tl.store(partial + i_p * D + o_d, b_sum, mask=o_d < D)


@triton.jit
def _latent_outer_kernel(
    out,  # [M, D]
    weights,  # [N·k], sorted by latent
    tokens,  # [N·k]
    rows,  # [N, D]
    bounds,  # [M + 1], of the latents in weights and tokens
    piece_bounds,  # [M + 1], of the latents in partial
    partial,  # [pieces, D]
    D: tl.constexpr,
    ACC: tl.constexpr,
    PIECE: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
):
    i_m = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    i_first = tl.load(bounds + i_m)
    i_last = tl.minimum(i_first + PIECE, tl.load(bounds + i_m + 1))
    b_sum = _sum_entries(weights, tokens, rows, i_first, i_last, o_d, D, ACC, BE, BD)
    for i_p in range(tl.load(piece_bounds + i_m), tl.load(piece_bounds + i_m + 1)):
        b_sum += tl.load(partial + i_p * D + o_d, mask=m_d, other=0.0)
    tl.store(out + i_m * D + o_d, b_sum.to(out.dtype.element_ty), mask=m_d)
