"""Where the real CUDA provider puts each node of each graph: all on the GPU, and nothing copied in between."""

import onnx
import onnx.parser
import pytest
import standin
from families import KINDS
from precisions import gpu_graphs

from rekd_deploy.export.options import GPU_PRECISIONS

pytestmark = pytest.mark.standin

SHAPE_ARITHMETIC = {"Squeeze", "Concat", "Add", "Sub", "Mul", "Div", "Max", "Min", "Gather", "Unsqueeze", "Cast"}
"""What the host may do with sizes of axes. That nothing else is done there, the provider says by taking the capture."""


@pytest.mark.parametrize("precision", GPU_PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_copied_inside_a_graph_and_all_of_it_can_be_captured(kind, precision, tmp_path):
    standin.libraries()
    paths = gpu_graphs(kind, precision, tmp_path)
    assert {path.stem for path in paths} == {"selector", "predictor", "single"}
    found = standin.run("placement.py", *paths)
    assert len(found) == len(paths) == 9
    for graph in found:
        name = graph["path"].removeprefix(str(tmp_path))
        assert graph["problem"] == "" and graph["placed"], name
        assert graph["copies"] == 0, (name, graph["on_cpu"])
        assert {operator for operator, _ in graph["on_cpu"]} <= SHAPE_ARITHMETIC, (name, graph["on_cpu"])
        assert graph["refusal"] == "", (name, graph["on_cpu"])


def test_padding_of_integers_is_what_this_would_find(tmp_path):
    text = """<ir_version: 10, opset_import: ["" : 18]>
        padded (int64[2, n] ids) => (float[2, m, 4] y) <int64[4] pads = {0, 1, 0, 0}, float[9, 4] table = {%s}>
        { wider = Pad(ids, pads)
          y = Gather(table, wider) }"""
    path = tmp_path / "pad.onnx"
    onnx.save(onnx.parser.parse_model(text % ", ".join(["0.5"] * 36)), path)
    (found,) = standin.run("placement.py", path)
    assert found["problem"] == "" and found["copies"] and "graph capture" in found["refusal"]
