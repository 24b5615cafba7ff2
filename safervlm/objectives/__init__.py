"""The objectives: one file each, each read from top to bottom."""

from safervlm.objectives.dpo import DPO
from safervlm.objectives.ppo import PPO
from safervlm.objectives.sft import SFT

__all__ = ["DPO", "PPO", "SFT"]
