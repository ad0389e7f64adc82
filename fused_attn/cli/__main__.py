"""``python -m fused_attn.cli`` is ``fused-attn``."""

import sys

from . import main

sys.exit(main())
