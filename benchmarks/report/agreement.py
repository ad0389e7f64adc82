"""How far the ratios to the best peer differ between two runs of ``fused-attn bench``.

Run from the repository root: ``python benchmarks/report/agreement.py FIRST SECOND [PERCENT]`` with two folders that
``--out`` wrote; fails when a fused op's ratio in one is more than PERCENT (10) off that in the other, or nothing is in
both.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

Ratios = dict[tuple[str, ...], float]


def ratios(folder: Path) -> Ratios:
    """(file, shape, implementation, pass) -> the ratio to the best peer."""
    found: Ratios = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        for row in result.get("rows", ()) if isinstance(result, dict) else ():
            if row.get("fused") and row.get("best_peer_over_this"):
                found[path.stem, row["shape"], row["provider"], row["pass"]] = row["best_peer_over_this"]
    return found


def differences(first: Ratios, second: Ratios) -> Ratios:
    """Relative difference of the ratios in both, largest first."""
    both = {key: abs(first[key] - second[key]) / min(first[key], second[key]) for key in first.keys() & second.keys()}
    return dict(sorted(both.items(), key=lambda item: -item[1]))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs=2, metavar="FOLDER")
    parser.add_argument("percent", type=float, nargs="?", default=10.0)
    options = parser.parse_args(arguments)
    first, second = (ratios(folder) for folder in options.folders)
    limit, found = options.percent / 100, differences(first, second)
    for key, difference in found.items():
        print(f"{difference:6.1%}  {first[key]:6.2f}x  {second[key]:6.2f}x  {', '.join(key)}")
    return int(not found or max(found.values()) > limit)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
