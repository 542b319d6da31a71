"""Values of ``--cfg-options``."""

import ast
import re
from typing import Any

from mmengine.config import DictAction


class ConfigOptions(DictAction):
    """mmengine's ``DictAction``, extended to dicts.

    ``key="[dict(type='EMAHook', momentum=2e-4)]"`` and the ``{'type': …}`` notation mean the
    same as in a config file; everything without a dict is read as by mmengine.
    """

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        """Add ``KEY=VALUE`` pairs to earlier options."""
        options = dict(getattr(namespace, self.dest, None) or {})
        for pair in values:
            key, separator, value = pair.partition('=')
            if not separator or not key:
                parser.error(f'{option_string}: expected KEY=VALUE, got {pair!r}')
            try:
                options[key] = parse_value(value)
            except (AssertionError, SyntaxError, ValueError) as error:
                reason = str(error).splitlines()[0]
                parser.error(f'{option_string} {key}: cannot read the value {value!r}: {reason}')
        setattr(namespace, self.dest, options)


def parse_value(text: str) -> Any:
    """Read the value of one option.

    Raises:
        ValueError: The text looks like Python, but does not consist of literals and ``dict(…)``.
        SyntaxError: It is not Python either.
        AssertionError: Brackets are not balanced.
    """
    if re.match(r'[\[({]|dict\(', text.strip()) and ('{' in text or 'dict(' in text):
        return ast.literal_eval(_Displays().visit(ast.parse(text.strip(), mode='eval')))
    return DictAction._parse_iterable(text)


class _Displays(ast.NodeTransformer):
    """``dict(key=value)`` as ``{'key': value}``; everything else is left to ``literal_eval``."""

    def visit_Call(self, node: ast.Call) -> ast.Dict:
        self.generic_visit(node)
        if not isinstance(node.func, ast.Name) or node.func.id != 'dict' or node.args:
            raise ValueError('only dict(key=value, ...) may be called')
        keys = [word.arg and ast.Constant(word.arg) for word in node.keywords]
        return ast.Dict(keys, [word.value for word in node.keywords])
