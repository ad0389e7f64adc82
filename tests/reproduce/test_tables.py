"""The tables as data: complete, and each row a run that the trainer accepts."""

from pathlib import Path

import pytest
import torch
import yaml

from fused_attn import create_model
from fused_attn.reproduce import listing
from fused_attn.reproduce.measures import MEASURES
from fused_attn.reproduce.tables import FIGURES, SCALES, TABLES, Tables
from fused_attn.train import TrainError, applies

TABLES_OF_THE_PAPERS = [
    *("aa/table1", "aa/table2", "aa-coverage", "sa/table1", "sa/figure1", "mrla/counts", "mrla/resnet50"),
    *(f"se-r/table{number}" for number in range(1, 12)),
    *(f"se-r/figure{number}" for number in range(3, 7)),
    "elementwise/table1",
    *(f"elementwise/appendix{number}" for number in range(1, 4)),
    *(f"elementwise/figure{number}" for number in range(3, 16)),
]


def test_every_table_and_figure_is_there():
    assert sorted(Tables().ids) == sorted(TABLES_OF_THE_PAPERS)


@pytest.mark.parametrize("scale", SCALES)
def test_every_row_is_a_run_that_the_trainer_takes(scale):
    tables, seen = Tables(), set()
    for id in tables.ids:
        table = tables.table(id, scale)
        assert table.figure in FIGURES
        for row in table.rows:
            config = row.config(Path("out"))
            applies.check(config)
            key = (config.model, config.model_options)
            if key not in seen:
                options = {"image_size": 32} | config.parsed_model_options()
                with torch.device("meta"):
                    create_model(config.model, num_classes=10, **options)
            seen.add(key)
            assert row.slug
            if scale == "full":
                assert not row.differences()
            else:
                assert table.counts or row.differences()


def test_the_list_names_every_table_with_its_cost():
    text = listing.text(Tables())
    for id in TABLES_OF_THE_PAPERS:
        assert f"  {id} " in text
    assert "no time measured" not in text
    assert "7 rows of 60 epochs" in text


def small(**changes):
    """A file of one table with one row."""
    return {
        "papers": {"p": "A paper"},
        "groups": {"p": {"rows": {"one": {"settings": {"model": "wrn_10_1", "dataset": "digits"}}}}},
        "tables": {"p/t": {"title": "T", "measures": ["test_accuracy"], "rows": {"one": {}}, **changes}},
    }


def read(tmp_path, data):
    path = tmp_path / "tables.yaml"
    path.write_text(yaml.safe_dump(data))
    return Tables(path)


def test_settings_are_put_over_one_another(tmp_path):
    data = small()
    data["smoke"] = {"settings": {"epochs": 1}, "models": {"aa_wrn_16_2": "aa_wrn_10_1"}}
    data["groups"]["p"] = {
        "settings": {"recipe": "wrn", "dataset": "cifar10", "model_options": {"heads": 2, "relative": False}},
        "small": {"settings": {"epochs": 7, "lr": 0.5}},
        "rows": {
            "one": {
                "settings": {"model": "aa_wrn_16_2", "lr": 0.2, "model_options": {"heads": 4}},
                "small": {"settings": {"lr": 0.3, "model_options": {"relative": True}}},
            }
        },
    }
    full, less, smoke = (read(tmp_path, data).table("p/t", scale).rows[0] for scale in SCALES)
    config = full.config(Path("out"), seed=5)
    assert (config.model, config.lr, config.epochs, config.gamma, config.seed) == ("aa_wrn_16_2", 0.2, 200, 0.2, 5)
    assert config.model_options == ("heads=4", "relative=False")
    assert (less.config(Path()).lr, less.config(Path()).epochs) == (0.3, 7)
    assert less.config(Path()).model_options == ("heads=4", "relative=True")
    assert less.differences() == {
        "lr": (0.2, 0.3),
        "epochs": (200, 7),
        "model_options": (["heads=4", "relative=False"], ["heads=4", "relative=True"]),
    }
    assert (smoke.config(Path()).model, smoke.config(Path()).epochs) == ("aa_wrn_10_1", 1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"measures": ["accuracy"]}, "measures must be one of"),
        ({"figure": "pie"}, "figure must be one of"),
        ({"rows": {"two": {}}}, "two"),
        ({"rows": {}}, "there must be rows"),
        ({"rows": {"one": {"f1": 3}}}, "got f1"),
        ({"colour": "red"}, "got colour"),
        ({"paper": "q"}, "q"),
        ({"rows": {"one": {"test_accuracy": "about 12"}}}, "about 12"),
        ({"rows": {"one": {}, False: {}}}, "the name of a row must be text"),
        ({"counts": {"num_clases": 10}}, "got num_clases"),
        ({"figure": "lines"}, "must have x and series"),
    ],
)
def test_a_wrong_table_is_named(tmp_path, change, words):
    with pytest.raises(TrainError, match=r"tables\.yaml, p/t: ") as caught:
        read(tmp_path, small(**change)).table("p/t", "full")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data["groups"]["p"]["rows"]["one"].update(scales=["samll"]), "the scales of the row one must be"),
        (lambda data: data.update(smalll={}), "got smalll"),
        (lambda data: data["groups"]["p"].update(full={"models": {"wrn_1O_1": "wrn_16_1"}}), "got wrn_1O_1"),
        (lambda data: data["groups"]["p"]["rows"].update({"注意": data["groups"]["p"]["rows"].pop("one")}), "letters"),
    ],
    ids=["scale of a row", "scale of the file", "model", "name of a row"],
)
def test_what_would_be_without_effect_is_refused(tmp_path, change, words):
    data = small()
    change(data)
    data["tables"]["p/t"]["rows"] = {name: {} for name in data["groups"]["p"]["rows"]}
    with pytest.raises(TrainError, match=r"tables\.yaml.*: ") as caught:
        read(tmp_path, data).table("p/t", "full")
    assert words in str(caught.value)


def test_a_wrong_setting_is_named(tmp_path):
    data = small()
    data["groups"]["p"]["rows"]["one"]["settings"]["lr"] = -1
    with pytest.raises(TrainError, match="the row one: lr must be above 0, got -1"):
        read(tmp_path, data).table("p/t", "full").rows[0].config(tmp_path)
    data["groups"]["p"]["rows"]["one"]["settings"] = {"recipe": "none", "model": "wrn_10_1"}
    with pytest.raises(TrainError, match=r"recipe must be one of .*, got 'none'"):
        read(tmp_path, data).table("p/t", "full")


@pytest.mark.parametrize("text", ["{", "- a list", "papers: {}", "\x00"])
def test_a_file_that_holds_no_tables(tmp_path, text):
    path = tmp_path / "tables.yaml"
    path.write_text(text)
    with pytest.raises(TrainError, match=r"tables: .*tables\.yaml"):
        Tables(path)
    with pytest.raises(TrainError, match="cannot be read"):
        Tables(tmp_path / "none.yaml")


def test_unknown_table_and_scale():
    with pytest.raises(TrainError, match=r"table must be one of aa/table1, .*, got 'aa/table3'"):
        Tables().table("aa/table3", "full")
    with pytest.raises(TrainError, match="scale must be one of full, small, smoke, got 'tiny'"):
        Tables().table("aa/table1", "tiny")


def test_the_file_says_what_it_holds():
    text = TABLES.read_text()
    assert all(f"{name}" in text for name in ("papers:", "groups:", "tables:", "measures", "figure", "scales"))
    used = {name for id in Tables().ids for name in Tables().table(id, "full").measures}
    assert used <= MEASURES.keys()
