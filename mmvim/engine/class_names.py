"""Comparison of class names: whatever has names or numbers of classes must agree on them."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

from mmvim.compat._import_hook import replaces, when_imported
from mmvim.errors import UserError, did_you_mean


def listed(names: Iterable[Any], most: int = 5) -> str:
    """The first names, for messages."""
    names = list(map(str, names))
    return f'({", ".join(names[:most])}{", …" if len(names) > most else ""})'


def difference(names: Sequence[str], others: Sequence[str]) -> str | None:
    """The first difference between two lists of class names, in words, or None."""
    for i, (name, other) in enumerate(zip(names, others, strict=False)):
        if name != other:
            return f'class {i} is {name!r} and {other!r}'
    if len(names) != len(others):
        return f'there are {len(names)} and {len(others)} classes'
    return None


def displacement(names: Sequence[str], others: Sequence[str]) -> str | None:
    """A name that two lists have at different places, in words, or None.

    Capitals, spaces, hyphens and underscores make no difference. Lists that name the same classes
    differently, such as synsets and words, have none.
    """
    places: dict[str, set[int]] = {}
    for i, name in enumerate(others):
        places.setdefault(_plain(name), set()).add(i)
    for i, name in enumerate(names):
        found = places.get(_plain(name), {i})
        if i not in found:
            return f'{name!r} is class {i} and class {min(found)}'
    return None


def _plain(name: Any) -> str:
    return re.sub(r'[\s_-]+', ' ', str(name)).casefold().strip()


def check_names(names: Any, where: str) -> None:
    """Refuse what is no list of names, such as ``('uav')`` or a set; None is accepted.

    Raises:
        UserError: ``names`` is neither a list nor a tuple.
    """
    if isinstance(names, str):
        raise UserError(
            f'{where} must be a list or tuple of names, not the string {names!r}: one class is '
            f'({names!r},), with a comma'
        )
    if names is not None and not isinstance(names, (list, tuple)):
        raise UserError(
            f'{where} must be a list or tuple of names, whose order numbers the classes, not '
            f'{names!r} ({type(names).__name__})'
        )


def check_distinct(names: Sequence[str], where: str) -> None:
    """Refuse a list in which a name has several numbers.

    Args:
        names: The list.
        where: Its place in words, with a verb, such as 'metainfo.classes has'.

    Raises:
        UserError: A name is there twice.
    """
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise UserError(f'{where} the name {twice!r} twice, and names number the classes')


def check_categories(names: Sequence[str], categories: Sequence[str], file: str) -> None:
    """Check that classes are categories of a COCO-style file, in the file's order.

    mmdet numbers the classes in the order of the file and leaves out names that the file lacks, so
    that any difference gives boxes the name of another class.

    Raises:
        UserError: They are not.
    """
    check_names(names, 'metainfo.classes')
    check_distinct(names, 'metainfo.classes has')
    chosen = [name for name in categories if name in set(names)]
    check_distinct(chosen, f'{file} has categories of')
    # A file without any category is reported as what it is, an empty one.
    if not categories or chosen == list(names):
        return
    found = f'the categories of {file} {listed(categories)}'
    if not chosen:
        raise UserError(
            f"none of {found} is among the data set's classes {listed(names)}: give them as "
            'metainfo=dict(classes=(…)) of the data set'
        )
    missing = [name for name in names if name not in categories]
    if missing:
        hint = did_you_mean(missing[0], categories)
        raise UserError(f'the class {missing[0]!r} of metainfo.classes is none of {found}{hint}')
    raise UserError(
        f'metainfo.classes {listed(names)} is in another order than {found}, which numbers the '
        f'classes: {difference(names, chosen)}'
    )


def names_in_xml(dataset: Any) -> set[str]:
    """Names of the objects in the files of an XML data set, such as PASCAL VOC's; else none.

    mmdet leaves out objects whose names are not among the classes.
    """
    if not any(cls.__name__ == 'XMLDataset' for cls in type(dataset).__mro__):
        return set()
    names: set[str] = set()
    for i in range(len(dataset)):
        path = dataset.get_data_info(i).get('xml_path')
        if path and os.path.isfile(path):
            names.update(
                node.text or '' for node in ElementTree.parse(path).iterfind('object/name')
            )
    return names


def install() -> None:
    """Make mmdet compare the names when it looks for a data set's classes in a file."""
    when_imported('mmdet.datasets.api_wrappers.coco_api', _compare)


def _compare(module: ModuleType) -> None:
    @replaces(module.COCO, '__init__')
    def start(original: Callable, self: Any, annotation_file: Any = None) -> None:
        self.read_from = annotation_file
        original(self, annotation_file)

    @replaces(module.COCO, 'get_cat_ids')
    def get_cat_ids(
        original: Callable, self: Any, cat_names: Any = (), sup_names: Any = (), cat_ids: Any = ()
    ) -> list[int]:
        if len(cat_names):
            check_categories(cat_names, *categories_of(self))
        _check_numbers(self)
        return original(self, cat_names, sup_names, cat_ids)


def _check_numbers(coco: Any) -> None:
    """Refuse images and boxes that mmdet would leave out for their numbers."""
    images = coco.dataset.get('images', ())
    if len(coco.imgs) < len(images):
        raise UserError(
            f'{categories_of(coco)[1]} has {len(images)} images and {len(coco.imgs)} different '
            'ids for them: each image needs an id of its own'
        )
    known = set(coco.cats)
    for annotation in coco.dataset.get('annotations', ()) if known else ():
        number = annotation.get('category_id', next(iter(known)))
        if number not in known:
            raise UserError(
                f'annotation {annotation.get("id")} of {categories_of(coco)[1]} has the '
                f'category_id {number!r}, and the categories there are numbered '
                f'{listed(sorted(known, key=str))}'
            )


def categories_of(coco: Any) -> tuple[list[str], str]:
    """Names of the categories of a COCO object, and its file in words."""
    names = [category['name'] for category in coco.dataset.get('categories', ())]
    file = getattr(coco, 'read_from', None)
    return names, repr(file) if file else 'the annotation file'
