"""The frequency experts: named PEFT adapters in one transformer, chosen per sample by noise level.

With torch.compile, each choice of experts and each token grid is a graph of its own, and torch gives up after
`torch._dynamo.config.recompile_limit` (8) of them: train on few sizes or raise the limit. With gradient
checkpointing, compile the blocks (`transformer.compile_repeated_blocks()`), not the whole transformer.
"""

from luve_lightning.models.experts.files import load_expert, save_expert
from luve_lightning.models.experts.layer import add_expert, expert_parameters, experts_set_aside, train_only
from luve_lightning.models.experts.routing import ExpertConfig, activate, choice_kept, expert_names, route_by_sigma

__all__ = [
    "ExpertConfig",
    "activate",
    "add_expert",
    "choice_kept",
    "expert_names",
    "expert_parameters",
    "experts_set_aside",
    "load_expert",
    "route_by_sigma",
    "save_expert",
    "train_only",
]
