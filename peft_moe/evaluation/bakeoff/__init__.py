"""The bake-off: a comparison of methods that combine several experts, on your own texts."""

from .run import run_bakeoff
from .settings import Settings
from .settings_file import read_settings, settings_from

__all__ = ["Settings", "read_settings", "run_bakeoff", "settings_from"]
