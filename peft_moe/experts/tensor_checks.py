"""What an adapter file says about itself: keys, dtypes and shapes, held against config and base."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple, NoReturn

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from peft.utils.other import get_pattern_key
from torch import nn

from ..errors import refusal, shown
from ..io.adapter_files import PREFIX, tensor_key
from ..io.sources import WEIGHTS_FILE
from .base_modules import BaseView, linear_sizes
from .spec import ExpertSpec

DTYPES = ("F32", "BF16", "F16")  # wider ones would be rounded, narrower ones need scales

_KEY = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Parts of keys that tell what an unexpected tensor is.
_STRAY = {
    "lora_embedding_": "it is LoRA on an embedding, which is not linear-like",
    "lora_magnitude": "it is the magnitude of DoRA, whose delta is not linear in the gate",
    ".bias": "trained biases are not linear in the gate",
    "token_adapter": "trained token embeddings are not LoRA deltas",
    "_orig_mod": "it was saved from a compiled model",
}


class TensorHeader(NamedTuple):
    """Dtype (safetensors' word) and shape of one tensor; its data stays on disk."""

    dtype: str
    shape: tuple[int, ...]


def check_header(spec: ExpertSpec, header: Mapping[str, TensorHeader], base: BaseView) -> tuple[str, ...]:
    """Hold a file's header against config and base.

    Args:
        spec: the expert, from its config. ``target_modules`` is replaced by the list of module
            names where the config says "all-linear", which no other base could resolve alike.
        header: the file's tensors by key.
        base: the base.

    Returns:
        Names of the base's modules that the file adapts, sorted.

    Raises:
        PeftMoeError: for the first disagreement.
    """
    modules = _modules_in(spec, header, base)
    for module in modules:
        _check_kind(spec.name, module, base)
    for module in modules:
        _check_pair(spec, module, header, linear_sizes(base.modules[module]))
    if str(spec.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        _check_targets(spec, modules, _all_linear(base))
        spec.target_modules = list(modules)
    else:
        _check_targets(spec, modules, (n for n in base.modules if check_target_module_exists(spec, n)))
    for module in modules:
        _check_rank(spec, module, header)
    _warn_if_ambiguous(spec, modules)
    return modules


def _modules_in(spec: ExpertSpec, header: Mapping[str, TensorHeader], base: BaseView) -> tuple[str, ...]:
    matches = {key: _KEY.fullmatch(key) for key in sorted(header)}
    for key, match in matches.items():
        if match is None:
            _refuse_stray(spec.name, key, header[key], base)
    modules = tuple(sorted({match["module"] for match in matches.values() if match}))
    if not modules:
        raise refusal(spec.name, f"{WEIGHTS_FILE} holds no tensors", "save the adapter with PEFT again")
    unknown = [module for module in modules if module not in base.modules]
    if len(unknown) == len(modules):
        here = next((n for n, m in base.modules.items() if linear_sizes(m)), "no linear layer")
        what = f"{WEIGHTS_FILE} adapts {modules[0]!r}, but the base's modules are named like {here!r}"
        raise refusal(spec.name, what, "load the architecture that it was trained on")
    if unknown:
        what = f"{WEIGHTS_FILE} adapts {_some(unknown)}, which the base does not have"
        raise refusal(spec.name, what, "load the base that it was trained on")
    return modules


def _refuse_stray(expert: str, key: str, tensor: TensorHeader, base: BaseView) -> NoReturn:
    """Say what a tensor is that belongs to no lora_A or lora_B of a linear layer."""
    what = f"tensor {shown(key)} {list(tensor.shape)} in {WEIGHTS_FILE} cannot be mixed"
    parts = key.removeprefix(PREFIX).split(".")
    owner = next((n for i in range(len(parts), 0, -1) if (n := ".".join(parts[:i])) in base.modules), None)
    module = base.modules.get(owner) if owner else None
    if owner and (owner == base.head or isinstance(module, nn.Embedding)):
        rows = getattr(module, "num_embeddings", None) or getattr(module, "out_features", None)
        if key.endswith("weight") and tensor.shape and rows and tensor.shape[0] != rows:
            what += f": adapter vocab {tensor.shape[0]}, base {rows}"
            fix = f"resize the base to {tensor.shape[0]} first and load these rows into it; then save"
            raise refusal(expert, what, f"{fix} the adapter with save_embedding_layers=False")
        what += f": it belongs to the embedding or head {owner!r}"
        raise refusal(expert, what, f"exclude {owner!r} from the adapter; save_embedding_layers=False")
    why = next((why for part, why in _STRAY.items() if part in key), "it is neither lora_A nor lora_B")
    raise refusal(expert, f"{what}: {why}", "save the adapter with PEFT again, as a plain LoRA")


def _check_kind(expert: str, module: str, base: BaseView) -> None:
    kind = type(base.modules[module]).__name__
    retrain = f"retrain with exclude_modules={[module.rsplit('.', 1)[-1]]}"
    if module == base.head:
        raise refusal(
            expert,
            f"adapts the output head {module!r} ({kind}), which cannot be trained on",
            retrain,
        )
    if linear_sizes(base.modules[module]) is None:
        noun = "embedding" if isinstance(base.modules[module], nn.Embedding) else "module"
        raise refusal(expert, f"adapts the {noun} {module!r} ({kind}), which is not linear-like", retrain)


def _check_pair(
    spec: ExpertSpec,
    module: str,
    header: Mapping[str, TensorHeader],
    features: tuple[int, int] | None,
) -> None:
    """A is [r, in] and B is [out, r], with r as the config says and in, out as the base says."""
    pair: dict[str, TensorHeader] = {}
    for side in "AB":
        key = tensor_key(module, side)
        if key not in header:
            raise refusal(
                spec.name,
                f"{WEIGHTS_FILE} lacks {key!r}",
                "save the adapter again; half a pair is lost",
            )
        pair[side] = header[key]
        if pair[side].dtype not in DTYPES:
            what = f"tensor {key!r} is {pair[side].dtype}; float32, bfloat16 and float16 are read"
            raise refusal(spec.name, what, "cast it and save the adapter again")
        if len(pair[side].shape) != 2:
            what = f"tensor {key!r} has shape {list(pair[side].shape)}, not two dimensions"
            fix = "save it again; with ZeRO-3 or FSDP gather the shards first"
            raise refusal(spec.name, what, fix)
    (rank, inputs), (outputs, rank_b) = pair["A"].shape, pair["B"].shape
    if rank != rank_b:
        what = f"module {module!r} has rank {rank} in lora_A and {rank_b} in lora_B"
        raise refusal(spec.name, what, "save the adapter again; the two files were mixed up")
    if (inputs, outputs) != features:
        shapes = " and ".join(f"lora_{side} {list(pair[side].shape)}" for side in "AB")
        what = f"module {module!r} has {shapes}"
        what += f", but maps {features} in the base" if features else ""
        raise refusal(spec.name, what, "load the base that the adapter was trained on")


def _check_rank(spec: ExpertSpec, module: str, header: Mapping[str, TensorHeader]) -> None:
    """A rank edited in the config alone would rescale the expert: the scale is alpha over r."""
    rank, configured = header[tensor_key(module, "A")].shape[0], spec.rank_in(module)
    if rank != configured:
        what = f"module {module!r} has rank {rank} in {WEIGHTS_FILE} but r={shown(configured)}"
        what += " in adapter_config.json (r, rank_pattern)"
        raise refusal(spec.name, what, "correct the config, or save the adapter again")


def _warn_if_ambiguous(spec: ExpertSpec, modules: Iterable[str]) -> None:
    """PEFT uses the first pattern that matches, but sorts them by name when it saves."""
    patterns = spec.alpha_pattern
    for module in modules:
        fitting = [key for key in patterns if get_pattern_key([key], module) == key]
        if len({patterns[key] for key in fitting}) > 1:
            text = f"Expert {spec.name!r}: alpha_pattern keys {shown(fitting)} all match {module!r}"
            fix = "PEFT sorts them when saving, so check that the first is the one trained with"
            warnings.warn(f"{text}. {fix}.", stacklevel=2)
            return


def _check_targets(spec: ExpertSpec, modules: Collection[str], targeted: Iterable[str]) -> None:
    """PEFT would leave what is missing at random, and drop what is not targeted, silently."""
    wanted = set(targeted)
    where = f"target_modules={shown(spec.target_modules)} in adapter_config.json"
    if missing := sorted(wanted.difference(modules)):
        what = f"{where} matches {_some(missing)}, for which {WEIGHTS_FILE} has no tensors"
        raise refusal(spec.name, what, "narrow target_modules to what was trained, or save the adapter again")
    if ignored := sorted(set(modules).difference(wanted)):
        what = f"{where} does not match {_some(ignored)}, for which {WEIGHTS_FILE} has tensors"
        raise refusal(spec.name, what, "widen target_modules to all that was trained")


def _all_linear(base: BaseView) -> set[str]:
    """What PEFT calls "all-linear": every linear layer but the head."""
    heads = {base.head, *SEQ_CLS_HEAD_NAMES} if base.head is None else {base.head}
    return {n for n, m in base.modules.items() if linear_sizes(m) and n not in heads}


def _some(names: list[str]) -> str:
    """The first name, and how many there are besides."""
    return repr(names[0]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
