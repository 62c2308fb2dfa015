"""A whole run: configuration in, checkpoint out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rekd_train.checkpoints import checkpoint, read_description, recorded
from rekd_train.config.run import DataConfig, RunConfig, checked_config
from rekd_train.data import DataSet, Split, TokenizedTexts, encode_splits, load_data, summarise
from rekd_train.data.examples import later_passages, names_of, some_sentences
from rekd_train.data.knowledge import AlignedKnowledge, align, checked_statements, read_knowledge, with_unlabelled
from rekd_train.errors import CheckpointError, ConfigError, DataError
from rekd_train.evaluation.forward import measure
from rekd_train.evaluation.report import evaluate
from rekd_train.files import AGAIN, RESUME, sha256
from rekd_train.inputs.familiarity import Familiarity
from rekd_train.inputs.preprocessors import Preprocessor
from rekd_train.inputs.text import TextPreprocessor
from rekd_train.models.families import fresh_pair, preprocessor_for, weight_origins
from rekd_train.models.rationalizer import Rationalizer
from rekd_train.training import state
from rekd_train.training.checks import check_teacher, short_texts_notice
from rekd_train.training.runtime import Runtime, chosen_device
from rekd_train.training.stages import compact_pair, fit
from rekd_train.training.state import JsonLines, Observer, Several, StateStore, TensorBoard
from rekd_train.training.teacher import statements_of, write_knowledge
from rekd_train.training.validation import calibrate_policy, calibrate_temperature


def train_run(config: RunConfig, output: Path, *, teacher: Path | None = None, warm_start: Path | None = None,
              half: str | None = None, observer: Observer | None = None, resume: bool = False, overwrite: bool = False,
              device: str = "auto", tensorboard: bool = False) -> dict[str, Any]:
    """Train by a configuration and write the checkpoint; several processes share the work.

    ``<output>.training`` holds the log and, until the checkpoint is written, the state that ``resume`` reads.

    Args:
        teacher: checkpoint to distil from.
        warm_start: checkpoint whose predictor and selector are the start; their own warm starts are left out. A plain
            classifier's selector has not learnt to select: with ``stages.operator = "gather"`` its votes are trained.
        half: 'selector' or 'predictor': what of the warm start is taken over alone.
        overwrite: replace a checkpoint at the output, and begin anew where another run left its state or log.
        device: 'auto', 'cpu', 'cuda' or 'cuda:N'.

    Returns the metrics by split, as in the checkpoint's metrics.json; nothing in processes but the main one.
    CheckpointError: a checkpoint or something else lies at the output; ConfigError: another run's state or log lies
    there, or there is nothing to resume.
    """
    if half and warm_start is None:
        raise ConfigError(f"the {half} of no checkpoint is to be taken over; fix: --warm-start CKPT, or no --half")
    halves = (half,) if half else ("selector", "predictor")
    checkpoint.check_output(output, overwrite)
    state.check_start(output, resume, overwrite)
    runtime = Runtime(device)
    if teacher is not None and not teacher.exists():
        raise CheckpointError(f"{teacher} does not exist; fix: --teacher CKPT, or a file of recorded knowledge")
    live = teacher if teacher is not None and not teacher.is_file() else None
    said: Rationalizer | AlignedKnowledge | None = checkpoint.load(live) if live else None
    data = load_data(config.data)
    preprocessor = preprocessor_for(config)
    pair = fresh_pair(config, preprocessor, data.label_names)
    if teacher is not None and said is None:
        data, said = _recorded(teacher, data, preprocessor, config.data)
    if said is not None:
        check_teacher(said, pair, config)
    else:  # an example without a label has nothing to teach
        data = replace(data, splits=data.splits | {"train": data.splits["train"].labelled()})
    warm: tuple[str, ...] = ()
    if warm_start is not None:
        start = checkpoint.load(warm_start)
        recorded.start_from(pair, start, warm_start, data, halves)
        # a plain classifier's selector reads, but has yet to learn whose votes to weigh
        unready = "selector" if start.policy.keeps_everything and config.stages.operator == "gather" else None
        warm = tuple(role for role in halves if role != unready)
    learnt = config.stages.selector_classifier_epochs or (warm_start is not None and "selector" in halves)
    if config.stages.rationale_epochs and config.stages.selector_start == "evidence" and not learnt:
        raise ConfigError("stages.selector_start=evidence needs a selector that has learnt to classify; fix: "
                          "--warm-start a plain classifier of these sizes, without --half predictor, or "
                          "stages.selector_classifier_epochs=2")  # fmt: skip
    splits = encode_splits(data, preprocessor, config.data)
    hashes = {"teacher": _digest(teacher), "warm_start": _digest(warm_start), "half": half}
    identity = state.identity_of(config, splits["train"], splits["dev"], **hashes)
    store = StateStore(state.training_directory(output), identity)
    if observer is not None and runtime.is_main:
        observer.data(summarise(data, splits))
        if notice := short_texts_notice(config, splits["train"], preprocessor):
            observer.note(notice)
    runtime.wait()  # until every process has looked at what lies at the output: the main one writes from here on
    fit(config, pair, splits["train"], splits["dev"], teacher=said, warm=warm,
        observer=_logs(runtime, store, observer, resume, tensorboard), runtime=runtime, store=store, resume=resume)
    texts = [each for name in ("train", "dev") if isinstance(each := splits[name], TokenizedTexts)]
    if isinstance(preprocessor, TextPreprocessor):
        train, dev = ([preprocessor.inner(ids) for ids in each.ids] for each in texts)
        preprocessor.familiarity = Familiarity.fit(train, dev, preprocessor.vocabulary_size)
    return _finish(runtime, pair, output, config, data, splits, store=store)


def _recorded(path: Path, data: DataSet, preprocessor: Preprocessor,
              config: DataConfig) -> tuple[DataSet, AlignedKnowledge]:
    """The data, with the texts that only the file has, and what it says about the training examples."""
    if config.augmentation != "none":
        raise ConfigError(f"{path} is about images as they are; fix: --set data.augmentation=none")
    knowledge = read_knowledge(path, data.label_names, config.modality)
    data = with_unlabelled(data, knowledge)
    items, folder = data.splits["train"].items, Path(config.path)
    return data, align(knowledge, items, preprocessor, len(data.label_names), folder)


def _digest(path: Path | None) -> str | None:
    return None if path is None else sha256(path) if path.is_file() else checkpoint.checkpoint_hash(path)


def record_run(path: Path, output: Path, *, device: str = "auto", data: str | None = None,
               overrides: Sequence[str] = (), texts: bool = False, sentences: int = 0, passages: bool = False,
               overwrite: bool = False) -> int:  # fmt: skip
    """Write what a pair says about its training texts or images, scores and class probabilities; returns how many.

    Args:
        output: a Parquet file (``rekd_train.data.knowledge``).
        texts: write them, too, not their ids alone.
        sentences: so many of each text, at most, are told about, too; a student that learns from the file reads them.
        passages: what follows each text's first 180 words is told about, too, in passages of at most as many.

    DataError: the file exists already, or has another suffix than Parquet's, by which it is read.
    """
    if output.suffix.lower() != ".parquet":
        raise DataError(f"{output} would hold Parquet; fix: --output {output.with_suffix('.parquet')}")
    pair, config = checkpoint.load(path), recorded.recorded_config(path, data, overrides)
    if output.exists() and not overwrite:
        raise DataError(f"{output} exists; fix: another file, or --overwrite")
    examples = recorded.data_for(pair, config).splits["train"].items
    if sentences or passages:
        if config.data.modality != "text":
            given = "--passages" if passages else f"--sentences {sentences}"
            raise DataError(f"{given}, but the pair reads images; fix: leave {given.split()[0]} out")
        later = [part for text in examples for part in later_passages(text)] if passages else []
        examples = list(dict.fromkeys([*examples, *later, *some_sentences(examples, sentences)]))  # each text once
    rows = statements_in_order(pair, examples, Runtime(device), config.acceleration.precision, texts,
                               Path(config.data.path))  # fmt: skip
    write_knowledge(output, rows, overwrite)
    return len(rows)


def statements_in_order(pair: Rationalizer, items: Sequence[Any], runtime: Runtime, precision: str = "auto",
                        texts: bool = False, folder: Path = Path()) -> list[dict[str, Any]]:
    """What a pair says about texts or images, as ``statements_of``, batch by batch; texts of like lengths together."""
    pair.to(runtime.device)
    order = list(range(len(items)))
    if pair.preprocessor.settings.kind == "text":
        order.sort(key=[len(each) for each in items].__getitem__)
    rows: dict[int, dict[str, Any]] = {}
    for start in range(0, len(order), 64):
        some = order[start : start + 64]
        with runtime.autocast(precision):
            rows |= zip(some, statements_of(pair, [items[index] for index in some], texts, folder), strict=True)
    return [rows[index] for index in range(len(rows))]


def check_knowledge(path: Path, config: DataConfig) -> dict[str, Any]:
    """Counts of a file of recorded knowledge against data (``rekd_train.data.knowledge.checked_statements``)."""
    data = load_data(config)
    knowledge = read_knowledge(path, data.label_names, config.modality)
    data = with_unlabelled(data, replace(knowledge, texts={}))  # sentences of the data's texts, by their id
    labelled = (pair for split in data.splits.values() for pair in zip(split.items, split.labels, strict=True))
    truth = {name: int(label) for item, label in labelled for name in names_of(item, Path(config.path))}
    return checked_statements(knowledge, truth)


def _logs(runtime: Runtime, store: StateStore, observer: Observer | None, resume: bool, tensorboard: bool) -> Observer:
    if not runtime.is_main:
        return Observer()
    log = store.log
    if not resume:
        store.discard()
        for path in (log, *log.parent.glob("events.out.tfevents.*")):
            path.unlink(missing_ok=True)
    board = [TensorBoard(log.parent)] if tensorboard else []
    return Several([JsonLines(log), *board, *([observer] if observer else [])])


def evaluate_run(path: Path, split: str | None = None, *, draws: int = 10, teacher: Path | None = None,
                 risk: float = 0.05, device: str = "auto", data: str | None = None,
                 overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The full report of a checkpoint on a split of its data, or of others; see ``rekd_train.evaluation.report``.

    Args:
        split: None: 'test', or of a new file without splits every row ('all').
        data: a preset or file whose data take the place of the recorded ones (``rekd_train.checkpoints.recorded``).
        overrides: ``key=value`` changes of the configuration.
    """
    pair, config = checkpoint.load(path), recorded.recorded_config(path, data, overrides)
    teacher_pair = checkpoint.load(teacher) if teacher is not None else None
    for model in (pair, teacher_pair):
        if model is not None:
            model.to(chosen_device(device))
    splits, split, origin, measured = recorded.splits_to_measure(pair, path, config, split, named=data is not None)
    report = evaluate(pair, splits, split=split, draws=draws, teacher=teacher_pair, risk=risk)
    return {"checkpoint": str(path), "data": origin, "measured": measured, **report}


def calibrate_run(path: Path, output: Path, target: float | None = None, device: str = "auto", *,
                  data: str | None = None, overrides: Sequence[str] = (), overwrite: bool = False) -> dict[str, Any]:
    """Fit bias and temperature again, for another target rate if given; see ``compact_run``."""
    checkpoint.check_output(output, overwrite)
    runtime = Runtime(device)
    pair, config, examples, splits = _reopen(path, runtime, data, overrides)
    if target is not None:
        if config.selection.decision == "argmax":
            raise ConfigError(f"target is {target}, but selection.decision is 'argmax', a rule without a rate; "
                              "fix: --set selection.decision=calibrated")  # fmt: skip
        selection = config.selection.model_dump() | {"target": target}
        if selection["budget"] is not None:
            selection["budget"] = max(selection["budget"], target)
        config = checked_config(config.model_dump() | {"selection": selection}, (), path)
    calibrate_policy(config, pair, splits["dev"], runtime)
    calibrate_temperature(pair, splits["dev"])
    return _finish(runtime, pair, output, config, examples, splits, source=path)


def compact_run(path: Path, output: Path, *, teacher: Path | None = None, epochs: float | None = None,
                observer: Observer | None = None, device: str = "auto", data: str | None = None,
                overrides: Sequence[str] = (), overwrite: bool = False) -> dict[str, Any]:
    """Fine-tune a checkpoint's predictor on gathered features, selector frozen; ``epochs`` None: as it was recorded."""
    checkpoint.check_output(output, overwrite)
    runtime = Runtime(device)
    pair, config, examples, splits = _reopen(path, runtime, data, overrides)
    if epochs is not None:
        config = config.model_copy(update={"stages": config.stages.model_copy(update={"compact_epochs": epochs})})
    teacher_pair = checkpoint.load(teacher) if teacher is not None else None
    compact_pair(config, pair, splits["train"], splits["dev"], teacher=teacher_pair, runtime=runtime,
                 observer=observer if runtime.is_main else None)
    return _finish(runtime, pair, output, config, examples, splits, source=path)


def _reopen(path: Path, runtime: Runtime, data: str | None,
            overrides: Sequence[str]) -> tuple[Rationalizer, RunConfig, DataSet, dict[str, Split]]:
    pair, config = checkpoint.load(path).to(runtime.device), recorded.recorded_config(path, data, overrides)
    examples = recorded.data_for(pair, config)
    return pair, config, examples, encode_splits(examples, pair.preprocessor, config.data)


def _finish(runtime: Runtime, pair: Rationalizer, output: Path, config: RunConfig, data: DataSet,
            splits: dict[str, Split], *, source: Path | None = None, store: StateStore | None = None) -> dict[str, Any]:
    """Measure the pair and write its checkpoint; ``source``: the one that it was made from, ``store``: of its run."""
    runtime.close()
    if not runtime.is_main:
        return {}
    metrics = {name: measure(pair, splits[name]) for name in ("dev", "test")}
    networks = {role: getattr(pair, role).backbone.settings for role in ("selector", "predictor")}
    config = config.model_copy(update=networks)  # with the sizes that pretrained weights brought
    older = [] if source is None else read_description(source).get("training", {}).get("origins", ())
    origins = list(dict.fromkeys([*older, data.origin, *weight_origins(config)]))
    checkpoint.save(pair, output, metrics={**metrics, "data": summarise(data, splits)},
                    fix=AGAIN if store is None else RESUME, **recorded.checkpoint_examples(data, pair.preprocessor),
                    training={"name": config.name, "config": config.model_dump(), "origins": origins})
    if store is not None:
        store.discard()
    return metrics
