"""The arithmetic of a mixture on one linear layer: one meaning (`reference`), several forms, one entry.

A new form is one file with a class and a line below.
"""

from .backend import BACKENDS, Backend, CallSpec, MixInputs, register_backend
from .backends.folded import Folded, folded_delta
from .backends.gather import Gather
from .backends.grouped import Grouped
from .backends.reference import Reference, mix_reference
from .backends.stacked import Stacked
from .choose import BackendChoice, call_spec_of, check_backend, choose
from .mix import mix
from .rank_map import RankMap
from .triton.backends import TritonGather, TritonSorted, TritonStacked

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendChoice",
    "CallSpec",
    "MixInputs",
    "RankMap",
    "call_spec_of",
    "check_backend",
    "choose",
    "folded_delta",
    "mix",
    "mix_reference",
    "register_backend",
]

_OWN = (Folded(), Stacked(), Grouped(), Gather(), Reference())
_TRITON = (TritonStacked(), TritonSorted(), TritonGather())
for _backend in (*_OWN, *_TRITON):
    register_backend(_backend)
