"""YAML recipes that say which candidates a layer may become, and their strict loader.

space = load_space("default")                      # a recipe of this package
space = load_space("my_space.yaml", target="vllm")  # or any file
space.layer_candidates(shape, layer=3)             # -> list[LayerSpec], the parent's own layer first
"""

from search_spaces.loader import SearchSpace, available_spaces, load_space

__all__ = ["SearchSpace", "available_spaces", "load_space"]
