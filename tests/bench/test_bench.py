"""``fused-attn bench``: what it measures, refuses, shows and keeps."""

import csv
import dataclasses
import gc
import itertools
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch

from fused_attn import _extension, cli
from fused_attn.bench import BenchError, ceilings, command, measure, networks, plots, report, runner
from fused_attn.ops import SPECS
from fused_attn.ops._floor.declarations import Peer, tensors

REL = measure.find_spec("rel_attention_2d")
TINY = "B=1,heads=2,H=4,W=6,d_k=4,d_v=2"
PEER = "eager"
needs_cpu = pytest.mark.skipif(not _extension.available(), reason="measures the C++ kernels")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Ceilings are measured in a test of their own."""
    monkeypatch.setattr(command, "measure_ceilings", lambda *_: {"copy_gbps": 10.0, "matmul_gflops": 100.0})


def bench(*arguments) -> int:
    return cli.main(["bench", REL.name, "--shape", TINY, "--seconds", "0", "--no-memory", *map(str, arguments)])


CEILINGS = {"copy_gbps": 10.0, "matmul_gflops": 100.0}


def measurement_of(shape=None, spec=REL, **options) -> runner.Measurement:
    measurement = runner.Measurement(
        spec, shape or spec.shape(TINY), "shape", runner.Options(seconds=0.0, memory=False, **options)
    )
    measurement.run()
    return measurement


def measured(**arguments) -> list[runner.Row]:
    return measurement_of(**arguments).rows(CEILINGS)


# --- what is measured -------------------------------------------------------------------------------------------


@needs_cpu
def test_rows_follow_from_times_and_the_spec():
    measurement = measurement_of(providers=("cpu", PEER, "SDPA, dense bias"))
    rows = {(row["provider"], row["pass"]): row for row in measurement.rows(CEILINGS)}
    shape = REL.shape(TINY)
    assert {key[1] for key in rows} == set(measure.PASSES)
    for row in rows.values():
        assert row["status"] == "ok"
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["repetitions"] >= measure.LEAST_ROUNDS
        assert row["of_copy"] == pytest.approx(row["gbps"] / 10.0)
        assert row["of_matmul"] == pytest.approx(row["gflops"] / 100.0)
        peers = (PEER, "SDPA, dense bias")
        ratios = {peer: measure.median_ratio(measurement.rounds, peer, row["provider"], row["pass"]) for peer in peers}
        assert row["best_peer"] == min(ratios, key=ratios.get)
        assert row["best_peer_over_this"] == pytest.approx(min(ratios.values()))
    order = [name for name, _ in measurement.rounds[0]]
    assert order == ["cpu", PEER, "cpu", "SDPA, dense bias", "cpu"]  # each peer right beside the fused op
    both, forward = rows["cpu", "both"], rows["cpu", "fwd"]
    assert forward["gflops"] == pytest.approx(shape.flops_forward / forward["p50_ms"] * 1e-6)
    assert both["gbps"] == pytest.approx((shape.bytes_forward + shape.bytes_backward) / both["p50_ms"] * 1e-6)
    assert forward["saved_bytes"] is None


def test_bytes_are_those_of_the_dtype():
    row = next(row for row in measured(providers=(PEER,), dtype=torch.bfloat16, passes=("fwd",)))
    assert row["gbps"] == pytest.approx(REL.shape(TINY).bytes_forward / 2 / row["p50_ms"] * 1e-6)


def test_functions_take_turns_on_all_input_sets():
    inputs = [torch.full((2,), float(i)) for i in range(3)]
    calls, order = [({"x": x}, torch.ones(2)) for x in inputs], []

    def function(name):
        def call(x):
            order.append((name, float(x.detach()[0])))
            return x * 2

        return call

    functions = {"a": function("a"), "b": function("b")}
    passes = {"a": ("fwd",), "b": ("fwd",)}
    options = {"passes": passes, "seconds": 0.0, "least": 3, "warmup": 1}
    times = measure.time_interleaved(functions, calls, turn_seconds=0.0, **options)
    one_round = [(name, float(i)) for i in range(3) for name in "ab"]
    assert order == one_round * 2  # a warm-up on every set, then the rounds
    assert {name: len(each["fwd"]) for name, each in times.items()} == {"a": 3, "b": 3}

    order.clear()
    times = measure.time_interleaved(functions, calls, turn_seconds=0.01, **options)
    assert all(len(each["fwd"]) > 6 for each in times.values())  # fast functions go on until their turn is over
    turns = [name for (name, _), (before, _) in zip(order[6:], order[5:], strict=False) if name != before]
    assert turns == list("ababab")


def rounds_of(*rounds):
    """Of texts as "a1 b2.5": whose turn, and how long."""
    return [[(turn[0], {"fwd": float(turn[1:])}) for turn in one.split()] for one in rounds]


def test_ratios_are_those_of_neighbouring_turns():
    """A machine that slows down by half, half of the time: the medians may come from different halves."""
    slowing = rounds_of("a1 b2 a1", "a1.5 b3 a1.5", "a1 b2.2 a1", "a1.5 b3.3 a1.5", "a1")
    assert measure.median_ratio(slowing, "b", "a", "fwd") == pytest.approx(2.1)
    within_a_round = rounds_of("a1 b2 a1 c3 a2 d8 a2", "a2 b4 a2 c6 a4 d16 a4")
    assert [measure.median_ratio(within_a_round, peer, "a", "fwd") for peer in "bcd"] == [2, 2, 4]
    assert measure.median_ratio(within_a_round, "d", "b", "fwd") == 4  # far apart, in the same round
    assert measure.median_ratio(within_a_round, "b", "b", "fwd") == 1
    assert measure.median_ratio(rounds_of("b2 a1", "b3"), "b", "a", "fwd") == 2  # interrupted
    assert measure.median_ratio(within_a_round, "b", "e", "fwd") is None
    assert measure.median_ratio(within_a_round, "b", "a", "bwd") is None


def test_turns_of_a_round():
    ticks = itertools.count(1)
    turns = {name: lambda number: {"fwd": float(next(ticks))} for name in "abc"}
    rounds: measure.Rounds = []
    options = {"seconds": 0, "warmup": 0, "rounds_into": rounds}
    times = measure.interleave(turns, least=2, turn_seconds=0, **options)
    assert rounds == rounds_of("a1 b2 c3", "a4 b5 c6")
    assert times == {"a": {"fwd": [1, 4]}, "b": {"fwd": [2, 5]}, "c": {"fwd": [3, 6]}}

    rounds.clear()
    times = measure.interleave(turns, least=2, turn_seconds=0, between="b", **options)
    assert rounds == rounds_of("b7 a8 b9 c10 b11", "b12 a13 b14 c15 b16")
    assert times["b"]["fwd"] == [7, 9, 11, 12, 14, 16]

    rounds.clear()
    times = measure.interleave(turns, least=3, turn_seconds=1e-4, **options)
    assert [[name for name, _ in turns] for turns in rounds] == [list("abc")] * 3
    for name, of in times.items():  # every repetition is in one turn
        medians = [seconds["fwd"] for turns in rounds for whose, seconds in turns if whose == name]
        assert min(of["fwd"]) <= min(medians) <= max(medians) <= max(of["fwd"])
    assert sum(len(of["fwd"]) for of in times.values()) > 9


def test_the_best_peer_is_that_of_rounds():
    measurement = runner.Measurement(REL, REL.shapes[0], "shape", runner.Options())
    names = [peer.name for peer in REL.peers[:2]]
    whose = {"a": "cpu", "b": names[0], "c": names[1]}
    rounds = rounds_of("a1 b3 a1 c9 a1", "a2 b6 a2 c5 a2", "a1 b3 a1 c2.5 a1")
    measurement.rounds = [[(whose[name], seconds) for name, seconds in turns] for turns in rounds]
    measurement.times = {name: {"fwd": [1.0]} for name in whose.values()}
    assert measurement._comparison("cpu", "fwd") == {"best_peer": names[1], "best_peer_over_this": 2.5}
    assert measurement._comparison(names[0], "fwd")["best_peer_over_this"] == pytest.approx(5 / 6)
    assert measurement._comparison("cpu", "bwd") == {}


def test_inputs_are_random_and_differ_from_draw_to_draw():
    for spec in SPECS:
        shape = (*spec.shapes, *spec.growth)[-2]
        first, second = (tensors(shape.inputs(torch.float32, draw=draw)) for draw in (0, 1))
        for name, tensor in first.items():
            assert tensor.std() > 0.01
            assert not torch.equal(tensor, second[name])


def test_saved_bytes_counts_storages_once_without_the_inputs():
    def function(x, y):
        kept = x.exp()  # autograd saves the result
        return (kept * kept.view(-1).view(8, 4)).sum() + (x * y).sum()

    inputs = {"x": torch.randn(8, 4), "y": torch.randn(8, 4)}
    assert measure.saved_bytes(function, inputs) == 8 * 4 * 4


@needs_cpu
def test_saved_bytes_of_the_kernel_are_output_and_statistics():
    shape = REL.shape("B=2,heads=2,H=8,W=8,d_k=20,d_v=4")
    inputs = shape.inputs(torch.float32)
    queries = 2 * 2 * 8 * 8
    assert measure.saved_bytes(measure.provider(REL, "cpu", inputs), inputs) == 4 * queries * (4 + 2)


def test_ceilings_are_possible(monkeypatch):
    monkeypatch.setattr(ceilings, "load_probe", lambda: None)
    found = ceilings.measure_ceilings(torch.float32, "cpu")
    assert found["source"] == "PyTorch's operators"
    assert 0.1 < found["copy_gbps"] < 10_000
    assert 0.1 < found["matmul_gflops"] < 1_000_000


@pytest.mark.skipif(not (shutil.which("ninja") and shutil.which("c++")), reason="no ninja or no C++ compiler")
def test_ceilings_of_the_native_probe():
    """No operator of PyTorch moves or multiplies more."""
    found = ceilings.measure_ceilings(torch.float32, "cpu")
    assert found["source"] == "native probe"
    kinds = {"read", "write", "write, streaming", "copy", "copy, streaming"}
    for each in (found, found["one_thread"]):
        assert {frozenset(rates) for rates in each["bandwidth"].values()} == {frozenset(kinds)}
        assert {"float32", "exponentials"} <= set(each["arithmetic"])
        rates = [rate for level in each["bandwidth"].values() for rate in level.values()]
        assert all(0.1 < rate < 100_000 for rate in [*rates, *each["arithmetic"].values()])
    assert found["matmul_gflops"] > 0.9 * ceilings._matmul_gflops(torch.float32, "cpu")
    smallest, largest = ceilings.BANDWIDTH_BYTES[0], ceilings.BANDWIDTH_BYTES[-1]
    assert ceilings.memory_gbps(found, 100) == max(found["bandwidth"][str(smallest)].values())
    assert ceilings.memory_gbps(found, 2 * smallest) == ceilings.memory_gbps(found, smallest)
    assert ceilings.memory_gbps(found, 10 * largest) == found["copy_gbps"]


def test_a_probe_that_does_not_build_says_so(monkeypatch, tmp_path):
    def fails(*args, **kwargs):
        raise RuntimeError("Error building extension: no compiler\nmore")

    ceilings.load_probe.cache_clear()
    monkeypatch.setattr("torch.utils.cpp_extension.load", fails)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    try:
        with pytest.warns(UserWarning, match=r"PyTorch's operators, as the probe does not build: .* no compiler$"):
            assert ceilings.load_probe() is None
    finally:
        ceilings.load_probe.cache_clear()


# --- what is refused --------------------------------------------------------------------------------------------


def changed(*peers, function=None):
    return dataclasses.replace(REL, peers=peers, function=function or REL.function)


def test_a_wrong_peer_is_named_and_gets_no_time():
    def build(inputs):
        right = measure.provider(REL, "reference", inputs)
        return lambda **kwargs: right(**kwargs) * 1.001

    rows = measured(spec=changed(Peer("wrong", build), REL.peers[0]), providers=("wrong", PEER))
    wrong = [row for row in rows if row["provider"] == "wrong"]
    assert [(row["status"], row["pass"], row.get("p50_ms")) for row in wrong] == [("wrong", None, None)]
    assert "exceeds" in wrong[0]["reason"]
    assert all(row["p50_ms"] for row in rows if row["provider"] == PEER)


def test_a_wrong_gradient_alone_is_enough():
    def build(inputs):
        right = measure.provider(REL, "reference", inputs)
        return lambda rel_h, **kwargs: right(rel_h=rel_h.detach(), **kwargs) + 0 * rel_h.sum()

    (row,) = measured(spec=changed(Peer("no table gradient", build)), providers=("no table gradient",))
    assert row["status"] == "wrong"
    assert "grad_rel_h" in row["reason"]


@needs_cpu
def test_a_wrong_implementation_is_an_error_of_the_command(monkeypatch, capsys):
    def function(**kwargs):
        return REL.function(**kwargs) * (1.0 if kwargs["impl"] == "reference" else 1.01)

    monkeypatch.setattr(command, "_specs", lambda names: [changed(*REL.peers, function=function)])
    assert bench("--providers", "cpu", PEER) == 1
    output = capsys.readouterr()
    assert "cpu on rel_attention_2d" in output.err
    assert "wrong: out: error" in output.err
    assert "cpu: wrong" in output.out


def test_what_cannot_run_is_listed_with_the_reason():
    def broken(inputs):
        raise RuntimeError("no kernel\nfor this")

    missing = Peer("missing", broken, requires={"no_such_module": "pip install no-such-module"})
    forward = Peer("forward only", REL.peers[0].build, forward_only=("cpu",))
    rows = measured(
        spec=changed(missing, Peer("broken", broken), forward), providers=("missing", "broken", "forward only")
    )
    reasons = {(row["provider"], row["pass"]): row["reason"] for row in rows if row["status"] == "not run"}
    assert reasons == {
        ("missing", None): "not installed: pip install no-such-module",
        ("broken", None): "RuntimeError: no kernel",
        ("forward only", "bwd"): "no backward on CPU",
        ("forward only", "both"): "no backward on CPU",
    }
    assert [row["pass"] for row in rows if row["status"] == "ok"] == ["fwd"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "B=8"], "with the keys B, heads, H, W, d_k, d_v; heads, H, W, d_k, d_v missing in 'B=8'"),
        (["--shape", TINY + ",depth=3"], "keys B, heads, H, W, d_k, d_v, .*got 'depth=3'"),
        (["--shape", TINY + ",B=3"], "each once, .*got 'B=3'"),
        (["--shape", TINY.replace("B=1", "B=0")], "positive numbers; got 'B=0'"),
        (["--shape", "large"], r"shape must be KEY=NUMBER,... or, of rel_attention_2d, one of '32x32, d_k 20, d_v 2'"),
        (["--pass", "forward"], "pass must be some of fwd,bwd,both, got 'forward'"),
        (["--providers", "egaer"], "a provider of rel_attention_2d must be one of 'cpu', .* got 'egaer'"),
        (["--threads", "0"], "threads must be at least 1, got 0"),
        (["--seconds", "-1"], "seconds must be at least 0, got -1.0"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    import tyro

    with pytest.raises(BenchError, match=message):
        command.run(tyro.cli(command.BenchConfig, args=[REL.name, *arguments]))


def test_an_op_that_is_not_there(capsys):
    assert cli.main(["bench", "attention"]) == 2
    assert "fused-attn: error: op must be one of attention_residual, " in capsys.readouterr().err


# --- what is shown and kept -------------------------------------------------------------------------------------


@needs_cpu
def test_json_csv_markdown_and_table_agree(tmp_path, capsys):
    assert bench("--providers", "cpu", "triton", PEER, "--out", tmp_path) == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / f"{REL.name}.json").read_text())
    assert not result["interrupted"]
    assert result["environment"]["torch"] == torch.__version__
    rows = list(csv.DictReader((tmp_path / f"{REL.name}.csv").open()))
    assert len(rows) == len(result["rows"]) == 7  # two with three passes, and what cannot run
    for row, expected in zip(rows, result["rows"], strict=True):
        for column in report.COLUMNS:
            value = expected.get(column)
            assert row[column] == ("" if value is None else str(value))
    table = (tmp_path / f"{REL.name}.md").read_text()
    assert table == report.markdown(result)
    for row in result["rows"]:
        if row["status"] == "ok":
            assert report._median(row) in table
            line = next(
                line for line in shown.splitlines() if f" {row['provider']} " in line and f" {row['pass']} " in line
            )
            assert f" {report._number(row['p50_ms'], 3)} " in line
            assert f" {row['best_peer_over_this']:.1f}" in line
    assert "triton: not run: it needs CUDA tensors, got cpu" in " ".join(shown.split())
    assert (tmp_path / f"{REL.name}.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_run_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    interleave, cases = measure.interleave, []

    def stops_in_the_second_case(turns, **options):
        cases.append(turns)
        if len(cases) < 2:
            return interleave(turns, **{**options, "turn_seconds": 0.0})

        def on_round(part):
            raise KeyboardInterrupt

        return interleave(turns, **{**options, "turn_seconds": 0.0, "on_round": on_round})

    monkeypatch.setattr(measure, "interleave", stops_in_the_second_case)
    second = TINY.replace("H=4", "H=5")
    third = TINY.replace("H=4", "H=6")
    arguments = ["--seconds", "0", "--no-memory", "--providers", PEER, "--out", str(tmp_path)]
    status = cli.main(["bench", REL.name, "--shape", TINY, second, third, *arguments])
    assert status == 130
    output = capsys.readouterr()
    assert "interrupted; what was measured is kept" in output.err
    result = json.loads((tmp_path / f"{REL.name}.json").read_text())
    assert result["interrupted"]
    repetitions = {(row["shape"], row["pass"]): row["repetitions"] for row in result["rows"]}
    assert {key: value for key, value in repetitions.items() if key[0] == TINY} == {
        (TINY, p): measure.LEAST_ROUNDS for p in measure.PASSES
    }
    assert {key: value for key, value in repetitions.items() if key[0] == second} == {
        (second, p): 1 for p in measure.PASSES
    }
    assert third not in {shape for shape, _ in repetitions}
    assert second in output.out
    assert report.markdown(result) == (tmp_path / f"{REL.name}.md").read_text()


def test_numbers_have_three_digits():
    values = (0.01234, 0.347, 1.0, 12.34, 123.4, 1804.2)
    assert [report._number(value, 3) for value in values] == ["0.012", "0.347", "1.00", "12.3", "123", "1,804"]


def test_memory_of_custom_sizes_is_measured_in_a_process_of_its_own():
    # 2 heads of 256 x 256 logits and weights in float32 are 1 MiB; here 8 of 576 x 576, several times.
    sizes = "B=1,heads=8,H=24,W=24,d_k=4,d_v=2"
    memory = measure.peak_memory(REL.name, sizes, "reference")
    assert set(memory) == {"fwd", "both"}
    assert memory["both"] > 2 * 8 * 576 * 576 * 4
    assert memory["both"] > memory["fwd"] > 8 * 576 * 576 * 4


def test_growth_is_drawn_against_the_sizes_that_change():
    rows = [{"shape": shape.name, "sizes": dict(shape.sizes)} for shape in REL.growth]
    sizes, label = plots._sizes(rows)
    assert label == "N = H·W"
    assert [sizes[shape.name] for shape in REL.growth] == [256, 1024, 4096, 9216]


# --- networks ---------------------------------------------------------------------------------------------------


def test_networks_agree_and_are_reported(tmp_path, capsys):
    arguments = ["--model", "aa_wrn_10_1", "--batch-size", "2", "--seconds", "0", "--coverage", "none"]
    arguments += ["stage 3, first block", "--out", str(tmp_path)]
    assert cli.main(["bench", "networks", *arguments]) == 0
    result = json.loads((tmp_path / "networks.json").read_text())
    cases = [(row["coverage"], row["impl"]) for row in result["rows"]]
    assert cases == [("none", "fused"), ("stage 3, first block", "fused"), ("stage 3, first block", "reference")]
    for row in result["rows"]:
        assert row["status"] == "ok"
        assert row["images_per_second"] == pytest.approx(2e3 / row["p50_ms"])
        assert row["repetitions"] >= 3
        assert row["peak_bytes"] > 2**20
    assert (tmp_path / "networks.md").read_text() == networks.markdown(result)
    assert capsys.readouterr().out == networks.markdown(result)


def test_a_network_with_a_wrong_op_is_noticed(monkeypatch):
    from fused_attn.ops._floor.operators import Public

    config = networks._complete(networks.NetworksConfig(model="aa_wrn_10_1", batch_size=2))
    assert networks.errors(config, "stage 3, first block") == []
    call = Public.__call__

    def wrong(self, impl, *args):
        out, *others = call(self, impl, *args)
        return out if impl == "reference" else out * 1.01, *others

    monkeypatch.setattr(Public, "__call__", wrong)
    if _extension.available():
        assert networks.errors(config, "stage 3, first block")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coverage": ("stage 4",)}, "coverage must be some of 'none', .* got 'stage 4'"),
        ({"model": "resnet34"}, "model must be an aa_wrn model, got 'resnet34'"),
        ({"model": "aa_wrn_11_1"}, "model aa_wrn_11_1: depth of a Wide ResNet must be 6n"),
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
    ],
)
def test_bad_settings_of_networks_are_named(settings, message):
    with pytest.raises(BenchError, match=message):
        networks.run(networks.NetworksConfig(**settings))


def test_bars_of_zero_and_missing_values_can_be_drawn(tmp_path):
    row = {"shape": "s", "kind": "shape", "sizes": {}, "provider": "p", "fused": False, "status": "ok", "pass": "fwd"}
    row |= {"reason": None, "p50_ms": math.pi, "extra_bytes": 0}
    environment = {"cpu": "c", "gpu": None, "threads": 1, "cores": 1, "cpu_capability": None, "torch": "2", "date": "d"}
    result = {"op": "o", "device": "cpu", "dtype": "fp32", "environment": environment, "ceilings": {}, "rows": [row]}
    plots.bars(result, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    plots.growth(result, tmp_path / "growth.png")
    assert not (tmp_path / "growth.png").exists()


def test_results_with_the_default_allocator_say_so(monkeypatch):
    kept = []
    monkeypatch.setattr(measure, "keep_freed_memory", lambda: kept.append(True))
    for keep_freed in (True, False):
        measure.interleave({"a": lambda number: {"fwd": 1.0}}, seconds=0, least=1, warmup=0, keep_freed=keep_freed)
    assert kept == [True]
    environment = {"cpu": "c", "gpu": None, "threads": 1, "cores": 1, "cpu_capability": None, "torch": "2", "date": "d"}
    result = {"op": "o", "device": "cpu", "dtype": "fp32", "allocator": "default", "environment": environment}
    assert report.stem(result) == "o_default_allocator"
    assert report.machine(result).endswith("the C library's default allocator")
    assert report.stem(result | {"allocator": "caching"}) == "o"
    assert report.stem(result | {"allocator": "jemalloc"}) == "o_jemalloc"
    assert report.machine(result | {"allocator": "jemalloc"}).endswith(", jemalloc")


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD is of Linux")
def test_a_preloaded_allocator_is_named(tmp_path):
    """One of the name, which replaces nothing: what counts is that the process has it."""
    compiler = shutil.which("cc") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no compiler makes the library to preload")
    library = tmp_path / "libjemalloc.so.2"
    (tmp_path / "empty.c").write_text("")
    subprocess.run([compiler, "-shared", "-x", "c", str(tmp_path / "empty.c"), "-o", str(library)], check=True)
    code = "from fused_attn.bench import measure; print(measure.preloaded_allocator())"
    for environment, name in (({}, "None"), ({"LD_PRELOAD": str(library)}, "jemalloc")):
        run = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | environment, stdout=subprocess.PIPE, text=True
        )
        assert run.stdout.split() == [name]


def test_no_garbage_is_collected_in_a_timed_call():
    seen = []

    def turn(number):
        seen.append(gc.isenabled())
        return {"fwd": 1.0}

    measure.interleave({"a": turn}, seconds=0, least=2, turn_seconds=0, warmup=1)
    assert seen == [True, False, False]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0

    def interrupted(number):
        if len(seen) == 5:
            raise KeyboardInterrupt
        return turn(number)

    with pytest.raises(KeyboardInterrupt):
        measure.interleave({"a": interrupted}, seconds=0, least=9, turn_seconds=0, warmup=0)
    assert gc.isenabled()


def test_tables_of_several_machines_name_each():
    def measured(op, cpu):
        return {"op": op, "device": "cpu", "environment": {"cpu": cpu, "gpu": None}}

    one = [measured("a", "X"), measured("b", "X")]
    assert report.processors(one) == "X"
    assert report.processors([measured("c", "Y"), *one, measured("d", "Y"), measured("e", "X")]) == "X (`c`, `d`: Y)"
