"""Auxiliary heads: one file a method, the base class first."""

from .base import AuxHead, AuxSite, find_sites
from .man import MANHead
from .man_cls import MANClsHead
from .man_det import MANDetHead
from .man_sr import MANSRHead

__all__ = [
    'AuxHead',
    'AuxSite',
    'MANClsHead',
    'MANDetHead',
    'MANHead',
    'MANSRHead',
    'find_sites',
]
