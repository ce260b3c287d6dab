"""TRL's GRPOTrainer with bicot's loss, which keeps no logits: the head runs forward and backward in one pass.

    from bicot.examples.trl_grpo import BicotGRPOTrainer      # in place of trl.GRPOTrainer; TRL 1.16

It trains as TRL does, with the same losses and weights up to float32 rounding, for `loss_type` grpo, dr_grpo, bnpo,
dapo and cispo, the SETTINGS, `temperature`, `num_iterations`, gradient accumulation, `steps_per_generation`, truncated
completions and tool masks. It does not support images, `entropy_coef`, `top_entropy_quantile`,
`off_policy_mask_threshold`, a mixture-of-experts loss or importance weights of vLLM. If a model scales or caps its
logits, give `TokenStream` the `logits`.
"""

from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from bicot import TokenStream, grpo_loss

SETTINGS = ["loss_type", "importance_sampling_level", "beta", "epsilon", "epsilon_high", "delta"]
SETTINGS += ["max_completion_length", "use_bias_correction_kl"]


class BicotGRPOTrainer(GRPOTrainer):
    args: GRPOConfig

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if not model.training:
            return super()._compute_loss(model, inputs)
        mask = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
        ids, attention = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        out = model(ids, attention_mask=attention, output_hidden_states=True, logits_to_keep=1)
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        dtype = torch.bfloat16 if self.args.bf16 else head.weight.dtype
        stream = TokenStream(
            targets=inputs["completion_ids"][mask],
            sample=mask.nonzero()[:, 0],
            hidden=out.hidden_states[-1][:, -mask.shape[1] - 1 : -1][mask].to(dtype),
            weight=head.weight.to(dtype),
            bias=head.bias,
            ref_logprob=inputs["ref_per_token_logps"][mask] if self.beta else None,
            old_logprob=inputs["old_per_token_logps"][mask] if "old_per_token_logps" in inputs else None,
            temperature=self.temperature,
        )
        micro_batches = self.current_gradient_accumulation_steps
        share = micro_batches / self.args.steps_per_generation / self.accelerator.num_processes
        loss, metrics, _ = grpo_loss(
            [stream],
            inputs["advantages"],
            num_tokens=inputs["num_items_in_batch"] * share,
            num_samples=len(mask) * micro_batches,
            **{name: getattr(self.args, name) for name in SETTINGS},
        )
        for name, value in metrics.items():
            self._metrics["train"][name.removeprefix("tokens/")].append(value.item())
        return loss / micro_batches if self.loss_type == "bnpo" else loss
