"""The sections of a configuration that say how a pair is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rekd_train.config.sections import Section


class SelectionConfig(Section):
    """How much a rationale may hold: the penalty that trains it and the rule that is stored."""

    target: float = Field(
        0.10, gt=0, le=1, description="mean share of the features to keep: trained for, calibrated on dev"
    )
    budget: float | None = Field(
        0.15, gt=0, le=1, description="largest share kept of any one input, unless minimum is more; none: no limit"
    )
    minimum: int = Field(3, ge=0, description="least features kept of any input that has so many; images: 1 by default")
    weight: float = Field(20.0, ge=0, description="weight (lambda) of the penalty for keeping more or less than target")
    penalty_per: Literal["batch", "example"] = Field(
        "batch", description="'batch': the mean of a batch meets the target (the paper); 'example': each example does"
    )
    penalty_on: Literal["shares", "counts"] = Field(
        "shares", description="'shares': (rate - target)^2; 'counts': (features kept - target N)^2, the paper's"
    )
    continuity: float = Field(
        0.0,
        ge=0,
        description="weight of a penalty on neighbours of which one is kept and one is not (images: both axes)",
    )
    denominator: Literal["real", "all"] = Field(
        "real", description="N of the penalty: real features, or 'all' positions with padding and specials (the paper)"
    )
    selectable: Literal["real", "all"] = Field(
        "real", description="what may be kept: real features, or 'all' positions (the paper); 'all' pads to full length"
    )
    decision: Literal["calibrated", "argmax", "top-k"] = Field(
        "calibrated",
        description="stored rule: bias fitted on dev, no bias, or exactly target x features (minimum, if more) of each",
    )

    @model_validator(mode="after")
    def _target_within_budget(self) -> SelectionConfig:
        if self.budget is not None and self.target > self.budget:
            raise ValueError(f"target ({self.target}) must not exceed budget ({self.budget})")
        return self


class TemperatureConfig(Section):
    """Gumbel-softmax temperature, exponential from start to end (REKD sec. 3.2)."""

    start: float = Field(2.0, gt=0, description="at the first step (tau_0)")
    end: float = Field(0.1, gt=0, description="at the last step (tau_K)")
    refresh: int = Field(1, ge=1, description="steps between two changes (the paper: 100)")


class DistillationConfig(Section):
    """What is learned from a teacher pair (REKD sec. 3.3); unused without a teacher."""

    alpha: float | Literal["anneal"] = Field(
        0.5,
        description="weight of the extraction loss, 0..1; 1 - alpha: of the distillation loss; 'anneal': from 0 to 1",
    )
    rationale_weight: float = Field(0.5, ge=0, description="lambda_R of the rationale term; 0: predictions only")
    prediction_weight: float = Field(
        1.0, ge=0, description="weight of the prediction term tau^2 KL; 0: rationales only"
    )
    noise: Literal["independent", "none"] = Field("none", description="Gumbel noise in the rationale term")
    rationale_temperature: float | None = Field(
        1.0, gt=0, description="fixed tau of the rationale term; none: the annealed one"
    )
    teacher_mask: Literal["student", "teacher"] = Field(
        "teacher", description="whose rationale the teacher's predictor reads"
    )
    hard_labels: bool = Field(
        False, description="learn the teacher's decisions (its mask, its label) instead of its distributions"
    )
    mark_smoothing: float = Field(0.05, ge=0, lt=0.5, description="chance that a mark, or its lack, is wrong")
    unmarked_weight: float = Field(0.5, ge=0, description="of tokens in no recorded passage; of those inside: 1")
    classifier: bool = Field(
        False, description="distil predictions in the classifier stage, too: plain KD when rationale_epochs is 0"
    )

    @model_validator(mode="after")
    def _alpha_is_a_share(self) -> DistillationConfig:
        if self.alpha != "anneal" and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha ({self.alpha}) must lie within 0..1 or be 'anneal'")
        return self


class OptimisationConfig(Section):
    """AdamW, for each stage."""

    batch_size: int = Field(64, ge=1, description="examples in a step, over all processes")
    learning_rate: float = Field(5e-4, gt=0, description="at its peak")
    embedding_learning_rate: float | None = Field(None, gt=0, description="of the word embeddings; none: learning_rate")
    selector_learning_rate: float | None = Field(
        None, gt=0, description="of the selector: a smaller network takes a larger one; none: learning_rate"
    )
    head_learning_rate: float | None = Field(
        None, gt=0, description="of the heads of selector and predictor, which start at random; none: as their networks"
    )
    schedule: Literal["linear", "constant"] = Field("linear", description="decay to 0 after the warm-up, or none")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's, decoupled from the loss")
    decay_everything: bool = Field(False, description="decay biases, norms and word embeddings, too (the paper)")
    betas: tuple[float, float] = Field((0.9, 0.98), description="of Adam's moments (the paper: 0.9, 0.999)")
    gradient_clip: float | None = Field(1.0, gt=0, description="largest global gradient norm; none: not clipped")
    freeze_selector_embeddings: bool = Field(
        False, description="the selector's word embeddings stay as they are in the rationale stage (the paper)"
    )

    @model_validator(mode="after")
    def _betas_below_one(self) -> OptimisationConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie within 0..1, 1 excluded")
        return self


class StagesConfig(Section):
    """Epochs of each stage (0 leaves it out) and which of its states is kept."""

    classifier_epochs: float = Field(
        2.0, ge=0, description="epochs in which the predictor alone learns the task (warm start)"
    )
    masked_share: float = Field(
        0.5, ge=0, le=1, description="share of those batches in which random features are dropped"
    )
    selector_warm_start: float | None = Field(
        None, ge=0, description="epochs of the selector's own warm start where its sizes are not the predictor's, "
        "whose weights it would start from, or it has pretrained ones of its own; with operator 'gather' its votes, "
        "whatever the sizes; none: classifier_epochs, or with 'gather' 0 where a teacher tells the rationale",
    )  # fmt: skip
    selector_start: Literal["votes", "evidence"] = Field(
        "votes",
        description="what a selector of gathered features learns first: 'votes': whose votes to weigh; 'evidence': "
        "which features speak most for the class that a classifier, its start, reads in the whole input; a head learns "
        "it, the network below stays as it is",
    )  # fmt: skip
    selector_classifier_epochs: float = Field(
        0.0, ge=0, description="with operator 'gather': epochs in which the selector first learns the class of whole "
        "inputs; its network then stays as it is while a head over it learns what to keep; 0: all of it learns that",
    )  # fmt: skip
    operator: Literal["zero", "gather"] = Field(
        "zero",
        description="what the predictor reads while both learn: 'zero': every position, blank where not kept (the "
        "paper); 'gather': the kept ones alone, at a tenth of the cost",
    )
    rationale_epochs: float = Field(
        1.0, ge=0, description="epochs in which both learn together; with a teacher: distillation"
    )
    compact_epochs: float = Field(
        1.0, ge=0, description="epochs in which the predictor learns to read kept features alone, selector frozen"
    )
    evaluate_every: float = Field(1.0, ge=0, description="epochs between dev evaluations; 0: the last state is kept")
    evaluation: Literal["served", "sampled"] = Field(
        "served", description="masks of those evaluations: by the stored rule, or drawn once (the paper)"
    )
    best_metric: Literal["accuracy", "macro_f1", "extraction_loss"] = Field(
        "accuracy",
        description="the state kept: highest dev accuracy or macro-F1 (where classes are rare), or least dev L_RE "
        "(the paper)",
    )
    patience: int | None = Field(
        None, ge=1, description="evaluations without improvement after which a stage ends; none: it never ends early"
    )
    save_every: int = Field(
        500, ge=0, description="steps between saves of the state that --resume reads; 0: only when a stage ends"
    )
    collapse_window: int = Field(
        200, ge=20, description="steps in a row with nothing or everything kept after which the run stops"
    )

    @model_validator(mode="after")
    def _evidence_is_of_single_features(self) -> StagesConfig:
        if self.selector_start == "evidence" and self.operator != "gather":
            raise ValueError("selector_start 'evidence' needs operator 'gather'")
        return self


class AccelerationConfig(Section):
    """What makes training faster; each can be switched off to see its worth (benchmarks/training_speed.py)."""

    length_buckets: bool = Field(True, description="batches of similar length, so that little padding is computed")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of matrix products; auto: bf16 on GPUs that have it, else fp32"
    )
