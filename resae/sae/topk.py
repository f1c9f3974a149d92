"""TopK sparse autoencoder of one activation: z = TopK_k(relu((x − b_dec) W_enc + b_enc)),
x̂ = z W_dec + b_dec.                                 Gao et al. 2024 (arXiv 2406.04093), section 2.3

`prediction` is a prediction of x, `[..., D]`: it is subtracted before encoding and added after
decoding, so that the code is of the residual. An autoencoder of residuals (`SAEConfig.input_kind`)
cannot encode without it. Stored as `encoder.weight [M, D]`, `encoder.bias [M]`, `W_dec
[M, D]`, `b_dec [D]`: sparsify's keys, in its files `cfg.json` and `sae.safetensors`.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from resae.choices import Screening
from resae.sae.base import (
    Autoencoder,
    SAEConfig,
    StepWeights,
    describe_sizes,
    require_prediction,
)
from resae.sae.files import load_config, load_state, sae_config
from resae.sae.losses import Reduce, auxk_loss, no_reduce
from resae.sae.record import SAERecord
from resae.storage import save_json, save_tensors
from resae.strict_json import brief
from resae_kernels import ScreenedEncoder, SparseCode, autoencode, sparse_decode, topk_encode

if TYPE_CHECKING:
    pass


class TopKSAE(Autoencoder):
    """A TopK autoencoder. Initialised with random unit decoder rows, the encoder tied to them,
    biases zero; `seed` fixes the directions (give every layer its own: equal ones start out
    redundant).

    On a CPU codes come from a `ScreenedEncoder`: without gradients from a copy of the weight that
    is made at the first call (a quarter more memory), in training from one made for each large
    batch. `config.screening` chooses its margin.
    """

    kind = "topk"

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
        self,
        x: Tensor,
        *,
        prediction: Tensor | None = None,
        k: int | None = None,
        sorted: bool = True,
    ) -> SparseCode:
        """Code of `x − prediction`, `[..., D]` → acts and indices `[..., k]`
        (`resae_kernels.topk_encode`).

        Raises:
            ValueError: an autoencoder of residuals without `prediction`.
        """
        require_prediction(self, prediction)
        k = self.config.k if k is None else k
        offsets: dict[str, Any] = {"pre_bias": self.b_dec, "prediction": prediction}
        if self.screens(x):
            screened = self.screened
            if screened is not None:
                return screened.encode(x, k, sorted=sorted, **offsets)
        weight, bias = self.encoder.weight, self.encoder.bias
        return topk_encode(x, weight, bias, k, sorted=sorted, **offsets)

    @property
    def screening(self) -> Screening | str | None:
        """`config.screening`; may be set."""
        return self.config.screening

    @screening.setter
    def screening(self, screening: Screening | str | None) -> None:
        self.config = replace(self.config, screening=screening)

    @property
    def screened(self) -> ScreenedEncoder | None:
        """Encoder of what is screened; its `encode_with_info` tells which path a call takes."""
        if self.screening is not None:
            weight, bias = self.encoder.weight, self.encoder.bias
            self._screened = self.encoder_of(weight, bias, self._screened, str(self.screening))
        return None if self.screening is None else self._screened

    def decode(self, acts: Tensor, indices: Tensor, *, prediction: Tensor | None = None) -> Tensor:
        """`acts, indices [..., k]` → x̂ `[..., D]`, plus `prediction`
        (`resae_kernels.sparse_decode`)."""
        return sparse_decode(acts, indices, self.W_dec, bias=self.b_dec, prediction=prediction)

    def reconstructions(
        self, x: Tensor, *, prediction: Tensor | None = None
    ) -> tuple[list[Tensor], SparseCode]:
        """x̂ and the code, with one backward (`resae_kernels.autoencode`)."""
        require_prediction(self, prediction)
        x_hat, code = autoencode(
            x,
            self.encoder.weight,
            self.encoder.bias,
            self.config.k,
            self.W_dec,
            b_dec=self.b_dec,
            prediction=prediction,
            encoder=self.screened if self.screens(x) else None,
        )
        return [x_hat], code

    def extra_repr(self) -> str:
        return f"{describe_sizes(self.config)}, screening={self.screening!r}"

    def share_dictionary(self, other: Autoencoder) -> bool:
        theirs = other.step_weights
        if theirs is None:
            return False
        equal = torch.equal(self.encoder.weight, theirs.weight) and torch.equal(
            self.W_dec, theirs.W_dec
        )
        if equal:
            self.encoder.weight, self.W_dec = theirs.weight, theirs.W_dec
        return equal

    @property
    def step_weights(self) -> StepWeights:
        return StepWeights(self.encoder.weight, self.encoder.bias, self.config.k, self.W_dec)

    def dead_latent_loss(
        self,
        x: Tensor,
        error: Tensor,
        dead: Tensor,
        *,
        prediction: Tensor | None = None,
        reduce: Reduce = no_reduce,
    ) -> Tensor:
        """`auxk_loss` of D / 2 dead latents."""
        return auxk_loss(
            self, x, error, dead, max(1, x.shape[1] // 2), prediction=prediction, reduce=reduce
        )

    def _gain(self, k: int) -> float:
        return (self.config.k / k) ** self.config.prefix_gain

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
        """Scale every row of W_dec to norm 1, unless it is not trained."""
        if self.W_dec.requires_grad:
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

    def record(self) -> SAERecord:
        weight, bias = self.encoder.weight.detach(), self.encoder.bias.detach()
        W_dec, b_dec = self.W_dec.detach(), self.b_dec.detach()
        kind = self.config.input_kind
        return SAERecord(weight, bias, W_dec, b_dec, k=self.config.k, input_kind=kind)

    @classmethod
    def from_record(cls, record: SAERecord) -> Self:
        """The autoencoder of a record with a k; one that does not subtract b_dec from its input
        gets its encoder bias shifted (`SAERecord.with_b_dec_subtracted`)."""
        record = record.with_b_dec_subtracted()
        assert record.k is not None
        M, D = record.weight.shape
        sae = cls(SAEConfig(D, M, record.k, input_kind=record.input_kind))
        tensors = {
            "encoder.weight": record.weight,
            "encoder.bias": record.bias,
            "W_dec": record.W_dec,
            "b_dec": record.b_dec,
        }
        contiguous = {name: t.contiguous() for name, t in tensors.items()}
        sae.load_state_dict(contiguous, assign=True)
        return sae.eval()

    def save(self, folder: Path, **metadata: Any) -> None:
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
                    "kind": self.kind,
                    **metadata,
                    "prefix_gain": self.config.prefix_gain,
                    "input_kind": self.config.input_kind,
                    "screening": self.config.screening,
                },
            },
        )

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a folder in sparsify's layout, for use: in eval mode. sparsify wrote no `activation`
        before February 2025, when all of its autoencoders were TopK after ReLU.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, the folder is of SAELens, or the autoencoder is not a
                plain TopK one.
        """
        folder = Path(folder)
        _require_sparsify(folder)
        cfg = load_config(folder)
        activation = cfg.get("activation") or "topk"
        if activation != "topk" or any(map(cfg.get, ("transcode", "skip_connection", "signed"))):
            raise ValueError(
                f"SAE {folder}: a transcoder, skip connection, signed latents or activation "
                f"{brief(activation)}; expected a plain TopK autoencoder"
            )
        config = sae_config(folder, cfg)
        M, D = config.d_sae, config.d_in
        shapes = {"encoder.weight": [M, D], "encoder.bias": [M], "W_dec": [M, D], "b_dec": [D]}
        tensors = load_state(folder, shapes)  # before memory of these sizes is asked for
        sae = cls(config)
        sae.to(tensors["W_dec"].dtype).load_state_dict(tensors)
        return sae.eval()


def _require_sparsify(folder: Path) -> None:
    """Raise ValueError for a folder of SAELens, which shares the name cfg.json and nothing else."""
    if (folder / "sae_weights.safetensors").exists():
        raise ValueError(
            f"SAE {folder}: a folder of SAELens (cfg.json, sae_weights.safetensors); expected one "
            f"of sparsify or resae (cfg.json, sae.safetensors); resae.import_sae reads it"
        )
