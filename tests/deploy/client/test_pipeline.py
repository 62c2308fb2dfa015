"""The pipeline answers as the PyTorch model does, from the repository alone."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from rekd_deploy.client.batching import A_BATCH, Batches
from rekd_deploy.client.pipeline import Pipeline
from rekd_deploy.errors import EngineError, RepositoryError
from rekd_train.errors import InputError


@pytest.fixture(scope="module")
def pipeline(repository):
    with Pipeline(repository, batch_size=2) as pipeline:
        yield pipeline


def places(prediction):
    return [(span.start, span.end, span.text) for span in prediction.rationale]


@pytest.mark.parametrize("size", [0, -3])
def test_batches_of_nothing_are_refused(repository, size):
    with pytest.raises(InputError, match=f"batch_size {size} must be at least 1"):
        Pipeline(repository, batch_size=size)


def test_answers_are_the_models(pipeline, rationalizer, texts):
    many = [*texts, *reversed(texts), "good plot", "x " * 100_000]
    answers, expected = pipeline.predict(many), rationalizer.predict(many)
    assert [answer.text for answer in answers] == many
    for answer, wanted in zip(answers, expected, strict=True):
        assert (answer.label, answer.rate, answer.truncated) == (wanted.label, wanted.rate, wanted.truncated)
        assert places(answer) == places(wanted)
        assert [(p.token, p.position) for p in answer.pieces] == [(p.token, p.position) for p in wanted.pieces]
        assert list(answer.probabilities) == list(wanted.probabilities)
        np.testing.assert_allclose([*answer.probabilities.values()], [*wanted.probabilities.values()], atol=1e-4)
        np.testing.assert_allclose([s.score for s in answer.rationale], [s.score for s in wanted.rationale], atol=1e-4)
    assert answers[-1].truncated and not answers[0].truncated


def test_artefacts_answer_as_the_repository_made_of_them(artefacts, pipeline, texts, tmp_path):
    with Pipeline(artefacts, batch_size=2) as unplaced:
        assert unplaced.predict(texts) == pipeline.predict(texts)
    altered = tmp_path / "selector.onnx"
    altered.write_bytes(artefacts.selector.read_bytes()[:-1] + b"!")
    with pytest.raises(RepositoryError, match=r"selector.onnx was altered"):
        Pipeline(replace(artefacts, selector=altered))
    with pytest.raises(RepositoryError, match="the export holds no single graph"):
        Pipeline(artefacts, single_graph=True)


def test_batches_are_of_one_padded_length_and_cover_every_text(rationalizer):
    lengths = [40, 1, 20, 2, 3, 45, 4, 21]
    batches = list(Batches(rationalizer.preprocessor, ["good " * n for n in lengths], 2))
    assert sorted(place for places, _ in batches for place in places) == list(range(8))
    assert [encoded.inputs["input_ids"].shape for _, encoded in batches] == [(2, 16), (2, 16), (2, 32), (2, 48)]
    for places, encoded in batches:
        assert encoded.inputs["attention_mask"].sum(axis=1).tolist() == [lengths[place] + 2 for place in places]


@pytest.mark.parametrize("most", [2, 3, 8])
@pytest.mark.parametrize("sizes", [(1, 2, 4), (1, 4, 8), (3, 8)])
def test_batches_that_are_filled_up_are_the_cheapest_there_are(rationalizer, sizes, most):
    lengths = [40, 1, 20, 2, 3, 45, 4, 21, 30, 5]
    most = min(most, sizes[-1])
    batches = list(Batches(rationalizer.preprocessor, ["good " * n for n in lengths], most, filled_to=sizes))
    assert sorted(place for places, _ in batches for place in places) == list(range(10))
    for places, encoded in batches:
        assert encoded.inputs["attention_mask"].sum(axis=1).tolist() == [lengths[place] + 2 for place in places]
    shapes = [encoded.inputs["input_ids"].shape for _, encoded in batches]
    assert max(count for count, _ in shapes) <= most

    def cost(counts_and_lengths):
        return sum(A_BATCH + length * min(size for size in sizes if size >= n) for n, length in counts_and_lengths)

    padded, possible = sorted(rationalizer.preprocessor.bucket(length + 2) for length in lengths), []
    for inner in product([False, True], repeat=9):
        ends = [*(place + 1 for place, cut in enumerate(inner) if cut), 10]
        counts = np.diff([0, *ends])
        if max(counts) <= most:
            possible.append(cost(zip(counts, (padded[end - 1] for end in ends), strict=True)))
    assert cost(shapes) == min(possible)


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [
        ([], "the list of texts is empty"),
        ("good", "texts is str"),
        (None, "texts is NoneType"),
        ((text for text in ["good"]), "texts is generator"),
        (["good", "bad", " "], "text 3 is only white space"),
        (["good", "bad", "\u200b"], "text 3 holds no word"),
        (["good", 7], "text 2 is int"),
        (["good", "\ud800"], "text 2 has an unpaired surrogate"),
    ],
)
def test_every_text_is_checked_before_any_is_computed(pipeline, monkeypatch, texts, complaint):
    monkeypatch.setattr(pipeline, "_predicted", lambda *_: pytest.fail("computed before all were checked"))
    with pytest.raises(InputError, match=complaint):
        pipeline.predict(texts)


def test_threads_may_share_a_pipeline_from_the_first_question_on(pipeline, repository, texts):
    expected = [prediction.label for prediction in pipeline.predict(texts)]
    shared = Pipeline(repository)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda turn: [each.label for each in shared.predict(texts)], range(8)))
    shared.close()
    assert found == [expected] * 8


def test_works_without_with_and_again_after_close(repository):
    pipeline = Pipeline(repository)
    first = pipeline.predict(["good plot"])
    pipeline.close()
    pipeline.close()
    assert pipeline.predict(["good plot"]) == first
    with pipeline:
        assert pipeline.predict(["good plot"]) == first


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_call_that_another_threads_close_ends_says_so(repository, monkeypatch, when):
    pipeline = Pipeline(repository, batch_size=1)
    run = pipeline._chain.run

    def closed_meanwhile(inputs):
        if when == "before":
            pipeline.close()
        found = run(inputs)
        pipeline.close()
        return found

    monkeypatch.setattr(pipeline._chain, "run", closed_meanwhile)
    with pytest.raises(EngineError, match="^the pipeline is closed; fix: close it once its calls are done"):
        pipeline.predict(["good plot", "bad plot"])
    assert pipeline._running is None, "the call has not loaded the graphs again"


def test_needs_no_torch(repository):
    code = (
        "import sys; from rekd_deploy.client.pipeline import Pipeline\n"
        "with Pipeline(sys.argv[1]) as pipeline: print(pipeline.predict(['good plot'])[0].label)\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxscript'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, repository], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("negative", "positive")


def test_a_repository_with_an_altered_or_missing_file_is_refused(repository, tmp_path):
    import shutil

    copy = shutil.copytree(repository, tmp_path / "copy")
    graph = copy / "rekd_predictor" / "1" / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[-100] ^= 1
    graph.write_bytes(content)
    with pytest.raises(RepositoryError, match="rekd_predictor/1/model.onnx"):
        Pipeline(copy)
    graph.unlink()
    with pytest.raises(RepositoryError, match="missing rekd_predictor/1/model.onnx"):
        Pipeline(copy)
    with pytest.raises(RepositoryError, match="no model repository at"):
        Pipeline(tmp_path / "nowhere")
