"""What a pair computes, of every family: removed features have no influence, gradients flow."""

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from conftest import make_bilstm, make_image_rationalizer, make_rationalizer

from rekd_train.config.run import BackboneConfig
from rekd_train.errors import ConfigError
from rekd_train.inputs.policy import PAPER_POLICY, SelectionPolicy, mask_by_specification
from rekd_train.models import build_backbone
from rekd_train.models.base import Predictor, relaxed_log_choice, selection_scores, straight_through_gate
from rekd_train.training.losses import gumbel

FAMILIES = {"transformers": partial(make_rationalizer, 1), "bilstm": make_bilstm, "timm": make_image_rationalizer}
IMAGES = np.random.default_rng(3).integers(0, 256, (5, 16, 12, 1), dtype=np.uint8)
WITH_PADDING = SelectionPolicy(bias=None, budget=0.5, minimum=0, selectable="all")


def tensors(pair, items, pad_to=None):
    return {name: torch.from_numpy(a) for name, a in pair.preprocessor(items, pad_to).inputs.items()}


@pytest.fixture(scope="module", params=product(FAMILIES, ["compact", "zero"]), ids=" ".join)
def pair(request):
    family, operator = request.param
    return FAMILIES[family](operator=operator)


@pytest.fixture
def items(pair, texts):
    return texts if pair.preprocessor.settings.kind == "text" else IMAGES


@pytest.fixture
def inputs(pair, items):
    return tensors(pair, items)


def changed(inputs, where):
    """Other content at the features (B, N) that are named."""
    if "pixels" in inputs:
        patches = where.view(-1, 4, 3).repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(-1)
        return {"pixels": torch.where(patches, 255 - inputs["pixels"], inputs["pixels"])}
    return inputs | {"input_ids": torch.where(where, (inputs["input_ids"] + 3) % 40 + 7, inputs["input_ids"])}


def alone(*positions: int) -> torch.Tensor:
    """A mask (1, 16) that keeps these."""
    return torch.isin(torch.arange(16), torch.tensor(positions))[None]


def positions(answer) -> list[int]:
    return [piece.position for piece in answer.pieces] or [patch.row * 3 + patch.column for patch in answer.rationale]


# what is computed


@torch.inference_mode()
def test_shapes_and_types(pair, items, inputs):
    logits, (scores, mask) = pair.selector_logits(inputs), pair.select(inputs)
    found = [(tuple(t.shape), t.dtype) for t in (logits, scores, mask, pair.class_logits(inputs, mask))]
    size, real = tuple(mask.shape), torch.float32
    assert found == [((*size, 2), real), (size, real), (size, torch.bool), ((len(mask), len(pair.labels)), real)]
    assert torch.equal(scores, selection_scores(logits))
    assert len({id(p) for p in pair.parameters()}) == sum(len(list(m.parameters())) for m in pair.children())
    expected = mask_by_specification(scores.numpy(), pair.selectable(inputs).numpy(), pair.policy)
    assert mask.numpy().tolist() == expected.tolist() and (mask.sum(dim=1) >= 1).all()
    assert torch.equal(pair.class_logits(inputs), pair.class_logits(inputs, pair.selectable(inputs)))
    if "input_ids" in inputs:  # words alone are selectable
        for row, encoding in zip(pair.selectable(inputs), pair.preprocessor.encode(items), strict=True):
            expected = [not special for special in encoding.special_tokens_mask]
            assert row.tolist() == expected + [False] * (len(row) - len(expected))


@pytest.mark.parametrize("policy", [SelectionPolicy(budget=0.5), PAPER_POLICY, WITH_PADDING])
@torch.inference_mode()
def test_capacity_and_budget_are_those_of_the_longest_input(policy):
    pair = make_rationalizer(policy=policy)
    inputs = tensors(pair, ["good bad fun " * 30])
    (scores, mask), selectable = pair.select(inputs), pair.selectable(inputs)
    assert selectable.shape[1] == 48 and pair.capacity == policy.capacity(selectable.sum().item())
    expected = mask_by_specification(scores.numpy(), selectable.numpy(), policy)
    assert mask.sum().item() == expected.sum() and (policy is not WITH_PADDING or expected.sum() == 24)
    assert make_image_rationalizer(policy=policy).capacity == (12 if policy.budget is None else 6)


def test_predict_is_the_sum_of_its_parts(pair, items, inputs):
    with torch.no_grad():
        scores, mask = pair.select(inputs)
        probabilities = torch.softmax(pair.class_logits(inputs, mask) / pair.probability_temperature, dim=-1)
    pair.train()
    torch.manual_seed(123)  # no dropout, no noise
    whole, single = pair.predict(items), pair.predict(items, batch_size=1)
    for row, (answer, other) in enumerate(zip(whole, single, strict=True)):
        kept = mask[row].nonzero().flatten().tolist()
        assert answer.label == pair.labels[probabilities[row].argmax()]
        for found in (answer, other):
            assert positions(found) == kept
            assert list(found.probabilities.values()) == pytest.approx(probabilities[row].tolist(), abs=1e-5)


def test_where_padding_is_selectable_neighbours_in_a_batch_change_no_answer(texts):
    pair = make_rationalizer(policy=WITH_PADDING.model_copy(update={"budget": 0.25}))
    (together, *_), (single,) = pair.predict(["bad", *texts]), pair.predict(["bad"])
    assert positions(together) == positions(single)
    assert together.probability == pytest.approx(single.probability, abs=1e-5)
    mask = pair.select(tensors(pair, ["bad"], pad_to=pair.preprocessor.positions)).mask
    assert positions(single) == mask[0, :3].nonzero().flatten().tolist()


# removed features have no influence


@torch.inference_mode()
def test_what_is_not_selected_has_no_influence_at_all_and_what_is_has(pair, inputs):
    """The swap test: other content in every unselected place, the mask held, the same logits bit for bit."""
    mask = pair.select(inputs).mask
    dropped = pair.selectable(inputs) & ~mask
    other = changed(inputs, dropped)
    assert dropped.sum() > 20 and mask.any()
    for logits in (pair.class_logits, pair.gathered_class_logits):
        assert torch.equal(logits(inputs, mask), logits(other, mask))
    if pair.predictor.operator == "compact":
        masked, gathered = pair.class_logits(inputs, mask), pair.gathered_class_logits(inputs, mask)
        torch.testing.assert_close(gathered, masked, atol=1e-5, rtol=0)
    assert not torch.allclose(pair.class_logits(inputs), pair.class_logits(other))
    difference = pair.class_logits(inputs, mask) - pair.class_logits(changed(inputs, mask), mask)
    assert (difference.abs().amax(dim=1) > 1e-4).all()


@torch.inference_mode()
def test_compact_sees_positions_but_not_the_length_of_the_text_and_zero_multiplies_the_content():
    pair = make_rationalizer()
    films, longer = (tensors(pair, [" ".join(["film"] * count)]) for count in (10, 13))
    early, late = (pair.gathered_class_logits(films, alone(position)) for position in (2, 9))
    assert not torch.allclose(early, late, atol=1e-4), "the same word at another place is another input"
    assert torch.equal(pair.class_logits(films, alone(2)), pair.class_logits(longer, alone(2))), "[SEP] would tell"
    # against an independent computation: embeddings times the mask, special tokens untouched, all attended
    pair = make_rationalizer(operator="zero")
    inputs, bert = tensors(pair, ["the film was great"]), pair.predictor.backbone.model
    content = bert.embeddings.word_embeddings(inputs["input_ids"]).clone()
    content[0, [1, 3]] = 0.0
    state = bert(inputs_embeds=content, attention_mask=inputs["attention_mask"]).last_hidden_state[:, 0]
    found = pair.class_logits(inputs, alone(2, 4).float())
    torch.testing.assert_close(found, pair.predictor.head(state), atol=1e-6, rtol=1e-6)


# the gate that is learned with


def test_the_gate_is_hard_forward_and_soft_backward():
    logits = torch.randn(3, 7, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    noise = gumbel(1, torch.arange(3), 7)
    gate = straight_through_gate(logits, 0.7, noise)
    soft = torch.softmax((logits + noise) / 0.7, dim=-1)[..., 1]
    assert torch.equal(gate.mask, (soft > 0.5).float()), "exactly 0 or 1: blanks must hold nothing at all"
    assert 0 < gate.mask.sum() < 21
    weights = torch.arange(1.0, 22.0).reshape(3, 7)
    (gate.mask * weights).sum().backward()
    (expected,) = torch.autograd.grad((soft * weights).sum(), logits)
    torch.testing.assert_close(logits.grad, expected)
    assert (logits.grad != 0).all()
    assert torch.equal(straight_through_gate(logits, 0.1, None).mask > 0.5, selection_scores(logits) > 0)
    assert torch.equal(relaxed_log_choice(logits, 2.0, None), torch.log_softmax(logits / 2.0, dim=-1))


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
def test_the_gradient_reaches_the_selector_through_every_place_of_the_mask(make, texts):
    pair = make(operator="zero").train()
    inputs = tensors(pair, texts if make is not make_image_rationalizer else IMAGES)
    gate = straight_through_gate(pair.selector_logits(inputs), 1.0, None)
    gate.mask.retain_grad()
    labels = torch.zeros(len(IMAGES), dtype=torch.long)
    torch.nn.functional.cross_entropy(pair.class_logits(inputs, gate.mask), labels).backward()
    assert torch.equal(gate.mask.grad != 0, pair.selectable(inputs))
    first = next(pair.selector.backbone.parameters())
    assert pair.selector.head[-1].weight.grad.abs().sum() > 0 and first.grad.abs().sum() > 0
    assert next(pair.predictor.backbone.parameters()).grad.abs().sum() > 0


# building


@pytest.mark.parametrize(("settings", "operator", "message"), [
    ({"family": "lstm"}, "zero", "unknown family 'lstm'; families: .*transformers"),
    ({"family": "bilstm", "width": 7, "heads": 1}, "zero", "even width"),
    ({"family": "vit"}, "zero", "section 'image'"),
    ({}, "sideways", "'sideways'.*zero, compact"),
])  # fmt: skip
def test_what_cannot_be_built_is_named(settings, operator, message):
    sizes = {"layers": 1, "width": 8, "heads": 2, "feedforward": 8, "positions": 8}
    with pytest.raises(ConfigError, match=message):
        Predictor(build_backbone(BackboneConfig(**sizes | settings), {"pad": 0}), 2, operator)


def test_the_class_head_starts_as_the_configuration_says() -> None:
    torch.manual_seed(0)
    sizes = {"layers": 1, "width": 8, "heads": 2, "feedforward": 8, "vocabulary": 50}
    paper, own = (
        Predictor(build_backbone(BackboneConfig(class_head=start, **sizes), {"pad": 0}), classes=3).head[1]
        for start in ("xavier", "pytorch")
    )
    assert not paper.bias.any() and own.bias.any()
    # Xavier's bound is sqrt(6 / (8 + 3)), PyTorch's 1 / sqrt(8)
    assert own.weight.abs().max() < 0.36 < paper.weight.abs().max() <= (6 / 11) ** 0.5
