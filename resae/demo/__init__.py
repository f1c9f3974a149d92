"""Everything on the embedded model and corpus."""
