"""Applications of `bilevel`: each folder is one story, run with ``python -m applications.<name>``."""

import signal
import sys

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # A command is being imported, which takes seconds: until it begins, Ctrl-C ends it without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
