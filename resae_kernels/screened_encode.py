"""TopK encode on a CPU that reads an 8-bit copy of the weight: screen, then score exactly.

    ŝ = approximate scores, one integer product        |ŝ_j − s_j| ≤ λ_j for every latent j
    t = the k-th largest of ŝ − λ                      so that at least k latents have s ≥ t
    candidates = {j : ŝ_j + λ_j ≥ t}                   so that every one of the TopK is among them
    code = TopK of the exact float32 scores of the candidates

Residual r and weight row w are quantised with a dither that is subtracted again: with u uniform on
[0, 1), q = ⌊r/t + u⌋ and r̂ = t (q − u + ½) the errors of the D entries are independent and uniform
on ±t/2 whatever r is (Schuchman 1964). Two bounds λ follow:

certain      Cauchy–Schwarz: |s − ŝ| ≤ ‖w − ŵ‖ ‖r‖ + ‖ŵ‖ ‖r − r̂‖, from the errors actually made.
statistical  s − ŝ = (w − ŵ)·r + ŵ·(r − r̂): a sum of independent uniform errors, in the second term
             given the first. A uniform variable on ±a is sub-Gaussian with variance a²/3, hence
             P(|s − ŝ| ≥ λ) ≤ 2 exp(−6 λ² / (s² ‖r‖² + t² ‖ŵ‖²)), s and t the two steps; λ is
             where the sum over all M latents is `FAILURE`. (The bound of Hoeffding, which knows the
             range of the errors alone, would be √3 times as wide.)

The screening pass moves a quarter of the bytes and takes a tenth of the time of the product.
"""

import logging
import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resae_kernels import _launch
from resae_kernels.reference import TopK
from resae_kernels.sparse_decode import pair_products
from resae_kernels.topk_encode import (
    _backward,
    _check,
    _descending,
    _residual,
    _select,
    _setup_context,
    topk_encode,
)

log = logging.getLogger(__name__)

ROW_REASON = "not finite, all zero, or too many candidates"
MARGINS = ("statistical", "certain")
FAILURE = 1e-12
"""Probability, over the dither, that the statistical margin misses a latent of a given row."""
ROUNDING = 2.0**-20
"""Of float32 sums, relative to the norms or the bias that go into them, with room to spare."""
ROWS = 256
"""Rows screened at a time: their scores stay in the cache."""
BLOCK = 2048
"""Rows whose candidates are scored together, so that the weight is read once for all of them."""
SMALLEST = 1 << 22
NARROWEST = 256
"""Entries of the weight, and width, below which the exact product is as fast (measured on one core
of an AMD EPYC with AVX-512 VNNI, November 2026: at 1, 16, 64 and 256 rows, M·D from 2¹⁹ to 2²⁵)."""
TRAINING_ROWS = 512
"""Rows from which on a copy pays that is used once: in training the weight changes every step."""
CERTAIN_ROWS = 16
"""Rows up to which the certain margin is not behind the exact product (same measurement)."""
CANDIDATES = 1 / 4
"""A row with more candidates than this share of the latents takes the exact path."""
LANES = 32
"""Latents are padded to a multiple of this, the largest group."""
STEPS = 126
"""Quantisation steps on either side of zero; one less than int8 has, for the dither."""
OUTLIER = 12.0
"""An entry of the residual so many times its row's root mean square would stretch the row's step:
its dimension is multiplied exactly."""
OUTLIER_DIMENSIONS = 16
"""At most so many dimensions are multiplied exactly."""


class Screening(NamedTuple):
    """A code, and how it was found."""

    code: TopK
    rows_screened: int
    rows_exact: int
    """Rows whose whole product was computed in float32."""
    candidates: int
    """(Row, latent) pairs of the screened rows that were scored exactly."""
    reason: str | None
    """Why rows took the exact path; None if none did."""


def unavailable() -> str | None:
    """Why this machine or torch cannot screen; None if it can.

    Needs the 8-bit dot product instructions (VNNI: without them the integer product saturates) and
    oneDNN's quantised linear op, which torch keeps among its private ones: this function and
    `_Copy` are where it is used.
    """
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    if not getattr(torch.cpu, "_is_vnni_supported", lambda: False)():
        return "this processor has no 8-bit dot product instructions (AVX-512 VNNI)"
    names = ("qlinear_prepack", "qlinear_pointwise")
    if not all(hasattr(torch.ops.onednn, name) for name in names):
        return f"torch {torch.__version__} has no torch.ops.onednn.{' and '.join(names)}"
    return None


@cache
def _say_once(reason: str) -> None:
    log.warning("encoding by the float32 product, at its full price: %s", reason)


class ScreenedEncoder:
    """An encoder's weight and, beside it, what screening needs: an 8-bit copy, steps, norms.

    The copy is M·D bytes. It is made anew at the first call after the weight or bias has changed,
    in place or to other memory. Where the weight's gradient is wanted it serves one call and is
    dropped: the weight is about to change, and torch does not count the steps of fused optimisers.
    Nor does it count writes through `.data`. These are seen by a sample of entries, which may miss
    a write to a few latents: call `forget` after one.

    Args:
        weight: `[M, D]`, one latent per row, float32 on CPU to be screened; kept, not copied.
        bias: `[M]` or None.
        margin: "statistical": a row misses a latent with probability below 1e-12, by the proof
            above, over the dither drawn here; "certain": never, at many times the candidates, which
            pays up to 16 rows (beyond them the exact path runs).
        seed: of the dither. Equal seeds give equal codes, bit for bit.

    Raises:
        ValueError: unknown margin, a weight that is not `[M, D]`, a bias that does not fit.

    Note:
        A code agrees with `topk_encode` but for ties within float32 rounding: the two sum the same
        products in another order.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        margin: str = "statistical",
        seed: int = 0,
    ):
        if margin not in MARGINS:
            raise ValueError(f"ScreenedEncoder: margin={margin!r}, expected {' or '.join(MARGINS)}")
        if weight.ndim != 2:
            raise ValueError(
                f"ScreenedEncoder: weight has shape {list(weight.shape)}, expected [M, D]"
            )
        if bias is not None:
            _launch.check_shape("ScreenedEncoder", "bias", bias, (weight.shape[0],), "one a latent")
        self.weight, self.bias, self.margin, self._seed = weight, bias, margin, seed
        self.forget()

    def __getstate__(self) -> dict:
        """Without the copy: whoever is copied or unpickled makes its own."""
        return self.__dict__ | {"_copy": None, "_copied": (), "_samples": []}

    def encode(
        self,
        x: Tensor,  # [..., D]
        k: int,
        *,
        pre_bias: Tensor | None = None,  # [D]
        base: Tensor | None = None,  # [..., D]
        sorted: bool = True,
    ) -> TopK:
        """The code of `topk_encode` with this weight and bias: arguments, returns and errors are
        the same, gradients too."""
        return self.explain(x, k, pre_bias=pre_bias, base=base, sorted=sorted).code

    def explain(
        self,
        x: Tensor,
        k: int,
        *,
        pre_bias: Tensor | None = None,
        base: Tensor | None = None,
        sorted: bool = True,
    ) -> Screening:
        """`encode`, and which path its rows took, with the reason."""
        N, D = x.shape[:-1].numel(), self.weight.shape[1]
        trained = _require_gradient(self.weight, self.bias)
        if trained:
            self.forget()
        reason = self._exact_reason(x, k, trained)
        if reason is not None:
            code = topk_encode(
                x, self.weight, self.bias, k, pre_bias=pre_bias, base=base, sorted=sorted
            )
            return Screening(code, 0, N, 0, reason)
        _check(x, self.weight, self.bias, k, pre_bias, base, None)
        counts = _Counts()
        arguments = (
            x.reshape(N, D),
            self.weight,
            self.bias,
            k,
            pre_bias,
            None if base is None else base.reshape(N, D),
            sorted,
        )
        if trained or _require_gradient(x, pre_bias, base):
            acts, indices = _WithGradient.apply(*arguments, (self, counts), "torch")
        else:
            acts, indices = self._encode(*arguments, counts)
        if trained:
            self.forget()
        code = TopK(*(t.view(*x.shape[:-1], k) for t in (acts, indices)))
        reason = ROW_REASON if counts.rows_exact else None
        rows_screened = N - counts.rows_exact
        return Screening(code, rows_screened, counts.rows_exact, counts.candidates, reason)

    def _encode(
        self, x, weight, bias, k, pre_bias, base, sorted, counts: "_Counts"
    ) -> tuple[Tensor, Tensor]:
        rest = _residual(x, pre_bias, base)
        if len(rest) == 1:
            found = self._encode_row(rest, k, sorted)
            if found is not None:
                code, counts.candidates = found
                return code
        codes, left = [], []
        for start in range(0, len(rest), BLOCK):
            block = rest[start : start + BLOCK]
            found, scores = self._score(block, k)
            codes.append(_select_candidates(found, scores, len(block), k, sorted))
            counts.candidates += len(scores)
            if len(found.exact_rows):
                left.append(found.exact_rows + start)
        acts, indices = codes[0]
        if len(codes) > 1:
            acts, indices = (torch.cat(parts) for parts in zip(*codes, strict=True))
        if left:
            rows = torch.cat(left)
            counts.rows_exact = len(rows)
            acts[rows], indices[rows] = topk_encode(rest[rows], weight, bias, k, sorted=sorted)
        return acts, indices

    def _encode_row(
        self, rest: Tensor, k: int, sorted: bool
    ) -> tuple[tuple[Tensor, Tensor], int] | None:
        """The code of a single residual `[1, D]` that needs nothing special, and how many latents
        were scored exactly; None if it does: then `_score` sees to it.

        The same bounds as there. While a model writes its caches are cold, so that what counts,
        beside the product, is the number of calls: what is one number per row is a Python float
        here, numpy has fewer steps per call, and all latents are compared without groups.
        """
        copy = self._copy or self._current_copy()
        assert copy is not None
        row = rest[0]
        upper = _upper_row(copy, row)
        if upper is None:
            return None
        scores, factor, step, norm = upper
        group = _group(len(copy.weight), k)
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
        exact = pair_products(rest, torch.zeros_like(candidates), copy.weight, candidates)
        if self.bias is not None:
            exact += self.bias.index_select(0, candidates)
        # ŝ + λ − s, of which every entry lies between 0 and 2 λ
        lowest, highest = torch.aminmax(
            scores.index_select(0, candidates).sub_(exact, alpha=1.0 / step)
        )
        tolerance = slack + 16 * ROUNDING * norm * copy.largest_bound
        widest = 2.0 * factor * copy.largest_bound + tolerance
        if not (float(lowest) >= -tolerance and float(highest) <= widest):
            return None
        order = _descending(exact.unsqueeze(0))[0, :k]
        acts = exact.index_select(0, order)
        if not float(acts[-1]) > 0.0:
            return None
        if not sorted:
            order, by_index = order.sort()
            acts = acts[by_index]
        return (acts.unsqueeze(0), candidates.index_select(0, order).unsqueeze(0)), n

    def _score(self, block: Tensor, k: int) -> tuple["_Candidates", Tensor]:
        """The candidates of residuals `[n, D]` and their exact scores `[P]`."""
        for _ in range(2):
            copy = self._copy or self._current_copy()
            assert copy is not None
            found = _Candidates.join([_screen(copy, rows, k) for rows in block.split(ROWS)], ROWS)
            scores = block.new_empty(len(found.rows))
            order = found.latents.argsort()  # each row of the weight is read once
            scores[order] = pair_products(
                block, found.rows[order], copy.weight, found.latents[order]
            )
            if self.bias is not None:
                scores += self.bias[found.latents]
            if bool(((scores - found.middle).abs() <= found.width).all()):
                return found, scores
            self.forget()  # the copy is of another weight, written to without being counted
        raise RuntimeError(
            "ScreenedEncoder: exact scores lie outside the bounds of a copy just made; is another "
            "thread writing to the weight?"
        )

    def _exact_reason(self, x: Tensor, k: int, trained: bool) -> str | None:
        """Why a call is not screened at all; None if it is."""
        M, D = self.weight.shape
        if self.weight.device.type != "cpu" or self.weight.dtype != torch.float32:
            return f"the weight is {self.weight.dtype} on {self.weight.device}, not float32 on cpu"
        if x.dtype != torch.float32 or _launch.autocasts("cpu"):
            return "the product is not in float32"
        if self.weight.is_inference():
            return "the weight was made in inference mode, where changes are not counted"
        if M * D < SMALLEST or D < NARROWEST or _group(M, k) is None:
            return f"screening does not pay at M={M}, D={D}, k={k}"
        N = x.shape[:-1].numel()
        if N == 0:
            return "there are no rows"
        if trained and N < TRAINING_ROWS:
            return (
                f"the weight requires its gradient, and {N} rows do not pay for a copy that serves "
                f"one call; if none is wanted, call under torch.no_grad()"
            )
        if self.margin == "certain" and N > CERTAIN_ROWS:
            return f"the certain margin does not pay at {N} rows"
        cannot = unavailable() if self._copy is None else None
        if cannot is not None:
            _say_once(cannot)
        elif self._current_copy() is None:
            cannot = "the weight or bias is not finite"
        return cannot

    def _current_copy(self) -> "_Copy | None":
        """The copy, made anew if the weight or bias has changed; None where these are not
        finite."""
        tensors = [t for t in (self.weight, self.bias) if t is not None]
        state = tuple((t.data_ptr(), t._version) for t in tensors)
        if state != self._copied or any((now != then).any() for now, then in self._samples):
            bias = None if self.bias is None else self.bias.detach()
            self._copy = _quantise(self.weight.detach(), bias, self.margin, self._seed)
            self._copied = state
            self._samples = [(now, now.copy()) for now in (_sample(t.detach()) for t in tensors)]
        return self._copy

    def forget(self) -> None:
        """Drop the copy: the next call makes a new one."""
        self._copy: _Copy | None = None
        self._copied: tuple = ()
        self._samples: list[tuple[Any, Any]] = []


def _require_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _sample(tensor: Tensor) -> Any:
    """An entry of each of a hundred rows, or of all; a view, as a numpy array. More would cost a
    token what it saves: each lies in memory by itself."""
    some = tensor[:: max(1, len(tensor) // 128)]
    return (some if some.ndim == 1 else some[:, some.shape[1] // 2]).numpy()


@dataclass
class _Counts:
    rows_exact: int = 0
    candidates: int = 0


class _WithGradient(torch.autograd.Function):
    """The gradient of a code does not depend on how it was found: it is that of `topk_encode`."""

    @staticmethod
    def forward(x, weight, bias, k, pre_bias, base, sorted, screened, implementation):  # noqa: ARG004
        encoder, counts = screened
        return encoder._encode(x, weight, bias, k, pre_bias, base, sorted, counts)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)  # type: ignore[assignment]


# -- the copy --------------------------------------------------------------------------------------


class _Copy(NamedTuple):
    """What screening reads beside the weight: M' latents, M up to a multiple of 32."""

    weight: Tensor
    """`[M, D]`, contiguous: the caller's own memory if that is."""
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


def _quantise(weight: Tensor, bias: Tensor | None, margin: str, seed: int) -> _Copy | None:
    M, D = weight.shape
    padded = -(-M // LANES) * LANES
    generator = torch.Generator(weight.device).manual_seed(seed)
    drawn = {"generator": generator, "dtype": weight.dtype, "device": weight.device}
    dither, weight_dither = torch.rand(2, D, **drawn)
    weight_dither -= 0.5
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
    # The bounds are widened by what float32 sums of D terms, here and of a row's levels with the
    # dither, are off by at worst.
    ratio = None
    if margin == "certain":
        bounds = torch.stack([error, norm]) * (1 + D * 2.0**-22)
    else:
        # λ² = c² (s² ‖r‖² + t² ‖ŵ‖²) ≤ c² h² (ratio² ‖r‖² + t²), with ‖ŵ‖ bounded whatever the
        # weight's dither was.
        ratio = float((steps / size.clamp_min(1e-30))[:M].median())
        h = torch.maximum(size + steps * (math.sqrt(D) / 2), steps / ratio)
        widened = 1.01 + D**1.5 * 2.0**-25
        bounds = h.unsqueeze(0) * (widened * math.sqrt(math.log(2 * M / FAILURE) / 6))
    all_bias = weight.new_full((padded,), -math.inf)
    all_bias[:M] = 0.0 if bias is None else bias
    packed = torch.ops.onednn.qlinear_prepack(q, [ROWS, D])
    largest = 0.0 if bias is None else float(bias.abs().max())
    if not math.isfinite(largest) or not bool(size.isfinite().all()):
        return None
    return _Copy(
        weight.contiguous(),
        packed,
        steps,
        shift,
        steps.new_zeros(padded, dtype=torch.int64),
        dither,
        dither - 0.5,
        weight_dither,
        torch.cat([torch.stack([steps, all_bias]), bounds]),
        ratio,
        largest,
        float(bounds[-1].max()),
        {},
        {},
    )


def _product(copy: _Copy, levels: Tensor) -> Tensor:
    """`[n, M']` float32: `steps · (levels @ weight's q) + shift`."""
    unsigned = (levels + 128.0).to(torch.uint8)
    return torch.ops.onednn.qlinear_pointwise(
        unsigned,
        1.0,
        128,
        copy.packed,
        copy.steps,
        copy.zero_points,
        copy.shift,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )


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
    """`[P]`: what the exact score, itself a float32 sum, can be away from ŝ."""
    exact_rows: Tensor
    """Rows that have no candidates here and are left to the exact path."""

    @classmethod
    def join(cls, parts: "list[_Candidates]", rows: int) -> "_Candidates":
        """Of chunks of `rows` rows."""
        if len(parts) == 1:
            return parts[0]
        moved = [
            part._replace(rows=part.rows + i * rows, exact_rows=part.exact_rows + i * rows)
            for i, part in enumerate(parts)
        ]
        return cls(*(torch.cat(field) for field in zip(*moved, strict=True)))


class _Upper(NamedTuple):
    """What the scores of n rows can be at most, in units of each row's step."""

    scores: Tensor
    """`[n, M']`, ŝ + λ."""
    factors: Tensor
    """`[n, c]`: λ = factors @ bounds."""
    step: Tensor
    """`[n]`, t."""
    norm: Tensor
    """`[n]`, ‖r‖ / t."""
    screened: Tensor | None
    """`[n]` bool: the others are not finite, or all zero; what is said of them means nothing. None:
    all are."""


def _upper(copy: _Copy, rest: Tensor) -> _Upper:
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
    scores = _product(copy, levels)

    centred = levels - copy.centre  # r̂
    norm, inner_norm = norm * inverse, inner_norm * inverse
    rounding = ROUNDING * norm
    if copy.ratio is None:
        error = (scaled - centred).norm(dim=1)
        factors = torch.stack([inner_norm, error + rounding], dim=1)
    else:
        factors = ((copy.ratio * inner_norm).square() + 1.0).sqrt_() + rounding
        factors = factors.unsqueeze(1)
    # Beside the product a few terms of rank 1, in one pass.
    left = [-(centred @ copy.weight_dither), inverse, *factors.T]
    right = copy.terms
    if outliers:
        left += [rest[:, dimension] * inverse for dimension in outliers]
        right = torch.cat([right, torch.stack([copy.column(d) for d in outliers])])
    scores.addmm_(torch.stack(left, dim=1), right)
    return _Upper(scores, factors, step, norm, screened)


def _upper_row(copy: _Copy, row: Tensor) -> tuple[Tensor, float, float, float] | None:
    """`_upper` of one residual `[D]`, `(scores [M'], factor, step, norm)`; None if it is not an
    ordinary one, or the margin is not statistical."""
    entries = row.numpy()
    norm, peak = math.sqrt(entries.dot(entries)), float(max(entries.max(), -entries.min()))
    step = peak / STEPS
    ordinary = step > 1e-30 and peak * math.sqrt(len(row)) <= OUTLIER * norm < math.inf
    if not ordinary or copy.ratio is None:
        return None
    levels = torch.add(copy.dither, row, alpha=1.0 / step).floor_()
    scores = _product(copy, levels.unsqueeze(0))
    along = float(levels.sub_(copy.centre).dot(copy.weight_dither))
    norm /= step
    factor = math.sqrt((copy.ratio * norm) ** 2 + 1.0) + ROUNDING * norm
    scores.addmm_(row.new_tensor([[-along, 1.0 / step, factor]]), copy.terms)
    return scores[0], factor, step, norm


def _screen(copy: _Copy, rest: Tensor, k: int) -> _Candidates:
    """Candidates of the residuals `[n, D]`."""
    M, padded = len(copy.weight), len(copy.steps)
    upper, factors, step, norm, screened = _upper(copy, rest)
    group = _group(M, k)
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
    if len(rows) > CANDIDATES * M:
        bounded = torch.bincount(rows, minlength=len(rest)) <= CANDIDATES * M
        screened = bounded if screened is None else screened & bounded
        few = screened[rows]
        rows, latents, high = rows[few], latents[few], high[few]
    bound = (factors[rows] * copy.bounds[:, latents].T).sum(1)
    # The exact score is a float32 sum itself.
    width = bound + slack[rows] + 16 * ROUNDING * norm[rows] * copy.bounds[-1, latents]
    step = step[rows]
    exact_rows = rows[:0] if screened is None else (~screened).nonzero().flatten()
    return _Candidates(rows, latents, (high - bound) * step, width * step, exact_rows)


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
        acts, position = _select(scores.unsqueeze(0), k, sorted)
        return acts, torch.where(acts > 0, found.latents[position], 0)
    counts = torch.bincount(found.rows, minlength=n)
    width = max(k, int(counts.max()))
    slot = torch.arange(len(scores), device=scores.device) - (counts.cumsum(0) - counts)[found.rows]
    table = scores.new_zeros(n, width)
    latents = found.latents.new_zeros(n, width)
    table[found.rows, slot] = scores
    latents[found.rows, slot] = found.latents
    acts, position = _select(table, k, sorted)
    return acts, torch.where(acts > 0, latents.gather(1, position), 0)


def _group(M: int, k: int) -> int | None:
    """Latents per group: many, as long as few of the k best share one."""
    return next((g for g in (32, 16, 8) if 8 * k * g <= M), None)
