"""Routers without gradients: solved from hidden states of labelled prompts."""

from .fit import FitReport, fit_router

__all__ = ["FitReport", "fit_router"]
