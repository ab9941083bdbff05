"""Masks: which tokens are visible, masked, kept and thrown. Knows nothing of the rest of the package."""

from ummim.masking.attention import AttentionMaskConfig, AttentionSampler
from ummim.masking.furthest import furthest_sample
from ummim.masking.plan import MaskPlan, SamplePlan
from ummim.masking.samplers import MaskConfig, PlanSampler
from ummim.seeds import sample_seed

__all__ = [
    "AttentionMaskConfig",
    "AttentionSampler",
    "MaskConfig",
    "MaskPlan",
    "PlanSampler",
    "SamplePlan",
    "furthest_sample",
    "sample_seed",
]
