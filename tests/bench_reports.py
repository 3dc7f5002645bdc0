"""What `rayltx bench` says as JSON, and what holds of every report."""

import json
import statistics

import pytest
from rayltx_command import rayltx


def reported(name, *flags):
    """The report: its arms' samples by measurement, and what was found."""
    done = rayltx("bench", name, "--json", *flags)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["bench"] == name and report["machine"]["cores"] >= 1
    assert {"Python", "torch", "RayLTX"} <= report["machine"]["versions"].keys()
    load = report["load"]
    assert load["before"] >= 0 and load["after"] >= 0
    for each in report["measurements"]:
        first = each["arms"][0]
        for arm in each["arms"]:
            assert arm["median"] == statistics.median(arm["samples"])
            if arm["of_first"] is None:
                continue
            assert each["clock"] != "wall" or not load["other_work"], "no verdict from wall clocks on a loaded machine"
            assert arm["of_first"] == pytest.approx(arm["median"] / first["median"])
    samples = {each["what"]: {arm["name"]: arm["samples"] for arm in each["arms"]} for each in report["measurements"]}
    return samples, report["found"]
