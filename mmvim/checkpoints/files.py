"""Checkpoint files: reading, writing, and the weights inside, whatever program wrote them."""

import json
import os
import re
import uuid
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmvim.errors import CheckpointError

from .keys import unwrap_state_dict

#: Where official files and mmengine keep weights.
CONTAINERS = ('state_dict', 'model', 'module', 'model_state')
EMA_CONTAINERS = ('model_ema', 'state_dict_ema')
#: Trained weights: mmengine's EMAHook swaps them with the averages when it saves.
EXCHANGED = 'ema_state_dict'


def read_checkpoint(file: str | Path) -> dict[str, Any]:
    """Read a PyTorch or safetensors file, or a URL, without running any code it contains.

    Raises:
        CheckpointError: The file does not exist, cannot be read, or needs more than tensors and
            plain data; the message says what.
    """
    name = str(file)
    is_url = re.match(r'[a-z0-9]+://', name)
    if not is_url and not Path(name).is_file():
        is_directory = os.path.isdir(name)
        raise CheckpointError(
            f'checkpoint {name!r} {"is a directory" if is_directory else "does not exist"}'
        )
    from mmengine.runner.checkpoint import CheckpointLoader

    try:
        content = CheckpointLoader.load_checkpoint(name, map_location='cpu', logger='silent')
    except Exception as error:
        raise CheckpointError(unreadable(name, error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f'checkpoint {name!r} holds a {type(content).__name__}, not a dict of weights'
        )
    return content


def unreadable(name: str, error: Exception) -> str:
    """Say in one line that a checkpoint cannot be read, and why."""
    text = (str(error).strip().splitlines() or [''])[0]
    if text.startswith('checkpoint '):
        return text
    if os.path.isdir(name):
        text = 'it is a directory'
    elif not isinstance(error, OSError | ImportError):
        text = f'it is damaged or not a PyTorch checkpoint ({type(error).__name__}: {text[:200]})'
    return f'checkpoint {name!r} cannot be read: {text}'


def find_weights(content: Mapping[str, Any], *, ema: bool | None = None) -> dict[str, Tensor]:
    """The weights in a checkpoint, without containers and key prefixes.

    Args:
        content: The result of :func:`read_checkpoint`.
        ema: True takes averaged weights (``model_ema`` of official files; of mmengine's with an
            ``EMAHook`` the averages are ``state_dict``), False the trained ones. Defaults to None:
            the first ones found, averaged or not, as mmengine does.

    Raises:
        CheckpointError: There are no weights, or none of the requested kind.
    """
    averaged = next((content[k] for k in EMA_CONTAINERS if _is_container(content.get(k))), None)
    plain = next((content[k] for k in CONTAINERS if _is_container(content.get(k))), None)
    if _is_container(content.get(EXCHANGED)) and plain is not None:
        averaged, plain = plain, content[EXCHANGED] if ema is False else plain
    if ema and averaged is None:
        raise CheckpointError(
            f'has no averaged weights ({", ".join((*EMA_CONTAINERS, EXCHANGED))}); it has '
            f'{", ".join(sorted(map(str, content))[:8])}'
        )
    found = averaged if ema else (content if plain is None else plain)
    while _is_container(found) and not _tensors(found):
        inner = [found[k] for k in CONTAINERS if _is_container(found.get(k))]
        if not inner:
            break
        found = inner[0]
    weights = _tensors(found)
    if not weights:
        raise CheckpointError('has no weights in it')
    if any(name.startswith('module.') for name in weights):
        # mmengine stores the number of averaging steps among the weights.
        weights.pop('steps', None)
    unwrap_state_dict(weights)
    return weights


def describe(content: Mapping[str, Any]) -> str:
    """Say in one line how the weights of a file are wrapped, and what else is in it.

    Args:
        content: The result of :func:`read_checkpoint`.
    """
    plain = next((k for k in CONTAINERS if _is_container(content.get(k))), None)
    averages = [k for k in (*EMA_CONTAINERS, EXCHANGED) if _is_container(content.get(k))]
    weights = _tensors(content if plain is None else content[plain])
    parts = [
        f'{len(weights)} tensors' + (f' under {plain!r}' if plain else ', without a container')
    ]
    prefix, bare = '', dict(weights)
    unwrap_state_dict(bare)
    if weights and bare.keys() != weights.keys():
        prefix = next(iter(weights)).removesuffix(next(iter(bare)))
        parts.append(f'each name begins with {prefix!r}')
    others = [str(k) for k in content if k not in (plain, *averages) and str(k) not in weights]
    for key in averages:
        kind = 'the trained weights' if key == EXCHANGED else 'averaged weights'
        parts.append(f'{kind} under {key!r}')
    if others:
        parts.append(f'besides {", ".join(sorted(others)[:8])}')
    return '; '.join(parts)


def _is_container(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0


def _tensors(value: Any) -> dict[str, Tensor]:
    if not isinstance(value, Mapping):
        return {}
    return {str(k): v for k, v in value.items() if isinstance(v, Tensor)}


def write_checkpoint(
    state_dict: Mapping[str, Tensor], out: str | Path, meta: Mapping[str, Any] | None = None
) -> None:
    """Write weights as a ``.safetensors`` file, or as ``.pth`` in mmengine's layout.

    The file gets its name only once it is complete.

    Args:
        state_dict: The weights.
        out: File to write.
        meta: Strings and plain data stored with them, such as ``dataset_meta``; as JSON in a
            safetensors file, which holds only strings.

    Raises:
        ValueError: The suffix is neither.
    """
    out = Path(out)
    weights = {k: v.detach().cpu().contiguous().clone() for k, v in state_dict.items()}
    temporary = out.with_name(f'.{uuid.uuid4().hex[:8]}{out.suffix}')
    try:
        if out.suffix == '.safetensors':
            from safetensors.torch import save_file

            save_file(weights, str(temporary), {'meta': json.dumps(dict(meta or {}))})
        elif out.suffix in ('.pth', '.pt'):
            content = OrderedDict(weights)
            metadata = getattr(state_dict, '_metadata', None)
            if metadata is not None:
                content._metadata = metadata
            # Given a path, torch would write its name into the file, and the hash would vary.
            with open(temporary, 'wb') as file:
                torch.save({'meta': dict(meta or {}), 'state_dict': content}, file)
        else:
            raise ValueError(f'{str(out)!r} must end with .pth, .pt or .safetensors')
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
