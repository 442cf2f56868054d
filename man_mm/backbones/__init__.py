"""One adapter a backbone family: its units, and in which order they run."""

from . import resnet
from .base import Tap, find_units, probe, register_units

__all__ = ['Tap', 'find_units', 'probe', 'register_units', 'resnet']
