"""What is usual: strange texts are told from usual ones, whatever carries the table."""

import json

import numpy as np
import pytest
from conftest import tiny_tokenizer_json
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from rekd_train.errors import CheckpointError
from rekd_train.inputs.familiarity import Familiarity
from rekd_train.inputs.text import FAMILIARITY_FILE, TOKENIZER_FILE, TextPreprocessor, TextSettings


def drawn(generator, count, tokens, length=60):
    return [generator.choice(tokens, length).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def known():
    generator = np.random.default_rng(0)
    return Familiarity.fit(drawn(generator, 200, 40), drawn(generator, 100, 40), vocabulary=100)


def test_strange_tokens_are_doubted_and_usual_ones_are_not(known):
    generator = np.random.default_rng(1)
    usual = [known.doubt(ids) for ids in drawn(generator, 200, 40)]
    assert np.mean(usual) == pytest.approx(0.5, abs=0.1), "a share of the dev texts"
    strange = [known.doubt((np.array(ids) + 50).tolist()) for ids in drawn(generator, 50, 40)]
    assert min(strange) == 1.0
    assert known.doubt([10**6] * 60) == 1.0, "a token that the table does not have"


def test_little_is_known_of_a_short_text(known):
    long, short, none = known.doubt([60] * 40), known.doubt([60]), known.doubt([])
    assert long == 1.0 and known.surprise([60]) < known.surprise([60] * 40)
    assert none <= short <= long and known.surprise([]) == pytest.approx(known.usual)


def test_the_table_counts_what_it_was_given():
    known = Familiarity.fit([[0] * 97], [[0, 0], [1]], vocabulary=3)  # with one of each: 98, 1 and 1 of 100
    assert known.table.tolist() == [0, 46, 46], "-ln 0.98 and -ln 0.01, in tenths of a nat"
    assert known.usual == pytest.approx(2.3) and (np.diff(known.quantiles) >= 0).all()


def test_it_travels_as_text_and_says_where_it_is_damaged(known):
    copy = Familiarity.unpacked(known.packed())
    assert copy.doubt([5, 60, 7]) == known.doubt([5, 60, 7])
    whole = json.loads(known.packed())
    damaged = ["{}", "no", json.dumps(whole | {"table": "x"}), json.dumps(whole | {"quantiles": [1.0]}), json.dumps(
        whole | {"quantiles": whole["quantiles"][::-1]}), json.dumps(whole | {"usual": float("nan")})]  # fmt: skip
    for text in damaged:
        with pytest.raises(CheckpointError, match="usual texts is damaged.*fix: copy it again"):
            Familiarity.unpacked(text)


def test_a_preprocessor_doubts_what_is_between_the_special_tokens(known, tmp_path):
    (tmp_path / TOKENIZER_FILE).write_text(tiny_tokenizer_json())
    settings = TextSettings(max_length=24)
    without = TextPreprocessor.load(tmp_path, settings)
    assert without(["good"]).doubts is None and without(["good"]).truncated == [False]
    (tmp_path / FAMILIARITY_FILE).write_text(known.packed())
    preprocessor = TextPreprocessor.load(tmp_path, settings)
    ids = preprocessor.encode(["good bad"])[0].ids
    assert preprocessor.inner(ids) == ids[1:-1] and preprocessor.fingerprint == without.fingerprint
    assert preprocessor(["good bad"]).doubts == [known.doubt(ids[1:-1])]


@pytest.mark.parametrize("template", ["[CLS] $A [SEP]", "[CLS] [SEP] $A", "[CLS] $A"])
def test_a_text_is_doubted_alike_in_any_batch_and_whatever_is_put_around_it(known, template):
    tokenizer = Tokenizer.from_str(tiny_tokenizer_json())
    special = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    preprocessor = TextPreprocessor(tokenizer.to_str(), TextSettings(max_length=24), known)
    texts = ["good", "the film was bad and dark", "good " * 50]
    alone = [preprocessor([text]).doubts[0] for text in texts]
    assert preprocessor(texts).doubts == alone and len(set(alone)) == 3
    for text, doubt in zip(texts, alone, strict=True):
        (encoding,) = preprocessor.encode([text])
        own = [number for number, one in zip(encoding.ids, encoding.special_tokens_mask, strict=True) if not one]
        assert list(preprocessor.inner(encoding.ids)) == own and known.doubt(own) == doubt
