"""Images as arrays and tensors: decoding, cropping, conversion, encoding, the KL autoencoder."""
