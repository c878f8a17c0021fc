"""Named methods: a few words of data over the parts, never classes.

A preset fills the fields of ``MoLoraConfig`` that the user left at None; ``scorer`` is the registered
name of what scores. A registered scorer without a preset is its own preset.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NOTHING = "nothing"
WEIGHTS = "the experts' weights"
PROMPTS = "prompts per expert"
TEXT = "training text"
LABELS = "the domain of every call"


@dataclass(frozen=True)
class Preset:
    """One named method.

    Attributes:
        summary: what it does, in one line.
        paper: where it comes from.
        needs: what it needs before it routes well.
        fields: of ``MoLoraConfig``, and the ``scorer``.
        fit: the method of ``fit_router`` that fills its weights, None if it is trained or needs nothing.
    """

    summary: str
    paper: str
    needs: str
    fields: dict[str, Any] = field(default_factory=dict)
    fit: str | None = None


# One decision per prompt for the whole model, taken where the base has read enough of it to know the
# task; hard, since strong experts do not survive being mixed; free to choose the base itself.
_CONTEXT: dict[str, Any] = {
    "scorer": "linear",
    "router_scope": "model",
    "router_granularity": "sequence",
    "router_input_norm": True,
    "top_k": 1,
    "straight_through": True,
    "null_expert": True,
}
_MODEL_TOKEN = {"router_scope": "model", "router_granularity": "token"}
_PLAIN_WEIGHTS = {"scoring_func": "none", "norm_topk_prob": False}

PRESETS: dict[str, Preset] = {
    "uniform": Preset("every expert weighs 1/E", "2408.17280", NOTHING, {"scorer": "uniform"}),
    "sum": Preset(
        "every expert weighs λ (routed_scaling_factor)",
        "2212.04089",
        NOTHING,
        {"scorer": "uniform", **_PLAIN_WEIGHTS},
    ),
    "random": Preset(
        "a fixed random linear gate, top-2: the noisy gate",
        "2408.17280",
        NOTHING,
        {"scorer": "random", "router_init_std": 0.02, "top_k": 2},
    ),
    "noise": Preset(
        "scores are drawn anew for every token, top-2",
        "2408.17280",
        NOTHING,
        {"scorer": "noise", "router_init_std": 1.0, "top_k": 2},
    ),
    "hash": Preset("the token's id decides, by a fixed hash", "2106.04426", NOTHING, {"scorer": "hash"}),
    "linear": Preset("a linear gate per module, dense softmax", "1701.06538", TEXT, {"scorer": "linear"}),
    "molora": Preset("the same, by its paper's name", "2309.05444", TEXT, {"scorer": "linear"}),
    "mixtral": Preset(
        "a linear gate per module, top-2, renormalised", "2401.04088", TEXT, {"scorer": "linear", "top_k": 2}
    ),
    "switch": Preset(
        "a linear gate per module, top-1, weighed by its probability",
        "2101.03961",
        TEXT,
        {"scorer": "linear", "top_k": 1, "norm_topk_prob": False, "router_aux_loss_coef": 0.01},
    ),
    "noisy_top_k": Preset(
        "a linear gate with learnt noise in training, top-2",
        "1701.06538",
        TEXT,
        {"scorer": "noisy_linear", "top_k": 2},
    ),
    "deepseek_v3": Preset(
        "sigmoid scores, top-2, balanced by a bias instead of a loss",
        "2408.15664",
        TEXT,
        {"scorer": "linear", "scoring_func": "sigmoid", "top_k": 2, "router_bias_update_rate": 1.0e-3},
    ),
    "top_p": Preset(
        "as many experts as reach 70 % of the probability",
        "2403.07652",
        TEXT,
        {"scorer": "linear", "topk_method": "top_p", "top_p": 0.7},
    ),
    "remoe": Preset(
        "ReLU gates, kept sparse by an L1 penalty",
        "2412.14711",
        TEXT,
        {
            "scorer": "linear",
            "scoring_func": "relu",
            "norm_topk_prob": False,
            "router_init_std": 0.02,
            "router_l1_coef": 1.0e-3,
            "router_l1_target": 0.5,
        },
    ),
    "straight_through": Preset(
        "a linear gate per module, one expert at weight 1, dense gradients",
        "1308.3432",
        TEXT,
        {"scorer": "linear", "top_k": 1, "straight_through": True},
    ),
    "mlp": Preset("a two-layer gate per module", "2402.07148", TEXT, {"scorer": "mlp"}),
    "mola": Preset(
        "top-2 gates over a number of fresh experts that grows with depth (2, 4, 6, 8)",
        "2402.08562",
        TEXT,
        {"scorer": "linear", "top_k": 2, "experts_per_layer": [2, 4, 6, 8]},
    ),
    "expert_choice": Preset(
        "each expert takes its best tokens; encoders only",
        "2202.09368",
        TEXT,
        {"scorer": "linear", "topk_method": "expert_choice", "top_k": 1, "norm_topk_prob": False},
    ),
    "smear": Preset(
        "one soft decision per prompt and block",
        "2306.03745",
        TEXT,
        {"scorer": "linear", "router_scope": "block", "router_granularity": "sequence"},
    ),
    "mole": Preset(
        "one soft decision per prompt and module",
        "2404.13628",
        TEXT,
        {"scorer": "linear", "router_granularity": "sequence"},
    ),
    "global": Preset(
        "one decision per token for the whole model, from the embeddings",
        "2408.17280",
        TEXT,
        {"scorer": "linear", **_MODEL_TOKEN, "router_tap": 0},
    ),
    "xlora": Preset(
        "one soft decision per token for the whole model, by two layers on a deep hidden state",
        "2402.07148",
        TEXT,
        {"scorer": "mlp", **_MODEL_TOKEN, "router_below_tap": "prompt", "router_input_norm": True},
    ),
    "static": Preset(
        "learnt weights per module, the same for every input", "2410.13025", TEXT, {"scorer": "static"}
    ),
    "cat": Preset(
        "learnt weights per module, unconstrained", "2410.13025", TEXT, {"scorer": "static", **_PLAIN_WEIGHTS}
    ),
    "lorahub": Preset(
        "learnt weights for the whole model, unconstrained",
        "2307.13269",
        TEXT,
        {"scorer": "static", "router_scope": "model", **_PLAIN_WEIGHTS},
    ),
    "poly": Preset(
        "learnt skills of each task",
        "2202.13914",
        LABELS,
        {"scorer": "poly", "scoring_func": "sigmoid"},
    ),
    "oracle": Preset("the expert of the known domain, alone", "2202.13914", LABELS, {"scorer": "oracle"}),
    "arrow": Preset(
        "per module, the three experts that amplify the token most in one direction",
        "2405.11157",
        WEIGHTS,
        {"scorer": "arrow", "top_k": 3},
    ),
    "spectr": Preset(
        "per module, the three experts that would move the token most",
        "2504.03454",
        WEIGHTS,
        {"scorer": "spectr", "top_k": 3},
    ),
    "spectr_unit": Preset(
        "the same, with every expert at unit norm",
        "2504.03454",
        WEIGHTS,
        {"scorer": "spectr_unit", "top_k": 3},
    ),
    "centroid": Preset(
        "per module and token, by likeness with each expert's mean input",
        "2403.13257",
        PROMPTS,
        {"scorer": "centroid", "router_temperature": 0.1},
        fit="centroid",
    ),
    "hidden": Preset(
        "one hard decision per prompt and block, by likeness with each expert's mean prompt",
        "2403.13257",
        PROMPTS,
        {
            "scorer": "centroid",
            "router_scope": "block",
            "router_granularity": "sequence",
            "top_k": 1,
            "straight_through": True,
        },
        fit="centroid",
    ),
    "cheap_embed": Preset(
        "one hard decision per prompt, by likeness of its words alone",
        "2403.13257",
        PROMPTS,
        {**_CONTEXT, "scorer": "centroid", "router_tap": 0, "router_input_norm": False, "null_expert": False},
        fit="centroid",
    ),
    "phatgoose": Preset(
        "per module, top-2 of gates that were trained on one expert each",
        "2402.05859",
        TEXT,
        {"scorer": "phatgoose", "top_k": 2},
        fit="phatgoose",
    ),
    "ridge": Preset(
        "one hard decision per prompt, by least squares on the experts' labels",
        "2603.29765",
        PROMPTS,
        _CONTEXT,
        fit="ridge",
    ),
    "running": Preset(
        "as context, but the decision then follows the text, and notices a new subject",
        "this project",
        PROMPTS + ", with answers",
        {**_CONTEXT, "router_granularity": "running"},
        fit="logistic",
    ),
    "classifier": Preset(
        "logistic regression on the prompt's mean hidden state chooses one expert",
        "2407.19610",
        PROMPTS,
        {**_CONTEXT, "null_expert": False},
        fit="logistic",
    ),
    "context": Preset(
        "one hard decision per prompt, read inside the base, which may choose no expert",
        "this project",
        PROMPTS,
        _CONTEXT,
        fit="logistic",
    ),
}

# What ``router="auto"`` stands for: ahead in the bake-offs of benchmarks/results, also behind a change of
# subject, and harmless where no expert fits.
RECOMMENDED = "running"
