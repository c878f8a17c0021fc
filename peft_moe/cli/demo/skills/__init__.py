"""The skills of the demo's base and experts: questions whose answers can be checked exactly."""

from .generate import (
    BASE,
    BASE_SKILLS_HELD_OUT,
    BASE_SKILLS_SEEN,
    EXPERTS,
    REFUSAL,
    flatten,
    generate,
    label,
    two_skill,
)
from .sample import MARKER, STOP, Sample, Split, write_jsonl

__all__ = [
    "BASE",
    "BASE_SKILLS_HELD_OUT",
    "BASE_SKILLS_SEEN",
    "EXPERTS",
    "MARKER",
    "REFUSAL",
    "STOP",
    "Sample",
    "Split",
    "flatten",
    "generate",
    "label",
    "two_skill",
    "write_jsonl",
]
