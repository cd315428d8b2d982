"""How many updates become one model: numpy only, no Flower, no torch.

``shared_models.allowlists.STRATEGIES`` names them. See ``base.py`` for what a strategy is.
"""

from strategies.base import Strategy, Update

__all__ = ["Strategy", "Update"]
