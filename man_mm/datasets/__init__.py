"""Data sets on which the literature compares local learning, and mmpretrain lacks."""

from .base import ImageArrays
from .stl10 import STL10
from .svhn import SVHN

__all__ = ['STL10', 'SVHN', 'ImageArrays']
