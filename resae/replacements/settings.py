"""Arguments of `replacement`, checked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from resae.choices import KeptError, Loop, Mode
from resae.models.points import HookPoint
from resae.replacements.edits import ActiveEdits, Interventions
from resae.stack.stack import AffineOnly, ReSAE
from resae_kernels import SparseCode, Transported

OnCodes = Callable[[str, SparseCode], SparseCode | None]


@dataclass(frozen=True)
class Settings:
    """Arguments of `replacement`, checked."""

    mode: str
    loop: str
    write_points: Sequence[HookPoint]
    replace_special: bool
    clean: Sequence[Tensor] | None
    keep_error: str | bool
    """A `KeptError`, or False."""
    gradient: bool
    interventions: Interventions
    on_codes: OnCodes | None

    def check(self, stack: ReSAE | AffineOnly) -> None:
        """Raise ValueError for settings that do not go together, or not with this stack."""
        Mode.check(self.mode, "replacement: mode")
        Loop.check(self.loop, "replacement: loop")
        if self.keep_error is not False:
            KeptError.check(self.keep_error, "replacement: keep_error", "True", "False")
        if self.needs_codes and (self.mode != "online" or not isinstance(stack, ReSAE)):
            raise ValueError(
                "replacement: interventions and on_codes need the codes of the running stream; use "
                "mode='online' and a stack with autoencoders"
            )
        if self.keep_error and self.mode != "online":
            raise ValueError(
                f"replacement: keep_error={self.keep_error!r} with mode={self.mode!r}; use "
                f"mode='online'"
            )
        if self.gradient and self.mode != "online":
            raise ValueError(
                f"replacement: gradient=True with mode={self.mode!r}, whose clean pass has no "
                f"gradient; use mode='online'"
            )

    @property
    def needs_codes(self) -> bool:
        return bool(self.interventions.edits) or self.on_codes is not None

    def transported(
        self, stack: ReSAE | AffineOnly, max_bytes: int, edits: ActiveEdits | None
    ) -> Transported | None:
        """Dictionaries transported to later layers, where they are asked for and fit."""
        if not max_bytes or not isinstance(stack, ReSAE):
            return None
        if self.mode != "online" or self.loop != "closed":
            raise ValueError(
                f"replacement: transport_bytes with mode={self.mode!r} and loop={self.loop!r}; "
                f"transported dictionaries predict from codes what was put in: use mode='online' "
                f"and loop='closed', or leave it out"
            )
        if self.gradient:
            raise ValueError(
                "replacement: transport_bytes with gradient=True; transported dictionaries pass no "
                "gradient on, leave one of the two out"
            )
        return stack.transported(max_bytes, vectors=edits.vectors if edits else None)
