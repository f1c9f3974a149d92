"""Counts of replaced tokens, per pass and per layer."""

from dataclasses import dataclass
from typing import NamedTuple


class PassCounts(NamedTuple):
    """Counts at one hook point in the passes of one kind."""

    calls: int = 0
    """Forward passes."""
    replaced: int = 0
    """Tokens whose activation was replaced."""
    skipped: int = 0
    """Tokens not replaced: special tokens and padding."""
    sinks: int = 0
    """Tokens not replaced as sinks (`resae.models.sinks`)."""


@dataclass(frozen=True)
class LayerCounts:
    """Counts at one hook point since the replacement began."""

    hook_point: str
    prefill: PassCounts
    """Passes over more than one token per row: prompts, whole texts, guesses being checked."""
    decode: PassCounts
    """Passes over one token per row: the steps of cached generation."""

    @property
    def calls(self) -> int:
        """Forward passes: one for the prompt, then one per generated token."""
        return self.prefill.calls + self.decode.calls

    @property
    def replaced(self) -> int:
        """Tokens whose activation was replaced."""
        return self.prefill.replaced + self.decode.replaced

    @property
    def skipped(self) -> int:
        """Tokens not replaced: special tokens and padding."""
        return self.prefill.skipped + self.decode.skipped

    @property
    def sinks(self) -> int:
        """Tokens not replaced as sinks."""
        return self.prefill.sinks + self.decode.sinks
