import json

import pytest
import torch

from resae import choices
from resae.choices import Loop, MapType, check_map_type
from resae.stack.affine import MAP_TENSORS
from resae_kernels.profiling.cost_model import MACHINES
from resae_kernels.profiling.specs import OPS


def test_choices_are_those_of_the_modules_that_use_them():
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in choices.DTYPES)
    assert set(MAP_TENSORS) == set(choices.MapType)
    for map_type in choices.MapType:
        check_map_type("previous", map_type, 4 if map_type == "low_rank" else None)
    assert choices.OPS == OPS
    assert tuple(MACHINES) == choices.GPUS


def test_words_are_strings_and_errors_name_all_of_them():
    assert Loop.OPEN == "open"
    assert {"open": 1}[Loop.OPEN] == 1
    assert (f"{Loop.OPEN}", repr(Loop.OPEN), json.dumps([Loop.OPEN])) == (
        "open",
        "'open'",
        '["open"]',
    )
    with pytest.raises(ValueError, match="a: loop='ajar', expected 'open' or 'closed'$"):
        Loop.check("ajar", "a: loop")
    with pytest.raises(ValueError, match="'scalar', 'diagonal', 'low_rank' or None$"):
        MapType.check(["full"], "map_type", "None")
    MapType.check("full", "map_type")
