"""Images as arrays and tensors.

limits            ImageLimits: what an image from outside may cost
decode            encoded images to RGB, the centre crop, arrays; without torch
encode            grids, PNG files and folders of them; without torch
convert           uint8 to [-1, 1] and back
codec             interfaces of an autoencoder (Encoder, Decoder), the facts that identify one, registry of their kinds; without torch
autoencoder       load_autoencoder, and the KL autoencoders of diffusers
bfloat16_decoder  an autoencoder that decodes in bfloat16
"""
