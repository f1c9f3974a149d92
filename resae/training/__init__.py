"""Calibration, the training loop, checkpoints and several processes."""
