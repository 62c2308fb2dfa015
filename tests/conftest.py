"""Tiny models built offline, shared by both halves' tests."""

import errno
import gzip
import json
import os
import struct
import sys
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from skips import pytest_runtest_makereport  # noqa: F401  the hook, for every test
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from traced_once import shared_graphs  # noqa: F401  a fixture, for every test

from rekd_train.checkpoints.checkpoint import save
from rekd_train.cli.command import run
from rekd_train.config.run import BackboneConfig, ImageConfig
from rekd_train.inputs.familiarity import Familiarity
from rekd_train.inputs.image import ImagePreprocessor, ImageSettings
from rekd_train.inputs.policy import SelectionPolicy
from rekd_train.inputs.text import TextPreprocessor, TextSettings
from rekd_train.models.base import Predictor, Selector
from rekd_train.models.families import build_backbone
from rekd_train.models.rationalizer import Rationalizer

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread each: several processes with all threads are many times slower
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

WORDS = (
    "the a film movie was is and but i it of great good wonderful bad awful boring plot actor scene "
    "never always really not very fun dull bright dark story end start time people think feel see").split()


def tiny_tokenizer_json() -> str:
    """A WordPiece tokenizer with some sixty entries, like BERT's in every other way."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", ",", "!", *WORDS]
    pieces += [entry for entry in [*letters, *(f"##{letter}" for letter in letters)] if entry not in pieces]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")])
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.enable_truncation(max_length=8)  # as the real file has: ours must switch it off
    tokenizer.enable_padding(length=8)
    return json.dumps(json.loads(tokenizer.to_str()))


TOKENIZERS = ("word pieces", "byte-level BPE", "byte-level BPE, spaces kept", "unigram", "start token alone")
SENTENCES = ["the film was wonderful, and it was not bad at all", "so wonderfulness ends", "a dull story about people",
             "привет мир", "שלום עולם", "مرحبا بالعالم", "我喜欢这部电影", "この映画は素晴らしい", "한국 영화는 좋다",
             "नमस्ते दुनिया", "Straße über"]  # fmt: skip


@cache
def trained_tokenizer(kind: str, vocabulary: int = 400) -> str:
    """A tokenizer.json of one of the ``TOKENIZERS``, trained on a few sentences."""
    names = ("[CLS]", "[PAD]", "[SEP]", "[UNK]") if kind == "word pieces" else ("<s>", "<pad>", "</s>", "<unk>")
    start, _, end, unknown = names
    options = {"vocab_size": vocabulary, "special_tokens": list(names), "show_progress": False}
    if kind == "word pieces":
        tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(**options)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(**options, unk_token=unknown)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(**options, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    ids = {token: tokenizer.token_to_id(token) for token in (start, end)}
    if kind == "byte-level BPE":
        tokenizer.post_processor = processors.RobertaProcessing((end, ids[end]), (start, ids[start]))
    else:
        ends = "" if kind == "start token alone" else f" {end}"
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A{ends}",
                                                                 special_tokens=list(ids.items()))  # fmt: skip
    return tokenizer.to_str()


USUAL = Familiarity.fit([range(5, 15)] * 9, [range(number, 2 * number) for number in range(4, 12)], vocabulary=40)


def make_rationalizer(seed=0, operator="compact", max_length=48, policy=None, labels=("negative", "positive")):
    """A random pair, 2 layers x 16 wide; the selector smaller than the predictor."""
    preprocessor = TextPreprocessor(tiny_tokenizer_json(), TextSettings(max_length=max_length, lengths=(16, 32)), USUAL)
    sizes = {"heads": 2, "feedforward": 32, "positions": 64, "vocabulary": preprocessor.vocabulary_size}
    small = BackboneConfig(layers=1, width=8, head_width=8, **sizes)
    large = BackboneConfig(layers=2, width=16, **sizes)
    policy = policy or SelectionPolicy(bias=0.1, budget=0.25, minimum=1)
    return random_pair(seed, small, large, preprocessor, operator, policy, labels)


def make_image_rationalizer(seed=0, operator="compact", policy=None, labels=("shirt", "shoe", "bag")):
    """A random pair of vision transformers over 16 x 12 grey images: 4 x 3 patches, unequal sizes."""
    image = ImageConfig(height=16, width=12, channels=1, patch=4, mean=(0.3,), std=(0.4,))
    small = BackboneConfig(family="vit", layers=1, width=8, heads=2, feedforward=16, head_width=0, image=image)
    large = BackboneConfig(family="vit", layers=2, width=12, heads=3, feedforward=20, final_norm=False, image=image)
    policy = policy or SelectionPolicy(bias=0.1, budget=0.4, minimum=1)
    return random_pair(seed, small, large, ImagePreprocessor(ImageSettings.of(small)), operator, policy, labels)


def random_pair(seed, small, large, preprocessor, operator, policy, labels, sharper=(8, 20)) -> Rationalizer:
    """A pair over two settings; ``sharper``: random weights give scores and logits too alike to choose by."""
    torch.manual_seed(seed)
    selector = Selector(build_backbone(small, preprocessor.special_ids))
    predictor = Predictor(build_backbone(large, preprocessor.special_ids), len(labels), operator)
    with torch.no_grad():
        for model, factor in ((selector, sharper[0]), (predictor, sharper[1])):
            model.head[-1].weight.mul_(factor)
    return Rationalizer(selector, predictor, policy, preprocessor, labels, probability_temperature=1.3).eval()


def encoder_settings(kind: str, vocabulary: int = 100, **changes) -> BackboneConfig:
    from transformers import AutoConfig

    from rekd_train.models.text_encoder import stored_config
    specials = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    distances = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 32}
    more = {"deberta": {**distances, "max_relative_positions": -1}, "deberta-v2": distances,
            "modernbert": {"local_attention": 32}, "clip": {"hidden_size": None}}.get(kind, {})  # fmt: skip
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    fields = {**specials, "vocab_size": vocabulary, "initializer_range": 0.3, **sizes, **more}
    config = AutoConfig.for_model(kind, **fields)
    if kind == "albert":
        config.embedding_size = 8
    fields = {"layers": 2, "width": 16, "heads": 2, "vocabulary": vocabulary, "architecture": stored_config(config)}
    return BackboneConfig(**{**fields, **changes})


def make_encoder_pair(kind: str, operator: str = "compact", tokenizer: str = "", **changes) -> Rationalizer:
    """A random pair over such encoders; ``tokenizer``: one of the ``TOKENIZERS``, '': the tiny one."""
    content = trained_tokenizer(tokenizer) if tokenizer else tiny_tokenizer_json()
    preprocessor = TextPreprocessor(content, TextSettings(max_length=48, lengths=(16, 32)))
    settings = encoder_settings(kind, preprocessor.vocabulary_size, **changes)
    policy = SelectionPolicy(bias=0.0, budget=0.25, minimum=1)
    return random_pair(0, settings, settings, preprocessor, operator, policy, ("negative", "positive"), (1, 1))


def make_bilstm(operator: str = "compact", max_length: int = 48, lengths: tuple[int, ...] = (16, 32)) -> Rationalizer:
    preprocessor = TextPreprocessor(tiny_tokenizer_json(), TextSettings(max_length, lengths))
    sizes = {"family": "bilstm", "vocabulary": preprocessor.vocabulary_size, "heads": 1}
    small, large = BackboneConfig(layers=1, width=8, **sizes), BackboneConfig(layers=2, width=12, **sizes)
    policy = SelectionPolicy(bias=0.0, budget=0.4, minimum=1)
    pair = random_pair(4, small, large, preprocessor, operator, policy, ("negative", "positive"), (4, 4))
    with torch.no_grad():
        for weights in pair.predictor.backbone.parameters():
            weights.mul_(4)
    return pair


def make_ngrams(operator: str = "compact") -> Rationalizer:
    preprocessor = TextPreprocessor(tiny_tokenizer_json(), TextSettings(48, (16, 32)))
    settings = BackboneConfig(family="ngrams", vocabulary=preprocessor.vocabulary_size, width=12, buckets=101)
    policy = SelectionPolicy(bias=0.0, budget=0.4, minimum=1)
    pair = random_pair(5, settings, settings, preprocessor, operator, policy, ("negative", "positive"), (4, 4))
    with torch.no_grad():
        for half in (pair.selector, pair.predictor):
            for table in (half.backbone.embeddings, half.backbone.ngrams):  # the latter starts with nothing
                torch.nn.init.normal_(table.weight)
    return pair


def raising(error: BaseException) -> Mock:
    return Mock(side_effect=error)


NO_ROOM = OSError(errno.ENOSPC, "No space left on device")


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a folder, but what a server's Python left there."""
    files = (path for path in root.rglob("*") if path.is_file() and path.parent.name != "__pycache__")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def run_cli(capsys):
    """Runs a command's application in this process: its exit code, standard output and standard error."""
    def ran(app, *arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            run(app, [*map(str, arguments)])
        return ended.value.code, *capsys.readouterr()
    return ran


@pytest.fixture(scope="session")
def rationalizer() -> Rationalizer:
    return make_rationalizer()


@pytest.fixture(scope="session")
def checkpoint(rationalizer: Rationalizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return save(rationalizer, directory, metrics={"test": {"accuracy": 0.5}}, training={"name": "tiny"})


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return ["The film was great!", "bad",
            "I think the story is dull, and the actor was awful.<br /><br />But the end is wonderful",
            " ".join(WORDS * 3), "Über café 東京 🎬 good"]  # fmt: skip


@pytest.fixture(scope="session")
def image_rationalizer() -> Rationalizer:
    return make_image_rationalizer()


@pytest.fixture(scope="session")
def artefacts(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    """The verified export of the tiny checkpoint (rekd_deploy.contract.description). Do not change its files."""
    from rekd_deploy.export.graphs import export
    return export(checkpoint, tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="session")
def repository(artefacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with that export. Do not change its files."""
    from rekd_deploy.repository.writer import write_repository
    return write_repository(artefacts, tmp_path_factory.mktemp("repository") / "python")


@pytest.fixture(scope="session")
def wheel():
    """The server of the wheel; without it the test is skipped."""
    from rekd_deploy.errors import ServerError
    from rekd_deploy.server.program import find_wheel
    from rekd_train.errors import MissingExtraError
    try:
        return find_wheel()
    except (MissingExtraError, ServerError) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def server(wheel, repository: Path, tmp_path_factory: pytest.TempPathFactory):
    """The real Triton on that repository, one for all tests (``rekd_deploy.server.server``). Do not stop it."""
    from rekd_deploy.server.server import TritonServer
    with TritonServer(repository, 0, 0, 0, log_file=tmp_path_factory.mktemp("triton") / "log") as server:
        yield server


@pytest.fixture
def fake_gpu(monkeypatch):
    from fake_tensorrt import FakeDriver

    from rekd_deploy.runtimes import tensorrt_execution
    driver = FakeDriver()
    monkeypatch.setattr(tensorrt_execution.ctypes, "CDLL", lambda name: driver)
    return driver


@pytest.fixture
def fake_rtx(fake_gpu, monkeypatch):
    from fake_tensorrt import FakeLibrary
    library = FakeLibrary(fake_gpu)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    return library


@pytest.fixture
def inside_triton(monkeypatch):
    """Its module for Python models, and what they log."""
    import triton_stub
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton_stub)
    triton_stub.LOGGED.clear()


def idx(array: np.ndarray) -> bytes:
    """An array of bytes as an IDX file holds it."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def fashion_folder(root: Path, count: int = 60, packed: bool = True) -> Path:
    root.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        for name, array in (("images-idx3", generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)),
                            ("labels-idx1", (np.arange(count) % 10).astype(np.uint8))):  # fmt: skip
            content = idx(array)
            name = f"{prefix}-{name}-ubyte"
            (root / f"{name}.gz").write_bytes(gzip.compress(content)) if packed else (root / name).write_bytes(content)
    return root
