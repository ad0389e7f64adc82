"""``fused-attn bench``: speed and memory of every op beside what a user would write instead."""


class BenchError(RuntimeError):
    """A setting that cannot be measured: the text names it, what was expected and what came."""
