"""Image data sets as people have them: folders, zip, Parquet, tar, CIFAR-10, digits."""
