"""Exact TopK of scores in torch and numpy, for dtypes and sizes that no kernel supports."""

import torch
from torch import Tensor

from resae_kernels.cpu import native

GROUPED_SCORES = 131_072
"""Scores from which on groups save more than their fixed cost."""


def select(scores: Tensor, k: int, sorted: bool) -> tuple[Tensor, Tensor]:
    """Exact TopK of `relu(scores)`, `[n, M]`: ties to the lower index, NaN first, padding last."""
    if native.takes(scores):
        return native.select(scores, k, sorted)
    if scores.device.type == "cpu" and scores.dtype.itemsize == 2:  # numpy has no bfloat16
        acts, indices = select(scores.float(), k, sorted)
        return acts.to(scores.dtype), indices
    indices = _largest(scores, k)
    values = scores.gather(1, indices)
    positive = (values > 0) | values.isnan()
    acts = torch.where(positive, values, 0.0)
    order = descending(acts if sorted else positive.to(torch.uint8))
    return acts.gather(1, order), indices.masked_fill_(~positive, 0).gather(1, order)


def select_above(
    scores: Tensor, threshold: Tensor, k: int, sorted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of the positive `scores [n, M]` above `threshold [M]`, ordered and padded as by
    `select`, and how many are above, `[n]` int32. NaN is above every threshold."""
    n = scores.shape[0]
    if native.takes(scores, threshold):
        n_active = torch.empty(n, dtype=torch.int32)
        return *native.select(scores, k, sorted, threshold, n_active), n_active
    if scores.device.type == "cpu" and scores.dtype.itemsize == 2:  # numpy has no bfloat16
        acts, indices, n_active = select_above(scores.float(), threshold.float(), k, sorted)
        return acts.to(scores.dtype), indices, n_active
    active = ((scores > threshold) & (scores > 0)) | scores.isnan()
    n_active = active.sum(dim=1, dtype=torch.int32)
    over = (n_active > k).nonzero().squeeze(1)
    if len(over):  # nothing is chosen from the other rows: theirs are only moved together
        _, kept = select(torch.where(active[over], scores[over], 0.0), k, False)
        active[over] = torch.zeros_like(active[over]).scatter_(1, kept, True)
    rows, latents = active.nonzero(as_tuple=True)
    counts = n_active.clamp_max(k).long()
    slots = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    acts, indices = scores.new_zeros(n, k), latents.new_zeros(n, k)
    acts[rows, slots], indices[rows, slots] = scores[rows, latents], latents
    if sorted:
        order = descending(acts)
        acts, indices = acts.gather(1, order), indices.gather(1, order)
    return acts, indices, n_active


def descending(values: Tensor) -> Tensor:
    """`values.argsort(dim=1, descending=True, stable=True)`, NaN first; numpy is the faster."""
    if values.device.type != "cpu":
        return values.argsort(dim=1, descending=True, stable=True)
    rising = values.numpy()[:, ::-1].argsort(axis=1, kind="stable")[:, ::-1]
    return values.shape[1] - 1 - torch.from_numpy(rising.copy())


def _largest(scores: Tensor, k: int) -> Tensor:
    """`[n, k]` indices, ascending, of the k largest of each row: of equals the lower, NaN first.

    No value outside the k + 1 groups with the largest maxima can be among the k largest, and where
    one is equal to the kth, so are two inside. Groups are strided, so that their maxima are taken
    along contiguous lanes, and their members stay in order; they pay where there is much to choose
    from, and enough of them remain.
    """
    n, M = scores.shape
    if k == M:
        return torch.arange(M, device=scores.device).repeat(n, 1)
    sizes = (16, 8, 4) if scores.numel() >= GROUPED_SCORES else ()
    enough = (g for g in sizes if M % g == 0 and M // g >= max(3, g // 2) * (k + 1))
    size = next(enough, None)
    if size is None:
        return _above_kth(scores, k)[0]
    groups, _ = _above_kth(scores.view(n, size, M // size).amax(dim=1), k + 1)
    strides = torch.arange(0, M, M // size, device=scores.device)
    members = (groups.unsqueeze(1) + strides.view(1, size, 1)).flatten(1)
    picked, tied = _above_kth(scores.gather(1, members), k)
    indices = members.gather(1, picked)
    if tied.numel():  # the lower index may be outside
        indices[tied] = _above_kth(scores[tied], k)[0]
    return indices


def _above_kth(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`_largest` by comparing with the kth largest value, and the rows with ties or NaN, which are
    resolved separately.

    On a CPU numpy finds this value by a vectorised partition, several times faster than
    `torch.topk`, and the entries that reach it likewise.
    """
    n, M = scores.shape
    if scores.device.type == "cpu":
        entries = scores.numpy()
        ranked = entries.copy()
        ranked.partition(M - k, axis=1)
        top = torch.from_numpy(ranked[:, M - k :])
        kth = top[:, :1]
        reached = torch.from_numpy(entries >= kth.numpy())
        flat = torch.from_numpy(reached.numpy().reshape(-1).nonzero()[0])
    else:
        top = scores.topk(k, dim=1).values
        kth = top[:, -1:]
        reached = scores >= kth
        flat = reached.view(-1).nonzero().squeeze(1)
    nan = top.isnan().any(dim=1)
    tied = flat.new_empty(0)
    if len(flat) != n * k or bool(nan.any()):
        tied = (nan | (reached.sum(dim=1) != k)).nonzero().squeeze(1)
        reached[tied] = _lowest_among_ties(scores[tied], kth[tied], k)
        flat = reached.view(-1).nonzero().squeeze(1)
    return flat.view(n, k) - torch.arange(0, n * M, M, device=flat.device).unsqueeze(1), tied


def _lowest_among_ties(scores: Tensor, kth: Tensor, k: int) -> Tensor:
    """`[n, M]` bool: the k largest scores; of those equal to `kth [n, 1]` the first ones."""
    nan = scores.isnan()
    above = torch.where(kth.isnan(), False, (scores > kth) | nan)
    level = torch.where(kth.isnan(), nan, scores == kth)
    missing = k - above.sum(dim=-1, keepdim=True)
    return above | (level & (level.cumsum(dim=-1, dtype=torch.int32) <= missing))
