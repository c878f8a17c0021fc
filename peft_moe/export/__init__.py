"""Ways out of a mixture: one plain LoRA, merged weights, the experts themselves, or a distilled LoRA."""

from .distilled import Distillation
from .report import ExportReport
from .ways import KINDS, export

__all__ = ["KINDS", "Distillation", "ExportReport", "export"]
