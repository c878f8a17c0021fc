"""The arithmetic of a mixture on one linear layer: one meaning (`reference`), several forms, one entry.

A new form is one file with a class and a line below.
"""

from .cost import Choice, check_backend, choose, facts_of
from .folded import Folded, folded_delta
from .forms import FORMS, Facts, Form, Operands, register_form
from .gather import Gather
from .grouped import Grouped
from .mixing import mix
from .ranks import RankMap
from .reference import Reference, mix_reference
from .stacked import Stacked
from .triton_forms import TritonGather, TritonSorted, TritonStacked

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
