"""What a neural-model family provides, the two models built on it, and the ways from scores to a mask.

A *backbone* reads features (words, patches). The *selector* scores each feature; the *predictor*
classifies from the kept features alone. Both are final classes over any backbone: a family is added by
writing one backbone and registering it in ``FAMILIES``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from rekd_train.config.run import BackboneConfig
from rekd_train.errors import ConfigError
from rekd_train.inputs.policy import SelectionPolicy

Inputs = dict[str, Tensor]
Operator = Literal["zero", "compact"]


class Backbone(nn.Module, ABC):
    """Features of one family. B = batch, N = positions, K = kept slots, H = width."""

    settings: BackboneConfig

    modality: Literal["text", "image"]
    """Which preprocessing its inputs come from."""

    operators: tuple[str, ...] = ("zero", "compact")
    """What a predictor over it can do with the features that are not kept."""

    @property
    def columns(self) -> int | None:
        """Features in each row of a grid, that of the patches of an image; None: they are one line."""
        return None if self.settings.image is None else self.settings.image.grid[1]

    @abstractmethod
    def real(self, inputs: Inputs) -> Tensor:
        """(B, N) bool: positions that hold anything, padding excluded."""

    @abstractmethod
    def selectable(self, inputs: Inputs) -> Tensor:
        """(B, N) bool: features that a rationale may hold: no padding, no special token."""

    @abstractmethod
    def states(self, inputs: Inputs) -> Tensor:
        """(B, N, H): contextual state of every position, which the selector reads."""

    @abstractmethod
    def zeroed(self, inputs: Inputs, keep: Tensor) -> Tensor:
        """(B, H): pooled state with the content of each position times ``keep`` (B, N) float.

        The paper's operator: blank positions are still attended. Differentiable in ``keep``.
        """

    @abstractmethod
    def attended(self, inputs: Inputs, keep: Tensor) -> Tensor:
        """(B, H): pooled state when only the positions in ``keep`` (B, N) bool exist; static shape."""

    @abstractmethod
    def gathered(self, inputs: Inputs, positions: Tensor, kept: Tensor) -> Tensor:
        """(B, H): as ``attended``, computed on ``positions`` (B, K) int64 alone.

        ``kept`` (B, K) bool; or float, 0 or 1 and differentiable, which multiplies the content (``gated``).
        """

    def content(self, inputs: Inputs) -> Tensor:
        """(B, N, H): every position on its own, before any context; only ``stages.operator = "gather"`` asks."""
        raise ConfigError(f"{type(self).__name__} has no content(inputs) of single features, which "
                          "stages.operator=gather reads; fix: --set stages.operator=zero")  # fmt: skip


class TextBackbone(Backbone):
    """Inputs: ``input_ids`` and ``attention_mask``, int64 (B, N), right-padded, [CLS] at position 0."""

    modality = "text"
    special_ids: dict[str, int]
    """Token ids that are never selectable ([PAD], [CLS], [SEP])."""

    @property
    @abstractmethod
    def table(self) -> nn.Embedding:
        """The word embeddings."""

    def real(self, inputs: Inputs) -> Tensor:
        return inputs["attention_mask"] > 0

    def selectable(self, inputs: Inputs) -> Tensor:
        mask = self.real(inputs)
        for token_id in self.special_ids.values():
            mask = mask & (inputs["input_ids"] != token_id)
        return mask

    def content(self, inputs: Inputs) -> Tensor:
        return self.words(inputs["input_ids"])

    def words(self, input_ids: Tensor) -> Tensor:
        """(B, M, H) word embeddings, no position added."""
        return self.table(input_ids)

    def load_word_embeddings(self, table: Tensor) -> None:
        """Start from a (vocabulary, width) table."""
        with torch.no_grad():
            self.table.weight.copy_(table)


def gated(content: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Content (B, P + K, H), its last K slots times ``kept`` (B, K) if that is float; and ``kept`` as bool."""
    if kept.is_floating_point():
        ones = kept.new_ones(kept.shape[0], content.shape[1] - kept.shape[1])
        content = content * torch.cat([ones, kept], dim=1).to(content.dtype).unsqueeze(-1)
        kept = kept > 0.5
    return content, kept


def with_cls(positions: Tensor) -> Tensor:
    """(B, 1 + K): the positions (B, K) behind that of [CLS], 0; joined, since ONNX Runtime pads no int64 on a GPU."""
    return torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)


class Selector(nn.Module):
    """Scores features: (B, N, 2) logits, index 1 = select (REKD sec. 3.1)."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        settings = backbone.settings
        if settings.head_width:
            inner, out = nn.Linear(settings.width, settings.head_width), nn.Linear(settings.head_width, 2)
            self.head = nn.Sequential(inner, nn.ReLU(), nn.Dropout(settings.head_dropout), out)
        else:
            self.head = nn.Sequential(nn.Dropout(settings.head_dropout), nn.Linear(settings.width, 2))
        for module in self.head:
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, inputs: Inputs) -> Tensor:
        """(B, N, 2) float32 logits."""
        states = self.backbone.states(inputs)
        # rows of a matrix: exported as Gemm, which takes bias and ReLU along; over (B, N, H) each is a pass of its own
        return self.head(states.flatten(0, 1)).float().unflatten(0, states.shape[:2])


class Predictor(nn.Module):
    """Classifies from kept features. ``operator`` says how the others are removed.

    'zero' is the paper's: their content is zeroed, their slots are attended. 'compact' removes them
    from the computation; it is served by gathering. A predictor is served as it was trained.
    """

    def __init__(self, backbone: Backbone, classes: int, operator: Operator = "zero") -> None:
        super().__init__()
        self.backbone = backbone
        self.use(operator)
        settings = backbone.settings
        self.head = nn.Sequential(nn.Dropout(settings.head_dropout), nn.Linear(settings.width, classes))
        if settings.class_head == "xavier":
            nn.init.xavier_uniform_(self.head[1].weight)
            nn.init.zeros_(self.head[1].bias)

    def use(self, operator: Operator) -> None:
        """Remove features by that operator from now on; ConfigError: the backbone cannot."""
        if operator not in self.backbone.operators:
            known = ", ".join(self.backbone.operators)
            raise ConfigError(f"operator is {operator!r}; operators of this backbone: {known}")
        self.operator: Operator = operator

    def forward(self, inputs: Inputs, keep: Tensor, selectable: Tensor | None = None) -> Tensor:
        """(B, C) float32 logits.

        Args:
            keep: (B, N); selectable positions not kept are removed. Float (may carry a gradient) with
                the operator 'zero', bool or float with 'compact'.
            selectable: (B, N) bool, what ``keep`` decides about; None: the backbone's own. Real positions
                outside it keep their content with 'zero' and are not seen with 'compact'.
        """
        if selectable is None:
            selectable = self.backbone.selectable(inputs)
        if self.operator == "compact":
            return self.head(self.backbone.attended(inputs, selectable & (keep > 0.5))).float()
        fixed = self.backbone.real(inputs).float()
        return self.head(self.backbone.zeroed(inputs, torch.where(selectable, keep.float(), fixed))).float()

    def gathered(self, inputs: Inputs, positions: Tensor, kept: Tensor) -> Tensor:
        """(B, C) float32 logits from the kept positions alone; equals 'compact' on the same mask."""
        return self.head(self.backbone.gathered(inputs, positions, kept)).float()


# from scores to a mask: a noisy way to learn with (straight-through Gumbel-softmax, REKD sec. 3), and a noise-free one
# to use, the stored ``SelectionPolicy``, in operations that ONNX Runtime and TensorRT run alike


class Gate(NamedTuple):
    """A drawn mask and the distribution it was drawn from."""

    mask: Tensor
    """(B, N) float32, exactly 0 or 1 forward; backward it passes the gradient to ``log_soft`` (straight through)."""
    log_soft: Tensor
    """(B, N, 2) float32, log of the relaxed choice; index 1 = select."""


def relaxed_log_choice(logits: Tensor, temperature: float, noise: Tensor | None) -> Tensor:
    """log softmax((Z + G) / tau): (B, N, 2) from (B, N, 2). ``noise`` None means G = 0."""
    noisy = logits if noise is None else logits + noise
    return torch.log_softmax(noisy / temperature, dim=-1)


def straight_through_gate(logits: Tensor, temperature: float, noise: Tensor | None) -> Gate:
    """Hard mask forward, relaxed gradient backward: y = (y_hard - S).detach() + S (REKD sec. 3.2)."""
    log_soft = relaxed_log_choice(logits, temperature, noise)
    soft = log_soft[..., 1].exp()
    hard = (log_soft[..., 1] > log_soft[..., 0]).to(soft.dtype)
    return Gate(mask=(hard - soft).detach() + soft, log_soft=log_soft)


def selection_scores(logits: Tensor) -> Tensor:
    """d = z1 - z0 in float32: (B, N) from (B, N, 2)."""
    logits = logits.float()
    return logits[..., 1] - logits[..., 0]


def apply_policy(scores: Tensor, selectable: Tensor, policy: SelectionPolicy, capacity: int) -> Tensor:
    """The decision rule of ``rekd_train.inputs.policy``, exportable: fixed shapes, no sort order relied on.

    Only the *values* of a top-k are used; ties at the cut are resolved by a running count over the
    positions, so the lower index wins on every runtime.

    Args:
        scores: (B, N) float32.
        selectable: (B, N) bool.
        capacity: most features that can be kept, ``policy.capacity(longest input)``.

    Returns:
        (B, N) bool.
    """
    above_threshold = selectable if policy.bias is None else selectable & (scores + policy.bias > 0)
    if policy.budget is None and policy.minimum == 0:
        return above_threshold
    counts = selectable.to(torch.int64).sum(dim=1, keepdim=True)
    ranked_values = _ranked_values(scores, selectable, max(capacity, policy.minimum))
    mask = above_threshold
    if policy.budget is not None:
        # a count of whole steps instead of a division: exporters divide integers as float32, which rounds
        steps = torch.arange(1, max(capacity, policy.minimum) + 1, device=scores.device) * 1_000_000
        shares = (steps <= counts * policy.budget_parts_per_million).to(torch.int64).sum(dim=1, keepdim=True)
        limits = torch.minimum(shares.clamp(min=policy.minimum), counts)
        mask = mask & _highest(scores, selectable, ranked_values, limits)
    if policy.minimum > 0 and policy.bias is not None:  # without a threshold the limits hold it already
        mask = mask | _highest(scores, selectable, ranked_values, counts.clamp(max=policy.minimum))
    return mask


def _ranked_values(scores: Tensor, selectable: Tensor, count: int) -> Tensor:
    """The ``count`` highest selectable scores in descending order, padded with -inf: (B, count)."""
    lowest = torch.finfo(torch.float32).min
    return _highest_values(torch.where(selectable, scores, lowest), count, lowest)


def _highest_values(values: Tensor, count: int, lowest: float) -> Tensor:
    """(B, count) of (B, N) float32, descending, padded with ``lowest``."""
    # padding makes the top-k width independent of N, which stays symbolic in the exported graph
    padded = torch.nn.functional.pad(values, (0, count), value=lowest)
    return padded.topk(count, dim=1, sorted=True).values


def _highest(scores: Tensor, selectable: Tensor, ranked_values: Tensor, limits: Tensor) -> Tensor:
    """Mask of each row's ``limits`` (B, 1) best selectable positions, lower index first among equals."""
    cut = ranked_values.gather(1, (limits - 1).clamp(min=0))
    better = selectable & (scores > cut)
    equal = selectable & (scores == cut)
    places = limits - better.to(torch.int64).sum(dim=1, keepdim=True)
    return better | (equal & (equal.to(torch.int64).cumsum(dim=1) <= places))


def kept_positions(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Positions of the kept features, ascending, in ``capacity`` slots.

    The values of a top-k of the kept ones' negative positions, so there is no NonZero, no scatter and no data-dependent
    shape. Keys are float32, which every runtime ranks, and need no size from the host, which CUDA graphs refuse.

    Args:
        mask: (B, N) bool with at most ``capacity`` kept; N at most 2 ** 24.

    Returns:
        positions (B, K) int64, 0 in unused slots; kept (B, K) bool, whether a slot is used.
    """
    unused = -float(1 << 24)
    indices = torch.arange(mask.shape[1], device=mask.device)
    values = _highest_values(torch.where(mask, -indices.float(), unused), capacity, unused)
    kept = values > unused
    return torch.where(kept, -values, 0).to(torch.int64), kept
