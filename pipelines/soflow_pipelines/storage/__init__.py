"""Object stores (a local folder, S3, HTTP) behind one interface, and files that are published whole.

files         atomic writes, moves and temporary folders on this machine; JSON; SHA-256
object_store  the ObjectStore interface and StorageError
local         LocalFolder: a folder of this machine
s3            S3Folder: a prefix of an S3 bucket
http          WebFolder: a folder of a web server, read only
uris          URIs without secrets
opening       open_storage: the store behind a path or URI; staging folders and their large files
direct_file   DirectFile: a large file that is written past the page cache
"""
