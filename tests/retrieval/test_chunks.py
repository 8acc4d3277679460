"""Chunks of vectors: each row once and in order, on one or several devices, and verified."""

from contextlib import nullcontext
from itertools import zip_longest

import numpy as np
import pytest
import torch
from retrieval.test_search import CPU, make_store

from torch_src.retrieval.chunks import ChunkReader, DeviceCache, check_blocks, read_chunks
from torch_src.retrieval.vectors import DamagedBlock


@pytest.fixture
def vectors():
    return np.random.default_rng(0).normal(size=(230, 4)).astype(np.float16)


@pytest.mark.parametrize("rows", [1, 64, 230, 1000])
def test_one_device_gets_all_rows_in_order(tmp_path, vectors, rows):
    store, next_row = make_store(tmp_path, vectors, 50), 0
    for first, chunk in read_chunks(store, rows):
        assert first == next_row and len(chunk) == min(rows, 230 - first)
        assert np.array_equal(chunk, vectors[first : first + len(chunk)])
        next_row += len(chunk)
    assert next_row == 230


def test_several_devices_share_the_rows(tmp_path, vectors):
    reader, rows = ChunkReader(make_store(tmp_path, vectors, 50), 30), []
    for pair in zip_longest(reader.chunks(CPU), reader.chunks(CPU)):
        for first, chunk in filter(None, pair):  # each has one chunk at a time
            assert np.array_equal(chunk, vectors[first : first + len(chunk)])
            rows += range(first, first + len(chunk))
    assert sorted(rows) == list(range(230))


def test_checksums_are_verified_however_many_devices_read(tmp_path, vectors):
    store = make_store(tmp_path, vectors, 50)
    path = store.block_path(2)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedBlock):
        check_blocks(store)
    reader = ChunkReader(store, 30)
    with pytest.raises(DamagedBlock):
        list(zip_longest(reader.chunks(CPU), reader.chunks(CPU)))


def test_cached_chunks_have_memory_of_their_own(tmp_path, vectors):
    cache, reader = DeviceCache([CPU]), ChunkReader(make_store(tmp_path, vectors, 50), 30)
    for _ in range(2):  # the second time replaces the first
        reader.next = 0
        list(cache.keep(0, reader.chunks(CPU, keep=True)))
    assert sum(len(chunk) for _, chunk in cache.chunks[0]) == 230
    for first, chunk in cache.split(0, 16):
        assert len(chunk) <= 16 and np.array_equal(chunk, vectors[first : first + len(chunk)])


class FakeEvent:
    """Stands for a CUDA event; counts copies that were started, and those that were waited for."""

    started = waited = 0

    def record(self):
        self.started += 1

    def synchronize(self):
        self.waited = self.started


class FakeStream:
    def __init__(self, device):
        self.events = []

    def wait_event(self, event):
        self.events.append(event)


def test_chunks_of_a_gpu_with_a_fake_one(tmp_path, monkeypatch, vectors):
    """The code for CUDA on the CPU: buffers are refilled after their copy, and the search waits for it."""
    computing, used = FakeStream(None), []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: used.append(stream))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: tensor.clone())
    monkeypatch.setattr(
        ChunkReader, "new_buffer", lambda reader, pinned: torch.empty(reader.rows, 4, dtype=torch.float16)
    )
    reader, read = ChunkReader(make_store(tmp_path, vectors, 50), 30), ChunkReader.read_into
    copies = []

    def read_into(reader, buffer):
        copies.append(buffer.data_ptr())
        return read(reader, buffer)

    monkeypatch.setattr(ChunkReader, "read_into", read_into)
    found = list(reader.chunks(torch.device("cuda", 0)))
    assert [first for first, _ in found] == list(range(0, 230, 30))
    assert np.array_equal(torch.cat([chunk for _, chunk in found]), vectors)
    assert len(set(copies)) == 2 and used == [computing] * len(found) == [computing] * len(computing.events)
    for event in computing.events:
        assert event.waited >= event.started - 1  # all copies but the last from this buffer
