"""What may be chosen about an export is held against its limits before anything is computed or written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from conftest import make_image_rationalizer, make_rationalizer

from rekd_deploy.contract.parity_report import limits_of
from rekd_deploy.errors import ExportError, RepositoryError
from rekd_deploy.export.checkpoint import machine, read_facts, shortest_bucket
from rekd_deploy.export.options import ExportOptions
from rekd_deploy.export.plan import plan_export
from rekd_deploy.export.run import publish
from rekd_deploy.graphs.modules import pair_signature
from rekd_deploy.parity.examples import with_lengths
from rekd_deploy.repository.writer import write_repository
from rekd_train.checkpoints.checkpoint import save
from rekd_train.errors import CheckpointError, ConfigError, MissingExtraError


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("checkpoints")
    models = {
        "text": make_rationalizer(), "zero": make_rationalizer(operator="zero"), "image": make_image_rationalizer()
    }
    return {name: save(model, folder / name) for name, model in models.items()}, models


@pytest.fixture
def copy(checkpoints, tmp_path):
    return shutil.copytree(checkpoints[0]["text"], tmp_path / "copy")


@pytest.mark.parametrize("name", ["text", "zero", "image"])
def test_facts_are_the_models(checkpoints, name):
    paths, models = checkpoints
    facts, model = read_facts(paths[name]), models[name]
    assert facts.signature == pair_signature(model) and facts.capacity == model.capacity
    assert facts.labels == tuple(model.labels) and facts.preprocessor.fingerprint == model.preprocessor.fingerprint


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("policy.json", "policy.json is missing; a checkpoint without a decision rule cannot be exported; fix: "),
        ("config.json", "config.json is missing; is .* a checkpoint of rekd-train"),
        ("selector.safetensors", "selector.safetensors is missing; fix: "),
        ("tokenizer.json", "tokenizer.json is missing; fix: "),
    ],
)
def test_an_incomplete_checkpoint_is_named_and_nothing_is_written(copy, tmp_path, name, complaint):
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=complaint):
        publish(copy, tmp_path / "repository", report=lambda step: pytest.fail(f"started: {step}"))
    assert not (tmp_path / "repository").exists()


def test_a_checkpoint_that_cannot_be_read(copy):
    (copy / "policy.json").write_text('{"policy": {"budget": 3}}')
    with pytest.raises(CheckpointError, match="budget"):
        read_facts(copy)
    (copy / "policy.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"policy\.json is damaged"):
        read_facts(copy)
    (copy / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a rekd-checkpoint"):
        read_facts(copy)


def test_token_ids_cannot_be_served(copy):
    description = json.loads((copy / "config.json").read_text())
    settings = {"kind": "token_ids", "max_length": 48, "vocabulary": 99, "pad": 0, "cls": 1, "sep": 2}
    description["preprocessing"] = settings
    (copy / "config.json").write_text(json.dumps(description))
    with pytest.raises((ExportError, CheckpointError), match="tokenizer|does not fit"):
        read_facts(copy)


@pytest.mark.parametrize(
    ("choices", "complaint"),
    [
        ({"target": "mainframe"}, "target 'mainframe' is not one of python"),
        ({"lengths": (0, 16)}, "length 0 must be at least 1"),
        ({"batches": (0,)}, "batch 0 is outside 1.."),
        ({"max_batch_size": 10**6}, "max batch size 1000000 is outside"),
        ({"batches": (1, 64), "max_batch_size": 8}, "batch 64 is above the max batch size 8"),
        ({"keep": 0}, "keep is 0"),
        ({"gpu": True, "engine": "tensorrt-rtx"}, "tensorrt-rtx engines need a GPU in any case; fix: leave out --gpu"),
        ({"gpu": True, "precision": "int8"}, "'int8' is none that ONNX Runtime can do on GPUs"),
        (
            {"gpu": True, "target": "onnxruntime", "precision": "int8"},
            "'int8' is none that ONNX Runtime can do on GPUs, .* fix: one of fp32, fp16$",
        ),
        ({"gpu": False, "target": "tensorrt"}, "tensorrt engines need a GPU in any case"),
    ],
)
def test_values_out_of_range(choices, complaint):
    with pytest.raises(ConfigError, match=complaint):
        ExportOptions(**choices)


def test_all_mistakes_in_one_message():
    with pytest.raises(ConfigError, match="mainframe.*length -1.*keep is 0"):
        ExportOptions(target="mainframe", lengths=(-1,), keep=0)


def test_numbers_are_sorted_and_the_largest_batch_is_the_most():
    options = ExportOptions(lengths=(32, 16, 32), batches=(8, 1, 100))
    assert options.lengths == (16, 32) and options.batch_sizes == (8, 100)
    assert options.serving.max_batch_size == 100 and options.serving.preferred_batch_sizes == (8, 100)
    assert ExportOptions().batch_sizes == (8, 16, 32, 64)
    assert ExportOptions(max_batch_size=16).batch_sizes == (8, 16)
    assert ExportOptions(batches=(1,)).batch_sizes == (1,)


@pytest.mark.parametrize(
    ("name", "choices", "complaint"),
    [
        ("text", {"lengths": (16, 49)}, "length 49 is above the 48 positions that the model reads; fix: at most 48"),
        ("text", {"lengths": (10, 16)}, "length 10 is smaller than the budget.*K = 11.*at least 11"),
        ("zero", {"lengths": (2,)}, "length 2 is smaller.*at least 3"),
        ("image", {"lengths": (16,)}, "lengths 16 are for texts.*leave out --lengths"),
        ("image", {"parity_texts": "texts.txt"}, "leave out --parity-texts"),
    ],
)
def test_values_that_do_not_fit_the_checkpoint(checkpoints, tmp_path, name, choices, complaint):
    with pytest.raises(ConfigError, match=complaint):
        publish(checkpoints[0][name], tmp_path / "r", report=lambda step: pytest.fail(f"started: {step}"), **choices)
    assert not (tmp_path / "r").exists()


def test_shortest_bucket_has_room_for_the_rationale(checkpoints):
    facts = {name: read_facts(path) for name, path in checkpoints[0].items()}
    assert shortest_bucket(facts["text"]) == 11 and shortest_bucket(facts["zero"]) == 3
    ExportOptions(lengths=(11, 48)).check(facts["text"])


def test_the_machine_decides_where_onnxruntime_runs_unless_it_is_said(monkeypatch):
    for gpus in (0, 2):
        monkeypatch.setattr("rekd_deploy.export.options.machine", lambda gpus=gpus: {"cores": 2, "gpus": gpus})
        assert ExportOptions(target="onnxruntime").serving.gpu is (gpus > 0)
        assert ExportOptions(target="onnxruntime", gpu=True).serving.gpu is True
        assert ExportOptions(target="onnxruntime", gpu=False).serving.gpu is False
        assert ExportOptions().serving.gpu is False


@pytest.mark.parametrize(
    ("choices", "gpus", "expected"),
    [
        ({"target": "onnxruntime", "gpu": True}, 0, "fp16"), ({"target": "onnxruntime"}, 1, "fp16"),
        ({"gpu": True}, 0, "fp16"), ({}, 1, "fp32"), ({"target": "onnxruntime"}, 0, "fp32"),
        ({"target": "onnxruntime", "gpu": False}, 1, "fp32"), ({"target": "tensorrt"}, 1, "fp32"),
        ({"target": "onnxruntime", "gpu": True, "precision": "fp32"}, 0, "fp32"),
        ({"target": "onnxruntime", "gpu": False, "precision": "fp16"}, 0, "fp16"),
    ],
)
def test_on_a_gpu_the_precision_is_fp16_unless_it_is_said(monkeypatch, checkpoints, tmp_path, choices, gpus, expected):
    monkeypatch.setattr("rekd_deploy.export.options.machine", lambda: {"cores": 2, "gpus": gpus})
    options = ExportOptions(**choices)
    plan = plan_export(checkpoints[0]["text"], tmp_path / "r", options)
    assert plan.options.precision == expected and plan.to_dict()["options"]["precision"] == expected
    said = ", the default on a GPU" if options.serving.gpu and "precision" not in choices else ""
    assert f"precision   {expected}{said}" in plan.lines()
    assert plan.options.single_graph is ("rekd_single" in plan.models) is options.serving.gpu and plan.kept == ()
    left_out = replace(options, single_graph=False)
    assert "rekd_single" not in plan_export(checkpoints[0]["text"], tmp_path / "r", left_out).models


def test_what_is_chosen_later_decides_about_the_precision():
    assert replace(ExportOptions(), target="onnxruntime", gpu=True).usual_precision == "fp16"


def test_an_export_for_a_gpu_is_proved_in_fp16_by_its_limits(checkpoints, tmp_path):
    publication = publish(checkpoints[0]["text"], tmp_path / "r", target="onnxruntime", gpu=True)
    assert publication.precision == "fp16, the default on a GPU"
    entries, limits = publication.manifest["artefacts"], publication.manifest["parity"]["limits"]
    assert {role: (entry["precision"], entry["observed"]) for role, entry in entries.items()} == dict.fromkeys(
        ("selector", "predictor", "single"), ("fp16", "fp16")
    )
    assert limits == asdict(limits_of("fp16", "fp16"))
    again = publish(checkpoints[0]["text"], tmp_path / "r", target="onnxruntime", gpu=True, precision="fp32")
    assert again.precision == "fp32" and again.manifest["artefacts"]["single"]["precision"] == "fp32"


def test_a_container_has_the_cores_of_its_quota(monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text("200000 100000")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(64))
    monkeypatch.setattr("rekd_deploy.repository.backend.model.usable_cores.__defaults__", (str(tmp_path / "cpu.max"),))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a setting of this shell, not of the server
    assert machine()["cores"] == 2
    assert ExportOptions(target="onnxruntime", gpu=False).serving.threads == 1


@pytest.mark.parametrize(
    ("cores", "width", "options", "expected"),
    [
        (2, 8, {}, (1, 0)), (2, 512, {}, (2, 0)), (1, 512, {}, (1, 0)), (8, 512, {"instances": 4}, (4, 0)),
        (2, 8, {"target": "onnxruntime"}, (2, 1)), (8, 8, {"target": "onnxruntime"}, (2, 4)),
        (8, 8, {"target": "onnxruntime", "instances": 1}, (1, 4)),
        (8, 8, {"target": "onnxruntime", "threads": 3}, (2, 3)),
        (8, 8, {"target": "onnxruntime", "instances": 16}, (16, 1)),
        (8, 8, {"target": "onnxruntime", "gpu": True}, (1, 0)),
    ],
)
def test_instances_share_the_cores(monkeypatch, checkpoints, cores, width, options, expected):
    """In the python backend threads 0 are shared out where it serves: test_triton_model."""
    monkeypatch.setattr("rekd_deploy.export.options.machine", lambda: {"cores": cores, "gpus": 0})
    facts = read_facts(checkpoints[0]["text"])
    selector = facts.backbones["selector"].model_copy(update={"width": width})
    serving = ExportOptions(**options).with_instances(replace(facts, backbones={"selector": selector})).serving
    assert (serving.instances, serving.threads) == expected


def test_lengths_reach_the_preprocessing(rationalizer, image_rationalizer):
    served = with_lengths(rationalizer.preprocessor, (12, 24))
    assert served.settings.buckets == (12, 24, 48) and served.fingerprint != rationalizer.preprocessor.fingerprint
    assert served(["good film"]).inputs["input_ids"].shape == (1, 12)
    assert with_lengths(rationalizer.preprocessor, ()) is rationalizer.preprocessor
    assert with_lengths(image_rationalizer.preprocessor, (12,)) is image_rationalizer.preprocessor


def test_a_missing_runtime_is_said_before_the_slow_work(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install -e '.*\[cpu\]'"):
        publish(checkpoints[0]["text"], tmp_path / "r", report=lambda step: pytest.fail(f"started: {step}"))


# the plan


def test_a_plan_says_what_would_be_done_and_writes_nothing(checkpoints, tmp_path):
    options = ExportOptions(lengths=(16,), batches=(1, 4), single_graph=True)
    plan = plan_export(checkpoints[0]["text"], tmp_path / "r", options)
    assert (plan.version, plan.stays, plan.goes, plan.lengths) == (1, (), (), (16, 48))
    assert plan.models == ("rekd_selector", "rekd_predictor", "rekd", "rekd_single")
    document = json.loads(json.dumps(plan.to_dict()))
    assert document["checkpoint"]["capacity"] == 11 and document["batches"] == [4]
    text = "\n".join(plan.lines())
    for expected in ("K = 11 of 48", "16, 48", "version 1 (new)", "single.onnx", "bert 2 x 16"):
        assert expected in text
    assert list(tmp_path.iterdir()) == []


def test_a_plan_counts_the_versions_that_are_there(checkpoints, repository, tmp_path):
    root = shutil.copytree(repository, tmp_path / "r")
    path = checkpoints[0]["text"]
    assert "version 2; version 1 is removed" in plan_export(path, root, ExportOptions()).lines()[-2]
    plan = plan_export(path, root, ExportOptions(keep=2))
    assert (plan.version, plan.stays, plan.goes) == (2, (1,), ())
    assert "version 2 beside version 1" in plan.lines()[-2]
    with pytest.raises(RepositoryError, match="input, output, parameters differ.*--keep 1"):
        plan_export(checkpoints[0]["image"], root, ExportOptions(keep=2))


@pytest.fixture
def larger(artefacts, tmp_path):
    """A repository with the text endpoint and the folder of a single graph."""
    root = write_repository(artefacts, tmp_path / "larger", text_endpoint=True)
    shutil.copytree(root / "rekd_selector", root / "rekd_single")
    return root


def test_endpoints_that_are_there_are_kept_unless_it_is_said_otherwise(checkpoints, larger):
    path = checkpoints[0]["text"]
    plan = plan_export(path, larger, ExportOptions())
    assert plan.kept == ("rekd_single", "rekd_text") and {*plan.kept, "rekd_prepare", "rekd_answer"} < {*plan.models}
    assert plan.options.single_graph is plan.options.text_endpoint is True
    assert "rekd_text, since the repository has it" in "\n".join(plan.lines())
    assert "--no-single-graph --no-text-endpoint leaves it out" in "\n".join(plan.lines())
    assert plan.to_dict()["kept"] == ["rekd_single", "rekd_text"]
    asked = plan_export(path, larger, ExportOptions(text_endpoint=True, single_graph=False))
    assert asked.kept == () and "rekd_text" in asked.models and "rekd_single" not in asked.models
    refused = plan_export(path, larger, ExportOptions(text_endpoint=False, single_graph=False))
    assert refused.models == ("rekd_selector", "rekd_predictor", "rekd")
    images = plan_export(checkpoints[0]["image"], larger, ExportOptions(single_graph=False))
    assert images.kept == () and "rekd_image" not in images.models, "the text endpoint is no images' endpoint"


def test_dry_run_is_quick_and_loads_no_torch(checkpoints, tmp_path):
    arguments = ["rekd-export", str(checkpoints[0]["text"]), "--output", str(tmp_path / "r"), "--dry-run", "--json"]
    code = (
        f"import sys\nsys.argv = {arguments!r}\nfrom rekd_deploy.cli.export import main\n"
        "try: main()\nexcept SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'onnxruntime', 'onnx'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["dry_run"] is True and document["repository"] == str(tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


def test_how_members_are_placed_reaches_the_server():
    options = ExportOptions(target="onnxruntime", gpu=True, gpus=(0, 1), instances=2, threads=3, rate_limit=True)
    serving = options.serving
    assert serving.queue_delay_us == 100 and ExportOptions().serving.queue_delay_us == 0, "on GPUs, on CPUs"
    assert ExportOptions(queue_delay=7).serving.queue_delay_us == 7
    for delay in (-1, 10**20):
        with pytest.raises(ConfigError, match=f"queue delay {delay} is outside 0..1000000"):
            ExportOptions(queue_delay=delay)
    assert (serving.gpus, serving.instances, serving.threads, serving.rate_limit) == ((0, 1), 2, 3, True)
    assert ExportOptions(target="tensorrt", gpus=(1,)).serving.gpus == (1,)


def test_gpus_of_members_that_run_on_cpus_are_refused():
    with pytest.raises(ConfigError, match=r"gpus 0 are for GPUs, but the models run on CPUs; fix: add --gpu"):
        ExportOptions(target="onnxruntime", gpu=False, gpus=(0,))
