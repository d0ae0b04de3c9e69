"""rewardkit turns rewards into data filters for post-training language models.

    prompts -> generate -> samples -> score -> scored -> filter -> kept -> train -> model -> eval -> results

Rewards turn text into numbers, rules turn numbers into choices, methods turn rows into weights, tasks turn weights
into evidence. Each verb reads folders and writes one folder with a manifest; `publish` sends one to the Hub.
"""

from .errors import RewardkitError
from .verbs import eval, filter, generate, publish, report, score, train, verify

__all__ = ["RewardkitError", "eval", "filter", "generate", "publish", "report", "score", "train", "verify"]
