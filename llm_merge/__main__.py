"""`python -m llm_merge …`: the command line, also where several processes are started at once."""

from __future__ import annotations

import sys

from llm_merge.cli import main

if __name__ == "__main__":
    sys.exit(main())
