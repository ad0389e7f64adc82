"""The cases of the hosts' timings reach every class of the registry, and results are held against its defaults."""

import json

import pytest
import tyro
from commands import tool

from fused_attn.cli.convert_model import ConvertConfig
from fused_attn.integrations.convert import HOSTS

times = tool("report/host_times")


def result(folder, name, host, forward, step, memory=1.0):
    passes = {"forward": 1.0, "forward + backward": 1.0}
    after = {"forward": 1 / forward, "forward + backward": 1 / step}
    candidates = [{"host": host, "outcome": "replaced"}, {"host": "package:Other", "outcome": "why not"}]
    found = {"model": name, "candidates": candidates, "seconds": {"before": passes, "after": after}}
    found["peak_bytes"] = {"before": passes, "after": dict.fromkeys(passes, 1 / memory)}
    times.file_of(f"timm:{name}", folder).write_text(json.dumps(found))


def test_doubts(tmp_path):
    fast, slow = (next(name for name, host in HOSTS.items() if host.faster_on_cpu is which) for which in (True, False))
    result(tmp_path, "a", fast, 1.0, 1.01)
    result(tmp_path, "b", fast, 1.0, 1.01, memory=1.5)
    result(tmp_path, "c", fast, 1.3, 0.9)
    result(tmp_path, "d", slow, 1.1, 1.0)
    result(tmp_path, "e", slow, 1.1, 0.9)
    assert [doubt.partition(":")[0] for doubt in times.doubts(tmp_path)] == [
        "a is replaced by default, and gains nothing",
        "c is replaced by default, and its step takes longer",
        "d is left alone by default, and gains",
    ]
    assert set(HOSTS) - set(times.untimed(tmp_path)) == {fast, slow}


@pytest.mark.parametrize("model", times.CASES)
def test_cases_are_commands(model):
    config = tyro.cli(ConvertConfig, args=["--model", model, *times.CASES[model]])
    assert config.model == model
    assert config.parsed_options().keys() == {item.partition("=")[0] for item in config.options}


def test_results_are_of_the_cases():
    for path in times.RESULTS.glob("*.json"):
        found = json.loads(path.read_text())
        config = tyro.cli(ConvertConfig, args=["--model", found["model"], *times.CASES[found["model"]]])
        assert (found["options"], found["ops"]) == ([*config.options], [*config.ops]), path.name
        assert path == times.file_of(found["model"])
