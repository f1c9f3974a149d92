"""Text, token rows, and the activations that training reads."""
