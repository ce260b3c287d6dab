"""A run's page in a browser of this machine, live: python -m bicot.view RUN, beside the run or after it."""

from bicot.grpo.view import main

if __name__ == "__main__":
    main()
