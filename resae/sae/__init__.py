"""Autoencoders of one activation."""
