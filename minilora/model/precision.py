"""The dtypes of a model: of its arithmetic, and of its frozen weights in memory.

As a rule they are one. On a CPU that has no instructions for bfloat16, 16-bit arithmetic is up to a
hundred times slower than fp32: there the weights of a 16-bit checkpoint stay in 16 bits in memory,
and each is cast to fp32 for its product (see frozen_linear.py).
"""

import platform
from dataclasses import dataclass

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """The dtypes of a model."""

    compute: torch.dtype
    """Of the arithmetic, of all activations, and of frozen vectors (norms, biases)."""
    weights: torch.dtype
    """Of frozen matrices in memory, and of all weights of a full run in files."""

    @property
    def before_quantization(self) -> torch.dtype:
        """What 16-bit weights are rounded to before they are quantized.

        A float16 checkpoint is rounded to bfloat16 where that is the dtype of the arithmetic. It is
        rounded to it here too, so that the quantized bytes are those of other machines.
        """
        if self.compute != self.weights:
            return torch.bfloat16
        return self.weights


def choose_precision(wanted: str, hf_config: dict, device: torch.device) -> Precision:
    """Choose the dtypes of a model.

    Args:
        wanted: a dtype's name, for both, or "auto". Auto is float32 for a checkpoint in float32.
            For one in 16 bits it is bfloat16, which unlike float16 does not overflow in training.
            Where bfloat16 is slow, it is float16 on a GPU; on a CPU the arithmetic is float32, and
            the weights keep the checkpoint's dtype.
        hf_config: the checkpoint's config.json.
        device: where the model will run.
    """
    if wanted != "auto":
        return Precision(DTYPES[wanted], DTYPES[wanted])
    saved = saved_dtype(hf_config)
    if saved == "float32":
        return Precision(torch.float32, torch.float32)
    if has_fast_bfloat16(device):
        return Precision(torch.bfloat16, torch.bfloat16)
    if device.type == "cuda":
        return Precision(torch.float16, torch.float16)
    return Precision(torch.float32, DTYPES.get(saved, torch.bfloat16))


def saved_dtype(hf_config: dict) -> str:
    """Return the name of the dtype of a checkpoint, as its config.json has it."""
    saved = hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32"
    return str(saved).removeprefix("torch.")


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as config.json and the settings have it: without "torch."."""
    return str(dtype).removeprefix("torch.")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies matrices in bfloat16 at least as fast as in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not (_has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "DEFAULT"):  # torch's own kernels
        return False
    if platform.machine() in ("x86_64", "AMD64"):
        # oneDNN says yes to AVX-512 alone, where it emulates bfloat16 at half the speed of float32
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return True


def has_fast_float16(device: torch.device) -> bool:
    """Return whether the device multiplies matrices in float16 at least as fast as in float32."""
    if device.type == "cuda":
        return True
    return bool(_has_onednn() and torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _has_onednn() -> bool:
    """Return whether torch has the library that multiplies 16-bit matrices on a CPU."""
    return torch.backends.mkldnn.is_available()


def precision_note(
    compute: torch.dtype, weights: torch.dtype, device: torch.device, trains_all: bool = False
) -> str | None:
    """Return what a user should know about a model's dtypes on this CPU, if there is anything.

    Args:
        compute: of the arithmetic.
        weights: of the frozen weights in memory, and of a full run's weights in files.
        device: where the model runs.
        trains_all: whether it is a full run, which has no frozen weights.
    """
    if device.type != "cpu":
        return None
    name, weights_name = dtype_name(compute), dtype_name(weights)
    if compute != weights and trains_all:
        return (
            f"this CPU has no fast 16-bit arithmetic: the arithmetic is {name}, and checkpoints "
            f"are saved in {weights_name}"
        )
    if compute != weights:
        return (
            f"this CPU has no fast 16-bit arithmetic: 16-bit weights stay {weights_name} in "
            f"memory, and are cast to {name} to compute"
        )
    is_slow_bfloat16 = compute == torch.bfloat16 and not has_fast_bfloat16(device)
    is_slow_float16 = compute == torch.float16 and not has_fast_float16(device)
    if is_slow_bfloat16 or is_slow_float16:
        return (
            f"warning: this CPU has no fast {name} arithmetic: training may take 100 times as long "
            "as with model.dtype auto (infer.py --dtype auto)"
        )
    return None
