"""The methods that the demo compares: how each is trained."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How one compared method is trained."""

    name: str
    predictor: str
    k_grows: bool = False
    """Layer l gets (l+1)·k active latents: as many as a ReSAE reconstruction there is made of."""
    loop: str = "open"
    form: str = "full"
    shared: bool = False
    nested: bool = False
    """One stack, of the largest k, trained over prefixes and evaluated at every k."""
    one_k: bool = False
    """Trained at the middle k alone."""


RECIPES = (
    Recipe("raw", "none"),
    Recipe("raw_equal_total", "none", k_grows=True),
    Recipe("identity", "identity"),
    Recipe("resae", "previous"),
)
EXTRA_RECIPES = (
    Recipe("resae_closed", "previous", loop="closed"),
    Recipe("all_previous", "all_previous"),
    Recipe("all_previous_scalar", "all_previous", form="scalar", one_k=True),
    Recipe("all_previous_diagonal", "all_previous", form="diagonal", one_k=True),
    Recipe("all_previous_low_rank", "all_previous", form="low_rank", one_k=True),
    Recipe("mlsae", "none", shared=True),
    Recipe("hierarchical", "none", nested=True),
)
EXTRA_METHODS = (*(recipe.name for recipe in EXTRA_RECIPES), "boost")
