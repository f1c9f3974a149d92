"""Identity of the model that a stack was trained on."""

from dataclasses import dataclass

from resae.models.hooked import HookedLM


@dataclass(frozen=True)
class ModelIdentity:
    """Identity of the model that a stack was trained on."""

    name: str
    model_type: str
    d_model: int
    n_layers: int
    vocab_size: int

    @classmethod
    def of(cls, lm: HookedLM) -> "ModelIdentity":
        return cls(
            lm.name, lm.config.model_type, lm.d_model, lm.n_layers, int(lm.config.vocab_size)
        )
