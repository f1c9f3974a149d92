"""Affine maps between layers and the autoencoders of all selected layers, as one object."""
