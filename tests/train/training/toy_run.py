"""A toy run in a process of its own: ``python toy_run.py '{"output": ..., ...}'``.

Keys: ``output`` (file for weights and log), ``state`` (directory), ``resume``, ``kill`` ([stage, step]: die there
as by kill -9), ``config`` (changes), ``images`` (augmented ones), ``dropout`` (of the heads; default 0.1).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from toys import Recorder, toy_config, toy_images, toy_texts

from rekd_train.inputs.policy import cut_margins
from rekd_train.training import stages
from rekd_train.training.runtime import Runtime
from rekd_train.training.state import StateStore, identity_of
from rekd_train.training.validation import DevEvaluation, fitted_policy


class Assassin(Recorder):
    """Ends the process, without any farewell, after a step."""

    def __init__(self, stage: str = "", step: int = 0) -> None:
        super().__init__()
        self._victim, self._steps_left = stage, step

    def step(self, values: dict[str, float]) -> None:
        super().step(values)
        self._steps_left -= self.stages[-1][0] == self._victim
        if self._victim and self._steps_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class Witnessed(DevEvaluation):
    """Also keeps what each evaluation decided, and how far each decision is from its tie."""

    decisions: list[tuple[torch.Tensor, torch.Tensor]] = []
    """(mask, margins) of every evaluation, (n, N) each; empty where nothing is selected."""

    def __call__(self, step):
        figures = super().__call__(step)
        mask = margins = torch.empty(0)
        if self._with_rationale:
            pair, mask, readings = self._pair, self._mask, self._readings
            rule = pair.policy if self._fixed else fitted_policy(pair, readings, self._config.selection)
            margins = torch.from_numpy(cut_margins(readings.scores.numpy(), readings.selectable.numpy(), rule))
        Witnessed.decisions.append((mask, margins))
        return figures


def run(task: dict) -> dict:
    """Train on what a teacher says and return weights, log and calibration."""
    torch.set_num_threads(1)
    config, observer, runtime = toy_config(**task["config"]), Assassin(*task.get("kill", ())), Runtime("cpu")
    make = partial(toy_images, augmented=True) if task.get("images") else toy_texts
    pair, train, dev = make(examples=250)
    for model in (pair.selector, pair.predictor):  # and the heads that are made for a stage
        model.backbone.settings = model.backbone.settings.model_copy(update={"head_dropout": task.get("dropout", 0.1)})
    for module in pair.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = task.get("dropout", 0.1)
    store = StateStore(Path(task["state"]), identity_of(config, train, dev)) if "state" in task else None
    Witnessed.decisions, stages.DevEvaluation = [], Witnessed
    stages.fit(config, pair, train, dev, teacher=make(seed=5)[0], observer=observer, runtime=runtime, store=store,
        resume=task.get("resume", False))  # fmt: skip
    result = {
        "pair": pair.state_dict(), "policy": [pair.policy.bias, pair.probability_temperature],
        "values": dict(observer.values), "evaluations": dict(observer.evaluations), "stages": observer.stages,
        "decisions": Witnessed.decisions,
    }  # fmt: skip
    if runtime.is_main and "output" in task:
        torch.save(result, task["output"])
    runtime.close()
    return result


if __name__ == "__main__":
    warnings.simplefilter("error")
    run(json.loads(sys.argv[1]))
