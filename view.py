"""Show a run live in a browser of this machine: `python -m bicot.view RUN`, during the run or after it."""

import sys

from bicot.grpo.view import main

if __name__ == "__main__":
    main(sys.argv[1:])
