"""The table [train]: local training between merges, its optimizer and its learning rate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from dimat.config.tree import Named, NamedConfig, Options, Tree, as_stage
from dimat.errors import nearest

OPTIMIZERS = ("sgd", "adam", "adamw")
"""Short names of optimizers."""


def _optimizer_name(name: str) -> str:
    if name not in OPTIMIZERS and not any(mark in name.strip(".:") for mark in ".:"):
        raise ValueError(
            f"unknown optimizer{nearest(name, OPTIMIZERS)} (use {', '.join(OPTIMIZERS)}, a class by its dotted name "
            "such as torch.optim.RAdam, or a hook such as file.py:function)"
        )
    return name


class OptimizerConfig(Tree):
    """An optimizer: `"adam"`, or `{ name = "torch.optim.RAdam", lr = 1e-3, options = { betas = [0.9, 0.95] } }`."""

    name: Annotated[str, AfterValidator(_optimizer_name)] = "adam"
    """"sgd", "adam" or "adamw"; a class by its dotted name, of torch or of any package ("torch.optim.Adafactor"); or a
    hook, `package.module:function` or `file.py:function`, called with the model, that returns a torch optimizer."""
    lr: Annotated[float, Field(gt=0)] = 2e-3
    """Learning rate; if it is not given, classes and hooks use their own default."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum (sgd; passed to classes and hooks only if it is given)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty (sgd, adam) or decoupled decay (adamw); passed to classes and hooks only if it is given."""
    options: Options = Field(default_factory=dict)
    """Further keyword arguments of the class or hook, e.g. { betas = [0.9, 0.95] }."""


class LrScheduleConfig(Tree):
    """How the learning rate changes over the whole run."""

    name: Literal["constant", "cosine", "step"] = "constant"
    """"cosine" falls to 0 over all rounds; "step" multiplies by `gamma` after each of `milestones`."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Points as shares of the whole run in (0, 1) (name "step")."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor at a milestone (name "step")."""


class TrainConfig(Tree):
    """Local training between merges."""

    epochs_per_round: Annotated[float, Field(gt=0)] | None = None
    """Epochs of local training per round. Default 2 if `steps_per_round` is not given."""
    steps_per_round: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps per round, instead of epochs."""
    first_round_epochs: Annotated[float, Field(gt=0)] | None = None
    """Epochs before the first merge, if they differ from those of later rounds."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Samples per optimizer step."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Number of parts into which a step's batch is split; they pass through the model one after the other, and their
    gradients add up to those of the whole batch, in less memory. BatchNorm sees one part at a time."""
    optimizer: Annotated[OptimizerConfig, BeforeValidator(as_stage)] = OptimizerConfig()
    """Optimizer and learning rate."""
    initialisation: Literal["own", "shared"] = "shared"
    """"shared": all agents start from the same weights, which then need no alignment; "own": each agent starts from its
    own, as models that exist already do."""
    loss: Named = NamedConfig(name="auto")
    """Loss of local training. "auto": "logit-adjusted" if an agent's class shares are far from those of all data, else
    "task", the task's own; "logit-adjusted", "calibrated", "restricted", "distillation", "not-true-distillation": for
    agents whose classes are skewed."""
    proximal: Annotated[float, Field(ge=0)] = 0.0
    """Strength μ of the proximal term, μ/2 times the squared distance from the weights at the start of the round (those
    after the last merge), which is added to the loss (FedProx, arXiv 1812.06127). 0: none."""
    optimizer_state: Literal["fresh", "kept", "merged"] | None = None
    """The optimizer's state at a merge: "kept" as it was, made "fresh" each round, or "merged": moments (Adam's,
    momentum) are sent with the weights (exchange.moments) and averaged too. Must be the same for all agents. The
    default depends on the merge method: "merged" if "dimat" averages or merges by regmean, else "kept"."""
    lr_schedule: LrScheduleConfig = LrScheduleConfig()
    """Learning rate over the run."""
    grad_clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest global 2-norm of gradients, to which larger ones are scaled down; no limit by default."""
    device: str = "auto"
    """"auto" (cuda if there is one, else cpu), "cpu", "cuda", "cuda:1", …"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the forward pass; fp16 scales the loss. Weights stay fp32."""
    eval_batch_size: Annotated[int, Field(ge=1)] = 512
    """Samples per forward pass in evaluation."""

    @model_validator(mode="after")
    def _epochs_or_steps(self) -> TrainConfig:
        if self.epochs_per_round is not None and self.steps_per_round is not None:
            raise ValueError("give epochs_per_round or steps_per_round, not both")
        return self
