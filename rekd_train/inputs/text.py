"""Text -> the tensors the graphs take, and a mask back -> spans of the text. Torch-free.

Training, the in-process pipeline and the Triton client all use this very code, so that a served model cannot see other
tokens than the trained one. ``fingerprint`` says which preprocessing it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Encoding, Tokenizer

from rekd_train.errors import CheckpointError, ConfigError, Fault, FaultyItemsError, InputError
from rekd_train.inputs.familiarity import Familiarity
from rekd_train.inputs.prediction import Prediction, clean_text, kept_pieces, merged_spans, most_probable

if TYPE_CHECKING:
    from rekd_train.config.run import BackboneConfig

WINDOW_OVERLAP = 4  # a window shares one part in this many with the next, so that every cut has context on both sides
TOKENIZER_FILE, FAMILIARITY_FILE = "tokenizer.json", "familiarity.json"
_SHORT_TEXT = 2_000  # characters that are tokenised in a millisecond or two
_WORDLESS = Fault("holds no word that the tokenizer knows", "give at least one word")


def text_fault(text: object) -> Fault | None:
    """Why a text cannot be predicted on; None: it can."""
    if not isinstance(text, str):
        if isinstance(text, (Path, np.ndarray)) or type(text).__module__.startswith("PIL."):
            return Fault(f"is {type(text).__name__}, an image", "give this model texts (str); it reads no images")
        return Fault(f"is {type(text).__name__}", "give texts as str")
    if not text.strip():
        return Fault("is only white space" if text else "is empty", "give at least one word")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"has an unpaired surrogate at character {error.start + 1}; it is not valid Unicode"
        return Fault(what, "take that character out")
    return None


def _text_list(texts: object) -> list[str]:
    """``texts`` as a list, its elements unchecked; InputError: not a list, or an empty one."""
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
        raise InputError(f"texts is {type(texts).__name__}; give a list of str")
    if len(texts) == 0:
        raise InputError("the list of texts is empty; give at least one text")
    return list(texts)


def _refuse(faults: Mapping[int, Fault], first_index: int = 0) -> None:
    """Raise FaultyItemsError if there are faults; messages count from 1, so "text 1" is the first of the call."""
    if faults:
        numbered = {first_index + index: fault for index, fault in sorted(faults.items())}
        raise FaultyItemsError(numbered, lambda index: f"text {index + 1}")


@dataclass(frozen=True)
class TextSettings:
    """How texts become tensors."""

    max_length: int  # tokens a text is cut to, [CLS] and [SEP] included
    lengths: tuple[int, ...] = ()  # of padded batches (the smallest that fits); empty: multiples of 32 and max_length
    kind: str = "text"

    def __post_init__(self) -> None:
        if self.max_length < 3:
            raise ConfigError(f"max_length is {self.max_length}; it must be at least 3 ([CLS], a word, [SEP])")
        if not all(3 <= length <= self.max_length for length in self.lengths):
            raise ConfigError(f"lengths {self.lengths} must lie within 3..max_length ({self.max_length})")

    @property
    def buckets(self) -> tuple[int, ...]:
        """Padded lengths in ascending order; the last is max_length."""
        chosen = self.lengths or range(32, self.max_length, 32)
        return tuple(sorted({*chosen, self.max_length}))


@dataclass(frozen=True)
class EncodedTexts:
    """A padded batch and what is needed to read a mask back."""

    inputs: dict[str, np.ndarray]  # ``input_ids`` and ``attention_mask``, int64 (B, N)
    texts: list[str]  # the texts as given
    encodings: list[Encoding] = field(repr=False)  # one tokenizers.Encoding a text, unpadded, truncated
    truncated: list[bool]  # whether each text was cut
    doubts: list[float] | None = None  # see ``Prediction``; None: what is usual is not known

    def predictions(self, labels: Sequence[str], probabilities: np.ndarray, mask: np.ndarray,
                    scores: np.ndarray) -> list[Prediction]:
        """Predictions from class names (C), probabilities (B, C), the mask (B, N) bool and selector scores (B, N)."""
        found = []
        for row, (text, encoding) in enumerate(zip(self.texts, self.encodings, strict=True)):
            kept = np.flatnonzero(mask[row, : len(encoding)])
            rate = len(kept) / max(len(encoding) - sum(encoding.special_tokens_mask), 1)
            rationale = merged_spans(text, encoding, kept, scores[row])
            pieces = kept_pieces(encoding, kept, scores[row])
            label, by_label = most_probable(labels, probabilities[row])
            doubt = None if self.doubts is None else self.doubts[row]
            found.append(Prediction(label, by_label, rationale, rate, self.truncated[row], text, pieces, doubt))
        return found


class TextPreprocessor:
    """Tokenises texts with our own truncation and padding, and remembers character offsets.

    ``tokenizer_json`` is the content of a Hugging Face ``tokenizer.json``; truncation and padding that it has switched
    on are switched off. Special-token names inside a text are read as text. ``familiarity``: what is usual, or None.
    """

    def __init__(self, tokenizer_json: str, settings: TextSettings, familiarity: Familiarity | None = None) -> None:
        try:
            tokenizer = Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"the tokenizer cannot be read: {error}") from None
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self.settings, self.tokenizer_json, self._tokenizer = settings, tokenizer_json, tokenizer
        self.familiarity = familiarity
        before, after = _around(tokenizer)
        self.around = around = [*before, *after]  # ids that every text has around it, the start token first
        self._leading = len(before)
        self.positions = settings.max_length  # most tokens of any text, [CLS] and [SEP] included
        self.features = self.positions - len(around)  # most selectable tokens of any text
        self.window_overlap = self.features // WINDOW_OVERLAP  # tokens that a window shares with the one before it
        names = ("[PAD]", "<pad>", "<|pad|>", "<|padding|>")  # any special id will do: padding is masked
        known = (found for name in names if (found := tokenizer.token_to_id(name)) is not None)
        self.special_ids = {"pad": next(known, around[0]), "cls": around[0]}
        if len(around) > 1:
            self.special_ids |= {"sep": around[-1]} | {f"special_{token}": token for token in around[1:-1]}
        tokenizer.enable_truncation(max_length=settings.max_length, stride=self.window_overlap)

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest token id."""
        return max(self._tokenizer.get_vocab().values()) + 1

    def token(self, number: int) -> str:
        """The vocabulary entry of an id; empty for an id that has none."""
        return self._tokenizer.id_to_token(number) or ""

    def words(self) -> list[str]:
        """Vocabulary entries that are whole words of letters, in the order of their ids."""
        vocabulary = self._tokenizer.get_vocab()
        return sorted((entry for entry in vocabulary if entry.isalpha()), key=vocabulary.__getitem__)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of tokenizer and settings: equal fingerprints give equal tensors."""
        content = [json.loads(self.tokenizer_json), asdict(self.settings)]
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def __call__(self, texts: Sequence[str], pad_to: int | None = None, first_index: int = 0) -> EncodedTexts:
        """Encode texts as one batch, padded to ``pad_to``; None: the smallest bucket that fits the longest text.

        ``first_index``: of the first text in the call, when ``texts`` is a part of it.
        InputError: no list or an empty one, a text longer than ``pad_to``; FaultyItemsError: texts that are empty, not
        str or invalid Unicode, by their number in the call, from 1.
        """
        return self.batch(texts, self.encode_checked(texts, first_index), pad_to)

    def encode_checked(self, texts: Sequence[str], first_index: int = 0) -> list[Encoding]:
        """Encode after checking every text; see ``__call__`` for arguments and errors."""
        texts = _text_list(texts)
        faults = {index: fault for index, text in enumerate(texts) if (fault := text_fault(text))}
        sound = [index for index in range(len(texts)) if index not in faults]
        encodings = self.encode([texts[index] for index in sound])
        for index, encoding in zip(sound, encodings, strict=True):
            if len(encoding) <= sum(encoding.special_tokens_mask):
                faults[index] = _WORDLESS
        _refuse(faults, first_index)
        return encodings

    def batch(self, texts: Sequence[str], encodings: Sequence[Encoding], pad_to: int | None = None) -> EncodedTexts:
        """Pad the encodings of ``texts`` to one width; see ``__call__``."""
        longest = max(map(len, encodings))
        width = pad_to or self.bucket(longest)
        if longest > width:
            raise InputError(f"a text has {longest} tokens; pad_to ({width}) must be at least that")
        inputs = self.pad([encoding.ids for encoding in encodings], width)
        truncated = [bool(each.overflowing) for each in encodings]
        return EncodedTexts(inputs, list(texts), list(encodings), truncated, self.doubts(inputs))

    def doubts(self, inputs: Mapping[str, np.ndarray]) -> list[float] | None:
        """Of each text of a batch; None: what is usual is not known."""
        if self.familiarity is None:
            return None
        return self.familiarity.doubts(inputs["input_ids"], inputs["attention_mask"], self.around)

    def inner(self, ids: np.ndarray) -> np.ndarray:
        """A text's token ids without those around it."""
        return ids[self._leading : self._leading + len(ids) - len(self.around)]

    def bucket(self, length: int) -> int:
        """The padded length of a text with ``length`` tokens."""
        return next(bucket for bucket in self.settings.buckets if bucket >= length)

    def check_items(self, items: object) -> list[str]:
        """``items`` as a list if every one can be predicted on; raises InputError."""
        texts = _text_list(items)
        _refuse({index: fault for index, text in enumerate(texts) if (fault := text_fault(text))})
        return texts

    def check_backbone(self, settings: BackboneConfig) -> None:
        """Raise ConfigError if a network of these sizes cannot read this preprocessing's tensors."""
        if settings.image is not None:
            raise ConfigError(f"a text model cannot have the family '{settings.family}', which reads images")
        if settings.vocabulary < self.vocabulary_size:
            raise ConfigError(f"the tokenizer has {self.vocabulary_size} ids, the network only {settings.vocabulary}; "
                              "fix: the tokenizer that the network was trained with")
        if (most := settings.positions) < self.positions:
            raise ConfigError(f"texts are cut at {self.positions} tokens, but the network reads no more than {most}; "
                              f"fix: --set data.max_length={most}")

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Encode without checks or padding; truncated to ``max_length``."""
        cleaned = [clean_text(text) for text in texts]
        # a batch goes through a pool of threads, which costs a lone text two changes of thread; but only there the
        # interpreter's lock is let go, and a long text would hold up every other thread
        if len(cleaned) == 1 and len(cleaned[0]) <= _SHORT_TEXT:
            return [self._tokenizer.encode(cleaned[0])]
        return self._tokenizer.encode_batch(cleaned)

    def pad(self, ids: Sequence[Sequence[int]], width: int) -> dict[str, np.ndarray]:
        """Right-pad id lists to (B, width) and make the attention mask."""
        input_ids = np.full((len(ids), width), self.special_ids["pad"], dtype=np.int64)
        attention_mask = np.zeros((len(ids), width), dtype=np.int64)
        for row, row_ids in enumerate(ids):
            input_ids[row, : len(row_ids)] = row_ids
            attention_mask[row, : len(row_ids)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    @classmethod
    def load(cls, directory: Path, settings: TextSettings) -> TextPreprocessor:
        """Read ``tokenizer.json`` from ``directory``, and what is usual where a file says so."""
        path, known = directory / TOKENIZER_FILE, directory / FAMILIARITY_FILE
        try:
            familiarity = Familiarity.unpacked(known.read_text("utf-8", "replace")) if known.exists() else None
        except CheckpointError as error:
            raise CheckpointError(f"{known}: {error}") from None
        try:
            return cls(path.read_text(encoding="utf-8"), settings, familiarity)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; fix: copy the whole directory again") from None
        except (UnicodeDecodeError, CheckpointError) as error:
            raise CheckpointError(f"{path} is damaged: {error}; fix: copy it again") from None


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that are put before a text, the start token first, and behind it; CheckpointError: there is no such token."""
    tokenizer.no_truncation()
    encoding = tokenizer.encode("a")
    special = [bool(each) for each in encoding.special_tokens_mask]
    if not special or not special[0]:
        raise CheckpointError("the tokenizer puts no start token before a text, and that is what a predictor reads; "
                              "fix: a tokenizer.json whose post_processor adds one, as those of BERT and RoBERTa do")
    leading = special.index(False) if False in special else 1
    around = [token for token, is_special in zip(encoding.ids, special, strict=True) if is_special]
    return around[:leading], around[leading:]
