"""Training schemes of `benchmark`: how they are written, and configured.

A scheme is a base and options, such as ``local+K=4+micro=1``. `OPTIONS` lists them.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass

from mmengine.config import Config, ConfigDict

from man_mm.core import Unit

END_TO_END, LOCAL, EXACT, JOINT = 'end-to-end', 'local', 'exact', 'joint'
IN_MODULES = (LOCAL, EXACT, JOINT)
WITH_HEADS = (LOCAL, JOINT)
RUN_TWICE = (END_TO_END, EXACT, JOINT)
ALL = (END_TO_END, *IN_MODULES)
JOINT_WEIGHT = 0.05
_COUNT, _NAMES = 'N', 'NAME,NAME'
_BITS = '8|4'
_UPDATES = 'parameter|iteration|module'
_LAST = 'once|twice'
_WHOLE = '; end-to-end recomputes its modules'


class SchemeError(ValueError):
    """A scheme that is unknown, or not possible here; the message names it."""


@dataclass(frozen=True)
class Option:
    """An option of schemes.

    Attributes:
        bases: The bases that take it.
        value: What follows ``=``; empty for none.
        text: What it does.
    """

    bases: tuple[str, ...]
    value: str
    text: str


OPTIONS = {
    'checkpointing': Option(ALL, '', 'recompute blocks of the backbone (with_cp)'),
    'accumulate': Option(ALL, _COUNT, "N parts of batch/N images; or 'batch' parts"),
    'bf16': Option(ALL, '', 'autocast to bfloat16'),
    'fp16': Option(ALL, '', 'autocast to float16; CUDA only'),
    'efficient': Option((END_TO_END,), '', "mmengine's efficient_conv_bn_eval"),
    'lean': Option((END_TO_END,), '', 'fold norms and recompute losses, as the others'),
    'recompute-losses': Option((END_TO_END,), '', 'recompute losses, as the others'),
    'in-backward': Option((END_TO_END,), '', 'update in the backward pass'),
    'K': Option(ALL, _COUNT, f'BalancedPartition with N modules{_WHOLE}'),
    'cuts': Option(ALL, _NAMES, f'CutPartition after these units{_WHOLE}'),
    'stages': Option(ALL, '', f'StagePartition{_WHOLE}'),
    'faithful': Option(WITH_HEADS, '', "auxiliary heads as in the paper's appendix"),
    'no-bank': Option(WITH_HEADS, '', 'auxiliary heads without memory bank'),
    'micro': Option(IN_MODULES, _COUNT, 'N images at a time inside modules'),
    'recompute': Option(ALL, _NAMES, 'recompute these submodules'),
    'unfolded': Option(IN_MODULES, '', 'do not fold frozen batch norms'),
    'losses-kept': Option(IN_MODULES, '', 'do not recompute losses'),
    'last': Option(
        RUN_TWICE, _LAST, 'how often the last module runs, if others run twice'
    ),
    'bits': Option(ALL, _BITS, 'save activations in 8 or 4 bits a value'),
    'update': Option(IN_MODULES, _UPDATES, 'when weights are updated'),
}
_CONFLICTS = (
    ('K', 'cuts', 'stages'),
    ('bf16', 'fp16'),
    ('fp16', 'in-backward'),
    ('efficient', 'lean'),
    ('lean', 'recompute-losses'),
)
_NOT_IN_MODULES = {
    'efficient': 'the others fold norms themselves, unless unfolded',
    'lean': 'the others fold norms and recompute losses themselves',
    'recompute-losses': 'the others recompute losses, unless losses-kept',
    'in-backward': 'use update=parameter',
}


@dataclass(frozen=True)
class Scheme:
    """A way to train.

    Attributes:
        name: As the user wrote it.
        base: ``'end-to-end'``, or what steps are over modules: ``'local'``,
            ``'exact'`` or ``'joint'``.
        options: Values by option; True for those without.
    """

    name: str
    base: str
    options: dict[str, bool | int | str | list[str]]

    def parts(self, batch: int) -> int:
        """In how many parts a batch is trained."""
        parts = self.options.get('accumulate', 1)
        return batch if parts == 'batch' else parts


def describe_options() -> str:
    """Lists all options, one a line."""
    lines = []
    for name, option in OPTIONS.items():
        written = f'{name}={option.value}' if option.value else name
        base = '' if option.bases == ALL else f' ({_names(option.bases)} only)'
        lines.append(f'  {written:35s} {option.text}{base}')
    return '\n'.join(lines)


def _names(bases: tuple[str, ...]) -> str:
    return ', '.join(bases)


def parse_scheme(text: str) -> Scheme:
    """Reads a scheme such as ``'end-to-end+checkpointing+accumulate=4'``.

    Raises:
        SchemeError: If a part is unknown, given twice, or does not go with another.
    """
    base, *parts = text.split('+')
    options = {}
    for part in parts:
        name, equals, value = part.partition('=')
        option = OPTIONS.get(name)
        if base not in ALL or option is None or name in options:
            break
        if base not in option.bases:
            raise SchemeError(
                f'Scheme {text!r}: {name} is for {_names(option.bases)} training only; '
                f'{_NOT_IN_MODULES.get(name, "drop it")}.'
            )
        options[name] = _parse_value(text, name, value if equals else None)
    if base not in ALL or len(options) < len(parts):
        raise SchemeError(
            f'Scheme {text!r} is not known: it takes {" or ".join(map(repr, ALL))}, '
            f"then any of these options once, joined by '+':\n{describe_options()}"
        )
    for group in _CONFLICTS:
        both = [name for name in group if name in options]
        if len(both) > 1:
            raise SchemeError(
                f'Scheme {text!r}: {" and ".join(both)} exclude each other.'
            )
    return Scheme(text, base, options)


def _parse_value(text: str, name: str, value: str | None):
    wanted = OPTIONS[name].value
    if not wanted and value is None:
        return True
    if wanted == _NAMES and value is not None:
        return [part for part in value.split(',') if part]
    if wanted == _COUNT and value and value.isdecimal() and int(value):
        return int(value)
    if '|' in wanted and value in wanted.split('|'):
        return int(value) if value.isdecimal() else value
    if (name, value) == ('accumulate', 'batch'):
        return value
    wanted = f'{name}={wanted}' if wanted else f'{name} without a value'
    raise SchemeError(f'Scheme {text!r}: write {wanted}.')


def default_schemes(units: list[Unit], batch: int) -> list[str]:
    """The schemes to compare unless told otherwise.

    Args:
        units: Units of the model's backbone.
        batch: Images in a step.
    """
    names = ['', '+checkpointing', '+efficient', '+checkpointing+efficient', '+bf16']
    names += ['+in-backward']
    if batch > 1:
        names += ['+accumulate=batch', '+checkpointing+accumulate=batch']
    names = [END_TO_END + name for name in names]
    names += [LOCAL, f'{LOCAL}+recompute={",".join(last_stage(units))}']
    return [*names, f'{LOCAL}+micro=1'] if batch > 1 else names


def last_stage(units: list[Unit]) -> list[str]:
    """Name of the submodule that is the last stage, or names of its units."""
    last = units[-1].stage
    paths = [unit.name.split('.')[:-1] for unit in units if unit.stage == last]
    prefix = '.'.join(os.path.commonprefix(paths))
    others = [unit for unit in units if unit.stage != last]
    if any(unit.name.startswith(f'{prefix}.') for unit in others):
        return [unit.name for unit in units if unit.stage == last]
    return [prefix]


def scheme_config(
    cfg: Config, scheme: Scheme, shape: tuple[int, int, int, int], device: str = 'cpu'
) -> Config:
    """A copy of a config that trains by a scheme; nothing is shared with the config.

    Pretrained weights are left out: steps cost the same without.

    Args:
        cfg: Config of a model, with or without local learning.
        scheme: The scheme.
        shape: Shape ``(N, C, H, W)`` of the batch.
        device: Where to train.

    Raises:
        ValueError: If the config, the batch or the device does not allow the scheme.
    """
    cfg = copy.deepcopy(cfg)  # Config.copy is shallow
    _forget_pretrained(cfg.model)
    wrapper, options, parts = cfg.optim_wrapper, scheme.options, scheme.parts(shape[0])
    if shape[0] % parts:
        raise ValueError(f'{shape[0]} images cannot be split into {parts} equal parts.')
    if 'accumulate' in options:
        wrapper.accumulative_counts = parts
    if 'checkpointing' in options and 'backbone' in cfg.model:
        cfg.model.backbone.with_cp = True
    elif 'checkpointing' in options and scheme.base != END_TO_END:
        raise ValueError('the network has no with_cp: use recompute=NAME,NAME.')
    if 'fp16' in options and not device.startswith('cuda'):
        raise ValueError('fp16 needs --device cuda.')
    amp = autocast_dtype(scheme)
    if scheme.base != END_TO_END:
        _set_local(cfg, options, shape)
        local = cfg.optim_wrapper.local_learning
        local.end_to_end_from = None if scheme.base == LOCAL else 0
        local.local_loss_weight = JOINT_WEIGHT if scheme.base == JOINT else 0.0
        if amp:
            _set_amp(wrapper, 'man_mm.AmpLocalLearningOptimWrapper', amp)
        return cfg
    for key in ('local_learning', 'constructor'):
        wrapper.pop(key, None)
    cfg.default_hooks.pop('memory_bank', None)
    wrapper.type = 'OptimWrapper'
    if 'in-backward' in options and wrapper.get('clip_grad'):
        raise ValueError(
            'optim_wrapper.clip_grad needs all gradients at once, but in-backward '
            'frees them one by one.'
        )
    if amp and device.startswith('cuda') and 'in-backward' not in options:
        _set_amp(wrapper, 'AmpOptimWrapper', amp)
    return cfg


def partition_config(options: dict, shape: tuple[int, ...]) -> dict | None:
    """Config of the partition that options of a scheme ask for, if they do.

    Args:
        options: Values by option.
        shape: Shape ``(N, C, H, W)`` of the batch.
    """
    if 'K' in options:
        return dict(
            type='BalancedPartition', num_modules=options['K'], input_shape=shape
        )
    if 'cuts' in options:
        return dict(type='CutPartition', cuts=options['cuts'])
    return dict(type='StagePartition') if 'stages' in options else None


def last_module_setting(options: dict) -> dict[str, bool]:
    """The key of ``local_learning`` that an option of a scheme sets, if it does.

    Args:
        options: Values by option.
    """
    if 'last' not in options:
        return {}
    return dict(recompute_last_module=options['last'] == 'twice')


def autocast_dtype(scheme: Scheme) -> str | None:
    """The dtype that a scheme autocasts to, or None."""
    names = {'bf16': 'bfloat16', 'fp16': 'float16'}
    return next((names[name] for name in names if name in scheme.options), None)


def _set_amp(wrapper: Config, kind: str, dtype: str) -> None:
    wrapper.type = kind
    wrapper.dtype = dtype
    wrapper.loss_scale = dict(init_scale=512.0)  # the first step is not skipped


def _set_local(cfg: Config, options: dict, shape: tuple[int, ...]) -> None:
    wrapper = cfg.optim_wrapper
    if 'LocalLearning' not in wrapper.get('constructor', ''):
        wrapper.type = 'man_mm.LocalLearningOptimWrapper'
        wrapper.constructor = 'man_mm.LocalLearningOptimWrapperConstructor'
        cfg.default_hooks.memory_bank = dict(type='man_mm.MemoryBankHook')
    local = wrapper.setdefault('local_learning', ConfigDict())
    if partition := partition_config(options, shape):
        local.partition = partition
    head = local.setdefault('aux_head', ConfigDict(type='MANHead'))
    if 'faithful' in options:
        head.mode = 'faithful'
    if 'no-bank' in options:
        head.use_bank = False
        cfg.default_hooks.pop('memory_bank', None)
    local.update(last_module_setting(options))
    for option, key in (
        ('micro', 'micro_batch_size'),
        ('recompute', 'recompute'),
        ('bits', 'activation_bits'),
        ('update', 'update'),
    ):
        if option in options:
            local[key] = options[option]
    if 'unfolded' in options:
        local.efficient_conv_bn_eval = False
    if 'losses-kept' in options:
        local.recompute_losses = False


def _forget_pretrained(cfg: object) -> None:
    if isinstance(cfg, dict):
        if (cfg.get('init_cfg') or {}) and 'Pretrained' in str(cfg['init_cfg']):
            cfg['init_cfg'] = None
        for value in cfg.values():
            _forget_pretrained(value)
