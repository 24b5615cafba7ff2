"""Training objectives: supervised fine-tuning, direct preference, proximal and group-relative policy optimisation."""

from safervlm.objectives.dpo import DPO
from safervlm.objectives.grpo import GRPO
from safervlm.objectives.ppo import PPO
from safervlm.objectives.sft import SFT

__all__ = ["DPO", "GRPO", "PPO", "SFT"]
