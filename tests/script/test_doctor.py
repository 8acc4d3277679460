"""The doctor: versions, builds of torch against GPU and driver, a machine without any package."""

import os
import subprocess
import sys

import pytest
from toy_world import ROOT, make_world

from script import doctor

CARD = ["NVIDIA A100, 40960 MiB, 550.54"]


@pytest.mark.parametrize(
    ("version", "limits", "expected"),
    [
        ("2.13.0+cpu", ">=2.7,<3", True),
        ("2.6.0", ">=2.7,<3", False),
        ("3.0.0", ">=2.7,<3", False),
        ("3.0", "<3.0.0", False),
        ("5.0.0rc1", ">=5.0,<6", True),
        ("2.13", "==2.13.0", True),
        ("2024.4.16", ">=2024.4", True),
        ("1.0", "", True),
    ],
)
def test_versions(version, limits, expected):
    assert doctor.fits(version, limits) is expected


def test_included_files_are_no_packages():
    assert [name for name, _ in doctor.REQUIREMENT.findall("-r other.txt\nnumpy>=1.26\n")] == ["numpy"]


def test_requirements_are_read():
    found = doctor.required()
    assert {"torch", "numpy", "transformers", "xxhash"} <= found.keys() and found["tyro"] == ">=1.0,<2"


@pytest.mark.parametrize(
    ("cards", "cuda", "usable", "level", "words"),
    [
        (CARD, "12.8", True, doctor.OK, "A100"),
        ([], None, False, doctor.OK, "CPU"),
        ([], "12.8", False, doctor.OK, "uses the CPU"),
        (CARD, None, False, doctor.ERROR, "install -r requirements.txt"),
        (CARD, "13.0", False, doctor.ERROR, "too old"),
    ],
)
def test_gpu_and_build_of_torch(monkeypatch, cards, cuda, usable, level, words):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = doctor.gpu_finding(cards, "2.13.0", cuda, usable, "the driver is too old")
    assert found.level == level and words in found.text


def test_two_faiss_packages_are_an_error(monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: "1.12")
    monkeypatch.setattr("torch_src.retrieval.faiss_index._is_installed", lambda name: True)
    (found,) = doctor.check_faiss([])
    assert found.level == doctor.ERROR and "uninstall" in found.text


def test_data_model_and_output(tmp_path, capsys):
    world = make_world(tmp_path)
    words = ["--data_dir", str(world / "data"), "--pretrained_model_path", str(world / "model")]
    assert doctor.main([*words, "--output_dir", str(tmp_path / "new/folder")]) == 0
    printed = capsys.readouterr().out
    for line in (
        f"data      {world / 'data'}; ",
        f"model     {world / 'model'}",
        f"output    {tmp_path}: writable, with",
    ):
        assert f"ok       {line}" in printed
    assert not (tmp_path / "new").exists()
    (world / "data/dev/dev.json").unlink()
    doctor.main([*words, "--output_dir", "/proc/folder"])
    printed = capsys.readouterr().out
    assert "lacks " in printed and "dev.json" in printed and "ERROR    output" in printed


def test_a_machine_without_any_package():
    """-S: without the installed packages."""
    command = [sys.executable, "-S", "script/doctor.py"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 1 and not done.stderr
    assert "ERROR    packages  missing: " in done.stdout and "pip install -r requirements" in done.stdout
    assert "ok       disk" in done.stdout or "WARNING  disk" in done.stdout
