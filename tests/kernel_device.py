"""Device of the Triton kernels in tests."""

import torch

KERNEL_DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
"""The GPU where there is one, otherwise the CPU, where kernels run in Triton's interpreter."""
