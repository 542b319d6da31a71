"""CUDA graphs for the part of a model that launches most kernels: the backbone."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from mmvim._cuda_graphs import without_garbage_collection
from mmvim.layers.recomputation import recomputing_within
from mmvim.registry import HOOKS

from .compile import find_backbones

_WARM_UPS = 3
# Space of each recomputed block in the sequence of random numbers of a step.
_STRIDE = 1 << 20
_HOOKS = (
    '_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks'
)  # fmt: skip


@HOOKS.register_module()
class GraphHook(Hook):
    """Replay the forward and backward pass of every backbone as CUDA graphs in training.

    The kernels of a small model take less time than launching them one by one. In the first
    iteration with each input shape the backbone's kernels are recorded, including those of the
    backward pass; from then on each pass is one launch. The same kernels give the same numbers, and
    random numbers (drop path) are new in each iteration. The rest of a step runs unchanged:
    preprocessor, neck, heads, losses, optimizer. So the hook works with mixed precision, gradient
    accumulation, several GPUs (DDP), ``EMAHook``, ``with_cp`` and resuming; checkpoints do not
    change. Validation and testing run unchanged.

    A backbone runs without graphs, with one warning that gives the reason, where it cannot be
    recorded (not on a GPU, sharded by FSDP, SyncBN, a pass that waits for the GPU) or must not be:
    while its parts have hooks, which a replay would not call, or while an earlier output still
    waits for its backward pass. A parameter that has moved, become trainable or been frozen leads
    to new graphs.

    The graphs of all shapes share memory, but each has its own gradients for the parameters.
    ``tools/train.py`` adds this hook for ``graph=True`` or ``graph=dict(…)`` in a config; other
    launchers get it from ``custom_hooks=[dict(type='mmvim.GraphHook')]``.

    Args:
        max_shapes (int): Largest number of graphs to keep; beyond it the least recently used one is
            discarded. After four times as many discards recording ends: the inputs have too many
            shapes. Defaults to 8.

    Raises:
        ValueError: If ``max_shapes`` is not positive.

    Example:
        >>> custom_hooks = [dict(type='mmvim.GraphHook', max_shapes=4)]
    """

    def __init__(self, max_shapes: int = 8) -> None:
        if isinstance(max_shapes, bool) or not isinstance(max_shapes, int) or max_shapes < 1:
            raise ValueError(f'GraphHook: max_shapes must be at least 1, not {max_shapes!r}')
        self.max_shapes = max_shapes

    def before_train(self, runner: Any) -> None:
        """Make the backbones record, unless they already do.

        Raises:
            UserError: If the model has no backbone.
        """
        for name, module in find_backbones(runner.model, 'graph').items():
            if isinstance(module.__dict__.get('forward'), GraphedForward):
                continue
            reason = _obstacle(runner.model, module)
            if reason is not None:
                runner.logger.warning(f'graph: {name} runs without CUDA graphs: {reason}')
                continue
            module.forward = GraphedForward(module, name, self.max_shapes, runner.logger)


def _obstacle(model: nn.Module, backbone: nn.Module) -> str | None:
    """Return the reason why a backbone can never be recorded, or None."""
    while is_model_wrapper(model):
        if 'FullySharded' in type(model).__name__:
            return 'the model is sharded'
        model = model.module
    if backbone._compiled_call_impl is not None:
        return "it is compiled; compile=dict(mode='reduce-overhead') records CUDA graphs"
    if 'forward' in backbone.__dict__:
        return 'its forward() is replaced'
    if any('SyncBatchNorm' in type(m).__name__ for m in backbone.modules()):
        return 'SyncBN exchanges statistics between processes'
    devices = {tensor.device for tensor in (*backbone.parameters(), *backbone.buffers())}
    if len(devices) != 1 or next(iter(devices)).type != 'cuda':
        return f'it is on {", ".join(sorted(map(str, devices))) or "no device"}, not on one GPU'
    return None


class GraphedForward:
    """The ``forward`` of a module, through CUDA graphs where possible.

    Args:
        module: The module.
        name: Its name in messages.
        max_shapes: As for :class:`GraphHook`.
        logger: Logger for messages.
    """

    device_type = 'cuda'

    def __init__(self, module: nn.Module, name: str, max_shapes: int, logger: Any) -> None:
        self.module = module
        self.name = name
        self.max_shapes = max_shapes
        self.logger = logger
        self._recordings: OrderedDict[tuple, Any] = OrderedDict()
        self._evicted = 0
        self._given_up = False
        self._warned: set[str] = set()
        self._pool: Any = None
        # Of gradients that graphs write, which parameters may share.
        self.addresses: set[int] = set()
        self._modules: dict[str, nn.Module] = {}
        self._children: list[int] | None = None
        # The forward pass whose backward pass is pending; alive as long as that can happen.
        self._waiting: Callable[[], Any] = _nothing

    def __deepcopy__(self, memo: dict) -> GraphedForward:
        module = memo.get(id(self.module), self.module)
        return GraphedForward(module, self.name, self.max_shapes, self.logger)

    def __reduce__(self) -> tuple:
        return GraphedForward, (self.module, self.name, self.max_shapes, None)

    def eager(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward pass."""
        return type(self.module).forward(self.module, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass like the module itself."""
        if self._given_up or not self.module.training or not torch.is_grad_enabled():
            return self.eager(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        reason = self._temporary_obstacle(leaves)
        if reason is not None:
            self._warn(f'{reason}; it runs without meanwhile')
            return self.eager(*args, **kwargs)
        key = (str(structure), *map(_describe, leaves), *_settings(), self._fingerprint())
        recording = self._recordings.get(key)
        if recording is None:
            try:
                recording = self._record(leaves, structure)
            except Exception as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                self._give_up(f'recording failed: {_first_line(error)}')
                return self.eager(*args, **kwargs)
            self._keep(key, recording)
            if self._given_up:
                return self.eager(*args, **kwargs)
        self._recordings.move_to_end(key)
        return recording.replay(self, [leaf for leaf in leaves if isinstance(leaf, Tensor)])

    def _record(self, leaves: list, structure: Any) -> Any:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream()
        generator = torch.cuda.default_generators[stream.device_index]
        try:
            return _Recording(self, leaves, structure, self._pool)
        except Exception:
            # A failed capture leaves the generator, and the stream, as they were during it.
            generator.graphsafe_set_state(generator.clone_state().graphsafe_get_state())
            raise
        finally:
            torch.cuda.set_stream(stream)

    def _keep(self, key: tuple, recording: Any) -> None:
        self._recordings[key] = recording
        shapes = [tuple(part[0]) for part in key if isinstance(part, tuple) and len(part) == 5]
        if len(self._recordings) > self.max_shapes:
            self._recordings.popitem(last=False)
            self._evicted += 1
        if self._evicted >= 4 * self.max_shapes:
            self._give_up(
                f'the inputs have more shapes than max_shapes={self.max_shapes}; pad or resize '
                'them to a few, or raise it'
            )
        elif self.logger is not None:
            self.logger.info(
                f'graph: {self.name} is recorded for '
                f'{", ".join("x".join(map(str, shape)) for shape in shapes)} '
                f'({len(self._recordings)} of at most {self.max_shapes} recordings)'
            )

    def _temporary_obstacle(self, leaves: list) -> str | None:
        if self._waiting() is not None:
            return 'it is called again before the backward pass of its last call'
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.device.type != self.device_type:
                return f'an input is on {leaf.device}'
        if _children(self._modules) != self._children:
            self._modules = dict(self.module.named_modules())
            self._children = _children(self._modules)
        for name, module in self._modules.items():
            called = any(getattr(module, kind) for kind in _HOOKS) and module is not self.module
            if called or any(p._backward_hooks for p in _own(module._parameters)):
                part = f'{self.name}.{name}' if name else self.name
                return f'{part} has hooks, which a graph would not call'
        return None

    def _fingerprint(self) -> int:
        """Return a number that changes when a recording would access the wrong memory."""
        modules = self._modules.values()
        return hash((
            tuple(self._children),
            tuple(m.training for m in modules),
            tuple((p.data_ptr(), p.requires_grad) for m in modules for p in _own(m._parameters)),
            tuple(b.data_ptr() for m in modules for b in _own(m._buffers)),
        ))  # fmt: skip

    def _give_up(self, reason: str) -> None:
        self._given_up = True
        self._recordings.clear()
        self._warn(reason)

    def _warn(self, reason: str) -> None:
        if reason not in self._warned and self.logger is not None:
            self.logger.warning(f'graph: {self.name} runs without CUDA graphs: {reason}')
        self._warned.add(reason)


def _children(modules: dict[str, nn.Module]) -> list[int]:
    return [id(child) for module in modules.values() for child in module._modules.values()]


def _own(tensors: dict[str, Tensor | None]) -> Iterator[Tensor]:
    return (tensor for tensor in tensors.values() if tensor is not None)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


def _describe(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device, leaf.requires_grad
    return leaf if leaf.__hash__ is not None else repr(leaf)


def _settings() -> tuple:
    return torch.is_autocast_enabled('cuda'), torch.get_autocast_dtype('cuda')


class _Recording:
    """The two graphs for inputs of one shape."""

    def __init__(self, owner: GraphedForward, leaves: list, structure: Any, pool: Any) -> None:
        self.module = owner.module
        self.inputs = [
            leaf.detach().clone().requires_grad_(leaf.requires_grad)
            for leaf in leaves
            if isinstance(leaf, Tensor)
        ]
        given = iter(self.inputs)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(leaves, structure)
        trainable = [p for p in self.module.parameters() if p.requires_grad]
        # Other leaves of the same memory: those that accumulate the gradients of the parameters
        # themselves belong to other streams, DDP's for one.
        leaf_of = {
            p: nn.Parameter(p.detach(), requires_grad=p.requires_grad)
            for p in self.module.parameters()
        }
        targets = [x for x in self.inputs if x.requires_grad] + [leaf_of[p] for p in trainable]

        def run() -> Any:
            with _exchanged(self.module, leaf_of):
                return owner.eager(*args, **kwargs)

        if not targets:
            raise RuntimeError('nothing in it is trained')
        device = next(self.module.parameters()).device
        stream = torch.cuda.Stream(device)
        self.regions = _RecomputedRegions(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(stream):
            self._warm_up(run, targets, device)
        torch.cuda.current_stream(device).wait_stream(stream)

        capture = functools.partial(
            torch.cuda.graph, pool=pool, stream=stream, capture_error_mode='thread_local'
        )
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.regions.register(self.forward, self.backward)
        with torch.cuda.device(device), self.regions.recorded(), without_garbage_collection():
            with capture(self.forward), _autocast_without_cache():
                outputs, self.structure = tree_flatten(run())
            tensors = [x for x in outputs if isinstance(x, Tensor)]
            self.learns = [x.requires_grad for x in tensors]
            learning = [x for x in tensors if x.requires_grad]
            self.output_gradients = [torch.empty_like(x) for x in learning]
            with capture(self.backward):
                gradients = torch.autograd.grad(
                    learning, targets, self.output_gradients, allow_unused=True
                )
        # Unused parameters get no gradient, as without graphs.
        self.gradients = {
            id(x): g
            for x, g in zip(
                [x for x in self.inputs if x.requires_grad] + trainable, gradients, strict=True
            )
            if g is not None
        }
        owner.addresses.update(g.data_ptr() for g in self.gradients.values())
        self.parameters = [p for p in trainable if id(p) in self.gradients]
        self.outputs = [x.detach() if isinstance(x, Tensor) else x for x in outputs]
        self.tensors = [x for x in self.outputs if isinstance(x, Tensor)]

    def _warm_up(self, run: Callable, targets: list[Tensor], device: torch.device) -> None:
        """Run a few passes without side effects, the last ones without waiting for the GPU."""
        buffers = list(self.module.buffers())
        saved = [buffer.clone() for buffer in buffers]
        random = torch.cuda.get_rng_state(device)
        mode = torch.cuda.get_sync_debug_mode()
        try:
            for i in range(_WARM_UPS):
                if i:
                    torch.cuda.set_sync_debug_mode('error')
                with _autocast_without_cache(), self.regions.counted():
                    outputs = tree_flatten(run())[0]
                learning = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
                torch.autograd.grad(
                    learning, targets, [torch.ones_like(x) for x in learning], allow_unused=True
                )
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            with torch.no_grad():
                for buffer, before in zip(buffers, saved, strict=True):
                    buffer.copy_(before)
            torch.cuda.set_rng_state(random, device)

    def replay(self, owner: GraphedForward, inputs: list[Tensor]) -> Any:
        """Run the forward pass so that autograd records it."""
        found = iter(_Replay.apply(self, owner, len(inputs), *inputs, *self.parameters))
        return tree_unflatten(
            [next(found) if isinstance(x, Tensor) else x for x in self.outputs], self.structure
        )


class _Replay(torch.autograd.Function):
    """A forward pass from a recording, and its backward pass."""

    @staticmethod
    def forward(
        ctx: Any, recording: _Recording, owner: GraphedForward, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        for static, given in zip(recording.inputs, tensors[:count], strict=True):
            static.copy_(given)
        _keep_accumulated(recording.parameters, owner.addresses)
        start = recording.regions.begin()
        recording.forward.replay()
        ctx.recording, ctx.start, ctx.owner, ctx.token = recording, start, owner, _Token()
        owner._waiting = weakref.ref(ctx.token)
        # Copies: the next iteration overwrites what the graph writes.
        outputs = [x.clone() for x in recording.tensors]
        ctx.mark_non_differentiable(
            *(x for x, learns in zip(outputs, recording.learns, strict=True) if not learns)
        )
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        recording, owner = ctx.recording, ctx.owner
        if ctx.token is None or owner._waiting() is not ctx.token:
            raise RuntimeError(
                f'graph=True: a second backward pass through one forward pass of {owner.name}'
            )
        owner._waiting, ctx.token = _nothing, None
        wanted = [g for g, learns in zip(gradients, recording.learns, strict=True) if learns]
        for static, given in zip(recording.output_gradients, wanted, strict=True):
            static.copy_(given)
        recording.regions.begin_again(ctx.start)
        recording.backward.replay()
        inputs = [recording.gradients.get(id(x)) for x in recording.inputs]
        return (
            None,
            None,
            None,
            *(g if g is None else g.clone() for g in inputs),
            *(recording.gradients[id(p)].detach() for p in recording.parameters),
        )


class _Token:
    """Representative of a pending backward pass."""


def _nothing() -> None:
    return None


def _keep_accumulated(parameters: list[nn.Parameter], addresses: set[int]) -> None:
    """Copy gradients that lie where a graph will write: autograd took them as they were.

    Forward passes write there too, since a graph uses its memory again and again.
    """
    for p in parameters:
        if p.grad is not None and p.grad.data_ptr() in addresses:
            p.grad = p.grad.clone()


@contextlib.contextmanager
def _exchanged(module: nn.Module, other: dict[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    """Put other parameters in the place of those of a module."""
    own = [(m._parameters, dict(m._parameters)) for m in module.modules()]
    try:
        for present, parameters in own:
            present.update({k: other[p] for k, p in parameters.items() if p is not None})
        yield
    finally:
        for present, parameters in own:
            present.update(parameters)


@contextlib.contextmanager
def _autocast_without_cache() -> Iterator[None]:
    """The current autocast without its cache: a graph must cast the weights itself."""
    enabled, dtype = _settings()
    with torch.autocast('cuda', dtype, enabled=enabled, cache_enabled=False):
        yield


class _RecomputedRegions:
    """Random numbers for activation checkpointing within graphs.

    ``torch.utils.checkpoint`` reads and sets the state of the generator, so that a region draws the
    same numbers when it is recomputed, and a capture allows neither. Here each block that
    :func:`mmvim.layers.recomputation.recomputed` runs, a region, has two generator states, one in
    each graph, both of which are set to the same start before a replay. That start follows from the
    default generator, which advances in each step: a resumed run draws the same numbers as an
    uninterrupted one.
    """

    def __init__(self, device: torch.device) -> None:
        self.default = torch.cuda.default_generators[device.index or 0]
        self.device = device
        self.count = 0
        self.pairs: list[tuple[torch.Generator, torch.Generator]] = []

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count the regions that run in this block."""
        self.count = 0

        def contexts() -> tuple[contextlib.nullcontext, contextlib.nullcontext]:
            self.count += 1
            return contextlib.nullcontext(), contextlib.nullcontext()

        with recomputing_within(contexts):
            yield

    def register(self, forward: torch.cuda.CUDAGraph, backward: torch.cuda.CUDAGraph) -> None:
        """Create the states, before a capture begins."""
        for _ in range(self.count):
            pair = torch.Generator(self.device), torch.Generator(self.device)
            forward.register_generator_state(pair[0])
            backward.register_generator_state(pair[1])
            self.pairs.append(pair)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Make the regions captured in this block use their states."""
        original = self.default.graphsafe_get_state()
        pairs = iter(self.pairs)
        try:
            with recomputing_within(lambda: tuple(map(self._drawing, next(pairs)))):
                yield
        finally:
            self.default.graphsafe_set_state(original)

    @contextlib.contextmanager
    def _drawing(self, generator: torch.Generator) -> Iterator[None]:
        """Draw from a region's state, after the region too, where its further numbers are new."""
        self.default.graphsafe_set_state(generator.graphsafe_get_state())
        yield

    def begin(self) -> tuple[int, int]:
        """Set the states of a forward pass and return the start of those of its backward pass."""
        if not self.pairs:
            return 0, 0
        start = self.default.initial_seed(), self.default.get_offset()
        self._place(0, start)
        self.default.set_offset(start[1] + len(self.pairs) * _STRIDE)
        return start

    def begin_again(self, start: tuple[int, int]) -> None:
        """Set the states of a backward pass."""
        self._place(1, start)

    def _place(self, which: int, start: tuple[int, int]) -> None:
        seed, offset = start
        for i, pair in enumerate(self.pairs):
            if pair[which].initial_seed() != seed:
                pair[which].manual_seed(seed)
            pair[which].set_offset(offset + i * _STRIDE)
