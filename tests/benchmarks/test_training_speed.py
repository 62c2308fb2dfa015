"""The benchmark of training: its variants, its clock, its figures."""

import training_speed as script

from rekd_train.config.run import AccelerationConfig
from rekd_train.training.runtime import Runtime


def test_every_acceleration_is_switched_off_once():
    assert {key for off in script.SWITCHES.values() for key in off} == set(AccelerationConfig.model_fields)
    default = AccelerationConfig()
    for off in script.SWITCHES.values():
        assert default.model_copy(update=off) != default
    variants = script._variants(gpu=True)
    assert len(variants) == len(script.SWITCHES) + 2
    assert variants["all off"].keys() == set(AccelerationConfig.model_fields) and not variants["all on"]
    assert "without bf16" not in script._variants(gpu=False)


def test_the_clock_leaves_the_warm_up_out(monkeypatch):
    times = iter([0.0, 10.0, 14.0])  # stage, end of the warm-up, end
    monkeypatch.setattr(script, "_now", lambda runtime: next(times))
    clock = script.Clock(Runtime("cpu"), warmup=2, batch_size=8)
    clock.stage("compact", 6)
    for _ in range(6):
        clock.step({})
    assert clock.stages["compact"]["examples_per_second"] == 8.0
    assert clock.stages["compact"]["peak_mb"] is None or clock.stages["compact"]["peak_mb"] > 1


def test_figures_are_medians_and_worth_is_a_ratio():
    def reading(speed: float, seconds: float | None) -> dict:
        stages = {name: {"examples_per_second": speed, "peak_mb": 10 * speed} for name in script.STAGES}
        return {"stages": stages, "teacher_pass_seconds": seconds}

    on = script._medians([reading(30.0, 1.0), reading(10.0, 3.0), reading(20.0, 2.0)])
    off = script._medians([reading(5.0, None)] * 3)
    assert on["stages"]["compact"]["examples_per_second"] == 20.0 and on["teacher_pass_seconds"] == 2.0
    assert on["stages"]["compact"]["peak_mb"] == 200.0 and off["teacher_pass_seconds"] is None
    assert script._worth({"all on": on, "all off": off})["all off"]["compact"] == 4.0
