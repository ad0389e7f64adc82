"""Two forms of one computation: outputs and all gradients."""

import torch


def outputs_and_gradients(call, tensors, seed=0):
    """The output of ``call(*tensors)`` and the gradients of a random projection of it, by name of tensor."""
    leaves = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    out = call()
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=out.dtype)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_out)
    return out.detach(), dict(zip(leaves, gradients, strict=True))


def with_parameters(model, **tensors):
    return {**tensors, **dict(model.named_parameters())}


def assert_same(found, expected, names=None, tolerance=2e-5):
    """Outputs and gradients agree, each to ``tolerance`` of its largest value, and no gradient is zero throughout.

    Args:
        found, expected: of :func:`outputs_and_gradients`.
        names: name in ``found`` -> name in ``expected``, or -> a function of the expected gradients; None: the same.
    """
    assert_close(found[0], expected[0], tolerance, "out")
    names = {name: name for name in expected[1]} if names is None else names
    assert names.keys() == found[1].keys()
    for name, other in names.items():
        want = other(expected[1]) if callable(other) else expected[1][other]
        assert want.abs().max() > 0, name
        assert_close(found[1][name], want, tolerance, name)


def assert_close(found, expected, tolerance, name):
    assert found.shape == expected.shape, name
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"{name}: {error:.2e}"


def randomise(model, std=0.3):
    """Random numbers for every parameter, those included that start at zero or one and hide what stands behind them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(draw * std + ("norm" in name and name.endswith("weight")))
            else:
                parameter.copy_(draw * (1.0 if "bias" in name else parameter[0].numel() ** -0.5))
    return model
