"""LocalLearningOptimWrapper: a backward pass, and an update, for each module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from mmengine import dist
from mmengine import registry as root
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.optim import Optimizer

from man_mm.core import LocalLearner, LocalModule

from .checks import check_model_wrapper, check_saving, check_start, check_updates
from .dial import Dial
from .distributed import average_gradients, is_sharded
from .fully_sharded_model import FullyShardedModel
from .optimizers import choose_update
from .out_of_memory import Measure, explains_out_of_memory
from .scalars import ScalarLog
from .sharded_tensors import clip_norm, shard_optimizer_state, total_norm
from .skips import Skips
from .stepping import Chunk, Stepper


@root.OPTIM_WRAPPERS.register_module()
class LocalLearningOptimWrapper(OptimWrapper):
    """Back-propagates each module right after its forward pass.

    On several ranks, the gradients of a module are averaged while the next module
    runs. A module whose gradients are not finite is not updated in that iteration,
    on no rank, and the others are. Of all that, the host waits for the device once in
    a step, at its end, and what is logged is read when it is printed.

    Built by `LocalLearningOptimWrapperConstructor`, which makes the learner and adds
    the auxiliary heads to the optimizer. With K = 1 it is mmengine's ``OptimWrapper``,
    bit for bit.

    Args:
        optimizer: One optimizer over the model and all auxiliary heads.
        learner: The learner whose modules are trained.
        update: ``'module'`` steps and frees a module's gradients right after its
            backward pass; ``'iteration'`` steps all modules at the end;
            ``'parameter'`` steps and frees each gradient as soon as it is complete,
            on one process and without ``clip_grad``. All give the same weights.
            Optimizers that need all gradients at once, such as LAMB, get
            ``'iteration'``, whatever is asked for.
            Defaults to ``'module'``.
        clip: ``'module'`` applies ``clip_grad`` to each module with its head alone;
            ``'global'`` to all together, which needs ``update='iteration'``.
            Defaults to ``'module'``.
        end_to_end_from: Share of the training, from 0 to 1, after which steps are end
            to end. Defaults to None, never.
        local_loss_weight: Weight of the local losses from then on, or ``'balanced'``;
            see `man_mm.core.ExactSteps`. Defaults to 0.
        recompute_last_module: Whether the last module runs twice, too, from then on;
            see there. Defaults to True.
        measure: Measures what units cost for images of a shape, to tell where memory
            ran out; see `man_mm.measure.model_costs.measure_units`. Defaults to None.
        sharded: The wrapper of the model, if it splits it. Defaults to None.
        **kwargs: ``accumulative_counts`` and ``clip_grad`` of ``OptimWrapper``.

    Raises:
        ValueError: If an option is unknown or two do not go together.

    Examples:
        >>> from mmengine.hub import get_model
        >>> from mmengine.optim import build_optim_wrapper
        >>> import man_mm
        >>> from man_mm.measure.synthetic_batch import synthetic_batch
        >>> model = get_model('mmpretrain::resnet/resnet18_8xb16_cifar10.py')
        >>> optim_wrapper = dict(
        ...     type='LocalLearningOptimWrapper',
        ...     constructor='LocalLearningOptimWrapperConstructor',
        ...     optimizer=dict(type='SGD', lr=0.1),
        ...     local_learning=dict(aux_head=dict(type='DGLHead')))
        >>> wrapper = build_optim_wrapper(model, optim_wrapper)
        >>> log = model.train_step(synthetic_batch(model, (2, 3, 32, 32)), wrapper)
        >>> list(wrapper.learner.losses)  # and log['loss'], that of the last module
        ['module1', 'module2', 'module3']
    """

    def __init__(
        self,
        optimizer: Optimizer,
        learner: LocalLearner,
        update: str = 'module',
        clip: str = 'module',
        end_to_end_from: float | None = None,
        local_loss_weight: float | str = 0.0,
        recompute_last_module: bool = True,
        measure: Measure | None = None,
        sharded: FullyShardedModel | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(optimizer, **kwargs)
        check_updates(update, clip, bool(self.clip_grad_kwargs))
        self.learner = learner
        self.update = choose_update(optimizer, update)
        self.clip = clip
        self.dial = Dial(
            learner,
            optimizer,
            end_to_end_from,
            local_loss_weight,
            recompute_last_module,
        )
        self._syncs = True
        self._sharded = sharded
        self._measure = measure
        self._shape: tuple[int, ...] | None = None
        self._under_way: tuple[LocalModule, Callable[[], None]] | None = None
        self._stepper = Stepper(optimizer)
        self._skips = Skips(learner.modules)
        self._log = ScalarLog(self.message_hub)
        self._scalars: dict[str, Tensor] = {}

    def initialize_count_status(
        self, model: nn.Module, init_counts: int, max_counts: int
    ) -> None:
        """Checks that training can start; the runner calls it just before.

        Args:
            model: The model, wrapped or not.
            init_counts: Iterations done so far.
            max_counts: Iterations in total.
        """
        check_start(self.learner, self.update)
        check_saving(model)
        super().initialize_count_status(model, init_counts, max_counts)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Arms the learner for one training step.

        Gradients are averaged over ranks module by module, by this wrapper, so DDP's
        own reduction stays off.

        Args:
            model: The model, plain or in ``MMDistributedDataParallel``.

        Raises:
            RuntimeError: If memory runs out; tells in which module.
        """
        check_model_wrapper(model)
        plain = model.module if is_model_wrapper(model) else model
        with ExitStack() as stack:
            if is_model_wrapper(model):
                # Without its own reduction, it would broadcast buffers only once.
                model.require_forward_param_sync = True
                stack.enter_context(model.no_sync())
            handle = plain.register_forward_pre_hook(self._capture, with_kwargs=True)
            stack.callback(handle.remove)
            self._shape = None
            stack.enter_context(self._explained())
            stack.enter_context(self._step_of_learner())
            yield

    def _step_of_learner(self) -> AbstractContextManager[None]:
        """A local step, or one end to end; see `Dial`."""
        self._syncs = self.should_sync()
        if self._inner_count % self._accumulative_counts == 0:
            self.dial.turn_if_due(self._inner_count, self._max_counts)
        if self.dial.is_end_to_end:
            return self.dial.steps.step()
        return self.learner.step(backward=self.local_backward)

    def local_backward(self, loss: Tensor, module: LocalModule, complete: bool) -> None:
        """Back-propagates a module, without counting an iteration.

        Args:
            loss: The local loss, a scalar; in a step that is end to end, what sends the
                gradient of the module's output.
            module: The module that it trains.
            complete: Whether no other loss of this iteration reaches the module.
        """
        update = complete and self._syncs
        if self._sharded is not None:
            self._sharded.before_backward(self.learner, module, complete)
            if self.dial.is_end_to_end:
                loss = self._sharded.reducing(loss)
        with self._updating(loss, module, update):
            self._scaled(self.scale_loss(loss), module).backward()
        if complete:
            self._finish(module, update)

    def update_params(
        self,
        loss: Tensor,
        step_kwargs: dict | None = None,
        zero_kwargs: dict | None = None,
    ) -> None:
        """Back-propagates the model's own loss through the last module, and updates.

        In a step that is end to end, all other modules follow.

        Args:
            loss: The model's loss, a scalar.
            step_kwargs: Arguments of ``optimizer.step``.
            zero_kwargs: Accepted for compatibility; gradients are always freed.

        Raises:
            RuntimeError: If something in front of the first unit never learns.
        """
        last = self.learner.modules[-1]
        with self._explained():
            with self._updating(loss, last, self._syncs):
                self.backward(self._scaled(self.scale_loss(loss), last))
            if not self.dial.is_end_to_end:
                self.learner.entry.check()
            if not self.dial.is_end_to_end or self.dial.steps.completes_last:
                self._finish(last, self._syncs)
            if self.dial.is_end_to_end:
                self._replay()
        self._end(self._syncs, **(step_kwargs or {}))

    def _replay(self) -> None:
        self.dial.steps.replay(self.local_backward)

    def state_dict(self) -> dict:
        """State of the optimizer, the auxiliary heads and the long-term memory."""
        bank = self.learner.bank
        local = dict(
            heads=self.learner.heads.state_dict(),
            bank=None if bank is None else bank.state_dict(),
            end_to_end=self.dial.is_end_to_end,
        )
        return {**super().state_dict(), 'local_learning': local}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: If the state is not of a run with the same modules and heads.
        """
        state = dict(state_dict)
        local = state.pop('local_learning', None)
        if local is None and len(self.learner.heads):
            raise ValueError(
                'The checkpoint was not trained by local learning, so it has no '
                'auxiliary heads to resume: start from its weights with load_from '
                'instead of resume.'
            )
        if local is not None:
            if local.get('end_to_end', False):
                self.dial.resume()
            try:
                self.learner.heads.load_state_dict(local['heads'])
            except RuntimeError as error:
                raise ValueError(
                    'The auxiliary heads in the checkpoint do not fit this '
                    'configuration: resume with the partition and aux_head that it was '
                    f'trained with, or use load_from. {error}'
                ) from error
            if local['bank'] is not None and self.learner.bank is not None:
                self.learner.bank.load_state_dict(local['bank'])
        super().load_state_dict(shard_optimizer_state(state, self.optimizer))

    def _capture(self, _model: nn.Module, args: tuple, kwargs: dict) -> None:
        # The signature of every OpenMMLab model: forward(inputs, data_samples, mode).
        self.learner.targets = kwargs.get('data_samples', (*args, None, None)[1])
        inputs = kwargs.get('inputs', (*args, None)[0])
        self._shape = tuple(getattr(inputs, 'shape', ()))

    def _explained(self):
        # What units cost is known of local steps only.
        measure = None if self.dial.is_end_to_end else self._measure
        return explains_out_of_memory(
            self.learner, measure, lambda: self._shape, self.dial.module_under_way
        )

    def _scaled(self, loss: Tensor, _module: LocalModule) -> Tensor:
        """The loss times the loss scale of its module, in mixed precision."""
        return loss

    @contextmanager
    def _updating(
        self, loss: Tensor, module: LocalModule, complete: bool
    ) -> Iterator[None]:
        """With ``update='parameter'``, steps parameters while the module backwards."""
        if self.update != 'parameter' or not complete:
            yield
            return
        self._stepper.flag(module.name, loss.detach().isfinite())
        chunk = Chunk(self.learner.params(module))

        def collect(param: nn.Parameter) -> None:
            if ready := chunk.add(param):
                self._stepper.flag(module.name, self._norm(ready).isfinite())
                self._stepper.step_if_finite(module.name, ready)

        with ExitStack() as stack:
            for param in self.learner.params(module):
                handle = param.register_post_accumulate_grad_hook(collect)
                stack.callback(handle.remove)
            yield

    def _finish(self, module: LocalModule, update: bool) -> None:
        """Starts to average a module's gradients; updates the module before it.

        Without ``update`` gradients are accumulated, whole ones on their own rank.
        """
        if not update:
            return
        wait = average_gradients(self.learner.params(module))
        self._update_under_way()
        self._under_way = module, wait
        ends = module.index == 0 if self.dial.is_end_to_end else module.is_last
        if dist.get_world_size() == 1 and not ends:
            self._update_under_way()

    def _update_under_way(self) -> None:
        """Waits for the gradients of the module that is under way, and updates it."""
        if module := self._arrived():
            params = self._with_grad(module)
            if self.update != 'iteration':
                self._check_and_clip(module)
                self._stepper.step_module(module.name, params)

    def _arrived(self) -> LocalModule | None:
        """The module that is under way, if there is one, once it has its gradients."""
        if self._under_way is None:
            return None
        (module, wait), self._under_way = self._under_way, None
        wait()
        return module

    def _end(self, update: bool, **kwargs: Any) -> None:
        """Ends an iteration: updates what is left, tells what was skipped, logs.

        Args:
            update: Whether it updates, or accumulates gradients.
            **kwargs: Arguments of ``optimizer.step``.
        """
        module = self._arrived()
        if update:
            left = [] if module is None else [module]
            if self.update == 'iteration':
                left = self.learner.modules
            for module in left:
                self._check_and_clip(module)
            finite = self._stepper.read()
            self._skips.report(finite)
            params = [
                param
                for module in left
                for param in self._with_grad(module)
                if finite.get(module.name, True)
            ]
            if self.clip == 'global' and params:
                self._scalars['grad_norm'] = self._clip(params)
            self._stepper.step(params, **kwargs)
            for module in left:
                for param in self._with_grad(module):  # of those that are skipped
                    param.grad = None
            for name in [name for name, is_finite in finite.items() if not is_finite]:
                self._scalars.pop(f'{name}/grad_norm', None)
            self.learner.updated()
        for name, value in self.learner.losses.items():
            self._scalars[f'{name}/loss'] = value
        self._log.add({f'train/{k}': value for k, value in self._scalars.items()})
        self._scalars = {}

    def _with_grad(self, module: LocalModule) -> list[nn.Parameter]:
        params = self.learner.params(module)
        return [param for param in params if param.grad is not None]

    def _check_and_clip(self, module: LocalModule) -> None:
        """Finds out, on the device, whether gradients are finite; ranks agree on it.

        With ``update='parameter'``, those that are left.
        """
        params = self._with_grad(module)
        if not params:
            return
        norm = self._norm(params) if self.clip == 'global' else self._clip(params)
        self._stepper.flag(module.name, norm.isfinite())
        if self.clip == 'module' and self.update != 'parameter':
            self._scalars[f'{module.name}/grad_norm'] = norm

    def _clip(self, params: Sequence[nn.Parameter]) -> Tensor:
        """Clips gradients, if so configured; returns their norm before."""
        if self.clip_grad_kwargs and self.grad_name == 'grad_norm':
            clip = clip_norm if any(map(is_sharded, params)) else self.clip_func
            return clip(params, **self.clip_grad_kwargs)
        norm = self._norm(params)
        if self.clip_grad_kwargs:
            self.clip_func(params, **self.clip_grad_kwargs)
        return norm

    def _norm(self, params: Sequence[nn.Parameter]) -> Tensor:
        return total_norm([param.grad for param in params])
