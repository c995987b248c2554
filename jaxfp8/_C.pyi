from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, TypedDict

class BuildInfo(TypedDict):
    version: str
    nvcc: str  # empty: no kernels
    ffi: tuple[int, int]
    images: list[str]

def build_info() -> BuildInfo: ...
def set_image_directory(path: str | bytes | PathLike[str], *, built: bool = True) -> None: ...
def handlers(
    platform: str,  # "CUDA" or "cpu"
    stage: str = "execute",  # or, on CUDA, "initialize"
) -> dict[str, Any]: ...  # target -> capsule

class LaunchPlan:
    """The launch of one custom call; addresses are written as `<array>+<bytes>`."""

    @property
    def image(self) -> str: ...
    @property
    def kernel(self) -> str: ...
    @property
    def grid(self) -> tuple[int, int, int]: ...
    @property
    def block(self) -> tuple[int, int, int]: ...
    @property
    def cluster(self) -> tuple[int, int, int]: ...
    @property
    def dynamic_smem(self) -> int: ...
    @property
    def config(self) -> int: ...  # index into configs(); -1: the kernel has none
    @property
    def args(self) -> list[dict[str, Any] | str | int | float]: ...

def plan(
    target: str,
    operands: Sequence[tuple[str, Sequence[int]]],  # element type as XLA writes it, shape
    results: Sequence[tuple[str, Sequence[int]]],
    *,
    pow2: bool = False,
    config: int = -1,
    num_sms: int = 0,
    device_sms: int = 132,
    offsets: Mapping[str, int] = {},  # array name -> bytes by which its address is displaced
    activation: int = 0,
) -> LaunchPlan: ...
def configs(target: str) -> list[str]: ...
def _install_driver(entry_points: Mapping[str, int], hook: int = 0) -> None: ...
def _launch(plan: LaunchPlan, stream: int) -> None: ...
def _uninstall_driver() -> None: ...
