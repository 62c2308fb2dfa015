"""Every family and both operators, from the checkpoint to an answer without a server."""

import numpy as np
import onnx
import pytest
from families import KINDS, LIBRARIES, assert_same_answers, some_images
from triton_stub import ask, started, watched

from rekd_deploy.client.pipeline import Pipeline
from rekd_deploy.errors import ParityError
from rekd_deploy.export.graphs import export
from rekd_deploy.parity.examples import Examples
from rekd_deploy.parity.gate import check_parity
from rekd_deploy.repository.config import PREDICTOR, SELECTOR, read_config
from rekd_deploy.repository.writer import write_repository
from rekd_train.checkpoints.checkpoint import save

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[*KINDS, *LIBRARIES])
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = (KINDS | LIBRARIES)[request.param]()
    (folder / "work").mkdir()
    artefacts = export(save(model, folder / "checkpoint"), folder / "work", single_graph=True)
    return model, artefacts, write_repository(artefacts, folder / "repository")


def items(model, texts):
    if model.preprocessor.settings.kind == "text":
        return [*texts, *reversed(texts)]
    return [*some_images(), *some_images(2, height=40, width=30)]


@pytest.mark.parametrize("single_graph", [False, True], ids=["two steps", "one graph"])
def test_pipeline_answers_as_the_model(family, texts, single_graph):
    model, _, repository = family
    many = items(model, texts)
    with Pipeline(repository, batch_size=4, single_graph=single_graph) as pipeline:
        assert_same_answers(pipeline.predict(many), model.predict(many))
        assert_same_answers(pipeline.predict(many[:1]), model.predict(many[:1]))
        lengths = getattr(pipeline.preprocessor.settings, "buckets", ())
    assert model.policy.selectable == "real" or set(lengths) <= {48}, "where padding counts, all of it"


def test_padding_for_a_longer_neighbour_changes_no_answer(family, inside_triton):
    """Inside Triton: budgets are of each text's own tokens, and each answer has its request's own length."""
    model, artefacts, repository = family
    if model.preprocessor.settings.kind != "text" or model.policy.selectable == "all":
        config = read_config(repository / SELECTOR / "config.pbtxt")
        assert not any(tensor.allow_ragged_batch for tensor in config.input), "such texts are never padded"
        return
    signature, steps = artefacts.signature, [started(repository, name) for name in (SELECTOR, PREDICTOR)]
    handed_over = [spec.name for spec in signature.predictor.inputs]
    groups = (["good"], ["bad film " * 9, "good"], ["a dull plot"], ["good film " * 30])
    requests = [dict(model.preprocessor(some).inputs) for some in groups]
    def answers(*requests):
        chosen = ask(steps[0], SELECTOR, *requests, outputs=[spec.name for spec in signature.selector.outputs])
        known = [{**given, **answer.outputs} for given, answer in zip(requests, chosen, strict=True)]
        read = [{name: each[name] for name in handed_over} for each in known]
        return [{**each, **answer.outputs} for each, answer in zip(known, ask(steps[1], PREDICTOR, *read), strict=True)]
    alone = [answers(request)[0] for request in requests]
    batches = [watched(step) for step in steps]
    for step in steps:
        step.execute.__globals__["groups_by_length"] = lambda inputs, run_in_tokens: [sorted(inputs)]
    together = answers(*requests)
    assert batches == [[(5, 48)], [(5, 48)]], "texts of 16, 32 and 48 tokens as one batch"
    for given, answer, wanted in zip(requests, together, alone, strict=True):
        for name in {"scores", "mask", "keep"} & answer.keys():
            assert answer[name].shape == given["input_ids"].shape
        np.testing.assert_array_equal(answer["mask"], wanted["mask"])
        real = given["attention_mask"] > 0
        np.testing.assert_allclose(answer["scores"][real], wanted["scores"][real], atol=1e-5)
        np.testing.assert_allclose(answer["probabilities"], wanted["probabilities"], atol=1e-5)


def test_manifest_and_single_graph_are_the_models_own(family, tmp_path):
    model, artefacts, _ = family
    manifest = artefacts.manifest
    assert manifest["operator"] == model.predictor.operator
    assert manifest["preprocessing"]["kind"] == model.preprocessor.settings.kind
    assert set(manifest["artefacts"]) == {"selector", "predictor", "single"}
    for parity in (manifest["parity"], manifest["single_parity"]):
        assert parity["examples"] == 64 and parity["source"] == "generated"
        assert parity["rule_violations"] == parity["handover_violations"] == parity["label_disagreements"] == 0
        assert 0 < parity["score_difference"] <= 1e-4 and parity["logit_difference"] <= 1e-4
    model, artefacts, _ = family
    loaded = {role: onnx.load(path) for role, path in artefacts.graphs.items()}
    single, names = loaded["single"], [spec.name for spec in artefacts.signature.ensemble.outputs]
    assert [value.name for value in single.graph.output] == names == ["scores", "mask", "logits", "probabilities"]
    handed_over = {spec.name for spec in artefacts.signature.handover}
    assert handed_over in ({"keep"}, {"positions", "kept"}) and not handed_over & {*names}
    tensors = {tensor.name: tensor for tensor in single.graph.initializer}
    assert len(tensors) == len(single.graph.initializer)
    weights = {
        role: sum(onnx.numpy_helper.to_array(tensor).size for tensor in each.graph.initializer)
        for role, each in loaded.items()}
    assert weights["single"] == weights["selector"] + weights["predictor"]
    bias = tensors["predictor/predictor.head.1.bias"]
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
    onnx.save(single, tmp_path / "single.onnx")
    generated = items(model, ["good plot", "a dull story"])[:2]
    with pytest.raises(ParityError, match="a class logit on the same mask"):
        check_parity(model, {"single": tmp_path / "single.onnx"}, Examples(generated, "file"))
