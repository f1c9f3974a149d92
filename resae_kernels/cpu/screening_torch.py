"""Screening by torch's own operations, where the compiled library (`native.c`) is missing.

The mathematics is in `screened.py`. Screens float32 only. The integer GEMM is oneDNN's quantised
linear op (`private_torch.int8_linear`).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from resae_kernels.cpu.private_torch import gathered_dot, int8_linear, int8_pack
from resae_kernels.cpu.selection import descending, select
from resae_kernels.precision import residual
from resae_kernels.screening_bounds import (
    LANES,
    ROUNDING,
    STEPS,
    ScreenedRows,
    StaleCopyError,
    certain_bounds,
    draw_dither,
    statistical_bounds,
)

ROWS = 256
"""Rows screened at a time: their scores stay in the cache."""
BLOCK = 2048
"""Rows whose candidates are scored together, so that the weight is read once for all of them."""
CANDIDATES = 1 / 4
"""A row with more candidates than this share of the latents takes the exact path."""
OUTLIER = 12.0
"""Multiple of its row's root mean square from which on an entry of the residual would stretch the
row's step: its dimension is multiplied exactly."""
OUTLIER_DIMENSIONS = 16
"""Largest number of dimensions that are multiplied exactly."""


class TorchCopy(NamedTuple):
    """Quantised copy of the weight and its bounds: M' latents, M up to a multiple of 32."""

    weight: Tensor
    """`[M, D]`, contiguous: the caller's own memory if that is."""
    bias: Tensor | None
    """`[M]`, the caller's own memory."""
    packed: Tensor
    """q of the weight, 8 bit, as oneDNN lays it out."""
    steps: Tensor
    """`[M']`, s: the step of each row."""
    shift: Tensor
    """`[M']`, −s · q·(u − ½) with u the dither of the residual."""
    zero_points: Tensor
    """`[M']`, of the weight: 0."""
    dither: Tensor
    """`[D]`, u."""
    centre: Tensor
    """`[D]`, u − ½."""
    weight_dither: Tensor
    """`[D]`, less ½."""
    terms: Tensor
    """`[2 + c, M']`: steps, bias (−inf past the last latent) and bounds, which are added to the
    product with a factor of each row's own."""
    ratio: float | None
    """The weight's steps over its norms, of the median latent; None: certain margin."""
    largest_bias: float
    largest_bound: float
    """Over all latents, of the last of the bounds."""
    columns: dict[int, Tensor]
    """Columns `[M']` of the weight at outlier dimensions met so far: they are the model's, call
    after call, and a column of the weight itself lies scattered over all of it."""

    widths: dict[int, Tensor]
    """`[c, M' / group]`: the largest bounds of each group, by the size of a group."""

    @property
    def bounds(self) -> Tensor:
        """`[c, M']`: in a row with factors g, λ_j = Σ_c g_c · bounds[c, j]."""
        return self.terms[2:]

    def encode(
        self,
        x: Tensor,
        k: int,
        pre_bias: Tensor | None,
        prediction: Tensor | None,
        sorted: bool,
        threshold: Tensor | None = None,
    ) -> ScreenedRows:
        """Codes, as `ScreeningCopy.encode`, float32."""
        rest = residual(x, pre_bias, prediction)
        if len(rest) == 1 and threshold is None:
            found = _encode_row(self, rest, k, sorted)
            if found is not None:
                return found
        codes, left, candidates, counts = [], [], 0, []
        for start in range(0, len(rest), BLOCK):
            block = rest[start : start + BLOCK]
            found, scores = _score(self, block, k, threshold)
            candidates += len(scores)
            if threshold is not None:
                found, scores = _above(found, scores, threshold)
                counts.append(torch.bincount(found.rows, minlength=len(block)))
            codes.append(_select_candidates(found, scores, len(block), k, sorted))
            if len(found.exact_rows):
                left.append(found.exact_rows + start)
        acts, indices = (torch.cat(parts) for parts in zip(*codes, strict=True))
        n_active = torch.cat(counts).int() if counts else None
        return ScreenedRows(acts, indices, torch.cat(left) if left else None, candidates, n_active)

    def width(self, group: int) -> Tensor:
        if group not in self.widths:
            groups = len(self.steps) // group
            self.widths[group] = self.bounds.view(-1, group, groups).amax(1)
        return self.widths[group]

    def column(self, dimension: int) -> Tensor:
        column = self.columns.get(dimension)
        if column is None:
            column = torch.zeros_like(self.steps)
            column[: len(self.weight)] = self.weight[:, dimension]
            if len(self.columns) < 4 * OUTLIER_DIMENSIONS:
                self.columns[dimension] = column
        return column


def quantise(weight: Tensor, bias: Tensor | None, margin: str, seed: int) -> TorchCopy | None:
    """The 8-bit copy of `weight [M, D]`, float32; None if weight or bias are not finite."""
    M, D = weight.shape
    padded = -(-M // LANES) * LANES
    dither, weight_dither = draw_dither(seed, D)
    q = weight.new_zeros(padded, D, dtype=torch.int8)
    steps, shift, error, norm, size = weight.new_zeros(5, padded)
    rows_at_once = max(1, (512 << 10) // (4 * D))  # in the cache from one pass to the next
    for start in range(0, M, rows_at_once):
        chunk = slice(start, min(start + rows_at_once, M))
        rows = weight[chunk]
        step = rows.abs().amax(1, keepdim=True).clamp_min_(1e-30).div_(STEPS)
        levels = torch.addcmul(weight_dither + 0.5, rows, 1.0 / step).floor_()
        q[chunk] = levels
        steps[chunk] = step.squeeze(1)
        shift[chunk] = -steps[chunk] * (levels @ (dither - 0.5))
        size[chunk] = rows.norm(dim=1)
        if margin == "certain":
            rebuilt = (levels - weight_dither).mul_(step)
            error[chunk] = (rows - rebuilt).norm(dim=1)
            norm[chunk] = rebuilt.norm(dim=1)
    largest = 0.0 if bias is None else float(bias.abs().max())
    if not math.isfinite(largest) or not bool(size.isfinite().all()):
        return None
    certain = margin == "certain"
    bounds = certain_bounds(error, norm, D) if certain else statistical_bounds(steps, size, M, D)
    all_bias = weight.new_full((padded,), -math.inf)
    all_bias[:M] = 0.0 if bias is None else bias
    return TorchCopy(
        weight.contiguous(),
        bias,
        int8_pack(q, ROWS),
        steps,
        shift,
        steps.new_zeros(padded, dtype=torch.int64),
        dither,
        dither - 0.5,
        weight_dither,
        torch.cat([torch.stack([steps, all_bias]), bounds.terms]),
        None if certain else bounds.ratio,
        largest,
        float(bounds.terms[-1].max()),
        {},
        {},
    )


def _int8_gemm(copy: TorchCopy, levels: Tensor) -> Tensor:
    """`[n, M']` float32: `steps · (levels @ weight's q) + shift`."""
    unsigned = (levels + 128.0).to(torch.uint8)
    return int8_linear(unsigned, copy.packed, copy.steps, copy.zero_points, copy.shift)


# -- screening -------------------------------------------------------------------------------------


class _Candidates(NamedTuple):
    """Pairs (row, latent) among which the TopK of every screened row are."""

    rows: Tensor
    """`[P]`, ascending."""
    latents: Tensor
    """`[P]`, ascending within a row."""
    middle: Tensor
    """`[P]`, ŝ."""
    width: Tensor
    """`[P]`: bound on the distance of the exact score, itself a float32 sum, from ŝ."""
    exact_rows: Tensor
    """Rows that have no candidates here and are left to the exact path."""

    @classmethod
    def join(cls, parts: "list[_Candidates]", rows: int) -> "_Candidates":
        """Concatenate the candidates of consecutive chunks of `rows` rows."""
        if len(parts) == 1:
            return parts[0]
        moved = [
            part._replace(rows=part.rows + i * rows, exact_rows=part.exact_rows + i * rows)
            for i, part in enumerate(parts)
        ]
        return cls(*(torch.cat(field) for field in zip(*moved, strict=True)))


class _Upper(NamedTuple):
    """Upper bounds of the scores of n rows, in units of each row's step."""

    scores: Tensor
    """`[n, M']`, ŝ + λ."""
    factors: Tensor
    """`[n, c]`: λ = factors @ bounds."""
    step: Tensor
    """`[n]`, t."""
    norm: Tensor
    """`[n]`, ‖r‖ / t."""
    screened: Tensor | None
    """`[n]` bool: False for rows that are not finite or all zero, whose bounds mean nothing. None:
    True for all rows."""


def _upper(copy: TorchCopy, rest: Tensor) -> _Upper:
    """Bounds of the scores of residuals `[n, D]`, from the 8-bit copy."""
    norm, peak = rest.norm(dim=1), rest.abs().amax(1)
    inner, inner_norm = rest, norm
    outliers: list[int] = []
    if not bool((peak * math.sqrt(rest.shape[1]) <= OUTLIER * norm).all()):
        outliers = _outlier_dimensions(rest, norm)
        inner = rest.clone()
        inner[:, outliers] = 0.0
        inner_norm, peak = inner.norm(dim=1), inner.abs().amax(1)
    step = peak / STEPS
    screened = (step > 1e-30) & norm.isfinite()
    if bool(screened.all()):
        screened = None
    else:
        step = torch.where(screened, step, 1.0)
        inner = torch.where(screened.unsqueeze(1), inner, 0.0)
    inverse = 1.0 / step
    scaled = inner * inverse.unsqueeze(1)
    levels = (scaled + copy.dither).floor_()
    scores = _int8_gemm(copy, levels)

    centred = levels - copy.centre  # r̂
    norm, inner_norm = norm * inverse, inner_norm * inverse
    rounding = ROUNDING * norm
    if copy.ratio is None:
        error = (scaled - centred).norm(dim=1)
        factors = torch.stack([inner_norm, error + rounding], dim=1)
    else:
        factors = ((copy.ratio * inner_norm).square() + 1.0).sqrt_() + rounding
        factors = factors.unsqueeze(1)
    # Besides the GEMM a few terms of rank 1, in one pass.
    left = [-(centred @ copy.weight_dither), inverse, *factors.T]
    right = copy.terms
    if outliers:
        left += [rest[:, dimension] * inverse for dimension in outliers]
        right = torch.cat([right, torch.stack([copy.column(d) for d in outliers])])
    scores.addmm_(torch.stack(left, dim=1), right)
    return _Upper(scores, factors, step, norm, screened)


def _upper_row(copy: TorchCopy, row: Tensor) -> tuple[Tensor, float, float, float] | None:
    """`_upper` of one residual `[D]`, `(scores [M'], factor, step, norm)`; None if it is not an
    ordinary one, or the margin is not statistical."""
    entries = row.numpy()
    norm, peak = math.sqrt(entries.dot(entries)), float(max(entries.max(), -entries.min()))
    step = peak / STEPS
    ordinary = step > 1e-30 and peak * math.sqrt(len(row)) <= OUTLIER * norm < math.inf
    if not ordinary or copy.ratio is None:
        return None
    levels = torch.add(copy.dither, row, alpha=1.0 / step).floor_()
    scores = _int8_gemm(copy, levels.unsqueeze(0))
    along = float(levels.sub_(copy.centre).dot(copy.weight_dither))
    norm /= step
    factor = math.sqrt((copy.ratio * norm) ** 2 + 1.0) + ROUNDING * norm
    scores.addmm_(row.new_tensor([[-along, 1.0 / step, factor]]), copy.terms)
    return scores[0], factor, step, norm


def _screen(copy: TorchCopy, rest: Tensor, k: int, threshold: Tensor | None) -> _Candidates:
    """Candidates of the residuals `[n, D]`: for the k best latents, or all above `threshold
    [M]`."""
    if threshold is not None:
        return _screen_by_threshold(copy, rest, threshold)
    M, padded = len(copy.weight), len(copy.steps)
    bounds = _upper(copy, rest)
    upper, factors, step, _, screened = bounds
    group = group_size(M, k)
    assert group is not None
    groups = padded // group
    # Groups are strided, so that their maxima are taken along contiguous lanes.
    upper = upper.view(-1, group, groups)
    best = upper.amax(1)
    slack = (ROUNDING * copy.largest_bias) / step
    # k groups, hence k latents, have a score of at least this; and so have the TopK.
    least = (best - 2.0 * (factors @ copy.width(group))).topk(k, dim=1).values[:, -1].clamp_min_(
        0.0
    ) - slack
    promising = best >= least.unsqueeze(1)
    if screened is not None:
        promising &= screened.unsqueeze(1)
    rows, first = promising.nonzero(as_tuple=True)
    members = upper[rows, :, first]  # [pairs, group]
    pair, member = (members >= least[rows].unsqueeze(1)).nonzero(as_tuple=True)
    key, order = (rows[pair] * padded + first[pair] + member * groups).sort()
    rows, latents, high = key // padded, key % padded, members[pair, member][order]
    return _with_widths(copy, bounds, rows, latents, high, slack)


def _screen_by_threshold(copy: TorchCopy, rest: Tensor, threshold: Tensor) -> _Candidates:
    """Candidates of the residuals `[n, D]`: latents whose upper bound reaches their threshold."""
    bounds = _upper(copy, rest)
    slack = (ROUNDING * copy.largest_bias) / bounds.step
    upper = bounds.scores[:, : len(threshold)]
    # `clamp_min` keeps NaN, which no bound reaches.
    least = torch.addcmul(-slack.unsqueeze(1), threshold.clamp_min(0.0), 1.0 / bounds.step[:, None])
    reached = upper >= least
    if bounds.screened is not None:
        reached &= bounds.screened.unsqueeze(1)
    rows, latents = reached.nonzero(as_tuple=True)
    return _with_widths(copy, bounds, rows, latents, upper[rows, latents], slack)


def _with_widths(
    copy: TorchCopy, bounds: _Upper, rows: Tensor, latents: Tensor, high: Tensor, slack: Tensor
) -> _Candidates:
    """These pairs with what their exact scores can be; rows with too many pairs are left out."""
    M = len(copy.weight)
    _, factors, step, norm, screened = bounds
    if len(rows) > CANDIDATES * M:
        bounded = torch.bincount(rows, minlength=len(step)) <= CANDIDATES * M
        screened = bounded if screened is None else screened & bounded
        few = screened[rows]
        rows, latents, high = rows[few], latents[few], high[few]
    bound = (factors[rows] * copy.bounds[:, latents].T).sum(1)
    # The exact score is a float32 sum itself.
    width = bound + slack[rows] + 16 * ROUNDING * norm[rows] * copy.bounds[-1, latents]
    step = step[rows]
    exact_rows = rows[:0] if screened is None else (~screened).nonzero().flatten()
    return _Candidates(rows, latents, (high - bound) * step, width * step, exact_rows)


def _encode_row(copy: TorchCopy, rest: Tensor, k: int, sorted: bool) -> ScreenedRows | None:
    """The code of a single residual `[1, D]`; None where a special case needs `_score`.

    The same bounds as there. While a model generates, caches are cold, and the time is that of the
    GEMM plus a cost per call: so numbers per row are Python floats here, numpy replaces torch where
    its calls are cheaper, and all latents are compared without groups.
    """
    row = rest[0]
    upper = _upper_row(copy, row)
    if upper is None:
        return None
    scores, factor, step, norm = upper
    group = group_size(len(copy.weight), k)
    assert group is not None
    lower = scores.view(group, -1).amax(0).sub_(copy.width(group)[0], alpha=2.0 * factor)
    slack = ROUNDING * copy.largest_bias / step
    ranked = lower.numpy()
    ranked.partition(len(ranked) - k)
    least = float(ranked[-k]) - slack
    candidates = torch.from_numpy((scores.numpy() >= max(least, -slack)).nonzero()[0])
    n = len(candidates)
    if not k <= n <= CANDIDATES * len(copy.weight):
        return None
    exact = gathered_dot(rest, torch.zeros_like(candidates), copy.weight, candidates)
    if copy.bias is not None:
        exact += copy.bias.index_select(0, candidates)
    # ŝ + λ − s, of which every entry lies between 0 and 2 λ
    lowest, highest = torch.aminmax(
        scores.index_select(0, candidates).sub_(exact, alpha=1.0 / step)
    )
    tolerance = slack + 16 * ROUNDING * norm * copy.largest_bound
    widest = 2.0 * factor * copy.largest_bound + tolerance
    if not (float(lowest) >= -tolerance and float(highest) <= widest):
        return None
    order = descending(exact.unsqueeze(0))[0, :k]
    acts = exact.index_select(0, order)
    if not float(acts[-1]) > 0.0:
        return None
    if not sorted:
        order, by_index = order.sort()
        acts = acts[by_index]
    indices = candidates.index_select(0, order).unsqueeze(0)
    return ScreenedRows(acts.unsqueeze(0), indices, None, n)


def _score(
    copy: TorchCopy, block: Tensor, k: int, threshold: Tensor | None
) -> tuple["_Candidates", Tensor]:
    """The candidates of residuals `[n, D]` and their exact scores `[P]`."""
    parts = [_screen(copy, rows, k, threshold) for rows in block.split(ROWS)]
    found = _Candidates.join(parts, ROWS)
    scores = block.new_empty(len(found.rows))
    order = found.latents.argsort()  # each row of the weight is read once
    scores[order] = gathered_dot(block, found.rows[order], copy.weight, found.latents[order])
    if copy.bias is not None:
        scores += copy.bias[found.latents]
    if not bool(((scores - found.middle).abs() <= found.width).all()):
        raise StaleCopyError
    return found, scores


def _above(found: _Candidates, scores: Tensor, threshold: Tensor) -> tuple["_Candidates", Tensor]:
    """The candidates above their thresholds, and their scores."""
    active = (scores > threshold[found.latents]) & (scores > 0)
    rows, latents, middle, width = (t[active] for t in found[:4])
    return _Candidates(rows, latents, middle, width, found.exact_rows), scores[active]


def _outlier_dimensions(rest: Tensor, norm: Tensor) -> list[int]:
    """The few dimensions that would stretch the steps of some rows: massive activations."""
    D = rest.shape[1]
    relative = rest.abs() / norm.unsqueeze(1)
    relative = torch.where(norm.isfinite() & (norm > 0), relative.T, 0.0).amax(1)
    largest, dimensions = relative.topk(min(OUTLIER_DIMENSIONS, D))
    return dimensions[largest * math.sqrt(D) > OUTLIER].tolist()


def _select_candidates(
    found: _Candidates, scores: Tensor, n: int, k: int, sorted: bool
) -> tuple[Tensor, Tensor]:
    """TopK of each row's candidates, laid out in order of latent in a rectangle."""
    if n == 1 and len(scores) >= k:
        acts, position = select(scores.unsqueeze(0), k, sorted)
        return acts, torch.where(acts > 0, found.latents[position], 0)
    counts = torch.bincount(found.rows, minlength=n)
    width = max(k, int(counts.max()))
    slot = torch.arange(len(scores), device=scores.device) - (counts.cumsum(0) - counts)[found.rows]
    table = scores.new_zeros(n, width)
    latents = found.latents.new_zeros(n, width)
    table[found.rows, slot] = scores
    latents[found.rows, slot] = found.latents
    acts, position = select(table, k, sorted)
    return acts, torch.where(acts > 0, latents.gather(1, position), 0)


def group_size(M: int, k: int) -> int | None:
    """Latents per group: many, as long as few of the k best share one."""
    return next((g for g in (32, 16, 8) if 8 * k * g <= M), None)
