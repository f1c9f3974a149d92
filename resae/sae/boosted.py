"""A frozen autoencoder and a second one that is trained on its error."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resae.sae.base import Autoencoder, InputKind, SAEConfig, describe_sizes
from resae.sae.losses import Total, in_one_piece
from resae.sae.topk import TopKSAE
from resae.storage import load_json
from resae_kernels import TopK, sparse_decode


class BoostedSAE(Autoencoder):
    """A frozen autoencoder and a second one of the same input, trained on what the first leaves:
    x̂ = x̂_base + z_boost W_boost, without decoder bias.         SAE Boost (arXiv 2507.12990)

    The code is that of the base, then that of the boost with indices M_base higher: to all that
    reads codes this is an autoencoder of M_base + M_boost latents. In training the k strongest of
    the boost count. In use only those of them above a threshold do, which keeps the boost silent on
    text that it was not trained for: the quantile of the training's acts, averaged over batches,
    that `keep` of them exceed (`follow`). Threshold 0 leaves TopK alone.

    Args:
        boost: its decoder bias is set to zero; both biases of decoders stay as they are.
    """

    kind = "boosted"
    dictionaries = 2
    follows_acts = True

    def __init__(
        self, base: Autoencoder, boost: TopKSAE, *, keep: float = 0.1, threshold: float = 0.0
    ):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.boost = boost
        boost.b_dec.data.zero_()
        boost.b_dec.requires_grad_(False)
        self.keep = keep
        self.threshold: Tensor
        self.register_buffer("threshold", boost.b_dec.new_tensor(threshold))
        ours, its = boost.config, base.config
        self.config = SAEConfig(
            ours.d_in,
            its.d_sae + ours.d_sae,
            its.k + ours.k,
            input_kind=its.input_kind,
            screening=its.screening,
        )
        boost.set_input_kind(its.input_kind)

    @property
    def trainable(self) -> TopKSAE:
        return self.boost

    @property
    def W_dec(self) -> Tensor:
        """`[M_base + M_boost, D]`, a copy."""
        return torch.cat([self.base.W_dec, self.boost.W_dec])

    @property
    def b_dec(self) -> Tensor:
        return self.base.b_dec

    def encode(self, x: Tensor, *, base: Tensor | None = None, sorted: bool = True) -> TopK:
        """Acts and indices `[..., k_base + k_boost]`, each part ordered by itself."""
        first = self.base.encode(x, base=base, sorted=sorted)
        acts, indices = self.boost.encode(x, base=base, sorted=sorted)
        if not self.training:
            acts = acts.masked_fill(acts < self.threshold, 0)
        indices = torch.where(acts > 0, indices + self.base.config.d_sae, 0)
        return TopK(torch.cat([first.acts, acts], -1), torch.cat([first.indices, indices], -1))

    @torch.no_grad()
    def follow(self, acts: Tensor) -> None:
        """Move the threshold towards the quantile of the boost's acts `[N, k]` of a whole batch;
        that of the first batch it becomes."""
        kept = max(1, round(self.keep * acts.numel()))
        now = acts.flatten().topk(kept, sorted=False).values.min().to(self.threshold.dtype)
        self.threshold.copy_(torch.where(self.threshold > 0, self.threshold.lerp(now, 0.01), now))

    def trainable_code(self, code: TopK) -> TopK:
        """The part of a code from `encode` that is the boost's, by its own indices."""
        acts, indices = (part[..., self.base.config.k :] for part in code)
        return TopK(acts, (indices - self.base.config.d_sae).clamp_min(0))

    def decode(self, acts: Tensor, indices: Tensor, *, base: Tensor | None = None) -> Tensor:
        """As `TopKSAE.decode`; slots may come in any order."""
        M = self.base.config.d_sae
        boosted = indices >= M
        parts = [acts.masked_fill(boosted, 0), acts.masked_fill(~boosted, 0)]
        rows = [indices.masked_fill(boosted, 0), (indices - M).clamp_min(0)]
        W_dec = [self.base.W_dec, self.boost.W_dec]
        return sparse_decode(parts, rows, W_dec, bias=self.b_dec, base=base)

    def dead_latent_loss(
        self,
        x: Tensor,
        error: Tensor,
        dead: Tensor,
        *,
        base: Tensor | None = None,
        total: Total = in_one_piece,
    ) -> Tensor:
        """Dead-latent loss of the boost; the base is frozen."""
        return self.boost.dead_latent_loss(x, error, dead, base=base, total=total)

    def extra_repr(self) -> str:
        return f"{describe_sizes(self.config)}, threshold={float(self.threshold):g}"

    def set_input_kind(self, kind: InputKind) -> None:
        super().set_input_kind(kind)
        self.base.set_input_kind(kind)
        self.boost.set_input_kind(kind)

    def at_k(self, k: int) -> "BoostedSAE":
        raise ValueError(
            f"at_k: k={k} for a boosted autoencoder, of {self.base.config.k} + "
            f"{self.boost.config.k} active latents; lower k before boosting"
        )

    def normalize_decoder(self) -> None:
        self.boost.normalize_decoder()

    def remove_parallel_gradient(self) -> None:
        self.boost.remove_parallel_gradient()

    @torch.no_grad()
    def rescale_(self, factor: float) -> None:
        """As `TopKSAE.rescale_`; a power of two changes no bit but exponents, and can be undone."""
        self.base.rescale_(factor)
        self.boost.rescale_(factor)
        self.threshold.mul_(factor)

    def save(self, folder: Path, **metadata: Any) -> None:
        """The base as it was, and the boost with its threshold in `boost/`."""
        self.base.save(folder, **{"kind": self.kind, **metadata})
        of_boost = {"threshold": float(self.threshold), "keep": self.keep}
        self.boost.save(folder / "boost", **{**metadata, **of_boost})

    @classmethod
    def load(cls, folder: str | Path) -> "BoostedSAE":
        """Read what `save` wrote, for use; errors as of `TopKSAE.load`, which reads the base
        alone."""
        folder = Path(folder)
        metadata = load_json(folder / "boost" / "cfg.json", "SAE")["metadata"]
        base, boost = TopKSAE.load(folder), TopKSAE.load(folder / "boost")
        return cls(base, boost, keep=metadata["keep"], threshold=metadata["threshold"]).eval()
