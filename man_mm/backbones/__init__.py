"""One adapter a backbone family: its units, and in which order they run."""

from . import convnets, darknet, resnet, super_resolution, transformers
from .base import (
    Tap,
    find_backbone,
    find_outputs,
    find_scale,
    find_units,
    probe,
    register_units,
)
from .cifar_resnet import CIFARResNet
from .images import image_channels

__all__ = [
    'CIFARResNet',
    'Tap',
    'convnets',
    'darknet',
    'find_backbone',
    'find_outputs',
    'find_scale',
    'find_units',
    'image_channels',
    'probe',
    'register_units',
    'resnet',
    'super_resolution',
    'transformers',
]
