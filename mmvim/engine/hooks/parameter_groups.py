"""One parameter group for all parameters with the same settings."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict

from mmvim.registry import HOOKS

# Names of a group's parameters, which have no influence on how they learn.
_NAMES = ('param_name', 'param_names')
# Values that mmengine's schedulers keep for each group.
_SCHEDULED = ('base_values', '_last_value', 'min_values')
# The implementation of a step: a matter of the running machine, not of a checkpoint.
_IMPLEMENTATION = ('fused', 'foreach')
# These keep their own copies of the groups.
_OWN_GROUPS = ('ApexOptimWrapper', 'ColossalAIOptimWrapper', 'ZeroRedundancyOptimizer')


@dataclass
class _Layout:
    """Mapping of the groups that a constructor made to the joined ones.

    Attributes:
        group_of: For each original group, the joined group that contains it.
        order: For each parameter in the current order, its position in the original order.
        sizes: Number of parameters of each original group.
        names: Parameter names of each original group.
    """

    group_of: list[int]
    order: list[int]
    sizes: list[int]
    names: list[dict]

    @property
    def first(self) -> list[int]:
        """The first original group of each joined one."""
        return [self.group_of.index(new) for new in range(max(self.group_of) + 1)]


@HOOKS.register_module()
class ParameterGroupsHook(Hook):
    """Let parameters with the same settings share a parameter group during training.

    With a ``paramwise_cfg`` mmengine's optimizer constructors make one group per parameter, and an
    optimizer works group by group: with hundreds of groups, foreach and fused implementations
    receive one tensor at a time. When training begins, after a checkpoint has been loaded, this
    hook joins groups with equal settings (learning rate, weight decay, any other key, and the
    values of parameter schedulers). It therefore works with every constructor, and each parameter
    keeps its settings.

    Checkpoints stay as mmengine writes them, with the constructor's groups: they can be resumed
    with and without this hook, and so can those of earlier versions. The resuming run, not the
    checkpoint, decides whether steps are fused.

    Optimizers that manage their parameters themselves (DeepSpeed, ColossalAI, Apex, FSDP,
    ``ZeroRedundancyOptimizer``) are left alone. ``tools/train.py`` adds this hook; other launchers
    get it from ``custom_hooks=[dict(type='mmvim.ParameterGroupsHook')]``.
    """

    # After hooks that find parameters by their groups, before those that save.
    priority = 'LOW'

    def __init__(self) -> None:
        self._layouts: dict[str, _Layout] = {}

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Keep the current implementation of the optimizer, with the state of the checkpoint."""
        saved = checkpoint.get('optimizer')
        if not runner._resume or not isinstance(saved, dict):
            return
        for name, wrapper in _wrappers(runner.optim_wrapper):
            state = saved.get(name) if name else saved
            for group in state.get('param_groups', ()) if isinstance(state, dict) else ():
                for key in _IMPLEMENTATION:
                    if key in wrapper.optimizer.defaults:
                        group[key] = wrapper.optimizer.defaults[key]

    def before_train(self, runner: Any) -> None:
        """Join groups."""
        for name, wrapper in _wrappers(runner.optim_wrapper):
            schedulers = _schedulers(runner, name)
            reason = _obstacle(wrapper, schedulers, runner.model)
            before = len(wrapper.optimizer.param_groups)
            if reason is None and name not in self._layouts:
                parameters = [p for g in wrapper.optimizer.param_groups for p in g['params']]
                self._layouts[name] = _join(wrapper, schedulers)
                if hasattr(wrapper, 'clip_func'):
                    wrapper.clip_func = _clip_in_order(wrapper.clip_func, parameters)
            after = len(wrapper.optimizer.param_groups)
            runner.logger.info(
                f'Optimizer{f" {name!r}" if name else ""}: {_describe(wrapper.optimizer)}, '
                + (
                    f'{before} parameter groups, which stay apart: {reason}'
                    if reason
                    else f'{after} parameter groups'
                    + (f' ({before} with equal settings joined)' if after < before else '')
                )
            )

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Save the groups that the constructor made."""
        for name, layout in self._layouts.items():
            for key, split in (('optimizer', _split_state), ('param_schedulers', _split_scheduled)):
                saved = checkpoint.get(key)
                if saved is not None and name:
                    checkpoint[key] = {**saved, name: split(layout, saved[name])}
                elif saved is not None:
                    checkpoint[key] = split(layout, saved)


def _wrappers(wrapper: Any) -> Iterator[tuple[str, OptimWrapper]]:
    """Yield the existing optimizer wrappers, with their names if there are several."""
    if isinstance(wrapper, OptimWrapperDict):
        yield from wrapper.items()
    elif isinstance(wrapper, OptimWrapper):
        yield '', wrapper


def _schedulers(runner: Any, name: str) -> list:
    schedulers = getattr(runner, 'param_schedulers', None) or []
    return list(schedulers.get(name, []) if isinstance(schedulers, dict) else schedulers)


def _describe(optimizer: torch.optim.Optimizer) -> str:
    kind = next((k for k in _IMPLEMENTATION if optimizer.defaults.get(k)), None)
    return type(optimizer).__name__ + (f' ({kind})' if kind else '')


def _obstacle(wrapper: OptimWrapper, schedulers: list, model: Any) -> str | None:
    """Return the reason why groups cannot be joined, or None."""
    for owner in (wrapper, wrapper.optimizer):
        if type(owner).__name__ in _OWN_GROUPS:
            return f'{type(owner).__name__} has groups of its own'
    if 'FullySharded' in type(model).__name__:
        return 'the model is sharded'
    count = len(wrapper.param_groups)
    for scheduler in schedulers:
        if type(scheduler).__module__.startswith('mmengine.'):
            continue
        for key, value in vars(scheduler).items():
            if key not in _SCHEDULED and isinstance(value, list | tuple) and len(value) == count:
                return f'{type(scheduler).__name__}.{key} may belong to them'
    return None


def _clip_in_order(clip: Callable, parameters: list) -> Callable:
    """Keep the norm of the gradients equal, to the last bit, to that of the original groups."""
    place = {id(p): i for i, p in enumerate(parameters)}

    @functools.wraps(clip)
    def clip_func(chosen: list, **kwargs: Any) -> Any:
        return clip(sorted(chosen, key=lambda p: place[id(p)]), **kwargs)

    return clip_func


def _join(wrapper: OptimWrapper, schedulers: list) -> _Layout:
    optimizer = wrapper.optimizer
    groups = optimizer.param_groups
    scheduled = [
        (scheduler, key)
        for scheduler in schedulers
        for key in _SCHEDULED
        if isinstance(getattr(scheduler, key, None), list)
        and len(getattr(scheduler, key)) == len(wrapper.param_groups)
    ]
    joined: dict[tuple, dict] = {}
    group_of, members = [], []
    for i, group in enumerate(groups):
        settings = tuple(
            sorted((k, _frozen(v)) for k, v in group.items() if k not in ('params', *_NAMES))
        )
        key = (settings, tuple(_frozen(getattr(s, name)[i]) for s, name in scheduled))
        if key not in joined:
            joined[key] = group | {'params': []}
            joined[key].pop('param_name', None)
            members.append([])
        index = list(joined).index(key)
        group_of.append(index)
        members[index].append(i)
        joined[key]['params'] += group['params']
    sizes = [len(group['params']) for group in groups]
    start = [0, *itertools.accumulate(sizes)]
    order = [place for old in members for i in old for place in range(start[i], start[i + 1])]
    names = [{k: group[k] for k in _NAMES if k in group} for group in groups]
    layout = _Layout(group_of, order, sizes, names)
    for old, group in zip(members, joined.values(), strict=True):
        if 'param_names' in group:
            group['param_names'] = [n for i in old for n in groups[i]['param_names']]
    for scheduler, name in scheduled:
        values = getattr(scheduler, name)
        kept = [values[i] for i in layout.first]
        setattr(scheduler, name, kept + values[len(groups) :])
    optimizer.param_groups[:] = joined.values()
    return layout


def _frozen(value: Any) -> Any:
    """Return a hashable value that is equal only for equal settings."""
    if isinstance(value, list | tuple):
        return 'sequence', tuple(_frozen(item) for item in value)
    if value is None or isinstance(value, bool | int | float | str):
        # True must differ from 1, and sorting needs comparable values.
        return type(value).__name__, repr(value)
    return 'object', repr(id(value))


def _split_state(layout: _Layout, state: dict) -> dict:
    """Return the state of an optimizer wrapper as with the original groups."""
    place = dict(enumerate(layout.order))
    groups, start = [], 0
    for new, size, names in zip(layout.group_of, layout.sizes, layout.names, strict=True):
        settings = {k: v for k, v in state['param_groups'][new].items() if k not in _NAMES}
        groups.append(settings | names | {'params': list(range(start, start + size))})
        start += size
    states = {place.get(key, key): value for key, value in state['state'].items()}
    return state | {'state': states, 'param_groups': groups}


def _split_scheduled(layout: _Layout, schedulers: list[dict]) -> list[dict]:
    """Return the states of parameter schedulers as with the original groups."""
    count = len(layout.first)

    def split(key: str, value: Any) -> Any:
        if key not in _SCHEDULED or not isinstance(value, list):
            return value
        return [value[new] for new in layout.group_of] + value[count:]

    return [{key: split(key, value) for key, value in state.items()} for state in schedulers]
