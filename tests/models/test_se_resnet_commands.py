"""The README's training commands for the paper's ablations are commands of networks that exist."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import tyro

from fused_attn import create_model
from fused_attn.train.config import TrainConfig
from fused_attn.train.recipes import RECIPES

README = Path(__file__).parents[2] / "fused_attn" / "ops" / "squeeze_excite" / "README.md"
COMMANDS = re.findall(r"`R (--[^`]+)`", README.read_text())


def test_there_are_commands():
    assert len(COMMANDS) >= 11


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command):
    default = TrainConfig(out=Path("out"), **RECIPES["result-attention"][1])
    config = tyro.cli(TrainConfig, args=shlex.split(command), default=default)
    with torch.device("meta"):
        model = create_model(config.model, num_classes=100, **config.parsed_model_options())
    assert len(model.auxiliary) == len(config.aux_weights)
