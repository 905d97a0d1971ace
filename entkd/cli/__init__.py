"""The command line: `entkd <stage>`, one subcommand per stage of the workflow.

A stage gets its settings as JSON and its files as paths; it never reads the experiment.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Sequence

from pydantic import ValidationError

from entkd.cli.options import parser
from entkd.errors import UserError
from entkd.machine import keep_freed_memory


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage. A user's mistake ends with one line per problem and exit status 2."""
    args = parser().parse_args(argv)
    if not sys.stderr.isatty():  # libraries' bars fill a log with what it should tell; tqdm reads this at its import
        os.environ.setdefault("TQDM_DISABLE", "1")
    # Huge pages for torch's buffers: a training step makes and drops some of 100 MB, and faulting them in page by page
    # took an eighth of its time where it was measured. torch reads this at its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    keep_freed_memory()
    # Importing the libraries makes objects by the hundred thousand and next to no garbage: looking for it took a fifth
    # of the start.
    gc.set_threshold(100_000, 20, 20)
    try:
        status = args.function(args) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who read the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        return 1
    except (UserError, ValidationError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error}; free some space and run again, finished parts are kept", file=sys.stderr)
    return 2
