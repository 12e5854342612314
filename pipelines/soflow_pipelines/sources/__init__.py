"""Sources: image data sets in the forms in which they are published, listed and read image by image.

source      the Source interface, SourceError, in-memory data (LabelledImages, ArraySource)
listing     files of a folder: each folder once, hidden files passed over; formats that are known and not read
label_files labels in text and JSON, and the classes that they make
files       image folders and zip files, with ImageNet's class order
parquet     Parquet files with a column of encoded images
tar_files   members of tar files, up to the end mark
webdataset  tar files in WebDataset's format, also shard sets of pixels
cifar10     the binary archive of CIFAR-10
generated   image sets that `soflowctl generate` wrote
hdf5        HDF5 files of latents, as the official SoFlow code prepares them
digits      scikit-learn's handwritten digits
opening     open_source: the source behind a name or path
"""
