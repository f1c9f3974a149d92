"""Pages that show each latent of a stack: its texts, its effects, its nearest relatives."""
