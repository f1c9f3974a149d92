"""The Triton kernels, their launchers and their tiles."""
