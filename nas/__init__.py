"""Score, search and distil: the `nas` command, its run directory, costs, scoring and search."""

__version__ = "0.1.0"
