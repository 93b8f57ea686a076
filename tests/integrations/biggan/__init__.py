"""BigGAN and its parts."""
