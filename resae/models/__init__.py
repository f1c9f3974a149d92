"""Language models with named hook points."""
