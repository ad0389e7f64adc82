"""The README's table of parameters and FLOPs is what the models are."""

import json

import pytest
from commands import ROOT, tool

model_table = tool("report/model_table")


def committed_table(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_committed_table_is_current():
    committed = committed_table("model_table")
    assert [(row["model"], row["attention_in"]) for row in committed] == [row[:2] for row in model_table.ROWS]
    for row, (name, _, options) in zip(committed, model_table.ROWS, strict=True):
        assert {key: row[key] for key in ("parameters", "flops", "attention_flops")} == model_table.measure(
            name, **options
        )


def test_committed_table_of_layer_models_is_current():
    assert committed_table("layer_models") == model_table.measure_rows(model_table.LAYER_ROWS)


def test_committed_table_of_window_models_is_current():
    assert committed_table("window_models") == model_table.measure_rows(model_table.WINDOW_ROWS)


def test_table_of_excite_models_is_current_and_as_published():
    """Parameters as published; multiply-adds within 1 %: the paper counts normalisation and pooling as well."""
    committed = committed_table("excite_models")
    assert committed == model_table.measure_excite_models()
    for row in committed:
        published = model_table.EXCITE_PUBLISHED[row["model"]]
        if published is not None:
            assert round(row["parameters"] / 1e6, 3) == published[0], row
            assert row["flops"] / 2e9 == pytest.approx(published[1], rel=0.01), row


def test_committed_table_of_attention_wise_models_is_current():
    committed = committed_table("attention_wise_models")
    assert committed == model_table.measure_attention_wise()
    assert [row["model"] for row in committed if row["parameters"] == row["paper_parameters"]] == [
        "vgg_control",
        "attention_wise_b",
        "attention_wise_f",
        "vgg_control",
    ]


def test_flops_of_known_networks():
    """He et al. 2016, tables 1 and 6 (multiply-adds): 4.1e9 for ResNet-50 with its stride in the 3x3 convolution, 7.8e9
    for ResNet-101; Touvron et al. 2021: 1.26e9 for DeiT-tiny; Liu et al. 2021, table 1: 4.5e9, 8.7e9 and 15.4e9 for
    Swin, rounded."""
    for name, multiply_adds in {"resnet50": 4.1e9, "resnet101": 7.8e9, "deit_tiny": 1.26e9}.items():
        assert model_table.measure(name, 1000, 224)["flops"] == pytest.approx(2 * multiply_adds, rel=0.01)
    for name, multiply_adds in {"swin_tiny": 4.5, "swin_small": 8.7, "swin_base": 15.4}.items():
        assert model_table.measure(name, 1000, 224)["flops"] / 2e9 == pytest.approx(multiply_adds, abs=0.05), name


def test_flops_are_two_per_multiply_add():
    """Against sums written from the architecture."""
    convolutions, channels = 2 * 9 * 3 * 16 * 32**2, 16
    attention = 0
    for stage in range(3):
        c_in, channels, grid = channels, 32 * 2**stage, 32 // 2**stage
        # Two blocks: four 3x3 convolutions, a 1x1 shortcut in the first.
        convolutions += 2 * grid**2 * (9 * (c_in + 3 * channels) + c_in) * channels
        d_k, d_v = 20, max(channels // 80, 1)
        content, position = grid**4 * (d_k + d_v), grid**2 * d_k * 2 * grid
        attention += 2 * 2 * 8 * (content + position)
    plain = model_table.measure("wrn_16_2")
    assert plain["attention_flops"] == 0
    assert plain["flops"] == convolutions + 2 * channels * model_table.NUM_CLASSES
    assert model_table.measure("aa_wrn_16_2")["attention_flops"] == attention
