"""The embedded host, loaded in the process that asks."""

from rayltx.diffusion_models.lightricks.checkpoint import open_checkpoint
from rayltx.diffusion_models.lightricks.diffusers_host import DiffusersHost
from rayltx.diffusion_models.lightricks.diffusers_model import DiffusersModel


def load_host(path):
    checkpoint = open_checkpoint(path)
    host = DiffusersHost(DiffusersModel.of_checkpoint(checkpoint))
    with checkpoint.open() as reader:
        for names in checkpoint.portions:
            host.assign({name: reader.read(name) for name in names})
    host.finish_loading()
    return host
