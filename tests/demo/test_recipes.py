import pytest

from resae.choices import MapType, PredictorKind
from resae.demo.recipes import (
    ELSEWHERE,
    EXTRA_METHODS,
    FAIR_RECIPES,
    FAMILY_RECIPES,
    LR_RECIPES,
    METHOD_GROUPS,
    RECIPES,
    SHOWN_TUNING,
    TUNING_METHODS,
    TUNINGS,
    divided,
)
from resae.evaluation.labels import LABELS


def test_every_recipe_is_one_method_that_can_be_trained_and_has_a_label():
    recipes = RECIPES + FAMILY_RECIPES + FAIR_RECIPES + LR_RECIPES
    names = [recipe.name for recipe in recipes]
    assert len(set(names)) == len(names)
    extra = {recipe.name for recipe in FAMILY_RECIPES + FAIR_RECIPES} | {"boost", *ELSEWHERE}
    extra |= set(TUNING_METHODS)
    assert SHOWN_TUNING in TUNINGS
    assert set(TUNING_METHODS) <= set(LABELS)
    assert set(EXTRA_METHODS) == extra == set(METHOD_GROUPS["all"])
    for recipe in recipes:
        assert recipe.predictor in tuple(PredictorKind)
        assert recipe.map_type in tuple(MapType)
        assert recipe.name in LABELS or recipe in LR_RECIPES  # the grid: a name says it all


@pytest.mark.parametrize(
    ("total", "weights", "parts"),
    [
        (24, [1, 1 / 3, 1 / 5], (16, 5, 3)),
        (12, [1, 1 / 3, 1 / 5], (8, 3, 1)),
        (9, [1, 1], (5, 4)),
        (6, [100, 1, 1], (4, 1, 1)),
    ],
)
def test_active_latents_aredivided_to_the_last_one(total, weights, parts):
    assert divided(total, weights) == parts
