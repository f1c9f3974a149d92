"""What runs on a CPU: selection, sums, screening, and the compiled library."""
