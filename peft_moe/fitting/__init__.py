"""Fitting: a mixture's routers from texts with known experts, in one pass and without gradients."""

from .fit import FitReport, fit_router

__all__ = ["FitReport", "fit_router"]
