"""One file per format of image-caption pairs.

A format has

    read(path, options) -> Iterator[Item | Problem]

for one source file (or folder, where a folder is the unit), with the captions as they are written.
sources.py finds out which format a file has; rows.py has what the formats share.
"""
