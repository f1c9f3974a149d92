"""A frozen autoencoder and a second one that is trained on its error."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resae.choices import InputKind
from resae.sae.base import Autoencoder, SAEConfig, describe_sizes
from resae.sae.files import load_config
from resae.sae.losses import Reduce, no_reduce
from resae.sae.topk import TopKSAE
from resae.storage import require_inside
from resae.strict_json import require_fields
from resae_kernels import SparseCode, sparse_decode


class BoostedSAE(Autoencoder):
    """A frozen autoencoder and a second one of the same input, trained on the error of the first:
    x̂ = x̂_frozen + z_boost W_boost, without decoder bias.         SAE Boost (arXiv 2507.12990)

    The code is that of the frozen one, then that of the boost with indices M_frozen higher: to all
    that reads codes this is an autoencoder of M_frozen + M_boost latents. In training the k
    strongest of the boost count. In use only those of them above a threshold do, which keeps the
    boost silent on
    text that it was not trained for: the quantile of the training's acts, averaged over batches,
    that `keep` of them exceed (`follow`). Threshold 0 leaves TopK alone.

    Args:
        boost: its decoder bias is set to zero; both biases of decoders stay as they are.
    """

    kind = "boosted"
    dictionaries = 2
    follows_acts = True

    def __init__(
        self, frozen: Autoencoder, boost: TopKSAE, *, keep: float = 0.1, threshold: float = 0.0
    ):
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.boost = boost
        boost.b_dec.data.zero_()
        boost.b_dec.requires_grad_(False)
        self.keep = keep
        self.threshold: Tensor
        self.register_buffer("threshold", boost.b_dec.new_tensor(threshold))
        ours, its = boost.config, frozen.config
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

    def parts(self) -> dict[str, Autoencoder]:
        return {"frozen": self.frozen, "boost": self.boost}

    @property  # of two dictionaries, which are no one parameter
    def W_dec(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`[M_frozen + M_boost, D]`, a copy."""
        return torch.cat([self.frozen.W_dec, self.boost.W_dec])

    @property
    def b_dec(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.frozen.b_dec

    def encode(
        self, x: Tensor, *, prediction: Tensor | None = None, sorted: bool = True
    ) -> SparseCode:
        """Acts and indices `[..., k_frozen + k_boost]`, each part ordered by itself."""
        first = self.frozen.encode(x, prediction=prediction, sorted=sorted)
        acts, indices = self.boost.encode(x, prediction=prediction, sorted=sorted)
        if not self.training:
            acts = acts.masked_fill(acts < self.threshold, 0)
        indices = torch.where(acts > 0, indices + self.frozen.config.d_sae, 0)
        return SparseCode(
            torch.cat([first.acts, acts], -1), torch.cat([first.indices, indices], -1)
        )

    @torch.no_grad()
    def follow(self, acts: Tensor) -> None:
        """Move the threshold towards the quantile of the boost's acts `[N, k]` of a whole batch;
        that of the first batch it becomes."""
        kept = max(1, round(self.keep * acts.numel()))
        now = acts.flatten().topk(kept, sorted=False).values.min().to(self.threshold.dtype)
        self.threshold.copy_(torch.where(self.threshold > 0, self.threshold.lerp(now, 0.01), now))

    def trainable_code(self, code: SparseCode) -> SparseCode:
        """The part of a code from `encode` that is the boost's, by its own indices."""
        acts, indices = (part[..., self.frozen.config.k :] for part in code)
        return SparseCode(acts, (indices - self.frozen.config.d_sae).clamp_min(0))

    def decode(self, acts: Tensor, indices: Tensor, *, prediction: Tensor | None = None) -> Tensor:
        """As `TopKSAE.decode`; slots may come in any order."""
        M = self.frozen.config.d_sae
        boosted = indices >= M
        parts = [acts.masked_fill(boosted, 0), acts.masked_fill(~boosted, 0)]
        rows = [indices.masked_fill(boosted, 0), (indices - M).clamp_min(0)]
        W_dec = [self.frozen.W_dec, self.boost.W_dec]
        return sparse_decode(parts, rows, W_dec, bias=self.b_dec, prediction=prediction)

    def dead_latent_loss(
        self,
        x: Tensor,
        error: Tensor,
        dead: Tensor,
        *,
        prediction: Tensor | None = None,
        reduce: Reduce = no_reduce,
    ) -> Tensor:
        """Dead-latent loss of the boost; the other is frozen."""
        return self.boost.dead_latent_loss(x, error, dead, prediction=prediction, reduce=reduce)

    def extra_repr(self) -> str:
        return f"{describe_sizes(self.config)}, threshold={float(self.threshold):g}"

    def set_input_kind(self, kind: InputKind | str) -> None:
        super().set_input_kind(kind)
        self.frozen.set_input_kind(kind)
        self.boost.set_input_kind(kind)

    def at_k(self, k: int) -> "BoostedSAE":
        raise ValueError(
            f"at_k: k={k} for a boosted autoencoder, of {self.frozen.config.k} + "
            f"{self.boost.config.k} active latents; lower k before boosting"
        )

    def normalize_decoder(self) -> None:
        self.boost.normalize_decoder()

    def remove_parallel_gradient(self) -> None:
        self.boost.remove_parallel_gradient()

    @torch.no_grad()
    def rescale_(self, factor: float) -> None:
        """As `TopKSAE.rescale_`; a power of two changes no bit but exponents, and can be undone."""
        self.frozen.rescale_(factor)
        self.boost.rescale_(factor)
        self.threshold.mul_(factor)

    def save(self, folder: Path, **metadata: Any) -> None:
        """The frozen one as it was, and the boost with its threshold in `boost/`."""
        self.frozen.save(folder, **{"kind": self.kind, **metadata})
        of_boost = {"threshold": float(self.threshold), "keep": self.keep}
        self.boost.save(folder / "boost", **{**metadata, **of_boost})

    @classmethod
    def load(cls, folder: str | Path) -> "BoostedSAE":
        """Read what `save` wrote, for use; errors as of `TopKSAE.load`, which reads the frozen
        one alone."""
        folder = Path(folder)
        where = f"SAE {folder / 'boost'}: cfg.json"
        require_inside(folder / "boost", "SAE")
        metadata = load_config(folder / "boost")["metadata"]
        require_fields(metadata, {"keep": float, "threshold": float}, where)
        frozen, boost = TopKSAE.load(folder), TopKSAE.load(folder / "boost")
        if not 0 < metadata["keep"] <= 1 or metadata["threshold"] < 0:
            raise ValueError(
                f"{where}: keep={metadata['keep']}, threshold={metadata['threshold']}; expected "
                f"above 0 up to 1, and 0 or more"
            )
        if (frozen.config.d_in, frozen.W_dec.dtype) != (boost.config.d_in, boost.W_dec.dtype):
            raise ValueError(
                f"{where}: of width {boost.config.d_in} and {boost.W_dec.dtype}, the frozen one is "
                f"of {frozen.config.d_in} and {frozen.W_dec.dtype}; restore the folder"
            )
        return cls(frozen, boost, keep=metadata["keep"], threshold=metadata["threshold"]).eval()
