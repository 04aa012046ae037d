"""The version, in a module of its own so that it is found wherever Python is started."""

__version__ = "0.1.0"
