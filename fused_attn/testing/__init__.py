"""For whoever writes an op: whether its implementations are right.

:mod:`~fused_attn.testing.numerics` compares results, :mod:`~fused_attn.testing.checks` holds an op to its contract.
"""
