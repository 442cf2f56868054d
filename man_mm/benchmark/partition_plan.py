"""Where to cut the network of a config, and the config that cuts there."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from os.path import relpath
from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS
from rich.console import Console
from torch import nn

from man_mm.aux_heads.classifier import is_classifier
from man_mm.backbones import find_backbone, image_channels
from man_mm.core.partition import Measure
from man_mm.engine import LocalLearningOptimWrapperConstructor, build_learner
from man_mm.engine.config_files import find_config, load_config
from man_mm.engine.constructor import LEARNER_OPTIONS
from man_mm.engine.options import has_heads
from man_mm.engine.quiet import quiet
from man_mm.measure import BalancedPartition
from man_mm.measure.model_costs import measure_units, with_boundaries
from man_mm.measure.peaks import Plan, PlannedModule, predict
from man_mm.measure.planner import plan_modules
from man_mm.measure.synthetic_batch import synthetic_batch
from man_mm.measure.uncomputed import Uncomputed
from man_mm.measure.unit_costs import measure_modules

from .training_steps import build_wrapper

_IMPORTS = (
    "custom_imports = dict(imports=['man_mm'], allow_failed_imports=False)",
    "default_hooks = dict(memory_bank=dict(type='MemoryBankHook'))",
)


def make_measure(
    cfg: Config, model: nn.Module, console: Console, device: str = 'cpu'
) -> Measure:
    """What measures the units of a model with the config's local learning, once.

    Nothing is computed, and operators are those of ``device``; see `Uncomputed`.

    Raises:
        ValueError: If the config is not trained by local learning.
    """
    options = LocalLearningOptimWrapperConstructor(cfg.optim_wrapper).options
    build = partial(
        build_learner,
        **{key: options[key] for key in LEARNER_OPTIONS if key != 'partition'},
    )

    @cache
    def measure(shape: tuple[int, ...], plain: bool = False):
        kind = 'as in end-to-end training' if plain else 'one by one'
        status = console.status(f'measuring the units {kind} ...')
        with status, Uncomputed(device):
            return measure_units(model, build, shape, plain)

    if options['end_to_end_from'] is None:
        return measure
    return with_boundaries(measure, has_heads(options))


def end_to_end(measure: Measure, shape: tuple[int, ...]) -> PlannedModule:
    """The whole network, as one module."""
    costs = measure(shape, plain=True)
    return predict(costs, [len(costs)]).modules[0]


def planned_config(cfg: Config, cuts: list[str]) -> Config:
    """A copy of a config that cuts there."""
    cfg = copy.deepcopy(cfg)  # Config.copy is shallow
    local = cfg.optim_wrapper.setdefault('local_learning', ConfigDict())
    local.partition = dict(type='CutPartition', cuts=cuts)
    return cfg


def write_config(
    out: Path,
    base: str,
    cfg: Config,
    cuts: Sequence[str],
    settings: Mapping[str, object] | None = None,
) -> None:
    """Writes a config that inherits another one, and cuts there.

    Args:
        out: The new file.
        base: Path of the config to inherit, or its name in a package
            (``'mmdet::...'``).
        cfg: That config; one that trains end to end gets local learning.
        cuts: Names of the units after which to cut.
        settings: Other keys of ``local_learning``. Defaults to None.
    """
    if '::' not in base:
        base = Path(relpath(find_config(base), out.parent)).as_posix()
    wrapper, lines = cfg.optim_wrapper, [f'_base_ = {base!r}']
    local = []
    if 'LocalLearning' not in f'{wrapper.get("type")}{wrapper.get("constructor")}':
        lines += _IMPORTS
        local = ["constructor='LocalLearningOptimWrapperConstructor',"]
        if wrapper.get('type', 'OptimWrapper') == 'OptimWrapper':
            local = ["type='LocalLearningOptimWrapper',", *local]
        settings = {**_base_constructor(wrapper), **(settings or {})}
    # A key that has nothing to delete would stay in the config.
    replaces = 'partition' in wrapper.get('local_learning', {})
    keys = [*setting_lines(settings or {}), *partition_lines(cuts, replaces)]
    local += ['local_learning=dict(', *_indented(keys), '),']
    lines += ['optim_wrapper = dict(', *_indented(local), ')']
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text('\n'.join(lines) + '\n')


def partition_lines(cuts: Sequence[str], replaces: bool = False) -> list[str]:
    """The partition as it stands in a config.

    Args:
        cuts: Names of the units after which to cut.
        replaces: Whether it takes the place of an inherited one. Defaults to False.
    """
    delete = ['_delete_=True,'] * replaces
    names = ['cuts=[', *_indented(f'{cut!r},' for cut in cuts), '],']
    keys = [*delete, "type='CutPartition',", *names]
    return ['partition=dict(', *_indented(keys), '),']


def setting_lines(settings: Mapping[str, object]) -> list[str]:
    """Other keys of ``local_learning``, as they stand in a config."""
    return [f'{key}={value!r},' for key, value in settings.items()]


def _indented(lines: Iterable[str]) -> list[str]:
    return [f'    {line}' for line in lines]


def _base_constructor(wrapper: Mapping) -> dict[str, str]:
    given = wrapper.get('constructor')
    return dict(base_constructor=given) if given else {}


def measure_peaks(cfg: Config, shape: tuple[int, ...]) -> list[int]:
    """Peak bytes of every module in a real training step of a config."""
    with quiet():
        model = MODELS.build(copy.deepcopy(cfg.model)).train()
    wrapper = build_wrapper(model, cfg)
    batch = synthetic_batch(model, shape)
    model.train_step(batch, wrapper)  # makes the optimizer's state
    return measure_modules(wrapper.learner, lambda: model.train_step(batch, wrapper))


class PartitionPlan(NamedTuple):
    """A plan for a config.

    Attributes:
        cfg: The config.
        shape: Shape ``(N, C, H, W)`` of the images that were measured.
        plan: The modules.
        whole: The whole network, as one module.
        budget: Bytes that a module may need, None if a number of modules was asked for.
        needed: The fewest modules whose largest needs no more than the plan's.
    """

    cfg: Config
    shape: tuple[int, int, int, int]
    plan: Plan
    whole: PlannedModule
    budget: int | None
    needed: int


def plan_config(
    config: str,
    num_modules: int | None = None,
    memory_budget: str | None = None,
    size: Sequence[int] | None = None,
    batch: int | None = None,
    options: Sequence[str] = (),
    console: Console | None = None,
) -> PartitionPlan:
    """Measures the units of a config's model, and finds the cuts.

    Args:
        config: Path of a config that is trained by local learning.
        num_modules: Modules; or else
        memory_budget: Most bytes of a module, such as ``'6GiB'``.
        size: Height and width of the images in pixels. Defaults to 800 and 1333, for
            classifiers 224 and 224.
        batch: Images in a step. Defaults to the train_dataloader's.
        options: Settings that override the config, each ``KEY=VALUE``.
        console: Where progress is shown.

    Raises:
        FileNotFoundError: If there is no such config.
        ValueError: If the config cannot be planned so.
    """
    cfg = load_config(config, options)
    model = build_uncomputed(cfg)
    shape = images_shape(cfg, model, size, batch)
    partition = BalancedPartition(num_modules, memory_budget, shape)
    measure = make_measure(cfg, model, console or Console(quiet=True))
    plan = partition.plan(measure)
    fewer = (
        count
        for count in range(2, len(plan.modules))
        if plan_modules(measure(shape), count).peak == plan.peak
    )
    needed = next(fewer, len(plan.modules))
    whole = end_to_end(measure, shape)
    return PartitionPlan(cfg, shape, plan, whole, partition.budget, needed)


def check_plan(planned: PartitionPlan) -> list[int]:
    """Peak bytes of every module in a training step with a plan's cuts."""
    cfg = planned_config(planned.cfg, planned.plan.cuts)
    return measure_peaks(cfg, planned.shape)


def build_uncomputed(cfg: Config) -> nn.Module:
    """A config's model without values; see `Uncomputed`."""
    with quiet(), Uncomputed():
        return MODELS.build(copy.deepcopy(cfg.model))


def images_shape(
    cfg: Config, model: nn.Module, size: Sequence[int] | None, batch: int | None
) -> tuple[int, int, int, int]:
    """Shape ``(N, C, H, W)`` of a step's images; see `plan_config`."""
    size = size or ((224, 224) if is_classifier(model) else (800, 1333))
    batch = batch or cfg.get('train_dataloader', {}).get('batch_size', 1)
    return (batch, image_channels(find_backbone(model)[1]), *size)
