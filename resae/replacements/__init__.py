"""Replacing layers of a running model, editing latents, generating text."""
