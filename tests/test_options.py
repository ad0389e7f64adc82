"""The table of bounds: every option that is a number has one, and what no option takes is refused in one line."""

import math
import re
import typing
from pathlib import Path

import pytest

from fused_attn import cli, options
from fused_attn.bench import BenchError, command, networks
from fused_attn.cli import convert_model, demo
from fused_attn.cli import draw_scales as scales
from fused_attn.cli import inspect_model as drawing
from fused_attn.reproduce.command import ReproduceConfig
from fused_attn.train import TrainConfig, TrainError

#: command -> what declares its options, those without a default, and the error of the settings
COMMANDS = {
    "train": (TrainConfig, {"model": "wrn_10_1", "dataset": "digits", "out": Path("out")}, TrainError),
    "bench": (command.BenchConfig, {}, BenchError),
    "bench networks": (networks.NetworksConfig, {}, BenchError),
    "scales": (scales.ScalesConfig, {"runs": (Path("run"),), "out": Path("out")}, TrainError),
    "inspect": (drawing.run, {"source": "attention_wise_b"}, TrainError),
    "demo": (demo.run, {}, TrainError),
    "reproduce": (ReproduceConfig, {}, TrainError),
    "convert": (convert_model.ConvertConfig, {"model": "timm:botnet26t_256"}, BenchError),
}
WHOLE = [-1, -(2**40), 10**30]
NUMBERS = [math.nan, math.inf, -math.inf, -1.0, 1e300]


def declared(name):
    """Option -> its type."""
    return {key: kind for key, kind in typing.get_type_hints(COMMANDS[name][0]).items() if key != "return"}


def holds(kind, sought):
    """Whether the type is ``sought`` or has it in it."""
    return kind is sought or any(holds(one, sought) for one in typing.get_args(kind))


def numeric():
    return [
        (name, key)
        for name in COMMANDS
        for key, kind in declared(name).items()
        if holds(kind, int) or holds(kind, float)
    ]


def make(name, **values):
    target, required, _ = COMMANDS[name]
    given = {**required, **values}
    positional = [given.pop("source")] if name == "inspect" else []
    return target(*positional, **given)


def refused(name, **values):
    with pytest.raises(COMMANDS[name][2]) as caught:
        make(name, **values)
    (key,) = values
    text = str(caught.value)
    assert re.match(rf"(model \w+: )?{key} must be ", text), text
    assert ", got " in text
    assert len(text.splitlines()) == 1
    return text


def test_no_command_is_forgotten():
    assert {name.split()[0] for name in COMMANDS} == set(cli.COMMANDS) - {"info"}
    assert options.BOUNDS.keys() == COMMANDS.keys()


def test_every_number_has_a_bound_and_every_bound_a_number():
    expected = {name: set() for name in COMMANDS}
    for name, key in numeric():
        expected[name].add(key)
    assert {name: set(bounds) for name, bounds in options.BOUNDS.items()} == expected


def test_every_bound_ends():
    for bounds in options.BOUNDS.values():
        for name, bound in bounds.items():
            if bound is not None:
                assert 0 <= bound.low < bound.high < 2**33, name
                assert not any(map(bound.holds, [*WHOLE, *NUMBERS])), name
                inside = [math.nextafter(bound.low, bound.high), math.nextafter(bound.high, bound.low)]
                assert all(map(bound.holds, inside)), name
                assert bound.holds(bound.low) != bound.open_low
                assert bound.holds(bound.high) != bound.open_high


@pytest.mark.parametrize(("name", "key"), numeric())
def test_values_that_no_number_takes(name, key):
    kind = declared(name)[key]
    several = typing.get_origin(kind) is tuple
    for value in NUMBERS if holds(kind, float) else WHOLE:
        refused(name, **{key: (value,) if several else value})


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in COMMANDS for key in declared(name)])
def test_values_of_another_type(name, key):
    """As a config.json that someone edited may have them."""
    kind = declared(name)[key]
    values = [object(), {}, [1], (None,)]
    if not holds(kind, bool):
        values.append(True)
    if not holds(kind, str):
        values += ["text"] if not holds(kind, Path) else []
    if not holds(kind, float):
        values.append(1.5)
    if not holds(kind, type(None)):
        values.append(None)
    if typing.get_origin(kind) is typing.Literal:
        values.append("other")
    for value in values:
        refused(name, **{key: value})


def in_words(name, key):
    parameter = "pass" if key == "passes" else key
    return f"--{parameter.replace('_', '-')}"


@pytest.mark.parametrize(("name", "key"), numeric())
def test_command_lines_that_no_option_takes(tmp_path, monkeypatch, capsys, name, key):
    monkeypatch.chdir(tmp_path)
    required = {
        "train": "--model wrn_10_1 --dataset digits --out out",
        "scales": "run --out out",
        "inspect": "attention_wise_b",
        "convert": "--model timm:botnet26t_256",
    }
    for value in NUMBERS if holds(declared(name)[key], float) else WHOLE:
        line = f"{name} {required.get(name, '')} {in_words(name, key)}={value}"
        assert cli.main(line.split()) == 2, line
        errors = capsys.readouterr().err
        assert re.match(rf"fused-attn: error: (model \w+: )?{key} must be ", errors), errors
        assert len(errors.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 100_000}, "threads must be at most 1,024, got 100000"),
        ({"seed": 2**32}, "seed must be at most 4,294,967,295, got 4294967296"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"rotate": 1e9}, "rotate must be at most 180, got 1000000000.0"),
        ({"rotate": -5.0}, "rotate must be at least 0, got -5.0"),
        ({"crop_padding": 100_000}, "crop_padding must be at most 4,096, got 100000"),
        ({"lr": math.nan}, r"lr must be above 0 and at most 1,000,000.0, got nan"),
        ({"momentum": 1.5}, r"momentum must be in \[0, 1\), got 1.5"),
        ({"gamma": 0.0}, r"gamma must be in \(0, 1\], got 0.0"),
        ({"aux_weights": (0.1, -1.0)}, r"aux_weights must be at least 0 each, got \(0.1, -1.0\)"),
        ({"milestones": (60, 30)}, r"milestones must be in rising order, got \(60, 30\)"),
        ({"milestones": (30, 30)}, "milestones must be in rising order"),
        ({"schedule": "cosin"}, "schedule must be one of constant, step, cosine, got 'cosin'"),
        ({"model_options": ("num_classes=3",)}, "model_options must not have num_classes, it is that of the data set"),
        ({"model_options": ("impl=cpu",)}, "model_options must not have impl, it is an option of its own"),
        ({"model_options": ("depth=1", "depth=2")}, "model_options must be each KEY once, got 'depth=2'"),
    ],
)
def test_words(changes, message):
    with pytest.raises(TrainError, match=message):
        make("train", **changes)


def test_texts_are_paths_where_a_path_is_meant():
    config = TrainConfig("wrn_10_1", "digits", "out", data_dir="data")
    assert (config.out, config.data_dir) == (Path("out"), Path("data"))
    assert config == TrainConfig("wrn_10_1", "digits", Path("out"), data_dir=Path("data"))
