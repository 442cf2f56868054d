"""One adapter a backbone family: its units, and in which order they run."""

from . import resnet, super_resolution
from .base import (
    Tap,
    find_backbone,
    find_scale,
    find_units,
    image_channels,
    probe,
    register_units,
)

__all__ = [
    'Tap',
    'find_backbone',
    'find_scale',
    'find_units',
    'image_channels',
    'probe',
    'register_units',
    'resnet',
    'super_resolution',
]
