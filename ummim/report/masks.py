"""How often a recipe's masks make each token visible, secondary, kept or thrown, over many plans."""

import math
from dataclasses import dataclass

import numpy as np

from ummim.recipe import Recipe

PLANS = 512


@dataclass(frozen=True)
class TokenShares:
    """Of one part of the plan.

    Attributes:
        share: (h, w) share of the plans in which a token is of this part.
        deviation: of such a share, if every token had the same chance: sqrt(p (1 - p) / plans).
    """

    share: np.ndarray
    deviation: float


def token_shares(recipe: Recipe, plans: int = PLANS) -> dict[str, TokenShares]:
    """The parts that the recipe's plans have, over ``plans`` samples of epoch 0.

    With masks from attention maps (AMT) these are the plans until the first maps are computed.
    """
    sampler = recipe.sampler()
    tokens = math.prod(sampler.grid)
    counts = {part: np.zeros(tokens) for part in ("visible", "secondary", "kept", "thrown")}
    for i in range(plans):
        group = i * recipe.mask.shared_by  # where neighbours share a mask, every plan is another group's
        plan = sampler(sampler.seed(recipe.seed, 0, f"sample {i}", group))
        counts["visible"][plan.visible[~plan.secondary]] += 1
        counts["secondary"][plan.visible[plan.secondary]] += 1
        counts["kept"][plan.kept] += 1
        counts["thrown"][plan.thrown] += 1
    shares = {part: count.reshape(sampler.grid) / plans for part, count in counts.items() if count.any()}
    return {
        part: TokenShares(share, math.sqrt(share.mean() * (1 - share.mean()) / plans)) for part, share in shares.items()
    }
