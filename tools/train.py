"""`xtuner train` by path, for launchers that take a script: `torchrun tools/train.py CONFIG --launcher pytorch`."""

import sys

from xtuner.cli.main import main

if __name__ == '__main__':
    sys.exit(main(['train', *sys.argv[1:]]))
