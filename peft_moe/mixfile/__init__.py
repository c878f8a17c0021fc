"""A mixture described in YAML: read strictly, inspected before any weight loads, then built."""

from .build import build_mixture
from .inspect import inspect_file
from .schema import MixFile, read_mix_file

__all__ = ["MixFile", "build_mixture", "inspect_file", "read_mix_file"]
