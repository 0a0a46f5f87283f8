"""What `tests.launch.run_ranks` starts on every rank: `python -m tests.rank_main MODULE:FUNCTION FOLDER ARGUMENTS`.

Writes the function's result to `FOLDER/<rank>.json`. If the function raises, the traceback is printed and the rank
leaves at once with exit code 1, by which the launcher ends the other ranks, who may be waiting for this one.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

from tests.launch import RANK_VARIABLES


def main() -> None:
    function, folder, arguments = sys.argv[1:]
    rank = next(os.environ[name] for name in RANK_VARIABLES if name in os.environ)
    try:
        module, _, name = function.partition(":")
        result = getattr(importlib.import_module(module), name)(**json.loads(arguments))
        Path(folder, f"{rank}.json").write_text(json.dumps(result))
    except BaseException:
        print(f"rank {rank}, {function}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        os._exit(1)


if __name__ == "__main__":
    main()
