#!/bin/sh
# One process against two: the same scores? Usage: benchmarks/ranks.sh PARENT DIRECTORY [nas score options ...]
# Prints the largest difference of the two score tables, and the seconds of each.
set -eu
parent=$1 directory=$2
shift 2
score="nas score --parent $parent --compute-dtype float32"
python3 -m $score --run "$directory/one" "$@"
python3 -m torch.distributed.run --nproc-per-node 2 -m -- $score --run "$directory/two" "$@"
python3 - "$directory" <<'PY'
import json, pathlib, sys
from nas.table import load_table
one, two = (pathlib.Path(sys.argv[1]) / name for name in ("one", "two"))
pairs = [(a, b) for x, y in zip(load_table(one / "scores.csv"), load_table(two / "scores.csv")) for a, b in zip(x, y)]
print("candidates", len(pairs), "largest score", max(a.score for a, _ in pairs))
for name in ("score", "one_pass", "one_pass_seq", "exact"):
    values = [(getattr(a, name), getattr(b, name)) for a, b in pairs]
    print(name, "largest difference", max((abs(x - y) for x, y in values if x is not None), default=None))
print({run.name: json.loads((run / "score.json").read_text())["seconds"] for run in (one, two)})
PY
