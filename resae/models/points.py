"""Names of places on the residual stream."""

from dataclasses import dataclass

SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


@dataclass(frozen=True, order=True)
class HookPoint:
    """A place in the forward pass; ordered as the pass meets them."""

    layer: int
    order: int
    site: str

    @property
    def name(self) -> str:
        return f"blocks.{self.layer}.hook_{self.site}"
