"""The paper's claims, measured on a real language model."""
