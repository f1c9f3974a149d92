"""Settings of what is read and where it runs."""

from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any

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
    """Column of the data that holds strings; or lists of token ids (input_ids), for which no
    tokenizer is needed; or conversations (messages), which go through the chat template."""
    split: Annotated[str, filled] = "train"
    """Split of the data to train on, for example train[:10%]; held out are rows of the split
    validation where there is one."""
    data_revision: Annotated[str | None, filled] = None
    """Branch, tag or commit of a hub dataset; None: its main branch."""
    encoding: Annotated[str, filled] = "utf-8"
    """Encoding of local .txt, .json, .jsonl and .csv files, for example latin-1."""
    revision: Annotated[str | None, filled] = None
    """Branch, tag or commit of the model on the hub; None: its main branch."""
    streaming: bool = False
    """Read the data while it downloads."""
    context_tokens: Annotated[int, whole(2)] = 128
    """Tokens per row."""
    held_out_rows: Annotated[int, whole(0)] = 64
    """Rows that are kept for evaluation and never trained on."""
    seed: Annotated[int, seed_number] = 0
    """Fixes initial directions and the order of the data."""


TEXT_SETTINGS = (
    "data",
    "data_revision",
    "split",
    "encoding",
    "text_column",
    "streaming",
    "context_tokens",
)
"""Settings of `Source` that say which text is read, and in rows of which length."""


def source_defaults(*names: str) -> dict[str, Any]:
    """Defaults of these settings of `Source`, for commands that read the rest from a run; None for
    one that every run gives."""
    found = {f.name: None if f.default is MISSING else f.default for f in fields(Source)}
    return {name: found[name] for name in names}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Machine."""

    device: Annotated[str, device_name] = "auto"
    """Device to run on: cpu, cuda, cuda:1, or auto: the GPU where there is one."""
    dtype: Annotated[str, DTYPES] = "float32"
    """Data type of the weights and activations of the language model."""
