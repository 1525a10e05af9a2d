"""`xtuner train` as a script, for launchers that need one: `torchrun tools/train.py CONFIG --launcher pytorch`."""

import sys

from xtuner.cli.main import main

if __name__ == '__main__':
    sys.exit(main(['train', *sys.argv[1:]]))
