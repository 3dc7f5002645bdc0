"""ComfyUI's official graphs for LTX, on tiny checkpoints: what is put in the place of files that nobody has here.

The graphs are read from the packages that ComfyUI installs, and turned into prompts by its own frontend. Model files become tiny
ones of the same version, with VAEs of its classes; text encoders become random text, media random pictures and sounds.
Everything else stays as it is: samplers, sigmas, guiders, guides, LoRA nodes, upscaling between the stages, decoding.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from comfy_workflows import Workflow

FRAMES, HEIGHT, WIDTH = 17, 128, 192  # 4 by 6 latents, which IC-LoRAs halve
STEPS = 4
BUNDLE = "{version} bundle.safetensors"
LORA = "{version}.safetensors"
UPSCALER = "upscaler.safetensors"
SOUND_VAE = "sound.safetensors"
_DECODERS = {
    "VAEDecode": "TestSaveImage", "VAEDecodeTiled": "TestSaveImage", "LTXVAudioVAEDecode": "TestSaveSound",
}  # fmt: skip
_SAVING = ("TestSave", "TestSaveImage", "TestSaveSound")

# Of what names them: graphs that need models of others, or that run elsewhere.
NOT_HERE = {
    "template_image_speech_to_video": "needs cloud nodes for its speech",
    "video_ltx2_depth_to_video": "needs the depth model Lotus",
    "Depth to Video (ltx 2.0)": "needs the depth model Lotus",
}


@dataclass(frozen=True)
class OfficialGraph:
    name: str
    path: Path
    version: str


def official_graphs(comfyui: Path) -> list[OfficialGraph]:
    """All that are installed, but for those that run on Lightricks' servers (`api_`)."""
    folders = [comfyui / "blueprints"]
    package = importlib.util.find_spec("comfyui_workflow_templates_json")
    if package is not None and package.submodule_search_locations:
        folders.append(Path(next(iter(package.submodule_search_locations))) / "templates")
    found = []
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            text = path.read_text()
            if not path.stem.startswith(("api_", "index")) and "LTXVConditioning" in text and _samples_ltx(text):
                found.append(OfficialGraph(path.stem, path, _version_of(text)))
    return found


def _samples_ltx(text: str) -> bool:
    """Whether it has a node of LTX's, and not only the remains of another workflow."""
    workflow = json.loads(text)
    graphs = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
    return any(node["type"] == "LTXVConditioning" for graph in graphs for node in graph["nodes"])


def _version_of(text: str) -> str:
    for mark, version in (("ltx-2.5", "LTX-2.5"), ("ltx-2.3", "LTX-2.3"), ("ltx-2", "LTX-2")):
        if mark in text:
            return version
    return "LTX-Video"


class Prompt:
    """A prompt in API form, of which parts are exchanged."""

    def __init__(self, graph: dict, version: str) -> None:
        self.nodes = copy.deepcopy(graph)
        self.version = version
        self.text_width = Workflow(version).text_width
        self.masked = 3 if version == "LTX-Video" else -1

    def add(self, class_type: str, **inputs) -> str:
        key = f"tests {len(self.nodes)}"
        self.nodes[key] = {"class_type": class_type, "inputs": inputs}
        return key

    def of(self, *class_types: str) -> list[str]:
        return [key for key, node in self.nodes.items() if node["class_type"] in class_types]

    def replace(self, key: str, class_type: str, **inputs) -> None:
        self.nodes[key] = {"class_type": class_type, "inputs": inputs}

    def redirect(self, key: str, output: int, target) -> None:
        """Let everything that reads an output of a node read something else."""
        for node in self.nodes.values():
            for name, value in node["inputs"].items():
                if value == [key, output]:
                    node["inputs"][name] = target

    def set(self, class_type: str, **values) -> None:
        for key in self.of(class_type):
            inputs = self.nodes[key]["inputs"]
            inputs.update({name: value for name, value in values.items() if name in inputs})


def made_small(graph: dict, version: str, object_info: dict) -> Prompt:
    """The prompt on tiny files, random text and media, with few steps and a small latent, which saves what it samples."""
    prompt = Prompt(graph, version)
    bundle = BUNDLE.format(version=version)
    # ---- text and prompts
    for number, key in enumerate(prompt.of("CLIPTextEncode")):
        prompt.replace(key, "TestConditioning", seed=number + 1, width=prompt.text_width, masked=prompt.masked)
    for key in prompt.of("LoraLoader"):  # on the text encoder: the MODEL goes past it
        prompt.redirect(key, 0, prompt.nodes[key]["inputs"]["model"])
    # ---- files
    prompt.set("CheckpointLoaderSimple", ckpt_name=bundle)
    prompt.set("UNETLoader", unet_name=f"{version}.safetensors", weight_dtype="default")
    prompt.set("LoraLoaderModelOnly", lora_name=LORA.format(version=version))
    prompt.set("LatentUpscaleModelLoader", model_name=UPSCALER)
    prompt.set("LTXVAudioVAELoader", ckpt_name=SOUND_VAE)
    for key in prompt.of("VAELoader"):
        is_audio = "audio" in str(prompt.nodes[key]["inputs"]["vae_name"])
        if is_audio:
            prompt.nodes[key]["inputs"]["vae_name"] = SOUND_VAE
        else:
            prompt.redirect(key, 0, [prompt.add("CheckpointLoaderSimple", ckpt_name=bundle), 2])
    # ---- media
    image = prompt.add("TestImage", seed=4, width=WIDTH, height=HEIGHT, count=1)
    video = prompt.add("TestImage", seed=6, width=WIDTH, height=HEIGHT, count=FRAMES)
    sound = prompt.add("TestSound", seconds=1)
    for key in prompt.of("LoadImage"):
        prompt.redirect(key, 0, [image, 0])
    for key in prompt.of("GetVideoComponents"):
        for output, target in enumerate(([video, 0], [sound, 0])):
            prompt.redirect(key, output, target)
        prompt.redirect(key, 2, 25.0)
    for key in prompt.of("LoadAudio", "RecordAudio"):
        prompt.redirect(key, 0, [sound, 0])
    for key in prompt.of("MoGeRender"):  # pictures that another model makes
        prompt.redirect(key, 0, [video, 0])
    for node in prompt.nodes.values():  # blueprints leave their media open
        for name, kind in object_info.get(node["class_type"], {}).get("input", {}).get("required", {}).items():
            if name not in node["inputs"] and ("IMAGE" in str(kind[0]) or "MATCHTYPE" in str(kind[0])):
                node["inputs"][name] = [image, 0]
    # ---- sizes and steps
    for kind in ("EmptyLTXVLatentVideo", "LTXVImgToVideo"):
        prompt.set(kind, width=WIDTH, height=HEIGHT, length=FRAMES, batch_size=1)
    prompt.set("LTXVEmptyLatentAudio", frames_number=FRAMES, frame_rate=25.0, batch_size=1)
    prompt.set("ResizeImagesByLongerEdge", longer_edge=WIDTH)
    prompt.set("RepeatImageBatch", amount=1)
    for kind in ("LTXVScheduler", "KSampler", "BasicScheduler"):
        prompt.set(kind, steps=STEPS)
    # ---- what is compared
    for number, key in enumerate(prompt.of("SamplerCustomAdvanced", "SamplerCustom", "KSampler")):
        prompt.add("TestSave", latent=[key, 0], name=f"{{kind}} {number}")
    for number, key in enumerate(prompt.of(*_DECODERS)):
        saving = _DECODERS[prompt.nodes[key]["class_type"]]
        kind = "audio" if saving == "TestSaveSound" else "image"
        prompt.add(saving, **{kind: [key, 0]}, name=f"{{kind}} decoded {number}")
    return prompt


def saved(prompt: Prompt, kind: str) -> tuple[dict, list[str]]:
    """The nodes that lead to what is compared, and the names under which that is saved."""
    nodes = copy.deepcopy(prompt.nodes)
    names, reached = [], {}
    for key in prompt.of(*_SAVING):
        nodes[key]["inputs"]["name"] = nodes[key]["inputs"]["name"].format(kind=kind)
        names.append(nodes[key]["inputs"]["name"])
        todo = [key]
        while todo:
            found = todo.pop()
            if found in reached:
                continue
            reached[found] = nodes[found]
            links = (v for v in nodes[found]["inputs"].values() if isinstance(v, list) and len(v) == 2)
            todo += [link[0] for link in links if link[0] in nodes]
    return reached, names


def on_workers(prompt: Prompt, workers: int = 2) -> Prompt:
    """The same with our loaders in the place of ComfyUI's, and nothing else changed."""
    prompt = copy.deepcopy(prompt)
    init = prompt.add(
        "RayInitializer", ray_cluster_address="local", ray_cluster_namespace="default", GPU=workers,
        ulysses_degree=workers, ring_degree=1, cfg_degree=1, device="cpu",
    )  # fmt: skip
    for key in prompt.of("CheckpointLoaderSimple"):
        prompt.replace(
            key, "RayCheckpointLoader", ckpt_name=prompt.nodes[key]["inputs"]["ckpt_name"], ray_actors_init=[init, 0]
        )
    for key in prompt.of("UNETLoader"):
        inputs = prompt.nodes[key]["inputs"]
        prompt.replace(key, "RayUNETLoader", **inputs, ray_actors_init=[init, 0])
        prompt.redirect(key, 0, [key, 1])
    for key in prompt.of("VAELoader", "LTXVAudioVAELoader"):
        name = next(iter(prompt.nodes[key]["inputs"].values()))
        prompt.replace(key, "RayVAELoader", vae_name=name, ray_actors_init=[init, 0])
        prompt.redirect(key, 0, [key, 1])
    for key in prompt.of("LatentUpscaleModelLoader"):
        inputs = prompt.nodes[key]["inputs"]
        prompt.replace(key, "RayLatentUpscaleModelLoader", **inputs, ray_actors_init=[init, 0])
    return prompt
