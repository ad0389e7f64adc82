"""The table that is kept is that of the command, with what is small of its runs and nothing else."""

from commands import tool

from fused_attn import cli

reproduced = tool("report/reproduced")


def test_a_table_and_its_runs_are_kept(tmp_path):
    out, rows, results = tmp_path / "out", tmp_path / "rows", tmp_path / "results"
    fixed = ["--scale", "smoke", "--rows", str(rows), "--no-isolate", "--threads", "1"]
    assert cli.main(["reproduce", "elementwise/figure5", "--out", str(tmp_path / "other"), *fixed]) == 0
    assert cli.main(["reproduce", "elementwise/figure12", "--out", str(out), *fixed]) == 0
    for _ in range(2):  # again: in place of the first
        page = reproduced.keep(out, rows, results)
    text = (out / "table.md").read_text()
    assert page == results / "elementwise-figure12.md"
    assert not page.read_text().startswith("#")
    title, _, body = text.partition("\n")
    assert page.read_text().startswith(f"{title.removeprefix('# ')}.  {body.strip()}")
    kept = sorted(str(path.relative_to(results)) for path in results.rglob("*") if path.is_file())
    assert kept == [
        "elementwise-figure12.md",
        "elementwise-figure12/figure.png",
        "elementwise-figure12/one-head/seed0/config.json",
        "elementwise-figure12/one-head/seed0/log.csv",
        "elementwise-figure12/one-head/seed0/metrics.json",
        "elementwise-figure12/table.csv",
    ]
    assert all(str(tmp_path) not in path.read_text() for path in results.rglob("*") if path.suffix in (".json", ".csv"))
    csv = results / "elementwise-figure12" / "table.csv"
    assert csv.read_bytes() == (out / "table.csv").read_bytes()
