"""Checkpoints of FastVLM models in every layout of the world: read, recognised, converted."""

from fastvlm.checkpoints.loading import PretrainedOptions, load_checkpoint
from fastvlm.checkpoints.saving import OUTPUT_LAYOUTS, save_checkpoint

__all__ = ["OUTPUT_LAYOUTS", "PretrainedOptions", "load_checkpoint", "save_checkpoint"]
