"""The arithmetic of a mixture on one linear layer: one definition, several backends, one entry point.

``backends.reference`` defines the result, the other backends compute the same faster, and ``mix`` calls the
cheapest one that can serve. A new backend is one file with a class and an entry in the lists below.
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
from .triton.kernel_backends import TritonGather, TritonSorted, TritonStacked

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

# The order matters: of two backends that cost the same, the first one is chosen.
_TORCH = (Folded(), Stacked(), Grouped(), Gather(), Reference())
_TRITON = (TritonStacked(), TritonSorted(), TritonGather())
for _backend in (*_TORCH, *_TRITON):
    register_backend(_backend)
