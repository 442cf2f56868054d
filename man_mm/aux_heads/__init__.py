"""Auxiliary heads: one file a method, the base class first."""

from .auglocal import AugLocalHead
from .base import AuxHead, AuxSite, find_sites
from .dgl import DGLHead
from .dgl_det import DGLDetHead
from .infopro import InfoProHead
from .man import MANHead
from .man_cls import MANClsHead
from .man_det import MANDetHead
from .man_sr import MANSRHead
from .momentum import MomentumHead
from .predsim import PredSimHead

__all__ = [
    'AugLocalHead',
    'AuxHead',
    'AuxSite',
    'DGLDetHead',
    'DGLHead',
    'InfoProHead',
    'MANClsHead',
    'MANDetHead',
    'MANHead',
    'MANSRHead',
    'MomentumHead',
    'PredSimHead',
    'find_sites',
]
