"""Registries of the scope ``man_mm``.

Components register in mmengine's root registries, so that an unprefixed type resolves
in the scope of every OpenMMLab package. The child registries only give the scope a
place in the tree: a type such as ``man_mm.MemoryBankHook`` then imports this package
by itself, with no ``custom_imports``.
"""

from mmengine import registry as root
from mmengine.registry import Registry

DATASETS = Registry(
    'dataset', parent=root.DATASETS, scope='man_mm', locations=['man_mm']
)
HOOKS = Registry('hook', parent=root.HOOKS, scope='man_mm', locations=['man_mm'])
MODELS = Registry('model', parent=root.MODELS, scope='man_mm', locations=['man_mm'])
MODEL_WRAPPERS = Registry(
    'model_wrapper',
    parent=root.MODEL_WRAPPERS,
    scope='man_mm',
    locations=['man_mm'],
)
OPTIM_WRAPPERS = Registry(
    'optim_wrapper',
    parent=root.OPTIM_WRAPPERS,
    scope='man_mm',
    locations=['man_mm'],
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=root.OPTIM_WRAPPER_CONSTRUCTORS,
    scope='man_mm',
    locations=['man_mm'],
)
TASK_UTILS = Registry(
    'task util', parent=root.TASK_UTILS, scope='man_mm', locations=['man_mm']
)
