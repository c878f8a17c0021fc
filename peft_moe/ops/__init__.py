"""The arithmetic of a mixture on one linear layer: one meaning (`reference`), one fast form."""

from .ranks import RankMap
from .reference import mix_reference
from .stacked import folded_delta, mix_stacked

__all__ = ["RankMap", "folded_delta", "mix_reference", "mix_stacked"]
