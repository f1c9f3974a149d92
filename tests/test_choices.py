import torch

from resae import choices
from resae.choices import check_map_type
from resae_kernels.profiling.cost_model import MACHINES
from resae_kernels.profiling.specs import OPS


def test_choices_are_those_of_the_modules_that_use_them():
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in choices.DTYPES)
    for map_type in choices.MAP_TYPES:
        check_map_type("previous", map_type, 4 if map_type == "low_rank" else None)
    assert choices.OPS == OPS
    assert tuple(MACHINES) == choices.GPUS
