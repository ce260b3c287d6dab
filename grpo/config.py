"""Every setting of a run, its default and its meaning.

Defaults are the published ones of T2I-R1 (Janus-Pro-7B) where it has the setting, and settings bear the names of TRL's
GRPOConfig where that has them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from ..kernels.group_advantages import Combine, Scale
from ..kernels.grpo_loss import KLEstimator, Level, LossType
from ..model.attention import Implementation
from ..model.engine import KVDtype
from ..model.policy import PUBLISHED_FREEZE
from ..model.prompts import ChatTemplate
from ..rewards.config import RewardConfig, words_of

TRACKERS = {"tensorboard", "wandb", "trackio"}
STREAMS = ("text", "image")
PerStream = float | dict[str, float]  # one number, or one for each of STREAMS
PER_STREAM = ("beta", "epsilon", "epsilon_high", "entropy_coef")


@dataclass
class Config:
    """A run.

    Args:
        model_name_or_path: Janus checkpoint, in Hugging Face layout or DeepSeek's: a folder or a hub id.
        dtype: of the policy's weights; bfloat16 trains through float32 master weights.
        freeze: prefixes of parameter names that do not train.
        lora_r: rank of LoRA adapters (PEFT), which then train instead of the weights; 0 = none.
        lora_alpha: adapters are scaled by lora_alpha / lora_r.
        lora_dropout: of the adapters' input, but not of adapted heads.
        lora_target_modules: linear layers that get adapters, by the last part of their name, outside `freeze`.
        gradient_checkpointing: recompute activations in the backward pass. true recomputes all: the least memory, about
            a third more time. selective recomputes no matrix product: a third less memory, little more time. auto takes
            the first of false, selective and true that fits this GPU.
        attn_implementation: of training: sdpa is PyTorch's, padded; varlen (PyTorch), flash_attn and xformers pad
            nothing, and need a GPU and bfloat16. auto is the fastest of them on the first rows, timed on each rank.
        distributed: what several ranks share: ddp nothing, deepspeed (ZeRO) masters, gradients and weights as its JSON
            says; auto is deepspeed where `deepspeed` is given.
        deepspeed: DeepSpeed's JSON, such as configs/zero2.json; what is "auto" there is taken from these settings.
        ddp_timeout: seconds that ranks wait for each other before the run ends; not while rank 0 writes.
        train_file: prompts in T2I-R1's JSONL schema.
        eval_file: held-out prompts in the same schema, scored before and after training; null = none.
        eval_steps: score them every so many steps too, and after the last, with the same draws; null = do not.
        skip_bad_prompts: leave out prompts that cannot be read or scored, and list them; otherwise they are an error.
        num_eval_generations: samples of each held-out prompt.
        chat_template: role names of the prompts; t2i_r1 as published, janus as the model was tuned.
        system_prompt: first line of the planning prompt; null = bicot's own.
        reasoning_prompt_path: file with the planning instruction, `{}` where the prompt goes; null = bicot's own.
        num_generations: G, samples of one prompt.
        per_device_train_batch_size: prompts of one micro-batch on one device.
        gradient_accumulation_steps: micro-batches of one step; all of them are rolled out together.
        micro_batch_tokens: most tokens of one micro-batch, a prompt counted once for its group; the two settings above
            then only multiply to the prompts of a step. A group that fits is not cut, and a sample never is. The loss
            stays the same. auto takes the most that fits this GPU, after gradient_checkpointing, and is null without a
            GPU; null = per_device_train_batch_size prompts. verl's ppo_max_token_len_per_gpu.
        max_completion_length: most tokens of a plan.
        temperature: of the plan.
        top_k: of the plan, 0 = all tokens.
        top_p: of the plan.
        image_temperature: of the picture.
        image_top_k: of the picture, 0 = all tokens.
        image_top_p: of the picture.
        cfg_weight: classifier-free guidance of the picture, 1 = none.
        eval_cfg_weight: that of held-out evaluation; null = cfg_weight.
        rollout_max_rows: most rows of one decode step (a guided picture takes two).
        rollout_kv_gib: limit of the KV cache in GiB, kept for the whole run; null = half of the GPU memory
            that is free when it grows. Less makes smaller chunks.
        rollout_kv_dtype: auto = that of the weights; fp8 = half the memory of bfloat16, at a small error, and slower.
        rollout_kv_release: give the KV cache back after each rollout; CUDA graphs are then captured anew each step.
        dynamic_sampling: rounds in which others replace prompts whose samples all have one reward (DAPO); 0 = none.
        rewards: what scores the pictures.
        reward_weights: one for each of rewards.names, null = all 1.
        scale_rewards: what centred rewards are divided by.
        multi_objective_aggregation: how several rewards become one advantage.
        beta: weight of the KL to the initial model; 0 loads no reference model. This, epsilon, epsilon_high and
            entropy_coef take one number, or one for each stream: {text: 0.01, image: 0.0}.
        reference_device: cpu = the initial model waits in host memory, and is on the GPU for its own pass alone.
        sync_ref_model: the reference follows the policy: every ref_model_sync_steps steps it becomes
            ref_model_mixup_alpha · policy + (1 - ref_model_mixup_alpha) · reference.
        ref_model_sync_steps: see sync_ref_model.
        ref_model_mixup_alpha: see sync_ref_model.
        kl_estimator: Schulman's k1, k2 or k3.
        use_bias_correction_kl: multiply the KL by the ratio, so that its gradient is that of the reverse KL; TRL's
            default is true.
        loss_type: normalisation and clipping of the loss; dapo divides by all tokens of the step, bnpo by those of the
            micro-batch, as the published code does.
        policy_logits: which log-probs train; conditional as published, guided those the picture was drawn from.
        detach_uncond: of guided log-probs, no gradient goes through the unconditional rows, as in ReasonGen-R1.
        epsilon: lower clip range of the ratio.
        epsilon_high: upper clip range, null = epsilon.
        delta: second upper bound of the ratio, null = none.
        entropy_coef: weight of the entropy bonus.
        entropy_target: adapt entropy_coef so that the mean entropy of tokens, in nats, does not fall below this: one
            number, or one for each stream; null = entropy_coef stays.
        entropy_coef_delta: how much it changes in a step.
        entropy_coef_min: least that it becomes.
        entropy_coef_max: most that it becomes.
        token_weights: function `package.module:name` that weighs each token's term of the loss, such as
            examples.entropy_selective:weights; null = all tokens weigh 1, at no cost.
        num_iterations: optimizer updates on one rollout.
        importance_sampling_level: ratios of single tokens, or of sequences: one for a sample's plan and picture (GSPO).
            loss_type gspo is grpo with it.
        importance_sampling_correction: weigh tokens by ratios of training to sampling log-probs, as
            importance_sampling_mode says.
        importance_sampling_mode: ratios of tokens or of sequences (plan and picture); one above
            importance_sampling_clip_max becomes that bound (truncate) or 0 (mask).
        importance_sampling_clip_max: bound of those weights.
        off_policy_mask_threshold: samples of negative advantage have no policy loss where the mean of sampling minus
            training log-probs of their tokens is above it (DeepSeek-V3.2); null = none.
        mask_truncated_completions: plans cut off at max_completion_length do not train, and the loss does not count
            their tokens; their pictures do.
        optim: adamw_torch_fused keeps float32 masters; adamw_8bit (torchao) keeps none, and moments of 8 bits: a third
            of the memory. Its bfloat16 weights are rounded at random.
        learning_rate: of AdamW.
        adam_beta1: of AdamW.
        adam_beta2: of AdamW.
        adam_epsilon: of AdamW.
        weight_decay: of AdamW.
        max_grad_norm: gradient clipping.
        ema_decay: of a float32 average of the trained weights, updated after each optimizer update; it is evaluated in
            their place, and saved as a model in a checkpoint's folder ema; null = none.
        lr_scheduler_type: transformers' name of the schedule.
        warmup_steps: of the schedule.
        max_steps: steps (rollout and update) of the whole run; the schedule ends there.
        stop_after: end this run after that step with a checkpoint, the schedule as it is; null = run to the end.
        seed: of everything.
        output_dir: where everything is written.
        overwrite_output_dir: delete an earlier run in output_dir.
        move_output_dir: move an earlier run in output_dir to output_dir-1, or the first number that is free, unless
            overwrite_output_dir deletes it. Without either setting, an earlier run is an error.
        resume: auto (newest checkpoint in output_dir, or a new run if there is none), a checkpoint folder, or null.
        stop_on_alarm: save a checkpoint and end where an alarm is raised, such as a reward that stays constant.
        save_steps: write a checkpoint every so many steps; there is always one at the end.
        save_total_limit: keep that many newest checkpoints, null = all.
        load_best_model_at_end: write a checkpoint where an evaluation is the best so far, keep the last of these beyond
            save_total_limit, and show it as the result at the end.
        metric_for_best_model: the metric by which evaluations are compared; its name begins with heldout/.
        greater_is_better: whether more of it is better.
        sample_steps: write a grid of samples every so many steps, 0 = never.
        save_rollouts: folder where each step's rollout is written, a file for each rank: prompts, plans, tokens,
            log-probs and scores; null = none.
        save_rollout_images: the pictures too.
        replay: train from the rollouts of this folder, with neither engine nor rewards; null = draw them.
        rollout_only: only draw, score and save rollouts, all with the initial model: no reference, optimizer or update.
        profile: instead of training, write to this .json where a step's time goes, its picture and trace beside it.
        push_to_hub: upload the trained model to the Hugging Face Hub at the end; the login is checked at the start.
        hub_model_id: repository there, such as user/name; null = output_dir's name, under your own.
        hub_private_repo: whether a repository that is made then is private; null = as the hub's organisation has it.
        report_to: trackers besides metrics.jsonl: tensorboard, wandb, trackio. This, freeze and reward_weights take a
            list, or one string with commas.
    """

    model_name_or_path: str = "deepseek-community/Janus-Pro-7B"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    freeze: list[str] | str = field(default_factory=lambda: list(PUBLISHED_FREEZE))
    lora_r: int = 0
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | str = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    gradient_checkpointing: bool | Literal["selective", "auto"] = False
    attn_implementation: Implementation = "sdpa"
    distributed: Literal["auto", "ddp", "deepspeed"] = "auto"
    deepspeed: str | None = None
    ddp_timeout: float = 1800.0

    train_file: str = "t2i_r1_prompts.jsonl"
    eval_file: str | None = None
    eval_steps: int | None = None
    skip_bad_prompts: bool = False
    num_eval_generations: int = 1
    chat_template: ChatTemplate = "t2i_r1"
    system_prompt: str | None = None
    reasoning_prompt_path: str | None = None

    num_generations: int = 8
    per_device_train_batch_size: int = 1
    gradient_accumulation_steps: int = 2
    micro_batch_tokens: int | Literal["auto"] | None = None
    max_completion_length: int = 1024
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    image_temperature: float = 1.0
    image_top_k: int = 0
    image_top_p: float = 1.0
    cfg_weight: float = 5.0
    eval_cfg_weight: float | None = None
    rollout_max_rows: int = 256
    rollout_kv_gib: float | None = None
    rollout_kv_dtype: KVDtype = "auto"
    rollout_kv_release: bool = False
    dynamic_sampling: int = 0

    rewards: RewardConfig = field(default_factory=RewardConfig)
    reward_weights: list[float] | float | str | None = None
    scale_rewards: Scale = "group"
    multi_objective_aggregation: Combine = "sum_then_normalize"

    beta: PerStream = 0.01
    reference_device: Literal["cpu"] | None = None
    sync_ref_model: bool = False
    ref_model_sync_steps: int = 512
    ref_model_mixup_alpha: float = 0.6
    kl_estimator: KLEstimator = "k3"
    use_bias_correction_kl: bool = False
    loss_type: LossType = "dapo"
    policy_logits: Literal["conditional", "guided"] = "conditional"
    detach_uncond: bool = False
    epsilon: PerStream = 0.2
    epsilon_high: PerStream | None = None
    delta: float | None = None
    entropy_coef: PerStream = 0.0
    entropy_target: PerStream | None = None
    entropy_coef_delta: float = 0.005
    entropy_coef_min: float = 0.0
    entropy_coef_max: float = 1.0
    token_weights: str | None = None
    num_iterations: int = 1
    importance_sampling_level: Level = "token"
    importance_sampling_correction: bool = False
    importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "token_truncate"
    )
    importance_sampling_clip_max: float = 3.0
    off_policy_mask_threshold: float | None = None
    mask_truncated_completions: bool = False

    optim: Literal["adamw_torch_fused", "adamw_8bit"] = "adamw_torch_fused"
    learning_rate: float = 1e-6
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float | None = None
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    max_steps: int = 1600
    stop_after: int | None = None

    seed: int = 0
    output_dir: str = "outputs/t2i-r1"
    overwrite_output_dir: bool = False
    move_output_dir: bool = False
    resume: str | None = None
    stop_on_alarm: bool = False
    save_steps: int = 400
    save_total_limit: int | None = None
    load_best_model_at_end: bool = False
    metric_for_best_model: str = "heldout/reward"
    greater_is_better: bool = True
    sample_steps: int = 50
    save_rollouts: str | None = None
    save_rollout_images: bool = False
    replay: str | None = None
    rollout_only: bool = False
    profile: str | None = None
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool | None = None
    report_to: list[str] | str = field(default_factory=list)

    def __post_init__(self) -> None:
        self.freeze, self.report_to = words_of(self.freeze), words_of(self.report_to)
        self.lora_target_modules = words_of(self.lora_target_modules)
        _require(self.lora_r >= 0, "lora_r", self.lora_r, "0 or more")
        _require(self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "above 0")
        _require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "in [0, 1)")
        _require(bool(self.lora_target_modules), "lora_target_modules", self.lora_target_modules, "at least one name")
        _require(set(self.report_to) <= TRACKERS, "report_to", self.report_to, f"any of {', '.join(sorted(TRACKERS))}")
        for name in ("num_generations", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in (
            "num_iterations",
            "max_completion_length",
            "save_steps",
            "num_eval_generations",
            "ref_model_sync_steps",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("stop_after", "save_total_limit", "eval_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1, or null")
        _require(
            self.num_generations >= 2, "num_generations", self.num_generations, "at least 2: one alone has no advantage"
        )
        tokens = self.micro_batch_tokens
        _require(
            tokens in (None, "auto") or int(tokens) >= 1, "micro_batch_tokens", tokens, "at least 1, auto, or null"
        )
        _require(self.rollout_max_rows >= 1, "rollout_max_rows", self.rollout_max_rows, "at least 1")
        kv_gib = self.rollout_kv_gib
        _require(kv_gib is None or kv_gib > 0, "rollout_kv_gib", kv_gib, "above 0, or null")
        for name in ("temperature", "image_temperature"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0: greedy samples are all alike")
        positive = (
            "ddp_timeout",
            "max_grad_norm",
            "adam_epsilon",
            "importance_sampling_clip_max",
            "entropy_coef_delta",
        )
        for name in positive:
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        threshold = self.off_policy_mask_threshold
        _require(threshold is None or threshold > 0, "off_policy_mask_threshold", threshold, "above 0, or null")
        _require(self.delta is None or self.delta > 0, "delta", self.delta, "above 0, or null")
        least, most = self.entropy_coef_min, self.entropy_coef_max
        _require(0 <= least <= most, "entropy_coef_min", least, f"0 or more, and not above entropy_coef_max={most}")
        for name in (*PER_STREAM, "entropy_target"):
            value = getattr(self, name)
            one_each = not isinstance(value, dict) or set(value) == set(STREAMS)
            _require(one_each, name, value, f"one number, or one for each of {' and '.join(STREAMS)}")
            for label, number in _labelled(name, value):
                _require(number is None or math.isfinite(number), label, number, "finite")
                if name in ("beta", "entropy_coef"):
                    _require(number >= 0, label, number, "0 or more")
                else:
                    optional = ", or null" if name in ("epsilon_high", "entropy_target") else ""
                    _require(number is None or number > 0, label, number, f"above 0{optional}")
        for name in ("adam_beta1", "adam_beta2"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        alpha, decay = self.ref_model_mixup_alpha, self.ema_decay
        _require(0 < alpha <= 1, "ref_model_mixup_alpha", alpha, "in (0, 1]")
        _require(decay is None or 0 < decay < 1, "ema_decay", decay, "in (0, 1), or null")
        for name in ("learning_rate", "weight_decay", "top_k", "image_top_k", "sample_steps"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(0 <= self.dynamic_sampling <= 1000, "dynamic_sampling", self.dynamic_sampling, "0 to 1000")
        _require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        for name in ("top_p", "image_top_p"):
            _require(0 < getattr(self, name) <= 1, name, getattr(self, name), "in (0, 1]")
        for item in fields(self):
            value = getattr(self, item.name)
            _require(not isinstance(value, float) or math.isfinite(value), item.name, value, "finite")
        _require(0 <= self.seed < 2**31, "seed", self.seed, "in [0, 2^31)")
        names = self.rewards.names
        _require(bool(names), "rewards.names", names, "at least one reward, such as scene or my_module:MyReward")
        weights = self.reward_weights
        if isinstance(weights, (str, int, float)):
            try:
                weights = self.reward_weights = [float(word) for word in words_of(str(weights))]
            except ValueError:
                raise ValueError(f"reward_weights={weights!r} must be numbers") from None
        if weights is not None and len(weights) != len(names):
            raise ValueError(f"reward_weights has {len(weights)} entries for {len(names)} rewards {names}")
        _require(all(map(math.isfinite, weights or [])), "reward_weights", weights, "finite")
        if self.distributed not in ("auto", "deepspeed" if self.deepspeed else "ddp"):
            needs = "a file, such as configs/zero2.json" if self.deepspeed is None else "null"
            raise ValueError(f"distributed={self.distributed} needs deepspeed={needs}")
        if self.attn_implementation not in ("sdpa", "auto") and self.dtype != "bfloat16":
            name = self.attn_implementation
            raise ValueError(f"attn_implementation={name} needs dtype=bfloat16, not {self.dtype}")
        if self.deepspeed and self.optim != "adamw_torch_fused":
            raise ValueError(f"optim={self.optim} does not go with deepspeed: it trains with adamw_torch_fused")
        if self.micro_batch_tokens is not None and (why := self.needs_equal_micro_batches):
            raise ValueError(f"micro_batch_tokens does not go with {why}: leave one out")
        if self.ema_decay is not None and self.deepspeed:
            raise ValueError("ema_decay does not go with deepspeed, which holds the weights in shares: leave one out")
        if self.sync_ref_model and (self.lora_r or not self.kl_streams):
            why = "beta is 0: there is none" if not self.lora_r else "lora_r: it is the policy without adapters"
            raise ValueError(f"sync_ref_model moves the reference model, which does not go with {why}")
        if self.reference_device and self.lora_r:
            raise ValueError(
                "reference_device=cpu does not go with lora_r: the reference is the policy without adapters"
            )
        if self.rollout_only and (self.save_rollouts is None or self.replay or self.resume):
            raise ValueError("rollout_only needs save_rollouts, and neither replay nor resume")
        if self.replay and self.save_rollouts:
            raise ValueError("replay reads rollouts, and save_rollouts would write the same again: leave one out")
        if self.detach_uncond and self.policy_logits != "guided":
            raise ValueError("detach_uncond needs policy_logits=guided: otherwise no unconditional row trains")
        if self.importance_sampling_mode != "token_truncate" and not self.importance_sampling_correction:
            raise ValueError(
                f"importance_sampling_mode={self.importance_sampling_mode} needs importance_sampling_correction=true"
            )
        if self.eval_steps and not self.eval_file:
            raise ValueError(f"eval_steps={self.eval_steps} needs eval_file, the prompts to score")
        if self.rewards.heldout and not self.eval_file:
            raise ValueError(f"rewards.heldout={self.rewards.heldout} needs eval_file, the prompts to score")
        if self.load_best_model_at_end and (not self.eval_steps or self.replay or self.rollout_only):
            raise ValueError("load_best_model_at_end needs eval_steps, and neither replay nor rollout_only")
        if self.hub_model_id and not self.push_to_hub:
            raise ValueError(f"hub_model_id={self.hub_model_id!r} needs push_to_hub=true")
        if self.push_to_hub and self.rollout_only:
            raise ValueError("push_to_hub needs a model that trains, not rollout_only")
        if self.loss_type == "cispo" and self.epsilon_high is None:
            raise ValueError("loss_type=cispo clips its weights at epsilon_high: set it (5.0 is recommended)")

    def of_stream(self, stream: str) -> dict[str, Any]:
        """beta, epsilon, epsilon_high and entropy_coef of the text or the image."""
        values = {name: getattr(self, name) for name in PER_STREAM}
        return {name: value[stream] if isinstance(value, dict) else value for name, value in values.items()}

    @property
    def kl_streams(self) -> tuple[str, ...]:
        """The streams with a KL to the reference; none need no reference."""
        return tuple(stream for stream in STREAMS if self.of_stream(stream)["beta"])

    @property
    def needs_equal_micro_batches(self) -> str:
        """The setting for which it matters where micro-batches are cut, and why; empty if there is none."""
        if self.deepspeed:
            return "deepspeed, which wants as many micro-batches on each rank"
        if self.loss_type == "bnpo":
            return "loss_type=bnpo, which averages over each micro-batch"
        return "token_weights, whose function sees whole micro-batches" if self.token_weights else ""

    @property
    def micro_batch(self) -> int:
        """Samples of one micro-batch on one device, where micro_batch_tokens is null."""
        return self.per_device_train_batch_size * self.num_generations

    @property
    def prompts_per_device(self) -> int:
        """Prompts of one step on one device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


def _labelled(name: str, value: Any) -> list[tuple[str, Any]]:
    """The numbers of a setting, with their names on the command line."""
    return [(f"{name}.{key}", one) for key, one in value.items()] if isinstance(value, dict) else [(name, value)]


def _require(ok: bool, name: str, value: object, what: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r} must be {what}")
