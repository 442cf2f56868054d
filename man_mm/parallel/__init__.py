"""Modules on several devices."""

from .pipeline import ModulePipeline

__all__ = ['ModulePipeline']
