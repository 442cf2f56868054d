"""Auxiliary heads: one file a method, the base class first."""

from .base import AuxHead, AuxSite, find_sites
from .man import MANHead
from .man_cls import MANClsHead
from .man_det import MANDetHead

__all__ = [
    'AuxHead',
    'AuxSite',
    'MANClsHead',
    'MANDetHead',
    'MANHead',
    'find_sites',
]
