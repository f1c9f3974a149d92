"""Settings of a study: the models and their layers, and sizes. Nothing here imports torch."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from resae.choices import Choice

FETCHED = "~/.cache/resae/models"
"""Folder that `bench/real_models.py fetch` writes into."""


class Spacing(Choice):
    """Distance between the replaced layers: a third of the depth, or 2 blocks."""

    FAR = "far"
    NEAR = "near"


class Studied(NamedTuple):
    """A model that is studied, and the blocks that are replaced together."""

    far: tuple[int, ...]
    near: tuple[int, ...]


MODELS = {
    "tiny": Studied(far=(0, 3, 6), near=(1, 3, 5)),
    "smollm2-135m": Studied(far=(5, 15, 25), near=(13, 15, 17)),
    "gemma-3-270m": Studied(far=(3, 9, 15), near=(7, 9, 11)),
}
"""Names of studies; `tiny` is the embedded model."""


@dataclass(frozen=True)
class StudyConfig:
    """Everything that decides the numbers of a study."""

    name: str
    """One of `MODELS`."""
    k: tuple[int, ...] = (16, 32, 64)
    """Active latents per layer, compared; the middle one is the headline's."""
    expansion: int = 8
    """Latents per dimension of the model."""
    train_tokens: int = 1_000_000
    """Tokens that each stack is trained on."""
    calibration_tokens: int = 200_000
    """Tokens that the maps are fitted on; at most `train_tokens`."""
    batch_tokens: int = 1_024
    """Tokens per training step."""
    documents: int = 128
    """Held-out documents that are evaluated, one row each."""
    tuning_documents: int = 32
    """Further held-out documents, on which learning rates are chosen."""
    context_tokens: int = 128
    """Tokens per row."""
    seeds: int = 2
    """Seeds of the headline; all else has one."""
    lr_factors: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Learning rates that are tried, times the default of `TrainConfig`."""
    sweep_part: int = 4
    """Learning rates are tried on this part of the tokens: 4 is a quarter."""

    def __post_init__(self) -> None:
        if self.name not in MODELS:
            raise ValueError(f"reproduce: unknown {self.name!r}; choose of {', '.join(MODELS)}")
        if not self.k or list(self.k) != sorted(set(self.k)) or self.k[0] < 1:
            raise ValueError(
                f"reproduce: k={self.k}, expected rising numbers, for example 16,32,64"
            )
        if self.train_tokens < self.batch_tokens * self.sweep_part:
            raise ValueError(
                f"reproduce: train_tokens={self.train_tokens}, expected at least "
                f"{self.batch_tokens * self.sweep_part}: learning rates are tried on one of "
                f"{self.sweep_part} parts, of {self.batch_tokens} tokens or more"
            )
        if self.documents < 2 or self.tuning_documents < 1:
            raise ValueError(
                f"reproduce: documents={self.documents}, tuning_documents={self.tuning_documents}; "
                f"expected at least 2, for an interval, and 1"
            )

    @property
    def headline_k(self) -> int:
        return self.k[len(self.k) // 2]

    @property
    def sweep_tokens(self) -> int:
        """Tokens that a learning rate is tried on."""
        return self.train_tokens // self.sweep_part

    def blocks(self, spacing: str) -> tuple[int, ...]:
        """Numbers of the blocks that are replaced together."""
        return getattr(MODELS[self.name], spacing)

    @property
    def captured_blocks(self) -> tuple[int, ...]:
        """Blocks of both spacings, whose activations are captured in one pass."""
        return tuple(sorted({block for spacing in Spacing for block in self.blocks(spacing)}))

    def to_json(self) -> dict[str, Any]:
        """Settings as JSON gives them back."""
        settings = asdict(self)
        return {n: list(v) if isinstance(v, tuple) else v for n, v in settings.items()}


def model_path(name: str, given: str | None) -> str:
    """Name or path that `HookedLM.from_pretrained` takes for a study.

    Args:
        given: a folder or GGUF file of the model; None: where `bench/real_models.py fetch` puts it.

    Raises:
        FileNotFoundError: no model there; the message says how to fetch it.
    """
    if given is None and name == "tiny":
        return "embedded"
    path = Path(given or f"{FETCHED}/{name}.gguf").expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"reproduce: no model {path}; fetch it with `python bench/real_models.py fetch "
            f"{name}`, or name a folder or GGUF file of it with --model"
        )
    return str(path)
