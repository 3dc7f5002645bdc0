"""What the initializer nodes ask for, made into a request for workers."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import math
import re
from dataclasses import dataclass
from typing import Any

from rayltx.comfy_dist.comfy_environment import ComfyEnvironment, user_folder
from rayltx.comfy_dist.comfy_host import COMFY_HOST
from rayltx.comfy_dist.main_process.attention_names import attention_arguments
from rayltx.comfy_dist.main_process.placement import Placement
from rayltx.comfy_dist.main_process.told_plan import tell_plan_ahead
from rayltx.devices import CPU, KINDS, kind_of
from rayltx.distributed_worker.cluster import Cluster
from rayltx.distributed_worker.driver.protocol import LOCAL
from rayltx.distributed_worker.gpu_pinning import parse_gpu_indices, parse_shares
from rayltx.distributed_worker.machine_checks import check_machine
from rayltx.distributed_worker.machine_facts import log_line
from rayltx.distributed_worker.request import ClusterRequest
from rayltx.errors import DeviceError, InputError, ParallelConfigError, UnsupportedError
from rayltx.sequence_parallel.partition import DEGREES, ParallelConfig

logger = logging.getLogger(__name__)

AUTOMATIC = "auto"
_OLD_DIST_ADDRESS = "127.0.0.1:29500"  # a fixed port: two instances on a machine collide on it
_HOST_PORT = re.compile(r"[\w.\-]+:\d{1,5}")


@dataclass(frozen=True)
class InitializerSettings:
    """The widgets of RayInitializer and RayInitializerAdvanced, by their names there."""

    ray_cluster_address: str = LOCAL
    ray_cluster_namespace: str = "default"
    GPU: int = 2
    ulysses_degree: int = 0
    ring_degree: int = 1
    cfg_degree: int = 1
    dp_degree: int = 1
    sync_ulysses: bool = False
    clear_vram_after_sampling: bool = False
    FSDP: bool = False
    FSDP_CPU_OFFLOAD: bool = False
    XFuser_attention: str = "TORCH_FLASH"
    skip_comm_test: bool = False
    use_mmap: bool = False
    ray_object_store_gb: float = 0.0
    gpu_indices: str = ""
    GPU_SELECT: str = ""
    ray_dashboard_address: str = "None"
    torch_dist_address: str = "auto"
    step_timeout_s: float = ClusterRequest.step_timeout_s
    call_timeout_s: float = ClusterRequest.call_timeout_s
    block_timeout_s: float = ClusterRequest.block_timeout_s
    gpu_shares: str = ""
    device: str = AUTOMATIC  # what ComfyUI itself runs on
    expected_order: str = ""  # of the node's widgets, for the message when they look shifted
    gpu_input: str = "GPU"  # what the node calls its input GPU, for messages

    def placement(self) -> Placement:
        """Raises UserError by the widget's name, before anything is started."""
        self._refuse_what_is_not_here()
        device = self._device()
        indices = parse_gpu_indices(self._indices())
        workers = self.GPU or len(indices) or self._default_workers(device)
        if indices and self.GPU and len(indices) != self.GPU:
            raise DeviceError(
                f"{self.gpu_input}={self.GPU}, but gpu_indices names {len(indices)}: make them agree, or set "
                f"{self.gpu_input} to 0"
            )
        if device != CPU and self.ray_cluster_address == LOCAL:
            self._check_gpus(device, workers)
        try:
            config = ParallelConfig.for_workers(workers, *self._degrees())
            config = dataclasses.replace(config, shares=parse_shares("gpu_shares", self.gpu_shares, workers))
        except ParallelConfigError as error:
            named = ", ".join(f"{name}={degree}" for name, degree in zip(DEGREES, self._degrees()))
            raise ParallelConfigError(f"{self.gpu_input}={self.GPU}, {named}: {error}") from error
        if self.ray_object_store_gb < 0:
            raise DeviceError(f"ray_object_store_gb={self.ray_object_store_gb} must not be negative; 0 is automatic")
        environment = ComfyEnvironment.of_this_process()
        arguments = {**environment.arguments, **attention_arguments(self.XFuser_attention)}
        environment = dataclasses.replace(environment, arguments=arguments)
        request = ClusterRequest(
            workers=workers,
            device=device,
            address=self.ray_cluster_address,
            namespace=self.ray_cluster_namespace,
            gpu_indices=indices,
            object_store_bytes=int(self.ray_object_store_gb * 2**30),
            host=COMFY_HOST,
            bootstrap=environment.bootstrap(),
            map_files=self.use_mmap,
            dashboard=self._dashboard(),
            group_address=self._group_address(),
            step_timeout_s=self.step_timeout_s,
            call_timeout_s=self.call_timeout_s,
            block_timeout_s=self.block_timeout_s,
            machine_record=str(user_folder() / "machine.json"),
        )
        check_machine(request)
        is_open = self.ulysses_degree == 0 and not config.shares
        return Placement(request, config, self.clear_vram_after_sampling, chooses_ranks=is_open)

    def _degrees(self) -> tuple[int, int, int, int]:
        """In the order of `ParallelConfig`. cfg_degree was a switch once."""
        cfg_degree = 1 + self.cfg_degree if isinstance(self.cfg_degree, bool) else self.cfg_degree
        return self.ulysses_degree, self.ring_degree, cfg_degree, self.dp_degree

    def _refuse_what_is_not_here(self) -> None:
        for name in ("FSDP", "FSDP_CPU_OFFLOAD"):
            if getattr(self, name):
                order = f" If the values of this node look shifted, the order is: {self.expected_order}."
                raise UnsupportedError(
                    f"{name} is on, and is not implemented: the weights lie in host memory once, and a card that they do not "
                    f"fit streams them from there; set {name} to false.{order if self.expected_order else ''}"
                )

    def _indices(self) -> str:
        """GPU_SELECT and gpu_indices are two names of one thing."""
        if self.GPU_SELECT.strip() and self.gpu_indices.strip() and self.gpu_indices != self.GPU_SELECT:
            raise DeviceError(
                f'GPU_SELECT="{self.GPU_SELECT}" and gpu_indices="{self.gpu_indices}" disagree; leave one empty'
            )
        return self.gpu_indices if self.gpu_indices.strip() else self.GPU_SELECT

    def _device(self) -> str:
        if self.device != AUTOMATIC:
            return self.device
        import comfy.model_management

        device = comfy.model_management.get_torch_device().type
        if device not in KINDS:
            raise DeviceError(
                f'ComfyUI runs on the device "{device}", which workers cannot run on; set the input "device" to cpu, or use '
                "ComfyUI's own loader"
            )
        return device

    def _default_workers(self, device: str) -> int:
        if device != CPU:
            return max(1, kind_of(device).count())
        return math.prod(max(1, degree) for degree in self._degrees())

    def _check_gpus(self, device: str, workers: int) -> None:
        visible = kind_of(device).count()
        if visible == 0:
            raise DeviceError(
                f"{self.gpu_input}={self.GPU}: ComfyUI sees no {device.upper()} device here. Check the driver, torch and "
                f'{kind_of(device).visible_variable}, or set the input "device" to cpu'
            )
        if workers > visible:
            raise DeviceError(
                f"{self.gpu_input}={workers}, but {visible} are visible to ComfyUI; set {self.gpu_input} to {visible} or "
                "fewer, or to 0"
            )

    def _dashboard(self) -> str:
        address = self.ray_dashboard_address.strip()
        if address.lower() in ("", "none"):
            return ""
        try:
            importlib.import_module("ray.dashboard.optional_deps")  # by which Ray itself tells
        except ImportError as error:
            raise InputError(
                f'ray_dashboard_address="{address}" needs packages that are not there ({error}): pip install "ray[default]" in '
                "ComfyUI's Python, or set None"
            ) from error
        return _checked_address("ray_dashboard_address", address, "None")

    def _group_address(self) -> str:
        address = self.torch_dist_address.strip()
        if address in ("", "auto", _OLD_DIST_ADDRESS):
            return ""
        return _checked_address("torch_dist_address", address, "auto")


def _checked_address(name: str, address: str, otherwise: str) -> str:
    if not _HOST_PORT.fullmatch(address):
        raise InputError(f'{name}="{address}" must be host:port, or {otherwise}')
    return address


def start_workers(**widgets: Any) -> Placement:
    """Start workers that serve these settings, or keep those that do. Returns at once, while they come up."""
    placement = InitializerSettings(**widgets).placement()
    before = Cluster.current()
    if Cluster.start(placement.request) is not before:
        logger.info("%s", log_line(placement.request))
        tell_plan_ahead(placement)
    return placement


def stop_workers() -> None:
    """End the workers, and Ray if it was started here. A MODEL that is used later starts them again."""
    cluster = Cluster.current()
    if cluster is not None:
        cluster.shutdown()
