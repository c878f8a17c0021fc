"""The arithmetic of a mixture on one linear layer: one meaning (`reference`), several forms, one entry.

A new form is one file with a class and a line below.
"""

from .backend import FORMS, Facts, Form, Operands, register_form
from .backends.folded import Folded, folded_delta
from .backends.gather import Gather
from .backends.grouped import Grouped
from .backends.reference import Reference, mix_reference
from .backends.stacked import Stacked
from .choose import Choice, check_backend, choose, facts_of
from .mix import mix
from .rank_map import RankMap
from .triton.backends import TritonGather, TritonSorted, TritonStacked

__all__ = [
    "FORMS",
    "Choice",
    "Facts",
    "Form",
    "Operands",
    "RankMap",
    "check_backend",
    "choose",
    "facts_of",
    "folded_delta",
    "mix",
    "mix_reference",
    "register_form",
]

_OWN = (Folded(), Stacked(), Grouped(), Gather(), Reference())
_TRITON = (TritonStacked(), TritonSorted(), TritonGather())
for _form in (*_OWN, *_TRITON):
    register_form(_form)
