"""Data, features and metrics of images, on one machine: without Ray and MLflow.

Packages, in the order of their imports (each imports only those before it):

    storage      object stores (a local folder, S3, HTTP) and files that are published whole
    images       decoding, cropping, conversion, encoding, the KL autoencoder
    shards       WebDataset shard sets: description, writing, reading, order, loading, verification
    sources      image data sets as they are published: folders, zip, Parquet, tar, CIFAR-10, digits
    preparation  from a source of images to a shard set
    features     networks that turn images into features
    metrics      FID, KID, precision and recall, Inception Score, label agreement
    references   image sets for evaluation, and reference statistics
    conformance  tests that metrics and data sources of one's own keep their contracts
"""
