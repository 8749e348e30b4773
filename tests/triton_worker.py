"""mamba_ssm's Triton kernels, called by `modeling_omni.ssd` as on a GPU, in Triton's interpreter against plain PyTorch.

    TRITON_INTERPRET=1 python tests/triton_worker.py

Needs mamba_ssm's Python files only, which come without a GPU or a compiler by
    MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-deps --no-build-isolation mamba-ssm
Its `__init__` imports compiled code, so the packages are entered without it.
"""

import contextlib
import importlib.util
import sys
import types

import torch
from triton.runtime.autotuner import Autotuner

import modeling_omni.ssd as ssd


def enter_packages(*names: str) -> None:
    place = importlib.util.find_spec("mamba_ssm").submodule_search_locations[0]
    for name in names:
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__ = ["/".join([place, *name.split(".")[1:]])]


def one_configuration_each() -> None:
    """Autotuners would time their configurations on a GPU."""
    for module in [m for name, m in sys.modules.items() if name.startswith("mamba_ssm.")]:
        for kernel in vars(module).values():
            while kernel is not None and not isinstance(kernel, type):
                if isinstance(kernel, Autotuner):
                    kernel.configs = kernel.configs[:1]
                kernel = getattr(kernel, "fn", None)


def differences(found, expected) -> float:
    pairs = zip(found, expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def main() -> None:
    enter_packages("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.utils")
    torch.cuda.device = lambda *_: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=1)
    import mamba_ssm.ops.triton.selective_state_update  # noqa: F401
    import mamba_ssm.ops.triton.ssd_combined  # noqa: F401

    one_configuration_each()
    plain = ssd.cuda_kernels
    torch.manual_seed(0)
    batch, length, heads, size, groups, states = 1, 150, 4, 16, 2, 16
    shapes = (batch, length, heads, size), (batch, length, heads), (heads,)
    x, dt, A = (torch.randn(shape) for shape in shapes)
    B, C = (torch.randn(batch, length, groups, states) for _ in range(2))
    dt, A, D, state = dt.abs() * 0.2, -A.abs() - 0.1, torch.randn(heads), torch.randn(batch, heads, size, states)
    documents = (torch.arange(length) // 60)[None]
    for seq_idx in (None, documents):
        results = []
        for chosen in (plain, lambda kernels, x, package=None: package == "mamba_ssm"):
            ssd.cuda_kernels = chosen
            inputs = [t.clone().requires_grad_() for t in (x, dt, A, B, C, state)]
            own_D = D.clone().requires_grad_()
            y, last = ssd.ssd_scan(*inputs, seq_idx, own_D)
            (y.sin().sum() + last.cos().sum()).backward()
            results.append([y.detach(), last.detach(), *(t.grad for t in (*inputs, own_D))])
        print("scan", differences(results[1][:2], results[0][:2]), differences(results[1][2:], results[0][2:]))
    steps = []
    for chosen in (plain, lambda kernels, x, package=None: package == "mamba_ssm"):
        ssd.cuda_kernels = chosen
        own = state.clone()
        y = ssd.ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], own, D)
        steps.append([y, own])
    print("step", differences(steps[1], steps[0]), 0.0)


if __name__ == "__main__":
    main()
