"""What a user can mend is reported in one line on stderr; a bug keeps its traceback.

Set ``MMVIM_DEBUG=1`` to see the traceback of every error.
"""

import importlib.util
import linecache
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from mmengine.dataset import BaseDataset
from torch import nn

from mmvim.errors import CheckpointError, UserError, did_you_mean
from mmvim.utils.argument_types import misfits, parameters

from .config_keys import RUNNER_KEYS, walk_dicts

EXIT_CODE = 2
_BUILDERS = ('build_from_cfg', 'build_scheduler_from_cfg')


@contextmanager
def reported_errors() -> Iterator[SimpleNamespace]:
    """Turn errors that the user can mend into one line on stderr and exit code 2.

    Yields a namespace; set its ``cfg`` as soon as the config is known, so that messages can name
    the key that is wrong. Everything that is not understood propagates unchanged.
    """
    context = SimpleNamespace(cfg=None)
    try:
        yield context
    except KeyboardInterrupt:
        if os.environ.get('MMVIM_DEBUG') == '1':
            raise
        print('interrupted', file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = explain(error, context.cfg)
        if message is None:
            _note(error, context.cfg)
            raise
        if os.environ.get('MMVIM_DEBUG') == '1':
            traceback.print_exc()
        rank = os.environ.get('RANK', '0')
        prefix = 'error' if rank == '0' else f'error (rank {rank})'
        print(f'{prefix}: {message}', file=sys.stderr, flush=True)
        sys.exit(EXIT_CODE)


def explain(error: BaseException, cfg: dict | None = None) -> str | None:
    """Say in one line what the user can mend.

    Args:
        error: The exception, with its traceback.
        cfg: The config of the run, for the names of keys.

    Returns:
        One line, or None when ``error`` may be a bug.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for rule in _RULES:
        message = rule(error, frames, cfg)
        if message:
            return ' '.join(message.split())
    return None


def whereabouts(error: BaseException, cfg: dict | None) -> str | None:
    """Say which part of the config was in use when an error arose that may be a bug.

    Args:
        error: The exception, with its traceback.
        cfg: The config of the run.

    Returns:
        A line with the key path, or None where no part of the config is in sight.
    """
    if cfg is None:
        return None
    # Configs have variables too, which nobody reads.
    nodes = [
        (path, node) for path, node in walk_dicts(cfg) if path.split('.')[0] in RUNNER_KEYS and node
    ]
    part = _part_of(list(traceback.walk_tb(error.__traceback__)), cfg, nodes)
    if part is None:
        return None
    return f'this happened with {part} of the config; if its values are right, it is a bug'


def _parts(cfg: dict) -> list[tuple[str, dict]]:
    """All dicts of a config but its variables, which nobody reads."""
    return [
        (path, node) for path, node in walk_dicts(cfg) if path.split('.')[0] in RUNNER_KEYS and node
    ]


def _part_of(steps: list, cfg: dict, nodes: list[tuple[str, dict]]) -> str | None:
    """The part of the config that the innermost function in sight works for.

    That is what a component is being built from, or the config of the object whose method runs;
    else a part that one of mmengine's functions was given.
    """
    frames = [frame for frame, _ in reversed(steps)]
    for frame in frames:
        values = frame.f_locals
        if frame.f_code.co_name in _BUILDERS:
            fragment = values.get('cfg')
            path = locate(cfg, fragment) if isinstance(fragment, dict) and fragment else None
            if path in dict(nodes):
                return path
        part = _made_from(values.get('self'), nodes)
        if part:
            return part
    for frame in frames:
        if _module(frame).startswith('mmengine.'):
            dicts = [v for v in frame.f_locals.values() if isinstance(v, dict) and v]
            paths = [path for path, node in nodes if any(_equal(node, v) for v in dicts)]
            if paths:
                # The whole of what the function works for, not a part of it.
                least = min(path.count('.') for path in paths)
                return ' or '.join([path for path in paths if path.count('.') == least][:8])
    return None


def _made_from(component: Any, nodes: list[tuple[str, dict]]) -> str | None:
    kind = type(component).__name__
    paths = [path for path, node in nodes if _name(node.get('type')).rpartition('.')[2] == kind]
    return f'{" or ".join(paths[:8])} ({kind})' if paths else None


def _note(error: BaseException, cfg: dict | None) -> None:
    line = whereabouts(error, cfg)
    if line is None:
        return
    if hasattr(error, 'add_note'):
        error.add_note(line)
    else:  # Python 3.10
        print(line, file=sys.stderr, flush=True)


def locate(cfg: Any, fragment: dict) -> str:
    """Find the key path of a component's config in the config of the run.

    Args:
        cfg: The config (nested dicts and lists).
        fragment: The dict that a component was being built from. It may have gained or lost keys
            on its way through the library, so the most similar dict of that type is taken.

    Returns:
        For example ``model.backbone``; the type's name if there is no such dict.
    """
    best, best_score = None, (-1, False, 0)
    for path, candidate in walk_dicts(cfg):
        if candidate.get('type') != fragment.get('type'):
            continue
        same = sum(_equal(value, candidate.get(key)) for key, value in fragment.items())
        # Configs have variables too (`dataset = …`), which the runner does not read.
        others = sum(key not in fragment for key in candidate)
        score = (same, path.split('.')[0] in RUNNER_KEYS, -others)
        if score > best_score:
            best, best_score = path, score
    return best or _name(fragment.get('type'))


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (ValueError, RuntimeError):
        return False


def _name(kind: Any) -> str:
    return kind if isinstance(kind, str) else getattr(kind, '__name__', str(kind))


def _text(error: BaseException) -> str:
    return f'{type(error).__name__}: {error}' if str(error) else type(error).__name__


def _module(frame: FrameType) -> str:
    return frame.f_globals.get('__name__', '')


def _is_explicit(error: BaseException) -> bool:
    """Whether the error comes from a ``raise`` or ``assert`` statement, not from an operation."""
    steps = list(traceback.walk_tb(error.__traceback__))
    if not steps:
        return False
    frame, line = steps[-1]
    source = linecache.getline(frame.f_code.co_filename, line).strip()
    return source.startswith(('raise', 'assert'))


def _from_worker(error, frames, cfg):
    """Errors of DataLoader workers arrive as text."""
    text = str(error)
    if not re.match(r'Caught \w+ in DataLoader worker', text):
        return None
    kind, _, message = text.strip().splitlines()[-1].partition(': ')
    if kind.endswith('SampleError') or isinstance(error, OSError):
        return message
    return None


def _dead_worker(error, frames, cfg):
    """A DataLoader worker that is gone, which torch says in two ways."""
    found = re.search(r'DataLoader worker \(pid\(?s?\)? ?[\d, ]+\) (.*)', str(error))
    if not isinstance(error, RuntimeError) or not found:
        return None
    return (
        f'a data loader worker {found[1].rstrip(".")}: often the machine has run out of memory. '
        'Lower num_workers, or let training replace workers with '
        'train_cfg.max_worker_restarts=N; --resume continues the run'
    )


def _user_error(error, frames, cfg):
    if not isinstance(error, UserError):
        return None
    if isinstance(error, CheckpointError) and not str(error).startswith('checkpoint '):
        return f'checkpoint {_checkpoint_name(frames)!r} {error}'
    return str(error)


def _checkpoint_name(frames: list[FrameType]) -> str:
    names = [
        str(frame.f_locals['filename'])
        for frame in frames
        if 'checkpoint' in frame.f_code.co_name and 'filename' in frame.f_locals
    ]
    for frame in frames:
        # mmengine's initialiser `Pretrained` loads a part of a checkpoint without passing its name.
        pretrained = getattr(frame.f_locals.get('self'), 'checkpoint', None)
        if isinstance(pretrained, str):
            names.append(pretrained)
    return names[0] if names else '(unknown)'


def _unreadable_checkpoint(error, frames, cfg):
    if not any(
        frame.f_code.co_name.startswith(('load_from_', '_load_checkpoint')) for frame in frames
    ):
        return None
    if any(frame.f_code.co_name == '_load_checkpoint_to_model' for frame in frames):
        return None
    name = _checkpoint_name(frames)
    if isinstance(error, FileNotFoundError):
        return f'checkpoint {name!r} does not exist'
    if isinstance(error, AssertionError):
        return f'checkpoint {name!r}: {error}'
    if str(error).startswith('checkpoint '):
        return str(error)
    return (
        f'checkpoint {name!r} cannot be read: it is damaged or not a PyTorch checkpoint '
        f'({_text(error)[:200]})'
    )


def _failed_resume(error, frames, cfg):
    resume = next(
        (f for f in frames if f.f_code.co_name == 'resume' and _module(f).startswith('mmengine.')),
        None,
    )
    if resume is None or not isinstance(error, KeyError | ValueError | RuntimeError):
        return None
    if isinstance(error, KeyError) and frames[-1] is resume:
        return (
            f'cannot resume from checkpoint {resume.f_locals.get("filename")!r}: it has no '
            f'{error.args[0]!r}, so it holds weights, not the state of a training run; '
            'start from its weights with --cfg-options load_from=PATH instead of --resume'
        )
    return f'cannot resume from checkpoint {resume.f_locals.get("filename")!r}: {error}'


def _failed_build(error, frames, cfg):
    """An error while a component is made from its config."""
    frame = next(
        (
            frame
            for frame in reversed(frames)
            if frame.f_code.co_name in _BUILDERS and _module(frame).startswith('mmengine.registry')
        ),
        None,
    )
    if frame is None or not isinstance(frame.f_locals.get('cfg'), dict):
        return None
    fragment, registry = frame.f_locals['cfg'], frame.f_locals.get('registry')
    component = frame.f_locals.get('obj_cls')
    name, path = _name(fragment.get('type')), locate(cfg, fragment)
    if cfg is not None and path == name:
        # Made by the library itself, for a part of the config.
        steps = [(f, 0) for f in frames[: frames.index(frame)]]
        path = _part_of(steps, cfg, _parts(cfg)) or path
    if 'type' not in fragment:
        return f'{path or "config"}: {_text(error)}'
    if component is None:
        message = _unknown_type(fragment['type'], registry, path)
        scope = None if cfg is None else cfg.get('default_scope')
        bare = cfg is not None and '.' not in str(fragment['type'])
        if bare and not scope:
            message += '; the config has no default_scope, so the name needs one (mmdet.…)'
        elif bare and scope != getattr(registry, 'scope', scope):
            message += f'; default_scope is {scope!r}'
        return message
    if isinstance(error, TypeError):
        message = _wrong_arguments(error, component, frame is frames[-1], fragment, path)
        if message:
            return message
    annotations = fragment.get('ann_file')
    if getattr(registry, 'name', '') in ('dataset', 'metric') and annotations:
        if isinstance(error, OSError) and error.filename:
            return f'{path}: {_text(error)}'
        if not isinstance(error, NameError | ImportError | MemoryError):
            return _bad_annotations(error, path, _annotation_file(frames, fragment))
    if isinstance(error, ImportError):
        return None
    if isinstance(error, ValueError | AssertionError | NotImplementedError | OSError) or (
        isinstance(error, KeyError | TypeError) and _is_explicit(error)
    ):
        return f'{path} ({name}): {_readable(error)}'
    return None


def _readable(error: BaseException) -> str:
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])
    if isinstance(error, AssertionError) and not str(error):
        return f'assertion failed: {traceback.extract_tb(error.__traceback__)[-1].line}'
    return str(error)


def _unknown_type(kind: Any, registry: Any, path: str) -> str:
    scope, _, bare = str(kind).rpartition('.')
    if scope and '.' not in scope and importlib.util.find_spec(scope) is None:
        return f'{path}.type is {kind!r}, but there is no package {scope!r} installed'
    names, place = set(), getattr(registry, 'scope', '')
    node = registry
    if scope and registry is not None:
        root = registry._get_root_registry()
        node = root.children.get(scope, registry)
        place = scope
    kind_of = getattr(registry, 'name', 'registry')
    while node is not None:
        names.update(node.module_dict)
        node = node.parent
    hint = did_you_mean(bare, names) or (
        '' if len(names) > 20 else f'; allowed: {", ".join(sorted(names))}'
    )
    return f'{path}.type is {kind!r}, which is not a registered {kind_of} of {place!r}{hint}'


def _wrong_arguments(
    error: TypeError, component: Any, at_call: bool, fragment: dict, path: str
) -> str | None:
    text = str(error)
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", text)
    missing = re.search(r'missing \d+ required \S+ arguments?: (.*)', text)
    name, allowed = _name(fragment.get('type')), _arguments(component)
    if missing and not unexpected:
        # Of a base class too, if it is the config that should have given it.
        own = [word for word in re.findall(r"'(\w+)'", missing[1]) if word not in fragment]
        if at_call or (own and set(own) <= set(allowed)):
            return f'{path}: {name} needs {missing[1]}, which the config does not give'
    if not unexpected:
        return None
    if not at_call and unexpected[1] in allowed:
        return None
    return unknown_argument(path, name, unexpected[1], allowed)


def unknown_argument(path: str, name: str, argument: str, allowed: list[str]) -> str:
    """Say that a component has no such argument, and which it has."""
    hint = did_you_mean(argument, allowed)
    listed = f'; allowed: {", ".join(allowed)}' if allowed else ''
    return f'{path}: {name} has no argument {argument!r}{hint}{listed}'


def _runner_arguments(error, frames, cfg):
    """The runner calls loops, dataloaders and its own functions with parts of the config."""
    if not isinstance(error, TypeError) or not frames or cfg is None:
        return None
    found = re.match(r"(\w+)\S*\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not found or not _module(frames[-1]).startswith('mmengine.'):
        return None
    callee = frames[-1].f_globals.get(found[1])
    for path, node in walk_dicts(cfg):
        if found[2] in node and path.split('.')[0] in RUNNER_KEYS:
            return unknown_argument(path, found[1], found[2], _arguments(callee))
    return None


def _arguments(component: Any) -> list[str]:
    return [parameter.name for parameter in parameters(component)]


def _annotation_file(frames: list[FrameType], fragment: dict) -> str:
    for frame in reversed(frames):
        owner = frame.f_locals.get('self')
        if isinstance(owner, BaseDataset) and getattr(owner, 'ann_file', None):
            return str(owner.ann_file)
    return str(fragment.get('ann_file'))


def _bad_annotations(error: BaseException, path: str, file: str) -> str:
    functions = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    if '_serialize_data' in functions:
        return f'{path} is empty: the annotation file {file!r} and filter_cfg leave no sample'
    return (
        f'{path}.ann_file: cannot use annotation file {file!r}: {_text(error)[:300]} '
        '(MMVIM_DEBUG=1 shows where)'
    )


def _lazy_dataset(error, frames, cfg):
    """Annotations are read after the build when ``lazy_init=True``."""
    for frame in frames:
        owner = frame.f_locals.get('self')
        if isinstance(owner, BaseDataset) and frame.f_code.co_name in (
            'full_init',
            'load_data_list',
        ):
            if isinstance(error, OSError) and error.filename:
                return None
            part = _made_from(owner, _parts(cfg or {})) or type(owner).__name__
            return _bad_annotations(error, part, str(owner.ann_file))
    return None


def _unknown_optimizer(error, frames, cfg):
    for frame in reversed(frames):
        if 'optimizer_cls' in frame.f_locals and frame.f_locals['optimizer_cls'] is None:
            from mmengine.registry import OPTIMIZERS

            kind = frame.f_locals['self'].optimizer_cfg['type']
            return _unknown_type(kind, OPTIMIZERS, 'optim_wrapper.optimizer')
    return None


def _library_check(error, frames, cfg):
    """Checks of mmengine and of this package that name what is wrong."""
    if not frames or not isinstance(error, ValueError | TypeError | AssertionError | KeyError):
        return None
    module = _module(frames[-1])
    if frames[-1].f_code.co_name == '__missing__':
        return None  # a key that is looked up in a dict of the config, which may be a bug
    if frames[-1].f_code.co_name == 'build_from_cfg' and isinstance(error, TypeError):
        given = frames[-1].f_locals.get('cfg')
        if not isinstance(given, dict):
            part = _part_of([(f, 0) for f in frames], cfg or {}, _parts(cfg or {}))
            where = f'{part}: ' if part else ''
            return f'{where}a component must be a dict with a type, got {given!r}'
    if module.startswith(('mmengine.', 'mmvim.')) and _is_explicit(error) and str(error):
        if frames[-1].f_code.co_name == 'call_hook':
            # The runner's own words name the hook by its address.
            part = _made_from(frames[-1].f_locals.get('hook'), _parts(cfg or {}))
            return f'{part}: {_readable(error)}' if part else None
        return _readable(error)
    return None


def _wrong_type(error, frames, cfg):
    """An argument is of another type than the class declares, which did not check it."""
    if cfg is None or isinstance(error, ImportError | MemoryError | NameError | OSError):
        return None
    parts = _parts(cfg)
    for frame in reversed(frames):
        for component, path, given in _components(frame, cfg, parts):
            # What a library makes for itself has no key.
            wrong = misfits(component, given) if path in dict(parts) else ()
            if wrong:
                name = _name(given.get('type'))
                return f'{path} ({name}): {", ".join(wrong)} ({_text(error)[:200]})'
    return None


def _negative_size(error, frames, cfg):
    if cfg is None or not isinstance(error, RuntimeError) or 'negative' not in str(error):
        return None
    parts = _parts(cfg)
    for frame in reversed(frames):
        for _, path, given in _components(frame, cfg, parts):
            below = [f'{k}={v!r}' for k, v in given.items() if isinstance(v, int) and v < 0]
            if below and path in dict(parts):
                return f'{path} ({_name(given.get("type"))}): {", ".join(below)} ({_text(error)})'
    return None


def _components(
    frame: FrameType, cfg: dict, parts: list[tuple[str, dict]]
) -> Iterator[tuple[Any, str, dict]]:
    """What a function builds or belongs to: the class, its key, and its arguments."""
    values = frame.f_locals
    if frame.f_code.co_name in _BUILDERS and _module(frame).startswith('mmengine.registry'):
        given, component = values.get('cfg'), values.get('obj_cls')
        if isinstance(given, dict) and component is not None:
            yield component, locate(cfg, given), given
        return
    owner = values.get('self')
    for path, given in parts:
        if _name(given.get('type')).rpartition('.')[2] == type(owner).__name__:
            yield type(owner), path, given


def _missing_package(error, frames, cfg):
    if not isinstance(error, ImportError):
        return None
    name = (error.name or '').split('.')[0]
    if isinstance(error, ModuleNotFoundError) and name and name != 'mmvim':
        importer = next(
            (_module(f) for f in reversed(frames) if not _module(f).startswith('importlib')), ''
        )
        return f'the package {name!r} is missing ({error}; imported by {importer})'
    return str(error) if not name and _is_explicit(error) else None


def _file_error(error, frames, cfg):
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f'{error.strerror}: {str(error.filename)!r}'
    return None


def _uneven_batch(error, frames, cfg):
    found = re.search(r'stack expects each tensor to be equal size, but got (.*)', str(error))
    if not found:
        return None
    return (
        f'the inputs of a batch have different sizes ({found[1]}): resize or crop them to one size '
        "in the pipeline, or set collate_fn=dict(type='pseudo_collate') in the dataloader if the "
        'data preprocessor pads them'
    )


_CHANNELS = (
    # A linear layer, a convolution, a batch norm: (channels that come in, channels wanted).
    (r'mat1 and mat2 shapes cannot be multiplied \(\d+x(\d+) and (\d+)x\d+\)', (1, 2)),
    (r'expected input\[.*\] to have (\d+) channels, but got (\d+) channels', (2, 1)),
    (r'running_mean should contain (\d+) elements not (\d+)', (1, 2)),
)


def _wrong_channels(error, frames, cfg):
    """A layer that gets another number of channels than it was made for."""
    if not isinstance(error, RuntimeError):
        return None
    found = [(re.search(pattern, str(error)), order) for pattern, order in _CHANNELS]
    match, order = next(((m, order) for m, order in found if m), (None, None))
    modules = [f.f_locals.get('self') for f in frames]
    modules = [m for m in modules if isinstance(m, nn.Module)]
    if match is None or not modules:
        return None
    given, wanted = (match[i] for i in order)
    root = next((m for m in modules if hasattr(m, 'backbone')), modules[0])
    name = next((name for name, m in root.named_modules() if m is modules[-1]), '')
    return (
        f'model.{name} ({type(modules[-1]).__name__}) wants {wanted} channels and gets {given}: '
        'set in_channels of the neck or head to what the backbone gives'
    )


def _out_of_memory(error, frames, cfg):
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f'the device is out of memory ({str(error).splitlines()[0]}); lower '
            'train_dataloader.batch_size, or try --amp or with_cp=True in the backbone'
        )
    return None


# The first rule that knows the error wins.
_RULES = (
    _from_worker,
    _dead_worker,
    _user_error,
    _unreadable_checkpoint,
    _failed_resume,
    _failed_build,
    _runner_arguments,
    _lazy_dataset,
    _unknown_optimizer,
    _library_check,
    _wrong_type,
    _negative_size,
    _missing_package,
    _file_error,
    _uneven_batch,
    _wrong_channels,
    _out_of_memory,
)
