import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modmoe.analysis.records import Matrix, MethodRecord
from modmoe.analysis.tensorboard import write_events, write_usage
from modmoe.errors import MissingExtraError
from modmoe.routing import Routing


def heat_map() -> Matrix:
    return Matrix(np.array([[0.9, math.nan, 0.0]]), "after task", "task", ["0"], ["0", "1", "2"])


def events(folder) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_what_is_written_can_be_read_back(tmp_path):
    record = MethodRecord(
        {"accuracy": 0.75, "accuracy/oracle": 0.5, "bad": math.nan},
        {"accuracy": heat_map()},
        {"num_experts": [2.0, 4.0], "accuracy/task_0": [0.5, math.nan, 0.25, math.inf]},
    )
    write_events(tmp_path / "new" / "folder", record)
    read = events(tmp_path / "new" / "folder")
    scalars = {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    assert scalars == {
        "num_experts": [(0, 2.0), (1, 4.0)],
        "accuracy/task_0": [(0, 0.5), (2, 0.25)],
        "final/accuracy": [(0, 0.75)],
        "final/accuracy/oracle": [(0, 0.5)],
    }
    assert read.Tags()["images"] == ["accuracy"]
    (image,) = read.Images("accuracy")
    # 3 columns give 2 + 0.6 * 3 = 3.8 inches at 100 dots each, 1 row 1.6 + 0.5 = 2.1 inches
    assert (image.width, image.height) == (380, 210)


def test_usage_can_be_read_back(tmp_path):
    from torch.utils.tensorboard.writer import SummaryWriter

    routing = Routing.assigned(torch.tensor([0, 0, 1, 0]), 2)
    with SummaryWriter(log_dir=str(tmp_path)) as writer:
        write_usage(writer, routing, step=3)
        write_usage(writer, routing, step=5, tag="block_1", tasks=torch.tensor([0, 0, 1, 0]))
    read = events(tmp_path)
    # three of four to one of two experts: 3 / 2 - 1
    assert [(e.step, e.value) for e in read.Scalars("usage/max_violation")] == [(3, 0.5)]
    assert [(e.step, e.value) for e in read.Scalars("block_1/max_violation")] == [(5, 0.5)]
    assert "usage/task_expert_information" not in read.Tags()["scalars"]
    assert "block_1/task_expert_information" in read.Tags()["scalars"]


@pytest.mark.parametrize(
    "values", [np.full((2, 2), math.nan), np.full((1, 1), -3.0), np.zeros((0, 2)), np.array([[-1.0, 5.0]])]
)
def test_no_matrix_makes_it_raise(tmp_path, values):
    rows, columns = values.shape
    matrix = Matrix(values, "r", "c", ["n"] * rows, ["n"] * columns)
    write_events(tmp_path, MethodRecord({"a": 1.0}, {"m": matrix}))
    read = events(tmp_path)
    assert read.Tags()["scalars"] == ["final/a"]
    assert read.Tags()["images"] == (["m"] if values.size else [])


def test_a_figure_of_the_caller_stays(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    mine = pyplot.figure()
    try:
        write_events(tmp_path, MethodRecord({}, {"m": heat_map()}))
        assert pyplot.get_fignums() == [mine.number]
    finally:
        pyplot.close(mine)


def test_a_missing_matplotlib_is_named_only_if_needed(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)

    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "matplotlib":
                raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr(sys, "meta_path", [Hidden(), *sys.meta_path])
    write_events(tmp_path / "a", MethodRecord({"a": 1.0}))
    assert events(tmp_path / "a").Tags()["scalars"] == ["final/a"]
    with pytest.raises(MissingExtraError, match=r"pip install 'modmoe\[report\]'"):
        write_events(tmp_path / "b", MethodRecord({}, {"m": heat_map()}))


def test_importing_analysis_loads_no_plotting():
    code = "import sys, modmoe.analysis;print([m for m in ('matplotlib', 'tensorboard', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
