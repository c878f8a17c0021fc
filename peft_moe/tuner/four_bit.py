"""bitsandbytes' 4-bit layers on a CPU: keep their weights as they are.

On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit weight in its first eval pass. From then on
no gradient flows through that layer to what lies below it, without a word, and saving the model unpacks
some weights wrongly. Training evaluates and saves all the time, so the repacking is switched off; eval
passes of a mixture on such a CPU are slower for it.
"""

from __future__ import annotations

from torch import nn

from ..errors import PeftMoeError


def keep_unpacked(model: nn.Module, *, trains: bool) -> None:
    """Switch the repacking off in every 4-bit layer, also in those that carry no experts.

    Args:
        model: the base.
        trains: whether gradients are wanted; inference may go on with a weight that is packed already.

    Raises:
        PeftMoeError: a layer is packed already, and the mixture is to train.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if trains and getattr(state, "packing_format_for_cpu", False):
            raise PeftMoeError(
                f"{name}: an eval pass on this CPU has repacked its 4-bit weight, which stops all gradients "
                "below it; load the base again and add the mixture before the first pass"
            )
