import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measured import (
    assert_close_as_torch,
    assert_same,
    largest_allocation,
    random_code,
    scatter,
    values_and_gradients,
)
from torch import Tensor

from resae_kernels import reference, sparse_decode
from resae_kernels import sparse_decode as public_sparse_decode
from resae_kernels.sparse_decode import latent_outer, latent_sum

pytestmark = pytest.mark.usefixtures("poisoned_memory")
