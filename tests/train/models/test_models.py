"""What the pair computes: removed features have no influence, padding neither, gradients flow."""

import pytest
import torch
from conftest import make_rationalizer, tiny_tokenizer_json

from rekd_train.config.run import BackboneConfig
from rekd_train.errors import ConfigError
from rekd_train.inputs.policy import PAPER_POLICY, SelectionPolicy, mask_by_specification
from rekd_train.inputs.text import TextPreprocessor, TextSettings
from rekd_train.models import FAMILIES, build_backbone
from rekd_train.models.base import Predictor
from rekd_train.models.gates import relaxed_log_choice, selection_scores, straight_through_gate
from rekd_train.training.losses import gumbel

OPERATORS = ["compact", "zero"]


def tensors(rationalizer, texts, pad_to=None):
    return {name: torch.from_numpy(a) for name, a in rationalizer.preprocessor(texts, pad_to).inputs.items()}


@pytest.fixture(scope="module", params=OPERATORS)
def pair(request):
    return make_rationalizer(seed=1, operator=request.param)


# shapes and the facade


def test_shapes_and_types(pair, texts):
    inputs = tensors(pair, texts)
    batch, length = inputs["input_ids"].shape
    with torch.no_grad():
        logits = pair.selector_logits(inputs)
        scores, mask = pair.select(inputs)
        classes = pair.class_logits(inputs, mask)
    assert (logits.shape, logits.dtype) == ((batch, length, 2), torch.float32)
    assert (scores.shape, scores.dtype) == ((batch, length), torch.float32)
    assert (mask.shape, mask.dtype) == ((batch, length), torch.bool)
    assert (classes.shape, classes.dtype) == ((batch, 2), torch.float32)
    assert torch.equal(scores, selection_scores(logits))


def test_select_is_the_stored_policy(pair, texts):
    inputs = tensors(pair, texts)
    with torch.no_grad():
        scores, mask = pair.select(inputs)
    expected = mask_by_specification(scores.numpy(), pair.selectable(inputs).numpy(), pair.policy)
    assert mask.numpy().tolist() == expected.tolist()
    assert mask.sum() > 0 and (mask.sum(dim=1) >= 1).all()


def test_only_words_are_selectable(pair, texts):
    inputs = tensors(pair, texts)
    selectable = pair.selectable(inputs)
    for row, encoding in enumerate(pair.preprocessor.encode(texts)):
        expected = [not special for special in encoding.special_tokens_mask]
        assert selectable[row, : len(expected)].tolist() == expected
        assert not selectable[row, len(expected) :].any()


def test_capacity_covers_the_longest_input(texts):
    for policy in (SelectionPolicy(budget=0.5), SelectionPolicy(budget=None, bias=0.0), PAPER_POLICY):
        pair = make_rationalizer(policy=policy)
        inputs = tensors(pair, ["good " * 100])
        assert inputs["input_ids"].shape[1] == 48
        selectable = pair.selectable(inputs).sum().item()
        assert pair.capacity == policy.capacity(selectable)


def test_the_budget_of_the_paper_policy_counts_every_position():
    policy = SelectionPolicy(bias=None, budget=0.5, minimum=0, selectable="all")
    pair = make_rationalizer(policy=policy)
    inputs = tensors(pair, ["good bad fun " * 30])
    with torch.no_grad():
        scores, mask = pair.select(inputs)
    expected = mask_by_specification(scores.numpy(), pair.selectable(inputs).numpy(), policy)
    assert mask.sum().item() == 24 == expected.sum()


def test_no_mask_means_every_selectable_feature(pair, texts):
    inputs = tensors(pair, texts)
    with torch.no_grad():
        assert torch.equal(pair.class_logits(inputs), pair.class_logits(inputs, pair.selectable(inputs)))


def test_predict_is_the_sum_of_its_parts(pair, texts):
    inputs = tensors(pair, texts)
    with torch.no_grad():
        selection = pair.select(inputs)
        probabilities = torch.softmax(pair.class_logits(inputs, selection.mask) / pair.probability_temperature, dim=-1)
    predictions = pair.predict(texts)
    assert [p.label for p in predictions] == [pair.labels[i] for i in probabilities.argmax(dim=1).tolist()]
    for row, prediction in enumerate(predictions):
        assert list(prediction.probabilities.values()) == pytest.approx(probabilities[row].tolist(), abs=1e-7)
        assert [piece.position for piece in prediction.pieces] == selection.mask[row].nonzero().flatten().tolist()


def test_answers_do_not_depend_on_the_batch_size(pair, texts):
    whole = pair.predict(texts)
    for one, other in zip(whole, pair.predict(texts, batch_size=1), strict=True):
        assert [piece.position for piece in one.pieces] == [piece.position for piece in other.pieces]
        assert one.probability == pytest.approx(other.probability, abs=1e-5)


def test_where_padding_is_selectable_neighbours_in_a_batch_change_no_answer(texts):
    pair = make_rationalizer(policy=SelectionPolicy(bias=None, budget=0.25, minimum=0, selectable="all"))
    together, alone = pair.predict(["bad", *texts]), pair.predict(["bad"])
    assert [piece.position for piece in together[0].pieces] == [piece.position for piece in alone[0].pieces]
    assert together[0].probability == pytest.approx(alone[0].probability, abs=1e-5)
    with torch.no_grad():
        mask = pair.select(tensors(pair, ["bad"], pad_to=pair.preprocessor.positions)).mask
    assert {piece.position for piece in alone[0].pieces} == set(mask[0, :3].nonzero().flatten().tolist())


def test_predicting_is_deterministic_even_from_training_mode(texts):
    pair = make_rationalizer()
    first = pair.predict(texts)
    pair.train()
    torch.manual_seed(123)
    assert pair.predict(texts) == first, "no dropout, no noise"


# removed features and padding have no influence


def test_unselected_tokens_have_no_influence_at_all(pair, texts):
    """The swap test: other words in every unselected place, the mask held, the same logits bit for bit."""
    inputs = tensors(pair, texts)
    with torch.no_grad():
        mask = pair.select(inputs).mask
        swapped = inputs["input_ids"].clone()
        removed = pair.selectable(inputs) & ~mask
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(7, 40, swapped.shape, generator=generator)
        swapped[removed] = words[removed]
        assert (swapped != inputs["input_ids"]).sum() > 20
        changed = {**inputs, "input_ids": swapped}
        assert torch.equal(pair.class_logits(inputs, mask), pair.class_logits(changed, mask))
        if pair.predictor.operator == "compact":
            assert torch.equal(pair.gathered_class_logits(inputs, mask), pair.gathered_class_logits(changed, mask))


def test_selected_tokens_do_have_influence(pair, texts):
    inputs = tensors(pair, texts)
    with torch.no_grad():
        mask = pair.select(inputs).mask
        swapped = torch.where(mask, (inputs["input_ids"] + 3) % 40 + 7, inputs["input_ids"])
        difference = pair.class_logits(inputs, mask) - pair.class_logits({**inputs, "input_ids": swapped}, mask)
    assert (difference.abs().amax(dim=1) > 1e-4).all()


def test_padding_never_changes_an_answer(pair, texts):
    short = tensors(pair, texts[:2])
    with torch.no_grad():
        expected = pair.select(short)
        logits = pair.class_logits(short, expected.mask)
        everything = pair.class_logits(short)
        for width in (17, 32, 48):
            padded = tensors(pair, texts[:2], pad_to=width)
            scores, mask = pair.select(padded)
            torch.testing.assert_close(scores[:, :16], expected.scores, atol=1e-6, rtol=0)
            assert torch.equal(mask[:, :16], expected.mask) and not mask[:, 16:].any()
            torch.testing.assert_close(pair.class_logits(padded, mask), logits, atol=1e-6, rtol=0)
            torch.testing.assert_close(pair.class_logits(padded), everything, atol=1e-6, rtol=0)


def test_what_lies_under_the_padding_does_not_matter(pair, texts):
    inputs = tensors(pair, texts[:2])
    padding = inputs["attention_mask"] == 0
    other = {**inputs, "input_ids": torch.where(padding, 20, inputs["input_ids"])}
    with torch.no_grad():
        selection, again = pair.select(inputs), pair.select(other)
        assert torch.equal(selection.mask, again.mask)
        assert torch.equal(pair.class_logits(inputs, selection.mask), pair.class_logits(other, selection.mask))


# the two operators


def test_gathered_equals_masked_for_compact(texts):
    pair = make_rationalizer(seed=3)
    inputs = tensors(pair, texts)
    generator = torch.Generator().manual_seed(1)
    selectable = pair.selectable(inputs)
    with torch.no_grad():
        masks = [pair.select(inputs).mask, torch.zeros_like(selectable)]
        for _ in range(5):
            drawn = selectable & (torch.rand(selectable.shape, generator=generator) < 0.4)
            masks.append(drawn & (drawn.cumsum(dim=1) <= pair.capacity))
        for mask in masks:
            masked, gathered = pair.class_logits(inputs, mask), pair.gathered_class_logits(inputs, mask)
            torch.testing.assert_close(gathered, masked, atol=1e-5, rtol=0)
        assert not torch.allclose(pair.class_logits(inputs, masks[0]), pair.class_logits(inputs, masks[2]), atol=1e-3)


def test_kept_words_keep_their_positions(texts):
    """The same word kept at another place is another input, also when gathered."""
    pair = make_rationalizer()
    words = ["film"] * 12
    inputs = tensors(pair, [" ".join(words)])
    early, late = (torch.zeros(1, 16, dtype=torch.bool) for _ in range(2))
    early[0, 2], late[0, 9] = True, True
    with torch.no_grad():
        answers = [pair.gathered_class_logits(inputs, mask) for mask in (early, late)]
    assert not torch.allclose(*answers, atol=1e-4)


def test_compact_does_not_see_the_length_of_the_text():
    pair = make_rationalizer(operator="compact")
    with torch.no_grad():
        answers = []
        for text in ("the film was great", "the film was great and the plot is fun"):
            inputs = tensors(pair, [text])
            mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
            mask[0, 4] = True
            answers.append(pair.class_logits(inputs, mask))
    assert torch.equal(*answers), "[SEP] would tell"


def test_zero_still_attends_to_blank_slots():
    pair = make_rationalizer(operator="zero")
    inputs = tensors(pair, ["the film was great"])
    mask = pair.selectable(inputs) & False
    mask[0, 4] = True
    with torch.no_grad():
        zeroed = pair.class_logits(inputs, mask)
        pair.predictor.operator = "compact"
        assert not torch.allclose(zeroed, pair.class_logits(inputs, mask), atol=1e-3)


def test_zero_multiplies_the_content():
    """Against an independent computation: embeddings times the mask, special tokens untouched."""
    pair = make_rationalizer(operator="zero")
    inputs = tensors(pair, ["the film was great"])
    keep = torch.zeros(1, 16)
    keep[0, [2, 4]] = 1.0
    bert = pair.predictor.backbone.bert
    content = bert.embeddings.word_embeddings(inputs["input_ids"]).clone()
    content[0, [1, 3]] = 0.0
    with torch.no_grad():
        state = bert(inputs_embeds=content, attention_mask=inputs["attention_mask"]).last_hidden_state[:, 0]
        torch.testing.assert_close(pair.class_logits(inputs, keep), pair.predictor.head(state), atol=1e-6, rtol=1e-6)


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


def test_without_noise_the_choice_is_the_sign_of_the_score():
    logits = torch.randn(50, 2, generator=torch.Generator().manual_seed(3))
    gate = straight_through_gate(logits[None], 0.1, None)
    assert torch.equal(gate.mask[0] > 0.5, selection_scores(logits) > 0)
    assert torch.equal(relaxed_log_choice(logits, 2.0, None), torch.log_softmax(logits / 2.0, dim=-1))


def test_the_gradient_reaches_the_selector_through_the_mask(texts):
    pair = make_rationalizer(operator="zero").train()
    inputs = tensors(pair, texts)
    gate = straight_through_gate(pair.selector_logits(inputs), 1.0, None)
    labels = torch.zeros(len(texts), dtype=torch.long)
    torch.nn.functional.cross_entropy(pair.class_logits(inputs, gate.mask), labels).backward()
    assert pair.selector.head[-1].weight.grad.abs().sum() > 0
    assert pair.selector.backbone.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0


# building


def test_families_and_operators_are_checked_by_name():
    special_ids = TextPreprocessor(tiny_tokenizer_json(), TextSettings(max_length=48)).special_ids
    assert "bert" in FAMILIES
    with pytest.raises(ConfigError, match="unknown family 'lstm'; families: .*bert"):
        build_backbone(BackboneConfig(family="lstm"), special_ids)
    backbone = build_backbone(BackboneConfig(layers=1, width=8, heads=2, feedforward=8, positions=8), special_ids)
    with pytest.raises(ConfigError, match="'sideways'.*zero, compact"):
        Predictor(backbone, 2, "sideways")


def test_selector_and_predictor_share_nothing(pair):
    selector, predictor = ({id(p) for p in module.parameters()} for module in (pair.selector, pair.predictor))
    assert not selector & predictor


def test_the_class_head_starts_as_the_configuration_says() -> None:
    def head(start: str) -> torch.nn.Linear:
        torch.manual_seed(0)
        settings = BackboneConfig(layers=1, width=8, heads=2, feedforward=8, vocabulary=50, class_head=start)
        return Predictor(build_backbone(settings, {"pad": 0, "cls": 1, "sep": 2, "unk": 3}), classes=3).head[1]

    paper, own = head("xavier"), head("pytorch")
    assert not paper.bias.any() and own.bias.any()
    # Xavier's bound is sqrt(6 / (8 + 3)), PyTorch's 1 / sqrt(8)
    assert own.weight.abs().max() < 0.36 < paper.weight.abs().max() <= (6 / 11) ** 0.5
