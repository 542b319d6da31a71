"""Lists of videos as other tools write them."""

import pytest

from mmvim.datasets.video import VideoDataset
from mmvim.datasets.video.lists import read_classes

CLASSES = ('cat', 'play guitar', 'class 1')
TWO = [('a.mp4', 0), ('b.mp4', 1)]


def read(root, text, classes=None, encoding='utf-8'):
    (root / 'list.csv').write_bytes(text.encode(encoding))
    meta = {'metainfo': {'classes': classes}} if classes else {}
    data = VideoDataset('list.csv', data_root=str(root), data_prefix='v', **meta)
    items = [data.get_data_info(i) for i in range(len(data))]
    prefix = f'{root}/v/'
    return [(item['img_path'].removeprefix(prefix), item['gt_label']) for item in items]


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('a.mp4 0\nb.mp4 1\n', TWO),
        ('a.mp4,0\r\nb.mp4,1\r\n', TWO),
        ('a.mp4, 0\nb.mp4 , 1', TWO),
        ('a.mp4\t0\n\nb.mp4\t1', TWO),
        ('a.mp4;0\nb.mp4;1', TWO),
        ('a.mp4 120 0\nb.mp4 98 1', TWO),
        ('a.mp4,120,0\nb.mp4,98,1', TWO),
        ('a.mp4\t120\t0\nb.mp4\t98\t1', TWO),
        ('"a.mp4",0\n"b.mp4","1"', TWO),
        ('"a.mp4" 0\n"b.mp4" 33 1', TWO),
        ('path,label\na.mp4,0\nb.mp4,1', TWO),
        ('Label\tVideo_Path\n0\ta.mp4\n1\tb.mp4', TWO),
        (',filename,num_frames,class_id\n0,a.mp4,5,0\n1,b.mp4,7,1', TWO),
        ('path label\na.mp4 0\nb.mp4 1', TWO),
        ('\ufeffpath;label\na.mp4;0\nb.mp4;1', TWO),
        ('/abs/a.mp4 3\nsub/b.mp4 1', [('/abs/a.mp4', 3), ('sub/b.mp4', 1)]),
        ('x, y.mp4 2\n"x, y.mp4",2\nx y.mp4,2', [('x, y.mp4', 2), ('x, y.mp4', 2), ('x y.mp4', 2)]),
        ('path,label\n"x, ""y"".mp4",2', [('x, "y".mp4', 2)]),
        ('frames_a 0\nframes_b 1', [('frames_a', 0), ('frames_b', 1)]),
        ('frames_a\t12\t0', [('frames_a', 0)]),
    ],
)
def test_numbers(text, expected, tmp_path):
    assert read(tmp_path, text) == expected


@pytest.mark.parametrize(
    'text',
    [
        'a.mp4 cat\nb.mp4 play guitar\nc.mp4 class 1',
        'a.mp4,cat\nb.mp4,"play guitar"\nc.mp4,class 1',
        'a.mp4\t9\tcat\nb.mp4\t9\tplay guitar\nc.mp4\t9\tclass 1',
        'name,category\na.mp4,cat\nb.mp4,play guitar\nc.mp4,class 1',
        'a.mp4 0\nb.mp4 1\nc.mp4 2',
    ],
)
def test_names(text, tmp_path):
    assert read(tmp_path, text, CLASSES) == [('a.mp4', 0), ('b.mp4', 1), ('c.mp4', 2)]


def test_names_that_are_numbers(tmp_path):
    digits = ('1', '2', '3')
    assert read(tmp_path, 'a.mp4 0\nb.mp4 2', digits) == [('a.mp4', 0), ('b.mp4', 2)]
    assert read(tmp_path, 'a.mp4 1\nb.mp4 3', digits) == [('a.mp4', 0), ('b.mp4', 2)]
    assert read(tmp_path, 'a.mp4 1\nb.mp4 2', ('0', '1', '2')) == [('a.mp4', 1), ('b.mp4', 2)]
    with pytest.raises(
        ValueError, match=r"list\.csv:1: the label 1 is the number of class '2' and"
    ):
        read(tmp_path, 'a.mp4 1\nb.mp4 2', digits)


def test_folders_that_end_with_a_number(tmp_path):
    for name in ('clip', 'take 2'):
        (tmp_path / 'v' / name).mkdir(parents=True)
    assert read(tmp_path, 'clip 5 0\ntake 2 1\ntake 2 7 1') == [
        ('clip', 0),
        ('take 2', 1),
        ('take 2', 1),
    ]
    with pytest.raises(
        ValueError, match=r"list\.csv:2 .*neither '.*/v/gone 2' nor '.*/v/gone' exists"
    ):
        read(tmp_path, 'clip 5 0\ngone 2 1')
    (tmp_path / 'v' / 'take').mkdir()
    with pytest.raises(ValueError, match=r'list\.csv:1 may mean .* both exist'):
        read(tmp_path, 'take 2 1')


@pytest.mark.parametrize(
    ('text', 'classes', 'message'),
    [
        ('', None, 'list.csv is empty'),
        ('\n \n', None, 'list.csv is empty'),
        ('a.mp4', None, 'list.csv:1 is not "path label", "path,label" or "path frames label": '),
        ('a.mp4 0\nb.mp4 cat', None, "list.csv:2 is not .*'cat' is no number .where labels are"),
        ('a.mp4 0\nb.mp4 1.0', None, "list.csv:2 is not .*'1.0' is no number"),
        ('a.mp4 -1', None, "list.csv:1 is not .*'-1' is no number"),
        ('a.mp4 cats', CLASSES, "list.csv:1 is not .*none of the classes .did you mean 'cat'"),
        ('a.mp4 cat\nb.mp4 1', CLASSES, "list.csv:2: the label '1' is none of the classes"),
        ('path,label\na.mp4,cats', CLASSES, "list.csv:2: the label 'cats' is none of the classes"),
        ('path,label\na.mp4,cat', None, "list.csv:2: the label 'cat' is no number"),
        ('path,label\na,b.mp4,1', None, 'list.csv:2 does not have the columns path, label of'),
        ('path,label,class\na.mp4,1,1', None, 'list.csv:1 names several columns for the label'),
        ('path,label,split\na.mp4,1,train\nb.mp4,1,val', None, "column 'split' has train, val"),
        ('a.mp4 3', CLASSES, 'label 3 is not below the 3 classes'),
    ],
)
def test_one_line(text, classes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, text, classes)
    assert len(str(error.value).splitlines()) == 1


def test_columns_without_use_are_named(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr('mmvim.datasets.video.lists.print_log', lambda text, **_: said.append(text))
    assert read(tmp_path, 'path,label,fps,split\na.mp4,0,25,train\nb.mp4,1,30,train') == TWO
    assert any("the column 'fps' of" in text and text.endswith('is not used') for text in said)


def test_encodings(tmp_path):
    with pytest.raises(ValueError, match=r'list.csv is not text in UTF-8'):
        read(tmp_path, 'Käse.mp4 0', encoding='latin-1')
    (tmp_path / 'names.txt').write_bytes('Käse'.encode('latin-1'))
    with pytest.raises(ValueError, match=r'names.txt is not text in UTF-8'):
        read_classes(str(tmp_path / 'names.txt'))
    (tmp_path / 'names.txt').write_text('\ufeffKäse\r\nÖl\n', encoding='utf-8')
    assert read_classes(str(tmp_path / 'names.txt')) == ['Käse', 'Öl']
    (tmp_path / 'k.csv').write_text('\ufefflabel,youtube_id,time_start,time_end\na,x,1,2\n')
    (tmp_path / 'x_000001_000002.mp4').touch()
    data = VideoDataset('k.csv', data_root=str(tmp_path))
    assert data.metainfo['classes'] == ('a',)
