"""torchrun --nproc-per-node 2 tests/zero_training.py JOB OUT: the runs of tests/test_zero.py, on a CPU; without
torchrun, those that go on in one process.

Each run writes to OUT/<its name>. Rank 1 rolls out in more chunks than rank 0, and has no held-out prompt.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import training
from tiny import ROOT, tiny_policy

from bicot.grpo.cli import parse_config
from bicot.grpo.distributed import Ranks
from bicot.grpo.trainer import Trainer
from bicot.grpo.zero import ZeroAdamW, engine_config
from bicot.model.weights import gathered

STEPS, SAVED = 3, 2
SHARDED = "zero3_sharded.json"  # norms too, which ZeRO-3 by itself keeps whole
STAGES = {"ddp": None, **{name: f"{name}.json" for name in ("zero1", "zero2", "zero2_offload", "zero3")}}
DTYPES = ("float32", "bfloat16")
FACTORS = (0.0, 1.0, float("nan"))
# run -> what it resumes from, after SAVED steps; the first word of a name is its stage
RESUMED = {f"{stage} resumed": f"{stage} float32" for stage in STAGES}
RESUMED |= {f"{stage} from {other}": f"{other} float32" for stage, other in [("zero3", "ddp"), ("ddp", "zero3")]}
RESUMED |= {"zero1 resumed bfloat16": "zero1 bfloat16", "zero3 from zero2 bfloat16": "zero2 bfloat16"}
# the same on two ranks after one process, and in one process after two ranks
GROWN = {f"{stage} from one": "one float32" for stage in ("zero1", "zero2", "zero3")}
GROWN |= {"ddp from one bfloat16": "one bfloat16", "ddp from one lora": "one lora"}
SHRUNK = {f"{stage} alone": f"{stage} float32" for stage in ("zero1", "zero2", "zero3")}
SHRUNK |= {"ddp alone bfloat16": "ddp bfloat16", "ddp alone lora": "ddp lora", "zero2 alone lora": "zero2 lora"}
LORA = {"lora_r": 4, "learning_rate": 0.02}


def words(job: Path, output: Path, **changes: Any) -> list[str]:
    settings = dict(
        eval_file=job / "heldout.jsonl", per_device_train_batch_size=1, max_steps=STEPS, save_steps=SAVED,
        sample_steps=0, learning_rate=1e-3, beta=0.1, num_iterations=2, dtype="float32", max_grad_norm=0.5,
        weight_decay=0.1, save_total_limit="null",
    )  # fmt: skip
    return training.words(job, output, **settings | changes)


def run(job: Path, output: Path, ranks: Ranks, **changes: Any) -> None:
    gc.freeze()  # the trainer and DeepSpeed collect garbage, which takes 0.3 s if it scans all that was imported
    Trainer(parse_config(words(job, output, **changes)), ranks).run()


def step_of_gradient(factor: float, job: Path, ranks: Ranks, stage: str) -> dict[str, Any]:
    """One step of bfloat16 weights, all of whose gradients are `factor`, or none -> what comes of it."""
    words_ = words(job, job, dtype="bfloat16", deepspeed=f"{ROOT}/configs/{stage}.json", weight_decay=0.0)
    config, policy = parse_config(words_), tiny_policy()
    policy.model.bfloat16()
    settings = engine_config(config, ranks)
    assert settings
    optimizer = ZeroAdamW(policy, config, settings, ranks)
    before = gathered(policy.model, True) or {k: v.clone() for k, v in policy.model.state_dict().items()}
    for _ in range(config.gradient_accumulation_steps):
        optimizer.backward(lambda: (policy.text_head.weight.float().sum() * factor, None), ranks, last=True)
    seen: dict[str, Any] = {"elements": policy.config.text_config.vocab_size * policy.config.text_config.hidden_size}
    try:
        seen["norm"] = optimizer.step(ranks).item()
    except FloatingPointError as error:
        seen["error"] = str(error)
    after = gathered(policy.model, True) or policy.model.state_dict()
    seen["moved"] = [name for name in before if not torch.equal(before[name], after[name])]
    return seen


def main() -> None:
    job, out = map(Path, sys.argv[1:])
    sys.path.insert(0, str(job))
    ranks = Ranks.start()
    uneven = {"rollout_max_rows": (8, 4)[ranks.rank], "per_device_train_batch_size": 2 // ranks.size}
    runs: dict[str, dict[str, Any]] = {}
    if ranks.size == 2:
        runs |= {f"{stage} {dtype}": {"dtype": dtype} for stage in STAGES for dtype in DTYPES}
        runs |= {f"{stage} lora": LORA for stage in ("ddp", "zero2")}
        for how in ("zero3 true", "zero3 selective", "zero2 selective"):
            runs[f"{how} checkpointing"] = {"gradient_checkpointing": how.split()[1], "stop_after": 1}
    for name, other in (RESUMED | GROWN if ranks.size == 2 else SHRUNK).items():
        runs[name] = LORA if "lora" in name else {"dtype": "bfloat16" if "bfloat16" in name else "float32"}
        runs[name] = {**runs[name], "resume": str(out / other / f"checkpoint-{SAVED:06d}")}
    for name, changes in runs.items():
        file = STAGES[name.split()[0]]
        settings = out / SHARDED if "checkpointing" in name and "zero3" in name else ROOT / "configs" / str(file)
        run(job, out / name, ranks, **uneven, **changes, deepspeed=settings if file else "null")
    if ranks.size == 1:
        return ranks.close()
    seen = {
        stage: {str(factor): step_of_gradient(factor, job, ranks, stage) for factor in FACTORS}
        for stage, file in STAGES.items()
        if file
    }
    (out / f"rank{ranks.rank}.json").write_text(json.dumps(seen))
    ranks.close()


if __name__ == "__main__":
    main()
