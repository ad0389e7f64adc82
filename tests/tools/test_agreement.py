"""``benchmarks/report/agreement.py`` compares the ratios of two runs."""

import json

import pytest
from commands import tool

agreement = tool("report/agreement")


def write(folder, **ratios):
    folder.mkdir()
    rows = [
        {"shape": shape, "provider": "cpu", "pass": "fwd", "fused": True, "best_peer_over_this": ratio}
        for shape, ratio in ratios.items()
    ]
    rows.append({"shape": "a", "provider": "eager", "pass": "fwd", "fused": False, "best_peer_over_this": 9.0})
    (folder / "op.json").write_text(json.dumps({"rows": rows}))
    return str(folder)


@pytest.mark.parametrize(("ratio", "status"), [(4.3, 0), (3.7, 0), (4.5, 1), (3.6, 1)])
def test_more_than_the_limit_fails(tmp_path, capsys, ratio, status):
    first, second = write(tmp_path / "1", a=4.0, b=2.0), write(tmp_path / "2", a=ratio, b=2.0, c=1.0)
    assert agreement.main([first, second]) == status
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2  # in both, and of the fused op
    assert f"4.00x    {ratio:.2f}x  op, a, cpu, fwd" in lines[0]
    assert agreement.main([first, second, "20"]) == 0


def test_nothing_in_common_fails(tmp_path):
    assert agreement.main([write(tmp_path / "1", a=1.0), write(tmp_path / "2", b=1.0)]) == 1
