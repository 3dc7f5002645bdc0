"""The nodes: schema, and a few lines of glue each. What they do is in `comfy_dist`.

Importing this needs neither Ray nor the workers' packages, so that the nodes appear, and say what is missing.
"""

from __future__ import annotations

from rayltx.nodes.guiders import RayBasicGuider, RayCFGGuider, RayDualCFGGuider
from rayltx.nodes.initializers import RayInitializer, RayInitializerAdvanced, RayKill, StopRayWorkers
from rayltx.nodes.loaders import RayCheckpointLoader, RayGGUFLoader, RayLoraLoader, RayUNETLoader
from rayltx.nodes.model_patches import (
    LTXChunkedFeedForward,
    RayModelSamplingLTXV,
    TensorParallelAttentionV2,
    TensorParallelV3Node,
    TensorParallelV5Node,
)
from rayltx.nodes.samplers import (
    XFuserKSampler,
    XFuserKSamplerAdvanced,
    XFuserSamplerCustom,
    XFuserSamplerCustomAdvanced,
)
from rayltx.nodes.simple import RayLTX
from rayltx.nodes.vae import RayLatentUpscaleModelLoader, RayVAEDecodeDistributed, RayVAELoader

# In the order in which they are listed: what one begins with comes first, and what ends everything last.
_NODES = {
    RayLTX: "LTX on several GPUs",
    RayInitializer: "Ray Init Actor",
    RayInitializerAdvanced: "Ray Init Actor (Advanced)",
    RayUNETLoader: "Load Diffusion Model (Ray)",
    RayCheckpointLoader: "Load Checkpoint (Ray)",
    RayGGUFLoader: "Load Diffusion GGUF Model (Ray)",
    RayLoraLoader: "Load Lora Model (Ray)",
    RayVAELoader: "Load VAE (Ray)",
    RayLatentUpscaleModelLoader: "Load Latent Upscale Model (Ray)",
    RayVAEDecodeDistributed: "Distributed VAE (Ray)",
    XFuserKSampler: "XFuser KSampler",
    XFuserKSamplerAdvanced: "XFuser KSampler (Advanced)",
    XFuserSamplerCustom: "XFuser SamplerCustom",
    XFuserSamplerCustomAdvanced: "XFuser SamplerCustom Advanced",
    RayBasicGuider: "Basic Guider (Ray)",
    RayCFGGuider: "CFG Guider (Ray)",
    RayDualCFGGuider: "Dual CFG Guider (Ray)",
    RayModelSamplingLTXV: "ModelSamplingLTXV (Ray)",
    LTXChunkedFeedForward: "LTX Chunked Feed-Forward",
    TensorParallelV3Node: "Tensor Parallel V3 (Safe FFN Chunking)",
    TensorParallelAttentionV2: "Tensor Parallel V2 + Chunked FFN",
    TensorParallelV5Node: "Tensor Parallel V5 (Sequence Parallel + Ring Attention)",
    RayKill: "Kill Ray",
    StopRayWorkers: "Stop Workers",
}
NODE_CLASS_MAPPINGS = {node.__name__: node for node in _NODES}
NODE_DISPLAY_NAME_MAPPINGS = {node.__name__: name for node, name in _NODES.items()}
