"""The compile report: every Triton kernel compiles without a GPU and spills nowhere, and the report says what is so."""

import json
import os
from types import SimpleNamespace

import pytest
from commands import ROOT, environment, python, tool

pytest.importorskip("triton")

REPORT = json.loads((ROOT / "benchmarks" / "results" / "compile_report.json").read_text())


@pytest.fixture(scope="module")
def report():
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter replaces the kernels")
    return tool("gpu/compile_report")


@pytest.mark.long
def test_every_kernel_compiles_without_spills_as_the_report_says():
    options = ("--check", "--quick", "--arch", "sm_80", "--arch", "sm_90")
    result = python("benchmarks/gpu/compile_report.py", *options, env=environment(TRITON_INTERPRET="0"))
    assert result.returncode == 0, result.stdout + result.stderr


def test_report_lists_every_case(report):
    assert report.unlisted(REPORT) == []


def test_spills_failures_and_stale_rows_are_problems(report):
    good = REPORT["rows"][0]
    assert report.problems([good]) == []
    assert report.differences([good], REPORT, complete=False) == []
    assert "spills" in report.problems([good | {"spills": 3}])[0]
    assert report.problems([good | {"spills": 3, "target": "gfx942"}]) == []
    assert "does not compile" in report.problems([good | {"error": "PTXASError: no"}])[0]
    current = REPORT | {"triton": report.triton.__version__}
    assert "out of date" in report.differences([good | {"registers": 1}], current, complete=False)[0]
    assert "not in the report" in report.differences([good | {"case": "new"}], current, complete=False)[0]
    without_last = REPORT["rows"][:-1]
    assert len(report.differences(without_last, current, complete=True)) == 1


def test_committed_report_has_no_problem_and_names_the_versions_tried(report):
    assert report.problems(REPORT["rows"]) == []
    assert {"3.6.0", REPORT["triton"]} <= REPORT["versions"].keys()
    assert {row["op"] for row in REPORT["peers"]["rows"]} >= {"FlexAttention"}
    kernels = {row["kernel"] for row in REPORT["rows"] if row["op"] == "squeeze_excite"}
    names = "squeeze_fwd", "layer_fwd", "scale_fwd", "scale_bwd", "layer_bwd", "parameters_bwd", "squeeze_bwd"
    assert kernels == {f"{name}_kernel" for name in names}
    keys = [tuple(row[name] for name in report.KEY) for row in REPORT["rows"]]
    assert len({*keys}) == len(keys)


CODE = """
    /*0000*/ LDC R1, c[0x0][0x28] ;
    /*0010*/ LDGSTS.E.BYPASS.LTC128B.128 [R2], desc[UR4][R4.64] ;
    /*0020*/ MUFU.EX2 R3, R3 ;
    /*0030*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
    /*0040*/ @!P0 FFMA R4, R4, R5, R6 ;
    /*0050*/ @P1 BRA 0x10 ;
    /*0060*/ STG.E.64 desc[UR4][R2.64], R4 ;
    /*0070*/ EXIT ;
    /*0080*/ BRA 0x80 ;
    /*0090*/ NOP ;
"""


def parse(code: str) -> list[tuple[int, str]]:
    lines = [line.split("*/ ") for line in code.strip().splitlines()]
    return [(int(address.strip()[2:], 16), text.rstrip(" ;")) for address, text in lines]


def test_loop_is_found_and_its_instructions_are_classified(report):
    code = report.gpu_code
    (loop,) = code.innermost_loops(parse(CODE))
    assert len(loop) == 5
    assert code.classify(loop) == {"shared": 1, "exp": 1, "tensor": 1, "fp32": 1, "control": 1}
    assert code.access(loop[0]) == code.Access(shared=4, l2=512, asked=512)
    assert code.issued_products(loop) == (2 * 16 * 8 * 16, 0)
    by_byte = SimpleNamespace(bytes_per_tile=512, options={"num_warps": 1})
    assert code.working_code(parse(CODE), by_byte) == loop
    straight = [line for line in parse(CODE) if "BRA 0x10" not in line[1]]
    assert [code.mnemonic(text) for text in code.working_code(straight, by_byte)][-1] == "EXIT"


def test_products_are_those_of_the_loop_and_of_the_tensor_cores(report):
    ttir = """
    %0 = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x32xbf16> * tensor<32x16xbf16> -> tensor<64x16xf32>
    %1 = scf.for %i = %x to %y step %z iter_args(%d = %e) -> (tensor<64x64xf32>)  : i32 {
      %2 = tt.dot %f, %g, %h, inputPrecision = tf32 : tensor<64x32xbf16> * tensor<32x64xbf16> -> tensor<64x64xf32>
      %3 = scf.if %k -> (f32) {
        %4 = tt.dot %f, %g, %h, inputPrecision = tf32 : tensor<64x8xf32> * tensor<8x64xf32> -> tensor<64x64xf32>
      } else {
        %5 = tt.dot %f, %g, %h : tensor<64x8xf32> * tensor<8x64xf32> -> tensor<64x64xf32>
      }
    }
    """
    found = report.gpu_code.products(ttir)
    assert [(product.kind, product.flops) for product in found] == [("16-bit", 2**18), ("tf32", 2**16)]


def test_bound_is_the_slowest_unit(report):
    bounds = report.gpu_bounds.bounds
    forward = {"exp": 1.0, "fp32": 2.0, "max": 1.0}
    clocks = bounds("sm_90", "score", forward, 0.0, 0.0, 0.0, 0.0, {"16-bit": 88.0})
    assert clocks["exp"] == max(clocks.values()) == 1024 / 16
    assert clocks["tensor"] == 1024 * 88 / 4096
    assert clocks["issue"] == 1024 * 4 / 128
    # A byte of work crosses device memory however few instructions ask for it.
    clocks = bounds("sm_90", "byte", {"fp32": 0.5}, 0.0, 0.0, 0.0, 0.0, {})
    assert clocks["global"] == max(clocks.values())
    assert clocks["global"] == pytest.approx(1024 / (4.8e12 / 132 / 1.98e9))
