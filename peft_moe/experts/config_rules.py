"""Which fields of an adapter's config we read, may ignore or must refuse; how each is validated.

Every field of PEFT's ``LoraConfig`` has a row in ``FIELD_RULES``; a test enumerates PEFT's fields,
so that a field which a new PEFT adds is decided here by a person before CI is green again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from ..errors import refusal, shown
from ..io.values import (
    Predicate,
    dict_of,
    is_bool,
    is_count,
    is_index,
    is_positive,
    is_regex,
    is_word,
    list_of,
    optional,
)


class FieldRule(NamedTuple):
    """What becomes of one config field, and why; refused ones hold a fix, too."""

    use: Literal["read", "ignored", "refused"]
    why: str
    fix: str = ""


_MERGE = "merge it into a copy of the base and extract a LoRA from that, or retrain without it"
_RETRAIN = "retrain the adapter with this field at its default"
_INIT = "read only by the init of that name, and what that leaves is judged by init_lora_weights"

FIELD_RULES: dict[str, FieldRule] = {
    "task_type": FieldRule("ignored", "names the head; the deltas are the same"),
    "peft_type": FieldRule("read", "must be LORA"),
    "auto_mapping": FieldRule("read", "names the architecture; nothing is imported from it"),
    "peft_version": FieldRule("ignored", "informative"),
    "base_model_name_or_path": FieldRule("read", "compared with the base"),
    "revision": FieldRule("read", "compared with the base"),
    "inference_mode": FieldRule("ignored", "the mixture decides what trains"),
    "r": FieldRule("read", "rank"),
    "target_modules": FieldRule("read", "compared with the file's keys"),
    "exclude_modules": FieldRule("read", "compared with the file's keys"),
    "lora_alpha": FieldRule("read", "scale"),
    "lora_dropout": FieldRule("ignored", "acts while an adapter trains, not on what it learnt"),
    "fan_in_fan_out": FieldRule("ignored", "derived from the base's layer"),
    "bias": FieldRule("refused", "trained biases are not linear in the gate", "retrain with bias='none'"),
    "use_rslora": FieldRule("read", "scale"),
    "modules_to_save": FieldRule(
        "refused",
        "fully trained modules cannot be mixed by a gate",
        "retrain with modules_to_save=None",
    ),
    "init_lora_weights": FieldRule("read", "some inits change the base, so B·A alone is not the delta"),
    "layers_to_transform": FieldRule("read", "compared with the file's keys"),
    "layers_pattern": FieldRule("read", "compared with the file's keys"),
    "rank_pattern": FieldRule("read", "rank per module"),
    "alpha_pattern": FieldRule("read", "scale per module"),
    "megatron_config": FieldRule("ignored", "how the layer was sharded; shapes are compared with the base"),
    "megatron_core": FieldRule("ignored", "as megatron_config"),
    "trainable_token_indices": FieldRule("refused", "trained token embeddings are not LoRA deltas", _RETRAIN),
    "loftq_config": FieldRule("ignored", _INIT),
    "eva_config": FieldRule("ignored", _INIT),
    "corda_config": FieldRule("ignored", _INIT),
    "lora_ga_config": FieldRule("ignored", _INIT),
    "use_dora": FieldRule("refused", "DoRA's magnitude is not linear in the gate", _MERGE),
    "velora_config": FieldRule("refused", "VeLoRA stores buffers beside A and B", _RETRAIN),
    "alora_invocation_tokens": FieldRule("refused", "aLoRA acts only after its invocation tokens", _RETRAIN),
    "use_qalora": FieldRule("refused", "QALoRA pools the input before A", _RETRAIN),
    "qalora_group_size": FieldRule("ignored", "read only with use_qalora"),
    "monteclora_config": FieldRule("refused", "MonteCLoRA adds sampled weights to A and B", _RETRAIN),
    "layer_replication": FieldRule("refused", "it changes the base's layers", "replicate the base first"),
    "runtime_config": FieldRule("ignored", "where tensors live, not what they are"),
    "lora_bias": FieldRule("refused", "a bias on B is not linear in the gate's ranks", _RETRAIN),
    "target_parameters": FieldRule("refused", "deltas on bare parameters have no layer to mix in", _RETRAIN),
    "use_bdlora": FieldRule("refused", "block-diagonal factors are stored in another layout", _MERGE),
    "arrow_config": FieldRule(
        "refused", "it is a router already", "give the experts that it routes one by one"
    ),
    "kasa_config": FieldRule(
        "refused", "KaSA truncates the base and puts a diagonal between A and B", _RETRAIN
    ),
    "ensure_weight_tying": FieldRule("ignored", "concerns embedding and head, which are refused by module"),
}

# Of PEFT's inits these leave the base as it was, so that B·A is the whole delta.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")


def check_config(expert: str, config: Mapping[str, Any]) -> None:
    """Refuse a config that cannot be mixed, before any tensor or base is looked at.

    Args:
        expert: the expert's name.
        config: the content of its ``adapter_config.json``.

    Raises:
        PeftMoeError: for the first bad field: its name, value, why, and the fix.
    """
    # The method first: another one's config has no lora_alpha, which is not what is wrong with it.
    if config.get("peft_type", "LORA") != "LORA":
        what = f"peft_type={shown(config['peft_type'])}: only LORA can be mixed"
        raise refusal(expert, what, "train a LoRA, or convert the adapter to one")
    for field in ("peft_type", "r", "lora_alpha", "target_modules"):
        if field not in config:
            what = f"adapter_config.json has no {field}"
            raise refusal(expert, what, "save the adapter with PEFT again")
    for field, value in config.items():
        rule = FIELD_RULES.get(field)
        if rule is None:
            _check_unknown(expert, field, value)
        elif rule.use == "refused" and value and (field, value) != ("bias", "none"):
            raise refusal(expert, f"{field}={shown(value)} in adapter_config.json: {rule.why}", rule.fix)
        elif field in _VALID:
            wanted, valid = _VALID[field]
            if not valid(value):
                what = f"{field}={shown(value)} in adapter_config.json must be {wanted}"
                raise refusal(expert, what, "correct adapter_config.json or save the adapter again")
    _check_init(expert, config.get("init_lora_weights"))
    if isinstance(config["target_modules"], str) and config.get("layers_to_transform") is not None:
        layers = shown(config["layers_to_transform"])
        what = f"layers_to_transform={layers} with a regex in target_modules"
        raise refusal(expert, what, "select the layers in the regex")


def _check_unknown(expert: str, field: str, value: Any) -> None:
    # A field at "off" cannot change the maths; anything else might, and silently.
    if value:
        what = f"{shown(field)}={shown(value)} in adapter_config.json is a field that we do not know"
        fix = "remove it if the LoRA's output does not depend on it, or upgrade peft-moe"
        raise refusal(expert, what, fix)


def _check_init(expert: str, init: Any) -> None:
    if init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in PLAIN_INITS):
        return
    what = f"init_lora_weights={shown(init)} changes the base, so B·A alone is not the delta"
    fix = "save again with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
    raise refusal(expert, what, fix)


_VALID: dict[str, tuple[str, Predicate]] = {
    "auto_mapping": ("an object or null", optional(lambda v: isinstance(v, dict))),
    "base_model_name_or_path": ("a string or null", optional(lambda v: isinstance(v, str))),
    "revision": ("a string or null", optional(lambda v: isinstance(v, str))),
    "r": ("a whole number of at least 1", is_count),
    "lora_alpha": ("a finite number above 0", is_positive),
    "use_rslora": ("true or false", optional(is_bool)),
    "rank_pattern": (
        "an object of regexes with whole numbers of at least 1",
        optional(dict_of(is_regex, is_count)),
    ),
    "alpha_pattern": (
        "an object of regexes with finite numbers above 0",
        optional(dict_of(is_regex, is_positive)),
    ),
    "target_modules": (
        "a list of names or a regex",
        lambda v: list_of(is_word)(v) or is_regex(v),
    ),
    "exclude_modules": (
        "a list of names, a regex or null",
        optional(list_of(is_word), is_regex),
    ),
    "layers_to_transform": (
        "a layer index, a list of them or null",
        optional(is_index, list_of(is_index)),
    ),
    "layers_pattern": (
        "a name, a list of names or null",
        optional(is_regex, list_of(is_regex)),
    ),
}
