"""TopK autoencoder that is trained at several numbers of active latents at once.

    loss = mean over j of ‖x − x̂_j‖², x̂_j the reconstruction of the j strongest latents

HierarchicalTopK (arXiv 2505.24473), section 3; the gain is ours. `at_k` lowers k afterwards.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from resae.sae.base import SAEConfig
from resae.sae.files import load_config
from resae.sae.topk import TopKSAE
from resae.strict_json import brief, require_fields
from resae_kernels import SparseCode, sparse_decode


class PrefixSAE(TopKSAE):
    """A `TopKSAE` with a loss over prefixes of its code.

    Args:
        prefixes: the numbers of latents j, rising and ending with `config.k`; None: that alone.
        config, seed: as of `TopKSAE`.
    """

    kind = "prefix"

    def __init__(self, config: SAEConfig, *, seed: int = 0, prefixes: Sequence[int] | None = None):
        super().__init__(config, seed=seed)
        self.prefixes = tuple(prefixes or (config.k,))

    def reconstructions(
        self, x: Tensor, *, prediction: Tensor | None = None
    ) -> tuple[list[Tensor], SparseCode]:
        code = self.encode(x, prediction=prediction)
        return self.decode_prefixes(code, self.prefixes, prediction=prediction), code

    def decode_prefixes(
        self, code: SparseCode, prefixes: Sequence[int], *, prediction: Tensor | None = None
    ) -> list[Tensor]:
        """x̂ `[..., D]` of the j strongest latents for each j of `prefixes`, rising, of a sorted
        code: each adds its rows to the one before, so that all together gather k rows."""
        offset = self.b_dec if prediction is None else self.b_dec + prediction
        x_hats: list[Tensor] = []
        rows: Tensor | None = None
        first = 0
        for last in prefixes:
            acts, indices = (part[..., first:last] for part in code)
            rows = sparse_decode(acts, indices, self.W_dec, prediction=rows)
            x_hats.append(torch.add(offset, rows, alpha=self._gain(last)))
            first = last
        return x_hats

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """As `TopKSAE.load`, with the prefixes that `save` wrote."""
        sae = super().load(folder)
        where = f"SAE {folder}: metadata of cfg.json"
        metadata = load_config(Path(folder))["metadata"]
        require_fields(metadata, {"prefixes": ([int], None)}, where)
        prefixes = tuple(metadata.get("prefixes") or sae.prefixes)
        if (
            list(prefixes) != sorted(set(prefixes))
            or prefixes[0] < 1
            or prefixes[-1] != sae.config.k
        ):
            raise ValueError(
                f"{where}: prefixes={brief(prefixes)}, expected rising numbers from 1 on that end "
                f"with k={sae.config.k}"
            )
        sae.prefixes = prefixes
        return sae

    def save(self, folder: Path, **metadata: Any) -> None:
        """As `TopKSAE.save`, and the prefixes among the metadata."""
        super().save(folder, **{"prefixes": list(self.prefixes), **metadata})
