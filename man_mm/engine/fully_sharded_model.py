"""FullyShardedModel: PyTorch's FSDP2, with one group for each module and its head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mmengine import dist
from mmengine import registry as root
from mmengine.device import get_device
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from man_mm.core import LocalLearner
from man_mm.core.partition import LocalModule
from man_mm.core.second_runs import trainable_parts

from .distributed import is_sharded
from .sharded_tensors import gather_on_first, shard_loaded_weights

# By which OpenMMLab's models call necks and heads, beside ``forward``.
_FORWARD_METHODS = ('loss', 'predict', 'loss_and_predict')


@root.MODEL_WRAPPERS.register_module()
class FullyShardedModel(nn.Module):
    """Trains with 1/N of weights, gradients and optimizer state on each of N processes.

    It applies ``torch.distributed.fsdp.fully_shard`` to each local module, each
    auxiliary head, and the model's neck and heads. The weights of a module are gathered
    for its forward pass and freed after its backward pass, which follows at once. These
    lines of a config use it, with ``--launcher pytorch``::

        model_wrapper_cfg = dict(type='FullyShardedModel')
        default_hooks = dict(
            sharding=dict(type='ShardingHook'),
            checkpoint=dict(type='SafeCheckpointHook'),
        )

    `LocalLearningOptimWrapperConstructor` shards the model when it has cut it. Before
    that, as for testing alone, the model is whole.

    Args:
        module: The model. All processes get the weights of the first one. It may be on
            the CPU: its parts then move to the device group by group.
        shard_size: Number of processes that share one copy of the model; they take
            consecutive ranks. Copies are kept equal by averaging gradients, so
            with the number of devices of a machine, weights do not travel between
            machines. Defaults to None, all processes.
        mixed_precision: Types in which modules and heads compute and gradients are
            reduced, by name, as arguments of
            ``torch.distributed.fsdp.MixedPrecisionPolicy``, such as
            ``dict(param_dtype='bfloat16', reduce_dtype='float32')``. Weights and
            optimizer state keep their type, and so do the maps between modules. It is
            for models without batch norms; `AmpLocalLearningOptimWrapper` is for all,
            and gathers weights in their own type. Defaults to None, no other type.
        offload: Whether weights, gradients and optimizer state stay in the memory of
            the CPU, where the optimizer runs too. Defaults to False.

    Raises:
        ValueError: If there is no process group, or an option does not fit.

    Examples:
        >>> from mmengine.registry import MODEL_WRAPPERS
        >>> import man_mm
        >>> model_wrapper_cfg = dict(type='FullyShardedModel', shard_size=8)
        >>> MODEL_WRAPPERS.get(model_wrapper_cfg['type']).__name__
        'FullyShardedModel'
    """

    def __init__(
        self,
        module: nn.Module,
        shard_size: int | None = None,
        mixed_precision: dict[str, Any] | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__()
        self.module = module
        self.heads: nn.ModuleList | None = None
        # What passes through it ends its backward pass as FSDP does, by reducing
        # gradients, though it may reach none of FSDP's hooks otherwise. That is so of
        # what runs in front of the first unit, in steps that are end to end.
        self.reducing = nn.Identity()
        self.can_save = False  # set by `ShardingHook`
        self._policy: dict[str, Any] = {}  # of modules and heads
        if not dist.is_distributed():
            raise ValueError(
                'FullyShardedModel splits a model over processes, and there is one: '
                'start with --launcher pytorch, or remove model_wrapper_cfg.'
            )
        from torch.distributed import fsdp

        self._options = dict(
            mesh=_mesh(shard_size),
            # Backward follows forward at once, so freeing in between would only send
            # the weights twice.
            reshard_after_forward=False,
        )
        if mixed_precision:
            policy = fsdp.MixedPrecisionPolicy(**_dtypes(mixed_precision))
            self._policy = dict(mp_policy=policy)
        if offload:
            pin = torch.cuda.is_available()
            self._options['offload_policy'] = fsdp.CPUOffloadPolicy(pin_memory=pin)
        if hasattr(module, 'data_preprocessor'):
            module.data_preprocessor.to(get_device())

    @property
    def is_sharded(self) -> bool:
        """Whether the model has been split."""
        return self.heads is not None

    def shard(self, learner: LocalLearner) -> None:
        """Initialises the weights, and splits them and those of the auxiliary heads.

        Args:
            learner: The learner that trains the model, before there is an optimizer.
                Its modules will own sharded parameters.
        """
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        if hasattr(self.module, 'init_weights') and not self.module.is_init:
            self.module.init_weights()
        if self._policy:
            _check_no_batch_norm(self)
        names = {param: name for name, param in self.module.named_parameters()}
        owned = [
            [names[param] for param in module.params] for module in learner.modules
        ]
        # Whole weights are freed group by group, so nothing may keep them.
        del names
        learner.modules = learner.active = tuple(
            replace(module, params=()) for module in learner.modules
        )
        self.heads = learner.heads
        # A parameter without dimensions cannot be split; see `average_gradients`.
        scalars = {param for param in self.parameters() if not param.dim()}
        options = dict(self._options)
        if scalars:
            options['ignored_params'] = scalars

        for module in learner.modules:
            for names in _groups(self.module, module):
                parts = [self.module.get_submodule(name) for name in names]
                _fully_shard(parts, options | self._policy)
            self._free_after(module)
        for head in self.heads:
            _fully_shard([head], options | self._policy)
        for part in learner.modules[-1].parts:
            _gather_nothing_else(self.module.get_submodule(part))
        for child in _callable_children(self.module, learner.modules):
            _fully_shard([child], options | self._policy)
            _gather_nothing_else(child)
            for name in _FORWARD_METHODS:
                if hasattr(child, name):
                    register_fsdp_forward_method(child, name)
        for tensor in self.module.state_dict().values():
            if not is_sharded(tensor):
                dist.broadcast(tensor)
        fully_shard(self.reducing, **options)
        fully_shard(self, **options)
        # What is in no group above may be used until the last backward pass.
        self.set_reshard_after_backward(False, recurse=False)
        for name in ('train_step', 'val_step', 'test_step'):
            register_fsdp_forward_method(self, name)

        for submodule in self.modules():
            submodule.register_load_state_dict_pre_hook(shard_loaded_weights)
        self.module.init_weights = self._skip_initialising
        params = dict(self.module.named_parameters())
        learner.modules = learner.active = tuple(
            replace(module, params=tuple(params[name] for name in own))
            for module, own in zip(learner.modules, owned, strict=True)
        )

    def gather(self, optim_wrapper: Any, folder: str | Path) -> dict[str, dict]:
        """Collects what a checkpoint stores; all processes have to call it.

        Args:
            optim_wrapper: The optimizer wrapper that trains the model.
            folder: Where the first process keeps it; see `empty_on_disk`.

        Returns:
            ``state_dict`` and ``optimizer`` of a run on one process, on the CPU;
            without sharded tensors on other processes than the first.
        """
        states = dict(
            state_dict=self.module.state_dict(), optimizer=optim_wrapper.state_dict()
        )
        return gather_on_first(states, folder)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model."""
        return self.module(*args, **kwargs)

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Trains on a batch; see ``BaseModel.train_step`` of mmengine.

        Raises:
            ValueError: If the model was not split.
        """
        if not self.is_sharded:
            raise ValueError(
                'FullyShardedModel is split by LocalLearningOptimWrapperConstructor, '
                'which did not build the optimizer wrapper: set '
                "optim_wrapper.type='LocalLearningOptimWrapper' and "
                "optim_wrapper.constructor='LocalLearningOptimWrapperConstructor', or "
                'remove model_wrapper_cfg.'
            )
        logs = self.module.train_step(data, optim_wrapper)
        self.free()
        return logs

    def val_step(self, data: Any) -> list:
        """Predicts; see ``BaseModel.val_step`` of mmengine."""
        outputs = self.module.val_step(data)
        self.free()
        return outputs

    def test_step(self, data: Any) -> list:
        """Predicts; see ``BaseModel.test_step`` of mmengine."""
        outputs = self.module.test_step(data)
        self.free()
        return outputs

    def free(self) -> None:
        """Frees the weights that were gathered, but for this process's part."""
        if self.is_sharded:
            for submodule in self.modules():
                if hasattr(submodule, 'reshard'):
                    submodule.reshard()

    def before_backward(
        self, learner: LocalLearner, module: LocalModule, complete: bool
    ) -> None:
        """Tells FSDP whether a backward pass completes the gradients of a module.

        Until then, gradients of micro-batches add up where they are, and the weights
        stay for the next ones.

        Args:
            learner: The learner that trains the module.
            module: The module, whose auxiliary head counts too, if it has one.
            complete: Whether the next backward pass is the last one.
        """
        parts = [self.module.get_submodule(part) for part in module.parts]
        for part in (*parts, *learner.heads[module.index : module.index + 1]):
            if hasattr(part, 'set_requires_gradient_sync'):
                part.set_requires_gradient_sync(complete, recurse=False)
                part.set_reshard_after_backward(complete, recurse=False)

    def _free_after(self, module: LocalModule) -> None:
        """Frees a module's weights when it has run and there is nothing to learn."""
        end = self.module.get_submodule(module.cut)

        def free(_end: nn.Module, _args: tuple, output: Any) -> None:
            if not (isinstance(output, Tensor) and output.requires_grad):
                for part in module.parts:
                    submodule = self.module.get_submodule(part)
                    if hasattr(submodule, 'reshard'):
                        submodule.reshard()

        end.register_forward_hook(free)

    def _skip_initialising(self) -> None:
        """In place of ``init_weights``, after which mmengine's runner broadcasts."""

        def leave_nothing(_module: nn.Module, state_dict: dict, *_: Any) -> None:
            state_dict.clear()
            handle.remove()

        handle = self.module.register_state_dict_post_hook(leave_nothing)


def _mesh(shard_size: int | None) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    world = dist.get_world_size()
    if shard_size is None:
        return init_device_mesh(get_device(), (world,), mesh_dim_names=('shard',))
    if shard_size < 1 or world % shard_size:
        raise ValueError(
            f'model_wrapper_cfg.shard_size={shard_size} must divide the number of '
            f'processes, {world}.'
        )
    shape = (world // shard_size, shard_size)
    return init_device_mesh(get_device(), shape, mesh_dim_names=('copy', 'shard'))


def _dtypes(options: dict[str, Any]) -> dict[str, Any]:
    # What is in no group of its own, and losses, keep their type.
    options = {'output_dtype': torch.float32, **options}
    return {
        key: getattr(torch, value) if isinstance(value, str) else value
        for key, value in options.items()
    }


def _check_no_batch_norm(model: nn.Module) -> None:
    norms = [name for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
    if norms:
        raise ValueError(
            f'model_wrapper_cfg.mixed_precision gives {len(norms)} batch norms weights '
            f'of another type than their statistics have (the first is {norms[0]!r}): '
            "remove it, and set optim_wrapper.type='AmpLocalLearningOptimWrapper'."
        )


def _groups(model: nn.Module, module: LocalModule) -> Iterable[list[str]]:
    """Parts that are gathered together: those that an exact step runs again, or not.

    Of these, only frozen ones make a group. Others run in front of all modules with a
    graph that waits for the end of the step, and so do their weights.
    """
    again = trainable_parts(model, module)
    yield again
    params = {part: model.get_submodule(part).parameters() for part in module.parts}
    yield [
        part
        for part in module.parts
        if part not in again and not any(p.requires_grad for p in params[part])
    ]


def _fully_shard(modules: list[nn.Module], options: dict[str, Any]) -> None:
    from torch.distributed.fsdp import fully_shard

    modules = [m for m in modules if next(m.parameters(), None) is not None]
    for module in modules:
        for param in module.parameters():
            dist.broadcast(param.data)
    if modules:
        fully_shard(modules, **options)


def _gather_nothing_else(part: nn.Module) -> None:
    """Keeps the backward pass of a part from gathering what waits for its own turn.

    Those are the modules in steps that are end to end.
    """
    if hasattr(part, 'set_modules_to_backward_prefetch'):
        part.set_modules_to_backward_prefetch([part])


def _callable_children(
    model: nn.Module, modules: Iterable[LocalModule]
) -> list[nn.Module]:
    """The model's neck and heads: what it uses by calling it, and nothing else."""
    inside = {part.split('.')[0] for module in modules for part in module.parts}
    return [
        child
        for name, child in model.named_children()
        if name not in inside and (name == 'neck' or hasattr(child, 'loss'))
    ]
