"""Questions with exactly checkable answers: what the demo's base and experts can do."""

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
