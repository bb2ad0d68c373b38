"""`python -m svdq_hf` is the command `svdq`."""

import sys

from svdq_hf.cli import main

sys.exit(main())
