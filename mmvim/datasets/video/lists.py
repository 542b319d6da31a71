"""Lists of labelled videos, as various tools write them."""

import csv
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mmengine.logging import print_log

from mmvim.errors import did_you_mean

VIDEO_SUFFIXES = ('.mp4', '.webm', '.mkv', '.avi', '.mov')
_SEPARATOR = r'(?:\s*[\t;,]\s*|\s+)'
_COLUMNS = {
    'path': 'path file filename file_name filepath file_path name video video_path video_name clip',
    'label': 'label label_id label_idx label_name class class_id class_idx class_name category '
    'target',
    'frames': 'frames num_frames n_frames nframes total_frames frame_count',
}
_SPLIT = ('split', 'subset', 'set', 'fold', 'usage', 'partition')


class Row(NamedTuple):
    """A video of a list.

    Attributes:
        line: Number of its line, from 1.
        path: Path as it is written.
        label: Number or name of its class.
    """

    line: int
    path: str
    label: str


def read_list(file: str, folder: str, classes: Sequence[str] | None) -> list[tuple[str, int]]:
    """Read a list of videos and their classes.

    Each line is ``path label`` or ``path frames label``, separated by spaces, tabs, commas or
    semicolons, each part perhaps in double quotes. Spaces and commas may also be in paths. The
    label is the number of a class, or the name of one. The number of frames is not used, as videos
    are counted when they are read. A first line may name the columns, which then may be in any
    order.

    Args:
        file: The list.
        folder: Where relative paths start.
        classes: Names of the classes, if they are known.

    Returns:
        Path and number of the class of each video.

    Raises:
        ValueError: A line can be read in no way, or in several; the message names it.
    """
    lines = read_text(file).split('\n')
    numbered = [(i, line.strip()) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f'{file} is empty')
    header = _header(file, *numbered[0])
    if header is None:
        rows = [_row(file, number, line, folder, classes) for number, line in numbered]
    else:
        rows = _columns(file, numbered[1:], *header)
    numbers = _class_numbers(file, rows, classes)
    return [
        (os.path.join(folder, row.path), number) for row, number in zip(rows, numbers, strict=True)
    ]


def read_classes(file: str) -> list[str]:
    """Read the names of classes, from JSON ``{name: number}`` or one a line.

    Raises:
        ValueError: The numbers are not 0 to the number of names, there is none, or the file is not
            in UTF-8.
    """
    text = read_text(file)
    if not file.endswith('.json'):
        names = [line.strip() for line in text.split('\n') if line.strip()]
        if not names:
            raise ValueError(f'{file} is empty')
        return names
    numbers = {name: int(number) for name, number in json.loads(text).items()}
    names = sorted(numbers, key=numbers.get)
    if [numbers[name] for name in names] != list(range(len(names))):
        raise ValueError(f'{file}: the classes are not numbered 0 .. {len(names) - 1}')
    return names


def read_text(file: str) -> str:
    """The text of a file in UTF-8, perhaps with a mark of it.

    Raises:
        ValueError: It is in another encoding.
    """
    try:
        return Path(file).read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{file} is not text in UTF-8: {error}') from error


def _fields(line: str, separator: str) -> list[str]:
    return [field.strip() for field in next(csv.reader([line], delimiter=separator))]


def _header(file: str, number: int, line: str) -> tuple[list[str], str] | None:
    """Names of the columns and their separator, if the line is one of names."""
    for separator in '\t;, ':
        names = [name.lower() for name in _fields(line, separator)]
        kinds = {kind: [n for n in names if n in words.split()] for kind, words in _COLUMNS.items()}
        if not kinds['path'] or not kinds['label']:
            continue
        for kind, found in kinds.items():
            if len(found) > 1:
                raise ValueError(
                    f'{file}:{number} names several columns for the {kind}: {", ".join(found)}'
                )
        return names, separator
    return None


def _columns(
    file: str, lines: list[tuple[int, str]], names: list[str], separator: str
) -> list[Row]:
    """Read the lines below a line of names."""
    places = {
        kind: next((i for i, name in enumerate(names) if name in words.split()), None)
        for kind, words in _COLUMNS.items()
    }
    table = []
    for number, line in lines:
        fields = _fields(line, separator)
        if len(fields) != len(names) or not fields[places['path']]:
            raise ValueError(
                f'{file}:{number} does not have the columns {", ".join(names)} of the first line: '
                f'{line!r} (a {separator!r} in a path needs double quotes around the path)'
            )
        table.append(fields)
    for i in set(range(len(names))) - set(places.values()):
        values = {fields[i] for fields in table}
        if names[i] in _SPLIT and len(values) > 1:
            raise ValueError(
                f'{file}: the column {names[i]!r} has {", ".join(sorted(values)[:5])}: give each '
                'part of the data a list of its own'
            )
        if names[i]:
            print_log(
                f'VideoDataset: the column {names[i]!r} of {file!r} is not used',
                logger='current',
                level=logging.WARNING,
            )
    return [
        Row(number, fields[places['path']], fields[places['label']])
        for (number, _), fields in zip(lines, table, strict=True)
    ]


def _row(file: str, number: int, line: str, folder: str, classes: Sequence[str] | None) -> Row:
    """Read a line without names of columns."""
    # Names may end with a number or contain separators.
    names = [name for name in classes or () if not name.isdecimal()]
    labels = [name for name in names if re.search(f'{_SEPARATOR}"?{re.escape(name)}"?$', line)]
    label = re.escape(max(labels, key=len)) if labels else r'\d+'
    found = re.fullmatch(f'(?P<path>.+?){_SEPARATOR}"?(?P<label>{label})"?', line)
    if found is None:
        last = re.split(_SEPARATOR, line)[-1].strip('"')
        hint = '' if last == line else f', and {last!r} is no number'
        if hint and names:
            hint += f' and none of the classes{did_you_mean(last, names)}'
        elif hint:
            hint += ' (where labels are names, label_file or metainfo.classes must list them)'
        raise ValueError(
            f'{file}:{number} is not "path label", "path,label" or "path frames label"{hint}: '
            f'{line!r}'
        )
    path = found['path']
    counted = re.fullmatch(f'(?P<path>.+?)(?P<separator>{_SEPARATOR})"?\\d+"?', path)
    if counted is not None and _has_count(file, number, path, counted, folder):
        path = counted['path']
    return Row(number, _unquoted(path), found['label'])


def _has_count(file: str, number: int, path: str, counted: re.Match, folder: str) -> bool:
    """Whether a path that ends with a number has the number of frames there."""
    shorter = counted['path']
    if shorter.endswith('"') or shorter.lower().endswith(VIDEO_SUFFIXES):
        return True
    places = [os.path.join(folder, _unquoted(text)) for text in (path, shorter)]
    whole, short = map(os.path.exists, places)
    if whole and short:
        raise ValueError(f'{file}:{number} may mean {places[0]!r} and {places[1]!r}: both exist')
    if not whole and not short and not counted['separator'].strip(' '):
        raise ValueError(
            f'{file}:{number} is "path label" or "path frames label": neither {places[0]!r} nor '
            f'{places[1]!r} exists'
        )
    return not whole


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] == '"':
        return text[1:-1].replace('""', '"')
    return text


def _class_numbers(file: str, rows: list[Row], classes: Sequence[str] | None) -> list[int]:
    """Numbers of classes, from numbers or names."""
    places = {name: i for i, name in enumerate(classes or ())}
    unknown = next((row for row in rows if row.label not in places), None)
    odd = next((row for row in rows if not row.label.isdecimal()), None)
    named = [places[row.label] for row in rows] if rows and unknown is None else None
    if odd is None:
        numbers = [int(row.label) for row in rows]
        # Names such as '1' and '2' may be meant by labels that are valid numbers, too.
        if named is None or named == numbers:
            return numbers
        if all(number < len(places) for number in numbers):
            row = next(
                row for row, place in zip(rows, named, strict=True) if str(place) != row.label
            )
            raise ValueError(
                f'{file}:{row.line}: the label {row.label} is the number of class '
                f'{classes[int(row.label)]!r} and the name of class {named[rows.index(row)]}: '
                'number the labels from 0, without class names that are numbers'
            )
        return named
    if named is None and places:
        hint = did_you_mean(unknown.label, places)
        raise ValueError(
            f'{file}:{unknown.line}: the label {unknown.label!r} is none of the classes{hint}'
        )
    if named is None:
        raise ValueError(
            f'{file}:{odd.line}: the label {odd.label!r} is no number; label_file or '
            'metainfo.classes must list the classes where labels are names'
        )
    return named
