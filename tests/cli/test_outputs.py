"""What is written is what was made: pixels, sound, latents."""

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rayltx.cli.generated import Generated, Sound
from rayltx.cli.outputs import Outputs, write_output

RATE = 16000


def a_clip():
    """Smooth, as a codec likes it."""
    rows, columns, frames = torch.linspace(0, 1, 64), torch.linspace(0, 1, 96), torch.linspace(0, 1, 17)
    frames, rows, columns = torch.meshgrid(frames, rows, columns, indexing="ij")
    return torch.stack([rows, columns, frames], dim=-1)


def a_tone(channels, seconds=0.7, hertz=440.0):
    time = torch.arange(int(RATE * seconds)) / RATE
    return 0.5 * torch.sin(2 * torch.pi * hertz * time).expand(channels, -1)


@pytest.mark.parametrize("channels", [0, 1, 2])
def test_a_video_has_its_frames_and_its_sound(tmp_path, channels):
    sound = Sound(a_tone(channels), RATE) if channels else None
    made = Generated({"video": torch.zeros(1, 128, 3, 2, 3)}, torch.ones(2), a_clip(), sound)
    write_output(tmp_path / "clip.mp4", made, 24.0, {})
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert len(container.streams.audio) == bool(channels)
        assert container.streams.video[0].average_rate == 24
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert np.abs(frames / 255.0 - a_clip().numpy()).mean() < 0.03
    if not channels:
        return
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.audio[0]
        assert stream.rate == 48000
        waveform = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    assert waveform.shape[0] == channels
    spectrum = np.abs(np.fft.rfft(waveform[0]))
    assert spectrum.argmax() * 48000 / waveform.shape[1] == pytest.approx(440.0, abs=5.0)
    assert np.abs(waveform).max() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("waveform, rate", [(a_tone(3), RATE), (a_tone(2).half(), 44056), (a_tone(1), 192000)])
def test_sound_that_an_mp4_does_not_take_is_made_so(tmp_path, waveform, rate):
    made = Generated({"video": torch.zeros(1, 128, 3, 2, 3)}, torch.ones(2), a_clip(), Sound(waveform, rate))
    write_output(tmp_path / "clip.mp4", made, 24.0, {})
    with av.open(str(tmp_path / "clip.mp4")) as container:
        samples = sum(frame.samples for frame in container.decode(audio=0))
    assert samples / 48000 == pytest.approx(waveform.shape[1] / rate, abs=0.06)


def test_sound_of_no_length_is_none(tmp_path):
    made = Generated({"video": torch.zeros(1, 128, 3, 2, 3)}, torch.ones(2), a_clip(), Sound(torch.zeros(2, 0), RATE))
    write_output(tmp_path / "clip.mp4", made, 24.0, {})
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert not container.streams.audio


@pytest.mark.parametrize("frame_rate", [23.976, 60.0, 0.01])
def test_an_odd_frame_rate_is_kept(tmp_path, frame_rate):
    made = Generated({"video": torch.zeros(1, 128, 3, 2, 3)}, torch.ones(2), a_clip())
    write_output(tmp_path / "clip.mp4", made, frame_rate, {})
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(frame_rate, rel=1e-4)


def test_what_goes_wrong_while_decoding_leaves_the_latent(tmp_path, caplog):
    made = Generated({"video": torch.ones(1, 128, 3, 2, 3)}, torch.ones(2))
    outputs = Outputs([tmp_path / "clip.mp4"], 24.0, {})
    with pytest.raises(RuntimeError, match="no memory"), outputs.saving_latents(made):
        raise RuntimeError("no memory")
    assert torch.equal(load_file(tmp_path / "clip.safetensors")["video"], made.latents["video"])
    assert "what was sampled is in" in caplog.text


def test_latents_are_written_as_they_are(tmp_path):
    latents = {"video": torch.randn(1, 128, 3, 2, 3), "audio": torch.randn(1, 8, 5, 16)}
    write_output(tmp_path / "latent.safetensors", Generated(latents, torch.ones(2)), 24.0, {"seed": "3"})
    found = load_file(tmp_path / "latent.safetensors")
    assert found.keys() == latents.keys()
    assert all(torch.equal(found[name], latents[name]) for name in latents)
