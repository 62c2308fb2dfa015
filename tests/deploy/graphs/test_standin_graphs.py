"""Where the real CUDA provider puts each node of each graph: all on the GPU, and nothing copied in between."""

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
