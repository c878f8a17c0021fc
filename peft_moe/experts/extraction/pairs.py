"""Which tensors of a base and of a full model belong together, and what each is: from configs and headers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...errors import PeftMoeError, near_matches, shown
from ...io.checkpoint import MODEL_CONFIG, Checkpoint, TensorAt, model_refusal
from ...io.dtypes import FILE_BYTES
from ..base_modules import BaseView, linear_sizes
from ..spec import ExpertSpec

LINEAR, HEAD, EMBEDDING, NORM, BIAS, OTHER = "linear", "head", "embedding", "norm", "bias", "other"
# Buffers that older versions of transformers saved; what they hold follows from the config.
_DERIVED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|masked_bias|attn\.bias|position_ids)")


@dataclass(frozen=True)
class TensorPair:
    """One tensor of both models.

    Attributes:
        name: of the module where it is the weight of a linear layer or embedding, else of the tensor.
        kind: "linear", "head", "embedding", "norm", "bias" or "other".
        base_key, model_key: its names in the two sets of files.
        shape: as in the files.
        transposed: [in, out] in the files (GPT-2's Conv1D); linear layers keep [out, in].
        taken: whether it becomes a LoRA; all others are reported.
    """

    name: str
    kind: str
    base_key: str
    model_key: str
    shape: tuple[int, ...]
    transposed: bool = False
    taken: bool = False

    @property
    def features(self) -> tuple[int, int]:
        """(out, in) of a linear layer."""
        return (self.shape[1], self.shape[0]) if self.transposed else (self.shape[0], self.shape[1])


@dataclass(frozen=True)
class ExtractionPlan:
    """What an extraction is going to read.

    Attributes:
        base, model: the two models.
        view: the base's modules.
        pairs: all tensors that both have, in the order of the base's modules.
        tied: names of tensors that are another one's, and whose.
        class_name: of the model.
    """

    base: Checkpoint
    model: Checkpoint
    view: BaseView
    pairs: tuple[TensorPair, ...]
    tied: dict[str, str]
    class_name: str

    @property
    def taken(self) -> list[TensorPair]:
        """The pairs that become LoRAs."""
        return [pair for pair in self.pairs if pair.taken]

    def sides(self, pair: TensorPair) -> tuple[tuple[Checkpoint, str], tuple[Checkpoint, str]]:
        """Where both tensors of a pair are."""
        return (self.base, pair.base_key), (self.model, pair.model_key)

    @property
    def largest(self) -> int:
        """Elements of the largest tensor that is taken."""
        return max((self.base.tensors[pair.base_key].numel for pair in self.taken), default=0)


def plan_extraction(
    base: Checkpoint, model: Checkpoint, target_modules: list[str] | str | None = None
) -> ExtractionPlan:
    """Pair the tensors of two models of one architecture; no weight is read.

    Args:
        base: what the model was trained from.
        model: the full model.
        target_modules: which linear layers are taken, as PEFT matches names; None: all but the head.

    Raises:
        PeftMoeError: other architectures, other sizes or vocabularies, tensors that only one of them has.
    """
    _check_same_kind(base, model)
    empty = base.empty_model()
    names, tied = _names(empty)
    view = BaseView.of(empty)
    base_keys, model_keys = (_canonical(one, names, empty.base_model_prefix) for one in (base, model))
    _resolve_ties(base_keys, model_keys, tied)
    _check_both_have(base, base_keys, model, model_keys, names)
    _check_vocabulary(base, base_keys, model, model_keys, empty)
    order = {name: place for place, name in enumerate(names)}
    pairs = []
    for name in sorted(set(base_keys) & set(model_keys), key=lambda n: (order.get(n, len(order)), n)):
        at, other = base.tensors[base_keys[name]], model.tensors[model_keys[name]]
        _check_alike(name, base, at, model, other)
        pairs.append(_pair(name, base_keys[name], model_keys[name], at, view, empty))
    taken = _targets(pairs, target_modules, base)
    chosen = tuple(
        TensorPair(**{**vars(pair), "taken": pair.kind == LINEAR and pair.name in taken}) for pair in pairs
    )
    return ExtractionPlan(base, model, view, chosen, tied, type(empty).__name__)


def _check_same_kind(base: Checkpoint, model: Checkpoint) -> None:
    ours, theirs = base.config.get("model_type"), model.config.get("model_type")
    if ours != theirs:
        what = f"model_type={shown(theirs)} in {MODEL_CONFIG}, the base {shown(base.location)} {shown(ours)}"
        raise model_refusal(model.location, what, "give the base that it was trained from")


def _names(empty: PreTrainedModel) -> tuple[dict[str, str], dict[str, str]]:
    """Parameters of the model by their first name, and which further names are the same parameter."""
    names: dict[str, str] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    declared = dict(getattr(empty, "all_tied_weights_keys", None) or {})
    for name, parameter in empty.named_parameters(remove_duplicate=False):
        source = declared.get(name) or first.setdefault(id(parameter), name)
        if source == name:
            names[name] = name
        else:
            tied[name] = source
    return names, tied


def _canonical(one: Checkpoint, names: dict[str, str], prefix: str) -> dict[str, str]:
    """Names in the files by the model's own names: a bare model saves itself without its prefix, or with."""
    found = {}
    for key in one.tensors:
        forms = (key, f"{prefix}.{key}", key.removeprefix(f"{prefix}."))
        found[next((form for form in forms if form in names), key)] = key
    return found


def _resolve_ties(base_keys: dict[str, str], model_keys: dict[str, str], tied: dict[str, str]) -> None:
    """A tied tensor need not be saved: it is then the one that it is tied to."""
    for name, source in tied.items():
        one, other = (name in keys for keys in (base_keys, model_keys))
        for keys, has, lacks in ((base_keys, other, not one), (model_keys, one, not other)):
            if has and lacks and source in keys:
                keys[name] = keys[source]


def _check_both_have(
    base: Checkpoint,
    base_keys: dict[str, str],
    model: Checkpoint,
    model_keys: dict[str, str],
    names: dict[str, str],
) -> None:
    for wanted, found, who, other in (
        (base_keys, model_keys, model, base),
        (model_keys, base_keys, base, model),
    ):
        lost = sorted(n for n in set(wanted) - set(found) if n in names or not _DERIVED.fullmatch(n))
        if lost:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            what = f"it has no tensor {lost[0]!r}{more}, which {shown(other.location)} has"
            fix = "give a complete model of the base's architecture, and the base that it was trained from"
            raise model_refusal(who.location, what, fix)


def _check_vocabulary(
    base: Checkpoint,
    base_keys: dict[str, str],
    model: Checkpoint,
    model_keys: dict[str, str],
    empty: PreTrainedModel,
) -> None:
    for name, module in empty.named_modules():
        key = f"{name}.weight"
        if isinstance(module, nn.Embedding) and key in base_keys and key in model_keys:
            ours = base.tensors[base_keys[key]].shape
            theirs = model.tensors[model_keys[key]].shape
            if ours[0] != theirs[0] and module is empty.get_input_embeddings():
                what = f"its vocabulary has {theirs[0]} tokens ({key}), the base's {ours[0]}"
                fix = (
                    f"resize the base to {theirs[0]} tokens and save it as the base of all experts, or train "
                    "without new tokens"
                )
                raise model_refusal(model.location, what, fix)


def _check_alike(name: str, base: Checkpoint, ours: TensorAt, model: Checkpoint, theirs: TensorAt) -> None:
    if ours.shape != theirs.shape:
        what = f"{name!r} is {list(theirs.shape)}, in the base {shown(base.location)} {list(ours.shape)}"
        raise model_refusal(model.location, what, "give the base that it was trained from")
    for one, at in ((base, ours), (model, theirs)):
        if at.dtype not in FILE_BYTES and len(at.shape) >= 2:
            what = f"{name!r} is {at.dtype}; {', '.join(FILE_BYTES)} are read"
            raise model_refusal(one.location, what, "give the model in 16 or 32 bits")


def _pair(
    name: str, base_key: str, model_key: str, at: TensorAt, view: BaseView, empty: PreTrainedModel
) -> TensorPair:
    owner, _, part = name.rpartition(".")
    module = view.modules.get(owner)
    heads = {view.head}
    if part == "bias":
        return TensorPair(name, BIAS, base_key, model_key, at.shape)
    if part == "weight" and owner in heads:
        return TensorPair(owner, HEAD, base_key, model_key, at.shape)
    if part == "weight" and isinstance(module, nn.Embedding):
        return TensorPair(owner, EMBEDDING, base_key, model_key, at.shape)
    if part == "weight" and module is not None and linear_sizes(module) and len(at.shape) == 2:
        flipped = isinstance(module, Conv1D)
        return TensorPair(owner, LINEAR, base_key, model_key, at.shape, transposed=flipped)
    kind = NORM if "norm" in type(module).__name__.lower() or len(at.shape) == 1 else OTHER
    return TensorPair(name, kind, base_key, model_key, at.shape)


def _targets(pairs: Iterable[TensorPair], wanted: list[str] | str | None, base: Checkpoint) -> set[str]:
    linear = [pair.name for pair in pairs if pair.kind == LINEAR]
    if not linear:
        what = "none of its tensors is the weight of a linear layer"
        raise model_refusal(base.location, what, "its architecture cannot take LoRA")
    if wanted is None or wanted == "all-linear":
        return set(linear)
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    for one in names:
        spec = ExpertSpec("target", target_modules=one if isinstance(wanted, str) else [one])
        if not any(check_target_module_exists(spec, name) for name in linear):
            suffixes = {name.rsplit(".", 1)[-1] for name in linear}
            raise PeftMoeError(
                f"target_modules: {one!r} matches no linear layer.{near_matches(one, suffixes)}"
            )
    spec = ExpertSpec("target", target_modules=wanted)
    return {name for name in linear if check_target_module_exists(spec, name)}
