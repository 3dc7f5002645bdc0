import sys
import types

import pytest

from rank_pool import RankPool


@pytest.fixture(scope="session")
def ranks():
    """Four gloo ranks: `ranks.run(world_size, function, *args)`."""
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture
def lists_of_names(monkeypatch):
    """What the schema of loaders and samplers takes from ComfyUI."""
    folder_paths = types.ModuleType("folder_paths")
    folder_paths.get_filename_list = lambda folder: []
    folder_paths.folder_names_and_paths = {"diffusion_models": ([], set())}
    samplers = types.ModuleType("comfy.samplers")
    samplers.KSampler = types.SimpleNamespace(SAMPLERS=["euler"], SCHEDULERS=["simple"])
    comfy = types.ModuleType("comfy")
    comfy.samplers = samplers
    for module in (folder_paths, comfy, samplers):
        monkeypatch.setitem(sys.modules, module.__name__, module)
