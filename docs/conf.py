"""Sphinx configuration: MyST Markdown pages and API reference from docstrings."""

import re
from pathlib import Path

project = 'mmvim'
author = 'the mmvim contributors'
copyright = author
release = re.search(
    r'^version = "([^"]+)"',
    (Path(__file__).parent.parent / 'pyproject.toml').read_text(),
    re.MULTILINE,
).group(1)

extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.mathjax']
myst_enable_extensions = ['amsmath', 'dollarmath', 'colon_fence', 'deflist']
myst_heading_anchors = 3
exclude_patterns = ['_build']
html_theme = 'furo'
html_title = f'mmvim {release}'

autodoc_member_order = 'bysource'
autodoc_typehints = 'none'
napoleon_use_rtype = False
nitpicky = False
