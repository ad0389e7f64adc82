"""The survey of hosts counts architectures and layers, and the tables show every class of the registry."""

import json

from commands import tool
from torch import nn

from fused_attn.integrations.convert import HOSTS

report = tool("report/integrations")


def test_survey(timm):
    from timm.layers import SEModule
    from timm.layers.bottleneck_attn import BottleneckAttn

    def broken():
        raise ValueError("no such model")

    models = {
        "plain": lambda: nn.Linear(1, 1),
        "broken": broken,
        "both": lambda: nn.Sequential(SEModule(8), SEModule(8, act_layer=nn.ELU), BottleneckAttn(8, feat_size=(4, 4))),
        "left": lambda: SEModule(8, act_layer=nn.ELU),
    }
    found = report.survey(iter(models.items()))
    assert (found["built"], found["served"]) == (3, 1)
    assert found["failed"] == {"broken": "ValueError: no such model"}
    assert found["by_op"]["squeeze_excite"] == {"all": 0, "some": 1, "none": 1}
    assert found["by_op"]["rel_attention_2d"] == {"all": 1, "some": 0, "none": 0}
    assert found["classes"]["timm.layers.squeeze_excite:SEModule"] == {
        "architectures": 2,
        "replaced": 1,
        "left": {"hidden activation ELU(alpha=1.0, inplace=True) is not computed": 2},
    }


def test_tables():
    result = json.loads(report.RESULT.read_text())
    table = report.markdown(result)
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [*HOSTS]
    for package in ("timm", "transformers"):
        assert result[package]["classes"].keys() <= HOSTS.keys()
        assert result[package]["served"] > 0
        assert f"| {package} {result[package]['version']}, {result[package]['date']} |" in table
