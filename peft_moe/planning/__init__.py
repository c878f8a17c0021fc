"""How much memory training a router takes, before anything is loaded."""

from .plan import MemoryPlan, Training, plan_memory

__all__ = ["MemoryPlan", "Training", "plan_memory"]
