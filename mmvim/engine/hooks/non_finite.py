"""Losses and gradients that are not finite: stopping or skipping, and finding the origin."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.dist import all_reduce, get_comm_device, is_distributed
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from torch import Tensor, nn

from mmvim.engine import random_state
from mmvim.errors import UserError
from mmvim.registry import HOOKS

_ACTIONS = ('stop', 'skip')


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Keep NaN and infinity out of the weights, and name the layer they come from.

    Before each backward pass the loss is checked, and before each step of the optimizer the
    gradients. If one is not finite, on any process, the batch is run again with the same random
    numbers, and the log names the first layer whose output (or, going backwards, whose gradient) is
    not finite although its input is. Then the run stops, or continues without this step: weights,
    optimizer and buffers (such as the statistics of batch norm) are as they were before.

    With float16 and dynamic loss scaling, infinite gradients are part of the method and left to the
    scaler; only the loss is checked.

    Args:
        action (str): ``'stop'`` or ``'skip'``. Defaults to ``'stop'``.
        check_gradients (bool): Whether to check gradients as well. Defaults to True.
        max_consecutive (int): With ``'skip'``, stop after so many skipped steps in a row.
            Defaults to 20.

    Attributes:
        skipped (int): Number of skipped steps; ``non_finite_steps`` in the message hub and in
            checkpoints.

    Raises:
        UserError: An argument is out of range.

    Example:
        >>> custom_hooks = [dict(type='mmvim.NonFiniteHook', action='skip')]
    """

    priority = 'VERY_HIGH'

    def __init__(
        self, action: str = 'stop', check_gradients: bool = True, max_consecutive: int = 20
    ) -> None:
        if action not in _ACTIONS:
            raise UserError(f"NonFiniteHook: action must be 'stop' or 'skip', not {action!r}")
        if not isinstance(max_consecutive, int) or max_consecutive < 1:
            raise UserError(
                f'NonFiniteHook: max_consecutive must be at least 1, not {max_consecutive!r}'
            )
        self.action = action
        self.check_gradients = check_gradients
        self.max_consecutive = max_consecutive
        self.skipped = 0
        self._consecutive = 0
        self._batch: Any = None
        self._states: dict | None = None
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def before_train(self, runner) -> None:
        """Put the checks before the backward pass and the step of the optimizer."""
        self.skipped = runner.message_hub.runtime_info.get('non_finite_steps', 0)
        wrapper = runner.optim_wrapper
        for part in wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]:
            self._guard(runner, part)

    def before_train_iter(self, runner, batch_idx: int, data_batch: Any = None) -> None:
        """Remember the state from which the iteration starts."""
        self._batch, self._states = data_batch, random_state.capture()
        if self.action == 'skip':
            self._buffers = _copied(runner.model)

    def after_train_iter(
        self, runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Release the batch."""
        self._batch, self._buffers = None, []

    def _guard(self, runner: Any, wrapper: Any) -> None:
        update, step = wrapper.update_params, wrapper.step

        def update_params(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            if not _agreed(not bool(torch.isfinite(loss.detach()).all())):
                update(loss, *args, **kwargs)
                return
            self._handle(runner, f'the loss is {float(loss.detach().float().sum())}')
            wrapper._inner_count = getattr(wrapper, '_inner_count', 0) + 1
            wrapper.zero_grad()

        def guarded_step(**kwargs: Any) -> None:
            scaler = getattr(wrapper, 'loss_scaler', None)
            scaled = scaler is not None and scaler.is_enabled()
            if self.check_gradients and not scaled:
                groups = wrapper.optimizer.param_groups
                bad = _has_non_finite([p.grad for group in groups for p in group['params']])
                if _agreed(bad):
                    # The caller sets the gradients to zero.
                    self._handle(runner, 'a gradient is not finite')
                    return
            self._consecutive = 0
            step(**kwargs)

        wrapper.update_params, wrapper.step = update_params, guarded_step

    def _handle(self, runner: Any, what: str) -> None:
        """Diagnose, then stop or count.

        Raises:
            UserError: The run is to stop.
        """
        place = f'{what} at epoch {runner.epoch + 1}, iteration {runner.iter + 1}'
        cause = self._diagnose(runner)
        _put_back(self._buffers)
        if self.action == 'stop':
            raise UserError(f'{place}: {cause}')
        self.skipped += 1
        self._consecutive += 1
        runner.message_hub.update_info('non_finite_steps', self.skipped)
        if self._consecutive >= self.max_consecutive:
            raise UserError(f'{place}, and {self._consecutive} times in a row: {cause}')
        runner.logger.warning(f'{place}: {cause}. This step is skipped ({self.skipped} so far).')

    def _diagnose(self, runner: Any) -> str:
        model = runner.model
        # The gradients of the first pass are no longer needed.
        for parameter in model.parameters():
            parameter.grad = None
        # Sharded models can only be run through their wrapper.
        while is_model_wrapper(model) and 'FullySharded' not in type(model).__name__:
            model = model.module
        buffers = _copied(model)
        present = random_state.capture()
        try:
            return find_non_finite(model, self._batch, runner.optim_wrapper, self._states)
        finally:
            random_state.restore(present)
            _put_back(buffers)


def _copied(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The buffers of a model, each with a copy of it."""
    return [(buffer, buffer.detach().clone()) for buffer in model.buffers()]


def _put_back(buffers: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)


class _Call:
    """One call of a module, and what was not finite in it."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.module = module
        self.gradient_in = True
        self.gradient_out = True
        self.text = ''


def find_non_finite(
    model: nn.Module, batch: Any, optim_wrapper: Any, states: dict | None = None
) -> str:
    """Run a training batch forward and backward, and locate the first non-finite value.

    Args:
        model: A model with ``data_preprocessor``, ``_run_forward`` and ``parse_losses`` as
            in mmengine's ``BaseModel``. Its gradients and buffers may change.
        batch: A batch from the DataLoader.
        optim_wrapper: Determines the precision of the forward pass.
        states: The random states to start from, as :func:`random_state.capture` returns them.

    Returns:
        A sentence without a full stop.
    """
    inner = model.module if is_model_wrapper(model) else model
    for name, parameter in inner.named_parameters():
        if _has_non_finite([parameter.detach()]):
            return f'the parameter {name} is not finite itself: an earlier step has corrupted it'
    if states is not None:
        random_state.restore(states)
    calls: list[_Call] = []
    with optim_wrapper.optim_context(model), _watched(inner, calls) as first:
        data = inner.data_preprocessor(batch, True)
        inputs = _tensors(data)
        if _has_non_finite(inputs):
            return f'the input is not finite ({_count(inputs)}), so look at the data pipeline'
        losses = model._run_forward(data, mode='loss')
        if first:
            return first[0]
        loss, log_vars = inner.parse_losses(losses)
    if not bool(torch.isfinite(loss.detach()).all()):
        parts = {name: float(torch.as_tensor(value).detach()) for name, value in log_vars.items()}
        return (
            'every layer is finite, but the loss is not ('
            + ', '.join(f'{name}: {value}' for name, value in parts.items())
            + ')'
        )
    parameters = {n: p for n, p in inner.named_parameters() if p.requires_grad}
    # Not backward(), which would make distributed wrappers average the gradients.
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    bad = {name for name, g in zip(parameters, gradients, strict=True) if _has_non_finite([g])}
    return _backward_cause(calls, bad)


def _backward_cause(calls: list[_Call], bad: set[str]) -> str:
    found = []
    for call in reversed(calls):
        own = sorted(name for name in bad if name.rpartition('.')[0] == call.name)
        if call.gradient_out and (not call.gradient_in or own):
            found.append((call, own))
    for call, own in found:
        if any(other.name.startswith(f'{call.name}.') for other, _ in found if call.name):
            continue  # One of its parts is more precise.
        what = f'of its parameter {own[0].rpartition(".")[2]}' if own else 'of its input'
        return (
            f'going backwards, the first gradient that is not finite is that {what} in '
            f'{_title(call.name, call.module)}'
        )
    if bad:
        return f'the gradient of {min(bad)} is not finite'
    return (
        'a second pass with the same data and random numbers was finite (a kernel that is not '
        'deterministic, a hook that changes things, or processes with different data)'
    )


@contextmanager
def _watched(model: nn.Module, calls: list[_Call]) -> Iterator[list[str]]:
    """Watch every module; the list receives a sentence on the first non-finite output."""
    first: list[str] = []

    def watch(name: str, module: nn.Module):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            given, made = _tensors([args, kwargs]), _tensors(output)
            call = _Call(name, module)
            if not first and _has_non_finite(made) and not _has_non_finite(given):
                first.append(
                    f'the first output that is not finite is that of {_title(name, module)} '
                    f'({_count(made)}; its input is finite, up to {_largest(given):.4g})'
                )
            for tensor in given:
                _watch_gradient(tensor, call, 'gradient_in')
            for tensor in made:
                _watch_gradient(tensor, call, 'gradient_out')
            calls.append(call)

        return module.register_forward_hook(hook, with_kwargs=True)

    handles = [watch(name, module) for name, module in model.named_modules() if name]
    try:
        yield first
    finally:
        for handle in handles:
            handle.remove()


def _watch_gradient(tensor: Tensor, call: _Call, side: str) -> None:
    if tensor.requires_grad and not isinstance(tensor, nn.Parameter):

        def hook(gradient: Tensor) -> None:
            if _has_non_finite([gradient]):
                setattr(call, side, False)

        tensor.register_hook(hook)


def _title(name: str, module: nn.Module) -> str:
    return f'{name} ({type(module).__name__})'


def _tensors(node: Any) -> list[Tensor]:
    """Return the floating-point tensors in nested containers."""
    if isinstance(node, Tensor):
        return [node] if node.is_floating_point() else []
    if isinstance(node, dict):
        node = node.values()
    elif not isinstance(node, list | tuple):
        return []
    return [tensor for item in node for tensor in _tensors(item)]


def _has_non_finite(tensors: list[Tensor | None]) -> bool:
    """Whether any value is infinite or NaN, with a single device synchronisation."""
    tensors = [t.detach() for t in tensors if t is not None and t.numel()]
    if not tensors:
        return False
    tensors = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    largest = [norm.float() for norm in torch._foreach_norm(tensors, float('inf'))]
    device = largest[0].device
    return not bool(torch.isfinite(torch.stack([x.to(device) for x in largest])).all())


def _count(tensors: list[Tensor]) -> str:
    wrong = sum(int((~torch.isfinite(t.detach())).sum()) for t in tensors)
    return f'{wrong:,} of {sum(t.numel() for t in tensors):,} values'


def _largest(tensors: list[Tensor]) -> float:
    return max((float(t.detach().abs().max()) for t in tensors if t.numel()), default=0.0)


def _agreed(bad: bool) -> bool:
    """Whether any process found something bad."""
    if not is_distributed():
        return bad
    flag = torch.tensor(int(bad), device=get_comm_device())
    all_reduce(flag, 'max')
    return bool(flag)
