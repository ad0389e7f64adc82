"""Code in the documentation runs; what a page of docs/migrate replaces gives the results of what replaces it."""

import pytest
import torch
from documents import DOCUMENTS, blocks, documents_with, read, run

MIGRATIONS = [document for document in DOCUMENTS if document.startswith("docs/migrate/")]
#: Given to an example that is a fragment of a network.
FRAGMENTS = {
    "fused_attn/ops/attention_residual/README.md": """
import torch
dim = 16
embedding = torch.randn(2, 5, dim)
layers = [torch.nn.Linear(dim, dim) for _ in range(3)]
""",
    "docs/integrations.md": "import torch; model = torch.nn.Linear(1, 1)",
}


@pytest.mark.parametrize("document", [each for each in documents_with("python") if each not in MIGRATIONS])
def test_examples_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict = {}
    exec(FRAGMENTS.get(document, ""), namespace)
    for block in blocks(document, "python"):
        run(block, document, namespace)


def test_every_host_has_a_page():
    hosts = ("aa_conv_botnet", "timm", "sam_vitdet_mvitv2", "mrla", "squeeze_excite", "loftr")
    assert sorted(MIGRATIONS) == sorted(f"docs/migrate/{host}.md" for host in hosts)


@pytest.mark.parametrize("document", MIGRATIONS)
def test_replacement_computes_the_same(document):
    text, code = read(document), blocks(document, "python")
    assert text.split("\n\n")[1].startswith("Equivalent to:")
    assert code
    assert len(code) == text.count("\nEquivalent to:") + text.count("\nReplace it by:")
    compare(document, code)


def test_another_result_is_noticed():
    document = "docs/migrate/timm.md"
    code = [(line, text.replace("rel_scale=1.0", "rel_scale=0.9")) for line, text in blocks(document, "python")]
    with pytest.raises(AssertionError):
        compare(document, code)


def compare(document: str, code: list[tuple[int, str]]) -> None:
    """Blocks alternate; each leaves its result in ``out``."""
    torch.manual_seed(0)
    namespace: dict = {}
    for plain, fused in zip(code[::2], code[1::2], strict=True):
        run(plain, document, namespace)
        grad_out = torch.randn_like(namespace["out"])
        names = [name for name, value in namespace.items() if isinstance(value, torch.Tensor)]
        expected = with_gradients(namespace, names, grad_out)
        namespace.pop("out")
        run(fused, document, namespace)
        actual = with_gradients(namespace, names, grad_out)
        # Weights that a module copied have no gradient of their own.
        assert actual.keys() == expected.keys() or "load_state_dict" in fused[1]
        assert len(actual) > 1
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name], rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def with_gradients(namespace: dict, names: list[str], grad_out: torch.Tensor) -> dict[str, torch.Tensor]:
    """``out``, and its gradients with respect to those leaves among the named tensors that it depends on."""
    leaves = {name: namespace[name] for name in names}
    leaves = {name: value for name, value in leaves.items() if value.is_leaf and value.requires_grad}
    out = namespace["out"]
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out, allow_unused=True, retain_graph=True)
    found = {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    return {"out": out.detach(), **found}
