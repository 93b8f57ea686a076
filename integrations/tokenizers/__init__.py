"""One autoencoder with exchangeable bottlenecks: what lies between an encoder and a decoder, continuous or discrete."""
