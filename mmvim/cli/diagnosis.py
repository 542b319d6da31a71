"""One line on stderr for what the user can fix; the traceback, and that line, for the rest.

Objects are remembered with the part of the config that they are built from, so that an error
names the innermost part that was being built, or whose method ran. ``MMVIM_DEBUG=1`` adds the
traceback of every error.
"""

import contextlib
import inspect
import linecache
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from mmengine._strategy import BaseStrategy
from mmengine.registry import DefaultScope, Registry
from mmengine.runner import FlexibleRunner, Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmvim._arguments import misfits, parameters
from mmvim.compat._import_hook import replaces
from mmvim.engine.class_names import listed
from mmvim.errors import SampleError, UserError, did_you_mean, unfit_for_pillow, unreadable

from .config_keys import RUNNER_KEYS, walk_dicts

EXIT_CODE = 2
#: Errors by which constructors refuse their arguments.
_REFUSALS = (AssertionError, ImportError, LookupError, NotImplementedError, OSError, TypeError)
_REFUSALS += (RecursionError, ValueError)
_built: WeakKeyDictionary[Any, 'Part'] = WeakKeyDictionary()


class Part(NamedTuple):
    """A part of the config at work.

    Attributes:
        given: The dict, which may have gained or lost keys on its way through the library.
        registry: Registry of its type; None where a runner's function builds it.
        building: Whether it was being built; otherwise a method of the built object ran.
    """

    given: dict
    registry: Registry | None
    building: bool


@contextlib.contextmanager
def reported_errors() -> Iterator[SimpleNamespace]:
    """Turn errors that the user can fix into one line on stderr and exit code 2.

    Yields a namespace; set its ``cfg`` as soon as the config is known, so that messages can name
    the key that is wrong. Other errors propagate, with a note on the part of the config at work.
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
            note = whereabouts(error, context.cfg)
            if note and hasattr(error, 'add_note'):
                error.add_note(note)
            elif note:  # Python 3.10
                print(note, file=sys.stderr, flush=True)
            raise
        if os.environ.get('MMVIM_DEBUG') == '1':
            traceback.print_exc()
        rank = os.environ.get('RANK', '0')
        prefix = 'error' if rank == '0' else f'error (rank {rank})'
        print(f'{prefix}: {message}', file=sys.stderr, flush=True)
        sys.exit(EXIT_CODE)


def install() -> None:
    """Start remembering the part of the config from which each component is built."""
    _watch(Registry, 'build')
    for owner in (Runner, FlexibleRunner, BaseStrategy):
        for name in vars(owner):
            if name.startswith('build_'):
                _watch(owner, name)


def _watch(owner: type, name: str) -> None:
    @replaces(owner, name)
    def build(original: Callable, *args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        given = next((value for value in values if isinstance(value, dict)), {})
        registry = values[0] if isinstance(values[0], Registry) else None
        part = Part(given, registry, True)
        built = original(*args, **kwargs)
        if given:
            with contextlib.suppress(TypeError):  # no weak reference to it
                _built[built] = part._replace(building=False)
        return built


def parts_at_work(error: BaseException) -> Iterator[Part]:
    """Yield the parts that were being built, or whose methods ran, from the innermost outwards."""
    if error.__cause__ is not None:
        yield from parts_at_work(error.__cause__)
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        values = frame.f_locals
        if frame.f_globals is globals() and isinstance(values.get('part'), Part):
            yield values['part']
            continue
        with contextlib.suppress(TypeError):
            part = _built.get(values.get('self'))
            if part is not None:
                yield part


def locate(cfg: Any, given: dict) -> str | None:
    """Find the key path of a part in the config of the run, such as ``model.backbone``.

    It may have changed on its way through the library: the most similar dict of its type is taken.
    """
    best, best_score = None, (0, 0)
    for path, candidate in walk_dicts(cfg):
        # Configs also have variables (`dataset = …`), which the runner does not read.
        if path.split('.')[0] in RUNNER_KEYS and candidate.get('type') == given.get('type'):
            same = sum(_equal(value, candidate.get(key)) for key, value in given.items())
            score = (same, -sum(key not in given for key in candidate))
            if score > best_score:
                best, best_score = path, score
    return best


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (ValueError, RuntimeError):
        return False


def _find(error: BaseException, cfg: dict | None) -> tuple[str, Part] | None:
    """The innermost part that belongs to the config; libraries also make their own."""
    for part in parts_at_work(error) if cfg else ():
        path = locate(cfg, part.given)
        if path is not None:
            return path, part
    return None


def explain(error: BaseException, cfg: dict | None = None) -> str | None:
    """Explain in one line what the user can fix.

    Args:
        error: The exception, with its traceback.
        cfg: The config of the run, for the names of keys.

    Returns:
        One line, or None when ``error`` may be a bug.
    """
    line = _line(error, cfg)
    return ' '.join(line.split()) if line else None


def whereabouts(error: BaseException, cfg: dict | None) -> str | None:
    """Name the part of the config at work when an error arose that may be a bug.

    Returns:
        A line with the key path, or None if no part of the config is involved.
    """
    found = _find(error, cfg)
    if found is None:
        return None
    title = _title(*found)
    return f'this happened with {title} of the config; if its values are right, it is a bug'


def _title(path: str, part: Part) -> str:
    kind = part.given.get('type')
    name = kind if isinstance(kind, str) else getattr(kind, '__name__', '')
    return f'{path} ({name})' if name else path


def _text(error: BaseException) -> str:
    if type(error) in (ValueError, AssertionError, SampleError) and str(error):
        return str(error)
    return f'{type(error).__name__}: {error}' if str(error) else type(error).__name__


def _line(error: BaseException, cfg: dict | None) -> str | None:
    text = str(error)
    if isinstance(error, UserError) and not isinstance(error, SampleError):
        return text
    if re.match(r'Caught \w+ in DataLoader worker', text):
        kind, _, message = text.strip().splitlines()[-1].partition(': ')
        return message if kind.endswith('SampleError') or isinstance(error, OSError) else None
    found = _find(error, cfg)
    # With lazy_init a data set reads its annotations after it is built.
    refused = found is not None and (found[1].building or 'ann_file' in found[1].given)
    if refused and isinstance(error, _REFUSALS):
        return _refusal(error, *found, cfg)
    if isinstance(error, SampleError):
        return f'{_title(*found)}: {text}' if found else text
    if found and isinstance(error, TypeError | ValueError) and _is_refused_by_mmvim(error):
        return f'{_title(*found)}: {_text(error)}'
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f'{error.strerror}: {str(error.filename)!r}'
    if isinstance(error, ImportError) and _is_refused_by_mmvim(error):
        return text
    unknown = re.match(r"['\"]?(\S+) is not in the \S+?::(\S+) registry", text)
    if isinstance(error, KeyError) and unknown:
        return f'type {unknown[1]!r} is not a registered {unknown[2]}'
    if isinstance(error, ModuleNotFoundError) and (error.name or 'mmvim').split('.')[0] != 'mmvim':
        return f'the package {error.name.split(".")[0]!r} is missing ({text})'
    return _remedy(error)


def _is_refused_by_mmvim(error: BaseException) -> bool:
    """Whether a ``raise`` of mmvim's own made the error, such as one of a layer about its input."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return False
    frame, line = frames[-1]
    source = linecache.getline(frame.f_code.co_filename, line).strip()
    return frame.f_globals.get('__name__', '').startswith('mmvim.') and source.startswith('raise')


def _refusal(error: BaseException, path: str, part: Part, cfg: dict) -> str:
    """The reason why a part was refused by its registry or its class."""
    given, kind = part.given, part.given.get('type')
    if part.registry is None or not isinstance(kind, str):
        return f'{_title(path, part)}: {_text(error)}'
    with (
        DefaultScope.overwrite_default_scope(cfg.get('default_scope')),
        part.registry.switch_scope_and_registry(given.get('_scope_')) as registry,
    ):
        component = None
        with contextlib.suppress(RuntimeError):  # a dotted name that cannot be imported
            component = registry.get(kind)
        if component is None:
            return unknown_type(path, kind, registry)
    allowed = [parameter.name for parameter in parameters(component)]
    words = re.findall(r"'(\w+)'", str(error)) if isinstance(error, TypeError) else []
    unexpected = words and 'unexpected keyword argument' in str(error)
    if unexpected and words[0] in {*given} - {*allowed}:
        return unknown_argument(path, kind, words[0], allowed) + _inherited(words[0], cfg)
    missing = words and re.search(r'missing \d+ required', str(error))
    if missing and {*words} <= {*allowed} - {*given}:
        needed = ' and '.join(map(repr, words))
        return f'{path}: {kind} needs {needed}, which the config does not give'
    wrong = misfits(component, given)
    if wrong:
        return f'{_title(path, part)}: {", ".join(wrong)} ({_text(error)[:200]})'
    file = os.path.join(str(given.get('data_root') or ''), str(given.get('ann_file') or ''))
    if 'need at least one array' in str(error):
        reason = 'and filter_cfg leave no sample'
        suffix = inspect.signature(component).parameters.get('img_suffix')
        if suffix is not None and not given.get('ann_file'):
            ending = given.get('img_suffix', suffix.default)
            reason = f'has no file that ends with img_suffix, {ending!r}'
            file = os.path.join(file, str((given.get('data_prefix') or {}).get('img_path') or ''))
        return f'{_title(path, part)} is empty: {file!r} {reason}'
    if given.get('ann_file') and not isinstance(error, OSError | ImportError):
        reason = _bad_line(file, component) or unreadable(file, error)
        key = error.args[0] if isinstance(error, KeyError) and error.args else None
        if ' ' in str(key):
            return f'{_title(path, part)}: {key}'  # a sentence, and no key
        if key is not None:
            reason = f'something in it has no {key!r}'
        return f'{_title(path, part)}: cannot use annotation file {file!r}: {reason}'
    return f'{_title(path, part)}: {_text(error)}'


def _bad_line(file: str, component: Any) -> str | None:
    """The first line of a list of images that mmpretrain does not read."""
    kinds = [cls.__name__ for cls in getattr(component, '__mro__', ())]
    if 'CustomDataset' not in kinds or not os.path.isfile(file):
        return None
    with open(file, encoding='utf-8', errors='replace') as lines:
        for number, line in enumerate(lines, 1):
            parts = line.strip().rsplit(' ', 1)
            if len(parts) < 2 or not parts[1].isdecimal():
                return (
                    f'line {number} is {line.strip()[:100]!r}, and each must be a path, a space '
                    'and the number of a class'
                )
    return None


def unknown_type(path: str, kind: str, registry: Registry) -> str:
    """Message for a type that a registry does not have, with the closest one."""
    scope, _, bare = kind.rpartition('.')
    node, names = registry.root.children.get(scope, registry), set()
    place = node.scope
    while node is not None:
        names.update(node.module_dict)
        node = node.parent
    hint = did_you_mean(bare, names) or (
        '' if len(names) > 20 else f'; allowed: {", ".join(sorted(names))}'
    )
    if place == 'mmengine' and not scope:
        hint = f', the scope of configs without default_scope{hint}'
    return f'{path}.type is {kind!r}, which is not a registered {registry.name} of {place!r}{hint}'


def unknown_argument(path: str, name: str, argument: str, allowed: list[str]) -> str:
    """Message for an argument that a component does not have, with those it has."""
    hint = did_you_mean(argument, allowed)
    listed = f'; allowed: {", ".join(allowed)}' if allowed else ''
    return f'{path}: {name} has no argument {argument!r}{hint}{listed}'


def _inherited(argument: str, cfg: Any) -> str:
    """A remedy for a key that the config does not have itself, but a base of it."""
    file, text = getattr(cfg, 'filename', None), getattr(cfg, 'text', None) or ''
    if not file or not os.path.isfile(file) or not re.search(rf'\b{argument}\b', text):
        return ''
    with open(file, encoding='utf-8') as own:
        if re.search(rf'\b{argument}\b', own.read()):
            return ''
    return (
        f'. {argument!r} comes from a base config: _delete_=True in the dict keeps the keys of the '
        'base out'
    )


#: Messages of torch, and remedies.
_REMEDIES = (
    (
        r'DataLoader worker \(pid\(?s?\)? ?[\d, ]+\) (.*?)\.?$',
        'a data loader worker {}: often the machine has run out of memory. Lower num_workers, or '
        'let training replace workers with train_cfg.max_worker_restarts=N; --resume continues '
        'the run',
    ),
    (
        r'stack expects each tensor to be equal size, but got (.*)',
        'the inputs of a batch have different sizes ({}): resize or crop them to one size in the '
        "pipeline, or set collate_fn=dict(type='pseudo_collate') in the dataloader if the data "
        'preprocessor pads them',
    ),
    (
        r'(Connection (?:closed|reset) by peer|Broken pipe|remote process exited or .*error)',
        'the connection to another process of the run is lost ({}): the reason is in the output of '
        'that process, on its machine; --resume continues the run',
    ),
    (
        r'(.* out of memory.*)',
        'the device is out of memory ({}); lower train_dataloader.batch_size, or try --amp or '
        'with_cp=True in the backbone',
    ),
)
# A linear layer, a convolution, a batch norm.
_CHANNELS = (
    r'mat1 and mat2 shapes cannot be multiplied \(\d+x(?P<given>\d+) and (?P<wanted>\d+)x\d+\)',
    r'expected input\[.*\] to have (?P<wanted>\d+) channels, but got (?P<given>\d+) channels',
    r'same reduction dim, but got \[\d+, (?P<given>\d+)\] X \[(?P<wanted>\d+), \d+\]',
    r'running_mean should contain (?P<given>\d+) elements not (?P<wanted>\d+)',
)


def _remedy(error: BaseException) -> str | None:
    if not isinstance(error, RuntimeError):
        return unfit_for_pillow(error)
    text = str(error)
    for pattern, message in _REMEDIES:
        found = re.search(pattern, text, re.MULTILINE)
        if found:
            return message.format(found[1])
    owners = [frame.f_locals.get('self') for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [owner for owner in owners if isinstance(owner, nn.Module)]
    indices = re.search(r'did not receive grad for rank \d+: ([\d ]+)', text)
    if indices and modules:
        return _unused(modules, [int(index) for index in indices[1].split()])
    found = next(filter(None, (re.search(pattern, text) for pattern in _CHANNELS)), None)
    if found is None or not modules:
        return None
    root = next((m for m in modules if hasattr(m, 'backbone')), modules[0])
    name = next((name for name, m in root.named_modules() if m is modules[-1]), '')
    return (
        f'model.{name} ({type(modules[-1]).__name__}) wants {found["wanted"]} channels and gets '
        f'{found["given"]}: set in_channels of the neck or head to what the backbone gives'
    )


def _unused(modules: list[nn.Module], indices: list[int]) -> str:
    """Name the parameters without gradient, for which distributed training waits in vain."""
    wrapped = next((m for m in modules if isinstance(m, DistributedDataParallel)), modules[0])
    names = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    unused = [names[i].removeprefix('module.') for i in indices if i < len(names)]
    parts = [re.split(r'\.(?=\w+$)', name)[0] for name in unused]
    return (
        f'{len(unused)} parameters get no gradient, those of {listed(dict.fromkeys(parts))}, '
        "and distributed training waits for all: choose the backbone's out_indices, and what neck "
        'and heads take of them, so that all parts are used, or set find_unused_parameters=True'
    )
