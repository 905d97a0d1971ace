"""`python -m entkd.cli`, for `torchrun`."""

import sys

from entkd.cli import main

sys.exit(main())
