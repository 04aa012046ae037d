"""Which files and formats are behind the paths that a person gives?"""
