"""Ways out of a mixture: one plain LoRA, merged weights, the experts themselves, or a distilled LoRA."""

from .distilled import Distillation
from .export import export, export_kinds
from .report import ExportReport

__all__ = ["Distillation", "ExportReport", "export", "export_kinds"]
