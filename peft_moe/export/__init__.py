"""Ways out of a mixture: one plain LoRA, merged weights, the experts themselves, or a distilled LoRA."""

from .distilled import Distillation
from .export import KINDS, export
from .report import ExportReport

__all__ = ["KINDS", "Distillation", "ExportReport", "export"]
