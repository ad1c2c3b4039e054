"""One process of several, as torchrun starts them; a script for tests/test_ranks.py.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=PORT python tests/one_rank.py SEQUENCES [words of `nas` ...]

Prints what the ranks together make of values of single sequences, and then runs the command.
"""

from __future__ import annotations

import json
import sys

import torch

from blocks.ranks import join
from nas.__main__ import main as nas_main


def main() -> None:
    torch.set_num_threads(1)
    ranks, device = join(torch.device("cpu"))
    sequences, *words = sys.argv[1:]
    values = torch.arange(2.0 * int(sequences), device=device).view(2, -1)
    share = values[:, ranks.share(int(sequences))]
    made = {
        "gathered": ranks.gather(share).tolist(),
        "sum": float(ranks.sum_(share.sum())),
        "agreed": ranks.agree({"rank": ranks.rank, "share": ranks.share(100)})["rank"],
    }
    print(json.dumps(made), flush=True)
    if words:
        sys.argv = ["nas", *words]
        nas_main()


if __name__ == "__main__":
    main()
