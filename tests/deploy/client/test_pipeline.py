"""The pipeline answers as the PyTorch model does, from the repository alone; batches, images and windows of texts."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from conftest import WORDS
from families import assert_same_answers, some_images
from PIL import Image

from rekd_deploy import EngineError, Pipeline, RepositoryError
from rekd_deploy.cli import query
from rekd_deploy.client import batching
from rekd_deploy.client.batching import Batches, WindowedText
from rekd_deploy.export.graphs import export
from rekd_deploy.parity.examples import generated_images, parity_examples, with_lengths
from rekd_deploy.repository.writer import write_repository
from rekd_train.checkpoints.checkpoint import save
from rekd_train.errors import CheckpointError, InputError
from rekd_train.inputs.prediction import Piece, Prediction
from rekd_train.inputs.text import TextPreprocessor, TextSettings

LONG = "Wonderfully dull: " + ", ".join(f"{a} {b}ish" for a in WORDS for b in WORDS[:4]) + " — the café 東京 end!"


@pytest.fixture(scope="module")
def pipeline(repository):
    with Pipeline(repository, batch_size=2) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def image_repository(image_rationalizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    return write_repository(export(save(image_rationalizer, folder / "checkpoint"), folder), folder / "repository")


@pytest.fixture
def file(tmp_path):
    Image.fromarray(some_images(1, height=160, width=120)[0]).save(tmp_path / "shoe.png")
    return tmp_path / "shoe.png"


def test_predictions_are_the_models_and_every_text_is_checked_first(pipeline, rationalizer, texts, monkeypatch):
    many = [*texts, *reversed(texts), "good plot", "x " * 100_000]
    found = pipeline.predict(many)
    assert_same_answers(found, rationalizer.predict(many))
    assert found[-1].truncated and not found[0].truncated
    monkeypatch.setattr(pipeline, "_predicted", lambda *_: pytest.fail("computed before all were checked"))
    for texts, complaint in ((["good", "bad", "\u200b"], "text 3 holds no word"), (["good", 7], "text 2 is int")):
        with pytest.raises(InputError, match=complaint):
            pipeline.predict(texts)


def test_arrays_pillow_images_and_paths(image_repository, image_rationalizer, file):
    array = np.asarray(Image.open(file))
    many = [file, str(file), Image.open(file), array, array[:, :, None], np.stack([array] * 3, axis=2)]
    with Pipeline(image_repository, batch_size=4) as pipeline:
        predictions = pipeline.predict(many)
        assert_same_answers(predictions, image_rationalizer.predict(many))
        assert_same_answers(pipeline.predict(np.stack(some_images())[..., None]), pipeline.predict(some_images()))
    left, top, right, bottom = predictions[0].rationale[0].box
    assert (right - left, bottom - top) == (40, 40), "boxes are in pixels of the image as given"


def test_artefacts_answer_as_their_repository_from_several_threads_and_again_after_close(
    artefacts, pipeline, texts, tmp_path, repository):
    with Pipeline(artefacts, batch_size=2) as unplaced:
        assert unplaced.predict(texts) == pipeline.predict(texts)
    altered = tmp_path / "selector.onnx"
    altered.write_bytes(artefacts.selector.read_bytes()[:-1] + b"!")
    for source, options, error, complaint in (
        (replace(artefacts, selector=altered), {}, RepositoryError, r"selector.onnx was altered"),
        (artefacts, {"single_graph": True}, RepositoryError, "the export holds no single graph"),
        (artefacts, {"batch_size": 0}, InputError, "batch_size 0 must be at least 1")):
        with pytest.raises(error, match=complaint):
            Pipeline(source, **options)
    expected = pipeline.predict(texts)
    shared = Pipeline(repository, batch_size=2)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: shared.predict(texts), range(8))) == [expected] * 8
    for _ in range(2):
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


LENGTHS = [40, 1, 20, 2, 3, 45, 4, 21, 30, 5]
@pytest.mark.parametrize(("most", "filled_to", "shapes"), [
    (2, (), [(2, 16), (2, 16), (1, 16), (2, 32), (1, 32), (2, 48)]),  # of one padded length
    # filled up: the cheapest of all 512 ways to part ten texts
    (2, (1, 2, 4), [(2, 16), (2, 16), (2, 32), (2, 32), (2, 48)]),
    (3, (1, 2, 4), [(2, 16), (3, 16), (3, 32), (2, 48)]), (8, (1, 2, 4), [(4, 16), (4, 32), (2, 48)]),
    (3, (1, 4, 8), [(1, 16), (3, 16), (3, 32), (3, 48)]), (8, (1, 4, 8), [(2, 16), (8, 48)]),
    (8, (3, 8), [(7, 32), (3, 48)])])  # fmt: skip
def test_batches_of_texts(rationalizer, most, filled_to, shapes):
    texts = ["good " * n for n in LENGTHS]
    batches = list(Batches(rationalizer.preprocessor, texts, most, filled_to=filled_to))
    assert [encoded.inputs["input_ids"].shape for _, encoded in batches] == shapes
    assert sorted(index for indices, _ in batches for index in indices) == list(range(len(texts)))
    for indices, encoded in batches:
        assert encoded.inputs["attention_mask"].sum(axis=1).tolist() == [LENGTHS[index] + 2 for index in indices]


@pytest.mark.parametrize(("filled_to", "counts"), [((), [5, 5, 3]), ((1, 4, 8), [1, 4, 4, 4])])
def test_batches_of_images_follow_their_order(image_rationalizer, monkeypatch, filled_to, counts):
    monkeypatch.setattr(batching, "A_BATCH", 1)
    images, preprocessor = some_images(13), image_rationalizer.preprocessor
    batches = list(Batches(preprocessor, images, 5, filled_to=filled_to))
    assert [len(indices) for indices, _ in batches] == counts
    assert [index for indices, _ in batches for index in indices] == list(range(13))
    for indices, encoded in batches:
        assert (encoded.inputs["pixels"][..., 0] == [images[index] for index in indices]).all()
    with pytest.raises(InputError, match="image 7 is an array of float64"):
        list(Batches(preprocessor, [*images[:6], np.zeros((16, 12))], 5))
    with pytest.raises(InputError, match="this model reads images; fix: leave windows out"):
        list(Batches(preprocessor, images, 4, windows=True))


@pytest.fixture
def windowed(rationalizer):
    preprocessor = rationalizer.preprocessor  # 48 tokens, so 46 of a text's own
    return lambda text: WindowedText(text, preprocessor.encode_checked([text])[0], preprocessor.window_overlap)


@pytest.mark.parametrize("text", [LONG, LONG[:300], "film " * 47, "film " * 81])
def test_the_whole_is_what_a_model_of_any_length_would_read(rationalizer, windowed, text):
    endless = TextPreprocessor(rationalizer.preprocessor.tokenizer_json, TextSettings(max_length=100_000))
    expected, windows = endless.encode([text])[0], windowed(text)
    whole = windows.whole()
    assert len(windows.windows) > 1 and windows.real == len(expected) - 2
    for name in ("tokens", "offsets", "word_ids"):
        assert getattr(whole, name) == getattr(expected, name)
    for before, after in zip(windows.windows, windows.windows[1:], strict=False):
        assert before.offsets[-1 - 11 : -1] == after.offsets[1 : 1 + 11], "they share a quarter"


def made_up(probability, *pieces):
    kept = [Piece(0, 0, "", position, score) for position, score in pieces]
    return Prediction("x", {"negative": 1 - probability, "positive": probability}, [], 0.0, False, pieces=kept)


def test_how_predictions_of_windows_are_combined(windowed):
    words = ["film"] * 70
    words[40] = "wonderfully"  # of several pieces, in both windows
    text = " ".join(words)
    windows = windowed(text)
    piece = windows.whole().word_ids.index(40)
    again = piece + 1 - windows.starts[1]
    first, second = made_up(0.9, (1, 0.5), (piece, 1.5)), made_up(0.2, (again, 4.0), (20, -0.25), (21, 0.75))
    found, votes = windows.combined([first, second]), windows.votes()
    assert list(votes) == [46 - 11 / 2, windows.real - 46 + 11 / 2], "every token has one"
    assert list(windowed(LONG).votes()[:2]) == [46 - 11 / 2, 46 - 11]
    positive = float(votes @ [0.9, 0.2] / votes.sum())
    assert found.probabilities == pytest.approx({"negative": 1 - positive, "positive": positive})
    assert found.label == "positive" and positive > 0.5
    assert found.rate == 5 / windows.real and found.truncated is False and found.text == text
    assert [text[span.start : span.end] for span in found.rationale] == [span.text for span in found.rationale]
    assert [piece.position for piece in found.pieces] == sorted(piece.position for piece in found.pieces)
    best = next(span for span in found.rationale if span.text == "wonderfully")
    assert best.score == 4.0, "the highest of either window"
    windows = windowed("film " * 70)
    start = windows.starts[1]
    for second, words, pieces in ((3, "film", 1), (4, "film film", 2)):
        found = windows.combined([made_up(0.5, (start + 3, 1.0)), made_up(0.5, (second, 2.0))])
        assert [span.text for span in found.rationale] == [words] and len(found.pieces) == pieces
        assert (found.pieces[-1].position, found.pieces[-1].score, found.rate) == (start + second, 2.0, pieces / 70)


def test_long_texts_are_read_to_their_end_and_short_ones_as_without_windows(pipeline, texts):
    many = ["good", LONG, *texts, "the good film " * 400]
    own = pipeline.preprocessor
    wide = TextPreprocessor(own.tokenizer_json, TextSettings(max_length=2000), own.familiarity)
    found, cut = pipeline.predict(many, windows=True), pipeline.predict(many)
    assert [prediction.text for prediction in found] == many
    assert not any(prediction.truncated for prediction in found) and cut[1].truncated
    for prediction, without in zip(found, cut, strict=True):
        assert without.truncated or prediction == without
        assert prediction.doubt == wide([prediction.text]).doubts[0], "of all its words"
        assert all(prediction.text[span.start : span.end] == span.text for span in prediction.rationale)
    assert found[-1].rationale[-1].end > 0.9 * len(many[-1])


def test_other_lengths_change_no_doubt(rationalizer, texts):
    other = with_lengths(rationalizer.preprocessor, (24,))
    assert other.settings.buckets == (24, 48) and other(texts).doubts == rationalizer.preprocessor(texts).doubts


def test_examples_are_the_checkpoints_else_generated(image_repository, image_rationalizer, tmp_path):
    preprocessor, file = image_rationalizer.preprocessor, tmp_path / "examples.npz"
    made = parity_examples(image_repository.parent / "checkpoint", preprocessor)
    assert made.source == "generated" and np.shape(made.items) == (64, 16, 12, 1)
    assert np.std(generated_images(preprocessor.settings), axis=(1, 2, 3)).min() > 0
    pixels = np.stack(some_images(300))[..., None]
    np.savez(file, pixels=pixels, labels=np.zeros(300))
    own = parity_examples(tmp_path, preprocessor)
    assert own.source == "checkpoint" and len(own.items) == 200 and (own.items[7] == pixels[7]).all()
    with pytest.raises(InputError, match="reads images; fix: leave out --parity-texts"):
        parity_examples(tmp_path, preprocessor, tmp_path / "texts.txt")
    np.savez(file, pixels=pixels[:, :8])
    with pytest.raises(CheckpointError, match=r"examples.npz holds uint8 \(300, 8, 12, 1\)"):
        parity_examples(tmp_path, preprocessor)
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match="examples.npz is damaged"):
        parity_examples(tmp_path, preprocessor)


def test_query_prints_saves_and_refuses_in_one_line(run_cli, image_rationalizer, file, tmp_path, image_repository):
    rekd_query = partial(run_cli, query.app, "--local", image_repository)
    code, printed, error = rekd_query("--image", file, "--json")
    document = json.loads(printed)
    assert (code, error, document["image"]) == (0, "", str(file))
    assert_same_answers([Prediction.from_dict(document)], image_rationalizer.predict([file]))
    printed = rekd_query("--image", file, "--image", file)[1]
    assert printed.count("of its patches") == 2 and printed.count("row ") >= 2
    assert [*file.parent.iterdir()] == [file], "nothing is written unasked"
    folder = tmp_path / "new" / "pictures"
    code, printed, error = rekd_query("--image", file, "--save", folder)
    assert (code, error) == (0, "") and f"written: {folder}/shoe.rationale.png\n" in printed
    assert json.loads((folder / "shoe.rationale.json").read_text()) == document
    with Image.open(folder / "shoe.rationale.png") as written:
        assert written.format == "PNG" and written.width == 320 < written.height
    none, twin, new = tmp_path / "none.png", file.with_suffix(".jpg"), tmp_path / "unsaved"
    reads = f"the model of {image_repository} reads images, not texts; fix: rekd-query --image FILE\n"
    for arguments, complaint in (
        (["--image", file, "--image", none], "/none.png) does not exist; fix: "),
        (["--image", file, "--save", file / "folder"], "cannot be written: Not a directory; fix: "),
        (["--image", file, "--image", twin, "--save", new], "2 images would be saved to the same file"),
        (["a text"], reads)):
        code, printed, error = rekd_query(*arguments)
        assert (code, printed) == (1, "") and complaint in error and error.count("\n") == 1
    assert not new.exists()
    assert rekd_query("--image", file, "a text")[0] == rekd_query("a text", "--save", new)[0] == 2
