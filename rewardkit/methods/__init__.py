"""ROWS -> WEIGHTS: ways to train a model on a table.

A method is a function (model, data, out, settings) that writes a model into the folder `out` and returns facts for its
manifest. The keyword arguments of the function are the settings of its leaf recipe. `verbs.train` opens the table,
claims the folder and writes the manifest; a method does neither. One that takes a `reward` is handed it ready to call,
with samples, as `score` calls it; the recipe names it by its spec.
"""

METHODS = {
    "sft": "rewardkit.methods.sft:sft",
    "dpo": "rewardkit.methods.dpo:dpo",
    "reward_model": "rewardkit.methods.reward_model:reward_model",
    "grpo": "rewardkit.methods.grpo:grpo",
    "ppo": "rewardkit.methods.ppo:ppo",
    "early_stop": "rewardkit.methods.early_stop:early_stop",
}
