"""Cards of latents as dataclasses: what a page, JSON or a notebook shows of each.

`LatentReport.to_dict` is the content of latents.json, schema version 1: its fields, those of
`LatentCard` and of its parts, under their names.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from resae.latents.ablation import Ablation

SCHEMA_VERSION = 1
MOST_CARDS = 20
"""Cards of a report that a notebook shows."""
MOST_SHOWN = 5
"""Passages and tokens of a card that it shows."""


@dataclass(frozen=True)
class Passage:
    """A window of text in which a latent fires."""

    row: int
    """Row of the text, from 0."""
    start: int
    """Position in its row of the window's first token."""
    token_ids: list[int]
    """W tokens."""
    tokens: list[str]
    """The tokens as text."""
    acts: list[float]
    """Act at each of them; to a 2,000th of the largest."""
    peak: int
    """Index among them of the token with the largest act in the row."""

    def marked_html(self) -> str:
        """The text with the tokens marked at which the latent fires."""
        from html import escape

        pieces = []
        for token, act in zip(self.tokens, self.acts, strict=True):
            text = escape(token.replace("\n", "⏎"))
            pieces.append(f'<mark title="{act:.4g}">{text}</mark>' if act > 0 else text)
        return "".join(pieces)


@dataclass(frozen=True)
class TokenEffect:
    """Change of one token's logit."""

    token_id: int
    token: str
    logit: float
    """Logits per unit of act, less the mean over the vocabulary."""


@dataclass(frozen=True)
class Neighbour:
    """A latent of another layer with a similar direction."""

    hook_point: str
    latent: int
    cosine: float
    """Cosine of the directions themselves."""
    transported_cosine: float | None
    """Cosine after the direction of the earlier layer is transported through the maps; None: the
    stack has no maps."""


@dataclass(frozen=True)
class LatentCard:
    """One latent of one selected layer."""

    layer: int
    """Position among the selected layers."""
    hook_point: str
    latent: int
    firings: int
    """Tokens at which it fires."""
    density: float
    """Share of all encoded tokens at which it fires."""
    mean_act: float | None
    """Mean act where it fires; None: it never does."""
    largest_act: float | None
    bin_width: float
    """Width of a bin of `histogram`."""
    histogram: list[int]
    """Firings by act, bins from 0 up; trailing empty ones are left out."""
    passages: list[Passage]
    """The strongest, one per row of text at most; repeated text is left out."""
    samples: list[Passage]
    """Random ones."""
    raised: list[TokenEffect]
    """Tokens whose logits its direction raises most."""
    lowered: list[TokenEffect]
    """Tokens whose logits it lowers most."""
    nearest: list[Neighbour]
    """In each other layer, by either cosine."""
    ablation: Ablation | None = None
    """None: not measured, or it never fires."""

    @property
    def name(self) -> str:
        return f"{self.hook_point} #{self.latent}"

    def _repr_html_(self) -> str:
        from html import escape

        from resae_kernels.notebook import table_html

        facts = f"{self.name}: fires at {self.firings:,} tokens, density {self.density:.3%}"
        lines = "".join(f"<li>{p.marked_html()}</li>" for p in self.passages[:MOST_SHOWN])
        effects = [(repr(effect.token), effect.logit) for effect in self.raised[:MOST_SHOWN]]
        raised = table_html("makes more likely", ("token", "logit"), effects)
        return f"<p><b>{escape(facts)}</b></p><ol>{lines}</ol>{raised}"


@dataclass(frozen=True)
class LatentReport:
    """Cards of latents, and what they are of."""

    model: str
    stack: str
    """Name of the run or stack."""
    layers: list[str]
    """Hook points of the selected layers."""
    d_sae: list[int]
    """Latents of each."""
    never_fired: list[int]
    """Latents of each that never fired."""
    tokens: int
    """Tokens of text that were encoded."""
    rows: int
    """Rows of text that were read."""
    row_tokens: int
    """Tokens of a row of text."""
    logits_through: str
    """The way from a latent's direction to the logits."""
    settings: dict[str, Any]
    """Text and how it was read."""
    latents: list[LatentCard] = field(default_factory=list[LatentCard])

    def to_dict(self) -> dict[str, Any]:
        """The content of latents.json: `schema_version`, and the fields of this class, of
        `LatentCard` and of its parts under their names."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    def _repr_html_(self) -> str:
        from resae_kernels.notebook import table_html

        rows: list[tuple[object, ...]] = []
        for card in self.latents[:MOST_CARDS]:
            peaks = dict.fromkeys(repr(p.tokens[p.peak]) for p in card.passages[:MOST_SHOWN])
            raised = "  ".join(repr(effect.token) for effect in card.raised[:MOST_SHOWN])
            facts = (card.name, f"{card.density:.3%}", card.largest_act)
            rows.append((*facts, "  ".join(peaks), raised))
        left = f", the first {MOST_CARDS}" * (len(self.latents) > MOST_CARDS)
        title = f"{len(self.latents)} latents of {self.stack or self.model}{left}"
        heads = ("latent", "density", "largest act", "fires on", "makes more likely")
        return table_html(f"{title}; {self.tokens:,} tokens of text", heads, rows)
