"""`python -m blip2_hf.cli`."""

import sys

from .main import main

sys.exit(main())
