"""The options that several subcommands have."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(str, Enum):
    file = "file"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Workers = Annotated[int, typer.Option(help="How many workers; 0: one for each GPU, or 1 without a GPU.")]
UlyssesOption = Annotated[
    int, typer.Option("--ulysses", help="Ulysses degree: ranks that trade tokens for heads. 0: what is left.")
]
RingOption = Annotated[
    int, typer.Option("--ring", help="Ring degree: groups that pass keys and values around. 0: what is left.")
]
CfgDegreeOption = Annotated[
    int,
    typer.Option(
        "--cfg-degree", help="Groups of ranks for positive and negative conditioning. 0: 2 where the workers are even."
    ),
]
SharesOption = Annotated[
    str, typer.Option(help='How much each worker gets: "3, 2", or "even". Empty: by the speed of unlike devices.')
]
DeviceOption = Annotated[Device, typer.Option(help="auto: CUDA where there is a GPU.")]
GpusOption = Annotated[str, typer.Option("--gpus", help='GPU numbers such as "0,2"; empty: the first ones.')]
AddressOption = Annotated[str, typer.Option(help="local: start Ray here; or the address of a Ray cluster.")]
ComfyUIOption = Annotated[
    Optional[Path],  # noqa: UP045  (evaluated on Python 3.10)
    typer.Option(help="The folder of a ComfyUI: run its own model instead of diffusers'."),
]
StoreOption = Annotated[float, typer.Option("--object-store-gb", help="Size of Ray's object store; 0: automatic.")]
