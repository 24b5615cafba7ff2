"""Training objectives: supervised fine-tuning, direct preference optimisation, proximal policy optimisation."""

from safervlm.objectives.dpo import DPO
from safervlm.objectives.ppo import PPO
from safervlm.objectives.sft import SFT

__all__ = ["DPO", "PPO", "SFT"]
