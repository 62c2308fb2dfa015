"""What ``gpu.py`` does beyond ONNX Runtime: training, and TensorRT."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from _gpu_graphs import CASES, TIE_MARGIN, UNFUSED, Pair
from _gpu_imdb import PRETENDED, imdb, use_carried
from _gpu_machine import no_torch_cuda
from _gpu_steps import (
    Extra,
    Result,
    Sizes,
    Skipped,
    beyond_limits,
    compiled,
    concurrency,
    kept_of,
    latency,
    parity,
    pytorch,
    roles_of,
    timed_cells,
)

from rekd_deploy.bench.variants import PREDICTOR, Runnable, Variant, all_kept
from rekd_deploy.errors import EngineError
from rekd_deploy.parity.reference import compare, read_cases
from rekd_deploy.runtimes.base import Arrays, RunnerChain
from rekd_deploy.runtimes.tensorrt import PRODUCTS, Library, TensorRTRunner, load_library
from rekd_deploy.runtimes.tensorrt_build import batch_ranges, build_engine, length_ranges, profiles_of
from rekd_train.errors import MissingExtraError


def training(pairs: Sequence[Pair], sizes: Sizes, result: Result) -> str:
    """Examples a second of every stage, in bf16 and in fp32."""
    reason = no_torch_cuda()
    if reason and not (sizes.pretends and "has no CUDA" in reason):
        raise Skipped(reason)
    from training_speed import Work

    from rekd_train.config.run import run_config
    from rekd_train.training.runtime import Runtime

    runtime, variants = Runtime("cpu" if reason else "cuda"), {"bf16": {}, "fp32": {"precision": "fp32"}}
    names, changes, (count, steps, warmup) = ("minilm_student", "minilm_teacher"), [], (2000, 40, 8)
    if sizes.pretends:
        names, (count, steps, warmup) = ("equal_student", "demo_teacher"), (64, 2, 0)
        changes = [*PRETENDED, "optimisation.batch_size=4"]
    if reason:
        result.fell_back.append("PyTorch ran on the CPU, in fp32")
        variants = {"fp32": {}}
    use_carried(pairs[0].folder.parent)
    try:
        work = Work(*(run_config(name, changes) for name in names), count, steps, warmup, runtime)
    except MissingExtraError as error:
        raise Skipped(str(error)) from None
    for name, acceleration in variants.items():
        result.add(precision=name, student=names[0], teacher=names[1], timed_steps=steps, **work.measure(acceleration))
    return f"{len(result.cells)} precisions"


def tensorrt(pairs: Sequence[Pair], sizes: Sizes, result: Result) -> str:
    """Engines in fp16, built here; what answers as the model is timed beside ONNX Runtime, in rounds."""
    libraries, reasons = [], []
    for product in PRODUCTS:
        try:
            libraries.append(load_library(product))
        except (EngineError, MissingExtraError) as error:
            reasons.append(str(error))
    if not libraries:
        raise Skipped("; ".join(reasons))
    result.not_run += [{"name": "an engine", "reason": reason} for reason in reasons]
    with ExitStack() as stack:
        work = Path(stack.enter_context(TemporaryDirectory()))
        extra = [
            engine for library in libraries for pair in pairs if (pair.folder / UNFUSED).is_dir()
            if (engine := _engine(library, pair, sizes, work, result, stack))
        ]  # fmt: skip
        return timed_cells(pairs, sizes, result, sizes.cells, "fp16", (), extra=extra)


def _engine(
    library: Library, pair: Pair, sizes: Sizes, work: Path, result: Result, stack: ExitStack
) -> Extra | None:
    """The graphs of a pair as engines that are ready to run; None, and why, where they are not built or not right."""
    product, roles, runners = library.product, roles_of(pair), []
    batches = batch_ranges(None, max(batch for batch, _ in sizes.cells))
    longest = max(length for _, length in sizes.cells)
    variant = Variant(product.title, pair.facts["model"], "fp16", len(roles), kept_of(pair))
    cases, on_cpu = read_cases(pair.folder / CASES), pair.facts["on_cpu"]["fp16"]
    try:
        for role in roles:
            signature, plan = pair.signature.graph(role), work / f"{product.name}_{pair.name}_{role}.plan"
            profiles = profiles_of(signature, batches, length_ranges([longest], longest))
            build_engine(library, pair.folder / UNFUSED / f"{role}.onnx", plan, signature, profiles, "fp16")
            runners.append(TensorRTRunner(plan, signature, f"{pair.name} {role}", engine=product.name))
        chain = stack.enter_context(RunnerChain(runners))
        for role, runner in zip(roles, runners, strict=True):
            agreement = compare(role, runner.run, runner.signature, cases, TIE_MARGIN)
            beyond = beyond_limits(agreement, "fp16", on_cpu.get(role))
            result.facts.setdefault("engines", []).append({
                "product": product.name, "pair": pair.name, "role": role, "beyond": beyond,
                "agreement": agreement.to_dict(),
            })  # fmt: skip
            if beyond:
                raise EngineError(f"the {role}'s engine does not answer as the model: {'; '.join(beyond)}")
    except EngineError as error:
        result.not_run.append({"name": variant.name, "reason": str(error)})
        return None

    def runnable(batches: Sequence[Arrays]) -> Runnable:
        if roles == PREDICTOR:
            batches = [all_kept(batch, pair.signature.predictor) for batch in batches]
        return Runnable(variant, lambda number: chain.run(batches[number % len(batches)])["logits"])

    return runnable


STEPS = {
    "parity": parity,
    "latency_fp16": lambda *given: latency(*given, "fp16"),
    "latency_fp32": lambda *given: latency(*given, "fp32"),
    "concurrency": concurrency,
    "pytorch": pytorch,
    "compiled": compiled,
    "training": training,
    "tensorrt": tensorrt,
    "imdb": imdb,
}
