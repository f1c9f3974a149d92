"""Settings of what is read and where it runs."""

from dataclasses import dataclass
from typing import Annotated

from resae.arguments import device as device_name
from resae.arguments import filled, names, whole
from resae.arguments import seed as seed_number
from resae.choices import DTYPES
from resae.settings import Shown


@dataclass(frozen=True, kw_only=True)
class Source:
    """Model and text."""

    model: Annotated[str, filled, Shown("MODEL", positional=True)]
    """Hub name or local folder of the language model, or `embedded`."""
    data: Annotated[str, filled, Shown("DATA", positional=True)]
    """Hub dataset (name or name:configuration), local folder or file, or `embedded`."""
    layers: Annotated[tuple[str, ...] | None, names] = None
    """Blocks (their hook_resid_post) or hook points, in the order of the forward pass, for example
    1,3,5. At hook_mlp_out and hook_attn_out predicting a layer from others gained nothing in the
    demo, and lost a third more than raw SAEs (predictor none) of equal total latents."""
    text_column: Annotated[str, filled] = "text"
    """Column of the data that holds the text."""
    streaming: bool = False
    """Read the data while it downloads."""
    context_tokens: Annotated[int, whole(2)] = 128
    """Tokens per row."""
    held_out_rows: Annotated[int, whole(0)] = 64
    """Rows that are kept for evaluation and never trained on."""
    seed: Annotated[int, seed_number] = 0
    """Fixes initial directions and the order of the data."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Machine."""

    device: Annotated[str, device_name] = "auto"
    """Device to run on: cpu, cuda, cuda:1, or auto: the GPU where there is one."""
    dtype: Annotated[str, DTYPES] = "float32"
    """Data type of the weights and activations of the language model."""
