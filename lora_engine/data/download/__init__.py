"""Lists of web addresses -> tars of images, by img2dataset in an environment of its own."""
