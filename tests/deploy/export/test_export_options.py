"""What may be chosen about an export is checked before anything is computed or written."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
from conftest import make_image_rationalizer, make_rationalizer

from rekd_deploy.cli.export_summary import plan_lines
from rekd_deploy.errors import RepositoryError
from rekd_deploy.export.checkpoint import machine, read_facts
from rekd_deploy.export.engines import EngineRequest
from rekd_deploy.export.options import ExportOptions
from rekd_deploy.export.run import plan_export, publish
from rekd_deploy.graphs.modules import pair_signature
from rekd_deploy.repository.writer import write_repository
from rekd_train.checkpoints.checkpoint import save
from rekd_train.errors import CheckpointError, ConfigError, MissingExtraError
from rekd_train.inputs.policy import PAPER_POLICY

pytestmark = pytest.mark.slow

CPUS, GPUS = ({"target": "onnxruntime", "gpu": gpu} for gpu in (False, True))
RTX = {"engine": "tensorrt-rtx"}


MODELS = {
    "text": make_rationalizer, "zero": lambda: make_rationalizer(operator="zero"), "image": make_image_rationalizer,
    "paper": lambda: make_rationalizer(operator="zero", policy=PAPER_POLICY)}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: save(make(), folder / name) for name, make in MODELS.items()}


@pytest.fixture
def here(monkeypatch):
    machine = {"cores": 2, "gpus": 0}
    return lambda **found: monkeypatch.setattr("rekd_deploy.export.options.machine", lambda: machine | found)


def refused(complaint, errors, checkpoint, root, **choices):
    """An export that is refused before anything slow starts, with nothing written."""
    before = root.exists()
    with pytest.raises(errors, match=complaint) as refusal:
        publish(checkpoint, root, report=lambda step: pytest.fail(f"started: {step}"), **choices)
    assert "\n" not in str(refusal.value) and root.exists() is before


def shown(plan) -> str:
    return "\n".join(plan_lines(plan))


@pytest.mark.parametrize(("name", "content", "complaint"), [
    ("policy.json", None, "policy.json is missing; fix: .* a whole checkpoint"),
    ("selector.safetensors", None, "selector.safetensors is missing; fix: "),
    ("tokenizer.json", None, "tokenizer.json is missing; fix: "),
    ("policy.json", '{"policy": {"budget": 3}}', "budget"), ("policy.json", "{", r"policy\.json is damaged"),
])  # fmt: skip
def test_a_checkpoint_that_is_not_whole_is_named(checkpoints, tmp_path, name, content, complaint):
    copy = shutil.copytree(checkpoints["text"], tmp_path / "copy")
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_text(content)
    refused(complaint, CheckpointError, copy, tmp_path / "repository")


@pytest.mark.parametrize(("choices", "complaint"), [
    ({"target": "mainframe"}, "target 'mainframe' is not one of python"), ({"instances": 0}, "instances is 0"),
    ({"lengths": (0, 16)}, "length 0 must be at least 1"), ({"batches": (0,)}, "batch 0 is outside 1.."),
    ({"batches": (1, 10**6)}, "batch 1000000 is outside"), ({"keep": 0}, "keep is 0"),
    ({"queue_delay": -1}, "queue delay -1 is outside 0..1000000"),
    ({"queue_delay": 10**20}, f"queue delay {10**20} is outside 0..1000000"),
    ({"gpu": True, **RTX}, "tensorrt-rtx engines need a GPU in any case; fix: leave out --gpu"),
    ({"gpu": False, "target": "tensorrt"}, "tensorrt engines need a GPU in any case"),
    ({"gpu": True, "precision": "int8"}, "'int8' is none that ONNX Runtime can do on GPUs"),
    (GPUS | {"precision": "int8"}, "'int8' is none that .* on GPUs; fix: one of fp32, fp16$"),
    ({"precision": "bf16"}, "'bf16' is none that ONNX Runtime can do.* fix: one of fp32, fp16, int8"),
    ({"precision": "fp7"}, "precision 'fp7'"), ({"device": "tpu"}, "there is no device 'tpu'"),
    ({"device": "cuda", "precision": "int8"}, "no int8 kernels for GPUs.*fix: --device cpu"),
    (CPUS | {"gpus": (0,)}, "gpus 0 are for GPUs, .* run on CPUs; fix: add --gpu"),
    ({"target": "onnxruntime", **RTX}, "cannot run the engine 'tensorrt-rtx'; fix: "),
    ({"target": "tensorrt", **RTX}, "cannot run the engine 'tensorrt-rtx'; fix: "),
    ({"engine": "tensorrt"}, "target 'python' cannot run the engine 'tensorrt'; fix: "),
    ({"target": "mainframe", "lengths": (-1,), "keep": 0}, "mainframe.*length -1.*keep is 0")])  # fmt: skip
def test_values_out_of_range(choices, complaint):
    with pytest.raises(ConfigError, match=complaint):
        ExportOptions(**choices)


@pytest.mark.parametrize(("name", "choices", "complaint"), [
    ("text", {"lengths": (16, 49)}, "length 49 is above the 48 positions that the model reads; fix: .*at most 48"),
    ("text", {"lengths": (10, 16)}, "length 10 is smaller than the budget.*K = 11.*at least 11"),
    ("zero", {"lengths": (2,)}, "length 2 is smaller.*at least 3"),
    ("paper", {"lengths": (16,)}, "lengths 16 are .*may hold padding.*fix: leave out --lengths"),
    ("image", {"lengths": (16,)}, "lengths 16 are not for .*reads images.*leave out --lengths"),
    ("image", {"parity_texts": "texts.txt"}, "leave out --parity-texts"),
    ("text", {}, r"pip install -e '.*\[cpu\]'"), ("text", RTX, r"pip install -e '.*\[tensorrt-rtx\]'")])  # fmt: skip
def test_what_does_not_fit_the_checkpoint_and_a_missing_library(
    checkpoints, tmp_path, monkeypatch, name, choices, complaint):
    if "pip" in complaint:
        monkeypatch.setitem(sys.modules, "tensorrt_rtx" if choices else "onnxruntime", None)
    refused(complaint, (ConfigError, MissingExtraError), checkpoints[name], tmp_path / "r", **choices)

def test_facts_are_the_models_and_choices_reach_server_and_engines(checkpoints):
    for name, shortest in (("text", 11), ("zero", 3), ("image", 4)):
        facts, model = read_facts(checkpoints[name]), MODELS[name]()
        assert facts.signature == pair_signature(model) and facts.capacity == model.capacity
        assert facts.labels == tuple(model.labels) and facts.preprocessor.fingerprint == model.preprocessor.fingerprint
        assert facts.shortest_length == shortest
    ExportOptions(lengths=(11, 48)).check(read_facts(checkpoints["text"]))  # the shortest and the longest that fit
    options = ExportOptions(lengths=(32, 16, 32), batches=(8, 1, 100))
    assert options.lengths == (16, 32) and options.batch_sizes == (8, 100)
    assert options.serving.max_batch_size == 100 and options.serving.preferred_batch_sizes == (8, 100)
    assert ExportOptions().batch_sizes == (8, 16, 32, 64) and ExportOptions(batches=(1,)).batch_sizes == (1,)
    serving = ExportOptions(**GPUS, gpus=(0, 1), instances=2, threads=3, rate_limit=True).serving
    assert (serving.gpus, serving.instances, serving.threads, serving.rate_limit) == ((0, 1), 2, 3, True)
    delays = [ExportOptions(**each).serving.queue_delay_us for each in (GPUS, {}, {"queue_delay": 7})]
    assert delays == [100, 0, 7] and ExportOptions(target="tensorrt", gpus=(1,)).serving.gpus == (1,)
    options = ExportOptions(**RTX, batches=(1, 4), lengths=(16,))
    assert options.product == "tensorrt-rtx" and not options.fuse, "engines are built from graphs that are not fused"
    assert options.engines == EngineRequest(4, (1, 4), (16,))
    assert ExportOptions().product is None and ExportOptions().fuse and not ExportOptions(fused=False).fuse
    assert ExportOptions(target="tensorrt").product == "tensorrt"


@pytest.mark.parametrize(("choices", "gpus", "expected"), [
    (GPUS, 0, "fp16"), ({"target": "onnxruntime"}, 1, "fp16"), ({"gpu": True}, 0, "fp16"), ({}, 1, "fp32"),
    ({"target": "onnxruntime"}, 0, "fp32"), (CPUS, 1, "fp32"), ({"target": "tensorrt"}, 1, "fp32"),
    (GPUS | {"precision": "fp32"}, 0, "fp32"), (CPUS | {"precision": "fp16"}, 0, "fp16")])
def test_on_a_gpu_precision_is_fp16(here, checkpoints, tmp_path, choices, gpus, expected):
    here(gpus=gpus)
    options = ExportOptions(**choices)
    plan = plan_export(checkpoints["text"], tmp_path / "r", options)
    assert plan.options.precision == expected and plan.to_dict()["options"]["precision"] == expected
    said = ", the default on a GPU" if options.on_gpu and "precision" not in choices else ""
    assert f"precision   {expected}{said}" in plan_lines(plan)
    assert plan.kept == ()
    left_out = replace(options, single_graph=False)
    assert "rekd_single" not in plan_export(checkpoints["text"], tmp_path / "r", left_out).models


def test_a_container_has_the_cores_of_its_quota(monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text("200000 100000")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(64))
    monkeypatch.setattr("rekd_deploy.repository.backend.model.usable_cores.__defaults__", (str(tmp_path / "cpu.max"),))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a setting of this shell, not of the server
    assert machine()["cores"] == 2 and ExportOptions(**CPUS).serving.threads == 1


@pytest.mark.parametrize(("cores", "options", "expected"), [
    (2, {}, (2, 0)), (1, {}, (1, 0)), (8, {"instances": 4}, (4, 0)), (8, {"engine": "tensorrt-rtx"}, (1, 0)),
    (2, {"target": "onnxruntime"}, (2, 1)), (8, {"target": "onnxruntime"}, (2, 4)),
    (8, {"target": "onnxruntime", "instances": 1}, (1, 4)), (8, {"target": "onnxruntime", "threads": 3}, (2, 3)),
    (8, {"target": "onnxruntime", "instances": 16}, (16, 1)), (8, GPUS, (1, 0))])
def test_instances_share_the_cores(here, cores, options, expected):
    """In the python backend threads 0 are shared out where it serves: test_triton_model."""
    here(cores=cores)
    serving = ExportOptions(**options).serving
    assert (serving.instances, serving.threads) == expected


def test_plans_say_what_would_be_done_count_versions_and_write_nothing(checkpoints, tmp_path, repository):
    options = ExportOptions(lengths=(16,), batches=(1, 4))
    plan = plan_export(checkpoints["text"], tmp_path / "r", options)
    assert (plan.version, plan.stays, plan.goes, plan.lengths) == (1, (), (), (16, 48))
    assert plan.models == ("rekd_selector", "rekd_predictor", "rekd", "rekd_single", "rekd_text")
    document = json.loads(json.dumps(plan.to_dict()))
    assert document["capacity"] == 11 and document["batches"] == [4]
    for expected in ("K = 11 of 48", "16, 48", "version 1 (new)", "rekd_single", "transformers 2 x 16"):
        assert expected in shown(plan)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "thesis.tex").touch()
    refused("holds thesis.tex", RepositoryError, checkpoints["text"], tmp_path)
    root = shutil.copytree(repository, tmp_path / "r")
    assert "version 2; version 1 is removed" in shown(plan_export(checkpoints["text"], root, ExportOptions()))
    plan = plan_export(checkpoints["text"], root, ExportOptions(keep=2))
    assert (plan.version, plan.stays, plan.goes) == (2, (1,), ()) and "version 2 beside version 1" in shown(plan)
    with pytest.raises(RepositoryError, match="input, output, parameters differ.*--keep 1"):
        plan_export(checkpoints["image"], root, ExportOptions(keep=2))


@pytest.mark.parametrize(("kind", "options", "more"), [
    ("text", {}, ["single", "text"]), ("image", {}, ["single", "image"]), ("text", {"gpu": True}, ["single", "text"]),
    ("text", {"target": "onnxruntime"}, ["single"]), ("text", {"target": "tensorrt"}, []),
    ("text", {"single_graph": False, "text_endpoint": False}, []),
    ("text", {"target": "tensorrt", "single_graph": True, "text_endpoint": True}, ["single", "text"])])
def test_models_beside_the_ensemble(here, checkpoints, tmp_path, kind, options, more):
    """Engines take long to build; a container without the python backend would serve nothing for rekd_text's sake."""
    here(gpus=0)
    plan = plan_export(checkpoints[kind], tmp_path / "r", ExportOptions(**options))
    assert [name.removeprefix("rekd_") for name in plan.models[3:]] == more and plan.kept == ()


def test_endpoints_that_are_there_are_kept_unless_it_is_said_otherwise(here, checkpoints, artefacts, tmp_path):
    here(gpus=0)
    root, target = write_repository(artefacts, tmp_path / "larger", text_endpoint=True), {"target": "tensorrt"}
    shutil.copytree(root / "rekd_selector", root / "rekd_single")
    plan = plan_export(checkpoints["text"], root, ExportOptions(**target))
    assert plan.kept == ("rekd_single", "rekd_text") and {*plan.kept} < {*plan.models}
    assert plan.options.single_graph is plan.options.text_endpoint is True
    assert "rekd_text, since the repository has it" in shown(plan)
    assert "--no-single-graph --no-text-endpoint leaves it out" in shown(plan)
    chosen = plan_export(checkpoints["text"], root, ExportOptions(**target, text_endpoint=True, single_graph=False))
    assert chosen.kept == () and "rekd_text" in chosen.models and "rekd_single" not in chosen.models
    images = plan_export(checkpoints["image"], root, ExportOptions(**target, single_graph=False))
    assert images.kept == () and "rekd_image" not in images.models, "the text endpoint is no images' endpoint"
