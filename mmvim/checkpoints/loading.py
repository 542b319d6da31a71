"""Loading of weights into a model, with a report of renamed, resized and missing ones."""

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmengine.runner import runner as mmengine_runner
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from mmvim.errors import CheckpointError

from .files import CONTAINERS, find_weights, read_checkpoint, unreadable
from .keys import Fitting, fitting

_MISFIT = 'The model and loaded state dict do not match exactly'


@dataclass(frozen=True)
class LoadReport:
    """Report on loading the weights of a file.

    Attributes:
        renamed: Names in the file to names in the model, where they differ.
        resized: Names, with the shapes in the file and in the model.
        missing: Parameters of the model that the file lacks.
        unexpected: Names of the file that the model has no place for.
        dropped: Those of ``unexpected`` that the backbone knows, such as an official model's head.
        left_out: Names, with the shapes in the file and in the model, of what was not loaded for
            its shape.
        loaded: Number of loaded parameters and buffers.
        dataset_meta: What the file says of its training data, such as the names of the classes.
    """

    renamed: dict[str, str] = field(default_factory=dict)
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    left_out: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    loaded: int = 0
    dataset_meta: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f'{self.loaded} tensors loaded']
        for title, names in (
            ('renamed', [f'{a} -> {b}' for a, b in self.renamed.items()]),
            ('resized', [f'{n}: {a} -> {b}' for n, (a, b) in self.resized.items()]),
            ('missing', self.missing),
            ('unexpected', self.unexpected),
            ('left out', [f'{n}: {a} -> {b}' for n, (a, b) in self.left_out.items()]),
        ):
            lines.append(f'{title}: {len(names)}')
            lines += [f'  {name}' for name in names]
        return '\n'.join(lines)


def load_weights(
    model: nn.Module,
    file: str | Path | Mapping[str, Any],
    *,
    ema: bool | None = None,
    other_head: bool = False,
) -> LoadReport:
    """Load the weights of a file into a model: official, mmengine's, or plain ones.

    Args:
        model: A model of mmvim, or of a task library with a backbone of mmvim.
        file: Path or URL, or the result of :func:`read_checkpoint`.
        ema: Which weights to take; see :func:`find_weights`.
        other_head: Whether to leave out, outside of the backbone, what has another shape in the
            model, such as the head of another number of classes. Defaults to False.

    Raises:
        CheckpointError: The file cannot be read, or belongs to another model.
    """
    outside = re.compile(r'(?!backbone\.)') if other_head else None
    report, given = _load(model, file, ema, outside, Fitting())
    names = [name for name, _ in model.named_parameters()]
    if set(names) <= {*report.missing, *report.left_out}:
        raise CheckpointError(
            f'{_called(file)} is of another model: none of its weights fits; it has '
            f'{_some(given)}, the model {_some(names)}'
        )
    return report


def compare_weights(
    model: nn.Module, file: str | Path | Mapping[str, Any], *, ema: bool | None = None
) -> LoadReport:
    """Load what fits of a file into a model, and say all that does not.

    Arguments are those of :func:`load_weights`; the model may be on the meta device.

    Raises:
        CheckpointError: The file cannot be read, or contradicts itself.
    """
    return _load(model, file, ema, re.compile(''), Fitting(refuses=False))[0]


def _called(file: str | Path | Mapping[str, Any]) -> str:
    return 'the checkpoint' if isinstance(file, Mapping) else f'checkpoint {str(file)!r}'


def _load(
    model: nn.Module,
    file: str | Path | Mapping[str, Any],
    ema: bool | None,
    spared: re.Pattern | None,
    load: Fitting,
) -> tuple[LoadReport, dict[str, Tensor]]:
    """Load, and return the report and the weights in the file.

    ``spared`` matches names that are left out if their shapes differ; others are errors.
    """
    content = file if isinstance(file, Mapping) else read_checkpoint(file)
    try:
        given = find_weights(content, ema=ema)
    except CheckpointError as error:
        raise CheckpointError(f'{_called(file)} {error}') from None
    # The model's sizes, its hooks and the file's metadata decide how the weights are loaded.
    metadata = next(
        (getattr(content.get(k), '_metadata', None) for k in CONTAINERS if k in content), None
    )
    wrapped = OrderedDict(given)
    if metadata is not None:
        wrapped._metadata = metadata
    token = fitting.set(load)
    try:
        with _watched_loading(model, spared) as (fitted, left_out):
            outcome = model.load_state_dict(wrapped, strict=False)
    except (RuntimeError, ValueError) as error:
        reason = ' '.join(str(error).split())
        raise CheckpointError(f'{_called(file)} does not fit the model: {reason[:500]}') from error
    finally:
        fitting.reset(token)
    dropped = {id(value) for value in load.dropped}
    report = _report(given, fitted, outcome.missing_keys, left_out)
    meta = (content.get('meta') or {}).get('dataset_meta') or {}
    report = replace(
        report,
        dropped=tuple(name for name in report.unexpected if id(given[name]) in dropped),
        dataset_meta=dict(meta),
    )
    return report, given


@contextmanager
def _watched_loading(
    model: nn.Module, spared: re.Pattern | None
) -> Iterator[tuple[dict[str, Tensor], dict[str, tuple[Tensor, tuple[int, ...]]]]]:
    """Collect what each module receives, after all renaming and resizing, and what is left out."""
    fitted, left_out = {}, {}

    def watch(module: nn.Module, state_dict: dict, prefix: str, *_: Any) -> None:
        for name, own in (*module._parameters.items(), *module._buffers.items()):
            key, saved = prefix + name, name not in module._non_persistent_buffers_set
            if own is None or not saved or key not in state_dict:
                continue
            value, size = state_dict[key], tuple(own.shape)
            if spared is not None and spared.match(key) and tuple(value.shape) != size:
                left_out[key] = value, size
                del state_dict[key]
            else:
                fitted[key] = value

    # Called last, after what modules and their hooks do with a checkpoint.
    handles = [module.register_load_state_dict_pre_hook(watch) for module in model.modules()]
    try:
        yield fitted, left_out
    finally:
        for handle in handles:
            handle.remove()


def _report(
    given: dict[str, Tensor], fitted: dict[str, Tensor], missing: list, left_out: dict
) -> LoadReport:
    names = {id(value): key for key, value in given.items()}

    def source_of(key: str, value: Tensor) -> str | None:
        for tensor in (value, value._base):  # itself, or seen in another shape
            if id(tensor) in names:
                return names[id(tensor)]
        # Made from another tensor: the one of the same name, or of a name with the same end.
        return max((k for k in given if key == k or key.endswith(f'.{k}')), key=len, default=None)

    renamed, resized = {}, {}
    used = {source_of(key, value) for key, (value, _) in left_out.items()}
    for key, value in sorted(fitted.items()):
        source = source_of(key, value)
        if source is None:
            continue
        used.add(source)
        if source != key:
            renamed[source] = key
        if given[source].shape != value.shape:
            resized[key] = (tuple(given[source].shape), tuple(value.shape))
    return LoadReport(
        renamed=renamed,
        resized=resized,
        missing=tuple(sorted(set(missing) - fitted.keys() - left_out.keys())),
        unexpected=tuple(sorted(given.keys() - used)),
        left_out={key: (tuple(value.shape), own) for key, (value, own) in left_out.items()},
        loaded=len(fitted),
    )


@contextmanager
def checked_loading(runner: Any, complete: bool) -> Iterator[None]:
    """Refuse checkpoints of another model while ``runner`` runs.

    mmengine loads with ``strict=False`` and only logs what does not fit. Here no load may leave the
    model without a single weight of the checkpoint, and a load that must be complete may leave no
    parameter out. Buffers, and keys that the model does not know, are still only logged.

    Args:
        runner: A ``Runner`` or ``FlexibleRunner``.
        complete: Whether ``load_from`` must provide every parameter of the model (testing,
            resuming) or may provide some (fine-tuning). Checkpoints of ``init_cfg`` may always
            provide only some.
    """
    lenient, reader = mmengine_checkpoint.load_state_dict, vars(CheckpointLoader)['load_checkpoint']
    load_checkpoint, load_or_resume = mmengine_runner._load_checkpoint, runner.load_or_resume
    read = CheckpointLoader.load_checkpoint
    must_be_complete, name = False, ''

    def named(filename: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal name
        name = filename
        try:
            return read(filename, *args, **kwargs)
        except Exception as error:
            raise CheckpointError(unreadable(filename, error)) from error

    def checked(module: nn.Module, state_dict: dict, strict: bool = False, logger=None) -> None:
        try:
            lenient(module, state_dict, strict=True, logger=logger)
        except RuntimeError as error:
            if strict or not str(error).startswith(_MISFIT):
                raise
            wrong = _misfit(module, str(error), must_be_complete, state_dict)
            if wrong:
                raise CheckpointError(
                    f'checkpoint {name!r} is of another model: {wrong}'
                ) from error
            print_log(str(error), logger='current', level=30)

    def flagged() -> None:
        nonlocal must_be_complete
        must_be_complete = complete
        try:
            load_or_resume()
        except (LookupError, RuntimeError, ValueError) as error:
            if not runner._resume:
                raise
            reason = f'{type(error).__name__}: {error}'
            if isinstance(error, KeyError) and error.args[0] in ('meta', 'message_hub'):
                reason = (
                    f'it has no {error.args[0]!r}, so it holds weights, not the state of a '
                    'training run; start from its weights with --cfg-options load_from=PATH instead'
                )
            raise CheckpointError(f'cannot resume from checkpoint {name!r}: {reason}') from error
        finally:
            must_be_complete = False

    def with_state_dict(*args: Any, **kwargs: Any) -> dict:
        return _as_mmengine_writes(load_checkpoint(*args, **kwargs))

    mmengine_checkpoint.load_state_dict = checked
    mmengine_runner._load_checkpoint = with_state_dict
    CheckpointLoader.load_checkpoint = staticmethod(named)
    runner.load_or_resume = flagged
    try:
        yield
    finally:
        mmengine_checkpoint.load_state_dict = lenient
        mmengine_runner._load_checkpoint = load_checkpoint
        CheckpointLoader.load_checkpoint = reader
        del runner.load_or_resume


def _as_mmengine_writes(checkpoint: Any) -> Any:
    """Put the weights of official files under ``state_dict``, where mmengine's hooks look for them.

    Official files hold them under ``model``, or consist of nothing but the weights.
    """
    if not isinstance(checkpoint, dict) or 'state_dict' in checkpoint:
        return checkpoint
    if isinstance(checkpoint.get('model'), dict):
        rest = {key: value for key, value in checkpoint.items() if key != 'model'}
        return {'state_dict': checkpoint['model'], **rest}
    return {'state_dict': checkpoint}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers for distribution and test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def _misfit(module: nn.Module, report: str, complete: bool, state_dict: dict) -> str | None:
    """Say in what a checkpoint and a model differ that may not; None if they may."""
    names = {name for name, _ in unwrapped(module).named_parameters()}
    missing = names & set(_listed(r'missing keys in source state_dict: (.*)', report))
    sizes = re.findall(r'size mismatch for (\S+): .*?shape (.*?) from.*?is (.*?)\.(?:\s|$)', report)
    mismatched = names & {name for name, _, _ in sizes}
    nothing_fits = names and names == missing | mismatched
    if mismatched and (complete or nothing_fits):
        return _sizes(sizes)
    if nothing_fits:
        return f'none of its weights fits; it has {_some(state_dict)}, the model {_some(names)}'
    if missing and complete:
        return f'it lacks {len(missing)} of {len(names)} parameters: {_some(missing)}'
    return None


def _listed(pattern: str, report: str) -> list[str]:
    found = re.search(pattern, report)
    return found[1].split(', ') if found else []


def _sizes(sizes: list[tuple[str, str, str]]) -> str:
    name, theirs, ours = sizes[0]
    theirs, ours = (text.replace('torch.Size(', '').rstrip(')') for text in (theirs, ours))
    more = f' (and {len(sizes) - 1} more)' if len(sizes) > 1 else ''
    return f'{name} has shape {theirs} in it and {ours} in the model{more}'


def _some(names: Any) -> str:
    names = sorted(names)
    return ', '.join(names[:3]) + (', …' if len(names) > 3 else '')
