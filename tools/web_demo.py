"""`xtuner chat LLM --web` with Streamlit's own command: `streamlit run tools/web_demo.py -- LLM [--adapter A] ...`.

Arguments of `xtuner chat` come after `--`, Streamlit's own, such as `--server.port`, before it.
"""

import argparse
import sys

from streamlit.starlette import App

from xtuner.chat.web.app import MIDDLEWARE, PAGE, share_model
from xtuner.cli.chat import add_arguments, load_shared_model
from xtuner.cli.log import start_logging
from xtuner.errors import XTunerError
from xtuner.utils.escape import printable

parser = argparse.ArgumentParser(prog='streamlit run web_demo.py --', description=__doc__, allow_abbrev=False)
add_arguments(parser)
start_logging()
try:
    share_model(load_shared_model(parser.parse_args()))
except XTunerError as error:
    sys.exit(f'xtuner: error: {printable(str(error))}')

app = App(PAGE, middleware=MIDDLEWARE)  # the object that `streamlit run` looks for
