"""Quality of the affine maps: R² per layer, and the share of each source."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from resae.evaluation.metrics import VarianceUnexplained
from resae.stack.affine import AffinePredictor, sources_of
from resae.stack.fit import Moments


def routing_shares(predictor: AffinePredictor, moments: Moments) -> list[list[float]]:
    """Share of every source in each prediction (layers 1 … L−1), `E‖(x_j − μ_j) A_lj‖²` over
    its sum over j: what a LIMe router's heat map shows (arXiv 2502.09245). Sources are correlated,
    so that a share is not a share of the explained variance."""
    shares = []
    for layer, A in enumerate(predictor.A, start=1):
        sources = moments.rows_of(sources_of(predictor.kind, layer))
        if len(sources) == 1:
            shares.append([1.0])
            continue
        blocks = A.double().cpu().split(A.shape[1])
        energy = [
            float(((moments.covariance(j, j) @ block) * block).sum())
            for j, block in zip(sources, blocks, strict=True)
        ]
        shares.append([e / max(sum(energy), 1e-300) for e in energy])
    return shares


def r2_per_layer(
    predictor: AffinePredictor,
    batches: Iterable[Sequence[Tensor]],
    reconstruct: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None,
) -> list[float]:
    """R² of each prediction (layers 1 … L−1) on held-out activations: 1 − Σ‖x−pred‖²/Σ‖x−x̄‖².

    Args:
        reconstruct: L activations → the L reconstructions from which layers are predicted; None:
            from the activations.
    """
    sums: dict[int, VarianceUnexplained] = {}
    for xs in batches:
        sources = xs if reconstruct is None else reconstruct(xs)
        for layer in range(1, len(xs)):
            prediction = predictor(layer, sources)
            if prediction is not None:
                sums.setdefault(layer, VarianceUnexplained()).add(xs[layer], prediction)
    return [1.0 - s.fvu() for s in sums.values()]
