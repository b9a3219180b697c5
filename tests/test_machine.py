"""The choice of device, dtype and graphs on machines with GPUs, which are stood in for: no GPU is needed."""

import contextlib
import os
import pathlib
import warnings

import pytest
import torch

from agents.dreamer import capture_parts
from envs import opengl
from tests.factories import SPACES, make_config, make_dreamer, make_obs, one_line_error, run_python
from training import machine, rng
from training.startup import machine as said

OLD = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6 22:20:39 UTC 2023\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.14  Release Build\n"


class Cards:
    """Stands in for the devices that torch.cuda tells of: their compute capabilities, and which is the current one."""

    def __init__(self, monkeypatch, *capabilities):
        self.capabilities, self.current = capabilities, 0
        functions = {
            "is_available": lambda: bool(capabilities),
            "device_count": lambda: len(capabilities),
            "current_device": lambda: self.current,
            "set_device": lambda device: setattr(self, "current", torch.device(device).index),
            "get_device_capability": lambda index: capabilities[index],
            "get_device_name": lambda index: f"card {index}",
            "get_arch_list": lambda: ["sm_75", "sm_90", "sm_120", "compute_120"],
            "is_bf16_supported": lambda including_emulation: including_emulation or capabilities[self.current] >= (8,),
            "device": self.device,
        }
        for name, function in functions.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch.version, "cuda", "13.0")

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, device.index
        yield
        self.current = before


def test_a_cuda_device_has_a_number_and_becomes_the_current_one(monkeypatch):
    cards = Cards(monkeypatch, (9, 0), (9, 0))
    assert machine.choose_device("cuda:1") == torch.device("cuda", 1) and cards.current == 1
    assert machine.choose_device("cuda") == torch.device("cuda", 1)  # the current one, as a launcher may have set it
    assert machine.choose_device("auto") == torch.device("cuda", 1)
    assert machine.choose_device("cuda:0") == torch.device("cuda", 0) and cards.current == 0
    assert machine.choose_device("cpu") == torch.device("cpu") and cards.current == 0
    assert one_line_error(machine.choose_device, "cuda:2") == "--device cuda:2: this machine has 2 CUDA devices"


def test_bf16_is_chosen_where_the_gpu_multiplies_it(monkeypatch):
    Cards(monkeypatch, (9, 0), (7, 5))
    dtypes = [machine.choose_dtype("auto", torch.device("cuda", index)) for index in range(2)]
    assert dtypes == [torch.bfloat16, torch.float32]
    assert machine.choose_dtype("bf16", torch.device("cuda", 1)) == torch.bfloat16


def test_a_gpu_that_this_pytorch_has_no_kernels_for_is_named_and_auto_takes_the_cpu(monkeypatch, tmp_path):
    Cards(monkeypatch, (6, 1))
    assert machine.choose_device("auto") == torch.device("cpu")
    line = one_line_error(machine.choose_device, "cuda")
    assert "card 0 has compute capability 6.1" in line and "needs 7.5" in line
    (tmp_path / "version").write_text(OPEN)
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "capability 6.1" in machine.unused_gpu()


@pytest.mark.parametrize("version, number", [(OLD, "535.54.03"), (OPEN, "550.54.14"), ("?", "the driver")])
def test_auto_does_not_fall_to_the_cpu_in_silence(version, number, monkeypatch, tmp_path, capsys):
    Cards(monkeypatch)  # none that PyTorch can use
    monkeypatch.setattr(machine, "prepare_cpu", lambda threads: None)
    monkeypatch.setattr(machine, "seed_everything", lambda seed: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
    config = make_config("--device", "auto")
    machine.prepare(config)
    assert capsys.readouterr().err == ""  # no driver, no GPU
    (tmp_path / "version").write_text(version)
    machine.prepare(config)
    (line,) = capsys.readouterr().err.splitlines()
    assert "the GPU is not used" in line and number in line and "CUDA 13.0" in line
    assert number in one_line_error(machine.choose_device, "cuda")
    machine.prepare(make_config("--device", "cpu"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    machine.prepare(config)
    assert capsys.readouterr().err == ""


def test_graphs_have_a_flag_of_their_own():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    chosen = {flag: machine.choose_graphs(flag, gpu) for flag in ("auto", "true", "false")}
    assert chosen == {"auto": True, "true": True, "false": False}
    assert not machine.choose_graphs("auto", cpu) and not machine.choose_graphs("false", cpu)
    assert "need a GPU" in one_line_error(machine.choose_graphs, "true", cpu)
    agent = make_dreamer(*SPACES["proprio"], make_config())
    words = {
        flags: said(make_config("--compile", flags[0], "--graphs", flags[1]), agent, gpu)
        for flags in (("false", "auto"), ("false", "false"))
    }
    assert words == {
        ("false", "auto"): "cuda:0, float32, not compiled, CUDA graphs",
        ("false", "false"): "cuda:0, float32, not compiled",
    }


def test_graphs_are_recorded_without_a_compiler_too():
    agent, recorded = make_dreamer(*SPACES["proprio"], make_config()), []
    capture_parts(agent, lambda function, generator: recorded.append(generator) or function)
    agent.act(make_obs("proprio", 1), agent.initial(1))
    assert recorded == [agent.generators["learn"], agent.generators["act"]]


@pytest.mark.parametrize(
    "device, visible, works, chosen",
    [
        ("cuda:2", None, [True] * 3, "2"),
        ("cuda:0", "3,1", [True] * 4, "3"),  # what is hidden from CUDA is not hidden from EGL
        ("cuda:0", None, [True], None),  # the first is EGL's own choice
        ("cuda:2", None, [True] * 2, None),  # a container may show EGL fewer
        ("cuda:1", None, [True, False], None),
        ("cuda:0", "GPU-8932f937", [True], None),
        ("cpu", None, [True] * 2, None),
    ],
)
def test_mujoco_draws_on_the_gpu_that_learns(device, visible, works, chosen, monkeypatch):
    for name, value in {"CUDA_VISIBLE_DEVICES": visible, "MUJOCO_EGL_DEVICE_ID": None}.items():
        monkeypatch.setenv(name, value or "")  # so that it is restored afterwards
        if value is None:
            monkeypatch.delenv(name)
    monkeypatch.setattr(opengl, "egl_displays", lambda: works)
    opengl.draw_beside(torch.device(device))
    assert os.environ.get("MUJOCO_EGL_DEVICE_ID") == chosen
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "5")
    opengl.draw_beside(torch.device(device))
    assert os.environ["MUJOCO_EGL_DEVICE_ID"] == "5"


@pytest.mark.parametrize("there, here", [(1, 2), (2, 1), (0, 1), (2, 2)])
def test_random_states_go_to_the_devices_that_are_there(there, here, monkeypatch):
    Cards(monkeypatch, *[(9, 0)] * here)
    given = {}
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, index: given.update({index: int(state)}))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        state = rng.get_rng_state()
    rng.set_rng_state(state | {"cuda": [torch.tensor(number) for number in range(there)]})
    assert given == {number: number for number in range(min(there, here))}


def test_the_compilers_advice_is_not_shown():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        machine.check_compiler()
        warnings.warn(
            "\nOnline softmax is disabled on the fly since Inductor decides to\nsplit the reduction.", stacklevel=1
        )
        warnings.warn("TensorFloat32 tensor cores for float32 matrix multiplication available but not", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert [str(each.message) for each in seen] == ["something else"]


def test_convolutions_give_the_same_sums_in_every_process(monkeypatch):
    """Trials of cuDNN, which may end otherwise next time, parted two runs of one seed."""
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "benchmark", True)
    monkeypatch.setattr(cudnn, "deterministic", False)
    machine.prepare(make_config("--device", "cpu"))
    assert (cudnn.benchmark, cudnn.deterministic) == (False, True)


HUGE = """
    import pathlib, re
    import torch
    from training.machine import prepare_cpu
    prepare_cpu(1)
    tensor = torch.ones(2**24)
    found = re.findall("AnonHugePages: +([0-9]+) kB", pathlib.Path("/proc/self/smaps").read_text())
    print(sum(map(int, found)) // 1024 >= 32)  # of 64 MiB
"""
PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not PAGES.exists() or "[never]" in PAGES.read_text(), reason="this kernel gives no large pages")
def test_large_tensors_are_in_large_pages():
    assert run_python(HUGE).stdout == "True\n"
