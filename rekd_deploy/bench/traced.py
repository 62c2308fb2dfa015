"""A checkpoint's arrangements as ONNX graphs for ONNX Runtime, in several precisions. Nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rekd_deploy.bench.forms import COMPACTED, NotRun
from rekd_deploy.bench.lines import SINGLE, Line
from rekd_deploy.errors import ExportError

if TYPE_CHECKING:
    import onnx

Traced = tuple[Line, "dict[str, onnx.ModelProto]", str]
"""A line, its graphs by role, their precision."""


def traced_lines(
    lines: Sequence[Line],
    precisions: Sequence[str],
    items: Sequence[Any],
    *,
    gpu: bool,
    not_run: list[NotRun],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Traced]:
    """Each line with its graphs by role and their precision; compacted pairs as one graph, too.

    A pair that several lines share is traced once.

    Args:
        precisions: 'fp32' and those of the repositories.
        items: what int8 is calibrated on.
        gpu: fused as for GPUs.
        not_run: receives what cannot be traced or converted, with the reason.
        report: called with the number of pairs that are done, and of all.
    """
    from rekd_deploy.graphs.modules import head_layers, pair_signature
    from rekd_deploy.graphs.onnx_model import joined
    from rekd_deploy.graphs.precision.convert import convert_pair
    from rekd_deploy.graphs.tracing import OPSET, traced_graphs

    pairs = {id(line.pair): line.pair for line in lines}
    for number, (key, pair) in enumerate(pairs.items()):
        report(number, len(pairs))
        own = [line for line in lines if id(line.pair) == key]
        names = ", ".join(line.model for line in own)
        signature = pair_signature(pair)
        try:
            models = traced_graphs(pair, fused=True, gpu=gpu, opset=OPSET)
        except ExportError as error:
            not_run.append(NotRun(f"ONNX Runtime, {names}", str(error)))
            continue
        for precision in precisions:
            try:
                conversion = convert_pair(
                    models, precision, signature, head_layers(pair), pair.preprocessor, items, fused=True
                )
            except ExportError as error:
                not_run.append(NotRun(f"ONNX Runtime {precision}, {names}", str(error)))
                continue
            for line in own:
                yield line, conversion.models, precision
                if line.model == COMPACTED:
                    whole = joined(conversion.models["selector"], conversion.models["predictor"], signature)
                    yield Line(line.model, pair, SINGLE), {"single": whole}, precision
    report(len(pairs), len(pairs))
