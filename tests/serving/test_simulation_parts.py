from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from serving.metrics import SIMULATION_METRICS
from serving.settings import EngineSettings, SimulationSettings
from serving.simulation.accelerator import DEVICES, STEP_OVERHEAD_S, Accelerator, Shape, Work, work
from serving.simulation.due import Due
from serving.simulation.metrics import SimulationMetrics
from serving.simulation.report import Report
from serving.simulation.sampler import permitted
from serving.simulation.settings import ExecutorSettings
from serving.simulation.timeline import Run, Timeline

# ---- the accelerator ----------------------------------------------------------------------------------

LLAMA_8B = Shape(32, 4096, 14336, 32, 8, 128, 128_256, tied=False)
PUBLISHED = {
    "SmolLM2-135M": (Shape(30, 576, 1536, 9, 3, 64, 49_152, tied=True), 134_515_008),
    "Llama-3.1-8B": (LLAMA_8B, 8_030_261_248),
    "Llama-3.1-70B": (Shape(80, 8192, 28672, 64, 8, 128, 128_256, tied=False), 70_553_706_496),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_parameters_are_those_of_the_weights(model: str) -> None:
    """What config.json says of a model gives exactly as many weights as its published files have."""
    shape, parameters = PUBLISHED[model]
    assert shape.parameters == parameters


def accelerator(device: str, devices: int = 1) -> Accelerator:
    """Llama 3.1 8B on some devices."""
    kv_bytes = 32 * max(1, 8 // devices) * 128 * 2 * 2
    return Accelerator(device, LLAMA_8B, devices=devices, weight_bytes=2, kv_bytes=kv_bytes)


STEPS = {
    "one sequence": work([1000], [1]),
    "many sequences": work([1000] * 256, [1] * 256),
    "a prompt": work([0], [8192]),
    "long contexts": work([100_000] * 8, [1] * 8),
}


@pytest.mark.parametrize("step", STEPS)
def test_faster_devices_and_more_of_them_are_faster(step: str) -> None:
    """No step takes longer on a device with more of everything, or on two of them."""
    taken = [accelerator(device).step_s(STEPS[step]) for device in ("H200", "H100", "A100", "L4")]
    assert taken == sorted(taken)
    assert accelerator("H100", 2).step_s(STEPS[step]) < accelerator("H100").step_s(STEPS[step])


def test_one_sequence_is_bound_by_memory_and_a_prompt_by_arithmetic() -> None:
    """A step for one token reads all weights once; one for a long prompt is longer than any reading."""
    reading = 2 * LLAMA_8B.parameters / DEVICES["H100"].memory_bytes_per_s
    alone = accelerator("H100").step_s(STEPS["one sequence"])
    assert reading < alone - STEP_OVERHEAD_S < 1.5 * reading
    arithmetic = 2 * LLAMA_8B.body * 8192 / DEVICES["H100"].flops
    assert arithmetic < accelerator("H100").step_s(STEPS["a prompt"]) < 2.5 * arithmetic


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), min_size=1, max_size=5))
def test_work_is_counted_token_by_token(sequences: list[tuple[int, int]]) -> None:
    """A token attends to all before it and to itself, and a sequence's context is read once a step."""
    computed, added = zip(*sequences, strict=True)
    pairs = sum(place + 1 for old, new in sequences for place in range(old, old + new))
    expected = Work(sum(added), len(sequences), sum(computed) + sum(added), pairs)
    assert work(computed, added) == expected


# ---- time ---------------------------------------------------------------------------------------------


def test_steps_queue() -> None:
    """Each step ends its own length after the one before it, however early it was handed over."""
    line = Timeline()
    line.begin(10.0, 2.0, continues=False)
    assert line.end(10.1) == 12.0
    line.begin(10.2, 3.0, continues=True)
    assert line.end(10.3) == 15.0
    assert (line.run.steps, line.run.busy_s, line.run.late_steps, line.run.idle_s) == (2, 5.0, 0, 0.0)


def test_a_late_host_is_told_from_no_work() -> None:
    """The accelerator's standing still is the host's fault where its requests were to go on, and nobody's
    where only new ones come next."""
    line = Timeline()
    line.begin(10.0, 2.0, continues=False)
    line.begin(12.5, 2.0, continues=True)
    assert line.end(12.5) == 14.5
    assert (line.run.late_steps, line.run.late_s, line.run.idle_s) == (1, 0.5, 0.0)
    assert line.run.host_share == 0.5 / 4.5
    assert line.run.host_bound
    line.begin(20.0, 2.0, continues=False)
    assert (line.run.late_steps, line.run.late_s, line.run.idle_s) == (1, 0.5, 5.5)
    line.begin(22.0, 8.0, continues=True)
    assert not line.run.host_bound


def test_a_step_waits_for_its_sampling() -> None:
    """A step whose sampling comes after its arithmetic ends then, and is late once, whatever else it was."""
    line = Timeline()
    line.begin(10.0, 2.0, continues=False)
    line.begin(13.0, 2.0, continues=True)
    assert line.end(16.0) == 16.0
    assert (line.run.late_steps, line.run.late_s) == (1, 2.0)
    line.begin(16.0, 2.0, continues=True)
    assert line.end(16.1) == 18.0
    assert line.run.late_steps == 1


def test_a_result_is_there_when_it_is_due() -> None:
    """Whoever asks for a result before its time gets it at its time, and after it at once."""
    at = time.monotonic() + 0.05
    due = Due("tokens", at)
    assert not due.done()
    assert due.result() == "tokens"
    assert time.monotonic() >= at
    assert due.done()
    assert Due(None).result() is None


# ---- what it says of itself -----------------------------------------------------------------------------


def test_a_report_is_one_line_of_json(tmp_path: Path) -> None:
    """Whenever it is read, a report is whole: the figures after the last step."""
    file = tmp_path / "report.json"
    file.write_text("of another run" * 100)
    report, line = Report(str(file)), Timeline()
    for step in range(3):
        line.begin(10.0 + step, 0.5, continues=True)
        report.write(line.run)
        assert json.loads(file.read_text()) == {
            "steps": step + 1,
            "busy_s": 0.5 * (step + 1),
            "late_steps": step,
            "late_s": 0.5 * step,
            "idle_s": 0,
        }
    report.close()
    assert json.loads(file.read_text())["steps"] == 3


def test_a_scrape_reads_the_report() -> None:
    """The metrics of a simulated accelerator are those declared, nothing at first, then what is reported."""
    registry = CollectorRegistry()
    settings = EngineSettings(
        source="org/model", accelerator="simulated", simulation=SimulationSettings(step_ms=5)
    )
    told = SimulationMetrics("m", registry).reporting(settings).simulation
    assert isinstance(told, ExecutorSettings)
    assert told.report is not None
    names = [definition.name for definition in SIMULATION_METRICS]
    assert [registry.get_sample_value(name, {"model": "m"}) for name in names] == [0] * 5
    report = Report(told.report)
    report.write(Run(steps=3, busy_s=1.5, late_steps=2, late_s=0.25, idle_s=4.0))
    report.close()
    assert [registry.get_sample_value(name, {"model": "m"}) for name in names] == [3, 1.5, 2, 0.25, 4]
    shown = {family.name: (family.type, family.documentation) for family in registry.collect()}
    assert shown == {d.name.removesuffix("_total"): (d.kind, d.sentence) for d in SIMULATION_METRICS}


# ---- grammars -------------------------------------------------------------------------------------------

WORDS = 3


@given(
    allowed=st.sets(st.integers(0, 32 * WORDS - 1)),
    token=st.integers(0, 32 * WORDS - 1),
    closing=st.lists(st.integers(0, 32 * WORDS - 1), max_size=4),
)
def test_permitted(allowed: set[int], token: int, closing: list[int]) -> None:
    """A token stays if a grammar allows it, or allows nothing; else the first closing one comes that it
    allows, or the lowest of all."""
    bits = np.zeros(32 * WORDS, dtype=np.uint8)
    bits[list(allowed)] = 1
    mask = np.packbits(bits, bitorder="little").view("<i4")
    expected = [candidate for candidate in (token, *closing, *sorted(allowed)) if candidate in allowed]
    assert permitted(token, mask, closing) == (expected[0] if expected else token)
