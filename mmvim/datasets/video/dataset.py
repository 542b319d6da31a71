"""Labelled video files, listed as in Kinetics, Something-Something V2 or a plain list."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from mmengine.dataset import BaseDataset
from mmengine.logging import print_log

from mmvim._checks import check_choice, check_positive
from mmvim.registry import DATASETS

from .lists import VIDEO_SUFFIXES, read_classes, read_list, read_text


@DATASETS.register_module()
class VideoDataset(BaseDataset):
    """Video classification from files and an annotation list.

    Layouts:

    - 'list': each line of ``ann_file`` is ``path label`` or ``path frames label``, separated by
      spaces, commas, tabs or semicolons, perhaps quoted; a first line may name the columns. Paths
      are relative to ``data_prefix``; a label is the number or the name of a class; the number of
      frames is not used. VideoMAE, VideoMamba, mmaction2 and pandas write such lists.
    - 'kinetics': ``ann_file`` is the official CSV with the columns label, youtube_id, time_start
      and time_end. Files are ``<label>/<id>_<start>_<end>.mp4`` (spaces of the label may be
      underscores) or the same without the folder, times with six digits. Labels are numbered
      alphabetically, as usual.
    - 'ssv2': ``ann_file`` is the official JSON list with id and template (or label), ``label_file``
      the official JSON that numbers the templates. Files are ``<id>.webm``.

    In place of each file there may be a folder of the name without suffix, with the video's frames
    as pictures (see :class:`mmvim.LoadVideo`).

    Videos of an official list that are not on disk are skipped with a warning: many Kinetics videos
    are no longer available. In a plain list they are an error on loading.

    Args:
        ann_file (str): Relative to ``data_root``.
        data_root (str): Defaults to ''.
        data_prefix (str): Folder of the videos, relative to ``data_root``. Defaults to ''.
        layout (str): 'auto' takes 'ssv2' for ``.json``, 'kinetics' for a ``.csv`` whose first line
            names the column youtube_id, and 'list' otherwise. Defaults to 'auto'.
        label_file (str, optional): Names of the classes, relative to ``data_root``: JSON
            ``{name: number}`` or one name per line. 'ssv2' needs it; without it, 'kinetics' takes
            the labels of ``ann_file``.
        num_classes (int, optional): Checked against the labels. Set it where the classes come only
            from ``ann_file``: a list that lacks a class numbers the others differently.
        **kwargs: Arguments of :class:`mmengine.dataset.BaseDataset`: pipeline, test_mode, indices,
            lazy_init, max_refetch, serialize_data.

    Raises:
        ValueError: For an unknown layout, an unreadable line, an unknown label, or no video.
    """

    def __init__(
        self,
        ann_file: str,
        data_root: str = '',
        data_prefix: str = '',
        layout: str = 'auto',
        label_file: str | None = None,
        num_classes: int | None = None,
        **kwargs,
    ) -> None:
        check_choice('layout', layout, ('auto', 'list', 'kinetics', 'ssv2'))
        for name, value in (('ann_file', ann_file), ('data_prefix', data_prefix)):
            if not isinstance(value, str):
                raise ValueError(f'{name}={value!r} must be str')
        if label_file is not None and not isinstance(label_file, str):
            raise ValueError(f'label_file={label_file!r} must be str or None')
        if num_classes is not None:
            check_positive(num_classes=num_classes)
        self.layout = layout
        self.label_file = label_file
        self.num_classes = num_classes
        super().__init__(
            ann_file=ann_file, data_root=data_root, data_prefix=dict(img_path=data_prefix), **kwargs
        )

    @property
    def CLASSES(self) -> tuple[str, ...] | None:
        """Names of the classes, if they are known."""
        return self.metainfo.get('classes')

    def load_data_list(self) -> list[dict]:
        """Read the annotations: 'img_path' and 'gt_label' of each video."""
        layout = self._find_layout()
        names = self._label_names()
        if layout == 'list':
            rows = read_list(self.ann_file, self.data_prefix['img_path'], names)
            data = [{'img_path': path, 'gt_label': label} for path, label in rows]
        elif layout == 'kinetics':
            rows = list(self._read_kinetics())
            names = names or sorted({label for label, _ in rows})
            data = self._locate(rows, names)
        else:
            if not names:
                raise ValueError(f'{self.ann_file}: the layout ssv2 needs label_file')
            data = self._locate(self._read_ssv2(), names)
        self._check_labels(data, names)
        if names:
            self._metainfo.setdefault('classes', tuple(names))
        return data

    def _find_layout(self) -> str:
        if self.layout != 'auto':
            return self.layout
        if self.ann_file.endswith('.json'):
            return 'ssv2'
        first = read_text(self.ann_file).partition('\n')[0]
        return 'kinetics' if self.ann_file.endswith('.csv') and 'youtube_id' in first else 'list'

    def _label_names(self) -> list[str] | None:
        if self.label_file is None:
            classes = self._metainfo.get('classes')
            return None if classes is None else list(classes)
        return read_classes(os.path.join(self.data_root or '', self.label_file))

    def _read_kinetics(self) -> Iterator[tuple[str, str]]:
        rows = csv.DictReader(io.StringIO(read_text(self.ann_file)))
        for number, row in enumerate(rows, 2):
            try:
                start, end = (int(float(row[key])) for key in ('time_start', 'time_end'))
                yield row['label'], f'{row["youtube_id"]}_{start:06d}_{end:06d}'
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f'{self.ann_file}:{number} lacks a label, youtube_id, time_start or '
                    f'time_end: {row}'
                ) from error

    def _read_ssv2(self) -> Iterator[tuple[str, str]]:
        for entry in json.loads(read_text(self.ann_file)):
            if 'template' not in entry or 'id' not in entry:
                raise ValueError(f'{self.ann_file}: an entry lacks id or template: {entry}')
            yield entry['template'].replace('[', '').replace(']', ''), str(entry['id'])

    def _locate(self, rows, names: list[str]) -> list[dict]:
        numbers = {name: number for number, name in enumerate(names)}
        files = self._files()
        data, missing = [], []
        for label, stem in rows:
            if label not in numbers:
                raise ValueError(f'{self.ann_file}: the label {label!r} is none of the classes')
            path = files.get(stem)
            if path is None:
                missing.append(stem)
            else:
                data.append({'img_path': path, 'gt_label': numbers[label]})
        folder = self.data_prefix['img_path']
        if not data:
            raise ValueError(
                f'{folder!r} has none of the {len(missing)} videos of {self.ann_file!r}, such as '
                f'{missing[0] if missing else "(the list is empty)"!r}'
            )
        if missing:
            print_log(
                f'VideoDataset: {len(missing)} of {len(missing) + len(data)} videos of '
                f'{self.ann_file!r} are not in {folder!r} and are left out',
                logger='current',
                level=logging.WARNING,
            )
        return data

    def _files(self) -> dict[str, str]:
        """Stem to path of the video files in the folder and its subfolders."""
        root = Path(self.data_prefix['img_path'])
        if not root.is_dir():
            raise ValueError(f'the folder of the videos {str(root)!r} does not exist')
        found, folders = {}, {}
        for folder in (root, *sorted(p for p in root.iterdir() if p.is_dir())):
            for entry in os.scandir(folder):
                stem, extension = os.path.splitext(entry.name)
                if extension.lower() in VIDEO_SUFFIXES:
                    found.setdefault(stem, entry.path)
                elif entry.is_dir():
                    folders.setdefault(entry.name, entry.path)
        return folders | found

    def _check_labels(self, data: list[dict], names: list[str] | None) -> None:
        count = self.num_classes
        if names and count is not None and len(names) != count:
            raise ValueError(
                f'{self.ann_file}: {len(names)} classes are named and num_classes={count}; give '
                'all names in label_file'
            )
        count = len(names) if names else count
        largest = max((entry['gt_label'] for entry in data), default=0)
        if count is not None and largest >= count:
            raise ValueError(f'{self.ann_file}: label {largest} is not below the {count} classes')
