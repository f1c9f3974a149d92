"""The methods that are compared: how each is trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from resae.training.config import TrainConfig

LOW_RANK = 16
"""The low-rank maps have a sixteenth of the width as rank."""


@dataclass(frozen=True)
class Recipe:
    """Training settings of one compared method."""

    name: str
    predictor: str
    k_grows: bool = False
    """Layer l gets (l+1)·k active latents: as many as a ReSAE reconstruction there is made of."""
    loop: str = "open"
    map_type: str = "full"
    shared: bool = False
    nested: bool = False
    """One stack, of the largest k, trained over prefixes and evaluated at every k."""
    one_k: bool = False
    """Trained at the middle k alone."""
    k_weight: Callable[[int, int], float] | None = None
    """The L·k active latents are divided in proportion to this weight of layer i = 1, …, L, given i
    and L; None: equally."""
    dictionary: str = "own"
    """Latents of layer i = 1, …, L: d_sae (`own`), i·d_sae, as many as a ReSAE reconstruction there
    can draw on (`chain`), or L·d_sae (`whole`)."""
    lr: float | None = None
    """Peak learning rate; None: that of `TrainConfig`."""
    length: int = 1
    """Trained on this many times the tokens."""

    def settings(
        self,
        layers: tuple[str, ...],
        k: int,
        d_sae: int,
        *,
        d_model: int,
        ks: Sequence[int] = (),
        **further: Any,
    ) -> TrainConfig:
        """Settings of the training loop.

        Args:
            k, d_sae: nominal active latents, and latents, per layer.
            ks: every compared k, which `nested` trains at once.
            further: settings of `TrainConfig` that are the same for all methods.
        """
        L = len(layers)
        prefixes = None
        if self.nested:
            prefixes = tuple(sorted({max(1, ks[0] // 2), *ks, max(1, ks[-1] // 2)}))
        factors = {"own": (1,) * L, "chain": tuple(range(1, L + 1)), "whole": (L,) * L}
        weight = self.k_weight or (lambda *_: 1)
        shares = divided(L * k, [weight(i, L) for i in range(1, L + 1)])
        return TrainConfig(
            layers=layers,
            k=tuple(range(k, L * k + 1, k)) if self.k_grows else shares,
            d_sae=tuple(d_sae * factor for factor in factors[self.dictionary]),
            prefixes=prefixes,
            lr=self.lr,
            predictor=self.predictor,
            map_type=self.map_type,
            rank=max(1, d_model // LOW_RANK) if self.map_type == "low_rank" else None,
            loop=self.loop,
            shared=self.shared,
            **further,
        )


def divided(total: int, weights: Sequence[float]) -> tuple[int, ...]:
    """`total` in whole parts, at least 1 each and nearly in proportion to `weights`: one by one to
    the part that is furthest below its share."""
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [1] * len(weights)
    for _ in range(total - len(weights)):
        behind = [share - part for share, part in zip(exact, parts, strict=True)]
        parts[behind.index(max(behind))] += 1
    return tuple(parts)


RECIPES = (
    Recipe("raw", "none"),
    Recipe("raw_equal_total", "none", k_grows=True),
    Recipe("identity", "identity"),
    Recipe("resae", "previous"),
)
BEST_LR = {
    "raw": 1.2e-2,
    "raw_equal_total": 1.2e-2,
    "raw_matched": 1.2e-2,
    "raw_wide": 1.2e-2,
    "identity": 1.6e-2,
    "resae": 1.6e-2,
}
"""Peak learning rate of the rows called `_best_lr`: the best of `LR_GRID` online at k = 8 (`resae
demo --k 8 --methods learning_rates`)."""
LR_GRID = (4e-3, 8e-3, 1.2e-2, 1.6e-2, 2.4e-2)
USUAL_LR = 8e-3
"""`TrainConfig`'s at 512 latents. Larger dictionaries of raw SAEs are compared at it too: at the
lower one that `TrainConfig` takes for them they lose more here."""
NESTED_LR = 1.6e-2
"""Peak learning rate over prefixes, twice the usual one: at 200,000 tokens the usual one leaves FVU
up to 6 % above that of stacks trained at that k. Those, which have the usual one, would gain too:
FVU 7 to 13 % lower at k = 32, 1 to 6 % at 8, up to 3 % at 4."""
LONG = 4
"""Rows called `_long` are trained on this many times the tokens."""

FAMILY_RECIPES = (
    Recipe("resae_closed", "previous", loop="closed"),
    Recipe("all_previous", "all_previous"),
    Recipe("all_previous_scalar", "all_previous", map_type="scalar", one_k=True),
    Recipe("all_previous_diagonal", "all_previous", map_type="diagonal", one_k=True),
    Recipe("all_previous_low_rank", "all_previous", map_type="low_rank", one_k=True),
    Recipe("mlsae", "none", shared=True),
    Recipe("hierarchical", "none", nested=True, lr=NESTED_LR),
)
LARGE_RECIPES = (
    Recipe("raw_matched", "none", k_grows=True, dictionary="chain", lr=USUAL_LR),
    Recipe("raw_wide", "none", k_grows=True, dictionary="whole", lr=USUAL_LR),
)
FAIR_RECIPES = (
    *LARGE_RECIPES,
    *(
        replace(recipe, name=f"{recipe.name}_best_lr", lr=BEST_LR[recipe.name], one_k=True)
        for recipe in (*RECIPES, *LARGE_RECIPES)
    ),
    *(
        replace(recipe, name=f"{recipe.name}_long", length=LONG, one_k=True)
        for recipe in (*RECIPES, *LARGE_RECIPES)
    ),
    Recipe("resae_k_first", "previous", k_weight=lambda i, _: 1 / (2 * i - 1), one_k=True),
    Recipe("resae_k_falling", "previous", k_weight=lambda i, L: L + 1 - i, one_k=True),
    Recipe("resae_k_rising", "previous", k_weight=lambda i, _: i, one_k=True),
)
LR_RECIPES = tuple(
    replace(recipe, name=f"{recipe.name}_lr_{lr:g}", lr=lr, one_k=True)
    for recipe in (*RECIPES, *LARGE_RECIPES)
    for lr in LR_GRID
)
ELSEWHERE: dict[str, str | None] = {
    "all_blocks": None,
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
}
"""Further hook points at which `RECIPES` are compared, at the middle k: this one of the configured
blocks; None: the stream after every block."""


@dataclass(frozen=True)
class Tuning:
    """Online training of a trained stack: a further method."""

    of: str
    """Name of the recipe that the stack was trained by, one of `RECIPES`."""
    objective: str = "kl"
    """`kl`, or, for the control, `mse`: as many steps of the loss that it was trained on."""

    @property
    def name(self) -> str:
        return f"{self.of}_{'online' if self.objective == 'kl' else 'more'}"


TUNINGS = tuple(Tuning(recipe.name, objective) for recipe in RECIPES for objective in ("kl", "mse"))
SHOWN_TUNING = Tuning("resae")
"""The one that the demo always has, at the middle k."""
TUNING_METHODS = tuple(tuning.name for tuning in TUNINGS)
FAIR_METHODS = tuple(recipe.name for recipe in FAIR_RECIPES)
EXTRA_METHODS = (
    *(recipe.name for recipe in FAMILY_RECIPES),
    "boost",
    *FAIR_METHODS,
    *TUNING_METHODS,
    *ELSEWHERE,
)
LR_METHODS = tuple(recipe.name for recipe in LR_RECIPES)
METHOD_GROUPS = {
    "all": EXTRA_METHODS,
    "fair": FAIR_METHODS,
    "online": TUNING_METHODS,
    "elsewhere": tuple(ELSEWHERE),
    "learning_rates": LR_METHODS,
}
"""Names that `resae demo --methods` takes for several methods."""
