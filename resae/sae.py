"""TopK sparse autoencoder of one activation: z = TopK_k(relu((x − b_dec) W_enc + b_enc)),
x̂ = z W_dec + b_dec.                                 Gao et al. 2024 (arXiv 2406.04093), section 2.3

`base` is a prediction of x, `[..., D]`: it is subtracted before encoding and added after decoding,
so that the code is of the residual. An autoencoder of residuals (`SAEConfig.input_kind`) cannot
encode without it. Stored as `encoder.weight [M, D]`, `encoder.bias [M]`, `W_dec
[M, D]`, `b_dec [D]`: sparsify's keys, in its files `cfg.json` and `sae.safetensors`.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resae.storage import load_json, load_tensors, save_json, save_tensors
from resae_kernels import ScreenedEncoder, TopK, sparse_decode, topk_encode

InputKind = Literal["activation", "affine_residual"]
Screening = Literal["statistical", "certain"]
SCREENINGS = ("statistical", "certain", None)


@dataclass(frozen=True)
class SAEConfig:
    """Sizes of one autoencoder, and what it encodes."""

    d_in: int
    """D, width of the activation."""
    d_sae: int
    """M, number of latents."""
    k: int
    """Active latents per token."""
    prefix_gain: float = 0.0
    """Of the j strongest latents alone every act counts (k / j) ** prefix_gain times: fewer latents
    have to carry a part of what the others would have added."""
    input_kind: InputKind = "activation"
    """`activation`: x itself; `affine_residual`: x minus a prediction, which `encode` then needs. A
    `ReSAE` sets it."""
    screening: Screening | None = "statistical"
    """How latents are ruled out by an 8-bit product when encoding on a CPU, before the rest are
    scored in float32. `statistical`: a latent of the TopK is missed with probability below 1e-12
    per row (proof: `resae_kernels.screened_encode`); `certain`: never, at more candidates; None: no
    screening, the whole float32 product."""

    def __post_init__(self) -> None:
        if self.screening not in SCREENINGS:
            raise ValueError(
                f"SAEConfig: screening={self.screening!r}, expected 'statistical', 'certain' or "
                f"None"
            )
        for name in ("d_in", "d_sae", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"SAEConfig: {name}={getattr(self, name)}, expected at least 1")
        if self.k > self.d_sae:
            raise ValueError(
                f"SAEConfig: k={self.k} exceeds the number of latents d_sae={self.d_sae}; lower k "
                f"or raise d_sae"
            )


class SAEOutput(NamedTuple):
    """What one autoencoder makes of N tokens."""

    x_hat: Tensor
    """`[..., D]`, reconstruction, `base` included."""
    code: TopK
    """Acts and indices `[..., k]`."""


class TopKSAE(nn.Module):
    """A TopK autoencoder. Initialised with random unit decoder rows, the encoder tied to them,
    biases zero; `seed` fixes the directions (give every layer its own: equal ones start out
    redundant).

    On a CPU codes come from a `ScreenedEncoder`: without gradients from a copy of the weight that
    is made at the first call (a quarter more memory), in training from one made for each large
    batch. `config.screening` chooses its margin.
    """

    def __init__(self, config: SAEConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(config.d_sae, config.d_in, generator=generator)
        directions /= directions.norm(dim=1, keepdim=True)
        self.encoder: nn.Linear = nn.utils.skip_init(  # type: ignore[assignment]
            nn.Linear, config.d_in, config.d_sae
        )
        self.encoder.weight.data.copy_(directions)
        self.encoder.bias.data.zero_()
        self.W_dec = nn.Parameter(directions.clone())
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        self._screened: ScreenedEncoder | None = None

    @property
    def W_enc(self) -> Tensor:
        """`[D, M]`, a view of `encoder.weight`."""
        return self.encoder.weight.T

    @property
    def b_enc(self) -> Tensor:
        return self.encoder.bias

    def encode(
        self, x: Tensor, *, base: Tensor | None = None, k: int | None = None, sorted: bool = True
    ) -> TopK:
        """Code of `x − base`, `[..., D]` → acts and indices `[..., k]`
        (`resae_kernels.topk_encode`).

        Raises:
            ValueError: an autoencoder of residuals without `base`.
        """
        if base is None and self.config.input_kind != "activation":
            raise ValueError(
                "TopKSAE: this autoencoder encodes the residual of an activation, and got no "
                "prediction; pass it as base=, let ReSAE.encode predict, or, if x is the residual, "
                "pass zeros"
            )
        k = self.config.k if k is None else k
        offsets = {"pre_bias": self.b_dec, "base": base}
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            screened = self.screened
            if screened is not None:
                return screened.encode(x, k, sorted=sorted, **offsets)
        weight, bias = self.encoder.weight, self.encoder.bias
        return topk_encode(x, weight, bias, k, sorted=sorted, **offsets)

    @property
    def screening(self) -> Screening | None:
        """`config.screening`; may be set."""
        return self.config.screening

    @screening.setter
    def screening(self, screening: Screening | None) -> None:
        self.config = replace(self.config, screening=screening)

    @property
    def screened(self) -> ScreenedEncoder | None:
        """What encodes on a CPU; its `explain` tells which path a call takes."""
        if self.screening is None:
            return None
        held, weight, bias = self._screened, self.encoder.weight, self.encoder.bias
        same = held is not None and held.weight is weight and held.bias is bias
        if held is None or not same or held.margin != self.screening:
            held = self._screened = ScreenedEncoder(weight, bias, margin=self.screening)
        return held

    def decode(self, acts: Tensor, indices: Tensor, *, base: Tensor | None = None) -> Tensor:
        """`acts, indices [..., k]` → x̂ `[..., D]`, plus `base` (`resae_kernels.sparse_decode`)."""
        return sparse_decode(acts, indices, self.W_dec, bias=self.b_dec, base=base)

    def extra_repr(self) -> str:
        return f"{_sizes(self.config)}, screening={self.screening!r}"

    def set_input_kind(self, kind: InputKind) -> None:
        self.config = replace(self.config, input_kind=kind)

    @property
    def trained(self) -> "TopKSAE":
        """The part that training changes: all of it."""
        return self

    def trained_code(self, code: TopK) -> TopK:
        """The part of a code that belongs to `trained`: all of it."""
        return code

    def decode_prefixes(
        self, code: TopK, prefixes: Sequence[int], *, base: Tensor | None = None
    ) -> list[Tensor]:
        """x̂ `[..., D]` of the j strongest latents for each j of `prefixes`, rising, of a sorted
        code: each adds its rows to the one before, so that all together gather k rows.
        HierarchicalTopK (arXiv 2505.24473), section 3; the gain is ours."""
        offset = self.b_dec if base is None else self.b_dec + base
        x_hats: list[Tensor] = []
        rows: Tensor | None = None
        first = 0
        for last in prefixes:
            acts, indices = (part[..., first:last] for part in code)
            rows = sparse_decode(acts, indices, self.W_dec, base=rows)
            x_hats.append(torch.add(offset, rows, alpha=self._gain(last)))
            first = last
        return x_hats

    def _gain(self, k: int) -> float:
        return (self.config.k / k) ** self.config.prefix_gain

    def forward(self, x: Tensor, *, base: Tensor | None = None) -> SAEOutput:
        code = self.encode(x, base=base)
        return SAEOutput(self.decode(*code, base=base), code)

    def at_k(self, k: int) -> "TopKSAE":
        """An autoencoder of the same parameters with fewer active latents, 1 ≤ k ≤ config.k; with a
        `prefix_gain` its encoder is a copy, that much larger."""
        if not 1 <= k <= self.config.k:
            raise ValueError(
                f"at_k: k={k}, expected 1 to {self.config.k}, with which the autoencoder was "
                f"trained"
            )
        shared = {id(part): part for part in (*self.parameters(), self._screened)}
        twin = copy.deepcopy(self, shared)
        twin.config = replace(self.config, k=k)
        if (gain := self._gain(k)) != 1:  # the same latents win, with acts so many times as large
            for name, parameter in self.encoder.named_parameters():
                larger = nn.Parameter(parameter.detach() * gain, parameter.requires_grad)
                setattr(twin.encoder, name, larger)
        return twin

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale every row of W_dec to norm 1."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Drop from W_dec's gradient what would only change the norm of a (unit) row."""
        if self.W_dec.grad is not None:
            along = (self.W_dec.grad * self.W_dec).sum(dim=1, keepdim=True)
            self.W_dec.grad -= along * self.W_dec

    @torch.no_grad()
    def rescale_(self, factor: float) -> None:
        """Become the autoencoder of `factor · x`: its code is `factor` times this one's, of the
        same latents. Exact for TopK, which a positive factor does not change; W_dec keeps its
        norm. The biases become new parameters: an autoencoder that shared them keeps its own."""
        bias, b_dec = self.encoder.bias, self.b_dec
        self.encoder.bias = nn.Parameter(bias * factor, requires_grad=bias.requires_grad)
        self.b_dec = nn.Parameter(b_dec * factor, requires_grad=b_dec.requires_grad)

    def save(self, folder: Path, **metadata: str | float | None) -> None:
        """Write `sae.safetensors` and then `cfg.json` (sparsify's keys, and `metadata`)."""
        save_tensors(folder / "sae.safetensors", self.state_dict())
        save_json(
            folder / "cfg.json",
            {
                "activation": "topk",
                "expansion_factor": 0,
                "normalize_decoder": True,
                "num_latents": self.config.d_sae,
                "k": self.config.k,
                "multi_topk": False,
                "skip_connection": False,
                "transcode": False,
                "d_in": self.config.d_in,
                "metadata": {
                    **metadata,
                    "prefix_gain": self.config.prefix_gain,
                    "input_kind": self.config.input_kind,
                    "screening": self.config.screening,
                },
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> "TopKSAE":
        """Read a folder in sparsify's layout, for use: in eval mode. sparsify wrote no `activation`
        before February 2025, when all of its autoencoders were TopK after ReLU.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, the folder is of SAELens, or the autoencoder is not a
                plain TopK one.
        """
        folder = Path(folder)
        _require_sparsify(folder)
        cfg = load_json(folder / "cfg.json", "SAE")
        activation = cfg.get("activation", "topk")
        if activation != "topk" or any(map(cfg.get, ("transcode", "skip_connection", "signed"))):
            raise ValueError(
                f"SAE {folder}: a transcoder, skip connection, signed latents or activation "
                f"{activation!r}; expected a plain TopK autoencoder"
            )
        absent = [name for name in ("d_in", "k") if name not in cfg]
        if absent:
            raise ValueError(
                f"SAE {folder}: cfg.json has no {', '.join(absent)}; expected sparsify's cfg.json"
            )
        d_sae = cfg.get("num_latents") or cfg["d_in"] * cfg.get("expansion_factor", 0)
        metadata = cfg.get("metadata") or {}
        known = ("prefix_gain", "input_kind", "screening")
        options = {name: metadata[name] for name in known if name in metadata}
        sae = cls(SAEConfig(cfg["d_in"], d_sae, cfg["k"], **options))
        tensors = load_tensors(folder / "sae.safetensors", "SAE")
        expected = {name: list(t.shape) for name, t in sae.state_dict().items()}
        found = {name: list(t.shape) for name, t in tensors.items()}
        if found != expected:
            raise ValueError(
                f"SAE {folder}: tensors {found} do not fit cfg.json, expected {expected}"
            )
        sae.to(tensors["W_dec"].dtype).load_state_dict(tensors)
        return sae.eval()


def _require_sparsify(folder: Path) -> None:
    """Raise ValueError for a folder of SAELens, which shares the name cfg.json and nothing else."""
    if (folder / "sae_weights.safetensors").exists():
        raise ValueError(
            f"SAE {folder}: a folder of SAELens (cfg.json, sae_weights.safetensors); expected one "
            f"of sparsify or resae (cfg.json, sae.safetensors). Of a SAELens TopK autoencoder copy "
            f"the four tensors by hand into TopKSAE(SAEConfig(d_in, d_sae, k)): encoder.weight = "
            f"W_enc.T, encoder.bias = b_enc, W_dec, b_dec"
        )


class BoostedSAE(nn.Module):
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

    def __init__(self, base: TopKSAE, boost: TopKSAE, *, keep: float = 0.1, threshold: float = 0.0):
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
    def trained(self) -> TopKSAE:
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

    def trained_code(self, code: TopK) -> TopK:
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

    def forward(self, x: Tensor, *, base: Tensor | None = None) -> SAEOutput:
        code = self.encode(x, base=base)
        return SAEOutput(self.decode(*code, base=base), code)

    def extra_repr(self) -> str:
        return f"{_sizes(self.config)}, threshold={float(self.threshold):g}"

    def set_input_kind(self, kind: InputKind) -> None:
        self.config = replace(self.config, input_kind=kind)
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

    def save(self, folder: Path, **metadata: str | float | None) -> None:
        """The base as it was, and the boost with its threshold in `boost/`."""
        self.base.save(folder, **metadata)
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


def _sizes(config: SAEConfig) -> str:
    return (
        f"d_in={config.d_in}, d_sae={config.d_sae}, k={config.k}, input_kind={config.input_kind!r}"
    )


Total = Callable[[Tensor], Tensor]
"""Makes of a sum over a piece of a batch the sum over the whole batch."""


def in_one_piece(sum_of_piece: Tensor) -> Tensor:
    """The `Total` of a batch that is one piece."""
    return sum_of_piece


def auxk_loss(
    sae: TopKSAE,
    x: Tensor,
    error: Tensor,
    dead: Tensor,
    k_aux: int,
    *,
    base: Tensor | None = None,
    total: Total = in_one_piece,
) -> Tensor:
    """How badly the k_aux strongest dead latents explain what the live ones leave; 0 if none is
    dead.

    `Σ‖e − ê‖² / Σ‖e‖²` with `e` the detached error and `ê` the decode of the dead latents' code, no
    bias. The code is the TopK of the dead latents alone, so the gradient reaches the encoder.
    Gao et al. 2024 (arXiv 2406.04093), appendix A.2, with the error's own energy as denominator.

    Args:
        x: `[N, D]`. error: `[N, D]`, x − x̂. dead: `[M]` bool. base: as in `encode`.
        total: of a batch in pieces; the losses of the pieces add up to that of the batch.

    Note:
        The gradients of `encoder.weight` and `W_dec` are sparse: added to those of the main loss
        they are dense, alone they stay sparse.
    """
    rows = dead.nonzero().squeeze(1)
    if not rows.numel():
        return x.new_zeros(())
    error = error.detach()
    # Sparse gradients are added to those of the main loss, dense ones would be `[M, D]` of zeros.
    weight, W_dec = (F.embedding(rows, W, sparse=True) for W in (sae.encoder.weight, sae.W_dec))
    bias = sae.encoder.bias[rows]
    if rows.numel() <= k_aux:  # all of them are in the code: no selection, dense products
        residual = x - sae.b_dec if base is None else x - base - sae.b_dec
        rebuilt = F.relu(F.linear(residual, weight, bias)) @ W_dec
    else:
        offsets = {"pre_bias": sae.b_dec, "base": base}
        code = topk_encode(x, weight, bias, k_aux, sorted=False, **offsets)
        rebuilt = sparse_decode(*code, W_dec)
    error_left = F.mse_loss(rebuilt.to(error.dtype), error, reduction="sum")
    return error_left / total(error.square().sum()).clamp_min(1e-12)
