"""Object stores: a local folder, S3 and HTTP behind one interface; files published whole."""
