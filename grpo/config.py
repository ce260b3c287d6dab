"""Every setting of a run, its default and its meaning.

If T2I-R1 (Janus-Pro-7B) has a setting, its published value is the default here. If TRL's GRPOConfig has a setting, it
has the same name here. grpo/limits.py says which values are allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ..kernels.group_advantages import Combine, Scale
from ..kernels.grpo_loss import KLEstimator, Level, LossType
from ..model.attention import Implementation
from ..model.engine import KVDtype
from ..model.policy import PUBLISHED_FREEZE
from ..model.prompts import ChatTemplate
from ..rewards.config import RewardConfig, words_of
from .limits import PER_STREAM, STREAMS, require_combinations, require_values

PerStream = float | dict[str, float]  # one number, or one for each of STREAMS


@dataclass
class Config:
    """All settings of a run.

    Args:
        model_name_or_path: Janus checkpoint, a folder or a hub id, in Hugging Face layout or in DeepSeek's own.
        dtype: data type of the policy's weights. bfloat16 weights are trained through float32 master weights.
        freeze: parameters whose names begin with one of these prefixes are not trained.
        lora_r: rank of LoRA adapters (PEFT), which are trained instead of the weights; 0 = no adapters.
        lora_alpha: the output of the adapters is scaled by lora_alpha / lora_r.
        lora_dropout: dropout on the input of the adapters. Adapters of the heads have none.
        lora_target_modules: linear layers that get adapters, by the last part of their name. Layers that `freeze`
            covers get none.
        gradient_checkpointing: recompute activations in the backward pass to save memory. true recomputes all of them,
            which needs the least memory and 25 to 29 % more time. selective recomputes everything but the matrix
            products, which saves a third of the memory and costs little time. auto takes the first of false, selective
            and true that fits this GPU, in each step anew: steps with short plans need less memory.
        attn_implementation: attention kernel of training. sdpa is PyTorch's and pads the sequences. varlen (PyTorch),
            flash_attn and xformers do not pad, and need a GPU and bfloat16. auto times them on the first sequences on
            each rank and takes the fastest.
        distributed: how several ranks share the model. With ddp each rank holds all of it. With deepspeed (ZeRO) they
            divide master weights, gradients and weights as its JSON says. auto is deepspeed if `deepspeed` is set,
            otherwise ddp.
        deepspeed: DeepSpeed's JSON file, such as configs/zero2.json. These settings replace values that are "auto"
            there.
        ddp_timeout: seconds that ranks wait for each other before the run ends. The time in which rank 0 writes files
            does not count.
        train_file: training prompts in T2I-R1's JSONL schema.
        eval_file: held-out prompts in the same schema, which are scored before and after training; null = none.
        eval_steps: also score the held-out prompts every eval_steps steps and after the last step, each time with the
            same random draws; null = only before and after training.
        skip_bad_prompts: leave out and list the prompts that cannot be read or scored. With false, such a prompt is an
            error.
        num_eval_generations: number of samples for each held-out prompt.
        chat_template: role names in the prompts; t2i_r1 = those of T2I-R1, janus = those that the model was tuned with.
        system_prompt: first line of the planning prompt; null = bicot's own.
        reasoning_prompt_path: file with the planning instruction, in which `{}` stands for the prompt; null = bicot's
            own.
        num_generations: group size G, the number of samples for each prompt.
        per_device_train_batch_size: number of prompts in a micro-batch on each device.
        gradient_accumulation_steps: number of micro-batches in a step. Their samples are drawn together, before the
            first of them is trained on.
        micro_batch_tokens: maximum number of tokens in a micro-batch, where a group's prompt counts once.
            per_device_train_batch_size · gradient_accumulation_steps is then only the number of prompts in a step. A
            group that fits is not split, and a sample never is. The loss stays the same. auto takes the largest number
            that fits this GPU (after gradient_checkpointing is chosen), and is null without a GPU and with deepspeed,
            bnpo or token_weights, which exclude a number; null = per_device_train_batch_size prompts. verl calls this
            ppo_max_token_len_per_gpu.
        max_completion_length: maximum number of tokens in a plan.
        temperature: sampling temperature of the plan.
        top_k: sample each token of the plan from the top_k most probable ones; 0 = from all.
        top_p: sample each token of the plan from the most probable ones that together have probability top_p; 1 = from
            all.
        image_temperature: sampling temperature of the picture.
        image_top_k: the same as top_k, for the picture.
        image_top_p: the same as top_p, for the picture.
        cfg_weight: weight of classifier-free guidance for the picture; 1 = no guidance.
        eval_cfg_weight: cfg_weight in held-out evaluation; null = the same as in training.
        rollout_max_rows: maximum number of sequences in a decode step. A picture with guidance counts as two.
        rollout_kv_gib: maximum size of the KV cache in GiB; null = half of the GPU memory that is free when the cache
            grows. The cache is kept for the whole run. With less memory, the rollout is drawn in smaller chunks.
        rollout_kv_dtype: data type of the KV cache; auto = that of the weights, fp8 = half the memory of bfloat16, with
            a small error, and slower.
        rollout_kv_release: free the KV cache after each rollout. CUDA graphs are then captured again in each step.
        dynamic_sampling: maximum number of rounds in which other prompts replace those whose samples all have the same
            reward (DAPO); 0 = none.
        rewards: the rewards that score the pictures.
        reward_weights: one weight for each of rewards.names; null = all 1.
        scale_rewards: standard deviation by which centred rewards are divided, that of the group or of the batch; none
            = do not divide.
        multi_objective_aggregation: how several rewards become one advantage; add the rewards and then normalise the
            sum, or normalise each reward and then add.
        beta: weight of the KL to the initial model; with 0 no reference model is loaded. beta, epsilon, epsilon_high
            and entropy_coef take one number, or one for each stream, such as {text: 0.01, image: 0.0}.
        reference_device: cpu = keep the reference model in host memory, and copy it to the GPU for its forward pass.
        sync_ref_model: let the reference model follow the policy. Every ref_model_sync_steps steps it becomes
            ref_model_mixup_alpha · policy + (1 - ref_model_mixup_alpha) · reference.
        ref_model_sync_steps: see sync_ref_model.
        ref_model_mixup_alpha: see sync_ref_model.
        kl_estimator: Schulman's estimator of the KL, k1, k2 or k3.
        use_bias_correction_kl: multiply the KL by the ratio, so that its gradient is the gradient of the reverse KL.
            TRL's default is true.
        loss_type: how the loss is normalised and clipped. dapo divides by the number of tokens in the step, bnpo by the
            number in the micro-batch, as the published code does.
        policy_logits: which log-probs are trained; conditional = those without guidance, as published, guided = those
            of the distribution that the picture was sampled from.
        detach_uncond: with guided log-probs, let no gradient flow through the unconditional sequences, as in
            ReasonGen-R1.
        epsilon: lower clip range of the ratio.
        epsilon_high: upper clip range of the ratio; null = the same as epsilon.
        delta: upper bound of the ratio that holds for negative advantages too (two-sided clipping); null = none.
        entropy_coef: weight of the entropy bonus.
        entropy_target: adapt entropy_coef so that the mean entropy of the tokens, in nats, does not fall below this
            target. One number, or one for each stream; null = keep entropy_coef.
        entropy_coef_delta: how much entropy_coef changes in a step, with entropy_target.
        entropy_coef_min: lower limit of entropy_coef, with entropy_target.
        entropy_coef_max: upper limit of entropy_coef, with entropy_target.
        token_weights: function `package.module:name` that gives each token's term of the loss a weight, such as
            examples.entropy_selective:weights; null = all tokens have weight 1, at no cost.
        num_iterations: number of optimizer updates on each rollout.
        importance_sampling_level: token = one ratio for each token, sequence = one ratio for a sample's plan and
            picture together (GSPO). loss_type gspo is grpo with sequence.
        importance_sampling_correction: weight tokens by the ratio of their probabilities in training and in sampling,
            as importance_sampling_mode says.
        importance_sampling_mode: whether these weights are ratios of tokens or of sequences (plan and picture), and
            whether a weight above importance_sampling_clip_max becomes that bound (truncate) or 0 (mask).
        importance_sampling_clip_max: upper bound of these weights.
        off_policy_mask_threshold: leave a sample with negative advantage out of the policy loss if the sampling
            log-probs of its tokens are, on average, above the training log-probs by more than this (DeepSeek-V3.2);
            null = never.
        mask_truncated_completions: do not train plans that are cut off at max_completion_length, and do not count their
            tokens in the loss. Their pictures are trained.
        optim: adamw_torch_fused keeps float32 master weights. adamw_8bit (torchao) keeps none, stores its moments in
            8 bits, and rounds bfloat16 weights stochastically; it needs a third of the memory.
        learning_rate: learning rate of AdamW.
        adam_beta1: beta1 of AdamW.
        adam_beta2: beta2 of AdamW.
        adam_epsilon: epsilon of AdamW.
        weight_decay: weight decay of AdamW.
        max_grad_norm: clip gradients to this norm.
        ema_decay: decay of an exponential moving average of the trained weights, in float32. The average is evaluated
            instead of the weights, and saved as a model in a checkpoint's folder ema; null = no average.
        lr_scheduler_type: name of the learning rate schedule in transformers.
        warmup_steps: number of warm-up steps of the learning rate schedule.
        max_steps: number of steps (rollout and update) of the whole run; the schedule ends there.
        stop_after: number of the step after which this run saves a checkpoint and ends. The schedule does not change;
            null = run to max_steps.
        seed: seed of all random numbers.
        output_dir: folder where everything is written.
        overwrite_output_dir: delete an earlier run in output_dir.
        move_output_dir: move an earlier run in output_dir to output_dir-1, or the first number that is free.
            overwrite_output_dir has precedence. Without either setting, an earlier run is an error.
        resume: a checkpoint folder to continue from; auto = the newest checkpoint in output_dir, or a new run if there
            is none; null = a new run.
        stop_on_alarm: save a checkpoint and end the run if an alarm is raised, such as a reward that stays constant.
        save_steps: write a checkpoint every save_steps steps. There is always one at the end.
        save_total_limit: number of newest checkpoints to keep; null = all.
        load_best_model_at_end: write a checkpoint whenever an evaluation is the best so far, keep the last of these in
            addition to save_total_limit, and report it as the result at the end.
        metric_for_best_model: metric by which evaluations are compared. Its name begins with heldout/.
        greater_is_better: whether a higher value of that metric is better.
        sample_steps: write a grid of samples every sample_steps steps; 0 = never.
        save_rollouts: folder in which each rank writes a file with the rollout of each step, which has prompts, plans,
            tokens, log-probs and scores; null = none.
        save_rollout_images: write the pictures of the rollouts too.
        replay: train on the rollouts in this folder, without engine and rewards; null = draw new ones.
        rollout_only: draw, score and save rollouts of the initial model, and train nothing. No reference model and no
            optimizer are loaded.
        profile: instead of training, measure where a step's time goes and write it to this .json, with a trace beside
            it.
        push_to_hub: upload the trained model to the Hugging Face Hub at the end. The login is checked at the start.
        hub_model_id: repository on the hub, such as user/name; null = the name of output_dir, under your own user.
        hub_private_repo: whether a repository that the run creates is private; null = the default of its owner.
        report_to: trackers in addition to metrics.jsonl, any of tensorboard, wandb and trackio. report_to, freeze and
            reward_weights take a list, or one string with commas.
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
        for name in ("freeze", "lora_target_modules", "report_to"):
            setattr(self, name, words_of(getattr(self, name)))
        require_values(self)
        self._check_rewards()
        require_combinations(self)

    def _check_rewards(self) -> None:
        """Make `reward_weights` a list of numbers, one for each reward. Raises ValueError if it cannot be that."""
        names, weights = self.rewards.names, self.reward_weights
        if not names:
            raise ValueError(f"rewards.names={names} must be at least one reward, such as scene or my_module:MyReward")
        if isinstance(weights, (str, int, float)):
            try:
                weights = self.reward_weights = [float(word) for word in words_of(str(weights))]
            except ValueError:
                raise ValueError(f"reward_weights={weights!r} must be numbers") from None
        if weights is not None and len(weights) != len(names):
            raise ValueError(f"reward_weights has {len(weights)} entries for {len(names)} rewards {names}")
        if not all(map(math.isfinite, weights or [])):
            raise ValueError(f"reward_weights={weights!r} must be finite")
        if weights is not None and not any(weights):
            raise ValueError(f"reward_weights={weights!r}: all are 0; rewards.monitor scores without training")

    def of_stream(self, stream: str) -> dict[str, Any]:
        """The values of beta, epsilon, epsilon_high and entropy_coef for the text stream or the image stream."""
        values = {name: getattr(self, name) for name in PER_STREAM}
        return {name: value[stream] if isinstance(value, dict) else value for name, value in values.items()}

    @property
    def kl_streams(self) -> tuple[str, ...]:
        """The streams whose beta is not 0. Without any, no reference model is needed."""
        return tuple(stream for stream in STREAMS if self.of_stream(stream)["beta"])

    @property
    def needs_equal_micro_batches(self) -> str:
        """The setting that forbids cutting micro-batches by tokens, and why; empty if there is none."""
        if self.deepspeed:
            return "deepspeed, which wants the same number of micro-batches on each rank"
        if self.loss_type == "bnpo":
            return "loss_type=bnpo, which averages over each micro-batch"
        return "token_weights, whose function sees whole micro-batches" if self.token_weights else ""

    @property
    def micro_batch(self) -> int:
        """Number of samples in a micro-batch on one device, if micro_batch_tokens is null."""
        return self.per_device_train_batch_size * self.num_generations

    @property
    def prompts_per_device(self) -> int:
        """Number of prompts in a step on one device."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps
