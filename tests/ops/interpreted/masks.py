"""Masks and huge logits in Triton's interpreter, run by tests/ops/test_interpreted.py."""

import dataclasses

import mask_checks as masks
import pytest

SELDOM = ("key_row", "key_columns")  # part of the others
MASKS = [case for case in (*masks.bias_cases(("small",)), *masks.OTHER_CASES) if case.name not in SELDOM]
CASES = [
    *(dataclasses.replace(case, masks=masks.FEW) for case in MASKS if case.op != "elementwise_attention"),
    *(case for case in MASKS if case.op == "elementwise_attention"),
    *(case for case in masks.HUGE_CASES if case.sample != "many layers"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_triton_kernels_give_what_the_reference_gives(case):
    found = list(case.mismatches("triton", draws=2))
    assert not found, "\n".join(found)
