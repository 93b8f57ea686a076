"""A complete, small DALL-E: a discrete VAE, a transformer over text and image tokens, a task with an exact score."""
