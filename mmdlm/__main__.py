"""`python -m mmdlm`."""

import sys

from mmdlm.commands.main import main

sys.exit(main())
