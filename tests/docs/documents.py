"""The code blocks of the documentation."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = ('python',)
SHELL = ('shell', 'sh', 'bash')
PATTERNS = ('*.md', 'docs/**/*.md', 'configs/*/README.md', 'csrc/*.md')

_FENCE = re.compile(r'^(?P<indent> *)```(?P<language>\w*|\{[\w-]+\}.*)[ \t]*$')
#: <!-- not run: needs a GPU --> before a block.
_MARK = re.compile(r'<!-- not run: (?P<reason>.+?) -->')


@dataclass(frozen=True)
class Block:
    """A fenced block of a Markdown file; ``skipped`` is the reason of a mark before it."""

    path: Path
    line: int
    language: str
    text: str
    skipped: str | None = None

    @property
    def name(self) -> str:
        return f'{self.path.relative_to(ROOT)}:{self.line}'


def documents() -> list[Path]:
    found = [p for pattern in PATTERNS for p in ROOT.glob(pattern)]
    return sorted(p for p in found if '_build' not in p.parts)


def blocks(path: Path) -> list[Block]:
    found, inside, lines, start, skipped = [], None, [], 0, None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fence = _FENCE.match(line)
        if inside is not None:
            if line.strip() == '```':
                text = '\n'.join(lines) + '\n'
                found.append(Block(path, start, inside['language'], text, skipped))
                inside, skipped = None, None
            else:
                lines.append(line.removeprefix(inside['indent']))
        elif fence:
            inside, lines, start = fence, [], number
        elif mark := _MARK.search(line):
            skipped = mark['reason']
        elif line.strip():
            skipped = None
    assert inside is None, f'{path}:{start}: the block has no end'
    return found


def blocks_of(languages: tuple[str, ...]) -> list[Block]:
    return [b for path in documents() for b in blocks(path) if b.language in languages]


def commands(text: str) -> list[str]:
    """The command lines of a shell block: continued lines joined, comments left out."""
    joined = re.sub(r'\\\n\s*', ' ', text)
    return [line.strip() for line in joined.splitlines() if line.strip() and line.strip()[0] != '#']
