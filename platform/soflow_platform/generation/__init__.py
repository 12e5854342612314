"""Weights to images by index, and sets of images to files.

chosen_labels           labels by a rule or from a table
decoding                samples of a network to images
diffusers_pipeline      the pipeline of a folder for diffusers, copied there
diffusers_transformer   the network of a folder for diffusers, copied there
execution               how network and decoder are run: precision, compiled, recorded
finished_set            completes a set: manifest, .npz, grid; verifies one
generator               samples and images from a weights file
output_formats          PNG, WebDataset, Parquet, .npz, latents
parts                   makes parts of a set and publishes them with checksums
plan                    which images a set holds, by which settings, and what of it is there
pyfunc_model            a registered generator as MLflow loads it
sampling                samples by index, and the settings that act at sampling alone
"""
