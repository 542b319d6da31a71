#!/usr/bin/env python3
"""Print a config, merged with its bases and the changes of the command line.

    python tools/misc/print_config.py configs/vim/vim-small_8xb64_in1k.py \\
        --cfg-options train_cfg.max_epochs=100
"""

import argparse
import sys
from pathlib import Path

# The package next to this script runs, whether installed or not, from any directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mmvim  # noqa: F401, I001  makes `_base_ = 'mmvim::…'` resolve
from mmvim.cli.options import ConfigOptions
from mmengine.config import Config


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('--save-path', type=Path, help='write here (.py, .json or .yml) as well')
    parser.add_argument(
        '--cfg-options', nargs='+', action=ConfigOptions, help='changes, key=value with dotted keys'
    )
    args = parser.parse_args(argv)
    try:
        cfg = Config.fromfile(args.config)
        cfg.merge_from_dict(args.cfg_options or {})
        print(cfg.pretty_text)
        if args.save_path is not None:
            cfg.dump(args.save_path)
    except (OSError, KeyError, TypeError, ValueError, SyntaxError) as error:
        print(f'error: {args.config}: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
