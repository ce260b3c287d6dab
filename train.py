"""Train a Janus model with BiCoT-GRPO.

    python train.py                                                   # the toy, on CPU, in minutes
    python train.py --max_steps 3 --output_dir OUT                    # a short run
    python train.py --output_dir OUT --resume auto                    # continue from OUT's newest checkpoint
    python train.py --view                                            # curves and samples in a browser, live
    python train.py --profile outputs/profile.json                    # where a step's time goes, instead of training
    python train.py --config FILE --dry_run --gpus 8 --gpu_gib 80     # does it fit? needs no GPU and no weights
    torchrun --nproc-per-node 8 train.py --config configs/janus-pro-7b.yaml --train_file prompts.jsonl \
        --rewards.names my_package.my_module:MyReward

`--help` explains every setting; `--print_config` prints the configuration that a command line means.
"""

import sys
from pathlib import Path

from transformers.utils import logging

from bicot.grpo.cli import parse
from bicot.grpo.distributed import resume_command
from bicot.grpo.dry_run import dry_run, require_memory
from bicot.grpo.errors import one_line_errors
from bicot.grpo.output import require_writable
from bicot.grpo.profile import profile
from bicot.grpo.trainer import train
from bicot.grpo.view import viewing


def main(words: list[str]) -> None:
    logging.disable_progress_bar()  # the run has a progress bar of its own
    config, options = parse(words)
    if options.dry_run:
        print(dry_run(config, options.gpus, options.gpu_gib))
        return
    require_memory(config, options.force_memory)
    if config.profile:
        require_writable(Path(config.profile).parent, "profile")
        profile(config, Path(config.profile))
    else:
        with viewing(config.output_dir, options.view):
            train(config)


def run() -> None:
    """The command line, as `python train.py` and as `bicot-train`."""
    with one_line_errors(sys.argv, f"; continue with: {resume_command()}"):
        main(sys.argv[1:])


if __name__ == "__main__":
    run()
