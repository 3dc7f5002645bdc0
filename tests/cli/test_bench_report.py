"""The frame of `rayltx bench`: arms in turn, verdicts, the machine's load, and how a report is shown."""

import contextlib
import dataclasses
import json

import pytest
from rayltx_command import rayltx_here

from rayltx.cli.bench import machine, report
from rayltx.cli.bench.machine import Load
from rayltx.cli.bench.measurements import Arm, Clock, Measurement
from rayltx.cli.bench.report import Output, in_turn, reporting
from rayltx.errors import InputError

ARMS = (Arm("one", (2.0, 4.0, 3.0)), Arm("two", (7.5, 7.5, 9.0)))


def shown(capsys, monkeypatch, load_average, measurement, as_json=True, plot=None):
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (load_average, 0.0, 0.0))
    with reporting("shard", {"rounds": 3}, Output(as_json, plot)) as made:
        made.measurements.append(measurement)
        made.found["exact"] = True
    out = capsys.readouterr().out
    return json.loads(out) if as_json else out


def test_arms_are_run_in_turn_and_the_first_round_does_not_count():
    run = []
    numbers = iter(range(100))

    def arm(name):
        return lambda: run.append(name) or float(next(numbers))

    arms = in_turn({name: arm(name) for name in "abc"}, rounds=2)
    assert "".join(run) == "abcbcacab", "each round begins with another"
    assert [each.name for each in arms] == ["a", "b", "c"] and all(len(each.samples) == 2 for each in arms)
    assert min(sample for each in arms for sample in each.samples) == 3


def test_ratios_are_of_medians(capsys, monkeypatch):
    found = shown(capsys, monkeypatch, 0.0, Measurement("a step", "s", Clock.WALL, ARMS))
    (one, two) = found["measurements"][0]["arms"]
    assert (one["median"], two["median"], two["of_first"]) == (3.0, 7.5, 2.5)
    assert found["found"] == {"exact": True} and not found["load"]["other_work"]


@pytest.mark.parametrize("clock, ratio", [(Clock.WALL, None), (Clock.PROCESSOR, 2.5), (Clock.NONE, 2.5)])
def test_wall_clocks_of_a_loaded_machine_have_no_verdict(capsys, monkeypatch, clock, ratio):
    measurement = Measurement("a step", "s", clock, ARMS)
    found = shown(capsys, monkeypatch, 1000.0, measurement)
    assert found["measurements"][0]["arms"][1]["of_first"] == ratio and found["load"]["other_work"]
    told = shown(capsys, monkeypatch, 1000.0, measurement, as_json=False)
    assert ("other work ran on this machine" in told) == (clock is not Clock.NONE)
    assert ("not to be trusted" in told) == (clock is Clock.WALL) and ("2.500" in told) == (ratio is not None)


def test_what_the_measurement_itself_adds_to_the_load_is_not_other_work():
    load = Load(cores=2, processes=2, before=0.1, after=2.0, seconds=300.0)
    assert not load.others
    assert dataclasses.replace(load, after=3.0).others
    assert dataclasses.replace(load, seconds=1.0).others, "in a second it adds next to nothing"
    assert dataclasses.replace(load, before=2.0).others


def test_a_plot_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(InputError, match=r"plot=a\.pdf must end in \.png or \.svg"):
        Output(plot=tmp_path.__class__("a.pdf")).check()
    with pytest.raises(InputError, match="there is no such folder"):
        Output(plot=tmp_path / "none" / "a.png").check()


def test_a_plot_shows_every_measurement(capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.svg"
    shown(capsys, monkeypatch, 0.0, Measurement("a step", "s", Clock.WALL, ARMS), plot=path)
    assert path.read_text().count("<svg") == 1


def test_a_measurement_that_fails_shows_nothing(capsys):
    with contextlib.suppress(ZeroDivisionError), reporting("shard", {}, Output()):
        raise ZeroDivisionError
    assert capsys.readouterr().out == "" and report.Output() == Output()


@pytest.mark.parametrize(
    "flags, words",
    [
        (("dispatch", "--workers", 0), "workers=0 must be at least 1"),
        (("dispatch", "--rounds", 0), "rounds=0 must be at least 1"),
        (("shard", "--workers", 1), "workers=1 must be at least 2"),
        (("shard", "--model", "LTX-9"), "model=LTX-9 must be one of LTX-Video"),
        (("shard", "--comfyui", "nowhere"), "comfyui=nowhere: there is no ComfyUI"),
        (("overlap", "--links", "0.1,0"), 'links="0.1,0" must be numbers above 0'),
        (("dequant", "--types", "Q9_9"), "types=Q9_9 must be of"),
        (("dequant", "--comfyui-gguf", "nowhere"), "comfyui-gguf=nowhere: there is no ComfyUI-GGUF"),
        (("load", "--type", "Q8_0"), "type=Q8_0 is for ComfyUI's model"),
        (("memory", "--comfyui", "nowhere"), "comfyui=nowhere: there is no ComfyUI"),
        (("decode", "--comfyui", "nowhere", "--kind", "pixels"), 'kind="pixels" must be one of convolutions'),
        (("lora", "--comfyui", "nowhere", "--model-width", 100), "model-width=100 must be a multiple of 128"),
        (("compare", "--ranks", "1,2"), "ranks=1 must be at least 2"),
        (("start", "--workers", 0), "workers=0 must be at least 1"),
        (("overlap", "--width", 100), "width=100 must be a positive multiple of 32"),
    ],
)
def test_what_cannot_be_measured_is_told(flags, words):
    done = rayltx_here("bench", *flags)
    assert done.returncode == 2 and words in done.stderr, done.stderr
