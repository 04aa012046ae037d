"""One file per annotation format: text of a file -> its rows, not yet checked.

A reader yields (line, value) for each row, with value a dict that has "text" and "image";
annotations.py picks the reader, checks the rows, and resolves the image paths. A new format is a
new file here, and a line in `annotations.checked_rows`.
"""
