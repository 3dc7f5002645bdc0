"""What other packs' nodes make of a Ray MODEL: what they make of ComfyUI's own, or an error that says why not.

RAYLTX_WRITE_TABLES=FILE writes the table.
"""

from __future__ import annotations

import pytest
import torch
from comfy_models import CONFIGS, save_tiny_bundle
from comfy_scenarios import make_lora
from other_packs import LEFT_OUT, OF_OTHER_MODELS, Trial, load_packs, packs_folder, touches_models
from safetensors.torch import save_file

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]
VERSIONS = ["LTX-Video", "LTX-2", "LTX-2.3"]


def test_nodes_of_other_packs_give_the_same_or_are_refused(models, tmp_path, table):
    if not packs_folder().is_dir():
        pytest.skip(f"no packs in {packs_folder()}: set RAYLTX_PACKS_PATH to a folder with checkouts of them")
    import comfy.sd
    import folder_paths

    import nodes

    save_file(make_lora(CONFIGS["LTX-Video"]), tmp_path / "lora.safetensors")
    folder_paths.add_model_folder_path("loras", str(tmp_path))
    packs = load_packs()
    save_tiny_bundle(tmp_path / "bundle.safetensors", "LTX-Video")
    with torch.inference_mode():
        vae = comfy.sd.load_checkpoint_guess_config(str(tmp_path / "bundle.safetensors"), output_model=False)[2]
    rows = []
    for version in VERSIONS:
        trial = Trial(version, CONFIGS[version], *models(version)[:2], vae)
        for pack, names in packs.items():
            for name in names:
                node = nodes.NODE_CLASS_MAPPINGS[name]
                if touches_models(node) and name not in LEFT_OUT and not any(word in name for word in OF_OTHER_MODELS):
                    rows.append(trial.try_node(pack, name))
                    print(rows[-1], flush=True)
    table += map(str, rows)
    assert rows, f"none of the packs in {packs_folder()} can be imported"
    assert not [str(row) for row in rows if row.is_wrong]
    assert sum(row.verdict == "equal" for row in rows) > len(rows) / 4
