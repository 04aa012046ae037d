"""The device of a process: it has a number, is torch's current one, and is set up the same way."""

from unittest.mock import Mock

import pytest
import torch
from pictures import settings

from lora_engine.devices import index_on, resolve_device, use_device
from lora_engine.lora.matmul import describe_kernels
from lora_engine.training import setup as run_setup
from lora_engine.training.setup import prepare


@pytest.fixture
def two_gpus(monkeypatch) -> list:
    """The devices that were made the current one; as torch does, it refuses one without a number.
    """
    chosen = []

    def set_device(device):
        if device.index is None:
            raise ValueError("expected a torch.device with a specified index")
        chosen.append(device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    return chosen


@pytest.mark.parametrize("name, number", [(None, 1), ("cuda", 1), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_has_a_number_and_becomes_the_current_one(two_gpus, name, number):
    device = resolve_device(name)
    assert device == torch.device("cuda", number)
    use_device(device)
    assert two_gpus == [device]
    assert resolve_device("cuda", local_rank=1, local_size=2) == torch.device("cuda", 1)


def test_attention_by_cudnn_is_switched_off_and_the_log_says_what_is_used(two_gpus):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        gpu = torch.device("cuda", 0)
        assert "cuDNN, flash" in describe_kernels(gpu, torch.bfloat16)
        use_device(gpu)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert describe_kernels(gpu, torch.bfloat16) == (
            "attention by flash, memory-efficient, math kernels, no TF32"
        )
        assert "by memory-efficient, math kernels" in describe_kernels(gpu, torch.float32)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_an_index_comes_from_pinned_memory_and_nothing_waits_for_it(monkeypatch):
    tensor, gpu = Mock(), torch.device("cuda", 0)
    monkeypatch.setattr(torch, "tensor", tensor)
    index_on(gpu, [2, 0])
    tensor.assert_called_once_with([2, 0], dtype=torch.long, pin_memory=True)
    tensor.return_value.to.assert_called_once_with(gpu, non_blocking=True)


def test_a_run_sets_its_device_up(blip_folder, data, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(run_setup, "use_device", used.append)
    prepare(settings(blip_folder, data, tmp_path / "run"))
    assert used == [torch.device("cpu")]
