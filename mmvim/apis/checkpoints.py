"""Weights of files, whoever wrote them, for a model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmvim.compat import mmengine_checkpoints
from mmvim.engine.errors import CheckpointError

#: Where official files and mmengine keep weights, the averaged ones last.
CONTAINERS = ('state_dict', 'model', 'module', 'model_state', 'state_dict_ema', 'model_ema')
EMA_CONTAINERS = ('model_ema', 'state_dict_ema', 'ema_state_dict')
WRAPPERS = ('module.', '_orig_mod.')


@dataclass(frozen=True)
class LoadReport:
    """What happened to the weights of a file.

    Attributes:
        renamed: The file's name of each parameter that had another one, to the model's.
        resized: Names, with the shape in the file and in the model.
        missing: Parameters of the model that the file does not have.
        unexpected: Names of the file that the model has no place for.
        loaded: How many parameters and buffers were loaded.
    """

    renamed: dict[str, str] = field(default_factory=dict)
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    loaded: int = 0

    def __str__(self) -> str:
        lines = [f'{self.loaded} tensors loaded']
        for title, names in (
            ('renamed', [f'{a} -> {b}' for a, b in self.renamed.items()]),
            ('resized', [f'{n}: {a} -> {b}' for n, (a, b) in self.resized.items()]),
            ('missing', self.missing),
            ('unexpected', self.unexpected),
        ):
            lines.append(f'{title}: {len(names)}')
            lines += [f'  {name}' for name in names]
        return '\n'.join(lines)


def read_checkpoint(file: str | Path) -> dict[str, Any]:
    """Read a PyTorch or safetensors file, or a URL, without running code that it may contain.

    Raises:
        CheckpointError: It does not exist, cannot be read, or needs more than tensors and plain
            data; the message says what.
    """
    name = str(file)
    is_url = re.match(r'[a-z0-9]+://', name)
    if not is_url and not Path(name).is_file():
        raise CheckpointError(f'checkpoint {name!r} does not exist')
    if name.endswith('.safetensors') and not is_url:
        return {'state_dict': _read_safetensors(name)}
    from mmengine.runner.checkpoint import CheckpointLoader

    try:
        content = CheckpointLoader.load_checkpoint(name, map_location='cpu', logger='silent')
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        text = lines[0]
        raise CheckpointError(
            text
            if text.startswith('checkpoint ')
            else f'checkpoint {name!r} cannot be read: {text}'
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f'checkpoint {name!r} holds a {type(content).__name__}, not a dict of weights'
        )
    return content


def _read_safetensors(name: str) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(
            f'checkpoint {name!r}: safetensors is not installed: pip install safetensors'
        ) from error
    try:
        return load_file(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f'checkpoint {name!r} cannot be read: {error}') from error


def find_weights(content: Mapping[str, Any], *, ema: bool = False) -> dict[str, Tensor]:
    """The weights in a checkpoint, without what wraps them and their names.

    Args:
        content: What :func:`read_checkpoint` gives.
        ema: Take the averaged weights: ``model_ema`` and the like of official files; of mmengine's,
            which exchanges them when it saves, those that its ``EMAHook`` keeps beside the others
            are the trained ones, and ``state_dict`` the averages, so nothing changes.

    Raises:
        CheckpointError: There are no weights, or no averaged ones.
    """
    if ema:
        found = next((content[k] for k in EMA_CONTAINERS if _is_container(content.get(k))), None)
        if found is None and _is_container(content.get('ema_state_dict')):
            found = content['state_dict']
        if found is None:
            raise CheckpointError(
                f'has no averaged weights ({", ".join(EMA_CONTAINERS)}); it has '
                f'{", ".join(sorted(map(str, content))[:8])}'
            )
    else:
        found = next((content[k] for k in CONTAINERS if _is_container(content.get(k))), content)
    while _is_container(found) and not _tensors(found):
        inner = [found[k] for k in CONTAINERS if _is_container(found.get(k))]
        if not inner:
            break
        found = inner[0]
    weights = _tensors(found)
    if not weights:
        raise CheckpointError('has no weights in it')
    for wrapper in WRAPPERS:
        while all(name.startswith(wrapper) for name in weights):
            weights = {name[len(wrapper) :]: value for name, value in weights.items()}
    return weights


def _is_container(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0


def _tensors(value: Any) -> dict[str, Tensor]:
    if not isinstance(value, Mapping):
        return {}
    return {str(k): v for k, v in value.items() if isinstance(v, Tensor)}


def load_weights(
    model: nn.Module, file: str | Path | Mapping[str, Any], *, ema: bool = False
) -> LoadReport:
    """Load the weights of a file into a model: official, mmengine's, or plain ones.

    Args:
        model: A model of mmvim or of a task library with a backbone of mmvim.
        file: Path or URL, or what :func:`read_checkpoint` gave.
        ema: Take the averaged weights of the file.

    Raises:
        CheckpointError: The file cannot be read, or is of another model.
    """
    name = f'checkpoint {str(file)!r}' if isinstance(file, str | Path) else 'the checkpoint'
    content = file if isinstance(file, Mapping) else read_checkpoint(file)
    try:
        given = find_weights(content, ema=ema)
    except CheckpointError as error:
        raise CheckpointError(f'{name} {error}') from None
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # The pre-hooks of the model rename and resize in place.
    fitted = dict(given)
    try:
        outcome = model.load_state_dict(fitted, strict=False)
    except (RuntimeError, ValueError) as error:
        reason = ' '.join(str(error).split())
        raise CheckpointError(f'{name} does not fit the model: {reason[:500]}') from error
    loaded = own.keys() & fitted.keys()
    parameters = dict(model.named_parameters())
    if not loaded & parameters.keys():
        raise CheckpointError(
            f'{name} is of another model: none of its weights fits; it has '
            f'{", ".join(sorted(given)[:3])}, the model {", ".join(sorted(parameters)[:3])}'
        )
    return _report(given, fitted, own, outcome, loaded)


def _report(given: dict, fitted: dict, own: dict, outcome: Any, loaded: set) -> LoadReport:
    by_value = {id(value): key for key, value in given.items()}
    renamed, resized = {}, {}
    for key in sorted(loaded):
        source = by_value.get(id(fitted[key]))
        if source is not None and source != key:
            renamed[source] = key
        elif source is None:
            # Replaced by a resized one: under the same name, or the same end of it.
            source = key if key in given else next((k for k in given if key.endswith(k)), None)
            if source is not None and given[source].shape != fitted[key].shape:
                resized[key] = (tuple(given[source].shape), tuple(fitted[key].shape))
                if source != key:
                    renamed[source] = key
    used = set(renamed) | (loaded & given.keys())
    return LoadReport(
        renamed=renamed,
        resized=resized,
        missing=tuple(sorted(k for k in outcome.missing_keys if k in own)),
        unexpected=tuple(sorted(set(given) - used)),
        loaded=len(loaded),
    )


def save_safetensors(state_dict: Mapping[str, Tensor], out: str | Path) -> None:
    """Write weights as safetensors."""
    from safetensors.torch import save_file

    save_file({k: v.detach().contiguous().clone() for k, v in state_dict.items()}, str(out))


def load_untrusted(file: str | Path) -> Any:
    """``torch.load`` restricted to tensors and plain data; see :mod:`mmvim.compat`."""
    return mmengine_checkpoints.load(file, map_location=torch.device('cpu'))
