import torch

from resae import choices
from resae.choices import check_form
from resae_kernels.profiling.cost_model import MACHINES
from resae_kernels.profiling.specs import OPS


def test_choices_are_those_of_the_modules_that_use_them():
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in choices.DTYPES)
    for form in choices.FORMS:
        check_form("previous", form, 4 if form == "low_rank" else None)
    assert choices.OPS == OPS
    assert tuple(MACHINES) == choices.GPUS
