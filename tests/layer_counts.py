"""What `rayltx bench counts` may find: a change that makes a layer dearer fails, on any machine."""

import json

import pytest
from rayltx_command import rayltx


def counted(*flags):
    done = rayltx("bench", "counts", "--json", *flags)
    assert done.returncode == 0, done.stderr
    return {each["config"]["ulysses_degree"]: each for each in json.loads(done.stdout)["layers"]}


def check(layers, at_most):
    """at_most: of the model's own peak, by ranks; what no chunks and other orders would not keep to."""
    alone = layers[1]
    assert alone["flops"] == pytest.approx(11092.7e9, rel=1e-3), "LTX-2 at 121 frames of 1280x704"
    for ranks, layer in layers.items():
        assert ranks * layer["flops"] <= 1.015 * alone["flops"], "audio alone is done by every rank"
        assert layer["of_minimum"] <= 1.05, ranks
        groups = layer["collectives"] - (0 if ranks == 1 else 1 if ranks == 2 else 2)  # video-to-audio attention's
        assert groups % 4 == 0 and groups <= 16, "query, key, value and output, in four groups of heads at most"
        assert layer["peak_bytes"] <= min(1 / ranks + 0.05, at_most.get(ranks, 1)) * layer["plain_peak_bytes"], ranks
        assert sum(layer["held_at_peak"].values()) == layer["peak_bytes"]
