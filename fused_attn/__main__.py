"""``python -m fused_attn`` is ``fused-attn``."""

import sys

from .cli import main

sys.exit(main())
