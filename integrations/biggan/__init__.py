"""BigGAN: class-conditional pictures from a generator and a discriminator, and its parts for other people's GANs."""
