"""CPU implementations: selection, sums, screening, and the compiled library."""
