"""Image sets for evaluation, and reference statistics of real images.

image_sets            images read by number: folders, archives, .npz files, shard sets
latent_decoder        the autoencoder that decodes a shard set's latents
reference_statistics  reference statistics of images and of ADM's reference batches, and their cache files
reference_store       references on one feature network, computed where they are missing
statistics_job        statistics of an image set on a feature network, computed in blocks
stored_images         images that exist already, as plain data for a statistics job
"""
