"""peft-moe: several trained LoRA adapters of one base, one gated model.

Importing this package registers the method "MOLORA" with PEFT, after which ``get_peft_model``,
``PeftModel.from_pretrained`` and transformers' own adapter loading know it.
"""

from .errors import PeftMoeError
from .routers import Scorer, register_loss, register_router
from .routing.context import Routing, record_routing, routing_inputs
from .routing.controls import use_experts, use_gates, use_temperature
from .tuner.config.mixture import MoLoraConfig
from .tuner.registration import register
from .tuner.saving.save_load import load_mixture, save_mixture

register()
del register

__version__ = "0.1.0"

__all__ = [
    "MoLoraConfig",
    "PeftMoeError",
    "Routing",
    "Scorer",
    "load_mixture",
    "record_routing",
    "register_loss",
    "register_router",
    "routing_inputs",
    "save_mixture",
    "use_experts",
    "use_gates",
    "use_temperature",
]
