"""Results as figures, sentences and one page."""
