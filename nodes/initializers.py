"""Workers: asked for, and ended."""

from __future__ import annotations

from typing import Any

from rayltx.nodes.inputs import BEGINNING, CATEGORY, DEVICE, MAX_WORKERS, Definition, Schema, advanced
from rayltx.nodes.requirements_check import require_packages

# What one sets; the rest is for those who know what it is.
_SHOWN = ("GPU", "gpu_indices")


def _text(default: str, tooltip: str) -> Definition:
    return "STRING", {"default": default, "tooltip": tooltip}


def _count(default: int, tooltip: str) -> Definition:
    return "INT", {"default": default, "min": 0, "max": MAX_WORKERS, "tooltip": tooltip}


def _switch(tooltip: str) -> Definition:
    return "BOOLEAN", {"default": False, "tooltip": tooltip}


def _seconds(default: float, tooltip: str) -> Definition:
    return "FLOAT", {"default": default, "min": 1.0, "max": 86400.0, "step": 1.0, "tooltip": tooltip}


_ADDRESS = _text(
    "local",
    '"local" runs the workers on this machine. Otherwise the address of a Ray cluster.',
)
_NAMESPACE = _text(
    "default",
    "Ray's namespace for the workers.",
)
_GPU = _count(
    2,
    "How many GPUs work on one video, a worker on each. 0: all that ComfyUI sees.",
)
_GPU_INDICES = _text(
    "",
    'Which GPUs: numbers separated by commas, such as "1,2" to leave GPU 0 to the text encoder and the VAE. They '
    "count within CUDA_VISIBLE_DEVICES. Empty: the first ones.",
)
_GPU_SHARES = _text(
    "",
    'How much of a video each GPU works on: numbers separated by commas, such as "3, 2", or "even". Empty: by the '
    "measured speed where the GPUs are unlike, else even.",
)
_ULYSSES = _count(
    0,
    "Workers that trade tokens for attention heads. The product of all degrees is the number of GPUs. 0: what the "
    "others leave; a video that all of them make no faster then runs on fewer.",
)
_RING = _count(
    1,
    "Workers that pass keys and values around. Moves more bytes than Ulysses; leave it at 1, unless there are more "
    "GPUs than attention heads. 0: what the others leave.",
)
_CFG = _count(
    1,
    "Groups of GPUs for positive and negative conditioning: 2 moves the fewest bytes where cfg is not 1. All GPUs "
    "share what comes by itself. 0: 2 where the number of GPUs allows it.",
)
_DP = _count(
    1,
    "Groups of GPUs for the clips of a batch. All GPUs share a single clip, and clips with masks of their own. 0: as "
    "1.",
)
_SYNC = _switch("Kept for graphs made with Raylight. The exchange always waits for what it needs.")
_CLEAR = _switch("Free the GPUs after each sampling. The weights stay in host memory, and return in seconds.")
_FSDP = _switch("Must be off: the weights lie in host memory once, and stream from there where needed.")
_OFFLOAD = _switch("Must be off, as FSDP.")
_SKIP_TEST = _switch("Kept for graphs made with Raylight. The self-test runs once, and is remembered.")
_MMAP = _switch(
    "Let the workers map the file itself, in place of a copy in shared memory. Happens by itself where shared memory "
    "is too small."
)
_STORE: Definition = (
    "FLOAT",
    {
        "default": 0.0, "min": 0.0, "max": 4096.0, "step": 0.5,
        "tooltip": "Shared memory for the weights, in GiB. 0: chosen by what the machine has.",
    },
)  # fmt: skip
_DASHBOARD = _text(
    "None",
    "host:port for Ray's dashboard, or None.",
)
_DIST = _text(
    "auto",
    "host:port at which the workers meet. auto: a place of their own, so that nothing collides.",
)
_STEP_TIMEOUT = _seconds(
    1800.0,
    "Seconds after the last block that any worker has entered, after which a step is given up in any case.",
)
_CALL_TIMEOUT = _seconds(
    300.0,
    "Seconds that workers have to start, to read a part of a file, and for all else that is not a step. Also for the "
    "first blocks of a step of a new size. More for a slow disk.",
)
_BLOCK_TIMEOUT = _seconds(
    20.0,
    "Seconds within which a worker is never taken for stuck in a block. After them it is, if the block takes ten "
    "times what blocks usually take.",
)


def _attention() -> Definition:
    from rayltx.comfy_dist.main_process.attention_names import NAMES

    return list(NAMES), {
        "default": "TORCH_FLASH",
        "tooltip": "The attention kernel of the workers. The TORCH names let torch choose among its own; FLASH and SAGE need "
        "their packages, and fall back to torch's with a warning.",
    }


def _folded(schema: Schema) -> Schema:
    """With all but `_SHOWN` marked as advanced."""
    return {
        group: {name: kind if name in _SHOWN else advanced(kind) for name, kind in definitions.items()}
        for group, definitions in schema.items()
    }


class RayInitializer:
    """Starts the workers."""

    CATEGORY = CATEGORY
    SEARCH_ALIASES = BEGINNING
    RETURN_TYPES = ("RAY_ACTORS_INIT",)
    RETURN_NAMES = ("ray_actors_init",)
    OUTPUT_TOOLTIPS = ("The workers, for a Ray loader.",)
    FUNCTION = "spawn_actor"
    DESCRIPTION = (
        "Starts a worker on each GPU, or keeps those that run with the same settings. They come up in the background while "
        "the rest of the graph runs."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        # The order is that of Raylight's files, which store values by position. Required is what all of them have.
        return _folded(
            {
                "required": {
                    "ray_cluster_address": _ADDRESS,
                    "ray_cluster_namespace": _NAMESPACE,
                    "GPU": _GPU,
                    "ulysses_degree": _ULYSSES,
                    "ring_degree": _RING,
                    "cfg_degree": _CFG,
                },
                "optional": {
                    "dp_degree": _DP,
                    "sync_ulysses": _SYNC,
                    "clear_vram_after_sampling": _CLEAR,
                    "FSDP": _FSDP,
                    "FSDP_CPU_OFFLOAD": _OFFLOAD,
                    "XFuser_attention": _attention(),
                    "skip_comm_test": _SKIP_TEST,
                    "use_mmap": _MMAP,
                    "ray_object_store_gb": _STORE,
                    "gpu_indices": _GPU_INDICES,
                    "device": DEVICE,
                },
            }
        )

    @classmethod
    def _order(cls) -> str:
        schema = cls.INPUT_TYPES()
        return ", ".join([*schema["required"], *schema["optional"]])

    @classmethod
    def VALIDATE_INPUTS(cls, XFuser_attention: Any = "TORCH_FLASH", device: Any = "auto") -> bool | str:  # noqa: N802, N803
        """A value in another's place, from a file of another version, is told from a wrong one."""
        for name, value, allowed in (
            ("XFuser_attention", XFuser_attention, _attention()[0]),
            ("device", device, DEVICE[0]),
        ):
            if value not in allowed:
                return (
                    f"{name}={value!r} must be one of {', '.join(allowed)}. If the values of this node are shifted, as they "
                    f"are in files of another version, put them into this order: {cls._order()}"
                )
        return True

    def spawn_actor(self, **widgets: Any) -> tuple[Any]:
        require_packages()
        from rayltx.comfy_dist.main_process.initializer_settings import start_workers

        return (start_workers(**widgets, expected_order=self._order()),)


class RayInitializerAdvanced(RayInitializer):
    """The same with every setting."""

    DESCRIPTION = RayInitializer.DESCRIPTION + " With every setting."

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        return _folded(
            {
                "required": {
                    "ray_cluster_address": _ADDRESS,
                    "ray_cluster_namespace": _NAMESPACE,
                    "GPU": _GPU,
                },
                "optional": {
                    "GPU_SELECT": _GPU_INDICES,
                    "ulysses_degree": _ULYSSES,
                    "ring_degree": _RING,
                    "clear_vram_after_sampling": _CLEAR,
                    "cfg_degree": _CFG,
                    "dp_degree": _DP,
                    "sync_ulysses": _SYNC,
                    "FSDP": _FSDP,
                    "FSDP_CPU_OFFLOAD": _OFFLOAD,
                    "XFuser_attention": _attention(),
                    "skip_comm_test": _SKIP_TEST,
                    "use_mmap": _MMAP,
                    "ray_object_store_gb": _STORE,
                    "ray_dashboard_address": _DASHBOARD,
                    "torch_dist_address": _DIST,
                    "gpu_indices": _GPU_INDICES,
                    "device": DEVICE,
                    "step_timeout_s": _STEP_TIMEOUT,
                    "call_timeout_s": _CALL_TIMEOUT,
                    "block_timeout_s": _BLOCK_TIMEOUT,
                    "gpu_shares": _GPU_SHARES,
                },
            }
        )


class StopRayWorkers:
    """Ends the workers."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ()
    FUNCTION = "stop"
    OUTPUT_NODE = True
    DESCRIPTION = "Ends the workers and frees their memory. A Ray model that is used later starts them again."

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        after = {
            "tooltip": "What should have finished before, of any type: the images, which the workers may have decoded."
        }
        return {"required": {"after": ("*", after)}}

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:  # noqa: N802
        """Something other than itself: ComfyUI would not run it again after the same inputs, though workers may have started."""
        return float("nan")

    def stop(self, **inputs: Any) -> tuple[()]:
        from rayltx.comfy_dist.main_process.initializer_settings import stop_workers

        stop_workers()
        return ()


class RayKill(StopRayWorkers):
    """The same, of Raylight's graphs."""

    DEPRECATED = True
    DESCRIPTION = StopRayWorkers.DESCRIPTION + " For graphs made with Raylight; Stop Workers takes anything."

    @classmethod
    def INPUT_TYPES(cls) -> Schema:  # noqa: N802
        return {
            "required": {
                "ray_actors": (
                    "RAY_ACTORS",
                    {"tooltip": "The workers to end. Connect what should have finished before."},
                ),
                "kill_mode": (
                    ["Kill Workers Only", "Kill Entire Cluster"],
                    {"tooltip": "Kept for graphs made with Raylight. Ray itself ends too, where ComfyUI started it."},
                ),
            }
        }
