from resae.choices import FORMS, KINDS
from resae.recipes import EXTRA_METHODS, EXTRA_RECIPES, RECIPES
from resae.report import LABELS


def test_every_recipe_is_one_method_that_can_be_trained_and_has_a_label():
    recipes = RECIPES + EXTRA_RECIPES
    names = [recipe.name for recipe in recipes]
    assert len(set(names)) == len(names)
    assert set(EXTRA_METHODS) == {*(recipe.name for recipe in EXTRA_RECIPES), "boost"}
    for recipe in recipes:
        assert recipe.predictor in KINDS
        assert recipe.form in FORMS
        assert recipe.name in LABELS
