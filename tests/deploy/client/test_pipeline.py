"""The pipeline answers as the PyTorch model does, from the repository alone."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from families import assert_same_answers

from rekd_deploy.client.batching import A_BATCH, Batches
from rekd_deploy.client.pipeline import Pipeline
from rekd_deploy.errors import EngineError, RepositoryError
from rekd_train.errors import InputError


@pytest.fixture(scope="module")
def pipeline(repository):
    with Pipeline(repository, batch_size=2) as pipeline:
        yield pipeline


def test_predictions_are_the_models(pipeline, rationalizer, texts):
    many = [*texts, *reversed(texts), "good plot", "x " * 100_000]
    found, wanted = pipeline.predict(many), rationalizer.predict(many)
    assert_same_answers(found, wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert [(p.token, p.position) for p in ours.pieces] == [(p.token, p.position) for p in theirs.pieces]
    assert found[-1].truncated and not found[0].truncated


def test_artefacts_answer_as_the_repository_made_of_them(artefacts, pipeline, texts, tmp_path):
    with Pipeline(artefacts, batch_size=2) as unplaced:
        assert unplaced.predict(texts) == pipeline.predict(texts)
    altered = tmp_path / "selector.onnx"
    altered.write_bytes(artefacts.selector.read_bytes()[:-1] + b"!")
    with pytest.raises(RepositoryError, match=r"selector.onnx was altered"):
        Pipeline(replace(artefacts, selector=altered))
    with pytest.raises(RepositoryError, match="the export holds no single graph"):
        Pipeline(artefacts, single_graph=True)
    with pytest.raises(InputError, match="batch_size 0 must be at least 1"):
        Pipeline(artefacts, batch_size=0)


LENGTHS = [40, 1, 20, 2, 3, 45, 4, 21, 30, 5]


def batches_of(rationalizer, most, **options):
    """Shapes of the batches, which hold every text of ``LENGTHS`` once."""
    batches = list(Batches(rationalizer.preprocessor, ["good " * n for n in LENGTHS], most, **options))
    assert sorted(index for indices, _ in batches for index in indices) == list(range(len(LENGTHS)))
    for indices, encoded in batches:
        assert encoded.inputs["attention_mask"].sum(axis=1).tolist() == [LENGTHS[index] + 2 for index in indices]
    return [encoded.inputs["input_ids"].shape for _, encoded in batches]


def test_batches_are_of_one_padded_length(rationalizer):
    assert batches_of(rationalizer, 2) == [(2, 16), (2, 16), (1, 16), (2, 32), (1, 32), (2, 48)]


@pytest.mark.parametrize("most", [2, 3, 8])
@pytest.mark.parametrize("sizes", [(1, 2, 4), (1, 4, 8), (3, 8)])
def test_batches_that_are_filled_up_are_the_cheapest_there_are(rationalizer, sizes, most):
    most = min(most, sizes[-1])
    shapes = batches_of(rationalizer, most, filled_to=sizes)
    assert max(count for count, _ in shapes) <= most

    def cost(counts_and_lengths):
        return sum(A_BATCH + length * min(size for size in sizes if size >= n) for n, length in counts_and_lengths)

    padded, possible = sorted(rationalizer.preprocessor.bucket(length + 2) for length in LENGTHS), []
    for inner in product([False, True], repeat=9):
        ends = [*(index + 1 for index, cut in enumerate(inner) if cut), 10]
        counts = np.diff([0, *ends])
        if max(counts) <= most:
            possible.append(cost(zip(counts, (padded[end - 1] for end in ends), strict=True)))
    assert cost(shapes) == min(possible)


@pytest.mark.parametrize(
    ("texts", "complaint"),
    [(["good", "bad", "\u200b"], "text 3 holds no word"), (["good", 7], "text 2 is int")],
)
def test_every_text_is_checked_before_any_is_computed(pipeline, monkeypatch, texts, complaint):
    monkeypatch.setattr(pipeline, "_predicted", lambda *_: pytest.fail("computed before all were checked"))
    with pytest.raises(InputError, match=complaint):
        pipeline.predict(texts)


def test_works_without_with_from_several_threads_and_again_after_close(pipeline, repository, texts):
    expected = pipeline.predict(texts)
    shared = Pipeline(repository, batch_size=2)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: shared.predict(texts), range(8))) == [expected] * 8
    shared.close()
    shared.close()
    assert shared.predict(texts) == expected
    with shared:
        assert shared.predict(texts) == expected


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
    assert not pipeline._is_open, "the call has not loaded the graphs again"


def test_needs_no_torch(repository):
    code = (
        "import sys; from rekd_deploy.client.pipeline import Pipeline\n"
        "with Pipeline(sys.argv[1]) as pipeline: print(pipeline.predict(['good plot'])[0].label)\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxscript'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, repository], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("negative", "positive")
