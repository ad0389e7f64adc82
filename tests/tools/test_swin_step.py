"""The benchmark of a training step of Swin: both forms are one network."""

from commands import tool

swin_step = tool("report/swin_step")


def test_both_forms_have_the_same_gradients_which_depend_on_the_mask():
    steps = [swin_step.Step(form, "swin_cifar", batch=2, size=32) for form in swin_step.FORMS]
    assert swin_step.difference(*steps) < swin_step.TOLERANCE
    for module in steps[1].network.modules():
        if isinstance(module, swin_step.PlainWindowAttention):
            module.kept = {size: (index, None) for size, (index, _) in module.kept.items()}
    assert swin_step.difference(*steps) > swin_step.TOLERANCE
