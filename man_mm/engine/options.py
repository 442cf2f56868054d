"""The options of ``optim_wrapper.local_learning``: defaults and checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from man_mm.aux_heads.classifier import is_classifier
from man_mm.core.balance import BALANCED

DEFAULTS = dict(
    partition=dict(type='StagePartition'),
    aux_head=dict(type='MANHead'),
    aux_lr_mult=1.0,
    aux_decay_mult=1.0,
    update='module',
    clip='module',
    end_to_end_from=None,
    local_loss_weight=0.0,
    recompute_last_module=None,
    micro_batch_size=None,
    recompute=(),
    efficient_conv_bn_eval=True,
    recompute_losses=True,
    activation_bits=None,
    base_constructor='DefaultOptimWrapperConstructor',
)
# What DefaultOptimWrapperConstructor of mmengine reads.
_PARAMWISE_KEYS = {
    'bias_decay_mult',
    'bias_lr_mult',
    'bypass_duplicate',
    'custom_keys',
    'dcn_offset_lr_mult',
    'dwconv_decay_mult',
    'flat_decay_mult',
    'norm_decay_mult',
}


def complete_options(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Adds defaults to options, and checks them.

    Args:
        given: ``optim_wrapper.local_learning`` of a config.

    Raises:
        ValueError: If a key is unknown or a value is of the wrong kind.
    """
    given = dict(given or {})
    unknown = sorted(set(given) - set(DEFAULTS))
    if unknown:
        raise ValueError(
            f'optim_wrapper.local_learning has unknown keys {unknown}; it takes '
            f'{sorted(DEFAULTS)}.'
        )
    for key, value in given.items():
        wanted, fits = _KINDS.get(key, ('', None))
        if fits is not None and not fits(value):
            raise ValueError(
                f'optim_wrapper.local_learning.{key} must be {wanted}, got {value!r}.'
            )
    options = {**DEFAULTS, **given}
    if options['local_loss_weight'] and options['end_to_end_from'] is None:
        raise ValueError(
            'optim_wrapper.local_learning.local_loss_weight weights the local losses '
            'in joint steps, but all steps are local: set '
            'optim_wrapper.local_learning.end_to_end_from=0 for joint steps from the '
            'start, or remove local_loss_weight.'
        )
    if options['micro_batch_size'] and options['recompute_last_module'] is False:
        raise ValueError(
            'optim_wrapper.local_learning.recompute_last_module=False keeps what the '
            'last module saves for the whole batch, and micro_batch_size avoids that: '
            'remove one of them.'
        )
    for key in ('partition', 'aux_head'):
        options[key] = {**DEFAULTS[key], **options[key]}
    return options


def has_heads(options: Mapping[str, Any]) -> bool:
    """Whether any step has local losses, and so needs auxiliary heads.

    Args:
        options: From `complete_options`.
    """
    return options['end_to_end_from'] != 0 or bool(options['local_loss_weight'])


def recomputes_last(options: Mapping[str, Any], model: nn.Module) -> bool:
    """Whether exact and joint steps run the last module twice, too.

    Unless that is configured, where what it saves would meet something large behind
    it, such as the neck and the heads of a detector.

    Args:
        options: From `complete_options`.
        model: The model.
    """
    if options['micro_batch_size']:
        return True  # the loss behind it needs all images at once
    given = options['recompute_last_module']
    return not is_classifier(model) if given is None else given


def check_paramwise(paramwise: Mapping[str, Any] | None, given: Mapping) -> None:
    """Refuses to lose options that are meant for another constructor.

    Args:
        paramwise: ``optim_wrapper.paramwise_cfg`` of a config.
        given: ``optim_wrapper.local_learning`` of a config.

    Raises:
        ValueError: If ``paramwise`` has such keys and no constructor is named.
    """
    others = sorted(set(paramwise or {}) - _PARAMWISE_KEYS)
    if others and 'base_constructor' not in given:
        raise ValueError(
            f'optim_wrapper.paramwise_cfg has {others}, for a constructor that '
            'LocalLearningOptimWrapperConstructor replaces: name it in '
            'optim_wrapper.local_learning.base_constructor.'
        )


def _is_count(value: Any) -> bool:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return value is None or (is_int and value > 0)


def _is_bits(value: Any) -> bool:
    return value is None or (type(value) is int and value in (8, 4))


def _is_factor(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and value >= 0


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(x, str) for x in value)


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    'partition': (
        "a dictionary such as dict(type='StagePartition')",
        lambda value: isinstance(value, Mapping),
    ),
    'aux_head': (
        "a dictionary such as dict(type='MANHead')",
        lambda value: isinstance(value, Mapping),
    ),
    'end_to_end_from': (
        'None or a share of the training from 0 to 1',
        lambda value: value is None or (_is_factor(value) and value <= 1),
    ),
    'local_loss_weight': (
        f'a number of at least 0, or {BALANCED!r}',
        lambda value: value == BALANCED or _is_factor(value),
    ),
    'recompute_last_module': (
        'True, False or None',
        lambda value: value is None or _is_switch(value),
    ),
    'aux_lr_mult': ('a number of at least 0', _is_factor),
    'aux_decay_mult': ('a number of at least 0', _is_factor),
    'micro_batch_size': ('None or a number of images of at least 1', _is_count),
    'recompute': ('a list of names of submodules', _is_names),
    'efficient_conv_bn_eval': ('True or False', _is_switch),
    'recompute_losses': ('True or False', _is_switch),
    'activation_bits': (
        'None, 8 or 4',
        _is_bits,
    ),
    'base_constructor': ('the name of a constructor', lambda v: isinstance(v, str)),
}
