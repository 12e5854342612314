"""Sources: image data sets in the forms in which they are published, listed and read image by image.

source      the Source interface, SourceError, in-memory data (LabelledImages, ArraySource)
files       image folders and zip files, with ImageNet's class order
parquet     Parquet files with a column of encoded images
webdataset  tar files in WebDataset's format, also shard sets of pixels
cifar10     the binary archive of CIFAR-10
digits      scikit-learn's handwritten digits
opening     open_source: the source behind a name or path
"""
