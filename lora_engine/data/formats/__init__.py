"""One file per annotation format.

`json_list` yields (line, value) for each row; annotations.py checks the rows and resolves the image
paths. `coco` is for evaluation only: captioning/references.py reads it. A new training format is a
new file here, and a line in `annotations.checked_rows`.
"""
